"""Measurements as a table: on the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from measure import Measured, Result

__all__ = ["lines", "markdown"]

LABELS = {
    "pass": "one plain pass",
    "influence": "tracin influence",
    "top_k": "tracin top_k (k = 10)",
    "self_influence": "tracin self_influence",
    "vmap": "vmap(grad) + matmul",
    "captum": "captum TracInCP, per-sample mode",
    "captum_exact": "captum TracInCP, slow exact path",
}
HEADINGS = ("method", "seconds", "× pass", "range", "rounds", "error")


def cells(method: Measured) -> tuple[str, ...]:
    label, error = LABELS[method.label], "" if method.error is None else f"{method.error:.1e}"
    if not method.seconds:
        return label, "–", "–", "", "", error or method.note
    low, high = min(method.ratios), max(method.ratios)
    spread = f"{low:.2f}–{high:.2f}" if len(method.ratios) > 1 else ""
    return label, f"{method.second:.3f}", f"{method.ratio:.2f}", spread, str(len(method.seconds)), error


def heading(result: Result) -> str:
    return (
        f"{result.title}: {result.parameters:,} parameters, {result.rows:,} rows × {result.queries} queries × "
        f"{result.checkpoints} checkpoint{'s' if result.checkpoints != 1 else ''}, batch {result.batch}"
    )


def lines(result: Result) -> list[str]:
    """The table of one model for a terminal."""
    table = [HEADINGS, *(cells(method) for method in result.methods)]
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

`make bench` writes the numbers, and `python benchmarks/run.py --write-docs` this page. Each is the median over rounds in
which every method ran once, in turn, in one process; the ratio is to the plain pass **of the same round**, and the range is
the smallest and the largest of these ratios.

- **One plain pass**: load each checkpoint; forward and backward with the parameters' gradients, over all train and query
  rows, in batches of the size given. A method that uses gradients needs at least this, up to the weight gradients, which
  factored products never form. The peers read the same batches; `tracin` chooses its own (`batch_size="auto"`): up
  to 512 rows on the MLP, about the size given on the others.
- **Error**: max |Δ| / max |score| against autograd in float64, one row at a time, on 8 train rows × 4 queries over all
  checkpoints; for `top_k` on the list of one query, for `self_influence` on the 8 rows. Float32 allows about 1e-6.
- `self_influence` reads no queries: its floor is the pass over the train rows alone.
- A peer slower than the patience of the run is timed once; its ratio is to the median pass.
"""


def machine_line(result: Result) -> str:
    facts = result.machine
    return (
        f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''} of {facts['cpus']} CPUs "
        f"({facts['processor']}, {facts['vectors']}), {facts['clock']} seconds, {facts['system']}, "
        f"Python {facts['python']}, torch {facts['torch']}, tracin {facts['tracin']}."
    )


def markdown(results: Sequence[Result]) -> str:
    """The page of the documentation."""
    parts = [INTRODUCTION]
    for result in results:
        rows = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
        rows += ["| " + " | ".join(cells(method)) + " |" for method in result.methods]
        title, sizes = heading(result).split(": ", 1)
        parts.append(
            f"## {title}\n\n{sizes[0].upper()}{sizes[1:]}.\n\n"
            + "\n".join(rows)
            + f"\n\n{machine_line(result)}\n"
        )
    return "\n".join(parts)
