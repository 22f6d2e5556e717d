"""Parameter names without what wrappers put before them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["COMPILED", "PARALLEL", "bare", "plain_names"]

PARALLEL = "module."  # DataParallel and DistributedDataParallel
COMPILED = "_orig_mod."  # torch.compile, also of a submodule


def bare(name: str) -> str:
    """The name without any wrapper's part.

    Args:
        name: A parameter's name.

    Returns:
        The name that the plain model uses, where ``module.`` came from a wrapper.

    Example:
        >>> bare("module._orig_mod.encoder._orig_mod.weight")
        'encoder.weight'
    """
    name = name.replace(COMPILED, "")
    while name.startswith(PARALLEL):
        name = name.removeprefix(PARALLEL)
    return name


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove ``_orig_mod.`` wherever it stands, and ``module.`` where every name starts with it.

    Args:
        names: All the names of a state.

    Returns:
        name → plain name, and a sentence for each prefix that went. Where two names would become one,
        nothing is removed.

    Example:
        >>> plain_names(["module.weight", "module.bias"])
        ({'module.weight': 'weight', 'module.bias': 'bias'}, ("removed the prefix 'module.' from 2 names",))
        >>> plain_names(["module.weight", "head.weight"])[1]
        ()
    """
    same = {name: name for name in names}
    plain, notes = dict(same), []
    compiled = sum(COMPILED in name for name in plain)
    if compiled:
        plain = {name: now.replace(COMPILED, "") for name, now in plain.items()}
        notes.append(f"removed the prefix {COMPILED!r} from {compiled} names")
    if plain and all(now.startswith(PARALLEL) for now in plain.values()):
        while all(now.startswith(PARALLEL) for now in plain.values()):
            plain = {name: now.removeprefix(PARALLEL) for name, now in plain.items()}
        notes.append(f"removed the prefix {PARALLEL!r} from {len(plain)} names")
    if len(set(plain.values())) != len(plain):
        return same, ()
    return plain, tuple(notes)
