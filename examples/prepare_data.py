"""Make the parallel-text sample under `examples/data` from a larger catalog of translated interface strings.

The catalog is an xz-compressed, tab-separated file without a header and with three columns: language code, English
string, translation. The same catalog always gives the same files.

    python examples/prepare_data.py catalog.tsv.xz --output_dir examples/data
"""

import argparse
import hashlib
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LANGUAGES = ("ar", "de", "el", "es", "fr", "hi", "ja", "ko", "ru", "sw", "th", "tr", "uk", "vi", "zh")
SPLITS = ("train", "validation", "test")
HEADER = "lang\tenglish\ttarget"
VALIDATION_PERCENT = 4
TEST_PERCENT = 4


class Pair(NamedTuple):
    """One English string and its translation into `lang`."""

    lang: str
    english: str
    target: str


def read_catalog(path: Path) -> Iterator[Pair]:
    """Yield the pairs of an xz-compressed catalog, stripped of surrounding whitespace.

    Raises:
        ValueError: a line does not have three columns.
    """
    # Only "\n" ends a row: translations may hold other characters that Python counts as line ends.
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            columns = line.rstrip("\n").split("\t")
            if len(columns) != 3:
                raise ValueError(f"{path}:{number} has {len(columns)} columns, expected 3 (lang, English, target)")
            yield Pair(*(column.strip() for column in columns))


def is_simplified_chinese(text: str) -> bool:
    """Whether every CJK ideograph of `text` exists in GB 2312, the character set of simplified Chinese."""
    ideographs = "".join(character for character in text if "\u3400" <= character <= "\u9fff")
    try:
        ideographs.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def select_pairs(
    pairs: Iterable[Pair], languages: Iterable[str] = LANGUAGES, *, keep_equal: bool = False
) -> list[Pair]:
    """Keep one usable translation per language and English string, sorted by language and English string.

    Dropped are pairs with an empty side, equal sides (unless `keep_equal`) and traditional Chinese. Of several
    translations of one string the first is kept, of several into Chinese the last: the catalog lists Taiwan before the
    mainland, and short strings in traditional Chinese can consist of characters that GB 2312 has too.
    """
    languages = frozenset(languages)
    selected: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        if pair.lang not in languages or not pair.english or not pair.target:
            continue
        if pair.target.lower() == pair.english.lower() and not keep_equal:
            continue
        if pair.lang != "zh":
            selected.setdefault((pair.lang, pair.english), pair)
        elif is_simplified_chinese(pair.target):
            selected[pair.lang, pair.english] = pair
    return sorted(selected.values())


def split_key(english: str) -> str:
    """Lowercased letters of `english`: strings that differ by case, digits or punctuation share a key."""
    return "".join(character for character in english.lower() if character.isalpha())


def assign_split(key: str) -> str:
    """Name of the split that all pairs with this `split_key` belong to."""
    percentile = int(hashlib.md5(key.encode("utf-8"), usedforsecurity=False).hexdigest(), 16) % 100
    if percentile < TEST_PERCENT:
        return "test"
    if percentile < TEST_PERCENT + VALIDATION_PERCENT:
        return "validation"
    return "train"


def split_pairs(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Distribute `pairs` over the splits by English string, never by row, keeping their order."""
    splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in pairs:
        splits[assign_split(split_key(pair.english))].append(pair)

    keys = [{split_key(pair.english) for pair in split} for split in splits.values()]
    assert len(set().union(*keys)) == sum(map(len, keys)), "an English string is in two splits"
    return splits


def write_split(path: Path, pairs: Iterable[Pair]) -> None:
    """Write `pairs` below a header line to an xz-compressed, tab-separated file."""
    rows = [HEADER, *("\t".join(pair) for pair in pairs)]
    text = "".join(f"{row}\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode("utf-8"), format=lzma.FORMAT_XZ, preset=9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalog", type=Path, help="xz-compressed catalog: language, English, translation")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--name", default="chromium_l10n", help="first part of the names of the files written")
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, help="language codes to keep")
    parser.add_argument(
        "--keep_equal", action="store_true", help='keep translations that equal the English, as of "OK"'
    )
    arguments = parser.parse_args()

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    pairs = select_pairs(read_catalog(arguments.catalog), arguments.languages, keep_equal=arguments.keep_equal)
    splits = split_pairs(pairs)
    for split, of_split in splits.items():
        path = arguments.output_dir / f"{arguments.name}.{split}.tsv.xz"
        write_split(path, of_split)
        print(f"{path}: {len(of_split):,} pairs, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
