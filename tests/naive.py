"""Plain second writings: slow, obvious, and sharing nothing with the script."""

import cmath
import copy
import decimal
import functools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

# ---- Model, in float64: one token, one head and one pair of dimensions after another -------------


def naive_rms(x):
    """Return x over its root mean square."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True))


def naive_buckets(tokens, buckets):
    """Return the row of the bigram table for each token of a list, in Python's integers."""
    return [
        ((36313 * token) ^ (27191 * tokens[t - 1])) % (buckets - 1) if t else buckets - 1
        for t, token in enumerate(tokens)
    ]


def naive_smear(rows, smear):
    """Return each row mixed with the row before it; nothing is before the first."""
    gate = 1 / (1 + np.exp(-smear))
    before = [np.zeros_like(rows[0]), *rows[:-1]]
    return np.stack([(1 - gate) * row + gate * last for row, last in zip(rows, before)])


def naive_rotate(x, first, dims, base):
    """Turn the pairs (j, j + dims/2) of each head of x (T, heads, d) by t * base^(-2j/dims).

    t is the position of a row; the first row's is `first`.
    """
    out = x.copy()
    for t, heads in enumerate(out, first):
        for head in heads:
            for j in range(dims // 2):
                turn = cmath.exp(1j * t * base ** (-2 * j / dims))
                z = complex(head[j], head[j + dims // 2]) * turn
                head[j], head[j + dims // 2] = z.real, z.imag
    return out


def naive_attention(q, k, v, reach=math.inf):
    """Return causal softmax attention of q (T, H, d) to k and v (T, G, d).

    A row sees itself and the `reach` rows before; query head h reads key head h // (H / G).
    """
    y = np.empty_like(q)
    for t in range(q.shape[0]):
        seen = [s for s in range(t + 1) if t - s <= reach]
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            score = np.array([q[t, h] @ k[s, g] / math.sqrt(q.shape[2]) for s in seen])
            p = np.exp(score - score.max())
            y[t, h] = sum(weight * v[s, g] for weight, s in zip(p, seen)) / p.sum()
    return y


def naive_exclude_self(y, v):
    """Return each head's output without its part along the position's own value."""
    out = y.copy()
    for t in range(y.shape[0]):
        for h in range(y.shape[1]):
            own = v[t, h // (y.shape[1] // v.shape[1])]
            own = own / np.linalg.norm(own)
            out[t, h] -= (y[t, h] @ own) * own
    return out


def naive_mlp(x, w_in, w_out):
    """Return LeakyReLU of slope 0.5, squared, between two matrices."""
    hidden = x @ w_in.T
    return np.where(hidden > 0, hidden, 0.5 * hidden) ** 2 @ w_out.T


def naive_base(cfg):
    """Return the rotary base: 10,000, NTK-scaled for training sequences beyond 1,024."""
    scale = max(1, cfg.train_seq_len / 1024)
    return 10_000.0 * scale ** (cfg.rope_dims / (cfg.rope_dims - 2))


def naive_block(w, cfg, i, x, x0, extra_v, reach):
    """Return layer i's (output, own value projection (T, G, d))."""
    T, d = len(x), cfg.model_dim // cfg.num_heads
    p = {n.removeprefix(f"blocks.{i}."): value for n, value in w.items()}
    x = p["mix_x"] * x + p["mix_x0"] * x0
    h = naive_rms(x) / math.sqrt(i + 1)
    q, k, own_v = ((h @ p[n].T).reshape(T, -1, d) for n in "qkv")
    q, k = (naive_rotate(naive_rms(z), 0, cfg.rope_dims, naive_base(cfg)) for z in (q, k))
    v = own_v + extra_v
    y = naive_attention(q * p["q_gain"][:, None], k, v, reach)
    if i >= cfg.num_layers - cfg.xsa_last_n:
        y = naive_exclude_self(y, v)
    x = x + p["attn_scale"] * (y.reshape(T, -1) @ p["attn_out"].T)
    h = naive_rms(x) / math.sqrt(i + 1)
    return x + p["mlp_scale"] * naive_mlp(h, p["mlp_in"], p["mlp_out"]), own_v


def naive_embedding(w, tokens):
    """Return token table + projected bigram table, normed, smeared."""
    buckets = naive_buckets(tokens, len(w["embed.bigrams"]))
    rows = [
        w["embed.tokens"][token]
        + w["embed.bigram_scale"] * (w["embed.bigram_proj"] @ w["embed.bigrams"][b])
        for token, b in zip(tokens, buckets)
    ]
    return naive_smear(naive_rms(np.stack(rows)), w["embed.smear"])


def naive_logits(model, cfg, tokens, reach=math.inf):
    """Return the logits (T, V) of one list of tokens; a row sees the `reach` rows before it."""
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
        x, own_v = naive_block(w, cfg, i, x, x0, extra_v, reach)
        v0 = own_v if i == 0 else v0
        if i < half:
            pushed.append(x)
    return cfg.logit_softcap * np.tanh(naive_rms(x) @ w["embed.tokens"].T / cfg.logit_softcap)


# ---- Complementary objective ---------------------------------------------------------------------


def naive_weights(pairs, x, y, alpha):
    """Return max(0.1, 1 - alpha * count(x, y) / (total(x) + 1)) from a Counter of the pairs."""
    total = Counter()
    for (first, _), count in pairs.items():
        total[first] += count
    return torch.tensor(
        [
            [max(0.1, 1 - alpha * pairs[a, b] / (total[a] + 1)) for a, b in zip(*row)]
            for row in zip(x.tolist(), y.tolist())
        ]
    )


# ---- Optimizers ----------------------------------------------------------------------------------


def naive_orthogonalize(matrix):
    """Return a matrix after five Newton-Schulz steps, in the order in which papers write them."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def naive_muon(matrix, grads, momenta, lr, weight_decay):
    """Return a matrix after a step of Muon on each gradient, with that step's momentum."""
    mean = np.zeros_like(matrix)
    for grad, momentum in zip(grads, momenta):
        mean = momentum * mean + (1 - momentum) * grad
        update = naive_orthogonalize(momentum * mean + (1 - momentum) * grad)
        rows, cols = matrix.shape
        rate = lr * math.sqrt(max(1, rows / cols))
        matrix = matrix - lr * weight_decay * matrix - rate * update
    return matrix


# ---- N-gram history ------------------------------------------------------------------------------

CONTEXT_LENGTHS = (8, 5, 3, 2, 1, 8)  # in tokens; the last is the word's, up to its beginning


def naive_context(tokens, end, kind, order, begins):
    """Return the context that ends at `end`, newest token first: a tuple.

    It ends where the stream does and, for kind 5, with the token that begins the word.
    """
    context = []
    for token in tokens[: end + 1][::-1][: min(CONTEXT_LENGTHS[kind], order - 1)]:
        context.append(token)
        if kind == 5 and begins[token]:
            break
    return tuple(context)


def naive_occurrences(tokens, order, recent, begins, slots=None):
    """Return six lists for each position: where its contexts ended before, newest first.

    With `slots`, {(kind, end): slot}, only the last `recent` ends of a slot are looked at; those of
    another context are -1.
    """
    before = [defaultdict(list) for _ in range(6)]
    rows = [[[]] * 6]
    for end in range(len(tokens) - 1):
        rows.append([])
        for kind, seen in enumerate(before):
            context = naive_context(tokens, end, kind, order, begins)
            key = slots[kind, end] if slots else context
            rows[-1].append([e if c == context else -1 for e, c in seen[key][::-1][:recent]])
            seen[key].append((end, context))
    return rows


def padded(rows, recent):
    """Return lists of occurrences as an array (n, 6, recent), with -1 where there are none."""
    return np.array([[ends + [-1] * (recent - len(ends)) for ends in row] for row in rows])


def naive_counts(tokens, vocab_size, cfg, begins):
    """Return (counts (n, V), context length used (n,)) of the entropy rule.

    The context is the longest, not the word's, that has MIN_COUNT occurrences; both are 0 without.
    """
    counts = np.zeros((len(tokens), vocab_size), dtype=np.int64)
    used = np.zeros(len(tokens), dtype=np.int64)
    rows = naive_occurrences(tokens, cfg.ngram_order, cfg.ngram_recent, begins)
    for position, row in enumerate(rows):
        for length, ends in zip(CONTEXT_LENGTHS[:-1], row):
            if len(ends) >= cfg.min_count:
                used[position] = min(length, cfg.ngram_order - 1)
                for end in ends:
                    counts[position, tokens[end + 1]] += 1
                break
    return counts, used


# ---- Mixers and commitment, in Python's integers and fractions -----------------------------------


@functools.cache
def naive_exp(steps):
    """Return floor(2^38 exp(-steps / 256)), from sixty decimals."""
    with decimal.localcontext(prec=60):
        return math.floor((decimal.Decimal(-steps) / 256).exp() * 2**38)


def naive_shares(row):
    """Return the shares, a list, of one row of grid logits."""
    top = max(row)
    return [naive_exp(top - k) for k in row]


def naive_commit(shares):
    """Return the frequencies, a list, of one row of shares: 1 + floor(share of 2^24 - V).

    The first of the largest also gets what the floors leave.
    """
    total = sum(shares)
    freqs = [1 + share * (2**24 - len(shares)) // total for share in shares]
    freqs[shares.index(max(shares))] += 2**24 - sum(freqs)
    return freqs


def naive_mix(shares, counts, base, span, center):
    """Return (the entropy rule's mixture of one row, in fractions, and its alpha)."""
    p = [Fraction(freq, 2**24) for freq in naive_commit(shares)]
    entropy = -sum(float(x) * math.log(x) for x in p)
    alpha = base + span / (1 + math.exp(-2 * (entropy - center))) if sum(counts) else 0.0
    alpha = Fraction(round(alpha * 4096), 4096)
    seen = max(sum(counts), 1)
    return [(1 - alpha) * x + alpha * Fraction(c, seen) for x, c in zip(p, counts)], alpha


def naive_evidence(row, ends_of, tokens, t, window_start):
    """Return {candidate: its 27 features} of position t, whose grid logits are `row`.

    ends_of: its six lists of occurrences, newest first, -1 where one is another context's.
    """
    candidates = {}
    top = -math.log(sum(math.exp((k - max(row)) / 256) for k in row))
    for token in {tokens[end + 1] for ends in ends_of for end in ends if end >= 0}:
        odds, ranks, distances, flags = [], [], [], []
        for ends in ends_of:
            same_context = [end for end in ends if end >= 0]
            hits = [end for end in same_context if tokens[end + 1] == token]
            misses = len(same_context) - len(hits)
            odds.append(math.log((len(hits) + 0.4) / (misses + 0.4)) if same_context else 0)
            ranks.append(1 / (1 + ends.index(hits[0])) if hits else 0)
            distances.append(math.log2(t - 1 - hits[0]) / 8 if hits else 0)
            flags.append(float(bool(hits) and hits[0] >= window_start))
        by_model = [(max(row) - row[token]) / 256 / 4, top / 2, 1]
        candidates[token] = [*odds, *ranks, *distances, *flags, *by_model]
    return candidates


def naive_boosts(candidates, weights):
    """Return {candidate: boost} as tensors, before they are rounded."""
    if not candidates:
        return {}
    features = torch.tensor(list(candidates.values()), dtype=torch.float64)
    hidden = torch.relu(features @ weights[:, :-1].T)
    return dict(zip(candidates, hidden @ weights[:, -1]))


def naive_boosted(row, candidates, weights):
    """Return the grid logits, a list, of one row with its candidates' boosts on the same grid."""
    boosted = list(row)
    for token, boost in naive_boosts(candidates, weights).items():
        boosted[token] += round(256 * boost.item())
    return boosted


def naive_log_q(row, candidates, weights):
    """Return log q (V,) of one row by autograd: nothing is rounded but the logits."""
    boosted = torch.tensor(row, dtype=torch.float64) / 256
    for token, boost in naive_boosts(candidates, weights).items():
        boosted = boosted.index_add(0, torch.tensor([token]), boost[None])
    return torch.log_softmax(boosted, 0)


def naive_gradient(row, candidates, target, weights):
    """Return the gradient of one row's code length in units of 2^-30, whole numbers.

    Each candidate's boost is pulled by its committed probability, less 1 for the target.
    """
    freqs = naive_commit(naive_shares(naive_boosted(row, candidates, weights.detach())))
    pull = 0 * weights.sum()  # there may be no evidence at all
    for token, boost in naive_boosts(candidates, weights).items():
        pull = pull + (freqs[token] / 2**24 - (token == target)) * boost
    (gradient,) = torch.autograd.grad(pull, weights)
    return torch.round(gradient * 2**30)


def naive_learn(positions, targets, weights, optimizer):
    """Take a step of torch's Adam on the mean gradient of [(row, candidates)]; round the weights.

    The weights lie on a grid of 2^-16.
    """
    gradients = [naive_gradient(*place, x, weights) for place, x in zip(positions, targets)]
    weights.grad = sum(gradients) / 2**30 / len(targets)
    optimizer.step()
    with torch.no_grad():
        weights.copy_(torch.round(weights * 2**16) / 2**16)


# ---- Test-time training --------------------------------------------------------------------------


def naive_guard(model, mixer, targets, lanes=1):
    """Return what is committed of two lists of frequency rows, and the mixer's weights, of 2^14.

    Each lane's weight begins at a half and follows the lane's own targets.
    """
    rows, weights = [], []
    for t, (p, q) in enumerate(zip(model, mixer)):
        weight = 8192
        if t >= lanes:
            x = targets[t - lanes]
            mixed = Fraction(weights[t - lanes], 16384) * mixer[t - lanes][x]
            alone = Fraction(16384 - weights[t - lanes], 16384) * model[t - lanes][x]
            weight = 8 + math.floor(16368 * mixed / (mixed + alone))
        weights.append(weight)
        rows.append(naive_commit([weight * b + (16384 - weight) * a for a, b in zip(p, q)]))
    return rows, weights


def naive_lane_order(n, lanes):
    """Return the numbers of a text's tokens in the order of coding: its segments by turns."""
    parts = [part.tolist() for part in np.array_split(np.arange(n), lanes)]
    return [part[row] for row in range(n) for part in parts if row < len(part)]


def naive_bytes(table, before, token):
    """Return the bytes of a token after another one, from its piece alone."""
    piece, kind = table.pieces[token], table.kinds[token]
    if kind == "N" and piece[0] == "\u2581":
        return len(piece) - (table.kinds[before] in "UCX")
    return {"N": len(piece), "B": 1}.get(kind, 0)


def naive_adapts(name):
    """Return whether TTT with two frozen blocks of four trains a parameter.

    It does: vectors, the token table, the later blocks' matrices.
    """
    vectors = ("q_gain", "mix_x", "mix_x0", "attn_scale", "mlp_scale", "smear", "ve_scale")
    if name.endswith((*vectors, "scales", "bigram_scale")):
        return True
    return name == "embed.tokens" or name.startswith(("blocks.2", "blocks.3"))


def naive_rate(chunk, cfg):
    """Return TTT's rate for chunk 0, 1, ...: a cosine, times 1 to 3 over its first 30 %."""
    done = min(chunk / cfg.ttt_schedule_chunks, 1)
    return cfg.ttt_lr * (0.5 + 0.5 * math.cos(math.pi * done)) * min(3, 1 + 2 * done / 0.3)


def naive_byte_weights(table, tokens):
    """Return the bytes of tokens[1:], int64."""
    pairs = zip(tokens[:-1].tolist(), tokens[1:].tolist())
    return torch.tensor([naive_bytes(table, *pair) for pair in pairs])


def naive_loss(model, cfg, tokens, weights):
    """Return the summed nats of tokens[1:], by these weights; sequences do not see each other."""
    logits = model(tokens[:-1].view(-1, cfg.eval_seq_len)).flatten(0, 1)
    return (weights * F.cross_entropy(logits, tokens[1:], reduction="none")).sum()


def naive_ttt_gradients(model, params, cfg, tokens, weights, rounded):
    """Return the gradients of the mean nats of tokens[1:], by these weights.

    Rounded: the sum of each two sequences, to a grid of 2^-20.
    """
    n = 2 * cfg.eval_seq_len if rounded else len(weights)
    total = [torch.zeros_like(p) for p in params]
    for start in range(0, len(weights), n):
        part = tokens[start : start + n + 1], weights[start : start + n]
        grads = torch.autograd.grad(naive_loss(model, cfg, *part), params)
        total = [a + (naive_grid(g) if rounded else g) for a, g in zip(total, grads)]
    return [grad / weights.sum() for grad in total]


def naive_grid(x):
    """Return x rounded to multiples of 2^-20."""
    return torch.round(x * 2**20) / 2**20


def naive_ttt(model, cfg, table, chunks, weighted=True, rounded=True):
    """Return the (live, average) weights after all chunks, by autograd and torch's AdamW.

    Rounded: the gradients, and both weights after each step.
    """
    live = copy.deepcopy(model)
    average = {name: p.detach().clone() for name, p in live.named_parameters()}
    params = {name: p for name, p in live.named_parameters() if naive_adapts(name)}
    optimizer = torch.optim.AdamW(params.values(), weight_decay=0, foreach=False)
    decay = cfg.polyak_decay
    for number, tokens in enumerate(chunks):
        optimizer.param_groups[0]["lr"] = naive_rate(number, cfg)
        weights = naive_byte_weights(table, tokens)
        if not weighted:
            weights = torch.ones_like(weights)
        for _ in range(cfg.ttt_epochs):
            args = live, list(params.values()), cfg, tokens, weights, rounded
            for p, grad in zip(params.values(), naive_ttt_gradients(*args)):
                p.grad = grad
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            for name, p in params.items():
                average[name] = decay * average[name] + (1 - decay) * p.detach()
                if rounded:
                    average[name] = naive_grid(average[name])
                    p.data = naive_grid(p.data)
    return {name: p.detach() for name, p in live.named_parameters()}, average


# ---- Engine --------------------------------------------------------------------------------------


def naive_rows(model, cfg, tokens, plan, first=0):
    """Return the logits (n, V) of rows first, ... of a list of tokens, run by run.

    Runs begin at `first`, each by a plain forward pass over plan.context rows before it and itself.
    """
    size = plan.run
    rows = []
    for start in range(first, len(tokens), size):
        begin = max(0, start - plan.context)
        logits = naive_logits(model, cfg, tokens[begin : start + size], plan.reach)
        rows.append(logits[start - begin :])
    return np.concatenate(rows)


def naive_logit_grid(logits, temperature=1.0):
    """Return logits over the temperature in whole steps of 1 / 256, nested lists."""
    return np.rint(logits * 256 / temperature).astype(int).tolist()
