"""The demo as a user runs it: it finds what was planted, checks itself, and leaves a report that needs no network."""

from __future__ import annotations

import csv
import re

import pytest
import torch

from tracin.cli import main
from tracin.cli.digits import digits, fit, network

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder that the demo wrote, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    lines: list[str] = []
    patch.setattr("rich.console.Console.print", lambda self, *parts, **_: lines.append(_plain(self, parts)))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        assert main(["demo", "--out", str(out), "--format", "csv", "json", "--quiet"]) == 0
    finally:
        patch.undo()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    return out, "\n".join(lines)


def _plain(console, parts):
    return "".join(segment.text for part in parts for segment in console.render(part))


def table(folder, name):
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_it_finds_the_planted_labels(demo):
    rows = table(demo[0], "suspects")
    planted = [row["planted"] == "True" for row in rows]
    assert len(rows) == 1438
    assert sum(planted) == 144
    tenth, fifth = sum(planted[:143]), sum(planted[:287])
    assert tenth >= 0.7 * 144, "chance finds 14"
    assert fifth >= 0.9 * 144, "chance finds 29"
    assert f"{tenth} of 144" in demo[1]
    assert f"{fifth} of 144" in demo[1]


def test_it_checks_itself_against_autograd(demo):
    assert re.search(r"exact: largest relative error \S+ against autograd \(8 rows × 10 checkpoints", demo[1])
    assert "100.0% of 6,058 parameters traced" in demo[1]
    parameters = table(demo[0], "parameters")
    assert all(row["traced"] == "True" and row["route"].startswith("rule") for row in parameters)
    assert max(float(row["error"]) for row in parameters) < 1e-5


def test_it_explains_three_predictions_and_a_wrong_one(demo):
    rows = table(demo[0], "explanations")
    assert len({row["query"] for row in rows}) == 3
    wrong = {row["query"] for row in rows if row["target"] == "label"}
    assert len(wrong) == 1
    assert "(wrong)" in demo[1]
    assert "(right)" in demo[1]
    assert "the wrong class" in demo[1]
    for row in rows:
        assert (float(row["score"]) > 0) == (row["sign"] == "proponent")


def test_its_report_stands_alone(demo):
    text = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert set(re.findall(r'(?:src|srcset|href)="([a-z]+):', text)) == {"data"}
    assert "<script" not in text
    for part in (
        "Handwritten digits",
        "against autograd",
        "Suspects",
        "Detection curve",
        "Predictions",
        "Test row",
    ):
        assert part in text


def test_it_leaves_pictures_and_tables_and_nothing_else(demo):
    names = {path.name for path in demo[0].iterdir()}
    tables = {
        f"{name}.{kind}"
        for name in ("suspects", "parameters", "explanations", "trajectory")
        for kind in ("csv", "json")
    }
    pictures = {"detection.png", "explanation.png", "trajectory.png"}
    assert names == tables | pictures | {"report.html", "self_influence.safetensors"}
    for name in pictures:
        assert (demo[0] / name).read_bytes().startswith(PNG)


def test_the_same_seed_trains_the_same(tmp_path):
    trained = []
    for name in ("a", "b"):
        data, model = digits(3), network(3)
        fit(model, data.train, tmp_path / name, seed=3, epochs=1)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*trained)
    assert not torch.equal(digits(3).planted, digits(4).planted)
