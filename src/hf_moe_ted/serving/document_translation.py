"""Translate documents with the shared model: languages, passages and results."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..translation.glossary import Glossary
from ..translation.text_translator import TranslatedText
from .batched_translator import BatchedTranslator, QueueFullError
from .documents import CHUNK_CHARACTERS, Document
from .languages import AUTO, ServedLanguages


@dataclass(frozen=True, kw_only=True)
class TranslatedDocument:
    """
    Attributes:
        text: the translation, with everything of the source that is not text to translate.
        src_lang: its name in the tokenizer.
        confidence: confidence of the detected source language, at most 100.
        alternatives: other translations of the document, all different from `text`.
        problems: problems that a reader should check, in words.
    """

    text: str
    src_lang: str
    confidence: float
    alternatives: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class DocumentTranslator:
    """
    Args:
        translator: translator that all clients share.
        languages: languages of its model.

    Attributes:
        max_alternatives: most alternatives that its beam search allows.
    """

    def __init__(self, translator: BatchedTranslator, languages: ServedLanguages):
        self._translator, self._languages = translator, languages
        self.max_alternatives = translator.translator.num_beams - 1

    async def translate(
        self,
        documents: Sequence[Document],
        src_lang: str,
        tgt_lang: str,
        *,
        num_alternatives: int = 0,
        glossary: Glossary | None = None,
    ) -> list[TranslatedDocument]:
        """
        Args:
            src_lang: a name in the tokenizer, or `auto` to detect it for each document.
            tgt_lang: a name in the tokenizer. A document in this language does not change.
            num_alternatives: at most `max_alternatives`; documents with markup inside texts have none.
            glossary: terms that the translations must have.

        Raises:
            QueueFullError: too much is waiting for the model already.
        """
        # the others help to find a part in its whole
        num_helpers = self.max_alternatives if any(document.has_parts for document in documents) else num_alternatives
        found = [(src_lang, 100.0)] * len(documents)
        if src_lang == AUTO:
            found = await asyncio.to_thread(lambda: [self._languages.detect(each.sample)[0] for each in documents])
        by_language: dict[str, list[int]] = defaultdict(list)
        for index, (language, _) in enumerate(found):
            if language != tgt_lang:
                by_language[language].append(index)
        translated: dict[int, TranslatedDocument] = {}
        for language, indices in by_language.items():
            texts = [text for index in indices for text in documents[index].texts]
            results = iter(await self._translate_texts(texts, language, tgt_lang, num_helpers, glossary))
            for index in indices:
                of_document = [next(results) for _ in documents[index].texts]
                translated[index] = _joined(documents[index], of_document, language, found[index][1], num_alternatives)
        return [translated.get(index) or _same(document, *found[index]) for index, document in enumerate(documents)]

    async def _translate_texts(
        self, texts: list[str], src_lang: str, tgt_lang: str, num_alternatives: int, glossary: Glossary | None
    ) -> list[TranslatedText]:
        """Translate in chunks. Only the first can be refused if too much waits; begun work continues."""
        results: list[TranslatedText] = []
        for chunk in _chunked(texts):
            while True:
                try:
                    results += await self._translator.translate(
                        chunk, src_lang, tgt_lang, num_alternatives=num_alternatives, glossary=glossary
                    )
                    break
                except QueueFullError as error:
                    if not results:
                        raise
                    await asyncio.sleep(error.retry_after_s)
        return results


def _chunked(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk


def _joined(
    document: Document,
    translated: Sequence[TranslatedText],
    src_lang: str,
    confidence: float,
    num_alternatives: int,
) -> TranslatedDocument:
    ranked = [(of_text.text, *of_text.alternatives) for of_text in translated]
    text, of_join = document.join(ranked)
    of_model = [
        problem
        for of_text, is_shown in zip(translated, document.is_shown, strict=True)
        if is_shown
        for problem in of_text.problems
    ]
    num_ranks = 1 if document.has_parts else min(1 + num_alternatives, max(map(len, ranked), default=1))
    others = (document.join([of_text[rank:] or of_text for of_text in ranked])[0] for rank in range(1, num_ranks))
    alternatives = tuple(other for other in dict.fromkeys(others) if other not in ("", text))
    problems = tuple(dict.fromkeys((*of_model, *of_join)))
    return TranslatedDocument(
        text=text, src_lang=src_lang, confidence=confidence, alternatives=alternatives, problems=problems
    )


def _same(document: Document, src_lang: str, confidence: float) -> TranslatedDocument:
    return TranslatedDocument(text=document.source, src_lang=src_lang, confidence=confidence)


__all__ = ["DocumentTranslator", "TranslatedDocument"]
