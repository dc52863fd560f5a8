"""The page as a person sees it, in headless Chromium, and what its server refuses."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hf_moe_ted import ApiKeys, BatchedTranslator, TextTranslator, load_model_and_tokenizer, token_routing

pytest.importorskip("gradio")
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hf_moe_ted.routing.token_picture import expert_colours
from hf_moe_ted.serving.page import mount_page
from hf_moe_ted.translation.glossary import Glossary

DEMO = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo"
CHROMIUM = Path("/usr/bin/chromium")
WAIT_MS = 15_000


class Counted(BatchedTranslator):
    """Notes the texts that it is asked for."""

    def __init__(self, translator: TextTranslator):
        super().__init__(translator)
        self.asked: list[str] = []

    async def translate(self, texts: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked += texts
        return await super().translate(texts, *args, **kwargs)


@pytest.fixture(scope="module")
def text_translator() -> TextTranslator:
    return TextTranslator(*load_model_and_tokenizer(DEMO, device="cpu"), num_beams=2)


@pytest.fixture(scope="module")
def translator(text_translator: TextTranslator) -> Iterator[Counted]:
    batched = Counted(text_translator)
    yield batched
    with ThreadPoolExecutor(1) as thread:  # in which no event loop of Playwright runs
        thread.submit(asyncio.run, batched.close()).result()


@pytest.fixture(scope="module")
def address(translator: Counted) -> Iterator[str]:
    """Of a server with the page."""
    app = mount_page(FastAPI(), translator, max_characters=200, max_file_bytes=1000)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.05)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no {CHROMIUM}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@dataclass
class Seen:
    """What pages have asked for, and the errors of their scripts."""

    urls: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """What pages share: the cache."""
    with browser.new_context() as context:
        context.set_default_timeout(WAIT_MS)
        yield context


@pytest.fixture
def page(context: Any, address: str, seen: Seen) -> Iterator[Any]:
    """From English to German."""
    page = context.new_page()
    page.on("request", lambda request: seen.urls.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.goto(address)
    choose(page, "Translate from", "English")
    choose(page, "Translate to", "German")
    yield page
    page.close()


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as of_playwright

    of_playwright.set_options(timeout=WAIT_MS)
    return of_playwright(locator)


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_role("combobox", name=label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)


def translation(page: Any) -> Any:
    return page.get_by_label("Translation", exact=True)


# --- in the browser


def test_typed_text_is_translated(page: Any, translator: Counted, text_translator: TextTranslator) -> None:
    text, before = "Close all tabs", len(translator.asked)
    page.get_by_label("Text", exact=True).press_sequentially(text, delay=20)
    expected = text_translator.translate([text], "en", "de")[0].text
    expect(translation(page)).to_have_value(expected)
    asked = translator.asked[before:]
    assert asked[-1] == text and len(asked) < len(text) / 2, "it is not translated again for each letter"
    page.keyboard.press("Backspace")  # no key that writes
    expect(translation(page)).to_have_value(text_translator.translate([text := text[:-1]], "en", "de")[0].text)
    choose(page, "Translate to", "French")
    in_french = text_translator.translate([text], "en", "fr")[0].text
    expect(translation(page)).to_have_value(in_french)
    page.get_by_role("button", name="Swap languages").click()
    expect(page.get_by_label("Text", exact=True)).to_have_value(in_french)
    back = text_translator.translate([in_french], "fr", "en")[0].text
    expect(translation(page)).to_have_value(back)
    choose(page, "Translate from", "Detect language")
    page.get_by_label("Text", exact=True).fill("Die Datei konnte nicht gespeichert werden.")
    expect(page.locator("#message")).to_have_text(re.compile("Translated from German"))


def test_alternatives_and_what_should_be_looked_at(page: Any, text_translator: TextTranslator) -> None:
    text = "Close all tabs. {a} {b} {c} and {d} or {e} of {f} in {g}"
    page.get_by_label("Text", exact=True).fill(text)
    choose(page, "Other translations of each sentence", "1")
    expected = text_translator.translate([text], "en", "de", num_alternatives=1)[0]
    assert any(sentence.alternatives for sentence in expected.sentences)
    table = page.locator("#details table.alternatives")
    for sentence in expected.sentences:
        for other, score in zip(sentence.alternatives, sentence.scores[1:], strict=True):
            row = table.locator("tr", has=page.get_by_role("cell", name=other, exact=True))
            expect(row.first).to_contain_text(f"{score:.3f}")
    flagged = [problem for sentence in expected.sentences for problem in sentence.problems]
    assert flagged, "the demo model loses places for values here"
    expect(page.locator("#details table.problems")).to_contain_text(flagged[0])
    page.get_by_role("combobox", name="Other translations of each sentence").focus()
    for key in ("ArrowUp", "Enter"):
        page.keyboard.press(key)
    expect(table).to_have_count(0)


def test_right_to_left(page: Any, text_translator: TextTranslator) -> None:
    choose(page, "Translate to", "Arabic")
    page.get_by_label("Text", exact=True).fill("Close all tabs.")
    expect(translation(page)).to_have_value(text_translator.translate(["Close all tabs."], "en", "ar")[0].text)
    expect(translation(page)).to_have_css("direction", "rtl")
    page.get_by_label("Show which experts").check()
    decoder = page.locator("#experts table[data-side=decoder] td").first
    expect(decoder).to_have_css("direction", "rtl")
    expect(page.locator("#experts table[data-side=encoder] td").first).to_have_css("direction", "ltr")
    choose(page, "Translate to", "German")
    expect(translation(page)).to_have_css("direction", "ltr")


def test_which_experts_each_token_went_to(page: Any, text_translator: TextTranslator) -> None:
    text = "Close all tabs. Open the file."
    page.get_by_label("Show which experts").check()
    page.get_by_label("Text", exact=True).fill(text)
    translated = text_translator.translate([text], "en", "de")[0]
    model, tokenizer = text_translator.model, text_translator.tokenizer
    for number, sentence in enumerate(translated.sentences):
        if number > 0:
            choose(page, "Sentence", f"{number + 1}. {sentence.source}")
        routing = token_routing(model, tokenizer, sentence.source, sentence.text, "en", "de")
        layers = [*routing.encoder.layers, *routing.decoder.layers]
        rows = page.locator("#experts tr")
        expect(rows).to_have_count(len(layers))
        expect(rows.first.locator("bdi")).to_have_text(list(routing.encoder.tokens), use_inner_text=False)
        for index, layer in enumerate(layers):
            experts = [str(expert) for (expert,) in layer.expert_ids.tolist()]
            boxes = rows.nth(index).locator(".token")
            assert boxes.evaluate_all("boxes => boxes.map(box => box.dataset.experts)") == experts
            inks = boxes.locator("bdi").evaluate_all("texts => texts.map(text => getComputedStyle(text).color)")
            colours = expert_colours(layer.num_experts)
            assert inks == [rgb(colours[int(expert)].ink) for expert in experts]
    expect(page.locator("#experts")).to_contain_text("hf-moe-ted expert-statistics")


def test_errors_are_said_in_words(page: Any) -> None:
    alert = page.locator("#message [role=alert]")
    choose(page, "Translate to", "English")
    page.get_by_label("Text", exact=True).fill("yes")
    expect(alert).to_contain_text("The text would be translated from en to en: choose two languages")
    choose(page, "Translate to", "German")
    expect(alert).to_have_count(0)
    page.get_by_label("Text", exact=True).fill("x" * 201)
    expect(alert).to_contain_text("The text has 201 characters, but this page accepts 200")
    expect(translation(page)).to_have_value("")


def test_text_is_no_html(page: Any) -> None:
    text = (
        "<script>document.title='1'</script> <img src=x onerror=\"document.title='2'\"> ${document.title='3'} {{value}}"
    )
    page.get_by_label("Show which experts").check()
    page.get_by_label("Text", exact=True).fill(text)
    expect(page.locator("#experts tr").first.locator("bdi").last).to_have_text("</s>")
    shown = page.locator("#experts tr").first.locator("bdi").all_text_contents()
    assert "".join(shown[1:-1]) == text
    assert page.title() == "Translate"
    assert page.locator("#experts img, #experts script, #details img, #details script").count() == 0


def test_file_in_and_out(page: Any, text_translator: TextTranslator, tmp_path: Path) -> None:
    content = "Close all tabs\r\n\r\nOpen the file\n"
    (tmp_path / "notes.txt").write_bytes(content.encode())
    page.get_by_role("tab", name="File", exact=True).click()
    page.get_by_role("button", name="Translate the file").click()
    expect(page.locator("#message [role=alert]")).to_contain_text("Choose a file first")
    page.locator("#file input[type=file]").set_input_files(tmp_path / "notes.txt")
    expect(page.locator("#file")).to_contain_text("notes")
    page.get_by_role("button", name="Translate the file").click()
    link = page.locator("#translated_file a[download]").first
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "notes.de.txt"
    expected = text_translator.translate([content], "en", "de")[0].text
    assert download.value.path().read_bytes() == expected.encode()


def test_glossary(page: Any, text_translator: TextTranslator) -> None:
    glossary = Glossary([("tabs", "Reiter")])
    without, expected = (
        text_translator.translate(["Close all tabs"], "en", "de", glossary=each)[0].text for each in (None, glossary)
    )
    assert "Reiter" in expected
    # opened first: Gradio empties the box once more in the instant after it has drawn it
    page.get_by_role("button", name=re.compile("^Glossary")).click()
    page.get_by_label("Text", exact=True).fill("Close all tabs")
    expect(translation(page)).to_have_value(without)
    page.get_by_label("Terms and their translations").fill("tabs = Reiter")
    expect(translation(page)).to_have_value(expected)
    page.get_by_label("Terms and their translations").fill("a = b = c")
    expect(page.locator("#message [role=alert]")).to_contain_text("Line 1 of the glossary must be a term")


def test_every_control_has_a_name(page: Any) -> None:
    controls = page.locator("input:visible, textarea:visible, button:visible, select:visible")
    names = controls.evaluate_all(
        "all => all.map(c => (c.labels && [...c.labels].map(l => l.innerText).join('')) "
        "|| c.getAttribute('aria-label') || c.innerText || c.title || '')"
    )
    assert len(names) >= 8
    assert [index for index, name in enumerate(names) if not name.strip()] == []


def test_nothing_left_this_machine(seen: Seen, browser: Any, address: str) -> None:
    """By all tests above."""
    hosts = {urlsplit(url).netloc for url in seen.urls if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}
    assert seen.errors == []


def rgb(colour: str) -> str:
    """`#ff0000` -> `rgb(255, 0, 0)`, as browsers say it."""
    return f"rgb({', '.join(str(int(colour[start : start + 2], 16)) for start in (1, 3, 5))})"


# --- what the server refuses


def test_a_key_is_needed_where_the_server_has_keys(translator: Counted) -> None:
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "well"

    client = TestClient(mount_page(app, translator, api_keys=ApiKeys(["secret"])))
    event = {"data": [], "fn_index": 0, "session_hash": "x"}

    def answers() -> list[int]:
        return [
            client.get("/config").status_code,
            client.post("/gradio_api/upload", files={"files": ("a.txt", b"x")}).status_code,
            client.post("/gradio_api/queue/join", json=event).status_code,
            client.get("/gradio_api/queue/data", params={"session_hash": "y"}).status_code,
        ]

    assert client.get("/health").json() == "well"
    assert answers() == [401] * 4
    assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
    assert answers() == [401] * 4
    assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
    assert client.get("/config").status_code == 200


def test_files_and_calls_from_outside(translator: Counted) -> None:
    client = TestClient(mount_page(FastAPI(), translator, max_file_bytes=1000))
    assert client.get("/").status_code == 200
    for path in (DEMO / "config.json", Path(__file__), Path("/etc/passwd")):
        assert client.get(f"/gradio_api/file={path}").status_code == 403
    too_large = client.post("/gradio_api/upload", files={"files": ("a.txt", b"x" * 1001)})
    assert too_large.status_code == 413
    assert client.post("/gradio_api/upload", files={"files": ("a.txt", b"x")}).status_code == 200
    described = client.get("/gradio_api/info").json()
    assert described["named_endpoints"] == {} and described["unnamed_endpoints"] == {}
    config = client.get("/config").json()
    assert not config["analytics_enabled"]
