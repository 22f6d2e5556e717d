"""In-place writes, odd calls and outputs, losses that do more than call the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases.rows import Net, net
from cases.table import Case, bits, integers, normal, wave_of

# In-place writes


def residual_in_place(net: Net, x: Tensor) -> Tensor:
    hidden = net.a(x)
    hidden += net.b(x).tanh_()
    return net.c(hidden.mul_(0.5).add_(x))


def slice_assigned(net: Net, x: Tensor) -> Tensor:
    hidden = net.a(x)
    hidden[:, 0] = net.b(x)[:, 1]
    return net.c(F.relu(hidden, inplace=True))


def writes_input(net: Net, x: Tensor) -> Tensor:
    return net.c(net.a(x.mul_(0.5)).relu_())


# Calls


def keyword_calls(net: Net, x: Tensor) -> Tensor:
    return net.c(input=net.norm(input=net.a(input=x)).tanh())


class Gate(nn.Module):
    """A child that takes keywords, a flag and nothing positional, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, *, x: Tensor, gate: Tensor, flip: bool = False) -> dict[str, Any]:
        hidden = self.layer(x) * self.weight
        return {"out": hidden * (1 - gate if flip else gate), "extra": (hidden.tanh(), None, "note")}


class Gated(nn.Module):
    """Calls its child by keyword, twice, and reads a dict that holds a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = Gate(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.gate(x=x, gate=x.sigmoid())
        second = self.gate(gate=x.sigmoid(), flip=True, x=first["extra"][0])
        return self.out(first["out"] + second["out"])


def teacher(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = net.b(net.a(x).tanh())
    return (net.b(net.a(x * 0.9).tanh()) - target) * net.norm(x)


def frozen_features(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = net.a(x).tanh()
    return net.c(net.b(hidden).tanh() + net.b(x).detach())


def checkpointed(net: Net, x: Tensor) -> Tensor:
    hidden = checkpoint(lambda h: net.norm(net.a(h)).tanh(), x, use_reentrant=False)
    return net.c(checkpoint(net.b, hidden, use_reentrant=False))


def energy_and_force(net: Net, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    energy = net.c(net.a(x).tanh()).sum(1)
    (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return torch.cat([energy[:, None], force], dim=1)


# Outputs


@dataclass
class Output:
    """What a model of the transformers family returns."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


class Multi(nn.Module):
    """Returns its logits in a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.c, self.spare, self.kind = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).tanh()
        logits = self.c(hidden)
        return {"dict": {"logits": logits}, "tuple": (None, logits), "dataclass": Output(logits, (hidden,))}[
            self.kind
        ]


def read_dict(model: nn.Module, batch: Any) -> Tensor:
    return wave_of(model(*batch)["logits"])


def read_tuple(model: nn.Module, batch: Any) -> Tensor:
    return wave_of(model(*batch)[1])


def read_dataclass(model: nn.Module, batch: Any) -> Tensor:
    out = model(*batch)
    return wave_of(torch.cat([out.logits, out.hidden[0]], dim=1))


# Losses


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def multi_label(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none").mean(1)


def regress(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).squeeze(-1) - batch[1]).square()


def from_dict(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["pixels"]), batch["label"], reduction="none") * batch["weight"]


def with_penalty(model: Any, batch: Any) -> Tensor:
    return classify(model, batch) + 0.1 * model.c.weight.square().sum()


def only_penalty_reaches_b(model: Any, batch: Any) -> Tensor:
    return classify(model, batch) + batch[0].square().sum(1) * model.b.weight.sum()


def twice(model: nn.Module, batch: Any) -> Tensor:
    x, label = batch
    return F.cross_entropy(model(x), label, reduction="none") + wave_of(model(x * 0.5 + 0.1))


def through_submodules(model: Any, batch: Any) -> Tensor:
    return wave_of(model.c(model.norm(model.a(batch[0]) + model.b(batch[0]))))


def chosen_class(model: nn.Module, batch: Any) -> Tensor:
    return -model(batch[0]).log_softmax(-1)[:, 0]


def row_weighted(model: nn.Module, batch: Any) -> Tensor:
    return classify(model, batch) * batch[2]


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def straight(net: Net, x: Tensor) -> Tensor:
    return net.c(net.norm(net.a(x)).tanh())


def deep(net: Net, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x).relu()).relu())


def _in_place_relu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 2),
    )  # fmt: skip


class PixelShuffler(nn.Module):
    """Convolution, pixel shuffle, convolution, unshuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Conv2d(1, 8, 2), nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.out(F.pixel_shuffle(self.up(x), 2)), 2)


class Gating(nn.Module):
    """Squeeze and excite with a FiLM of another input: broadcasts over space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4)
        self.squeeze, self.film = nn.Linear(4, 4), nn.Linear(3, 8)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        gain, shift = self.film(condition).chunk(2, dim=1)
        return (
            x * self.squeeze(x.mean((2, 3))).sigmoid()[:, :, None, None] * gain[:, :, None, None]
            + shift[:, :, None, None]
        )


class Hyper(nn.Module):
    """A network that makes the other one's weights, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.bias = nn.Linear(4, 8), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.make(x.tanh()).view(-1, 2, 4), x[:, :, None]).squeeze(2) + self.bias


class Counter(nn.Module):
    """Counts its calls and keeps a running mean, in eval mode too; its output knows nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        self.calls += 1
        self.average.lerp_(hidden.detach().mean(0), 0.1)
        return self.c(hidden)


LABELLED = [normal(4), integers(0, 2)]

CASES = [
    Case("in_place_relu_after_conv_and_linear", _in_place_relu, [normal(1, 4, 4)]),
    Case("in_place_relu_first", lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), [normal(4)]),
    Case("in_place_relu_first_in_block", lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
        nn.Sequential(nn.SiLU(inplace=True), nn.Dropout(inplace=True), nn.Linear(4, 2))), [normal(4)]),
    net("in_place_residual", residual_in_place, normal(4)),
    net("in_place_slice_assigned", slice_assigned, normal(4)),
    net("in_place_on_the_input", writes_input, normal(4)),
    net("keyword_calls", keyword_calls, normal(4)),
    Case("keyword_child_with_dict_output", Gated, [normal(4)]),
    net("no_grad_teacher", teacher, normal(3, 4)),
    net("no_grad_features", frozen_features, normal(4)),
    net("gradient_checkpointing", checkpointed, normal(3, 4)),
    net("double_backward", energy_and_force, normal(4)),
    Case("output_dict", lambda: Multi("dict"), [normal(4)], loss=read_dict),
    Case("output_tuple", lambda: Multi("tuple"), [normal(3, 4)], loss=read_tuple),
    Case("output_dataclass", lambda: Multi("dataclass"), [normal(4)], loss=read_dataclass),
    net("unused_parameters", straight, *LABELLED, loss=classify),
    net("classification", deep, *LABELLED, loss=classify),
    net("weighted_rows", deep, *LABELLED, normal(), loss=row_weighted),
    net("multi_label", deep, normal(4), bits(2), loss=multi_label),
    Case("regression", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), [normal(4), normal()],
         loss=regress),
    Case("dict_batch", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
         {"weight": normal(), "pixels": normal(4), "label": integers(0, 3)}, loss=from_dict),
    net("query_loss", deep, *LABELLED, loss=classify, query_loss=chosen_class),
    net("loss_with_penalty", deep, *LABELLED, loss=with_penalty),
    net("loss_penalises_an_unused_layer", straight, *LABELLED, loss=only_penalty_reaches_b),
    net("loss_calls_the_model_twice", deep, *LABELLED, loss=twice),
    net("loss_calls_submodules", deep, normal(3, 4), loss=through_submodules),
    Case("frozen_first_layer", lambda: frozen(Net(deep), "a"), LABELLED, loss=classify),
    Case("frozen_middle_and_norm", lambda: frozen(Net(straight), "b", "norm"), LABELLED, loss=classify),
    net("only_the_head", deep, *LABELLED, loss=classify, parameters="c.*",
         traced=lambda name: name.startswith("c.")),
    net("only_weights_of_two", deep, *LABELLED, loss=classify, parameters=("a.weight", "c.*"),
         traced=lambda name: name == "a.weight" or name.startswith("c.")),
    Case("pixel_shuffle", PixelShuffler, [normal(1, 4, 4)]),
    Case("counts_its_calls", Counter, [normal(4)]),
    Case("gating", Gating, [normal(1, 4, 3), normal(3)]),
    Case("hypernetwork", Hyper, [normal(4)]),
]  # fmt: skip
