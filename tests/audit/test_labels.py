"""Labels come back as the training rows have them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import tracin
from audit.common import made, rows, small
from tracin.audit import Audit, find_label_issues
from tracin.audit import labels as labelling
from tracin.errors import OptionError, ResultError

N = 13
INPUTS, CLASSES = rows(N)


def audited(targets, outputs=3, loss=tracin.losses.cross_entropy, train=None):
    return find_label_issues(small(outputs, loss), (INPUTS, targets) if train is None else train, evidence=0)


def soft() -> torch.Tensor:
    return torch.softmax(torch.randn(N, 3, generator=torch.Generator().manual_seed(2)).double(), 1)


def same(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("targets", "outputs", "loss"),
    [
        (CLASSES, 3, "cross_entropy"),
        (torch.nn.functional.one_hot(CLASSES, 3).double(), 3, "cross_entropy"),
        ((CLASSES > 0).float()[:, None], 1, "binary_cross_entropy"),
        ((CLASSES > 0).float(), 1, "binary_cross_entropy"),
        (CLASSES > 0, 1, "binary_cross_entropy"),
    ],
)
def test_classes_keep_their_dtype_and_shape(targets, outputs, loss, tmp_path):
    audit = audited(targets, outputs, getattr(tracin.losses, loss))
    audit.save(tmp_path)
    before = targets.clone()
    for each in (audit, Audit.load(tmp_path)):
        same(each.apply({}).labels, targets)
        new = 1 - int(audit.given_labels[4]) if outputs == 1 else (int(audit.given_labels[4]) + 1) % 3
        cleaned = each.apply({2: "remove", 4: ("relabel", new)})
        wanted = targets.clone()
        wanted[4] = torch.nn.functional.one_hot(torch.tensor(new), 3) if targets[4].numel() == 3 else new
        same(cleaned.labels, wanted[cleaned.rows])
        suggested = each.apply(each.suggested(N))
        assert suggested.labels.dtype == targets.dtype
        again = audited(suggested.labels, outputs, getattr(tracin.losses, loss))
        assert again.given_labels.tolist() == audit.suggested_labels.tolist()
    assert torch.equal(targets, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16])
def test_class_numbers_of_any_dtype(dtype):
    targets = CLASSES.to(dtype)
    labels = labelling.labels_of(small(), (INPUTS, targets), CLASSES, 3)
    same(labels, targets)
    cleaned = made(labels=labels[:5], given_labels=CLASSES[:5]).apply({1: ("relabel", "fly"), 0: "remove"})
    assert cleaned.labels.tolist() == [2, *CLASSES[2:5].tolist()]
    assert cleaned.labels.dtype == dtype


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_targets_keep_their_dtype_and_shape(shape, dtype):
    targets = torch.arange(N).to(dtype).reshape(shape)
    audit = audited(targets, 1, tracin.losses.mean_squared_error)
    same(audit.apply({}).labels, targets)
    cleaned = audit.apply({0: "remove", 3: ("relabel", 7)})
    wanted = targets.clone()
    wanted[3] = 7
    same(cleaned.labels, wanted[1:])


def test_a_target_that_does_not_fit_is_refused():
    whole = audited(torch.arange(N), 1, tracin.losses.mean_squared_error)
    with pytest.raises(OptionError, match=r"row 3: the target 0\.5 does not fit int64"):
        whole.apply({3: ("relabel", 0.5)})
    with pytest.raises(OptionError, match="suggested: the targets are whole numbers"):
        whole.suggested(2, "relabel")
    single = audited(torch.arange(N).float(), 1, tracin.losses.mean_squared_error)
    with pytest.raises(OptionError, match=r"row 3: the target 1e\+300 does not fit float32"):
        single.apply({3: ("relabel", 1e300)})
    assert single.apply(single.suggested(2, "relabel")).labels.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "outputs", "loss"),
    [
        (soft(), 3, "cross_entropy"),
        (torch.linspace(0.1, 0.9, N)[:, None], 1, "binary_cross_entropy"),
    ],
)
def test_probabilities_come_back_and_are_not_relabelled(targets, outputs, loss, tmp_path):
    audit = audited(targets, outputs, getattr(tracin.losses, loss))
    same(audit.apply({}).labels, targets)
    decisions = audit.suggested(3)
    assert {decision.action for decision in decisions} == {"remove"}
    cleaned = audit.apply(decisions)
    same(cleaned.labels, targets[cleaned.rows])
    assert len(cleaned.rows) == N - 3
    with pytest.raises(OptionError, match=r"row 1: the labels .* are probabilities.*Choose keep or remove"):
        audit.apply({1: ("relabel", 0)})
    with pytest.raises(OptionError, match=r"suggested: the labels .* are probabilities"):
        audit.suggested(3, "relabel")
    told = audit.export(tmp_path / "a.json", decisions={1: ("relabel", 0)})
    assert '"decided_label": 0' in told.read_text()


def test_several_targets_per_row_go_and_stay():
    targets = torch.randn(N, 2, generator=torch.Generator().manual_seed(5))
    audit = audited(targets, 2, tracin.losses.mean_squared_error)
    cleaned = audit.apply(audit.suggested(2))
    assert len(cleaned.removed) == 2
    same(cleaned.labels, targets[cleaned.rows])


def test_targets_that_take_much_room_are_not_kept(monkeypatch):
    monkeypatch.setattr(labelling, "HELD", 100)
    audit = audited(torch.randn(N, 2), 2, tracin.losses.mean_squared_error)
    assert audit.labels is None
    cleaned = audit.apply({1: "remove"})
    assert cleaned.labels is None
    assert len(cleaned.rows) == N - 1


class Pairs(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, row):
        return {"x": INPUTS[row], "label": CLASSES[row].to(torch.int32)}


def test_labels_of_a_loader_of_dicts_and_of_a_loss_of_ones_own():
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["label"].long(), reduction="none")

    def outputs(model, batch):
        return model(batch["x"]), batch["label"].long()

    def shifted(model, batch):
        return model(batch["x"]), (batch["label"].long() + 1) % 3

    plain = small()
    train = DataLoader(Pairs(), batch_size=5)
    for function, dtype in ((outputs, torch.int32), (shifted, torch.int64)):
        task = tracin.Task(plain.task.model, loss, outputs=function)
        method = tracin.TracInCP(task, plain.trajectory, progress=False, device="cpu")
        audit = find_label_issues(method, train, evidence=0)
        labels = audit.apply({}).labels
        # Labels that are no class numbers are not known to be the labels: the class numbers come instead.
        assert labels.tolist() == audit.given_labels.tolist()
        assert labels.dtype == dtype


def test_a_loss_without_outputs_tells_no_labels():
    own = small(1, lambda model, batch: (model(batch[0])[:, 0] - batch[1]).abs())
    audit = find_label_issues(own, (INPUTS, INPUTS.sum(1)), evidence=0)
    cleaned = audit.apply(audit.suggested(4))
    assert len(cleaned.rows) == N - 4
    assert cleaned.labels is None


def test_a_dtype_without_room_for_the_classes():
    audit = made(classes=300, class_names=None, labels=torch.tensor([0, 1, 2, 0, 1], dtype=torch.uint8))
    with pytest.raises(OptionError, match=r"row 1: the labels .*uint8.* have no room for class 299"):
        audit.apply({1: ("relabel", 299)})
    assert {decision.action for decision in audit.suggested()} == {"remove"}


def test_labels_of_another_length_are_refused():
    with pytest.raises(ResultError, match=r"labels is \[4\], and there are 5 rows"):
        made(labels=torch.zeros(4))
