"""What the page does without its drawing: limits, files, pictures."""

import asyncio
import html
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from translation_cases import MakeModel, parallel_rows

from hf_moe_ted import (
    BatchedTranslator,
    TextTranslator,
    ZCodeM3Tokenizer,
    collect_expert_statistics,
    token_routing,
)
from hf_moe_ted.routing.token_picture import token_picture
from hf_moe_ted.serving.page_work import HOW_TO_MAKE_STATISTICS, PageOptions, PageWork, glossary_of
from hf_moe_ted.translation.glossary import Glossary

TEXT = "close all tabs.\n\nyes\n"


@pytest.fixture(scope="module")
def translator(make_model: MakeModel) -> TextTranslator:
    return TextTranslator(make_model(), ZCodeM3Tokenizer(languages=["en", "de", "fr"]), num_beams=2, max_new_tokens=6)


def with_work(translator: TextTranslator, use: Callable[[PageWork], Awaitable[Any]], **options: Any) -> Any:
    """What `use` gives."""

    async def main() -> Any:
        batched = BatchedTranslator(translator)
        try:
            return await use(PageWork(batched, PageOptions(max_characters=100, max_file_bytes=1000, **options)))
        finally:
            await batched.close()

    return asyncio.run(main())


def test_text_is_that_of_the_translator(translator: TextTranslator) -> None:
    found = with_work(translator, lambda work: work.translate(TEXT, "en", "de", 1, "", "me"))
    expected = translator.translate([TEXT], "en", "de", num_alternatives=1)[0]
    assert found.text == expected.text
    for sentence, alone in zip(found.sentences, expected.sentences, strict=True):
        # the sentences may come into other batches, whose products round otherwise
        assert sentence.scores == pytest.approx(alone.scores, abs=1e-5)
        assert replace(sentence, scores=alone.scores) == alone
    assert found.sentences[0].alternatives


def test_file_is_that_of_the_translator(translator: TextTranslator, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffclose\r\n\r\nyes".encode())
    name, found = with_work(translator, lambda work: work.translate_file(path, "en", "de", "", "me"))
    assert name == "notes.de.txt"
    assert found.text == "\ufeff" + translator.translate(["close\r\n\r\nyes"], "en", "de")[0].text


def test_html_file(translator: TextTranslator, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p id=1>yes</p>")
    name, found = with_work(translator, lambda work: work.translate_file(tmp_path / "page.html", "en", "de", "", "me"))
    assert name == "page.de.html"
    assert found.text == f"<p id=1>{html.escape(translator.translate(['yes'], 'en', 'de')[0].text, quote=False)}</p>"


def test_glossary(translator: TextTranslator, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("close tabs")

    async def use(work: PageWork) -> Any:
        text = await work.translate("close tabs", "en", "de", 0, "tabs = Reiter", "me")
        return text, (await work.translate_file(tmp_path / "x.txt", "en", "de", "tabs\tReiter", "me"))[1]

    of_text, of_file = with_work(translator, use)
    assert of_text == translator.translate(["close tabs"], "en", "de", glossary=Glossary([("tabs", "Reiter")]))[0]
    assert of_text != translator.translate(["close tabs"], "en", "de")[0]
    assert of_file.text == of_text.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("# a\n\n", None),
        (
            "tab\tReiter\r\nfull disk = volle Platte\nChromium",
            [("tab", "Reiter"), ("full disk", "volle Platte"), ("Chromium", None)],
        ),
        ("a = b\tc = d", [("a = b", "c = d")]),
    ],
)
def test_glossary_that_is_typed(text: str, expected: Any) -> None:
    assert glossary_of(text) == (None if expected is None else Glossary(expected))


@pytest.mark.parametrize("text", ["a\tb\n\nc\td\te", "x\n#\n\tb", "x\n\na = b = c"])
def test_wrong_glossary(text: str) -> None:
    with pytest.raises(ValueError, match="line 3 of the glossary must be a term"):
        glossary_of(text)


@pytest.mark.parametrize(
    ("text", "languages", "message"),
    [
        ("x" * 101, ("en", "de"), "the text has 101 characters, but this page accepts 100: send it in parts"),
        ("yes", ("de", "de"), "from de to de: choose two languages"),
        ("yes", ("en", "xx"), "unknown tgt_lang 'xx'"),
    ],
)
def test_wrong_text(text: str, languages: tuple[str, str], message: str, translator: TextTranslator) -> None:
    with pytest.raises(ValueError, match=message):
        with_work(translator, lambda work: work.translate(text, *languages, 0, "", "me"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 1001, "the file has 1,001 bytes, but this page accepts 1,000"),
        (b"ab\xff", "not UTF-8: byte 2 cannot be read"),
    ],
)
def test_wrong_file(content: bytes, message: str, translator: TextTranslator, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        with_work(translator, lambda work: work.translate_file(tmp_path / "x.txt", "en", "de", "", "me"))


def test_rate_of_each_client(translator: TextTranslator, tmp_path: Path) -> None:
    asked: list[str] = []
    (tmp_path / "x.txt").write_text("yes")

    def wait_s(client: str) -> float:
        asked.append(client)
        return 2.5 if asked.count(client) > 1 else 0.0

    async def use(work: PageWork) -> None:
        await work.translate("yes", "en", "de", 0, "", "me")
        await work.translate_file(tmp_path / "x.txt", "en", "de", "", "you")
        for again in (
            work.translate("yes", "en", "de", 0, "", "me"),
            work.translate_file(tmp_path / "x.txt", "en", "de", "", "you"),
        ):
            with pytest.raises(ValueError, match="too many requests from here: wait 3 seconds"):
                await again

    with_work(translator, use, wait_s=wait_s)
    assert asked == ["me", "you", "me", "you"]


def test_picture(translator: TextTranslator) -> None:
    async def use(work: PageWork) -> Any:
        return work.picture("yes", "ja", "en", "de"), work.similar_languages("en", "de"), work.has_experts

    picture, similar, has_experts = with_work(translator, use)
    routing = token_routing(translator.model, translator.tokenizer, "yes", "ja", "en", "de")
    assert picture == token_picture(routing) and has_experts
    assert HOW_TO_MAKE_STATISTICS in similar


def test_statistics_are_of_the_model(translator: TextTranslator, make_model: MakeModel) -> None:
    tokenizer, rows = translator.tokenizer, parallel_rows()

    async def similar(work: PageWork) -> str:
        return work.similar_languages("en", "de")

    statistics = collect_expert_statistics(translator.model, tokenizer, rows)
    assert "Languages routed like en" in with_work(translator, similar, statistics=statistics)
    others = collect_expert_statistics(make_model(num_experts=3), tokenizer, rows)
    with pytest.raises(ValueError, match="the statistics and the model are of different models"):
        with_work(translator, similar, statistics=others)
    dense = TextTranslator(make_model(encoder_sparse_step=0, decoder_sparse_step=0), tokenizer)
    with pytest.raises(ValueError, match="has no MoE layer"):
        with_work(dense, similar, statistics=statistics)
