"""Class names: texts, of which no two are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["problem_of", "unique_names"]


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names; those that occur twice with their number, so that a name stands for one class.

    Args:
        names: A name per class.

    Returns:
        Names that differ.

    Example:
        >>> unique_names(["cat", "dog", "cat"])
        ('cat (0)', 'dog', 'cat (2)')
    """
    listed = [str(name) for name in names]
    # A number may make a name that is there already, such as "cat (0)": that one gets its number too. Names with numbers
    # differ, so there are fewer names without one after each turn.
    while len(set(listed)) < len(listed):
        listed = [name if listed.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(listed)]
    return tuple(listed)


def problem_of(names: Any) -> str | None:
    """Why something is no list of class names.

    Args:
        names: What the user gave.

    Returns:
        A sentence with the mend, which begins with "class_names"; None where they are names.

    Example:
        >>> problem_of(["cat", 7])
        "class_names[1] is 7, an int: give texts, such as '7'. A number stands for the class of that number."
        >>> problem_of(["cat", "dog"]) is None
        True
    """
    listed = hasattr(names, "__iter__") and hasattr(names, "__len__")
    if not listed or isinstance(names, str | bytes | Mapping | set | frozenset):
        return f"class_names is a {type(names).__name__}: give a list with the name of each class."
    for at, name in enumerate(names):
        if not isinstance(name, str):
            kind = type(name).__name__
            article = "an" if kind[0] in "aeiouAEIOU" else "a"
            return (
                f"class_names[{at}] is {name!r}, {article} {kind}: give texts, such as '{name}'. A number stands for the "
                "class of that number."
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            return (
                f"class_names[{at}] is {name!r}, which holds half of a surrogate pair and cannot be written as UTF-8: "
                "decode the names rightly, or replace it."
            )
    return None
