"""``make study``: who finds planted label flips first, on 10,000 pictures of Fashion-MNIST, for a CNN and a ResNet.

    python benchmarks/mislabelled.py                    run what is missing of both studies
    python benchmarks/mislabelled.py --models cnn       one of them
    python benchmarks/mislabelled.py --write-docs       write docs/results/mislabelled.md from what is there

Cells are kept under --folder as they are finished: a run that is cut short goes on where it stopped. Each study takes
more than an hour on one core; the two may run side by side, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from tracin.cli import main as tracin
from tracin.evaluation.mislabelled import StudyResult
from tracin.plots import png, study_figure

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
SHARED = "--data fashion-mnist --rows 10000 --fraction 0.1 --flips random hardest --schedule constant cosine"
TRACIN = "tracin tracin-integrated tracin-uniform tracin-last"
FORWARD = "loss loss-last margin aum forgetting"


@dataclass(frozen=True)
class Study:
    """One command, and its name in the documentation."""

    title: str
    options: str

    def command(self, name: str, folder: str, seeds: int) -> str:
        return f"study mislabelled {SHARED} {self.options} --seeds {seeds} --out {folder}/{name}"


STUDIES = {
    "cnn": Study(
        "CNN",
        f"--model cnn --epochs 10 --checkpoints 5 --methods {TRACIN} {FORWARD} representer knn tracin-last-layer influence "
        "confidence",
    ),
    "resnet": Study(
        "ResNet with BatchNorm",
        f"--model resnet --rate 0.1 --epochs 5 --checkpoints 4 --methods {TRACIN} {FORWARD} representer influence",
    ),
}
INTRODUCTION = """# Mislabelled data, measured

Planted flips on 10,000 pictures of Fashion-MNIST: one label in ten is wrong. Every method sees the same checkpoints of the same
training runs. `make study` runs the commands below, with three seeds, and `python benchmarks/mislabelled.py --write-docs` writes
this page from what is finished; [what each method is](../mislabelled.md).

Numbers are means ± one standard deviation over the seeds. *Found at 20 %*: the share of the flips among the 20 % of
the rows that a method calls most suspect. Seconds are wall-clock seconds of one thread on a
machine that did other work too; the processor seconds in the JSON files are not moved by that. Peak memory is what a method
needed above what the process held before.
"""


def section(name: str, result: StudyResult) -> str:
    seeds, made = result.design.seeds, result.made_with
    told = [
        f"## {STUDIES[name].title}",
        f"    tracin {STUDIES[name].command(name, 'runs/study', seeds)}",
        (
            f"{'One seed' if seeds == 1 else f'{seeds} seeds'}; torch {made['torch']}, {made['threads']} thread, "
            f"{made['processor']}. "
            f"[All numbers](mislabelled-{name}.json); `tracin study mislabelled --replay` takes that file."
        ),
        f"![Share of flips found against share of rows inspected](mislabelled-{name}.png)",
    ]
    for (flips, schedule), cells in result.groups().items():
        accuracy = sum(cell.accuracy for cell in cells) / len(cells)
        told.append(f"### {flips.capitalize()} flips, {schedule} rate: test accuracy {100 * accuracy:.1f} %")
        rows = [row for row in result.table() if (row["flips"], row["schedule"]) == (flips, schedule)]
        told.append("\n".join(table(rows)))
    return "\n\n".join(told)


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| method | AUROC | average precision | found at 10 % | 20 % | 30 % | seconds | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row["seeds"]:
            lines.append(f"| {row['method']} | not run: {row['not_run']} |||||||")
            continue
        shares = [spread(row, f"found_at_{share}", 100, "{:.1f}") for share in (10, 20, 30)]
        numbers = [spread(row, "auroc", 1, "{:.3f}"), spread(row, "average_precision", 1, "{:.3f}"), *shares]
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append(f"| {row['method']} | " + " | ".join(numbers) + f" | {row['seconds']:.1f} | {peak} |")
    return lines


def spread(row: dict, name: str, scale: float, form: str) -> str:
    deviation = row[f"{name}_sd"]
    text = form.format(scale * row[name])
    return text if deviation is None else f"{text} ± {form.format(scale * deviation)}"


def write_docs(folder: Path) -> None:
    parts = [INTRODUCTION]
    for name in STUDIES:
        path = folder / name / "study.json"
        if path.is_file():
            result = StudyResult.load(path)
            (RESULTS / f"mislabelled-{name}.png").write_bytes(png(study_figure(result)))
            text = json.dumps(result.to_json(), separators=(",", ":"), allow_nan=False)
            (RESULTS / f"mislabelled-{name}.json").write_text(text + "\n", encoding="utf-8")
            parts.append(section(name, result))
    (RESULTS / "mislabelled.md").write_text(
        "\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The study of mislabelled data at full size.")
    parser.add_argument("--models", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--folder", default="runs/study", help="where the cells are kept (runs/study)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--write-docs", action="store_true", help="write the page instead of running")
    options = parser.parse_args()
    if options.write_docs:
        write_docs(Path(options.folder))
        return
    for name in options.models:
        status = tracin(STUDIES[name].command(name, options.folder, options.seeds).split())
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
