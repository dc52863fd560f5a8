"""Request bodies: read up to a limit, then parsed as JSON or as a form."""

import asyncio
from typing import TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

CLIENT_CLOSED_REQUEST = 499  # only the log shows it

_MAX_FIELDS = 100

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """
    Raises:
        HTTPException: 413 for too many bytes, before reading if their number is known; 408 if they do not arrive; 499
            if the client disconnects.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return await asyncio.wait_for(_read(request, max_bytes), timeout_s)
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise HTTPException(CLIENT_CLOSED_REQUEST, "The client closed the request") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"Invalid request: the body has more than {max_bytes} bytes")


async def parse_body(request: Request, body: bytes, model: type[Model]) -> Model:
    """Parse the fields of JSON, or of a form and the query together.

    Raises:
        HTTPException: 400 for another kind of body, or fields that do not fit the model. The message has no part of the
            texts.
    """
    try:
        if _is_json(request):
            return model.model_validate_json(body.decode("utf-8"), strict=True)
        return model.model_validate(_once(await _form_fields(request, body), model))
    except UnicodeDecodeError:
        raise HTTPException(400, "Invalid request: the text is not UTF-8") from None
    except ValidationError as error:
        raise HTTPException(400, f"Invalid request: {_message(error)}") from None


async def parse_upload(request: Request, body: bytes, model: type[Model]) -> tuple[Model, UploadFile | None]:
    """Parse the fields of a form with a file in the field `file`.

    Raises:
        HTTPException: 400, see `parse_body`.
    """
    form = await _multipart(request, body)
    file = form.get("file")
    try:
        fields = model.model_validate(_once(_texts_of(form, request), model))
    except ValidationError as error:
        raise HTTPException(400, f"Invalid request: {_message(error)}") from None
    return fields, file if isinstance(file, UploadFile) else None


def _is_json(request: Request) -> bool:
    kind = _content_type(request)
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _form_fields(request: Request, body: bytes) -> list[tuple[str, str]]:
    kind = _content_type(request)
    if kind == "multipart/form-data":
        body.decode("utf-8")  # otherwise it would be read as Latin-1
        return _texts_of(await _multipart(request, body), request)
    pairs = _query(request)
    if kind == "application/x-www-form-urlencoded":
        pairs = pairs + _parsed(body.decode("utf-8"))
    return pairs


async def _multipart(request: Request, body: bytes) -> FormData:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    if _content_type(request) != "multipart/form-data":
        raise HTTPException(400, "Invalid request: a file must come as multipart/form-data")
    return await Request(request.scope, receive).form(
        max_files=1, max_fields=_MAX_FIELDS, max_part_size=max(len(body), 1)
    )


def _texts_of(form: FormData, request: Request) -> list[tuple[str, str]]:
    return _query(request) + [(name, value) for name, value in form.multi_items() if isinstance(value, str)]


def _query(request: Request) -> list[tuple[str, str]]:
    return _parsed(request.scope["query_string"].decode("latin-1"))


def _parsed(text: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise HTTPException(400, f"Invalid request: the form has more than {_MAX_FIELDS} fields") from None


def _once(pairs: list[tuple[str, str]], model: type[BaseModel]) -> dict[str, str]:
    """The fields of a model; empty fields count as missing.

    Raises:
        HTTPException: 400 for a field that occurs twice.
    """
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name in fields:
            raise HTTPException(400, f"Invalid request: {name} came twice; several texts can be sent as JSON")
        if value and name in model.model_fields:
            fields[name] = value
    return fields


def _message(error: ValidationError) -> str:
    """The first error, in LibreTranslate's words if it has a message for it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        return f"missing {name} parameter"
    return f"{name}: {first['msg']}" if name else str(first["msg"])


__all__ = ["CLIENT_CLOSED_REQUEST", "parse_body", "parse_upload", "read_body"]
