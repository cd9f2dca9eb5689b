#!/usr/bin/env python3
"""Show what runs of train_gpt.py did: one HTML page, or the figures of README and notebook.

    python logs/report.py RUN_DIR...                   RUN_DIR/report.html, of the first folder
    python logs/report.py RUN_DIR... --out PAGE        another file
    python logs/report.py RUN_DIR... --figures DIR     stages.svg and proof.svg in DIR, no page
    python logs/report.py --figures DIR --quantizers JSON
                                                       quantizers.svg in DIR, of what
                                                       tests/experiments/compare_quantizers.py has
                                                       measured (logs/quantizers.json)

A RUN_DIR is a folder in which train_gpt.py has worked, under LOG_DIR: that of a run, finished or
not, of `eval` or of `verify`. Whatever it has is shown: results.json, the log, trace.npz (what the
first TRACE_TOKENS tokens got), the artifact. The page needs no network and no other file; to be
made, it needs what train_gpt.py needs, and matplotlib.

Every text that comes from a run goes through `visible` (control and bidirectional characters become
symbols) and is escaped. The data of the text's view are in one JSON element: typed arrays, base64.
"""

import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import html
import io
import json
import lzma
import math
import re
import sys
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install -r tests/requirements.txt")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import train_gpt


class ReportError(Exception):
    """Report what the user can mend, in one line: the folder or file, and why."""


# ---- Text ----------------------------------------------------------------------------------------

SPACE = "\u2581"  # what SentencePiece writes for a space
LINE = "\u21b5"  # shown for a line feed
HIDDEN = {
    "Cc",
    "Cf",
    "Cn",
    "Co",
    "Cs",
    "Zl",
    "Zp",
}  # categories that show nothing, or turn the text


def visible(text, space=" "):
    """Return `text` with symbols for characters that cannot be seen or that reorder others.

    A combining mark at its start gets a dotted circle to stand on; `space` stands for a space.
    """
    shown = []
    for char in text:
        code = ord(char)
        if char == " ":
            shown.append(space)
        elif char == "\n":
            shown.append(LINE)
        elif code < 32:
            shown.append(chr(0x2400 + code))
        elif code == 127:
            shown.append("\u2421")
        elif unicodedata.category(char) in HIDDEN:
            shown.append(f"\u27e8{code:04X}\u27e9")
        else:
            shown.append(char)
    if text and unicodedata.category(text[0]) in {"Mn", "Mc", "Me"}:
        shown.insert(0, "\u25cc")
    return "".join(shown)


def escaped(value):
    """Return anything as visible text for HTML, also inside quotes."""
    return html.escape(visible(str(value)))


def tag(name, *contents, **attributes):
    """Return an HTML element; `contents` are HTML, `attributes` text, class_ for class."""
    names = ((n.rstrip("_").replace("_", "-"), v) for n, v in attributes.items())
    described = "".join(f' {n}="{escaped(v)}"' for n, v in names)
    return f"<{name}{described}>{''.join(contents)}</{name}>"


def table(head, rows, caption):
    """Return an HTML table; the first column of each row is its header, cells are plain text."""
    top = "".join(tag("th", escaped(cell), scope="col") for cell in head)
    body = (
        tag(
            "tr",
            tag("th", escaped(row[0]), scope="row"),
            *(tag("td", escaped(cell)) for cell in row[1:]),
        )
        for row in rows
    )
    inner = (
        tag("caption", escaped(caption), class_="unseen")
        + tag("thead", tag("tr", top))
        + tag("tbody", *body)
    )
    # A wide table scrolls by itself: by touch, and with the keyboard, which needs the tabindex.
    return tag(
        "div", tag("table", inner), class_="scroll", tabindex=0, role="region", aria_label=caption
    )


# ---- What a run has left -------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What is in a run's folder; what is not there is empty or None."""

    folder: Path
    name: str
    results: dict
    settings: dict
    log: list  # [{step, loss, weighted, rate, seconds}], of training
    notes: list  # what is missing or damaged, in words
    trace: "Trace | None" = None
    number: int = 0  # among the runs shown: that of its colour, dashes and marks

    @property
    def stages(self):
        """The stages that were scored, as results.json has them."""
        return self.results.get("stages") or []

    @property
    def artifact(self):
        """Path of the artifact's file, or None where there is none that can be read.

        By now another run's may lie where the results say: theirs is known by its SHA-256.
        """
        known = self.part("artifact")
        digest = known.get("sha256")
        for path in (self.folder / "model.int6.lzma", Path(str(known.get("path", "")))):
            with contextlib.suppress(OSError):
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                if digest in (None, found):
                    return path
        return None

    def part(self, name):
        """Return a part of results.json, {} where it is missing."""
        return self.results.get(name) or {}


HEADER = re.compile(r"(train|eval|verify) (.+), \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC")
STEP = re.compile(
    r"step (?P<step>\d+)/\d+  (ETA \d+ s  )?"  # older logs have it at the end
    r"loss (?P<loss>\S+) \(weighted (?P<weighted>\S+)\)  "
    r"lr x\S+  (?P<rate>[\d,]+) tokens/s  (?P<seconds>\d+) s"
)
SETTINGS = re.compile(r"  [A-Z][A-Z0-9_]*=.*")  # a line of them; in older logs it has one
SETTING = re.compile(r" ([A-Z][A-Z0-9_]*)=(.*?)(?= [A-Z][A-Z0-9_]*=|$)")
LOGS = ("train.log", "eval.log", "verify.log")


def read_log(path):
    """Return (run's name, {setting: text}, steps of training) of the last run in a log file.

    A log grows: each run that began in the folder is a section. `finish` begins one too, whose
    training is in the last section that has any, maybe lines before the first run: what another
    program has trained.
    """
    sections = [("", {}, [], [])]
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if header := HEADER.fullmatch(line):
            sections.append((header[2], {}, [], []))
            continue
        _, settings, steps, others = sections[-1]
        if SETTINGS.fullmatch(line):
            settings.update((name.lower(), text) for name, text in SETTING.findall(line))
        elif step := STEP.match(line):
            numbers = {n: float(v.replace(",", "")) for n, v in step.groupdict().items()}
            steps.append(numbers)
        else:
            others.append(line)
    name, settings, steps, others = sections[-1]
    is_after_training = any(
        line.startswith(("fisher:", "calibration:", "quantize:")) for line in others
    )
    if is_after_training:
        steps = next((section[2] for section in reversed(sections) if section[2]), [])
    return name, settings, steps


NEEDED = {  # keys of results.json that are numbers where their part is there
    "train": (),
    "artifact": ("weights_bytes", "code_bytes", "total_bytes", "limit_bytes"),
    "proof": ("tokens", "predicted_bits", "bytes_on_disk", "encode_seconds", "decode_seconds"),
    "settings": (),
    "environment": (),
}
TRAINING = {  # seconds in the part "train", each there once it is known: what they are called
    "seconds": "training",
    "calibration_seconds": "held-out text",
    "quantize_seconds": "quantization",
}
NEEDED_OF_STAGE = ("val_bpb", "val_loss", "tokens", "bytes", "seconds")


def check_results(results):
    """Raise ValueError, TypeError or LookupError where results.json is not one of train_gpt.py."""
    parts = [(dict(results.get(part) or {}), names) for part, names in NEEDED.items()]
    parts += [(stage, NEEDED_OF_STAGE) for stage in results.get("stages") or []]
    train = dict(results.get("train") or {})
    known = [name for name in TRAINING if train.get(name) is not None]
    for part, names in [*parts, (train, known)]:
        if part and not all(math.isfinite(part[name]) for name in names):
            raise ValueError(f"{', '.join(names)}: a number is not finite")
    for stage in results.get("stages") or []:
        str.split(stage["name"])  # or TypeError


def read_run(folder):
    """Return the Run in a folder; ReportError if nothing of a run is there, or it is damaged."""
    folder = Path(folder)
    results = {}
    notes = []
    path = folder / "results.json"
    try:
        names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    except OSError as error:
        raise ReportError(f"{folder}: no run's folder ({error.strerror})") from error
    logs = [folder / name for name in LOGS if name in names]
    if path.name not in names and not logs:
        raise ReportError(f"{folder}: no run's folder: neither results.json nor a log is there")
    try:
        if path.name in names:
            results = dict(json.loads(path.read_bytes()))
            check_results(results)
        else:
            notes.append("There is no results.json yet: the run is not finished.")
        name, settings, steps = read_log(logs[0]) if logs else ("", {}, [])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ReportError(f"{folder}: results.json or the log is damaged ({error})") from error
    name = results.get("run_id") or name or folder.resolve().name
    settings = results.get("settings") or settings
    run = Run(folder, name, results, settings, steps, notes)
    if results and not run.stages and results.get("command") != "verify":
        notes.append("No stage is scored yet: the run is not finished.")
    if results.get("command") != "verify":
        read_trace(run)
    return run


def tell_apart(runs):
    """Number the runs, and name those that share a name by their folders instead."""
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        run.number = i
        if names.count(run.name) > 1:
            run.name = str(run.folder)


# What NumPy raises at archives that are cut, foreign or of another format.
UNREADABLE = OSError, EOFError, ValueError, TypeError, LookupError, zipfile.BadZipFile, zlib.error


def read_trace(run):
    """Set run.trace to what its trace.npz has, or note why there is none."""
    path = run.folder / "trace.npz"
    if not path.is_file():
        run.notes.append(
            "The text is not shown: there is no trace.npz, which runs and `eval` write."
        )
        return
    try:
        trace = Trace(path, run.settings)
    except UNREADABLE as error:
        run.notes.append(
            f"The text is not shown: trace.npz cannot be read ({error}); `eval` writes one."
        )
        return
    if trace.val_bpb != run.results.get("val_bpb"):
        run.notes.append("The text is not shown: trace.npz is of other results; `eval` writes one.")
        return
    run.trace = trace


CONTEXT_LENGTHS = (8, 5, 3, 2, 1, 8)  # in tokens; the last one: of the word so far, at most
TOP = train_gpt.TRACE_TOP  # likeliest tokens of each position in a trace
TOTAL_BITS = 24  # frequencies sum to 2^24

# trace.npz, a NumPy archive that pickles nothing:
#   val_bpb                   that of the results that it belongs to
#   pieces, kinds, bos_id     the tokenizer's
#   tokens  (n + 1,)          BOS, and the tokens
#   pre_quant, ... (17, n)    of each stage: the tokens' frequencies, of 2^24, the 8 highest ones of
#                             each position, and the tokens that have them
NO_STAGES = {"val_bpb", "pieces", "kinds", "bos_id", "tokens"}


class Trace:
    """What trace.npz has of a run's first n tokens.

    tokens (n + 1,), BOS first; texts: what each token of the vocabulary prints; sizes (n,): bytes
    of each token; bits {stage: (n,)}; top {last neural stage and mixer: (tokens (n, 8), bits (n,
    8))}; counts (n, 6): how many occurrences each kind of context had, or None without a mixer.
    """

    def __init__(self, path, settings):
        with np.load(path, allow_pickle=False) as arrays:
            self.tokens = arrays["tokens"].astype(np.int64)
            self.pieces = arrays["pieces"].tolist()
            self.kinds = str(arrays["kinds"])
            self.bos_id = int(arrays["bos_id"])
            self.val_bpb = float(arrays["val_bpb"])
            stages = {name: arrays[name] for name in arrays.files if name not in NO_STAGES}
        if any(a.shape != (1 + 2 * TOP, len(self.tokens) - 1) for a in stages.values()):
            raise ValueError("another format")
        self.bits = {stage: TOTAL_BITS - np.log2(found[0]) for stage, found in stages.items()}
        # Of the last walk.
        self.neural = [name for name in stages if name not in ("unguarded", "mixer")][-1]
        self.mixer = "mixer" if "mixer" in stages else None
        self.last = self.mixer or self.neural
        self.top = {}
        for stage in filter(None, (self.neural, self.mixer)):
            _, highest, tokens = np.split(stages[stage], [1, 1 + TOP])
            self.top[stage] = tokens.T, TOTAL_BITS - np.log2(highest.T)
        self.texts = [self.text_of(piece, kind) for piece, kind in zip(self.pieces, self.kinds)]
        self.counts = None
        if self.mixer:
            order, recent, hash_bits = (
                int(settings[n]) for n in ("ngram_order", "ngram_recent", "ngram_hash_bits")
            )
            self.counts = count_occurrences(
                self.tokens[:-1], self.word_begins, order, recent, hash_bits
            )

    @staticmethod
    def text_of(piece, kind):
        """Return the bytes that a piece prints, its leading space included; b"" for a boundary."""
        if kind == "B":
            return bytes.fromhex(piece[3:5])  # <0x0A>
        return piece.replace(SPACE, " ").encode("utf-8", "replace") if kind == "N" else b""

    @functools.cached_property
    def word_begins(self):
        """Whether each token of the vocabulary has a leading space or is a boundary, bool (V,)."""
        return np.array([text[:1] in (b"", b" ") for text in self.texts]) & (
            np.array(list(self.kinds)) != "B"
        )

    @functools.cached_property
    def sizes(self):
        """Bytes that each token adds to the text, int64 (n,); no space after a boundary."""
        lengths = np.array([len(text) for text in self.texts])
        leading = self.word_begins & (lengths > 0)
        own, before = self.tokens[1:], self.tokens[:-1]
        return lengths[own] - (leading[own] & (lengths[before] == 0))

    def label(self, token):
        """Return how a token is shown in running text."""
        piece, kind = self.pieces[token], self.kinds[token]
        if kind == "B":
            byte = self.texts[token]
            return visible(byte.decode()) if byte < b"\x80" else f"\u27e8{byte.hex().upper()}\u27e9"
        if kind != "N":
            return f"\u27e8{visible(piece)}\u27e9"
        return visible(piece.replace(SPACE, " "))


def labels_of(trace):
    """Return how each of a trace's n tokens is shown in the text.

    Byte tokens that make up one character show it at the last of them, a dot at the others.
    """
    tokens = trace.tokens[1:].tolist()
    labels = [trace.label(token) for token in tokens]
    for i, token in enumerate(tokens):
        first = trace.texts[token][:1]
        size = 2 + (first >= b"\xe0") + (first >= b"\xf0")  # of a character that begins so
        group = tokens[i : i + size]
        if first < b"\xc0" or len(group) < size or any(trace.kinds[t] != "B" for t in group):
            continue
        try:
            char = b"".join(trace.texts[t] for t in group).decode()
        except UnicodeDecodeError:
            continue
        labels[i : i + size] = ["\u00b7"] * (size - 1) + [visible(char)]
    return labels


def count_occurrences(tokens, begins, order, recent, hash_bits):
    """Return how many occurrences each context that ends at each of n tokens had, (n, 6).

    What NgramHistory of train_gpt.py finds, hash collisions included: of the last `recent` links of
    a chain, those that hold the same context. tokens int64 (n,); begins bool (V,).
    """
    n = len(tokens)
    ends = np.arange(n)
    positions = ends[:, None] - np.arange(8)
    known = tokens[positions.clip(min=0)]
    counts = np.zeros((n, len(CONTEXT_LENGTHS)), dtype=np.int64)
    for kind, length in enumerate(CONTEXT_LENGTHS):
        inside = (np.arange(8) < min(length, order - 1)) & (positions >= 0)
        if kind == len(CONTEXT_LENGTHS) - 1:
            begin = begins[known]
            inside &= begin.cumsum(1) == begin  # none that is newer
        context = np.where(inside, known, -1)
        slot = np.zeros(n, dtype=np.int64)
        for column in context.T:
            slot = (slot ^ column) * np.int64(-7046029254386353131)
            slot ^= (slot >> 29) & 0x7FFFFFFFF
        slot &= (1 << hash_bits) - 1
        by_slot = slot.argsort(kind="stable")
        is_next = slot[by_slot][1:] == slot[by_slot][:-1]
        before = np.full(n, -1)
        before[by_slot[1:]] = np.where(is_next, by_slot[:-1], -1)
        link = ends
        for _ in range(recent):
            link = np.where(link >= 0, before[link], -1)
            counts[:, kind] += (link >= 0) & (context[link] == context).all(1)
    return counts


def part_of(name):
    """Return the part of the model that a parameter belongs to, in words."""
    if name == "mixer":
        return "mixer"
    if name.startswith("blocks."):
        parts = {"mlp_in": "MLP", "mlp_out": "MLP", "q": "attention", "k": "attention"}
        parts |= {"v": "attention", "attn_out": "attention"}
        return parts.get(name.split(".")[-1], "vectors and small matrices")
    tables = {"embed.tokens": "token table", "embed.bigrams": "bigram table"}
    return tables.get(name, "value table" if name == "ve_table" else "vectors and small matrices")


def artifact_parts(path):
    """Return {part: bytes} of an artifact's file, or {} if train_gpt.py cannot read it.

    A part's share is what it takes when it is compressed alone, all scaled to the file's size. The
    words of levels do not compress: a matrix has as many bits of them as its levels cost.
    """
    data = path.read_bytes()
    try:
        weights = train_gpt.read_artifact(path, data).weights  # or UserError
    except train_gpt.UserError:
        return {}
    body = data[train_gpt.ARTIFACT_HEAD_BYTES :]
    raw = lzma.LZMADecompressor(**train_gpt.LZMA).decompress(body)
    begin = 3 + int.from_bytes(raw[:3], "big")
    parts = {"settings and tokenizer": raw[:begin]}
    header = json.loads(raw[3:begin])
    words = {}
    for name, kind, shape in header["tensors"]:
        count = math.prod(shape)
        sizes = {"fp16": 2 * count, "levels": 2 * sum(shape)}
        size = sizes.get(kind, count + 2 * (*shape, 1)[0])  # int6, int8: scales of rows
        stored = raw[begin : begin + size]
        begin += size
        part = part_of(name)
        if kind == "levels":
            bits = level_bits(weights[name], stored, header["coarseness"])
            words[part] = words.get(part, 0) + bits / 8
            part = "steps and means of matrices"
        parts[part] = parts.get(part, b"") + stored
    alone = {part: len(lzma.compress(rows, preset=3)) for part, rows in parts.items()}
    alone |= {part: length + alone.get(part, 0) for part, length in words.items()}
    scale = len(data) / sum(alone.values())
    return {part: round(length * scale) for part, length in alone.items()}


def level_bits(w, stored, coarseness):
    """Return the bits that the levels of a parameter w (R, C) cost; `stored`: its exponents."""
    R, C = w.shape
    numbers = torch.frombuffer(bytearray(stored), dtype=torch.int8)
    row_steps, row_means, column_steps, column_means = numbers.split([R, R, C, C])
    steps = train_gpt.step_sizes(row_steps, column_steps, coarseness)
    most = train_gpt.LEVEL_MAX
    levels = (w / steps).round().long().clamp(-most, most).flatten().numpy()
    classes = train_gpt.level_classes(row_means, column_means)
    freqs, _ = train_gpt.level_frequencies()
    freqs = freqs.reshape(-1, 2 * most + 1)[classes, levels + most]
    return (TOTAL_BITS - np.log2(freqs)).sum()


# ---- Charts --------------------------------------------------------------------------------------
# matplotlib draws with stand-in colours, which are then replaced: by CSS variables in the page, so
# that charts follow its light or dark colours, and by fixed ones of middle lightness in the figures
# of the README, which stand on either ground. Runs differ in dashes and marks as well as in colour.

# {role: (stand-in, colour of the README's figures)}
INKS = {
    "ink": ("#010203", "#6f7883"),
    "grid": ("#040506", "#9aa4b0"),
    "s0": ("#070809", "#2f81c7"),
    "s1": ("#0a0b0c", "#c8761a"),
    "s2": ("#0d0e0f", "#2a9d76"),
    "s3": ("#101112", "#b9589e"),
    "up": ("#131415", "#c8761a"),
    "down": ("#161718", "#2f81c7"),
    "base": ("#191a1b", "#8a94a0"),
}
SERIES = ("s0", "s1", "s2", "s3")
DASHES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D")
QUANTIZERS = {"fisher": 0, "int6": 1}  # {quantizer: number of its colour and dashes}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 11,
    "font.family": ["DejaVu Sans"],  # matplotlib brings it: text is measured alike everywhere
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INKS["grid"][0],
    "axes.labelcolor": INKS["ink"][0],
    "axes.titlesize": 11,
    "text.color": INKS["ink"][0],
    "xtick.color": INKS["ink"][0],
    "ytick.color": INKS["ink"][0],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INKS["grid"][0],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
}
MOST_OF_TWO_COLUMNS = 18  # characters of a name in a legend of two columns
MOST_OF_A_NAME = 28  # characters of a name in a chart


def short(name):
    """Return a run's name as visible text that fits into a chart: its beginning and its end."""
    shown = visible(name)
    if shown.startswith("_"):
        shown = f"\u200b{shown}"  # matplotlib leaves labels that begin with "_" out of legends
    half = MOST_OF_A_NAME // 2
    return shown if len(shown) <= MOST_OF_A_NAME else f"{shown[:half]}\u2026{shown[1 - half :]}"


def thousands(number, _=None):
    """Return a number as text with thousands separators: an axis's ticks, a caption's figures."""
    return f"{number:,.0f}"


def ink(role):
    """Return the stand-in colour of a role."""
    return INKS[role][0]


def svg_of(figure, name, title, description, colours):
    """Return a figure as SVG that begins with <svg; equal figures give equal bytes.

    name: prefix of all ids, so that several fit into one page; colours {role: CSS colour}.
    """
    file = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # the reader's fonts may have it
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'DejaVu Sans', sans-serif", svg)
    for role, (stand_in, _) in INKS.items():
        svg = svg.replace(stand_in, colours[role])
    named = tag("title", escaped(title), id=f"{name}-title")
    named += tag("desc", escaped(description), id=f"{name}-desc")
    head, rest = svg.split(">", 1)
    described = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc"'
    described += ' stroke-linejoin="round" stroke-linecap="butt"'
    return f"{head} {described}>{named}{rest.strip()}"


class Chart:
    """One chart: its figure while it is drawn, then a <figure> of the page or an SVG file."""

    def __init__(self, name, title, width=4.6, height=3.1):
        self.name = name
        self.title = title
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.axes = self.figure.add_subplot()
        self.description = ""
        self.numbers = ""  # HTML of a table with the same figures

    def legend(self, runs, **how):
        """Name the runs, unless there is one alone; above the axes, where no data are.

        Long names stand one below the other. The figure grows with them.
        """
        if len(runs) <= 1:
            return
        how = dict(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2) | how
        if "ncols" not in how:
            labels = self.axes.get_legend_handles_labels()[1]
            how["ncols"] = 2 if max(map(len, labels)) <= MOST_OF_TWO_COLUMNS else 1
            rows = math.ceil(len(labels) / how["ncols"])
            self.figure.set_figheight(self.figure.get_figheight() + 0.2 * (rows - 1))
        self.axes.legend(**how)

    def name_rows(self, names):
        """Write the name of row i of bars over it, at i - 0.42: the rows have the whole width."""
        for i, name in enumerate(names):
            at = self.axes.get_yaxis_transform()
            self.axes.text(0.01, i - 0.42, name, transform=at, va="center", fontsize=10)
        self.axes.set_yticks([])
        self.axes.set_ylim(len(names) - 0.4, -0.65)
        self.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))

    def value(self, x, y, words):
        """Write what a bar that ends at (x, y) stands for, a little to its right."""
        offset = dict(xytext=(4, 0), textcoords="offset points")
        self.axes.annotate(words, (x, y), va="center", fontsize=10, **offset)

    def element(self):
        """Return the chart as a <figure> with its heading and its numbers."""
        colours = {role: f"var(--{role})" for role in INKS}
        svg = svg_of(self.figure, self.name, self.title, self.description, colours)
        svg = re.sub(r' (?:width|height)="[^"]*"', "", svg, count=2)  # those of <svg> itself
        caption = tag("figcaption", escaped(self.title))
        described = tag("p", escaped(self.description))
        numbers = ""
        if self.numbers:
            numbers = tag("details", tag("summary", "Numbers"), self.numbers)
        return tag("figure", caption, svg, described, numbers)

    def file(self):
        """Return the chart as the bytes of an SVG file, for light and dark grounds."""
        colours = {role: colour for role, (_, colour) in INKS.items()}
        svg = svg_of(self.figure, self.name, self.title, self.description, colours)
        return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).encode() + b"\n"


def styled(draw):
    """Return the function `draw` under this module's style of charts."""

    @functools.wraps(draw)
    def drawn(*args):
        with matplotlib.rc_context(STYLE):
            return draw(*args)

    return drawn


def line(chart, number, x, y, name, **how):
    """Draw the line of run `number` in its colour, with its dashes and marks.

    Colours come again from the fifth run on, then with other dashes and marks.
    """
    other = (number + number // 4) % 4
    style = dict(color=ink(SERIES[number % 4]), linestyle=DASHES[other], label=short(name))
    if len(x) <= 40:
        style |= dict(marker=MARKS[other], markersize=3.5)
    chart.axes.plot(x, y, **style | how)


def training_charts(runs):
    """Return the charts of training: loss by steps and by seconds, and the rate."""
    runs = [run for run in runs if run.log]
    return [draw(runs) for draw in (loss_chart, clock_chart, rate_chart) if runs]


@styled
def loss_chart(runs):
    """Return the training loss, plain and weighted, against steps."""
    chart = Chart("loss", "Training loss by step")
    for run in runs:
        steps = [row["step"] for row in run.log]
        line(chart, run.number, steps, [row["loss"] for row in run.log], run.name)
        weighted = [row["weighted"] for row in run.log]
        thin = dict(linewidth=0.9, alpha=0.7, marker="", label="_")
        line(chart, run.number, steps, weighted, run.name, **thin)
    chart.axes.set(xlabel="step", ylabel="nats a token")
    chart.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    chart.legend(runs)
    last = "; ".join(
        f"{run.name}: {run.log[-1]['loss']:.4f} at step {run.log[-1]['step']:,.0f}" for run in runs
    )
    chart.description = (
        "Plain cross-entropy (thick) and what is minimized (thin), in which tokens that the token "
        f"before predicts well weigh less. Each point is one batch. {last}."
    )
    rows = [
        (
            f"{run.name}, step {row['step']:.0f}",
            row["loss"],
            row["weighted"],
            f"{row['seconds']:.0f}",
        )
        for run in runs
        for row in run.log
    ]
    chart.numbers = table(("", "loss", "weighted", "seconds"), rows, "Training loss")
    return chart


@styled
def clock_chart(runs):
    """Return the plain training loss against seconds."""
    chart = Chart("clock", "Training loss by time")
    for run in runs:
        seconds = [row["seconds"] for row in run.log]
        line(chart, run.number, seconds, [row["loss"] for row in run.log], run.name)
    chart.axes.set(xlabel="seconds of training", ylabel="nats a token")
    chart.legend(runs)
    chart.axes.xaxis.set_major_formatter(thousands)
    ends = "; ".join(f"{run.name}: {thousands(run.log[-1]['seconds'])} s" for run in runs)
    chart.description = f"The plain loss against the clock. {ends}."
    return chart


@styled
def rate_chart(runs):
    """Return the rate of training since its start, or None where no log has two rates."""
    if all(len(run.log) < 3 for run in runs):
        return None
    chart = Chart("rate", "Rate of training")
    for run in runs:
        rows = run.log[1:] or run.log  # the first step warms up
        steps = [row["step"] for row in rows]
        line(chart, run.number, steps, [row["rate"] for row in rows], run.name)
    chart.axes.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    chart.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    chart.axes.yaxis.set_major_formatter(thousands)
    chart.legend(runs)
    rates = "; ".join(f"{run.name}: {thousands(run.log[-1]['rate'])}" for run in runs)
    chart.description = f"Mean from the first step on, tokens a second. In the end: {rates}."
    return chart


@styled
def waterfall_chart(run, limits):
    """Return the waterfall of a run's stages: where its bits a byte come from."""
    chart = Chart(f"stages{run.number}", f"Stages of {visible(run.name)}")
    names = [stage["name"] for stage in run.stages]
    values = [stage["val_bpb"] for stage in run.stages]
    axes = chart.axes
    low, high = limits
    before = [low, *values[:-1]]
    for i, (value, start) in enumerate(zip(values, before)):
        rises = value > start
        role = "base" if i == 0 else "up" if rises else "down"
        hatch = "" if i == 0 or not rises else "///"
        axes.bar(i, value - start, 0.62, start, color=ink(role), hatch=hatch, edgecolor=ink("grid"))
        change = "" if i == 0 else f"\n{value - start:+.4f}"
        above = max(value, start)
        offset = dict(xytext=(0, 2), textcoords="offset points", ha="center", va="bottom")
        axes.annotate(f"{value:.4f}{change}", (i, above), fontsize=10, **offset)
        if i:
            axes.plot([i - 1 + 0.31, i - 0.31], [start, start], color=ink("ink"), linewidth=0.7)
    axes.set(ylabel="bits a byte", ylim=(low, high + (high - low) * 0.18))
    axes.set_xticks(range(len(names)), [visible(name).replace("_", "_\n") for name in names])
    axes.grid(axis="x", visible=False)
    chart.description = (
        "Each bar begins where the one before ended; the scale does not begin at 0. Bits a byte: "
        + ", ".join(f"{name} {value:.6f}" for name, value in zip(names, values))
    )
    rows = [
        (
            stage["name"],
            f"{stage['val_bpb']:.6f}",
            f"{stage['val_loss']:.6f}",
            f"{stage['tokens']:,}",
            f"{stage['seconds']:.1f}",
        )
        for stage in run.stages
    ]
    head = ("stage", "bits a byte", "nats a token", "tokens", "seconds")
    chart.numbers = table(head, rows, f"Stages of {run.name}")
    return chart


def stage_charts(runs):
    """Return a waterfall for each run with stages, all on one scale."""
    runs = [run for run in runs if run.stages]
    values = [stage["val_bpb"] for run in runs for stage in run.stages]
    if not values:
        return []
    margin = (max(values) - min(values)) * 0.15 or 0.01
    limits = min(values) - margin, max(values) + margin
    return [waterfall_chart(run, limits) for run in runs]


def seconds_of(run):
    """Return {what: seconds} of a run, in the order of time."""
    train = run.part("train")
    spent = {words: train.get(name) or 0 for name, words in TRAINING.items()}
    spent = {words: seconds for words, seconds in spent.items() if f"{seconds:.1f}" != "0.0"}
    spent |= {stage["name"]: stage["seconds"] for stage in run.stages}
    proof = run.part("proof")
    if proof:
        spent |= {"proof: code": proof["encode_seconds"], "proof: decode": proof["decode_seconds"]}
    return spent


def in_order(names):
    """Return different names of stages and other work, sorted by time; the others at the end."""
    known = [*TRAINING.values(), *STAGES]
    return sorted(
        dict.fromkeys(names), key=lambda name: known.index(name) if name in known else len(known)
    )


@styled
def seconds_chart(runs):
    """Return the seconds of each part of the runs, or None where none are known."""
    spent = [(run, seconds_of(run)) for run in runs]
    spent = [(run, parts) for run, parts in spent if parts]
    if not spent:
        return None
    names = in_order(name for _, parts in spent for name in parts)
    chart = Chart("seconds", "Where the seconds went", height=1.2 + 0.3 * len(names))
    thick = 0.8 / len(spent)
    for i, (run, parts) in enumerate(spent):
        at = [names.index(name) + (i - (len(spent) - 1) / 2) * thick for name in parts]
        chart.axes.barh(
            at,
            list(parts.values()),
            thick * 0.9,
            color=ink(SERIES[run.number % 4]),
            hatch=("", "//", "..", "xx")[(run.number + run.number // 4) % 4],
            edgecolor=ink("grid"),
            label=short(run.name),
        )
    chart.axes.set_yticks(range(len(names)), [visible(name) for name in names])
    chart.axes.invert_yaxis()
    chart.axes.grid(axis="y", visible=False)
    chart.axes.set(xlabel="seconds")
    chart.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    chart.axes.xaxis.set_major_formatter(thousands)
    chart.legend(spent)
    sums = []
    for run, _ in spent:
        train = run.part("train")
        scored = sum(s["seconds"] for s in run.stages if s["name"] != "pre_quant")
        words = [f"{thousands(scored)} s of evaluation"] if run.stages else []
        if train:
            trained = (train.get("seconds") or 0) + (train.get("calibration_seconds") or 0)
            words.insert(0, f"{thousands(trained)} s of training")
        if words:
            sums.append(f"{run.name}, on {device_of(run)}: {', '.join(words)}")
    chart.description = (
        "The competition allows 600 s of training, with all that reads training text after it "
        "(calibration, fisher's gradients; where a log has no line `fisher:`, the latter are "
        "in quantization), and 600 s of evaluation, without pre_quant and proof, on 8xH100. "
        f"{'; '.join(sums)}{'.' * bool(sums)}"
    )
    rows = [(name, *(f"{parts.get(name, 0):.1f}" for _, parts in spent)) for name in names]
    chart.numbers = table(("part", *(run.name for run, _ in spent)), rows, "Seconds")
    return chart


@styled
def bytes_chart(runs):
    """Return the bytes of code and weights against the cap, or None where none are known."""
    runs = [run for run in runs if run.part("artifact")]
    if not runs:
        return None
    chart = Chart("bytes", "Bytes against the cap", height=1.4 + 0.55 * len(runs))
    for i, run in enumerate(runs):
        sizes = run.part("artifact")
        weights, code = sizes["weights_bytes"], sizes["code_bytes"]
        look = dict(height=0.45, edgecolor=ink("grid"))
        named = "_" if i else ""
        axes = chart.axes
        axes.barh(i, weights, color=ink("s0"), label=f"{named}artifact", **look)
        axes.barh(i, code, left=weights, color=ink("s1"), hatch="//", label=f"{named}code", **look)
        cap = [sizes["limit_bytes"]] * 2
        axes.plot(cap, [i - 0.3, i + 0.3], color=ink("ink"), label=f"{named}cap")
    chart.name_rows([short(run.name) for run in runs])
    chart.legend(["", ""], ncols=3)
    chart.axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} MB")
    chart.axes.grid(axis="y", visible=False)
    chart.description = (
        "The artifact (plain), then the code (hatched); the upright line is the cap. "
        + "; ".join(
            "{0}: {weights_bytes:,} and {code_bytes:,} of {limit_bytes:,} bytes".format(
                run.name, **run.part("artifact")
            )
            for run in runs
        )
    )
    return chart


@styled
def parts_chart(run):
    """Return where the bytes of a run's artifact are, or None without its file."""
    parts = artifact_parts(run.artifact) if run.artifact else {}
    if not parts:
        return None
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
    name = visible(run.name)
    chart = Chart(
        f"parts{run.number}", f"Inside the artifact of {name}", height=1 + 0.3 * len(parts)
    )
    chart.axes.barh(range(len(parts)), list(parts.values()), 0.6, color=ink("s0"))
    for i, length in enumerate(parts.values()):
        chart.value(length, i, f"{length:,}")
    chart.axes.set_yticks(range(len(parts)), list(parts))
    chart.axes.set(xlim=(0, 1.35 * max(parts.values())))
    chart.axes.invert_yaxis()
    chart.axes.set_xlabel("bytes")
    chart.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
    chart.axes.xaxis.set_major_formatter(thousands)
    chart.axes.grid(axis="y", visible=False)
    chart.description = (
        "Bytes of each part when it is compressed alone, scaled to the size of the file: "
        + ", ".join(f"{part} {length:,}" for part, length in parts.items())
    )
    return chart


def windows(values, count):
    """Return the sums of `count` stretches of an array, as equal as can be."""
    return np.array([part.sum() for part in np.array_split(values, count)])


@styled
def stream_chart(run):
    """Return a run's bits a byte along the text, with and without the mixer; None without trace."""
    trace = run.trace
    if not trace or trace.sizes.sum() == 0:
        return None
    chart = Chart(f"stream{run.number}", f"Along the text: {visible(run.name)}")
    n = len(trace.sizes)
    count = max(1, min(40, n // 50))
    sizes = windows(trace.sizes, count).clip(min=1)
    ends = windows(np.ones(n), count).cumsum()
    curves = {stage: windows(trace.bits[stage], count) / sizes for stage in trace.top}
    for i, (stage, curve) in enumerate(curves.items()):
        line(chart, i, ends, curve, stage)
    chart.axes.set(xlabel="token", ylabel="bits a byte", ylim=(0, None))
    chart.axes.xaxis.set_major_formatter(thousands)
    chart.legend(curves)
    chart.description = f"Bits a byte in {count} stretches of the first {n:,} tokens."
    if trace.mixer:
        neural, mixture = (trace.bits[stage] for stage in curves)
        chart.axes.fill_between(ends, *curves.values(), color=ink("s1"), alpha=0.15, linewidth=0)
        gains = windows(neural - mixture, 4) / windows(trace.sizes, 4).clip(min=1)
        quarters = ", ".join(f"{gain:.4f}" for gain in gains)
        chart.description += f" The mixer saves, quarter by quarter: {quarters}."
    return chart


def predictions(runs):
    """Return [(run, proof)] of the runs that were proved."""
    return [(run, run.results["proof"]) for run in runs if run.part("proof")]


@styled
def proof_chart(runs, name="proof"):
    """Return bytes predicted and bytes decoded, a pair of bars a run; None without any proof."""
    proofs = predictions(runs)
    if not proofs:
        return None
    chart = Chart(name, "Proof: predicted and decoded", height=1.1 + 0.85 * len(proofs))
    longest = max(proof["bytes_on_disk"] for _, proof in proofs)
    for i, (_, proof) in enumerate(proofs):
        predicted = proof["predicted_bits"] / 8
        pairs = (("s0", "", predicted, f"{predicted:,.1f}"),)
        pairs += (("s1", "//", proof["bytes_on_disk"], f"{proof['bytes_on_disk']:,}"),)
        for k, (role, hatch, length, words) in enumerate(pairs):
            at = i + 0.31 * k - 0.08
            chart.axes.barh(at, length, 0.28, color=ink(role), hatch=hatch, edgecolor=ink("grid"))
            chart.value(length, at, words + (" predicted" if k == 0 else " decoded"))
    chart.name_rows([f"{short(run.name)}, {proof['tokens']:,} tokens" for run, proof in proofs])
    chart.axes.set_xlim(0, longest * 1.75)
    chart.axes.xaxis.set_major_formatter(thousands)
    chart.axes.set(xlabel="bytes")
    chart.axes.grid(axis="y", visible=False)
    words = "; ".join(
        f"{run.name}: another process decoded {proof['tokens']:,} tokens from "
        f"{proof['bytes_on_disk']:,} bytes, predicted {proof['predicted_bits'] / 8:,.1f}"
        for run, proof in proofs
    )
    chart.description = (
        "The code length that was scored, and the bytes on disk that a decoder with nothing but "
        f"the artifact turned into the text. {words}."
    )
    return chart


@styled
def seeds_chart(runs, rule=None):
    """Return bits a byte by stage, a line a run, on a broken scale; None without any stages.

    rule: (name, bits a byte) of another mixer, drawn as a level line.
    """
    runs = [run for run in runs if run.stages]
    if not runs:
        return None
    chart = Chart("stages", "Bits a byte by stage")
    names = in_order(stage["name"] for run in runs for stage in run.stages)
    for run in runs:
        at = [names.index(stage["name"]) for stage in run.stages]
        values = [stage["val_bpb"] for stage in run.stages]
        line(chart, run.number, at, values, run.name, markersize=6)
        chart.axes.lines[-1].set_label(f"{short(run.name)}: {values[-1]:.4f}")
    if rule:
        chart.axes.axhline(rule[1], color=ink("base"), linestyle=(0, (6, 2, 1, 2)))
        chart.axes.annotate(
            f"{rule[0]}: {rule[1]:.4f}",
            (0, rule[1]),
            (0, -9),
            textcoords="offset points",
            va="center",
        )
    chart.axes.set_xticks(range(len(names)), [visible(name).replace("_", "_\n") for name in names])
    chart.axes.margins(0.08, 0.12)
    chart.axes.set(ylabel="bits a byte, lower is better")
    chart.legend([*runs, ""])
    words = "; ".join(
        f"{run.name}: " + ", ".join(f"{s['name']} {s['val_bpb']:.4f}" for s in run.stages)
        for run in runs
    )
    chart.description = f"{words}." + (f" {rule[0]}: {rule[1]:.4f}." if rule else "")
    return chart


def decimals(number):
    """Return a number as text without an exponent: what a logarithmic axis shows."""
    return f"{number:.8f}".rstrip("0").rstrip(".")


def quantizer_lines(models):
    """Return [(quantizer, model's number, model, lines)], sorted by quantizer, then bytes."""
    found = []
    for quantizer in ("int6", "fisher"):
        for i, model in enumerate(models):
            lines = [entry for entry in model["lines"] if entry["quantizer"] == quantizer]
            if lines:
                found.append((quantizer, i, model, sorted(lines, key=lambda row: row["bytes"])))
    return found


@styled
def quantizers_chart(models, caps=()):
    """Return loss against bytes, a line for each quantizer of each model.

    models, caps: as read_quantizers returns them. Colour and dashes tell quantizers apart, marks
    models; an upright line is what a cap leaves for the artifact.
    """
    several = len(models) > 1
    chart = Chart("quantizers", "Loss against bytes", 4.6, 3.4 + several * 0.2 * (len(models) + 1))
    axes = chart.axes
    axes.set(xscale="log", yscale="log", xlabel="MB of the artifact, without code")
    axes.set(ylabel="KL, nats a token")
    axes.margins(0.1, 0.14)
    shown = {}  # {label: a line like those that have it}
    words = []
    for quantizer, i, model, lines in quantizer_lines(models):
        x, y = ([row[key] for row in lines] for key in ("bytes", "kl"))
        mark = dict(marker=MARKS[i % 4], markersize=5)
        if i >= len(MARKS):
            mark["markerfacecolor"] = "none"
        line(chart, QUANTIZERS[quantizer], x, y, quantizer, **mark)
        shown.setdefault(quantizer, axes.lines[-1])
        if several:
            style = dict(color=ink("ink"), linestyle="", label=visible(model["name"]))
            shown.setdefault(model["name"], Line2D([], [], **style, **mark))
        values = ", ".join(f"{size:,} {decimals(kl)}" for size, kl in zip(x, y))
        words.append(f"{quantizer}, {model['name']}: {values}")
    for cap in caps:
        role = SERIES[QUANTIZERS[cap["quantizer"]]]
        room = cap["limit_bytes"] - cap["code_bytes"]
        axes.axvline(room, color=ink(role), linestyle=(0, (6, 2, 1, 2)), linewidth=1)
        # On the side where the quantizer's own line has left room below it.
        side = -1 if cap["quantizer"] == "fisher" else 1
        axes.annotate(
            f"{cap['limit_bytes'] / 1e6:g} MB\nwith code",
            (room, 0),
            (5 * side, 5),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            color=ink(role),
            fontsize=10,
            ha="right" if side < 0 else "left",
        )
        words.append(f"a cap of {cap['limit_bytes']:,} leaves {cap['quantizer']} {room:,}")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 6, 8)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}")
    axes.yaxis.set_major_formatter(lambda y, _: decimals(y))
    axes.minorticks_off()
    # The quantizers first.
    shown = {quantizer: shown[quantizer] for quantizer in QUANTIZERS if quantizer in shown} | shown
    chart.legend(["", ""], handles=[*shown.values()], ncols=1 if several else 2)
    chart.description = f"Bytes without code, KL in nats a token. {'; '.join(words)}."
    return chart


# ---- The text itself -----------------------------------------------------------------------------

EDGES = (1, 2, 4, 8, 12)  # bits: where one shade ends and the next begins
MOST_BITS_STEPS = 2500  # steps of the page's numbers in a bit: 24 bits fit into 16 bits
MOST_COUNTED = 2**16 - 1  # occurrences of a context; the page's numbers end there


def shades(bits):
    """Return the shade, 0..5, of each of an array of bits."""
    return np.searchsorted(EDGES, bits, side="right")


def packed(values, dtype):
    """Return an array as base64 of little-endian numbers."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def text_data(run):
    """Return what the page's script shows of each token, as an object for JSON."""
    trace = run.trace
    tops = [tokens for tokens, _ in trace.top.values()]
    used, index = np.unique(
        np.concatenate([trace.tokens, *map(np.ravel, tops)]), return_inverse=True
    )
    parts = np.split(index, np.cumsum([len(trace.tokens), *(top.size for top in tops)]))
    data = {
        "pieces": [trace.label(int(token)).replace(" ", "\u2423") for token in used],
        "begins": "".join("01"[int(trace.word_begins[token])] for token in used),
        "tokens": packed(parts[0], "<u2"),
        "stages": list(trace.bits),
        "bits": [packed((b * MOST_BITS_STEPS).round(), "<u2") for b in trace.bits.values()],
        "tops": [
            {
                "stage": stage,
                "tokens": packed(ids, "<u2"),
                "bits": packed((bits * MOST_BITS_STEPS).round(), "<u2"),
            }
            for ids, (stage, (_, bits)) in zip(parts[1:], trace.top.items())
        ],
        "edges": EDGES,
    }
    if trace.counts is not None:
        order = int(run.settings["ngram_order"])
        data["counts"] = packed(trace.counts.clip(max=MOST_COUNTED), "<u2")
        data["lengths"] = [min(length, order - 1) for length in CONTEXT_LENGTHS]
        tokens = [f"last {n} tokens" if n > 1 else "last token" for n in data["lengths"][:-1]]
        data["contexts"] = [*tokens, "word so far"]
    return data


def text_spans(trace):
    """Return the text as HTML: a paragraph a document, a focusable span a token."""
    classes = shades(trace.bits[trace.last])
    paragraphs = [[]]
    for i, (token, label) in enumerate(zip(trace.tokens[1:].tolist(), labels_of(trace))):
        if token == trace.bos_id and paragraphs[-1]:
            paragraphs.append([])
        label = html.escape(label)
        stop = 0 if i == 0 else -1  # one stop of the tab key; the arrows do the rest
        span = f'<span class="b{classes[i]}" tabindex="{stop}">{label}</span>'
        # The span ends before the line does, so that its colour does not fill the margin.
        paragraphs[-1].append(span + ("\n" if label.endswith(LINE) else ""))
    return "".join(tag("p", *spans) for spans in paragraphs)


def text_section(run):
    """Return the section with a run's text, and the data for it."""
    trace = run.trace
    n = len(trace.tokens) - 1
    bits = trace.bits[trace.last]
    total = max(1, trace.sizes.sum())
    bounds = (0, *EDGES)
    words = [f"{low} to {high}" for low, high in zip(bounds, EDGES)] + [f"{EDGES[-1]} and more"]
    legend = tag("li", "Bits of a token:")
    legend += "".join(tag("li", tag("span", text, class_=f"b{i}")) for i, text in enumerate(words))
    modes = [("last", f"Bits under {trace.last}")]
    if trace.mixer:
        modes += [("neural", f"Bits under {trace.neural}"), ("change", "What the mixer changed")]
    radios = "".join(
        tag(
            "label",
            f'<input type="radio" name="mode" value="{value}"{" checked" * (i == 0)}> ',
            escaped(text),
        )
        for i, (value, text) in enumerate(modes)
    )
    data = json.dumps(text_data(run), ensure_ascii=True, separators=(",", ":"))
    for char in "<>&":
        data = data.replace(char, f"\\u{ord(char):04x}")
    change = ""
    for kind, words in (("g", "Bits saved:"), ("l", "Bits lost:")) if trace.mixer else ():
        sizes = ("0.1 to 1", "1 to 4", "4 and more")
        levels = (tag("span", size, class_=f"{kind}{i}") for i, size in enumerate(sizes, 1))
        change += "".join(tag("li", part) for part in (words, *levels))
    return (
        tag(
            "section",
            tag("h2", "The text, token by token", id="text-title"),
            tag(
                "p",
                f"The first {n:,} tokens ({trace.sizes.sum():,} bytes) of the text that ",
                tag("b", escaped(run.name)),
                f" scored, {bits.sum() / total:.4f} bits a byte here. A token is a piece of a "
                "word; the deeper its colour and the thicker the line below it, the more bits it "
                "took.",
            ),
            tag(
                "p",
                "Point at a token or tap it, and see what was predicted in its place, before and "
                "after the mixer; or reach it with Tab and move with the arrow keys, Home and End. "
                "Escape lets go of it.",
                class_="how",
            ),
            tag("fieldset", tag("legend", "Colour shows"), radios, class_="modes"),
            tag("ul", legend, class_="legend", id="legend-bits", aria_label="Bits a token"),
            tag("ul", change, class_="legend", id="legend-change", aria_label="Change", hidden="")
            if change
            else "",
            tag(
                "div",
                tag(
                    "div",
                    text_spans(trace),
                    id="text",
                    role="group",
                    aria_labelledby="text-title",
                    lang="en",
                    dir="ltr",
                ),
                tag(
                    "aside", tag("p", "No token is chosen."), id="detail", aria_label="Chosen token"
                ),
                class_="reader",
            ),
            aria_labelledby="text-title",
        )
        + f'<script type="application/json" id="data">{data}</script>'
        + tag("script", SCRIPT)
    )


# ---- The page ------------------------------------------------------------------------------------


def device_of(run):
    """Return the device of a run, in words."""
    return run.part("environment").get("device", "an unknown device")


def overview(runs):
    """Return the table of all runs, and their mean if they are several."""
    columns = []
    for run in runs:
        last = run.stages[-1] if run.stages else {}
        sizes = run.part("artifact")
        proof = run.part("proof")
        train = run.part("train")
        columns.append(
            {
                "bits a byte": f"{last['val_bpb']:.6f}" if last else "none",
                "of stage": last.get("name", ""),
                "code + artifact": "{total_bytes:,} of {limit_bytes:,} bytes".format(**sizes)
                if sizes
                else "unknown",
                "proof: decoded": "{tokens:,} tokens from {bytes_on_disk:,} bytes".format(**proof)
                if proof
                else "nothing",
                "trained": "{steps:,} steps, {tokens:,} tokens".format(**train)
                if all(isinstance(train.get(name), int) for name in ("steps", "tokens"))
                else "unknown",
                "command": run.results.get("command", "unknown"),
                "preset": run.settings.get("preset", "unknown"),
                "seed": run.settings.get("seed", "unknown"),
                "device": device_of(run),
            }
        )
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    shown = table(("", *(run.name for run in runs)), rows, "Runs")
    scored = [run for run in runs if run.stages]
    if len(scored) < 2:
        return shown
    odd = {name for run in scored for name in run.settings if len(values_of(scored, name)) > 1}
    odd = [name.upper() for name in sorted(odd - HARMLESS)]
    # As `summarize` has it.
    for part, words in ("validation", "validation text"), ("environment", "script or environment"):
        if any(run.part(part) != scored[0].part(part) for run in scored):
            odd.append(words)
    if len({run.stages[-1]["name"] for run in scored}) > 1:
        odd.append("their last stage")
    why = f"the runs differ in {', '.join(odd)}" if odd else ""
    if len(values_of(scored, "seed")) < len(scored):
        why = why or "runs have the same seed"
    if why:
        return shown + tag("p", escaped(f"No mean: {why}."))
    values = [run.stages[-1]["val_bpb"] for run in scored]
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    words = f"Mean of {len(values)} runs: {mean:.6f} bits a byte"
    words += f", standard deviation {deviation:.6f}."
    return shown + tag("p", words)


# Settings in which the runs of a mean may differ.
HARMLESS = {"seed", "run_id", "log_dir", "artifact_path", "data_path", "tokenizer_path", "device"}
HARMLESS |= {"log_every", "replace", "verify_enabled", "verify_tokens", "trace_tokens"}


def values_of(runs, name):
    """Return the set of a setting's values, as text, in some runs."""
    return {str(run.settings.get(name, "")) for run in runs}


def settings_table(runs):
    """Return all settings, "" if there are none.

    Those in which the runs differ come first and are marked.
    """
    names = sorted({name for run in runs for name in run.settings})
    if not names:
        return ""
    values = {name: [str(run.settings.get(name, "")) for run in runs] for name in names}
    names.sort(key=lambda name: len(values_of(runs, name)) == 1)
    rows = [
        (name.upper() + " (differs)" * (len(set(values[name])) > 1), *values[name])
        for name in names
    ]
    shown = table(("setting", *(run.name for run in runs)), rows, "Settings")
    summary = f"All {len(names)}" + ", those that differ first" * (len(runs) > 1)
    return tag("details", tag("summary", summary), shown)


SCORE = (
    "Bits a byte (BPB) is the score: the length of a code for the validation text, from which it "
    "can be decoded, in bits for each of its bytes. Lower is better."
)
LEADS = {"Training": tag("p", "Losses are in nats a token; a nat is 1.44 bits.")}
STAGES = {
    "pre_quant": "the weights as trained, in windows that do not overlap",
    "round_trip": "the same windows with the compressed weights, as in all later stages",
    "sliding": "each token with nearly a full window before it",
    "ttt": "the same, while the model goes on learning from what has been scored",
    "mixer": "the same, re-weighted by what followed the same words earlier in the text",
    "unguarded": "the mixer without its guard against text that misleads it",
}


def stages_list(runs):
    """Return what the stages of some runs are, as a list."""
    names = dict.fromkeys(stage["name"] for run in runs for stage in run.stages)
    names |= dict.fromkeys(name for run in runs if run.trace for name in run.trace.bits)
    known = [(name, STAGES[name]) for name in names if name in STAGES]
    items = (tag("li", tag("b", name), f": {words}") for name, words in known)
    return tag("ul", *items, class_="stages") if known else ""


def notes_list(runs):
    """Return what is missing in some runs, a list; each note once, with all that it is about."""
    named = {note: [] for run in runs for note in run.notes}
    for note, names in named.items():
        names += [run.name for run in runs if note in run.notes]
    notes = (escaped(f"{', '.join(names)}: {note}") for note, names in named.items())
    notes = [tag("li", re.sub(r"`(.*?)`", r"<code>\1</code>", note)) for note in notes]
    return tag("ul", *notes, class_="notes") if notes else ""


def page(runs):
    """Return the whole page of some runs."""
    tell_apart(runs)
    chapters = {
        "Result": [
            *stage_charts(runs),
            *map(stream_chart, runs),
            proof_chart(runs),
        ],
        "Training": training_charts(runs),
        "Budget": [
            seconds_chart(runs),
            bytes_chart(runs),
            *map(parts_chart, runs),
        ],
    }
    sections = {"Runs": tag("p", SCORE) + overview(runs) + notes_list(runs)}
    for title, charts in chapters.items():
        figures = [chart.element() for chart in charts if chart]
        if figures:
            sections[title] = LEADS.get(title, "") + tag("div", *figures, class_="charts")
    if "Result" in sections:
        sections["Result"] = stages_list(runs) + sections["Result"]
    sections["Settings"] = settings_table(runs)
    links = []
    body = []
    for title, contents in sections.items():
        if contents:
            links.append(tag("a", title, href=f"#{title.lower()}"))
            heading = tag("h2", title, id=title.lower())
            body.append(tag("section", heading, contents))
    traced = [run for run in runs if run.trace]
    if traced:
        links.append(tag("a", "Text", href="#text-title"))
        body.append(text_section(traced[0]))
    title = escaped("Report of " + ", ".join(run.name for run in runs))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>{tag('nav', *links)}</header>\n"
        f"<main>{''.join(body)}</main>\n</body>\n</html>\n"
    )


CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --ink: #1b1f24; --soft: #57606a; --grid: #8c959f; --panel: #f6f8fa;
  --s0: #1f6fb2; --s1: #b35c00; --s2: #11765a; --s3: #9c3d82;
  --up: #b35c00; --down: #1f6fb2; --base: #7d8590; --focus: #0550ae;
  --b0: #ffffff; --b1: #e3eef9; --b2: #c6ddf3; --b3: #a3c9ec; --b4: #80b4e4; --b5: #5f9fdb;
  --line: #1f5f9e; --loss: #f3c79a; --gain: #b5d4f1; --edge: #8a4500;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --ink: #eceff2; --soft: #a9b2bc; --grid: #6b747e; --panel: #1d2126;
    --s0: #63aef0; --s1: #eda24a; --s2: #4fc79d; --s3: #e08cc6;
    --up: #eda24a; --down: #63aef0; --base: #808a95; --focus: #8cc4ff;
    --b0: #14171b; --b1: #16263a; --b2: #18365a; --b3: #1a477a; --b4: #1b579a; --b5: #1c66b6;
    --line: #8cc4ff; --loss: #6e3f0c; --gain: #1a4a7c; --edge: #ffc184;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
header, main { max-width: 84rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: clamp(1.1rem, 5vw, 1.4rem); line-height: 1.25; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
a { color: var(--focus); padding: .3rem 0; }
code { overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
/* A shade at the side where more can be scrolled to: covers that scroll along hide it. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--ground) 40%, transparent) 0 / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--ground) 40%, transparent) 100% / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--grid), transparent) 0 / .6rem 100% no-repeat scroll,
  linear-gradient(to left, var(--grid), transparent) 100% / .6rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
td { min-width: 5rem; }
thead th { color: var(--soft); font-weight: 600; }
thead th { overflow-wrap: anywhere; }
tbody th { font-weight: 600; }
.notes { padding: .6rem .6rem .6rem 1.8rem; background: var(--panel);
  border-left: .3rem solid var(--s1); }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; font-weight: 700; overflow-wrap: anywhere; }
figure p { font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; margin: .2rem 0 0; }
.stages { font-size: .9rem; padding-left: 1.1rem; margin: 0 0 1rem; }
summary { cursor: pointer; font-size: .9rem; }
details .scroll { max-height: 20rem; overflow: auto; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 1px; }
.modes { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.modes legend { font-weight: 600; padding: 0; }
.legend { list-style: none; margin: .5rem 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .3rem .8rem; }
.legend[hidden] { display: none; }
.legend span { padding: 0 .3rem; }
.reader { display: grid; gap: 1rem; }
#text { background: var(--ground); line-height: 1.9; overflow-wrap: anywhere; min-width: 0;
  max-width: 46rem; }
#text p { white-space: pre-wrap; margin: 0 0 1rem; padding: .4rem 0;
  border-top: 1px solid var(--grid); }
#text span { unicode-bidi: isolate; cursor: pointer; box-shadow: inset -1px 0 var(--ground);
  scroll-margin: 1rem 0 47vh; }
.b0 { background: var(--b0); border-bottom: 1px dotted var(--line); }
.b1 { background: var(--b1); border-bottom: 1px solid var(--line); }
.b2 { background: var(--b2); border-bottom: 2px solid var(--line); }
.b3 { background: var(--b3); border-bottom: 3px solid var(--line); }
.b4 { background: var(--b4); border-bottom: 4px solid var(--line); }
.b5 { background: var(--b5); border-bottom: 5px solid var(--line); }
.g1 { border-bottom: 1px solid var(--line); }
.g2 { background: var(--gain); border-bottom: 3px solid var(--line); }
.g3 { background: var(--gain); border-bottom: 5px solid var(--line); }
.l1 { border-bottom: 1px dashed var(--edge); }
.l2 { background: var(--loss); border-bottom: 3px dashed var(--edge); }
.l3 { background: var(--loss); border-bottom: 5px dashed var(--edge); }
#text .here { outline: 3px solid var(--focus); outline-offset: 0; }
#detail { background: var(--panel); border: 1px solid var(--grid); border-radius: .4rem;
  padding: .6rem .8rem; font-size: .9rem; position: sticky; bottom: 0; max-height: 45vh;
  overflow: auto; align-self: end; }
#detail h3 { margin: 0 0 .3rem; font-size: 1rem; overflow-wrap: anywhere; }
#detail h4 { margin: .6rem 0 .2rem; font-size: .9rem; }
#detail ul { margin: 0; padding-left: 1.1rem; }
#detail .scores { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; }
#detail code { background: var(--ground); padding: 0 .2rem; unicode-bidi: isolate; }
#detail tbody th { font-weight: 400; }
#detail .came, #detail .came th { font-weight: 700; }
@media (min-width: 62rem) {
  #text span { scroll-margin-bottom: 1rem; }
  .reader { grid-template-columns: minmax(0, 1fr) 24rem; }
  #detail { top: 1rem; bottom: auto; max-height: calc(100vh - 2rem); align-self: start; }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; }
  header, main { max-width: none; padding: 0; }
  .charts { grid-template-columns: 1fr 1fr; }
  figure, tr { break-inside: avoid; }
  h2, h2 + p, figcaption { break-after: avoid; }
  .reader { display: block; }  /* columns in a grid would shrink the whole print */
  .scroll { overflow: visible; }
  table, figcaption, figure p, .stages { font-size: 8pt; }
  #detail, .modes, .how, nav, details, section:has(#settings) { display: none; }
  #text { font-size: 7pt; line-height: 1.6; max-width: none; columns: 2; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = r"""
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = document.getElementById("text");
  const detail = document.getElementById("detail");
  const numbers = (coded, Kind) =>
    new Kind(Uint8Array.from(atob(coded), (c) => c.charCodeAt(0)).buffer);
  const tokens = numbers(data.tokens, Uint16Array);
  const bits = data.bits.map((coded) => numbers(coded, Uint16Array));
  const tops = data.tops.map((top) => ({
    stage: top.stage,
    tokens: numbers(top.tokens, Uint16Array),
    bits: numbers(top.bits, Uint16Array),
  }));
  const counts = data.counts ? numbers(data.counts, Uint16Array) : null;
  const spans = Array.from(text.querySelectorAll("span"));
  const place = new Map(spans.map((span, i) => [span, i]));
  const STEPS = 2500;
  const neural = bits[data.stages.indexOf(tops[0].stage)];
  const last = bits[data.stages.indexOf(tops[tops.length - 1].stage)];

  const make = (name, content, kind) => {
    const element = document.createElement(name);
    if (kind) element.className = kind;
    for (const part of [content].flat()) element.append(part);
    return element;
  };
  const percent = (steps) => {
    const p = 100 * 2 ** (-steps / STEPS);
    return p >= 10 ? p.toFixed(1) + " %" : p >= 0.01 ? p.toPrecision(2) + " %" : "< 0.01 %";
  };
  const inBits = (steps) => (steps / STEPS).toFixed(2) + " bits";
  const piece = (token) => make("code", data.pieces[token]);
  const row = (kind, ...cells) =>
    make("tr", cells.map((cell, i) => {
      const element = make(i || kind === "head" ? (kind === "head" ? "th" : "td") : "th", cell);
      if (kind === "head") element.scope = "col";
      else if (!i) element.scope = "row";
      return element;
    }), kind === "came" ? "came" : "");

  // The likeliest tokens of both stages, and what each stage gave them: [token, bits, bits].
  // Where a stage does not list a token, its bits are more than those of the stage's last one.
  const candidates = (i) => {
    const found = new Map();
    tops.forEach((top, k) => {
      for (let j = 8 * i; j < 8 * i + 8; j++) {
        const entry = found.get(top.tokens[j]) || tops.map(() => null);
        entry[k] = top.bits[j];
        found.set(top.tokens[j], entry);
      }
    });
    const came = tokens[i + 1];
    found.set(came, tops.length > 1 ? [neural[i], last[i]] : [last[i]]);
    const order = tops.length - 1;
    return [...found].sort((a, b) => (a[1][order] ?? 99e3) - (b[1][order] ?? 99e3));
  };

  // The context of a kind that ends at token `end`, newest first; the word ends where it began.
  const context = (kind, end) => {
    const found = [];
    for (let back = 0; back < data.lengths[kind] && end - back >= 0; back++) {
      found.push(tokens[end - back]);
      if (kind === data.lengths.length - 1 && data.begins[tokens[end - back]] === "1") break;
    }
    return found;
  };
  // What followed the last occurrences of that context: {token: times}.
  const followers = (kind, end, count) => {
    const wanted = context(kind, end).join();
    const found = new Map();
    for (let at = end - 1; at >= 0 && count > 0; at--) {
      if (tokens[at] !== tokens[end] || context(kind, at).join() !== wanted) continue;
      found.set(tokens[at + 1], (found.get(tokens[at + 1]) || 0) + 1);
      count--;
    }
    return found;
  };

  const show = (i) => {
    const came = tokens[i + 1];
    const parts = [make("h3", ["Token ", String(i + 1), ": ", piece(came)])];
    const scores = data.stages.map((stage, k) => make("li",
      [stage, " ", make("b", inBits(bits[k][i])), " ", percent(bits[k][i])]));
    parts.push(make("ul", scores, "scores"));
    const list = make("table", [make("caption", "Likeliest tokens, and the one that came (bold)")]);
    list.append(make("thead", row("head", "token", ...tops.map((top, k) =>
      top.stage + (tops.length > 1 ? (k ? " (after)" : " (before)") : "")))));
    const share = (b, k) => b === null ? "under " + percent(tops[k].bits[8 * i + 7]) : percent(b);
    list.append(make("tbody", candidates(i).map(([token, given]) =>
      row(token === came ? "came" : "", [piece(token), token === came ? " came" : ""],
        ...given.map(share)))));
    parts.push(list);
    if (counts) {
      parts.push(make("h4", "Contexts that occurred before"));
      const spoken = data.contexts.map((words, kind) => {
        const count = counts[6 * i + kind];
        if (!count) return null;
        const item = [words, " "];
        for (const token of context(kind, i).reverse()) item.push(piece(token));
        item.push(`: ${count} time${count > 1 ? "s" : ""}, then `);
        let first = true;
        for (const [token, times] of followers(kind, i, count)) {
          item.push(first ? "" : ", ", piece(token), times > 1 ? ` \u00d7${times}` : "");
          first = false;
        }
        return make("li", item);
      }).filter(Boolean);
      parts.push(spoken.length ? make("ul", spoken) : make("p", "None."));
    }
    detail.replaceChildren(...parts);
  };

  let current = spans[0];
  const choose = (span) => {
    current.classList.remove("here");
    current.removeAttribute("aria-describedby");
    current.tabIndex = -1;
    current = span;
    current.tabIndex = 0;
    current.classList.add("here");
    show(place.get(span));
  };
  // Not of a finger: the panel would come up under it and take the tap.
  text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch" || !place.has(event.target)) return;
    if (!text.contains(document.activeElement)) choose(event.target);
  });
  text.addEventListener("focusin", (event) => {
    if (!place.has(event.target)) return;
    choose(event.target);
    event.target.setAttribute("aria-describedby", "detail");
    event.target.scrollIntoView({block: "nearest"});  // from below the panel, say
  });
  text.addEventListener("click", (event) => {
    if (place.has(event.target)) event.target.focus();
  });
  // The token of the line above or below that is nearest to this one.
  const beside = (way) => {
    const from = current.getBoundingClientRect();
    let best = current;
    let i = place.get(current);
    let top = null;
    for (i += way; i >= 0 && i < spans.length; i += way) {
      const box = spans[i].getBoundingClientRect();
      if (Math.abs(box.bottom - from.bottom) < 5) continue;
      if (top !== null && Math.abs(box.bottom - top) > 5) break;
      const nearer = Math.abs(box.left - from.left) <
        Math.abs(best.getBoundingClientRect().left - from.left);
      if (top === null || nearer) best = spans[i];
      top = box.bottom;
    }
    return best;
  };
  text.addEventListener("keydown", (event) => {
    const i = place.get(current);
    const moves = {
      ArrowRight: () => spans[Math.min(i + 1, spans.length - 1)],
      ArrowLeft: () => spans[Math.max(i - 1, 0)],
      ArrowDown: () => beside(1),
      ArrowUp: () => beside(-1),
      Home: () => spans[0],
      End: () => spans[spans.length - 1],
      Escape: () => { current.blur(); return null; },
    };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = moves[event.key]();
    if (next) next.focus();
  });

  const shade = (steps) => data.edges.filter((edge) => steps / STEPS >= edge).length;
  const change = (saved) => {
    const size = Math.abs(saved) / STEPS;
    const level = size < 0.1 ? 0 : size < 1 ? 1 : size < 4 ? 2 : 3;
    return level ? (saved > 0 ? "g" : "l") + level : "";
  };
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => {
      const mode = radio.value;
      spans.forEach((span, i) => {
        const own = mode === "change" ? change(neural[i] - last[i])
          : "b" + shade(mode === "last" ? last[i] : neural[i]);
        span.className = own + (span === current && span.classList.contains("here") ? " here" : "");
      });
      document.getElementById("legend-bits").hidden = mode === "change";
      const legend = document.getElementById("legend-change");
      if (legend) legend.hidden = mode !== "change";
    });
  }
})();
"""


# ---- Command line --------------------------------------------------------------------------------


def write(path, data):
    """Write bytes to a file and say so; ReportError if that cannot be."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ReportError(f"cannot write {path} ({error.strerror})") from error
    print(f"{path}: {len(data):,} bytes")


def read_rule(path):
    """Return (name, bits a byte) of another mixer from its results.json, or a folder with one."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_bytes())
        return f"MIXER={results['settings']['mixer']}", float(results["val_bpb"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ReportError(f"--rule {path}: no finished run's results.json ({error})") from error


NEEDED_OF_LINE = ("bytes", "kl")  # above 0: the axes are logarithmic
NEEDED_OF_CAP = ("limit_bytes", "code_bytes")


def read_quantizers(path):
    """Return (models, caps) of a JSON file of compare_quantizers.py; ReportError if it is none."""
    try:
        contents = json.loads(path.read_bytes())
        models, caps = contents["models"], contents["caps"]
        lines = [row for model in models for row in model["lines"]]
        for names, entries in ((NEEDED_OF_LINE, lines), (NEEDED_OF_CAP, caps)):
            for entry in entries:
                if not all(0 < entry[name] < math.inf for name in names):
                    raise ValueError(f"{', '.join(names)}: a number is not above 0, or not finite")
                if entry["quantizer"] not in QUANTIZERS:
                    raise ValueError(f"quantizer {entry['quantizer']}")
        if any(cap["limit_bytes"] <= cap["code_bytes"] for cap in caps):
            raise ValueError("a cap that leaves nothing")
        if not lines or not all(isinstance(model["name"], str) for model in models):
            raise ValueError("no lines, or a model without a name")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ReportError(
            f"--quantizers {path}: not what compare_quantizers.py writes ({error})"
        ) from error
    return models, caps


def write_figures(runs, folder, rule, quantizers):
    """Write the figures that README and notebook show, as far as there are data.

    stages.svg and proof.svg of runs; quantizers.svg of what read_quantizers returned, or None.
    """
    tell_apart(runs)
    charts = {"stages.svg": seeds_chart(runs, rule), "proof.svg": proof_chart(runs)}
    if quantizers:
        charts["quantizers.svg"] = quantizers_chart(*quantizers)
    if not any(charts.values()):
        raise ReportError("these runs have neither stages nor proofs to draw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"--figures {folder}: no folder ({error.strerror})") from error
    for name, chart in charts.items():
        if chart:
            write(folder / name, chart.file())


def main(args=None):
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="*", metavar="RUN_DIR", help="folder of a run, eval or verify"
    )
    parser.add_argument(
        "--out", type=Path, help="the page (default: report.html in the first RUN_DIR)"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="write stages.svg and proof.svg"
    )
    parser.add_argument(
        "--quantizers",
        type=Path,
        metavar="JSON",
        help="--figures: what compare_quantizers.py measured, drawn as quantizers.svg",
    )
    parser.add_argument(
        "--rule",
        metavar="RESULTS",
        help="--figures: results.json of another mixer, drawn as a line",
    )
    given = parser.parse_args(args)
    for name in ("quantizers", "rule"):
        if getattr(given, name) and not given.figures:
            parser.error(f"--{name} takes --figures")
    if not given.runs and (given.out or not given.quantizers):
        parser.error("RUN_DIR is missing: the folder of a run")
    try:
        runs = [read_run(folder) for folder in given.runs]
        if given.figures:
            rule = given.rule and read_rule(given.rule)
            quantizers = given.quantizers and read_quantizers(given.quantizers)
            write_figures(runs, given.figures, rule, quantizers)
        if given.out or not given.figures:
            out = given.out or runs[0].folder / "report.html"
            write(out, page(runs).encode("utf-8", "replace"))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
