r"""EKFAC: Gauss-Newton layer by layer, diagonal in the eigenbasis of two small covariances.

For a Linear or Conv layer with inputs a (a one appended for the bias) and δ at its output,

.. math::
    C_{\text{layer}} \approx (Q_A \otimes Q_G)\,\mathrm{diag}(s)\,(Q_A \otimes Q_G)^\top, \qquad
    A = \tfrac1{Nt} \sum a a^\top = Q_A \Lambda_A Q_A^\top, \quad G = \tfrac1N \sum \delta\delta^\top = Q_G \Lambda_G Q_G^\top

and s, in place of the products of eigenvalues, is the mean square of the per-example gradients in that basis (George et al.
2018, *Fast approximate natural gradient descent in a Kronecker-factored eigenbasis*, §3; Grosse et al. 2023, *Studying
large language model generalization with influence functions*, §2.2 and 3.1; patches of a convolution as in Grosse & Martens
2016). The sums run over rows, uses t of a layer within a row, and the root columns of the Fisher (``columns``). Parameters of
other layers with a rule (norms, grouped convolutions) have their own block of Gauss-Newton, dense. Between layers, C is taken
to be zero. The trace is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tracin.curvature.columns import Column, Columns
from tracin.curvature.vectors import Vectors
from tracin.errors import ModelError, NotFiniteError, OptionError
from tracin.gradients.blocks import Block, Outer, tiles
from tracin.gradients.rules import convolution_block
from tracin.gradients.sites import RuleSite
from tracin.shapes import Float

__all__ = ["Eigenbasis", "EkfacSolver", "covariances", "fit", "refuse_too_large"]

# Entries of the largest parameter that gets a dense block of its own.
DENSE_ENTRIES = 4096


@dataclass(frozen=True)
class Eigenbasis:
    """A layer's curvature: its parameters, Q_G [o, o], Q_A [i, i] (None for a dense block), and s [o, i]."""

    names: tuple[str, ...]
    left: Float[Tensor, "o o"]
    right: Tensor | None
    values: Tensor

    def rotate(self, gradients: Float[Tensor, "n p"]) -> Tensor:
        """Gradients [n, p] of the layer in the basis, [n, o, i] (or [n, p])."""
        if self.right is None:
            return gradients @ self.left
        return self.left.mT @ self._matrix(gradients) @ self.right

    def rotate_block(self, block: Block) -> Tensor:
        """As ``rotate``, from a batch's block: a layer's two factors are rotated before they are multiplied out."""
        cheaper = isinstance(block, Outer) and block.uses * sum(self.values.shape) < math.prod(
            self.values.shape
        )
        if self.right is None or not isinstance(block, Outer) or not cheaper:
            return self.rotate(block.materialise().to(self.left.dtype))
        a = block.a
        if block.bias is not None:
            a = torch.cat([a, a.new_full((*a.shape[:2], 1), block.bias)], 2)
        return (block.d.to(self.left.dtype) @ self.left).mT @ (a.to(self.left.dtype) @ self.right)

    def back(self, rotated: Tensor) -> Float[Tensor, "n p"]:
        """The inverse of ``rotate``."""
        if self.right is None:
            return rotated @ self.left.mT
        matrix = self.left @ rotated @ self.right.mT
        n, o, i = matrix.shape
        if len(self.names) == 1:
            return matrix.reshape(n, o * i)
        return torch.cat([matrix[:, :, :-1].reshape(n, -1), matrix[:, :, -1]], 1)

    def _matrix(self, gradients: Tensor) -> Tensor:
        o, i = self.values.shape
        n = len(gradients)
        if len(self.names) == 1:
            return gradients.reshape(n, o, i)
        weight, bias = gradients.split([o * (i - 1), o], 1)
        return torch.cat([weight.reshape(n, o, i - 1), bias[:, :, None]], 2)


def _is_kronecker(site: RuleSite) -> bool:
    """A Linear or ungrouped Conv layer whose weight is traced."""
    if "weight" not in site.roles:
        return False
    module = site.module
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and module.groups == 1


def _factored(columns: Columns) -> dict[str, RuleSite]:
    return {name: site for name, site in columns.sites.items() if _is_kronecker(site)}


def refuse_too_large(columns: Columns, memory: int) -> int:
    """Refuse layers whose factors or blocks are too large, before anything is run.

    Args:
        columns: The Fisher's root columns.
        memory: Bound on the factors, in bytes.

    Returns:
        What the factors take, in bytes.

    Raises:
        ModelError: A parameter too large for a dense block.
        OptionError: Factors too large for the memory.
    """
    parameters = columns.rows.vectors.parameters
    total = 0
    for site in columns.sites.values():
        if _is_kronecker(site):
            weight = parameters[site.roles["weight"]]
            o, i = weight.shape[0], weight[0].numel() + ("bias" in site.roles)
            total += 8 * 2 * (o * o + i * i + o * i)
            continue
        for name in site.roles.values():
            entries = parameters[name].numel()
            if entries > DENSE_ENTRIES:
                raise ModelError(
                    f"solver='ekfac' has factors for Linear and Conv layers and dense blocks for other parameters of up to "
                    f"{DENSE_ENTRIES:,} entries; {name} ({type(site.module).__name__}) has {entries:,}. Leave it out "
                    "(Task(parameters=...)), or use solver='cg'."
                )
            total += 8 * 2 * entries * entries
    if total > memory:
        raise OptionError(
            f"solver='ekfac' needs {total / 2**30:,.1f} GiB for the factors, more than memory={memory / 2**30:,.1f} GiB. "
            "Raise memory=, or trace fewer parameters (Task(parameters='head.*'))."
        )
    return total


def _inputs(site: RuleSite, column: Column) -> Tensor:
    """a [n, t, i] of all uses of a layer, with the bias's ones; the same for every column of a batch."""
    parts = []
    for use in column.uses:
        if use.site is not site:
            continue
        x = use.input_rows(column.n)
        if isinstance(site.module, nn.Linear):
            parts.append(x.reshape(column.n, -1, x.shape[-1]))
        else:
            parts.append(convolution_block(site.module, x, use.delta_rows(column.n)).outer().a)  # type: ignore[arg-type]
    a = torch.cat(parts, 1)
    return torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if "bias" in site.roles else a


def _deltas(site: RuleSite, column: Column) -> Tensor:
    """δ [n, t, o] of all uses of a layer."""
    parts = []
    for use in column.uses:
        if use.site is not site:
            continue
        d = use.delta_rows(column.n)
        if not isinstance(site.module, nn.Linear):
            d = d.flatten(3).mT  # [n, k, pixels, o]
        parts.append(d.reshape(column.n, -1, d.shape[-1]))
    return torch.cat(parts, 1)


def _called(sites: dict[str, RuleSite], column: Column) -> Iterator[tuple[str, RuleSite]]:
    """The layers that the batch calls."""
    for name, site in sites.items():
        if any(use.site is site for use in column.uses):
            yield name, site


def _used(sites: dict[str, RuleSite], column: Column) -> Iterator[tuple[str, RuleSite]]:
    """The layers that the column reaches."""
    for name, site in sites.items():
        if any(use.site is site and use.delta is not None for use in column.uses):
            yield name, site


def _dense_parts(site: RuleSite, column: Column) -> Iterator[tuple[str, Tensor]]:
    """Per-example gradients [n, p] of the parameters of a layer without factors."""
    for name in site.roles.values():
        parts = [blocks[name,].materialise() for blocks in column.blocks(site) if (name,) in blocks]
        if parts:
            yield name, torch.stack(parts).sum(0)


class _Sums:
    """float64 sums by key."""

    def __init__(self) -> None:
        self.found: dict[Any, Tensor] = {}

    def add(self, key: Any, value: Tensor) -> None:
        value = value.double()
        self.found[key] = self.found[key] + value if key in self.found else value


def fit(columns: Columns, memory: int) -> list[Eigenbasis]:
    """The eigenbases and corrected eigenvalues, in two passes over the data.

    Args:
        columns: The Fisher's root columns.
        memory: Bound on the factors, in bytes.

    Returns:
        One basis per layer or parameter.

    Raises:
        ModelError: A parameter too large for a dense block.
        OptionError: Factors too large for the memory.
        NotFiniteError: A factor is NaN or infinite.
    """
    refuse_too_large(columns, memory)
    bases: dict[Any, Tensor] = {}
    blocks = []
    for key, matrix in covariances(columns).items():
        if not bool(torch.isfinite(matrix).all()):
            raise NotFiniteError(
                f"a factor of {key[0]} is not finite ({columns.rows.source.where}). Use a float64 model."
            )
        values, bases[key] = torch.linalg.eigh((matrix + matrix.mT) / 2)
        if key[1] == "block":
            blocks.append(Eigenbasis((key[0],), bases[key], None, values.clamp_min(0.0) / len(columns.rows)))
    return _corrected(columns, bases) + blocks


def covariances(columns: Columns) -> dict[Any, Tensor]:
    """The first pass over the data: sums A and G of the layers, and blocks of other parameters.

    Args:
        columns: The Fisher's root columns.

    Returns:
        By (layer, ``"A"`` or ``"G"``) and (parameter, ``"block"``).
    """
    kronecker = _factored(columns)
    others = {name: site for name, site in columns.sites.items() if name not in kronecker}
    sums = _Sums()
    for column in columns:
        if column.number == 0:
            for name, site in _called(kronecker, column):
                a = _inputs(site, column).flatten(0, 1)
                sums.add((name, "A"), a.mT @ a)
        for name, site in _used(kronecker, column):
            d = _deltas(site, column).flatten(0, 1)
            sums.add((name, "G"), d.mT @ d)
        for site in others.values():
            for name, values in _dense_parts(site, column):
                values = values.double()
                sums.add((name, "block"), values.mT @ values)
    return sums.found


def _corrected(columns: Columns, bases: dict[Any, Tensor]) -> list[Eigenbasis]:
    """Mean squares of per-example gradients in the bases."""
    kronecker = _factored(columns)
    sums = _Sums()
    rotated: dict[str, Tensor] = {}
    for column in columns:
        if column.number == 0:
            rotated = {}
        for name, site in _used(kronecker, column):
            if name not in rotated:
                a = _inputs(site, column)
                rotated[name] = a @ bases[name, "A"].to(a.dtype)
            a, d = rotated[name], _deltas(site, column)
            d = d @ bases[name, "G"].to(d.dtype)
            if a.shape[1] == 1:
                sums.add(name, d[:, 0].square().mT @ a[:, 0].square())
                continue
            for start, stop in tiles(column.n, d.shape[2] * a.shape[2]):
                sums.add(name, torch.bmm(d[start:stop].mT, a[start:stop]).square().sum(0))
    return [
        Eigenbasis(
            tuple(site.roles[role] for role in ("weight", "bias") if role in site.roles),
            bases[name, "G"],
            bases[name, "A"],
            sums.found[name] / len(columns.rows),
        )
        for name, site in kronecker.items()
        if name in sums.found
    ]


class EkfacSolver:
    """(C + λI)⁻¹ in the eigenbases.

    Args:
        bases: The layers' curvatures; parameters of none have curvature zero.
        vectors: Where parameters stand in a flat vector.
        damping: λ.
        dtype: Of the arithmetic.
    """

    def __init__(
        self, bases: list[Eigenbasis], vectors: Vectors, damping: float, dtype: torch.dtype = torch.float64
    ) -> None:
        self.damping, self._vectors, self._dtype = damping, vectors, dtype
        self._bases = [
            Eigenbasis(
                b.names, b.left.to(dtype), None if b.right is None else b.right.to(dtype), b.values.to(dtype)
            )
            for b in bases
        ]
        self.report: dict[str, Any] = {
            "factored": [name for b in bases if b.right is not None for name in b.names],
            "dense_blocks": [name for b in bases if b.right is None for name in b.names],
        }

    def multiply(self, vectors: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """The approximate C (without damping) times n vectors."""
        return self._map(vectors, lambda rotated, values: rotated * values, 0.0)

    def solve(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + λI)⁻¹ g for n vectors."""
        return self._map(
            gradients, lambda rotated, values: rotated / (values + self.damping), 1.0 / self.damping
        )

    def quadratic(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """gᵀ (C + λI)⁻¹ g of each vector, without rotating back."""
        total = gradients.new_zeros(len(gradients), dtype=torch.float64)
        gradients, seen = gradients.to(self._dtype), set()
        for basis in self._bases:
            rotated = basis.rotate(self._part(gradients, basis))
            total += (rotated.square() / (basis.values + self.damping)).flatten(1).sum(1)
            seen |= set(basis.names)
        for name, place in self._vectors.slices().items():
            if name not in seen:
                total += gradients[:, place].square().sum(1) / self.damping
        return total

    def quadratic_of(self, blocks: Mapping[tuple[str, ...], Block], n: int) -> Float[Tensor, " n"]:
        """As ``quadratic``, from a batch's blocks: layers whose block is two factors are rotated before multiplying out."""
        total = self._vectors.tensors[0].new_zeros(n, dtype=torch.float64)
        left = dict(blocks)
        for basis in self._bases:
            own = [names for names in left if set(names) <= set(basis.names)]
            held = {names: left.pop(names) for names in own}
            if not held:
                continue
            for start, stop in tiles(n, basis.values.numel()):
                rotated = self._rotated(basis, {k: block.rows(start, stop) for k, block in held.items()})
                total[start:stop] += (rotated.square() / (basis.values + self.damping)).flatten(1).sum(1)
        for block in left.values():
            total += block.squared_norm() / self.damping
        return total

    def _rotated(self, basis: Eigenbasis, held: Mapping[tuple[str, ...], Block]) -> Tensor:
        if basis.names in held:
            return basis.rotate_block(held[basis.names])
        n = len(next(iter(held.values())))
        parts = [
            held[name,].materialise().to(self._dtype)
            if (name,) in held
            else basis.left.new_zeros(n, self._vectors.parameters[name].numel())
            for name in basis.names
        ]
        return basis.rotate(torch.cat(parts, 1))

    def _part(self, flat: Tensor, basis: Eigenbasis) -> Tensor:
        places = self._vectors.slices()
        return torch.cat([flat[:, places[name]] for name in basis.names], 1)

    def _map(self, flat: Tensor, scale: Any, elsewhere: float) -> Tensor:
        flat = flat.to(self._dtype)
        out = flat * elsewhere
        places = self._vectors.slices()
        for basis in self._bases:
            rotated = scale(basis.rotate(self._part(flat, basis)), basis.values)
            parts = basis.back(rotated).split([places[n].stop - places[n].start for n in basis.names], 1)
            for name, part in zip(basis.names, parts, strict=True):
                out[:, places[name]] = part
        return out
