"""Honest mixers side by side on one model's saved distributions; no second forward pass.

    python tests/compare_mixers.py record ARTIFACT FOLDER   score held-out text and validation text once, keep log p
    python tests/compare_mixers.py table FOLDER             every method on the validation text
    python tests/compare_mixers.py ablate FOLDER            the learned mixer with one thing changed, on `tune`
    python tests/compare_mixers.py scale TOKENS...          seconds and bytes a token on that much training text

Settings come from the environment as in train_gpt.py (DATA_PATH, TOKENIZER_PATH, VAL_TOKENS). `record` keeps three
streams: `calib`, the end of the last training shard, in half windows; `tune`, the beginning of that shard, sliding
(bench trains on the first shard only); `val`, the validation text, sliding and with TTT. Every figure is the length
of committed integer frequencies; seconds are those of linking, mixing and learning on this machine's one thread.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt  # noqa: E402
from train_gpt import CONTEXTS, EvalPass, LearnedMixer, NgramHistory, Predictor, Runtime  # noqa: E402

RATE = dict(cold=5e-3, calibrated=1e-3)


# ----------------------------------------------------------------------------------------------------------
# Recording
# ----------------------------------------------------------------------------------------------------------


class Recorder(Predictor):
    """Keeps the log probabilities of every position that it commits."""

    def _commit(self, logits, prefix, at, window, index, rows):
        first = int(at[rows.start])
        temperature = self.cfg.ttt_temperature if self.ttt else 1.0
        kept = torch.log_softmax(logits.double() / temperature, -1)[rows].float()
        self.store[first : first + len(kept)] = kept.numpy()
        return super()._commit(logits, prefix, at, window, index, rows)


def record(artifact, folder):
    """Write NAME.npy (n, V) fp32 log probabilities and NAME_tokens.npy (n + 1,) for each stream."""
    settings, table, weights = train_gpt.read_artifact(artifact)
    cfg = train_gpt.config_from_env(os.environ, stored=settings)
    rt = train_gpt.start_runtime(cfg, {})
    plain = replace(cfg, ttt_enabled=False, mixer="none")
    held_out = train_gpt.load_held_out(cfg).astype(np.int64)
    shard = train_gpt.read_shard(train_gpt.list_shards(cfg, "train")[-1], cfg.vocab_size)
    streams = {
        "calib": (held_out, plain, EvalPass(("sliding",), cfg.eval_seq_len // 2)),
        "tune": (
            shard[: cfg.val_tokens + 1].astype(np.int64),
            plain,
            EvalPass(("sliding",), cfg.eval_stride),
        ),
        "val": (
            train_gpt.load_validation(cfg),
            replace(cfg, mixer="none"),
            EvalPass(("ttt",), cfg.eval_stride),
        ),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, (tokens, settings, plan) in streams.items():
        predictor = Recorder(train_gpt.new_model(cfg, rt, weights), settings, table, rt, plan)
        predictor.store = np.lib.format.open_memmap(
            f"{folder}/{name}.npy",
            mode="w+",
            dtype=np.float32,
            shape=(len(tokens) - 1, cfg.vocab_size),
        )
        print(
            name,
            train_gpt.evaluate(predictor, tokens, int(table.count_bytes(tokens).sum()), print),
            flush=True,
        )
        np.save(f"{folder}/{name}_tokens.npy", tokens)


# ----------------------------------------------------------------------------------------------------------
# Replaying
# ----------------------------------------------------------------------------------------------------------


class Replay:
    """A recorded stream, block by block, with what the history knows."""

    def __init__(self, folder, name, cfg, table, stride):
        self.logp = np.load(f"{folder}/{name}.npy", mmap_mode="r")
        self.tokens = torch.from_numpy(np.load(f"{folder}/{name}_tokens.npy"))
        self.cfg, self.stride, self.n = cfg, stride, len(self.tokens) - 1
        self.bytes = int(table.count_bytes(self.tokens.numpy()).sum())
        _, leading, boundary = table.byte_tables
        self.begins = leading | boundary

    def blocks(self, size):
        """Yield (p, ends, following, at, window, targets) of each block of positions, as Predictor has them."""
        history, W = NgramHistory(self.cfg, self.begins, "cpu"), self.cfg.eval_seq_len
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            history.extend(self.tokens[:stop])
            ends = history.occurrences(at := torch.arange(start, stop))
            window = torch.where(at < W, 0, at // self.stride * self.stride + self.stride - W)
            p = torch.from_numpy(self.logp[start:stop].astype(np.float64)).exp()
            yield (
                p,
                ends,
                history.tokens[ends + 1].long(),
                at,
                window,
                self.tokens[start + 1 : stop + 1],
            )


def code_bits(q, targets):
    """Bits of each target under the committed frequencies of q."""
    freqs = train_gpt.commit(q).gather(1, targets[:, None])[:, 0]
    return train_gpt.TOTAL_BITS - freqs.double().log2()


def run(stream, method, size=4096):
    """(bits a byte, seconds, bits of each position) of q = method(p, ends, following, at, window)."""
    bits, seconds, began = [], 0.0, time.perf_counter()
    for *evidence, targets in stream.blocks(size):
        bits.append(code_bits(method(*evidence), targets))
    seconds = time.perf_counter() - began
    bits = torch.cat(bits)
    return bits.sum().item() / stream.bytes, seconds, bits


def run_learned(stream, mixer, gather=train_gpt.gather_evidence, size=64):
    """The same for a learned mixer, which goes on learning."""
    bits, began = [], time.perf_counter()
    for *evidence, targets in stream.blocks(size):
        p, ends, following, at, window = evidence
        found = gather(p, ends, following, at, window)
        q = mixer.mix(p, *found)
        bits.append(code_bits(q, targets))
        if len(targets) == size:
            mixer.waiting = {0: [[*found, q.gather(1, found[0]), at + 1]]}
            mixer.learn(stream.tokens)
    seconds, bits = time.perf_counter() - began, torch.cat(bits)
    return bits.sum().item() / stream.bytes, seconds, bits


def new_mixer(cfg, size, rate, blocks=0, hidden=train_gpt.MIXER_HIDDEN):
    """An untrained mixer, as a new model has it."""
    train_gpt.MIXER_HIDDEN = hidden
    weights = train_gpt.GPT(cfg).mixer
    return LearnedMixer(weights, replace(cfg, mixer_block=size, mixer_lr=rate), Runtime(), blocks)


def calibrated_mixer(
    cfg, calib, size, rate=RATE["calibrated"], gather=train_gpt.gather_evidence, **changes
):
    """A mixer that has learned from the `calib` stream as calibrate_mixer does, then stored as fp16."""
    S = cfg.eval_seq_len // 2
    mixer = new_mixer(cfg, S, 1e-3, calib.n // S, **changes)
    run_learned(calib, mixer, gather, S)
    return LearnedMixer(
        mixer.weights.half().float(), replace(cfg, mixer_block=size, mixer_lr=rate), Runtime()
    )


# ----------------------------------------------------------------------------------------------------------
# The other honest methods
# ----------------------------------------------------------------------------------------------------------


def entropy_rule(cfg, base, span, center, min_count):
    """PR 1033's rule over the same history."""
    changed = replace(
        cfg, alpha_base=base, alpha_range=span, alpha_center=center, min_count=min_count
    )
    return lambda p, ends, following, at, window: train_gpt.mix_entropy(p, ends, following, changed)


def one_token_tilt(beta, adaptive, outside):
    """The logit of one hinted token, the one after the last occurrence of the longest context, is raised by beta
    (times 1 - p(hint), if adaptive); with `outside`, only where that occurrence is outside the model's window."""

    def method(p, ends, following, at, window):
        seen = ends[:, :-1, 0] >= 0
        longest = seen.int().argmax(1)[:, None]
        hint = following[:, :-1, 0].gather(1, longest)
        wanted = seen.any(1, keepdim=True)
        if outside:
            wanted &= ends[:, :-1, 0].gather(1, longest) < window[:, None]
        boost = beta * (1 - p.gather(1, hint) if adaptive else 1.0) * wanted
        return torch.softmax(
            p.log().scatter_add(1, hint, boost.double() * torch.ones_like(hint)), -1
        )

    return method


def dirichlet(theta, least):
    """p(v | context) = (count + theta * p(v | shorter context)) / (total + theta), from the model's p upwards through
    the contexts of `least` or more tokens (PPM with a Dirichlet prior at each step)."""

    def method(p, ends, following, at, window):
        for c in reversed(range(CONTEXTS - 1)):
            if train_gpt.CONTEXT_LENGTHS[c] >= least:
                real = (ends[:, c] >= 0).double()
                counts = torch.zeros_like(p).scatter_add_(1, following[:, c], real)
                p = (counts + theta * p) / (real.sum(1, keepdim=True) + theta)
        return p

    return method


def best(stream, methods):
    """(label, bits a byte, seconds) of the best of {label: method} on this very stream."""
    found = [
        (bpb, label, seconds)
        for label, m in methods.items()
        for bpb, seconds, _ in [run(stream, m)]
    ]
    bpb, label, seconds = min(found)
    return label, bpb, seconds


# ----------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------


def open_streams(folder, *names, **changes):
    """(cfg, streams) of a recorded folder; changes are settings."""
    cfg = replace(
        train_gpt.config_from_env({**os.environ, "PRESET": os.environ.get("PRESET", "bench")}),
        **changes,
    )
    table = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)[0]
    strides = {"calib": cfg.eval_seq_len // 2, "tune": cfg.eval_stride, "val": cfg.eval_stride}
    return cfg, [Replay(folder, name, cfg, table, strides[name]) for name in names]


def table(folder):
    """Every method on `val`; the settings of the others are chosen on `val` itself, which favours them."""
    cfg, (val,) = open_streams(folder, "val", ngram_recent=16)
    neural, seconds, base = run(val, lambda p, *_: p)
    rows = [("TTT", neural, 0.0)]
    rows.append(
        ("entropy rule, reference's alphas", *run(val, entropy_rule(cfg, 0.20, 0.55, 3.0, 2))[:2])
    )
    label, *rest = best(
        val,
        {
            f"entropy rule, best of 12: {a}": entropy_rule(cfg, *a)
            for a in (
                (0, 0.1, 1, 1),
                (0, 0.15, 1, 1),
                (0, 0.2, 1, 1),
                (0, 0.25, 1, 1),
                (0, 0.3, 1, 1),
                (0.05, 0.2, 1, 1),
                (0, 0.2, 2, 1),
                (0, 0.3, 2, 1),
                (0, 0.2, 3, 1),
                (0, 0.3, 3, 1),
                (0, 0.3, 4, 1),
                (0, 0.2, 1, 2),
            )
        },
    )
    rows.append((label, *rest))
    label, *rest = best(
        val,
        {
            f"one-token tilt, best of 16: beta {b}{', times 1 - p' * a}{', outside' * o}": one_token_tilt(
                b, a, o
            )
            for b in (1.0, 1.5, 2.0, 3.0)
            for a in (0, 1)
            for o in (0, 1)
        },
    )
    rows.append((label, *rest))
    label, *rest = best(
        val,
        {
            f"Dirichlet/PPM, best of 12: theta {t}, contexts of {m}+": dirichlet(t, m)
            for t in (4, 8, 16, 32)
            for m in (1, 3, 5)
        },
    )
    rows.append((label, *rest))
    cfg, (val, calib) = open_streams(folder, "val", "calib")
    rows.append(
        (
            f"learned, cold, rate {RATE['cold']}",
            *run_learned(val, new_mixer(cfg, 64, RATE["cold"]))[:2],
        )
    )
    bpb, seconds, bits = run_learned(val, calibrated_mixer(cfg, calib, 64))
    rows.append(("learned, calibrated", bpb, seconds))
    frozen = LearnedMixer(
        calibrated_mixer(cfg, calib, 64).weights,
        replace(cfg, mixer_lr=0.0, mixer_block=64),
        Runtime(),
    )
    rows.append(("learned, calibrated, frozen", *run_learned(val, frozen)[:2]))
    for label, bpb, seconds in rows:
        print(f"{label:<60} {bpb:.4f} {bpb - neural:+.4f} {seconds:6.1f} s", flush=True)
    slices = (bits - base).unfold(0, 100_000, 10_000).sum(1) * (val.n / val.bytes / 100_000)
    print(
        f"learned, calibrated, against TTT on slices of 100,000 tokens: {slices.min():+.4f} to {slices.max():+.4f}"
    )


def without(*rows):
    """gather_evidence with some rows of features at zero."""

    def gather(*args):
        tokens, distinct, features = train_gpt.gather_evidence(*args)
        features[:, list(rows)] = 0
        return tokens, distinct, features

    return gather


def ablate(folder):
    """Change of the calibrated mixer's bits a byte on `tune` when one thing is taken away or changed."""

    def final(
        size=64,
        rate=1e-3,
        gather=train_gpt.gather_evidence,
        calib_tokens=None,
        hidden=32,
        **changes,
    ):
        cfg, (tune, calib) = open_streams(folder, "tune", "calib", **changes)
        calib.n = calib_tokens or calib.n
        mixer = calibrated_mixer(cfg, calib, size, rate, gather, hidden=hidden)
        return run_learned(tune, mixer, gather, size)

    C = CONTEXTS
    neural = run(open_streams(folder, "tune")[1][0], lambda p, *_: p)[0]
    base = final()[0]
    print(f"model {neural:.4f}, learned {base:.4f} ({base - neural:+.4f})", flush=True)
    names = ("log odds", "inverse rank", "log distance", "in the window")
    trials = {
        f"without {n}": dict(gather=without(*range(i * C, i * C + C))) for i, n in enumerate(names)
    }
    trials |= {
        "without the distance to the top": dict(gather=without(4 * C)),
        "without the top": dict(gather=without(4 * C + 1)),
    }
    trials |= {f"NGRAM_RECENT={m}": dict(ngram_recent=m) for m in (1, 2, 8, 16)}
    trials |= {f"NGRAM_ORDER={m}": dict(ngram_order=m) for m in (3, 4, 6)}
    trials |= {f"MIXER_BLOCK={m}": dict(size=m) for m in (256, 1024, 4096)}
    trials |= {f"MIXER_LR={r}": dict(rate=r) for r in (0.0, 3e-4, 3e-3, 1e-2)}
    trials |= {f"{h} hidden units": dict(hidden=h) for h in (8, 16, 64)}
    trials |= {f"{n} tokens of calibration": dict(calib_tokens=n) for n in (32_768, 131_072)}
    for label, changes in trials.items():
        bpb, seconds, _ = final(**changes)
        print(f"{label:<40} {bpb - base:+.4f} {seconds:6.1f} s", flush=True)


def scale(*counts):
    """Seconds and bytes a token after so many tokens of training text, with record's mixer settings and one fixed
    stand-in distribution; linking, mixing, committing and learning in blocks of 2,048 on one thread."""
    cfg = replace(
        train_gpt.config_from_env({**os.environ, "PRESET": "bench"}),
        ngram_hash_bits=26,
        mixer_block=2048,
    )
    table = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)[0]
    _, leading, boundary = table.byte_tables
    history, mixer = NgramHistory(cfg, leading | boundary, "cpu"), new_mixer(cfg, 2048, 1e-3)
    counts, files = sorted(map(int, counts)), train_gpt.list_shards(cfg, "train")
    tokens = np.concatenate([train_gpt.read_shard(f, cfg.vocab_size) for f in files])[
        : counts[-1] + 1
    ]
    tokens = torch.from_numpy(tokens.astype(np.int64))
    p = (
        torch.bincount(tokens, minlength=cfg.vocab_size)
        .double()
        .add(1)
        .div(len(tokens))
        .expand(2048, -1)
    )
    seconds, before, done, bits = 0.0, 0.0, 0, 0.0  # of this thread, others do not count
    for start in range(0, counts[-1] - 2047, 2048):
        began = time.thread_time()
        history.extend(tokens[: start + 2048])
        ends = history.occurrences(at := torch.arange(start, start + 2048))
        found = train_gpt.gather_evidence(
            p, ends, history.tokens[ends + 1].long(), at, (at - 512).clamp(min=0)
        )
        q = mixer.mix(p, *found)
        bits += code_bits(q, tokens[start + 1 : start + 2049]).sum().item()
        mixer.waiting = {0: [[*found, q.gather(1, found[0]), at + 1]]}
        mixer.learn(tokens)
        seconds += time.thread_time() - began
        if start + 4096 > counts[0]:
            size = start + 2048
            held = sum(
                t.numel() * t.element_size() for t in (history.tokens, history.prev, history.heads)
            )
            heads = history.heads.numel() * 4
            print(
                f"{size:>12,} tokens: {1e6 * (seconds - before) / (size - done):.1f} us a token since the last line, "
                f"{(held - heads) / size:.1f} B a token + {heads / 1e9:.2f} GB of heads, {bits / size:.3f} bits a token",
                flush=True,
            )
            before, done = seconds, size
            counts.pop(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    {"record": record, "table": table, "ablate": ablate, "scale": scale}[command](*arguments)
