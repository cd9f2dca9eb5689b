"""results.json of a run, and the submission that is made of several."""

import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import error_line, refusal, tiny_config

import train_gpt
from train_gpt import Runtime, summarize

# ---- Results of one run --------------------------------------------------------------------------


def new_report(folder):
    """Return a Run that has just begun, in folder/run."""
    cfg = tiny_config(log_dir=str(folder), run_id="run")
    cfg.run_dir.mkdir()
    return train_gpt.Run(cfg, Runtime(notes=("cpu tiny",)), "train")


def stage(name, val_bpb):
    """Return a stage as `evaluate` gives it."""
    return dict(name=name, val_loss=2 * val_bpb, val_bpb=val_bpb, tokens=1000, seconds=1.5)


def results_of(report):
    """Return what is in the run's results.json."""
    return json.loads((report.cfg.run_dir / "results.json").read_text())


def log_of(report):
    """Return the lines of the run's log."""
    return (report.cfg.run_dir / "train.log").read_text().splitlines()


def test_log_begins_with_every_setting(tmp_path):
    """The log file can be read without the command line."""
    report = new_report(tmp_path)
    settings = [line[2:] for line in log_of(report) if line.startswith("  ")]
    expected = [f"{n.upper()}={getattr(report.cfg, n)}" for n in train_gpt.FIELDS]
    assert " ".join(settings).split(" ") == expected


def test_each_group_of_settings_has_a_line(tmp_path):
    """Run, train, model and eval, in the order of --help."""
    report = new_report(tmp_path)
    settings = [line for line in log_of(report) if line.startswith("  ")]
    assert [line.split("=")[0] for line in settings] == [
        "  PRESET",
        "  SEED",
        "  VOCAB_SIZE",
        "  EVAL_STRIDE",
    ]


def test_log_tells_what_the_preset_does_not_say(tmp_path):
    """Preset, and the settings that are not its own."""
    environ = {"PRESET": "demo", "SEED": "5", "LOG_DIR": str(tmp_path), "MIXER": "learned"}
    cfg = train_gpt.config_from_env(environ)
    report = train_gpt.Run(cfg, Runtime(notes=("cpu tiny",)), "train")
    expected = f"settings: PRESET=demo LOG_DIR={tmp_path} SEED=5; all of them:"
    assert expected in log_of(report)


def test_log_begins_with_the_machine(tmp_path):
    """Environment and device."""
    report = new_report(tmp_path)
    assert f"environment: {report.results['environment']}" in log_of(report)
    assert "cpu tiny" in log_of(report)


def test_log_is_shown_and_written_alike(tmp_path, capsys):
    """What stands in the file was on the screen."""
    report = new_report(tmp_path)
    report.log("a line")
    shown = capsys.readouterr().out
    assert shown.endswith("a line\n")
    assert (report.cfg.run_dir / "train.log").read_text() == shown


def test_recorded_value_is_on_disk_at_once(tmp_path):
    """A run that dies later has left it."""
    report = new_report(tmp_path)
    report.record("train", dict(steps=3))
    assert results_of(report)["train"] == dict(steps=3)


def test_stages_accumulate_in_order(tmp_path):
    """The last one's figure is the run's."""
    report = new_report(tmp_path)
    report.add_stages([stage("pre_quant", 1.5)])
    report.add_stages([stage("sliding", 1.25), stage("mixer", 1.0)])
    results = results_of(report)
    assert results["stages"] == [
        stage("pre_quant", 1.5),
        stage("sliding", 1.25),
        stage("mixer", 1.0),
    ]
    assert results["val_bpb"] == 1.0


def test_table_of_stages_has_one_head_and_deltas(tmp_path, capsys):
    """Each row says what the stage has gained over the one before."""
    report = new_report(tmp_path)
    report.add_stages([stage("pre_quant", 1.5)])
    report.add_stages([stage("sliding", 1.25), stage("mixer", 1.5)])
    capsys.readouterr()
    report.log_table()
    table, _ = capsys.readouterr().out.split("\n\n")
    assert [line.split()[:3] for line in table.splitlines()] == [
        ["stage", "val_bpb", "delta"],
        ["pre_quant", "1.500000", "+0.000000"],
        ["sliding", "1.250000", "-0.250000"],
        ["mixer", "1.500000", "+0.250000"],
    ]


def test_figure_of_a_stage_is_told_at_once(tmp_path, capsys):
    """Long before the table, as progress."""
    report = new_report(tmp_path)
    capsys.readouterr()
    report.add_stages([stage("pre_quant", 1.5)])
    assert capsys.readouterr().out == "pre_quant: val_bpb 1.500000, 1.5 s\n"


def test_budget_stands_below_the_table(tmp_path, capsys):
    """The seconds of all stages but pre_quant, which is not of the artifact."""
    report = new_report(tmp_path)
    report.add_stages([stage("pre_quant", 1.5)])
    report.add_stages([stage("sliding", 1.25), stage("mixer", 1.5)])
    report.results["train"] = dict(seconds=20.5, calibration_seconds=1.0, quantize_seconds=2.0)
    capsys.readouterr()
    report.log_table()
    _, budget = capsys.readouterr().out.split("\n\n")
    evaluation, train = budget.splitlines()
    assert train.split()[:5] == ["train", "21.5", "s", "of", "600"]
    assert evaluation.split()[:5] == ["evaluation", "3.0", "s", "of", "600"]


def test_other_ranks_write_nothing(tmp_path, capsys, monkeypatch):
    """Rank 1 keeps the same results in memory, in silence."""
    monkeypatch.setattr(Runtime, "sum_over_ranks", lambda self, tensor: tensor)
    cfg = tiny_config(log_dir=str(tmp_path), run_id="run")
    report = train_gpt.Run(cfg, Runtime(1, 2, notes=("cpu",)), "train")
    report.add_stages([stage("pre_quant", 1.5)])
    assert report.results["val_bpb"] == 1.5
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# ---- Results of several seeds --------------------------------------------------------------------


VALIDATION = dict(tokens=1000, bytes=2400, sha256="0" * 64)
ENVIRONMENT = dict(
    python="3.11.7", torch="2.13.0", device="cuda", world_size=8, source_sha256="0" * 64
)
PROOF = dict(tokens=500, bytes_on_disk=300)


def write_results(folder, seed, val_bpb, **changes):
    """Return the path of a results.json like that of a run of `seed`, written to `folder`."""
    settings = dict(
        preset=changes.get("preset", "record"),
        mixer=changes.get("mixer", "entropy"),
        ttt_lr=changes.get("ttt_lr", 1e-4),
        eval_dtype=changes.get("eval_dtype", "float64"),
        log_dir=f"logs{seed}",
        seed=seed,
    )
    artifact = dict(
        total_bytes=changes.get("total", 15_000_000 + seed),
        code_bytes=90_000,
        limit_bytes=17_000_000,
        overridden=changes.get("overridden", []),
    )
    last = stage(changes.get("stage", "mixer"), val_bpb)
    run = dict(
        seed=seed,
        val_bpb=val_bpb,
        settings=settings,
        artifact=artifact,
        validation=changes.get("validation", VALIDATION),
        shards=changes.get("shards", {"0" * 64: "fineweb_val_000000.bin"}),
        environment=ENVIRONMENT | changes.get("environment", {}),
        train=changes.get("train", dict(steps=10, seconds=seed / 1000)),
        proof=changes.get("proof", PROOF),
        stages=[
            stage("pre_quant", 9.0),
            stage("sliding", 2.0),
            {**last, "tokens": changes.get("tokens", 1000)},
        ],
    )
    path = folder / f"results{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(run))
    return str(path)


BPB = {1337: 1.10, 42: 1.13, 2024: 1.12}


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    """Work in tmp_path."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def summary(tmp_path):
    """The summary of three seeds, beside a submission.json with what its author wrote."""
    words = dict(author="Ann", github_id="ann", name="A run", blurb="How.", track="10min_16mb")
    (tmp_path / "submission.json").write_text(json.dumps(words | dict(val_bpb=9, junk=1)))
    return summarize([write_results(tmp_path, s, b) for s, b in BPB.items()])


def test_command_writes_the_summary(tmp_path, command_line):
    """submission.json has what the function returns."""
    paths = [write_results(tmp_path, s, b) for s, b in BPB.items()]
    assert command_line("summarize", *paths) == (0, "")
    assert json.loads((tmp_path / "submission.json").read_text()) == summarize(paths)


def test_summary_has_means_and_deviation(summary):
    """The deviation is the sample's, not the population's."""
    assert summary["val_bpb"] == pytest.approx(3.35 / 3)
    assert summary["val_loss"] == pytest.approx(2 * 3.35 / 3)
    assert summary["val_bpb_std"] == pytest.approx(statistics.stdev(BPB.values()))
    assert summary["val_bpb_std"] == pytest.approx(0.0152753, rel=1e-5)
    assert summary["val_loss_std"] == pytest.approx(2 * 0.0152753, rel=1e-5)


def test_summary_has_times(summary):
    """Means of a training step, and of the evaluation without `pre_quant`."""
    assert summary["step_avg_ms"] == pytest.approx(100 * sum(BPB) / 3000)
    assert summary["seeds"]["42"]["step_avg_ms"] == pytest.approx(4.2)
    assert summary["eval_seconds"] == 3.0


def test_summary_has_what_was_proved(summary):
    """Tokens, and bytes of code words."""
    assert summary["seeds"]["42"]["proof_tokens"] == 500
    assert summary["proof_bytes"] == 300


def test_summary_has_the_largest_sizes(summary):
    """Every seed must fit the cap."""
    assert summary["bytes_total"] == 15_002_024
    assert summary["bytes_code"] == 90_000


def test_summary_has_each_seed(summary):
    """Its score and its bytes."""
    assert summary["seeds"].keys() == {"1337", "42", "2024"}
    for seed, val_bpb in BPB.items():
        row = summary["seeds"][str(seed)]
        assert row["val_bpb"] == val_bpb
        assert row["val_loss"] == 2 * val_bpb
        assert row["bytes_total"] == 15_000_000 + seed


def test_summary_says_what_was_measured(summary):
    """Preset, stage, text, device, versions and day."""
    assert summary["preset"] == "record"
    assert summary["stage"] == "mixer"
    assert summary["val_tokens"] == 1000
    assert summary["validation"] == VALIDATION
    assert summary["hardware"] == "cuda"
    assert summary["torch"] == "2.13.0"
    assert summary["python"] == "3.11.7"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])


def test_summary_has_the_settings_of_all_seeds(summary):
    """All that shape the figures, but for the seed; results that name no quantizer had int6."""
    settings = dict(mixer="entropy", ttt_lr=1e-4, quantizer="int6")
    expected = train_gpt.stored_settings(train_gpt.Config(**settings))
    del expected["seed"]
    assert {n: summary.get(n) for n in expected} == expected
    assert "seed" not in summary


WORDS = ("author", "github_id", "name", "blurb", "track")


def test_summary_keeps_what_the_author_wrote(summary):
    """And nothing else of the file that was there."""
    words = [summary[name] for name in WORDS]
    assert words == ["Ann", "ann", "A run", "How.", "10min_16mb"]
    assert "junk" not in summary


def test_three_seeds_need_no_warning(summary):
    """They are what a submission asks for."""
    assert summary["warning"] == ""


@pytest.mark.parametrize("seeds, deviation", [(1, None), (2, pytest.approx(0.5**0.5))])
def test_fewer_than_three_seeds_are_marked(tmp_path, seeds, deviation):
    """A warning says how many it takes; one seed has no deviation."""
    paths = [write_results(tmp_path, seed, 1.1 + seed) for seed in range(seeds)]
    summary = summarize(paths)
    assert "3" in summary["warning"]
    assert summary["val_bpb_std"] == deviation


def test_new_submission_has_room_for_the_author(tmp_path):
    """Without a file before, the author's fields are there, empty."""
    summary = summarize([write_results(tmp_path, 1, 1.1)])
    assert [summary[name] for name in WORDS] == [""] * 5


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(preset="bench"), "differ in PRESET"),
        (dict(stage="ttt", mixer="none"), "MIXER, STAGE"),
        (dict(tokens=999), "differ in VAL_TOKENS"),
        (dict(seed=1), "same seed"),
        (dict(total=16_000_001), "over the cap"),
        (dict(ttt_lr=2e-4), "differ in TTT_LR"),
        (dict(train=None), "not a finished run's results.json, with its proof"),
        (dict(proof=None), "not a finished run's results.json, with its proof"),
        (dict(validation=VALIDATION | dict(bytes=2401)), "differ in VALIDATION"),
        (dict(validation=VALIDATION | dict(sha256="1" * 64)), "differ in VALIDATION"),
        (dict(shards={"1" * 64: "fineweb_val_000000.bin"}), "differ in SHARDS"),
        (dict(environment=dict(device="cpu")), "differ in DEVICE; `summarize --mixed`"),
        (dict(environment=dict(source_sha256="1")), "differ in SOURCE_SHA256"),
    ],
)
def test_results_that_cannot_be_averaged_are_refused(tmp_path, change, words):
    """Unlike runs, one seed twice, a run cut short, over the cap or not proved."""
    good = write_results(tmp_path, 1, 1.1)
    other = write_results(tmp_path, **dict(seed=2, val_bpb=1.2) | change)
    assert words in refusal(summarize, [good, other])
    assert not (tmp_path / "submission.json").exists()


MIXED = dict(environment=dict(device="cpu", source_sha256="1"), shards={})


def test_results_of_several_machines_are_averaged_when_told(tmp_path):
    """`mixed` allows other devices, scripts and training shards, and the summary names them all."""
    paths = [write_results(tmp_path, 1, 1.1), write_results(tmp_path, 2, 1.2, **MIXED)]
    summary = summarize(paths, mixed=True)
    assert summary["val_bpb"] == pytest.approx(1.15)
    assert summary["hardware"] == "cpu + cuda"
    assert summary["torch"] == "2.13.0"
    assert not {"device", "source_sha256", "shards"} & summary.keys()


def test_results_on_several_texts_are_never_averaged(tmp_path):
    """`mixed` does not allow another validation text of as many tokens."""
    other = MIXED | dict(validation=VALIDATION | dict(bytes=2401))
    paths = [write_results(tmp_path, 1, 1.1), write_results(tmp_path, 2, 1.2, **other)]
    message = refusal(summarize, paths, mixed=True)
    assert "differ in VALIDATION;" in message


def test_mixed_is_an_argument_of_the_command(tmp_path, command_line):
    """`summarize --mixed` passes it on; without it the runs are refused."""
    paths = [write_results(tmp_path, 1, 1.1), write_results(tmp_path, 2, 1.2, **MIXED)]
    assert "DEVICE, SHARDS, SOURCE_SHA256" in error_line(command_line("summarize", *paths), 1)
    assert command_line("summarize", "--mixed", *paths) == (0, "")
    assert (tmp_path / "submission.json").exists()
    assert "incomplete command" in error_line(command_line("summarize", "--mixed"), 2)


UNFINISHED = (
    b'{"seed": 1, "train": {}, "stages": [], "artifact": {}, "settings": {}, "environment": {}}'
)


@pytest.mark.parametrize(
    "contents",
    [None, b"", b"{", b"\xff\xfe", b"[]", b"{}", b'"text"', b"null", b"lower", UNFINISHED],
)
def test_file_that_is_no_result_is_refused(tmp_path, contents):
    """A missing, foreign, empty or unfinished results.json is named, also beside a good one."""
    good = write_results(tmp_path, 1, 1.1)
    bad = tmp_path / "bad.json"
    if contents is not None:
        bad.write_bytes(contents)
    assert str(bad) in refusal(summarize, [good, str(bad)])


@pytest.mark.parametrize(
    "name",
    [
        "settings",
        "artifact",
        "environment",
        "stages",
        "validation",
        "shards",
        "train",
        "proof",
    ],
)
def test_result_without_a_part_is_refused(tmp_path, name):
    """A file that lacks what a submission shows is named."""
    path = Path(write_results(tmp_path, 1, 1.1))
    run = json.loads(path.read_text())
    del run[name]
    path.write_text(json.dumps(run))
    assert str(path) in refusal(summarize, [str(path)])


def test_result_with_impossible_settings_is_refused(tmp_path):
    """The file is named, not only the setting."""
    path = write_results(tmp_path, 1, 1.1, mixer="magic")
    assert path in refusal(summarize, [path])


@pytest.mark.parametrize("contents", [b"", b"{broken", b"[1]", b"\xff"])
def test_broken_submission_is_not_overwritten(tmp_path, contents):
    """The author's file, if it is no JSON object, is named in an error and left as it is."""
    out = tmp_path / "submission.json"
    out.write_bytes(contents)
    assert out.name in refusal(summarize, [write_results(tmp_path, 1, 1.1)])
    assert out.read_bytes() == contents
