"""Loss against bytes of both quantizers on one model's exact weights.

    compare_quantizers.py WEIGHTS [COUNT]   WEIGHTS: the weights.pt that a run keeps until its end

Settings come from the environment as in train_gpt.py (DATA_PATH, TOKENIZER_PATH). Statistics are
of the held-out end of the last training shard, losses of the first COUNT (128) training sequences
of the validation text, in windows that do not overlap, in float32. KL is that of the quantized
model from the exact one, nats a token; dBPB the difference in bits a byte of text. Bytes are those
of the whole artifact, without code.
"""

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt

INT6 = (5.0, 7.0, 9.0, 11.0, 13.0, 18.0, 24.0)  # coarseness
FISHER = (0.00012, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)  # expected KL


@torch.inference_mode()
def log_probabilities(cfg, rt, weights, x):
    """Return log p (B, T, V), float32, of sequences x (B, T)."""
    model = train_gpt.new_model(cfg, rt, weights, "float32")
    return torch.cat([model(part).log_softmax(-1) for part in x.split(8)])


def main(path, count):
    """Print a line for each quantizer and coarseness."""
    kept = torch.load(path, map_location="cpu", weights_only=True)
    cfg = train_gpt.config_from_env(os.environ, kept["settings"])
    rt = train_gpt.start_runtime(cfg, {})
    held_out = train_gpt.load_held_out(cfg)
    table, _ = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    weights = {**kept["weights"], "mixer": train_gpt.new_mixer_weights()}
    end = count * cfg.train_seq_len + 1
    tokens = torch.from_numpy(train_gpt.load_validation(cfg)[:end])
    x, y = (part.view(count, -1) for part in (tokens[:-1], tokens[1:]))
    text_bytes, _ = train_gpt.audit_bytes(table, tokens.numpy())
    exact = log_probabilities(cfg, rt, weights, x)

    start_s = time.perf_counter()
    model = train_gpt.new_model(cfg, rt, weights)
    steps = train_gpt.new_steps(model, held_out)
    levels = sum(len(rows) * len(columns) for rows, columns, _ in steps.values())
    print(f"{path}: {levels:,} levels, statistics {time.perf_counter() - start_s:.1f} s")
    print("quantizer  coarseness  expected KL       KL      dBPB      bytes  pack s  read s")
    tries = [("int6", c, math.nan) for c in INT6]
    tries += [("fisher", (24 * kl / levels) ** 0.5, kl) for kl in FISHER]
    for quantizer, coarseness, expected in tries:
        start_s = time.perf_counter()
        changed = replace(cfg, quantizer=quantizer)
        own = steps if quantizer == "fisher" else {}
        data = train_gpt.pack_artifact(weights, changed, table, coarseness, own)
        packed_s = time.perf_counter()
        found = train_gpt.read_artifact(path, data).weights
        read_s = time.perf_counter()
        coded = log_probabilities(cfg, rt, found, x)
        kl = F.kl_div(coded, exact, reduction="sum", log_target=True).item() / y.numel()
        nats = (exact - coded).gather(2, y[..., None]).sum().item()
        print(
            f"{quantizer:9}  {coarseness:10.4g}  {expected:11.5f}  {kl:.5f}  "
            f"{nats / math.log(2) / text_bytes:+.5f}  {len(data):9,}  {packed_s - start_s:6.1f}  "
            f"{read_s - packed_s:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 128)
