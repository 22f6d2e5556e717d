"""The simple scores are their formulas, put wrong labels first, and refuse what they cannot read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from evaluation.flipped import ROWS, TASK, TRAJECTORY, C, auroc
from tracin import evaluation
from tracin.errors import (
    DataError,
    NotFiniteError,
    OptionError,
)
from tracin.scoring.evaluation import Evaluation, evaluate


def drawn(seed: int, c: int = 5, n: int = 13) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(c, n, C, generator=generator)
    labels = torch.randint(0, C, (n,), generator=generator)
    losses = torch.stack([F.cross_entropy(part, labels, reduction="none") for part in logits])
    return Evaluation(losses, logits, labels)


@given(seed=st.integers(0, 10**6), c=st.integers(1, 7))
def test_each_score_is_its_formula(seed: int, c: int) -> None:
    found = drawn(seed, c)
    assert found.logits is not None
    assert found.labels is not None
    for row in range(13):
        label = int(found.labels[row])
        margins, right = [], []
        for at in range(c):
            logits = found.logits[at, row].double().tolist()
            margins.append(max(u for k, u in enumerate(logits) if k != label) - logits[label])
            right.append(max(range(C), key=lambda k, logits=logits: logits[k]) == label)
        forgotten = sum(a and not b for a, b in pairwise(right))
        expected = {
            evaluation.mean_loss: sum(found.losses[:, row].double().tolist()) / c,
            evaluation.last_loss: float(found.losses[-1, row]),
            evaluation.margin: margins[-1],
            evaluation.area_under_margin: sum(margins) / c,
            evaluation.forgetting: forgotten if any(right) else c,
        }
        for score, value in expected.items():
            assert float(score(found)[row]) == pytest.approx(value, abs=1e-12), score.__name__


def test_tensors_do_as_well_as_an_evaluation_and_nothing_is_written_to() -> None:
    found = drawn(0)
    assert found.logits is not None
    assert found.labels is not None
    before = found.losses.clone(), found.logits.clone(), found.labels.clone()
    for score in (evaluation.mean_loss, evaluation.last_loss):
        assert torch.equal(score(found), score(found.losses))
        assert score(found).dtype == torch.float64
    for score in (evaluation.margin, evaluation.area_under_margin, evaluation.forgetting):
        assert torch.equal(score(found), score(found.logits, found.labels))
        assert score(found).dtype == torch.float64
    after = found.losses, found.logits, found.labels
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_rows_that_are_never_learnt_come_before_those_that_are_forgotten_most() -> None:
    flipping = torch.tensor([[2.0, 1.0], [1.0, 2.0]] * 3)
    logits = torch.stack([flipping, torch.tensor([[1.0, 2.0]] * 6), torch.tensor([[2.0, 1.0]] * 6)], 1)
    assert evaluation.forgetting(logits, torch.zeros(3, dtype=torch.int64)).tolist() == [3, 6, 0]


def test_what_cannot_be_scored_is_refused() -> None:
    found = drawn(0)
    assert found.logits is not None
    labels = found.labels
    with pytest.raises(OptionError, match="margins and forgetting need logits"):
        evaluation.margin(Evaluation(found.losses, None, None))
    with pytest.raises(OptionError, match="give labels"):
        evaluation.area_under_margin(found.logits)
    with pytest.raises(DataError, match=r"losses must be \[c, n\].*losses\[None\]"):
        evaluation.mean_loss(torch.zeros(3))
    for logits in (found.logits[0], found.logits[:, :5], found.logits[:, :, :1], found.logits[:0]):
        with pytest.raises(DataError, match=r"logits must be \[c, n, C\]"):
            evaluation.forgetting(logits, labels)
    wrong = torch.full((13,), C)
    with pytest.raises(DataError, match="row 0 has the label 4, and there are 4 logits"):
        evaluation.margin(found.logits, wrong)
    broken = found.logits.clone()
    broken[2, 7, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="the logits of row 7 at checkpoint 2"):
        evaluation.margin(broken, labels)
    losses = found.losses.clone()
    losses[1, 3] = float("inf")
    with pytest.raises(NotFiniteError, match="the loss of row 3 at checkpoint 1"):
        evaluation.last_loss(losses)


def test_wrong_labels_come_first() -> None:
    found = evaluate(TASK, TRAJECTORY, ROWS, name="train", device="cpu")
    last = TRAJECTORY[-1]
    scores = {
        "loss": evaluation.mean_loss(found),
        "last": evaluation.last_loss(found),
        "margin": evaluation.margin(found),
        "aum": evaluation.area_under_margin(found),
        "norm": evaluation.gradient_norm(TASK, last, ROWS, device="cpu", progress=False),
        "neighbours": evaluation.neighbour_suspicion(TASK, last, ROWS, k=10, device="cpu"),
    }
    assert {name: auroc(score) for name, score in scores.items() if auroc(score) < 0.9} == {}
    assert auroc(evaluation.forgetting(found)) > 0.8
    assert auroc(-scores["aum"]) < 0.1


def test_the_gradient_norm_is_that_of_autograd() -> None:
    found = evaluation.gradient_norm(TASK, TRAJECTORY[1], ROWS, batch_size=7, device="cpu", progress=False)
    TASK.model.load_state_dict(dict(TRAJECTORY[1].load()))
    for row in (0, 71, 159):
        loss = F.cross_entropy(TASK.model(ROWS[0][row : row + 1]), ROWS[1][row : row + 1])
        gradients = torch.autograd.grad(loss, list(TASK.model.parameters()))
        norm = torch.cat([gradient.reshape(-1) for gradient in gradients]).double().norm()
        assert float(found[row]) == pytest.approx(float(norm), rel=1e-5)
