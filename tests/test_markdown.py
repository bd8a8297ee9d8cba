"""The pages follow GitHub's rules: math that renders, links, pictures and anchors that are there."""

import re
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
PAGES = ("README.md", "tutorial.md", "experiments/README.md")


def prose(name: str) -> str:
    """A page without its fences."""
    return re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(name: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(name), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def links(text: str) -> list[tuple[str, str]]:
    return re.findall(r"""(?:\[([^\]]*)\]\(|\bsrc(?:set)?=")([^)"\s]+)[)"]""", text)


@pytest.mark.parametrize("name", PAGES)
def test_fences_are_closed_and_no_line_in_them_is_cut_off(name):
    _, *fences = re.split(r"^```", (ROOT / name).read_text(), flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert not [line for fence in fences[::2] for line in fence.splitlines()[1:] if len(line) > 97]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_picture_and_anchor_is_there(name):
    for target in [target for _, target in links(prose(name)) if not target.startswith("https://")]:
        file, _, anchor = target.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name    # from that page's folder
        assert page.is_file() and page.resolve().is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("name", PAGES)
def test_math_stands_where_github_renders_it(name):
    text = prose(name)
    assert "$$" not in text
    assert not [line for line in text.splitlines() if line.startswith("#") and "$" in line]
    assert not [label for label, _ in links(text) if "$" in label]


@pytest.mark.parametrize("name", PAGES)
def test_inline_math_holds_nothing_that_markdown_eats(name):
    text = re.sub(r"(?<!\$)(`+)(?!\$).*?\1(?!\$)", "code", prose(name))
    for paragraph in text.split("\n\n"):
        parts = re.sub(r"\$`[^`]*`\$", "M", paragraph).split("$")       # prose, math, prose, ..., prose
        assert len(parts) % 2, paragraph
        for before, math, after in zip(parts[0::2], parts[1::2], parts[2::2]):
            assert not re.search(r"\\[,;:!%\\{}]|[*<|`\n]|[)}]_", math), math
            assert math == math.strip(), paragraph
            assert not re.search(r"\w\Z", before) and not re.match(r"\w", after), paragraph


@pytest.mark.parametrize("name", PAGES)
def test_tables_have_as_many_cells_in_every_row(name):
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(name), flags=re.MULTILINE):
        assert len({row.replace(r"\|", "").count("|") for row in table.splitlines()}) == 1, table
