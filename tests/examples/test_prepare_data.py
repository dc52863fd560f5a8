"""The shipped parallel text, and the script that selects and splits it."""

import importlib.util
import lzma
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = {"validation": 4, "test": 4}


@pytest.fixture(scope="module")
def prepare_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", EXAMPLES / "prepare_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(path: Path) -> list[tuple[str, ...]]:
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    return [tuple(line.split("\t")) for line in text.removesuffix("\n").split("\n")]


@pytest.fixture(scope="module", params=["chromium_l10n", "short/chromium_l10n_short"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shipped(name: str) -> dict[str, list[tuple[str, ...]]]:
    return {split: read_rows(EXAMPLES / "data" / f"{name}.{split}.tsv.xz") for split in SPLITS}


def test_shipped_rows_are_complete_and_unique(shipped, name):
    pairs = []
    for rows in shipped.values():
        assert rows[0] == ("lang", "english", "target")
        pairs += rows[1:]
    assert all(len(row) == 3 and all(cell and cell == cell.strip() for cell in row) for row in pairs)
    share_of_equal = sum(english.lower() == target.lower() for _, english, target in pairs) / len(pairs)
    assert share_of_equal == 0 if name == "chromium_l10n" else 0 < share_of_equal < 0.02
    assert len({(lang, english) for lang, english, _ in pairs}) == len(pairs)


def test_shipped_strings_are_in_their_split(shipped, prepare_data):
    """So that no two splits share an English string, nor a short one of one split and a long one of another."""
    for split, rows in shipped.items():
        keys = {prepare_data.split_key(english) for _, english, _ in rows[1:]}
        assert {prepare_data.assign_split(key) for key in keys} == {split}


def test_short_strings_have_files_of_their_own(shipped, name):
    numbers = {len(english.split()) for rows in shipped.values() for _, english, _ in rows[1:]}
    assert numbers == {1, 2} if name == "short/chromium_l10n_short" else min(numbers) == 3


def test_shipped_languages_and_sizes(shipped, prepare_data, name):
    counts = {split: Counter(row[0] for row in rows[1:]) for split, rows in shipped.items()}
    for split in SPLITS:
        assert set(counts[split]) == set(prepare_data.LANGUAGES)
    assert len(prepare_data.LANGUAGES) == 15
    assert min(counts["train"].values()) > (2000 if name == "short/chromium_l10n_short" else 6000)

    total = sum(len(rows) - 1 for rows in shipped.values())
    for split, percent in HELD_OUT_PERCENT.items():
        assert abs(100 * counts[split].total() / total - percent) < 0.5
    size = sum((EXAMPLES / "data" / f"{name}.{split}.tsv.xz").stat().st_size for split in SPLITS)
    assert size < 4_000_000


def test_readme_states_the_counts(shipped, name):
    readme = (EXAMPLES / "data" / "README.md").read_text(encoding="utf-8")
    counts = {split: Counter(row[0] for row in rows[1:]) for split, rows in shipped.items()}
    for lang in counts["train"]:
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{lang}` |"))
        numbers = [int(cell.replace(",", "")) for cell in row.strip("| ").split(" | ")[2:]]
        columns = numbers[3:] if name == "short/chromium_l10n_short" else numbers[:3]
        assert columns == [counts[split][lang] for split in SPLITS]
    for split, rows in shipped.items():
        path = EXAMPLES / "data" / f"{name}.{split}.tsv.xz"
        strings = len({english for _, english, _ in rows[1:]})
        assert f"| `{name}.{split}.tsv.xz` | {len(rows) - 1:,} | {strings:,} | {path.stat().st_size:,} |" in readme


def test_shipped_chinese_is_simplified(shipped, prepare_data):
    targets = [target for rows in shipped.values() for lang, _, target in rows[1:] if lang == "zh"]
    assert all(map(prepare_data.is_simplified_chinese, targets))


@pytest.mark.parametrize(
    ("text", "simplified"),
    [("了解 Chromium 2 次", True), ("瞭解詳情", False), ("OK $1", True), ("查看「设置」", True)],
)
def test_is_simplified_chinese(prepare_data, text, simplified):
    assert prepare_data.is_simplified_chinese(text) is simplified


def test_split_key_ignores_case_digits_and_punctuation(prepare_data):
    assert prepare_data.split_key("Open $1 tabs?") == prepare_data.split_key("open 2 TABS") == "opentabs"


@pytest.mark.parametrize(("key", "split"), [("extensions", "test"), ("pin", "validation"), ("redo", "train")])
def test_assign_split_is_stable(prepare_data, key, split):
    assert prepare_data.assign_split(key) == split


def test_select_pairs(prepare_data):
    rows = [
        ("de", "Tab", "tab"),
        ("de", "Empty", ""),
        ("de", "Save", "Speichern"),
        ("de", "Save", "Sichern"),
        ("nl", "Save", "Opslaan"),
        ("zh", "Add", "新增"),
        ("zh", "Add", "添加"),
        ("zh", "Learn more", "瞭解詳情"),
    ]
    selected = prepare_data.select_pairs(prepare_data.Pair(*row) for row in rows)
    expected = [("de", "Save", "Speichern"), ("zh", "Add", "添加")]
    assert [tuple(pair) for pair in selected] == expected
    selected = prepare_data.select_pairs((prepare_data.Pair(*row) for row in rows), keep_equal=True)
    assert [tuple(pair) for pair in selected] == [expected[0], ("de", "Tab", "tab"), expected[1]]


def test_script_output_is_reproducible(prepare_data, tmp_path, monkeypatch):
    lines = [f"{lang}\tNumber {name}\tx{name}\n" for lang in ("ja", "ar") for name in map(str, range(5))]
    lines += [f"de\t{chr(97 + i % 26) * (1 + i // 26)}\tÜ{i}\n" for i in range(260)]
    catalog = tmp_path / "catalog.tsv.xz"
    catalog.write_bytes(lzma.compress("".join(lines).encode("utf-8")))
    outputs = []
    for folder in ("first", "second"):
        monkeypatch.setattr(
            sys, "argv", ["prepare_data.py", str(catalog), "--output_dir", str(tmp_path / folder), "--name", "sample"]
        )
        prepare_data.main()
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert set(outputs[0]) == {f"sample.{split}.tsv.xz" for split in SPLITS}
    assert outputs[0] == outputs[1]
    assert sum(len(read_rows(tmp_path / "first" / name)) - 1 for name in outputs[0]) == len(lines)


def test_other_text_is_not_in_the_folder_that_examples_read():
    """Their globs take all of its files; records have scores of 4,808 test pairs."""
    assert [path.name for path in (EXAMPLES / "data").glob("*.test.tsv.xz")] == ["chromium_l10n.test.tsv.xz"]


def test_malformed_catalog_is_refused(prepare_data, tmp_path):
    catalog = tmp_path / "catalog.tsv.xz"
    catalog.write_bytes(lzma.compress(b"de\tSave\tSpeichern\nde\tOpen\n"))
    with pytest.raises(ValueError, match="2 has 2 columns, expected 3"):
        list(prepare_data.read_catalog(catalog))
