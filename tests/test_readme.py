"""README.md tells the truth about files, commands and code; the accuracies in it are of the commands it names."""

import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"(<!-- not run -->\n)?```(\w*)\n(.*?)```", README, flags=re.DOTALL)


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


@pytest.mark.parametrize("command", [
    line for _, language, code in FENCES if language == "sh"
    for line in re.findall(r"(?:python|torchrun [^\n]*) train\.py[^\n&]*", re.sub(r"\\\n *", "", code))
] + re.findall(r"`(python train\.py [^`]*)`", README))
def test_every_command_is_one_that_train_py_takes(command):
    words = shlex.split(re.sub(r"\b[A-Z]+\b", lambda word: {"METHOD": "lopa"}.get(word[0], "1"), command))
    if "--resume" in words:                                            # there is no such folder here
        train.build_parser().parse_args(words[words.index("train.py") + 1:])
    elif "--help" not in words:
        train.parse_args(words[words.index("train.py") + 1:])
