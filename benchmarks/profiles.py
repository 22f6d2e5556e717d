"""Where our time goes beside the plain pass and beside a program written by hand: as lines and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from aims import aim_of
from floor import Layer, least
from measure import CLOCKS, machine
from stages import Listed, profile
from workloads import Workload

from tracin.scoring.memory import freed_memory_kept

__all__ = ["markdown", "profiled"]


def profiled(workload: Workload, verb: str, rounds: int, clock: str) -> dict[str, Any]:
    """Stages and floor of one workload, as plain values with ``lines`` for a terminal."""
    with freed_memory_kept():  # as the library does for itself
        bound = least(workload, verb, CLOCKS[clock])
        found = profile(workload, verb, rounds, clock, {"without": bound.without, "least": bound.run})
    found |= {
        "name": workload.name,
        "title": workload.case.title,
        "verb": verb,
        "sizes": [len(workload.train[0]), len(workload.queries[0]), len(workload.trajectory)],
        "rounds": rounds,
        "machine": machine(torch.get_num_threads(), clock),
        "least_rows": bound.size,
        "layers": [asdict(layer) for layer in bound.layers],
    }
    return found | {"lines": lines(found)}


def lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    head = (
        f"{found['title']}, {found['verb']}: {found['total']:.3f} s, plain pass {found['pass']:.3f} s, "
        f"ratio {found['ratio']:.2f} ({found['rounds']} rounds, {found['machine']['clock']} seconds)"
    )
    out = [head]
    for title, listed in (
        ("stages of the plain pass", found["plain"]),
        (f"stages of {found['verb']}", found["stages"]),
    ):
        out.append(f"  {title:32} {'calls':>6} {'seconds':>8} {'ms/call':>8} {'× pass':>7}")
        for stage, calls, spent in listed:
            each = f"{1000 * spent / calls:8.2f}" if calls else " " * 8
            out.append(f"  {stage:32} {calls:6d} {spent:8.3f} {each} {spent / found['pass']:7.3f}")
    return [*out, *(f"  {part}" for part in told(found))]


def told(found: dict[str, Any]) -> list[str]:
    """What a program written by hand takes, in sentences."""
    ratio, aim = found["ratio"], aim_of(found["verb"], found["name"])
    without, program = found["beside"]["without"]["ratio"], found["beside"]["least"]
    layers = [Layer(**layer) for layer in found["layers"]]
    dear = sorted(layers, key=lambda layer: layer.ordinary - layer.per_row - layer.products)[:2]
    apart = "; ".join(
        f"`{layer.name}` ({layer.what}) {(layer.per_row + layer.products) / found['pass']:.2f} by its {layer.way}, "
        f"where the ordinary gradient takes {layer.ordinary / found['pass']:.2f}"
        for layer in dear
    )
    forward = next((spent for stage, _, spent in found["plain"] if stage == "forward"), 0.0) / found["pass"]
    ours = {stage: spent / found["pass"] for stage, _, spent in found["stages"]}
    gradients = sum(
        spent for stage, spent in ours.items() if stage.startswith("blocks") or stage in {"norms", "products"}
    )
    shared = sum(ours.get(stage, 0.0) for stage in ("forward", "backward to the outputs"))
    rest = max(0.0, ratio - gradients - shared)  # a difference of medians
    return [
        (
            f"Forward and backward without weight gradients take {without:.2f} of the pass ({forward:.2f} of it the forward). "
            f"The program written by hand takes {program['ratio']:.2f} ({program['low']:.2f}–{program['high']:.2f}, in batches "
            f"of {found['least_rows']}), `{found['verb']}` {program['ours']:.2f} times that."
        ),
        (
            f"`{found['verb']}` took {ratio:.2f}: {shared:.2f} forward and backward, {gradients:.2f} gradients and products, "
            f"and {rest:.2f} the check against autograd, loading, and everything else."
        ),
        f"Dearest beside the ordinary gradient: {apart}.",
        verdict(ratio, aim, program["ratio"]),
    ]


def verdict(ratio: float, aim: float, program: float) -> str:
    """Whether the aim was met, and if not, whether the program written by hand meets it."""
    if ratio <= aim:
        return f"The aim of {aim} is met."
    missed = f"The aim of {aim} is missed by {ratio - aim:.2f}"
    if program > aim:
        return f"{missed}; the program written by hand misses it too."
    return f"{missed}; the program written by hand meets it, so that {ratio - program:.2f} are our own."


def table(title: str, listed: Listed, unit: float) -> list[str]:
    out = [f"| {title} | calls | seconds | × pass |", "|---|---:|---:|---:|"]
    return out + [
        f"| {stage} | {calls or ''} | {spent:.3f} | {spent / unit:.3f} |" for stage, calls, spent in listed
    ]


def layer_table(found: dict[str, Any]) -> list[str]:
    """The layers whose gradients cost most, in passes."""
    unit, layers = found["pass"], [Layer(**layer) for layer in found["layers"]]
    layers.sort(key=lambda layer: -(layer.per_row + layer.products))
    out = ["| layer | ordinary weight gradient | per row | products | way |", "|---|---:|---:|---:|---|"]
    for layer in layers[:8]:
        numbers = " | ".join(f"{part / unit:.3f}" for part in (layer.ordinary, layer.per_row, layer.products))
        out.append(f"| `{layer.name}` {layer.what} | {numbers} | {layer.way} |")
    if len(layers) > len(layers[:8]):
        rest = layers[8:]
        sums = " | ".join(
            f"{sum(getattr(layer, part) for layer in rest) / unit:.3f}"
            for part in ("ordinary", "per_row", "products")
        )
        out.append(f"| {len(rest)} more | {sums} | |")
    return out


INTRODUCTION = """# Where the time goes

`python benchmarks/run.py --profile all --write-docs` writes this page, and one model's name in place of `all` its section
(`--verb self_influence` for that verb). Each model's stages are clocked inside one process, in
turns with the plain pass; a stage that calls another is not charged for it. All numbers are medians; × pass is in units of
one plain pass.

What an exact method cannot save is measured by a program that was written by hand for these models, with torch alone
(`benchmarks/floor.py`): the forward pass; the backward pass with every parameter frozen; each row's gradients of linear
layers, convolutions and norm layers (or their norms alone), in the cheapest of the known exact ways, which it is told
beforehand; and their products with the queries'. It leaves out embeddings, checks nothing, and finds no routes. It runs in
turns with the plain pass and with ours, so that what slows one slows all. The tables of layers are measured one after
another, on one batch.
"""


def markdown(found: Sequence[dict[str, Any]], before: str = "") -> str:
    """The page of the documentation.

    Args:
        found: Profiles.
        before: The page as it was: its sections of other models and verbs stay.

    Returns:
        The page.
    """
    sections = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    sections |= {f"{one['title']}: `{one['verb']}`": section(one) for one in found}
    texts = [f"## {heading}\n{text.rstrip()}\n" for heading, text in sections.items()]
    return "\n".join([INTRODUCTION, *texts])


def section(one: dict[str, Any]) -> str:
    """What stands below a model's heading."""
    n, m, checkpoints = one["sizes"]
    facts = one["machine"]
    head = f"{n:,} rows × {m} queries × {checkpoints} checkpoint{'s' if checkpoints != 1 else ''}"
    cpus = f"{facts['cpus']} CPUs ({facts['processor']}, {facts['vectors']})"
    where = f"{facts['threads']} threads of {cpus}, torch {facts['torch']}"
    return "\n".join([
        "",
        f"{head}, {one['rounds']} rounds, {where}: plain pass {one['pass']:.3f} s, ratio {one['ratio']:.2f}.", "",
        " ".join(told(one)), "",
        *table("stage of the plain pass", one["plain"], one["pass"]), "",
        *table(f"stage of `{one['verb']}`", one["stages"], one["pass"]), "",
        *layer_table(one), "",
    ])  # fmt: skip
