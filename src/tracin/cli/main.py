"""The entry point: what a command raises becomes one paragraph and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tracin.cli import (
    audit,
    commands,
    demo,
    index,
    index_options,
    options,
    parsing,
    serve,
    serve_options,
    study,
)
from tracin.cli.printing import clean
from tracin.errors import TracinError, UserCodeError

__all__ = ["main"]

FAILED, INTERRUPTED, UNREAD = 2, 130, 141


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The arguments, by default those of the process.

    Returns:
        0; 1 where ``verify`` finds a difference; 2 after an error that the message explains; 130 after Ctrl-C; 141
        where nobody reads what is printed.
    """
    debug = "--debug" in (sys.argv[1:] if args is None else args)
    try:
        return _run(None if args is None else list(args))
    except KeyboardInterrupt:
        print("\ntracin: interrupted. Files written before are whole.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as head, has enough; without this Python complains once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except TracinError as error:
        if debug:
            traceback.print_exc()
        more = " (--debug shows the traceback.)" if isinstance(error, UserCodeError) and not debug else ""
        print(f"tracin: {clean(' '.join(str(error).split()))}{more}", file=sys.stderr)
        return FAILED


def _run(args: list[str] | None) -> int:
    runs: dict[type, Callable[[Any], int]] = {
        options.Demo: demo.run,
        options.Audit: audit.run,
        options.Explain: commands.explain_rows,
        options.Verify: commands.verify,
        options.Plan: commands.plan,
        options.StudyRun: study.run,
        serve_options.Serve: serve.run,
        index_options.Build: index.build,
        index_options.Append: index.append,
        index_options.Query: index.query,
        index_options.Inside: index.info,
        index_options.Check: index.verify,
    }
    command = parsing.parse(args)
    with _plain_warnings():
        return runs[type(command)](command)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"tracin: note: {clean(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
