"""How time and memory grow: with rows, queries, checkpoints, parameters and tokens.

    python benchmarks/growth.py                     all curves, one line per point
    python benchmarks/growth.py --curves n m        some of them
    python benchmarks/growth.py --write-docs        docs/results/growth.md and its figures, from results/growth.json
    python benchmarks/growth.py --rounds 0 --write-docs    the same from the file that is there

Each point and method is a process of its own, as in ``run.py``: its first run gives the peak, later ones the seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import CLOCKS, Process, Settings, first_run, machine, rounds_of
from table import LABELS, MIB, machine_line_of
from workloads import FASHION, case_of, made

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "results"
KEPT = HERE / "results" / "growth.json"
PASS, OURS = "pass", "influence"


@dataclass(frozen=True)
class Curve:
    """A workload, what grows in it, and the peer that is the fastest exact one there."""

    title: str
    axis: str
    base: str
    key: str
    values: tuple[int, ...]
    peer: str
    parameters: bool = False

    def names(self) -> list[str]:
        return [f"{self.base},{self.key}={value}" for value in self.values]


CURVES = {
    "n": Curve(
        "Train rows", "train rows", "cnn:queries=100,checkpoints=1", "rows", (500, 1000, 2000, 4000, 8000), "vmap"
    ),
    "m": Curve("Queries", "queries", "cnn:rows=1000,checkpoints=1", "queries", (16, 64, 256, 1024), "vmap"),
    "checkpoints": Curve(
        "Checkpoints", "checkpoints", "cnn:rows=1000,queries=100", "checkpoints", (1, 2, 4, 8), "vmap"
    ),
    "parameters": Curve(
        "Parameters (MLP, wider and wider)", "parameters", "mlp:rows=1000,queries=100,checkpoints=1", "width",
        (64, 256, 1024, 4096), "dattri_llm", parameters=True,
    ),
    "tokens": Curve(
        "Tokens per row (GPT-2 shape)", "tokens", "gpt:rows=128,queries=16,checkpoints=1", "length",
        (16, 32, 64, 128, 256), "vmap",
    ),
}  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory against the sizes of a run.")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of each point (3)")
    parser.add_argument(
        "--limit", type=float, default=40.0, help="a peer is given up after this many seconds (40)"
    )
    parser.add_argument("--patience", type=float, default=4.0, help="a peer slower than this runs once (4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that runs the methods (this one)"
    )
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where the points are kept")
    parser.add_argument("--write-docs", action="store_true", help="docs/results/growth.md and its figures")
    return parser.parse_args()


def point(name: str, peer: str, settings: Settings) -> dict[str, Any]:
    """The pass, ours and the peer at one size."""
    case, found, processes = case_of(name), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        workload = made(name, case, Path(folder), settings.data)
        try:
            for label in (PASS, OURS, peer):
                process = processes[label] = Process(label, name, Path(folder), settings)
                found[label], again = first_run(process, label, settings)
                if not again:
                    processes.pop(label).close()
            rounds_of(processes, found, settings.rounds, 1.0, lambda _: None)
        finally:
            for process in processes.values():
                process.close()
    methods = {
        label: {
            "seconds": one.second if one.seconds else None,
            "ratio": one.ratio if one.ratios else None,
            "peak": one.peak,
            "error": one.error,
            "note": one.note,
        }
        for label, one in found.items()
    }
    return {"parameters": workload.parameters, "methods": methods}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All points, added to those that are kept."""
    settings = Settings.of(options)
    kept = json.loads(options.kept.read_text()) if options.kept.is_file() else {"curves": {}}
    count = sum(len(CURVES[name].values) for name in options.curves)
    print(f"{count} points of three processes each: about {12 * count} s on two quiet cores", flush=True)
    start = time.perf_counter()
    for name in options.curves:
        curve, points = CURVES[name], []
        for value, text in zip(curve.values, curve.names(), strict=True):
            points.append({"value": value, **point(text, curve.peer, settings)})
            told = "  ".join(
                f"{label} {one['seconds'] or math.nan:.3f} s {(one['peak'] or 0) / MIB:,.0f} MiB"
                for label, one in points[-1]["methods"].items()
            )
            print(f"{curve.axis} {value}: {told}  ({time.perf_counter() - start:.0f} s)", flush=True)
        kept["curves"][name] = {"base": curve.base, "peer": curve.peer, "points": points}
    kept["machine"], kept["rounds"] = machine(options.threads, options.clock), options.rounds
    options.kept.parent.mkdir(parents=True, exist_ok=True)
    options.kept.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def across(curve: Curve, points: list[dict[str, Any]]) -> list[int]:
    return [one["parameters"] if curve.parameters else one["value"] for one in points]


def slope(sizes: list[int], values: list[float | None]) -> float | None:
    """The exponent between the last two sizes: 1 is in proportion."""
    if len(values) < 2 or not values[-1] or not values[-2]:
        return None
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def draw(name: str, kept: dict[str, Any], path: Path) -> None:
    """Seconds and peak beside each other, on logarithmic axes."""
    import matplotlib as mpl  # noqa: PLC0415 - measuring needs no figures

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    curve, found = CURVES[name], kept["curves"][name]
    points, sizes = found["points"], across(curve, found["points"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    styles = {PASS: ("#777777", "--", "o"), OURS: ("#1f6feb", "-", "o"), found["peer"]: ("#d1742f", "-", "s")}
    for axis, key, unit, words in ((axes[0], "seconds", 1, "seconds"), (axes[1], "peak", MIB, "peak, MiB")):
        for label, (colour, line, mark) in styles.items():
            drawn = [(x, one["methods"][label][key]) for x, one in zip(sizes, points, strict=True)]
            drawn = [(x, y / unit) for x, y in drawn if y]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), line, marker=mark, color=colour, label=LABELS[label])
        axis.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel=words)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.yaxis.set_major_formatter("{x:g}")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter("")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def sizes_of(base: str) -> str:
    """``cnn:rows=1000,checkpoints=1`` in words."""
    name, _, rest = base.partition(":")
    return ", ".join(
        [name, *(f"{int(value):,} {key}" for key, _, value in (i.partition("=") for i in rest.split(",")))]
    )


def cell(one: dict[str, Any], key: str) -> str:
    value = one[key]
    if value is None:
        return "–"
    return f"{value / MIB:,.0f}" if key == "peak" else f"{value:.3f}" if key == "seconds" else f"{value:.2f}"


def section(name: str, kept: dict[str, Any]) -> list[str]:
    curve, found = CURVES[name], kept["curves"][name]
    points, peer = found["points"], found["peer"]
    sizes = across(curve, points)
    powers = [slope(sizes, [one["methods"][OURS][key] for one in points]) for key in ("seconds", "peak")]
    told = ", its memory".join(f" with the power {power:.2f}" for power in powers if power is not None)
    shorter = LABELS[peer].split(" ", 1)[0]
    out = [
        f"## {curve.title}", "",
        f"{sizes_of(found['base'])}. Between the last two sizes the time of `influence` grows{told}.", "",
        f"![Seconds and peak memory against {curve.axis}](growth-{name}.png)", "",
        (f"| {curve.axis} | pass s | influence s | × pass | {shorter} × pass | pass MiB | influence MiB | {shorter} MiB |"),
        "|---:|" + "---:|" * 7,
    ]  # fmt: skip
    notes = []
    for size, one in zip(sizes, points, strict=True):
        plain, mine, other = (one["methods"][label] for label in (PASS, OURS, peer))
        row = [cell(plain, "seconds"), cell(mine, "seconds"), cell(mine, "ratio"), cell(other, "ratio")]
        row += [cell(each, "peak") for each in (plain, mine, other)]
        out.append(f"| {size:,} | " + " | ".join(row) + " |")
        if other["seconds"] is None:
            notes.append(f"- {LABELS[peer]} at {size:,}: {other['note']}")
    return [*out, "", *notes, *([""] if notes else [])]


def page(kept: dict[str, Any]) -> str:
    curves = [name for name in CURVES if name in kept["curves"]]
    head = [
        "# How cost grows", "",
        "`python benchmarks/growth.py --write-docs` measures and writes this page. Each method and size is a process of",
        f"its own, timed in {kept['rounds']} rounds beside one plain pass; the peak is that of its first run, above the loaded",
        "rows, the model and the imports. The other method is an exact peer of [the speed page](speed.md), the fastest that is",
        "cheap to run there.", "",
    ]  # fmt: skip
    body = [line for name in curves for line in section(name, kept)]
    return "\n".join([*head, *body, machine_line_of(kept["machine"])]) + "\n"


def main() -> None:
    options = parsed()
    kept = measured(options) if options.rounds else json.loads(options.kept.read_text())
    if options.write_docs:
        DOCS.mkdir(parents=True, exist_ok=True)
        for name in kept["curves"]:
            draw(name, kept, DOCS / f"growth-{name}.png")
        (DOCS / "growth.md").write_text(page(kept))


if __name__ == "__main__":
    main()
