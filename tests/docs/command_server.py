"""The programs of shell blocks (`hf-moe-ted`, `python`, `torchrun`, ...) as forks of a process that has imported torch.

A fork runs what the program would run, in the directory, with the environment and with the files of its client. Two
programs do less: `pip` looks whether the extras that it is asked for exist, and `make` says what it would do.
"""

import configparser
import contextlib
import multiprocessing
import os
import re
import runpy
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("command_client.py")


class CommandServer:
    """A process that answers clients until `stop`.

    Args:
        folder: an empty one, for its socket and the programs; put `bin` of it first in PATH.
    """

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in PROGRAMS:
            self._write_program(name, f"#!{sys.executable} -SE\n{CLIENT.read_text()}")
        curl = "command curl --no-progress-meter --fail-with-body"
        self._write_program("curl", f'#!/bin/bash\nPATH=/usr/bin:/bin\n{curl} "$@"\n')
        self.address = str(folder / "commands")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        parent_id = os.getpid()
        self.process_id = os.fork()
        if self.process_id == 0:
            os.setpgid(0, 0)  # so that `stop` ends the commands, too
            self._serve(parent_id)
        os.setpgid(self.process_id, self.process_id)  # here as well: whichever process comes first
        self._listener.close()

    def environment(self) -> dict[str, str]:
        """For the shells whose programs are these."""
        return {**os.environ, "COMMAND_SERVER": self.address, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def stop(self) -> None:
        os.killpg(self.process_id, signal.SIGTERM)
        os.waitpid(self.process_id, 0)

    def _write_program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def _serve(self, parent_id: int) -> None:
        """Answer clients for as long as the parent lives, each in a process that ends as one of Python does."""
        context = multiprocessing.get_context("fork")
        self._listener.settimeout(1.0)
        while os.getppid() == parent_id:
            multiprocessing.active_children()  # those that have ended are gone then
            with contextlib.suppress(TimeoutError):
                connection = self._listener.accept()[0]
                context.Process(target=_run_command, args=(connection,)).start()
                connection.close()
        os.killpg(0, signal.SIGTERM)


def _run_command(connection: socket.socket) -> None:
    """What the client at the other end asks for."""
    connection.setblocking(True)
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    [size] = struct.unpack("!I", head)
    folder, num_words, *texts = connection.recv(size, socket.MSG_WAITALL).decode().split("\0")
    words, variables = texts[: int(num_words)], texts[int(num_words) :]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - of the whole process
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variable.split("=", 1) for variable in variables)
    connection.sendall(bytes([_status_of(PROGRAMS[words[0]], words[1:])]))


def _status_of(program: Callable[[list[str]], None], words: list[str]) -> int:
    """Exit status of a program that runs in this process."""
    status = 0
    try:
        program(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # as the interpreter does with whatever ends a program
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _hf_moe_ted(words: list[str]) -> None:
    from hf_moe_ted.cli import run

    sys.argv = ["hf-moe-ted", *words]
    run()


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def _torchrun(words: list[str]) -> None:
    """`torchrun --nproc_per_node N [-m] SCRIPT ...`, N forks of this process."""
    option, number, *program = words
    if option.replace("_", "-") != "--nproc-per-node":
        raise SystemExit(f"torchrun: the first option must be --nproc_per_node, but is {option}")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": number}
    ranks = []
    for rank in range(int(number)):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": number}
            os._exit(_status_of(_python, program))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    if any(statuses):
        raise SystemExit(f"torchrun: exit statuses of the ranks: {statuses}")


def _ct2_transformers_converter(words: list[str]) -> None:
    from ctranslate2.converters.transformers import main

    sys.argv = ["ct2-transformers-converter", *words]
    main()


def _pip(words: list[str]) -> None:
    """Whether the package has the extras that it is to be installed with."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:^\.|hf-moe-ted)\[([\w,]+)\]", "\n".join(words), flags=re.MULTILINE):
        for extra in extras.split(","):
            if extra not in setup["options.extras_require"]:
                raise SystemExit(f"pip: setup.cfg has no extra {extra!r}")


def _make(words: list[str]) -> None:
    """Whether there are such targets, and what they would do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["/usr/bin/env", "make", "-n", *words], cwd=ROOT, env={**environment, "PATH": os.defpath})
    raise SystemExit(done.returncode)


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "hf-moe-ted": _hf_moe_ted,
    "python": _python,
    "torchrun": _torchrun,
    "ct2-transformers-converter": _ct2_transformers_converter,
    "pip": _pip,
    "make": _make,
}
