"""Measurements as a table: on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aims import aims
from measure import PEERS, Measured, Result

__all__ = ["LABELS", "MIB", "lines", "machine_line_of", "markdown"]

LABELS = {
    "pass": "one plain pass",
    "influence": "tracin influence",
    "top_k": "tracin top_k (k = 10)",
    "self_influence": "tracin self_influence",
    "vmap": "vmap(grad) + matmul",
    "captum": "captum TracInCP, per-sample mode",
    "captum_exact": "captum TracInCP, slow exact path",
    "dattri": "dattri TracInAttributor",
    "dattri_llm": "dattri-llm TracInAttributor",
    "kronfluence": "kronfluence, no curvature",
}
HEADINGS = ("method", "seconds", "× pass", "range", "rounds", "peak MiB", "error")
# Float32 sums differ by 1e-6 or so; what is off by more than this, and more than float32 autograd is, leaves something out.
WRONG, WORSE = 1e-4, 3.0
MIB = 1 << 20


def wrong(result: Result, method: Measured) -> bool:
    """Whether the error says more than that the numbers are float32."""
    rounding = result.method("pass")
    allowed = max(WRONG, WORSE * (rounding.error or 0.0) if rounding else 0.0)
    return method.error is not None and method.error > allowed


def cells(result: Result, method: Measured) -> tuple[str, ...]:
    label, error = LABELS[method.label], "" if method.error is None else f"{method.error:.1e}"
    if wrong(result, method):
        error += " (wrong)"
    peak = "" if method.peak is None else f"{method.peak / MIB:,.0f}"
    if not method.seconds:
        return label, "–", "–", "", "", peak, error or method.note
    low, high = min(method.ratios), max(method.ratios)
    spread = f"{low:.2f}–{high:.2f}" if len(method.ratios) > 1 else ""
    return label, f"{method.second:.3f}", f"{method.ratio:.2f}", spread, str(len(method.seconds)), peak, error


def heading(result: Result) -> str:
    return (
        f"{result.title}: {result.parameters:,} parameters, {result.rows:,} rows × {result.queries} queries × "
        f"{result.checkpoints} checkpoint{'s' if result.checkpoints != 1 else ''}, batch {result.batch}"
    )


def lines(result: Result) -> list[str]:
    """The table of one model for a terminal."""
    table = [HEADINGS, *(cells(result, method) for method in result.methods)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADINGS))]
    out = [heading(result)]
    for row in table:
        first, *rest = (
            cell.ljust(w) if at == 0 else cell.rjust(w)
            for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        out.append("  " + "  ".join([first, *rest]).rstrip())
    return out


INTRODUCTION = """# Speed

`make bench` writes the numbers, and `python benchmarks/run.py --write-docs` this page.

- **How it is measured**: each method has a process of its own on the same rows, checkpoint files and number of threads. It
  runs once, which gives its peak and its error; then the processes take turns, round by round. In its turn a process runs
  one plain pass and then the method. A ratio is that of these two neighbours, and the table has the median over the rounds
  and the smallest and largest. A peer slower than the patience of the run is measured by its first run alone.
- **One plain pass**: load each checkpoint; forward and backward with the parameters' gradients, over all train and query
  rows, in batches of the size given. A method that uses gradients needs at least this, up to the weight gradients, which
  factored products never form. The peers read the same batches; `tracin` chooses its own (`batch_size="auto"`).
- **Peak**: the largest resident memory during the first run, above what the process held just before it, with imports, rows
  and the model in place.
- **Error**: max |Δ| / max |score| against autograd in float64, one row at a time, on 8 train rows × 4 queries over all
  checkpoints; for `top_k` on the list of one query, for `self_influence` on the 8 rows. Float32 allows about 1e-6. Where an
  activation lies so near zero that rounding decides on which side of a ReLU it falls, float32 is further off, autograd's
  own gradient as well: that of autograd in float32, these rows in one batch, stands beside the plain pass. More than 1e-4
  and more than three times that is marked wrong.
- `self_influence` reads no queries: its floor is the pass over the train rows alone.

How the others are set up: captum in its faster mode, and its slow path on a few rows for its error; dattri with its
projection off, all queries in one batch; dattri-llm with its factorized hooks on every layer that takes them, the learning
rates put into the train loss; kronfluence with the identity for its curvature and all queries held at once. The versions are
those that `benchmarks/peers.txt` pins. What makes some of them wrong here: captum's per-sample mode and kronfluence trace
linear layers and convolutions alone, dattri-llm no BatchNorm, and to none of the three is a weight that two layers share one
parameter.
"""

AIMS = """Where an aim of passes is missed, [the profile](speed-profile.md) tells where the time goes, and what a program
written by hand takes. Where a peer is not slow enough, what would be left for `influence` is told; forward and backward without
any weight gradient take 0.7 of a pass or more there."""


def machine_line_of(facts: dict[str, Any]) -> str:
    return (
        f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''} of {facts['cpus']} CPUs "
        f"({facts['processor']}, {facts['vectors']}), {facts['clock']} seconds, {facts['system']}, "
        f"Python {facts['python']}, torch {facts['torch']}, tracin {facts['tracin']}."
    )


def times(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


def dagger(result: Result, method: Measured) -> str:
    return " †" if wrong(result, method) else ""


def short(result: Result, label: str) -> str:
    """One cell of the summary: the ratio, or why there is none."""
    method = result.method(label)
    if method is None:
        return ""
    if not method.ratios:
        late = method.note.startswith("not done after ")
        return method.note.replace("not done after ", "over ") if late else "fails"
    return times(method.ratio) + dagger(result, method)


def summary(results: Sequence[Result]) -> list[str]:
    """All workloads in one table of ratios, then how much faster ours is."""
    names = [
        f"{result.name}<br>{result.rows:,} × {result.queries} × {result.checkpoints}" for result in results
    ]
    out = ["| × one plain pass | " + " | ".join(names) + " |", "|---|" + "---:|" * len(results)]
    for label, words in LABELS.items():
        found = [short(result, label) for result in results]
        if label not in {"pass", "captum_exact"} and any(found):
            out.append(f"| {words} | " + " | ".join(found) + " |")
    out += ["", "† wrong: see *Error* above. Sizes are rows × queries × checkpoints.", ""]
    for result in results:
        mine = result.method("influence")
        others = [peer for label in PEERS if (peer := result.method(label)) and peer.ratios]
        if mine and mine.ratios and others:
            told = ", ".join(
                f"{times(peer.ratio / mine.ratio)}× as fast as {LABELS[peer.label]}{dagger(result, peer)}"
                for peer in others
            )
            out.append(f"- {result.name}: `influence` is {told}.")
    return out


def reasons(result: Result) -> str:
    """What could not be measured, and why."""
    failed = [f"{LABELS[m.label]}: {m.note}" for m in result.methods if not m.seconds and m.error is None]
    return "".join(f"\n- Not measured: {line}" for line in failed) + ("\n" if failed else "")


def markdown(results: Sequence[Result]) -> str:
    """The page of the documentation."""
    parts = [INTRODUCTION, "\n".join(["## All in one table", "", *summary(results), ""])]
    parts.append("\n".join(["## The aims", "", AIMS, "", *aims(results), ""]))
    for result in results:
        rows = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
        rows += ["| " + " | ".join(cells(result, method)) + " |" for method in result.methods]
        title, sizes = heading(result).split(": ", 1)
        parts.append(
            f"## {title}\n\n`{result.name}`: {sizes}.\n\n"
            + "\n".join(rows)
            + f"\n{reasons(result)}\n{machine_line_of(result.machine)}\n"
        )
    return "\n".join(parts)
