"""What comes in and goes out: quantizer, artifact, shards, tokenizer and bytes, settings, results of seeds."""

import codecs
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import json
import lzma
import os
import pickle
import re
import statistics
import struct
import zlib

import numpy as np
import pytest
import sentencepiece
import torch
import zstandard
from conftest import VOCAB, tiny_config, tiny_stream, tiny_table, unpacked, warm_model

import train_gpt
from train_gpt import (
    COARSEST,
    FINEST,
    SPACE,
    Config,
    Runtime,
    TokenTable,
    UsageError,
    UserError,
    load_tokenizer,
)


def refusal(action, *args, kind=UserError, **how):
    """The one-line message with which action(*args) refuses; any other outcome fails."""
    with pytest.raises(kind) as caught:
        action(*args, **how)
    assert caught.type is kind and "\n" not in str(caught.value)
    return str(caught.value)


def quiet(line=""):
    """A log that shows nothing."""


# ----------------------------------------------------------------------------------------------------------
# Quantizer
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [train_gpt.INT6_MAX, train_gpt.INT8_MAX])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_quantizer_error_is_half_a_level(limit, clip):
    """Up to row_max the error is at most scale / 2 and what the scale's fp16 rounding costs; beyond, the end level."""
    torch.manual_seed(limit)
    size = 10.0 ** torch.linspace(-9, 5, 57)
    w = torch.randn(57, 40) * size[:, None]
    w[3] = 0
    row_max = clip * w.abs().amax(1)
    levels, scale = train_gpt.quantize(w, limit, row_max)
    assert (
        levels.dtype == torch.int8 and scale.dtype == torch.float16 and levels.abs().max() == limit
    )
    exact, rounded = row_max.double() / limit, scale.double()
    assert (
        (rounded - exact).abs() <= torch.maximum(exact * 2.0**-11, torch.tensor(2.0**-24)) * 1.0001
    ).all()
    error = (w.double() - train_gpt.decode_tensor("int6", (levels, scale)).double()).abs()
    bound = rounded / 2 + limit * (exact - rounded).clamp(min=0) + 1e-6 * row_max
    inside = w.abs() <= row_max[:, None]
    assert (error <= bound[:, None])[inside].all() and inside.float().mean() > 0.2
    outside = w.abs().double() >= limit * rounded[:, None]
    assert (levels.int() == limit * w.sign().int())[outside].all()
    assert outside.sum() > (w.numel() // 4 if clip < 1 else 9)
    assert not levels[3].any() and scale[3] > 0


def test_quantizer_survives_rows_beyond_fp16():
    """A row too large for a fp16 scale saturates at finite values of the right sign."""
    w = torch.tensor([[1e9, -1e9, 0.0, 3e38]])
    levels, scale = train_gpt.quantize(w, 31, w.abs().amax(1))
    assert scale.isfinite().all() and levels.tolist() == [[31, -31, 0, 31]]


def test_each_tensor_has_its_kind():
    """Block matrices are int6 around COARSENESS deviations, tables int8 around the maximum, the rest fp16."""
    tables = {"embed.tokens", "embed.bigrams", "ve_table"}
    kinds = {}
    for name, p in warm_model(tiny_config()).named_parameters():
        kind, stored = train_gpt.encode_tensor(name, p, 5.0)
        kinds.setdefault(kind, set()).add(name)
        if kind == "fp16":
            assert torch.equal(stored[0], p.half())
            continue
        top = p.abs().amax(1) / 127 if kind == "int8" else 5 * p.square().mean(1).sqrt() / 31
        torch.testing.assert_close(stored[1].float(), top, atol=2.0**-24, rtol=2.0**-10)
        assert stored[0].abs().max() <= (127 if kind == "int8" else 31)
    matrices = ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")
    assert (
        kinds["int6"] == {f"blocks.{i}.{m}" for i in range(4) for m in matrices}
        and kinds["int8"] == tables
    )
    assert {"embed.bigram_proj", "ve_proj", "skip_weights", "blocks.0.mix_x"} < kinds["fp16"]


# ----------------------------------------------------------------------------------------------------------
# Artifact
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(num_layers=2, ve_layers="", vrl_enabled=False, xsa_last_n=0, ttt_freeze_blocks=0),
        dict(num_layers=2, ve_layers="0", xsa_last_n=1, ttt_freeze_blocks=1),
    ],
)
def test_artifact_round_trip(tmp_path, changes):
    """A file gives back settings, tokenizer and exactly the dequantized weights; the same model, the same bytes."""
    cfg = tiny_config(seed=7, ttt_lr=0.00321, data_path=str(tmp_path), **changes)
    model, path = warm_model(cfg), tmp_path / "a.int6.lzma"
    data = train_gpt.pack_artifact(model, cfg, tiny_table(), 6.0)
    assert train_gpt.pack_artifact(warm_model(cfg), cfg, tiny_table(), 6.0) == data
    path.write_bytes(data)
    settings, table, weights = train_gpt.read_artifact(path)
    groups = {f.name: f.metadata["group"] for f in dataclasses.fields(Config)}
    assert settings == {
        n: v for n, v in dataclasses.asdict(cfg).items() if groups[n] != "run" or n == "preset"
    }
    assert table == tiny_table() and table.digest == tiny_table().digest
    expected = {
        n: train_gpt.decode_tensor(*train_gpt.encode_tensor(n, p, 6.0))
        for n, p in model.state_dict().items()
    }
    assert weights.keys() == expected.keys() and all(
        torch.equal(weights[n], w) for n, w in expected.items()
    )
    loaded = train_gpt.GPT(cfg)
    loaded.load_state_dict(weights)
    assert all(torch.equal(loaded.state_dict()[n], w) for n, w in expected.items())


def test_artifact_is_what_its_description_says():
    """A reader written from the description alone finds digest, header and every tensor at its place."""
    cfg = tiny_config()
    model = warm_model(cfg)
    data = train_gpt.pack_artifact(model, cfg, tiny_table(), 6.0)
    magic, version, length, digest = struct.unpack("<8sIQ32s", data[:52])
    body = data[52:]
    assert (magic, version, length) == (b"PGOLFART", 1, len(body)) and digest == hashlib.sha256(
        body
    ).digest()
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26, "lc": 0, "lp": 0, "pb": 0}]
    raw = lzma.decompress(body, format=lzma.FORMAT_RAW, filters=filters)
    at = 4 + struct.unpack("<I", raw[:4])[0]
    header = json.loads(raw[4:at])
    assert set(header["tokenizer"]["pieces"]) == set(tiny_table().pieces)
    for name, kind, shape in header["tensors"]:
        p = model.state_dict()[name]
        assert list(p.shape) == shape
        for stored in train_gpt.encode_tensor(name, p, 6.0)[1]:
            array = stored.numpy()
            assert raw[at : at + array.nbytes] == array.tobytes(), (name, kind)
            at += array.nbytes
    assert at == len(raw)


@pytest.fixture(scope="module")
def artifact():
    """The bytes of a tiny artifact."""
    cfg = tiny_config()
    return train_gpt.pack_artifact(warm_model(cfg), cfg, tiny_table(), 8.0)


def test_every_damage_to_an_artifact_is_told(artifact):
    """A flipped bit, a cut, padding, another magic or version: always a UserError that names the file."""
    header = train_gpt.ARTIFACT_HEAD.size
    places = [*range(header + 20), *range(header + 20, len(artifact), 997), len(artifact) - 1]
    damaged = [artifact[:i] + bytes([artifact[i] ^ 1 << i % 8]) + artifact[i + 1 :] for i in places]
    cuts = [*range(header + 10), *range(header + 10, len(artifact), 4001), len(artifact) - 1]
    damaged += [artifact[:n] for n in cuts]
    damaged += [artifact + b"\0", b"\0" + artifact, artifact + artifact, artifact[1:]]
    damaged += [b"PGOLFARX" + artifact[8:], b"PK\3\4", json.dumps({"vocab_size": 64}).encode()]
    damaged += [
        artifact[:8] + struct.pack("<I", version) + artifact[12:] for version in (0, 2, 2**32 - 1)
    ]
    for data in damaged:
        assert "where.lzma" in refusal(unpacked, data, "where.lzma")
    assert len(damaged) > 150
    assert "version 2" in refusal(unpacked, artifact[:8] + b"\2\0\0\0" + artifact[12:])


def test_unreadable_artifacts(tmp_path):
    """A missing file and a folder are named, with the setting."""
    for path in (tmp_path / "none.lzma", tmp_path):
        assert re.match(
            f"ARTIFACT_PATH: .*{re.escape(str(path))}", refusal(train_gpt.read_artifact, path)
        )


def test_reading_an_artifact_executes_nothing(artifact, monkeypatch):
    """No pickle, no torch.load, no numpy.load, no eval: a stranger's artifact is data."""

    def forbidden(*args, **how):
        raise AssertionError("an artifact was executed")

    for module, names in (
        (pickle, ("load", "loads", "Unpickler", "_Unpickler")),
        (torch, ("load",)),
        (np, ("load",)),
        (__import__("builtins"), ("eval", "exec")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    result = unpacked(artifact)
    monkeypatch.undo()
    assert result[0]["vocab_size"] == VOCAB


@pytest.mark.parametrize("name", ["blocks.1.q", "embed.tokens", "ve_proj", "blocks.0.mix_x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_parameter_that_is_not_finite_is_not_packed(name, value):
    """NaN or infinity in a tensor of any kind refuses and names the parameter."""
    model = warm_model(tiny_config())
    model.get_parameter(name).data.view(-1)[3] = value
    assert name in refusal(train_gpt.pack_artifact, model, tiny_config(), tiny_table(), 8.0)


def test_a_vector_beyond_fp16_is_not_packed():
    """What fp16 cannot hold is not silently made infinite."""
    model = warm_model(tiny_config())
    model.get_parameter("blocks.2.mlp_scale").data[0] = 1e5
    assert "blocks.2.mlp_scale" in refusal(
        train_gpt.pack_artifact, model, tiny_config(), tiny_table(), 8.0
    )


# ----------------------------------------------------------------------------------------------------------
# Size
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_code(monkeypatch):
    """The script counts 1,000 bytes, so that tiny artifacts have tiny caps."""
    monkeypatch.setattr(train_gpt, "code_bytes", lambda: 1000)


SIZES = {}


def sized_model(shape):
    """(model of 150 thousand block weights, bytes at the finest, bytes at the coarsest); `shape` of its rows."""
    cfg = tiny_config(model_dim=64)
    torch.manual_seed(1)
    model = train_gpt.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
            if shape == "heavy":
                p.mul_(torch.randn_like(p).exp())
    if shape not in SIZES:
        SIZES[shape] = [
            len(train_gpt.pack_artifact(model, cfg, tiny_table(), c)) for c in (FINEST, COARSEST)
        ]
    return model, *SIZES[shape]


@pytest.mark.parametrize("shape", ["gaussian", "heavy"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.98])
def test_artifact_fills_its_cap(small_code, shape, share):
    """Between the coarsest and the finest, code and artifact take 99 to 100 % of SIZE_LIMIT_BYTES."""
    model, finest, coarsest = sized_model(shape)
    cfg = tiny_config(
        model_dim=64, size_limit_bytes=int(1000 + coarsest + share * (finest - coarsest))
    )
    data, coarseness = train_gpt.fit_artifact(model, cfg, tiny_table(), quiet)
    assert 0.99 * cfg.size_limit_bytes < 1000 + len(data) <= cfg.size_limit_bytes
    assert FINEST < coarseness < COARSEST and data == train_gpt.pack_artifact(
        model, cfg, tiny_table(), coarseness
    )


def test_ample_room_takes_the_finest(small_code):
    """Precision beyond FINEST buys nothing, so the rest of the cap stays empty."""
    model, finest, _ = sized_model("gaussian")
    cfg = tiny_config(model_dim=64, size_limit_bytes=2 * finest)
    data, coarseness = train_gpt.fit_artifact(model, cfg, tiny_table(), quiet)
    assert coarseness == FINEST and len(data) == finest


@pytest.mark.parametrize("room", [-500, 20_000])
def test_no_room_takes_the_coarsest_and_says_by_how_much(tmp_path, small_code, room):
    """The smallest artifact is written, then refused: bytes over the cap, what to lower; the file stays."""
    model, _, coarsest = sized_model("heavy")
    cfg = tiny_config(model_dim=64, size_limit_bytes=1000 + room, log_dir=str(tmp_path), run_id="r")
    data, coarseness = train_gpt.fit_artifact(model, cfg, tiny_table(), quiet)
    assert coarseness == COARSEST and len(data) == coarsest
    train_gpt.write_atomically(tmp_path / "r" / "model.int6.lzma", data)
    report = train_gpt.Report(cfg, Runtime(notes=("cpu",)), "train")
    message = refusal(report.artifact, tmp_path / "r" / "model.int6.lzma", data)
    assert f" {coarsest - room:,} bytes over SIZE_LIMIT_BYTES={1000 + room:,}" in message
    assert all(name in message for name in ("model.int6.lzma", "MODEL_DIM", "NUM_LAYERS"))
    assert train_gpt.read_artifact(tmp_path / "r" / "model.int6.lzma")[0]["model_dim"] == 64


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


def test_write_makes_folders_and_replaces(tmp_path):
    """The last contents are there, in folders that are made, and nothing else."""
    path = tmp_path / "a" / "b" / "file"
    for data in (b"first", b"second and longer", b""):
        train_gpt.write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, function, error):
    """Disk full or Ctrl-C before the rename: the old contents stay and no temporary does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        train_gpt.write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    assert isinstance(error, KeyboardInterrupt) or re.search(
        f"{path}.*No space left", str(caught.value)
    )


def test_a_bad_log_folder_is_found_at_once(tmp_path, monkeypatch):
    """A folder under a file and a full disk are refused with their path; a good folder keeps no trace."""
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in refusal(train_gpt.check_writable, tmp_path / "file" / "run", 1)
    train_gpt.check_writable(tmp_path / "run", 1)
    assert os.listdir(tmp_path / "run") == []
    usage = train_gpt.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train_gpt.shutil, "disk_usage", lambda path: usage._replace(free=999))
    assert re.match(
        "LOG_DIR: .*999 bytes free.*1,000",
        refusal(train_gpt.check_writable, tmp_path / "run", 1000),
    )


# ----------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".bin", ".bin.zst"])
def test_shard_round_trip(tmp_path, ending):
    """Tokens come back from a file, plain or compressed; the header's numbers stand where they belong."""
    tokens = np.random.default_rng(0).integers(0, 65_536, 3001).astype(np.uint16)
    data, path = train_gpt.shard_bytes(tokens), tmp_path / f"x{ending}"
    assert len(data) == 1024 + 2 * 3001 and struct.unpack("<3i", data[:12]) == (20240520, 1, 3001)
    assert struct.unpack("<3001H", data[1024:]) == tuple(tokens.tolist())
    path.write_bytes(zstandard.compress(data) if ending.endswith(".zst") else data)
    assert np.array_equal(train_gpt.read_shard(path, 65_536), tokens)


GOOD_SHARD = train_gpt.shard_bytes(np.arange(VOCAB, dtype=np.uint16))


def with_header(place, value):
    """GOOD_SHARD with another number in its header."""
    return GOOD_SHARD[: 4 * place] + struct.pack("<i", value) + GOOD_SHARD[4 * place + 4 :]


BAD_SHARDS = {
    "foreign magic": with_header(0, 20240521),
    "version 2": with_header(1, 2),
    "no header": GOOD_SHARD[1024:],
    "one token short": GOOD_SHARD[:-2],
    "header only": GOOD_SHARD[:1024],
    "cut header": GOOD_SHARD[:500],
    "odd byte": GOOD_SHARD + b"\0",
    "padded": GOOD_SHARD + b"\0\0",
    "nothing": b"",
    "no tokens": with_header(2, 0)[:1024],
    "negative count": with_header(2, -VOCAB),
    "wrong count": with_header(2, VOCAB + 1),
    "unknown id": train_gpt.shard_bytes([1, 2, VOCAB, 3]),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
@pytest.mark.parametrize("ending", [".bin", ".bin.zst"])
def test_bad_shards(tmp_path, fault, ending):
    """Whatever is wrong with a shard, plain or compressed, a UserError names the file."""
    path, data = tmp_path / f"fineweb_val_000000{ending}", BAD_SHARDS[fault]
    path.write_bytes(zstandard.compress(data) if ending.endswith(".zst") else data)
    message = refusal(train_gpt.read_shard, path, VOCAB)
    assert str(path) in message and (fault != "unknown id" or f"VOCAB_SIZE={VOCAB}" in message)


@pytest.mark.parametrize(
    "damage",
    [
        lambda z: z[:-1],
        lambda z: z[:-6],
        lambda z: z[:20],
        lambda z: b"",
        lambda z: b"nonsense",
        lambda z: z + b"junk",
        lambda z: z[:60] + bytes([z[60] ^ 255]) + z[61:],
    ],
    ids=["checksum cut", "end cut", "half", "empty", "foreign", "padded", "damaged"],
)
def test_corrupt_compression(tmp_path, damage):
    """A compressed shard that is cut, foreign, padded or damaged is refused by name."""
    path = tmp_path / "fineweb_train_000000.bin.zst"
    compressed = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD_SHARD)
    path.write_bytes(damage(compressed))
    assert str(path) in refusal(train_gpt.read_shard, path, VOCAB)


def test_missing_shards(tmp_path):
    """A shard that is gone is named; a folder without shards is told with the setting and a way out."""
    assert "gone.bin" in refusal(train_gpt.read_shard, tmp_path / "gone.bin", VOCAB)
    (tmp_path / "fineweb_train_000000.bin").write_bytes(GOOD_SHARD)
    for folder in (tmp_path, tmp_path / "none", tmp_path / "with [brackets]*"):
        message = refusal(train_gpt.list_shards, tiny_config(data_path=str(folder)), "val")
        assert (
            message.startswith("DATA_PATH") and str(folder) in message and "PRESET=demo" in message
        )


def test_shards_are_listed_in_order(tmp_path):
    """Sorted by name; a plain file wins over its compressed twin; other names are left alone."""
    folder = tmp_path / "a[b]"
    folder.mkdir()
    for name in (
        "val_000002.bin",
        "val_000000.bin.zst",
        "val_000001.bin",
        "val_000001.bin.zst",
        "val_000003.bin.tmp7",
        "val_000004.bin.bak",
        "train_000000.bin",
    ):
        (folder / f"fineweb_{name}").write_bytes(b"")
    listed = train_gpt.list_shards(tiny_config(data_path=str(folder)), "val")
    assert [os.path.basename(p)[12:] for p in listed] == [
        "000000.bin.zst",
        "000001.bin",
        "000002.bin",
    ]


def test_validation_is_all_shards_up_to_val_tokens(tmp_path):
    """VAL_TOKENS=n gives n + 1 tokens from the start, over shard edges; 0 gives all; more than there are, all."""
    parts = [tiny_stream(50, 1), tiny_stream(61, 2), tiny_stream(40, 3)]
    for number, part in enumerate(parts):
        (tmp_path / f"fineweb_val_{number:06d}.bin").write_bytes(train_gpt.shard_bytes(part))
    whole = np.concatenate(parts)
    for wanted, length in {
        0: 151,
        32: 33,
        49: 50,
        50: 51,
        109: 110,
        149: 150,
        150: 151,
        9999: 151,
    }.items():
        tokens = train_gpt.load_validation(tiny_config(data_path=str(tmp_path), val_tokens=wanted))
        assert (
            tokens.dtype == np.int64
            and np.array_equal(tokens, whole[:length])
            and len(tokens) == length
        )
    message = refusal(
        train_gpt.load_validation, tiny_config(data_path=str(tmp_path), val_tokens=31)
    )
    assert all(name in message for name in ("32 tokens", "VAL_TOKENS", "EVAL_SEQ_LEN=32"))


# ----------------------------------------------------------------------------------------------------------
# Tokenizer and bytes
# ----------------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    "  two leading spaces, two trailing  ",
    "tabs\tand\r\nline ends\n\n\n",
    "\ufeffa byte order mark",
    "e\u0301 is not é",
    "family: 👨‍👩‍👧‍👦, flags: 🇫🇷🇯🇵, skin: 👍🏽",
    "a null \0 and controls \x01\x7f\x85\u2028 inside",
    "\n",
    "🙂",
    "x",
    " ",
    "<s> </s> <unk> <0x41> are only text",
    "𐍈𝔘𝕟𝕚 \U0010ffff \ue000 \ufffd \ufffe",
    "Ünïcödé, καλημέρα κόσμε, Привет, мир! 你好，世界。こんにちは。",
    "नमस्ते مرحبا שלום",
]


@pytest.fixture(scope="module")
def texts():
    """Documents: Python's language reference and poem, and short ones of many scripts and oddities."""
    from pydoc_data import topics

    with contextlib.redirect_stdout(None):
        poem = importlib.import_module("this").s
    return [
        *list(dict(sorted(topics.topics.items())).values())[:30],
        codecs.decode(poem, "rot13"),
        *ODD_TEXTS,
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts):
    """(path of a SentencePiece model of 400 pieces, the same opened by sentencepiece, its TokenTable)."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_gpt.train_tokenizer(texts, 400, path)
    return (
        path,
        sentencepiece.SentencePieceProcessor(model_file=str(path)),
        load_tokenizer(path, 400)[0],
    )


@pytest.fixture(scope="module")
def stream(texts, tokenizer):
    """All documents as one validation stream, int64, each after BOS."""
    _, sp, table = tokenizer
    return np.array([t for text in texts for t in [table.bos_id, *sp.encode(text)]])


def test_count_is_the_length_of_the_text(texts, tokenizer, stream):
    """Document by document the counted bytes are the UTF-8 bytes of the text that went in; so is the sum."""
    _, sp, table = tokenizer
    for text in texts:
        tokens = np.array([table.bos_id, *sp.encode(text)])
        assert table.decode(tokens).decode() == text == sp.decode(tokens[1:].tolist())
        assert (
            table.count_bytes(tokens).sum()
            == len(text.encode())
            == train_gpt.audit_bytes(table, tokens)
        )
    assert train_gpt.audit_bytes(table, stream) == sum(len(text.encode()) for text in texts)


def test_table_is_the_models(tokenizer):
    """Pieces, kinds and BOS are SentencePiece's; runs of any normal pieces decode as SentencePiece decodes them."""
    path, sp, table = tokenizer
    assert len(table.pieces) == sp.vocab_size() == 400 and table.bos_id == sp.bos_id() == 1
    assert table.kinds == "UCC" + "B" * 256 + "N" * 141 and SPACE in table.pieces
    assert (
        list(table.pieces) == [sp.id_to_piece(i) for i in range(400)]
        and table.texts[3 + 0xE2] == b"\xe2"
    )
    assert (
        table.digest
        == load_tokenizer(path, 400)[0].digest
        != dataclasses.replace(table, bos_id=2).digest
    )
    for ids in np.random.default_rng(0).integers(259, 400, (300, 7)).tolist():
        tokens = np.array([1, *ids])
        assert table.decode(tokens).decode() == sp.decode(ids)
        assert table.count_bytes(tokens).sum() == len(sp.decode(ids).encode())


def test_no_tokenizer(tmp_path):
    """A missing file, a folder and a file of another kind name the setting and the path."""
    (tmp_path / "text.model").write_bytes(b"no model at all")
    for path in (tmp_path / "none.model", tmp_path, tmp_path / "text.model"):
        assert re.match(
            f"TOKENIZER_PATH: .*{re.escape(str(path))}", refusal(load_tokenizer, path, 400)
        )


GOLDEN_PIECES = {
    "<unk>": "U",
    "<s>": "C",
    "</s>": "C",
    "<0xE2>": "B",
    "<0x82>": "B",
    "<0xAC>": "B",
    "the": "N",
    "▁the": "N",
    "▁": "N",
    "▁▁": "N",
    "é": "N",
    "▁é": "N",
    "🙂": "N",
    "▁🙂": "N",
    "a▁b": "N",
    "▁a▁b": "N",
    "<mask>": "X",
    "<0x20>": "B",
}
GOLDEN = TokenTable(tuple(GOLDEN_PIECES), "".join(GOLDEN_PIECES.values()), 1)


@pytest.mark.parametrize(
    "pieces, counts, text",
    [
        ("<s> the the", [3, 3], "thethe"),
        ("<s> ▁the ▁the", [3, 4], "the the"),
        ("<s> ▁ ▁ ▁the", [0, 1, 4], "  the"),
        ("<s> ▁▁ ▁▁ the", [1, 2, 3], "   the"),
        ("<s> ▁ the ▁", [0, 3, 1], "the "),
        ("<s> <0xE2> <0x82> <0xAC> ▁the", [1, 1, 1, 4], "€ the"),
        ("<s> <0x20> ▁the", [1, 4], "  the"),
        ("<s> ▁é é ▁é", [2, 2, 3], "éé é"),
        ("<s> ▁🙂 🙂 ▁🙂", [4, 4, 5], "🙂🙂 🙂"),
        ("<s> a▁b ▁a▁b", [3, 4], "a b a b"),
        ("<s> ▁the <mask> ▁the", [3, 0, 3], "thethe"),
        ("<s> the <unk> ▁the ▁the", [3, 0, 3, 4], "thethe the"),
        ("<s> the </s> the", [3, 0, 3], "thethe"),
        ("<s> ▁the <s> ▁the", [3, 0, 3], "thethe"),
        ("<s> <s> ▁", [0, 0], ""),
    ],
)
def test_bytes_by_hand(pieces, counts, text):
    """No space after a boundary, one byte for a byte piece, nothing for control, unknown and unused pieces."""
    tokens = np.array([GOLDEN.pieces.index(p) for p in pieces.split()])
    assert GOLDEN.count_bytes(tokens).tolist() == counts
    assert GOLDEN.decode(tokens).decode() == text and sum(counts) == len(text.encode())


def counting(table, change):
    """`table` with other byte counts: change(base, leading, boundary, kinds) works on copies of its arrays."""
    wrong = dataclasses.replace(table)
    arrays = [a.copy() for a in table.byte_tables]
    change(*arrays, np.array(list(table.kinds)))
    decoder = dataclasses.replace(table)
    wrong.__dict__.update(byte_tables=tuple(arrays), decode=decoder.decode)
    return wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda base, leading, boundary, kinds: base.__iadd__(leading),
        lambda base, leading, boundary, kinds: base.__setitem__(kinds == "B", 3),
        lambda base, leading, boundary, kinds: base.__setitem__(kinds == "C", 3),
        lambda base, leading, boundary, kinds: base.__isub__(leading),
        lambda base, leading, boundary, kinds: boundary.__setitem__(1, False),
        lambda base, leading, boundary, kinds: leading.__setitem__(slice(None), False),
        lambda base, leading, boundary, kinds: base.__setitem__(399, base[399] + 1),
    ],
    ids=[
        "space twice",
        "U+FFFD for bytes",
        "bytes for BOS",
        "no base for a space",
        "space after BOS",
        "no spaces",
        "one piece",
    ],
)
def test_audit_refuses_wrong_counts(tokenizer, stream, change):
    """Spaces twice or never, byte pieces as U+FFFD, bytes for BOS, one piece off by one: no BPB comes out."""
    table = tokenizer[2]
    assert (stream == 399).any()
    message = refusal(train_gpt.audit_bytes, counting(table, change), stream)
    assert re.match(r"validation document at token \d+: \d+ bytes counted, \d+ decoded", message)
    train_gpt.audit_bytes(counting(table, lambda *arrays: None), stream)


def test_audit_asks_sentencepiece(tokenizer, stream, texts):
    """A table that is wrong in itself counts what it prints; SentencePiece's own decoder finds it out."""
    _, sp, table = tokenizer
    wrong = dataclasses.replace(table, kinds=table.kinds.replace("B", "N"))
    assert train_gpt.audit_bytes(wrong, stream) > train_gpt.audit_bytes(table, stream, sp.decode)
    assert train_gpt.audit_bytes(table, stream, sp.decode) == sum(
        len(text.encode()) for text in texts
    )
    assert "bytes counted" in refusal(train_gpt.audit_bytes, wrong, stream, sp.decode)


def test_audit_refuses_foreign_streams(tokenizer, stream):
    """A stream without BOS at its start, or with bytes that are no UTF-8 before its end, is of another tokenizer."""
    table = tokenizer[2]
    for bad in (stream[1:], stream[stream != 1], np.array([5, 1, 300])):
        assert "must start with BOS (id 1)" in refusal(train_gpt.audit_bytes, table, bad)
    byte, plain = (lambda b: 3 + b), table.pieces.index("e")
    for middle in ([0xE2, plain - 3], [0x82], [0xE2, 0x82], [0xFF], [0xC0, 0x80]):
        bad = np.array([1, plain, 1, plain, *map(byte, middle), 1, plain])
        assert refusal(train_gpt.audit_bytes, table, bad).startswith(
            "validation document at token 2"
        )
    for last in ([byte(0xE2), plain], [byte(0x82)], [byte(0xFF)]):
        assert "at token 2" in refusal(train_gpt.audit_bytes, table, np.array([1, plain, 1, *last]))


def test_audit_accepts_a_cut_inside_a_character(tokenizer):
    """Of a stream that ends anywhere in a text of emoji every prefix has the bytes that it prints."""
    _, sp, table = tokenizer
    text = "é🙂 \U0010ffff"
    tokens = np.array([1, *sp.encode("first"), 1, *sp.encode(text)])
    first, cuts_inside = len(sp.encode("first")) + 2, 0
    for stop in range(first, len(tokens) + 1):
        printed = table.decode(tokens[first - 1 : stop])
        assert train_gpt.audit_bytes(table, tokens[:stop]) == 5 + len(printed)
        cuts_inside += len(printed.decode(errors="ignore").encode()) < len(printed)
    assert cuts_inside >= 3 and printed.decode() == text


# ----------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------

FIELDS = {f.name.upper(): f for f in dataclasses.fields(Config)}
NAMES = """
    PRESET DEVICE DATA_PATH TOKENIZER_PATH RUN_ID SEED ARTIFACT_PATH LOG_DIR VAL_TOKENS SIZE_LIMIT_BYTES
    ITERATIONS MAX_WALLCLOCK_SECONDS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN EVAL_SEQ_LEN EVAL_STRIDE WARMUP_STEPS
    WARMDOWN_ITERS
    VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT XSA_LAST_N ROPE_DIMS BIGRAM_VOCAB_SIZE BIGRAM_DIM
    VE_LAYERS VRL_ENABLED LOGIT_SOFTCAP QK_GAIN_INIT
    MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_MOMENTUM MUON_WD ADAM_WD GRAD_CLIP_NORM EMA_DECAY SWA_ENABLED SWA_EVERY
    QAT_ENABLED LATE_QAT_THRESHOLD COMPLEMENT_ALPHA
    TTT_ENABLED TTT_SCHEDULE_CHUNKS TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS TTT_TEMPERATURE POLYAK_DECAY
    MIXER NGRAM_ORDER NGRAM_RECENT MIN_COUNT ALPHA_BASE ALPHA_RANGE ALPHA_CENTER""".split()


def from_env(stored=None, **environ):
    """config_from_env of these variables, in capitals, among those of an ordinary shell under torchrun."""
    shell = dict(
        PATH="/bin",
        HOME="/",
        LANG="C.UTF-8",
        OMP_NUM_THREADS="1",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT="29500",
        TORCHELASTIC_RUN_ID="none",
        CUDA_VISIBLE_DEVICES="0",
        SHELL="/bin/sh",
        LOGNAME="x",
        USER="x",
        TERM="xterm",
        CI="1",
        SEEDS="1 2 3",
        TMPDIR="/tmp",
    )
    return train_gpt.config_from_env({**shell, **environ}, stored)


def test_every_documented_setting_exists():
    """The names that others script against are all there, each with a line of documentation and a group."""
    assert set(NAMES) <= set(FIELDS)
    assert all(
        f.metadata["doc"] and f.metadata["group"] in ("run", "train", "model", "eval")
        for f in FIELDS.values()
    )


def test_presets():
    """Each preset is a valid Config; none means record, whose values are the defaults; a variable overrides it."""
    assert from_env() == Config() and set(train_gpt.PRESETS) == {"record", "bench", "demo"}
    for preset, changes in train_gpt.PRESETS.items():
        cfg = from_env(PRESET=preset)
        assert cfg == Config(preset=preset, **changes)
        changed = from_env(PRESET=preset, VAL_TOKENS="77", TTT_LR="2e-3")
        assert changed == dataclasses.replace(cfg, val_tokens=77, ttt_lr=2e-3)
        assert (
            cfg.artifact == cfg.run_dir / "model.int6.lzma"
            and cfg.run_dir.name == f"{preset}_seed1337"
        )
    cfg = from_env(RUN_ID="mine", LOG_DIR="there", ARTIFACT_PATH="a.lzma")
    assert (str(cfg.run_dir), str(cfg.artifact)) == (os.path.join("there", "mine"), "a.lzma")


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_parses_as_it_is_shown(name):
    """The text in which a setting is shown in help and logs reads back as the same value and type."""
    default = FIELDS[name].default
    value = train_gpt.parse_setting(FIELDS[name], str(default))
    assert value == default and type(value) is type(default)
    if isinstance(default, bool):
        assert [train_gpt.parse_setting(FIELDS[name], text) for text in "01"] == [False, True]


@pytest.mark.parametrize(
    "setting, allowed",
    [
        ("ITERATIONS=many", "a whole number"),
        ("ITERATIONS=1.5", "a whole number"),
        ("ITERATIONS=", "a whole number"),
        ("SEED=0x10", "a whole number"),
        ("MATRIX_LR=fast", "a finite number"),
        ("MATRIX_LR=nan", "a finite number"),
        ("TTT_LR=inf", "a finite number"),
        ("TTT_ENABLED=yes", "0 or 1"),
        ("SWA_ENABLED=2", "0 or 1"),
        ("QAT_ENABLED=", "0 or 1"),
        ("PRESET=fast", "record, bench, demo"),
        ("DEVICE=tpu", "auto, cuda, cpu"),
        ("MIXER=magic", "entropy, none"),
        ("ITERATIONS=0", "at least 1"),
        ("SEED=-1", "at least 0"),
        ("MATRIX_LR=-0.1", "at least 0"),
        ("VAL_TOKENS=-5", "at least 0"),
        ("NGRAM_ORDER=1", "at least 2"),
        ("TTT_TEMPERATURE=0.0", "at least 0.001"),
        ("LOG_EVERY=0", "at least 1"),
        ("MODEL_DIM=500", "a multiple of NUM_HEADS=8"),
        ("NUM_HEADS=16 NUM_KV_HEADS=3", "a multiple of NUM_KV_HEADS=3"),
        ("TRAIN_BATCH_TOKENS=3000", "a multiple of TRAIN_SEQ_LEN=2048"),
        ("MICRO_BATCH_TOKENS=3000", "a multiple of TRAIN_SEQ_LEN=2048"),
        ("EVAL_SEQ_LEN=1000", "a multiple of EVAL_STRIDE=64"),
        ("TTT_CHUNK_TOKENS=3000", "a multiple of EVAL_SEQ_LEN=2048"),
        ("ROPE_DIMS=15", "even"),
        ("ROPE_DIMS=66", "at most 64"),
        ("VE_LAYERS=11", "below NUM_LAYERS=11"),
        ("VE_LAYERS=9;10", "comma-separated"),
        ("VE_LAYERS=-1", "comma-separated"),
        ("XSA_LAST_N=12", "at most 11"),
        ("TTT_FREEZE_BLOCKS=12", "at most 11"),
        ("COMPLEMENT_ALPHA=1.5", "at most 1"),
        ("EMA_DECAY=1.0", "at most 0.99"),
        ("POLYAK_DECAY=1.0", "at most 0.99"),
        ("MIN_COUNT=17", "at most 4"),
        ("ALPHA_RANGE=0.8 ALPHA_BASE=0.5", "at most 0.5"),
        ("VOCAB_SIZE=70000", "at most 65536"),
        ("VOCAB_SIZE=70000 MIXER=none", "at most 65536"),
        ("EVAL_STRIDE=1 EVAL_SEQ_LEN=2", "known"),
    ],
)
def test_bad_settings(setting, allowed):
    """A value that cannot be read or cannot be meant: the message has the variable, the value, what is allowed."""
    environ = dict(pair.split("=") for pair in setting.split())
    message = refusal(from_env, kind=UsageError, **environ)
    name, value = setting.split()[0].split("=")
    assert re.match(rf"{name}='?{value}'?: ", message) and allowed in message


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("ALPHA_BAES", "ALPHA_BASE"),
        ("ITERATION", "ITERATIONS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("MODELDIM", "MODEL_DIM"),
        ("TTT_EPOCH", "TTT_EPOCHS"),
        ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
        ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("COMPLEMENT_ALHPA", "COMPLEMENT_ALPHA"),
        ("MAX_WALL_CLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"),
    ],
)
def test_near_misses(typo, meant):
    """A variable one slip away from a setting is an error that says both names."""
    message = refusal(from_env, kind=UsageError, **{typo: "1"})
    assert message.startswith(typo) and re.search(rf"\b{meant}\b", message)


def test_environment_against_an_artifact():
    """The artifact's settings beat the preset's; variables beat both, except for what the weights fix."""
    cfg = tiny_config(seed=5, ttt_lr=0.004)
    stored = unpacked(train_gpt.pack_artifact(warm_model(cfg), cfg, tiny_table(), 8.0))[0]
    plain = from_env(stored)
    assert (plain.preset, plain.model_dim, plain.ttt_lr, plain.seed) == ("bench", 32, 0.004, 5)
    assert (
        plain.val_tokens == train_gpt.PRESETS["bench"]["val_tokens"]
    )  # a setting of the machine, not of the file
    other = from_env(stored, PRESET="demo", TTT_EPOCHS="1", EVAL_STRIDE="16", MODEL_DIM="32")
    assert (other.preset, other.val_tokens, other.model_dim) == (
        "demo",
        train_gpt.PRESETS["demo"]["val_tokens"],
        32,
    )
    assert (other.ttt_epochs, other.eval_stride, other.ttt_lr) == (1, 16, 0.004)
    conflicts = [
        ("MODEL_DIM", "64", "32"),
        ("VE_LAYERS", "3", "2,3"),
        ("LOGIT_SOFTCAP", "29.5", "30.0"),
        ("VRL_ENABLED", "0", "True"),
        ("TRAIN_SEQ_LEN", "64", "32"),
    ]
    for name, value, stored_value in conflicts:
        message = refusal(from_env, stored, kind=UsageError, **{name: value})
        assert message.startswith(f"{name}=") and stored_value in message
    assert "EVAL_STRIDE" in refusal(from_env, stored, kind=UsageError, EVAL_STRIDE="5")


def test_settings_of_another_version():
    """An artifact with a setting that this script does not have is refused, and the setting is named."""
    stored = dict(preset="bench", seed=1, warp_drive=1)
    assert "warp_drive" in refusal(train_gpt.config_from_env, {}, stored)


# ----------------------------------------------------------------------------------------------------------
# Results of several seeds
# ----------------------------------------------------------------------------------------------------------


def write_results(folder, seed, val_bpb, **changes):
    """The path of a results.json as a run of `seed` writes it."""
    settings = dict(
        preset=changes.get("preset", "record"),
        mixer=changes.get("mixer", "entropy"),
        ttt_lr=changes.get("ttt_lr", 1e-4),
        log_dir=f"logs{seed}",
        seed=seed,
    )
    artifact = dict(
        total_bytes=15_000_000 + seed,
        code_bytes=90_000,
        limit_bytes=changes.get("limit", 16_000_000),
    )
    run = dict(
        seed=seed,
        val_bpb=val_bpb,
        settings=settings,
        artifact=artifact,
        environment=dict(device="cuda"),
        stages=[
            dict(name="pre_quant", val_loss=9.0, val_bpb=9.0, tokens=1),
            dict(
                name=changes.get("stage", "mixer"),
                val_loss=2 * val_bpb,
                val_bpb=val_bpb,
                tokens=changes.get("tokens", 1000),
            ),
        ],
    )
    path = folder / f"results{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(run))
    return str(path)


def test_summary_of_three_seeds(tmp_path):
    """Means, the sample's standard deviation, the largest file, each seed; what the author wrote is kept."""
    out = tmp_path / "submission.json"
    out.write_text(
        json.dumps(
            dict(author="Ann", github_id="ann", name="A run", blurb="How.", val_bpb=9, junk=1)
        )
    )
    bpb = {1337: 1.10, 42: 1.13, 2024: 1.12}
    summary = train_gpt.summarize([write_results(tmp_path, s, b) for s, b in bpb.items()], str(out))
    assert (
        json.loads(out.read_text()) == summary
        and "warning" not in summary
        and "junk" not in summary
    )
    assert summary["val_bpb"] == pytest.approx(3.35 / 3) and summary["val_loss"] == pytest.approx(
        2 * 3.35 / 3
    )
    assert (
        summary["val_bpb_std"]
        == pytest.approx(statistics.stdev(bpb.values()))
        == pytest.approx(0.0152753, rel=1e-5)
    )
    assert (summary["bytes_total"], summary["bytes_code"]) == (15_002_024, 90_000)
    assert summary["seeds"] == {
        str(s): dict(val_loss=2 * b, val_bpb=b, bytes_total=15_000_000 + s) for s, b in bpb.items()
    }
    assert [summary[n] for n in ("author", "github_id", "name", "blurb")] == [
        "Ann",
        "ann",
        "A run",
        "How.",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"]) and summary["stage"] == "mixer"


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_marked(tmp_path, seeds):
    """One or two seeds are summarized with a warning; one has no deviation; the author's fields are there, empty."""
    paths = [write_results(tmp_path, seed, 1.1 + seed) for seed in range(seeds)]
    summary = train_gpt.summarize(paths, str(tmp_path / "submission.json"))
    assert "3" in summary["warning"] and summary["author"] == ""
    assert summary["val_bpb_std"] == (None if seeds == 1 else pytest.approx(0.5**0.5))


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(preset="bench"), "differ in PRESET"),
        (dict(stage="ttt", mixer="none"), "MIXER, STAGE"),
        (dict(tokens=999), "differ in VAL_TOKENS"),
        (dict(seed=1), "same seed"),
        (dict(stage="ttt"), "ends at ttt"),
        (dict(limit=14_000_000), "over cap"),
        (dict(ttt_lr=2e-4), "differ in TTT_LR"),
    ],
)
def test_results_that_cannot_be_averaged(tmp_path, change, word):
    """Other presets, stages or texts, one seed twice, a run cut short or over the cap: refused, nothing written."""
    good = write_results(tmp_path, 1, 1.1)
    other = write_results(tmp_path, change.pop("seed", 2), 1.2, **change)
    assert word in refusal(train_gpt.summarize, [good, other], str(tmp_path / "submission.json"))
    assert not (tmp_path / "submission.json").exists()


@pytest.mark.parametrize(
    "contents",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'"text"',
        b"null",
        b"lower",
        b'{"seed": 1, "val_bpb": 1, "stages": [], "artifact": {}, "settings": {}, "environment": {}}',
    ],
)
def test_files_that_are_no_results(tmp_path, contents):
    """A missing, foreign, empty or unfinished results.json is named, also beside a good one."""
    good, bad = write_results(tmp_path, 1, 1.1), tmp_path / "bad.json"
    if contents is not None:
        bad.write_bytes(contents)
    assert str(bad) in refusal(
        train_gpt.summarize, [good, str(bad)], str(tmp_path / "submission.json")
    )


@pytest.mark.parametrize("contents", [b"", b"{broken", b"[1]", b"\xff"])
def test_a_broken_submission_is_not_overwritten(tmp_path, contents):
    """The author's file, if it is no JSON object, is named in an error and left as it is."""
    out = tmp_path / "submission.json"
    out.write_bytes(contents)
    assert str(out) in refusal(train_gpt.summarize, [write_results(tmp_path, 1, 1.1)], str(out))
    assert out.read_bytes() == contents


# ----------------------------------------------------------------------------------------------------------
# Texts to shards
# ----------------------------------------------------------------------------------------------------------


def tokenize(folder, *files, vocab_size=400, tokenizer_path=None):
    """Run `tokenize` into folder/shards; returns the arguments of the environment it ran in."""
    environ = dict(
        VOCAB_SIZE=str(vocab_size), TOKENIZER_PATH=str(tokenizer_path or folder / "new.model")
    )
    train_gpt.dispatch(["tokenize", str(folder / "shards"), *map(str, files)], environ)
    return environ


def jsonl(texts):
    """Documents as lines of JSON, escaped in every second one, with a blank line between."""
    return "\n\n".join(
        json.dumps(dict(id=i, text=t), ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)
    ).encode()


def decoded(folder, split, table):
    """The documents of all shards of a split."""
    names = sorted((folder / "shards").glob(f"fineweb_{split}_*"))
    tokens = np.concatenate([train_gpt.read_shard(n, len(table.pieces)) for n in names])
    assert tokens[0] == table.bos_id
    parts = np.split(tokens, np.flatnonzero(tokens == table.bos_id)[1:])
    return [table.decode(part).decode() for part in parts]


def test_tokenize_loses_nothing(tmp_path, texts, monkeypatch, capsys):
    """Documents of all three kinds of file come back from the shards letter for letter; validation is chosen by
    the text's checksum."""
    monkeypatch.setattr(train_gpt, "SHARD_TOKENS", 20_001)  # several shards
    plain, many = texts[:12] + ODD_TEXTS, texts[12:20]
    prose = "\n\n".join(texts[20:31]) + "\r\n\r\nend without a line end"
    (tmp_path / "a.jsonl").write_bytes(jsonl(plain))
    frames = [zstandard.compress(jsonl(half) + b"\n") for half in (many[:3], many[3:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "c.txt").write_bytes(prose.encode())
    environ = tokenize(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst", tmp_path / "c.txt")
    table = load_tokenizer(environ["TOKENIZER_PATH"], int(environ["VOCAB_SIZE"]))[0]
    train, val = (decoded(tmp_path, split, table) for split in ("train", "val"))
    cut = list(train_gpt.read_documents(str(tmp_path / "c.txt")))
    expected = [t for t in plain + many if t.strip()] + cut
    assert "".join(cut) == prose and len(cut) > 5 and sorted(train + val) == sorted(expected)
    held = [zlib.crc32(d.encode()) % 20 == 0 for d in expected]
    assert val == [d for d, h in zip(expected, held) if h] and train == [
        d for d, h in zip(expected, held) if not h
    ]
    assert 0 < len(val) < len(train) / 4
    assert len(list((tmp_path / "shards").iterdir())) > 4
    cfg = from_env(DATA_PATH=str(tmp_path / "shards"), **environ)
    tokens = train_gpt.load_validation(dataclasses.replace(cfg, eval_seq_len=64))
    assert train_gpt.audit_bytes(table, tokens) == sum(len(text.encode()) for text in val)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"DATA_PATH={tmp_path / 'shards'} TOKENIZER_PATH={tmp_path / 'new.model'} VOCAB_SIZE=400"
        in last
    )


def test_tokenize_takes_a_tokenizer_that_exists(tmp_path, texts, tokenizer):
    """An existing model is used and left alone; one of another size is refused with both sizes."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:5]))
    path, before = tokenizer[0], tokenizer[0].read_bytes()
    message = refusal(tokenize, tmp_path, tmp_path / "a.jsonl", vocab_size=500, tokenizer_path=path)
    assert "VOCAB_SIZE=500" in message and "400 pieces" in message and str(path) in message
    assert not (tmp_path / "shards").exists()
    tokenize(tmp_path, tmp_path / "a.jsonl", tokenizer_path=path)
    train, val = (decoded(tmp_path, split, tokenizer[2]) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts[:5])
    assert path.read_bytes() == before


def test_tokenize_refuses_what_would_mislead(tmp_path, texts):
    """A vocabulary too large or too small for the text, a single document, a folder with other shards: all told."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"]))
    for size, way_out in ((4000, "lower"), (260, "raise")):
        message = refusal(tokenize, tmp_path, tmp_path / "a.jsonl", vocab_size=size)
        assert f"VOCAB_SIZE={size}" in message and way_out in message
    assert not (tmp_path / "new.model").exists()
    (tmp_path / "b.txt").write_text("a single document")
    assert "two documents" in refusal(tokenize, tmp_path, tmp_path / "b.txt")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "fineweb_train_000007.bin").write_bytes(GOOD_SHARD)
    (tmp_path / "c.jsonl").write_bytes(jsonl(texts[:5]))
    assert str(tmp_path / "shards") in refusal(tokenize, tmp_path, tmp_path / "c.jsonl")


GOOD_LINES = jsonl(["one", "two"]) + b"\n"  # three lines


@pytest.mark.parametrize(
    "name, contents, where",
    [
        ("a.jsonl", GOOD_LINES + b"{broken\n", "line 4"),
        ("a.jsonl", GOOD_LINES + b'{"body": "x"}\n', "line 4"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2"),
        ("a.jsonl", b'["text"]\n', "line 1"),
        ("a.jsonl", b"null", "line 1"),
        ("a.jsonl", GOOD_LINES + b'{"text": "caf\xe9"}\n', "line 4"),
        ("a.jsonl", GOOD_LINES + b'{"text": "\\ud800"}\n', "line 4"),
        ("a.txt", b"one\ntwo\ncaf\xe9\n", "line 3"),
        ("a.jsonl.zst", zstandard.compress(GOOD_LINES + b"{broken\n"), "line 4"),
        ("a.jsonl.zst", GOOD_LINES, "cannot read"),
        ("a.jsonl.zst", zstandard.compress(GOOD_LINES)[:-4], "cannot read"),
        ("a.jsonl", None, "cannot read"),
        ("a.txt", "folder", "cannot read"),
    ],
    ids=[
        "no JSON",
        "no text",
        "text is a number",
        "a list",
        "null",
        "no UTF-8",
        "half a surrogate",
        "txt, no UTF-8",
        "zst, no JSON",
        "no zst",
        "cut zst",
        "missing",
        "folder",
    ],
)
def test_malformed_texts(tmp_path, name, contents, where):
    """A file that cannot be read whole as text is named, with the line where there is one; nothing is written."""
    path, good = tmp_path / name, tmp_path / "good.jsonl"
    good.write_bytes(GOOD_LINES)
    if contents == "folder":
        path.mkdir()
    elif contents is not None:
        path.write_bytes(contents)
    message = refusal(tokenize, tmp_path, good, path)
    assert str(path) in message and where in message
    assert not (tmp_path / "shards").exists() and not (tmp_path / "new.model").exists()


def test_unknown_kinds_of_text(tmp_path):
    """A name with another ending is bad usage, found before anything is read."""
    for name in ("a.parquet", "a.zst", "a.bin"):
        assert name in refusal(
            tokenize, tmp_path, tmp_path / "missing.txt", tmp_path / name, kind=UsageError
        )
