"""Who may ask: the page of this server, on this machine, or whoever has the token.

A page of another site cannot reach a server that checks these: the name it was called by (DNS rebinding), where a
request comes from (forged posts), and that a body is JSON, which no form can send without being asked first. Beyond
this machine a token is needed as well; it is compared in constant time and kept in a cookie that no script can read.
"""

import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_BODY = 256 << 10
"""Largest body of a request that is taken, in bytes."""
_DRAINED = 8 << 20  # of a larger one so much is read and thrown away, so that its sender hears why
_LOCAL = ("127.0.0.1", "localhost", "::1")

CSP = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every answer, where it has none of that name."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_local(host: str) -> bool:
    """Whether a server bound to `host` is reached from this machine alone.

    >>> is_local("127.0.0.1"), is_local("localhost"), is_local("0.0.0.0")
    (True, True, False)
    """
    if host in _LOCAL:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application that lets through to `app` what may come, and bounds what it is sent.

    `host` is what the server is bound to. Without a `token` only names of this machine itself are answered to; with
    one also the machine's own name, `names`, and addresses as numbers, which no other site can call itself by.
    """

    def __init__(self, app: App, *, host: str, token: str | None = None, names: tuple[str, ...] = ()) -> None:
        self.app, self.token = app, token
        # Cookies are shared by all ports of a machine, on which other playgrounds may be.
        self.cookie = "steersman_" + hashlib.sha256((token or "").encode()).hexdigest()[:12]
        self.names = {name.lower() for name in (*_LOCAL, host, *names)} - {"0.0.0.0", "::"}
        if token is not None:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        set_cookie = ""
        refused = self._refused(scope, headers)
        if refused is None and self.token is not None:
            asked = (query.get("token") or [""])[0] if scope["path"] == "/" else ""
            if asked and self._is_token(asked):
                set_cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            elif not self._has_token(headers):
                refused = 401, "this server needs its token: open the address that it printed when it was started"
        body: bytes | None = b""
        if scope["method"] not in ("GET", "HEAD"):
            body = await _body(headers, receive)
            if body is None and refused is None:
                refused = 413, f"the request is larger than {MAX_BODY >> 10} kB, the most that is read here"

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                known = {name.lower() for name, _ in given}
                more = HEADERS if not set_cookie else {**HEADERS, "set-cookie": set_cookie}
                given += [(n.encode(), v.encode()) for n, v in more.items() if n.encode() not in known]
                message = {**message, "headers": given}
            await send(message)

        if refused is not None:
            await _answer(with_headers, *refused, as_json=scope["path"].startswith("/api/"))
            return
        await self.app(scope, _replayed(body or b"", receive), with_headers)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and message for a request that came by another name, or from another site."""
        host = headers.get("host", "")
        if not self._is_own(host):
            return 403, f"this server does not answer to the name {host[:100]!r} (--host-name adds one)"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests from other sites are refused"
        page = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not page:
            return 403, "requests from other sites are refused"
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return 415, "the body of a request must be JSON: Content-Type: application/json"
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".").lower()
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.token is not None or address.is_loopback

    def _has_token(self, headers: dict[str, str]) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(bearer.strip()):
            return True
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self._is_token(found.value)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


async def _body(headers: dict[str, str], receive: Receive) -> bytes | None:
    """The body of a request; None for one that is too large."""
    declared = headers.get("content-length", "0")
    large = not declared.isdigit() or int(declared) > MAX_BODY
    body, total, more = bytearray(), 0, True
    while more and total <= _DRAINED:
        message = await receive()
        if message["type"] != "http.request":
            break
        part, more = message.get("body", b""), message.get("more_body", False)
        total += len(part)
        large = large or total > MAX_BODY
        if not large:
            body += part
    return None if large else bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, then what comes."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _answer(send: Send, status: int, message: str, *, as_json: bool) -> None:
    body = json.dumps({"error": message}).encode() if as_json else f"{message}\n".encode()
    kind = b"application/json" if as_json else b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
