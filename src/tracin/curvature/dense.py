"""The curvature as a matrix in float64, and solutions by Cholesky: for models of up to some thousand parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from tracin.curvature.columns import Columns
from tracin.curvature.operators import Curvature, product
from tracin.errors import NotFiniteError, OptionError
from tracin.gradients.blocks import tiles
from tracin.shapes import Float

__all__ = [
    "CholeskySolver",
    "bytes_of",
    "damping_error",
    "ends_of",
    "from_columns",
    "from_products",
    "refuse_too_large",
    "rounding_of",
]

# The matrix, its factor, and one temporary.
COPIES = 3
# Unit vectors per pass over the data.
COLUMNS = 256


def bytes_of(p: int) -> int:
    """Memory that a dense curvature of p parameters takes with its factor.

    Args:
        p: Parameters.

    Returns:
        Bytes.
    """
    return COPIES * 8 * p * p


def refuse_too_large(p: int, memory: int) -> None:
    """Refuse a matrix that does not fit.

    Args:
        p: Parameters.
        memory: The bound in bytes.

    Raises:
        OptionError: With the size and the alternatives.
    """
    if bytes_of(p) > memory:
        raise OptionError(
            f"solver='exact' holds the curvature of {p:,} parameters as a matrix: {8 * p * p / 2**30:,.1f} GiB, and "
            f"{bytes_of(p) / 2**30:,.1f} GiB with its factor, more than memory={memory / 2**30:,.1f} GiB. "
            "Use solver='ekfac' (fast, approximate) or solver='cg' (exact, slow), fewer parameters "
            "(Task(parameters='head.*')), or a larger memory=."
        )


def from_products(curvature: Curvature, block: int = COLUMNS) -> Float[Tensor, "p p"]:
    """C column by column: products with unit vectors, 256 a pass.

    Args:
        curvature: The matrix as products.
        block: Columns per pass over the data.

    Returns:
        The matrix, symmetric.
    """
    p = curvature.rows.vectors.size
    device = curvature.rows.vectors.tensors[0].device
    matrix = torch.empty(p, p, dtype=torch.float64, device=device)
    for start in range(0, p, block):
        stop = min(start + block, p)
        unit = torch.zeros(stop - start, p, dtype=torch.float64, device=device)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        matrix[start:stop] = product(curvature, unit)
    return (matrix + matrix.mT) / 2


def from_columns(columns: Columns) -> Float[Tensor, "p p"]:
    """Gauss-Newton as the sum of squares of its root columns, in one pass.

    Args:
        columns: The root columns.

    Returns:
        The matrix.

    Raises:
        NotFiniteError: An entry is NaN or infinite.
    """
    layout = columns.rows.vectors
    places, p = layout.slices(), layout.size
    device = layout.tensors[0].device
    matrix = torch.zeros(p, p, dtype=torch.float64, device=device)
    for column in columns:
        for start, stop in tiles(column.n, p):
            flat = torch.zeros(stop - start, p, dtype=torch.float64, device=device)
            for site in columns.sites.values():
                for blocks in column.blocks(site):
                    for (name,), block in blocks.items():
                        flat[:, places[name]] += block.rows(start, stop).materialise()
            matrix.addmm_(flat.mT, flat)
    if not bool(torch.isfinite(matrix).all()):
        raise NotFiniteError(
            f"the curvature has an entry that is not finite ({columns.rows.source.where}). Use a float64 model."
        )
    return matrix / len(columns.rows)


class CholeskySolver:
    """(C + λI)⁻¹ by Cholesky's factor.

    Args:
        matrix: C, symmetric [p, p] in float64.
        damping: λ.
        kind: The curvature's name, for the message.
        accuracy: Relative rounding of the model that C was made with.

    Raises:
        OptionError: C + λI is not positive definite; the message names C's smallest eigenvalue.
    """

    def __init__(
        self, matrix: Float[Tensor, "p p"], damping: float, kind: str, accuracy: float = 0.0
    ) -> None:
        self.damping = damping
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        # A pivot that is rounding noise solves nothing.
        pivots = factor.diagonal().square()
        noise = rounding_of(float(torch.linalg.matrix_norm(matrix)), len(matrix))
        if bool(failed) or min(float(pivots.min()), damping) <= noise:
            low, high = ends_of(matrix, accuracy)
            if bool(failed) or damping + low <= rounding_of(high, len(matrix)):
                raise damping_error(damping, low, high, kind)
        self._factor = factor
        self.report = {"parameters": len(matrix)}

    def solve(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + λI)⁻¹ g for n vectors."""
        return torch.cholesky_solve(gradients.double().mT, self._factor).mT

    def quadratic(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """gᵀ (C + λI)⁻¹ g of each vector."""
        half = torch.linalg.solve_triangular(self._factor, gradients.double().mT, upper=False)
        return half.square().sum(0)


def ends_of(matrix: Float[Tensor, "p p"], accuracy: float) -> tuple[float, float]:
    """The smallest eigenvalue and the size of the largest.

    Args:
        matrix: C, symmetric.
        accuracy: Relative rounding of what it was made with.

    Returns:
        λ_min, 0 where it is positive by rounding alone, and λ_max.
    """
    values = torch.linalg.eigvalsh(matrix)
    low, high = float(values[0]), float(values.abs().max())
    return (0.0 if 0.0 < low <= accuracy * high else low), high


def rounding_of(high: float, p: int) -> float:
    """What float64 cannot tell from zero among the eigenvalues: p · eps · λ_max.

    Args:
        high: λ_max, or a bound of it.
        p: Size of the matrix.

    Returns:
        The number that λ_min + λ has to exceed.
    """
    return p * torch.finfo(torch.float64).eps * high


def damping_error(damping: float, low: float, high: float, kind: str) -> OptionError:
    """The error of a damping that leaves a direction flat or curved downwards.

    Args:
        damping: λ.
        low: The curvature's smallest eigenvalue, or a bound of it.
        high: The size of its largest, as far as it is known.
        kind: The curvature's name.

    Returns:
        The error.
    """
    shown = "Hessian" if kind == "hessian" else "Gauss-Newton matrix"
    # An eigenvalue that is rounding noise is no scale for a damping.
    if -low > 1e-6 * high:
        advised = f"well above {-low:.6g}"
    else:
        advised = f"such as {1e-3 * high:.3g}, λ_max / 1000" if high > 0 else "above 0"
    return OptionError(
        f"damping={damping:.6g} is too small: the smallest eigenvalue of the {shown} is λ_min = {low:.6g}, the largest about "
        f"{high:.3g}, and C + damping·I must be positive definite beyond rounding. Give a damping {advised}"
        + (
            ", or use curvature='gauss_newton', which has no negative eigenvalues."
            if kind == "hessian"
            else "."
        )
    )
