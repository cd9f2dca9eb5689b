"""Settings: names, presets, what is refused, and what an artifact fixes."""

import dataclasses
import inspect
import os
import re

import pytest
from conftest import refusal, tiny_config

import train_gpt
from train_gpt import FIELDS, GROUPS, Config, UsageError, config_from_env, stored_settings

PRESETS = {"record": {}, **train_gpt.PRESETS}

NAMES = """
    PRESET DEVICE DATA_PATH TOKENIZER_PATH RUN_ID SEED ARTIFACT_PATH LOG_DIR VAL_TOKENS
    SIZE_LIMIT_BYTES ITERATIONS MAX_WALLCLOCK_SECONDS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN
    EVAL_SEQ_LEN EVAL_STRIDE EVAL_RUN_TILES EVAL_DTYPE WARMUP_STEPS WARMDOWN_ITERS
    VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT XSA_LAST_N ROPE_DIMS
    BIGRAM_VOCAB_SIZE BIGRAM_DIM VE_LAYERS VRL_ENABLED LOGIT_SOFTCAP QK_GAIN_INIT
    MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_MOMENTUM MUON_WD ADAM_WD GRAD_CLIP_NORM EMA_DECAY
    SWA_ENABLED SWA_EVERY COMPLEMENT_ALPHA
    TTT_ENABLED TTT_SCHEDULE_CHUNKS TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS
    TTT_TEMPERATURE POLYAK_DECAY
    MIXER NGRAM_ORDER NGRAM_RECENT MIN_COUNT ALPHA_BASE ALPHA_RANGE ALPHA_CENTER"""


def from_env(stored=None, **environ):
    """Return the Config of these variables among those of an ordinary shell under torchrun."""
    shell = dict(
        PATH="/bin",
        HOME="/",
        LANG="C.UTF-8",
        OMP_NUM_THREADS="1",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT="29500",
        TORCHELASTIC_RUN_ID="none",
        CUDA_VISIBLE_DEVICES="0",
        SHELL="/bin/sh",
        LOGNAME="x",
        USER="x",
        TERM="xterm",
        CI="1",
        SEEDS="1 2 3",
        TMPDIR="/tmp",
    )
    return config_from_env({**shell, **environ}, stored)


# ---- Names and presets ---------------------------------------------------------------------------


def test_documented_settings_exist():
    """The names that others script against are all there."""
    assert set(NAMES.split()) <= {name.upper() for name in FIELDS}


def test_batches_of_windows_are_gone():
    """What is computed side by side changes nothing, so that it is no setting."""
    assert "eval_batch_windows" not in FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_setting_has_documentation(name):
    """The docstring of a setting's group has a line for it, which --help shows."""
    assert re.search(rf"^    {name}: \w", train_gpt.GROUPS[name].__doc__, re.MULTILINE)


def test_help_does_not_need_the_indentation_of_docstrings(monkeypatch, capsys):
    """Python 3.13 takes it away; the help is what it is here, a line a setting."""
    train_gpt.show_help()
    expected = capsys.readouterr().out
    for group in set(GROUPS.values()):
        monkeypatch.setattr(group, "__doc__", inspect.cleandoc(group.__doc__))
    train_gpt.show_help()
    assert capsys.readouterr().out == expected


def test_every_setting_belongs_to_one_group():
    """What an artifact stores and what `eval` may override goes by the groups."""
    groups = ("RunSettings", "TrainSettings", "ModelSettings", "EvalSettings")
    fields = [f.name for group in groups for f in dataclasses.fields(getattr(train_gpt, group))]
    assert len(fields) == len(set(fields))
    assert set(fields) == set(FIELDS)
    assert set(GROUPS) == set(FIELDS)


def test_there_are_three_presets():
    """No other name can be given, and all but the default have settings of their own."""
    assert FIELDS["preset"].metadata["choices"] == "record, bench, demo"
    assert set(train_gpt.PRESETS) == {"bench", "demo"}


def test_defaults_are_the_record_preset():
    """No variable at all means the record preset."""
    assert from_env() == Config()
    assert Config() == Config(preset="record")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_a_valid_config(preset):
    """PRESET alone gives the preset's values, in a folder that has its name."""
    cfg = from_env(PRESET=preset)
    assert cfg == Config(preset=preset, **PRESETS[preset])
    assert cfg.run_dir.name == f"{preset}_seed1337"
    assert cfg.artifact == cfg.run_dir / "model.int6.lzma"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_prove_what_they_report(preset):
    """Only float64 gives every machine the same code."""
    assert from_env(PRESET=preset).eval_dtype == "float64"


@pytest.mark.parametrize("preset", ["bench", "demo"])
def test_no_clock_ends_the_small_presets(preset):
    """All machines take as many steps and calibrate to the end, so that figures compare."""
    assert from_env(PRESET=preset).max_wallclock_seconds == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_quantize_by_the_fisher_information(preset):
    """It takes half of int6's bytes at the same loss; int6 is there to compare with."""
    assert from_env(PRESET=preset).quantizer == "fisher"


@pytest.mark.parametrize("preset, tiles", [("record", 1), ("bench", 0), ("demo", 0)])
def test_run_tiles_of_the_presets(preset, tiles):
    """`record` slides as the reference does; on a CPU, runs last until the weights change."""
    assert from_env(PRESET=preset).eval_run_tiles == tiles


@pytest.mark.parametrize("preset", PRESETS)
def test_variables_override_the_preset(preset):
    """They change what they name and nothing else."""
    changed = from_env(PRESET=preset, VAL_TOKENS="77", TTT_LR="2e-3")
    assert changed == dataclasses.replace(from_env(PRESET=preset), val_tokens=77, ttt_lr=2e-3)


def test_places_can_be_chosen():
    """LOG_DIR and RUN_ID make the run's folder; ARTIFACT_PATH stands alone."""
    cfg = from_env(RUN_ID="mine", LOG_DIR="there", ARTIFACT_PATH="a.lzma")
    assert str(cfg.run_dir) == os.path.join("there", "mine")
    assert str(cfg.artifact) == "a.lzma"


@pytest.mark.parametrize(
    "layers, expected", [("", []), (" ", []), ("3", [3]), ("3,1", [1, 3]), (" 2 , 0,2", [0, 2])]
)
def test_value_layers_are_read_from_the_list(layers, expected):
    """Comma-separated, in any order, with spaces or none."""
    assert tiny_config(ve_layers=layers).value_layers == expected


# ---- Reading values ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_setting_parses_as_it_is_shown(name):
    """The text in which help and logs show a setting reads back as the same value and type."""
    default = FIELDS[name].default
    value = train_gpt.parse_setting(name, str(default))
    assert value == default
    assert type(value) is type(default)


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type is bool])
def test_switches_are_0_or_1(name):
    """1 is on and 0 is off."""
    assert train_gpt.parse_setting(name, "1") is True
    assert train_gpt.parse_setting(name, "0") is False


@pytest.mark.parametrize(
    "setting, allowed",
    [
        ("ITERATIONS=many", "a whole number"),
        ("ITERATIONS=1.5", "a whole number"),
        ("ITERATIONS=", "a whole number"),
        ("SEED=0x10", "a whole number"),
        ("MATRIX_LR=fast", "a finite number"),
        ("MATRIX_LR=nan", "at least 0"),
        ("TTT_LR=-inf", "at least 0"),
        ("TTT_LR=inf", "at most 9.22"),
        ("TTT_ENABLED=yes", "0 or 1"),
        ("SWA_ENABLED=2", "0 or 1"),
        ("VRL_ENABLED=", "0 or 1"),
        ("PRESET=fast", "record, bench, demo"),
        ("DEVICE=tpu", "auto, cuda, cpu"),
        ("MIXER=magic", "entropy, none"),
        ("ITERATIONS=0", "at least 1"),
        ("SEED=-1", "at least 0"),
        ("MATRIX_LR=-0.1", "at least 0"),
        ("VAL_TOKENS=-5", "at least 0"),
        ("NGRAM_ORDER=1", "at least 2"),
        ("TTT_TEMPERATURE=0.0", "at least 0.001"),
        ("LOG_EVERY=0", "at least 1"),
        ("MODEL_DIM=500", "a multiple of NUM_HEADS=8"),
        ("NUM_HEADS=16 NUM_KV_HEADS=3", "a multiple of NUM_KV_HEADS=3"),
        ("TRAIN_BATCH_TOKENS=3000", "a multiple of TRAIN_SEQ_LEN=2048"),
        ("MICRO_BATCH_TOKENS=3000", "a multiple of TRAIN_SEQ_LEN=2048"),
        ("EVAL_SEQ_LEN=1000", "a multiple of EVAL_STRIDE=64"),
        ("TTT_CHUNK_TOKENS=3000", "a multiple of EVAL_SEQ_LEN=2048"),
        ("ROPE_DIMS=15", "even"),
        ("ROPE_DIMS=66", "at most 64"),
        ("VE_LAYERS=11", "below NUM_LAYERS=11"),
        ("VE_LAYERS=9;10", "comma-separated"),
        ("VE_LAYERS=-1", "comma-separated"),
        ("XSA_LAST_N=12", "at most 11"),
        ("TTT_FREEZE_BLOCKS=12", "at most 11"),
        ("COMPLEMENT_ALPHA=1.5", "at most 1"),
        ("EMA_DECAY=1.0", "at most 0.99"),
        ("POLYAK_DECAY=1.0", "at most 0.99"),
        ("MIN_COUNT=17", "at most 4"),
        ("MIN_COUNT=0", "at least 1"),
        ("ALPHA_RANGE=0.8 ALPHA_BASE=0.5", "at most 0.5"),
        ("VOCAB_SIZE=70000", "at most 65536"),
        ("VOCAB_SIZE=70000 MIXER=none", "at most 65536"),
        ("EVAL_STRIDE=2048", "below EVAL_SEQ_LEN"),
        ("EVAL_STRIDE=0", "at least 1"),
        ("EVAL_RUN_TILES=-1", "at least 0"),
        ("EVAL_DTYPE=float16", "float64, float32, bfloat16"),
    ],
)
def test_bad_setting_is_refused(setting, allowed):
    """The message has the variable, the value and what is allowed."""
    environ = dict(pair.split("=") for pair in setting.split())
    message = refusal(from_env, kind=UsageError, **environ)
    name, value = setting.split()[0].split("=")
    assert re.match(rf"{name}='?{value}'?: ", message)
    assert allowed in message


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("ALPHA_BAES", "ALPHA_BASE"),
        ("ITERATION", "ITERATIONS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("MODELDIM", "MODEL_DIM"),
        ("TTT_EPOCH", "TTT_EPOCHS"),
        ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
        ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("COMPLEMENT_ALHPA", "COMPLEMENT_ALPHA"),
        ("MAX_WALL_CLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"),
    ],
)
def test_near_miss_is_refused(typo, meant):
    """A variable one slip away from a setting is an error that says both names."""
    message = refusal(from_env, kind=UsageError, **{typo: "1"})
    assert message.startswith(typo)
    assert re.search(rf"\b{meant}\b", message)


# ---- Against an artifact -------------------------------------------------------------------------


@pytest.fixture
def stored():
    """The settings that an artifact of the tiny model holds."""
    return stored_settings(tiny_config(seed=5, ttt_lr=0.004))


def test_artifact_beats_the_preset(stored):
    """Without variables, all that the file says holds; a setting of the machine is the preset's."""
    cfg = from_env(stored)
    assert {name: getattr(cfg, name) for name in stored} == stored
    assert cfg.preset == "bench"
    assert cfg.val_tokens == PRESETS["bench"]["val_tokens"]


def test_variables_beat_preset_and_artifact(stored):
    """PRESET chooses the machine's settings anew; a fixed setting may be said again as it is."""
    cfg = from_env(stored, PRESET="demo", TTT_EPOCHS="1", EVAL_STRIDE="16", MODEL_DIM="32")
    assert cfg.preset == "demo"
    assert cfg.val_tokens == PRESETS["demo"]["val_tokens"]
    assert cfg.model_dim == 32
    assert cfg.ttt_epochs == 1
    assert cfg.eval_stride == 16
    assert cfg.ttt_lr == 0.004


@pytest.mark.parametrize(
    "name, value, stored_value",
    [
        ("MODEL_DIM", "64", "32"),
        ("VE_LAYERS", "3", "2,3"),
        ("LOGIT_SOFTCAP", "29.5", "30.0"),
        ("VRL_ENABLED", "0", "True"),
        ("TRAIN_SEQ_LEN", "64", "32"),
    ],
)
def test_weights_fix_the_model_settings(stored, name, value, stored_value):
    """A variable that the weights contradict is refused, with both values."""
    message = refusal(from_env, stored, kind=UsageError, **{name: value})
    assert message.startswith(f"{name}=")
    assert stored_value in message


def test_override_must_fit_the_artifact(stored):
    """The merged settings are checked as one."""
    assert "EVAL_STRIDE" in refusal(from_env, stored, kind=UsageError, EVAL_STRIDE="5")


@pytest.mark.parametrize("name", ["warp_drive", "eval_batch_windows"])
def test_settings_of_another_version_are_refused(name):
    """A setting that this script does not have, or has no more, is named."""
    assert name in refusal(config_from_env, {}, dict(preset="bench", seed=1, **{name: 1}))


def test_an_artifact_says_how_it_is_scored(stored):
    """Run tiles and dtype are stored; `eval` may override both."""
    assert stored["eval_run_tiles"] == 2
    assert stored["eval_dtype"] == "float64"
    cfg = from_env(stored, EVAL_RUN_TILES="0", EVAL_DTYPE="bfloat16")
    assert cfg.eval_run_tiles == 0
    assert cfg.eval_dtype == "bfloat16"
