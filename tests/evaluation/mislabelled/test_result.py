"""What a study found: curves, tables, and its JSON."""

from __future__ import annotations

import json

import pytest
import torch

from evaluation.mislabelled.common import design
from tracin.errors import ResultError
from tracin.evaluation.mislabelled import Design, StudyResult, run_study
from tracin.evaluation.mislabelled.measure import Measured
from tracin.evaluation.mislabelled.result import GRID, Cell, Found, found_of


def test_a_curve_is_read_at_the_share_asked_for():
    found = found_of(torch.arange(10.0, 0.0, -1.0), torch.arange(10) % 2 == 1, Measured(1.0))
    assert [found.at(share) for share in (0.1, 0.2, 0.3, 0.4, 1.0)] == [0.0, 0.2, 0.2, 0.4, 1.0]


def test_json_of_a_study(data, tmp_path):
    result = run_study(design(repair=(0.2,), schedules=("step",)), data, tmp_path, device="cpu")
    path = tmp_path / "study.json"
    path.write_text(json.dumps(result.to_json()))
    read = StudyResult.load(path)
    assert read.table() == result.table()
    assert read.repair_table() == result.repair_table()
    assert read.design == result.design
    assert read.made_with["torch"] == torch.__version__
    values = result.to_json()
    for broken, fact in (
        ("[]", "holds a list"),
        ("{", "no JSON"),
        (json.dumps({**values, "study": "else"}), "no study of mislabelled data"),
        (json.dumps({**values, "cells": [{"flips": "random"}]}), "a cell of the study cannot be read"),
        (json.dumps({name: values[name] for name in values if name != "made_with"}), "made_with"),
    ):
        path.write_text(broken)
        with pytest.raises(ResultError, match=fact):
            StudyResult.load(path)
    with pytest.raises(ResultError, match="cannot be read"):
        StudyResult.load(tmp_path / "none.json")


def test_tables_hold_means_and_spreads():
    flags = torch.tensor([True, False, False, False])
    found = [
        found_of(torch.tensor(scores), flags, Measured(1.0)) for scores in ([9.0, 1, 2, 3], [2.5, 1, 2, 3])
    ]
    cells = [
        Cell(
            "random",
            "constant",
            seed,
            {},
            "",
            4,
            1,
            0.5,
            1.0,
            [],
            {"loss": each, "tracin": Found(not_run="no")},
        )
        for seed, each in enumerate(found)
    ]
    plan = Design(data="digits", methods=("loss", "tracin"), seeds=2, schedules=("constant",))
    rows = StudyResult(plan, {}, cells).table()
    assert rows[0]["auroc"] == pytest.approx((1.0 + 2 / 3) / 2)
    assert rows[0]["auroc_sd"] == pytest.approx((1 / 3) / 2**0.5)
    assert rows[0]["seeds"] == 2
    assert (rows[1]["auroc"], rows[1]["not_run"], rows[1]["seeds"]) == (None, "no", 0)
    assert found[0].curve[0] == 0.0
    assert found[0].curve[-1] == 1.0
    assert len(found[0].curve) == len(GRID)
