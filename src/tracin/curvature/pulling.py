"""Products of several vectors with a Jacobian at once, by autograd under vmap where it can, one by one where it cannot."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracin.errors import ModelError

__all__ = ["Puller", "twice", "twice_in_loss"]

logger = logging.getLogger("tracin")

# How PyTorch says that an operation has no second derivative.
_SAID = ("derivative for", "does not require grad", "differentiate twice")


def _said(error: RuntimeError) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _has_none(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _SAID)


@contextmanager
def twice() -> Iterator[None]:
    """Attention in plain matrix products, which can be differentiated twice; the fused kernels cannot.

    Yields:
        Nothing.

    Raises:
        ModelError: An operation of the model has no second derivative.
        RuntimeError: Any other, as it is.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if _has_none(error):
            raise ModelError(
                f"the model or the loss cannot be differentiated twice: {_said(error)}. Use solver='ekfac', "
                "which needs first derivatives of the model only, or another implementation of that layer or loss."
            ) from error
        raise


@contextmanager
def twice_in_loss() -> Iterator[None]:
    """Where the slope of the loss in the model's output is differentiated.

    Yields:
        Nothing.

    Raises:
        ModelError: The loss has no second derivative.
        RuntimeError: Any other, as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if _has_none(error):
            raise ModelError(
                f"the loss has no second derivative in the model's output: {_said(error)}. Write the loss with "
                "operations that can be differentiated twice, or use one of tracin.losses."
            ) from error
        raise


class Puller:
    """Σ_j (∂output_j/∂input)ᵀ v_j for k vectors at once; remembers whether vmap works for this model."""

    def __init__(self) -> None:
        self.batched = True

    def __call__(
        self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Pull vectors back; the graph is kept.

        Args:
            outputs: Tensors with a graph; those without one contribute nothing.
            inputs: What to differentiate by.
            vectors: One [k, *output shape] per output.

        Returns:
            One [k, *input shape] per input, None where no output depends on it.

        Raises:
            OutOfMemoryError: As it is, since going one by one would hide what is wrong.
        """
        pairs = [(y, v) for y, v in zip(outputs, vectors, strict=True) if y is not None and y.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        made, given = [y for y, _ in pairs], [v for _, v in pairs]
        if self.batched:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found = torch.autograd.grad(
                        made, inputs, given, retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                return list(found)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.info("curvature products go vector by vector: %s", str(error).splitlines()[0])
                self.batched = False
        return self._one_by_one(made, inputs, given)

    @staticmethod
    def _one_by_one(
        made: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor]
    ) -> list[Tensor | None]:
        rows = [
            torch.autograd.grad(made, inputs, [v[at] for v in given], retain_graph=True, allow_unused=True)
            for at in range(len(given[0]))
        ]
        columns = [[row[at] for row in rows] for at in range(len(inputs))]
        out: list[Tensor | None] = []
        for column in columns:
            present = [value for value in column if value is not None]
            out.append(torch.stack(present) if len(present) == len(rows) else None)
        return out
