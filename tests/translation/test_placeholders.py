import time

import pytest

from hf_moe_ted.translation.placeholders import lost_placeholders, placeholders


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%s of %1$d and %(name)s, %.2f%", ["%s", "%1$d", "%(name)s", "%.2f"]),
        ("{name} ${x} {{ y }} {0}", ["{name}", "${x}", "{{ y }}", "{0}"]),
        ("<b>bold</b> &amp; &#39; <br/>", ["<b>", "</b>", "&amp;", "&#39;", "<br/>"]),
        ("See https://a.b/c?d=e. Or (www.x.org), mail a.b@c.de.", ["https://a.b/c?d=e", "www.x.org", "a.b@c.de"]),
        ("$1 of $NAME$ and %1", ["$1", "$NAME$", "%1"]),
        ("run `rm -rf 5`", ["`rm -rf 5`"]),
        ("50% der Kosten, 5 % de tout, $5.00, $15, 3 < 4 > 2, AT&T, a@b", []),
    ],
)
def test_placeholders(text: str, found: list[str]) -> None:
    assert placeholders(text) == found


@pytest.mark.parametrize(
    ("source", "translation", "lost"),
    [
        ("Save %s as {name}", "{name}: %s speichern", []),
        ("Open <b>it</b>", "Öffne <B>es</b>", ["<b>", "<B>"]),
        ("%s and %s", "%s und", ["%s"]),
        ("plain", "schlicht %s", ["%s"]),
        ("plain", "schlicht", []),
    ],
)
def test_lost(source: str, translation: str, lost: list[str]) -> None:
    assert lost_placeholders(source, translation) == lost


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "%" + "0" * 100_000, "%(a)" + "0" * 100_000, "a@" * 50_000, "a." * 50_000]
)
def test_time_grows_with_the_length_only(text: str) -> None:
    start = time.perf_counter()
    placeholders(text)
    assert time.perf_counter() - start < 5
