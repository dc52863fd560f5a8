"""Sentences and the gaps between them: nothing is lost, whatever the text is."""

import random
from collections.abc import Sequence

import pytest

from hf_moe_ted.models.segments import split_long, split_sentences

LETTERS = "ab ,;。\n\r\t é\u0301😀ก\u2028"


def num_bytes(texts: Sequence[str]) -> list[int]:
    return [len(text.encode()) for text in texts]


@pytest.mark.parametrize(
    ("text", "language", "sentences"),
    [
        ("Hello Mr. Smith.  How are you?\r\n\r\n\tFine.\n", "en", ["Hello Mr. Smith.", "How are you?", "Fine."]),
        ("Das kostet z. B. 3 Euro. Gut.", "deu_Latn", ["Das kostet z. B. 3 Euro.", "Gut."]),
        ("你好。我很好！再见", "zho_Hans", ["你好。", "我很好！", "再见"]),  # noqa: RUF001
        ("One. Two.\nThree. Four.", None, ["One. Two.", "Three. Four."]),
        ("Abc. Def.", "xx-unknown", ["Abc.", "Def."]),
        (" \n\t\n", "en", []),
        ("", "en", []),
    ],
)
def test_sentences(text: str, language: str | None, sentences: list[str]) -> None:
    segments = split_sentences(text, language)
    assert list(segments.sentences) == sentences
    assert segments.join(sentences) == text


def test_gaps_follow_the_target_language() -> None:
    segments = split_sentences(" 你好。我很好！\n再见", "zh")  # noqa: RUF001
    assert segments.join(["Hi.", "Fine!", "Bye"], "en") == " Hi. Fine!\nBye"
    assert segments.join(["A", "B", "C"], "ja") == " AB\nC"


def test_nothing_is_lost() -> None:
    choose = random.Random(0)
    for _ in range(500):
        text = "".join(choose.choices(LETTERS, k=choose.randint(0, 150)))
        for language in ("en", "zh", "th", None):
            segments = split_sentences(text, language)
            assert segments.join(segments.sentences) == text
            assert all(sentence == sentence.strip() != "" for sentence in segments.sentences)
        max_tokens = choose.randint(5, 40)
        parts = split_long(text, max_tokens, num_bytes)
        assert parts.join(parts.sentences) == text
        assert all(count <= max_tokens for count in num_bytes(parts.sentences))


def test_long_sentences_are_cut_at_clauses_then_between_words_then_anywhere() -> None:
    assert split_long("One thing, and another one; the end", 20, num_bytes).sentences == (
        "One thing,",
        "and another one;",
        "the end",
    )
    assert split_long("one two three four", 10, num_bytes).sentences == ("one two", "three four")
    assert split_long("abcdefgh", 3, num_bytes).sentences == ("ab", "cd", "ef", "gh")
    assert split_long("short, but fits", 20, num_bytes).sentences == ("short, but fits",)


def test_letters_keep_their_accents() -> None:
    text = "e\u0301" * 20
    parts = split_long(text, 7, num_bytes)
    assert "".join(parts.sentences) == text
    assert all(part.startswith("e") for part in parts.sentences)


def test_a_word_of_50_000_letters() -> None:
    assert len(split_long("x" * 50_000, 500, num_bytes).sentences) == 128
