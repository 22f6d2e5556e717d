"""The static report as text: self-contained, escaped, and bounded."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256

import pytest

from explorer.common import NAMES, picture_study, source_of, text_study
from tracin.errors import OptionError, ResultError
from tracin.explorer.bundle import bundled, module_of
from tracin.explorer.static import FOLDER, render_static, write_static


@pytest.fixture(scope="module")
def pictures():
    source = source_of(picture_study())
    yield source
    source.answers.close()


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="tracin-data">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_the_report_is_one_file_that_links_to_nothing(pictures, tmp_path):
    path = write_static(pictures, tmp_path / "new" / "report.html")
    page = path.read_text(encoding="utf-8")
    outside = re.sub(r"<script type=\"module\">.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', outside) == []
    assert page.startswith("<!DOCTYPE html>")


def test_the_policy_names_the_hashes_of_what_is_inside(pictures):
    page = render_static(pictures)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    for kind, tag in (("script-src", r'<script type="module">'), ("style-src", "<style>")):
        inside = re.search(rf"{tag}(.*?)</(?:script|style)>", page, re.DOTALL)[1]
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_no_text_of_the_data_can_end_its_block():
    source = source_of(text_study())
    page = render_static(source)
    source.answers.close()
    block = re.search(r'id="tracin-data">(.*?)</script>', page, re.DOTALL)[1]
    assert not re.search("[<>&\u2028\u2029]", block)
    assert data_of(page)["study"]["classes"] == NAMES
    assert "<script>alert('0')</script>" in json.dumps(data_of(page)["tests"])


def test_the_answers_are_those_of_the_source(pictures):
    decision = {"action": "keep", "label": None, "seq": 1, "at": "2026-01-01T00:00:00.000Z"}
    last = pictures.content.audit.order[-1].item()
    data = data_of(render_static(pictures, tests=4, suspects=5, explained=2, decided={last: decision}))
    assert len(data["tests"]) == 4
    assert [item["row"] for item in data["suspects"]] == [*pictures.content.audit.order[:5].tolist(), last]
    assert data["suspects"][-1]["decision"] == decision
    assert data["progress"]["kept"] == 1
    assert data["study"]["held_suspects"].startswith("This report holds the first 5 of 90 suspects")
    assert data["study"]["held_suspects"].endswith("and every decided row.")
    assert sorted(key.split("/")[0] for key in data["explanations"]) == ["test", "test", "train", "train"]
    assert data["study"]["why_no_upload"] == "This report holds 4 of 9 test rows and 6 of 90 training rows."
    assert all(address.startswith("data:image/png;base64,") for address in data["pictures"].values())


def test_a_report_of_all_suspects_lacks_none(pictures):
    assert data_of(render_static(pictures, suspects=90))["study"]["held_suspects"] is None


def test_pictures_beyond_the_room_are_left_out(pictures):
    assert data_of(render_static(pictures, room=0))["pictures"] == {}


@pytest.mark.parametrize("name", ["tests", "suspects", "explained", "room"])
def test_a_negative_number_is_refused(pictures, name):
    with pytest.raises(OptionError, match=f"{name} is -1"):
        render_static(pictures, **{name: -1})


def test_modules_are_bundled_in_one_form_only():
    assert "import" not in re.findall(r"^\w+", bundled("main", module_of(FOLDER)), re.MULTILINE)
    with pytest.raises(ResultError, match=r"main\.js: 'export default 1;'"):
        bundled("main", {"main": "export default 1;\n"}.__getitem__)
    with pytest.raises(ResultError, match="main → other → main"):
        bundled(
            "main",
            {
                "main": 'import { a } from "./other.js";\n',
                "other": 'import { b } from "./main.js";\n',
            }.__getitem__,
        )


def test_no_module_makes_markup_of_text():
    refused = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|https?://(?!www\.w3\.org)"
    for path in FOLDER.glob("*.js"):
        assert not re.search(refused, path.read_text(encoding="utf-8")), path.name
