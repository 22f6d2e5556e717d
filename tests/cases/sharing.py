"""Weights in more than one place: tied, shared, called again, used outside their module, bare, parametrised."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from cases.table import Case, integers, normal


class Tied(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.out.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.body(self.embed(index)).tanh())


class SharedModule(nn.Module):
    """One Linear that sits in two parents."""

    def __init__(self) -> None:
        super().__init__()
        common = nn.Linear(4, 4)
        self.first = nn.Sequential(common, nn.Tanh(), nn.Linear(4, 4))
        self.second = nn.Sequential(nn.Tanh(), common)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class SharedConvolution(nn.Module):
    """One convolution of small pictures that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.common(torch.tanh(self.common(x)))


class SharedParameters(nn.Module):
    """Two Linears and two convolutions of different shapes of use over the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c, self.d = nn.Conv1d(3, 3, 2), nn.Conv1d(3, 3, 2, padding=1, bias=False)
        self.d.weight = self.c.weight
        self.e = nn.Linear(4, 4)
        self.e.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(self.b(self.a(x).tanh()).tanh())
        return self.d(self.c(x).tanh())


class TiedNorms(nn.Module):
    """Two LayerNorms share a weight with each other, and their bias is a Linear's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.b.weight, self.out.bias = self.a.weight, self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.out(self.a(x)).tanh())


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed and used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(4, 3), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).tanh(), self.encode.weight.t(), self.bias)


class OnlyFunctional(nn.Module):
    """A Linear and a convolution that are never called: only their weights are used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.linear(x, self.a.weight, self.a.bias).tanh())
        return F.conv1d(x, self.conv.weight, self.conv.bias)


class Repeated(nn.Module):
    """Modules called several times, on different lengths and on different layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.conv, self.norm = nn.Linear(4, 4), nn.Conv1d(4, 4, 2), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        long = self.norm(self.mix(x).tanh())
        short = self.norm(self.mix(long[:, :2]).tanh())
        flat = self.norm(self.mix(short.mean(1)).tanh())
        a = self.conv(self.conv(long.transpose(1, 2)).tanh())
        b = self.conv(short.transpose(1, 2))
        return torch.cat([a.flatten(1), b.flatten(1), self.mix(flat)], dim=1)


class Recursive(nn.Module):
    """One Linear for every step of a loop whose length is the number of rows of a batch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.step, self.steps = nn.Linear(4, 4), steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x + self.step(x).tanh()
        return x


class CountedCalls(nn.Module):
    """The whole model calls its child; the child holds a bare parameter and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale(4)
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        once, _ = self.lstm(self.scale(x).transpose(0, 1))
        twice, _ = self.lstm(once[:2])
        return self.scale(twice.transpose(0, 1))


class Scale(nn.Module):
    """LayerScale: a bare gamma multiplied."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Bare(nn.Module):
    """Positions added, a class token expanded and concatenated, LayerScale, a temperature, a bias table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(3, 4), nn.Parameter(torch.randn(1, 4, 4))
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 4)), Scale(4)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.table = nn.Parameter(torch.randn(7, 2))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4)[None, :] + 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1) + self.position
        weights = (x @ x.transpose(1, 2) * self.temperature.exp() + self.table[self.index, 0]).softmax(-1)
        return x + self.scale(weights @ x)


class Collections(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, contracted with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ParameterList([nn.Parameter(torch.randn(4, 3)) for _ in range(2)])
        self.named = nn.ParameterDict(
            {"shift": nn.Parameter(torch.randn(3)), "unused": nn.Parameter(torch.ones(2))}
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.stack([torch.einsum("nti,io->nto", x, weight) for weight in self.heads], dim=1)
        return heads.tanh() + self.named["shift"]


class Positions(nn.Module):
    """An Embedding called on arange(t) and a Linear on coordinates: neither input has a row axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position, self.coordinate = nn.Embedding(6, 4), nn.Embedding(9, 4), nn.Linear(2, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        steps = torch.arange(index.shape[1])
        places = torch.stack([steps, steps.square() / 4], dim=1).to(self.out.weight.dtype)
        x = self.embed(index) + self.position(steps) + self.norm(self.coordinate(places))
        return self.out(x.tanh())


def _parametrised(kind: str) -> nn.Module:
    wrap = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }[kind]
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), wrap(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))


def _parametrised_conv(kind: str) -> nn.Module:
    wrap = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
    }[kind]
    return nn.Sequential(wrap(nn.Conv2d(2, 3, 2)), nn.ReLU(), nn.Conv2d(3, 2, 2))


class Softplus(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.floor = nn.Parameter(torch.tensor(0.1))

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight) + self.floor


def _positive() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Softplus())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


class Standardised(nn.Conv2d):
    """A subclass that standardises its weight: its type says Conv2d, its arithmetic does not."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class LowRank(nn.Linear):
    """LoRA as a subclass of Linear: frozen base, trainable A and B."""

    def __init__(self, i: int, o: int, rank: int = 2) -> None:
        super().__init__(i, o)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(rank, i)), nn.Parameter(torch.randn(o, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x @ self.A.t() @ self.B.t()


class Adapter(nn.Module):
    """LoRA around a frozen layer, of two small Linears."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, rank, bias=False)
        self.B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


class Plain(nn.Linear):
    """A subclass that changes nothing."""


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_forward_hook(_double)
    model[2].register_forward_pre_hook(_shift)
    return model


def _double(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return 2 * output


def _shift(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + 1,)


def _patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].forward = lambda x: F.linear(x.square(), model[0].weight, model[0].bias)
    return model


def _deep_copy() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), copy.deepcopy(layer), nn.Tanh(), layer)


CASES = [
    Case("tied_embeddings", Tied, [integers(0, 6, 3)]),
    Case("shared_module", SharedModule, [normal(4)]),
    Case("shared_module_tokens", SharedModule, [normal(3, 4)]),
    Case("shared_convolution", SharedConvolution, [normal(2, 5, 5)]),
    Case("shared_parameters", SharedParameters, [normal(3, 4)]),
    Case("tied_norms", TiedNorms, [normal(3, 4)]),
    Case("copied_and_repeated", _deep_copy, [normal(4)]),
    Case("autoencoder_transposed_weight", Autoencoder, [normal(4)]),
    Case("only_functional", OnlyFunctional, [normal(3, 4)]),
    Case("called_again_on_other_lengths", Repeated, [normal(5, 4)]),
    Case("called_as_often_as_rows", lambda: Recursive(3), [normal(4)]),
    Case("called_as_often_as_rows_7", lambda: Recursive(7), [normal(3, 4)]),
    Case("slow_modules_called_twice", CountedCalls, [normal(3, 4)]),
    Case("bare_parameters", Bare, [normal(3, 3)]),
    Case("bare_root_parameter", lambda: Scale(4), [normal(3, 4)]),
    Case("parameter_collections", Collections, [normal(3, 4)]),
    *(Case(f"positions_without_rows_t{t}", Positions, [integers(0, 6, t)]) for t in (1, 3, 7)),
    *(Case(f"{kind}_linear", lambda kind=kind: _parametrised(kind), [normal(3)])
      for kind in ("weight_norm", "spectral_norm", "orthogonal")),
    *(Case(f"{kind}_conv", lambda kind=kind: _parametrised_conv(kind), [normal(2, 4, 4)])
      for kind in ("weight_norm", "spectral_norm")),
    Case("parametrisation_with_parameter", _positive, [normal(3, 4)]),
    Case("old_weight_norm", _old_weight_norm, [normal(4)]),
    Case("weight_standardised_subclass", lambda: nn.Sequential(Standardised(2, 3, 2), nn.ReLU()), [normal(2, 4, 4)]),
    Case("plain_subclass", lambda: nn.Sequential(Plain(4, 4), nn.Tanh(), Plain(4, 2)), [normal(4)]),
    Case("lora_subclass", lambda: nn.Sequential(LowRank(4, 4), nn.Tanh(), LowRank(4, 2)), [normal(3, 4)]),
    Case("lora_adapter", lambda: nn.Sequential(Adapter(nn.Linear(4, 4)), nn.Tanh(), Adapter(nn.Linear(4, 2))),
         [normal(4)]),
    Case("users_own_hooks", _hooked, [normal(4)]),
    Case("patched_forward", _patched, [normal(4)]),
]  # fmt: skip
