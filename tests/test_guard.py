"""The guard between the mixer and text that misleads it: fixed share of two distributions."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import LEARNED_CFG, WALK_STREAM, advance, walker
from naive import naive_commit, naive_guard

from train_gpt import Commitment, new_plan

pytestmark = pytest.mark.usefixtures("one_thread")

TOTAL = 1 << 24
PLAN = new_plan(LEARNED_CFG, "sliding", "unguarded", "mixer")


def commitment_of(model, mixer, start=1):
    """A commitment of frequencies as the guard finds them: lists of rows."""
    tables = {"sliding": torch.tensor(model), "unguarded": torch.tensor(mixer)}
    tables["mixer"] = tables["unguarded"]
    positions = torch.arange(start, start + len(model))
    return Commitment(start, start + len(model), [(positions, tables)])


# ---- By hand and by a second writing -------------------------------------------------------------


def test_weight_moves_to_the_side_that_knew():
    """The mixer gave the token four times as much: 4/5 of 16,368, and 8 more."""
    predictor = walker(LEARNED_CFG, PLAN)
    half = TOTAL // 2
    model, mixer = [[TOTAL // 8, TOTAL - TOTAL // 8]], [[half, half]]
    predictor.judge(commitment_of(model, mixer), torch.tensor([0]))
    assert predictor.trust == [8192, 8 + 16368 * 4 // 5]


def test_weight_stays_where_both_knew_as_much():
    """A half remains a half."""
    predictor = walker(LEARNED_CFG, PLAN)
    rows = [[TOTAL // 4, 3 * TOTAL // 4]] * 3
    predictor.judge(commitment_of(rows, rows), torch.tensor([0, 1, 1]))
    assert predictor.trust == [8192] * 4


def test_weight_never_leaves_its_bounds():
    """However often one side fails altogether: a 2,048th is left to it, and it can come back."""
    predictor = walker(LEARNED_CFG, PLAN)
    sure, lost = [TOTAL - 1, 1], [1, TOTAL - 1]
    predictor.judge(commitment_of([lost] * 9, [sure] * 9), torch.zeros(9, dtype=torch.int64))
    assert predictor.trust[-1] == 16384 - 8 - 1  # floor takes one more
    predictor.judge(commitment_of([sure] * 9, [lost] * 9), torch.zeros(9, dtype=torch.int64))
    assert predictor.trust[-1] >= 8


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("rows_a_step", [1, 3, None])
def test_committed_is_what_a_second_writing_mixes(lanes, rows_a_step):
    """Every integer, whatever the steps, for each lane by itself."""
    plan = plan_of(lanes)
    stop = 97
    tokens = np.append(np.full(lanes, WALK_STREAM[0]), WALK_STREAM[1:])
    step = rows_a_step and rows_a_step * lanes
    predictor = walker(LEARNED_CFG, plan)
    committed = advance(predictor, tokens, stop, step or plan.block)
    targets = tokens[lanes:stop].tolist()
    model, mixer = (committed[stage].tolist() for stage in plan.stages[:2])
    rows, weights = naive_guard(model, mixer, targets, lanes)
    assert committed["mixer"].tolist() == rows
    assert max(weights) - min(weights) > 1000


def plan_of(lanes):
    """The learned mixer's plan in so many lanes."""
    return new_plan(LEARNED_CFG, "sliding", "unguarded", "mixer", lanes=lanes)


# ---- The bound -----------------------------------------------------------------------------------


def best_choices(model_bits, mixer_bits, most):
    """[bits of the best choice of a side at each token with at most k changes], k = 0..most."""
    best = np.array([[0.0] * 2] * (most + 1))
    for costs in zip(model_bits, mixer_bits):
        changed = np.vstack([[math.inf] * 2, best[:-1, ::-1]])
        best = np.minimum(best, changed) + costs
    return best.min(1)


def opinions(kind, n, seed):
    """(model's rows, mixer's rows, targets) of n tokens of a vocabulary of 4."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, 4, n)
    sure = {x: naive_commit([1 << 10 if y == x else 1 for y in range(4)]) for x in range(4)}
    plain = naive_commit([3, 2, 2, 1])
    length = {"teaches, then betrays": 25, "betrays at every other token": 1, "never": n}[kind]
    mixer = [sure[(x + (t // length % 2)) % 4] for t, x in enumerate(targets)]
    return [plain] * n, mixer, targets.tolist()


@pytest.mark.parametrize("kind", ["teaches, then betrays", "betrays at every other token", "never"])
def test_loss_against_any_choice_is_bounded(kind):
    """1 - k log2 s - (n - k) log2(1 - s) bits over the best choice with k changes, k = 0..20."""
    n = 200
    model, mixer, targets = opinions(kind, n, seed=3)
    rows, _ = naive_guard(model, mixer, targets)
    sides = [[24 - math.log2(row[x]) for row, x in zip(side, targets)] for side in (model, mixer)]
    bits = sum(24 - math.log2(row[x]) for row, x in zip(rows, targets))
    s = 8 / 16384
    slack = n * math.log2(1 + 1 / 16384)  # a unit of the weight a token, for rounding
    for k, best in enumerate(best_choices(*sides, 20)):
        bound = 1 - k * math.log2(s) - (n - k) * math.log2(1 - s)
        assert bits <= best + bound + slack


def test_best_choice_is_the_best_of_all():
    """The bound's other side, by trying all choices of a side for seven tokens."""
    random = np.random.default_rng(0)
    costs = random.uniform(0, 9, (2, 7))
    found = [math.inf] * 4
    for number in range(1 << 7):
        sides = [number >> t & 1 for t in range(7)]
        changes = sum(a != b for a, b in itertools.pairwise(sides))
        for k in range(changes, 4):
            total = sum(costs[side, t] for t, side in enumerate(sides))
            found[k] = min(found[k], total)
    assert best_choices(*costs, 3).tolist() == pytest.approx(found)
