"""A run's results are its own, and long work survives whatever ends it."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment, error_line, no_leftovers

import train_gpt

MODEL = dict(
    PRESET="bench",
    VOCAB_SIZE="400",
    NUM_LAYERS="2",
    VE_LAYERS="1",
    MODEL_DIM="32",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    ROPE_DIMS="8",
    XSA_LAST_N="1",
    BIGRAM_VOCAB_SIZE="64",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="128",
    ITERATIONS="4",
    MIXER_CALIBRATION_TOKENS="256",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="32",
    TTT_ENABLED="0",
    TTT_FREEZE_BLOCKS="1",
    TTT_CHUNK_TOKENS="128",
    MIXER_BLOCK="16",
    NGRAM_HASH_BITS="12",
    VAL_TOKENS="200",
    SIZE_LIMIT_BYTES="1000000",
    VERIFY_ENABLED="0",
    RUN_ID="run",
)
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def corpus(few_documents):
    """Settings of a tiny run on shards of a few documents."""
    return MODEL | few_documents


@pytest.fixture
def command(corpus, command_line):
    """command(*args, **settings) -> (exit status, stderr) of a command on that corpus."""

    def run(*args, **settings):
        return command_line(*args, **{**corpus, **settings})

    return run


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A folder of logs with one finished run."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {**clean_environment(), **corpus, "DEVICE": "cpu", "LOG_DIR": str(folder)}
    torch.set_num_threads(1)
    train_gpt.dispatch([], settings)
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    """The folder of a finished run, where `command` runs."""
    shutil.copytree(finished, tmp_path / "logs")
    return tmp_path / "logs" / "run"


def contents(folder):
    """Return {name: bytes} of all files in a folder but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def results_of(folder):
    """Return what is in a run's results.json."""
    return json.loads((folder / "results.json").read_bytes())


# ---- A run's results are its own -----------------------------------------------------------------


def test_same_command_works_again(command, run_dir):
    """Its artifact and figure are the same."""
    before = contents(run_dir)["model.int6.lzma"], results_of(run_dir)["val_bpb"]
    assert command() == (0, "")
    assert (contents(run_dir)["model.int6.lzma"], results_of(run_dir)["val_bpb"]) == before


@pytest.mark.parametrize(
    "name, value",
    [("SEED", "5"), ("COMPLEMENT_ALPHA", "0"), ("VAL_TOKENS", "100"), ("MIXER", "none")],
)
def test_other_settings_do_not_replace_a_run(command, run_dir, name, value):
    """The message has the setting and two ways out; no file changes."""
    before = contents(run_dir)
    message = error_line(command(**{name: value}), 2)
    assert f"another {name}: " in message
    assert "RUN_ID" in message
    assert "REPLACE=1" in message
    assert contents(run_dir) == before


def test_another_source_does_not_replace_a_run(command, run_dir):
    """As after an edit of the script."""
    results = results_of(run_dir)
    results["environment"]["source_sha256"] = "0" * 64
    (run_dir / "results.json").write_text(json.dumps(results))
    assert "another SOURCE_SHA256: " in error_line(command(), 2)


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"[1]", b"\xff", b"{}", b'{"settings": null}', b'{"settings": 1}']
)
def test_broken_results_are_not_replaced(command, run_dir, contents):
    """They may be somebody's: the file is named, with no traceback."""
    (run_dir / "results.json").write_bytes(contents)
    assert str(run_dir / "results.json") in error_line(command(), 1)
    assert (run_dir / "results.json").read_bytes() == contents


def test_another_command_does_not_replace_a_run(command, run_dir, tmp_path):
    """`eval` under the RUN_ID of another run, say."""
    shutil.copytree(run_dir, tmp_path / "logs" / "other")
    artifact = str(tmp_path / "logs" / "other" / "model.int6.lzma")
    before = contents(run_dir)
    assert "COMMAND" in error_line(command("eval", ARTIFACT_PATH=artifact), 2)
    assert contents(run_dir) == before


@pytest.mark.parametrize("way", [{"REPLACE": "1"}, {"RUN_ID": "another"}])
def test_ways_out_work(command, run_dir, way):
    """Those that the message names."""
    assert command(SEED="5", **way) == (0, "")
    folder = run_dir.with_name(way.get("RUN_ID", "run"))
    assert results_of(folder)["seed"] == 5


@pytest.mark.parametrize(
    "change",
    [{"LOG_EVERY": "1"}, {"VERIFY_TOKENS": "7"}, {"TRACE_TOKENS": "7"}, {"DEVICE": "auto"}],
)
def test_settings_that_shape_no_result_may_differ(command, run_dir, change):
    """They do not make another run."""
    assert command(**change) == (0, "")


def test_folder_at_work_is_locked(command, run_dir):
    """A second run in it is refused before it changes anything."""
    before = contents(run_dir)
    with open(run_dir / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work" in error_line(command(), 1)
    assert contents(run_dir) == before


@pytest.mark.parametrize("kind", ["artifact", "folder"])
def test_training_leaves_artifact_path_alone(command, tmp_path, kind):
    """It names what other commands read; a run writes to its own folder."""
    path = tmp_path / "other.lzma"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"another run's")
    assert command(ARTIFACT_PATH=str(path)) == (0, "")
    assert kind == "folder" or path.read_bytes() == b"another run's"
    assert (tmp_path / "logs" / "run" / "model.int6.lzma").exists()


def test_artifact_that_was_exchanged_is_refused(command, finished, monkeypatch):
    """What is read back must be what was written."""
    write_atomically = train_gpt.write_atomically
    other = (finished / "run" / "model.int6.lzma").read_bytes()

    def exchanged(path, data, *how):
        write_atomically(path, other if path.name == "model.int6.lzma" else data, *how)

    monkeypatch.setattr(train_gpt, "write_atomically", exchanged)
    message = error_line(command(SEED="5"), 1)
    assert "model.int6.lzma is not what was written" in message


def test_each_set_of_overridden_settings_has_a_folder(command, run_dir):
    """Beside the run's, which no evaluation changes."""
    before = contents(run_dir)
    none, stride = {"MIXER": "none"}, {"EVAL_STRIDE": "16"}
    for settings in ({}, none, stride, none | stride):
        assert command("eval", **settings) == (0, "")
    folders = sorted(path.name for path in run_dir.parent.iterdir())
    assert folders == [
        "run",
        "run_eval",
        "run_eval,EVAL_STRIDE=16",
        "run_eval,EVAL_STRIDE=16,MIXER=none",
        "run_eval,MIXER=none",
    ]
    assert contents(run_dir) == before


def test_evaluation_of_another_text_does_not_replace_one(command, run_dir):
    """It is told what differs, and the ways out."""
    assert command("eval") == (0, "")
    before = contents(run_dir.with_name("run_eval"))
    message = error_line(command("eval", VAL_TOKENS="100"), 2)
    assert "another VAL_TOKENS: " in message
    assert "RUN_ID" in message
    assert contents(run_dir.with_name("run_eval")) == before


def test_evaluation_lies_beside_a_run_in_a_subfolder(command, run_dir):
    """RUN_ID=a/b is a folder below another."""
    (run_dir.parent / "a").mkdir()
    run_dir.rename(run_dir.parent / "a" / "b")
    assert command("eval", RUN_ID="a/b") == (0, "")
    assert (run_dir.parent / "a" / "b_eval" / "results.json").exists()


def test_run_id_of_any_bytes(command, tmp_path):
    """Not UTF-8, for one."""
    assert command(RUN_ID="caf\udce9") == (0, "")
    assert b"caf\\udce9" in (tmp_path / "logs" / "caf\udce9" / "train.log").read_bytes()


# ---- Long work survives --------------------------------------------------------------------------


ENDS = {
    "setting": (train_gpt.UserError, "no such setting"),
    "memory": (MemoryError, "no more"),
    "device": (RuntimeError, "CUDA out of memory.\nTried"),
    "disk": (OSError, 28, "No space left on device"),
    "Ctrl-C": (KeyboardInterrupt,),
}


def fail_with(end):
    """Return a function that raises the error of this name."""

    def fail(*args):
        kind, *what = ENDS[end]
        raise kind(*what)

    return fail


@pytest.mark.parametrize("stage", ["calibrate", "fit_artifact", "read_artifact", "evaluate"])
@pytest.mark.parametrize("end", ENDS)
def test_weights_survive_what_follows_training(
    command, finished, tmp_path, monkeypatch, stage, end
):
    """The message says where they are, and `finish` ends the run as if nothing had happened."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, stage, fail_with(end))
        message = error_line(command(), 1)
    run_dir = tmp_path / "logs" / "run"
    assert f"{run_dir / 'weights.pt'} has the weights" in message
    assert "`finish`" in message
    assert command("finish") == (0, "")
    assert results_of(run_dir)["val_bpb"] == results_of(finished / "run")["val_bpb"]
    assert results_of(run_dir)["train"]["steps"] == 4
    assert not (run_dir / "weights.pt").exists()


def at_step(number, action, monkeypatch):
    """Call `action` in the middle of step `number`, counted from 1."""
    original = train_gpt.Trainer.step

    def step(self, batches, step, scale):
        if step + 1 == number:
            action()
        return original(self, batches, step, scale)

    monkeypatch.setattr(train_gpt.Trainer, "step", step)


@pytest.mark.parametrize("number", SIGNALS)
def test_weights_survive_a_signal(command, tmp_path, monkeypatch, number):
    """In training; `finish` scores what there is, and says that it ended early."""
    with monkeypatch.context() as patch:
        at_step(3, lambda: os.kill(os.getpid(), number), patch)
        message = error_line(command(), 1)
    run_dir = tmp_path / "logs" / "run"
    assert message.startswith("after step 2: interrupted; ")
    assert f"{run_dir / 'weights.pt'} has the weights" in message
    assert command("finish") == (0, "")
    train = results_of(run_dir)["train"]
    assert (train["steps"], train["stopped"]) == (2, "after step 2: interrupted")


@pytest.mark.parametrize("end", ["memory", "device", "disk"])
def test_weights_survive_an_error_in_training(command, tmp_path, monkeypatch, end):
    """As when another rank is killed: the last good ones are kept."""
    at_step(3, fail_with(end), monkeypatch)
    message = error_line(command(), 1)
    assert f"{tmp_path / 'logs' / 'run' / 'weights.pt'} has the weights" in message


def test_more_signals_do_not_lose_the_weights(command, tmp_path, monkeypatch):
    """Torchrun sends its own after that of the terminal."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", with_signals(torch.save))
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        assert "weights.pt has the weights" in error_line(command(), 1)
    assert (tmp_path / "logs" / "run" / "weights.pt").exists()


def with_signals(function):
    """Return `function` amid signals."""

    def run(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        function(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    return run


def test_nohup_holds(command, monkeypatch):
    """A hangup that is ignored when the program begins stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
    assert command() == (0, "")


def test_run_over_the_cap_is_finished_under_another(command, tmp_path):
    """A setting that made it fail may be mended."""
    code = train_gpt.CODE_BYTES
    message = error_line(command(SIZE_LIMIT_BYTES=str(code + 2000)), 1)
    assert "SIZE_LIMIT_BYTES" in message
    assert "`finish`" in message
    assert command("finish") == (0, "")


def test_weights_of_an_unfinished_run_are_not_replaced(command, tmp_path, monkeypatch):
    """By a run of other settings, unless it is told to."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "calibrate", fail_with("setting"))
        error_line(command(), 1)
    before = (tmp_path / "logs" / "run" / "weights.pt").read_bytes()
    assert "another SEED" in error_line(command(SEED="5"), 2)
    assert (tmp_path / "logs" / "run" / "weights.pt").read_bytes() == before


def test_weights_survive_a_disk_that_is_full_after_them(command, tmp_path, monkeypatch):
    """What is told is what is true: they are there."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "write_object", fail_with("disk"))
        message = error_line(command(), 1)
    assert f"{tmp_path / 'logs' / 'run' / 'weights.pt'} has the weights" in message
    assert command("finish") == (0, "")


def test_weights_that_were_not_written_are_not_promised(command, monkeypatch):
    """As when the disk is full."""
    monkeypatch.setattr(torch, "save", fail_with("disk"))
    assert "No space left" in (message := error_line(command(), 1))
    assert "has the weights" not in message


def test_signal_right_after_the_last_step_loses_nothing(command, run_dir, monkeypatch):
    """It comes while the average is put in place."""
    before = contents(run_dir)["model.int6.lzma"]
    install = train_gpt.Trainer.install_average

    monkeypatch.setattr(train_gpt.Trainer, "install_average", with_signals(install))
    assert command() == (0, "")
    assert contents(run_dir)["model.int6.lzma"] == before


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_weights_that_are_cut_are_named(command, tmp_path, share):
    """With what to do; as a copy of them may be."""
    path = tmp_path / "logs" / "run" / "weights.pt"
    path.parent.mkdir(parents=True)
    torch.save({"weights": torch.zeros(5000)}, path)
    os.truncate(path, int(share * path.stat().st_size))
    message = error_line(command("finish"), 1)
    assert message.startswith(f"RUN_ID: {path} has no training to finish; train again")


@pytest.mark.parametrize("end", ENDS)
def test_evaluation_that_fails_is_one_line(command, run_dir, monkeypatch, end):
    """With what the error says, also where torch has no memory."""
    monkeypatch.setattr(train_gpt, "evaluate", fail_with(end))
    status = 130 if end == "Ctrl-C" else 1
    message = error_line(command("eval"), status)
    said = [" ".join(str(word).split()) for word in ENDS[end][1:]]
    assert [word for word in said if word not in message] == []


def test_decoder_does_not_outlive_an_interrupted_run(command, run_dir, monkeypatch):
    """Its process has ended when the run has."""
    started = []
    popen = subprocess.Popen

    def interrupt(*_, timeout):
        raise KeyboardInterrupt

    def start(command, **how):
        started.append(popen(["sleep", "60"], **how))
        started[0].communicate = interrupt
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    error_line(command("verify", VERIFY_TOKENS="20"), 130)
    assert started[0].wait(10) == -signal.SIGKILL


def test_trained_run_is_not_trained_again(command, tmp_path, monkeypatch):
    """Its weights could be lost; the message has both ways on, and both work."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "calibrate", fail_with("setting"))
        error_line(command(), 1)
    path = tmp_path / "logs" / "run" / "weights.pt"
    before = path.read_bytes()
    message = error_line(command(), 1)
    assert "REPLACE=1" in message
    assert "`finish`" in message
    assert path.read_bytes() == before
    assert command(REPLACE="1") == (0, "")
    assert not path.exists()


def test_a_moved_run_is_finished_where_it_is(command, tmp_path, monkeypatch):
    """Folder and name are those that it was found by, not those that it was trained under."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "calibrate", fail_with("setting"))
        error_line(command(LOG_DIR="old", RUN_ID="other"), 1)
    moved = tmp_path / "new" / "bench_seed1337"
    moved.parent.mkdir()
    (tmp_path / "old" / "other").rename(moved)
    environ = dict(PRESET="bench", LOG_DIR="new", RUN_ID=None)
    assert command("finish", **environ) == (0, "")
    assert results_of(moved)["train"]["steps"] == 4
    assert not (moved / "weights.pt").exists()
    assert os.listdir(tmp_path / "old") == []


def test_settings_of_unfinished_weights_are_not_called_an_artifact(command, tmp_path, monkeypatch):
    """Where another version of the script left them."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "calibrate", fail_with("setting"))
        error_line(command(), 1)
    path = tmp_path / "logs" / "run" / "weights.pt"
    kept = torch.load(path, weights_only=True)
    torch.save(kept | {"settings": kept["settings"] | {"late_qat": True}}, path)
    message = error_line(command("finish"), 1)
    assert "another version of this script" in message
    assert "late_qat" in message
    assert "artifact" not in message


def test_model_that_no_artifact_holds_is_not_trained(command, tmp_path, monkeypatch):
    """It could never be finished; the settings that make it large are named."""
    monkeypatch.setattr(train_gpt, "WEIGHTS_MAX", 20_000)
    monkeypatch.setattr(train_gpt, "train", None)
    message = error_line(command(), 2)
    assert message.startswith("MODEL_DIM, NUM_LAYERS: ")
    assert "19,000" in message
    assert not (tmp_path / "logs" / "run" / "weights.pt").exists()


@pytest.mark.parametrize("spare", [0, 1])
def test_largest_model_of_an_artifact_is_trained(command, finished, monkeypatch, spare):
    """Of that many weights and the mixer's, it is read back."""
    log = (finished / "run" / "train.log").read_text()
    count = int(re.search(r"model: ([0-9,]+) parameters", log)[1].replace(",", ""))
    monkeypatch.setattr(train_gpt, "WEIGHTS_MAX", count + 1000 - spare)
    assert command(QUANTIZER="int6")[0] == 2 * spare


def test_first_step_that_is_interrupted_leaves_nothing_to_divide_by(command, tmp_path, monkeypatch):
    """Before its clock is read there is no step; what has no steps is not offered to `finish`."""
    from_main = train_gpt.Runtime.from_main

    def interrupted(rt, value):
        if isinstance(value, float):
            raise KeyboardInterrupt("interrupted")
        return from_main(rt, value)

    monkeypatch.setattr(train_gpt.Runtime, "from_main", interrupted)
    message = error_line(command(), 1)
    assert "after step 0: interrupted" in message
    assert not (tmp_path / "logs" / "run" / "weights.pt").exists()


def test_nothing_to_finish_is_named(command):
    """With the setting that says which run is meant."""
    message = error_line(command("finish"), 1)
    assert message.startswith("RUN_ID: ")
    assert "no training to finish" in message
    assert "No such file" in message


def test_finish_takes_no_other_training_settings(command, monkeypatch):
    """The weights have theirs."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "calibrate", fail_with("setting"))
        error_line(command(), 1)
    assert error_line(command("finish", MODEL_DIM="64"), 2).startswith(
        "MODEL_DIM=64: the weights have 32; unset it"
    )


def test_room_for_the_weights_is_kept_while_training(command, tmp_path, monkeypatch):
    """Nobody can fill the disk in between; it is free when they are written, and not before."""
    rooms = []
    check_writable = train_gpt.check_writable
    save = torch.save
    write_atomically = train_gpt.write_atomically

    def watched(folder, need_bytes=0):
        rooms.append(check_writable(folder, need_bytes))
        return rooms[-1]

    def saved(contents, file):
        save(contents, file)
        assert file.tell() < sizes[-1]
        assert not rooms[-1].closed

    def written(*how):
        assert rooms[-1].closed
        write_atomically(*how)

    sizes = []
    monkeypatch.setattr(train_gpt, "check_writable", watched)
    monkeypatch.setattr(torch, "save", saved)
    monkeypatch.setattr(train_gpt, "write_atomically", written)
    at_step(2, lambda: sizes.append(os.fstat(rooms[-1].fileno()).st_size), monkeypatch)
    assert command() == (0, "")
    assert sizes


def test_full_log_disk_ends_nothing(command, monkeypatch):
    """The log's lines are lost, and nothing else."""
    report = train_gpt.Run.__init__

    def on_full_disk(self, *args):
        report(self, *args)
        self.files[1] = open("/dev/full", "w")  # noqa: SIM115

    monkeypatch.setattr(train_gpt.Run, "__init__", on_full_disk)
    assert command() == (0, "")


@pytest.mark.parametrize("tokens", ["0", "10000000000000"])
def test_any_length_of_proof(command, tokens):
    """More tokens than there are: all of them."""
    assert command(VERIFY_TOKENS=tokens) == (0, "")


@pytest.mark.slow
def test_closed_pipe_ends_nothing(corpus, tmp_path):
    """As with `| head -1`."""
    settings = {**clean_environment(), **corpus, "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=settings, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert results_of(tmp_path / "logs" / "run")["val_bpb"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_that_are_killed_lose_no_weights(corpus, tmp_path, number):
    """SIGTERM to torchrun, SIGKILL to a rank: rank 0 keeps the weights and says where they are."""
    settings = {**clean_environment(), **corpus, "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    settings |= {"ITERATIONS": "100000", "LOG_EVERY": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(ROOT / "train_gpt.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=settings, **pipes) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        os.kill(process.pid if number == signal.SIGTERM else rank_one(process.pid), number)
        process.stdout.close()
        lines = [line for line in process.stderr if line.startswith("error: ")]
    assert process.returncode
    assert len(lines) == 1
    assert "logs/run/weights.pt has the weights" in lines[0]
    assert (tmp_path / "logs" / "run" / "weights.pt").exists()
    assert no_leftovers(tmp_path)


def rank_one(launcher):
    """Return the process of rank 1 among the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environments = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children}
    (found,) = (c for c, e in environments.items() if b"\0RANK=1\0" in b"\0" + e)
    return int(found)


# ---- What a terminal shows -----------------------------------------------------------------------


def test_line_of_the_last_step_stays_on_a_terminal(command, on_terminal):
    """Those of the steps before it do not."""
    terminal = on_terminal()
    command(LOG_EVERY="1")
    steps = [row for row in terminal.rows() if row.startswith("step ")]
    assert [row.split("  ")[0] for row in steps] == ["step 4/4"]


def test_last_step_has_a_line_where_time_is_up(command, tmp_path, monkeypatch):
    """Wherever it falls between two lines of progress."""
    monkeypatch.setattr(train_gpt, "steps_left", lambda step, *_: 3.5 - step)
    assert command(LOG_EVERY="100") == (0, "")
    lines = (tmp_path / "logs" / "run" / "train.log").read_text().splitlines()
    steps = [line.split("  ")[0] for line in lines if line.startswith("step ")]
    assert steps == ["step 1/4", "step 3/4"]


@pytest.mark.parametrize("end", ENDS)
def test_error_in_training_has_rows_of_its_own(command, on_terminal, monkeypatch, end):
    """No row of progress is left beside it."""
    at_step(3, fail_with(end), monkeypatch)
    terminal = on_terminal()
    command(LOG_EVERY="1")
    rows = terminal.rows()
    assert [row for row in rows if row.startswith("error: after step 2: ")]
    assert "tokens/s" not in "".join(rows)


def test_table_stands_together_in_the_log(command, tmp_path):
    """Whatever progress stood between its rows on the way, and the budget comes after it."""
    assert command() == (0, "")
    lines = (tmp_path / "logs" / "run" / "train.log").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    assert [line.split(" ")[0] for line in lines[start:]] == [
        "stage",
        "pre_quant",
        "round_trip",
        "sliding",
        "mixer",
        "",
        "evaluation",
        "train",
    ]


def test_table_is_shown_where_the_proof_fails(command, tmp_path, monkeypatch):
    """The stages were scored."""
    monkeypatch.setattr(train_gpt, "verify", fail_with("setting"))
    assert "no such setting" in error_line(command(VERIFY_ENABLED="1"), 1)
    lines = (tmp_path / "logs" / "run" / "train.log").read_text().splitlines()
    assert lines[-1].startswith("train ")
