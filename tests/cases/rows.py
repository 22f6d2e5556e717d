"""Where the rows are: flattened, moved, repeated, sorted, dealt out to experts, one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cases.table import Case, integers, normal


class Net(nn.Module):
    """Three Linears and a LayerNorm whose wiring a case gives as ``flow(net, x)``."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.LayerNorm(4)
        self.flow = flow

    def forward(self, *inputs: Tensor) -> Any:
        return self.flow(self, *inputs)


def net(name: str, flow: Any, *data: Any, **options: Any) -> Case:
    """A case of ``Net`` wired by ``flow``."""
    return Case(name, lambda: Net(flow), list(data), **options)


def tokens_flattened(net: Net, x: Tensor) -> Tensor:
    n, t, i = x.shape
    hidden = net.norm(net.a(x.reshape(n * t, i))).tanh()
    return net.c(hidden).reshape(n, t, -1)


def time_major(net: Net, x: Tensor) -> Tensor:
    n, t, i = x.shape
    hidden = net.norm(net.a(x.transpose(0, 1).reshape(t * n, i))).tanh()
    return net.c(hidden).reshape(t, n, -1).transpose(0, 1)


def time_first(net: Net, x: Tensor) -> Tensor:
    return net.c(net.norm(net.a(x.transpose(0, 1))).tanh()).transpose(0, 1)


def rows_last(net: Net, x: Tensor) -> Tensor:
    return net.c(net.a(x.permute(1, 2, 0, 3)).tanh()).permute(2, 0, 1, 3)


def windows(net: Net, x: Tensor) -> Tensor:
    n, h, w, i = x.shape
    cut = x.view(n, h // 2, 2, w // 2, 2, i).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, i)
    mixed = net.a(cut).tanh() + net.b(cut.mean(1, keepdim=True))
    mixed = mixed.reshape(n, h // 2, w // 2, 2, 2, i).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, i)
    return net.c(net.norm(torch.roll(mixed, 1, dims=1)))


def windows_outermost(net: Net, x: Tensor) -> Tensor:
    n, _, _, i = x.shape
    cut = x.reshape(n, 4, 4, i).transpose(0, 1).reshape(4 * n, 4, i)
    return net.c(net.a(cut).tanh()).reshape(4, n, 4, 2).transpose(0, 1)


def siamese(net: Net, x: Tensor, y: Tensor) -> Tensor:
    left, right = net.b(net.a(x).tanh()), net.b(net.a(y).tanh())
    return (left - right).square().sum(1)


def siamese_stacked(net: Net, x: Tensor, y: Tensor) -> Tensor:
    left, right = net.b(net.norm(net.a(torch.cat([x, y], 0))).tanh()).chunk(2, 0)
    return (left * right).sum(1)


def repeated_rows(net: Net, x: Tensor) -> Tensor:
    return net.c(net.a(x.repeat_interleave(2, 0)).tanh().view(len(x), 2, 4) * x[:, None]).flatten(1)


def tiled_rows(net: Net, x: Tensor) -> Tensor:
    return net.c(net.a(x.repeat(2, 1)).tanh()).view(2, len(x), 2).prod(0)


def reversed_rows(net: Net, x: Tensor) -> Tensor:
    return net.c(net.a(x.flip(0)).tanh().flip(0))


def rolled_rows(net: Net, x: Tensor) -> Tensor:
    return net.c(net.norm(net.a(x.roll(1, 0)).tanh())).roll(-1, 0)


def sorted_rows(net: Net, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return net.c(net.a(x[order]).tanh())[order.argsort()]


def swapped_inside(net: Net, x: Tensor) -> Tensor:
    """First and last row stay where they are, wherever there are enough rows for that."""
    order = list(range(len(x)))
    if len(x) > 2:
        at = min(1, len(x) - 3)
        order[at], order[at + 1] = order[at + 1], order[at]
    return net.c(net.a(x[order]).tanh())[order]


def one_by_one(net: Net, x: Tensor) -> Tensor:
    return torch.stack([net.c(net.norm(net.a(row)).tanh()) for row in x])


def split_in_two(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.c(net.a(part).tanh()) for part in x.split(2)])


def experts(net: Net, x: Tensor) -> Tensor:
    gate = net.c(x).softmax(-1)
    chosen = gate.argmax(-1)
    out = torch.zeros_like(x)
    for index, expert in enumerate((net.a, net.b)):
        rows = (chosen == index).nonzero().squeeze(1)
        out = out.index_add(0, rows, expert(x[rows]).tanh() * gate[rows, index, None])
    return out


def ragged(net: Net, x: Tensor, counts: Tensor) -> Tensor:
    there = torch.arange(x.shape[1]) < counts[:, None]
    nodes, owner = x[there], there.nonzero()[:, 0]
    hidden = net.norm(net.a(nodes)).tanh()
    pooled = torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, owner, hidden)
    return net.c(pooled)


def control_flow(net: Net, x: Tensor) -> Tensor:
    rows = []
    for row in x.split(1):
        hidden = net.a(row).tanh()
        if hidden.sum().item() > 0:
            hidden = net.b(hidden)
        for _ in range(int(abs(row[0, 0].item()) * 2) % 3):
            hidden = net.norm(hidden + net.b(hidden).tanh())
        rows.append(net.c(hidden))
    return torch.cat(rows)


def broadcast_heads(net: Net, x: Tensor) -> Tensor:
    return net.c(
        net.a(x)[:, None].expand(-1, 3, -1).tanh() * torch.tensor([[1.0], [2.0], [3.0]], dtype=x.dtype)
    )


def by_length(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
    """Rows sorted by length, as for packing; rows of equal length keep their order."""
    order = lengths.argsort(descending=True, stable=True)
    return net.c(net.a(x[order]).tanh())[order.argsort()]


def turned_when_many(net: Net, x: Tensor) -> Tensor:
    """The order of the rows depends on how many there are."""
    return reversed_rows(net, x) if len(x) > 4 else net.c(net.a(x).tanh())


CASES = [
    net("tokens_flattened", tokens_flattened, normal(3, 4)),
    net("tokens_flattened_one_each", tokens_flattened, normal(1, 4)),
    net("tokens_flattened_time_major", time_major, normal(3, 4)),
    net("time_first_t3", time_first, normal(3, 4)),
    net("time_first_t7", time_first, normal(7, 4)),
    net("rows_in_the_middle", rows_last, normal(3, 2, 4)),
    net("windows", windows, normal(4, 4, 4)),
    net("windows_outermost", windows_outermost, normal(4, 4, 4)),
    net("siamese", siamese, normal(4), normal(4), loss=lambda model, batch: model(*batch)),
    net("siamese_stacked", siamese_stacked, normal(4), normal(4), loss=lambda model, batch: model(*batch)),
    net("rows_repeated", repeated_rows, normal(4)),
    net("rows_tiled", tiled_rows, normal(4)),
    net("rows_reversed", reversed_rows, normal(4)),
    net("rows_rolled", rolled_rows, normal(4)),
    net("rows_sorted", sorted_rows, normal(4)),
    net("rows_swapped_inside", swapped_inside, normal(4)),
    net("rows_by_length", by_length, normal(4), integers(1, 4)),
    net("rows_turned_when_many", turned_when_many, normal(4)),
    net("rows_one_by_one", one_by_one, normal(4)),
    net("rows_one_by_one_tokens", one_by_one, normal(3, 4)),
    net("rows_split_in_two", split_in_two, normal(4)),
    net("experts", experts, normal(4)),
    net("ragged", ragged, normal(4, 4), integers(1, 5)),
    net("control_flow", control_flow, normal(4)),
    net("broadcast_heads", broadcast_heads, normal(4)),
]  # fmt: skip
