"""One shared table of small models, from a bare Linear to packed LSTMs: ``CASES``, by name in ``BY_NAME``."""

from __future__ import annotations

from cases import layers, rows, sequences, sharing, structures
from cases.table import Case, wave, wave_of

__all__ = ["BY_NAME", "CASES", "Case", "wave", "wave_of"]

CASES: list[Case] = [*layers.CASES, *sequences.CASES, *sharing.CASES, *rows.CASES, *structures.CASES]
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"
