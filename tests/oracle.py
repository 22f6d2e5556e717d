"""The judge: TracIn by brute force, and what a model must look like after somebody has used it.

score(z, z') = Σ_c Σ_p w_cp ⟨g_cp(z), g_cp(z')⟩, with g by plain autograd, one row at a time, one scalar
product at a time in float64. Slow and obviously correct. Nothing here comes from tracin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, Tensor]  # parameter name -> [n, p]
Rates = Sequence[float | Mapping[str, float]]  # one entry per checkpoint


def row_count(batch: Any) -> int:
    """The length of the first tensor in a tuple, a dict or a tensor."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)


def take(batch: Any, rows: slice) -> Any:
    """A copy of some rows, so that a model that writes into its input harms nobody."""
    if isinstance(batch, Tensor):
        return batch[rows].clone()
    if isinstance(batch, Mapping):
        return {key: take(value, rows) for key, value in batch.items()}
    return tuple(take(value, rows) for value in batch)


def trainable(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that are traced: those that ask for a gradient, or the named ones among them."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found if names is None else {name: found[name] for name in names}


def _flat(loss: Tensor, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    flat = []
    for grad, parameter in zip(grads, parameters.values(), strict=True):
        dense = torch.zeros_like(parameter) if grad is None else grad.to_dense() if grad.is_sparse else grad
        flat.append(dense.detach().reshape(-1).clone())
    return flat


def gradients_alone(
    model: nn.Module, loss: Loss, batch: Any, names: Sequence[str] | None = None
) -> Gradients:
    """g(z) of every row, each from a batch that holds nothing but this row."""
    parameters = trainable(model, names)
    per_row = []
    for index in range(row_count(batch)):
        losses = loss(model, take(batch, slice(index, index + 1)))
        assert losses.shape == (1,), f"the case's loss has shape {tuple(losses.shape)} for one row"
        per_row.append(_flat(losses[0], parameters))
    return {
        name: torch.stack(rows) for name, rows in zip(parameters, zip(*per_row, strict=True), strict=True)
    }


def gradients_in_graph(
    model: nn.Module, loss: Loss, batch: Any, names: Sequence[str] | None = None
) -> Gradients:
    """g(z) of every row, all from the one graph of the whole batch."""
    parameters = trainable(model, names)
    losses = loss(model, take(batch, slice(None)))
    assert losses.shape == (row_count(batch),), f"the case's loss has shape {tuple(losses.shape)}"
    per_row = [_flat(value, parameters) for value in losses]
    return {
        name: torch.stack(rows) for name, rows in zip(parameters, zip(*per_row, strict=True), strict=True)
    }


def trajectory_gradients(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str] | None = None,
    how: Callable[..., Gradients] = gradients_alone,
) -> list[Gradients]:
    """The gradients at every checkpoint, in eval mode. The model is the judge's own: it is not put back."""
    found = []
    for state in states:
        model.load_state_dict(dict(state))
        model.eval()
        found.append(how(model, loss, batch, names))
    return found


def _rate(rate: float | Mapping[str, float], name: str) -> float:
    return rate[name] if isinstance(rate, Mapping) else rate


def scores(train: Sequence[Gradients], queries: Sequence[Gradients], rates: Rates) -> Tensor:
    """[m, n] in float64: entry by entry, checkpoint by checkpoint, parameter by parameter."""
    m, n = (len(next(iter(side[0].values()))) for side in (queries, train))
    result = torch.zeros(m, n, dtype=torch.float64)
    for train_grads, query_grads, rate in zip(train, queries, rates, strict=True):
        for name in train_grads:
            for q in range(m):
                for i in range(n):
                    product = torch.dot(query_grads[name][q].double(), train_grads[name][i].double())
                    result[q, i] += _rate(rate, name) * product
    return result


def _whole(grads: Gradients) -> Tensor:
    return torch.cat([grad.double() for grad in grads.values()], dim=1)


def normalized_scores(train: Sequence[Gradients], queries: Sequence[Gradients], rates: Rates) -> Tensor:
    """[m, n] in float64: Σ_c w_c cos(g_c, g'_c), where a zero gradient gives 0."""
    result: Tensor | float = 0.0
    for train_grads, query_grads, rate in zip(train, queries, rates, strict=True):
        a, b = _whole(query_grads), _whole(train_grads)
        lengths = a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :]
        result = result + rate * torch.where(lengths > 0, (a @ b.T) / lengths.clamp_min(1e-300), 0.0)
    assert isinstance(result, Tensor)
    return result


def self_influence(train: Sequence[Gradients], rates: Rates) -> Tensor:
    """[n] in float64: Σ_c Σ_p w_cp ‖g_cp‖²."""
    result = torch.zeros(len(next(iter(train[0].values()))), dtype=torch.float64)
    for grads, rate in zip(train, rates, strict=True):
        for name, grad in grads.items():
            result += _rate(rate, name) * grad.double().square().sum(dim=1)
    return result


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, what: str = "scores", largest: float | None = None
) -> None:
    """Every entry within ``tolerance`` of the largest expected one, with what is known about the difference."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    largest = expected.abs().max().item() if largest is None else largest
    difference = (actual.double() - expected).abs()
    worst = difference.max().item()
    if worst <= tolerance * largest:
        return
    where = tuple(int(index) for index in torch.nonzero(difference == difference.max())[0])
    factor = (actual.double() * expected).sum().item() / expected.square().sum().clamp_min(1e-300).item()
    rows = int((difference > tolerance * largest).sum())
    raise AssertionError(
        f"{what}: off by {worst / max(largest, 1e-300):.2e} of the largest (allowed {tolerance:.0e}), "
        f"worst at {where}: {actual[where].item():.6g} for {expected[where].item():.6g}; "
        f"{rows} of {actual.numel()} entries are off; "
        f"best overall factor {factor:.4g} (a factor of 1/n: a mean where a sum belongs; of n: the reverse; "
        "of the rate: a rate missing or applied twice)"
    )


def _hooks(owner: Any) -> dict[str, list[int]]:
    found = {}
    for attribute, value in vars(owner).items():
        if attribute.endswith("_hooks") and value is not None:
            found[attribute] = [
                id(hook) for hook in (value.values() if isinstance(value, Mapping) else value)
            ]
    return found


def _bits(tensor: Tensor) -> bytes:
    tensor = tensor.detach().contiguous().cpu()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be bit-identical after a run: tensors, modes, hooks, attributes, RNGs, global modes.

    Python's own ``random`` is left out: beartype, which the tests switch on, draws from it.
    """
    seen: dict[str, Any] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        seen[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, _bits(tensor))
        seen[f"requires_grad of {name}"] = tensor.requires_grad
        seen[f"grad of {name}"] = None if tensor.grad is None else (id(tensor.grad), _bits(tensor.grad))
        seen[f"tensor hooks of {name}"] = [
            [id(hook) for hook in (getattr(tensor, kind, None) or {}).values()]
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ]
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"mode of {name or 'the model'}"] = module.training
        seen[f"class of {name or 'the model'}"] = type(module)
        seen[f"hooks of {name or 'the model'}"] = _hooks(module)
        seen[f"attributes of {name or 'the model'}"] = sorted(vars(module))
    seen["torch RNG"] = torch.get_rng_state().numpy().tobytes()
    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002 (the global generator is what is watched)
    seen["numpy RNG"] = (kind, keys.tobytes(), *rest)
    seen["grad mode"] = torch.is_grad_enabled()
    seen["default dtype"] = torch.get_default_dtype()
    seen["global module hooks"] = [
        len(getattr(nn.modules.module, kind))
        for kind in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    ]
    return seen


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What changed between two snapshots, by name."""
    return [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]


@contextmanager
def untouched(model: nn.Module, *data: Any):
    """Fails when the block changes the model, the process's global state, or the user's data."""
    before, rows = snapshot(model), [take(batch, slice(None)) for batch in data]
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:  # noqa: BLE001 (also Ctrl-C: it is raised again below)
        error = caught
    changed = differences(before, snapshot(model))
    assert not changed, f"changed by the run: {changed}" + (f" (which raised {error!r})" if error else "")
    for batch, copy in zip(data, rows, strict=True):
        assert same(batch, copy), "the run wrote into the user's data"
    if error is not None:
        raise error


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of two batches."""
    if isinstance(a, Tensor):
        return _bits(a) == _bits(b)
    if isinstance(a, Mapping):
        return all(same(a[key], b[key]) for key in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True))
