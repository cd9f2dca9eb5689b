"""Shards, the streams that are made of them, and the texts that shards are made of."""

import hashlib
import itertools
import json
import os
import queue
import struct
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from conftest import ODD_TEXTS, VOCAB, refusal, tiny_config, tiny_stream, write_shards

import train_gpt
from train_gpt import Runtime, UsageError, load_held_out, read_shard, shard_bytes, train_stream

GOOD_SHARD = shard_bytes(np.arange(VOCAB, dtype=np.uint16))


# ---- Shards --------------------------------------------------------------------------------------


def test_shard_has_the_official_layout():
    """A header of 1,024 bytes with magic, version and count; then the tokens, two bytes each."""
    tokens = np.random.default_rng(0).integers(0, 65_536, 3001).astype(np.uint16)
    data = shard_bytes(tokens)
    assert len(data) == 1024 + 2 * 3001
    assert struct.unpack("<3i", data[:12]) == (20240520, 1, 3001)
    assert not any(data[12:1024])
    assert struct.unpack("<3001H", data[1024:]) == tuple(tokens.tolist())


@pytest.mark.parametrize("ending", [".bin", ".bin.zst"])
def test_shard_comes_back_from_its_file(tmp_path, ending):
    """Every token, plain or compressed."""
    tokens = np.random.default_rng(0).integers(0, 65_536, 3001).astype(np.uint16)
    path = tmp_path / f"x{ending}"
    data = shard_bytes(tokens)
    path.write_bytes(zstandard.compress(data) if ending == ".bin.zst" else data)
    assert np.array_equal(read_shard(path, 65_536), tokens)


NAME = bytes(range(1, 33))  # a tokenizer's digest
NAMED_SHARD = shard_bytes(np.arange(VOCAB, dtype=np.uint16), NAME)


def test_shard_of_a_known_tokenizer_has_its_digest_and_a_checksum():
    """In the header's unused integers; official readers see the same tokens in the same places."""
    body = GOOD_SHARD[1024:]
    assert NAMED_SHARD[:12] + bytes(1012) + NAMED_SHARD[1024:] == GOOD_SHARD
    assert NAMED_SHARD[12:44] == NAME
    assert struct.unpack("<I", NAMED_SHARD[44:48]) == (zlib.crc32(NAME + body),)
    assert not any(NAMED_SHARD[48:1024])


def test_no_corruption_of_a_shard_is_accepted(tmp_path):
    """One to four other bytes anywhere, a cut, bytes too many: each is found."""
    random = np.random.default_rng(0)
    path = tmp_path / "fineweb_val_000000.bin"
    for kind in range(1000):
        data = bytearray(NAMED_SHARD)
        # Half of the damage is among the bytes that mean something.
        most = len(data) if kind % 2 else 48
        for place in random.integers(0, most, 1 + kind % 4):
            data[place] ^= random.integers(1, 256)
        if kind % 10 == 0:
            data = data[: random.integers(0, len(data))]
        if kind % 10 == 1:
            data += random.bytes(1 + kind % 7)
        if data != NAMED_SHARD:
            path.write_bytes(data)
            assert str(path) in refusal(read_shard, path, 65_536)


def test_official_shard_with_a_word_in_its_header_is_refused(tmp_path):
    """What should be zeros would be a tokenizer's name, and the checksum is missing."""
    path = tmp_path / "x.bin"
    path.write_bytes(with_header(3, 1))
    assert "corrupt" in refusal(read_shard, path, VOCAB)


@pytest.mark.parametrize("ending", [".bin", ".bin.zst"])
@pytest.mark.parametrize("most", [1, 100, 2999, 3000, 5000])
def test_beginning_of_a_shard(tmp_path, monkeypatch, ending, most):
    """At most as many tokens as are asked for."""
    monkeypatch.setattr(train_gpt, "CHUNK_BYTES", 64)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 3000).astype(np.uint16)
    data = shard_bytes(tokens, NAME)
    path = tmp_path / f"x{ending}"
    path.write_bytes(zstandard.compress(data) if ending == ".bin.zst" else data)
    np.testing.assert_array_equal(read_shard(path, VOCAB, 1024 + 2 * most), tokens[:most])


def test_end_of_a_shard_is_not_looked_at(tmp_path, monkeypatch):
    """Where only its beginning is asked for, a missing end is not found."""
    monkeypatch.setattr(train_gpt, "CHUNK_BYTES", 64)
    path = tmp_path / "x.bin"
    path.write_bytes(NAMED_SHARD[:-2])
    assert len(read_shard(path, VOCAB, 1024 + 40)) == 20
    assert "truncated" in refusal(read_shard, path, VOCAB, 1024 + 2 * VOCAB)


def with_header(place, value):
    """Return GOOD_SHARD with another number in its header."""
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
    "unknown id": shard_bytes([1, 2, VOCAB, 3]),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
@pytest.mark.parametrize("ending", [".bin", ".bin.zst"])
def test_bad_shard_is_refused(tmp_path, fault, ending):
    """Whatever is wrong with it, plain or compressed, the file is named."""
    path = tmp_path / f"fineweb_val_000000{ending}"
    data = BAD_SHARDS[fault]
    path.write_bytes(zstandard.compress(data) if ending == ".bin.zst" else data)
    assert str(path) in refusal(read_shard, path, VOCAB)


def test_foreign_token_is_refused_with_the_vocabulary(tmp_path):
    """The setting that may be wrong is named."""
    path = tmp_path / "x.bin"
    path.write_bytes(BAD_SHARDS["unknown id"])
    assert f"VOCAB_SIZE={VOCAB}" in refusal(read_shard, path, VOCAB)


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
def test_corrupt_compression_is_refused(tmp_path, damage):
    """A compressed shard that is cut, foreign, padded or damaged is named."""
    path = tmp_path / "fineweb_train_000000.bin.zst"
    compressed = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD_SHARD)
    path.write_bytes(damage(compressed))
    assert str(path) in refusal(read_shard, path, VOCAB)


def test_missing_shard_is_named(tmp_path):
    """A shard that is gone, as a plain file or a compressed one."""
    assert "gone.bin" in refusal(read_shard, tmp_path / "gone.bin", VOCAB)
    assert "gone.bin.zst" in refusal(read_shard, tmp_path / "gone.bin.zst", VOCAB)


@pytest.mark.parametrize("name", ["", "none", "with [brackets]*"])
def test_folder_without_shards_is_told_with_a_way_out(tmp_path, name):
    """The setting, the folder, the preset that needs none; training shards are no validation."""
    (tmp_path / "fineweb_train_000000.bin").write_bytes(GOOD_SHARD)
    folder = tmp_path / name
    message = refusal(train_gpt.list_shards, tiny_config(data_path=str(folder)), "val")
    assert message.startswith("DATA_PATH")
    assert str(folder) in message
    assert "PRESET=demo" in message


def folder_of(folder, *names):
    """Return a Config whose DATA_PATH is `folder`, with empty files of these names in it."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return tiny_config(data_path=str(folder))


def test_shards_are_listed_in_order(tmp_path):
    """Sorted by number; a plain file wins over its compressed twin; other files do not matter."""
    names = [
        "fineweb_val_000002.bin",
        "fineweb_val_000000.bin.zst",
        "fineweb_val_000001.bin",
        "fineweb_val_000001.bin.zst",
        "fineweb_train_000000.bin",
        "fineweb_1024_bpe.model",
        "manifest.json",
        "notes.txt",
    ]
    cfg = folder_of(tmp_path / "a[b]", *names)
    listed = [os.path.basename(path) for path in train_gpt.list_shards(cfg, "val")]
    endings = ["000000.bin.zst", "000001.bin", "000002.bin"]
    assert listed == [f"fineweb_val_{ending}" for ending in endings]


@pytest.mark.parametrize(
    "name",
    [
        "fineweb_val_000000 (1).bin",
        "fineweb_val_000000.bin.bak",
        "fineweb_val_000000.bin.tmp7",
        "fineweb_val_000000.bin.zst.zst",
        "fineweb_val_0000000.bin",
        "fineweb_val_00001.bin",
        "fineweb_val_00000\u0661.bin",
        "fineweb_val_000000_copy.bin",
        "fineweb_val_extra.bin.zst",
        "fineweb_valid_000001.bin",
        ".fineweb_val_000001.bin.part",
        "Copy of fineweb_val_000000.bin",
        "val_000001.bin",
    ],
)
def test_other_file_that_looks_like_a_shard_is_refused(tmp_path, name):
    """A copy, a remnant or another scheme of names beside the shards: the file is named."""
    cfg = folder_of(tmp_path, "fineweb_val_000000.bin", name)
    message = refusal(train_gpt.list_shards, cfg, "val")
    shown = name.removesuffix(".zst")
    assert message.startswith(f"DATA_PATH: {tmp_path} has {shown} where fineweb_val_")


@pytest.mark.parametrize("numbers, missing", [([1], 0), ([0, 2], 1), ([0, 1, 2, 4, 6], 3)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_gap_in_the_numbers_is_refused(tmp_path, split, numbers, missing):
    """The first shard that is not there is named."""
    cfg = folder_of(tmp_path, *(f"fineweb_{split}_{number:06d}.bin" for number in numbers))
    message = refusal(train_gpt.list_shards, cfg, split)
    assert f"where fineweb_{split}_{missing:06d}.bin is expected" in message


def test_what_a_killed_writer_leaves_is_no_shard(tmp_path, monkeypatch):
    """It does not stop the next command."""
    cfg = folder_of(tmp_path, "fineweb_val_000000.bin")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: None)
        patch.setattr(Path, "unlink", lambda *args, **how: None)
        train_gpt.write_atomically(tmp_path / "fineweb_val_000001.bin", GOOD_SHARD)
    assert len(os.listdir(tmp_path)) == 2
    assert len(train_gpt.list_shards(cfg, "val")) == 1


def test_shards_of_the_other_split_do_not_matter(tmp_path):
    """Whoever only evaluates needs no training shards, nor all of them."""
    cfg = folder_of(tmp_path, "fineweb_val_000000.bin", "fineweb_train_000003.bin")
    assert len(train_gpt.list_shards(cfg, "val")) == 1


# ---- Shards and tokenizer ------------------------------------------------------------------------


def encoded(texts, tokenizer):
    """Return the shard tokens of texts, uint16, each after BOS."""
    _, sp, table = tokenizer
    ids = [token for text in texts for token in (table.bos_id, *sp.encode(text))]
    return np.array(ids, dtype=np.uint16)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory, texts):
    """Like `tokenizer`, of the same size, trained on every second of its texts."""
    path = tmp_path_factory.mktemp("other") / "other.model"
    train_gpt.train_tokenizer(texts[::2], 400, path)
    table, sp = train_gpt.load_tokenizer(path, 400)
    return path, sp, table


def test_right_tokenizer_gives_all_tokens_back(texts, tokenizer):
    """From the start of the documents, from within one, and cut anywhere."""
    tokens = encoded(texts, tokenizer)
    whole = train_gpt.share_returned(tokenizer[1], tokens)
    assert whole == 1.0
    for start, stop in ((0, 5000), (1234, 9876), (777, len(tokens))):
        assert train_gpt.share_returned(tokenizer[1], tokens[start:stop]) > 0.995


def test_similar_tokenizer_gives_few_tokens_back(texts, tokenizer, other_tokenizer):
    """Of each document at most the beginning."""
    assert train_gpt.share_returned(other_tokenizer[1], encoded(texts, tokenizer)) < 0.2
    assert train_gpt.share_returned(tokenizer[1], encoded(texts, other_tokenizer)) < 0.2


def test_tokens_without_any_beginning_are_no_evidence(tokenizer):
    """A part of one long document says nothing."""
    assert train_gpt.share_returned(tokenizer[1], np.array([300, 301, 302])) == 1.0


def check(tmp_path, tokenizer, shards, sp=True):
    """Run check_shards over tmp_path/0.bin, 1.bin, ... with these contents."""
    paths = [tmp_path / f"{number}.bin" for number in range(len(shards))]
    for path, data in zip(paths, shards):
        (tmp_path / path).write_bytes(data)
    return train_gpt.check_shards(paths, tokenizer[2], tokenizer[1] if sp else None)


@pytest.mark.parametrize("named", [True, False], ids=["named", "official"])
def test_shards_of_the_right_tokenizer_are_taken(tmp_path, texts, tokenizer, named):
    """By its digest, or by evidence; the answer tells shards apart."""
    maker = tokenizer[2].digest if named else bytes(32)
    shards = [shard_bytes(encoded(part, tokenizer), maker) for part in (texts[:9], texts[9:])]
    digests = check(tmp_path, tokenizer, shards)
    assert list(digests.values()) == ["0.bin", "1.bin"]


@pytest.mark.parametrize("named", [True, False], ids=["named", "official"])
def test_shards_of_another_tokenizer_are_refused(
    tmp_path, texts, tokenizer, other_tokenizer, named
):
    """Of the same size, after a shard that is right: the file and the settings are named."""
    tables = [t[2] for t in (tokenizer, other_tokenizer)]
    makers = [t.digest if named else bytes(32) for t in tables]
    good = shard_bytes(encoded(texts[:9], tokenizer), makers[0])
    bad = shard_bytes(encoded(texts[9:], other_tokenizer), makers[1])
    message = refusal(check, tmp_path, tokenizer, [good, bad])
    assert message.startswith(f"DATA_PATH: {tmp_path / '1.bin'} was made with another tokenizer")
    assert "TOKENIZER_PATH" in message


def test_digest_alone_refuses_another_tokenizer(tmp_path, texts, tokenizer, other_tokenizer):
    """Without a processor, as when only the artifact's table is there, shards' own word counts."""
    tokens = encoded(texts, other_tokenizer)
    named = shard_bytes(tokens, other_tokenizer[2].digest)
    assert "another tokenizer" in refusal(check, tmp_path, tokenizer, [named], sp=False)
    assert check(tmp_path, tokenizer, [shard_bytes(tokens)], sp=False)


def test_compressed_shards_are_told_like_plain_ones(tmp_path, texts, tokenizer, other_tokenizer):
    """By the digest in the header of a shard whose first compressed block is yet to end."""
    tokens = np.tile(encoded(texts, other_tokenizer), 40)[:200_000]
    data = shard_bytes(tokens, other_tokenizer[2].digest)
    plain, packed = tmp_path / "0.bin", tmp_path / "0.bin.zst"
    plain.write_bytes(data)
    packed.write_bytes(zstandard.compress(data))
    told = [train_gpt.check_shards([path], other_tokenizer[2], None) for path in (plain, packed)]
    assert told[0].keys() == told[1].keys()
    message = refusal(train_gpt.check_shards, [packed], tokenizer[2], None)
    assert "another tokenizer" in message


@pytest.mark.parametrize("compressed", [False, True])
def test_copy_of_a_shard_is_refused(tmp_path, texts, tokenizer, compressed):
    """The same contents under another number, or in the other split, compressed or not."""
    data = shard_bytes(encoded(texts, tokenizer))
    ending = ".bin.zst" if compressed else ".bin"
    paths = [tmp_path / "fineweb_val_000000.bin", tmp_path / f"fineweb_train_000003{ending}"]
    for path, contents in zip(paths, (data, zstandard.compress(data) if compressed else data)):
        path.write_bytes(contents)
    message = refusal(train_gpt.check_shards, paths, tokenizer[2], tokenizer[1])
    assert message.startswith(f"DATA_PATH: {paths[1]} is a copy of fineweb_val_000000.bin")


# ---- Validation and training streams -------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, length",
    [(0, 151), (32, 33), (49, 50), (50, 51), (109, 110), (149, 150), (150, 151), (9999, 151)],
)
def test_validation_is_all_shards_up_to_val_tokens(tmp_path, wanted, length):
    """VAL_TOKENS=n gives n + 1 tokens from the start, over shard edges; 0 gives all."""
    parts = [tiny_stream(50, 1), tiny_stream(61, 2), tiny_stream(40, 3)]
    write_shards(tmp_path, parts, split="val")
    tokens = train_gpt.load_validation(tiny_config(data_path=str(tmp_path), val_tokens=wanted))
    assert tokens.dtype == np.int64
    assert len(tokens) == length
    assert np.array_equal(tokens, np.concatenate(parts)[:length])


def test_validation_shorter_than_a_window_is_refused(tmp_path):
    """The number there is and the settings that can be changed."""
    write_shards(tmp_path, [tiny_stream(50)], split="val")
    cfg = tiny_config(data_path=str(tmp_path), val_tokens=31)
    message = refusal(train_gpt.load_validation, cfg)
    assert "32 tokens" in message
    assert "VAL_TOKENS" in message
    assert "EVAL_SEQ_LEN=32" in message


def test_training_stream_is_sequential_and_cyclic(tmp_path):
    """Shards follow one another in order, a compressed one too, and start over at the end."""
    shards = [tiny_stream(50, 1), tiny_stream(31, 2), tiny_stream(40, 3)]
    write_shards(tmp_path, shards, compressed={1})
    (tmp_path / "fineweb_train_000002.bin.zst").write_bytes(b"a twin that nobody reads")
    stream = train_stream(tiny_config(data_path=str(tmp_path)), 0, 16)
    endless = np.concatenate(shards * 4)
    for start in range(0, 400, 16):
        tokens, epochs = next(stream)
        np.testing.assert_array_equal(tokens, endless[start : start + 17])
    assert tokens.dtype == np.int64
    assert epochs == 3


def test_epochs_count_how_often_the_text_was_read_over(tmp_path):
    """A shard that is read a second time begins the first epoch."""
    write_shards(tmp_path, [np.arange(10), np.arange(20)])
    stream = train_stream(tiny_config(data_path=str(tmp_path)), 0, 9)
    epochs = [epochs for _, epochs in itertools.islice(stream, 7)]
    assert epochs == [0, 0, 0, 1, 1, 1, 2]


def test_step_may_be_longer_than_all_text(tmp_path):
    """It reads the text several times over."""
    write_shards(tmp_path, [np.arange(10)])
    stream = train_stream(tiny_config(data_path=str(tmp_path)), 0, 24)
    assert next(stream)[0].tolist() == [i % 10 for i in range(25)]
    assert next(stream)[0].tolist() == [i % 10 for i in range(24, 49)]


def test_next_shard_is_read_ahead(tmp_path, monkeypatch):
    """Another thread reads the second shard while the first one's tokens are taken."""
    write_shards(tmp_path, [tiny_stream(300, 1), tiny_stream(300, 2)])
    by_main, here = queue.Queue(), threading.get_ident()

    def read(path, *args):
        if path.parent == tmp_path:  # not what an earlier test's thread still reads
            by_main.put((path.name, threading.get_ident() == here))
        return read_shard(path, *args)

    monkeypatch.setattr(train_gpt, "read_shard", read)
    stream = train_stream(tiny_config(data_path=str(tmp_path)), 0, 128)
    assert by_main.get(timeout=60) == ("fineweb_train_000000.bin", True)
    next(stream)
    assert by_main.get(timeout=60) == ("fineweb_train_000001.bin", False)
    next(stream)
    assert by_main.empty()  # the third one is not due


def test_bad_shard_is_told_when_its_tokens_are_due(tmp_path):
    """Not earlier, though it was read ahead."""
    write_shards(tmp_path, [tiny_stream(300, 1)])
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"cut")
    stream = train_stream(tiny_config(data_path=str(tmp_path)), 0, 128)
    next(stream)
    next(stream)
    assert "fineweb_train_000001.bin" in refusal(next, stream)


def test_bad_first_shard_is_told_at_once(tmp_path):
    """Before a step is asked for."""
    (tmp_path / "fineweb_train_000000.bin").write_bytes(b"cut")
    cfg = tiny_config(data_path=str(tmp_path))
    assert "fineweb_train_000000.bin" in refusal(train_stream, cfg, 0, 128)


@pytest.mark.parametrize("world, size", [(1, 4), (2, 3), (4, 3)])
def test_ranks_share_a_step(world, size):
    """Their sequences, in order, are the step's; targets are moved by one; sizes have a cap."""
    cfg = tiny_config(train_batch_tokens=12 * 32, micro_batch_tokens=5 * 32)
    tokens = np.arange(12 * 32 + 1)
    shares = [train_gpt.micro_batches(tokens, cfg, Runtime(rank, world)) for rank in range(world)]
    batches = [batch for share in shares for batch in share]
    x, y = (torch.cat(side) for side in zip(*batches))
    assert torch.equal(x, torch.arange(12 * 32).view(12, 32))
    assert torch.equal(y, x + 1)
    assert {len(batch[0]) for batch in batches} == {size}


# ---- Text that is held out for the mixer's calibration -------------------------------------------


def held_out_config(folder, shards, **changes):
    """Return a Config that holds out 400 predictions; write shards of these sizes to `folder`."""
    write_shards(folder, [tiny_stream(size, seed) for seed, size in enumerate(shards)])
    settings = dict(data_path=str(folder), mixer="learned", mixer_calibration_tokens=400)
    return tiny_config(**settings | changes)


def test_held_out_text_is_the_end_of_the_last_shard(tmp_path):
    """400 predictions need 401 tokens."""
    held_out = load_held_out(held_out_config(tmp_path, (500, 1200)))
    assert held_out.dtype == np.int64
    np.testing.assert_array_equal(held_out, tiny_stream(1200, 1)[-401:])


@pytest.mark.parametrize("shards", [(500, 1200), (1200,)])
def test_held_out_text_is_never_trained_on(tmp_path, shards):
    """The stream leaves it out each time round, however much is taken at once."""
    cfg = held_out_config(tmp_path, shards)
    texts = [tiny_stream(size, seed) for seed, size in enumerate(shards)]
    once = np.concatenate([*texts[:-1], texts[-1][:-401]])
    for count in (1, 7, len(once), 2 * len(once) + 3):
        stream = train_stream(cfg, len(load_held_out(cfg)), count)
        taken = []
        while len(taken) < 3 * len(once):
            taken.extend(next(stream)[0][:-1])
        np.testing.assert_array_equal(taken, np.resize(once, len(taken)))


@pytest.mark.parametrize("mixer", ["learned", "entropy", "none"])
@pytest.mark.parametrize("quantizer", ["fisher", "int6"])
def test_every_mixer_and_quantizer_holds_out_the_same_text(tmp_path, mixer, quantizer):
    """Though not all of them use it, or they would train on other text, and not compare."""
    cfg = held_out_config(tmp_path, (900, 802), mixer=mixer, quantizer=quantizer)
    np.testing.assert_array_equal(load_held_out(cfg), tiny_stream(802, 1)[-401:])


def test_nothing_is_held_out_on_demand(tmp_path):
    """MIXER_CALIBRATION_TOKENS=0: all text trains."""
    cfg = held_out_config(tmp_path, (300, 90), mixer_calibration_tokens=0)
    held_out = load_held_out(cfg)
    assert len(held_out) == 0
    once = np.concatenate([tiny_stream(300, 0), tiny_stream(90, 1)])
    tokens, _ = next(train_stream(cfg, len(held_out), 2 * 390))
    np.testing.assert_array_equal(tokens[:780], np.tile(once, 2))


def test_half_of_the_last_shard_may_be_held_out(tmp_path):
    """The other half trains."""
    cfg = held_out_config(tmp_path, (900, 802))
    assert len(load_held_out(cfg)) == 401
    tokens, epochs = next(train_stream(cfg, 401, 1300))
    assert len(tokens) == 1301
    assert epochs == 0


def test_more_than_half_of_the_last_shard_is_refused(tmp_path):
    """One token less in the shard, and the setting is named."""
    message = refusal(load_held_out, held_out_config(tmp_path, (900, 801)))
    assert message == "MIXER_CALIBRATION_TOKENS=400: over half of the last shard; lower it"


# ---- What a run says of its text -----------------------------------------------------------------


@pytest.fixture
def opened(corpus, tmp_path):
    """opened(**settings) -> (Run of a training command on the corpus, its log)."""
    threads = torch.get_num_threads()

    def run(**settings):
        environ = corpus.settings | dict(
            PRESET="bench",
            DEVICE="cpu",
            LOG_DIR=str(tmp_path / "logs"),
            EVAL_SEQ_LEN="64",
            EVAL_STRIDE="32",
            VAL_TOKENS="0",
        )
        cfg = train_gpt.config_from_env(environ | settings)
        return train_gpt.open_run(cfg, {}, "train")

    yield run
    torch.set_num_threads(threads)


def test_run_records_its_validation_text(corpus, opened):
    """Its tokens, bytes and SHA-256, and a digest of each shard under its name."""
    run = opened()
    text = "".join(corpus.val).encode()
    assert run.results["validation"] == dict(
        tokens=len(run.tokens) - 1, bytes=len(text), sha256=hashlib.sha256(text).hexdigest()
    )
    names = {path.name for path in (corpus.folder / "shards").iterdir()}
    assert set(run.results["shards"].values()) == names


def test_run_with_another_tokenizer_ends_before_training(opened, other_tokenizer):
    """`tokenize` has written whose the shards are."""
    message = refusal(opened, TOKENIZER_PATH=str(other_tokenizer[0]))
    assert "another tokenizer than TOKENIZER_PATH" in message


def test_run_on_official_shards_with_another_tokenizer_ends_before_training(
    corpus, opened, other_tokenizer, tmp_path
):
    """Shards without a digest are judged by what encoding their text again gives back."""
    for path in (corpus.folder / "shards").iterdir():
        (tmp_path / path.name).write_bytes(shard_bytes(read_shard(path, 400)))
    assert opened(DATA_PATH=str(tmp_path)).results["validation"]["bytes"]
    settings = dict(DATA_PATH=str(tmp_path), TOKENIZER_PATH=str(other_tokenizer[0]))
    assert "another tokenizer than TOKENIZER_PATH" in refusal(opened, **settings)


# ---- Texts to shards -----------------------------------------------------------------------------


def tokenize(folder, *files, vocab_size=400, tokenizer_path=None):
    """Run `tokenize` into folder/shards; return the variables of the environment it ran in."""
    path = tokenizer_path or folder / "new.model"
    environ = dict(VOCAB_SIZE=str(vocab_size), TOKENIZER_PATH=str(path))
    train_gpt.dispatch(["tokenize", str(folder / "shards"), *map(str, files)], environ)
    return environ


def test_tokenizer_that_exists_may_lie_where_nothing_can_be_written(tmp_path, texts, tokenizer):
    """As among shared data; not even root can write into that folder of file descriptors."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:9]))
    with open(tokenizer[0], "rb") as file:
        path = f"/proc/self/fd/{file.fileno()}"
        tokenize(tmp_path, tmp_path / "a.jsonl", tokenizer_path=path)
    assert list((tmp_path / "shards").glob("fineweb_val_*"))


def test_tokenizer_that_cannot_be_written_is_named(tmp_path, texts):
    """Before any text is read, with the setting that says where it goes."""
    (tmp_path / "a.jsonl").write_bytes(b"no document")
    message = refusal(
        tokenize, tmp_path, tmp_path / "a.jsonl", tokenizer_path="/proc/self/fd/new.model"
    )
    assert "TOKENIZER_PATH" in message
    assert "/proc/self/fd" in message


def jsonl(texts):
    """Return documents as lines of JSON, escaped in every second one, with a blank line between."""
    lines = [
        json.dumps(dict(id=number, text=text), ensure_ascii=number % 2 == 0)
        for number, text in enumerate(texts)
    ]
    return "\n\n".join(lines).encode()


def decoded(folder, split, table):
    """Return the documents in all shards of a split; the first token must be a BOS."""
    names = sorted((folder / "shards").glob(f"fineweb_{split}_*"))
    tokens = np.concatenate([read_shard(name, len(table.pieces)) for name in names])
    assert tokens[0] == table.bos_id
    parts = np.split(tokens, np.flatnonzero(tokens == table.bos_id)[1:])
    return [table.decode(part).decode() for part in parts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    """A folder with files of all three kinds and their shards.

    Its documents for training and for validation, as the checksums of their text want it, the table
    of the tokenizer that was trained, and the last line that `tokenize` has shown.
    """
    folder = tmp_path_factory.mktemp("corpus")
    plain = texts[:12] + ODD_TEXTS
    many = texts[12:20]
    prose = "\n\n".join(texts[20:31]) + "\r\n\r\nend without a line end"
    (folder / "a.jsonl").write_bytes(jsonl(plain))
    frames = [zstandard.compress(jsonl(half) + b"\n") for half in (many[:3], many[3:])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "c.txt").write_bytes(prose.encode())
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "SHARD_TOKENS", 20_001)  # several shards
        patch.setattr(train_gpt, "say", shown.append)
        tokenize(folder, folder / "a.jsonl", folder / "b.jsonl.zst", folder / "c.txt")
    cut = list(train_gpt.read_documents(str(folder / "c.txt")))
    split = {True: [], False: []}
    for document in [text for text in plain + many if text.strip()] + cut:
        split[zlib.crc32(document.encode()) % 20 == 0].append(document)
    table = train_gpt.load_tokenizer(folder / "new.model", 400)[0]
    settings = dict(word.split("=") for word in shown[-1].split() if "=" in word)
    return SimpleNamespace(
        folder=folder, train=split[False], val=split[True], table=table, settings=settings
    )


def test_plain_text_is_cut_into_documents_without_loss(corpus):
    """The documents of a .txt file, put together, are the file."""
    path = corpus.folder / "c.txt"
    documents = list(train_gpt.read_documents(str(path)))
    assert len(documents) > 5
    assert "".join(documents).encode() == path.read_bytes()


def test_tokenize_loses_nothing(corpus):
    """Documents of all three kinds of file come back letter for letter, in their order."""
    assert decoded(corpus.folder, "train", corpus.table) == corpus.train
    assert decoded(corpus.folder, "val", corpus.table) == corpus.val


def test_tokenize_names_its_tokenizer_in_every_shard(corpus):
    """And no shard is a copy of another."""
    paths = sorted((corpus.folder / "shards").iterdir())
    assert len(train_gpt.check_shards(paths, corpus.table, None)) == len(paths)
    makers = {path.read_bytes()[12:44] for path in paths}
    assert makers == {corpus.table.digest}


def test_tokenize_holds_out_about_one_document_in_twenty(corpus):
    """There is validation text, and far more to train on."""
    assert 0 < len(corpus.val) < len(corpus.train) / 4


def test_tokenize_writes_shards_of_a_limited_size(corpus):
    """A long split takes several files."""
    assert len(list((corpus.folder / "shards").iterdir())) > 4


def test_tokenize_ends_with_the_settings_to_use(corpus):
    """A run with the settings of the last line finds the validation text, with all of its bytes."""
    assert corpus.settings == {
        "DATA_PATH": str(corpus.folder / "shards"),
        "TOKENIZER_PATH": str(corpus.folder / "new.model"),
        "VOCAB_SIZE": "400",
    }
    window = {"EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "32"}
    environ = corpus.settings | window | {"PRESET": "bench", "VAL_TOKENS": "0"}
    tokens = train_gpt.load_validation(train_gpt.config_from_env(environ))
    text = "".join(corpus.val).encode()
    digest = hashlib.sha256(text).hexdigest()
    found = dict(tokens=len(tokens) - 1, bytes=len(text), sha256=digest)
    assert train_gpt.audit_bytes(corpus.table, tokens) == found


def test_tokenize_takes_a_tokenizer_that_exists(tmp_path, texts, tokenizer):
    """The model is used and left alone."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:5]))
    path, _, table = tokenizer
    before = path.read_bytes()
    tokenize(tmp_path, tmp_path / "a.jsonl", tokenizer_path=path)
    train, val = (decoded(tmp_path, split, table) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts[:5])
    assert path.read_bytes() == before


def test_tokenize_splits_thousands_of_documents(tmp_path, tokenizer):
    """They are encoded in batches, and each document still goes where its checksum wants it."""
    path, _, table = tokenizer
    documents = [f"number {number}" for number in range(2100)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    tokenize(tmp_path, tmp_path / "a.jsonl", tokenizer_path=path)
    held_out = [text for text in documents if zlib.crc32(text.encode()) % 20 == 0]
    assert decoded(tmp_path, "val", table) == held_out


def test_tokenize_refuses_a_tokenizer_of_another_size(tmp_path, texts, tokenizer):
    """Both sizes and the file are named, and nothing is written."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:5]))
    path = tokenizer[0]
    message = refusal(tokenize, tmp_path, tmp_path / "a.jsonl", vocab_size=500, tokenizer_path=path)
    assert "VOCAB_SIZE=500" in message
    assert "400 pieces" in message
    assert str(path) in message
    assert not any((tmp_path / "shards").iterdir())


@pytest.mark.parametrize("size, way_out", [(4000, "lower"), (260, "raise")])
def test_tokenize_refuses_a_vocabulary_that_does_not_fit_the_text(tmp_path, size, way_out):
    """Too large or too small: the setting is named with the way to go, and no model is written."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"]))
    message = refusal(tokenize, tmp_path, tmp_path / "a.jsonl", vocab_size=size)
    assert f"VOCAB_SIZE={size}" in message
    assert way_out in message
    assert not (tmp_path / "new.model").exists()


def test_tokenize_refuses_a_single_document(tmp_path):
    """There would be no text to validate on, or none to train on."""
    (tmp_path / "b.txt").write_text("a single document")
    assert "two documents" in refusal(tokenize, tmp_path, tmp_path / "b.txt")


def test_tokenize_refuses_a_folder_with_other_shards(tmp_path, texts):
    """Two texts would be mixed up."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "fineweb_train_000007.bin").write_bytes(GOOD_SHARD)
    (tmp_path / "c.jsonl").write_bytes(jsonl(texts[:5]))
    assert str(tmp_path / "shards") in refusal(tokenize, tmp_path, tmp_path / "c.jsonl")


GOOD_LINES = jsonl(["one", "two"]) + b"\n"  # three lines
MALFORMED = {
    "no JSON": ("a.jsonl", GOOD_LINES + b"{broken\n", "line 4"),
    "no text": ("a.jsonl", GOOD_LINES + b'{"body": "x"}\n', "'text'"),
    "null text": ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "'NoneType'"),
    "deep": ("a.jsonl", GOOD_LINES + b"[" * 99_999 + b"\n", "line 4"),
    "txt, cut character": ("a.txt", b"one\ntwo\ncaf\xc3", "line 3"),
    "text is a number": ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2"),
    "a list": ("a.jsonl", b'["text"]\n', "line 1"),
    "null": ("a.jsonl", b"null", "line 1"),
    "no UTF-8": ("a.jsonl", GOOD_LINES + b'{"text": "caf\xe9"}\n', "line 4"),
    "half a surrogate": ("a.jsonl", GOOD_LINES + b'{"text": "\\ud800"}\n', "line 4"),
    "txt, no UTF-8": ("a.txt", b"one\ntwo\ncaf\xe9\n", "line 3"),
    "zst, no JSON": ("a.jsonl.zst", zstandard.compress(GOOD_LINES + b"{broken\n"), "line 4"),
    "no zst": ("a.jsonl.zst", GOOD_LINES, "cannot read"),
    "cut zst": ("a.jsonl.zst", zstandard.compress(GOOD_LINES)[:-4], "cannot read"),
    "missing": ("a.jsonl", None, "a.jsonl; copy or make it again (No such file or directory)"),
    "cut zst after a line": (
        "a.jsonl.zst",
        zstandard.compress(GOOD_LINES) + zstandard.compress(GOOD_LINES)[:9],
        "its end is missing",
    ),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_text_is_refused(tmp_path, fault):
    """The file is named, with the line where there is one, and nothing is written."""
    name, contents, where = MALFORMED[fault]
    path = tmp_path / name
    good = tmp_path / "good.jsonl"
    good.write_bytes(GOOD_LINES)
    if contents is not None:
        path.write_bytes(contents)
    message = refusal(tokenize, tmp_path, good, path)
    assert str(path) in message
    assert where in message
    assert not any((tmp_path / "shards").iterdir())
    assert not (tmp_path / "new.model").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.zst", "a.bin"])
def test_unknown_kind_of_text_is_bad_usage(tmp_path, name):
    """It is found by its ending, before anything is read."""
    files = (tmp_path / "missing.txt", tmp_path / name)
    assert name in refusal(tokenize, tmp_path, *files, kind=UsageError)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_text_that_is_no_file_is_bad_usage(tmp_path, name, make):
    """A folder, and a FIFO: a second reading would wait for ever."""
    make(tmp_path / name)
    assert name in refusal(tokenize, tmp_path, tmp_path / name, kind=UsageError)


@pytest.mark.parametrize("ending", ["", "no line end"])
def test_very_long_line_of_plain_text_is_cut(tmp_path, ending):
    """Into documents of a limited size, characters whole, nothing lost."""
    path = tmp_path / "a.txt"
    text = "zwölf Boxkämpfer 🙂 " * 20_000 + ending
    path.write_text(text, encoding="utf-8")
    documents = list(train_gpt.read_documents(str(path)))
    assert "".join(documents) == text
    assert max(map(len, documents)) < train_gpt.MOST_DOCUMENT_CHARS + train_gpt.CHUNK_BYTES


def test_long_line_of_json_is_one_document(tmp_path):
    """Even if it is longer than what is read at once."""
    texts = ["a" * 200_000, "é" * 100_001, "b"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    assert list(filter(None, train_gpt.read_documents(str(tmp_path / "a.jsonl")))) == texts


def test_byte_order_mark_is_no_json(tmp_path):
    """The one that some editors put before a file is skipped."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(["one", "two"]))
    assert list(filter(None, train_gpt.read_documents(str(path)))) == ["one", "two"]


def test_json_with_a_long_window_is_read(tmp_path):
    """Written by zstd --long=28; the usual limit is 2^27."""
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    data = compressor.compress(jsonl(["one", "two"])) + compressor.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << 28
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert list(train_gpt.read_documents(str(tmp_path / "a.jsonl.zst")))[:2] == ["one", "two"]


@pytest.mark.parametrize(
    "line",
    ["zebra quokka " * 3000, "zebraquokka" * 3000, "a bar \u2585\u2585 of a zebra or quokka"],
    ids=["long", "without spaces", "reserved character"],
)
def test_tokenizer_learns_from_every_line(tmp_path, line):
    """Long lines and those with SentencePiece's own mark are cut, not left out."""
    documents = ["the common words"] * 9 + [line] * 40
    train_gpt.train_tokenizer(documents, 288, tmp_path / "t.model")
    table, _ = train_gpt.load_tokenizer(tmp_path / "t.model", 288)
    words = [piece.strip(train_gpt.SPACE) for piece in table.pieces]
    assert any(len(word) > 2 and word in "zebraquokka" for word in words)


@pytest.mark.parametrize("name", ["fineweb_1024_bpe.model", "fineweb_8192_bpe.model"])
def test_new_tokenizer_does_not_take_an_official_name(tmp_path, texts, name):
    """It is written beside the shards, and the official path stays free for the official file."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:9]))
    tokenize(tmp_path, tmp_path / "a.jsonl", tokenizer_path=tmp_path / name)
    assert not (tmp_path / name).exists()
    new = tmp_path / "shards" / "tokenizer.model"
    assert train_gpt.load_tokenizer(new, 400)[0].bos_id == 1


@pytest.mark.parametrize("bad", ["shards", "file/new.model"])
def test_tokenize_finds_a_place_that_cannot_be_written_before_work(tmp_path, monkeypatch, bad):
    """OUT is a file, or the tokenizer's folder is one; no text has been read."""
    (tmp_path / bad.split("/")[0]).write_text("a file")
    monkeypatch.setattr(train_gpt, "read_documents", None)
    tokenizer = tmp_path / bad if "/" in bad else None
    message = refusal(tokenize, tmp_path, tmp_path / "a.txt", tokenizer_path=tokenizer)
    assert "cannot write" in message


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, tokenizer):
    """Eight times as many documents take as much."""
    monkeypatch.setattr(train_gpt, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(train_gpt, "BATCH_DOCUMENTS", 10)
    cfg = tiny_config(vocab_size=400, tokenizer_path=str(tokenizer[0]))

    def peak(count):
        def documents():
            return (f"{number} is a number in a row. " * 4 for number in range(count))

        tracemalloc.start()
        train_gpt.write_shards(documents, tmp_path / str(count), cfg, lambda line: None)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)
    assert peak(801) < 1.2 * peak(101)


# ---- The demo's cache ----------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path, monkeypatch, texts):
    """demo() prepares a small demo in tmp_path and returns {name: contents} of its cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "demo_documents", lambda: texts)
    cfg = train_gpt.config_from_env(dict(PRESET="demo", VOCAB_SIZE="400"))

    def prepare():
        train_gpt.prepare_demo(cfg, lambda line: None)
        return {path.name: path.read_bytes() for path in Path(cfg.data_path).iterdir()}

    return prepare


def test_unfinished_cache_of_the_demo_is_finished(demo):
    """Without its last file all is made again, to the byte; so would two first demos write."""
    before = demo()
    assert len(before) == 3
    Path(train_gpt.DEMO_CACHE, "fineweb_val_000000.bin").unlink()
    assert demo() == before


def test_last_file_of_the_demo_is_written_last(demo, monkeypatch):
    """So its presence shows that the others are there."""
    write_atomically = train_gpt.write_atomically
    written = []

    def spy(path, data, *how):
        written.append(Path(path).name)
        write_atomically(path, data, *how)

    monkeypatch.setattr(train_gpt, "write_atomically", spy)
    demo()
    assert written[-1] == "fineweb_val_000000.bin"
    assert len(written) == 3


def test_files_of_others_in_the_cache_stay(demo):
    """The demo deletes nothing that it has not made."""
    Path(train_gpt.DEMO_CACHE).mkdir(parents=True)
    Path(train_gpt.DEMO_CACHE, "thesis.txt").write_text("years of work")
    assert demo()["thesis.txt"] == b"years of work"


def test_whole_cache_of_the_demo_is_left_alone(demo, monkeypatch):
    """A second demo has nothing to gather."""
    before = demo()
    monkeypatch.setattr(train_gpt, "demo_documents", None)
    assert demo() == before


# ---- Packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.bin.zst", "a.jsonl.zst"])
def test_missing_zstandard_is_not_a_fault_of_the_file(tmp_path, monkeypatch, name):
    """The package's name reaches the command line, which says how to install it."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / name
    path.write_bytes(zstandard.compress(GOOD_SHARD))
    with pytest.raises(ImportError, match="zstandard"):
        read_shard(path, VOCAB)
    with pytest.raises(ImportError, match="zstandard"):
        list(train_gpt.read_documents(str(path)))
