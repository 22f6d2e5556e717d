"""The routes: one document, its files, and JSON under /api."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tracin.errors import MissingExtraError, OptionError, ResultError, TracinError
from tracin.explorer.asking import SuspectFilter, TestFilter, choice, natural
from tracin.explorer.decisions import ConflictError, DecisionLog, OtherLogError
from tracin.explorer.explaining import shortened
from tracin.explorer.faces import Face
from tracin.explorer.pages import LISTED, Source
from tracin.explorer.posted import decision_of, undo_of
from tracin.explorer.security import Guard, RefusedError, bounded_body
from tracin.explorer.theme import theme_css
from tracin.explorer.uploads import LARGEST_BODY
from tracin.explorer.working import BusyError

__all__ = ["STATIC", "make_app"]

STATIC = Path(__file__).parent / "static"
SMALL_BODY = 64 << 10

_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".json": "application/json",
}
_UPLOADS = {
    "image/png": "image",
    "image/jpeg": "image",
    "text/plain": "text",
    "application/json": "table",
}
_EXPORTS = {
    "csv": ("audit.csv", "text/csv; charset=utf-8"),
    "parquet": ("audit.parquet", "application/vnd.apache.parquet"),
    "json": ("audit.json", "application/json"),
    "cleanlab": ("cleanlab.csv", "text/csv; charset=utf-8"),
    "label-studio": ("label-studio.json", "application/json"),
}
_FOREVER = "private, max-age=31536000, immutable"

Value = TypeVar("Value")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class File:
    """A file of the page, held in memory: no address is ever made a path."""

    body: bytes
    kind: str
    tag: str


def _files() -> dict[str, File]:
    theme = theme_css().encode()
    found = {"theme.css": File(theme, _MEDIA[".css"], blake2b(theme, digest_size=8).hexdigest())}
    for path in sorted(STATIC.rglob("*")):
        if path.is_file() and path.suffix in _MEDIA:
            body = path.read_bytes()
            name = path.relative_to(STATIC).as_posix()
            found[name] = File(body, _MEDIA[path.suffix], blake2b(body, digest_size=8).hexdigest())
    return found


class Held(Generic[Value]):
    """What was answered before; what was not asked for longest goes.

    Args:
        room: Bytes that are held.
    """

    def __init__(self, room: int = 32 << 20) -> None:
        self._room, self._size = room, 0
        self._held: OrderedDict[Any, tuple[Value, int]] = OrderedDict()

    def get(self, key: Any) -> Value | None:
        """The answer, if it is held."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Value, size: int) -> Value:
        """Hold an answer."""
        if key not in self._held:
            self._held[key] = (value, size)
            self._size += size
        while self._size > self._room:
            self._size -= self._held.popitem(last=False)[1][1]
        return value


@dataclass(frozen=True, eq=False)
class Explorer:
    """The handlers.

    Args:
        source: What the pages read.
        log: The decisions.
    """

    source: Source
    log: DecisionLog
    files: Mapping[str, File] = field(default_factory=_files)
    pages: Held[bytes] = field(default_factory=Held)
    faces: Held[Face] = field(default_factory=Held)
    making: dict[Any, asyncio.Future[bytes]] = field(default_factory=dict)

    async def index(self, request: Request) -> Response:
        """The document."""
        return self._file("index.html", request)

    async def static(self, request: Request) -> Response:
        """A file of the page."""
        return self._file(request.path_params["name"], request)

    def _file(self, name: str, request: Request) -> Response:
        found = self.files.get(name)
        if found is None:
            return _error(404, "there is no such file.")
        headers = {"ETag": f'"{found.tag}"', "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(found.body, media_type=found.kind, headers=headers)

    async def face(self, request: Request) -> Response:
        """The picture of a row."""
        side, row = request.path_params["side"], request.path_params["row"]
        face = self.faces.get((side, row))
        if face is None:
            face = await run_in_threadpool(self.source.face, side, row)
            if face is not None and side != "upload":
                self.faces.put((side, row), face, len(face.data))
        if face is None or face.kind != "image":
            return _error(404, "there is no such picture.")
        # The address ends in the content's tag, so that what it names never changes.
        lasting = request.query_params.get("v") == face.tag
        headers = {"ETag": f'"{face.tag}"', "Cache-Control": _FOREVER if lasting else "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(face.data, media_type="image/png", headers=headers)

    async def study(self, request: Request) -> Response:
        """What is served."""
        return await self._kept(request, lambda: {**self.source.study(), "log": self.log.identity})

    async def tests(self, request: Request) -> Response:
        """Test rows."""
        return await self._kept(request, lambda: self.source.tests(TestFilter.of(request.query_params)))

    async def trust(self, request: Request) -> Response:
        """Why to believe it."""
        return await self._kept(request, self.source.trust)

    async def _kept(self, request: Request, make: Callable[[], Any], version: int = 0) -> Response:
        key = (request.url.path, request.url.query, version)
        body = self.pages.get(key)
        if body is None:
            body = await asyncio.shield(self._making(key, make))
        return Response(body, media_type="application/json")

    def _making(self, key: Any, make: Callable[[], Any]) -> asyncio.Future[bytes]:
        """An answer in the making: all who ask for it meanwhile wait for the same one."""
        found = self.making.get(key)
        if found is not None:
            return found

        async def made() -> bytes:
            body = await run_in_threadpool(lambda: _json(make()))
            return self.pages.put(key, body, len(body))

        task = self.making[key] = asyncio.ensure_future(made())
        task.add_done_callback(lambda _: self.making.pop(key, None))
        return task

    async def explain(self, request: Request) -> Response:
        """A row's proponents and opponents."""
        asked, side = request.query_params, request.path_params["side"]
        target, k = asked.get("target") or "predicted", natural(asked, "k", 5, 1, LISTED)
        row = _row(side, request.path_params["row"])
        key = (request.url.path, target, k)
        body = self.pages.get(key) if side != "upload" else None
        if body is None:
            found = await asyncio.shield(asyncio.wrap_future(self.source.answers.explain(side, row, target)))
            body = await run_in_threadpool(lambda: _json(shortened(found, k)))
            if side != "upload":
                self.pages.put(key, body, len(body))
        return Response(body, media_type="application/json")

    async def upload(self, request: Request) -> Response:
        """Take a new example."""
        kind = _UPLOADS.get(_media_type(request))
        if kind is None:
            raise RefusedError(415, f"send one of {', '.join(_UPLOADS)} as Content-Type.")
        body = await bounded_body(request, LARGEST_BODY)
        name = await asyncio.shield(asyncio.wrap_future(self.source.answers.take(kind, body)))
        return Response(_json({"row": name}), media_type="application/json")

    async def suspects(self, request: Request) -> Response:
        """Rows by suspicion, with decisions."""
        seq = await self._fresh()
        asked = SuspectFilter.of(request.query_params)
        return await self._kept(request, lambda: self.source.suspects(asked, self._decided()), seq)

    def _decided(self) -> dict[int, dict[str, Any]]:
        return {row: one.told() for row, one in self.log.decided().items()}

    async def decisions(self, request: Request) -> Response:
        """What was decided after an entry of the log."""
        since = natural(request.query_params, "since", 0, 0, 10**12)
        await self._fresh()
        told = {**self.log.changes(since), "log": self.log.identity}
        return Response(_json(told), media_type="application/json")

    async def _fresh(self) -> int:
        """The last entry of the log, with those of other processes."""
        return await run_in_threadpool(self.log.refresh) if self.log.stale else self.log.seq

    async def decide(self, request: Request) -> Response:
        """Take a decision."""
        body, n = await _posted(request), len(self.source.content.audit)
        posted = decision_of(body, self.log.identity, n, self.log.labels)
        entry = await run_in_threadpool(self.log.decide, *posted)
        return Response(_json({"seq": entry.seq, "decision": entry.told()}), media_type="application/json")

    async def undo(self, request: Request) -> Response:
        """Take a decision back."""
        posted = undo_of(await _posted(request), self.log.identity)
        entry, now = await run_in_threadpool(self.log.undo, *posted)
        told = {"seq": entry.seq, "row": entry.row, "decision": None if now is None else now.told()}
        return Response(_json(told), media_type="application/json")

    async def export(self, request: Request) -> Response:
        """The audit with the decisions, as a file."""
        kind = choice(request.query_params, "format", tuple(_EXPORTS))
        await self._fresh()
        name, media = _EXPORTS[kind]
        body = await run_in_threadpool(self._exported, kind)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(body, media_type=media, headers=headers)

    def _exported(self, kind: str) -> bytes:
        names = self.log.labels.names
        decisions = {
            row: ("relabel", names.index(str(one.label)) if names is not None else one.label)
            if one.action == "relabel"
            else one.action
            for row, one in self.log.chosen().items()
        }
        with tempfile.TemporaryDirectory(prefix="tracin-export-") as folder:
            path = Path(folder) / _EXPORTS[kind][0]
            return self.source.content.audit.export(path, kind, decisions).read_bytes()


def _row(side: str, text: str) -> int | str:
    if side not in {"train", "test", "upload"}:
        raise OptionError(f"there is no side {side[:40]!r}: choose train, test or upload.")
    return text if side == "upload" else natural({"row": text}, "row", 0, 0, 10**12)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().casefold()


async def _posted(request: Request) -> Any:
    """The JSON that was posted."""
    if _media_type(request) != "application/json":
        raise RefusedError(415, "send application/json as Content-Type.")
    body = await bounded_body(request, SMALL_BODY)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is no JSON.") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def _error(status: int, told: str, **more: Any) -> Response:
    return Response(_json({"error": told, **more}), status_code=status, media_type="application/json")


async def _on_error(_: Request, error: Exception) -> Response:
    """Every refusal as ``{"error": sentence}``."""
    if isinstance(error, RefusedError):
        return _error(error.status, error.told)
    if isinstance(error, ConflictError):
        return _error(409, str(error), decision=None if error.now is None else error.now.told())
    if isinstance(error, OtherLogError):
        return _error(409, str(error), log=error.log)
    if isinstance(error, BusyError):
        return _error(503, str(error))
    if isinstance(error, HTTPException):
        told = {404: "there is no such page.", 405: "this address takes another method."}
        return _error(error.status_code, told.get(error.status_code, str(error.detail)))
    if isinstance(error, OptionError):
        return _error(400, str(error))
    if isinstance(error, ResultError):
        return _error(507, str(error))
    if isinstance(error, MissingExtraError):
        return _error(501, str(error))
    if isinstance(error, TracinError):
        return _error(422, str(error))
    return _error(500, "something went wrong; the terminal of tracin serve says what.")


def make_app(
    source: Source,
    log: DecisionLog,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    names: Iterable[str] = (),
) -> ASGIApp:
    """The whole application, guarded.

    Args:
        source: What the pages read.
        log: The decisions.
        host: Where it will listen.
        token: What visitors must show; needed unless the host is the loopback.
        names: Further host names under which it is reached.

    Returns:
        The ASGI application.
    """
    explorer = Explorer(source, log)
    routes: list[tuple[str, Handler, str]] = [
        ("/", explorer.index, "GET"),
        ("/static/{name:path}", explorer.static, "GET"),
        ("/face/{side}/{row}.png", explorer.face, "GET"),
        ("/api/study", explorer.study, "GET"),
        ("/api/test", explorer.tests, "GET"),
        ("/api/explain/{side}/{row}", explorer.explain, "GET"),
        ("/api/upload", explorer.upload, "POST"),
        ("/api/suspects", explorer.suspects, "GET"),
        ("/api/decisions", explorer.decisions, "GET"),
        ("/api/decisions", explorer.decide, "POST"),
        ("/api/decisions/undo", explorer.undo, "POST"),
        ("/api/export", explorer.export, "GET"),
        ("/api/trust", explorer.trust, "GET"),
    ]
    kinds = (RefusedError, HTTPException, TracinError, Exception)
    app = Starlette(
        routes=[Route(path, handler, methods=[method]) for path, handler, method in routes],
        exception_handlers=dict.fromkeys(kinds, _on_error),
    )
    app.router.redirect_slashes = False
    return Guard(app, host=host, token=token, names=names)
