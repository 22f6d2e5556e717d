"""Is the calibrated cut-off right? Labels with a known share of wrong ones, and what ``calibrate`` estimates of them.

    python benchmarks/calibration.py                     the digits and 3,000 rows of Fashion-MNIST, two seeds: minutes
    python benchmarks/calibration.py --data digits --seeds 1
    python benchmarks/calibration.py --write-docs        also docs/results/calibration.md

For each share the labels of so many rows are made wrong, the example's ``fit`` trains on them, and the audit and its
calibration see these labels alone. "Wrong" counts the flips made here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracin
from tracin.audit import calibrate, find_label_issues
from tracin.evaluation import DetectionCurve, plant_flips
from tracin.study import study_file

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "calibration.md"
EXAMPLES = {"digits": ("digits", "digits.py"), "fashion-mnist": ("Fashion-MNIST", "fashion_mnist.py")}
SHARES = (0.0, 0.01, 0.03, 0.1)
RULE = 0.5


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Calibrated cut-offs on a known share of wrong labels.")
    parser.add_argument("--data", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write-docs", action="store_true")
    return parser.parse_args()


@contextmanager
def example(name: str) -> Iterator[tracin.Study]:
    """The example's study, whose checkpoints lie in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRACIN_RUNS": folder, "FASHION_ROWS": "3000", "FASHION_EPOCHS": "12"}
        with study_file(HERE.parent / "examples" / EXAMPLES[name][1]) as study:
            yield study


def share_of(mask: Tensor, among: Tensor) -> float | None:
    """The share of rows among some, None where there are none."""
    return float(mask[among].double().mean()) if bool(among.any()) else None


def measured(study: tracin.Study, share: float, seed: int) -> dict[str, Any]:
    """One training on labels of which a share is wrong."""
    inputs, true = study.train
    n, labels = len(true), true.clone()
    planted = torch.zeros(n, dtype=torch.bool)
    if share:
        flips = plant_flips(true, fraction=share, seed=100 + seed)
        labels, planted = flips.labels, flips.mask
    rows = (inputs, labels)
    assert study.fit is not None
    with tempfile.TemporaryDirectory() as folder:
        trajectory = study.fit(rows, Path(folder) / "checkpoints", seed)
        given = replace(study, train=rows, trajectory=trajectory)
        method = tracin.TracInCP(study.task, trajectory, device="cpu", progress=False)
        audit = find_label_issues(method, rows, evidence_rows="all", duplicates=False)
        calibration = calibrate(given, method=method, seeds=(seed,))
    # Thresholds fall: the last one from the rule's cut-off on flags what the rule flags.
    at = max(place for place, value in enumerate(calibration.thresholds) if value >= RULE)
    found = {
        "share": share,
        "estimated": calibration.wrong,
        "flagged": int(audit.is_issue.sum()),
        "precision": share_of(planted, audit.is_issue),
        "expected": calibration.precision[at],
    }
    if share:
        assert audit.suggested_labels is not None
        assert audit.predicted_labels is not None
        found |= {
            "suggested": share_of(audit.suggested_labels == true, planted),
            "predicted": share_of(audit.predicted_labels == true, planted),
            "agreement": DetectionCurve(-audit.signals["proponent_agreement"], planted).auroc,
        }
    return found


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def listed(cells: list[dict[str, Any]], name: str, digits: int = 0) -> str:
    return ", ".join(percent(cell.get(name), digits) for cell in cells)


def markdown(results: dict[str, list[list[dict[str, Any]]]], rows: dict[str, int], seeds: int) -> str:
    lines = [
        "# The calibrated cut-off, measured",
        "",
        (
            "A known share of the labels is made wrong at random, the example is trained on them, and `calibrate` sees these "
            f"labels alone. {seeds} seeds, in their order; the cut-off is the rule's (a score of {RULE}). Only the flips made "
            "here count as wrong: labels that were wrong before do not. All numbers in %, but AUROC."
        ),
        "",
        "| data, rows | wrong | estimated | flagged rows | wrong of these | expected |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, groups in results.items():
        for cells in groups:
            flagged = ", ".join(f"{cell['flagged']:,}" for cell in cells)
            lines.append(
                f"| {EXAMPLES[name][0]}, {rows[name]:,} | {percent(cells[0]['share'])} | {listed(cells, 'estimated', 1)} | "
                f"{flagged} | {listed(cells, 'precision')} | {listed(cells, 'expected')} |"
            )
    lines += [
        "",
        "How often the suggested label, and the predicted one alone, is the true label of a row made wrong; and how well the",
        "evidence tells such rows from others, by the share of the 25 strongest proponents with the given label",
        "(`proponent_agreement`; it is not in the score).",
        "",
        "| data | wrong | suggested is right | predicted is right | AUROC of the agreement |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, groups in results.items():
        for cells in groups:
            if cells[0]["share"]:
                aurocs = ", ".join(f"{cell['agreement']:.2f}" for cell in cells)
                lines.append(
                    f"| {EXAMPLES[name][0]} | {percent(cells[0]['share'])} | {listed(cells, 'suggested')} | "
                    f"{listed(cells, 'predicted')} | {aurocs} |"
                )
    version = torch.__version__.partition("+")[0]
    return "\n".join(
        [*lines, "", f"torch {version}. Made by `python benchmarks/calibration.py --write-docs`.", ""]
    )


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    results: dict[str, list[list[dict[str, Any]]]] = {}
    rows: dict[str, int] = {}
    for name in options.data:
        with example(name) as study:
            rows[name] = len(study.train[1])
            for share in SHARES:
                cells = [measured(study, share, seed) for seed in range(options.seeds)]
                results.setdefault(name, []).append(cells)
                print(name, cells, flush=True)
    if options.write_docs:
        PAGE.write_text(markdown(results, rows, options.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
