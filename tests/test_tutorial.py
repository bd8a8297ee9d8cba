"""tutorial.md tells the truth: its code runs in order, prints what the page says, and quotes lopa.py as it is."""

import contextlib
import io
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import train
from experiments import compare

ROOT = Path(train.__file__).parent
TUTORIAL = (ROOT / "tutorial.md").read_text()
# Python that is shown and not run is marked as jupytext has it; an output's numbers may have a tolerance.
OPENING = re.compile(r"```(?:(text) within (\d+(?:\.\d+)?)|(python) \.noeval|(python|text|math))")
QUOTED = "# from lopa.py\n"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d)")


class Fence(NamedTuple):
    kind: str
    line: int                            # number of the first line inside
    content: str
    within: float | None = None          # how far the numbers of an output may be from the page's


def fences(text: str) -> list[Fence]:
    """Every fence of a page; ValueError for one that cannot be read."""
    found, kind, begun, within, lines = [], None, 0, None, []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.lstrip(" >\t").startswith(("```", "~~~")):
            lines.append(line)
        elif kind is None and (opening := OPENING.fullmatch(line)):
            output, tolerance, shown, plain = opening.groups()
            kind = output or plain or "shown python"
            begun, within, lines = number + 1, tolerance and float(tolerance), []
        elif kind is not None and line == "```":
            found.append(Fence(kind, begun, "".join(f"{line}\n" for line in lines), within))
            kind = None
        else:
            raise ValueError(f"line {number}: {line!r} neither opens a fence of python, text or math nor closes one")
    if kind is not None:
        raise ValueError(f"line {begun - 1}: this fence is never closed")
    return found


def differences(printed: str, wanted: str, within: float | None) -> list[str]:
    """What an output has otherwise than the page: its words and spaces exactly, its numbers within a tolerance.

    Without one, everything exactly. A number's digits after the point are part of the format, as a word is.
    """
    if within is None:
        return [] if printed == wanted else [f"printed {printed!r}, the page has {wanted!r}"]

    def form(number: re.Match) -> str:
        return "#" + "." * ("." in number[0]) + "d" * len(number[0].partition(".")[2])

    if NUMBER.sub(form, printed) != NUMBER.sub(form, wanted):
        return [f"other words: printed {printed!r}, the page has {wanted!r}"]
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(wanted))
    return [f"{ours} is not within {within} of {theirs}" for ours, theirs in pairs
            if not abs(float(ours.replace(",", "")) - float(theirs.replace(",", ""))) <= within + 1e-9]


def run(blocks: list[Fence]) -> None:
    """Execute the python fences in one namespace; AssertionError where the output is not the text fence after it."""
    namespace, wrong, nothing = {"__name__": "tutorial"}, [], Fence("", 0, "")
    for (kind, line, code, _), (next_kind, next_line, wanted, within) in zip([nothing, *blocks], [*blocks, nothing]):
        if next_kind == "text":
            assert kind == "python", f"line {next_line}: output of nothing"
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * (line - 1) + code, "tutorial.md", "exec"), namespace)     # so errors name the line
            output = (wanted, within) if next_kind == "text" else ("", None)
            wrong += [f"line {line}: {problem}" for problem in differences(printed.getvalue(), *output)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_block_runs_in_order_and_prints_what_the_page_says(tiny, request):
    page = request.config.page                                         # conftest.py has started it, beside the other tests
    printed, _ = page.communicate()
    assert page.returncode == 0, printed


def test_quoted_source_is_the_files_own():
    source = (ROOT / "lopa.py").read_text().splitlines()
    quoted = [fence for fence in fences(TUTORIAL) if fence.content.startswith(QUOTED)]
    assert {fence.kind for fence in quoted} == {"shown python"}
    for _, line, code, _ in quoted:
        _, *wanted = code.splitlines()
        windows = (textwrap.dedent("\n".join(source[i:i + len(wanted)])) for i in range(len(source)))
        assert "\n".join(wanted) in windows, f"line {line} is not in lopa.py"


def test_equation_numbers_are_those_that_the_code_cites():
    tags = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", TUTORIAL)]
    lopa, model = ({int(n) for n in re.findall(r"Eqs?\. \((\d+)\)", (ROOT / name).read_text())}
                   for name in ("lopa.py", "model.py"))
    assert sorted(tags) == list(range(1, 13)) and lopa | model == set(tags) and model == {5}


@pytest.mark.parametrize("command", re.findall(r"(?<!`)`(python [^`]+)`", TUTORIAL))
def test_every_command_is_one_that_its_program_takes(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()                                      # the example of a folder with a model
    program, flags = re.fullmatch(r"python (train\.py|-m experiments\.compare|-m experiments\.any_model) (.+)", command).groups()
    parser = (compare if program.endswith("compare") else train).build_parser()
    parser.parse_args(shlex.split("--model " * program.endswith("any_model") + flags))     # as any_model.main has it


def test_there_are_at_least_ten_exercises_and_each_has_an_answer():
    exercises, answers = (re.findall(rf"^\*\*{word}(\d+)\.\*\*", TUTORIAL, flags=re.MULTILINE) for word in ("Exercise ", ""))
    assert exercises == answers == [str(n + 1) for n in range(len(answers))] and len(answers) >= 10


@pytest.mark.parametrize("page", [
    "```rust\n```\n", "```python\nprint(1)\n", "  ```python\n  ```\n", "~~~python\n~~~\n", "```python\n```python\n```\n",
    "```python within 1\n```\n", "```text within a lot\n```\n", "```text within 0.03 \n```\n"])
def test_a_fence_that_cannot_be_read_is_an_error(page):
    with pytest.raises(ValueError, match="line"):
        fences(page)


@pytest.mark.parametrize("page", [
    "```python\nprint(1)\n```\n```text\n2\n```\n", "```python\nprint(1)\n```\n", "```python\nx = 1\n```\n```text\n1\n```\n",
    "```text\n1\n```\n", "```python\nprint(1)\n```\n```text\n1\n```\n```text\n1\n```\n"])
def test_a_wrong_output_is_an_error(page):
    with pytest.raises(AssertionError, match="line"):
        run(fences(page))


@pytest.mark.parametrize("ours, theirs, within, same", [
    ("LoPA 0.99, of 872", "LoPA 0.96, of 872", 0.03, True), ("LoPA 0.99", "LoPA 0.95", 0.03, False),
    ("LoPA 0.99", "IDPG 0.99", 0.03, False), ("LoPA 0.99", "LoPA  0.99", 0.03, False), ("LoPA 0.99", "LoPA 0.990", 0.03, False),
    ("LoPA 0.99", "LoPA", 0.03, False), ("LoPA1 0.99", "LoPA2 0.99", 5, False), ("1,234", "1,230", 5, True),
    ("1,234", "1,220", 5, False), ("x -0.01", "x 0.01", 0.03, True), ("-0.1", "0.1", 0.03, False), ("nan", "0.1", 1, False),
    ("[0.1, 0.2]", "[0.2, 0.1]", 0.05, False), ("True", "False", 1, False)])
def test_an_output_may_differ_by_its_numbers_alone_and_within_the_tolerance(ours, theirs, within, same):
    assert (differences(ours, theirs, within) == []) is same


def test_blocks_share_one_namespace_and_what_is_marked_as_shown_is_not_run():
    run(fences("```python\nx = 1\n```\n```python .noeval\n1 / 0\n```\n```python\nprint(x + 1)\n```\n```text within 1\n3\n```\n"))


if __name__ == "__main__":
    run(fences(TUTORIAL))
