"""What only a GPU can show, in one command and within a time limit.

    bash tests/cuda_acceptance.sh [minutes]     (default 30) on all GPUs that torch sees
    bash tests/cuda_acceptance.sh --rehearse    in miniature on the CPU; DEVICE=cpu does the same

Shards and tokenizer are those of DATA_PATH and TOKENIZER_PATH, by default where train_gpt.py looks;
one shard of each split is enough (64 MB). A rehearsal without them makes those of the demo.
VOCAB_SIZE, SEED and LOG_DIR count too; other settings in the environment do not. Each step prints
one line: ok, FAILED or "not tried" (which this machine cannot do, or for which no time is left).
All figures go to one JSON file, rewritten after every step; each step's output is in a log beside
it. Status: 0 if no step FAILED, 1 if one did, 2 after bad usage, 130 after Ctrl-C.

    training            a small model through the real command; later steps use its artifact
    integers            code files of one text by two devices; each decodes the other's
    noise               float64 logits against the grid they are rounded to: two cuts, two devices
    proof               `verify` past two TTT updates: coder and decoder are two processes
    proof_across        the other device decodes that proof, with the same TTT updates
    passes              rows a second in float64 at record's shapes, by EVAL_RUN_TILES; memory
    record              a short record run with torchrun: speed, memory, all stages, the proof
    record_across       the other device decodes that run's proof
    attention_*         a training step's time by attention kernel, and the kernel that really ran
    optimizer           what follows the gradient, alone

The other device is the CPU; in a rehearsal, the CPU without its vector units.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
from train_gpt import torch  # noqa: E402 (if it is missing, the script says so)

SCRIPT = train_gpt.__file__
LEAST_S = 5.0  # a step is not begun with less time than this
KILL_AFTER_S = 20.0  # from a polite signal to a kill
COMMAND_ID = "ACCEPTANCE_COMMAND_ID"  # variable by which all that a command starts is known
MOST_S = 540.0  # of a command (but `record`); one that takes longer hangs
RECORD_SHARE = 0.4  # of the limit, at most, for training in `record`
H100_FLOPS = 989e12  # of a second, bfloat16 with dense matrices, as NVIDIA gives them
MOST_NOISE_STEPS = 1e-6  # of the grid: beyond, integers of two machines will differ
KEPT = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "SEED")  # settings of the user that count
OK, FAILED, NOT_TRIED = "ok", "FAILED", "not tried"
PLAIN_CPU = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41")

# A model for exact comparisons: short chunks, and TTT moves the matrices of half its blocks.
SMALL = dict(
    PRESET="demo",
    ITERATIONS=60,
    MAX_WALLCLOCK_SECONDS=0,
    WARMDOWN_ITERS=30,
    MIXER_CALIBRATION_TOKENS=1024,
    EVAL_SEQ_LEN=128,
    EVAL_STRIDE=32,
    EVAL_RUN_TILES=1,
    TTT_CHUNK_TOKENS=256,
    TTT_FREEZE_BLOCKS=2,
    TTT_EPOCHS=2,
    VAL_TOKENS=600,  # two TTT updates, nine of the mixer
    SIZE_LIMIT_BYTES=16_000_000,
    VERIFY_ENABLED=0,
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the steps are: on a GPU, or in a rehearsal."""

    small: dict  # settings of the model for exact comparisons
    record: dict  # settings of everything at record's shapes
    text_bytes: int = 4000  # of the text of `integers`
    tiles: tuple = (1, 8, 32)  # EVAL_RUN_TILES of `passes`
    groups: int = 3  # of runs side by side that `passes` times
    warm_steps: int = 3  # untimed steps of attention_* and optimizer
    timed_steps: int = 20


GPU_SCALE = Scale(SMALL, dict(PRESET="record", VAL_TOKENS=131_072, LOG_EVERY=20))
REHEARSAL_SCALE = Scale(
    SMALL
    | dict(
        ITERATIONS=2,
        TRAIN_BATCH_TOKENS=1024,
        MICRO_BATCH_TOKENS=1024,
        EVAL_SEQ_LEN=64,
        TTT_CHUNK_TOKENS=128,
        VAL_TOKENS=300,
    ),
    dict(
        PRESET="demo",
        ITERATIONS=3,
        TRAIN_BATCH_TOKENS=1024,
        MICRO_BATCH_TOKENS=1024,
        MIXER_CALIBRATION_TOKENS=1024,
        VAL_TOKENS=600,
        VERIFY_TOKENS=50,
        LOG_EVERY=1,
    ),
    text_bytes=300,
    tiles=(1, 2),
    groups=1,
    warm_steps=1,
    timed_steps=2,
)


class FailedError(Exception):
    """Report what a step found wrong."""


class NotTriedError(Exception):
    """Report why a step cannot be done here or now."""


# ---- Pure parts ----------------------------------------------------------------------------------


def flops_per_token(parameters, layers, width, length):
    """Return the floating-point operations with which training on one token is credited.

    6 a parameter (a multiplication and an addition, forward once and backward twice), as usual of
    all parameters, those of tables too; and 6 * layers * length * width for attention: a row sees
    length / 2 others on average, with 2 * 2 * width operations for scores and values, three times.
    """
    return 6 * parameters + 6 * layers * length * width


def utilization(tokens_per_s, flops, gpus):
    """Return the MFU: tokens_per_s * flops over what so many H100 could do, 989 TFLOP/s each."""
    return tokens_per_s * flops / (gpus * H100_FLOPS)


def ranks_that_share(gpus, sequences):
    """Return the most ranks, at most one a GPU, over which so many sequences split evenly."""
    return max(n for n in range(1, gpus + 1) if sequences % n == 0)


class Clock:
    """The time limit of the whole command."""

    def __init__(self, limit_s, now=time.monotonic):
        self.limit_s = limit_s
        self.now = now
        self.start_s = now()

    def left(self):
        """Return the seconds that are left."""
        return self.limit_s - (self.now() - self.start_s)


def one_step(action, clock, figures):
    """Return (verdict, what it says) of action(figures); whatever it raises is a verdict too."""
    if clock.left() < LEAST_S:
        return NOT_TRIED, "time"
    try:
        return OK, action(figures)
    except NotTriedError as reason:
        return NOT_TRIED, train_gpt.one_line(reason)
    except Exception as error:  # the steps after it must still be tried
        return FAILED, train_gpt.one_line(error)


def run_steps(steps, clock, results, write):
    """Take all `steps`, {name: action}; after each, its entry in results["steps"] is written."""
    for name, action in steps.items():
        figures = {}
        entry = dict(verdict=NOT_TRIED, says="interrupted", seconds=0.0, figures=figures)
        results["steps"][name] = entry
        start_s = time.perf_counter()
        try:
            entry["verdict"], entry["says"] = one_step(action, clock, figures)
        finally:
            entry["seconds"] = round(time.perf_counter() - start_s, 2)
            write()
            train_gpt.say(f"{entry['verdict']:<10} {name:<18} {entry['says']}")


def summary(results):
    """Return (one line that counts the verdicts, exit status)."""
    verdicts = [entry["verdict"] for entry in results["steps"].values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in (OK, FAILED, NOT_TRIED))
    return counts, int(FAILED in verdicts)


# ---- Processes -----------------------------------------------------------------------------------


def processes_of(command_id):
    """Return the processes in whose environment COMMAND_ID is command_id, as Linux shows them."""
    wanted = f"{COMMAND_ID}={command_id}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def end(process, command_id):
    """End a process and all that it has started: politely, then by force.

    The polite signal is for its process group; torchrun, whose ranks have sessions of their own,
    passes it on. Whatever still has the command_id after that is killed, on Linux.
    """
    for number, patience_s in ((signal.SIGTERM, KILL_AFTER_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            break
    patience = Clock(KILL_AFTER_S)  # a driver may hold a process even then
    while (remaining := processes_of(command_id)) and patience.left() > 0:
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def last_line(path):
    """Return what a log ends with: the last error of the program, of Python, or the last line."""
    text = path.read_text(errors="replace")
    for pattern in (r"^error: .*", r"^.*\b\w*(?:Error|Exception): .*", r"^.*\S.*"):
        if found := re.findall(pattern, text, re.MULTILINE):
            return found[-1].strip()
    return "nothing was printed"


class MemoryWatch:
    """The most memory that each GPU had in use within `with`, in MiB, as nvidia-smi sees it."""

    COMMAND = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")

    def __enter__(self):
        self.peaks = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if shutil.which(self.COMMAND[0]):
            self.thread.start()
        return self

    def watch(self):
        """Look once a second."""
        while not self.over.wait(1.0):
            seen = subprocess.run(self.COMMAND, capture_output=True, text=True).stdout.split()
            used = [int(text) for text in seen if text.isdigit()]
            self.peaks = [
                max(pair) for pair in itertools.zip_longest(self.peaks, used, fillvalue=0)
            ]

    def __exit__(self, *_):
        self.over.set()


class Acceptance:
    """The steps, with the settings, folder and time that they share."""

    def __init__(self, environ, folder, clock, rehearse):
        self.folder = folder
        self.clock = clock
        self.rehearse = rehearse
        self.scale = REHEARSAL_SCALE if rehearse else GPU_SCALE
        ours = {name.upper() for name in train_gpt.FIELDS} | {*train_gpt.TORCHRUN}
        self.base = {n: v for n, v in environ.items() if n in KEPT or n not in ours}
        self.base |= dict(DEVICE="cpu" if rehearse else "cuda", LOG_DIR=str(folder))
        self.there = {**PLAIN_CPU, "DEVICE": "cpu"} if rehearse else {"DEVICE": "cpu"}
        self.artifact = folder / "small" / "model.int6.lzma"

    def steps(self):
        """Return {name: action(figures) -> what to say}, in order of worth."""
        kernels = {
            f"attention_{kernel}": lambda figures, kernel=kernel: self.attention(figures, kernel)
            for kernel in ("default", *KERNELS)
        }
        return {
            "training": self.training,
            "integers": self.integers,
            "noise": self.noise,
            "proof": self.proof,
            "proof_across": lambda figures: self.across(figures, "proof"),
            "passes": self.passes,
            "record": self.record,
            "record_across": lambda figures: self.across(figures, "record"),
            **kernels,
            "optimizer": self.optimizer,
        }

    def run(self, step, command, settings, most_s=MOST_S):
        """Run a command to its end; FailedError if it fails or hangs, NotTriedError for no time."""
        log = self.folder / f"{step}.log"
        command_id = uuid.uuid4().hex
        env = self.base | {name: str(value) for name, value in settings.items()}
        env[COMMAND_ID] = command_id
        left_s = self.clock.left()
        with log.open("a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            file.flush()
            process = subprocess.Popen(
                [*map(str, command)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(max(0.1, min(most_s, left_s)))
            except subprocess.TimeoutExpired:
                if left_s <= most_s:
                    reached = f"cut after {left_s:.0f} s at: {last_line(log)}"
                    raise NotTriedError(f"time; {reached}; see {log}") from None
                raise FailedError(f"not done after {most_s:.0f} s; see {log}") from None
            finally:
                end(process, command_id)
        if process.returncode:
            raise FailedError(f"{last_line(log)} (exit status {process.returncode}; see {log})")
        return log

    def program(self, step, *args, **settings):
        """Run train_gpt.py as a user would, with the small model's artifact."""
        settings = dict(ARTIFACT_PATH=self.artifact, SIZE_LIMIT_BYTES=16_000_000) | settings
        return self.run(step, [sys.executable, SCRIPT, *args], settings)

    def measure(self, step, figures, name, *args, **settings):
        """Run one of MEASURES in a process of its own; `figures` gets all that it has noted."""
        path = self.folder / f"{step}.json"
        command = [sys.executable, __file__, "--measure", path, name, *args]
        try:
            self.run(step, command, self.scale.record | settings)
        finally:
            if path.exists():
                figures |= train_gpt.read_object(path)
            if "not_tried" in figures:
                raise NotTriedError(figures["not_tried"])
        return figures

    def need_artifact(self):
        """Raise NotTriedError without the small model's artifact."""
        if not self.artifact.exists():
            raise NotTriedError("there is no artifact of a small model")

    # ---- Exactness

    def training(self, figures):
        """Train the small model; if that fails, leave an artifact of random weights to the rest."""
        command = [sys.executable, SCRIPT]
        try:
            log = self.run("training", command, {**self.scale.small, "RUN_ID": "small"})
        except FailedError:
            if not self.artifact.exists():
                self.write_random_artifact()
            raise
        figures |= train_gpt.read_object(self.folder / "small" / "results.json")
        stages = {stage["name"]: stage["val_bpb"] for stage in figures["stages"]}
        figures["notes"] = notes_of(log)
        bpb = ", ".join(f"{name} {bpb:.4f}" for name, bpb in stages.items())
        return f"{figures['train']['steps']} steps of a small model; BPB {bpb}"

    def write_random_artifact(self):
        """Write an artifact of random weights where the small run's would be."""
        settings = {name: str(value) for name, value in self.scale.small.items()}
        cfg = train_gpt.config_from_env(self.base | settings)
        table, _ = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
        weights = {name: t.float() for name, t in sharp_weights(cfg).items()}
        weights["mixer"] = train_gpt.new_mixer_weights()
        cfg = dataclasses.replace(cfg, quantizer="int6")
        data = train_gpt.pack_artifact(weights, cfg, table, 4.0)
        self.artifact.parent.mkdir(exist_ok=True)
        self.artifact.write_bytes(data)

    def integers(self, figures):
        """Code one text on both devices; let each decode what the other has coded."""
        self.need_artifact()
        text = self.folder / "text"
        text.write_bytes((ROOT / "README.md").read_bytes()[: self.scale.text_bytes])
        devices = {"here": {}, "there": self.there}
        codes = {name: self.folder / f"{name}.code" for name in devices}
        for name, where in devices.items():
            self.program("integers", "compress", text, codes[name], **where)
        figures |= compare_codes(*codes.values())
        for maker, reader in (("here", "there"), ("there", "here")):
            copy = self.folder / f"{maker}.copy"
            self.program("integers", "decompress", codes[maker], copy, **devices[reader])
            figures[f"{maker}_decoded_{reader}"] = copy.read_bytes() == text.read_bytes()
        if not all(value for value in figures.values() if isinstance(value, bool)):
            raise FailedError(f"the devices disagree: {figures}")
        tokens = figures["tokens"]
        return f"{tokens:,} tokens: both devices' frequencies and code words are the same"

    def noise(self, figures):
        """Compare float64 logits of two cuts and two devices with the grid."""
        self.measure("noise", figures, "noise", SMALL_ARTIFACT=self.artifact)
        models = {name: value for name, value in figures.items() if isinstance(value, dict)}
        worst = max(part["largest_steps"] for model in models.values() for part in model.values())
        changed = sum(
            part["other_integers"] for model in models.values() for part in model.values()
        )
        says = f"largest difference {worst:.1e} steps of the grid; {changed} other integers"
        if changed or not worst < MOST_NOISE_STEPS:
            raise FailedError(says)
        return says

    def proof(self, figures):
        """Prove the small artifact past two TTT updates."""
        self.need_artifact()
        tokens = self.scale.small["VAL_TOKENS"]
        settings = dict(RUN_ID="proof", VERIFY_TOKENS=0, VAL_TOKENS=tokens)
        self.program("proof", "verify", **settings)
        figures |= train_gpt.read_object(self.folder / "proof" / "results.json")["proof"]
        figures["ttt_updates"] = (tokens - 1) // self.scale.small["TTT_CHUNK_TOKENS"]
        return "{tokens:,} tokens, {ttt_updates} TTT updates, decoded by another process".format(
            **figures
        )

    def across(self, figures, run):
        """Let the other device decode a run's proof, and so learn what this one has learned."""
        code = self.folder / run / "proof.code"
        if not code.exists():
            raise NotTriedError("there is no proof")
        artifact = self.artifact if run == "proof" else self.folder / run / self.artifact.name
        copy = self.folder / f"{run}.copy"
        settings = self.there | {"ARTIFACT_PATH": artifact}
        self.program(f"{run}_across", "decompress", code, copy, **settings)
        figures["bytes"] = copy.stat().st_size
        if copy.read_bytes() != code.with_suffix(".txt").read_bytes():
            raise FailedError("the other device's text is another")
        return f"{figures['bytes']:,} bytes, the same text"

    # ---- Speed

    def passes(self, figures):
        """Time passes of the Engine at record's shapes."""
        tiles = ",".join(map(str, self.scale.tiles))
        self.measure("passes", figures, "passes", tiles, self.scale.groups)
        rates = ", ".join(
            f"{name}: {part['rows_per_second']:,.0f} rows/s ({part['peak_bytes'] / 1e9:.1f} GB)"
            for name, part in figures.items()
        )
        return f"EVAL_RUN_TILES {rates}"

    def record(self, figures):
        """Run `record` with torchrun on all GPUs; its figures are kept even if it does not end."""
        environ = self.base | {n: str(v) for n, v in self.scale.record.items()}
        cfg = train_gpt.config_from_env(environ)
        gpus = 1 if self.rehearse else torch.cuda.device_count()
        ranks = ranks_that_share(gpus, cfg.train_batch_tokens // cfg.train_seq_len)
        train_s = min(RECORD_SHARE * self.clock.limit_s, self.clock.left() / 2)
        settings = dict(RUN_ID="record", MAX_WALLCLOCK_SECONDS=round(train_s, 1))
        settings["TORCH_TRACE"] = self.folder / "trace"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *launch, SCRIPT]
        try:
            with MemoryWatch() as memory:
                self.run("record", command, self.scale.record | settings, most_s=math.inf)
        finally:
            figures["gpus"] = ranks
            figures["peak_mib_of_each_gpu"] = memory.peaks
            figures["compiled_graphs"] = count_graphs(settings["TORCH_TRACE"])
            figures["notes"] = notes_of(self.folder / "record.log")
            path = self.folder / "record" / "results.json"
            if path.exists():
                figures |= run_figures(train_gpt.read_object(path), cfg, ranks)
        return (
            "{tokens_per_second:,.0f} tokens/s, {ms_a_step:.0f} ms a step, MFU {mfu:.1%}, warm-up "
            "{warmup_seconds:.0f} s, {compiled_graphs} graphs; mixer's gain {mixer_gain_bpb:.4f} "
            "BPB, held-out text {calibration_seconds:.0f} s"
        ).format(**figures)

    def attention(self, figures, kernel):
        """Time training steps with one attention kernel."""
        if self.rehearse and kernel != "default":
            raise NotTriedError("no CUDA")
        steps = self.scale.warm_steps, self.scale.timed_steps
        self.measure(f"attention_{kernel}", figures, "attention", kernel, *steps)
        kernels = ", ".join(figures["attention_kernels"][:2]) or "no kernel of a known name"
        return f"{figures['ms_a_step']:.1f} ms a step of {figures['tokens']:,} tokens: {kernels}"

    def optimizer(self, figures):
        """Time what follows the gradient."""
        steps = self.scale.warm_steps, self.scale.timed_steps
        self.measure("optimizer", figures, "optimizer", *steps)
        return "{ms_a_step:.2f} ms a step after the gradient, Muon {muon_ms:.2f} of them".format(
            **figures
        )


def notes_of(log):
    """Return the lines of a run's log that say what no result does."""
    wanted = (
        "warm-up",
        "fisher: ",
        "calibration: ",
        "proof: ",
        "attention: ",
        "dtype ",
        "note: ",
        "error: ",
    )
    if not log.exists():
        return []
    return [line for line in log.read_text().split("\n") if line.startswith(wanted)]


def compare_codes(here, there):
    """Return in what two code files agree: frequencies (by their checks) and code words."""
    files = [train_gpt.CodeHead.unpack(path, path.read_bytes()) for path in (here, there)]
    (head, checks, words), (head_there, checks_there, words_there) = files
    return dict(
        tokens=head.tokens,
        same_head=head._replace(maker=b"") == head_there._replace(maker=b""),
        same_frequencies=checks == checks_there,
        same_words=words == words_there,
    )


def count_graphs(folder):
    """Return how many graphs a rank has compiled, from the logs of TORCH_TRACE, one a rank."""
    logs = (path.read_text(errors="replace") for path in Path(folder).glob("*.log"))
    return max((text.count('{"dynamo_output_graph"') for text in logs), default=0)


def run_figures(results, cfg, gpus):
    """Return a run's own figures and what follows from them; less if it was cut."""
    train = results["train"] or {}
    figures = dict(train=train, stages=results["stages"], proof=results.get("proof"))
    figures |= {name: train[name] for name in ("warmup_seconds", "calibration_seconds") if train}
    if train.get("seconds"):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in train_gpt.GPT(cfg).parameters())
        rate = train["tokens"] / train["seconds"]
        shape = cfg.num_layers, cfg.model_dim, cfg.train_seq_len
        flops = flops_per_token(parameters, *shape)
        figures |= dict(
            parameters=parameters,
            tokens_per_second=rate,
            ms_a_step=1000 * train["seconds"] / train["steps"],
            mfu=utilization(rate, flops, gpus),
        )
    bpb = {stage["name"]: stage["val_bpb"] for stage in results["stages"]}
    if "mixer" in bpb:
        figures["mixer_gain_bpb"] = bpb["ttt"] - bpb["mixer"]
    return figures


# ---- Measures, each in a process of its own ------------------------------------------------------


class Figures(dict):
    """What a measure has found; each note is on disk at once."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def note(self, **figures):
        """Add figures and write all."""
        self.update(figures)
        train_gpt.write_object(self.path, self)


def sharp_weights(cfg):
    """Return random float64 weights, on the CPU, with which no block is the identity.

    The logits are about as large as a trained model's.
    """
    model = train_gpt.new_model(cfg, train_gpt.Runtime(), dtype="float64")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_out"):
                torch.nn.init.orthogonal_(p)
        model.embed.tokens.mul_(50)
    return {name: p.detach() for name, p in model.named_parameters()}


def wait_for(rt):
    """Let the device finish its work."""
    if rt.device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(rt):
    """Return the most bytes that torch has had on the GPU; without one, that the process has."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.inference_mode()
def logits_of(weights, cfg, rt, tokens, rows, **cut):
    """Return the Engine's logits (R, V) of rows first..last-1, on the CPU, with its `cut` set."""
    model = train_gpt.new_model(cfg, rt, weights, "float64")
    engine = train_gpt.Engine(model, cfg, rt, train_gpt.new_plan(cfg, "sliding"))
    for name, value in cut.items():
        setattr(engine, name, value)
    first, last = rows
    known = tokens[None, :last].to(rt.device)
    return torch.cat([logits.cpu() for _, logits in engine.logits(known, first, last)])


def difference(a, b):
    """Return how far two tables of logits are apart, in steps of the grid, and what it changes.

    Expected are the logits that would become other integers in a million tokens: as many as their
    mean difference in steps, if they lie anywhere between two steps.
    """
    steps = (a - b).abs() * train_gpt.LOGIT_SCALE
    grids = [(logits * train_gpt.LOGIT_SCALE).round() for logits in (a, b)]
    return dict(
        rows=len(a),
        largest_steps=steps.max().item(),
        mean_steps=steps.mean().item(),
        largest_logit=a.abs().max().item(),
        other_integers=(grids[0] != grids[1]).sum().item(),
        expected_in_a_million_tokens=steps.mean().item() * a.size(1) * 1e6,
    )


def measure_noise(cfg, rt, figures):
    """Compare cuts and devices: record's shapes with random weights, and the small artifact."""
    models = {"record_shapes": (cfg, sharp_weights(cfg))}
    path = os.environ["SMALL_ARTIFACT"]
    if os.path.exists(path):
        environ = {"ARTIFACT_PATH": path, "DEVICE": cfg.device}
        artifact, small = train_gpt.open_artifact(environ)
        models["small_artifact"] = (small, artifact.weights)
    tokens = torch.from_numpy(train_gpt.load_validation(cfg))
    for name, (shapes, weights) in models.items():
        runs = dataclasses.replace(shapes, eval_run_tiles=1)
        width = shapes.eval_seq_len
        rows = (width, min(width + 4 * shapes.eval_stride, len(tokens) - 1))
        base = logits_of(weights, runs, rt, tokens, rows)
        cut = logits_of(weights, runs, rt, tokens, rows, batch=1, pass_rows=3 * width // 8 + 1)
        on_cpu = logits_of(weights, runs, train_gpt.Runtime(), tokens, rows)
        parts = {"two_cuts": difference(base, cut), "device_and_cpu": difference(base, on_cpu)}
        figures.note(**{name: parts})


@torch.inference_mode()
def measure_passes(cfg, rt, figures, tiles, groups):
    """Time the Engine's groups of runs, each as many as it computes side by side."""
    model = train_gpt.new_model(cfg, rt, sharp_weights(cfg), "float64")
    for count in map(int, tiles.split(",")):
        runs = dataclasses.replace(cfg, eval_run_tiles=count)
        plan = train_gpt.new_plan(runs, "sliding")
        engine = train_gpt.Engine(model, runs, rt, plan)
        first = -(-plan.context // plan.run) * plan.run
        size = engine.batch * plan.run
        last = first + size * (1 + int(groups))
        text = torch.from_numpy(train_gpt.load_validation(dataclasses.replace(cfg, val_tokens=0)))
        tokens = text.repeat(1 + last // len(text))[None, :last].to(rt.device)
        if rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in engine.logits(tokens, first, last):
            wait_for(rt)
            times.append(time.perf_counter())
        rate = size * int(groups) / (times[-1] - times[0])
        part = dict(rows=last - first, rows_per_second=rate, peak_bytes=peak_bytes(rt))
        figures.note(**{str(count): part})


def new_trainer(cfg, rt):
    """Return a Trainer, and the batches of a step: one micro-batch, as one of 8 ranks has it."""
    cfg = dataclasses.replace(cfg, train_batch_tokens=cfg.micro_batch_tokens)
    model = train_gpt.new_model(cfg, rt)
    trainer = train_gpt.Trainer(model, train_gpt.training_loss(model, rt), cfg, rt)
    tokens, _ = next(train_gpt.train_stream(cfg, 0, cfg.train_batch_tokens))
    return trainer, train_gpt.micro_batches(tokens, cfg, rt)


def ms_of(action, rt, warm, timed):
    """Return the milliseconds of action(), the mean of `timed` calls after `warm` others."""
    for _ in range(int(warm)):
        action()
    wait_for(rt)
    start_s = time.perf_counter()
    for _ in range(int(timed)):
        action()
    wait_for(rt)
    return 1000 * (time.perf_counter() - start_s) / int(timed)


KERNELS = {"FA3": "FLASH_ATTENTION", "flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


def attention_choice(kernel, rt):
    """Return the context in which SDPA computes by `kernel`; NotTriedError if it is not here."""
    if kernel == "default":
        return contextlib.nullcontext()
    # torch 2.9 has no such function: there FlashAttention is torch's own.
    version = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if kernel == "FA3" and version != "FA3":
        raise NotTriedError(rt.notes[-1])
    if kernel != "FA3" and version:
        torch.nn.attention.restore_flash_attention_impl()
    backend = getattr(torch.nn.attention.SDPBackend, KERNELS[kernel])
    return torch.nn.attention.sdpa_kernel(backend)


def measure_attention(cfg, rt, figures, kernel, warm, timed):
    """Time training steps under an attention kernel, then profile one."""
    with attention_choice(kernel, rt):
        trainer, batches = new_trainer(cfg, rt)
        if kernel != "default":
            trainer.loss = trainer.loss.__wrapped__  # without the choice that training makes

        def step():
            trainer.step(batches, 0, 0.1)

        try:
            ms = ms_of(step, rt, warm, timed)
        except RuntimeError as error:
            if re.search("No (available|viable)", str(error)):
                raise NotTriedError(train_gpt.one_line(error)) from error
            raise
        figures.note(ms_a_step=ms, tokens=cfg.micro_batch_tokens, peak_bytes=peak_bytes(rt))
        activity = torch.profiler.ProfilerActivity
        is_cuda = rt.device.type == "cuda"
        with torch.profiler.profile(
            activities=[activity.CUDA if is_cuda else activity.CPU]
        ) as seen:
            step()
            wait_for(rt)
    events = seen.key_averages()
    cost = {e.key: e.self_device_time_total if is_cuda else e.self_cpu_time_total for e in events}
    ranked = sorted(cost, key=cost.get, reverse=True)
    known = re.compile("flash|fmha|attention|attn|cudnn|sdpa|softmax", re.IGNORECASE)
    figures.note(
        attention_kernels=[name[:120] for name in ranked if known.search(name)],
        slowest_kernels_us={name[:120]: cost[name] for name in ranked[:15]},
        note=rt.notes[-1],
    )


def measure_optimizer(cfg, rt, figures, warm, timed):
    """Time clip, Muon, AdamW, average and the read of the losses; then Muon alone."""
    trainer, _ = new_trainer(cfg, rt)
    params = list(trainer.model.parameters())
    grads = [torch.randn_like(p) for p in params]
    totals = torch.ones(3, device=rt.device)

    def gradients(_):
        for p, grad in zip(params, grads):
            p.grad = grad
        return totals

    trainer.gradients = gradients
    ms = ms_of(lambda: trainer.step([], 0, 0.1), rt, warm, timed)
    gradients(())
    muon_ms = ms_of(trainer.optimizers[0].step, rt, 1, timed)
    figures.note(ms_a_step=ms, muon_ms=muon_ms, peak_bytes=peak_bytes(rt))


MEASURES = dict(
    noise=measure_noise,
    passes=measure_passes,
    attention=measure_attention,
    optimizer=measure_optimizer,
)


def measure(path, name, *args):
    """Take one measure in this process; return the exit status."""
    figures = Figures(path)
    try:
        cfg = train_gpt.config_from_env(os.environ)
        MEASURES[name](cfg, train_gpt.start_runtime(cfg, {}), figures, *args)
    except NotTriedError as reason:
        figures.note(not_tried=train_gpt.one_line(reason))
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {train_gpt.one_line(error)}", flush=True)
        return 1
    return 0


# ---- The command line ----------------------------------------------------------------------------


def parse(args, environ):
    """Return (minutes, whether it is a rehearsal), or raise UsageError."""
    rehearse = "--rehearse" in args or environ.get("DEVICE") == "cpu"
    rest = [arg for arg in args if arg != "--rehearse"]
    usage = "usage: cuda_acceptance.sh [--rehearse] [minutes]"
    with train_gpt.blaming(usage, ValueError, error=train_gpt.UsageError):
        (minutes,) = map(float, rest or [30])
        if not 0 < minutes < math.inf:
            raise ValueError(f"{minutes} minutes")
    return minutes, rehearse


def check_machine(cfg, rehearse):
    """Raise UserError without what all steps need: a GPU, shards and a tokenizer."""
    if not rehearse and not torch.cuda.is_available():
        raise train_gpt.UsageError("torch sees no CUDA device; --rehearse needs none")
    if rehearse and cfg.data_path == train_gpt.DEMO_CACHE:
        train_gpt.prepare_demo(cfg, train_gpt.say)
    for split in ("train", "val"):
        train_gpt.list_shards(cfg, split)
    path = cfg.tokenizer_path
    train_gpt.read_file(path, f"TOKENIZER_PATH: cannot read {path}")


def describe(minutes, rehearse):
    """Return what the JSON file says of the machine."""
    gpus = [] if rehearse else range(torch.cuda.device_count())
    return dict(
        minutes=minutes,
        rehearsal=rehearse,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=[torch.cuda.get_device_name(i) for i in gpus],
        cpus=os.cpu_count(),
        source_sha256=train_gpt.sha256(Path(SCRIPT).read_bytes()).hex(),
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        steps={},
    )


def accept(args, environ):
    """Take all steps; return the exit status."""
    minutes, rehearse = parse(args, environ)
    clock = Clock(60 * minutes)
    name = time.strftime("acceptance_%Y%m%d_%H%M%S")
    folder = Path(environ.get("LOG_DIR", "logs"), name).absolute()
    acceptance = Acceptance(environ, folder, clock, rehearse)
    settings = {"PRESET": acceptance.scale.record["PRESET"]}
    cfg = train_gpt.config_from_env(acceptance.base | settings)
    check_machine(cfg, rehearse)
    # The small model's preset would look elsewhere.
    shared = ("data_path", "tokenizer_path", "vocab_size")
    acceptance.base |= {setting.upper(): str(getattr(cfg, setting)) for setting in shared}
    path = folder / "acceptance.json"
    train_gpt.check_writable(folder, 1 << 20).close()
    train_gpt.say(f"figures: {path}")
    results = describe(minutes, rehearse)

    def write():
        line, status = summary(results)
        seconds = round(minutes * 60 - clock.left(), 1)
        train_gpt.write_object(path, results | dict(summary=line, status=status, seconds=seconds))

    write()
    run_steps(acceptance.steps(), clock, results, write)
    line, status = summary(results)
    train_gpt.say(f"{line}, in {60 * minutes - clock.left():.0f} s; {path}")
    return status


def main(args):
    """Run the command line; return the exit status."""
    if args[:1] == ["--measure"]:
        return measure(*args[1:])
    train_gpt.on_signals(train_gpt.interrupt)
    try:
        return accept(args, os.environ)
    except (train_gpt.UserError, KeyboardInterrupt) as error:
        train_gpt.say(f"error: {train_gpt.one_line(error)}", sys.stderr)
        return {KeyboardInterrupt: 130, train_gpt.UsageError: 2}.get(type(error), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
