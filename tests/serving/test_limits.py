"""No client can take everything: limits, keys, clients that go away or do nothing."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from serving_cases import MakeClient, Shouting, error_of, served, wait_until
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from hf_moe_ted import ApiKeys, BatchedTranslator, ServerSettings, bind_address, create_app
from hf_moe_ted.serving.connection import PatientConnection
from hf_moe_ted.serving.file_store import FileStore
from hf_moe_ted.serving.rate_limit import RateLimit
from hf_moe_ted.serving.server import server_config

PAIR = {"source": "en", "target": "de"}
TEXT = {"q": "close it", **PAIR}


def metric(client: Any, name: str) -> float:
    """Its only value."""
    [line] = [line for line in client.get("/metrics").text.split("\n") if line.startswith(f"{name} ")]
    return float(line.split(" ")[1])


def test_too_much_text(make_client: MakeClient) -> None:
    client = make_client(max_characters=100, max_texts=3)
    for q in ("a" * 101, ["a" * 60, "b" * 60], ["a"] * 4):
        answer = client.post("/translate", json={"q": q, **PAIR})
        assert answer.status_code == 413
        assert error_of(answer).startswith("Invalid request: ")
    assert client.post("/detect", json={"q": "a" * 101}).status_code == 413
    assert client.post("/translate", json={"q": ["\U0001f600" * 33] * 3, **PAIR}).status_code == 200
    escaped = '{"q": "' + "\\ud83d\\ude00" * 100 + '", "source": "en", "target": "de"}'
    answer = client.post("/translate", content=escaped, headers={"content-type": "application/json"})
    assert answer.status_code == 200  # the limit of bytes leaves room for any way to write so many characters


def test_megabyte_of_text(client: TestClient) -> None:
    text = "close all the tabs of the window, please\n" * 25_000
    assert client.post("/translate", json={"q": text, **PAIR}).status_code == 413
    answer = client.post("/translate_file", files={"file": ("a.txt", text)}, data=PAIR)
    assert client.get(answer.json()["translatedFileUrl"]).text == text.upper()


def test_too_large_bodies(make_client: MakeClient) -> None:
    client = make_client(max_characters=10, max_file_bytes=1_000)

    def pieces() -> Any:
        for _ in range(1_000):
            yield b"a" * 1_000

    for content in (b"a" * 100_000, pieces()):  # with a known length, and without one
        answer = client.post("/translate", content=content)
        assert answer.status_code == 413
        assert error_of(answer) == "Invalid request: the body has more than 65656 bytes"
    answer = client.post("/translate_file", files={"file": ("a.txt", b"a" * 1_001)}, data=PAIR)
    assert answer.status_code == 413
    assert error_of(answer) == "Invalid request: the file has more than 1000 bytes"


def test_too_many_at_once(make_client: MakeClient, shouting: Shouting) -> None:
    client = make_client(max_requests=2)
    shouting.gate.clear()
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(client.post, "/translate", json=TEXT) for _ in range(2)]
        wait_until(lambda: metric(client, "hf_moe_ted_requests_in_flight") == 2)
        refused = client.post("/translate", json=TEXT)
        assert client.get("/health").status_code == 200
        shouting.gate.set()
        assert [other.result().status_code for other in others] == [200, 200]
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert client.post("/translate", json=TEXT).status_code == 200
    assert metric(client, "hf_moe_ted_requests_in_flight") == 0


def test_full_queue(make_client: MakeClient, shouting: Shouting) -> None:
    client = make_client(max_waiting_characters=100)
    shouting.gate.clear()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, "/translate", json={"q": "a" * 80, **PAIR})
        wait_until(lambda: metric(client, "hf_moe_ted_waiting_characters") == 80)
        refused = client.post("/translate", json={"q": "b" * 80, **PAIR})
        assert client.post("/detect", json={"q": "b"}).status_code == 200
        shouting.gate.set()
        assert first.result().status_code == 200
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


def test_rate(make_client: MakeClient) -> None:
    client = make_client(requests_per_minute=3)
    answers = [client.post("/detect", data={"q": "a"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert error_of(answers[-1]).startswith("Slowdown:")
    assert client.get("/languages").status_code == 200


def test_rate_of_each_client() -> None:
    now = 0.0
    rate = RateLimit(60, lambda: now)
    assert [rate.wait_s("a") for _ in range(60)] == [0.0] * 60
    assert rate.wait_s("a") == pytest.approx(1.0)
    assert rate.wait_s("b") == 0.0
    now = 1.0
    assert rate.wait_s("a") == 0.0
    assert rate.wait_s("a") == pytest.approx(1.0)
    now = 100.0
    for number in range(1_000):
        now += 1.0
        assert rate.wait_s(str(number)) == 0.0
    assert len(rate) < 100  # those that are long gone are forgotten


def test_keys(make_client: MakeClient, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of Anna\nkey-1\n\n  ключ  \n", encoding="utf-8")
    client = make_client(api_keys=ApiKeys.from_file(file), requests_per_minute=5)
    for path, fields in (("/translate", TEXT), ("/detect", {"q": "a"})):
        missing = client.post(path, json=fields)
        wrong = client.post(path, json={**fields, "api_key": "key-2"})
        assert (missing.status_code, wrong.status_code) == (403, 403)
        assert error_of(missing) == "Please contact the server operator to get an API key"
        assert error_of(wrong) == "Invalid API key"
        assert client.post(path, json={**fields, "api_key": "key-1"}).status_code == 200
    for _ in range(3):
        assert client.post("/translate", json={**TEXT, "api_key": "key-1"}).status_code == 200
    assert client.post("/translate", json={**TEXT, "api_key": "key-1"}).status_code == 429
    assert client.post("/translate", data={**TEXT, "api_key": "ключ"}).status_code == 200  # has a rate of its own
    upload = {"files": {"file": ("a.txt", "a")}}
    assert client.post("/translate_file", **upload, data=PAIR).status_code == 403
    assert client.post("/translate", json={**TEXT, "api_key": "key-3"}).status_code == 429  # too many guesses
    assert client.post("/translate_file", **upload, data={**PAIR, "api_key": "ключ"}).status_code == 200
    assert client.get("/languages").status_code == 200
    assert client.get("/frontend/settings").json()["keyRequired"]


def test_bad_key_files(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("# none\n")
    binary.write_bytes(b"\xff\xfe")
    cases = {empty: "has no key", binary: "must be text in UTF-8", tmp_path / "none": "cannot be read: No such file"}
    for file, message in cases.items():
        with pytest.raises(ValueError, match=f"api_keys .*{file.name}.* {message}"):
            ApiKeys.from_file(file)
    assert "secret" not in repr(ServerSettings(api_keys=ApiKeys(["secret"])))


@pytest.mark.parametrize("name", ["max_characters", "max_requests", "requests_per_minute", "file_lifetime_s"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be positive"):
        ServerSettings(**{name: 0})


def test_translation_that_takes_too_long(make_client: MakeClient, shouting: Shouting) -> None:
    client = make_client(request_timeout_s=0.2)
    shouting.gate.clear()
    answer = client.post("/translate", json=TEXT)
    assert answer.status_code == 503
    assert error_of(answer) == "The translation took longer than 0.2 s"
    assert answer.headers["retry-after"] == "1"
    wait_until(lambda: metric(client, "hf_moe_ted_waiting_characters") == 0)
    wait_until(lambda: not shouting.is_busy)
    shouting.gate.set()
    assert client.post("/translate", json={**TEXT, "q": "next"}).status_code == 200
    assert shouting.texts_seen == ["next"]


def test_files_are_removed() -> None:
    now = 0.0
    store = FileStore(lifetime_s=10.0, max_bytes=10, clock=lambda: now)
    key = store.put("a_de.txt", b"12345")
    found = store.get(key)
    assert found is not None
    assert found.path.read_bytes() == b"12345"
    assert found.path.parent.stat().st_mode & 0o077 == 0  # nobody else's
    assert key.endswith(".a_de.txt")
    assert (store.has_room(5), store.has_room(6)) == (True, False)
    now = 4.0
    assert store.seconds_to_room() == 6.0
    now = 10.0
    assert store.get(key) is None
    assert not found.path.exists()
    assert store.has_room(10)
    store.put("b", b"1")
    store.close()
    assert not found.path.parent.exists()


def test_no_room_for_files(make_client: MakeClient) -> None:
    client = make_client(max_stored_bytes=9_000)
    answers = [client.post("/translate_file", files={"file": ("a.txt", b"a" * 3_000)}, data=PAIR) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 503]
    assert 1 <= int(answers[1].headers["retry-after"]) <= 1_800


def test_client_that_goes_away(shouting: Shouting) -> None:
    shouting.gate.clear()
    with served(shouting) as url, httpx.Client(base_url=url) as client:
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/translate", json=TEXT, timeout=0.3)
        assert shouting.begun.is_set()
        wait_until(lambda: metric(client, "hf_moe_ted_waiting_characters") == 0)
        wait_until(lambda: metric(client, "hf_moe_ted_requests_in_flight") == 0)
        wait_until(lambda: not shouting.is_busy)
        shouting.gate.set()
        assert client.post("/translate", json={**TEXT, "q": "next"}).json()["translatedText"] == "NEXT"
        assert 'status="499"' in client.get("/metrics").text
    assert shouting.texts_seen == ["next"]


def test_connections_that_do_nothing(shouting: Shouting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred of them: nothing, half a head, half a body."""
    # long enough that on a busy machine the bodies are waited for, and not the heads, where a head was sent
    monkeypatch.setattr(PatientConnection, "head_timeout_s", 8.0)
    starts = (
        b"",
        b"POST /translate HTTP/1.1\r\nHost",
        b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\na",
    )
    with served(shouting, read_timeout_s=1.0) as url, contextlib.ExitStack() as opened:
        address = ("127.0.0.1", httpx.URL(url).port)
        idle = [opened.enter_context(socket.create_connection(address, timeout=20)) for _ in range(100)]
        for number, connection in enumerate(idle):
            connection.sendall(starts[number % len(starts)])
        assert httpx.post(f"{url}/translate", json=TEXT).json()["translatedText"] == "CLOSE IT"
        answers = [_rest(connection) for connection in idle]
    assert {answer[:12] for answer in answers[2::3]} == {b"HTTP/1.1 408"}
    assert {*answers[0::3], *answers[1::3]} == {b""}


def _rest(connection: socket.socket) -> bytes:
    """Until the server hangs up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            received += piece
            if b" 408 " in received and received.endswith(b"}"):
                break
    return received


def test_client_that_stops_reading(shouting: Shouting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientConnection, "write_timeout_s", 0.5)
    with served(shouting) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.connect(("127.0.0.1", httpx.URL(url).port))
        connection.settimeout(0.5)
        ended = threading.Event()

        def ask() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
            ended.set()

        threading.Thread(target=ask).start()
        assert ended.wait(20)  # nothing more is taken from it
        assert httpx.post(f"{url}/translate", json=TEXT).json()["translatedText"] == "CLOSE IT"
        end = time.monotonic() + 20.0
        with pytest.raises(ConnectionError):  # the server has hung up
            while time.monotonic() < end:
                connection.send(b"GET / HTTP/1.1\r\n")
                time.sleep(0.1)


def test_client_that_goes_away_in_its_body(shouting: Shouting, caplog: pytest.LogCaptureFixture) -> None:
    with served(shouting) as url, httpx.Client(base_url=url) as client:
        head = b"POST /translate HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n"
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
            connection.sendall(head + b"q=a")
            wait_until(lambda: metric(client, "hf_moe_ted_requests_in_flight") == 1)
        wait_until(lambda: metric(client, "hf_moe_ted_requests_in_flight") == 0)
        wait_until(lambda: 'endpoint="/translate",status="499"' in client.get("/metrics").text)
        assert 'status="500"' not in client.get("/metrics").text
    assert "ERROR" not in caplog.text


def test_stop_does_not_wait_for_an_open_page(shouting: Shouting) -> None:
    app = create_app(BatchedTranslator(shouting, wait_s=0.0))

    @app.get("/gradio_api/heartbeat/{session}")
    async def heartbeat(session: str) -> StreamingResponse:
        async def beats() -> AsyncIterator[str]:
            while True:
                yield "data: ALIVE\n\n"
                await asyncio.sleep(0.05)

        return StreamingResponse(beats(), media_type="text/event-stream")

    address = bind_address("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app, stop_timeout_s=600))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{address.getsockname()[1]}/gradio_api/heartbeat/s"
    with httpx.stream("GET", url) as stream:
        beats = stream.iter_text()  # without a name it would be closed, and the connection with it
        assert next(beats).startswith("data")
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
