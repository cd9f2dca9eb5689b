"""Proof: what a run reports is decoded by another process, and whoever looked ahead is caught."""

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CODED_STREAM,
    CODED_TOKENS,
    TABLE,
    assert_size,
    bits_of,
    codec,
    decompress_on_plain_machine,
    forget_the_text,
    last_stage_predictor,
    quiet,
    refusal,
)

import train_gpt
from train_gpt import CODE_HEAD_BYTES, Engine, Mixture, Predictor, commit, shares, verify

THREADS = torch.get_num_threads()
HEAD_BYTES = CODE_HEAD_BYTES

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def real_process(one_core):
    """For a decoder that is a process of its own: this one has as many threads as that one."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def proving(tmp_path):
    """proving(cfg, tokens, **changes) -> (Run, Artifact) for verify; it logs in tmp_path."""

    def made(cfg, tokens=CODED_STREAM, **changes):
        cfg = replace(cfg, log_dir=str(tmp_path / "logs"), **changes)
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        artifact = train_gpt.read_artifact(cfg.artifact)
        rt = train_gpt.start_runtime(cfg, {})
        run = train_gpt.Run(cfg, rt, "verify")
        run.table = TABLE
        run.tokens = tokens
        run.results["validation"] = train_gpt.audit_bytes(TABLE, tokens)
        return run, artifact

    return made


@pytest.fixture
def here(monkeypatch):
    """here(before, after) -> [(command, environment)] of decoders, which then run in this process.

    before(command) and after(command) are called around each of them.
    """

    def run(before=lambda command: None, after=lambda command: None):
        calls = []

        def decoder(command, env, **how):
            calls.append((command, env))
            before(command)
            with (
                monkeypatch.context() as patch,
                contextlib.redirect_stderr(io.StringIO()) as stderr,
            ):
                patch.setattr(os, "environ", env)
                patch.setattr(sys, "argv", command[1:])
                status = train_gpt.main()
            after(command)
            return subprocess.CompletedProcess(command, status, stderr=stderr.getvalue())

        replace_run(monkeypatch, decoder)
        return calls

    return run


def replace_run(monkeypatch, run):
    """Let the program start other processes by `run`."""
    stand_in = SimpleNamespace(**{**vars(subprocess), "run": run})
    monkeypatch.setattr(train_gpt, "subprocess", stand_in)


def assert_nothing_proved(run):
    """Neither the report nor a file says that anything was proved."""
    assert "proof" not in run.results
    assert not (run.cfg.run_dir / "results.json").exists()


def numbers_of(error):
    """All whole numbers in an error."""
    return [int(number) for number in re.findall(r"\d+", error)]


# ---- What a proof says ---------------------------------------------------------------------------


def test_proof_has_tokens_bits_and_bytes(code_files, proving, here):
    """As results.json has them."""
    file = code_files("entropy", 40)
    here()
    run, artifact = proving(file.cfg, verify_tokens=30)
    verify(run, artifact)
    proof = json.loads((run.cfg.run_dir / "results.json").read_text())["proof"]
    assert proof == run.results["proof"]
    assert proof["tokens"] == 30
    assert proof["predicted_bits"] == pytest.approx(bits_of(file.freqs[:30]), abs=30 / 2**31)
    (path,) = run.cfg.run_dir.glob("*.code")
    assert proof["bytes_on_disk"] == path.stat().st_size - HEAD_BYTES
    assert proof["encode_seconds"] > 0
    assert proof["decode_seconds"] > 0


def proof_told(run, artifact, **how):
    """Return (results.json's proof, words of its row of the table, the sentence below it)."""
    verify(run, artifact, **how)
    run.log_table()
    *_, row, sentence = (run.cfg.run_dir / "verify.log").read_text().splitlines()
    return run.results["proof"], row.split(), sentence


def test_proof_is_a_row_of_the_table(code_files, proving, here):
    """Bits per byte of what was decoded, tokens, seconds."""
    here()
    proof, row, _ = proof_told(*proving(code_files("entropy", 40).cfg, verify_tokens=30))
    text = TABLE.decode(CODED_STREAM[:31])
    seconds = proof["encode_seconds"] + proof["decode_seconds"]
    assert row[:3] == ["proof", f"{8 * proof['bytes_on_disk'] / len(text):.6f}", "30"]
    assert float(row[3]) == pytest.approx(seconds, abs=0.2)


def test_proof_is_told_in_words(code_files, proving, here):
    """What was decoded, from how many bytes, and how many were predicted."""
    here()
    proof, _, sentence = proof_told(*proving(code_files("entropy", 40).cfg, verify_tokens=30))
    text = TABLE.decode(CODED_STREAM[:31])
    assert sentence.startswith(f"proof: another process decoded 30 tokens, {len(text)} B of text,")
    assert f" and {proof['bytes_on_disk']} B; " in sentence
    assert f"predicted: {proof['predicted_bits'] / 8:.1f} B" in sentence


def test_row_of_a_proof_stands_in_the_columns_of_the_stages(code_files, proving, here):
    """Below theirs."""
    here()
    run, artifact = proving(code_files("entropy", 40).cfg, verify_tokens=30)
    run.add_stages([dict(name="mixer", val_loss=1.5, val_bpb=1.25, tokens=30, seconds=1.5)])
    verify(run, artifact)
    _, stage, proof, _ = run.rows
    ends = [[word.end() for word in re.finditer(r"\S+", row)] for row in (stage, proof)]
    assert len(stage) == len(proof)
    assert ends[0][1] == ends[1][1]
    assert ends[0][4:] == ends[1][2:]


def test_proof_of_a_text_that_prints_nothing(code_files, proving, here):
    """It has no bytes by which bits could be divided."""
    here()
    cfg = code_files("entropy", 40).cfg
    stream = torch.tensor([TABLE.bos_id, TABLE.bos_id]).numpy()
    proof, row, _ = proof_told(*proving(cfg, stream, verify_tokens=0))
    assert row[1] == f"{8 * proof['bytes_on_disk']:.6f}"


def test_proof_is_of_no_more_tokens_than_there_are(code_files, proving, here):
    """VERIFY_TOKENS may be more than the stream has."""
    file = code_files("entropy", 40)
    here()
    run, artifact = proving(file.cfg, file.tokens, verify_tokens=1000)
    verify(run, artifact)
    assert run.results["proof"]["tokens"] == 40
    assert run.results["proof"]["predicted_bits"] == file.bits


def test_whole_stream_is_proved(artifacts, proving, here):
    """VERIFY_TOKENS=0: what is reported is the size of a file that was decoded to its end."""
    here()
    run, artifact = proving(artifacts("learned"), verify_tokens=0, trace_tokens=5)
    run.check_size(artifact)
    scored = train_gpt.evaluate_artifact(run, artifact)
    verify(run, artifact, scored)
    proof = run.results["proof"]
    assert proof["tokens"] == CODED_TOKENS
    assert len(scored) == CODED_TOKENS
    assert run.results["val_bpb"] == proof["predicted_bits"] / run.results["validation"]["bytes"]
    assert_size(bytes(proof["bytes_on_disk"]), proof["predicted_bits"])
    assert (run.cfg.run_dir / "proof.txt").read_bytes() == TABLE.decode(CODED_STREAM)


def test_decoder_gets_no_shards_and_no_settings(code_files, proving, here, monkeypatch):
    """It is this script, with nothing but the artifact and the code file."""
    file = code_files("none, no ttt", 40)
    calls = here()
    monkeypatch.setenv("TTT_TEMPERATURE", "0.5")  # of no interest: the artifact has its own
    verify(*proving(file.cfg, verify_tokens=30))
    ((command, env),) = calls
    assert command[:2] == [sys.executable, train_gpt.__file__]
    assert env["DATA_PATH"] == os.devnull
    assert env["TOKENIZER_PATH"] == os.devnull
    assert env["ARTIFACT_PATH"] == file.cfg.artifact_path
    assert "TTT_TEMPERATURE" not in env
    assert env["PATH"] == os.environ["PATH"]


def test_evaluate_keeps_the_first_frequencies(code_files):
    """What verify compares is what was scored, for as many tokens as it will ask for."""
    file = code_files("entropy", 40)
    predictor = last_stage_predictor(file.cfg)
    _, kept = train_gpt.evaluate(predictor, file.tokens, 1, quiet, keep=25)
    assert kept[-1, 0].tolist() == file.freqs[:25].tolist()


def test_proof_of_the_frequencies_that_were_scored(code_files, proving, here):
    """A run's own frequencies are compared."""
    file = code_files("entropy", 40)
    here()
    run, artifact = proving(file.cfg, verify_tokens=30)
    verify(run, artifact, file.freqs[:30])
    assert run.results["proof"]["tokens"] == 30


def test_scored_frequency_that_differs_is_refused(code_files, proving, here):
    """One unit apart, and the proof fails at that position."""
    file = code_files("entropy", 40)
    here()
    scored = file.freqs[:30].copy()
    scored[7] += 1
    run, artifact = proving(file.cfg, verify_tokens=30)
    assert "position 8:" in refusal(verify, run, artifact, scored)
    assert_nothing_proved(run)


def test_proof_asks_nothing_of_other_ranks(code_files, proving, here, monkeypatch):
    """Only rank 0 proves: a sum over ranks inside would meet another one of theirs, or none."""
    here()
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    run.rt.world = 2
    worlds = set()

    def told(self, tensor):
        worlds.add(self.world)
        return tensor

    monkeypatch.setattr(train_gpt.Runtime, "sum_over_ranks", told)
    verify(run, artifact)
    assert worlds == {1}


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 17, 29])
def test_first_scored_frequency_that_differs_is_named(at, code_files, proving, here):
    """The error has its position, the token, and both frequencies."""
    file = code_files("none, no ttt", 40)
    here()
    scored = file.freqs[:30].copy()
    scored[[at, -1]] += 1  # the last one as well, for "first"
    run, artifact = proving(file.cfg, verify_tokens=30)
    numbers = numbers_of(refusal(verify, run, artifact, scored))
    assert numbers == [at + 1, CODED_STREAM[at + 1], file.freqs[at] + 1, file.freqs[at]]
    assert_nothing_proved(run)


def test_text_that_the_decoder_wrote_is_compared(code_files, proving, here):
    """Its status alone proves nothing."""

    def alter(command):
        text = Path(command[-1])
        text.write_bytes(text.read_bytes()[:-1] + b"?")

    here(after=alter)
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    assert "text is another" in refusal(verify, run, artifact)
    assert_nothing_proved(run)


def test_complaint_of_the_decoder_is_told(code_files, proving, here):
    """A decoder that gives up says why, and nothing is reported as proved."""
    here(before=lambda command: Path(command[3]).write_bytes(b"PGOLFTXT"))
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    assert "proof.code" in refusal(verify, run, artifact)
    assert_nothing_proved(run)


def test_decoder_that_cannot_follow_is_told(code_files, proving, here, monkeypatch):
    """Its frequencies differ at the first check: it says what made the file, and nothing is proved.

    Logits that lie whole steps of the grid apart stand for another machine.
    """
    original = Engine.logits

    def logits_of_another_machine(self, tokens, *where):
        for rows, logits in original(self, tokens, *where):
            yield rows, logits + torch.arange(logits.size(1)) / 256

    def move(command):
        monkeypatch.setattr(Engine, "logits", logits_of_another_machine)

    here(before=move)
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    message = refusal(verify, run, artifact)
    assert message.startswith("verify: the decoder gave up: ")
    assert "proof.code cannot be followed here: the frequencies up to token 1 are not" in message
    assert "those of torch" in message
    assert_nothing_proved(run)


def test_decoder_that_misses_the_text_is_refused(code_files, proving, here):
    """Equal frequencies are no proof if the decoder fails on the text's checksum."""
    here(before=lambda command: forget_the_text(Path(command[3]), Path(command[3])))
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    message = refusal(verify, run, artifact)
    assert "another text" in message
    assert_nothing_proved(run)


def test_text_of_an_earlier_proof_does_not_count(code_files, proving, here):
    """A decoder that writes nothing is not taken for the one before it."""
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    here()
    verify(run, artifact)
    here(before=lambda command: Path(command[3]).write_bytes(b"PGOLFTXT"))
    assert "gave up" in refusal(verify, run, artifact)


def test_decoder_that_dies_without_a_word_is_told_by_its_status(code_files, proving, monkeypatch):
    """Its status is all that can be told."""

    def dead(command, **how):
        return subprocess.CompletedProcess(command, -9, stderr="")

    replace_run(monkeypatch, dead)
    run, artifact = proving(code_files("none, no ttt", 40).cfg, verify_tokens=30)
    assert "gave up: exit status -9" in refusal(verify, run, artifact)
    assert_nothing_proved(run)


def test_settings_that_the_artifact_has_not_cannot_be_proved(code_files, proving, here):
    """The decoder has no settings but the artifact's: a run with others is not proved."""
    here()
    changes = dict(verify_tokens=30, ttt_temperature=0.9, mixer="entropy")
    run, artifact = proving(code_files("none, no ttt", 40).cfg, **changes)
    assert "other settings" in refusal(verify, run, artifact)
    assert_nothing_proved(run)


# ---- Cheats: each patches a class of the script, here or in a copy of it -------------------------


def peek():
    """Raise what is predicted by 2 nats, looking behind the end of the prefix that was given.

    The first position is spared: a check follows it.
    """
    original = Engine.logits

    def logits_after_a_look(self, tokens, *where):
        stream = torch.as_strided(tokens, (tokens.untyped_storage().nbytes() // 8,), (1,))
        for rows, logits in original(self, tokens, *where):
            target = stream[(rows + 1).clamp(max=len(stream) - 1), None]
            more = 2.0 * (rows > 0)[:, None].to(logits.dtype)
            yield rows, logits.scatter_add(1, target, more)

    Engine.logits = logits_after_a_look


def open_gate():
    """Choose between two causal distributions by the token to come, where a block's are known."""
    original = Mixture.mix

    def the_better_one(self, grid, rows):
        q = original(self, grid, rows)
        p = commit(shares(grid))
        target = self.history.tokens[(rows + 1).clamp(max=self.history.size - 1)]
        target = target[:, None].long()
        return torch.where(q.gather(1, target) > p.gather(1, target), q, p)

    Mixture.mix = the_better_one


def update_first():
    """Let the mixer learn from a block, and only then commit the block."""
    original = Predictor.predict

    def predict_what_was_learned(self, prefix, start, stop):
        before = self.mixture.weights.clone()
        self.mixture.optimizer.state.clear()  # no momentum from the blocks before
        for _ in range(4):
            original(self, prefix, start, stop)
            self.mixture.learn(torch.as_strided(prefix, (stop,), (1,)))
            self.pending = None
            self.scored_to = start
            self.engine.cache.rows -= stop - start  # they are to be computed once more
            self.engine.cache.used -= stop - start
        commitment = original(self, prefix, start, stop)
        self.mixture.weights.copy_(before)
        return commitment

    Predictor.predict = predict_what_was_learned


@pytest.fixture
def honest_again(monkeypatch):
    """honest_again() undoes every cheat; so does the end of the test."""
    methods = [(Engine, "logits"), (Mixture, "mix"), (Predictor, "predict")]
    originals = [(cls, name, getattr(cls, name)) for cls, name in methods]
    for original in originals:
        monkeypatch.setattr(*original)  # to be restored

    def undo():
        for original in originals:
            setattr(*original)

    return undo


def assert_refuted(cheat, cfg, proving):
    """Assert that verify refutes a cheat that pays, by its decoder's frequencies."""
    run, artifact = proving(cfg, verify_tokens=70)
    honest = codec(cfg).encode(CODED_STREAM[:71])
    cheat()
    cheated = codec(cfg).encode(CODED_STREAM[:71])
    assert cheated.bits < honest.bits  # it pays
    assert "the frequencies up to token 70 are not those of" in refusal(verify, run, artifact)
    assert_nothing_proved(run)


@pytest.mark.slow
def test_peek_is_refuted_by_a_genuine_decoder(artifacts, proving, honest_again, real_process):
    """A process that runs the script has other frequencies from where the cheat first looked."""
    assert_refuted(peek, artifacts("learned"), proving)


def test_update_before_score_is_refuted(artifacts, proving, honest_again, here):
    """A decoder cannot learn from a block that it has not decoded."""
    here(before=lambda command: honest_again())
    assert_refuted(update_first, artifacts("learned"), proving)


@pytest.mark.slow
def test_open_gate_is_refuted_by_a_decoder_of_its_kind(
    artifacts, proving, honest_again, real_process, tmp_path, monkeypatch
):
    """Even a copy of the script that cheats alike cannot decode: it has no token to look at."""
    source = Path(train_gpt.__file__).read_text(encoding="utf-8")
    ending = "\nif __name__ =="
    cheat = f"\n{inspect.getsource(open_gate)}\nopen_gate()\n\n"
    copy = tmp_path / "train_gpt.py"
    copy.write_text(source.replace(ending, cheat + ending), encoding="utf-8")
    monkeypatch.setattr(train_gpt, "__file__", str(copy))
    assert_refuted(open_gate, artifacts("learned"), proving)


# ---- Any machine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(artifacts, code_files, tmp_path_factory):
    """{(lanes, threads): the text that a process without vector units decodes} of CODED_STREAM.

    In plain order TTT updates the model three times, and the mixer 26 times; in lanes the mixer.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    cfg = artifacts("learned")
    threads = torch.get_num_threads()
    coded = {lanes: codec(cfg).encode(CODED_STREAM, lanes) for lanes in (0, 4)}
    torch.set_num_threads(threads)
    for lanes, code in coded.items():
        (folder / f"{lanes}.code").write_bytes(code.data)
    paths = {folder / f"{lanes}.code": lanes for lanes in coded}
    decoded = decompress_on_plain_machine(cfg.artifact_path, *paths)
    return {(paths[path], threads): text for (path, threads), text in decoded.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [0, 4])
@pytest.mark.parametrize("threads", [1, 2])
def test_code_made_here_decodes_without_vector_units(lanes, threads, elsewhere):
    """On one thread and on two, under the frequencies that were coded, as the checks tell."""
    assert elsewhere[lanes, threads] == TABLE.decode(CODED_STREAM)


# ---- The commands, with a real process -----------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder of validation shards of CODED_STREAM."""
    folder = tmp_path / "shards"
    folder.mkdir()
    data = train_gpt.shard_bytes(CODED_STREAM)
    (folder / "fineweb_val_000000.bin").write_bytes(data)
    return folder


@pytest.mark.slow
def test_verify_decodes_after_the_shards_are_gone(
    command_line, artifacts, shards, tmp_path, monkeypatch, real_process
):
    """Then artifact and code file alone give the text."""
    environments = []

    def without_shards(*args, env, **how):
        shutil.rmtree(shards)
        environments.append(env)
        assert "stdout" not in how, "the decoder's progress is not shown"
        return subprocess.run(*args, env=env, **how)

    replace_run(monkeypatch, without_shards)
    cfg = artifacts("learned")
    settings = dict(
        ARTIFACT_PATH=cfg.artifact_path,
        DATA_PATH=str(shards),
        TOKENIZER_PATH=str(tmp_path / "none"),
        RUN_ID="proof",
        VERIFY_TOKENS="70",
        SIZE_LIMIT_BYTES="1000000",
    )
    assert command_line("verify", **settings) == (0, "")
    (env,) = environments
    assert env["DATA_PATH"] == os.devnull
    assert env["TOKENIZER_PATH"] == os.devnull
    assert not shards.exists()
    folder = tmp_path / "logs" / "proof"
    proof = json.loads((folder / "results.json").read_text())["proof"]
    (code,) = tmp_path.rglob("*.code")
    size = code.stat().st_size - HEAD_BYTES
    assert proof["tokens"] == 70
    assert proof["bytes_on_disk"] == size
    assert_size(bytes(size), proof["predicted_bits"])
    stages, _ = train_gpt.evaluate(last_stage_predictor(cfg), CODED_STREAM[:71], 1, quiet, 1)
    assert proof["predicted_bits"] == stages[-1]["val_bpb"]
    assert 0 < proof["encode_seconds"] < float("inf")
    assert 0 < proof["decode_seconds"] < float("inf")
    assert "proof: " in (folder / "verify.log").read_text()
    target = tmp_path / "text"
    assert command_line("decompress", code, target, ARTIFACT_PATH=cfg.artifact_path) == (0, "")
    assert target.read_bytes() == TABLE.decode(CODED_STREAM[:71])
