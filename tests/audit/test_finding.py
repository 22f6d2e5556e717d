"""The audit as a whole: planted flips, duplicates, opposing rows, and what is said to be lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tracin
from audit.common import NAMES, audited_digits, network64, planted_digits, rows, small
from tracin.audit import find_label_issues
from tracin.errors import DataError, OptionError
from tracin.evaluation import DetectionCurve, area_under_margin, margin, mean_loss
from tracin.scoring.evaluation import evaluate


def auroc(scores, planted):
    return DetectionCurve(scores, planted).auroc


def test_planted_flips_of_digits_are_found():
    audit, (_, data) = audited_digits(), planted_digits()
    found = auroc(audit.score, data.planted)
    assert found > 0.99
    signals = audit.signals
    for name, sign in (("aum", -1), ("mean_loss", 1), ("self_influence", 1)):
        assert found >= auroc(sign * signals[name], data.planted) - 1e-3, name
    flagged = audit.is_issue
    assert float(data.planted[flagged].double().mean()) > 0.8
    assert float(flagged[data.planted].double().mean()) > 0.9
    right = (audit.suggested_labels == data.true_labels)[data.planted]
    assert float(right.double().mean()) > 0.9


def test_the_signals_are_those_of_the_library():
    audit, (method, data) = audited_digits(), planted_digits()
    own = method.self_influence(data.train)
    seen = evaluate(method.task, method.trajectory, data.train, name="train")
    assert torch.equal(audit.signals["self_influence"], own.values.double())
    assert torch.allclose(audit.signals["mean_loss"], mean_loss(seen))
    assert torch.allclose(audit.signals["aum"], -area_under_margin(seen))
    assert torch.allclose(audit.signals["margin"], -margin(seen))
    assert audit.provenance["checkpoints"] == own.provenance["checkpoints"]
    assert audit.given_labels.tolist() == data.train[1].tolist()
    assert bool((audit.suggested_labels != audit.given_labels).all())
    assert (audit.score >= audit.cutoff.score).tolist() == audit.is_issue.tolist()
    assert audit.notes == ()


def test_the_suspects_have_evidence():
    audit, (method, data) = audited_digits(), planted_digits()
    first = int(audit.order[0])
    lists = method.top_k(data.train, tuple(part[[first]] for part in data.train), k=6)
    others = [row for row in lists.proponents.ids[0].tolist() if row != first][:5]
    assert list(audit.records([first])[0]["proponents"]) == others
    asked = audit.evidence.rows.tolist()
    assert len(asked) == max(100, int(audit.is_issue.sum()))
    assert set(asked) == set(audit.order[: len(asked)].tolist())
    agreement = audit.signals["proponent_agreement"]
    assert bool(agreement[audit.evidence.rows].isfinite().all())
    assert int(agreement.isnan().sum()) == len(audit) - len(asked)
    last = int(audit.order[-1])
    assert audit.records([last])[0]["proponents"] is None
    assert audit.records([last])[0]["proponent_agreement"] is None


@pytest.mark.parametrize(("wanted", "count"), [("all", 13), (4, 4), (0, 0), ("suspects", 13)])
def test_which_rows_have_evidence(wanted, count):
    audit = find_label_issues(small(), rows(), evidence=2, evidence_rows=wanted)
    if not count:
        assert audit.evidence is None
        assert "proponent_agreement" not in audit.signals
        return
    assert sorted(audit.evidence.rows.tolist()) == sorted(audit.order[:count].tolist())
    assert audit.evidence.proponents.shape == (count, 2)
    assert find_label_issues(small(), rows(), evidence=0, evidence_rows=wanted).evidence is None


def test_the_data_and_the_model_stay_as_they_are():
    method, train = small(), rows()
    before = {name: value.clone() for name, value in method.task.model.state_dict().items()}
    copies = [part.clone() for part in train]
    one, two = find_label_issues(method, train), find_label_issues(method, train)
    assert one.records() == two.records()
    for name, value in method.task.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(torch.equal(part, copy) for part, copy in zip(train, copies, strict=True))


def test_an_index_gives_the_same_score_and_says_what_is_lost(tmp_path):
    method, train = small(), rows()
    tracin.Index.build(method, train, tmp_path / "index", projection=4096, dtype="float32")
    index = tracin.Index.open(tmp_path / "index", method, train)
    audit, exact = (
        find_label_issues(index, validation=rows(6, 9)),
        find_label_issues(method, train, validation=rows(6, 9)),
    )
    assert torch.equal(audit.score, exact.score)
    assert torch.allclose(audit.signals["self_influence"], exact.signals["self_influence"], rtol=1e-5)
    strongest = exact.signals["opposes_validation"].abs().argmax()
    assert audit.signals["opposes_validation"][strongest] * exact.signals["opposes_validation"][strongest] > 0
    assert any("index" in note and "estimates" in note for note in audit.notes)
    for row in range(13):
        assert row not in [other for side in audit.evidence.of(row) for other, _ in side]
    assert find_label_issues(index, train, progress=False).records() == find_label_issues(index).records()
    with pytest.raises(OptionError, match="without its method or its rows"):
        find_label_issues(tracin.Index.open(tmp_path / "index"), train)
    with pytest.raises(OptionError, match="without its method or its rows"):
        find_label_issues(tracin.Index.open(tmp_path / "index", method))
    with pytest.raises(OptionError, match="the index has 13 rows, and train 7"):
        find_label_issues(index, rows(7))


def test_one_checkpoint_says_what_is_lost():
    method, data = planted_digits()
    last = tracin.TracInCP(method.task, method.trajectory[-1:], progress=False)
    audit = find_label_issues(last, data.train, evidence=0)
    assert any("one checkpoint" in note for note in audit.notes)
    assert torch.equal(audit.signals["margin"], audit.signals["aum"])
    assert auroc(audit.score, data.planted) > 0.98


def test_without_neighbours():
    audit = find_label_issues(small(), rows(), neighbours=False)
    assert "neighbour_agreement" not in audit.signals
    assert "similar rows" not in audit.cutoff.why


def test_a_model_without_linear_says_so():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 3, 4)

        def forward(self, x):
            return self.conv(x[:, None])[:, :, 0]

    model = Net().double()
    steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1) for _ in range(2)])
    method = tracin.TracInCP(tracin.Task(model, tracin.losses.cross_entropy), steps, progress=False)
    audit = find_label_issues(method, rows())
    assert any("no Linear layer" in note for note in audit.notes)
    assert audit.duplicates is None


def test_a_planted_duplicate_is_found():
    inputs, labels = rows(20)
    inputs[11], labels[4], labels[11] = 1.0 * inputs[4], 0, 2
    inputs[15], labels[15] = inputs[4], 0  # equal, and called the same
    audit = find_label_issues(small(), (inputs, labels), duplicates=0.999999)
    assert [4, 11] in audit.duplicates.rows.tolist()
    assert [4, 15] not in audit.duplicates.rows.tolist()
    table = audit.table
    assert 11 in table["duplicates"][4]
    assert set(table["duplicates"][11]) >= {4, 15}
    assert find_label_issues(small(), rows(), duplicates=False).duplicates is None


def test_a_planted_opponent_is_found():
    """Rows of one class, called another: they oppose clean validation rows."""
    method, data = planted_digits()
    audit = find_label_issues(method, data.train, validation=data.test, evidence=0, duplicates=False)
    worst = audit.opposing(20)
    assert float(data.planted[worst].double().mean()) > 0.6  # six times their share
    influence = method.aggregate(data.train, data.test).values[0].double()
    assert torch.equal(audit.signals["opposes_validation"], -influence)


def regression(n=60):
    inputs = torch.randn(n, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = network64(1, 1)
    targets = model(inputs)[:, 0].detach() + 0.05 * torch.randn(
        n, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    targets[[7, 31]] += 4.0
    targets[50] -= 4.0
    return inputs, targets


def test_a_regression_flags_large_residuals():
    near = small(1, tracin.losses.mean_squared_error, rates=(0.1,))
    audit = find_label_issues(near, regression())
    assert audit.is_issue.nonzero().flatten().tolist() == [7, 31, 50]
    assert set(audit.order[:3].tolist()) == {7, 31, 50}
    record = audit.records([7])[0]
    assert record["given_label"] == pytest.approx(float(regression()[1][7]))
    assert record["residual"] == pytest.approx(4.0, abs=0.5)
    assert record["suggested_label"] == pytest.approx(record["given_label"] - record["residual"])
    assert not {"margin", "aum", "doubt", "neighbour_agreement", "duplicates"} & set(record)
    assert any("residuals" in note for note in audit.notes)
    assert audit.records([50])[0]["residual"] < -3
    assert len(record["proponents"]) <= 5


def test_a_loss_of_ones_own_is_judged_by_its_losses():
    own = small(1, lambda model, batch: (model(batch[0])[:, 0] - batch[1]).abs(), rates=(0.1,))
    audit = find_label_issues(own, regression())
    assert audit.is_issue.nonzero().flatten().tolist() == [7, 31, 50]
    assert audit.given_labels is None
    assert "given_label" not in audit.records([0])[0]
    assert any("targets are not known" in note for note in audit.notes)
    with pytest.raises(OptionError, match="has 2 names, and the task has no classes"):
        find_label_issues(own, regression(), class_names=["a", "b"])


def test_class_names_are_in_the_table():
    audit = find_label_issues(small(), rows(), class_names=["ant", "bee", "fly"])
    assert audit.table["given_label"].tolist() == [
        ["ant", "bee", "fly"][label] for label in rows()[1].tolist()
    ]
    assert audit.label_name(2) == "fly"
    assert find_label_issues(small(), rows()).table["given_label"].tolist() == rows()[1].tolist()


def test_known_self_influence_is_taken():
    method = small()
    own = method.self_influence(rows())
    other = replace(own, values=own.values + 1)
    assert torch.equal(
        find_label_issues(method, rows(), self_influence=other).signals["self_influence"], other.values
    )
    few = method.self_influence(rows(5))
    with pytest.raises(OptionError, match="self_influence is of 5 rows"):
        find_label_issues(method, rows(), self_influence=few)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"evidence": -1}, "evidence is -1"),
        ({"evidence_rows": -1}, "evidence_rows is -1.*'suspects' or 'all'"),
        ({"duplicates": 0.0}, "duplicates is 0.0"),
        ({"duplicates": 1.5}, "duplicates is 1.5"),
        ({"class_names": ["ant", "bee"]}, "class_names has 2 names, and the task has 3 classes"),
        ({"class_names": "ants"}, "class_names is a str"),
    ],
)
def test_an_argument_out_of_range(options, fact):
    with pytest.raises(OptionError, match=fact):
        find_label_issues(small(), rows(), **options)


def test_what_is_no_method_and_no_rows():
    with pytest.raises(OptionError, match="needs the training rows"):
        find_label_issues(small())
    with pytest.raises(DataError, match="one row"):
        find_label_issues(small(), rows(1))


def test_two_rows_are_enough():
    audit = find_label_issues(small(), (rows()[0][:2], torch.tensor([0, 2])))
    assert len(audit) == 2
    assert sorted(audit.order.tolist()) == [0, 1]


def test_it_is_there_after_import():
    assert tracin.audit.find_label_issues is find_label_issues
    assert len(NAMES) == 10
