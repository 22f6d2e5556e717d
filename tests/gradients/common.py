"""What the tests of the gradient engine share: a wired source, and one-row-at-a-time autograd beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tracin.data import Batch, open_rows
from tracin.gradients.engine import BatchGradients, Keys, Source, batch_gradients
from tracin.gradients.sites import LossModule
from tracin.gradients.wiring import wire

Loss = Callable[[nn.Module, Any], Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 3) -> nn.Module:
    """A fresh model in eval mode, the same at every call; no parameter is left at zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(dtype).eval()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def wave(model: nn.Module, batch: Any) -> Tensor:
    """Σ sin(out) + 0.1 out² of each row: its slope differs from entry to entry."""
    out = model(*batch)
    flat = out.reshape(len(out), -1)
    return (flat.sin() + 0.1 * flat.square()).sum(1)


def source_of(
    model: nn.Module, rows: Any, loss: Loss = wave, batch_size: int = 100, name: str = "train"
) -> Source:
    """A source that has seen no batch yet."""
    opened = open_rows(rows, name=name, batch_size=batch_size)
    root = LossModule(model, loss).eval()
    return Source(root, loss, opened, torch.device("cpu"), where=name)


def traced(source: Source) -> dict[str, nn.Parameter]:
    return {name: p for name, p in source.root.model.named_parameters() if p.requires_grad}


def wired(source: Source) -> Source:
    """The source with its routes found on the first, middle and last row, as a run does it."""
    n = len(source.rows)
    source.found = wire(source.root, traced(source), source.run, source.take, sorted({0, n // 2, n - 1}))
    return source


def keys_of(source: Source) -> Keys:
    assert source.wiring is not None
    return Keys.of(source.wiring)


def gradients_of(source: Source, **options: Any) -> tuple[Batch, BatchGradients]:
    """The first batch and its gradients by the wired routes."""
    batch = next(iter(source.rows.batches()))
    return batch, batch_gradients(source, keys_of(source), batch, batch.value, traced(source), **options)


def by_parameter(found: BatchGradients, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Materialised gradients [n, p] of every parameter; zeros where there is no block."""
    out = {}
    for names, block in found.blocks.items():
        sizes = [parameters[name].numel() for name in names]
        assert len(block) == len(found.losses), f"{names}: {len(block)} rows for {len(found.losses)} losses"
        assert block.size == sum(sizes), f"{names}: the block has {block.size} entries, not {sum(sizes)}"
        out |= dict(zip(names, block.materialise().split(sizes, 1), strict=True))
    n = len(found.losses)
    return {name: out.get(name, p.detach().new_zeros(n, p.numel())) for name, p in parameters.items()}


def judged(source: Source, rows: list[int] | None = None) -> dict[str, Tensor]:
    """Gradients [n, p] of every parameter by plain autograd, each row run by itself. Uses nothing of the engine."""
    parameters = traced(source)
    out: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for row in range(len(source.rows)) if rows is None else rows:
        losses = source.loss(source.root.model, source.rows.take([row]))
        found = torch.autograd.grad(losses[0], list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            dense = torch.zeros_like(parameter) if gradient is None else gradient
            out[name].append((dense.to_dense() if dense.is_sparse else dense).detach().reshape(-1))
    return {name: torch.stack(values) for name, values in out.items()}


def assert_exact(source: Source, tolerance: float = 1e-10) -> None:
    """The wired routes' gradients of the first batch equal plain autograd's, parameter by parameter."""
    batch, found = gradients_of(source)
    mine, truth = by_parameter(found, traced(source)), judged(source, list(batch.rows))
    largest = max(float(value.abs().max()) for value in truth.values())
    assert largest > 0, "every gradient of this case is zero: it can tell nothing"
    for name, expected in truth.items():
        worst = float((mine[name].double() - expected.double()).abs().max())
        assert worst <= tolerance * largest, (
            f"{name} ({source.wiring and source.wiring.route(name)}): off by {worst / largest:.1e} of the largest entry"
        )


def route(source: Source, name: str) -> str:
    assert source.wiring is not None
    return source.wiring.route(name)
