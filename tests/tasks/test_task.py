"""What is traced: the task's arguments, its globs, and the contract of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracin
from tracin.errors import LossError, ModelError, NotFiniteError, OptionError, UserCodeError
from tracin.tasks import Task
from tracin.tasks.task import row_losses


class Net(nn.Module):
    """A tied weight and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.out = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.out.weight = self.words.weight
        self.body.bias.requires_grad_(False)


def select(parameters: Any, model: nn.Module | None = None) -> tuple[list[str], list[str], list[str]]:
    chosen = Task(model or Net(), tracin.losses.cross_entropy, parameters=parameters).select()
    return sorted(chosen.traced), sorted(chosen.frozen), sorted(chosen.excluded)


@pytest.mark.parametrize(
    ("parameters", "traced", "excluded"),
    [
        ("*", ["body.weight", "out.bias", "words.weight"], []),
        ("body.*", ["body.weight"], ["out.bias", "words.weight"]),
        (["body.*", "*.bias"], ["body.weight", "out.bias"], ["words.weight"]),
        (("words.weight",), ["words.weight"], ["body.weight", "out.bias"]),
        ("out.weight", ["words.weight"], ["body.weight", "out.bias"]),  # the other name of the tied weight
        ("out.*", ["out.bias", "words.weight"], ["body.weight"]),
        ("?ody.[w]eight", ["body.weight"], ["out.bias", "words.weight"]),
    ],
)
def test_globs(parameters: Any, traced: list[str], excluded: list[str]) -> None:
    assert select(parameters) == (traced, ["body.bias"], excluded)


def test_tied_parameters_stand_once_under_their_first_name() -> None:
    selection = Task(Net(), tracin.losses.cross_entropy).select()
    assert selection.aliases["words.weight"] == ("words.weight", "out.weight")
    assert selection.aliases["out.bias"] == ("out.bias",)


@pytest.mark.parametrize("glob", ["nothing", ["*", "head.*"], "Body.*", ""])
def test_a_glob_that_matches_nothing(glob: Any) -> None:
    missing = glob if isinstance(glob, str) else glob[-1]
    with pytest.raises(
        OptionError, match=rf"glob '{missing.replace('*', '.')}.?' matches nothing.*words.weight"
    ):
        select(glob)


def test_nothing_to_trace() -> None:
    with pytest.raises(ModelError, match="requires_grad_"):
        select("body.bias")
    with pytest.raises(ModelError, match="requires_grad_"):
        select("*", Net().requires_grad_(False))
    with pytest.raises(ModelError, match="Flatten has no parameters"):
        select("*", nn.Flatten())


def test_outputs_come_with_a_ready_made_loss() -> None:
    model = nn.Linear(2, 3)
    assert Task(model, tracin.losses.cross_entropy).outputs is tracin.losses.cross_entropy.outputs  # type: ignore[attr-defined]
    assert Task(model, tracin.losses.mean_squared_error).outputs is None
    assert Task(model, lambda m, b: m(b)).outputs is None

    def own(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), batch[1]

    assert Task(model, tracin.losses.cross_entropy, outputs=own).outputs is own


def test_a_module_for_a_loss_is_explained() -> None:
    with pytest.raises(OptionError, match=r"CrossEntropyLoss.*reduction='none'"):
        Task(nn.Linear(2, 3), nn.CrossEntropyLoss(reduction="none"))


def test_frozen() -> None:
    task = Task(nn.Linear(2, 3), tracin.losses.cross_entropy)
    with pytest.raises(AttributeError):
        task.parameters = "weight"  # type: ignore[misc]
    assert task.globs == ("*",)


MODEL = nn.Linear(2, 1)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def given(losses: Any) -> Tensor:
    """``row_losses`` of a loss that returns this, or a function of the model's output [4]."""
    result = losses(MODEL(X)[:, 0]) if callable(losses) else losses
    return row_losses(lambda model, batch: result, MODEL, X, [3, 4, 5, 6], "train, checkpoint at step 7")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "one number": (lambda out: out.mean(), LossError, "reduction='none'"),
    "a number of Python": (0.5, LossError, "a float: it must return a Tensor"),
    "a list": (list, LossError, "a list"),
    "nothing": (None, LossError, "NoneType"),
    "one per token": (lambda out: out[:, None].expand(4, 3), LossError, r"\[4, 3\].*\[n\] = \[4\]"),
    "a column": (lambda out: out[:, None], LossError, r"\[4, 1\]"),
    "too few": (lambda out: out[:3], LossError, "3 numbers for a batch of 4 rows .*step 7"),
    "too many": (lambda out: torch.cat([out, out]), LossError, "8 numbers for a batch of 4"),
    "whole numbers": (torch.arange(4), LossError, "torch.int64"),
    "detached": (lambda out: out.detach(), LossError, "cut off"),
    "nan": (
        lambda out: out * torch.tensor([1.0, 1.0, float("nan"), 1.0]),
        NotFiniteError,
        "row 5 is nan .*step 7",
    ),
    "infinite": (lambda out: out / torch.tensor([1.0, 0.0, 1.0, 0.0]), NotFiniteError, "row 4 is -?inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_breaks_the_contract(name: str) -> None:
    losses, error, message = BAD[name]
    with pytest.raises(error, match=message):
        given(losses)


def test_a_loss_that_keeps_it() -> None:
    found = given(lambda out: out.square())
    assert found.shape == (4,)
    assert found.requires_grad


def test_the_users_exception_names_rows_and_checkpoint() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ZeroDivisionError("by zero")

    with pytest.raises(
        UserCodeError, match="ZeroDivisionError on rows 3-6 at train, checkpoint at step 7: by zero"
    ) as e:
        row_losses(loss, MODEL, X, [3, 4, 5, 6], "train, checkpoint at step 7")
    assert isinstance(e.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, LossError])
def test_ctrl_c_and_our_own_errors_pass_through(error: type[BaseException]) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise error("stop")

    with pytest.raises(error, match=r"^stop$"):
        row_losses(loss, MODEL, X, [0, 1, 2, 3], "train")


def test_the_callers_no_grad_is_lifted() -> None:
    with torch.no_grad():
        found = row_losses(lambda model, batch: model(batch)[:, 0], MODEL, X, [0, 1, 2, 3], "train")
    assert found.requires_grad
