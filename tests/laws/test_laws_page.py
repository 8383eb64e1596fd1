"""docs/laws.md: an entry for every law that is spoken of, a test for every law, and no file that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^## Law (\d+): .+$", re.MULTILINE)
# "law 6", "laws 6 and 11", "laws 6, 7 and 11"; a figure in brackets or a file's name is none
SPOKEN_OF = re.compile(r"\blaws? (\d+(?:(?:, | and | or )\d+)*)\b", re.IGNORECASE)
FILE = re.compile(r"`((?:repsft_fast|csrc_triton|benchmarks|tests|docs)/[\w./-]+)`")
PARTS = ("**Says.**", "**Exceptions.**", "**Why.**", "**Held by**")


def spoken_of(text: str) -> set[int]:
    flat = re.sub(r"\s+", " ", text.replace("\n#", "\n"))  # a comment goes on in its next line
    return {int(number) for found in SPOKEN_OF.findall(flat) for number in re.findall(r"\d+", found)}


def texts() -> dict[str, str]:
    """Everything that may speak of a law: sources, tests and pages."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("repsft_fast", "csrc_triton", "benchmarks", "tests", "docs"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")]
    return {
        str(p.relative_to(ROOT)): p.read_text(encoding="utf-8")
        for p in found
        if p.name != Path(__file__).name
    }


def entries() -> dict[int, str]:
    """Law → its text on the page."""
    starts = list(HEADING.finditer(PAGE))
    ends = [match.start() for match in starts[1:]] + [len(PAGE)]
    return {int(m[1]): PAGE[m.end() : end] for m, end in zip(starts, ends, strict=True)}


LAWS = entries()


def test_the_laws_are_twelve_in_order():
    assert list(LAWS) == list(range(1, 13))
    assert [int(n) for n in re.findall(r"^\| \[(\d+)\]\(#", PAGE, re.MULTILINE)] == list(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_says_what_why_and_where(law):
    at = [LAWS[law].index(part) for part in PARTS]
    assert at == sorted(at)
    held = LAWS[law].split("**Held by**")[1]
    assert any(name.startswith(f"tests/laws/test_law{law}_") for name in FILE.findall(held))
    assert list((ROOT / "tests" / "laws").glob(f"test_law{law}_*.py"))


def test_every_file_named_is_there():
    named = set(FILE.findall(PAGE))
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_test_of_a_law_is_named():
    there = {f"tests/laws/{p.name}" for p in (ROOT / "tests" / "laws").glob("test_law[0-9]*.py")}
    assert there - set(FILE.findall(PAGE)) == set()


def test_every_law_that_is_spoken_of_has_its_entry():
    unknown = {name: sorted(spoken_of(text) - set(LAWS)) for name, text in texts().items()}
    assert {name: laws for name, laws in unknown.items() if laws} == {}
    assert set().union(*map(spoken_of, texts().values())) == set(LAWS)


def test_links_to_an_entry_lead_there():
    """A heading's anchor as it is made of its words: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {link for link in re.findall(r"\(#([^)]+)\)", PAGE)} <= anchors


@pytest.mark.parametrize(
    ("text", "laws"),
    [
        ("as law 3 says", {3}),
        ("Else laws 6, 7 and 11 fall.", {6, 7, 11}),
        ("Law\n11", {11}),
        ("of law\n# 12", {12}),
        ("outlaw 5, by_law 7, laws.py 3", set()),
    ],
)
def test_laws_are_found_as_people_write_them(text, laws):
    assert spoken_of(text) == laws
