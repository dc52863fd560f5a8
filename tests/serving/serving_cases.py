"""A translator that shouts instead of running a model, and servers around it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient
from translation_cases import TEXTS, tiny_model

from hf_moe_ted import BatchedTranslator, ServerSettings, TextTranslator, ZCodeM3Tokenizer, bind_address, create_app
from hf_moe_ted.serving.server import server_config
from hf_moe_ted.translation.sentence_translator import SourceSentence
from hf_moe_ted.translation.text_translator import TranslatedSentence

BAD_WORD = "explode"  # a text with it fails in the model


class Shouting(TextTranslator):
    """Capital letters are the translation; alternatives have exclamation marks.

    Attributes:
        gate: what all batches wait for; open at first.
        begun: is set when a batch has begun.
        is_busy: whether a batch runs.
        texts_seen: sentences of all batches that were finished.
        phrases_seen: what their translations had to have.
    """

    def __init__(self, **options: Any):
        super().__init__(tiny_model(), ZCodeM3Tokenizer(languages=[*TEXTS]), **{"num_beams": 3, **options})
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.is_busy = False
        self.texts_seen: list[str] = []
        self.phrases_seen: list[str] = []

    def translate_batch(
        self, batch: Sequence[SourceSentence], on_step: Callable[[], None] | None = None, *, search: bool = True
    ) -> list[TranslatedSentence]:
        self.is_busy = True
        self.begun.set()
        try:
            while not self.gate.wait(0.01):
                assert on_step is not None
                on_step()  # raises where nobody waits any more
        finally:
            self.is_busy = False
        if bad := [sentence.text for sentence in batch if BAD_WORD in sentence.text]:
            raise RuntimeError(f"no translation of {bad[0]}")
        self.texts_seen += [sentence.text for sentence in batch]
        self.phrases_seen += [phrase.text for sentence in batch for phrase in sentence.phrases]
        return [self._shouted(sentence) for sentence in batch]

    def _shouted(self, sentence: SourceSentence) -> TranslatedSentence:
        loud = sentence.text.upper()
        others = tuple(loud + "!" * rank for rank in range(1, sentence.num_sequences))
        problems = ("is empty of sense",) if "nonsense" in sentence.text else ()
        return TranslatedSentence(source=sentence.text, text=loud, alternatives=others, problems=problems)


MakeClient = Callable[..., TestClient]


@pytest.fixture
def shouting() -> Iterator[Shouting]:
    translator = Shouting()
    yield translator
    translator.gate.set()  # nobody waits for a test that failed


@pytest.fixture
def make_client(shouting: Shouting) -> Iterator[MakeClient]:
    """Clients of an app with settings, without a network."""
    with contextlib.ExitStack() as clients:

        def make(max_waiting_characters: int = 1_000_000, **settings: Any) -> TestClient:
            translator = BatchedTranslator(shouting, wait_s=0.0, max_waiting_characters=max_waiting_characters)
            return clients.enter_context(TestClient(create_app(translator, ServerSettings(**settings))))

        yield make
        shouting.gate.set()


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()


@contextlib.contextmanager
def served(shouting: Shouting, **settings: Any) -> Iterator[str]:
    """The URL of a server on this machine."""
    app = create_app(BatchedTranslator(shouting, wait_s=0.0), ServerSettings(**settings))
    address = bind_address("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{address.getsockname()[1]}"
        wait_until(lambda: server.started)
        yield url
    finally:
        shouting.gate.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def error_of(response: httpx.Response) -> str:
    """The message of an answer that is an error."""
    assert list(response.json()) == ["error"]
    return response.json()["error"]
