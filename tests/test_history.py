"""What the mixer knows and what is committed: n-gram history, mixing, integers, each against a plain second writing."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_stream

import train_gpt
from train_gpt import TOTAL, HeadTable, NgramHistory, commit, mix_entropy

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------
# History, written a second time: a dictionary from context to the list of all tokens that followed it
# ----------------------------------------------------------------------------------------------------------


def naive_counts(tokens, vocab_size, order, recent, min_count):
    """(counts (n, V), context length used (n,)) for positions 1..n-1 of a list of tokens; row 0 stays empty."""
    followers = defaultdict(list)
    counts, used = np.zeros((len(tokens), vocab_size), dtype=np.int64), np.zeros(len(tokens), dtype=np.int64)
    for position in range(1, len(tokens) + 1):
        for length in range(min(order, position)):  # first learn the token before, then look up
            followers[tuple(tokens[position - 1 - length:position - 1])].append(tokens[position - 1])
        if position < len(tokens):
            used[position] = next(
                length for length in reversed(range(min(order, position + 1))) if length == 0
                or len(followers[tuple(tokens[position - length:position])]) >= min_count)
            seen = followers[tuple(tokens[position - used[position]:position])]
            for token in seen if used[position] < 2 else seen[-recent:]:
                counts[position, token] += 1
    return counts, used


def history_counts(tokens, vocab_size, order, recent, min_count, blocks, ahead=0):
    """NgramHistory's counts (n, V): blocks of the given sizes in turn, linked up to `ahead` tokens beyond the block."""
    history, stream = NgramHistory(vocab_size, order, recent, CPU), torch.from_numpy(np.asarray(tokens))
    parts, start, linked = [torch.zeros(1, vocab_size)], 1, 0
    for number in range(len(tokens)):
        stop = min(start + blocks[number % len(blocks)], len(tokens))
        if stop > start:
            linked = max(linked, min(stop - 1 + ahead * (number % 3), len(tokens)))
            history.extend(stream[:linked])
            parts.append(history.backoff_counts(start, stop, min_count))
        start = stop
    return torch.cat(parts).long().numpy()


def few_words(n, vocab_size=8, seed=0):
    """A stream of n tokens over a small vocabulary that says some strings again and again, with runs of one token."""
    random = np.random.default_rng(seed)
    words = [random.integers(0, vocab_size, random.integers(1, 14)) for _ in range(9)]
    words += [np.full(11, 3), np.full(5, 0), np.tile([1, 2], 6)]
    return np.concatenate([words[i] for i in random.integers(0, len(words), n)])[:n]


@pytest.mark.parametrize("min_count", [1, 2, 3])
@pytest.mark.parametrize("order", [2, 3, 5, 10])
def test_counts_equal_a_dictionarys(order, min_count):
    """At every position, in blocks of irregular sizes, counts are those of the longest context seen often enough."""
    tokens = few_words(420, seed=order)
    expected, used = naive_counts(tokens.tolist(), 8, order, 4, min_count)
    assert set(used) >= set(range(min(order, 6)))  # every context length below 6 was chosen somewhere
    for blocks, ahead in (((1, 1, 2, 29, 3, 64, 17), 0), ((50, 7), 80)):
        np.testing.assert_array_equal(history_counts(tokens, 8, order, 4, min_count, blocks, ahead), expected)


@pytest.mark.parametrize("recent", [1, 3, 16])
def test_long_contexts_look_at_the_last_occurrences(recent):
    """A long repeat is counted up to the limit of recent occurrences; short contexts are counted without a limit."""
    tokens = np.concatenate([np.tile(np.arange(7), 25), np.tile([5, 6, 6], 20), np.full(60, 2)])
    expected, _ = naive_counts(tokens.tolist(), 8, 4, recent, 1)
    np.testing.assert_array_equal(history_counts(tokens, 8, 4, recent, 1, (13, 40)), expected)
    assert expected[174].sum() == recent  # the 25th time round
    dense, _ = naive_counts(tokens.tolist(), 8, 2, recent, 1)
    np.testing.assert_array_equal(history_counts(tokens, 8, 2, recent, 1, (13, 40)), dense)
    assert dense[-1].sum() > 50


@pytest.mark.parametrize("hashed", [
    lambda ends, length: torch.zeros_like(ends), lambda ends, length: ends * 0 - 1,
    lambda ends, length: ends * 0 + 1020 + ends % 3])
def test_hash_collisions_change_nothing(monkeypatch, hashed):
    """With one hash for all contexts (also a negative one, also at the table's end), counts stay exact."""
    tokens = few_words(300, seed=4)
    if hashed(torch.arange(9), 2).unique().numel() > 1:  # a hash must be a function of the context
        monkeypatch.setattr(NgramHistory, "hashes", lambda self, ends, length: hashed(self.tokens[ends], length))
    else:
        monkeypatch.setattr(NgramHistory, "hashes", lambda self, ends, length: hashed(ends, length))
    expected, _ = naive_counts(tokens.tolist(), 8, 4, 4, 2)
    np.testing.assert_array_equal(history_counts(tokens, 8, 4, 4, 2, (1, 30, 9), 40), expected)


def test_tables_grow():
    """Thousands of contexts, added a few or a thousand at a time: no entry is lost when a table moves."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, 40, 3000)
    tokens[2000:2900] = tokens[500:1400]  # a long copy: found only if the old heads survived
    expected, used = naive_counts(tokens.tolist(), 40, 4, 3, 1)
    assert (used[2010:2900] == 3).mean() > 0.9
    for blocks in ((7, 100), (1100,)):
        np.testing.assert_array_equal(history_counts(tokens, 40, 4, 3, 1, blocks), expected)
    history = NgramHistory(40, 4, 3, CPU)
    history.extend(torch.from_numpy(tokens))
    for heads in history.heads:
        distinct = len({tuple(tokens[end - heads.length + 1:end + 1]) for end in range(heads.length - 1, 3000)})
        assert heads.used == distinct == int((heads.slots >= 0).sum()) <= 0.7 * len(heads.slots)
        assert len(heads.slots) > 1024


def test_head_tables_return_the_last_position():
    """swap returns what the last swap of the same context stored, however full the table is."""
    tokens = np.random.default_rng(2).integers(0, 30, 2500)
    history, last = NgramHistory(30, 3, 4, CPU), {}
    history.extend(torch.from_numpy(tokens))
    heads = HeadTable(history, 2)
    for start in range(1, 2500, 97):
        ends = np.arange(start, min(start + 97, 2500))
        ends = ends[np.unique(tokens[ends - 1] * 30 + tokens[ends], return_index=True)[1]]
        found = heads.swap(torch.from_numpy(ends), newest=torch.from_numpy(ends))
        assert found.tolist() == [last.get((tokens[e - 1], tokens[e]), -1) for e in ends]
        last.update({(tokens[e - 1], tokens[e]): e for e in ends})


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (200,)])
def test_the_stream_may_begin_with_any_block(sizes):
    """A first block shorter than the longest context links as any other, token by token too."""
    tokens = few_words(90, seed=7)
    expected, _ = naive_counts(tokens.tolist(), 8, 10, 16, 1)
    np.testing.assert_array_equal(history_counts(tokens, 8, 10, 16, 1, sizes), expected)


def test_linking_ahead_does_not_leak():
    """Position t's counts are the same whatever follows t - 1, when all of it is linked before t is predicted."""
    tokens = few_words(240, seed=9)
    for position in range(100, 164):
        seen = set()
        for seed in range(3):
            other = np.concatenate([tokens[:position], few_words(240 - position, seed=100 + seed)])
            history = NgramHistory(8, 6, 4, CPU)
            for linked in (100, 164, 240):
                history.extend(torch.from_numpy(other[:linked]))
            history.backoff_counts(1, 100, 1)
            seen.add(tuple(history.backoff_counts(100, 164, 1)[position - 100].tolist()))
        assert len(seen) == 1


# ----------------------------------------------------------------------------------------------------------
# Commitment
# ----------------------------------------------------------------------------------------------------------


def distributions(V, rows=4, seed=0):
    """{name: p (R, V)} from flat to one-hot, with ties and with probabilities that are next to nothing."""
    random = np.random.default_rng(seed)
    tiny = np.full((rows, V), 1e-300)
    tiny[:, -1] = 1
    ties = np.tile(np.arange(V) % 2 + 1.0, (rows, 1))
    one_hot = (np.arange(V) == random.integers(0, V, (rows, 1))) * 1.0
    return {name: torch.from_numpy(p / p.sum(1, keepdims=True)) for name, p in {
        "uniform": np.ones((rows, V)), "one-hot": one_hot, "tiny": tiny, "ties": ties,
        "softmax": np.exp(random.normal(0, 3, (rows, V))), "peaked": np.exp(random.normal(0, 30, (rows, V))),
        "on a unit": np.stack([random.multinomial(TOTAL - V, random.dirichlet(np.ones(V))) for _ in range(rows)]),
    }.items()}


@pytest.mark.parametrize("V", [2, 7, 1024, 50_000])
def test_commitments_are_complete(V):
    """int32, each at least 1, rows summing to exactly 2^24, in the order of the probabilities, the same each time."""
    for name, p in distributions(V).items():
        freqs = commit(p)
        assert freqs.dtype == torch.int32 and freqs.shape == p.shape, name
        assert freqs.min() >= 1 and (freqs.long().sum(1) == 1 << 24).all(), name
        assert torch.equal(freqs, commit(p.clone())), name
        for q, f in zip(p, freqs):
            falling = f[q.argsort(descending=True, stable=True)]
            assert falling[0] == f.max() and (falling[1:].diff() <= 0).all(), name


def test_a_token_gets_one_and_its_share_of_the_rest():
    """1 + floor(p * (2^24 - V)) in exact fractions; what the floors leave, less than V, goes to the likeliest token."""
    for V in (2, 7, 64):
        for p in map(distributions(V, seed=V).get, ("uniform", "tiny", "ties", "softmax", "peaked")):
            for q, freqs in zip(p.tolist(), commit(p).tolist()):
                shares = [Fraction(x) / sum(map(Fraction, q)) * (TOTAL - V) for x in q]
                best = max(range(V), key=q.__getitem__)
                for token, (share, freq) in enumerate(zip(shares, freqs)):
                    assert -1 - 1e-6 < freq - 1 - share < (V if token == best else 1e-6)


def test_rounding_costs_next_to_nothing():
    """On plausible distributions over 1,024 tokens the integers cost less than a hundred thousandth of the bits."""
    p = torch.softmax(torch.from_numpy(np.random.default_rng(0).normal(0, 3, (200, 1024))), -1)
    entropy = -(p * p.log2()).sum(1)
    cost = -(p * (commit(p).double() / TOTAL).log2()).sum(1) - entropy
    assert 3 < entropy.mean() < 9 and (cost > -1e-9).all() and cost.mean() < 2e-5 * entropy.mean()


# ----------------------------------------------------------------------------------------------------------
# Mixing
# ----------------------------------------------------------------------------------------------------------


def naive_mix(p, counts, base, span, center):
    """The mixture of one row in Python's floats: alpha grows with the entropy of p."""
    entropy = -sum(x * math.log(x) for x in p if x)
    alpha = base + span / (1 + math.exp(-2 * (entropy - center)))
    return [(1 - alpha) * x + alpha * c / sum(counts) for x, c in zip(p, counts)]


@pytest.mark.parametrize("base, span, center", [(0.0, 0.3, 3.0), (0.2, 0.55, 3.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_mixture_equals_the_formula(base, span, center):
    """(1 - alpha) p + alpha counts / total for flat and sharp p, zeros in p and counts of one or millions."""
    cfg, random = tiny_config(alpha_base=base, alpha_range=span, alpha_center=center), np.random.default_rng(0)
    for name, p in distributions(64).items():
        for scale in (1, 3_000_000):
            counts = torch.from_numpy(random.integers(0, 2, p.shape) * scale + np.eye(64, dtype=int)[:len(p)])
            mixed = mix_entropy(p, counts.float(), cfg)
            assert mixed.dtype == torch.float64
            for row, q, c in zip(mixed.tolist(), p.tolist(), counts.tolist()):
                assert row == pytest.approx(naive_mix(q, c, base, span, center), rel=1e-6, abs=1e-9), name
                assert sum(row) == pytest.approx(1, abs=1e-6)


def test_mixture_without_weight_is_the_model():
    """ALPHA_BASE = ALPHA_RANGE = 0 returns p itself, to the last bit."""
    for p in distributions(64).values():
        counts = torch.ones(p.shape)
        assert torch.equal(mix_entropy(p, counts, tiny_config(alpha_base=0.0, alpha_range=0.0)), p)
        assert not torch.equal(mix_entropy(p, torch.eye(64)[:len(p)], tiny_config(alpha_base=0.1)), p)


def test_the_gate_sees_the_model_alone():
    """Whatever the counts are, alpha is the same: the mixture is affine in the n-gram share."""
    p, cfg = distributions(64)["softmax"], tiny_config(alpha_base=0.1, alpha_range=0.4, alpha_center=2.0)
    alphas = []
    for seed in range(4):
        counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, p.shape)).float()
        share = counts.double() / counts.sum(1, keepdim=True).double()
        alphas.append((mix_entropy(p, counts, cfg) - p).mul(share - p).sum(1) / (share - p).square().sum(1))
    for alpha in alphas:
        torch.testing.assert_close(alpha, alphas[0], atol=1e-6, rtol=0)
    assert alphas[0].std() > 0.001
