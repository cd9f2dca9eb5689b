"""Shared by all tests: tiny models, texts and runs, small helpers, code on gloo ranks."""

import codecs
import collections
import contextlib
import functools
import importlib
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

# Two ranks on two cores: threads that spin would starve each other. torch reads it when imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import zstandard  # noqa: E402

import train_gpt  # noqa: E402

VOCAB = 64
FINEST, _, COARSEST = train_gpt.COARSENESS["int6"]
HERE = train_gpt.Runtime()  # one rank, CPU, float32
train_gpt.TestTimeTrainer.__test__ = False  # not a test, in spite of its name


def pytest_configure(config):
    """Register the marker of tests that take more than about three seconds."""
    config.addinivalue_line("markers", "slow: demo, two ranks, whole commands")


@pytest.fixture(scope="module")
def one_thread():
    """Compute on one thread: tiny matrices gain nothing from two, and ranks compute on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refusal(action, *args, kind=train_gpt.UserError, **how):
    """Return the one-line message with which action(*args) refuses; any other outcome fails."""
    with pytest.raises(kind) as caught:
        action(*args, **how)
    assert caught.type is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quiet(line=""):
    """Take a log line and show nothing."""


def weights_of(model):
    """Return a copy of the parameters, {name: tensor}."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    """Return whether two dictionaries of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- A tiny model, tokenizer and text ------------------------------------------------------------


def tiny_config(**changes):
    """Return a Config small enough for every test, with all mechanisms on.

    W 32, S 8, runs of 16, chunks of 64, four layers of width 32.
    """
    settings = dict(
        preset="bench",
        vocab_size=VOCAB,
        num_layers=4,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=8,
        xsa_last_n=2,
        bigram_vocab_size=32,
        bigram_dim=8,
        ve_layers="2,3",
        train_seq_len=32,
        eval_seq_len=32,
        eval_stride=8,
        eval_run_tiles=2,
        ttt_chunk_tokens=64,
        ttt_schedule_chunks=8,
        ttt_freeze_blocks=2,
        ttt_epochs=2,
        ttt_lr=1e-3,
        polyak_decay=0.5,
        ngram_order=5,
        ngram_recent=4,
        min_count=2,
        train_batch_tokens=128,
        micro_batch_tokens=64,
        iterations=6,
        warmdown_iters=3,
        warmup_steps=0,
        max_wallclock_seconds=0.0,
        log_every=2,
        quantizer="int6",
        val_tokens=0,
        size_limit_bytes=1_000_000,
        mixer="entropy",
        mixer_block=8,
        mixer_calibration_tokens=0,
        ngram_hash_bits=18,
        alpha_base=0.0,
        alpha_range=0.3,
        alpha_center=3.0,
    )
    return train_gpt.Config(**{**settings, **changes})


def tiny_table():
    """Return a TokenTable of 64 pieces: specials, three bytes, words with and without a space."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>"]
    pieces += [
        train_gpt.SPACE + w if i % 2 else w
        for i, w in enumerate(f"w{j}" for j in range(VOCAB - len(pieces)))
    ]
    return train_gpt.TokenTable(tuple(pieces), "UCCBBB" + "N" * (VOCAB - 6), 1)


def unpacked(data, name="artifact"):
    """Return the Artifact in these bytes, read from a file of that name in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return train_gpt.read_artifact(path)


def tiny_stream(n, seed=0):
    """Return n int64 tokens: BOS, then a text whose repetitions make n-grams matter."""
    random = np.random.default_rng(seed)
    phrase = random.integers(6, VOCAB, 23)
    tokens = random.integers(6, VOCAB, n)
    for start in range(0, n - 12, 17):
        length = int(random.integers(3, 12))
        at = int(random.integers(0, len(phrase) - length))
        tokens[start : start + length] = phrase[at : at + length]
    tokens[0] = 1
    return tokens


def warm_model(cfg, seed=0, dtype=torch.float32):
    """Return a GPT with every parameter random, so that nothing is hidden behind a zero.

    Its parameters have the same values in float32 and float64.
    """
    torch.manual_seed(seed)
    model = train_gpt.GPT(cfg, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(torch.promote_types(dtype, torch.float32))


def lone_attention(cfg, layer):
    """Return a float64 model that shows which tokens a row sees: one layer attends.

    Nothing else of a row depends on its neighbours.
    """
    model = warm_model(cfg, dtype=torch.float64)
    with torch.no_grad():
        model.embed.smear.fill_(-1e4)
        model.embed.bigram_scale.zero_()
        for block in model.blocks:
            if block.layer != layer:
                block.attn_out.zero_()
    return model


def warm_weights(cfg, seed=0):
    """Return what an artifact holds of a warm model and a random mixer, {name: tensor}."""
    weights = warm_model(cfg, seed).state_dict()
    mixer = train_gpt.new_mixer_weights()
    return weights | {"mixer": mixer + torch.randn_like(mixer) * 0.1}


def random_tokens(*shape, seed=0):
    """Return random int64 tokens of this shape."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, shape))


def write_shards(folder, shards, compressed=(), split="train"):
    """Write token arrays as shards 0, 1, ... of `folder`; those in `compressed` as .bin.zst."""
    for number, tokens in enumerate(shards):
        contents, ending = train_gpt.shard_bytes(tokens), ".bin"
        if number in compressed:
            contents, ending = zstandard.compress(contents), ".bin.zst"
        (folder / f"fineweb_{split}_{number:06d}{ending}").write_bytes(contents)


# ---- English, odd texts and a tokenizer of SentencePiece -----------------------------------------

ODD_TEXTS = [
    "  two leading spaces, two trailing  ",
    "tabs\tand\r\nline ends\n\n\n",
    "\ufeffa byte order mark",
    "e\u0301 is not é",
    "family: 👨‍👩‍👧‍👦, flags: 🇫🇷🇯🇵, skin: 👍🏽",
    "a null \0 and controls \x01\x7f\x85\u2028 inside",
    "\n",
    "🙂",
    "x",
    " ",
    "<s> </s> <unk> <0x41> are only text",
    "𐍈𝔘𝕟𝕚 \U0010ffff \ue000 \ufffd \ufffe",
    "Ünïcödé, καλημέρα κόσμε, Привет, мир! 你好\uff0c世界。こんにちは。",
    "नमस्ते مرحبا שלום",
]


@pytest.fixture(scope="session")
def texts():
    """Documents: Python's language reference and poem, short ones of many scripts and oddities."""
    from pydoc_data import topics

    with contextlib.redirect_stdout(None):
        poem = importlib.import_module("this").s
    reference = [text for _, text in sorted(topics.topics.items())]
    return [*reference[:30], codecs.decode(poem, "rot13"), *ODD_TEXTS]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, texts):
    """(path of a SentencePiece model of 400 pieces, its processor, its TokenTable)."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_gpt.train_tokenizer(texts, 400, path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return path, sp, train_gpt.load_tokenizer(path, 400)[0]


# ---- Walks over a stream: windows of 16, tiles of 4, chunks of 32 --------------------------------

TABLE = tiny_table()
BEGINS = np.array(
    [kind in "UCX" or piece[0] == train_gpt.SPACE for piece, kind in zip(TABLE.pieces, TABLE.kinds)]
)
WALK_CFG = tiny_config(
    eval_seq_len=16, eval_stride=4, ttt_chunk_tokens=32, ttt_lr=3e-3, alpha_center=2.0
)
LEARNED_CFG = replace(WALK_CFG, mixer="learned", mixer_block=8, mixer_lr=0.01, ngram_recent=3)
WALK_STREAM = tiny_stream(8 * WALK_CFG.ttt_chunk_tokens)


@pytest.fixture(scope="module")
def few_documents(tmp_path_factory, tokenizer, texts):
    """{DATA_PATH, TOKENIZER_PATH} of the twelve longest texts in shards, two for validation."""
    path, sp, _ = tokenizer
    folder = tmp_path_factory.mktemp("corpus")
    long = sorted(texts, key=len)[-12:]
    tokens = [[sp.bos_id(), *ids] for ids in sp.encode(long)]
    for split, documents in (("val", tokens[:2]), ("train", tokens[2:])):
        shard = train_gpt.shard_bytes([token for ids in documents for token in ids])
        (folder / f"fineweb_{split}_000000.bin").write_bytes(shard)
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(path)}


@functools.cache
def sharp_weights(cfg):
    """Return warm_weights of sharp predictions; shared, so not to be changed."""
    weights = warm_weights(cfg)
    weights["embed.tokens"].mul_(4)
    return weights


def sharp_model(cfg):
    """Return a new model of sharp_weights that computes as what is proved does, in float64."""
    return train_gpt.new_model(cfg, HERE, sharp_weights(cfg), "float64")


def walker(cfg, plan, model=None, rt=HERE):
    """Return a predictor of sharp_weights at a stream's start, with `model` if it is given."""
    with pytest.MonkeyPatch.context() as patch:
        if model:
            patch.setattr(train_gpt, "new_model", lambda *_: model)
        return train_gpt.Predictor(sharp_weights(cfg), TABLE, cfg, rt, plan)


def frequencies(commitment):
    """Return {stage: frequencies (stop - start, V)} of a lone rank; assert their completeness."""
    positions = [t for at, _ in commitment.pieces for t in at.tolist()]
    assert positions == list(range(commitment.start, commitment.stop))
    tables = {stage: commitment.table(stage) for stage in commitment.pieces[0][1]}
    for freqs in tables.values():
        assert freqs.dtype == torch.int32
        assert freqs.shape == (commitment.stop - commitment.start, VOCAB)
        assert freqs.min() >= 1
        assert (freqs.long().sum(1) == 1 << 24).all()
    return tables


def advance(predictor, tokens, stop, step=None):
    """Return {stage: frequencies} up to position stop - 1, `step` at a time, or in blocks.

    As for a decoder: no call is given a token that it must not see.
    """
    stream = torch.from_numpy(tokens)
    parts = []
    while (start := predictor.scored_to) < stop:
        if start == predictor.block_end:
            predictor.update(stream[:start].clone())
        end = min(start + (step or predictor.plan.chunk), predictor.block_end, stop)
        commitment = predictor.predict(stream[: end - 1].clone(), start, end)
        parts.append(frequencies(commitment))
        predictor.score(commitment, stream[start:end])
    return {stage: torch.cat([part[stage] for part in parts]) for stage in predictor.plan.stages}


# ---- Streams that repeat themselves, for the n-gram history --------------------------------------

WORD_BEGINS = np.isin(np.arange(8), (0, 6))  # of the eight tokens in most of these streams


def few_words(n, vocab_size=8, seed=0):
    """Return n tokens of a small vocabulary: some strings again and again, runs of one token."""
    random = np.random.default_rng(seed)
    words = [random.integers(0, vocab_size, random.integers(1, 14)) for _ in range(9)]
    words += [np.full(11, 3), np.full(5, 0), np.tile([1, 2], 6)]
    return np.concatenate([words[i] for i in random.integers(0, len(words), n)])[:n]


def new_history(order, recent, begins=WORD_BEGINS, bits=20):
    """Return an empty history."""
    cfg = tiny_config(ngram_order=order, ngram_recent=recent, min_count=1, ngram_hash_bits=bits)
    return train_gpt.NgramHistory(cfg, begins, "cpu")


# ---- Ranks ---------------------------------------------------------------------------------------


def _rank_main(rank, world, folder, function, args):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    torch.save(function(train_gpt.Runtime(rank=rank, world=world), *args), f"{folder}/out{rank}.pt")
    if world > 1:
        dist.barrier()
        os._exit(0)  # the teardown of a gloo group can abort the process


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """run_ranks(world, function, *args) -> [function(Runtime, *args) of each rank], in processes.

    `function` must be importable (top level of a test module) and return what torch can save.
    """

    def run(world, function, *args):
        folder = tmp_path_factory.mktemp("ranks")
        mp.spawn(_rank_main, (world, str(folder), function, args), nprocs=world)
        return [torch.load(folder / f"out{rank}.pt", weights_only=False) for rank in range(world)]

    return run


# ---- Commands ------------------------------------------------------------------------------------


def clean_environment():
    """Return this process's environment without settings of the program or a process group."""
    ours = {name.upper() for name in train_gpt.FIELDS} | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def no_leftovers(folder):
    """Return whether no temporary file or probe is anywhere under folder."""
    return not [p for p in folder.rglob("*") if ".tmp" in p.name or p.name == ".probe"]


def error_line(result, status):
    """Return the one-line message on stderr of a command that failed with `status`."""
    found, stderr = result
    assert found == status
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    return stderr[7:-1]


@pytest.fixture
def command_line(tmp_path, monkeypatch, capfd):
    """command_line(*args, **settings) -> (exit status, stderr) of a command, in this process.

    It runs in tmp_path, on the CPU, and logs there; a setting None is left out. Afterwards nothing
    half-written may be anywhere.
    """
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)

    def run(*args, **settings):
        environ = clean_environment() | {"DEVICE": "cpu", "LOG_DIR": str(tmp_path / "logs")}
        environ |= settings
        given = {name: value for name, value in environ.items() if value is not None}
        monkeypatch.setattr(os, "environ", given)
        monkeypatch.setattr(sys, "argv", [train_gpt.__file__, *map(str, args)])
        capfd.readouterr()
        status = train_gpt.main()
        return status, capfd.readouterr().err

    yield run
    torch.set_num_threads(threads)
    assert no_leftovers(tmp_path)


class Terminal:
    """A pseudo-terminal: `file` is written to; rows() are what a reader then sees of it."""

    def __init__(self, columns):
        self.columns = columns
        self.output = b""
        self.master, slave = pty.openpty()
        self.file = open(slave, "w", encoding="utf-8")  # noqa: SIM115 (rows() closes it)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        """Take what is written, until the file is closed."""
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 4096):
                self.output += data

    def rows(self):
        """Close the file; return the rows of the screen, as it obeys control characters."""
        self.file.close()
        self.reader.join()
        os.close(self.master)
        rows = [[]]
        column = 0
        for part in re.findall(r"(?s)\x1b\[K|[^\x1b]", self.output.decode()):
            if part == "\r":
                column = 0
            elif part == "\x1b[K":
                del rows[-1][column:]
            elif part == "\n" or column == self.columns:
                rows.append([])
                column = 0
            if part.isprintable():
                rows[-1][column : column + 1] = part
                column += 1
        return ["".join(row) for row in rows]


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal(columns) -> a new Terminal, which then is stdout and stderr."""

    def opened(columns=200):
        terminal = Terminal(columns)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", terminal.file)
        monkeypatch.setattr(sys, "stderr", terminal.file)
        return terminal

    return opened


# ---- Code files ----------------------------------------------------------------------------------

CODED_TOKENS = 3 * 64 + 20  # three updates of TTT and 26 of the mixer, then half a block
CODED_STREAM = tiny_stream(CODED_TOKENS + 1)
CODED_STREAM[50:52] = 4, 5  # two byte pieces of one letter
CODED_STREAM[70] = 3  # a new line
CODED_STREAM[120] = 1  # a second document
CODER_SETTINGS = {
    "learned": dict(mixer="learned"),
    "entropy": dict(mixer="entropy"),
    "none": dict(mixer="none"),
    "learned, no ttt": dict(mixer="learned", ttt_enabled=False),
    "none, no ttt": dict(mixer="none", ttt_enabled=False),
}


@pytest.fixture
def one_core():
    """Let the program compute on one thread, and restore its number of threads afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """artifacts(name, seed=0) -> Config of one of CODER_SETTINGS whose warm artifact is on disk."""
    folder = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def made(name, seed=0):
        path = folder / f"{name}{seed}.lzma"
        cfg = tiny_config(
            **CODER_SETTINGS[name],
            num_layers=2,
            ve_layers="1",
            xsa_last_n=1,
            ttt_freeze_blocks=1,
            mixer_lr=0.01,
            device="cpu",
            artifact_path=str(path),
            run_id="run",
        )
        weights = warm_weights(cfg, seed)
        weights["embed.tokens"] = weights["embed.tokens"] * 4  # sharp predictions
        path.write_bytes(train_gpt.pack_artifact(weights, cfg, tiny_table(), FINEST))
        return cfg

    return made


Coded = collections.namedtuple("Coded", "data bits freqs")
Decoded = collections.namedtuple("Decoded", "tokens freqs text")


class NamingCodec(train_gpt.Codec):
    """A Codec whose results have named parts."""

    def code(self, plan, tokens, coded, decoder=None):
        """Remember what is coded, and where the frequencies are found."""
        self.tokens = tokens
        self.coded = coded
        return super().code(plan, tokens, coded, decoder)

    def encode(self, tokens, lanes=0):
        """Return what the Codec does, as Coded."""
        return Coded(*super().encode(tokens, lanes))

    def decode(self, path):
        """Return the text that the Codec does, and what it was made of, as Decoded."""
        text = super().decode(path)
        freqs = np.array([freq for _, freq in self.coded], np.int64)
        return Decoded(self.tokens, freqs, text)


def codec(cfg):
    """Return the Codec of the artifact at cfg.artifact under cfg."""
    artifact = train_gpt.read_artifact(cfg.artifact)
    return NamingCodec(artifact, cfg, train_gpt.start_runtime(cfg, {}), quiet)


@pytest.fixture(scope="session")
def code_files(artifacts, tmp_path_factory):
    """code_files(name, n) -> cfg, path, tokens, bits and freqs of CODED_STREAM's first n tokens."""
    folder = tmp_path_factory.mktemp("coded")

    @functools.cache
    def made(name, n=CODED_TOKENS):
        path = folder / f"{name}{n}.code"
        cfg = artifacts(name)
        tokens = CODED_STREAM[: n + 1]
        coded = codec(cfg).encode(tokens)
        path.write_bytes(coded.data)
        return SimpleNamespace(
            cfg=cfg, path=path, tokens=tokens, bits=coded.bits, freqs=coded.freqs
        )

    return made


def last_stage_predictor(cfg):
    """Return a last-stage Predictor with the artifact's weights, without the coder's help."""
    artifact = train_gpt.read_artifact(cfg.artifact)
    rt = train_gpt.start_runtime(cfg, {})
    plan = train_gpt.evaluation_plans(cfg)[-1]
    return train_gpt.Predictor(artifact.weights, artifact.table, cfg, rt, plan)


def bits_of(freqs):
    """Return the sum of -log2(freq / 2^24)."""
    return float((24 - np.log2(np.asarray(freqs, dtype=np.float64))).sum())


def assert_size(words, bits):
    """Assert that code words take what was predicted, within 0.01 % and 16 bytes."""
    assert abs(len(words) - bits / 8) <= 1e-4 * bits / 8 + 16


def forget_the_text(path, target):
    """Write the code file at path to target with another text's checksum, all else in order."""
    head, checks, words = train_gpt.CodeHead.unpack(path, path.read_bytes())
    target.write_bytes(head._replace(text=bytes(32)).pack(checks, words))


class Uniform:
    """A stand-in for Predictor that knows nothing, to code long texts quickly: all V are alike.

    At position `altered` the first token has a unit more, the second one less.
    """

    def __init__(self, V, plan, altered=-1):
        self.plan = plan._replace(block=1 << 16)
        self.lanes = plan.lanes
        self.scored_to = self.lanes
        self.block_end = self.lanes + self.plan.block
        self.altered = altered
        self.bits = dict.fromkeys(plan.stages, 0.0)
        self.freqs = torch.full((1, V), train_gpt.TOTAL // V, dtype=torch.int32)
        self.freqs[0, 0] += train_gpt.TOTAL - self.freqs.sum().item()

    def predict(self, prefix, start, stop):
        """Commit the same for every position."""
        positions = torch.arange(start, stop)
        freqs = self.freqs.repeat(len(positions), 1)
        altered = (positions == self.altered).int()
        freqs[:, 0] += altered
        freqs[:, 1] -= altered
        pieces = [(positions, dict.fromkeys(self.plan.stages, freqs))]
        return train_gpt.Commitment(start, stop, pieces)

    def score(self, commitment, targets):
        """Count the bits of the same frequencies."""
        bits = (24 - self.freqs[0][targets].double().log2()).sum().item()
        self.bits = {stage: before + bits for stage, before in self.bits.items()}

    def update(self, prefix):
        """Move on."""
        self.block_end += self.plan.block


# Without AVX, with MKL's and oneDNN's slowest kernels; first on one thread, then on two.
PLAIN_MACHINE = dict(
    DEVICE="cpu",
    ATEN_CPU_CAPABILITY="default",
    MKL_CBWR="COMPATIBLE",
    ONEDNN_MAX_CPU_ISA="SSE41",
)
DECOMPRESS_THERE = """
import os, sys
import torch
import train_gpt
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
set_threads = torch.set_num_threads
torch.set_num_threads = lambda number: None  # a decoder would choose one
for threads in (1, 2):
    set_threads(threads)
    for path in sys.argv[1:]:
        train_gpt.dispatch(["decompress", path, f"{path}.{threads}"], os.environ)
        assert torch.get_num_threads() == threads
"""


def decompress_on_plain_machine(artifact_path, *paths):
    """Decode code files in a process without this machine's vector units.

    Return {(path, threads): the text's bytes}; the checks in the files cover all frequencies.
    """
    env = clean_environment() | PLAIN_MACHINE | {"ARTIFACT_PATH": artifact_path}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", DECOMPRESS_THERE, *map(str, paths)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {(p, threads): Path(f"{p}.{threads}").read_bytes() for p in paths for threads in (1, 2)}


@pytest.fixture(autouse=True)
def signals_as_before():
    """Let no signal be ignored, as under nohup; take back the program's handlers afterwards."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, default) for number, default in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
