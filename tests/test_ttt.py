"""Test-time training: its steps, its schedule, and what the predictor makes of them."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    HERE,
    TABLE,
    VOCAB,
    WALK_CFG,
    WALK_STREAM,
    advance,
    random_tokens,
    same,
    sharp_model,
    walker,
    weights_of,
)
from naive import naive_adapts, naive_byte_weights, naive_loss, naive_rate, naive_ttt
from torch import nn

from train_gpt import TTT_WEIGHT_SCALE, TestTimeTrainer, new_plan

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK = WALK_CFG.ttt_chunk_tokens
NO_MIXER = replace(WALK_CFG, mixer="none")
TTT = new_plan(NO_MIXER, "ttt")


def new_trainer(cfg=WALK_CFG):
    """(trainer, the model that it adapts, the weights before)."""
    model = sharp_model(cfg)
    return TestTimeTrainer(model, cfg, TABLE, HERE), model, weights_of(model)


def chunk_of(seed, cfg=WALK_CFG):
    """A chunk and the token before it, with control and byte pieces in it."""
    return random_tokens(cfg.ttt_chunk_tokens + 1, seed=seed)


def live_weights(trainer):
    """The weights that train, {name: tensor}; the model has their average again afterwards."""
    nn.utils.vector_to_parameters(trainer.live, trainer.params)
    live = weights_of(trainer.model)
    nn.utils.vector_to_parameters(trainer.average, trainer.params)
    return live


def distance(a, b, start):
    """How far a is from b, in units of the way from `start` to b; over all weights."""
    apart = sum((a[name] - b[name]).square().sum().item() for name in b)
    way = sum((start[name] - b[name]).square().sum().item() for name in b)
    return math.sqrt(apart / way)


# ---- Steps ---------------------------------------------------------------------------------------

SETTINGS = {
    "as in walks": {},
    "five sequences, three epochs": dict(ttt_chunk_tokens=80, ttt_epochs=3, polyak_decay=0.9),
    "one epoch, no average": dict(ttt_lr=1e-4, ttt_epochs=1, polyak_decay=0.0),
}


def trained(cfg):
    """(live weights, average weights, weights before, chunks) after three chunks."""
    chunks = [chunk_of(seed, cfg) for seed in range(3)]
    trainer, model, start = new_trainer(cfg)
    for tokens in chunks:
        trainer.adapt_chunk(tokens)
    return live_weights(trainer), weights_of(model), start, chunks


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_ttt_matches_naive_ttt(changes):
    """Plain training, with gradients and weights rounded as documented: equal to the last bit."""
    cfg = replace(WALK_CFG, **changes)
    live, average, _, chunks = trained(cfg)
    expected = naive_ttt(sharp_model(cfg), cfg, TABLE, chunks)
    assert same(live, expected[0])
    assert same(average, expected[1])


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_rounding_changes_next_to_nothing(changes):
    """Training that rounds nothing goes the same way, within two thousandths of it."""
    cfg = replace(WALK_CFG, **changes)
    live, average, start, chunks = trained(cfg)
    exact = naive_ttt(sharp_model(cfg), cfg, TABLE, chunks, rounded=False)
    assert 0 < distance(live, exact[0], start) < 0.002
    assert 0 < distance(average, exact[1], start) < 0.002


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_bytes_weigh(changes):
    """Training on unweighted tokens goes elsewhere."""
    cfg = replace(WALK_CFG, **changes)
    live, _, start, chunks = trained(cfg)
    unweighted, _ = naive_ttt(sharp_model(cfg), cfg, TABLE, chunks, weighted=False)
    assert distance(unweighted, live, start) > 0.05


def test_average_is_not_where_training_is():
    """Polyak averaging stays behind the live weights."""
    live, average, start, _ = trained(WALK_CFG)
    assert distance(live, average, start) > 0.05


def test_adapted_weights_lie_on_their_grid():
    """Live and average, all that TTT moves are multiples of 2^-20; the rest is as it was."""
    assert TTT_WEIGHT_SCALE == 2**20
    live, average, start, _ = trained(WALK_CFG)
    for now in (live, average):
        for name, w in now.items():
            on_grid = (w * 2**20).round() / 2**20 if naive_adapts(name) else start[name]
            assert torch.equal(w, on_grid), name


def test_frozen_weights_stay_and_all_others_learn():
    """TTT_FREEZE_BLOCKS first blocks keep their matrices, and all tables but the tokens' stay."""
    trainer, model, start = new_trainer()
    trainer.adapt_chunk(chunk_of(0))
    learning = {name for name in start if naive_adapts(name)}
    for now in (weights_of(model), live_weights(trainer)):
        assert {name for name in now if not torch.equal(now[name], start[name])} == learning
    frozen = start.keys() - learning
    assert {"blocks.0.q", "blocks.1.mlp_out", "ve_table", "embed.bigrams"} <= frozen


def test_gradient_is_that_of_the_byte_weighted_mean():
    """Up to clipping, the optimizer is given the gradient of sum(bytes * nats) / sum(bytes)."""
    cfg = replace(WALK_CFG, ttt_epochs=1)
    trainer, plain, _ = new_trainer(cfg)
    plain = copy.deepcopy(plain)
    tokens = chunk_of(3)
    trainer.adapt_chunk(tokens)
    weights = naive_byte_weights(TABLE, tokens)
    assert set(weights.tolist()) == {0, 1, 2, 3, 4}
    params = {name: p for name, p in plain.named_parameters() if naive_adapts(name)}
    loss = naive_loss(plain, cfg, tokens, weights) / weights.sum()
    expected = torch.autograd.grad(loss, params.values())
    norm = math.sqrt(sum(grad.square().sum().item() for grad in expected))
    parts = trainer.live.grad.split([grad.numel() for grad in expected])
    for grad, given in zip(expected, parts):
        given = given.view_as(grad)
        torch.testing.assert_close(given, grad / max(norm, 1), atol=1e-6, rtol=1e-4)


def test_chunk_without_bytes_teaches_nothing():
    """Thirty-two empty documents weigh nothing: the weights stay where they were, on their grid."""
    trainer, model, start = new_trainer()
    trainer.adapt_chunk(torch.full((CHUNK + 1,), TABLE.bos_id))
    for now in (weights_of(model), live_weights(trainer)):
        assert all((now[name] - w).abs().max() <= 2**-21 for name, w in start.items())


# ---- Schedule ------------------------------------------------------------------------------------

RATES = {
    0: 0.002,
    3: 0.002 * 0.945503 * 2,
    6: 0.002 * 0.793893 * 3,
    10: 0.003,
    15: 0.002 * 0.146447 * 3,
}


@pytest.mark.parametrize("chunk, rate", RATES.items())
def test_rate_by_hand(chunk, rate):
    """1 to 3 times the cosine over the first 30 % of TTT_SCHEDULE_CHUNKS, then 3 times."""
    cfg = replace(WALK_CFG, ttt_schedule_chunks=20, ttt_lr=0.002)
    trainer, *_ = new_trainer(cfg)
    trainer.chunks = chunk
    trainer.adapt_chunk(chunk_of(0))
    used = trainer.optimizer.param_groups[0]["lr"]
    assert used == pytest.approx(rate, rel=1e-5)
    assert used == pytest.approx(naive_rate(chunk, cfg))


def test_nothing_moves_after_the_schedule():
    """From chunk TTT_SCHEDULE_CHUNKS on the rate is 0, and the weights stay to the last bit."""
    trainer, model, start = new_trainer(replace(WALK_CFG, ttt_schedule_chunks=20))
    trainer.chunks = 20
    for seed in range(3):
        trainer.adapt_chunk(chunk_of(seed))
    assert same(weights_of(model), start)


def test_schedule_moves_one_chunk_an_update():
    """Each adapted chunk takes the next rate of the schedule, whatever the number of epochs."""
    trainer, *_ = new_trainer()
    used = []
    step = trainer.optimizer.step

    def spy():
        used.append(trainer.optimizer.param_groups[0]["lr"])
        step()

    trainer.optimizer.step = spy
    for seed in range(4):
        trainer.adapt_chunk(chunk_of(seed))
    assert used == pytest.approx(
        [naive_rate(chunk, WALK_CFG) for chunk in (0, 0, 1, 1, 2, 2, 3, 3)]
    )


# ---- In the predictor ----------------------------------------------------------------------------


def without_ttt(model=None):
    """A predictor like that of TTT, whose updates teach it nothing."""
    predictor = walker(NO_MIXER, TTT, model)
    predictor.ttt.adapt_chunk = lambda tokens: None
    return predictor


def test_nothing_learns_before_update():
    """Predicting and scoring leave live and average weights alone; update moves both, apart."""
    model = sharp_model(WALK_CFG)
    predictor = walker(WALK_CFG, new_plan(WALK_CFG, "ttt", "unguarded", "mixer"), model)
    stream = torch.from_numpy(WALK_STREAM)
    advance(predictor, WALK_STREAM, 2 * CHUNK + 2)
    average = weights_of(model)
    live = live_weights(predictor.ttt)
    stop = 3 * CHUNK + 1
    commitment = predictor.predict(stream[: stop - 1], 2 * CHUNK + 2, stop)
    predictor.score(commitment, stream[2 * CHUNK + 2 : stop])
    assert same(weights_of(model), average)
    assert same(live_weights(predictor.ttt), live)
    predictor.update(stream[:stop])
    assert not same(weights_of(model), average)
    assert not same(live_weights(predictor.ttt), live)
    assert not same(weights_of(model), live_weights(predictor.ttt))


def test_update_trains_on_the_chunk_that_was_scored():
    """After two updates the model has the weights of a trainer of the stream's first two chunks."""
    model = sharp_model(NO_MIXER)
    advance(walker(NO_MIXER, TTT, model), WALK_STREAM, 2 * CHUNK + 2)
    trainer, expected, _ = new_trainer(NO_MIXER)
    for first in (0, CHUNK):
        trainer.adapt_chunk(torch.from_numpy(WALK_STREAM[first : first + CHUNK + 1]))
    assert same(weights_of(model), weights_of(expected))


def test_average_scores():
    """A predictor that always had the averaged weights commits the same; the live ones do not."""
    model = sharp_model(NO_MIXER)
    predictor = walker(NO_MIXER, TTT, model)
    stop = 4 * CHUNK + 1
    scored = advance(predictor, WALK_STREAM, stop)["ttt"][3 * CHUNK :]
    by_average = advance(without_ttt(copy.deepcopy(model)), WALK_STREAM, stop)["ttt"]
    model.load_state_dict(live_weights(predictor.ttt))
    by_live = advance(without_ttt(model), WALK_STREAM, stop)["ttt"]
    assert torch.equal(scored, by_average[3 * CHUNK :])
    assert not torch.equal(scored, by_live[3 * CHUNK :])


def test_ttt_learns_from_a_repetitive_stream():
    """On a phrase repeated over and over it saves bits in later chunks, and none in the first."""
    phrase = np.random.default_rng(3).integers(6, VOCAB, 12)
    tokens = np.tile(phrase, 40)[: 5 * CHUNK + 1]
    bits = []
    cfg = replace(NO_MIXER, polyak_decay=0.0)
    for predictor in (walker(cfg, TTT), without_ttt()):
        freqs = advance(predictor, tokens, len(tokens))["ttt"]
        bits.append(24 - freqs.gather(1, torch.from_numpy(tokens[1:, None])).double().log2())
    with_ttt, without = bits
    assert torch.equal(with_ttt[:CHUNK], without[:CHUNK])
    assert with_ttt[CHUNK:].mean() < without[CHUNK:].mean() - 0.1
