"""logs/report.py --trace: what a run did with its first tokens, scored again."""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CODED_STREAM,
    CODED_TOKENS,
    CODER_SETTINGS,
    HERE,
    ROOT,
    TABLE,
    error_line,
)

import train_gpt

sys.path.insert(0, str(ROOT / "logs"))
import report

pytestmark = pytest.mark.usefixtures("one_core")


def write_text(folder, stream=CODED_STREAM):
    """Write a stream as the validation shard of a folder."""
    folder.mkdir(exist_ok=True)
    shard = train_gpt.shard_bytes(stream.tolist())
    (folder / "fineweb_val_000000.bin").write_bytes(shard)


@pytest.fixture
def run_folder(artifacts, command_line, tmp_path):
    """run_folder(name, **settings) -> the folder of `eval` of that artifact on CODED_STREAM."""
    write_text(tmp_path / "text")

    def run(name="learned, no ttt", command="eval", **settings):
        path = str(artifacts(name).artifact)
        places = dict(DATA_PATH=str(tmp_path / "text"), TOKENIZER_PATH="none", RUN_ID="run")
        assert command_line(command, ARTIFACT_PATH=path, **places, **settings) == (0, "")
        return tmp_path / "logs" / "run"

    return run


@pytest.fixture
def trace(capfd, tmp_path):
    """trace(*args) -> (exit status, stderr) of the report, with a page that is out of the way."""

    def made(*args):
        capfd.readouterr()
        status = report.main([*map(str, args), "--out", str(tmp_path / "page.html")])
        return status, capfd.readouterr().err

    return made


def read_trace(folder):
    """Return {name: array} of the trace in a folder."""
    return dict(np.load(folder / "trace.npz"))


def walked(cfg):
    """Return {stage: frequencies (CODED_TOKENS, V)} of direct walks over the whole stream."""
    artifact = train_gpt.read_artifact(cfg.artifact)
    found = {}
    for plan in train_gpt.evaluation_plans(cfg):
        predictor = train_gpt.Predictor(artifact.weights, artifact.table, cfg, HERE, plan)
        tables = [
            {stage: commitment.table(stage) for stage in plan.stages}
            for commitment, _, _ in train_gpt.walk(predictor, torch.from_numpy(CODED_STREAM))
        ]
        found |= {s: torch.cat([table[s] for table in tables]).long() for s in plan.stages}
    return found


@pytest.mark.parametrize("name", CODER_SETTINGS)
def test_trace_has_what_the_whole_text_commits(name, artifacts, run_folder, trace):
    """Of each stage the tokens' frequencies; of the last ones the 8 likeliest tokens too."""
    n = 150  # ends inside a step
    folder = run_folder(name)
    assert trace(folder, "--trace", n) == (0, "")
    found = read_trace(folder)
    cfg = artifacts(name)
    expected = {stage: freqs[:n] for stage, freqs in walked(cfg).items()}
    targets = torch.from_numpy(CODED_STREAM[1 : n + 1, None])
    own = {stage: freqs.gather(1, targets)[:, 0].tolist() for stage, freqs in expected.items()}
    last = [stage for stage in train_gpt.new_plan(cfg).stages if stage != "unguarded"]
    assert found.keys() - report.NO_STAGES == expected.keys() - {"mixer"}
    assert found["last"].shape == (n, 17 * len(last))
    for stage in expected.keys() - {"mixer"}:
        assert found[stage].tolist() == own[stage]
    for i, stage in enumerate(last):
        chosen, highest, tokens = np.split(found["last"][:, 17 * i : 17 * i + 17], [1, 9], 1)
        assert chosen[:, 0].tolist() == own[stage]
        freqs = expected[stage]
        assert highest.tolist() == freqs.sort(descending=True)[0][:, :8].tolist()
        assert highest.tolist() == freqs.gather(1, torch.from_numpy(tokens)).tolist()
        assert all(len({*row}) == 8 for row in tokens.tolist())


@pytest.mark.parametrize("name", ["learned", "none, no ttt"])
def test_trace_of_a_whole_text_has_the_reported_bits(name, run_folder, trace):
    """More tokens than there are: all of them, with the sums of every stage."""
    folder = run_folder(name)
    assert trace(folder, "--trace") == (0, "")
    run = report.read_run(folder)
    assert run.notes == []
    assert len(run.trace.tokens) == CODED_TOKENS + 1
    for stage in run.stages:
        bits = run.trace.bits[stage["name"]].sum()
        assert bits / stage["bytes"] == pytest.approx(stage["val_bpb"], rel=1e-10)


def test_trace_follows_the_settings_of_its_run(artifacts, run_folder, trace):
    """Not those of the artifact, where `eval` has overridden them."""
    folder = run_folder("learned", TTT_ENABLED="0", MIXER="entropy", VAL_TOKENS="100")
    assert trace(folder, "--trace") == (0, "")
    found = read_trace(folder)
    assert len(found["tokens"]) == 101
    assert found.keys() - report.NO_STAGES == {"round_trip", "sliding", "unguarded"}
    assert report.read_run(folder).notes == []


def test_trace_can_be_read_without_the_artifact(run_folder, trace):
    """It has the tokens and the vocabulary, and nothing that must be unpickled."""
    folder = run_folder("entropy")
    assert trace(folder, "--trace", 33) == (0, "")
    found = read_trace(folder)
    assert found["tokens"].tolist() == CODED_STREAM[:34].tolist()
    table = train_gpt.TokenTable(
        tuple(found["pieces"].tolist()), str(found["kinds"]), int(found["bos_id"])
    )
    assert table == TABLE


def test_page_is_made_from_the_trace_that_is_there(run_folder, trace, tmp_path):
    """The artifact is no longer needed; before, the page says how to make a trace."""
    folder = run_folder()
    path = tmp_path / "own.lzma"
    results = json.loads((folder / "results.json").read_text())
    path.write_bytes(Path(results["artifact"]["path"]).read_bytes())
    results["artifact"]["path"] = str(path)
    (folder / "results.json").write_text(json.dumps(results))
    assert trace(folder) == (0, "")
    assert "logs/report.py RUN_DIR --trace" in (tmp_path / "page.html").read_text()
    assert trace(folder, "--trace", 50) == (0, "")
    path.unlink()
    assert trace(folder) == (0, "")
    assert (tmp_path / "page.html").read_text().count('tabindex="-1"') == 49


def test_artifact_beside_the_results_comes_first(run_folder, trace):
    """As a run leaves it; the path in results.json may be another machine's."""
    folder = run_folder()
    results = json.loads((folder / "results.json").read_text())
    (folder / "model.int6.lzma").write_bytes(Path(results["artifact"]["path"]).read_bytes())
    results["artifact"]["path"] = "/nowhere"
    (folder / "results.json").write_text(json.dumps(results))
    assert trace(folder, "--trace", 20) == (0, "")


def test_text_may_lie_elsewhere(run_folder, trace, tmp_path, monkeypatch):
    """DATA_PATH of the environment."""
    folder = run_folder()
    (tmp_path / "text").rename(tmp_path / "moved")
    monkeypatch.setattr("os.environ", {"DATA_PATH": str(tmp_path / "moved"), "MIXER": "none"})
    assert trace(folder, "--trace", 20) == (0, "")
    assert "mixer" in report.read_run(folder).trace.bits


def test_progress_is_shown(run_folder, capfd, monkeypatch):
    """The stages of each walk, and walk's own lines."""
    folder = run_folder("learned")
    monkeypatch.setattr(train_gpt, "perf_counter", itertools.count(0, 16).__next__)
    assert report.main([str(folder), "--trace", "100"]) == 0
    shown = capfd.readouterr().out
    for stages in ("round_trip", "sliding", "ttt+unguarded+mixer"):
        assert f"run: {stages}, 100 tokens\n" in shown
    assert "ttt+unguarded+mixer: 64/100 tokens" in shown


@pytest.mark.slow
def test_folder_of_a_proof_is_passed_over(run_folder, trace, tmp_path):
    """No stage was scored there; alone, it is refused."""
    proof = run_folder(command="verify", VERIFY_TOKENS="20").rename(tmp_path / "logs" / "proof")
    assert "proofs alone" in error_line(trace(proof, "--trace"), 1)
    folder = run_folder()
    assert trace(folder, proof, "--trace", 20) == (0, "")
    assert (folder / "trace.npz").exists()
    assert not (proof / "trace.npz").exists()


# ---- Refusals ------------------------------------------------------------------------------------


def changed(folder, **changes):
    """Change keys of the results in a folder."""
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_artifact(folder, tmp_path):
    """Let the artifact be gone."""
    artifact = json.loads((folder / "results.json").read_text())["artifact"]
    changed(folder, artifact=artifact | dict(path="gone"))


def other_artifact(folder, tmp_path):
    """Let another artifact lie in the run's folder."""
    path = json.loads((folder / "results.json").read_text())["artifact"]["path"]
    artifact = train_gpt.read_artifact(path)
    cfg = train_gpt.config_from_env({}, artifact.settings)
    data = train_gpt.pack_artifact(artifact.weights, cfg, TABLE, 20.0)
    (folder / "model.int6.lzma").write_bytes(data)


def damaged_artifact(folder, tmp_path):
    """Let a file that is none lie in the run's folder."""
    (folder / "model.int6.lzma").write_bytes(b"PGOLFART")


def other_text(folder, tmp_path):
    """Let the text differ in its last token."""
    stream = CODED_STREAM.copy()
    stream[-1] = 6 + (stream[-1] == 6)
    write_text(tmp_path / "text", stream)


def no_text(folder, tmp_path):
    """Let the text be gone."""
    (tmp_path / "text" / "fineweb_val_000000.bin").unlink()


def no_results(folder, tmp_path):
    """Leave the log alone."""
    (folder / "results.json").unlink()


def no_stages(folder, tmp_path):
    """Let the run have ended before it scored anything."""
    changed(folder, stages=[])


def other_bits(folder, tmp_path):
    """Let a stage have a bit less, of all tokens."""
    stages = json.loads((folder / "results.json").read_text())["stages"]
    stages[0]["val_bpb"] -= 1 / stages[0]["bytes"]
    changed(folder, stages=stages)


def other_proof(folder, tmp_path):
    """Let the proof have a few units of 2^-20 bit too many, of the first tokens."""
    zero = dict(bytes_on_disk=1, encode_seconds=1, decode_seconds=1)
    run = report.read_run(folder)
    bits = run.trace.bits["mixer"][:20].sum()
    changed(folder, proof=dict(tokens=20, predicted_bits=bits + 1e-5, **zero))


def other_settings(folder, tmp_path):
    """Let the results name a setting that cannot be."""
    settings = json.loads((folder / "results.json").read_text())["settings"]
    changed(folder, settings=settings | dict(eval_stride=0))


@pytest.mark.parametrize(
    "change, words",
    [
        (no_artifact, "there is no artifact, model.int6.lzma"),
        (other_artifact, "not the artifact of"),
        (damaged_artifact, "no artifact of format version"),
        (other_text, "another validation text"),
        (no_text, "DATA_PATH"),
        (no_results, "no stage is scored yet"),
        (no_stages, "no stage is scored yet"),
        (other_bits, "round_trip gives 212 tokens"),
        (other_proof, "mixer gives 20 tokens"),
        (other_settings, "EVAL_STRIDE"),
    ],
)
def test_what_is_not_of_the_run_is_refused(run_folder, trace, tmp_path, change, words):
    """In one line, and the trace that is there stays."""
    folder = run_folder()
    assert trace(folder, "--trace") == (0, "")
    before = (folder / "trace.npz").read_bytes()
    change(folder, tmp_path)
    assert words in error_line(trace(folder, "--trace"), 1)
    assert (folder / "trace.npz").read_bytes() == before


def test_small_vocabulary_is_refused(run_folder, trace, monkeypatch):
    """There are not as many tokens as are listed."""
    folder = run_folder()
    monkeypatch.setattr(report, "TOP", 65)
    assert "a vocabulary of less than 65 tokens" in error_line(trace(folder, "--trace", 20), 1)


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_number_of_tokens_is_a_number(number, capfd):
    """From 1 on."""
    with pytest.raises(SystemExit) as caught:
        report.main(["run", "--trace", number])
    assert caught.value.code == 2
    assert "--trace" in capfd.readouterr().err


def test_interruption_is_one_line(run_folder, trace, monkeypatch):
    """With a status of its own."""
    folder = run_folder()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "walk", interrupt)
    assert error_line(trace(folder, "--trace"), 130) == "interrupted"
    assert not (folder / "trace.npz").exists()


@pytest.mark.parametrize("n, is_noted", [(50, True), (CODED_TOKENS, False)])
def test_another_script_is_noted_where_no_bits_can_be_compared(run_folder, trace, n, is_noted):
    """With the whole text they are."""
    folder = run_folder()
    environment = json.loads((folder / "results.json").read_text())["environment"]
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    assert environment["source_sha256"] == source
    changed(folder, environment=environment | dict(source_sha256="another"))
    assert noted(folder, trace, n) == is_noted


@pytest.mark.parametrize("n, is_noted", [(50, True), (CODED_TOKENS, False)])
def test_inexact_scoring_is_noted_where_no_bits_can_be_compared(run_folder, trace, n, is_noted):
    """Another machine would not get the same frequencies."""
    assert noted(run_folder(EVAL_DTYPE="float32"), trace, n) == is_noted


def noted(folder, trace, n):
    """Trace n tokens; return whether the trace has a note on the run's script and exactness."""
    assert trace(folder, "--trace", n) == (0, "")
    notes = report.read_run(folder).notes
    assert [note for note in notes if "another version of train_gpt.py" in note] == notes
    return bool(notes)
