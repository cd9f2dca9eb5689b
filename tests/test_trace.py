"""trace.npz: what a run gave to its first tokens, as it scored them."""

import sys

import numpy as np
import pytest
import torch
from conftest import CODED_STREAM, CODED_TOKENS, CODER_SETTINGS, HERE, ROOT, TABLE, error_line

import train_gpt

sys.path.insert(0, str(ROOT / "logs"))
import report

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def run_folder(artifacts, command_line, tmp_path):
    """run_folder(name, **settings) -> the folder of `eval` of that artifact on CODED_STREAM."""
    text = tmp_path / "text"
    text.mkdir()
    shard = train_gpt.shard_bytes(CODED_STREAM.tolist())
    (text / "fineweb_val_000000.bin").write_bytes(shard)
    places = dict(DATA_PATH=str(text), TOKENIZER_PATH="none", RUN_ID="run")

    def run(name="learned, no ttt", **settings):
        path = str(artifacts(name).artifact)
        assert command_line("eval", ARTIFACT_PATH=path, **places | settings) == (0, "")
        return tmp_path / "logs" / "run"

    return run


def read_trace(folder):
    """Return {name: array} of the trace in a folder; nothing in it may need unpickling."""
    with np.load(folder / "trace.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def walked(cfg):
    """Return {stage: frequencies (CODED_TOKENS, V)} of direct walks over the whole stream."""
    artifact = train_gpt.read_artifact(cfg.artifact)
    found = {}
    for plan in train_gpt.evaluation_plans(cfg):
        predictor = train_gpt.Predictor(artifact.weights, artifact.table, cfg, HERE, plan)
        tables = [
            {stage: commitment.table(stage) for stage in plan.stages}
            for commitment, _ in train_gpt.walk(predictor, torch.from_numpy(CODED_STREAM))
        ]
        found |= {s: torch.cat([table[s] for table in tables]).long() for s in plan.stages}
    return found


@pytest.mark.parametrize("name", CODER_SETTINGS)
def test_trace_has_what_was_committed(name, artifacts, run_folder):
    """Of each stage the tokens' frequencies, and the 8 likeliest tokens with theirs."""
    n = 150  # ends inside a step
    found = read_trace(run_folder(name, TRACE_TOKENS=str(n)))
    expected = {stage: freqs[:n] for stage, freqs in walked(artifacts(name)).items()}
    assert found.keys() - report.NO_STAGES == expected.keys()
    targets = torch.from_numpy(CODED_STREAM[1 : n + 1, None])
    for stage, freqs in expected.items():
        own, highest, tokens = np.split(found[stage], [1, 9])
        assert own[0].tolist() == freqs.gather(1, targets)[:, 0].tolist()
        assert highest.T.tolist() == freqs.sort(descending=True)[0][:, :8].tolist()
        assert highest.T.tolist() == freqs.gather(1, torch.from_numpy(tokens.T)).tolist()
        assert all(len({*row}) == 8 for row in tokens.T.tolist())


@pytest.mark.parametrize("verified", ["0", "9", "200"])
def test_trace_is_as_long_as_it_is_asked_for(run_folder, verified):
    """However many tokens are kept for the proof."""
    found = read_trace(run_folder(TRACE_TOKENS="33", VERIFY_TOKENS=verified))
    assert found["tokens"].tolist() == CODED_STREAM[:34].tolist()
    assert found["mixer"].shape == (17, 33)


@pytest.mark.parametrize("name", ["learned", "none, no ttt"])
def test_trace_of_a_whole_text_has_the_reported_bits(name, run_folder):
    """More tokens than there are: all of them, with the sums of every stage."""
    run = report.read_run(run_folder(name))
    assert run.notes == []
    assert len(run.trace.tokens) == CODED_TOKENS + 1
    for stage in run.stages:
        bits = run.trace.bits[stage["name"]].sum()
        assert bits / stage["bytes"] == pytest.approx(stage["val_bpb"], rel=1e-10)


def test_trace_follows_the_settings_of_its_run(run_folder):
    """Not those of the artifact, where `eval` has overridden them."""
    folder = run_folder("learned", TTT_ENABLED="0", MIXER="entropy", VAL_TOKENS="100")
    found = read_trace(folder)
    assert len(found["tokens"]) == 101
    assert found.keys() - report.NO_STAGES == {"round_trip", "sliding", "unguarded", "mixer"}
    assert report.read_run(folder).notes == []


def test_trace_has_the_vocabulary(run_folder):
    """To show the text, it takes no tokenizer and no artifact."""
    found = read_trace(run_folder("entropy"))
    table = train_gpt.TokenTable(
        tuple(found["pieces"].tolist()), str(found["kinds"]), int(found["bos_id"])
    )
    assert table == TABLE


def test_page_shows_the_traced_text(run_folder, tmp_path):
    """Each token, BOS aside, can be reached by the keyboard."""
    page = tmp_path / "page.html"
    assert report.main([str(run_folder(TRACE_TOKENS="50")), "--out", str(page)]) == 0
    assert page.read_text().count('tabindex="-1"') == 49


def test_trace_of_another_run_is_not_shown(run_folder):
    """A run that is replaced and ends early leaves the former trace."""
    folder = run_folder()
    before = (folder / "trace.npz").read_bytes()
    run_folder(MIXER="none", REPLACE="1")
    (folder / "trace.npz").write_bytes(before)
    run = report.read_run(folder)
    assert run.trace is None
    (note,) = run.notes
    assert note.startswith("The text is not shown: trace.npz is of other results")


def test_a_trace_has_tokens(artifacts, command_line):
    """None at all is refused before any work."""
    path = str(artifacts("none").artifact)
    assert "TRACE_TOKENS=0" in error_line(
        command_line("eval", ARTIFACT_PATH=path, TRACE_TOKENS="0"), 2
    )
