"""The pages as one self-contained HTML file: script, style, answers and pictures inside, to be sent to a colleague.

The script is the one of the server's page; its answers come from a block of JSON in the file. The file's own policy lets
run this script and this style alone, by their hashes, and loads nothing from anywhere.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tracin.errors import OptionError
from tracin.explorer.asking import SuspectFilter
from tracin.explorer.bundle import bundled, module_of
from tracin.explorer.explaining import shortened
from tracin.explorer.kept import KeptAnswers, first_tests
from tracin.explorer.live import LiveAnswers
from tracin.explorer.pages import Source
from tracin.explorer.theme import theme_css
from tracin.files import write_text

__all__ = ["render_static", "write_static"]

FOLDER = Path(__file__).parent / "static"
LISTED = 10
"""Proponents and opponents of an explanation."""
ROOM = 16 << 20
"""Bytes of pictures."""

_POLICY = '<meta http-equiv="Content-Security-Policy" content="{}">'
_DATA = '<script type="application/json" id="tracin-data">{}</script>'
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_static(source: Source, path: str | Path, **options: Any) -> Path:
    """Write the pages as one file, whole or not at all.

    Args:
        source: What the pages read.
        path: The file; a missing folder is made.
        options: As for ``render_static``.

    Returns:
        The path.

    Raises:
        OptionError: A negative number.
        OSError: The folder can't be written.
    """
    write_text(path, render_static(source, **options))
    return Path(path)


def render_static(
    source: Source,
    *,
    tests: int = 200,
    suspects: int = 200,
    explained: int = 40,
    decided: Mapping[int, Mapping[str, Any]] | None = None,
    room: int = ROOM,
) -> str:
    """The pages as HTML.

    Args:
        source: What the pages read. A kept folder gives the explanations that it holds.
        tests: How many test rows to list, wrong predictions first.
        suspects: How many suspects, the most suspect first; decided rows come on top.
        explained: How many of the test rows and of the suspects to explain.
        decided: The decision of each row that has one.
        room: The most bytes of pictures; the rest is left out.

    Returns:
        A whole document.

    Raises:
        OptionError: A negative number.
    """
    for name, value in (("tests", tests), ("suspects", suspects), ("explained", explained), ("room", room)):
        if value < 0:
            raise OptionError(f"{name} is {value}: give 0 or more.")
    data = _answers(source, tests, suspects, explained, decided or {})
    data["pictures"] = _pictures(source, data, room)
    return _document(data)


def _answers(
    source: Source, tests: int, suspects: int, explained: int, decided: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the script reads instead of asking a server."""
    content = source.content
    order = first_tests(content)[:tests]
    listed = source.suspects(SuspectFilter(show="all", limit=0), decided)
    first = source.content.audit.order[:suspects].tolist()
    rows = list(dict.fromkeys([*first, *sorted(decided)]))
    held = (
        f"This report holds {len(order):,} of {content.test.rows:,} test rows "
        f"and {len(rows):,} of {content.train.rows:,} training rows."
    )
    return {
        "study": {
            **source.study(),
            "live": False,
            "upload": None,
            "why_no_upload": held,
            "held_suspects": _held_suspects(source, first, bool(decided)),
        },
        "tests": [source.test(row) for row in sorted(order)],
        "suspects": [source.suspect(row, decided.get(row)) for row in rows],
        "progress": listed["progress"],
        "explanations": _explanations(source, {"test": order[:explained], "train": rows[:explained]}),
        "trust": source.trust(),
    }


def _held_suspects(source: Source, first: Sequence[int], decided: bool) -> str | None:
    """What the page of suspects lacks, in a sentence; None where it has all."""
    audit = source.content.audit
    if len(first) == len(audit):
        return None
    inside, flagged = int(audit.is_issue[list(first)].sum()), int(audit.is_issue.sum())
    return (
        f"This report holds the first {len(first):,} of {len(audit):,} suspects, by suspicion: "
        f"{inside:,} of the {flagged:,} flagged rows{', and every decided row' if decided else ''}."
    )


def _explanations(source: Source, rows: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    answers = source.answers
    if isinstance(answers, KeptAnswers):
        return {key: shortened(told, LISTED) for key, told in answers.found.items()}
    assert isinstance(answers, LiveAnswers)
    return {
        f"{side}/{row}": shortened(told, LISTED)
        for side, chosen in rows.items()
        for row, told in answers.explain_many(side, chosen).items()
    }


def _pictures(source: Source, data: Any, room: int) -> dict[str, str]:
    """Every picture of the answers by its address, while there is room."""
    found: dict[str, str] = {}
    for side, row, src in _faces(data):
        if src in found:
            continue
        face = source.face(side, str(row))
        if face is None or len(face.data) > room:
            continue
        room -= len(face.data)
        found[src] = f"data:image/png;base64,{b64encode(face.data).decode('ascii')}"
    return found


def _faces(value: Any) -> Iterator[tuple[str, int, str]]:
    """The pictures of all cards in an answer: side, row, address."""
    if isinstance(value, Mapping):
        face = value.get("face")
        if isinstance(face, Mapping) and face.get("kind") == "image":
            yield value.get("side", "train"), value["row"], face["src"]
        for part in value.values():
            yield from _faces(part)
    elif isinstance(value, list):
        for part in value:
            yield from _faces(part)


def _document(data: Mapping[str, Any]) -> str:
    """The server's document with everything in place of its links."""
    script = f"\n{bundled('main', module_of(FOLDER))}\n"
    style = f"\n{theme_css()}{(FOLDER / 'style.css').read_text(encoding='utf-8')}"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    for link, instead in {
        '<link rel="icon" href="data:,">\n': f'{_POLICY.format(policy)}\n<link rel="icon" href="data:,">\n',
        '<link rel="stylesheet" href="static/theme.css">\n': "",
        '<link rel="stylesheet" href="static/style.css">\n': f"<style>{style}</style>\n",
        '<script type="module" src="static/main.js"></script>\n': "",
        "</body>\n": f'{_DATA.format(_json(data))}\n<script type="module">{script}</script>\n</body>\n',
    }.items():
        before, found, after = page.partition(link)
        assert found, f"index.html has no {link!r}"
        page = f"{before}{instead}{after}"
    return page


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode('ascii')}"


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for an end or a beginning of anything."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace").decode().translate(str.maketrans(_ESCAPED))
