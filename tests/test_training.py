"""The model, the data stream, the objective, the optimizers and the training loop, against plain formulas."""

import cmath
import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB, tiny_config, tiny_stream, tiny_table, unpacked, warm_model
from torch import nn

import train_gpt
from train_gpt import (
    GPT,
    BigramCounts,
    Runtime,
    Trainer,
    TrainingStopped,
    TrainStream,
    WeightAverage,
)

HERE = Runtime()  # one rank, CPU, float32


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    """One thread: matrices this small gain nothing from two, and two wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with three short training shards, the second one compressed."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(
        folder, [tiny_stream(400, 1), tiny_stream(250, 2), tiny_stream(310, 3)], compressed={1}
    )
    return folder


def write_shards(folder, shards, compressed=()):
    """Write token arrays as training shards 0, 1, ... of `folder`."""
    import zstandard

    for number, tokens in enumerate(shards):
        contents, ending = train_gpt.shard_bytes(tokens), ".bin"
        if number in compressed:
            contents, ending = zstandard.ZstdCompressor().compress(contents), ".bin.zst"
        (folder / f"fineweb_train_{number:06d}{ending}").write_bytes(contents)


def random_tokens(*shape, seed=0):
    """Random int64 tokens."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, shape))


def weights_of(model):
    """A copy of the parameters, {name: tensor}."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def gradients_of(model):
    """A copy of the gradients, {name: tensor}."""
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def same(a, b):
    """Whether two dictionaries of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ----------------------------------------------------------------------------------------------------------
# The model, written a second time: float64, one token, one head and one pair of dimensions after another
# ----------------------------------------------------------------------------------------------------------


def naive_rms(x):
    """x over its root mean square."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 2.0**-23)


def naive_buckets(tokens, buckets):
    """Row of the bigram table for each token of a list, in Python's integers."""
    return [
        ((36313 * token) ^ (27191 * tokens[t - 1])) % (buckets - 1) if t else buckets - 1
        for t, token in enumerate(tokens)
    ]


def naive_smear(rows, smear):
    """Each row mixed with the row before it; nothing is before the first."""
    gate = 1 / (1 + np.exp(-smear))
    return np.stack(
        [(1 - gate) * row + gate * (rows[t - 1] if t else 0) for t, row in enumerate(rows)]
    )


def naive_rotate(head, position, dims, base):
    """Turn the pairs (j, j + dims/2) of one head vector by position * base^(-2j/dims)."""
    out = head.copy()
    for j in range(dims // 2):
        z = complex(head[j], head[j + dims // 2]) * cmath.exp(
            1j * position * base ** (-2 * j / dims)
        )
        out[j], out[j + dims // 2] = z.real, z.imag
    return out


def naive_attention(q, k, v):
    """Causal softmax attention; query head h reads key/value head h // (H / G). q (T, H, d), k and v (T, G, d)."""
    y = np.empty_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            score = np.array([q[t, h] @ k[s, g] / math.sqrt(q.shape[2]) for s in range(t + 1)])
            p = np.exp(score - score.max())
            y[t, h] = sum(p[s] * v[s, g] for s in range(t + 1)) / p.sum()
    return y


def naive_exclude_self(y, v):
    """Each head's output without its part along the position's own value."""
    out = y.copy()
    for t in range(y.shape[0]):
        for h in range(y.shape[1]):
            own = v[t, h // (y.shape[1] // v.shape[1])]
            own = own / np.linalg.norm(own)
            out[t, h] -= (y[t, h] @ own) * own
    return out


def naive_mlp(x, w_in, w_out):
    """LeakyReLU with slope 0.5, squared, between two matrices."""
    hidden = x @ w_in.T
    return np.where(hidden > 0, hidden, 0.5 * hidden) ** 2 @ w_out.T


def naive_base(cfg):
    """The rotary base: 10,000, NTK-scaled for training sequences beyond 1,024."""
    return (
        10_000.0 * (cfg.train_seq_len / 1024) ** (cfg.rope_dims / (cfg.rope_dims - 2))
        if cfg.train_seq_len > 1024
        else 10_000.0
    )


def naive_block(w, cfg, i, x, x0, extra_v):
    """Layer i: (output, its own value projection (T, G, d))."""
    T, d = len(x), cfg.model_dim // cfg.num_heads
    p = {n.removeprefix(f"blocks.{i}."): value for n, value in w.items()}
    x = p["mix_x"] * x + p["mix_x0"] * x0
    h = naive_rms(x) / math.sqrt(i + 1)
    q, k, own_v = ((h @ p[n].T).reshape(T, -1, d) for n in "qkv")
    q, k = (
        [
            [naive_rotate(head, t, cfg.rope_dims, naive_base(cfg)) for head in row]
            for t, row in enumerate(naive_rms(z))
        ]
        for z in (q, k)
    )
    v = own_v + extra_v
    y = naive_attention(np.array(q) * p["q_gain"][:, None], np.array(k), v)
    if i >= cfg.num_layers - cfg.xsa_last_n:
        y = naive_exclude_self(y, v)
    x = x + p["attn_scale"] * (y.reshape(T, -1) @ p["attn_out"].T)
    h = naive_rms(x) / math.sqrt(i + 1)
    return x + p["mlp_scale"] * naive_mlp(h, p["mlp_in"], p["mlp_out"]), own_v


def naive_embedding(w, tokens):
    """Token table + projected bigram table, normed, smeared."""
    buckets = naive_buckets(tokens, len(w["embed.bigrams"]))
    rows = [
        w["embed.tokens"][token]
        + w["embed.bigram_scale"] * (w["embed.bigram_proj"] @ w["embed.bigrams"][b])
        for token, b in zip(tokens, buckets)
    ]
    return naive_smear(naive_rms(np.stack(rows)), w["embed.smear"])


def naive_logits(model, cfg, tokens):
    """Logits (T, V) in float64 of one list of tokens."""
    w = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    heads = len(tokens), cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
    x = x0 = naive_embedding(w, tokens)
    half, pushed, v0 = cfg.num_layers // 2, [], 0
    value_layers = [int(i) for i in cfg.ve_layers.split(",") if i]
    for i in range(cfg.num_layers):
        if half <= i < 2 * half:
            x = x + w["skip_weights"][i - half] * pushed.pop()
        extra_v = np.zeros(heads)
        if i in value_layers:
            scale = w["ve_scale"] * w["ve_layer_scales"][value_layers.index(i)]
            extra_v = extra_v + scale * (w["ve_table"][tokens] @ w["ve_proj"].T).reshape(heads)
        if i and cfg.vrl_enabled:
            extra_v = extra_v + w["vrl_scales"][i - 1] * v0
        x, own_v = naive_block(w, cfg, i, x, x0, extra_v)
        v0 = own_v if i == 0 else v0
        if i < half:
            pushed.append(x)
    return cfg.logit_softcap * np.tanh(naive_rms(x) @ w["embed.tokens"].T / cfg.logit_softcap)


def grouped_config(**changes):
    """Five layers, four heads in two groups, half of each head rotated, a base scaled for 2,048 tokens."""
    return tiny_config(
        **{
            **dict(
                num_layers=5,
                num_heads=4,
                num_kv_heads=2,
                rope_dims=4,
                ve_layers="1,3,4",
                logit_softcap=1.0,
                train_seq_len=2048,
                train_batch_tokens=2048,
                micro_batch_tokens=2048,
            ),
            **changes,
        }
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_layers=4, ve_layers="", vrl_enabled=False, xsa_last_n=0),
        dict(train_seq_len=32, num_heads=2, num_kv_heads=1, ve_layers="0", xsa_last_n=5),
    ],
)
def test_forward_equals_the_formulas(changes):
    """The whole model agrees with its second writing, in every combination of mechanisms."""
    cfg = grouped_config(**changes)
    model, tokens = warm_model(cfg), random_tokens(2, 24)
    with torch.no_grad():
        logits, present = model(tokens)
    assert logits.dtype == torch.float32 and len(present) == cfg.num_layers
    for row, naive in zip(logits.numpy(), (naive_logits(model, cfg, t.tolist()) for t in tokens)):
        np.testing.assert_allclose(row, naive, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Model, mechanism by mechanism
# ----------------------------------------------------------------------------------------------------------


def test_default_model_has_the_documented_number_of_parameters():
    """26,993,766 parameters, of which the optimizers take each exactly once."""
    with torch.device("meta"):
        model = GPT(train_gpt.Config())
    assert sum(p.numel() for p in model.parameters()) == 26_993_766
    groups = model.parameter_groups()
    assert sorted(n for g in groups for n in g) == sorted(n for n, _ in model.named_parameters())


def test_new_model_starts_as_documented():
    """Orthogonal projections, zero residual outputs, small embeddings, and gains and gates at their start values."""
    cfg = tiny_config(qk_gain_init=1.25)
    w = weights_of(train_gpt.new_model(cfg, HERE))
    for name in (
        "blocks.0.q",
        "blocks.3.k",
        "blocks.1.v",
        "blocks.2.mlp_in",
        "embed.bigram_proj",
        "ve_proj",
    ):
        short = w[name] if w[name].size(0) <= w[name].size(1) else w[name].T
        torch.testing.assert_close(short @ short.T, torch.eye(len(short)), atol=1e-5, rtol=0)
    zero = ("attn_out", "mlp_out", "mix_x0", "embed.bigrams", "embed.smear", "vrl_scales")
    one = ("mix_x", "attn_scale", "mlp_scale", "skip_weights", "ve_layer_scales")
    assert all(not p.any() for n, p in w.items() if n.endswith(zero))
    assert all((p == 1).all() for n, p in w.items() if n.endswith(one))
    assert all((p == 1.25).all() for n, p in w.items() if n.endswith("q_gain"))
    assert w["embed.tokens"].std() == pytest.approx(0.005, rel=0.1)
    assert w["embed.bigram_scale"] == torch.tensor(0.05) and w["ve_scale"] == torch.tensor(0.1)
    assert not same(
        w, weights_of(train_gpt.new_model(tiny_config(qk_gain_init=1.25, seed=2), HERE))
    )


@pytest.mark.parametrize("position", [0, 1, 9, 30, 31])
def test_model_is_causal(position):
    """Another token at a position changes that row's logits and a later one's, and no bit of any earlier row's."""
    model, tokens = warm_model(tiny_config()), random_tokens(2, 32)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :position], after[:, :position])
    assert all((before[:, row] != after[:, row]).any() for row in range(position, 32))


@pytest.mark.parametrize("known", [2, 3, 8, 24, 31])
def test_forward_over_past_rows_equals_one_pass(known):
    """The newest rows over cached keys and values get the logits, keys and values of the one-pass forward."""
    model, tokens = warm_model(tiny_config()), random_tokens(3, 32)
    with torch.no_grad():
        logits, present = model(tokens)
        _, past = model(tokens[:, :known])
        tile, extended = model(tokens[:, known - train_gpt.EMBED_CONTEXT :], past)
    torch.testing.assert_close(tile, logits[:, known:], atol=2e-6, rtol=1e-5)
    for whole, joined in zip(present, extended):
        torch.testing.assert_close(joined, whole, atol=2e-6, rtol=1e-5)


def test_past_may_grow_tile_by_tile():
    """Keys and values returned by one tile serve as the past of the next."""
    model, tokens = warm_model(tiny_config()), random_tokens(1, 32)
    with torch.no_grad():
        logits, _ = model(tokens)
        _, past = model(tokens[:, :8])
        for start in (8, 16, 24):
            tile, past = model(tokens[:, start - train_gpt.EMBED_CONTEXT : start + 8], past)
            torch.testing.assert_close(tile, logits[:, start : start + 8], atol=2e-6, rtol=1e-5)


def test_attention_shares_key_heads_in_groups():
    """attention is causal softmax attention with grouped heads, also for the last rows alone."""
    q, k, v = (torch.randn(1, 12, heads, 8) for heads in (6, 2, 2))
    naive = naive_attention(*(z[0].double().numpy() for z in (q, k, v)))
    np.testing.assert_allclose(train_gpt.attention(q, k, v)[0].numpy(), naive, atol=1e-5)
    np.testing.assert_allclose(train_gpt.attention(q[:, 7:], k, v)[0].numpy(), naive[7:], atol=1e-5)


def test_exclude_self_takes_out_the_own_value():
    """What XSA leaves is orthogonal to the position's value and otherwise untouched."""
    y, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    out = train_gpt.exclude_self(y, v)
    np.testing.assert_allclose(
        out[0].numpy(), naive_exclude_self(y[0].numpy(), v[0].numpy()), atol=1e-6
    )
    own = v.repeat_interleave(2, dim=2)
    torch.testing.assert_close((out * own).sum(-1), torch.zeros(1, 6, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "train_seq_len, base", [(512, 10_000.0), (1024, 10_000.0), (2048, 10_000.0 * 2 ** (16 / 14))]
)
def test_rotary_turns_half_split_pairs(train_seq_len, base):
    """The first 16 of 24 dimensions turn as pairs (j, j + 8), by the position times the scaled frequencies."""
    turns, x = train_gpt.rotary_turns(16, train_seq_len, 64), torch.randn(1, 20, 2, 24)
    naive = [
        [naive_rotate(head, 5 + t, 16, base) for head in row]
        for t, row in enumerate(x[0].double().numpy())
    ]
    out = train_gpt.rotate(x, turns[:, 5:25])
    np.testing.assert_allclose(out[0].numpy(), np.array(naive), atol=2e-6)
    assert torch.equal(out[..., 16:], x[..., 16:])


def test_bigram_rows_are_the_hash_of_two_tokens():
    """Buckets equal the formula in Python's integers for the default vocabulary; the last row is position 0's."""
    cfg = tiny_config(vocab_size=1024, bigram_vocab_size=2048)
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 1024, (3, 200)))
    rows = train_gpt.Embedding(cfg).bigram_rows(tokens)
    assert rows.tolist() == [naive_buckets(row, 2048) for row in tokens.tolist()]
    assert (rows[:, 0] == 2047).all() and (rows[:, 1:] < 2047).all()


def test_smear_gate_mixes_in_the_row_before():
    """With distinct gates the embedding is the smear of the unsmeared one; the first row has zeros before it."""
    embed, tokens = warm_model(tiny_config()).embed, random_tokens(1, 9)
    with torch.no_grad():
        smear = embed.smear.uniform_(-2, 2).double().numpy()
        smeared = embed(tokens, torch.float32)[0].numpy()
        embed.smear.fill_(-1e4)
        plain = embed(tokens, torch.float32)[0].double().numpy()
    np.testing.assert_allclose(smeared, naive_smear(plain, smear), atol=1e-6)


def test_mlp_is_the_square_of_a_leaky_relu():
    """A block without attention adds mlp_scale * (LeakyReLU of slope 0.5, squared) to its input."""
    block, x = warm_model(tiny_config()).blocks[2], torch.randn(1, 5, 32)
    turns = train_gpt.rotary_turns(8, 32, 32)[:, :5]
    with torch.no_grad():
        block.attn_out.zero_()
        out, _, _ = block(x, torch.zeros_like(x), 0, turns, None)
    w = {n: p.detach().double().numpy() for n, p in block.named_parameters()}
    mixed = w["mix_x"] * x[0].double().numpy()
    added = naive_mlp(naive_rms(mixed) / math.sqrt(3), w["mlp_in"], w["mlp_out"])
    np.testing.assert_allclose(out[0].numpy(), mixed + w["mlp_scale"] * added, atol=1e-5)


def silent_model(cfg):
    """A warm model whose blocks add nothing and whose skips are off: every block sees x0."""
    model = GPT(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("attn_out", "mlp_out", "mix_x", "mix_x0")):
                p.add_(torch.randn_like(p) * 0.1)
        model.skip_weights.zero_()
    return model


def test_queries_keys_and_values_of_a_layer(monkeypatch):
    """What attention is given: gained rotated queries, rotated keys, values with value embedding and residual."""
    seen, attention = [], train_gpt.attention

    def attend(q, k, v):
        seen.append((q[0].numpy(), k[0].numpy(), v[0].numpy()))
        return attention(q, k, v)

    monkeypatch.setattr(train_gpt, "attention", attend)
    cfg = tiny_config()
    model, tokens = silent_model(cfg), random_tokens(1, 10)
    with torch.no_grad():
        model(tokens)
    w = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    h = naive_rms(naive_embedding(w, tokens[0].tolist()))
    ve = w["ve_scale"] * w["ve_table"][tokens[0].numpy()] @ w["ve_proj"].T
    v0 = h @ w["blocks.0.v"].T
    for i, (q, k, v) in enumerate(seen):
        own_q, own_k = (
            (h @ w[f"blocks.{i}.{n}"].T).reshape(10, -1, 16) for n in "qk"
        )  # the norm undoes 1/sqrt(i+1)
        rotated = [
            [naive_rotate(head, t, 8, 10_000.0) for head in row]
            for t, row in enumerate(naive_rms(own_q))
        ]
        np.testing.assert_allclose(
            q, np.array(rotated) * w[f"blocks.{i}.q_gain"][:, None], atol=1e-4
        )
        rotated = [
            [naive_rotate(head, t, 8, 10_000.0) for head in row]
            for t, row in enumerate(naive_rms(own_k))
        ]
        np.testing.assert_allclose(k, np.array(rotated), atol=1e-4)
        value = h @ w[f"blocks.{i}.v"].T / math.sqrt(i + 1)
        value += w["vrl_scales"][i - 1] * v0 if i else 0
        value += w["ve_layer_scales"][i - 2] * ve if i >= 2 else 0
        np.testing.assert_allclose(v[:, 0], value, atol=1e-5)


def test_skips_join_the_two_halves_last_in_first_out():
    """Blocks that only multiply by m_i show which output joins where: x2 gets block 1's, x3 gets block 0's."""
    model, tokens = silent_model(tiny_config(logit_softcap=1e6)), random_tokens(1, 6)
    with torch.no_grad():
        m = torch.stack([block.mix_x.uniform_(0.5, 2) for block in model.blocks])
        w = model.skip_weights.uniform_(0.5, 2)
        x = model.embed(tokens, torch.float32)
        y = m[0] * x, m[1] * m[0] * x
        x = m[3] * (m[2] * (y[1] + w[0] * y[1]) + w[1] * y[0])
        expected = x * x.square().mean(-1, keepdim=True).rsqrt() @ model.embed.tokens.T
        torch.testing.assert_close(model(tokens)[0], expected, atol=1e-5, rtol=1e-4)


def test_softcap_bounds_the_logits():
    """cap * tanh(z / cap), with z read off a model whose cap is far away."""
    tokens, logits = random_tokens(1, 12), {}
    for cap in (1e6, 0.5):
        with torch.no_grad():
            logits[cap] = warm_model(tiny_config(logit_softcap=cap))(tokens)[0].double()
    torch.testing.assert_close(logits[0.5], 0.5 * torch.tanh(logits[1e6] / 0.5), atol=1e-5, rtol=0)
    assert logits[1e6].abs().max() > 0.6 > 0.5 >= logits[0.5].abs().max()


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


def test_stream_is_sequential_and_cyclic(tmp_path):
    """Shards follow one another in order, compressed ones and a plain twin included, and start over at the end."""
    shards = [tiny_stream(50, 1), tiny_stream(31, 2), tiny_stream(40, 3)]
    write_shards(tmp_path, shards, compressed={1})
    (tmp_path / "fineweb_train_000002.bin.zst").write_bytes(b"a twin that nobody reads")
    stream = TrainStream(tiny_config(data_path=str(tmp_path)))
    endless = np.concatenate(shards * 4)
    for start in range(0, 400, 16):
        np.testing.assert_array_equal(stream.take(16), endless[start : start + 17])
    assert (stream.opened - 1) // len(stream.files) == 3


def test_one_shard_may_be_shorter_than_a_step(tmp_path):
    """A step longer than all the text reads it several times over."""
    write_shards(tmp_path, [np.arange(10)])
    stream = TrainStream(tiny_config(data_path=str(tmp_path)))
    assert [t.tolist() for t in (stream.take(24), stream.take(3))] == [
        [i % 10 for i in range(25)],
        [i % 10 for i in range(24, 28)],
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step(world):
    """The ranks' sequences, in order, are the step's; targets are inputs moved by one; micro-batches are capped."""
    cfg = tiny_config(train_batch_tokens=12 * 32, micro_batch_tokens=5 * 32)
    tokens = np.arange(12 * 32 + 1)
    shares = [
        train_gpt.micro_batches(tokens, cfg, Runtime(rank=r, world=world)) for r in range(world)
    ]
    x, y = (torch.cat([batch[side] for share in shares for batch in share]) for side in (0, 1))
    assert torch.equal(x, torch.arange(12 * 32).view(12, 32)) and torch.equal(y, x + 1)
    sizes = [len(batch[0]) for share in shares for batch in share]
    assert set(sizes) == {{1: 4, 2: 3, 4: 3}[world]}


@pytest.mark.parametrize("world", [3, 8])
def test_ranks_that_cannot_share_a_step_evenly(world):
    """Four sequences for three or eight ranks: the setting to change is named."""
    with pytest.raises(train_gpt.UsageError, match="TRAIN_BATCH_TOKENS=128"):
        train_gpt.micro_batch_sequences(tiny_config(), world)


# ----------------------------------------------------------------------------------------------------------
# Complementary objective
# ----------------------------------------------------------------------------------------------------------


def naive_weights(pairs, x, y, alpha):
    """max(0.1, 1 - alpha * count(x, y) / (total(x) + 1)) from a Counter of the pairs so far."""
    total = Counter()
    for (first, _), count in pairs.items():
        total[first] += count
    return torch.tensor(
        [
            [max(0.1, 1 - alpha * pairs[a, b] / (total[a] + 1)) for a, b in zip(*row)]
            for row in zip(x.tolist(), y.tolist())
        ]
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_complementary_weights_equal_a_plain_count(data, alpha):
    """Over several steps, the weights are those of a dictionary of all earlier pairs."""
    cfg, pairs = tiny_config(data_path=str(data)), Counter()
    stream, counts = TrainStream(cfg), BigramCounts(VOCAB, HERE)
    for _ in range(6):
        batches = train_gpt.micro_batches(stream.take(128), cfg, HERE)
        for x, y in batches:
            torch.testing.assert_close(
                counts.weights(x, y, alpha), naive_weights(pairs, x, y, alpha)
            )
        counts.add(batches)
        for x, y in batches:
            pairs.update(zip(x.flatten().tolist(), y.flatten().tolist()))
    table = counts.counts.view(VOCAB, VOCAB)
    assert {(a, b): int(table[a, b]) for a, b in table.nonzero().tolist()} == dict(pairs)


def test_complementary_weight_has_a_floor():
    """A pair that is nearly certain keeps a weight of 0.1; an unseen one keeps 1."""
    counts, x = BigramCounts(VOCAB, HERE), torch.full((1, 500), 7)
    counts.add([(x, x + 1)])
    assert torch.equal(
        counts.weights(x[:, :2], torch.tensor([[8, 9]]), 1.0), torch.tensor([[0.1, 1.0]])
    )
    assert counts.weights(x[:, :1], x[:, :1] + 1, 0.5).item() == pytest.approx(1 - 0.5 * 500 / 501)


def test_a_step_is_weighted_by_the_steps_before_it(data):
    """The loss of a step uses the counts of earlier steps alone, and its gradient is that of mean(w * CE)."""
    cfg = tiny_config(data_path=str(data), complement_alpha=1.0, micro_batch_tokens=128)
    trainer, stream, pairs = Trainer(warm_model(cfg), cfg, HERE), TrainStream(cfg), Counter()
    for step in range(3):
        batches = train_gpt.micro_batches(stream.take(128), cfg, HERE)
        ((x, y),) = batches
        twin = copy.deepcopy(trainer.model)
        nats = F.cross_entropy(twin(x)[0].flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        expected = (naive_weights(pairs, x, y, 1.0) * nats).mean()
        expected.backward()
        assert trainer.gradients(batches) == pytest.approx(
            [expected.item(), nats.mean().item()], rel=1e-6
        )
        for p, q in zip(trainer.model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-4)
        trainer.model.zero_grad()
        trainer.step(batches, step, 1.0)
        pairs.update(zip(x.flatten().tolist(), y.flatten().tolist()))
    assert expected < 0.99 * nats.mean()


def test_alpha_zero_is_the_plain_loss(data):
    """COMPLEMENT_ALPHA=0 trains on the mean cross-entropy, however much text has been counted."""
    cfg = tiny_config(data_path=str(data), complement_alpha=0.0, micro_batch_tokens=128)
    trainer, stream = Trainer(warm_model(cfg), cfg, HERE), TrainStream(cfg)
    for step in range(2):
        trainer.step(train_gpt.micro_batches(stream.take(128), cfg, HERE), step, 1.0)
    ((x, y),) = batches = train_gpt.micro_batches(stream.take(128), cfg, HERE)
    plain = F.cross_entropy(trainer.model(x)[0].flatten(0, 1), y.flatten()).item()
    assert trainer.gradients(batches) == pytest.approx([plain, plain], rel=1e-6)


# ----------------------------------------------------------------------------------------------------------
# Optimizers, schedules, averaging
# ----------------------------------------------------------------------------------------------------------


def test_each_parameter_has_its_optimizer():
    """Muon has the matrices, AdamW tables and vectors, each with its own rate; a step scales all rates alike."""
    cfg = tiny_config(matrix_lr=0.01, tied_embed_lr=0.02, scalar_lr=0.03, muon_wd=0.4, adam_wd=0.5)
    trainer = Trainer(warm_model(cfg), cfg, HERE)
    trainer.step(train_gpt.micro_batches(random_tokens(129).numpy(), cfg, HERE), 375, 0.25)
    muon, adam = trainer.optimizers
    matrices = ("attn_out", "mlp_in", "mlp_out", "_proj", ".q", ".k", ".v")
    groups = {id(p): g for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    for name, p in trainer.model.named_parameters():
        lr = 0.02 if name in ("embed.tokens", "embed.bigrams", "ve_table") else 0.03
        lr = 0.01 if name.endswith(matrices) else lr
        group = groups.pop(id(p))
        assert group["lr"] == lr * 0.25 and group["weight_decay"] == (0.4 if lr == 0.01 else 0.5)
    assert not groups and isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["betas"] == (0.9, 0.95) and adam.defaults["eps"] == 1e-8
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.92 + 0.07 / 4)


def test_learning_rate_falls_with_the_iterations():
    """1 until WARMDOWN_ITERS before the end, then linear to 0."""
    cfg = tiny_config(iterations=100, warmdown_iters=20)
    scales = [train_gpt.lr_scale(step, 3.0 * step, cfg) for step in (0, 50, 80, 85, 90, 99, 100)]
    assert scales == pytest.approx([1, 1, 1, 0.75, 0.5, 0.05, 0])
    no_warmdown = tiny_config(iterations=100, warmdown_iters=0)
    assert [train_gpt.lr_scale(step, 1.0, no_warmdown) for step in (0, 50, 99)] == [1, 1, 1]


def test_learning_rate_falls_with_the_clock():
    """The steps left are the seconds left over the mean step time, unless the iterations end sooner."""
    cfg = tiny_config(iterations=10_000, warmdown_iters=400, max_wallclock_seconds=600.0)
    cases = {
        (0, 0.0): 1,
        (1000, 300.0): 1,
        (1000, 500.0): 0.5,
        (2000, 590.0): 10 / 0.295 / 400,
        (1000, 600.0): 0,
        (1000, 700.0): 0,
        (9900, 100.0): 0.25,
    }
    for (step, seconds), scale in cases.items():
        assert train_gpt.lr_scale(step, seconds, cfg) == pytest.approx(scale)


def test_momentum_rises_linearly():
    """0.92 at the start, MUON_MOMENTUM after the warm-up; a MUON_MOMENTUM below 0.92 holds from the start."""
    cfg = tiny_config(muon_momentum=0.99, muon_momentum_warmup_steps=1500)
    assert [train_gpt.muon_momentum(s, cfg) for s in (0, 300, 750, 1500, 9000)] == pytest.approx(
        [0.92, 0.934, 0.955, 0.99, 0.99]
    )
    assert train_gpt.muon_momentum(700, tiny_config(muon_momentum=0.9)) == pytest.approx(0.9)


def averaged(values, scales=None, **settings):
    """The weight that WeightAverage installs after it saw one weight take each of `values`, from 0."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    average = WeightAverage(model, tiny_config(**settings))
    for step, value in enumerate(values, 1):
        model.weight.data.fill_(value)
        average.after_step(step, scales[step - 1] if scales else 1.0)
    average.install()
    return model.weight.item()


def test_ema_by_hand():
    """EMA_DECAY caps the decay, which is step / (step + 10) before: 1/11, 2/12, 3/13, ..."""
    one, two = 10 / 11 * 5, 1 / 6 * (10 / 11 * 5) + 5 / 6 * 8
    assert averaged([5], ema_decay=0.997) == pytest.approx(one)
    assert averaged([5, 8], ema_decay=0.997) == pytest.approx(two)
    assert averaged([5, 8], ema_decay=0.125) == pytest.approx(0.125 * one + 0.875 * 8)
    assert averaged([5, 8], ema_decay=0.0) == 8


def test_swa_by_hand():
    """SWA is the mean of every SWA_EVERY-th step's weights below scale 0.2, and nothing before the first."""
    values, scales = [1, 2, 4, 8, 16, 32, 64], [1.0, 0.3, 0.2, 0.19, 0.1, 0.05, 0.01]
    settings = dict(swa_enabled=True, swa_every=2, ema_decay=0.9)
    assert averaged(values, scales, **settings) == pytest.approx((8 + 32) / 2)
    assert averaged(values[:3], scales[:3], **settings) == 4


# ----------------------------------------------------------------------------------------------------------
# Quantization-aware training
# ----------------------------------------------------------------------------------------------------------


def test_quantized_weights_are_the_artifacts():
    """Inside, the weights are decode(encode(w)), which is what an artifact returns; afterwards they are exact."""
    cfg = tiny_config()
    model = warm_model(cfg)
    exact = weights_of(model)
    stored = unpacked(train_gpt.pack_artifact(model, cfg, tiny_table(), 12.0))[2]
    with train_gpt.quantized_weights(model, 12.0):
        inside = weights_of(model)
    assert torch.equal(stored.pop("mixer"), model.mixer.half().float())
    assert same(inside, stored) and same(weights_of(model), exact)
    assert same(
        inside,
        {
            n: train_gpt.decode_tensor(*train_gpt.encode_tensor(n, w, 12.0))
            for n, w in exact.items()
        },
    )
    assert all(not torch.equal(inside[n], exact[n]) for n in exact)


def test_quantized_weights_come_back_after_an_error():
    """An exception inside leaves exact weights behind; coarseness None changes nothing at all."""
    model = warm_model(tiny_config())
    exact = weights_of(model)
    with pytest.raises(KeyboardInterrupt), train_gpt.quantized_weights(model, 4.0):
        raise KeyboardInterrupt
    assert same(weights_of(model), exact)
    with train_gpt.quantized_weights(model, None):
        assert same(weights_of(model), exact)


def plain_descent(trainer):
    """Give a trainer one SGD of rate 1 for all weights, so that a step shows the gradient it was given."""
    trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), lr=1.0)]
    trainer.optimizers[0].param_groups[0]["peak_lr"] = 1.0


def test_late_qat_moves_exact_weights_by_the_gradient_at_the_quantized_ones():
    """The straight-through estimator: quantized weights make the gradient, exact weights take it."""
    cfg = tiny_config(grad_clip_norm=0.0)
    batches = train_gpt.micro_batches(random_tokens(129).numpy(), cfg, HERE)
    trainer, quantized = Trainer(warm_model(cfg), cfg, HERE), Trainer(warm_model(cfg), cfg, HERE)
    with torch.no_grad():
        for name, p in quantized.model.named_parameters():
            p.copy_(train_gpt.decode_tensor(*train_gpt.encode_tensor(name, p, 16.0)))
    exact, trainer.coarseness = weights_of(trainer.model), 16.0
    assert trainer.gradients(batches) == quantized.gradients(batches)
    expected = gradients_of(quantized.model)
    assert same(gradients_of(trainer.model), expected) and same(weights_of(trainer.model), exact)
    trainer.model.zero_grad()
    plain_descent(trainer)
    trainer.step(batches, 0, 1.0)
    assert same(weights_of(trainer.model), {n: w - expected[n] for n, w in exact.items()})


def test_late_qat_starts_below_its_threshold(data, monkeypatch):
    """With factors 1, 1, 1, 1, 2/3, 1/3 and a threshold of 1/2, the last of six steps trains quantized."""
    used, original = [], train_gpt.quantized_weights

    def spy(model, coarseness):
        used.append(coarseness)
        return original(model, coarseness)

    monkeypatch.setattr(train_gpt, "quantized_weights", spy)
    lines = trained(data, qat_enabled=True, late_qat_threshold=0.5, budget=20_000)[2]
    assert used[:5] == [None] * 5 and used[5] > train_gpt.FINEST
    assert [line.split(" on at")[0] for line in lines if "QAT" in line] == ["late QAT from step 6"]


# ----------------------------------------------------------------------------------------------------------
# Training loop
# ----------------------------------------------------------------------------------------------------------


def trained(data, budget=100_000, **settings):
    """(model, result, log lines) of a tiny training run."""
    cfg, lines = tiny_config(data_path=str(data), **settings), []
    model = train_gpt.new_model(cfg, HERE)
    return model, train_gpt.train(model, cfg, HERE, lines.append, budget), lines


def test_training_learns_a_repetitive_stream(tmp_path):
    """Thirty steps on a phrase said over and over take most of the loss away."""
    phrase = np.random.default_rng(5).permutation(np.arange(6, 30))
    write_shards(tmp_path, [np.tile(phrase, 20)])
    model, result, lines = trained(tmp_path, iterations=30, warmdown_iters=10)
    x, y = (
        torch.from_numpy(np.tile(phrase, 2)[None, :32]),
        torch.from_numpy(np.tile(phrase, 2)[None, 1:33]),
    )
    with torch.no_grad():
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
    assert loss < 0.6 * math.log(VOCAB)
    assert (result.steps, result.tokens) == (30, 30 * 128) and result.seconds > 0
    assert lines[0].startswith("step 1/30  loss 4.1") and lines[-1].startswith(
        "note: the training shards were read 8"
    )


def test_same_seed_gives_the_same_artifact(data):
    """Two runs of a seed pack to the same bytes; another seed ends at other weights."""
    artifacts = []
    for seed in (5, 5, 6):
        model, _, _ = trained(data, seed=seed, iterations=4)
        artifacts.append(train_gpt.pack_artifact(model, tiny_config(seed=seed), tiny_table(), 8.0))
    assert artifacts[0] == artifacts[1]
    first, other = (unpacked(a)[2] for a in artifacts[1:])
    assert not same(first, other) and not torch.equal(first["embed.tokens"], other["embed.tokens"])


def test_warm_up_leaves_no_trace(data):
    """Compilation steps on random tokens change neither the weights nor the counts nor the optimizers."""
    plain, _, _ = trained(data, iterations=4)
    warmed, result, _ = trained(data, iterations=4, warmup_steps=3)
    assert same(weights_of(plain), weights_of(warmed))
    assert result.steps == 4 and result.warmup_seconds > 0


def test_the_clock_ends_training(data):
    """Training stops after the first step that ends beyond MAX_WALLCLOCK_SECONDS."""
    assert trained(data, max_wallclock_seconds=1e-9)[1].steps == 1


@pytest.mark.parametrize("clip", [0.3, 0.0, 1e9])
def test_gradient_is_clipped_by_its_global_norm(clip):
    """A step moves by the gradient, shortened to GRAD_CLIP_NORM if it is longer; 0 turns this off."""
    cfg = tiny_config(grad_clip_norm=clip)
    trainer = Trainer(warm_model(cfg), cfg, HERE)
    batches = train_gpt.micro_batches(random_tokens(129).numpy(), cfg, HERE)
    trainer.gradients(batches)
    gradients, before = gradients_of(trainer.model), weights_of(trainer.model)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    trainer.model.zero_grad()
    plain_descent(trainer)
    trainer.step(batches, 0, 1.0)
    assert norm > 0.6
    for name, p in trainer.model.named_parameters():
        moved = gradients[name] * (min(1.0, clip / norm) if clip else 1.0)
        torch.testing.assert_close(before[name] - p, moved, atol=1e-6, rtol=1e-3)


def completed_steps(data, steps):
    """The averaged weights after so many undisturbed steps."""
    cfg = tiny_config(data_path=str(data))
    trainer, stream = Trainer(train_gpt.new_model(cfg, HERE), cfg, HERE), TrainStream(cfg)
    for step in range(steps):
        trainer.step(
            train_gpt.micro_batches(stream.take(128), cfg, HERE),
            step,
            train_gpt.lr_scale(step, 0, cfg),
        )
    trainer.average.install()
    return weights_of(trainer.model)


def spoil_loss(trainer, losses):
    """The loss is NaN and its gradient is not."""
    weighted, plain = losses
    return weighted, plain * math.nan


def spoil_gradient(trainer, losses):
    """The loss is finite and its gradient is not."""
    weighted, plain = losses
    return weighted + (0 * trainer.model.skip_weights.sum()).sqrt(), plain


def interrupt(*args):
    """Ctrl-C."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_loss, "step 3: loss nan"),
        (spoil_gradient, "step 3: .*gradient norm nan"),
        (interrupt, "interrupted at step 2"),
    ],
)
@pytest.mark.parametrize("qat", [False, True])
def test_a_stop_keeps_the_last_good_weights(data, monkeypatch, spoil, message, qat):
    """NaN or Ctrl-C in step 3's second micro-batch: the message names the step, two steps' weights remain."""
    expected = completed_steps(data, 2)
    calls, original = itertools.count(1), Trainer._loss

    def loss(trainer, x, y, weights):
        losses = original(trainer, x, y, weights)
        return spoil(trainer, losses) if next(calls) == 6 else losses

    monkeypatch.setattr(Trainer, "_loss", loss)
    cfg = tiny_config(data_path=str(data), qat_enabled=qat)
    model = train_gpt.new_model(cfg, HERE)
    if qat:  # from step 3 on
        monkeypatch.setattr(train_gpt, "lr_scale", lambda step, *_: 0.1 if step == 2 else 1.0)
    with pytest.raises(TrainingStopped, match=message):
        train_gpt.train(model, cfg, HERE, lambda line: None, 100_000)
    assert same(weights_of(model), expected)
    assert all(p.isfinite().all() for p in model.parameters())


def test_ctrl_c_between_two_optimizers(data, monkeypatch):
    """Half of step 3's weights have moved: what remains is the average of the two steps before."""
    expected = completed_steps(data, 2)
    calls, original = itertools.count(1), torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: interrupt() if next(calls) == 3 else original(self)
    )
    cfg = tiny_config(data_path=str(data))
    model = train_gpt.new_model(cfg, HERE)
    with pytest.raises(TrainingStopped, match="interrupted at step 2"):
        train_gpt.train(model, cfg, HERE, lambda line: None, 100_000)
    assert same(weights_of(model), expected)


# ----------------------------------------------------------------------------------------------------------
# One rank and two
# ----------------------------------------------------------------------------------------------------------


def rank_report(rt, folder):
    """What a rank sees: the gradients of a step, then four steps, then a NaN on the last rank alone."""
    cfg = tiny_config(data_path=folder)
    trainer, stream = Trainer(warm_model(cfg), cfg, rt), TrainStream(cfg)
    batches = train_gpt.micro_batches(stream.take(128), cfg, rt)
    losses = [trainer.gradients(batches)]
    gradients = gradients_of(trainer.model)
    trainer.model.zero_grad()
    for step in range(4):
        losses.append(trainer.step(batches, step, 1.0))
        batches = train_gpt.micro_batches(stream.take(128), cfg, rt)
    report = dict(
        losses=losses,
        gradients=gradients,
        weights=weights_of(trainer.model),
        average=[m.clone() for m in trainer.average.mean],
        counts=trainer.bigrams.counts.clone(),
        totals=trainer.bigrams.totals.clone(),
        x=torch.cat([x for x, _ in batches]),
    )
    if rt.rank == rt.world - 1:
        original = trainer.loss
        trainer.loss = lambda x, y, weights: tuple(
            math.nan * loss for loss in original(x, y, weights)
        )
    try:
        trainer.step(batches, 4, 1.0)
    except TrainingStopped as stop:
        report["stop"] = str(stop)
    return {**report, "weights_after_stop": weights_of(trainer.model)}


REPORTS = []


@pytest.fixture
def reports(run_ranks, data):
    """rank_report of one rank, then of each of two; they are started once for all tests here."""
    if not REPORTS:
        REPORTS.extend([rank_report(HERE, str(data)), *run_ranks(2, rank_report, str(data))])
    return REPORTS


def test_counts_do_not_depend_on_the_ranks(reports):
    """One rank and each of two have counted the very same pairs."""
    alone, *pair = reports
    assert alone["counts"].sum() == alone["totals"].sum() == 4 * 128
    assert all(torch.equal(alone[n], rank[n]) for rank in pair for n in ("counts", "totals"))


def test_gradients_do_not_depend_on_the_ranks(reports):
    """The gradient over two ranks is the gradient of one, up to rounding, and so are both losses."""
    alone, *pair = reports
    for rank in pair:
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
        assert sum(rank["losses"], []) == pytest.approx(sum(alone["losses"], []), rel=1e-3)
    assert torch.equal(alone["x"], torch.cat([rank["x"] for rank in pair]))


def test_steps_do_not_depend_on_the_ranks(reports):
    """Two ranks hold the same bits, and go where one rank goes up to Muon's bf16."""
    alone, first, second = reports
    assert same(first["weights"], second["weights"]) and all(
        map(torch.equal, first["average"], second["average"])
    )
    start = weights_of(warm_model(tiny_config()))
    for name, weight in alone["weights"].items():
        assert (first["weights"][name] - weight).norm() < 0.01 * (weight - start[name]).norm(), name


def test_nan_on_one_rank_stops_them_all(reports):
    """Every rank learns of it in the same step, before any of their weights moves."""
    assert [r["stop"].split(",")[0] for r in reports] == ["step 5: loss nan"] * 3
    assert all(same(r["weights"], r["weights_after_stop"]) for r in reports)
