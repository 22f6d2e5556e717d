"""The shapes in annotations are checked while the tests run."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from tracin.gradients.blocks import Outer
from tracin.gradients.products import dot


def test_a_wrong_number_of_axes_is_caught() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        Outer(torch.ones(2, 3), torch.ones(2, 1, 4))


def test_axes_of_one_name_have_one_length() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        Outer(torch.ones(2, 1, 3), torch.ones(3, 1, 4))
    block = Outer(torch.ones(2, 1, 3), torch.ones(2, 1, 4))
    assert dot(block, block).shape == (2, 2)
