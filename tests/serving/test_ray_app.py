"""Two replicas behind one port, as the example's configuration has them."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from translation_cases import MakeModel

from hf_moe_ted import TextTranslator, ZCodeM3Tokenizer

pytest.importorskip("ray.serve")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving" / "ray_serve.yaml"
NUM_REQUESTS = 21  # odd: two replicas never have equal counts, by which they are told apart


@pytest.fixture
def model_dir(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def url(model_dir: Path, tmp_path: Path) -> Iterator[str]:
    """Of an application with two replicas; `serve run` is stopped with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    [application] = config["applications"]
    application["args"] = {"model": str(model_dir), "num_beams": 2, "max_new_tokens": 6}
    [deployment] = application["deployments"]
    deployment.pop("autoscaling_config")
    deployment |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
    file = tmp_path / "ray.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: get(f"{address}/health"), process, tmp_path / "log")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_for(call: Any, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            call()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text())


def get(url: str) -> bytes:
    return urllib.request.urlopen(url, timeout=30).read()


def translated(url: str, text: str) -> str:
    body = json.dumps({"q": text, "source": "en", "target": "de"}).encode()
    request = urllib.request.Request(f"{url}/translate", body, {"Content-Type": "application/json"})
    return json.loads(get(request))["translatedText"]  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_replicas_behind_one_port(url: str, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> None:
    texts = [f"Close tab {number}." for number in range(NUM_REQUESTS)]
    translator = TextTranslator(make_model(), tokenizer, num_beams=2, max_new_tokens=6)
    assert [translated(url, text) for text in texts] == [t.text for t in translator.translate(texts, "en", "de")]

    counts: set[int] = set()  # of each replica, which has numbers of its own
    for _ in range(200):
        shown = get(f"{url}/metrics").decode()
        counts.add(sum(int(float(n)) for n in re.findall(r'requests_total\{[^}]*"/translate"[^}]*\} (\S+)', shown)))
        if len(counts) == 2:
            break
    assert len(counts) == 2
    assert sum(counts) == NUM_REQUESTS
