"""A plan in words."""

from __future__ import annotations

from tracin.scoring.plan import Plan, Route


def test_words() -> None:
    route = Route(("a",), "by row", "Dense", 8, "why")
    assert str(Plan(3 << 20, 1.25, 4, (route,))) == (
        "4 passes over the train rows, about 1.2 s, peak 3 MiB; 1 of 1 blocks off the fast route\na  by row  8 bytes  why"
    )
