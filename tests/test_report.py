"""tools/report.py: the page parsed, and looked at in a browser where there is one."""
import functools
import html.parser
import http.client
import json
import re
import sys
import threading
from statistics import mean, median

import browser
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT

from base.errors import BadInput
from base.files import write_file, write_json
from tools import report
from tools.compare import judge_arms, margin_of
from tools.compare_arms import arms_of
from tools.records import Record, read_records, write_records
from tools.report_data import Section, read_all
from tools.report_figures import cut_off
from tools.report_live import server_of
from tools.report_page import chips, page
from tools.report_sections import sections_of
from tools.sweep_cost import time_left
from tools.verdicts import in_words

STRONG = ROOT / "results/shakespeare_strong"
MARGIN = 0.03
HOSTILE = ["<script>said('script')</script>", "</script><img src=x onerror=said('img')>",
           "\" onmouseover=\"said('quote')", "a'b & <b>bold</b> &lt;i&gt;", "%{x} $y$ \\u003c",
           "\x1b[31mred \u202ereversed", "]]><!--"]
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


def sections(*names, baseline=None):
    return sections_of(read_all(names), baseline, MARGIN)


class Page(html.parser.HTMLParser):
    """A page read strictly: what is opened is closed. `tags` are (name, attributes), `text` is what
    a reader sees, `scripts` {id or number: content}."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], "", {}
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            name = self.tags[-1][1].get("id", len(self.scripts))
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self.open[-1:] != ["style"]:
            self.text += data

    @property
    def numbers(self):
        return json.loads(self.scripts["numbers"])


def page_of(*names, baseline=None):
    return page(sections(*names, baseline=baseline), "made by a test")


def renamed(records, folder, names):
    """Records like these, the k-th arm under the k-th name, in a folder."""
    mixers = sorted({record.config["mixer"] for record in records})
    changed = []
    for record in records:
        k = mixers.index(record.config["mixer"])
        if k < len(names):
            config = record.config | {"mixer": names[k]}
            name = f"run{k}-seed{config['seed']}"
            changed.append(Record(name, folder, config, record.metrics, record.scores))
    write_records(folder, changed)
    return folder


@pytest.fixture
def refuses(refusal):
    """refuses(*arguments): the one line of a tools.report that ended with status 2."""
    return functools.partial(refusal, report)


# -- what it says -------------------------------------------------------------------------------

def test_words_and_differences_are_those_of_the_records():
    records = read_records(STRONG)
    arms = arms_of(records)
    verdicts = judge_arms(arms, "softmax", margin_of(arms, "softmax", MARGIN))
    [section] = sections(STRONG)
    for row in section.table[:len(arms)]:
        verdict = verdicts[row["mixer"]]
        losses = [record.scores["report"]["loss"] for record in records
                  if record.config["mixer"] == row["mixer"]]
        assert row["report loss"].startswith(f"{mean(losses):.4f}")
        assert row["verdict"] == in_words(verdict)
        if verdict.word != "baseline":
            assert row["minus baseline"].startswith(f"{verdict.difference:+.4f}")
    for label, verdict in verdicts.items():
        if verdict.word != "baseline":
            part = re.search(f"{verdict.word}: ([^;.]*)", section.sentence).group(1)
            assert label in part.split(", ")
    assert section.sentence.startswith("Against softmax (loss 1.7212; 5 seeds)")
    assert any('not equal: pos is "learned" for' in note for note in section.notes)


def test_the_page_is_whole_and_asks_for_nothing():
    parsed = Page(page_of(STRONG))
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "numbers"}, {}, {}]
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "base", "form", "img"), tag
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href", "#").startswith("#")
    [policy] = [attributes["content"] for tag, attributes in parsed.tags
                if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert "Against softmax" in parsed.text


def test_an_arm_far_above_all_others_is_left_out_of_the_frame_and_named():
    def cut(losses):
        return cut_off({"title": "Losses", "layout": {"yaxis": {}}}, "yaxis", losses)

    near = {name: [1.5 + i / 100, 1.52 + i / 100] for i, name in enumerate("abcd")}
    assert cut(near) == {"title": "Losses", "layout": {"yaxis": {}}}
    found = cut(near | {"<far>": [2.4, 2.5, 2.7]})
    assert found["title"] == "Losses; not in the picture until a double click: &lt;far&gt; 2.500"
    low, high = found["layout"][found["cut"]]["range"]
    assert 1.4 < low < 1.5 and 1.55 < high < 1.7


def test_another_baseline_can_be_named():
    [section] = sections(STRONG, baseline="lln")
    assert section.sentence.startswith("Against lln (loss 1.7715; 5 seeds)")
    assert {arm["name"] for arm in section.curves["arms"] if arm["meta"]["colour"] is None} == {
        "lln"}


def test_curves_are_the_metrics():
    [section] = Page(page_of(STRONG)).numbers["sections"]
    for arm in section["curves"]["arms"]:
        records = [record for record in read_records(STRONG)
                   if record.config["mixer"] == arm["meta"]["label"]]
        assert [run["seed"] for run in arm["runs"]] == [1, 2, 3, 4, 5]
        for run, record in zip(arm["runs"], records):
            for key in ("iter", "flops", "seconds", "val_loss", "train_loss"):
                logged = np.array([row[key] for row in record.metrics], dtype=float)
                found = np.array(run[key], dtype=float)
                assert np.allclose(found, logged, rtol=1e-5, equal_nan=True)


def test_the_baseline_has_no_colour_and_the_others_each_their_own():
    [section] = sections(STRONG)
    colours = {arm["meta"]["label"]: arm["meta"]["colour"] for arm in section.curves["arms"]}
    assert colours["softmax"] is None and None not in {*colours.values()} - {None}
    assert len(set(colours.values())) == len(colours)
    for figure in section.figures:
        for trace in figure["traces"]:
            assert trace["meta"]["colour"] == colours[trace["meta"]["label"]]


def test_a_button_is_black_only_if_its_arm_is_the_baseline_everywhere():
    found = []
    for colours in ({"gla": None, "softmax": None}, {"gla": "#123456", "softmax": None}):
        traces = [{"meta": {"label": label, "colour": c}} for label, c in colours.items()]
        found.append(Section("one", "", figures=[{"traces": traces}]))
    for order in (found, found[::-1]):
        buttons = dict(re.findall('data-label="(.*?)" style="--colour: (.*?)"', chips(order)))
        assert buttons == {"gla": "#123456", "softmax": "var(--ink)"}


def test_plotly_knows_every_property_of_the_figures():
    go = pytest.importorskip("plotly.graph_objects")
    # of mqar the runs that chose the rates are there too
    for name, figures in ((STRONG, 3), (ROOT / "results/mqar", 4)):
        [section] = sections(name)
        assert len(section.figures) == figures
        for figure in section.figures:
            go.Figure({"data": figure["traces"], "layout": figure["layout"]})


def test_a_recall_task_shows_accuracy_by_difficulty():
    [section] = sections(ROOT / "results/mqar")
    [figure] = [one for one in section.figures if one["title"].startswith("Accuracy")]
    for trace in figure["traces"]:
        records = [record for record in read_records(ROOT / "results/mqar")
                   if record.config["mixer"] == trace["meta"]["label"]]
        for cell, accuracy in zip(trace["x"], trace["y"]):
            of_seeds = [record.scores["by_cell"][cell] for record in records]
            assert accuracy == pytest.approx(mean(of_seeds))
    assert "solved" in section.table[0] and "accuracy" in section.sentence
    assert "val_accuracy" in section.curves["quantities"]


def test_runs_that_cannot_be_compared_are_shown_all_the_same(tmp_path):
    records = read_records(STRONG / "lln.jsonl.gz")
    for record in records:
        record.config["block_size"] = 32
        record.name = f"short-{record.name}"
    write_records(tmp_path, records + read_records(STRONG / "softmax.jsonl.gz"))
    [section] = sections(tmp_path)
    assert any("differ in block_size" in note for note in section.notes)
    assert {arm["name"] for arm in section.curves["arms"]} == {"lln", "softmax"}


def test_loss_against_rate_marks_what_was_chosen(tmp_path):
    records = read_records(STRONG / "softmax.jsonl.gz")
    for rate, loss in ((0.001, 1.9), (0.003, 1.7), (0.01, 1.8)):
        of_one = records[0]
        config = of_one.config | {"learning_rate": rate, "holdout": 0.1, "seed": 0}
        part = {"loss": loss, "bpb": 2.0, "accuracy": None}
        scores = of_one.scores | {"select": part, "report": None, "by_position": None}
        records.append(Record(f"softmax-lr{rate:g}-seed0", tmp_path, config, [], scores))
    write_records(tmp_path, records)
    [section] = sections(tmp_path)
    [figure] = [one for one in section.figures if "learning rate" in one["title"]]
    [trace] = figure["traces"]
    assert (trace["x"], trace["y"]) == ([0.001, 0.003, 0.01], [1.9, 1.7, 1.8])
    sizes = trace["marker"]["size"]
    assert sizes[1] > sizes[0] == sizes[2]
    assert section.sentence.startswith("softmax alone: loss 1.7212, 5 seeds")


def test_a_claim_says_what_its_looks_found(tmp_path):
    """Its words, not those of judging the same runs at one look, and under the card's names."""
    records = [record for name in ("softmax", "causal_max")
               for record in read_records(STRONG / f"{name}.jsonl.gz")]
    names = {"softmax": "attention", "causal_max": "reduction"}
    for record in records:
        arm = names[record.config["mixer"]]
        record.name = f"{arm}-learning_rate0.003-seed{record.config['seed']}"
    folder = tmp_path / "smaller"
    write_records(folder, records)
    write_json(folder / "sweep.json", {"runs": [record.name for record in records], "failed": {}})
    word = {"difference": 0.014, "difference_low": 0.001, "difference_high": 0.027, "look": 8,
            "word": "worse", "within_margin": False, "missing": None, "seeds": 8, "blocks": 1,
            "autocorrelation": None}
    content = {
        "card": {"claim": "A smaller loss", "paper": "Somebody 2024", "baseline": "attention",
                 "margin_bpb": 0.03},
        "card_sha256": "0" * 64, "outcome": "refuted",
        "written": {"revision": "abc", "clean": False},
        "arms": {"attention": {}, "reduction": {"prediction": "better", "outcome": "refuted",
                                                "against_baseline": word}}}
    write_json(folder / "claim.json", content)
    first, second = sections(STRONG, tmp_path)
    assert second.title == "results/shakespeare_strong"  # claims come first
    assert first.sentence == (
        "Refuted: A smaller loss (Somebody 2024): reduction against attention is worse "
        "(predicted: better), +0.0140 [+0.0010, +0.0270] nats, 8 seeds.")
    assert [row["mixer"] for row in first.table] == ["attention", "reduction"]
    assert first.table[1]["verdict"] == "worse"
    assert first.provenance["revision of the code"] == "abc, with changes to it"
    content["arms"]["reduction"]["against_baseline"] = None
    write_json(folder / "claim.json", content)
    assert "it would take a first look." in sections(folder)[0].sentence


def test_a_sweep_in_the_middle_says_what_runs_and_the_time_left(tmp_path):
    records = read_records(STRONG / "softmax.jsonl.gz")
    write_records(tmp_path, records[:2])
    names = [record.name for record in records]
    write_json(tmp_path / "sweep.json", {"runs": names[:2], "missing": names[2:],
                                         "failed": {names[4]: "not <finite>"}})
    running = records[2]
    rows = [row for row in running.metrics if row["iter"] <= 500]
    write_json(tmp_path / names[2] / "config.json", running.config)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_file(tmp_path / names[2] / "metrics.jsonl", lines.encode())
    write_json(tmp_path / names[3] / "config.json", records[3].config)  # has just begun
    [section] = sections(tmp_path)
    left = time_left(rows[-1]["seconds"] / 500 * 1500)
    runs, failed, missing = section.status
    assert runs == f"{names[2]}: runs, step 500 of 2,000, {left}"
    assert failed == f"failed: {names[4]}: not <finite>"
    seconds = mean(max(row["seconds"] for row in record.metrics) for record in records[:2])
    assert missing == ("2 runs of the sweep missing, 1 not started, 1 at a time: "
                       f"{time_left(seconds)}")
    assert any("metrics.jsonl" in note for note in section.notes)
    [arm] = section.curves["arms"]
    assert [run["seed"] for run in arm["runs"]] == [1, 2, 3]


def bench_rows():
    """Of two mixers, two lengths and three rounds."""
    for mixer, speed in (("softmax", 1.0), ("lln", 2.0)):
        for length in (64, 128):
            for round, noise in enumerate((1.0, 1.1, 5.0)):
                cell = {"mode": "prefill", "batch": 4, "length": length, "mixer": mixer,
                        "machine": "<b>CPU</b>", "threads": 2, "dtype": "float32"}
                yield {"cell": cell, "round": round, "time": 1.0, "cell_seconds": 1.0,
                       "status": "ok", "ms": noise * length / speed, "ms_quantiles": [1.0],
                       "first_token_ms": None, "peak_bytes": None, "rise_bytes": 2.0**20 * length,
                       "state_bytes": 0.0 if mixer == "lln" else 1024.0, "flops_per_token": 1.0,
                       "ceiling_flops_per_s": None, "parameters": 1}


def write_bench(folder, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_file(folder / "cells.jsonl", lines.encode())
    return folder


def test_a_bench_shows_medians_over_the_length(tmp_path):
    [section] = sections(write_bench(tmp_path, bench_rows()))
    time, memory, state = section.figures
    for trace, speed in zip(time["traces"], (1.0, 2.0)):
        assert trace["x"] == [64, 128]
        assert trace["y"] == [pytest.approx(median((1.0, 1.1, 5.0)) / speed / 4)] * 2
    assert memory["traces"][0]["y"] == [64.0, 128.0]
    assert state["traces"][0]["y"] == [1.0, 1.0] and "lln" in state["title"]
    assert "lln is the fastest" in section.sentence and "2 times as fast" in section.sentence
    failed = {"cell": next(bench_rows())["cell"], "round": 0, "time": 1.0, "cell_seconds": 1.0,
              "status": "oom"}
    [section] = sections(write_bench(tmp_path, [failed]))
    assert "Nothing was measured" in section.sentence and section.figures == []


def write_inspection(folder, tokens):
    P = np.tril(np.ones((2, len(tokens), len(tokens)), np.float32))
    P /= P.sum(-1, keepdims=True)
    write_json(folder / "attention.json", {
        "checkpoint": "out/x/checkpoints/1", "tokens": tokens, "text": "".join(tokens),
        "layers": [{"layer": 0, "mixer": "softmax", "no_matrix": None}]})
    matrices = {"attention.0": P, "influence.model": P[0]}
    write_file(folder / "attention.safetensors", safetensors.numpy.save(matrices))
    return P


def test_maps_have_the_matrices_and_the_characters(tmp_path):
    P = write_inspection(tmp_path, ["a", " ", "<", "\n"])
    [section] = sections(tmp_path)
    first, second, last = section.maps["maps"]
    assert (first["name"], last["name"]) == ("attention, layer 0 (softmax), head 0",
                                             "influence, model")
    assert np.allclose(second["values"], P[1], atol=1e-3)
    assert section.maps["tokens"] == ["a", "␣", "&lt;", "⏎"]


# -- what is wrong ------------------------------------------------------------------------------

def test_what_cannot_be_is_refused_in_a_line(refuses, tmp_path):
    assert "nothing to report on; name" in refuses()
    assert f"nothing to report on in {tmp_path}" in refuses(tmp_path)
    assert "--port is for --live" in refuses(STRONG, "--port=8000")
    assert "--live writes no file" in refuses(STRONG, "--live", "--out=x.html")
    assert "--baseline=sofmax: not among the runs; have causal_max," in refuses(
        STRONG, "--baseline=sofmax")
    assert "nearest: --margin_bpb" in refuses(STRONG, "--margin_bpd=1")
    assert "cannot write" in refuses(STRONG, f"--out={tmp_path}/{'long' * 100}.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content", [
    ("cells.jsonl", b'{"cell": {}}\n'), ("cells.jsonl", b"[[\n"), ("attention.json", b"[]"),
    ("attention.json", b'{"tokens": []}'), ("claim.json", b'{"card": 1}'), ("sweep.json", b"{")])
def test_damaged_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(name.removesuffix(".json"))):
        read_all([tmp_path]) and sections(tmp_path)


def test_matrices_that_are_none_are_refused(tmp_path):
    write_inspection(tmp_path, ["a", "b"])
    for content in (b"\xff" * 100, safetensors.numpy.save({"x": np.ones((2, 3), np.float32)}),
                    safetensors.numpy.save({"x": np.ones((2, 2), np.int64)})):
        (tmp_path / "attention.safetensors").write_bytes(content)
        with pytest.raises(BadInput, match="damaged"):
            read_all([tmp_path])


def test_the_command_writes_the_page_and_says_the_verdicts(tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    out.symlink_to(tmp_path / "elsewhere")  # is replaced, not followed
    monkeypatch.setattr(sys, "argv", ["tools.report", str(STRONG), f"--out={out}"])
    report.main()
    said = capsys.readouterr().out
    assert "results/shakespeare_strong: Against softmax" in said
    assert not out.is_symlink() and not (tmp_path / "elsewhere").exists()
    assert "<!DOCTYPE html>" in out.read_text(encoding="utf-8")


# -- hostile names ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of what is called as nothing should be: mixers, a sweep, its errors, tokens."""
    folder = tmp_path_factory.mktemp("hostile")
    sweep = renamed(read_records(STRONG), folder / HOSTILE[1].replace("/", ":"), HOSTILE)
    names = [record.name for record in read_records(sweep)]
    write_json(sweep / "sweep.json", {"runs": names, "failed": {HOSTILE[0].replace("/", ":"):
                                                                HOSTILE[1]}})
    write_inspection(folder / "inspect", HOSTILE)
    return folder


def test_hostile_names_stay_text(hostile):
    """They add no tag: the page has those of a page with other names."""
    parsed = Page(page_of(hostile))
    for tag, attributes in parsed.tags:
        assert tag not in ("img", "b", "i"), tag
        assert not [name for name in attributes if name.startswith("on")]
    assert [attributes for tag, attributes in parsed.tags if tag == "script"] == [
        {"type": "application/json", "id": "numbers"}, {}, {}]
    for name in HOSTILE[:5]:
        assert name in parsed.text
    assert "\x1b" not in parsed.text and "\u202e" not in parsed.text
    assert "\\x1b[31mred" in parsed.text


# -- the live page ------------------------------------------------------------------------------

@pytest.fixture
def live(tmp_path):
    """A server of a sweep in which one run is under way: (its port, the run's folder)."""
    records = read_records(STRONG / "softmax.jsonl.gz")
    write_records(tmp_path / "sweep", records[:2])
    run = tmp_path / "sweep" / records[2].name
    write_json(tmp_path / "sweep" / "sweep.json", {
        "runs": [records[0].name, records[1].name], "missing": [records[2].name], "failed": {}})
    write_json(run / "config.json", records[2].config)
    write_file(run / "metrics.jsonl", (json.dumps(records[2].metrics[0]) + "\n").encode())
    server = server_of(lambda: sections(tmp_path), "made by a test", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server, run
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, path, host=None):
    """(status, content) of an answer."""
    address, port = server.server_address
    connection = http.client.HTTPConnection(address, port, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_live_page_is_for_this_machine_alone(live):
    server, _ = live
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_address[1]
    status, content = get(server, "/")
    assert status == 200 and "connect-src 'self'" in content
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        status, content = get(server, "/numbers.json", host)
        assert status == 403 and "softmax" not in content
    assert get(server, "/numbers.json", f"localhost:{port}")[0] == 200
    assert get(server, "/../etc/passwd")[0] == get(server, "/sweep.json")[0] == 404


def test_the_live_page_follows_the_runs(live, monkeypatch):
    server, run = live
    monkeypatch.setattr("tools.report_live.LASTS", 0)
    before = json.loads(get(server, "/numbers.json")[1])
    more = {"iter": 1000, "train_loss": 1.5, "val_loss": None, "seconds": 10.0}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(more) + "\n")
    after = json.loads(get(server, "/numbers.json")[1])
    for news, steps in ((before, 50), (after, 1000)):
        [section] = news["numbers"]["sections"]
        assert section["curves"]["arms"][0]["runs"][2]["iter"][-1] == steps
        assert f"step {steps:,} of 2,000" in news["words"]["s0-words"]
    (run.parent / "sweep.json").write_text("{")
    assert "sweep.json is damaged" in json.loads(get(server, "/numbers.json")[1])["error"]
    status, said = get(server, "/")
    assert status == 500 and "sweep.json is damaged" in said


# -- in a browser -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.find() is None:
        pytest.skip("no Chromium here (Debian: apt install chromium): the page is only parsed")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


def show(chromium, address):
    """Opens a page and has everything drawn, though it is not in view."""
    chromium.said.clear()
    chromium.asked.clear()
    chromium.open(address)
    chromium.run("document.querySelectorAll('.plot').forEach(draw)")
    chromium.until("[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of three mixers of two seeds each: less to draw."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("softmax", "lln", "causal_max"):
        write_records(folder, read_records(STRONG / f"{name}.jsonl.gz")[:2])
    return folder


@pytest.fixture
def opened(chromium, tmp_path):
    """opened(*folders): a page of them in the browser."""
    def call(*names):
        (tmp_path / "page.html").write_text(page_of(*names), encoding="utf-8")
        show(chromium, f"file://{tmp_path}/page.html")
        return chromium
    return call


def test_the_page_in_a_browser(opened, few):
    """Without errors, asking for nothing, with the records' numbers; axes and mixers can be chosen;
    it fits a phone, and is dark where that is liked."""
    tab = opened(few)
    assert tab.said == []
    assert [address for address in tab.asked if not address.startswith(("file:", "data:"))] == []
    records = {}
    for record in read_records(few):
        records.setdefault(record.config["mixer"], []).append(record)
    drawn = "document.getElementById('s0-curves').data"
    for trace in tab.run(f"{drawn}.filter(t => t.mode !== 'lines')"):
        rows = [[row for row in record.metrics if row["val_loss"] is not None]
                for record in records[trace["name"]]]
        assert trace["x"] == [row["iter"] for row in rows[0]]
        expected = np.median([[row["val_loss"] for row in of_run] for of_run in rows], axis=0)
        assert np.allclose(trace["y"], expected, atol=1e-5)
    choose = ("(name, value) => {{ const s = document.querySelector(`[name=${{name}}]`);"
              " s.value = value; s.dispatchEvent(new Event('change', {{bubbles: true}})); }}")
    tab.run(f"({choose.format()})('x', 'flops')")
    tab.run(f"({choose.format()})('seeds', 'each')")
    lines = tab.run(drawn)
    assert len(lines) == 6 and lines[0]["name"] == "causal_max, seed 1"
    flops = [row["flops"] for row in records["causal_max"][0].metrics if row["val_loss"]]
    assert np.allclose(lines[0]["x"], flops, rtol=1e-5)

    shown = ("[...document.querySelectorAll('tr:not([hidden]) td:first-child')]"
             ".map(td => td.textContent)")
    assert len(tab.run(shown)) == 3
    tab.run("document.querySelector('button[data-label=lln]').click()")
    assert tab.run(shown) == ["lln"]
    visible = "[...new Set({}.filter(t => t.visible).map(t => t.meta.label))]"
    for i in range(4):
        plot = "s0-curves" if i == 3 else f"s0-f{i}"
        assert tab.run(visible.format(f"document.getElementById('{plot}').data")) == ["lln"]
    tab.run("document.querySelector('button[data-label=lln]').click()")
    assert len(tab.run(shown)) == 3

    colour = "document.getElementById('s0-f0').layout.font.color"
    light = tab.run(colour)
    tab.look(390, 844, dark=True, phone=True)
    tab.until(f"{colour} !== '{light}'")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.look(1280, 900)
    tab.until(f"{colour} === '{light}'")
    assert tab.said == []


def test_hostile_names_stay_text_in_a_browser(opened, hostile):
    tab = opened(hostile)
    tab.run("window.said = what => { throw Error(what) }")
    assert tab.said == []
    assert tab.run("document.querySelectorAll('main img, main b, main i, main script').length") == 0
    assert tab.run("document.querySelectorAll('.plot a').length") == 0
    ticks_of = "[...document.querySelectorAll('#{} .ytick text')].map(t => t.textContent)"
    ticks = tab.run(ticks_of.format("s0-f0"))
    assert {*ticks} < {*HOSTILE[:5], "\\x1b[31mred \\u202ereversed"} and len(ticks) == 5
    # and what came in all the same would not run
    tab.run("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='hit = 1'>`)")
    tab.until("document.querySelector('img').complete")
    assert tab.run("window.hit") is None and "Content Security Policy" in str(tab.said)
    tokens = tab.run(ticks_of.format("s1-map"))
    assert HOSTILE[1].replace(" ", "␣") in tokens


def test_a_live_page_in_a_browser(chromium, live, monkeypatch):
    server, run = live
    monkeypatch.setattr("tools.report_live.LASTS", 0)
    show(chromium, f"http://127.0.0.1:{server.server_address[1]}/")
    assert "step 50 of" in chromium.run("document.body.textContent")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iter": 1000, "train_loss": 1.5, "seconds": 10.0}) + "\n")
    chromium.run("update()")
    assert "step 1,000 of" in chromium.run("document.body.textContent")
    assert chromium.run("numbers.sections[0].curves.arms[0].runs[2].iter.at(-1)") == 1000
    assert chromium.said == []
