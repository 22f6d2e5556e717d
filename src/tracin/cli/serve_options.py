"""What ``tracin serve`` takes: its docstrings are the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro  # noqa: TID253  loaded with the command, not with the library

from tracin.cli.options import Settings

__all__ = ["Serve"]

What = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py|FOLDER")]


@dataclass(frozen=True)
class Serve:
    """Explain predictions and decide on suspects in a web page of this machine.

    Give a study file, whose predictions are explained as they are asked for; or the folder that an earlier run kept with
    --out, which is shown without running anything. The page answers at 127.0.0.1 until Ctrl-C. Decisions are kept in a
    log that survives a kill.
    """

    what: What
    """A Python file that defines study() -> tracin.Study, or a folder kept with --out."""

    port: int = 8000
    """Where to listen; 0 takes any port that is free."""

    host: str = "127.0.0.1"
    """At which address. Any but the loopback needs --token."""

    token: str | None = None
    """What a visitor must show, 16 or more of A to Z, a to z, 0 to 9 and - . _ ~: open the page once as /?token=TOKEN.
    TRACIN_TOKEN in the environment does the same, and is not seen in the list of processes."""

    name: tuple[str, ...] = ()
    """Further host names under which the page is reached, such as that of a proxy."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Keep audit, pages and decisions in this folder, to serve it later or elsewhere, and report.html, the pages as one file
    to send to a colleague, which is written again at Ctrl-C where decisions were made."""

    decisions: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """The log of decisions. By default decisions.jsonl in the folder, or FILE.decisions.jsonl beside the study file."""

    evidence: int = 5
    """How many proponents and opponents to list for each suspect; 0 for none."""

    calibrate: bool = False
    """Make labels wrong on purpose, train anew by the study's fit, and choose the cut-off by what is found. Takes as long as
    a training."""

    precision: float | None = None
    """With --calibrate: the share of flagged rows that is to be wrong; 0.9 unless given."""

    explained: int = 20
    """With --out: how many test rows to explain for the folder, wrong predictions first."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
