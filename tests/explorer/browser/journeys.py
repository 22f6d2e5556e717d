"""What a reader does on the pages of any study of pictures."""

from __future__ import annotations

import csv
import io

from explorer.browser.driving import one_by_one, until


def decided_rows(text):
    """The decisions in an exported table: row → (action, label)."""
    return {
        int(line["row"]): (line["decision"], line["decided_label"])
        for line in csv.DictReader(io.StringIO(text))
        if line["decision"]
    }


def exported(page):
    """The decisions in the table that the page exports."""
    page.locator(".menu summary").click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="CSV").click()
    return decided_rows(waiting.value.path().read_text())


def suspects(page):
    """All suspects that the page lists, as the server tells them."""
    return page.evaluate("fetch('api/suspects?show=all&limit=500').then((answer) => answer.json())")["items"]


def study_flagged(page):
    """How many rows the audit flags."""
    return page.evaluate("fetch('api/suspects').then((answer) => answer.json())")["progress"]["flagged"]


def all_suspects(visited):
    """Open the list of all rows, with the keys on its first."""
    page = visited.page
    page.get_by_role("button", name="All", exact=True).click()
    page.wait_for_selector(".suspect[aria-selected=true]")
    page.locator(".suspect[aria-selected=true]").focus()


def explain_and_follow(address, visit):
    """Read why a wrong prediction was made, for both targets, and why its first proponent is taken as it is."""
    seen = visit(f"{address}#/explain")
    page = seen.page
    page.wait_for_selector(".cards-row.proponent .card")
    assert page.locator(".segmented button[aria-pressed=true]").inner_text() == "Wrong"
    assert page.locator(".list .tile[aria-selected=true]").count() == 1
    predicted, label = (page.locator(".facts dd").nth(at).inner_text() for at in (0, 1))
    assert predicted != label
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == [f"What taught {predicted}", f"What spoke for {label}"]
    first = page.locator(".cards-row.proponent .card").first
    assert first.locator(".score").inner_text().startswith("+")
    tabs.first.press("ArrowRight")
    until(page, "document.querySelector('.about').textContent.includes('the label')")
    row = page.locator(".cards-row.proponent .card").first.get_attribute("data-row")
    page.locator(".cards-row.proponent .card").first.press("Enter")
    page.get_by_role("heading", name=f"Training row {row}").wait_for()
    steps = page.get_by_role("navigation", name="Trail").get_by_role("listitem")
    assert steps.count() == 2
    page.keyboard.press("b")
    until(page, "!location.hash.includes('train')")


def relabel_ten(address, visit):
    """Relabel ten suspects by keyboard, undo one, reload, export; then change and undo what was decided before."""
    seen = visit(f"{address}#/audit")
    page = seen.page
    all_suspects(seen)
    items = suspects(page)
    study = page.evaluate("fetch('api/study').then((answer) => answer.json())")
    one_by_one(seen, "r" * 10)
    one_by_one(seen, "u")
    expected = {item["row"]: ("relabel", item["suggested"]) for item in items[:9]}
    page.reload()
    page.wait_for_selector(".progress-words")
    # The bar counts flagged rows alone; what else is decided is said beside it.
    flagged = sum(item["flagged"] for item in items[:9])
    others = f" · {9 - flagged} other row{'' if flagged == 8 else 's'} decided" if flagged < 9 else ""
    total = study_flagged(page)
    told = f"{flagged} of {total} flagged decided{others}" if total else f"No row is flagged{others}"
    until(page, f"document.querySelector('.progress-words span').textContent === '{told}'")
    bar = page.get_by_role("progressbar")
    assert (bar.get_attribute("aria-valuenow"), bar.get_attribute("aria-valuemax")) == (
        str(flagged),
        str(max(total, 1)),
    )
    assert exported(page) == expected
    page.get_by_role("button", name="Decided", exact=True).click()
    until(page, "document.querySelectorAll('.suspect .badge').length === 9")
    # Another label, chosen by its name, replaces a decision; then everything is undone by the server's memory alone.
    page.locator(".suspect").first.click()
    page.keyboard.press("l")
    other = next(name for name in study["classes"] if name not in {items[0]["given"], items[0]["suggested"]})
    page.keyboard.type(other)
    page.keyboard.press("Enter")
    page.wait_for_selector(".saved.good")
    assert exported(page) == {**expected, items[0]["row"]: ("relabel", other)}
    for _ in range(2):
        page.locator(".suspect").first.click()
        one_by_one(seen, "u")
    assert items[0]["row"] not in exported(page)
