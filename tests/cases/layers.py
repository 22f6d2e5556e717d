"""One layer type per case: Linear, convolutions, embeddings, norms and the small ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases.table import Case, integers, normal


def inside(width: int, layer: nn.Module) -> nn.Sequential:
    """The layer behind another one that mixes the last axis, so that its input needs a gradient."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), layer)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """The model with some parameters that ask for no gradient."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


class Upsampler(nn.Module):
    """A transposed convolution told its output size by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(8, 8))


class Bag(nn.Module):
    """An EmbeddingBag over 2-D indices, with weights per index where its mode takes them."""

    def __init__(self, mode: str, weighted: bool = False, **options: object) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode=mode, **options)
        self.out = nn.Linear(4, 2)
        self.weighted = weighted

    def forward(self, index: Tensor, weight: Tensor) -> Tensor:
        return self.out(self.bag(index, per_sample_weights=weight if self.weighted else None))


class Offsets(nn.Module):
    """An EmbeddingBag over flattened indices with the offsets of the rows: its input has no row axis."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="mean")

    def forward(self, index: Tensor) -> Tensor:
        n, length = index.shape
        return self.bag(index.reshape(-1), torch.arange(0, n * length, length))


class Pairs(nn.Module):
    """A Bilinear of two views of the row."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.left, self.pair = nn.Linear(4, 3), nn.Bilinear(3, 4, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.left(x).tanh(), x)


LINEAR = [
    Case("linear_2d", lambda: nn.Linear(4, 3), [normal(4)]),
    Case("linear_2d_no_bias", lambda: nn.Linear(4, 3, bias=False), [normal(4)]),
    Case("linear_3d", lambda: inside(4, nn.Linear(4, 3)), [normal(3, 4)]),
    Case("linear_3d_no_bias", lambda: inside(4, nn.Linear(4, 3, bias=False)), [normal(7, 4)]),
    Case("linear_4d", lambda: inside(4, nn.Linear(4, 3)), [normal(2, 3, 4)]),
    Case("linear_one_unit", lambda: inside(4, nn.Linear(4, 1)), [normal(4)]),
    Case("linear_frozen_weight", lambda: frozen(inside(4, nn.Linear(4, 3)), "2.weight"), [normal(4)]),
    Case("linear_frozen_bias", lambda: frozen(inside(4, nn.Linear(4, 3)), "2.bias"), [normal(3, 4)]),
    Case(
        "mlp_relu",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        [normal(4)],
    ),
]

_CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "conv1d_stride_padding_dilation": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 8)),
    "conv1d_groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 5)),
    "conv1d_same": (lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "conv2d_no_bias": (lambda: nn.Conv2d(2, 3, (2, 3), bias=False), (2, 5, 6)),
    "conv2d_stride": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=(1, 2)), (2, 6, 7)),
    "conv2d_stride_beyond_kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 6)),
    "conv2d_dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2), (2, 5, 6)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), (3, 5, 5)),
    "conv2d_pointwise": (lambda: nn.Conv2d(3, 4, 1), (3, 3, 4)),
    "conv2d_whole_map": (lambda: nn.Conv2d(3, 4, (4, 5)), (3, 4, 5)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), (2, 4, 5)),
    "conv2d_valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 5)),
    "conv2d_same_reflect": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "conv3d_everything": (
        lambda: nn.Conv3d(2, 4, (2, 1, 2), stride=(1, 2, 1), padding=1, dilation=(1, 1, 2), groups=2),
        (2, 3, 4, 3),
    ),
    "conv3d_circular": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), (2, 3, 3, 3)),
    **{
        f"conv{dims}d_{mode}": (
            lambda kind=kind, mode=mode: kind(2, 3, 3, stride=2, padding=2, padding_mode=mode),
            shape,
        )
        for dims, kind, shape in ((1, nn.Conv1d, (2, 5)), (2, nn.Conv2d, (2, 5, 4)))
        for mode in ("reflect", "replicate", "circular")
    },
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 5)),
    "conv_transpose1d_stride": (
        lambda: nn.ConvTranspose1d(2, 4, 3, 2, 1, output_padding=1, groups=2),
        (2, 5),
    ),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 3), (2, 3, 4)),
    "conv_transpose2d_no_bias": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), (2, 3, 4)),
    "conv_transpose2d_everything": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, output_padding=(1, 0), groups=2, dilation=(1, 2)),
        (4, 3, 3),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, 2, output_padding=1, groups=2), (2, 2, 2, 3)),
}

CONVOLUTION = [
    *(
        Case(name, lambda build=build, shape=shape: inside(shape[-1], build()), [normal(*shape)])
        for name, (build, shape) in _CONVOLUTIONS.items()
    ),
    Case("conv2d_first", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()), [normal(2, 5, 4)]),
    Case("conv_transpose2d_first", lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), [normal(2, 3, 4)]),
    Case("conv_transpose2d_output_size", Upsampler, [normal(2, 3, 3)]),
    Case(
        "conv2d_chain",
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        [normal(1, 6, 6)],
    ),
    Case(
        "conv2d_channels_last",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2)).to(
            memory_format=torch.channels_last
        ),
        [lambda n, g: torch.randn(n, 2, 5, 5, generator=g).double().to(memory_format=torch.channels_last)],
    ),
]


def _embedding(**options: object) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 2))


EMBEDDING = [
    Case("embedding", _embedding, [integers(0, 6, 5)]),
    Case("embedding_one_index", _embedding, [integers(0, 6)]),
    Case("embedding_two_axes", _embedding, [integers(0, 6, 2, 3)]),
    Case("embedding_padding_idx", lambda: _embedding(padding_idx=0), [integers(0, 3, 5)]),
    Case("embedding_sparse", lambda: _embedding(sparse=True), [integers(0, 6, 5)]),
    Case("embedding_scale_grad_by_freq", lambda: _embedding(scale_grad_by_freq=True), [integers(0, 3, 5)],
         may_refuse=True),
    Case("embedding_max_norm", lambda: _embedding(max_norm=0.5), [integers(0, 6, 5)], may_refuse=True),
    Case("embedding_from_pretrained", lambda: nn.Sequential(
        nn.Embedding.from_pretrained(torch.randn(6, 4)), nn.Linear(4, 2)), [integers(0, 6, 5)]),
    Case("embedding_bag_mean", lambda: Bag("mean"), [integers(0, 6, 5), normal(5)]),
    Case("embedding_bag_sum", lambda: Bag("sum"), [integers(0, 6, 5), normal(5)]),
    Case("embedding_bag_max", lambda: Bag("max"), [integers(0, 6, 2), normal(2)]),
    Case("embedding_bag_weighted", lambda: Bag("sum", weighted=True), [integers(0, 6, 5), normal(5)]),
    Case("embedding_bag_padding_idx", lambda: Bag("mean", padding_idx=0), [integers(0, 3, 5), normal(5)]),
    Case("embedding_bag_offsets", Offsets, [integers(0, 6, 5)]),
]  # fmt: skip


def _norm(width: int, layer: nn.Module) -> nn.Module:
    return nn.Sequential(inside(width, layer), nn.Tanh(), nn.Linear(width, 2))


NORM = [
    Case("layer_norm", lambda: _norm(5, nn.LayerNorm(5)), [normal(5)]),
    Case("layer_norm_tokens", lambda: _norm(5, nn.LayerNorm(5)), [normal(3, 5)]),
    Case("layer_norm_two_axes", lambda: _norm(5, nn.LayerNorm((3, 5))), [normal(2, 3, 5)]),
    Case("layer_norm_no_bias", lambda: _norm(5, nn.LayerNorm(5, bias=False)), [normal(3, 5)]),
    Case("layer_norm_no_affine", lambda: _norm(5, nn.LayerNorm(5, elementwise_affine=False)), [normal(3, 5)]),
    Case("rms_norm", lambda: _norm(5, nn.RMSNorm(5)), [normal(3, 5)]),
    Case("rms_norm_two_axes", lambda: _norm(5, nn.RMSNorm((3, 5), eps=1e-3)), [normal(3, 5)]),
    Case("group_norm", lambda: _norm(5, nn.GroupNorm(2, 4)), [normal(4, 3, 5)]),
    Case("group_norm_2d", lambda: _norm(5, nn.GroupNorm(2, 4)), [normal(4, 5)]),
    Case("group_norm_no_affine", lambda: _norm(5, nn.GroupNorm(2, 4, affine=False)), [normal(4, 3, 5)]),
    Case("batch_norm1d", lambda: _norm(5, nn.BatchNorm1d(5)), [normal(5)]),
    Case("batch_norm1d_3d", lambda: _norm(5, nn.BatchNorm1d(3)), [normal(3, 5)]),
    Case("batch_norm2d", lambda: _norm(5, nn.BatchNorm2d(3)), [normal(3, 4, 5)]),
    Case("batch_norm2d_no_affine", lambda: _norm(5, nn.BatchNorm2d(3, affine=False)), [normal(3, 4, 5)]),
    Case("batch_norm3d", lambda: _norm(3, nn.BatchNorm3d(2)), [normal(2, 2, 2, 3)]),
    Case("batch_norm_first", lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)), [normal(5)]),
    Case("instance_norm1d", lambda: _norm(5, nn.InstanceNorm1d(3, affine=True)), [normal(3, 5)]),
    Case("instance_norm2d", lambda: _norm(5, nn.InstanceNorm2d(3, affine=True)), [normal(3, 4, 5)]),
    Case("instance_norm_running",
         lambda: _norm(5, nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), [normal(3, 4, 5)]),
]  # fmt: skip


class Squash(nn.Module):
    """A parameter used through a torch.autograd.Function, for which vmap has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.5, 0.7, 0.9, 1.1]))

    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(x, self.slope)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return slope * x**3

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        by_slope = grad * x**3
        return grad * 3 * slope * x**2, by_slope.reshape(-1, by_slope.shape[-1]).sum(0)


OTHER = [
    Case("prelu_shared", lambda: nn.Sequential(inside(4, nn.PReLU()), nn.Linear(4, 2)), [normal(3, 4)]),
    Case("prelu_channels", lambda: inside(4, nn.PReLU(3)), [normal(3, 4)]),
    Case("bilinear", Pairs, [normal(4)]),
    Case("bilinear_tokens_no_bias", lambda: Pairs(bias=False), [normal(3, 4)]),
    Case("autograd_function", lambda: nn.Sequential(nn.Linear(4, 4), Squash(), nn.Linear(4, 2)), [normal(4)]),
    Case("autograd_function_tokens", lambda: nn.Sequential(nn.Linear(4, 4), Squash()), [normal(3, 4)]),
    Case("root_is_the_layer", lambda: nn.GRUCell(3, 4), [normal(3)]),
    Case(
        "adaptive_softmax",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 8, cutoffs=[3]),
        [normal(4), integers(0, 8)],
        loss=lambda model, batch: -model(*batch).output,
    ),
    Case(
        "local_response",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.LocalResponseNorm(2)),
        [normal(2, 3, 4)],
    ),
    Case(
        "unfold_conv",
        lambda: nn.Sequential(nn.Unfold(2), nn.Linear(6, 3), nn.GELU(), nn.Conv1d(8, 2, 1)),
        [normal(2, 3, 4)],
        loss=lambda model, batch: F.softplus(model(*batch)).flatten(1).sum(1),
    ),
]

CASES = [*LINEAR, *CONVOLUTION, *EMBEDDING, *NORM, *OTHER]
