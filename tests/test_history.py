"""What the mixer knows and what is committed: n-gram history, mixing, integers, each against a plain second writing."""

import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import tiny_config

from train_gpt import TOTAL, NgramHistory, commit, mix_entropy

CPU = torch.device("cpu")
LENGTHS = (
    8,
    5,
    3,
    2,
    1,
)  # of the contexts, in the order in which they stand; the word's comes last
BEGINS = np.isin(
    np.arange(8), (0, 6)
)  # of the eight tokens in most of these streams, those that begin a word


# ----------------------------------------------------------------------------------------------------------
# History, written a second time: a dictionary from context to the list of all positions where it ended
# ----------------------------------------------------------------------------------------------------------


def naive_context(tokens, end, kind, order, begins):
    """The tokens of a context that ends at `end`, newest first, as far as the stream or, for kind 5, the word goes."""
    context = []
    for token in tokens[: end + 1][::-1][: min((*LENGTHS, 8)[kind], order - 1)]:
        context.append(token)
        if kind == 5 and begins[token]:
            break
    return tuple(context)


def naive_occurrences(tokens, order, recent, begins, slots=None):
    """For positions 0..n-1 of a list of tokens, six lists each: where its contexts ended before, newest first.
    With `slots`, {(kind, end): slot}, only the last `recent` ends of a slot are looked at; the others are -1."""
    before, rows = [defaultdict(list) for _ in range(6)], [[[]] * 6]
    for end in range(len(tokens) - 1):
        rows.append([])
        for kind, seen in enumerate(before):
            context = naive_context(tokens, end, kind, order, begins)
            key = slots[kind, end] if slots else context
            rows[-1].append([e if c == context else -1 for e, c in seen[key][::-1][:recent]])
            seen[key].append((end, context))
    return rows


def padded(rows, recent):
    """Lists of occurrences as an array (n, 6, recent), with -1 where there are none."""
    return np.array([[ends + [-1] * (recent - len(ends)) for ends in row] for row in rows])


def naive_counts(tokens, vocab_size, cfg, begins):
    """(counts (n, V), context length used (n,)) of the longest context, not the word's, that has MIN_COUNT; or 0."""
    counts, used = (
        np.zeros((len(tokens), vocab_size), dtype=np.int64),
        np.zeros(len(tokens), dtype=np.int64),
    )
    for position, row in enumerate(
        naive_occurrences(tokens, cfg.ngram_order, cfg.ngram_recent, begins)
    ):
        for length, ends in zip(LENGTHS, row):
            if len(ends) >= cfg.min_count:
                used[position] = min(length, cfg.ngram_order - 1)
                for end in ends:
                    counts[position, tokens[end + 1]] += 1
                break
    return counts, used


def new_history(order, recent, begins=BEGINS, bits=20):
    """An empty history."""
    return NgramHistory(
        tiny_config(ngram_order=order, ngram_recent=recent, min_count=1, ngram_hash_bits=bits),
        begins,
        CPU,
    )


def occurrences(tokens, order, recent, blocks, ahead=0, begins=BEGINS, bits=20):
    """(n, 6, recent) of a history: blocks of the given sizes in turn, linked up to `ahead` tokens beyond the block."""
    history, stream = new_history(order, recent, begins, bits), torch.from_numpy(np.asarray(tokens))
    parts, start, linked = [torch.full((1, 6, recent), -1)], 1, 0
    for number in range(len(tokens)):
        stop = min(start + blocks[number % len(blocks)], len(tokens))
        if stop > start:
            linked = max(linked, min(stop - 1 + ahead * (number % 3), len(tokens)))
            history.extend(stream[:linked])
            history.extend(stream[: stop - 1])  # known already
            assert history.size == linked
            parts.append(history.occurrences(torch.arange(start - 1, stop - 1)))
        start = stop
    return torch.cat(parts).numpy()


def few_words(n, vocab_size=8, seed=0):
    """A stream of n tokens over a small vocabulary that says some strings again and again, with runs of one token."""
    random = np.random.default_rng(seed)
    words = [random.integers(0, vocab_size, random.integers(1, 14)) for _ in range(9)]
    words += [np.full(11, 3), np.full(5, 0), np.tile([1, 2], 6)]
    return np.concatenate([words[i] for i in random.integers(0, len(words), n)])[:n]


@pytest.mark.parametrize(
    "order, recent", [(2, 4), (3, 4), (4, 3), (5, 2), (6, 4), (8, 1), (9, 4), (10, 16), (30, 5)]
)
def test_occurrences_equal_a_dictionarys(order, recent):
    """At every position, in blocks of irregular sizes, every kind of context has its last occurrences, newest first."""
    tokens = few_words(420, seed=order)
    expected = padded(naive_occurrences(tokens.tolist(), order, recent, BEGINS), recent)
    assert (expected[:, :, -1] >= 0).any(0).all()
    for blocks, ahead in (((1, 1, 2, 29, 3, 64, 17), 0), ((50, 7), 80), ((420,), 0)):
        np.testing.assert_array_equal(occurrences(tokens, order, recent, blocks, ahead), expected)


def test_occurrences_by_hand():
    """A text of four words: each context's ends, newest first, the longest cut to three tokens by the order, the word's
    last."""
    #         0  1  2  3  4  5  6  7  8  9 10 11        0 and 6 begin a word
    tokens = [0, 1, 2, 6, 1, 2, 0, 1, 2, 3, 6, 1]
    history = new_history(4, 3)
    history.extend(torch.tensor(tokens))
    assert history.occurrences(torch.tensor([8]))[0].tolist() == [[2, -1, -1]] * 3 + [
        [5, 2, -1],
        [5, 2, -1],
        [2, -1, -1],
    ]
    assert history.occurrences(torch.tensor([11]))[0].tolist() == [[-1] * 3] * 3 + [
        [4, -1, -1],
        [7, 4, 1],
        [4, -1, -1],
    ]
    assert (history.occurrences(torch.tensor([0])) == -1).all() and history.occurrences(
        torch.arange(12)
    ).shape == (12, 6, 3)


def test_a_words_context_is_no_n_gram():
    """It holds however the words before it differ, goes no further back than eight tokens and not beyond a word."""
    words = (
        [6, 1, 2],
        [0, 3, 3, 3],
        [0, 3],
        [6, 1, 2],
        [6, 4] + [5] * 9,
        [0],
        [0, 1, 4] + [5] * 9,
        [6, 1, 2],
    )
    tokens = sum(words, [])
    rows = occurrences(tokens, 10, 2, (5, 11))
    assert rows[-1, 5].tolist() == [10, 1]  # after 6 1, to come: 2
    assert rows[-1, 4].tolist() == [25, 10] and (rows[-1, :3] == -1).all()
    assert (
        rows[len(tokens) - 3, 5].tolist() == rows[len(tokens) - 3, 0].tolist() == [34, 22]
    )  # eight fives
    plain = occurrences(tokens, 10, 2, (5, 11), begins=np.ones(8, dtype=bool))
    np.testing.assert_array_equal(
        plain[:, 5], plain[:, 4]
    )  # every token a word: the last token is the context


@pytest.mark.parametrize("recent", [1, 3, 16])
def test_a_context_looks_at_its_last_occurrences(recent):
    """A long repeat is followed back to the limit of recent occurrences and no further, runs of one token too."""
    tokens = np.concatenate([np.tile(np.arange(7), 25), np.tile([5, 6, 6], 20), np.full(60, 2)])
    expected = padded(naive_occurrences(tokens.tolist(), 9, recent, BEGINS), recent)
    np.testing.assert_array_equal(occurrences(tokens, 9, recent, (13, 40)), expected)
    assert expected[174, 0].tolist() == list(
        range(173 - 7, 173 - 7 - 7 * recent, -7)
    )  # the 25th time round
    assert expected[-1, 4].tolist() == list(range(len(tokens) - 3, len(tokens) - 3 - recent, -1))


@pytest.mark.parametrize("bits", [1, 3, 5, 20])
def test_hash_collisions_hide_but_never_invent(bits):
    """A slot's last ends that have the very context are found, wherever blocks are cut; without collisions, all are."""
    tokens, recent = few_words(300, seed=4), 4
    history = new_history(9, recent, bits=bits)
    history.extend(torch.from_numpy(tokens))
    slots = history.hashes(torch.arange(300).expand(6, -1))
    assert slots.min() >= 0 and slots.max() < 1 << bits == history.heads.size(1)
    slots = {
        (kind, end): slot for kind, row in enumerate(slots.tolist()) for end, slot in enumerate(row)
    }
    expected = padded(naive_occurrences(tokens.tolist(), 9, recent, BEGINS, slots), recent)
    exact = padded(naive_occurrences(tokens.tolist(), 9, recent, BEGINS), recent)
    for blocks in ((1, 30, 9), (70,)):
        np.testing.assert_array_equal(
            occurrences(tokens, 9, recent, blocks, 40, bits=bits), expected
        )
    assert (expected == exact).all() == (bits == 20)
    gaps = (expected[:, :, 0] < 0) & (expected[:, :, 1:] >= 0).any(2)
    assert gaps.any() == (
        bits < 20
    )  # the newest of a slot is another context's, an older one is real


def test_hashes_tell_contexts_apart():
    """Contexts of few tokens, in any order, spread over the slots as random numbers do; equal ones share theirs."""
    rows = torch.cartesian_prod(*[torch.arange(9)] * 4)
    history = new_history(5, 4, np.zeros(9, dtype=bool), 13)
    history.extend(rows.flatten())
    slots = history.hashes(torch.arange(3, rows.numel(), 4).expand(6, -1))
    assert torch.equal(slots[0], slots[1]) and torch.equal(slots[0], slots[5])  # four tokens each
    for kind, tokens in ((0, 4), (2, 3), (3, 2), (4, 1)):
        expected = 1 - math.exp(-(9**tokens) / 8192)  # of the slots are taken
        assert len(slots[kind].unique()) == pytest.approx(expected * 8192, rel=0.03), kind
        assert len(slots[kind].view(9**tokens, -1).unique()) == len(slots[kind].unique())
        assert len(slots[kind].view(-1, 9**tokens)[0].unique()) == len(slots[kind].unique())


def test_a_long_stream_keeps_everything():
    """Thousands of tokens, a few or a thousand at a time: nothing is lost when arrays grow, old text is found."""
    random, begins = np.random.default_rng(1), np.arange(40) < 9
    tokens = random.integers(0, 40, 3000)
    tokens[2000:2900] = tokens[500:1400]
    history = new_history(6, 3, begins)
    history.extend(torch.from_numpy(tokens))
    slots = history.hashes(torch.arange(3000).expand(6, -1))
    slots = {
        (kind, end): slot for kind, row in enumerate(slots.tolist()) for end, slot in enumerate(row)
    }
    expected = padded(naive_occurrences(tokens.tolist(), 6, 3, begins, slots), 3)
    assert (expected[2010:2900, 1, 0] == np.arange(509, 1399)).mean() > 0.99
    for blocks in ((7, 100), (1100,)):
        np.testing.assert_array_equal(occurrences(tokens, 6, 3, blocks, begins=begins), expected)


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (200,)])
def test_the_stream_may_begin_with_any_block(sizes):
    """A first block shorter than the longest context links as any other, token by token too."""
    tokens = few_words(90, seed=7)
    expected = padded(naive_occurrences(tokens.tolist(), 10, 16, BEGINS), 16)
    np.testing.assert_array_equal(occurrences(tokens, 10, 16, sizes), expected)


def test_linking_ahead_does_not_leak():
    """Position t's occurrences are the same whatever follows t - 1, when all of it is linked before t is predicted."""
    tokens = few_words(240, seed=9)
    for position in range(100, 164):
        seen = set()
        for seed in range(3):
            other = np.concatenate([tokens[:position], few_words(240 - position, seed=100 + seed)])
            history = new_history(9, 4, bits=14)
            for linked in (100, 164, 240):
                history.extend(torch.from_numpy(other[:linked]))
            ends = history.occurrences(torch.arange(99, 163))[position - 100]
            assert ends.max() < position - 1
            seen.add(tuple(ends.flatten().tolist() + history.tokens[ends + 1].flatten().tolist()))
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
    return {
        name: torch.from_numpy(p / p.sum(1, keepdims=True))
        for name, p in {
            "uniform": np.ones((rows, V)),
            "one-hot": one_hot,
            "tiny": tiny,
            "ties": ties,
            "softmax": np.exp(random.normal(0, 3, (rows, V))),
            "peaked": np.exp(random.normal(0, 30, (rows, V))),
            "on a unit": np.stack(
                [random.multinomial(TOTAL - V, random.dirichlet(np.ones(V))) for _ in range(rows)]
            ),
        }.items()
    }


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
        for p in map(
            distributions(V, seed=V).get, ("uniform", "tiny", "ties", "softmax", "peaked")
        ):
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
# Mixing by entropy
# ----------------------------------------------------------------------------------------------------------


def naive_mix(p, counts, base, span, center):
    """The mixture of one row in Python's floats: alpha grows with the entropy of p; without counts, p."""
    entropy = -sum(x * math.log(x) for x in p if x)
    alpha = base + span / (1 + math.exp(-2 * (entropy - center))) if sum(counts) else 0.0
    return [(1 - alpha) * x + alpha * c / max(sum(counts), 1) for x, c in zip(p, counts)]


def followers(rows, contexts=6, recent=4):
    """(ends, following), each (R, C, M): of each row, {context: tokens that followed it or None}, at made-up places."""
    ends, following = torch.full((2, len(rows), contexts, recent), -1)
    following[:] = 5  # where nothing ended, a token that must not count
    for r, row in enumerate(rows):
        for context, tokens in row.items():
            for slot, token in enumerate(tokens):
                if token is not None:
                    ends[r, context, slot], following[r, context, slot] = 100 - slot, token
    return ends, following


@pytest.mark.parametrize(
    "base, span, center", [(0.0, 0.3, 3.0), (0.2, 0.55, 3.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)]
)
def test_mixture_equals_the_formula(base, span, center):
    """(1 - alpha) p + alpha counts / total, of the longest context that has MIN_COUNT, for flat and sharp p."""
    ends, following = followers(
        [
            {0: [9], 2: [7, 8, 7], 4: [1, 2, 3, 4]},
            {0: [5, 5, 5, 5], 1: [6, 6]},
            {4: [None, 3, None, 0], 5: [2, 2, 2]},
            {0: [1], 5: [9, 9, 9, 9]},
        ]
    )
    by_hand = {
        1: [{9: 1}, {5: 4}, {3: 1, 0: 1}, {1: 1}],
        2: [{7: 2, 8: 1}, {5: 4}, {3: 1, 0: 1}, {}],
        3: [{7: 2, 8: 1}, {5: 4}, {}, {}],
        4: [{1: 1, 2: 1, 3: 1, 4: 1}, {5: 4}, {}, {}],
    }
    for name, p in distributions(64).items():
        for min_count, counts in by_hand.items():
            cfg = tiny_config(
                alpha_base=base, alpha_range=span, alpha_center=center, min_count=min_count
            )
            mixed = mix_entropy(p, ends, following, cfg)
            assert mixed.dtype == torch.float64
            for row, q, count in zip(mixed.tolist(), p.tolist(), counts):
                c = [count.get(token, 0) for token in range(64)]
                assert row == pytest.approx(
                    naive_mix(q, c, base, span, center), rel=1e-9, abs=1e-12
                ), (name, min_count)
                assert sum(row) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("order, min_count", [(2, 1), (5, 2), (10, 3)])
def test_the_mixture_of_a_stream(order, min_count):
    """From the history's occurrences, at every position: the formula on counts of a dictionary's occurrences."""
    cfg = tiny_config(ngram_order=order, ngram_recent=5, min_count=min_count, alpha_base=0.1)
    tokens, p = (
        few_words(300, seed=order),
        torch.softmax(torch.randn(299, 8, dtype=torch.float64) * 2, -1),
    )
    history = new_history(order, 5)
    history.extend(torch.from_numpy(tokens))
    ends = history.occurrences(torch.arange(299))
    mixed = mix_entropy(p, ends, history.tokens[ends + 1].long(), cfg)
    counts, used = naive_counts(tokens.tolist(), 8, cfg, BEGINS)
    assert set(used) == {0, *(min(length, order - 1) for length in LENGTHS)}
    for row, q, c in zip(mixed.tolist(), p.tolist(), counts[1:].tolist()):
        assert row == pytest.approx(
            naive_mix(q, c, 0.1, cfg.alpha_range, cfg.alpha_center), rel=1e-9
        )


def test_mixture_without_weight_is_the_model():
    """ALPHA_BASE = ALPHA_RANGE = 0, or no occurrence at all, returns p itself, to the last bit."""
    some, none = followers([{4: [3]}] * 4), followers([{}] * 4)
    for p in distributions(64).values():
        assert torch.equal(
            mix_entropy(p, *some, tiny_config(alpha_base=0.0, alpha_range=0.0, min_count=1)), p
        )
        assert torch.equal(mix_entropy(p, *none, tiny_config(alpha_base=0.3, min_count=1)), p)
        assert not torch.equal(mix_entropy(p, *some, tiny_config(alpha_base=0.1, min_count=1)), p)


def test_the_gate_sees_the_model_alone():
    """Whatever has followed, alpha is the same: the mixture is affine in the n-gram share."""
    p, alphas = distributions(64)["softmax"], []
    cfg = tiny_config(alpha_base=0.1, alpha_range=0.4, alpha_center=2.0)
    for seed in range(4):
        tokens = np.random.default_rng(seed).integers(0, 64, (len(p), 4)).tolist()
        share = (
            torch.stack([torch.bincount(torch.tensor(t), minlength=64) for t in tokens]).double()
            / 4
        )
        mixed = mix_entropy(p, *followers([{seed: t} for t in tokens]), cfg)
        alphas.append((mixed - p).mul(share - p).sum(1) / (share - p).square().sum(1))
    for alpha in alphas:
        torch.testing.assert_close(alpha, alphas[0], atol=1e-9, rtol=0)
    assert alphas[0].std() > 0.001
