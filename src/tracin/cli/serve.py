"""``tracin serve``: a study or a kept folder as a page in the browser."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from tracin.cli.commands import refuse_below_one
from tracin.cli.output import Folder
from tracin.cli.printing import clean, say
from tracin.cli.serve_options import Serve
from tracin.errors import MissingExtraError, OptionError
from tracin.explorer.decisions import DecisionLog
from tracin.explorer.hosts import require_token
from tracin.explorer.kept import keep, kept_source
from tracin.explorer.live import Clock, live_source
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
    if command.out is not None or command.calibrate:
        raise OptionError("--out and --calibrate need a study file: a kept folder is shown as it is.")
    source = kept_source(command.what)
    _serve(command, token, source, command.decisions or command.what / LOG)
    return 0


def _file(command: Serve, token: str | None) -> int:
    whole_number(command.evidence, "--evidence", 0)
    whole_number(command.explained, "--explained", 0)
    refuse_below_one("--port", command.port + 1)
    if not 0.0 < command.precision < 1.0:
        raise OptionError(f"--precision is {command.precision}: give a share between 0 and 1.")
    folder = Folder(command.out)
    with study_file(command.what) as study:
        source = live_source(
            study,
            command.settings.method(study),
            title=command.what.stem,
            evidence=command.evidence,
            calibrated=command.calibrate,
            precision=command.precision,
            clock=Clock(lambda stage: None if command.settings.quiet else say(f"Preparing: {stage}")),
        )
        if folder:
            assert command.out is not None
            if not command.settings.quiet:
                say(f"Keeping the pages in {command.out}")
            keep(command.out, source, explained=command.explained)
            with folder.file("report.html") as path:
                path.write_text(render_static(source, explained=command.explained), encoding="utf-8")
        beside = command.what.with_name(f"{command.what.stem}.decisions.jsonl")
        _serve(command, token, source, command.decisions or (command.out / LOG if command.out else beside))
    return 0


def _serve(command: Serve, token: str | None, source: Source, path: Path) -> None:
    log = DecisionLog(path, source.content.audit)

    def ready(url: str) -> None:
        shown = f"{url}?token=… (the token you gave)" if token else url
        print(clean(f"tracin: ready at {shown}"), flush=True)
        print(clean(f"tracin: decisions are kept in {path}. Ctrl-C ends the page."), flush=True)

    serving = import_module("tracin.explorer.serving")  # which loads starlette
    serving.serve(
        source, log, host=command.host, port=command.port, token=token, names=command.name, ready=ready
    )
