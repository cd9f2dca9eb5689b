"""The program on a pretended device: nothing mixes with the CPU, and the host seldom waits."""

import datetime
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    CODED_STREAM,
    HERE,
    ROOT,
    TABLE,
    NamingCodec,
    quiet,
    random_tokens,
    sharp_weights,
    tiny_config,
    tiny_stream,
    tiny_table,
    warm_model,
    weights_of,
    write_shards,
)
from pretend import CUDA, DeviceMixError, FromPython, on_device, pretended_device

import train_gpt

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(num_layers=2, ve_layers="1", xsa_last_n=1, ttt_freeze_blocks=1)


@pytest.fixture
def device():
    """A PretendDevice, entered; tables that the script keeps are made anew after it."""
    with pretended_device() as entered:
        yield entered
    train_gpt.exp_table.cache_clear()


def runtime_on_device(script=train_gpt, kinds=(), **fields):
    """A Runtime on the pretended device that compiles nothing."""

    class Eager(*kinds, script.Runtime):
        """Runs functions as they are."""

        def compiled(self, function):
            """Return the function."""
            return function

    return Eager(device=CUDA, **fields)


def cpu(tensors):
    """Copies on the CPU of a dictionary's tensors."""
    return {name: t.cpu() for name, t in tensors.items()}


def close(a, b):
    """Whether two dictionaries of tensors agree up to rounding."""
    return all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)


# ---- The pretended device ------------------------------------------------------------------------


def test_device_looks_like_cuda(device):
    """What the script asks a tensor is answered as on a GPU, also for parameters and views."""
    model = warm_model(tiny_config(**SMALL)).to(CUDA)
    for tensor in (torch.zeros(3, device=CUDA), model.skip_weights, model.skip_weights[0]):
        assert tensor.is_cuda
        assert tensor.device == CUDA


@pytest.mark.parametrize(
    "mix",
    [
        lambda ours, cpu: ours + cpu,
        lambda ours, cpu: torch.cat([ours, cpu]),
        lambda ours, cpu: ours[cpu.long()],
        lambda ours, cpu: torch._foreach_add_([ours], [cpu]),
        lambda ours, cpu: ours @ cpu,
    ],
)
def test_mixed_devices_are_refused(device, mix):
    """An operator that gets tensors of both sorts raises, also inside of lists and as an index."""
    with pytest.raises(DeviceMixError, match="on the CPU"):
        mix(torch.zeros(3, device=CUDA), torch.zeros(3))


def test_scalars_and_copies_pass(device):
    """As on CUDA, a 0-d CPU tensor is a number, and copies go both ways."""
    ours = torch.zeros(2, device=CUDA) + torch.tensor(1.5)
    assert ours.cpu().tolist() == [1.5, 1.5]
    assert torch.ones(2).to(ours).add(ours).tolist() == [2.5, 2.5]


WAITS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum() > 0),
    "float": lambda t: float(t[0]),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu", torch.float64),
    "copy_": lambda t: torch.zeros(3).copy_(t),
    "equal": lambda t: torch.equal(t, t),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "mask assigned": lambda t: t.__setitem__(t > 0, t[1:] + 1),
    "tensor": lambda t: torch.tensor([1.0], device=CUDA),
    "pageable": lambda t: torch.zeros(3).to(CUDA, non_blocking=True),
    "clock": lambda t: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(device, name):
    """Each way in which a host waits for a GPU counts once."""
    tensor = torch.arange(3, device=CUDA).float()
    device.reset()
    WAITS[name](tensor)
    assert device.counts[1] == 1


def test_pinned_copies_are_no_waits(device):
    """Runtime.upload copies without waiting, and the numbers arrive."""
    uploaded = runtime_on_device().upload(torch.arange(3))
    assert device.counts == (0, 0)
    assert uploaded.tolist() == [0, 1, 2]


def test_operators_are_counted(device):
    """Views and allocations are none; what autograd takes apart counts by its parts."""
    x = torch.empty(4, 6, device=CUDA).T[1:].unsqueeze(0)
    assert device.counts == (0, 0)
    x.mul_(2).add_(1)
    assert device.counts == (2, 0)


# ---- Training ------------------------------------------------------------------------------------


def new_trainer(cfg, rt, script=train_gpt):
    """A Trainer of a warm model on rt's device, and the batches of a step."""
    model = warm_model(cfg).to(rt.device)
    tokens = random_tokens(cfg.train_batch_tokens + 1).numpy()
    trainer = script.Trainer(model, script.training_loss(model, rt), cfg, rt)
    return trainer, script.micro_batches(tokens, cfg, rt)


def test_training_is_that_of_the_cpu(device):
    """Three steps with fused attention and AdamW: weights, average and counts up to rounding."""
    cfg = tiny_config(**SMALL)
    results = []
    for rt in (HERE, runtime_on_device()):
        trainer, batches = new_trainer(cfg, rt)
        losses = [trainer.step(batches, step, 1.0) for step in range(3)]
        trainer.install_average()
        results.append((losses, cpu(weights_of(trainer.model)), trainer.counts.cpu()))
    (losses, weights, counts), (losses_there, weights_there, counts_there) = results
    assert np.allclose(losses_there, losses, rtol=1e-3)
    assert close(weights_there, weights)
    assert torch.equal(counts_there, counts)


def test_step_waits_once(device):
    """With the batches and the clock: losses and norm are read together, nothing else is."""
    rt = runtime_on_device()
    trainer, _ = new_trainer(tiny_config(**SMALL), rt)
    device.reset()
    batches = train_gpt.micro_batches(random_tokens(129).numpy(), trainer.cfg, rt)
    trainer.step(batches, 0, 1.0)
    rt.from_main(1.0)
    assert device.waits.total() == 1


def test_step_attends_by_flash_attention_alone(device, monkeypatch):
    """Training lets SDPA choose no other kernel; afterwards its switches are as before."""
    cuda = torch.backends.cuda
    switches = cuda.flash_sdp_enabled, cuda.cudnn_sdp_enabled
    switches += cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled
    before = [switch() for switch in switches]
    inside = []
    attend = F.scaled_dot_product_attention

    def spy(*args, **how):
        inside.append([switch() for switch in switches])
        return attend(*args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    trainer, batches = new_trainer(tiny_config(**SMALL), runtime_on_device())
    trainer.gradients(batches)
    assert inside == [[True, False, False, False]] * len(inside)
    assert len(inside) == trainer.cfg.num_layers * len(batches)
    assert [switch() for switch in switches] == before


def test_gradients_wait_for_nothing(device):
    """The host only launches forward and backward passes."""
    trainer, batches = new_trainer(tiny_config(**SMALL), runtime_on_device())
    device.reset()
    trainer.gradients(batches)
    assert device.waits.total() == 0


MOST_OF_THE_OPTIMIZERS = 169  # 15 + 25 for each shape of matrices, of which there are six
MOST_OF_A_STEP = 1797  # four layers, two micro-batches, uncompiled
RECORD = dict(num_layers=11, ve_layers="9,10", xsa_last_n=4)


@pytest.mark.parametrize("settings", [{}, RECORD], ids=["4 layers", "record's 11 layers"])
def test_optimizers_launch_few_operators(device, settings):
    """After the gradient: clip, Muon, AdamW, average and counts, for any number of layers."""
    trainer, _ = new_trainer(tiny_config(**settings), runtime_on_device())
    trainer.gradients = lambda batches: torch.ones(3, device=CUDA)
    for step in range(2):  # the first makes the optimizers' states
        for p in trainer.model.parameters():
            p.grad = torch.ones_like(p)
        device.reset()
        trainer.step([], step, 1.0)
    print(f"{device.counts[0]} operators")
    assert device.operators.total() <= MOST_OF_THE_OPTIMIZERS


def test_step_launches_few_operators(device):
    """A whole step without compiler."""
    trainer, batches = new_trainer(tiny_config(), runtime_on_device())
    for step in range(2):
        device.reset()
        trainer.step(batches, step, 1.0)
    print(f"{device.counts[0]} operators")
    assert device.operators.total() <= MOST_OF_A_STEP


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_weights_stay_where_the_norm_is_not_finite(device, norm):
    """The one read comes before any weight moves."""
    trainer, batches = new_trainer(tiny_config(**SMALL), runtime_on_device())
    before = cpu(weights_of(trainer.model))
    gradients = trainer.gradients
    trainer.gradients = lambda batches: gradients(batches) * torch.tensor([1, 1, norm]).to(CUDA)
    with pytest.raises(train_gpt.UserError, match=f"gradient norm {norm}"):
        trainer.step(batches, 0, 1.0)
    assert all(torch.equal(before[n], t) for n, t in cpu(weights_of(trainer.model)).items())


# ---- Whole runs ----------------------------------------------------------------------------------


class Notes:
    """A Run on a short text that keeps the stages; what it writes is its trace."""

    def __init__(self, cfg, rt):
        self.cfg = cfg
        self.rt = rt
        self.table = tiny_table()
        self.tokens = tiny_stream(3 * 64 + 20)
        self.results = dict(validation=dict(bytes=500), val_bpb=0.0)
        self.stages = []

    def add_stages(self, stages):
        """Keep the stages without their seconds."""
        self.stages += [{**stage, "seconds": 0} for stage in stages]

    def log(self, *_):
        """Do nothing with what a run tells."""

    record = check_size = log_table = log


@pytest.mark.parametrize(
    "mixer, quantizer, swa",
    [
        ("learned", "fisher", False),
        pytest.param("entropy", "int6", True, marks=pytest.mark.slow),
    ],
)
def test_run_scores_what_the_cpu_scores(device, tmp_path, mixer, quantizer, swa):
    """Warm-up, training, held-out text, packing, stages; the CPU's bits of that artifact."""
    write_shards(tmp_path, [tiny_stream(700, 1)])
    cfg = tiny_config(
        **SMALL,
        data_path=str(tmp_path),
        artifact_path=str(tmp_path / "artifact"),
        log_dir=str(tmp_path),
        run_id=".",
        mixer=mixer,
        mixer_block=32,
        mixer_calibration_tokens=80,
        iterations=2,
        warmup_steps=1,
        swa_enabled=swa,
        swa_every=1,
        quantizer=quantizer,
        verify_enabled=False,
    )
    run = Notes(cfg, runtime_on_device())
    model = train_gpt.new_model(cfg, run.rt)
    held_out = train_gpt.load_held_out(cfg)
    result = train_gpt.train(model, cfg, run.rt, quiet, len(held_out))
    assert (result.steps, result.stopped) == (2, "")
    train_gpt.finish(run, model, result, held_out)
    here = Notes(cfg, HERE)
    train_gpt.evaluate_artifact(here, train_gpt.read_artifact(cfg.artifact))
    names = ["pre_quant", "round_trip", "sliding", "ttt", "mixer"]
    assert [stage["name"] for stage in run.stages] == names
    assert run.stages[1:] == here.stages


@pytest.mark.parametrize("lanes", [0, 4])
def test_code_is_that_of_the_cpu(device, artifacts, tmp_path, lanes):
    """Encoded on the device: the same file; decoded there: the same text."""
    cfg = artifacts("learned")
    artifact = train_gpt.read_artifact(cfg.artifact)
    here, there = (
        NamingCodec(artifact, cfg, rt, quiet) for rt in (HERE, runtime_on_device(dtype=None))
    )
    path = tmp_path / "code"
    tokens = CODED_STREAM[: 71 if lanes == 0 else 21]  # a TTT update; lanes of different lengths
    path.write_bytes(here.encode(tokens, lanes).data)
    assert there.encode(tokens.copy(), lanes).data == path.read_bytes()
    path.write_bytes(here.encode(tokens[:5], lanes).data)
    assert there.decode(path).text == artifact.table.decode(tokens[:5])


class Paired:
    """Two ranks in two threads, in place of a process group: `meet` is shared by both."""

    def sum_over_ranks(self, tensor):
        """Add both ranks' tensors, which must be on the device, as NCCL demands."""
        assert on_device(tensor)
        assert tensor.is_contiguous()
        self.box[self.rank] = tensor
        self.meet.wait(60)
        total = self.box[0] + self.box[1]
        self.meet.wait(60)
        with torch.inference_mode():
            return tensor.copy_(total)


def paired_ranks():
    """The Runtimes of two ranks."""
    ranks = [runtime_on_device(kinds=[Paired], rank=rank, world=2) for rank in range(2)]
    box, meet = [None, None], threading.Barrier(2)
    for rt in ranks:
        rt.box, rt.meet = box, meet
    return ranks


def in_threads(device, action, *arguments):
    """[action(argument) of each argument], each in a thread of its own, on the device."""

    def run(argument):
        with FromPython(device), device:
            return action(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


SHORT = dict(mixer="learned", mixer_block=32, eval_seq_len=16, eval_stride=8, ttt_chunk_tokens=32)
SCORED_CFG = tiny_config(**SMALL, **SHORT, ttt_epochs=1)


def scored_bits(predictor, n=75):
    """The bits of a text of n tokens in each stage."""
    stream = torch.from_numpy(tiny_stream(n)).to(predictor.rt.device)
    for _ in train_gpt.walk(predictor, stream):
        pass
    return predictor.bits


def new_predictor(rt, script=train_gpt, cfg=SCORED_CFG):
    """A Predictor of the last stage, ttt and mixer, at a stream's start."""
    return script.Predictor(sharp_weights(cfg), TABLE, cfg, rt, script.new_plan(cfg))


def test_two_ranks_score_what_one_does(device):
    """With TTT and the mixer's learning: to the last bit."""
    expected = scored_bits(new_predictor(HERE))
    predictors = [new_predictor(rt) for rt in paired_ranks()]
    assert in_threads(device, scored_bits, *predictors) == [expected] * 2


def test_two_ranks_train_as_one_does(device):
    """One step of two ranks: alike, and up to rounding that of one rank with both shares."""
    cfg = tiny_config(**SMALL)
    alone, batches = new_trainer(cfg, HERE)
    losses = alone.step(batches, 0, 1.0)
    pairs = [new_trainer(cfg, rt) for rt in paired_ranks()]
    reports = in_threads(device, lambda pair: pair[0].step(pair[1], 0, 1.0), *pairs)
    assert np.allclose(reports, [losses] * 2, rtol=1e-3)
    weights = [cpu(weights_of(trainer.model)) for trainer, _ in pairs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert close(weights[0], weights_of(alone.model))


# ---- Evaluation: waits and operators -------------------------------------------------------------


def scored_block(device, cfg, plan, blocks=3):
    """(operators, waits) of predict and score, then of update, for the last of some blocks."""
    rt = runtime_on_device()
    predictor = train_gpt.Predictor(sharp_weights(cfg), TABLE, cfg, rt, plan)
    stream = torch.from_numpy(tiny_stream(1 + blocks * plan.block)).to(CUDA)
    for start in range(1, len(stream), plan.block):
        stop = start + plan.block
        device.reset()
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        predictor.score(commitment, stream[start:stop])
        scored = device.counts
        device.reset()
        predictor.update(stream[:stop])
    return scored, device.counts


COUNTED_CFG = tiny_config(**SHORT)
BLOCKS = {
    "round_trip": (train_gpt.new_plan(COUNTED_CFG, "round_trip"), 214),
    "sliding": (train_gpt.new_plan(COUNTED_CFG, "sliding"), 386),
    "sliding, mixer": (train_gpt.new_plan(COUNTED_CFG, "sliding", "unguarded", "mixer"), 613),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_scored_block_waits_for_model_guard_and_score(device, name):
    """To know that logits are finite, what the guard saw of the block, and all stages' bits."""
    plan, most = BLOCKS[name]
    (operators, waits), (_, learning_waits) = scored_block(device, COUNTED_CFG, plan)
    print(f"{operators} operators")
    assert waits == (3 if "mixer" in name else 2)
    assert learning_waits == 0
    assert operators <= most


def test_mixer_learns_in_few_operators(device):
    """A learned mixer's step, without any wait."""
    plan = train_gpt.new_plan(COUNTED_CFG, "sliding", "unguarded", "mixer")
    _, (operators, waits) = scored_block(device, COUNTED_CFG, plan)
    print(f"{operators} operators")
    assert waits == 0
    assert operators <= 107


def test_ttt_update_waits_twice(device):
    """For the chunk's tokens, whose bytes are counted on the CPU, and to send those back."""
    plan = train_gpt.new_plan(COUNTED_CFG, "ttt")
    _, (operators, waits) = scored_block(device, COUNTED_CFG, plan, blocks=2)
    print(f"{operators} operators")
    assert waits == 2
    assert operators <= 1562


# ---- Planted faults ------------------------------------------------------------------------------


@pytest.fixture
def altered(monkeypatch):
    """altered(old, new) -> the script with `old`, which it has once, replaced by `new`."""

    def make(old, new):
        source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
        assert source.count(old) == 1
        module = types.ModuleType("altered_train_gpt")
        module.__file__ = str(ROOT / "train_gpt.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source.replace(old, new), module.__name__, "exec"), module.__dict__)
        return module

    return make


def training_waits(script, device):
    """The waits of one training step, its batches included."""
    rt = runtime_on_device(script)
    trainer, _ = new_trainer(tiny_config(**SMALL), rt, script)
    device.reset()
    batches = script.micro_batches(random_tokens(129).numpy(), trainer.cfg, rt)
    trainer.step(batches, 0, 1.0)
    return device.waits.total()


def scoring_waits(script, device):
    """The waits of two blocks of scoring and learning, TTT too, of a stream on the CPU."""
    predictor = new_predictor(runtime_on_device(script), script)
    device.reset()
    stream = torch.from_numpy(tiny_stream(40))
    for _ in script.walk(predictor, stream):
        pass
    return device.waits.total()


MIXES = [
    (training_waits, "dtype=torch.int32, device=rt.device)", "dtype=torch.int32)"),
    (training_waits, "torch.zeros(3, device=self.rt.device)", "torch.zeros(3)"),
    (
        training_waits,
        "rt.upload(torch.from_numpy(t).view(shape)[rt.rank])",
        "torch.from_numpy(t).view(shape)[rt.rank]",
    ),
    (scoring_waits, "return model.to(rt.device)", "return model"),
    (
        scoring_waits,
        "prefix[: last * lanes].to(self.rt.device)",
        "prefix[: last * lanes]",
    ),
    (scoring_waits, "prefix.to(self.rt.device)[positions]", "prefix[positions]"),
    (scoring_waits, "torch.as_tensor(word_begins, device=device)", "torch.as_tensor(word_begins)"),
    (
        scoring_waits,
        "torch.tensor(CONTEXT_LENGTHS, device=device)",
        "torch.tensor(CONTEXT_LENGTHS)",
    ),
    (scoring_waits, "torch.tensor(table, device=device)", "torch.tensor(table)"),
    (scoring_waits, "first, self.size, device=prefix.device", "first, self.size"),
    (scoring_waits, "weights.to(rt.device, torch.float64", "weights.to(torch.float64"),
    (scoring_waits, "targets.to(self.rt.device)).double()", "targets).double()"),
    (scoring_waits, "self.rt.upload(torch.tensor(self.trust))", "torch.tensor(self.trust)"),
    (scoring_waits, "self.rt.upload(positions[positions < stop])", "positions[positions < stop]"),
    (scoring_waits, "weights]).to(self.rt.device)", "weights])"),
]


@pytest.mark.parametrize("part, old, new", MIXES)
def test_planted_mix_is_caught(device, altered, part, old, new):
    """Each tensor that is left on the CPU ends the work."""
    with pytest.raises(DeviceMixError):
        part(altered(old, new), device)


# A step: one. Two blocks: their prefixes and targets are sent, logits checked, what the guard
# needs and bits read, which is five each, and the table of exp; learning sends its prefix, and TTT
# its chunk.
EXPECTED_WAITS = {training_waits: 1, scoring_waits: 13}
PLANTED_WAITS = [
    (training_waits, "losses[0].backward()", "losses[0].backward(); losses[0].item()"),
    (training_waits, "tensor = tensor.pin_memory()", "pass"),
    (
        training_waits,
        "count_pairs(self.counts, batches, self.rt)",
        "count_pairs(self.counts, batches, self.rt); bool(totals[0])",
    ),
    (
        scoring_waits,
        "self.boost(features))))",
        "self.boost(features)))).cpu().to(grid)",
    ),
    (scoring_waits, "logits = logits[: len(positions)]", "logits = logits[positions < stop]"),
    (scoring_waits, "self.blocks += 1\n", "self.blocks += int(total.isfinite().all())\n"),
    (
        scoring_waits,
        "self.optimizer.step()\n            self",
        "float(mean[0]); self.optimizer.step(); self",
    ),
]


@pytest.mark.parametrize("part, old, new", PLANTED_WAITS)
def test_planted_wait_is_counted(device, altered, part, old, new):
    """Each number that is read more, and each mask, shows."""
    assert part(altered(old, new), device) > EXPECTED_WAITS[part]


@pytest.mark.parametrize("part", EXPECTED_WAITS)
def test_no_wait_is_planted(device, part):
    """What the planted waits are compared with."""
    assert part(train_gpt, device) == EXPECTED_WAITS[part]


# ---- Compiled graphs -----------------------------------------------------------------------------


class Graphs:
    """A backend of torch.compile that counts graphs and hands them to aot_eager."""

    def __init__(self):
        self.made = 0

    def __call__(self, graph, example_inputs):
        """Count, and compile."""
        self.made += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


@pytest.fixture
def graphs(monkeypatch):
    """The Graphs that Runtime.compiled makes here, on the CPU, as it would on CUDA."""
    torch._dynamo.reset()
    backend = Graphs()
    how = dict(dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(
        train_gpt.Runtime, "compiled", lambda self, function: torch.compile(function, **how)
    )
    yield backend
    torch._dynamo.reset()


@pytest.mark.slow
def test_run_compiles_one_graph(graphs, monkeypatch, tmp_path):
    """The training loss, without breaks, in the warm-up; it trains as without a compiler."""
    write_shards(tmp_path, [tiny_stream(700, 1)])
    cfg = tiny_config(
        **SMALL,
        data_path=str(tmp_path),
        artifact_path=str(tmp_path / "artifact"),
        log_dir=str(tmp_path),
        run_id=".",
        mixer="learned",
        mixer_block=32,
        mixer_calibration_tokens=80,
        iterations=3,
        warmup_steps=2,
        verify_enabled=False,
    )
    held_out = train_gpt.load_held_out(cfg)
    made = []
    model = train_gpt.new_model(cfg, HERE)
    result = train_gpt.train(model, cfg, HERE, lambda _: made.append(graphs.made), len(held_out))
    assert (result.steps, result.stopped) == (3, "")
    assert made[:2] == [0, 1]  # before the first and the second step of the warm-up
    train_gpt.finish(Notes(cfg, HERE), model, result, held_out)
    assert graphs.made == 1
    monkeypatch.undo()
    plain = train_gpt.new_model(cfg, HERE)
    train_gpt.train(plain, cfg, HERE, quiet, len(held_out))
    assert close(weights_of(model), weights_of(plain))


# ---- Start on CUDA -------------------------------------------------------------------------------


@pytest.fixture
def started(device, monkeypatch):
    """started(activate, attend) -> (Runtime of rank 1 of 2, [arguments of init_process_group]).

    The package of FlashAttention-3 does activate(name), and then restore() takes it back; if
    `attend` is given, it is what SDPA does. The list has "restored" for each restore().
    """
    threads = torch.get_num_threads()
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **how: calls.append((args, how)))

    def start(activate, attend=F.scaled_dot_product_attention):
        # raising=False: torch 2.9 has no such function
        def patch(name, function):
            name += "_flash_attention_impl"
            monkeypatch.setattr(torch.nn.attention, name, function, raising=False)

        patch("activate", activate)
        patch("restore", lambda: calls.append("restored"))
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        environ = dict(zip(train_gpt.TORCHRUN, ("1", "2", "0", "2")))
        environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        return train_gpt.start_runtime(tiny_config(device="cuda"), environ), calls

    yield start
    torch.set_num_threads(threads)


def test_ranks_have_time_and_a_way_around_the_device(started):
    """Two hours for a packing or proving rank 0; gloo for what is on the CPU."""
    rt, ((args, how),) = started(lambda name: None)
    assert (rt.rank, rt.world, rt.device, rt.dtype) == (1, 2, CUDA, torch.bfloat16)
    assert args == ("cpu:gloo,cuda:nccl",)
    assert how["timeout"] == datetime.timedelta(hours=2)
    assert how["device_id"] == CUDA
    assert rt.notes[-1] == "attention: FlashAttention-3"


@pytest.mark.parametrize("error", [ImportError, RuntimeError, ValueError, AttributeError, OSError])
def test_foreign_attention_ends_no_run(started, error):
    """Whatever its package raises, torch's own kernel computes, and the log says why."""

    def fail(*args, **how):
        raise error("no symbol\nin it")

    expected = "attention: torch's FlashAttention; no FlashAttention-3: no symbol in it"
    rt, calls = started(fail)
    assert rt.notes[-1] == expected
    assert "restored" not in calls
    rt, calls = started(lambda name: None, attend=fail)  # it can be imported, and does not work
    assert rt.notes[-1] == expected
    assert calls.count("restored") == 1
