"""Reproductions in docs/upstream: the installed libraries still do what is written there.

A failure says that a library was mended, and which workaround of ours can go.
"""

import json
import os
import re
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from local_hub import SOURCE, run_python
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "upstream"

# Each runs in a fork of a process that has loaded the libraries, which saves much of a start; two at a time.
RUN_ALL = """
    import json, os, sys, tempfile, traceback
    os.chdir({folder!r})  # some write files
    import accelerate, torch, transformers
    from torch.distributed import checkpoint, fsdp, tensor
    from transformers import LlamaForCausalLM, M2M100ForConditionalGeneration, MixtralForCausalLM, Trainer

    def started(code):
        output = tempfile.TemporaryFile("w+")
        process = os.fork()
        if process:
            return process, output
        os.dup2(output.fileno(), 1)
        sys.stdout = open(1, "w")
        status = 1
        try:
            exec(code, {{"__name__": "__main__"}})
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(status)

    def result(process, output):
        _, status = os.waitpid(process, 0)
        output.seek(0)
        return status, output.read()

    printed, running = {{}}, {{}}
    for name, code in json.loads({codes!r}).items():
        if len(running) == 2:
            first = next(iter(running))
            printed[first] = result(*running.pop(first))
        running[name] = started(code)
    printed.update((name, result(*pair)) for name, pair in running.items())
    print(json.dumps(printed))
"""


@dataclass(frozen=True)
class Report:
    """A file of docs/upstream.

    Attributes:
        name: of the file.
        requirement: the library, and the versions that have what is reported.
        workarounds: paths of our files, relative to the repository, that need it no longer once it is mended.
        code: the reproduction; `None` for what needs a GPU, which is reported by a link.
        output: what it prints.
    """

    name: str
    requirement: Requirement
    workarounds: list[str]
    code: str | None
    output: str | None

    @property
    def installed(self) -> str:
        return version(self.requirement.name)

    @property
    def is_of_installed(self) -> bool:
        return self.requirement.specifier.contains(self.installed, prereleases=True)


def read_report(path: Path) -> Report:
    text = path.read_text(encoding="utf-8")
    versions = re.search(r"^- Versions: `(.+?)`", text, re.MULTILINE)
    workaround = re.search(r"^- Workaround: (.+?)\n(?=- |\n)", text, re.MULTILINE | re.DOTALL)
    assert versions and workaround and re.search(r"^- Reported: \S", text, re.MULTILINE), f"{path.name} lacks a line"
    code = re.search(r"```python\n(.+?)```\n\nIt prints:\n\n```\n(.+?)```", text, re.DOTALL)
    return Report(
        path.name,
        Requirement(versions[1]),
        re.findall(r"`((?:src|tests|examples)/\S+)`", workaround[1]),
        code and code[1],
        code and code[2],
    )


REPORTS = [read_report(path) for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and output of each reproduction that the installed versions are said to show."""
    codes = json.dumps({report.name: report.code for report in REPORTS if report.code and report.is_of_installed})
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = RUN_ALL.format(codes=codes, folder=str(tmp_path_factory.mktemp("upstream")))
    return json.loads(run_python(script, environment).splitlines()[-1])


@pytest.mark.parametrize("report", [report for report in REPORTS if report.code], ids=lambda report: report.name)
def test_is_still_so(report: Report, printed: dict[str, tuple[int, str]]) -> None:
    library = f"{report.requirement.name} {report.installed}"
    if not report.is_of_installed:
        pytest.skip(f"not in {library}")
    status, output = printed[report.name]
    assert (status, output) == (0, report.output), (
        f"{library} behaves differently. If it is fixed upstream, remove the workaround in "
        f"{', '.join(report.workarounds)}, or say in docs/upstream/{report.name} which versions still need it"
    )


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_oldest_supported_version_is_concerned(report: Report) -> None:
    metadata = ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    lines = (metadata["options"]["install_requires"] + metadata["options.extras_require"]["dev"]).splitlines()
    (of_ours,) = [r for r in map(Requirement, filter(None, lines)) if r.name == report.requirement.name]
    oldest = max(Version(one.version) for one in of_ours.specifier if one.operator == ">=")
    ends = [Version(one.version) for one in report.requirement.specifier if one.operator == "<"]
    assert all(oldest < end for end in ends), (
        f"{of_ours} is fixed upstream, remove the workaround in {', '.join(report.workarounds)} and {report.name}"
    )


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_workarounds_point_here(report: Report) -> None:
    assert report.workarounds
    for path in report.workarounds:
        assert f"docs/upstream/{report.name}" in (ROOT / path).read_text(encoding="utf-8"), path


def test_all_are_listed() -> None:
    listed = set(re.findall(r"\]\((\w\S+\.md)\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert listed == {report.name for report in REPORTS}


def test_reports_without_a_reproduction_have_a_link() -> None:
    for report in REPORTS:
        if report.code is None:
            assert "https://github.com/" in (FOLDER / report.name).read_text(encoding="utf-8"), report.name


def test_a_mended_library_is_noticed() -> None:
    """The comparison is not empty: what a mended library would print differs."""
    report = next(report for report in REPORTS if report.name == "transformers_nllb_moe_routing.md")
    assert report.output and "[0, 1]" in report.output
    assert report.requirement.specifier == SpecifierSet(">=5.0")
