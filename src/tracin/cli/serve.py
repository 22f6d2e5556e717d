"""``tracin serve``: a study or a kept folder as a page in the browser."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from socket import socket
from typing import Any

from tracin.cli.commands import precision_of, refuse_below_one
from tracin.cli.output import Folder
from tracin.cli.printing import clean, say
from tracin.cli.serve_options import Serve
from tracin.errors import MissingExtraError, OptionError
from tracin.explorer.decisions import DecisionLog
from tracin.explorer.hosts import require_token
from tracin.explorer.kept import keep, kept_source
from tracin.explorer.live import Clock, live_source
from tracin.explorer.logfile import check_place
from tracin.explorer.pages import Source
from tracin.explorer.static import render_static
from tracin.options import whole_number
from tracin.study import study_file

__all__ = ["run"]

LOG = "decisions.jsonl"
_NEEDED = ("starlette", "uvicorn", "PIL", "pandas")


def run(command: Serve) -> int:
    """Serve until Ctrl-C."""
    for module in _NEEDED:
        try:
            import_module(module)
        except ImportError as error:
            raise MissingExtraError(f"tracin serve needs {module}: pip install 'tracin[web]'") from error
    token = command.token if command.token is not None else os.environ.get("TRACIN_TOKEN") or None
    require_token(command.host, token)
    return _folder(command, token) if command.what.is_dir() else _file(command, token)


def _folder(command: Serve, token: str | None) -> int:
    if command.out is not None or command.calibrate or command.precision is not None:
        raise OptionError(
            "--out, --calibrate and --precision need a study file: a kept folder is shown as it is."
        )
    log = command.decisions or command.what / LOG
    with _listening(command) as place:
        source = kept_source(command.what)
        _serve(command, token, source, _log(log, source), place)
    return 0


def _file(command: Serve, token: str | None) -> int:
    whole_number(command.evidence, "--evidence", 0)
    whole_number(command.explained, "--explained", 0)
    refuse_below_one("--port", command.port + 1)
    precision = precision_of(command.calibrate, command.precision)
    beside = command.what.with_name(f"{command.what.stem}.decisions.jsonl")
    path = command.decisions or (command.out / LOG if command.out else beside)
    folder = Folder(command.out)
    # The study file is opened first: one that does not exist is told before anything is made beside it.
    with study_file(command.what) as study, _listening(command) as place:
        check_place(path)
        source = live_source(
            study,
            command.settings.method(study),
            title=command.what.stem,
            evidence=command.evidence,
            calibrated=command.calibrate,
            precision=precision,
            clock=Clock(lambda stage: None if command.settings.quiet else say(f"Preparing: {stage}")),
        )
        log = _log(path, source)
        if command.out is None:
            _serve(command, token, source, log, place)
            return 0
        if not command.settings.quiet:
            say(f"Keeping the pages in {command.out}")
        keep(command.out, source, explained=command.explained)
        kept = kept_source(command.out)
        _report(command, folder, kept, log)
        reported = log.seq
        _serve(command, token, source, log, place)
        if log.seq != reported:
            _report(command, folder, kept, log)
    return 0


def _report(command: Serve, folder: Folder, kept: Source, log: DecisionLog) -> None:
    """The kept pages as one file, with the decisions that were read last."""
    decided = {row: one.told() for row, one in log.decided().items()}
    with folder.file("report.html") as path:
        page = render_static(kept, explained=command.explained, decided=decided)
        path.write_text(page, encoding="utf-8")


def _log(path: Path, source: Source) -> DecisionLog:
    return DecisionLog(path, source.content.audit, source.content.names)


def _serving() -> Any:
    return import_module("tracin.explorer.serving")  # which loads starlette


def _listening(command: Serve) -> socket:
    """The address, taken before the work."""
    return _serving().listen(command.host, command.port)


def _serve(command: Serve, token: str | None, source: Source, log: DecisionLog, place: socket) -> None:
    def ready(url: str) -> None:
        shown = f"{url}?token=… (the token you gave)" if token else url
        print(clean(f"tracin: ready at {shown}"), flush=True)
        print(clean(f"tracin: decisions are kept in {log.path}. Ctrl-C ends the page."), flush=True)

    _serving().serve(source, log, place, host=command.host, token=token, names=command.name, ready=ready)
