"""The learned mixer: evidence, network, gradient and steps, each written a second time; calibration; hostile text."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_config, tiny_stream, tiny_table, unpacked, warm_model
from test_evaluation import (
    BEGINS,
    CHUNK,
    LEARNED,
    S,
    STREAM,
    advance,
    naive_probabilities,
    new_predictor,
)
from test_evaluation import one_thread  # noqa: F401 (a fixture that every test here uses)
from test_history import few_words, naive_occurrences, new_history, padded

import train_gpt
from train_gpt import (
    CONTEXTS,
    MIXER_FEATURES,
    MIXER_HIDDEN,
    EvalPass,
    LearnedMixer,
    Predictor,
    Runtime,
    TrainStream,
    UserError,
    calibrate_mixer,
    commit,
    gather_evidence,
    load_held_out,
    new_model,
    score_stream,
)

HERE, TABLE, N = Runtime(), tiny_table(), 90  # N: positions of the short streams


# ----------------------------------------------------------------------------------------------------------
# The mixer, written a second time: one position at a time, a dictionary of candidates, autograd
# ----------------------------------------------------------------------------------------------------------


def naive_evidence(logp, row, tokens, t, window):
    """{candidate: its 27 features} of position t, from its six lists of occurrences (newest first, -1: not real)."""
    candidates, top = {}, max(logp)
    for token in {tokens[end + 1] for ends in row for end in ends if end >= 0}:
        odds, ranks, distances, flags = [], [], [], []
        for ends in row:
            real = [end for end in ends if end >= 0]
            mine = [end for end in real if tokens[end + 1] == token]
            odds.append(math.log((len(mine) + 0.4) / (len(real) - len(mine) + 0.4)) if real else 0)
            ranks.append(1 / (1 + ends.index(mine[0])) if mine else 0)
            distances.append(math.log2(t - 1 - mine[0]) / 8 if mine else 0)
            flags.append(float(bool(mine) and mine[0] >= window))
        candidates[token] = [*odds, *ranks, *distances, *flags, (top - logp[token]) / 4, top / 2, 1]
    return candidates


def naive_log_q(p, candidates, weights):
    """log q (V,) of one position: log p, boosted by the network where there are candidates, normalized."""
    boost = torch.zeros(len(p), dtype=torch.float64)
    if candidates:
        hidden = torch.relu(
            torch.tensor(list(candidates.values()), dtype=torch.float64) @ weights[:, :-1].T
        )
        boost = boost.index_add(0, torch.tensor(list(candidates)), hidden @ weights[:, -1])
    return torch.log_softmax(p.log() + boost, 0)


def naive_learn(positions, targets, weights, optimizer):
    """A step of torch's Adam on the mean code length of [(p, candidates)], by autograd."""
    optimizer.zero_grad()
    bits = [
        -naive_log_q(*position, weights)[target] for position, target in zip(positions, targets)
    ]
    (sum(bits) / len(targets) + 0 * weights.sum()).backward()  # there may be no evidence at all
    optimizer.step()


def random_weights(seed=0):
    """A network whose every weight matters, (H, F + 1) fp32."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(MIXER_HIDDEN, MIXER_FEATURES + 1, generator=random) * MIXER_FEATURES**-0.5
    weights[:, -1] *= 2
    return weights


def a_stream(seed=0, recent=3, bits=20):
    """(tokens, p (N, 8), evidence of positions 1..N, the same by the naive way), with windows of every size."""
    random, tokens = np.random.default_rng(seed), few_words(N + 1, seed=seed)
    p = torch.softmax(torch.from_numpy(random.normal(0, 2, (N, 8))), -1)
    history, at = new_history(10, recent, bits=bits), torch.arange(N)
    history.extend(torch.from_numpy(tokens))
    ends, window = (
        history.occurrences(torch.arange(N)),
        at - torch.from_numpy(random.integers(0, 40, N)),
    )
    evidence = gather_evidence(p, ends, history.tokens[ends + 1].long(), at, window)
    rows = [[list(c) for c in row] for row in ends.tolist()]
    naive = [
        naive_evidence(
            p[t - 1].log().tolist(), rows[t - 1], tokens.tolist(), t, window[t - 1].item()
        )
        for t in range(1, N + 1)
    ]
    return torch.from_numpy(tokens), p, evidence, naive


# ----------------------------------------------------------------------------------------------------------
# Evidence
# ----------------------------------------------------------------------------------------------------------


def test_evidence_by_hand():
    """Two candidates of one position, every feature computed by hand."""
    p = torch.tensor([[0.5, 0.1, 0.25, 0.15]], dtype=torch.float64)
    ends, following = torch.full((2, 1, CONTEXTS, 3), -1)
    following[:] = 0  # a token that nobody has seen
    ends[0, 3], following[0, 3] = (
        torch.tensor([-1, 92, 60]),
        torch.tensor([0, 3, 2]),
    )  # the newest is not real
    ends[0, 4], following[0, 4] = torch.tensor([98, 92, 36]), torch.tensor([2, 3, 2])
    tokens, distinct, features = gather_evidence(
        p, ends, following, torch.tensor([100]), torch.tensor([92])
    )
    assert tokens.tolist() == [[0] * 9 + [0, 3, 2] + [2, 3, 2] + [0] * 3]
    assert distinct.nonzero().tolist() == [[0, 10], [0, 11]]
    log_2 = math.log(2)
    by_hand = {  # log odds, inverse rank, distance, in window: each for 8, 5, 3, 2, 1 tokens and the word; the model
        10: [0, 0, 0, math.log(1.4 / 1.4), math.log(1.4 / 2.4), 0]
        + [0, 0, 0, 1 / 2, 1 / 2, 0]
        + [0, 0, 0, 3 / 8, 3 / 8, 0]
        + [0, 0, 0, 1, 1, 0]
        + [math.log(0.5 / 0.15) / 4, -log_2 / 2, 1],
        11: [0, 0, 0, math.log(1.4 / 1.4), math.log(2.4 / 1.4), 0]
        + [0, 0, 0, 1 / 3, 1, 0]
        + [0, 0, 0, math.log2(40) / 8, 1 / 8, 0]
        + [0, 0, 0, 0, 1, 0]
        + [log_2 / 4, -log_2 / 2, 1],
    }
    for slot, expected in by_hand.items():
        assert features[0, :, slot].tolist() == pytest.approx(expected, abs=1e-6)
    assert features.shape == (1, MIXER_FEATURES, CONTEXTS * 3) and features.dtype == torch.float32
    edges = gather_evidence(p, ends, following, torch.tensor([100]), torch.tensor([93]))[2]
    assert edges[0, 18:24, 10].tolist() == [0] * 6 and edges[0, 18:24, 11].tolist() == [
        0,
        0,
        0,
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("recent, bits", [(1, 20), (3, 20), (4, 4)])
def test_evidence_equals_the_naive(recent, bits):
    """Each candidate is marked exactly once, with its features; without occurrences nothing is marked."""
    _, _, (tokens, distinct, features), naive = a_stream(recent, recent, bits)
    for row in range(N):
        slots = distinct[row].nonzero()[:, 0]
        assert (
            len(slots) == len(naive[row]) and set(tokens[row, slots].tolist()) == naive[row].keys()
        )
        for slot in slots.tolist():
            expected = naive[row][tokens[row, slot].item()]
            assert features[row, :, slot].tolist() == pytest.approx(expected, abs=1e-5)
    sizes = set(map(len, naive))
    assert 0 in sizes and len(sizes) > recent and features.isfinite().all()
    assert {
        features[row, 18 + c, j].item() for row, j in distinct.nonzero().tolist() for c in range(6)
    } == {0, 1}


# ----------------------------------------------------------------------------------------------------------
# Network and gradient
# ----------------------------------------------------------------------------------------------------------


def test_the_mixture_equals_the_naive():
    """q is the normalized exponential of log p plus the boost of each candidate, once; rows sum to one."""
    _, p, evidence, naive = a_stream()
    weights = random_weights()
    q = LearnedMixer(weights, LEARNED, HERE).mix(p, *evidence)
    expected = torch.stack([naive_log_q(*position, weights.double()) for position in zip(p, naive)])
    assert q.dtype == torch.float64
    torch.testing.assert_close(q.log(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(N, dtype=torch.float64))
    assert (q.log() - p.log()).abs().max() > 1 and not naive[0]
    torch.testing.assert_close(q[0], p[0], atol=0, rtol=1e-14)


def test_without_output_weights_the_model_stays():
    """A new model's mixer commits what the model would commit, to the unit, and its hidden layer is not zero."""
    _, p, evidence, _ = a_stream()
    new = new_model(LEARNED, HERE).mixer
    assert not new[:, -1].any() and new[:, :-1].std().item() == pytest.approx(
        MIXER_FEATURES**-0.5, rel=0.1
    )
    assert torch.equal(new, new_model(replace(LEARNED, seed=5), HERE).mixer)
    q = LearnedMixer(new, LEARNED, HERE).mix(p, *evidence)
    torch.testing.assert_close(q, p, atol=0, rtol=1e-14)
    assert torch.equal(commit(q), commit(p))
    assert not torch.equal(
        commit(LearnedMixer(random_weights(), LEARNED, HERE).mix(p, *evidence)), commit(p)
    )


def test_the_gradient_is_autograds():
    """The closed form is the gradient of the summed code length, as autograd on the naive mixer gives it."""
    tokens, p, evidence, naive = a_stream(1)
    mixer = LearnedMixer(random_weights(1), LEARNED, HERE)
    gradient = mixer.gradient(*evidence, mixer.mix(p, *evidence).gather(1, evidence[0]), tokens[1:])
    weights = mixer.weights.double().requires_grad_()
    sum(
        -naive_log_q(*position, weights)[t]
        for position, t in zip(zip(p, naive), tokens[1:].tolist())
    ).backward()
    assert gradient.dtype == torch.float32 and gradient.shape == mixer.weights.shape
    torch.testing.assert_close(gradient.double(), weights.grad, atol=1e-5, rtol=1e-4)
    assert (weights.grad.abs() > 0.01).float().mean() > 0.5


def test_the_gradient_is_the_slope():
    """Along random directions, central differences of the summed code length of `mix` in double precision."""
    tokens, p, (words, distinct, features), _ = a_stream(2)
    mixer = LearnedMixer(random_weights(2), LEARNED, HERE)
    q = mixer.mix(p, words, distinct, features)
    gradient = mixer.gradient(words, distinct, features, q.gather(1, words), tokens[1:]).double()
    middle = mixer.weights.double()

    def cost(weights):
        mixer.weights = weights
        return (
            -mixer.mix(p, words, distinct, features.double())
            .gather(1, tokens[1:, None])
            .log()
            .sum()
        )

    for seed in range(5):
        step = (
            torch.randn(
                middle.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            * 1e-6
        )
        slope = (cost(middle + step) - cost(middle - step)) / 2
        assert slope.item() == pytest.approx((gradient * step).sum().item(), rel=1e-3, abs=1e-8)


# ----------------------------------------------------------------------------------------------------------
# Learning
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration_blocks", [0, 4])
def test_a_step_is_adams(calibration_blocks):
    """After each block the weights are those of torch's Adam on autograd's mean gradient, at the documented rates."""
    cfg = replace(LEARNED, ttt_chunk_tokens=N * 16, mixer_block=N // 6)
    tokens, p, evidence, naive = a_stream(3)
    mixer, blocks = (
        LearnedMixer(random_weights(3), cfg, HERE, calibration_blocks),
        torch.arange(N).split(N // 6),
    )
    weights = mixer.weights.double().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.1, betas=(0.9, 0.99))
    rates = [
        cfg.mixer_lr * r for r in ([10, 7.75, 5.5, 3.25, 1, 1] if calibration_blocks else [1] * 6)
    ]
    for number, (at, rate) in enumerate(zip(blocks, rates)):
        here = [part[at] for part in evidence]
        waiting = [*here, mixer.mix(p[at], *here).gather(1, here[0]), at + 1]
        mixer.waiting = {
            7: [[part[:4] for part in waiting], [part[4:9] for part in waiting]],
            2: [[part[9:] for part in waiting]],
        }
        optimizer.param_groups[0]["lr"] = rate
        before = weights.detach().clone()
        naive_learn(
            [(p[i], naive[i]) for i in at.tolist()], tokens[at + 1].tolist(), weights, optimizer
        )
        mixer.learn(tokens)
        assert not mixer.waiting and mixer.blocks == number + 1
        assert (mixer.weights - weights).abs().max() < 0.02 * (weights - before).abs().max()


def test_a_walk_is_the_naive_mixers():
    """A whole pass: windows, history, evidence, commitments and a step a block, against all of it written plainly."""
    n, size, tokens = 3 * CHUNK, LEARNED.mixer_block, STREAM.tolist()
    predictor = new_predictor("sliding+learned")
    start = predictor.mixer.weights.double()
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=LEARNED.mixer_lr, betas=(0.9, 0.99))
    p, W = torch.from_numpy(naive_probabilities(n, S)), LEARNED.eval_seq_len
    rows = padded(
        naive_occurrences(tokens[: n + 1], LEARNED.ngram_order, LEARNED.ngram_recent, BEGINS),
        LEARNED.ngram_recent,
    ).tolist()
    positions = []
    for t in range(1, n + 1):
        window = 0 if t <= W else ((t - 1 - W) // S + 1) * S
        positions.append(
            (p[t - 1], naive_evidence(p[t - 1].log().tolist(), rows[t], tokens, t, window))
        )
    for first in range(0, n, size):
        block, targets = positions[first : first + size], tokens[first + 1 : first + size + 1]
        expected = torch.stack([naive_log_q(*position, weights.detach()) for position in block])
        freqs = advance(predictor, STREAM, first + size + 1)["mixer"]
        torch.testing.assert_close(
            freqs.double() / train_gpt.TOTAL, expected.exp(), atol=2e-5, rtol=2e-3
        )
        if first + size < n:
            naive_learn(block, targets, weights, optimizer)
    way = (weights - start).norm()
    assert (predictor.mixer.weights - weights).norm() < 1e-4 * way and way > 0.1 * start.norm()
    assert max(map(len, (candidates for _, candidates in positions))) > 2


def walked_weights(block):
    """The mixer's weights after three chunks, predicted in parts of `block` positions."""
    predictor = new_predictor("sliding+learned")
    advance(predictor, STREAM, 3 * CHUNK + 2, block)
    assert predictor.mixer.blocks == 3 * CHUNK // LEARNED.mixer_block
    return predictor.mixer.weights


def test_parts_of_a_block_teach_what_the_block_teaches():
    """Token by token, in threes or in whole blocks, the weights are the same to the last bit."""
    whole = walked_weights(CHUNK)
    assert torch.equal(walked_weights(1), whole) and torch.equal(walked_weights(3), whole)
    assert not torch.equal(whole, new_predictor("sliding+learned").mixer.weights)


def rank_weights(rt, cfg, tokens):
    """The mixer's weights after a pass that several ranks share, and after calibration."""
    predictor = Predictor(
        warm_model(cfg), cfg, TABLE, rt, EvalPass(("sliding", "mixer"), cfg.eval_stride)
    )
    bits, n = score_stream(predictor, tokens, print)
    model, lines = warm_model(cfg), []
    calibrate_mixer(model, cfg, TABLE, rt, math.inf, lines.append)
    return (
        bits,
        n,
        predictor.mixer.weights,
        model.mixer,
        [re.sub(r"in [0-9.]+ s", "", line) for line in lines],
    )


def test_two_ranks_learn_what_one_learns(run_ranks, tmp_path):
    """Gradients are summed as integers: a block of six batches gives the same weights, and so does calibration."""
    cfg = learner(tmp_path, mixer_calibration_tokens=200, ttt_chunk_tokens=128, mixer_block=128)
    tokens = tiny_stream(3 * 128 + 40)
    alone, pair = rank_weights(HERE, cfg, tokens), run_ranks(2, rank_weights, cfg, tokens)
    for other in pair:
        assert (
            other[0] == alone[0]
            and other[1] == alone[1] == len(tokens) - 1
            and other[4] == alone[4]
        )
        assert torch.equal(other[2], alone[2]) and torch.equal(other[3], alone[3])
    assert not torch.equal(alone[2], warm_model(cfg).mixer) and not torch.equal(
        alone[3], warm_model(cfg).mixer
    )


# ----------------------------------------------------------------------------------------------------------
# Held-out text and calibration
# ----------------------------------------------------------------------------------------------------------


def learner(folder, shards=(500, 1200), **changes):
    """A Config with a learned mixer, and training shards of the given sizes in `folder`."""
    for number, size in enumerate(shards):
        tokens = tiny_stream(size, seed=number)
        (folder / f"fineweb_train_{number:06d}.bin").write_bytes(train_gpt.shard_bytes(tokens))
    return tiny_config(
        **{**dict(data_path=str(folder), mixer="learned", mixer_calibration_tokens=400), **changes}
    )


@pytest.mark.parametrize("shards", [(500, 1200), (1200,)])
def test_held_out_text_is_never_trained_on(tmp_path, shards):
    """It is the last shard's end, and the stream leaves it out each time round, however much is taken at once."""
    cfg = learner(tmp_path, shards)
    texts = [tiny_stream(size, seed=number) for number, size in enumerate(shards)]
    held_out = load_held_out(cfg)
    assert len(held_out) == 401 and held_out.dtype == np.uint16
    np.testing.assert_array_equal(held_out, texts[-1][-401:])
    once = np.concatenate([*texts[:-1], texts[-1][:-401]])
    for count in (1, 7, len(once), 2 * len(once) + 3):
        stream, taken = TrainStream(cfg), []
        while len(taken) < 3 * len(once):
            taken.extend(stream.take(count)[:-1])
        np.testing.assert_array_equal(taken, np.resize(once, len(taken)))


def test_nothing_is_held_out_for_nothing(tmp_path):
    """Without a learned mixer, or with no calibration, all text trains."""
    for changes in (dict(mixer="entropy"), dict(mixer="none"), dict(mixer_calibration_tokens=0)):
        cfg = learner(tmp_path, (300, 90), **changes)
        assert len(load_held_out(cfg)) == 0
        expected = np.concatenate([tiny_stream(300, seed=0), tiny_stream(90, seed=1)])
        np.testing.assert_array_equal(TrainStream(cfg).take(2 * 390)[:780], np.tile(expected, 2))


def test_held_out_text_is_at_most_half_of_a_shard(tmp_path):
    """One token less in the last shard, and the setting is refused by name before any work, by the stream too."""
    half = learner(tmp_path, (900, 802))
    assert len(load_held_out(half)) == 401 and len(TrainStream(half).take(1300)) == 1301
    cfg = learner(tmp_path, (900, 801))
    for action in (load_held_out, TrainStream):
        with pytest.raises(
            UserError, match="MIXER_CALIBRATION_TOKENS=400: over half of the last shard; lower it"
        ):
            action(cfg)


def cold_model(cfg):
    """A warm model whose mixer is that of a new model: it leaves the model alone."""
    model = warm_model(cfg)
    model.mixer.copy_(new_model(cfg, HERE).mixer)
    return model


def walk_of(model, cfg, tokens):
    """[(position after a block, {stage: its bits})] of scoring a stream without TTT; the model stays as it is."""
    predictor, walk = (
        Predictor(model, cfg, TABLE, HERE, EvalPass(("sliding", "mixer"), cfg.eval_stride)),
        [],
    )
    score, before = predictor.score, copy.deepcopy(model.state_dict())
    predictor.score = lambda commitment, targets: (
        walk.append((commitment.stop, score(commitment, targets))) or walk[-1][1]
    )
    bits, n = score_stream(predictor, tokens, print)
    assert n == len(tokens) - 1 and bits == {
        stage: sum(part[stage] for _, part in walk) for stage in bits
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return walk


def bits_of(model, cfg, tokens):
    """(neural bits, bits with the mixer) of a stream."""
    walk = walk_of(model, cfg, tokens)
    return tuple(sum(bits[stage] for _, bits in walk) for stage in ("sliding", "mixer"))


def test_calibration_pays(tmp_path):
    """It lowers the bits of held-out text and of a text of its kind, and leaves all else of the model alone."""
    cfg, lines = (
        learner(
            tmp_path, (600, 2400), mixer_calibration_tokens=1000, eval_stride=16, mixer_block=32
        ),
        [],
    )
    model = cold_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert calibrate_mixer(model, cfg, TABLE, HERE, math.inf, lines.append) > 0
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"mixer"}
    assert len(lines) == 1 and "1,000 of 1,000 held-out tokens" in lines[0]
    neural, mixed = map(
        float, re.search(r"sliding (\d+\.\d+), mixer (\d+\.\d+)$", lines[0]).groups()
    )
    assert mixed < neural - 0.02
    for tokens in (load_held_out(cfg).astype(np.int64), tiny_stream(600, seed=1)):
        (plain, cold), (same, calibrated) = (
            bits_of(cold_model(cfg), cfg, tokens),
            bits_of(model, cfg, tokens),
        )
        assert plain == same and calibrated < cold - 20 and calibrated < plain - 50


def test_calibration_keeps_to_its_time(monkeypatch, tmp_path):
    """With no time left nothing is learned; on a clock that ticks at each look it stops early with what it has."""
    cfg, lines = learner(tmp_path), []
    model = cold_model(cfg)
    calibrate_mixer(model, cfg, TABLE, HERE, 0, lines.append)
    assert torch.equal(model.mixer, cold_model(cfg).mixer) and lines[-1].startswith(
        "calibration: 0 of 400 held-out"
    )
    ticks = iter(range(10**6))
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: float(next(ticks)))
    calibrate_mixer(model, cfg, TABLE, HERE, 30, lines.append)
    done = int(re.match(r"calibration: (\d+) of 400 held-out", lines[-1])[1])
    assert 0 < done < 400 and not torch.equal(model.mixer, cold_model(cfg).mixer)


def test_calibrations_rates_and_windows(monkeypatch, tmp_path):
    """Half a window a block; rates fall evenly from 10 to 1 times MIXER_LR over the held-out text; no TTT."""
    seen, learn, init = [], LearnedMixer.learn, Predictor.__init__
    monkeypatch.setattr(
        LearnedMixer,
        "learn",
        lambda mixer, tokens: (
            learn(mixer, tokens),
            seen.append(mixer.optimizer.param_groups[0]["lr"]),
        ),
    )
    plans = []
    monkeypatch.setattr(
        Predictor,
        "__init__",
        lambda *args: (init(*args), plans.append((args[0].block, args[-1])))[0],
    )
    cfg = learner(tmp_path, mixer_lr=0.002, mixer_calibration_tokens=320)
    calibrate_mixer(cold_model(cfg), cfg, TABLE, HERE, math.inf, print)
    assert plans == [(16, EvalPass(("sliding", "mixer"), 16))]
    assert seen == pytest.approx([0.002 * (10 - 9 * block / 20) for block in range(19)])


def test_the_mixer_travels_in_the_artifact(tmp_path):
    """pack, unpack, new_model: the fp16 values of the calibrated mixer, which is what the predictor starts from."""
    cfg = learner(tmp_path)
    model = cold_model(cfg)
    calibrate_mixer(model, cfg, TABLE, HERE, math.inf, print)
    settings, table, weights = unpacked(train_gpt.pack_artifact(model, cfg, TABLE, 8.0))
    back = new_model(train_gpt.Config(**settings), HERE, weights)
    assert torch.equal(back.mixer, model.mixer.half().float()) and back.mixer[:, -1].any()
    predictor = Predictor(
        back, train_gpt.Config(**settings), table, HERE, EvalPass(("sliding", "mixer"), 8)
    )
    assert (
        torch.equal(predictor.mixer.weights, back.mixer)
        and settings["mixer_calibration_tokens"] == 400
    )
    assert predictor.mixer.weights.data_ptr() != back.mixer.data_ptr()


# ----------------------------------------------------------------------------------------------------------
# Hostile and friendly text
# ----------------------------------------------------------------------------------------------------------


# The promise: on 100,000 tokens, or about 240,000 bytes, the mixer stage is worse by at most 0.001 bits per byte.
PROMISED_BITS = 0.001 * 240_000


def never_again(tokens, n, seed):
    """`tokens` and n more, each of which has not followed its predecessor since forty others have."""
    random, stream, seen = np.random.default_rng(seed), list(tokens), {}
    for before, token in zip(stream, stream[1:]):
        seen.setdefault(before, set()).add(token)
    for _ in range(n):
        followers = seen.setdefault(stream[-1], set())
        if len(followers) > 40:
            followers.clear()
        stream.append(
            next(t for t in random.permutation(np.arange(6, VOCAB)).tolist() if t not in followers)
        )
        followers.add(stream[-1])
    return np.array(stream)


def hostile_streams():
    """{name: (tokens, the first of them that misleads)}; 1,024 tokens mislead, in some after as many that teach."""
    random, n = np.random.default_rng(7), 1024
    said = np.append(1, np.tile(random.integers(6, VOCAB, 128), 8))  # a text that repeats itself
    noise = random.integers(6, VOCAB, n)
    return {
        "random": (np.append(1, noise), 1),
        "never again": (never_again([1], n, 3), 1),
        "said, then random": (np.append(said, noise), n + 1),
        "said, then altered": (np.append(said, np.where(np.arange(n) % 2, noise, said[1:])), n + 1),
        "said, then never again": (never_again(said, n, 3), n + 1),
    }


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(cfg, a model whose mixer is calibrated on text that repeats itself more often than not)."""
    cfg = learner(
        tmp_path_factory.mktemp("shards"),
        (600, 4100),
        mixer_calibration_tokens=2000,
        ttt_chunk_tokens=128,
        mixer_block=64,
        eval_stride=16,
        eval_batch_windows=4,
        ngram_order=10,
    )
    model = cold_model(cfg)
    calibrate_mixer(model, cfg, TABLE, HERE, math.inf, print)
    return cfg, model


@pytest.mark.parametrize("name", hostile_streams())
def test_misleading_text_costs_no_more_than_promised(calibrated, name):
    """What misleads costs at most what 100,000 tokens may, and soon less; with a new mixer, next to nothing."""
    (cfg, trusting), (tokens, first) = calibrated, hostile_streams()[name]
    for model, most, most_in_the_end in (
        (trusting, PROMISED_BITS, 64.0),
        (cold_model(cfg), 12.0, 4.0),
    ):
        walk = walk_of(model, cfg, tokens)
        costs = {
            stop: sum(bits["mixer"] - bits["sliding"] for end, bits in walk if end <= stop)
            for stop in (first, len(tokens) - 256, len(tokens))
        }
        assert costs[len(tokens)] - costs[first] < most
        assert costs[len(tokens)] - costs[len(tokens) - 256] < most_in_the_end
        assert {first, len(tokens) - 256, len(tokens)} <= {1, *(end for end, _ in walk)}


def test_a_text_that_repeats_itself_gains_a_lot(calibrated):
    """The calibrated mixer saves half of its bits and more; a new one, too, finds out that it pays."""
    (cfg, trusting), (tokens, first) = calibrated, hostile_streams()["said, then random"]
    (neural, mixed), (_, cold) = (
        bits_of(model, cfg, tokens[:first]) for model in (trusting, cold_model(cfg))
    )
    assert mixed < 0.5 * neural and cold < neural - 50
