"""Pictures of every page, light and dark, wide and narrow.

``TRACIN_SCREENSHOTS=docs/images`` names where to write those of the guide; by default they go to a temporary folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from explorer.browser.driving import Visit, one_by_one, served

PAGES = {
    "explain": ("#/explain", ".loss-chart svg .dot"),
    "audit": ("#/audit", ".panel-body .act"),
    "trust": ("#/trust", ".trust .chart svg .line"),
}


@pytest.fixture(scope="module")
def flipped(browser, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("flipped")
    with served(
        Path(__file__).parent / "flipped" / "digits.py",
        "--calibrate",
        "--decisions",
        str(folder / "decisions.jsonl"),
        environment={"TRACIN_RUNS": str(folder / "runs")},
    ) as address:
        decide(browser, address)
        yield address


def decide(browser, address: str) -> None:
    """Some decisions, which make the pictures telling."""
    visit = Visit(browser.new_page())
    visit.page.goto(f"{address}#/audit")
    visit.page.wait_for_selector(".suspect[aria-selected=true]")
    one_by_one(visit, "rrrrrrkrx")
    visit.page.close()
    visit.check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    named = os.environ.get("TRACIN_SCREENSHOTS")
    found = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    found.mkdir(parents=True, exist_ok=True)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_pages_have_their_picture_taken(flipped, visit, folder, name, width, dark):
    address, there = PAGES[name]
    narrow = width == 390
    trail = "/test/271" if name == "explain" and narrow else ""
    seen = visit(
        f"{flipped}{address}{trail}",
        width=width,
        height=844 if narrow else 820,
        dark=dark,
        device_scale_factor=1.5,
    )
    page = seen.page
    if name == "audit" and narrow:
        page.locator(".suspect").nth(1).click()
    elif name == "audit":
        page.wait_for_selector(".suspect[aria-selected=true]")
        page.locator(".suspect").nth(9).click()
    page.wait_for_selector(there)
    page.wait_for_load_state("networkidle")
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    assert seen.is_narrow_enough()
    path = folder / f"explorer-{name}-{'dark' if dark else 'light'}{'-narrow' if narrow else ''}.png"
    page.screenshot(path=path)
    assert path.stat().st_size > 10_000
