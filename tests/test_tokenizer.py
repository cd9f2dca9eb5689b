"""Tokenizer and byte accounting: the count is the length of the text, or there is no BPB."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest
from conftest import refusal

from train_gpt import SPACE, TokenTable, audit_bytes, load_tokenizer


@pytest.fixture(scope="module")
def stream(texts, tokenizer):
    """All documents as one validation stream, int64, each after BOS."""
    _, sp, table = tokenizer
    return np.array([t for text in texts for t in [table.bos_id, *sp.encode(text)]])


def audit_of(*texts):
    """Return what audited() should: the number of UTF-8 bytes of all texts, and their SHA-256."""
    text = "".join(texts).encode()
    return len(text), hashlib.sha256(text).hexdigest()


def audited(table, tokens, *sp):
    """What audit_bytes says of a text: its bytes and their SHA-256."""
    found = audit_bytes(table, tokens, *sp)
    assert found.pop("tokens") == len(tokens) - 1
    return found["bytes"], found["sha256"]


# ---- The table is SentencePiece's ----------------------------------------------------------------


def test_table_has_the_pieces_of_sentencepiece(tokenizer):
    """Pieces, their kinds and BOS."""
    _, sp, table = tokenizer
    assert sp.vocab_size() == 400
    assert list(table.pieces) == [sp.id_to_piece(i) for i in range(400)]
    assert sp.bos_id() == 1
    assert table.bos_id == 1
    assert table.kinds == "UCC" + "B" * 256 + "N" * 141
    assert SPACE in table.pieces
    assert table.texts[3 + 0xE2] == b"\xe2"


def test_digest_identifies_the_table(tokenizer):
    """The same file has the same digest; another BOS has another."""
    path, _, table = tokenizer
    assert load_tokenizer(path, 400)[0].digest == table.digest
    assert dataclasses.replace(table, bos_id=2).digest != table.digest


def test_any_pieces_decode_as_sentencepiece_decodes_them(tokenizer):
    """Runs of random normal pieces, which no text would give, decode and count alike."""
    _, sp, table = tokenizer
    for ids in np.random.default_rng(0).integers(259, 400, (300, 7)).tolist():
        tokens = np.array([1, *ids])
        assert table.decode(tokens).decode() == sp.decode(ids)
        assert table.count_bytes(tokens).sum() == len(sp.decode(ids).encode())


@pytest.mark.parametrize(
    "name", ["none.model", "", "text.model"], ids=["missing", "folder", "text"]
)
def test_file_that_is_no_tokenizer_is_refused(tmp_path, name):
    """A missing file, a folder and a file of another kind: setting and path are named."""
    (tmp_path / "text.model").write_bytes(b"no model at all")
    path = tmp_path / name
    pattern = f"TOKENIZER_PATH: .*{re.escape(str(path))}"
    assert re.match(pattern, refusal(load_tokenizer, path, 400))


def test_tokenizer_of_another_size_is_refused(tokenizer):
    """Both sizes and the path are named."""
    path = tokenizer[0]
    message = refusal(load_tokenizer, path, 401)
    assert message.startswith("VOCAB_SIZE=401")
    assert "400 pieces" in message
    assert str(path) in message


def test_tokenizer_without_a_lone_space_is_refused(tokenizer, tmp_path):
    """Its spaces could become the three byte pieces of U+2581, which would count as three bytes."""
    data = tokenizer[0].read_bytes()
    lone_space = b"\x0a\x03" + SPACE.encode()
    assert data.count(lone_space) == 1
    path = tmp_path / "odd.model"
    path.write_bytes(data.replace(lone_space, b"\x0a\x03" + "\u2580".encode()))
    message = refusal(load_tokenizer, path, 400)
    assert message.startswith(f"TOKENIZER_PATH={path}: no piece for a lone space")


def test_words_begin_at_spaces_and_after_boundaries():
    """A piece with a leading space, and what ends the text before it; no byte, no inner piece."""
    begins = np.array(GOLDEN.pieces)[GOLDEN.word_begins].tolist()
    assert begins == ["<unk>", "<s>", "</s>", "▁the", "▁", "▁▁", "▁é", "▁🙂", "▁a▁b", "<mask>"]


# ---- Bytes ---------------------------------------------------------------------------------------


def test_count_is_the_length_of_each_document(texts, tokenizer):
    """Counted bytes, both decoders and the audit agree with the text that went in."""
    _, sp, table = tokenizer
    for text in texts:
        tokens = np.array([table.bos_id, *sp.encode(text)])
        assert table.decode(tokens).decode() == text
        assert sp.decode(tokens[1:].tolist()) == text
        assert table.count_bytes(tokens).sum() == len(text.encode())
        assert audited(table, tokens) == audit_of(text)


def test_count_is_the_length_of_the_stream(texts, tokenizer, stream):
    """The sum over documents and their digest, by the table's own decoder and SentencePiece's."""
    _, sp, table = tokenizer
    assert audited(table, stream) == audit_of(*texts)
    assert audited(table, stream, sp) == audit_of(*texts)


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
    """No space after a boundary, one byte for a byte piece, none for what is no text."""
    tokens = np.array([GOLDEN.pieces.index(p) for p in pieces.split()])
    assert GOLDEN.count_bytes(tokens).tolist() == counts
    assert GOLDEN.decode(tokens).decode() == text
    assert sum(counts) == len(text.encode())


# ---- The audit -----------------------------------------------------------------------------------


def counting(table, change):
    """Return `table` with other byte counts; it decodes as before.

    change(lengths, leading, boundary, kinds) works on copies of its arrays.
    """
    wrong = dataclasses.replace(table)
    arrays = [a.copy() for a in table.byte_tables]
    change(*arrays, np.array(list(table.kinds)))
    wrong.__dict__.update(byte_tables=tuple(arrays), decode=dataclasses.replace(table).decode)
    return wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda lengths, leading, boundary, kinds: lengths.__iadd__(leading),
        lambda lengths, leading, boundary, kinds: lengths.__setitem__(kinds == "B", 3),
        lambda lengths, leading, boundary, kinds: lengths.__setitem__(kinds == "C", 3),
        lambda lengths, leading, boundary, kinds: lengths.__isub__(leading),
        lambda lengths, leading, boundary, kinds: boundary.__setitem__(1, False),
        lambda lengths, leading, boundary, kinds: leading.__setitem__(slice(None), False),
        lambda lengths, leading, boundary, kinds: lengths.__setitem__(399, lengths[399] + 1),
    ],
    ids=[
        "space twice",
        "U+FFFD for bytes",
        "bytes for BOS",
        "no byte for a space",
        "space after BOS",
        "no spaces",
        "one piece",
    ],
)
def test_audit_refuses_wrong_counts(tokenizer, stream, change):
    """No BPB comes out where bytes are counted twice, never, or for what prints nothing."""
    table = tokenizer[2]
    assert (stream == 399).any()
    message = refusal(audit_bytes, counting(table, change), stream)
    assert re.match(
        r"validation document at token \d+: .* \(\d+ bytes counted, \d+ decoded\)", message
    )


def test_audit_accepts_unchanged_counts(texts, tokenizer, stream):
    """What the refused tables are made of is right until it is changed."""
    unchanged = counting(tokenizer[2], lambda *arrays: None)
    assert audited(unchanged, stream) == audit_of(*texts)


def test_audit_asks_sentencepiece(tokenizer, stream):
    """A table wrong in itself counts what it prints; SentencePiece's decoder finds it out."""
    _, sp, table = tokenizer
    wrong = dataclasses.replace(table, kinds=table.kinds.replace("B", "N"))
    assert audited(wrong, stream) > audited(table, stream, sp)
    assert "bytes counted" in refusal(audit_bytes, wrong, stream, sp)


def test_audit_refuses_a_stream_that_does_not_begin_with_bos(tokenizer, stream):
    """A cut stream, one without any BOS, one of another tokenizer."""
    table = tokenizer[2]
    for bad in (stream[1:], stream[stream != 1], np.array([5, 1, 300])):
        assert "must start with BOS (id 1)" in refusal(audit_bytes, table, bad)


BYTE = 3  # the first byte piece


@pytest.mark.parametrize(
    "middle", [[0xE2, None], [0x82], [0xE2, 0x82], [0xFF], [0xC0, 0x80]], ids=str
)
def test_audit_refuses_broken_text_before_the_end(tokenizer, middle):
    """Bytes that are no UTF-8 inside the stream mean another tokenizer; None is a letter."""
    table = tokenizer[2]
    letter = table.pieces.index("e")
    document = [letter if byte is None else BYTE + byte for byte in middle]
    bad = np.array([1, letter, 1, letter, *document, 1, letter])
    assert refusal(audit_bytes, table, bad).startswith("validation document at token 2")


@pytest.mark.parametrize("last", [[0xE2, None], [0x82], [0xFF]], ids=str)
def test_audit_refuses_broken_text_at_the_end(tokenizer, last):
    """What no continuation would make UTF-8 is broken in the last document too."""
    table = tokenizer[2]
    letter = table.pieces.index("e")
    document = [letter if byte is None else BYTE + byte for byte in last]
    assert "at token 2" in refusal(audit_bytes, table, np.array([1, letter, 1, *document]))


def test_audit_accepts_a_cut_inside_a_character(tokenizer):
    """Wherever a stream ends in a text of emoji, it has the bytes that it prints."""
    _, sp, table = tokenizer
    text = "é🙂 \U0010ffff"
    tokens = np.array([1, *sp.encode("first"), 1, *sp.encode(text)])
    second = len(sp.encode("first")) + 1
    cuts_inside = 0
    for stop in range(second + 1, len(tokens) + 1):
        printed = table.decode(tokens[second:stop])
        digest = hashlib.sha256(b"first" + printed).hexdigest()
        assert audited(table, tokens[:stop]) == (5 + len(printed), digest)
        cuts_inside += len(printed.decode(errors="ignore").encode()) < len(printed)
    assert cuts_inside >= 3
    assert printed.decode() == text
