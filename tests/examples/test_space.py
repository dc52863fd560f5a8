"""The Space starts, and its card and requirements fit together."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from hf_moe_ted import ZCodeM3Tokenizer

pytest.importorskip("gradio")

SPACE = Path(__file__).parents[2] / "examples" / "space"


def get(url: str, process: subprocess.Popen[str], timeout_s: float = 120.0) -> str:
    until = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None, process.communicate()[0]
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.URLError:
            assert time.monotonic() < until
            time.sleep(0.2)


def test_it_starts_with_another_model(tmp_path: Path) -> None:
    from translation_cases import tiny_model

    tiny_model().save_pretrained(tmp_path)
    ZCodeM3Tokenizer(languages=["en", "he"]).save_pretrained(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "MODEL": str(tmp_path), "TITLE": "My Space"}
    process = subprocess.Popen(
        [sys.executable, str(SPACE / "app.py")],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        config = get(f"http://127.0.0.1:{port}/config", process)
        assert "My Space" in config and '"he"' in config
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_card() -> None:
    header = re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert header is not None
    card = yaml.safe_load(header[1])
    constraints = (SPACE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert card["sdk"] == "gradio" and f"gradio=={card['sdk_version']}" in constraints
    assert (SPACE / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60  # the Hub refuses longer ones
    assert "hf-moe-ted[serve]" in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
