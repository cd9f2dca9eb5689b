"""The program as its users run it: whole runs on one rank and on two, and what it says when something is wrong."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt

SCRIPT = str(ROOT / "train_gpt.py")
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
    TTT_CHUNK_TOKENS="512",
    TTT_EPOCHS="2",
    NGRAM_ORDER="5",
    VAL_TOKENS="1500",
)


def clean_environment():
    """This process's environment without any setting of the program or of a process group."""
    ours = {f.name.upper() for f in dataclasses.fields(train_gpt.Config)} | {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    }
    return {name: value for name, value in os.environ.items() if name not in ours}


def start(folder, *args, launcher=(), **settings):
    """The program, started in `folder` as a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, *launcher, SCRIPT, *map(str, args)]
    return subprocess.Popen(command, cwd=folder, env={**clean_environment(), **settings}, **pipes)


def finished(process):
    """(exit status, stdout, stderr) of a process, once it has ended."""
    out, err = process.communicate()
    return process.returncode, out, err


def no_leftovers(folder):
    """Whether no temporary file or probe is anywhere under folder."""
    return not [p for p in folder.rglob("*") if ".tmp" in p.name or p.name == ".probe"]


def results_of(folder):
    """The results.json of a run's folder."""
    return json.loads((folder / "results.json").read_text())


def bpb_of(results):
    """{stage: val_bpb} of the stages after quantization."""
    return {s["name"]: s["val_bpb"] for s in results["stages"] if s["name"] != "pre_quant"}


# ----------------------------------------------------------------------------------------------------------
# Whole runs of the demo
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo trained on one rank and on two, and each artifact evaluated on the other number of ranks."""
    folder = tmp_path_factory.mktemp("demo")
    settings = dict(MODEL, PRESET="demo")
    runs = {}
    for name, launcher, artifact in (
        ("one", (), ""),
        ("two", TORCHRUN, ""),
        ("one on two", TORCHRUN, "one"),
        ("two on one", (), "two"),
    ):
        extra = {"ARTIFACT_PATH": f"logs/{artifact}/model.int6.lzma"} if artifact else {}
        changes = dict(settings, RUN_ID=name, **extra)
        process = start(folder, *(["eval"] if artifact else []), launcher=launcher, **changes)
        status, out, err = finished(process)
        runs[name] = SimpleNamespace(status=status, out=out, err=err, results=None)
        if status == 0:
            runs[name].results = results_of(folder / "logs" / name)
    return SimpleNamespace(folder=folder, runs=runs)


def test_demo_runs_to_the_end(demo):
    """No data, one command: exit status 0 on one rank and on two, nothing on stderr, nothing half-written."""
    assert [
        (name, run.status, run.err[-500:]) for name, run in demo.runs.items() if run.status
    ] == []
    assert demo.runs["one"].err == demo.runs["two on one"].err == ""
    assert "demo: gathering English" in demo.runs["one"].out
    assert not any(
        "gathering" in demo.runs[name].out for name in ("two", "one on two", "two on one")
    )
    assert no_leftovers(demo.folder)
    for name, run in demo.runs.items():
        log = "eval.log" if " on " in name else "train.log"
        assert (demo.folder / "logs" / name / log).read_text() == run.out  # no rank but one speaks


@pytest.mark.parametrize(
    "name, world", [("one", 1), ("two", 2), ("one on two", 2), ("two on one", 1)]
)
def test_results_have_every_field(demo, name, world):
    """results.json has all that others read from it, and its numbers agree with each other and with the file."""
    results, evaluated = demo.runs[name].results, " on " in name
    assert set(results) == {
        "run_id",
        "seed",
        "command",
        "settings",
        "environment",
        "train",
        "artifact",
        "stages",
        "val_bpb",
    } | (set() if evaluated else {"proof"})
    assert (results["run_id"], results["seed"], results["command"]) == (
        name,
        1337,
        "eval" if evaluated else "train",
    )
    settings, environment, artifact = (
        results["settings"],
        results["environment"],
        results["artifact"],
    )
    assert set(settings) == {f.name for f in dataclasses.fields(train_gpt.Config)}
    assert settings["preset"] == "demo" and settings["model_dim"] == 32
    assert {"python", "torch", "device", "world_size"} <= set(environment) and environment[
        "world_size"
    ] == world
    assert environment["torch"] == torch.__version__ and environment["device"].startswith(
        ("cpu", "cuda")
    )
    if evaluated:
        assert results["train"] is None
    else:
        proof = results["proof"]
        assert (
            proof["tokens"] == 1100
            and 0 < 8 * proof["bytes_on_disk"] - proof["predicted_bits"] < 8 * 64
        )
        train = results["train"]
        assert (train["steps"], train["tokens"]) == (4, 4 * 256) and train["seconds"] > 0
        assert train["tokens_per_second"] == pytest.approx(train["tokens"] / train["seconds"])
    data = (demo.folder / artifact["path"]).read_bytes()
    assert (
        artifact["weights_bytes"] == len(data)
        and artifact["sha256"] == hashlib.sha256(data).hexdigest()
    )
    assert artifact["code_bytes"] == len((ROOT / "train_gpt.py").read_bytes())
    assert (
        artifact["total_bytes"]
        == artifact["weights_bytes"] + artifact["code_bytes"]
        <= artifact["limit_bytes"]
    )
    assert artifact["limit_bytes"] == 1_000_000
    stages = results["stages"]
    assert [s["name"] for s in stages] == STAGES[evaluated:] and results["val_bpb"] == stages[-1][
        "val_bpb"
    ]
    for stage in stages:
        assert (
            set(stage) == {"name", "val_loss", "val_bpb", "tokens", "bytes", "seconds"}
            and stage["seconds"] > 0
        )
        assert stage["tokens"] == 1500 and stage["bytes"] == stages[0]["bytes"] > 1500
        bits = stage["val_loss"] * stage["tokens"] / math.log(2)
        assert stage["val_bpb"] == pytest.approx(bits / stage["bytes"], rel=1e-12)
        assert 0 < stage["val_loss"] < 2 * math.log(1024)


def test_an_artifact_has_one_score(demo):
    """The same artifact on one rank and on two: every stage's val_bpb is equal to the last bit."""
    for trained, evaluated in (("one", "one on two"), ("two", "two on one")):
        assert bpb_of(demo.runs[trained].results) == bpb_of(demo.runs[evaluated].results)
    digests = {name: demo.runs[name].results["artifact"]["sha256"] for name in demo.runs}
    assert digests["one"] == digests["one on two"] and digests["two"] == digests["two on one"]


def test_training_does_not_depend_on_the_ranks(demo):
    """From one seed, one rank and two take the same steps up to rounding, and score the same text."""
    one, two = (demo.runs[name].results["stages"] for name in ("one", "two"))
    assert [s["val_bpb"] for s in two] == pytest.approx([s["val_bpb"] for s in one], rel=2e-3)
    assert one[0]["bytes"] == two[0]["bytes"] and one[0]["val_bpb"] != one[1]["val_bpb"]


# ----------------------------------------------------------------------------------------------------------
# In this process, on a corpus made once
# ----------------------------------------------------------------------------------------------------------


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
    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    train_gpt.dispatch([], dict(corpus, LOG_DIR=str(folder), RUN_ID="run"))
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def command(corpus, tmp_path, monkeypatch, capfd):
    """command(*args, **settings) -> (exit status, stderr) of a command line on the corpus, in tmp_path.

    A setting None is left out. Afterwards nothing half-written may be anywhere.
    """
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run(*args, **settings):
        environ = {
            **clean_environment(),
            **corpus,
            "LOG_DIR": str(tmp_path / "logs"),
            "RUN_ID": "run",
            **settings,
        }
        monkeypatch.setattr(
            os, "environ", {name: value for name, value in environ.items() if value is not None}
        )
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
        capfd.readouterr()
        status = train_gpt.main()
        return status, capfd.readouterr().err

    yield run
    torch.set_num_threads(threads)
    assert no_leftovers(tmp_path)


def error_line(result, status):
    """The message of a command that failed with `status`: one line on stderr, which begins with 'error: '."""
    assert result[0] == status
    assert (
        result[1].startswith("error: ") and result[1].count("\n") == 1 and result[1].endswith("\n")
    )
    return result[1][7:-1]


def test_evaluation_needs_nothing_but_the_artifact(command, trained, tmp_path):
    """`eval` without tokenizer, model settings or preset gives the very numbers of the run that trained."""
    shape = dict.fromkeys([*MODEL, "PRESET", "VOCAB_SIZE"])
    settings = {
        **shape,
        "ARTIFACT_PATH": str(trained / "model.int6.lzma"),
        "VAL_TOKENS": "300",
        "RUN_ID": None,
        "TOKENIZER_PATH": str(tmp_path / "none.model"),
        "SIZE_LIMIT_BYTES": "1000000",
    }
    assert command("eval", **settings) == (0, "")
    (results,) = (results_of(path.parent) for path in (tmp_path / "logs").glob("*/results.json"))
    assert bpb_of(results) == bpb_of(results_of(trained))
    assert results["settings"]["preset"] == "bench" and results["artifact"]["weights_bytes"] > 0


def test_settings_of_evaluation_may_change(command, trained, tmp_path):
    """Without TTT and mixer these stages are gone and the others stay as they were."""
    artifact = str(trained / "model.int6.lzma")
    assert command("eval", ARTIFACT_PATH=artifact, TTT_ENABLED="0", MIXER="none") == (0, "")
    before = bpb_of(results_of(trained))
    results = results_of(tmp_path / "logs" / "run")
    assert bpb_of(results) == {n: before[n] for n in ("round_trip", "sliding")}
    assert (tmp_path / "logs" / "run" / "eval.log").exists()
    assert results["artifact"]["overridden"] == [
        "MIXER",
        "TTT_ENABLED",
    ]  # no decoder of the file gets these figures
    assert results_of(trained)["artifact"]["overridden"] == []
    assert "MIXER, TTT_ENABLED" in error_line(
        command("summarize", tmp_path / "logs" / "run" / "results.json"), 1
    )


def test_settings_of_evaluation_are_judged_with_the_artifact(command, trained):
    """What fits the artifact is right, also where it would not fit the default preset's window of 2,048."""
    shape = dict.fromkeys([*MODEL, "PRESET", "VOCAB_SIZE"])
    settings = dict(
        shape,
        ARTIFACT_PATH=str(trained / "model.int6.lzma"),
        TTT_CHUNK_TOKENS="192",
        VAL_TOKENS="300",
    )
    assert command("eval", **settings) == (0, "")


def test_evaluation_keeps_the_results_of_training(command, corpus, tmp_path):
    """`eval` under the RUN_ID of the training run does not overwrite what that run has measured."""
    assert command(TTT_ENABLED="0", MIXER="none") == (0, "")
    before = (tmp_path / "logs" / "run" / "results.json").read_bytes()
    assert command("eval", TTT_ENABLED="0", MIXER="none") == (0, "")
    assert (tmp_path / "logs" / "run" / "results.json").read_bytes() == before


def test_summarize_writes_a_submission(command, trained, tmp_path):
    """`summarize` puts submission.json into the current folder."""
    assert command("summarize", trained / "results.json") == (0, "")
    summary = json.loads((tmp_path / "submission.json").read_text())
    assert summary["val_bpb"] == results_of(trained)["val_bpb"] and list(summary["seeds"]) == [
        "1337"
    ]


def test_help_lists_every_setting(command, capfd):
    """--help explains the commands and names each setting, with status 0."""
    assert command("--help") == (0, "")
    environ = clean_environment()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr and "summarize" in done.stdout
    assert all(
        f"\n  {f.name.upper()} " in done.stdout for f in dataclasses.fields(train_gpt.Config)
    )


# ----------------------------------------------------------------------------------------------------------
# What goes wrong
# ----------------------------------------------------------------------------------------------------------


def test_errors_reach_the_shell(tmp_path):
    """As processes: one line on stderr, exit status 2 for bad usage and 1 for anything else that can be mended."""
    (tmp_path / "bad.lzma").write_bytes(b"no artifact")
    first = start(tmp_path, PRESET="fast")
    second = start(tmp_path, "eval", ARTIFACT_PATH="bad.lzma")
    assert error_line(finished(first)[::2], 2) == "PRESET='fast': there are record, bench, demo"
    assert "bad.lzma" in error_line(finished(second)[::2], 1)
    assert os.listdir(tmp_path) == ["bad.lzma"]


@pytest.mark.parametrize(
    "args", ["train", "eval x", "tokenize", "tokenize out", "summarize", "-v", "eval eval"]
)
def test_unknown_commands(command, args):
    """An unknown or incomplete command line is bad usage, named in the error; --help is pointed to."""
    message = error_line(command(*args.split()), 2)
    assert f"'{args}'" in message and "--help" in message


def test_no_shards(command, tmp_path):
    """A DATA_PATH without shards is named before any training, and so is the demo."""
    message = error_line(command(DATA_PATH=str(tmp_path / "nowhere")), 1)
    assert message.startswith("DATA_PATH") and "nowhere" in message and "PRESET=demo" in message


def test_no_training_shards(command, corpus, tmp_path):
    """Validation shards alone do not train."""
    (tmp_path / "data").mkdir()
    shard = next(Path(corpus["DATA_PATH"]).glob("fineweb_val_*"))
    (tmp_path / "data" / shard.name).write_bytes(shard.read_bytes())
    assert "fineweb_train_" in error_line(command(DATA_PATH=str(tmp_path / "data")), 1)


def test_no_tokenizer(command, tmp_path):
    """A missing TOKENIZER_PATH is named when training, which needs it."""
    message = error_line(command(TOKENIZER_PATH=str(tmp_path / "none.model")), 1)
    assert message.startswith("TOKENIZER_PATH") and "none.model" in message


def test_record_without_cuda(command, monkeypatch):
    """The record preset does not start a hopeless run on a CPU unless DEVICE=cpu insists; cuda must be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = error_line(command(PRESET="record"), 2)
    assert "PRESET=record" in message and "CUDA" in message and "DEVICE=cpu" in message
    assert "DEVICE=cuda" in error_line(command(DEVICE="cuda"), 2)
    shape = dict(PRESET="record", DEVICE="cpu", DATA_PATH="nowhere")
    assert "DATA_PATH" in error_line(command(**shape), 1)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(ITERATIONS="many"), ["ITERATIONS='many'", "a whole number"]),
        (dict(MODEL_DIM="33"), ["MODEL_DIM=33", "NUM_HEADS=2"]),
        (dict(ALPHA_BAES="1"), ["ALPHA_BAES", "ALPHA_BASE"]),
    ],
)
def test_bad_settings(command, settings, words):
    """A setting that cannot be meant is bad usage."""
    message = error_line(command(**settings), 2)
    assert all(word in message for word in words)


def test_vocabulary_of_another_tokenizer(command, tmp_path):
    """VOCAB_SIZE and tokenizer must agree; nothing is trained."""
    message = error_line(command(VOCAB_SIZE="401"), 1)
    assert "VOCAB_SIZE=401" in message and "400 pieces" in message
    assert not (tmp_path / "logs" / "run" / "model.int6.lzma").exists()


def test_bad_artifacts(command, trained, tmp_path):
    """`eval` of a missing, damaged or foreign artifact names it and scores nothing."""
    data = (trained / "model.int6.lzma").read_bytes()
    path = tmp_path / "bad.lzma"
    assert str(path) in error_line(command("eval", ARTIFACT_PATH=str(path)), 1)
    for contents in (data[:-1], data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], b""):
        path.write_bytes(contents)
        assert str(path) in error_line(command("eval", ARTIFACT_PATH=str(path)), 1)
    assert not (tmp_path / "logs").exists()


def test_an_artifact_of_another_tokenizer(command, trained, corpus, tmp_path):
    """The tokenizer on disk must be the artifact's, of the same size too, or bytes and tokens mean nothing."""
    other = tmp_path / "other.model"
    train_gpt.train_tokenizer([Path(SCRIPT).read_text(encoding="utf-8")], 400, other)
    artifact = str(trained / "model.int6.lzma")
    message = error_line(command("eval", ARTIFACT_PATH=artifact, TOKENIZER_PATH=str(other)), 1)
    assert str(other) in message and "artifact" in message
    assert not (tmp_path / "logs" / "run" / "results.json").exists()


def test_settings_against_the_artifact(command, trained):
    """A model setting in the environment that is not the artifact's is an error that names both values."""
    message = error_line(
        command("eval", ARTIFACT_PATH=str(trained / "model.int6.lzma"), MLP_MULT="2"), 2
    )
    assert "MLP_MULT=2" in message and "3" in message


def test_an_unwritable_log_folder(command, tmp_path):
    """LOG_DIR under a regular file is found before training, and so is an artifact's folder of that kind."""
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in error_line(command(LOG_DIR=str(tmp_path / "file" / "logs")), 1)
    assert (tmp_path / "file").read_bytes() == b""


def test_ranks_that_do_not_fit_the_batch(command, monkeypatch):
    """Four sequences over three ranks: bad usage, told before any step."""
    monkeypatch.setattr(
        train_gpt,
        "start_runtime",
        lambda cfg, environ: train_gpt.Runtime(world=3, notes=("cpu", "", "")),
    )
    monkeypatch.setattr(train_gpt.Runtime, "sum_over_ranks", lambda self, tensor: tensor)
    message = error_line(command(), 2)
    assert (
        "TRAIN_BATCH_TOKENS=256" in message
        and "3 ranks" in message
        and "--nproc_per_node" in message
    )


@pytest.mark.parametrize("rate", ["MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR"])
def test_nan_stops_training(command, tmp_path, rate):
    """A rate that blows the model up: the error has the step and the rate; weights that it names can be read."""
    message, path = (
        error_line(command(**{rate: "1e30"}), 1),
        tmp_path / "logs" / "run" / "weights.pt",
    )
    assert message.startswith("step ") and rate in message
    assert path.exists() == (str(path.relative_to(tmp_path)) in message)
    if path.exists():
        assert all(w.isfinite().all() for w in torch.load(path)["weights"].values())
    assert not (path.parent / "model.int6.lzma").exists()


def test_an_artifact_over_the_cap(command, tmp_path):
    """Too large a model: the error says by how much and what to lower; the file stays; nothing is scored."""
    code = train_gpt.code_bytes()
    message = error_line(command(SIZE_LIMIT_BYTES=str(code + 2000)), 1)
    path = tmp_path / "logs" / "run" / "model.int6.lzma"
    over = path.stat().st_size - 2000
    assert (
        f" {over:,} bytes over SIZE_LIMIT_BYTES={code + 2000:,}" in message
        and "MODEL_DIM" in message
    )
    assert train_gpt.read_artifact(path).settings["model_dim"] == 32
    assert results_of(path.parent)["val_bpb"] is None


def test_ctrl_c_while_scoring(command, trained, monkeypatch):
    """Ctrl-C after training: status 130 and one line."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "evaluate", interrupt)
    assert "interrupted" in error_line(
        command("eval", ARTIFACT_PATH=str(trained / "model.int6.lzma")), 130
    )


def test_a_shard_that_goes_bad(command, corpus, tmp_path):
    """A training shard with a foreign token is named, and no traceback shows."""
    (tmp_path / "data").mkdir()
    for path in Path(corpus["DATA_PATH"]).glob("fineweb_val_*"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "data" / "fineweb_train_000000.bin"
    bad.write_bytes(train_gpt.shard_bytes(np.arange(401)))
    message = error_line(command(DATA_PATH=str(tmp_path / "data")), 1)
    assert str(bad) in message and "VOCAB_SIZE=400" in message


def test_a_shard_that_goes_bad_in_mid_run_on_two_ranks(corpus, tmp_path):
    """The second shard is foreign: the run ends with one line, and rank 0 has kept the weights of the first."""
    (tmp_path / "data").mkdir()
    for path in Path(corpus["DATA_PATH"]).glob("fineweb_*_000000.bin"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    good = tmp_path / "data" / "fineweb_train_000000.bin"
    good.write_bytes(train_gpt.shard_bytes(train_gpt.read_shard(good, 400)[:600]))
    (tmp_path / "data" / "fineweb_train_000001.bin").write_bytes(b"no shard")
    settings = dict(
        corpus, DATA_PATH=str(tmp_path / "data"), RUN_ID="run", MIXER_CALIBRATION_TOKENS="0"
    )
    status, _, err = finished(start(tmp_path, launcher=TORCHRUN, **settings))
    (message,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert status and "fineweb_train_000001.bin" in message and "weights.pt" in message
    kept = torch.load(tmp_path / "logs" / "run" / "weights.pt")
    assert kept["settings"]["vocab_size"] == 400


def test_ctrl_c_before_training_keeps_nothing(command, tmp_path, monkeypatch):
    """Untrained weights are not offered as the last good ones."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "TrainStream", interrupt)
    assert "interrupted" in error_line(command(), 130)
    assert not list(tmp_path.rglob("weights.pt"))
