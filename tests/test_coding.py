"""Range coder and code files: what was committed comes back, and whatever is amiss is refused."""

import hashlib
import math
import re
import struct
import zlib
from dataclasses import replace

import constriction
import numpy as np
import pytest
import torch
from conftest import (
    CODED_STREAM,
    CODED_TOKENS,
    TABLE,
    VOCAB,
    assert_size,
    bits_of,
    codec,
    forget_the_text,
    last_stage_predictor,
    quiet,
    refusal,
)

import train_gpt
from train_gpt import CODE_HEAD, CODE_START, TOTAL, RangeDecoder, RangeEncoder, walk

pytestmark = pytest.mark.usefixtures("one_core")

HEAD_BYTES = CODE_START.size + CODE_HEAD.size


# ---- Range coder ---------------------------------------------------------------------------------


def shares(tables, symbols):
    """(starts, frequencies) of symbols (n,) under one table (V,) or under a table each (n, V)."""
    starts = np.cumsum(tables, -1) - tables
    if tables.ndim == 1:
        return starts[symbols], tables[symbols]
    rows = np.arange(len(symbols))
    return starts[rows, symbols], tables[rows, symbols]


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
    """The table with the largest possible frequency, 2^24 - (V - 1), at `top`, and 1 elsewhere."""
    table = np.ones(vocab, dtype=np.int64)
    table[top] = TOTAL - (vocab - 1)
    return table


def coder_cases():
    """{name: (tables, symbols)}."""
    random = np.random.default_rng(5)
    cases = {}
    for name, n, vocab, sharpness in (
        ("V=1024, flat", 1500, 1024, 0.1),
        ("V=1024, skewed", 1500, 1024, 4.0),
        ("V=2, a table each", 5000, 2, 2.0),
        ("V=64, very skewed", 5000, 64, 12.0),
    ):
        tables = random_tables(n, n, vocab, sharpness)
        cases[name] = tables, draw(n, tables)
    for vocab, top in ((2, 0), (2, 1), (1024, 0), (1024, 500), (1024, 1023)):
        name = f"V={vocab}, peak at {top}"
        table = peaked(vocab, top)
        rare = random.integers(0, vocab, 4000)
        often = np.where(random.random(4000) < 0.9, top, rare)
        cases[f"{name}, often"] = table, often
        cases[f"{name}, never"] = table, np.full(3000, (top + 1) % vocab)
        cases[f"{name}, always"] = table, np.full(20_000, top)
    table = np.array([9_000_001, TOTAL - 9_000_001])
    cases["long"] = table, (random.integers(0, TOTAL, 300_000) >= table[0]).astype(np.int64)
    return cases


CASES = coder_cases()


@pytest.mark.parametrize("name", CASES)
def test_symbols_come_back_in_the_predicted_size(name):
    """What was coded is decoded, and takes the bits of its frequencies."""
    tables, symbols = CASES[name]
    words = encode(tables, symbols)
    assert decode(words, tables, len(symbols)) == symbols.tolist()
    assert_size(words, bits_of(shares(tables, symbols)[1]))


@pytest.mark.parametrize("name", CASES)
def test_size_is_that_of_constriction(name):
    """Constriction's range coder needs as many words under the same frequencies."""
    tables, symbols = CASES[name]
    weights = tables - 1.0  # its model gives each symbol 1 of 2^24 more
    other = constriction.stream.queue.RangeEncoder()
    symbols32 = symbols.astype(np.int32)
    if tables.ndim == 1:
        other.encode(symbols32, constriction.stream.model.Categorical(weights, perfect=False))
    else:
        other.encode(symbols32, constriction.stream.model.Categorical(perfect=False), weights)
    assert_size(encode(tables, symbols), 32 * len(other.get_compressed()))


def boundary(encoder):
    """The roundest number inside the interval: until it is left, a byte before may still change."""
    for power in range(64, -1, -1):
        point = ((encoder.low >> power) + 1) << power
        if point < encoder.low + encoder.range:
            return point


def straddle(table, runs):
    """(symbols, code words): each of `runs` (length, step) stays on the boundary, then leaves it.

    Its last symbol is `step` above the one that holds the boundary.
    """
    encoder = RangeEncoder()
    symbols = []
    ends = np.cumsum(table)
    for length, step in runs:
        left = length
        leaves = False
        while not leaves:
            share = (boundary(encoder) - encoder.low) // (encoder.range >> 24)
            symbol = min(int(np.searchsorted(ends, share, side="right")), len(table) - 1)
            left -= 1
            leaves = left < 0 and 0 <= symbol + step < len(table)
            if leaves:
                symbol += step
            symbols.append(symbol)
            encoder.encode(int(ends[symbol] - table[symbol]), int(table[symbol]))
    return np.array(symbols), encoder.finish()


@pytest.mark.parametrize("vocab, sharpness", [(3, 0.3), (3, 3.0), (64, 1.0), (1024, 2.0)])
def test_streams_that_straddle_a_boundary_come_back(vocab, sharpness):
    """They stay on the middle of the interval as long as they can, then leave it, up or down."""
    random = np.random.default_rng(vocab)
    table = random_tables(vocab, 1, vocab, sharpness)[0]
    lengths = random.geometric(0.05, 150).tolist()
    steps = random.choice([-1, 1], 150).tolist()
    symbols, words = straddle(table, list(zip(lengths, steps)))
    assert decode(words, table, len(symbols)) == symbols.tolist()
    assert_size(words, bits_of(table[symbols]))
    assert words.count(0) + words.count(255) > len(words) / 16  # eight times what is usual


@pytest.mark.parametrize("vocab, length", [(3, 20_000), (100, 4000)])
def test_carry_runs_through_thousands_of_bytes(vocab, length):
    """After a run of bytes 255 a symbol carries into all of them; one symbol lower, into none."""
    table = random_tables(vocab, 1, vocab, 0.3)[0]
    tail = [(3, -1), (2, 1), (3, 1)]
    low_symbols, low = straddle(table, [(length, -1), *tail])
    high_symbols, high = straddle(table, [(length, 1), *tail])
    low_run = len(low) - 1 - len(low[1:].lstrip(b"\xff"))
    high_run = len(high) - 1 - len(high[1:].lstrip(b"\0"))
    assert low_run > 2000
    assert high_run > 2000
    assert high[0] == low[0] + 1
    assert decode(low, table, len(low_symbols)) == low_symbols.tolist()
    assert decode(high, table, len(high_symbols)) == high_symbols.tolist()
    assert_size(low, bits_of(table[low_symbols]))
    assert_size(high, bits_of(table[high_symbols]))


def test_empty_stream_has_a_code_of_a_few_bytes():
    """Nothing coded takes next to nothing."""
    assert len(RangeEncoder().finish()) <= 64


def test_no_words_decode_to_first_symbols():
    """No words at all can still be asked for symbols: beyond the end there are zeros."""
    assert decode(b"", np.array([5, TOTAL - 5]), 3) == [0, 0, 0]


def test_words_may_be_followed_by_others():
    """Bytes beyond the end of the code do not change what is decoded."""
    tables, symbols = CASES["V=64, very skewed"]
    words = encode(tables, symbols) + b"\xa5" * 40
    assert decode(words, tables, len(symbols)) == symbols.tolist()


def test_cut_words_decode_up_to_the_cut():
    """Half of the words give the first symbols, then others."""
    tables, symbols = CASES["V=64, very skewed"]
    words = encode(tables, symbols)
    cut = decode(words[: len(words) // 2], tables, len(symbols))
    assert cut[:1000] == symbols[:1000].tolist()
    assert cut != symbols.tolist()


def foreign_words():
    """{name: bytes} that no encoder has written, or not for these symbols."""
    words = encode(*CASES["V=64, very skewed"])
    return {
        "none": b"",
        "one byte": b"\x80",
        "seven bytes": words[:7],
        "all but the first byte": words[1:],
        "many times 255": b"\xff" * 20_000,
        "255 and then zeros": b"\xff" * 100,
        "random": np.random.default_rng(1).bytes(20_000),
    }


@pytest.mark.parametrize("name", foreign_words())
def test_foreign_words_give_symbols_and_a_bounded_state(name):
    """Symbols of the vocabulary come out, and no state grows beyond its bounds."""
    tables, _ = CASES["V=64, very skewed"]
    decoder = RangeDecoder(foreign_words()[name])
    found = [decoder.decode(row) for row in tables]
    assert min(found) >= 0
    assert max(found) < 64
    assert 0 <= decoder.value < 1 << 64
    assert 1 << 48 <= decoder.range <= 1 << 64


# ---- Code files ----------------------------------------------------------------------------------

NAMES = [
    ("learned", CODED_TOKENS),
    ("entropy", CODED_TOKENS),
    ("none", CODED_TOKENS),
    ("learned, no ttt", 90),
    ("none, no ttt", 90),
]


@pytest.mark.parametrize("name, n", NAMES)
def test_code_file_gives_tokens_frequencies_and_text_back(name, n, code_files):
    """What the decoder returns is what the encoder had."""
    file = code_files(name, n)
    decoded = codec(file.cfg).decode(file.path)
    assert decoded.tokens.tolist() == file.tokens.tolist()
    assert decoded.text == TABLE.decode(file.tokens)
    assert len(file.freqs) == n
    assert decoded.freqs.tolist() == file.freqs.tolist()


@pytest.mark.parametrize("name, n", NAMES)
def test_code_file_holds_what_the_scorer_commits(name, n, code_files):
    """Bits and frequencies are those of the scorer, and its tables decode the words."""
    file = code_files(name, n)
    predictor = last_stage_predictor(file.cfg)
    stages, _ = train_gpt.evaluate(predictor, file.tokens, 1, quiet)  # of one byte
    assert file.bits == stages[-1]["val_bpb"]
    assert stages[-1]["tokens"] == n
    assert file.bits == pytest.approx(
        bits_of(file.freqs), abs=n / 2**31
    )  # summed in units of 2^-30
    predictor = last_stage_predictor(file.cfg)
    stage = predictor.plan.stages[-1]
    rows = [c.table(stage) for c, _, _ in walk(predictor, torch.from_numpy(file.tokens))]
    tables = torch.cat(rows).numpy().astype(np.int64)
    words = file.path.read_bytes()[HEAD_BYTES:]
    assert shares(tables, file.tokens[1:])[1].tolist() == file.freqs.tolist()
    assert decode(words, tables, n) == file.tokens[1:].tolist()
    assert_size(words, file.bits)


def test_header_is_as_documented(code_files):
    """The file says what it holds, in 132 bytes."""
    file = code_files("learned")
    data = file.path.read_bytes()
    text = TABLE.decode(CODED_STREAM)
    header = struct.unpack("<8sIIIQQ32s32s32s", data[:132])
    magic, version, checksum, *counts, artifact, _, digest = header
    assert HEAD_BYTES == 132
    assert magic == b"PGOLFTXT"
    assert version == 2
    assert checksum == zlib.crc32(data[16:])
    assert counts == [0, CODED_TOKENS, len(text)]
    assert artifact == hashlib.sha256(file.cfg.artifact.read_bytes()).digest()
    assert digest == hashlib.sha256(text).digest()


def test_empty_text_has_a_code_file(artifacts, tmp_path):
    """BOS alone: no bits, no frequencies, no text, and a file that reads back."""
    coder = codec(artifacts("learned"))
    coded = coder.encode(CODED_STREAM[:1])
    assert coded.bits == 0
    assert len(coded.freqs) == 0
    assert len(coded.data) <= HEAD_BYTES + 64
    path = tmp_path / "empty.code"
    path.write_bytes(coded.data)
    decoded = coder.decode(path)
    assert decoded.tokens.tolist() == [1]
    assert len(decoded.freqs) == 0
    assert decoded.text == b""


@pytest.mark.parametrize("n", [1, 32, 33, 64])
def test_streams_may_end_at_borders_of_windows_and_chunks(n, artifacts, tmp_path):
    """They come back like any other."""
    coder = codec(artifacts("learned"))
    path = tmp_path / "short.code"
    path.write_bytes(coder.encode(CODED_STREAM[: n + 1]).data)
    decoded = coder.decode(path)
    assert decoded.tokens.tolist() == CODED_STREAM[: n + 1].tolist()
    assert decoded.text == TABLE.decode(CODED_STREAM[: n + 1])


def damaged(data):
    """{damage: bytes}: cuts of the header and the body, more bytes, a bit flipped in each."""
    sizes = {*range(HEAD_BYTES + 3), *range(HEAD_BYTES, len(data), 13), len(data) - 1}
    bad = {f"cut to {size}": data[:size] for size in sizes}
    bad |= {f"padded with {more}": data + more for more in (b"\0", b"\xff", b"\0" * 8, data)}
    for at in range(len(data)):
        flipped = bytes([data[at] ^ 1 << at % 8])
        bad[f"bit {at % 8} of {at}"] = data[:at] + flipped + data[at + 1 :]
    bad["another's"] = b"PGOLFART" + data[8:]
    bad["random"] = np.random.default_rng(0).bytes(500)
    return bad


def test_damaged_files_are_refused_before_a_model_is_built(code_files, tmp_path, monkeypatch):
    """The error names the file, whatever was done to it."""

    def fail(*args):
        raise AssertionError("a model was built")

    file = code_files("learned", 40)
    coder = codec(file.cfg)
    monkeypatch.setattr(train_gpt, "new_model", fail)
    path = tmp_path / "bad.code"
    for damage, contents in damaged(file.path.read_bytes()).items():
        path.write_bytes(contents)
        message = refusal(coder.decode, path)
        assert re.search(re.escape(str(path)) + " is (no code file|cut)", message), damage
    path.unlink()
    assert str(path) in refusal(coder.decode, path)


def test_undamaged_copy_is_read(code_files, tmp_path):
    """A file is what it holds, whatever its name."""
    file = code_files("learned", 40)
    path = tmp_path / "good.code"
    path.write_bytes(file.path.read_bytes())
    assert codec(file.cfg).decode(path).tokens.tolist() == file.tokens.tolist()


@pytest.mark.parametrize("lanes, engine", [(0, train_gpt.Windows), (4, train_gpt.Lanes)])
def test_logits_that_are_not_finite_are_told(lanes, engine, artifacts, tmp_path, monkeypatch):
    """By coder and decoder, in plain order and in lanes."""
    coder = codec(artifacts("learned"))
    path = tmp_path / "good.code"
    path.write_bytes(coder.encode(CODED_STREAM[:41], lanes).data)
    original = engine.logits

    def spoiled(self, prefix, *where):
        for batch, logits in original(self, prefix, *where):
            yield batch, logits.log() if len(prefix) > 20 else logits  # of negative ones: NaN

    monkeypatch.setattr(engine, "logits", spoiled)
    assert "logits are not finite" in refusal(coder.decode, path)
    assert "logits are not finite" in refusal(coder.encode, CODED_STREAM[:41], lanes)


def test_another_artifact_is_named(code_files, artifacts):
    """A code file belongs to one artifact."""
    file = code_files("none, no ttt", 40)
    other = replace(file.cfg, artifact_path=artifacts("none, no ttt", 1).artifact_path)
    message = refusal(codec(other).decode, file.path)
    assert str(file.path) in message
    assert other.artifact_path in message


@pytest.mark.parametrize(
    "change",
    [
        dict(ttt_temperature=0.97),
        dict(eval_batch_windows=2),
        dict(seed=1),
        dict(mixer="entropy"),
    ],
)
def test_settings_that_shape_the_code_must_be_equal(change, code_files):
    """Other ones are an error that names the file."""
    file = code_files("none, no ttt", 40)
    message = refusal(codec(replace(file.cfg, **change)).decode, file.path)
    assert "settings" in message
    assert str(file.path) in message


def test_settings_of_the_machine_do_not_matter(code_files):
    """Where things are does not shape a code."""
    file = code_files("none, no ttt", 40)
    changes = dict(data_path="nowhere", val_tokens=7, log_every=9, verify_tokens=3, log_dir="no")
    decoded = codec(replace(file.cfg, **changes)).decode(file.path)
    assert decoded.tokens.tolist() == file.tokens.tolist()


def test_text_that_was_not_coded_is_not_returned(code_files, tmp_path):
    """The text's checksum is compared: there is none where it differs, and tokens all the same."""
    file = code_files("none, no ttt", 40)
    path = tmp_path / "other.code"
    forget_the_text(file.path, path)
    decoded = codec(file.cfg).decode(path)
    assert decoded.text is None
    assert decoded.tokens.tolist() == file.tokens.tolist()


# ---- What a decoder repeats ----------------------------------------------------------------------


def walked(predictor, tokens, step, cached):
    """({stage: frequencies (n, V)} of a walk by `step`, runs of the known parts of windows)."""
    engine = predictor.engine
    forward = engine.forward
    runs = 0

    def counted(tokens, past=None):
        nonlocal runs
        runs += tokens.size(1) == 32 - 8
        return forward(tokens, past)

    engine.forward = counted
    parts = {stage: [] for stage in predictor.plan.stages}
    for commitment, _, _ in walk(predictor, torch.from_numpy(tokens), step=step):
        for stage, rows in parts.items():
            rows.append(commitment.table(stage))
        if not cached:
            engine.forget()
    return {stage: torch.cat(rows) for stage, rows in parts.items()}, runs


@pytest.mark.parametrize("name, windows", [("learned", 3), ("entropy", 1), ("none, no ttt", 3)])
def test_cache_changes_no_commitment(name, windows, artifacts):
    """Cached or not, token by token or in blocks, over TTT's updates: the same frequencies."""
    cfg = replace(artifacts(name), eval_batch_windows=windows)
    n = 109
    tokens = CODED_STREAM[: n + 1]
    plain, often = walked(last_stage_predictor(cfg), tokens, 1, cached=False)
    kept, rarely = walked(last_stage_predictor(cfg), tokens, 1, cached=True)
    blocks, _ = walked(last_stage_predictor(cfg), tokens, 8, cached=True)
    assert tuple(plain) == train_gpt.last_plan(cfg).stages
    for stage, rows in plain.items():
        assert rows.shape == (n, VOCAB)
        assert torch.equal(kept[stage], rows)
        assert torch.equal(blocks[stage], rows)
    assert often == n - 32
    if windows > 1:
        assert rarely < often
    else:
        assert rarely == math.ceil((n - 32) / 8)


def test_cache_forgets_at_an_update(artifacts):
    """Equal known tokens have other keys and values after TTT's update."""
    cfg = replace(artifacts("none"), eval_batch_windows=1)
    tokens = np.full(100, 7)
    tokens[0] = 1
    plain = walked(last_stage_predictor(cfg), tokens, 1, cached=False)[0]["ttt"]
    kept = walked(last_stage_predictor(cfg), tokens, 1, cached=True)[0]["ttt"]
    assert torch.equal(plain, kept)
    assert torch.equal(plain[48:56], plain[56:64])
    assert not torch.equal(plain[56:64], plain[64:72])


def test_cache_notices_one_other_token(artifacts):
    """A known part that differs in one token is another known part."""
    cfg = replace(artifacts("none"), eval_batch_windows=1)
    tokens = np.full(65, 7)
    tokens[0] = 1
    tokens[28] = 9  # known by the window that scores 49..56, beyond the next one
    plain = walked(last_stage_predictor(cfg), tokens, 1, cached=False)[0]["ttt"]
    kept = walked(last_stage_predictor(cfg), tokens, 1, cached=True)[0]["ttt"]
    assert torch.equal(plain, kept)
    assert not torch.equal(plain[48:56], plain[56:64])


def test_decoder_keeps_only_its_own_rows(artifacts):
    """The evidence that waits for update holds one row a token, not the batch it came from."""
    predictor = last_stage_predictor(artifacts("learned"))
    predictor.predict(torch.from_numpy(CODED_STREAM[:1]), 1, 2)
    (kept,) = predictor.mixture.learner.remembered.values()
    for tensor in kept[0]:
        assert len(tensor) == 1
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
