"""The work of the endpoints: access, limits, and answers in LibreTranslate's form."""

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..translation.glossary import Glossary
from .api_schema import DetectRequest, FileRequest, TranslateRequest
from .batched_translator import BatchedTranslator, ClosedError, QueueFullError
from .document_translation import DocumentTranslator, TranslatedDocument
from .documents import DOCUMENT_OF_SUFFIX, Document, html_document, plain_document, read_file
from .file_store import FileStore
from .languages import AUTO, ServedLanguages
from .rate_limit import RateLimit
from .request_body import CLIENT_CLOSED_REQUEST, parse_body, parse_upload, read_body
from .server_metrics import ServerMetrics
from .settings import ServerSettings

logger = logging.getLogger("hf_moe_ted.serving")

_BUSY_RETRY_S = 1.0

Answer = dict[str, Any]
Result = TypeVar("Result")


class TranslationApi:
    """
    Args:
        translator: translator that all clients share.
        settings: limits and keys.
        languages: languages of the model.
        metrics: metrics that count texts.
        files: store of translated files.
    """

    def __init__(
        self,
        translator: BatchedTranslator,
        settings: ServerSettings,
        languages: ServedLanguages,
        metrics: ServerMetrics,
        files: FileStore,
    ):
        self._settings, self._languages, self._metrics, self._files = settings, languages, metrics, files
        self._documents = DocumentTranslator(translator, languages)
        self._rate = RateLimit(settings.requests_per_minute)
        self._num_in_flight = 0

    async def translate(self, request: Request) -> Answer:
        """`/translate`

        Raises:
            HTTPException: for every error, as in all methods of this class.
        """
        async with self._in_flight():
            fields = await self._fields(request, TranslateRequest)
            source, target = self._pair(fields)
            glossary = _glossary(fields)
            is_list = isinstance(fields.q, list)
            texts = self._texts(fields)
            read = html_document if fields.format == "html" else plain_document
            documents = await asyncio.to_thread(lambda: [read(text) for text in texts])
            num_alternatives = 0 if fields.format == "html" else fields.alternatives or 0
            found = await self._translated(request, documents, source, target, num_alternatives, glossary)
            self._log_texts(texts, found)
        answer: Answer = {"translatedText": [of_text.text for of_text in found]}
        if source == AUTO:
            answer["detectedLanguage"] = [self._detected(of.src_lang, of.confidence) for of in found]
        if fields.alternatives:
            answer["alternatives"] = [list(of_text.alternatives) for of_text in found]
        answer["problems"] = [list(of_text.problems) for of_text in found]
        return answer if is_list else {name: values[0] for name, values in answer.items()}

    async def detect(self, request: Request) -> list[Answer]:
        """`/detect`"""
        async with self._in_flight():
            fields = await self._fields(request, DetectRequest)
            text = "\n".join(self._texts(fields))
            found = await asyncio.to_thread(self._languages.detect, plain_document(text).sample)
        return [self._detected(language, confidence) for language, confidence in found]

    async def translate_file(self, request: Request) -> tuple[str, list[str]]:
        """`/translate_file`: the key of the translated file, and its problems."""
        settings = self._settings
        async with self._in_flight():
            body = await read_body(request, max_bytes=settings.max_upload_bytes, timeout_s=settings.read_timeout_s)
            fields, file = await parse_upload(request, body, FileRequest)
            self._admit(request, fields.api_key)
            if file is None or not file.filename:
                raise HTTPException(400, "Invalid request: missing file parameter")
            source, target = self._pair(fields)
            document = await self._read(file)
            if not self._files.has_room(2 * len(body)):
                raise _retry_later(503, "Too many files are waiting for download", self._files.seconds_to_room())
            [found] = await self._translated(request, [document], source, target)
            self._log_texts([document.source], [found])
            name = _file_name(file.filename, self._languages.code_of[target])
            key = self._files.put(name, found.text.encode())
        return key, list(found.problems)

    async def _read(self, file: UploadFile) -> Document:
        content = await file.read()
        if len(content) > self._settings.max_file_bytes:
            raise HTTPException(413, f"Invalid request: the file has more than {self._settings.max_file_bytes} bytes")
        try:
            return await asyncio.to_thread(read_file, file.filename or "", content)
        except ValueError as error:
            raise HTTPException(400, f"Invalid request: {error}") from None

    def frontend_settings(self) -> Answer:
        """`/frontend/settings`"""
        first, *others = (language for language in self._languages.described())
        target = others[0] if others else first
        has_keys = self._settings.api_keys is not None
        return {
            "charLimit": self._settings.max_characters,
            "frontendTimeout": 500,
            "apiKeys": has_keys,
            "keyRequired": has_keys,
            "suggestions": False,
            "filesTranslation": True,
            "supportedFilesFormat": list(DOCUMENT_OF_SUFFIX),
            "language": {
                "source": {"code": AUTO, "name": "Auto Detect"},
                "target": {"code": target["code"], "name": target["name"]},
            },
        }

    @asynccontextmanager
    async def _in_flight(self) -> AsyncIterator[None]:
        if self._num_in_flight >= self._settings.max_requests:
            raise _retry_later(503, "Too many requests at once", _BUSY_RETRY_S)
        self._num_in_flight += 1
        self._metrics.in_flight.inc()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            self._metrics.in_flight.dec()

    async def _fields(self, request: Request, model: type[Any]) -> Any:
        settings = self._settings
        body = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.read_timeout_s)
        fields = await parse_body(request, body, model)
        self._admit(request, fields.api_key)
        return fields

    def _admit(self, request: Request, api_key: str | None) -> None:
        """Admit a request if its key is valid (if there are keys) and its client is within the rate limit."""
        keys = self._settings.api_keys
        client = request.client.host if request.client else ""
        is_known = keys is not None and api_key is not None and api_key in keys
        if is_known:
            client = f"key {api_key}"
        if wait_s := self._rate.wait_s(client):
            raise _retry_later(429, "Slowdown: too many requests a minute", wait_s)
        if keys is not None and not is_known:  # clients that guess keys get no more answers than others
            reason = "Invalid API key" if api_key else "Please contact the server operator to get an API key"
            raise HTTPException(403, reason)

    def _pair(self, fields: TranslateRequest | FileRequest) -> tuple[str, str]:
        """Source and target language by their names in the tokenizer."""
        try:
            source = AUTO if fields.source.lower() == AUTO else self._languages.resolve(fields.source)
            return source, self._languages.resolve(fields.target)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    def _texts(self, fields: DetectRequest) -> list[str]:
        texts = fields.q if isinstance(fields.q, list) else [fields.q]
        settings = self._settings
        if len(texts) > settings.max_texts:
            raise HTTPException(413, f"Invalid request: {len(texts)} texts; at most {settings.max_texts} are taken")
        num_characters = sum(map(len, texts))
        if num_characters > settings.max_characters:
            raise HTTPException(
                413, f"Invalid request: request ({num_characters}) exceeds text limit ({settings.max_characters})"
            )
        return texts

    async def _translated(
        self,
        request: Request,
        documents: Sequence[Document],
        source: str,
        target: str,
        num_alternatives: int = 0,
        glossary: Glossary | None = None,
    ) -> list[TranslatedDocument]:
        work = self._documents.translate(
            documents,
            source,
            target,
            num_alternatives=min(num_alternatives, self._documents.max_alternatives),
            glossary=glossary or self._settings.glossary,
        )
        try:
            found = await _unless_client_leaves(request, work, self._settings.request_timeout_s)
        except QueueFullError as error:
            raise _retry_later(503, "Too much text is waiting for the model", error.retry_after_s) from None
        except ClosedError:
            raise _retry_later(503, "The server is being stopped", _BUSY_RETRY_S) from None
        self._metrics.characters.inc(sum(len(document.source) for document in documents))
        return found

    def _detected(self, language: str, confidence: float) -> Answer:
        return {"confidence": confidence, "language": self._languages.code_of[language]}

    def _log_texts(self, texts: Sequence[str], found: Sequence[TranslatedDocument]) -> None:
        if self._settings.log_texts:
            for text, of_text in zip(texts, found, strict=True):
                logger.info("%r -> %r", text, of_text.text)


def _glossary(fields: TranslateRequest) -> Glossary | None:
    if not fields.glossary:
        return None
    try:
        return Glossary(fields.glossary.items())
    except ValueError as error:
        raise HTTPException(400, f"Invalid request: {error}") from None


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
    """The result of `work`; the work is cancelled if the client disconnects or the time is over."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise HTTPException(CLIENT_CLOSED_REQUEST, "The client closed the request")
        raise _retry_later(503, f"The translation took longer than {timeout_s:g} s", timeout_s)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _retry_later(status: int, message: str, wait_s: float) -> HTTPException:
    return HTTPException(status, message, headers={"Retry-After": str(max(math.ceil(wait_s), 1))})


def _file_name(name: str, language: str) -> str:
    """`letter.txt` -> `letter_de.txt`, with characters that every system allows."""
    path = PurePath(name)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)[:80]
    return f"{stem}_{language}{path.suffix.lower()}"


__all__ = ["TranslationApi"]
