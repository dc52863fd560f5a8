"""The tour of CONTRIBUTING.md is of the tree that there is."""

import re
from pathlib import Path

from test_architecture import RULES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_moe_ted"
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (`.+?`) \| .* \| (.+?) \|$", TEXT, re.MULTILINE))
TOUR = {name: may for names, may in ROWS.items() for name in re.findall(r"`([\w./]+)`", names)}
# entry points, and what type checkers read
NOT_SHOWN = {"__main__.py", "py.typed"}


def test_every_part_has_a_row() -> None:
    entries = {path.name + ("/" if path.is_dir() else "") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert {*TOUR} == entries - NOT_SHOWN


def test_what_parts_may_import_is_what_the_test_allows() -> None:
    for name, may in TOUR.items():
        rule = RULES[name.rstrip("/").removesuffix(".py")]
        said = {part.rstrip("/") for part in re.findall(r"`([a-z_/]+)`", may) if part.rstrip("/") in RULES}
        if not said or "all above" in may:
            continue
        allowed = {part.split(".")[0] for part in (*rule.parts, *rule.optional_parts)}
        assert said == allowed, name


def test_files_that_are_named_exist() -> None:
    names = set(re.findall(r"`([\w./]+/(?:[\w.]+\.\w+)?)`", TEXT)) | set(re.findall(r"\]\(([\w./]+)\)", TEXT))
    assert len(names) > 30
    places = (ROOT, PACKAGE, ROOT / "tests")
    missing = [name for name in names if not any((place / name).exists() for place in places)]
    assert [name for name in missing if not any(PACKAGE.rglob(name.rstrip("/")))] == []


def test_recipes_name_what_there_is() -> None:
    recipes = TEXT.partition("## How to add")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\*\*", recipes, re.MULTILINE)) == 5
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"`([A-Z]\w+)`", recipes):
        assert re.search(rf"^(class {name}\b|{name}\b.* = )", sources, re.MULTILINE), name
