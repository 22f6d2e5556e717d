"""From a file, or from what ``torch.save`` held, to named tensors. Nothing in a file is ever run."""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints.names import plain_names
from tracin.errors import CheckpointError
from tracin.files import read_tensors, require_file

__all__ = [
    "EXTRA_STATE",
    "HEADER",
    "Snapshot",
    "find_state",
    "log",
    "read_state",
    "require_tensor",
    "snapshot",
    "storage_place",
    "tidy",
]

log = logging.getLogger("tracin")

HEADER = "tracin"  # the key in the header of a safetensors file, where the recorder puts ties and a digest
EXTRA_STATE = "_extra_state"  # torch's name for what is no tensor
WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_state(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a checkpoint file under the plain model's names.

    Args:
        path: A safetensors file, or what ``torch.save`` wrote.
        key: Where the state is inside a ``torch.save`` file; dots go deeper.

    Returns:
        The tensors on the CPU, and a sentence for each thing that was tidied.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, or holds no state; the message names it.
    """
    if path.suffix.lower() != ".safetensors":
        return tidy(find_state(_read_pickled(path), key, str(path)), str(path))
    if key is not None:
        raise CheckpointError(f"{path}: a safetensors file holds one flat state; leave key={key!r} out.")
    tensors, header = read_tensors(path, error=CheckpointError)
    try:
        aliases = json.loads(header.get(HEADER, "{}")).get("aliases", {})
        tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    except (ValueError, AttributeError, KeyError) as cause:
        raise CheckpointError(f"{path} names tied tensors that it does not hold: save it again.") from cause
    return tidy(tensors, str(path))


def tidy(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A new mapping under the plain model's names.

    Args:
        state: Names and tensors, left as they are.
        where: What to call the state in an error.

    Returns:
        The tensors, detached, and a sentence for each thing that was tidied.

    An entry that is not a dense tensor with data raises ``CheckpointError``.
    """
    tensors = {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}
    for name, value in tensors.items():
        require_tensor(name, value, where)
    plain, notes = plain_names(tensors)
    extra = len(state) - len(tensors)
    if extra:
        notes = (*notes, f"left out {extra} entries named {EXTRA_STATE!r}, which are no tensors")
    return {plain[name]: value.detach() for name, value in tensors.items()}, notes


def require_tensor(name: str, value: Any, where: str) -> None:
    """Refuse what is not a dense tensor with data.

    Args:
        name: The entry's name.
        value: What stands there.
        where: What to call the state.

    Raises:
        CheckpointError: It is something else; the message names the entry.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{where}: {name!r} is a {type(value).__name__}, not a tensor. Give model.state_dict(), or key=… "
            "where the state is inside a larger dict."
        )
    if value.is_meta or value.layout != torch.strided:
        what = "on the meta device, without data" if value.is_meta else f"of layout {value.layout}"
        raise CheckpointError(f"{where}: {name!r} is {what}: give dense tensors.")


class Snapshot(dict[str, Any]):
    """A copy of a state that nobody else writes to."""

    __slots__ = ()


def snapshot(state: Mapping[str, Tensor], where: str) -> Snapshot:
    """Copy a state to the CPU, so that training on does not change it; tied tensors stay tied.

    Args:
        state: Names and tensors, left as they are.
        where: What to call the state in an error.

    Returns:
        The copy.

    Raises:
        CheckpointError: The state is empty, or an entry is not a tensor.
    """
    tidy(state, where)
    copies: dict[tuple[Any, ...], Tensor] = {}
    result = Snapshot()
    for name, value in state.items():
        if name.endswith(EXTRA_STATE):
            result[name] = value
            continue
        place = storage_place(value)
        if place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        result[name] = copies[place]
    return result


def storage_place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share when they are one: device, memory, offset, shape and strides."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    memory = tensor.untyped_storage().data_ptr()
    return (tensor.device, memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def find_state(content: Any, key: str | None, where: str) -> Mapping[str, Tensor]:
    """Find the state inside what was saved.

    Args:
        content: A state, or a dict that holds one as ``state_dict``, ``model_state_dict`` or ``model``.
        key: Where to look instead; dots go deeper.
        where: What to call the content in an error.

    Returns:
        The mapping from names to tensors, as it was found.

    Raises:
        CheckpointError: There is no state, or more than one.

    Example:
        >>> list(find_state({"epoch": 3, "model": {"weight": torch.zeros(2)}}, None, "run.pt"))
        ['weight']
    """
    if key is not None:
        return find_state(_descend(content, key, where), None, f"{where}[{key!r}]")
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{where} holds a {type(content).__name__}, not named tensors: save model.state_dict() instead."
        )
    if not _odd(content):
        return content
    found = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
    if len(found) == 1:
        return find_state(content[found[0]], None, f"{where}[{found[0]!r}]")
    what = f"{len(found)} states" if found else "no state of a model"
    odd = next((f"; its {name!r} is a {type(value).__name__}" for name, value in _odd(content)), "")
    raise CheckpointError(
        f"{where} holds {what} (it has {_keys(content)}{odd}): say which with key=…, or save model.state_dict()."
    )


def _odd(content: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """What is neither a tensor nor torch's extra state."""
    entries = content.items()
    return [(k, v) for k, v in entries if not (isinstance(v, Tensor) or str(k).endswith(EXTRA_STATE))]


def _keys(content: Any) -> str:
    return ", ".join(repr(name) for name in list(content)[:10]) if isinstance(content, Mapping) else "no keys"


def _descend(content: Any, key: str, where: str) -> Any:
    if isinstance(content, Mapping) and key in content:
        return content[key]
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            raise CheckpointError(f"{where} has no {key!r}: at {part!r} it has {_keys(content)}.")
        content = content[part]
    return content


def _read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, through torch's unpickler that makes tensors and runs nothing."""
    require_file(path, CheckpointError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old protocols and TorchScript: what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}. Check its permissions.") from cause
    except pickle.UnpicklingError as cause:
        named = re.search(r"GLOBAL ([\w.]+)", str(cause))
        if named is None:
            raise _not_tensors(path, cause) from cause
        raise CheckpointError(
            f"{path} would run {named[1]} when unpickled, so it was not read: tracin opens tensors only. "
            "Where it was made, save model.state_dict() instead, best as safetensors."
        ) from cause
    except Exception as cause:
        raise _not_tensors(path, cause) from cause


def _not_tensors(path: Path, cause: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a file of tensors that torch.load(weights_only=True) reads, or is cut short "
        f"({type(cause).__name__}). Save model.state_dict() again, best as safetensors."
    )
