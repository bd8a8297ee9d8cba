"""README.md and experiments/README.md tell the truth about files, commands and code.

The accuracies in them are of the commands they name.
"""

import re
import shlex
from pathlib import Path

import pytest

import train
from experiments import compare

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text()
FENCES = re.findall(r"(<!-- not run -->\n)?```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[str]:
    """The commands of both pages that run `program`, a pattern, without line breaks."""
    text = re.sub(r"\\\n *", "", README + EXPERIMENTS)
    fenced = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    in_prose = re.findall(rf"`({program}[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return in_prose + [found for code in fenced for found in re.findall(rf"{program}[^\n&]*", code)]


def words(command: str) -> list[str]:
    """The command's words, with a value for each placeholder."""
    return shlex.split(re.sub(r"\b[A-Z]+\b", lambda word: {"METHOD": "lopa"}.get(word[0], "1"), command))


def test_line_counts_of_the_file_map_are_true():
    counted = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, flags=re.MULTILINE)
    assert {name for name, _ in counted} >= {"lopa.py", "model.py", "data.py", "train.py"}
    for name, lines in counted:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_python_blocks_run():
    blocks = [code for not_run, language, code in FENCES if language == "python" and not not_run]
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", commands(r"(?:python|torchrun [^\n`]*) train\.py"))
def test_every_command_is_one_that_train_py_takes(command):
    flags = words(command)[words(command).index("train.py") + 1:]
    if "--help" not in flags:
        train.build_parser().parse_args(flags)


@pytest.mark.parametrize("command", commands(r"python -m experiments\.compare"))
def test_every_comparison_is_one_that_compare_py_takes(command):
    compare.build_parser().parse_args(words(command)[3:])


def test_every_experiment_that_is_named_is_there():
    named = set(re.findall(r"experiments\.(\w+)", README + EXPERIMENTS))
    assert {(ROOT / "experiments" / f"{name}.py").is_file() for name in named} == {True}
    assert named | {"evidence"} == {path.stem for path in (ROOT / "experiments").glob("*.py")}     # no program


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "results").glob("*/runs.jsonl")), ids=lambda path: path.parent.name)
def test_the_tables_of_the_real_model_are_those_of_the_committed_runs(path):
    assert compare.table(path) in EXPERIMENTS
