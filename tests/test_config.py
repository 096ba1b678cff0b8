"""The options: both ways to set them, what is refused and how; the recipes in configs/; the
learning rate's schedule."""
import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import train as train_script
from base.command_line import parse_options
from base.errors import BadInput
from config import ModelOptions, Options, filled_in
from mixers import (
    MIXERS,
    MixerOptions,
    gather_options,
    load_mixer_file,
    mechanism_of,
    options_class,
)
from model import GPTConfig
from sample import SampleOptions
from tools.sweep import SweepOptions
from training.run_folder import read_options

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def parse(*argv, **more):
    return parse_options(Options, argv, "tests", **more)[0]


def complaint(*argv, cls=Options):
    with pytest.raises(BadInput) as error:
        parse_options(cls, argv, "tests", with_config_file=cls is Options)
    assert "\n" not in str(error.value).strip()
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    """config(text) -> the path of a config file."""
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)
    return write


# -- the command line --------------------------------------------------------------------------

@pytest.mark.parametrize("cls", [Options, SampleOptions])
def test_help_lists_every_option_with_its_help(cls, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_options(cls, ["--help"], "what it does", with_config_file=cls is Options)
    assert exit.value.code == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "what it does" in listed
    for f in fields(cls):
        assert f" --{f.name}" in listed
        assert f.default.description and " ".join(f.default.description.split()) in listed, f.name
        if f.default.default is not None:
            assert f"[default: {f.default.default}]" in listed, f.name


@pytest.mark.parametrize("argv, name, value", [
    (["--n_layer=3"], "n_layer", 3),
    (["--n_layer", "3"], "n_layer", 3),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
    (["--lr_decay_iters=7"], "lr_decay_iters", 7),
    (["--lr_decay_iters=None"], "lr_decay_iters", None),
    (["--min_lr", "none"], "min_lr", None),
    (["--ffn_bias=None"], "ffn_bias", None),
    (["--pos=None"], "pos", None),
    (["--pos=none"], "pos", "none"),  # a position encoding of its own, not the absence of a choice
    (["--mixer=softmax,pelican"], "mixer", "softmax,pelican"),
    (["--out_dir=a=b c"], "out_dir", "a=b c"),
    (["--compile"], "compile", True),
    (["--compile=True"], "compile", True),
    (["--compile", "true"], "compile", True),
    (["--no-decay_lr"], "decay_lr", False),
    (["--decay_lr=False"], "decay_lr", False),
    (["--decay_lr", "false"], "decay_lr", False),
    (["--bias"], "bias", True),
    (["--bias=True"], "bias", True),
    (["--no-bias"], "bias", False),
    (["--bias=False"], "bias", False),
    (["--n_layer=3", "--n_layer=5"], "n_layer", 5),
])
def test_a_value_on_the_command_line(argv, name, value):
    # the base holds another value everywhere, so that no default can stand in for the one given
    base = {"lr_decay_iters": 1, "min_lr": 1e-9, "ffn_bias": True, "pos": "rope"}
    found = getattr(parse(*argv, base=base), name)
    assert found == value and type(found) is type(value)


def test_a_boolean_takes_no_word_that_is_not_its_own(config):
    argv = ["--compile", config("n_layer = 2"), "--seed=1"]
    options, config_file, given = parse_options(Options, argv, "tests")
    assert options.compile is True and options.n_layer == 2 and config_file.endswith("mine.py")
    assert given == {"compile", "seed"}


@pytest.mark.parametrize("argument, expected", [
    ("--n_layr=3", "--n_layer"), ("--learningrate=1", "--learning_rate"),
    ("--max-iters=5", "--max_iters"), ("--mixr", "--mixer"), ("--no-compil", "--no-compile"),
    ("--n_lay=3", "--n_layer"), ("--zzzzzzzz", "--help"),
])
def test_an_unknown_name_is_refused_with_the_nearest(argument, expected):
    message = complaint(argument)
    assert argument.partition("=")[0] in message and expected in message


@pytest.mark.parametrize("argument, expected", [
    ("--lr=1", "nearest: --learning_rate"), ("--heads=2", "nearest: --n_head"),
    ("--layers=3", "nearest: --n_layer"), ("--dim=3", "nearest: --n_embd"),
    ("--d_model=3", "nearest: --n_embd"), ("--steps=3", "nearest: --max_iters"),
    ("--epochs=3", "--max_iters"), ("--tokenizer=gpt2", "python -m data.text --tokenizer="),
    ("--config=x.py", "train.py configs/shakespeare.py"),
])
def test_what_newcomers_type_is_pointed_to_its_place(argument, expected, config):
    assert expected in complaint(argument)
    name, _, value = argument[2:].partition("=")
    assert expected.replace(": --", ": ") in complaint(config(f"{name} = {value!r}"))


def test_the_nearest_names_of_mixers_and_data_sets(train):
    assert "mixer 'softmx'; nearest: softmax; have " in train.refuses("--mixer=softmx")
    assert "nearest: lln_diag; " in train.refuses("--mixer=softmax,llndiag")
    message = train.refuses("--dataset=leters")
    assert "no data set 'leters'; nearest: letters; have " in message
    assert "nearest" not in train.refuses("--dataset=zzzz")


def test_help_is_grouped_and_lists_the_mixers_and_the_data_sets(here, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    of_mixers = [heading for heading in headings if heading.startswith("mixer ")]
    assert headings == ["positional arguments", "options", "model", *of_mixers,
                        "data and evaluation", "optimiser", "run", "wandb"]
    assert of_mixers[:3] == ["mixer lln, lln_diag", "mixer lln_diag", "mixer ssa"]
    words = " ".join(text.split())
    assert f"have {', '.join(MIXERS)} [default: softmax]" in words
    for heading, name in (("mixer ssa", "ssa_share"), ("optimiser", "beta1"),
                          ("data and evaluation", "dataset"), ("wandb", "wandb_log"),
                          ("run", "mixer_file"), ("model", "n_layer")):
        assert f"--{name}" in text.split(f"\n{heading}:\n")[1].split("\n\n")[0]
    assert re.search(r"have [^[]*\bletters, [^[]*\[default: shakespeare_char\]", words)


def test_an_unknown_name_of_sample():
    assert "--temprature" in complaint("--temprature=1", cls=SampleOptions)
    assert "--temperature" in complaint("--temprature=1", cls=SampleOptions)


@pytest.mark.parametrize("argv, naming", [
    (["a.py", "b.py"], "b.py"), (["xxcompile=False"], "xxcompile"), (["--n_layer"], "n_layer"),
    (["--no-n_layer"], "n_layer"),
])
def test_a_stray_argument_is_named(argv, naming, config):
    assert naming in complaint(*argv)


@pytest.mark.parametrize("name, text", [
    ("n_layer", "2.5"), ("n_layer", "two"), ("n_layer", ""), ("n_layer", "True"),
    ("n_layer", "None"), ("dropout", "big"),
    ("learning_rate", "nan"), ("learning_rate", "inf"), ("compile", "maybe"), ("compile", "1"),
    ("arch", "gpt3"), ("lr_schedule", "step"), ("min_lr", "low"), ("out_dir", ""),
])
def test_a_wrong_type_on_the_command_line(name, text):
    assert f"--{name}={text}" in complaint(f"--{name}={text}")


@pytest.mark.parametrize("name, value", [
    ("n_layer", "4"), ("n_layer", True), ("n_layer", 2.5), ("n_layer", None), ("n_layer", [4]),
    ("dropout", "0"), ("compile", 1), ("compile", "False"), ("arch", "gpt3"), ("mixer", 3),
    ("mixer", None), ("learning_rate", True), ("min_lr", "low"), ("bias", 0),
])
def test_a_wrong_type_in_a_config_file(name, value, config):
    path = config(f"{name} = {value!r}")
    message = complaint(path)
    assert path in message and f"{name} = {value!r}" in message


@pytest.mark.parametrize("name, value", [
    ("n_layer", 0), ("n_head", -1), ("block_size", 0), ("dropout", 1.0), ("dropout", -0.1),
    ("learning_rate", -1.0), ("batch_size", 0), ("gradient_accumulation_steps", 0),
    ("eval_interval", 0), ("log_interval", 0), ("max_iters", -1), ("seed", -1), ("seed", 2**63),
    ("beta1", 1.0), ("beta2", 1.0), ("head_temperature", 0.0), ("lr_decay_iters", -1),
    ("warmup_iters", -1), ("keep_last", 0),
    ("grad_clip", -1.0), ("norm_eps", 0.0), ("n_kv_head", 0), ("embed_rank", 0), ("eval_tokens", 0),
])
def test_a_value_out_of_range_both_ways(name, value, config):
    assert f"--{name}={value}" in complaint(f"--{name}={value}")
    assert f"{name} = {value}" in complaint(config(f"{name} = {value}"))


# -- a mechanism's own options ------------------------------------------------------------------

MINE = """
from typing import Optional

import torch
from base.options import option
from mixers import (
    MIXERS,
    MixerOptions,
    gather_options,
    load_mixer_file,
    mechanism_of,
    options_class,
)
from mixers.softmax import Softmax

class Mine(Softmax):
    class Options:
        mine_gate: float = option(0.5, "how far Mine opens", ge=0, le=1)
        mine_depth: Optional[int] = option(None, "layers of Mine [default: none]", ge=1)

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = torch.nn.Parameter(torch.full((1,), config.mine_gate))

    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return self.gate * y, state

MIXERS["mine"] = Mine
"""


def test_each_mixers_options_are_named_after_it_and_declared_in_its_file():
    names = [f.name for f in fields(MixerOptions)]
    assert "ssa_share" in names and "lln_matching" in names
    # general ones that some mixers take
    assert not {"conv", "attn_temperature", "rotate_features"} & set(names)
    for name in names:
        mixer = mechanism_of(name)
        assert name.startswith(f"{mixer}_")
        assert options_class(mixer).__module__ == f"mixers.{mixer}"
        assert name not in ModelOptions.__annotations__


def test_gptconfig_takes_a_mechanisms_options_by_keyword():
    assert GPTConfig(vocab_size=3, mixer="ssa", ssa_share=False).ssa_share is False
    # LLN + Diag is made of LLN
    assert GPTConfig(vocab_size=3, mixer="lln_diag", lln_matching="published").lln_matching
    for mixer, options in (("softmax", {"lln_matching": "published"}),
                           ("lln", {"lln_diag_mode": "sum"}),
                           ("lln_diag,lln", {"ssa_share": False})):
        [name] = options
        with pytest.raises(ValueError, match=f"{name} has no effect: no layer of mixer"):
            GPTConfig(vocab_size=3, mixer=mixer, **options)
    with pytest.raises(ValueError, match="linformer_slots"):
        GPTConfig(vocab_size=3, mixer="linformer", linformer_slots=0)


def test_a_users_mixer_has_options_of_its_own(train, sample, config):
    file = config(MINE)
    tiny = [*TINY, f"--mixer_file={file}", "--max_iters=2", "--out_dir=run"]
    train(*tiny, "--mixer=mine", "--mine_gate", "0.25", config("", "none.py"))
    recorded = json.loads(Path("run/config.json").read_text())
    assert (recorded["mine_gate"], recorded["mine_depth"]) == (0.25, None)
    # a config file sets them; a resumed run's own go before it
    recipe = config("mine_gate = 1", "recipe.py")
    assert parse(recipe, f"--mixer_file={file}").mine_gate == 1.0
    recipe = config(f"mixer_file = {file!r}\nmine_gate = 0.75", "recipe.py")
    assert parse("--mine_depth", "3", recipe).mine_gate == 0.75
    assert "mine_gate 0.25" in train(recipe, *tiny, "--mixer=mine", "--resume", "--max_iters=3")
    assert "mine_gate 0.25 -> 0.5" in train.refuses(
        *tiny, "--mixer=mine", "--resume", "--mine_gate=0.5", "--max_iters=4")
    assert "mine_gate has no effect: no layer of mixer 'softmax' is mine" in train.refuses(
        *tiny, "--mine_gate=0.75", "--out_dir=other")
    assert "--mine_gate=2.0: input should be less than or equal to 1" in train.refuses(
        *tiny, "--mine_gate=2", "--out_dir=other")
    assert "--mine_gate" in train.refuses(*tiny, "--mine_gat=1", "--out_dir=other")
    sample("--out_dir=run", f"--mixer_file={file}", "--num_samples=1", "--max_new_tokens=3")
    assert GPTConfig(vocab_size=3, mixer="mine", mine_gate=0).mine_gate == 0.0


def test_options_of_a_mixer_are_gone_with_it(here, config):
    sweep = parse_options(SweepOptions, [], "tests")[0]
    load_mixer_file(config(MINE))
    with_mine = parse_options(SweepOptions, ["--seeds=2"], "tests")[0]
    assert asdict(with_mine) == asdict(sweep) | dict(seeds=2, mine_gate=0.5, mine_depth=None)
    assert "mine_gate=0.5" in repr(Options()) and Options() != Options(mine_gate=0.0)
    del MIXERS["mine"]
    gather_options()
    assert "mine_gate" not in [f.name for f in fields(Options)]
    assert "mine_gate" not in repr(Options()) and Options() == Options()
    with pytest.raises(ValueError, match="mine_gate"):
        GPTConfig(vocab_size=3, mine_gate=0)


def test_help_lists_a_users_mixer_and_its_options_when_the_file_is_named(here, config, capsys):
    file = config(MINE)
    recipe = config(f"mixer_file = {file!r}", "recipe.py")
    for named in ([f"--mixer_file={file}"], ["--mixer_file", file], [recipe]):
        with pytest.raises(SystemExit):
            parse(*named, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert "mixer mine: --mine_gate float how far Mine opens [default: 0.5]" in text
        assert f"{list(MIXERS)[-2]}, mine [default: softmax]" in text


@pytest.mark.parametrize("old, new, reason", [
    ("mine_gate", "n_layer", "there is an option n_layer already"),
    ("mine_gate", "ssa_share", "option ssa_share is of mixer ssa already"),
    ("mine_gate: float", "mine_gate", "mine_gate is no option"),
    ('option(0.5, "how far Mine opens", ge=0, le=1)', "0.5", "mine_gate is no option"),
    ("0.5", "1.5", "mine_gate: input should be less than or equal to 1"),
    ("float =", "gloat =", "NameError"),
])
def test_an_option_that_a_users_mixer_declares_wrongly(old, new, reason, here, config):
    file = config(MINE.replace(old, new))
    known = [f.name for f in fields(Options)]
    message = complaint(f"--mixer_file={file}")
    assert f"mixer_file {file}" in message and reason in message
    assert [f.name for f in fields(Options)] == known and "mine" not in MIXERS


def test_a_mixer_file_runs_once(here, config):
    counted = MINE + "open('ran', 'a').write('x')\n"
    file = config(counted)
    for _ in range(2):
        read_options([f"--mixer_file={file}", "--mixer=mine"], "tests")
    assert Path("ran").read_text() == "x"
    config(counted.replace("0.5", "0.125"))  # it has changed
    assert read_options([f"--mixer_file={file}"], "tests")[0].mine_gate == 0.125


# -- config files ------------------------------------------------------------------------------

def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(config):
    path = config("n_layer = 7\nlearning_rate = 1\ndecay_lr = False\ncompile = True\nmin_lr = None")
    options = parse(path, "--n_layer=2", "--no-compile", base={"n_layer": 9, "n_head": 8})
    assert (options.n_layer, options.learning_rate) == (2, 1.0)
    assert (options.decay_lr, options.compile) == (False, False)
    assert type(options.learning_rate) is float
    assert (options.n_head, options.n_embd) == (8, 128)
    assert parse("--n_layer=2", path).n_layer == 2  # wherever it stands


def test_a_config_file_may_import_compute_and_keep_helpers(config):
    path = config("""
import math
from pathlib import Path
from configs.shakespeare import *
_tokens = 4096
def rows(tokens): return tokens // block_size
class Note: pass
block_size = 2 ** int(math.log2(128))
batch_size = rows(_tokens)
""")
    options = parse(path)
    assert (options.block_size, options.batch_size) == (128, 32)
    assert (options.n_layer, options.bias) == (4, False)


def test_an_unknown_name_in_a_config_file_is_refused_with_the_nearest(config):
    path = config("n_layr = 3")
    message = complaint(path, "--n_layer=2")
    assert path in message and "'n_layr'" in message and "n_layer" in message.replace("n_layr", "")


@pytest.mark.parametrize("text, reason", [
    ("n_layer = = 3", "SyntaxError"),
    ("n_layer = 3\n1 / 0", "ZeroDivisionError"),
    ("from configs.nowhere import *", "nowhere"),
    ("n_layer = n_layers", "NameError"),
    ("n_layer = 3\nraise SystemExit(0)", "SystemExit"),
    ("n_layer = 3\0", "null"),
    ("raise ValueError('two\\nlines')", "two lines"),
])
def test_a_config_file_that_does_not_run(text, reason, config):
    path = config(text)
    with pytest.raises(BadInput) as error:
        parse(path)
    assert path in str(error.value) and reason in " ".join(str(error.value).split())


@pytest.mark.parametrize("text, shown", [
    ("learning_rate = 10**400", "learning_rate = 1000"),
    ("n_layer = 10**6000", "n_layer = <int>"),  # more digits than Python writes
    ("class A:\n    def __repr__(self): 1 / 0\nn_layer = A()", "n_layer = <A>"),
    ("n_layer = [0] * 10**5", "n_layer = [0, 0, 0"),
])
def test_a_value_that_is_long_to_write(text, shown, config):
    message = complaint(config(text))
    assert shown in message and "input should be" in message and len(message) < 500


@pytest.mark.parametrize("argv, message", [
    (["--n_embd=2147483647", "--n_head=1"], "n_embd 2147483647 makes ffn_hidden 8589934588"),
    (["--n_embd=2147483646", "--n_head=1", "--arch=llama"], "makes ffn_hidden 5726623104"),
    (["--n_layer=1000000"], "--n_layer=1000000: input should be less than or equal to 10000"),
    ([f"--seed={'1' * 5000}"], "exceeded maximum size"),
    ([f"--batch_size={10**30}"], "input should be less than 2147483648"),
    (["--mixer=linformer", "--linformer_segment=2147483647", "--linformer_slots=2147483647"],
     "out of memory (Storage size calculation overflowed"),
    (["--n_embd=2147483646", "--n_head=1", "--ffn_hidden=1"], "choose a smaller model"),
])
def test_sizes_beyond_all_bounds(argv, message, train):
    assert message in train.refuses("--dataset=letters", "--device=cpu", *argv)


def test_a_vocabulary_beyond_all_bounds():
    for size in (10**30, 2**31, 0):
        with pytest.raises(ValueError, match="vocab_size"):
            GPTConfig(vocab_size=size)


def test_a_config_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        assert f"{path} does not exist" in complaint(str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_describes_a_model(path):
    options = parse(str(path))
    model = {f.name: getattr(options, f.name) for f in fields(ModelOptions)}
    assert GPTConfig(vocab_size=65, **model).n_embd == options.n_embd


def test_a_config_file_is_a_recipe_and_not_what_an_option_says_as_well():
    """But for the first command, the papers' cells, and the one that an outside check names."""
    kept = {"shakespeare_pelican", "cosmopedia_lln", "finetune_shakespeare_ssa"}
    for path in CONFIGS:
        imported = re.findall(r"^from configs.(\w+) import", path.read_text(), re.MULTILINE)
        if not imported or path.stem in kept:
            continue
        recipe, base = read_recipe(path.stem), read_recipe(imported[0])
        assert {name for name in recipe if recipe[name] != base[name]} != {"mixer"}, path


def read_recipe(name):
    return asdict(parse(str(ROOT / f"configs/{name}.py")))


def test_the_recipe_of_the_first_command_differs_in_the_mixer_alone():
    assert read_recipe("shakespeare_pelican") == read_recipe("shakespeare") | {"mixer": "pelican"}
    assert read_recipe("cosmopedia_lln") == read_recipe("cosmopedia") | {"mixer": "lln"}


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_recipe_takes_every_mixer_as_an_option(name):
    for path in CONFIGS:
        options = parse(str(path), f"--mixer={name}")
        assert filled_in(options).mixer == name


def test_nanogpts_demo_has_nanogpts_setting_for_a_cpu():
    options = asdict(parse(str(ROOT / "configs/shakespeare_nanogpt.py")))
    nanogpt = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
               "max_iters": 2000, "learning_rate": 1e-3, "warmup_iters": 100, "beta2": 0.99,
               "weight_decay": 0.1, "grad_clip": 1.0, "dropout": 0.0, "bias": False,
               "lr_schedule": "cosine", "decay_lr": True, "init_std": 0.02, "optimizer": "adamw"}
    assert {name: options[name] for name in nanogpt} == nanogpt


def test_the_recipes_of_one_size_have_one_size():
    demo, strong = (asdict(parse(str(ROOT / f"configs/shakespeare{name}.py")))
                    for name in ("_nanogpt", ""))
    size = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters", "dataset")
    assert {name: demo[name] for name in size} == {name: strong[name] for name in size}


PER_MIXER = """
learning_rate = 1e-3
max_iters = 30
per_mixer = {
    "softmax": dict(learning_rate=2e-3, pos="rope"),
    "lln + softmax": {"learning_rate": 4e-3},
    "linformer": {"linformer_segment": 8, "min_lr": 0.0},
}
"""


@pytest.mark.parametrize("words, expected", [
    ([], (2e-3, "rope", 2e-4)),  # softmax is the default
    (["--mixer=lln"], (1e-3, "learned", 1e-4)),
    (["--mixer=lln,softmax"], (4e-3, "learned", 4e-4)),
    (["--mixer=softmax,lln"], (1e-3, "learned", 1e-4)),
    (["--mixer=softmax", "--learning_rate=5"], (5, "rope", 0.5)),
    (["--mixer=softmax", "--pos=none"], (2e-3, "none", 2e-4)),
    (["--mixer=linformer"], (1e-3, "learned", 0.0)),
])
def test_a_recipe_may_differ_by_mixer(config, here, words, expected):
    options = resolved(config(PER_MIXER), *words)
    assert (options.learning_rate, options.pos, options.min_lr) == expected
    assert options.linformer_segment == (8 if options.mixer == "linformer" else 64)


@pytest.mark.parametrize("text, words", [
    ("per_mixer = 3", "per_mixer is no dict"),
    ("per_mixer = {'lln': 3}", r"per_mixer\['lln'\]: no mixer's name and a dict"),
    ("per_mixer = {3: {}}", r"per_mixer\[3\]: no mixer's name"),
    ("per_mixer = {'lln': {'learning_rat': 3}}", r"per_mixer\['lln'\].*learning_rate"),
    ("per_mixer = {'lln': {'learning_rate': 'x'}}", r"per_mixer\['lln'\].*learning_rate"),
    ("per_mixer = {'lln': {'mixer': 'ssa'}}", "mixer itself"),
    ("per_mixer = {'lnl': {'learning_rate': 1}}", "lnl"),
    ("per_mixer = {'lln': {'ssa_position': 'paper'}}", "ssa_position"),
])
def test_a_wrong_per_mixer_is_one_line(config, here, text, words):
    with pytest.raises(BadInput, match=words) as error:
        resolved(config(text), "--mixer=lln")
    assert "\n" not in str(error.value)


def test_a_resumed_runs_own_options_go_before_per_mixer(config, train, here):
    tiny = [word for word in TINY if not word.startswith("--learning_rate")]
    words = [config(PER_MIXER.replace("30", "1")), *tiny, f"--out_dir={here}/run"]
    train(*words, "--learning_rate=7e-3")
    options, _ = read_options([*words, "--resume"], "tests")
    assert (options.learning_rate, options.pos) == (7e-3, "rope")


def test_weights_start_from_the_width_unless_set(here):
    assert resolved("--n_embd=64").init_std == 0.125
    assert resolved("--n_embd=64", "--init_std=0.02").init_std == 0.02


def test_what_is_added_to_a_runs_weights_starts_as_they_did(train, here):
    train(*TINY, "--max_iters=0", "--init_std=0.3", f"--out_dir={here}/old")
    new = [*TINY, f"--init_from={here}/old", "--mixer=ssa"]
    assert resolved(*new).init_std == 0.3
    assert resolved(*new, "--init_std=0.1").init_std == 0.1


# -- what follows from other options -----------------------------------------------------------

def resolved(*argv):
    """Options as train.py uses them, for a folder that holds no run."""
    return read_options(list(argv), "tests")[0]


def test_the_decay_follows_max_iters_and_the_lowest_rate_follows_the_highest(here):
    options = resolved("--max_iters=50", "--learning_rate=0.5")
    assert (options.lr_decay_iters, options.min_lr, options.warmup_iters) == (50, 0.05, 100)
    options = resolved("--max_iters=50", "--lr_decay_iters=80", "--min_lr=0.01",
                       "--learning_rate=0.5")
    assert (options.lr_decay_iters, options.min_lr) == (80, 0.01)
    assert resolved("--min_lr=0").min_lr == 0.0
    assert resolved("--min_lr=0.001", "--learning_rate=0.001").min_lr == 0.001
    with pytest.raises(BadInput, match="min_lr 0.1 .*learning_rate 0.01"):
        resolved("--min_lr=0.1", "--learning_rate=0.01")


def rates(*argv, steps=None):
    options = resolved("--learning_rate=1", "--min_lr=0.2", *argv)
    steps = steps or options.max_iters + 5
    return [train_script.learning_rate(step, options) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak(here):
    lr = rates("--warmup_iters=4", "--max_iters=20")
    assert lr[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(lr) == 1.0
    assert rates("--warmup_iters=0", "--max_iters=20")[0] == 1.0


def test_cosine_decay(here):
    lr = rates("--warmup_iters=4", "--max_iters=20")
    assert lr[12] == pytest.approx(0.6)  # half-way down
    assert lr[8] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr[4:21] == sorted(lr[4:21], reverse=True)
    assert lr[20:] == [0.2] * 5


def test_linear_decay(here):
    lr = rates("--warmup_iters=4", "--max_iters=20", "--lr_schedule=linear")
    assert [lr[8], lr[12], lr[16]] == pytest.approx([0.8, 0.6, 0.4])
    assert lr[20:] == [0.2] * 5


def test_without_decay_the_rate_stays_at_the_peak(here):
    assert rates("--warmup_iters=4", "--max_iters=20", "--no-decay_lr")[4:] == [1.0] * 21


def test_a_decay_that_ends_before_the_run(here):
    lr = rates("--warmup_iters=4", "--max_iters=20", "--lr_decay_iters=10")
    assert lr[7] == pytest.approx(0.6) and lr[10:] == [0.2] * 15


@pytest.mark.parametrize("warmup", [9, 10, 11, 100])
def test_a_warm_up_as_long_as_the_run_or_longer(warmup, here):
    lr = rates(f"--warmup_iters={warmup}", "--max_iters=10", steps=10)
    assert lr == sorted(lr) and lr[0] == pytest.approx(1 / (warmup + 1)) and lr[-1] <= 1
