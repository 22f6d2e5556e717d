"""The static report, opened as a file, with no server."""

from __future__ import annotations

import pytest

from explorer.browser.driving import until
from explorer.common import MARKUP, picture_study, source_of, text_study
from tracin.explorer.static import write_static


@pytest.fixture(scope="module")
def pictures(browser, tmp_path_factory):
    source = source_of(picture_study())
    decision = {"action": "relabel", "label": "dog", "seq": 1, "at": "2026-01-01T00:00:00.000Z"}
    first = source.content.audit.order[0].item()
    yield write_static(source, tmp_path_factory.mktemp("report") / "report.html", decided={first: decision})
    source.answers.close()


def test_the_pages_work_from_a_file_and_ask_nobody(pictures, visit):
    asked = []
    seen = visit("about:blank", offline=True)
    page = seen.page
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pictures.as_uri())
    page.get_by_role("button", name="All", exact=True).click()
    page.wait_for_selector(".list .tile")
    page.locator(".list .tile").first.click()
    page.wait_for_selector(".cards-row.proponent .card")
    assert (
        page.locator(".query img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 6
    )
    assert page.locator(".loss-chart svg .dot").count() == 3
    page.keyboard.press("2")
    page.wait_for_selector(".suspect .badge.relabel")
    assert page.locator(".act").count() == 0
    page.keyboard.press("k")
    assert page.locator(".badge").count() == 1
    assert page.locator(".held").count() == 0
    page.keyboard.press("3")
    page.wait_for_selector(".tiles .fact")
    assert [each for each in asked if not each.startswith(("data:", pictures.as_uri()))] == []


def test_a_report_of_a_part_says_which_part(browser, visit, tmp_path):
    source = source_of(picture_study())
    path = write_static(source, tmp_path / "report.html", suspects=2)
    flagged = int(source.content.audit.is_issue.sum())
    inside = int(source.content.audit.is_issue[source.content.audit.order[:2]].sum())
    source.answers.close()
    page = visit(f"{path.as_uri()}#/audit").page
    page.get_by_role("button", name="All", exact=True).click()
    told = (
        f"This report holds the first 2 of 90 suspects, by suspicion: {inside} of the {flagged} flagged rows."
    )
    page.get_by_text(told).wait_for()
    assert page.locator(".progress-words").inner_text().startswith(f"0 of {flagged} flagged decided")


def test_the_report_has_nothing_serious_for_axe(pictures, visit, axe):
    page = visit(pictures.as_uri(), width=390, height=844).page
    page.wait_for_selector(".list-count:not(:empty)")
    page.evaluate(axe)
    for key, there in {"1": ".list-count", "2": ".suspect", "3": ".tiles"}.items():
        page.keyboard.press(key)
        page.wait_for_selector(there)
        found = page.evaluate("axe.run(document)")["violations"]
        assert [each["id"] for each in found if each["impact"] in {"serious", "critical"}] == []


def test_markup_in_the_data_stays_text(browser, visit, tmp_path):
    source = source_of(text_study())
    path = write_static(source, tmp_path / "report.html")
    source.answers.close()
    page = visit(path.as_uri()).page
    page.get_by_role("button", name="All", exact=True).click()
    until(page, "document.querySelectorAll('.list .tile').length > 0")
    page.locator(".list .tile").first.click()
    page.wait_for_selector(".query .face.words")
    assert page.locator(".query .face").inner_text() in {MARKUP.format(row=label) for label in range(3)}
    assert page.evaluate("document.querySelectorAll('main script').length") == 0


def test_another_script_would_not_run(pictures, visit, tmp_path):
    text = pictures.read_text(encoding="utf-8").replace(
        "</body>", "<script>window.ran = true</script></body>"
    )
    (tmp_path / "changed.html").write_text(text, encoding="utf-8")
    seen = visit("about:blank")
    seen.allowed = ("Content Security Policy",)
    seen.page.goto((tmp_path / "changed.html").as_uri())
    seen.page.wait_for_selector(".list-count:not(:empty)")
    assert seen.page.evaluate("window.ran") is None
    assert seen.complaints
