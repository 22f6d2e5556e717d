"""Ready-made per-example losses: one number per row, never a batch mean.

A batch is ``(inputs, targets)``. A dict is read by key: the targets under ``targets``, ``labels``,
``label``, ``target`` or ``y``; the model gets the entry ``inputs``, ``input``, ``x``, ``images`` or
``image`` if there is one, else all other entries as keyword arguments. A model may return a tensor, a
tuple whose first entry is the prediction, or anything with ``logits``.

Each loss brings ``outputs(model, batch) -> (logits [n, C], labels [n])`` where it has classes: that is
what margins, suggestions and predicted targets are read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracin.errors import DataError, LossError
from tracin.shapes import Float, Int, Shaped

__all__ = ["binary_cross_entropy", "cross_entropy", "mean_squared_error"]

_TARGET_KEYS = ("targets", "labels", "label", "target", "y")
_INPUT_KEYS = ("inputs", "input", "x", "images", "image")


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """``(inputs, targets)`` of a batch; the inputs of a dict without an input key stay a dict.

    Args:
        batch: A pair, or a mapping with a target key.

    Returns:
        The inputs and the targets.

    Raises:
        DataError: Neither.
    """
    if isinstance(batch, Mapping):
        target_key = next((key for key in _TARGET_KEYS if key in batch), None)
        if target_key is None:
            raise DataError(
                f"the batch has the keys {sorted(map(str, batch))}: none is a target key ({', '.join(_TARGET_KEYS)}). "
                "Rename one, or write your own loss(model, batch)."
            )
        input_key = next((key for key in _INPUT_KEYS if key in batch), None)
        if input_key is not None:
            return batch[input_key], batch[target_key]
        return {key: value for key, value in batch.items() if key != target_key}, batch[target_key]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"a ready-made loss takes a batch (inputs, targets) or a dict; this one is a {type(batch).__name__}"
        f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}. Write your own loss(model, batch)."
    )


def predict(model: nn.Module, inputs: Any) -> Tensor:
    """The model's prediction for the inputs, unpacked from a tuple, a dict or an object with ``logits``."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise LossError(
        f"the model returned a {type(output).__name__} without 'logits': write your own loss(model, batch)."
    )


def _class_logits(model: nn.Module, batch: Any) -> tuple[Float[Tensor, "n C"], Shaped[Tensor, "n ..."]]:
    inputs, targets = split_batch(batch)
    logits = predict(model, inputs)
    if logits.dim() != 2:
        raise LossError(
            f"losses.cross_entropy needs logits [n, C]; the model returned {list(logits.shape)}. For tokens or pixels "
            "write a loss(model, batch) that sums or averages over each row's positions."
        )
    return logits, targets


def cross_entropy(model: nn.Module, batch: Any) -> Float[Tensor, " n"]:
    r"""Softmax cross-entropy of each row, in nats: :math:`\ell_i = -\log p(y_i \mid x_i)`.

    Args:
        model: Returns logits [n, C].
        batch: Inputs, and class numbers [n] or class probabilities [n, C].

    Returns:
        One loss per row, [n].

    Example:
        >>> model = nn.Linear(2, 3)
        >>> cross_entropy(model, (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))).shape
        torch.Size([4])
    """
    logits, targets = _class_logits(model, batch)
    return F.cross_entropy(logits, targets, reduction="none")


def _cross_entropy_outputs(model: nn.Module, batch: Any) -> tuple[Float[Tensor, "n C"], Int[Tensor, " n"]]:
    logits, targets = _class_logits(model, batch)
    return logits, targets.argmax(-1) if targets.is_floating_point() else targets


def _same_shape(prediction: Tensor, targets: Tensor, name: str) -> Tensor:
    if prediction.shape == targets.shape:
        return prediction
    if prediction.shape[:1] == targets.shape[:1] and prediction.numel() == targets.numel():
        return prediction.reshape(targets.shape)
    raise LossError(
        f"losses.{name}: the prediction {list(prediction.shape)} and the targets {list(targets.shape)} differ in shape."
    )


def mean_squared_error(model: nn.Module, batch: Any) -> Float[Tensor, " n"]:
    r"""Squared error of each row, the mean over its outputs: :math:`\ell_i = \frac1o \lVert f(x_i) - y_i \rVert^2`.

    Args:
        model: Returns predictions of the targets' shape, or [n, 1] for targets [n].
        batch: Inputs and targets.

    Returns:
        One loss per row, [n], in squared units of the target.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> mean_squared_error(model, (torch.zeros(4, 2), torch.ones(4))).shape
        torch.Size([4])
    """
    inputs, targets = split_batch(batch)
    prediction = _same_shape(predict(model, inputs), targets, "mean_squared_error")
    return (prediction - targets.to(prediction.dtype)).square().reshape(len(prediction), -1).mean(1)


def _binary_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = split_batch(batch)
    logits = _same_shape(predict(model, inputs), targets, "binary_cross_entropy")
    return logits, targets.to(logits.dtype)


def binary_cross_entropy(model: nn.Module, batch: Any) -> Float[Tensor, " n"]:
    r"""Sigmoid cross-entropy of each row's logits, the mean over its labels, in nats.

    Args:
        model: Returns logits [n], [n, 1] or [n, labels].
        batch: Inputs, and targets in [0, 1] of the same shape.

    Returns:
        One loss per row, [n].

    Example:
        >>> model = nn.Linear(2, 1)
        >>> binary_cross_entropy(model, (torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))).shape
        torch.Size([4])
    """
    logits, targets = _binary_logits(model, batch)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.reshape(len(losses), -1).mean(1)


def _binary_outputs(model: nn.Module, batch: Any) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
    logits, targets = _binary_logits(model, batch)
    if logits.numel() != len(logits):
        raise LossError(
            "several labels per row have no single predicted class: give Task(outputs=...) of your own."
        )
    flat = logits.reshape(-1)
    return torch.stack([torch.zeros_like(flat), flat], 1), (targets.reshape(-1) > 0.5).long()


cross_entropy.outputs = _cross_entropy_outputs  # type: ignore[attr-defined]
binary_cross_entropy.outputs = _binary_outputs  # type: ignore[attr-defined]
