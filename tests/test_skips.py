"""Skipped tests are counted by reason, and fail a run in CI where nothing about the machine explains them."""

import shutil
from pathlib import Path

import pytest
import torch
from skips import is_expected

pytest_plugins = ["pytester"]

FILES = {
    "test_whole": "import pytest\npytest.importorskip('a_package_that_is_missing')",
    "test_some": """
        import pytest
        def test_runs(): pass
        @pytest.mark.skip(reason="root may write everywhere")
        @pytest.mark.parametrize("number", range(3))
        def test_skips(number): pass
    """,
}


@pytest.mark.parametrize(("in_ci", "files", "code"), [(True, 2, 1), (True, 1, 0), (False, 2, 0)])
def test_result_of_a_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, in_ci: bool, files: int, code: int
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("CI", "true") if in_ci else monkeypatch.delenv("CI", raising=False)
    shutil.copy(Path(__file__).with_name("skips.py"), pytester.path)
    pytester.makeconftest("from skips import pytest_sessionfinish, pytest_terminal_summary")
    pytester.makepyfile(**dict(list(FILES.items())[-files:]))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret == code
    result.stdout.fnmatch_lines([f"*{2 + files} skipped*", "    3 root may write everywhere"])
    if files == 2:
        result.stdout.fnmatch_lines(["    1 could not import 'a_package_that_is_missing'*(not expected*"])


def test_what_is_expected() -> None:
    assert is_expected("needs a CUDA device") == (not torch.cuda.is_available())
    assert is_expected("not in torch 2.13.0")
    assert not is_expected("could not import 'peft': No module named 'peft'")
    assert not is_expected("sometimes fails")
