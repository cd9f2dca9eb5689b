"""What a score is worth: causality, order of calls, windows, test-time training, and the same integers on any rank."""

import copy
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB, tiny_config, tiny_stream, tiny_table, unpacked, warm_model
from test_history import naive_counts, naive_mix

import train_gpt
from train_gpt import (
    TOTAL,
    Commitment,
    EvalPass,
    NgramHistory,
    OrderError,
    Predictor,
    Runtime,
    TestTimeTrainer,
    evaluate,
    evaluation_passes,
)

HERE, TABLE = Runtime(), tiny_table()
CFG = tiny_config(
    eval_seq_len=16, eval_stride=4, ttt_chunk_tokens=32, ttt_lr=3e-3, alpha_center=2.0
)
W, S, CHUNK = CFG.eval_seq_len, CFG.eval_stride, CFG.ttt_chunk_tokens
STREAM = tiny_stream(8 * CHUNK)
PLANS = {
    "+".join(plan.stages): plan
    for plan in (
        EvalPass(("pre_quant",), W),
        *evaluation_passes(CFG),
        evaluation_passes(replace(CFG, ttt_enabled=False))[-1],
    )
}
PLANS |= {"ttt+learned": PLANS["ttt+mixer"], "sliding+learned": PLANS["sliding+mixer"]}
# The learned mixer takes four steps a chunk; its blocks' borders cut windows and batches of windows.
LEARNED = replace(CFG, mixer="learned", mixer_block=8, mixer_lr=0.01, ngram_recent=3)
CFGS = {name: LEARNED if "learned" in name else CFG for name in PLANS}
BEGINS = np.array(
    [kind in "UCX" or piece[0] == train_gpt.SPACE for piece, kind in zip(TABLE.pieces, TABLE.kinds)]
)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: matrices this small gain nothing from two, and ranks are compared with what is computed here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def warmed(cfg):
    """A warm model of `cfg` with sharp predictions, to be copied."""
    model = warm_model(cfg)
    with torch.no_grad():
        model.embed.tokens.mul_(4)
    return model


def new_predictor(plan, cfg=CFG, cls=Predictor):
    """A predictor at the stream's start; all have the same weights. A plan may be given by its name, with its cfg."""
    plan, cfg = (PLANS[plan], CFGS[plan]) if isinstance(plan, str) else (plan, cfg)
    return cls(copy.deepcopy(warmed(cfg)), cfg, TABLE, HERE, plan)


def frequencies(commitment):
    """{stage: frequencies (stop - start, V)} of a lone rank; every position is there once and sums to 2^24."""
    pieces = sorted(commitment.pieces, key=lambda piece: piece[1])
    borders = [commitment.start, *(last for _, _, last, _ in pieces)]
    assert [first for _, first, _, _ in pieces] == borders[:-1] and borders[-1] == commitment.stop
    joined = {stage: torch.cat([freqs[stage] for *_, freqs in pieces]) for stage in pieces[0][3]}
    for freqs in joined.values():
        assert freqs.dtype == torch.int32 and freqs.shape == (
            commitment.stop - commitment.start,
            VOCAB,
        )
        assert freqs.min() >= 1 and (freqs.long().sum(1) == 1 << 24).all()
    return joined


def advance(predictor, tokens, stop, block=CHUNK):
    """Go on to position stop - 1 by blocks, as a decoder would: no call is given a token that it must not see."""
    stream, parts = torch.from_numpy(tokens), []
    while (start := predictor.committed) < stop:
        if start == predictor.learned + predictor.block:
            predictor.update(stream[:start].clone())
        end = min(start + block, predictor.learned + predictor.block, stop)
        commitment = predictor.predict(stream[: end - 1].clone(), start, end)
        parts.append(frequencies(commitment))
        predictor.score(commitment, stream[start:end])
    return {stage: torch.cat([part[stage] for part in parts]) for stage in predictor.plan.stages}


def same(a, b):
    """Whether two dictionaries of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def weights_of(model):
    """A copy of the parameters, {name: tensor}."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------
# Causality: the mutation test, and cheats that it must catch
# ----------------------------------------------------------------------------------------------------------

BLOCK = (
    4 * CHUNK + 1
)  # the block begins here: three TTT updates are behind it and the fourth precedes it


def mutations(predictor):
    """Change the block's tokens, at each offset t that token alone, then it and all later ones.
    Yields (t, stage, whether a commitment up to t changed, whether one after t did)."""
    random = np.random.default_rng(1)
    plain = advance(copy.deepcopy(predictor), STREAM, BLOCK + CHUNK + W)
    for t in range(BLOCK, BLOCK + CHUNK):
        for changed in (slice(t, t + 1), slice(t, None)):
            tokens = STREAM.copy()
            tokens[changed] = (
                tokens[changed] + random.integers(1, VOCAB, len(tokens[changed]))
            ) % VOCAB
            after_update = (
                t == BLOCK + CHUNK - 1
            )  # the block's last token is first seen by the update
            stop = BLOCK + CHUNK + (W if after_update else 0)
            for stage, freqs in advance(copy.deepcopy(predictor), tokens, stop).items():
                differs = (freqs != plain[stage][: len(freqs)]).any(1)
                yield (
                    t,
                    stage,
                    differs[: t + 1 - BLOCK].any().item(),
                    differs[t + 1 - BLOCK :].any().item(),
                )


@functools.cache
def walked(name):
    """A predictor that is about to predict the block, to be copied."""
    predictor = new_predictor(name)
    advance(predictor, STREAM, BLOCK)
    return predictor


@pytest.mark.parametrize("name", PLANS)
def test_no_commitment_depends_on_its_token_or_later_ones(name):
    """In every stage a change at any offset leaves all commitments up to it bitwise alone and moves a later one."""
    seen = list(mutations(copy.deepcopy(walked(name))))
    assert len(seen) == 2 * CHUNK * len(PLANS[name].stages)
    assert not [(t, stage) for t, stage, leaked, _ in seen if leaked]
    assert not [(t, stage) for t, stage, _, noticed in seen if not noticed]


def test_the_mutated_block_exercises_the_gates():
    """Inside the block the history backs off to every context length, and alpha takes small and large values."""
    _, used = naive_counts(STREAM[: BLOCK + CHUNK].tolist(), VOCAB, CFG, BEGINS)
    assert set(used[BLOCK:]) == set(range(CFG.ngram_order))
    p = advance(copy.deepcopy(walked("ttt+mixer")), STREAM, BLOCK + CHUNK)["ttt"].double() / TOTAL
    alpha = CFG.alpha_base + CFG.alpha_range * torch.sigmoid(
        2 * (-(p * p.log()).sum(1) - CFG.alpha_center)
    )
    assert alpha.min() < 0.5 * CFG.alpha_range < 0.7 * CFG.alpha_range < alpha.max()


def test_the_mutated_block_exercises_the_learned_mixer():
    """Inside the block it moves frequencies up and down, with evidence of all kinds, and learns after each part."""
    predictor, still = copy.deepcopy(walked("ttt+learned")), copy.deepcopy(walked("ttt+learned"))
    still.mixer.learn = lambda tokens: still.mixer.waiting.clear()
    freqs, frozen = (advance(each, STREAM, BLOCK + CHUNK) for each in (predictor, still))
    shift, size = (freqs["mixer"].double() / freqs["ttt"].double()).log2(), LEARNED.mixer_block
    assert (
        ((shift.abs() > 0.1).any(1)).float().mean() > 0.8
        and shift.min() < -0.3
        and shift.max() > 0.3
    )
    assert (
        torch.equal(freqs["ttt"], frozen["ttt"])
        and predictor.mixer.blocks == (BLOCK - 1 + CHUNK) // size - 1
    )
    moved = (freqs["mixer"] != frozen["mixer"]).any(1).view(-1, size)
    assert moved.any(1).all() and moved.float().mean() > 0.8  # an update comes before each part
    ends = predictor.history.occurrences(torch.arange(BLOCK - 1, BLOCK + CHUNK - 1))
    assert (ends >= 0).any(0).all() and (ends < 0).any(0).all()


class Peeking(Predictor):
    """Moves half of the likeliest token's frequency to the token that comes."""

    def predict(self, prefix, start, stop):
        """Predict honestly, then look."""
        commitment = super().predict(prefix, start, stop)
        for _, first, _, freqs in commitment.pieces:
            for f in freqs.values():
                for row, token in zip(f, prefix[first:]):
                    best = row.argmax().item()
                    moved = row[best].item() // 2
                    row[best] -= moved
                    row[token] += moved
        return commitment


class LearningFirst(Predictor):
    """Trains on a chunk, as far as it has its tokens, before it predicts a part of it."""

    def predict(self, prefix, start, stop):
        """Learn, then predict."""
        if stop - start == self.block:
            tokens = prefix[(start - 1) // CHUNK * CHUNK :]
            self.ttt.adapt_chunk(F.pad(tokens, (0, CHUNK + 1 - len(tokens))))
        return super().predict(prefix, start, stop)


class MixerLearningFirst(Predictor):
    """Lets the mixer learn from a block's tokens, as far as it has them, before it predicts the block for good."""

    def predict(self, prefix, start, stop):
        """Predict, learn, predict again."""
        if stop - start == self.block:
            super().predict(prefix, start, stop)
            self.mixer.learn(self.history.tokens)
            self.pending, self.committed = None, start
        return super().predict(prefix, start, stop)


honest_occurrences, honest_evidence = NgramHistory.occurrences, train_gpt.gather_evidence


def occurrences_if_right(history, at):
    """A context takes part only where it was followed by the token that comes."""
    ends = honest_occurrences(history, at)
    right = (history.tokens[ends + 1] == history.tokens[at + 1, None, None]) & (ends >= 0)
    return torch.where(right.any(2, keepdim=True), ends, -1)


def newest_of_the_block(history, at):
    """The last occurrence is that of all tokens there are, not that before the position."""
    ends = honest_occurrences(history, at)
    newest = history.heads.gather(1, history.hashes(at.expand(ends.size(1), -1))).T.long()
    ends[..., 0] = torch.where(newest < at[-1], newest, -1)  # the token after it is known
    return ends


def contexts_that_hold_their_token(history, at):
    """Looks for the context that ends with the token to be predicted."""
    return torch.cat([honest_occurrences(history, at[1:]), honest_occurrences(history, at[-1:])])


def gate_of_the_block(p, ends, following, cfg):
    """One alpha for a batch of positions, by their mean entropy."""
    counts = torch.zeros_like(p).scatter_add_(
        1, following.flatten(1), (ends >= 0).flatten(1).double()
    )
    mean = -torch.special.xlogy(p, p).sum(-1).mean()
    alpha = (
        cfg.alpha_range
        * torch.sigmoid(2 * (mean - cfg.alpha_center))
        * (counts.sum(1, keepdim=True) > 0)
    )
    return (1 - alpha) * p + alpha * counts / counts.sum(1, keepdim=True).clamp(min=1)


def features_of_the_block(p, ends, following, at, window, lanes):
    """Features in units of the batch's largest."""
    tokens, distinct, features = honest_evidence(p, ends, following, at, window, lanes)
    return tokens, distinct, features / features.abs().amax((0, 2))[:, None]


CHEATS = {
    "ttt+mixer": [gate_of_the_block],
    "ttt+learned": [MixerLearningFirst, features_of_the_block],
}
for both in (
    Peeking,
    LearningFirst,
    occurrences_if_right,
    newest_of_the_block,
    contexts_that_hold_their_token,
):
    CHEATS = {name: [*cheats, both] for name, cheats in CHEATS.items()}


@pytest.mark.parametrize(
    "name, cheat", [(name, cheat) for name in CHEATS for cheat in CHEATS[name]]
)
def test_the_mutation_test_catches(monkeypatch, name, cheat):
    """Each cheat commits complete integers that nothing but the mutation test objects to."""
    predictor = copy.deepcopy(walked(name))
    if isinstance(cheat, type):
        predictor.__class__ = cheat
    elif cheat is gate_of_the_block:
        monkeypatch.setattr(train_gpt, "mix_entropy", cheat)
    elif cheat is features_of_the_block:
        monkeypatch.setattr(train_gpt, "gather_evidence", cheat)
    else:
        monkeypatch.setattr(NgramHistory, "occurrences", cheat)
    assert any(leaked for *_, leaked, _ in mutations(predictor))


@pytest.mark.parametrize("name", PLANS)
def test_a_decoder_commits_what_the_scorer_commits(name):
    """Position by position, and in blocks of 7, the integers are those of whole chunks, over several TTT updates."""
    stop = 4 * CHUNK + 7
    whole = advance(new_predictor(name), STREAM, stop)
    assert same(advance(new_predictor(name), STREAM, stop, block=1), whole)
    assert same(advance(new_predictor(name), STREAM, stop, block=7), whole)


@pytest.mark.parametrize("name", PLANS)
def test_shapes_do_not_depend_on_what_is_known(monkeypatch, name):
    """Decoder and scorer take a batch through model, mixture and rounding in one shape: others may round otherwise."""

    def spied(name, function, seen):
        def spy(*args):
            tensors = [
                arg[0][0] if isinstance(arg, list) else arg for arg in args
            ]  # a list holds the cached rows
            seen.add((name, *(t.shape for t in tensors if isinstance(t, torch.Tensor))))
            return function(*args)

        return spy

    def shapes(block):
        predictor, seen = new_predictor(name), set()
        predictor.forward = spied("forward", predictor.forward, seen)
        if predictor.mixer:
            for function in (predictor.mixer.mix, predictor.mixer.gradient):
                setattr(
                    predictor.mixer, function.__name__, spied(function.__name__, function, seen)
                )
        with monkeypatch.context() as patch:
            for function in (train_gpt.commit, train_gpt.mix_entropy, train_gpt.gather_evidence):
                patch.setattr(
                    train_gpt, function.__name__, spied(function.__name__, function, seen)
                )
            advance(predictor, STREAM, 2 * CHUNK + 3, block)
        kinds = {"forward", "commit"} | ({"mix_entropy"} if "+mixer" in name else set())
        assert {kind for kind, *_ in seen} == kinds | (
            {"gather_evidence", "mix", "gradient"} if predictor.mixer else set()
        )
        return seen

    assert shapes(CHUNK) == shapes(1) == shapes(7)
    assert len([s for s in shapes(1) if s[0] == "forward"]) == 2 + (
        PLANS[name].stride < W
    )  # first window, rows, tile


# ----------------------------------------------------------------------------------------------------------
# Order of calls
# ----------------------------------------------------------------------------------------------------------


def refused(call, *args):
    """The call must raise OrderError."""
    with pytest.raises(OrderError):
        call(*args)


@pytest.mark.parametrize("name", ["sliding", "ttt+mixer", "ttt+learned"])
def test_calls_out_of_order_raise_and_change_nothing(name):
    """Each wrong call is refused, and the predictor goes on as if nobody had made it."""
    predictor, stream, commitments = new_predictor(name), torch.from_numpy(STREAM), []
    size = predictor.block
    assert size == (8 if name == "ttt+learned" else CHUNK)
    borders = [
        1,
        6,
        size + 1,
        size + 4,
        2 * size + 1,
        *range(3 * size + 1, 2 * CHUNK + 2, size),
        2 * CHUNK + 5,
    ]
    parts = [part for part in zip(borders, borders[1:]) if part[0] < part[1]]
    for start, stop in parts:
        prefix, targets = stream[: stop - 1], stream[start:stop]
        limit = predictor.learned + size
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
        refused(predictor.predict, prefix, start, stop)  # predicted twice
        refused(predictor.predict, stream[:stop], stop, stop + 1)  # the score is due
        refused(predictor.update, stream[:stop])  # update before score
        refused(predictor.score, copy.copy(commitment), targets)  # another commitment
        refused(predictor.score, commitment, targets[:-1])  # a target is missing
        refused(predictor.score, commitment, stream[start : stop + 1])  # one too many
        predictor.score(commitment, targets)
        refused(predictor.score, commitment, targets)  # scored twice
        refused(predictor.predict, prefix, start, stop)  # scored already
        if stop == limit:
            refused(predictor.predict, stream[:stop], stop, stop + 1)  # update is due
            refused(predictor.update, stream[: stop - 1])  # the last token is missing
            refused(predictor.update, stream[: stop + 1])  # a token is not scored yet
            predictor.update(stream[:stop])
        refused(predictor.update, stream[:stop])  # early, or twice
    undisturbed = advance(new_predictor(name), STREAM, parts[-1][1])
    assert same(
        {s: torch.cat([c[s] for c in commitments]) for s in PLANS[name].stages}, undisturbed
    )


# ----------------------------------------------------------------------------------------------------------
# Windows and sums
# ----------------------------------------------------------------------------------------------------------


class Recorder(Predictor):
    """Remembers what it commits."""

    def predict(self, prefix, start, stop):
        """Predict, and keep the pieces with the positions asked for."""
        commitment = super().predict(prefix, start, stop)
        self.__dict__.setdefault("record", []).append(commitment)
        return commitment


def evaluated(plan, n, cfg=CFG, total_bytes=777):
    """(stages as reported, {stage: frequencies (n, V)}) of scoring n tokens in one walk; a plan, or its name."""
    predictor = new_predictor(plan, cfg, Recorder)
    stages = evaluate(predictor, STREAM[: n + 1], total_bytes, print)
    parts = list(map(frequencies, predictor.record))
    assert [c.start for c in predictor.record] == [1, *(c.stop for c in predictor.record[:-1])]
    return stages, {
        stage: torch.cat([part[stage] for part in parts]) for stage in predictor.plan.stages
    }


def naive_probabilities(n, stride):
    """p (n, V): position t from the one window that scores it, cut off before t, in one plain forward pass."""
    stream, rows = torch.from_numpy(STREAM), []
    for t in range(1, n + 1):
        begin = 0 if t <= W else ((t - 1 - W) // stride + 1) * stride
        with torch.no_grad():
            rows.append(torch.softmax(warmed(CFG)(stream[None, begin:t])[0][0, -1].double(), -1))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize(
    "name, stride", [("pre_quant", W), ("round_trip", W), ("sliding", S), ("sliding+mixer", S)]
)
def test_windows_are_those_of_plain_forward_passes(name, stride):
    """Without TTT every commitment is the softmax of its own window, and the mixture of that with plain counts."""
    n = 4 * CHUNK + 3
    expected = {PLANS[name].stages[0]: naive_probabilities(n, stride)}
    if "mixer" in PLANS[name].stages:
        counts, _ = naive_counts(STREAM[: n + 1].tolist(), VOCAB, CFG, BEGINS)
        mixed = [
            naive_mix(p.tolist(), c.tolist(), CFG.alpha_base, CFG.alpha_range, CFG.alpha_center)
            for p, c in zip(expected["sliding"], counts[1:])
        ]
        expected["mixer"] = np.array(mixed)
    _, committed = evaluated(PLANS[name], n)
    for stage, p in expected.items():
        p, q = (1 + np.floor(p * (TOTAL - VOCAB))) / TOTAL, committed[stage].numpy() / TOTAL
        np.testing.assert_allclose(q, p, rtol=1e-4, atol=(VOCAB + 2) / TOTAL)
        bits, naive = (-np.log2(z[np.arange(n), STREAM[1 : n + 1]]) for z in (q, p))
        np.testing.assert_allclose(bits.sum(), naive.sum(), rtol=1e-5)
    assert len(expected) == len(committed)


LENGTHS = [
    1,
    2,
    5,
    W - 1,
    W,
    W + 1,
    W + S,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    2 * CHUNK,
    2 * CHUNK + W,
    4 * CHUNK + 3,
]


@pytest.mark.parametrize("name", ["round_trip", "sliding", "ttt+mixer", "ttt+learned"])
def test_a_score_is_the_sum_of_its_code_lengths(name):
    """For any length, tail included: each position once, bits summed by hand, and the start of a longer stream's."""
    longest = evaluated(name, LENGTHS[-1])[1]
    for n in LENGTHS:
        stages, committed = evaluated(name, n)
        assert [stage["name"] for stage in stages] == list(PLANS[name].stages)
        assert same(committed, {stage: freqs[:n] for stage, freqs in longest.items()}), n
        for stage in stages:
            freqs = committed[stage["name"]].numpy()
            bits = sum(
                24 - math.log2(row[token]) for row, token in zip(freqs.tolist(), STREAM[1 : n + 1])
            )
            assert stage["val_loss"] == pytest.approx(bits * math.log(2) / n, rel=1e-12)
            assert stage["val_bpb"] == pytest.approx(bits / 777, rel=1e-12)
            assert (stage["tokens"], stage["bytes"]) == (n, 777) and stage["seconds"] >= 0


def test_a_prefix_costs_exactly_what_it_costs_inside_a_longer_stream():
    """The bits that a walk has summed at a block's end are, to the last bit, those of a stream that ends there."""
    for name, plan in PLANS.items():
        predictor, stream, bits = (
            new_predictor(name),
            torch.from_numpy(STREAM),
            dict.fromkeys(plan.stages, 0.0),
        )
        for start in range(1, 3 * CHUNK, predictor.block):
            stop = start + predictor.block
            commitment = predictor.predict(stream[: stop - 1], start, stop)
            for stage, chunk_bits in predictor.score(commitment, stream[start:stop]).items():
                bits[stage] += chunk_bits
            predictor.update(stream[:stop])
            stages, _ = evaluated(name, stop - 1, total_bytes=1)
            assert {stage["name"]: stage["val_bpb"] for stage in stages} == bits, name


def test_passes_hold_the_documented_stages():
    """round_trip, sliding, ttt, mixer in this order, less what is turned off; the mixer shares the last pass."""

    def stages(**changes):
        return [plan.stages for plan in evaluation_passes(tiny_config(**changes))]

    assert stages() == [("round_trip",), ("sliding",), ("ttt", "mixer")]
    assert stages(ttt_enabled=False) == [("round_trip",), ("sliding", "mixer")]
    assert stages(mixer="learned") == stages()
    assert stages(mixer="none") == [("round_trip",), ("sliding",), ("ttt",)]
    assert stages(mixer="none", ttt_enabled=False) == [("round_trip",), ("sliding",)]


def test_each_stage_contains_the_means_of_those_before():
    """The ttt stage of a shared pass is that of a pass without mixer, and begins as sliding at TTT_TEMPERATURE."""
    cfg = replace(CFG, mixer="none")
    _, alone = evaluated(evaluation_passes(cfg)[-1], 3 * CHUNK, cfg)
    for name in ("ttt+learned", "ttt+mixer"):
        _, shared = evaluated(name, 3 * CHUNK)
        assert torch.equal(shared["ttt"], alone["ttt"]) and not torch.equal(
            shared["ttt"], shared["mixer"]
        )
    plain = evaluated(PLANS["sliding"], 3 * CHUNK)[1]["sliding"].double()[:CHUNK] / TOTAL
    heated = plain ** (1 / CFG.ttt_temperature)
    heated /= heated.sum(1, keepdim=True)
    ttt = shared["ttt"].double() / TOTAL
    torch.testing.assert_close(ttt[:CHUNK], heated, rtol=1e-3, atol=1e-5)
    assert CFG.ttt_temperature != 1 and (ttt[:CHUNK] - plain).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------------------
# Test-time training
# ----------------------------------------------------------------------------------------------------------


def naive_bytes(before, token):
    """Bytes of a token after another one, from its piece alone."""
    piece, kind = TABLE.pieces[token], TABLE.kinds[token]
    if kind == "N" and piece[0] == train_gpt.SPACE:
        return len(piece) - (TABLE.kinds[before] in "UCX")
    return {"N": len(piece), "B": 1}.get(kind, 0)


def learns(name):
    """Whether TTT with two frozen blocks of four trains a parameter: vectors, token table, later blocks' matrices."""
    vectors = (
        "q_gain",
        "mix_x",
        "mix_x0",
        "attn_scale",
        "mlp_scale",
        "smear",
        "ve_scale",
        "scales",
        "bigram_scale",
    )
    return (
        name == "embed.tokens"
        or name.endswith(vectors)
        or name.startswith(("blocks.2", "blocks.3"))
    )


def naive_rate(chunk, cfg):
    """Learning rate of chunk 0, 1, ...: cosine over the schedule, with a ramp from 1 to 3 over its first 30 %."""
    done = min(chunk / cfg.ttt_schedule_chunks, 1)
    return cfg.ttt_lr * (0.5 + 0.5 * math.cos(math.pi * done)) * min(3, 1 + 2 * done / 0.3)


def naive_ttt(cfg, chunks, weighted=True):
    """(live, average) weights after all chunks: autograd on the mean over the chunk, torch's AdamW, a plain average."""
    live, average = copy.deepcopy(warmed(cfg)), weights_of(warmed(cfg))
    params = [p for n, p in live.named_parameters() if learns(n)]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    for number, tokens in enumerate(chunks):
        optimizer.param_groups[0]["lr"] = naive_rate(number, cfg)
        pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist()))
        weights = torch.tensor([naive_bytes(*pair) if weighted else 1 for pair in pairs])
        x, y = torch.tensor(pairs).T
        for _ in range(cfg.ttt_epochs):
            optimizer.zero_grad()
            nats = F.cross_entropy(
                live(x.view(-1, cfg.eval_seq_len))[0].flatten(0, 1), y, reduction="none"
            )
            ((weights * nats).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            for n, p in live.named_parameters():
                average[n] = cfg.polyak_decay * average[n] + (1 - cfg.polyak_decay) * p.detach()
    return weights_of(live), average


def chunk_of(seed, cfg=CFG):
    """A chunk and the token before it, with control and byte pieces in it."""
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, VOCAB, cfg.ttt_chunk_tokens + 1)
    )


def distance(a, b, start):
    """How far a is from b, of the way from `start` to b; over all weights."""
    return math.sqrt(
        sum((a[n] - b[n]).square().sum().item() for n in b)
        / sum((start[n] - b[n]).square().sum().item() for n in b)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ttt_chunk_tokens=80, ttt_epochs=3, polyak_decay=0.9),
        dict(ttt_lr=1e-4, ttt_epochs=1, polyak_decay=0.0),
    ],
)
def test_ttt_equals_plain_training(changes):
    """Live weights and their Polyak average go where plain training on the byte-weighted loss goes."""
    cfg = replace(CFG, **changes)
    chunks = [chunk_of(seed, cfg) for seed in range(3)]
    model = copy.deepcopy(warmed(cfg))
    trainer, start = TestTimeTrainer(model, cfg, TABLE, HERE), weights_of(model)
    for tokens in chunks:
        trainer.adapt_chunk(tokens)
    live, average = naive_ttt(cfg, chunks)
    assert distance(weights_of(trainer.live), live, start) < 0.005
    assert distance(weights_of(model), average, start) < 0.005
    unweighted, _ = naive_ttt(cfg, chunks, weighted=False)
    assert distance(unweighted, live, start) > 0.05
    assert cfg.polyak_decay == 0 or distance(live, average, start) > 0.05


def test_frozen_weights_stay_and_all_others_learn():
    """TTT_FREEZE_BLOCKS first blocks keep their matrices to the last bit, and so do all tables but the tokens'."""
    model = copy.deepcopy(warmed(CFG))
    trainer, start = TestTimeTrainer(model, CFG, TABLE, HERE), weights_of(model)
    trainer.adapt_chunk(chunk_of(0))
    for now in (weights_of(model), weights_of(trainer.live)):
        assert {n for n in now if not torch.equal(now[n], start[n])} == {
            n for n in now if learns(n)
        }
    assert {"blocks.0.q", "blocks.1.mlp_out", "ve_table", "embed.bigrams"} <= {
        n for n in start if not learns(n)
    }


def test_a_gradient_is_that_of_the_byte_weighted_mean():
    """What the optimizer is given, up to clipping, is the gradient of sum(bytes * nats) / sum(bytes)."""
    cfg = replace(CFG, ttt_epochs=1)
    trainer, tokens, plain = (
        TestTimeTrainer(copy.deepcopy(warmed(cfg)), cfg, TABLE, HERE),
        chunk_of(3),
        warmed(cfg),
    )
    trainer.adapt_chunk(tokens)
    weights = torch.tensor(
        [naive_bytes(*pair) for pair in zip(tokens[:-1].tolist(), tokens[1:].tolist())]
    )
    assert set(weights.tolist()) == {0, 1, 2, 3, 4}
    nats = F.cross_entropy(
        plain(tokens[:-1].view(-1, W))[0].flatten(0, 1), tokens[1:], reduction="none"
    )
    params = {n: p for n, p in plain.named_parameters() if learns(n)}
    expected = torch.autograd.grad((weights * nats).sum() / weights.sum(), params.values())
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))
    for name, gradient in zip(params, expected):
        torch.testing.assert_close(
            trainer.live.get_parameter(name).grad, gradient / max(norm, 1), atol=1e-6, rtol=1e-4
        )


def test_the_rate_by_hand():
    """1 to 3 times the cosine over the first 30 % of TTT_SCHEDULE_CHUNKS, then 3 times, then nothing moves."""
    cfg = replace(CFG, ttt_schedule_chunks=20, ttt_lr=0.002)
    model = copy.deepcopy(warmed(cfg))
    trainer = TestTimeTrainer(model, cfg, TABLE, HERE)
    by_hand = {
        0: 0.002,
        3: 0.002 * 0.945503 * 2,
        6: 0.002 * 0.793893 * 3,
        10: 0.003,
        15: 0.002 * 0.146447 * 3,
        20: 0,
    }
    for trainer.chunks, rate in by_hand.items():
        assert trainer.rate() == pytest.approx(rate, rel=1e-5, abs=1e-12)
        assert trainer.rate() == pytest.approx(naive_rate(trainer.chunks, cfg))
    start = weights_of(model)
    for seed in range(3):
        trainer.adapt_chunk(chunk_of(seed))
    assert same(weights_of(model), start) and trainer.rate() == 0


def test_the_schedule_moves_one_chunk_an_update():
    """Each adapted chunk takes the next rate of the schedule, whatever the number of epochs."""
    trainer, used = TestTimeTrainer(copy.deepcopy(warmed(CFG)), CFG, TABLE, HERE), []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (used.append(trainer.optimizer.param_groups[0]["lr"]), step())
    for seed in range(4):
        trainer.adapt_chunk(chunk_of(seed))
    assert used == pytest.approx([naive_rate(chunk, CFG) for chunk in (0, 0, 1, 1, 2, 2, 3, 3)])


def test_a_chunk_without_bytes_teaches_nothing():
    """Thirty-two empty documents weigh nothing: the weights stay finite and where they were."""
    model = copy.deepcopy(warmed(CFG))
    start, trainer = weights_of(model), TestTimeTrainer(model, CFG, TABLE, HERE)
    trainer.adapt_chunk(torch.ones(CHUNK + 1, dtype=torch.int64))
    assert same(weights_of(model), start) and same(weights_of(trainer.live), start)


def test_nothing_learns_before_update():
    """Predicting and scoring leave live and average weights alone; update moves both, apart from each other."""
    predictor, stream = copy.deepcopy(walked("ttt+mixer")), torch.from_numpy(STREAM)
    predictor.update(stream[:BLOCK])
    before = weights_of(predictor.model), weights_of(predictor.ttt.live)
    commitment = predictor.predict(stream[: BLOCK + CHUNK - 1], BLOCK, BLOCK + CHUNK)
    predictor.score(commitment, stream[BLOCK : BLOCK + CHUNK])
    after = weights_of(predictor.model), weights_of(predictor.ttt.live)
    assert same(before[0], after[0]) and same(before[1], after[1])
    predictor.update(stream[: BLOCK + CHUNK])
    assert not same(after[0], weights_of(predictor.model)) and not same(
        after[1], weights_of(predictor.ttt.live)
    )
    assert not same(weights_of(predictor.model), weights_of(predictor.ttt.live))


def test_update_trains_on_the_chunk_that_was_scored():
    """After two updates the predictor has the weights of a trainer that was given the stream's first two chunks."""
    predictor, model = new_predictor(PLANS["ttt+mixer"]), copy.deepcopy(warmed(CFG))
    advance(predictor, STREAM, 2 * CHUNK + 2)
    trainer = TestTimeTrainer(model, CFG, TABLE, HERE)
    for first in (0, CHUNK):
        trainer.adapt_chunk(torch.from_numpy(STREAM[first : first + CHUNK + 1]))
    assert same(weights_of(predictor.model), weights_of(model))


def test_the_average_scores():
    """After TTT, a predictor without TTT that holds the averaged weights commits the same; the live ones do not."""
    cfg = replace(CFG, ttt_temperature=1.0, mixer="none")
    adapted, stop = new_predictor(evaluation_passes(cfg)[-1], cfg), 4 * CHUNK + 1
    advance(adapted, STREAM, 3 * CHUNK + 1)
    scored = advance(adapted, STREAM, stop)["ttt"]

    def by(model):
        plain = Predictor(copy.deepcopy(model), cfg, TABLE, HERE, PLANS["sliding"])
        return advance(plain, STREAM, stop)["sliding"][3 * CHUNK :]

    assert torch.equal(scored, by(adapted.model)) and not torch.equal(scored, by(adapted.ttt.live))


def test_ttt_learns_from_a_repetitive_stream():
    """On a phrase said over and over TTT saves bits in later chunks, and has not moved the first chunk's."""
    tokens = np.tile(np.random.default_rng(3).integers(6, VOCAB, 12), 40)[: 5 * CHUNK + 1]
    cfg = replace(CFG, ttt_temperature=1.0, mixer="none", polyak_decay=0.0)
    with_ttt, without = (
        advance(new_predictor(plan, cfg), tokens, len(tokens))
        for plan in (evaluation_passes(cfg)[-1], PLANS["sliding"])
    )
    bits = [
        24 - f.gather(1, torch.from_numpy(tokens[1:, None])).double().log2()[:, 0]
        for f in (with_ttt["ttt"], without["sliding"])
    ]
    assert (
        torch.equal(bits[0][:CHUNK], bits[1][:CHUNK])
        and bits[0][CHUNK:].mean() < bits[1][CHUNK:].mean() - 0.1
    )


# ----------------------------------------------------------------------------------------------------------
# One rank and two
# ----------------------------------------------------------------------------------------------------------


def rank_scores(rt, artifacts, tokens):
    """For each pass over the first artifact and the last over the second: what is reported, the pieces that this rank
    committed, and the weights at the end."""
    reports = []
    for artifact in artifacts:
        settings, table, weights = unpacked(artifact)
        cfg = train_gpt.Config(**settings)
        passes = [EvalPass(("pre_quant",), cfg.eval_seq_len), *evaluation_passes(cfg)]
        for plan in passes[-1:] if cfg.mixer == "learned" else passes:
            predictor = Recorder(train_gpt.new_model(cfg, rt, weights), cfg, table, rt, plan)
            stages = evaluate(predictor, tokens, 1000, lambda line: None)
            reports.append(
                dict(
                    stages=[{n: v for n, v in stage.items() if n != "seconds"} for stage in stages],
                    pieces=[[piece[1:] for piece in c.pieces] for c in predictor.record],
                    weights=weights_of(predictor.model),
                    mixer={"weights": predictor.mixer.weights} if predictor.mixer else {},
                )
            )
    return reports


def test_two_ranks_commit_what_one_commits(run_ranks):
    """From one artifact: every stage's integers, bits and TTT weights, with work that two ranks cannot share evenly."""
    cfg = tiny_config(ttt_chunk_tokens=160)  # five sequences: TTT micro-batches of 2, 2 and 1
    learned = replace(
        cfg, mixer="learned", mixer_block=40, mixer_lr=0.01
    )  # a block is 2 or 3 batches of windows
    artifacts = [train_gpt.pack_artifact(warm_model(c), c, TABLE, 8.0) for c in (cfg, learned)]
    tokens = tiny_stream(2 * 160 + 6)  # five positions in the third chunk: one batch
    alone, pair = rank_scores(HERE, artifacts, tokens), run_ranks(2, rank_scores, artifacts, tokens)
    assert [stage["name"] for report in alone for stage in report["stages"]] == [
        "pre_quant",
        "round_trip",
        "sliding",
        "ttt",
        "mixer",
        "ttt",
        "mixer",
    ]
    for expected, first, second in zip(alone, *pair):
        assert first["stages"] == second["stages"] == expected["stages"]
        for weights in ("weights", "mixer"):
            assert same(first[weights], expected[weights]) and same(
                second[weights], expected[weights]
            )
        assert len(expected["pieces"]) == len(first["pieces"]) == len(second["pieces"])
        for chunk, one, two in zip(expected["pieces"], first["pieces"], second["pieces"]):
            assert [piece[:2] for piece in sorted(one + two, key=lambda piece: piece[:2])] == [
                c[:2] for c in chunk
            ]
            for piece, merged in zip(chunk, sorted(one + two, key=lambda piece: piece[:2])):
                assert same(piece[2], merged[2])
        assert [bool(block) for block in second["pieces"]] == [
            *(len(c) > 1 for c in expected["pieces"][:-1]),
            False,
        ]
        assert all(first["pieces"]) and any(second["pieces"])
    start = unpacked(artifacts[0])[2]
    mixer = start.pop("mixer")
    assert [same(report["weights"], start) for report in alone] == [True, True, True, False, False]
    assert same(alone[3]["weights"], alone[4]["weights"]) and not torch.equal(
        alone[4]["mixer"]["weights"], mixer
    )


def test_a_broken_model_has_no_score():
    """Logits that are not finite are refused, by name, when they would be scored."""
    predictor = new_predictor(PLANS["sliding+mixer"])
    with torch.no_grad():
        predictor.model.blocks[1].q.fill_(math.nan)
    stream = torch.from_numpy(STREAM)
    commitment = predictor.predict(stream[:CHUNK], 1, CHUNK + 1)
    with pytest.raises(train_gpt.UserError, match="logits are not finite between tokens 1 and 33"):
        predictor.score(commitment, stream[1 : CHUNK + 1])
