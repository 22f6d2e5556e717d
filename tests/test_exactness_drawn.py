"""Shapes, groups, dilations and batch splits that nobody chose: hypothesis draws them, the judge decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import oracle
import tracin
from cases import Case
from cases.table import Maker, integers, normal

bounded = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
small, size = st.integers(1, 3), st.integers(1, 4)
splits = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 8))  # n, m, batch size


def check(build: Callable[[], nn.Module], data: Sequence[Maker], split: tuple[int, int, int]) -> None:
    """Influence and self-influence in float64 of two checkpoints with rates per parameter."""
    n, m, batch_size = split
    case = Case("drawn", build, data)
    model, states, rates = case.model(), case.states(), case.rates()
    train, queries = case.rows(n, seed=1), case.rows(m, seed=2)
    sides = [oracle.trajectory_gradients(case.model(), case.loss, rows, states) for rows in (train, queries)]
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, rates, strict=True)]
    )
    task = tracin.Task(model, case.loss)
    method = tracin.TracInCP(task, trajectory, batch_size=batch_size, device="cpu", progress=False)
    with oracle.untouched(model, train, queries):
        found, own = method.influence(train, queries), method.self_influence(train)
    oracle.assert_close(found.values, oracle.scores(*sides, rates), 1e-10)
    oracle.assert_close(own.values, oracle.self_influence(sides[0], rates), 1e-10, "self-influence")


@bounded
@given(st.data(), splits)
def test_linear(data: st.DataObject, split: tuple[int, int, int]) -> None:
    axes, i, o = data.draw(st.lists(size, max_size=3)), data.draw(size), data.draw(size)
    bias, first = data.draw(st.booleans()), data.draw(st.booleans())

    def build() -> nn.Module:
        layer = nn.Linear(i, o, bias=bias)
        return layer if first else nn.Sequential(nn.Linear(i, i), nn.Tanh(), layer)

    check(build, [normal(*axes, i)], split)


@bounded
@given(st.data(), splits)
def test_convolution(data: st.DataObject, split: tuple[int, int, int]) -> None:
    dims, groups = data.draw(small), data.draw(small)
    i, o = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))

    def each(strategy: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(data.draw(strategy) for _ in range(dims))

    kernel, stride, dilation, padding = (
        each(small),
        each(small),
        each(st.integers(1, 2)),
        each(st.integers(0, 2)),
    )
    modes = ["zeros", "reflect", "replicate", "circular"] if dims < 3 else ["zeros", "circular"]
    mode, bias = data.draw(st.sampled_from(modes)), data.draw(st.booleans())
    shape = tuple(
        max(d * (k - 1) + 1 - 2 * p, p + 1) + extra
        for k, d, p, extra in zip(kernel, dilation, padding, each(st.integers(0, 2)), strict=True)
    )
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def build() -> nn.Module:
        layer = kind(i, o, kernel, stride, padding, dilation, groups, bias=bias, padding_mode=mode)
        return nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh(), layer)

    check(build, [normal(i, *shape)], split)


@bounded
@given(st.data(), splits)
def test_transposed_convolution(data: st.DataObject, split: tuple[int, int, int]) -> None:
    dims, groups = data.draw(small), data.draw(small)
    i, o = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))

    def each(strategy: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(data.draw(strategy) for _ in range(dims))

    kernel, stride, dilation, padding = (
        each(small),
        each(small),
        each(st.integers(1, 2)),
        each(st.integers(0, 2)),
    )
    shape, bias = each(st.integers(1, 3)), data.draw(st.booleans())
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    lengths = [
        (length - 1) * s - 2 * p + d * (k - 1) + e + 1
        for length, s, p, d, k, e in zip(shape, stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(lengths) >= 1)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]

    def build() -> nn.Module:
        layer = kind(i, o, kernel, stride, padding, extra, groups, bias=bias, dilation=dilation)
        return nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh(), layer)

    check(build, [normal(i, *shape)], split)


@bounded
@given(st.data(), splits)
def test_norms(data: st.DataObject, split: tuple[int, int, int]) -> None:
    kind = data.draw(st.sampled_from(["layer", "rms", "group", "batch", "instance"]))
    groups = data.draw(small)
    channels = groups * data.draw(st.integers(1, 2))
    axes = data.draw(st.lists(st.integers(2, 3), min_size=kind == "instance", max_size=3))
    shape = (channels, *axes)
    last = data.draw(st.integers(1, len(shape)))

    def build() -> nn.Module:
        layer = {
            "layer": lambda: nn.LayerNorm(shape[-last:]),
            "rms": lambda: nn.RMSNorm(shape[-last:], eps=1e-3),
            "group": lambda: nn.GroupNorm(groups, channels),
            "batch": lambda: (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(axes)](
                channels
            ),
            "instance": lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(axes) - 1](
                channels, affine=True
            ),
        }[kind]()
        return nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh(), layer, nn.Linear(shape[-1], 2))

    check(build, [normal(*shape)], split)


@bounded
@given(st.data(), splits)
def test_embedding(data: st.DataObject, split: tuple[int, int, int]) -> None:
    vocabulary, width = data.draw(st.integers(1, 5)), data.draw(size)
    axes = data.draw(st.lists(size, max_size=2))
    padding = data.draw(st.none() | st.integers(0, vocabulary - 1))

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(vocabulary, width, padding_idx=padding), nn.Linear(width, 2))

    check(build, [integers(0, vocabulary, *axes)], split)


@bounded
@given(st.data(), splits)
def test_recurrence(data: st.DataObject, split: tuple[int, int, int]) -> None:
    """Time steps, rows and batch sizes drawn apart, so that they meet now and then."""
    kind, steps = data.draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), data.draw(st.integers(1, 7))
    first, both = data.draw(st.booleans()), data.draw(st.booleans())

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(2, 3, batch_first=first, bidirectional=both)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[0] if first else self.layer(x.transpose(0, 1))[0].transpose(0, 1)

    check(Reader, [normal(steps, 2)], split)


@bounded
@given(st.data(), splits)
def test_attention(data: st.DataObject, split: tuple[int, int, int]) -> None:
    steps, heads, first = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 2)), data.draw(st.booleans())

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, heads, dim_feedforward=3, batch_first=first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if first else self.layer(x.transpose(0, 1)).transpose(0, 1)

    check(Reader, [normal(steps, 4)], split)
