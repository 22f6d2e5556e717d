"""The simple scores are their formulas, put wrong labels first, and refuse what they cannot read."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
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
from tracin import evaluation
from tracin.errors import (
    DataError,
    LossError,
    MissingExtraError,
    NotFiniteError,
    OptionError,
    UserCodeError,
)
from tracin.evaluation.out_of_fold import stratified_folds
from tracin.scoring.evaluation import Evaluation, evaluate
from tracin.scoring.head import layer_rows

C = 4


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


# ---------------------------------------------------------------- a trained model with planted flips


def trained() -> tuple[tracin.Task, tracin.Trajectory, tuple[Tensor, Tensor], Tensor]:
    """Classes that overlap a little, a tenth of the labels flipped, five checkpoints at two rates."""
    generator = torch.Generator().manual_seed(2)
    true = torch.arange(160) % C
    x = 2.2 * F.one_hot(true, 6).float() + 0.7 * torch.randn(160, 6, generator=generator)
    flips = evaluation.plant_flips(true, 0.1, seed=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    checkpoints = []
    for rate in (0.2, 0.2, 0.2, 0.07, 0.07):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(3):
            for some in torch.randperm(160, generator=generator).split(30):
                optimizer.zero_grad()
                F.cross_entropy(model(x[some]), flips.labels[some]).backward()
                optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        checkpoints.append(tracin.Checkpoint(state, learning_rate=rate))
    task = tracin.Task(model, tracin.losses.cross_entropy)
    return task, tracin.Trajectory(checkpoints), (x, flips.labels), flips.mask


TASK, TRAJECTORY, ROWS, MASK = trained()


def auroc(scores: Tensor) -> float:
    return evaluation.DetectionCurve(scores, MASK).auroc


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


# ---------------------------------------------------------------- neighbours


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


# ---------------------------------------------------------------- out of fold


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
