"""Requests to the page that are too large, and uploads that have no room."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from hf_moe_ted.serving.page_guard import FORM_BYTES, JSON_BYTES, PageGuard


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    app = FastAPI()

    @app.post("/{path:path}")
    async def length(request: Request) -> int:
        return len(await request.body())

    @app.get("/")
    async def read() -> str:
        return "read"

    app.add_middleware(
        PageGuard, max_characters=10, max_file_bytes=20, folder=lambda: str(tmp_path), max_stored_bytes=FORM_BYTES + 50
    )
    return TestClient(app)


def test_bodies(client: TestClient) -> None:
    limits = {"/queue/join": JSON_BYTES + 120, "/upload": FORM_BYTES + 20}
    for path, limit in limits.items():
        assert client.post(path, content=b"x" * limit).json() == limit
        refused = client.post(path, content=b"x" * (limit + 1))
        assert refused.status_code == 413
        assert refused.json() == {"detail": f"a request has {limit + 1:,} bytes, but this page accepts {limit:,}"}
    assert client.get("/").json() == "read"


def test_a_length_is_needed(client: TestClient) -> None:
    def chunks() -> Any:
        yield b"x"

    assert client.post("/upload", content=chunks()).status_code == 411


def test_room_for_uploads(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x" * FORM_BYTES)
    assert client.post("/upload", content=b"x" * 50).status_code == 200
    refused = client.post("/upload/", content=b"x" * 51)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert client.post("/queue/join", content=b"x" * 51).status_code == 200
    (tmp_path / "folder" / "file").unlink()
    assert client.post("/upload", content=b"x" * 51).status_code == 200
