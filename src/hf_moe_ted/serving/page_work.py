"""The work behind the page: translate texts and files within limits, and make pictures of routing."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..routing.expert_statistics import ExpertStatistics
from ..routing.statistics_collection import fingerprint_of
from ..routing.token_picture import similar_languages_picture, token_picture
from ..routing.token_routing import has_experts, token_routing
from ..translation.glossary import Glossary
from ..translation.text_translator import TranslatedText
from .batched_translator import BatchedTranslator
from .document_translation import DocumentTranslator, TranslatedDocument
from .documents import read_file
from .languages import ServedLanguages
from .page_text import status_html

HOW_TO_MAKE_STATISTICS = (
    "Languages with similar routing are found from statistics of this model on real text. Make them with hf-moe-ted "
    "expert-statistics MODEL DATA FOLDER, and start the server with --statistics FOLDER."
)
DENSE = "This model is dense: it has no experts for tokens."


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options and limits of a page.

    Attributes:
        title: title of the page.
        max_characters: most characters of a text.
        max_file_bytes: most bytes of a file.
        wait_s: function that returns how long a client (its address) must wait before its next request, 0 if it need
            not; each call counts as a request.
        statistics: statistics of the same model, for languages with similar routing.
    """

    title: str = "Translate"
    max_characters: int = 10_000
    max_file_bytes: int = 1_000_000
    wait_s: Callable[[str], float] | None = None
    statistics: ExpertStatistics | None = None


class PageWork:
    """
    Args:
        translator: shared with all other clients.
        options: limits and statistics.

    Raises:
        ValueError: the statistics are of another model.
    """

    def __init__(self, translator: BatchedTranslator, options: PageOptions):
        self._translator = translator
        self._text_translator = translator.translator
        self.options = options
        self.languages = list(self._text_translator.languages)
        self._documents = DocumentTranslator(translator, ServedLanguages(self.languages))
        self.max_alternatives = self._text_translator.num_beams - 1
        self.has_experts = has_experts(self._text_translator.model)
        if options.statistics is not None:
            model: Any = self._text_translator.model
            options.statistics.fingerprint.require_equal(fingerprint_of(model), "the statistics and the model")

    async def translate(
        self, text: str, src_lang: str, tgt_lang: str, num_alternatives: int, glossary: str, client: str
    ) -> TranslatedText:
        """
        Raises:
            ValueError: the text is too long; a language is unknown, or both are the same; the glossary is wrong; there
                are too many requests.
            QueueFullError: too much is waiting.
        """
        if len(text) > self.options.max_characters:
            limit = f"{self.options.max_characters:,}"
            raise ValueError(f"the text has {len(text):,} characters, but this page accepts {limit}: send it in parts")
        self._check(src_lang, tgt_lang, client)
        [translated] = await self._translator.translate(
            [text], src_lang, tgt_lang, num_alternatives=num_alternatives, glossary=glossary_of(glossary)
        )
        return translated

    async def translate_file(
        self, path: Path, src_lang: str, tgt_lang: str, glossary: str, client: str
    ) -> tuple[str, TranslatedDocument]:
        """The name of the translated file, and its result.

        Raises:
            ValueError: see `translate`; or the file is too large, of another kind, or not text in UTF-8.
        """
        self._check(src_lang, tgt_lang, client)
        num_bytes = path.stat().st_size
        if num_bytes > self.options.max_file_bytes:
            raise ValueError(f"the file has {num_bytes:,} bytes, but this page accepts {self.options.max_file_bytes:,}")
        document = await asyncio.to_thread(read_file, path.name, path.read_bytes())
        [translated] = await self._documents.translate([document], src_lang, tgt_lang, glossary=glossary_of(glossary))
        return f"{path.stem}.{tgt_lang}{path.suffix}", translated

    def picture(self, source: str, translation: str, src_lang: str, tgt_lang: str) -> str:
        """HTML: the tokens of a sentence and of its translation in the colours of their experts.

        Raises:
            ValueError: see `token_routing`.
        """
        model, tokenizer = self._text_translator.model, self._text_translator.tokenizer
        return token_picture(token_routing(model, tokenizer, source, translation, src_lang, tgt_lang))

    def similar_languages(self, src_lang: str, tgt_lang: str) -> str:
        """HTML: languages with routing similar to the two; without statistics, how to make statistics."""
        if self.options.statistics is None:
            return status_html(HOW_TO_MAKE_STATISTICS)
        return similar_languages_picture(self.options.statistics, src_lang, tgt_lang)

    def _check(self, src_lang: str, tgt_lang: str, client: str) -> None:
        if src_lang == tgt_lang:
            raise ValueError(f"the text would be translated from {src_lang} to {tgt_lang}: choose two languages")
        wait_s = 0.0 if self.options.wait_s is None else self.options.wait_s(client)
        if wait_s > 0:
            raise ValueError(f"too many requests from here: wait {math.ceil(wait_s)} seconds")


def glossary_of(text: str) -> Glossary | None:
    """Parse a glossary that a user typed or pasted; `None` if it is empty.

    Each line is a term and, after a tab or ` = `, its translation. A term alone is not translated. Blank lines, and
    lines that start with `#`, are skipped.

    Raises:
        ValueError: a line is wrong; the message gives its number and the reason.
    """
    entries: list[tuple[str, str | None]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split(" = "))]
        if len(cells) > 2 or not cells[0]:
            raise ValueError(f"line {number} of the glossary must be a term, a tab or ' = ', and its translation")
        entries.append((cells[0], cells[1] or None if len(cells) == 2 else None))
    return Glossary(entries) if entries else None


__all__ = ["DENSE", "HOW_TO_MAKE_STATISTICS", "PageOptions", "PageWork", "glossary_of"]
