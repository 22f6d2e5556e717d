"""What the last layer of a classifier sees: the inputs of a named module, and the head whose output is the logits.

Axis letters: n rows · d features · C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracin.checkpoints import Checkpoint
from tracin.checksums import Passes, refuse_unsteady
from tracin.data import Batch, BatchSize, RowSource, open_rows, to_device, user_code
from tracin.errors import DataError, LossError, ModelError, NotFiniteError, OptionError
from tracin.gradients.agreement import tolerance
from tracin.scoring.evaluation import checked_outputs
from tracin.scoring.guard import guarded
from tracin.scoring.memory import parse_memory
from tracin.shapes import Float, Int
from tracin.tasks import Task

__all__ = [
    "HeadRows",
    "LayerRows",
    "called",
    "find_head",
    "last_linear",
    "layer_rows",
    "one_call",
    "refuse_no_classes",
    "refuse_too_large",
    "see_head",
]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Some rows as the head sees them, in the model's dtype: its input and output, and the label of each row."""

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n C"]
    labels: Int[Tensor, " n"]


@dataclass
class Call:
    """One call of a module."""

    input: Any
    output: Any


@contextmanager
def called(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of a module inside the ``with`` block.

    Args:
        module: Any module.

    Yields:
        A list that grows; an input is the first argument, however it was named.
    """
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(next(iter((*args, *kwargs.values())), None), output))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def last_linear(model: nn.Module) -> str | None:
    """The name of the last ``Linear`` in the order in which the model holds its modules; None where there is none."""
    return next(reversed(_linear_layers(model)), None)


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def find_head(model: nn.Module, name: str | None, owner: str) -> tuple[str, nn.Linear]:
    """The head by its name.

    Args:
        model: The model.
        name: The name; None: that of the last ``Linear``.
        owner: The method, for messages.

    Returns:
        The name and the layer.

    Raises:
        OptionError: No such module, or not a ``Linear``; those that exist are named.
    """
    layers = _linear_layers(model)
    told = ", ".join(repr(layer) for layer in layers[-8:]) or "none"
    name = last_linear(model) if name is None else name
    if name is None:
        raise OptionError(
            f"{owner}: the model {type(model).__name__} has no Linear layer, so it has no head."
        )
    modules = dict(model.named_modules())
    if name not in modules:
        raise OptionError(f"{owner}: there is no module {name!r}. The Linear layers are {told}.")
    module = modules[name]
    if not isinstance(module, nn.Linear):
        raise OptionError(
            f"{owner}: {name!r} is a {type(module).__name__}, and the head must be a Linear. The Linear layers are {told}."
        )
    return name, module


def refuse_no_classes(task: Task, owner: str) -> None:
    """Refuse a task that has no logits and labels.

    Args:
        task: The task.
        owner: The method, for the message.

    Raises:
        OptionError: It has no ``outputs``.
    """
    if task.outputs is None:
        raise OptionError(
            f"{owner} needs the logits and labels of a classifier, and this task has none. Use a ready-made "
            "classification loss, or give Task(outputs=lambda model, batch: (logits [n, C], labels [n]))."
        )


def see_head(task: Task, head: nn.Linear, name: str, batch: Batch, value: Any, where: str) -> HeadRows:
    """A batch as the head sees it, with the proof that the head's output is the logits.

    Args:
        task: Model and ``outputs``; the model holds a checkpoint.
        head: The layer.
        name: Its name.
        batch: Where the rows stand.
        value: The batch on the device.
        where: Checkpoint and data source, for messages.

    Returns:
        The rows, on the device.

    Raises:
        ModelError: The layer is not the last one: its output is not the logits, or it is not called once per row.
        NotFiniteError: A feature or a logit is NaN or infinite.
        DataError: A label without a logit.
    """
    assert task.outputs is not None
    with called(head) as calls, user_code("outputs", batch.rows, where), torch.no_grad():
        pair = task.outputs(task.model, value)
    logits, labels = checked_outputs(pair, batch.size)
    found = one_call(calls, name, batch.size)
    output = found.output
    same = output.shape == logits.shape and torch.allclose(
        output.cpu().double(), logits.double(), rtol=0, atol=0, equal_nan=True
    )
    if not same:
        raise ModelError(
            f"the output {list(output.shape)} of {name!r} is not the logits {list(logits.shape)} of the task: it is not the last "
            "layer, or something is done to its output. Name the Linear whose output, one number per class, is the prediction."
        )
    for what, tensor in (("features", found.input), ("logits", output)):
        finite = tensor.isfinite().all(1)
        if not bool(finite.all()):
            row = batch.rows[int((~finite).nonzero()[0])]
            raise NotFiniteError(
                f"the {what} of row {row} are not finite ({where}): look at this row's input."
            )
    outside = (labels < 0) | (labels >= logits.shape[1])
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise DataError(
            f"row {batch.rows[at]} has the label {int(labels[at])}, and the head has {logits.shape[1]} outputs ({where})."
        )
    _refuse_other_product(head, name, found)
    return HeadRows(found.input, output, labels.to(output.device))


def one_call(calls: list[Call], name: str, n: int) -> Call:
    """The one call of the head on a batch of n rows; more, none or other shapes are a ``ModelError``."""
    shapes = [list(call.output.shape) for call in calls if isinstance(call.output, Tensor)]
    if len(calls) != 1 or len(shapes) != 1:
        raise ModelError(
            f"{name!r} was called {len(calls)} times for one prediction; the head must be called once, and return a tensor."
        )
    (call,) = calls
    if not isinstance(call.input, Tensor) or call.input.dim() != 2 or shapes[0][0] != n:
        raise ModelError(
            f"{name!r} gave {shapes[0]} for {n} rows: the head must see one vector per row, [n, d], and give [n, C]."
        )
    return call


def _refuse_other_product(head: nn.Linear, name: str, call: Call) -> None:
    """A subclass of Linear may compute something else than W f + b."""
    expected = F.linear(call.input, head.weight, head.bias).detach()
    error = float((expected - call.output).double().norm() / expected.double().norm().clamp_min(1e-30))
    if error > tolerance(call.output.dtype):
        raise ModelError(
            f"{name!r} is a {type(head).__name__} whose output is not weight · input + bias (relative difference {error:.1e}): "
            "the head must be a plain Linear."
        )


def refuse_too_large(held: int, batch: Batch, rows: RowSource, memory: int) -> None:
    """Refuse rows whose features do not fit, as soon as a batch says so.

    Args:
        held: Bytes held after the batch.
        batch: The batch.
        rows: Its source.
        memory: Bytes allowed.

    Raises:
        OptionError: They do not fit; the message tells what all rows would take.
    """
    if held > memory:
        share = held / (batch.start + batch.size) * len(rows)
        raise OptionError(
            f"the features of {len(rows)} {rows.name} rows take {share / 2**30:.2g} GiB, and memory= allows "
            f"{memory / 2**30:.2g} GiB. Raise it, or take fewer rows."
        )


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The input of a module for every row, on the CPU, and the rows' labels where the task has ``outputs``."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"] | None


def layer_rows(
    task: Task,
    checkpoint: Checkpoint,
    data: Any,
    *,
    layer: str | None = None,
    name: str = "train",
    batch_size: BatchSize = "auto",
    collate: Callable[[list], Any] | None = None,
    device: str | torch.device = "auto",
    memory: str | int = "2GiB",
) -> LayerRows:
    """The input of a module and the label of every row, in one pass: by default the features that the last ``Linear`` sees.

    Args:
        task: Model and loss.
        checkpoint: Whose weights.
        data: Rows, as the verbs of a method take them.
        layer: The module's name; None: the last ``Linear``.
        name: What the rows are called in messages.
        batch_size: Rows per batch.
        collate: For a dataset.
        device: Where to run.
        memory: Bound on the features, which are held twice while they are put together.

    Returns:
        One vector per row, on the CPU; what has more dimensions is laid out flat.

    Raises:
        OptionError: There is no such module, or the features exceed ``memory``.
        LossError: The module does not see one tensor [n, ...] per batch.
        DataError: A row comes back different when it is read again.
        UserCodeError: The model or the dataset fails.
    """
    modules = dict(task.model.named_modules())
    layer = find_head(task.model, None, "layer_rows")[0] if layer is None else layer
    if layer not in modules:
        raise OptionError(f"there is no module {layer!r}. The last ones are {', '.join(list(modules)[-8:])}.")
    rows = open_rows(data, name=name, batch_size=batch_size, collate=collate)
    allowed, passes = parse_memory(memory), Passes()
    features, labels, held = [], [], 0
    with guarded(task.model, device) as loaded, torch.no_grad():
        loaded.load(checkpoint)
        for batch in rows.batches():
            if batch.start == 0:
                refuse_unsteady(rows, batch)
            passes.check(rows, batch)
            value = to_device(batch.value, loaded.device, copy=True)
            found = _seen_by(task, modules[layer], layer, batch, value, f"{name}, {checkpoint.name}")
            held += 2 * found.features.nbytes
            refuse_too_large(held, batch, rows, allowed)
            features.append(found.features)
            labels.append(found.labels)
    known = [some for some in labels if some is not None]
    return LayerRows(torch.cat(features), torch.cat(known) if known else None)


def _seen_by(task: Task, module: nn.Module, name: str, batch: Batch, value: Any, where: str) -> LayerRows:
    """What a module sees of a batch, and its labels."""
    run: Any = task.outputs or task.loss
    with called(module) as calls, user_code("the model", batch.rows, where):
        pair = run(task.model, value)
    seen = [call.input for call in calls]
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].shape[:1] != (batch.size,):
        shapes = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in seen]
        raise LossError(
            f"{name!r} saw {shapes or 'nothing'} for {batch.size} rows ({where}). Name a module that is called once, "
            "on a tensor [n, ...]."
        )
    labels = None if task.outputs is None else checked_outputs(pair, batch.size)[1]
    return LayerRows(seen[0].detach().reshape(batch.size, -1).cpu(), labels)
