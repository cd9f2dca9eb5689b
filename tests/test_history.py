"""N-gram history: what its hash chains find, against a dictionary from context to positions."""

import math

import numpy as np
import pytest
import torch
from conftest import WORD_BEGINS, few_words, new_history
from naive import naive_occurrences, padded


def occurrences(tokens, order, recent, blocks, ahead=0, begins=WORD_BEGINS, bits=20):
    """Return the occurrences (n, 6, recent) that a history finds before each position.

    The stream comes in blocks of the given sizes in turn, linked up to `ahead` tokens beyond each.
    """
    history = new_history(order, recent, begins, bits)
    stream = torch.from_numpy(np.asarray(tokens))
    parts = [torch.full((1, 6, recent), -1)]
    start = 1
    linked = 0
    for number in range(len(tokens)):
        stop = min(start + blocks[number % len(blocks)], len(tokens))
        if stop > start:
            linked = max(linked, min(stop - 1 + ahead * (number % 3), len(tokens)))
            history.extend(stream[:linked])
            history.extend(stream[:linked])  # known already
            assert history.size == linked
            parts.append(history.occurrences(torch.arange(start - 1, stop - 1)))
        start = stop
    return torch.cat(parts).numpy()


def slots_of(history, n):
    """Return {(kind, end): slot} of the n tokens of a history."""
    rows = history.hashes(torch.arange(n).expand(6, -1)).tolist()
    return {(kind, end): slot for kind, row in enumerate(rows) for end, slot in enumerate(row)}


@pytest.mark.parametrize(
    "order, recent", [(2, 4), (3, 4), (4, 3), (5, 2), (6, 4), (8, 1), (9, 4), (10, 16), (30, 5)]
)
def test_occurrences_match_a_dictionary(order, recent):
    """In blocks of irregular sizes every kind of context has its last occurrences, newest first."""
    tokens = few_words(420, seed=order)
    expected = padded(naive_occurrences(tokens.tolist(), order, recent, WORD_BEGINS), recent)
    assert (expected[:, :, -1] >= 0).any(0).all()
    for blocks, ahead in (((1, 1, 2, 29, 3, 64, 17), 0), ((50, 7), 80), ((420,), 0)):
        np.testing.assert_array_equal(occurrences(tokens, order, recent, blocks, ahead), expected)


@pytest.fixture
def four_words():
    """A history of order 4 that looks at 3 occurrences, of a text of four words."""
    #         0  1  2  3  4  5  6  7  8  9 10 11        tokens 0 and 6 begin a word
    tokens = [0, 1, 2, 6, 1, 2, 0, 1, 2, 3, 6, 1]
    history = new_history(4, 3)
    history.extend(torch.tensor(tokens))
    return history


def test_the_repeated_word_of_four_words_is_found_by_every_context(four_words):
    """Contexts of 8, 5 and 3 tokens are all cut to three by the order; the word's stands last."""
    found = four_words.occurrences(torch.tensor([8]))[0].tolist()
    three = [2, -1, -1]
    assert found == [three, three, three, [5, 2, -1], [5, 2, -1], [2, -1, -1]]


def test_the_half_word_of_four_words_is_found_by_short_contexts(four_words):
    """Two tokens occurred once, one token three times, the word's beginning once."""
    found = four_words.occurrences(torch.tensor([11]))[0].tolist()
    none = [-1, -1, -1]
    assert found == [none, none, none, [4, -1, -1], [7, 4, 1], [4, -1, -1]]


def test_the_first_token_occurred_nowhere(four_words):
    """At position 0 every slot is -1."""
    assert (four_words.occurrences(torch.tensor([0])) == -1).all()


def test_occurrences_have_a_row_a_position(four_words):
    """(R, 6 contexts, 3 occurrences) for R positions."""
    assert four_words.occurrences(torch.arange(12)).shape == (12, 6, 3)


# The last token follows 6 1, which has been twice; two words end in nine fives.
WORDS = (
    [6, 1, 2],
    [0, 3, 3, 3],
    [0, 3],
    [6, 1, 2],
    [6, 4] + [5] * 9,
    [0],
    [0, 1, 4] + [5] * 9,
    [6, 1, 2],
)
TEXT = [token for word in WORDS for token in word]


def test_a_word_is_found_whatever_words_came_before():
    """After 6 1 its context ends where 6 1 ended, though no context of three tokens or more did."""
    last = occurrences(TEXT, 10, 2, (5, 11))[-1]
    assert last[5].tolist() == [10, 1]
    assert last[4].tolist() == [25, 10]  # that of one token is not the word's
    assert (last[:3] == -1).all()


def test_a_word_context_goes_back_eight_tokens_at_most():
    """Of a word that ends in nine fives it holds eight, as the context of eight tokens does."""
    row = occurrences(TEXT, 10, 2, (5, 11))[len(TEXT) - 3]
    assert row[5].tolist() == [34, 22]
    assert row[0].tolist() == [34, 22]


def test_a_word_context_stops_at_the_beginning_of_the_word():
    """Where every token begins a word, the word's context is the last token's."""
    found = occurrences(TEXT, 10, 2, (5, 11), begins=np.ones(8, dtype=bool))
    np.testing.assert_array_equal(found[:, 5], found[:, 4])


@pytest.mark.parametrize("recent", [1, 3, 16])
def test_a_context_looks_at_its_last_occurrences(recent):
    """Long repeats, and runs of one token, are followed back to NGRAM_RECENT and no further."""
    tokens = np.concatenate([np.tile(np.arange(7), 25), np.tile([5, 6, 6], 20), np.full(60, 2)])
    expected = padded(naive_occurrences(tokens.tolist(), 9, recent, WORD_BEGINS), recent)
    np.testing.assert_array_equal(occurrences(tokens, 9, recent, (13, 40)), expected)
    end = 173 - 7  # the 25th time round
    assert expected[174, 0].tolist() == list(range(end, end - 7 * recent, -7))
    end = len(tokens) - 3
    assert expected[-1, 4].tolist() == list(range(end, end - recent, -1))


@pytest.mark.parametrize("bits", [1, 3, 5, 20])
def test_hash_collisions_hide_but_never_invent(bits):
    """A slot's last ends that hold the context are found, wherever blocks are cut.

    With few slots some stay hidden, even the newest of all; with many, none does.
    """
    recent = 4
    tokens = few_words(300, seed=4)
    history = new_history(9, recent, bits=bits)
    history.extend(torch.from_numpy(tokens))
    slots = slots_of(history, 300)
    expected = padded(naive_occurrences(tokens.tolist(), 9, recent, WORD_BEGINS, slots), recent)
    for blocks in ((1, 30, 9), (70,)):
        found = occurrences(tokens, 9, recent, blocks, 40, bits=bits)
        np.testing.assert_array_equal(found, expected)
    exact = padded(naive_occurrences(tokens.tolist(), 9, recent, WORD_BEGINS), recent)
    assert (expected == exact).all() == (bits == 20)
    newest_hidden = (expected[:, :, 0] < 0) & (expected[:, :, 1:] >= 0).any(2)
    assert newest_hidden.any() == (bits < 20)


@pytest.mark.parametrize("bits", [1, 3, 5, 20])
def test_hashes_are_slots(bits):
    """Every hash is one of the 2^NGRAM_HASH_BITS slots of `heads`."""
    history = new_history(9, 4, bits=bits)
    history.extend(torch.from_numpy(few_words(300, seed=4)))
    slots = history.hashes(torch.arange(300).expand(6, -1))
    assert slots.min() >= 0
    assert slots.max() < 1 << bits
    assert history.heads.size(1) == 1 << bits


@pytest.fixture(scope="module")
def slots_of_all_fours():
    """Of 2^13 slots, those (6, 9^4) of the contexts after each string of four of nine tokens."""
    rows = torch.cartesian_prod(*[torch.arange(9)] * 4)
    history = new_history(5, 4, np.zeros(9, dtype=bool), 13)
    history.extend(rows.flatten())
    return history.hashes(torch.arange(3, rows.numel(), 4).expand(6, -1))


@pytest.mark.parametrize("kind", [1, 5])
def test_equal_contexts_share_their_slot(slots_of_all_fours, kind):
    """Contexts of eight and five tokens, and of a word, are the same four tokens at order 5."""
    assert torch.equal(slots_of_all_fours[0], slots_of_all_fours[kind])


@pytest.mark.parametrize("kind, tokens", [(0, 4), (2, 3), (3, 2), (4, 1)])
def test_hashes_spread_like_random_numbers(slots_of_all_fours, kind, tokens):
    """All contexts of 1 to 4 tokens take as many slots as random numbers would."""
    taken = 8192 * (1 - math.exp(-(9**tokens) / 8192))
    assert len(slots_of_all_fours[kind].unique()) == pytest.approx(taken, rel=0.03)


@pytest.mark.parametrize("kind, tokens", [(0, 4), (2, 3), (3, 2), (4, 1)])
def test_hashes_depend_on_nothing_but_the_context(slots_of_all_fours, kind, tokens):
    """The tokens before a context do not change its slot."""
    slots = slots_of_all_fours[kind].view(-1, 9**tokens)
    assert torch.equal(slots, slots[:1].expand_as(slots))


def test_a_long_stream_keeps_everything():
    """Thousands of tokens, a few or a thousand at a time: arrays grow and old text is found."""
    begins = np.arange(40) < 9
    tokens = np.random.default_rng(1).integers(0, 40, 3000)
    tokens[2000:2900] = tokens[500:1400]
    history = new_history(6, 3, begins)
    history.extend(torch.from_numpy(tokens))
    slots = slots_of(history, 3000)
    expected = padded(naive_occurrences(tokens.tolist(), 6, 3, begins, slots), 3)
    assert (expected[2010:2900, 1, 0] == np.arange(509, 1399)).mean() > 0.99
    for blocks in ((7, 100), (1100,)):
        np.testing.assert_array_equal(occurrences(tokens, 6, 3, blocks, begins=begins), expected)


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (200,)])
def test_the_stream_may_begin_with_any_block(sizes):
    """A first block shorter than the longest context links as any other, token by token too."""
    tokens = few_words(90, seed=7)
    expected = padded(naive_occurrences(tokens.tolist(), 10, 16, WORD_BEGINS), 16)
    np.testing.assert_array_equal(occurrences(tokens, 10, 16, sizes), expected)


def test_linking_ahead_does_not_leak():
    """Position t's occurrences do not depend on what follows t - 1, even if it is linked before."""
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
            following = history.tokens[ends + 1]
            seen.add(tuple(ends.flatten().tolist() + following.flatten().tolist()))
        assert len(seen) == 1
