"""Whether what a kept folder holds is what the pages read: looked at when it is loaded, not when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tracin.audit import Audit
from tracin.errors import ResultError
from tracin.explorer.entries import json_of, short
from tracin.explorer.faces import Face

__all__ = ["check_explained", "check_face", "check_study", "check_values"]

PNG = b"\x89PNG\r\n\x1a\n"
_AGAIN = "The folder is damaged: keep it again."
_TRUST = {"coverage": dict, "verification": dict, "calibration": dict, "cutoff": dict, "cost": dict}


def check_study(told: Mapping[str, Any], audit: Audit) -> None:
    """Refuse names and facts that do not fit the audit.

    Args:
        told: What ``study.json`` says.
        audit: The audit.

    Raises:
        ResultError: Something is missing or of another form; the message names it.
    """
    _require(isinstance(told.get("title"), str), "title is no text")
    rows = told.get("rows")
    _require(isinstance(rows, dict), "rows is no JSON object")
    assert isinstance(rows, dict)
    for side in ("train", "test"):
        _require(_whole(rows.get(side)), f"rows.{side} is {short(rows.get(side))}, and no number of rows")
    _check_names(told.get("names"), audit)
    checkpoints = told.get("checkpoints")
    _require(isinstance(checkpoints, list), "checkpoints is no list")
    for checkpoint in checkpoints or ():
        good = isinstance(checkpoint, dict) and {"name", "step", "learning_rate"} <= set(checkpoint)
        _require(
            good and isinstance(checkpoint["name"], str) and all(map(_plain, checkpoint.values())),
            f"the checkpoint {short(checkpoint)} has no name, step and learning rate",
        )
    trust = told.get("trust")
    _require(isinstance(trust, dict), "trust is no JSON object")
    assert isinstance(trust, dict)
    for name, kind in _TRUST.items():
        _require(isinstance(trust.get(name), kind | None), f"trust.{name} is {short(trust.get(name))}")
    _require(_list_of(trust.get("notes"), _text), "trust.notes is no list of texts")


def _check_names(names: Any, audit: Audit) -> None:
    if audit.classes is None:
        _require(names is None, "names is given, and the audit has no classes")
        return
    _require(_list_of(names, _text), f"names is {short(names)}, and no list of texts")
    _require(len(names) == audit.classes, f"there are {len(names)} names for {audit.classes} classes")
    _require(len(set(names)) == len(names), "names has one twice")


def check_values(name: str, values: Tensor) -> None:
    """Refuse labels, predictions, confidences or losses of another kind.

    Args:
        name: What they are, such as ``train.labels``.
        values: They [n].

    Raises:
        ResultError: They are no such numbers.
    """
    numbers = name.endswith((".labels", ".predicted")) and values.dtype == torch.int64
    _require(numbers or values.dtype.is_floating_point, f"{name} holds {values.dtype}")


def check_face(face: Face, name: str) -> None:
    """Refuse a face that is not of its kind.

    Args:
        face: The face.
        name: Whose it is.

    Raises:
        ResultError: A picture is no PNG, or a table no list of pairs of texts.
    """
    if face.kind == "image":
        _require(face.data.startswith(PNG), f"the picture of {name} is no PNG")
    if face.kind == "table":
        try:
            rows = json_of(face.data)
        except ValueError as error:
            raise ResultError(f"the table of {name}: {error}. {_AGAIN}") from error
        _require(_list_of(rows, _pair), f"the table of {name} is no list of pairs of texts")


def check_explained(found: Mapping[str, Any], rows: Mapping[str, int]) -> None:
    """Refuse explanations that the page could not show.

    Args:
        found: By side and row, such as ``test/17``.
        rows: How many rows each side has.

    Raises:
        ResultError: One is of another form; the message names it.
    """
    for key, told in found.items():
        side, _, row = key.partition("/")
        good = side in rows and row.isascii() and row.isdigit() and len(row) < 16 and int(row) < rows[side]
        _require(good, f"{short(key)} is explained, and there is no such row")
        _require(isinstance(told, dict) and _card(told.get("query"), rows), f"{key} has no card")
        _require(
            _list_of(told.get("targets"), lambda target: _target(target, rows)),
            f"{key} has no targets that can be shown",
        )
        query = told["query"]
        _require((query["side"], query["row"]) == (side, int(row)), f"{key} explains another row")


def _target(target: Any, rows: Mapping[str, int]) -> bool:
    if not isinstance(target, dict) or not isinstance(target.get("name"), str | None):
        return False
    lists = all(
        _list_of(target.get(name), lambda card: _card(card, rows)) for name in ("proponents", "opponents")
    )
    return _text(target.get("kind")) and _text(target.get("words")) and lists and _path(target.get("path"))


def _path(path: Any) -> bool:
    """The loss along the checkpoints: lists of the same length."""
    if not isinstance(path, dict):
        return False
    lists = [path.get(name) for name in ("steps", "losses", "lowered", "raised", "checkpoints")]
    if not all(_list_of(values, _number) for values in lists[:-1]) or not _list_of(lists[-1], _plain):
        return False
    return len({len(values or ()) for values in lists}) == 1


def _card(card: Any, rows: Mapping[str, int]) -> bool:
    if not isinstance(card, dict) or card.get("side") not in rows or not _whole(card.get("row")):
        return False
    texts = all(isinstance(card.get(name), str | None) for name in ("label", "predicted"))
    numbers = all(_number(card.get(name)) for name in ("score", "confidence"))
    return card["row"] < rows[card["side"]] and texts and numbers and _face(card.get("face"))


def _face(face: Any) -> bool:
    if not isinstance(face, dict):
        return False
    if face.get("kind") == "image":
        # The page fetches what stands here: nothing but its own pictures.
        src = face.get("src")
        return isinstance(src, str) and src.startswith("face/") and ".." not in src and _text(face.get("alt"))
    if face.get("kind") == "table":
        return _list_of(face.get("rows"), _pair)
    return face.get("kind") == "text" and _text(face.get("text"))


def _list_of(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(good, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _pair(value: Any) -> bool:
    return _list_of(value, _text) and len(value) == 2


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float | None) and not isinstance(value, bool)


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _require(good: bool, problem: str) -> None:
    if not good:
        raise ResultError(f"{problem}. {_AGAIN}")
