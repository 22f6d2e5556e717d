"""A reader's way through the pages of the digits study, in a real browser."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from explorer.browser.driving import meddle, one_by_one, until
from explorer.browser.journeys import all_suspects, explain_and_follow, relabel_ten, suspects


def test_a_wrong_prediction_is_explained_and_a_proponent_followed(digits, visit):
    explain_and_follow(digits, visit)


def test_the_loss_along_training_is_a_chart_and_a_table(digits, visit):
    page = visit(f"{digits}#/explain/test/7").page
    page.wait_for_selector(".loss-chart svg .dot")
    steps = page.evaluate("fetch('api/study').then((answer) => answer.json())")["checkpoints"]
    assert page.locator(".loss-chart svg .dot").count() == len(steps)
    assert page.locator(".loss-chart svg .bar-up").count() == len(steps)
    page.get_by_text("The numbers").click()
    told = page.evaluate("fetch('api/explain/test/7').then((answer) => answer.json())")["targets"][0]["path"]
    shown = page.locator(".loss-chart tbody tr td:nth-child(2)").all_inner_texts()
    assert [float(text) for text in shown] == pytest.approx(told["losses"], rel=0.01)


def test_rows_are_found_by_filter_and_search(digits, visit):
    page = visit(f"{digits}#/explain").page
    page.wait_for_selector(".list .tile")
    page.get_by_role("button", name="All", exact=True).click()
    until(page, "document.querySelector('.list-count').textContent === '359 test rows'")
    page.get_by_label("Label", exact=True).select_option("3")
    until(page, "!document.querySelector('.list-count').textContent.startsWith('359')")
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("17")
    rows = "[...document.querySelectorAll('.list .line-row')].map((each) => each.textContent)"
    until(page, f"{rows}.length > 0 && {rows}.every((each) => each.includes('17'))")
    page.get_by_role("searchbox", name="Search rows").fill("no such words")
    page.get_by_text("No row passes the filter").wait_for()


def test_ten_suspects_are_relabelled_by_keyboard_and_exported(digits, visit):
    relabel_ten(digits, visit)


def test_two_tabs_see_each_other_and_the_newer_decision_counts(digits, visit):
    one, other = visit(f"{digits}#/audit"), visit(f"{digits}#/audit")
    for each in (one, other):
        all_suspects(each)
        each.page.keyboard.press("End")
        until(each.page, "document.querySelector('.panel-place')?.textContent.startsWith('1,438 ')")
    one_by_one(one, "x")
    until(other.page, "document.querySelector('.act.remove').ariaPressed === 'true'")
    # A tab that has not heard of it yet: its decision is refused, said so, and the newer one is shown.
    other.page.route("**/api/decisions?since=*", lambda route: route.abort())
    other.allowed = ("409", "ERR_FAILED")
    one.page.keyboard.press("k")
    one.page.wait_for_selector(".saved.good")
    until(one.page, "document.querySelector('.act.keep').ariaPressed === 'true'")
    other.page.keyboard.press("r")
    other.page.get_by_text("Another tab decided on row").wait_for()
    until(other.page, "document.querySelector('.act.keep').ariaPressed === 'true'")
    one_by_one(one, "uu")


def test_a_decision_that_does_not_arrive_is_told_and_sent_again(digits, visit):
    seen = visit(f"{digits}#/audit")
    page = seen.page
    all_suspects(seen)
    page.keyboard.press("End")
    until(page, "document.querySelector('.panel-place')?.textContent.startsWith('1,438 ')")
    seen.allowed = ("ERR_FAILED",)
    meddle(page, "api/decisions", lambda route: route.abort(), "failed")
    page.keyboard.press("k")
    page.get_by_text("1 decision not saved yet").wait_for()
    assert page.locator(".act.keep").get_attribute("aria-pressed") == "true"
    page.unroute("**/api/decisions")
    # Also a reload loses nothing: the tab sends what it had not sent.
    page.reload()
    page.wait_for_selector(".saved.good")
    page.get_by_role("button", name="Decided", exact=True).click()
    page.wait_for_selector(".suspect .badge.keep")
    page.locator(".suspect:has(.badge.keep)").first.click()
    one_by_one(seen, "u")


def test_a_long_list_holds_few_tiles(digits, visit):
    seen = visit(f"{digits}#/audit")
    page = seen.page
    all_suspects(seen)
    assert page.locator(".suspect").first.get_attribute("aria-setsize") == "1438"
    for key in ("End", "Home", "PageDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
        until(page, "document.activeElement.matches('.suspect[aria-selected=true]')")
        assert page.locator(".tile").count() < 100
    place = page.locator(".suspect[aria-selected=true]").get_attribute("aria-posinset")
    until(page, f"document.querySelector('.panel-place')?.textContent.startsWith('{place} ')")


def test_ten_thousand_suspects_are_fetched_as_they_come_in_sight(digits, visit):
    total, asked = 10_000, []
    seen = visit(f"{digits}#/trust")
    page = seen.page
    some = suspects(page)

    def answer(route):
        query = parse_qs(urlsplit(route.request.url).query)
        offset, limit = (int(query.get(name, ["0"])[0]) for name in ("offset", "limit"))
        asked.append(offset)
        rows = range(offset, min(total, offset + limit))
        items = [{**some[row % len(some)], "row": row, "rank": row + 1} for row in rows]
        tally = {"decided": 0, "flagged": total, "kept": 0, "relabelled": 0, "removed": 0}
        route.fulfill(json={"total": total, "items": items, "progress": tally})

    page.route("**/api/suspects?*", answer)
    page.keyboard.press("2")
    page.wait_for_selector(".suspect[aria-selected=true]")
    most = page.evaluate("""async () => {
        const scroller = document.querySelector('.suspects .scroller');
        let most = 0;
        for (const end = scroller.scrollHeight; scroller.scrollTop + scroller.clientHeight + 1 < end;) {
            scroller.scrollTop += 4000;
            await new Promise(requestAnimationFrame);
            most = Math.max(most, document.querySelectorAll('.tile').length);
        }
        return most;
    }""")
    until(page, "document.querySelector('.tile[aria-posinset=\"10000\"]')?.textContent.length > 0")
    until(page, "document.querySelectorAll('.tile.waiting').length === 0")
    assert most < 100
    assert len(asked) < total / 60 / 2


def test_a_picture_of_ones_own_is_traced(digits, visit, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    picture = np.zeros((8, 8), dtype=np.uint8)
    picture[1:7, 3:5] = 255
    image.fromarray(picture).save(tmp_path / "one.png")
    page = visit(f"{digits}#/explain").page
    page.get_by_role("button", name="Explain your own picture").click()
    page.get_by_label("A picture to explain").set_input_files(tmp_path / "one.png")
    page.get_by_role("heading", name="Your example").wait_for()
    assert page.locator(".cards-row.proponent .card").count() == 5
    (tmp_path / "words.txt").write_text("no picture")
    page.get_by_role("button", name="Explain your own picture").click()
    page.get_by_label("A picture to explain").set_input_files(tmp_path / "words.txt")
    page.get_by_text("This is no picture that can be read").wait_for()


def test_keys_are_listed_and_lead_to_the_pages(digits, visit):
    page = visit(f"{digits}#/explain").page
    page.wait_for_selector(".list .tile")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    dialog.get_by_text("relabel as suggested").wait_for()
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    for key, name in {"3": "Trust", "2": "Audit", "1": "Explain"}.items():
        page.keyboard.press(key)
        page.locator(f"nav a[aria-current=page]:has-text('{name}')").wait_for()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_axe_finds_nothing_serious(digits, visit, axe, dark, width):
    seen = visit(f"{digits}#/explain/test/7", width=width, height=840, dark=dark)
    page = seen.page
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    page.evaluate(axe)
    ready = {
        "#/explain/test/7": ".loss-chart svg .dot",
        "#/explain": ".list .tile",
        "#/audit": ".suspect[aria-selected=true]",
        "#/trust": ".stages",
    }
    for address, there in ready.items():
        page.evaluate("(address) => { location.hash = address; }", address)
        page.wait_for_selector(there)
        assert seen.is_narrow_enough(), address
        assert violations(page) == [], address
        if address == "#/audit":
            page.locator(".suspect").first.click()
            page.wait_for_selector(".panel-body .act")
            assert seen.is_narrow_enough()
            assert violations(page) == []
    page.keyboard.press("?")
    assert violations(page) == []


def violations(page):
    """What axe-core calls serious or critical."""
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [
        json.dumps({"id": each["id"], "nodes": [node["html"][:200] for node in each["nodes"]][:3]})
        for each in found
        if each["impact"] in {"serious", "critical"}
    ]
