"""Every address of the explorer, on a live study."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

import tracin
from explorer.common import NAMES, TEST, TRAIN, client_of, picture_study, regression_study, source_of
from tracin.errors import DataError
from tracin.explain import explain
from tracin.explorer.app import STATIC
from tracin.explorer.live import LiveAnswers


def test_the_study_is_told(client):
    told = client.json("/api/study")
    assert told["title"] == "small"
    assert (told["train"], told["test"], told["live"], told["upload"]) == (TRAIN, TEST, True, "image")
    assert told["classes"] == NAMES
    assert [checkpoint["step"] for checkpoint in told["checkpoints"]] == [20, 40, 60]
    assert told["version"] == tracin.__version__
    assert (told["labels"], told["exports"]) == (True, ["csv", "parquet", "json", "cleanlab", "label-studio"])


def test_test_rows_are_those_of_the_last_checkpoint(client):
    study = picture_study()
    model = study.task.model
    model.load_state_dict(study.trajectory[-1].state)
    x, y = study.test
    likely = model(x).double().softmax(1)
    items = client.json("/api/test")["items"]
    assert [item["row"] for item in items] == list(range(TEST))
    assert [item["predicted"] for item in items] == [NAMES[at] for at in likely.argmax(1).tolist()]
    assert [item["label"] for item in items] == [NAMES[at] for at in y.tolist()]
    expected = likely.amax(1).tolist()
    assert [item["confidence"] for item in items] == pytest.approx(expected, rel=1e-5)
    assert [item["correct"] for item in items] == (likely.argmax(1) == y).tolist()


@pytest.mark.parametrize("order", ["confidence", "loss", "row"])
@pytest.mark.parametrize("down", [0, 1])
def test_test_rows_are_ordered_and_paged(client, order, down):
    items = client.json("/api/test", order=order, down=down)["items"]
    values = [item[order] for item in items]
    assert values == sorted(values, reverse=bool(down))
    page = client.json("/api/test", order=order, down=down, offset=2, limit=3)
    assert page["total"] == TEST
    assert page["items"] == items[2:5]


def test_test_rows_are_filtered(client):
    items = client.json("/api/test")["items"]
    for show, correct in (("right", True), ("wrong", False)):
        found = client.json("/api/test", show=show)["items"]
        assert found == [item for item in items if item["correct"] is correct]
    dogs = client.json("/api/test", label="dog")["items"]
    assert {item["label"] for item in dogs} == {"dog"}
    assert len(dogs) == 3
    cows = client.json("/api/test", predicted="<b>cow</b>")
    assert cows["items"] == [item for item in items if item["predicted"] == "<b>cow</b>"]
    middle = sorted(item["confidence"] for item in items)[4]
    assert client.json("/api/test", min=middle + 1e-4)["total"] == 4
    assert client.json("/api/test", max=middle - 1e-4)["total"] == 4
    assert [item["row"] for item in client.json("/api/test", search="7 Cow")["items"]] == [7]
    assert client.json("/api/test", search="no such thing")["total"] == 0


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/api/test?show=worst", "show"),
        ("/api/test?limit=0", "limit"),
        ("/api/test?limit=100000", "limit"),
        ("/api/test?offset=-1", "offset"),
        ("/api/test?min=nan", "min"),
        ("/api/test?label=horse", "horse"),
        ("/api/test?order=name", "order"),
        ("/api/suspects?show=some", "show"),
        ("/api/suspects?given=horse", "horse"),
        ("/api/explain/test/9", "row 9"),
        ("/api/explain/test/-1", "row"),
        ("/api/explain/test/one", "row"),
        ("/api/explain/valid/1", "valid"),
        ("/api/explain/test/1?k=0", "k"),
        ("/api/explain/test/1?k=51", "k"),
        ("/api/explain/test/1?target=horse", "horse"),
        ("/api/explain/upload/0123", "upload"),
        ("/api/export?format=pickle", "format"),
        ("/api/decisions?since=x", "since"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(client, path, names):
    found = client.get(path)
    assert found.status_code == 400
    assert names in found.json()["error"]


def test_a_prediction_is_explained_as_the_library_does(client):
    study = picture_study()
    method = tracin.TracInCP(study.task, study.trajectory, progress=False, device="cpu")
    (expected, *_) = explain(method, study.train, study.test, [5], target="predicted")
    found = client.json("/api/explain/test/5", k=4)
    assert found["query"] == {k: client.json("/api/test")["items"][5][k] for k in found["query"]}
    target = found["targets"][0]
    top = expected.top_k(4)
    for name, lists in (("proponents", top.proponents), ("opponents", top.opponents)):
        assert [card["row"] for card in target[name]] == lists.ids[0].tolist()
        assert [card["score"] for card in target[name]] == pytest.approx(lists.values[0].tolist(), rel=1e-4)
    path = target["path"]
    assert path["steps"] == [20, 40, 60]
    assert path["losses"] == pytest.approx(expected.losses.tolist(), rel=1e-4)
    both = torch.tensor(path["lowered"]) + torch.tensor(path["raised"])
    assert both.tolist() == pytest.approx(expected.contributions.sum(1).tolist(), rel=1e-3, abs=1e-4)
    assert target["words"] == f"the predicted class, {found['query']['predicted']}"


def test_a_class_of_choice_and_the_label_are_explained(client):
    (dog,) = client.json("/api/explain/test/0", target="dog")["targets"]
    assert (dog["kind"], dog["name"], dog["words"]) == ("class", "dog", "the class dog")
    (label,) = client.json("/api/explain/test/0", target="label")["targets"]
    assert (label["kind"], label["name"]) == ("label", "cat")


def test_a_wrong_label_is_explained_for_both_classes(client):
    """Training row 4 was relabelled: its prediction and its label differ."""
    found = client.json("/api/explain/train/4")
    kinds = [target["kind"] for target in found["targets"]]
    assert kinds == (
        ["predicted", "label"] if found["query"]["predicted"] != found["query"]["label"] else ["predicted"]
    )
    own = found["targets"][-1]
    rows = [card["row"] for name in ("proponents", "opponents") for card in own[name]]
    assert 4 not in rows
    assert own["own"] > 0


def test_a_training_row_is_explained_by_the_training_loss(tmp_path):
    """Test rows have a loss of their own, which is not that of the training rows."""
    plain = picture_study()

    def twice(model, batch):
        return 2 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    source = source_of(replace(plain, task=replace(plain.task, query_loss=twice), train=plain.test))
    client = client_of(source, tmp_path)
    train, test = (
        client.json(f"/api/explain/{side}/3", target="label")["targets"][0] for side in ("train", "test")
    )
    doubled = [2 * loss for loss in train["path"]["losses"]]
    assert test["path"]["losses"] == pytest.approx(doubled, rel=1e-5)
    assert source.content.train.losses[3] == pytest.approx(train["path"]["losses"][-1], rel=1e-5)
    source.answers.close()


def test_an_explanation_is_computed_once(source, client, monkeypatch):
    calls = []
    monkeypatch.setattr(LiveAnswers, "_explained", lambda *args: calls.append(args))
    client.get("/api/explain/test/8?target=label")
    assert len(calls) == 1
    monkeypatch.undo()
    first = client.json("/api/explain/test/8", target="label")
    monkeypatch.setattr(LiveAnswers, "_explained", lambda *args: calls.append(args))
    assert client.json("/api/explain/test/8", target="label") == first
    assert (
        client.json("/api/explain/test/8", target="label", k=2)["targets"][0]["proponents"]
        == (first["targets"][0]["proponents"][:2])
    )
    assert len(calls) == 1


def test_suspects_are_those_of_the_audit(source, client):
    audit = source.content.audit
    told = client.json("/api/suspects", show="all", limit=500)
    assert told["total"] == TRAIN
    assert [item["row"] for item in told["items"]] == audit.order.tolist()
    assert {4, 11, 20} <= {item["row"] for item in told["items"][:6]}
    flagged = client.json("/api/suspects")
    assert [item["row"] for item in flagged["items"]] == [i["row"] for i in told["items"] if i["flagged"]]
    first = told["items"][0]
    assert first["rank"] == 1
    assert first["given"] == NAMES[int(audit.given_labels[first["row"]])]
    assert first["suggested"] == NAMES[int(audit.suggested_labels[first["row"]])]
    assert first["signals"]["aum"] == pytest.approx(float(audit.signals["aum"][first["row"]]), rel=1e-4)
    evidence = audit.evidence.of(first["row"])
    assert [card["row"] for card in first["evidence"]["opponents"]] == [row for row, _ in evidence[1]]
    cats = client.json("/api/suspects", show="all", given="cat", limit=500)["items"]
    assert {item["given"] for item in cats} == {"cat"}


def test_rows_of_a_class_without_a_name_are_found(tmp_path):
    source = source_of(picture_study(class_names=["cat", "", "dog"]))
    client = client_of(source, tmp_path)
    everything = client.json("/api/suspects", show="all", limit=500)
    nameless = client.json("/api/suspects", show="all", given="", limit=500)
    assert 0 < nameless["total"] < everything["total"]
    assert {item["given"] for item in nameless["items"]} == {""}
    assert {item["label"] for item in client.json("/api/test", label="")["items"]} == {""}
    source.answers.close()


def test_trust_tells_coverage_verification_and_cost(source, client):
    told = client.json("/api/trust")
    assert told["coverage"]["fraction"] == 1.0
    assert {row["parameter"] for row in told["coverage"]["table"]} == {
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    }
    assert told["verification"]["exact"] is True
    assert told["verification"]["max_relative_error"] <= told["verification"]["tolerance"]
    assert (told["verification"]["rows"], told["verification"]["checkpoints"]) == (8, 3)
    assert told["calibration"] is None
    assert told["cutoff"]["why"] == source.content.audit.cutoff.why
    assert told["cost"]["peak_bytes"] > 1 << 20
    assert told["cost"]["seconds"] == pytest.approx(
        sum(s["seconds"] for s in told["cost"]["stages"]), rel=1e-3
    )


def test_pictures_are_png_files_that_may_be_kept(client):
    face = client.json("/api/test")["items"][3]["face"]
    assert (face["kind"], face["pixels"]) == ("image", True)
    found = client.get(f"/{face['src']}")
    assert found.headers["content-type"] == "image/png"
    assert found.content.startswith(b"\x89PNG")
    assert "immutable" in found.headers["cache-control"]
    assert client.get("/face/test/3.png").headers["cache-control"] == "private, no-cache"
    again = client.get(f"/{face['src']}", headers={"If-None-Match": found.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_there_is_no_other_page(client):
    for path in ("/api", "/api/nothing", "/face/test/9.png", "/face/valid/1.png", "/static/nothing.js"):
        found = client.get(path)
        assert found.status_code == 404
        assert found.json()["error"]
    assert client.post("/api/study", {}).status_code == 405
    assert client.get("/api/upload").status_code == 405


def test_the_document_and_its_files_are_served(client):
    found = client.get("/")
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert found.text == (STATIC / "index.html").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in STATIC.glob("*.js"))
    served = client.get(f"/static/{scripts[0]}")
    assert served.headers["content-type"] == "text/javascript; charset=utf-8"
    again = client.get(f"/static/{scripts[0]}", headers={"If-None-Match": served.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "cleanlab", "label-studio"])
def test_exports_are_downloads(client, kind):
    assert client.decide(4, "relabel", "dog").status_code == 200
    found = client.get(f"/api/export?format={kind}")
    assert found.status_code == 200, found.text
    assert found.headers["content-disposition"].startswith("attachment; filename=")
    assert len(found.content) > 100


def test_a_regression_has_targets_and_no_classes(tmp_path):
    source = source_of(regression_study())
    client = client_of(source, tmp_path)
    told = client.json("/api/study")
    assert (told["classes"], told["upload"]) == (None, None)
    assert "classes" in told["why_no_upload"]
    first = client.json("/api/suspects")["items"][0]
    assert first["row"] == 7
    assert float(first["given"]) > 5
    suggested = source.content.audit.suggested_labels
    if suggested is None:
        assert first["target"] is None
    else:
        assert first["target"] == pytest.approx(float(suggested[7]), rel=1e-9), "not in four digits"
    (target,) = client.json("/api/explain/train/7")["targets"]
    assert (target["kind"], target["name"], target["words"]) == ("label", None, "its own target")
    assert client.get("/api/explain/train/7?target=1").status_code == 400
    assert client.decide(7, "relabel", "dog").status_code == 400
    for bad in (10**400, 1e39, -1e39, float("nan"), True, None):
        assert client.decide(7, "relabel", bad).status_code == 400, bad
    assert client.decide(7, "relabel", 0.42).status_code == 200
    assert (told["labels"], told["exports"]) == (True, ["csv", "parquet", "json"])
    rows = list(csv.DictReader(io.StringIO(client.get("/api/export?format=csv").text)))
    assert (rows[7]["decision"], float(rows[7]["decided_label"])) == ("relabel", 0.42)
    tests = client.json("/api/test", show="wrong")
    assert tests["total"] == 4
    assert (tests["items"][0]["label"], tests["items"][0]["predicted"]) == ("0", "0.1")
    assert tests["items"][0]["correct"] is None
    source.answers.close()


def test_test_rows_that_are_none_are_named():
    with pytest.raises(DataError, match=r"^test is a NoneType"):
        source_of(picture_study(test=None))


def test_what_the_users_code_raises_is_told(tmp_path):
    def render(row):
        raise ValueError("no such font")

    source = source_of(picture_study(render=render))
    client = client_of(source, tmp_path)
    face = client.json("/api/test")["items"][0]["face"]
    assert face["kind"] == "text"
    assert "no such font" in face["text"]
    source.answers.close()


def test_a_bug_is_an_error_without_details(source, tmp_path, monkeypatch):
    client = client_of(source, tmp_path)
    monkeypatch.setattr(type(source), "study", lambda self: 1 / 0)
    found = client.get("/api/study")
    assert found.status_code == 500
    assert "division" not in found.text
    assert found.headers["x-content-type-options"] == "nosniff"
