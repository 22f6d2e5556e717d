"""Small studies of pictures, texts and tables, and a client that talks to the application without a network."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import nn

import tracin
from tracin.explorer.app import make_app
from tracin.explorer.decisions import DecisionLog
from tracin.explorer.live import live_source
from tracin.explorer.pages import Source

MARKUP = "<script>alert('{row}')</script>"
NAMES = ["cat", "<b>cow</b>", "dog"]
TRAIN, TEST = 90, 9


def name() -> str:
    """An id that no other decision has."""
    return str(uuid.uuid4())


def told(log: DecisionLog) -> dict[int, tuple[str, str | float | None]]:
    """Action and label by row."""
    return {row: (one.action, one.label) for row, one in log.decided().items()}


def pictures(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey pictures from 0 to 1 whose class is where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = 0.3 * torch.rand(n, 1, 6, 6, generator=generator)
    for row, label in enumerate(labels.tolist()):
        x[row, :, 2 * label : 2 * label + 2] += 0.6
    return x, labels


def network(inputs: int = 36) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 3))


def trained(model: nn.Module, x: Any, y: torch.Tensor) -> tracin.Trajectory:
    """Three checkpoints of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = []
    for step in range(1, 61):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 20 == 0:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            kept.append(tracin.Checkpoint(state, learning_rate=0.5, step=step))
    return tracin.Trajectory(kept)


def picture_study(**more: Any) -> tracin.Study:
    """Pictures, with three labels wrong among the training rows."""
    x, y = pictures(TRAIN, 1)
    wrong = y.clone()
    wrong[[4, 11, 20]] = (y[[4, 11, 20]] + 1) % 3
    model = network()
    fields: dict[str, Any] = {
        "task": tracin.Task(model, tracin.losses.cross_entropy),
        "trajectory": trained(model, x, wrong),
        "train": (x, wrong),
        "test": pictures(TEST, 2),
        "class_names": NAMES,
        "render": lambda row: row[0][0],
    }
    return tracin.Study(**{**fields, **more})


def text_study(*, read: bool = True) -> tracin.Study:
    """Texts that hold markup, shown as texts; a row is its counts of letters."""
    x, y = pictures(TRAIN, 1)
    x = x.flatten(1)
    model = network()
    return tracin.Study(
        task=tracin.Task(model, tracin.losses.cross_entropy),
        trajectory=trained(model, x, y),
        train={"x": x, "y": y},
        test={"x": x[:TEST], "y": y[:TEST]},
        class_names=NAMES,
        render=lambda row: MARKUP.format(row=int(row["y"])),
        read=(lambda text: torch.tensor([float(text.count(chr(97 + at % 26))) for at in range(36)]))
        if read
        else None,
    )


def table_study() -> tracin.Study:
    """Rows of three numbers from a dataset, shown as tables."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(TRAIN, 3, generator=generator)
    labels = values.argmax(1)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return TRAIN

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            return values[row], int(labels[row])

    model = network(3)
    return tracin.Study(
        task=tracin.Task(model, tracin.losses.cross_entropy),
        trajectory=trained(model, values, labels),
        train=Rows(),
        test=Rows(),
        class_names=NAMES,
        render=lambda row: {"<i>a</i>": row[0][0], "b": row[0][1], "c": row[0][2]},
        read=lambda told: torch.tensor([float(told[key]) for key in "abc"]),
    )


def regression_study() -> tracin.Study:
    """A straight line with one target far off."""
    x = torch.linspace(0, 1, TRAIN)[:, None]
    y = 2 * x[:, 0] + 0.01 * torch.sin(40 * x[:, 0])
    y[7] += 5.0
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(0.1)
    steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    task = tracin.Task(model, tracin.losses.mean_squared_error)
    return tracin.Study(task, steps, train=(x, y[:, None]), test=(x[:4], y[:4, None]))


def source_of(study: tracin.Study, title: str = "small") -> Source:
    """The pages of a study."""
    method = tracin.TracInCP(study.task, study.trajectory, progress=False, device="cpu")
    return live_source(study, method, title=title, evidence=3)


@dataclass(frozen=True)
class Client:
    """Asks an application, one request after the other."""

    app: Any
    log: str
    base: str = "http://127.0.0.1:8000"

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send a request; ``path`` is sent as it is written."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=self.base) as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("GET", path, **more)

    def json(self, path: str, **params: Any) -> Any:
        """The JSON of a page that is there."""
        found = self.get(path, params=params)
        assert found.status_code == 200, found.text
        return found.json()

    def post(self, path: str, value: Any, **more: Any) -> httpx.Response:
        """Post JSON; what is posted on decisions names the log, unless it says which."""
        headers = {"Content-Type": "application/json", **more.pop("headers", {})}
        if path.startswith("/api/decisions") and isinstance(value, dict):
            value = {"log": self.log, **value}
        return self.ask("POST", path, content=json.dumps(value), headers=headers, **more)

    def decide(
        self, row: int, action: str, label: Any = None, seen: int | None = None, name: str | None = None
    ) -> httpx.Response:
        """Post a decision."""
        told = {"id": name or str(uuid.uuid4()), "row": row, "action": action, "seen": seen}
        return self.post("/api/decisions", told if label is None else {**told, "label": label})


def client_of(source: Source, folder: Path, **more: Any) -> Client:
    """A client of these pages, with a log in the folder."""
    log = DecisionLog(folder / "decisions.jsonl", source.content.audit, source.content.names)
    return Client(make_app(source, log, **more), log.identity)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    """A body in pieces, without a length."""
    for part in parts:
        yield part
