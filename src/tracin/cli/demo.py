"""The demo: plant wrong labels, train, trace, and see whether the scores tell the truth."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tracin.cli import options
from tracin.cli.cards import Rows, known
from tracin.cli.commands import Explained, explained, save_explained, save_report
from tracin.cli.digits import Digits, digits, fit, network, study_of
from tracin.cli.output import Folder
from tracin.cli.printing import heading, percent, say, table
from tracin.cli.records import parameter_records, suspect_records
from tracin.cli.telling import tell_attribution, tell_suspects, tell_verification
from tracin.errors import OptionError
from tracin.evaluation import DetectionCurve
from tracin.explain import Lesson, explain, lesson_of
from tracin.methods import TracInCP
from tracin.plots import detection_curve, picture_sheet, png, trajectory_figure
from tracin.report import Check, Fact, ReportData
from tracin.results import SelfInfluence
from tracin.scoring.evaluation import Evaluation, evaluate
from tracin.scoring.verification import Verification
from tracin.study import Study

__all__ = ["run"]

SHARES = (0.1, 0.2)
SUSPECTS, PRINTED, LISTED = 24, 10, 5


@dataclass(frozen=True, eq=False)
class Traced:
    """What the demo found."""

    data: Digits
    study: Study
    method: TracInCP
    found: Verification
    own: SelfInfluence
    lesson: Lesson
    accuracy: float
    curves: dict[str, DetectionCurve]
    ready: list[Explained]


def run(command: options.Demo) -> int:
    """Run the demo.

    Args:
        command: The options.

    Returns:
        0, or 1 where the scores differ from autograd's.

    Raises:
        OptionError: No epoch.
    """
    if command.epochs < 1:
        raise OptionError(f"--epochs is {command.epochs}: give at least 1; each leaves a checkpoint.")
    folder = Folder(command.out, command.format, figures=True)
    start = time.perf_counter()
    with _one_thread():
        data, study = _train(command)
        traced = _trace(command, data, study)
        _save(folder, traced)
    folder.tell()
    say(
        f"Open {command.out / 'report.html'} in a browser. The demo took {time.perf_counter() - start:.1f} s."
    )
    return 0 if traced.found.exact else 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network is so small that threads only wait for each other, and long where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(command: options.Demo) -> tuple[Digits, Study]:
    data = digits(command.seed)
    planted = int(data.planted.sum())
    say(
        f"Handwritten digits: {len(data.true_labels):,} training rows, {planted} of them with a label made wrong on "
        f"purpose, and {len(data.test[1])} test rows."
    )
    model = network(command.seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tracin-demo-") as folder:
        trajectory = fit(
            model, data.train, Path(folder), seed=command.seed, epochs=command.epochs, show=not command.quiet
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"Trained a CNN of {parameters:,} parameters in {time.perf_counter() - start:.1f} s, by SGD with a decaying "
        f"rate; kept {len(trajectory)} checkpoints."
    )
    return data, study_of(data, model, trajectory)


def _trace(command: options.Demo, data: Digits, study: Study) -> Traced:
    method = TracInCP(study.task, study.trajectory, progress=not command.quiet)
    tests = evaluate(study.task, study.trajectory[-1:], study.test)
    accuracy = float((tests.predicted() == data.test[1]).double().mean())
    say(f"{percent(accuracy)} of the test rows are predicted right.")

    heading("Are the scores exact?")
    found = method.verify(study.train, seed=command.seed)
    tell_verification(found, parameter_records(found))

    own = method.self_influence(study.train)
    lesson = lesson_of(method, study.train)
    tell_suspects(study, suspect_records(study, own, lesson, data.planted), PRINTED)
    curves = {
        "self-influence": DetectionCurve(own.values, data.planted),
        "mean loss": DetectionCurve(lesson.losses.mean(0), data.planted),
    }
    heading("How many of the planted wrong labels are found?")
    table([_detected(name, curve) for name, curve in curves.items()])
    say(
        "Mean loss over the same checkpoints is the baseline: no gradients, and no telling which rows taught what."
    )

    attributions = explain(method, study.train, study.test, _three(tests, data.test[1]))
    ready = explained(method, study, attributions, LISTED, data.true_labels)
    before = None
    for each in ready:
        tell_attribution(study, each.attribution, each.shown, first=each.attribution.query != before)
        before = each.attribution.query
    return Traced(data, study, method, found, own, lesson, accuracy, curves, ready)


def _detected(name: str, curve: DetectionCurve) -> dict[str, str]:
    cells = {
        f"in the first {percent(share)}": f"{curve.count_at(share)} of {curve.planted_rows} "
        f"({percent(curve.found_at(share))})"
        for share in SHARES
    }
    return {"ranked by": name, **cells, "AUROC": f"{curve.auroc:.3f}"}


def _three(tests: Evaluation, labels: Tensor) -> list[int]:
    """Test rows worth a look: the surest wrong prediction, the least sure right one, and the first right one."""
    assert tests.logits is not None
    sure = tests.logits[-1].softmax(-1).amax(-1)
    right = tests.predicted() == labels
    unsure_first = sure.masked_fill(~right, 2.0).argsort(stable=True).tolist()
    wrong_first = sure.masked_fill(right, -1.0).argsort(descending=True, stable=True).tolist()
    firsts = [row for row in range(len(labels)) if right[row]]
    rows = [wrong_first[0], unsure_first[0], *firsts, *wrong_first]
    return list(dict.fromkeys(rows))[:3]


def _save(folder: Folder, traced: Traced) -> None:
    study, records = (
        traced.study,
        suspect_records(traced.study, traced.own, traced.lesson, traced.data.planted),
    )
    folder.table("suspects", records)
    folder.table("parameters", parameter_records(traced.found))
    save_explained(folder, traced.method, study, traced.ready)
    traced.own.save(folder.path("self_influence.safetensors"))
    first = traced.ready[0].shown
    figures = {
        "detection": detection_curve(traced.curves, shares=SHARES),
        "explanation": picture_sheet(first),
        "trajectory": trajectory_figure(first),
    }
    for name, figure in figures.items():
        with folder.file(f"{name}.png") as path:
            path.write_bytes(png(figure))
    rows = Rows(
        study,
        "train",
        known(range(len(records)), traced.lesson.labels, traced.lesson.predicted),
        traced.data.true_labels,
    )
    cards = tuple(rows.card(record["train"], record["self_influence"]) for record in records[:SUSPECTS])
    save_report(folder, _report(traced, cards))


def _report(traced: Traced, cards: tuple) -> ReportData:
    data, found = traced.data, traced.found
    return ReportData(
        title="Handwritten digits, traced",
        summary=(
            f"{int(data.planted.sum())} of {len(data.true_labels):,} training labels were made wrong on purpose. A "
            f"small CNN was trained on them, {len(traced.study.trajectory)} checkpoints were kept, and every number "
            "below was computed from these."
        ),
        facts=(Fact("Test rows right", percent(traced.accuracy), f"of {len(data.test[1])}"),),
        check=Check(
            coverage=found.coverage.fraction,
            max_relative_error=found.max_relative_error,
            table=tuple(
                {name: row[name] for name in ("parameter", "shape", "entries", "route", "error")}
                for row in parameter_records(found)
            ),
        ),
        suspects=cards,
        curves=traced.curves,
        shares=SHARES,
        explanations=tuple(each.shown for each in traced.ready),
        provenance=dict(traced.own.provenance),
    )
