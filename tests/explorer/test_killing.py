"""Real servers on the loopback address: readiness, Ctrl-C, tokens, and kill -9 while decisions are posted."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tracin.errors import OptionError
from tracin.explorer.kept import keep
from tracin.explorer.pages import Source
from tracin.explorer.serving import listen

START = "from tracin.cli import main; raise SystemExit(main())"
TOKEN = "a-token-of-some-length"


@dataclass(frozen=True)
class Server:
    """A process that serves."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, Any]:
        """One request with a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            body = None if value is None else json.dumps(value)
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def end(self, how: signal.Signals) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "pages"
    keep(path, source, explained=1)
    return path


@pytest.fixture
def serve(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started = []

    def start(*args: str) -> Server:
        command = [
            sys.executable,
            "-c",
            START,
            "serve",
            str(folder),
            "--port",
            "0",
            "--decisions",
            str(tmp_path / "log.jsonl"),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "TRACIN_TOKEN"}
        process = subprocess.Popen(
            [*command, *args], stdout=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
        )
        started.append(process)
        assert process.stdout is not None
        found = re.match(r"tracin: ready at http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert found is not None
        return Server(process, int(found[1]))

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stdout.close()


def test_a_killed_server_has_lost_no_acknowledged_decision(serve, tmp_path):
    """Four clients post, the server is killed in between; after the start all that was acknowledged is there."""
    server = serve()
    log = server.ask("GET", "/api/study")[1]["log"]
    acknowledged: dict[str, tuple[int, int, str]] = {}
    enough = threading.Event()

    def post(at: int) -> None:
        for row in range(20 * at, 20 * at + 20):
            seen = None
            for action in ("keep", "remove", "keep"):
                name = str(uuid.uuid4())
                told = {"log": log, "id": name, "row": row, "action": action, "seen": seen}
                try:
                    status, answer = server.ask("POST", "/api/decisions", told)
                except (OSError, http.client.HTTPException):
                    return
                assert status == 200
                seen = answer["seq"]
                acknowledged[name] = (seen, row, action)
                if len(acknowledged) > 40:
                    enough.set()

    threads = [threading.Thread(target=post, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(30)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    for thread in threads:
        thread.join(30)
    assert len(acknowledged) < 240
    again = serve("--token", TOKEN)
    assert again.ask("GET", "/api/decisions?since=0")[0] == 401
    status, told = again.ask("GET", "/api/decisions?since=0", Authorization=f"Bearer {TOKEN}")
    assert status == 200
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()[1:]
    there = {entry["id"]: (entry["seq"], entry["row"], entry["action"]) for entry in map(json.loads, lines)}
    assert told["seq"] == len(there)
    assert {name: there[name] for name in acknowledged} == acknowledged
    last = {row: action for _, row, action in sorted(there.values())}
    assert {change["row"]: change["decision"]["action"] for change in told["changes"]} == last
    assert told["log"] == log
    assert again.ask("GET", "/", Host="evil.example")[0] == 421
    assert _status_of_a_huge_post(again) == 413
    assert again.end(signal.SIGINT) == 0


def _status_of_a_huge_post(server: Server) -> int:
    """Of a body that is announced, and never sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/api/decisions")
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000000000")
    connection.endheaders()
    try:
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What ``forking.py`` found."""
    script = Path(__file__).with_name("forking.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("forks"))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    return json.loads(found.stdout)


def test_two_processes_of_two_threads_write_one_log(forks):
    """Each decision is there once; most met one that they had not seen."""
    told = forks["contest"]
    assert (told["acknowledged"], told["missing"], told["entries"], told["rows"]) == (80, 0, 80, 40)


def test_a_log_survives_kills_at_any_moment(forks):
    told = forks["kills"]
    assert told["acknowledged"] >= 25
    assert told["missing"] == 0
    assert told["entries"] >= told["acknowledged"]


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port}.*--port"):
            listen("127.0.0.1", port)


def test_a_port_is_taken_before_it_is_answered():
    """Two that prepare at once are told then, not after it."""
    with listen("127.0.0.1", 0) as mine, pytest.raises(OptionError, match="--port"):
        listen("127.0.0.1", mine.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "port", "names"),
    [("127.0.0.1", -1, "--port"), ("127.0.0.1", 70_000, "--port"), ("no.such.invalid", 0, "--host")],
)
def test_an_address_that_cannot_be_is_told(host, port, names):
    with pytest.raises(OptionError, match=names):
        listen(host, port)
