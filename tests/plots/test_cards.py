"""From results to cards: the right rows, names, signs and contributions."""

from __future__ import annotations

import pytest
import torch

from tracin.errors import DataError, OptionError
from tracin.plots import Card, Explanation, Gallery, LossPath
from tracin.results import Ranking, Scores, TopK

TRAIN = Gallery(
    lambda row: f"text {row}",
    labels=[0, 1, 1, 0],
    class_names=["cat", "dog"],
    true_labels=torch.tensor([0, 1, 0, 0]),
)
TEST = Gallery(
    lambda row: f"query {row}",
    labels=[1, 0, 1],
    class_names=["cat", "dog"],
    predicted=torch.tensor([1, 1, 0]),
)
TOP = TopK(
    proponents=Ranking(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[2.0, 0.5], [3.0, 1.0]])),
    opponents=Ranking(torch.tensor([[1, 3], [0, 2]]), torch.tensor([[-1.0, 0.25], [-4.0, -0.5]])),
    query_ids=torch.tensor([2, 1]),
)


def test_a_query_is_found_by_its_row_and_not_by_its_place():
    explanation = Explanation.from_top_k(TOP, 1, train=TRAIN, queries=TEST)
    assert [(card.row, card.score, card.label) for card in explanation.proponents] == [
        (1, 3.0, "dog"),
        (3, 1.0, "cat"),
    ]
    assert [(card.row, card.score) for card in explanation.opponents] == [(0, -4.0), (2, -0.5)]
    query = explanation.query
    assert (query.shown, query.row, query.label, query.predicted, query.correct) == (
        "query 1",
        1,
        "cat",
        "dog",
        False,
    )
    assert Explanation.from_top_k(TOP, 2, train=TRAIN, queries=TEST, count=1).proponents[0].planted is True


def test_a_query_that_was_not_scored_is_named():
    with pytest.raises(OptionError, match="row 7 is not among the 2 rows"):
        Explanation.from_top_k(TOP, 7, train=TRAIN, queries=TEST)


def test_planted_is_known_only_where_the_true_label_is():
    assert [TRAIN.card(row).planted for row in range(4)] == [False, False, True, False]
    assert TEST.card(0).planted is None


def test_numbers_are_neither_right_nor_wrong_and_classes_are():
    regression = Gallery(str, labels=torch.tensor([151.0, 75.26]), predicted=torch.tensor([160.125, 75.0]))
    card = regression.card(1)
    assert (card.label, card.predicted, card.correct) == ("75.26", "75", None)
    assert TEST.card(0).correct is True
    unnamed = Gallery(str, labels=torch.tensor([3]), predicted=torch.tensor([5]))
    assert (unnamed.card(0).label, unnamed.card(0).correct) == ("3", False)


def test_a_class_without_a_name_is_its_number():
    gallery = Gallery(str, labels=[0, 2, -1], class_names=["cat", "dog"])
    assert [gallery.card(row).label for row in range(3)] == ["cat", "2", "-1"]


def test_a_row_outside_the_labels_is_refused():
    with pytest.raises(OptionError, match="row 4 is outside the labels, which have 4 rows"):
        TRAIN.card(4)


def scores(values: list[list[float]]) -> Scores:
    return Scores(torch.tensor(values), train_ids=torch.tensor([10, 11, 12]), query_ids=torch.tensor([4, 9]))


def test_a_path_holds_the_contributions_of_each_checkpoint():
    per_checkpoint = [
        scores([[9.0, 9.0, 9.0], [1.0, -2.0, 0.5]]),
        scores([[9.0, 9.0, 9.0], [0.0, -1.0, 4.0]]),
    ]
    path = LossPath.from_scores(per_checkpoint, torch.tensor([2.0, 1.0]), query=9, steps=[5, 20])
    assert path.lowered.tolist() == [1.5, 4.0]
    assert path.raised.tolist() == [-2.0, -1.0]
    assert path.of(12).tolist() == [0.5, 4.0]
    assert path.steps == (5, 20)
    with pytest.raises(OptionError, match="row 2 is not among"):
        path.of(2)


def test_a_path_of_unequal_lengths_is_refused():
    with pytest.raises(DataError, match="1 steps and 3 training rows"):
        LossPath((1,), torch.zeros(2), torch.zeros(2, 3), torch.arange(3))
    with pytest.raises(DataError, match="at least one checkpoint"):
        LossPath((), torch.zeros(0), torch.zeros(0, 3), torch.arange(3))
    with pytest.raises(DataError, match="at least one checkpoint"):
        LossPath.from_scores([], torch.zeros(0), query=0, steps=[])


def test_a_card_takes_any_array():
    assert Card(torch.rand(3, 8, 9)).shown.shape == (8, 9, 3)
