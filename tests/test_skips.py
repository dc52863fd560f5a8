"""Skipped tests are counted by reason, and fail a run in CI where nothing about the machine explains them."""

import pytest
import skips
import torch
from skips import ANY, most_expected

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
    monkeypatch.setattr(skips, "REASONS", {"root may write everywhere": ANY})
    monkeypatch.setenv("CI", "true") if in_ci else monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest("from skips import pytest_sessionfinish, pytest_terminal_summary")
    pytester.makepyfile(**dict(list(FILES.items())[-files:]))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret == code
    result.stdout.fnmatch_lines([f"*{2 + files} skipped*", "    3 root may write everywhere"])
    if files == 2:
        result.stdout.fnmatch_lines(["    1 could not import 'a_package_that_is_missing'*(at most 0 expected*"])


@pytest.mark.parametrize(("most", "code"), [(2, 1), (3, 0)])
def test_more_than_the_expected_number(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, most: int, code: int
) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(skips, "REASONS", {"root may write everywhere": most})
    pytester.makeconftest("from skips import pytest_sessionfinish, pytest_terminal_summary")
    pytester.makepyfile(test_some=FILES["test_some"])
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret == code
    result.stdout.fnmatch_lines(["    3 root may write everywhere" + ("" if code == 0 else " (at most 2 expected*")])


def test_what_is_expected() -> None:
    assert most_expected("needs a CUDA device") == (0 if torch.cuda.is_available() else ANY)
    assert 0 < most_expected("not in torch 2.13.0") < ANY
    assert most_expected("could not import 'peft': No module named 'peft'") == 0
    assert most_expected("sometimes fails") == 0
