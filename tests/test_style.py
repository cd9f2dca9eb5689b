"""The script's size in tokens, which merged lines cannot lower, and the length of its functions."""

import ast
import io
import tokenize

import pytest
from conftest import ROOT

MOST_TOKENS = 23_000
MOST_TOKENS_A_LINE = 11
MOST_LINES_OF_A_FUNCTION = 60
LONG_FUNCTIONS = ()
COUNTED = ("NAME", "OP", "NUMBER", "STRING", "FSTRING_END")


@pytest.fixture(scope="module")
def source():
    """The script's text."""
    return (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def code_tokens(source):
    """Return the tokens of a source's code: no comments, no docstrings, no white space.

    An f-string is one token, also from Python 3.12 on, which takes it apart.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    }
    counted = []
    depth = 0  # of f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        depth -= kind == "FSTRING_END"
        if kind in COUNTED and depth == 0 and token.start not in docstrings:
            counted.append(token)
        depth += kind == "FSTRING_START"
    return counted


def test_docstrings_comments_and_blank_lines_are_free():
    """Only names, operators, numbers and strings that are no docstrings count."""
    free = '"""A module."""\n\n# A comment.\n\n\ndef f():\n    """Two\n\n    lines."""\n\n'
    code = """    return g("text", f"{x} and {y + 1}", 1)  # why\n"""
    assert len(code_tokens(free + code)) == 14


def test_script_has_few_tokens(source):
    """A new capability pays by what it makes unnecessary."""
    tokens = len(code_tokens(source))
    print(f"{tokens:,} tokens")
    assert tokens <= MOST_TOKENS


def test_conversions_of_integers_name_their_byte_order(source):
    """Python 3.10 has no default."""
    calls = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("to_bytes", "from_bytes")
    ]
    assert calls
    assert [call for call in calls if "'big'" not in call and "'little'" not in call] == []


def test_lines_have_few_tokens(source):
    """One statement a line."""
    tokens = code_tokens(source)
    share = len(tokens) / len({t.start[0] for t in tokens})
    print(f"{share:.2f} tokens a code line")
    assert share <= MOST_TOKENS_A_LINE


def test_functions_are_short(source):
    """No function is over 60 lines, but for those that are named here."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, functions) and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    }
    assert long == set(LONG_FUNCTIONS)
