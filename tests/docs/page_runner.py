"""Running the blocks of a page one after the other, as a reader would who types them all."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from code_blocks import PYTHON, CodeBlock
from command_server import CommandServer

BLOCK_TIMEOUT_S = 300.0
_PAGE_PORTS = re.compile(r"\b500\d\b")  # those that pages write; a test takes others, which are free


@dataclass(frozen=True)
class Run:
    """A block that ran.

    Attributes:
        place: page and line of the block.
        seconds: how long it took.
    """

    place: str
    seconds: float


class BlockError(Exception):
    """A block that failed: where it is, and what it printed."""


def run_page(blocks: Sequence[CodeBlock], folder: Path, preamble: str) -> list[Run]:
    """Run the blocks of a page that are for one process; call it in a process that may be left changed.

    Args:
        blocks: all blocks of the page.
        folder: working directory, with all that the page takes for granted.
        preamble: Python that makes the names that the page takes for granted.

    Returns:
        The blocks that ran. Those that need a GPU are not among them on a machine that has none.

    Raises:
        BlockError: with all blocks that failed.
    """
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with _shell() as shell:
        return _run_blocks([block for block in blocks if not block.on_two_ranks], preamble, shell)


def run_page_on_ranks(blocks: Sequence[CodeBlock], folder: Path, preamble: str) -> list[Run]:
    """The same for the blocks that are for several ranks, on each of them; these have no shell."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return _run_blocks([block for block in blocks if block.on_two_ranks], preamble, shell=None)


class _Shell:
    """bash whose programs are those of a command server; variables of a block are there in later ones."""

    def __init__(self, server: CommandServer) -> None:
        self._environment = server.environment()
        self._assignments: list[str] = []
        self._servers: list[subprocess.Popen[bytes]] = []

    def run(self, block: CodeBlock) -> str:
        """
        Returns:
            What the block prints.

        Raises:
            BlockError: it fails.
        """
        code = block.test_code
        script = "\n".join(["set -euo pipefail", *self._assignments, code])
        self._assignments += re.findall(r"^[A-Z_]+=\S+$", code, flags=re.MULTILINE)
        if block.stays_running:
            self._servers.append(
                subprocess.Popen(["bash", "-c", script], env=self._environment, start_new_session=True)
            )
            for port in re.findall(r"--port (\d+)", code):
                _wait_for_server(int(port))
            return ""
        with tempfile.TemporaryFile("w+") as printed:  # no pipe, whose end may be with a process that is left over
            streams = {"stdout": printed, "stderr": subprocess.STDOUT}
            done = subprocess.run(["bash", "-c", script], env=self._environment, **streams, timeout=BLOCK_TIMEOUT_S)
            printed.seek(0)
            text = printed.read()
        if done.returncode:
            raise BlockError(f"{block.place}: exit status {done.returncode}\n{text}")
        return text

    def stop(self) -> None:
        for server in self._servers:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


@contextlib.contextmanager
def _shell() -> Iterator[_Shell]:
    with tempfile.TemporaryDirectory() as commands:  # a short path, as that of a socket has to be
        server = CommandServer(Path(commands))
        shell = _Shell(server)
        try:
            yield shell
        finally:
            shell.stop()
            server.stop()


def _run_blocks(blocks: Sequence[CodeBlock], preamble: str, shell: _Shell | None) -> list[Run]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(preamble, "preamble", "exec"), names)
    runs = []
    errors = []
    printed = ""
    ports: dict[str, str] = {}
    for block in blocks:
        block = dataclasses.replace(block, code=_PAGE_PORTS.sub(lambda found: _free_port(found[0], ports), block.code))
        if block.file:
            Path(block.file).write_text(block.code, encoding="utf-8")
            continue
        start = time.perf_counter()
        try:
            if block.is_output and printed.strip() != block.code.strip():
                raise BlockError(f"{block.place}: the block before it printed\n{printed}")
            if block.runs and not (block.needs_gpu and not torch.cuda.is_available()):
                printed = _run_python(block, names) if block.language in PYTHON else _run_shell(block, shell)
                runs.append(Run(block.place, time.perf_counter() - start))
                print(f"{block.place} took {runs[-1].seconds:.1f} s", file=sys.stderr, flush=True)
        except BlockError as error:
            errors.append(str(error))
    if errors:
        raise BlockError("\n\n".join(errors))
    return runs


def _run_python(block: CodeBlock, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    code = "\n" * (block.line - 1) + block.test_code  # so that tracebacks have the lines of the page
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, block.page, "exec"), names)
    except Exception as error:  # whatever the code of a page raises is what its test says
        raise BlockError(f"{block.place}:\n{printed.getvalue()}{traceback.format_exc()}") from error
    return printed.getvalue()


def _run_shell(block: CodeBlock, shell: _Shell | None) -> str:
    if shell is None:
        raise BlockError(f"{block.place}: a block of a shell cannot be one of two ranks")
    return shell.run(block)


def _free_port(port: str, ports: dict[str, str]) -> str:
    """Another port for one of a page, and always the same."""
    if port not in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports[port] = str(listener.getsockname()[1])
    return ports[port]


def _wait_for_server(port: int) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise BlockError(f"nothing listens on port {port} after a minute")
