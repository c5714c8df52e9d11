"""The port: bound before anything is loaded, served until Ctrl-C."""

import contextlib
import errno
import secrets
import socket
from typing import TYPE_CHECKING, Any

from steersman.errors import SteersmanError
from steersman.ui.playground.security import is_local

if TYPE_CHECKING:
    from steersman.ui.playground.app import Playground


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any free one. Raises SteersmanError for one that is in use."""
    if not 0 <= port < 1 << 16:
        raise SteersmanError(f"port must lie between 0 (any free one) and 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise SteersmanError(f"{host!r} is no address of this machine: {error}") from None
    opened = socket.socket(found[0], socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(found[4])
        opened.listen(128)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            why = "is in use: give another with --port, or 0 for any free one"
        else:
            why = f"cannot be opened: {error.strerror or error}"
        raise SteersmanError(f"port {port} of {host} {why}") from None
    return opened


def token_for(host: str, always: bool = False) -> str | None:
    """A new token where the server is reached from other machines, or where it is asked for."""
    return secrets.token_urlsafe(32) if always or not is_local(host) else None


def address(host: str, opened: socket.socket, token: str | None) -> str:
    """What to open in a browser."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{opened.getsockname()[1]}/" + ("" if token is None else f"?token={token}")


def server_of(playground: "Playground") -> Any:
    """The uvicorn server of a playground; `run(sockets=[...])` serves until a signal, or until `should_exit` is set."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            playground.queue.close()  # streams end, so that their connections can
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        playground.app,  # pyright: ignore[reportArgumentType]
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
        ws="none",
    )
    return Server(config)


def serve(playground: "Playground", opened: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, which end what runs first."""
    with contextlib.closing(opened), contextlib.suppress(KeyboardInterrupt):
        server_of(playground).run(sockets=[opened])
