"""Influence against reality: logistic regression with L2 on digits, retrained without a row, a hundred times.

``python benchmarks/leave_one_out.py --write-docs`` writes docs/results/leave-one-out.md and its picture.

The model minimises (1/n) Σ ℓ(z) + λ/2 ‖θ‖², by Newton's method in float64 to a gradient norm of 1e-12. A row is left out
of the sum, n stays. What influence is held against is the rise of every test row's loss.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tracin

ROOT = Path(__file__).resolve().parent.parent
TRAIN, TEST, LEFT_OUT, L2, CLASSES = 1000, 200, 100, 1e-2, 10
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@dataclass(frozen=True)
class Rows:
    """Pictures as rows of 64 numbers, and their labels."""

    x: Tensor
    y: Tensor

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.x[start:stop], self.y[start:stop]


def digits(seed: int = 0) -> Rows:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return Rows(torch.tensor(x, dtype=torch.float64)[order] / 16, torch.tensor(y)[order])


def newton(x: Tensor, y: Tensor, weights: Tensor, start: Tensor | None = None) -> tuple[Tensor, float]:
    """Minimise Σ w ℓ + λ/2 ‖θ‖² over θ [classes, 65]; the minimum, and the gradient norm there."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    theta = torch.zeros(CLASSES, design.shape[1], dtype=x.dtype) if start is None else start.clone()
    target = F.one_hot(y, CLASSES).to(x.dtype)
    for _ in range(50):
        p = (design @ theta.T).softmax(1)
        gradient = ((p - target) * weights[:, None]).T @ design + L2 * theta
        if float(gradient.norm()) < 1e-12:
            break
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        curved = torch.einsum("n,ncd,ni,nj->cidj", weights, blocks, design, design)
        size = theta.numel()
        hessian = curved.reshape(size, size) + L2 * torch.eye(size, dtype=x.dtype)
        theta = theta - torch.linalg.solve(hessian, gradient.reshape(-1)).view_as(theta)
    return theta, float(gradient.norm())


def test_losses(theta: Tensor, rows: Rows) -> Tensor:
    x, y = rows.part(TRAIN, TRAIN + TEST)
    return F.cross_entropy(x @ theta[:, :-1].T + theta[:, -1], y, reduction="none")


def retrained(rows: Rows, theta: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
    """The rise of every test row's loss as each chosen row is left out, [left out, test]; the worst gradient norm."""
    x, y = rows.part(0, TRAIN)
    before, rises, worst = test_losses(theta, rows), [], 0.0
    for row in chosen.tolist():
        weights = torch.full((TRAIN,), 1 / TRAIN, dtype=x.dtype)
        weights[row] = 0.0
        without, norm = newton(x, y, weights, theta)
        rises.append(test_losses(without, rows) - before)
        worst = max(worst, norm)
    return torch.stack(rises), worst


def linear(theta: Tensor) -> nn.Module:
    model = nn.Linear(64, CLASSES).double()
    model.load_state_dict({"weight": theta[:, :-1].clone(), "bias": theta[:, -1].clone()})
    return model


def sgd_run(rows: Rows, folder: Path) -> tracin.Trajectory:
    """The same model trained by SGD with weight decay λ, recorded: what TracIn reads."""
    torch.manual_seed(0)
    model = nn.Linear(64, CLASSES).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=L2)
    recorder = tracin.CheckpointRecorder(folder, model, optimizer)
    x, y = rows.part(0, TRAIN)
    step = 0
    for epoch in range(1, 41):
        for some in torch.randperm(TRAIN).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            step += 1
        if epoch % 4 == 0:
            recorder.save(step=step)
    return tracin.Trajectory.from_folder(folder)


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1])


def spearman(a: Tensor, b: Tensor) -> float:
    return pearson(*(v.reshape(-1).argsort().argsort().double() for v in (a, b)))


def estimates(rows: Rows, theta: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Every method's scores [n, test], and its seconds."""
    train, test = rows.part(0, TRAIN), rows.part(TRAIN, TRAIN + TEST)
    model = linear(theta)
    task, at = tracin.Task(model, tracin.losses.cross_entropy), tracin.Checkpoint(model.state_dict())
    found: dict[str, tuple[Tensor, float]] = {}

    def timed(label: str, method: Any) -> None:
        start = time.perf_counter()
        values = method.influence(train, test).values.T
        found[label] = values, time.perf_counter() - start

    for solver in ("exact", "cg", "lissa", "ekfac"):
        timed(
            f"InfluenceFunctions, {solver}",
            tracin.InfluenceFunctions(task, at, solver=solver, damping=L2, **QUIET),
        )
    with tempfile.TemporaryDirectory() as folder:
        trajectory = sgd_run(rows, Path(folder))
        timed("TracInCP, 10 checkpoints", tracin.TracInCP(task, trajectory, **QUIET))
        timed("TracInCP, last checkpoint", tracin.TracInCP(task, trajectory[-1:], **QUIET))
    return found


def layers_table(rows: Rows) -> list[str]:
    """EKFAC beside exact where there is more than one layer: trained MLP and CNN, by damping."""
    models = {
        "MLP 64-16-10": lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
        "CNN": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 12),
            nn.ReLU(), nn.Linear(12, 10)),
    }  # fmt: skip
    lines = [
        "| model | damping, in mean eigenvalues | ekfac | plain gradient products |",
        "|---|---|---|---|",
    ]
    train, test = rows.part(0, TRAIN), rows.part(TRAIN, TRAIN + 50)
    for name, make in models.items():
        torch.manual_seed(0)
        model = make().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(10):
            for some in torch.randperm(TRAIN).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(train[0][some]), train[1][some]).backward()
                optimizer.step()
        model.zero_grad()
        task, at = tracin.Task(model, tracin.losses.cross_entropy), tracin.Checkpoint(model.state_dict())
        default = tracin.InfluenceFunctions(task, at, **QUIET).self_influence(train).provenance
        plain = tracin.TracInCP(task, tracin.Trajectory([at]), weighting="uniform", **QUIET)
        without = plain.influence(train, test).values
        for share in (0.1, 1.0, 10.0):
            options = {"damping": share * default["mean_eigenvalue"], **QUIET}
            exact, close = (
                tracin.InfluenceFunctions(task, at, solver=solver, **options).influence(train, test).values
                for solver in ("exact", "ekfac")
            )
            lines.append(
                f"| {name} | {share:g} | {pearson(close, exact):.3f} | {pearson(without, exact):.3f} |"
            )
    return lines


def picture(rise: Tensor, found: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(found), 4.0))
    axes = figure.subplots(1, len(found))
    for axis, (label, values) in zip(axes, found.items(), strict=True):
        axis.scatter(values.reshape(-1), rise.reshape(-1), s=3, alpha=0.25, linewidths=0, rasterized=True)
        axis.set_title(f"{label}\nPearson {pearson(values, rise):.3f}", fontsize=10)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("score / n" if "Influence" in label else "score")
        if "Influence" in label:
            ends = [float(rise.min()), float(rise.max())]
            axis.plot(ends, ends, color="0.4", linewidth=0.8)
    axes[0].set_ylabel("rise of the test row's loss, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(rows: Rows) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    train = rows.part(0, TRAIN)
    theta, norm = newton(*train, torch.full((TRAIN,), 1 / TRAIN, dtype=torch.float64))
    chosen = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(1))[:LEFT_OUT].sort().values
    start = time.perf_counter()
    rise, worst = retrained(rows, theta, chosen)
    spent = time.perf_counter() - start
    setting = (
        f"{TRAIN:,} train rows, {LEFT_OUT} of them left out one at a time, {TEST} test rows, λ = damping = {L2:g}, float64. "
        f"Gradient norm at the optimum {norm:.0e}, after retraining at most {worst:.0e}. Retraining took {spent:.1f} s."
    )
    lines = [
        setting,
        "",
        "| method | Pearson | Spearman | Pearson per test row, median | slope | seconds |",
        "|---|---|---|---|---|---|",
    ]
    shown = {}
    for label, (values, seconds) in estimates(rows, theta).items():
        part = values[chosen] / (TRAIN if "Influence" in label else 1)
        per_row = torch.tensor([pearson(part[:, at], rise[:, at]) for at in range(TEST)]).median()
        slope = float((part * rise).sum() / part.square().sum())
        lines.append(
            f"| {label} | {pearson(part, rise):.4f} | {spearman(part, rise):.4f} | {float(per_row):.4f} | "
            f"{f'{slope:.3f}' if 'Influence' in label else '–'} | {seconds:.2f} |"
        )
        if label.endswith(("exact", "ekfac", "10 checkpoints")):
            shown[label] = part
    return lines, rise, shown


INTRODUCTION = """# Leave one out

Does a score say what happens? Logistic regression with L2 on scikit-learn's digits is trained to convergence, then trained
again without a row, a hundred times. The rise of each test row's loss is held against its score with the row that was left
out: `python benchmarks/leave_one_out.py --write-docs`.

The model minimises the mean loss plus λ/2 ‖θ‖², and the damping of influence functions is λ, so `exact` is the first-order
term of the very quantity that is measured: its score / n should lie on the diagonal (slope 1). TracInCP reads ten checkpoints
of an SGD run on the same objective; its scale is another, so it has no slope.
"""

LAYERS = """
## EKFAC where there are layers

Logistic regression is one layer. With more, EKFAC leaves out what lies between layers and takes inputs and slopes of a layer
for independent. Pearson correlation with `exact` at the same damping, over all 1,000 × 50 scores of networks trained for ten
epochs; `0.1` is the default damping:
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/leave-one-out.md")
    arguments = parser.parse_args()
    rows = digits()
    lines, rise, shown = report(rows)
    layers = layers_table(rows)
    print("\n".join([*lines, "", *layers]))
    if arguments.write_docs:
        folder = ROOT / "docs" / "results"
        picture(rise, shown, folder / "leave-one-out.png")
        image = ["", "![Measured rise of the loss against scores](leave-one-out.png)"]
        page = [INTRODUCTION, *lines, *image, LAYERS, *layers, ""]
        (folder / "leave-one-out.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
