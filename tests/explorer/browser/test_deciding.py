"""Keys decide on the row that is shown, once, and in the log of the study that is shown; what is not saved is told."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import pytest

from explorer.browser.driving import meddle, until
from explorer.browser.journeys import all_suspects, suspects

UNSENT = "Object.keys(sessionStorage).filter((key) => key.startsWith('tracin-unsent'))"
CHOSEN = "document.querySelector('.suspect[aria-selected=true]').ariaPosInSet"


def audit_of(address, visit, **more):
    """The page of suspects with the keys on the first of all rows."""
    seen = visit(f"{address}#/audit", **more)
    all_suspects(seen)
    return seen


def posts_of(page):
    """The bodies of what a page posts, as it goes on."""
    found = []
    page.on("request", lambda asked: found.append(asked.post_data_json) if asked.method == "POST" else None)
    return found


def changed(page, address, change):
    """Change what the server answers."""
    page.route(address, lambda route: route.fulfill(json=change(route.fetch().json())))


def decided_on(page, row):
    """What the server knows of a row's decision."""
    changes = page.evaluate("fetch('api/decisions?since=0').then((answer) => answer.json())")["changes"]
    return next((each["decision"] for each in changes if each["row"] == row), None)


def test_no_other_studys_log_takes_a_decision(digits, visit):
    seen = visit("about:blank")
    page = seen.page
    changed(page, "**/api/study", lambda study: {**study, "log": "another"})
    # The tab learns of it only by what it sends: its polling is held to be a moment before.
    page.route("**/api/decisions?since=*", lambda route: route.fulfill(json={"seq": 0, "changes": []}))
    seen.allowed = ("409",)
    page.goto(f"{digits}#/audit")
    all_suspects(seen)
    row = suspects(page)[0]["row"]
    posts = posts_of(page)
    page.keyboard.press("k")
    page.get_by_text("Another study is served here now; reload. One decision waits").wait_for()
    page.keyboard.press("k")
    page.get_by_text("2 decisions wait").wait_for()
    assert [each["log"] for each in posts] == ["another"]
    for address in ("**/api/study", "**/api/decisions?since=*"):
        page.unroute(address)
    page.get_by_role("button", name="Reload").click()
    page.wait_for_selector(".saved.good")
    assert page.locator("#unsent").is_hidden()
    assert page.evaluate(UNSENT) == ["tracin-unsent another"]
    assert decided_on(page, row) is None
    assert len(posts) == 1


def test_what_was_left_for_a_log_is_sent_when_its_study_is_back(digits, visit):
    seen = audit_of(digits, visit)
    page = seen.page
    row = suspects(page)[0]["row"]
    seen.allowed = ("ERR_FAILED",)
    meddle(page, "api/decisions", lambda route: route.abort(), "failed")
    page.keyboard.press("k")
    page.get_by_text("1 decision not saved yet").wait_for()
    # Every page tells it, and the sender runs on every page.
    page.keyboard.press("3")
    page.wait_for_selector(".stages")
    assert "1 decision not saved yet" in page.locator("#unsent").inner_text()
    page.unroute("**/api/decisions")
    page.reload()
    page.wait_for_selector(".stages")
    until(page, f"{UNSENT}.length === 0")
    until(page, "document.getElementById('unsent').hidden")
    assert decided_on(page, row)["action"] == "keep"


def test_a_refused_decision_takes_its_undo_with_it(digits, visit):
    seen = audit_of(digits, visit)
    page = seen.page
    row = suspects(page)[0]["row"]
    newer = {"action": "remove", "label": None, "seq": 10_000, "at": "2026-01-01T00:00:00.000Z"}
    seen.allowed = ("409",)
    answer = {"status": 409, "json": {"error": "it was decided.", "decision": newer}}
    meddle(page, "api/decisions", lambda route: route.fulfill(**answer), "409")
    page.keyboard.press("x")
    page.get_by_text(f"Another tab decided on row {row} meanwhile: removed").wait_for()
    assert page.locator(".toast:not(.error)").count() == 0
    posts = posts_of(page)
    page.keyboard.press("u")
    page.get_by_text(f"Row {row}: your decision does not stand any more").wait_for()
    assert posts == []


def test_no_key_decides_while_a_row_is_fetched(digits, visit):
    seen = visit("about:blank")
    page = seen.page
    held = []

    def hold(route):
        held.append(route)

    page.route(lambda address: "/api/suspects" in address and re.search("offset=[1-9]", address), hold)
    page.goto(f"{digits}#/audit")
    all_suspects(seen)
    posts = posts_of(page)
    page.keyboard.press("End")
    page.get_by_text("Place 1,438 in the list is on its way.").wait_for()
    for key in "krxl":
        page.keyboard.press(key)
    assert page.locator("dialog").count() == 0
    assert page.locator(".act").count() == 0
    while held:
        held.pop().continue_()
    until(page, "document.querySelector('.panel-place')?.textContent.startsWith('1,438 ')")
    assert posts == []
    last = int(page.locator(".panel h1").inner_text().rsplit(" ", 1)[1])
    page.keyboard.press("k")
    page.wait_for_selector(".saved.good")
    assert [each["row"] for each in posts] == [last]


def test_quick_presses_decide_on_each_row_once(digits, visit):
    seen = audit_of(digits, visit)
    page = seen.page
    posts = posts_of(page)
    for _ in range(100):
        page.keyboard.press("k")
    page.wait_for_selector(".saved.good")
    rows = [each["row"] for each in posts]
    assert len(rows) >= 60
    assert len(set(rows)) == len(rows)


def test_a_held_key_decides_once_and_moves_on(digits, visit):
    seen = audit_of(digits, visit)
    page = seen.page
    posts = posts_of(page)
    for _ in range(5):
        page.keyboard.down("k")
    page.keyboard.up("k")
    page.wait_for_selector(".saved.good")
    assert len(posts) == 1
    assert page.evaluate(CHOSEN) == "2"
    page.locator(".act.keep").focus()
    for _ in range(5):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    page.wait_for_selector(".saved.good")
    assert len(posts) == 2
    for _ in range(3):
        page.keyboard.down("n")
    page.keyboard.up("n")
    until(page, f"{CHOSEN} === '6'")


def test_only_exports_that_can_be_made_are_offered_and_a_failure_is_told(digits, visit):
    seen = visit("about:blank")
    page = seen.page
    changed(page, "**/api/study", lambda study: {**study, "exports": ["csv", "json"]})
    page.route(
        "**/api/export*", lambda route: route.fulfill(status=422, json={"error": "there is no such table."})
    )
    page.goto(f"{digits}#/audit")
    page.wait_for_selector(".panel-body .act")
    page.locator(".menu summary").click()
    assert page.locator(".menu li b").all_inner_texts() == ["CSV", "JSON"]
    seen.allowed = ("422",)
    page.get_by_role("button", name="JSON").click()
    page.get_by_text("No JSON file: there is no such table.").wait_for()


def test_rows_without_labels_are_kept_or_removed(digits, visit):
    seen = visit("about:blank")
    page = seen.page
    changed(page, "**/api/study", lambda study: {**study, "classes": None})
    changed(
        page,
        "**/api/suspects*",
        lambda told: {
            **told,
            "items": [{**item, "given": None, "suggested": None, "target": None} for item in told["items"]],
        },
    )
    page.goto(f"{digits}#/audit")
    all_suspects(seen)
    posts = posts_of(page)
    page.wait_for_selector(".panel-body .act")
    for key in "lr":
        page.keyboard.press(key)
    assert page.locator("dialog").count() == 0
    assert page.locator(".act").all_inner_texts() == ["Keep\nK", "Remove\nX", "Undo\nU"]
    assert "label" not in page.locator(".panel").inner_text()
    page.keyboard.press("?")
    words = page.get_by_role("dialog", name="Keys").inner_text()
    assert "keep the row" in words
    assert "relabel" not in words
    assert posts == []


@pytest.mark.parametrize("page_name", ["audit", "explain"])
def test_a_class_without_a_name_is_another_choice_than_any(digits, visit, page_name):
    seen = visit("about:blank")
    page = seen.page
    seen.allowed = ("status of 400",)  # the server's own study has a name for every class
    changed(page, "**/api/study", lambda study: {**study, "classes": ["", *study["classes"][1:]]})
    page.goto(f"{digits}#/{page_name}")
    page.wait_for_selector(".tile")
    key, label, asked = ("given", "Given", "suspects") if page_name == "audit" else ("label", "Label", "test")
    box = page.get_by_label(label, exact=True)
    sent = []
    for choice in ("(no name)", "1", "any"):
        with page.expect_request(lambda one: f"/api/{asked}?" in one.url and "offset=0" in one.url) as asking:
            box.select_option(label=choice)
        sent.append(parse_qs(urlsplit(asking.value.url).query, keep_blank_values=True).get(key))
    assert sent == [[""], ["1"], None]
