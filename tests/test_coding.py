"""Entropy coder and code files: what was committed comes back, and whatever is amiss is refused."""

import hashlib
import re
import struct
import tracemalloc
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
    Uniform,
    assert_size,
    bits_of,
    codec,
    last_stage_predictor,
    quiet,
    refusal,
    tiny_stream,
)

import train_gpt
from train_gpt import (
    CODE_HEAD_BYTES,
    STATE_MIN,
    TOTAL,
    CodeHead,
    SymbolDecoder,
    encode_symbols,
    walk,
)

pytestmark = pytest.mark.usefixtures("one_core")

HEAD_BYTES = CODE_HEAD_BYTES


# ---- Entropy coder -------------------------------------------------------------------------------


def frequencies(tables, symbols):
    """The frequencies of symbols (n,) under one table (V,) or under a table each (n, V)."""
    if tables.ndim == 1:
        return tables[symbols]
    return tables[np.arange(len(symbols)), symbols]


def encode(tables, symbols, lanes=1):
    """The words of symbols, which a number of lanes serves in turn."""
    starts = np.cumsum(tables, -1) - tables
    parts = [frequencies(t, symbols).astype(np.uint64) for t in (starts, tables)]
    return encode_symbols(*(part.reshape(-1, lanes) for part in parts))


def decode(words, tables, n):
    """n symbols decoded."""
    decoder = SymbolDecoder(words, 1)
    tables = np.broadcast_to(tables, (n, tables.shape[-1])).astype(np.uint64)
    symbols = [decoder.decode(table, table.cumsum() - table).item() for table in tables]
    return symbols


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
    assert_size(words, bits_of(frequencies(tables, symbols)))


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


@pytest.mark.parametrize("lanes", [2, 8, 125])
def test_lanes_come_back_step_by_step(lanes):
    """A step has a symbol of each lane, under a table of its own."""
    tables, symbols = CASES["V=64, very skewed"]
    words = encode(tables, symbols, lanes)
    flat = tables.astype(np.uint64).ravel()
    starts = flat.cumsum() - flat
    decoder = SymbolDecoder(words, lanes)
    steps = np.arange(len(tables)).reshape(-1, lanes)
    found = [decoder.decode(flat, starts, step.astype(np.uint64) * TOTAL) % 64 for step in steps]
    assert np.concatenate(found).tolist() == symbols.tolist()
    assert decoder.state.tolist() == [STATE_MIN] * lanes
    assert not len(decoder.words)
    assert len(words) - len(encode(tables, symbols)) <= 8 * lanes


def test_words_are_those_of_the_formula():
    """Three symbols of a table by Python's integers: x -> (x // f << 24) + x % f + start."""
    table = np.array([3, TOTAL - 8, 5])
    state = 1 << 32
    words = []
    for symbol in (2, 1, 0):  # from the end of 0, 1, 2
        freq = int(table[symbol])
        while state >= freq << 40:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // freq << 24) + state % freq + int(table[:symbol].sum())
    (word,) = words
    expected = struct.pack("<3I", state >> 32, state & 0xFFFFFFFF, word)
    assert encode(table, np.array([0, 1, 2])) == expected


def test_empty_stream_has_a_code_of_a_state():
    """Nothing coded takes 8 bytes."""
    assert encode(peaked(4, 0), np.zeros(0, int)) == struct.pack("<2I", 1, 0)


def test_decoder_ends_where_the_encoder_began():
    """After the last symbol the state is the first one, and all words are read."""
    tables, symbols = CASES["V=64, very skewed"]
    decoder = SymbolDecoder(encode(tables, symbols), 1)
    for table in tables.astype(np.uint64):
        decoder.decode(table, table.cumsum() - table)
    assert decoder.state == STATE_MIN
    assert not len(decoder.words)


def test_words_may_be_followed_by_others():
    """Bytes beyond the end of the code do not change what is decoded."""
    tables, symbols = CASES["V=64, very skewed"]
    words = encode(tables, symbols) + b"\xa5" * 40
    assert decode(words, tables, len(symbols)) == symbols.tolist()


@pytest.mark.parametrize("words", [b"", b"\x80", b"1234567", b"123456789"])
def test_parts_of_words_are_refused(words):
    """Less than a state, or less than a word."""
    with pytest.raises(ValueError):
        decode(words, peaked(4, 0), 1)


def test_cut_words_decode_up_to_the_cut():
    """Half of the words give the first symbols, then an error."""
    tables, symbols = CASES["V=64, very skewed"]
    words = encode(tables, symbols)
    cut = words[: len(words) // 8 * 4]
    assert decode(cut, tables[:1000], 1000) == symbols[:1000].tolist()
    with pytest.raises(ValueError):
        decode(cut, tables, len(symbols))


@pytest.mark.parametrize("words", [b"\xff" * 40_000, np.random.default_rng(1).bytes(40_000)])
def test_foreign_words_give_symbols(words):
    """Symbols of the vocabulary come out of what no encoder has written."""
    tables, _ = CASES["V=64, very skewed"]
    assert set(decode(words, tables, len(tables))) <= set(range(64))


# ---- Code files ----------------------------------------------------------------------------------

NAMES = [
    ("learned", CODED_TOKENS),
    ("entropy", CODED_TOKENS),
    ("none", CODED_TOKENS),
    ("learned, no ttt", 90),
    ("none, no ttt", 90),
]


def walked(predictor, tokens, step=None):
    """{stage: frequencies (n, V)} of a walk by `step`, or in blocks."""
    stages = predictor.plan.stages
    steps = walk(predictor, torch.from_numpy(tokens), step=step)
    rows = [[commitment.table(stage) for stage in stages] for commitment, _ in steps]
    return {stage: torch.cat(parts) for stage, parts in zip(stages, zip(*rows))}


def tables_of(file):
    """The frequencies of a code file's tokens, int32 (n, V), as the scorer commits them."""
    predictor = last_stage_predictor(file.cfg)
    return walked(predictor, file.tokens)[predictor.plan.stages[-1]].numpy()


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
    stages, _ = train_gpt.evaluate(predictor, file.tokens, 1, quiet, keep=1)  # of one byte
    assert file.bits == stages[-1]["val_bpb"]
    assert stages[-1]["tokens"] == n
    assert file.bits == pytest.approx(
        bits_of(file.freqs), abs=n / 2**31
    )  # summed in units of 2^-30
    tables = tables_of(file).astype(np.int64)
    _, _, words = CodeHead.unpack(file.path, file.path.read_bytes())
    assert frequencies(tables, file.tokens[1:]).tolist() == file.freqs.tolist()
    assert decode(words, tables, n) == file.tokens[1:].tolist()
    assert_size(words, file.bits)


def test_header_is_as_documented(code_files):
    """The file says what it holds and what made it, in 196 bytes."""
    file = code_files("learned")
    data = file.path.read_bytes()
    text = TABLE.decode(CODED_STREAM)
    header = struct.unpack("<8sIIIQQ32s32s32s64s", data[:196])
    magic, version, checksum, *counts, artifact, _, digest, maker = header
    capability = torch.backends.cpu.get_cpu_capability()
    assert HEAD_BYTES == 196
    assert magic == b"PGOLFTXT"
    assert version == 5
    assert checksum == zlib.crc32(data[16:])
    assert counts == [0, CODED_TOKENS, len(text)]
    assert artifact == hashlib.sha256(file.cfg.artifact.read_bytes()).digest()
    assert digest == hashlib.sha256(text).digest()
    made_with = f"torch {torch.__version__}, {capability}, 1 threads"
    assert maker == made_with.encode().ljust(64, b"\0")


def test_checks_of_the_first_position_and_of_all_follow_the_header(code_files):
    """They are CRC-32 of frequencies, int32; a file of up to 4,096 tokens has no others."""
    file = code_files("learned")
    data = file.path.read_bytes()
    checks = struct.unpack("<II", data[196:204])
    tables = tables_of(file).astype("<i4")
    assert checks == (zlib.crc32(tables[0].tobytes()), zlib.crc32(tables.tobytes()))
    assert CodeHead.unpack(file.path, data)[1:] == (checks, data[204:])


def test_checks_are_of_all_frequencies_so_far(code_files, monkeypatch):
    """Up to the first position, the 65th, the 129th, the 193rd and the last, with one every 64."""
    monkeypatch.setattr(train_gpt, "CHECK_EVERY", 64)
    file = code_files("learned")
    data = codec(file.cfg).encode(file.tokens).data
    tables = tables_of(file).astype("<i4")
    checks = [zlib.crc32(tables[:count].tobytes()) for count in (1, 65, 129, 193, None)]
    assert list(CodeHead.unpack("", data)[1]) == checks


def test_empty_text_has_a_code_file(artifacts, tmp_path):
    """BOS alone: no bits, no frequencies, no text, and a file that reads back."""
    coder = codec(artifacts("learned"))
    coded = coder.encode(CODED_STREAM[:1])
    assert coded.bits == 0
    assert len(coded.freqs) == 0
    assert len(coded.data) <= HEAD_BYTES + 4 + 8
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


ABSURD_HEADS = [
    (dict(tokens=10**6), "cannot hold 1,000,000 tokens"),
    (dict(tokens=2**63), "cannot hold 9,223,372,036,854,775,808 tokens"),
    (dict(tokens=2**64 - 1), "cannot hold 18,446,744,073,709,551,615 tokens"),
    (dict(lanes=3), "has 3 lanes"),
    (dict(lanes=32), "has 32 lanes"),
    (dict(lanes=2**32 - 1), "has 4294967295 lanes"),
]


@pytest.mark.parametrize("change, words", ABSURD_HEADS)
def test_absurd_heads_are_refused_before_work(change, words, code_files, tmp_path, monkeypatch):
    """Tokens and lanes that cannot be, in a file in order else: nothing is built for them."""
    file = code_files("none", 40)  # of blocks of 64
    path = tmp_path / "absurd.code"
    head, checks, code = CodeHead.unpack(file.path, file.path.read_bytes())
    path.write_bytes(head._replace(**change).pack(checks, code))
    coder = codec(file.cfg)
    monkeypatch.setattr(train_gpt, "Predictor", None)
    tracemalloc.start()
    message = refusal(coder.decode, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in message
    assert words in message
    assert peak < 1_000_000


@pytest.mark.parametrize("n, words", [(40, 0), (10_000, 3), (2**27 + 1, 1)])
def test_no_more_tokens_are_believed_than_words_can_hold(n, words):
    """A byte of code words is 2^27 tokens at most, of a frequency of nearly 2^24."""
    checks = [0] * (1 - -n // 4096)
    data = CodeHead(0, n, 1, *4 * [b""]).pack(checks, bytes(words))
    if n > words << 27:
        assert f"cannot hold {n:,} tokens" in refusal(CodeHead.unpack, "x.code", data)
    else:
        assert CodeHead.unpack("x.code", data)[0].tokens == n


@pytest.mark.parametrize("n", [0, 1, 4096, 4097, 20_000])
def test_cut_checks_are_refused(n):
    """A file that lacks one, and has no code words either, is told by name."""
    checks = [0] * -(-n // 4096)
    data = CodeHead(0, n, 1, *4 * [b""]).pack(checks, b"")
    assert f"x.code is cut or altered: it cannot hold {n:,} tokens" in refusal(
        CodeHead.unpack, "x.code", data
    )


@pytest.mark.parametrize("lanes", [0, 4])
def test_logits_that_are_not_finite_are_told(lanes, artifacts, tmp_path, monkeypatch):
    """By coder and decoder, in plain order and in lanes."""
    coder = codec(artifacts("learned"))
    path = tmp_path / "good.code"
    path.write_bytes(coder.encode(CODED_STREAM[:41], lanes).data)
    original = train_gpt.Engine.logits

    def spoiled(self, tokens, *where):
        for rows, logits in original(self, tokens, *where):
            yield rows, logits.log() if tokens.numel() > 20 else logits  # of negative ones: NaN

    monkeypatch.setattr(train_gpt.Engine, "logits", spoiled)
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
        dict(eval_run_tiles=3),
        dict(eval_stride=16),
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


@pytest.mark.parametrize(
    "change", [dict(text=bytes(32)), dict(text_bytes=0), dict(text_bytes=2**64 - 1)]
)
def test_text_that_was_not_coded_is_not_returned(change, code_files, tmp_path):
    """The text's checksum and length are compared, besides all checks."""
    file = code_files("none, no ttt", 40)
    path = tmp_path / "other.code"
    head, checks, words = CodeHead.unpack(file.path, file.path.read_bytes())
    path.write_bytes(head._replace(**change).pack(checks, words))
    assert f"{path} decodes to another text" in refusal(codec(file.cfg).decode, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_made_in_float64_only(dtype, artifacts):
    """In another type not every machine has the same integers."""
    cfg = replace(artifacts("none"), eval_dtype=dtype)
    message = refusal(codec, cfg)
    assert message.startswith(f"EVAL_DTYPE={dtype}: ")
    assert "float64" in message


# ---- A decoder that cannot follow ----------------------------------------------------------------

LONG_STREAM = tiny_stream(4099 + 1)


@pytest.fixture
def long_code(artifacts, tmp_path, monkeypatch):
    """(Codec, path, altered) of 4,099 tokens by a stand-in predictor; altered(t) spoils a unit."""

    def altered(position=-1):
        def stand_in(weights, table, cfg, rt, plan):
            return Uniform(VOCAB, plan, position)

        monkeypatch.setattr(train_gpt, "Predictor", stand_in)

    altered()
    coder = codec(artifacts("none, no ttt"))
    path = tmp_path / "long.code"
    path.write_bytes(coder.encode(LONG_STREAM).data)
    return coder, path, altered


def test_decoder_that_can_follow_says_nothing(long_code):
    """Over the three checks of 4,099 tokens."""
    coder, path, _ = long_code
    assert coder.decode(path).tokens.tolist() == LONG_STREAM.tolist()


@pytest.mark.parametrize(
    "position, check", [(1, 1), (2, 4097), (4096, 4097), (4097, 4097), (4098, 4099), (4099, 4099)]
)
def test_first_check_that_differs_is_told(position, check, long_code):
    """One unit of one frequency, though the tokens be the same; the last one counts as well."""
    coder, path, altered = long_code
    altered(position)
    message = refusal(coder.decode, path)
    assert f"{path} cannot be followed here: the frequencies up to token {check} are" in message


@pytest.mark.parametrize(
    "maker", [b"torch 9, ABACUS, 3 threads", b"x" * 64, b"\xff old", b"", None]
)
def test_what_made_the_file_is_told(maker, long_code):
    """By a decoder that cannot follow: the file's own words, or those of this machine's."""
    coder, path, altered = long_code
    head, checks, words = CodeHead.unpack(path, path.read_bytes())
    if maker is not None:
        path.write_bytes(head._replace(maker=maker).pack(checks, words))
    altered(1)
    written = head.maker.rstrip(b"\0") if maker is None else maker
    made_with = written.decode(errors="replace")
    assert f"are not those of {made_with}; decode it there" in refusal(coder.decode, path)


# ---- What a decoder repeats ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learned", "entropy", "none, no ttt"])
@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_cut_into_steps_changes_no_commitment(name, tiles, artifacts):
    """Token by token, by fives or in blocks, over TTT's update: the same frequencies."""
    cfg = replace(artifacts(name), eval_run_tiles=tiles)
    n = 109
    tokens = CODED_STREAM[: n + 1]
    blocks = walked(last_stage_predictor(cfg), tokens)
    assert tuple(blocks) == train_gpt.new_plan(cfg).stages
    for step in (1, 5):
        steps = walked(last_stage_predictor(cfg), tokens, step)
        assert steps.keys() == blocks.keys()
        for stage, rows in blocks.items():
            assert rows.shape == (n, VOCAB)
            assert torch.equal(steps[stage], rows)


@pytest.mark.parametrize("step", [1, 5, None])
@pytest.mark.parametrize("tiles, runs", [(0, [64]), (1, range(8, 109, 8)), (3, [24, 48, 64, 88])])
def test_every_row_is_computed_once(step, tiles, runs, artifacts):
    """Besides it, the 24 rows before each run, and no others: by coder and decoder alike."""
    predictor = last_stage_predictor(replace(artifacts("none"), eval_run_tiles=tiles))
    model = predictor.engine.model
    forward = model.forward
    computed = 0

    def counted(tokens, weights=None, cache=None, lead=0, unwanted=0):
        nonlocal computed
        if cache:  # else TTT trains
            computed += len(tokens) * (tokens.size(1) - lead)
        return forward(tokens, weights, cache, lead, unwanted)

    model.forward = counted
    n = 109
    walked(predictor, CODED_STREAM[: n + 1], step)
    assert computed == n + sum(min(first, 24) for first in runs)


@pytest.mark.parametrize("step", [1, None])
def test_update_changes_what_equal_tokens_get(step, artifacts):
    """Runs that know equal tokens have equal frequencies, but not before and after TTT's update."""
    cfg = replace(artifacts("none"), eval_run_tiles=1)
    tokens = np.full(100, 7)
    tokens[0] = 1
    freqs = walked(last_stage_predictor(cfg), tokens, step)["ttt"]
    assert torch.equal(freqs[48:56], freqs[56:64])
    assert not torch.equal(freqs[56:64], freqs[64:72])


@pytest.mark.parametrize("step", [1, None])
def test_one_other_token_changes_what_a_run_gets(step, artifacts):
    """A run whose known tokens differ in one is another run."""
    cfg = replace(artifacts("none"), eval_run_tiles=1)
    tokens = np.full(65, 7)
    tokens[0] = 1
    tokens[28] = 9  # known by the run of rows 48..55, beyond the next one
    freqs = walked(last_stage_predictor(cfg), tokens, step)["ttt"]
    assert not torch.equal(freqs[48:56], freqs[56:64])


def test_decoder_keeps_only_its_own_rows(artifacts):
    """The evidence that waits for update holds one row a token."""
    predictor = last_stage_predictor(artifacts("learned"))
    predictor.predict(torch.from_numpy(CODED_STREAM[:1]), 1, 2)
    (kept,) = predictor.mixture.remembered
    for tensor in kept:
        assert len(tensor) == 1
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
