"""The server as an ASGI app with LibreTranslate's HTTP API, so that LibreTranslate's clients work unchanged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

try:
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401  (forms with files need it)
    from babel import Locale  # noqa: F401
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import FileResponse, JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
except ImportError as error:
    raise ValueError(f"the server needs {error.name}: `pip install 'hf-moe-ted[serve]'`") from error

from .api_schema import (
    DetectedLanguage,
    Failure,
    FileTranslationAnswer,
    Health,
    Language,
    Translation,
    detect_body,
    failures,
    file_body,
    translate_body,
)
from .batched_translator import BatchedTranslator
from .file_store import FileStore
from .languages import ServedLanguages
from .request_watch import RequestWatch
from .server_metrics import METRICS_TYPE, ServerMetrics
from .settings import ServerSettings
from .translation_api import TranslationApi

_EXPIRY_CHECK_S = 60.0

_WORK_FAILURES = failures(400, 403, 408, 413, 429, 500, 503)


def create_app(translator: BatchedTranslator, settings: ServerSettings | None = None) -> FastAPI:
    """
    Args:
        translator: shared by all clients; it is closed with the app.
        settings: limits and keys; by default those of [`ServerSettings`].

    Raises:
        ValueError: a package of the extra `serve` is not installed.
    """
    settings = settings or ServerSettings()
    languages = ServedLanguages(translator.translator.languages)
    metrics = ServerMetrics()
    metrics.waiting.set_function(lambda: translator.num_waiting_characters)
    files = FileStore(settings.file_lifetime_s, settings.max_stored_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        expiry = asyncio.ensure_future(_remove_expired(files))
        yield
        expiry.cancel()
        await translator.close()
        files.close()

    app = FastAPI(title="hf-moe-ted", version="1", redoc_url=None, lifespan=lifespan, description=_DESCRIPTION)
    api = TranslationApi(translator, settings, languages, metrics, files)
    _add_translation(app, api, languages, settings)
    _add_files(app, api, files, languages)
    _add_facts(app, api, languages, metrics)
    app.add_exception_handler(HTTPException, _failure)
    app.add_middleware(RequestWatch, metrics=metrics, log_texts=settings.log_texts)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"])
    return app


_DESCRIPTION = """Translates texts and files. The API is that of LibreTranslate; language codes are accepted in any
form (`zh-Hans`, `zh_CN`, `zho_Hans`)."""


async def _remove_expired(files: FileStore) -> None:
    while True:
        await asyncio.sleep(_EXPIRY_CHECK_S)
        files.remove_expired()


async def _failure(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _add_translation(app: FastAPI, api: TranslationApi, languages: ServedLanguages, settings: ServerSettings) -> None:
    body = translate_body(languages, settings)

    @app.post("/translate", response_model=Translation, responses=_WORK_FAILURES, openapi_extra=body)
    async def translate(request: Request) -> Response:
        """Translate texts, plain or HTML."""
        return JSONResponse(await api.translate(request))

    body = detect_body(settings)

    @app.post("/detect", response_model=list[DetectedLanguage], responses=_WORK_FAILURES, openapi_extra=body)
    async def detect(request: Request) -> Response:
        """The possible languages of a text, the likeliest first."""
        return JSONResponse(await api.detect(request))


def _add_files(app: FastAPI, api: TranslationApi, files: FileStore, languages: ServedLanguages) -> None:
    body = file_body(languages)

    @app.post("/translate_file", response_model=FileTranslationAnswer, responses=_WORK_FAILURES, openapi_extra=body)
    async def translate_file(request: Request) -> Response:
        """Translate a file: txt, html or srt, in UTF-8."""
        key, problems = await api.translate_file(request)
        url = str(request.url_for("download_file", filename=key))
        return JSONResponse({"translatedFileUrl": url, "problems": problems})

    @app.get(
        "/download_file/{filename}",
        response_class=FileResponse,
        responses={**failures(404), 200: {"content": {"application/octet-stream": {}}}},
    )
    async def download_file(filename: str) -> Response:
        """Download a translated file as long as it is stored."""
        found = files.get(filename)
        if found is None:
            raise HTTPException(404, "The file does not exist, or no longer")
        return FileResponse(
            found.path,
            filename=found.name,
            media_type="application/octet-stream",
            headers={"X-Content-Type-Options": "nosniff"},
        )


def _add_facts(app: FastAPI, api: TranslationApi, languages: ServedLanguages, metrics: ServerMetrics) -> None:
    described = languages.described()

    @app.get("/languages", response_model=list[Language])
    async def of_model() -> Response:
        """The languages of the model."""
        return JSONResponse(described)

    @app.get("/frontend/settings", response_model=dict[str, object])
    async def frontend_settings() -> Response:
        """Limits of the server, for pages that show them."""
        return JSONResponse(api.frontend_settings())

    @app.post("/suggest", response_model=None, status_code=403, responses={403: {"model": Failure}})
    async def suggest() -> Response:
        """Suggestions are not accepted."""
        return JSONResponse({"error": "Suggestions are disabled on this server."}, 403)

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Whether the server answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def of_server() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.shown(), media_type=METRICS_TYPE)


__all__ = ["create_app"]
