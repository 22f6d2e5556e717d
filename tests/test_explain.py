"""Explaining a prediction: each target against a task whose query loss is written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import oracle
import tracin
from tracin.errors import AdaptiveOptimizerWarning, DataError, LossError, OptionError, UserCodeError
from tracin.explain import Attribution, Target, explain, lesson_of
from tracin.scoring.evaluation import evaluate

RATES = (0.3, {"0.weight": 0.1, "0.bias": 0.2, "2.weight": 0.05, "2.bias": 0.4}, 0.02)


def build(seed: int = 0, out: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, out)).double()


def rows(n: int, seed: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


def method(
    loss: Callable = tracin.losses.cross_entropy, *, out: int = 3, task: dict | None = None, **options: Any
) -> tracin.TracInCP:
    checkpoints = [
        tracin.Checkpoint(build(seed + 1, out).state_dict(), learning_rate=rate, step=10 * seed)
        for seed, rate in enumerate(RATES)
    ]
    settings = {"batch_size": 4, "progress": False, "device": "cpu", **options}
    return tracin.TracInCP(
        tracin.Task(build(0, out), loss, **(task or {})), tracin.Trajectory(checkpoints), **settings
    )


TRAIN, TEST = rows(13, 1), rows(7, 3)


def predictions(traced: tracin.TracInCP) -> list[int]:
    return evaluate(traced.task, traced.trajectory[-1:], TEST).predicted().tolist()


def at_class(number: int) -> Callable:
    return lambda model, batch: F.cross_entropy(
        model(batch[0]), torch.full_like(batch[1], number), reduction="none"
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-12 * wanted.abs().max())


def test_the_label_is_the_tasks_own_loss():
    traced = method()
    scores = traced.influence(TRAIN, TEST).values
    for found in explain(traced, TRAIN, TEST, [5, 0, 6], target="label"):
        assert found.target == Target("label", int(TEST[1][found.query]))
        assert close(found.scores, scores[found.query])


def test_a_query_loss_is_what_the_label_explains():
    traced = method(task={"query_loss": lambda model, batch: model(batch[0]).square().sum(1)})
    scores = traced.influence(TRAIN, TEST).values
    (found,) = explain(traced, TRAIN, TEST, [4], target="label")
    assert close(found.scores, scores[4])
    assert close(found.losses, evaluate(traced.task, traced.trajectory, TEST).losses[:, 4])


@pytest.mark.parametrize("target", [2, "2", "dog"])
def test_a_class_by_number_and_by_name(target):
    scores = method(task={"query_loss": at_class(2)}).influence(TRAIN, TEST).values
    found = explain(method(), TRAIN, TEST, [3, 1], target=target, class_names=["cat", "cow", "dog"])
    assert [(each.query, each.target) for each in found] == [(3, Target("class", 2)), (1, Target("class", 2))]
    assert all(close(each.scores, scores[each.query]) for each in found)


def test_a_name_comes_before_a_number():
    (found,) = explain(method(), TRAIN, TEST, [3], target="0", class_names=["1", "2", "0"])
    assert found.target.number == 2


def test_a_wrong_prediction_is_explained_from_both_sides():
    traced = method()
    said = predictions(traced)
    wrong = [row for row in range(7) if said[row] != int(TEST[1][row])]
    right = [row for row in range(7) if row not in wrong]
    assert wrong
    assert right, "this test needs a right and a wrong prediction"
    found = explain(traced, TRAIN, TEST, [wrong[0], right[0]])
    kinds = [(each.query, each.target.kind, each.target.number) for each in found]
    assert kinds == [
        (wrong[0], "predicted", said[wrong[0]]),
        (wrong[0], "label", int(TEST[1][wrong[0]])),
        (right[0], "predicted", said[right[0]]),
    ]
    for each in found:
        assert each.target.number is not None
        scores = method(task={"query_loss": at_class(each.target.number)}).influence(TRAIN, TEST).values
        assert close(each.scores, scores[each.query])
        assert (each.label, each.predicted) == (int(TEST[1][each.query]), said[each.query])


def test_losses_and_contributions_belong_to_their_checkpoints():
    traced = method()
    (found,) = explain(traced, TRAIN, TEST, [2], target=1)
    assert found.contributions.shape == (3, 13)
    for index, checkpoint in enumerate(traced.trajectory):
        alone = tracin.TracInCP(
            tracin.Task(build(), traced.task.loss, query_loss=at_class(1)),
            tracin.Trajectory([checkpoint]),
            progress=False,
            device="cpu",
        )
        assert close(found.contributions[index], alone.influence(TRAIN, TEST).values[2])
        model = build()
        model.load_state_dict(checkpoint.load())
        assert torch.isclose(found.losses[index], at_class(1)(model, TEST)[2])


def test_the_lists_are_those_of_top_k():
    traced = method()
    lists = traced.top_k(TRAIN, TEST, k=5)
    (found,) = explain(traced, TRAIN, TEST, [6], target="label")
    mine = found.top_k(5)
    assert torch.equal(mine.proponents.ids[0], lists.proponents.ids[6])
    assert torch.equal(mine.opponents.ids[0], lists.opponents.ids[6])
    assert mine.query_ids.tolist() == [6]
    assert mine.provenance["target"] == {"kind": "label", "number": int(TEST[1][6])}
    assert mine.provenance["checkpoints"] == traced.trajectory.describe()


def test_ties_go_to_the_lower_row():
    scores = torch.tensor([[1.0, 2.0, 2.0, -1.0, -1.0, 1.0]])
    found = Attribution(0, Target("label"), torch.zeros(1), scores, None, None, {})
    assert found.top_k(3).proponents.ids.tolist() == [[1, 2, 0]]
    assert found.top_k(3).opponents.ids.tolist() == [[3, 4, 0]]
    for k in (0, 7):
        with pytest.raises(OptionError, match="1 to 6"):
            found.top_k(k)


def test_normalize_adds_up_too():
    options = {"normalize": True, "weighting": "uniform"}
    scores = method(**options).influence(TRAIN, TEST).values
    (found,) = explain(method(**options), TRAIN, TEST, [2], target="label")
    assert close(found.scores, scores[2])


class Pairs(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[1])

    def __getitem__(self, row):
        return {"inputs": self.data[0][row], "labels": self.data[1][row]}


@pytest.mark.parametrize("kind", ["dict", "dataset", "loader"])
def test_every_kind_of_data(kind):
    make = {
        "dict": lambda data: {"inputs": data[0], "labels": data[1]},
        "dataset": Pairs,
        "loader": lambda data: DataLoader(Pairs(data), batch_size=3),
    }[kind]
    wanted = explain(method(), TRAIN, TEST, [6, 1], target=0)
    found = explain(method(), make(TRAIN), make(TEST), [6, 1], target=0)
    for mine, reference in zip(found, wanted, strict=True):
        assert close(mine.scores, reference.scores)


def test_two_classes_from_one_logit():
    train, test = rows(13, 1, classes=2), rows(7, 2, classes=2)
    traced = method(tracin.losses.binary_cross_entropy, out=1)
    own = explain(traced, train, test, [0], target="label")
    named = explain(traced, train, test, [0], target=int(test[1][0]))
    assert close(named[0].scores, own[0].scores)


def test_a_regression_explains_its_loss():
    train, test = (TRAIN[0], TRAIN[0][:, 0]), (TEST[0], TEST[0][:, 0])
    traced = method(tracin.losses.mean_squared_error, out=1)
    (found,) = explain(traced, train, test, [3])
    assert found.target == Target("label", None)
    assert found.label is None
    assert close(found.scores, traced.influence(train, test).values[3])
    for target in ("predicted", "1"):
        with pytest.raises(OptionError, match="outputs="):
            explain(traced, train, test, [3], target=target)


@pytest.mark.parametrize(
    ("asked", "options", "fact"),
    [
        ([7], {}, "query 7 does not exist: the 7 rows count from 0 to 6"),
        ([-1], {}, "query -1"),
        ([], {}, "at least one"),
        ([0], {"target": "horse"}, "'horse' is no class.*0 to 2"),
        ([0], {"target": "horse", "class_names": ["cat", "cow", "dog"]}, "cat, cow, dog"),
        ([0], {"target": 3}, "3 is no class"),
        ([0], {"target": "-1"}, "is no class"),
    ],
)
def test_what_does_not_exist(asked, options, fact):
    traced = method()
    with oracle.untouched(traced.task.model), pytest.raises(OptionError, match=fact):
        explain(traced, TRAIN, TEST, asked, **options)


def test_the_model_comes_back_as_it_was():
    traced = method()
    with oracle.untouched(traced.task.model):
        explain(traced, TRAIN, TEST, list(range(7)))


def test_a_dataset_that_fails_names_the_row():
    class Broken(Pairs):
        def __getitem__(self, row):
            if row == 5:
                raise ValueError("torn page")
            return super().__getitem__(row)

    with pytest.raises(UserCodeError, match=r"row 5.*torn page"):
        explain(method(), TRAIN, Broken(TEST), [5])


def test_train_rows_that_change_between_checkpoints_are_refused():
    class Restless(Pairs):
        def __getitem__(self, row):
            return {"inputs": torch.randn(4, dtype=torch.float64), "labels": self.data[1][row]}

    with pytest.raises(DataError, match="row 0"):
        explain(method(), Restless(TRAIN), TEST_DICT, [0])


TEST_DICT = {"inputs": TEST[0], "labels": TEST[1]}


def test_outputs_without_a_gradient_are_named():
    def outputs(model, batch):
        with torch.no_grad():
            return model(batch[0]), batch[1]

    traced = method(task={"outputs": outputs})
    with oracle.untouched(traced.task.model), pytest.raises(LossError, match=r"outputs=.*no gradient"):
        explain(traced, TRAIN, TEST, [0], target=1)
    (found,) = explain(traced, TRAIN, TEST, [0], target="label")
    assert close(found.scores, method().influence(TRAIN, TEST).values[0])


def test_an_adaptive_optimizer_is_told_once():
    checkpoint = tracin.Checkpoint(build().state_dict(), learning_rate=0.1, optimizer="Adam")
    with pytest.warns(AdaptiveOptimizerWarning) as told:
        traced = tracin.TracInCP(
            tracin.Task(build(), tracin.losses.cross_entropy),
            tracin.Trajectory([checkpoint]),
            progress=False,
            device="cpu",
        )
    assert len(told) == 1
    explain(traced, TRAIN, TEST, [0], target=1)  # a second warning would be an error here


def test_losses_of_all_rows_keep_the_last_predictions():
    traced = method()
    whole = evaluate(traced.task, traced.trajectory, TRAIN, name="train")
    found = lesson_of(traced, TRAIN)
    assert close(found.losses, whole.losses)
    assert found.predicted is not None
    assert torch.equal(found.predicted, whole.predicted())
    assert found.labels is not None
    assert torch.equal(found.labels, TRAIN[1])
