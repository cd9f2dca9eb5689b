"""The objective, the optimizers, the schedules, the averages and the training loop."""

import copy
import itertools
import math
import re
import signal
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    VOCAB,
    random_tokens,
    same,
    tiny_config,
    tiny_stream,
    tiny_table,
    warm_model,
    weights_of,
    write_shards,
)
from naive import naive_muon, naive_orthogonalize, naive_weights
from torch import nn

import train_gpt
from train_gpt import (
    Muon,
    Runtime,
    UserError,
    complementary_weights,
    count_pairs,
    micro_batches,
    train_stream,
)

HERE = Runtime()  # one rank, CPU, float32
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with three short training shards, the second one compressed."""
    folder = tmp_path_factory.mktemp("shards")
    shards = [tiny_stream(400, 1), tiny_stream(250, 2), tiny_stream(310, 3)]
    write_shards(folder, shards, compressed={1})
    return folder


def new_trainer(model, cfg, rt=HERE):
    """A Trainer of the model with the script's own loss."""
    return train_gpt.Trainer(model, train_gpt.training_loss(model, rt), cfg, rt)


def random_batches(cfg):
    """The micro-batches of one step on random tokens."""
    return micro_batches(random_tokens(cfg.train_batch_tokens + 1).numpy(), cfg, HERE)


def gradients_of(model):
    """A copy of the gradients, {name: tensor}."""
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- Complementary objective ---------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_complementary_weights_match_a_plain_count(data, alpha):
    """Over several steps, the weights are those of a dictionary of all earlier pairs."""
    cfg, pairs = tiny_config(data_path=str(data)), Counter()
    stream, counts = train_stream(cfg, 0, 128), torch.zeros(VOCAB, VOCAB, dtype=torch.int32)
    for _ in range(6):
        batches = micro_batches(next(stream)[0], cfg, HERE)
        for x, y in batches:
            expected = naive_weights(pairs, x, y, alpha)
            torch.testing.assert_close(complementary_weights(counts, x, y, alpha), expected)
        count_pairs(counts, batches, HERE)
        for x, y in batches:
            pairs.update(zip(x.flatten().tolist(), y.flatten().tolist()))
    assert {(a, b): int(counts[a, b]) for a, b in counts.nonzero().tolist()} == dict(pairs)


def test_complementary_weight_has_a_floor():
    """A pair that is nearly certain keeps a weight of 0.1; an unseen one keeps 1."""
    counts, x = torch.zeros(VOCAB, VOCAB, dtype=torch.int32), torch.full((1, 500), 7)
    count_pairs(counts, [(x, x + 1)], HERE)
    weights = complementary_weights(counts, x[:, :2], torch.tensor([[8, 9]]), 1.0)
    assert torch.equal(weights, torch.tensor([[0.1, 1.0]]))
    half = complementary_weights(counts, x[:, :1], x[:, :1] + 1, 0.5)
    assert half.item() == pytest.approx(1 - 0.5 * 500 / 501)


def test_step_is_weighted_by_the_steps_before_it(data):
    """A step's loss uses the counts of earlier steps alone; its gradient is of mean(w * CE)."""
    cfg = tiny_config(data_path=str(data), complement_alpha=1.0, micro_batch_tokens=128)
    trainer, stream = new_trainer(warm_model(cfg), cfg), train_stream(cfg, 0, 128)
    pairs = Counter()
    for step in range(3):
        batches = micro_batches(next(stream)[0], cfg, HERE)
        ((x, y),) = batches
        twin = copy.deepcopy(trainer.model)
        nats = F.cross_entropy(twin(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        expected = (naive_weights(pairs, x, y, 1.0) * nats).mean()
        expected.backward()
        losses = trainer.gradients(batches)[:2].tolist()
        assert losses == pytest.approx([expected.item(), nats.mean().item()], rel=1e-6)
        for p, q in zip(trainer.model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-4)
        trainer.model.zero_grad()
        trainer.step(batches, step, 1.0)
        pairs.update(zip(x.flatten().tolist(), y.flatten().tolist()))
    assert expected < 0.99 * nats.mean()


def test_alpha_zero_is_the_plain_loss(data):
    """COMPLEMENT_ALPHA=0 trains on mean cross-entropy, however much text has been counted."""
    cfg = tiny_config(data_path=str(data), complement_alpha=0.0, micro_batch_tokens=128)
    trainer, stream = new_trainer(warm_model(cfg), cfg), train_stream(cfg, 0, 128)
    for step in range(2):
        trainer.step(micro_batches(next(stream)[0], cfg, HERE), step, 1.0)
    ((x, y),) = batches = micro_batches(next(stream)[0], cfg, HERE)
    plain = F.cross_entropy(trainer.model(x).flatten(0, 1), y.flatten()).item()
    assert trainer.gradients(batches)[:2].tolist() == pytest.approx([plain, plain], rel=1e-6)


# ---- Optimizers ----------------------------------------------------------------------------------


def test_each_parameter_has_its_optimizer():
    """Muon has the matrices, AdamW tables and vectors, each with its own rate and decay."""
    cfg = tiny_config(matrix_lr=0.01, tied_embed_lr=0.02, scalar_lr=0.03, muon_wd=0.4, adam_wd=0.5)
    model = warm_model(cfg)
    muon, adam = train_gpt.new_optimizers(model, cfg, HERE)
    assert isinstance(muon, Muon)
    assert isinstance(adam, torch.optim.AdamW)
    groups = [(kind, g) for kind in (muon, adam) for g in kind.param_groups]
    owner = {id(p): (kind, group) for kind, group in groups for p in group["params"]}
    assert sum(len(group["params"]) for _, group in groups) == len(owner)
    matrices = ("attn_out", "mlp_in", "mlp_out", "_proj", ".q", ".k", ".v")
    for name, p in model.named_parameters():
        kind, group = owner.pop(id(p))
        expected = (adam, 0.03, 0.5)
        if name in ("embed.tokens", "embed.bigrams", "ve_table"):
            expected = (adam, 0.02, 0.5)
        elif name.endswith(matrices):
            expected = (muon, 0.01, 0.4)
        assert (kind, group["peak_lr"], group["weight_decay"]) == expected, name
    assert not owner
    assert adam.defaults["betas"] == (0.9, 0.95)
    assert adam.defaults["eps"] == 1e-8


def test_step_scales_all_rates_alike():
    """A step's rates are the peak rates times its factor, its momentum is the schedule's."""
    cfg = tiny_config(matrix_lr=0.01, tied_embed_lr=0.02, scalar_lr=0.03)
    trainer = new_trainer(warm_model(cfg), cfg)
    trainer.step(random_batches(cfg), 375, 0.25)
    rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
    assert rates == [0.01 * 0.25, 0.02 * 0.25, 0.03 * 0.25]
    momentum = trainer.optimizers[0].param_groups[0]["momentum"]
    assert momentum == pytest.approx(0.92 + 0.07 / 4)


SHAPES = [(12, 20), (20, 12), (16, 16), (12, 20), (20, 12), (12, 20)]
MOMENTA = [0.9, 0.92, 0.95, 0.95]
DECAY = dict(lr=0.02, weight_decay=0.3)
BF16 = Runtime(dtype=torch.bfloat16)


def matrices_and_gradients():
    """Matrices of SHAPES, and gradients of different sizes for each of four steps."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    steps = range(len(MOMENTA))
    return matrices, [[10.0**-i * torch.randn(shape) for i in steps] for shape in SHAPES]


def moved(optimizer, params, gradients):
    """The parameters, copied, after a step on each of their gradients with its momentum."""
    for step, momentum in enumerate(MOMENTA):
        optimizer.param_groups[0]["momentum"] = momentum
        for p, grads in zip(params, gradients):
            p.grad = grads[step].clone()
        optimizer.step()
    return [p.detach() for p in params]


def test_muon_matches_torch_muon():
    """In bfloat16, whatever shapes are stacked, it goes where torch.optim.Muon goes.

    It is nearer to torch's than bfloat16 is to exact arithmetic, 0.004 of the way.
    """
    matrices, gradients = matrices_and_gradients()
    params, theirs = ([nn.Parameter(m.clone()) for m in matrices] for _ in range(2))
    ours = moved(Muon([dict(params=params, rt=BF16, **DECAY)], {}), params, gradients)
    theirs = moved(torch.optim.Muon(theirs, **DECAY), theirs, gradients)
    for start, our, their in zip(matrices, ours, theirs):
        assert (our - their).norm() < 0.001 * (their - start).norm()


def test_muon_matches_a_plain_loop():
    """In float32: momentum, Nesterov, five steps of Newton-Schulz, decay, and the rate by shape."""
    matrices, gradients = matrices_and_gradients()
    params = [nn.Parameter(m.clone()) for m in matrices]
    ours = moved(Muon([dict(params=params, rt=HERE, **DECAY)], {}), params, gradients)
    for start, our, grads in zip(matrices, ours, gradients):
        plain = [g.double().numpy() for g in grads]
        expected = naive_muon(start.double().numpy(), plain, MOMENTA, **DECAY)
        np.testing.assert_allclose(our.numpy(), expected, atol=1e-5)


def muon_report(rt):
    """A rank's matrices after four steps; what it orthogonalized, and sums over ranks, a step."""
    matrices, gradients = matrices_and_gradients()
    params = [nn.Parameter(m) for m in matrices]
    orthogonalize = train_gpt.orthogonalize
    stacks = []

    def spy(stack):
        if stack.size(1) <= stack.size(2):  # a taller one comes back transposed
            stacks.append(len(stack))
        return orthogonalize(stack)

    with (
        mock.patch.object(train_gpt, "orthogonalize", spy),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        after = moved(Muon([dict(params=params, rt=rt, **DECAY)], {}), params, gradients)
    return after, sum(stacks) / len(MOMENTA), sums.call_count / len(MOMENTA)


@pytest.mark.slow
@pytest.mark.parametrize("world, shares", [(2, [4, 2]), (4, [3, 2, 1, 0])])
def test_ranks_share_the_matrices(run_ranks, world, shares):
    """With one sum a step for each of three shapes, all move as without other ranks.

    Alike on all ranks; up to rounding, since a product of fewer matrices may be another kernel's.
    """
    alone, share, sums = muon_report(HERE)
    assert (share, sums) == (len(SHAPES), 0)
    reports = run_ranks(world, muon_report)
    assert [report[1:] for report in reports] == [(share, 3) for share in shares]
    for matrix, *of_ranks in zip(alone, *(report[0] for report in reports)):
        assert all(torch.equal(other, of_ranks[0]) for other in of_ranks)
        torch.testing.assert_close(of_ranks[0], matrix, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("rows, cols", [(12, 20), (20, 12), (16, 16)])
def test_orthogonalize_matches_the_polynomial(rows, cols):
    """Each of three matrices, tall, wide or square, as if it were alone."""
    stack = torch.from_numpy(np.random.default_rng(0).normal(size=(3, rows, cols)))
    for matrix, found in zip(stack.numpy(), train_gpt.orthogonalize(stack).numpy()):
        np.testing.assert_allclose(found, naive_orthogonalize(matrix), atol=1e-9)


@pytest.mark.parametrize("rows, cols", [(12, 20), (20, 12)])
def test_orthogonalize_makes_singular_values_about_one(rows, cols):
    """Between 0.68 and 1.21, as the coefficients promise, from values 100 times apart."""
    random = np.random.default_rng(0)
    u, _, v = np.linalg.svd(random.normal(size=(rows, cols)), full_matrices=False)
    matrix = torch.from_numpy(u * np.geomspace(0.05, 5, 12) @ v)
    values = torch.linalg.svdvals(train_gpt.orthogonalize(matrix[None].float())[0])
    assert values.min() > 0.68
    assert values.max() < 1.21


# ---- Schedules -----------------------------------------------------------------------------------


@pytest.fixture
def scales(data, monkeypatch):
    """scales(lefts, **settings) -> the factors of a training's steps, if so many steps are left."""

    def run(lefts, **settings):
        used = []
        left = iter([*lefts[1:], 0.0])

        def spy(trainer, batches, step, scale):
            used.append(scale)
            return 1.0, 1.0

        monkeypatch.setattr(train_gpt.Trainer, "step", spy)
        monkeypatch.setattr(train_gpt, "steps_left", lambda *a: next(left))
        trained(data, iterations=lefts[0], **settings)
        return used

    return run


def test_learning_rate_falls_in_the_end(scales):
    """The factor is 1 until WARMDOWN_ITERS before the end, then linear to 0."""
    lefts = [100, 50, 20, 15, 10.0, 1]
    assert scales(lefts, warmdown_iters=20) == pytest.approx([1, 1, 1, 0.75, 0.5, 0.05])
    assert scales([100, 50, 1], warmdown_iters=0) == [1, 1, 1]


def test_steps_left_are_those_of_the_iterations():
    """Where there is no limit of time."""
    cfg = tiny_config(iterations=100)
    lefts = [train_gpt.steps_left(step, 3.0 * step, math.inf, cfg) for step in (1, 50, 99, 100)]
    assert lefts == [99, 50, 1, 0]


@pytest.mark.parametrize(
    "step, seconds, left",
    [
        (1000, 300.0, 1000),
        (1000, 500.0, 200),
        (2000, 590.0, 10 / 0.295),
        (1000, 600.0, 0),
        (1000, 700.0, 0),
        (9900, 100.0, 100),
    ],
)
def test_steps_left_are_those_of_the_clock(step, seconds, left):
    """Seconds left over the mean step time, unless the iterations end sooner."""
    cfg = tiny_config(iterations=10_000)
    assert train_gpt.steps_left(step, seconds, 600.0, cfg) == pytest.approx(left)


def test_momentum_rises_linearly():
    """From 0.92 to MUON_MOMENTUM, down to one below 0.92 as well."""

    def momenta(last, *steps):
        cfg = tiny_config(muon_momentum=last, muon_momentum_warmup_steps=1500)
        trainer = new_trainer(train_gpt.new_model(cfg, HERE), cfg)
        for step in steps:
            trainer.step(random_batches(cfg), step, 1.0)
            yield trainer.optimizers[0].param_groups[0]["momentum"]

    found = [*momenta(0.99, 0, 300, 750, 1500, 9000)]
    assert found == pytest.approx([0.92, 0.934, 0.955, 0.99, 0.99])
    assert [*momenta(0.9, 750)] == pytest.approx([0.91])


# ---- Averaging -----------------------------------------------------------------------------------


def averaged(values, scales=None, **settings):
    """The weight that is installed after every weight took each of `values`, from 0."""
    cfg = tiny_config(**settings)
    model = warm_model(cfg)
    params = [p.data.zero_() for p in model.parameters()]
    trainer = new_trainer(model, cfg)
    for step, value in enumerate(values, 1):
        torch._foreach_zero_(params)
        torch._foreach_add_(params, value)
        trainer.average(step, scales[step - 1] if scales else 1.0)
    trainer.install_average()
    (weight,) = {w for p in params for w in p.flatten().tolist()}
    return weight


def test_ema_matches_hand_calculation():
    """EMA_DECAY caps the decay, which is step / (step + 10) before: 1/11, 2/12, 3/13, ..."""
    one = 10 / 11 * 5
    assert averaged([5], ema_decay=0.997) == pytest.approx(one)
    assert averaged([5, 8], ema_decay=0.997) == pytest.approx(1 / 6 * one + 5 / 6 * 8)
    assert averaged([5, 8], ema_decay=0.125) == pytest.approx(0.125 * one + 0.875 * 8)
    assert averaged([5, 8], ema_decay=0.0) == 8


def test_swa_matches_hand_calculation():
    """SWA is the mean of each SWA_EVERY-th step below scale 0.2, and nothing before the first."""
    values, scales = [1, 2, 4, 8, 16, 32, 64], [1.0, 0.2, 0.19, 0.19, 0.1, 0.05, 0.01]
    settings = dict(swa_enabled=True, swa_every=2, ema_decay=0.9)
    assert averaged(values, scales, **settings) == pytest.approx((8 + 32) / 2)
    assert averaged(values[:3], scales[:3], **settings) == 4


def test_first_step_of_training_is_averaged_as_step_one():
    """After one step the average is 1/11 of the start and 10/11 of the weights."""
    cfg = tiny_config(ema_decay=0.997)
    model = warm_model(cfg)
    start, trainer = weights_of(model), new_trainer(model, cfg)
    trainer.step(random_batches(cfg), 0, 1.0)
    weights = weights_of(model)
    trainer.install_average()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, start[name].lerp(weights[name], 10 / 11))


# ---- Training loop -------------------------------------------------------------------------------


def trained(data, held_out=0, **settings):
    """(model, result, log lines) of a tiny training run."""
    cfg, lines = tiny_config(data_path=str(data), **settings), []
    model = train_gpt.new_model(cfg, HERE)
    return model, train_gpt.train(model, cfg, HERE, lines.append, held_out), lines


def test_training_learns_a_repetitive_stream(tmp_path):
    """Thirty steps on a phrase said over and over take most of the loss away."""
    phrase = np.random.default_rng(5).permutation(np.arange(6, 30))
    write_shards(tmp_path, [np.tile(phrase, 20)])
    model, result, lines = trained(tmp_path, iterations=30, warmdown_iters=10)
    text = torch.from_numpy(np.tile(phrase, 2))
    with torch.no_grad():
        loss = F.cross_entropy(model(text[None, :32])[0], text[1:33]).item()
    assert loss < 0.6 * math.log(VOCAB)
    assert (result.steps, result.tokens) == (30, 30 * 128)
    assert result.seconds > 0
    assert result.stopped == ""
    assert re.match(r"step 1/30  ETA \d+ s  loss 4\.1", lines[0])
    assert lines[-1].startswith("note: the shards were read 8")


def test_same_seed_gives_the_same_artifact(data):
    """Two runs of a seed pack to the same bytes; another seed ends at other weights."""
    weights = [trained(data, seed=seed, iterations=4)[0].state_dict() for seed in (5, 5, 6)]
    first, second, other = weights
    cfg = tiny_config(seed=5)
    packed = [train_gpt.pack_artifact(w, cfg, tiny_table(), 8.0) for w in (first, second)]
    assert packed[0] == packed[1]
    assert not torch.equal(first["embed.tokens"], other["embed.tokens"])


def test_warm_up_leaves_no_trace(data):
    """Compilation steps on made-up tokens change neither weights nor counts nor optimizers."""
    plain, _, plain_lines = trained(data, iterations=4)
    warmed, result, lines = trained(data, iterations=4, warmup_steps=3)
    assert same(weights_of(plain), weights_of(warmed))
    assert [line.split(", not")[0][-8:] for line in lines[:3]] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
    ]
    assert not any("warm-up" in line for line in plain_lines)
    assert result.steps == 4
    assert result.warmup_seconds > 0


def test_signal_while_a_failure_is_told_changes_nothing(data, monkeypatch):
    """Where a rank fails, the launcher's SIGTERM reaches the others while they log it."""
    monkeypatch.setattr(train_gpt.Trainer, "step", mock.Mock(side_effect=RuntimeError("rank 1")))
    train_gpt.on_signals(train_gpt.interrupt)
    shown = []

    def log(line):
        shown.append(line)
        signal.raise_signal(signal.SIGTERM)

    cfg = tiny_config(data_path=str(data))
    result = train_gpt.train(train_gpt.new_model(cfg, HERE), cfg, HERE, log, 0)
    assert result.stopped == "after step 0: rank 1"
    assert "Traceback" in shown[0]


def test_clock_ends_training(data):
    """Training stops after the first step that ends beyond MAX_WALLCLOCK_SECONDS."""
    _, result, _ = trained(data, max_wallclock_seconds=1e-9)
    assert result.steps == 1
    assert result.stopped == ""


@pytest.mark.parametrize("held_out, limit_s", [(0, 1000.0), (9, 970.0)])
def test_held_out_text_is_left_its_share_of_the_time(data, monkeypatch, held_out, limit_s):
    """Training with held-out text plans for 97 % of MAX_WALLCLOCK_SECONDS, without for all."""
    limits = []
    monkeypatch.setattr(train_gpt, "steps_left", lambda *a: limits.append(a[2]) or 0.0)
    trained(data, held_out, iterations=1, max_wallclock_seconds=1000.0)
    assert limits == pytest.approx([limit_s])


@pytest.mark.parametrize("clip", [0.3, 0.0, 1e9])
def test_gradient_is_clipped_by_its_global_norm(clip):
    """A step moves by the gradient, shortened to GRAD_CLIP_NORM if longer; 0 turns this off."""
    cfg = tiny_config(grad_clip_norm=clip)
    model, batches = warm_model(cfg), random_batches(cfg)
    trainer = new_trainer(model, cfg)
    trainer.gradients(batches)
    gradients, before = gradients_of(model), weights_of(model)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    assert norm > 0.6
    model.zero_grad()
    descent = torch.optim.SGD(model.parameters(), lr=1.0)  # its step shows the gradient
    descent.param_groups[0]["peak_lr"] = 1.0
    trainer.optimizers = [descent]
    trainer.step(batches, 0, 1.0)
    for name, p in model.named_parameters():
        moved = gradients[name] * (min(1.0, clip / norm) if clip else 1.0)
        torch.testing.assert_close(before[name] - p, moved, atol=1e-6, rtol=1e-3)


# ---- Stops ---------------------------------------------------------------------------------------


def completed_steps(data, steps):
    """The averaged weights after so many undisturbed steps."""
    cfg = tiny_config(data_path=str(data))
    trainer, stream = new_trainer(train_gpt.new_model(cfg, HERE), cfg), train_stream(cfg, 0, 128)
    for step in range(steps):
        batches = micro_batches(next(stream)[0], cfg, HERE)
        trainer.step(batches, step, min(1.0, (cfg.iterations - step) / cfg.warmdown_iters))
    trainer.install_average()
    return weights_of(trainer.model)


def spoil_loss(model, losses):
    """The loss is NaN and its gradient is not."""
    weighted, plain = losses
    return weighted, plain * math.nan


def spoil_gradient(model, losses):
    """The loss is finite and its gradient is not."""
    weighted, plain = losses
    return weighted + (0 * model.skip_weights.sum()).sqrt(), plain


def interrupt(*args):
    """Ctrl-C."""
    raise KeyboardInterrupt("interrupted")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_loss, "after step 2: loss nan"),
        (spoil_gradient, "after step 2: .*gradient norm nan"),
        (interrupt, "after step 2: interrupted"),
    ],
)
def test_stop_keeps_the_last_good_weights(data, monkeypatch, spoil, message):
    """NaN or Ctrl-C in step 3's second micro-batch: the result names it, two steps remain."""
    expected = completed_steps(data, 2)
    training_loss = train_gpt.training_loss

    def spoiled_loss(model, rt):
        loss, calls = training_loss(model, rt), itertools.count(1)

        def spoiled(x, y, weights):
            losses = loss(x, y, weights)
            return spoil(model, losses) if next(calls) == 6 else losses

        return spoiled

    monkeypatch.setattr(train_gpt, "training_loss", spoiled_loss)
    model, result, _ = trained(data)
    assert re.match(message, result.stopped)
    assert result.steps == 2
    assert same(weights_of(model), expected)
    assert all(p.isfinite().all() for p in model.parameters())


def test_ctrl_c_between_two_optimizers_keeps_the_average_before(data, monkeypatch):
    """Half of step 3's weights have moved: the average of the two steps before remains."""
    expected = completed_steps(data, 2)
    calls, original = itertools.count(1), torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: interrupt() if next(calls) == 3 else original(self)
    )
    model, result, _ = trained(data)
    assert result.stopped == "after step 2: interrupted"
    assert same(weights_of(model), expected)


def test_unreadable_shard_keeps_the_last_good_weights(tmp_path):
    """A second shard that is cut ends training where the first one does, and is named."""
    write_shards(tmp_path, [tiny_stream(400, 1)])
    expected = completed_steps(tmp_path, 3)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"cut")
    model, result, _ = trained(tmp_path)
    assert "fineweb_train_000001.bin" in result.stopped
    assert same(weights_of(model), expected)


# ---- One rank and two ----------------------------------------------------------------------------


def rank_report(rt, folder):
    """A rank's gradients of a step, then four steps, then a NaN on the last rank alone."""
    cfg = tiny_config(data_path=folder)
    trainer, stream = new_trainer(warm_model(cfg), cfg, rt), train_stream(cfg, 0, 128)
    batches = micro_batches(next(stream)[0], cfg, rt)
    losses = trainer.gradients(batches)[:2].tolist()
    gradients = gradients_of(trainer.model)
    trainer.model.zero_grad()
    for step in range(4):
        losses += trainer.step(batches, step, 1.0)
        batches = micro_batches(next(stream)[0], cfg, rt)
    report = dict(
        losses=losses,
        gradients=gradients,
        weights=weights_of(trainer.model),
        average=[mean.clone() for mean in trainer.mean],
        counts=trainer.counts.clone(),
        totals=trainer.counts.sum(1),
        x=torch.cat([x for x, _ in batches]),
    )
    if rt.rank == rt.world - 1:
        loss = trainer.loss
        trainer.loss = lambda *batch: tuple(math.nan * value for value in loss(*batch))
    try:
        trainer.step(batches, 4, 1.0)
    except UserError as stop:
        report["stop"] = str(stop)
    return {**report, "weights_after_stop": weights_of(trainer.model)}


@pytest.fixture(scope="module")
def reports(one_thread, run_ranks, data):
    """rank_report of one rank, then of each of two."""
    return [rank_report(HERE, str(data)), *run_ranks(2, rank_report, str(data))]


@pytest.mark.slow
def test_counts_do_not_depend_on_the_ranks(reports):
    """One rank and each of two have counted the very same pairs."""
    alone, *pair = reports
    assert alone["counts"].sum() == 4 * 128
    assert alone["totals"].sum() == 4 * 128
    for rank in pair:
        assert torch.equal(alone["counts"], rank["counts"])
        assert torch.equal(alone["totals"], rank["totals"])


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_ranks(reports):
    """The gradient over two ranks is that of one, up to rounding, and so are both losses."""
    alone, *pair = reports
    for rank in pair:
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert torch.equal(alone["x"], torch.cat([rank["x"] for rank in pair]))


@pytest.mark.slow
def test_ranks_hold_the_same_bits(reports):
    """After four steps, weights and averages of two ranks are equal to the last bit."""
    _, first, second = reports
    assert same(first["weights"], second["weights"])
    assert all(map(torch.equal, first["average"], second["average"]))


@pytest.mark.slow
def test_steps_do_not_depend_on_the_ranks(reports):
    """Two ranks go where one rank goes, up to Muon's bf16."""
    alone, first, _ = reports
    start = weights_of(warm_model(tiny_config()))
    for name, weight in alone["weights"].items():
        way = (weight - start[name]).norm()
        assert (first["weights"][name] - weight).norm() < 0.01 * way, name


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_before_a_weight_moves(reports):
    """Every rank learns of it in the same step, before any of their weights moves."""
    assert [report["stop"].split(",")[0] for report in reports] == ["loss nan"] * 3
    for report in reports:
        assert same(report["weights"], report["weights_after_stop"])
