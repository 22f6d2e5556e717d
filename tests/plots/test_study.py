"""The study's figures: nothing overlaps, every method is named, the numbers are those of the study."""

from __future__ import annotations

import pytest
import torch

from plots.drawn import collisions, texts
from tracin.errors import DataError
from tracin.evaluation.mislabelled import METHODS, Design, StudyResult
from tracin.evaluation.mislabelled.measure import Measured
from tracin.evaluation.mislabelled.result import RANDOM_ORDER, Cell, Found, Repaired, found_of
from tracin.plots import png, repair_figure, study_figure, svg

FIGURES = pytest.mark.parametrize("draw", [study_figure, repair_figure])


def study(methods=tuple(METHODS), flips=("random",), schedules=("constant", "cosine"), seeds=2, missing=()):
    """A study with made-up scores: the better the earlier a method is named."""
    plan = Design(
        data="fashion-mnist",
        methods=methods,
        flips=flips,
        schedules=schedules,
        seeds=seeds,
        repair=(0.1, 0.2),
    )
    cells = []
    for key in plan.cells:
        generator = torch.Generator().manual_seed(key.seed)
        planted = torch.rand(400, generator=generator) < 0.1
        found = {
            name: found_of(
                torch.rand(400, generator=generator) + planted * (1.0 - 0.05 * at), planted, Measured(1.0)
            )
            for at, name in enumerate(methods)
        }
        found |= {name: Found(not_run="pip install it") for name in missing}
        repaired = [
            Repaired(order, share, 10, 0.8 + 0.1 * share + 0.01 * key.seed - 0.005 * at)
            for at, order in enumerate([RANDOM_ORDER, *methods])
            for share in plan.repair
        ]
        cells.append(
            Cell(
                flips=key.flips,
                schedule=key.schedule,
                seed=key.seed,
                basis={},
                weights="",
                rows=400,
                planted=int(planted.sum()),
                accuracy=0.8,
                train_seconds=1.0,
                checkpoints=[],
                found=found,
                clean_accuracy=0.9,
                repaired=repaired,
            )
        )
    return StudyResult(plan, {}, cells)


@FIGURES
@pytest.mark.parametrize(
    "made",
    [
        {},
        {"schedules": ("cosine",)},
        {"flips": ("random", "hardest")},
        {"schedules": ("constant", "step", "cosine", "onecycle"), "flips": ("random", "hardest")},
        {"methods": ("loss",), "schedules": ("step",), "seeds": 1},
        {"missing": ("loss",)},
    ],
    ids=["two schedules", "one panel", "both flips", "everything", "one line", "one not run"],
)
def test_nothing_overlaps(draw, made):
    assert collisions(draw(study(**made))) == []


def test_every_method_is_named_with_its_numbers():
    result = study()
    told = texts(study_figure(result))
    assert [name for name in METHODS if name not in told] == []
    assert "Planted flips found: fashion-mnist, cnn" in told
    planted = result.cells[0].planted
    assert (
        f"{planted} of 400 training rows carry a planted label. Mean of 2 seeds; bands: ± one standard deviation."
        in told
    )
    assert {"random flips, constant schedule", "random flips, cosine schedule"} <= set(told)
    for row in result.table():
        assert f"{row['auroc']:.3f}" in told
        assert f"{100 * row['found_at_10']:.0f} %" in told
    assert {"perfect order", "random order"} <= set(told)


def test_the_best_of_a_column_is_bold():
    figure = study_figure(study(methods=("tracin", "loss"), schedules=("step",)))
    rows = study(methods=("tracin", "loss"), schedules=("step",)).table()
    bold = [text.get_text() for text in figure.texts if text.get_fontweight() == "bold"]
    best, other = (f"{row['auroc']:.3f}" for row in sorted(rows, key=lambda row: -row["auroc"]))
    assert best in bold
    assert other not in bold


def test_lines_are_the_means_and_bands_the_spread():
    result = study(methods=("tracin", "loss"), schedules=("step",))
    (axes,) = study_figure(result).axes
    lines = [line.get_ydata() for line in axes.get_lines()]
    means = [
        sum(pair) / 2 for pair in zip(*(cell.found["tracin"].curve for cell in result.cells), strict=True)
    ]
    assert any(len(line) == len(means) and max(abs(line - means)) < 1e-12 for line in lines)
    assert len(axes.collections) == 2, "a band for the first of each family"


def test_repair_says_where_it_starts_and_ends():
    told = texts(repair_figure(study(methods=("tracin", "loss"))))
    assert {"tracin", "loss", "random order", "all labels true", "90.0 %", "at 10 %", "at 20 %"} <= set(told)


def test_the_line_of_true_labels_is_the_mean_of_what_is_known():
    def drawn(*known):
        result = study(methods=("loss",), schedules=("step",))
        for cell, clean in zip(result.cells, known, strict=True):
            cell.clean_accuracy = clean
        figure = repair_figure(result)
        return texts(figure), figure.axes[0].get_ylim()[0]

    told, low = drawn(None, 0.93)
    assert {"all labels true", "93.0 %"} <= set(told)
    assert low > 0.7
    told, low = drawn(None, None)
    assert "all labels true" not in told
    assert "loss" in told
    assert low > 0.7


def test_a_method_that_did_not_run_is_named_below():
    assert "Not run: loss" in texts(study_figure(study(missing=("loss",))))


@FIGURES
def test_either_theme_and_the_same_bytes_every_time(draw):
    result = study(methods=("tracin", "loss"))
    assert png(draw(result)) == png(draw(result))
    assert svg(draw(result)) == svg(draw(result))
    assert png(draw(result, theme="dark")) != png(draw(result))


def test_nothing_to_draw():
    with pytest.raises(DataError, match="no method"):
        study_figure(study(methods=("loss",), missing=("loss",)))
    result = study(methods=("loss",))
    bare = StudyResult(
        result.design, {}, [Cell.from_json({**c.to_json(), "repaired": []}) for c in result.cells]
    )
    with pytest.raises(DataError, match="repair="):
        repair_figure(bare)
