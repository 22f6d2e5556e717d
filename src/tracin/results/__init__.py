"""What a method hands back: scores, ranked lists and self-influence, with row ids and provenance.

A result is frozen, lives on the CPU, and is saved as one safetensors file whose header carries its type,
a format version and its provenance as JSON.
"""

from __future__ import annotations

from tracin.results.rankings import Ranking, TopK
from tracin.results.scores import Scores
from tracin.results.self_influence import SelfInfluence

__all__ = ["Ranking", "Scores", "SelfInfluence", "TopK"]
