"""What surrounds the program: torchrun's variables, threads, packages, encodings, files."""

import contextlib
import ctypes
import os
import pathlib
import runpy
import socket
import stat
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TABLE, error_line, refusal, tiny_config
from torch.torch_version import TorchVersion

import train_gpt
from train_gpt import (
    TORCHRUN,
    UsageError,
    check_arithmetic,
    check_target,
    check_writable,
    read_file,
    say,
    torchrun_ranks,
    write_atomically,
)

ALL_SET = dict.fromkeys(TORCHRUN, "1") | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
ALL_SET |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

# ---- Ranks ---------------------------------------------------------------------------------------


def test_ranks_are_those_of_torchrun():
    """All of its variables are there."""
    assert torchrun_ranks(ALL_SET) == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "stray", [{}, {"RANK": "1"}, {"RANK": "abc"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}]
)
def test_stray_rank_does_not_count(stray):
    """What a shell or another launcher has left there is no rank."""
    assert torchrun_ranks(stray) == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ALL_SET)
def test_lone_rank_where_one_variable_is_missing(name):
    """Torchrun sets all."""
    assert torchrun_ranks({n: v for n, v in ALL_SET.items() if n != name}) == [0, 1, 0, 1]


@pytest.mark.parametrize("value", ["", "abc", "1.5"])
@pytest.mark.parametrize("name", TORCHRUN)
def test_rank_that_is_no_number_is_refused(name, value):
    """The message has the variable and what is wrong."""
    message = refusal(torchrun_ranks, {**ALL_SET, name: value}, kind=UsageError)
    assert name in message
    assert repr(value) in message


def test_stray_rank_mutes_no_error(command_line):
    """RANK=1 without torchrun is a run of one's own, which says what is wrong."""
    message = error_line(command_line("compress", RANK="1", WORLD_SIZE="2"), 2)
    assert "compress" in message


# ---- Threads, arithmetic -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, threads",
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.max": ""}, 8),
    ],
)
def test_threads_are_what_the_control_group_allows(tmp_path, monkeypatch, files, threads):
    """Without a limit torch's own number stands."""
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(train_gpt, "Path", lambda *parts: tmp_path / pathlib.Path(*parts).name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert train_gpt.count_threads() == threads


@pytest.mark.slow
def test_threads_of_a_run_are_those_of_omp_num_threads():
    """The user's own number is not overruled."""
    code = "import train_gpt; print(train_gpt.count_threads())"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True)
    assert done.stdout == b"1\n"


@pytest.mark.parametrize("factor", [np.nan, 2.0])
def test_broken_product_is_named(monkeypatch, factor):
    """A library that multiplies wrongly stops the run before any work."""
    product = torch.Tensor.__matmul__

    def broken(x, y):
        result = product(x, y)
        result[100:] *= factor
        return result

    rt = train_gpt.Runtime(dtype=torch.bfloat16)
    check_arithmetic(rt)
    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    message = refusal(check_arithmetic, rt)
    assert "bfloat16" in message
    assert "OMP_THREAD_LIMIT" in message


# ---- Packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package, contents",
    [
        ("numpy", "raise ImportError('no such package')"),
        ("torch", "raise ImportError('no such package')"),
        ("torch", "__version__ = '1.0'"),
        ("torch", "raise OSError('libcudart.so.12: cannot open shared object file')"),
    ],
)
def test_missing_or_old_package_is_one_line(tmp_path, package, contents):
    """As of a torch without its parts."""
    (tmp_path / f"{package}.py").write_text(contents)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train_gpt.py", "--help"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    message = error_line((done.returncode, done.stderr), 1)
    assert "pip install" in message


@pytest.mark.parametrize("version", ["1.13.1", "2.8.0+cu128", "2.8.1"])
def test_old_torch_is_one_line(monkeypatch, version):
    """It has all that is imported, and would fail much later."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(train_gpt.__file__)
    assert caught.value.code == (
        f"error: torch {version} is too old; pip install -r requirements.txt"
    )


@pytest.mark.parametrize("version", ["2.9.0a0+50eac81", "2.9.1", "2.10.0", "2.13.0+cpu", "10.0"])
def test_torch_from_2_9_on_will_do(monkeypatch, version):
    """Versions are compared as numbers, and a vendor's early build of 2.9 is one of 2.9."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert runpy.run_path(train_gpt.__file__)["torch"] is torch


def test_missing_sentencepiece_is_one_line(command_line, monkeypatch, tmp_path):
    """It is imported late."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "a.txt").write_text("one\n\n" * 3000)
    settings = {"TOKENIZER_PATH": "none.model", "PRESET": "bench"}
    message = error_line(command_line("tokenize", "out", "a.txt", **settings), 1)
    assert "sentencepiece" in message
    assert "pip install" in message


# ---- What is said --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_lines_are_written_in_any_encoding(encoding):
    """What the encoding of the terminal lacks is spelled out."""
    word = "Gr\u00fc\u00dfe \u4e16\u754c caf\udce9"
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, ROOT / "train_gpt.py", word]
    done = subprocess.run(command, env=environ, capture_output=True, check=False)
    assert done.returncode == 2
    assert repr(word).encode(encoding, "backslashreplace") in done.stderr


def test_full_disk_ends_nothing():
    """What cannot be written is passed over."""
    file = open("/dev/full", "w")  # noqa: SIM115
    say("a line", file)
    with contextlib.suppress(OSError):
        file.close()


def test_closed_file_ends_nothing(tmp_path):
    """As when a log was closed."""
    with open(tmp_path / "log", "w") as file:
        pass
    say("a line", file)
    assert (tmp_path / "log").read_bytes() == b""


def test_missing_stdout_ends_nothing(monkeypatch):
    """As with >&- in a shell."""
    monkeypatch.setattr(sys, "stdout", None)
    say("a line")


def test_progress_takes_one_row_of_a_terminal(on_terminal):
    """Each line of it, and then another line, takes the place of the one before."""
    terminal = on_terminal()
    for line in ("a line", "step 1 of 2\r", "step 2\r", "end", "another line"):
        say(line)
    assert terminal.rows() == ["a line", "end", "another line", ""]


def test_line_after_an_interruption_begins_in_the_first_column(on_terminal):
    """Where the terminal has shown ^C."""
    terminal = on_terminal()
    say("step 1 of 2\r")
    terminal.file.write("^C")
    say("end")
    assert terminal.rows() == ["end", ""]


def test_progress_is_cut_to_the_width_of_a_terminal(on_terminal):
    """A row that it would wrap to would stay."""
    terminal = on_terminal(columns=10)
    for line in ("0123456789abc\r", "0123456789\r", "end"):
        say(line)
    assert terminal.rows() == ["end", ""]


def test_other_lines_are_shown_in_full(on_terminal):
    """They wrap."""
    terminal = on_terminal(columns=10)
    say("0123456789abc")
    assert terminal.rows() == ["0123456789", "abc", ""]


def test_error_does_not_begin_on_a_line_of_progress(on_terminal):
    """Both are on one terminal, by stdout and by stderr."""
    terminal = on_terminal()
    say("step 1 of 2, with more of it\r")
    say("error: no", sys.stderr)
    assert terminal.rows() == ["error: no", ""]


def test_file_keeps_every_line_of_progress(tmp_path):
    """Without control characters."""
    with open(tmp_path / "log", "w") as file:
        for line in ("step 1\r", "step 2\r", "end"):
            say(line, file)
    assert (tmp_path / "log").read_bytes() == b"step 1\nstep 2\nend\n"


def test_pipe_keeps_every_line_of_progress(capfd):
    """As with `| tee`."""
    for line in ("step 1\r", "step 2\r", "end"):
        say(line)
    assert capfd.readouterr().out == "step 1\nstep 2\nend\n"


def test_closed_stderr_does_not_spoil_stdout(monkeypatch, capfd):
    """As with 2>&-: what is meant for the one does not end up in the bytes of the other."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "no such command"])
    monkeypatch.setattr(sys, "stderr", None)
    assert train_gpt.main() == 2
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["/dev/full", "a closed pipe"])
def test_dead_stdout_does_not_change_the_status(stdout):
    """What was asked for was done, though nobody hears of it."""
    if stdout == "/dev/full":
        target = open(stdout, "wb")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        target = os.fdopen(writer, "wb")
    with target:
        command = [sys.executable, ROOT / "train_gpt.py", "--help"]
        done = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- Files ---------------------------------------------------------------------------------------


def read_fifo(path):
    """Return (thread, list) of a reader of the FIFO at `path`."""
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()))
    thread.start()
    return thread, found


def test_fifo_is_written_through(tmp_path):
    """Its reader gets the bytes, and it stays a FIFO; a check does not open it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    check_target(tiny_config(), path, "in")
    thread, found = read_fifo(path)
    write_atomically(path, b"bytes")
    thread.join()
    assert found == [b"bytes"]
    assert stat.S_ISFIFO(os.stat(path).st_mode)


def test_device_is_written_through():
    """As /dev/null, which nothing replaces; a full one is named."""
    before = os.stat("/dev/null")
    write_atomically("/dev/null", b"bytes")
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert after.st_ino == before.st_ino
    assert "/dev/full" in refusal(write_atomically, "/dev/full", b"bytes")


@pytest.mark.parametrize("exists", [True, False])
def test_link_is_written_through(tmp_path, exists):
    """The link stays, and what it points to has the new bytes."""
    if exists:
        (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_permissions_carry_over(tmp_path, mode):
    """A file is no more open than the one it was made of."""
    (tmp_path / "in").write_bytes(b"in")
    (tmp_path / "in").chmod(mode)
    write_atomically(tmp_path / "out", b"out", tmp_path / "in")
    assert stat.S_IMODE(os.stat(tmp_path / "out").st_mode) == mode


@pytest.mark.parametrize(
    "name, kind",
    [
        ("folder", UsageError),
        ("", UsageError),
        ("none/out", train_gpt.UserError),
        ("x" * 300, train_gpt.UserError),
    ],
)
def test_bad_target_is_named_before_work(tmp_path, monkeypatch, name, kind):
    """A folder, no name, a missing folder, a name that is too long: nothing is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert name in refusal(check_target, tiny_config(), name, "in", kind=kind)
    assert os.listdir(tmp_path) == ["folder"]


def test_target_that_is_there_stays_unless_asked_for(tmp_path):
    """REPLACE=1 is named as the way out, and is one."""
    target = tmp_path / "out"
    target.write_bytes(b"old")
    message = refusal(check_target, tiny_config(), target, "in", kind=UsageError)
    assert "REPLACE=1" in message
    check_target(tiny_config(replace=True), target, "in")
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["in", "./in", "link", "hard link"])
def test_target_that_is_read_is_refused(tmp_path, monkeypatch, name):
    """Also under another name, and also with REPLACE=1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(b"original")
    (tmp_path / "link").symlink_to("in")
    os.link(tmp_path / "in", tmp_path / "hard link")
    cfg = tiny_config(replace=True)
    assert "is read" in refusal(check_target, cfg, name, "other", "in", kind=UsageError)
    assert (tmp_path / "in").read_bytes() == b"original"


def test_streams_are_dashes(capfdbinary):
    """Bytes go to standard output, lines about them to standard error."""
    log = check_target(tiny_config(), "-", "in")
    log("a line")
    write_atomically("-", b"\0\xff")
    assert capfdbinary.readouterr() == (b"\0\xff", b"a line\n")


@pytest.mark.parametrize("kind", ["file", "socket"])
def test_standard_input_is_read_where_it_stands(tmp_path, kind):
    """What another program has taken from it is gone; a socket cannot be opened by a name."""
    (tmp_path / "in").write_bytes(b"taken, left")
    ours, theirs = socket.socketpair()
    with open(tmp_path / "in", "rb", buffering=0) as file, ours, theirs:
        file.seek(len(b"taken, "))
        ours.sendall(b"left")
        ours.shutdown(socket.SHUT_WR)
        source = file if kind == "file" else theirs
        before = os.dup(0)
        os.dup2(source.fileno(), 0)
        try:
            assert read_file("-") == b"left"
        finally:
            os.dup2(before, 0)
            os.close(before)


def test_no_limit_is_asked_for_that_an_older_allocator_refuses(monkeypatch):
    """A refused threshold is worse than none: every larger tensor would be mapped anew."""
    calls = {}
    library = SimpleNamespace(mallopt=calls.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    train_gpt.start_runtime(tiny_config(device="cpu"), {})
    assert calls.get(-3, 0) <= 32 << 20  # M_MMAP_THRESHOLD
    assert calls[-4] == 0  # M_MMAP_MAX


def test_room_is_taken_and_given_back(tmp_path):
    """Nobody else can fill it, and nothing of it is left."""
    with check_writable(tmp_path / "run", 1 << 20) as room:
        assert os.fstat(room.fileno()).st_blocks * 512 >= 1 << 20
    assert os.listdir(tmp_path / "run") == []


def test_folder_is_locked_once(tmp_path):
    """A second run in it is refused, as long as the first one is there."""
    run = tiny_config(log_dir=str(tmp_path)), train_gpt.Runtime(notes=("cpu",)), "train"
    first = train_gpt.Run(*run)
    assert "RUN_ID" in refusal(train_gpt.Run, *run)
    first.lock.close()
    train_gpt.Run(*run).lock.close()


def test_missing_file_is_named(tmp_path):
    """With the setting and what to do."""
    missing = tmp_path / "no"
    why = "(No such file or directory)"
    assert refusal(read_file, missing) == f"cannot read {missing} {why}"
    assert refusal(read_file, missing, "NAME: missing; do") == f"NAME: missing; do {why}"


# ---- compress and decompress ---------------------------------------------------------------------


@pytest.fixture
def coded(code_files):
    """(path of a small code file, its text, settings to decode it)."""
    file = code_files("none, no ttt", 40)
    return file.path, TABLE.decode(file.tokens), {"ARTIFACT_PATH": file.cfg.artifact_path}


def test_decompress_finds_a_bad_target_before_work(coded, command_line, monkeypatch, tmp_path):
    """The decoder is not even made."""
    path, _, settings = coded
    monkeypatch.setattr(train_gpt, "Codec", None)
    message = error_line(command_line("decompress", path, "none/out", **settings), 1)
    assert "none/out" in message


def test_decompress_replaces_only_if_asked(coded, command_line, tmp_path):
    """REPLACE=1 asks."""
    path, text, settings = coded
    (tmp_path / "out").write_bytes(b"old")
    assert "REPLACE=1" in error_line(command_line("decompress", path, "out", **settings), 2)
    assert (tmp_path / "out").read_bytes() == b"old"
    assert command_line("decompress", path, "out", **settings, REPLACE="1") == (0, "")
    assert (tmp_path / "out").read_bytes() == text


def test_decompress_does_not_write_over_what_it_reads(coded, command_line, tmp_path):
    """Neither the code nor the artifact."""
    path, _, settings = coded
    for target in (path, settings["ARTIFACT_PATH"]):
        before = pathlib.Path(target).read_bytes()
        result = command_line("decompress", path, target, **settings, REPLACE="1")
        assert "is read" in error_line(result, 2)
        assert pathlib.Path(target).read_bytes() == before


@pytest.mark.slow
def test_decompress_is_a_filter(coded):
    """From standard input to standard output, which gets nothing else."""
    path, text, settings = coded
    environ = {**os.environ, **settings, "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_gpt.py", "decompress", "-", "-"]
    done = subprocess.run(
        command, input=path.read_bytes(), env=environ, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, text)
