#!/usr/bin/env python3
"""Train, compress and honestly score a language model under the Parameter Golf rules, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    train on 8xH100, write the artifact, score it
    PRESET=demo python train_gpt.py                          the same on a laptop: no data, no GPU, 3 minutes
    python train_gpt.py eval                                 score the artifact at ARTIFACT_PATH again
    python train_gpt.py verify                               prove its figure by decoding
    python train_gpt.py compress IN OUT, decompress IN OUT   any file to code words, and back, byte for byte
    python train_gpt.py tokenize OUT_DIR FILE...             .txt, .jsonl, .jsonl.zst to token shards
    python train_gpt.py summarize RESULTS_JSON...            results of several seeds to submission.json

Settings are environment variables, the names of `Config`'s fields in capitals (--help lists them). A run
writes LOG_DIR/RUN_ID/train.log (for people), results.json (for programs), model.int6.lzma (the artifact).

    shards -> train (Muon + AdamW, complementary loss) -> EMA -> int6 + LZMA -> artifact on disk
                                                                                     |
    val_bpb <- bits <- score <- integer frequencies <- predict <- model <- artifact read back
          '--> update: TTT learns from what has been scored, the n-gram history follows the prefix

Bits per byte: val_bpb = sum over tokens of -log2(freq[x_t] / 2^24) / bytes of text, a code length, since
  1. causal       the frequencies for position t depend on the artifact and on x_0..x_{t-1} alone;
  2. complete     every token of the vocabulary has an integer frequency >= 1 and they sum to exactly 2^24;
  3. score first  position t's frequencies are final before any state behind them has seen x_t;
  4. one pass     left to right, once. `Predictor` alone makes frequencies; used out of order, it raises.

Shapes: B batch, T rows, W window, S stride, D width, H and G heads, d head width, V vocabulary, R positions.
"""

import collections
import contextlib
import copy
import dataclasses
import difflib
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
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # torch's threads must not spin where ranks share cores
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


# ---- Config ------------------------------------------------------------------------------------------------
# One frozen dataclass is the only door for settings, in groups: `run` says where things are on this machine,
# `model` is fixed once weights exist, `train` shapes training, `eval` shapes the code length and can be
# overridden by the `eval` command. All but `run` are stored in the artifact, with the preset's name.
class UserError(Exception):
    """Something the user can mend. Its message names the setting or file and the way out, in one line."""

    exit_status = 1


class UsageError(UserError):
    """A bad command line or setting."""

    exit_status = 2


def option(default, group, doc, low=0):
    """A Config field: its default, group, one line of documentation and, for a number, its least value."""
    return dataclasses.field(default=default, metadata={"group": group, "doc": doc, "low": low})


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings, with the defaults of the `record` preset (the 8xH100 run)."""

    preset: str = option("record", "run", "record, bench or demo")
    device: str = option("auto", "run", "auto, cuda or cpu")
    data_path: str = option("data/datasets/fineweb10B_sp1024", "run", "folder of the shards")
    tokenizer_path: str = option(
        "data/tokenizers/fineweb_1024_bpe.model", "run", "SentencePiece model"
    )
    run_id: str = option("", "run", "folder of the run under LOG_DIR; empty: PRESET_seedSEED")
    artifact_path: str = option("", "run", "artifact file; empty: LOG_DIR/RUN_ID/model.int6.lzma")
    log_dir: str = option("logs", "run", "where runs are written")
    val_tokens: int = option(0, "run", "validation tokens to score, from the start; 0: all")
    size_limit_bytes: int = option(16_000_000, "run", "cap on code plus artifact", 1)
    log_every: int = option(100, "run", "training steps between two log lines", 1)
    verify_enabled: bool = option(
        True, "run", "end a run with a proof: code, and decode in another process"
    )
    verify_tokens: int = option(1000, "run", "tokens that are proved, from the stream's start")
    seed: int = option(1337, "train", "seed of the initial weights")
    iterations: int = option(20_000, "train", "most optimizer steps", 1)
    max_wallclock_seconds: float = option(
        600.0, "train", "training time; 0: no limit, ITERATIONS decides"
    )
    train_batch_tokens: int = option(
        786_432, "train", "tokens in an optimizer step, over all ranks", 1
    )
    micro_batch_tokens: int = option(
        98_304, "train", "most tokens a rank takes through the model at once", 1
    )
    warmup_steps: int = option(
        20, "train", "untimed steps on random tokens that compile the kernels"
    )
    warmdown_iters: int = option(
        3500, "train", "steps over which the learning rates fall to 0 at the end"
    )
    matrix_lr: float = option(0.025, "train", "Muon, matrices")
    scalar_lr: float = option(0.025, "train", "AdamW, vectors and scalars")
    tied_embed_lr: float = option(0.035, "train", "AdamW, embedding tables")
    muon_momentum: float = option(
        0.99, "train", "reached from 0.92 over MUON_MOMENTUM_WARMUP_STEPS"
    )
    muon_momentum_warmup_steps: int = option(1500, "train", "steps", 1)
    muon_wd: float = option(0.04, "train", "decoupled weight decay of Muon")
    adam_wd: float = option(0.04, "train", "decoupled weight decay of AdamW")
    grad_clip_norm: float = option(0.3, "train", "global gradient norm; 0: off")
    ema_decay: float = option(0.997, "train", "average of the weights over steps; 0: off")
    swa_enabled: bool = option(
        False, "train", "average snapshots of the warmdown instead of the EMA"
    )
    swa_every: int = option(50, "train", "steps between two snapshots", 1)
    qat_enabled: bool = option(False, "train", "train on quantized weights late in the warmdown")
    late_qat_threshold: float = option(0.15, "train", "learning-rate scale below which QAT starts")
    complement_alpha: float = option(0.5, "train", "complementary loss; 0: plain cross-entropy")
    mixer_calibration_tokens: int = option(
        1_048_576, "train", "held-out text for the mixer; 0: cold start"
    )
    vocab_size: int = option(1024, "model", "tokens in the vocabulary (V)", 2)
    num_layers: int = option(11, "model", "transformer blocks", 2)
    model_dim: int = option(512, "model", "width of the residual stream (D)", 1)
    num_heads: int = option(8, "model", "query heads (H)", 1)
    num_kv_heads: int = option(4, "model", "key and value heads (G)", 1)
    mlp_mult: int = option(3, "model", "hidden width of the MLP in units of D", 1)
    xsa_last_n: int = option(4, "model", "last layers with exclusive self-attention")
    rope_dims: int = option(16, "model", "leading dimensions of a head that are rotated", 4)
    bigram_vocab_size: int = option(2048, "model", "rows of the hashed bigram table", 2)
    bigram_dim: int = option(128, "model", "width of the bigram and value tables", 1)
    ve_layers: str = option(
        "9,10", "model", "layers with value embeddings, comma-separated; empty: none"
    )
    vrl_enabled: bool = option(True, "model", "value residual learning")
    logit_softcap: float = option(30.0, "model", "logits = cap * tanh(z / cap)", 1e-3)
    qk_gain_init: float = option(1.5, "model", "initial per-head gain on queries")
    train_seq_len: int = option(
        2048, "model", "tokens in a training sequence; sets the rotary base", 1
    )
    eval_seq_len: int = option(2048, "eval", "window W", 1)
    eval_stride: int = option(64, "eval", "rows S scored by each window after the first", 1)
    eval_batch_windows: int = option(32, "eval", "windows in one forward pass", 1)
    ttt_enabled: bool = option(True, "eval", "score-first test-time training")
    ttt_schedule_chunks: int = option(1893, "eval", "chunks over which the TTT rate falls to 0", 1)
    ttt_lr: float = option(5e-4, "eval", "AdamW")
    ttt_epochs: int = option(3, "eval", "optimizer steps a chunk", 1)
    ttt_chunk_tokens: int = option(32_768, "eval", "positions scored between two TTT updates", 1)
    ttt_freeze_blocks: int = option(9, "eval", "first blocks whose matrices TTT leaves alone")
    ttt_temperature: float = option(0.98, "eval", "divides the logits from the ttt stage on", 1e-3)
    polyak_decay: float = option(0.998, "eval", "average of TTT's weights that scores")
    mixer: str = option("learned", "eval", "learned, entropy or none")
    ngram_order: int = option(
        10, "eval", "longest n-gram, the predicted token included; above 9 as 9", 2
    )
    ngram_recent: int = option(4, "eval", "last occurrences that a context looks at", 1)
    ngram_hash_bits: int = option(26, "eval", "2^this heads of chains for each kind of context", 1)
    mixer_block: int = option(
        16_384, "eval", "positions between two updates of the learned mixer", 1
    )
    mixer_lr: float = option(1e-3, "eval", "learned mixer, Adam")
    min_count: int = option(1, "eval", "occurrences that a context needs, else back off", 1)
    alpha_base: float = option(
        0.0, "eval", "entropy mixer: alpha = base + range * sigmoid(2 (H - center))"
    )
    alpha_range: float = option(0.10, "eval", "entropy mixer")
    alpha_center: float = option(1.0, "eval", "entropy mixer, nats of neural entropy H")

    def __post_init__(self):
        check_config(self)

    @property
    def run_dir(self):
        """Where this run's log, results and artifact go."""
        return Path(self.log_dir) / (self.run_id or f"{self.preset}_seed{self.seed}")

    @property
    def artifact(self):
        """Path of the artifact, to be written or to be evaluated."""
        return Path(self.artifact_path or self.run_dir / "model.int6.lzma")


GROUPS = {f.name: f.metadata["group"] for f in dataclasses.fields(Config)}
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
    # Real FineWeb shards on two CPU cores: a smaller model of the same mechanisms, a cap that binds.
    "bench": SMALL
    | dict(
        val_tokens=131_072,
        size_limit_bytes=2_400_000,
        log_every=50,
        iterations=600,
        verify_tokens=5000,
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
    # No data, no GPU: a toy model on the docstrings of this machine, three minutes from start to end.
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
    """The value of a setting from its text; UsageError names the variable, the text and what is allowed."""
    words = {"0": False, "1": True, "False": False, "True": True}  # the last two as logs show them
    expected = {bool: "0 or 1", int: "a whole number", float: "a finite number"}.get(field.type)
    with contextlib.suppress(ValueError, KeyError):
        value = words[text] if field.type is bool else field.type(text)
        if field.type is not float or math.isfinite(value):
            return value
    raise UsageError(f"{field.name.upper()}={text!r}: expected {expected}")


def config_from_env(environ, stored=None):
    """Config: preset, then `stored` (an artifact's settings), then the environment; UsageError for slips."""
    fields, stored = {f.name.upper(): f for f in dataclasses.fields(Config)}, stored or {}
    for name in environ.keys() - fields:
        for meant in difflib.get_close_matches(name, fields, n=1, cutoff=0.9):
            raise UsageError(f"{name} is not a setting: did you mean {meant}? Otherwise unset it")
    given = {
        f.name: parse_setting(f, environ[name]) for name, f in fields.items() if name in environ
    }
    preset = given.get("preset") or stored.get("preset", "record")
    if preset not in PRESETS:
        raise UsageError(f"PRESET={preset!r}: there are {', '.join(PRESETS)}")
    if strange := stored.keys() - GROUPS:
        raise UserError(
            f"the artifact has settings of another version of this script: {', '.join(strange)}"
        )
    for name in (n for n in given if n in stored and GROUPS[n] in ("model", "train")):
        if given[name] != stored[name]:
            raise UsageError(
                f"{name.upper()}={given[name]}: the artifact has {stored[name]}; train again"
            )
    return Config(**{**PRESETS[preset], **stored, **given, "preset": preset})


def check_config(c):
    """Raise UsageError for the first impossible value or combination."""

    def need(ok, name, allowed):
        if not ok:
            raise UsageError(f"{name.upper()}={getattr(c, name)!r}: {allowed}")

    for f in dataclasses.fields(c):
        value, low = getattr(c, f.name), f.metadata["low"]
        need(isinstance(value, str) or value >= low, f.name, f"must be at least {low}")
    for whole, part in (
        ("model_dim", "num_heads"),
        ("num_heads", "num_kv_heads"),
        ("train_batch_tokens", "train_seq_len"),
        ("micro_batch_tokens", "train_seq_len"),
        ("eval_seq_len", "eval_stride"),
        ("ttt_chunk_tokens", "eval_seq_len"),
        ("ttt_chunk_tokens", "mixer_block"),
    ):
        need(
            getattr(c, whole) % getattr(c, part) == 0,
            whole,
            f"must be a multiple of {part.upper()}={getattr(c, part)}",
        )
    layers = c.ve_layers.split(",") if c.ve_layers.strip() else []
    need(
        all(i.strip().isdigit() and int(i) < c.num_layers for i in layers),
        "ve_layers",
        f"must be comma-separated layers below NUM_LAYERS={c.num_layers}",
    )
    for name, allowed in (
        ("device", ("auto", "cuda", "cpu")),
        ("mixer", ("learned", "entropy", "none")),
    ):
        need(getattr(c, name) in allowed, name, f"there are {', '.join(allowed)}")
    need(c.rope_dims % 2 == 0, "rope_dims", "must be even")
    need(
        c.eval_seq_len - c.eval_stride != 1,
        "eval_stride",
        "must leave no or 2 rows of a window known",
    )
    for name, high in (
        ("xsa_last_n", c.num_layers),
        ("ttt_freeze_blocks", c.num_layers),
        ("rope_dims", c.model_dim // c.num_heads),
        ("complement_alpha", 1),
        ("late_qat_threshold", 1),
        ("ema_decay", 1 - 1e-9),
        ("polyak_decay", 1 - 1e-9),
        ("muon_momentum", 1 - 1e-9),
        ("alpha_base", 1),
        ("alpha_range", 1 - c.alpha_base),
        ("min_count", c.ngram_recent),
        ("vocab_size", 65_536),
        ("ngram_hash_bits", 30),
    ):
        need(getattr(c, name) <= high, name, f"must be at most {high:.9g}")


# ---- Runtime -----------------------------------------------------------------------------------------------
# Rank, device and dtype are decided once and said aloud. The number of CPU threads is that of one rank: the
# split of a product over threads can change its last bit, and 1 and 8 ranks must commit the same integers.
@dataclasses.dataclass
class Runtime:
    """Where this process runs: rank of world, device and compute dtype."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    notes: tuple = ()

    def sum_over_ranks(self, tensor):
        """`tensor`, summed in place over the ranks. Every rank must call it the same number of times."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """Rank 0's Python float, on every rank; until rank 0 calls it, the others wait."""
        box = torch.tensor(
            [value if self.rank == 0 else 0.0], dtype=torch.float64, device=self.device
        )
        return self.sum_over_ranks(box).item()

    def on_main(self, work):
        """work() on rank 0 while the others wait; where it raises UserError, every rank does: none hangs."""
        failure = None
        try:
            if self.rank == 0:
                work()
        except UserError as error:
            failure = error
        if self.from_main(float(failure is not None)):
            raise failure or UserError("rank 0 has failed")

    def clock(self):
        """Seconds on a clock, read once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def compiled(self, function):
        """`function` through torch.compile where that pays (CUDA); as it is elsewhere."""
        if self.device.type != "cuda":
            return function
        torch._dynamo.config.recompile_limit = 64  # past it torch would refuse
        return torch.compile(function, dynamic=False, fullgraph=True)


def start_runtime(cfg, environ):
    """Join the process group that torchrun describes, choose device, dtype and attention; returns Runtime."""
    rank, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    cuda = cfg.device != "cpu" and torch.cuda.device_count() >= int(
        environ.get("LOCAL_WORLD_SIZE", 1)
    )
    if not cuda and (cfg.device == "cuda" or (cfg.preset, cfg.device) == ("record", "auto")):
        raise UsageError(
            f"PRESET={cfg.preset} DEVICE={cfg.device}: torch sees no CUDA device for each rank; "
            "DEVICE=cpu insists, PRESET=demo and PRESET=bench with DEVICE=auto need none"
        )
    device, can = torch.device("cpu"), torch.cpu.get_capabilities()
    if cuda:
        device = torch.device("cuda", int(environ.get("LOCAL_RANK", 0)))
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products
        torch.cuda.set_device(device)
    torch.set_num_threads(os.cpu_count())
    fast = cuda or can.get("avx512_bf16") or can.get("amx_bf16")
    name = torch.cuda.get_device_name() if cuda else can.get("cpu_name", os.uname().machine)
    dtype, why = (
        (torch.bfloat16, "multiplied in hardware") if fast else (torch.float32, "no bf16 units")
    )
    if world > 1:
        dist.init_process_group(
            "nccl" if cuda else "gloo", **({"device_id": device} if cuda else {})
        )
    kernel = "SDPA's own kernels" + ("; FlashAttention-3 is not installed" if cuda else "")
    with contextlib.suppress(ImportError, RuntimeError):
        if cuda:
            torch.nn.attention.activate_flash_attention_impl("FA3")
            kernel = "FlashAttention-3 inside SDPA"
    notes = (
        f"{device.type} {name}, {world} rank(s), {torch.get_num_threads()} CPU threads each",
        f"dtype {dtype}: {why}",
        f"attention: {kernel}",
    )
    return Runtime(rank, world, device, dtype, notes)


def progress_line(done, total, start_s, unit):
    """'done/total unit, rate, elapsed, ETA' for long work that began at time.perf_counter() == start_s."""
    elapsed_s = max(time.perf_counter() - start_s, 1e-9)
    return (
        f"{done:,}/{total:,} {unit}, {done / elapsed_s:,.0f}/s, {elapsed_s:.0f} s, "
        f"ETA {elapsed_s / max(done, 1) * (total - done):.0f} s"
    )


def write_atomically(path, data):
    """Write bytes to a temporary file beside `path` and rename it: the file is whole or it is not there."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or write elsewhere"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_file(path, name="", hint=""):
    """A file's bytes; UserError says which setting or file it was."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}cannot read {path}: {error.strerror}{hint}") from error


def check_writable(folder, need_bytes):
    """Fail before hours of work, not after: `folder` must exist or be made, be writable and have room."""
    write_atomically(folder / ".probe", b"probe")
    (folder / ".probe").unlink()
    if (free := shutil.disk_usage(folder).free) < need_bytes:
        raise UserError(
            f"LOG_DIR: {folder} has {free:,} bytes free, needs {need_bytes:,}: set it elsewhere"
        )


# ---- Tokenizer and byte accounting -------------------------------------------------------------------------
# BPB divides by bytes, so a byte counted twice is a better score for nothing. A leading space counts only
# where a decoder prints one: not after a boundary (BOS, control, unknown). Every document's text is compared.
SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """The tokenizer: pieces[i], of kind kinds[i]: Normal, Unknown, Control, X (unused) or Byte."""

    pieces: tuple
    kinds: str
    bos_id: int

    @functools.cached_property
    def digest(self):
        """SHA-256 of pieces and kinds: two tokenizers with the same digest read the same tokens."""
        return hashlib.sha256(
            json.dumps([self.pieces, self.kinds, self.bos_id]).encode()
        ).hexdigest()

    @functools.cached_property
    def texts(self):
        """What each token prints, as bytes, its leading space included: nothing, where it is a boundary."""
        return tuple(
            bytes([int(piece[3:5], 16)])
            if kind == "B"
            else piece.replace(SPACE, " ").encode()
            if kind == "N"
            else b""
            for piece, kind in zip(self.pieces, self.kinds)
        )

    @functools.cached_property
    def byte_tables(self):
        """(bytes without a leading space, has a leading space, is a boundary), each an array over V."""
        leading = np.array(
            [k == "N" and p.startswith(SPACE) for p, k in zip(self.pieces, self.kinds)]
        )
        base = np.array([len(t) for t in self.texts], dtype=np.int64) - leading
        return base, leading, np.array([k in "UCX" for k in self.kinds])

    def count_bytes(self, tokens):
        """Bytes that tokens[1:] print, each after its predecessor; int64 (len(tokens) - 1,)."""
        base, leading, boundary = self.byte_tables
        return base[tokens[1:]] + (leading[tokens[1:]] & ~boundary[tokens[:-1]])

    def decode(self, tokens):
        """The bytes of one document's tokens: a space is printed except after a boundary."""
        _, leading, boundary = self.byte_tables
        cut = leading[tokens] & np.append(True, boundary[tokens[:-1]])
        return b"".join(self.texts[token][c:] for token, c in zip(tokens.tolist(), cut.tolist()))


def load_tokenizer(path, vocab_size, table=None):
    """(TokenTable, processor) of a SentencePiece model; UserError if it does not fit, or is not `table`'s."""
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"TOKENIZER_PATH: {path} is no SentencePiece model; see README") from error
    if sp.vocab_size() != vocab_size or sp.bos_id() < 0:
        raise UserError(f"VOCAB_SIZE={vocab_size}: {path} has {sp.vocab_size()} pieces, or no BOS")
    ids, tests = (
        range(vocab_size),
        dict(U=sp.is_unknown, C=sp.is_control, X=sp.is_unused, B=sp.is_byte),
    )
    kinds = "".join(next((kind for kind, test in tests.items() if test(i)), "N") for i in ids)
    found = TokenTable(tuple(map(sp.id_to_piece, ids)), kinds, sp.bos_id())
    if table and table.digest != found.digest:
        raise UserError(f"TOKENIZER_PATH={path}: the artifact has another tokenizer")
    return found, sp


def audit_bytes(table, tokens, decode=None):
    """Total bytes of tokens[1:], each document's compared with its text, by SentencePiece or the table."""
    counts, starts = table.count_bytes(tokens), np.flatnonzero(tokens == table.bos_id)
    if not len(starts) or starts[0]:
        raise UserError(
            f"the validation stream must start with BOS (id {table.bos_id}), like every document"
        )
    for start, stop in zip(starts, [*starts[1:], len(tokens)]):
        document, where = tokens[start:stop], f"validation document at token {start}"
        cut = not decode or stop == len(tokens)
        text = table.decode(document) if cut else decode(document[1:].tolist()).encode()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            if stop < len(tokens) or error.reason != "unexpected end of data":
                raise UserError(
                    f"{where}: {error}; shards and tokenizer do not belong together"
                ) from error
        if (counted := int(counts[start:stop].sum())) != len(text):  # the next BOS included
            raise UserError(
                f"{where}: {counted} bytes counted, {len(text)} decoded; a BPB would be wrong"
            )
    return int(counts.sum())


# ---- Data --------------------------------------------------------------------------------------------------
# Official shards: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens; inside
# zstandard if named .zst. Training reads them in sorted order, cyclically, and alike on any number of ranks.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def read_bytes(path):
    """A file's contents, decompressed when its name ends in .zst; EOFError when a frame is cut."""
    data, parts = Path(path).read_bytes(), []
    if not str(path).endswith(".zst"):
        return data
    import zstandard

    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("its end is missing")
        data = frame.unused_data
    return b"".join(parts)


def read_shard(path, vocab_size):
    """Tokens of one shard, uint16 (n,). UserError for a foreign, truncated or out-of-vocabulary file."""
    try:
        data = read_bytes(path)
    except Exception as error:  # zstandard raises a class of its own
        raise UserError(f"shard {path} cannot be read ({error}); download it again") from error
    header = np.frombuffer(data[:SHARD_HEADER_BYTES].ljust(SHARD_HEADER_BYTES, b"\0"), dtype="<i4")
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(
            f"shard {path} is no token shard of version {SHARD_VERSION}: make one by `tokenize`"
        )
    if len(data) != SHARD_HEADER_BYTES + 2 * int(header[2]) or not header[2]:
        raise UserError(
            f"shard {path} is truncated or padded ({header[2]:,} tokens); download it again"
        )
    tokens = np.frombuffer(data, dtype="<u2", offset=SHARD_HEADER_BYTES)
    if tokens.max() >= vocab_size:
        raise UserError(f"shard {path} has token id {tokens.max()}, beyond VOCAB_SIZE={vocab_size}")
    return tokens


def shard_bytes(tokens):
    """A shard file's contents for uint16 tokens: the inverse of read_shard."""
    header = struct.pack("<iii", SHARD_MAGIC, SHARD_VERSION, len(tokens)).ljust(
        SHARD_HEADER_BYTES, b"\0"
    )
    return header + np.asarray(tokens, dtype="<u2").tobytes()


def list_shards(cfg, split):
    """Sorted shard files of `split` ('train' or 'val'); a file wins over its .zst twin."""
    files = sorted(map(str, Path(cfg.data_path).glob(f"fineweb_{split}_*.bin*")))
    files = [
        f for f in files if f.endswith(".bin") or (f.endswith(".bin.zst") and f[:-4] not in files)
    ]
    if not files:
        raise UserError(
            f"DATA_PATH: no fineweb_{split}_*.bin or .bin.zst in {cfg.data_path}: get FineWeb's "
            "(see README), make some with `tokenize`, or run PRESET=demo, which needs none"
        )
    return files


def load_validation(cfg):
    """The validation stream, int64 (n + 1,): all shards in order, cut after VAL_TOKENS predictions."""
    shards = [read_shard(path, cfg.vocab_size) for path in list_shards(cfg, "val")]
    tokens = np.concatenate(shards)[: cfg.val_tokens + 1 if cfg.val_tokens else None].astype(
        np.int64
    )
    if len(tokens) <= cfg.eval_seq_len:
        raise UserError(
            f"the validation stream has {len(tokens):,} tokens, less than a window and a target: "
            f"raise VAL_TOKENS, lower EVAL_SEQ_LEN={cfg.eval_seq_len} or add text"
        )
    return tokens


def load_held_out(cfg):
    """The end of the last shard, never trained on, for the mixer's calibration, uint16 (n + 1,), or empty."""
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
    """The training shards, less what is held out, as one endless stream, read in order by all ranks alike."""

    def __init__(self, cfg):
        self.files, self.vocab_size = list_shards(cfg, "train"), cfg.vocab_size
        self.held_out = len(load_held_out(cfg))
        self.tokens, self.opened = np.zeros(0, dtype=np.uint16), 0
        self.take(0)  # a bad first shard is found out before long work

    def take(self, count):
        """The next count + 1 tokens, int64. The stream moves on by count, so neighbours share one token."""
        while len(self.tokens) <= count:
            path = self.files[self.opened % len(self.files)]
            shard = read_shard(path, self.vocab_size)
            shard = shard[: -self.held_out] if self.held_out and path == self.files[-1] else shard
            self.tokens, self.opened = np.concatenate([self.tokens, shard]), self.opened + 1
        taken, self.tokens = self.tokens[: count + 1], self.tokens[count:]
        return taken.astype(np.int64)


def micro_batch_sequences(cfg, world):
    """Sequences in a micro-batch; UsageError when the ranks cannot share a step evenly."""
    sequences, most = (
        cfg.train_batch_tokens // cfg.train_seq_len,
        cfg.micro_batch_tokens // cfg.train_seq_len,
    )
    if sequences % world:
        raise UsageError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: {sequences} sequences do not split "
            f"over {world} ranks; change it or --nproc_per_node"
        )
    share = sequences // world
    return max(size for size in range(1, share + 1) if share % size == 0 and size <= most)


def micro_batches(tokens, cfg, rt):
    """Rank r's share of a step, the r-th run of its sequences: equal (x, y), int64 (B, T) on the device."""
    x, y = (t.reshape(-1, cfg.train_seq_len) for t in (tokens[:-1], tokens[1:]))
    mine, size = (
        np.split(np.arange(len(x)), rt.world)[rt.rank],
        micro_batch_sequences(cfg, rt.world),
    )
    return list(zip(*(torch.from_numpy(t[mine]).to(rt.device).split(size) for t in (x, y))))


# ---- Model -------------------------------------------------------------------------------------------------
# An 11-layer GQA transformer with a U-Net of skips, 26,993,766 parameters by default. XSA takes out of a
# head's output what the position's own value already says; VRL and value embeddings hand early information to
# late values; BigramHash and SmearGate give the first layer the previous token for nothing. One forward path
# serves training, scoring and TTT. With `past` it computes only the newest rows of a window over cached keys
# and values, which is what lets a decoder afford the scorer's own shapes.
EMBED_CONTEXT = (
    2  # rows before the first one that its embedding depends on: smear looks 1 back, its bigram 2
)
TABLES = ("embed.tokens", "embed.bigrams", "ve_table")


def attention(q, k, v):
    """Causal attention whose last query row sees every key. q (B, T, H, d); k, v (B, T', G, d), T' >= T."""
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    rows, keys, seen = q.size(2), k.size(2), None
    if 1 < rows < keys:
        k, v = (
            z.repeat_interleave(q.size(1) // z.size(1), 1) for z in (k, v)
        )  # fused GQA takes no mask
        seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    y = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=rows == keys, enable_gqa=seen is None
    )
    return y.transpose(1, 2)


def rms_norm(x):
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def linear(x, weight):
    """x @ weight.T in x's dtype: weights are kept in fp32 and cast where they are used."""
    return F.linear(x, weight.to(x.dtype))


def exclude_self(y, v):
    """Exclusive self-attention (XSA): y (B, T, H, d) less its projection on the own value v (B, T, G, d)."""
    B, T, H, d = y.shape
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    y = y.view(B, T, v.size(2), -1, d)
    return (y - (y * direction).sum(-1, keepdim=True) * direction).view(B, T, H, d)


def rotary_turns(dims, train_seq_len, max_len):
    """Cosines and sines of the rotary embedding, (2, max_len, dims / 2), NTK-scaled beyond 1,024 rows."""
    base = 10_000.0 * max(1.0, train_seq_len / 1024) ** (dims / (dims - 2))
    angle = torch.arange(max_len).double()[:, None] * base ** (
        -torch.arange(0, dims, 2).double() / dims
    )
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x, turns):
    """Turn the leading dims of x (B, T, heads, d) by `turns` (2, T, dims / 2)."""
    cos, sin = turns[:, :, None].to(x.dtype)
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


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
        """Row of the bigram table for each position; the last row at position 0."""
        last = self.bigrams.size(0) - 1
        hashed = torch.bitwise_xor(36313 * tokens[:, 1:], 27191 * tokens[:, :-1]) % last
        return F.pad(hashed, (1, 0), value=last)

    def forward(self, tokens, dtype):
        """tokens (B, T) -> (B, T, D); the row before the first counts as zeros."""
        bigram = linear(
            F.embedding(self.bigram_rows(tokens), self.bigrams).to(dtype), self.bigram_proj
        )
        x = rms_norm(
            F.embedding(tokens, self.tokens).to(dtype) + self.bigram_scale.to(dtype) * bigram
        )
        gate = torch.sigmoid(self.smear).to(dtype)
        return (1 - gate) * x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))


class Block(nn.Module):
    """One transformer layer: attention and MLP on normed, depth-scaled inputs."""

    def __init__(self, cfg, layer):
        super().__init__()
        D, hidden, self.head_dim = (
            cfg.model_dim,
            cfg.mlp_mult * cfg.model_dim,
            cfg.model_dim // cfg.num_heads,
        )
        self.norm_scale, self.xsa = (
            1 / math.sqrt(layer + 1),
            layer >= cfg.num_layers - cfg.xsa_last_n,
        )
        kv = cfg.num_kv_heads * self.head_dim
        for name, rows, columns in (
            ("q", D, D),
            ("k", kv, D),
            ("v", kv, D),
            ("attn_out", D, D),
            ("mlp_in", hidden, D),
            ("mlp_out", D, hidden),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(rows, columns)))
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        for name, value in (
            ("mix_x", 1.0),
            ("mix_x0", 0.0),
            ("attn_scale", 1.0),
            ("mlp_scale", 1.0),
        ):
            self.register_parameter(name, nn.Parameter(torch.full((D,), value)))

    def forward(self, x, x0, extra_v, turns, past):
        """x, x0 (B, T, D), the rows' turns, extra_v added to the values, past (k, v) of rows before or None.
        Returns (output, this layer's own value projection, (k, v) of all rows so far)."""
        B, T, _ = x.shape
        x = self.mix_x.to(x.dtype) * x + self.mix_x0.to(x.dtype) * x0
        h = rms_norm(x) * self.norm_scale
        q, k, own_v = (linear(h, w).view(B, T, -1, self.head_dim) for w in (self.q, self.k, self.v))
        q = rotate(rms_norm(q), turns) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), turns)
        v = own_v + extra_v
        present = (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)) if past else (k, v)
        y = attention(q, *present)
        if self.xsa:
            y = exclude_self(y, v)
        x = x + self.attn_scale.to(x.dtype) * linear(y.reshape(B, T, -1), self.attn_out)
        h = F.leaky_relu(linear(rms_norm(x) * self.norm_scale, self.mlp_in), 0.5).square()
        return x + self.mlp_scale.to(x.dtype) * linear(h, self.mlp_out), own_v, present


class GPT(nn.Module):
    """The model: forward(tokens, past) -> (fp32 logits, keys and values of every layer)."""

    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.dtype, self.softcap = dtype, cfg.logit_softcap
        self.kv_heads, self.vrl_enabled = cfg.num_kv_heads, cfg.vrl_enabled
        layers, kv = cfg.num_layers, cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)
        self.embed = Embedding(cfg)
        turns = rotary_turns(
            cfg.rope_dims, cfg.train_seq_len, max(cfg.train_seq_len, cfg.eval_seq_len)
        )
        self.register_buffer("turns", turns, persistent=False)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(layers))
        self.skip_weights = nn.Parameter(torch.ones(layers // 2, cfg.model_dim))
        self.ve_layers = sorted({int(i) for i in cfg.ve_layers.split(",") if i.strip()})
        if self.ve_layers:
            self.ve_table = nn.Parameter(torch.randn(cfg.vocab_size, cfg.bigram_dim) * 0.01)
            self.ve_proj = nn.Parameter(torch.empty(kv, cfg.bigram_dim))
            self.ve_scale = nn.Parameter(torch.tensor(0.1))
            self.ve_layer_scales = nn.Parameter(torch.ones(len(self.ve_layers)))
        if self.vrl_enabled:
            self.vrl_scales = nn.Parameter(torch.zeros(layers - 1))
        self.register_buffer(
            "mixer", torch.zeros(MIXER_HIDDEN, MIXER_FEATURES + 1)
        )  # its weights come along
        self.mixer[:, :-1].normal_(
            std=MIXER_FEATURES**-0.5, generator=torch.Generator().manual_seed(0)
        )
        for name, p in self.named_parameters():
            if name.endswith(("attn_out", "mlp_out")):
                nn.init.zeros_(p)  # a new block is the identity
            elif p.ndim == 2 and name.endswith(("_proj", ".q", ".k", ".v", "mlp_in")):
                nn.init.orthogonal_(p)

    def forward(self, tokens, past=None):
        """tokens (B, T) int64 -> (logits (B, T, V) fp32, [(k, v)] per layer). With `past`, the first K rows'
        keys and values, `tokens` begins EMBED_CONTEXT tokens before row K, and logits come from row K on."""
        x = self.embed(tokens, self.dtype)
        if past:
            x, tokens = x[:, EMBED_CONTEXT:], tokens[:, EMBED_CONTEXT:]
        x0, v0, skips, present, half = x, None, [], [], len(self.blocks) // 2
        turns = self.turns[:, (past[0][0].size(1) if past else 0) :][:, : x.size(1)]
        for i, block in enumerate(self.blocks):
            if half <= i < 2 * half:
                x = x + self.skip_weights[i - half].to(x.dtype) * skips.pop()
            extra_v = 0
            if i in self.ve_layers:
                scale = (self.ve_scale * self.ve_layer_scales[self.ve_layers.index(i)]).to(x.dtype)
                ve = linear(F.embedding(tokens, self.ve_table).to(x.dtype), self.ve_proj)
                extra_v = scale * ve.unflatten(-1, (self.kv_heads, -1))
            if self.vrl_enabled and i:
                extra_v = extra_v + self.vrl_scales[i - 1].to(x.dtype) * v0
            x, own_v, kv = block(x, x0, extra_v, turns, past[i] if past else None)
            v0 = own_v if i == 0 else v0
            present.append(kv)
            if i < half:
                skips.append(x)
        z = linear(rms_norm(x), self.embed.tokens).float()
        return self.softcap * torch.tanh(z / self.softcap), present

    def parameter_groups(self):
        """(block matrices and projections, embedding tables, all else), each {name: parameter}."""
        named = dict(self.named_parameters())
        matrices = {
            n: p
            for n, p in named.items()
            if p.ndim == 2 and n.startswith("blocks.") or "_proj" in n
        }
        tables = {n: p for n, p in named.items() if n in TABLES}
        return (
            matrices,
            tables,
            {n: p for n, p in named.items() if n not in matrices and n not in tables},
        )


def new_model(cfg, rt, weights=None):
    """A model on the runtime's device: with an artifact's weights, or the seed's, the same on every rank."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, rt.dtype)
    if weights:
        model.load_state_dict(weights)
    return model.to(rt.device)


# ---- Complementary objective -------------------------------------------------------------------------------
# What bigram statistics predict the mixer will predict too, so the model is to care less for it: weight 1 -
# alpha * p(token | previous), never below 0.1 (openai/parameter-golf PR 1033), from counts before the step.
class BigramCounts:
    """Exact counts of (previous, next) over the training stream so far, the same on every rank."""

    def __init__(self, vocab_size, rt):
        self.rt, self.vocab_size = rt, vocab_size
        self.counts = torch.zeros(vocab_size * vocab_size, dtype=torch.int32, device=rt.device)
        self.totals = torch.zeros(vocab_size, dtype=torch.int64, device=rt.device)

    def weights(self, x, y, alpha):
        """max(0.1, 1 - alpha * count(x, y) / (total(x) + 1)) for each position of x, y (B, T); fp32."""
        p = self.counts[x * self.vocab_size + y].double() / (self.totals[x] + 1)
        return (1 - alpha * p).clamp(min=0.1).float()

    def add(self, batches):
        """Count this step's pairs, over all ranks. Call it after the step has used weights()."""
        pairs = torch.cat([(x * self.vocab_size + y).flatten() for x, y in batches])
        self.counts += self.rt.sum_over_ranks(
            torch.bincount(pairs, minlength=len(self.counts)).int()
        )
        self.totals = self.counts.view(self.vocab_size, self.vocab_size).sum(1)


# ---- Optimizers, schedules, averaging ----------------------------------------------------------------------
# torch's own: Muon orthogonalizes the momentum of each matrix (Jordan et al., 2024), AdamW with fp32 state
# takes tables and vectors. Schedules are pure functions of step and clock.
def new_optimizers(model, cfg):
    """[Muon for matrices, AdamW for tables and vectors]; a step sets a group's rate from its `peak_lr`."""
    matrices, tables, vectors = (list(group.values()) for group in model.parameter_groups())
    groups = [
        dict(params=params, peak_lr=rate)
        for params, rate in (
            (matrices, cfg.matrix_lr),
            (tables, cfg.tied_embed_lr),
            (vectors, cfg.scalar_lr),
        )
    ]
    return [
        torch.optim.Muon(groups[:1], weight_decay=cfg.muon_wd, momentum=cfg.muon_momentum),
        torch.optim.AdamW(
            groups[1:],
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=cfg.adam_wd,
            fused=next(model.parameters()).is_cuda,
        ),
    ]


def lr_scale(step, elapsed_s, cfg):
    """Learning-rate factor: 1, then linear to 0 over the last WARMDOWN_ITERS of iterations or time."""
    left = cfg.iterations - step
    if cfg.max_wallclock_seconds and step:
        left = min(left, (cfg.max_wallclock_seconds - elapsed_s) / (elapsed_s / step))
    return min(1.0, max(0.0, left / max(cfg.warmdown_iters, 1)))


def muon_momentum(step, cfg):
    """Momentum of Muon: linear from 0.92 (or MUON_MOMENTUM, if less) to MUON_MOMENTUM."""
    start = min(0.92, cfg.muon_momentum)
    return start + (cfg.muon_momentum - start) * min(1.0, step / cfg.muon_momentum_warmup_steps)


class WeightAverage:
    """What replaces the weights at the end: SWA of warmdown snapshots if it is on, else EMA, else nothing."""

    def __init__(self, model, cfg):
        self.cfg, self.params, self.snapshots = cfg, list(model.parameters()), 0
        self.mean = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def after_step(self, step, scale):
        """Take the weights in after optimizer step `step` (from 1) at learning-rate scale `scale`."""
        if not self.cfg.swa_enabled:
            torch._foreach_lerp_(
                self.mean, self.params, 1 - min(self.cfg.ema_decay, step / (step + 10))
            )
        elif scale < 0.2 and step % self.cfg.swa_every == 0:
            self.snapshots += 1
            torch._foreach_lerp_(self.mean, self.params, 1 / self.snapshots)

    @torch.no_grad()
    def install(self):
        """Replace the weights by their average, if there is one."""
        if self.snapshots or (self.cfg.ema_decay and not self.cfg.swa_enabled):
            torch._foreach_copy_(self.params, self.mean)


# ---- Training loop -----------------------------------------------------------------------------------------
# A step: micro-batches forward and backward, gradients averaged over ranks in one flat buffer, a check that
# loss and gradient are finite *before* any weight moves, clip, two optimizers, average. Rank 0's clock stops
# all ranks at one step. Kernels are compiled on random tokens before it starts, then all is put back.
class TrainingStopped(UserError):
    """Training ended early; the last good weights are in the model."""


class Trainer:
    """The state of a training run and one step of it."""

    def __init__(self, model, cfg, rt):
        self.model, self.cfg, self.rt = model, cfg, rt
        self.loss = rt.compiled(self._loss)
        self.optimizers = new_optimizers(model, cfg)
        self.average = WeightAverage(model, cfg)
        self.bigrams = BigramCounts(cfg.vocab_size, rt) if cfg.complement_alpha else None
        self.coarseness = None  # of late QAT, once it has begun

    def _loss(self, x, y, weights):
        """(weighted, plain) mean loss of a micro-batch, nats a token; `weights` like y, or None for ones."""
        nats = F.cross_entropy(self.model(x)[0].flatten(0, 1), y.flatten(), reduction="none")
        plain = nats.mean()
        return plain if weights is None else (weights.flatten() * nats).mean(), plain.detach()

    def gradients(self, batches):
        """Fill .grad with the weighted loss's gradient, mean over all ranks; returns (weighted, plain)."""
        totals = torch.zeros(2, device=self.rt.device)
        with quantized_weights(self.model, self.coarseness):
            for x, y in batches:
                weights = (
                    self.bigrams.weights(x, y, self.cfg.complement_alpha) if self.bigrams else None
                )
                weighted, plain = self.loss(x, y, weights)
                (weighted / len(batches) / self.rt.world).backward()
                totals += torch.stack([weighted.detach(), plain]) / len(batches) / self.rt.world
        grads = [p.grad for p in self.model.parameters()]
        flat = self.rt.sum_over_ranks(torch.cat([*(g.flatten() for g in grads), totals]))
        nn.utils.vector_to_parameters(flat[:-2], grads)  # each .grad becomes a view of its piece
        return flat[-2:].tolist()

    def step(self, batches, step, scale):
        """One optimizer step; returns (weighted, plain) loss. TrainingStopped if anything is not finite."""
        losses = self.gradients(batches)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if not all(map(math.isfinite, [*losses, norm.item()])):
            raise TrainingStopped(
                f"step {step + 1}: loss {losses[1]}, gradient norm {norm.item()}; "
                "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR"
            )
        if self.cfg.grad_clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.grad_clip_norm, norm)
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

    def warm_up(self):
        """Compile every kernel of a step on random tokens, then restore the weights and forget the rest."""
        cfg, loss, weights = self.cfg, self.loss, copy.deepcopy(self.model.state_dict())
        for step in range(cfg.warmup_steps):
            tokens = np.random.default_rng(step).integers(
                0, cfg.vocab_size, cfg.train_batch_tokens + 1
            )
            self.step(micro_batches(tokens, cfg, self.rt), step, scale=0.1)
        self.model.load_state_dict(weights)
        self.__init__(self.model, cfg, self.rt)
        self.loss = loss


def train(model, cfg, rt, log, budget):
    """Train `model` in place; late QAT quantizes to `budget` bytes. Returns steps, tokens, seconds. NaN,
    infinity and Ctrl-C raise TrainingStopped, with the last good weights, averaged, in the model."""
    stream, trainer, began = TrainStream(cfg), Trainer(model, cfg, rt), time.perf_counter()
    result = types.SimpleNamespace(
        steps=0, tokens=0, seconds=0.0, warmup_seconds=0.0, calibration_seconds=0.0
    )
    if stream.held_out:  # what time it needs is not training's
        cfg = dataclasses.replace(cfg, max_wallclock_seconds=0.97 * cfg.max_wallclock_seconds)
    if cfg.warmup_steps:
        trainer.warm_up()
        result.warmup_seconds = rt.clock() - began
        log(
            f"warm-up: {cfg.warmup_steps} steps on random tokens, {result.warmup_seconds:.1f} s, not timed"
        )
    start = time.perf_counter()
    try:
        while result.steps < cfg.iterations:
            scale = lr_scale(result.steps, result.seconds, cfg)
            if cfg.qat_enabled and trainer.coarseness is None and scale < cfg.late_qat_threshold:
                trainer.coarseness = estimate_coarseness(model, budget)
                log(
                    f"late QAT from step {result.steps + 1} on at coarseness {trainer.coarseness:.3f}"
                )
            batches = micro_batches(stream.take(cfg.train_batch_tokens), cfg, rt)
            losses = trainer.step(batches, result.steps, scale)
            result.steps += 1
            result.tokens += cfg.train_batch_tokens
            result.seconds = rt.from_main(time.perf_counter() - start)
            limit_s, per_step_s = (
                cfg.max_wallclock_seconds or math.inf,
                result.seconds / result.steps,
            )
            if result.steps % cfg.log_every == 0 or result.steps in (1, cfg.iterations):
                eta_s = min((cfg.iterations - result.steps) * per_step_s, limit_s - result.seconds)
                log(
                    f"step {result.steps}/{cfg.iterations}  loss {losses[1]:.4f} (weighted {losses[0]:.4f})  "
                    f"lr x{scale:.3f}  {result.tokens / result.seconds:,.0f} tokens/s  "
                    f"{result.seconds:.0f} s  ETA {max(eta_s, 0):.0f} s"
                )
            if result.seconds + per_step_s > limit_s:
                break
    except (
        KeyboardInterrupt,
        UserError,
    ) as error:  # Ctrl-C, no finite loss, a shard that cannot be read
        raise TrainingStopped(str(error) or f"interrupted at step {result.steps}") from None
    finally:
        trainer.average.install()
    if epochs := (stream.opened - 1) // len(stream.files):
        log(f"note: the training shards were read {epochs} time(s) over; more shards would help")
    return result


# ---- Quantization ------------------------------------------------------------------------------------------
# Block matrices become int6 (-31..31) with one fp16 scale a row, embedding tables int8, the rest fp16. One
# number governs the size, `coarseness`: a row's top level stands at coarseness times its root mean square.
# Doubling it costs each weight one bit of precision and saves about one bit of entropy, which LZMA finds; it
# is raised until code + artifact just fit the cap. Late QAT trains through these very functions.
INT6_MAX, INT8_MAX = 31, 127
FINEST, COARSEST = (
    4.0,
    64.0,
)  # below 4 a Gaussian row loses more to clipping than it gains in precision


def quantize(w, limit, row_max):
    """w (rows, cols), row_max (rows,) the top level's value -> (int8 levels in +-limit, fp16 row scales)."""
    scale = (row_max / limit).clamp(2.0**-24, 65_504.0).half()
    return (w / scale.float()[:, None]).round().clamp(-limit, limit).to(torch.int8), scale


def encode_tensor(name, w, coarseness):
    """(kind, [tensors to store]) of one parameter: 'int6', 'int8' or 'fp16'."""
    w = w.detach().float()
    if w.ndim == 2 and name.startswith("blocks."):
        return "int6", quantize(w, INT6_MAX, coarseness * w.square().mean(1).sqrt())
    if name in TABLES:
        return "int8", quantize(w, INT8_MAX, w.abs().amax(1))
    return "fp16", (w.half(),)


def decode_tensor(kind, stored):
    """fp32 parameter from what encode_tensor stored: fp16 values, or int8 levels and fp16 row scales."""
    return stored[0].float() if kind == "fp16" else stored[0].float() * stored[1].float()[:, None]


@contextlib.contextmanager
def quantized_weights(model, coarseness):
    """Inside, the model has the artifact's weights (None: its own): QAT's straight-through estimator."""
    params = {} if coarseness is None else dict(model.named_parameters())
    exact = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        p.data.copy_(decode_tensor(*encode_tensor(name, p, coarseness)))
    try:
        yield
    finally:
        for name, p in params.items():
            p.data.copy_(exact[name])


def estimate_coarseness(model, budget_bytes):
    """The coarseness that gives budget_bytes if rows are Gaussian: log2(4.133 * 31 / it) bits, LZMA + 3 %."""
    sizes = {"int6": 0, "int8": 0, "fp16": 0}
    for name, w in model.state_dict().items():
        sizes[encode_tensor(name, w, FINEST)[0]] += w.numel()
    bits = (8 * budget_bytes / 1.03 - 7 * sizes["int8"] - 15 * sizes["fp16"]) / max(
        sizes["int6"], 1
    )
    return min(max(4.133 * INT6_MAX / 2 ** min(max(bits, 0), 30), FINEST), COARSEST)


# ---- Artifact ----------------------------------------------------------------------------------------------
#   8 bytes  magic "PGOLFART"        body, LZMA2 raw stream (lc=0, lp=0, pb=0, preset 9e) of
#   4 bytes  format version            4 bytes  length of the header
#   8 bytes  length of the body        JSON     settings, tokenizer, [name, kind, shape] of each tensor
#  32 bytes  SHA-256 of the body       tensors  in that order: levels int8 then scales fp16, or values fp16
# Little-endian. Reading executes nothing. One level a byte: packed to 6 bits they would hide from LZMA.
ARTIFACT_MAGIC, ARTIFACT_VERSION, ARTIFACT_HEAD = b"PGOLFART", 1, struct.Struct("<8sIQ32s")
LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
]


def pack_artifact(model, cfg, table, coarseness):
    """The artifact's bytes. The same weights and settings give the same bytes."""
    index, payload, values = [], [], model.state_dict()
    kinds = {n: encode_tensor(n, v, coarseness) for n, v in values.items()}
    for name, (kind, stored) in sorted(kinds.items(), key=lambda item: (item[1][0], item[0])):
        if not all(bool(t.isfinite().all()) for t in (values[name], *stored)):
            raise UserError(f"parameter {name} is not finite or beyond fp16; nothing was written")
        index.append([name, kind, list(values[name].shape)])
        payload += [t.contiguous().cpu().numpy().tobytes() for t in stored]
    settings = {
        n: getattr(cfg, n) for n, group in GROUPS.items() if group != "run" or n == "preset"
    }
    tokenizer = {"sha256": table.digest, **dataclasses.asdict(table)}
    header = json.dumps(
        {"settings": settings, "tensors": index, "tokenizer": tokenizer}, sort_keys=True
    )
    raw = struct.pack("<I", len(header)) + header.encode() + b"".join(payload)
    body = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    digest = hashlib.sha256(body).digest()
    return ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(body), digest) + body


def read_artifact(path):
    """(settings, TokenTable, {name: fp32 tensor}) of an artifact file; UserError if it is none or damaged."""
    data = read_file(path, "ARTIFACT_PATH: ", "; train first")
    head, body = (
        data[: ARTIFACT_HEAD.size].ljust(ARTIFACT_HEAD.size, b"\0"),
        data[ARTIFACT_HEAD.size :],
    )
    magic, version, length, digest = ARTIFACT_HEAD.unpack(head)
    for fault, why in (
        (magic != ARTIFACT_MAGIC, "is not an artifact of this program"),
        (version != ARTIFACT_VERSION, f"has format version {version}, not {ARTIFACT_VERSION}"),
        (
            len(body) != length,
            f"is cut or padded: {len(body):,} bytes of {length:,}; copy it again",
        ),
        (
            hashlib.sha256(body).digest() != digest,
            "is corrupt: its checksum differs; copy it again",
        ),
    ):
        if fault:
            raise UserError(f"artifact {path} {why}")
    raw = lzma.decompress(body, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    header_end = 4 + struct.unpack_from("<I", raw)[0]
    header = json.loads(raw[4:header_end])
    reader, weights = io.BytesIO(raw[header_end:]), {}

    def take(dtype, shape):
        values = np.frombuffer(
            reader.read(math.prod(shape) * np.dtype(dtype).itemsize), dtype=dtype
        )
        return torch.from_numpy(values.reshape(shape).copy())

    for name, kind, shape in header["tensors"]:
        stored = (
            (take("<f2", shape),) if kind == "fp16" else (take("i1", shape), take("<f2", shape[:1]))
        )
        weights[name] = decode_tensor(kind, stored)
    t = header["tokenizer"]
    return header["settings"], TokenTable(tuple(t["pieces"]), t["kinds"], t["bos_id"]), weights


def code_bytes():
    """Bytes of this script, which count against the cap."""
    return len(Path(__file__).read_bytes())


def fit_artifact(model, cfg, table, log):
    """(artifact bytes, coarseness): the finest found that fits the cap, else the last tried, by a secant."""
    budget = cfg.size_limit_bytes - code_bytes()
    slope_bytes = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) / 8
    coarseness, best = estimate_coarseness(model, budget), (b"", FINEST)
    for _ in range(6):
        data = pack_artifact(model, cfg, table, coarseness)
        log(f"quantize: coarseness {coarseness:.4f} gives {len(data):,} of {budget:,} bytes")
        fits = len(data) <= budget
        best = (data, coarseness) if fits and len(data) > len(best[0]) else best
        if coarseness == COARSEST or fits and (coarseness == FINEST or len(data) >= 0.998 * budget):
            break
        shift = 2 ** ((len(data) - 0.999 * budget) / slope_bytes)
        coarseness = min(max(coarseness * shift, FINEST), COARSEST)
    return best if best[0] else (data, coarseness)


# ---- N-gram history ----------------------------------------------------------------------------------------
# Where the stream has been before. For each kind of context (the last 8, 5, 3, 2 tokens, the last one, the
# word so far) there are hash chains, as in LZ77: prev[i] is the last earlier position whose context has the
# same hash. Walking from t - 1 yields what is before t and nothing later, so a whole block may be linked
# before its first position is predicted; contexts are compared, so what is found is real. How the stream was
# cut into blocks changes nothing. Bytes: 28 a token, with a quarter to spare, and 24 a hash value.
CONTEXT_LENGTHS, CONTEXTS = (
    (8, 5, 3, 2, 1, 8),
    6,
)  # in tokens; the last is the word's, up to its beginning


class NgramHistory:
    """The stream so far. `word_begins`, bool (V,): tokens that begin a word or part words; C: CONTEXTS. Where
    `lanes` texts run side by side, the token before position t is at t - lanes."""

    def __init__(self, cfg, word_begins, device, lanes=1):
        self.recent, self.size, self.device, self.lanes = cfg.ngram_recent, 0, device, lanes
        self.word_begins = torch.as_tensor(word_begins, device=device)
        self.lengths = torch.tensor(CONTEXT_LENGTHS, device=device).clamp(max=cfg.ngram_order - 1)
        self.tokens = torch.zeros(0, dtype=torch.int32, device=device)
        self.prev = torch.zeros(CONTEXTS, 0, dtype=torch.int32, device=device)
        self.heads = torch.full(
            (CONTEXTS, 1 << cfg.ngram_hash_bits), -1, dtype=torch.int32, device=device
        )

    def contexts(self, ends):
        """Tokens of the contexts that end at `ends` (C, n): int32 (C, n, 8), newest first, -1 beyond them."""
        back = torch.arange(max(CONTEXT_LENGTHS), device=self.device)
        where = ends[..., None] - back * self.lanes
        tokens = self.tokens[where.clamp(min=0)]
        inside = (back < self.lengths[:, None, None]) & (where >= 0)
        begins = self.word_begins[tokens[-1]].int()
        inside[-1] &= begins.cumsum(-1) - begins == 0
        return torch.where(inside, tokens, -1)

    def hashes(self, ends):
        """The slot in `heads` of each context that ends at `ends` (C, n)."""
        h = torch.zeros_like(ends)
        for tokens in self.contexts(ends).long().unbind(-1):
            h = (h ^ tokens) * -7046029254386353131  # odd: 0x9E3779B97F4A7C15 as int64
            h = h ^ ((h >> 29) & 0x7FFFFFFFF)
        return h & (self.heads.size(1) - 1)

    def extend(self, prefix):
        """Link the tokens of `prefix` (the stream from its start, int64) that are not in the history yet."""
        first, self.size = self.size, max(self.size, len(prefix))
        if first == self.size:
            return
        if self.size > len(self.tokens):
            room = self.size + self.size // 4 + 1024 - len(self.tokens)
            self.tokens, self.prev = F.pad(self.tokens, (0, room)), F.pad(self.prev, (0, room))
        self.tokens[first : self.size] = prefix[first:].to(self.device)
        ends = torch.arange(first, self.size, device=self.device).expand(CONTEXTS, -1)
        slot, order = torch.sort(self.hashes(ends), stable=True)
        ends, border = ends.gather(1, order), slot[:, 1:] != slot[:, :-1]
        older = torch.where(
            F.pad(border, (1, 0), value=True),
            self.heads.gather(1, slot),
            F.pad(ends[:, :-1], (1, 0)).int(),
        )
        self.prev.scatter_(1, ends, older)
        kind, newest = F.pad(border, (0, 1), value=True).nonzero(as_tuple=True)
        self.heads[kind, slot[kind, newest]] = ends[kind, newest].int()

    def occurrences(self, at):
        """Where contexts that end at `at` (R,) ended before, with a known successor: int64 (R, C, M), of the
        last M = NGRAM_RECENT of the chain, newest first, the real ones; else -1."""
        found, known, at = [], at - at % self.lanes, at.expand(CONTEXTS, -1)
        contexts = self.contexts(at)
        for _ in range(self.recent):
            at = torch.where(at >= 0, self.prev.gather(1, at.clamp(min=0)).long(), -1)
            found.append(
                torch.where((self.contexts(at) == contexts).all(-1) & (at < known), at, -1)
            )
        return torch.stack(found, -1).transpose(0, 1)


# ---- Mixers and commitment ---------------------------------------------------------------------------------
# A probability becomes an integer before anybody looks at the token: freq >= 1, summing to 2^24 over the
# vocabulary, so that "normalized" is an equality and a range coder can use the numbers that were scored.
# The learned mixer re-weights the model's distribution p in the log domain. The tokens that followed a
# position's contexts before are its candidates; a network of one hidden layer turns what speaks for each into
# a boost b, and q = softmax(log p + b): p, where nothing speaks. The gradient of -log q[x] in b[v] is
# q[v] - [v = x]: learning is two small products, once a block is scored; gradients add up as integers.
TOTAL_BITS, TOTAL = 24, 1 << 24
MIXER_HIDDEN, MIXER_FEATURES = 32, 4 * CONTEXTS + 3


def commit(p):
    """Probabilities (R, V), float64 -> frequencies int32 (R, V), each >= 1, each row summing to exactly 2^24.
    Every token gets 1 plus the floor of its share of the rest; the likeliest, what the floors leave."""
    V = p.size(-1)
    freqs = (p / p.sum(-1, keepdim=True) * (TOTAL - V)).floor().long() + 1
    freqs.scatter_add_(1, p.argmax(-1, keepdim=True), TOTAL - freqs.sum(-1, keepdim=True))
    return freqs.int()


def mix_entropy(p, ends, following, cfg):
    """(1 - alpha) p + alpha counts / total, alpha = base + range * sigmoid(2 (H - center)): PR 1033's rule on
    all tokens. p (R, V), H its entropy, counts of the longest context (no word's) seen MIN_COUNT times."""
    enough = (ends[:, :-1] >= 0).sum(2) >= cfg.min_count
    longest = enough.int().argmax(1)[:, None, None].expand(-1, 1, ends.size(2))
    tokens, real = following.gather(1, longest)[:, 0], (ends.gather(1, longest)[:, 0] >= 0).double()
    counts = torch.zeros_like(p).scatter_add_(1, tokens, real)
    entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    alpha = cfg.alpha_base + cfg.alpha_range * torch.sigmoid(2 * (entropy - cfg.alpha_center))
    alpha = alpha * enough.any(1, keepdim=True)
    return (1 - alpha) * p + alpha * counts / real.sum(1, keepdim=True).clamp(min=1)


def gather_evidence(p, ends, following, at, window, lanes=1):
    """What speaks for each candidate of R positions, whose contexts end at `at` (R,) and whose models see the
    lane from `window` (R,) on. p (R, V) float64; ends, following (R, C, M): occurrences, tokens after them.
    Returns tokens (R, J), J = C * M, distinct (R, J): each one's first slot, features (R, F, J) fp32: of each
    context log odds of the share, inverse rank and log distance of the last occurrence, if the model sees it;
    of the model log p's distance to the top, the top; and 1. Shapes are fixed, for equal rounding."""
    tokens, real = following.flatten(1), ends >= 0
    same = (
        (following[..., None] == tokens[:, None, None]) & real[..., None]
    ).byte()  # (R, C, M, J)
    count, total, rank = same.sum(2), real.sum(2)[..., None], same.argmax(2)
    distinct = same.flatten(1, 2).argmax(1) == torch.arange(tokens.size(1), device=tokens.device)
    seen, last = count > 0, ends.gather(2, rank)
    distance = at[:, None, None] - last
    context = [
        ((count + 0.4) / (total - count + 0.4)).log() * (total > 0),
        seen / (1 + rank),
        seen * (distance / lanes).clamp(min=1).log2() / 8,
        seen & (last >= window[:, None, None]) & (distance % lanes == 0),
    ]
    logp = p.log().float()
    top, mine = logp.amax(1, keepdim=True), logp.gather(1, tokens)
    model = [(top - mine) / 4, top.expand_as(mine) / 2, torch.ones_like(mine)]
    features = torch.cat([*(f.float() for f in context), torch.stack(model, 1)], 1)
    return tokens, distinct & real.flatten(1), features


class LearnedMixer:
    """The scorer network, its Adam state, and the evidence of the block that waits for update. `weights`
    (H, F + 1): hidden layer, output in the last column. Calibration's rate falls from 10 MIXER_LR to 1."""

    def __init__(self, weights, cfg, rt, calibration_blocks=0):
        self.cfg, self.rt, self.calibration_blocks = cfg, rt, calibration_blocks
        self.weights, self.blocks, self.waiting = weights.clone(), 0, {}
        self.optimizer = torch.optim.Adam([self.weights], betas=(0.9, 0.99))

    def mix(self, p, tokens, distinct, features):
        """q (R, V) float64: p with its candidates boosted."""
        hidden = (self.weights[:, :-1] @ features).clamp(min=0)
        boost = (self.weights[:, -1, None] * hidden).sum(1) * distinct
        return torch.softmax(p.log().scatter_add(1, tokens, boost.double()), -1)

    def gradient(self, tokens, distinct, features, q, targets):
        """d(sum over rows of -log q[target]) / d(weights), (H, F + 1) fp32; q (R, J), that of `tokens`."""
        error = (q.float() - (tokens == targets[:, None]).float()) * distinct
        hidden = (self.weights[:, :-1] @ features).clamp(min=0)
        back = error[:, None] * self.weights[:, -1, None] * (hidden > 0)
        first = torch.einsum("rhj,rfj->hf", back, features)
        return torch.cat([first, torch.einsum("rhj,rj->h", hidden, error)[:, None]], 1)

    def learn(self, tokens):
        """One Adam step on the block that waits, now that its tokens are scored; the same on every rank."""
        total = torch.zeros(self.weights.shape, dtype=torch.int64, device=self.rt.device)
        for parts in (
            self.waiting.values()
        ):  # a batch of windows each, in however many calls it was committed
            *evidence, positions = map(torch.cat, zip(*parts))
            gradient = self.gradient(*evidence, tokens[positions])
            total += (gradient.double() * FIXED_POINT_SCALE).round().long()
        mean = self.rt.sum_over_ranks(total).double() / (FIXED_POINT_SCALE * self.cfg.mixer_block)
        left = (
            max(0.0, 1 - self.blocks / self.calibration_blocks) if self.calibration_blocks else 0.0
        )
        self.optimizer.param_groups[0]["lr"] = self.cfg.mixer_lr * (1 + 9 * left)
        self.weights.grad = mean.float()
        self.optimizer.step()
        self.blocks, self.waiting = self.blocks + 1, {}


# ---- Test-time training ------------------------------------------------------------------------------------
# After a chunk has been scored the model trains on it; the Polyak average of the weights scores the next. The
# first TTT_FREEZE_BLOCKS blocks' matrices stay. Each fixed micro-batch's summed gradient is rounded to int64:
# integers add up the same on any ranks. The schedule's length is the artifact's setting, not the text's.
TTT_MICRO_BATCH_SEQUENCES, FIXED_POINT_SCALE = 2, 2.0**36


class TestTimeTrainer:
    """Adapts a copy of `model` to scored chunks; `model` itself becomes the Polyak average that scores."""

    def __init__(self, model, cfg, table, rt):
        self.cfg, self.table, self.rt, self.chunks = cfg, table, rt, 0
        self.live = copy.deepcopy(model)
        frozen = tuple(f"blocks.{i}." for i in range(cfg.ttt_freeze_blocks))
        names = [
            n
            for n, p in model.named_parameters()
            if p.ndim < 2
            or n == "embed.tokens"
            or n.startswith("blocks.")
            and not n.startswith(frozen)
        ]
        self.params = [self.live.get_parameter(n) for n in names]
        self.average = [model.get_parameter(n) for n in names]
        for n, p in self.live.named_parameters():
            p.requires_grad_(n in names)
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0, weight_decay=0.0, foreach=True)
        self.forward = rt.compiled(self.live)

    def rate(self):
        """The chunk's learning rate: cosine to 0 over the schedule, times 1 to 3 in its first 30 %."""
        done = min(1.0, self.chunks / self.cfg.ttt_schedule_chunks)
        return (
            self.cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * done)) * (1 + 2 * min(1.0, done / 0.3))
        )

    def adapt_chunk(self, tokens):
        """Train on a scored chunk, int64 (TTT_CHUNK_TOKENS + 1,): it begins with the last token before it."""
        W, lr = self.cfg.eval_seq_len, self.rate()
        self.chunks += 1
        if lr == 0:
            return
        weights = torch.from_numpy(self.table.count_bytes(tokens.numpy()))
        x, y, w = (
            t.to(self.rt.device).view(-1, W).split(TTT_MICRO_BATCH_SEQUENCES)
            for t in (tokens[:-1], tokens[1:], weights)
        )
        batches = list(zip(x, y, w))[self.rt.rank :: self.rt.world]
        for _ in range(self.cfg.ttt_epochs):
            self._step(batches, lr, total_weight=max(1, int(weights.sum())))

    def _step(self, batches, lr, total_weight):
        """One AdamW step on the byte-weighted mean loss over all ranks' batches, then the Polyak average."""
        flat = torch.zeros(
            sum(p.numel() for p in self.params), dtype=torch.int64, device=self.rt.device
        )
        for x, y, w in batches:
            nats = F.cross_entropy(self.forward(x)[0].flatten(0, 1), y.flatten(), reduction="none")
            grads = torch.autograd.grad((nats * w.flatten()).sum(), self.params)
            flat += torch.cat(
                [(g.flatten().double() * FIXED_POINT_SCALE).round().long() for g in grads]
            )
        self.rt.sum_over_ranks(flat)
        exact = (flat.double() / (FIXED_POINT_SCALE * total_weight)).float()
        for p, g in zip(self.params, exact.split([p.numel() for p in self.params])):
            p.grad = g.view_as(p)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.params, 1 - self.cfg.polyak_decay)


# ---- Predictor and scorer ----------------------------------------------------------------------------------
# Positions are numbered as in the stream; position 0 is BOS, which a decoder knows. Input row i predicts
# position i + 1. The first window scores all its W rows, each later one its last S (a tile), in two passes of
# fixed shape: the known part, then the tile over its cached keys and values. Windows go into fixed batches,
# the unknown is a dummy that no earlier row sees: the integers depend neither on ranks nor on what is known.
class OrderError(RuntimeError):
    """predict, score and update were not called in the order that makes a score honest."""


# Frequencies for positions start..stop-1, as far as this rank computes them. Each piece: the batch's index in
# the chunk, first position, last + 1, {stage: freqs int32 (R, V)}. A pass is one walk: stages, window stride.
Commitment = collections.namedtuple("Commitment", "start stop pieces")
EvalPass = collections.namedtuple("EvalPass", "stages stride")


def evaluation_passes(cfg):
    """The passes over the quantized model. Stages that come from the same neural distribution share one."""
    passes = [["round_trip"], ["sliding"], ["ttt"]][: 3 if cfg.ttt_enabled else 2]
    passes[-1] += ["mixer"] if cfg.mixer != "none" else []
    return [
        EvalPass(tuple(stages), cfg.eval_seq_len if stages[0] == "round_trip" else cfg.eval_stride)
        for stages in passes
    ]


class Predictor:
    """The one place where probabilities become commitments. predict -> score -> ... -> update, or OrderError.
    It owns `model`: with TTT its weights change. Every rank makes the same calls with the same arguments."""

    def __init__(self, model, cfg, table, rt, plan, lanes=1):
        self.model, self.cfg, self.rt, self.plan, self.lanes = model, cfg, rt, plan, lanes
        self.learned = lanes  # first position that update has not seen
        self.committed = lanes  # first position without a commitment
        self.pending = None  # the commitment that waits for its score
        self.cache = (
            None  # (known tokens of the last batch, their keys and values): what a decoder repeats
        )
        self.forward = rt.compiled(model)
        self.ttt = TestTimeTrainer(model, cfg, table, rt) if "ttt" in plan.stages else None
        self.history = self.mixer = None
        if "mixer" in plan.stages:
            _, leading, boundary = table.byte_tables
            self.history = NgramHistory(cfg, leading | boundary, rt.device, lanes)
            if cfg.mixer == "learned":
                self.mixer = LearnedMixer(model.mixer, cfg, rt)
        self.block = (
            cfg.mixer_block if self.mixer else cfg.ttt_chunk_tokens
        )  # from update to update
        self.mix_seconds = 0.0
        self.own = torch.zeros(
            cfg.verify_tokens, dtype=torch.int64, device=rt.device
        )  # what verify proves

    def predict(self, prefix, start, stop):
        """Commit positions start..stop-1 from `prefix`, int64 (stop - 1,): each from what is before it."""
        in_order = (
            self.committed == start < stop <= self.learned + self.block and len(prefix) == stop - 1
        )
        if self.pending is not None or not in_order:
            raise OrderError(
                f"asked to predict {start}..{stop - 1} from {len(prefix)} tokens; next "
                f"is {self.committed}, once all is scored; update {self.learned + self.block}"
            )
        self.pending, self.committed = (
            Commitment(start, stop, list(self._pieces(prefix, start, stop))),
            stop,
        )
        return self.pending

    def score(self, commitment, targets):
        """{stage: bits} of targets, int64 (stop - start,), under a commitment: a code length."""
        if (
            not commitment
            or commitment is not self.pending
            or len(targets) != len(range(*commitment[:2]))
        ):
            raise OrderError("score takes the last commitment, once, with one target a position")
        self.pending = None
        bits = torch.zeros(len(self.plan.stages), len(self._batches()), dtype=torch.float64)
        for index, first, last, freqs in commitment.pieces:
            target = targets[first - commitment.start : last - commitment.start, None].to(
                self.rt.device
            )
            for s, stage in enumerate(self.plan.stages):
                freq = freqs[stage].gather(1, target).double() if freqs else torch.tensor(math.nan)
                bits[s, index] += (TOTAL_BITS - freq.log2()).sum().item()
            if freqs and first <= len(self.own):
                self.own[first - 1 : last - 1] = freq[: len(self.own) - first + 1, 0]
        bits = self.rt.sum_over_ranks(
            bits.to(self.rt.device)
        )  # one rank a batch: the sum adds zeros only
        if bits.isnan().any():
            raise UserError(
                f"logits are not finite between tokens {commitment.start} and {commitment.stop}: "
                "TTT_LR is too high, or the artifact's weights are useless"
            )
        return {stage: sum(row) for stage, row in zip(self.plan.stages, bits.tolist())}

    def update(self, prefix):
        """Learn from a scored block, the end of `prefix` (int64): the mixer from it, TTT from a chunk."""
        whole = self.committed == self.learned + self.block == len(prefix)
        if self.pending is not None or not whole:
            raise OrderError(
                f"update takes scored blocks; {self.learned}..{len(prefix) - 1} is not one"
            )
        self.learned, chunk = self.committed, self.cfg.ttt_chunk_tokens
        if self.mixer:
            self.history.extend(prefix)
            self.mixer.learn(self.history.tokens)
        if self.ttt and (self.learned - 1) % chunk == 0:
            self.ttt.adapt_chunk(prefix[self.learned - 1 - chunk :])
            self.cache = None

    def _pieces(self, prefix, start, stop):
        """The pieces of start..stop-1's commitment, one after the other."""
        for index, starts in enumerate(self._batches()):
            S = (
                self.plan.stride if starts[0] else self.cfg.eval_seq_len
            )  # the first one scores all rows
            first, last = max(start, starts[0] + 1), min(stop, starts[-1] + 1 + S)
            if first < last and index % self.rt.world == self.rt.rank:
                rows = slice(first - starts[0] - 1, last - starts[0] - 1)
                at = starts[0] + torch.arange(len(starts) * S, device=self.rt.device)
                window = at - (at - starts[0]) % S + S - self.cfg.eval_seq_len
                logits = self._logits(prefix, starts, S)
                yield (
                    index,
                    first,
                    last,
                    self._commit(logits, prefix[: last - 1], at, window, index, rows),
                )

    def _batches(self):
        """Batches of the chunk that `learned` is in: lists of each window's first scored row."""
        W, S, chunk = self.cfg.eval_seq_len, self.plan.stride, self.cfg.ttt_chunk_tokens
        origin, size = (self.learned - 1) // chunk * chunk, self.cfg.eval_batch_windows
        starts = list(range(origin or W, origin + chunk, S))
        return ([] if origin else [[0]]) + [
            starts[i : i + size] for i in range(0, len(starts), size)
        ]

    @torch.no_grad()
    def _logits(self, prefix, starts, rows):
        """Logits of the last `rows` of each window, (R, V), with dummies where `prefix` has no token yet."""
        W = self.cfg.eval_seq_len
        size = 1 if starts[0] == 0 else self.cfg.eval_batch_windows
        first = torch.tensor(starts + [starts[-1]] * (size - len(starts))) + rows - W
        where = first[:, None] + torch.arange(W)
        tokens = torch.where(where < len(prefix), prefix[where.clamp(max=len(prefix) - 1)], 0)
        tokens, known = tokens.to(self.rt.device), W - rows
        if known and not (self.cache and torch.equal(self.cache[0], tokens[:, :known])):
            self.cache = tokens[:, :known], self.forward(tokens[:, :known])[1]
        past = self.cache[1] if known else None
        tile = tokens[:, max(0, known - EMBED_CONTEXT) :]
        return self.forward(tile, past)[0][: len(starts)].flatten(0, 1)

    @torch.no_grad()
    def _commit(self, logits, prefix, at, window, index, rows):
        """{stage: frequencies} of `rows` of a batch's logits (R, V). Contexts end at `at` (R,), models see
        `prefix` from `window` (R,) on. All R are made, for equal rounding."""
        temperature = self.cfg.ttt_temperature if self.ttt else 1.0
        p = torch.softmax(logits.double() / temperature, -1)
        if not p.isfinite().all():
            return None  # score() says so, on all ranks
        freqs = {self.plan.stages[0]: commit(p)[rows]}
        if self.history:
            start_s = self.rt.clock()
            self.history.extend(prefix)
            freqs["mixer"] = commit(self._mix(p, at, window, index, rows))[rows]
            self.mix_seconds += self.rt.clock() - start_s
        return freqs

    def _mix(self, p, at, window, index, rows):
        """The mixture (R, V) that a batch's p (R, V) becomes by what the history knows of its `rows`."""
        ends = at.new_full((len(p), CONTEXTS, self.cfg.ngram_recent), -1)
        ends[rows] = self.history.occurrences(at[rows])
        following = self.history.tokens[ends + self.lanes].long()  # where there is none, any token
        if not self.mixer:
            return mix_entropy(p, ends, following, self.cfg)
        evidence = gather_evidence(p, ends, following, at, window, self.lanes)
        q = self.mixer.mix(p, *evidence)
        waiting = (*evidence, q.gather(1, evidence[0]), at + self.lanes)
        self.mixer.waiting.setdefault(index, []).append([t[rows].clone() for t in waiting])
        return q


class Lockstep(Predictor):
    """Predicts L segments of a text side by side: position t is of lane t % L, its context ends at t - L. One
    pass adds a row to every lane's cached keys and values, in coder and decoder alike, and gives L tokens;
    in plain order a decoder repeats a tile for each. TTT and other ranks have no part in it."""

    def __init__(self, model, cfg, table, rt, plan, lanes):
        super().__init__(model, cfg, table, rt, plan, lanes)
        self.forward, self.past = model.to(rt.dtype), None  # shapes grow row by row: not compiled

    def _batches(self):
        return [None]

    @torch.no_grad()
    def _pieces(self, prefix, start, stop):
        """Rows of L positions, the last one cut; start is a row's first position."""
        W, S, L = self.cfg.eval_seq_len, self.plan.stride, self.lanes
        for first in range(start, stop, L):
            row, rows = first // L - 1, slice(0, min(L, stop - first))
            begin = (
                0 if row < W else row - (row - W) % S + S - W
            )  # of the window, as in the sliding stage
            tokens, known = prefix[:first].view(-1, L).T[:, begin:].to(self.rt.device), row - begin
            if begin and known == W - S > 0:
                self.past = self.forward(tokens[:, :-1])[1]
            past = self.past if known >= EMBED_CONTEXT else None
            logits, self.past = self.forward(
                tokens[:, -1 - EMBED_CONTEXT :] if past else tokens, past
            )
            at = torch.arange(first - L, first, device=self.rt.device)
            freqs = self._commit(
                logits[:, -1], prefix[:first], at, torch.full_like(at, begin * L), 0, rows
            )
            yield 0, first, first + rows.stop, freqs


def score_stream(predictor, tokens, log, limit_s=math.inf, visit=None, step=None):
    """Score `tokens`, int64 (n,), in one walk, by blocks or `step` tokens; ({stage: bits}, how many).
    `visit` is shown each commitment and its tokens before they are scored: a decoder's fills them in."""
    plan, stream, n, first = (
        predictor.plan,
        torch.from_numpy(tokens),
        len(tokens),
        predictor.learned,
    )
    bits, stop, start_s = dict.fromkeys(plan.stages, 0.0), first, time.perf_counter()
    said_s = start_s
    while stop < n:
        if limit_s < math.inf and predictor.rt.from_main(time.perf_counter() - start_s) > limit_s:
            break
        block_end = predictor.learned + predictor.block
        start, stop = stop, min(stop + (step or predictor.block), block_end, n)
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        if visit and all(freqs for *_, freqs in commitment.pieces):
            visit(commitment, stream[start:stop])
        for stage, block_bits in predictor.score(commitment, stream[start:stop]).items():
            bits[stage] += block_bits
        if stop == block_end < n:
            predictor.update(stream[:stop])
        if time.perf_counter() - said_s > 15:
            said_s = time.perf_counter()
            log(
                f"{'+'.join(plan.stages)}: {progress_line(stop - first, n - first, start_s, 'tokens')}"
            )
    return bits, stop - first


def evaluate(predictor, tokens, total_bytes, log):
    """Score `tokens`, int64 (n + 1,), in one walk; returns the plan's stages as results.json has them."""
    start_s, first = predictor.rt.clock(), predictor.plan.stages[0]
    bits, n = score_stream(predictor, tokens, log)
    seconds = predictor.rt.clock() - start_s
    added_s = {first: seconds - predictor.mix_seconds, "mixer": predictor.mix_seconds}
    return [
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


def calibrate_mixer(model, cfg, table, rt, limit_s, log):
    """Fit `model`'s mixer by scoring held-out text in half windows, if any, in 95 % of limit_s. Seconds."""
    start_s, tokens = rt.clock(), load_held_out(cfg).astype(np.int64)
    if not len(tokens):
        return 0.0
    S = cfg.eval_stride * max(1, cfg.eval_seq_len // cfg.eval_stride // 2)
    cfg = dataclasses.replace(
        cfg,
        ttt_enabled=False,
        eval_batch_windows=1,
        mixer_block=S,
        ttt_chunk_tokens=math.lcm(S, cfg.eval_seq_len),
    )
    predictor = Predictor(model, cfg, table, rt, EvalPass(("sliding", "mixer"), S))
    predictor.forward, predictor.mixer.calibration_blocks = (
        model,
        len(tokens) // S,
    )  # as it is, not compiled
    bits, n = score_stream(
        predictor, tokens, log, 0.95 * rt.from_main(limit_s - rt.clock() + start_s)
    )
    model.mixer.copy_(predictor.mixer.weights)
    seconds = rt.clock() - start_s
    log(
        f"calibration: {n:,} of {len(tokens) - 1:,} held-out tokens in {seconds:.1f} s, bits a token: "
        + ", ".join(f"{stage} {b / max(n, 1):.4f}" for stage, b in bits.items())
    )
    return seconds


# ---- Range coder and code files ----------------------------------------------------------------------------
# What was committed can be coded: encoder and decoder narrow one interval by the same integers. The range
# stays above 2^48, so cutting it into 2^24 parts wastes next to nothing; a carry runs back into the bytes
# before. A code file, little-endian: magic (8 bytes), version (4), CRC-32 of the rest (4), lanes (4; 0: plain
# order, as scored; `compress` cuts a file into lanes, which take turns), tokens after BOS (8), bytes of text
# (8), SHA-256 of artifact, settings (JSON) and text (32 each), code words.
MOST_LANES, CODE_MAGIC, CODE_VERSION, CODE_HEAD = (
    16,
    b"PGOLFTXT",
    2,
    struct.Struct("<8sIIIQQ32s32s32s"),
)


class RangeEncoder:
    """Codes one symbol after the other into `out`; `low` and `range` are the interval, in 64 bits."""

    def __init__(self):
        self.low, self.range, self.out = 0, 1 << 64, bytearray()

    def encode(self, start, freq):
        """Narrow the interval to its part [start, start + freq) of 2^24."""
        unit = self.range >> TOTAL_BITS
        self.low, self.range = self.low + start * unit, freq * unit
        if self.low >> 64:
            at = len(self.out.rstrip(b"\xff")) - 1
            self.out[at:] = bytes([self.out[at] + 1]) + bytes(len(self.out) - at - 1)
        while self.range < 1 << 48:
            self.out.append(self.low >> 56 & 255)
            self.low, self.range = self.low << 8, self.range << 8
        self.low &= (1 << 64) - 1

    def finish(self):
        """The code words, as bytes."""
        return bytes(self.out) + self.low.to_bytes(8, "big")


class RangeDecoder:
    """The mirror image: `value` is the code's distance from the interval's low end."""

    def __init__(self, words):
        self.words, self.at, self.range = words, 8, 1 << 64
        self.value = int.from_bytes(words[:8].ljust(8, b"\0"), "big")

    def decode(self, freqs):
        """The next symbol; freqs (V,) are what the encoder had."""
        unit, ends = self.range >> TOTAL_BITS, np.cumsum(freqs, dtype=np.int64)
        symbol = min(int(np.searchsorted(ends, self.value // unit, side="right")), len(freqs) - 1)
        freq = int(freqs[symbol])
        self.range, start = freq * unit, int(ends[symbol]) - freq
        self.value = min(self.value - start * unit, self.range - 1)  # foreign words stay in bounds
        while self.range < 1 << 48:
            byte = self.words[self.at] if self.at < len(self.words) else 0
            self.value, self.range, self.at = self.value << 8 | byte, self.range << 8, self.at + 1
        return symbol


def coding_predictor(cfg, lanes):
    """(Predictor of the last stage, Lockstep for `lanes` > 0; table, [digests of artifact, of settings])."""
    rt, (_, table, weights) = start_runtime(cfg, {}), read_artifact(cfg.artifact)
    torch.use_deterministic_algorithms(rt.device.type == "cuda")
    shaping = {name: getattr(cfg, name) for name, group in sorted(GROUPS.items()) if group != "run"}
    identity = cfg.artifact.read_bytes(), json.dumps(shaping).encode()
    plan = evaluation_passes(dataclasses.replace(cfg, ttt_enabled=cfg.ttt_enabled and not lanes))[
        -1
    ]
    kind = Lockstep if lanes else Predictor
    predictor = kind(new_model(cfg, rt, weights), cfg, table, rt, plan, max(lanes, 1))
    return predictor, table, [hashlib.sha256(data).digest() for data in identity]


def lane_order(n, lanes):
    """Which of a text's n tokens are coded one after the other, int64 (n,): one of each lane in turn. Lanes
    are segments of the text, the first n % lanes of them a token longer than the others."""
    row, lane = np.divmod(np.arange(n), lanes)
    return lane * (n // lanes) + np.minimum(lane, n % lanes) + row


def write_code(path, tokens, cfg, log, lanes=0):
    """Code tokens, int64 (n + 1,), BOS first, into a file; returns (bits committed to, frequencies (n,))."""
    predictor, table, digests = coding_predictor(cfg, lanes)
    coder, stage, text, coded = RangeEncoder(), predictor.plan.stages[-1], table.decode(tokens), []

    def encode(commitment, targets):
        for _, first, last, freqs in commitment.pieces:
            mine = targets[first - commitment.start : last - commitment.start, None].to(
                freqs[stage].device
            )
            ends, own = (
                f.gather(1, mine)[:, 0].tolist() for f in (freqs[stage].cumsum(1), freqs[stage])
            )
            for end, freq in zip(ends, own):
                coder.encode(end - freq, freq)
            coded.extend(own)

    order = lane_order(len(tokens) - 1, predictor.lanes)
    stream = np.append(np.full(predictor.lanes, table.bos_id), tokens[1:][order])
    bits, _ = score_stream(predictor, stream, log, visit=encode)
    digests += [hashlib.sha256(text).digest(), coder.finish()]
    body = struct.pack("<IQQ", lanes, len(order), len(text)) + b"".join(digests)
    write_atomically(path, struct.pack("<8sII", CODE_MAGIC, CODE_VERSION, zlib.crc32(body)) + body)
    return bits[stage], np.array(coded)


def read_code(path, cfg, log):
    """(tokens (n + 1,), frequencies (n,), text or None if it is another) of a code file; or UserError."""
    data = read_file(path)
    head = CODE_HEAD.unpack(data[: CODE_HEAD.size].ljust(CODE_HEAD.size, b"\0"))
    magic, version, checksum, lanes, n, size, artifact, settings, text_digest = head
    predictor, table, own = coding_predictor(cfg, lanes)
    for fault, why in (
        ((magic, version) != (CODE_MAGIC, CODE_VERSION), "is no code file of this version"),
        (len(data) < CODE_HEAD.size or zlib.crc32(data[16:]) != checksum, "is cut or altered"),
        (artifact != own[0], f"was not made with the artifact {cfg.artifact}"),
        (settings != own[1], "was made with other settings"),
        (lanes and predictor.block % lanes, f"has {lanes} lanes, which no block holds"),
    ):
        if fault:
            raise UserError(f"{path} {why}")
    decoder, coded, stage = RangeDecoder(data[CODE_HEAD.size :]), [], predictor.plan.stages[-1]

    def decode(commitment, targets):
        for i, freqs in enumerate(commitment.pieces[0][3][stage].cpu().numpy()):
            targets[i] = decoder.decode(freqs)
            coded.append(freqs[targets[i]])

    stream = np.full(predictor.lanes + n, table.bos_id)
    score_stream(predictor, stream, log, visit=decode, step=predictor.lanes)
    tokens = np.full(n + 1, table.bos_id)
    tokens[1:][lane_order(n, predictor.lanes)] = stream[predictor.lanes :]
    text = table.decode(tokens)
    whole = len(text) == size and hashlib.sha256(text).digest() == text_digest
    return tokens, np.array(coded), text if whole else None


def verify(cfg, tokens, report):
    """Code VERIFY_TOKENS, let another process without the shards decode them; UserError where they differ."""
    n, path, start_s = (
        min(cfg.verify_tokens, len(tokens) - 1),
        cfg.run_dir / "proof.code",
        time.time(),
    )
    bits, freqs = write_code(path, tokens[: n + 1], cfg, report.log)
    freqs, encode_s = (
        getattr(report, "own", freqs)[:n],
        time.time() - start_s,
    )  # the run's own, if it scored
    env = {
        n: v for n, v in os.environ.items() if n.lower() not in GROUPS
    } | dict(  # no settings but these
        DEVICE=cfg.device,
        ARTIFACT_PATH=str(cfg.artifact),
        DATA_PATH=os.devnull,
        TOKENIZER_PATH=os.devnull,
    )
    command = [sys.executable, __file__, "decompress", str(path), str(path.with_suffix(".npz"))]
    with subprocess.Popen(
        command, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True
    ) as decoder:
        said = [report.log(line.rstrip()) or line for line in decoder.stdout]
    if decoder.returncode:
        raise UserError(
            f"verify: the decoder gave up: {str([decoder.returncode, *said][-1]).strip()}"
        )
    decoded, decode_s = np.load(path.with_suffix(".npz")), time.time() - start_s - encode_s
    for t in np.flatnonzero(
        (decoded["tokens"][1:] != tokens[1 : n + 1]) | (decoded["freqs"] != freqs)
    ):
        raise UserError(
            f"verify: position {t + 1}: expected token {tokens[t + 1]} of frequency {freqs[t]}, "
            f"decoded {decoded['tokens'][t + 1]} of {decoded['freqs'][t]}"
        )
    size = path.stat().st_size - CODE_HEAD.size
    report.results["proof"] = {
        "tokens": n,
        "predicted_bits": bits,
        "bytes_on_disk": size,
        "encode_seconds": encode_s,
        "decode_seconds": decode_s,
    }
    report.save()
    report.log(
        f"proof: another process decoded {n:,} tokens from the artifact and {size:,} B; predicted: "
        f"{bits / 8:,.1f} B; {n / encode_s:,.1f} tokens/s to encode, {n / decode_s:,.1f} to decode"
    )


# ---- Texts to shards ---------------------------------------------------------------------------------------
# `tokenize` turns text into official shards; so does the demo with the only English that every machine has,
# the documentation inside Python and its packages. One document in 20, chosen by a checksum, is validation.
SHARD_TOKENS, DEMO_TEXT_CHARS, TXT_DOCUMENT_CHARS = 50_000_000, 6_000_000, 4096


def read_documents(path):
    """A file's documents: JSON's "text" fields, or .txt cut at blank lines after TXT_DOCUMENT_CHARS."""
    number, texts, is_txt = 0, [], path.endswith(".txt")
    try:
        for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
            if is_txt or line.strip():
                texts.append(line.decode("utf-8") if is_txt else json.loads(line)["text"])
                texts[-1].encode()  # a string, and no half of a surrogate pair
    except Exception as error:  # what is read, decoded or parsed; zstandard has its own class
        raise UserError(
            f"tokenize: cannot read {path}, line {number}: expected UTF-8 text, in .jsonl "
            f'{{"text": "..."}} ({error})'
        ) from error
    cut = rf"(?s).{{{TXT_DOCUMENT_CHARS},}}?\n[^\S\n]*\n|.+"
    return re.findall(cut, "".join(texts)) if is_txt else texts


def demo_documents():
    """pydoc's topics, then the longer docstrings of each module of the standard library, numpy and torch."""
    from pydoc_data import topics

    documents = [text for _, text in sorted(topics.topics.items())]
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "_vendor"}
    for root in (Path(module.__file__).parent for module in (os, np, torch)):
        for path in sorted(root.rglob("*.py")):
            if sum(map(len, documents)) < DEMO_TEXT_CHARS and not skipped & set(
                path.relative_to(root).parts
            ):
                found = re.findall(
                    '"""(.*?)"""', path.read_text("utf-8", errors="ignore"), re.DOTALL
                )
                documents.append(
                    "\n\n".join(inspect.cleandoc(text) for text in found if len(text) >= 80)
                )
    return list(filter(None, documents))


def prepare_demo(cfg, log):
    """Make the demo's shards in its cache, once."""
    if Path(cfg.data_path) == Path(DEMO_CACHE) and not any(
        Path(DEMO_CACHE).glob("fineweb_val_*.bin")
    ):
        log("demo: gathering English from the documentation on this machine")
        shutil.rmtree(DEMO_CACHE, ignore_errors=True)  # what an interrupted run has left
        write_shards(demo_documents(), DEMO_CACHE, cfg, log)


def train_tokenizer(documents, vocab_size, path):
    """Train a SentencePiece BPE model with byte fallback and no normalization, and write it to `path`."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                line for text in documents for line in text.splitlines() if line.strip()
            ),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=os.cpu_count(),
            allow_whitespace_only_pieces=True,
            input_sentence_size=200_000,
            max_sentence_length=16_384,
        )
    except RuntimeError as error:
        raise UserError(
            f"VOCAB_SIZE={vocab_size}: raise or lower it for this text ({error})"
        ) from error
    write_atomically(path, model.getvalue())


def write_shards(documents, out_dir, cfg, log):
    """Tokenize a list of texts to out_dir/fineweb_{train,val}_*.bin; trains a tokenizer if there is none."""
    if len(documents) < 2:
        raise UserError(
            "tokenize: two documents are the least, since validation text must not be trained on"
        )
    if any(Path(out_dir).glob("fineweb_*.bin*")):
        raise UserError(f"tokenize: {out_dir} holds shards already; name a folder that has none")
    held = np.array([zlib.crc32(d.encode()) % 20 == 0 for d in documents])
    if held.all() or not held.any():
        held = np.arange(len(documents)) == len(documents) - 1
    if not Path(cfg.tokenizer_path).exists():
        log(f"training a tokenizer of {cfg.vocab_size} pieces: {cfg.tokenizer_path}")
        train_tokenizer(
            [d for d, h in zip(documents, held) if not h], cfg.vocab_size, cfg.tokenizer_path
        )
    _, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    tokens, start_s = {"train": [], "val": []}, time.perf_counter()
    for first in range(0, len(documents), 2000):
        batch = documents[first : first + 2000]
        for ids, h in zip(sp.encode(batch, num_threads=os.cpu_count()), held[first:]):
            tokens["val" if h else "train"].append(np.array([sp.bos_id(), *ids], dtype=np.uint16))
        log(f"tokenize: {progress_line(first + len(batch), len(documents), start_s, 'documents')}")
    for split, parts in tokens.items():
        stream = np.concatenate(parts)
        for number, piece in enumerate(
            np.split(stream, range(SHARD_TOKENS, len(stream), SHARD_TOKENS))
        ):
            write_atomically(
                Path(out_dir) / f"fineweb_{split}_{number:06d}.bin", shard_bytes(piece)
            )
        log(f"{split}: {len(stream):,} tokens in {len(parts):,} documents")
    log(
        f"done: DATA_PATH={out_dir} TOKENIZER_PATH={cfg.tokenizer_path} VOCAB_SIZE={cfg.vocab_size}"
    )


# ---- Report ------------------------------------------------------------------------------------------------
# train.log is for people, results.json for programs. Seconds and bytes stand beside the competition's limits.
class Report:
    """What a run has shown so far; results.json is rewritten after every pass over the validation text."""

    def __init__(self, cfg, rt, command):
        self.cfg, self.rt = cfg, rt
        log_path = cfg.run_dir / f"{command}.log"
        self.files = [sys.stdout, open(log_path, "a", encoding="utf-8")] if rt.rank == 0 else []
        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        environment = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "device": rt.notes[0],
            "world_size": rt.world,
            "dtype": str(rt.dtype),
            "source_sha256": source,
        }
        settings = dict(sorted(dataclasses.asdict(cfg).items()))
        self.results = dict(
            run_id=cfg.run_dir.name,
            seed=cfg.seed,
            command=command,
            settings=settings,
            environment=environment,
            train=None,
            artifact=None,
            stages=[],
            val_bpb=None,
        )
        self.log(
            f"{command} {cfg.run_dir.name}, {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}"
        )
        self.log(
            "\n".join(
                [
                    f"python {environment['python']}, torch {torch.__version__}, source {source}",
                    *rt.notes,
                    *(f"  {n.upper()}={v}" for n, v in settings.items()),
                ]
            )
        )

    def log(self, line):
        """Show a line to people: on the screen and in the log file, by rank 0 alone."""
        for file in self.files:
            print(line, file=file, flush=True)

    def artifact(self, path, data):
        """Record the artifact's bytes; UserError if code + weights are over the cap (the file stays)."""
        code, limit, digest = (
            code_bytes(),
            self.cfg.size_limit_bytes,
            hashlib.sha256(data).hexdigest(),
        )
        total = code + len(data)
        self.results["artifact"] = {
            "path": str(path),
            "weights_bytes": len(data),
            "code_bytes": code,
            "total_bytes": total,
            "limit_bytes": limit,
            "sha256": digest,
        }
        self.log(
            f"artifact {path}: {len(data):,} B weights + {code:,} B code = {total:,} of {limit:,} B"
        )
        if total > limit:
            raise UserError(
                f"artifact {path} is {total - limit:,} bytes over SIZE_LIMIT_BYTES={limit:,}: "
                "lower MODEL_DIM, NUM_LAYERS or BIGRAM_VOCAB_SIZE and train again"
            )

    def stages(self, stages):
        """Add scored stages, log their rows of the table, and write results.json."""
        if not self.results["stages"]:
            self.log(
                f"{'stage':<12}{'val_bpb':>10}{'delta':>11}{'val_loss':>10}{'tokens':>12}{'seconds':>9}"
            )
        for s in stages:
            delta = s["val_bpb"] - (self.results["val_bpb"] or s["val_bpb"])
            self.results["stages"], self.results["val_bpb"] = (
                [*self.results["stages"], s],
                s["val_bpb"],
            )
            self.log(
                f"{s['name']:<12}{s['val_bpb']:>10.6f}{delta:>+11.6f}"
                f"{s['val_loss']:>10.6f}{s['tokens']:>12,}{s['seconds']:>9.1f}"
            )
        self.rt.on_main(self.save)

    def save(self):
        """Write results.json."""
        text = json.dumps(self.results, indent=1) + "\n"
        write_atomically(self.cfg.run_dir / "results.json", text.encode())

    def finish(self):
        """Log the budget ledger."""
        stages, artifact, train = (self.results[name] for name in ("stages", "artifact", "train"))
        self.log("\nbudget, against the competition's limits (which hold on its 8xH100)")
        if train:
            train_s = train["seconds"] + train["calibration_seconds"]
            self.log(
                f"train       {train_s:>10.1f} s of 600 s, calibration included; "
                f"quantize {train['quantize_seconds']:.1f} s"
            )
        evaluation_s = sum(s["seconds"] for s in stages if s["name"] != "pre_quant")
        self.log(
            f"evaluation  {evaluation_s:>10.1f} s of 600 s (without pre_quant)\n"
            f"bytes       {artifact['total_bytes']:>10,} B of {artifact['limit_bytes']:,} B"
        )


def read_result(path):
    """The parts of a finished run's results.json that a submission shows; UserError names what is amiss."""
    try:
        run = json.loads(Path(path).read_text())
        last, artifact, settings = run["stages"][-1], run["artifact"], run["settings"]
        unfinished = last["name"] != evaluation_passes(Config(**settings))[-1].stages[-1]
        over = artifact["total_bytes"] > min(artifact["limit_bytes"], Config.size_limit_bytes)
        if unfinished or over or artifact.get("overridden"):
            raise ValueError(
                unfinished
                and f"ends at {last['name']}"
                or over
                and "over cap"
                or f"{', '.join(artifact['overridden'])} overridden"
            )
        return {
            "seed": run["seed"],
            "val_bpb": run["val_bpb"],
            "preset": settings["preset"],
            "val_loss": last["val_loss"],
            "stage": last["name"],
            "val_tokens": last["tokens"],
            "bytes_total": artifact["total_bytes"],
            "bytes_code": artifact["code_bytes"],
            "device": run["environment"]["device"],
            "same": {
                n: v
                for n, v in settings.items()
                if n == "preset" or GROUPS[n] != "run" and n != "seed"
            },
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"summarize: {path} is not a finished run's results.json ({error!r})"
        ) from error


def summarize(paths, out_path):
    """Gather the results.json of several seeds into a submission.json; returns its contents."""
    runs = [read_result(path) for path in paths]
    compared = [{**r["same"], "stage": r["stage"], "val_tokens": r["val_tokens"]} for r in runs]
    if odd := {n.upper() for c in compared for n, v in c.items() if v != compared[0].get(n)}:
        raise UserError(f"summarize: the runs differ in {', '.join(sorted(odd))}")
    if len({r["seed"] for r in runs}) < len(runs):
        raise UserError("summarize: two results have the same seed; give one result a seed")
    try:
        kept = dict(json.loads(Path(out_path).read_text())) if Path(out_path).exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"summarize: {out_path} is not a JSON object ({error}); mend or remove it"
        ) from error
    summary = {
        **{name: kept.get(name, "") for name in ("author", "github_id", "name", "blurb")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **{n: np.mean([r[n] for r in runs]) for n in ("val_loss", "val_bpb")},
        **{n: max(r[n] for r in runs) for n in ("bytes_total", "bytes_code")},
        "val_bpb_std": np.std([r["val_bpb"] for r in runs], ddof=1) if len(runs) > 1 else None,
        **{n: runs[0][n] for n in ("preset", "device", "stage", "val_tokens")},
        "seeds": {
            str(r["seed"]): {n: r[n] for n in ("val_loss", "val_bpb", "bytes_total")} for r in runs
        },
    }
    summary |= {"warning": f"{len(runs)} seed(s); a submission needs 3"} if len(runs) < 3 else {}
    write_atomically(out_path, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


# ---- Commands ----------------------------------------------------------------------------------------------
# All that can be checked is checked before long work starts: device, disk, tokenizer, validation text.
def open_run(cfg, environ, command, table=None):
    """Start a run: (Runtime, Report, TokenTable, validation tokens, their bytes). `table`: the artifact's."""
    rt = start_runtime(cfg, environ)
    if table is None:
        micro_batch_sequences(cfg, rt.world)
    for folder in (cfg.run_dir, cfg.run_dir if table else cfg.artifact.parent):
        rt.on_main(lambda: check_writable(folder, 2 * cfg.size_limit_bytes))
    report = Report(cfg, rt, command)
    rt.on_main(lambda: prepare_demo(cfg, report.log))
    tokens, sp = load_validation(cfg), None
    if table is None or Path(cfg.tokenizer_path).exists():
        table, sp = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, table)
    total_bytes = audit_bytes(table, tokens, sp and sp.decode)
    report.log(
        f"validation: {len(tokens) - 1:,} tokens, {total_bytes:,} bytes, as the decoded text has"
    )
    return rt, report, table, tokens, total_bytes


def train_command(environ):
    """Train, quantize, write the artifact, read it back, evaluate every stage, report."""
    cfg = config_from_env(environ)
    rt, report, table, tokens, total_bytes = open_run(cfg, environ, "train")
    model = new_model(cfg, rt)
    report.log(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    budget, result = cfg.size_limit_bytes - code_bytes(), None
    try:
        result = train(model, cfg, rt, report.log, budget)
        with quantized_weights(model, estimate_coarseness(model, budget)):
            left_s = (
                cfg.max_wallclock_seconds - result.seconds
                if cfg.max_wallclock_seconds
                else math.inf
            )
            result.calibration_seconds = calibrate_mixer(model, cfg, table, rt, left_s, report.log)
    except (UserError, KeyboardInterrupt) as stop:
        if result is None and not isinstance(stop, TrainingStopped):
            raise  # before the first step there is nothing to keep
        path, level = cfg.run_dir / "stopped.int6.lzma", estimate_coarseness(model, 0.9 * budget)
        kept = f"the last good weights are in {path}, for ARTIFACT_PATH"
        try:
            if rt.rank == 0:
                write_atomically(path, pack_artifact(model, cfg, table, level))
        except UserError as error:
            kept = f"its weights are lost ({error})"
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(
            stop.__context__, KeyboardInterrupt
        ):
            rt.from_main(0.0)  # torchrun kills the writer as soon as another rank leaves
        raise TrainingStopped(f"{str(stop) or 'calibration was interrupted'}; {kept}") from None
    start_s = time.perf_counter()
    rt.on_main(
        lambda: write_atomically(cfg.artifact, fit_artifact(model, cfg, table, report.log)[0])
    )
    report.results["train"] = {
        **vars(result),
        "quantize_seconds": time.perf_counter() - start_s,
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
    }
    report.artifact(cfg.artifact, cfg.artifact.read_bytes())
    plan = EvalPass(("pre_quant",), cfg.eval_seq_len)
    report.stages(
        evaluate(Predictor(model.eval(), cfg, table, rt, plan), tokens, total_bytes, report.log)
    )
    evaluate_artifact(cfg, rt, report, tokens, total_bytes)
    if cfg.verify_enabled:
        rt.on_main(lambda: verify(dataclasses.replace(cfg, device=rt.device.type), tokens, report))


def evaluate_artifact(cfg, rt, report, tokens, total_bytes):
    """Score the artifact on disk, each pass with a model read afresh from it, and finish the report."""
    torch.use_deterministic_algorithms(
        rt.device.type == "cuda"
    )  # a decoder must get these very integers
    settings, table, weights = read_artifact(cfg.artifact)
    other = [n.upper() for n, v in settings.items() if n != "preset" and getattr(cfg, n) != v]
    report.results["artifact"]["overridden"] = other
    if other:
        report.log(
            f"note: {', '.join(other)} are not the artifact's: its decoder would not get these bits"
        )
    for plan in evaluation_passes(cfg):
        predictor = Predictor(new_model(cfg, rt, weights), cfg, table, rt, plan)
        report.stages(evaluate(predictor, tokens, total_bytes, report.log))
    report.own = (
        rt.sum_over_ranks(predictor.own).cpu().numpy()
    )  # the last stage's first frequencies
    report.finish()


def artifact_config(environ):
    """(Config of the artifact at ARTIFACT_PATH, its table); settings of the eval group may be overridden."""
    places = ("PRESET", "SEED", "RUN_ID", "LOG_DIR", "ARTIFACT_PATH")
    path = config_from_env({name: environ[name] for name in places if name in environ}).artifact
    settings, table, _ = read_artifact(path)
    return dataclasses.replace(
        config_from_env(environ, stored=settings), artifact_path=str(path)
    ), table


def eval_command(environ, command):
    """`eval`: score the artifact at ARTIFACT_PATH in every stage; `verify`: prove its last stage's figure."""
    cfg, table = artifact_config(environ)
    if (
        not cfg.run_id or cfg.artifact.resolve().parent == cfg.run_dir.resolve()
    ):  # keep the run's results
        cfg = dataclasses.replace(cfg, run_id=f"{cfg.run_dir.name}_{command}")
    rt, report, _, tokens, total_bytes = open_run(cfg, environ, command, table)
    report.artifact(cfg.artifact, cfg.artifact.read_bytes())
    if command == "verify":
        return rt.on_main(
            lambda: verify(dataclasses.replace(cfg, device=rt.device.type), tokens, report)
        )
    evaluate_artifact(cfg, rt, report, tokens, total_bytes)


def text_tokens(data, table, encode):
    """Tokens, int64 (n + 1,), BOS first, that decode to exactly these bytes: words as SentencePiece `encode`s
    them, if need be after a BOS, which prints nothing; white space and what would change, as byte pieces."""
    byte_ids, dot = (
        {table.texts[i]: i for i, kind in enumerate(table.kinds) if kind == "B"},
        len(encode(".")),
    )
    if len(byte_ids) < 256:
        raise UserError(
            "compress: the artifact's tokenizer has no byte pieces; train one by `tokenize`"
        )

    @functools.cache
    def ids_of(run):
        word, bos = run.decode("utf-8", "replace"), table.bos_id
        tries = (
            [encode("." + word)[dot:]] if word[0] == " " else [encode(word), [bos, *encode(word)]]
        )
        for ids in tries * (not run.isspace()):
            if (
                ids
                and table.texts[ids[-1]]
                and table.decode(np.array([byte_ids[b"a"], *ids])) == b"a" + run
            ):
                return ids
        return [byte_ids[run[i : i + 1]] for i in range(len(run))]

    runs = re.findall(rb"(?s)(?<=.) \S+|\S+|\s", data)
    return np.concatenate([[table.bos_id], *map(ids_of, runs)]).astype(np.int64)


def compress_command(source, target, environ):
    """Code a file, whatever its bytes, with the artifact at ARTIFACT_PATH, segments of it side by side."""
    (cfg, table), data = artifact_config(environ), read_file(source)
    log, start_s = functools.partial(print, flush=True), time.perf_counter()
    tokens = text_tokens(
        data, table, load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, table)[1].encode
    )
    most = (
        1 << max(1, len(tokens) // (2 * cfg.eval_seq_len)).bit_length() - 1
    )  # two windows or more for each
    bits, _ = write_code(target, tokens, cfg, log, math.gcd(cfg.mixer_block, MOST_LANES, most))
    log(
        f"{len(data):,} B -> {Path(target).stat().st_size:,} B: a header of {CODE_HEAD.size} B, the rest "
        f"predicted as {bits / 8:,.1f} B; {len(tokens) / (time.perf_counter() - start_s):,.0f} tokens/s"
    )


def decompress_command(source, target, environ):
    """Write what a code file stands for: the bytes, or, to a .npz, tokens and frequencies for `verify`."""
    tokens, freqs, text = read_code(
        source, artifact_config(environ)[0], functools.partial(print, flush=True)
    )
    if target.endswith(".npz"):
        np.savez(target, tokens=tokens, freqs=freqs)
    elif text is None:
        raise UserError(
            f"{source} decodes to another text here than was coded: another machine or torch?"
        )
    else:
        write_atomically(target, text)


def tokenize_command(out_dir, paths, environ):
    """Tokenize files into shards in out_dir."""
    cfg, log = config_from_env(environ), functools.partial(print, flush=True)
    documents, start_s = [], time.perf_counter()
    if odd := [path for path in paths if not path.endswith((".txt", ".jsonl", ".jsonl.zst"))]:
        raise UsageError(f"tokenize: {odd[0]} is none of .txt, .jsonl, .jsonl.zst")
    for number, path in enumerate(paths, 1):
        documents += [d for d in read_documents(path) if d.strip()]
        log(f"{len(documents):,} documents; {progress_line(number, len(paths), start_s, 'files')}")
    write_shards(documents, out_dir, cfg, log)


def dispatch(args, environ):
    """Run one command line."""
    match args:
        case []:
            train_command(environ)
        case ["eval" | "verify" as command]:
            eval_command(environ, command)
        case ["compress", source, target]:
            compress_command(source, target, environ)
        case ["decompress", source, target]:
            decompress_command(source, target, environ)
        case ["tokenize", out_dir, first, *more]:
            tokenize_command(out_dir, [first, *more], environ)
        case ["summarize", first, *more]:
            print(json.dumps(summarize([first, *more], "submission.json"), indent=1))
        case ["-h" | "--help" | "help"]:
            print(__doc__)
            for f in dataclasses.fields(Config):
                print(f"  {f.name.upper():<28} {f.metadata['doc']} (record: {f.default!r})")
        case _:
            raise UsageError(
                f"unknown or incomplete command {' '.join(args)!r}; see train_gpt.py --help"
            )


def main():
    """Run the command line; returns the exit status. What a user can mend is one line on stderr."""
    status = 0
    try:
        dispatch(sys.argv[1:], os.environ)
    except (UserError, KeyboardInterrupt) as error:
        status, message = (
            getattr(error, "exit_status", 130),
            str(error) or "interrupted; files are kept",
        )
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        if not status:
            dist.barrier()
        os._exit(
            status
        )  # no goodbye: a rank in a collective would keep it waiting, and gloo's can abort
    return status


if __name__ == "__main__":
    sys.exit(main())
