"""HTML of the page: messages, sentences to check, other translations. Every text is escaped."""

from collections.abc import Iterable
from html import escape

from ..models.language_codes import is_right_to_left
from ..translation.text_translator import TranslatedText


def status_html(text: str) -> str:
    """A status message; screen readers read it when they are idle."""
    return f'<p role="status">{escape(text)}</p>' if text else ""


def error_html(text: str) -> str:
    """An error message; screen readers read it at once."""
    sentence = text[:1].upper() + text[1:]
    return f'<p role="alert" style="color:var(--error-text-color);font-weight:600;">{escape(sentence)}</p>'


def problems_html(texts: Iterable[TranslatedText]) -> str:
    """The sentences that a reader should check, with the reasons; empty if there are none."""
    rows = [
        (sentence.source, text.src_lang, sentence.text, text.tgt_lang, "; ".join(sentence.problems))
        for text in texts
        for sentence in text.sentences
        if sentence.problems
    ]
    if not rows:
        return ""
    items = "".join(
        f"<tr>{_cell(source, src_lang)}{_cell(translation, tgt_lang)}<td>{escape(problem)}</td></tr>"
        for source, src_lang, translation, tgt_lang, problem in rows
    )
    return _table("problems", "Sentences to check", ("Sentence", "Translation", "Why"), items)


def alternatives_html(text: TranslatedText) -> str:
    """Each sentence with its translations, the best first, and their scores; empty without alternatives."""
    rows = [
        (sentence.source if rank == 0 else "", translation, f"{score:.3f}")
        for sentence in text.sentences
        if sentence.alternatives
        for rank, (translation, score) in enumerate(
            zip((sentence.text, *sentence.alternatives), sentence.scores, strict=True)
        )
    ]
    if not rows:
        return ""
    items = "".join(
        f"<tr>{_cell(source, text.src_lang)}{_cell(translation, text.tgt_lang)}<td>{score}</td></tr>"
        for source, translation, score in rows
    )
    return _table("alternatives", "Other translations", ("Sentence", "Translation", "Log-probability per token"), items)


def problem_list_html(problems: Iterable[str]) -> str:
    """Problems in a file; empty if there are none."""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<h4>To check</h4><ul class="problems">{items}</ul>' if items else ""


def _cell(text: str, language: str) -> str:
    direction = "rtl" if is_right_to_left(language) else "ltr"
    return f'<td dir="{direction}" style="white-space:pre-wrap;text-align:start;">{escape(text)}</td>'


def _table(name: str, caption: str, columns: Iterable[str], rows: str) -> str:
    head = "".join(f'<th scope="col" style="text-align:start;">{escape(column)}</th>' for column in columns)
    return (
        f'<table class="{name}" style="width:100%;"><caption style="text-align:start;font-weight:600;">{caption}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


__all__ = ["alternatives_html", "error_html", "problem_list_html", "problems_html", "status_html"]
