"""The server: one process on one address, until Ctrl-C."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable

import uvicorn

from tracin.errors import OptionError
from tracin.explorer.app import make_app
from tracin.explorer.decisions import DecisionLog
from tracin.explorer.hosts import require_token
from tracin.explorer.pages import Source

__all__ = ["listen", "serve"]

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """An address to serve at.

    Args:
        host: A name or an address.
        port: 0: any that is free.

    Returns:
        The socket, bound and listening: who connects is answered once ``serve`` runs, and nobody else can take the address.

    Raises:
        OptionError: The address cannot be used.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"--port is {port}: give 0 to 65535; 0 takes any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(f"--host {host} is no address of this machine: {error}.") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise OptionError(
            f"cannot listen at {host}, port {port}: {error}. Give another --port; 0 takes any that is free."
        ) from error
    return found


class _Server(uvicorn.Server):
    """Tells when it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell it."""
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()


def serve(
    source: Source,
    log: DecisionLog,
    place: socket.socket,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    names: Iterable[str] = (),
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the pages until Ctrl-C or SIGTERM.

    Args:
        source: What the pages read.
        log: The decisions.
        place: What ``listen`` returned; closed at the end, as are the log and the answers of the source.
        host: Where that listens.
        token: What visitors must show; needed unless the host is the loopback.
        names: Further host names under which it is reached.
        ready: Called with the page's address as soon as it answers.
    """
    require_token(host, token)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{place.getsockname()[1]}/"
    config = uvicorn.Config(
        make_app(source, log, host=host, token=token, names=names),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        backlog=BACKLOG,
        limit_concurrency=1000,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, lambda: ready(url)).run(sockets=[place])
    finally:
        source.answers.close()
        log.close()
        place.close()
