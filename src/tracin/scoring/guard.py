"""The user's model while it is scored: eval mode, a checkpoint's weights, and everything back as it was.

Each parameter and buffer points at a working copy inside the ``with`` block, so the user's own tensors are never
written to. On the way out, also after an error or Ctrl-C, the tensors, attributes, modes, ``requires_grad``, hooks and
random states are those of before.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tracin.checkpoints import Checkpoint, fit
from tracin.errors import ModelError, OptionError
from tracin.scoring.arithmetic import full_float32
from tracin.scoring.memory import freed_memory_kept
from tracin.scoring.tree import Tree, tree_of

__all__ = ["LoadedModel", "device_of", "guarded"]

_TABLES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class LoadedModel:
    """The model on its device, ready to take one checkpoint after another."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self._working: dict[str, Tensor] = {}
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def nbytes(self) -> int:
        """Memory of one checkpoint's parameters and buffers, tied ones once."""
        tensors = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def load(self, checkpoint: Checkpoint, place: int | None = None) -> None:
        """Put a checkpoint's weights and buffers into the model.

        Args:
            checkpoint: One of the trajectory.
            place: Its place there, to keep its tensors on the device for when it is loaded again.

        Raises:
            CheckpointError: It does not fit the model.
        """
        if not self._working:
            self._working = _by_name(self.model)
        state = None if place is None else self._kept.get(place)
        if state is None:
            state = self._fitted(checkpoint)
            if place is not None:
                self._kept[place] = [(working, value.to(working.device)) for working, value in state]
        with torch.no_grad():
            for working, value in state:
                working.copy_(value)

    def forget(self) -> None:
        """Keep no checkpoint's tensors any longer."""
        self._kept.clear()

    def _fitted(self, checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
        """Each working tensor, tied ones once, with what the checkpoint has for it."""
        found = fit(checkpoint, self.model)
        return [*{id(self._working[name]): (self._working[name], found[name]) for name in found}.values()]


def device_of(model: nn.Module, device: str | torch.device) -> torch.device:
    """The device to score on: ``"auto"`` is where the model lies, or the GPU if it lies on the CPU and there is one.

    Args:
        model: The user's model.
        device: ``"auto"`` or a device.

    Returns:
        The device.

    Raises:
        OptionError: There is no such device.
    """
    if device != "auto":
        if str(device) == "meta":
            raise OptionError("device 'meta' holds no numbers. Choose 'cpu' or an accelerator.")
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    here = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if here.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return here


def refuse_mixing_layers(model: nn.Module, tree: Tree) -> None:
    """Refuse layers whose rows mix in eval mode, before anything is run.

    Args:
        model: The user's model.
        tree: What it is made of.

    Raises:
        ModelError: Batch norm without running statistics, an embedding whose gradient depends on the batch, or TorchScript.
    """
    for parameter in tree.parameters:
        if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta:
            name = next(name for name, found in model.named_parameters() if found is parameter)
            what = (
                "was not initialised"
                if isinstance(parameter, nn.UninitializedParameter)
                else "is on the meta device"
            )
            raise ModelError(
                f"the parameter {name} {what}, so it holds no numbers. Run the model once, or build it on a real device."
            )
    for name, module in tree.modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is a TorchScript module, which runs without hooks and cannot be traced. Give the Python "
                "module that it was scripted from, with its state_dict as the checkpoint."
            )
        if isinstance(module, _BatchNorm) and (module.running_mean is None or module.running_var is None):
            raise ModelError(
                f"{name or 'the model'} is a {type(module).__name__} without running statistics: it mixes the rows of a batch "
                "even in eval mode, so no row has a gradient of its own. Train with track_running_stats=True, or use GroupNorm."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
            raise ModelError(
                f"{name or 'the model'} has scale_grad_by_freq=True: a row's gradient then depends on the other rows of the "
                "batch. Set it to False."
            )


def _seeds(device: torch.device) -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    if device.type == "cuda":
        torch.cuda.init()  # seeds that wait for it are set now, so that the state below is what the user will find
    cuda = (
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None, cuda, mps


def _restore_seeds(states: tuple[Any, ...]) -> None:
    cpu, python, numpy_state, cuda, mps = states
    torch.set_rng_state(cpu)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if mps is not None:
        torch.mps.set_rng_state(mps)


class _Snapshot:
    """What a module tree looked like: attributes, tables of parameters, buffers, children and hooks, and tensors."""

    def __init__(self, tree: Tree) -> None:
        self._modules = []
        for _, module in tree.modules:
            tables = {name: dict(module.__dict__[name]) for name in _TABLES if name in module.__dict__}
            self._modules.append((module, dict(module.__dict__), tables))
        tensors = [*tree.parameters, *tree.buffers]
        self._tensors = [(tensor, tensor.data, tensor.requires_grad, tensor.grad) for tensor in tensors]

    def restore(self) -> None:
        for module, attributes, tables in self._modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, table in tables.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(table)
        for tensor, data, requires_grad, grad in self._tensors:
            tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad


def _work_on_copies(tree: Tree, device: torch.device) -> None:
    """Point every parameter and buffer at a copy on the device."""
    for tensor in (*tree.parameters, *tree.buffers):
        tensor.data = tensor.data.to(device=device, copy=True)


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    """What parameters and buffers point at, by every name that they have; tied ones are one tensor."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    working = {id(tensor): tensor.data for _, tensor in named}
    return {name: working[id(tensor)] for name, tensor in named}


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled modules without their compiled code, whose graphs do not see hooks."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def guarded(model: nn.Module, device: str | torch.device = "auto") -> Iterator[LoadedModel]:
    """The model in eval mode on ``device``, given back bit-identical; another thread that asks for it waits.

    Args:
        model: The user's model.
        device: ``"auto"`` or a device.

    Yields:
        The model, to load checkpoints into.

    Raises:
        ModelError: A layer mixes rows in eval mode.
    """
    lock = _lock_of(model)
    with lock, freed_memory_kept(), torch.inference_mode(False), torch.enable_grad():
        tree = tree_of(model)
        refuse_mixing_layers(model, tree)
        target = device_of(model, device)
        snapshot, seeds = _Snapshot(tree), _seeds(target)
        cudnn = torch.backends.cudnn.enabled
        try:
            _work_on_copies(tree, target)
            model.eval()
            # cuDNN's recurrent layers have no backward pass in eval mode.
            if any(isinstance(module, nn.RNNBase) for _, module in tree.modules):
                torch.backends.cudnn.enabled = False
            with _eager(), full_float32(target):
                yield LoadedModel(model, target)
        finally:
            torch.backends.cudnn.enabled = cudnn
            snapshot.restore()
            _restore_seeds(seeds)


# One thread at a time scores a model: its weights are those of a checkpoint meanwhile.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _lock_of(model: nn.Module) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())
