"""What the page says: in words, in the direction of the language, and never as HTML of the text."""

from html.parser import HTMLParser

import pytest

from hf_moe_ted import TranslatedSentence, TranslatedText
from hf_moe_ted.serving.page_text import alternatives_html, error_html, problems_html, status_html


class Cells(HTMLParser):
    """The cells of the body of a table, and the names of all elements."""

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.cells: list[tuple[str | None, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag == "td":
            self.cells.append((dict(attrs).get("dir"), ""))

    def handle_data(self, data: str) -> None:
        if self.cells:
            direction, text = self.cells[-1]
            self.cells[-1] = (direction, text + data)


def text_of(*sentences: TranslatedSentence, tgt_lang: str = "ar") -> TranslatedText:
    return TranslatedText(text="x", src_lang="en", tgt_lang=tgt_lang, sentences=sentences)


GOOD = TranslatedSentence(source="good", text="a", alternatives=("b", "c"), scores=(-0.1, -0.25, -1.5))
BAD = TranslatedSentence(source="bad", text="d", problems=("cut at max_new_tokens", "looks like fr, not ar"))


def test_problems() -> None:
    found = Cells(problems_html([text_of(GOOD), text_of(BAD, tgt_lang="de")]))
    assert found.cells == [("ltr", "bad"), ("ltr", "d"), (None, "cut at max_new_tokens; looks like fr, not ar")]
    assert problems_html([text_of(GOOD)]) == ""


def test_alternatives() -> None:
    found = Cells(alternatives_html(text_of(GOOD, BAD)))
    assert found.cells == [
        *[("ltr", "good"), ("rtl", "a"), (None, "-0.100")],
        *[("ltr", ""), ("rtl", "b"), (None, "-0.250")],
        *[("ltr", ""), ("rtl", "c"), (None, "-1.500")],
    ]
    assert alternatives_html(text_of(BAD)) == ""


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&amp;", "\"'>"])
def test_texts_stay_texts(text: str) -> None:
    sentence = TranslatedSentence(source=text, text=text, alternatives=(text,), scores=(0, -1), problems=(text,))
    for page in (problems_html([text_of(sentence)]), alternatives_html(text_of(sentence))):
        found = Cells(page)
        assert {*found.names} <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
        assert [cell for _, cell in found.cells][:2] == [text, text]
    assert {*Cells(error_html(text)).names, *Cells(status_html(text)).names} == {"p"}


def test_messages() -> None:
    assert status_html("") == ""
    assert "Unknown tgt_lang" in error_html("unknown tgt_lang 'xx'") and 'role="alert"' in error_html("x")
