"""Many clients at once get what each would get alone."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from translation_cases import MakeModel

from hf_moe_ted import Glossary, TextTranslator, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.serving.batched_translator import BatchedTranslator, ClosedError, QueueFullError
from hf_moe_ted.translation.sentence_translator import SourceSentence
from hf_moe_ted.translation.text_translator import PlannedText, TranslatedSentence, TranslatedText

DOCUMENT = " ".join(f"This is sentence {number} of a document." for number in range(60))


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> ZCodeM3ForConditionalGeneration:
    return make_model()


class Watched(TextTranslator):
    """Notes the batches, and waits where it is told to."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches_seen: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.on_token: Callable[[Sequence[SourceSentence]], None] = lambda batch: None

    def translate_batch(
        self, batch: Sequence[SourceSentence], on_step: Any = None, *, search: bool = True
    ) -> list[TranslatedSentence]:
        self.batches_seen.append([sentence.text for sentence in batch])
        assert self.gate.wait(20)

        def step() -> None:
            self.on_token(batch)
            if on_step is not None:
                on_step()

        return super().translate_batch(batch, step, search=search)


@pytest.fixture
def translator(model: Any, tokenizer: ZCodeM3Tokenizer) -> Watched:
    return Watched(model, tokenizer, num_beams=2, max_new_tokens=6, batch_tokens=400)


def served(translator: TextTranslator, use: Callable[[BatchedTranslator], Any], **options: Any) -> Any:
    """What `use` gives with a translator that is closed afterwards."""

    async def main() -> Any:
        batched = BatchedTranslator(translator, **options)
        try:
            return await use(batched)
        finally:
            await batched.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def without_scores(text: TranslatedText) -> TranslatedText:
    return replace(text, sentences=tuple(replace(sentence, scores=()) for sentence in text.sentences))


def scores_of(texts: Sequence[TranslatedText]) -> list[float]:
    return [score for text in texts for sentence in text.sentences for score in sentence.scores]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_each_client_gets_what_it_would_get_alone(translator: Watched) -> None:
    cases = [
        (["Yes."], "en", "de", 0),
        (["No. Perhaps not.", "", "Yes."], "en", "fr", 1),
        ([DOCUMENT], "en", "de", 0),
        (["Oui."], "auto", "en", 1),
        ([" \n"], "fr", "en", 0),
        *(([f"Number {number}."], "en", "de", 0) for number in range(9)),
    ]

    async def use(batched: BatchedTranslator) -> Any:
        calls = (batched.translate(texts, src, tgt, num_alternatives=number) for texts, src, tgt, number in cases)
        return await asyncio.gather(*calls)

    results = served(translator, use)
    sizes = [len(batch) for batch in translator.batches_seen]
    alone = [translator.translate(texts, src, tgt, num_alternatives=number) for texts, src, tgt, number in cases]
    for served_texts, texts in zip(results, alone, strict=True):
        assert list(map(without_scores, served_texts)) == list(map(without_scores, texts))
        assert scores_of(served_texts) == pytest.approx(scores_of(texts), abs=1e-4)  # a batch rounds in its own way
    assert max(sizes) >= 10  # clients shared batches


def test_a_short_text_does_not_wait_for_a_document(translator: Watched) -> None:
    ended: list[str] = []

    async def use(batched: BatchedTranslator) -> None:
        async def one(text: str) -> None:
            await batched.translate([text], "en", "de")
            ended.append(text)

        document = asyncio.create_task(one(DOCUMENT))
        await until(lambda: bool(translator.batches_seen))
        num_batches = len(translator.batches_seen)
        assert len(translator.batches_seen[0]) > 5
        await one("Yes.")
        # it came between two tokens of the document's first batches, of which there are several
        assert translator.batches_seen[num_batches:][:2].count(["Yes."]) == 1
        await document

    served(translator, use)
    assert ended == ["Yes.", DOCUMENT]


def test_who_searches_for_terms_holds_up_nobody(translator: Watched) -> None:
    """They get what they would get alone, behind those whose translation needs no search."""
    glossary = Glossary([("tab", "Ei")])
    ended: list[str] = []

    async def use(batched: BatchedTranslator) -> Any:
        async def one(text: str) -> Any:
            translated = await batched.translate([text], "en", "de", glossary=glossary)
            ended.append(text)
            return translated

        return await asyncio.gather(*map(one, ("the tab. Yes.", "No.", "a tab")))

    results = served(translator, use)
    assert ended[0] == "No."
    assert {"the tab.", "Yes.", "No.", "a tab"} == set(translator.batches_seen[0])
    alone = [translator.translate([text], "en", "de", glossary=glossary) for text in ("the tab. Yes.", "No.", "a tab")]
    assert results == alone
    assert all("Ei" in results[index][0].text for index in (0, 2))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_batches_on_a_cpu_are_of_like_length(
    translator: Watched, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    """There every sentence costs as much as the longest one; on a GPU the batch does."""
    texts = ["A text of some length, which takes its time", "Another text of like length, a bit shorter", "Yes.", "No."]

    async def use(batched: BatchedTranslator) -> Any:
        monkeypatch.setattr(batched, "_mixes_lengths", on_gpu)
        return await asyncio.gather(*(batched.translate([text], "en", "de") for text in texts))

    results = served(translator, use, wait_s=0.1)
    batches = {frozenset(batch) for batch in translator.batches_seen}
    assert results == [translator.translate([text], "en", "de") for text in texts]
    assert batches == ({frozenset(texts)} if on_gpu else {frozenset(texts[:2]), frozenset(texts[2:])})


def test_who_fails_fails_alone(translator: Watched) -> None:
    def on_token(batch: Sequence[SourceSentence]) -> None:
        if any("poison" in sentence.text for sentence in batch):
            raise RuntimeError("the model cannot do this")

    translator.on_token = on_token

    async def use(batched: BatchedTranslator) -> Any:
        calls = (batched.translate([text], "en", "de") for text in ("Yes.", "poison", "No."))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, failed, last = served(translator, use)
    assert isinstance(failed, RuntimeError)
    assert any({"Yes.", "poison", "No."} == set(batch) for batch in translator.batches_seen)  # they were together
    assert [first, last] == [translator.translate([text], "en", "de") for text in ("Yes.", "No.")]


def test_bad_input_is_told_at_once(translator: Watched) -> None:
    async def use(batched: BatchedTranslator) -> None:
        with pytest.raises(ValueError, match="unknown tgt_lang 'xx'"):
            await batched.translate(["Yes."], "en", "xx")
        with pytest.raises(ValueError, match="a text to translate must be a string"):
            await batched.translate([3], "en", "de")  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"num_alternatives \(2\) must be less than num_beams"):
            await batched.translate(["Yes."], "en", "de", num_alternatives=2)
        assert batched.num_waiting_characters == 0

    served(translator, use)


def test_cancelled_work_is_not_done(translator: Watched) -> None:
    num_tokens = 0

    def on_token(batch: Sequence[SourceSentence]) -> None:
        nonlocal num_tokens
        num_tokens += 1

    async def use(batched: BatchedTranslator) -> None:
        translator.gate.clear()
        translator.on_token = on_token
        tasks = [asyncio.create_task(batched.translate([DOCUMENT], "en", "de")) for _ in range(2)]
        await until(lambda: bool(translator.batches_seen))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batched.num_waiting_characters == 0
        translator.gate.set()
        [text] = await batched.translate(["Yes."], "en", "de")
        assert text.sentences[0].source == "Yes."

    served(translator, use)
    documents = [batch for batch in translator.batches_seen if batch != ["Yes."]]
    assert len(documents) == 1  # of the several that a document has
    assert num_tokens <= 1 + 6  # it ended at its next token; the others are those of "Yes."


def test_what_waits_is_bounded(translator: Watched) -> None:
    async def use(batched: BatchedTranslator) -> None:
        translator.gate.clear()
        first = asyncio.create_task(batched.translate(["x" * 150], "en", "de"))  # alone it may be longer
        await until(lambda: bool(translator.batches_seen))
        with pytest.raises(QueueFullError) as error:
            await batched.translate(["Yes."], "en", "de")
        assert error.value.retry_after_s >= 1
        translator.gate.set()
        await first
        await batched.translate(["Yes."], "en", "de")

    served(translator, use, max_waiting_characters=100)


def test_close_finishes_what_was_accepted(translator: Watched) -> None:
    async def main() -> Any:
        batched = BatchedTranslator(translator)
        task = asyncio.create_task(batched.translate([DOCUMENT], "en", "de"))
        await until(lambda: batched.num_waiting_characters > 0)
        await batched.close()
        with pytest.raises(ClosedError):
            await batched.translate(["Yes."], "en", "de")
        return await task

    assert asyncio.run(main()) == translator.translate([DOCUMENT], "en", "de")


def test_bad_options(translator: Watched) -> None:
    with pytest.raises(ValueError, match=r"wait_s \(-1\) must be at least 0"):
        BatchedTranslator(translator, wait_s=-1)


def test_text_that_cannot_be_put_together(translator: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PlannedText.whole

    def fails(plan: PlannedText, translated: Any) -> TranslatedText:
        if any(sentence.text == "No." for of_sentence in plan.sentences for sentence in of_sentence):
            raise IndexError("no such alternative")
        return whole(plan, translated)

    monkeypatch.setattr(PlannedText, "whole", fails)

    async def use(batched: BatchedTranslator) -> None:
        both = (batched.translate([text], "en", "de") for text in ("No.", "Yes."))
        bad, good = await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 20)
        assert isinstance(bad, IndexError)
        assert good[0].sentences[0].source == "Yes."
        [text] = await asyncio.wait_for(batched.translate(["Open."], "en", "de"), 20)
        assert text.sentences[0].source == "Open."

    served(translator, use)
