"""Honest mixers side by side on one model's saved logits; no second forward pass.

    compare_mixers.py record ARTIFACT FOLDER [STREAM...]
                                               score streams (all three) once, keep their logits
    compare_mixers.py table FOLDER             every method on the validation text
    compare_mixers.py split FOLDER             where the learned mixer gains on it
    compare_mixers.py ablate FOLDER            the learned mixer with one thing changed, on `tune`
    compare_mixers.py scale TOKENS...          seconds and bytes a token on that much training text

Settings come from the environment as in train_gpt.py (DATA_PATH, TOKENIZER_PATH, VAL_TOKENS).
`record` keeps three streams: `calib`, the end of the last training shard, in runs of half a window;
`tune`, the beginning of that shard, sliding (bench trains on the first shard only); `val`, the
validation text, sliding and with TTT. Every figure is the length of committed integer frequencies;
seconds are those of linking, mixing and learning on this machine's one thread.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt
from train_gpt import (
    CONTEXTS,
    LOGIT_SCALE,
    Mixture,
    NgramHistory,
    Runtime,
    commit,
    new_plan,
    shares,
)

RATE = dict(cold=5e-3, calibrated=1e-3)
SLICE_TOKENS = 100_000


# ---- Recording -----------------------------------------------------------------------------------


class Recorder:
    """Stands in for a Predictor's Mixture and its history: keeps the logits that are committed."""

    def __init__(self, grid):
        self.grid = grid  # (n, V) int16, of rows 0, 1, ...
        self.history = self

    def extend(self, prefix):
        """Link nothing."""

    def mix(self, grid, rows):
        """Keep the logits (R, V); return the model's frequencies."""
        self.grid[rows.cpu().numpy()] = grid.cpu().numpy().astype(np.int16)
        return commit(shares(grid))

    def learn(self, prefix):
        """Learn nothing."""


def calibration_runs(cfg):
    """Return what the Plan of a calibration has of its own: half windows, nothing before them."""
    return dict(run=cfg.eval_seq_len // 2, context=0)


def record(artifact_path, folder, *names):
    """Write NAME.npy (n, V) int16 grid logits and NAME_tokens.npy (n + 1,) for each stream.

    names: of the streams; none: all three.
    """
    artifact = train_gpt.read_artifact(artifact_path)
    cfg = train_gpt.config_from_env(os.environ, artifact.settings)
    rt = train_gpt.start_runtime(cfg, {})
    shard = train_gpt.read_shard(train_gpt.list_shards(cfg, "train")[-1], cfg.vocab_size)
    end = cfg.val_tokens + 1 if cfg.val_tokens else None
    sliding = new_plan(cfg, "sliding")
    streams = {
        "calib": (train_gpt.load_held_out(cfg), sliding._replace(**calibration_runs(cfg))),
        "tune": (shard[:end], sliding),
        "val": (train_gpt.load_validation(cfg), new_plan(cfg, "ttt")),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names or streams:
        tokens, plan = streams[name]
        tokens = tokens.astype(np.int64)
        shape = len(tokens) - 1, cfg.vocab_size
        path = f"{folder}/{name}.npy"
        grid = np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape)
        plan = plan._replace(stages=(*plan.stages, "unguarded", "mixer"))
        predictor = train_gpt.Predictor(artifact.weights, artifact.table, cfg, rt, plan)
        predictor.mixture = Recorder(grid)
        total_bytes = int(artifact.table.count_bytes(tokens).sum())
        stages, _ = train_gpt.evaluate(predictor, tokens, total_bytes, print, keep=1)
        grid.flush()
        np.save(f"{folder}/{name}_tokens.npy", tokens)
        print(name, stages[0], flush=True)


# ---- Replaying -----------------------------------------------------------------------------------


class Replay:
    """A recorded stream: tokens and logits."""

    def __init__(self, folder, name, cfg, table):
        self.grid = np.load(f"{folder}/{name}.npy", mmap_mode="r")
        self.tokens = torch.from_numpy(np.load(f"{folder}/{name}_tokens.npy"))
        self.cfg = cfg
        self.table = table
        self.reach = new_plan(cfg, "sliding").reach
        self.bytes = int(table.count_bytes(self.tokens.numpy()).sum())

    @property
    def n(self):
        """Positions to score."""
        return len(self.tokens) - 1

    def blocks(self, size):
        """Yield (grid, positions) of each block, as a Predictor shows them to a Mixture."""
        for start in range(0, self.n, size):
            positions = torch.arange(start, min(start + size, self.n))
            grid = torch.from_numpy(self.grid[positions].astype(np.int64))
            yield grid, positions


def code_bits(freqs, targets):
    """Return the bits (R,) of each target under the committed frequencies (R, V)."""
    return train_gpt.TOTAL_BITS - freqs.gather(1, targets[:, None])[:, 0].double().log2()


@torch.inference_mode()
def run(stream, mixture, size=4096):
    """Return (bits a byte, seconds, bits of each position), mixed in blocks of `size`."""
    bits = []
    start_s = time.perf_counter()
    for grid, rows in stream.blocks(size):
        stop = int(rows[-1]) + 1
        mixture.history.extend(stream.tokens[:stop])
        freqs = mixture.mix(grid, rows)
        bits.append(code_bits(freqs, stream.tokens[rows + 1]))
        if len(grid) == size and stop < stream.n:
            mixture.learn(stream.tokens[: stop + 1])
    seconds = time.perf_counter() - start_s
    bits = torch.cat(bits)
    return bits.sum().item() / stream.bytes, seconds, bits


def learned(stream, weights, rate, size=64, **clocks):
    """Return a Mixture with the learned mixer for a stream, and blocks of `size` positions.

    clocks: what else of the Plan is not that of `sliding`.
    """
    cfg = replace(stream.cfg, mixer="learned", mixer_lr=rate)
    plan = new_plan(cfg, "sliding", "unguarded", "mixer")
    plan = plan._replace(block=size, **clocks)
    return Mixture(weights, cfg, stream.table, Runtime(), plan)


def calibrated_weights(calib):
    """Return the weights that calibration gets from `calib`, as the artifact has them."""
    size = calib.cfg.eval_seq_len
    clocks = dict(calibration_blocks=len(calib.tokens) // size, **calibration_runs(calib.cfg))
    start = train_gpt.new_mixer_weights()
    mixture = learned(calib, start, 3 * RATE["calibrated"], size, **clocks)
    run(calib, mixture, size)
    return mixture.weights.half().float()


# ---- The other honest methods --------------------------------------------------------------------


class Rule:
    """Stands in for a Mixture: shares = method(grid, matches, following, rows); learns nothing."""

    def __init__(self, stream, method):
        self.history = NgramHistory(stream.cfg, stream.table.word_begins, "cpu")
        self.method = method

    def mix(self, grid, rows):
        """Return frequencies (R, V)."""
        matches = self.history.occurrences(rows)
        following = self.history.tokens[matches + 1].long()
        return commit(self.method(grid, matches, following, rows))

    def learn(self, prefix):
        """Learn nothing."""


def model_alone(grid, matches, following, rows):
    """Return the model's shares."""
    return shares(grid)


def entropy_rule(cfg, base, span, center, min_count):
    """Return the method of PR 1033 over the same history."""
    alphas = dict(alpha_base=base, alpha_range=span, alpha_center=center)
    changed = replace(cfg, min_count=min_count, **alphas)
    return lambda grid, matches, following, rows: train_gpt.mix_entropy(
        shares(grid), matches, following, changed
    )


def probabilities(grid):
    """Return p, float64 (R, V), of grid logits."""
    return torch.softmax(grid.double() / LOGIT_SCALE, -1)


def one_token_tilt(beta, adaptive, reach):
    """Return the method that raises the logit of one hinted token by beta.

    The hint is what followed the longest context's last occurrence. `adaptive`: beta times
    1 - p(hint). `reach`: only where that occurrence is more rows back; 0: everywhere.
    """

    def method(grid, matches, following, rows):
        seen = matches[:, :-1, 0] >= 0
        longest = seen.int().argmax(1)[:, None]
        hint = following[:, :-1, 0].gather(1, longest)
        wanted = seen.any(1, keepdim=True)
        if reach:
            wanted &= matches[:, :-1, 0].gather(1, longest) < (rows - reach)[:, None]
        boost = LOGIT_SCALE * beta * wanted.double()
        if adaptive:
            boost *= 1 - probabilities(grid).gather(1, hint)
        return shares(grid.scatter_add(1, hint, boost.round().long()))

    return method


def dirichlet(theta, least):
    """Return the method of PPM with a Dirichlet prior at each step.

    p(v | context) = (count + theta p(v | shorter context)) / (total + theta), from the model's p
    upwards through the contexts of `least` or more tokens.
    """

    def method(grid, matches, following, rows):
        p = probabilities(grid)
        for c in reversed(range(CONTEXTS - 1)):
            if train_gpt.CONTEXT_LENGTHS[c] >= least:
                real = (matches[:, c] >= 0).double()
                counts = torch.zeros_like(p).scatter_add_(1, following[:, c], real)
                p = (counts + theta * p) / (real.sum(1, keepdim=True) + theta)
        return (p * 2**38).long()

    return method


def best(stream, methods):
    """Return (label, bits a byte, seconds) of the best of {label: method} on this very stream."""
    found = []
    for label, method in methods.items():
        bpb, seconds, _ = run(stream, Rule(stream, method))
        found.append((bpb, label, seconds))
    bpb, label, seconds = min(found)
    return label, bpb, seconds


# ---- Commands ------------------------------------------------------------------------------------


def config(**changes):
    """Return the settings of the environment, of the bench preset unless it says another."""
    return replace(train_gpt.config_from_env({"PRESET": "bench", **os.environ}), **changes)


def open_streams(folder, *names, **changes):
    """Return the Replays of these names in a recorded folder; changes are settings."""
    cfg = config(**changes)
    table, _ = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    return [Replay(folder, name, cfg, table) for name in names]


ENTROPY_TRIALS = [
    *((0, 0.1, 1, 1), (0, 0.15, 1, 1), (0, 0.2, 1, 1), (0, 0.25, 1, 1), (0, 0.3, 1, 1)),
    *((0.05, 0.2, 1, 1), (0, 0.2, 2, 1), (0, 0.3, 2, 1), (0, 0.2, 3, 1), (0, 0.3, 3, 1)),
    *((0, 0.3, 4, 1), (0, 0.2, 1, 2)),
]


def table(folder):
    """Print every method on `val`.

    The settings of the others are chosen on `val` itself, which favours them.
    """
    (val,) = open_streams(folder, "val", ngram_recent=16)
    neural, _, base = run(val, Rule(val, model_alone))
    reference = run(val, Rule(val, entropy_rule(val.cfg, 0.20, 0.55, 3.0, 2)))
    rows = [
        ("TTT", neural, 0.0),
        ("entropy rule, reference's alphas", *reference[:2]),
        best(
            val,
            {
                f"entropy rule, best of 12: {trial}": entropy_rule(val.cfg, *trial)
                for trial in ENTROPY_TRIALS
            },
        ),
        best(
            val,
            {
                f"one-token tilt, best of 16: beta {beta}{adaptive}{outside}": one_token_tilt(
                    beta, bool(adaptive), val.reach if outside else 0
                )
                for beta in (1.0, 1.5, 2.0, 3.0)
                for adaptive in ("", ", times 1 - p")
                for outside in ("", ", outside")
            },
        ),
        best(
            val,
            {
                f"Dirichlet/PPM, best of 12: theta {theta}, contexts of {least}+": dirichlet(
                    theta, least
                )
                for theta in (4, 8, 16, 32)
                for least in (1, 3, 5)
            },
        ),
    ]
    val, calib = open_streams(folder, "val", "calib")
    weights = calibrated_weights(calib)
    cold = run(val, learned(val, train_gpt.new_mixer_weights(), RATE["cold"]), 64)
    bpb, seconds, bits = run(val, learned(val, weights, RATE["calibrated"]), 64)
    frozen = run(val, learned(val, weights, 0.0), 64)
    rows += [
        (f"learned, cold, rate {RATE['cold']}", *cold[:2]),
        ("learned, calibrated", bpb, seconds),
        ("learned, calibrated, frozen", *frozen[:2]),
    ]
    for label, bpb, seconds in rows:
        print(f"{label:<60} {bpb:.4f} {bpb - neural:+.4f} {seconds:6.1f} s", flush=True)
    if val.n >= SLICE_TOKENS:
        gains = (bits - base).unfold(0, SLICE_TOKENS, SLICE_TOKENS // 10).sum(1)
        gains *= val.n / val.bytes / SLICE_TOKENS
        print(
            f"learned, calibrated, against TTT on slices of {SLICE_TOKENS:,} tokens: "
            f"{gains.min():+.4f} to {gains.max():+.4f}"
        )


def longest_occurrence(stream):
    """Return (tokens in the longest context that has occurred, 0: none; rows back to its last end).

    Both int64 (n,), of each position of a stream; words' contexts aside.
    """
    history = NgramHistory(stream.cfg, stream.table.word_begins, "cpu")
    history.extend(stream.tokens)
    found = []
    for rows in torch.arange(stream.n).split(4096):
        last = history.occurrences(rows)[:, :-1, 0]  # of each context, the newest; -1: none
        longest = (last >= 0).int().argmax(1, keepdim=True)
        lengths = history.lengths[:-1][longest] * (last >= 0).any(1, keepdim=True)
        found.append(torch.cat([lengths, rows[:, None] - last.gather(1, longest)], 1))
    return torch.cat(found).unbind(1)


def split(folder):
    """Print the learned mixer's gain by longest context, by its distance and along the stream.

    A line: share of the positions, the model's bits a position, the mixer's change of them, and
    what that is in bits a byte of the whole text. It is the calibrated mixer, without the guard.
    """
    val, calib = open_streams(folder, "val", "calib")
    neural, _, base = run(val, Rule(val, model_alone))
    weights = calibrated_weights(calib)
    bpb, _, bits = run(val, learned(val, weights, RATE["calibrated"]), 64)
    print(f"model {neural:.4f}, learned {bpb:.4f} ({bpb - neural:+.4f})", flush=True)
    lengths, distance = longest_occurrence(val)
    inside = distance <= val.reach
    groups = {"nothing before": lengths == 0}
    for length in lengths.unique().tolist()[1:]:
        groups[f"{length} tokens, inside of the window"] = (lengths == length) & inside
        groups[f"{length} tokens, outside"] = (lengths == length) & ~inside
    groups["inside"] = (lengths > 0) & inside
    groups["outside"] = (lengths > 0) & ~inside
    quarter = torch.arange(val.n) * 4 // val.n
    groups |= {f"quarter {q + 1} of the stream": quarter == q for q in range(4)}
    for label, chosen in groups.items():
        gain = (base - bits)[chosen]
        if len(gain):
            print(
                f"{label:<36} {len(gain) / val.n:6.1%} {base[chosen].mean():7.3f} bits "
                f"{-gain.mean():+7.3f} {-gain.sum() / val.bytes:+.4f} BPB",
                flush=True,
            )


def without(*features):
    """Return gather_evidence with some of the features at zero."""
    gather = train_gpt.gather_evidence

    def gather_fewer(*args):
        tokens, kept = gather(*args)
        kept[:, list(features)] = 0
        return tokens, kept

    return gather_fewer


def ablate(folder):
    """Print what it costs on `tune` to change one thing about the calibrated mixer."""

    def final(size=64, rate=1e-3, features_off=(), calib_tokens=None, hidden=32, **changes):
        tune, calib = open_streams(folder, "tune", "calib", **changes)
        if calib_tokens:
            calib.tokens = calib.tokens[: calib_tokens + 1]
        gather = without(*features_off)
        with (
            mock.patch.object(train_gpt, "MIXER_HIDDEN", hidden),
            mock.patch.object(train_gpt, "gather_evidence", gather),
        ):
            weights = calibrated_weights(calib)
            return run(tune, learned(tune, weights, rate, size), size)

    (tune,) = open_streams(folder, "tune")
    neural, _, _ = run(tune, Rule(tune, model_alone))
    base, _, _ = final()
    print(f"model {neural:.4f}, learned {base:.4f} ({base - neural:+.4f})", flush=True)
    C = CONTEXTS
    groups = ("log odds", "inverse rank", "log distance", "in the window")
    trials = {
        f"without {group}": dict(features_off=range(i * C, i * C + C))
        for i, group in enumerate(groups)
    }
    trials["without the distance to the top"] = dict(features_off=[4 * C])
    trials["without the top"] = dict(features_off=[4 * C + 1])
    trials |= {f"NGRAM_RECENT={m}": dict(ngram_recent=m, min_count=1) for m in (1, 2, 8, 16)}
    trials |= {f"NGRAM_ORDER={m}": dict(ngram_order=m) for m in (3, 4, 6)}
    trials |= {f"MIXER_BLOCK={m}": dict(size=m) for m in (256, 1024, 4096)}
    trials |= {f"MIXER_LR={r}": dict(rate=r) for r in (0.0, 3e-4, 3e-3, 1e-2)}
    trials |= {f"{h} hidden units": dict(hidden=h) for h in (8, 16, 64)}
    trials |= {f"{n} tokens of calibration": dict(calib_tokens=n) for n in (32_768, 131_072)}
    for label, changes in trials.items():
        bpb, seconds, _ = final(**changes)
        print(f"{label:<40} {bpb - base:+.4f} {seconds:6.1f} s", flush=True)


@torch.inference_mode()
def scale(*counts):
    """Print seconds and bytes a token after so many tokens of training text.

    With record's mixer settings and one fixed stand-in distribution: linking, mixing, committing
    and learning in blocks of 2,048, in seconds of this one thread; others do not count.
    """
    size = 2048
    cfg = config(mixer="learned", ngram_hash_bits=26, mixer_lr=1e-3)
    table, _ = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    plan = new_plan(cfg, "sliding", "unguarded", "mixer")._replace(block=size)
    mixture = Mixture(train_gpt.new_mixer_weights(), cfg, table, Runtime(), plan)
    history = mixture.history
    counts = sorted(map(int, counts))
    shards = [train_gpt.read_shard(f, cfg.vocab_size) for f in train_gpt.list_shards(cfg, "train")]
    tokens = torch.from_numpy(np.concatenate(shards)[: counts[-1] + 1].astype(np.int64))
    counted = torch.bincount(tokens, minlength=cfg.vocab_size).double() + 1
    grid = (LOGIT_SCALE * counted.log()).round().long().expand(size, -1)

    seconds = 0.0
    bits = 0.0
    seconds_before = 0.0
    size_before = 0
    for start in range(0, len(tokens) - size, size):
        stop = start + size
        start_s = time.thread_time()
        positions = torch.arange(start, stop)
        history.extend(tokens[:stop])
        freqs = mixture.mix(grid, positions)
        bits += code_bits(freqs, tokens[positions + 1]).sum().item()
        mixture.learn(tokens[: stop + 1])
        seconds += time.thread_time() - start_s
        if stop + size > counts[0]:
            links = sum(t.numel() * t.element_size() for t in (history.tokens, history.prev))
            heads = history.heads.numel() * history.heads.element_size()
            rate = 1e6 * (seconds - seconds_before) / (stop - size_before)
            print(
                f"{stop:>12,} tokens: {rate:.1f} us a token since the last line, "
                f"{links / stop:.1f} B a token + {heads / 1e9:.2f} GB of heads, "
                f"{bits / stop:.3f} bits a token",
                flush=True,
            )
            seconds_before = seconds
            size_before = stop
            counts.pop(0)


COMMANDS = {"record": record, "table": table, "split": split, "ablate": ablate, "scale": scale}

if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    COMMANDS[command](*arguments)
