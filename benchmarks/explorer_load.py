"""The explorer under load: clients on the loopback address that ask for the pages as fast as they are answered.

    python benchmarks/explorer_load.py                      the digits, 50 clients for 30 seconds, then 50 while 2 decide
    python benchmarks/explorer_load.py --seconds 5 FILE.py
    python benchmarks/explorer_load.py --write-docs         also docs/results/explorer.md

Starts ``tracin serve FILE.py`` as its own process, asks each page once, and measures then: what a client waits from sending
a request until the whole answer has arrived, connections kept open. Server and clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "explorer.md"
START = "from tracin.cli import main; raise SystemExit(main())"
EXPLAINED, PICTURES = 10, 40


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The explorer under load.")
    parser.add_argument("file", type=Path, nargs="?", default=HERE.parent / "examples" / "digits.py")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of each run (30)")
    parser.add_argument(
        "--writers", type=int, default=2, help="clients that decide in the second run; 0 leaves it out (2)"
    )
    parser.add_argument("--write-docs", action="store_true")
    return parser.parse_args()


@dataclass
class Connection:
    """One client: a connection that is kept open."""

    port: int
    reader: Any = None
    writer: Any = None
    waits: list[float] = field(default_factory=list)
    errors: int = 0

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Send a request, and read the whole answer."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: {len(body)}\r\n"
        self.writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
        return int(lines[0].split()[1]), await self.reader.readexactly(length)

    async def timed(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The answer's body; counted as an error unless it is a good one."""
        start = time.perf_counter()
        try:
            status, answer = await asyncio.wait_for(self.ask(method, path, body), 20)
        except (OSError, EOFError, TimeoutError, StopIteration) as error:
            print(f"{method} {path}: {error!r}", file=sys.stderr)
            self.writer, self.errors = None, self.errors + 1
            return b""
        self.waits.append(time.perf_counter() - start)
        self.errors += status != 200
        return answer


async def pages_of(port: int) -> list[str]:
    """The addresses that a visitor's browser asks for; each is asked once, so that it is ready."""
    client = Connection(port)

    async def read(path: str) -> Any:
        status, body = await client.ask("GET", path)
        assert status == 200, (path, body[:200])
        return json.loads(body)

    tests = await read("/api/test?limit=60")
    suspects = await read("/api/suspects?show=all&limit=60")
    pictures = [item["face"]["src"] for item in tests["items"] + suspects["items"] if "src" in item["face"]]
    pages = [
        "/api/study",
        "/api/trust",
        "/api/test?limit=60",
        "/api/test?show=wrong&limit=60&order=confidence&down=1",
        "/api/suspects?limit=60",
        "/api/suspects?show=all&limit=60",
        "/api/suspects?show=all&offset=60&limit=60",
        *(f"/api/explain/test/{item['row']}?k=5" for item in tests["items"][:EXPLAINED]),
        *(f"/{src}" for src in pictures[:PICTURES]),
    ]
    for page in pages:
        status, _ = await client.ask("GET", page)
        assert status == 200, page
    return pages


async def reading(client: Connection, pages: list[str], end: float) -> None:
    choose = random.Random(id(client))
    while time.perf_counter() < end:
        await client.timed("GET", choose.choice(pages))


async def deciding(client: Connection, rows: list[int], end: float) -> None:
    """Decide on rows of its own, over and over."""
    log = json.loads((await client.ask("GET", "/api/study"))[1])["log"]
    seen: dict[int, int] = {}
    while time.perf_counter() < end:
        for row in rows:
            told = {"id": str(uuid.uuid4()), "row": row, "action": "keep", "seen": seen.get(row), "log": log}
            answer = await client.timed("POST", "/api/decisions", json.dumps(told).encode())
            if not answer or "seq" not in json.loads(answer):
                return  # counted as an error
            seen[row] = json.loads(answer)["seq"]


async def measure(port: int, clients: int, seconds: float, writers: int) -> dict[str, Any]:
    pages = await pages_of(port)
    readers, deciders = [[Connection(port) for _ in range(n)] for n in (clients, writers)]
    end = time.perf_counter() + seconds
    await asyncio.gather(
        *(reading(client, pages, end) for client in readers),
        *(deciding(client, list(range(20 * at, 20 * at + 20)), end) for at, client in enumerate(deciders)),
    )
    told = {"clients": clients, "writers": writers, "seconds": seconds, "pages": len(pages)}
    for name, group in (("pages", readers), ("decisions", deciders)):
        waits = sorted(wait for client in group for wait in client.waits)
        told[f"{name}_errors"] = sum(client.errors for client in group)
        told[f"{name}_count"] = len(waits)
        if len(waits) > 1:
            cuts = statistics.quantiles(waits, n=100)
            told |= {f"{name}_p50": cuts[49], f"{name}_p95": cuts[94], f"{name}_p99": cuts[98]}
    return told


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", START, "serve", str(options.file), "--port", "0", "--quiet"]
    log = ["--decisions", str(folder / "decisions.jsonl")]
    server = subprocess.Popen([*command, *log], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = next((line for line in server.stdout if line.startswith("tracin: ready")), "")
        found = re.search(r":(\d+)/", ready)
        if found is None:
            raise SystemExit("the server did not start")
        port = int(found[1])
        runs = [0] if options.writers == 0 else [0, options.writers]
        return [asyncio.run(measure(port, options.clients, options.seconds, writers)) for writers in runs]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def line(told: dict[str, Any], name: str) -> str:
    what = f"{told['clients']} that read" if name == "pages" else f"{told['writers']} that decide"
    if name == "pages" and told["writers"]:
        what = f"{what}, while {told['writers']} decide"
    waits = " | ".join(f"{1000 * told[f'{name}_{cut}']:,.0f} ms" for cut in ("p50", "p95", "p99"))
    each = told[f"{name}_count"] / told["seconds"]
    return f"| {what} | {told['seconds']:.0f} | {each:,.0f} | {waits} | {told[f'{name}_errors']} |"


def page(runs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    how = (
        f"`tracin serve {options.file.name}`, {os.cpu_count()} cores that server and clients share, Python "
        f"{platform.python_version()}. Each client asks for the next page as soon as it has the last one: one of "
        f"{runs[0]['pages']} that were asked for before (study, test rows, suspects, explanations, trust, pictures). Made by "
        "`python benchmarks/explorer_load.py --write-docs`."
    )
    lines = [
        "# The explorer under load",
        "",
        how,
        "",
        "| clients | seconds | answers a second | p50 | p95 | p99 | errors |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(line(told, name) for told in runs for name in ("pages", "decisions") if told[f"{name}_count"] > 1),
        "",
        "A decision is on the disk before it is answered, and the pages of suspects are made anew after each.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        runs = run(options, Path(folder))
    text = page(runs, options)
    print(text)
    if options.write_docs:
        PAGE.write_text(text, encoding="utf-8")
    if any(told[f"{name}_errors"] for told in runs for name in ("pages", "decisions")):
        raise SystemExit("there were errors")


if __name__ == "__main__":
    main()
