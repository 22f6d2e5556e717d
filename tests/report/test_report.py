"""The report: whole in one file, every text escaped, every number where it belongs."""

from __future__ import annotations

import re
import sys
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch

from tracin.errors import MissingExtraError, OptionError
from tracin.evaluation import DetectionCurve
from tracin.plots import Card, Explanation, LossPath
from tracin.report import Check, Fact, ReportData, render_report, write_report

pytest.importorskip("matplotlib")

EVIL = "<script>alert('x')</script>\"&\"<img src=http://evil.example/x>"
VOID = {"img", "meta", "source"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; unbalanced tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def path() -> LossPath:
    return LossPath(
        (5, 20), torch.tensor([2.0, 0.5]), torch.tensor([[1.0, -2.0], [0.5, -0.25]]), torch.tensor([3, 8])
    )


def data(text: str = "cat") -> ReportData:
    proponent = Card(text, row=3, label=text, true_label=text + "!", score=1.5)
    opponent = Card({text: text}, row=8, label=text, true_label=text, score=-2.25)
    query = Card(np.eye(6), row=17, label=text, predicted=text + "?", correct=False)
    return ReportData(
        title=text,
        summary=text,
        facts=(Fact(text, text, text),),
        check=Check(0.975, 3e-7, table=({"parameter": text, "relative error": 3e-7},), notes=(text,)),
        suspects=(Card(np.eye(6), row=1, label=text, true_label=text + "!", score=9.5), opponent),
        curves={text: DetectionCurve([0.9, 0.1, 0.8, 0.2, 0.3], [True, False, False, True, False])},
        shares=(0.2, 0.6),
        explanations=(Explanation(query, (proponent,), (opponent,), target=text, path=path()),),
        notes=(text,),
        provenance={text: text, "checkpoints": [{"name": text}]},
    )


def test_every_text_from_data_is_escaped():
    html = render_report(data(EVIL))
    page = Page(html)
    assert page.all("script") == []
    assert "<script" not in html.lower()
    assert "&lt;script&gt;" in html
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert EVIL in page.text


def test_nothing_is_fetched_and_nothing_can_run():
    html = render_report(data())
    assert re.search(r"(https?:)?//", without_pictures(html)) is None
    page = Page(html)
    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "form", "a"})
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    for attributes in [attributes for _, attributes in page.tags]:
        for key in ("src", "srcset"):
            assert attributes.get(key, "data:").startswith("data:")


def without_pictures(html: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)


def test_the_pictures_are_the_pictures():
    images = pytest.importorskip("PIL.Image")
    page = Page(render_report(data()))
    first = next(image for image in page.all("img") if image["alt"].startswith("training row 1"))
    content = b64decode(first["src"].partition(",")[2])
    with images.open(BytesIO(content)) as image:
        assert np.array_equal(np.asarray(image), np.eye(6) * 255)
    assert (first["width"], first["height"], first["class"]) == ("6", "6", "pixels")


def test_every_picture_has_words_for_those_who_cannot_see_it():
    page = Page(render_report(data()))
    alts = [image["alt"] for image in page.all("img")]
    assert any(alt == "test row 17, label cat" for alt in alts)
    assert any(alt.startswith("Detection curve: ") for alt in alts)
    assert any(alt == "The loss along training: 2.00 at step 5, 0.500 at step 20" for alt in alts)


def test_the_sections_say_what_was_measured():
    text = Page(render_report(data())).text
    for expected in (
        "97.5 % of the model's parameters were traced",
        "3.00e−7",
        "1 of these 2 carry a label that was planted wrong",
        "the first 20 % of the rows hold 50 %, the first 60 % of the rows hold 50 %",
        "1 of 2, by cat",
        "predicted cat?",
        "label cat (wrong)",
        "Explained: the loss of cat",
        "+1.50",
        "−2.25",
        "planted, was cat!",
        "not planted",
    ):
        assert expected in text, expected


def test_signs_have_the_classes_of_their_colours_and_self_influence_none():
    page = Page(render_report(data()))
    classes = [attributes.get("class", "") for name, attributes in page.tags if name == "span"]
    assert classes.count("score proponent") == 1
    assert classes.count("score opponent") == 1
    assert classes.count("score size") == 2


def test_charts_come_for_light_and_dark_wide_and_narrow():
    page = Page(render_report(data()))
    media = [source["media"] for source in page.all("source")]
    assert len(media) == 6
    assert {source for source in media if "dark" in source and "700px" in source}
    assert "color-scheme: light dark" in render_report(data())


def test_a_section_without_data_is_left_out():
    html = render_report(ReportData("Only a title"))
    assert Page(html).all("h2") == []
    assert "<h1>Only a title</h1>" in html


def test_a_report_without_charts_needs_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plain = ReportData("t", suspects=(Card(np.eye(3), score=1.0),), check=Check(1.0, 0.0))
    assert "Suspects" in render_report(plain)
    with pytest.raises(MissingExtraError, match=r"tracin\[plot\]"):
        render_report(data())


def test_nothing_is_escaped_twice():
    html = render_report(data())
    assert "&lt;" not in html
    assert "&amp;" not in html
    assert "<dt>cat</dt><dd>cat</dd>" in html


def test_many_parameters_are_folded():
    rows = tuple({"parameter": f"layer{n}.weight", "numbers": n, "exact": True} for n in range(40))
    page = Page(render_report(ReportData("t", check=Check(1.0, 0.0, table=rows))))
    assert len(page.all("details")) == 1
    assert "All 40 parameters" in page.text


def test_a_long_text_is_cut():
    html = render_report(ReportData("t", suspects=(Card("word " * 5_000, score=1.0),)))
    assert len(html) < 15_000
    assert "word…" in html


def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new folder" / "report.html"
    assert write_report(data(), target) == target
    before = target.read_text(encoding="utf-8")
    assert before == render_report(data())
    monkeypatch.setattr("tracin.report.page.render_report", lambda _: "\ud800 cannot be encoded")
    with pytest.raises(UnicodeEncodeError):
        write_report(data(), target)
    assert target.read_text(encoding="utf-8") == before
    assert [file.name for file in target.parent.iterdir()] == ["report.html"]


def test_a_coverage_outside_0_to_1_is_refused():
    with pytest.raises(OptionError, match="from 0 to 1"):
        Check(97.5, 0.0)
