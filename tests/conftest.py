"""Shared by all tests: a tiny model, a tiny tokenizer, a random stream, and a way to run code on gloo ranks."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # two ranks on two cores: threads that spin would starve each other
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import train_gpt  # noqa: E402

VOCAB = 64
train_gpt.TestTimeTrainer.__test__ = False  # not a test, in spite of its name


def tiny_config(**changes):
    """A Config small enough for every test: W 32, S 8, chunks of 64, four layers of width 32, all mechanisms on."""
    settings = dict(
        preset="bench",
        vocab_size=VOCAB,
        num_layers=4,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=8,
        xsa_last_n=2,
        bigram_vocab_size=32,
        bigram_dim=8,
        ve_layers="2,3",
        train_seq_len=32,
        eval_seq_len=32,
        eval_stride=8,
        eval_batch_windows=3,
        ttt_chunk_tokens=64,
        ttt_schedule_chunks=8,
        ttt_freeze_blocks=2,
        ttt_epochs=2,
        ttt_lr=1e-3,
        polyak_decay=0.5,
        ngram_order=5,
        ngram_recent=4,
        min_count=2,
        train_batch_tokens=128,
        micro_batch_tokens=64,
        iterations=6,
        warmdown_iters=3,
        warmup_steps=0,
        max_wallclock_seconds=0.0,
        log_every=2,
        val_tokens=0,
        size_limit_bytes=1_000_000,
        mixer="entropy",
        mixer_block=8,
        mixer_calibration_tokens=0,
        ngram_hash_bits=18,
        alpha_base=0.0,
        alpha_range=0.3,
        alpha_center=3.0,
    )
    return train_gpt.Config(**{**settings, **changes})


def tiny_table():
    """A TokenTable of 64 pieces: unknown, BOS, EOS, three byte pieces, then words with and without a space."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>"]
    pieces += [
        train_gpt.SPACE + w if i % 2 else w
        for i, w in enumerate(f"w{j}" for j in range(VOCAB - len(pieces)))
    ]
    return train_gpt.TokenTable(tuple(pieces), "UCCBBB" + "N" * (VOCAB - 6), 1)


def unpacked(data, name="artifact"):
    """read_artifact of these bytes, from a file of that name in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return train_gpt.read_artifact(path)


def tiny_stream(n, seed=0):
    """n int64 tokens that begin with BOS and repeat themselves enough for n-grams to matter."""
    random = np.random.default_rng(seed)
    phrase = random.integers(6, VOCAB, 23)
    tokens = random.integers(6, VOCAB, n)
    for start in range(0, n - 12, 17):
        length = int(random.integers(3, 12))
        at = int(random.integers(0, len(phrase) - length))
        tokens[start : start + length] = phrase[at : at + length]
    tokens[0] = 1
    return tokens


def warm_model(cfg, seed=0):
    """A GPT with every parameter random (no zero output projections), so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.mixer.add_(torch.randn_like(model.mixer) * 0.1)
    return model.eval()


def _rank_main(rank, world, folder, function, args):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    torch.save(function(train_gpt.Runtime(rank=rank, world=world), *args), f"{folder}/out{rank}.pt")
    if world > 1:
        dist.barrier()
        os._exit(0)  # the teardown of a gloo group can abort the process


@pytest.fixture
def run_ranks(tmp_path_factory):
    """run_ranks(world, function, *args) -> [function(Runtime, *args) of each rank], each in a process of its own.

    `function` must be importable (top level of a test module); what it returns must be savable by torch.
    """

    def run(world, function, *args):
        folder = tmp_path_factory.mktemp("ranks")
        mp.spawn(_rank_main, (world, str(folder), function, args), nprocs=world)
        return [torch.load(folder / f"out{rank}.pt", weights_only=False) for rank in range(world)]

    return run
