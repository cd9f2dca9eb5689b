"""The user's own files: bytes to tokens and back, lanes in lockstep, and the commands `compress` and `decompress`."""

import math
import random
import re
import struct
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import VOCAB, tiny_config, tiny_stream, warm_model
from test_coding import SETTINGS, STREAM, TABLE, artifacts, bits_of, command, one_thread, quiet  # noqa: F401
from test_commands import error_line
from test_history import BEGINS, few_words, naive_context

import train_gpt
from train_gpt import (
    CODE_HEAD,
    TOTAL,
    Commitment,
    Lockstep,
    NgramHistory,
    OrderError,
    UserError,
    lane_order,
    load_tokenizer,
    read_code,
    text_tokens,
    write_code,
)

README = (Path(__file__).parent.parent / "README.md").read_bytes()
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
    "scripts": "Grüße, мир 世界 \u0645\u0631\u062d\u0628\u0627 \U0001f600 e\u0301 \ufb01ne \u00a0x\u2003y".encode(),
    "the tokenizer's own marks": "\u2581a \u2581 <s></s> <0x0A> <unk>".encode(),
    "long": b"word " * 300 + b"z" * 3000,
    "a BOM": b"\xef\xbb\xbftext",
    "no end of line": b"x\n" * 40 + b"x",
}


# ----------------------------------------------------------------------------------------------------------
# Bytes to tokens
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (path, TokenTable, processor)} of 400 pieces: one that keeps text as it is, one that folds it, one that
    puts no space before a text's first word, like the challenge's."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    texts = README.decode().split("\n\n")
    train_gpt.train_tokenizer(texts, 400, folder / "plain.model")
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
    for name in ("plain", "folding", "bare"):
        found[name] = (folder / f"{name}.model", *load_tokenizer(folder / f"{name}.model", 400))
    return found


@pytest.mark.parametrize("name", ["plain", "folding", "bare"])
def test_tokens_give_the_bytes_back(name, tokenizers):
    """Odd files, random bytes, random mixtures of text and bytes, and the README, under both tokenizers."""
    _, table, sp = tokenizers[name]
    seeded = random.Random(1)
    files = [*ODD_FILES.values(), README, *(seeded.randbytes(n) for n in range(1, 60))]
    parts = [
        b" ",
        b"  ",
        b"\n",
        b"\t",
        b"the",
        b"The",
        b"\xe2\x80\x99",
        b"\xe2",
        b"\0",
        "ﬁ".encode(),
        b"1,000",
    ]
    files += [b"".join(seeded.choices(parts, k=seeded.randrange(1, 12))) for _ in range(3000)]
    for data in files:
        tokens = text_tokens(data, table, sp.encode)
        assert (
            tokens.dtype == np.int64 and tokens[0] == table.bos_id and table.decode(tokens) == data
        )


def test_words_are_the_tokenizers(tokenizers):
    """Plain words of a line are the tokens that SentencePiece has for it; only what it would change is spelled out."""
    _, table, sp = tokenizers["folding"]
    line = "the bits of a code that a decoder can read"
    assert text_tokens(line.encode(), table, sp.encode)[2:].tolist() == sp.encode(line)
    _, bare, unprefixed = tokenizers["bare"]
    lines = f"{line}\nbits {line}, {line}"
    assert text_tokens(lines.encode(), bare, unprefixed.encode)[1:].tolist() == [
        *unprefixed.encode(line),
        3 + ord("\n"),
        *unprefixed.encode(lines[len(line) + 1 :]),
    ]
    bos, byte = table.bos_id, lambda data: [3 + b for b in data]
    assert text_tokens(b"the\n bits", table, sp.encode).tolist() == [
        bos,
        bos,
        *sp.encode("the"),
        *byte(b"\n"),
        *sp.encode("bits"),
    ]
    assert text_tokens(b"the Bits  read", table, sp.encode).tolist() == [
        bos,
        bos,
        *sp.encode("the"),
        *byte(b" Bits"),
        *byte(b" "),
        *sp.encode("read"),
    ]


def test_what_prints_nothing_does_not_swallow_a_space(tokenizers):
    """An `encode` that ends each text with </s> or begins it with <s>: the next word keeps its space."""
    _, table, sp = tokenizers["plain"]
    for odd in (
        lambda text: [*sp.encode(text), 2],
        lambda text: [1, *sp.encode(text)],
        lambda text: [],
    ):
        assert (
            table.decode(text_tokens(b"two words\n and more", table, odd))
            == b"two words\n and more"
        )


def test_a_tokenizer_without_bytes_is_refused():
    """What it cannot spell it could not give back."""
    with pytest.raises(UserError, match="byte pieces"):
        text_tokens(b"text", TABLE, lambda text: [])


# ----------------------------------------------------------------------------------------------------------
# Lanes
# ----------------------------------------------------------------------------------------------------------


def lanes_of(n, lanes):
    """A list of the token numbers of each lane, by numpy's own even split."""
    return [part.tolist() for part in np.array_split(np.arange(n), lanes)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 16])
def test_lanes_take_turns(lanes):
    """Segment by segment, in turns; the order is a permutation, for any length."""
    for n in (*range(40), 1000):
        parts = lanes_of(n, lanes)
        turns = [part[row] for row in range(n) for part in parts if row < len(part)]
        assert lane_order(n, lanes).tolist() == turns


@pytest.mark.parametrize("lanes, recent", [(2, 4), (3, 2), (4, 3)])
def test_occurrences_across_lanes(lanes, recent):
    """Contexts go back within a lane, are found in all lanes, and those whose successor is still to come are not told.
    Compared with a dictionary."""
    tokens = few_words(lanes * 90, seed=lanes)
    history = NgramHistory(
        tiny_config(ngram_order=9, ngram_recent=recent, ngram_hash_bits=20), BEGINS, "cpu", lanes
    )
    seen, hidden = [defaultdict(list) for _ in range(6)], 0
    for row in range(90):
        at = np.arange(row * lanes, (row + 1) * lanes)
        history.extend(torch.from_numpy(tokens[: at[-1] + 1]))
        found = history.occurrences(torch.from_numpy(at))
        for end in at:
            own = tokens[end % lanes : end + 1 : lanes].tolist()  # the lane so far
            for kind in range(6):
                context = naive_context(own, len(own) - 1, kind, 9, BEGINS)
                ends = seen[kind][context][::-1][:recent]
                hidden += any(e >= at[0] for e in ends)
                expected = [e if e < at[0] else -1 for e in ends]
                assert found[end - at[0], kind].tolist() == expected + [-1] * (
                    recent - len(expected)
                )
                seen[kind][context].append(end)
    assert hidden > 5


def lockstep(name, lanes, **changes):
    """(Lockstep over a warm tiny model, that model) under one of SETTINGS."""
    cfg = tiny_config(**{**SETTINGS[name], "ttt_enabled": False, **changes})
    rt = train_gpt.start_runtime(replace(cfg, device="cpu"), {})
    rt.dtype = torch.float32
    model = warm_model(cfg)
    return Lockstep(model, cfg, TABLE, rt, train_gpt.evaluation_passes(cfg)[-1], lanes), warm_model(
        cfg
    )


def interleaved(tokens, lanes):
    """The coded stream of a text (without BOS) in lanes, int64: a row of BOS, then the lanes by turns."""
    return torch.from_numpy(
        np.append(np.full(lanes, TABLE.bos_id), tokens[lane_order(len(tokens), lanes)])
    )


@pytest.mark.parametrize("lanes, stride", [(1, 8), (2, 8), (4, 8), (4, 32), (2, 16)])
def test_rows_see_their_lane_through_the_windows_of_a_sliding_evaluation(lanes, stride):
    """Row by row over cached keys and values: the frequencies of whole windows of each lane, one forward pass each."""
    predictor, model = lockstep("none, no ttt", lanes, eval_stride=stride)
    predictor.block, n, W = 10**6, 101, 32
    text = tiny_stream(n + 1, seed=3)[1:]
    stream = interleaved(text, lanes)
    pieces = predictor.predict(stream[:-1], lanes, len(stream)).pieces
    freqs = torch.cat([f["sliding"] for *_, f in pieces])
    assert len(freqs) == n and (freqs.sum(1) == TOTAL).all() and freqs.min() >= 1
    coded = dict(zip(lane_order(n, lanes).tolist(), freqs.double()))
    for part in lanes_of(n, lanes):
        lane = torch.tensor([TABLE.bos_id, *text[part]])
        for row, number in enumerate(part):
            begin = 0 if row < W else row - (row - W) % stride + stride - W
            with torch.no_grad():
                p = torch.softmax(model(lane[None, begin : row + 1])[0][0, -1].double(), -1)
            assert torch.allclose(coded[number] / TOTAL, p, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", ["learned, no ttt", "entropy"])
def test_no_row_depends_on_itself_or_later_ones(name):
    """A change of any token of a row leaves it and all before bitwise alone; a later row notices."""
    lanes, n = 4, 200
    stream = interleaved(tiny_stream(n + 1, seed=2)[1:], lanes)

    def rows(tokens):
        predictor, found = lockstep(name, lanes, mixer_lr=0.05)[0], []
        while predictor.committed < len(tokens):
            start = predictor.committed
            stop = min(start + predictor.block, len(tokens))
            commitment = predictor.predict(tokens[: stop - 1], start, stop)
            found += [f["mixer"] for *_, f in commitment.pieces]
            predictor.score(commitment, tokens[start:stop])
            if stop < len(tokens):
                predictor.update(tokens[:stop])
        return torch.cat(found)

    plain = rows(stream)
    for t in (60, 61, 62, 63, 99, 150):
        changed = stream.clone()
        changed[t] = (changed[t] + 7) % VOCAB
        differs = (rows(changed) != plain).any(1)
        end = (t // lanes + 1) * lanes - lanes  # the first position of the row after t's
        assert not differs[:end].any() and differs[end:].any()


def test_evidence_of_lanes_by_hand():
    """Of four occurrences, each in rows of two lanes: how many rows ago, and whether the model sees it: its own lane's
    window only."""
    p, slot = torch.full((1, 8), 1 / 8, dtype=torch.float64), 3 * 4  # the context of 2 tokens
    ends, following = torch.full((1, 6, 4), -1), torch.zeros(1, 6, 4, dtype=torch.int64)
    ends[0, 3], following[0, 3] = torch.tensor([19, 13, 12, 2]), torch.tensor([1, 2, 3, 4])
    features = train_gpt.gather_evidence(
        p, ends, following, torch.tensor([20]), torch.tensor([4]), lanes=2
    )[2]
    distance, inside = (
        features[0, 2 * 6 + 3, slot : slot + 4],
        features[0, 3 * 6 + 3, slot : slot + 4],
    )
    assert distance.tolist() == pytest.approx(
        [0, math.log2(3.5) / 8, 2 / 8, math.log2(9) / 8], abs=1e-6
    )
    assert inside.tolist() == [0, 0, 1, 0]


def test_lanes_learn_from_their_own_tokens():
    """What waits for the update are the block's positions, each with its candidates' tokens, and it changes the mixer."""
    predictor, _ = lockstep("learned, no ttt", 2)
    stream = interleaved(tiny_stream(81, seed=2)[1:], 2)
    for start in range(2, 66, 8):
        predictor.score(
            predictor.predict(stream[: start + 7], start, start + 8), stream[start : start + 8]
        )
        tokens, distinct, features, q, positions = map(torch.cat, zip(*predictor.mixer.waiting[0]))
        assert positions.tolist() == list(range(start, start + 8))
        gradient = predictor.mixer.gradient(
            tokens, distinct, features, q, stream[start : start + 8]
        )
        predictor.update(stream[: start + 8])
        assert torch.allclose(predictor.mixer.weights.grad, gradient / 8, atol=1e-6)
    for row, at in zip(
        tokens, range(56, 64)
    ):  # candidates follow a known context: their tokens have been seen before
        assert set(row[distinct[at - 56]].tolist()) <= set(stream[:58].tolist())
    assert distinct.any() and predictor.mixer.blocks == 8


def test_lockstep_keeps_the_order_of_calls():
    """It is a Predictor: no block twice, none before the one before is scored, no update of half a block."""
    predictor = lockstep("learned, no ttt", 2)[0]
    stream = interleaved(STREAM[1:41], 2)
    commitment = predictor.predict(stream[:5], 2, 6)
    for call in (lambda: predictor.predict(stream[:7], 6, 8), lambda: predictor.update(stream[:6])):
        with pytest.raises(OrderError):
            call()
    predictor.score(commitment, stream[2:6])
    with pytest.raises(OrderError):
        predictor.update(stream[:6])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_round_trip_in_lanes(name, lanes, artifacts, tmp_path):  # noqa: F811
    """Tokens, frequencies and text come back, the header names the lanes, and the size is predicted."""
    cfg, path = artifacts(name), tmp_path / "lanes.code"
    for n in (0, 1, 7, 211):
        bits, freqs = write_code(path, STREAM[: n + 1], cfg, quiet, lanes)
        tokens, decoded, text = read_code(path, cfg, quiet)
        assert tokens.tolist() == STREAM[: n + 1].tolist() and text == TABLE.decode(tokens)
        assert decoded.tolist() == freqs.tolist() and len(freqs) == n
        assert bits == pytest.approx(bits_of(freqs), rel=1e-12, abs=1e-9)
        assert CODE_HEAD.unpack(path.read_bytes()[: CODE_HEAD.size])[3] == lanes
        assert abs(path.stat().st_size - CODE_HEAD.size - bits / 8) < 16


# ----------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coder(tokenizers, tmp_path_factory):
    """{name: settings for the commands} of an artifact for each tokenizer, with a warm mixer and TTT on."""
    found = {}
    for name, (path, table, _) in tokenizers.items():
        cfg = tiny_config(
            vocab_size=400,
            num_layers=2,
            ve_layers="1",
            xsa_last_n=1,
            ttt_freeze_blocks=1,
            mixer="learned",
            device="cpu",
        )
        artifact = tmp_path_factory.mktemp("artifact") / "model.lzma"
        artifact.write_bytes(train_gpt.pack_artifact(warm_model(cfg), cfg, table, train_gpt.FINEST))
        found[name] = dict(ARTIFACT_PATH=str(artifact), TOKENIZER_PATH=str(path))
    return found


@pytest.mark.parametrize("name", ["plain", "folding"])
def test_files_come_back(name, coder, command, tmp_path):  # noqa: F811
    """Byte for byte; `decompress` needs no tokenizer; the text's size is told, and the code's."""
    source, code, out = tmp_path / "in", tmp_path / "in.code", tmp_path / "out"
    for data in (*ODD_FILES.values(), README[:1500]):
        source.write_bytes(data)
        assert command("compress", source, code, **coder[name]) == (0, "")
        assert command("decompress", code, out, ARTIFACT_PATH=coder[name]["ARTIFACT_PATH"]) == (
            0,
            "",
        )
        assert out.read_bytes() == source.read_bytes() == data
        out.unlink()
    assert CODE_HEAD.unpack(code.read_bytes()[: CODE_HEAD.size])[3] == 8  # MIXER_BLOCK of them


def test_compress_says_what_it_did(coder, tmp_path, monkeypatch, capsys):
    """Bytes in, bytes out, bits predicted and the rate."""
    (tmp_path / "in").write_bytes(README[:300])
    monkeypatch.chdir(tmp_path)
    train_gpt.compress_command("in", "out", {"PRESET": "bench", "DEVICE": "cpu", **coder["plain"]})
    size = (tmp_path / "out").stat().st_size
    said = re.search(
        r"300 B -> ([\d,]+) B: a header of 132 B, the rest predicted as ([\d.]+) B; [\d,]+ tokens/s",
        capsys.readouterr().out,
    )
    assert int(said[1]) == size and abs(float(said[2]) + CODE_HEAD.size - size) < 16


def test_bad_input(coder, command, tmp_path):  # noqa: F811
    """A missing file, a missing or another tokenizer, another artifact: one line that names it; nothing is written."""
    (tmp_path / "in").write_bytes(b"text")
    plain, folding = coder["plain"], coder["folding"]
    assert "none" in error_line(command("compress", "none", "out", **plain), 1)
    for path in (tmp_path / "no.model", folding["TOKENIZER_PATH"]):
        message = error_line(
            command("compress", "in", "out", **{**plain, "TOKENIZER_PATH": str(path)}), 1
        )
        assert message.startswith("TOKENIZER_PATH") and str(path) in message
    assert not (tmp_path / "out").exists()
    assert command("compress", "in", "out", **plain) == (0, "")
    message = error_line(
        command("decompress", "out", "text", ARTIFACT_PATH=folding["ARTIFACT_PATH"]), 1
    )
    assert "out was not made with the artifact" in message
    message = error_line(
        command("decompress", "out", "text", ARTIFACT_PATH=plain["ARTIFACT_PATH"], MIXER="none"), 1
    )
    assert "out was made with other settings" in message
    data = (tmp_path / "out").read_bytes()
    for at in range(0, len(data), 7):
        (tmp_path / "bad").write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        assert "bad " in error_line(
            command("decompress", "bad", "text", ARTIFACT_PATH=plain["ARTIFACT_PATH"]), 1
        )
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("lanes", [3, 16, 2**31])
def test_lanes_that_do_not_fit(lanes, artifacts, tmp_path):  # noqa: F811
    """A file whose header is in order but for lanes that no block of 8 is made of is refused by name."""
    cfg, path = artifacts("learned"), tmp_path / "odd.code"
    write_code(path, STREAM[:41], cfg, quiet, 2)
    body = struct.pack("<I", lanes) + path.read_bytes()[20:]
    path.write_bytes(struct.pack("<8sII", b"PGOLFTXT", 2, zlib.crc32(body)) + body)
    with pytest.raises(UserError, match=f"odd.code has {lanes} lanes"):
        read_code(path, cfg, quiet)


class Uniform:
    """A predictor that knows nothing, to code long files quickly: every token of V is alike, the first gets the rest."""

    def __init__(self, V, lanes):
        self.learned = self.committed = self.lanes = lanes
        self.plan, self.rt, self.block = (
            SimpleNamespace(stages=("none",)),
            SimpleNamespace(),
            1 << 16,
        )
        self.row = torch.full((1, V), TOTAL // V, dtype=torch.int32)
        self.row[0, 0] += TOTAL - self.row.sum().item()

    def predict(self, prefix, start, stop):
        """The same for every position."""
        return Commitment(
            start, stop, [(0, start, stop, {"none": self.row.expand(stop - start, -1)})]
        )

    def score(self, commitment, targets):
        """Bits by the same frequencies."""
        return {"none": (24 - self.row[0][targets].double().log2()).sum().item()}

    def update(self, prefix):
        """Move on."""
        self.learned += self.block


def test_a_megabyte_of_one_letter(tokenizers, coder, command, monkeypatch, tmp_path):  # noqa: F811
    """It is tokenized, coded in 8 lanes and comes back, by a predictor that stands in."""
    table = tokenizers["plain"][1]
    monkeypatch.setattr(
        train_gpt,
        "coding_predictor",
        lambda cfg, lanes: (Uniform(400, lanes), table, [bytes(32), bytes(32)]),
    )
    (tmp_path / "in").write_bytes(b"a" * 1_000_000)
    assert command("compress", "in", "code", **coder["plain"]) == (0, "")
    assert command("decompress", "code", "out", **coder["plain"]) == (0, "")
    assert (tmp_path / "out").read_bytes() == b"a" * 1_000_000
    lanes, n = CODE_HEAD.unpack((tmp_path / "code").read_bytes()[: CODE_HEAD.size])[3:5]
    assert lanes == 8 and (tmp_path / "code").stat().st_size - CODE_HEAD.size == pytest.approx(
        n * math.log2(400) / 8, rel=1e-4
    )
