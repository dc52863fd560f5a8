"""Parallel and monolingual text for multitask training from tab-separated files; it needs no data-set library."""

import gzip
import hashlib
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Row = dict[str, str]
OPENERS = {".xz": lzma.open, ".gz": gzip.open}
LANGUAGE = re.compile(r"[a-z]{2,3}([_-][A-Za-z0-9]{2,8})*")


def read_pairs(path: str | Path, languages: list[str] | None = None) -> list[Row]:
    """Read pairs of English and another language, as rows of `MultitaskDataset`.

    Args:
        path: lines of lang, English and target, or of lang, origin, English and target, separated by tabs; with or
            without a header line, plain or compressed by xz or gzip.
        languages: languages to keep; by default all.

    Raises:
        ValueError: a line has another number of columns, begins with what is no code of a language, or is of English; a
            language has no line.
    """
    rows = []
    found: set[str] = set()
    for number, columns in _lines(Path(path)):
        if len(columns) not in (3, 4):
            raise ValueError(f"line {number} of {path} has {len(columns)} columns, but must have 3 or 4: {columns}")
        lang, english, target = columns[0], columns[-2], columns[-1]
        if number == 1 and lang == "lang":
            continue
        if lang == "en" or not LANGUAGE.fullmatch(lang):
            raise ValueError(
                f"line {number} of {path} begins with {lang!r}, but must begin with the code of a language besides "
                "English, such as de; a header line begins with lang"
            )
        found.add(lang)
        if languages is None or lang in languages:
            rows.append({"source": english, "target": target, "src_lang": "en", "tgt_lang": lang})
    if missing := [lang for lang in languages or () if lang not in found]:
        raise ValueError(f"no line of {path} is in {missing}; there are {sorted(found)}")
    if not rows:
        raise ValueError(f"{path} has no pairs")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, read once as long as it does not change; of what is no file, its name."""
    if not Path(path).is_file():
        return str(path)
    about = Path(path).stat()
    return _content_hash(str(path), about.st_size, about.st_mtime_ns)


@cache
def _content_hash(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def monolingual(rows: list[Row]) -> list[Row]:
    """The texts of all rows, each once, for denoising."""
    texts = [(row["tgt_lang"], row["target"]) for row in rows] + [(row["src_lang"], row["source"]) for row in rows]
    return [{"text": text, "lang": lang} for lang, text in dict.fromkeys(texts)]


def first_pairs(rows: list[Row], num_pairs: int, languages: list[str] | None = None) -> list[Row]:
    """The first `num_pairs` of each of `languages`, all by default, and all pairs of others."""
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        lang = row["tgt_lang"]
        seen[lang] += 1
        if seen[lang] <= num_pairs or (languages is not None and lang not in languages):
            kept.append(row)
    return kept


def backwards(rows: list[Row]) -> list[Row]:
    """The same pairs in the other direction."""
    return [
        {"source": row["target"], "target": row["source"], "src_lang": row["tgt_lang"], "tgt_lang": row["src_lang"]}
        for row in rows
    ]
