#!/usr/bin/env python3
"""Train, compress and honestly score a language model under the Parameter Golf rules, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
                                       train on 8xH100, write the artifact, score it, prove it
    PRESET=demo python train_gpt.py    the same on a laptop: no data, no GPU, three minutes
    train_gpt.py eval                  score the artifact at ARTIFACT_PATH again
    train_gpt.py verify                prove its figure by decoding
    train_gpt.py finish                go on with the run RUN_ID, from the weights that it has kept
    train_gpt.py compress IN OUT       any file to code words, with the artifact
    train_gpt.py decompress IN OUT     and back, byte for byte
    train_gpt.py tokenize OUT FILE...  .txt, .jsonl, .jsonl.zst to token shards in the folder OUT
    train_gpt.py summarize JSON...     results of several seeds to submission.json

IN and OUT may be "-", standard input and output; an OUT that is there stays, unless REPLACE=1.
Settings are environment variables, the names of `Config`'s fields in capitals (--help lists them).
A run writes LOG_DIR/RUN_ID/train.log for people, results.json for programs, and the artifact,
model.int6.lzma.

    shards -> train (Muon + AdamW, complementary loss) -> EMA -> int6 + LZMA -> artifact on disk
                                                                                     |
    val_bpb <- bits <- score <- integer frequencies <- predict <- model <- artifact read back
          '--> update: TTT and the mixer learn from what has been scored

Bits per byte: val_bpb = sum over tokens of -log2(freq[x_t] / 2^24) / bytes of text. It is a code
length, since
  1. causal       the frequencies for position t depend on the artifact and on x_0..x_{t-1} alone;
  2. complete     every token of the vocabulary has a frequency >= 1, and they sum to exactly 2^24;
  3. score first  position t's frequencies are final before any state behind them has seen x_t;
  4. one pass     left to right, once. `Predictor` alone makes frequencies; out of order, it raises.

Shapes: B batch, T rows, W window, S stride, D width, H query heads, G key and value heads, d head
width, V vocabulary, R positions, C contexts, M occurrences a context, J candidates, F features.
"""

import contextlib
import copy
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import inspect
import io
import json
import lzma
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# torch's threads must not spin where ranks share cores; it reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.optim import Muon  # noqa: F401 (an older torch has none)
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install -r requirements.txt")

# ---- Config --------------------------------------------------------------------------------------
# One frozen dataclass is the only door for settings, in groups: `run` says where things are on this
# machine, `model` is fixed once weights exist, `train` shapes training, `eval` shapes the code
# length and can be overridden by the `eval` command. All but `run` are stored in the artifact, with
# the preset's name. What a value must satisfy stands beside its default.


class UserError(Exception):
    """Report what the user can mend, in one line: the setting or file, and the way out."""

    exit_status = 1


class UsageError(UserError):
    """Report a bad command line or setting."""

    exit_status = 2


BELOW_ONE = 1 - 1e-9


def option(default, doc, **limits):
    """Return a setting's field with its default, one line of documentation and its limits.

    Limits: `minimum` and `maximum`, a number or the name of another property of Config; without
    `minimum` an int is at least 1, a float at least 0; `divides`, the names of settings that are
    multiples of this one; `choices`, the allowed words.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


@dataclass(frozen=True)
class RunSettings:
    """Where things are on this machine; not part of the artifact, but for the preset's name."""

    preset: str = option("record", "record, bench or demo")
    device: str = option("auto", "auto, cuda or cpu", choices=("auto", "cuda", "cpu"))
    data_path: str = option("data/datasets/fineweb10B_sp1024", "folder of the shards")
    tokenizer_path: str = option("data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    run_id: str = option("", "folder of the run under LOG_DIR; empty: PRESET_seedSEED")
    artifact_path: str = option("", "artifact to be read; empty: LOG_DIR/RUN_ID/model.int6.lzma")
    log_dir: str = option("logs", "where runs are written")
    replace: bool = option(False, "replace an OUT that is there, or a run of other settings")
    val_tokens: int = option(0, "validation tokens to score, from the start; 0: all", minimum=0)
    size_limit_bytes: int = option(16_000_000, "cap on code plus artifact")
    log_every: int = option(100, "training steps between two log lines")
    verify_enabled: bool = option(
        True, "end a run with a proof: code, and decode in another process"
    )
    verify_tokens: int = option(1000, "tokens that are proved, from the stream's start", minimum=0)


@dataclass(frozen=True)
class TrainSettings:
    """What shapes training."""

    seed: int = option(1337, "seed of the initial weights", minimum=0)
    iterations: int = option(20_000, "most optimizer steps")
    max_wallclock_seconds: float = option(600.0, "training time; 0: no limit, ITERATIONS decides")
    train_batch_tokens: int = option(786_432, "tokens in an optimizer step, over all ranks")
    micro_batch_tokens: int = option(98_304, "most tokens a rank takes through the model at once")
    warmup_steps: int = option(20, "untimed steps on random tokens, to compile kernels", minimum=0)
    warmdown_iters: int = option(
        3500, "steps over which the learning rates fall to 0 at the end", minimum=0
    )
    matrix_lr: float = option(0.025, "Muon, matrices")
    scalar_lr: float = option(0.025, "AdamW, vectors and scalars")
    tied_embed_lr: float = option(0.035, "AdamW, embedding tables")
    muon_momentum: float = option(
        0.99, "reached from 0.92 over MUON_MOMENTUM_WARMUP_STEPS", maximum=BELOW_ONE
    )
    muon_momentum_warmup_steps: int = option(1500, "steps")
    muon_wd: float = option(0.04, "decoupled weight decay of Muon")
    adam_wd: float = option(0.04, "decoupled weight decay of AdamW")
    grad_clip_norm: float = option(0.3, "global gradient norm; 0: off")
    ema_decay: float = option(0.997, "average of the weights over steps; 0: off", maximum=BELOW_ONE)
    swa_enabled: bool = option(False, "average snapshots of the warmdown instead of the EMA")
    swa_every: int = option(50, "steps between two snapshots")
    complement_alpha: float = option(0.5, "complementary loss; 0: plain cross-entropy", maximum=1)
    mixer_calibration_tokens: int = option(
        1_048_576, "held-out text for the mixer; 0: cold start", minimum=0
    )


@dataclass(frozen=True)
class ModelSettings:
    """What is fixed once weights exist."""

    vocab_size: int = option(1024, "tokens in the vocabulary (V)", minimum=2, maximum=65_536)
    num_layers: int = option(11, "transformer blocks", minimum=2)
    model_dim: int = option(512, "width of the residual stream (D)")
    num_heads: int = option(8, "query heads (H)", divides=("model_dim",))
    num_kv_heads: int = option(4, "key and value heads (G)", divides=("num_heads",))
    mlp_mult: int = option(3, "hidden width of the MLP in units of D")
    xsa_last_n: int = option(
        4, "last layers with exclusive self-attention", maximum="num_layers", minimum=0
    )
    rope_dims: int = option(
        16, "leading dimensions of a head that are rotated", minimum=4, maximum="head_dim"
    )
    bigram_vocab_size: int = option(2048, "rows of the hashed bigram table", minimum=2)
    bigram_dim: int = option(128, "width of the bigram and value tables")
    ve_layers: str = option("9,10", "layers with value embeddings, comma-separated; empty: none")
    vrl_enabled: bool = option(True, "value residual learning")
    logit_softcap: float = option(30.0, "logits = cap * tanh(z / cap)", minimum=1e-3)
    qk_gain_init: float = option(1.5, "initial per-head gain on queries")
    train_seq_len: int = option(
        2048,
        "tokens in a training sequence; sets the rotary base",
        divides=("train_batch_tokens", "micro_batch_tokens"),
    )


@dataclass(frozen=True)
class EvalSettings:
    """What shapes the code length; the `eval` command may override it."""

    eval_seq_len: int = option(2048, "window W", divides=("ttt_chunk_tokens",))
    eval_stride: int = option(
        64,
        "rows S scored by each window after the first",
        divides=("eval_seq_len",),
    )
    eval_batch_windows: int = option(32, "windows in one forward pass")
    ttt_enabled: bool = option(True, "score-first test-time training")
    ttt_schedule_chunks: int = option(1893, "chunks over which the TTT rate falls to 0")
    ttt_lr: float = option(5e-4, "AdamW")
    ttt_epochs: int = option(3, "optimizer steps a chunk")
    ttt_chunk_tokens: int = option(32_768, "positions scored between two TTT updates")
    ttt_freeze_blocks: int = option(
        9, "first blocks whose matrices TTT leaves alone", maximum="num_layers", minimum=0
    )
    ttt_temperature: float = option(0.98, "divides the logits from the ttt stage on", minimum=1e-3)
    polyak_decay: float = option(0.998, "average of TTT's weights that scores", maximum=BELOW_ONE)
    mixer: str = option(
        "learned", "learned, entropy or none", choices=("learned", "entropy", "none")
    )
    ngram_order: int = option(
        10, "longest n-gram, the predicted token included; above 9 as 9", minimum=2
    )
    ngram_recent: int = option(4, "last occurrences that a context looks at")
    ngram_hash_bits: int = option(26, "2^this heads of chains for each kind of context", maximum=30)
    mixer_block: int = option(
        16_384,
        "positions between two updates of the learned mixer",
        divides=("ttt_chunk_tokens",),
    )
    mixer_lr: float = option(1e-3, "learned mixer, Adam")
    min_count: int = option(
        1, "occurrences that a context needs, else back off", maximum="ngram_recent", minimum=0
    )
    alpha_base: float = option(
        0.0,
        "entropy mixer: alpha = base + range * sigmoid(2 (H - center))",
        maximum=1,
    )
    alpha_range: float = option(0.10, "entropy mixer", maximum="most_alpha_range")
    alpha_center: float = option(1.0, "entropy mixer, nats of neural entropy H")


@dataclass(frozen=True)
class Config(EvalSettings, ModelSettings, TrainSettings, RunSettings):
    """All settings, with the defaults of the `record` preset (the 8xH100 run)."""

    def __post_init__(self):
        check_config(self)

    @property
    def run_dir(self):
        """Folder of this run's log, results and artifact."""
        return Path(self.log_dir) / (self.run_id or f"{self.preset}_seed{self.seed}")

    @property
    def artifact(self):
        """Path of the artifact, to be written or to be evaluated."""
        return Path(self.artifact_path or self.run_dir / "model.int6.lzma")

    @property
    def head_dim(self):
        """Width d of an attention head."""
        return self.model_dim // self.num_heads

    @property
    def most_alpha_range(self):
        """Largest ALPHA_RANGE with which alpha stays a share."""
        return 1 - self.alpha_base

    @property
    def value_layers(self):
        """Layers with value embeddings, sorted; None for a layer that there is not."""
        names = self.ve_layers.split(",") if self.ve_layers.strip() else []
        valid = {str(layer): layer for layer in range(self.num_layers)}
        layers = [valid.get(name.strip()) for name in names]
        return None if None in layers else sorted(set(layers))


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
GROUPS = {  # {setting: the class that it belongs to}
    field.name: group
    for group in (RunSettings, TrainSettings, ModelSettings, EvalSettings)
    for field in dataclasses.fields(group)
}
PLACES = {  # what does not tell one run from another
    "run_id",
    "log_dir",
    "log_every",
    "verify_enabled",
    "verify_tokens",
    "replace",
    "device",
}
DEMO_CACHE = ".cache/demo"
SMALL = dict(
    warmup_steps=0,
    muon_momentum=0.95,
    num_heads=4,
    num_kv_heads=2,
    eval_batch_windows=1,
    ttt_lr=1e-4,
    ttt_epochs=1,
    ttt_schedule_chunks=64,
    ttt_temperature=1.0,
    polyak_decay=0.0,
    mixer_block=64,
)
PRESETS = {
    "record": {},
    # Real FineWeb shards on two CPU cores: a smaller model of the same mechanisms, a cap that
    # binds.
    "bench": SMALL
    | dict(
        val_tokens=131_072,
        size_limit_bytes=2_400_000,
        log_every=50,
        verify_tokens=5000,
        iterations=600,
        max_wallclock_seconds=0.0,
        train_batch_tokens=4096,
        micro_batch_tokens=4096,
        train_seq_len=512,
        warmdown_iters=300,
        muon_momentum_warmup_steps=300,
        ema_decay=0.0,
        swa_every=20,
        num_layers=6,
        model_dim=256,
        xsa_last_n=3,
        bigram_dim=64,
        ve_layers="4,5",
        eval_seq_len=512,
        ttt_chunk_tokens=8192,
        ttt_freeze_blocks=6,
        ngram_hash_bits=20,
        mixer_calibration_tokens=262_144,
    ),
    # No data, no GPU: a toy model on the docstrings of this machine, three minutes from start to
    # end.
    "demo": SMALL
    | dict(
        data_path=DEMO_CACHE,
        tokenizer_path=DEMO_CACHE + "/tokenizer.model",
        val_tokens=32_768,
        size_limit_bytes=1_000_000,
        log_every=10,
        verify_tokens=1100,
        iterations=90,
        max_wallclock_seconds=80.0,
        train_batch_tokens=8192,
        micro_batch_tokens=8192,
        train_seq_len=256,
        warmdown_iters=60,
        muon_momentum_warmup_steps=100,
        ema_decay=0.9,
        swa_every=10,
        num_layers=4,
        model_dim=128,
        xsa_last_n=2,
        bigram_vocab_size=1024,
        bigram_dim=32,
        ve_layers="3",
        eval_seq_len=256,
        ttt_chunk_tokens=512,
        ttt_freeze_blocks=4,
        ngram_hash_bits=18,
        mixer_calibration_tokens=32_768,
    ),
}


def parse_setting(field, text):
    """Return a setting's value from its text; UsageError names the variable and what is allowed."""
    words = {"0": False, "1": True, "False": False, "True": True}  # the last two as logs show them
    expected = {bool: "0 or 1", int: "a whole number", float: "a finite number"}.get(field.type)
    with contextlib.suppress(ValueError, KeyError):
        value = words[text] if field.type is bool else field.type(text)
        if field.type is not float or math.isfinite(value):
            return value
    raise UsageError(f"{field.name.upper()}={text!r}: expected {expected}")


def config_from_env(environ, stored=None):
    """Return the Config of preset, then `stored` (an artifact's settings), then the environment.

    UsageError names a value that cannot be, a name close to a setting's, and a setting that the
    artifact has fixed otherwise.
    """
    stored = stored or {}
    known = {name.upper(): field for name, field in FIELDS.items()}
    for name in environ.keys() - known:
        for meant in difflib.get_close_matches(name, known, n=1, cutoff=0.9):
            raise UsageError(f"{name} is not a setting: did you mean {meant}? Otherwise unset it")
    given = {
        field.name: parse_setting(field, environ[name])
        for name, field in known.items()
        if name in environ
    }
    preset = given.get("preset") or stored.get("preset", "record")
    if preset not in PRESETS:
        raise UsageError(f"PRESET={preset!r}: there are {', '.join(PRESETS)}")
    if strange := stored.keys() - GROUPS:
        names = ", ".join(sorted(strange))
        raise UserError(f"the artifact has settings of another version of this script: {names}")
    for name, value in given.items():
        fixed = name in stored and GROUPS[name] in (ModelSettings, TrainSettings)
        if fixed and value != stored[name]:
            raise UsageError(f"{name.upper()}={value}: the weights have {stored[name]}; unset it")
    return Config(**{**PRESETS[preset], **stored, **given, "preset": preset})


def check_config(cfg):
    """Raise UsageError for the first impossible value or combination."""

    def need(ok, name, allowed):
        if not ok:
            raise UsageError(f"{name.upper()}={getattr(cfg, name)!r}: {allowed}")

    for name, field in FIELDS.items():
        limits = field.metadata
        if "choices" in limits:
            allowed = f"there are {', '.join(limits['choices'])}"
            need(getattr(cfg, name) in limits["choices"], name, allowed)
        elif field.type is not str:
            least = limits.get("minimum", int(field.type is int))
            need(getattr(cfg, name) >= least, name, f"must be at least {least}")
    for name, field in FIELDS.items():
        for multiple in field.metadata.get("divides", ()):
            whole = getattr(cfg, multiple) % getattr(cfg, name) == 0
            need(whole, multiple, f"must be a multiple of {name.upper()}={getattr(cfg, name)}")
    for name, field in FIELDS.items():
        most = field.metadata.get("maximum", math.inf if field.type is float else 2**63 - 1)
        most = getattr(cfg, most) if isinstance(most, str) else most
        if field.type is not str:
            need(getattr(cfg, name) <= most, name, f"must be at most {most:.9g}")
    layers = f"must be comma-separated layers below NUM_LAYERS={cfg.num_layers}"
    need(cfg.value_layers is not None, "ve_layers", layers)
    need(cfg.rope_dims % 2 == 0, "rope_dims", "must be even")
    known_rows = cfg.eval_seq_len - cfg.eval_stride
    need(known_rows != 1, "eval_stride", "must leave no or 2 rows of a window known")


# ---- Runtime -------------------------------------------------------------------------------------
# Rank, device and dtype are decided once and said aloud, and nothing that surrounds the program is
# trusted: torchrun's variables count when all of them are there, threads are what this process may
# use and alike on every rank, the largest table is tried for size, and one product is compared with
# float64. What is said never ends the work, whatever became of the terminal or the disk.

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# RuntimeError is torch's for memory, files and ranks.
FORESEEN = (UserError, KeyboardInterrupt, ImportError, MemoryError, OSError, RuntimeError)


def say(line, file):
    """Write a line at once in the file's encoding; a closed or full file is passed over."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def one_line(error):
    """Return what an exception says, in one line."""
    return " ".join(str(error).splitlines()) or "interrupted"


def on_signals(action):
    """Call action(number, frame) at the signals that end a program, unless nohup ignores them."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, action)


def interrupt(*_):
    """Raise KeyboardInterrupt; what it starts is not interrupted again."""
    on_signals(lambda *_: None)
    raise KeyboardInterrupt


@dataclass
class Runtime:
    """Where this process runs: rank of world, device and compute dtype."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    dtype: torch.dtype = torch.float32
    notes: tuple = ()  # lines for the log: device, dtype and attention kernel, with their reasons

    @property
    def is_main(self):
        """Whether this is the rank that writes files and the log."""
        return self.rank == 0

    def alone(self):
        """Return this runtime as a world of one rank."""
        return dataclasses.replace(self, rank=0, world=1)

    def sum_over_ranks(self, tensor):
        """Sum `tensor` in place over the ranks; every rank must call it equally often."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """Return rank 0's float on every rank."""
        mine = torch.tensor([value * self.is_main], dtype=torch.float64, device=self.device)
        return self.sum_over_ranks(mine).item()

    @contextlib.contextmanager
    def fail_together(self):
        """Raise a UserError of the block, whichever rank it is on, on every rank: none waits."""
        failures = [None]
        try:
            yield
        except UserError as error:
            failures = [error]
        if dist.is_initialized():
            mine = failures[0]
            failures = [None] * self.world
            dist.all_gather_object(failures, mine)
        for failure in filter(None, failures):
            raise failure

    def clock(self):
        """Return seconds on a clock, read once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def compiled(self, function):
        """Return `function` through torch.compile where that pays (CUDA), else as it is."""
        if self.device.type != "cuda":
            return function
        torch._dynamo.config.recompile_limit = 64  # past it torch would refuse
        return torch.compile(function, dynamic=False, fullgraph=True)


def torchrun_ranks(environ):
    """Return [rank, ranks, rank on this machine, ranks on it]; alone where torchrun set not all."""
    if not {*TORCHRUN} <= environ.keys():
        return [0, 1, 0, 1]
    try:
        return [int(environ[name]) for name in TORCHRUN[:4]]
    except ValueError as error:
        raise UsageError(f"{', '.join(TORCHRUN)}: {error}; unset them") from error


def count_threads():
    """Return torch's threads (OMP_NUM_THREADS, or processors), or what the control group allows."""
    threads = torch.get_num_threads()
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max" is no limit, nor is -1
            texts = [Path("/sys/fs/cgroup", name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            threads = min(threads, math.ceil(quota / period) or threads)
    return threads


def check_arithmetic(cfg, device, dtype):
    """Raise UserError if a product is not as in float64, or memory has no room for the history."""
    x = torch.randn(256, 256, dtype=torch.float64, device=device)
    rounded = x.to(dtype)
    error = (F.linear(rounded, rounded) - F.linear(x, x)).abs().max()
    if not error < 8:  # of about 300; NaN is not
        raise UserError(
            f"{dtype} products on {device} are wrong: OpenMP or torch's math library is broken; "
            "unset OMP_DYNAMIC, OMP_THREAD_LIMIT and their like, or install torch again"
        )
    try:
        NgramHistory(cfg, np.zeros(cfg.vocab_size, dtype=bool), device)
    except (RuntimeError, MemoryError) as error:
        message = f"NGRAM_HASH_BITS={cfg.ngram_hash_bits}: lower it; {one_line(error)}"
        raise UsageError(message) from error


def start_runtime(cfg, environ):
    """Return the Runtime that torchrun and DEVICE describe; join the group of its ranks."""
    rank, world, local_rank, ranks_here = torchrun_ranks(environ)
    cuda = cfg.device != "cpu" and torch.cuda.device_count() >= ranks_here
    if not cuda and (cfg.device == "cuda" or (cfg.preset, cfg.device) == ("record", "auto")):
        raise UsageError(
            f"PRESET={cfg.preset} DEVICE={cfg.device}: torch sees no CUDA device for each rank; "
            "DEVICE=cpu insists, PRESET=demo and PRESET=bench with DEVICE=auto need none"
        )
    device = torch.device("cpu")
    units = torch.cpu.get_capabilities()
    name = units.get("cpu_name", os.uname().machine)
    kernel = "SDPA's own kernels"
    if cuda:
        device = torch.device("cuda", local_rank)
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name()
        kernel = attention_kernel()
    dtype, why = torch.float32, "no bf16 units"
    if cuda or units.get("avx512_bf16") or units.get("amx_bf16"):
        dtype, why = torch.bfloat16, "multiplied in hardware"
    if world > 1:
        dist.init_process_group(
            "nccl" if cuda else "gloo", **({"device_id": device} if cuda else {})
        )
    rt = Runtime(rank, world, device, dtype)
    torch.set_num_threads(int(rt.from_main(count_threads())))
    check_arithmetic(cfg, device, dtype)
    rt.notes = (
        f"{device.type} {name}, {world} rank(s), {torch.get_num_threads()} CPU threads each",
        f"dtype {dtype}: {why}",
        f"attention: {kernel}",
    )
    return rt


def attention_kernel():
    """Switch FlashAttention-3 on where it is installed; return what attention runs on."""
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError):
        return "SDPA's own kernels; FlashAttention-3 is not installed"
    return "FlashAttention-3 inside SDPA"


def progress_line(done, total, start_s, unit):
    """Return 'done/total unit, rate, elapsed, ETA' of work begun at perf_counter() == start_s."""
    elapsed_s = max(time.perf_counter() - start_s, 1e-9)
    eta_s = elapsed_s / max(done, 1) * (total - done)
    return (
        f"{done:,}/{total:,} {unit}, {done / elapsed_s:,.0f}/s, "
        f"{elapsed_s:.0f} s, ETA {eta_s:.0f} s"
    )


def is_stream(path):
    """Return whether what is written to `path` goes elsewhere: "-", a device or a FIFO."""
    return str(path) == "-" or (os.path.exists(path) and not os.path.isfile(path))


def write_atomically(path, data, like=""):
    """Write bytes beside `path` and rename the file: it is whole or it is not there.

    A link is followed; a device, a FIFO and "-", standard output, are written through. The file
    gets the permissions of the file `like`. Data None: only try.
    """
    target = Path(os.path.realpath(path))
    temporary = Path(f"{target}.tmp{os.getpid()}")
    try:
        if is_stream(path):
            if data is not None or target.is_dir():
                with open(os.dup(1) if str(path) == "-" else path, "wb") as file:
                    file.write(data)
            return
        if data is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if os.path.isfile(like):
                shutil.copymode(like, temporary)
            file.write(data or b"")
            file.flush()
            os.fsync(file.fileno())
        if data is not None:
            os.replace(temporary, target)
    except OSError as error:
        hint = "free space or write elsewhere"
        raise UserError(f"cannot write {path}: {error.strerror}; {hint}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_file(path, name="", hint=""):
    """Return a file's bytes, for "-" standard input's; UserError names the setting or file."""
    try:
        return Path("/dev/stdin" if str(path) == "-" else path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}cannot read {path}: {error.strerror}{hint}") from error


def check_target(cfg, target, *sources):
    """Return the log that suits `target`: on stderr where what is written may be shown.

    UserError, before work, if `target` cannot be written, is one of the sources, or is there and
    is not to be replaced.
    """
    write_atomically(target, None)
    if os.path.isfile(target):
        if any(os.path.exists(source) and os.path.samefile(source, target) for source in sources):
            raise UsageError(f"{target} is read for this; name another OUT")
        if not cfg.replace:
            raise UsageError(f"{target} is there already; REPLACE=1 replaces it")
    return functools.partial(say, file=sys.stderr if is_stream(target) else sys.stdout)


def check_writable(folder, need_bytes):
    """Return an open file without a name that takes need_bytes of `folder` until it is closed.

    UserError, before hours of work, if the folder cannot be written to or has no room.
    """
    write_atomically(folder / ".probe", b"probe")
    (folder / ".probe").unlink()
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise UserError(
            f"LOG_DIR: {folder} has {free:,} bytes free, needs {need_bytes:,}: set it elsewhere"
        )
    room = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    room.write(bytes(need_bytes))
    room.flush()
    return room


def lock_folder(folder):
    """Return an open file that locks `folder`; UserError if another process has locked it."""
    file = open(folder / ".lock", "wb")  # noqa: SIM115 (locked until it is closed)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"RUN_ID: another run is at work in {folder}; wait for it or set another RUN_ID"
        raise UserError(message) from error
    except OSError:
        pass  # a file system without locks
    return file


# ---- Tokenizer and byte accounting ---------------------------------------------------------------
# BPB divides by bytes, so a byte counted twice is a better score for nothing. A leading space
# counts only where a decoder prints one: not after a boundary (BOS, control, unknown). Every
# document's count is compared with its text.

SPACE = "\u2581"


@dataclass(frozen=True)
class TokenTable:
    """A tokenizer: pieces[i] of kind kinds[i]: Normal, Unknown, Control, X (unused) or Byte."""

    pieces: tuple
    kinds: str
    bos_id: int

    @functools.cached_property
    def digest(self):
        """SHA-256 of pieces and kinds: tokenizers of one digest read the same tokens."""
        description = json.dumps([self.pieces, self.kinds, self.bos_id])
        return hashlib.sha256(description.encode()).hexdigest()

    @functools.cached_property
    def texts(self):
        """Bytes that each token prints, its leading space included; a boundary prints none."""
        return tuple(self._text(piece, kind) for piece, kind in zip(self.pieces, self.kinds))

    @staticmethod
    def _text(piece, kind):
        if kind == "B":
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode() if kind == "N" else b""

    @functools.cached_property
    def byte_tables(self):
        """(bytes without a leading space, has a leading space, is a boundary), each (V,)."""
        starts = [k == "N" and p.startswith(SPACE) for p, k in zip(self.pieces, self.kinds)]
        leading = np.array(starts)
        base = np.array([len(text) for text in self.texts], dtype=np.int64) - leading
        boundary = np.array([kind in "UCX" for kind in self.kinds])
        return base, leading, boundary

    @property
    def word_begins(self):
        """Tokens that begin a word or part words, bool (V,)."""
        _, leading, boundary = self.byte_tables
        return leading | boundary

    def count_bytes(self, tokens):
        """Count the bytes that tokens[1:] print, each after its predecessor; int64 (n - 1,)."""
        base, leading, boundary = self.byte_tables
        return base[tokens[1:]] + (leading[tokens[1:]] & ~boundary[tokens[:-1]])

    def decode(self, tokens):
        """Return the bytes of one document's tokens: a space is printed except after a boundary."""
        _, leading, boundary = self.byte_tables
        cut = leading[tokens] & np.append(True, boundary[tokens[:-1]])
        return b"".join(self.texts[t][c:] for t, c in zip(tokens.tolist(), cut.tolist()))


def load_tokenizer(path, vocab_size, table=None):
    """Return (TokenTable, processor) of a SentencePiece model.

    UserError if it is none, does not fit VOCAB_SIZE, or is not the tokenizer of `table`.
    """
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        message = f"TOKENIZER_PATH: {path} is no SentencePiece model; see README"
        raise UserError(message) from error
    if sp.vocab_size() != vocab_size or sp.bos_id() < 0:
        raise UserError(f"VOCAB_SIZE={vocab_size}: {path} has {sp.vocab_size()} pieces, or no BOS")
    tests = dict(U=sp.is_unknown, C=sp.is_control, X=sp.is_unused, B=sp.is_byte)
    ids = range(vocab_size)
    kinds = "".join(next((kind for kind, test in tests.items() if test(i)), "N") for i in ids)
    found = TokenTable(tuple(map(sp.id_to_piece, ids)), kinds, sp.bos_id())
    if table and table.digest != found.digest:
        raise UserError(f"TOKENIZER_PATH={path}: the artifact has another tokenizer")
    return found, sp


def audit_bytes(table, tokens, decode=None):
    """Return the bytes of tokens[1:] after comparing each document's count with its text.

    The text is SentencePiece's where `decode` is given, else the table's own. UserError where they
    differ, where a text is not UTF-8 (a last document may be cut inside a character), or where the
    stream does not begin with BOS.
    """
    counts = table.count_bytes(tokens)
    starts = np.flatnonzero(tokens == table.bos_id)
    if not len(starts) or starts[0]:
        raise UserError(
            f"the validation stream must start with BOS (id {table.bos_id}), like every document"
        )
    for start, stop in zip(starts, [*starts[1:], len(tokens)]):
        document = tokens[start:stop]
        where = f"validation document at token {start}"
        is_last = stop == len(tokens)
        if decode and not is_last:
            text = decode(document[1:].tolist()).encode()
        else:
            text = table.decode(document)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            if not is_last or error.reason != "unexpected end of data":
                message = f"{where}: {error}; shards and tokenizer do not belong together"
                raise UserError(message) from error
        counted = int(counts[start:stop].sum())  # with the next BOS, which prints nothing
        if counted != len(text):
            raise UserError(
                f"{where}: {counted} bytes counted, {len(text)} decoded; a BPB would be wrong"
            )
    return int(counts.sum())


# ---- Data ----------------------------------------------------------------------------------------
# Official shards: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens;
# inside zstandard if named .zst. Training reads them in sorted order, cyclically, and alike on any
# number of ranks. The end of the last shard is never trained on: the mixer is calibrated on it.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024


def read_bytes(path):
    """Return a file's contents, decompressed if its name ends in .zst; EOFError for a cut frame."""
    data = Path(path).read_bytes()
    if not str(path).endswith(".zst"):
        return data
    import zstandard

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("its end is missing")
        data = frame.unused_data
    return b"".join(parts)


def read_shard(path, vocab_size):
    """Return one shard's tokens, uint16 (n,).

    UserError for a file that is foreign, truncated or has tokens outside of the vocabulary.
    """
    try:
        data = read_bytes(path)
    except Exception as error:  # zstandard raises a class of its own
        raise UserError(f"shard {path} cannot be read ({error}); download it again") from error
    head = np.frombuffer(data[:12].ljust(12, b"\0"), dtype="<i4")
    magic, version, count = head.tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(
            f"shard {path} is no token shard of version {SHARD_VERSION}: make one by `tokenize`"
        )
    if len(data) != SHARD_HEADER_BYTES + 2 * count or not count:
        raise UserError(
            f"shard {path} is truncated or padded ({count:,} tokens); download it again"
        )
    tokens = np.frombuffer(data, dtype="<u2", offset=SHARD_HEADER_BYTES)
    if tokens.max() >= vocab_size:
        raise UserError(f"shard {path} has token id {tokens.max()}, beyond VOCAB_SIZE={vocab_size}")
    return tokens


def shard_bytes(tokens):
    """Return the contents of a shard of uint16 tokens (n,): the inverse of read_shard."""
    head = struct.pack("<iii", SHARD_MAGIC, SHARD_VERSION, len(tokens))
    return head.ljust(SHARD_HEADER_BYTES, b"\0") + np.asarray(tokens, dtype="<u2").tobytes()


def list_shards(cfg, split):
    """Return the sorted shard files of `split` (train, val); a file wins over its .zst twin."""
    found = sorted(map(str, Path(cfg.data_path).glob(f"fineweb_{split}_*.bin*")))
    files = [
        f for f in found if f.endswith(".bin") or (f[:-4] not in found and f[-8:] == ".bin.zst")
    ]
    if not files:
        raise UserError(
            f"DATA_PATH: no fineweb_{split}_*.bin or .bin.zst in {cfg.data_path}: get FineWeb's "
            "(see README), make some with `tokenize`, or run PRESET=demo, which needs none"
        )
    return files


def load_validation(cfg):
    """Return the validation stream, int64 (n + 1,): all shards, up to VAL_TOKENS predictions."""
    shards = [read_shard(path, cfg.vocab_size) for path in list_shards(cfg, "val")]
    end = cfg.val_tokens + 1 if cfg.val_tokens else None
    tokens = np.concatenate(shards)[:end].astype(np.int64)
    if len(tokens) <= cfg.eval_seq_len:
        raise UserError(
            f"the validation stream has {len(tokens):,} tokens, less than a window and a target: "
            f"raise VAL_TOKENS, lower EVAL_SEQ_LEN={cfg.eval_seq_len} or add text"
        )
    return tokens


def load_held_out(cfg):
    """Return the end of the last training shard, uint16 (n + 1,), for calibration; maybe empty."""
    wanted = cfg.mixer_calibration_tokens + 1
    if cfg.mixer != "learned" or wanted == 1:
        return np.zeros(0, dtype=np.uint16)
    shard = read_shard(list_shards(cfg, "train")[-1], cfg.vocab_size)
    if len(shard) < 2 * wanted:
        raise UserError(
            f"MIXER_CALIBRATION_TOKENS={wanted - 1}: over half of the last shard; lower it"
        )
    return shard[-wanted:]


class TrainStream:
    """The training shards without their held-out end: one endless stream, alike on all ranks."""

    def __init__(self, cfg, held_out):
        self.files = list_shards(cfg, "train")
        self.vocab_size = cfg.vocab_size
        self.held_out = held_out  # tokens at the end of the last file
        self.tokens = np.zeros(0, dtype=np.uint16)  # read and not yet taken
        self.opened = 0  # files so far
        self.take(0)  # a bad first shard is found out before long work

    @property
    def epochs(self):
        """How many times the files have been read over."""
        return (self.opened - 1) // len(self.files)

    def take(self, count):
        """Return the next count + 1 tokens, int64; the stream moves on by count."""
        while len(self.tokens) <= count:
            path = self.files[self.opened % len(self.files)]
            shard = read_shard(path, self.vocab_size)
            if path == self.files[-1]:
                shard = shard[: len(shard) - self.held_out]
            self.tokens = np.concatenate([self.tokens, shard])
            self.opened += 1
        taken = self.tokens[: count + 1].astype(np.int64)
        self.tokens = self.tokens[count:]
        return taken


def micro_batch_sequences(cfg, world):
    """Return the sequences of a micro-batch; UsageError if the ranks cannot share a step evenly."""
    sequences = cfg.train_batch_tokens // cfg.train_seq_len
    if sequences % world:
        raise UsageError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: {sequences} sequences do not split "
            f"over {world} ranks; change it or --nproc_per_node"
        )
    share = sequences // world
    most = cfg.micro_batch_tokens // cfg.train_seq_len
    return max(size for size in range(1, share + 1) if share % size == 0 and size <= most)


def micro_batches(tokens, cfg, rt):
    """Return this rank's run of a step's sequences as [(x, y)], int64 (B, T) on the device."""
    sequences = [torch.from_numpy(t).view(-1, cfg.train_seq_len) for t in (tokens[:-1], tokens[1:])]
    size = micro_batch_sequences(cfg, rt.world)
    share = len(sequences[0]) // rt.world
    mine = [t[rt.rank * share :][:share].to(rt.device).split(size) for t in sequences]
    return list(zip(*mine))


# ---- Model ---------------------------------------------------------------------------------------
# An 11-layer GQA transformer with a U-Net of skips, 26,993,766 parameters by default. XSA takes out
# of a head's output what the position's own value already says; VRL and value embeddings hand early
# information to late values; BigramHash and SmearGate give the first layer the previous token for
# nothing. One forward path serves training, scoring and TTT. With `past` it computes only the
# newest rows over cached keys and values, which is what lets a decoder keep pace.

EMBED_CONTEXT = (
    2  # rows before the first that its embedding needs: smear looks 1 back, its bigram 2
)
TABLES = ("embed.tokens", "embed.bigrams", "ve_table")


def role(name):
    """Return a parameter's role: optimizer, quantizer and TTT treat equal roles alike.

    matrix: Muon, int6; projection: Muon, fp16; table: AdamW, int8; vector: AdamW, fp16.
    """
    if name in TABLES:
        return "table"
    if name.endswith("_proj"):
        return "projection"
    leaf = name.split(".")[-1]
    return "matrix" if leaf in ("q", "k", "v", "attn_out", "mlp_in", "mlp_out") else "vector"


def attention(q, k, v):
    """Return causal attention, its last query seeing every key.

    q (B, T, H, d); k, v (B, T', G, d) with T' >= T; result (B, T, H, d).
    """
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    rows, keys = q.size(2), k.size(2)
    visible = None
    if 1 < rows < keys:
        group = q.size(1) // k.size(1)
        k, v = (z.repeat_interleave(group, 1) for z in (k, v))  # fused GQA takes no mask
        visible = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    y = F.scaled_dot_product_attention(
        q, k, v, visible, is_causal=rows == keys, enable_gqa=visible is None
    )
    return y.transpose(1, 2)


def rms_norm(x):
    """Return RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def linear(x, weight):
    """Return x @ weight.T in x's dtype: weights are kept in fp32 and cast where they are used."""
    return F.linear(x, weight.to(x.dtype))


def exclude_self(y, v):
    """Return y (B, T, H, d) less its projection on the position's own value v (B, T, G, d): XSA."""
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    grouped = y.view(*v.shape[:3], -1, v.size(-1))
    along = (grouped * direction).sum(-1, keepdim=True)
    return (grouped - along * direction).view(y.shape)


def rotary_turns(dims, train_seq_len, max_len):
    """Return cosines and sines of the rotary embedding, (2, max_len, dims / 2).

    Su et al., 2021, with the base NTK-scaled where training sequences exceed 1,024 rows.
    """
    base = 10_000.0 * max(1.0, train_seq_len / 1024) ** (dims / (dims - 2))
    rates = base ** (-torch.arange(0, dims, 2).double() / dims)
    angle = torch.arange(max_len).double()[:, None] * rates
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x, turns):
    """Turn the leading dims of x (B, T, heads, d) by `turns` (2, T, dims / 2)."""
    cos, sin = turns[:, :, None].to(x.dtype)
    half = cos.size(-1)
    a = x[..., :half]
    b = x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], dim=-1)


class Embedding(nn.Module):
    """Token table + hashed bigram table, RMS-normed, then smeared with the position before."""

    def __init__(self, cfg):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(cfg.vocab_size, cfg.model_dim) * 0.005)
        self.bigrams = nn.Parameter(torch.zeros(cfg.bigram_vocab_size, cfg.bigram_dim))
        self.bigram_proj = nn.Parameter(torch.empty(cfg.model_dim, cfg.bigram_dim))
        self.bigram_scale = nn.Parameter(torch.tensor(0.05))
        self.smear = nn.Parameter(torch.zeros(cfg.model_dim))

    def bigram_rows(self, tokens):
        """Return each position's row of the bigram table; the last row at position 0."""
        last = self.bigrams.size(0) - 1
        hashed = torch.bitwise_xor(36313 * tokens[:, 1:], 27191 * tokens[:, :-1]) % last
        return F.pad(hashed, (1, 0), value=last)

    def forward(self, tokens, dtype):
        """Embed tokens (B, T) as (B, T, D); the row before the first counts as zeros."""
        bigram = F.embedding(self.bigram_rows(tokens), self.bigrams).to(dtype)
        bigram = self.bigram_scale.to(dtype) * linear(bigram, self.bigram_proj)
        x = rms_norm(F.embedding(tokens, self.tokens).to(dtype) + bigram)
        gate = torch.sigmoid(self.smear).to(dtype)
        return (1 - gate) * x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))


class Block(nn.Module):
    """One transformer layer: attention and MLP on normed, depth-scaled inputs."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.norm_scale = 1 / math.sqrt(layer + 1)
        self.xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        D = cfg.model_dim
        hidden = cfg.mlp_mult * D
        kv = cfg.num_kv_heads * cfg.head_dim
        self.q = nn.Parameter(torch.empty(D, D))
        self.k = nn.Parameter(torch.empty(kv, D))
        self.v = nn.Parameter(torch.empty(kv, D))
        self.attn_out = nn.Parameter(torch.empty(D, D))
        self.mlp_in = nn.Parameter(torch.empty(hidden, D))
        self.mlp_out = nn.Parameter(torch.empty(D, hidden))
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.mix_x = nn.Parameter(torch.ones(D))
        self.mix_x0 = nn.Parameter(torch.zeros(D))
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))

    def forward(self, x, x0, extra_v, turns, past):
        """Return (output (B, T, D), own values (B, T, G, d), (k, v) of all rows so far).

        x, x0 (B, T, D); extra_v is added to the values; turns are these rows'; past: (k, v) of the
        rows before, or None.
        """
        B, T, _ = x.shape
        x = self.mix_x.to(x.dtype) * x + self.mix_x0.to(x.dtype) * x0
        h = rms_norm(x) * self.norm_scale
        q, k, own_v = (linear(h, w).view(B, T, -1, self.head_dim) for w in (self.q, self.k, self.v))
        q = rotate(rms_norm(q), turns) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), turns)
        v = own_v + extra_v
        present = (k, v)
        if past:
            present = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        y = attention(q, *present)
        if self.xsa:
            y = exclude_self(y, v)
        x = x + self.attn_scale.to(x.dtype) * linear(y.reshape(B, T, -1), self.attn_out)
        h = linear(rms_norm(x) * self.norm_scale, self.mlp_in)
        h = F.leaky_relu(h, 0.5).square()
        return x + self.mlp_scale.to(x.dtype) * linear(h, self.mlp_out), own_v, present


class GPT(nn.Module):
    """The model: forward(tokens, past) -> (fp32 logits, keys and values of every layer)."""

    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.softcap = cfg.logit_softcap
        self.kv_heads = cfg.num_kv_heads
        self.vrl_enabled = cfg.vrl_enabled
        self.value_layers = cfg.value_layers
        self.embed = Embedding(cfg)
        longest = max(cfg.train_seq_len, cfg.eval_seq_len)
        turns = rotary_turns(cfg.rope_dims, cfg.train_seq_len, longest)
        self.register_buffer("turns", turns, persistent=False)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(cfg.num_layers // 2, cfg.model_dim))
        if self.value_layers:
            kv = cfg.num_kv_heads * cfg.head_dim
            self.ve_table = nn.Parameter(torch.randn(cfg.vocab_size, cfg.bigram_dim) * 0.01)
            self.ve_proj = nn.Parameter(torch.empty(kv, cfg.bigram_dim))
            self.ve_scale = nn.Parameter(torch.tensor(0.1))
            self.ve_layer_scales = nn.Parameter(torch.ones(len(self.value_layers)))
        if self.vrl_enabled:
            self.vrl_scales = nn.Parameter(torch.zeros(cfg.num_layers - 1))
        for name, p in self.named_parameters():
            if name.endswith(("attn_out", "mlp_out")):
                nn.init.zeros_(p)  # a new block is the identity
            elif role(name) in ("matrix", "projection"):
                nn.init.orthogonal_(p)

    def forward(self, tokens, past=None):
        """Return (logits (B, T, V) fp32, [(k, v)] per layer) of tokens (B, T), int64.

        With `past`, the first K rows' keys and values, `tokens` begins EMBED_CONTEXT tokens before
        row K, and logits come from row K on.
        """
        x = self.embed(tokens, self.dtype)
        known = 0
        if past:
            known = past[0][0].size(1)
            x = x[:, EMBED_CONTEXT:]
            tokens = tokens[:, EMBED_CONTEXT:]
        turns = self.turns[:, known:][:, : x.size(1)]
        x0 = x
        v0 = None  # the first layer's values
        skips = []
        present = []
        half = len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if half <= i < 2 * half:
                x = x + self.skip_weights[i - half].to(x.dtype) * skips.pop()
            extra_v = self.value_embedding(i, tokens, x.dtype) if i in self.value_layers else 0
            if self.vrl_enabled and i:
                extra_v = extra_v + self.vrl_scales[i - 1].to(x.dtype) * v0
            x, own_v, kv = block(x, x0, extra_v, turns, past[i] if past else None)
            if i == 0:
                v0 = own_v
            if i < half:
                skips.append(x)
            present.append(kv)
        z = linear(rms_norm(x), self.embed.tokens).float()
        return self.softcap * torch.tanh(z / self.softcap), present

    def value_embedding(self, layer, tokens, dtype):
        """Return what layer `layer` adds to the values at tokens (B, T): (B, T, G, d)."""
        scale = self.ve_scale * self.ve_layer_scales[self.value_layers.index(layer)]
        values = linear(F.embedding(tokens, self.ve_table).to(dtype), self.ve_proj)
        return scale.to(dtype) * values.unflatten(-1, (self.kv_heads, -1))


def new_model(cfg, rt, weights=None):
    """Return a model on the device: of these weights, or of SEED's, alike on all ranks."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, rt.dtype)
    if weights:
        model.load_state_dict({name: w for name, w in weights.items() if name != "mixer"})
    return model.to(rt.device)


# ---- Complementary objective ---------------------------------------------------------------------
# What bigram statistics predict the mixer will predict too, so the model is to care less for it:
# weight 1 - alpha * p(token | previous), never below 0.1 (openai/parameter-golf PR 1033), from
# counts before the step.


class BigramCounts:
    """Exact counts of (previous, next) over the training stream so far, alike on every rank."""

    def __init__(self, vocab_size, rt):
        self.rt = rt
        self.vocab_size = vocab_size
        self.counts = torch.zeros(vocab_size**2, dtype=torch.int32, device=rt.device)
        self.totals = torch.zeros(vocab_size, dtype=torch.int64, device=rt.device)

    def weights(self, x, y, alpha):
        """Return max(0.1, 1 - alpha * count(x, y) / (total(x) + 1)), fp32 (B, T) like x and y."""
        p = self.counts[x * self.vocab_size + y].double() / (self.totals[x] + 1)
        return (1 - alpha * p).clamp(min=0.1).float()

    def add(self, batches):
        """Count the pairs of a step's batches over all ranks, once the step has used weights()."""
        pairs = torch.cat([(x * self.vocab_size + y).flatten() for x, y in batches])
        new = torch.bincount(pairs, minlength=len(self.counts)).int()
        self.counts += self.rt.sum_over_ranks(new)
        self.totals = self.counts.view(self.vocab_size, self.vocab_size).sum(1)


# ---- Optimizers, schedules, averaging ------------------------------------------------------------
# torch's own: Muon orthogonalizes the momentum of each matrix (Jordan et al., 2024), AdamW with
# fp32 state takes tables and vectors. Schedules are pure functions of step and clock.


def new_optimizers(model, cfg):
    """Return [Muon, AdamW]; a group's rate is its `peak_lr` times the schedule's factor."""
    rates = dict(matrix=cfg.matrix_lr, table=cfg.tied_embed_lr, vector=cfg.scalar_lr)
    groups = {name: dict(params=[], peak_lr=rate) for name, rate in rates.items()}
    groups["projection"] = groups["matrix"]
    for name, p in model.named_parameters():
        groups[role(name)]["params"].append(p)
    adam = [groups["table"], groups["vector"]]
    fused = next(model.parameters()).is_cuda
    return [
        torch.optim.Muon([groups["matrix"]], weight_decay=cfg.muon_wd, momentum=cfg.muon_momentum),
        torch.optim.AdamW(adam, betas=(0.9, 0.95), eps=1e-8, weight_decay=cfg.adam_wd, fused=fused),
    ]


def lr_scale(step, elapsed_s, limit_s, cfg):
    """Return the rates' factor: 1, then linear to 0 over the last WARMDOWN_ITERS steps.

    What is left is the lesser of ITERATIONS and of what the time limit allows at this pace.
    """
    steps_left = cfg.iterations - step
    if step:
        steps_left = min(steps_left, (limit_s - elapsed_s) / (elapsed_s / step))
    return min(1.0, max(0.0, steps_left / max(cfg.warmdown_iters, 1)))


def muon_momentum(step, cfg):
    """Return Muon's momentum: linear from 0.92 (or MUON_MOMENTUM, if less) to MUON_MOMENTUM."""
    start = min(0.92, cfg.muon_momentum)
    done = min(1.0, step / cfg.muon_momentum_warmup_steps)
    return start + (cfg.muon_momentum - start) * done


class WeightAverage:
    """What replaces the weights at the end: SWA if it is on, else EMA, else nothing.

    Protocol: after_step() after each optimizer step, install() once.
    """

    def __init__(self, model, cfg):
        self.cfg = cfg
        self.params = list(model.parameters())
        self.mean = [p.detach().clone() for p in self.params]
        self.snapshots = 0  # of SWA

    @torch.no_grad()
    def after_step(self, step, scale):
        """Take in the weights after step `step` (from 1) at learning-rate factor `scale`."""
        if not self.cfg.swa_enabled:
            decay = min(self.cfg.ema_decay, step / (step + 10))
            torch._foreach_lerp_(self.mean, self.params, 1 - decay)
        elif scale < 0.2 and step % self.cfg.swa_every == 0:
            self.snapshots += 1
            torch._foreach_lerp_(self.mean, self.params, 1 / self.snapshots)

    @torch.no_grad()
    def install(self):
        """Replace the weights by their average, if there is one."""
        if self.snapshots or (self.cfg.ema_decay and not self.cfg.swa_enabled):
            torch._foreach_copy_(self.params, self.mean)


# ---- Training loop -------------------------------------------------------------------------------
# A step: micro-batches forward and backward, gradients averaged over ranks in one flat buffer, a
# check that loss and gradient are finite *before* any weight moves, clip, two optimizers, average.
# Rank 0's clock stops all ranks at one step. Kernels are compiled on random tokens before it
# starts, then all is put back.

CALIBRATION_SHARE = (
    0.03  # of the training time is kept for the mixer's calibration, where there is one
)


@dataclass
class TrainResult:
    """What training did, and why it ended early if it did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    warmup_seconds: float = 0.0
    calibration_seconds: float = 0.0
    stopped: str = ""  # empty: all steps were taken, or the time was up


def training_loss(model, rt):
    """Return loss(x, y, weights) -> (weighted, plain) mean, nats a token, compiled where that pays.

    x, y int64 (B, T); weights fp32 (B, T), or None for ones.
    """

    def loss(x, y, weights):
        logits = model(x)[0].flatten(0, 1)
        nats = F.cross_entropy(logits, y.flatten(), reduction="none")
        plain = nats.mean()
        weighted = plain if weights is None else (weights.flatten() * nats).mean()
        return weighted, plain.detach()

    return rt.compiled(loss)


class Trainer:
    """The state of a training run and one step of it."""

    def __init__(self, model, loss, cfg, rt):
        self.model = model
        self.loss = loss
        self.cfg = cfg
        self.rt = rt
        self.optimizers = new_optimizers(model, cfg)
        self.average = WeightAverage(model, cfg)
        self.bigrams = BigramCounts(cfg.vocab_size, rt) if cfg.complement_alpha else None

    def gradients(self, batches):
        """Fill .grad with the weighted loss's gradient over all ranks; return (weighted, plain)."""
        totals = torch.zeros(2, device=self.rt.device)
        for x, y in batches:
            weights = None
            if self.bigrams:
                weights = self.bigrams.weights(x, y, self.cfg.complement_alpha)
            weighted, plain = self.loss(x, y, weights)
            (weighted / len(batches) / self.rt.world).backward()
            totals += torch.stack([weighted.detach(), plain]) / len(batches) / self.rt.world
        params = list(self.model.parameters())
        flat = self.rt.sum_over_ranks(torch.cat([*(p.grad.flatten() for p in params), totals]))
        for p, grad in zip(params, flat[:-2].split([p.numel() for p in params])):
            p.grad = grad.view_as(p)
        return flat[-2:].tolist()

    def step(self, batches, step, scale):
        """Take one optimizer step; return (weighted, plain) loss.

        UserError, before any weight has moved, if loss or gradient is not finite.
        """
        losses = self.gradients(batches)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if not all(map(math.isfinite, [*losses, norm.item()])):
            raise UserError(
                f"step {step + 1}: loss {losses[1]}, gradient norm {norm.item()}; "
                "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR"
            )
        if self.cfg.grad_clip_norm:
            limit = self.cfg.grad_clip_norm
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        self.optimizers[0].param_groups[0]["momentum"] = muon_momentum(step, self.cfg)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.bigrams:
            self.bigrams.add(batches)
        self.average.after_step(step + 1, scale)
        return losses


def warm_up(model, loss, cfg, rt):
    """Compile every kernel of a step on random tokens; the weights are what they were before."""
    weights = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, loss, cfg, rt)
    for step in range(cfg.warmup_steps):
        random = np.random.default_rng(step)
        tokens = random.integers(0, cfg.vocab_size, cfg.train_batch_tokens + 1)
        trainer.step(micro_batches(tokens, cfg, rt), step, scale=0.1)
    model.load_state_dict(weights)


def train(model, cfg, rt, log, held_out):
    """Train `model` in place on all shards but their last `held_out` tokens; return a TrainResult.

    NaN, infinity, a bad shard, a lost rank and signals end training early: the result says why, and
    the model has the last good weights. In every case they are averaged as EMA_DECAY and
    SWA_ENABLED say.
    """
    stream = TrainStream(cfg, held_out)
    result = TrainResult()
    limit_s = cfg.max_wallclock_seconds or math.inf
    if held_out:
        limit_s *= 1 - CALIBRATION_SHARE
    loss = training_loss(model, rt)
    if cfg.warmup_steps:
        began_s = time.perf_counter()
        warm_up(model, loss, cfg, rt)
        result.warmup_seconds = rt.clock() - began_s
        log(
            f"warm-up: {cfg.warmup_steps} steps on random tokens, "
            f"{result.warmup_seconds:.1f} s, not timed"
        )
    trainer = Trainer(model, loss, cfg, rt)
    start_s = time.perf_counter()
    try:
        while result.steps < cfg.iterations:
            scale = lr_scale(result.steps, result.seconds, limit_s, cfg)
            batches = micro_batches(stream.take(cfg.train_batch_tokens), cfg, rt)
            losses = trainer.step(batches, result.steps, scale)
            result.steps += 1
            result.tokens += cfg.train_batch_tokens
            result.seconds = rt.from_main(time.perf_counter() - start_s)
            per_step_s = result.seconds / result.steps
            if result.steps % cfg.log_every == 0 or result.steps in (1, cfg.iterations):
                steps_left_s = (cfg.iterations - result.steps) * per_step_s
                eta_s = max(0.0, min(steps_left_s, limit_s - result.seconds))
                log(
                    f"step {result.steps}/{cfg.iterations}  loss {losses[1]:.4f} "
                    f"(weighted {losses[0]:.4f})  lr x{scale:.3f}  "
                    f"{result.tokens / result.seconds:,.0f} tokens/s  "
                    f"{result.seconds:.0f} s  ETA {eta_s:.0f} s"
                )
            if result.seconds + per_step_s > limit_s:
                break
    except FORESEEN as error:
        result.stopped = str(error) or f"interrupted at step {result.steps}"
    trainer.average.install()
    if stream.epochs:
        log(
            f"note: the training shards were read {stream.epochs} time(s) over; "
            "more shards would help"
        )
    return result


# ---- Quantization --------------------------------------------------------------------------------
# Block matrices become int6 (-31..31) with one fp16 scale a row, embedding tables int8, the rest
# fp16. One number governs the size, `coarseness`: a row's top level stands at coarseness times its
# root mean square. Doubling it costs each weight one bit of precision and saves about one bit of
# entropy, which LZMA finds; it is raised until code + artifact just fit the cap.

INT6_MAX = 31
INT8_MAX = 127
FINEST = 4.0  # below it a Gaussian row loses more to clipping than it gains in precision
COARSEST = 64.0
KINDS = {"matrix": "int6", "table": "int8", "projection": "fp16", "vector": "fp16"}


def quantize(w, limit, row_max):
    """Return (int8 levels in +-limit (rows, cols), fp16 row scales (rows,)) of w (rows, cols).

    row_max (rows,) is the value of the top level; what is beyond it is clipped.
    """
    scale = (row_max / limit).clamp(2.0**-24, 65_504.0).half()
    levels = (w / scale.float()[:, None]).round().clamp(-limit, limit)
    return levels.to(torch.int8), scale


def encode_tensor(name, w, coarseness):
    """Return the tensors to store for one parameter: levels and row scales, or fp16 values."""
    w = w.detach().float()
    match KINDS[role(name)]:
        case "int6":
            return quantize(w, INT6_MAX, coarseness * w.square().mean(1).sqrt())
        case "int8":
            return quantize(w, INT8_MAX, w.abs().amax(1))
    return (w.half(),)


def decode_tensor(stored):
    """Return the fp32 parameter that encode_tensor stored."""
    values, *scales = (t.float() for t in stored)
    return values * scales[0][:, None] if scales else values


def quantized(weights, coarseness):
    """Return {name: fp32 tensor}: the weights that an artifact of this coarseness gives back."""
    return {n: decode_tensor(encode_tensor(n, w, coarseness)) for n, w in weights.items()}


def estimate_coarseness(weights, budget_bytes):
    """Return the coarseness that gives budget_bytes if rows are Gaussian.

    A row then costs log2(4.133 * 31 / coarseness) bits a weight; LZMA adds 3 %.
    """
    counts = {"int6": 0, "int8": 0, "fp16": 0}
    for name, w in weights.items():
        counts[KINDS[role(name)]] += w.numel()
    left = 8 * budget_bytes / 1.03 - 7 * counts["int8"] - 15 * counts["fp16"]
    bits = left / max(counts["int6"], 1)
    return min(max(4.133 * INT6_MAX / 2 ** min(max(bits, 0), 30), FINEST), COARSEST)


# ---- Artifact ------------------------------------------------------------------------------------
#   8 bytes  magic "PGOLFART"        body, LZMA2 raw stream (lc=0, lp=0, pb=0, preset 9e) of
#   4 bytes  format version            4 bytes  length of the header
#   8 bytes  length of the body        JSON     settings, tokenizer, [name, kind, shape] a tensor
#  32 bytes  SHA-256 of the body       tensors  in that order: levels int8 then scales fp16, or fp16
# Little-endian. Reading executes nothing. One level a byte: packed to 6 bits they would hide from
# LZMA.

WEIGHTS = "weights.pt"  # what a run keeps of its training until all is done
ARTIFACT_MAGIC = b"PGOLFART"
ARTIFACT_VERSION = 1
ARTIFACT_HEAD = struct.Struct("<8sIQ32s")
LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
]


@dataclass(frozen=True)
class Artifact:
    """An artifact as read from its file: all that scoring and decoding need besides this script."""

    path: Path
    size_bytes: int
    digest: bytes  # SHA-256 of the file
    settings: dict
    table: TokenTable
    weights: dict  # {name: fp32 tensor}: the model's, and "mixer"

    def overridden(self, cfg):
        """Return the sorted names of the settings that are not the artifact's own in `cfg`."""
        differing = {n for n, v in self.settings.items() if getattr(cfg, n) != v}
        return sorted(name.upper() for name in differing - {"preset"})


def stored_settings(cfg):
    """Return the settings that an artifact holds: all but where things are on this machine."""
    return {n: getattr(cfg, n) for n, g in GROUPS.items() if g != RunSettings or n == "preset"}


def pack_artifact(weights, cfg, table, coarseness):
    """Return an artifact's bytes; the same weights and settings give the same bytes.

    UserError if a parameter is not finite, or beyond fp16 where it is stored as such.
    """
    index = []
    payload = []
    for name in sorted(weights, key=lambda name: (KINDS[role(name)], name)):
        stored = encode_tensor(name, weights[name], coarseness)
        if not all(bool(t.isfinite().all()) for t in (weights[name], *stored)):
            raise UserError(f"parameter {name} is not finite or beyond fp16; nothing was written")
        index.append([name, KINDS[role(name)], list(weights[name].shape)])
        payload += [t.contiguous().cpu().numpy().tobytes() for t in stored]
    tokenizer = {"sha256": table.digest, **asdict(table)}
    contents = {"settings": stored_settings(cfg), "tensors": index, "tokenizer": tokenizer}
    header = json.dumps(contents, sort_keys=True).encode()
    raw = struct.pack("<I", len(header)) + header + b"".join(payload)
    body = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    digest = hashlib.sha256(body).digest()
    return ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(body), digest) + body


def read_artifact(path):
    """Return the Artifact in a file; UserError if it is none or damaged."""
    data = read_file(path, "ARTIFACT_PATH: ", "; train first")
    head = data[: ARTIFACT_HEAD.size].ljust(ARTIFACT_HEAD.size, b"\0")
    body = data[ARTIFACT_HEAD.size :]
    magic, version, length, digest = ARTIFACT_HEAD.unpack(head)
    if magic != ARTIFACT_MAGIC:
        raise UserError(f"artifact {path} is not an artifact of this program")
    if version != ARTIFACT_VERSION:
        raise UserError(f"artifact {path} has format version {version}, not {ARTIFACT_VERSION}")
    if len(body) != length:
        counts = f"{len(body):,} bytes of {length:,}"
        raise UserError(f"artifact {path} is cut or padded: {counts}; copy it again")
    if hashlib.sha256(body).digest() != digest:
        raise UserError(f"artifact {path} is corrupt: its checksum differs; copy it again")
    raw = lzma.decompress(body, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    header_end = 4 + struct.unpack_from("<I", raw)[0]
    header = json.loads(raw[4:header_end])
    reader = io.BytesIO(raw[header_end:])

    def take(dtype, shape):
        data = reader.read(math.prod(shape) * np.dtype(dtype).itemsize)
        return torch.from_numpy(np.frombuffer(data, dtype=dtype).reshape(shape).copy())

    weights = {}
    for name, kind, shape in header["tensors"]:
        layout = [("<f2", shape)] if kind == "fp16" else [("i1", shape), ("<f2", shape[:1])]
        weights[name] = decode_tensor([take(*part) for part in layout])
    tokenizer = header["tokenizer"]
    table = TokenTable(tuple(tokenizer["pieces"]), tokenizer["kinds"], tokenizer["bos_id"])
    whole = hashlib.sha256(data).digest()
    return Artifact(Path(path), len(data), whole, header["settings"], table, weights)


def code_bytes():
    """Return the bytes of this script, which count against the cap."""
    return len(Path(__file__).read_bytes())


def fit_artifact(weights, cfg, table, log):
    """Return the bytes of the finest artifact found that fits the cap, else of the last one tried.

    A secant in coarseness: a level of a matrix costs about one bit less where it doubles.
    """
    budget = cfg.size_limit_bytes - code_bytes()
    matrices = [w for name, w in weights.items() if role(name) == "matrix"]
    bytes_a_bit = sum(w.numel() for w in matrices) / 8
    coarseness = estimate_coarseness(weights, budget)
    best = b""
    for _ in range(6):
        data = pack_artifact(weights, cfg, table, coarseness)
        log(f"quantize: coarseness {coarseness:.4f} gives {len(data):,} of {budget:,} bytes")
        fits = len(data) <= budget
        if fits and len(data) > len(best):
            best = data
        done = coarseness == FINEST or len(data) >= 0.998 * budget
        if coarseness == COARSEST or (fits and done):
            break
        coarseness *= 2 ** ((len(data) - 0.999 * budget) / bytes_a_bit)
        coarseness = min(max(coarseness, FINEST), COARSEST)
    return best or data


# ---- N-gram history ------------------------------------------------------------------------------
# Where the stream has been before. For each kind of context (the last 8, 5, 3, 2 tokens, the last
# one, the word so far) there are hash chains, as in LZ77: prev[i] is the last earlier position
# whose context has the same hash. Walking from t - 1 yields what is before t and nothing later, so
# a whole block may be linked before its first position is predicted. Contexts are compared token by
# token, so what is found is real. How the stream was cut into blocks changes nothing. Memory: 28
# bytes a token, with a quarter to spare, and 24 a hash value.

CONTEXT_LENGTHS = (8, 5, 3, 2, 1, 8)  # in tokens; the last is the word's, up to its beginning
CONTEXTS = len(CONTEXT_LENGTHS)


class NgramHistory:
    """The stream so far, and where each context ended before.

    Protocol: extend(prefix) whenever tokens are known, then occurrences(ends) of linked positions.
    Where `lanes` texts run side by side, the token before position t is at t - lanes.
    """

    def __init__(self, cfg, word_begins, device, lanes=1):
        self.recent = cfg.ngram_recent
        self.device = device
        self.lanes = lanes
        self.word_begins = torch.as_tensor(word_begins, device=device)  # bool (V,)
        self.lengths = torch.tensor(CONTEXT_LENGTHS, device=device).clamp(max=cfg.ngram_order - 1)
        self.size = 0  # tokens so far
        self.tokens = torch.zeros(0, dtype=torch.int32, device=device)  # with room to grow
        self.prev = torch.zeros(CONTEXTS, 0, dtype=torch.int32, device=device)
        slots = 1 << cfg.ngram_hash_bits
        self.heads = torch.full((CONTEXTS, slots), -1, dtype=torch.int32, device=device)

    def contexts(self, ends):
        """Return the contexts that end at `ends` (C, n): int32 (C, n, 8), newest token first.

        -1 beyond a context's length, its word's beginning or the stream's.
        """
        back = torch.arange(max(CONTEXT_LENGTHS), device=self.device)
        positions = ends[..., None] - back * self.lanes
        tokens = self.tokens[positions.clamp(min=0)]
        inside = (back < self.lengths[:, None, None]) & (positions >= 0)
        begins = self.word_begins[tokens[-1]].int()
        inside[-1] &= begins.cumsum(-1) - begins == 0
        return torch.where(inside, tokens, -1)

    def hashes(self, ends):
        """Return the slot in `heads` of each context that ends at `ends` (C, n)."""
        h = torch.zeros_like(ends)
        for tokens in self.contexts(ends).long().unbind(-1):
            h = (h ^ tokens) * -7046029254386353131  # odd: 0x9E3779B97F4A7C15 as int64
            h = h ^ ((h >> 29) & 0x7FFFFFFFF)
        return h & (self.heads.size(1) - 1)

    def extend(self, prefix):
        """Link the tokens of `prefix`, the stream from its start, that are not linked yet."""
        first = self.size
        self.size = max(first, len(prefix))
        if first == self.size:
            return
        if self.size > len(self.tokens):
            room = self.size + self.size // 4 + 1024 - len(self.tokens)
            self.tokens = F.pad(self.tokens, (0, room))
            self.prev = F.pad(self.prev, (0, room))
        self.tokens[first : self.size] = prefix[first:].to(self.device)

        # Sorted by slot, then position: a context's predecessor is its neighbour, or the slot's
        # head.
        ends = torch.arange(first, self.size, device=self.device).expand(CONTEXTS, -1)
        slot, order = torch.sort(self.hashes(ends), stable=True)
        ends = ends.gather(1, order)
        changes = slot[:, 1:] != slot[:, :-1]
        is_first = F.pad(changes, (1, 0), value=True)
        is_last = F.pad(changes, (0, 1), value=True)
        neighbour = F.pad(ends[:, :-1], (1, 0)).int()
        self.prev.scatter_(1, ends, torch.where(is_first, self.heads.gather(1, slot), neighbour))
        kind, newest = is_last.nonzero(as_tuple=True)
        self.heads[kind, slot[kind, newest]] = ends[kind, newest].int()

    def occurrences(self, ends):
        """Return where the contexts that end at `ends` (R,) ended before: int64 (R, C, M).

        Of the last M = NGRAM_RECENT links of each chain, newest first, those that hold the same
        context and whose next token is known; -1 for the others.
        """
        known = ends - ends % self.lanes  # the first position of a row of lanes
        at = ends.expand(CONTEXTS, -1)
        contexts = self.contexts(at)
        found = []
        for _ in range(self.recent):
            at = torch.where(at >= 0, self.prev.gather(1, at.clamp(min=0)).long(), -1)
            same = (self.contexts(at) == contexts).all(-1)
            found.append(torch.where(same & (at < known), at, -1))
        return torch.stack(found, -1).transpose(0, 1)


# ---- Mixers and commitment -----------------------------------------------------------------------
# A probability becomes an integer before anybody looks at the token: freq >= 1, summing to 2^24
# over the vocabulary, so that "normalized" is an equality and a range coder can use the numbers
# that were scored. The learned mixer re-weights the model's distribution p in the log domain. The
# tokens that followed a position's contexts before are its candidates; a network of one hidden
# layer turns what speaks for each into a boost b, and q = softmax(log p + b): p, where nothing
# speaks. The gradient of -log q[x] in b[v] is q[v] - [v = x]: learning is two small products, once
# a block is scored; gradients add up as integers, the same on any number of ranks.

TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS
FIXED_POINT_SCALE = 2.0**36  # of gradients that are summed as int64
MIXER_HIDDEN = 32
MIXER_FEATURES = 4 * CONTEXTS + 3


def commit(p):
    """Return frequencies int32 (R, V) of probabilities p (R, V), float64.

    Each is at least 1 and each row sums to exactly 2^24: every token gets 1 plus the floor of its
    share of the rest, and the most likely one also what the floors leave.
    """
    share = p / p.sum(-1, keepdim=True) * (TOTAL - p.size(-1))
    freqs = share.floor().long() + 1
    left = TOTAL - freqs.sum(-1, keepdim=True)
    freqs.scatter_add_(1, p.argmax(-1, keepdim=True), left)
    return freqs.int()


class Evidence(NamedTuple):
    """What speaks for the candidates of R positions, one candidate a context and occurrence.

    features, by row, for each context 0..C-1 and then for the model:
        0..C-1      log odds of the candidate's share of the context's occurrences
        C..2C-1     inverse rank of its last occurrence there: 1, 1/2, ...
        2C..3C-1    log2 of the distance to that occurrence, over 8
        3C..4C-1    1 where the model itself sees that occurrence
        4C          how far its log p lies below that of the model's favourite, over 4
        4C+1        log p of the favourite, over 2
        4C+2        1
    """

    tokens: Tensor  # int64 (R, J), J = C * M
    distinct: Tensor  # bool (R, J): a token's first slot, the only one that counts
    features: Tensor  # fp32 (R, F, J)


class Batch(NamedTuple):
    """R input rows that go through the model at once; row i predicts position i + lanes."""

    index: int  # in its chunk: decides the rank
    rows: Tensor  # (R,) positions of the rows
    window_start: Tensor  # (R,) first row that each of them sees
    committed: slice  # those of the R that are committed now; the others keep the shape


def mix_entropy(p, matches, following, cfg):
    """Return (1 - alpha) p + alpha counts / total (R, V): the rule of PR 1033, on all tokens.

    alpha = base + range * sigmoid(2 (H - center)), H the entropy of p (R, V). The counts are of the
    longest context, no word's, that was seen MIN_COUNT times; matches, following (R, C, M).
    """
    enough = (matches[:, :-1] >= 0).sum(2) >= cfg.min_count
    longest = enough.int().argmax(1)[:, None, None].expand(-1, 1, matches.size(2))
    tokens = following.gather(1, longest)[:, 0]
    real = (matches.gather(1, longest)[:, 0] >= 0).double()
    counts = torch.zeros_like(p).scatter_add_(1, tokens, real)
    entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    alpha = cfg.alpha_base + cfg.alpha_range * torch.sigmoid(2 * (entropy - cfg.alpha_center))
    alpha = alpha * enough.any(1, keepdim=True)
    return (1 - alpha) * p + alpha * counts / real.sum(1, keepdim=True).clamp(min=1)


def gather_evidence(p, matches, following, batch, lanes=1):
    """Return the Evidence for R positions from what their contexts were followed by.

    p (R, V) float64, the model's; matches, following (R, C, M): occurrences, and the tokens after
    them. Shapes are fixed, for equal rounding.
    """
    tokens = following.flatten(1)
    real = matches >= 0
    same = (
        (following[..., None] == tokens[:, None, None]) & real[..., None]
    ).byte()  # (R, C, M, J)
    slots = torch.arange(tokens.size(1), device=tokens.device)
    distinct = (same.flatten(1, 2).argmax(1) == slots) & real.flatten(1)

    count = same.sum(2)  # (R, C, J)
    total = real.sum(2)[..., None]
    seen = count > 0
    rank = same.argmax(2)
    last = matches.gather(2, rank)
    distance = batch.rows[:, None, None] - last
    log_odds = ((count + 0.4) / (total - count + 0.4)).log() * (total > 0)
    log_distance = seen * (distance / lanes).clamp(min=1).log2() / 8
    in_window = (last >= batch.window_start[:, None, None]) & (distance % lanes == 0)
    by_context = [log_odds, seen / (1 + rank), log_distance, seen & in_window]

    log_p = p.log().float()
    top = log_p.amax(1, keepdim=True)
    own = log_p.gather(1, tokens)
    by_model = [(top - own) / 4, top.expand_as(own) / 2, torch.ones_like(own)]
    features = torch.cat([*(f.float() for f in by_context), torch.stack(by_model, 1)], 1)
    return Evidence(tokens, distinct, features)


def new_mixer_weights():
    """Return the learned mixer's weights before calibration, fp32 (hidden, F + 1)."""
    weights = torch.zeros(MIXER_HIDDEN, MIXER_FEATURES + 1)
    generator = torch.Generator().manual_seed(0)
    weights[:, :-1].normal_(std=MIXER_FEATURES**-0.5, generator=generator)
    return weights


class LearnedMixer:
    """The scorer network and its Adam state. Protocol, for each block: mix, remember, ..., learn.

    `weights` (hidden, F + 1): the hidden layer, and the output weights in the last column. While it
    is calibrated its rate falls from 10 MIXER_LR to MIXER_LR over plan.calibration_blocks.
    """

    def __init__(self, weights, cfg, rt, plan):
        self.rt = rt
        self.plan = plan
        self.lr = cfg.mixer_lr
        self.weights = weights.to(rt.device, copy=True)
        self.optimizer = torch.optim.Adam([self.weights], betas=(0.9, 0.99))
        self.blocks = 0  # learned from
        self.remembered = {}  # {batch: [[*Evidence, q of its tokens, positions]]} for learn

    def mix(self, p, evidence):
        """Return q (R, V) float64: p (R, V) with its candidates boosted."""
        hidden = (self.weights[:, :-1] @ evidence.features).clamp(min=0)
        boost = (self.weights[:, -1, None] * hidden).sum(1) * evidence.distinct
        return torch.softmax(p.log().scatter_add(1, evidence.tokens, boost.double()), -1)

    def remember(self, batch, evidence, q, positions):
        """Keep what was said of the committed positions until their tokens are scored; q (R, V)."""
        parts = (*evidence, q.gather(1, evidence.tokens), positions)
        kept = [part[batch.committed].clone() for part in parts]
        self.remembered.setdefault(batch.index, []).append(kept)

    def gradient(self, evidence, q, targets):
        """Return d(sum over rows of -log q[target]) / d(weights), fp32; q (R, J), of the tokens."""
        hit = (evidence.tokens == targets[:, None]).float()
        error = (q.float() - hit) * evidence.distinct
        hidden = (self.weights[:, :-1] @ evidence.features).clamp(min=0)
        back = error[:, None] * self.weights[:, -1, None] * (hidden > 0)
        first = torch.einsum("rhj,rfj->hf", back, evidence.features)
        output = torch.einsum("rhj,rj->h", hidden, error)
        return torch.cat([first, output[:, None]], 1)

    def learn(self, tokens):
        """Take one Adam step on the remembered block, now that the stream's `tokens` are scored."""
        total = torch.zeros(self.weights.shape, dtype=torch.int64, device=self.rt.device)
        for parts in self.remembered.values():  # a batch each, however it was cut
            *evidence, q, positions = map(torch.cat, zip(*parts))
            gradient = self.gradient(Evidence(*evidence), q, tokens[positions])
            total += (gradient.double() * FIXED_POINT_SCALE).round().long()
        scale = FIXED_POINT_SCALE * self.plan.block
        self.weights.grad = (self.rt.sum_over_ranks(total).double() / scale).float()
        left = 0.0
        if self.plan.calibration_blocks:
            left = max(0.0, 1 - self.blocks / self.plan.calibration_blocks)
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 + 9 * left)
        self.optimizer.step()
        self.blocks += 1
        self.remembered = {}


class Mixture:
    """The n-gram history, and the rule (MIXER) by which it re-weights the model's distribution."""

    def __init__(self, weights, cfg, table, rt, plan):
        self.cfg = cfg
        self.lanes = max(plan.lanes, 1)
        self.history = NgramHistory(cfg, table.word_begins, rt.device, self.lanes)
        self.learner = LearnedMixer(weights, cfg, rt, plan) if cfg.mixer == "learned" else None

    def mix(self, p, prefix, batch):
        """Return q (R, V): p (R, V) re-weighted by what `prefix` says of the batch's contexts."""
        self.history.extend(prefix)
        rows = batch.rows[batch.committed]
        matches = batch.rows.new_full((len(p), CONTEXTS, self.cfg.ngram_recent), -1)
        matches[batch.committed] = self.history.occurrences(rows)
        following = self.history.tokens[
            matches + self.lanes
        ].long()  # any token, where there is none
        if self.learner is None:
            return mix_entropy(p, matches, following, self.cfg)
        evidence = gather_evidence(p, matches, following, batch, self.lanes)
        q = self.learner.mix(p, evidence)
        self.learner.remember(batch, evidence, q, batch.rows + self.lanes)
        return q

    def learn(self, prefix):
        """Let a learned rule take its step on the block that ends `prefix`."""
        if self.learner:
            self.history.extend(prefix)
            self.learner.learn(self.history.tokens)


# ---- Test-time training --------------------------------------------------------------------------
# After a chunk has been scored the model trains on it; the Polyak average of the weights scores the
# next. The first TTT_FREEZE_BLOCKS blocks' matrices stay. Each fixed micro-batch's summed gradient
# is rounded to int64: integers add up the same on any ranks. The schedule's length is the
# artifact's setting, not the text's.

TTT_MICRO_BATCH_SEQUENCES = 2


class TestTimeTrainer:
    """Adapts a copy of `model` to scored chunks; `model` becomes the Polyak average that scores."""

    def __init__(self, model, cfg, table, rt):
        self.cfg = cfg
        self.table = table
        self.rt = rt
        self.chunks = 0  # adapted to
        self.live = copy.deepcopy(model)
        names = [name for name, p in model.named_parameters() if self.adapts(name, p)]
        self.params = [self.live.get_parameter(name) for name in names]
        self.average = [model.get_parameter(name) for name in names]
        for name, p in self.live.named_parameters():
            p.requires_grad_(name in names)
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0, weight_decay=0.0, foreach=True)
        self.forward = rt.compiled(self.live)

    def adapts(self, name, p):
        """Return whether TTT moves a parameter: vectors, token table, last blocks' matrices."""
        if role(name) == "matrix":
            return int(name.split(".")[1]) >= self.cfg.ttt_freeze_blocks
        return p.ndim < 2 or name == "embed.tokens"

    def rate(self):
        """Return the chunk's rate: cosine to 0, times 1 to 3 in the schedule's first 30 %."""
        done = min(1.0, self.chunks / self.cfg.ttt_schedule_chunks)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.cfg.ttt_lr * cosine * (1 + 2 * min(1.0, done / 0.3))

    def adapt_chunk(self, tokens):
        """Train on a scored chunk, int64 (TTT_CHUNK_TOKENS + 1,), from the last token before it."""
        lr = self.rate()
        self.chunks += 1
        if lr == 0:
            return
        weights = torch.from_numpy(self.table.count_bytes(tokens.numpy()))
        total_weight = max(1, int(weights.sum()))
        x, y, w = (
            t.to(self.rt.device).view(-1, self.cfg.eval_seq_len).split(TTT_MICRO_BATCH_SEQUENCES)
            for t in (tokens[:-1], tokens[1:], weights)
        )
        batches = list(zip(x, y, w))[self.rt.rank :: self.rt.world]
        for _ in range(self.cfg.ttt_epochs):
            self._step(batches, lr, total_weight)

    def _step(self, batches, lr, total_weight):
        """Take one AdamW step on the byte-weighted mean loss over all ranks, then average."""
        sizes = [p.numel() for p in self.params]
        total = torch.zeros(sum(sizes), dtype=torch.int64, device=self.rt.device)
        for x, y, w in batches:
            logits = self.forward(x)[0].flatten(0, 1)
            nats = F.cross_entropy(logits, y.flatten(), reduction="none")
            grads = torch.autograd.grad((nats * w.flatten()).sum(), self.params)
            flat = [(g.flatten().double() * FIXED_POINT_SCALE).round().long() for g in grads]
            total += torch.cat(flat)
        self.rt.sum_over_ranks(total)
        mean = (total.double() / (FIXED_POINT_SCALE * total_weight)).float()
        for p, grad in zip(self.params, mean.split(sizes)):
            p.grad = grad.view_as(p)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.params, 1 - self.cfg.polyak_decay)


# ---- Engines -------------------------------------------------------------------------------------
# From rows to logits. Positions are numbered as in the stream; position 0 is BOS, which a decoder
# knows; input row i predicts position i + 1. Five clocks run over them: a *window* of W rows, of
# which the first scores all its rows and each later one its last S (a *tile*); a *batch* of windows
# that go through the model at once; a *block* of positions after which the mixer learns; a *chunk*
# after which TTT does. Blocks and batches divide chunks.


class Plan(NamedTuple):
    """One walk over a stream: what it reports, and its clocks, in positions."""

    stages: tuple  # the neural one, then "mixer" if there is one
    stride: int  # rows scored by each window after the first
    batch: int  # windows in one forward pass
    chunk: int
    block: int  # from update to update
    lanes: int = 0  # segments side by side; 0: the stream's plain order
    calibration_blocks: int = 0  # over which a mixer that is calibrated lowers its rate


def new_plan(cfg, *stages, lanes=0):
    """Return the Plan of a walk that reports `stages` under these settings."""
    alone = stages[0] in ("pre_quant", "round_trip")  # windows that do not overlap
    learns = "mixer" in stages and cfg.mixer == "learned"
    return Plan(
        stages,
        stride=cfg.eval_seq_len if alone else cfg.eval_stride,
        batch=cfg.eval_batch_windows,
        chunk=cfg.ttt_chunk_tokens,
        block=cfg.mixer_block if learns else cfg.ttt_chunk_tokens,
        lanes=lanes,
    )


def last_plan(cfg, lanes=0):
    """Return the Plan of the last stage: the one that is reported, proved and coded with.

    In lanes there is no TTT.
    """
    neural = "ttt" if cfg.ttt_enabled and not lanes else "sliding"
    mixer = () if cfg.mixer == "none" else ("mixer",)
    return new_plan(cfg, neural, *mixer, lanes=lanes)


def evaluation_plans(cfg):
    """Return the Plans of the quantized model; stages of one neural distribution share one."""
    sliding = [new_plan(cfg, "sliding")] if cfg.ttt_enabled else []
    return [new_plan(cfg, "round_trip"), *sliding, last_plan(cfg)]


class Windows:
    """Engine of every reported figure: sliding windows, in fixed batches of fixed shape.

    A window is computed in two passes: its known rows, then the tile over their cached keys and
    values, with dummies where the prefix has no token yet, which no earlier row sees. So the
    integers depend neither on ranks nor on what is known.
    """

    def __init__(self, model, cfg, rt, plan):
        self.forward = model if plan.calibration_blocks else rt.compiled(model)
        self.window = cfg.eval_seq_len
        self.rt = rt
        self.plan = plan
        self.cache = None  # (known tokens of the last batch, their keys and values), for a decoder

    def forget(self):
        """Drop what was computed with weights that have changed."""
        self.cache = None

    def batches(self, updated_to):
        """Return the batches of the chunk of `updated_to`: each window's first scored row."""
        chunk = self.plan.chunk
        origin = (updated_to - 1) // chunk * chunk
        starts = list(range(origin or self.window, origin + chunk, self.plan.stride))
        size = self.plan.batch
        later = [starts[i : i + size] for i in range(0, len(starts), size)]
        return later if origin else [[0], *later]

    def logits(self, prefix, updated_to, start, stop):
        """Yield (Batch, logits (R, V)) for this rank's share of positions start..stop-1.

        prefix: the tokens before stop - 1, int64.
        """
        for index, starts in enumerate(self.batches(updated_to)):
            tile = self.plan.stride if starts[0] else self.window
            first = max(start - 1, starts[0])
            last = min(stop - 1, starts[-1] + tile)
            if first < last and index % self.rt.world == self.rt.rank:
                rows = starts[0] + torch.arange(len(starts) * tile, device=self.rt.device)
                window_start = rows - (rows - starts[0]) % tile + tile - self.window
                committed = slice(first - starts[0], last - starts[0])
                yield Batch(index, rows, window_start, committed), self.tiles(prefix, starts, tile)

    def tiles(self, prefix, starts, tile):
        """Return the logits (len(starts) * tile, V) of the windows' last `tile` rows."""
        size = self.plan.batch if starts[0] else 1
        known = self.window - tile
        filled = starts + [starts[-1]] * (size - len(starts))
        positions = torch.tensor(filled)[:, None] + torch.arange(-known, tile)
        there = positions < len(prefix)
        tokens = torch.where(there, prefix[positions.clamp(max=len(prefix) - 1)], 0)
        tokens = tokens.to(self.rt.device)
        past = None
        if known:
            if not (self.cache and torch.equal(self.cache[0], tokens[:, :known])):
                self.cache = tokens[:, :known], self.forward(tokens[:, :known])[1]
            past = self.cache[1]
            tokens = tokens[:, max(0, known - EMBED_CONTEXT) :]
        return self.forward(tokens, past)[0][: len(starts)].flatten(0, 1)


class Lanes:
    """Engine of `compress`: L segments of a text side by side, position t in lane t % L.

    One pass adds a row to every lane's cached keys and values, in coder and decoder alike, and
    gives L tokens; in plain order a decoder repeats a tile for each.
    """

    def __init__(self, model, cfg, rt, plan):
        self.forward = model.to(rt.dtype)  # not compiled: shapes grow row by row
        self.window = cfg.eval_seq_len
        self.rt = rt
        self.plan = plan
        self.past = None  # keys and values of the window's rows so far

    def logits(self, prefix, updated_to, start, stop):
        """Yield (Batch, logits (L, V)) for each row of the lanes; the last row may be cut."""
        lanes = self.plan.lanes
        stride = self.plan.stride
        known_rows = self.window - stride
        for first in range(start, stop, lanes):
            row = first // lanes - 1
            begin = 0  # of the window, as in the sliding stage
            if row >= self.window:
                begin = row - (row - self.window) % stride - known_rows
            tokens = prefix[:first].view(-1, lanes).T[:, begin:].to(self.rt.device)
            known = row - begin
            if begin and known == known_rows > 0:  # the window has moved
                self.past = self.forward(tokens[:, :-1])[1]
            past = None
            if known >= EMBED_CONTEXT:
                past = self.past
                tokens = tokens[:, -1 - EMBED_CONTEXT :]
            logits, self.past = self.forward(tokens, past)
            rows = torch.arange(first - lanes, first, device=self.rt.device)
            committed = slice(0, min(lanes, stop - first))
            yield Batch(0, rows, torch.full_like(rows, begin * lanes), committed), logits[:, -1]


# ---- Predictor and scorer ------------------------------------------------------------------------
# The one place where probabilities become commitments, and the one loop, `walk`, that scoring,
# coding and decoding share. Bits are summed as integers, in units of 2^-30 bit, so that a sum does
# not depend on who adds up what.

BITS_SCALE = 2.0**30


class OrderError(RuntimeError):
    """Report calls of predict, score and update in an order that would make a score dishonest."""


class Piece(NamedTuple):
    """Frequencies {stage: int32 (stop - start, V)} of positions start..stop-1, from one batch."""

    start: int
    stop: int
    freqs: dict


class Commitment(NamedTuple):
    """The frequencies of positions start..stop-1, as far as this rank computes them."""

    start: int
    stop: int
    pieces: list

    def table(self, stage):
        """Return the frequencies (stop - start, V) of a lone rank."""
        return torch.cat([piece.freqs[stage] for piece in self.pieces])

    def chosen(self, stage, targets):
        """Return the targets' frequencies, int64 (stop - start,); 0 where another rank has them."""
        freqs = torch.zeros_like(targets)
        for piece in self.pieces:
            part = slice(piece.start - self.start, piece.stop - self.start)
            table = piece.freqs[stage]
            ids = targets[part, None].to(table.device)
            freqs[part] = table.gather(1, ids)[:, 0].to(freqs.device)
        return freqs


class Predictor:
    """Commits, scores and learns, in this order: predict -> score -> ... -> update, or OrderError.

    It owns `model`: with TTT its weights change. Every rank makes the same calls with the same
    arguments; update is due when plan.block positions are scored.
    """

    def __init__(self, model, mixer_weights, cfg, table, rt, plan):
        self.cfg = cfg
        self.rt = rt
        self.plan = plan
        self.lanes = max(plan.lanes, 1)
        self.committed_to = self.lanes  # first position without a commitment
        self.updated_to = self.lanes  # first position that update has not seen
        self.pending = None  # the commitment that waits for its score
        self.engine = (Lanes if plan.lanes else Windows)(model, cfg, rt, plan)
        self.ttt = TestTimeTrainer(model, cfg, table, rt) if "ttt" in plan.stages else None
        self.temperature = cfg.ttt_temperature if self.ttt else 1.0
        self.mixture = None
        if "mixer" in plan.stages:
            self.mixture = Mixture(mixer_weights, cfg, table, rt, plan)
        self.mix_seconds = 0.0

    @property
    def scored_to(self):
        """First position that has not been scored."""
        return self.pending.start if self.pending else self.committed_to

    @property
    def block_end(self):
        """First position that cannot be predicted before the next update."""
        return self.updated_to + self.plan.block

    @torch.no_grad()
    def predict(self, prefix, start, stop):
        """Return the Commitment of positions start..stop-1, each from what is before it.

        prefix: all tokens before stop - 1, int64 (stop - 1,). UserError on all ranks if the model's
        probabilities are not finite.
        """
        in_order = self.committed_to == start < stop <= self.block_end and len(prefix) == stop - 1
        if self.pending or not in_order:
            raise OrderError(
                f"asked to predict {start}..{stop - 1} from {len(prefix)} tokens; next is "
                f"{self.committed_to}, once all is scored; update {self.block_end}"
            )
        pieces = []
        broken = torch.zeros((), device=self.rt.device)
        for batch, logits in self.engine.logits(prefix, self.updated_to, start, stop):
            p = torch.softmax(logits.double() / self.temperature, -1)
            broken += ~p.isfinite().all()
            first, last = batch.rows[batch.committed][[0, -1]].tolist()
            first += self.lanes
            last += self.lanes + 1
            freqs = {self.plan.stages[0]: commit(p)[batch.committed]}
            if self.mixture:
                start_s = self.rt.clock()
                q = self.mixture.mix(p, prefix[: last - self.lanes], batch)
                freqs["mixer"] = commit(q)[batch.committed]
                self.mix_seconds += self.rt.clock() - start_s
            pieces.append(Piece(first, last, freqs))
        if self.rt.sum_over_ranks(broken):
            raise UserError(
                f"logits are not finite between tokens {start} and {stop}: "
                "TTT_LR is too high, or the artifact's weights are useless"
            )
        self.pending = Commitment(start, stop, pieces)
        self.committed_to = stop
        return self.pending

    def score(self, commitment, targets):
        """Return {stage: code length} of targets, int64 (stop - start,), in units of 2^-30 bit."""
        count = len(targets)
        if commitment is not self.pending or count != commitment.stop - commitment.start:
            raise OrderError("score takes the last commitment, once, with one target a position")
        self.pending = None
        lengths = torch.zeros(len(self.plan.stages), dtype=torch.int64, device=self.rt.device)
        for i, stage in enumerate(self.plan.stages):
            freqs = commitment.chosen(stage, targets)
            bits = TOTAL_BITS - freqs[freqs > 0].double().log2()
            lengths[i] = (bits * BITS_SCALE).round().long().sum()
        return dict(zip(self.plan.stages, self.rt.sum_over_ranks(lengths).tolist()))

    def update(self, prefix):
        """Learn from the scored block that ends `prefix`: the mixer always, TTT after a chunk."""
        if self.pending or not self.committed_to == self.block_end == len(prefix):
            raise OrderError(
                f"update takes scored blocks; {self.updated_to}..{len(prefix) - 1} is not one"
            )
        self.updated_to = self.committed_to
        if self.mixture:
            self.mixture.learn(prefix)
        if self.ttt and (self.updated_to - 1) % self.plan.chunk == 0:
            self.ttt.adapt_chunk(prefix[self.updated_to - 1 - self.plan.chunk :])
            self.engine.forget()


class Step(NamedTuple):
    """What walk shows of each step, before the targets are scored."""

    commitment: Commitment
    targets: Tensor  # a view of the stream: a decoder, which has no tokens, writes them here
    bits: dict  # {stage: bits of all that was scored before}


def walk(predictor, stream, log=None, step=None):
    """Yield the Steps of one pass over `stream`, int64 (n,), and return {stage: bits} at its end.

    Score-first is the shape of this loop: commit, show, score, learn. Steps are `step` positions
    long, or blocks. `log` is told of the progress every 15 seconds.
    """
    lengths = dict.fromkeys(predictor.plan.stages, 0)
    bits = dict.fromkeys(predictor.plan.stages, 0.0)
    first = stop = predictor.committed_to
    start_s = logged_s = time.perf_counter()
    while stop < len(stream):
        start = stop
        stop = min(start + (step or predictor.plan.block), predictor.block_end, len(stream))
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        yield Step(commitment, stream[start:stop], bits)
        for stage, length in predictor.score(commitment, stream[start:stop]).items():
            lengths[stage] += length
            bits[stage] = lengths[stage] / BITS_SCALE
        if stop == predictor.block_end < len(stream):
            predictor.update(stream[:stop])
        if log and time.perf_counter() - logged_s > 15:
            logged_s = time.perf_counter()
            done = progress_line(stop - first, len(stream) - first, start_s, "tokens")
            log(f"{'+'.join(predictor.plan.stages)}: {done}")
    return bits


def evaluate(predictor, tokens, total_bytes, log, keep=0):
    """Score `tokens`, int64 (n + 1,); return (stages as results.json has them, first frequencies).

    The frequencies are those of the first `keep` targets under the last stage, int64.
    """
    rt = predictor.rt
    start_s = rt.clock()
    n = len(tokens) - 1
    kept = torch.zeros(min(keep, n), dtype=torch.int64)
    for commitment, targets, bits in walk(predictor, torch.from_numpy(tokens), log):  # noqa: B007
        first = commitment.start - 1
        if first < len(kept):
            freqs = commitment.chosen(predictor.plan.stages[-1], targets)
            kept[first : first + len(freqs)] = freqs[: len(kept) - first]
    seconds = rt.clock() - start_s
    added_s = {predictor.plan.stages[0]: seconds - predictor.mix_seconds}
    added_s["mixer"] = predictor.mix_seconds
    stages = [
        {
            "name": stage,
            "val_loss": bits[stage] * math.log(2) / n,
            "val_bpb": bits[stage] / total_bytes,
            "tokens": n,
            "bytes": total_bytes,
            "seconds": added_s[stage],
        }
        for stage in predictor.plan.stages
    ]
    return stages, rt.sum_over_ranks(kept.to(rt.device)).cpu().numpy()


# ---- Range coder, code files, proof --------------------------------------------------------------
# What was committed can be coded: encoder and decoder narrow one interval by the same integers. The
# range stays above 2^48, so cutting it into 2^24 parts wastes next to nothing; a carry runs back
# into the bytes before. A code file, little-endian:
#    8 bytes  magic "PGOLFTXT"           8 bytes  tokens n, after BOS
#    4 bytes  format version             8 bytes  bytes of the text
#    4 bytes  CRC-32 of all that follows 3 x 32   SHA-256 of artifact, settings (JSON) and text
#    4 bytes  lanes L; 0: plain order    rest     code words
# With lanes, as `compress` has them, lane i holds the text's i-th segment, the first n mod L lanes
# a token longer than the others; coded are all lanes' first tokens, then all second ones, and so
# on.

CODE_MAGIC = b"PGOLFTXT"
CODE_VERSION = 2
CODE_START = struct.Struct("<8sII")
CODE_HEAD = struct.Struct("<IQQ32s32s32s")
MOST_LANES = 16


class RangeEncoder:
    """Codes one symbol after the other: `low` and `range` are the interval, in 64 bits."""

    def __init__(self):
        self.low = 0
        self.range = 1 << 64
        self.out = bytearray()

    def encode(self, start, freq):
        """Narrow the interval to its part [start, start + freq) of 2^24."""
        unit = self.range >> TOTAL_BITS
        self.low += start * unit
        self.range = freq * unit
        if self.low >> 64:  # a carry: into the last byte that is not 255
            at = len(self.out.rstrip(b"\xff")) - 1
            self.out[at:] = bytes([self.out[at] + 1]) + bytes(len(self.out) - at - 1)
        while self.range < 1 << 48:
            self.out.append(self.low >> 56 & 255)
            self.low <<= 8
            self.range <<= 8
        self.low &= (1 << 64) - 1

    def finish(self):
        """Return the code words, as bytes."""
        return bytes(self.out) + self.low.to_bytes(8, "big")


class RangeDecoder:
    """The mirror image: `value` is the code's distance from the interval's low end."""

    def __init__(self, words):
        self.words = words
        self.at = 8  # next byte to be read; beyond the end there are zeros
        self.range = 1 << 64
        self.value = int.from_bytes(words[:8].ljust(8, b"\0"), "big")

    def decode(self, freqs):
        """Return the next symbol; freqs (V,) are what the encoder had."""
        unit = self.range >> TOTAL_BITS
        ends = np.cumsum(freqs, dtype=np.int64)
        symbol = min(int(np.searchsorted(ends, self.value // unit, side="right")), len(freqs) - 1)
        freq = int(freqs[symbol])
        self.range = freq * unit
        self.value -= (int(ends[symbol]) - freq) * unit
        self.value = min(self.value, self.range - 1)  # foreign words stay in bounds
        while self.range < 1 << 48:
            byte = self.words[self.at] if self.at < len(self.words) else 0
            self.value = self.value << 8 | byte
            self.range <<= 8
            self.at += 1
        return symbol


class CodeHead(NamedTuple):
    """What a code file says of itself; pack and unpack are mirror images."""

    lanes: int
    tokens: int
    text_bytes: int
    artifact: bytes  # SHA-256 each
    settings: bytes
    text: bytes

    def pack(self, words):
        """Return the bytes of a code file of these code words."""
        body = CODE_HEAD.pack(*self) + words
        return CODE_START.pack(CODE_MAGIC, CODE_VERSION, zlib.crc32(body)) + body

    @classmethod
    def unpack(cls, path, data):
        """Return (CodeHead, code words) of a code file's bytes; UserError if they are none."""
        start = data[: CODE_START.size].ljust(CODE_START.size, b"\0")
        body = data[CODE_START.size :]
        magic, version, checksum = CODE_START.unpack(start)
        if (magic, version) != (CODE_MAGIC, CODE_VERSION):
            raise UserError(f"{path} is no code file of this version")
        if len(body) < CODE_HEAD.size or zlib.crc32(body) != checksum:
            raise UserError(f"{path} is cut or altered")
        return cls(*CODE_HEAD.unpack_from(body)), body[CODE_HEAD.size :]


def settings_digest(cfg):
    """Return the SHA-256 of all settings that shape the committed integers."""
    shaping = {name: getattr(cfg, name) for name in sorted(GROUPS) if GROUPS[name] != RunSettings}
    return hashlib.sha256(json.dumps(shaping).encode()).digest()


def new_predictor(artifact, cfg, rt, plan):
    """Return a Predictor of the artifact's weights, with kernels that repeat their results."""
    torch.use_deterministic_algorithms(rt.device.type == "cuda")
    model = new_model(cfg, rt, artifact.weights)
    return Predictor(model, artifact.weights["mixer"], cfg, artifact.table, rt, plan)


def lane_order(n, lanes):
    """Return which of a text's n tokens are coded one after the other: one of each lane in turn."""
    row, lane = np.divmod(np.arange(n), lanes)
    return lane * (n // lanes) + np.minimum(lane, n % lanes) + row


class Coded(NamedTuple):
    """A text in code words."""

    data: bytes  # of the code file
    bits: float  # predicted: the sum that the scorer would report
    freqs: np.ndarray  # int64 (n,), of its tokens in the order in which they were coded


class Decoded(NamedTuple):
    """What code words stand for."""

    tokens: np.ndarray  # int64 (n + 1,), BOS first
    freqs: np.ndarray  # as in Coded
    text: bytes | None  # None if it is not the text that was coded


@dataclass
class Codec:
    """Texts to code files and back by an artifact's last stage: two mirror images."""

    artifact: Artifact
    cfg: Config
    rt: Runtime
    log: object

    def encode(self, tokens, lanes=0):
        """Return tokens, int64 (n + 1,), BOS first, as Coded."""
        table = self.artifact.table
        predictor = new_predictor(self.artifact, self.cfg, self.rt, last_plan(self.cfg, lanes))
        stage = predictor.plan.stages[-1]
        order = lane_order(len(tokens) - 1, predictor.lanes)
        start = np.full(predictor.lanes, table.bos_id)
        stream = torch.from_numpy(np.append(start, tokens[1:][order]))
        coder = RangeEncoder()
        coded = []
        bits = dict.fromkeys(predictor.plan.stages, 0.0)  # of an empty text
        for commitment, targets, bits in walk(predictor, stream, self.log):  # noqa: B007
            freqs = commitment.table(stage)
            ids = targets[:, None].to(freqs.device)
            ends = freqs.cumsum(1).gather(1, ids)[:, 0].tolist()
            own = freqs.gather(1, ids)[:, 0].tolist()
            for end, freq in zip(ends, own):
                coder.encode(end - freq, freq)
            coded += own
        text = table.decode(tokens)
        digests = self.artifact.digest, settings_digest(self.cfg), hashlib.sha256(text).digest()
        head = CodeHead(lanes, len(order), len(text), *digests)
        return Coded(head.pack(coder.finish()), bits[stage], np.array(coded, dtype=np.int64))

    def decode(self, path):
        """Return what a code file stands for; UserError if it is not of this artifact."""
        head, words = CodeHead.unpack(path, read_file(path))
        if head.artifact != self.artifact.digest:
            raise UserError(f"{path} was not made with the artifact {self.artifact.path}")
        if head.settings != settings_digest(self.cfg):
            raise UserError(f"{path} was made with other settings")
        plan = last_plan(self.cfg, head.lanes)
        if head.lanes and plan.block % head.lanes:
            raise UserError(f"{path} has {head.lanes} lanes, which no block holds")
        predictor = new_predictor(self.artifact, self.cfg, self.rt, plan)
        table = self.artifact.table
        decoder = RangeDecoder(words)
        coded = []
        stream = torch.full((predictor.lanes + head.tokens,), table.bos_id)
        for commitment, targets, _ in walk(predictor, stream, self.log, step=predictor.lanes):
            for i, freqs in enumerate(commitment.table(plan.stages[-1]).cpu().numpy()):
                symbol = decoder.decode(freqs)
                targets[i] = symbol
                coded.append(freqs[symbol])
        tokens = np.full(head.tokens + 1, table.bos_id)
        order = lane_order(head.tokens, predictor.lanes)
        tokens[1:][order] = stream[predictor.lanes :].numpy()
        text = table.decode(tokens)
        same = len(text) == head.text_bytes and hashlib.sha256(text).digest() == head.text
        return Decoded(tokens, np.array(coded, dtype=np.int64), text if same else None)


def verify(run, artifact, scored=None):
    """Code VERIFY_TOKENS, let another process without shards decode them; UserError if they differ.

    scored: the frequencies under which a run has just scored these tokens, if it has.
    """
    cfg = run.cfg
    tokens = run.tokens[: cfg.verify_tokens + 1]
    n = len(tokens) - 1
    path = cfg.run_dir / "proof.code"
    start_s = time.perf_counter()
    coded = Codec(artifact, cfg, run.rt.alone(), run.report.log).encode(tokens)
    write_atomically(path, coded.data)
    encode_s = time.perf_counter() - start_s

    start_s = time.perf_counter()
    decoded, complaint = decode_elsewhere(path, artifact, run)
    decode_s = time.perf_counter() - start_s
    freqs = coded.freqs if scored is None else scored
    differs = (decoded["tokens"][1:] != tokens[1:]) | (decoded["freqs"] != freqs)
    if differs.any():
        t = int(differs.argmax())
        raise UserError(
            f"verify: position {t + 1}: expected token {tokens[t + 1]} of frequency {freqs[t]}, "
            f"decoded {decoded['tokens'][t + 1]} of {decoded['freqs'][t]}"
        )
    if complaint:
        raise UserError(f"verify: the decoder gave up: {complaint}")
    size = len(coded.data) - CODE_START.size - CODE_HEAD.size
    run.report.record(
        "proof",
        {
            "tokens": n,
            "predicted_bits": coded.bits,
            "bytes_on_disk": size,
            "encode_seconds": encode_s,
            "decode_seconds": decode_s,
        },
    )
    run.report.log(
        f"proof: another process decoded {n:,} tokens from the artifact and {size:,} B; "
        f"predicted: {coded.bits / 8:,.1f} B; {n / encode_s:,.1f} tokens/s to encode, "
        f"{n / decode_s:,.1f} to decode"
    )


def decode_elsewhere(path, artifact, run):
    """Return ({"tokens", "freqs"}, complaint) of a second process that decodes a code file.

    It gets the artifact, no shards, no tokenizer and no settings; what it prints goes into the log.
    The complaint is empty if it has found the text complete; UserError if it decoded nothing.
    """
    env = {name: value for name, value in os.environ.items() if name.lower() not in GROUPS}
    env |= dict(
        DEVICE=run.rt.device.type,
        ARTIFACT_PATH=str(artifact.path),
        DATA_PATH=os.devnull,
        TOKENIZER_PATH=os.devnull,
        REPLACE="1",
    )
    text_path = path.with_suffix(".txt")
    arrays_path = path.with_suffix(".npz")
    arrays_path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "decompress", *map(str, (path, text_path, arrays_path))]
    last_line = ""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=env, **pipes) as decoder:
        for line in decoder.stdout:
            last_line = line.strip()
            run.report.log(last_line)
    complaint = decoder.returncode and (last_line or f"exit status {decoder.returncode}")
    if not arrays_path.exists():
        raise UserError(f"verify: the decoder gave up: {complaint}")
    with np.load(arrays_path) as arrays:
        return dict(arrays), complaint


# ---- Report --------------------------------------------------------------------------------------
# train.log is for people, results.json for programs. Seconds and bytes stand beside the
# competition's limits. `summarize` makes a submission of several results.


class Report:
    """What a run has shown so far; results.json is rewritten after every pass over the text."""

    def __init__(self, cfg, rt, command):
        self.cfg = cfg
        self.rt = rt
        self.files = []
        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        settings = dict(sorted(asdict(cfg).items()))
        self.results = {
            "run_id": cfg.run_dir.name,
            "seed": cfg.seed,
            "command": command,
            "settings": settings,
            "environment": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "device": rt.notes[0],
                "world_size": rt.world,
                "dtype": str(rt.dtype),
                "source_sha256": source,
            },
            "train": None,
            "artifact": None,
            "stages": [],
            "val_bpb": None,
        }
        self.check_earlier()
        if rt.is_main:
            log_path = cfg.run_dir / f"{command}.log"
            self.files = [sys.stdout, open(log_path, "a", encoding="utf-8")]  # noqa: SIM115
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.log(f"{command} {cfg.run_dir.name}, {when}")
        self.log(f"python {sys.version.split()[0]}, torch {torch.__version__}, source {source}")
        for line in (*rt.notes, *(f"  {n.upper()}={v}" for n, v in settings.items())):
            self.log(line)

    def check_earlier(self):
        """Raise UsageError if the folder has results of another command, setting or source."""
        path = self.cfg.run_dir / "results.json"
        if self.cfg.replace or not path.exists():
            return
        earlier = json.loads(path.read_bytes())
        own, found = (
            {**r["settings"], **r["environment"], "command": r["command"]}
            for r in (self.results, earlier)
        )
        odd = sorted(n.upper() for n in own.keys() - PLACES if found.get(n) != own[n])
        if odd:
            raise UsageError(
                f"{path} is of a run with another {', '.join(odd)}: set another RUN_ID, "
                "or REPLACE=1 to replace it"
            )

    def log(self, line):
        """Show a line to people: on the screen and in the log file, by rank 0 alone."""
        for file in self.files:
            say(line, file)

    def record(self, name, value):
        """Set one key of results.json and write it."""
        self.results[name] = value
        text = json.dumps(self.results, indent=1) + "\n"
        if self.rt.is_main:
            write_atomically(self.cfg.run_dir / "results.json", text.encode())

    def check_size(self, artifact):
        """Record an artifact's bytes; UserError, the file staying, if they are over the cap."""
        code = code_bytes()
        limit = self.cfg.size_limit_bytes
        total = code + artifact.size_bytes
        overridden = artifact.overridden(self.cfg)
        self.log(
            f"artifact {artifact.path}: {artifact.size_bytes:,} B weights + {code:,} B code "
            f"= {total:,} of {limit:,} B"
        )
        if overridden:
            names = ", ".join(overridden)
            self.log(f"note: {names} are not the artifact's: its decoder would not get these bits")
        sizes = {"weights_bytes": artifact.size_bytes, "code_bytes": code, "total_bytes": total}
        self.record(
            "artifact",
            {
                "path": str(artifact.path),
                **sizes,
                "limit_bytes": limit,
                "sha256": artifact.digest.hex(),
                "overridden": overridden,
            },
        )
        if total > limit:
            raise UserError(
                f"artifact {artifact.path} is {total - limit:,} bytes over "
                f"SIZE_LIMIT_BYTES={limit:,}: "
                "lower MODEL_DIM, NUM_LAYERS or BIGRAM_VOCAB_SIZE and train again"
            )

    def add_stages(self, stages):
        """Add scored stages, log their rows of the table, and write results.json."""
        if not self.results["stages"]:
            self.log(
                f"{'stage':<12}{'val_bpb':>10}{'delta':>11}{'val_loss':>10}"
                f"{'tokens':>12}{'seconds':>9}"
            )
        for stage in stages:
            before = self.results["val_bpb"]
            delta = stage["val_bpb"] - (before or stage["val_bpb"])
            self.log(
                f"{stage['name']:<12}{stage['val_bpb']:>10.6f}{delta:>+11.6f}"
                f"{stage['val_loss']:>10.6f}{stage['tokens']:>12,}{stage['seconds']:>9.1f}"
            )
            self.results["val_bpb"] = stage["val_bpb"]
        self.record("stages", self.results["stages"] + stages)

    def log_budget(self):
        """Log seconds and bytes against the competition's limits."""
        stages, artifact, train = (self.results[name] for name in ("stages", "artifact", "train"))
        self.log("\nbudget, against the competition's limits (which hold on its 8xH100)")
        if train:
            train_s = train["seconds"] + train["calibration_seconds"]
            self.log(
                f"train       {train_s:>10.1f} s of 600 s, calibration included; "
                f"quantize {train['quantize_seconds']:.1f} s"
            )
        evaluation_s = sum(s["seconds"] for s in stages if s["name"] != "pre_quant")
        self.log(f"evaluation  {evaluation_s:>10.1f} s of 600 s (without pre_quant)")
        self.log(f"bytes       {artifact['total_bytes']:>10,} B of {artifact['limit_bytes']:,} B")


def read_result(path):
    """Return a finished run's results.json; UserError names the file and what is amiss with it."""
    try:
        run = json.loads(Path(path).read_bytes())
        artifact = run["artifact"]
        last = run["stages"][-1]
        cfg = Config(**run["settings"])
        wanted = last_plan(cfg).stages[-1]
        amiss = [
            (last["name"] != wanted, f"it ends at {last['name']}, not at {wanted}"),
            (artifact["total_bytes"] > min(artifact["limit_bytes"], 16_000_000), "over the cap"),
            (artifact["overridden"], f"{', '.join(artifact['overridden'])} overridden"),
        ]
        if faults := [why for fault, why in amiss if fault]:
            raise ValueError(faults[0])
        run["same"] = {
            **stored_settings(cfg),
            "seed": 0,
            "stage": last["name"],
            "val_tokens": last["tokens"],
        }
        run["row"] = {
            "val_loss": last["val_loss"],
            "val_bpb": last["val_bpb"],
            "bytes_total": artifact["total_bytes"],
            "bytes_code": artifact["code_bytes"],
        }
        return run
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        message = f"summarize: {path} is not a finished run's results.json ({error!r})"
        raise UserError(message) from error


def summarize(paths, out_path):
    """Gather the results.json of several seeds into a submission.json; return its contents."""
    runs = [read_result(path) for path in paths]
    first = runs[0]["same"]
    if odd := {n.upper() for run in runs for n, v in run["same"].items() if v != first.get(n)}:
        raise UserError(f"summarize: the runs differ in {', '.join(sorted(odd))}")
    seeds = {str(run["seed"]): run["row"] for run in runs}
    if len(seeds) < len(runs):
        raise UserError("summarize: two results have the same seed; give one result a seed")
    kept = {}
    if Path(out_path).exists():
        try:
            kept = dict(json.loads(Path(out_path).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            message = f"summarize: {out_path} is not a JSON object ({error}); mend or remove it"
            raise UserError(message) from error
    scores = [row["val_bpb"] for row in seeds.values()]
    summary = {
        **{name: kept.get(name, "") for name in ("author", "github_id", "name", "blurb")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **{n: np.mean([row[n] for row in seeds.values()]) for n in ("val_loss", "val_bpb")},
        **{n: max(row[n] for row in seeds.values()) for n in ("bytes_total", "bytes_code")},
        "val_bpb_std": np.std(scores, ddof=1) if len(runs) > 1 else None,
        **{n: first[n] for n in ("preset", "stage", "val_tokens")},
        "device": runs[0]["environment"]["device"],
        "seeds": seeds,
    }
    if len(runs) < 3:
        summary["warning"] = f"{len(runs)} seed(s); a submission needs 3"
    write_atomically(out_path, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


# ---- Commands ------------------------------------------------------------------------------------
# All that can be checked is checked before long work starts: device, disk, tokenizer, validation
# text. A run's folder is its own: locked while it works, and not replaced by a run that differs in
# a setting, the source or the machine, unless REPLACE=1 says so. While it trains, it holds room on
# the disk for its weights; they are written at once after the last step, or whatever ended it, and
# `finish` goes on from them. They are deleted when all is done.


@dataclass
class Run:
    """What a command on the validation text works with."""

    cfg: Config
    rt: Runtime
    report: Report
    table: TokenTable
    tokens: np.ndarray  # the validation stream, int64 (n + 1,)
    total_bytes: int  # of its text
    lock: object = None  # on the run's folder, until it is closed


def open_run(cfg, environ, command, artifact=None):
    """Return the Run of a command, everything checked; `artifact`: what is scored, if not new."""
    rt = start_runtime(cfg, environ)
    table = artifact and artifact.table
    lock = None
    if not artifact:
        micro_batch_sequences(cfg, rt.world)  # or UsageError
    with rt.fail_together():
        if rt.is_main:
            check_writable(cfg.run_dir, 2 * cfg.size_limit_bytes)
            lock = lock_folder(cfg.run_dir)
    report = Report(cfg, rt, command)
    with rt.fail_together():
        if rt.is_main:
            prepare_demo(cfg, report.log)
    tokens = load_validation(cfg)
    decode = None
    if table is None or Path(cfg.tokenizer_path).exists():
        table, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, table)
        decode = sp.decode
    total_bytes = audit_bytes(table, tokens, decode)
    report.log(
        f"validation: {len(tokens) - 1:,} tokens, {total_bytes:,} bytes, as the decoded text has"
    )
    return Run(cfg, rt, report, table, tokens, total_bytes, lock)


def train_command(environ, kept=None):
    """Train, quantize, write the artifact, read it back, evaluate every stage, report, prove.

    kept: what an earlier run has kept of its training, which is then not repeated.
    """
    cfg = config_from_env({**environ, "ARTIFACT_PATH": ""}, kept and kept["settings"])
    run = open_run(cfg, environ, "train")
    held_out = load_held_out(cfg)
    model = new_model(cfg, run.rt, kept and kept["weights"])
    count = sum(p.numel() for p in model.parameters())
    run.report.log(f"model: {count:,} parameters")
    path = cfg.run_dir / WEIGHTS
    if kept:
        result = TrainResult(**kept["result"])
    else:
        room = run.rt.is_main and check_writable(cfg.run_dir, 5 * count)
        result = train(model, cfg, run.rt, run.report.log, len(held_out))
        on_signals(lambda *_: None)
        if run.rt.is_main and result.steps:
            room.close()
            keep_weights(run, path, model, result)
        on_signals(interrupt)
    try:
        if result.stopped and not kept:
            raise UserError(result.stopped)
        finish(run, model, result, held_out)
    except FORESEEN as error:
        where = f"; {path} has the weights: the same command with `finish` goes on from them"
        raise UserError(one_line(error) + where * (result.steps > 0)) from error
    if run.rt.is_main:
        path.unlink()


def keep_weights(run, path, model, result):
    """Write the trained weights, and all that `finish` needs besides, to a file."""
    kept = {"settings": asdict(run.cfg), "result": asdict(result), "weights": model.state_dict()}
    data = io.BytesIO()
    torch.save(kept, data)
    write_atomically(path, data.getvalue())
    run.report.record("train", asdict(result))


def finish_command(environ):
    """Go on from the weights that a run has kept: calibrate, quantize, evaluate, prove."""
    path = find_run(environ).run_dir / WEIGHTS
    data = io.BytesIO(read_file(path, "RUN_ID: ", "; there is no training to finish"))
    kept = torch.load(data, map_location="cpu", weights_only=True)
    train_command({**environ, "REPLACE": "1"}, kept)


def finish(run, model, result, held_out):
    """Do what follows training: calibrate, write the artifact, evaluate every stage, prove."""
    cfg = run.cfg
    weights = {**model.state_dict(), "mixer": new_mixer_weights()}
    limit_s = (cfg.max_wallclock_seconds or math.inf) - result.seconds
    weights["mixer"], result.calibration_seconds = calibrate(run, weights, held_out, limit_s)
    artifact = write_artifact(run, weights, result)
    model.eval()
    predictor = Predictor(model, None, cfg, run.table, run.rt, new_plan(cfg, "pre_quant"))
    stages, _ = evaluate(predictor, run.tokens, run.total_bytes, run.report.log)
    run.report.add_stages(stages)
    scored = evaluate_artifact(run, artifact)
    if cfg.verify_enabled:
        with run.rt.fail_together():
            if run.rt.is_main:
                verify(run, artifact, scored)


def calibrate(run, weights, held_out, limit_s):
    """Return (mixer weights, seconds), fitted by scoring held_out, uint16 (n + 1,), once.

    The model is the quantized one, in half windows. It begins with the mixer in `weights` and
    stops after 95 % of limit_s.
    """
    cfg = run.cfg
    rt = run.rt
    if not len(held_out):
        return weights["mixer"], 0.0
    start_s = rt.clock()
    coarseness = estimate_coarseness(weights, cfg.size_limit_bytes - code_bytes())
    model = new_model(cfg, rt, quantized(weights, coarseness))
    stream = torch.from_numpy(held_out.astype(np.int64))
    stride = cfg.eval_stride * max(1, cfg.eval_seq_len // cfg.eval_stride // 2)
    plan = Plan(
        ("sliding", "mixer"),
        stride=stride,
        batch=1,
        chunk=math.lcm(stride, cfg.eval_seq_len),
        block=stride,
        calibration_blocks=len(stream) // stride,
    )
    predictor = Predictor(model, weights["mixer"], cfg, run.table, rt, plan)
    for commitment, _, bits in walk(predictor, stream, run.report.log):  # noqa: B007
        if rt.from_main(rt.clock() - start_s) > 0.95 * limit_s:
            break
    seconds = rt.clock() - start_s
    scored = predictor.scored_to - 1
    per_token = ", ".join(f"{stage} {b / max(scored, 1):.4f}" for stage, b in bits.items())
    run.report.log(
        f"calibration: {scored:,} of {len(stream) - 1:,} held-out tokens in {seconds:.1f} s, "
        f"bits a token: {per_token}"
    )
    return predictor.mixture.learner.weights, seconds


def write_artifact(run, weights, result):
    """Quantize to the cap, write the artifact and return it as read back from disk."""
    start_s = time.perf_counter()
    path = run.cfg.artifact
    data = b""
    with run.rt.fail_together():
        if run.rt.is_main:
            data = fit_artifact(weights, run.cfg, run.table, run.report.log)
            write_atomically(path, data)
    rate = result.tokens / max(result.seconds, 1e-9)
    numbers = {"quantize_seconds": time.perf_counter() - start_s, "tokens_per_second": rate}
    run.report.record("train", asdict(result) | numbers)
    artifact = read_artifact(path)
    if run.rt.is_main and hashlib.sha256(data).digest() != artifact.digest:
        raise UserError(f"artifact {path} is not what was written: who else writes there?")
    run.report.check_size(artifact)
    return artifact


def evaluate_artifact(run, artifact):
    """Score the artifact in every stage; return the last one's first VERIFY_TOKENS frequencies."""
    scored = None
    for plan in evaluation_plans(run.cfg):
        predictor = new_predictor(artifact, run.cfg, run.rt, plan)
        keep = run.cfg.verify_tokens
        stages, scored = evaluate(predictor, run.tokens, run.total_bytes, run.report.log, keep)
        run.report.add_stages(stages)
    run.report.log_budget()
    return scored


def find_run(environ):
    """Return the Config of the settings that say where a run is."""
    places = ("PRESET", "SEED", "RUN_ID", "LOG_DIR", "ARTIFACT_PATH")
    return config_from_env({name: environ[name] for name in places if name in environ})


def open_artifact(environ):
    """Return (Artifact at ARTIFACT_PATH, its Config); settings of group eval may be overridden."""
    path = find_run(environ).artifact
    artifact = read_artifact(path)
    return artifact, config_from_env({**environ, "ARTIFACT_PATH": str(path)}, artifact.settings)


def eval_command(environ, command):
    """Score the artifact at ARTIFACT_PATH in every stage (`eval`), or prove it (`verify`).

    Results go beside the run, to a folder that is named after the settings that are overridden.
    """
    artifact, cfg = open_artifact(environ)
    folder = cfg.artifact.resolve().parent
    if not cfg.run_id or folder == cfg.run_dir.resolve():
        changed = artifact.overridden(cfg)
        if cfg.val_tokens != PRESETS[cfg.preset].get("val_tokens", 0):
            changed.append("VAL_TOKENS")
        names = (f",{name}={getattr(cfg, name.lower())}" for name in changed)
        run_id = f"{cfg.run_id or folder.name}_{command}{''.join(names)}"
        cfg = dataclasses.replace(cfg, run_id=run_id[:200])
    run = open_run(cfg, environ, command, artifact)
    run.report.check_size(artifact)
    if command == "eval":
        evaluate_artifact(run, artifact)
        return
    with run.rt.fail_together():
        if run.rt.is_main:
            verify(run, artifact)


def text_tokens(data, table, encode):
    """Return tokens, int64 (n + 1,), BOS first, that decode to exactly these bytes.

    Words are as SentencePiece's `encode` has them in running text, if need be after a BOS, which
    prints nothing; white space, and words that it would change, are spelled in byte pieces.
    """
    byte_ids = {table.texts[i]: i for i, kind in enumerate(table.kinds) if kind == "B"}
    if len(byte_ids) < 256:
        raise UserError(
            "compress: the artifact's tokenizer has no byte pieces; train one by `tokenize`"
        )
    dot = len(encode("."))

    def is_exact(ids, run):
        if not ids or not table.texts[ids[-1]]:
            return False  # what prints nothing at the end would swallow the next word's space
        return table.decode(np.array([byte_ids[b"a"], *ids])) == b"a" + run

    @functools.cache
    def ids_of(run):
        word = run.decode("utf-8", "replace")
        if run.isspace():
            tries = []
        elif word[0] == " ":
            tries = [encode("." + word)[dot:]]
        else:
            tries = [encode(word), [table.bos_id, *encode(word)]]
        spelled = [byte_ids[run[i : i + 1]] for i in range(len(run))]
        return next((ids for ids in tries if is_exact(ids, run)), spelled)

    runs = re.findall(rb"(?s)(?<=.) \S+|\S+|\s", data)
    return np.concatenate([[table.bos_id], *map(ids_of, runs)]).astype(np.int64)


def show(line):
    """Print a line of progress at once."""
    say(line, sys.stdout)


def compress_command(source, target, environ):
    """Code a file, whatever its bytes, with the artifact at ARTIFACT_PATH, in up to 16 lanes."""
    artifact, cfg = open_artifact(environ)
    log = check_target(cfg, target, source, artifact.path, cfg.tokenizer_path)
    data = read_file(source)
    start_s = time.perf_counter()
    _, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, artifact.table)
    tokens = text_tokens(data, artifact.table, sp.encode)
    windows = max(1, len(tokens) // (2 * cfg.eval_seq_len))  # a lane has two or more
    largest_power = 1 << (windows.bit_length() - 1)
    lanes = math.gcd(cfg.mixer_block, MOST_LANES, largest_power)
    coded = Codec(artifact, cfg, start_runtime(cfg, {}), log).encode(tokens, lanes)
    write_atomically(target, coded.data, source)
    rate = len(tokens) / (time.perf_counter() - start_s)
    log(
        f"{len(data):,} B -> {len(coded.data):,} B: a header of "
        f"{CODE_START.size + CODE_HEAD.size} B, the rest predicted as {coded.bits / 8:,.1f} B; "
        f"{rate:,.0f} tokens/s"
    )


def decompress_command(source, target, environ, arrays_path=None):
    """Decode SOURCE into TARGET, and tokens and frequencies into a .npz file if one is named."""
    artifact, cfg = open_artifact(environ)
    log = check_target(cfg, target, source, artifact.path)
    decoded = Codec(artifact, cfg, start_runtime(cfg, {}), log).decode(source)
    if arrays_path:
        np.savez(arrays_path, tokens=decoded.tokens, freqs=decoded.freqs)
    if decoded.text is None:
        raise UserError(
            f"{source} decodes to another text here than was coded: another machine or torch?"
        )
    write_atomically(target, decoded.text, source)


def dispatch(args, environ):
    """Run one command line."""
    match args:
        case []:
            train_command(environ)
        case ["eval" | "verify" as command]:
            eval_command(environ, command)
        case ["finish"]:
            finish_command(environ)
        case ["compress", source, target]:
            compress_command(source, target, environ)
        case ["decompress", source, target, *arrays] if len(arrays) < 2:
            decompress_command(source, target, environ, *arrays)
        case ["tokenize", out_dir, first, *more]:
            tokenize_command(out_dir, [first, *more], environ)
        case ["summarize", first, *more]:
            show(json.dumps(summarize([first, *more], "submission.json"), indent=1))
        case ["-h" | "--help" | "help"]:
            show(__doc__)
            for name, field in FIELDS.items():
                show(f"  {name.upper():<28} {field.metadata['doc']} (record: {field.default!r})")
        case _:
            raise UsageError(
                f"unknown or incomplete command {' '.join(args)!r}; see train_gpt.py --help"
            )


def main():
    """Run the command line and return its exit status; what a user can mend is one line on stderr.

    The process is then to be left at once: in a collective, a rank that says goodbye keeps the
    others waiting, gloo's teardown can abort, and a dead stdout would become a status of its own.
    """
    status = 0
    rank = 0
    try:
        rank = torchrun_ranks(os.environ)[0]
        on_signals(interrupt)
        dispatch(sys.argv[1:], os.environ)
    except FORESEEN as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        status = 130 if interrupted else getattr(error, "exit_status", 1)
        hint = "; pip install -r requirements.txt" if isinstance(error, ImportError) else ""
        if rank == 0:
            say(f"error: {one_line(error)}{hint}", sys.stderr)
    if dist.is_initialized() and not status:
        dist.barrier()
    return status


# ---- Texts to shards -----------------------------------------------------------------------------
# `tokenize` turns text into official shards; so does the demo with the only English that every
# machine has, the documentation inside Python and its packages. One document in 20, chosen by a
# checksum, is validation text.

SHARD_TOKENS = 50_000_000
TXT_DOCUMENT_CHARS = 4096
DEMO_TEXT_CHARS = 6_000_000


def read_documents(path):
    """Return a file's documents: "text" fields, or .txt cut at blank lines after 4,096 chars."""
    number = 0
    texts = []
    is_txt = path.endswith(".txt")
    try:
        for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):  # noqa: B007
            if is_txt or line.strip():
                texts.append(line.decode("utf-8") if is_txt else json.loads(line)["text"])
                texts[-1].encode()  # it is a string, and has no half of a surrogate pair
    except Exception as error:  # what is read, decoded or parsed; zstandard has its own class
        raise UserError(
            f"tokenize: cannot read {path}, line {number}: expected UTF-8 text, in .jsonl "
            f'{{"text": "..."}} ({error})'
        ) from error
    cut = rf"(?s).{{{TXT_DOCUMENT_CHARS},}}?\n[^\S\n]*\n|.+"
    return re.findall(cut, "".join(texts)) if is_txt else texts


def demo_documents():
    """Return pydoc's topics and the longer docstrings of the standard library, numpy and torch."""
    from pydoc_data import topics

    documents = [text for _, text in sorted(topics.topics.items())]
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "_vendor"}
    for root in (Path(module.__file__).parent for module in (os, np, torch)):
        for path in sorted(root.rglob("*.py")):
            full = sum(map(len, documents)) >= DEMO_TEXT_CHARS
            if full or skipped & set(path.relative_to(root).parts):
                continue
            source = path.read_text("utf-8", errors="ignore")
            found = re.findall('"""(.*?)"""', source, re.DOTALL)
            long = [inspect.cleandoc(text) for text in found if len(text) >= 80]
            documents.append("\n\n".join(long))
    return list(filter(None, documents))


def prepare_demo(cfg, log):
    """Make the demo's shards in its cache, once."""
    cache = Path(DEMO_CACHE)
    if Path(cfg.data_path) == cache and not any(cache.glob("fineweb_val_*.bin")):
        log("demo: gathering English from the documentation on this machine")
        shutil.rmtree(cache, ignore_errors=True)  # what an interrupted run has left
        write_shards(demo_documents(), cache, cfg, log)


def train_tokenizer(documents, vocab_size, path):
    """Train SentencePiece BPE with byte fallback and no normalization; write it to `path`."""
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in documents for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=200_000,
            max_sentence_length=16_384,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        message = f"VOCAB_SIZE={vocab_size}: raise or lower it for this text ({error})"
        raise UserError(message) from error
    write_atomically(path, model.getvalue())


def write_shards(documents, out_dir, cfg, log):
    """Tokenize texts to out_dir/fineweb_{train,val}_*.bin; train a tokenizer if there is none."""
    if len(documents) < 2:
        raise UserError(
            "tokenize: two documents are the least, since validation text must not be trained on"
        )
    if any(Path(out_dir).glob("fineweb_*.bin*")):
        raise UserError(f"tokenize: {out_dir} holds shards already; name a folder that has none")
    held = np.array([zlib.crc32(text.encode()) % 20 == 0 for text in documents])
    if held.all() or not held.any():
        held = np.arange(len(documents)) == len(documents) - 1
    if not Path(cfg.tokenizer_path).exists():
        log(f"training a tokenizer of {cfg.vocab_size} pieces: {cfg.tokenizer_path}")
        training = [text for text, is_held in zip(documents, held) if not is_held]
        train_tokenizer(training, cfg.vocab_size, cfg.tokenizer_path)
    _, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    tokens = {"train": [], "val": []}
    start_s = time.perf_counter()
    for first in range(0, len(documents), 2000):
        batch = documents[first : first + 2000]
        encoded = sp.encode(batch, num_threads=os.cpu_count())
        for ids, is_held in zip(encoded, held[first:]):
            document = np.array([sp.bos_id(), *ids], dtype=np.uint16)
            tokens["val" if is_held else "train"].append(document)
        done = progress_line(first + len(batch), len(documents), start_s, "documents")
        log(f"tokenize: {done}")
    for split, parts in tokens.items():
        stream = np.concatenate(parts)
        pieces = np.split(stream, range(SHARD_TOKENS, len(stream), SHARD_TOKENS))
        for number, piece in enumerate(pieces):
            path = Path(out_dir) / f"fineweb_{split}_{number:06d}.bin"
            write_atomically(path, shard_bytes(piece))
        log(f"{split}: {len(stream):,} tokens in {len(parts):,} documents")
    log(
        f"done: DATA_PATH={out_dir} TOKENIZER_PATH={cfg.tokenizer_path} VOCAB_SIZE={cfg.vocab_size}"
    )


def tokenize_command(out_dir, paths, environ):
    """Tokenize files into shards in out_dir."""
    cfg = config_from_env(environ)
    if odd := [path for path in paths if not path.endswith((".txt", ".jsonl", ".jsonl.zst"))]:
        raise UsageError(f"tokenize: {odd[0]} is none of .txt, .jsonl, .jsonl.zst")
    documents = []
    start_s = time.perf_counter()
    for number, path in enumerate(paths, 1):
        documents += [text for text in read_documents(path) if text.strip()]
        show(f"{len(documents):,} documents; {progress_line(number, len(paths), start_s, 'files')}")
    write_shards(documents, out_dir, cfg, show)


if __name__ == "__main__":
    os._exit(main())
