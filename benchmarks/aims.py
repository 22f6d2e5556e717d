"""What the benchmarks were to show, and whether they do."""

from __future__ import annotations

from collections.abc import Sequence

from measure import Result

__all__ = ["AIM_CLASSES", "aim_of", "aims"]

# In passes; the first for 2,000 pictures, the second for more of them and for language models, the last for sums by class.
AIM, AIM_LARGE, AIM_SELF, AIM_CLASSES = 1.3, 1.4, 1.25, 1.15
PASSES = (
    ("influence", ("mlp", "cnn", "resnet", "mlp-large", "cnn-large", "gpt", "gpt-wide")),
    ("self_influence", ("mlp-large", "cnn-large", "resnet-large")),
)
# How many times as fast as a peer.
FASTER = (
    ("mlp-large", "captum", 100),
    ("cnn-large", "captum", 15),
    ("gpt", "dattri_llm", 1),
    ("gpt-wide", "dattri_llm", 1),
)


def aim_of(verb: str, name: str) -> float:
    """The most passes that a verb should take on a workload."""
    if verb == "self_influence":
        return AIM_SELF
    return AIM if name in {"mlp", "cnn", "resnet"} else AIM_LARGE


def aims(results: Sequence[Result]) -> list[str]:
    """A line of a table for each aim that was measured."""
    by_name = {result.name: result for result in results}
    out = ["| aim | measured | range | met |", "|---|---:|---:|---|"]
    for verb, names in PASSES:
        for name in names:
            found = by_name[name].method(verb) if name in by_name else None
            if found is None or not found.ratios:
                continue
            aim = aim_of(verb, name)
            low, high = min(found.ratios), max(found.ratios)
            met = "yes" if found.ratio <= aim else f"missed by {found.ratio - aim:.2f}"
            what = f"`{verb}`, {name}: at most {aim} of one plain pass"
            out.append(f"| {what} | {found.ratio:.2f} | {low:.2f}–{high:.2f} | {met} |")
    for name, label, aim in FASTER:
        mine, peer = (
            by_name[name].method(which) if name in by_name else None for which in ("influence", label)
        )
        if mine is None or peer is None or not mine.ratios or not peer.ratios:
            continue
        faster = peer.ratio / mine.ratio
        met = "yes" if faster >= aim else f"no: {peer.ratio / aim:.2f} of one plain pass would be needed"
        peer_name = label.replace("_", "-")
        what = f"{name}: {aim}× as fast as {peer_name}" if aim > 1 else f"{name}: faster than {peer_name}"
        out.append(f"| {what} | {faster:.3g}× |  | {met} |")
    return out
