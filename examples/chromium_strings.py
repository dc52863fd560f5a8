"""Make a catalog for `prepare_data.py` of the short strings in the user interface of Chromium.

    apt-get install chromium chromium-l10n  # Debian 12
    python examples/chromium_strings.py /usr/lib/chromium/locales short.tsv.xz
    python examples/prepare_data.py short.tsv.xz --keep_equal --output_dir examples/data/short \\
        --name chromium_l10n_short

A `.pak` file of `locales` has the strings of one language by number. English is that of the United States, from which
the others are translated.
"""

import argparse
import html
import itertools
import lzma
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prepare_data import LANGUAGES, Pair

FILES = {"zh": "zh-CN"}  # of languages whose file has another name
MAX_WORDS = 2
MAX_CHARACTERS = 40
# beginnings of the Unicode names of their letters; other languages have Latin ones
SCRIPTS = {
    **{"ar": ("ARABIC",), "el": ("GREEK",), "hi": ("DEVANAGARI",), "ko": ("HANGUL",), "ru": ("CYRILLIC",)},
    **{"th": ("THAI",), "uk": ("CYRILLIC",), "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA")},
}
UNWANTED = re.compile(r"\$\w|%\w|[{}<>,\ufffd]|https?:|www\.")  # placeholders, lists of keywords, what is no text
NUMBERED = re.compile(r"\b([A-Z]?\d+|[A-Z])$")  # "Envelope C4", "Green 3": hundreds of them


def read_pak(path: Path) -> dict[int, str]:
    """The strings of a `.pak` file by number (ui/base/resource/data_pack.cc of Chromium).

    Raises:
        ValueError: no such file, another version of the format than 5, or no text.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; English is in the package chromium, the others in chromium-l10n")
    content = path.read_bytes()
    version, encoding, num_strings, num_aliases = (
        struct.unpack_from("<IB3xHH", content) if len(content) > 12 else (0, 0, 0, 0)
    )
    if version != 5 or encoding not in (1, 2):
        raise ValueError(f"{path} is no .pak file of version 5 with text, but has version {version}")
    entries = [struct.unpack_from("<HI", content, 12 + 6 * place) for place in range(num_strings + 1)]
    codec = "utf-8" if encoding == 1 else "utf-16-le"
    texts = [content[start:end].decode(codec, errors="replace") for (_, start), (_, end) in itertools.pairwise(entries)]
    strings = {number: text for (number, _), text in zip(entries, texts, strict=False)}
    for place in range(num_aliases):  # other numbers of the same text
        number, entry = struct.unpack_from("<HH", content, 12 + 6 * (num_strings + 1) + 4 * place)
        strings[number] = texts[entry]
    return strings


def plain(text: str) -> str:
    """The string as it is shown: without the marks of accelerator keys, "&File" and in Chinese "文件(&F)"."""
    text = re.sub(r"\(&\w\)", "", html.unescape(text))
    return " ".join(re.sub(r"&(.)", r"\1", text).split())


def is_short_string(english: str, target: str, lang: str) -> bool:
    """Whether both sides are short and words, and the target is in the script of its language.

    An equal target, such as "OK", is in whatever script.
    """
    if not 0 < len(english.split()) <= MAX_WORDS or not 0 < len(english) <= MAX_CHARACTERS:
        return False
    if not 0 < len(target) <= 2 * MAX_CHARACTERS or UNWANTED.search(english) or UNWANTED.search(target):
        return False
    if sum(map(str.isalpha, english)) < 0.55 * len(english) or NUMBERED.search(english):
        return False
    if english != "OK" and not any(map(str.islower, english)):  # abbreviations
        return False
    if english == target:
        return True
    letters = [character for character in target if character.isalpha()]
    of_script = [unicodedata.name(letter, "").startswith(SCRIPTS.get(lang, ("LATIN",))) for letter in letters]
    return sum(of_script) > 0.6 * len(letters)


def catalog(folder: Path) -> Iterator[Pair]:
    """For each language and English string the translation that most of its numbers have.

    A translation that equals its English string is kept if it does in less than half of the languages: "App" in German;
    but no names, and nothing that is not translated yet.
    """
    english = {number: plain(text) for number, text in read_pak(folder / "en-US.pak").items()}
    pairs: list[Pair] = []
    for lang in LANGUAGES:
        translations: dict[str, Counter[str]] = {}
        for number, text in read_pak(folder / f"{FILES.get(lang, lang)}.pak").items():
            source, target = english.get(number, ""), plain(text)
            if is_short_string(source, target, lang):
                translations.setdefault(source, Counter())[target] += 1
        pairs += [Pair(lang, source, counts.most_common(1)[0][0]) for source, counts in sorted(translations.items())]
    num_equal = Counter(pair.english for pair in pairs if pair.english == pair.target)
    yield from (pair for pair in pairs if pair.english != pair.target or num_equal[pair.english] < len(LANGUAGES) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of .pak files")
    parser.add_argument("catalog", type=Path, help="the file to write")
    arguments = parser.parse_args()
    pairs = [*catalog(arguments.folder)]
    text = "".join("\t".join(pair) + "\n" for pair in pairs)
    arguments.catalog.write_bytes(lzma.compress(text.encode()))
    print(f"{arguments.catalog}: {len(pairs):,} pairs, {len({pair.english for pair in pairs}):,} English strings")


if __name__ == "__main__":
    main()
