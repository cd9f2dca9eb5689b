"""The command for the day a GPU is there: its rehearsal, its arithmetic, its time limit."""

import contextlib
import dataclasses
import json
import operator
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    HERE,
    ROOT,
    clean_environment,
    no_leftovers,
    refusal,
    tiny_config,
    tiny_stream,
    write_shards,
)
from pretend import CUDA, pretended_device

import train_gpt

sys.path.insert(0, str(ROOT / "tests" / "experiments"))

import cuda_acceptance as acceptance

pytestmark = pytest.mark.usefixtures("one_core")
SMALL = dict(num_layers=2, ve_layers="1", xsa_last_n=1, ttt_freeze_blocks=1)
CFG = tiny_config(**SMALL)


# ---- Arithmetic ----------------------------------------------------------------------------------


def test_flops_by_hand():
    """6 x 10 for the parameters, 6 x 2 layers x 8 rows x width 4 for attention."""
    assert acceptance.flops_per_token(10, 2, 4, 8) == 60 + 384


def test_flops_of_attention_are_those_of_its_products():
    """Scores and values of a causal row: twice a multiplication and an addition, three passes."""
    layers, width, length = 3, 16, 64
    seen = length / 2
    forward = layers * (2 * seen * width + 2 * seen * width)
    assert acceptance.flops_per_token(0, layers, width, length) == 3 * forward


@pytest.mark.parametrize("gpus, share", [(1, 0.5), (8, 0.0625)])
def test_utilization_by_hand(gpus, share):
    """989 TFLOP/s are one H100's."""
    assert acceptance.utilization(1e6, 494.5e6, gpus) == pytest.approx(share)


@pytest.mark.parametrize("gpus, ranks", [(1, 1), (2, 2), (5, 4), (7, 6), (8, 8)])
def test_ranks_share_a_batch(gpus, ranks):
    """`record`'s 384 sequences split evenly over the ranks."""
    assert acceptance.ranks_that_share(gpus, 384) == ranks


def test_difference_by_hand():
    """In steps of 2^-8: one logit of four lies half a step off, and rounds to another integer."""
    a = torch.tensor([[1.0, 2.0], [3.0, 4.25 / 256]], dtype=torch.float64)
    b = a.clone()
    b[1, 1] += 0.5 / 256
    found = acceptance.difference(a, b)
    assert found["largest_steps"] == pytest.approx(0.5)
    assert found["mean_steps"] == pytest.approx(0.125)
    assert found["other_integers"] == 1
    assert found["expected_in_a_million_tokens"] == pytest.approx(0.125 * 2e6)


def test_difference_of_equal_logits_is_none():
    """Nothing differs from itself."""
    a = torch.randn(3, 5, dtype=torch.float64)
    found = acceptance.difference(a, a)
    assert (found["largest_steps"], found["other_integers"]) == (0, 0)


def test_codes_are_compared_by_all_their_parts(code_files, tmp_path):
    """Makers may differ; checks and words may not."""
    path = code_files("learned, no ttt", 20).path
    head, checks, words = train_gpt.CodeHead.unpack(path, path.read_bytes())
    other = tmp_path / "other"
    expected = dict(tokens=20, same_head=True, same_frequencies=True, same_words=True)
    other.write_bytes(head._replace(maker=b"another").pack(checks, words))
    assert acceptance.compare_codes(path, other) == expected
    other.write_bytes(head.pack([checks[0] ^ 1, *checks[1:]], words))
    assert acceptance.compare_codes(path, other) == expected | {"same_frequencies": False}
    other.write_bytes(head.pack(checks, bytes([words[0] ^ 1]) + words[1:]))
    assert acceptance.compare_codes(path, other) == expected | {"same_words": False}


def test_graphs_are_those_of_one_rank(tmp_path):
    """Each rank has a log of its own, and compiles the same."""
    for rank in range(2):
        line = 'V1 output_graph.py:1] {"dynamo_output_graph": {"sizes": {}}}\n'
        (tmp_path / f"trace_rank_{rank}_x.log").write_text(3 * line + '{"other": {}}\n')
    assert acceptance.count_graphs(tmp_path) == 3
    assert acceptance.count_graphs(tmp_path / "none") == 0


@pytest.mark.parametrize(
    "text, last",
    [
        ("a\nerror: no room\nx Error: later\n====\n", "error: no room"),
        (
            "[rank0]: RuntimeError: CUDA\nerrors.ChildFailedError:\n====\n",
            "[rank0]: RuntimeError: CUDA",
        ),
        ("first\nKilled\n\n", "Killed"),
        ("", "nothing was printed"),
    ],
)
def test_last_line_is_the_reason(tmp_path, text, last):
    """What the program says, else Python's exception, else the end of the log."""
    path = tmp_path / "log"
    path.write_text(text)
    assert acceptance.last_line(path) == last


def test_figures_of_a_run_that_was_cut():
    """Training's figures are there without stages; nothing is there before training's end."""
    results = dict(train=None, stages=[])
    assert "mfu" not in acceptance.run_figures(results, CFG, 1)
    train = dict(steps=4, tokens=400, seconds=2.0, warmup_seconds=1.0, calibration_seconds=0.0)
    figures = acceptance.run_figures(dict(train=train, stages=[]), CFG, 2)
    assert (figures["tokens_per_second"], figures["ms_a_step"]) == (200, 500)
    assert figures["parameters"] == sum(p.numel() for p in train_gpt.GPT(CFG).parameters())
    flops = 6 * figures["parameters"] + 6 * CFG.num_layers * CFG.train_seq_len * CFG.model_dim
    assert figures["mfu"] == pytest.approx(200 * flops / (2 * 989e12))


# ---- Steps, verdicts, time -----------------------------------------------------------------------


class Ticking:
    """A clock's time, moved by hand."""

    now = 0.0

    def __call__(self):
        """Return the time."""
        return self.now


def fail(figures):
    """A step that notes a figure and finds a fault."""
    figures["seen"] = 1
    raise acceptance.FailedError("two\nlines")


def skip(figures):
    """A step that this machine cannot do."""
    raise acceptance.NotTriedError("no CUDA")


def crash(figures):
    """A step with a mistake of its own."""
    return figures["missing"]


def taken(steps, clock=None):
    """Return (results, how many steps were on disk at each write) of some steps."""
    results = {"steps": {}}
    writes = []
    clock = clock or acceptance.Clock(60)
    acceptance.run_steps(steps, clock, results, lambda: writes.append(len(results["steps"])))
    return results, writes


def test_verdicts_and_status(capsys):
    """A step that fails stops no later one, keeps its figures, and decides the status."""
    steps = dict(good=lambda figures: "fine", bad=fail, odd=crash, no=skip, last=lambda _: "done")
    results, writes = taken(steps)
    verdicts = [entry["verdict"] for entry in results["steps"].values()]
    assert verdicts == ["ok", "FAILED", "FAILED", "not tried", "ok"]
    assert results["steps"]["bad"]["says"] == "two lines"
    assert results["steps"]["bad"]["figures"] == {"seen": 1}
    assert writes == [1, 2, 3, 4, 5]
    assert acceptance.summary(results) == ("2 ok, 2 FAILED, 1 not tried", 1)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        *("fine", "lines", "'missing'", "CUDA", "done")
    ]


def test_what_was_not_tried_is_no_failure():
    """Status 0 if no step failed."""
    results, _ = taken(dict(good=lambda figures: "fine", no=skip))
    assert acceptance.summary(results) == ("1 ok, 0 FAILED, 1 not tried", 0)


def test_no_step_begins_after_the_limit():
    """The rest is not tried, and says that time is why."""
    now = Ticking()
    clock = acceptance.Clock(100, now)

    def slow(figures):
        now.now += 97
        return f"{clock.left():.0f} s left"

    results, _ = taken(dict(slow=slow, late=fail), clock)
    late = results["steps"]["late"]
    assert results["steps"]["slow"]["says"] == "3 s left"
    assert (late["verdict"], late["says"], late["figures"]) == ("not tried", "time", {})


def test_interruption_is_written():
    """Ctrl-C ends the command; the step says so, with the figures that it had."""
    results = {"steps": {}}
    writes = []

    def interrupted(figures):
        figures["half"] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clock = acceptance.Clock(60)
        acceptance.run_steps({"one": interrupted}, clock, results, lambda: writes.append(1))
    assert results["steps"]["one"]["says"] == "interrupted"
    assert results["steps"]["one"]["figures"] == {"half": 1}
    assert writes == [1]


def new_acceptance(folder, limit_s=60.0, **environ):
    """Return the steps of a rehearsal."""
    environ = clean_environment() | environ
    return acceptance.Acceptance(environ, folder, acceptance.Clock(limit_s), rehearse=True)


PYTHON = [sys.executable, "-c"]
SLEEP = "import subprocess, sys; subprocess.run(['sleep', '60'])"


@pytest.mark.parametrize(
    "most_s, kind, why",
    [
        (2.0, acceptance.NotTriedError, "time; cut after"),
        (0.5, acceptance.FailedError, "not done after"),
    ],
)
def test_a_process_ends_at_its_limit(tmp_path, most_s, kind, why):
    """With all that it has started: no time is no failure, a process that hangs is one."""
    start_s = time.perf_counter()
    steps = new_acceptance(tmp_path, 1.0)
    assert why in refusal(steps.run, "nap", [*PYTHON, SLEEP], {}, most_s, kind=kind)
    assert time.perf_counter() - start_s < 10


START = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("seconds", ["0", "60"])
def test_no_process_outlives_its_command(tmp_path, seconds):
    """Not even deaf to SIGTERM in its own session, whether the command ends or is ended."""
    with contextlib.suppress(acceptance.FailedError):
        new_acceptance(tmp_path).run("start", [*PYTHON, START, seconds], {}, most_s=3.0)
    child = acceptance.last_line(tmp_path / "start.log")
    assert is_over(child)


def is_over(pid):
    """Return whether a process has ended; it may be a zombie, if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_process_that_fails_says_why(tmp_path):
    """Its last error, its status and its log."""
    command = [*PYTHON, "print('error: no room'); print('x'); raise SystemExit(3)"]
    message = refusal(new_acceptance(tmp_path).run, "try", command, {}, kind=acceptance.FailedError)
    assert message == f"error: no room (exit status 3; see {tmp_path / 'try.log'})"


def test_a_record_run_that_is_cut_keeps_its_figures(tmp_path, monkeypatch):
    """No time is no failure, and what training has shown is in the JSON."""
    steps = new_acceptance(tmp_path)
    train = dict(steps=4, tokens=400, seconds=2.0, warmup_seconds=1.0, calibration_seconds=0.0)

    def run(*_, **__):
        (tmp_path / "record").mkdir()
        results = dict(train=train, stages=[])
        train_gpt.write_object(tmp_path / "record" / "results.json", results)
        (tmp_path / "record.log").write_text("attention: one\nstep 1\n")
        raise acceptance.NotTriedError("time")

    monkeypatch.setattr(steps, "run", run)
    figures = {}
    assert refusal(steps.record, figures, kind=acceptance.NotTriedError) == "time"
    assert (figures["ms_a_step"], figures["warmup_seconds"]) == (500, 1.0)
    assert figures["notes"] == ["attention: one"]


def test_memory_of_each_gpu_is_watched(tmp_path, monkeypatch):
    """The most that nvidia-smi has shown, once a second."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/used\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "used").write_text("300\n20\n")
    with acceptance.MemoryWatch() as memory:
        time.sleep(1.3)
        (tmp_path / "used").write_text("100\n40\n")
        time.sleep(1.2)
    assert memory.peaks == [300, 40]


def test_settings_of_the_user_that_count(tmp_path):
    """Places, vocabulary and seed do; others would make another model."""
    given = dict(
        DATA_PATH="d", VOCAB_SIZE="400", ITERATIONS="9", RUN_ID="mine", RANK="1", OTHER="x"
    )
    base = new_acceptance(tmp_path, **given).base
    assert {name: base.get(name) for name in given} == given | dict.fromkeys(
        ("ITERATIONS", "RUN_ID", "RANK")
    )
    assert (base["DEVICE"], base["LOG_DIR"]) == ("cpu", str(tmp_path))


# ---- Usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["ten"], ["0"], ["-1"], ["nan"], ["inf"], ["1", "2"], ["--fast"]])
def test_bad_usage_is_one_line(args, capsys):
    """With the usage, and status 2."""
    assert acceptance.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: usage: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "args, device, expected",
    [
        ([], "", (30, False)),
        (["5"], "cuda", (5, False)),
        (["--rehearse"], "", (30, True)),
        (["2.5"], "cpu", (2.5, True)),
        (["--rehearse", "7"], "cuda", (7, True)),
    ],
)
def test_usage(args, device, expected):
    """Minutes, and whether nothing but the CPU is used."""
    assert acceptance.parse(args, {"DEVICE": device}) == expected


def test_no_gpu_is_one_line(monkeypatch):
    """Nothing is begun without a GPU that was not to be rehearsed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refusal(acceptance.check_machine, CFG, False, kind=train_gpt.UsageError)
    assert message == "torch sees no CUDA device; --rehearse needs none"


def test_no_shards_are_one_line(tmp_path):
    """DATA_PATH and TOKENIZER_PATH are looked at before the first step."""
    cfg = dataclasses.replace(CFG, data_path=str(tmp_path), tokenizer_path=str(tmp_path / "t"))
    assert refusal(acceptance.check_machine, cfg, True).startswith("DATA_PATH: no fineweb_train_")
    for split in ("train", "val"):
        write_shards(tmp_path, [tiny_stream(50)], split=split)
    assert refusal(acceptance.check_machine, cfg, True).startswith("TOKENIZER_PATH: cannot read")


# ---- Measures, on a pretended device -------------------------------------------------------------


class Eager(train_gpt.Runtime):
    """A Runtime that compiles nothing."""

    def compiled(self, function):
        """Return the function."""
        return function


@pytest.fixture
def on_device(monkeypatch, tmp_path):
    """What a measure works with on a pretended device: cfg with shards, rt, figures."""
    for split in ("train", "val"):
        write_shards(tmp_path, [tiny_stream(700)], split=split)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setenv("SMALL_ARTIFACT", str(tmp_path / "none"))
    cfg = dataclasses.replace(CFG, data_path=str(tmp_path))
    figures = acceptance.Figures(tmp_path / "figures.json")
    with pretended_device():
        rt = Eager(device=CUDA, notes=("attention: none",))
        yield SimpleNamespace(cfg=cfg, rt=rt, figures=figures)
    train_gpt.exp_table.cache_clear()


def test_noise_is_measured_across_devices(on_device):
    """The pretended device computes on the CPU: two cuts differ by rounding, two devices not."""
    acceptance.measure_noise(on_device.cfg, on_device.rt, on_device.figures)
    parts = train_gpt.read_object(on_device.figures.path)["record_shapes"]
    assert parts["device_and_cpu"]["largest_steps"] == 0
    assert 0 < parts["two_cuts"]["largest_steps"] < acceptance.MOST_NOISE_STEPS
    assert parts["two_cuts"]["rows"] == 4 * on_device.cfg.eval_stride
    assert parts["two_cuts"]["largest_logit"] > 3


def test_passes_are_timed(on_device, monkeypatch):
    """Each number of tiles has a rate and its memory."""
    monkeypatch.setitem(train_gpt.ROWS_AT_ONCE, "cuda", 64)
    acceptance.measure_passes(on_device.cfg, on_device.rt, on_device.figures, "1,4", "2")
    assert list(on_device.figures) == ["1", "4"]
    assert [part["rows"] for part in on_device.figures.values()] == [3 * 2 * 8, 3 * 2 * 32]
    assert all(part["rows_per_second"] > 0 for part in on_device.figures.values())


def test_optimizer_is_timed(on_device):
    """Muon is a part of what follows the gradient."""
    acceptance.measure_optimizer(on_device.cfg, on_device.rt, on_device.figures, "1", "2")
    assert on_device.figures["muon_ms"] > 0
    assert on_device.figures["ms_a_step"] > 0


def test_a_missing_kernel_is_not_tried():
    """Without FlashAttention-3, the runtime's own reason is given."""
    rt = train_gpt.Runtime(notes=("attention: torch's FlashAttention; no FlashAttention-3: why",))
    kind = acceptance.NotTriedError
    assert refusal(acceptance.attention_choice, "FA3", rt, kind=kind) == rt.notes[-1]


@pytest.fixture
def torch_2_9(monkeypatch):
    """Take from torch the choice of a FlashAttention, which version 2.9 does not have."""
    for action in ("activate", "current", "restore"):
        name = f"{action}_flash_attention_impl"
        monkeypatch.delattr(torch.nn.attention, name, raising=False)


@pytest.mark.usefixtures("torch_2_9")
def test_torch_2_9_has_no_flash_attention_3():
    """The step is not tried, and says why."""
    rt = train_gpt.Runtime(notes=("attention: why",))
    kind = acceptance.NotTriedError
    assert refusal(acceptance.attention_choice, "FA3", rt, kind=kind) == "attention: why"


@pytest.mark.usefixtures("torch_2_9")
@pytest.mark.parametrize("kernel", ["flash", "cuDNN"])
def test_torch_2_9_chooses_other_kernels(kernel):
    """By the same switches as later versions."""
    with acceptance.attention_choice(kernel, HERE):
        assert torch.backends.cuda.flash_sdp_enabled() == (kernel == "flash")


@pytest.mark.parametrize("kernel", ["default", "flash", "cuDNN"])
def test_kernels_are_chosen(kernel):
    """By torch's own switches, which are as before afterwards."""
    switches = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled
    before = [switch() for switch in switches]
    with acceptance.attention_choice(kernel, HERE):
        inside = [switch() for switch in switches]
    assert inside == {"flash": [True, False], "cuDNN": [False, True]}.get(kernel, before)
    assert [switch() for switch in switches] == before


# ---- The rehearsal -------------------------------------------------------------------------------

STEPS = [
    *("training", "integers", "noise", "proof", "proof_across", "passes", "record"),
    *("record_across", "attention_default", "attention_FA3", "attention_flash"),
    *("attention_cuDNN", "optimizer"),
]
NOT_ON_A_CPU = {"attention_FA3", "attention_flash", "attention_cuDNN"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer, texts):
    """Settings that name shards of a few documents and their tokenizer."""
    path, sp, _ = tokenizer
    folder = tmp_path_factory.mktemp("corpus")
    tokens = [[sp.bos_id(), *ids] for ids in sp.encode(sorted(texts, key=len)[-12:])]
    for split, documents in (("val", tokens[:2]), ("train", tokens[2:])):
        write_shards(folder, [[t for ids in documents for t in ids]], split=split)
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(path), VOCAB_SIZE="400")


def test_artifact_of_random_weights_takes_the_place(corpus, tmp_path, monkeypatch):
    """Where training fails, later steps have an artifact, and the verdict is training's own."""
    steps = new_acceptance(tmp_path, **corpus)

    def run(*_):
        raise acceptance.FailedError("no compiler")

    monkeypatch.setattr(steps, "run", run)
    message = refusal(steps.training, {}, kind=acceptance.FailedError)
    assert message == "no compiler"
    artifact = train_gpt.read_artifact(steps.artifact)
    assert artifact.settings["ttt_chunk_tokens"] == 128
    assert artifact.weights["blocks.0.mlp_out"].std() > 0


@pytest.mark.parametrize("args, preset", [([], "record"), (["--rehearse"], "demo")])
def test_small_model_has_the_data_that_was_checked(args, preset, tmp_path, monkeypatch):
    """Those where `record` looks; in a rehearsal, the demo's."""
    given = {"VOCAB_SIZE": "400", "LOG_DIR": str(tmp_path)}
    trained = []

    def run(steps, step, command, settings):
        environ = {name: str(value) for name, value in settings.items()}
        trained.append(train_gpt.config_from_env(steps.base | environ))
        raise acceptance.NotTriedError("only its settings are of interest")

    monkeypatch.setattr(acceptance, "check_machine", lambda cfg, rehearse: None)
    monkeypatch.setattr(acceptance.Acceptance, "run", run)
    monkeypatch.setattr(acceptance.Acceptance, "steps", lambda self: {"training": self.training})
    acceptance.accept(args, clean_environment() | given)
    expected = train_gpt.config_from_env({"PRESET": preset, **given})
    data = operator.attrgetter("data_path", "tokenizer_path", "vocab_size")
    assert [data(cfg) for cfg in trained] == [data(expected)]


def test_settings_on_a_gpu_are_possible():
    """Those of the small model and of `record`; in the proof, two TTT updates are crossed."""
    for settings in (acceptance.GPU_SCALE.small, acceptance.GPU_SCALE.record):
        environ = {name: str(value) for name, value in settings.items()}
        cfg = train_gpt.config_from_env({**environ, "DEVICE": "cuda"})
    assert cfg == dataclasses.replace(
        train_gpt.Config(), device="cuda", val_tokens=131_072, log_every=20
    )
    for scale in (acceptance.GPU_SCALE, acceptance.REHEARSAL_SCALE):
        assert scale.small["VAL_TOKENS"] > 2 * scale.small["TTT_CHUNK_TOKENS"]


@pytest.mark.slow
def test_a_measure_says_why_it_is_not_tried(corpus, tmp_path):
    """From another process: what its machine lacks, or how it failed."""
    steps = new_acceptance(tmp_path, **corpus)
    message = refusal(
        *(steps.measure, "try", {}, "attention", "FA3", 1, 1), kind=acceptance.NotTriedError
    )
    assert message == "attention: plain products"
    message = refusal(*(steps.measure, "err", {}, "passes", "x", 1), kind=acceptance.FailedError)
    assert message.startswith("error: ValueError: invalid literal for int()")


@pytest.mark.slow
def test_rehearsal(corpus, tmp_path):
    """All steps in miniature, with every figure in the JSON."""
    env = clean_environment() | corpus | dict(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    command = ["bash", str(ROOT / "tests" / "cuda_acceptance.sh"), "--rehearse", "10"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    print(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    first, *lines, last = result.stdout.splitlines()
    (path,) = (tmp_path / "logs").glob("*/acceptance.json")
    assert first == f"figures: {path}"
    assert [line[11:].split()[0] for line in lines] == STEPS
    assert last.startswith("10 ok, 0 FAILED, 3 not tried, in ")
    results = json.loads(path.read_text())
    assert (results["status"], results["rehearsal"], results["minutes"]) == (0, True, 10)
    assert list(results["steps"]) == STEPS
    for name, entry in results["steps"].items():
        expected = ("not tried", "no CUDA") if name in NOT_ON_A_CPU else ("ok", entry["says"])
        assert (entry["verdict"], entry["says"]) == expected
    figures = {name: entry["figures"] for name, entry in results["steps"].items()}
    check_figures(figures)
    assert no_leftovers(tmp_path)


def check_figures(figures):
    """Assert that the figures of a rehearsal's steps are there and make sense."""
    assert figures["integers"]["here_decoded_there"]
    assert figures["integers"]["there_decoded_here"]
    assert figures["integers"]["tokens"] > 100
    assert set(figures["noise"]) == {"record_shapes", "small_artifact"}
    assert figures["proof"]["ttt_updates"] == 2
    assert figures["proof"]["tokens"] == 300
    assert figures["proof_across"]["bytes"] > figures["record_across"]["bytes"] > 50
    assert set(figures["passes"]) == {"1", "2"}
    record = figures["record"]
    assert {"mfu", "ms_a_step", "tokens_per_second", "warmup_seconds", "calibration_seconds"} <= {
        *record
    }
    assert [stage["name"] for stage in record["stages"]][-2:] == ["ttt", "mixer"]
    assert record["mixer_gain_bpb"] != 0
    assert record["proof"]["tokens"] == 50
    assert record["compiled_graphs"] == 0
    assert any(note.startswith("attention: ") for note in record["notes"])
    assert figures["attention_default"]["ms_a_step"] > 0
    assert figures["attention_default"]["attention_kernels"]
    assert figures["optimizer"]["muon_ms"] > 0
