"""The vote of the nearest neighbours is its definition, in features that are read once and stay the same."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tracin
from evaluation.flipped import ROWS, TASK, TRAJECTORY, C
from tracin import evaluation
from tracin.errors import (
    DataError,
    LossError,
    NotFiniteError,
    OptionError,
)
from tracin.scoring.head import layer_rows


@given(seed=st.integers(0, 10**6), k=st.integers(1, 11), ties=st.booleans())
def test_neighbours_by_the_definition_one_row_at_a_time(seed: int, k: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw: Any = torch.randint(-1, 2, (12, 2), generator=generator) if ties else None
    features = draw.double() if ties else torch.randn(12, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (12,), generator=generator)
    found = evaluation.neighbour_disagreement(features, labels, k=k)
    for row in range(12):
        cosines = {}
        for other in range(12):
            norms = float(features[row].norm() * features[other].norm())
            cosine = float(features[row] @ features[other]) / norms if norms else 0.0
            if other != row:
                cosines[other] = round(cosine, 9)
        last = sorted(cosines.values(), reverse=True)[k - 1]
        nearer = [other for other, cosine in cosines.items() if cosine > last]
        tied = [other for other, cosine in cosines.items() if cosine == last]
        wrong = [float(labels[other] != labels[row]) for other in nearer]
        shared = [float(labels[other] != labels[row]) for other in tied]
        expected = (sum(wrong) + (k - len(nearer)) * sum(shared) / len(tied)) / k
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)
    order = torch.randperm(12, generator=generator)
    mixed = evaluation.neighbour_disagreement(features[order], labels[order], k=k)
    assert torch.allclose(mixed, found[order], atol=1e-9)


def test_neighbours_do_not_depend_on_the_tile_or_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % 3
    whole = evaluation.neighbour_disagreement(features, labels, k=7)
    scales = torch.logspace(-200, 200, 40, dtype=torch.float64)[:, None]
    assert torch.equal(evaluation.neighbour_disagreement(features * scales, labels, k=7), whole)
    monkeypatch.setattr(sys.modules["tracin.evaluation.neighbours"], "_TILE_BYTES", 8 * 40 * 3)
    assert torch.equal(evaluation.neighbour_disagreement(features, labels, k=7), whole)


def test_neighbours_that_cannot_be() -> None:
    features, labels = torch.randn(6, 2), torch.arange(6) % 2
    for k in (0, 6, -1):
        with pytest.raises(
            OptionError, match=f"k is {k}: give a whole number from 1 to 5, neighbours among 6 rows"
        ):
            evaluation.neighbour_disagreement(features, labels, k=k)
    # Whatever Python passes, without the annotations that the tests check.
    raw = inspect.unwrap(evaluation.neighbour_disagreement)
    for k in (2.5, "3", None, True):
        with pytest.raises(OptionError, match="give a whole number from 1 to 5"):
            raw(features, labels, k=k)
    assert torch.equal(raw(features, labels, k=np.int64(3)), raw(features, labels, k=3))
    with pytest.raises(DataError, match=r"features must be \[n, d\] and labels \[n\]"):
        evaluation.neighbour_disagreement(features, labels[:5])
    features[4, 1] = float("inf")
    with pytest.raises(
        NotFiniteError, match="the features of row 4 are not finite: look at this row's input"
    ):
        evaluation.neighbour_disagreement(features, labels, k=2)
    silent = tracin.Task(TASK.model, lambda model, batch: model(batch[0]).sum(1))
    with pytest.raises(OptionError, match="neighbour_suspicion needs the logits and labels"):
        evaluation.neighbour_suspicion(silent, TRAJECTORY[0], ROWS)


def test_features_are_the_inputs_of_the_module_named() -> None:
    last = TRAJECTORY[-1]
    TASK.model.load_state_dict(dict(last.load()))
    hidden = TASK.model[:-1](ROWS[0]).detach()
    found = layer_rows(TASK, last, ROWS, batch_size=33, device="cpu")
    assert torch.allclose(found.features, hidden, atol=1e-6)
    assert found.labels is not None
    assert torch.equal(found.labels, ROWS[1])
    assert torch.equal(layer_rows(TASK, last, ROWS, layer="0", device="cpu").features, ROWS[0])
    loader = DataLoader(TensorDataset(*ROWS), batch_size=50)
    batched = layer_rows(TASK, last, loader, layer="2", device="cpu")
    assert torch.allclose(batched.features, hidden, atol=1e-6)
    given = evaluation.neighbour_suspicion(TASK, last, ROWS, layer="0", k=3, device="cpu")
    assert torch.equal(given, evaluation.neighbour_disagreement(*ROWS, k=3))
    with pytest.raises(OptionError, match=r"there is no module 'fc'\. The last ones are .*2"):
        layer_rows(TASK, last, ROWS, layer="fc")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(2 * x)

    model = Twice()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    with pytest.raises(LossError, match=r"'layer' saw .* Name a module that is called once"):
        layer_rows(task, tracin.Checkpoint(model.state_dict()), ROWS)


def counted() -> tuple[tracin.Task, tracin.Checkpoint, list[int]]:
    """A task that notes how many rows each forward pass had; the model itself is given back as it was."""
    model, sizes = nn.Linear(6, C), []

    def outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(batch[0]))
        return model(batch[0]), batch[1]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(*outputs(model, batch), reduction="none")

    return tracin.Task(model, loss, outputs=outputs), tracin.Checkpoint(model.state_dict()), sizes


def test_features_and_labels_come_from_one_pass() -> None:
    task, checkpoint, sizes = counted()
    evaluation.neighbour_suspicion(task, checkpoint, ROWS, k=3, batch_size=50)
    assert sizes == [50, 50, 50, 10]


def test_features_that_do_not_fit_are_refused_before_they_are_all_read() -> None:
    task, checkpoint, sizes = counted()
    whole = 2 * 160 * 6 * 4
    layer_rows(task, checkpoint, ROWS, memory=whole, batch_size=40)
    sizes.clear()
    with pytest.raises(OptionError, match=r"the features of 160 train rows take .* and memory= allows"):
        evaluation.neighbour_suspicion(task, checkpoint, ROWS, memory=whole // 2 - 1, batch_size=40)
    assert sizes == [40, 40]


class Augmented(Dataset):
    """Every reading of a row is another one."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(ROWS[1])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return ROWS[0][row] + 0.01 * self.reads, ROWS[1][row]


def test_rows_that_change_have_no_neighbours() -> None:
    with pytest.raises(DataError, match=r"train: row 0 came back different.*augmentation"):
        evaluation.neighbour_suspicion(TASK, TRAJECTORY[0], Augmented(), device="cpu")

    def longest_first(rows: list) -> Any:
        rows = sorted(rows, key=lambda row: -float(row[0].abs().sum()))
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    with pytest.raises(DataError, match="does not keep the rows of a batch in their order"):
        layer_rows(TASK, TRAJECTORY[0], TensorDataset(*ROWS), collate=longest_first, device="cpu")
