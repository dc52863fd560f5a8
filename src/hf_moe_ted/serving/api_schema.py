"""Requests and answers of the API: the fields of LibreTranslate, and a few more."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from .languages import AUTO, ServedLanguages
from .settings import ServerSettings

# a pattern for keys is not enough: the schema must say that terms that are no text are refused
_Glossary = Annotated[
    dict[Annotated[str, Field(pattern=r"\S")], str | None], Field(json_schema_extra={"additionalProperties": False})
]


class DetectRequest(BaseModel):
    q: str | list[str] = Field(description="Text, or texts.")
    api_key: str | None = Field(default=None, description="Required if the server has keys.")

    @field_validator("q")
    @classmethod
    def _has_text(cls, q: str | list[str]) -> str | list[str]:
        if not q:
            raise PydanticCustomError("missing", "there is no text")
        return q


class TranslateRequest(DetectRequest):
    source: str = Field(min_length=1, description="Language of the texts, or auto.")
    target: str = Field(min_length=1, description="Language to translate to.")
    format: Literal["text", "html", ""] | None = Field(default=None, description="Default: text.")
    alternatives: int | None = Field(default=None, ge=0, description="Number of other translations.")

    glossary: _Glossary | None = Field(
        default=None, description="Terms and their translations; null for a term that is not translated. Only in JSON."
    )

    @field_validator("alternatives", mode="before")
    @classmethod
    def _as_number(cls, value: Any) -> Any:
        """Accept `"3"` and `3.0`, too, which some clients send."""
        if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 10:
            return int(value)
        return int(value) if isinstance(value, float) and value.is_integer() else value


class FileRequest(BaseModel):
    source: str = Field(min_length=1, description="Language of the file, or auto.")
    target: str = Field(min_length=1, description="Language to translate to.")
    api_key: str | None = Field(default=None, description="Required if the server has keys.")


class DetectedLanguage(BaseModel):
    confidence: float = Field(ge=0, le=100)
    language: str


class Translation(BaseModel):
    translatedText: str | list[str]
    detectedLanguage: DetectedLanguage | list[DetectedLanguage] | None = Field(
        default=None, description="Only if the source is auto."
    )
    alternatives: list[str] | list[list[str]] | None = Field(default=None, description="Only if requested.")
    problems: list[str] | list[list[str]] = Field(description="Problems that a reader should check.")


class FileTranslationAnswer(BaseModel):
    translatedFileUrl: str
    problems: list[str]


class Language(BaseModel):
    code: str
    name: str
    targets: list[str]


class Health(BaseModel):
    status: Literal["ok"]


class Failure(BaseModel):
    error: str


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error answers of an endpoint, for its documentation."""
    return {status: {"model": Failure} for status in statuses}


def translate_body(languages: ServedLanguages, settings: ServerSettings) -> dict[str, Any]:
    """The body of `/translate` for OpenAPI."""
    schema = _of_request(TranslateRequest, languages)
    schema["properties"]["q"] = _texts(settings)
    return _body(schema)


def detect_body(settings: ServerSettings) -> dict[str, Any]:
    """The body of `/detect` for OpenAPI."""
    schema = DetectRequest.model_json_schema()
    schema["properties"]["q"] = _texts(settings)
    return _body(schema)


def file_body(languages: ServedLanguages) -> dict[str, Any]:
    """The body of `/translate_file` for OpenAPI."""
    schema = _of_request(FileRequest, languages)
    schema["properties"]["file"] = {"type": "string", "format": "binary", "description": "txt, html or srt, in UTF-8."}
    schema["required"] = [*schema["required"], "file"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _texts(settings: ServerSettings) -> dict[str, Any]:
    """Limits are given in words, because larger requests get 413, not 400 like requests that do not fit the schema."""
    limits = f"at most {settings.max_characters} characters, and {settings.max_texts} texts"
    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    return {
        "description": f"Text, or texts (only in JSON); {limits}.",
        "anyOf": [{"type": "string", "minLength": 1}, texts],
    }


def _of_request(model: type[BaseModel], languages: ServedLanguages) -> dict[str, Any]:
    """The schema with the languages of the model. The server accepts other forms of their codes, too."""
    schema = model.model_json_schema()
    codes = list(languages.code_of.values())
    for name, known in (("source", [AUTO, *codes]), ("target", codes)):
        described = schema["properties"][name]["description"]
        schema["properties"][name] = {"type": "string", "enum": known, "description": described}
    return schema


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    form = {**schema, "properties": {name: _in_form(field) for name, field in schema["properties"].items()}}
    form["properties"].pop("glossary", None)
    kinds = {"application/json": schema, "application/x-www-form-urlencoded": form, "multipart/form-data": form}
    content = {kind: {"schema": of_kind} for kind, of_kind in kinds.items()}
    return {"requestBody": {"required": True, "content": content}}


def _in_form(field: dict[str, Any]) -> dict[str, Any]:
    """A field in the form encoding: a single text."""
    if "anyOf" not in field:
        return field
    others = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return {**others, **field["anyOf"][0]}


__all__ = [
    "DetectRequest",
    "DetectedLanguage",
    "Failure",
    "FileRequest",
    "FileTranslationAnswer",
    "Health",
    "Language",
    "TranslateRequest",
    "Translation",
    "detect_body",
    "failures",
    "file_body",
    "translate_body",
]
