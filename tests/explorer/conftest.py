"""One prepared study for all tests of this folder; each test has its own log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from explorer.common import Client, client_of, picture_study, source_of
from explorer.forking import audit
from tracin.explorer.decisions import DecisionLog
from tracin.explorer.pages import Source


@pytest.fixture(scope="session")
def source() -> Iterator[Source]:
    """The pages of pictures."""
    found = source_of(picture_study())
    yield found
    found.answers.close()


@pytest.fixture
def client(source: Source, tmp_path: Path) -> Client:
    """A client of them."""
    return client_of(source, tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a log can be."""
    return tmp_path / "deep" / "decisions.jsonl"


@pytest.fixture
def log(path: Path) -> DecisionLog:
    """A new log there."""
    return DecisionLog(path, audit())
