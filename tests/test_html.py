"""logs/report.py: the page and the figures of runs."""

import collections
import dataclasses
import hashlib
import html.parser
import json
import math
import os
import re
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from conftest import (
    CODED_STREAM,
    FINEST,
    ROOT,
    VOCAB,
    clean_environment,
    error_line,
    few_words,
    tiny_config,
    tiny_stream,
    tiny_table,
    warm_model,
    warm_weights,
    write_shards,
)
from pretend import CUDA, pretended_device

import train_gpt

sys.path.insert(0, str(ROOT / "tests" / "experiments"))
sys.path.insert(0, str(ROOT / "logs"))
import compare_quantizers
import report
from report import ReportError, Trace, labels_of, page, read_log, read_run, visible

# ---- Folders of runs -----------------------------------------------------------------------------

SETTINGS = dict(preset="demo", seed=1, ngram_order=5, ngram_recent=3, ngram_hash_bits=12)
HEADER = "{} {}, 2026-01-02 03:04:05 UTC"
STEP = "step {}/40  ETA 9 s  loss {} (weighted {})  lr x1.000  1,234 tokens/s  {} s"
HOSTILE = '</script><script>alert("&")</script>\u202e\x07'
PIECES = ["<unk>", "<s>", "<b>&amp;", "\u2581\u202etext", "\u2581a", "b", "\x1b[0m\u0301"]
PIECES += ["<0x0A>", "<0xC3>", "<0xA9>", "\u2581\u05e9\u05dc", "</span>", "'\"", "\u200b"]
KINDS = "UCNNNNNBBBNNNN"


def log_text(*steps, name="run", command="train"):
    """Return a log whose training has a line for each (step, loss) of `steps`."""
    settings = ["  PRESET=demo RUN_ID= DATA_PATH=my text", "  SEED=7"]
    lines = [HEADER.format(command, name), "cpu tiny", *settings]
    lines += [STEP.format(n, loss, loss - 0.25, 2 * n) for n, loss in steps]
    return "\n".join(lines) + "\n"


def stage(name, val_bpb):
    """Return a stage as results.json has it."""
    return dict(name=name, val_bpb=val_bpb, val_loss=2 * val_bpb, tokens=60, bytes=99, seconds=1.5)


def results(name="run", last=1.25, **changes):
    """Return the results.json of a finished run."""
    values = dict(pre_quant=1.5, round_trip=1.51, sliding=1.505, ttt=1.5, mixer=last)
    return (
        dict(
            run_id=name,
            seed=1,
            command="train",
            settings=SETTINGS,
            environment=dict(device="cpu tiny"),
            train=dict(seconds=70.0, calibration_seconds=5.0, quantize_seconds=1.0),
            artifact=dict(
                path="nowhere",
                weights_bytes=700_000,
                code_bytes=160_000,
                total_bytes=860_000,
                limit_bytes=1_000_000,
            ),
            stages=[stage(*item) for item in values.items()],
            val_bpb=last,
            proof=dict(
                tokens=60,
                predicted_bits=800.5,
                bytes_on_disk=111,
                encode_seconds=1.0,
                decode_seconds=2.0,
            ),
        )
        | changes
    )


def new_trace(path, n=60, pieces=PIECES, kinds=KINDS, mixer=True, seed=0):
    """Write a trace of n tokens of an invented text, and return it as a dict.

    It belongs to the results in its folder, if there are any.
    """
    beside = path.parent / "results.json"
    val_bpb = json.loads(beside.read_bytes())["val_bpb"] if beside.exists() else 0.0
    random = np.random.default_rng(seed)
    tokens = np.append(1, random.integers(2, len(pieces), n))
    tokens[n // 2] = 1
    stages = {}
    for stage in ["round_trip", "ttt", *["unguarded", "mixer"] * mixer]:
        own = 2 ** random.uniform(10, 23, (1, n))
        highest = np.sort(random.integers(1, 1 << 20, (8, n)), axis=0)[::-1]
        ids = np.array([random.permutation(len(pieces))[:8] for _ in range(n)]).T
        stages[stage] = np.concatenate([own.astype(int), highest, ids])
    arrays = dict(val_bpb=val_bpb, tokens=tokens, pieces=pieces, kinds=kinds, bos_id=1) | stages
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.fixture
def new_run(tmp_path):
    """new_run(name, trace=True, **changes) -> the folder of an invented run that is finished."""

    def made(name="run", trace=True, **changes):
        folder = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results(name, **changes)))
        (folder / "train.log").write_text(log_text((1, 6.5), (10, 5.0), (40, 4.0), name=name))
        if trace:
            new_trace(folder / "trace.npz")
        return folder

    return made


def built(*folders):
    """Return the page of the runs in these folders."""
    return page([read_run(folder) for folder in folders])


# ---- What a page is ------------------------------------------------------------------------------

VOID = {"meta", "input", "br"}


class Element:
    """An element of a page: its name, attributes, children and text."""

    def __init__(self, name, attributes):
        self.name = name
        self.attributes = dict(attributes)
        self.children = []
        self.text = ""

    def all(self, name=None):
        """Yield it and all elements in it, in order, that have this name."""
        if name in (None, self.name):
            yield self
        for child in self.children:
            yield from child.all(name)

    def words(self):
        """Return all text in it."""
        return self.text + "".join(child.words() for child in self.children)


class Tree(html.parser.HTMLParser):
    """Parse a page into Elements; AssertionError where tags are not balanced or repeat a name."""

    def __init__(self, text):
        super().__init__()
        self.open = [Element("page", [])]
        self.feed(text)
        self.close()
        assert len(self.open) == 1
        self.root = self.open[0]

    def handle_starttag(self, name, attributes):
        """Begin an element."""
        names = [n for n, _ in attributes]
        assert len(set(names)) == len(names)
        element = Element(name, attributes)
        self.open[-1].children.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_startendtag(self, name, attributes):
        """Take an element that is empty, as in SVG."""
        self.open[-1].children.append(Element(name, attributes))

    def handle_endtag(self, name):
        """End the innermost element, which must have this name."""
        assert self.open.pop().name == name

    def handle_data(self, data):
        """Keep text."""
        self.open[-1].text += data


def tree(text):
    """Return a page's root Element."""
    return Tree(text).root


@pytest.fixture
def whole(new_run):
    """The page of two seeds with everything, as (text, root)."""
    text = built(new_run("one"), new_run("two", last=1.35, settings=SETTINGS | dict(seed=2)))
    return text, tree(text)


def test_page_is_valid(whole):
    """Balanced, with a language and a title; ids are unique, and what refers to one finds it."""
    text, root = whole
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(list(root.all("title"))) > 1
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    for element in root.all():
        for name in ("aria-labelledby", "aria-describedby"):
            assert {*element.attributes.get(name, "").split()} <= {*ids}
    links = re.findall(r'(?:href="|url\()([^")]*)', text)
    assert links
    assert {link[0] for link in links} == {"#"}
    assert {link[1:] for link in links} <= {*ids}


def test_page_needs_nothing_from_elsewhere(whole):
    """No address, no file, and a policy that forbids to load any."""
    text, root = whole
    assert "://" not in text
    assert "@import" not in text
    assert not [e for e in root.all() if {"src", "srcset", "data"} & e.attributes.keys()]
    assert not list(root.all("link"))
    (policy,) = [e for e in root.all("meta") if "http-equiv" in e.attributes]
    assert policy.attributes["content"].startswith("default-src 'none';")


def test_every_chart_has_a_text_alternative(whole):
    """An image with a title and a description, which has its figures."""
    _, root = whole
    charts = list(root.all("svg"))
    assert len(charts) >= 8
    for chart in charts:
        assert chart.attributes["role"] == "img"
        title, description = chart.children[:2]
        assert (title.name, description.name) == ("title", "desc")
        assert title.attributes["id"] == chart.attributes["aria-labelledby"]
        assert description.attributes["id"] == chart.attributes["aria-describedby"]
        assert title.text
        assert re.search(r"\d", description.text)


def test_tables_have_headers(whole):
    """Of columns and of rows."""
    _, root = whole
    tables = list(root.all("table"))
    assert tables
    for found in tables:
        scopes = collections.Counter(e.attributes["scope"] for e in found.all("th"))
        assert scopes["row"] == len(list(found.all("tr"))) - 1
        assert scopes["col"] >= 2
        assert [e.words() for e in found.all("caption")] != [""]


def spans_of(root):
    """Return the spans of the text's tokens."""
    (text,) = [e for e in root.all("div") if e.attributes.get("id") == "text"]
    return list(text.all("span"))


def test_every_token_can_be_reached(whole):
    """A focusable span each; the tab key stops at one of them, the arrow keys reach the others."""
    _, root = whole
    stops = [span.attributes["tabindex"] for span in spans_of(root)]
    assert stops == ["0"] + ["-1"] * 59


def test_shade_says_how_many_bits(new_run):
    """The class of a token is that of its bits under the last stage."""
    folder = new_run()
    last = read_run(folder).trace.bits["mixer"]
    edges = [sum(bits >= edge for edge in (1, 2, 4, 8, 12)) for bits in last]
    assert len(set(edges)) > 2
    classes = [span.attributes["class"] for span in spans_of(tree(built(folder)))]
    assert classes == [f"b{edge}" for edge in edges]


def test_page_of_several_seeds_has_all_of_them(whole):
    """Each one's figures, and their mean with the sample's deviation."""
    text, root = whole
    (first, *_) = root.all("table")
    assert {"one", "two", "1.250000", "1.350000"} <= {e.words() for e in first.all()}
    assert "Mean of 2 runs: 1.300000 bits a byte, standard deviation 0.070711." in text


def test_page_has_no_mean_of_unlike_runs(new_run):
    """It says what differs; seeds and places may."""
    alike = SETTINGS | dict(seed=2, run_id="two", verify_tokens=9)
    assert "Mean of 2 runs" in built(new_run("one"), new_run("two", settings=alike))
    text = built(new_run("one"), new_run("two", settings=alike | dict(ngram_order=4)))
    assert "No mean: the runs differ in NGRAM_ORDER." in text
    stages = [stage("pre_quant", 1.5)]
    text = built(new_run("one"), new_run("two", trace=False, stages=stages, settings=alike))
    assert "No mean: the runs differ in their last stage." in text
    assert "Mean of" not in text


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(validation=dict(bytes=98)), "the runs differ in validation text"),
        (dict(environment=dict(device="gpu")), "the runs differ in script or environment"),
        (dict(settings=SETTINGS), "runs have the same seed"),
    ],
)
def test_page_has_no_mean_of_what_is_not_summarized(new_run, changes, words):
    """Another text, another machine, or the same run twice."""
    changes = dict(settings=SETTINGS | dict(seed=2)) | changes
    text = built(new_run("one"), new_run("two", **changes))
    assert f"No mean: {words}." in text
    assert "Mean of" not in text


def test_page_leads_to_its_sections(whole):
    """Links in the order of the sections; the long text is the last."""
    _, root = whole
    links = [e.attributes["href"][1:] for e in root.all("a")]
    assert links == ["runs", "result", "training", "budget", "settings", "text-title"]
    assert [e.attributes["id"] for e in root.all("h2")] == links


def test_page_says_what_its_stages_are(whole):
    """Every stage that the script scores, and the mixer without its guard, once."""
    _, root = whole
    (stages,) = [e for e in root.all("ul") if e.attributes.get("class") == "stages"]
    assert [e.text for e in stages.all("b")] == [
        "pre_quant",
        "round_trip",
        "sliding",
        "ttt",
        "mixer",
        "unguarded",
    ]
    plans = train_gpt.evaluation_plans(tiny_config(mixer="learned"))
    assert {name for plan in plans for name in plan.stages} <= report.STAGES.keys()


def test_page_has_the_cap_and_the_length_of_training(new_run):
    """Beside what was used of them."""
    text = built(new_run(train=dict(seconds=7.0, steps=1200, tokens=34567)))
    assert "860,000 of 1,000,000 bytes" in text
    assert "1,200 steps, 34,567 tokens" in text


def test_length_of_training_may_be_unknown(new_run):
    """As in results.json that somebody has changed."""
    assert "unknown" in built(new_run(train=dict(seconds=7.0, steps=None, tokens=None)))


def test_seconds_that_count_are_said(new_run):
    """What reads held-out text counts as training; packing and pre_quant count as nothing."""
    assert "run, on cpu tiny: 75 s of training, 6 s of evaluation." in built(new_run())


def test_seconds_are_said_of_each_device(new_run):
    """A proof alone, which has neither training nor stages, says nothing."""
    other = dict(environment=dict(device="gpu"), train=None)
    text = built(new_run(), new_run("two", **other), new_run("proof", train=None, stages=[]))
    assert "; two, on gpu: 6 s of evaluation." in text
    assert "proof, on cpu tiny" not in text
    alone = built(new_run("proof", train=None, stages=[], trace=False))
    assert "on 8xH100. <" in alone


def test_only_parts_that_took_time_are_drawn(new_run):
    """Less than a twentieth of a second is none, and what is not known yet is none."""
    train = dict(seconds=7.0, calibration_seconds=0.04, quantize_seconds=None)
    assert [*report.seconds_of(read_run(new_run(train=train)))][:2] == ["training", "pre_quant"]


def test_runs_of_one_name_are_told_apart(new_run):
    """By their folders, as they were given; other runs keep their names."""
    folders = new_run("same"), new_run("same"), new_run("other")
    (first, *_) = tree(built(*folders)).all("table")
    heads = [e.text for e in first.all("th") if e.attributes["scope"] == "col"]
    assert heads == ["", str(folders[0]), str(folders[1]), "other"]


def test_page_has_the_proof(new_run):
    """What was predicted, and what was decoded."""
    assert "another process decoded 60 tokens from 111 bytes, predicted 100.1" in built(new_run())


# ---- Text that would do harm ---------------------------------------------------------------------


def unseen(text):
    """Return the characters of a text that show nothing or reorder others; line feeds are fine."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return {c for c in text if unicodedata.category(c) in hidden and c != "\n"}


def test_text_of_a_run_is_shown_and_not_obeyed(new_run):
    """Name, device, settings and stage: no element or control character comes from them."""
    folder = new_run(
        HOSTILE,
        environment=dict(device=HOSTILE),
        settings={**SETTINGS, HOSTILE: HOSTILE},
        stages=[stage(HOSTILE, 1.5)],
    )
    text = built(folder)
    assert unseen(text) == set()
    root = tree(text)
    assert len(list(root.all("script"))) == 2
    assert not [e for e in root.all("script") if "alert" in e.text]
    assert '</script><script>alert("&")</script>\u27e8202E\u27e9\u2407' in root.words()


def test_tokens_are_shown_and_not_obeyed(new_run):
    """Markup, terminal codes, marks without a letter, bidirectional controls, line feeds."""
    root = tree(built(new_run()))
    shown = {span.text for span in spans_of(root)}
    assert {"<b>&amp;", "</span>", "'\"", " a", "b", " \u05e9\u05dc"} <= shown
    assert {" \u27e8202E\u27e9text", "\u241b[0m\u0301", "\u27e8200B\u27e9"} <= shown
    assert {"\u21b5\n", "\u27e8<s>\u27e9"} & shown
    (data,) = [e for e in root.all("script") if e.attributes.get("id") == "data"]
    assert "<" not in data.text
    assert "</span>" in json.loads(data.text)["pieces"]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain \u00e9\u4f60", "plain \u00e9\u4f60"),
        ("a\tb\x00\x7f", "a\u2409b\u2400\u2421"),
        (
            "\x85\u2028\u2066\ufeff",
            "\u27e80085\u27e9\u27e82028\u27e9\u27e82066\u27e9\u27e8FEFF\u27e9",
        ),
        ("\ud800\ue000", "\u27e8D800\u27e9\u27e8E000\u27e9"),
        ("\u0301a", "\u25cc\u0301a"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_gets_a_symbol(text, shown):
    """Control and format characters, surrogates, private ones, marks without a letter."""
    assert visible(text) == shown


# ---- Runs of all kinds ---------------------------------------------------------------------------


def test_page_of_a_log_alone(tmp_path):
    """A run at work: its training is shown, and it is said that it is not finished."""
    (tmp_path / "train.log").write_text(log_text((1, 6.5), (10, 5.0)))
    text = built(tmp_path)
    assert "the run is not finished" in text
    assert "Training loss by step" in text
    assert "Stages of" not in text
    tree(text)


@pytest.mark.parametrize("steps", [[], [(1, 6.5)], [(1, 6.5), (2, float("nan"))]])
def test_page_of_a_run_that_has_just_begun(tmp_path, steps):
    """No step, one, or a loss that is no number; one rate is no chart."""
    (tmp_path / "train.log").write_text(log_text(*steps))
    text = built(tmp_path)
    assert ("Training loss by step" in text) == bool(steps)
    assert "Rate of training" not in text
    tree(text)


def test_page_of_results_without_stages(new_run):
    """A run that ended after training."""
    folder = new_run(trace=False, stages=[], val_bpb=None, proof=None, artifact=None)
    text = built(folder)
    assert "No stage is scored yet" in text
    assert "no trace.npz, which runs and <code>eval</code> write" in text
    assert text.count("trace.npz") == 1
    assert "token by token" not in text
    tree(text)


def test_page_without_log(new_run):
    """What results.json has."""
    folder = new_run()
    (folder / "train.log").unlink()
    text = built(folder)
    assert "Stages of run" in text
    assert "Training loss" not in text


def test_page_of_a_proof(new_run):
    """The folder of `verify` has a proof, no stages and no text."""
    folder = new_run(trace=False, command="verify", stages=[], val_bpb=None, train=None)
    (folder / "train.log").rename(folder / "verify.log")
    text = built(folder)
    assert "Proof: predicted and decoded" in text
    assert "not finished" not in text


def test_page_of_a_run_without_mixer(new_run):
    """The text has the bits of the last stage, and no change to show."""
    folder = new_run(trace=False)
    new_trace(folder / "trace.npz", mixer=False)
    root = tree(built(folder))
    assert len(spans_of(root)) == 60
    values = [e.attributes["value"] for e in root.all("input")]
    assert values == ["last"]


@pytest.mark.parametrize("contents", [b"", b"PK\3\4", b"no archive"])
def test_damaged_trace_is_said(new_run, contents):
    """The rest is shown."""
    folder = new_run()
    (folder / "trace.npz").write_bytes(contents)
    text = built(folder)
    assert "trace.npz cannot be read" in text
    assert "Stages of run" in text


def test_trace_of_another_format_is_said(new_run):
    """Of a later version, say."""
    folder = new_run()
    arrays = new_trace(folder / "trace.npz")
    np.savez(folder / "trace.npz", **{**arrays, "ttt": arrays["ttt"][:-1]})
    assert "trace.npz cannot be read (another format)" in built(folder)


def test_trace_of_other_results_is_not_shown(new_run):
    """The run was replaced meanwhile, say, and has not ended yet."""
    for val_bpb in (1.3, None):
        folder = new_run()
        assert read_run(folder).trace
        (folder / "results.json").write_text(json.dumps(results() | dict(val_bpb=val_bpb)))
        assert not read_run(folder).trace
        text = built(folder)
        assert "trace.npz is of other results" in text
        assert 'id="text"' not in text


def refusal(*args, **how):
    """Return what read_run says as it refuses, in one line."""
    with pytest.raises(ReportError) as caught:
        read_run(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_of_no_run_is_refused(tmp_path):
    """It is named."""
    assert str(tmp_path) in refusal(tmp_path)
    assert "nowhere" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "file: no run's folder (Not a directory)" in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"[1]",
        b'"text"',
        b'{"stages": [{}]}',
        b'{"stages": [{"name": 1, "val_bpb": 1, "val_loss": 1, "tokens": 1, "seconds": 1}]}',
        b'{"proof": {"tokens": 1}}',
        b'{"artifact": {"weights_bytes": "a"}}',
        b'{"settings": 3}',
        b'{"train": {"seconds": "a"}}',
        b'{"train": {"quantize_seconds": [1]}}',
        b'{"train": {"seconds": 1, "calibration_seconds": NaN}}',
    ],
)
def test_damaged_results_are_refused(tmp_path, contents):
    """The folder is named, and nothing is shown."""
    (tmp_path / "results.json").write_bytes(contents)
    assert f"{tmp_path}: results.json" in refusal(tmp_path)


def steps_of(text, tmp_path):
    """Return the steps that are read from a log."""
    path = tmp_path / "train.log"
    path.write_text(text)
    return [(row["step"], row["loss"]) for row in read_log(path)[2]]


def test_log_of_two_runs_is_read_as_the_last(tmp_path):
    """A log grows; the run that was replaced is not this one."""
    text = log_text((1, 6.5), (2, 6.0), name="old") + log_text((1, 7.5), name="new")
    assert steps_of(text, tmp_path) == [(1, 7.5)]
    assert read_log(tmp_path / "train.log")[0] == "new"
    assert steps_of(text + log_text(), tmp_path) == []


@pytest.mark.parametrize("line", ["fisher: steps", "calibration: 9", "quantize: coarseness 2"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_log_of_finish_has_the_training_before_it(tmp_path, line, times):
    """`finish` goes on in the same log, without steps; also after another one."""
    ends = f"{log_text()}{line}\n" * times
    assert steps_of(log_text((1, 6.5)) + ends, tmp_path) == [(1, 6.5)]
    assert steps_of(log_text((1, 6.5)) + log_text() + ends, tmp_path) == [(1, 6.5)]


def test_log_may_begin_with_training_of_another_program(tmp_path):
    """Its lines before the first run are the run's training; without any run, they are a log's."""
    lines = log_text((1, 6.5)).splitlines()
    training = f"trained elsewhere\n{lines[-1]}\n"
    calibration = "calibration: 9 of 9 held-out tokens in 1.0 s\n"
    assert steps_of(training + log_text() + calibration, tmp_path) == [(1, 6.5)]
    assert read_log(tmp_path / "train.log")[0] == "run"
    assert steps_of(training + log_text(), tmp_path) == []
    assert steps_of(training, tmp_path) == [(1, 6.5)]


def test_step_has_all_its_numbers(tmp_path):
    """As the script logs them."""
    (tmp_path / "train.log").write_text(log_text((10, 5.5)))
    name, settings, steps = read_log(tmp_path / "train.log")
    assert name == "run"
    assert settings == dict(preset="demo", run_id="", data_path="my text", seed="7")
    assert steps == [dict(step=10, loss=5.5, weighted=5.25, rate=1234, seconds=20)]


def test_older_log_has_steps_of_another_order(tmp_path):
    """As the runs that are kept beside the notebook."""
    text = "step 10/40  loss 5.5 (weighted 5.25)  lr x1.000  1,234 tokens/s  20 s  ETA 9 s"
    (tmp_path / "train.log").write_text(text)
    expected = dict(step=10, loss=5.5, weighted=5.25, rate=1234, seconds=20)
    assert read_log(tmp_path / "train.log")[2] == [expected]


def test_older_log_has_a_line_a_setting(tmp_path):
    """As the runs that are kept beside the notebook."""
    (tmp_path / "train.log").write_text(f"{HEADER.format('train', 'run')}\n  RUN_ID=\n  SEED=7\n")
    assert read_log(tmp_path / "train.log")[1] == dict(run_id="", seed="7")


# ---- The same as the script ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "order, recent, bits", [(10, 4, 20), (5, 3, 4), (2, 1, 2), (9, 2, 6), (2, 400, 20)]
)
def test_contexts_are_those_of_the_script(order, recent, bits):
    """Also where hashes collide."""
    begins = np.isin(np.arange(8), (0, 6))
    tokens = few_words(500)
    cfg = tiny_config(ngram_order=order, ngram_recent=recent, min_count=1, ngram_hash_bits=bits)
    history = train_gpt.NgramHistory(cfg, begins, "cpu")
    history.extend(torch.from_numpy(tokens))
    expected = (history.occurrences(torch.arange(len(tokens))) >= 0).sum(2)
    counts = report.count_occurrences(tokens, begins, order, recent, bits)
    assert counts.tolist() == expected.tolist()
    assert counts.sum() > 0


@pytest.mark.parametrize(
    "order, expected",
    [
        (10, ["last 8 tokens", "last 5 tokens", "last 3 tokens", "last 2 tokens", "last token"]),
        (4, ["last 3 tokens", "last 3 tokens", "last 3 tokens", "last 2 tokens", "last token"]),
    ],
)
def test_contexts_are_as_long_as_their_names_say(new_run, order, expected):
    """NGRAM_ORDER cuts them."""
    run = read_run(new_run(settings=SETTINGS | dict(ngram_order=order)))
    data = report.text_data(run)
    assert data["contexts"] == [*expected, "word so far"]
    assert data["lengths"] == [int(re.sub(r"\D", "", words) or 1) for words in expected] + [
        min(8, order - 1)
    ]


@pytest.fixture
def evaluated(artifacts, command_line, tmp_path):
    """The folder of `eval` of a tiny artifact on a tiny shard, and its trace."""
    shard = train_gpt.shard_bytes(CODED_STREAM.tolist())
    (tmp_path / "fineweb_val_000000.bin").write_bytes(shard)
    path = str(artifacts("learned, no ttt").artifact)
    places = dict(DATA_PATH=str(tmp_path), TOKENIZER_PATH="none", RUN_ID="run")
    assert command_line("eval", ARTIFACT_PATH=path, **places) == (0, "")
    return tmp_path / "logs" / "run"


def test_page_of_what_the_script_leaves(evaluated):
    """The bits of the text are the reported ones, its bytes and words are the script's."""
    run = read_run(evaluated)
    table = tiny_table()
    assert run.notes == []
    assert run.trace.sizes.tolist() == table.count_bytes(CODED_STREAM).tolist()
    assert run.trace.word_begins.tolist() == table.word_begins.tolist()
    assert run.trace.texts == list(table.texts)
    for scored in run.stages:
        bits = run.trace.bits[scored["name"]].sum()
        assert bits / run.trace.sizes.sum() == pytest.approx(scored["val_bpb"], abs=1e-7)
    text = page([run])
    assert len(spans_of(tree(text))) == len(CODED_STREAM) - 1
    assert unseen(text) == set()
    assert "Inside the artifact of run" in text


@pytest.fixture
def new_artifact(tmp_path):
    """new_artifact(quantizer, **changes) -> the path of a small artifact, with a random mixer."""

    def made(quantizer, **changes):
        cfg = tiny_config(quantizer=quantizer, mixer="learned", **changes)
        steps = {}
        coarseness = FINEST
        if quantizer == "fisher":
            steps = train_gpt.new_steps(warm_model(cfg), np.int64([]), math.inf)
            coarseness = 2.0**-12
        weights = warm_weights(cfg)
        path = tmp_path / quantizer
        path.write_bytes(train_gpt.pack_artifact(weights, cfg, tiny_table(), coarseness, steps))
        return path

    return made


PARTS = {"token table", "bigram table", "value table", "attention", "MLP", "mixer"}
PARTS |= {"vectors and small matrices", "settings and tokenizer"}


@pytest.mark.parametrize(
    "quantizer, own", [("int6", set()), ("fisher", {"steps and means of matrices"})]
)
def test_parts_of_an_artifact_sum_to_its_bytes(new_artifact, tmp_path, quantizer, own):
    """Each of its parts has some; other files have none."""
    path = new_artifact(quantizer)
    parts = report.artifact_parts(path)
    assert parts.keys() == PARTS | own
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(path.stat().st_size, abs=len(parts))
    data = path.read_bytes()
    for damaged in (b"", b"PGOLFART", data[:-40], b"X" + data, data[:60] + bytes(len(data) - 60)):
        (tmp_path / "damaged").write_bytes(damaged)
        assert report.artifact_parts(tmp_path / "damaged") == {}


def test_artifact_of_another_run_is_not_shown(new_run, new_artifact, tmp_path):
    """Another one may lie where a run's was; results know theirs by its SHA-256."""
    path = new_artifact("int6")
    (tmp_path / "other").write_bytes(path.read_bytes() + b"1")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, known, shown in (
        (path, digest, path),
        (tmp_path / "other", digest, None),
        (path, None, path),
        (tmp_path, digest, None),  # cannot be read
    ):
        part = results()["artifact"] | dict(path=str(name), sha256=known)
        assert read_run(new_run(artifact=part, trace=False)).artifact == shown


def test_parts_of_levels_are_those_of_their_words(new_artifact, monkeypatch):
    """What the levels cost sums to the coder's words, whose last states take 8 bytes a lane."""
    found = []
    level_bits = report.level_bits

    def kept(*args):
        found.append(level_bits(*args))
        return found[-1]

    monkeypatch.setattr(report, "level_bits", kept)
    words = []
    decode = train_gpt.decode_levels
    monkeypatch.setattr(
        train_gpt, "decode_levels", lambda data, *how: words.append(data) or decode(data, *how)
    )
    report.artifact_parts(new_artifact("fisher", model_dim=64))
    assert len(found) > 20
    assert 0 <= len(words[0]) - sum(found) / 8 <= 8 * train_gpt.LANES


def test_larger_parts_take_more_of_an_artifact(new_artifact):
    """A wider MLP, a larger vocabulary of bigrams."""
    for quantizer in ("int6", "fisher"):
        plain = report.artifact_parts(new_artifact(quantizer))
        wide = report.artifact_parts(new_artifact(quantizer, mlp_mult=6))
        long = report.artifact_parts(new_artifact(quantizer, bigram_vocab_size=10 * VOCAB))
        assert wide["MLP"] / wide["attention"] > 1.5 * plain["MLP"] / plain["attention"]
        assert long["bigram table"] > 4 * plain["bigram table"]


def test_characters_of_several_bytes_are_shown_whole(tmp_path):
    """At the last of their byte tokens; a byte that belongs to none is shown as such."""
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in "é€[\0".encode()), "a", "b", "c"]
    kinds = "UC" + "B" * 7 + "N" * 3
    arrays = new_trace(tmp_path / "trace.npz", 8, pieces, kinds)
    arrays["tokens"] = np.array([1, 2, 3, 7, 4, 5, 6, 2, 8])
    np.savez(tmp_path / "trace.npz", **arrays)
    labels = labels_of(Trace(tmp_path / "trace.npz", SETTINGS))
    assert labels == ["·", "é", "[", "·", "·", "€", "⟨C3⟩", "\u2400"]


# ---- Colours -------------------------------------------------------------------------------------


def luminance(colour):
    """Return the relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Return the contrast of two colours, as WCAG defines it."""
    low, high = sorted(luminance(colour) + 0.05 for colour in (a, b))
    return high / low


def palettes():
    """Return {name: colour} of the light and of the dark page."""
    light, dark = re.findall(r":root \{(.*?)\}", report.CSS, flags=re.DOTALL)[:2]
    found = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in (light, dark)]
    assert found[0].keys() == found[1].keys()
    return found


def test_text_stands_out_on_every_ground():
    """4.5 and more, in light and dark; marks and lines of charts 3 and more."""
    for colours in palettes():
        for ground in ("ground", "panel", "gain", "loss", *(f"b{i}" for i in range(6))):
            assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
        for ground in ("ground", "panel"):
            assert contrast(colours["soft"], colours[ground]) >= 4.5
        for mark in ("s0", "s1", "s2", "s3", "up", "down", "base", "line", "edge", "focus"):
            assert contrast(colours[mark], colours["ground"]) >= 3, mark


def test_shades_are_ordered_without_their_hue():
    """More bits are darker on white, lighter on black; the line below is thicker too."""
    for colours, order in zip(palettes(), (-1, 1)):
        steps = [order * luminance(colours[f"b{i}"]) for i in range(6)]
        assert steps == sorted(steps)
    rules = [re.search(rf"\.b{i} {{.*border-bottom: (\d)px (\w+)", report.CSS) for i in range(6)]
    assert [(rule[1], rule[2]) for rule in rules] == [
        ("1", "dotted"),
        *((str(i), "solid") for i in range(1, 6)),
    ]


# ---- Charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "bench_steps1200_seed1337", "word_" * 20])
def test_text_of_charts_is_not_cut_off(new_run, name):
    """All text lies inside of its chart, and leaves the data more than half of the width."""
    runs = [read_run(new_run(f"{name}{i}")) for i in range(3)]
    report.tell_apart(runs)
    charts = [*report.training_charts(runs), *report.stage_charts(runs), report.seeds_chart(runs)]
    charts += [draw(runs) for draw in (report.seconds_chart, report.bytes_chart)]
    charts += [report.proof_chart(runs), report.stream_chart(runs[0])]
    for chart in charts:
        with matplotlib.rc_context(report.STYLE):
            chart.figure.draw_without_rendering()
        drawn = chart.figure.get_tightbbox()
        width, height = chart.figure.get_size_inches()
        assert -0.02 < drawn.x0 < drawn.x1 < width + 0.02, chart.name
        assert -0.02 < drawn.y0 < drawn.y1 < height + 0.02, chart.name
        assert chart.axes.get_position().width > 0.5


@pytest.mark.parametrize("names", [["_a", "_b"], ["_a", "b"]])
def test_names_may_begin_with_an_underscore(new_run, names):
    """Legends have all of them: for matplotlib such a label is none."""
    runs = [read_run(new_run(name)) for name in names]
    report.tell_apart(runs)
    charts = [report.loss_chart(runs), report.seeds_chart(runs), report.seconds_chart(runs)]
    for chart in charts:
        labels = [text.get_text() for text in chart.axes.get_legend().get_texts()]
        assert len(labels) == 2
        assert all(name in label for name, label in zip(names, labels))


@pytest.mark.parametrize("first", ["mixer", "pre_quant"])
def test_stages_stand_in_the_order_of_time(new_run, first):
    """Whatever the first run has."""
    stages = results()["stages"]
    part = [s for s in stages if s["name"] != "ttt"][:: -1 if first == "mixer" else 1]
    runs = [read_run(new_run("one", stages=part, trace=False)), read_run(new_run("two"))]
    report.tell_apart(runs)
    names = ["pre_quant", "round_trip", "sliding", "ttt", "mixer"]
    shown = [
        t.get_text().replace("\n", "") for t in report.seeds_chart(runs).axes.get_xticklabels()
    ]
    assert shown == names
    shown = [t.get_text() for t in report.seconds_chart(runs).axes.get_yticklabels()]
    trained = ["training", "held-out text", "quantization"]
    assert shown == [*trained, *names, "proof: code", "proof: decode"]


def test_sixteen_runs_look_different(new_run):
    """In colour and dashes together, and in colour and marks."""
    runs = [read_run(new_run(f"run{i}", trace=False)) for i in range(16)]
    report.tell_apart(runs)
    lines = [each for each in report.seeds_chart(runs).axes.lines if len(each.get_xdata()) > 1]
    assert len({(each.get_color(), each.get_linestyle()) for each in lines}) == 16
    assert len({(each.get_color(), each.get_marker()) for each in lines}) == 16


def test_long_names_keep_both_ends():
    """Seeds are at the end of names."""
    assert report.short("bench_seed1337") == "bench_seed1337"
    shown = report.short("x" + "y" * 50 + "_seed1337")
    assert shown.startswith("xyyy")
    assert shown.endswith("y_seed1337")
    assert len(shown) == report.MOST_OF_A_NAME


def test_a_run_has_one_colour_in_all_charts(new_run):
    """Also where another run has nothing to show."""
    folders = [new_run("one"), new_run("two")]
    (folders[0] / "train.log").unlink()
    runs = [read_run(folder) for folder in folders]
    report.tell_apart(runs)
    colours = {chart.axes.lines[0].get_color() for chart in report.training_charts(runs)}
    assert colours == {report.ink("s1")}


# ---- Figures -------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figures(new_run, tmp_path, capsys):
    """figures(*args) -> {name: bytes} that --figures of two seeds writes, with more arguments."""
    folders = [str(new_run("one")), str(new_run("two", last=1.35))]

    def written(*args):
        out = tmp_path / f"figures{len(list(tmp_path.iterdir()))}"
        assert report.main([*folders, "--figures", str(out), *map(str, args)]) == 0
        return {path.name: path.read_bytes() for path in out.iterdir()}

    return written


def test_figures_are_drawings_on_any_ground(figures):
    """SVG with a title and a description, transparent, text that stands out on white and black."""
    files = figures()
    assert files.keys() == {"stages.svg", "proof.svg"}
    for data in files.values():
        root = ElementTree.fromstring(data)
        assert root.tag == f"{SVG}svg"
        assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
        assert {"width", "height", "viewBox"} <= {*root.keys()}
        assert data.count(b"://") == 1  # the name space
        colours = set(re.findall(r"#[0-9a-f]{6}\b", data.decode()))
        assert colours <= {colour for _, colour in report.INKS.values()}
        ink = report.INKS["ink"][1]
        assert min(contrast(ink, "#ffffff"), contrast(ink, "#0d1117")) > 4
        for colour in colours:
            assert min(contrast(colour, "#ffffff"), contrast(colour, "#0d1117")) > 2


def test_figures_have_the_same_bytes_every_time(figures):
    """So that a commit shows only what has changed."""
    assert figures() == figures()


def test_figures_have_the_seeds_and_their_stages(figures):
    """Names and figures can be read, in the drawing and in its description."""
    words = [" ".join(ElementTree.fromstring(data).itertext()) for data in figures().values()]
    assert all("one" in text and "two" in text for text in words)
    files = figures()
    stages = "".join(ElementTree.fromstring(files["stages.svg"]).itertext())
    assert all(name in stages for name in ("pre_quant", "sliding", "mixer", "1.2500", "1.3500"))
    proof = "".join(ElementTree.fromstring(files["proof.svg"]).itertext())
    assert all(name in proof for name in ("100.1 predicted", "111 decoded", "60 tokens"))


def test_figure_has_another_rule_if_it_is_given(figures, new_run):
    """A line from that run's results; without it there is none."""
    other = new_run("other", last=1.375, settings=SETTINGS | dict(mixer="entropy"))
    assert b"MIXER=entropy: 1.3750" in figures("--rule", other)["stages.svg"]
    assert b"MIXER=entropy: 1.3750" in figures("--rule", other / "results.json")["stages.svg"]
    assert b"MIXER" not in figures()["stages.svg"]


def measured(name, scale):
    """Return a model's entry as compare_quantizers.py writes it; `scale` multiplies losses."""
    tries = [("int6", 1.5, 2_500_000), ("int6", 6.0, 2_000_000)]
    tries += [("fisher", 0.5, 2_000_000), ("fisher", 8.0, 1_000_000), ("fisher", 2.0, 1_500_000)]
    lines = [
        dict(quantizer=quantizer, kl=scale * milli / 1000, bytes=size)
        for quantizer, milli, size in tries
    ]
    return dict(name=name, lines=lines)


CAP = dict(quantizer="fisher", limit_bytes=1_500_000, code_bytes=200_000)


@pytest.fixture
def drawn(tmp_path):
    """drawn(models, caps) -> quantizers.svg, bytes, that --figures and --quantizers write."""

    def made(models, caps=(CAP,)):
        path = tmp_path / "quantizers.json"
        path.write_text(json.dumps(dict(caps=caps, models=models)))
        assert report.main(["--figures", str(tmp_path / "out"), "--quantizers", str(path)]) == 0
        (file,) = (tmp_path / "out").iterdir()
        assert file.name == "quantizers.svg"
        return file.read_bytes()

    return made


def curves(data):
    """Return [(colour, [(x, y)])] of the lines of marks in a drawing, without its legend."""
    found = []
    for group in ElementTree.fromstring(data).iter(f"{SVG}g"):
        marks = group.findall(f"{SVG}g/{SVG}use")
        if len(marks) > 1:
            colour = re.search(r"stroke: (#\w+)", marks[0].attrib["style"])[1]
            found.append((colour, [(float(u.attrib["x"]), float(u.attrib["y"])) for u in marks]))
    return found


def test_loss_is_drawn_against_bytes(drawn):
    """More bytes stand further to the right, more loss higher up, both by their logarithms."""
    (_, int6), (_, fisher) = sorted(curves(drawn([measured("a", 1)])), key=lambda c: len(c[1]))
    (left, high), (middle, between), (right, low) = fisher  # 1, 1.5, 2 MB; 8, 2, 0.5
    assert left < middle < right
    assert high < between < low  # SVG's y points down
    assert (between - high) == pytest.approx(low - between, rel=1e-3)
    assert (middle - left) / (right - left) == pytest.approx(np.log2(1.5), rel=1e-3)
    assert int6[0][0] == pytest.approx(right, abs=0.01)
    assert int6[0][1] < between


def test_quantizers_have_colours_and_models_marks(drawn):
    """A line for each quantizer of each model; all that is drawn is named."""
    one, two = drawn([measured("a", 1)]), drawn([measured("a", 1), measured("<b>", 1.5)])
    assert collections.Counter(colour for colour, _ in curves(two)) == {
        report.INKS["s0"][1]: 2,
        report.INKS["s1"][1]: 2,
    }
    assert len(curves(one)) == 2
    texts = {e.text for e in ElementTree.fromstring(two).iter(f"{SVG}text")}
    assert {"fisher", "int6", "a", "<b>"} <= texts
    (description,) = ElementTree.fromstring(two).findall(f"{SVG}desc")
    assert "fisher, <b>: 1,000,000 0.012, 1,500,000 0.003, 2,000,000 0.00075" in description.text


def test_a_measurement_replaces_that_of_the_same_name(tmp_path):
    """compare_quantizers.py's file keeps the other models and the caps; the report reads it."""
    contents = {}
    for entry in (measured("a", 1), measured("b", 1), measured("a", 2)):
        contents = compare_quantizers.add_entry(contents, entry)
    path = tmp_path / "quantizers.json"
    path.write_text(json.dumps(contents | dict(caps=[CAP])))
    assert report.read_quantizers(path) == ([measured("b", 1), measured("a", 2)], [CAP])
    again = compare_quantizers.add_entry(json.loads(path.read_bytes()), measured("b", 3))
    assert again["caps"] == [CAP]


@pytest.fixture
def weights_file(tmp_path, tokenizer, monkeypatch):
    """The weights that a run keeps of a tiny model, whose validation text has 5 sequences of 32."""
    monkeypatch.setattr(os, "environ", clean_environment())
    for split, tokens in (("val", 5 * 32 + 31), ("train", 700)):
        write_shards(tmp_path, [tiny_stream(tokens)], split=split)
    cfg = tiny_config(
        vocab_size=400,
        num_layers=2,
        ve_layers="1",
        data_path=str(tmp_path),
        tokenizer_path=str(tokenizer[0]),
        device="cpu",
    )
    path = tmp_path / "weights.pt"
    parts = dict(settings=dataclasses.asdict(cfg), result=dict(steps=6), weights=warm_weights(cfg))
    torch.save(parts, path)
    return path


@pytest.fixture
def compare_refuses(weights_file, monkeypatch, capsys):
    """compare_refuses(*args) -> the line with which compare_quantizers.py refuses to measure."""
    monkeypatch.setattr(compare_quantizers, "log_probabilities", lambda *_: pytest.fail("measured"))

    def line(*args):
        command = ["compare_quantizers.py", weights_file, *args]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        with pytest.raises(SystemExit) as caught:
            compare_quantizers.main()
        return error_line((caught.value.code, capsys.readouterr().err), 1)

    return line


@pytest.mark.parametrize("count", [-1, 0, 6, 10])
def test_quantizers_are_compared_on_as_many_sequences_as_there_are(compare_refuses, count):
    """Not on shorter ones."""
    assert compare_refuses(count) == (
        f"COUNT={count}: the validation text has 5 sequences of 32 tokens; lower COUNT or raise "
        "VAL_TOKENS"
    )


def test_a_measurement_of_other_weights_is_kept(compare_refuses, tmp_path):
    """Two models of a preset, number of steps and seed may differ in other settings."""
    path = tmp_path / "quantizers.json"
    entry = measured("bench, 6 steps, seed 1337", 1) | dict(weights_sha256="12ab")
    path.write_text(json.dumps(dict(models=[entry])))
    assert compare_refuses(5, "--json", path) == (
        "the file has 'bench, 6 steps, seed 1337' of other weights (SHA-256 12ab), which would be "
        "lost: give these another --name, or remove those"
    )


@pytest.mark.parametrize(
    "text, why",
    [
        ('[{"models": []}]', "not a JSON object"),
        ('{"models": [{"lines": []}]}', "a model without a name"),
        ('{"models": [[]]}', "a model without a name"),
        ('{"models": 5}', "'int' object is not iterable"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_a_damaged_file_of_quantizers_is_refused(compare_refuses, tmp_path, text, why):
    """Before the work whose lines it could not take."""
    path = tmp_path / "quantizers.json"
    path.write_text(text)
    message = compare_refuses(5, "--json", path)
    assert message == f"--json {path}: mend it or name another ({why})"


def test_quantizers_are_compared_on_the_device(weights_file, monkeypatch):
    """The pretended device computes on the CPU; the text goes where the model is."""
    monkeypatch.setattr(compare_quantizers, "INT6", (5.0,))
    monkeypatch.setattr(compare_quantizers, "FISHER", (0.001,))
    on_cpu = compare_quantizers.measure(weights_file, 5, "", {})
    rt = train_gpt.Runtime(device=CUDA)
    monkeypatch.setattr(train_gpt, "start_runtime", lambda *_: rt)
    with pretended_device():
        on_device = compare_quantizers.measure(weights_file, 5, "", {})
    losses = [[line["kl"] for line in entry["lines"]] for entry in (on_device, on_cpu)]
    assert losses[0] == pytest.approx(losses[1])


def test_a_cap_stands_where_its_code_leaves_it(drawn):
    """At 1,300,000 bytes of the artifact; without caps there is none."""
    words = "a cap of 1,500,000 leaves fisher 1,300,000"
    with_cap, without = drawn([measured("a", 1)]), drawn([measured("a", 1)], [])
    assert words in with_cap.decode()
    assert b"1.5 MB" in with_cap
    assert b"a cap of" not in without
    assert b"1.5 MB" not in without


def test_figure_of_quantizers_is_a_drawing_on_any_ground(drawn):
    """As the other figures: the same bytes every time, in their colours, with no address."""
    models = [measured(str(i), 1 + i / 9) for i in range(6)]
    data = drawn(models)
    assert data == drawn(models)
    assert set(re.findall(r"#[0-9a-f]{6}\b", data.decode())) <= {c for _, c in report.INKS.values()}
    assert data.count(b"://") == 1  # the name space


def test_figure_of_the_repository_is_that_of_its_measurements(drawn):
    """logs/quantizers.svg shows logs/quantizers.json."""
    measurements = json.loads((ROOT / "logs" / "quantizers.json").read_bytes())
    found = (ROOT / "logs" / "quantizers.svg").read_bytes()
    (description,) = ElementTree.fromstring(found).findall(f"{SVG}desc")
    for model in measurements["models"]:
        for entry in model["lines"]:
            assert f"{entry['bytes']:,} {report.decimals(entry['kl'])}" in description.text


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "[]",
        '{"models": []}',
        '{"caps": [], "models": []}',
        '{"caps": [], "models": [{"name": "a", "lines": [{"quantizer": "int6", "bytes": 9}]}]}',
        '{"caps": [], "models": [{"name": "a", "lines": '
        '[{"quantizer": "int7", "bytes": 9, "kl": 0.1}]}]}',
        '{"caps": [], "models": [{"name": "a", "lines": '
        '[{"quantizer": "int6", "bytes": 9, "kl": NaN}]}]}',
        '{"caps": [{"quantizer": "int6"}], "models": [{"name": "a", "lines": '
        '[{"quantizer": "int6", "bytes": 9, "kl": 0.1}]}]}',
        '{"caps": [{"quantizer": "int6", "limit_bytes": 9, "code_bytes": 9}], "models": '
        '[{"name": "a", "lines": [{"quantizer": "int6", "bytes": 9, "kl": 0.1}]}]}',
    ],
)
def test_what_is_no_measurement_of_quantizers_is_said(tmp_path, capsys, contents):
    """In one line, with exit status 1, and nothing is written."""
    path = tmp_path / "bad.json"
    path.write_text(contents)
    args = ["--figures", str(tmp_path / "out"), "--quantizers", str(path)]
    assert report.main(args) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: --quantizers {path}: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- Command line --------------------------------------------------------------------------------


def test_page_lies_in_the_first_folder(new_run, capsys):
    """It is named, and the same runs give the same bytes."""
    first, second = new_run("one"), new_run("two")
    assert report.main([str(first), str(second)]) == 0
    data = (first / "report.html").read_bytes()
    assert str(first / "report.html") in capsys.readouterr().out
    assert report.main([str(first), str(second)]) == 0
    assert (first / "report.html").read_bytes() == data
    assert not (second / "report.html").exists()


def test_page_goes_where_it_is_told(new_run, tmp_path):
    """--out names the file."""
    folder = new_run()
    assert report.main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert tree((tmp_path / "page.html").read_text())
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (["nowhere"], "nowhere: no run's folder"),
        (["{run}", "--out", "{run}/none/page.html"], "cannot write"),
        (["{run}", "--figures", "{run}/train.log/x"], "--figures"),
        (["{run}", "--figures", "{run}", "--rule", "nowhere"], "--rule nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(new_run, capsys, args, words):
    """With exit status 1 and no traceback."""
    run = str(new_run())
    assert report.main([arg.format(run=run) for arg in args]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert words in message


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "RUN_DIR is missing"),
        (["--figures", "out"], "RUN_DIR is missing"),
        (["--figures", "out", "--quantizers", "a.json", "--out", "page"], "RUN_DIR is missing"),
        (["run", "--quantizers", "a.json"], "--quantizers takes --figures"),
        (["run", "--rule", "results.json"], "--rule takes --figures"),
    ],
)
def test_what_is_missing_is_a_mistake_of_the_command_line(capsys, args, words):
    """argparse says how it is used."""
    with pytest.raises(SystemExit) as caught:
        report.main(args)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
