"""Placeholders: parts that a translation must copy unchanged, such as places for values, tags, addresses, code."""

import re
from collections import Counter

# letters that may follow an address without a space: Thai, Lao, Burmese, Khmer, Chinese, Japanese and Korean
_NO_SPACE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef"
_LETTER = rf"[^\W{_NO_SPACE}]"  # or a digit, or _
_ADDRESS_PART = rf"(?:{_LETTER}|[.+-])"
# A name ends with one of these: any other word behind a dot may begin a sentence, where a space is missing. So no
# "is", "it", "me", "no", "so", ... among the countries.
_ENDINGS = (
    "7z|aac|apk|avi|bak|bash|bat|bib|bin|bmp|bz2|cfg|conf|cpp|crt|crx|css|csv|dat|db|deb|dll|dmg|doc|docx|eml"
    "|env|eps|epub|exe|flac|gif|gz|h264|hpp|htm|html|ico|ics|ini|ipynb|iso|jar|java|jpeg|jpg|js|json|jsonl|jsx"
    "|key|kt|lock|log|lua|m4a|md|mkv|mo|mov|mp3|mp4|mpeg|msi|odg|odp|ods|odt|ogg|opus|otf|parquet|pdf|pem|php"
    "|pkl|png|po|pot|ppt|pptx|ps1|psd|pth|py|rar|rb|rpm|rs|rst|rtf|safetensors|sh|sql|sqlite|svg|tar|tex|tgz"
    "|tif|tiff|tmp|toml|ts|tsv|tsx|ttf|txt|vcf|vue|wasm|wav|webm|webp|whl|wma|wmv|woff|woff2|xhtml|xls|xlsx|xml"
    "|xz|yaml|yml|zip|zst|com|org|net|edu|gov|io|dev|app|ai|info|biz|eu|uk|de|fr|jp|cn|ru|br|kr|nl|pl|ch|cz"
)
_NAME_PART = rf"(?:{_LETTER}|[~-])+"
_PATH_PART = rf"(?:{_LETTER}|[.+~-])*(?:{_LETTER}|[+~-])"  # a dot at its end ends a sentence
_BEFORE_NAME = rf"(?<!{_LETTER})(?<![-./~@:+\\])"
_AFTER_NAME = rf"(?!{_LETTER}|-|\.{_LETTER})"
_ROOTS = (
    "Applications|Library|System|Users|Volumes|bin|boot|dev|etc|home|lib|media|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr"
    "|var"
)

# Each alternative is one kind; the first match at a place counts. Parts that could match the same as the next part have
# a bound, so the time grows only linearly with the length of a text.
_PLACEHOLDER = re.compile(
    rf"""
      `[^`\n]+`                                             # code
    | (?:https?://|ftp://|www\.)[^\s<>"'`{_NO_SPACE}]*[^\s<>"'`.,;:!?)\]}}»”{_NO_SPACE}]  # without the end
    | (?<!{_LETTER})(?<![.+-]){_ADDRESS_PART}+@(?:{_LETTER}|-)+(?:\.(?:{_LETTER}|-)+)+
    | </?[A-Za-z][^<>\n]*>                                  # tags
    | &(?:[A-Za-z]\w*|\#\d+|\#x[0-9A-Fa-f]+);
    | \$?\{{\{{?[^{{}}\n]*\}}?\}}                                 # {{name}}, {{{{ name }}}}, ${{name}}
    | %\(\w+\)[-+\#0]{{0,5}}\d{{0,9}}(?:\.\d{{1,9}})?[A-Za-z]  # %(name)s
    | %(?:\d{{1,9}}\$)?[-+\#0]{{0,5}}(?:\d{{1,9}}|\*)?(?:\.\d{{1,9}})?(?:hh|h|ll|l|q|L|j|z|t)?
      [sdiufFeEgGxXoc@](?![A-Za-z])
    | %[1-9](?!\d)                                          # %1
    | \$(?:\d(?![\d.,]*\d)|[A-Z_]{{2,}}\$?)                    # $1, $NAME$
    | {_BEFORE_NAME}--[a-z][a-z0-9]+(?:-[a-z0-9]+)*{_AFTER_NAME}  # --dry-run
    | {_BEFORE_NAME}(?:~(?=/)|/(?:{_ROOTS}))(?:/{_PATH_PART})*{_AFTER_NAME}(?!/{_LETTER})  # /etc/hosts, ~/.config
    | {_BEFORE_NAME}[A-Za-z]:(?:\\{_PATH_PART})+                   # C:\Users\a.txt
    | {_BEFORE_NAME}{_NAME_PART}(?:\.{_NAME_PART})*\.(?:{_ENDINGS}){_AFTER_NAME}(?:/{_PATH_PART})*  # a.pdf, b.com/c
    """,
    re.VERBOSE,
)


def placeholders(text: str) -> list[str]:
    """The placeholders of a text, in order.

    `%s`, `%1$d`, `%(name)s`, `$1`, `$NAME$`, `{name}`, `${name}`, tags and entities of HTML, URLs, e-mail addresses,
    names of files and hosts (`report.pdf`, `example.com`), paths (`/etc/hosts`), options (`--dry-run`), and text
    between back-ticks.
    """
    return _PLACEHOLDER.findall(text)


def without_placeholders(text: str) -> str:
    """The text with a space instead of each of the `placeholders`."""
    return _PLACEHOLDER.sub(" ", text)


def num_letters(text: str) -> int:
    """Number of letters outside of the `placeholders`."""
    return sum(map(str.isalpha, without_placeholders(text)))


def placeholder_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each of the `placeholders`."""
    return [match.span() for match in _PLACEHOLDER.finditer(text)]


def count_placeholder(name: str, text: str) -> int:
    """How often a text has a placeholder that is not part of another one, such as of a longer address."""
    spans = placeholder_spans(text)
    found = [(match.start(), match.end()) for match in re.finditer(re.escape(name), text)]
    return sum(not any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans) for start, end in found)


def lost_placeholders(source: str, translation: str) -> list[str]:
    """The placeholders that a translation has less often or more often than its source."""
    before, after = Counter(placeholders(source)), Counter(placeholders(translation))
    missing = [
        name for name, count in before.items() if after[name] != count and count_placeholder(name, translation) != count
    ]
    added = after - before
    return [*missing, *(name for name in added if name not in before and not any(name in other for other in before))]


__all__ = [
    "count_placeholder",
    "lost_placeholders",
    "num_letters",
    "placeholder_spans",
    "placeholders",
    "without_placeholders",
]
