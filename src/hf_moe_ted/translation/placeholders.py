"""What a translation has to repeat as it is: places for values, tags, addresses, code."""

import re
from collections import Counter

# Each alternative is one kind; the first that matches at a place counts. What may stand for the same as what follows it
# has a bound, so that the time grows with the length of a text only.
_PLACEHOLDER = re.compile(
    r"""
      `[^`\n]+`                                             # code
    | (?:https?://|ftp://|www\.)[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}»”]     # addresses, without the end of the sentence
    | [\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+
    | </?[A-Za-z][^<>\n]*>                                  # tags
    | &(?:[A-Za-z]\w*|\#\d+|\#x[0-9A-Fa-f]+);
    | \$?\{\{?[^{}\n]*\}?\}                                 # {name}, {{ name }}, ${name}
    | %\(\w+\)[-+\#0]{0,5}\d{0,9}(?:\.\d{1,9})?[A-Za-z]        # %(name)s
    | %(?:\d{1,9}\$)?[-+\#0]{0,5}(?:\d{1,9}|\*)?(?:\.\d{1,9})?(?:hh|h|ll|l|q|L|j|z|t)?[sdiufFeEgGxXoc@](?![A-Za-z])
    | %[1-9](?!\d)                                          # %1
    | \$(?:\d(?![\d.,]*\d)|[A-Z_]{2,}\$?)                    # $1, $NAME$
    """,
    re.VERBOSE,
)


def placeholders(text: str) -> list[str]:
    """The placeholders of a text, in its order.

    `%s`, `%1$d`, `%(name)s`, `$1`, `$NAME$`, `{name}`, `${name}`, tags and entities of HTML, URLs, e-mail addresses,
    and what stands between back-ticks.
    """
    return _PLACEHOLDER.findall(text)


def placeholder_spans(text: str) -> list[tuple[int, int]]:
    """Where each of the `placeholders` starts and ends."""
    return [match.span() for match in _PLACEHOLDER.finditer(text)]


def lost_placeholders(source: str, translation: str) -> list[str]:
    """The placeholders that a translation has less often than its source, or more often."""
    before = Counter(placeholders(source))
    found = {name: translation.count(name) for name in before}
    missing = [name for name, count in before.items() if found[name] < count]
    added = Counter(placeholders(translation)) - before
    return [*missing, *(name for name in added if name not in before and not any(name in other for other in before))]


__all__ = ["lost_placeholders", "placeholder_spans", "placeholders"]
