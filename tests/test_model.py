"""The model against its second writing, as a whole and mechanism by mechanism."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    VOCAB,
    lone_attention,
    random_tokens,
    same,
    tiny_config,
    warm_model,
    weights_of,
)
from naive import (
    naive_attention,
    naive_buckets,
    naive_embedding,
    naive_exclude_self,
    naive_logits,
    naive_mlp,
    naive_rms,
    naive_rotate,
    naive_smear,
)

import train_gpt
from train_gpt import EMBED_CONTEXT, GPT, Cache, Runtime, causal_bias

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed():
    """Tests that draw random numbers draw the same ones in any order of tests."""
    torch.manual_seed(0)


# ---- The whole model -----------------------------------------------------------------------------


def grouped_config(**changes):
    """Five layers, four heads in two groups, half of each head rotated, a base for 2,048 tokens."""
    settings = dict(
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        rope_dims=4,
        ve_layers="1,3,4",
        logit_softcap=1.0,
        train_seq_len=2048,
        train_batch_tokens=2048,
        micro_batch_tokens=2048,
    )
    return tiny_config(**{**settings, **changes})


MECHANISMS = [
    {},
    dict(num_layers=4, ve_layers="", vrl_enabled=False, xsa_last_n=0),
    dict(train_seq_len=32, num_heads=2, num_kv_heads=1, ve_layers="0", xsa_last_n=5),
]
PRECISION = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("changes", MECHANISMS)
def test_forward_matches_the_formulas(changes, dtype):
    """The whole model agrees with its second writing, in every combination of mechanisms."""
    cfg = grouped_config(**changes)
    model, tokens = warm_model(cfg, dtype=dtype), random_tokens(2, 24)
    with torch.no_grad():
        logits = model(tokens)
    assert logits.dtype == dtype
    expected = np.stack([naive_logits(model, cfg, row) for row in tokens.tolist()])
    np.testing.assert_allclose(logits.numpy(), expected, atol=PRECISION[dtype])


def test_logits_of_a_bfloat16_model_are_float32():
    """The softcap and all that follows have at least single precision."""
    model = warm_model(tiny_config(), dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(random_tokens(1, 8)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, *PRECISION])
def test_cast_weights_change_no_bit(dtype):
    """Weights that were cast once give the very logits of weights that are cast in the pass."""
    model, tokens = warm_model(grouped_config(), dtype=dtype), random_tokens(2, 24)
    with torch.no_grad():
        assert torch.equal(model(tokens, model.cast()), model(tokens))


@pytest.mark.parametrize("unwanted", [0, 19, 23, 24, 30])
def test_unwanted_rows_have_no_logits(unwanted):
    """The last rows' logits are those of a pass that returns all."""
    model, tokens = warm_model(tiny_config(), dtype=torch.float64), random_tokens(2, 24)
    with torch.no_grad():
        logits, last = model(tokens), model(tokens, unwanted=unwanted)
    assert last.shape == (2, max(0, 24 - unwanted), VOCAB)
    torch.testing.assert_close(last, logits[:, unwanted:], atol=1e-13, rtol=0)


def test_default_model_has_the_documented_number_of_parameters():
    """26,993,766 parameters, as the script and the README say."""
    with torch.device("meta"):
        model = GPT(train_gpt.Config())
    assert sum(p.numel() for p in model.parameters()) == 26_993_766


@pytest.mark.parametrize("position", [0, 1, 9, 30, 31])
def test_model_is_causal(position):
    """Another token changes the logits of its row and of each later one, no bit of earlier rows."""
    model, tokens = warm_model(tiny_config()), random_tokens(2, 32)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).any(0).all()


# ---- Rows that are appended ----------------------------------------------------------------------


def appended(model, tokens, cuts, reach, pass_rows=None):
    """Return the logits (B, T, V) of tokens that go through a Cache in passes of these sizes."""
    cache = Cache(model, len(tokens), reach, pass_rows or max(cuts))
    weights = model.cast()
    logits = []
    with torch.no_grad():
        for rows in cuts:
            lead = min(EMBED_CONTEXT, cache.rows)
            new = tokens[:, cache.rows - lead : cache.rows + rows]
            logits.append(model(new, weights, cache, lead))
    assert cache.rows == tokens.size(1)
    return torch.cat(logits, 1)


CUTS = {
    "one row at a time": [1] * 40,
    "two, then ones": [2] + [1] * 38,
    "seven at a time": [7] * 5 + [5],
    "odd sizes": [1, 3, 16, 2, 1, 1, 13, 3],
    "one pass": [40],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("reach", [1, 5, 12, 39, 60])
def test_appended_rows_match_a_plain_band(cuts, reach):
    """However they are cut, rows get the logits of the formulas: each sees `reach` rows before."""
    cfg = tiny_config()
    model, tokens = warm_model(cfg, dtype=torch.float64), random_tokens(2, 40)
    logits = appended(model, tokens, cuts, reach)
    expected = np.stack([naive_logits(model, cfg, row, reach) for row in tokens.tolist()])
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-12)


def test_appended_rows_match_one_pass_without_a_cache():
    """A reach beyond the first row is plain causal attention."""
    model, tokens = warm_model(tiny_config(), dtype=torch.float64), random_tokens(3, 40)
    with torch.no_grad():
        logits = model(tokens)
    torch.testing.assert_close(appended(model, tokens, [7] * 5 + [5], 40), logits)


def test_a_cache_keeps_a_long_sequence_in_little_room():
    """Its slots hold twice the reach and a pass, however many rows have gone through it."""
    model, tokens = warm_model(tiny_config(), dtype=torch.float64), random_tokens(1, 200)
    cache = Cache(model, 1, 8, 4)
    assert cache.store.size(4) == 2 * 8 + 4
    roomy = appended(model, tokens, [4] * 50, 8, pass_rows=200)
    torch.testing.assert_close(appended(model, tokens, [4] * 50, 8), roomy, atol=1e-13, rtol=0)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("reach", [1, 5, 12])
def test_a_row_sees_the_rows_within_its_reach_and_no_other(layer, reach):
    """A changed token moves its own row and `reach` rows after it, and no bit of any other."""
    model = lone_attention(tiny_config(), layer)
    tokens = random_tokens(1, 40).expand(40, -1)  # sequence i is changed at position i
    changed = (tokens + torch.eye(40, dtype=torch.int64)) % VOCAB
    before, after = (appended(model, each, [7] * 5 + [5], reach) for each in (tokens, changed))
    back = torch.arange(40) - torch.arange(40)[:, None]
    assert torch.equal((before != after).any(2), (back >= 0) & (back <= reach))


# ---- Initial weights -----------------------------------------------------------------------------


@pytest.fixture
def new_weights():
    """The weights of a new model, {name: tensor}."""
    return weights_of(train_gpt.new_model(tiny_config(qk_gain_init=1.25), Runtime()))


@pytest.mark.parametrize(
    "name",
    ["blocks.0.q", "blocks.3.k", "blocks.1.v", "blocks.2.mlp_in", "embed.bigram_proj", "ve_proj"],
)
def test_new_projections_are_orthogonal(new_weights, name):
    """The shorter side of a new projection is orthonormal."""
    w = new_weights[name]
    short = w if w.size(0) <= w.size(1) else w.T
    torch.testing.assert_close(short @ short.T, torch.eye(len(short)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "value, names",
    [
        (0, ("attn_out", "mlp_out", "mix_x0", "embed.bigrams", "embed.smear", "vrl_scales")),
        (1, ("mix_x", "attn_scale", "mlp_scale", "skip_weights", "ve_layer_scales")),
        (1.25, ("q_gain",)),
        (0.05, ("embed.bigram_scale",)),
        (0.1, ("ve_scale",)),
    ],
)
def test_new_gains_and_gates_have_their_start_values(new_weights, value, names):
    """Residual outputs begin at zero, gains at one, and the settings where they say."""
    for ending in names:
        found = [w for name, w in new_weights.items() if name.endswith(ending)]
        assert found, ending
        for w in found:
            assert torch.equal(w, torch.full_like(w, value)), ending


def test_new_embeddings_are_small(new_weights):
    """The token table begins with a standard deviation of 0.005."""
    assert new_weights["embed.tokens"].std() == pytest.approx(0.005, rel=0.1)


def test_seed_decides_the_new_weights(new_weights):
    """The same seed gives the same weights, another seed others."""
    again, other = (
        weights_of(train_gpt.new_model(tiny_config(qk_gain_init=1.25, **seed), Runtime()))
        for seed in ({}, dict(seed=2))
    )
    assert same(new_weights, again)
    assert not same(new_weights, other)


# ---- Mechanism by mechanism ----------------------------------------------------------------------


def test_attention_shares_key_heads_in_groups():
    """Attention is causal softmax attention with grouped heads, fused or not."""
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (6, 2, 2))
    expected = naive_attention(*(z[0].transpose(0, 1).double().numpy() for z in (q, k, v)))
    for bias in (causal_bias(12, 0, 12, q).repeat(3, 1), None):
        y = train_gpt.attention(q, k, v, bias)[0].transpose(0, 1)
        np.testing.assert_allclose(y.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 4, 11])
@pytest.mark.parametrize("last", [1, 5])
def test_attention_of_the_last_rows_reaches_back(last, reach):
    """The last rows alone, over keys and values that are at hand."""
    q, k, v = (torch.randn(1, heads, 12, 8).double() for heads in (6, 2, 2))
    expected = naive_attention(*(z[0].transpose(0, 1).numpy() for z in (q, k, v)), reach)
    bias = causal_bias(last, 12 - last, reach, q).repeat(3, 1)
    y = train_gpt.attention(q[:, :, -last:], k, v, bias)[0].transpose(0, 1)
    np.testing.assert_allclose(y.numpy(), expected[-last:], atol=1e-13)


def test_bias_is_a_band():
    """Row i of three is key 4 + i; it sees itself and the two keys before."""
    seen = causal_bias(3, 4, 2, torch.zeros(1)) == 0
    assert seen.int().tolist() == [
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]


def test_exclude_self_takes_out_the_own_value():
    """What XSA leaves is orthogonal to the position's value and otherwise untouched."""
    y, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    out = train_gpt.exclude_self(y, v).view(6, 4, 8)
    expected = naive_exclude_self(y.numpy(), v.numpy())
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)
    own = v.repeat_interleave(2, dim=1)
    torch.testing.assert_close((out * own).sum(-1), torch.zeros(6, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "train_seq_len, base", [(512, 10_000.0), (1024, 10_000.0), (2048, 10_000.0 * 2 ** (16 / 14))]
)
def test_rotary_turns_half_split_pairs(train_seq_len, base):
    """The first 16 of 24 dimensions turn as pairs (j, j + 8), by position times frequency."""
    cfg = train_gpt.Config(model_dim=24 * 8, train_seq_len=train_seq_len)
    angle = torch.arange(5, 25)[:, None, None] * train_gpt.rotary_rates(cfg)
    x = torch.randn(20, 2, 24).double()
    out = train_gpt.rotate(x, angle.cos(), angle.sin(), 8)
    expected = naive_rotate(x.numpy(), 5, 16, base)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-13)
    assert torch.equal(out[..., 16:], x[..., 16:])


def test_bigram_rows_are_the_hash_of_two_tokens():
    """Buckets equal the formula in Python's integers for the default vocabulary."""
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 1024, (3, 200)))
    bigrams = torch.zeros(2048, 2)
    bigrams[:, 0] = torch.arange(2048)  # each row names itself, beside a constant
    bigrams[:, 1] = 2048
    weights = torch.zeros(1024, 2), bigrams, torch.zeros(2)
    cfg = tiny_config(vocab_size=1024, bigram_vocab_size=2048)
    out = train_gpt.Embedding(cfg)(tokens, weights)  # of norm root 2
    rows = (2048 * out[..., 0] / out[..., 1]).round().long()
    assert rows.tolist() == [naive_buckets(row, 2048) for row in tokens.tolist()]
    assert (rows[:, 0] == 2047).all()
    assert (rows[:, 1:] < 2047).all()


def test_smear_gate_mixes_in_the_row_before():
    """The embedding is the smear of the unsmeared one; the first row has zeros before it."""
    embed, tokens = warm_model(tiny_config()).embed, random_tokens(1, 9)
    with torch.no_grad():
        smear = embed.smear.uniform_(-2, 2).double().numpy()
        smeared = embed(tokens, embed.cast(torch.float32))[0].numpy()
        embed.smear.fill_(-1e4)
        plain = embed(tokens, embed.cast(torch.float32))[0].double().numpy()
    np.testing.assert_allclose(smeared, naive_smear(plain, smear), atol=1e-6)


def test_mlp_is_the_square_of_a_leaky_relu():
    """A block without attention adds mlp_scale * (LeakyReLU of slope 0.5, squared) to its input."""
    cfg = tiny_config()
    block, x = warm_model(cfg).blocks[2], torch.randn(5, 32)
    with torch.no_grad():
        block.attn_out.zero_()
        still = torch.ones(5, 1, 16), torch.zeros(5, 1, 16), cfg.rope_dims // 2
        rows = 1, still, causal_bias(5, 0, 5, x).repeat(2, 1), None
        out, _ = block(x, torch.zeros_like(x), 0, rows, block.cast(torch.float32))
    w = {n: p.detach().double().numpy() for n, p in block.named_parameters()}
    mixed = w["mix_x"] * x.double().numpy()
    added = naive_mlp(naive_rms(mixed) / math.sqrt(3), w["mlp_in"], w["mlp_out"])
    np.testing.assert_allclose(out.numpy(), mixed + w["mlp_scale"] * added, atol=1e-5)


def silent_model(cfg):
    """A warm model whose blocks add nothing and whose skips are off: every block sees x0."""
    model = GPT(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("attn_out", "mlp_out", "mix_x", "mix_x0")):
                p.add_(torch.randn_like(p) * 0.1)
        model.skip_weights.zero_()
    return model


def test_attention_gets_the_documented_queries_keys_and_values(monkeypatch):
    """Gained rotated queries, rotated keys, values with value embedding and value residual."""
    seen, attention = [], train_gpt.attention

    def attend(q, k, v, bias):
        seen.append([z[0].transpose(0, 1).numpy() for z in (q, k, v)])
        return attention(q, k, v, bias)

    monkeypatch.setattr(train_gpt, "attention", attend)
    cfg = tiny_config()
    model, tokens = silent_model(cfg), random_tokens(1, 10)
    with torch.no_grad():
        model(tokens)
    assert len(seen) == cfg.num_layers
    w = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    h = naive_rms(naive_embedding(w, tokens[0].tolist()))
    ve = w["ve_scale"] * w["ve_table"][tokens[0].numpy()] @ w["ve_proj"].T
    v0 = h @ w["blocks.0.v"].T
    for i, (q, k, v) in enumerate(seen):
        # the norm of queries and keys undoes the scale of 1 / sqrt(i + 1)
        own_q, own_k = ((h @ w[f"blocks.{i}.{n}"].T).reshape(10, -1, 16) for n in "qk")
        turned_q, turned_k = (naive_rotate(naive_rms(z), 0, 8, 10_000.0) for z in (own_q, own_k))
        np.testing.assert_allclose(q, turned_q * w[f"blocks.{i}.q_gain"][:, None], atol=1e-4)
        np.testing.assert_allclose(k, turned_k, atol=1e-4)
        value = h @ w[f"blocks.{i}.v"].T / math.sqrt(i + 1)
        value += w["vrl_scales"][i - 1] * v0 if i else 0
        value += w["ve_layer_scales"][i - 2] * ve if i >= 2 else 0
        np.testing.assert_allclose(v[:, 0], value, atol=1e-5)


def test_skips_join_the_two_halves_last_in_first_out():
    """Where blocks only multiply by m_i, block 2 is seen to get block 1's output, 3 block 0's."""
    model, tokens = silent_model(tiny_config(logit_softcap=1e6)), random_tokens(1, 6)
    with torch.no_grad():
        m = torch.stack([block.mix_x.uniform_(0.5, 2) for block in model.blocks])
        w = model.skip_weights.uniform_(0.5, 2)
        x = model.embed(tokens, model.embed.cast(torch.float32))
        y = m[0] * x, m[1] * m[0] * x
        x = m[3] * (m[2] * (y[1] + w[0] * y[1]) + w[1] * y[0])
        expected = x * x.square().mean(-1, keepdim=True).rsqrt() @ model.embed.tokens.T
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-4)


def test_softcap_bounds_the_logits():
    """Logits are cap * tanh(z / cap), with z read off a model whose cap is far away."""
    tokens, logits = random_tokens(1, 12), {}
    for cap in (1e6, 0.5):
        with torch.no_grad():
            logits[cap] = warm_model(tiny_config(logit_softcap=cap))(tokens).double()
    torch.testing.assert_close(logits[0.5], 0.5 * torch.tanh(logits[1e6] / 0.5), atol=1e-5, rtol=0)
    assert logits[1e6].abs().max() > 0.6
    assert logits[0.5].abs().max() <= 0.5
