"""Every method in a process of its own, interleaved round by round, beside the plain pass.

Two numbers from different minutes of a shared machine cannot be divided; two from the same second can. So a round asks each
process once, in turn, and the process runs one plain pass and then its method: the ratio is of these two. The median over
the rounds is told with its range.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from workloads import FASHION, Workload, case_of, made

import tracin

__all__ = [
    "CLOCKS",
    "OURS",
    "PEERS",
    "Measured",
    "Process",
    "Result",
    "Settings",
    "machine",
    "measure",
    "ours",
    "timed",
]

HERE = Path(__file__).resolve().parent
OURS = ("influence", "top_k", "self_influence")
PEERS = ("vmap", "captum", "dattri", "dattri_llm", "kronfluence")
ERROR_ALONE, K = "captum_exact", 10
# On a machine whose cores are shared, CPU seconds with one thread are steadier than the clock on the wall.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One method: seconds of each round, ratios to the pass beside it, its peak, and the error of its scores."""

    label: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak: int | None = None
    error: float | None = None
    note: str = ""

    @property
    def second(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Result:
    """One workload's measurements and what they were made on."""

    name: str
    title: str
    parameters: int
    rows: int
    queries: int
    checkpoints: int
    batch: int
    machine: dict[str, Any]
    methods: list[Measured]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Result:
        return cls(**{**found, "methods": [Measured(**method) for method in found["methods"]]})

    def method(self, label: str) -> Measured | None:
        return next((method for method in self.methods if method.label == label), None)


@dataclass(frozen=True)
class Settings:
    """How to measure: which Python runs the methods, how often, and how long a peer may take."""

    python: str = sys.executable
    threads: int = 2
    rounds: int = 5
    patience: float | None = None
    limit: float = 120.0
    clock: str = "wall"
    data: Path = FASHION

    @classmethod
    def of(cls, options: argparse.Namespace) -> Settings:
        """From the arguments of a command that has them all."""
        return cls(**{each.name: getattr(options, each.name) for each in fields(cls)})


def machine(threads: int, clock: str) -> dict[str, Any]:
    """What a reader needs to judge the times: never the host's name or a path."""
    return {
        "threads": threads,
        "clock": clock,
        "cpus": os.cpu_count(),
        "processor": f"{_processor()}{platform.machine()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tracin": tracin.__version__,
    }


def _processor() -> str:
    """Whose it is, where Linux tells: libraries have other kernels for other makers."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, " if named else ""


def ours(workload: Workload) -> tracin.TracInCP:
    task = tracin.Task(workload.model, workload.case.loss)
    return tracin.TracInCP(task, workload.trajectory, device="cpu", progress=False)


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    gc.collect()
    start = clock()
    out = run()
    return clock() - start, out


class Process:
    """One method in a process of its own, which runs when it is told to and answers in JSON, a line each."""

    def __init__(self, method: str, name: str, folder: Path, settings: Settings) -> None:
        self.method = method
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        words = [settings.python, str(HERE / "worker.py"), method, name, "--folder", str(folder)]
        words += ["--threads", str(settings.threads), "--clock", settings.clock, "--data", str(settings.data)]
        threads = {"OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, **threads},
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, command: str, limit: float | None = None) -> dict[str, Any]:
        """Send a command and wait for its answer; ``{"failed": why}`` when there is none."""
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError:
            return {"failed": self._end()}
        return self.answer(limit)

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            return {"failed": f"not done after {limit:.0f} s"}
        return json.loads(line) if line else {"failed": self._end()}

    def _end(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return f"its process ended with {code}{': ' + said[-1][:160] if said else ''}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):  # the other side is gone
                stream.close()


def labels(wanted: Iterable[str]) -> list[str]:
    """The processes to start, in the order of the table: the plain pass is always among them."""
    asked = {"pass", *wanted}
    chosen = [label for label in ("pass", *OURS, *PEERS) if label in asked]
    return [*chosen, ERROR_ALONE] if "captum" in chosen else chosen


def first_run(process: Process, label: str, settings: Settings) -> tuple[Measured, bool]:
    """Let a process make ready and run once, which tells its peak and its error.

    Args:
        process: Just started.
        label: Its method.
        settings: How to measure.

    Returns:
        What was measured, and whether rounds follow.

    Raises:
        SystemExit: One of our own methods, or the pass, failed: there is nothing to compare with.
    """
    one = Measured(label)
    answer = process.answer(settings.limit)
    for command in ("first", "error"):
        answer |= {} if "failed" in answer else process.ask(command, settings.limit)
    if "failed" in answer:
        if label not in PEERS and label != ERROR_ALONE:
            raise SystemExit(f"{label}: {answer['failed']}")
        one.note = answer["failed"]  # a peer that cannot run this is a finding, told in the table
        return one, False
    one.error = answer["error"]
    if label == ERROR_ALONE:
        one.note = "a few rows, for its error alone"
        return one, False
    one.peak = answer["peak"]
    if label in PEERS and answer["seconds"] > settings.patience:
        one.seconds, one.note = [answer["seconds"]], "run once"
        one.ratios = [answer["seconds"] / process.ask("pass")["beside"]]
        return one, False
    return one, True


def rounds_of(
    processes: dict[str, Process],
    found: dict[str, Measured],
    count: int,
    share: float,
    say: Callable[[str], None],
) -> None:
    """Ask each process once per round, in turn; ``share`` is the train rows' part of the pass."""
    start = time.perf_counter()
    for at in range(count):
        for label, process in processes.items():
            answer = process.ask("pass" if label == "pass" else "go")
            if "failed" in answer:
                raise SystemExit(f"{label}: {answer['failed']}")
            # Self-influence reads no queries: its floor is the same share of the pass.
            floor = answer["beside"] * (share if label == "self_influence" else 1)
            seconds = answer.get("seconds", answer["beside"])
            found[label].seconds.append(seconds)
            found[label].ratios.append(seconds / floor)
        if at == 0 and count > 1:
            say(f"  one round took {time.perf_counter() - start:.0f} s, {count - 1} to come")


def measure(
    name: str, wanted: Iterable[str], settings: Settings, say: Callable[[str], None] = print
) -> Result:
    """Start a process for each method, run each once, then ``settings.rounds`` times in turn.

    Args:
        name: A workload, as ``workloads.case_of`` reads it.
        wanted: Methods to run beside the plain pass.
        settings: How to measure.
        say: Told what was done and what is to come.

    Returns:
        The measurements.
    """
    case, start = case_of(name), time.perf_counter()
    chosen = labels(label for label in wanted if case.runs(label))
    settings = replace(settings, patience=settings.patience or case.patience)
    found: dict[str, Measured] = {}
    processes: dict[str, Process] = {}
    with tempfile.TemporaryDirectory() as folder:
        workload = made(name, case, Path(folder), settings.data)
        try:
            for label in chosen:
                process = processes[label] = Process(label, name, Path(folder), settings)
                found[label], again = first_run(process, label, settings)
                if not again:
                    processes.pop(label).close()
            say(
                f"{name}: first runs {time.perf_counter() - start:.0f} s; then rounds of {', '.join(processes)}"
            )
            share = case.rows / (case.rows + case.queries)
            rounds_of(processes, found, settings.rounds, share, say)
        finally:
            for process in processes.values():
                process.close()
    return Result(
        name=name,
        title=case.title,
        parameters=workload.parameters,
        rows=case.rows,
        queries=case.queries,
        checkpoints=case.checkpoints,
        batch=case.batch,
        machine=machine(settings.threads, settings.clock),
        methods=list(found.values()),
    )
