"""Run an app on a port until it is stopped."""

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
_SPARE_FILES = 256  # open files of a process besides its connections


def bind_address(host: str, port: int) -> socket.socket:
    """Bind a socket to the address, so that a taken port shows before a model is loaded. It does not listen yet.

    Args:
        host: a name or an address; `127.0.0.1` only accepts connections from this machine.
        port: port number; 0 chooses a free one.

    Raises:
        ValueError: the host is unknown, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port ({port}) must be between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"host ({host}) is unknown: {error.strerror}") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"port ({port}) of {host} cannot be used: {error.strerror}; choose another") from None
    return bound


def server_config(app: "FastAPI", *, proxy: str | None = None, stop_timeout_s: int = 600) -> "Config":
    """The uvicorn config of an app; for the arguments see `run_server`.

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
        access_log=False,  # its log has the query of each request, which may be a text; the app has its own log
        log_config=None,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=stop_timeout_s,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
        server_header=False,
    )


def run_server(app: "FastAPI", address: socket.socket, *, proxy: str | None = None, stop_timeout_s: int = 600) -> None:
    """Serve until SIGTERM or SIGINT; then finish running requests and accept no new ones.

    Args:
        app: app from `create_app`.
        address: socket from `bind_address`.
        proxy: address of a proxy whose `X-Forwarded-For` is trusted for a request's origin; by default none.
        stop_timeout_s: seconds for running requests after the server is stopped.

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
    """Raise the limit of open files to the number of connections, as far as the system allows."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the earlier limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


__all__ = ["bind_address", "run_server", "server_config"]
