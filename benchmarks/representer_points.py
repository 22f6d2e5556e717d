"""What the penalty of ``RepresenterPoints`` does: the fit, its agreement with the model, and the flips it finds.

``python benchmarks/representer_points.py --write-docs`` writes docs/results/representer-points.md.

scikit-learn's digits, 1,300 training rows of which a tenth carry a wrong label, a 64-128-10 network trained by SGD.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tracin
from tracin.evaluation import DetectionCurve, plant_flips

ROOT = Path(__file__).resolve().parent.parent
ROWS, EPOCHS, RATE, BATCH = 1300, 30, 0.1, 32
PENALTIES = (1.0, 0.1, 3e-3, 1e-4, 1e-6)
INTRODUCTION = """# Representer points, measured

`python benchmarks/representer_points.py --write-docs` writes this page: {rows:,} rows of digits, a tenth of the labels flipped, a
64-128-10 network, one thread, torch {torch}. *Agreement*: the share of train rows for which the refitted head predicts
what the model does; *correlation*: of their logits. *Residual*: the relative error of the sum over rows.

| `l2` | seconds | Newton steps | residual | agreement | correlation | AUROC of flips |
|---|---|---|---|---|---|---|
"""


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def lines() -> list[str]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:ROWS]
    x = torch.as_tensor(images, dtype=torch.float32)[order] / 16
    flips = plant_flips(torch.as_tensor(labels)[order], 0.1, seed=0)
    model = trained(x, flips.labels)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    out = []
    for l2 in PENALTIES:
        method = tracin.RepresenterPoints(
            task, tracin.Checkpoint(model.state_dict()), l2=l2, device="cpu", progress=False
        )
        start = time.perf_counter()
        own = method.self_influence((x, flips.labels))
        seconds, told = time.perf_counter() - start, own.provenance
        auroc = DetectionCurve(own.values, flips.mask).auroc
        out.append(
            f"| {l2:g} | {seconds:.1f} | {told['steps']} | {told['residual']:.0e} | {told['agreement']:.1%} | "
            f"{told['correlation']:.3f} | {auroc:.3f} |"
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="RepresenterPoints by penalty.")
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/representer-points.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = INTRODUCTION.format(rows=ROWS, torch=torch.__version__) + "\n".join(lines()) + "\n"
    print(text)
    if options.write_docs:
        (ROOT / "docs" / "results" / "representer-points.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
