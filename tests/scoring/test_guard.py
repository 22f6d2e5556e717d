"""The user's model comes back bit-identical: after success, after an error, after Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from tracin.checkpoints import Checkpoint
from tracin.errors import CheckpointError, ModelError, OptionError
from tracin.scoring.guard import device_of, guarded


class Net(nn.Module):
    """Buffers of both kinds, a tied weight, dropout, modes that differ, and state of a used model."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, max_norm=0.5)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.out = nn.Linear(4, 6, bias=False)
        self.extra = nn.Linear(4, 6, bias=False)
        self.extra.weight = self.out.weight
        self.register_buffer("cache", torch.arange(3.0), persistent=False)
        self.register_buffer("none", None)
        self.calls = 0

    def forward(self, index: Tensor) -> Tensor:
        self.calls += 1
        self.last = index
        self.cache.add_(1)
        return self.out(self.body(self.words(index))) + self.extra(self.words(index))


def used() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    model.train()
    model.body[1].eval()
    model.body[0].bias.requires_grad_(False)
    model.out.weight.grad = torch.ones_like(model.out.weight)
    model.body.register_forward_hook(lambda *_: None)
    model.out.weight.register_hook(lambda grad: grad)
    return model


def values(model: nn.Module) -> dict[str, Any]:
    """What may change beside what the oracle watches: plain attributes and the tables of every module."""
    return {
        "calls": model.calls,
        "last": getattr(model, "last", None),
        "tables": {
            name: {key: list(table) for key, table in vars(module).items() if isinstance(table, dict)}
            for name, module in model.named_modules()
        },
    }


def harm(model: Net) -> None:
    """What a forward pass, a user's code or the scoring itself might do to a model."""
    model(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    model.train()
    model.out.weight.requires_grad_(False)
    model.body[0].bias.requires_grad_(True)
    model.out.weight.grad = None
    model.body[0].weight.grad = torch.zeros(4, 4)
    model.out.register_forward_hook(lambda *_: None)
    model.out.register_forward_pre_hook(lambda *_: None)
    model.body.append(nn.ReLU())
    model.words.weight = nn.Parameter(torch.zeros(6, 4))
    model.left_behind = torch.zeros(3)
    del model.calls
    torch.rand(3)
    numpy.random.rand(3)  # noqa: NPY002


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_every_harm_is_undone(error: type[BaseException] | None) -> None:
    model = used()
    before = values(model)
    hooks = dict(model.out.weight._backward_hooks)
    ending = nullcontext() if error is None else pytest.raises(error)
    with oracle.untouched(model), ending, guarded(model, "cpu"):
        harm(model)
        if error is not None:
            raise error
    assert values(model) == before
    assert dict(model.out.weight._backward_hooks) == hooks
    assert len(model.body) == 3


def test_the_harm_is_seen_without_the_guard() -> None:
    model = used()
    with pytest.raises(AssertionError) as caught, torch.random.fork_rng(), oracle.untouched(model):
        harm(model)
    for what in ("tensor words.weight", "tensor cache", "mode of body.1", "requires_grad of out.weight",
                 "grad of out.weight", "hooks of out", "attributes of the model", "torch RNG", "numpy RNG"):  # fmt: skip
        assert what in str(caught.value)


def test_inside_everything_is_in_eval_mode_and_differentiable() -> None:
    model = used()
    with torch.no_grad(), guarded(model, "cpu") as loaded:
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        assert loaded.model is model
        assert loaded.device == torch.device("cpu")
    with torch.inference_mode(), guarded(model, "cpu"):
        assert not torch.is_inference_mode_enabled()
    assert [module.training for module in model.body] == [True, False, True]


def test_what_the_user_holds_is_never_written_to() -> None:
    """Tensors that share memory with the model, such as a checkpoint by reference, keep their bits throughout."""
    model = used()
    views = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    before = {name: tensor.clone() for name, tensor in views.items()}
    with guarded(model, "cpu") as loaded:
        loaded.load(Checkpoint(Net().state_dict()))
        model(torch.tensor([0, 1, 2]))
        harm(model)
        for name, tensor in views.items():
            assert torch.equal(tensor, before[name]), f"{name} was written to while the model was in use"


def test_a_checkpoint_is_loaded_into_the_model_and_stays_itself() -> None:
    model, other = used(), used()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    state = other.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    checkpoint = Checkpoint(state)
    with guarded(model, "cpu") as loaded:
        loaded.load(checkpoint)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        model(torch.tensor([0, 1, 2]))  # max_norm writes into the embedding
        assert not torch.equal(model.words.weight, before["words.weight"])
        loaded.load(checkpoint)
        assert torch.equal(model.words.weight, before["words.weight"]), (
            "the second load brings what the first brought"
        )
    for name, value in state.items():
        assert torch.equal(value, before[name]), f"{name} of the user's mapping was written to"
    for name, value in checkpoint.load().items():
        assert torch.equal(value, before[name]), f"{name} of the checkpoint was written to"


@pytest.mark.parametrize("verb", ["influence", "self_influence", "top_k", "verify", "plan"])
def test_the_users_mapping_through_every_verb(verb: str) -> None:
    model = used()
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    task = tracin.Task(model, lambda m, batch: m(batch[0]).square().sum(1))
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=0.3), tracin.Checkpoint(state, learning_rate=0.1)]
    )
    method = tracin.TracInCP(task, trajectory, batch_size=3, device="cpu", progress=False)
    rows = (torch.tensor([0, 1, 2, 3, 4]),)
    calls: dict[str, Callable[[], Any]] = {
        "influence": lambda: method.influence(rows, rows),
        "self_influence": lambda: method.self_influence(rows),
        "top_k": lambda: method.top_k(rows, rows, k=2),
        "verify": lambda: method.verify(rows),
        "plan": lambda: method.plan(rows, rows),
    }
    with oracle.untouched(model, rows):
        calls[verb]()
    for name, value in state.items():
        assert torch.equal(value, before[name]), f"{verb} wrote into {name} of the user's mapping"


def test_a_checkpoint_that_does_not_fit_leaves_the_model() -> None:
    model = used()
    with (
        oracle.untouched(model),
        pytest.raises(CheckpointError, match=r"words.weight"),
        guarded(model, "cpu") as loaded,
    ):
        loaded.load(Checkpoint({**model.state_dict(), "words.weight": torch.zeros(7, 4)}))


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (
            lambda: nn.BatchNorm1d(3, track_running_stats=False),
            "the model is a BatchNorm1d without running statistics",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(3, track_running_stats=False)),
            "1 is a BatchNorm2d",
        ),
        (lambda: nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True)), "0 has scale_grad_by_freq=True"),
        (lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True), "the model has scale_grad_by_freq=True"),
    ],
)
def test_layers_that_mix_rows_are_named(make: Callable[[], nn.Module], fact: str) -> None:
    model = make()
    with oracle.untouched(model), pytest.raises(ModelError, match=fact), guarded(model, "cpu"):
        raise AssertionError("the block must not run")


def test_devices() -> None:
    model = nn.Linear(2, 3)
    assert device_of(model, "cpu") == torch.device("cpu")
    assert device_of(nn.Flatten(), "cpu") == torch.device("cpu")
    assert device_of(model, "auto").type in {"cpu", "cuda"}
    with pytest.raises(OptionError, match="nowhere"):
        device_of(model, "nowhere")


def test_a_frozen_tensor_that_shares_memory_with_another_module() -> None:
    """Two models over one weight: the other is not disturbed while the first is scored."""
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.weight = nn.Parameter(first.weight.detach())
    before = first.weight.detach().clone()
    with guarded(first, "cpu"), torch.no_grad():
        first.weight.zero_()
        assert torch.equal(second.weight, before)
    assert torch.equal(first.weight, before)
    assert first.weight.data_ptr() == second.weight.data_ptr(), "they share memory again"
