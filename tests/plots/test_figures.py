"""The figures: what they say, that nothing overlaps, and that they leave matplotlib as they found it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plots.drawn import STEPS, card, collisions, curve, explanation, path, texts
from tracin.errors import DataError, MissingExtraError, OptionError
from tracin.plots import (
    Card,
    Explanation,
    LossPath,
    detection_curve,
    picture_sheet,
    png,
    suspect_sheet,
    trajectory_figure,
)
from tracin.plots.theme import DARK, LIGHT, theme_named

DRAWN = {
    "picture_sheet": lambda theme="light": picture_sheet(explanation(), theme=theme),
    "suspect_sheet": lambda theme="light": suspect_sheet([card(1, 3.0), card(2, 1.0)], theme=theme),
    "detection_curve": lambda theme="light": detection_curve(curve(), theme=theme),
    "trajectory_figure": lambda theme="light": trajectory_figure(explanation(), theme=theme),
}
every_figure = pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=60)


@every_figure
def test_a_figure_is_drawn_in_either_theme_and_the_settings_stay(draw):
    before = dict(matplotlib.rcParams)
    light, dark = png(draw("light")), png(draw("dark"))
    assert light.startswith(b"\x89PNG")
    assert light != dark
    assert light == png(draw("light")), "the same data gives the same file"
    assert dict(matplotlib.rcParams) == before


@every_figure
def test_the_callers_settings_do_not_show(draw):
    plain = png(draw())
    with matplotlib.rc_context(
        {"axes.grid": True, "font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}
    ):
        assert png(draw()) == plain


@every_figure
def test_without_matplotlib_the_error_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tracin\[plot\]'"):
        draw()


def test_an_unknown_theme_is_refused():
    with pytest.raises(OptionError, match="'light' or 'dark', got 'sepia'"):
        theme_named("sepia")


def fresh(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_no_figure_loads_pyplot_and_importing_loads_no_matplotlib():
    loaded = "; print('matplotlib.pyplot' in sys.modules)"
    draw = (
        "from plots.drawn import *; from tracin.plots import *; import sys;"
        "picture_sheet(explanation()); suspect_sheet([card(1, 2.0)]); detection_curve(curve());"
        "png(trajectory_figure(explanation()))"
    )
    assert fresh(draw + loaded) == "False"
    assert fresh("import sys, matplotlib.pyplot" + loaded) == "True", "the check can fail"
    assert fresh("import sys, tracin.plots; print('matplotlib' in sys.modules)") == "False"


@settings(max_examples=25)
@given(
    kind=st.sampled_from(["picture", "text", "table"]),
    figure=st.sampled_from(["sheet", "suspects", "wide", "narrow", "curve"]),
    label=words,
    predicted=words,
    shown=words,
    row=st.integers(0, 10**9),
    score=st.floats(-1e9, 1e9),
)
def test_no_text_overlaps_another_or_leaves_the_sheet(kind, figure, label, predicted, shown, row, score):
    face = {"picture": np.eye(4), "text": shown, "table": {shown: label, "b": predicted}}[kind]
    side = tuple(Card(face, row=row + n, score=score, label=label, true_label=predicted) for n in range(3))
    query = Card(face, row=row, label=label, predicted=predicted, correct=False)
    contributions = torch.full((4, 3), score).double()
    along = LossPath(STEPS, torch.linspace(3, 0, 4), contributions, row + torch.arange(3))
    whole = Explanation(query, side, side[:2], target=shown, path=along)
    curves = {label + "1": curve(1), predicted + "2": curve(2)}
    draw = {
        "sheet": lambda: picture_sheet(whole, title=shown),
        "suspects": lambda: suspect_sheet(side, title=shown),
        "wide": lambda: trajectory_figure(whole),
        "narrow": lambda: trajectory_figure(whole, narrow=True),
        "curve": lambda: detection_curve(curves, title=shown, width=3.0),
    }
    assert collisions(draw[figure]()) == []


def test_the_overlap_check_sees_an_overlap():
    figure = picture_sheet(explanation())
    figure.text(0.5, 0.5, "over everything that is here", fontsize=60)
    assert collisions(figure)


@pytest.mark.parametrize(
    "steps", [(7,), (1, 2, 3, 4, 1000), tuple(range(0, 3_000_000, 100_000)), (5, 5, 5), (10**6, 10**6 + 1)]
)
@pytest.mark.parametrize("narrow", [False, True])
def test_any_steps_can_be_read(steps, narrow):
    drawn = trajectory_figure(replace(explanation(), path=path(steps)), narrow=narrow)
    assert collisions(drawn) == []
    assert f"{steps[-1]:,}" in texts(drawn)


def test_a_dollar_sign_is_a_dollar_sign():
    text = r"$\frac{1}{2}$ costs $5 & <b>"
    assert text in texts(picture_sheet(Explanation(Card(text), (Card(text, row=1, score=1.0),), ())))


def test_characters_without_a_glyph_become_boxes_and_warn_nobody():
    sheet = suspect_sheet([Card("a\U000e0041b", label="\ud7ff", score=1.0)])
    assert "a□b" in texts(sheet)


def test_each_score_has_the_colour_of_its_own_sign():
    sheet = picture_sheet(Explanation(Card("q"), (card(1, 2.0), card(2, -0.5)), (card(3, -1.0),)))
    colours = {text.get_text(): text.get_color() for text in sheet.texts}
    assert colours["+2.00"] == colours["Proponents"] == LIGHT.proponent
    assert colours["−0.500"] == colours["−1.00"] == colours["Opponents"] == LIGHT.opponent


def test_a_planted_flip_is_told_with_what_the_label_was():
    told = texts(
        suspect_sheet([card(1, 2.0, true_label="dog"), card(2, 1.0, true_label="cat"), card(3, 0.5)])
    )
    assert told.count("not planted") == 1
    assert "planted, was dog" in told
    assert told.count("label cat") == 3


def test_the_sheet_shows_every_card_and_what_the_model_said():
    told = texts(picture_sheet(explanation(count=7), columns=3, title="Why?"))
    assert {"Why?", "predicted dog", "label cat (wrong)", "test row 17"} <= set(told)
    assert {f"row {row}" for row in [*range(7), *range(10, 17)]} <= set(told)


def test_the_table_of_the_curve_gives_what_is_found():
    one = curve()
    told = texts(detection_curve({"mine": one}, shares=(0.1, 0.25)))
    assert {"mine", "perfect order", "random order", "at 10 %", "at 25 %"} <= set(told)
    assert {f"{100 * one.found_at(0.25):.0f} %", f"{one.auroc:.3f}", "0.500", "1.000"} <= set(told)


def test_the_lines_of_the_curve_are_the_curve_the_perfect_and_the_random_order():
    one = curve()
    lines = [line.get_xydata() for line in detection_curve(one).axes[0].lines]
    expected = [
        np.stack([one.inspected, one.found], 1),
        np.stack([one.inspected, one.perfect], 1),
        np.stack([one.inspected, one.inspected], 1),
    ]
    for points in expected:
        assert any(line.shape == points.shape and np.allclose(line, points) for line in lines)


def test_the_bars_of_the_trajectory_are_the_contributions():
    along = path()
    loss, bars = trajectory_figure(replace(explanation(), path=along)).axes[1:3]
    assert loss.lines[0].get_ydata() == pytest.approx(along.losses.tolist())
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == pytest.approx([*along.lowered.tolist(), *along.raised.tolist()])


def test_what_cannot_be_drawn_is_refused():
    bare = Explanation(Card("q"), (), ())
    with pytest.raises(DataError, match="proponents or opponents"):
        picture_sheet(bare)
    with pytest.raises(DataError, match="at least one card"):
        suspect_sheet([])
    with pytest.raises(DataError, match="at least one curve"):
        detection_curve({})
    with pytest.raises(DataError, match="no path"):
        trajectory_figure(bare)
    with pytest.raises(OptionError, match="columns must be at least 1"):
        picture_sheet(explanation(), columns=0)
    with pytest.raises(OptionError, match="count must be at least 1"):
        trajectory_figure(explanation(), count=0)


def test_a_trajectory_without_cards_shows_the_charts_alone():
    assert collisions(trajectory_figure(Explanation(Card("q"), (), (), path=path()))) == []


def luminance(colour: str) -> np.ndarray:
    return np.array([((c / 255 + 0.055) / 1.055) ** 2.4 for c in bytes.fromhex(colour[1:])])


# Machado, Oliveira and Fernandes 2009, full severity: protanopia, deuteranopia, tritanopia.
BLINDNESS = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_and_the_signs_told_apart(theme):
    def contrast(one: str, other: str) -> float:
        low, high = sorted(float(luminance(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
        return (high + 0.05) / (low + 0.05)

    for colour in (theme.ink, theme.muted, theme.proponent, theme.opponent, *theme.series):
        assert contrast(colour, theme.paper) >= 4.5, colour
    for matrix in [np.eye(3), *map(np.array, BLINDNESS)]:
        apart = np.abs(matrix @ (luminance(theme.proponent) - luminance(theme.opponent))).max()
        assert apart > 0.25
