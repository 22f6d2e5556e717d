"""The browser, the served studies, and axe-core: skipped with a reason where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from explorer.browser.driving import CHROMIUM, ROOT, Visit, served

AXE = "axe-core@4.10.3"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracin-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium on the path, or TRACIN_CHROMIUM")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """Opens pages; at the end of the test none may have complained."""
    opened: list[Visit] = []
    contexts = []

    def open_page(
        address: str, *, width: int = 1280, height: int = 800, dark: bool = False, **more: Any
    ) -> Visit:
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **more
        )
        contexts.append(context)
        found = Visit(context.new_page())
        opened.append(found)
        found.page.goto(address)
        return found

    yield open_page
    for context in contexts:
        context.close()
    for each in opened:
        each.check()


@pytest.fixture(scope="module")
def digits(browser, tmp_path_factory) -> Iterator[str]:
    """The address of the digits study."""
    folder = tmp_path_factory.mktemp("digits")
    with served(
        ROOT / "examples" / "digits.py",
        "--decisions",
        str(folder / "decisions.jsonl"),
        environment={"TRACIN_RUNS": str(folder / "runs"), "DIGITS_EPOCHS": "4"},
    ) as address:
        yield address


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, fetched once through npm."""
    kept = CACHE / AXE / "axe.min.js"
    if not kept.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("axe-core is not in the cache, and there is no npm to fetch it")
        kept.parent.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", AXE, "--silent", "--pack-destination", str(kept.parent)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"axe-core is not in the cache, and npm cannot fetch it: {error}")
        with tarfile.open(kept.parent / done.stdout.strip().splitlines()[-1]) as packed:
            member = packed.extractfile("package/axe.min.js")
            assert member is not None
            partial = kept.with_suffix(".partial")
            partial.write_bytes(member.read())
            partial.replace(kept)
    return kept.read_text(encoding="utf-8")
