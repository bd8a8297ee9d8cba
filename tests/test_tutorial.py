"""tutorial.md tells the truth: its code runs in order, prints what the page says, and quotes lopa.py as it is."""

import contextlib
import io
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import data
import train
from experiments import compare

ROOT = Path(train.__file__).parent
TUTORIAL = (ROOT / "tutorial.md").read_text()
KINDS = ("python", "text", "shown python", "sh", "mermaid", "math")
# Python and commands that are shown and not run are marked as jupytext has it; an output's numbers may have a tolerance.
OPENING = re.compile(r"```(?:(text) within (\d+(?:\.\d+)?)|(python|sh) \.noeval|(python|text|mermaid|math))")
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
            kind = output or plain or {"python": "shown python", "sh": "sh"}[shown]
            begun, within, lines = number + 1, tolerance and float(tolerance), []
        elif kind is not None and line == "```":
            found.append(Fence(kind, begun, "".join(f"{line}\n" for line in lines), within))
            kind = None
        else:
            raise ValueError(f"line {number}: {line!r} neither opens a fence of kind {', '.join(KINDS)} nor closes one")
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
    namespace, wrong = {"__name__": "tutorial"}, []
    for i, (kind, line, code, _) in enumerate(blocks):
        follower = blocks[i + 1] if i + 1 < len(blocks) else None
        if kind == "text":
            assert i and blocks[i - 1].kind == "python", f"line {line}: output of nothing"
        if kind not in ("python", "shown python") or code.startswith(QUOTED):
            continue
        program = compile("\n" * (line - 1) + code, "tutorial.md", "exec")     # so errors name the line
        if kind == "shown python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, namespace)
        wanted, within = (follower.content, follower.within) if follower and follower.kind == "text" else ("", None)
        wrong += [f"line {line}: {problem}" for problem in differences(printed.getvalue(), wanted, within)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_block_runs_in_order_and_prints_what_the_page_says(tiny, request):
    page = request.config.page                                         # conftest.py has started it, beside the other tests
    printed, _ = page.communicate()
    assert page.returncode == 0, printed


def test_quoted_source_is_the_files_own():
    source = (ROOT / "lopa.py").read_text().splitlines()
    quoted = [(line, code) for _, line, code, _ in fences(TUTORIAL) if code.startswith(QUOTED)]
    assert {kind for kind, _, code, _ in fences(TUTORIAL) if code.startswith(QUOTED)} == {"shown python"}
    assert quoted
    for line, code in quoted:
        wanted = textwrap.dedent(code.removeprefix(QUOTED))
        n = len(wanted.splitlines())
        windows = ("\n".join(source[i:i + n]) for i in range(len(source)))
        assert any(textwrap.dedent(window).strip() == wanted.strip() for window in windows), f"line {line} is not in lopa.py"


def test_equation_numbers_are_those_that_the_code_cites():
    tags = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", TUTORIAL)]
    cited = {name: {int(n) for n in re.findall(r"Eqs?\. \((\d+)\)", (ROOT / name).read_text())} for name in ("lopa.py", "model.py")}
    assert sorted(tags) == list(range(1, 13))                          # (3) and (4) stand with the relatives
    assert cited["lopa.py"] | cited["model.py"] == set(tags)
    assert cited["model.py"] == {5}


def test_code_blocks_are_short():
    page = TUTORIAL[:TUTORIAL.index("\n## 8.")]                        # the loop and the answers may be longer
    for kind, line, code, _ in fences(page):
        if kind == "python":
            assert len([row for row in code.splitlines() if row.strip()]) <= 10, f"line {line}"


@pytest.mark.parametrize("command", [command for kind, _, code, _ in fences(TUTORIAL) if kind == "sh"
                                     for command in code.splitlines() if not command.startswith(("jupyt", "pip "))])
def test_every_command_is_one_that_its_program_takes(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()                                      # the example of a folder with a model
    launcher, program, flags = re.fullmatch(
        r"(.+) (train\.py|-m experiments\.compare|-m experiments\.any_model) (.+)", command).groups()
    assert launcher in ("python", "torchrun --nproc_per_node=2")
    parser = (compare if program.endswith("compare") else train).build_parser()
    parser.parse_args(shlex.split("--model " * program.endswith("any_model") + flags))     # as any_model.main has it


def test_there_are_at_least_ten_exercises_and_each_has_an_answer():
    exercises = [int(n) for n in re.findall(r"^\*\*Exercise (\d+)\.\*\*", TUTORIAL, flags=re.MULTILINE)]
    answers = [int(n) for n in re.findall(r"^\*\*(\d+)\.\*\*", TUTORIAL, flags=re.MULTILINE)]
    assert exercises == answers == list(range(1, len(answers) + 1)) and len(answers) >= 10


@pytest.mark.parametrize("page", [
    "```rust\n```\n", "```\nplain\n```\n", "```python\nprint(1)\n", "  ```python\n  ```\n", "```python \n```\n", "~~~python\n~~~\n",
    "````python\n````\n", "```python\n```python\n```\n", "```python within 1\n```\n", "```text within\n```\n",
    "```text within a lot\n```\n", "```sh\n```\n", "```text .noeval\n```\n", "```text about 0.03\n```\n", "```text within 0.03 \n```\n",
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


@pytest.mark.parametrize("page_says", ["LoPA 0.99, of 872\n", "LoPA 0.96, of 872\n", "LoPA 1.02, of 872\n"])
def test_numbers_may_differ_by_the_tolerance_that_the_fence_states(page_says):
    run(fences("```python\nprint('LoPA 0.99, of 872')\n```\n```text within 0.03\n" + page_says + "```\n"))


@pytest.mark.parametrize("page_says", [
    "LoPA 0.95, of 872\n", "LoPA 1.03, of 872\n", "LoPA -0.99, of 872\n", "LoPA 0.99, of 873\n", "IDPG 0.99, of 872\n",
    "LoPA 0.99, of  872\n", "LoPA 0.990, of 872\n", "LoPA 0.99, of 872 rows\n", "LoPA 0.99\n", "LoPA nan, of 872\n",
    "LoPA 0.99, of 872\n\n", "LoPA1 0.99, of 872\n", "",
])
def test_a_number_outside_the_tolerance_and_any_other_word_are_errors(page_says):
    page = "```python\nprint('LoPA 0.99, of 872')\n```\n```text within 0.03\n" + page_says + "```\n"
    with pytest.raises(AssertionError, match="line 2"):
        run(fences(page))


@pytest.mark.parametrize("ours, theirs, within, same", [
    ("1,234", "1,230", 5, True), ("1,234", "1,220", 5, False), ("-0.01", "0.01", 0.03, True), ("x -0.01", "x 0.01", 0.03, True),
    ("-0.1", "0.1", 0.03, False), ("v2", "v3", 5, False), ("m = 10: 3", "m = 10: 4", 1, True), ("nan", "0.1", 1, False),
    ("inf", "0.1", 1, False), ("[0.1, 0.2]", "[0.2, 0.1]", 0.05, False), ("[0.1, 0.2]", "[0.12, 0.18]", 0.05, False),
    ("[0.10, 0.20]", "[0.12, 0.18]", 0.05, True), ("True", "False", 1, False),
])
def test_differences(ours, theirs, within, same):
    assert (differences(ours, theirs, within) == []) is same


def test_what_is_marked_as_not_run_is_not_run_but_has_to_be_python():
    run(fences("```python .noeval\n1 / 0\n```\n"))
    with pytest.raises(SyntaxError):
        run(fences("```python .noeval\n1 /\n```\n"))


def test_blocks_share_one_namespace():
    run(fences("```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n2\n```\n"))


if __name__ == "__main__":
    run(fences(TUTORIAL))
