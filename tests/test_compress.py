"""The user's own files: bytes to tokens and back, lanes, `compress` and `decompress`."""

import math
import os
import random
import re
from collections import defaultdict

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (
    CODED_STREAM,
    CODER_SETTINGS,
    FINEST,
    ROOT,
    TABLE,
    VOCAB,
    WORD_BEGINS,
    Uniform,
    bits_of,
    codec,
    decompress_on_plain_machine,
    error_line,
    few_words,
    forget_the_text,
    refusal,
    tiny_config,
    tiny_stream,
    warm_weights,
)
from naive import (
    naive_commit,
    naive_context,
    naive_lane_order,
    naive_logit_grid,
    naive_rows,
    naive_shares,
)

import train_gpt
from train_gpt import (
    CODE_HEAD_BYTES,
    TOTAL,
    CodeHead,
    NgramHistory,
    OrderError,
    Predictor,
    gather_evidence,
    load_tokenizer,
    new_plan,
    text_tokens,
    walk,
)

pytestmark = pytest.mark.usefixtures("one_core")

HEAD_BYTES = CODE_HEAD_BYTES
README = (ROOT / "README.md").read_bytes()
SCRIPTS = (
    "Grüße, мир 世界 \u0645\u0631\u062d\u0628\u0627 \U0001f600 e\u0301 \ufb01ne \u00a0x\u2003y"
)
ODD_FILES = {
    "empty": b"",
    "one byte": b"\xff",
    "a letter": b"a",
    "a space": b" ",
    "a line end": b"\n",
    "spaces around": b"  two  spaces ",
    "line ends": b"one\r\ntwo\n\n\tthree\r",
    "NULs": b"a\0\0b \0 c",
    "invalid UTF-8": b"caf\xc3 \xe2\x82 \x80\x80 fine \xed\xa0\x80",
    "every byte": bytes(range(256)),
    "scripts": SCRIPTS.encode(),
    "the tokenizer's own marks": "\u2581a \u2581 <s></s> <0x0A> <unk>".encode(),
    "long": b"word " * 300 + b"z" * 3000,
    "a BOM": b"\xef\xbb\xbftext",
    "no end of line": b"x\n" * 40 + b"x",
}
PARTS = [b" ", b"  ", b"\n", b"\t", b"the", b"The", b"\xe2\x80\x99", b"\xe2", b"\0", b"1,000"]
PARTS += ["\ufb01".encode()]  # a ligature


# ---- Bytes to tokens -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (path, TokenTable, processor)} of 400 pieces each.

    One keeps text as it is; one folds it; one puts no space before a text's first word, like the
    challenge's.
    """
    folder = tmp_path_factory.mktemp("tokenizers")
    train_gpt.train_tokenizer(README.decode().split("\n\n"), 400, folder / "plain.model")
    for name, how in (
        ("folding", dict(normalization_rule_name="nmt_nfkc_cf")),
        ("bare", dict(add_dummy_prefix=False)),
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(README.decode().splitlines()),
            model_prefix=str(folder / name),
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **how,
        )
    paths = {name: folder / f"{name}.model" for name in ("plain", "folding", "bare")}
    return {name: (path, *load_tokenizer(path, 400)) for name, path in paths.items()}


@pytest.mark.parametrize("name", ["plain", "folding", "bare"])
def test_tokens_give_the_bytes_back(name, tokenizers):
    """Odd files, the README, random bytes, random mixtures of text and bytes."""
    _, table, sp = tokenizers[name]
    seeded = random.Random(1)
    files = [*ODD_FILES.values(), README, *(seeded.randbytes(n) for n in range(1, 60))]
    files += [b"".join(seeded.choices(PARTS, k=seeded.randrange(1, 12))) for _ in range(3000)]
    for data in files:
        tokens = text_tokens(data, table, sp.encode)
        assert tokens.dtype == np.int64
        assert tokens[0] == table.bos_id
        assert table.decode(tokens) == data


def byte_pieces(data):
    """Tokens of the byte pieces of data, in tokenizers whose first three pieces are marks."""
    return [3 + byte for byte in data]


def test_plain_words_have_the_tokens_of_sentencepiece(tokenizers):
    """In a line of plain words nothing is spelled."""
    _, table, sp = tokenizers["folding"]
    line = "the bits of a code that a decoder can read"
    assert text_tokens(line.encode(), table, sp.encode)[2:].tolist() == sp.encode(line)


def test_lines_have_the_tokens_of_sentencepiece(tokenizers):
    """Where a text's first word gets no space, lines are joined by the byte piece of their end."""
    _, table, sp = tokenizers["bare"]
    line = "the bits of a code that a decoder can read"
    second = f"bits {line}, {line}"
    tokens = text_tokens(f"{line}\n{second}".encode(), table, sp.encode)
    expected = [*sp.encode(line), *byte_pieces(b"\n"), *sp.encode(second)]
    assert tokens[1:].tolist() == expected


def test_line_ends_are_spelled(tokenizers):
    """White space other than one space before a word is in byte pieces."""
    _, table, sp = tokenizers["folding"]
    words = [*sp.encode("the"), *byte_pieces(b"\n"), *sp.encode("bits")]
    tokens = text_tokens(b"the\n bits", table, sp.encode)
    assert tokens.tolist() == [table.bos_id, table.bos_id, *words]


def test_words_that_would_change_are_spelled(tokenizers):
    """A capital that the tokenizer folds, and a second space."""
    _, table, sp = tokenizers["folding"]
    spelled = byte_pieces(b" Bits" + b" ")
    tokens = text_tokens(b"the Bits  read", table, sp.encode)
    expected = [*sp.encode("the"), *spelled, *sp.encode("read")]
    assert tokens.tolist() == [table.bos_id, table.bos_id, *expected]


def test_what_prints_nothing_swallows_no_space(tokenizers):
    """An `encode` that ends texts with </s>, begins them with <s>, or gives none: spaces stay."""
    _, table, sp = tokenizers["plain"]
    data = b"two words\n and more"
    for odd in (
        lambda text: [*sp.encode(text), 2],
        lambda text: [1, *sp.encode(text)],
        lambda text: [],
    ):
        assert table.decode(text_tokens(data, table, odd)) == data


def test_tokenizer_without_byte_pieces_is_refused():
    """What it cannot spell it could not give back."""
    assert "byte pieces" in refusal(text_tokens, b"text", TABLE, lambda text: [])


# ---- Lanes ---------------------------------------------------------------------------------------


def lanes_of(n, lanes):
    """A list of the token numbers of each lane, by numpy's own even split."""
    return [part.tolist() for part in np.array_split(np.arange(n), lanes)]


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 3, 4, 57])
def test_lanes_take_turns(artifacts, lanes, n):
    """Segments are coded a token each in turn, also where there are fewer tokens than lanes."""
    cfg = artifacts("learned")
    tokens = tiny_stream(n + 1, seed=5)
    _, _, freqs = codec(cfg).encode(tokens, lanes)
    artifact = train_gpt.read_artifact(cfg.artifact)
    plan = new_plan(cfg, lanes=lanes)
    predictor = Predictor(artifact.weights, TABLE, cfg, train_gpt.Runtime(), plan)
    steps = walk(predictor, interleaved(tokens[1:], lanes))
    expected = [commitment.chosen(targets, ["mixer"])[0, 0] for commitment, targets in steps]
    assert freqs.tolist() == torch.cat(expected).tolist()


@pytest.mark.parametrize("lanes, recent", [(2, 4), (3, 2), (4, 3)])
def test_occurrences_across_lanes_match_a_dictionary(lanes, recent):
    """Contexts go back within a lane and are found in all lanes.

    Those whose successor is still to come are not told.
    """
    tokens = few_words(lanes * 90, seed=lanes)
    cfg = tiny_config(ngram_order=9, ngram_recent=recent, ngram_hash_bits=20)
    history = NgramHistory(cfg, WORD_BEGINS, "cpu", lanes)
    seen = [defaultdict(list) for _ in range(6)]
    hidden = 0
    for row in range(90):
        at = np.arange(row * lanes, (row + 1) * lanes)
        history.extend(torch.from_numpy(tokens[: at[-1] + 1]))
        found = history.occurrences(torch.from_numpy(at))
        for end in at:
            own = tokens[end % lanes : end + 1 : lanes].tolist()  # the lane so far
            for kind in range(6):
                context = naive_context(own, len(own) - 1, kind, 9, WORD_BEGINS)
                ends = seen[kind][context][::-1][:recent]
                hidden += any(e >= at[0] for e in ends)
                expected = [e if e < at[0] else -1 for e in ends]
                expected += [-1] * (recent - len(expected))
                assert found[end - at[0], kind].tolist() == expected
                seen[kind][context].append(end)
    assert hidden > 5


def in_lanes(name, lanes, block=None, **changes):
    """A Predictor of a warm tiny model in lanes, under one of CODER_SETTINGS."""
    cfg = tiny_config(**{**CODER_SETTINGS[name], **changes})
    plan = new_plan(cfg, lanes=lanes)
    plan = plan._replace(block=block or plan.block)
    predictor = Predictor(warm_weights(cfg), TABLE, cfg, train_gpt.Runtime(), plan)
    predictor.cfg = cfg
    return predictor


def interleaved(tokens, lanes):
    """The coded stream of a text, without BOS, in lanes: a row of BOS, then lanes by turns."""
    start = np.full(lanes, TABLE.bos_id)
    return torch.from_numpy(np.append(start, tokens[naive_lane_order(len(tokens), lanes)]))


@pytest.mark.parametrize("tiles", [0, 1, 3])
@pytest.mark.parametrize("lanes, stride", [(1, 8), (4, 8), (2, 16)])
def test_each_lane_is_a_text_of_its_own(lanes, stride, tiles):
    """Its rows see the lane's own rows before them, run by run: the integers of plain passes."""
    predictor = in_lanes(
        "none, no ttt", lanes, block=10**6, eval_stride=stride, eval_run_tiles=tiles
    )
    n = 101
    text = tiny_stream(n + 1, seed=3)[1:]
    stream = interleaved(text, lanes)
    freqs = predictor.predict(stream[:-1], lanes, len(stream)).table("sliding")
    coded = dict(zip(naive_lane_order(n, lanes), freqs.tolist()))
    model = predictor.engine.model
    for part in lanes_of(n, lanes):
        lane = [TABLE.bos_id, *text[part[:-1]].tolist()]
        logits = naive_rows(model, predictor.cfg, lane, predictor.plan)
        expected = [naive_commit(naive_shares(row)) for row in naive_logit_grid(logits)]
        assert [coded[number] for number in part] == expected


@pytest.mark.parametrize("name", CODER_SETTINGS)
@pytest.mark.parametrize("lanes", [1, 4])
def test_rows_of_lanes_and_blocks_of_them_commit_alike(name, lanes):
    """A decoder goes row by row, an encoder block by block: every frequency of both is the same."""
    stream = interleaved(tiny_stream(102, seed=2)[1:], lanes)

    def tables(step):
        predictor = in_lanes(name, lanes, mixer_lr=0.05)
        stage = predictor.plan.stages[-1]
        steps = walk(predictor, stream, step=step)
        return torch.cat([commitment.table(stage) for commitment, _ in steps])

    blocks = tables(None)
    assert blocks.shape == (101, VOCAB)
    assert torch.equal(tables(lanes), blocks)


@pytest.mark.parametrize("name", ["learned, no ttt", "entropy"])
def test_no_row_of_lanes_depends_on_itself_or_later_ones(name):
    """A change of any token of a row leaves it and all before it alone; a later row notices."""
    lanes, n = 4, 200
    stream = interleaved(tiny_stream(n + 1, seed=2)[1:], lanes)

    def rows(tokens):
        predictor = in_lanes(name, lanes, mixer_lr=0.05)
        return torch.cat([c.table("mixer") for c, _ in walk(predictor, tokens)])

    plain = rows(stream)
    for t in (60, 61, 62, 63, 99, 150):
        changed = stream.clone()
        changed[t] = (changed[t] + 7) % VOCAB
        differs = (rows(changed) != plain).any(1)
        end = (t // lanes + 1) * lanes - lanes  # the first position of the row after t's
        assert not differs[:end].any()
        assert differs[end:].any()


def test_evidence_of_lanes_by_hand():
    """Of four occurrences: how many rows ago, and whether the model sees it.

    Rows hold two lanes; it sees its own lane's window only.
    """
    grid = torch.zeros(1, 8, dtype=torch.int64)
    slot = 3 * 4  # the context of 2 tokens
    ends = torch.full((1, 6, 4), -1)
    following = torch.zeros(1, 6, 4, dtype=torch.int64)
    ends[0, 3] = torch.tensor([19, 13, 12, 2])
    following[0, 3] = torch.tensor([1, 2, 3, 4])
    rows = torch.tensor([20])
    features = gather_evidence(grid, ends, following, rows, reach=8, lanes=2)[1]
    distance = features[0, 2 * 6 + 3, slot : slot + 4]
    inside = features[0, 3 * 6 + 3, slot : slot + 4]
    expected = [0, math.log2(3.5) / 8, 2 / 8, math.log2(9) / 8]
    assert distance.tolist() == pytest.approx(expected, abs=1e-6)
    assert inside.tolist() == [0, 0, 1, 0]


def test_lanes_learn_from_their_own_tokens():
    """What waits for the update are the block's positions, each with its candidates' tokens."""
    predictor = in_lanes("learned, no ttt", 2)
    mixture = predictor.mixture
    stream = interleaved(tiny_stream(81, seed=2)[1:], 2)
    for start in range(2, 66, 8):
        stop = start + 8
        commitment = predictor.predict(stream[: stop - 1], start, stop)
        predictor.score(commitment, stream[start:stop])
        *evidence, freqs, positions = map(torch.cat, zip(*mixture.remembered))
        assert positions.tolist() == list(range(start, stop))
        gradient = mixture.gradient(*evidence, freqs / TOTAL, stream[start:stop])
        predictor.update(stream[:stop])
        assert torch.allclose(mixture.weights.grad, gradient.mean(0), atol=2**-30)
    tokens, features = evidence
    distinct = features.any(1)
    known = set(stream[:58].tolist())  # candidates follow a known context: they have been seen
    for row, counts in zip(tokens, distinct):
        assert set(row[counts].tolist()) <= known
    assert distinct.any()
    assert mixture.blocks == 8


def test_lanes_keep_the_order_of_calls():
    """No block twice, none before the one before is scored, no update of half a block."""
    predictor = in_lanes("learned, no ttt", 2)
    stream = interleaved(CODED_STREAM[1:41], 2)
    commitment = predictor.predict(stream[:5], 2, 6)
    with pytest.raises(OrderError):
        predictor.predict(stream[:7], 6, 8)
    with pytest.raises(OrderError):
        predictor.update(stream[:6])
    predictor.score(commitment, stream[2:6])
    with pytest.raises(OrderError):
        predictor.update(stream[:6])


@pytest.mark.parametrize("name", CODER_SETTINGS)
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_text_in_lanes_comes_back(name, lanes, artifacts, tmp_path):
    """With its tokens and frequencies; the header names the lanes, and the size is predicted."""
    coder = codec(artifacts(name))
    path = tmp_path / "lanes.code"
    for n in (0, 1, 7, 211):
        text = CODED_STREAM[: n + 1]
        coded = coder.encode(text, lanes)
        path.write_bytes(coded.data)
        decoded = coder.decode(path)
        assert decoded.tokens.tolist() == text.tolist()
        assert decoded.text == TABLE.decode(text)
        assert decoded.freqs.tolist() == coded.freqs.tolist()
        assert len(coded.freqs) == n
        assert coded.bits == pytest.approx(bits_of(coded.freqs), abs=n / 2**31)
        head, _, words = CodeHead.unpack(path, coded.data)
        assert head.lanes == lanes
        assert abs(len(words) - coded.bits / 8) < 16


@pytest.mark.parametrize("lanes", [3, 16, 2**31])
def test_lanes_that_no_block_holds_are_refused(lanes, artifacts, tmp_path):
    """A file in order but for lanes that do not divide a block of 8 is refused by name."""
    coder = codec(artifacts("learned"))
    path = tmp_path / "odd.code"
    head, checks, words = CodeHead.unpack(path, coder.encode(CODED_STREAM[:41], 2).data)
    path.write_bytes(head._replace(lanes=lanes).pack(checks, words))
    assert f"odd.code has {lanes} lanes" in refusal(coder.decode, path)


# ---- compress ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coders(tokenizers, tmp_path_factory):
    """{name: settings for the commands} of an artifact for each tokenizer: warm mixer, TTT on."""
    cfg = tiny_config(
        vocab_size=400,
        num_layers=2,
        ve_layers="1",
        xsa_last_n=1,
        ttt_freeze_blocks=1,
        mixer="learned",
        device="cpu",
    )
    found = {}
    for name, (path, table, _) in tokenizers.items():
        artifact = tmp_path_factory.mktemp("artifact") / "model.lzma"
        data = train_gpt.pack_artifact(warm_weights(cfg), cfg, table, FINEST)
        artifact.write_bytes(data)
        found[name] = dict(ARTIFACT_PATH=str(artifact), TOKENIZER_PATH=str(path))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "folding"])
@pytest.mark.parametrize("kind", [*ODD_FILES, "README"])
def test_file_comes_back(kind, name, coders, command_line, tmp_path):
    """Byte for byte, whatever they hold; `decompress` needs no tokenizer."""
    data = ODD_FILES.get(kind, README[:1500])
    (tmp_path / "in").write_bytes(data)
    assert command_line("compress", "in", "code", **coders[name]) == (0, "")
    settings = {"ARTIFACT_PATH": coders[name]["ARTIFACT_PATH"]}
    assert command_line("decompress", "code", "out", **settings) == (0, "")
    assert (tmp_path / "out").read_bytes() == data
    assert (tmp_path / "in").read_bytes() == data


def test_lanes_are_as_many_as_a_block_holds(coders, command_line, tmp_path):
    """MIXER_BLOCK=8 of them for a text that has two windows a lane."""
    (tmp_path / "in").write_bytes(README[:1500])
    assert command_line("compress", "in", "code", **coders["plain"]) == (0, "")
    head, _, _ = CodeHead.unpack("code", (tmp_path / "code").read_bytes())
    assert head.lanes == 8


def test_empty_file_comes_back(coders, command_line, tmp_path):
    """It is coded in a header and next to nothing."""
    (tmp_path / "in").write_bytes(b"")
    assert command_line("compress", "in", "code", **coders["plain"]) == (0, "")
    assert (tmp_path / "code").stat().st_size <= HEAD_BYTES + 4 + 8
    assert command_line("decompress", "code", "out", **coders["plain"]) == (0, "")
    assert (tmp_path / "out").read_bytes() == b""


def test_compress_tells_sizes_and_rate(coders, tmp_path, monkeypatch, capsys):
    """Bytes in, bytes out, bits predicted and tokens a second."""
    (tmp_path / "in").write_bytes(README[:300])
    monkeypatch.chdir(tmp_path)
    environ = {"PRESET": "bench", "DEVICE": "cpu", **coders["plain"]}
    train_gpt.dispatch(["compress", "in", "out"], environ)
    size = (tmp_path / "out").stat().st_size
    line = (
        r"300 B -> ([\d,]+) B: a header of 196 B, the rest predicted as ([\d.]+) B; [\d,]+ tokens/s"
    )
    found = re.search(line, capsys.readouterr().out)
    assert int(found[1]) == size
    words = size - HEAD_BYTES - 2 * 4  # without the checks
    assert abs(float(found[2]) - words) < 16


def test_missing_file_is_named(coders, command_line, tmp_path):
    """And nothing is written."""
    message = error_line(command_line("compress", "none", "out", **coders["plain"]), 1)
    assert "none" in message
    assert not (tmp_path / "out").exists()


def test_missing_tokenizer_is_named(coders, command_line, tmp_path):
    """And nothing is written."""
    (tmp_path / "in").write_bytes(b"text")
    settings = coders["plain"] | {"TOKENIZER_PATH": str(tmp_path / "no.model")}
    message = error_line(command_line("compress", "in", "out", **settings), 1)
    assert message.startswith("TOKENIZER_PATH")
    assert settings["TOKENIZER_PATH"] in message
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_artifact_is_named(coders, command_line, tmp_path):
    """And nothing is written."""
    (tmp_path / "in").write_bytes(b"text")
    settings = coders["plain"] | {"TOKENIZER_PATH": coders["folding"]["TOKENIZER_PATH"]}
    message = error_line(command_line("compress", "in", "out", **settings), 1)
    assert message.startswith("TOKENIZER_PATH")
    assert settings["TOKENIZER_PATH"] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_file_compressed_here_comes_back_without_vector_units(coders, command_line, tmp_path):
    """In 8 lanes, the mixer learning all the way: on one thread and on two."""
    settings = coders["plain"]
    (tmp_path / "in").write_bytes(README[:1500])
    assert command_line("compress", "in", "code", **settings) == (0, "")
    path = tmp_path / "code"
    found = decompress_on_plain_machine(settings["ARTIFACT_PATH"], path)
    assert list(found.values()) == [README[:1500]] * 2


@pytest.mark.slow
def test_long_run_of_one_letter_comes_back(coders, command_line, monkeypatch, tmp_path):
    """One word of 100 kB is tokenized, coded in 8 lanes and comes back, by a stand-in predictor."""

    def uniform(weights, table, cfg, rt, plan):
        return Uniform(400, plan)

    monkeypatch.setattr(train_gpt, "Predictor", uniform)
    data = b"a" * 100_000
    (tmp_path / "in").write_bytes(data)
    assert command_line("compress", "in", "code", **coders["plain"]) == (0, "")
    assert command_line("decompress", "code", "out", **coders["plain"]) == (0, "")
    assert (tmp_path / "out").read_bytes() == data
    head, _, words = CodeHead.unpack("code", (tmp_path / "code").read_bytes())
    assert head.lanes == 8
    assert len(words) == pytest.approx(head.tokens * math.log2(400) / 8, rel=1e-3)


# ---- decompress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out.txt", "out.npz", "out"])
def test_decompress_gives_the_bytes_back_under_any_name(target, command_line, code_files, tmp_path):
    """The name of a file does not change what is written to it."""
    file = code_files("none, no ttt", 40)
    settings = {"ARTIFACT_PATH": file.cfg.artifact_path}
    assert command_line("decompress", file.path, target, **settings) == (0, "")
    assert (tmp_path / target).read_bytes() == TABLE.decode(file.tokens)
    assert os.listdir(tmp_path) == [target]


def test_decompress_refuses_damaged_files(command_line, code_files, tmp_path):
    """Cut, altered, padded, empty: status 1, one line that names the file, nothing written."""
    file = code_files("none, no ttt", 40)
    settings = {"ARTIFACT_PATH": file.cfg.artifact_path}
    data = file.path.read_bytes()
    flipped = [data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] for at in range(0, len(data), 7)]
    bad = tmp_path / "bad.code"
    for contents in (data[:-1], data + b"\0", b"", *flipped):
        bad.write_bytes(contents)
        message = error_line(command_line("decompress", bad, "out.txt", **settings), 1)
        assert f"{bad} is " in message
    assert os.listdir(tmp_path) == ["bad.code"]


def test_decompress_refuses_another_text(command_line, code_files, tmp_path):
    """The text's checksum decides: no text is written."""
    file = code_files("none, no ttt", 40)
    settings = {"ARTIFACT_PATH": file.cfg.artifact_path}
    bad = tmp_path / "bad.code"
    forget_the_text(file.path, bad)
    message = error_line(command_line("decompress", bad, "out.txt", **settings), 1)
    assert f"{bad} decodes to another text" in message
    assert os.listdir(tmp_path) == ["bad.code"]


def test_decompress_names_a_missing_file(command_line, code_files, tmp_path):
    """Status 1, one line, nothing written."""
    settings = {"ARTIFACT_PATH": code_files("none, no ttt", 40).cfg.artifact_path}
    assert "none.code" in error_line(command_line("decompress", "none.code", "out", **settings), 1)
    assert os.listdir(tmp_path) == []


def test_decompress_names_another_artifact(command_line, code_files, artifacts, tmp_path):
    """Status 1, one line, nothing written."""
    file = code_files("none, no ttt", 40)
    other = artifacts("none, no ttt", 1).artifact_path
    message = error_line(command_line("decompress", file.path, "out", ARTIFACT_PATH=other), 1)
    assert f"{file.path} was not made with the artifact {other}" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", [dict(TTT_TEMPERATURE="0.9"), dict(MIXER="entropy")])
def test_decompress_names_other_settings(change, command_line, code_files, tmp_path):
    """Status 1, one line, nothing written."""
    file = code_files("none, no ttt", 40)
    settings = {"ARTIFACT_PATH": file.cfg.artifact_path, **change}
    message = error_line(command_line("decompress", file.path, "out", **settings), 1)
    assert f"{file.path} was made with other settings" in message
    assert os.listdir(tmp_path) == []
