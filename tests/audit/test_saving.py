"""An audit comes back as it was, or is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from audit.common import audited_digits, made
from tracin.audit import Audit, Calibration, Duplicates, Evidence
from tracin.errors import ResultError


def full() -> Audit:
    evidence = Evidence(
        torch.tensor([1, 3]),
        torch.tensor([[0, 2], [4, -1]]),
        torch.tensor([[2.0, 1.0], [0.5, 0.0]]),
        torch.tensor([[3, -1], [1, 0]]),
        torch.tensor([[-2.0, 0.0], [-3.0, -1.0]]),
    )
    duplicates = Duplicates(torch.tensor([[0, 4]]), torch.tensor([0.9995], dtype=torch.float64), 0.999)
    calibration = Calibration(
        (0.9, 0.5), (1.0, 0.8), (0.5, 1.0), (0.1, 0.3), (0.9, 0.7), 0.05, 0.1, 5, (0, 1), 0.9
    )
    agreement = torch.tensor([math.nan, 0.25, math.nan, 0.75, math.nan], dtype=torch.float64)
    audit = made(
        evidence=evidence,
        duplicates=duplicates,
        notes=("one", "two"),
        provenance={"method": "TracInCP", "checkpoints": [1, 2]},
        signals={**made().signals, "proponent_agreement": agreement},
    )
    return audit.calibrated(calibration)


def same(one: Audit, other: Audit) -> None:
    assert type(one) is type(other) is Audit
    assert one.records() == other.records()
    for name in ("notes", "class_names", "classes", "cutoff"):
        assert getattr(one, name) == getattr(other, name)
    assert dict(one.provenance) == dict(other.provenance)
    assert set(one.signals) == set(other.signals)
    for name, values in one.signals.items():
        assert torch.equal(values.nan_to_num(-9), other.signals[name].nan_to_num(-9))
    assert (one.predicted_labels is None) == (other.predicted_labels is None)


def test_a_round_trip(tmp_path):
    audit = full()
    path = audit.save(tmp_path / "kept")
    assert [entry.name for entry in (tmp_path / "kept").iterdir()] == ["audit.safetensors"]
    again = Audit.load(tmp_path / "kept")
    same(audit, again)
    same(audit, Audit.load(path))
    assert vars(again.calibration) == vars(audit.calibration)
    assert again.evidence.of(1) == (((0, 2.0), (2, 1.0)), ((3, -2.0),))
    assert again.evidence.of(3) == (((4, 0.5),), ((1, -3.0), (0, -1.0)))
    assert again.evidence.of(0) is None
    assert again.duplicates.of(4) == (0,)


def test_a_plain_and_a_real_one(tmp_path):
    made(class_names=None, given_labels=None, suggested_labels=None, predicted_labels=None).save(
        tmp_path / "a"
    )
    assert Audit.load(tmp_path / "a").given_labels is None
    audited_digits().save(tmp_path / "b")
    same(audited_digits(), Audit.load(tmp_path / "b"))


def test_the_same_audit_gives_the_same_bytes(tmp_path):
    assert full().save(tmp_path / "a").read_bytes() == full().save(tmp_path / "b").read_bytes()


def test_any_changed_byte_is_noticed(tmp_path):
    path = full().save(tmp_path)
    content = path.read_bytes()
    for place in range(8, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(ResultError, match=r"audit\.safetensors"):
            Audit.load(tmp_path)


def test_what_is_cut_short_or_missing_or_of_another_kind(tmp_path):
    path = full().save(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ResultError, match=r"audit\.safetensors"):
        Audit.load(tmp_path)
    with pytest.raises(ResultError, match="does not exist"):
        Audit.load(tmp_path / "nowhere")
    save_file({"score": torch.ones(3)}, path)
    with pytest.raises(ResultError, match="no saved audit"):
        Audit.load(tmp_path)


def test_a_tensor_that_is_gone_is_named(tmp_path):
    path = full().save(tmp_path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors["signals.aum"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(ResultError, match=r"signals\.aum"):
        Audit.load(tmp_path)


def test_an_older_audit_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = full().save(tmp_path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tracin.files.save_file", full_disk)
    with pytest.raises(ResultError, match="No space left"):
        made().save(tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_lengths_that_do_not_agree_are_refused():
    with pytest.raises(ResultError, match="aum is \\[4\\], and there are 5 rows"):
        made(signals={"aum": torch.zeros(4)})
    with pytest.raises(ResultError, match="score is not from 0 to 1"):
        made(score=torch.tensor([0.0, 1.5, 0.0, 0.0, 0.0]))
