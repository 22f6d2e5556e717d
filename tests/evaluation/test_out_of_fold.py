"""Rows are judged by models that did not see them, and what is no probability or fold is refused."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evaluation.flipped import ROWS, C, auroc
from tracin import evaluation
from tracin.errors import (
    DataError,
    MissingExtraError,
    OptionError,
    UserCodeError,
)
from tracin.evaluation.out_of_fold import stratified_folds


def centres(rows: Tensor) -> Tensor:
    """A classifier by the nearest mean, of these rows alone."""
    means = torch.stack([ROWS[0][rows][ROWS[1][rows] == label].mean(0) for label in range(C)])
    return (-torch.cdist(ROWS[0], means).square()).softmax(1)


def test_out_of_fold_rows_were_not_trained_on() -> None:
    seen = []

    def fit(rows: Tensor) -> Tensor:
        seen.append(rows)
        one_hot = torch.zeros(len(ROWS[1]), C)
        one_hot[torch.arange(len(ROWS[1])), ROWS[1]] = 1.0
        one_hot[rows] = 1.0 / C
        return one_hot

    found = evaluation.out_of_fold(ROWS[1], fit, folds=4, seed=1)
    assert torch.equal(found.argmax(1), ROWS[1])
    assert torch.equal(found.amax(1), torch.ones(160, dtype=torch.float64)), "a row was trained on"
    assert len(seen) == 4
    held_out = torch.cat([torch.tensor(sorted(set(range(160)) - set(rows.tolist()))) for rows in seen])
    assert held_out.sort().values.tolist() == list(range(160))


@given(
    counts=st.lists(st.integers(2, 15), min_size=2, max_size=5),
    folds=st.integers(2, 4),
    seed=st.integers(0, 10**6),
)
def test_folds_are_even_for_every_class_and_in_all(counts: list[int], folds: int, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    assigned = stratified_folds(labels, folds=folds, seed=seed)
    assert torch.equal(assigned, stratified_folds(labels, folds=folds, seed=seed))
    for some in [labels >= 0, *(labels == label for label in range(len(counts)))]:
        sizes = torch.bincount(assigned[some], minlength=folds)
        assert int(sizes.max() - sizes.min()) <= 1


def test_folds_of_another_seed_differ_and_the_global_state_stays() -> None:
    state = torch.get_rng_state()
    labels = torch.arange(60) % 3
    assert not torch.equal(stratified_folds(labels, seed=0), stratified_folds(labels, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_self_confidence_is_one_minus_the_probability_of_the_label() -> None:
    pytest.importorskip("cleanlab")
    probabilities = evaluation.out_of_fold(ROWS[1], centres, folds=5, seed=3)
    found = evaluation.self_confidence(ROWS[1], probabilities)
    assert torch.allclose(found, 1 - probabilities.gather(1, ROWS[1][:, None])[:, 0], atol=1e-12)
    assert torch.equal(evaluation.self_confidence(ROWS[1], fit=centres, folds=5, seed=3), found)
    assert auroc(found) > 0.95


def test_self_confidence_without_cleanlab_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tracin\[eval\]'"):
        evaluation.self_confidence(ROWS[1], fit=centres)


def test_probabilities_and_folds_that_cannot_be() -> None:
    pytest.importorskip("cleanlab")
    labels, good = torch.tensor([0, 1, 0, 1]), torch.full((4, 2), 0.5)
    for arguments in ({}, {"probabilities": good, "fit": lambda rows: good}):
        with pytest.raises(OptionError, match="one of the two"):
            evaluation.self_confidence(labels, **arguments)
    for shape in ((4,), (3, 2), (4, 1)):
        with pytest.raises(DataError, match=r"probabilities must be \[n, C\] for 4 rows and 2 classes"):
            evaluation.self_confidence(labels, torch.full(shape, 0.5))
    for bad in ([0.6, 0.6], [-0.5, 1.5], [float("nan"), 0.5]):
        broken = good.clone()
        broken[2] = torch.tensor(bad)
        with pytest.raises(DataError, match=r"row 2 is .* no probabilities that add up to 1"):
            evaluation.self_confidence(labels, broken)
    with pytest.raises(DataError, match="row 1 has the label -1"):
        evaluation.self_confidence(torch.tensor([0, -1, 0, 1]), good)
    with pytest.raises(DataError, match="every row has the label 1"):
        evaluation.self_confidence(torch.ones(4, dtype=torch.int64), good)
    with pytest.raises(DataError, match="class 2 has one row"):
        evaluation.out_of_fold(torch.tensor([0, 0, 1, 1, 2]), centres)
    for folds in (1, 5):
        with pytest.raises(OptionError, match="a whole number from 2 to 4"):
            evaluation.out_of_fold(labels, lambda rows: good, folds=folds)
    for folds in (2.5, "2", None):
        with pytest.raises(OptionError, match="give a whole number from 2 to 4"):
            inspect.unwrap(stratified_folds)(labels, folds=folds)
    widths = iter((2, 3))
    with pytest.raises(DataError, match=r"fit returned \[4, 3\] for fold 1 and \[4, 2\] before"):
        evaluation.out_of_fold(labels, lambda rows: torch.full((4, w := next(widths)), 1 / w), folds=2)
    with pytest.raises(DataError, match="what fit returned for fold 0 must be numbers"):
        evaluation.out_of_fold(labels, lambda rows: np.array([["a", "b"]] * 4), folds=2)
    with pytest.raises(UserCodeError, match="fit raised ZeroDivisionError"):
        evaluation.out_of_fold(labels, lambda rows: 1 / 0, folds=2)
