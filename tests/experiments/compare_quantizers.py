"""Loss against bytes of both quantizers on one model's exact weights.

    compare_quantizers.py WEIGHTS [COUNT]     WEIGHTS: the weights.pt that a run keeps until its end
    compare_quantizers.py WEIGHTS [COUNT] --json logs/quantizers.json
                                              also put the lines into that file, for the figure
                                              that `logs/report.py --quantizers` draws

Settings come from the environment as in train_gpt.py (DATA_PATH, TOKENIZER_PATH). Statistics are
of the held-out end of the last training shard, losses of the first COUNT (128) training sequences
of the validation text, in windows that do not overlap, in float32. KL is that of the quantized
model from the exact one, nats a token; dBPB the difference in bits a byte of text. Bytes are those
of the whole artifact, without code.

The JSON file has an entry a model: what was measured on what, and its lines. An entry of the same
name is replaced if it is of the same weights (if not, --name gives the new one another), the others
stay, and so do the file's "caps": {quantizer, limit_bytes, code_bytes} of runs that the figure
marks.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt

ROOT = Path(train_gpt.__file__).parent
INT6 = (5.0, 7.0, 9.0, 11.0, 13.0, 18.0, 24.0)  # coarseness
FISHER = (0.00012, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)  # expected KL


@torch.inference_mode()
def log_probabilities(cfg, rt, weights, x):
    """Return log p (B, T, V), float32, of sequences x (B, T)."""
    model = train_gpt.new_model(cfg, rt, weights, "float32")
    return torch.cat([model(part).log_softmax(-1) for part in x.split(8)])


def describe(path, kept, cfg, name):
    """Return what a JSON entry says of a model and of the script: {key: value}."""
    steps = kept["result"].get("steps", cfg.iterations)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return dict(
        name=name or f"{cfg.preset}, {steps} steps, seed {cfg.seed}",
        preset=cfg.preset,
        steps=steps,
        seed=cfg.seed,
        complement_alpha=cfg.complement_alpha,
        weights_sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        commit=commit.stdout.strip(),  # "" outside of a repository
        source_sha256=hashlib.sha256(Path(train_gpt.__file__).read_bytes()).hexdigest(),
        data=Path(cfg.data_path).name,
    )


def check_name(contents, entry):
    """Raise UserError if a JSON file's contents have an entry of that name for other weights."""
    for model in contents.get("models", []):
        found = model.get("weights_sha256")
        if model["name"] == entry["name"] and found != entry["weights_sha256"]:
            raise train_gpt.UserError(
                f"the file has {entry['name']!r} of other weights (SHA-256 {found}), which would "
                "be lost: give these another --name, or remove those"
            )


def measure(path, count, name, contents):
    """Return the JSON entry of a model; print a line for each quantizer and coarseness.

    UserError if `contents`, of the JSON file, have its name for other weights, or if the validation
    text has fewer sequences than `count`.
    """
    kept = torch.load(path, map_location="cpu", weights_only=True)
    cfg = train_gpt.config_from_env(os.environ, kept["settings"])
    entry = describe(path, kept, cfg, name)
    check_name(contents, entry)
    rt = train_gpt.start_runtime(cfg, {})
    held_out = train_gpt.load_held_out(cfg)
    table, _ = train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)
    weights = {**kept["weights"], "mixer": train_gpt.new_mixer_weights()}
    tokens = torch.from_numpy(train_gpt.load_validation(cfg))
    sequences = (len(tokens) - 1) // cfg.train_seq_len
    if not 1 <= count <= sequences:
        raise train_gpt.UserError(
            f"COUNT={count}: the validation text has {sequences} sequences of {cfg.train_seq_len} "
            "tokens; lower COUNT or raise VAL_TOKENS"
        )
    tokens = tokens[: count * cfg.train_seq_len + 1]
    x, y = (part.view(count, -1).to(rt.device) for part in (tokens[:-1], tokens[1:]))
    text = train_gpt.audit_bytes(table, tokens.numpy())
    exact = log_probabilities(cfg, rt, weights, x)

    start_s = time.perf_counter()
    model = train_gpt.new_model(cfg, rt, weights)
    steps = train_gpt.new_steps(model, held_out, math.inf)
    levels = sum(len(rows) * len(columns) for rows, columns, _ in steps.values())
    print(f"{path}: {levels:,} levels, statistics {time.perf_counter() - start_s:.1f} s")
    print("quantizer  coarseness  expected KL       KL      dBPB      bytes  pack s  read s")
    tries = [("int6", c, None) for c in INT6]
    tries += [("fisher", (24 * kl / levels) ** 0.5, kl) for kl in FISHER]
    lines = []
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
        line = dict(
            quantizer=quantizer,
            coarseness=coarseness,
            expected_kl=expected,
            kl=kl,
            dbpb=nats / math.log(2) / text["bytes"],
            bytes=len(data),
            pack_seconds=packed_s - start_s,
            read_seconds=read_s - packed_s,
        )
        lines.append(line)
        print(
            f"{quantizer:9}  {coarseness:10.4g}  {expected or math.nan:11.5f}  {kl:.5f}  "
            f"{line['dbpb']:+.5f}  {len(data):9,}  {line['pack_seconds']:6.1f}  "
            f"{line['read_seconds']:6.1f}",
            flush=True,
        )
    scored = dict(
        levels=levels,
        sequences=count,
        sequence_tokens=cfg.train_seq_len,
        text_bytes=text["bytes"],
        text_sha256=text["sha256"],
    )
    return entry | scored | dict(lines=lines)


def add_entry(contents, entry):
    """Return a JSON file's contents with a model's entry, in place of one of the same name."""
    others = [model for model in contents.get("models", []) if model["name"] != entry["name"]]
    return {"caps": [], **contents, "models": [*others, entry]}


def read_contents(path):
    """Return what a JSON file of this program holds; UserError if it is none of these."""
    with train_gpt.blaming(
        f"--json {path}: mend it or name another", ValueError, TypeError, OSError
    ):
        contents = json.loads(path.read_bytes())
        if not isinstance(contents, dict):
            raise ValueError("not a JSON object")
        for model in contents.get("models", []):
            if not (isinstance(model, dict) and isinstance(model.get("name"), str)):
                raise ValueError("a model without a name")
    return contents


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", help="the weights.pt that a run keeps until its end")
    parser.add_argument("count", nargs="?", type=int, default=128, help="sequences to score")
    parser.add_argument("--json", type=Path, metavar="FILE", help="put the lines into this file")
    parser.add_argument("--name", default="", help="the entry's (default: preset, steps, seed)")
    given = parser.parse_args()
    contents = {}
    try:
        if given.json and given.json.exists():
            contents = read_contents(given.json)  # before the work: it may be damaged
        entry = measure(given.weights, given.count, given.name, contents)
    except train_gpt.UserError as error:
        parser.exit(1, f"error: {train_gpt.one_line(error)}\n")
    if given.json:
        train_gpt.write_object(given.json, add_entry(contents, entry))


if __name__ == "__main__":
    main()
