# ruff: noqa: F811 (fixtures are imported)
"""What a real browser makes of report.html: focus, keys, modes, errors, width of a phone.

    python -m pytest tests/experiments/browser_report.py

Not among the tests, since it takes a Chromium; without one it fails and says so.
"""

import json
import math
import re
import shutil
import subprocess

import pytest
from test_html import built, evaluated, new_run, page, read_run, tree  # noqa: F401

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

PROBE = """<script>
const seen = [];
window.addEventListener("error", (event) => seen.push(event.message));
const spans = document.querySelectorAll("#text span");
const pointed = ["touch", "mouse"].map((pointerType) => {
  spans[START].dispatchEvent(new PointerEvent("pointerover", {pointerType, bubbles: true}));
  return document.getElementById("detail").innerText;
});
spans[START].focus();
for (const key of KEYS) {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
}
const chosen = document.activeElement.getBoundingClientRect();
const panel = document.getElementById("detail").getBoundingClientRect();
if (MODE) document.querySelector(`input[value=${MODE}]`).click();
document.title = JSON.stringify({
  at: Array.from(spans).indexOf(document.activeElement),
  stops: Array.from(spans).filter((span) => span.tabIndex === 0).length,
  described: document.activeElement.getAttribute("aria-describedby"),
  detail: document.getElementById("detail").innerText,
  classes: Array.from(spans).map((span) => span.className),
  wide: document.documentElement.scrollWidth > window.innerWidth,
  pointed,
  covered: chosen.bottom > panel.top || chosen.top < 0,
  errors: seen,
});
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """browse(page, start, keys, mode) -> what a browser has after focus, keys and a change of mode.

    Its window is that of a phone.
    """
    assert BROWSER, "there is no Chromium on this machine: install chromium or google-chrome"
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom "
    flags += "--disable-quic --no-first-run --window-size=500,900"

    def looked(text, start=0, keys=(), mode=""):
        values = dict(START=start, KEYS=list(keys), MODE=mode)
        probe = PROBE
        for name, value in values.items():
            probe = re.sub(rf"\b{name}\b", json.dumps(value), probe)
        path = tmp_path / "probe.html"
        path.write_text(text.replace("</body>", probe))
        command = [
            BROWSER,
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            path.as_uri(),
        ]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        title = next(e for e in tree(shown).all("title"))
        return json.loads(title.text)

    return looked


@pytest.mark.slow
def test_browser_shows_what_a_token_cost(evaluated, browse):
    """Bits in each stage, candidates before and after, contexts and what followed them."""
    run = read_run(evaluated)
    trace = run.trace
    i = int(trace.counts.sum(1).argmax())
    found = browse(page([run]), start=i)
    assert (found["at"], found["described"], found["errors"]) == (i, "detail", [])
    assert not found["wide"]
    detail = found["detail"]
    assert f"Token {i + 1}:" in detail
    for name, bits in trace.bits.items():
        assert f"{name} {bits[i]:.2f} bits" in detail
    best = trace.top["mixer"][1][i, 0]
    share = 100 * 2**-best
    assert (f"{share:.1f} %" if share >= 10 else f"{float(f'{share:.2g}'):.2g} %") in detail
    times = [int(n) for n in re.findall(r": (\d+) times?, then", detail)]
    assert times == [int(n) for n in trace.counts[i] if n]
    assert "came" in detail


@pytest.mark.slow
def test_browser_shows_the_chosen_token(evaluated, browse):
    """Above the panel on a phone, at the beginning, in the middle and at the end of the text."""
    text = built(evaluated)
    touched, hovered = browse(text, 7)["pointed"]
    assert touched == "No token is chosen."  # until the tap: the panel would grow under it
    assert hovered.startswith("Token 8:")
    for start, key in ((0, "ArrowDown"), (20, "ArrowDown"), (40, "End")):
        assert not browse(text, start, [key])["covered"]


@pytest.mark.slow
def test_browser_moves_with_the_keys(new_run, browse):
    """By tokens, to both ends, and not beyond; the one stop of the tab key goes along."""
    text = built(new_run())
    moves = {
        ("ArrowRight", "ArrowRight"): 12,
        ("ArrowLeft",): 9,
        ("Home", "ArrowLeft"): 0,
        ("End", "ArrowRight"): 59,
        ("ArrowDown", "ArrowUp", "a"): None,
    }
    for keys, expected in moves.items():
        found = browse(text, 10, keys)
        assert expected is None or found["at"] == expected
        assert (found["stops"], found["errors"]) == (1, [])


@pytest.mark.slow
def test_browser_shows_what_the_mixer_changed(new_run, browse):
    """g where it saves bits, l where it costs some; as many levels as the legend has."""
    folder = new_run()
    trace = read_run(folder).trace
    found = browse(built(folder), mode="change")
    saved = trace.bits["ttt"] - trace.bits["mixer"]
    assert len(found["classes"]) == len(saved)
    for kind, bits in zip(found["classes"], saved):
        kind = kind.replace("here", "").strip()
        sign = "g" if bits > 0 else "l"
        level = sum(abs(bits) >= edge for edge in (0.1, 1, 4))
        assert kind == (f"{sign}{level}" if level else "") or math.isclose(abs(bits), 0.1)
