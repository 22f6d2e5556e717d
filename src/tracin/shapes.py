"""Shapes in annotations, checked at run time by the tests and plain ``Tensor`` for users.

Axis letters used throughout: n train rows · m query rows · q queries in a result · c checkpoints ·
t, s uses of a layer within an example (tokens, pixels, calls) · i in-features · o out-features ·
p parameters · d projected features · C classes.

jaxtyping is a test dependency. Where it is not installed, ``Float[Tensor, "n t i"]`` is ``Tensor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Shaped
    except ImportError:

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[Any, ...]) -> Any:
                return item[0]

        Bool = Float = Int = Shaped = _Unchecked

__all__ = ["Bool", "Float", "Int", "Shaped"]
