"""Links of README and docs lead somewhere, and the reference has every public name."""

import re
from pathlib import Path

import pytest

import hf_moe_ted

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s#:]*)(?:#(?P<anchor>[^)\s]+))?\)")
RECORD = re.compile(r"\b[A-Za-z][A-Za-z0-9_]*_20\d\d-\d\d-\d\d\b")
FOLDERS_WITH_TEXT = ("src", "tests", "docs", "examples", "convert", "model_cards", ".github")
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml", ".cfg")
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Names of the headings, as the site and the repository's page make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page's text to files or headings that are not there."""
    broken = []
    for link in LINK.finditer(CODE.sub("", text)):
        target = page.parent / link["target"] if link["target"] else page
        if not target.exists() or (link["anchor"] and link["anchor"] not in anchors_of(target)):
            broken.append(link[0])
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_seen() -> None:
    text = "[a](files.md) [b](no_such.md) [c](training.md#mixture) [d](training.md#no-such) `[e](no.md)` [f](#no-such)"
    assert broken_links(DOCS / "index.md", text) == ["](no_such.md)", "](training.md#no-such)", "](#no-such)"]


def test_records_that_are_named_are_there() -> None:
    """In code and comments, too: a record that replaces another has its date, and so another name."""
    files = [path for folder in FOLDERS_WITH_TEXT for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [path for path in ROOT.glob("*") if path.suffix in SUFFIXES]
    records = {path.stem for path in DOCS.rglob("*_20*")}
    named = {(record, path.relative_to(ROOT)) for path in files for record in RECORD.findall(path.read_text("utf-8"))}
    assert len(named) > 50
    assert {(record, str(path)) for record, path in named if record not in records} == set()


def test_the_start_page_leads_to_every_guide() -> None:
    linked = {link["target"] for link in LINK.finditer((DOCS / "index.md").read_text(encoding="utf-8"))}
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


def test_reference_has_every_public_name() -> None:
    entries = [name for page in (DOCS / "reference").glob("*.md") for name in DIRECTIVE.findall(page.read_text())]
    names = [entry.rsplit(".", 1)[1] for entry in entries]
    assert sorted(names) == sorted(hf_moe_ted.__all__)
    for entry in entries:
        module, name = entry.rsplit(".", 1)
        assert getattr(hf_moe_ted, name).__module__ == module
    listed = re.findall(r"^\| \[`(\w+)`\]", (DOCS / "reference" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(hf_moe_ted.__all__)
