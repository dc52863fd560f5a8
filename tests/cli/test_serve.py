"""The command that serves: started as a process, used by LibreTranslate's own client, stopped in the middle."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_runs import COMMAND, message_of, run
from libretranslatepy import LibreTranslateAPI

OPTIONS = ("--beams", "2", "--device", "cpu", "--no-page")


@pytest.fixture
def server(model_and_text: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[Any, str, Path]]:
    """The process, its URL and its log."""
    model, _ = model_and_text
    keys, log = tmp_path / "keys.txt", tmp_path / "log"
    keys.write_text("key-1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with log.open("wb") as output:
        command = [COMMAND, "serve", str(model), "--port", port, "--api-keys", str(keys), *OPTIONS]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process)
        yield process, url, log
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: Any) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            assert httpx.get(f"{url}/health").json() == {"status": "ok"}
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"it did not start (exit code {process.poll()})")


def test_server(server: tuple[Any, str, Path]) -> None:
    process, url, log = server
    client = LibreTranslateAPI(url, api_key="key-1")
    assert [language["code"] for language in client.languages()] == ["en", "de"]
    assert client.detect("nichts gespeichert: die Festplatte ist voll")[0]["language"] == "de"
    assert isinstance(client.translate("save", "en", "de", timeout=60), str)
    wrong = httpx.post(f"{url}/translate", data={"q": "a", "source": "en", "target": "de", "api_key": "no"})
    assert (wrong.status_code, wrong.json()) == (403, {"error": "Invalid API key"})
    text = "\n".join(f"A secret number {number} is told here." for number in range(60))
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.translate, text, "en", "de", 120)
        while "hf_moe_ted_requests_in_flight 1.0" not in httpx.get(f"{url}/metrics").text:
            assert not running.done()
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert running.result().count("\n") == 59  # finished, not cut
    assert process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    logged = log.read_text(errors="replace")
    assert "POST /translate 200" in logged
    assert "Traceback" not in logged
    assert "secret" not in logged


def test_what_cannot_be_served(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = model_and_text
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = message_of("serve", model, "--port", port, *OPTIONS)
    assert message == f"port ({port}) of 127.0.0.1 cannot be used: Address already in use; choose another"
    assert "nowhere" in message_of("serve", tmp_path / "nowhere", "--port", 0, *OPTIONS)
    assert "api_keys" in message_of("serve", model, "--port", 0, "--api-keys", tmp_path / "nowhere", *OPTIONS)
    assert "port (99999) must be between 0 and 65535" in message_of("serve", model, "--port", 99_999, *OPTIONS)
    assert "max_texts (0) must be positive" in message_of("serve", model, "--port", 0, "--max-texts", 0, *OPTIONS)
    assert "host (no.such.host.invalid) is unknown" in message_of("serve", model, "--host", "no.such.host.invalid")


def test_folder_that_cannot_be_read(model_and_text: tuple[Path, Path]) -> None:
    model, _ = model_and_text
    (model / "config.json").write_text("{")
    assert "config.json" in message_of("serve", model, "--port", 0, *OPTIONS)
    (model / "config.json").unlink()
    os.mkdir(model / "config.json")
    assert str(model) in message_of("serve", model, "--port", 0, *OPTIONS)


def test_missing_extra(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('none', name='fastapi')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [COMMAND, "serve", str(model_and_text[0]), *OPTIONS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: the server needs fastapi: `pip install 'hf-moe-ted[serve]'`"


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.strip().count(".") == 2
