"""What a score is worth: causality, order of calls, sums, and the same integers on any ranks."""

import copy
import functools
import itertools
import math
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
from naive import naive_counts, naive_mix, naive_probabilities

import train_gpt
from train_gpt import (
    BITS_SCALE,
    TOTAL,
    Commitment,
    NgramHistory,
    OrderError,
    Predictor,
    Runtime,
    Windows,
    evaluate,
    evaluation_plans,
    last_plan,
    new_plan,
    walk,
)

pytestmark = pytest.mark.usefixtures("one_thread")

W = WALK_CFG.eval_seq_len
S = WALK_CFG.eval_stride
CHUNK = WALK_CFG.ttt_chunk_tokens
STREAM = WALK_STREAM
WALKS = {  # the learned mixer takes four steps a chunk
    "pre_quant": (WALK_CFG, new_plan(WALK_CFG, "pre_quant")),
    "round_trip": (WALK_CFG, new_plan(WALK_CFG, "round_trip")),
    "sliding": (WALK_CFG, new_plan(WALK_CFG, "sliding")),
    "sliding+mixer": (WALK_CFG, new_plan(WALK_CFG, "sliding", "mixer")),
    "sliding+learned": (LEARNED_CFG, new_plan(LEARNED_CFG, "sliding", "mixer")),
    "ttt+mixer": (WALK_CFG, new_plan(WALK_CFG, "ttt", "mixer")),
    "ttt+learned": (LEARNED_CFG, new_plan(LEARNED_CFG, "ttt", "mixer")),
}


def recorded(predictor, tokens):
    """(bits of each stage, {stage: frequencies}) of one walk over all tokens."""
    parts = []
    for step in walk(predictor, torch.from_numpy(tokens)):
        parts.append(frequencies(step.commitment))
    return step.bits, {stage: torch.cat([part[stage] for part in parts]) for stage in parts[0]}


# ---- Causality: the mutation test, and cheats that it must catch ---------------------------------

BLOCK = 4 * CHUNK + 1  # begins the mutated block: three TTT updates are behind, the fourth is due


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
    still.mixture.learn = lambda prefix: still.mixture.learner.remembered.clear()
    learned, frozen = (advance(each, STREAM, BLOCK + CHUNK) for each in (predictor, still))
    size = LEARNED_CFG.mixer_block
    moved = (learned["mixer"] != frozen["mixer"]).any(1).view(-1, size)
    assert torch.equal(learned["ttt"], frozen["ttt"])
    assert predictor.mixture.learner.blocks == (BLOCK - 1 + CHUNK) // size - 1
    assert moved.any(1).all()
    assert moved.float().mean() > 0.8


class Peeking(Predictor):
    """Moves half of the likeliest token's frequency to the token that comes."""

    def predict(self, prefix, start, stop):
        """Predict honestly, then look."""
        commitment = super().predict(prefix, start, stop)
        for piece in commitment.pieces:
            for freqs in piece.freqs.values():
                for row, token in zip(freqs, prefix[piece.start :]):
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
        return super().predict(prefix, start, stop)


class MixerLearningFirst(Predictor):
    """Lets the mixer learn from a block, as far as it has its tokens, before it is predicted."""

    def predict(self, prefix, start, stop):
        """Predict, learn, predict again."""
        if stop - start == self.plan.block:
            super().predict(prefix, start, stop)
            self.mixture.learn(prefix)
            self.pending = None
            self.committed_to = start
        return super().predict(prefix, start, stop)


honest_occurrences = NgramHistory.occurrences
honest_evidence = train_gpt.gather_evidence


def occurrences_if_right(history, ends):
    """A context takes part only where it was followed by the token that comes."""
    found = honest_occurrences(history, ends)
    right = history.tokens[found + 1] == history.tokens[ends + 1, None, None]
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


def gate_of_the_block(p, matches, following, cfg):
    """One alpha for a batch of positions, by their mean entropy."""
    real = (matches >= 0).flatten(1).double()
    counts = torch.zeros_like(p).scatter_add_(1, following.flatten(1), real)
    total = counts.sum(1, keepdim=True)
    mean = -torch.special.xlogy(p, p).sum(-1).mean()
    alpha = cfg.alpha_range * torch.sigmoid(2 * (mean - cfg.alpha_center)) * (total > 0)
    return (1 - alpha) * p + alpha * counts / total.clamp(min=1)


def features_of_the_block(*args):
    """Features in units of the batch's largest."""
    evidence = honest_evidence(*args)
    largest = evidence.features.abs().amax((0, 2))
    return evidence._replace(features=evidence.features / largest[:, None])


CHEATS_ON_BOTH = (
    Peeking,
    LearningFirst,
    occurrences_if_right,
    newest_of_the_block,
    contexts_that_hold_their_token,
)
CHEATS = {
    "ttt+mixer": (gate_of_the_block, *CHEATS_ON_BOTH),
    "ttt+learned": (MixerLearningFirst, features_of_the_block, *CHEATS_ON_BOTH),
}


@pytest.mark.parametrize(
    "name, cheat", [(name, cheat) for name in CHEATS for cheat in CHEATS[name]]
)
def test_mutation_test_catches(monkeypatch, name, cheat):
    """Each cheat commits complete integers that nothing but the mutation test objects to."""
    predictor = copy.deepcopy(before_the_block(name))
    if isinstance(cheat, type):
        predictor.__class__ = cheat
    elif cheat is gate_of_the_block:
        monkeypatch.setattr(train_gpt, "mix_entropy", cheat)
    elif cheat is features_of_the_block:
        monkeypatch.setattr(train_gpt, "gather_evidence", cheat)
    else:
        monkeypatch.setattr(NgramHistory, "occurrences", cheat)
    assert any(leaked for *_, leaked, _ in mutations(predictor))


# ---- Decoder and scorer --------------------------------------------------------------------------


@pytest.mark.parametrize("name", WALKS)
def test_decoder_commits_what_the_scorer_commits(name):
    """One position, or seven, at a time give the integers of whole chunks, over TTT's updates."""
    stop = 4 * CHUNK + 7
    scorer = advance(walker(*WALKS[name]), STREAM, stop)
    assert same(advance(walker(*WALKS[name]), STREAM, stop, step=1), scorer)
    assert same(advance(walker(*WALKS[name]), STREAM, stop, step=7), scorer)


@pytest.mark.parametrize("name", ["sliding", "ttt+mixer", "ttt+learned"])
def test_walk_decodes_a_stream_that_is_filled_in_as_it_goes(name):
    """Targets are a view: tokens written there after each commitment are all that it needs."""
    tokens = STREAM[: 2 * CHUNK + 9]
    bits, scorer = recorded(walker(*WALKS[name]), tokens)
    stream = torch.zeros(len(tokens), dtype=torch.int64)
    stream[0] = tokens[0]
    parts = []
    for step in walk(walker(*WALKS[name]), stream, step=1):
        parts.append(frequencies(step.commitment))
        step.targets[:] = int(tokens[step.commitment.start])
    assert same({stage: torch.cat([part[stage] for part in parts]) for stage in scorer}, scorer)
    assert step.bits == bits
    assert stream.tolist() == tokens.tolist()


def test_walk_shows_the_bits_that_were_scored_before():
    """Each step shows the sum of the code lengths of all positions before it."""
    summed = 0
    for commitment, targets, bits in walk(walker(*WALKS["sliding"]), torch.from_numpy(STREAM)):
        assert bits == {"sliding": summed / BITS_SCALE}
        chosen = commitment.chosen("sliding", targets)
        summed += sum(round((24 - math.log2(freq)) * BITS_SCALE) for freq in chosen.tolist())
    assert bits == {"sliding": summed / BITS_SCALE}


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
    assert predictor.committed_to == 1


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
    lengths = dict.fromkeys(plan.stages, 0)
    for start in range(1, 3 * CHUNK, plan.block):
        stop = start + plan.block
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        for stage, length in predictor.score(commitment, stream[start:stop]).items():
            lengths[stage] += length
        predictor.update(stream[:stop])
        stages, _ = evaluate(walker(cfg, plan), STREAM[:stop], 1, quiet)
        bits = {stage["name"]: stage["val_bpb"] for stage in stages}
        assert bits == {stage: length / 2**30 for stage, length in lengths.items()}


@pytest.mark.parametrize("name", ["sliding", "ttt+learned"])
def test_evaluate_reports_what_the_walk_sums(name):
    """Loss is in nats a token, BPB in bits a byte; the last stage's first frequencies are kept."""
    n = 2 * CHUNK + 5
    bits, committed = recorded(walker(*WALKS[name]), STREAM[: n + 1])
    stages, kept = evaluate(walker(*WALKS[name]), STREAM[: n + 1], 777, quiet, keep=40)
    assert [stage["name"] for stage in stages] == list(bits)
    for stage in stages:
        assert stage["val_loss"] == pytest.approx(bits[stage["name"]] * math.log(2) / n, rel=1e-12)
        assert stage["val_bpb"] == pytest.approx(bits[stage["name"]] / 777, rel=1e-12)
        assert stage["tokens"] == n
        assert stage["bytes"] == 777
        assert stage["seconds"] >= 0
    last = committed[stages[-1]["name"]]
    assert kept.tolist() == last[torch.arange(40), torch.from_numpy(STREAM[1:41])].tolist()


def test_plans_hold_the_documented_stages():
    """round_trip, sliding, ttt, mixer, less what is turned off; the mixer shares the last walk."""

    def stages(**changes):
        return [plan.stages for plan in evaluation_plans(tiny_config(**changes))]

    assert stages() == [("round_trip",), ("sliding",), ("ttt", "mixer")]
    assert stages(ttt_enabled=False) == [("round_trip",), ("sliding", "mixer")]
    assert stages(mixer="learned") == stages()
    assert stages(mixer="none") == [("round_trip",), ("sliding",), ("ttt",)]
    assert stages(mixer="none", ttt_enabled=False) == [("round_trip",), ("sliding",)]


def test_last_plan_in_lanes_has_no_ttt():
    """`compress` codes with the sliding stage and the mixer, if there is one."""
    assert last_plan(tiny_config(), lanes=4).stages == ("sliding", "mixer")
    assert last_plan(tiny_config(mixer="none"), lanes=4).stages == ("sliding",)


def test_block_is_the_learned_mixers_where_it_learns():
    """Updates come every MIXER_BLOCK positions where there is something to learn, else a chunk."""
    learned, entropy = tiny_config(mixer="learned"), tiny_config()
    assert last_plan(learned).block == learned.mixer_block
    assert last_plan(entropy).block == entropy.ttt_chunk_tokens
    assert new_plan(learned, "sliding").block == learned.ttt_chunk_tokens


@pytest.mark.parametrize("name", ["ttt+mixer", "ttt+learned"])
def test_mixer_leaves_the_stage_before_it_alone(name):
    """The ttt stage of a shared walk is that of a walk without mixer."""
    alone = advance(walker(WALK_CFG, new_plan(WALK_CFG, "ttt")), STREAM, 3 * CHUNK + 1)
    shared = advance(walker(*WALKS[name]), STREAM, 3 * CHUNK + 1)
    assert torch.equal(shared["ttt"], alone["ttt"])
    assert not torch.equal(shared["ttt"], shared["mixer"])


def test_ttt_stage_begins_as_sliding():
    """Before the first update, at TTT_TEMPERATURE 1, its integers are those of that stage."""
    cfg = replace(WALK_CFG, ttt_temperature=1.0)
    ttt = advance(walker(cfg, new_plan(cfg, "ttt")), STREAM, CHUNK + 1)["ttt"]
    assert torch.equal(ttt, advance(walker(*WALKS["sliding"]), STREAM, CHUNK + 1)["sliding"])


def test_ttt_temperature_divides_the_logits():
    """Before the first update the ttt stage is the sliding stage to the power 1 / temperature."""
    sliding = advance(walker(*WALKS["sliding"]), STREAM, CHUNK + 1)["sliding"].double() / TOTAL
    ttt = advance(walker(*WALKS["ttt+mixer"]), STREAM, CHUNK + 1)["ttt"].double() / TOTAL
    heated = sliding ** (1 / WALK_CFG.ttt_temperature)
    heated /= heated.sum(1, keepdim=True)
    torch.testing.assert_close(ttt, heated, rtol=1e-3, atol=1e-5)
    assert WALK_CFG.ttt_temperature != 1
    assert (ttt - sliding).abs().max() > 1e-4


# ---- One rank and two ----------------------------------------------------------------------------


def rank_walks(rt, artifacts, tokens):
    """What a rank commits, sums and learns in each walk over the artifacts, by plan.

    All walks over the first artifact and the last one over each other.
    """
    reports = []
    for number, data in enumerate(artifacts):
        artifact = unpacked(data)
        cfg = train_gpt.Config(**artifact.settings)
        plans = [new_plan(cfg, "pre_quant"), *evaluation_plans(cfg)]
        for plan in plans[-1:] if number else plans:
            models = [train_gpt.new_model(cfg, rt, artifact.weights) for _ in range(2)]
            predictor, again = (
                Predictor(model, artifact.weights["mixer"], cfg, TABLE, rt, plan)
                for model in models
            )
            pieces = []
            for step in walk(predictor, torch.from_numpy(tokens)):
                pieces += step.commitment.pieces
            stages, kept = evaluate(again, tokens[:61], 1000, quiet, keep=50)
            learner = predictor.mixture.learner if predictor.mixture else None
            reports.append(
                dict(
                    name="+".join(plan.stages),
                    bits=step.bits,
                    bpb={stage["name"]: stage["val_bpb"] for stage in stages},
                    kept=kept.tolist(),
                    pieces=[tuple(piece) for piece in pieces],
                    weights=weights_of(models[0]),
                    mixer={"weights": learner.weights} if learner else {},
                )
            )
    return reports


def joined(pieces):
    """{stage: frequencies} of (start, stop, freqs) that hold every position from 1 on once."""
    pieces = sorted(pieces, key=lambda piece: piece[0])
    assert [start for start, *_ in pieces] == [1, *(stop for _, stop, _ in pieces[:-1])]
    return {stage: torch.cat([freqs[stage] for *_, freqs in pieces]) for stage in pieces[0][2]}


@pytest.mark.slow
def test_two_ranks_commit_what_one_commits(run_ranks):
    """From one artifact, with work that two ranks cannot share evenly."""
    entropy = tiny_config(ttt_chunk_tokens=160)  # five sequences: TTT micro-batches of 2, 2 and 1
    learned = tiny_config(ttt_chunk_tokens=160, mixer="learned", mixer_block=40, mixer_lr=0.01)
    artifacts = [
        train_gpt.pack_artifact(warm_weights(cfg), cfg, TABLE, 8.0) for cfg in (entropy, learned)
    ]
    tokens = tiny_stream(2 * 160 + 6)  # five positions in the third chunk
    alone = rank_walks(HERE, artifacts, tokens)
    pair = run_ranks(2, rank_walks, artifacts, tokens)
    names = [report["name"] for report in alone]
    assert names == ["pre_quant", "round_trip", "sliding", "ttt+mixer", "ttt+mixer"]
    for expected, first, second in zip(alone, *pair):
        for report in (first, second):
            assert report["bits"] == expected["bits"]
            assert report["bpb"] == expected["bpb"]
            assert report["kept"] == expected["kept"]
            assert same(report["weights"], expected["weights"])
            assert same(report["mixer"], expected["mixer"])
            assert report["pieces"]
        assert same(joined(first["pieces"] + second["pieces"]), joined(expected["pieces"]))

    start = unpacked(artifacts[0]).weights
    mixer = start.pop("mixer")
    untouched = [same(report["weights"], start) for report in alone]
    assert untouched == [True, True, True, False, False]
    assert same(alone[3]["weights"], alone[4]["weights"])
    assert not torch.equal(alone[4]["mixer"]["weights"], mixer)


def rank_refuses(rt):
    """How a rank refuses where only the second one's model is broken."""
    model = broken_model() if rt.rank else sharp_model(WALK_CFG)
    cfg, plan = WALKS["sliding"]
    predictor = Predictor(model, None, cfg, TABLE, rt, plan)
    return refusal(predictor.predict, torch.from_numpy(STREAM[:CHUNK]), 1, CHUNK + 1)


@pytest.mark.slow
def test_broken_rank_stops_all_ranks(run_ranks):
    """Both ranks refuse, so that none waits for the other."""
    messages = run_ranks(2, rank_refuses)
    assert len(messages) == 2
    assert all("logits are not finite" in message for message in messages)


# ---- The engine's inner shapes: what follows knows how windows are cut and computed --------------


@pytest.mark.parametrize(
    "name, stride", [("pre_quant", W), ("round_trip", W), ("sliding", S), ("sliding+mixer", S)]
)
def test_windows_match_plain_forward_passes(name, stride):
    """Every commitment is the softmax of its own window, and that mixed with plain counts."""
    n = 4 * CHUNK + 3
    tokens = STREAM[: n + 1]
    neural = naive_probabilities(sharp_model(WALK_CFG), tokens, W, stride)
    expected = {WALKS[name][1].stages[0]: neural}
    if "+" in name:
        counts, _ = naive_counts(tokens.tolist(), VOCAB, WALK_CFG, BEGINS)
        gate = (WALK_CFG.alpha_base, WALK_CFG.alpha_range, WALK_CFG.alpha_center)
        mixed = [naive_mix(p.tolist(), c.tolist(), *gate) for p, c in zip(neural, counts[1:])]
        expected["mixer"] = np.array(mixed)
    committed = advance(walker(*WALKS[name]), STREAM, n + 1)
    assert committed.keys() == expected.keys()
    for stage, p in expected.items():
        p = (1 + np.floor(p * (TOTAL - VOCAB))) / TOTAL
        q = committed[stage].numpy() / TOTAL
        np.testing.assert_allclose(q, p, rtol=1e-4, atol=(VOCAB + 2) / TOTAL)
        bits, naive = (-np.log2(z[np.arange(n), tokens[1:]]).sum() for z in (q, p))
        np.testing.assert_allclose(bits, naive, rtol=1e-5)


@pytest.mark.parametrize("name", WALKS)
def test_shapes_do_not_depend_on_what_is_known(monkeypatch, name):
    """Decoder and scorer take a batch through each function in one shape, for equal rounding."""

    def spied(owner, function, seen):
        honest = getattr(owner, function)

        def spy(*args):
            tensors = [arg[0][0] if isinstance(arg, list) else arg for arg in args]  # cached rows
            shapes = (t.shape for t in tensors if isinstance(t, torch.Tensor))
            seen.add((function, *shapes))
            return honest(*args)

        return spy

    def shapes(step):
        predictor = walker(*WALKS[name])
        seen = set()
        owners = [(predictor.engine, "forward"), (train_gpt, "commit")]
        owners += [(train_gpt, "mix_entropy"), (train_gpt, "gather_evidence")]
        if "learned" in name:
            owners += [(predictor.mixture.learner, name) for name in ("mix", "gradient")]
        with monkeypatch.context() as patch:
            for owner, function in owners:
                patch.setattr(owner, function, spied(owner, function, seen))
            advance(predictor, STREAM, 2 * CHUNK + 3, step)
        return seen

    functions = {"forward", "commit"}
    if "+mixer" in name:
        functions |= {"mix_entropy"}
    if "learned" in name:
        functions |= {"gather_evidence", "mix", "gradient"}
    seen = shapes(CHUNK)
    assert {function for function, *_ in seen} == functions
    assert shapes(1) == seen
    assert shapes(7) == seen
    passes = ["first window", "rows", "tile"] if WALKS[name][1].stride < W else ["first", "later"]
    assert len([function for function, *_ in seen if function == "forward"]) == len(passes)


@pytest.mark.parametrize("name", ["round_trip", "sliding"])
def test_ranks_take_batches_of_windows_in_turn(name):
    """Two ranks cut the work as one does; the second has none where there is one batch."""
    cfg, plan = WALKS[name]
    prefix = torch.from_numpy(STREAM[: 2 * CHUNK])
    chunks = [(1, 1, CHUNK + 1), (CHUNK + 1, CHUNK + 1, 2 * CHUNK + 1)]
    chunks += [(CHUNK + 1, CHUNK + 1, CHUNK + 3)]  # two positions: one batch

    def batches(rank, world, *chunk):
        engine = Windows(sharp_model(cfg), cfg, Runtime(rank=rank, world=world), plan)
        with torch.no_grad():
            return list(engine.logits(prefix, *chunk))

    for chunk in chunks:
        alone = batches(0, 1, *chunk)
        for rank in range(2):
            shared = batches(rank, 2, *chunk)
            assert [batch.index for batch, _ in shared] == [b.index for b, _ in alone][rank::2]
            for (batch, logits), (lone_batch, lone_logits) in zip(shared, alone[rank::2]):
                assert batch.committed == lone_batch.committed
                assert torch.equal(batch.rows, lone_batch.rows)
                assert torch.equal(logits, lone_logits)
    assert len(alone) == 1
