"""What a score is worth: causality, order of calls, sums, the same integers in any cut and rank."""

import copy
import functools
import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BEGINS,
    HERE,
    LEARNED_CFG,
    TABLE,
    VOCAB,
    WALK_CFG,
    WALK_STREAM,
    advance,
    frequencies,
    quiet,
    refusal,
    same,
    sharp_model,
    tiny_config,
    tiny_stream,
    unpacked,
    walker,
    warm_weights,
    weights_of,
)
from naive import (
    naive_commit,
    naive_counts,
    naive_guard,
    naive_logit_grid,
    naive_rows,
    naive_shares,
)

import train_gpt
from train_gpt import (
    BITS_SCALE,
    TOTAL,
    Commitment,
    NgramHistory,
    OrderError,
    Predictor,
    evaluate,
    evaluation_plans,
    new_plan,
    walk,
)

pytestmark = pytest.mark.usefixtures("one_thread")

W = WALK_CFG.eval_seq_len
S = WALK_CFG.eval_stride
K = W - S
CHUNK = WALK_CFG.ttt_chunk_tokens
STREAM = WALK_STREAM


def walk_of(cfg, tiles, *stages):
    """(Config, Plan) of a walk in runs of so many tiles."""
    cfg = replace(cfg, eval_run_tiles=tiles)
    return cfg, new_plan(cfg, *stages)


WALKS = {  # the learned mixer takes four steps a chunk; a chunk is no whole number of three tiles
    "pre_quant": walk_of(WALK_CFG, 1, "pre_quant"),
    "round_trip": walk_of(WALK_CFG, 1, "round_trip"),
    "sliding": walk_of(WALK_CFG, 1, "sliding"),
    "sliding, runs of 3": walk_of(WALK_CFG, 3, "sliding"),
    "sliding, one run": walk_of(WALK_CFG, 0, "sliding"),
    "sliding+mixer": walk_of(WALK_CFG, 1, "sliding", "unguarded", "mixer"),
    "sliding+learned": walk_of(LEARNED_CFG, 3, "sliding", "unguarded", "mixer"),
    "ttt+mixer": walk_of(WALK_CFG, 3, "ttt", "unguarded", "mixer"),
    "ttt+learned": walk_of(LEARNED_CFG, 1, "ttt", "unguarded", "mixer"),
    "ttt+learned, runs of 3": walk_of(LEARNED_CFG, 3, "ttt", "unguarded", "mixer"),
    "ttt+learned, one run": walk_of(LEARNED_CFG, 0, "ttt", "unguarded", "mixer"),
}


def recorded(predictor, tokens):
    """(bits of each stage, {stage: frequencies}) of one walk over all tokens."""
    parts = []
    for commitment, _ in walk(predictor, torch.from_numpy(tokens)):
        parts.append(frequencies(commitment))
    return predictor.bits, {stage: torch.cat([part[stage] for part in parts]) for stage in parts[0]}


# ---- Causality: the mutation test, and cheats that it must catch ---------------------------------

BLOCK = 4 * CHUNK + 1  # begins the mutated block: three TTT updates are behind, the fourth is due
# It has CHUNK offsets: of each tile of 4, run of 12 and block of 8 it holds them all.


@functools.cache
def before_the_block(name):
    """A predictor that is about to predict the block; shared, so to be copied."""
    predictor = walker(*WALKS[name])
    advance(predictor, STREAM, BLOCK)
    return predictor


def mutations(predictor):
    """Change the block's token at each offset t alone, then it and all later ones.

    Yields (t, stage, whether a commitment up to t changed, whether one after t did).
    """
    random = np.random.default_rng(1)
    plain = advance(copy.deepcopy(predictor), STREAM, BLOCK + CHUNK + W)
    for t in range(BLOCK, BLOCK + CHUNK):
        for changed in (slice(t, t + 1), slice(t, None)):
            tokens = STREAM.copy()
            shifts = random.integers(1, VOCAB, len(tokens[changed]))
            tokens[changed] = (tokens[changed] + shifts) % VOCAB
            stop = BLOCK + CHUNK
            if t == stop - 1:
                stop += W  # the block's last token is first seen by the update
            for stage, freqs in advance(copy.deepcopy(predictor), tokens, stop).items():
                differs = (freqs != plain[stage][: len(freqs)]).any(1)
                border = t + 1 - BLOCK
                yield t, stage, differs[:border].any().item(), differs[border:].any().item()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "+" in n else n for n in WALKS]
)
def test_no_commitment_depends_on_its_token_or_later_ones(name):
    """A change leaves all commitments up to it bitwise alone and moves a later one."""
    seen = list(mutations(before_the_block(name)))
    assert len(seen) == 2 * CHUNK * len(WALKS[name][1].stages)
    assert not [(t, stage) for t, stage, leaked, _ in seen if leaked]
    assert not [(t, stage) for t, stage, _, noticed in seen if not noticed]


def test_mutated_block_exercises_every_context_length():
    """Inside the block the history backs off to every context length."""
    _, used = naive_counts(STREAM[: BLOCK + CHUNK].tolist(), VOCAB, WALK_CFG, BEGINS)
    assert set(used[BLOCK:]) == set(range(WALK_CFG.ngram_order))


def test_mutated_block_exercises_the_entropy_gate():
    """Inside the block alpha takes small and large values."""
    committed = advance(copy.deepcopy(before_the_block("ttt+mixer")), STREAM, BLOCK + CHUNK)
    p = committed["ttt"].double() / TOTAL
    entropy = -(p * p.log()).sum(1)
    alpha = WALK_CFG.alpha_range * torch.sigmoid(2 * (entropy - WALK_CFG.alpha_center))
    assert WALK_CFG.alpha_base == 0
    assert alpha.min() < 0.5 * WALK_CFG.alpha_range
    assert alpha.max() > 0.7 * WALK_CFG.alpha_range


def test_mutated_block_exercises_the_learned_mixer():
    """Inside the block it moves frequencies up and down, with and without evidence of all kinds."""
    predictor = copy.deepcopy(before_the_block("ttt+learned"))
    committed = advance(predictor, STREAM, BLOCK + CHUNK)
    shift = (committed["mixer"].double() / committed["ttt"].double()).log2()
    assert (shift.abs() > 0.1).any(1).float().mean() > 0.8
    assert shift.min() < -0.3
    assert shift.max() > 0.3
    ends = predictor.mixture.history.occurrences(torch.arange(BLOCK - 1, BLOCK + CHUNK - 1))
    assert (ends >= 0).any(0).all()
    assert (ends < 0).any(0).all()


def test_learned_mixer_learns_before_each_part_of_the_mutated_block():
    """A mixer that stops learning at the block commits other integers in each part of it."""
    predictor = copy.deepcopy(before_the_block("ttt+learned"))
    still = copy.deepcopy(predictor)
    still.mixture.learn = lambda prefix: still.mixture.remembered.clear()
    learned, frozen = (advance(each, STREAM, BLOCK + CHUNK) for each in (predictor, still))
    size = LEARNED_CFG.mixer_block
    moved = (learned["mixer"] != frozen["mixer"]).any(1).view(-1, size)
    assert torch.equal(learned["ttt"], frozen["ttt"])
    assert predictor.mixture.blocks == (BLOCK - 1 + CHUNK) // size - 1
    assert moved.any(1).all()
    assert moved.float().mean() > 0.8


class Peeking(Predictor):
    """Moves half of the likeliest token's frequency to the token that comes."""

    def predict(self, prefix, start, stop):
        """Predict honestly, then look."""
        commitment = super().predict(prefix, start, stop)
        for positions, tables in commitment.pieces:
            for stage, committed in tables.items():
                tables[stage] = freqs = committed.clone()
                for row, token in zip(freqs, prefix[positions[0] :]):
                    best = row.argmax().item()
                    moved = row[best].item() // 2
                    row[best] -= moved
                    row[token] += moved
        return commitment


class LearningFirst(Predictor):
    """Trains on a chunk, as far as it has its tokens, before it predicts a part of it."""

    def predict(self, prefix, start, stop):
        """Learn, then predict."""
        if stop - start == self.plan.block:
            tokens = prefix[(start - 1) // CHUNK * CHUNK :]
            self.ttt.adapt_chunk(F.pad(tokens, (0, CHUNK + 1 - len(tokens))))
            self.engine.forget(start - 1)
        return super().predict(prefix, start, stop)


class MixerLearningFirst(Predictor):
    """Lets the mixer learn from a block, as far as it has its tokens, before it is predicted."""

    def predict(self, prefix, start, stop):
        """Predict, learn, predict again."""
        if stop - start == self.plan.block:
            super().predict(prefix, start, stop)
            self.mixture.history.extend(prefix)
            self.mixture.learn(F.pad(prefix, (0, 1)))
            self.pending = None
            self.scored_to = start
            self.engine.forget(start - 1)
        return super().predict(prefix, start, stop)


honest_occurrences = NgramHistory.occurrences
honest_evidence = train_gpt.gather_evidence
honest_bias = train_gpt.causal_bias
honest_forward = train_gpt.GPT.forward


def occurrences_if_right(history, ends):
    """A context takes part only where it was followed by the token that comes."""
    found = honest_occurrences(history, ends)
    target = history.tokens[(ends + 1).clamp(max=history.size - 1)]
    right = history.tokens[found + 1] == target[:, None, None]
    return torch.where((right & (found >= 0)).any(2, keepdim=True), found, -1)


def newest_of_the_block(history, ends):
    """The last occurrence is that of all tokens there are, not that before the position."""
    found = honest_occurrences(history, ends)
    slots = history.hashes(ends.expand(found.size(1), -1))
    newest = history.heads.gather(1, slots).T.long()
    found[..., 0] = torch.where(newest < ends[-1], newest, -1)  # the token after it is known
    return found


def contexts_that_hold_their_token(history, ends):
    """Looks for the context that ends with the token to be predicted."""
    return torch.cat([honest_occurrences(history, e) for e in (ends[1:], ends[-1:])])


def gate_of_the_block(share, matches, following, cfg):
    """One alpha for all positions at hand, by their mean entropy."""
    p = share / share.sum(1, keepdim=True)
    real = (matches >= 0).flatten(1).double()
    counts = torch.zeros_like(p).scatter_add_(1, following.flatten(1), real.to(p))
    total = counts.sum(1, keepdim=True)
    mean = -torch.special.xlogy(p, p).sum(-1).mean()
    alpha = cfg.alpha_range * torch.sigmoid(2 * (mean - cfg.alpha_center)) * (total > 0)
    mixed = (1 - alpha) * p + alpha * counts / total.clamp(min=1)
    return (mixed * 2**36).long()


def features_of_the_block(*args):
    """Features in units of the largest at hand."""
    tokens, features = honest_evidence(*args)
    return tokens, features / features.abs().amax((0, 2)).clamp(min=0.1)[:, None]


def attention_to_the_next_row(rows, known, reach, like):
    """Each row sees the one after it, where that is computed at once."""
    bias = honest_bias(rows, known, reach, like)
    return torch.where(torch.ones_like(bias).tril(known + 1).bool(), bias.clamp(min=-9), bias)


def logits_less_their_mean(model, *args):
    """Logits less the mean, token by token, over all rows at hand."""
    logits = honest_forward(model, *args)
    return logits - logits.mean(1, keepdim=True)


IN_THE_MODEL = (attention_to_the_next_row, logits_less_their_mean)
IN_BOTH_MIXERS = (
    Peeking,
    LearningFirst,
    occurrences_if_right,
    newest_of_the_block,
    contexts_that_hold_their_token,
)
CHEATS = {
    "sliding": IN_THE_MODEL,
    "sliding, one run": IN_THE_MODEL,
    "ttt+mixer": (gate_of_the_block, *IN_BOTH_MIXERS),
    "ttt+learned": (MixerLearningFirst, features_of_the_block, *IN_BOTH_MIXERS),
    "ttt+learned, one run": (LearningFirst, MixerLearningFirst, *IN_THE_MODEL),
}
PLANTED = {
    gate_of_the_block: (train_gpt, "mix_entropy"),
    features_of_the_block: (train_gpt, "gather_evidence"),
    attention_to_the_next_row: (train_gpt, "causal_bias"),
    logits_less_their_mean: (train_gpt.GPT, "forward"),
    **dict.fromkeys(IN_BOTH_MIXERS[2:], (NgramHistory, "occurrences")),
}


@pytest.mark.parametrize(
    "name, cheat", [(name, cheat) for name in CHEATS for cheat in CHEATS[name]]
)
def test_mutation_test_catches(monkeypatch, name, cheat):
    """Each cheat commits complete integers that nothing but the mutation test objects to."""
    predictor = copy.deepcopy(before_the_block(name))
    if cheat in PLANTED:
        monkeypatch.setattr(*PLANTED[cheat], cheat)
    else:
        predictor.__class__ = cheat
    assert any(leaked for *_, leaked, _ in mutations(predictor))


# ---- Decoder and scorer --------------------------------------------------------------------------


@functools.cache
def in_blocks(name, stop=4 * CHUNK + 7):
    """What a scorer commits, {stage: frequencies}, over TTT's updates; shared."""
    return advance(walker(*WALKS[name]), STREAM, stop)


@pytest.mark.parametrize("step", [1, 3, 7])
@pytest.mark.parametrize("name", WALKS)
def test_decoder_commits_what_the_scorer_commits(name, step):
    """A few positions at a time give the integers of whole blocks, over TTT's updates."""
    scorer = in_blocks(name)
    decoder = advance(walker(*WALKS[name]), STREAM, 4 * CHUNK + 7, step=step)
    assert same(decoder, scorer)


@pytest.mark.parametrize("name", [name for name in WALKS if "learned" not in name])
def test_one_call_commits_what_many_commit(name):
    """All positions of a stream in one call, as far as no update divides them."""
    cfg, plan = WALKS[name]
    n = CHUNK if "ttt" in name else 4 * CHUNK + 6
    predictor = walker(cfg, plan._replace(block=n, chunk=n))
    commitment = predictor.predict(torch.from_numpy(STREAM[:n]), 1, n + 1)
    expected = {stage: freqs[:n] for stage, freqs in in_blocks(name).items()}
    assert same(frequencies(commitment), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sliding, runs of 3", "ttt+learned, runs of 3"])
def test_steps_of_any_size_commit_the_same(name, seed):
    """Now one position, now many."""
    random = np.random.default_rng(seed)
    predictor = walker(*WALKS[name])
    stop = 4 * CHUNK + 7
    parts = []
    while predictor.scored_to < stop:
        size = int(random.choice([1, 2, 5, 13, 32]))
        parts.append(advance(predictor, STREAM, min(predictor.scored_to + size, stop)))
    found = {stage: torch.cat([part[stage] for part in parts]) for stage in parts[0]}
    assert same(found, in_blocks(name))


@pytest.mark.parametrize("name", ["sliding", "ttt+mixer", "ttt+learned"])
def test_walk_decodes_a_stream_that_is_filled_in_as_it_goes(name):
    """Targets are a view: tokens written there after each commitment are all that it needs."""
    tokens = STREAM[: 2 * CHUNK + 9]
    bits, scorer = recorded(walker(*WALKS[name]), tokens)
    stream = torch.zeros(len(tokens), dtype=torch.int64)
    stream[0] = tokens[0]
    parts = []
    decoder = walker(*WALKS[name])
    for commitment, targets in walk(decoder, stream, step=1):
        parts.append(frequencies(commitment))
        targets[:] = int(tokens[commitment.start])
    assert same({stage: torch.cat([part[stage] for part in parts]) for stage in scorer}, scorer)
    assert decoder.bits == bits
    assert stream.tolist() == tokens.tolist()


def test_bits_are_those_of_what_is_scored():
    """The sum of the code lengths of all positions before a step, and in the end of all."""
    summed = 0
    predictor = walker(*WALKS["sliding"])
    for commitment, targets in walk(predictor, torch.from_numpy(STREAM)):
        assert predictor.bits == {"sliding": summed / BITS_SCALE}
        chosen = commitment.chosen(targets, ["sliding"])[0, 0]
        summed += sum(round((24 - math.log2(freq)) * BITS_SCALE) for freq in chosen.tolist())
    assert predictor.bits == {"sliding": summed / BITS_SCALE}


@pytest.mark.parametrize("top", [0, 1, 5])
def test_chosen_are_the_targets_and_the_likeliest_tokens(top):
    """Of each stage asked for: the target's frequency, the highest ones and whose they are."""
    predictor = walker(*WALKS["ttt+learned"])
    stages = ["mixer", "ttt"]
    for commitment, targets in walk(predictor, torch.from_numpy(STREAM)):
        found = commitment.chosen(targets, stages, top)
        assert found.shape == (2, 1 + 2 * top, len(targets))
        for rows, stage in zip(found, stages):
            own, highest, tokens = rows.split([1, top, top])
            table = commitment.table(stage).long()
            assert own[0].tolist() == table.gather(1, targets[:, None])[:, 0].tolist()
            assert highest.T.tolist() == table.sort(descending=True)[0][:, :top].tolist()
            assert highest.T.tolist() == table.gather(1, tokens.T).tolist()
            assert all(len({*row}) == top for row in tokens.T.tolist())


# ---- Order of calls ------------------------------------------------------------------------------


def refused(call, *args):
    """The call must raise OrderError."""
    with pytest.raises(OrderError):
        call(*args)


@pytest.mark.parametrize("name", ["sliding", "ttt+mixer", "ttt+learned"])
def test_calls_out_of_order_raise_and_change_nothing(name):
    """Each wrong call is refused, and the predictor goes on as if nobody had made it."""
    predictor = walker(*WALKS[name])
    stream = torch.from_numpy(STREAM)
    commitments = []
    size = LEARNED_CFG.mixer_block if name == "ttt+learned" else CHUNK
    borders = {1, 6, size + 1, size + 4, *range(2 * size + 1, 2 * CHUNK + 2, size), 2 * CHUNK + 5}
    for start, stop in itertools.pairwise(sorted(borders)):
        prefix = stream[: stop - 1]
        targets = stream[start:stop]
        limit = 1 + (start - 1) // size * size + size
        assert predictor.block_end == limit
        refused(predictor.predict, prefix[:-1], start, stop)  # a token is missing
        refused(predictor.predict, stream[:stop], start, stop)  # a target is given away
        refused(predictor.predict, prefix, start + 1, stop)  # a position is left out
        refused(predictor.predict, prefix, start - 1, stop)  # a position comes again
        refused(predictor.predict, stream[: start - 1], start, start)  # nothing to predict
        refused(predictor.predict, stream[:limit], start, limit + 1)  # beyond the block
        refused(predictor.update, stream[:start])  # no block is complete
        refused(predictor.score, Commitment(start, stop, []), targets)  # nothing is committed

        commitment = predictor.predict(prefix, start, stop)
        commitments.append(frequencies(commitment))
        assert predictor.scored_to == start
        refused(predictor.predict, prefix, start, stop)  # predicted twice
        refused(predictor.predict, stream[:stop], stop, stop + 1)  # the score is due
        refused(predictor.update, stream[:stop])  # update before score
        refused(predictor.score, copy.copy(commitment), targets)  # another commitment
        refused(predictor.score, commitment, targets[:-1])  # a target is missing
        refused(predictor.score, commitment, stream[start : stop + 1])  # one too many

        predictor.score(commitment, targets)
        assert predictor.scored_to == stop
        refused(predictor.score, commitment, targets)  # scored twice
        refused(predictor.predict, prefix, start, stop)  # scored already
        if stop == limit:
            refused(predictor.predict, stream[:stop], stop, stop + 1)  # update is due
            refused(predictor.update, stream[: stop - 1])  # the last token is missing
            refused(predictor.update, stream[: stop + 1])  # a token is not scored yet
            predictor.update(stream[:stop])
        refused(predictor.update, stream[:stop])  # early, or twice
    undisturbed = advance(walker(*WALKS[name]), STREAM, stop)
    disturbed = {s: torch.cat([part[s] for part in commitments]) for s in undisturbed}
    assert same(disturbed, undisturbed)


def broken_model():
    """A model whose logits are not finite."""
    model = sharp_model(WALK_CFG)
    with torch.no_grad():
        model.blocks[1].q.fill_(math.nan)
    return model


def test_logits_that_are_not_finite_are_refused():
    """Nothing is committed, and the message names the tokens."""
    predictor = walker(*WALKS["sliding+mixer"], model=broken_model())
    message = refusal(predictor.predict, torch.from_numpy(STREAM[:CHUNK]), 1, CHUNK + 1)
    assert "logits are not finite between tokens 1 and 33" in message
    assert predictor.pending is None
    assert predictor.scored_to == 1


# ---- Stages and sums -----------------------------------------------------------------------------

LENGTHS = (1, 2, 5, W - 1, W, W + 1, W + S, CHUNK - 1, CHUNK, CHUNK + 1)
LENGTHS += (2 * CHUNK, 2 * CHUNK + W, 4 * CHUNK + 3)


@pytest.mark.parametrize("name", ["round_trip", "sliding", "ttt+mixer", "ttt+learned"])
def test_score_is_the_sum_of_its_code_lengths(name):
    """For any length: each position once, in units of 2^-30 bit, as in a longer stream."""
    _, longest = recorded(walker(*WALKS[name]), STREAM[: LENGTHS[-1] + 1])
    for n in LENGTHS:
        bits, committed = recorded(walker(*WALKS[name]), STREAM[: n + 1])
        assert list(bits) == list(WALKS[name][1].stages)
        assert same(committed, {stage: freqs[:n] for stage, freqs in longest.items()}), n
        for stage, freqs in committed.items():
            chosen = freqs[torch.arange(n), torch.from_numpy(STREAM[1 : n + 1])].tolist()
            lengths = [24 - math.log2(freq) for freq in chosen]
            assert bits[stage] == sum(round(x * 2**30) for x in lengths) / 2**30
            assert bits[stage] == pytest.approx(sum(lengths), rel=1e-9)


@pytest.mark.parametrize("name", WALKS)
def test_prefix_costs_exactly_what_it_costs_inside_a_longer_stream(name):
    """The bits summed at a block's end are, to the last, those of a stream that ends there."""
    cfg, plan = WALKS[name]
    predictor = walker(cfg, plan)
    stream = torch.from_numpy(STREAM)
    for start in range(1, 3 * CHUNK, plan.block):
        stop = start + plan.block
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        predictor.score(commitment, stream[start:stop])
        predictor.update(stream[:stop])
        stages, _ = evaluate(walker(cfg, plan), STREAM[:stop], 1, quiet, keep=1)
        bits = {stage["name"]: stage["val_bpb"] for stage in stages}
        assert bits == {stage: predictor.bits[stage] for stage in plan.stages[::2]}
        if predictor.mixture:
            assert stages[-1]["unguarded_bpb"] == predictor.bits["unguarded"]


@pytest.mark.parametrize("name", ["sliding", "ttt+learned"])
def test_evaluate_reports_what_the_walk_sums(name):
    """Loss is in nats a token, BPB in bits a byte; the first frequencies are kept."""
    n = 2 * CHUNK + 5
    bits, committed = recorded(walker(*WALKS[name]), STREAM[: n + 1])
    stages, kept = evaluate(walker(*WALKS[name]), STREAM[: n + 1], 777, quiet, keep=40)
    assert [stage["name"] for stage in stages] == list(bits)[::2]
    for stage in stages:
        assert stage["val_loss"] == pytest.approx(bits[stage["name"]] * math.log(2) / n, rel=1e-12)
        assert stage["val_bpb"] == pytest.approx(bits[stage["name"]] / 777, rel=1e-12)
        assert stage["tokens"] == n
        assert stage["bytes"] == 777
        assert stage["seconds"] >= 0
    targets = torch.from_numpy(STREAM[1:41])
    expected = [freqs[torch.arange(40), targets].tolist() for freqs in committed.values()]
    assert kept[:, 0].tolist() == expected


def test_learning_counts_as_seconds_of_the_mixer(monkeypatch):
    """Not as those of the stage that it shares the pass with."""
    learn = train_gpt.Mixture.learn
    spent = []

    def slow(mixer, prefix):
        start_s = time.perf_counter()
        learn(mixer, prefix)
        time.sleep(0.01)
        spent.append(time.perf_counter() - start_s)

    monkeypatch.setattr(train_gpt.Mixture, "learn", slow)
    stages, _ = evaluate(walker(*WALKS["ttt+learned"]), STREAM[: 2 * CHUNK + 5], 777, quiet, keep=1)
    assert len(spent) > 2
    assert stages[-1]["seconds"] >= sum(spent)


def test_plans_hold_the_documented_stages():
    """round_trip, sliding, ttt, mixer, less what is turned off; the mixer shares the last walk."""

    def stages(**changes):
        return [plan.stages for plan in evaluation_plans(tiny_config(**changes))]

    assert stages() == [("round_trip",), ("sliding",), ("ttt", "unguarded", "mixer")]
    assert stages(ttt_enabled=False) == [("round_trip",), ("sliding", "unguarded", "mixer")]
    assert stages(mixer="learned") == stages()
    assert stages(mixer="none") == [("round_trip",), ("sliding",), ("ttt",)]
    assert stages(mixer="none", ttt_enabled=False) == [("round_trip",), ("sliding",)]


def test_last_plan_in_lanes_has_no_ttt():
    """`compress` codes with the sliding stage and the mixer, if there is one."""
    assert new_plan(tiny_config(), lanes=4).stages == ("sliding", "unguarded", "mixer")
    assert new_plan(tiny_config(mixer="none"), lanes=4).stages == ("sliding",)


def test_block_is_the_learned_mixers_where_it_learns():
    """Updates come every MIXER_BLOCK positions where there is something to learn, else a chunk."""
    learned, entropy = tiny_config(mixer="learned"), tiny_config()
    assert new_plan(learned).block == learned.mixer_block
    assert new_plan(entropy).block == entropy.ttt_chunk_tokens
    assert new_plan(learned, "sliding").block == learned.ttt_chunk_tokens


@pytest.mark.parametrize("name", ["ttt+mixer", "ttt+learned"])
def test_mixer_leaves_the_stage_before_it_alone(name):
    """The ttt stage of a shared walk is that of a walk without mixer."""
    cfg = WALKS[name][0]
    alone = advance(walker(cfg, new_plan(cfg, "ttt")), STREAM, 3 * CHUNK + 1)
    shared = advance(walker(*WALKS[name]), STREAM, 3 * CHUNK + 1)
    assert torch.equal(shared["ttt"], alone["ttt"])
    assert not torch.equal(shared["ttt"], shared["mixer"])


def test_ttt_stage_begins_as_sliding():
    """Before the first update, at TTT_TEMPERATURE 1, its integers are those of that stage."""
    cfg, plan = walk_of(replace(WALK_CFG, ttt_temperature=1.0), 1, "ttt")
    ttt = advance(walker(cfg, plan), STREAM, CHUNK + 1)["ttt"]
    assert torch.equal(ttt, advance(walker(*WALKS["sliding"]), STREAM, CHUNK + 1)["sliding"])


def test_ttt_temperature_divides_the_logits():
    """Before the first update the ttt stage is the sliding stage to the power 1 / temperature."""
    cfg, plan = WALKS["ttt+learned"]
    sliding = advance(walker(*WALKS["sliding"]), STREAM, CHUNK + 1)["sliding"].double() / TOTAL
    ttt = advance(walker(cfg, plan), STREAM, CHUNK + 1)["ttt"].double() / TOTAL
    heated = sliding ** (1 / cfg.ttt_temperature)
    heated /= heated.sum(1, keepdim=True)
    torch.testing.assert_close(ttt, heated, rtol=0.01, atol=1e-5)
    assert cfg.ttt_temperature != 1
    assert (ttt - sliding).abs().max() > 1e-4


# ---- One rank and several ------------------------------------------------------------------------

RANK_CFG = tiny_config(  # five sequences: TTT micro-batches of 2, 2 and 1
    ttt_chunk_tokens=160, mixer="learned", mixer_block=40, mixer_lr=0.01
)


RANK_RUNS = ((1, "learned"), (3, "learned"), (0, "learned"), (2, "entropy"))  # tiles, MIXER


def rank_walks(rt, data, tokens, runs=RANK_RUNS):
    """What a rank commits, sums and learns in each walk over an artifact: a list of reports."""
    artifact = unpacked(data)
    reports = []
    for tiles, mixer in runs:
        settings = {**artifact.settings, "eval_run_tiles": tiles, "mixer": mixer}
        cfg = train_gpt.Config(**settings)
        plans = [new_plan(cfg, "pre_quant"), *evaluation_plans(cfg)]
        for plan in plans if tiles == 1 else plans[-2:]:
            predictor, again = (Predictor(artifact.weights, TABLE, cfg, rt, plan) for _ in range(2))
            pieces = []
            for commitment, _ in walk(predictor, torch.from_numpy(tokens)):
                pieces += commitment.pieces
            stages, kept = evaluate(again, tokens[:61], 1000, quiet, keep=50)
            reports.append(
                dict(
                    name=f"{'+'.join(plan.stages)} {mixer} {tiles}",
                    bits=predictor.bits,
                    bpb={stage["name"]: stage["val_bpb"] for stage in stages},
                    kept=kept.tolist(),
                    pieces=[tuple(piece) for piece in pieces],
                    weights=weights_of(predictor.engine.model),
                    mixer={"weights": predictor.mixture.weights} if predictor.mixture else {},
                )
            )
    return reports


def joined(pieces):
    """{stage: frequencies} of (positions, freqs) that hold every position from 1 on once."""
    positions = torch.cat([positions for positions, _ in pieces])
    assert positions.sort()[0].tolist() == list(range(1, len(positions) + 1))
    order = positions.argsort()
    stages = pieces[0][1]
    return {stage: torch.cat([freqs[stage] for _, freqs in pieces])[order] for stage in stages}


@pytest.fixture(scope="module")
def lone_reports(one_thread):
    """(artifact's bytes, tokens, rank_walks of one rank)."""
    data = train_gpt.pack_artifact(warm_weights(RANK_CFG), RANK_CFG, TABLE, 8.0)
    tokens = tiny_stream(2 * 160 + 6)  # five positions in the third chunk
    return data, tokens, rank_walks(HERE, data, tokens)


@pytest.mark.slow
def test_walks_of_ranks_are_of_all_kinds(lone_reports):
    """All stages and run lengths; TTT and the mixer have learned."""
    data, _, alone = lone_reports
    assert [report["name"] for report in alone] == [
        "pre_quant learned 1",
        "round_trip learned 1",
        "sliding learned 1",
        "ttt+unguarded+mixer learned 1",
        "sliding learned 3",
        "ttt+unguarded+mixer learned 3",
        "sliding learned 0",
        "ttt+unguarded+mixer learned 0",
        "sliding entropy 2",
        "ttt+unguarded+mixer entropy 2",
    ]
    start = {name: w.double() for name, w in unpacked(data).weights.items()}
    mixer = start.pop("mixer")
    for report in alone:
        assert same(report["weights"], start) == ("ttt" not in report["name"])
        if report["mixer"]:
            assert not torch.equal(report["mixer"]["weights"], mixer)


@pytest.mark.slow
@pytest.mark.parametrize("world, runs", [(2, RANK_RUNS), (4, RANK_RUNS[:2])])
def test_ranks_commit_what_one_commits(world, runs, run_ranks, lone_reports):
    """From one artifact, with work that the ranks cannot share evenly."""
    data, tokens, alone = lone_reports
    ranks = run_ranks(world, rank_walks, data, tokens, runs)
    assert min(map(len, ranks)) == 2 + 2 * len(runs)
    for expected, *reports in zip(alone, *ranks):
        for report in reports:
            assert report["bits"] == expected["bits"]
            assert report["bpb"] == expected["bpb"]
            assert report["kept"] == expected["kept"]
            assert same(report["weights"], expected["weights"])
            assert same(report["mixer"], expected["mixer"])
            assert report["pieces"] or expected["name"].endswith(" 0")
        pieces = [piece for report in reports for piece in report["pieces"]]
        assert same(joined(pieces), joined(expected["pieces"])), expected["name"]


def rank_refuses(rt):
    """How a rank refuses where only the second one's model is broken."""
    model = broken_model() if rt.rank else sharp_model(WALK_CFG)
    cfg, plan = WALKS["sliding"]
    predictor = walker(cfg, plan, model, rt)
    return refusal(predictor.predict, torch.from_numpy(STREAM[:CHUNK]), 1, CHUNK + 1)


@pytest.mark.slow
def test_broken_rank_stops_all_ranks(run_ranks):
    """Both ranks refuse, so that none waits for the other."""
    messages = run_ranks(2, rank_refuses)
    assert len(messages) == 2
    assert all("logits are not finite" in message for message in messages)


# ---- Against plain forward passes ----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WALKS if "learned" not in name])
def test_commitments_match_plain_forward_passes(name):
    """Every integer: banded passes in float64, run by run, with each chunk's own weights.

    The entropy mixer's are those of mix_entropy on plain counts, which has tests of its own.
    """
    cfg, plan = WALKS[name]
    model = sharp_model(cfg)
    predictor = walker(cfg, plan, model)
    temperature = cfg.ttt_temperature if "ttt" in name else 1.0
    stop = 4 * CHUNK + 4
    committed = {stage: [] for stage in plan.stages}
    expected = []
    for first in range(0, stop - 1, CHUNK):
        last = min(first + CHUNK, stop - 1)
        for stage, freqs in advance(predictor, STREAM, last + 1).items():
            committed[stage] += freqs.tolist()
        origin = first if "ttt" in name else 0
        logits = naive_rows(model, cfg, STREAM[:last].tolist(), plan, origin)[first - origin :]
        expected += [naive_shares(row) for row in naive_logit_grid(logits, temperature)]
    assert committed[plan.stages[0]] == [naive_commit(shares) for shares in expected]
    if "mixer" in name:
        counts, used = naive_counts(STREAM[:stop].tolist(), VOCAB, cfg, BEGINS)
        mixed = plain_mixture(expected, counts[1:], used[1:], cfg)
        assert committed["unguarded"] == mixed
        targets = STREAM[1:stop].tolist()
        assert committed["mixer"] == naive_guard(committed[plan.stages[0]], mixed, targets)[0]


def plain_mixture(shares, counts, used, cfg):
    """The entropy mixer's frequencies: mix_entropy where the longest context has these counts."""
    mixed = []
    for row, count, context in zip(shares, counts.tolist(), used.tolist()):
        followers = [token for token, times in enumerate(count) for _ in range(times)]
        matches = torch.full((1, 6, max(len(followers), 1)), -1)
        following = torch.zeros_like(matches)
        if context:
            matches[0, 0] = 1
            following[0, 0] = torch.tensor(followers)
        share = train_gpt.mix_entropy(torch.tensor([row]), matches, following, cfg)
        mixed += [naive_commit(each) for each in share.tolist()]
    return mixed
