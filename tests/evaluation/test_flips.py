"""Planted flips: as many as asked, always wrong, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracin.errors import DataError, NotFiniteError, OptionError
from tracin.evaluation.flips import plant_flips, plant_hardest_flips


@given(
    labels=st.lists(st.integers(-3, 4), min_size=4, max_size=60).filter(lambda labels: len(set(labels)) > 1),
    fraction=st.floats(0.2, 0.99),
    seed=st.integers(0, 2**31),
)
def test_exactly_the_masked_labels_change_to_another_class_that_occurs(labels, fraction, seed):
    true = torch.tensor(labels)
    flips = plant_flips(true, fraction, seed=seed)
    assert int(flips.mask.sum()) == round(fraction * len(labels))
    assert torch.equal(flips.labels != true, flips.mask)
    assert set(flips.labels.tolist()) <= set(labels)
    assert true.tolist() == labels


def test_the_same_seed_gives_the_same_flips_and_another_seed_others():
    labels = torch.arange(200) % 10
    first, again, other = (plant_flips(labels, 0.1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)


def test_the_wrong_class_is_drawn_from_all_other_classes_alike():
    flips = plant_flips(torch.zeros(9_000, dtype=torch.int64), 0.9, classes=10, seed=0)
    counts = torch.bincount(flips.labels[flips.mask], minlength=10)
    assert counts[0] == 0
    # 8,100 draws from nine classes: 900 each, with a standard deviation of 28.
    assert counts[1:].min() > 900 - 5 * 28
    assert counts[1:].max() < 900 + 5 * 28


def test_the_global_random_states_stay_as_they_were():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    plant_flips([0, 1] * 10, 0.5)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(OptionError, match="between 0 and 1"):
        plant_flips([0, 1, 2], fraction)


def test_a_fraction_that_flips_no_row_is_refused_with_the_least_that_does():
    with pytest.raises(OptionError, match=r"flips none; take at least 0\.25"):
        plant_flips([0, 1, 0, 1], 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "one class per row"),
        ([[0, 1], [1, 0]], "one class per row"),
        ([0.0, 1.0], "whole numbers"),
        ([True, False], "whole numbers"),
        (["cat", "dog"], "whole numbers"),
        ([2, 2, 2, 2], "every row has the label 2"),
    ],
)
def test_labels_that_cannot_be_flipped_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        plant_flips(np.array(labels) if labels and isinstance(labels[0], str) else torch.tensor(labels), 0.5)


def test_a_label_outside_the_classes_names_its_row():
    with pytest.raises(DataError, match="row 2 has the label 7, outside 0 to 4"):
        plant_flips([0, 1, 7, 3], 0.5, classes=5)


def test_one_class_is_refused():
    with pytest.raises(OptionError, match="at least 2"):
        plant_flips([0, 0, 0], 0.5, classes=1)


@given(
    rows=st.integers(4, 40),
    classes=st.integers(2, 6),
    fraction=st.floats(0.2, 0.99),
    seed=st.integers(0, 2**31),
)
def test_the_hardest_flips_take_the_strongest_wrong_class_on_the_rows_of_the_random_ones(
    rows, classes, fraction, seed
):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, classes, (rows,), generator=generator)
    logits = torch.randint(-3, 4, (rows, classes), generator=generator).float()
    flips = plant_hardest_flips(true, logits, fraction, seed=seed)
    assert torch.equal(flips.mask, plant_flips(true, fraction, classes=classes, seed=seed).mask)
    for row in range(rows):
        label, given_label = int(true[row]), int(flips.labels[row])
        if not flips.mask[row]:
            assert given_label == label
            continue
        wrong = [(-float(logits[row, c]), c) for c in range(classes) if c != label]
        assert given_label == min(wrong)[1]


def test_the_hardest_flips_leave_their_input_and_the_global_random_state():
    labels, logits = torch.tensor([0, 1, 2, 1]), torch.randn(4, 3)
    before, kept, state = labels.clone(), logits.clone(), torch.get_rng_state()
    first, other = (plant_hardest_flips(labels, logits, 0.5, seed=seed) for seed in (0, 0))
    assert torch.equal(first.labels, other.labels)
    assert torch.equal(labels, before)
    assert torch.equal(logits, kept)
    assert torch.equal(state, torch.get_rng_state())
    assert first.labels.dtype == torch.int64


@pytest.mark.parametrize("shape", [(3, 3), (4,), (4, 1), (5, 3)])
def test_logits_of_other_rows_are_refused(shape):
    with pytest.raises(DataError, match=r"4 labels and logits of shape \["):
        plant_hardest_flips([0, 1, 2, 1], torch.zeros(shape), 0.5)


def test_labels_without_a_logit_and_logits_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="row 2 has the label 3, outside 0 to 2"):
        plant_hardest_flips([0, 1, 3, 1], torch.zeros(4, 3), 0.5)
    with pytest.raises(DataError, match=r"numbers \[n, C\]"):
        plant_hardest_flips([0, 1], np.array([["a", "b"], ["c", "d"]]), 0.5)
    broken = torch.zeros(4, 3)
    broken[1, 2] = float("nan")
    with pytest.raises(NotFiniteError, match="row 1 has the logits"):
        plant_hardest_flips([0, 1, 2, 1], broken, 0.5)
    with pytest.raises(OptionError, match="between 0 and 1"):
        plant_hardest_flips([0, 1, 2, 1], torch.zeros(4, 3), 1.0)
