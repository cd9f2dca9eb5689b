"""Quantizer int6, artifact, fit to the size limit, and files that are whole or not there."""

import builtins
import errno
import functools
import hashlib
import json
import lzma
import math
import os
import pickle
import re
import struct
import tempfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import (
    COARSEST,
    FINEST,
    VOCAB,
    quiet,
    refusal,
    same,
    tiny_config,
    tiny_table,
    unpacked,
    warm_model,
    warm_weights,
)

import train_gpt
from train_gpt import (
    GROUPS,
    RunSettings,
    Runtime,
    UserError,
    check_writable,
    pack_artifact,
    quantize,
    write_atomically,
)

KINDS = {
    name: train_gpt.KINDS.get(train_gpt.role(name), "fp16") for name in warm_weights(tiny_config())
}


def stored_parts(name, w, coarseness):
    """The tensors that an int6 artifact holds of a parameter: levels and scales, or fp16 values."""
    return [w.half()] if KINDS[name] == "fp16" else quantize(w, KINDS[name], coarseness)


def given_back(weights, coarseness):
    """{name: fp32 tensor}: what an int6 artifact of this coarseness must give back."""
    found = {}
    for name, w in weights.items():
        value, *scales = stored_parts(name, w, coarseness)
        found[name] = value.float()
        for scale in scales:
            found[name] = value.float() * scale.float()[:, None]
    return found


# ---- Quantizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, limit", [("int6", 31), ("int8", 127)])
@pytest.mark.parametrize("coarseness", [1.0, 2.5, 12.0])
def test_quantizer_error_is_half_a_level(kind, limit, coarseness):
    """Up to the top, the error is scale / 2 and what fp16 costs the scale; beyond, the end level.

    The top of int6 is at coarseness times the root mean square of a row, that of int8 at its
    largest value.
    """
    torch.manual_seed(limit)
    size = 10.0 ** torch.linspace(-9, 5, 57)
    w = torch.randn(57, 40) * size[:, None]
    w[3] = 0
    levels, scale = quantize(w, kind, coarseness)
    assert levels.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert levels.abs().max() == limit or coarseness == 12.0

    row_max = w.abs().amax(1)
    if kind == "int6":
        row_max = coarseness * w.square().mean(1).sqrt()
    exact, rounded = row_max.double() / limit, scale.double()
    most = torch.maximum(exact * 2.0**-11, torch.tensor(2.0**-24))
    assert ((rounded - exact).abs() <= most * 1.0001).all()

    error = (w.double() - levels.double() * rounded[:, None]).abs()
    bound = rounded / 2 + limit * (exact - rounded).clamp(min=0) + 1e-6 * row_max
    inside = w.abs() <= row_max[:, None]
    assert inside.float().mean() > 0.6
    assert (error <= bound[:, None])[inside].all()

    outside = w.abs().double() >= limit * rounded[:, None]
    clips = kind == "int6" and coarseness == 1
    assert outside.sum() >= (w.numel() // 5 if clips else 0)
    assert (levels.int() == limit * w.sign().int())[outside].all()


@pytest.mark.parametrize("kind", ["int6", "int8"])
def test_row_of_zeros_has_levels_of_zero_and_a_scale(kind):
    """Nothing is divided by zero where a row is all zeros."""
    levels, scale = quantize(torch.zeros(1, 40), kind, 12.0)
    assert not levels.any()
    assert scale > 0


@pytest.mark.parametrize("kind, limit", [("int6", 31), ("int8", 127)])
def test_row_beyond_fp16_saturates(kind, limit):
    """A row too large for a fp16 scale saturates at finite values of the right sign."""
    w = torch.tensor([[1e9, -1e9, 0.0, 3e38]])
    levels, scale = quantize(w, kind, 1.0)
    assert scale.isfinite().all()
    assert levels.tolist() == [[limit, -limit, 0, limit]]


def test_each_tensor_has_its_kind():
    """Block matrices are int6, embedding tables int8, and all else fp16; fisher's are levels."""
    kinds = {"int6": set(), "int8": set(), "fp16": set()}
    for name, kind in KINDS.items():
        kinds[kind].add(name)
    matrices = ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")
    assert kinds["int6"] == {f"blocks.{i}.{m}" for i in range(4) for m in matrices}
    assert kinds["int8"] == {"embed.tokens", "embed.bigrams", "ve_table"}
    projections = {"embed.bigram_proj", "ve_proj"}
    rest = {"skip_weights", "blocks.0.mix_x", "mixer"}
    assert kinds["fp16"] > projections | rest
    coded = train_gpt.new_steps(warm_model(tiny_config()), np.int64([]), math.inf)
    assert coded.keys() == kinds["int6"] | kinds["int8"] | projections


@pytest.mark.parametrize("name", ["embed.tokens", "embed.bigrams", "ve_table"])
def test_int8_reaches_the_maximum_of_a_row(name):
    """A table's top level stands at the largest value of its row."""
    w = warm_weights(tiny_config())[name]
    levels, scale = stored_parts(name, w, 5.0)
    assert levels.abs().max() == 127
    top = w.abs().amax(1) / 127
    torch.testing.assert_close(scale.float(), top, atol=2.0**-24, rtol=2.0**-10)


@pytest.mark.parametrize("leaf", ["q", "k", "v", "attn_out", "mlp_in", "mlp_out"])
def test_int6_reaches_coarseness_deviations(leaf):
    """A matrix's top level stands at COARSENESS times the root mean square of its row."""
    name = f"blocks.1.{leaf}"
    w = warm_weights(tiny_config())[name]
    levels, scale = stored_parts(name, w, 5.0)
    assert levels.abs().max() <= 31
    top = 5 * w.square().mean(1).sqrt() / 31
    torch.testing.assert_close(scale.float(), top, atol=2.0**-24, rtol=2.0**-10)


# ---- Container -----------------------------------------------------------------------------------

SHAPES = [
    dict(),
    dict(num_layers=2, ve_layers="", vrl_enabled=False, xsa_last_n=0, ttt_freeze_blocks=0),
    dict(num_layers=2, ve_layers="0", xsa_last_n=1, ttt_freeze_blocks=1),
]


@pytest.mark.parametrize("changes", SHAPES)
def test_artifact_gives_back_what_was_packed(tmp_path, changes):
    """Settings, tokenizer and the dequantized weights come back from the file, with its digest."""
    cfg = tiny_config(seed=7, ttt_lr=0.00321, data_path=str(tmp_path), **changes)
    weights, path = warm_weights(cfg), tmp_path / "a.int6.lzma"
    data = pack_artifact(weights, cfg, tiny_table(), 6.0)
    path.write_bytes(data)
    artifact = train_gpt.read_artifact(path)
    assert (artifact.path, artifact.size_bytes) == (path, len(data))
    assert artifact.digest == hashlib.sha256(data).digest()
    stored = {n for n, group in GROUPS.items() if group is not RunSettings} | {"preset"}
    assert artifact.settings == {n: v for n, v in asdict(cfg).items() if n in stored}
    assert artifact.table == tiny_table()
    assert artifact.table.digest == tiny_table().digest
    assert same(artifact.weights, given_back(weights, 6.0))


def test_same_weights_give_the_same_bytes():
    """Nothing in an artifact depends on when, where or in which order it was made."""
    cfg = tiny_config()
    data = pack_artifact(warm_weights(cfg), cfg, tiny_table(), 6.0)
    turned = dict(reversed(warm_weights(cfg).items()))
    assert pack_artifact(turned, cfg, tiny_table(), 6.0) == data


@pytest.mark.parametrize("changes", SHAPES)
def test_model_is_built_from_an_artifact(changes):
    """A new model of an artifact's weights has them to the last bit."""
    cfg = tiny_config(**changes)
    artifact = unpacked(pack_artifact(warm_weights(cfg), cfg, tiny_table(), 6.0))
    model = train_gpt.new_model(cfg, Runtime(), artifact.weights)
    del artifact.weights["mixer"]
    assert same(model.state_dict(), artifact.weights)


@pytest.mark.parametrize("name", ["embed.smear", "blocks.1.q"])
def test_weights_that_are_missing_are_named(name):
    """By a RuntimeError, which commands report in one line."""
    cfg = tiny_config()
    weights = warm_weights(cfg)
    del weights[name]
    with pytest.raises(RuntimeError, match=re.escape(name)):
        train_gpt.new_model(cfg, Runtime(), weights)


def test_weights_of_another_model_are_named():
    """They are not passed over."""
    cfg = tiny_config()
    weights = {**warm_weights(cfg), "blocks.9.q": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match=r"blocks\.9\.q"):
        train_gpt.new_model(cfg, Runtime(), weights)


def test_no_tensor_comes_back_exact():
    """Each is quantized, and those in fp16 are the rounded values."""
    cfg = tiny_config()
    weights = warm_weights(cfg)
    stored = unpacked(pack_artifact(weights, cfg, tiny_table(), 12.0)).weights
    for name, w in weights.items():
        assert not torch.equal(stored[name], w), name
        if KINDS[name] == "fp16":
            assert torch.equal(stored[name], w.half().float()), name


def test_artifact_is_what_its_description_says():
    """A reader written from the description finds digest, header and each tensor at its place."""
    cfg = tiny_config()
    weights = warm_weights(cfg)
    data = pack_artifact(weights, cfg, tiny_table(), 6.0)
    magic, version, length, digest = struct.unpack("<8sIQ32s", data[:52])
    body = data[52:]
    assert (magic, version, length) == (b"PGOLFART", 2, len(body))
    assert digest == hashlib.sha256(body).digest()
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26, "lc": 0, "lp": 0, "pb": 0}]
    raw = lzma.decompress(body, format=lzma.FORMAT_RAW, filters=filters)
    at = 3 + int.from_bytes(raw[:3])
    header = json.loads(raw[3:at])
    assert set(header["tokenizer"]["pieces"]) == set(tiny_table().pieces)
    assert header["coarseness"] == 6.0
    assert {name for name, _, _ in header["tensors"]} == weights.keys()
    for name, kind, shape in header["tensors"]:
        assert list(weights[name].shape) == shape
        assert kind == KINDS[name]
        for stored in stored_parts(name, weights[name], 6.0):
            array = stored.numpy()
            assert raw[at : at + array.nbytes] == array.tobytes(), name
            at += array.nbytes
    assert at == len(raw)


@pytest.fixture(scope="module")
def packed():
    """The bytes of a tiny artifact."""
    cfg = tiny_config()
    return pack_artifact(warm_weights(cfg), cfg, tiny_table(), 8.0)


def test_every_damage_to_an_artifact_is_told(packed):
    """A flipped bit, a cut, padding, another magic or version: a UserError names the file."""
    head = train_gpt.ARTIFACT_HEAD_BYTES
    places = [*range(head + 20), *range(head + 20, len(packed), 997), len(packed) - 1]
    damaged = [packed[:i] + bytes([packed[i] ^ 1 << i % 8]) + packed[i + 1 :] for i in places]
    cuts = [*range(head + 10), *range(head + 10, len(packed), 4001), len(packed) - 1]
    damaged += [packed[:n] for n in cuts]
    damaged += [packed + b"\0", b"\0" + packed, packed + packed, packed[1:]]
    damaged += [b"PGOLFARX" + packed[8:], b"PK\3\4", json.dumps({"vocab_size": 64}).encode()]
    versions = (0, 1, 3, 2**32 - 1)
    damaged += [packed[:8] + struct.pack("<I", version) + packed[12:] for version in versions]
    assert len(damaged) > 150
    for data in damaged:
        assert "where.lzma" in refusal(unpacked, data, "where.lzma")


@pytest.mark.parametrize("version", [1, 3])
def test_other_format_version_is_told(packed, version):
    """An artifact of another format is refused with the version that is read, and a way out."""
    message = refusal(unpacked, packed[:8] + struct.pack("<I", version) + packed[12:])
    assert "no artifact of format version 2: use the script that made it" in message


@pytest.mark.parametrize("name", ["none.lzma", ""])
def test_unreadable_artifact_is_named_with_its_setting(tmp_path, name):
    """A missing file and a folder are named, with ARTIFACT_PATH."""
    path = tmp_path / name
    message = refusal(train_gpt.read_artifact, path)
    assert re.match(f"ARTIFACT_PATH: .*{re.escape(str(path))}", message)


def test_reading_an_artifact_executes_nothing(packed, monkeypatch):
    """No pickle, no torch.load, no numpy.load, no eval: a stranger's artifact is data."""

    def forbidden(*args, **how):
        raise AssertionError("an artifact was executed")

    for module, names in (
        (pickle, ("load", "loads", "Unpickler", "_Unpickler")),
        (torch, ("load",)),
        (np, ("load",)),
        (builtins, ("eval", "exec")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    artifact = unpacked(packed)
    monkeypatch.undo()
    assert artifact.settings["vocab_size"] == VOCAB


@pytest.mark.parametrize("name", ["blocks.1.q", "embed.tokens", "ve_proj", "blocks.0.mix_x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameter_that_is_not_finite_is_not_packed(name, value):
    """NaN or infinity in a tensor of any kind refuses and names the parameter."""
    cfg = tiny_config()
    weights = warm_weights(cfg)
    weights[name].view(-1)[3] = value
    assert name in refusal(pack_artifact, weights, cfg, tiny_table(), 8.0)


def test_vector_beyond_fp16_is_not_packed():
    """What fp16 cannot hold is not silently made infinite."""
    cfg = tiny_config()
    weights = warm_weights(cfg)
    weights["blocks.2.mlp_scale"][0] = 1e5
    assert "blocks.2.mlp_scale" in refusal(pack_artifact, weights, cfg, tiny_table(), 8.0)


# ---- Fit to SIZE_LIMIT_BYTES ---------------------------------------------------------------------

CODE_BYTES = 1000


@pytest.fixture
def small_code(monkeypatch):
    """Let the script count 1,000 bytes, so that tiny artifacts have tiny caps."""
    monkeypatch.setattr(train_gpt, "CODE_BYTES", CODE_BYTES)


def wide_config(**changes):
    """A Config of 150 thousand block weights."""
    return tiny_config(model_dim=64, **changes)


@functools.cache
def sized(shape):
    """(weights of wide_config, their bytes at the finest, at the coarsest); `shape` of rows."""
    cfg = wide_config()
    model = warm_model(cfg, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
            if shape == "heavy":
                p.mul_(torch.randn_like(p).exp())
    weights = model.state_dict() | {"mixer": train_gpt.new_mixer_weights()}
    ends = [len(pack_artifact(weights, cfg, tiny_table(), c)) for c in (FINEST, COARSEST)]
    return weights, *ends


@pytest.mark.parametrize("shape", ["gaussian", "heavy"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.98])
def test_artifact_fills_its_cap(small_code, monkeypatch, shape, share):
    """Between coarsest and finest, six tries at most find 99.8 to 100 % of the budget."""
    weights, finest, coarsest = sized(shape)
    limit = int(CODE_BYTES + coarsest + share * (finest - coarsest))
    cfg = wide_config(size_limit_bytes=limit)
    tried = {}

    def pack(*args):
        data = pack_artifact(*args)
        tried[data] = args[3]
        return data

    monkeypatch.setattr(train_gpt, "pack_artifact", pack)
    lines = []
    data = train_gpt.fit_artifact(weights, cfg, tiny_table(), lines.append, {})
    budget = limit - CODE_BYTES
    assert 0.998 * budget <= len(data) <= budget
    assert len(tried) <= 6
    assert len(lines) == len(tried)
    assert all(line.endswith(f" of {budget:,} bytes") for line in lines)
    assert FINEST < tried[data] < COARSEST
    assert data == pack_artifact(weights, cfg, tiny_table(), tried[data])


def test_ample_room_takes_the_finest(small_code):
    """Precision beyond FINEST buys nothing, so the rest of the cap stays empty."""
    weights, finest, _ = sized("gaussian")
    cfg = wide_config(size_limit_bytes=2 * finest)
    data = train_gpt.fit_artifact(weights, cfg, tiny_table(), quiet, {})
    assert len(data) == finest
    assert same(unpacked(data).weights, given_back(weights, FINEST))


@pytest.mark.parametrize("room", [-500, 20_000])
def test_no_room_takes_the_coarsest_and_says_by_how_much(tmp_path, small_code, room):
    """The smallest artifact is refused with its excess and what to lower; the file stays."""
    weights, _, coarsest = sized("heavy")
    limit = CODE_BYTES + room
    cfg = wide_config(size_limit_bytes=limit, log_dir=str(tmp_path), run_id="r")
    data = train_gpt.fit_artifact(weights, cfg, tiny_table(), quiet, {})
    assert data == pack_artifact(weights, cfg, tiny_table(), COARSEST)
    report = train_gpt.Run(cfg, Runtime(notes=("cpu",)), "train")
    write_atomically(cfg.artifact, data)
    message = refusal(report.check_size, train_gpt.read_artifact(cfg.artifact))
    assert f" {coarsest - room:,} bytes over SIZE_LIMIT_BYTES={limit:,}" in message
    for name in ("model.int6.lzma", "MODEL_DIM", "NUM_LAYERS"):
        assert name in message
    assert train_gpt.read_artifact(cfg.artifact).settings["model_dim"] == 64


# ---- Writing -------------------------------------------------------------------------------------


def test_write_replaces(tmp_path):
    """The last contents are there, and nothing else."""
    path = tmp_path / "file"
    for data in (b"first", b"second and longer", b""):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error, kind",
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch, function, error, kind):
    """Disk full or Ctrl-C before the rename: old contents stay and no temporary does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(kind) as caught:
            write_atomically(path, b"new")
    if kind is UserError:
        assert re.search(f"{re.escape(str(path))}.*No space left", str(caught.value))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_log_folder_under_a_file_is_refused(tmp_path):
    """A folder that cannot be made is named before any work is done."""
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in refusal(check_writable, tmp_path / "file" / "run", 1)


def test_good_log_folder_keeps_no_trace(tmp_path):
    """The folder is made, and the probe is gone."""
    check_writable(tmp_path / "run", 1)
    assert os.listdir(tmp_path / "run") == []


def test_full_disk_is_found_at_once(tmp_path, monkeypatch):
    """Too little room is told with what is needed, and the setting."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    message = refusal(check_writable, tmp_path / "run", 1000)
    assert "LOG_DIR" in message
    assert f"1,000 bytes to {tmp_path / 'run'}" in message
    assert "No space left" in message
