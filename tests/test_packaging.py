"""Metadata of the package: versions agree, requirements are those that are imported, and bounds are those tested."""

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_moe_ted

ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PRIVATE_NAMES_OF = ("torch", "transformers", "accelerate")  # docs/private_names.md
# imported where they are installed: Triton comes with PyTorch for GPUs, the others with what makes their files
OPTIONAL = {"triton", "sentencepiece", "deepspeed", "peft", "pydantic-core"}


def requirements(text: str) -> dict[str, Requirement]:
    found = map(Requirement, filter(None, (line.strip() for line in text.splitlines())))
    return {canonicalize_name(one.name): one for one in found}


REQUIRED = requirements(SETUP["options"]["install_requires"])
EXTRAS = {name: requirements(text) for name, text in SETUP["options.extras_require"].items()}
OF_EXTRAS = {name: requirement for extra in EXTRAS.values() for name, requirement in extra.items()}


def imported_packages() -> set[str]:
    """Distributions whose modules the source imports."""
    names = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    known = packages_distributions()
    distributions = {name: known.get(name, [name])[0] for name in names - sys.stdlib_module_names - {"hf_moe_ted"}}
    return {*map(canonicalize_name, distributions.values())}


def test_versions_agree() -> None:
    here = SETUP["metadata"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    heading = re.search(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    assert (here, here) == (heading[1], citation["version"])
    assert heading[2] == str(citation["date-released"])


def test_changelog_is_in_order() -> None:
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    released = [(Version(number), date) for number, date in headings if number != "Unreleased"]
    assert released == sorted(released, reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)


def test_version_of_the_package_is_that_of_its_metadata() -> None:
    try:
        assert hf_moe_ted.__version__ == version("hf-moe-ted")
    except PackageNotFoundError:
        assert hf_moe_ted.__version__ == "0+unknown"


def test_what_is_imported_is_required() -> None:
    declared = {*REQUIRED, *(name for extra, names in EXTRAS.items() if extra != "dev" for name in names)}
    assert imported_packages() - declared - OPTIONAL == set()


def test_what_is_required_is_imported() -> None:
    assert {*REQUIRED} - imported_packages() == set()


def test_extras_that_are_named_exist() -> None:
    of_ours = [one for names in EXTRAS.values() for one in names.values() if one.name == "hf-moe-ted"]
    assert of_ours and {extra for one in of_ours for extra in one.extras} <= {*EXTRAS}


@pytest.mark.parametrize("name", PRIVATE_NAMES_OF)
def test_packages_with_private_names_are_bounded_by_what_was_read(name: str) -> None:
    section = re.search(rf"^## {name}, read in (.+)$", (ROOT / "docs/private_names.md").read_text(), re.MULTILINE)
    assert section is not None
    read = [Version(number) for number in re.findall(r"[\d.]+\d", section[1])]
    bounds = {one.operator: Version(one.version) for one in REQUIRED[name].specifier}
    first, newest = min(read), max(read)
    assert bounds == {">=": Version(f"{first.major}.{first.minor}"), "<": Version(f"{newest.major}.{newest.minor + 1}")}


def test_constraints_are_admitted() -> None:
    for file in ("constraints.txt", "constraints-oldest.txt"):
        pins = requirements("\n".join(re.sub("#.*", "", line) for line in (ROOT / file).read_text().splitlines()))
        for name, requirement in {**OF_EXTRAS, **REQUIRED}.items():
            (pin,) = pins[name].specifier if name in pins else [None]
            assert pin is None or requirement.specifier.contains(pin.version), f"{file}: {pins[name]}, {requirement}"


def test_what_makes_the_pages_is_bounded_and_pinned() -> None:
    pins = requirements((ROOT / "constraints.txt").read_text().partition("\n")[2])
    assert all("<" in {one.operator for one in requirement.specifier} for requirement in EXTRAS["docs"].values())
    assert {*EXTRAS["docs"]} <= {*pins}


def test_oldest_constraints_are_the_lower_bounds() -> None:
    pins = requirements(
        "\n".join(re.sub("#.*", "", line) for line in (ROOT / "constraints-oldest.txt").read_text().splitlines())
    )
    for name in (*PRIVATE_NAMES_OF, "peft", "huggingface-hub"):
        (lowest,) = [one.version for one in ({**EXTRAS["dev"], **REQUIRED})[name].specifier if one.operator == ">="]
        (pin,) = pins[name].specifier
        assert Version(pin.version) == Version(lowest), name


def test_python_versions() -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
    assert SETUP["options"]["python_requires"] == f">={classifiers[0]}"
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert {classifiers[0], classifiers[-1]} == set(re.findall(r'python(?:-version)?: "(3\.\d+)"', workflow))
    assert f'target-version = "py{classifiers[0].replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()


def test_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w.-]+(?: [\w.-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {target for several in targets for target in several.split()}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    called = set()
    for job in jobs.values():
        matrix = job.get("strategy", {}).get("matrix", {})
        values = matrix.get("target", [row["target"] for row in matrix.get("include", [])])
        for step in job["steps"]:
            called |= {*values, *re.findall(r"make ([\w-]+)$", step.get("run", ""), re.MULTILINE)}
    called |= set(re.search(r"for target in (.+);", (ROOT / ".ci/run").read_text())[1].split())  # type: ignore[index]
    assert {"lint", "types", "test", "dist", "test-oldest", "test-newest"} <= called
    to_come = set() if (ROOT / "mkdocs.yml").is_file() else {"docs"}
    assert called - targets - to_come == set()
