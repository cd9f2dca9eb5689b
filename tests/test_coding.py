"""Range coder, code files and proof: what was committed can be decoded, and whoever looked ahead is caught."""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import constriction
import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_config, tiny_stream, tiny_table, warm_model
from test_commands import clean_environment, error_line, no_leftovers

import train_gpt
from train_gpt import (
    CODE_HEAD,
    TOTAL,
    Predictor,
    RangeDecoder,
    RangeEncoder,
    UserError,
    read_code,
    verify,
    write_code,
)

TABLE = tiny_table()
N = 3 * 64 + 20  # three updates of TTT and 26 of the mixer, then half a block
STREAM = tiny_stream(N + 1)
STREAM[50:52], STREAM[70], STREAM[120] = (
    (4, 5),
    3,
    1,
)  # two byte pieces of one letter, a new line, a second document
CPU_COUNT = os.cpu_count
SETTINGS = {
    "learned": dict(mixer="learned"),
    "entropy": dict(mixer="entropy"),
    "none": dict(mixer="none"),
    "learned, no ttt": dict(mixer="learned", ttt_enabled=False),
    "none, no ttt": dict(mixer="none", ttt_enabled=False),
}


def quiet(line):
    """A log that nobody reads."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """One thread, which is enough here, and afterwards as many as before: the coder sets the number itself."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def real_process(monkeypatch, one_thread):
    """For tests whose decoder is a process of its own: this one has as many threads as that one."""
    monkeypatch.setattr(os, "cpu_count", CPU_COUNT)


# ----------------------------------------------------------------------------------------------------------
# The range coder
# ----------------------------------------------------------------------------------------------------------


def shares(tables, symbols):
    """(starts, frequencies) of symbols (n,) under one table (V,) or under a table each (n, V)."""
    starts, where = (
        np.cumsum(tables, -1) - tables,
        (np.arange(len(symbols)), symbols)[tables.ndim == 1 :],
    )
    where = where[0] if tables.ndim == 1 else where
    return starts[where], tables[where]


def encode(tables, symbols):
    """The code words of symbols."""
    encoder = RangeEncoder()
    for start, freq in zip(*(part.tolist() for part in shares(tables, symbols))):
        encoder.encode(start, freq)
    return encoder.finish()


def decode(words, tables, n):
    """n symbols decoded."""
    decoder = RangeDecoder(words)
    return [decoder.decode(tables if tables.ndim == 1 else tables[i]) for i in range(n)]


def bits_of(freqs):
    """The sum of -log2(freq / 2^24)."""
    return float((24 - np.log2(np.asarray(freqs, dtype=np.float64))).sum())


def assert_size(words, bits):
    """Code words take what was predicted, within 0.01 % and 16 bytes."""
    assert abs(len(words) - bits / 8) <= 1e-4 * bits / 8 + 16


def random_tables(seed, n, vocab, sharpness):
    """n tables whose frequencies are at least 1 and sum to 2^24; the sharper, the more skewed."""
    random = np.random.default_rng(seed)
    p = np.exp(sharpness * random.standard_normal((n, vocab)))
    freqs = 1 + np.floor(p / p.sum(1, keepdims=True) * (TOTAL - vocab)).astype(np.int64)
    freqs[np.arange(n), freqs.argmax(1)] += TOTAL - freqs.sum(1)
    return freqs


def draw(seed, tables):
    """A symbol from each table (n, V)."""
    at = np.random.default_rng(seed).integers(0, TOTAL, len(tables))
    return (np.cumsum(tables, 1) <= at[:, None]).sum(1)


def peaked(vocab, top):
    """The table with the largest frequency that there is, 2^24 - (V - 1), at `top`; all others have 1."""
    table = np.ones(vocab, dtype=np.int64)
    table[top] = TOTAL - (vocab - 1)
    return table


def coder_cases():
    """{name: (tables, symbols)}."""
    random, cases = np.random.default_rng(5), {}
    for name, n, vocab, sharpness in (
        ("V=1024, flat", 1500, 1024, 0.1),
        ("V=1024, skewed", 1500, 1024, 4.0),
        ("V=2, a table each", 5000, 2, 2.0),
        ("V=64, very skewed", 5000, 64, 12.0),
    ):
        tables = random_tables(n, n, vocab, sharpness)
        cases[name] = tables, draw(n, tables)
    for vocab, top in ((2, 0), (2, 1), (1024, 0), (1024, 500), (1024, 1023)):
        rare = random.integers(0, vocab, 4000)
        often = np.where(random.random(4000) < 0.9, top, rare)
        cases[f"V={vocab}, peak at {top}, often"] = peaked(vocab, top), often
        cases[f"V={vocab}, peak at {top}, never"] = (
            peaked(vocab, top),
            np.full(3000, (top + 1) % vocab),
        )
        cases[f"V={vocab}, peak at {top}, always"] = peaked(vocab, top), np.full(20_000, top)
    table = np.array([9_000_001, TOTAL - 9_000_001])
    cases["long"] = table, (random.integers(0, TOTAL, 300_000) >= table[0]).astype(np.int64)
    return cases


CASES = coder_cases()


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    """What was coded comes back, in the predicted size and in the size that constriction's range coder needs."""
    tables, symbols = CASES[name]
    words = encode(tables, symbols)
    assert decode(words, tables, len(symbols)) == symbols.tolist()
    assert_size(words, bits_of(shares(tables, symbols)[1]))
    other, weights, one = constriction.stream.queue.RangeEncoder(), [tables - 1.0], tables.ndim == 1
    model = constriction.stream.model.Categorical(
        *weights[:one], perfect=False
    )  # gives each symbol 1 of 2^24 more
    other.encode(symbols.astype(np.int32), model, *weights[one:])
    assert_size(words, 32 * len(other.get_compressed()))


def boundary(encoder):
    """The roundest number inside the encoder's interval: until it is left, a byte before may still change."""
    for power in range(64, -1, -1):
        point = ((encoder.low >> power) + 1) << power
        if point < encoder.low + encoder.range:
            return point


def straddle(table, runs):
    """(symbols, code words): each of `runs` (length, step) stays on the boundary, then steps off to one side of it."""
    encoder, symbols, ends = RangeEncoder(), [], np.cumsum(table)
    for length, step in runs:
        leaves = False
        while not leaves:
            share = (boundary(encoder) - encoder.low) // (encoder.range >> 24)
            symbol, length = (
                min(int(np.searchsorted(ends, share, side="right")), len(table) - 1),
                length - 1,
            )
            leaves = length < 0 and 0 <= symbol + step < len(table)
            symbols.append(symbol + step * leaves)
            encoder.encode(int(ends[symbols[-1]] - table[symbols[-1]]), int(table[symbols[-1]]))
    return np.array(symbols), encoder.finish()


@pytest.mark.parametrize("vocab, sharpness", [(3, 0.3), (3, 3.0), (64, 1.0), (1024, 2.0)])
def test_straddling(vocab, sharpness):
    """Streams that stay on the middle of the interval as long as they can, then leave it, upwards and downwards."""
    random, table = np.random.default_rng(vocab), random_tables(vocab, 1, vocab, sharpness)[0]
    runs = [
        (int(length), int(step))
        for length, step in zip(random.geometric(0.05, 150), random.choice([-1, 1], 150))
    ]
    symbols, words = straddle(table, runs)
    assert decode(words, table, len(symbols)) == symbols.tolist()
    assert_size(words, bits_of(table[symbols]))
    assert words.count(0) + words.count(255) > len(words) / 16  # eight times what is usual


@pytest.mark.parametrize("vocab", [3, 100])
def test_a_long_carry(vocab):
    """After thousands of bytes 0xFF one more symbol carries into all of them, or, one symbol lower, into none."""
    table, length = random_tables(vocab, 1, vocab, 0.3)[0], 20_000 if vocab == 3 else 4000
    tail = [(3, -1), (2, 1), (3, 1)]
    (low_symbols, low), (high_symbols, high) = (
        straddle(table, [(length, step), *tail]) for step in (-1, 1)
    )
    run = min(
        len(words) - 1 - len(words[1:].lstrip(byte))
        for words, byte in ((low, b"\xff"), (high, b"\0"))
    )
    assert run > 2000 and high[0] == low[0] + 1
    assert decode(low, table, len(low_symbols)) == low_symbols.tolist()
    assert decode(high, table, len(high_symbols)) == high_symbols.tolist()
    assert_size(low, bits_of(table[low_symbols]))
    assert_size(high, bits_of(table[high_symbols]))


def test_no_symbols():
    """An empty stream has a code, of a few bytes, and no words at all can still be asked for a symbol."""
    assert len(RangeEncoder().finish()) <= 64
    assert decode(b"", np.array([5, TOTAL - 5]), 3) == [0, 0, 0]


def test_foreign_words():
    """Cut, endless or foreign words: symbols come out, all of the vocabulary, and no state grows beyond its bounds."""
    tables, symbols = CASES["V=64, very skewed"]
    words, random = encode(tables, symbols), np.random.default_rng(1)
    assert decode(words + b"\xa5" * 40, tables, len(symbols)) == symbols.tolist()
    cut = decode(words[: len(words) // 2], tables, len(symbols))
    assert cut[:1000] == symbols[:1000].tolist() and cut != symbols.tolist()
    for foreign in (
        b"",
        b"\x80",
        words[:7],
        words[1:],
        b"\xff" * 20_000,
        b"\xff" * 100,
        random.bytes(20_000),
    ):
        decoder = RangeDecoder(foreign)
        found = [decoder.decode(row) for row in tables]
        assert all(0 <= symbol < 64 for symbol in found)
        assert 0 <= decoder.value < 1 << 64 and 1 << 48 <= decoder.range <= 1 << 64


# ----------------------------------------------------------------------------------------------------------
# Code files
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """artifacts(name, seed=0) -> Config of one of SETTINGS, whose artifact, with warm mixer weights, is on disk."""
    folder = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def made(name, seed=0):
        path = folder / f"{name}{seed}.lzma"
        cfg = tiny_config(
            **SETTINGS[name],
            num_layers=2,
            ve_layers="1",
            xsa_last_n=1,
            ttt_freeze_blocks=1,
            mixer_lr=0.01,
            device="cpu",
            artifact_path=str(path),
            run_id="run",
        )
        model = warm_model(cfg, seed)
        with torch.no_grad():
            model.embed.tokens.mul_(4)  # sharp predictions
        path.write_bytes(train_gpt.pack_artifact(model, cfg, TABLE, train_gpt.FINEST))
        return cfg

    return made


@pytest.fixture(scope="module")
def coded(artifacts, tmp_path_factory):
    """coded(name, n=N) -> a code file of STREAM's first n tokens after BOS, with what write_code got and returned."""
    folder = tmp_path_factory.mktemp("coded")

    @functools.cache
    def made(name, n=N):
        path, cfg, tokens = folder / f"{name}{n}.code", artifacts(name), STREAM[: n + 1]
        bits, freqs = write_code(path, tokens, cfg, quiet)
        return SimpleNamespace(cfg=cfg, path=path, tokens=tokens, bits=bits, freqs=freqs)

    return made


def scorer(cfg):
    """A predictor of the last stage with the artifact's weights, made without the coder's help."""
    _, table, weights = train_gpt.read_artifact(cfg.artifact)
    rt = train_gpt.start_runtime(cfg, {})
    model = train_gpt.new_model(cfg, rt, weights)
    return Predictor(model, cfg, table, rt, train_gpt.evaluation_passes(cfg)[-1])


@pytest.mark.parametrize(
    "name, n",
    [("learned", N), ("entropy", N), ("none", N), ("learned, no ttt", 90), ("none, no ttt", 90)],
)
def test_a_code_file(name, n, coded):
    """Tokens, frequencies and text come back; bits and frequencies are those of the scorer; the size is predicted."""
    file = coded(name, n)
    tokens, freqs, text = read_code(file.path, file.cfg, quiet)
    assert tokens.tolist() == file.tokens.tolist() and text == TABLE.decode(file.tokens)
    assert len(file.freqs) == n and freqs.tolist() == file.freqs.tolist()
    predictor, rows = scorer(file.cfg), []
    predictor.score = lambda commitment, targets: (
        rows.extend(freqs[predictor.plan.stages[-1]] for *_, freqs in commitment.pieces)
        or Predictor.score(predictor, commitment, targets)
    )
    stage = train_gpt.evaluate(predictor, file.tokens, 1, quiet)[-1]
    assert file.bits == stage["val_bpb"] and stage["tokens"] == n  # of one byte
    assert file.bits == pytest.approx(bits_of(file.freqs), rel=1e-12)
    tables, words = (
        torch.cat(rows).numpy().astype(np.int64),
        file.path.read_bytes()[CODE_HEAD.size :],
    )
    assert tables[np.arange(n), file.tokens[1:]].tolist() == file.freqs.tolist()
    assert decode(words, tables, n) == file.tokens[1:].tolist()
    assert_size(words, file.bits)
    assert no_leftovers(file.path.parent)


def test_the_header(coded):
    """The file says what it holds, as documented."""
    file = coded("learned")
    data, text = file.path.read_bytes(), TABLE.decode(STREAM)
    magic, version, checksum, lanes, n, size, artifact, _, digest = struct.unpack(
        "<8sIIIQQ32s32s32s", data[:132]
    )
    assert (magic, version, lanes, n, size) == (
        b"PGOLFTXT",
        2,
        0,
        N,
        len(text),
    ) and checksum == zlib.crc32(data[16:])
    assert artifact == hashlib.sha256(file.cfg.artifact.read_bytes()).digest()
    assert digest == hashlib.sha256(text).digest() and CODE_HEAD.size == 132


def test_nothing_coded(artifacts, tmp_path):
    """BOS alone: no bits, no frequencies, no text, and a file that reads back."""
    cfg, path = artifacts("learned"), tmp_path / "empty.code"
    bits, freqs = write_code(path, STREAM[:1], cfg, quiet)
    assert bits == 0 and len(freqs) == 0 and path.stat().st_size <= CODE_HEAD.size + 64
    tokens, freqs, text = read_code(path, cfg, quiet)
    assert tokens.tolist() == [1] and len(freqs) == 0 and text == b""


@pytest.mark.parametrize("n", [1, 32, 33, 64])
def test_where_a_stream_ends(n, artifacts, tmp_path):
    """Streams that end at the borders of windows and chunks."""
    cfg, path = artifacts("learned"), tmp_path / "short.code"
    write_code(path, STREAM[: n + 1], cfg, quiet)
    tokens, _, text = read_code(path, cfg, quiet)
    assert tokens.tolist() == STREAM[: n + 1].tolist() and text == TABLE.decode(STREAM[: n + 1])


def test_damaged_files(coded, tmp_path, monkeypatch):
    """Every cut of the header, cuts of the body, more bytes, and a bit flipped in each byte: refused, by name."""
    file, path = coded("learned", 40), tmp_path / "bad.code"
    data, parts = file.path.read_bytes(), train_gpt.coding_predictor(file.cfg, 0)
    monkeypatch.setattr(train_gpt, "coding_predictor", lambda cfg, lanes: parts)
    bad = {
        f"cut to {size}": data[:size]
        for size in {*range(CODE_HEAD.size + 3), *range(132, len(data), 13), len(data) - 1}
    }
    bad |= {f"padded with {more}": data + more for more in (b"\0", b"\xff", b"\0" * 8, data)}
    bad |= {
        f"bit {at % 8} of {at}": data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        for at in range(len(data))
    }
    bad |= {"another's": b"PGOLFART" + data[8:], "random": np.random.default_rng(0).bytes(500)}
    for damage, contents in bad.items():
        path.write_bytes(contents)
        with pytest.raises(UserError) as error:
            read_code(path, file.cfg, quiet)
        assert re.search(re.escape(str(path)) + " is (no code file|cut)", str(error.value)), damage
    path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_code(path, file.cfg, quiet)
    path.write_bytes(data)
    assert read_code(path, file.cfg, quiet)[0].tolist() == file.tokens.tolist()


def test_logits_that_are_not_finite(coded, tmp_path, monkeypatch):
    """Coder and decoder say so, in plain order and in lanes, and no file is written."""
    files, original = {}, Predictor._commit
    for lanes in (0, 4):
        files[lanes] = tmp_path / f"{lanes}.code"
        write_code(files[lanes], STREAM[:41], coded("learned", 40).cfg, quiet, lanes)

    def commit(self, logits, *where):
        return original(
            self, logits.log() if len(where[0]) > 20 else logits, *where
        )  # of negative ones: NaN

    monkeypatch.setattr(Predictor, "_commit", commit)
    for lanes, path in files.items():
        with pytest.raises(UserError, match="logits are not finite"):
            read_code(path, coded("learned", 40).cfg, quiet)
        with pytest.raises(UserError, match="logits are not finite"):
            write_code(tmp_path / "none.code", STREAM[:41], coded("learned", 40).cfg, quiet, lanes)
    assert not (tmp_path / "none.code").exists()


def test_another_artifact_or_other_settings(coded, artifacts):
    """Both are named; settings of the machine do not matter."""
    file = coded("none, no ttt", 40)
    other = replace(file.cfg, artifact_path=artifacts("none, no ttt", 1).artifact_path)
    with pytest.raises(UserError) as error:
        read_code(file.path, other, quiet)
    assert str(file.path) in str(error.value) and other.artifact_path in str(error.value)
    for change in (
        dict(ttt_temperature=0.97),
        dict(eval_batch_windows=2),
        dict(seed=1),
        dict(mixer="entropy"),
    ):
        with pytest.raises(UserError, match="settings") as error:
            read_code(file.path, replace(file.cfg, **change), quiet)
        assert str(file.path) in str(error.value)
    elsewhere = replace(
        file.cfg, data_path="nowhere", val_tokens=7, log_every=9, verify_tokens=3, log_dir="no"
    )
    assert read_code(file.path, elsewhere, quiet)[0].tolist() == file.tokens.tolist()


def forget_the_text(path, target):
    """Write the code file at path to target with another text's checksum, and all else in order."""
    data = path.read_bytes()
    body = data[16:100] + bytes(32) + data[132:]
    target.write_bytes(data[:12] + struct.pack("<I", zlib.crc32(body)) + body)


def test_a_text_that_is_not_what_was_coded(coded, tmp_path):
    """The text's checksum is compared: read_code returns none where it differs, and tokens all the same."""
    file = coded("none, no ttt", 40)
    forget_the_text(file.path, tmp_path / "other.code")
    tokens, _, text = read_code(tmp_path / "other.code", file.cfg, quiet)
    assert text is None and tokens.tolist() == file.tokens.tolist()


# ----------------------------------------------------------------------------------------------------------
# What a decoder repeats
# ----------------------------------------------------------------------------------------------------------


def walk(predictor, tokens, step, cached):
    """All frequencies {stage: (n, V)}, committed `step` positions at a time, and how many known parts were run."""
    stream, parts, runs, forward = torch.from_numpy(tokens), {}, [0], predictor.forward

    def counted(tokens, past=None):
        runs[0] += tokens.size(1) == 32 - 8
        return forward(tokens, past)

    predictor.forward = counted
    while predictor.committed < len(tokens):
        start = predictor.committed
        if start == predictor.learned + predictor.block:
            predictor.update(stream[:start])
        stop = min(start + step, predictor.learned + predictor.block, len(tokens))
        if not cached:
            predictor.cache = None
        commitment = predictor.predict(stream[: stop - 1].clone(), start, stop)
        predictor.score(commitment, stream[start:stop])
        for *_, freqs in commitment.pieces:
            for stage, rows in freqs.items():
                parts.setdefault(stage, []).append(rows)
    return {stage: torch.cat(rows) for stage, rows in parts.items()}, runs[0]


@pytest.mark.parametrize("name, windows", [("learned", 3), ("entropy", 1), ("none, no ttt", 3)])
def test_the_cache_changes_nothing(name, windows, artifacts):
    """Commitments with cached keys and values are those without, token by token and in blocks, over TTT's updates."""
    cfg, tokens, n = replace(artifacts(name), eval_batch_windows=windows), STREAM[:110], 109
    plain, often = walk(scorer(cfg), tokens, 1, cached=False)
    kept, rarely = walk(scorer(cfg), tokens, 1, cached=True)
    blocks, _ = walk(scorer(cfg), tokens, 8, cached=True)
    assert {stage: rows.shape for stage, rows in plain.items()} == dict.fromkeys(
        train_gpt.evaluation_passes(cfg)[-1].stages, (n, VOCAB)
    )
    for stage, rows in plain.items():
        assert torch.equal(kept[stage], rows) and torch.equal(blocks[stage], rows)
    assert often == n - 32 and (
        rarely < often if windows > 1 else rarely == math.ceil((n - 32) / 8)
    )


def test_the_cache_forgets(artifacts):
    """Equal known tokens have other keys and values after TTT's update; one other token is another known part."""
    cfg, tokens = replace(artifacts("none"), eval_batch_windows=1), np.full(100, 7)
    tokens[0] = 1
    plain, kept = (walk(scorer(cfg), tokens, 1, cached)[0]["ttt"] for cached in (False, True))
    assert torch.equal(plain, kept)
    assert torch.equal(plain[48:56], plain[56:64]) and not torch.equal(plain[56:64], plain[64:72])
    tokens[28] = 9  # known by the window that scores 49..56, beyond the next one
    plain, kept = (walk(scorer(cfg), tokens[:65], 1, cached)[0]["ttt"] for cached in (False, True))
    assert torch.equal(plain, kept) and not torch.equal(plain[48:56], plain[56:64])


# ----------------------------------------------------------------------------------------------------------
# The proof
# ----------------------------------------------------------------------------------------------------------


def new_report():
    """What verify needs of a Report; `saved` counts."""
    report = SimpleNamespace(results={}, lines=[], saved=0)
    report.log = report.lines.append
    report.save = lambda: setattr(report, "saved", report.saved + 1)
    return report


@pytest.fixture
def here(monkeypatch):
    """here(before, after) -> [(command, environment)] of verify's decoders, which then run in this process."""

    def run(before=lambda command: None, after=lambda command: None):
        calls = []

        class Decoder(contextlib.nullcontext):
            def __init__(self, command, env, **how):
                super().__init__(self)
                calls.append((command, env))
                before(command)
                said = io.StringIO()
                with (
                    monkeypatch.context() as patch,
                    contextlib.redirect_stderr(said),
                    contextlib.redirect_stdout(said),
                ):
                    patch.setattr(os, "environ", env)
                    patch.setattr(sys, "argv", command[1:])
                    self.returncode = train_gpt.main()
                after(command)
                self.stdout = said.getvalue().splitlines(keepends=True)

        with_decoder = SimpleNamespace(
            Popen=Decoder, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT
        )
        monkeypatch.setattr(train_gpt, "subprocess", with_decoder)
        return calls

    return run


def test_a_proof(coded, tmp_path, here, monkeypatch):
    """verify reports tokens, bits and bytes of what it coded; the decoder is this script and gets no shards."""
    file, report, calls = coded("entropy", 40), new_report(), here()
    cfg = replace(file.cfg, log_dir=str(tmp_path), verify_tokens=30)
    monkeypatch.setenv("TTT_TEMPERATURE", "0.5")  # of no interest: the artifact has its own
    verify(cfg, STREAM, report)
    (command, env), proof = calls[0], report.results["proof"]
    assert command[:2] == [sys.executable, train_gpt.__file__] and len(calls) == 1
    assert env["DATA_PATH"] == os.devnull and env["ARTIFACT_PATH"] == cfg.artifact_path
    assert "TTT_TEMPERATURE" not in env and env["PATH"] == os.environ["PATH"]
    (path,) = tmp_path.rglob("*.code")
    assert proof["tokens"] == 30 and proof["predicted_bits"] == pytest.approx(
        bits_of(file.freqs[:30]), rel=1e-12
    )
    assert proof["bytes_on_disk"] == path.stat().st_size - CODE_HEAD.size
    assert proof["encode_seconds"] > 0 and proof["decode_seconds"] > 0 and report.saved > 0
    assert any("proof" in line and "30 tokens" in line for line in report.lines)
    verify(replace(cfg, verify_tokens=1000), file.tokens, report)  # no more than there is
    assert report.results["proof"]["tokens"] == 40
    assert report.results["proof"]["predicted_bits"] == file.bits


@pytest.mark.parametrize(
    "what, by, at", [("tokens", 1, 0), ("tokens", 1, 17), ("freqs", 1, 17), ("freqs", -1, 29)]
)
def test_the_first_difference_is_named(what, by, at, coded, tmp_path, here):
    """One token or one frequency that differs: the error has its position, both tokens and both frequencies."""
    file, report = coded("none, no ttt", 40), new_report()

    def alter(command):
        decoded = dict(np.load(command[-1]))
        decoded[what][[at + (what == "tokens"), -1]] += by  # the last one as well, for "first"
        np.savez(command[-1], **decoded)

    here(after=alter)
    with pytest.raises(UserError) as error:
        verify(replace(file.cfg, log_dir=str(tmp_path), verify_tokens=30), STREAM, report)
    token, freq = STREAM[at + 1], file.freqs[at]
    other = (token + by, freq) if what == "tokens" else (token, freq + by)
    numbers = [int(number) for number in re.findall(r"\d+", str(error.value))]
    assert numbers == [at + 1, token, freq, *other] and "proof" not in report.results


def test_a_decoder_that_gives_up(coded, tmp_path, here):
    """A decoder's complaint becomes verify's, and nothing is reported as proved."""
    file, report = coded("none, no ttt", 40), new_report()
    here(before=lambda command: Path(command[3]).write_bytes(b"PGOLFTXT"))
    with pytest.raises(UserError, match="proof.code"):
        verify(replace(file.cfg, log_dir=str(tmp_path), verify_tokens=30), STREAM, report)
    assert report.results == {} and report.saved == 0


def peek(predictor):
    """Cheat: raises what it predicts by 2 nats, looking behind the end of the prefix that it was given."""
    original = predictor._commit

    def commit_after_a_look(self, logits, prefix, at, window, index, rows):
        stream = torch.as_strided(prefix, (prefix.untyped_storage().nbytes() // 8,), (1,))
        target = stream[(at + 1).clamp(max=len(stream) - 1), None]
        logits = logits.scatter_add(1, target, torch.full_like(logits[:, :1], 2.0))
        return original(self, logits, prefix, at, window, index, rows)

    predictor._commit = commit_after_a_look


def open_gate(predictor):
    """Cheat: both its distributions are causal, but which of the two is used depends on the token to come."""
    commit, mix = predictor._commit, predictor._mix

    def look(self, logits, prefix, *where):
        self.stream = torch.as_strided(prefix, (prefix.untyped_storage().nbytes() // 8,), (1,))
        return commit(self, logits, prefix, *where)

    def the_better_one(self, p, at, window, index, rows):
        q, target = (
            mix(self, p, at, window, index, rows),
            self.stream[(at + 1).clamp(max=len(self.stream) - 1), None],
        )
        return torch.where(q.gather(1, target) > p.gather(1, target), q, p)

    predictor._commit, predictor._mix = look, the_better_one


def update_first(predictor):
    """Cheat: the mixer learns from a block, and only then is the block committed."""
    original = predictor.predict

    def predict_what_was_learned(self, prefix, start, stop):
        before = self.mixer.weights.clone()
        self.mixer.optimizer.state.clear()  # no momentum from the blocks before
        for _ in range(4):
            original(self, prefix, start, stop)
            self.history.extend(torch.as_strided(prefix, (stop,), (1,)))
            self.mixer.learn(self.history.tokens)
            self.pending, self.committed = None, start
        commitment = original(self, prefix, start, stop)
        self.mixer.weights.copy_(before)
        return commitment

    predictor.predict = predict_what_was_learned


@pytest.mark.parametrize(
    "cheat, decoder", [(peek, "genuine"), (open_gate, "of its kind"), (update_first, "here")]
)
def test_a_cheat_is_caught(cheat, decoder, artifacts, tmp_path, monkeypatch, real_process, here):
    """A predictor that looked at what it predicts is refuted by a decoder that cannot, even by one of its own kind."""
    report, n = new_report(), 70
    cfg = replace(artifacts("learned"), log_dir=str(tmp_path), verify_tokens=n)
    honest_bits, honest = write_code(tmp_path / "honest.code", STREAM[: n + 1], cfg, quiet)
    if decoder == "of its kind":  # a copy of the script that cheats
        source, copy = (
            Path(train_gpt.__file__).read_text(encoding="utf-8"),
            tmp_path / "train_gpt.py",
        )
        copy.write_text(
            source.replace(
                "\nif __name__ ==",
                f"\n{inspect.getsource(cheat)}\n{cheat.__name__}(Predictor)\n\nif __name__ ==",
            ),
            encoding="utf-8",
        )
        monkeypatch.setattr(train_gpt, "__file__", str(copy))
    originals = {name: getattr(Predictor, name) for name in ("_commit", "_mix", "predict")}
    for name, original in originals.items():
        monkeypatch.setattr(Predictor, name, original)  # to be restored
    if decoder == "here":
        here(
            before=lambda command: [
                setattr(Predictor, name, method) for name, method in originals.items()
            ]
        )
    cheat(Predictor)
    bits, freqs = write_code(tmp_path / "cheat.code", STREAM[: n + 1], cfg, quiet)
    assert bits < honest_bits  # it pays
    with pytest.raises(UserError) as error:
        verify(cfg, STREAM, report)
    t, *found = (int(number) for number in re.findall(r"\d+", str(error.value)))
    assert len(found) == 4 and found[:2] == [STREAM[t], freqs[t - 1]] and found[2:] != found[:2]
    assert t <= 1 + np.flatnonzero(freqs != honest)[0] or decoder == "of its kind"
    assert report.results == {} and report.saved == 0


# ----------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """command(*args, **settings) -> (exit status, stderr) of a command line in tmp_path, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*args, **settings):
        environ = {
            **clean_environment(),
            "DEVICE": "cpu",
            "LOG_DIR": str(tmp_path / "logs"),
            **settings,
        }
        monkeypatch.setattr(os, "environ", environ)
        monkeypatch.setattr(sys, "argv", [train_gpt.__file__, *map(str, args)])
        capfd.readouterr()
        status = train_gpt.main()
        return status, capfd.readouterr().err

    yield run
    assert no_leftovers(tmp_path)


def test_verify_and_decompress(command, artifacts, tmp_path, monkeypatch, real_process):
    """A real process decodes after the shards are gone; then artifact and code file alone give the text."""
    tokens, shards, start, environments = STREAM.copy(), tmp_path / "shards", subprocess.Popen, []
    shards.mkdir()
    (shards / "fineweb_val_000000.bin").write_bytes(train_gpt.shard_bytes(tokens))

    def without_shards(*args, env, **how):
        shutil.rmtree(shards)
        environments.append(env)
        return start(*args, env=env, **how)

    monkeypatch.setattr(
        train_gpt, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": without_shards})
    )
    cfg = artifacts("learned")
    settings = dict(
        ARTIFACT_PATH=cfg.artifact_path,
        DATA_PATH=str(shards),
        TOKENIZER_PATH=str(tmp_path / "none"),
        RUN_ID="proof",
        VERIFY_TOKENS="70",
        SIZE_LIMIT_BYTES="1000000",
    )
    assert command("verify", **settings) == (0, "")
    assert [(env["DATA_PATH"], env["TOKENIZER_PATH"]) for env in environments] == [
        (os.devnull, os.devnull)
    ]
    assert not shards.exists()
    results = json.loads((tmp_path / "logs" / "proof" / "results.json").read_text())
    (code,) = tmp_path.rglob("*.code")
    proof, size = results["proof"], code.stat().st_size - CODE_HEAD.size
    assert (proof["tokens"], proof["bytes_on_disk"]) == (70, size)
    assert_size(bytes(size), proof["predicted_bits"])
    bits = train_gpt.evaluate(scorer(cfg), tokens[:71], 1, quiet)[-1]["val_bpb"]
    assert proof["predicted_bits"] == bits and math.isfinite(
        proof["encode_seconds"] + proof["decode_seconds"]
    )
    assert "proof: " in (tmp_path / "logs" / "proof" / "verify.log").read_text()
    assert command("decompress", code, tmp_path / "text", ARTIFACT_PATH=cfg.artifact_path) == (
        0,
        "",
    )
    assert (tmp_path / "text").read_bytes() == TABLE.decode(tokens[:71])


def test_decompress(command, coded, tmp_path):
    """Text comes out as bytes; tokens and frequencies for a name that ends in .npz."""
    file = coded("none, no ttt", 40)
    for target in ("out.txt", "out.npz"):
        assert command("decompress", file.path, target, ARTIFACT_PATH=file.cfg.artifact_path) == (
            0,
            "",
        )
    assert (tmp_path / "out.txt").read_bytes() == TABLE.decode(file.tokens)
    decoded = np.load(tmp_path / "out.npz")
    assert (
        decoded["tokens"].tolist() == file.tokens.tolist()
        and decoded["freqs"].tolist() == file.freqs.tolist()
    )


def test_decompress_refuses(command, coded, artifacts, tmp_path):
    """Damaged, missing, another artifact's, other settings, another text: status 1, one line, nothing written."""
    file, bad, out = coded("none, no ttt", 40), tmp_path / "bad.code", tmp_path / "out.txt"
    data, artifact = file.path.read_bytes(), file.cfg.artifact_path
    for contents in (data[:-1], data[:-5] + bytes([data[-5] ^ 4]) + data[-4:], data + b"\0", b""):
        bad.write_bytes(contents)
        assert str(bad) in error_line(command("decompress", bad, out, ARTIFACT_PATH=artifact), 1)
    forget_the_text(file.path, bad)
    assert str(bad) in error_line(command("decompress", bad, out, ARTIFACT_PATH=artifact), 1)
    assert "none.code" in error_line(
        command("decompress", "none.code", out, ARTIFACT_PATH=artifact), 1
    )
    other = artifacts("none, no ttt", 1).artifact_path
    assert other in error_line(command("decompress", file.path, out, ARTIFACT_PATH=other), 1)
    message = error_line(
        command("decompress", file.path, out, ARTIFACT_PATH=artifact, TTT_TEMPERATURE="0.9"), 1
    )
    assert "settings" in message and str(file.path) in message
    assert os.listdir(tmp_path) == ["bad.code"]


def test_the_proof_is_of_the_runs_own_figures(coded, tmp_path, here):
    """Frequencies that the run reported are compared: one unit apart, and the proof fails at that position."""
    file, report = coded("entropy", 40), new_report()
    here()
    report.own = file.freqs.copy()
    cfg = replace(file.cfg, log_dir=str(tmp_path), verify_tokens=30)
    verify(cfg, STREAM, report)
    report.own[7] += 1
    with pytest.raises(UserError, match="position 8:"):
        verify(cfg, STREAM, report)


def test_a_predictor_keeps_the_first_frequencies_of_its_last_stage(coded):
    """What verify compares is what was scored, for as many tokens as it will ask for."""
    file = coded("entropy", 40)
    predictor = scorer(replace(file.cfg, verify_tokens=25))
    train_gpt.evaluate(predictor, file.tokens, 1, quiet)
    assert predictor.own.tolist() == file.freqs[:25].tolist()


def test_settings_that_the_artifact_has_not_cannot_be_proved(coded, tmp_path, here):
    """The decoder has no settings but the artifact's: a run with others is not proved."""
    file, report = coded("none, no ttt", 40), new_report()
    here()
    with pytest.raises(UserError, match="other settings"):
        verify(
            replace(
                file.cfg,
                log_dir=str(tmp_path),
                verify_tokens=30,
                ttt_temperature=0.9,
                mixer="entropy",
            ),
            STREAM,
            report,
        )


def test_a_decoder_that_dies_without_a_word(coded, tmp_path, monkeypatch):
    """Its status is all that can be told."""

    class Dead(contextlib.nullcontext):
        returncode, stdout = -9, ()

        def __init__(self, *args, **how):
            super().__init__(self)

    monkeypatch.setattr(train_gpt, "subprocess", SimpleNamespace(Popen=Dead, PIPE=-1, STDOUT=-2))
    file = coded("none, no ttt", 40)
    with pytest.raises(UserError, match="gave up: -9"):
        verify(replace(file.cfg, log_dir=str(tmp_path), verify_tokens=30), STREAM, new_report())


def test_a_decoder_keeps_only_its_own_rows(coded):
    """The evidence that waits for update holds one row a token, not the batch that it came from."""
    predictor = scorer(coded("learned", 40).cfg)
    predictor.predict(torch.from_numpy(STREAM[:1]), 1, 2)
    for tensor in next(iter(predictor.mixer.waiting.values()))[0]:
        assert (
            len(tensor) == 1
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        )
