"""The folder of a record, and the script that unpacks itself."""

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_environment, error_line
from test_report import write_results
from test_runs import MODEL

import train_gpt

SCRIPT = ROOT / "train_gpt.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
BUDGET_BYTES = 60_000  # for the artifact, whatever the script's size
ONE_CORE = {"OMP_NUM_THREADS": "1", "DEVICE": "cpu"}


def process(*args, cwd, **settings):
    """Return the finished process of a Python command line."""
    env = {**clean_environment(), **ONE_CORE, **settings}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def digest(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- A checker of records ------------------------------------------------------------------------
# What the challenge's README and its records ask of a folder, read without train_gpt's help.

NUMBERS = ("val_loss", "val_bpb", "step_avg_ms", "eval_seconds")
SIZES = ("bytes_total", "bytes_code")
KEYS = {
    *("author", "github_id", "name", "blurb", "date", "track", "seeds", "hardware"),
    *("python", "torch", *NUMBERS, *(f"{name}_std" for name in NUMBERS), *SIZES),
}
COLUMNS = ["seed", "val_loss, nats", "val_bpb", *SIZES, "step_avg_ms", "eval_seconds"]
COLUMNS += ["proof_tokens", "proof_bytes"]


def readme_table(readme):
    """Return (heads, {seed: [number]}) of a README's table by seed."""
    lines = [line for line in readme.splitlines() if line.startswith("|")]
    heads, rule, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert {cell.strip("-:") for cell in rule} == {""}
    return heads, {row[0]: [float(cell.replace(",", "")) for cell in row[1:]] for row in rows}


def wrong_figures(summary):
    """Yield the names of figures that are not the mean, deviation or maximum of the seeds'."""
    rows = summary["seeds"].values()
    for name in NUMBERS:
        column = [row[name] for row in rows]
        if summary[name] != pytest.approx(statistics.mean(column)):
            yield name
        if summary[f"{name}_std"] != pytest.approx(statistics.stdev(column)):
            yield f"{name}_std"
    for name in SIZES:
        if summary[name] != max(row[name] for row in rows) or summary[name] > 16_000_000:
            yield name


def readme_faults(readme, summary):
    """Yield what a README does not say, or says of other figures than those of the summary."""
    heads, cells = readme_table(readme)
    if heads != COLUMNS:
        yield "columns"
    for seed, row in summary["seeds"].items():
        digits = [6, 6, 0, 0, 1, 1, 0, 0]  # shown after the point
        if cells.get(seed) != [round(v, n) for v, n in zip(row.values(), digits)]:
            yield f"row {seed}"
    for words in ("## Techniques", "## What was proved", f"{summary['val_bpb']:.6f}"):
        if words not in readme:
            yield words


def faults(record, seeds):
    """Return what a record of these seeds lacks, or says amiss, as a list of words."""
    names = {"README.md", "submission.json", "train_gpt.py", "requirements.txt"}
    names |= {f"train_seed{seed}.log" for seed in seeds}
    names |= {f"proof_seed{seed}.code" for seed in seeds}
    summary = json.loads((record / "submission.json").read_text())
    if lacking := (names ^ {path.name for path in record.iterdir()}) | (KEYS - summary.keys()):
        return sorted(lacking)
    found = [*wrong_figures(summary), *readme_faults((record / "README.md").read_text(), summary)]
    if list(summary["seeds"]) != [str(seed) for seed in seeds]:
        found.append("seeds")
    if digest(record / "train_gpt.py") != summary["source_sha256"]:
        found.append("train_gpt.py")
    return found


# ---- The packed script ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The path of the packed script, whose name is another."""
    path = tmp_path_factory.mktemp("packed") / "small.py"
    train_gpt.dispatch(["pack", str(path)], {})
    return path


@pytest.fixture
def module(packed, monkeypatch):
    """The packed script, imported."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    spec = importlib.util.spec_from_file_location("small", packed)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "small", module)
    spec.loader.exec_module(module)
    return module


DOCUMENTED = (ast.ClassDef, ast.FunctionDef)


def without_docstrings(source):
    """Return a dump of a program without its functions' and classes' docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    return ast.dump(tree)


def unpacked(module):
    """Return the source of an imported packed script."""
    return "".join(inspect.findsource(module.main)[0])


def test_packed_program_is_the_same(module):
    """Statement by statement, but for comments and docstrings."""
    assert without_docstrings(unpacked(module)) == without_docstrings(SCRIPT.read_text("utf-8"))


def test_packed_program_keeps_the_docstrings_that_help_shows(module):
    """And no others, where a statement is left without them."""
    kept = [
        node.name
        for node in ast.walk(ast.parse(unpacked(module)))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) and len(node.body) > 1
    ]
    assert kept == ["RunSettings", "TrainSettings", "ModelSettings", "EvalSettings"]


def test_help_of_the_packed_script_is_the_same(module, capsys):
    """Usage, and every setting with its explanation and default."""
    train_gpt.show_help()
    expected = capsys.readouterr().out
    module.show_help()
    assert capsys.readouterr().out == expected


def test_packed_script_is_small(packed):
    """A quarter of the script."""
    assert packed.stat().st_size < SCRIPT.stat().st_size / 4


def test_packing_is_deterministic(packed, command_line, tmp_path):
    """The same script gives the same bytes."""
    assert command_line("pack", "again.py") == (0, "")
    assert (tmp_path / "again.py").read_bytes() == packed.read_bytes()


def test_packed_script_can_go_to_stdout(packed, tmp_path):
    """With `-` nothing else is written there; what it says goes to stderr."""
    command = [sys.executable, SCRIPT, "pack", "-"]
    result = subprocess.run(command, capture_output=True, cwd=tmp_path, check=True)
    assert result.stdout == packed.read_bytes()
    assert b" bytes instead of " in result.stderr


def test_packed_script_stays_unless_told(packed, command_line, tmp_path):
    """As every OUT: an error names it."""
    (tmp_path / "out.py").write_text("mine")
    assert "REPLACE=1" in error_line(command_line("pack", "out.py"), 2)
    assert (tmp_path / "out.py").read_text() == "mine"
    assert command_line("pack", "out.py", REPLACE="1") == (0, "")
    assert (tmp_path / "out.py").read_bytes() == packed.read_bytes()


def test_script_does_not_replace_itself(command_line):
    """What is read stays, whatever REPLACE says."""
    before = SCRIPT.read_bytes()
    assert "name another OUT" in error_line(command_line("pack", SCRIPT, REPLACE="1"), 2)
    assert SCRIPT.read_bytes() == before


def test_packed_script_counts_its_own_bytes(module, packed):
    """What counts against the cap is the file that runs."""
    assert packed.stat().st_size == module.CODE_BYTES


def test_packed_functions_have_a_source(module):
    """For tools that look for it."""
    assert inspect.getsource(module.unit).startswith("def unit(x):\n    dtype = ")


def test_packed_functions_compile(module):
    """torch.compile makes one graph of a packed function, as of the script's."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.arange(6.0).view(2, 3)
    compiled = torch.compile(module.unit, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), train_gpt.unit(x))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, settings",
    [
        (["evaluate"], {}),
        (["eval"], dict(ARTIFACT_PATH="none.lzma")),
        ([], dict(ALPHA_BAES="1")),
    ],
)
def test_packed_script_says_the_same(packed, tmp_path, args, settings):
    """Exit status, stdout and stderr of what is refused."""
    ends = [process(path, *args, cwd=tmp_path, **settings) for path in (SCRIPT, packed)]
    plain, small = ((end.returncode, end.stdout, end.stderr) for end in ends)
    assert small == plain
    assert plain[2].startswith("error: ")


@pytest.mark.slow
def test_packed_script_names_lines_in_tracebacks(packed, tmp_path):
    """An error that nobody foresaw shows the statement in which it arose, and no code words."""
    fault = "import ast\nast.unparse = lambda tree: 1 / 0\n"
    (tmp_path / "sitecustomize.py").write_text(fault)
    result = process(packed, "pack", "out.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert re.search(r'small\.py unpacked", line \d+, in pack\n +.*ast\.unparse\(', result.stderr)
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert max(map(len, result.stderr.splitlines())) < 1000


@pytest.mark.slow
def test_packed_script_packs_to_one_that_works(packed, tmp_path):
    """Packed twice, it is the same program."""
    result = process(packed, "pack", "again.py", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    result = process("again.py", "--help", cwd=tmp_path)
    assert result.stdout.startswith(train_gpt.__doc__)


# ---- A run by each of the two --------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(few_documents):
    """Settings of a tiny run with every stage, proved, on shards of a few documents."""
    return MODEL | few_documents | dict(TTT_ENABLED="1", VERIFY_ENABLED="1", VERIFY_TOKENS="150")


@pytest.fixture(scope="module")
def runs(corpus, packed, tmp_path_factory):
    """A run of the script and one of the packed script under torchrun, with one budget."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, launcher, path in (("plain", (), SCRIPT), ("packed", TORCHRUN, packed)):
        limit = BUDGET_BYTES + path.stat().st_size
        settings = {**corpus, "RUN_ID": name, "SIZE_LIMIT_BYTES": str(limit)}
        end = process(*launcher, path, cwd=folder, **settings)
        assert end.returncode == 0, end.stderr
        run_dir = folder / "logs" / name
        results = json.loads((run_dir / "results.json").read_bytes())
        found[name] = SimpleNamespace(dir=run_dir, path=path, results=results)
    return SimpleNamespace(folder=folder, **found)


@pytest.mark.slow
def test_both_scripts_write_the_same_artifact(runs):
    """Byte for byte, if it has the same room."""
    artifacts = [(run.dir / "model.int6.lzma").read_bytes() for run in (runs.plain, runs.packed)]
    assert artifacts[0] == artifacts[1]


@pytest.mark.slow
def test_both_scripts_commit_the_same_frequencies(runs):
    """The proofs are the same code words and checks of all frequencies, byte for byte."""
    proofs = [(run.dir / "proof.code").read_bytes() for run in (runs.plain, runs.packed)]
    assert proofs[0] == proofs[1]


@pytest.mark.slow
def test_both_scripts_score_and_prove_the_same(runs):
    """Every figure that is no time: losses, steps, digests, what the proof took."""

    def figures(results):
        stages = [{n: v for n, v in s.items() if n != "seconds"} for s in results["stages"]]
        train = {n: results["train"][n] for n in ("steps", "tokens", "stopped")}
        proof = {n: results["proof"][n] for n in ("tokens", "predicted_bits", "bytes_on_disk")}
        same = {n: results[n] for n in ("val_bpb", "shards", "validation", "seed", "command")}
        return stages, train, proof, same, results["artifact"]["sha256"]

    assert figures(runs.packed.results) == figures(runs.plain.results)
    assert [s["name"] for s in runs.plain.results["stages"]][-2:] == ["ttt", "mixer"]


@pytest.mark.slow
def test_each_script_counts_its_own_bytes(runs):
    """Beside an artifact of the same size."""
    for run in (runs.plain, runs.packed):
        sizes = run.results["artifact"]
        assert sizes["code_bytes"] == run.path.stat().st_size
        assert sizes["total_bytes"] == sizes["weights_bytes"] + run.path.stat().st_size


@pytest.mark.slow
def test_packed_run_is_submitted_by_the_packed_script(runs, tmp_path):
    """The record's script is what ran and was counted, and works in its folder."""
    results = runs.packed.dir / "results.json"
    end = process(runs.packed.path, "submit", "out", results, cwd=tmp_path)
    assert (end.returncode, end.stderr) == (0, "")
    record = tmp_path / "out" / "train_gpt.py"
    assert record.read_bytes() == runs.packed.path.read_bytes()
    assert process(record, "--help", cwd=record.parent).stdout.startswith(train_gpt.__doc__)
    summary = json.loads((tmp_path / "out" / "submission.json").read_bytes())
    assert summary["bytes_code"] == record.stat().st_size
    assert readme_table((tmp_path / "out" / "README.md").read_text())[0] == COLUMNS


@pytest.mark.slow
def test_command_of_the_readme_has_the_settings_of_the_run(runs, tmp_path):
    """What a shell takes out of the log gives the Config that has run."""
    results = runs.packed.dir / "results.json"
    assert process(runs.packed.path, "submit", "out", results, cwd=tmp_path).returncode == 0
    readme = (tmp_path / "out" / "README.md").read_text()
    command = re.search(r"env \$\(grep .*?train_gpt\.py\n", readme, re.DOTALL)[0]
    assert shlex.split(command)[-3:] == ["--standalone", "--nproc_per_node=1", "train_gpt.py"]
    settings = command[: command.index("\\")].replace("env ", "printf '%s\\n' ")
    env = {"seed": "1337", "PATH": "/usr/bin:/bin"}
    shell = subprocess.run(
        ["bash", "-c", settings], cwd=tmp_path / "out", env=env, capture_output=True, text=True
    )
    given = dict(line.split("=", 1) for line in shell.stdout.splitlines())
    found = train_gpt.config_from_env(given)
    assert found == train_gpt.Config(**runs.packed.results["settings"])


# ---- The folder of a record ----------------------------------------------------------------------

WORDS = dict(author="Ann", github_id="ann", name="A run", blurb="How.", track="10min_16mb")
SEEDS = {7: 1.25, 42: 1.5, 2024: 1.375}


def new_run(folder, seed, val_bpb=1.25, **changes):
    """Return the path of the results.json of a finished run of this script, its log beside it."""
    run_dir = folder / f"run{seed}"
    run_dir.mkdir()
    environment = dict(torch="2.13.0+cpu", source_sha256=digest(SCRIPT))
    path = Path(write_results(run_dir, seed, val_bpb, environment=environment, **changes))
    path = path.rename(run_dir / "results.json")
    (run_dir / "train.log").write_text(f"train run{seed}\n  SEED={seed}\n")
    (run_dir / "proof.code").write_bytes(b"code of %d" % seed)
    return path


def change(path, action):
    """Let action(results) change what is in a results.json."""
    run = json.loads(path.read_bytes())
    action(run)
    path.write_text(json.dumps(run))


@pytest.fixture
def results(tmp_path):
    """Paths of the results of three seeds, in a folder of their own."""
    (tmp_path / "logs").mkdir()
    return [new_run(tmp_path / "logs", seed, val_bpb) for seed, val_bpb in SEEDS.items()]


@pytest.fixture
def record(results, command_line, tmp_path):
    """The record of these seeds, with the words of the current folder's submission.json."""
    (tmp_path / "submission.json").write_text(json.dumps(WORDS))
    assert command_line("submit", "out", *results) == (0, "")
    return tmp_path / "out"


def contents(folder):
    """Return {path: bytes} of all files under a folder, links and folders as None."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_record_is_complete(record):
    """Files, keys, means, deviations, digests, and README, by an independent checker."""
    assert faults(record, SEEDS) == []


@pytest.mark.parametrize(
    "name, old, new, fault",
    [
        ("train_gpt.py", "import", "input", "train_gpt.py"),
        ("README.md", "| 42 | 3.000000 | 1.500000 |", "| 42 | 3.000000 | 1.499999 |", "row 42"),
        ("README.md", "## What was proved", "## What", "## What was proved"),
        ("submission.json", '"val_loss_std"', '"loss_std"', "val_loss_std"),
        ("submission.json", '\n "val_bpb": 1.375,', '\n "val_bpb": 1.374,', "val_bpb"),
    ],
)
def test_checker_sees_faults(record, name, old, new, fault):
    """What is amiss is named."""
    text = (record / name).read_text("utf-8")
    assert old in text
    (record / name).write_text(text.replace(old, new), "utf-8")
    assert fault in faults(record, SEEDS)


def test_record_has_logs_and_proofs_byte_for_byte(record, results):
    """A file a seed of each."""
    for seed, path in zip(SEEDS, results):
        log = record / f"train_seed{seed}.log"
        assert log.read_bytes() == path.with_name("train.log").read_bytes()
        proof = record / f"proof_seed{seed}.code"
        assert proof.read_bytes() == path.with_name("proof.code").read_bytes()


def test_record_has_the_script(record):
    """Byte for byte."""
    assert (record / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()


def test_record_has_what_summarize_gives(record, results, tmp_path):
    """One schema; the author's own file stays."""
    assert json.loads((tmp_path / "submission.json").read_bytes()) == WORDS
    summary = train_gpt.summarize(results)
    assert json.loads((record / "submission.json").read_bytes()) == summary
    assert summary.items() >= WORDS.items()


def test_record_takes_nothing_else(record, tmp_path):
    """Beside the folder nothing is new."""
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["logs", "out", "submission.json"]


def test_requirements_are_the_packages_of_the_script(record):
    """Those of this repository, with the torch that has run, without its build's name."""
    names = [
        re.findall(r"^[a-z]+", (folder / "requirements.txt").read_text(), re.MULTILINE)
        for folder in (record, ROOT)
    ]
    assert names[0] == names[1]
    assert "torch 2.13.0+cpu" in (record / "README.md").read_text()
    lines, ours = (
        (folder / "requirements.txt").read_text().splitlines() for folder in (record, ROOT)
    )
    assert lines[0] == "torch==2.13.0"
    assert lines[1:] == ours[1:]


def test_readme_begins_with_the_authors_words(record):
    """Name, score, blurb."""
    readme = (record / "README.md").read_text()
    assert readme.startswith("# A run 1.3750 bits per byte\n\nHow.\n")


def test_readme_explains_the_techniques(record):
    """In the script's own words."""
    assert train_gpt.__doc__ in (record / "README.md").read_text()


def test_readme_leaves_nothing_open(record):
    """No key in braces is left but those of the script's formulas."""
    readme = (record / "README.md").read_text().replace(train_gpt.__doc__, "")
    assert not re.findall(r"[{}]", readme)


def test_fewer_seeds_are_marked(results, command_line, tmp_path):
    """In the README too."""
    assert command_line("submit", "out", results[0]) == (0, "")
    assert "a submission needs 3" in (tmp_path / "out" / "README.md").read_text()


def lose_log(results):
    """As beside results of `eval`."""
    results[1].with_name("train.log").rename(results[1].with_name("eval.log"))


def lose_proof(results):
    """Take the code file away."""
    results[1].with_name("proof.code").unlink()


def fail_proof(results):
    """As after a decoder that gave up."""
    change(results[1], lambda run: run.pop("proof"))


def cut_short(results):
    """Leave the last stage away."""
    change(results[1], lambda run: run["stages"].pop())


def edit_script(results):
    """Let all be of another script."""
    for path in results:
        edit_script_of_one([path])


def edit_script_of_one(results):
    """Let one be of another script than the others."""
    change(results[-1], lambda run: run["environment"].update(source_sha256="1" * 64))


def repeat_seed(results):
    """Let two be of one seed."""
    change(results[2], lambda run: run["settings"].update(seed=7))


def make_folder(results):
    """Let the folder be there, with a file."""
    Path("out").mkdir()
    Path("out", "mine").write_text("mine")


def make_file(results):
    """Let the folder be a file."""
    Path("out").write_text("mine")


def break_words(results):
    """Let the author's words be no JSON."""
    Path("submission.json").write_text("{")


@pytest.mark.parametrize(
    "fault, words",
    [
        (lose_log, "run42/train.log"),
        (lose_proof, "run42/proof.code"),
        (fail_proof, "run42/results.json is not a finished run's results.json, with its proof"),
        (cut_short, "differ in STAGE"),
        (edit_script, "run7/results.json is of another script"),
        (edit_script_of_one, "differ in SOURCE_SHA256"),
        (repeat_seed, "same seed"),
        (make_folder, "cannot make out; name a new folder"),
        (make_file, "cannot make out; name a new folder"),
        (break_words, "submission.json is not a JSON object"),
    ],
)
def test_record_that_cannot_be_is_refused(results, command_line, tmp_path, fault, words):
    """One line says what is amiss, and no file is new or changed."""
    fault(results)
    before = contents(tmp_path)
    assert words in error_line(command_line("submit", "out", *results), 1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("args", [["submit"], ["submit", "out"], ["pack"], ["pack", "a", "b"]])
def test_incomplete_command_is_bad_usage(command_line, args):
    """Without a folder, results or a file."""
    assert "incomplete command" in error_line(command_line(*args), 2)


# ---- The committed logs --------------------------------------------------------------------------

LOGS = ROOT / "logs"


@pytest.fixture
def committed(tmp_path):
    """Copies of the folders of the two committed seeds, with a proof and the present digest."""
    paths = []
    for name in ("bench_seed1337", "bench_seed42"):
        shutil.copytree(LOGS / name, tmp_path / "logs" / name)
        paths.append(tmp_path / "logs" / name / "results.json")
        change(paths[-1], lambda run: run["environment"].update(source_sha256=digest(SCRIPT)))
        paths[-1].with_name("proof.code").write_bytes(b"code")
    return paths


def test_committed_logs_make_a_record(committed, command_line, tmp_path):
    """If the present script had made them."""
    assert command_line("submit", "out", *committed) == (0, "")
    assert faults(tmp_path / "out", [1337, 42]) == []


def test_committed_logs_are_of_another_script(command_line, tmp_path):
    """As they are, `submit` refuses them, in one line, and makes no folder."""
    paths = [LOGS / name / "results.json" for name in ("bench_seed1337", "bench_seed42")]
    message = error_line(command_line("submit", "out", *paths), 1)
    assert message == f"{paths[0]} is of another script; submit by the script that made it"
    assert list(tmp_path.iterdir()) == []


def test_committed_logs_of_two_scripts_are_refused(command_line):
    """Two results of one seed with other quantizers, whose differences are all named."""
    paths = [LOGS / name / "results.json" for name in ("bench_seed1337", "bench_seed1337_fisher")]
    message = error_line(command_line("submit", "out", *paths), 1)
    assert "differ in DEVICE, QUANTIZER, SOURCE_SHA256" in message


def test_committed_proof_is_no_run(command_line):
    """`verify` alone has scored nothing."""
    path = LOGS / "bench_seed1337_proof" / "results.json"
    assert "not a finished run's" in error_line(command_line("submit", "out", path), 1)


def test_committed_summary_is_of_the_committed_logs(monkeypatch):
    """submission.json has what `summarize` makes of them, but for the day."""
    monkeypatch.chdir(ROOT)
    paths = [LOGS / f"bench_bf16_seed{seed}" / "results.json" for seed in (1337, 42, 2024)]
    found = json.loads((ROOT / "submission.json").read_bytes())
    assert found == train_gpt.summarize(paths) | {"date": found["date"]}
