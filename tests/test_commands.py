"""Whole commands as users run them, on one rank and on two, and what is said when they fail."""

import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment, error_line, no_leftovers

import train_gpt

SCRIPT = str(ROOT / "train_gpt.py")
# What the gloo of torch 2.9 prints on stdout, past Python, when ranks connect: a line from each, in
# pieces that mix.
GLOO_LINES = re.compile(
    r"\A\[Gloo\] Rank (\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |[0-9]+|\n)*"
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
STAGES = ["pre_quant", "round_trip", "sliding", "ttt", "mixer"]
MODEL = dict(
    MIXER_CALIBRATION_TOKENS="1024",
    MIXER_BLOCK="16",
    NGRAM_HASH_BITS="12",
    NUM_LAYERS="2",
    VE_LAYERS="1",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    ROPE_DIMS="8",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="128",
    BIGRAM_VOCAB_SIZE="64",
    ITERATIONS="4",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="32",
    XSA_LAST_N="1",
    TTT_FREEZE_BLOCKS="1",
    TTT_CHUNK_TOKENS="256",
    TTT_EPOCHS="2",
    NGRAM_ORDER="5",
    VAL_TOKENS="1500",
    VERIFY_TOKENS="0",
)


def start(folder, *args, launcher=(), **settings):
    """The program, started in `folder` as a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, *launcher, SCRIPT, *map(str, args)]
    return subprocess.Popen(command, cwd=folder, env={**clean_environment(), **settings}, **pipes)


def finished(process):
    """(exit status, stdout without gloo's lines, stderr) of a process, once it has ended."""
    out, err = process.communicate()
    return process.returncode, GLOO_LINES.sub("", out), err


def results_of(folder):
    """The results.json of a run's folder."""
    return json.loads((folder / "results.json").read_text())


def bpb_of(results):
    """{stage: val_bpb} of the stages after quantization."""
    return {s["name"]: s["val_bpb"] for s in results["stages"] if s["name"] != "pre_quant"}


# ---- Whole runs of the demo ----------------------------------------------------------------------

RUNS = {"one": 1, "two": 2, "one on two": 2, "two on one": 1}  # {name: ranks}


def is_evaluation(name):
    """Whether a run of RUNS only evaluates what another has trained."""
    return " on " in name


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo trained on one rank and on two; each artifact also evaluated on the other number."""
    folder = tmp_path_factory.mktemp("demo")
    runs = {}
    for name, world in RUNS.items():
        settings = dict(MODEL, PRESET="demo", RUN_ID=name)
        args = []
        if is_evaluation(name):
            args = ["eval"]
            settings["ARTIFACT_PATH"] = f"logs/{name.split()[0]}/model.int6.lzma"
        launcher = TORCHRUN if world == 2 else ()
        status, out, err = finished(start(folder, *args, launcher=launcher, **settings))
        runs[name] = SimpleNamespace(status=status, out=out, err=err, results=None)
        if status == 0:
            runs[name].results = results_of(folder / "logs" / name)
    return SimpleNamespace(folder=folder, runs=runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_demo_runs_to_the_end(demo, name):
    """No data, one command: exit status 0, on one rank and on two."""
    run = demo.runs[name]
    assert run.status == 0, run.err[-500:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two on one"])
def test_stderr_of_a_good_run_is_empty(demo, name):
    """On one rank; torchrun may have its own to say."""
    assert demo.runs[name].err == ""


@pytest.mark.slow
def test_demo_gathers_its_text_once(demo):
    """The first run makes the cache; the others find it."""
    gathering = [name for name, run in demo.runs.items() if "gathering English" in run.out]
    assert gathering == ["one"]


@pytest.mark.slow
def test_demo_leaves_nothing_half_written(demo):
    """No temporary file or probe."""
    assert no_leftovers(demo.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_only_one_rank_speaks(demo, name):
    """What is printed is what is logged, once, and what the proof's decoder tells."""
    log = "eval.log" if is_evaluation(name) else "train.log"
    logged = (demo.folder / "logs" / name / log).read_text().splitlines()
    printed = demo.runs[name].out.splitlines()
    decoder = [line for line in printed if line not in logged]
    assert [line for line in printed if line not in decoder] == logged
    ends = [] if is_evaluation(name) else [f"logs/{name}/proof.code is decoded"]
    assert decoder[-1:] == ends
    assert all(re.search(r" tokens, .* ETA \d+ s$", line) for line in decoder[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_results_say_what_ran(demo, name):
    """Keys, run, settings and environment of results.json, as others read it."""
    results = demo.runs[name].results
    proof = set() if is_evaluation(name) else {"proof"}
    assert set(results) == proof | {
        "run_id",
        "seed",
        "command",
        "settings",
        "environment",
        "train",
        "artifact",
        "stages",
        "val_bpb",
        "validation",
        "shards",
    }
    assert results["run_id"] == name
    assert results["seed"] == 1337
    assert results["command"] == ("eval" if is_evaluation(name) else "train")
    assert set(results["settings"]) == set(train_gpt.FIELDS)
    assert results["settings"]["preset"] == "demo"
    assert results["settings"]["model_dim"] == 32
    environment = results["environment"]
    assert set(environment) >= {"python", "torch", "device", "world_size"}
    assert environment["world_size"] == RUNS[name]
    assert environment["torch"] == torch.__version__
    assert environment["device"].startswith(("cpu", "cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_results_of_training_agree_with_each_other(demo, name):
    """Steps, tokens and rate; the proof is of the whole text, and of the reported score."""
    results = demo.runs[name].results
    train = results["train"]
    assert train["steps"] == 4
    assert train["tokens"] == 4 * 256
    assert train["seconds"] > 0
    assert train["tokens_per_second"] == pytest.approx(train["tokens"] / train["seconds"])
    proof = results["proof"]
    assert proof["tokens"] == 1500
    assert proof["predicted_bits"] / results["stages"][-1]["bytes"] == results["val_bpb"]
    assert 0 < 8 * proof["bytes_on_disk"] - proof["predicted_bits"] < 8 * 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one on two", "two on one"])
def test_results_of_evaluation_have_no_training(demo, name):
    """There was none."""
    assert demo.runs[name].results["train"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_results_have_the_bytes_of_artifact_and_code(demo, name):
    """They are those of the files."""
    artifact = demo.runs[name].results["artifact"]
    data = (demo.folder / artifact["path"]).read_bytes()
    assert artifact["weights_bytes"] == len(data)
    assert artifact["sha256"] == hashlib.sha256(data).hexdigest()
    assert artifact["code_bytes"] == len(Path(SCRIPT).read_bytes())
    assert artifact["total_bytes"] == artifact["weights_bytes"] + artifact["code_bytes"]
    assert artifact["total_bytes"] <= artifact["limit_bytes"]
    assert artifact["limit_bytes"] == 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_results_have_every_stage(demo, name):
    """In order, all of one text, with a BPB that follows from the loss; the last is the score."""
    results = demo.runs[name].results
    stages = results["stages"]
    assert [s["name"] for s in stages] == STAGES[is_evaluation(name) :]
    assert results["val_bpb"] == stages[-1]["val_bpb"]
    for stage in stages:
        keys = {"name", "val_loss", "val_bpb", "tokens", "bytes", "seconds"}
        assert set(stage) - keys == ({"unguarded_bpb"} if stage["name"] == "mixer" else set())
        assert set(stage) >= keys
        assert stage["seconds"] > 0
        assert stage["tokens"] == 1500
        assert stage["bytes"] == stages[0]["bytes"] > 1500
        bits = stage["val_loss"] * stage["tokens"] / math.log(2)
        assert stage["val_bpb"] == pytest.approx(bits / stage["bytes"], rel=1e-12)
        assert 0 < stage["val_loss"] < 2 * math.log(1024)


@pytest.mark.slow
@pytest.mark.parametrize("trained, evaluated", [("one", "one on two"), ("two", "two on one")])
def test_artifact_has_one_score_on_any_number_of_ranks(demo, trained, evaluated):
    """On one rank and on two: every stage's val_bpb is equal to the last bit."""
    first = demo.runs[trained].results
    second = demo.runs[evaluated].results
    assert first["artifact"]["sha256"] == second["artifact"]["sha256"]
    assert bpb_of(first) == bpb_of(second)


@pytest.mark.slow
def test_training_does_not_depend_on_the_ranks(demo):
    """From one seed, one rank and two take the same steps, up to rounding, and score one text."""
    one, two = (demo.runs[name].results["stages"] for name in ("one", "two"))
    assert [s["val_bpb"] for s in two] == pytest.approx([s["val_bpb"] for s in one], rel=2e-3)
    assert one[0]["bytes"] == two[0]["bytes"]
    assert one[0]["val_bpb"] != one[1]["val_bpb"]


# ---- In this process, on a corpus made once ------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Settings of a tiny run on a few documents that `tokenize` has turned into shards."""
    from pydoc_data import topics

    folder = tmp_path_factory.mktemp("corpus")
    documents = [text for _, text in sorted(topics.topics.items())][:24]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    settings = dict(
        MODEL,
        PRESET="bench",
        DATA_PATH=str(folder / "shards"),
        VOCAB_SIZE="400",
        TOKENIZER_PATH=str(folder / "small.model"),
        SIZE_LIMIT_BYTES="1000000",
        VAL_TOKENS="300",
        TTT_CHUNK_TOKENS="128",
        TTT_EPOCHS="1",
    )
    train_gpt.dispatch(["tokenize", settings["DATA_PATH"], str(folder / "a.jsonl")], settings)
    assert no_leftovers(folder)
    return settings


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder of a finished run on that corpus."""
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    settings = dict(corpus, LOG_DIR=str(folder), RUN_ID="run", VERIFY_ENABLED="0")
    train_gpt.dispatch([], settings)
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def command(corpus, command_line):
    """command(*args, **settings) -> (exit status, stderr) of a command line on the corpus."""

    def run(*args, **settings):
        return command_line(*args, **{"DEVICE": None, **corpus, "RUN_ID": "run", **settings})

    return run


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run by `command`."""
    return tmp_path / "logs" / "run"


def artifact_of(folder):
    """ARTIFACT_PATH of a finished run."""
    return str(folder / "model.int6.lzma")


def test_evaluation_needs_nothing_but_the_artifact(command, trained, tmp_path):
    """`eval` without tokenizer, model settings or preset gives the numbers of the training run."""
    shape = dict.fromkeys([*MODEL, "PRESET", "VOCAB_SIZE"])
    settings = {
        **shape,
        "ARTIFACT_PATH": artifact_of(trained),
        "VAL_TOKENS": "300",
        "RUN_ID": None,
        "TOKENIZER_PATH": str(tmp_path / "none.model"),
        "SIZE_LIMIT_BYTES": "1000000",
    }
    assert command("eval", **settings) == (0, "")
    (path,) = (tmp_path / "logs").glob("*/results.json")
    results = results_of(path.parent)
    assert bpb_of(results) == bpb_of(results_of(trained))
    assert results["settings"]["preset"] == "bench"
    assert results["artifact"]["weights_bytes"] > 0


def test_settings_of_evaluation_may_change(command, trained, run_dir):
    """Without TTT and mixer these stages are gone and the others stay as they were."""
    settings = dict(ARTIFACT_PATH=artifact_of(trained), TTT_ENABLED="0", MIXER="none")
    assert command("eval", **settings) == (0, "")
    before = bpb_of(results_of(trained))
    assert bpb_of(results_of(run_dir)) == {n: before[n] for n in ("round_trip", "sliding")}
    assert (run_dir / "eval.log").exists()


def test_overridden_settings_are_recorded_and_not_submitted(command, trained, run_dir):
    """No decoder of the file gets these figures."""
    settings = dict(ARTIFACT_PATH=artifact_of(trained), TTT_ENABLED="0", MIXER="none")
    assert command("eval", **settings) == (0, "")
    assert results_of(run_dir)["artifact"]["overridden"] == ["MIXER", "TTT_ENABLED"]
    assert results_of(trained)["artifact"]["overridden"] == []
    message = error_line(command("summarize", run_dir / "results.json"), 1)
    assert "not a finished run's results.json, with its proof" in message


def test_settings_of_evaluation_are_judged_with_the_artifact(command, trained):
    """What fits the artifact is right, also where it would not fit the default window of 2,048."""
    settings = dict(
        dict.fromkeys([*MODEL, "PRESET", "VOCAB_SIZE"]),
        ARTIFACT_PATH=artifact_of(trained),
        TTT_CHUNK_TOKENS="192",
        VAL_TOKENS="300",
    )
    assert command("eval", **settings) == (0, "")


def test_evaluation_keeps_the_results_of_training(command, run_dir):
    """`eval` under the RUN_ID of the training run does not overwrite what that run has measured."""
    settings = dict(TTT_ENABLED="0", MIXER="none", VERIFY_ENABLED="0")
    assert command(**settings) == (0, "")
    before = (run_dir / "results.json").read_bytes()
    assert command("eval", **settings) == (0, "")
    assert (run_dir / "results.json").read_bytes() == before


def test_run_without_a_proof_has_none(command, run_dir):
    """VERIFY_ENABLED=0 codes and decodes nothing."""
    assert command(TTT_ENABLED="0", MIXER="none", VERIFY_ENABLED="0") == (0, "")
    assert "proof" not in results_of(run_dir)
    assert not list(run_dir.glob("proof.*"))


@pytest.fixture(scope="module")
def unproved(corpus, tmp_path_factory):
    """The folder of a run in float32, of one stage, that was asked for a proof."""
    folder = tmp_path_factory.mktemp("unproved")
    threads = torch.get_num_threads()
    quick = dict(EVAL_DTYPE="float32", TTT_ENABLED="0", MIXER="none", VERIFY_ENABLED="1")
    train_gpt.dispatch([], dict(corpus, **quick, LOG_DIR=str(folder), RUN_ID="run"))
    torch.set_num_threads(threads)
    return folder / "run"


def test_run_in_float32_proves_nothing_and_says_so(unproved):
    """It does not fail: all stages are there, a note in the log, and no proof."""
    results = results_of(unproved)
    assert [s["name"] for s in results["stages"]] == ["pre_quant", "round_trip", "sliding"]
    assert "proof" not in results
    assert not list(unproved.glob("proof.*"))
    lines = (unproved / "train.log").read_text().splitlines()
    (note,) = [line for line in lines if line.startswith("note: ") and "EVAL_DTYPE" in line]
    assert "proved" in note


def test_run_in_float32_is_not_submitted(command, unproved, tmp_path):
    """It has no proof: `summarize` names the file, and writes nothing."""
    path = unproved / "results.json"
    message = error_line(command("summarize", path), 1)
    assert str(path) in message
    assert "not a finished run's results.json, with its proof" in message
    assert not (tmp_path / "submission.json").exists()


def test_artifact_can_be_looked_at_in_float32(command, trained, run_dir):
    """The figures of `eval` are close to those in float64, and marked as another setting's."""
    settings = dict(ARTIFACT_PATH=artifact_of(trained), EVAL_DTYPE="float32")
    assert command("eval", **settings) == (0, "")
    results = results_of(run_dir)
    assert bpb_of(results) == pytest.approx(bpb_of(results_of(trained)), rel=1e-3)
    assert results["artifact"]["overridden"] == ["EVAL_DTYPE"]


def test_verify_in_float32_is_refused(command, unproved, run_dir):
    """Status 1 and one line that names the artifact's setting; nothing is proved."""
    settings = dict(ARTIFACT_PATH=artifact_of(unproved), VERIFY_TOKENS="30")
    assert error_line(command("verify", **settings), 1).startswith("EVAL_DTYPE=float32: ")
    assert not list(run_dir.glob("proof.*"))


@pytest.mark.parametrize("name, value", [("EVAL_DTYPE", "float32"), ("EVAL_STRIDE", "8")])
def test_verify_takes_no_other_settings(command, trained, tmp_path, name, value):
    """Its decoder has the artifact's: before a token is coded, the setting is named."""
    settings = {"ARTIFACT_PATH": artifact_of(trained), "VERIFY_TOKENS": "30", name: value}
    message = error_line(command("verify", **settings), 2)
    assert message.startswith("verify ")
    assert message.endswith(f"unset {name}")
    assert not list(tmp_path.rglob("proof.*"))


def test_run_without_a_proof_is_not_submitted(command, trained, tmp_path):
    """VERIFY_ENABLED=0 is for a quick look."""
    message = error_line(command("summarize", trained / "results.json"), 1)
    assert "with its proof ('proof')" in message
    assert not (tmp_path / "submission.json").exists()


def test_summarize_writes_a_submission(command, trained, tmp_path):
    """`summarize` puts submission.json into the current folder."""
    results = results_of(trained) | dict(proof=dict(tokens=1, bytes_on_disk=1))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert command("summarize", "results.json") == (0, "")
    summary = json.loads((tmp_path / "submission.json").read_text())
    assert summary["val_bpb"] == results_of(trained)["val_bpb"]
    assert list(summary["seeds"]) == ["1337"]


@pytest.mark.slow
def test_help_lists_every_setting(tmp_path):
    """--help explains the commands and names each setting, with status 0."""
    status, out, err = finished(start(tmp_path, "--help"))
    assert status == 0
    assert err == ""
    assert "summarize" in out
    assert [name for name in train_gpt.FIELDS if f"\n  {name.upper()} " not in out] == []


# ---- Usage and settings that are refused ---------------------------------------------------------


@pytest.mark.slow
def test_errors_reach_the_shell(tmp_path):
    """As processes: one line on stderr, status 2 for bad usage, 1 for what else can be mended."""
    (tmp_path / "bad.lzma").write_bytes(b"no artifact")
    first = start(tmp_path, PRESET="fast")
    second = start(tmp_path, "eval", ARTIFACT_PATH="bad.lzma")
    assert error_line(finished(first)[::2], 2) == "PRESET='fast': there are record, bench, demo"
    assert "bad.lzma" in error_line(finished(second)[::2], 1)
    assert os.listdir(tmp_path) == ["bad.lzma"]


@pytest.mark.parametrize(
    "args",
    [
        "train",
        "eval x",
        "tokenize",
        "tokenize out",
        "summarize",
        "-v",
        "eval eval",
        "compress in",
        "decompress in",
        "decompress in out more",
    ],
)
def test_unknown_command_is_bad_usage(command, args):
    """Unknown or incomplete: it is named in the error, and --help is pointed to."""
    message = error_line(command(*args.split()), 2)
    assert f"'{args}'" in message
    assert "--help" in message


def test_folder_without_shards_is_named(command, tmp_path):
    """A DATA_PATH without shards is named before any training, and so is the demo."""
    message = error_line(command(DATA_PATH=str(tmp_path / "nowhere")), 1)
    assert message.startswith("DATA_PATH")
    assert "nowhere" in message
    assert "PRESET=demo" in message


def test_validation_shards_alone_do_not_train(command, corpus, tmp_path):
    """The error says which shards are missing."""
    (tmp_path / "data").mkdir()
    shard = next(Path(corpus["DATA_PATH"]).glob("fineweb_val_*"))
    (tmp_path / "data" / shard.name).write_bytes(shard.read_bytes())
    assert "fineweb_train_" in error_line(command(DATA_PATH=str(tmp_path / "data")), 1)


def test_missing_tokenizer_is_named_when_training(command, tmp_path):
    """Training needs it."""
    message = error_line(command(TOKENIZER_PATH=str(tmp_path / "none.model")), 1)
    assert message.startswith("TOKENIZER_PATH")
    assert "none.model" in message


def test_record_preset_refuses_a_cpu(command, monkeypatch):
    """It does not start a hopeless run, unless DEVICE=cpu insists."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = error_line(command(PRESET="record"), 2)
    assert "PRESET=record" in message
    assert "CUDA" in message
    assert "DEVICE=cpu" in message
    insisting = command(PRESET="record", DEVICE="cpu", DATA_PATH="nowhere")
    assert "DATA_PATH" in error_line(insisting, 1)


def test_missing_cuda_is_named(command, monkeypatch):
    """DEVICE=cuda needs it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "DEVICE=cuda" in error_line(command(DEVICE="cuda"), 2)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(ITERATIONS="many"), ["ITERATIONS='many'", "a whole number"]),
        (dict(MODEL_DIM="33"), ["MODEL_DIM=33", "NUM_HEADS=2"]),
        (dict(ALPHA_BAES="1"), ["ALPHA_BAES", "ALPHA_BASE"]),
    ],
)
def test_setting_that_cannot_be_meant_is_bad_usage(command, settings, words):
    """The error has the setting and what is allowed."""
    message = error_line(command(**settings), 2)
    assert [word for word in words if word not in message] == []


def test_vocabulary_of_another_tokenizer_is_refused(command, run_dir):
    """VOCAB_SIZE and tokenizer must agree; nothing is trained."""
    message = error_line(command(VOCAB_SIZE="401"), 1)
    assert "VOCAB_SIZE=401" in message
    assert "400 pieces" in message
    assert not (run_dir / "model.int6.lzma").exists()


def test_bad_artifacts_are_named(command, trained, tmp_path):
    """`eval` of a missing, cut, altered or empty artifact scores nothing."""
    data = Path(artifact_of(trained)).read_bytes()
    path = tmp_path / "bad.lzma"
    assert str(path) in error_line(command("eval", ARTIFACT_PATH=str(path)), 1)
    flipped = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    for contents in (data[:-1], flipped, b""):
        path.write_bytes(contents)
        assert str(path) in error_line(command("eval", ARTIFACT_PATH=str(path)), 1)
    assert not (tmp_path / "logs").exists()


def test_tokenizer_must_be_the_artifacts_own(command, trained, run_dir, tmp_path):
    """One of the same size will not do: bytes and tokens would mean nothing."""
    other = tmp_path / "other.model"
    train_gpt.train_tokenizer([Path(SCRIPT).read_text(encoding="utf-8")], 400, other)
    settings = dict(ARTIFACT_PATH=artifact_of(trained), TOKENIZER_PATH=str(other))
    message = error_line(command("eval", **settings), 1)
    assert str(other) in message
    assert "artifact" in message
    assert not (run_dir / "results.json").exists()


def test_model_setting_that_is_not_the_artifacts_is_refused(command, trained):
    """The error names both values."""
    message = error_line(command("eval", ARTIFACT_PATH=artifact_of(trained), MLP_MULT="2"), 2)
    assert "MLP_MULT=2" in message
    assert "3" in message


def test_unwritable_log_folder_is_found_before_training(command, tmp_path):
    """LOG_DIR under a regular file."""
    (tmp_path / "file").write_bytes(b"")
    message = error_line(command(LOG_DIR=str(tmp_path / "file" / "logs")), 1)
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_bytes() == b""


def test_ranks_that_do_not_fit_the_batch_are_bad_usage(command, monkeypatch):
    """Four sequences over three ranks, told before the data is read."""
    rt = train_gpt.Runtime(world=3, notes=("cpu", "", ""))
    monkeypatch.setattr(train_gpt, "start_runtime", lambda cfg, environ: rt)
    monkeypatch.setattr(train_gpt.Runtime, "sum_over_ranks", lambda self, tensor: tensor)
    message = error_line(command(DATA_PATH="nowhere"), 2)
    assert message.startswith("TRAIN_BATCH_TOKENS=256")
    assert "3 ranks" in message
    assert "--nproc_per_node" in message


# ---- Training that ends early --------------------------------------------------------------------


def kept_weights(folder):
    """Return what a run has kept of its training, {name: tensor}."""
    return torch.load(folder / "weights.pt", weights_only=True)["weights"]


@pytest.mark.parametrize("rate", ["MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR"])
def test_rate_that_blows_up_is_named(command, tmp_path, run_dir, rate):
    """The error has the step and the rate; weights that it names can be read."""
    message = error_line(command(**{rate: "1e18"}), 1)
    assert message.startswith("after step ")
    assert rate in message
    path = run_dir / "weights.pt"
    assert path.exists() == (str(path.relative_to(tmp_path)) in message)
    if path.exists():
        broken = {name for name, w in kept_weights(run_dir).items() if not w.isfinite().all()}
        # The decay of a table may overflow in the last step whose loss is finite.
        tables = {"embed.tokens", "embed.bigrams", "ve_table"}
        assert broken <= (tables if rate == "TIED_EMBED_LR" else set())
    assert not (run_dir / "model.int6.lzma").exists()


def test_nan_keeps_the_last_good_weights(command, tmp_path, run_dir, monkeypatch):
    """NaN in the third step: those on disk are the weights of a run that ended after the second."""
    calls = itertools.count(1)
    original = torch.nn.functional.cross_entropy

    def spoil(*args, **how):
        bad = next(calls) == 6  # two micro-batches a step
        return original(*args, **how) * (math.nan if bad else 1)

    def fail(*args):
        raise train_gpt.UserError("no calibration")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", spoil)
        message = error_line(command(WARMDOWN_ITERS="1"), 1)
    assert message.startswith("after step 2: loss nan")  # so that nothing is calibrated
    monkeypatch.setattr(train_gpt, "calibrate", fail)
    error_line(command(WARMDOWN_ITERS="0", ITERATIONS="2", RUN_ID="two"), 1)
    stopped = kept_weights(run_dir)
    good = kept_weights(tmp_path / "logs" / "two")
    assert stopped.keys() == good.keys()
    assert [name for name, w in good.items() if not torch.equal(stopped[name], w)] == []


def test_artifact_over_the_cap_is_kept_and_not_scored(command, run_dir):
    """The error says by how much, and what to lower."""
    limit = train_gpt.CODE_BYTES + 2000
    message = error_line(command(SIZE_LIMIT_BYTES=str(limit)), 1)
    path = run_dir / "model.int6.lzma"
    over = path.stat().st_size - 2000
    assert f" {over:,} bytes over SIZE_LIMIT_BYTES={limit:,}" in message
    assert "MODEL_DIM" in message
    assert train_gpt.read_artifact(path).settings["model_dim"] == 32
    assert "val_bpb" not in (run_dir / "train.log").read_text()
    results = results_of(run_dir)
    assert results["stages"] == []
    assert results["val_bpb"] is None
    assert "not a finished run" in error_line(command("summarize", run_dir / "results.json"), 1)


@pytest.mark.slow
def test_ctrl_c_while_training_keeps_the_weights(corpus, tmp_path):
    """SIGINT in the middle of training: one line, status 1, and weights that can be read."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits "ignored"
    settings = dict(corpus, ITERATIONS="100000", LOG_EVERY="1", RUN_ID="run")
    process = start(tmp_path, **settings)
    signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    status, _, err = finished(process)
    message = error_line((status, err), 1)
    run_dir = tmp_path / "logs" / "run"
    assert message.startswith("after step ")
    assert "logs/run/weights.pt" in message
    weights = kept_weights(run_dir)
    assert [name for name, w in weights.items() if not w.isfinite().all()] == []
    assert [name for name, w in weights.items() if w.any()] != []
    assert no_leftovers(tmp_path)
    assert not (run_dir / "model.int6.lzma").exists()


def test_ctrl_c_while_scoring_is_told(command, trained, monkeypatch):
    """After training: status 130 and one line."""

    def interrupt(*args):
        raise KeyboardInterrupt("interrupted")

    monkeypatch.setattr(train_gpt, "evaluate", interrupt)
    message = error_line(command("eval", ARTIFACT_PATH=artifact_of(trained)), 130)
    assert "interrupted" in message


def test_ctrl_c_before_training_keeps_nothing(command, tmp_path, monkeypatch):
    """Untrained weights are not offered as the last good ones."""

    def interrupt(*args):
        raise KeyboardInterrupt("interrupted")

    monkeypatch.setattr(train_gpt, "train_stream", interrupt)
    assert "interrupted" in error_line(command(), 1)
    assert not list(tmp_path.rglob("weights.pt"))


def test_training_shard_with_a_foreign_token_is_named(command, corpus, tmp_path):
    """And no traceback shows."""
    (tmp_path / "data").mkdir()
    for path in Path(corpus["DATA_PATH"]).glob("fineweb_val_*"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "data" / "fineweb_train_000000.bin"
    bad.write_bytes(train_gpt.shard_bytes(np.arange(401)))
    message = error_line(command(DATA_PATH=str(tmp_path / "data")), 1)
    assert str(bad) in message
    assert "VOCAB_SIZE=400" in message


@pytest.mark.slow
def test_shard_that_goes_bad_on_two_ranks_keeps_the_weights(corpus, tmp_path):
    """The second shard ends in a foreign token: one line, and rank 0 has kept the first's weights.

    It stands behind what is looked at before work.
    """
    data = tmp_path / "data"
    data.mkdir()
    for path in Path(corpus["DATA_PATH"]).glob("fineweb_*_000000.bin"):
        (data / path.name).write_bytes(path.read_bytes())
    good = data / "fineweb_train_000000.bin"
    tokens = train_gpt.read_shard(good, 400)[:600]
    good.write_bytes(train_gpt.shard_bytes(tokens))
    bad = train_gpt.shard_bytes([*np.tile(tokens, 1 + train_gpt.SAMPLE_BYTES // 1200), 400])
    (data / "fineweb_train_000001.bin").write_bytes(bad)
    settings = dict(corpus, DATA_PATH=str(data), RUN_ID="run", MIXER_CALIBRATION_TOKENS="0")
    status, _, err = finished(start(tmp_path, launcher=TORCHRUN, **settings))
    (message,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert status != 0
    assert "fineweb_train_000001.bin" in message
    assert "weights.pt" in message
    assert len(kept_weights(tmp_path / "logs" / "run")) > 10


# ---- Two machines without a shared disk ----------------------------------------------------------


def node(folder, rank, port, **settings):
    """Start one of two agents of torchrun, each with one rank and a folder of its own."""
    folder.mkdir()
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        f"--node_rank={rank}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    )
    return start(folder, launcher=launcher, **settings)


@pytest.mark.slow
def test_two_nodes_need_no_shared_disk(corpus, tmp_path):
    """The artifact travels; what both ranks score is what one rank scores, and one node writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / name for name in ("first", "second")]
    settings = dict(corpus, RUN_ID="run")
    nodes = [node(folder, rank, port, **settings) for rank, folder in enumerate(folders)]
    ends = [finished(process) for process in nodes]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert list(folders[1].iterdir()) == []
    run_dir = folders[0] / "logs" / "run"
    alone = start(tmp_path, "eval", ARTIFACT_PATH=str(run_dir / "model.int6.lzma"), **corpus)
    status, _, err = finished(alone)
    assert status == 0, err
    evaluated = results_of(tmp_path / "logs" / "run_eval")
    assert bpb_of(evaluated) == bpb_of(results_of(run_dir))
