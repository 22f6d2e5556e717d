"""Uploads: pictures, texts and tables become rows, within limits; nothing else is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import tracin
from explorer.common import NAMES, client_of, picture_study, pictures, source_of, table_study, text_study
from tracin.errors import OptionError
from tracin.explorer.uploads import (
    LARGEST_BODY,
    LARGEST_PICTURE,
    Reading,
    array_of,
    reading_of,
    table_of,
    text_of,
)


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def picture(label: int) -> np.ndarray:
    x, _ = pictures(3, 5)
    return (x[label, 0] * 255).round().byte().numpy()


def send(client, body: bytes, kind: str = "image/png"):
    return client.ask("POST", "/api/upload", content=body, headers={"Content-Type": kind})


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(width: int, height: int) -> bytes:
    """A small PNG file of a picture that would fill the memory."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\x00" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_picture_is_explained_for_its_predicted_class(source, client, label):
    name = send(client, png(picture(label))).json()["row"]
    found = client.json(f"/api/explain/upload/{name}", k=3)
    assert found["query"]["side"] == "upload"
    assert found["query"]["row"] == name
    assert found["query"]["label"] is None
    assert found["query"]["predicted"] == NAMES[label]
    assert 0 < found["query"]["confidence"] <= 1
    (target,) = found["targets"]
    assert (target["kind"], target["name"]) == ("predicted", NAMES[label])
    assert {card["label"] for card in target["proponents"]} == {NAMES[label]}
    face = client.get(f"/{found['query']['face']['src']}")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(face.content))), picture(label))


@pytest.mark.parametrize(
    "as_data",
    [
        lambda x, y: (x, y),
        lambda x, y: {"images": x, "label": y},
        TensorDataset,
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=2),
        lambda x, y: [(one, int(label)) for one, label in zip(x, y, strict=True)],
    ],
)
def test_an_upload_is_explained_as_the_same_test_row_is(tmp_path, as_data):
    """Row 0 of the test set, rounded to bytes, gives the same lists as its picture sent in, whatever the rows lie in."""
    x, y = pictures(3, 2)
    rounded = (x * 255).round() / 255
    source = source_of(picture_study(test=as_data(rounded, y)))
    client = client_of(source, tmp_path)
    name = send(client, png((rounded[0, 0] * 255).round().byte().numpy())).json()["row"]
    sent = client.json(f"/api/explain/upload/{name}")["targets"][0]
    row = client.json("/api/explain/test/0")["targets"][0]
    for part in ("proponents", "opponents"):
        assert [card["row"] for card in sent[part]] == [card["row"] for card in row[part]]
        assert [card["score"] for card in sent[part]] == pytest.approx(
            [card["score"] for card in row[part]], rel=1e-4
        )
    source.answers.close()


def test_jpeg_colour_and_other_sizes_are_taken(client):
    colour = np.repeat(np.kron(picture(1), np.ones((5, 5), np.uint8))[..., None], 3, axis=2)
    for body, kind in ((png(colour, "JPEG"), "image/jpeg"), (png(colour), "image/png")):
        name = send(client, body, kind).json()["row"]
        assert client.json(f"/api/explain/upload/{name}")["query"]["predicted"] == NAMES[1]


def test_the_last_uploads_are_held(source, client):
    names = [send(client, png(picture(0))).json()["row"] for _ in range(33)]
    assert client.get(f"/api/explain/upload/{names[0]}").status_code == 400
    assert client.get(f"/face/upload/{names[0]}.png").status_code == 404
    assert client.get(f"/face/upload/{names[-1]}.png").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"GIF89a" + b"\x00" * 50,
        b"\x89PNG\r\n\x1a\n",
        png(np.zeros((9, 9), np.uint8))[:40],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        pickle.dumps({"a": 1}),
        png(np.zeros((4, 4), np.uint8), "BMP"),
        png(np.zeros((4, 4), np.uint8), "TIFF"),
    ],
)
def test_what_is_no_picture_is_refused(client, body):
    found = send(client, body)
    assert found.status_code == 400
    assert "PNG or JPEG" in found.json()["error"]


class Executed:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "kind", ["image/png", "image/jpeg", "text/plain", "application/json", "application/octet-stream"]
)
def test_a_pickle_is_never_read(client, kind, tmp_path):
    ran = tmp_path / "ran"
    file = io.BytesIO()
    torch.save({"state": Executed(ran)}, file)
    for body in (pickle.dumps(Executed(ran)), file.getvalue()):
        assert send(client, body, kind).status_code in {400, 415}
    assert not ran.exists()
    pickle.loads(pickle.dumps(Executed(ran)))
    assert ran.exists()


@pytest.mark.parametrize("size", [(4001, 4000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (100_000, 100_000)])
def test_a_bomb_is_refused_by_its_size(client, size):
    found = send(client, bomb(*size))
    assert found.status_code == 400
    assert "16 million pixels" in found.json()["error"] or "PNG or JPEG" in found.json()["error"]


def test_a_bomb_of_text_in_a_picture_is_refused():
    text = chunk(b"zTXt", b"comment\x00\x00" + zlib.compress(b"a" * 200_000_000, 9))
    body = png(np.zeros((4, 4), np.uint8))
    with pytest.raises(OptionError, match="PNG or JPEG"):
        array_of(body[:33] + text + body[33:], (4, 4), grey=True)


def test_a_large_file_is_refused(client):
    found = send(client, b"\x00" * (LARGEST_BODY + 1))
    assert found.status_code == 413
    assert "4,096 KiB" in found.json()["error"]


@pytest.mark.parametrize(
    "kind", ["image/svg+xml", "text/html", "multipart/form-data; boundary=x", "", "application/zip"]
)
def test_other_kinds_are_refused(client, kind):
    assert send(client, b"abc", kind).status_code == 415


def test_another_kind_than_the_rows_is_refused(client):
    found = send(client, b"a text", "text/plain")
    assert found.status_code == 400
    assert "image" in found.json()["error"]


def test_a_text_is_read_by_the_study(tmp_path):
    source = source_of(text_study())
    client = client_of(source, tmp_path)
    assert client.json("/api/study")["upload"] == "text"
    name = send(client, b"<script>alert('aab')</script>", "text/plain; charset=utf-8").json()["row"]
    found = client.json(f"/api/explain/upload/{name}")
    assert found["query"]["face"] == {"kind": "text", "text": "<script>alert('aab')</script>"}
    assert found["query"]["predicted"] in NAMES
    assert found["targets"][0]["proponents"]
    for body, names in ((b"\xff\xfea", "UTF-8"), (b" \n", "empty")):
        refused = send(client, body, "text/plain")
        assert refused.status_code == 400
        assert names in refused.json()["error"]
    source.answers.close()


def test_a_table_is_read_by_the_study(tmp_path):
    source = source_of(table_study())
    client = client_of(source, tmp_path)
    assert client.json("/api/study")["upload"] == "table"
    assert client.json("/api/test")["items"][0]["face"]["rows"][0][0] == "<i>a</i>"
    body = json.dumps({"a": 0.1, "b": 0.2, "c": 0.9}).encode()
    name = send(client, body, "application/json").json()["row"]
    found = client.json(f"/api/explain/upload/{name}")
    assert found["query"]["predicted"] == "dog"
    assert found["query"]["face"]["rows"] == [["a", "0.1"], ["b", "0.2"], ["c", "0.9"]]
    missing = send(client, b'{"a": 1}', "application/json")
    assert missing.status_code == 422
    assert "read raised KeyError" in missing.json()["error"]
    source.answers.close()


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b"3",
        b"{",
        b'{"a": NaN}',
        b'{"a": [1]}',
        b'{"a": {"b": 1}}',
        b"[" * 100_000,
        b'{"a": Infinity}',
    ],
)
def test_a_table_of_another_form_is_refused(body):
    with pytest.raises(OptionError, match="JSON"):
        table_of(body)


def test_texts_and_tables_are_read_as_they_are():
    assert text_of("naïve <b>".encode()) == "naïve <b>"
    assert table_of(b'{"a": 1, "b": null, "c": true, "d": "x"}') == {"a": 1, "b": None, "c": True, "d": "x"}


def test_pictures_of_all_kinds_become_bytes():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert np.array_equal(array_of(png(grey), (8, 8), grey=True), grey)
    assert array_of(png(grey), (4, 6), grey=False).shape == (4, 6, 3)
    deep = (grey.astype(np.uint16) << 8) + 7
    assert np.array_equal(array_of(png(deep), (8, 8), grey=True), grey)
    clear = np.zeros((8, 8, 4), np.uint8)
    assert array_of(png(clear), (8, 8), grey=True).min() == 255
    file = io.BytesIO()
    Image.fromarray(grey).convert("P").save(file, "PNG")
    assert np.array_equal(array_of(file.getvalue(), (8, 8), grey=True), grey)
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 255
    assert array_of(png(wide), (8, 8), grey=True).min() > 240
    assert LARGEST_PICTURE == 16_000_000


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"train": (pictures(90, 1)[0] * 2, pictures(90, 1)[1])}, "outside 0 to 1"),
        ({"train": (pictures(90, 1)[0].flatten(1), pictures(90, 1)[1])}, "shape"),
        ({"train": (pictures(90, 1)[0].double(), pictures(90, 1)[1])}, None),
    ],
)
def test_pictures_that_are_not_plain_need_the_study_to_read(more, why):
    source = source_of(picture_study())
    study = picture_study(render=None, **more)
    found = reading_of(study, source.content)
    if why is None:
        assert isinstance(found, Reading)
        assert found.read(png(picture(0)))[0].dtype == torch.float64
    else:
        assert isinstance(found, str)
        assert why in found
        assert "read" in found
    source.answers.close()


def test_colour_pictures_come_channel_first():
    source = source_of(picture_study())
    x, y = pictures(90, 1)
    found = reading_of(picture_study(render=None, train=(x.repeat(1, 3, 1, 1), y)), source.content)
    assert isinstance(found, Reading)
    red = np.zeros((6, 6, 3), np.uint8)
    red[..., 0] = 255
    inputs, _ = found.read(png(red))
    assert inputs.shape == (3, 6, 6)
    assert inputs.amax((1, 2)).tolist() == [1.0, 0.0, 0.0]
    source.answers.close()


def test_without_a_way_to_read_texts_there_is_no_upload(tmp_path):
    source = source_of(text_study(read=False))
    client = client_of(source, tmp_path)
    told = client.json("/api/study")
    assert told["upload"] is None
    assert "read=" in told["why_no_upload"]
    assert send(client, b"a text", "text/plain").status_code == 400
    source.answers.close()


def test_a_study_that_normalises_reads_by_itself(tmp_path):
    seen = []

    def read(value):
        seen.append(value)
        return torch.as_tensor(value)[None].float() / 255

    study = picture_study(read=read)
    source = source_of(study)
    client = client_of(source, tmp_path)
    name = send(client, png(np.kron(picture(2), np.ones((4, 4), np.uint8)))).json()["row"]
    assert client.json(f"/api/explain/upload/{name}")["query"]["predicted"] == NAMES[2]
    assert (seen[0].shape, seen[0].dtype) == ((6, 6), np.uint8)
    assert isinstance(study, tracin.Study)
    source.answers.close()
