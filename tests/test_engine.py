"""From rows to logits: every row once, in any cut, by any ranks, and noise far below the grid."""

import functools
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    HERE,
    ROOT,
    TABLE,
    VOCAB,
    WALK_CFG,
    WALK_STREAM,
    few_words,
    lone_attention,
    new_history,
    random_tokens,
    sharp_model,
    tiny_config,
    tiny_stream,
    walker,
    warm_model,
)
from naive import naive_lane_order, naive_logit_grid, naive_rows

import train_gpt
from train_gpt import Engine, Mixture, Runtime, TestTimeTrainer, new_plan, walk

pytestmark = pytest.mark.usefixtures("one_thread")

S = WALK_CFG.eval_stride
K = WALK_CFG.eval_seq_len - S
TILES = [0, 1, 3]
N = 101  # rows; no whole number of runs
TEXT = torch.from_numpy(WALK_STREAM[:N])
STEPS = {"one by one": 1, "by sevens": 7, "by blocks": 32, "at once": N}


def plan_of(tiles, cfg=WALK_CFG):
    """The Plan of the sliding stage in runs of so many tiles."""
    return new_plan(replace(cfg, eval_run_tiles=tiles), "sliding")


PLANS = {
    **{f"runs of {tiles} tiles": plan_of(tiles) for tiles in TILES},
    "round_trip": new_plan(WALK_CFG, "round_trip"),
    "windows of two rows": plan_of(1, replace(WALK_CFG, eval_seq_len=2, eval_stride=1)),
}


def new_engine(plan, model=None, rt=HERE, cfg=WALK_CFG):
    """An Engine at the stream's start."""
    return Engine(model or sharp_model(cfg), cfg, rt, plan)


def asked(engine, tokens, step, first=0):
    """(positions, logits (R, V)) of all that the engine yields for rows first, ... of the lanes."""
    tokens = torch.atleast_2d(tokens)
    n = tokens.size(1)
    positions = []
    logits = []
    with torch.no_grad():
        for start in range(first, n, step):
            stop = min(start + step, n)
            for rows, part in engine.logits(tokens[:, :stop].clone(), start, stop):
                positions += rows.tolist()
                logits.append(part)
    return positions, torch.cat([*logits, torch.zeros(0, VOCAB)])


def asked_whole(engine, tokens):
    """What asked() gives where all whole runs are asked for at once: only they go side by side."""
    run = min(engine.plan.run, len(tokens))
    known = engine.plan.context  # before it, runs have fewer rows
    borders = [0, known, known + (len(tokens) - known) // run * run, len(tokens)]
    calls = [(first, stop) for first, stop in itertools.pairwise(borders) if first < stop]
    found = [asked(engine, tokens[:stop], stop, first) for first, stop in calls]
    positions, logits = zip(*found)
    return [*itertools.chain(*positions)], torch.cat(logits)


def on_grid(logits):
    """Logits in whole steps of the grid."""
    return (logits * train_gpt.LOGIT_SCALE).round().long()


@functools.cache
def naive_text(name):
    """The logits of TEXT by plain forward passes in float64, run by run."""
    return naive_rows(sharp_model(WALK_CFG), WALK_CFG, TEXT.tolist(), PLANS[name])


# ---- Every row once ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", PLANS)
def test_rows_come_once_and_in_order(name, step):
    """However they are asked for."""
    positions, _ = asked(new_engine(PLANS[name]), TEXT, step)
    assert positions == list(range(N))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", PLANS)
def test_logits_match_plain_forward_passes(name, step):
    """In any cut, a run is a banded forward pass over its context and itself."""
    _, logits = asked(new_engine(PLANS[name]), TEXT, step)
    np.testing.assert_allclose(logits, naive_text(name), atol=1e-12)
    assert on_grid(logits).tolist() == naive_logit_grid(naive_text(name))


def test_one_run_is_one_banded_pass():
    """Runs of 0 tiles begin nothing anew: the text is one forward pass, no row of it repeated."""
    tokens = TEXT.tolist()
    expected = naive_rows(sharp_model(WALK_CFG), WALK_CFG, tokens, plan_of(0)._replace(context=99))
    _, logits = asked(new_engine(plan_of(0)), TEXT, 7)
    np.testing.assert_allclose(logits, expected, atol=1e-12)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("tiles", TILES)
def test_model_computes_each_row_of_a_run_once(monkeypatch, tiles, step):
    """And a run's context once more; logits are computed of the asked rows alone."""
    forward = train_gpt.GPT.forward
    computed = []

    def spy(model, tokens, weights, cache, lead, unwanted):
        logits = forward(model, tokens, weights, cache, lead, unwanted)
        computed.append((len(tokens) * (tokens.size(1) - lead), len(tokens) * logits.size(1)))
        return logits

    monkeypatch.setattr(train_gpt.GPT, "forward", spy)
    asked(new_engine(plan_of(tiles)), TEXT, step)
    runs = range(0, N, tiles * S) if tiles else [0]
    rows, logits = map(sum, zip(*computed))
    assert rows == N + sum(min(start, K) for start in runs)
    assert logits == N


@pytest.mark.parametrize("step", [1, 7, 32])
@pytest.mark.parametrize("tiles", TILES)
def test_new_weights_begin_a_run(tiles, step):
    """After forget(), rows are those of the new weights, their context too."""
    model = sharp_model(WALK_CFG)
    engine = new_engine(plan_of(tiles), model)
    asked(engine, TEXT[:50], step)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    engine.forget(50)
    _, logits = asked(engine, TEXT, step, first=50)
    expected = naive_rows(model, WALK_CFG, TEXT.tolist(), plan_of(tiles), first=50)
    np.testing.assert_allclose(logits, expected, atol=1e-12)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("tiles", TILES)
def test_a_row_sees_the_rows_within_its_reach_and_no_other(tiles, step):
    """min(K, rows before it): a changed token moves its own row and the K rows after it.

    Lane i is the text with token i changed; one layer of the model attends.
    """
    n = 45
    plain = TEXT[:n].expand(n, -1)
    changed = (plain + torch.eye(n, dtype=torch.int64)) % VOCAB
    model = lone_attention(WALK_CFG, 1)
    before, after = (
        asked(new_engine(plan_of(tiles), model), tokens, step)[1].view(n, n, -1)
        for tokens in (plain, changed)
    )
    moved = (before != after).any(2).T  # (changed token, row)
    back = torch.arange(n) - torch.arange(n)[:, None]
    assert torch.equal(moved, (back >= 0) & (back <= K))


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("tiles", TILES)
def test_rows_know_where_they_are(tiles, lanes):
    """Positions are the stream's, all lanes of a row together."""
    tokens = TEXT[:99].view(-1, lanes).T
    n = tokens.size(1)
    engine = new_engine(plan_of(tiles))
    with torch.no_grad():
        rows = [rows for rows, _ in engine.logits(tokens, 0, n)]
    positions = torch.cat(rows)
    assert positions.tolist() == list(range(99))


# ---- In any cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side_by_side", [1, 2, 5, 1000])
@pytest.mark.parametrize("pass_rows", [1, 5, 16])
@pytest.mark.parametrize("tiles", TILES)
def test_composition_of_passes_means_nothing(tiles, pass_rows, side_by_side):
    """Runs side by side, or rows a pass: the same integers."""
    engine = new_engine(plan_of(tiles))
    engine.batch = side_by_side
    engine.pass_rows = pass_rows
    positions, logits = asked_whole(engine, TEXT)
    _, expected = asked(new_engine(plan_of(tiles)), TEXT, N)
    assert positions == list(range(N))
    assert torch.equal(on_grid(logits), on_grid(expected))


def test_the_tests_text_has_runs_side_by_side(monkeypatch):
    """Whole runs of one and three tiles go through the model all at a time; no others do."""
    forward = train_gpt.GPT.forward
    batches = []

    def spy(model, tokens, *args):
        batches.append(len(tokens))
        return forward(model, tokens, *args)

    monkeypatch.setattr(train_gpt.GPT, "forward", spy)
    for tiles, most in ((1, 22), (3, 7), (0, 1)):
        batches.clear()
        asked_whole(new_engine(plan_of(tiles)), TEXT)
        assert max(batches) == most
        batches.clear()
        asked(new_engine(plan_of(tiles)), TEXT, N)
        assert max(batches) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("tiles", TILES)
def test_ranks_share_the_rows(tiles, step, world):
    """Each row has one rank, whatever the cut, and the integers that one rank alone gives it."""
    _, expected = asked(new_engine(plan_of(tiles)), TEXT, N)
    found = {}
    counts = []
    for rank in range(world):
        rt = Runtime(rank=rank, world=world)
        positions, logits = asked(new_engine(plan_of(tiles), rt=rt), TEXT, step)
        counts.append(len(positions))
        found |= dict(zip(positions, on_grid(logits).tolist()))
    assert sum(counts) == N
    assert [found[t] for t in range(N)] == on_grid(expected).tolist()
    assert min(counts) > 0 or not tiles


# ---- In lanes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("step", ["by rows", "by blocks"])
@pytest.mark.parametrize("tiles", TILES)
def test_a_lane_is_a_text_of_its_own(tiles, step, lanes):
    """Each segment's frequencies are those of a plain walk over BOS and the segment."""
    cfg = replace(WALK_CFG, eval_run_tiles=tiles, ttt_chunk_tokens=48)
    tokens = tiny_stream(20 * lanes + 12, seed=lanes)[1:]
    order = naive_lane_order(len(tokens), lanes)
    start = np.full(lanes, TABLE.bos_id)
    stream = torch.from_numpy(np.append(start, tokens[order]))
    predictor = walker(cfg, new_plan(cfg, "sliding", lanes=lanes))
    steps = walk(predictor, stream, step=lanes if step == "by rows" else None)
    freqs = torch.cat([commitment.table("sliding") for commitment, _ in steps])
    coded = torch.empty_like(freqs)
    coded[order] = freqs
    segments = np.array_split(tokens, lanes)
    for segment, found in zip(segments, coded.split([len(each) for each in segments])):
        alone = walker(cfg, new_plan(cfg, "sliding"))
        text = torch.from_numpy(np.append(TABLE.bos_id, segment))
        expected = torch.cat([c.table("sliding") for c, _ in walk(alone, text)])
        assert torch.equal(found, expected)


# ---- Noise, measured -----------------------------------------------------------------------------
# What is rounded is computed in different ways: by rows or at once, in other company, on one thread
# and on two, with other instruction sets. The noise must be 10^6 times smaller than the grid.

FAR = 1e-6
GRID = {"logits": 2.0**-8, "boosts": 2.0**-8, "mixer": 2.0**-16, "TTT": 2.0**-20}
UNROUNDED = dict(LOGIT_SCALE=2.0**50, MIXER_WEIGHT_SCALE=2.0**46, TTT_WEIGHT_SCALE=2.0**44)
WIDE_CFG = tiny_config(
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    eval_seq_len=64,
    eval_stride=16,
    train_seq_len=64,
    ttt_chunk_tokens=256,
    mixer="learned",
    mixer_block=64,
)


@functools.cache
def inputs():
    """Weights and logits to measure with: random numbers differ by the instruction set too."""
    torch.manual_seed(0)
    shape = train_gpt.MIXER_HIDDEN, train_gpt.MIXER_FEATURES + 1
    return dict(
        weights=warm_model(WIDE_CFG).state_dict(),
        mixer=torch.randn(shape) * 0.3,
        grid=torch.randint(-900, 900, (192, 8)),
    )


def finely(function, *args):
    """What a function of the script returns where its grids are so fine that they show noise."""
    with pytest.MonkeyPatch.context() as patch:
        for name, scale in UNROUNDED.items():
            patch.setattr(train_gpt, name, scale)
        return function(*args)


def measured_logits(given, step=None, side_by_side=1000, pass_rows=64):
    """Logits of a text, in runs of one tile."""
    model = train_gpt.new_model(WIDE_CFG, HERE, given["weights"], "float64")
    engine = new_engine(new_plan(WIDE_CFG, "sliding"), model, cfg=WIDE_CFG)
    engine.batch = side_by_side
    engine.pass_rows = pass_rows
    tokens = random_tokens(150, seed=4)
    return (asked(engine, tokens, step) if step else asked_whole(engine, tokens))[1]


def measured_mixer(given, step=None):
    """(boosts, weights after each block) of a text that repeats itself, before they are rounded."""
    grid = given["grid"]
    tokens = torch.from_numpy(few_words(len(grid) + 1, seed=1))
    history = new_history(10, 4)
    history.extend(tokens)
    plan = new_plan(WIDE_CFG, "sliding", "unguarded", "mixer")
    mixer = Mixture(given["mixer"], WIDE_CFG, TABLE, HERE, plan)
    boosts = []
    weights = []
    for block in torch.arange(len(grid)).split(plan.block):
        for at in block.split(step or plan.block):
            matches = history.occurrences(at)
            following = history.tokens[matches + 1].long()
            args = grid[at], matches, following, at, 30
            candidates, features = train_gpt.gather_evidence(*args)
            boosts.append(finely(mixer.boost, features).double() / UNROUNDED["LOGIT_SCALE"])
            freqs = train_gpt.commit(args[0]).gather(1, candidates)
            mixer.remembered.append([candidates, features, freqs, at + 1])
        finely(mixer.learn, tokens)
        weights.append(mixer.weights.clone())
    return torch.cat(boosts), torch.stack(weights)


def measured_ttt(given):
    """Live and average weights after two chunks of two steps, before they are rounded."""
    model = train_gpt.new_model(WIDE_CFG, HERE, given["weights"], "float64")
    trainer = TestTimeTrainer(model, WIDE_CFG, TABLE, HERE)
    for seed in range(2):
        finely(trainer.adapt_chunk, random_tokens(WIDE_CFG.ttt_chunk_tokens + 1, seed=seed))
    return torch.cat([trainer.live, *(p.detach().flatten() for p in model.parameters())])


def measured(given):
    """{name: numbers that are to be rounded to GRID}, from these inputs."""
    boosts, weights = measured_mixer(given)
    return dict(zip(GRID, (measured_logits(given), boosts, weights, measured_ttt(given))))


@functools.cache
def reference():
    """What is measured at once, on one thread."""
    return measured(inputs())


def noise(name, found):
    """The largest difference from the reference, in steps of the grid."""
    step = ((found - reference()[name]).abs().max() / GRID[name]).item()
    print(f"{name}: {step:.1e} of a step")
    return step


def integers(name, found):
    """The numbers in whole steps of their grid."""
    return (found / GRID[name]).round().long()


def assert_far_below_the_grid(name, found):
    """The noise is 10^6 times smaller than the grid, and the integers are the same."""
    assert noise(name, found) < FAR
    assert torch.equal(integers(name, found), integers(name, reference()[name]))


def test_what_is_measured_is_not_rounded():
    """Nothing that is measured lies on its grid."""
    for name, found in reference().items():
        off = (found / GRID[name] - integers(name, found)).abs()
        assert off[found != 0].mean() > 0.1, name


CUTS = {
    "row by row": dict(step=1),
    "by sevens": dict(step=7),
    "one run at a time": dict(side_by_side=1),
    "three runs at a time": dict(side_by_side=3, pass_rows=10),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_another_cut_moves_logits_far_less_than_the_grid(cut):
    """Rows together or one by one, runs alone or in company."""
    assert_far_below_the_grid("logits", measured_logits(inputs(), **cut))


@pytest.mark.parametrize("step", [1, 7])
def test_another_cut_moves_the_mixer_far_less_than_the_grid(step):
    """Boosts, and weights after each block."""
    boosts, weights = measured_mixer(inputs(), step)
    assert_far_below_the_grid("boosts", boosts)
    assert_far_below_the_grid("mixer", weights)


def test_the_measurement_sees_noise():
    """Row by row, logits have other last bits: what is measured is not nothing."""
    assert noise("logits", measured_logits(inputs(), 1)) > 0


def test_another_thread_moves_nothing_by_a_step():
    """Two threads instead of one: logits, boosts, the mixer's and TTT's weights."""
    torch.set_num_threads(2)
    found = measured(inputs())
    torch.set_num_threads(1)
    for name in GRID:
        assert_far_below_the_grid(name, found[name])


INSTRUCTIONS = {"default": "SSE4_2", "avx2": "AVX2"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", INSTRUCTIONS)
def test_other_instructions_move_nothing_by_a_step(capability, tmp_path):
    """In a process that uses no AVX-512, or no AVX at all, on two threads."""
    path = tmp_path / "measured.pt"
    torch.save(inputs(), path)
    code = "import sys, test_engine, torch; path = sys.argv[1]; "
    code += "torch.save(test_engine.measured(torch.load(path)), path)"
    env = os.environ | dict(
        ATEN_CPU_CAPABILITY=capability,
        MKL_ENABLE_INSTRUCTIONS=INSTRUCTIONS[capability],
        MKL_CBWR="COMPATIBLE" if capability == "default" else "AUTO",
        OMP_NUM_THREADS="2",
    )
    command = [sys.executable, "-c", code, str(path)]
    subprocess.run(command, env=env, cwd=ROOT / "tests", check=True)
    found = torch.load(path)
    for name in GRID:
        assert_far_below_the_grid(name, found[name])
