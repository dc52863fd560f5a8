"""The page in Gradio: its layout and events. It imports Gradio, which takes seconds."""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..models.language_codes import is_right_to_left
from ..translation.text_translator import AUTO, TranslatedText
from .batched_translator import ClosedError, QueueFullError
from .documents import DOCUMENT_OF_SUFFIX
from .languages import language_name
from .latest_only import LatestOnly
from .page_guard import PageGuard
from .page_text import alternatives_html, error_html, problem_list_html, problems_html, status_html
from .page_work import DENSE, PageWork

DEBOUNCE_S = 0.3
MAX_WAITING_EVENTS = 256
MAX_RUNNING_EVENTS = 64
FILE_LIFETIME_S = 1_800
MAX_SENTENCE_LABEL = 60

# time of the request in the browser: requests may arrive in another order
_WITH_ORDER = "(...inputs) => [...inputs.slice(0, -1), performance.now()]"

_COPY = """text => navigator.clipboard ? navigator.clipboard.writeText(text)
    : window.alert("Browsers let pages copy over https only: select the text and copy it.")"""

# the input box follows the direction of each paragraph
_CSS = """
#source textarea { unicode-bidi: plaintext; text-align: start; }
#translation textarea { text-align: start; }
"""


def mount(app: FastAPI, page: gr.Blocks, work: PageWork, auth: Callable[[str, str], bool] | None) -> FastAPI:
    """Put the page at `/`; everything is off that would send data out or open local files."""
    guard = Middleware(PageGuard, work.options.max_characters, work.options.max_file_bytes, get_upload_folder)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=auth,
        auth_message="This server needs an API key: give it as the password, with any name.",
        app_kwargs={"middleware": [guard]},
        max_file_size=work.options.max_file_bytes,
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        css=_CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def draw(work: PageWork) -> gr.Blocks:
    """The page with its events."""
    title = work.options.title
    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=(FILE_LIFETIME_S // 2, FILE_LIFETIME_S)) as page:
        _Drawing(work).wire(page)
    page.queue(max_size=MAX_WAITING_EVENTS, default_concurrency_limit=MAX_RUNNING_EVENTS, api_open=False)
    return page


class _Drawing:
    """The components of the page, and their events."""

    def __init__(self, work: PageWork):
        self._work = work
        self._latest = LatestOnly()
        gr.Markdown(f"# {work.options.title}")
        self._draw_languages()
        self.message = gr.HTML(elem_id="message", js_on_load=None)
        with gr.Tab("Text"):
            self._draw_text()
        with gr.Tab("File"):
            self._draw_file()
        with gr.Accordion("Glossary", open=False):
            self._draw_glossary()
        self.order = gr.Number(0, visible=False)  # see `_WITH_ORDER`
        self.state = gr.State(None)  # of the translation that is shown, see `_state_of`

    def _draw_languages(self) -> None:
        languages = [(language_name(language), language) for language in self._work.languages]
        with gr.Row():
            self.src_lang = gr.Dropdown(
                [("Detect language", AUTO), *languages], value=AUTO, label="Translate from", elem_id="src_lang"
            )
            self.swap = gr.Button("Swap languages", size="sm", scale=0, min_width=150, elem_id="swap")
            self.tgt_lang = gr.Dropdown(languages, value=languages[0][1], label="Translate to", elem_id="tgt_lang")

    def _draw_text(self) -> None:
        with gr.Row():
            self.source = gr.Textbox(
                "", label="Text", lines=6, max_lines=20, placeholder="Type or paste a text", elem_id="source"
            )
            self.translation = gr.Textbox(
                label="Translation", lines=6, max_lines=20, interactive=False, elem_id="translation"
            )
        # Gradio's own button for it takes the label of the text box away from screen readers
        self.copy = gr.Button("Copy the translation", size="sm", elem_id="copy")
        # Gradio's slider fails while its number is being typed, and its radio buttons have no arrow keys
        self.num_alternatives = gr.Dropdown(
            [*range(self._work.max_alternatives + 1)], value=0, label="Other translations of each sentence",
            elem_id="num_alternatives", filterable=False, visible=self._work.max_alternatives > 0,
        )  # fmt: skip
        self.details = gr.HTML(elem_id="details", js_on_load=None)
        self.shows_experts = gr.Checkbox(
            label="Show which experts each token went to", elem_id="shows_experts", visible=self._work.has_experts
        )
        self.sentence = gr.Dropdown(
            [], label="Sentence", elem_id="sentence", visible=False, type="index", filterable=False
        )
        self.picture = gr.HTML("" if self._work.has_experts else status_html(DENSE), elem_id="experts", js_on_load=None)

    def _draw_file(self) -> None:
        self.file = gr.File(
            label="File to translate (txt, html or srt, UTF-8)", file_types=[*DOCUMENT_OF_SUFFIX], elem_id="file"
        )
        self.translate_file = gr.Button("Translate the file", variant="primary", elem_id="translate_file")
        self.translated_file = gr.File(label="Translated file", interactive=False, elem_id="translated_file")
        self.file_details = gr.HTML(elem_id="file_details", js_on_load=None)

    def _draw_glossary(self) -> None:
        self.glossary = gr.Textbox(
            "",  # otherwise parts that are not drawn yet have no value
            label="Terms and their translations",
            info="One term per line, then a tab or ' = ' and its translation; a term alone is not translated.",
            lines=3,
            max_lines=12,
            elem_id="glossary",
        )
        self.glossary_file = gr.UploadButton(
            "Load a glossary from a file (TSV, UTF-8)", file_types=[".tsv", ".txt"], size="sm", elem_id="glossary_file"
        )

    def wire(self, page: gr.Blocks) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on(  # `source.input` only sees key presses, not text that is pasted, deleted, or from an input method
            [
                self.source.change,
                self.src_lang.change,
                self.tgt_lang.change,
                self.num_alternatives.change,
                self.glossary.change,
            ],
            self._on_text,
            [self.source, self.src_lang, self.tgt_lang, self.num_alternatives, self.glossary, self.order],
            [self.translation, self.message, self.details, self.state],
            js=_WITH_ORDER,
            trigger_mode="multiple",  # a newer request ends an older one, see `LatestOnly`
            **private,
        )
        gr.on(
            [self.state.change, self.shows_experts.change],
            self._on_sentences,
            [self.state, self.shows_experts],
            [self.sentence, self.picture],
            trigger_mode="always_last",
            concurrency_limit=1,
            concurrency_id="picture",
            **private,
        )
        self.sentence.input(
            self._on_sentence,
            [self.state, self.sentence],
            self.picture,
            trigger_mode="always_last",
            concurrency_id="picture",
            **private,
        )
        self.swap.click(
            self._on_swap, [self.state, self.src_lang, self.tgt_lang, self.source, self.translation],
            [self.src_lang, self.tgt_lang, self.source], **private,
        )  # fmt: skip
        self.glossary_file.upload(self._on_glossary_file, self.glossary_file, [self.glossary, self.message], **private)
        self.copy.click(None, self.translation, js=_COPY, api_visibility="private")
        self.translate_file.click(
            self._on_file,
            [self.file, self.src_lang, self.tgt_lang, self.glossary],
            [self.translated_file, self.message, self.file_details],
            api_visibility="private",
        )
        page.unload(self._on_unload)

    async def _on_text(
        self,
        text: str,
        src_lang: str,
        tgt_lang: str,
        num_alternatives: int,
        glossary: str,
        order: float,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """Translation, message, details and state."""
        work = self._translated(text, src_lang, tgt_lang, int(num_alternatives), glossary, _client(request))
        try:
            translated = await self._latest.run(str(request.session_hash), order, work)
        except (ValueError, QueueFullError, ClosedError) as error:
            return "", error_html(str(error)), "", None
        if translated is None:
            return (gr.skip(),) * 4
        found = f"Translated from {language_name(translated.src_lang)}." if src_lang == AUTO and text.strip() else ""
        return (
            gr.Textbox(translated.text, rtl=is_right_to_left(translated.tgt_lang)),
            status_html(found),
            problems_html([translated]) + alternatives_html(translated),
            _state_of(translated),
        )

    async def _translated(self, *args: Any) -> TranslatedText:
        await asyncio.sleep(DEBOUNCE_S)
        return await self._work.translate(*args)

    async def _on_sentences(self, state: dict[str, Any] | None, shows_experts: bool) -> tuple[Any, str]:
        """The list of sentences, and the picture of the first one."""
        if state is None or not state["sentences"] or not shows_experts:
            return gr.Dropdown([], value=None, visible=False), "" if self._work.has_experts else status_html(DENSE)
        labels = [
            f"{number}. {source[:MAX_SENTENCE_LABEL]}" for number, (source, _) in enumerate(state["sentences"], start=1)
        ]
        return gr.Dropdown(labels, value=labels[0], visible=len(labels) > 1), await self._on_sentence(state, 0)

    async def _on_sentence(self, state: dict[str, Any] | None, index: int | None) -> str:
        """The picture of a sentence, and the languages that are routed alike."""
        if state is None or index is None:
            return ""
        src_lang, tgt_lang = state["src_lang"], state["tgt_lang"]
        try:
            source, translation = state["sentences"][index]
            picture = await asyncio.to_thread(self._work.picture, source, translation, src_lang, tgt_lang)
        except ValueError as error:
            return error_html(str(error))
        return picture + self._work.similar_languages(src_lang, tgt_lang)

    def _on_swap(
        self, state: dict[str, Any] | None, src_lang: str, tgt_lang: str, source: str, translation: str
    ) -> tuple[str, str, str]:
        """New source and target language, and the text, which is the translation if there is one."""
        if src_lang == AUTO:
            others = (language for language in self._work.languages if language != tgt_lang)
            src_lang = next(others, tgt_lang) if state is None else state["src_lang"]
        return tgt_lang, src_lang, translation or source

    async def _on_file(
        self, path: str | None, src_lang: str, tgt_lang: str, glossary: str, request: gr.Request
    ) -> tuple[str | None, str, str]:
        """Translated file, message and details."""
        if path is None:
            return None, error_html("choose a file first"), ""
        try:
            name, translated = await self._work.translate_file(
                Path(path), src_lang, tgt_lang, glossary, _client(request)
            )
        except (ValueError, QueueFullError, ClosedError) as error:
            return None, error_html(str(error)), ""
        folder = Path(tempfile.mkdtemp(dir=self.file.GRADIO_CACHE))
        (folder / name).write_bytes(translated.text.encode())
        status = status_html(f"Translated from {language_name(translated.src_lang)}.")
        return str(folder / name), status, problem_list_html(translated.problems)

    def _on_glossary_file(self, path: str) -> tuple[Any, str]:
        """Glossary and message."""
        try:
            return Path(path).read_bytes().decode("utf-8-sig"), ""
        except UnicodeDecodeError as error:
            return gr.skip(), error_html(f"the glossary is not UTF-8: byte {error.start} cannot be read")

    def _on_unload(self, request: gr.Request) -> None:
        self._latest.forget(str(request.session_hash))


def _state_of(translated: TranslatedText) -> dict[str, Any]:
    """The data for the pictures."""
    return {
        "src_lang": translated.src_lang,
        "tgt_lang": translated.tgt_lang,
        "sentences": [(sentence.source, sentence.text) for sentence in translated.sentences],
    }


def _client(request: gr.Request) -> str:
    return request.client.host if request.client is not None else ""


__all__ = ["draw", "mount"]
