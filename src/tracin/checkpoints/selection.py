"""Which checkpoints of a run are worth their price: those between which the loss falls.

TracIn sums over checkpoints, and each costs a pass over the data. Pruthi et al. (2020) advise to take them from the part
of the run in which the loss goes down: not from the first fluctuations, where gradients point anywhere, and not from the
flat tail, where they are small and add little but noise.

Axis letters: c checkpoints · n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.errors import NotFiniteError, OptionError
from tracin.shapes import Float

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """Which checkpoints to keep, and why.

    Args:
        kept: Positions to keep, ascending.
        reasons: A sentence for each checkpoint, kept or not [c].
        losses: The mean loss at each checkpoint [c].
    """

    kept: tuple[int, ...]
    reasons: tuple[str, ...]
    losses: tuple[float, ...]

    @property
    def skipped(self) -> tuple[int, ...]:
        """Positions to leave out, ascending."""
        return tuple(at for at in range(len(self.losses)) if at not in self.kept)

    def __str__(self) -> str:
        lines = [f"keep {len(self.kept)} of {len(self.losses)} checkpoints: {', '.join(map(str, self.kept))}"]
        for at, (loss, reason) in enumerate(zip(self.losses, self.reasons, strict=True)):
            lines.append(f"  {at:>3}  {loss:<10.4g} {'keep' if at in self.kept else 'skip'}  {reason}")
        return "\n".join(lines)


def advise(losses: Tensor | Sequence[float], *, fluctuation: float = 0.1, share: float = 0.02) -> Advice:
    r"""The checkpoints of the part of a run in which the loss falls.

    Let :math:`L_i` be the mean losses, :math:`S_i` the median of :math:`L_{i-1}, L_i, L_{i+1}`, which passes over one lucky
    or unlucky checkpoint, and :math:`m_i = \min(S_0, \ldots, S_i)` the low so far. Progress is counted in new lows,
    :math:`m_{i-1} - m_i`, and the whole fall is :math:`P = m_0 - m_{c-1}`: a spike and the way back from it gain nothing.

    1. *First fluctuations*: up to the last checkpoint at which the loss rises to more than ``fluctuation`` · P above its
       lowest value before, while more than half of the fall is still to come. All checkpoints up to there are left
       out, and new lows are counted from the low there.
    2. *Flat tail*: after the first checkpoint from which less than ``share`` of the fall is left. Where a quarter of the
       steps between neighbours or more are rises, twice that quartile is taken, if it is more, up to five times ``share``.
    3. In between, a checkpoint at a new low is kept when the low fell by ``share`` of the fall or more since the last one
       kept. The first of the fall and the one that gains most are always kept.

    A loss that never falls below the first one gives no ground for a choice, and all checkpoints are kept.

    Args:
        losses: The mean loss at each checkpoint [c], or of each row [c, n], such as
            ``evaluate(task, trajectory, train, name="train").losses``.
        fluctuation: A rise of this part of the whole fall is a fluctuation.
        share: A part of the fall that is worth a checkpoint.

    Returns:
        The advice; at least one checkpoint is kept.

    Raises:
        OptionError: No loss, another shape, or a part outside (0, 1).
        NotFiniteError: A mean loss that is NaN or infinite.

    Example:
        >>> advice = advise([2.3, 4.1, 2.2, 1.4, 0.8, 0.4, 0.39, 0.39])
        >>> print(advice)
        keep 4 of 8 checkpoints: 2, 3, 4, 5
            0  2.3        skip  first fluctuations: at checkpoint 1 the loss still jumps to 1.8 above its low
            1  4.1        skip  first fluctuations: at checkpoint 1 the loss still jumps to 1.8 above its low
            2  2.2        keep  the fall begins
            3  1.4        keep  the loss falls by 0.8 since checkpoint 2, the most in one go
            4  0.8        keep  the loss falls by 0.6 since checkpoint 3
            5  0.4        keep  the loss falls by 0.4 since checkpoint 4
            6  0.39       skip  flat tail: only 0.5% of the fall is left after checkpoint 5
            7  0.39       skip  flat tail: only 0.5% of the fall is left after checkpoint 5
    """
    for name, value in (("fluctuation", fluctuation), ("share", share)):
        if not 0.0 < value < 1.0:
            raise OptionError(f"advise: {name} is {value!r}. Give a part of the fall, between 0 and 1.")
    curve = _mean_losses(losses)
    values = tuple(curve.tolist())
    lows = _smooth(curve).cummin(0).values
    whole = float(lows[0] - lows[-1])
    # A fall of a few units in the last place is rounding, not training.
    if whole <= 64 * torch.finfo(torch.float64).eps * float(curve.abs().max()):
        reason = "the loss never falls below that of the first checkpoint: no ground for a choice"
        return Advice(tuple(range(len(values))), (reason,) * len(values), values)
    start, told = _first_fluctuations(curve, lows, fluctuation * whole)
    kept, reasons = _falling(curve[start:], _fall_from(curve, lows, start), start, share)
    return Advice(kept, (told,) * start + reasons, values)


def _mean_losses(losses: Tensor | Sequence[float]) -> Float[Tensor, " c"]:
    curve = torch.as_tensor(losses).detach().cpu().to(torch.float64)
    if curve.ndim not in (1, 2) or curve.numel() == 0:
        raise OptionError(
            f"advise: losses has the shape {list(curve.shape)}. Give the mean loss at each checkpoint [c], or of each row "
            "[c, n]."
        )
    curve = curve.mean(1) if curve.ndim == 2 else curve
    finite = curve.isfinite()
    if not finite.all():
        at = int((~finite).nonzero()[0])
        raise NotFiniteError(
            f"the mean loss at checkpoint {at} is {float(curve[at])}. Leave this checkpoint out first."
        )
    return curve


def _first_fluctuations(
    curve: Float[Tensor, " c"], lows: Float[Tensor, " c"], rise: float
) -> tuple[int, str]:
    """How many checkpoints stand in the first fluctuations, and the sentence for them."""
    above = curve[1:] - curve.cummin(0).values[:-1]
    rough = (above > rise) & (curve[1:] > curve[:-1]) & (lows[1:] > (lows[0] + lows[-1]) / 2)
    if not rough.any():
        return 0, ""
    last = int(rough.nonzero()[-1]) + 1
    return last + 1, (
        f"first fluctuations: at checkpoint {last} the loss still jumps to {float(above[last - 1]):.3g} above its low"
    )


def _smooth(curve: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """The median of each loss and its neighbours; the first and the last have themselves for the missing one."""
    padded = torch.cat([curve[:1], curve, curve[-1:]])
    return padded.unfold(0, 3, 1).median(1).values


@dataclass(frozen=True)
class _Fall:
    """The part of the run from the end of the first fluctuations on, k checkpoints."""

    before: Float[Tensor, " k"]
    lows: Float[Tensor, " k"]

    @property
    def size(self) -> float:
        return float(self.before[0] - self.lows[-1])

    @property
    def gains(self) -> Float[Tensor, " k"]:
        return self.before - self.lows


def _fall_from(curve: Float[Tensor, " c"], lows: Float[Tensor, " c"], start: int) -> _Fall:
    """The lows counted anew from the level at which the first fluctuations end."""
    level = lows[max(start - 1, 0)].reshape(1)
    found = torch.cat([level, _smooth(curve[start:])]).cummin(0).values
    return _Fall(found[:-1], found[1:])


def _falling(
    curve: Float[Tensor, " k"], fall: _Fall, start: int, share: float
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The positions kept from ``start`` on, and a sentence for each checkpoint from there on."""
    end = _end(curve, fall, share)
    left = float(fall.lows[end] - fall.lows[-1]) / fall.size
    new_low = (fall.gains > 0) & (curve <= fall.before)
    # A curve so rough that no new low is one of its own checkpoints leaves its lowest one.
    steepest = int(fall.gains.where(new_low, 0).argmax() if new_low.any() else curve.argmin())
    kept: list[int] = []
    reasons: list[str] = []
    for at in range(len(curve)):
        gained = float((fall.lows[kept[-1] - start] if kept else fall.before[0]) - fall.lows[at])
        begins = not kept and (start + at == 0 or bool(new_low[at]))
        worth = at <= end and bool(kept) and bool(new_low[at]) and gained >= (1 - 1e-9) * share * fall.size
        if begins or worth or at == steepest:
            reasons.append(_why_kept(kept, gained, at == steepest))
            kept.append(start + at)
        elif at > end:
            reasons.append(f"flat tail: only {left:.1%} of the fall is left after checkpoint {start + end}")
        elif not new_low[at]:
            low = float(fall.before[at])
            reasons.append(
                f"no new low: the loss was {low:.4g} before"
                if curve[at] >= low
                else f"a new low that does not last: the loss beside it is {low:.4g} or more"
            )
        else:
            reasons.append(
                f"the loss falls by only {gained / fall.size:.1%} of the whole fall since checkpoint {kept[-1]}"
            )
    return tuple(kept), tuple(reasons)


def _end(curve: Float[Tensor, " k"], fall: _Fall, share: float) -> int:
    """The first checkpoint after which what is left of the fall is not worth another one."""
    rises = torch.diff(curve, prepend=curve[:1]).clamp_min(0)
    noise = 2 * float(rises.quantile(0.75))
    enough = min(max(share * fall.size, noise), 5 * share * fall.size)
    return int((fall.lows - fall.lows[-1] <= enough).nonzero()[0])


def _why_kept(kept: Sequence[int], gained: float, steepest: bool) -> str:
    if not kept:
        return "the fall begins" + (", with the most in one go" if steepest else "")
    return f"the loss falls by {gained:.3g} since checkpoint {kept[-1]}{', the most in one go' if steepest else ''}"
