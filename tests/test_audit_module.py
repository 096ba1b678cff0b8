"""tools.audit --module: a model of one's own, with nanoGPT's interface among others, passes as it
is and fails with one line that leaks."""
import json

import pytest
import torch
from conftest import ROOT, one_line, run

from tools import audit_module

# a small model with the interface of nanoGPT's: (idx, targets=None) -> (logits, loss), and without
# targets the last position's logits alone
MODEL = '''
import torch
import torch.nn as nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)))

class GPT(nn.Module):
    def __init__(self, block_size=48, V=23, C=16):
        super().__init__()
        self.block_size = block_size
        self.wte = nn.Embedding(V, C)
        self.wpe = nn.Embedding(block_size, C)
        self.blocks = nn.Sequential(Block(C), Block(C))
        self.head = nn.Linear(C, V, bias=False)
        nn.init.zeros_(self.head.weight)  # hides everything, until noise is added

    def forward(self, idx, targets=None):
        B, T = idx.shape
        assert T <= self.block_size
        x = self.wte(idx) + self.wpe(torch.arange(T))
        x = self.blocks(x)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def build():
    torch.manual_seed(0)
    return GPT()

def sizes(C):
    return GPT(C=C)

def logits(idx):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(23, 23, generator=generator)
    return table[idx]

VALUE = 7
'''
CAUSAL = "is_causal=True"
X = "x = self.blocks(x)"
# the line that is replaced, by what, the question that finds it
LEAKS = {
    "mask": (CAUSAL, "is_causal=False", "suffix"),
    "long mask": (CAUSAL, "is_causal=T < 40", "suffix"),
    "mean": (X, "x = self.blocks(x - 1e-6 * x.mean(1, keepdim=True))", "suffix"),
    "value": (X, "m = x.mean(1, keepdim=True); x = self.blocks(x + m - m.detach())", "gradient"),
    "batch": (X, "x = self.blocks(x - 1e-6 * x.mean(0, keepdim=True))", "rows"),
    "length": (X, "x = self.blocks(x * (1 + 1e-4 * T))", "length"),
    "only in training": (X, "x = self.blocks(x + self.training * x.roll(-1, 1))", "train"),
    "alone": (X, "x = self.blocks(x * (1 + (B == 1)))", "one"),
    "random": (X, "x = self.blocks(x + 1e-3 * next(NOISE))", "repeat"),
    "targets": ("logits = self.head(x)", "logits = self.head(x + 1e-3 * self.wte(targets))",
                "targets"),
    "sampling": ("x[:, [-1]]", "2 * x[:, [-1]]", "last"),
}


def found(tmp_path, source, name="build", only=None):
    """question -> Answer of what `name` in a file is; to all questions, or to one."""
    path = tmp_path / "model.py"
    path.write_text(source)
    options = audit_module.ModuleOptions()
    subject = audit_module.subject_of(f"{path}:{name}", audit_module.load(str(path), name), options)
    questions = audit_module.questions_of(subject)
    if only:
        questions = {only: questions[only]}
    return {answer.question: answer for answer in audit_module.audit(subject, questions)}


def failed(answers):
    return {question for question, answer in answers.items() if answer.passed is False}


def test_a_model_with_nanogpts_interface_passes(tmp_path):
    answers = found(tmp_path, MODEL)
    assert failed(answers) == set()
    assert {"targets", "last"} <= answers.keys()
    assert all(answer.passed for answer in answers.values())


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_of_one_line_is_found(tmp_path, leak):
    old, new, question = LEAKS[leak]
    assert MODEL.count(old) == 1
    source = "import itertools\nNOISE = itertools.count()\n" + MODEL.replace(old, new)
    assert question in failed(found(tmp_path, source, only=question))


def test_a_leak_is_named_with_its_place_and_the_smallest_input(tmp_path):
    old, new, _ = LEAKS["long mask"]
    answer = found(tmp_path, MODEL.replace(old, new), only="suffix")["suffix"]
    assert answer.smallest["tokens"] == 40
    line = MODEL.splitlines().index("    def forward(self, x):") + 1
    assert "blocks.0 (Block.forward" in answer.where and answer.where.endswith(f"line {line})")


def test_a_plain_function_is_asked(tmp_path):
    answers = found(tmp_path, MODEL, "logits")
    assert failed(answers) == set() and answers["suffix"].passed
    assert answers["gradient"].passed is None
    reversed_ = MODEL.replace("return table[idx]", "return table[idx.flip(1)]")
    assert "suffix" in failed(found(tmp_path, reversed_, "logits", "suffix"))


@pytest.mark.parametrize("name", ["model", "config"])
def test_the_users_own_modules_are_imported_and_not_ours(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(MODEL.replace(CAUSAL, "is_causal=False"))
    path = tmp_path / "mine.py"
    path.write_text(f"from {name} import GPT\ndef build(): return GPT()\n")
    module = audit_module.load(str(path), "build")
    assert module.block_size == 48
    import config
    import model
    assert config.__file__ == str(ROOT / "config.py") and model.__file__ == str(ROOT / "model.py")


def test_the_model_itself_is_left_as_it_was(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    module = audit_module.load(str(path), "build")
    before = {name: p.clone() for name, p in module.state_dict().items()}
    subject = audit_module.subject_of("", module, audit_module.ModuleOptions())
    audit_module.audit(subject, audit_module.questions_of(subject))
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


@pytest.mark.slow
def test_the_command_ends_with_status_1_and_writes_what_it_says(home, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODEL.replace(CAUSAL, "is_causal=False"))
    done = run(home, "-m", "tools.audit", f"--module={path}:build", timeout=400)
    assert done.returncode == 1, done
    report = json.loads((tmp_path / "mine.build.audit.json").read_text())
    assert not report["passed"] and report["answers"][0]["question"] == "suffix"
    assert report["answers"][0]["meaning"] and "FAIL" in done.stdout


@pytest.mark.parametrize("name, words", [
    ("nothing", "has no 'nothing'"),
    ("Block", "def build(): return Block(...)"),
    ("VALUE", "name a module or a function"),
    ("sizes", "line 24, in __init__"),
])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, name, words):
    with pytest.raises(ValueError, match="--module") as error:
        found(tmp_path, MODEL, name)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_bad_names_are_refused_in_one_line(home, tmp_path):
    line = one_line(run(home, "-m", "tools.audit", "--module=model.py", timeout=400))
    assert "--module=model.py:build" in line
