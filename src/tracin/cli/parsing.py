"""From an argument list to a command."""

from __future__ import annotations

from typing import Annotated

import tyro  # noqa: TID253  loaded with the command, not with the library

from tracin.cli.index_options import IndexCommand
from tracin.cli.options import Audit, Demo, Explain, Plan, StudyRun, Verify
from tracin.cli.serve_options import Serve

__all__ = ["parse"]

Index = Annotated[
    IndexCommand,
    tyro.conf.subcommand(
        "index", description="Keep the gradients of the training rows, and ask them again and again."
    ),
]
Command = (
    Demo
    | Audit
    | Explain
    | Serve
    | Verify
    | Plan
    | Annotated[StudyRun, tyro.conf.subcommand("study")]
    | Index
)

_SUMMARY = "Trace the predictions of a PyTorch model back to the training rows that taught them."


def parse(args: list[str] | None = None) -> Command:
    """The command of an argument list; tyro prints help and mistakes and exits."""
    commands = Annotated[Command, tyro.conf.FlagCreatePairsOff]
    return tyro.cli(commands, prog="tracin", description=_SUMMARY, args=args)
