import time

import pytest

from hf_moe_ted.evaluation.placeholders import count_placeholder, lost_placeholders, placeholders
from hf_moe_ted.translation.markers import Markers, invented_markers
from hf_moe_ted.translation.phrases import phrases_of


def markers_of(text: str, *, numbers: bool = False) -> Markers:
    return Markers(text, phrases_of(text, None), numbers=numbers)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%s of %1$d and %(name)s, %.2f%", ["%s", "%1$d", "%(name)s", "%.2f"]),
        ("{name} ${x} {{ y }} {0}", ["{name}", "${x}", "{{ y }}", "{0}"]),
        ("<b>bold</b> &amp; &#39; <br/>", ["<b>", "</b>", "&amp;", "&#39;", "<br/>"]),
        ("See https://a.b/c?d=e. Or (www.x.org), mail a.b@c.de.", ["https://a.b/c?d=e", "www.x.org", "a.b@c.de"]),
        ("$1 of $NAME$ and %1", ["$1", "$NAME$", "%1"]),
        ("run `rm -rf 5`", ["`rm -rf 5`"]),
        ("Open report.pdf, a_b.tar.gz and song.mp3.", ["report.pdf", "a_b.tar.gz", "song.mp3"]),
        ("See example.com/help, mail.example.co.uk.", ["example.com/help", "mail.example.co.uk"]),
        ("Use --dry-run in ~/.config/app or /etc/hosts.", ["--dry-run", "~/.config/app", "/etc/hosts"]),
        (r"In C:\Users\x.txt, /tmp, main.py.", [r"C:\Users\x.txt", "/tmp", "main.py"]),
        ("résumé.pdf, файл.txt, Node.js", ["résumé.pdf", "файл.txt", "Node.js"]),
        (
            "https://a.b/x.txt `a.txt` {a.txt} <a href=x.html>",
            ["https://a.b/x.txt", "`a.txt`", "{a.txt}", "<a href=x.html>"],
        ),
        ("打开report.pdf文件、/etc/hosts。", ["report.pdf", "/etc/hosts"]),
        ("and/or, he/she/it, /and/or, 1/2/3, km/h, /a, Datei/Öffnen/löschen, ~5", []),
        ("z.B., e.g. 802.1x, 12.5GB, 10.30pm, v2.0, 1.2.3, 192.168.0.1", []),
        ("Save the file.then close it. Click here.you can. usw.und, Mr.smith, fin.el", []),  # no space, no name
        ("SUM.TEST(1), -- a, --x, a.b", []),
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
        ("Open report.pdf", "Öffne report.pdf.", []),
        ("Open report.pdf", "Öffne den Bericht", ["report.pdf"]),
        ("Open report.pdf", "Öffne myreport.pdf", ["report.pdf", "myreport.pdf"]),
    ],
)
def test_lost(source: str, translation: str, lost: list[str]) -> None:
    assert lost_placeholders(source, translation) == lost


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://example.org/aを開く", "https://example.org/a"),
        ("请访问https://example.org/a。", "https://example.org/a"),
        ("me@example.org으로 보내기", "me@example.org"),
        ("連絡先はme@example.orgです", "me@example.org"),
        ("https://ru.wikipedia.org/wiki/Москва.", "https://ru.wikipedia.org/wiki/Москва"),
    ],
)
def test_addresses_end_where_a_script_without_spaces_begins(text: str, expected: str) -> None:
    assert placeholders(text) == [expected]


def test_invented_markers() -> None:
    assert invented_markers("Node.js 20 for $5", "Node.js $20 für $5 und $ 7") == ["$20", "$ 7"]
    assert not invented_markers("$1 of $12", "$12 von $1")


def test_time_for_many_different_names() -> None:
    text = " ".join(f"f{number}.txt {number}" for number in range(4_000))
    start = time.perf_counter()
    assert not lost_placeholders(text, text)
    markers_of(text, numbers=True)
    assert time.perf_counter() - start < 5


def test_a_placeholder_inside_a_longer_one_does_not_count() -> None:
    assert count_placeholder("https://e.org/a", "https://e.org/austart https://e.org/a.") == 1
    assert lost_placeholders("Open https://e.org/a.", "https://e.org/austart") == [
        "https://e.org/a",
        "https://e.org/austart",
    ]


def test_markers() -> None:
    marked = markers_of("<b>Save</b> $1 as {name}, {name}")
    assert marked.is_other and marked.text == "$2Save$3 $1 as $4, $4"
    assert marked.restored("$2$1$3: $4 $40 $5") == "<b>$1</b>: {name} $40 $5"
    assert not markers_of("$1 of $2").is_other and not markers_of("none").is_other
    many = " ".join(f"{{p{number}}}" for number in range(12))
    assert markers_of(many).restored(markers_of(many).text) == many


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("Error 404: 20% of 250 MB", "Error $1: $2% of $3 MB"),
        ("On 12/05/2026 at 10:30, in 2027.", "On $1 at $2, in $3."),
        ("Alt+F4, 4K, mp3, B4", "Alt+$1, $2, $3, $4"),
        ("12月31日、24時間", "$1月$2日、$3時間"),
        ("2.5 MB, v1.2.3 and 10.30.", "$1 MB, $2 and $3."),
        ("$5.99, 7,500, 1.234.567, 2,5, 1\u00a0000", "$5.99, 7,500, 1.234.567, 2,5, 1\u00a0000"),  # written otherwise
        ("2nd, 10am, array_1d, a1b2, ٣ ملفات", "2nd, 10am, array_1d, a1b2, ٣ ملفات"),
        ("{n} of $1 in 5 files, 5", "$2 of $1 in $3 files, $3"),
        ("https://a.b/5 5", "$1 $2"),
    ],
)
def test_markers_of_numbers(text: str, marked: str) -> None:
    markers = markers_of(text, numbers=True)
    assert (markers.text, markers.restored(marked)) == (marked, text)


@pytest.mark.parametrize(
    "text",
    [
        *("x" * 200_000, "%" + "0" * 100_000, "%(a)" + "0" * 100_000, "a@" * 50_000, "a." * 50_000),
        *(
            "+/a" * 50_000,
            "/a." * 50_000 + "é",
            "--" + "a-" * 50_000,
            "aa." * 50_000 + "é",
            "0." * 50_000,
            "_0" * 50_000,
        ),
        *("~" * 100_000, "-" * 100_000, "aa.aa/" * 50_000 + "é"),
    ],
)
def test_time_grows_with_the_length_only(text: str) -> None:
    start = time.perf_counter()
    placeholders(text)
    assert time.perf_counter() - start < 5
