"""An app on a port, until somebody stops it."""

import contextlib
import logging
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Config

KEEP_ALIVE_S = 5
MAX_CONNECTIONS = 4_096
_SPARE_FILES = 256  # of a process, besides its connections


def bind_address(host: str, port: int) -> socket.socket:
    """A socket that has the address, so that a taken port is known before a model is loaded; it does not listen yet.

    Args:
        host: a name or an address; `127.0.0.1` is reached from this machine only.
        port: 0 for any that is free.

    Raises:
        ValueError: there is no such host, or the port is taken or may not be used.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port ({port}) must be between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"host ({host}) is not known: {error.strerror}") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"port ({port}) of {host} cannot be used: {error.strerror}; choose another") from None
    return bound


def server_config(app: "FastAPI", *, proxy: str | None = None, stop_timeout_s: int = 600) -> "Config":
    """How uvicorn serves an app; for the arguments see `run_server`.

    Raises:
        ValueError: a package of the extra `serve` is not installed.
    """
    try:
        import uvicorn

        from .connection import PatientConnection
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: `pip install 'hf-moe-ted[serve]'`") from error
    return uvicorn.Config(
        app,
        http=PatientConnection,
        ws="none",
        access_log=False,  # it has the query of each request, which may be a text; the app has a log of its own
        log_config=None,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=stop_timeout_s,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
        server_header=False,
    )


def run_server(app: "FastAPI", address: socket.socket, *, proxy: str | None = None, stop_timeout_s: int = 600) -> None:
    """Serves until SIGTERM or SIGINT; then what has begun is finished, and nothing new is taken.

    Args:
        app: of `create_app`.
        address: of `bind_address`.
        proxy: address of a proxy whose `X-Forwarded-For` says where a request comes from; by default none is believed.
        stop_timeout_s: for what is running when the server is stopped.

    Raises:
        ValueError: a package of the extra `serve` is not installed.
    """
    config = server_config(app, proxy=proxy, stop_timeout_s=stop_timeout_s)
    import uvicorn

    _allow_connections()
    host, port = address.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logging.getLogger("hf_moe_ted.serving").info("http://%s:%d", shown, port)
    uvicorn.Server(config).run(sockets=[address])


def _allow_connections() -> None:
    """As many open files as there may be connections; where the system does not allow them, as many as it does."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # it then has the connections that it had
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


__all__ = ["bind_address", "run_server", "server_config"]
