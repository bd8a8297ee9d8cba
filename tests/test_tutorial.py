"""tutorial.md tells the truth: its code runs in order, prints what the page says, and quotes lopa.py as it is."""

import contextlib
import io
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch

import data
import train
from experiments import compare

ROOT = Path(train.__file__).parent
TUTORIAL = (ROOT / "tutorial.md").read_text()
KINDS = ("python", "text", "sh", "mermaid", "math")
QUOTED = "# from lopa.py\n"


def fences(text: str) -> list[tuple[str, int, str]]:
    """(kind, number of the first line inside, content) of every fence; ValueError for one that cannot be read."""
    found, kind, begun, lines = [], None, 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.lstrip(" >\t").startswith(("```", "~~~")):
            lines.append(line)
        elif kind is None and (opening := re.fullmatch(r"```(\w+)", line)) and opening[1] in KINDS:
            kind, begun, lines = opening[1], number + 1, []
        elif kind is not None and line == "```":
            found.append((kind, begun, "".join(f"{line}\n" for line in lines)))
            kind = None
        else:
            raise ValueError(f"line {number}: {line!r} neither opens a fence of kind {', '.join(KINDS)} nor closes one")
    if kind is not None:
        raise ValueError(f"line {begun - 1}: this fence is never closed")
    return found


def run(blocks: list[tuple[str, int, str]]) -> None:
    """Execute the python fences in one namespace; AssertionError where the output is not the text fence after it."""
    namespace = {"__name__": "tutorial"}
    for i, (kind, line, code) in enumerate(blocks):
        follower = blocks[i + 1][0] if i + 1 < len(blocks) else None
        if kind == "text":
            assert i and blocks[i - 1][0] == "python" and not blocks[i - 1][2].startswith(QUOTED), \
                f"line {line}: output of nothing"
        if kind != "python" or code.startswith(QUOTED):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, "tutorial.md", "exec"), namespace)     # so errors name the line
        assert printed.getvalue() == (blocks[i + 1][2] if follower == "text" else ""), f"line {line} prints something else"


@pytest.mark.slow
def test_every_block_runs_in_order_and_prints_what_the_page_says(tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))               # the page adds one
    with torch.random.fork_rng():
        run(fences(TUTORIAL))


def test_quoted_source_is_the_files_own():
    source = (ROOT / "lopa.py").read_text().splitlines()
    quoted = [(line, code) for kind, line, code in fences(TUTORIAL) if kind == "python" and code.startswith(QUOTED)]
    assert quoted
    for line, code in quoted:
        wanted = textwrap.dedent(code.removeprefix(QUOTED))
        n = len(wanted.splitlines())
        windows = ("\n".join(source[i:i + n]) for i in range(len(source)))
        assert any(textwrap.dedent(window).strip() == wanted.strip() for window in windows), f"line {line} is not in lopa.py"


def test_equation_numbers_are_those_that_the_code_cites():
    tags = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", TUTORIAL)]
    cited = {name: {int(n) for n in re.findall(r"Eqs?\. \((\d+)\)", (ROOT / name).read_text())} for name in ("lopa.py", "model.py")}
    assert tags == list(range(1, 13))
    assert cited["lopa.py"] | cited["model.py"] == set(tags)
    assert cited["model.py"] == {5}


def test_code_blocks_are_short():
    page = TUTORIAL[:TUTORIAL.index("\n## 8.")]                        # the loop and the answers may be longer
    for kind, line, code in fences(page):
        if kind == "python" and not code.startswith(QUOTED):
            assert len([row for row in code.splitlines() if row.strip()]) <= 10, f"line {line}"


@pytest.mark.parametrize("command", [command for kind, _, code in fences(TUTORIAL) if kind == "sh" for command in code.splitlines()])
def test_every_command_is_one_that_its_program_takes(command, monkeypatch):
    monkeypatch.setitem(data.TASKS, "weather", data.TASKS["sst2"])     # the example of a task of one's own
    launcher, program, flags = re.fullmatch(r"(.+) (train\.py|-m experiments\.compare) (.+)", command).groups()
    if program == "train.py":
        assert launcher in ("python", "torchrun --nproc_per_node=2")
        parse = train.build_parser().parse_args if "--resume" in flags else train.parse_args   # no folder to resume
    else:
        assert launcher == "python"
        parse = compare.parse_args
    parse(shlex.split(flags))


def test_there_are_at_least_ten_exercises_and_each_has_an_answer():
    exercises = [int(n) for n in re.findall(r"^\*\*Exercise (\d+)\.\*\*", TUTORIAL, flags=re.MULTILINE)]
    answers = [int(n) for n in re.findall(r"^\*\*(\d+)\.\*\*", TUTORIAL, flags=re.MULTILINE)]
    assert exercises == answers == list(range(1, len(answers) + 1)) and len(answers) >= 10


@pytest.mark.parametrize("page", [
    "```rust\n```\n", "```\nplain\n```\n", "```python\nprint(1)\n", "  ```python\n  ```\n", "```python \n```\n", "~~~python\n~~~\n",
    "````python\n````\n", "```python\n```python\n```\n",
])
def test_a_fence_that_cannot_be_read_is_an_error(page):
    with pytest.raises(ValueError, match="line"):
        fences(page)


@pytest.mark.parametrize("page", [
    "```python\nprint(1)\n```\n```text\n2\n```\n", "```python\nprint(1)\n```\n", "```python\nx = 1\n```\n```text\n1\n```\n",
    "```text\n1\n```\n", "```python\nprint(1)\n```\n```text\n1\n```\n```text\n1\n```\n",
])
def test_a_wrong_output_is_an_error(page):
    with pytest.raises(AssertionError):
        run(fences(page))


def test_blocks_share_one_namespace():
    run(fences("```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n2\n```\n"))
