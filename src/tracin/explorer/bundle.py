"""The page's files as one script and one style: its ES modules in the order of their imports, each a function of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tracin.errors import ResultError

__all__ = ["bundled", "module_of"]

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w-]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|class|const) (\w+)", re.MULTILINE)
_LEFT = re.compile(r"^(?:import|export)\b.*$", re.MULTILINE)


def bundled(entry: str, read: Callable[[str], str]) -> str:
    r"""A module and what it imports as one script.

    The modules keep to two forms: ``import { a, b } from "./name.js";`` and ``export`` before a function, a class or a
    constant.

    Args:
        entry: The module that runs, without ``.js``.
        read: The text of a module by its name, without ``.js``.

    Returns:
        A script that imports nothing.

    Raises:
        ResultError: A module imports or exports in another form, or the imports go in a circle.

    Example:
        >>> files = {
        ...     "main": 'import { two } from "./numbers.js";\nshow(two);\n',
        ...     "numbers": "export const two = 2;\n",
        ... }
        >>> print(bundled("main", files.__getitem__))
        const from_numbers = (() => {
        const two = 2;
        return { two };
        })();
        (() => {
        const { two } = from_numbers;
        show(two);
        })();
    """
    parts: list[str] = []
    _add(entry, read, parts, done=set(), above=())
    return "\n".join(parts)


def _add(
    name: str, read: Callable[[str], str], parts: list[str], *, done: set[str], above: tuple[str, ...]
) -> None:
    if name in above:
        raise ResultError(f"the page's modules import each other in a circle: {' → '.join((*above, name))}.")
    if name in done:
        return
    done.add(name)
    text = read(name)
    for _, other in _IMPORT.findall(text):
        _add(other, read, parts, done=done, above=(*above, name))
    exported = [found[1] for found in _EXPORT.findall(text)]
    body = _IMPORT.sub(
        lambda found: f"const {{{found[1]}}} = from_{_identifier(found[2])};\n",
        _EXPORT.sub(r"\1 \2", text),
    )
    left = _LEFT.search(body)
    if left is not None:
        raise ResultError(f"{name}.js: {left[0]!r} is no import or export that can be put into one file.")
    head = f"const from_{_identifier(name)} = " if above else ""
    tail = f"return {{ {', '.join(exported)} }};\n" if exported else ""
    parts.append(f"{head}(() => {{\n{body}{tail}}})();")


def _identifier(name: str) -> str:
    return name.replace("-", "_")


def module_of(folder: Path) -> Callable[[str], str]:
    """Reads the modules of a folder.

    Args:
        folder: Where they lie.

    Returns:
        The text of a module by its name.
    """
    return lambda name: (folder / f"{name}.js").read_text(encoding="utf-8")
