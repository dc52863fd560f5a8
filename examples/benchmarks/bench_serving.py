"""Requests per second and latency of `hf-moe-ted serve`, beside translating the same sentences offline.

    python examples/benchmarks/bench_serving.py --model examples/checkpoints/zcode_m3_demo --output serving.json

It starts the server on loopback, and locust (`pip install locust`, maybe in an environment of its own: `--locust
PATH`) with each number of clients, which ask again as soon as they have an answer. Texts are English sentences of the
examples' text, of mixed lengths, so many that clients rarely have the same (which would be translated once). Then: a
short text beside a document; twice the requests per second that it can answer; the memory of the server over many
requests.
"""

import argparse
import csv
import json
import lzma
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

from hf_moe_ted import TextTranslator, load_model_and_tokenizer

DATA = Path(__file__).parents[1] / "data" / "chromium_l10n.train.tsv.xz"
LOCUSTFILE = Path(__file__).with_name("serving_locustfile.py")
SHORT = "Close all tabs"
NUM_CHOICES = 8192  # texts of the clients
MANY_CLIENTS = 512  # more than the server has requests at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON with all numbers")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--per_request", type=int, nargs="+", default=[1, 16], help="sentences of a request")
    parser.add_argument("--seconds", type=int, default=20, help="of each measurement")
    parser.add_argument("--num_sentences", type=int, default=256, help="that are translated offline")
    parser.add_argument("--memory_requests", type=int, default=0, help="requests over which memory is watched")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--no_keep_placeholders", action="store_true", help="of the texts, about one in five has one")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--port", type=int, default=5123)
    parser.add_argument("--locust", default="locust", help="the command")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)  # the process that measures it
    args = parser.parse_args()
    if args.offline:
        print(json.dumps(offline(args)))
        return
    results: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions()}
    for name, value in measured(args):
        results[name] = [*results.get(name, []), value] if name in ("load", "memory") else value
        if args.output:  # as it comes: the whole takes minutes
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


def measured(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Names of results and one after another of them."""
    output = subprocess.run([sys.executable, *sys.argv, "--offline"], check=True, stdout=subprocess.PIPE).stdout
    yield "offline", json.loads(output)
    with tempfile.TemporaryDirectory() as folder, served(args) as process:
        sentences = Path(folder) / "sentences.json"
        sentences.write_text(json.dumps(texts(NUM_CHOICES)), encoding="utf-8")
        locust(args, sentences, clients=4, per_request=1, seconds=5)  # warm-up
        capacity = 0.0
        for per_request in args.per_request:
            for clients in args.clients:
                row = locust(args, sentences, clients, per_request, args.seconds)
                capacity = max(capacity, row["requests_per_second"] if per_request == 1 else 0.0)
                yield "load", row
        yield "beside_document", beside_document(args)
        rate = 2 * capacity / MANY_CLIENTS
        yield "twice_the_load", locust(args, sentences, MANY_CLIENTS, 1, 2 * args.seconds, rate=rate)
        num_requests = 0
        while num_requests < args.memory_requests:
            num_requests += locust(args, sentences, 64, 1, args.seconds)["num_requests"]
            yield "memory", {"num_requests": num_requests, "mib": process.memory_info().rss / 2**20}


def texts(number: int) -> list[str]:
    """English sentences, each once, in an order of chance."""
    with lzma.open(DATA, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        sentences = sorted({row["english"] for row in rows})
    # messages with a case for each number are long, and the small model repeats itself in them up to its limit
    sentences = [text for text in sentences if "{" not in text]
    random.Random(0).shuffle(sentences)
    return sentences[:number]


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def offline(args: argparse.Namespace) -> dict[str, float]:
    """Sentences per second of what the command `translate` does, without loading."""
    model, tokenizer = load_model_and_tokenizer(args.model, args.dtype or "auto", args.device)
    translator = TextTranslator(model, tokenizer, num_beams=args.beams, keep_placeholders=not args.no_keep_placeholders)
    sentences = texts(args.num_sentences)
    translator.translate(sentences[:16], "en", "de")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        translator.translate(sentences, "en", "de")
        seconds.append(time.perf_counter() - start)
    return {"sentences_per_second": len(sentences) / min(seconds), "rounds_s": seconds}


@contextmanager
def served(args: argparse.Namespace) -> Iterator[psutil.Process]:
    """The server's process; it has answered."""
    command = [sys.executable, "-m", "hf_moe_ted", "serve", str(args.model), "--port", str(args.port), "--no-page"]
    command += ["--beams", str(args.beams), "--requests-per-minute", "1000000"]
    command += [
        word for name in ("device", "dtype") if getattr(args, name) for word in (f"--{name}", getattr(args, name))
    ]
    command += ["--no-keep-placeholders"] if args.no_keep_placeholders else []
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{args.port}/health", process)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit("the server does not answer")


def locust(
    args: argparse.Namespace, sentences: Path, clients: int, per_request: int, seconds: int, rate: float = 0.0
) -> dict[str, Any]:
    """What so many clients saw."""
    command = [args.locust, "--headless", "--locustfile", str(LOCUSTFILE), "--host", f"http://127.0.0.1:{args.port}"]
    command += ["--users", str(clients), "--spawn-rate", "1000", "--run-time", f"{seconds}s", "--stop-timeout", "60"]
    command += ["--json", "--loglevel", "ERROR", "--only-summary"]
    environment = {**os.environ, "SENTENCES": str(sentences), "PER_REQUEST": str(per_request), "RATE": str(rate)}
    # a failed request is in its output, and its exit code; its tables for people go to standard error
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    ).stdout
    stats = {entry["name"]: entry for entry in json.loads(output)}
    translated = stats["/translate"]
    span = translated["last_request_timestamp"] - translated["start_time"]
    times = sorted(
        (float(milliseconds), count) for milliseconds, count in translated["response_times"].items()
    )  # a histogram
    per_second = (translated["num_requests"] - translated["num_failures"]) / span
    return {
        "clients": clients,
        "per_request": per_request,
        "requests_per_second": per_second,
        "sentences_per_second": per_second * per_request,
        **{f"p{percent}_ms": percentile(times, percent) for percent in (50, 95, 99)},
        "num_requests": translated["num_requests"],
        "num_failures": translated["num_failures"],
        "num_refused": {name: entry["num_requests"] for name, entry in stats.items() if name.isdigit()},
    }


def percentile(times: list[tuple[float, int]], percent: float) -> float:
    left = percent / 100 * sum(count for _, count in times)
    for milliseconds, count in times:
        left -= count
        if left <= 0:
            return milliseconds
    return times[-1][0]


def ask(args: argparse.Namespace, text: str | list[str]) -> float:
    """Seconds until the translation was there."""
    body = json.dumps({"q": text, "source": "en", "target": "de"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{args.port}/translate", body, {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()
    return time.perf_counter() - start


def beside_document(args: argparse.Namespace) -> dict[str, Any]:
    """Latency of a short text alone, and while a document is translated."""
    document = "\n".join(texts(args.num_sentences))
    alone = [ask(args, SHORT) for _ in range(20)]
    of_document: list[float] = []
    thread = threading.Thread(target=lambda: of_document.append(ask(args, document)))
    thread.start()
    beside = []
    time.sleep(0.2)
    while thread.is_alive():
        beside.append(ask(args, SHORT))
        time.sleep(0.1)
    thread.join()
    return {
        "alone_ms": 1000 * statistics.median(alone),
        "beside_ms": 1000 * statistics.median(beside),
        "beside_max_ms": 1000 * max(beside),
        "num_beside": len(beside),
        "document_s": of_document[0],
    }


def show(results: dict[str, Any]) -> None:
    console = Console(width=120)
    of_offline = results["offline"]["sentences_per_second"]
    console.print(results["versions"])
    console.print(f"offline: {of_offline:.1f} sentences/s")
    table = Table("sentences per request", "clients", "requests/s", "sentences/s", "of offline", "p50 ms", "p95", "p99")
    for row in results["load"]:
        table.add_row(
            str(row["per_request"]),
            str(row["clients"]),
            f"{row['requests_per_second']:.1f}",
            f"{row['sentences_per_second']:.1f}",
            f"{row['sentences_per_second'] / of_offline:.2f}",
            *(f"{row[f'p{percent}_ms']:.0f}" for percent in (50, 95, 99)),
        )
    console.print(table)
    for name in ("beside_document", "twice_the_load", "memory"):
        console.print(name, results.get(name))


if __name__ == "__main__":
    main()
