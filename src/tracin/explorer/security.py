"""Who may ask, and how much: host, token, origin, headers and bounded bodies.

The page has no accounts. It answers on the loopback address only, unless a token is set. Against other pages in the same
browser: the Host header must name this machine (a name that was bound anew to it does not), requests by other origins are
refused, and the content-security policy lets nothing run but the page's own files.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracin.explorer.hosts import is_loopback, require_token

__all__ = ["CSP", "Guard", "RefusedError", "bounded_body"]

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
PATIENCE = 30.0
"""Seconds that a body may take to arrive."""

_METHODS = {"GET", "HEAD", "POST"}
_LONGEST_ADDRESS = 8_192


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: The HTTP status.
        told: Why, and the mend.
    """

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status, self.told = status, told


class Guard:
    """The outermost layer: every request passes it, and every answer gets its headers.

    Args:
        app: What answers.
        host: Where the server listens.
        token: What visitors must show, if anything.
        names: Further host names under which the page is reached.
    """

    def __init__(
        self, app: ASGIApp, *, host: str = "127.0.0.1", token: str | None = None, names: Iterable[str] = ()
    ) -> None:
        self.app, self.token = app, require_token(host, token)
        self._local = is_loopback(host)
        self._names = {"localhost", host.casefold(), *(name.casefold() for name in names)}
        self._cookie = "" if token is None else hashlib.sha256(b"tracin cookie " + token.encode()).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  ASGI says it
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no answer to {scope['type']}")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if "Cache-Control" not in headers:
                    headers["Cache-Control"] = "no-store"
            await send(message)

        try:
            welcome = self._check(scope)
        except RefusedError as refused:
            await answer(with_headers, refused.status, _error(refused.told))
            return
        if welcome:
            await self._welcome(scope, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _check(self, scope: Scope) -> bool:
        """Refuse what may not be asked; whether this is the first visit with a token in the address."""
        headers = Headers(scope=scope)
        if scope["method"] not in _METHODS:
            raise RefusedError(405, "only GET and POST are answered.")
        if len(scope.get("query_string", b"")) + len(scope.get("raw_path") or b"") > _LONGEST_ADDRESS:
            raise RefusedError(414, "the address is too long.")
        self._check_host(headers)
        self._check_origin(scope, headers)
        return self._check_token(scope, headers)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not self._known(name):
            raise RefusedError(
                421,
                "the Host header names another machine. Open the address that tracin serve printed; a name of a proxy is "
                "allowed with --name.",
            )

    def _known(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._local

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Other pages may not post, nor fetch anything; a link to the page itself may be followed."""
        site = headers.get("sec-fetch-site")
        changing = scope["method"] == "POST"
        first = scope["path"] == "/" and not changing
        allowed = {None, "same-origin"} if changing else {None, "same-origin", "none"}
        if site not in allowed and not first:
            raise RefusedError(403, "the request comes from another page. Use this page itself.")
        origin = headers.get("origin")
        if origin is not None and not first and not _same_origin(origin, headers.get("host", "")):
            raise RefusedError(403, "the request comes from another origin. Use this page itself.")

    def _check_token(self, scope: Scope, headers: Headers) -> bool:
        if self.token is None:
            return False
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.casefold() == "bearer" and _same(given.strip(), self.token):
            return False
        if _same(_cookie(headers, _cookie_name(scope)), self._cookie):
            return False
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        if (
            scope["path"] == "/"
            and scope["method"] == "GET"
            and len(asked) == 1
            and _same(asked[0], self.token)
        ):
            return True
        raise RefusedError(
            401,
            "a token is needed: open the page once as /?token=…, or send the header Authorization: Bearer …",
        )

    async def _welcome(self, scope: Scope, send: Send) -> None:
        """Keep the token as a cookie, and open the page without it in the address.

        A page that leads on, in place of a redirect: after a link from elsewhere, browsers send no strict cookie along a
        redirect.
        """
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/">'
            '<title>tracin</title><p><a href="/">Open the page</a></p></html>'
        )
        cookie = f"{_cookie_name(scope)}={self._cookie}; HttpOnly; SameSite=Strict; Path=/"
        await answer(send, 200, page.encode(), "text/html; charset=utf-8", {"Set-Cookie": cookie})


def _error(told: str) -> bytes:
    return json.dumps({"error": told}, ensure_ascii=False).encode()


async def answer(
    send: Send, status: int, body: bytes, kind: str = "application/json", more: dict[str, str] | None = None
) -> None:
    """Send a whole answer."""
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that tells nothing."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8"))


def _cookie_name(scope: Scope) -> str:
    """By the port, because browsers share cookies among the ports of a host."""
    server = scope.get("server")
    return f"tracin_{server[1] if server else ''}"


def _cookie(headers: Headers, name: str) -> str:
    """A cookie's value. Split by hand: other servers of this machine may have set cookies of any form beside it."""
    for line in headers.getlist("cookie"):
        for pair in line.split(";"):
            key, _, value = pair.partition("=")
            if key.strip() == name:
                return value.strip()
    return ""


def _host_name(value: str) -> str | None:
    """The name in a Host header; None where it is none."""
    try:
        parts = urlsplit(f"//{value}")
        parts.port  # noqa: B018  raises where it is no port
    except ValueError:
        return None
    plain = parts.netloc == value and not parts.path and "@" not in value
    return parts.hostname if plain else None


def _same_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and parts.netloc.casefold() == host.casefold() != ""


async def bounded_body(request: Request, limit: int) -> bytes:
    """The body of a request, counted while it arrives.

    Args:
        request: The request.
        limit: The most bytes.

    Returns:
        The body.

    Raises:
        RefusedError: It is larger than it may be, or than it said; or it does not arrive.
    """
    told = request.headers.get("content-length")
    too_much = f"the body is larger than {limit >> 10:,} KiB. Send less."
    if told is not None and not (told.isascii() and told.isdigit() and len(told) < 16):
        raise RefusedError(400, "the Content-Length is no whole number.")
    if told is not None and int(told) > limit:
        raise RefusedError(413, too_much)
    parts, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise RefusedError(413, too_much)
                parts.append(part)
    except TimeoutError as error:
        raise RefusedError(408, f"the body did not arrive within {PATIENCE:.0f} seconds.") from error
    except ClientDisconnect as error:
        raise RefusedError(400, "the body was cut short.") from error
    if told is not None and size != int(told):
        raise RefusedError(400, f"the body has {size} bytes, and its Content-Length says {told}.")
    return b"".join(parts)
