#!/usr/bin/env python3
"""Train, compress and honestly score a language model under the Parameter Golf rules, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
                                       train on 8xH100, write the artifact, score it, prove it
    PRESET=demo python train_gpt.py    the same on a laptop: no data, no GPU, three minutes
    train_gpt.py finish                go on with the run RUN_ID from the weights that it has kept
    train_gpt.py eval                  score the artifact at ARTIFACT_PATH again
    train_gpt.py verify                prove its figure by decoding
    train_gpt.py compress IN OUT       any file to code words, with the artifact
    train_gpt.py decompress IN OUT     and back, byte for byte
    train_gpt.py tokenize OUT FILE...  .txt, .jsonl, .jsonl.zst to token shards in the folder OUT
    train_gpt.py summarize JSON...     results of several seeds to submission.json; `--mixed` before
                                       them: of several scripts, devices or training texts
    train_gpt.py submit OUT JSON...    the challenge's record of them, complete, in a new folder OUT
    train_gpt.py pack OUT              this program as a small script that runs in its place

IN and OUT may be "-", standard input and output. An OUT file that exists stays, unless
REPLACE=1.

Settings are environment variables, the names of `Config`'s fields in capitals (--help lists them).
A run writes LOG_DIR/RUN_ID/train.log for people, results.json for programs, trace.npz for
logs/report.py, and the artifact, model.int6.lzma.

    shards -> train (Muon + AdamW, complementary loss) -> EMA -> quantize -> artifact on disk
                                                                                  |
    val_bpb <- bits <- score <- integer frequencies <- predict <- model <- artifact read back
          '--> update: TTT and the mixer learn from what has been scored

Bits per byte: val_bpb = sum over tokens of -log2(freq[x_t] / 2^24) / bytes of text. It is a code
length, since
  1. causal       the frequencies for position t depend on the artifact and on x_0..x_{t-1} alone;
  2. complete     every token of the vocabulary has a frequency >= 1, and they sum to exactly 2^24;
  3. score first  position t's frequencies are final before any state behind them has seen x_t;
  4. one pass     left to right, once. `Predictor` alone makes frequencies; out of order, it raises.

Shapes: B batch, T rows of a sequence, N = B T, W window, S stride, K = W - S, D width, H query
heads, G key and value heads, d head width, V vocabulary, n tokens without BOS, L lanes, R
positions, C contexts, M occurrences a context, J = C M candidates, F features. A row is the model's
input and output at one position; the Engine's banner says how rows, positions and lanes meet.
"""

import ast
import base64
import bisect
import codecs
import ctypes
import decimal
import difflib
import fcntl
import hashlib
import inspect
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from zlib import crc32

# torch's threads must not spin where ranks share cores; it reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    if torch.__version__ < "2.9.dev0":
        raise ImportError(f"torch {torch.__version__} is too old")
except (ImportError, OSError) as missing:  # OSError: a library of torch's own
    sys.exit(f"error: {missing}; pip install -r requirements.txt")

# ---- Config --------------------------------------------------------------------------------------
# All settings are fields of one frozen dataclass, in four groups: run (where things are on this
# machine; what is scored, logged and proved), train, model (fixed once weights exist) and eval
# (shapes the code length; the `eval` command may override it). The artifact stores all groups but
# run, of which it keeps only the preset's name. Each limit stands beside the default.


class UserError(Exception):
    """Report what the user can mend, in one line: the setting or file, and the way out."""


class UsageError(UserError):
    """Report a bad command line or setting."""


# What may end work that was done right, and then must not lose it.
FORESEEN = (UserError, KeyboardInterrupt, MemoryError, OSError, RuntimeError)


def one_line(error):
    """Return what an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def blaming(culprit, *causes, error=UserError):
    """Turn exceptions of the kinds `causes` in the block into `error`: culprit and cure, then why.

    The reason in brackets is the exception's own, in one line.
    """
    try:
        yield
    except causes as cause:
        raise error(f"{culprit} ({getattr(cause, 'strerror', None) or one_line(cause)})") from cause


frozen = dataclass(frozen=True)
BELOW_ONE = 0.999_999_999  # `maximum` of a setting that must stay below 1


class Natural(int):
    """Type of a setting that may be 0, where an int must be at least 1."""


def option(default, **limits):
    """Return a setting's field with its default and its limits.

    Limits: `minimum`, a number (default: 1 for an int, 0 for a Natural or a float); `maximum`, a
    number or the name of another property of Config (default: 2^63 - 1); `divides`, space-separated
    names of settings that must be multiples of this one; `choices`, the allowed words,
    comma-separated.
    """
    return field(default=default, metadata=limits)


@frozen
class RunSettings:
    """Places, what is scored, logged and proved, the cap; the artifact stores only `preset`.

    preset: settings for a purpose: record, bench or demo
    device: auto, cuda or cpu
    data_path: folder of the shards
    tokenizer_path: SentencePiece model
    run_id: folder of the run under LOG_DIR; empty: PRESET_seedSEED
    artifact_path: artifact to read; empty: LOG_DIR/RUN_ID/model.int6.lzma
    log_dir: where runs are written
    replace: replace an OUT that exists, or the results of another run
    val_tokens: validation tokens to score, from the start; 0: all
    size_limit_bytes: cap on code plus artifact
    log_every: training steps between two log lines
    verify_enabled: end a run with a proof: code, and decode in another process
    verify_tokens: tokens that are proved, from the stream's start; 0: all
    trace_tokens: tokens that trace.npz has, from the stream's start
    """

    preset: str = option("record", choices="record, bench, demo")
    device: str = option("auto", choices="auto, cuda, cpu")
    data_path: str = "data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "data/tokenizers/fineweb_1024_bpe.model"
    run_id: str = ""
    artifact_path: str = ""
    log_dir: str = "logs"
    replace: bool = False
    val_tokens: Natural = 0
    size_limit_bytes: int = 16_000_000
    log_every: int = 100
    verify_enabled: bool = True
    verify_tokens: Natural = 1000
    trace_tokens: int = 10_000


@frozen
class TrainSettings:
    """What shapes training.

    seed: seed of the initial weights
    iterations: most optimizer steps
    max_wallclock_seconds: training, 3 % of it for held-out text; 0: no limit, ITERATIONS decides
    train_batch_tokens: tokens in an optimizer step, over all ranks
    micro_batch_tokens: most tokens a rank takes through the model at once
    warmup_steps: untimed steps on made-up tokens, to compile kernels
    warmdown_iters: steps over which the learning rates fall to 0 at the end
    matrix_lr: Muon, matrices
    scalar_lr: AdamW, vectors and scalars
    tied_embed_lr: AdamW, embedding tables
    muon_momentum: reached from 0.92 over MUON_MOMENTUM_WARMUP_STEPS
    muon_momentum_warmup_steps: steps
    muon_wd: decoupled weight decay of Muon
    adam_wd: decoupled weight decay of AdamW
    grad_clip_norm: global gradient norm; 0: off
    ema_decay: average of the weights over steps; 0: off
    swa_enabled: average snapshots of the warmdown instead of the EMA
    swa_every: steps between two snapshots
    complement_alpha: complementary loss; 0: plain cross-entropy
    quantizer: fisher (with rANS) or int6 (with LZMA)
    target_kl: most loss that fisher should cost, nats a token; 0: fill the cap
    mixer_calibration_tokens: held-out text for MIXER=learned and fisher; 0: none
    """

    seed: Natural = 1337
    iterations: int = 20_000
    max_wallclock_seconds: float = 600.0
    train_batch_tokens: int = 786_432
    micro_batch_tokens: int = 98_304
    warmup_steps: Natural = 20
    warmdown_iters: Natural = 3500
    matrix_lr: float = 0.025
    scalar_lr: float = 0.025
    tied_embed_lr: float = 0.035
    muon_momentum: float = option(0.99, maximum=BELOW_ONE)
    muon_momentum_warmup_steps: int = 1500
    muon_wd: float = 0.04
    adam_wd: float = 0.04
    grad_clip_norm: float = 0.3
    ema_decay: float = option(0.997, maximum=BELOW_ONE)
    swa_enabled: bool = False
    swa_every: int = 50
    complement_alpha: float = option(0.5, maximum=1)
    quantizer: str = option("fisher", choices="fisher, int6")
    target_kl: float = 0.0
    mixer_calibration_tokens: Natural = 1_048_576


@frozen
class ModelSettings:
    """What is fixed once weights exist.

    vocab_size: tokens in the vocabulary (V)
    num_layers: transformer blocks
    model_dim: width of the residual stream (D)
    num_heads: query heads (H)
    num_kv_heads: key and value heads (G)
    mlp_mult: hidden width of the MLP in units of D
    xsa_last_n: last layers with exclusive self-attention
    rope_dims: leading dimensions of a head that are rotated
    bigram_vocab_size: rows of the hashed bigram table
    bigram_dim: width of the bigram and value tables
    ve_layers: layers with value embeddings, comma-separated; empty: none
    vrl_enabled: value residual learning
    logit_softcap: logits = cap * tanh(z / cap)
    qk_gain_init: initial per-head gain on queries
    train_seq_len: tokens in a training sequence; sets the rotary base
    """

    vocab_size: int = option(1024, minimum=8, maximum=65_536)  # TRACE_TOP
    num_layers: int = option(11, minimum=2)
    model_dim: int = 512
    num_heads: int = option(8, divides="model_dim")
    num_kv_heads: int = option(4, divides="num_heads")
    mlp_mult: int = 3
    xsa_last_n: Natural = option(4, maximum="num_layers")
    rope_dims: int = option(16, minimum=4, maximum="head_dim")
    bigram_vocab_size: int = option(2048, minimum=2)
    bigram_dim: int = 128
    ve_layers: str = "9,10"
    vrl_enabled: bool = True
    logit_softcap: float = option(30.0, minimum=1e-3)
    qk_gain_init: float = 1.5
    train_seq_len: int = option(2048, divides="train_batch_tokens micro_batch_tokens")


@frozen
class EvalSettings:
    """What shapes the code length; the `eval` command may override it.

    eval_stride: rows S of a tile; a row sees the W - S rows before it
    eval_seq_len: window W
    eval_run_tiles: tiles that pass their keys and values on; 0: until the weights change
    eval_dtype: what is proved; float32 or bfloat16: a quick look
    ttt_enabled: score-first test-time training
    ttt_schedule_chunks: chunks over which the TTT rate falls to 0
    ttt_lr: Adam
    ttt_epochs: optimizer steps a chunk
    ttt_chunk_tokens: positions scored between two TTT updates
    ttt_freeze_blocks: first blocks whose matrices TTT leaves alone
    ttt_temperature: divides the logits from the ttt stage on
    polyak_decay: average of TTT's weights that scores
    mixer: learned, entropy or none
    ngram_order: longest n-gram, the predicted token included; above 9 as 9
    ngram_recent: last occurrences that a context looks at
    ngram_hash_bits: 2^this heads of chains for each kind of context
    mixer_block: positions between two updates of the learned mixer
    mixer_lr: learned mixer, Adam
    min_count: occurrences that a context needs, else back off
    alpha_base: entropy mixer: alpha = base + range * sigmoid(2 (H - center))
    alpha_range: entropy mixer
    alpha_center: entropy mixer, nats of neural entropy H
    """

    eval_stride: int = option(64, divides="eval_seq_len")
    eval_seq_len: int = option(2048, divides="ttt_chunk_tokens")
    eval_run_tiles: Natural = 1
    eval_dtype: str = option("float64", choices="float64, float32, bfloat16")
    ttt_enabled: bool = True
    ttt_schedule_chunks: int = 1893
    ttt_lr: float = 5e-4
    ttt_epochs: int = 3
    ttt_chunk_tokens: int = 32_768
    ttt_freeze_blocks: Natural = option(9, maximum="num_layers")
    ttt_temperature: float = option(0.98, minimum=1e-3)
    polyak_decay: float = option(0.998, maximum=BELOW_ONE)
    mixer: str = option("learned", choices="learned, entropy, none")
    ngram_order: int = option(10, minimum=2)
    ngram_recent: int = 4
    ngram_hash_bits: int = option(26, maximum=30)
    mixer_block: int = option(16_384, divides="ttt_chunk_tokens")
    mixer_lr: float = 1e-3
    min_count: int = option(1, maximum="ngram_recent")
    alpha_base: float = option(0.0, maximum=1)
    alpha_range: float = 0.10
    alpha_center: float = 1.0


@frozen
class Config(EvalSettings, ModelSettings, TrainSettings, RunSettings):
    """All settings, with the defaults of the `record` preset (the 8xH100 run)."""

    def __post_init__(self):
        """Raise UsageError for the first impossible value or combination."""

        def need(ok, name, allowed):
            if not ok:
                raise UsageError(f"{name.upper()}={getattr(self, name)!r}: {allowed}")

        for name, setting in FIELDS.items():
            value = getattr(self, name)
            limits = setting.metadata
            if allowed := limits.get("choices"):
                need(value in allowed.split(", "), name, f"there are {allowed}")
            if isinstance(value, str):
                continue
            least = limits.get("minimum", int(setting.type is int))
            need(value >= least, name, f"must be at least {least}")
            for multiple in limits.get("divides", "").split():
                rest = getattr(self, multiple) % value
                need(not rest, multiple, f"must be a multiple of {name.upper()}={value}")
            most = limits.get("maximum", sys.maxsize)
            most = getattr(self, str(most), most)  # of a field checked before, or a property
            need(value <= most, name, f"must be at most {most:.9g}")
        self.value_layers  # noqa: B018 (it raises)
        most = 1 - self.alpha_base
        need(self.alpha_range <= most, "alpha_range", f"must be at most {most:.9g}, 1 - ALPHA_BASE")
        need(not self.rope_dims % 2, "rope_dims", "must be even")
        usable = self.quantizer == "fisher" and self.mixer_calibration_tokens >= self.train_seq_len
        need(usable or not self.target_kl, "target_kl", "takes QUANTIZER=fisher and held-out text")
        need(self.eval_stride < self.eval_seq_len, "eval_stride", "must be below EVAL_SEQ_LEN")

    @property
    def run_dir(self):
        """Folder of this run's log, results and artifact."""
        return Path(self.log_dir, self.run_id or f"{self.preset}_seed{self.seed}")

    @property
    def artifact(self):
        """Path of the artifact, to be written or to be evaluated."""
        return Path(self.artifact_path or self.run_dir / "model.int6.lzma")

    @property
    def head_dim(self):
        """Width d of an attention head."""
        return self.model_dim // self.num_heads

    @property
    def value_layers(self):
        """Layers with value embeddings, sorted; UsageError if VE_LAYERS does not list layers."""
        layers = range(self.num_layers)
        with blaming(
            f"VE_LAYERS={self.ve_layers!r}: must be comma-separated layers below "
            f"NUM_LAYERS={self.num_layers}",
            ValueError,
            error=UsageError,
        ):
            return sorted({layers.index(int(n)) for n in self.ve_layers.replace(",", " ").split()})


FIELDS = Config.__dataclass_fields__  # {setting: its field, as option() has made it}
# {setting: the group, one of those classes, that it belongs to}
GROUPS = {name: group for group in Config.__bases__ for name in group.__annotations__}
# What may differ when a command is repeated and its results are replaced; a regular expression.
PLACES = "run_id|log_dir|log_every|verify_enabled|verify_tokens|trace_tokens|replace|device"
DEMO_CACHE = ".cache/demo"
# Real FineWeb shards on two CPU cores: a smaller model with the same mechanisms, and a size limit
# at which quantization begins to cost something.
BENCH = dict(
    warmup_steps=0,
    muon_momentum=0.95,
    num_heads=4,
    num_kv_heads=2,
    eval_run_tiles=0,
    ttt_lr=1e-4,
    ttt_epochs=1,
    ttt_schedule_chunks=64,
    ttt_temperature=1.0,
    polyak_decay=0.0,
    mixer_block=64,
    val_tokens=131_072,
    size_limit_bytes=1_500_000,
    log_every=50,
    verify_tokens=20_000,
    iterations=600,
    max_wallclock_seconds=0.0,
    train_batch_tokens=4096,
    train_seq_len=512,
    warmdown_iters=300,
    muon_momentum_warmup_steps=300,
    ema_decay=0.0,
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
)
PRESETS = {  # but for `record`, which has the defaults
    "bench": BENCH,
    # No data, no GPU: a toy model on the docstrings of this machine, three minutes from start to
    # end.
    "demo": BENCH
    | dict(
        data_path=DEMO_CACHE,
        tokenizer_path=f"{DEMO_CACHE}/tokenizer.model",
        val_tokens=10_240,
        size_limit_bytes=500_000,
        log_every=10,
        verify_tokens=0,
        iterations=50,
        train_batch_tokens=8192,
        train_seq_len=256,
        warmdown_iters=25,
        ema_decay=0.9,
        num_layers=4,
        model_dim=128,
        bigram_dim=32,
        ve_layers="3",
        eval_seq_len=256,
        ttt_chunk_tokens=512,
        ttt_freeze_blocks=4,
        mixer_calibration_tokens=32_768,
    ),
}


def parse_setting(name, text):
    """Return a setting's value from its text; UsageError names the variable and what is allowed."""
    kind = type(FIELDS[name].default)
    words = {"0": False, "1": True, "False": False, "True": True}  # the last two as logs show them
    expected = {bool: "0 or 1", int: "a whole number"}.get(kind, "a finite number")
    with suppress(ValueError, KeyError):
        return words[text] if kind is bool else kind(text)
    raise UsageError(f"{name.upper()}={text!r}: expected {expected}")


def config_from_env(environ, stored=None):
    """Return the Config of preset, then `stored` (an artifact's settings), then the environment.

    UsageError names an impossible value, a variable whose name is a misspelled setting, or a
    setting of group model or train that differs from the artifact's; UserError, a stored setting
    that this version does not have.
    """
    settings = dict(stored or {})
    names = {name.upper(): name for name in FIELDS}
    for variable in environ:
        for meant in difflib.get_close_matches(variable, names, 1, 0.9):
            if variable != meant:
                raise UsageError(
                    f"{variable} is not a setting: did you mean {meant}? Otherwise unset it"
                )
            name = names[meant]
            value = parse_setting(name, environ[variable])
            fixed = settings.get(name)
            if fixed not in (None, value) and GROUPS[name] in (ModelSettings, TrainSettings):
                raise UsageError(
                    f"{meant}={value}: the weights have {fixed}; unset it or set another RUN_ID"
                )
            settings[name] = value
    with blaming("what is stored is of another version of this script", TypeError):
        return Config(**PRESETS.get(settings.get("preset"), {}) | settings)


# ---- Runtime -------------------------------------------------------------------------------------
# Rank, device and dtype are decided once and logged. What surrounds the program is not trusted:
# torchrun's variables count when all of them are there, threads are what this process may use,
# alike on every rank, and one product is compared with float64's. A log line that
# finds no terminal or no room ends no work; what a command writes is tried before the work.

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass
class Runtime:
    """Where this process runs: rank of world, device and compute dtype."""

    rank: int = 0  # rank 0 writes files and the log
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    dtype: torch.dtype = torch.float32
    notes: tuple = ()  # lines for the log: device, dtype and attention kernel, with their reasons

    def sum_over_ranks(self, tensor):
        """Sum `tensor` in place over the ranks; every rank must call it equally often."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """Return rank 0's value on every rank, by gloo: no host waits for its device.

        All ranks of the process group must call it, whatever `world` is.
        """
        sent = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(sent)
        return sent[0]

    def upload(self, tensor):
        """Return a CPU tensor on the device, by a copy for which the host does not wait."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def by_main(self, action, *args):
        """Return action(*args) of rank 0, None elsewhere, when rank 0 is done.

        What it raises ends rank 0, and with it the wait of the others: gloo raises RuntimeError.
        """
        result = action(*args) if self.rank == 0 else None
        self.from_main(None)
        return result

    def compiled(self, function):
        """Return `function` through torch.compile where that pays (CUDA), else as it is."""
        if self.device.type != "cuda":
            return function
        torch._dynamo.config.recompile_limit = 64  # shapes per function; torch raises beyond
        return torch.compile(function, dynamic=False, fullgraph=True)


def torchrun_ranks(environ):
    """Return [rank, ranks, rank on this machine, ranks on it]; alone where torchrun set not all."""
    if not environ.keys() >= {*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"}:
        return [0, 1, 0, 1]
    with blaming(f"unset {', '.join(TORCHRUN)}", ValueError, error=UsageError):
        return [int(environ[name]) for name in TORCHRUN]


def count_threads():
    """Return torch's threads (OMP_NUM_THREADS, or processors), or what the control group allows."""
    threads = torch.get_num_threads()
    with suppress(OSError, ValueError):  # there is no group, or its limit is "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return min(threads, -(-quota // period))
    return threads


def check_arithmetic(rt):
    """Raise UserError if a product of ones, exact in any type, is wrong on the device."""
    ones = torch.ones(256, 256, dtype=rt.dtype, device=rt.device)
    if not (ones @ ones == 256).all():
        raise UserError(
            f"{rt.dtype} products on {rt.device} are wrong: OpenMP or torch's math library is "
            "broken; unset OMP_DYNAMIC, OMP_THREAD_LIMIT and their like, or install torch again"
        )


def start_runtime(cfg, environ):
    """Return the Runtime that torchrun and DEVICE describe; join the group of its ranks."""
    rank, world, local_rank, ranks_here = torchrun_ranks(environ)
    cuda = cfg.device != "cpu" and torch.cuda.device_count() >= ranks_here
    if not cuda and cfg.device != "cpu" and (cfg.preset == "record" or cfg.device == "cuda"):
        raise UsageError(
            f"PRESET={cfg.preset} DEVICE={cfg.device}: torch sees no CUDA device for each rank; "
            "DEVICE=cpu insists, PRESET=demo and PRESET=bench with DEVICE=auto need none"
        )
    rt = Runtime(rank, world)
    units = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 lacks it
    name = units.get("cpu_name", os.uname().machine)
    kernel = "plain products"
    if cuda:
        rt.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(rt.device)
        name = torch.cuda.get_device_name()
        kernel = choose_flash()
    if cuda or units.get("avx512_bf16") or units.get("amx_bf16"):
        rt.dtype = torch.bfloat16
    if world > 1:
        # Ranks wait for rank 0 while it packs and proves.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(hours=2),
            device_id=rt.device if cuda else None,
        )
    torch.set_num_threads(rt.from_main(count_threads()))
    # glibc keeps what torch frees; returning it takes a third of a small step's time.
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap; old versions refuse a high threshold
        mallopt(-1, 0x7FFF_FFFF)  # M_TRIM_THRESHOLD, the most
        mallopt(-2, 0x1000_0000)  # M_TOP_PAD, 256 MiB
    check_arithmetic(rt)
    rt.notes = (
        f"{rt.device.type} {name}, {world} rank(s), {torch.get_num_threads()} CPU threads each",
        f"dtype {rt.dtype}",
        f"attention: {kernel}",
    )
    return rt


def say(line, file=None):
    """Show a line at once, on stdout or in `file`; a closed pipe or a full disk ends no work.

    One that ends in "\\r" tells progress: on a terminal, what is shown next takes its place.
    """
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: there is no stdout
        file = file or sys.stdout
        text = line.rstrip("\r")
        end = "\n"
        if file.isatty():
            if text != line:
                text = text[: shutil.get_terminal_size().columns]  # one row of the screen
                end = "\r"
            text = "\r\033[K" + text  # clears what stands there, a ^C too
        print(text, end=end, file=file, flush=True)


def is_stream(path):
    """Return whether what is written to `path` is no file: "-" (stdout), a device or a FIFO."""
    return str(path) == "-" or (os.path.exists(path) and not os.path.isfile(path))


def write_atomically(path, data, like=""):
    """Write bytes beside `path` and rename the file: no reader sees a part of them.

    A link is followed; a device, a FIFO and "-" are written to. A new file gets the mode of `like`.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".tmp{os.getpid()}")
    with blaming(f"cannot write {path}; free space or write elsewhere", OSError):
        if is_stream(path):
            with open(os.dup(1) if str(path) == "-" else path, "wb") as file:
                file.write(data)
            return
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file)
            if os.path.isfile(like):
                shutil.copymode(like, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def read_file(path, problem=""):
    """Return a file's bytes, stdin's for "-"; UserError: `problem` or the path, and the reason."""
    with (
        blaming(problem or f"cannot read {path}", OSError),
        open(os.dup(0) if str(path) == "-" else path, "rb") as file,
    ):
        return file.read()


def read_object(path):
    """Return the JSON object in a file as a dict; UserError names the file if there is none."""
    with blaming(f"{path} is not a JSON object; mend or remove it", ValueError, TypeError):
        return dict(json.loads(read_file(path)))


def write_object(path, contents):
    """Write a dict to a file as JSON for people and programs."""
    write_atomically(path, json.dumps(contents, indent=1).encode() + b"\n")


def check_writable(folder, need_bytes=0):
    """Return an open file without a name that takes need_bytes of `folder` until it is closed.

    The folder is made. UserError, before hours of work, without room or permission.
    """
    with blaming(
        f"LOG_DIR, OUT or TOKENIZER_PATH: cannot write {need_bytes:,} bytes to {folder}; "
        "name another",
        OSError,
    ):
        os.makedirs(folder, exist_ok=True)
        room = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (its user closes it)
        room.write(bytes(need_bytes))
        room.flush()
    return room


def check_target(cfg, target, *sources):
    """Return the log that goes with the output `target`: say(), on stderr if that is a stream.

    UserError, before work, if it cannot be written, is one of the sources, or is there already and
    REPLACE=1 does not allow to replace it.
    """
    path = Path(target).resolve()
    if os.path.isdir(path):
        raise UsageError(f"{str(target)!r} is a folder; name a file")
    if is_stream(target):
        return partial(say, file=sys.stderr)
    with blaming(f"cannot write {target}", OSError):
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name).close()
    if path.exists():
        if any(os.path.exists(source) and path.samefile(source) for source in sources):
            raise UsageError(f"{target} is read for this; name another OUT")
        if not cfg.replace:
            raise UsageError(f"{target} is there already; REPLACE=1 replaces it")
    return say


# ---- Tokenizer and byte accounting ---------------------------------------------------------------
# BPB divides by bytes, so a byte counted twice is a better score for nothing. A leading space
# counts only where a decoder prints one: not after a boundary (BOS, control, unknown, unused).
# Every document's count is compared with its text. A wrong tokenizer passes that test: its text is
# wrong, but counted correctly. So each shard's tokenizer is checked too (see Data).

SPACE = "\u2581"  # what SentencePiece writes for a space


@frozen
class TokenTable:
    """A tokenizer: piece i and its kind, a letter: Normal, Unknown, Control, X (unused), Byte."""

    pieces: tuple
    kinds: str
    bos_id: int

    @cached_property
    def digest(self):
        """SHA-256, bytes, of pieces, kinds and BOS id: equal tokenizers have equal digests."""
        return sha256(json.dumps(astuple(self)).encode())

    @cached_property
    def texts(self):
        """Bytes that each token prints, its leading space included; a boundary alone has none."""
        return tuple(
            bytes.fromhex(piece[3:5])  # <0x0A>
            if kind == "B"
            else piece.replace(SPACE, " ").encode() * (kind == "N")
            for piece, kind in zip(self.pieces, self.kinds)
        )

    @cached_property
    def byte_tables(self):
        """Bytes, int64; has a leading space among them, is a boundary, bool; each (V,)."""
        lengths = np.fromiter(map(len, self.texts), int)
        boundary = lengths == 0
        leading = ~boundary & [piece.startswith(SPACE) for piece in self.pieces]
        return lengths, leading, boundary

    @property
    def word_begins(self):
        """Whether a token has a leading space or is a boundary, bool (V,)."""
        _, leading, boundary = self.byte_tables
        return leading | boundary

    def count_bytes(self, tokens):
        """Count the bytes that tokens[1:] print, each after its predecessor; int64 (n - 1,)."""
        lengths, leading, boundary = self.byte_tables
        return lengths[tokens[1:]] - (leading[tokens[1:]] & boundary[tokens[:-1]])

    def decode(self, tokens):
        """Return the bytes of one document; no leading space at its start or after a boundary."""
        _, leading, boundary = self.byte_tables
        cut = leading[tokens] & np.append(True, boundary[tokens[:-1]])
        return b"".join(self.texts[t][c:] for t, c in zip(tokens.tolist(), cut.tolist()))


def load_tokenizer(path, vocab_size, table=None):
    """Return (TokenTable, processor) of a SentencePiece model.

    UserError if it is none, does not fit VOCAB_SIZE, has no BOS, has no piece for a lone space, or
    is not the tokenizer of `table`.
    """
    import sentencepiece

    with blaming(
        f"TOKENIZER_PATH: {path} is no SentencePiece model; mend it, or remove the demo's folder",
        RuntimeError,
        OSError,
    ):
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if sp.vocab_size() != vocab_size or sp.bos_id() < 0:
        raise UserError(f"VOCAB_SIZE={vocab_size}: {path} has {sp.vocab_size()} pieces, or no BOS")
    ids = list(range(vocab_size))
    tests = [test(ids) for test in (sp.is_unknown, sp.is_control, sp.is_unused, sp.is_byte)]
    kinds = "".join(np.select(tests, [*"UCXB"], "N"))
    found = TokenTable(tuple(sp.id_to_piece(ids)), kinds, sp.bos_id())
    if SPACE not in found.pieces:
        raise UserError(
            f"TOKENIZER_PATH={path}: no piece for a lone space, which would count as 3 bytes: "
            "train one with U+2581 in its vocabulary, as `tokenize` does"
        )
    if table and table != found:
        raise UserError(f"TOKENIZER_PATH={path}: the artifact has another tokenizer")
    return found, sp


def audit_bytes(table, tokens, sp=None):
    """Return what results.json says of a text: tokens[1:], their bytes, SHA-256 of these bytes.

    Each document's count is compared with its text: that of the processor `sp` where it is given,
    else the table's own. UserError where they differ, where a text is not UTF-8 (a last document
    may be cut inside a character), or where the stream does not begin with BOS.
    """
    counts = table.count_bytes(tokens)
    digest = hashlib.sha256()
    starts = np.flatnonzero(tokens == table.bos_id)
    if tokens[0] != table.bos_id:
        raise UserError(
            f"the validation stream must start with BOS (id {table.bos_id}), like every document"
        )
    for start, stop in itertools.pairwise([*starts, len(tokens)]):
        document = tokens[start:stop]
        is_last = stop == len(tokens)
        if sp and not is_last:
            text = sp.decode(document[1:].tolist()).encode()
        else:
            text = table.decode(document)
        counted = counts[start:stop].sum()  # with the next BOS, which prints nothing
        with blaming(
            f"validation document at token {start}: shards and tokenizer do not belong together",
            ValueError,
        ):
            codecs.utf_8_decode(text, "strict", not is_last)
            if counted != len(text):
                raise ValueError(f"{counted} bytes counted, {len(text)} decoded")
        digest.update(text)
    return dict(tokens=len(counts), bytes=int(counts.sum()), sha256=digest.hexdigest())


# ---- Data ----------------------------------------------------------------------------------------
# Official shards: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens;
# inside zstandard if named .zst. Ours have, after the count, the SHA-256 of their TokenTable (32
# bytes) and a CRC-32 of that and the tokens (4 bytes). Training reads shards in order, cyclically,
# and alike on any number of ranks. The end of the last one is never trained on: the mixer is
# calibrated on it.
#
# A shard that does not name its tokenizer is judged by its first 32,768 tokens, decoded and encoded
# again: documents come back whole from the tokenizer that made them, and with others soon differ;
# at most 0.9 of the tokens coming back is an error. On FineWeb (224 samples) at least 0.9999 come
# back; with nine others of 1,024 pieces, some trained on most of the same text, at most 0.07; with
# a twin trained without one document of 1,900 (10 pieces differ), 0.5.

SHARD_START = struct.pack("<ii", 20240520, 1)  # magic, version
SHARD_HEADER_BYTES = 1024
SAMPLE_BYTES = 66_560  # the header and 32,768 tokens
CHUNK_BYTES = 65_536


def read_chunks(path):
    """Yield a file's contents in parts, decompressed if its name ends in .zst.

    UserError for what cannot be read or is cut. Any window size of zstandard is accepted.
    """
    compressed = str(path).endswith(".zst")
    if compressed:
        import zstandard
    frame = None
    # zstandard raises a class of its own.
    with blaming(f"cannot read {path}; copy or make it again", Exception), open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            while data and compressed:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                if frame.eof:
                    frame = None
            yield data
        if frame:
            raise EOFError("its end is missing")


def read_shard(path, vocab_size, most_bytes=sys.maxsize):
    """Return one shard's tokens, or those in its first most_bytes, uint16 (n,).

    UserError for a file that is foreign, truncated, damaged or has tokens outside of the
    vocabulary. What lies beyond most_bytes is not checked, nor then is the checksum.
    """
    data = bytearray()
    for chunk in read_chunks(path):
        data += chunk
        if len(data) > most_bytes:
            break
    del data[most_bytes:]
    if not data.startswith(SHARD_START):
        raise UserError(f"shard {path} is no token shard of version 1: make one by `tokenize`")
    count = int.from_bytes(data[8:12], "little")
    if not SHARD_HEADER_BYTES < len(data) == min(SHARD_HEADER_BYTES + 2 * count, most_bytes):
        raise UserError(
            f"shard {path} is truncated or padded ({count:,} tokens); download it again"
        )
    tokens = np.frombuffer(data, "<u2", offset=SHARD_HEADER_BYTES)
    if len(tokens) == count and data != shard_bytes(tokens, data[12:44]):
        raise UserError(f"shard {path} is corrupt: its checksum differs; copy or make it again")
    if tokens.max() >= vocab_size:
        raise UserError(f"shard {path} has token id {tokens.max()}, beyond VOCAB_SIZE={vocab_size}")
    return tokens


def shard_bytes(tokens, tokenizer=b""):
    """Return a shard of uint16 tokens (n,): the inverse of read_shard.

    `tokenizer` is the digest of the TokenTable that made it; empty or zeros: unknown, as in
    official shards, which have no checksum.
    """
    body = np.asarray(tokens, "<u2").tobytes()
    crc = any(tokenizer) and crc32(tokenizer + body)
    return struct.pack("<8sI32sI976x", SHARD_START, len(tokens), tokenizer, crc) + body


def list_shards(cfg, split):
    """Return the shard files of `split` (train, val) in order; a file wins over its .zst twin.

    UserError for none, a gap in their numbers, or another file that looks like a shard.
    """
    folder = Path(cfg.data_path)
    # A .zst comes first, and its twin overwrites it.
    found = {
        path.name.removesuffix(".zst"): path for path in sorted(folder.glob("*"), reverse=True)
    }
    candidate = rf"fineweb_{split}|(?!fineweb_(train|val)).*\.bin"
    names = sorted(name for name in found if re.match(candidate, name))
    if not names:
        raise UserError(
            f"DATA_PATH: no fineweb_{split}_*.bin or .bin.zst in {folder}: get FineWeb's "
            "(see README), make some with `tokenize`, or run PRESET=demo, which needs none"
        )
    for number, name in enumerate(names):
        expected = f"fineweb_{split}_{number:06d}.bin"
        if name != expected:
            raise UserError(
                f"DATA_PATH: {folder} has {name} where {expected} is expected (.zst aside): shards "
                "are numbered without gaps, and nothing beside them may look like one"
            )
    return [found[name] for name in names]


def share_returned(sp, tokens):
    """Return the share of tokens, uint16 (n,), that come back when decoded and encoded again.

    Of each document only the tokens before its first difference count; 1.0 where none begins.
    """
    returned = wanted = 1
    for document in np.split(tokens, np.flatnonzero(tokens == sp.bos_id()))[1:]:
        ids = document[1:].tolist()
        returned += len(os.path.commonprefix([ids, sp.encode(sp.decode(ids))]))  # noqa: RUF071
        wanted += len(ids)
    return returned / wanted


def check_shards(paths, table, sp):
    """Return {SHA-256 of a shard's header and first tokens: its name}.

    UserError for two that are alike, and for another tokenizer than `table`'s: by the digest in the
    shard's header or, if it has none, by encoding again with the processor `sp`. If that is None
    too, the shard is trusted.
    """
    known = {}
    for path in paths:
        tokens = read_shard(path, len(table.pieces), SAMPLE_BYTES)
        digest = sha256(tokens.base).hex()
        if digest in known:
            raise UserError(f"DATA_PATH: {path} is a copy of {known[digest]}: remove one of them")
        known[digest] = path.name
        maker = tokens.base[12:44]
        # Another tokenizer is named, or none is and what comes back speaks against this one.
        if maker != table.digest and (any(maker) or (sp and share_returned(sp, tokens) <= 0.9)):
            raise UserError(
                f"DATA_PATH: {path} was made with another tokenizer than TOKENIZER_PATH or "
                "artifact; set the one that belongs to it"
            )
    return known


def load_validation(cfg):
    """Return the validation stream, int64 (n + 1,): all shards, up to VAL_TOKENS predictions."""
    shards = [read_shard(path, cfg.vocab_size) for path in list_shards(cfg, "val")]
    tokens = np.concatenate(shards)[: (cfg.val_tokens or sys.maxsize) + 1].astype(np.int64)
    if len(tokens) <= cfg.eval_seq_len:
        raise UserError(
            f"the validation stream has {len(tokens):,} tokens, less than a window and a target: "
            f"raise VAL_TOKENS, lower EVAL_SEQ_LEN={cfg.eval_seq_len} or add text"
        )
    return tokens


def load_held_out(cfg):
    """Return the end of the last training shard, int64 (n + 1,), which is not trained on.

    It is for the mixer's calibration and for fisher; others keep it too, so that all train on the
    same text for the same time. Empty if MIXER_CALIBRATION_TOKENS=0.
    """
    wanted = cfg.mixer_calibration_tokens + 1
    if wanted == 1:
        return np.int64([])
    shard = read_shard(list_shards(cfg, "train")[-1], cfg.vocab_size)
    if len(shard) < 2 * wanted:
        raise UserError(
            f"MIXER_CALIBRATION_TOKENS={wanted - 1}: over half of the last shard; lower it"
        )
    return shard[-wanted:].astype(np.int64)


def train_stream(cfg, held_out, count):
    """Return an endless iterator over the training text in steps of `count` tokens.

    A step: (its tokens and the one after them, int64 (count + 1,); how many times all shards have
    been read over). Without the `held_out` tokens at the end of the last shard; alike on all ranks.
    """
    files = list_shards(cfg, "train")
    reader = ThreadPoolExecutor(1)

    def read(number):
        path = files[number % len(files)]
        shard = read_shard(path, cfg.vocab_size)
        return shard[: len(shard) - held_out * (path == files[-1])]

    def steps(tokens):
        for number in itertools.count():
            following = reader.submit(read, number + 1)
            while len(tokens) > count:
                yield tokens[: count + 1].astype(np.int64), number // len(files)
                tokens = tokens[count:]
            tokens = np.concatenate([tokens, following.result()])

    return steps(read(0))  # a bad first shard is found out at once


def micro_batches(tokens, cfg, rt):
    """Return this rank's share of a step's sequences: [(x, y)], int64 (B, T), on the device."""
    share = cfg.train_batch_tokens // cfg.train_seq_len // rt.world
    most = cfg.micro_batch_tokens // cfg.train_seq_len
    size = max(size for size in range(1, most + 1) if not share % size)
    shape = rt.world, -1, size, cfg.train_seq_len
    mine = [rt.upload(torch.from_numpy(t).view(shape)[rt.rank]) for t in (tokens[:-1], tokens[1:])]
    return list(zip(*mine))


# ---- Model ---------------------------------------------------------------------------------------
# An 11-layer GQA transformer with a U-Net of skips, 26,993,766 parameters by default. XSA takes out
# of a head's output its projection on the position's own value; value residual learning (VRL) adds
# the first layer's values, and value embeddings a table's rows, to those of later layers; a hashed
# bigram table and a smear gate show the first layer the previous token at little cost. One forward
# path serves training, scoring and TTT. It runs on what cast() returns: weights in the compute
# dtype, scales folded in, tables projected. Training casts anew in every pass, the engine once for
# each set of weights.

# Tokens before a row that its embedding needs: smear looks 1 back, that row's bigram 1 more.
EMBED_CONTEXT = 2


def role(name):
    """Return a parameter's role: optimizers and quantizers treat equal roles alike.

    matrix and projection: Muon; table and vector (all others, of any shape, the mixer's weights
    too): AdamW. The quantizers give levels to all but vectors, int6 not to projections either.
    """
    if name in ("embed.tokens", "embed.bigrams", "ve_table"):
        return "table"
    if re.search(r"\.(q|k|v|attn_out|mlp_in|mlp_out)$", name):  # of a block
        return "matrix"
    return "projection" if name.endswith("_proj") else "vector"


def attention(q, k, v, bias):
    """Return softmax(q k' / sqrt(d) + bias) v, (B, H, T, d).

    q (B, H, T, d); k, v (B, G, T', d); bias (H / G * T, T'), or None for a fused kernel: each row
    sees itself and those before. Plain products, since SDPA's kernel for CPUs takes twice as long.
    """
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows = q.reshape(-1, len(bias), q.size(-1))
    scores = torch.baddbmm(bias, rows, k.flatten(0, 1).mT, alpha=q.size(-1) ** -0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view_as(q)


# SDPA by FlashAttention or not at all: what the log names is what trains. A decorator.
flash_only = nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION)


def choose_flash():
    """Let FlashAttention be version 3 if it works here; return the log's words for the choice."""
    try:
        nn.attention.activate_flash_attention_impl("FA3")
        try:
            q = torch.ones(1, 2, 8, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            flash_only(attention)(q, q, q, None).sum().backward()
        except Exception:
            nn.attention.restore_flash_attention_impl()
            raise
        return "FlashAttention-3"
    except Exception as error:  # a foreign package: missing, or of another version
        return f"torch's FlashAttention; no FlashAttention-3: {one_line(error)}"


def causal_bias(rows, known, reach, like):
    """Return 0 where row i sees key j, else -inf, (rows, known + rows); row i is key known + i.

    A row sees itself and the `reach` keys before it. Device and dtype are those of `like`.
    """
    return like.new_ones(rows, known + rows).tril(known).triu(known - reach).log()  # 0 or -inf


def unit(x):
    """Return x / |x| over the last dimension; cast() folds RMSNorm's sqrt(D) into weights.

    Zeros, which a quantizer can make of a row or a head, stay zeros, and so is their gradient.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return (x / F.threshold(norm, 0.0, math.inf)).to(x.dtype)


def exclude_self(y, v):
    """Return y (N, H, d) less its projection on the row's own value v (N, G, d): XSA."""
    grouped = y.unflatten(1, (v.size(1), -1))
    direction = unit(v).unsqueeze(2)
    along = (grouped * direction).sum(-1, keepdim=True)
    return torch.addcmul(grouped, along, direction, value=-1)


def rotary_rates(cfg):
    """Return each dimension's rotary rate, in radians a row, float64 (d,): 0 from ROPE_DIMS on.

    Su et al., 2021, with the base NTK-scaled where training sequences exceed 1,024 rows. The rates
    of the first half turn backwards: rotate() adds to a dimension its partner times the sine.
    """
    dims = cfg.rope_dims
    base = 10_000.0 * max(1.0, cfg.train_seq_len / 1024) ** (dims / (dims - 2))
    rates = base ** (-torch.arange(0, dims, 2).double() / dims)
    return F.pad(torch.cat([-rates, rates]), (0, cfg.head_dim - dims))


def rotate(x, cos, sin, half):
    """Return x (N, heads, d), dimensions i and i + half turned, i < half; cos, sin (N, 1, d)."""
    first, second, rest = x.tensor_split((half, 2 * half), -1)
    return torch.addcmul(x * cos, torch.cat([second, first, rest], -1), sin)


def parameter(*shape, fill=0.0):
    """Return a new parameter of this shape, full of one number."""
    return nn.Parameter(torch.full(shape, fill))


class Embedding(nn.Module):
    """Token table + hashed bigram table, RMS-normed, then smeared with the position before."""

    def __init__(self, cfg):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(cfg.vocab_size, cfg.model_dim) * 0.005)
        self.bigrams = parameter(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.bigram_proj = parameter(cfg.model_dim, cfg.bigram_dim)
        self.bigram_scale = parameter(fill=0.05)
        self.smear = parameter(cfg.model_dim)

    def cast(self, dtype):
        """Return (token table, projected bigram table, smear gate) in `dtype`."""
        bigrams = F.linear(self.bigrams.to(dtype), (self.bigram_scale * self.bigram_proj).to(dtype))
        return self.tokens.to(dtype), bigrams, torch.sigmoid(self.smear).to(dtype)

    def forward(self, tokens, weights):
        """Embed tokens (B, T) as (B, T, D); the row before the first counts as zeros.

        Pairs of tokens are hashed to rows of the bigram table, whose last row is position 0's.
        """
        table, bigrams, gate = weights
        last = len(bigrams) - 1
        hashed = (36313 * tokens[:, 1:] ^ 27191 * tokens[:, :-1]) % last
        x = F.embedding(tokens, table)
        x = x + F.embedding(F.pad(hashed, (1, 0), value=last), bigrams)
        x = unit(x) * x.size(-1) ** 0.5
        return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), gate)


class Block(nn.Module):
    """One transformer layer: attention and MLP on normed, depth-scaled inputs."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer
        self.heads = (cfg.num_heads, cfg.num_kv_heads)
        self.xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        D = cfg.model_dim
        hidden = cfg.mlp_mult * D
        kv = cfg.num_kv_heads * cfg.head_dim
        self.norm_scale = math.sqrt(D / (layer + 1))
        self.q = parameter(D, D)
        self.k = parameter(kv, D)
        self.v = parameter(kv, D)
        self.attn_out = parameter(D, D)
        self.mlp_in = parameter(hidden, D)
        self.mlp_out = parameter(D, hidden)
        self.q_gain = parameter(cfg.num_heads, fill=cfg.qk_gain_init)
        self.mix_x = parameter(D, fill=1.0)
        self.mix_x0 = parameter(D)
        self.attn_scale = parameter(D, fill=1.0)
        self.mlp_scale = parameter(D, fill=1.0)

    def cast(self, dtype):
        """Return the weights in `dtype`; matrices (out, in) have their scales in them.

        [mix_x, mix_x0, qkv, gain (H + G, 1) of normed queries and keys, attn_out, mlp_in, mlp_out]
        """
        H, G = self.heads
        gain = F.pad(self.q_gain, (0, G), value=1.0)
        weights = (
            self.mix_x,
            self.mix_x0,
            torch.cat([self.q, self.k, self.v]) * self.norm_scale,
            gain[:, None] * (len(self.q) / H) ** 0.5,
            self.attn_out * self.attn_scale[:, None],
            self.mlp_in * self.norm_scale,
            self.mlp_out * self.mlp_scale[:, None],
        )
        return [w.to(dtype) for w in weights]

    def forward(self, x, x0, extra_v, rows, weights):
        """Return (output (N, D), own values (N, G, d)).

        x, x0 (N, D): the residual stream and the embedding; extra_v (N, G, d) or 0 is added to own
        values; rows: (B, rotate()'s arguments but x, attention's bias or None, Cache of the
        rows before or None); weights: those of cast().
        """
        batch, turns, bias, cache = rows
        mix_x, mix_x0, qkv_in, gain, attn_out, mlp_in, mlp_out = weights
        H, G = self.heads
        x = torch.addcmul(mix_x * x, mix_x0, x0)
        qkv = F.linear(unit(x), qkv_in).view(len(x), H + 2 * G, -1)
        qk, own_v = qkv.split((H + G, G), 1)
        qk = rotate(unit(qk) * gain, *turns)
        v = own_v + extra_v
        q, keys, values = (
            z.unflatten(0, (batch, -1)).transpose(1, 2) for z in (*qk.split(self.heads, 1), v)
        )
        if cache:
            keys, values = cache.append(self.layer, keys, values)
        y = attention(q, keys, values, bias).transpose(1, 2).flatten(0, 1)
        if self.xsa:
            y = exclude_self(y, v)
        x = torch.addmm(x, y.reshape_as(x), attn_out.T)
        h = F.leaky_relu(F.linear(unit(x), mlp_in), 0.5).square()
        return torch.addmm(x, h, mlp_out.T), own_v


class GPT(nn.Module):
    """The model: forward(tokens) -> logits. `dtype` is that of the computation."""

    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.cfg = cfg
        self.embed = Embedding(cfg)
        self.register_buffer("rotary_rates", rotary_rates(cfg), persistent=False)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.skip_weights = parameter(cfg.num_layers // 2, cfg.model_dim, fill=1.0)
        if cfg.value_layers:
            self.ve_table = nn.Parameter(torch.randn(cfg.vocab_size, cfg.bigram_dim) * 0.01)
            self.ve_proj = parameter(cfg.num_kv_heads * cfg.head_dim, cfg.bigram_dim)
            self.ve_scale = parameter(fill=0.1)
            self.ve_layer_scales = parameter(len(cfg.value_layers), fill=1.0)
        if cfg.vrl_enabled:
            self.vrl_scales = parameter(cfg.num_layers - 1)
        for name, p in self.named_parameters():
            # attn_out and mlp_out stay zero: a new block is the identity.
            if role(name) in ("matrix", "projection") and not name.endswith("_out"):
                nn.init.orthogonal_(p)

    def cast(self):
        """Return what forward computes with: weights in the compute dtype, tables projected.

        (embedding's, {layer: value embeddings (V, G, d)}, skip weights, VRL scales, blocks', head).
        """
        cfg = self.cfg
        dtype = self.dtype
        embed = self.embed.cast(dtype)
        values = {}
        if cfg.value_layers:
            table = F.linear(self.ve_table.to(dtype), self.ve_proj.to(dtype))
            table = table.unflatten(-1, (-1, cfg.head_dim))
            scales = (self.ve_scale * self.ve_layer_scales).to(dtype)
            values = {i: table * scale for i, scale in zip(cfg.value_layers, scales)}
        return (
            embed,
            values,
            self.skip_weights.to(dtype),
            self.vrl_scales.to(dtype) if cfg.vrl_enabled else None,
            [block.cast(dtype) for block in self.blocks],
            embed[0] * cfg.model_dim**0.5,  # the head
        )

    def forward(self, tokens, weights=None, cache=None, lead=0, unwanted=0):
        """Return the logits (B, T - unwanted, V), fp32 at least, of rows `unwanted` to T - 1.

        tokens (B, lead + T) int64: the first `lead` only complete the embedding of the T rows after
        them. weights: what cast() has returned; None: cast now. With a cache, the T rows follow the
        rows in it, see them and are appended.
        """
        embed, values, skip_weights, vrl, blocks, head = weights or self.cast()
        x = self.embed(tokens, embed)[:, lead:]
        B, T, _ = x.shape
        cfg = self.cfg
        first, known, reach = cache.grow(T) if cache else (0, 0, T)
        bias = None  # causal, by a fused kernel
        if cache or not x.is_cuda:
            bias = causal_bias(T, known, reach, x).repeat(cfg.num_heads // cfg.num_kv_heads, 1)
        angle = torch.arange(first, first + T, device=x.device)[:, None, None] * self.rotary_rates
        cos, sin = (t.to(x.dtype).repeat(B, 1, 1) for t in (angle.cos(), angle.sin()))
        rows = B, (cos, sin, cfg.rope_dims // 2), bias, cache

        x = x0 = x.flatten(0, 1)
        tokens = tokens[:, lead:].flatten()
        v0 = None  # the first layer's values
        skips = []
        half = len(skip_weights)
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x = torch.addcmul(x, skip_weights[i - half], skips.pop())
            extra_v = vrl[i - 1] * v0 if cfg.vrl_enabled and i else 0
            if i in values:
                extra_v += values[i][tokens]
            x, own_v = block(x, x0, extra_v, rows, blocks[i])
            if not i:
                v0 = own_v
            if i < half:
                skips.append(x)
        x = x.unflatten(0, (B, -1))[:, unwanted:]
        z = F.linear(unit(x), head).to(torch.promote_types(x.dtype, torch.float32))
        return cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)


class Cache:
    """Keys and values of the last rows of B sequences, for the rows that follow.

    Protocol: the model calls grow() once a pass, then append() in each layer. A row sees itself and
    the `reach` rows before it, however the sequences were cut into passes.
    """

    def __init__(self, model, batch, reach, pass_rows):
        self.reach = reach
        self.rows = 0  # rows so far, which is the next row's number
        self.used = 0  # slots of the store in use, by the last rows
        cfg = model.cfg
        shape = (cfg.num_layers, 2, batch, cfg.num_kv_heads, 2 * reach + pass_rows, cfg.head_dim)
        self.store = model.skip_weights.new_empty(shape, dtype=model.dtype)

    def grow(self, rows):
        """Make room for `rows` rows; return (first one's number, kept rows before it, reach)."""
        known = min(self.reach, self.used)
        first = self.used - known  # slot of the first row that is seen
        if self.used + rows > self.store.size(4):  # first > reach = known: no overlap
            self.store.narrow(4, 0, known).copy_(self.store.narrow(4, first, known))
            first = 0
        self.seen = self.store.narrow(4, first, known + rows)
        self.new = self.seen.narrow(4, known, rows)
        self.used = first + known + rows
        self.rows += rows
        return self.rows - rows, known, self.reach

    def append(self, layer, k, v):
        """Take in a layer's new keys and values (B, G, T, d); return all that the pass sees."""
        self.new[layer, 0] = k
        self.new[layer, 1] = v
        return self.seen[layer].unbind()


def new_model(cfg, rt, weights=None, dtype=None):
    """Return a model on the device, alike on all ranks, with `weights` or those drawn from SEED.

    It computes in `dtype`, a name; None: the training dtype. In float64 its parameters are float64
    too, otherwise fp32. RuntimeError names weights that are missing, too many or of another shape.
    """
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, getattr(torch, dtype) if dtype else rt.dtype)
    if weights:
        model.load_state_dict({n: weights[n] for n in weights if n != "mixer"})
    if dtype == "float64":
        model.double()
    return model.to(rt.device)


# ---- Complementary objective ---------------------------------------------------------------------
# The mixer predicts well what bigram statistics predict, so such tokens weigh less in the model's
# loss: 1 - alpha * p(token | previous), at least 0.1 (openai/parameter-golf PR 1033). p is from the
# counts before the step.


def complementary_weights(counts, x, y, alpha):
    """Return max(0.1, 1 - alpha * count(x, y) / (total(x) + 1)), fp32 (B, T) like x and y.

    counts int32 (V, V): of each (previous, next) over the training stream before this step.
    """
    p = counts[x, y].double() / (counts.sum(1)[x] + 1)
    return (1 - alpha * p).clamp(min=0.1).float()


def count_pairs(counts, batches, rt):
    """Add to `counts` the pairs of a step's batches over all ranks, once the step has used it."""
    new = torch.zeros_like(counts)
    for pair in batches:
        new.index_put_(pair, new.new_ones(()), accumulate=True)
    counts += rt.sum_over_ranks(new)


# ---- Optimizers, schedules -----------------------------------------------------------------------
# Muon orthogonalizes the momentum of each matrix (Jordan et al., 2024); matrices of one shape go
# through it together, since one at a time costs mostly overhead. torch's AdamW with fp32 state
# takes tables and vectors. Schedules depend on step and clock alone.


def orthogonalize(matrices):
    """Return matrices (n, rows, cols) with all singular values near 1, by five Newton-Schulz steps.

    They are computed in the matrices' dtype: bfloat16 where it is multiplied in hardware.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalize(matrices.mT).mT
    x = F.normalize(matrices, dim=(1, 2), eps=1e-7)
    for _ in range(5):  # x -> 3.4445 x - 4.775 (xx')x + 2.0315 (xx')^2 x
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's rule, for all matrices of one shape at once, shared by the ranks of `rt`.

    Of each shape, a rank orthogonalizes every rt.world-th matrix; one sum gives all to all.
    """

    @torch.no_grad()
    def step(self):
        """Move every matrix by -lr sqrt(max(1, rows / cols)) times its orthogonalized momentum."""
        for group in self.param_groups:
            rt = group["rt"]
            own = slice(rt.rank, None, rt.world)
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                grads = torch.stack([p.grad for p in params])
                mean = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
                mean.lerp_(grads, 1 - group["momentum"])
                share = grads.lerp_(mean, group["momentum"])[own]
                update = torch.zeros_like(grads)
                update[own] = orthogonalize(share.to(rt.dtype))
                rt.sum_over_ranks(update)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1, rows / cols) ** 0.5
                torch._foreach_add_(params, update.unbind(), alpha=-rate)


def new_optimizers(model, cfg, rt):
    """Return (Muon, AdamW); a group's rate is its `peak_lr` times the schedule's factor."""

    def group(*roles, **settings):
        return dict(params=[p for n, p in model.named_parameters() if role(n) in roles], **settings)

    muon = group("matrix", "projection", peak_lr=cfg.matrix_lr, weight_decay=cfg.muon_wd, rt=rt)
    adam = torch.optim.AdamW(
        [group("table", peak_lr=cfg.tied_embed_lr), group("vector", peak_lr=cfg.scalar_lr)],
        betas=(0.9, 0.95),
        weight_decay=cfg.adam_wd,
        fused=model.skip_weights.is_cuda,
    )
    return Muon([muon], {}), adam


def steps_left(step, elapsed_s, limit_s, cfg):
    """Return how many steps are left after `step` >= 1 steps: a number >= 0, maybe a fraction.

    Those of ITERATIONS or, if fewer, those for which limit_s leaves time at the mean pace so far.
    """
    return max(0.0, min(cfg.iterations - step, (limit_s - elapsed_s) / (elapsed_s / step)))


# ---- Training loop -------------------------------------------------------------------------------
# A step: micro-batches forward and backward, gradients averaged over ranks in one flat buffer, a
# check that loss and gradient are finite *before* any weight moves, clip, two optimizers, average.
# The host waits for the device in that check alone: while the optimizers run, it sends the next
# step's tokens, and a thread has read the shard that comes next. Rank 0's clock stops all ranks at
# one step. Before it starts, kernels are compiled on made-up tokens and the weights are restored.

# Share of MAX_WALLCLOCK_SECONDS kept for what reads the held-out text, if there is any.
CALIBRATION_SHARE = 0.03
WEIGHTS = "weights.pt"  # in the run's folder, from the last step until the run is finished


@dataclass
class TrainResult:
    """What training did, and why it ended early if it did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    warmup_seconds: float = 0.0
    calibration_seconds: float = 0.0  # all that reads held-out text, fisher's gradients included
    stopped: str = ""  # why training ended early; empty: all steps were taken, or the time was up


def training_loss(model, rt):
    """Return loss(x, y, weights) -> (weighted, plain) mean, nats a token, compiled where that pays.

    x, y int64 (B, T); weights fp32 (B, T). On CUDA, attention is that of choose_flash().
    """

    def loss(x, y, weights):
        nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        return (weights.flatten() * nats).mean(), nats.detach().mean()

    return flash_only(rt.compiled(loss))


class Trainer:
    """The state of a training run and one step of it."""

    def __init__(self, model, loss, cfg, rt):
        self.model = model
        self.loss = loss
        self.cfg = cfg
        self.rt = rt
        self.optimizers = new_optimizers(model, cfg, rt)
        self.params = [p.detach() for p in model.parameters()]
        self.mean = deepcopy(self.params)  # the EMA, or of SWA's snapshots
        self.snapshots = 0
        # Exact counts of (previous, next) over the stream so far, alike on every rank.
        self.counts = torch.zeros(2 * [cfg.vocab_size], dtype=torch.int32, device=rt.device)

    def gradients(self, batches):
        """Fill .grad with the weighted loss's gradient over all ranks, without waiting for it.

        Return [weighted loss, plain loss, norm of the gradient], fp32 (3,), on the device.
        """
        totals = torch.zeros(3, device=self.rt.device)
        for pair in batches:
            weights = complementary_weights(self.counts, *pair, self.cfg.complement_alpha)
            losses = torch.stack(self.loss(*pair, weights)) / len(batches) / self.rt.world
            losses[0].backward()
            totals[:2] += losses.detach()
        sums = [*(p.grad for p in self.model.parameters()), totals]
        flat = self.rt.sum_over_ranks(parameters_to_vector(sums))
        vector_to_parameters(flat, sums)
        totals[2] = flat[:-3].norm()
        return totals

    def step(self, batches, step, scale):
        """Take one optimizer step; return (weighted, plain) loss.

        UserError, before any weight has moved, if loss or gradient is not finite.
        """
        totals = self.gradients(batches)
        *losses, norm = totals.tolist()  # the one time in a step that the host waits
        if not math.isfinite(sum(losses, norm)):
            raise UserError(
                f"loss {losses[1]}, gradient norm {norm}; "
                "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR"
            )
        if limit := self.cfg.grad_clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, totals[2])
        warm = min(1.0, step / self.cfg.muon_momentum_warmup_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
                # Muon's: linear from 0.92. AdamW has its betas.
                group["momentum"] = 0.92 + (self.cfg.muon_momentum - 0.92) * warm
            optimizer.step()
            optimizer.zero_grad()
        count_pairs(self.counts, batches, self.rt)
        self.average(step + 1, scale)
        return losses

    def average(self, step, scale):
        """Average the weights after step `step` (from 1) at learning-rate factor `scale`."""
        weight = 1 - min(self.cfg.ema_decay, step / (step + 10))
        if self.cfg.swa_enabled:
            if scale >= 0.2 or step % self.cfg.swa_every:
                return
            self.snapshots += 1
            weight = 1 / self.snapshots
        torch._foreach_lerp_(self.mean, self.params, weight)

    def install_average(self):
        """Replace the weights by the mean of SWA's snapshots if it is on, else by the EMA."""
        if self.snapshots or not self.cfg.swa_enabled:  # with EMA_DECAY=0 it is the weights
            torch._foreach_copy_(self.params, self.mean)


def train(model, cfg, rt, log, held_out):
    """Train `model` in place on all shards but their last `held_out` tokens; return a TrainResult.

    NaN, infinity, a bad shard and Ctrl-C end training early: the result says why, and the model has
    the last good weights. Either way, the average of EMA_DECAY or SWA_ENABLED replaces them. From
    then on signals are ignored, until the caller has written them.
    """
    stream = train_stream(cfg, held_out, cfg.train_batch_tokens)
    epochs = 0
    result = TrainResult()
    limit_s = cfg.max_wallclock_seconds or math.inf
    if held_out:
        limit_s *= 1 - CALIBRATION_SHARE
    loss = training_loss(model, rt)
    start_s = perf_counter()
    untouched = deepcopy(model.state_dict())
    trainer = Trainer(model, loss, cfg, rt)
    tokens = np.arange(cfg.train_batch_tokens + 1) % cfg.vocab_size
    for step in range(cfg.warmup_steps):
        log(f"warm-up, to compile every kernel: step {step + 1}/{cfg.warmup_steps}, not timed\r")
        trainer.step(micro_batches(tokens, cfg, rt), step, scale=0.1)
    model.load_state_dict(untouched)
    result.warmup_seconds = perf_counter() - start_s
    trainer = Trainer(model, loss, cfg, rt)
    left = cfg.iterations
    start_s = perf_counter()
    try:
        while left >= 1:
            scale = min(1.0, left / max(cfg.warmdown_iters, 1))  # 1, then linear to 0
            tokens, epochs = next(stream)
            losses = trainer.step(micro_batches(tokens, cfg, rt), result.steps, scale)
            result.seconds = rt.from_main(perf_counter() - start_s)
            result.steps += 1
            result.tokens += cfg.train_batch_tokens
            left = steps_left(result.steps, result.seconds, limit_s, cfg)
            if not result.steps % cfg.log_every or result.steps == 1 or left < 1:
                end = "\r" * (left >= 1)  # the last step's line stays
                log(
                    f"step {result.steps}/{cfg.iterations}  "
                    f"ETA {left * result.seconds / result.steps:.0f} s  loss {losses[1]:.4f} "
                    f"(weighted {losses[0]:.4f})  lr x{scale:.3f}  "
                    f"{result.tokens / result.seconds:,.0f} tokens/s  {result.seconds:.0f} s{end}"
                )
    except FORESEEN as error:
        on_signals()  # at once: torchrun's SIGTERM follows the failure of another rank
        result.stopped = f"after step {result.steps}: {one_line(error)}"
        if isinstance(error, RuntimeError):
            log(traceback.format_exc())
    on_signals()  # until the weights are on disk
    trainer.install_average()
    if epochs:
        log(f"note: the shards were read {epochs} time(s) over; more shards would help")
    return result


# ---- Quantization --------------------------------------------------------------------------------
# Two quantizers, each governed by one number, its *coarseness*, which is chosen so that code and
# artifact just fit the cap, or what TARGET_KL allows; doubling it saves about a bit a weight.
#
# int6: block matrices become -31..31 with one fp16 scale a row, tables int8, the rest fp16. The top
# level of a matrix's row stands at coarseness times the row's root mean square. LZMA finds the
# entropy.
#
# fisher: precision goes where the loss is curved. Behind an entropy coder only a weight's *step*
# counts, not the number of its levels: nothing is clipped, and the step of weight (r, c) is
# coarseness / sqrt(F_rc). F, the diagonal of the Fisher information, is a row's part times a
# column's, from gradients of text that was not trained on; KL grows by F step^2 / 24 a weight. GPTQ
# (Frantar et al., 2022) lets later columns make up for the rounding of earlier ones; its Hessian is
# here the mean of G'G, G the gradient of a sequence, in place of the inputs' covariance.

# How int6 stores parameters of each role, others as fp16; fisher gives levels to all but vectors.
KINDS = {"matrix": "int6", "table": "int8"}
# The finest, first and coarsest coarseness that is tried. Below 4, a Gaussian row of int6 loses
# more to clipping than it gains in precision; below 2^-20 fisher gains nothing.
COARSENESS = {"int6": (4.0, 12.0, 64.0), "fisher": (2.0**-20, 2.0**-14, 1.0)}
FISHER_SEQUENCES = 48  # of the held-out text; 8 are too few, 256 are no better


def quantize(w, kind, coarseness):
    """Return (int8 levels (rows, cols), fp16 row scales (rows,)) of w (rows, cols) as int6 or int8.

    What is beyond the top level is clipped: no value of int8.
    """
    limit = 127
    top = w.abs().amax(1)
    if kind == "int6":
        limit = 31
        top = coarseness * w.square().mean(1).sqrt()
    scale = (top / limit).clamp(2.0**-24, 65_504.0).half()
    levels = (w / scale[:, None]).round().clamp(-limit, limit)
    return levels.to(torch.int8), scale


def exponents(values, per_octave):
    """Return the int8 k whose 2^(k / per_octave) are nearest to values >= 0."""
    return (per_octave * values.log2()).round().clamp(-127, 127).to(torch.int8)


def new_steps(model, held_out, end_s):
    """Return {name: [exponents of rows (R,), of columns (C,), GPTQ's factor (C, C)]} for fisher.

    From the gradients G (R, C) of the summed losses of the first FISHER_SEQUENCES sequences in
    held_out, int64 (n + 1,), or of fewer if the clock is at end_s: rows take their mean g^2,
    columns and factor the mean G'G, to whose diagonal 1 % of its mean is added; to the rows' 2 %.
    Without a sequence, steps are in proportion to a row's root mean square.
    """
    params = {n: p for n, p in model.named_parameters() if role(n) != "vector"}
    factors = []
    for p in params.values():
        square = p.detach().double().square().mean(1)
        energy = 1e-5 / (square + 0.01 * square.mean() + 1e-30)
        factors.append([energy, energy.sum() * torch.eye(p.size(1)).to(energy)])
    rows = model.cfg.train_seq_len
    tokens = torch.from_numpy(held_out).to(p.device)
    read = 0
    for end in range(rows, len(tokens), rows)[:FISHER_SEQUENCES]:
        if perf_counter() > end_s:
            break
        read = end
        logits = model(tokens[None, end - rows : end])[0]
        loss = F.cross_entropy(logits, tokens[end - rows + 1 : end + 1], reduction="sum")
        for (energy, gram), g in zip(factors, torch.autograd.grad(loss, params.values())):
            energy += g.square().sum(1)
            gram += g.mT @ g
    steps = {}
    for name, (energy, gram) in zip(params, factors):
        energy += 0.02 * energy.mean()
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        factor = torch.linalg.cholesky(torch.linalg.inv(gram / max(read, 1)), upper=True).cpu()
        steps[name] = [
            exponents((energy.sum() / energy).sqrt().cpu(), 2),
            exponents(factor.diagonal(), 2),
            factor,
        ]
    return steps


def step_sizes(rows, columns, coarseness):
    """Return steps, float64 (R, C): coarseness 2^((k + l) / 2), k and l the axes' exponents, int8.

    Powers of 2 and their roots are the same on any machine.
    """
    powers = np.ldexp(1.0, (rows[:, None].long() + columns).numpy())
    return coarseness * torch.from_numpy(np.sqrt(powers))


def round_levels(w, rows, columns, factor, coarseness):
    """Return the levels, int64 (R, C), of a parameter w (R, C) with its new_steps, by GPTQ."""
    steps = step_sizes(rows, columns, coarseness).T.contiguous()
    errors = torch.zeros_like(steps)
    levels = torch.zeros_like(steps)
    for i, column in enumerate(w.double().T):
        target = column - factor[:i, i] @ errors[:i]
        levels[i] = (target / steps[i]).round()
        errors[i] = (target - levels[i] * steps[i]) / factor[i, i]
    return levels.T.long()


# ---- Entropy coder -------------------------------------------------------------------------------
# One coder for the levels of weights and for text: rANS (Duda, 2013), interleaved (Giesen, 2014).
# `lanes` states of 64 bits serve the symbols in turn, so that numpy works on all at once; text has
# one. A symbol with frequency f of 2^24 grows its lane's state by the factor 2^24 / f. States stay
# at 2^32 or above, so what rounding wastes is below 2^-8 of the least frequency; words of 32 bits
# leave and enter at the low end. Encoder and decoder are mirror images: what was pushed last is
# popped first, so a stream is encoded from its end, when all frequencies are known.
#
# A level's frequencies are those of a Gaussian, sampled at the integers, with the mean |level| that
# its *class* says: the mean of its row times that of its column over that of the matrix, in quarter
# octaves. Zeros of the first class, which take no room, fill up the last step. Levels from
# +-LEVEL_MAX on are coded as that, and what they have beyond it stands after the words.

STATE_MIN = 1 << 32
LEVEL_MAX = 255
LEVELS = 2 * LEVEL_MAX + 1
CLASSES = torch.arange(-40, 25)  # mean |level| from 2^-10 to 2^6
LANES = 128


def encode_symbols(starts, freqs):
    """Return the words, bytes, of symbols: their parts of 2^24, uint64 (steps, lanes) each."""
    state = np.full(freqs.shape[1], STATE_MIN, np.uint64)
    words = []
    for start, freq in zip(starts[::-1], freqs[::-1]):
        full = state >> 40 >= freq
        words.append(state[full])
        state[full] >>= 32
        quotient, rest = np.divmod(state, freq)
        state = (quotient << TOTAL_BITS) + rest + start
    words += [state, state >> 32]
    return b"".join(part.astype("<u4").tobytes() for part in words[::-1])


class SymbolDecoder:
    """Gives the symbols that encode_symbols coded, a step after the other.

    Where words are missing, ValueError, or with several lanes wrong symbols and a wrong last state.

    After the last step all of `state` is STATE_MIN, and `words` has what follows the code.
    """

    def __init__(self, data, lanes):
        words = np.frombuffer(data, "<u4").astype(np.uint64)
        high, low, self.words = np.split(words, [lanes, 2 * lanes])
        self.state = high << 32 | low

    def decode(self, freqs, starts, bases=0):
        """Return the next symbols, int64 (lanes,): indices into freqs and starts, both uint64.

        starts: the sums of the freqs before; bases (lanes,): the start of each lane's own table.
        """
        slots = bases + self.state % TOTAL
        symbols = starts.searchsorted(slots, "right") - 1
        state = freqs[symbols] * (self.state >> TOTAL_BITS) + slots - starts[symbols]
        low = state < STATE_MIN
        taken, self.words = np.split(self.words, [low.sum()])
        state[low] = state[low] << 32 | taken
        self.state = state
        return symbols


@cache
def level_frequencies():
    """Return (frequencies, sums of those before), uint64 (classes * LEVELS,).

    A class has p(q) in proportion to exp(-theta q^2) and sums to 2^24. theta, whose limits are
    1 / (pi m^2) and log(2 / m), gives the mean |q| = m within 3.5 %, before each frequency is
    made at least 1, which raises the smallest means.
    """
    q = torch.arange(-LEVEL_MAX, LEVEL_MAX + 1).double()
    v = 2 ** (-CLASSES.double() / 2)[:, None]  # 1 / m^2
    theta = (1 + v * (2 / math.pi + v / 5) / (1 + v / 20)).log() / 2
    freqs = commit(shares((-LOGIT_SCALE * theta * q.square()).round().long()))
    freqs = freqs.flatten().numpy().astype(np.uint64)
    return freqs, freqs.cumsum() - freqs


def mean_exponents(levels):
    """Return the int8 exponents (R,) and (C,) from which level_classes makes the classes."""
    sizes = levels.abs().double()
    columns = sizes.mean(0) / sizes.mean().clamp(min=1e-9)
    return [exponents(means, 4) for means in (sizes.mean(1), columns)]


def level_classes(rows, columns):
    """Return each level's class number, int64 (R * C,), from its mean_exponents."""
    sums = (rows[:, None].long() + columns).clamp(CLASSES[0], CLASSES[-1])
    return (sums - CLASSES[0]).flatten().numpy()


def in_lanes(values):
    """Return values (n,) in rows of one for each lane, (steps, LANES), with zeros at the end."""
    return np.pad(values, (0, -len(values) % LANES)).reshape(-1, LANES)


def encode_levels(levels, classes):
    """Return the bytes from which decode_levels makes levels, below 2^32; both int64 (n,)."""
    freqs, starts = level_frequencies()
    coded = levels.clip(-LEVEL_MAX, LEVEL_MAX)
    symbols = in_lanes(classes * LEVELS + coded) + LEVEL_MAX
    beyond = abs(levels[abs(coded) == LEVEL_MAX]) - LEVEL_MAX
    return encode_symbols(starts[symbols] % TOTAL, freqs[symbols]) + beyond.astype("<u4").tobytes()


def decode_levels(data, classes):
    """Return levels, int64 (n,), from the bytes of encode_levels; ValueError if they do not fit."""
    freqs, starts = level_frequencies()
    bases = in_lanes(classes).astype(np.uint64) << TOTAL_BITS
    decoder = SymbolDecoder(data, LANES)
    symbols = [decoder.decode(freqs, starts, base) for base in bases]
    levels = np.concatenate(symbols)[: len(classes)] % LEVELS - LEVEL_MAX
    beyond = abs(levels) == LEVEL_MAX
    if (decoder.state != STATE_MIN).any() or len(decoder.words) != beyond.sum():
        raise ValueError("levels do not end where their words do")
    levels[beyond] += np.sign(levels[beyond]) * decoder.words.astype(np.int64)
    return levels


# ---- Artifact ------------------------------------------------------------------------------------
#   8 bytes  magic "PGOLFART"        body, LZMA2 raw stream (lc=0, lp=0, pb=0, preset 9e) of
#   4 bytes  format version            3 bytes  length of the header, big-endian
#   8 bytes  length of the body        JSON     settings, coarseness, tokenizer, [name, kind, shape]
#  32 bytes  SHA-256 of the body       tensors  in that order, by kind
#                                      words    uint32: the entropy coder's, if a kind is "levels"
# Kinds: fp16; int6 and int8, levels int8, then fp16 scales of rows; "levels", int8 exponents: rows'
# steps and means, columns' steps and means. All else is little-endian, row by row. Reading executes
# nothing. Levels of int6 take a byte each: packed to 6 bits, LZMA would not find their entropy.
# What does not compress, as the words, LZMA2 stores.

ARTIFACT_START = b"PGOLFART\2\0\0\0"  # magic, format version
ARTIFACT_HEAD_BYTES = 52
CODE_BYTES = os.path.getsize(__file__)  # this script's, which count against the cap
WEIGHTS_MAX = 1 << 26  # of an artifact: hostile ones must not take all time and memory
LZMA = dict(
    format=lzma.FORMAT_RAW,
    filters=[dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=0, lp=0, pb=0)],
)


@dataclass
class Artifact:
    """An artifact as read from its file: all that scoring and decoding need besides this script."""

    path: Path
    size_bytes: int
    digest: bytes  # SHA-256 of the file
    settings: dict
    table: TokenTable
    weights: dict  # {name: fp32 tensor}: the model's, and "mixer"

    def overridden(self, cfg):
        """Return the names, sorted, of the settings that differ from the artifact's."""
        return sorted(
            n.upper() for n, v in self.settings.items() if n != "preset" and getattr(cfg, n) != v
        )


def sha256(data):
    """Return the SHA-256 of bytes, 32 bytes."""
    return hashlib.sha256(data).digest()


def stored_settings(cfg):
    """Return the settings that an artifact holds: all but where things are on this machine."""
    return {n: getattr(cfg, n) for n in GROUPS if GROUPS[n] != RunSettings or n == "preset"}


def with_head(body):
    """Return the bytes of the artifact that has this body."""
    return ARTIFACT_START + len(body).to_bytes(8, "little") + sha256(body) + body


def pack_artifact(weights, cfg, table, coarseness, steps=()):
    """Return an artifact's bytes; the same weights and settings give the same bytes.

    steps: new_steps(), if QUANTIZER=fisher. UserError if a parameter is not finite, or beyond fp16
    where it is stored as such.
    """
    index = []
    payload = []
    matrices = []  # [(levels, classes)]
    kinds = [
        ("levels" if name in steps else KINDS.get(role(name), "fp16"), name) for name in weights
    ]
    for kind, name in sorted(kinds):
        w = weights[name].cpu()
        if kind == "levels":
            levels = round_levels(w, *steps[name], coarseness)
            means = mean_exponents(levels)
            matrices.append((levels.flatten().numpy(), level_classes(*means)))
            stored = [torch.stack(pair) for pair in zip(steps[name], means)]
        elif kind == "fp16":
            stored = [w.half()]
        else:
            stored = quantize(w.float(), kind, coarseness)
        if not all(t.isfinite().all() for t in (w, *stored)):
            raise UserError(f"parameter {name} is not finite or beyond fp16; nothing was written")
        index.append([name, kind, list(w.shape)])
        payload += [t.numpy().tobytes() for t in stored]
    if matrices:
        payload.append(encode_levels(*map(np.concatenate, zip(*matrices))))
    header = json.dumps(
        {
            "settings": stored_settings(cfg),
            "coarseness": coarseness,
            "tensors": index,
            "tokenizer": {"sha256": table.digest.hex(), **asdict(table)},
        },
        sort_keys=True,
    ).encode()
    return with_head(
        lzma.compress(len(header).to_bytes(3, "big") + header + b"".join(payload), **LZMA)
    )


def unpack_artifact(body):
    """Return (header, {name: fp32 tensor}) from an artifact's body; any exception if it is wrong.

    What it claims never takes memory for more than WEIGHTS_MAX weights (some 50 bytes each).
    """
    reader = BytesIO(lzma.LZMADecompressor(**LZMA).decompress(body, 2 * WEIGHTS_MAX))
    header = json.loads(reader.read(int.from_bytes(reader.read(3), "big")))
    if not sum(abs(math.prod(map(float, shape))) for *_, shape in header["tensors"]) <= WEIGHTS_MAX:
        raise ValueError(f"more than {WEIGHTS_MAX} weights")

    def take(dtype, *shape):
        array = np.empty(shape, dtype)
        if reader.readinto(array) < array.nbytes:
            raise ValueError("tensors are cut")
        return torch.from_numpy(array)

    weights = {}
    steps = {}
    classes = []
    for name, kind, shape in header["tensors"]:
        if kind == "levels":
            rows, columns = [take("i1", 2, size) for size in shape]
            steps[name] = step_sizes(rows[0], columns[0], header["coarseness"])
            classes.append(level_classes(rows[1], columns[1]))
        elif kind == "fp16":
            weights[name] = take("<f2", *shape).float()
        else:
            rows, columns = shape
            weights[name] = take("i1", rows, columns) * take("<f2", rows, 1).float()
    if steps:
        levels = torch.from_numpy(decode_levels(reader.read(), np.concatenate(classes)))
        for name, part in zip(steps, levels.split([*map(len, classes)])):
            weights[name] = (part.view_as(steps[name]) * steps[name]).float()
    return header, weights


def read_artifact(path, data=None):
    """Return the Artifact in a file, or in its bytes `data`; UserError if it is none or damaged."""
    data = data or read_file(path, f"ARTIFACT_PATH: cannot read {path}; train first")
    if not data.startswith(ARTIFACT_START):
        raise UserError(
            f"{path} is no artifact of format version {ARTIFACT_START[8]}: use the script that "
            "made it, or train again"
        )
    body = data[ARTIFACT_HEAD_BYTES:]
    if data != with_head(body):
        raise UserError(
            f"artifact {path} is cut or altered, {len(body):,} bytes of "
            f"{int.from_bytes(data[12:20], 'little'):,}; copy it again"
        )
    with blaming(f"artifact {path} breaks its format; train again", Exception):  # of many kinds
        header, weights = unpack_artifact(body)
        tokenizer = header["tokenizer"]
        table = TokenTable(tuple(tokenizer["pieces"]), tokenizer["kinds"], tokenizer["bos_id"])
        return Artifact(
            Path(path), len(data), sha256(data), dict(header["settings"]), table, weights
        )


def fit_artifact(weights, cfg, table, log, steps):
    """Return the bytes of the finest artifact found that fits the cap, else of the last one tried.

    steps: as pack_artifact takes them. At most six tries, a secant of bytes against
    log2(coarseness), never finer than TARGET_KL asks for; it is done within 0.2 % of the budget.
    """
    budget = cfg.size_limit_bytes - CODE_BYTES
    finest, coarseness, coarsest = COARSENESS[cfg.quantizer]
    count = sum(w.numel() for w in weights.values())
    if cfg.target_kl:
        finest = coarseness = max(finest, (24 * cfg.target_kl / count) ** 0.5)
    slope = count / 8  # bytes that a doubling saves
    tried = []
    best = b""
    for _ in range(6):
        data = pack_artifact(weights, cfg, table, coarseness, steps)
        size = len(data)
        log(f"quantize: coarseness {coarseness:.4g} gives {size:,} of {budget:,} bytes")
        if size <= budget:
            best = max(best, data, key=len)
        if tried:
            slope = max(slope / 8, (tried[1] - size) / math.log2(coarseness / tried[0]))
        tried = coarseness, size
        coarseness *= 2 ** ((size - 0.999 * budget) / slope)
        coarseness = min(max(coarseness, finest), coarsest)
        if coarseness == tried[0] or 0.998 * budget <= size <= budget:
            break
    return best or data


# ---- N-gram history ------------------------------------------------------------------------------
# Finds where the current context occurred before. For each kind c of context (the last 8, 5, 3, 2
# tokens, the last one, the word so far) there are hash chains, as in LZ77: prev[c, i] is the last
# position before i at which a context of the same hash ended. Walking from t - 1 yields what is
# before t and nothing later, so a whole block may be linked before its first position is predicted.
# Contexts are compared token by token, so hash collisions are never taken for occurrences. How the
# stream was cut into blocks changes nothing. Memory: `prev` takes 24 bytes a token and a quarter
# more as room to grow, `heads` 24 bytes a slot; the tokens are those of the stream.

CONTEXT_LENGTHS = (8, 5, 3, 2, 1, 8)  # in tokens; the last is the word's, up to its beginning
CONTEXTS = len(CONTEXT_LENGTHS)


class NgramHistory:
    """The stream so far, and the chains of the positions at which each context ended.

    Protocol: extend(prefix) whenever tokens are known, then occurrences(ends) of linked positions.
    With lanes, the token before position t is at t - lanes: contexts stay in their lane.
    """

    def __init__(self, cfg, word_begins, device, lanes=1):
        self.recent = cfg.ngram_recent
        self.lanes = lanes
        self.word_begins = torch.as_tensor(word_begins, device=device)  # bool (V,)
        self.lengths = torch.tensor(CONTEXT_LENGTHS, device=device).clamp(max=cfg.ngram_order - 1)
        self.size = 0  # tokens linked so far
        # (C, 2^bits): each slot's newest position; -1: none.
        self.heads = self.lengths.new_full(
            (CONTEXTS, 1 << cfg.ngram_hash_bits), -1, dtype=torch.int32
        )
        self.prev = self.heads[:, :0]  # (C, size, and room to grow); -1: none

    def contexts(self, ends):
        """Return the contexts that end at `ends` (..., C, n): int64 (..., C, n, 8), newest first.

        -1 beyond a context's length, its word's beginning or the stream's.
        """
        back = torch.arange(max(CONTEXT_LENGTHS), device=ends.device)
        positions = ends[..., None] - back * self.lanes
        tokens = self.tokens[positions.clamp(min=0)]
        inside = (back < self.lengths[:, None, None]) & (positions >= 0)
        begins = self.word_begins[tokens[..., -1, :, :]]
        inside[..., -1, :, :] &= begins.cumsum(-1) == begins  # none that is newer
        return torch.where(inside, tokens, -1)

    def hashes(self, ends):
        """Return the slot in `heads` of each context that ends at `ends` (C, n)."""
        h = torch.zeros_like(ends)
        for tokens in self.contexts(ends).unbind(-1):
            h = (h ^ tokens) * -7046029254386353131  # odd: 0x9E3779B97F4A7C15 as int64
            h ^= (h >> 29) & 0x7FFFFFFFF
        return h & (self.heads.size(1) - 1)

    def extend(self, prefix):
        """Link the tokens of `prefix`, the stream from its start, that are not linked yet.

        prefix: int64 (n,), on the device, no shorter than the one before.
        """
        first = self.size
        self.size = len(prefix)
        self.tokens = prefix
        lacking = self.size - self.prev.size(1)
        if lacking > 0:
            self.prev = F.pad(self.prev, (0, lacking + self.size // 4 + 1024))

        # Sorted by slot, then position: what is before a context in its chain is the entry before
        # it here or, for the first of its slot, the slot's head.
        ends = torch.arange(first, self.size, device=prefix.device).expand(CONTEXTS, -1)
        slot, order = torch.sort(self.hashes(ends), stable=True)
        ends = first + order
        is_first = slot.diff(prepend=slot[:, :1] - 1) != 0
        neighbour = ends.roll(1, 1).int()
        self.prev.scatter_(1, ends, torch.where(is_first, self.heads.gather(1, slot), neighbour))
        self.heads.scatter_reduce_(1, slot, ends.int(), "amax")  # the newest position is the head

    def occurrences(self, ends):
        """Return where the contexts that end at `ends` (R,) ended before: int64 (R, C, M).

        Of the last M = NGRAM_RECENT links of each chain, newest first, those that hold the same
        context and whose next token is known; -1 for the others.
        """
        chain = [ends.expand(CONTEXTS, -1)]
        for _ in range(self.recent):  # -1 leads to what is before position 0, -1 too
            chain.append(self.prev.gather(1, chain[-1].clamp(min=0)).long())
        chain = torch.stack(chain)  # (1 + M, C, R)
        contexts = self.contexts(chain)
        same = (contexts == contexts[0]).all(-1)
        # All lanes of a row are predicted together: the tokens after this row's ends are unknown.
        known = chain < ends - ends % self.lanes
        return torch.where(same & known, chain, -1)[1:].permute(2, 1, 0)


# ---- Mixers and commitment -----------------------------------------------------------------------
# A probability becomes an integer before anybody looks at the token: freq >= 1, summing to 2^24
# over the vocabulary, so that "normalized" is an equality and an entropy coder can use the numbers
# that were scored. And it becomes the *same* integer on any machine: logits are computed in float64
# and rounded to multiples of 2^-8, a grid some 10^11 times coarser than what shapes, threads or
# instruction sets change, and from there on there are integers only: exp from an exact table,
# shares, frequencies.
#
# The learned mixer adds boosts, multiples of 2^-8 too, to those logits. The tokens that followed a
# position's contexts before are its candidates; only they are boosted: boost(v) = w relu(U f(v)),
# f (F,) the features of v, U (hidden, F), w (hidden,). The gradient of -log q[x] in the boost of v
# is q[v] - [v = x], so learning, one Adam step a scored block, needs no pass through the model.
# Each row's gradient is rounded to integers, whose sum is the same on any number of ranks, and the
# weights to a grid after each step.

TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS
LOGIT_SCALE = 256  # steps of the grid of logits and boosts in a nat
GRADIENT_SCALE = 2.0**30  # integer units in 1, for gradients summed as int64
MIXER_WEIGHT_SCALE = 2.0**16  # weights are multiples of its inverse
MIXER_HIDDEN = 32
MIXER_FEATURES = 4 * CONTEXTS + 3  # F; gather_evidence lists them


@cache
def exp_table(device):
    """Return floor(2^38 exp(-d / 256)), int64, for d = 0, 1, ... up to 27 nats, where it is 0.

    Exact: Decimal has 28 digits, and no product for d > 0 is within 9e-6 of a whole number.
    """
    table = [int(2**38 * decimal.Decimal(-d / LOGIT_SCALE).exp()) for d in range(27 * LOGIT_SCALE)]
    return torch.tensor(table, device=device)


def shares(grid):
    """Return int64 (R, V) in proportion to exp(grid / 256), the largest 2^38; grid int64 (R, V)."""
    table = exp_table(grid.device)
    below = grid.amax(-1, keepdim=True) - grid
    # A NaN logit, for which predict raises an error afterwards, can make `below` negative.
    return table[below.clamp_(0, len(table) - 1)]


def commit(share):
    """Return frequencies int32 (R, V) in proportion to int64 shares (R, V) of at most 2^38.

    Each is at least 1 and each row sums to exactly 2^24: every token gets 1 plus the floor of its
    share of the rest, and the most likely one also what the floors leave.
    """
    freqs = share * (TOTAL - share.size(-1)) // share.sum(-1, keepdim=True) + 1
    best = share.argmax(-1, keepdim=True)
    return freqs.scatter_add_(1, best, TOTAL - freqs.sum(-1, keepdim=True)).int()


def mix_entropy(share, matches, following, cfg):
    """Return (1 - alpha) p + alpha counts / total as shares, int64 (R, V), of the whole vocabulary.

    The rule of openai/parameter-golf PR 1033. alpha = base + range * sigmoid(2 (H - center)),
    rounded to 1 / 2^12; H: the entropy of p in nats. The counts are those of the longest context,
    the word's aside, with MIN_COUNT of its last M occurrences; without one, alpha is 0.
    share int64 (R, V): the model's; matches, following int64 (R, C, M).
    """
    real = matches[:, :-1] >= 0
    enough = real.sum(2) >= cfg.min_count
    longest = enough & (enough.cumsum(1) == 1)  # the first that has enough
    used = (real & longest[..., None]).flatten(1).long()
    counts = torch.zeros_like(share).scatter_add_(1, following[:, :-1].flatten(1), used)
    freqs = commit(share).long()
    p = freqs.double() / TOTAL
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    alpha = cfg.alpha_base + cfg.alpha_range * torch.sigmoid(2 * (entropy - cfg.alpha_center))
    alpha = (alpha * 4096).round().long() * enough.any(1, keepdim=True)
    empirical = counts * TOTAL // used.sum(1, keepdim=True).clamp(min=1)
    return (4096 - alpha) * freqs + alpha * empirical


def gather_evidence(grid, matches, following, rows, reach, lanes=1):
    """Return the candidates of R positions, int64 (R, J), and their features, float64 (R, F, J).

    A candidate is what followed a context's occurrence, J = C M. Only a token's first slot counts:
    all features of the others are 0. features[:, f], one of each context c = 0..C-1, then three of
    the model; nats, unless said:
        c           log odds of the candidate's share of the context's occurrences, 0.4 added to
                    both counts; 0 if the context has none
        C + c       inverse rank of its last occurrence there: 1, 1/2, ...; 0 if none
        2C + c      log2 of the distance to that occurrence in rows, over 8; 0 if none
        3C + c      1 where the model itself sees that occurrence, else 0
        4C          how far its log p lies below that of the model's favourite, over 4
        4C + 1      log p of the favourite, over 2
        4C + 2      1
    grid int64 (R, V): the model's; matches, following (R, C, M): occurrences, and the tokens after
    them; rows (R,): where the contexts end. The model sees `reach` rows before each, of its lane:
    one number, or int64 (R, 1, 1).
    """
    tokens = following.flatten(1)
    real = matches >= 0
    same = following[..., None] == tokens[:, None, None]  # (R, C, M, J)
    same &= real[..., None]
    distinct = real.flatten(1) & ~same.flatten(1, 2).triu(1).any(1)

    count = same.sum(2).double()  # (R, C, J)
    total = real.sum(2, keepdim=True)
    seen = count > 0
    rank = same.byte().argmax(2)
    distance = rows[:, None, None] - matches.gather(2, rank)
    log_odds = ((count + 0.4) / (total - count + 0.4)).log()
    log_distance = seen * (distance.double() / lanes).clamp(min=1).log2() / 8
    in_window = (distance <= reach * lanes) & (distance % lanes == 0)
    inverse_rank = seen / (1.0 + rank.double())

    below = (grid.amax(-1, keepdim=True) - grid.gather(1, tokens)).double() / LOGIT_SCALE
    top = (2.0**38 / shares(grid).sum(-1, keepdim=True).double()).log()  # its share is 2^38
    by_model = torch.stack([below / 4, top.expand_as(below) / 2, torch.ones_like(below)], 1)
    features = [log_odds, inverse_rank, log_distance, seen & in_window, by_model]
    return tokens, torch.cat(features, 1).mul_(distinct[:, None])  # all to float64


def new_mixer_weights():
    """Return the mixer's weights before calibration, fp32 (hidden, F + 1): no boosts yet."""
    weights = torch.zeros(MIXER_HIDDEN, MIXER_FEATURES + 1)
    weights[:, :-1].normal_(std=MIXER_FEATURES**-0.5, generator=torch.Generator().manual_seed(0))
    return weights


class Mixture:
    """The n-gram history, and the rule (MIXER) by which it re-weights the model's distribution.

    Protocol, for each block: history.extend, mix, ..., learn. `weights`, float64 (hidden, F + 1):
    the learned mixer's U and, in the last column, w. While it is calibrated its rate falls linearly
    from 10 MIXER_LR to MIXER_LR over plan.calibration_blocks.
    """

    def __init__(self, weights, cfg, table, rt, plan):
        self.cfg = cfg
        self.rt = rt
        self.plan = plan
        self.history = NgramHistory(cfg, table.word_begins, rt.device, plan.lanes)
        self.weights = weights.to(rt.device, torch.float64, copy=True)
        self.optimizer = torch.optim.Adam([self.weights], betas=(0.9, 0.99))
        self.blocks = 0  # so far that it learned from
        self.remembered = []  # [candidates, features, candidates' frequencies, positions]

    def mix(self, grid, rows):
        """Return frequencies (R, V): the model's, re-weighted by what followed the rows' contexts.

        grid int64 (R, V): the model's logits; rows int64 (R,): their positions, which the history
        must hold. A row predicts the position `lanes` after its own.
        """
        lanes = self.plan.lanes
        matches = self.history.occurrences(rows)
        # Where `matches` is -1 this is some token, which every user of it masks.
        following = self.history.tokens[matches + lanes]
        if self.cfg.mixer == "entropy":
            return commit(mix_entropy(shares(grid), matches, following, self.cfg))
        # Rows before each that the model sees: in a calibration, from its run's first on.
        sees = self.plan.context + rows // lanes % self.plan.run
        sees = sees.clamp(max=self.plan.reach)[:, None, None]
        tokens, features = gather_evidence(grid, matches, following, rows, sees, lanes)
        freqs = commit(shares(grid.scatter_add(1, tokens, self.boost(features))))
        self.remembered.append([tokens, features, freqs.gather(1, tokens), rows + lanes])
        return freqs

    def hidden(self, features):
        """Return the hidden layer's output for each candidate, float64 (R, hidden, J)."""
        return (self.weights[:, :-1] @ features).relu()

    def boost(self, features):
        """Return what is added to the candidates' grid logits: int64 (R, J)."""
        return (self.weights[:, -1] @ self.hidden(features) * LOGIT_SCALE).round().long()

    def gradient(self, tokens, features, q, targets):
        """Return each row's d(-log q[target]) / d(weights), float64 (R, hidden, F + 1).

        tokens, features: of the candidates; q (R, J): their mixed probabilities; targets (R,).
        """
        error = q - (tokens == targets[:, None]).double()
        hidden = self.hidden(features)
        back = error[:, None] * self.weights[:, -1, None] * (hidden > 0)
        return torch.cat([back @ features.mT, hidden @ error[..., None]], 2)

    def learn(self, prefix):
        """Take one Adam step on the remembered block, which ends `prefix` and has been scored.

        The entropy mixer remembers nothing, and its steps change nothing.
        """
        total = torch.zeros_like(self.weights, dtype=torch.int64)
        if self.remembered:
            *evidence, freqs, positions = map(torch.cat, zip(*self.remembered))
            targets = prefix.to(self.rt.device)[positions]
            rows = self.gradient(*evidence, freqs / TOTAL, targets)
            total = (rows * GRADIENT_SCALE).round().long().sum(0)
        self.rt.sum_over_ranks(total)
        self.weights.grad = total.double() / (GRADIENT_SCALE * self.plan.block)
        blocks = self.plan.calibration_blocks
        left = blocks and 1 - self.blocks / blocks
        self.optimizer.param_groups[0]["lr"] = self.cfg.mixer_lr * (1 + 9 * left)
        self.optimizer.step()
        self.weights.mul_(MIXER_WEIGHT_SCALE).round_().div_(MIXER_WEIGHT_SCALE)
        self.blocks += 1
        self.remembered = []


# ---- Test-time training --------------------------------------------------------------------------
# After a chunk has been scored the model trains on it; the Polyak average of the weights scores the
# next. TTT moves scalars and vectors, the token table, and the matrices of all blocks but the
# first TTT_FREEZE_BLOCKS; nothing else. Each micro-batch's summed gradient is rounded to int64,
# whose sum is the same on any number of ranks, and weights are rounded to a grid after each step:
# it is coarse enough that another machine, whose last bits differ, gets the same weights. The
# rate's schedule has a fixed length, TTT_SCHEDULE_CHUNKS, so that no score depends on the text's
# length.

TTT_MICRO_BATCH_SEQUENCES = 2  # fixed: each micro-batch is rounded
TTT_GRADIENT_SCALE = TTT_WEIGHT_SCALE = 2.0**20


@dataclass
class TestTimeTrainer:
    """Adapts `model` to scored chunks; between them it has the Polyak average, which scores."""

    model: GPT
    cfg: Config
    table: TokenTable
    rt: Runtime
    chunks: int = 0  # adapted to so far

    def __post_init__(self):
        for p in self.model.parameters():
            p.requires_grad_(p.ndim < 2)  # vectors
        self.model.embed.tokens.requires_grad_()
        self.model.blocks[self.cfg.ttt_freeze_blocks :].requires_grad_()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        # All that moves, live and averaged, a row each; one of the rows is what `params` show.
        self.both = parameters_to_vector(self.params).detach().repeat(2, 1)
        self.live, self.average = self.both
        self.optimizer = torch.optim.Adam([self.live])

    def adapt_chunk(self, tokens):
        """Train on a scored chunk and the token before it, int64 (TTT_CHUNK_TOKENS + 1,).

        An epoch is one Adam step on the byte-weighted mean loss over all ranks, its gradient
        clipped to norm 1. The rate: cosine to 0, times 1 rising to 3 over the first 30 %, then 3.
        """
        done = min(1.0, self.chunks / self.cfg.ttt_schedule_chunks)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        lr = self.cfg.ttt_lr * cosine * (1 + 2 * min(1.0, done / 0.3))
        self.chunks += 1
        if not lr:
            return
        self.optimizer.param_groups[0]["lr"] = lr
        tokens = tokens.cpu()
        weights = torch.from_numpy(self.table.count_bytes(tokens.numpy()))
        scale = TTT_GRADIENT_SCALE * max(1, int(weights.sum()))
        sequences = torch.stack([tokens[:-1], tokens[1:], weights]).to(self.rt.device)
        sequences = sequences.view(3, -1, self.cfg.eval_seq_len)
        batches = sequences.split(TTT_MICRO_BATCH_SEQUENCES, 1)[self.rt.rank :: self.rt.world]
        vector_to_parameters(self.live, self.params)
        for _ in range(self.cfg.ttt_epochs):
            total = torch.zeros_like(self.live, dtype=torch.int64)
            for x, y, w in batches:
                nats = F.cross_entropy(self.model(x).mT, y, reduction="none")
                grads = torch.autograd.grad((nats * w).sum(), self.params)
                flat = parameters_to_vector(grads).double()
                total += (flat * TTT_GRADIENT_SCALE).round_().long()
            mean = self.rt.sum_over_ranks(total).double() / scale
            self.live.grad = mean.to(self.live)
            nn.utils.clip_grad_norm_(self.live, 1.0)
            self.optimizer.step()
            self.average.lerp_(self.live, 1 - self.cfg.polyak_decay)
            self.both.mul_(TTT_WEIGHT_SCALE).round_().div_(TTT_WEIGHT_SCALE)
        vector_to_parameters(self.average, self.params)


# ---- Engine --------------------------------------------------------------------------------------
# From rows to logits. Positions are numbered as in the stream; position 0 is BOS, which a decoder
# knows; input row i predicts position i + 1. With L lanes the stream begins with L BOS, position p
# is row p // L of lane p % L, and its row predicts position p + L.
#
# A row sees the K = EVAL_SEQ_LEN - EVAL_STRIDE rows before it. A *run* is a stretch of rows that
# share keys and values in a Cache; the K rows before the run are computed anew for it.
# EVAL_RUN_TILES tiles of EVAL_STRIDE rows make a run, and runs are dealt to the ranks in turn; with
# 0 a run lasts until the weights change, and rank 0 computes it alone. With 1 the windows are those
# of the reference's sliding window, but no row sees more than K rows before it.
#
# Clocks: runs; *blocks* of positions, after which the mixer learns; *chunks*, after which TTT does.
# How the rows of a run are cut into passes of the model does not matter, since what a cut changes
# is far below the grid to which logits are rounded.

# Rows that Engine.logits puts through the model at once: whole runs, side by side.
ROWS_AT_ONCE = {"cpu": 4096, "cuda": 65_536}


class Plan(NamedTuple):
    """One walk over a stream: the stages it reports, and its clocks (see the banner)."""

    stages: (
        tuple  # pre_quant, round_trip, sliding or ttt; then "unguarded", "mixer", if there is one
    )
    reach: int  # rows of its lane that a row sees before it
    context: int  # rows of a lane that are computed anew before a run
    run: int  # rows of a lane; fewer where the weights change
    block: int  # positions of the stream from one call of update to the next
    chunk: int  # positions of the stream from one TTT update to the next
    lanes: int = 1  # segments of the text, coded in turn; 1: the text's own order
    calibration_blocks: int = 0  # in which a calibration lowers the mixer's rate; 0: none


def new_plan(cfg, *stages, lanes=0):
    """Return the Plan of a walk that reports `stages`; none: the last, which are proved and coded.

    lanes = 0: the text's own order, where the last stages have TTT if it is enabled; from 1 on
    there is no TTT.
    """
    neural = "ttt" if cfg.ttt_enabled and not lanes else "sliding"
    mixer = () if cfg.mixer == "none" else ("unguarded", "mixer")
    stages = stages or (neural, *mixer)
    reach = context = cfg.eval_seq_len - cfg.eval_stride
    run = cfg.eval_run_tiles * cfg.eval_stride or sys.maxsize  # a stream has fewer rows
    if stages[0] in ("pre_quant", "round_trip"):  # windows that do not overlap
        reach = run = cfg.eval_seq_len
        context = 0
    learns = "mixer" in stages and cfg.mixer == "learned"
    block = cfg.mixer_block if learns else cfg.ttt_chunk_tokens
    return Plan(stages, reach, context, run, block, cfg.ttt_chunk_tokens, lanes or 1)


def evaluation_plans(cfg):
    """Return the Plans that score the artifact; the mixer is scored with the last neural stage."""
    sliding = [new_plan(cfg, "sliding")] if cfg.ttt_enabled else []
    return [new_plan(cfg, "round_trip"), *sliding, new_plan(cfg)]


class Engine:
    """Computes the logits of a stream's rows, run by run; the banner defines rows and runs.

    Protocol: logits() of all rows in order; forget() when the weights have changed.
    """

    def __init__(self, model, cfg, rt, plan):
        self.model = model
        self.rt = rt
        self.plan = plan
        self.pass_rows = cfg.eval_seq_len  # most rows of a run in one pass
        self.batch = ROWS_AT_ONCE[rt.device.type] // cfg.eval_seq_len or 1  # runs side by side
        self.forget(0)

    @torch.inference_mode()
    def forget(self, row):
        """Begin a run at `row`: the weights have changed, or nothing has been computed yet."""
        self.origin = row
        self.weights = self.model.cast()

    def logits(self, tokens, first, last):
        """Yield (positions (R,), logits (R, V)) of this rank's rows first..last-1 of each lane.

        tokens (L, last), int64. The positions, on the CPU, are those of the rows, not of what they
        predict, in the order of the stream: all lanes of a row together.
        """
        lanes = len(tokens)
        size = self.plan.run
        runs = range(self.origin, last, size)[self.rt.rank :: self.rt.world]  # this rank's
        runs = runs[bisect.bisect(runs, first - size) :]  # that end after `first`
        # [(run's first row, piece's first row, row after its last)]
        pieces = [(run, max(run, first), min(run + size, last)) for run in runs]

        # Whole runs of one lane have the same shape: they are computed side by side.
        whole = (e - b == size and run >= self.plan.context for run, b, e in pieces)
        batch = self.batch if lanes == 1 and all(whole) else 1
        for i in range(0, len(pieces), batch):
            group = pieces[i : i + batch]
            run, begin, _ = group[-1]
            known = min(run, self.plan.context)  # rows before the run, computed anew
            if begin == run:
                self.cache = Cache(self.model, len(group) * lanes, self.plan.reach, self.pass_rows)
            sequences = torch.cat([tokens[:, r - known : e] for r, _, e in group])
            parts = []
            while (done := self.cache.rows) < sequences.size(1):
                lead = min(EMBED_CONTEXT, done)
                passed = sequences[:, done - lead : done + self.pass_rows]
                unwanted = max(0, known - done)
                parts.append(self.model(passed, self.weights, self.cache, lead, unwanted))
            logits = torch.cat(parts, 1).unflatten(0, (-1, lanes)).transpose(1, 2).flatten(0, 2)
            yield torch.cat([torch.arange(b * lanes, e * lanes) for _, b, e in group]), logits


# ---- Predictor and scorer ------------------------------------------------------------------------
# The one place where probabilities become commitments, and the one loop, `walk`, that scoring,
# coding and decoding share. Bits are summed as integers, in units of 2^-30 bit, so that a sum does
# not depend on how ranks and steps divide it.
#
# A guard stands between the mixer and text that first teaches and then betrays it. Committed is a
# mixture w q + (1 - w) p of the mixer's q and the model's p, whose w follows by fixed share
# (Herbster and Warmuth, 1998) what both gave to the tokens x of the lane so far:
#     w' = s + (1 - 2 s) w q[x] / (w q[x] + (1 - w) p[x]),  at first 1/2.
# Against any choice of p or q at each of n tokens, with k changes, it loses at most
# 1 - k log2 s - (n - k) log2(1 - s) bits, but for rounding. Like the n-gram history, w follows the
# prefix inside a block, where a decoder has the same tokens; only update() moves weights of the
# model or the mixer.

BITS_SCALE = 2.0**30
TRACE_TOP = 8  # likeliest tokens that trace.npz has of each position and stage
TRUST_SCALE = 1 << 14  # w = 1; with frequencies, what commit can divide
SWITCH = 8  # s, of TRUST_SCALE: the part of each side's weight that goes over after each token


class OrderError(RuntimeError):
    """Report calls of predict, score and update in an order that would make a score dishonest."""


class Commitment(NamedTuple):
    """The frequencies of positions start..stop-1, as far as this rank computes them."""

    start: int
    stop: int
    pieces: list  # [(positions int64 (R,), {stage: int32 (R, V)})], as computed at once

    def table(self, stage):
        """Return the frequencies (stop - start, V) of a lone rank."""
        return torch.cat([freqs[stage] for _, freqs in self.pieces])

    def chosen(self, targets, stages, top=0):
        """Return what the stages give to targets, int64 (n,), and to their `top` likeliest tokens.

        int64 (stages, 1 + 2 top, n), n = stop - start: a target's frequency, the highest ones, and
        the tokens that have these; 0 where another rank has them.
        """
        found = targets.new_zeros(len(stages), 1 + 2 * top, len(targets))
        for positions, freqs in self.pieces:
            at = positions - self.start
            for rows, stage in zip(found, stages):
                parts = freqs[stage].gather(1, targets[at, None]), *freqs[stage].topk(top)
                rows[:, at] = torch.cat(parts, 1).mT  # int64, as the tokens are
        return found


class Predictor:
    """Commits, scores and learns, in this order: predict -> score -> ... -> update, or OrderError.

    Its model, and its mixer, begin with `weights`, which stay as they are. Every rank makes the
    same calls with the same arguments; update is due when plan.block positions are scored.
    """

    def __init__(self, weights, table, cfg, rt, plan):
        self.rt = rt
        self.plan = plan
        self.scored_to = plan.lanes  # the first position that is not scored yet
        self.block_end = plan.lanes + plan.block  # first position after the next update
        self.pending = None  # the commitment that waits for its score
        # Code length of all that is scored, of each stage, in units of 2^-30 bit.
        self.lengths = torch.zeros(len(plan.stages), dtype=torch.int64)
        # The guard's w at scored_to and later positions, as far as it is known.
        self.trust = [TRUST_SCALE // 2] * plan.lanes
        model = new_model(cfg, rt, weights, cfg.eval_dtype)
        self.engine = Engine(model, cfg, rt, plan)
        self.ttt = TestTimeTrainer(model, cfg, table, rt) if "ttt" in plan.stages else None
        self.temperature = cfg.ttt_temperature if self.ttt else 1.0
        self.mixture = "mixer" in plan.stages and Mixture(weights["mixer"], cfg, table, rt, plan)
        self.mix_seconds = 0.0  # from a block's logits to its bits, and to learn from it

    @torch.inference_mode()
    def predict(self, prefix, start, stop):
        """Return the Commitment of positions start..stop-1, each from what is before it.

        prefix: tokens 0..stop-2, int64 (stop - 1,). UserError on all ranks if logits are not
        finite.
        """
        in_order = self.scored_to == start < stop <= self.block_end and len(prefix) == stop - 1
        if self.pending or not in_order:
            raise OrderError(
                f"asked to predict {start}..{stop - 1} from {len(prefix)} tokens; "
                f"not scored yet: {self.scored_to}; update {self.block_end}"
            )
        lanes = self.plan.lanes
        last = (stop - 1) // lanes  # first row of a lane that is not needed
        known = prefix[: last * lanes].to(self.rt.device)
        tokens = known.view(-1, lanes).T
        pieces = []
        grids = []
        broken = torch.zeros((), device=self.rt.device)
        for rows, logits in self.engine.logits(tokens, start // lanes - 1, last):
            positions = rows + lanes
            positions = self.rt.upload(positions[positions < stop])  # the last row may lack lanes
            logits = logits[: len(positions)].double()
            broken += ~logits.isfinite().all()
            grid = (logits * (LOGIT_SCALE / self.temperature)).round_().long()
            grids.append(grid)
            pieces.append((positions, {self.plan.stages[0]: commit(shares(grid))}))
        if self.rt.sum_over_ranks(broken):  # here the host waits for the model
            raise UserError(
                f"logits are not finite between tokens {start} and {stop}: "
                "TTT_LR is too high, or the artifact's weights are useless"
            )
        commitment = Commitment(start, stop, pieces)
        if self.mixture:
            self.mix_seconds -= perf_counter()
            self.mixture.history.extend(known)
            for grid, (positions, freqs) in zip(grids, pieces):
                freqs["unguarded"] = freqs["mixer"] = self.mixture.mix(grid, positions - lanes)
            if len(known) > start:
                self.judge(commitment, known[start:])
            trust = self.rt.upload(torch.tensor(self.trust))
            for positions, freqs in pieces:
                w = trust[positions - start, None]
                model, mixer, _ = freqs.values()
                freqs["mixer"] = commit(w * mixer + (TRUST_SCALE - w) * model)
        self.pending = commitment
        return commitment

    def judge(self, commitment, targets):
        """Let the guard's `trust` follow the first n targets, int64 (n,), of a commitment.

        Return their frequencies, int64 (stages, n), on the CPU of every rank. Targets that it has
        followed before change nothing.
        """
        unknown = commitment.stop - commitment.start - len(targets)
        freqs = commitment.chosen(F.pad(targets, (0, unknown)), self.plan.stages)
        freqs = self.rt.sum_over_ranks(freqs)[:, 0, : len(targets)].cpu()  # the host waits
        if self.mixture:
            for model, mixer, _ in freqs.T[len(self.trust) - self.plan.lanes :].tolist():
                w = self.trust[-self.plan.lanes]  # with which this token was predicted
                share = (TRUST_SCALE - 2 * SWITCH) * w * mixer
                self.trust.append(SWITCH + share // (w * mixer + (TRUST_SCALE - w) * model))
        return freqs

    @property
    def bits(self):
        """{stage: code length in bits} of all that is scored so far."""
        return dict(zip(self.plan.stages, (self.lengths.double() / BITS_SCALE).tolist()))

    def score(self, commitment, targets):
        """Add the code lengths of targets, int64 (stop - start,), to those of the stages."""
        if commitment is not self.pending or len(targets) != commitment.stop - commitment.start:
            raise OrderError("score takes the last commitment, once, with one target a position")
        self.pending = None
        self.scored_to = commitment.stop
        bits = TOTAL_BITS - self.judge(commitment, targets.to(self.rt.device)).double().log2()
        self.lengths += (bits * BITS_SCALE).round().long().sum(1)
        if self.mixture:
            del self.trust[: len(targets)]
            self.mix_seconds += perf_counter()

    def update(self, prefix):
        """Learn from the scored block that ends `prefix`: the mixer always, TTT after a chunk."""
        if self.pending or not self.scored_to == self.block_end == len(prefix):
            raise OrderError(
                f"update takes scored blocks; the next ends before position {self.block_end}, "
                f"the last of these tokens is {len(prefix) - 1}"
            )
        self.block_end += self.plan.block
        if self.mixture:
            self.mix_seconds -= perf_counter()
            self.mixture.learn(prefix)
            self.mix_seconds += perf_counter()
        row = self.scored_to - 1  # first row that has not been computed; TTT has one lane
        if self.ttt and not row % self.plan.chunk:
            self.ttt.adapt_chunk(prefix[row - self.plan.chunk :])
            self.engine.forget(row)


def walk(predictor, stream, log=None, step=None):
    """Yield (Commitment, targets) of each step of one pass over `stream`, int64 (n,).

    Score-first is the shape of this loop: commit, yield, score, learn. targets: a view of the
    stream; a decoder, which has no tokens, writes them there before they are scored. A step has
    `step` positions (None: as many as a block) or what is left of its block or the stream. `log`
    gets a line of progress every 15 seconds.
    """
    first = stop = predictor.scored_to
    start_s = logged_s = perf_counter()
    while stop < len(stream):
        start = stop
        stop = min(start + (step or predictor.plan.block), predictor.block_end, len(stream))
        targets = stream[start:stop]
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        yield commitment, targets
        predictor.score(commitment, targets)
        if stop == predictor.block_end < len(stream):
            predictor.update(stream[:stop])
        if log and perf_counter() - logged_s > 15:
            logged_s = perf_counter()
            spent_s = logged_s - start_s
            log(
                f"{'+'.join(predictor.plan.stages)}: {stop - first:,}/{len(stream) - first:,} "
                f"tokens, {(stop - first) / spent_s:,.0f}/s, {spent_s:.0f} s, "
                f"ETA {spent_s / (stop - first) * (len(stream) - stop):.0f} s\r"
            )


def evaluate(predictor, tokens, total_bytes, log, keep):
    """Score `tokens`, int64 (n + 1,); return (stages as results.json has them, first frequencies).

    These are what Commitment.chosen says of the first `keep` > 0 targets, with TRACE_TOP tokens.
    """
    names = predictor.plan.stages
    start_s = perf_counter()
    n = len(tokens) - 1
    kept = []
    stream = torch.from_numpy(tokens).to(predictor.rt.device)
    for commitment, targets in walk(predictor, stream, log):
        if commitment.start <= keep:
            kept.append(
                predictor.rt.sum_over_ranks(commitment.chosen(targets, names, TRACE_TOP)).cpu()
            )
    added_s = perf_counter() - start_s - predictor.mix_seconds, predictor.mix_seconds
    bits = predictor.bits
    stages = [
        {
            "name": stage,
            "val_loss": bits[stage] * math.log(2) / n,
            "val_bpb": bits[stage] / total_bytes,
            "tokens": n,
            "bytes": total_bytes,
            "seconds": seconds,
        }
        for stage, seconds in zip(names[::2], added_s)  # "unguarded" has no row of its own
    ]
    if "mixer" in names:
        stages[-1]["unguarded_bpb"] = bits["unguarded"] / total_bytes
    return stages, torch.cat(kept, 2)[..., :keep].numpy()


# ---- Code files, proof ---------------------------------------------------------------------------
# What was committed can be coded. A code file, little-endian:
#    8 bytes  magic "PGOLFTXT"           3 x 32   SHA-256 of artifact, settings (JSON) and text
#    4 bytes  format version            64        what made it, UTF-8, zeros after it
#    4 bytes  CRC-32 of all that follows 4 each   checks: CRC-32 of all frequencies up to the first
#    4 bytes  lanes L; 0: one, with TTT           position, the 4,097th, ...; up to the last
#    8 bytes  tokens n, after BOS        rest     words of the entropy coder, whose lanes are one
#    8 bytes  bytes of the text
# With lanes, as `compress` has them, lane i holds the text's i-th segment, the first n mod L lanes
# a token longer than the others; coded are all lanes' first tokens, then all second ones, and so
# on, without TTT. A decoder compares the checks as it goes: one that cannot follow says so at once.

CODE_START = b"PGOLFTXT\5\0\0\0"  # magic, format version
CODE_HEAD = struct.Struct("<IQQ32s32s32s64s")  # what follows the CRC-32, up to the checks
CODE_HEAD_BYTES = 16 + CODE_HEAD.size
CHECK_EVERY = 4096
MOST_LANES = 16


class CodeHead(NamedTuple):
    """What a code file says of itself; pack and unpack are mirror images."""

    lanes: int
    tokens: int
    text_bytes: int
    artifact: bytes  # these three: SHA-256
    settings: bytes
    text: bytes
    maker: bytes  # torch, instruction set, threads

    def pack(self, checks, words):
        """Return the bytes of a code file with these checks, [CRC-32], and code words."""
        body = CODE_HEAD.pack(*self) + struct.pack(f"<{len(checks)}I", *checks) + words
        return CODE_START + struct.pack("<I", crc32(body)) + body

    @classmethod
    def unpack(cls, path, data):
        """Return (CodeHead, checks, code words) of a code file's bytes; UserError if they are none.

        No more tokens are believed than the bytes can hold: each costs 2^-24 bit at least.
        """
        if not data.startswith(CODE_START):
            raise UserError(f"{path} is no code file of version {CODE_START[8]}; compress it again")
        head = cls(*CODE_HEAD.unpack_from(data.ljust(CODE_HEAD_BYTES, b"\0"), 16))
        count = 1 - -head.tokens // CHECK_EVERY
        words = data[CODE_HEAD_BYTES + 4 * count :]
        if head.tokens >= len(words) << 27:  # also where checks are missing: there are no words
            raise UserError(f"{path} is cut or altered: it cannot hold {head.tokens:,} tokens")
        checks = struct.unpack_from(f"<{count}I", data, CODE_HEAD_BYTES)
        if data != head.pack(checks, words):  # its checksum differs
            raise UserError(f"{path} is cut or altered; copy it again")
        return head, checks, words


@dataclass
class Codec:
    """Codes token streams to code files and back, by the frequencies of the last stage."""

    artifact: Artifact
    cfg: Config
    rt: Runtime
    log: object

    def __post_init__(self):
        if self.cfg.eval_dtype != "float64":
            raise UserError(
                f"EVAL_DTYPE={self.cfg.eval_dtype}: only float64 gives every machine the same code"
            )
        shaping = stored_settings(self.cfg)
        del shaping["preset"]
        self.settings = sha256(json.dumps(shaping, sort_keys=True).encode())

    def code(self, plan, tokens, coded, decoder=None):
        """Yield (CRC-32 of all frequencies, predicted bits) so far of tokens, int64 (n + 1,).

        It yields at the first position, every 4,096 later, and at the end. tokens: BOS first; the
        others are to be coded or, if there is a `decoder`, are written at the end. `coded`, a list,
        gets (start, frequency) of each in the order of coding, uint64.
        """
        stage = plan.stages[-1]
        segments = np.array_split(np.arange(1, len(tokens)), plan.lanes)
        rows = itertools.zip_longest(*segments)  # a short lane ends with None
        order = [0] * plan.lanes + [position for row in rows for position in row if position]
        stream = torch.from_numpy(tokens[order])
        predictor = Predictor(self.artifact.weights, self.artifact.table, self.cfg, self.rt, plan)
        crc = 0
        for commitment, targets in walk(predictor, stream, self.log, decoder and plan.lanes):
            for i, freqs in enumerate(commitment.table(stage).cpu().numpy()):
                crc = crc32(freqs, crc)
                if not len(coded) % CHECK_EVERY:
                    yield crc, predictor.bits[stage]
                freqs = freqs.astype(np.uint64)
                starts = freqs.cumsum() - freqs
                if decoder:
                    targets[i] = decoder.decode(freqs, starts).item()
                coded.append((starts[targets[i]], freqs[targets[i]]))
        tokens[order] = stream
        yield crc, predictor.bits[stage]

    def encode(self, tokens, lanes=0):
        """Code tokens, int64 (n + 1,), BOS first.

        Return (bytes of the code file, predicted bits: the sum that the scorer would report,
        frequencies uint64 (n,) of the tokens in the order in which they are coded).
        """
        coded = []
        checks, bits = zip(*self.code(new_plan(self.cfg, lanes=lanes), tokens, coded))
        starts, freqs = np.hsplit(np.uint64(coded).reshape(-1, 2), 2)
        text = self.artifact.table.decode(tokens)
        head = CodeHead(
            lanes,
            len(freqs),
            len(text),
            self.artifact.digest,
            self.settings,
            sha256(text),
            (
                f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
                f"{torch.get_num_threads()} threads"
            ).encode(),  # cut to 64 bytes
        )
        return head.pack(checks, encode_symbols(starts, freqs)), bits[-1], freqs[:, 0]

    def decode(self, path):
        """Return the text, in bytes, that is coded in a file.

        UserError if the file is damaged, of another artifact or other settings, or its checks show
        that this machine cannot decode it.
        """
        head, checks, words = CodeHead.unpack(path, read_file(path))
        if head.artifact != self.artifact.digest:
            raise UserError(f"{path} was not made with the artifact {self.artifact.path}")
        if head.settings != self.settings:
            raise UserError(f"{path} was made with other settings")
        plan = new_plan(self.cfg, lanes=head.lanes)
        if head.lanes > MOST_LANES or plan.block % plan.lanes:
            raise UserError(f"{path} has {head.lanes} lanes, which no block of this artifact holds")
        tokens = np.full(head.tokens + 1, self.artifact.table.bos_id)
        coded = []
        with blaming(f"{path} decodes to nothing: its words are damaged", ValueError):
            steps = self.code(plan, tokens, coded, SymbolDecoder(words, 1))
            for (crc, _), check in zip(steps, checks):
                if crc != check:
                    raise UserError(
                        f"{path} cannot be followed here: the frequencies up to token "
                        f"{min(len(coded) + 1, head.tokens)} are not those of "
                        f"{head.maker.rstrip(bytes(1)).decode(errors='replace')}; decode it there"
                    )
        text = self.artifact.table.decode(tokens)
        if len(text) != head.text_bytes or sha256(text) != head.text:
            raise UserError(f"{path} decodes to another text than was coded: its words are damaged")
        return text


def verify(run, artifact, scored=None):
    """Code VERIFY_TOKENS and let another process decode them.

    It gets the artifact, no shards, no tokenizer and no settings; it shows its own progress.
    UserError if it gives up, or finds other frequencies or another text; else the run's table gets
    the proof. For rank 0 alone. scored, int64 (n,): the frequencies that the run has just given
    these tokens, and maybe later ones, as the coder must too.
    """
    cfg = run.cfg
    tokens = run.tokens[: cfg.verify_tokens + 1 if cfg.verify_tokens else None]
    path = cfg.run_dir / "proof.code"
    start_s = perf_counter()
    data, bits, freqs = Codec(artifact, cfg, replace(run.rt, world=1), run.log).encode(tokens)
    write_atomically(path, data)
    coded_s = perf_counter()
    n = len(freqs)
    for t in np.flatnonzero(scored is not None and freqs != scored[:n]):
        raise UserError(
            f"verify: position {t + 1}: token {tokens[t + 1]} was scored with frequency "
            f"{scored[t]}, and coded with {freqs[t]}"
        )

    env = {n: v for n, v in os.environ.items() if n.lower() not in GROUPS} | dict(
        DEVICE=run.rt.device.type,
        ARTIFACT_PATH=str(artifact.path),
        DATA_PATH=os.devnull,
        TOKENIZER_PATH=os.devnull,
        REPLACE="1",
    )
    torch.cuda.empty_cache()  # leave the device's memory to the decoder
    target = path.with_suffix(".txt")
    command = [sys.executable, __file__, "decompress", path, target]
    decoder = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    if decoder.returncode:
        why = decoder.stderr or f"exit status {decoder.returncode}"
        raise UserError(f"verify: the decoder gave up: {why.splitlines()[-1]}")
    text = artifact.table.decode(tokens)
    if read_file(target) != text:
        raise UserError("verify: the decoder's text is another")
    proof = dict(
        tokens=n,
        predicted_bits=bits,
        bytes_on_disk=len(data) - CODE_HEAD_BYTES,
        encode_seconds=coded_s - start_s,
        decode_seconds=perf_counter() - coded_s,
    )
    run.record("proof", proof)
    run.rows += [
        f"proof       {8 * proof['bytes_on_disk'] / max(len(text), 1):>10.6f}{n:>33,}"
        f"{perf_counter() - start_s:>9.1f}",
        f"proof: another process decoded {n:,} tokens, {len(text):,} B of text, from the artifact "
        f"and {proof['bytes_on_disk']:,} B; predicted: {bits / 8:,.1f} B; "
        f"{n / proof['encode_seconds']:,.1f} tokens/s to encode, "
        f"{n / proof['decode_seconds']:,.1f} to decode",
    ]


# ---- Report --------------------------------------------------------------------------------------
# train.log is for people, results.json for programs, trace.npz for a page that shows what each of
# the first tokens got in every stage. Seconds and bytes stand beside the competition's limits. A
# run's folder is its own: it is locked, and results of another command, script or setting in it
# stay. `summarize` makes a submission of several results, `submit` a record's folder around it:
# what a reader needs to check the figures and to measure them again.


class Run:
    """What a command on the validation text works with, and what it has shown so far.

    results.json is rewritten after every pass over the text. open_run() sets `table`, the
    TokenTable, and `tokens`, the validation stream, int64 (n + 1,).
    """

    def __init__(self, cfg, rt, command):
        self.cfg = cfg
        self.rt = rt
        self.files = []  # that show the log
        # Of the table that ends the log.
        self.rows = ["stage          val_bpb      delta  val_loss      tokens  seconds"]
        settings = asdict(cfg)
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": rt.notes[0],
            "world_size": rt.world,
            "dtype": str(rt.dtype),
            "source_sha256": sha256(read_file(__file__)).hex(),
        }
        self.results = {
            "run_id": cfg.run_dir.name,
            "seed": cfg.seed,
            "command": command,
            "settings": settings,
            "environment": environment,
            "train": None,
            "artifact": None,
            "stages": [],
            "val_bpb": None,
        }
        preset = asdict(config_from_env({"PRESET": cfg.preset}))
        changed = [n for n in settings if settings[n] != preset[n]]

        def assignments(names):
            return " ".join(f"{n.upper()}={settings[n]}" for n in names)

        rt.by_main(self.take_folder)
        for line in (
            f"{command} {cfg.run_dir.name}, {time.strftime('%F %T UTC', time.gmtime())}",
            f"environment: {environment}",
            *rt.notes,
            f"settings: {assignments(['preset', *changed])}; all of them:",
            *("  " + assignments(names) for _, names in itertools.groupby(settings, GROUPS.get)),
        ):
            self.log(line)

    def take_folder(self):
        """Lock the run's folder and open the log in it; for rank 0 alone.

        UserError without permission, at another run's work, or at results of another command,
        source or setting, which stay.
        """
        folder = self.cfg.run_dir
        path = folder / "results.json"
        check_writable(folder)
        self.lock = open(folder / ".lock", "wb")  # noqa: SIM115 (locked until it is closed)
        with (
            suppress(OSError),  # not every file system can
            blaming(
                f"RUN_ID: another run is at work in {folder}; wait for it or set another RUN_ID",
                BlockingIOError,
            ),
        ):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and not self.cfg.replace:
            with blaming(f"{path} is no run's; REPLACE=1 replaces it", LookupError, TypeError):
                own, found = (
                    results["settings"] | results["environment"] | {"command": results["command"]}
                    for results in (self.results, read_object(path))
                )
            if odd := [
                n.upper()
                for n in sorted(own)
                if found.get(n) != own[n] and not re.fullmatch(PLACES, n)
            ]:
                raise UsageError(
                    f"{path} has another {', '.join(odd)}: set RUN_ID, or REPLACE=1 to replace it"
                )
        log = folder / f"{self.results['command']}.log"
        self.files = [sys.stdout, log.open("a", encoding="utf-8", errors="backslashreplace")]

    def log(self, line):
        """Show a line to people: on the screen and in the log file, by rank 0 alone."""
        for file in self.files:
            say(line, file)

    def record(self, name, value):
        """Set one key of the results, on the ranks that call it; rank 0 writes them."""
        self.results[name] = value
        if self.rt.rank == 0:
            write_object(self.cfg.run_dir / "results.json", self.results)

    def check_size(self, artifact):
        """Record an artifact's bytes; UserError, the file staying, if they are over the cap."""
        limit = self.cfg.size_limit_bytes
        total = CODE_BYTES + artifact.size_bytes
        overridden = artifact.overridden(self.cfg)
        self.record(
            "artifact",
            {
                "path": str(artifact.path),
                "weights_bytes": artifact.size_bytes,
                "code_bytes": CODE_BYTES,
                "total_bytes": total,
                "limit_bytes": limit,
                "sha256": artifact.digest.hex(),
                "overridden": overridden,
            },
        )
        self.log(
            f"artifact {artifact.path}: {artifact.size_bytes:,} B weights "
            f"+ {CODE_BYTES:,} B code = {total:,} of {limit:,} B"
        )
        if overridden:
            self.log(
                f"note: no decoder gets these bits: the artifact has other {', '.join(overridden)}"
            )
        if total > limit:
            raise UserError(
                f"artifact {artifact.path} is {total - limit:,} bytes over SIZE_LIMIT_BYTES="
                f"{limit:,}: lower MODEL_DIM, NUM_LAYERS or BIGRAM_VOCAB_SIZE and train again"
            )

    def add_stages(self, stages):
        """Add scored stages, tell their figures, and write results.json."""
        for stage in stages:
            bpb = stage["val_bpb"]
            self.log(f"{stage['name']}: val_bpb {bpb:.6f}, {stage['seconds']:.1f} s")
            self.rows.append(
                f"{stage['name']:<12}{bpb:>10.6f}{bpb - (self.results['val_bpb'] or bpb):>+11.6f}"
                f"{stage['val_loss']:>10.6f}{stage['tokens']:>12,}{stage['seconds']:>9.1f}"
            )
            self.results["val_bpb"] = bpb
        self.record("stages", self.results["stages"] + stages)

    def log_table(self):
        """Log the table of stages and proof; then seconds against the competition's limits."""
        for row in self.rows:
            self.log(row)
        if stages := self.results["stages"]:
            seconds = (s["seconds"] for s in stages if s["name"] != "pre_quant")
            self.log(
                f"\nevaluation  {sum(seconds):>10.1f} s of 600 s, the competition's limit on its "
                "8xH100, without pre_quant"
            )
            if train := self.results["train"]:
                self.log(
                    f"train       {train['seconds'] + train['calibration_seconds']:>10.1f} s of "
                    "600 s, with what reads training text after it; then quantize "
                    f"{train['quantize_seconds']:.1f} s"
                )


def read_result(path):
    """Return a finished run's results.json; UserError names the file and what is amiss with it.

    Two keys are added: `same`, what must agree between seeds, and `row`, the seed's own numbers.
    """
    with blaming(
        f"{path} is not a finished run's results.json, with its proof",
        ValueError,
        LookupError,
        TypeError,
        UserError,
    ):
        run = read_object(path)
        artifact = run["artifact"]
        last = run["stages"][-1]
        if artifact["total_bytes"] > 16_000_000:
            raise ValueError("over the cap")
        run["same"] = {
            # Scripts whose settings lack the quantizer had int6 alone.
            **stored_settings(Config(**{"quantizer": "int6"} | run["settings"])),
            "stage": last["name"],
            "val_tokens": last["tokens"],
            "validation": run["validation"],
            "shards": run["shards"],
            **run["environment"],
        }
        run["seed"] = run["same"].pop("seed")
        run["row"] = {
            "val_loss": last["val_loss"],
            "val_bpb": last["val_bpb"],
            "bytes_total": artifact["total_bytes"],
            "bytes_code": artifact["code_bytes"],
            "step_avg_ms": 1000 * run["train"]["seconds"] / run["train"]["steps"],
            "eval_seconds": sum(stage["seconds"] for stage in run["stages"][1:]),  # no pre_quant
            "proof_tokens": run["proof"]["tokens"],
            "proof_bytes": run["proof"]["bytes_on_disk"],
        }
    return run


def summarize(paths, mixed=False):
    """Return the contents of submission.json, made of the results.json of several seeds.

    It has means and deviations, the largest sizes, and all that is the same for every seed. The
    author's words are those of submission.json in the current folder. `mixed`: environments
    (script, device, versions) and training shards may differ.
    """
    runs = [read_result(path) for path in paths]
    first = runs[0]["same"]
    odd = {n for run in runs for n, v in run["same"].items() if v != first.get(n)}
    kept = read_object("submission.json") if Path("submission.json").exists() else {}
    summary = {
        **{name: kept.get(name, "") for name in ("author", "github_id", "name", "blurb", "track")},
        "date": time.strftime("%Y-%m-%d"),
        "warning": f"{len(runs)} seed(s); a submission needs 3" * (len(runs) < 3),
        "hardware": " + ".join(sorted({run["environment"]["device"] for run in runs})),
        "seeds": {str(run["seed"]): run["row"] for run in runs},
    }
    for name in runs[0]["row"]:
        column = [run["row"][name] for run in runs]
        summary[name] = (max if "bytes" in name else np.mean)(column)
        summary[f"{name}_std"] = np.std(column, ddof=1) if len(runs) > 1 else None
    summary |= {n: first[n] for n in first if n not in odd}
    if mixed:
        odd -= {"shards", *runs[0]["environment"]}
    if odd:
        raise UserError(
            f"the runs differ in {', '.join(sorted(odd)).upper()}; `summarize --mixed` allows it "
            "of shards and environment"
        )
    if len(summary["seeds"]) < len(runs):
        raise UserError("two results have the same seed; give one result a seed")
    return summary


# A record's README.md, with the keys of its submission.json in braces.
RECORD_ROW = """
| {seed} | {val_loss:.6f} | {val_bpb:.6f} | {bytes_total:,} | {bytes_code:,} | {step_avg_ms:,.1f} \
| {eval_seconds:,.1f} | {proof_tokens:,} | {proof_bytes:,} |"""
RECORD_REQUIREMENTS = b"""\
torch==%s
numpy>=2.0
sentencepiece>=0.2.0
zstandard>=0.22
"""
RECORD_README = """\
# {name} {val_bpb:.4f} bits per byte

{blurb}

Bits per byte of {val_tokens:,} tokens ({validation[bytes]:,} bytes) of validation text, mean of the
seeds: **{val_bpb:.6f}**, standard deviation {val_bpb_std}. {warning}

| seed | val_loss, nats | val_bpb | bytes_total | bytes_code | step_avg_ms | eval_seconds \
| proof_tokens | proof_bytes |
|---|---|---|---|---|---|---|---|---|{table}

Hardware: {hardware}. Python {python}, torch {torch}. `submission.json` has all settings that
shape the score and the SHA-256 of script, training shards and text; `train_seed*.log` is the log of
each run.

## What was proved

The score is the length of a code. Each run has coded the first `proof_tokens` tokens with the
integer frequencies that it had scored them with, into `proof_seed*.code`: `proof_bytes` of code
words and checks, and the SHA-256 of artifact and text. Another process, which had only that file,
the artifact and this script, has decoded them: all frequencies and all bytes of the text were the
same.

## Techniques

What `train_gpt.py` says of itself; each run has recorded its SHA-256, `source_sha256`.
`python train_gpt.py --help` explains every setting as well.

```
{doc}
```

## To measure it again

A log has all settings of its run (the last value counts; none may have spaces in it). Beside the
challenge's folder `data`, for each log:

```
pip install -r requirements.txt
env $(grep '^  [A-Z_]*=' train_seed$seed.log) \\
  torchrun --standalone --nproc_per_node={world_size} train_gpt.py
```
"""


def submit(out_dir, paths):
    """Make the folder of a challenge's record from the results.json of several seeds.

    UserError, before anything is written, if they cannot be summarized, if a log or a proof is not
    beside them, if they were not made by this script, or if the folder is there already.
    """
    summary = summarize(paths)
    files = {
        "train_gpt.py": read_file(__file__),
        # Without "+cu128" and the like, by which no index knows a version.
        "requirements.txt": RECORD_REQUIREMENTS % summary["torch"].split("+")[0].encode(),
    }
    if sha256(files["train_gpt.py"]).hex() != summary["source_sha256"]:
        raise UserError(f"{paths[0]} is of another script; submit by the script that made it")
    table = ""
    for path, (seed, row) in zip(paths, summary["seeds"].items()):
        table += RECORD_ROW.format(seed=seed, **row)
        for name in ("train.log", "proof.code"):
            files[name.replace(".", f"_seed{seed}.")] = read_file(Path(path).with_name(name))
    files["README.md"] = RECORD_README.format(doc=__doc__, table=table, **summary).encode()
    with blaming(f"cannot make {out_dir}; name a new folder", OSError):
        os.makedirs(out_dir)
    for name, data in files.items():
        write_atomically(f"{out_dir}/{name}", data)
    write_object(f"{out_dir}/submission.json", summary)
    say(f"{out_dir}: {', '.join(sorted(os.listdir(out_dir)))}")


# Tracebacks and torch look for a line's text in `linecache`.
PACKED = b"""\
# train_gpt.py without its comments and most docstrings, made by its command `pack`; runs on the
# Python that packed it, or a newer one
import base64, linecache, lzma, sys, traceback

source = lzma.decompress(base64.b85decode("%s")).decode()
name = __file__ + " unpacked"
linecache.cache[name] = len(source), None, source.splitlines(True), name
sys.excepthook = traceback.print_exception
exec(compile(source, name, "exec"))
"""


def pack(target, environ):
    """Write this program as a script that unpacks itself, to be run, and counted, in its place.

    It has no comments, and no docstrings but those that --help shows, and is written in the syntax
    of the Python that packs it: from 3.12 on, older ones cannot read it.
    """
    log = check_target(config_from_env(environ), target, __file__)
    # Without an indented docstring that a statement follows, but for those of settings.
    source = re.sub(
        r'(?ms)(?<!Settings:\n)^( +)"""((?!""").)*"""\n+(?=\1\S)',
        "",
        ast.unparse(ast.parse(read_file(__file__))),
    )
    packed = PACKED % base64.b85encode(lzma.compress(source.encode()))
    write_atomically(target, packed)
    log(f"{target}: {len(packed):,} bytes instead of {CODE_BYTES:,}")


# ---- Commands ------------------------------------------------------------------------------------
# All that can be checked is checked before long work starts: device, disk, tokenizer, validation
# text. Right after the last step of training the weights are on disk, and stay there until all is
# done: whatever ends the run before, `finish` goes on from them.


def open_run(cfg, environ, command, artifact=None):
    """Return the Run of a command, everything checked; `artifact`: what is scored, if it exists."""
    rt = start_runtime(cfg, environ)
    if not artifact and cfg.train_batch_tokens // cfg.train_seq_len % rt.world:
        raise UsageError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: sequences of {cfg.train_seq_len} do not "
            f"split over {rt.world} ranks; change it or --nproc_per_node"
        )
    run = Run(cfg, rt, command)
    rt.by_main(prepare_demo, cfg, run.log)
    tokens = load_validation(cfg)
    table = artifact and artifact.table
    sp = None
    if not artifact or Path(cfg.tokenizer_path).exists():
        table, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, table)
    shards = list_shards(cfg, "val")
    if not artifact:
        shards += list_shards(cfg, "train")
    run.results["shards"] = check_shards(shards, table, sp)
    run.results["validation"] = audit_bytes(table, tokens, sp)
    run.table = table
    run.tokens = tokens
    run.log(
        "validation: {tokens:,} tokens, {bytes:,} bytes, as decoded".format(
            **run.results["validation"]
        )
    )
    return run


def train_command(environ, kept=None):
    """Train, quantize, write the artifact, read it back, evaluate every stage, report, prove.

    kept: what an earlier run has kept of its training, to go on from there.
    """
    cfg = config_from_env(environ | {"ARTIFACT_PATH": ""}, kept and kept["settings"])
    run = open_run(cfg, environ, "train")
    held_out = load_held_out(cfg)
    model = new_model(cfg, run.rt, kept and kept["weights"])
    count = sum(p.numel() for p in model.parameters())
    run.log(f"model: {count:,} parameters")
    if count > WEIGHTS_MAX - 1000:  # the mixer's
        raise UsageError(
            f"MODEL_DIM, NUM_LAYERS: {count:,} parameters; an artifact holds {WEIGHTS_MAX - 1000:,}"
        )
    path = cfg.run_dir / WEIGHTS
    try:
        if kept:
            result = TrainResult(**kept["result"])
        elif path.exists() and not cfg.replace:
            raise UserError("this run is trained, not finished; REPLACE=1 trains it anew")
        else:
            room = run.rt.by_main(check_writable, cfg.run_dir, 5 * count)
            result = train(model, cfg, run.rt, run.log, len(held_out))
            if room and result.steps:
                parts = dict(
                    settings=asdict(cfg), result=asdict(result), weights=model.state_dict()
                )
                data = BytesIO()
                torch.save(parts, data)
                room.close()  # not before: others would fill it meanwhile
                write_atomically(path, data.getvalue())
                run.record("train", parts["result"])
            on_signals(interrupt)
            if result.stopped:
                raise UserError(result.stopped)
        finish(run, model, result, held_out)
    except FORESEEN as error:
        if isinstance(error, RuntimeError):
            run.log(traceback.format_exc())
        why = one_line(error)
        if path.exists():
            why += (
                f"; {path} has the weights of an unfinished run: the same command with `finish` "
                "goes on from them"
            )
        raise UserError(why) from error
    run.rt.by_main(path.unlink)


def finish_command(environ):
    """Go on from the weights that a run has kept: do all that follows training."""
    path = find_run(environ).run_dir / WEIGHTS
    # torch raises many kinds.
    with blaming(f"RUN_ID: {path} has no training to finish; train again", Exception):
        kept = torch.load(path, map_location="cpu", weights_only=True)
    # Where the folder is now.
    place = {"LOG_DIR": str(path.parent.parent), "RUN_ID": path.parent.name}
    train_command(environ | place | {"REPLACE": "1"}, kept)


def finish(run, model, result, held_out):
    """Do what follows training: find fisher's steps, calibrate, quantize, evaluate, prove.

    Rank 0 quantizes to the cap and writes; every rank scores what rank 0 has read back.
    """
    cfg = run.cfg
    path = cfg.artifact
    weights = model.state_dict() | {"mixer": new_mixer_weights()}
    start_s = perf_counter()
    # A margin: the block that is being scored is finished.
    end_s = start_s - result.seconds + 0.995 * (cfg.max_wallclock_seconds or math.inf)
    steps = {}
    if cfg.quantizer == "fisher":
        steps = run.rt.by_main(new_steps, model, held_out, end_s)
        run.log(f"fisher: steps found in {perf_counter() - start_s:.1f} s")
    weights["mixer"] = calibrate(run, weights, held_out, end_s)
    result.calibration_seconds = perf_counter() - start_s

    def write():
        """Return the bytes of the artifact that was fitted to the cap, written and read back."""
        data = fit_artifact(weights, cfg, run.table, run.log, steps)
        write_atomically(path, data)
        if read_file(path) != data:
            raise UserError(f"artifact {path} is not what was written: who else writes there?")
        return data

    data = run.rt.from_main(run.rt.by_main(write))  # other nodes have no such file
    run.record(
        "train",
        dict(
            asdict(result),
            quantize_seconds=perf_counter() - start_s - result.calibration_seconds,
            tokens_per_second=result.tokens / result.seconds,
        ),
    )
    artifact = read_artifact(path, data)
    run.check_size(artifact)

    exact = Predictor(weights, run.table, cfg, run.rt, new_plan(cfg, "pre_quant"))
    try:
        scored = evaluate_artifact(run, artifact, exact)
        if cfg.eval_dtype != "float64":
            run.log(f"note: EVAL_DTYPE={cfg.eval_dtype} is a quick look: nothing is proved")
        elif cfg.verify_enabled:
            run.rt.by_main(verify, run, artifact, scored)
    finally:
        run.log_table()


def calibrate(run, weights, held_out, end_s):
    """Return the learned mixer's weights, fitted by scoring held_out, int64 (n + 1,), once.

    The model is the exact one. The mixer begins with the one in `weights` and learns every W
    positions, at thrice its rates; scoring stops when the clock is at end_s. A block is two runs,
    each without the rows before it, so that two ranks share it. By estimate more ranks would not
    shorten it: a GPU computes so few rows faster than their kernels are launched. Larger blocks
    teach the mixer less.
    """
    cfg = replace(run.cfg, mixer_lr=3 * run.cfg.mixer_lr)
    rt = run.rt
    if not len(held_out) or cfg.mixer != "learned":
        return weights["mixer"]
    start_s = perf_counter()
    stream = torch.from_numpy(held_out).to(rt.device)
    block = cfg.eval_seq_len
    plan = new_plan(cfg, "sliding", "unguarded", "mixer")._replace(
        block=block, run=block // 2, context=0, calibration_blocks=len(stream) // block
    )
    predictor = Predictor(weights, run.table, cfg, rt, plan)
    for _ in walk(predictor, stream, run.log):
        if rt.from_main(perf_counter() > end_s):
            break
    scored = predictor.scored_to - 1
    run.log(
        f"calibration: {scored:,} of {len(stream) - 1:,} held-out tokens in "
        f"{perf_counter() - start_s:.1f} s, {block:,} a step in runs of {plan.run:,}, dealt to "
        f"{rt.world} rank(s); bits a token: sliding "
        f"{predictor.bits['sliding'] / max(scored, 1):.4f}, "
        f"mixer {predictor.bits['mixer'] / max(scored, 1):.4f}"
    )
    return predictor.mixture.weights


def evaluate_artifact(run, artifact, *first):
    """Score the predictors `first`, then the artifact in every stage; write trace.npz.

    Return the first VERIFY_TOKENS frequencies of the last stage, or more.
    """
    cfg = run.cfg
    n = cfg.trace_tokens
    trace = asdict(artifact.table)
    later = (
        Predictor(artifact.weights, artifact.table, cfg, run.rt, plan)
        for plan in evaluation_plans(cfg)
    )
    for predictor in itertools.chain(first, later):
        stages, last = evaluate(
            predictor,
            run.tokens,
            run.results["validation"]["bytes"],
            run.log,
            max(n, cfg.verify_tokens or len(run.tokens)),
        )
        run.add_stages(stages)
        trace |= zip(predictor.plan.stages, last[..., :n])
    data = BytesIO()
    np.savez_compressed(data, tokens=run.tokens[: n + 1], val_bpb=run.results["val_bpb"], **trace)
    run.rt.by_main(write_atomically, cfg.run_dir / "trace.npz", data.getvalue())
    return last[-1, 0]


def find_run(environ):
    """Return the Config of the settings that say where a run is."""
    return config_from_env(
        {
            name: environ[name]
            for name in environ
            if re.fullmatch("PRESET|SEED|RUN_ID|LOG_DIR|ARTIFACT_PATH", name)
        }
    )


def open_artifact(environ):
    """Return (Artifact at ARTIFACT_PATH, its Config); settings of group eval may be overridden."""
    artifact = read_artifact(find_run(environ).artifact)
    return artifact, config_from_env(environ, artifact.settings)


def eval_command(environ, command):
    """Score the artifact at ARTIFACT_PATH in every stage (`eval`), or prove it (`verify`).

    Results go to LOG_DIR, into a folder named after run and overridden settings; `verify` takes
    none of these, since its decoder has the artifact's.
    """
    artifact, cfg = open_artifact(environ)
    overridden = artifact.overridden(cfg)
    if overridden and command == "verify":
        raise UsageError(
            f"verify decodes by the artifact's settings; unset {', '.join(overridden)}"
        )
    folder = artifact.path.resolve().parent
    if not cfg.run_id or folder == cfg.run_dir.resolve():
        names = (f",{name}={getattr(cfg, name.lower())}" for name in overridden)
        cfg = replace(cfg, run_id=f"{cfg.run_id or folder.name}_{command}{''.join(names)}"[:200])
    run = open_run(cfg, environ, command, artifact)
    run.check_size(artifact)
    try:
        if command == "eval":
            evaluate_artifact(run, artifact)
        else:
            run.rt.by_main(verify, run, artifact)
    finally:
        run.log_table()


def text_tokens(data, table, encode):
    """Return tokens, int64 (n + 1,), BOS first, that decode to exactly these bytes.

    A word gets the tokens of SentencePiece's `encode`, as after other text, or else after a BOS,
    which prints nothing. White space (but one space before a word), and words that these tokens
    would not give back exactly, are spelled in byte pieces.
    """
    byte_ids = {table.texts[i][0]: i for i, kind in enumerate(table.kinds) if kind == "B"}
    if len(byte_ids) < 256:
        raise UserError(
            "compress: the artifact's tokenizer has no byte pieces; train one by `tokenize`"
        )
    dot = len(encode("."))

    @cache
    def ids_of(run):
        """Return the tokens of one word or piece of white space, bytes."""
        word = run.decode("utf-8", "replace")
        tries = [encode(word), [table.bos_id, *encode(word)]]
        if run.isspace():
            tries = []
        elif word[0] == " ":
            tries = [encode("." + word)[dot:]]
        for ids in tries:
            text = table.decode(np.array([byte_ids[ord("a")], *ids]))
            # What prints nothing at the end would swallow the next word's space.
            if text == b"a" + run and table.texts[ids[-1]]:
                return ids
        return [byte_ids[byte] for byte in run]

    runs = re.findall(rb"(?s)(?<=.) \S+|\S+|\s", data)
    return np.concatenate([[table.bos_id], *map(ids_of, runs)])


def code_command(environ, command, source, target):
    """Code a file, whatever its bytes, with the artifact at ARTIFACT_PATH, or decode it.

    `compress` uses up to 16 lanes; `decompress` needs no tokenizer.
    """
    artifact, cfg = open_artifact(environ)
    log = check_target(cfg, target, source, artifact.path, cfg.tokenizer_path)
    codec = Codec(artifact, cfg, start_runtime(cfg, {}), log)
    if command == "decompress":
        torch.set_num_threads(1)  # a row at a time is too little to share
        write_atomically(target, codec.decode(source), source)
        log(f"{source} is decoded")
        return

    data = read_file(source)
    start_s = perf_counter()
    table, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, artifact.table)
    tokens = text_tokens(data, table, sp.encode)
    lanes = math.gcd(cfg.mixer_block, MOST_LANES)  # a power of two
    while lanes > 1 and 2 * cfg.eval_seq_len * lanes > len(tokens):  # two windows a lane
        lanes //= 2
    coded, bits, _ = codec.encode(tokens, lanes)
    write_atomically(target, coded, source)
    log(
        f"{len(data):,} B -> {len(coded):,} B: a header of {CODE_HEAD_BYTES} B, the rest "
        f"predicted as {bits / 8:,.1f} B; {len(tokens) / (perf_counter() - start_s):,.0f} tokens/s"
    )


def show_help():
    """Print the usage, and each setting with what its group's docstring says of it."""
    say(__doc__)
    for name in GROUPS:
        doc = re.search(rf"\b{name}: (.*)", GROUPS[name].__doc__)[1]
        say(f"  {name.upper():<28} {doc} (record: {FIELDS[name].default!r})")


def dispatch(args, environ):
    """Run one command line."""
    match args:
        case []:
            train_command(environ)
        case ["finish"]:
            finish_command(environ)
        case ["eval" | "verify"]:
            eval_command(environ, *args)
        case ["compress" | "decompress", _, _]:
            code_command(environ, *args)
        case ["tokenize", out_dir, *paths] if paths:
            tokenize_command(out_dir, paths, environ)
        case ["summarize", "--mixed", *paths] | ["summarize", *paths] if paths:
            summary = summarize(paths, "--mixed" in args)
            write_object("submission.json", summary)
            say(json.dumps(summary, indent=1))
        case ["submit", out_dir, *paths] if paths:
            submit(out_dir, paths)
        case ["pack", target]:
            pack(target, environ)
        case ["-h" | "--help" | "help"]:
            show_help()
        case _:
            raise UsageError(
                f"unknown or incomplete command {' '.join(args)!r}; see train_gpt.py --help"
            )


def on_signals(action=lambda *_: None):
    """Call action(number, frame), or nothing, at the signals that end a program.

    Those that nohup ignores stay ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, action)


def interrupt(*_):
    """Raise KeyboardInterrupt; what it starts is not interrupted again."""
    on_signals()
    raise KeyboardInterrupt("interrupted")


def main():
    """Run the command line and return its exit status; what a user can mend is one line on stderr.

    The caller must leave by os._exit: a normal exit would keep other ranks waiting in a collective,
    can abort in gloo's teardown, and on a closed stdout would change the status.
    """
    rank = 0
    # print(file=None) would write to stdout.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python's stderr has it
    on_signals(interrupt)
    try:
        rank = torchrun_ranks(os.environ)[0]
        with blaming("a package is amiss; pip install -r requirements.txt", ImportError):
            dispatch(sys.argv[1:], os.environ)
    except FORESEEN as error:
        if rank == 0:
            say(f"error: {one_line(error)}", sys.stderr)
        return {KeyboardInterrupt: 130, UsageError: 2}.get(type(error), 1)
    if dist.is_initialized():
        dist.barrier()
    return 0


# ---- Texts to shards -----------------------------------------------------------------------------
# `tokenize` turns text into shards (see Data); so does the demo with the only English that every
# machine has, the documentation inside Python and its packages. One document in 20, chosen by a
# checksum, is validation text.

SHARD_TOKENS = 20_000_000
DOCUMENT_CHARS = 4096  # a .txt document ends at the first blank line after so many
MOST_DOCUMENT_CHARS = 16_384  # and at the next line, or part of a long one, after so many
BATCH_DOCUMENTS = 100  # encoded at once


def read_documents(path):
    """Yield a file's documents: the "text" fields of .jsonl, or a .txt cut at blank lines.

    See DOCUMENT_CHARS and MOST_DOCUMENT_CHARS for the cuts. UserError names the file and the line.
    """
    is_plain = path.endswith(".txt")
    # Lines, or parts of lines that span read chunks; the last one is empty.
    parts = (part for chunk in read_chunks(path) for part in BytesIO(chunk))
    number = 1
    document = ""
    try:
        for part in itertools.chain(codecs.iterdecode(parts, "utf-8"), [""]):
            document += part
            ends = part.endswith("\n")
            if is_plain:
                ends = len(document) > (DOCUMENT_CHARS if part.isspace() else MOST_DOCUMENT_CHARS)
            if (ends or not part) and document.strip():
                if not is_plain:
                    document = json.loads(document.lstrip("\ufeff"))["text"]  # a byte order mark
                    document.encode()  # a string without half of a surrogate pair
                yield document
                document = ""
            number += part.endswith("\n")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"tokenize: cannot read {path}, line {number}: expected UTF-8 text, in .jsonl "
            f'{{"text": "..."}}: {error}'
        ) from error


def demo_documents():
    """Return pydoc's topics and the longer docstrings of the standard library, numpy and torch."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    skipped = "(^|/)(site-packages|tests?|idlelib|lib2to3|_vendor)/"
    for module in (os, np, torch):
        root = Path(module.__file__).parent
        for path in sorted(root.rglob("*.py")):
            full = sum(map(len, documents)) >= 6_000_000
            if full or re.search(skipped, str(path.relative_to(root))):
                continue
            found = re.findall('(?s)"""(.*?)"""', path.read_text("utf-8", errors="ignore"))
            if long := [inspect.cleandoc(text) for text in found if len(text) >= 80]:
                documents.append("\n\n".join(long))
    return documents


def prepare_demo(cfg, log):
    """Make the demo's shards and tokenizer in its cache, unless that is done."""
    # The last file that is made says whether all are.
    if cfg.data_path == DEMO_CACHE and not os.path.exists(f"{DEMO_CACHE}/fineweb_val_000000.bin"):
        log("demo: gathering English from the documentation on this machine")
        write_shards(cache(demo_documents), DEMO_CACHE, cfg, log)


def train_tokenizer(documents, vocab_size, path):
    """Train SentencePiece BPE with byte fallback and no normalization; write it to `path`.

    It trains on 200,000 pieces of lines, of at most 256 characters and without U+2585, since
    SentencePiece silently drops lines that are very long or hold that character.
    """
    import sentencepiece

    model = BytesIO()
    inside = "[^\n-\r\x1c-\x1e\x85\u2028\u2029\u2585]{1,256}"
    part = rf"{inside}(?!\S)|{inside}"  # cut between words, if it can be
    lines = (line for text in documents for line in re.findall(part, text) if line.strip())
    with blaming(f"VOCAB_SIZE={vocab_size}: raise or lower it for this text", RuntimeError):
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
            minloglevel=2,
        )
    write_atomically(path, model.getvalue())


def token_shards(texts, sp):
    """Yield each shard's tokens, an array of uint16: whole documents, each after BOS."""
    tokens = array("H")
    while batch := list(itertools.islice(texts, BATCH_DOCUMENTS)):
        for ids in sp.encode(batch, add_bos=True):
            tokens.extend(ids)
            if len(tokens) >= SHARD_TOKENS:
                yield tokens
                tokens = array("H")
    if tokens:
        yield tokens


def write_shards(documents, out_dir, cfg, log):
    """Tokenize texts to out_dir/fineweb_{train,val}_*.bin; train a tokenizer if there is none.

    Each call of documents() returns the texts from the first on; they need not fit in memory. A new
    tokenizer does not take an official one's name (fineweb_*): it is out_dir/tokenizer.model then.
    """
    path = Path(cfg.tokenizer_path)
    check_writable(out_dir)
    if not path.exists():
        if path.name.startswith("fineweb_"):
            path = Path(out_dir, "tokenizer.model")
        check_writable(path.parent)
    held = np.fromiter((not crc32(text.encode()) % 20 for text in documents()), bool)
    if len(held) < 2:
        raise UserError(
            "tokenize: two documents are the least, since validation text must not be trained on"
        )
    if held.all() == held.any():  # all or none: the last one changes sides
        held[-1] ^= True
    if not path.exists():
        log(f"training a tokenizer of {cfg.vocab_size} pieces: {path}")
        train_tokenizer(itertools.compress(documents(), ~held), cfg.vocab_size, path)
    table, sp = load_tokenizer(path, cfg.vocab_size)
    for split, chosen in ("train", ~held), ("val", held):
        log(f"{split}: {chosen.sum():,} documents")
        for number, tokens in enumerate(token_shards(itertools.compress(documents(), chosen), sp)):
            target = f"{out_dir}/fineweb_{split}_{number:06d}.bin"
            write_atomically(target, shard_bytes(tokens, table.digest))
            log(f"{target}: {len(tokens):,} tokens")
    log(f"done: DATA_PATH={out_dir} TOKENIZER_PATH={path} VOCAB_SIZE={cfg.vocab_size}")


def tokenize_command(out_dir, paths, environ):
    """Tokenize files into shards in out_dir."""
    cfg = config_from_env(environ)
    for path in paths:
        if is_stream(path) or not re.search(r"\.(txt|jsonl|jsonl\.zst)$", path):
            raise UsageError(f"tokenize: {path} is no file named .txt, .jsonl or .jsonl.zst")
    if any(Path(out_dir).glob("fineweb_*.bin*")):
        raise UserError(f"tokenize: {out_dir} holds shards already; name a folder that has none")

    def documents():
        return (text for path in paths for text in read_documents(path) if text.strip())

    write_shards(documents, out_dir, cfg, say)


if __name__ == "__main__":
    os._exit(main())
