"""HTML, subtitles and plain text: what is language is translated, all else stays byte for byte."""

import time
from html.parser import HTMLParser

import pytest

from hf_moe_ted.serving.documents import CHUNK_CHARACTERS, Document, html_document, plain_document, srt_document
from hf_moe_ted.serving.html_text import tokens
from hf_moe_ted.serving.marked_text import IN_PARTS


def shouted(document: Document, **others: list[str]) -> str:
    """The document with capital letters; `others` are translations of texts by their first word."""
    return document.join([others.get(text.split(" ")[0], [text.upper()]) for text in document.texts])[0]


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset=utf-8><title>Tom &amp; Jerry</title>
<style>p > b { color: red }</style></head>
<body class='x "y"' data-a=1>
  <!-- a <b>comment</b> -->
  <h1>Hello</h1><hr/><img alt="a > b" src=x>
  <p>Click <b>Save</b>,
     then <a href="/a?b=1&c=2" title='it&apos;s'><i>wait</i> here</a>.</p>
  <pre>two
  lines</pre>
  <script>if (a < b && c > d) alert("<p>no</p>")</script>
  <textarea>mine</textarea> <code>make x</code>&nbsp;&copy; 2024
</body></html>
"""


def test_page() -> None:
    document = html_document(PAGE)
    assert document.texts == (
        *("Tom & Jerry", "Hello"),
        *("Click Save, then wait here.", "Click", "Save", ", then", "wait", "here"),
        "two\n  lines",
    )
    expected = PAGE.replace("Tom &amp; Jerry", "TOM &amp; JERRY").replace("Hello", "HELLO")
    expected = expected.replace("Click <b>Save</b>,\n     then ", "CLICK <b>SAVE</b>, THEN ")
    expected = expected.replace("<i>wait</i> here", "<i>WAIT</i> HERE").replace("two\n  lines", "TWO\n  LINES")
    assert shouted(document) == expected


class _Reference(HTMLParser):
    """What Python's parser makes of a page."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=False)
        self.seen: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(("open", tag))

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(("open", tag))

    def handle_endtag(self, tag: str) -> None:
        self.seen.append(("close", tag))


def test_tokens_are_those_of_another_parser() -> None:
    found = list(tokens(PAGE))
    assert "".join(token.raw for token in found) == PAGE
    assert [(token.kind, token.name) for token in found if token.name] == _Reference(PAGE).seen


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b and <3", "A &lt; B AND &lt;3"),
        ("&lt;b&gt; &eacute; &#233;", "&lt;B&gt; É É"),
        ("<p translate=no>keep <b>me</b></p><p>x", "<p translate=no>keep <b>me</b></p><p>X"),
        ('<li translate="no">keep<li>x', '<li translate="no">keep<li>X'),
        ("<p translate=no>keep<h2>x</h2>y", "<p translate=no>keep<h2>X</h2>Y"),
        ("<dl><dt translate=no>keep<dd>x</dl>", "<dl><dt translate=no>keep<dd>X</dl>"),
        ("<table><tr><td translate=no>keep<tr><td>x", "<table><tr><td translate=no>keep<tr><td>X"),
        ("<table><tr><td translate=no>keep<th>x", "<table><tr><td translate=no>keep<th>X"),
        ("<table><tr translate=no><td>keep<table><tr><td>me", "<table><tr translate=no><td>keep<table><tr><td>me"),
        ("<svg/>x <svg>keep</svg> y", "<svg/>X <svg>keep</svg> Y"),
        (
            '<div translate="no">keep <i translate="yes">x</i></div>',
            '<div translate="no">keep <i translate="yes">X</i></div>',
        ),
        ('<b class="a notranslate">keep</b>', '<b class="a notranslate">keep</b>'),
        ("run <code>make x</code> now", "RUN <code>make x</code> NOW"),
        ("a<br>b<br/>c", "A<br>B<br/>C"),
        ("<b>x</b> <i>y</i>", "<b>X</b> <i>Y</i>"),
        ("<b> </b>a <i>b</i>", "<b> </b>A <i>B</i>"),
        ("x <!-- y", "X <!-- y"),
        ('<a href="x>y', '<a href="x>y'),
        ("<p don't>x</p>", "<p don't>X</p>"),
        ("</b>x</p></p>", "</b>X</p></p>"),
        ("<script>x", "<script>x"),
        ("<SCRIPT>x</Script >y", "<SCRIPT>x</Script >Y"),
        ("42 %", "42 %"),
        ("\n <p>\n a\n b </p>\n", "\n <p>\n A B </p>\n"),
        ("", ""),
    ],
)
def test_snippets(source: str, expected: str) -> None:
    assert shouted(html_document(source)) == expected


@pytest.mark.parametrize(
    ("source", "whole", "parts", "expected"),
    [
        # in any case, as another of the translations, and as another form of the word
        (
            "Click <b>Save</b> now",
            "Jetzt auf Speichern gehen",
            {"Save": "speichern"},
            "Jetzt auf <b>Speichern</b> gehen",
        ),
        ("See <b>a file</b>!", "Die Dateien sehen!", {"a file": "eine x|Dateie"}, "Die <b>Dateien</b> sehen!"),
        ("Do <b>it</b> <i>now</i>", "Es jetzt tun", {"it": "es", "now": "jetzt"}, "<b>Es</b> <i>jetzt</i> tun"),
        # words where the source has none: outside of the marks
        ("\n<b>Save</b> it ", "Nun bitte speichern", {"Save": "speichern"}, "\nNun bitte <b>speichern</b> "),
        ("Do <b>save</b><i></i>", "Bitte speichern!", {"save": "speichern"}, "Bitte <b>speichern</b>!<i></i>"),
        ("Do <b><i>save</i></b>", "Bitte speichern nun", {"save": "speichern"}, "Bitte <b><i>speichern</i></b> nun"),
        ("<a><b>Save</b> it</a>", "Nun es speichern", {"Save": "speichern"}, "<a>Nun es <b>speichern</b></a>"),
        ("<a>Do <b>save</b></a>", "Speichern tun", {"save": "speichern"}, "<a><b>Speichern</b> tun</a>"),
        ("Keep <b>the file</b>", "保存文件吧", {"the file": "文件"}, "保存<b>文件</b>吧"),
    ],
)
def test_marks_where_the_words_are(source: str, whole: str, parts: dict[str, str], expected: str) -> None:
    document = html_document(source)
    translations = [[whole], *(parts.get(text, "?").split("|") for text in document.texts[1:])]
    assert document.join(translations) == (expected, ())
    assert document.has_parts


def test_marks_without_a_place() -> None:
    document = html_document("<p>Click <b>Save</b> now</p>")
    translations = [["Jetzt sichern"], ["Klick"], ["Speichern"], ["jetzt"]]
    text, problems = document.join(translations)
    assert text == "<p>Klick <b>Speichern</b> jetzt</p>"
    assert problems == (f"'Click Save now': {IN_PARTS}",)


@pytest.mark.parametrize(
    "source",
    [
        "<div>" * 100_000 + "x" + "</div>" * 100_000,
        "<b>" * 100_000 + "x",
        "<div>" * 20_000 + "</b>" * 20_000,
        *("<p translate=no>" * 20_000, "<!--" * 30_000, "<a " * 30_000, "<a href='" * 20_000, "<" * 100_000),
        *("</" * 50_000, "&" * 100_000, "<title>" * 20_000, "<b>x</b>" * 10_000, "<a b" + " " * 100_000 + "c"),
        "x " * 20_000 + "<b>x</b>" * 150,
    ],
    ids=lambda source: source[:16],
)
def test_time_grows_with_the_length_only(source: str) -> None:
    start = time.process_time()
    assert len(shouted(html_document(source))) >= len(source)
    assert time.process_time() - start < 10.0  # it takes less than two; what is quadratic takes minutes


SUBTITLES = """1
00:00:01,000 --> 00:00:02,500
<i>Where are
you?</i>

2
00:00:03,000 --> 00:00:04,000 X1:40 X2:600
{\\an8}- Here.
- Wait!

3
00:00:05,000 --> 00:00:06,000

4
00:00:07.000 --> 00:00:08.000
♪
5
00:00:09,000 --> 00:00:10,000
The end."""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_subtitles(newline: str) -> None:
    source = SUBTITLES.replace("\n", newline)
    document = srt_document(source)
    assert document.texts == ("Where are you?", "- Here.", "- Wait!", "The end.")
    expected = SUBTITLES.replace("Where are\nyou?", "WHERE ARE YOU?").replace("Here", "HERE").replace("Wait", "WAIT")
    assert shouted(document) == expected.replace("The end", "THE END").replace("\n", newline)


def test_lines_of_subtitles() -> None:
    source = "1\n00:00:01,000 --> 00:00:02,500\nShort <b>one</b> here\n"
    words = "ein ziemlich langer Satz über ein Thema, das viele Wörter braucht"
    text = shouted(srt_document(source), Short=[words], one=["Thema"])
    lines = text.split("\n")[2:-1]
    assert [len(line.replace("<b>", "").replace("</b>", "")) <= 42 for line in lines] == [True, True]
    assert " ".join(lines).replace("<b>Thema</b>", "Thema") == words
    long = srt_document("1\n00:00:01,000 --> 00:00:02,500\na\n").join([["word" * 12_500]])[0]
    assert "word" * 12_500 in long


def test_subtitles_without_times() -> None:
    with pytest.raises(ValueError, match="there is no line with times"):
        srt_document("1\nHello\n")
    assert srt_document("").join([])[0] == ""


def test_long_text_in_chunks() -> None:
    lines = [f"line {number}\n" for number in range(20_000)]
    document = plain_document("".join(lines))
    assert len(document.texts) > 1
    assert max(map(len, document.texts)) <= CHUNK_CHARACTERS + 20
    assert all(text.endswith("\n") for text in document.texts)
    assert shouted(document) == "".join(lines).upper()
    assert plain_document("a" * 200_000).texts == ("a" * 200_000,)
