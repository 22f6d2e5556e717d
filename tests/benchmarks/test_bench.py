"""The benchmark measures what its tables say: sizes, errors, ratios, and a reason for each peer that has no number."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(FOLDER))

import aims  # noqa: E402
import floor  # noqa: E402
import growth  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import profiles  # noqa: E402
import table  # noqa: E402
import workloads  # noqa: E402

import tracin  # noqa: E402

# Modules there have the names of folders here, such as index, and would stand before them.
sys.path.remove(str(FOLDER))

TINY = "gpt:rows=8,queries=3,checkpoints=1,batch=4,length=8,width=16"


class Scripted:
    """A process whose answers are known."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.answers = {"ready": {"ready": True}, "error": {"error": 1e-7}, **answers}

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        return dict(self.answers["ready"])

    def ask(self, word: str, limit: float | None = None) -> dict[str, Any]:
        return dict(self.answers[word])


def settings() -> measure.Settings:
    return measure.Settings(threads=1, rounds=1, patience=5.0)


def test_sizes_are_read_from_the_name() -> None:
    case = workloads.case_of(TINY)
    assert (case.rows, case.queries, case.checkpoints, case.batch, case.length) == (8, 3, 1, 4, 8)
    assert case.model().tokens.weight.shape == (1000, 16)
    assert workloads.case_of("mlp:width=64").model()[1].weight.shape == (64, 784)
    assert workloads.case_of("cnn") == workloads.CASES["cnn"]


def test_ours_is_measured_in_its_own_process() -> None:
    said: list[str] = []
    result = measure.measure(TINY, ["influence"], settings(), said.append)
    plain, ours = result.methods
    assert (plain.label, ours.label) == ("pass", "influence")
    assert ours.error is not None
    assert ours.error < 1e-5
    assert plain.error is not None
    assert 0 < plain.error < 1e-5
    assert ours.peak is not None
    assert ours.peak > 0
    assert len(ours.ratios) == len(plain.ratios) == 1
    assert plain.ratios == [1.0]
    assert TINY in said[0]
    assert measure.Result.from_json(result.as_json()) == result


def test_a_peer_that_cannot_run_keeps_its_reason() -> None:
    process = Scripted(ready={"failed": "ModuleNotFoundError: No module named 'dattri'"})
    found, again = measure.first_run(process, "dattri", settings())
    assert not again
    assert not found.seconds
    assert found.note == "ModuleNotFoundError: No module named 'dattri'"
    page = table.markdown([result_of(found)])
    assert "- Not measured: dattri TracInAttributor: ModuleNotFoundError: No module named 'dattri'" in page


def test_ours_may_not_fail() -> None:
    with pytest.raises(SystemExit, match="influence: out of memory"):
        measure.first_run(Scripted(first={"failed": "out of memory"}), "influence", settings())


def test_a_slow_peer_runs_once() -> None:
    process = Scripted(first={"seconds": 6.0, "peak": 1}, **{"pass": {"beside": 2.0}})
    found, again = measure.first_run(process, "captum", settings())
    assert not again
    assert (found.seconds, found.ratios) == ([6.0], [3.0])
    _, again = measure.first_run(process, "influence", settings())
    assert again


def result_of(*methods: measure.Measured) -> measure.Result:
    facts = measure.machine(1, "wall")
    return measure.Result("tiny", "Tiny", 10, 8, 3, 1, 4, facts, list(methods))


def test_wrong_scores_are_marked() -> None:
    right = measure.Measured("influence", [1.0], [1.5], peak=3 << 20, error=1e-7)
    wrong = measure.Measured("captum", [3.0], [4.5], peak=0, error=1e-2)
    page = table.markdown([result_of(right, wrong)])
    assert "| tracin influence | 1.000 | 1.50 |  | 1 | 3 | 1.0e-07 |" in page
    assert "1.0e-02 (wrong)" in page
    assert "| captum TracInCP, per-sample mode | 4.50 † |" in page
    assert "3.00× as fast as captum" in page


@pytest.mark.parametrize(("error", "marked"), [(2e-3, False), (4e-3, True)])
def test_what_float32_autograd_cannot_do_is_not_called_wrong(error: float, marked: bool) -> None:
    plain = measure.Measured("pass", [1.0], [1.0], peak=0, error=1e-3)
    page = table.markdown([result_of(plain, measure.Measured("vmap", [1.0], [1.5], peak=0, error=error))])
    assert ("(wrong)" in page) == ("1.50 †" in page) == marked


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, (1, 0), 1), (1, 2, (2, 1))])
def test_the_floors_ways_give_each_rows_gradient(stride: int, padding: Any, dilation: Any) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, (3, 2), stride, padding, dilation, bias=False).double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    output = module(x)
    d = torch.randn_like(output)
    truth = torch.stack(
        [torch.autograd.grad((module(x[i : i + 1]) * d[i : i + 1]).sum(), module.weight)[0] for i in range(2)]
    )
    for way in (floor.grouped, floor.unfolded):
        assert torch.allclose(way(x, d, module), truth.flatten(1))
    assert torch.allclose(floor.turned(x, d, module), truth.flatten(3).mT.flatten(1))
    assert torch.allclose(floor.norms_by_pixels(x, d, module), truth.flatten(1).square().sum(1))


def convolutions() -> nn.Module:
    """Layers with a bias and without, and batch norm."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 3, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(6 * 9, 5), nn.Tanh(), nn.Linear(5, 3, bias=False),
    )  # fmt: skip


def words() -> nn.Module:
    """Linear layers that are used several times in a row, and layer norm."""
    torch.manual_seed(4)
    layers = (nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3, bias=False))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(21, 3))


@pytest.mark.parametrize(
    ("model", "shape", "way"),
    [(convolutions, (1, 8, 8), None), (words, (7, 6), None), (words, (7, 6), "factors")],
)
def test_the_program_written_by_hand_is_exact(
    model: Any, shape: tuple[int, ...], way: str | None, tmp_path: Path
) -> None:
    """Its scores and norms are those of autograd, row by row."""
    generator = torch.Generator().manual_seed(1)
    rows, queries = (
        (torch.randn(n, *shape, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (11, 4)
    )
    case = workloads.Case("", model, tracin.losses.cross_entropy, 11, 4, 3, 2, 0.1, True)
    trajectory = workloads.train(case, built := model(), rows, tmp_path)
    workload = workloads.Workload("cnn", case, built.eval(), rows, queries, trajectory)
    truth, own = peers.reference(workload, range(11), range(4))
    now = measure.CLOCKS["wall"]
    found, alone = (floor.least(workload, verb, now) for verb in ("influence", "self_influence"))
    scores, squares = found.run(), alone.run()
    if way:  # whichever the clock chose
        named = {layer.name: way for layer in found.layers}
        scores = floor.program(workload, floor.Passes(workload), named, 3, "influence")
        squares = floor.program(workload, floor.Passes(workload), named, 3, "self_influence")
    torch.testing.assert_close(scores.double(), truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares.double(), own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "program", "verdict"),
    [
        (1.29, 1.5, "The aim of 1.3 is met."),
        (1.55, 1.5, "The aim of 1.3 is missed by 0.25; the program written by hand misses it too."),
        (1.45, 1.5, "The aim of 1.3 is missed by 0.15; the program written by hand misses it too."),
        (1.45, 1.2, "missed by 0.15; the program written by hand meets it, so that 0.25 are our own."),
    ],
)
def test_the_profile_says_whether_the_program_written_by_hand_meets_the_aim(
    ratio: float, program: float, verdict: str
) -> None:
    assert profiles.verdict(ratio, aims.aim_of("influence", "cnn"), program).endswith(verdict)


def test_aims_of_models_and_verbs() -> None:
    found = [aims.aim_of(verb, name) for verb, name in (("influence", "mlp"), ("influence", "gpt-wide"))]
    assert [*found, aims.aim_of("self_influence", "mlp")] == [1.3, 1.4, 1.25]


def test_the_page_tells_which_aims_are_met() -> None:
    def result(name: str, **ratios: list[float]) -> measure.Result:
        methods = [measure.Measured(label, list(found), found) for label, found in ratios.items()]
        return replace(result_of(*methods), name=name)

    told = aims.aims(
        [
            result("cnn-large", influence=[1.2, 1.0, 1.5], self_influence=[1.5, 1.4, 1.3], captum=[6.0]),
            result("gpt", influence=[1.5], dattri_llm=[3.0]),
            result("lstm", influence=[9.0]),
        ]
    )
    assert told[2:] == [
        "| `influence`, cnn-large: at most 1.4 of one plain pass | 1.20 | 1.00–1.50 | yes |",
        "| `influence`, gpt: at most 1.4 of one plain pass | 1.50 | 1.50–1.50 | missed by 0.10 |",
        "| `self_influence`, cnn-large: at most 1.25 of one plain pass | 1.40 | 1.30–1.50 | missed by 0.15 |",
        "| cnn-large: 15× as fast as captum | 5× |  | no: 0.40 of one plain pass would be needed |",
        "| gpt: faster than dattri-llm | 2× |  | yes |",
    ]


def test_the_profile_of_a_model(tmp_path: Path) -> None:
    workload = workloads.made(TINY, workloads.case_of(TINY), tmp_path)
    found = profiles.profiled(workload, "influence", 1, "wall")
    assert all(parameter.requires_grad for parameter in workload.model.parameters())
    assert {layer["way"] for layer in found["layers"]} <= {"factors", "batched product"}
    assert len(found["layers"]) == 4 * 4 + 1
    assert set(found["beside"]) == {"without", "least"}
    assert all(one["low"] <= one["ratio"] <= one["high"] for one in found["beside"].values())
    page = profiles.markdown([found])
    assert "The program written by hand takes" in page
    assert page.count("Linear") > 4
    other = profiles.markdown([{**found, "verb": "top_k"}], page)
    assert other.count("\n## ") == 2, "the section of another verb stays"
    assert profiles.markdown([{**found, "rounds": 77}], other).count("77 rounds") == 1
    assert profiles.markdown([found], other) == other


def test_the_growth_page_tells_the_power(tmp_path: Path) -> None:
    def one(seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "ratio": 1.0, "peak": 1 << 20, "error": 1e-7, "note": ""}

    points = [
        {
            "value": n,
            "parameters": 7,
            "methods": {"pass": one(n / 2), "influence": one(n / 1), "vmap": one(n / 1)},
        }
        for n in (100, 200)
    ]
    points[1]["methods"]["vmap"] = {**one(0.0), "seconds": None, "ratio": None, "note": "not done after 40 s"}
    base = growth.CURVES["n"].base
    kept = {"curves": {"n": {"base": base, "peer": "vmap", "points": points}}, "rounds": 1}
    kept["machine"] = measure.machine(1, "wall")
    page = growth.page(kept)
    assert "the time of `influence` grows with the power 1.00, its memory with the power 0.00" in page
    assert "- vmap(grad) + matmul at 200: not done after 40 s" in page
    growth.draw("n", kept, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
