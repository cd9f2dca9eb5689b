"""Quantizer fisher, level coder, their artifacts, and artifacts that were made to do harm."""

import decimal
import functools
import itertools
import json
import lzma
import math
import struct
import tracemalloc
from dataclasses import asdict, replace
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import constriction
import numpy as np
import pytest
import torch
from conftest import (
    HERE,
    TABLE,
    WALK_CFG,
    WALK_STREAM,
    refusal,
    same,
    sharp_weights,
    tiny_config,
    tiny_stream,
    unpacked,
    warm_model,
    write_shards,
)

import train_gpt
from train_gpt import (
    CLASSES,
    LANES,
    LEVEL_MAX,
    LEVELS,
    Artifact,
    Config,
    UsageError,
    UserError,
    level_classes,
    level_frequencies,
    mean_exponents,
    new_mixer_weights,
    new_model,
    new_steps,
    pack_artifact,
    read_artifact,
    role,
    round_levels,
    step_sizes,
    unit,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- Level coder: frequencies --------------------------------------------------------------------

LOWEST, HIGHEST = -40, 24  # classes
SIZES = abs(np.arange(-LEVEL_MAX, LEVEL_MAX + 1))  # |level| of each symbol


def frequencies():
    """The frequencies of all classes, int64 (classes, LEVELS)."""
    return level_frequencies()[0].astype(np.int64).reshape(-1, LEVELS)


def test_frequencies_of_a_class_are_complete():
    """They sum to 2^24, with at least 1 for each level; sums before are those of all classes."""
    freqs, starts = level_frequencies()
    assert frequencies().shape == (len(CLASSES), 2 * LEVEL_MAX + 1)
    assert (frequencies().sum(1) == 1 << 24).all()
    assert freqs.min() >= 1
    assert np.array_equal(np.append(0, np.cumsum(freqs))[:-1], starts)


def test_frequencies_are_symmetric_and_fall():
    """But for what the most frequent level gets besides: it is 0, or one of its equals."""
    freqs = frequencies()
    best = freqs.argmax(1)
    odd = freqs != freqs[:, ::-1]
    for number, row in enumerate(odd):
        assert set(np.flatnonzero(row)) <= {best[number], LEVELS - 1 - best[number]}
    plain = freqs.copy()
    plain[np.arange(len(freqs)), best] = freqs[np.arange(len(freqs)), LEVELS - 1 - best]
    plain[:, LEVEL_MAX] = plain.max(1)  # its own mirror
    assert np.array_equal(plain, plain[:, ::-1])
    assert (np.diff(plain[:, LEVEL_MAX:], axis=1) <= 0).all()


def test_mean_of_a_class_is_what_it_says():
    """Mean |level|, without the 1 that every level gets, is within 3.5 % of the class's mean.

    Except where levels beyond LEVEL_MAX would count, or where all but 0 is rarer than 2^-9.
    """
    ideal = frequencies() - 1
    means = (ideal * SIZES).sum(1) / ideal.sum(1)
    expected = 2.0 ** (CLASSES.numpy() / 4)
    kept = (expected > 2.0**-9) & (expected < LEVEL_MAX / 4)
    assert kept.sum() == 59
    np.testing.assert_allclose(means[kept], expected[kept], rtol=0.035)


@pytest.mark.parametrize("size", [0.001, 0.01, 0.1, 0.3, 1, 3, 10, 50])
def test_gaussian_levels_cost_their_entropy(size):
    """A class predicts a Gaussian of its mean, rounded to integers, within 0.5 % and .0005 bits."""
    edges = np.arange(-LEVEL_MAX, LEVEL_MAX + 2) - 0.5

    def shares(deviation):
        below = np.array([math.erf(edge / deviation / 2**0.5) for edge in edges])
        return np.diff(below) / 2

    low, high = 1e-2, 1e3
    while high / low > 1 + 1e-12:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if shares(middle) @ SIZES < size else (low, middle)
    p = shares(low)
    entropy = -(p * np.log2(np.where(p > 0, p, 1))).sum()
    nearest = abs(2.0 ** (CLASSES.numpy() / 4) / size - 1).argmin()
    cost = p @ (24 - np.log2(frequencies()[nearest]))
    assert entropy < cost + 1e-12
    assert cost < 1.005 * entropy + 0.0005


GOLDEN_CLASSES = [-40, -13, 0, 7, 15, 24]


def exact_frequencies(number):
    """The frequencies of a class, in decimal arithmetic from the description's formulas."""
    D = decimal.Decimal
    with decimal.localcontext(prec=50):
        pi = D("3.14159265358979323846264338327950288419716939937511")
        v = D(2) ** (D(-number) / 2)  # 1 / m^2
        theta = (1 + v * (2 / pi + v / 5) / (1 + v / 20)).ln() / 2
        shares = []
        for q in range(LEVEL_MAX + 1):
            steps = (256 * theta * q * q).to_integral_value(decimal.ROUND_HALF_EVEN)
            share = D(2) ** 38 * (-steps / 256).exp()
            shares.append(int(share))
    total = shares[0] + 2 * sum(shares[1:])
    freqs = [share * (2**24 - 511) // total + 1 for share in shares]
    row = [*freqs[:0:-1], *freqs]
    row[row.index(max(row))] += 2**24 - sum(row)
    return row


@pytest.mark.parametrize("number", GOLDEN_CLASSES)
def test_frequencies_are_the_descriptions(number):
    """In 50 digits they are the same integers."""
    found = frequencies()[number - LOWEST].tolist()
    assert found == exact_frequencies(number)


GOLDEN = {  # {class: frequencies of the levels -3 to 3}
    -40: [1, 1, 8181, 16760346, 8181, 1, 1],
    0: [366801, 1587098, 3822150, 5123220, 3822150, 1587098, 366801],
    7: [1233241, 1413918, 1540800, 1583536, 1540800, 1413918, 1233241],
    24: [83559, 83559, 83559, 83559, 83559, 83559, 83559],
}


def test_golden_frequencies():
    """What an artifact's reader must find on every machine, forever; version 2 says so."""
    middle = slice(LEVEL_MAX - 3, LEVEL_MAX + 4)
    found = {n: frequencies()[n - LOWEST][middle].tolist() for n in (-40, 0, 7, 24)}
    assert found == GOLDEN


def test_no_frequency_hangs_on_a_last_bit():
    """Logarithms of two machines may differ by 1e-15; all roundings are further from a tie."""
    v = 2.0 ** (-CLASSES.double() / 2)[:, None]
    theta = (1 + v * (2 / math.pi + v / 5) / (1 + v / 20)).log() / 2
    steps = 256 * theta * torch.arange(LEVEL_MAX + 1) ** 2
    steps = steps[steps < 256 * math.log(2.0**39)]  # beyond, all shares are 0
    assert ((steps % 1) - 0.5).abs().min() > 1e-6


# ---- Level coder: words --------------------------------------------------------------------------


def classes_of(levels):
    """The class numbers of levels, int64 (R, C), as an artifact gives them."""
    return level_classes(*mean_exponents(torch.from_numpy(levels)))


def scaled_levels(rows, columns, size, seed=0):
    """Rounded Gaussians (rows, columns) whose rows and columns have random scales about `size`."""
    random = np.random.default_rng(seed)
    scales = size * np.exp(random.normal(0, 0.7, (rows, 1)) + random.normal(0, 0.5, columns))
    return np.rint(random.normal(0, scales)).astype(np.int64)


def level_cases():
    """{name: levels int64 (R, C)}."""
    random = np.random.default_rng(1)
    cases = {
        "gaussian": scaled_levels(40, 64, 3.0),
        "rare": scaled_levels(64, 64, 0.1),
        "fine": scaled_levels(32, 32, 60.0),
        "one": np.array([[1]]),
        "one, large": np.array([[-1_000_000]]),
        "none": np.array([[0]]),
        "constant": np.full((16, 24), 5),
        "constant, negative": np.full((9, 7), -1),
        "zeros": np.zeros((31, 33), np.int64),
        "zeros but one": np.zeros((64, 64), np.int64),
        "edges": random.choice([-LEVEL_MAX, LEVEL_MAX, LEVEL_MAX - 1, 1 - LEVEL_MAX], (12, 20)),
        "beyond edges": random.choice([-LEVEL_MAX - 1, LEVEL_MAX + 1, LEVEL_MAX], (12, 20)),
        "huge": random.integers(-1_000_000, 1_000_001, (24, 16)),
        "huge among small": scaled_levels(40, 50, 0.5),
        "rows of zeros": scaled_levels(20, 30, 4.0),
        "largest word": np.array([[2**32 - 1 + LEVEL_MAX, 0, -(2**31)]]),
    }
    cases["zeros but one"][17, 5] = 300
    cases["huge among small"][::7, ::11] *= 1_000_000
    cases["rows of zeros"][::3] = 0
    cases["rows of zeros"][:, ::5] = 0
    for size in (2, 127, 128, 129, 255, 384, 96, 1009):
        cases[f"size {size}"] = scaled_levels(1, size, 2.0, seed=size)
    return cases


LEVEL_CASES = level_cases()


def encode_levels(levels, classes):
    """The script's words, uint32 (n,)."""
    return np.frombuffer(train_gpt.encode_levels(levels, classes), "<u4")


def decode_levels(words, classes):
    """The script's levels of such words."""
    return train_gpt.decode_levels(words.tobytes(), classes)


@pytest.mark.parametrize("name", LEVEL_CASES)
def test_levels_come_back(name):
    """All levels are decoded from words and class numbers alone."""
    levels = LEVEL_CASES[name]
    classes = classes_of(levels)
    words = encode_levels(levels.ravel(), classes)
    found = decode_levels(words, classes)
    assert found.dtype == np.int64
    assert np.array_equal(found, levels.ravel())


@pytest.mark.parametrize("seed", range(3))
def test_levels_come_back_under_any_classes(seed):
    """However wrong the classes are: a level's cost is all that they decide."""
    random = np.random.default_rng(seed)
    levels = np.rint(random.standard_cauchy(3000) * 5).astype(np.int64)
    classes = random.integers(0, len(CLASSES), 3000)
    assert np.array_equal(decode_levels(encode_levels(levels, classes), classes), levels)


def scalar_words(levels, classes):
    """The words of levels, by integers of Python, one level at a time."""
    freqs = frequencies()
    starts = np.cumsum(freqs, 1) - freqs
    words = [abs(q) - LEVEL_MAX for q in levels if abs(q) >= LEVEL_MAX]
    states = [1 << 32] * LANES
    padding = -len(levels) % LANES
    items = [*zip(levels, classes), *[(0, 0)] * padding]
    turns = [items[i : i + LANES] for i in range(0, len(items), LANES)]
    for turn in turns[::-1]:
        written = []
        for lane, (level, number) in enumerate(turn):
            symbol = min(max(level, -LEVEL_MAX), LEVEL_MAX) + LEVEL_MAX
            freq, start = int(freqs[number, symbol]), int(starts[number, symbol])
            if states[lane] >= freq << 40:
                written.append(states[lane] & 0xFFFFFFFF)
                states[lane] >>= 32
            states[lane] = states[lane] // freq * 2**24 + states[lane] % freq + start
        words = written + words
    return [s >> 32 for s in states] + [s & 0xFFFFFFFF for s in states] + words


def scalar_levels(words, classes):
    """Levels from words, by integers of Python, one level at a time."""
    freqs = frequencies()
    starts = np.cumsum(freqs, 1) - freqs
    states = [high << 32 | low for high, low in zip(words[:LANES], words[LANES : 2 * LANES])]
    at = 2 * LANES
    levels = []
    padded = [*classes, *[0] * (-len(classes) % LANES)]
    for first in range(0, len(padded), LANES):
        for lane, number in enumerate(padded[first : first + LANES]):
            slot = states[lane] % 2**24
            symbol = int(np.searchsorted(starts[number], slot, "right")) - 1
            freq, start = int(freqs[number, symbol]), int(starts[number, symbol])
            states[lane] = freq * (states[lane] >> 24) + slot - start
            if states[lane] < 1 << 32:
                states[lane] = states[lane] << 32 | words[at]
                at += 1
            levels.append(symbol - LEVEL_MAX)
    levels = levels[: len(classes)]
    for i, level in enumerate(levels):
        if abs(level) == LEVEL_MAX:
            levels[i] += words[at] if level > 0 else -words[at]
            at += 1
    assert states == [1 << 32] * LANES
    assert at == len(words)
    return levels


@pytest.mark.parametrize("name", ["gaussian", "zeros but one", "huge", "size 129", "one, large"])
def test_words_are_those_of_the_description(name):
    """A coder that takes one level at a time writes the same words, and reads them."""
    levels = LEVEL_CASES[name]
    classes = classes_of(levels)
    words = encode_levels(levels.ravel(), classes)
    assert words.tolist() == scalar_words(levels.ravel().tolist(), classes.tolist())
    assert scalar_levels(words.tolist(), classes.tolist()) == levels.ravel().tolist()


def predicted_bits(levels, classes):
    """Sum of -log2(frequency / 2^24) of levels within +-LEVEL_MAX."""
    return (24 - np.log2(frequencies()[classes, levels.ravel() + LEVEL_MAX])).sum()


@pytest.mark.parametrize("name", ["gaussian", "rare", "fine", "constant", "zeros", "rows of zeros"])
def test_size_is_that_of_constriction(name):
    """As many bytes as constriction's range coder under the same frequencies, but for the lanes."""
    levels = np.tile(LEVEL_CASES[name], (4, 1)).clip(-LEVEL_MAX + 1, LEVEL_MAX - 1)
    classes = classes_of(levels)
    other = constriction.stream.queue.RangeEncoder()
    for number in np.unique(classes):
        weights = frequencies()[number] - 1.0  # its model gives each symbol 1 of 2^24 more
        model = constriction.stream.model.Categorical(weights, perfect=False)
        chosen = levels.ravel()[classes == number] + LEVEL_MAX
        other.encode(chosen.astype(np.int32), model)
    theirs = 4 * len(other.get_compressed())
    ours = 4 * len(encode_levels(levels.ravel(), classes))
    assert -8 <= theirs - predicted_bits(levels, classes) / 8 <= 16
    assert abs(ours - theirs - 6 * LANES) <= 2 * LANES + 16  # a state: 8 bytes, 4 of them used


@pytest.mark.parametrize("size, most", [(0.2, 1.02), (1.0, 1.01), (2.0, 1.01), (5.0, 1.01)])
def test_size_is_the_entropy_of_the_classes(size, most):
    """Within 1 %, or 2 % of half a bit, where rows and columns have scales; less without them."""
    levels = scaled_levels(256, 512, size).clip(1 - LEVEL_MAX, LEVEL_MAX - 1)
    classes = classes_of(levels)

    def entropy(part):
        counts = np.unique(part, return_counts=True)[1]
        return -(counts * np.log2(counts / counts.sum())).sum()

    by_class = sum(entropy(levels.ravel()[classes == number]) for number in np.unique(classes))
    bits = predicted_bits(levels, classes)
    words = encode_levels(levels.ravel(), classes)
    assert abs(len(words) - bits / 32 - 1.5 * LANES) < 0.5 * LANES
    assert bits < most * by_class
    assert bits < 0.97 * entropy(levels)


@pytest.mark.parametrize("name", ["gaussian", "rare", "fine", "rows of zeros"])
def test_class_is_the_product_of_means(name):
    """A row's mean times a column's over the matrix's, rounded twice to quarter octaves."""
    levels = LEVEL_CASES[name]
    sizes = abs(levels)
    with np.errstate(divide="ignore"):
        octaves = np.log2(np.outer(sizes.mean(1), sizes.mean(0)) / sizes.mean())
    expected = (4 * octaves).clip(LOWEST, HIGHEST)
    found = classes_of(levels).reshape(levels.shape) + LOWEST
    assert abs(found - expected).max() <= 1 + 1e-9
    assert len(np.unique(found)) > 5


def test_classes_hold_at_the_ends_of_int8():
    """Exponents of a stranger, as low or high as an int8 can be, give classes that exist."""
    ends = torch.tensor([-128, 127, 0, -128, 127], dtype=torch.int8)
    classes = level_classes(ends, ends)
    assert (classes.min(), classes.max()) == (0, len(CLASSES) - 1)
    assert len(classes) == 25


def test_means_of_zeros_are_the_least():
    """Zeros have exponents, those of the first class, on every machine."""
    levels = torch.zeros(3, 5, dtype=torch.int64)
    assert [part.tolist() for part in mean_exponents(levels)] == [[-127] * 3, [-127] * 5]
    levels[1, 2] = 8
    rows, columns = mean_exponents(levels)
    assert rows.tolist() == [-127, 3, -127]  # 8 / 5 is 2^(2.7 / 4)
    assert columns.tolist() == [-127, -127, 9, -127, -127]  # 5 is 2^(9.3 / 4)


def test_zeros_cost_nothing_but_the_states():
    """All lanes serve a size that is no multiple of them, and zeros fill up the last turn."""
    for size in (1, 127, 1001, 4096):
        classes = np.zeros(size, np.int64)
        assert len(encode_levels(classes, classes)) == 2 * LANES


@pytest.mark.parametrize("name", ["gaussian", "huge among small", "size 129"])
def test_wrong_words_are_refused(name):
    """Cut, longer, or with a bit flipped: ValueError, or other levels; nothing else."""
    levels = LEVEL_CASES[name].ravel()
    classes = classes_of(LEVEL_CASES[name])
    words = encode_levels(levels, classes)
    for cut in {0, 1, LANES, 2 * LANES - 1, 2 * LANES, len(words) - 1} - {len(words)}:
        with pytest.raises(ValueError):
            decode_levels(words[:cut], classes)
    with pytest.raises(ValueError, match="do not end where"):
        decode_levels(np.append(words, words[-1:]), classes)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = words.copy()
        damaged[random.integers(len(words))] ^= np.uint32(1 << random.integers(32))
        try:
            assert not np.array_equal(decode_levels(damaged, classes), levels)
        except ValueError:
            refused += 1
    assert refused > 20


# ---- Steps and GPTQ ------------------------------------------------------------------------------


def test_powers_are_exact():
    """2^(k/2) for every k: exact where it is rational, else rounded as IEEE says."""
    ks = torch.arange(-127, 128).to(torch.int8)
    steps = step_sizes(ks, ks[127:128], 1.0)
    assert (steps.dtype, steps.shape) == (torch.float64, (255, 1))
    assert torch.equal(step_sizes(ks[127:128], ks, 1.0), steps.T)
    with decimal.localcontext(prec=80):
        for k, power in zip(ks.tolist(), steps.flatten().tolist()):
            if k % 2 == 0:
                assert Fraction(power) == Fraction(2) ** (k // 2)
            else:
                assert power == float((decimal.Decimal(2) ** k).sqrt())


def test_exponents_of_rows_and_columns_add_up():
    """A step is the coarseness times a power of sqrt(2)."""
    rows = torch.tensor([-3, 0, 4], dtype=torch.int8)
    columns = torch.tensor([2, -2], dtype=torch.int8)
    powers = [[0.5**0.5, 0.03125**0.5], [2.0, 0.5], [8.0, 2.0]]
    expected = [[0.3 * power for power in row] for row in powers]
    assert step_sizes(rows, columns, 0.3).tolist() == expected


@functools.cache
def correlated(columns, seed=0):
    """(Hessian, factor of its inverse), float64 (C, C), of strongly correlated columns."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((columns, columns)) * 0.3 + np.ones(columns)
    inputs = random.standard_normal((4 * columns, columns)) @ mixing
    hessian = inputs.T @ inputs / len(inputs) + 0.05 * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    return hessian, torch.from_numpy(factor.copy())


def gptq_problem(columns, hessian_factor, seed=0):
    """(w (R, C), exponents of rows, of columns, factor, coarseness)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(24, columns, generator=generator)
    rows = torch.randint(-3, 4, (24,), generator=generator).to(torch.int8)
    scales = torch.randint(-2, 3, (columns,), generator=generator).to(torch.int8)
    return w, rows, scales, hessian_factor, 0.4


def steps_of(rows, columns, coarseness):
    """Steps (R, C) by numpy."""
    return coarseness * np.exp2(rows.numpy() / 2)[:, None] * np.exp2(columns.numpy() / 2)


def reference_levels(w, steps, hessian):
    """Levels by Frantar et al.'s rule, one weight at a time, the inverse Hessian shrinking.

    After column i is rounded, its error moves the columns that are left, and i leaves the Hessian.
    """
    w = w.double().numpy().copy()
    levels = np.zeros(w.shape, np.int64)
    inverse = np.linalg.inv(hessian)
    R, C = w.shape
    for i in range(C):
        for r in range(R):
            levels[r, i] = np.rint(w[r, i] / steps[r, i])
            error = w[r, i] - levels[r, i] * steps[r, i]
            for j in range(i + 1, C):
                w[r, j] -= error * inverse[i, j] / inverse[i, i]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return levels


@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_the_papers(seed):
    """The same levels as by explicit error feedback with an inverse Hessian that shrinks."""
    hessian, factor = correlated(20, seed)
    w, rows, columns, factor, coarseness = problem = gptq_problem(20, factor, seed)
    levels = round_levels(*problem)
    assert levels.dtype == torch.int64
    expected = reference_levels(w, steps_of(rows, columns, coarseness), hessian)
    assert np.array_equal(levels.numpy(), expected)


def test_gptq_with_a_diagonal_hessian_is_nearest_rounding():
    """Columns that do not meet in the loss have nothing to make up for."""
    factor = torch.diag(torch.linspace(0.5, 2.0, 30).double())
    w, rows, columns, _, coarseness = problem = gptq_problem(30, factor)
    nearest = np.rint(w.double().numpy() / steps_of(rows, columns, coarseness))
    assert np.array_equal(round_levels(*problem).numpy(), nearest)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_lowers_the_quadratic_error(seed):
    """Of correlated columns, tr(E H E') falls to less than half of nearest rounding's."""
    hessian, factor = correlated(20, seed)
    w, rows, columns, _, coarseness = problem = gptq_problem(20, factor, seed)
    steps = steps_of(rows, columns, coarseness)

    def error(levels):
        E = levels * steps - w.double().numpy()
        return np.trace(E @ hessian @ E.T)

    nearest = np.rint(w.double().numpy() / steps)
    assert error(round_levels(*problem).numpy()) < 0.5 * error(nearest)


# ---- Fisher information --------------------------------------------------------------------------

CFG = tiny_config(quantizer="fisher")
SMALL_CFG = replace(CFG, num_layers=2, ve_layers="1", xsa_last_n=1, ttt_freeze_blocks=1)
HELD_OUT = tiny_stream(400)
NO_TEXT = np.zeros(0, np.int64)


def all_finite(weights):
    """Whether all tensors are finite."""
    return all(w.isfinite().all() for w in weights.values())


def packed(model, steps, coarseness=2.0**-12, cfg=SMALL_CFG):
    """An artifact's bytes of a model and a new mixer."""
    weights = {**model.state_dict(), "mixer": new_mixer_weights()}
    return pack_artifact(weights, cfg, TABLE, coarseness, steps)


def brute_force(model, held_out):
    """{name: (mean g^2 (R,) by the sum over columns, mean G'G)}, before damping, by numpy."""
    rows = model.cfg.train_seq_len
    tokens = held_out
    count = (len(tokens) - 1) // rows
    sums = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and role(name) != "vector":
            square = (p.detach().double().numpy() ** 2).mean(1)
            energy = 1e-5 / rows / count / (square + 0.01 * square.mean())
            sums[name] = [energy, energy.sum() * np.eye(p.shape[1])]
    for number in range(count):
        text = torch.from_numpy(tokens[number * rows : (number + 1) * rows + 1])
        model.zero_grad()
        logs = model(text[None, :-1])[0].log_softmax(1)
        (-sum(logs[t, text[t + 1]] for t in range(rows))).backward()
        for name, p in model.named_parameters():
            if name in sums:
                g = p.grad.double().numpy()
                sums[name][0] += (g**2).sum(1) / (rows * count)
                sums[name][1] += g.T @ g / (rows * count)
    model.zero_grad()
    return sums


def test_steps_are_those_of_gradients_one_by_one():
    """Exponents and factors are those of each sequence's own gradient, damped as described."""
    model = warm_model(SMALL_CFG)
    held_out = HELD_OUT[: 5 * 32 + 20]  # five sequences, and a part of one
    steps = new_steps(model, held_out, math.inf)
    expected = brute_force(model, held_out)
    assert steps.keys() == expected.keys()
    for name, (rows, columns, factor) in steps.items():
        energy, gram = expected[name]
        energy = energy + 0.02 * energy.mean()
        gram = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
        row_steps = 2 * np.log2(np.sqrt(energy.sum() / energy))
        upper = np.linalg.cholesky(np.linalg.inv(gram)).T
        column_steps = 2 * np.log2(np.diag(upper))
        assert (rows.dtype, columns.dtype) == (torch.int8, torch.int8)
        assert abs(rows.numpy() - row_steps).max() < 0.501, name
        assert abs(columns.numpy() - column_steps).max() < 0.501, name
        np.testing.assert_allclose(factor.numpy(), upper, rtol=0, atol=1e-3 * upper.max())


def test_steps_are_of_all_that_is_stored_as_levels():
    """Matrices, tables and projections; what is not a matrix has none."""
    model = warm_model(SMALL_CFG)
    names = {name for name in model.state_dict() if role(name) != "vector"}
    assert new_steps(model, HELD_OUT, math.inf).keys() == names
    assert names >= {"embed.tokens", "embed.bigram_proj", "blocks.1.mlp_out", "ve_table"}


def equal_steps(a, b):
    """Whether two results of new_steps are equal to the last bit."""
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name]))


def test_no_more_than_48_sequences_are_read():
    """Text beyond the 48th changes nothing; the 48th counts, the last token included."""
    model = warm_model(replace(SMALL_CFG, train_seq_len=8))
    text = tiny_stream(60 * 8)
    whole = new_steps(model, text, math.inf)
    assert equal_steps(whole, new_steps(model, text[: 48 * 8 + 1], math.inf))
    assert not equal_steps(whole, new_steps(model, text[: 48 * 8], math.inf))


@pytest.mark.parametrize("tokens", [0, 1, 32])
def test_text_without_a_sequence_is_no_text(tokens):
    """A sequence and the token after it are the least; below, steps are as without text."""
    model = warm_model(SMALL_CFG)
    none = new_steps(model, NO_TEXT, math.inf)
    assert equal_steps(none, new_steps(model, HELD_OUT[:tokens], math.inf))
    assert not equal_steps(none, new_steps(model, HELD_OUT[:33], math.inf))


def test_the_clock_ends_the_reading(monkeypatch):
    """A sequence is begun up to end_s; what is read by then counts as if there were no more."""
    model = warm_model(replace(SMALL_CFG, train_seq_len=8))
    text = tiny_stream(60 * 8)
    for read in (0, 1, 5):
        monkeypatch.setattr(train_gpt, "perf_counter", itertools.count(100.0).__next__)
        ended = new_steps(model, text, 99.0 + read)
        assert equal_steps(ended, new_steps(model, text[: read * 8 + 1], math.inf))


def test_steps_without_text_follow_the_rows():
    """In proportion to a row's root mean square, within the grid's half octave and the damping."""
    model = warm_model(SMALL_CFG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if role(name) != "vector":
                p.mul_(2 ** torch.linspace(-1, 1, len(p))[:, None])
    for name, (rows, columns, _) in new_steps(model, NO_TEXT, math.inf).items():
        octaves = model.get_parameter(name).detach().double().square().mean(1).log2() / 2
        ratio = rows.double() / 2 - octaves
        assert ratio.max() - ratio.min() < 1.0, name
        assert octaves.max() - octaves.min() > 1.8, name
        assert (columns == columns[0]).all(), name


ZEROS = {
    "a row of the token table": ["embed.tokens"],
    "rows of all": [],
    "queries": ["blocks.1.q"],
    "values": ["blocks.0.v"],
    "an MLP": ["blocks.1.mlp_in", "blocks.1.mlp_out"],
    "a new model's": None,
}


@pytest.mark.parametrize("name", ZEROS)
@pytest.mark.parametrize("held_out", [HELD_OUT, NO_TEXT], ids=["text", "no text"])
def test_zeros_give_finite_steps_and_weights(name, held_out):
    """Rows and tensors of zeros come back as zeros, and spoil nothing else."""
    chosen = ZEROS[name]
    model = warm_model(SMALL_CFG) if chosen is not None else new_model(SMALL_CFG, HERE)
    with torch.no_grad():
        for zero in chosen or ():
            p = model.get_parameter(zero)
            p[5 if zero == "embed.tokens" else slice(None)] = 0
        if name.startswith("a row"):
            model.embed.tokens[int(held_out[7]) if len(held_out) else 0] = 0
            model.embed.bigrams.zero_()
        if name == "rows of all":
            for key, p in model.named_parameters():
                if role(key) != "vector":
                    p[1::3] = 0
    steps = new_steps(model, held_out, math.inf)
    assert all(factor.isfinite().all() for _, _, factor in steps.values())
    weights = unpacked(packed(model, steps)).weights
    assert all_finite(weights)
    for key in steps:
        exact = model.get_parameter(key).detach()
        zeros = (exact == 0).all(1) & (held_out is NO_TEXT)  # with text, GPTQ may move them
        assert not weights[key][zeros].any(), key
        if not exact.any():
            assert not weights[key].any(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unit_of_zeros_is_zero(dtype):
    """And so is its gradient; other rows have length 1 as before."""
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2] = 0
    x.requires_grad_()
    y = unit(x)
    assert y.dtype == dtype
    assert not y[2].any()
    y.double().pow(3).sum().backward()
    assert not x.grad[2].any()
    assert x.grad.isfinite().all()
    norms = torch.linalg.vector_norm(x.detach().double(), dim=1, keepdim=True)
    expected = x.detach().double() / norms
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-6
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[kept].double(), expected[kept], atol=tolerance, rtol=0)


def test_a_token_of_zeros_does_not_stop_the_learning():
    """Where TTT meets a row that is quantized to zeros, other tokens learn as well as before."""

    def bits(zero):
        weights = {name: w.clone() for name, w in sharp_weights(WALK_CFG).items()}
        weights["embed.bigrams"].zero_()
        if zero:
            weights["embed.tokens"][WALK_STREAM[5]] = 0
        plan = train_gpt.new_plan(WALK_CFG)
        predictor = train_gpt.Predictor(weights, TABLE, WALK_CFG, HERE, plan)
        for _ in train_gpt.walk(predictor, torch.from_numpy(WALK_STREAM)):
            pass
        return predictor.bits["ttt"]

    assert bits(zero=True) < 1.02 * bits(zero=False)


# ---- KL of a trained model -----------------------------------------------------------------------

TEXT = tiny_stream(12_000, seed=3)
SEQUENCES = torch.from_numpy(TEXT[9600:12_000].reshape(-1, 32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model, trained on TEXT's start, its steps from the text after it, and its cfg."""
    folder = tmp_path_factory.mktemp("trained")
    write_shards(folder, [TEXT[:8000]])
    cfg = replace(
        CFG,
        data_path=str(folder),
        iterations=40,
        warmdown_iters=15,
        train_batch_tokens=512,
        micro_batch_tokens=512,
    )
    model = new_model(cfg, HERE)
    train_gpt.train(model, cfg, HERE, lambda line: None, 0)
    steps = new_steps(model, TEXT[8000:9600], math.inf)
    weights = {**model.state_dict(), "mixer": new_mixer_weights()}
    return SimpleNamespace(cfg=cfg, model=model, weights=weights, steps=steps)


def logs_of(weights, cfg):
    """Log-probabilities, float64, after each token of SEQUENCES."""
    with torch.no_grad():
        return new_model(cfg, HERE, weights, "float64")(SEQUENCES).log_softmax(-1)


def divergence(exact, weights, cfg):
    """Mean KL, nats a token, of quantized weights to exact ones."""
    p, q = logs_of(exact, cfg), logs_of(weights, cfg)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def count_levels(steps):
    """Number of weights that are stored as levels."""
    return sum(len(rows) * len(columns) for rows, columns, _ in steps.values())


@pytest.mark.parametrize("octave", [-14, -12, -10])
def test_divergence_is_predicted(trained, octave):
    """Measured KL is within a factor of 2 of count * coarseness^2 / 24 of fine steps."""
    coarseness = 2.0**octave
    data = pack_artifact(trained.weights, trained.cfg, TABLE, coarseness, trained.steps)
    found = divergence(trained.weights, unpacked(data).weights, trained.cfg)
    expected = count_levels(trained.steps) * coarseness**2 / 24
    assert expected / 2 < found < 2 * expected


def fitted(trained, lines=None, budget=800_000, **changes):
    """fit_artifact's bytes of the trained model for an artifact of at most `budget` bytes."""
    limit = budget + train_gpt.CODE_BYTES
    if "target_kl" in changes:
        changes |= dict(mixer="learned", mixer_calibration_tokens=trained.cfg.train_seq_len)
    cfg = replace(trained.cfg, size_limit_bytes=limit, **changes)
    log = [].append if lines is None else lines.append
    steps = trained.steps if cfg.quantizer == "fisher" else {}
    return train_gpt.fit_artifact(trained.weights, cfg, TABLE, log, steps)


@pytest.mark.parametrize("target", [1e-5, 1e-4, 1e-3, 1e-2])
def test_target_is_met(trained, target):
    """TARGET_KL is what the artifact's steps promise; measured it is within half of that."""
    lines = []
    data = fitted(trained, lines, target_kl=target)
    assert len(lines) <= 2
    found = divergence(trained.weights, unpacked(data).weights, trained.cfg)
    assert target / 2 < found < 1.5 * target


def test_cap_is_stronger_than_the_target(trained):
    """Where the steps that TARGET_KL allows do not fit, coarser ones fill the cap."""
    budget = 20_000
    data = fitted(trained, budget=budget, target_kl=1e-6)
    assert 0.998 * budget <= len(data) <= budget
    assert len(fitted(trained, target_kl=1e-6)) > 1.5 * budget


@pytest.mark.parametrize("target", [1e-30, 1e-300, 5e-324])
def test_target_beyond_all_sense_takes_the_finest(trained, target):
    """Levels stay such as words can hold, whatever TARGET_KL is."""
    data = fitted(trained, target_kl=target)
    finest = train_gpt.COARSENESS["fisher"][0]
    assert data[52:] != b""
    stored = unpacked(data)
    expected = pack_artifact(trained.weights, trained.cfg, TABLE, finest, trained.steps)
    assert same(stored.weights, unpacked(expected).weights)
    assert divergence(trained.weights, stored.weights, trained.cfg) < 1e-6


def test_target_without_fisher_is_refused():
    """QUANTIZER=int6 has no KL to aim at: one line with the setting and the way out."""
    message = refusal(Config, quantizer="int6", target_kl=0.001, kind=UsageError)
    assert message == "TARGET_KL=0.001: takes QUANTIZER=fisher and held-out text"


@pytest.mark.parametrize(
    "change",
    [
        dict(mixer_calibration_tokens=0),
        dict(mixer_calibration_tokens=SMALL_CFG.train_seq_len - 1),
    ],
)
def test_target_without_text_is_refused(change):
    """Steps by RMS know nothing of the loss: a target would make zeros of all levels."""
    own = asdict(SMALL_CFG) | dict(target_kl=0.001, mixer_calibration_tokens=1000) | change
    assert "held-out text" in refusal(Config, **own, kind=UsageError)


@pytest.mark.parametrize("mixer", ["learned", "entropy", "none"])
def test_target_is_for_every_mixer(mixer):
    """Fisher has held-out text whatever follows the model."""
    own = asdict(SMALL_CFG) | dict(target_kl=0.001, mixer_calibration_tokens=1000, mixer=mixer)
    assert Config(**own).target_kl == 0.001


@pytest.mark.parametrize("budget", [14_000, 18_000, 24_000, 32_000])
def test_fisher_fills_its_cap(trained, budget):
    """To 99.8 % where a coarseness does; six tries at most."""
    lines = []
    data = fitted(trained, lines, budget)
    assert 0.998 * budget <= len(data) <= budget
    assert len(lines) <= 6


@pytest.mark.parametrize("budget", [17_000, 20_000, 24_000, 30_000])
def test_loss_at_equal_bytes_is_below_int6(trained, budget):
    """In the bytes of int6's artifact or fewer, KL is less than a quarter."""
    plain = fitted(trained, budget=budget, quantizer="int6")
    data = fitted(trained, budget=len(plain))
    assert len(data) <= len(plain)
    losses = [divergence(trained.weights, unpacked(d).weights, trained.cfg) for d in (data, plain)]
    assert losses[0] < 0.25 * losses[1]


def test_more_room_is_less_loss(trained):
    """KL falls with every doubling of the bytes above the header's."""
    losses = []
    for budget in (10_000, 15_000, 25_000, 45_000):
        weights = unpacked(fitted(trained, budget=budget)).weights
        losses.append(divergence(trained.weights, weights, trained.cfg))
    assert all(later < 0.3 * earlier for earlier, later in itertools.pairwise(losses))


def test_text_is_worth_its_pass(trained):
    """Steps without statistics fill the same cap with a greater loss."""
    blind = SimpleNamespace(**vars(trained))
    blind.steps = new_steps(trained.model, NO_TEXT, math.inf)
    losses = []
    for run in (trained, blind):
        data = fitted(run, budget=20_000)
        assert len(data) <= 20_000
        losses.append(divergence(trained.weights, unpacked(data).weights, trained.cfg))
    assert losses[0] < 0.5 * losses[1]


# ---- Container -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A warm model of two layers, its steps, and its artifact's bytes with both quantizers."""
    model = warm_model(SMALL_CFG)
    steps = new_steps(model, HELD_OUT, math.inf)
    weights = {**model.state_dict(), "mixer": new_mixer_weights()}
    data = {
        "fisher": pack_artifact(weights, SMALL_CFG, TABLE, 2.0**-10, steps),
        "int6": pack_artifact(weights, replace(SMALL_CFG, quantizer="int6"), TABLE, 8.0),
    }
    return SimpleNamespace(model=model, steps=steps, weights=weights, data=data)


def test_weights_are_levels_times_steps(small):
    """Parameters that are stored as levels come back as level x row's step x column's, in fp32."""
    found = unpacked(small.data["fisher"]).weights
    assert found.keys() == small.weights.keys()
    for name, w in small.weights.items():
        if name in small.steps:
            rows, columns, factor = small.steps[name]
            levels = round_levels(w, rows, columns, factor, 2.0**-10).numpy()
            powers = [np.sqrt(np.ldexp(1.0, k.numpy())) for k in (rows, columns)]
            exact = levels * (2.0**-10 * powers[0][:, None]) * powers[1]
            expected = torch.from_numpy(exact.astype(np.float32))
        else:
            expected = w.half().float()
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected), name


def raw_of(data):
    """(JSON header, what follows it) of an artifact."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26, "lc": 0, "lp": 0, "pb": 0}]
    raw = lzma.decompress(data[52:], format=lzma.FORMAT_RAW, filters=filters)
    at = 3 + int.from_bytes(raw[:3])
    return json.loads(raw[3:at]), raw[at:]


def test_artifact_is_what_its_description_says(small):
    """A reader written from the description, one level at a time, finds the same weights."""
    header, payload = raw_of(small.data["fisher"])
    found = unpacked(small.data["fisher"]).weights
    at = 0

    def take(dtype, *shape):
        nonlocal at
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at += size
        return np.frombuffer(payload[at - size : at], dtype).reshape(shape)

    coded = []
    for name, kind, shape in header["tensors"]:
        if kind == "fp16":
            assert np.array_equal(take("<f2", *shape).astype("f4"), found[name].numpy()), name
        else:
            assert kind == "levels"
            row_steps, row_means = take("i1", 2, shape[0]).astype(int)
            column_steps, column_means = take("i1", 2, shape[1]).astype(int)
            steps = (
                header["coarseness"] * 2.0 ** (row_steps[:, None] / 2) * 2.0 ** (column_steps / 2)
            )
            numbers = np.clip(row_means[:, None] + column_means, LOWEST, HIGHEST) - LOWEST
            coded.append((name, steps, numbers))
    classes = np.concatenate([numbers.ravel() for _, _, numbers in coded]).tolist()
    words = np.frombuffer(payload[at:], "<u4").tolist()
    levels = np.array(scalar_levels(words, classes))
    for name, steps, _ in coded:
        part, levels = np.split(levels, [steps.size])
        np.testing.assert_allclose(
            found[name].numpy(), part.reshape(steps.shape) * steps, rtol=1e-6, err_msg=name
        )


def test_same_model_gives_the_same_bytes(small):
    """Nothing in an artifact depends on when or in which order it was made."""
    model = warm_model(SMALL_CFG)
    steps = new_steps(model, HELD_OUT, math.inf)
    weights = {**model.state_dict(), "mixer": new_mixer_weights()}
    turned = dict(reversed(weights.items()))
    again = pack_artifact(turned, SMALL_CFG, TABLE, 2.0**-10, dict(reversed(steps.items())))
    assert again == small.data["fisher"]
    other = warm_model(SMALL_CFG, seed=1)
    assert packed(other, new_steps(other, HELD_OUT, math.inf), 2.0**-10) != again


@pytest.mark.parametrize("name", ["blocks.1.q", "embed.tokens", "ve_proj", "blocks.0.mix_x"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameter_that_is_not_finite_is_not_packed(small, name, value):
    """NaN or infinity in a tensor of any kind refuses and names the parameter."""
    weights = {key: w.clone() for key, w in small.weights.items()}
    weights[name].view(-1)[3] = value
    assert name in refusal(pack_artifact, weights, SMALL_CFG, TABLE, 2.0**-10, small.steps)


@pytest.mark.parametrize("quantizer", ["int6", "fisher"])
def test_model_is_built_from_an_artifact(small, quantizer):
    """A new model of an artifact's weights has them to the last bit, and predicts."""
    artifact = unpacked(small.data[quantizer])
    assert artifact.settings["quantizer"] == quantizer
    model = new_model(SMALL_CFG, HERE, artifact.weights)
    del artifact.weights["mixer"]
    assert same(model.state_dict(), artifact.weights)
    assert model(SEQUENCES[:2]).isfinite().all()


def written(rt, folder, held_out):
    """(digest, weights) of the artifact that this rank has when a run is finished."""
    cfg = replace(SMALL_CFG, log_dir=folder, run_id="r", verify_enabled=False)
    rt.notes = ("cpu",)
    run = train_gpt.Run(cfg, rt, "train")
    run.table = TABLE
    artifacts = []
    stand_ins = {
        "calibrate": lambda run, weights, *_: weights["mixer"],
        "evaluate_artifact": lambda run, artifact, *_: artifacts.append(artifact),
    }
    with mock.patch.multiple(train_gpt, **stand_ins):
        train_gpt.finish(run, warm_model(cfg), train_gpt.TrainResult(1, 1, 1.0), held_out)
    return artifacts[0].digest, artifacts[0].weights


@pytest.mark.parametrize("held_out", [HELD_OUT, NO_TEXT], ids=["text", "no text"])
def test_artifact_is_written_with_and_without_text(tmp_path, held_out):
    """It is on disk, under the cap, and the same as was read back."""
    digest, weights = written(train_gpt.Runtime(), str(tmp_path), held_out)
    artifact = read_artifact(tmp_path / "r" / "model.int6.lzma")
    assert artifact.digest == digest
    assert same(artifact.weights, weights)
    assert artifact.size_bytes + train_gpt.CODE_BYTES <= SMALL_CFG.size_limit_bytes


@pytest.mark.parametrize("quantizer, seconds", [("fisher", 7.0), ("int6", 3.0)])
@pytest.mark.parametrize("limit_s, end_s", [(100.0, 1059.5), (0.0, math.inf)])
def test_what_reads_text_counts_as_training(
    monkeypatch, tmp_path, quantizer, seconds, limit_s, end_s
):
    """Gradients (4 s), then calibration (3 s), by 99.5 % of the limit; packing (2 s) is apart.

    Training, 40 s, ended when the clock was at 1000 s: with 99.5 s allowed, the end is 1059.5.
    """
    clock = [1000.0]
    ends = []

    def lasting(seconds, result):
        def stand_in(*_):
            clock[0] += seconds
            return result

        return stand_in

    def new_steps(model, held_out, end_s):
        ends.append((clock[0], end_s))
        clock[0] += 4
        return {}

    def calibrate(run, weights, held_out, end_s):
        ends.append((clock[0], end_s))
        clock[0] += 3
        return weights["mixer"]

    cfg = replace(
        SMALL_CFG,
        log_dir=str(tmp_path),
        run_id="r",
        quantizer=quantizer,
        max_wallclock_seconds=limit_s,
    )
    run = train_gpt.Run(cfg, train_gpt.Runtime(notes=("cpu",)), "train")
    run.table = TABLE
    model = warm_model(cfg)
    data = pack_artifact(model.state_dict() | {"mixer": new_mixer_weights()}, cfg, TABLE, 8.0)
    monkeypatch.setattr(train_gpt, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train_gpt, "new_steps", new_steps)
    monkeypatch.setattr(train_gpt, "calibrate", calibrate)
    monkeypatch.setattr(train_gpt, "fit_artifact", lasting(2, data))
    monkeypatch.setattr(train_gpt, "evaluate_artifact", lasting(9, None))
    monkeypatch.setattr(train_gpt, "verify", lasting(9, None))
    train_gpt.finish(run, model, train_gpt.TrainResult(1, 1, 40.0), HELD_OUT)
    reads = [(1000.0, end_s), (1004.0, end_s)] if quantizer == "fisher" else [(1000.0, end_s)]
    assert ends == reads
    assert run.results["train"]["calibration_seconds"] == seconds
    assert run.results["train"]["quantize_seconds"] == 2


@pytest.mark.slow
def test_two_ranks_write_one_artifact(run_ranks, tmp_path):
    """Each rank has the same weights, those of a lone rank."""
    digest, weights = written(train_gpt.Runtime(), str(tmp_path / "alone"), HELD_OUT)
    for found in run_ranks(2, written, str(tmp_path / "ranks"), HELD_OUT):
        assert found[0] == digest
        assert same(found[1], weights)


# ---- Artifacts that were made to do harm ---------------------------------------------------------


def sealed(body):
    """A file of this body with the right length and checksum."""
    head = struct.pack("<8sIQ32s", b"PGOLFART", 2, len(body), train_gpt.sha256(body))
    return head + body


def remade(header, payload, length=None):
    """A file of this JSON (bytes, or what json.dumps takes) and payload, compressed anew."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = (len(text) if length is None else length).to_bytes(3) + text + payload
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "lc": 0, "lp": 0, "pb": 0}]
    return sealed(lzma.compress(raw, format=lzma.FORMAT_RAW, filters=filters))


ODD_VALUES = [
    *(0, 1, -1, 2, 3, 33, 255, 2**31, 2**40, 2**63, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, True, False, None),
    *("", "a", "levels", "fp16", "int6", "int8", "nan", "\ud800", "fisher", "1e9"),
    *([], {}, [[]], [0], [2**20, 2**20], [-1, 5], {"a": 1}, [None], [0.5, 2], ["x"]),
]


def places(value, path=()):
    """Yield the paths of all parts of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


def alter_header(header, random):
    """Change one part of a header: another value, none, twice, or in its neighbour's place."""
    header = json.loads(json.dumps(header))
    group = random.choice(["tensors", "tensors", "settings", "tokenizer", "coarseness"])
    paths = list(places(header[group], (group,)))
    *path, last = paths[random.integers(len(paths))]
    parent = functools.reduce(lambda part, key: part[key], path, header)
    odd = ODD_VALUES[random.integers(len(ODD_VALUES))]
    match random.integers(4):
        case 0:
            del parent[last]
        case 1 if isinstance(parent, list):
            parent.insert(last, parent[random.integers(len(parent))])
        case 2 if isinstance(parent[last], int) and not isinstance(parent[last], bool):
            parent[last] = int(parent[last] * random.choice([-1, 0, 2, 4])) + int(
                random.integers(-2, 3)
            )
        case _:
            parent[last] = odd
    return header


def alter_bytes(data, random, first=0):
    """Change a few bytes from `first` on: flipped, cut out, doubled, or extremes of int8."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 30])):
        at = int(random.integers(first, max(len(data), first + 1)))
        size = int(random.choice([1, 1, 2, 4, 64, 1000]))
        match random.integers(5):
            case 0:
                del data[at : at + size]
            case 1:
                data[at:at] = data[at : at + size]
            case 2:
                data[at : at + size] = bytes([random.choice([0, 127, 128, 255])]) * size
            case _:
                part = random.integers(0, 256, size, dtype=np.uint8).tobytes()
                data[at : at + size] = part
    return bytes(data)


def hostile(data, seed):
    """An artifact with a right checksum that differs from `data` where the seed says."""
    random = np.random.default_rng(seed)
    header, payload = raw_of(data)
    text = json.dumps(header).encode()
    match seed % 6:
        case 0:
            return sealed(alter_bytes(data[52:], random))
        case 1:
            return remade(alter_bytes(text, random), payload)
        case 2:
            size = int(random.choice([0, 1, len(text) - 1, len(text) + 1, 2**23, 2**24 - 1]))
            payload = alter_bytes(payload, random)
            return remade(header, payload, size if random.integers(4) == 0 else None)
        case 3:
            return remade(header, payload[: random.integers(len(payload))])
        case _:
            return remade(alter_header(header, random), payload)


def outcome(data):
    """What reading these bytes ends in: an Artifact, or a UserError of one line."""
    try:
        artifact = read_artifact("hostile.lzma", data)
    except UserError as error:
        assert type(error) is UserError
        assert "\n" not in str(error)
        assert "hostile.lzma" in str(error)
        return "refused"
    assert isinstance(artifact, Artifact)
    assert all(w.dtype == torch.float32 for w in artifact.weights.values())
    return "read"


@pytest.mark.parametrize("quantizer", ["int6", "fisher"])
def test_hostile_artifacts_end_in_one_line(small, quantizer):
    """Or in an artifact, as strange as it may be; nothing else is raised."""
    found = [outcome(hostile(small.data[quantizer], seed)) for seed in range(180)]
    assert found.count("refused") > 60
    assert found.count("read") > 5


def test_mutations_start_from_what_is_read(small):
    """Compressed anew without a change, both artifacts give the same weights."""
    for data in small.data.values():
        again = read_artifact("again", remade(*raw_of(data)))
        assert same(again.weights, unpacked(data).weights)


MOST = 1 << 16
LZMA_BYTES = 1 << 26  # of its dictionary


def claims():
    """{name: (tensors of a header, why they are refused)}: more than MOST weights, or nonsense."""
    large = ["blocks.0.q", "levels", [2048, 2048]]
    many = "more than 65536 weights"
    return {
        "huge": ([large], many),
        "huge fp16": ([["a", "fp16", [1 << 40]]], many),
        "huge int6": ([["a", "int6", [1 << 30, 4]]], many),
        "a little too many": ([["a", "levels", [256, 257]]], many),
        "many": ([[f"{i}", "levels", [128, 128]] for i in range(5)], many),
        "cancelled": ([large, ["b", "fp16", [-(1 << 22)]]], many),
        "not a number": ([large, ["b", "fp16", [math.nan]]], many),
        "infinite": ([large, ["b", "fp16", [-math.inf]]], many),
        "infinite and none": ([large, ["b", "fp16", [math.inf, 0]]], many),
        "a long list": ([large, ["b", "fp16", [[0] * 100, 1 << 26]]], "not 'list'"),
        "a long string": ([large, ["b", "fp16", ["aaaa", 1 << 28]]], "not convert string"),
        "a long number": ([large, ["b", "fp16", [10**400] * 3]], "int too large"),
    }


def refused_within(data, most_bytes):
    """The line that refuses these bytes; assert that numpy and Python allocate few for it."""
    refusal(read_artifact, "hostile.lzma", data)
    tracemalloc.start()
    message = refusal(read_artifact, "hostile.lzma", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LZMA_BYTES + most_bytes
    return message


@pytest.mark.parametrize("name", claims())
def test_claims_take_no_memory(small, monkeypatch, name):
    """Shapes beyond the limit are refused as such, before anything is allocated for them."""
    monkeypatch.setattr(train_gpt, "WEIGHTS_MAX", MOST)
    header, _ = raw_of(small.data["fisher"])
    tensors, why = claims()[name]
    data = remade(header | {"tensors": tensors}, bytes(MOST))
    assert why in refused_within(data, 64 * MOST)


def test_payload_that_compresses_to_nothing_takes_no_memory(small, monkeypatch):
    """No more is decompressed than the weights that are allowed can take."""
    monkeypatch.setattr(train_gpt, "WEIGHTS_MAX", MOST)
    header, _ = raw_of(small.data["fisher"])
    data = remade(header, bytes(1000 * MOST))
    assert len(data) < MOST
    refused_within(data, 64 * MOST)


def test_header_is_parsed_to_its_limit_only():
    """Its length has 3 bytes: lists of nothing take twenty times their text, and no more."""
    text = b"[" + b"[]," * (1 << 23) + b"[]]"
    assert len(text) > 1 << 24
    message = refusal(read_artifact, "hostile.lzma", remade(text, b"", (1 << 24) - 1))
    assert "breaks its format" in message


@pytest.mark.parametrize("kind", ["int6", "int8"])
@pytest.mark.parametrize("shape", [[4000], [100, 1, 100]])
def test_levels_with_scales_are_matrices(small, kind, shape):
    """Other shapes would grow when levels meet their rows' scales."""
    header, _ = raw_of(small.data["fisher"])
    data = remade(header | {"tensors": [["a", kind, shape]]}, bytes(100_000))
    assert "breaks its format" in refusal(read_artifact, "hostile.lzma", data)


def test_settings_are_a_dictionary(small):
    """A list would end in a traceback later."""
    header, payload = raw_of(small.data["fisher"])
    refusal(read_artifact, "hostile.lzma", remade(header | {"settings": [1]}, payload))


@pytest.mark.parametrize("quantizer", ["int6", "fisher"])
def test_every_cut_is_refused(small, quantizer):
    """Wherever the tensors or words end too early, nothing is made up for the rest."""
    header, payload = raw_of(small.data[quantizer])
    cuts = [*range(0, len(payload), 997), len(payload) - 1, len(payload) - 4]
    for cut in cuts:
        refusal(read_artifact, "cut", remade(header, payload[:cut]))


def test_limits_leave_room_for_large_models():
    """Twice the weights of `record` and the largest vocabulary can be read."""
    assert train_gpt.WEIGHTS_MAX > 2 * 27_000_000
    assert 1 << 24 > 65_536 * 6 * 20  # pieces of 20 escaped characters, a header of 3 bytes' length


def test_many_weights_in_few_bytes_are_read_at_once():
    """Sizes that share no divisor with the lanes take as few turns as others."""
    header = {
        "settings": {},
        "coarseness": 1.0,
        "tensors": [["a", "levels", [1023, 1025]]],
        "tokenizer": {"pieces": [], "kinds": "", "bos_id": 0},
    }
    zeros = np.zeros(1023 * 1025, np.int64)
    words = encode_levels(zeros, zeros)
    rows = bytes(1023) + b"\x81" * 1023
    columns = bytes(1025) + b"\x81" * 1025
    data = remade(header, rows + columns + words.tobytes())
    assert len(data) < 1000
    assert not read_artifact("few", data).weights["a"].any()
