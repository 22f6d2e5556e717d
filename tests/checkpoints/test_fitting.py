"""A checkpoint fits the model, or the first thing that differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tracin import Checkpoint
from tracin.checkpoints import fit
from tracin.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


class Outer(nn.Module):
    """A model whose only attribute is called module: no wrapper at all."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)


def other(model: nn.Module) -> dict[str, Tensor]:
    """Another state of the same model."""
    return {name: value + 1 for name, value in model.state_dict().items()}


def test_all_keys_in_the_models_order_and_the_model_untouched() -> None:
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = fit(Checkpoint(other(model)), model)
    assert list(fitted) == list(model.state_dict())
    assert all(torch.equal(value, before[name] + 1) for name, value in fitted.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(fitted)


@pytest.mark.parametrize("absent", ["embedding.weight", "head.weight"])
def test_a_tied_parameter_may_stand_under_one_name(tmp_path: Path, absent: str) -> None:
    model = Tied()
    state = other(model)
    del state[absent]
    save_file(state, tmp_path / "a.safetensors")
    fitted = fit(Checkpoint(tmp_path / "a.safetensors"), model)
    assert fitted["embedding.weight"] is fitted["head.weight"]
    assert torch.equal(fitted[absent], model.embedding.weight + 1)


@pytest.mark.parametrize("changed", ["embedding.weight", "head.weight"])
def test_tied_names_with_different_values_are_refused(changed: str) -> None:
    model = Tied()
    state = other(model)
    state[changed] = state[changed] + 1
    with pytest.raises(CheckpointError, match=r"step 3: 'head\.weight' has other values.*ties"):
        fit(Checkpoint(state, step=3), model)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()), Outer])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_make_no_difference(make: Callable[[], nn.Module], prefix: str) -> None:
    plain = make()
    state = {prefix + name: value for name, value in other(plain).items()}
    models: list[nn.Module] = [plain, nn.DataParallel(plain), torch.compile(plain, backend="eager")]
    for model in models:
        fitted = fit(Checkpoint(state), model)
        assert list(fitted) == list(model.state_dict())
        for value, expected in zip(fitted.values(), other(plain).values(), strict=True):
            assert torch.equal(value, expected)


def changed(name: str, value: Tensor | None) -> dict[str, Tensor]:
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    return {
        **{key: old for key, old in state.items() if key != name},
        **({} if value is None else {name: value}),
    }


MISFITS = {
    "missing": (changed("0.bias", None), r"'0\.bias' is missing from the checkpoint\."),
    "missing buffer": (changed("1.running_var", None), r"'1\.running_var' is missing"),
    "unexpected": (
        changed("2.weight", torch.ones(1)),
        r"'2\.weight' is in the checkpoint and not in the model",
    ),
    "renamed": (
        {
            ("first" + name[1:] if name[0] == "0" else name): value
            for name, value in changed("", None).items()
            if name
        },
        r"'0\.weight' is missing from the checkpoint, which has 'first\.weight' that the model lacks",
    ),
    "shape": (
        changed("0.weight", torch.ones(3, 4)),
        r"'0\.weight' is \[3, 4\] in the checkpoint and \[3, 2\] in",
    ),
    "more axes": (changed("0.bias", torch.ones(1, 3)), r"'0\.bias' is \[1, 3\]"),
    "nothing": ({}, r"'0\.weight' is missing"),
    "nan": (
        changed("0.bias", torch.tensor([0.0, torch.nan, 0.0])),
        r"parameter '0\.bias' has a NaN or an infinity",
    ),
    "infinity": (
        changed("0.bias", torch.tensor([0.0, 0.0, torch.inf])),
        r"'0\.bias' has a NaN or an infinity",
    ),
    "double": (
        changed("0.bias", torch.ones(3).double()),
        r"'0\.bias' is torch\.float64.*torch\.float32.*without loss",
    ),
    "whole numbers": (changed("0.bias", torch.ones(3).long()), r"'0\.bias' is torch\.int64"),
    "float counter": (
        changed("1.num_batches_tracked", torch.tensor(3.0)),
        r"'1\.num_batches_tracked' is torch\.float32",
    ),
    "complex": (changed("0.bias", torch.ones(3) + 0j), r"'0\.bias' is torch\.complex64"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named_with_the_checkpoint(case: str) -> None:
    state, message = MISFITS[case]
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(CheckpointError, match=rf"^checkpoint at step 9.*{message}"):
        fit(Checkpoint({name: value for name, value in state.items() if name}, step=9), model)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.float16),
        (torch.float8_e8m0fnu, torch.bfloat16),
    ],
)
def test_a_dtype_that_the_models_holds_is_converted(source: torch.dtype, target: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(target)
    state = {name: value.abs().to(source) for name, value in model.state_dict().items()}  # some have no sign
    fitted = fit(Checkpoint(state), model)
    assert all(value.dtype == target for value in fitted.values())
    for name, value in fitted.items():
        assert torch.equal(value.to(source).double(), state[name].double()), f"{name} comes back as it was"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float8_e8m0fnu, torch.float16),
    ],
)
def test_a_dtype_that_loses_is_refused(source: torch.dtype, target: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(target)
    state = {name: value.to(source) for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"'weight' is {source}.*{target}.*model\.to\({source}\)"):
        fit(Checkpoint(state), model)


def test_packed_values_are_refused() -> None:
    state = {"weight": torch.empty(1, 2, dtype=torch.float4_e2m1fn_x2), "bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"'weight' is torch\.float4_e2m1fn_x2.*without loss"):
        fit(Checkpoint(state), nn.Linear(2, 1))


def test_a_nan_in_eight_bits_is_named() -> None:
    state = {"weight": torch.full((1, 2), float("nan")).to(torch.float8_e4m3fn), "bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="'weight' has a NaN"):
        fit(Checkpoint(state), nn.Linear(2, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.uint32])
def test_smaller_counters_are_converted(dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(2)
    state = {**model.state_dict(), "num_batches_tracked": torch.tensor(3).to(dtype)}
    counter = fit(Checkpoint(state), model)["num_batches_tracked"]
    assert (counter.dtype, counter.item()) == (torch.int64, 3)


@pytest.mark.parametrize("dtype", [torch.uint64, torch.float32])
def test_other_counters_are_refused(dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(2)
    state = {**model.state_dict(), "num_batches_tracked": torch.tensor(3).to(dtype)}
    with pytest.raises(CheckpointError, match=r"num_batches_tracked.*without loss"):
        fit(Checkpoint(state), model)


def test_an_infinite_buffer_is_no_diverged_parameter() -> None:
    model = Tied()
    assert fit(Checkpoint(model.state_dict()), model)["mask"][1] == -torch.inf


def test_a_sum_that_overflows_is_no_diverged_parameter() -> None:
    weight = torch.full((1, 4), 3e38)
    assert torch.equal(fit(Checkpoint({"weight": weight}), nn.Linear(4, 1, bias=False))["weight"], weight)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    weight = torch.tensor([[torch.inf, -torch.inf]])
    with pytest.raises(CheckpointError, match="has a NaN or an infinity"):
        fit(Checkpoint({"weight": weight}), nn.Linear(2, 1, bias=False))


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_extra_state_is_no_tensor_and_no_misfit() -> None:
    model = WithExtraState(2, 2)
    assert sorted(fit(Checkpoint(model.state_dict()), model)) == ["bias", "weight"]
