"""What the tests of the ledger share: a training loop told as settings, and its replay by brute force.

The replay trains a twin of the model in the plain way, and before each step takes every row's term of the gradient and
every query's gradient by autograd, one at a time. Nothing in it comes from tracin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracin

N, Q = 13, 4
Loss = Callable[[nn.Module, Any], Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64, shape: Sequence[int] = (4,)) -> tuple:
    x = torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=generator(seed + 1))


def batches(steps: int, b: int = 5, n: int = N, seed: int = 7) -> list[Tensor]:
    """Ids of each step; some come back in one step, and the last step is short."""
    g = generator(seed)
    out = [torch.randint(0, n, (b,), generator=g) for _ in range(steps)]
    out[0][-1] = out[0][0]
    out[-1] = out[-1][: max(1, b - 2)]
    return out


@dataclass
class Loop:
    """A training loop: everything that a user would write around ``online.step``."""

    make: Callable[[nn.Module], torch.optim.Optimizer]
    steps: list[Tensor] = field(default_factory=lambda: batches(6))
    gamma: float = 1.0  # the schedule: the rate times gamma after each step
    micro: int = 1  # micro-batches per step
    clip: float | None = None
    loss_scale: float = 1.0
    reduction: str = "mean"
    mode: bool = True

    def run(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        online: Callable[[torch.optim.Optimizer], tracin.OnlineTracIn] | None = None,
        before: Callable[[int, torch.optim.Optimizer], None] | None = None,
        after: Callable[[int, torch.optim.Optimizer], None] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        steps: list[Tensor] | None = None,
    ) -> Any:
        optimizer = self.make(model) if optimizer is None else optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma)
        ledger = None if online is None else online(optimizer)
        for at, ids in enumerate(self.steps if steps is None else steps):
            model.train(self.mode)
            if ledger is None:
                self._step(model, data, optimizer, at, ids, before)
            else:
                with ledger.step(ids):
                    self._step(model, data, optimizer, at, ids, before)
            if after is not None:
                after(at, optimizer)
            scheduler.step()
        return ledger

    def _step(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        optimizer: torch.optim.Optimizer,
        at: int,
        ids: Tensor,
        before: Callable[[int, torch.optim.Optimizer], None] | None,
    ) -> None:
        optimizer.zero_grad()
        for part in ids.chunk(self.micro):
            self.loss(model, data, part, len(ids)).backward()
        self.finish(model)
        if before is not None:
            before(at, optimizer)
        optimizer.step()

    def finish(self, model: nn.Module) -> None:
        """What happens to the gradients between backward and step."""
        for parameter in model.parameters():
            if self.loss_scale != 1.0 and parameter.grad is not None:
                parameter.grad /= self.loss_scale
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)

    def loss(self, model: nn.Module, data: tuple[Tensor, Tensor], ids: Tensor, total: int) -> Tensor:
        losses = F.cross_entropy(model(data[0][ids]), data[1][ids], reduction="none")
        return self.loss_scale * losses.sum() / (total if self.reduction == "mean" else 1)


def sgd(lr: float = 0.3, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, **options)


def two_groups(kind: Any = torch.optim.SGD, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Weights and biases with a rate each, as frameworks do."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        weights = [p for name, p in named if "weight" in name]
        others = [p for name, p in named if "weight" not in name]
        return kind([{"params": weights, "lr": 0.2}, {"params": others, "lr": 0.05}], lr=0.1, **options)

    return make


def query_losses(model: nn.Module, queries: tuple[Tensor, Tensor]) -> Tensor:
    """Each query alone, in eval mode, [q]; the model is a copy."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.cat(
            [F.cross_entropy(twin(x[None]), y[None], reduction="none") for x, y in zip(*queries, strict=True)]
        )


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(model.parameters(), found, strict=True)
        ]
    )


def query_gradients(model: nn.Module, queries: tuple[Tensor, Tensor]) -> Tensor:
    """[q, p], each query alone, in eval mode, on a copy of the model."""
    twin = copy.deepcopy(model).eval()
    losses = (F.cross_entropy(twin(x[None]), y[None]) for x, y in zip(*queries, strict=True))
    return torch.stack([flat_gradient(twin, loss) for loss in losses])


def row_terms(model: nn.Module, loop: Loop, data: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    """[b, p]: each row's term of the gradient, alone, before anything is done to the gradients."""
    twin = copy.deepcopy(model)
    return torch.stack(
        [flat_gradient(twin, loop.loss(twin, data, ids[at : at + 1], len(ids))) for at in range(len(ids))]
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def per_parameter(
    model: nn.Module, optimizer: torch.optim.Optimizer, value: Callable[[dict, nn.Parameter], Any]
) -> Tensor:
    """A number or tensor of each parameter, side by side, [p]."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return torch.cat(
        [
            torch.as_tensor(value(groups[id(p)], p), dtype=p.dtype).expand(p.shape).reshape(-1)
            if id(p) in groups
            else torch.zeros(p.numel(), dtype=p.dtype)
            for p in model.parameters()
        ]
    )


@dataclass
class Replayed:
    """What the replay found: scores [q, n], and per step own, carried and change [s, q]."""

    first_order: Tensor
    ideal: Tensor
    own: Tensor
    carried: Tensor
    change: Tensor
    losses: Tensor  # [s + 1, q]


Own = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Tensor]


def gradient_form(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Tensor) -> Tensor:
    return rates


def total_movement(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: float) -> Tensor:
    """[p], how far a copy of the optimizer moves every number from here on: one step with this gradient, then many with none.

    Weight decay is left out, which answers to the weights and not to the gradient.
    """
    twin = copy.deepcopy(model)
    of = dict(zip(map(id, model.parameters()), twin.parameters(), strict=True))
    groups = [{**group, "params": [of[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    again = torch.optim.SGD(groups, lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in again.param_groups:
        group["weight_decay"] = 0.0
    start = flat(twin)
    for at in range(500):
        for p in twin.parameters():
            p.grad = torch.full_like(p, 0.0 if at else gradient)
        again.step()
    return start - flat(twin)


def momentum_form(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Tensor) -> Tensor:
    """What a gradient of one moves in the end, beyond what the momentum moves without it; asked before the step."""
    return total_movement(model, optimizer, 1.0) - total_movement(model, optimizer, 0.0)


def adam_form(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Tensor) -> Tensor:
    def factor(group: dict, p: nn.Parameter) -> Tensor:
        b1, b2 = group["betas"]
        state = optimizer.state[p]
        t = int(state["step"])
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] / (1 - b2**t)
        return (1 - b1) / (1 - b1**t) / (v.sqrt() + group["eps"])

    return rates * per_parameter(model, optimizer, factor)


def replay(
    model: nn.Module,
    loop: Loop,
    data: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    own_form: Own = gradient_form,
    every: int = 1,
    terms: Callable[..., Tensor] = row_terms,
    n: int = N,
) -> Replayed:
    """Train ``model`` and sum over the steps by brute force."""
    first = torch.zeros(len(queries[0]), n, dtype=torch.float64)
    ideal = torch.zeros_like(first)
    owns, carrieds, changes, held = [], [], [], {}
    losses = [query_losses(model, queries)]
    entered = [copy.deepcopy(model)]

    def before(at: int, optimizer: torch.optim.Optimizer) -> None:
        state = entered[-1].train(loop.mode)
        raw = terms(state, loop, data, loop.steps[at])
        used = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in model.parameters()]
        )
        moved = per_parameter(model, optimizer, lambda group, p: 1.0)
        # Clipping, loss scale: whatever gave the gradient this length.
        raw = raw * ((moved * used).norm() / (moved * raw.sum(0)).norm())
        rates = per_parameter(model, optimizer, lambda group, p: group["lr"])
        held.update(raw=raw, rates=rates, w=flat(model), q=query_gradients(state, queries))
        if own_form is momentum_form:
            held["factors"] = momentum_form(model, optimizer, rates)

    def after(at: int, optimizer: torch.optim.Optimizer) -> None:
        losses.append(query_losses(model, queries))
        entered.append(copy.deepcopy(model))
        if at % every:
            return
        factors = held.pop("factors", None)
        factors = own_form(model, optimizer, held["rates"]) if factors is None else factors
        shares = torch.stack([held["q"] @ (factors * row) for row in held["raw"]])  # [b, q]
        own = shares.sum(0)
        change = losses[-2] - losses[-1]
        for row, share in zip(loop.steps[at].tolist(), shares, strict=True):
            first[:, row] += share
            ideal[:, row] += share + (change - own) / len(shares)
        owns.append(own)
        carrieds.append(-held["q"] @ (flat(model) - held["w"]) - own)
        changes.append(change)

    loop.run(model, data, before=before, after=after)
    return Replayed(
        first, ideal, torch.stack(owns), torch.stack(carrieds), torch.stack(changes), torch.stack(losses)
    )


def ledger(
    model: nn.Module, queries: tuple[Tensor, Tensor], n: int = N, **options: Any
) -> Callable[[torch.optim.Optimizer], tracin.OnlineTracIn]:
    task = tracin.Task(model, tracin.losses.cross_entropy)
    return lambda optimizer: tracin.OnlineTracIn(task, optimizer, queries, n, **options)
