"""``make bench``: our methods and other libraries beside one plain forward and backward pass over the same rows.

    python benchmarks/run.py                       all workloads: a table, and one JSON file per workload
    python benchmarks/run.py --models mlp cnn      some of them
    python benchmarks/run.py --only influence      ours alone, beside the plain pass
    python benchmarks/run.py --write-docs          write docs/results/speed.md from the JSON files, after measuring
    python benchmarks/run.py --rounds 0 --write-docs    the same from the files that are there
    python benchmarks/run.py --profile cnn         where our time goes, and what of it no exact method could save
    python benchmarks/run.py --profile all --write-docs    docs/results/speed-profile.md
    python benchmarks/run.py --threads 1 --clock cpu    where others use the cores: two threads that wait for
                                                   each other make wall times erratic there

Each method runs in a process of its own, started with the Python of ``--python`` (this one): it is the environment that
needs the other libraries, ``make bench`` makes one. A library that is not there, or fails, is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import CLOCKS, OURS, PEERS, Result, Settings, measure
from profiles import markdown as profile_page
from profiles import profiled
from table import lines, markdown
from workloads import FASHION, FIRST, NAMES, build

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "results"
METHODS = (*OURS, *PEERS)
PROFILED = (*FIRST, "gpt-wide")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed as ratios to one plain pass.")
    parser.add_argument(
        "--models", nargs="+", choices=NAMES, default=list(NAMES), metavar="MODEL", help=", ".join(NAMES)
    )
    parser.add_argument(
        "--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after the first run (5)")
    parser.add_argument(
        "--patience", type=float, help="a peer slower than this many seconds runs once (8 to 12)"
    )
    parser.add_argument(
        "--limit", type=float, default=150.0, help="a peer is given up after this many seconds (150)"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu, with --threads 1: for a busy machine"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that runs the methods (this one)"
    )
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/results/speed.md, or speed-profile.md"
    )
    parser.add_argument(
        "--profile",
        choices=("all", *NAMES),
        metavar="MODEL",
        help=f"our stages for a model, or all of {', '.join(PROFILED)}",
    )
    parser.add_argument("--verb", choices=OURS, default="influence", help="what to profile (influence)")
    parser.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def command(options: argparse.Namespace, name: str) -> str:
    """The command that makes a result again, without the machine's folders."""
    words = [
        "python",
        "benchmarks/run.py",
        "--models",
        name,
        "--threads",
        options.threads,
        "--rounds",
        options.rounds,
    ]
    words += ["--clock", options.clock, "--only", *options.only]
    return " ".join(map(str, words))


def measured(options: argparse.Namespace) -> None:
    """Measure each workload and keep it."""
    settings = Settings.of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        start = time.perf_counter()
        result = measure(name, options.only, settings, lambda text: print(text, file=sys.stderr, flush=True))
        text = json.dumps({**result.as_json(), "command": command(options, name)}, indent=2)
        (options.out / f"{name}.json").write_text(text + "\n")
        print("\n".join(lines(result)), end="\n\n", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s in all", file=sys.stderr, flush=True)


def collected(folder: Path, names: tuple[str, ...] | list[str]) -> list[Result]:
    """The results that lie in the folder, in the order of ``names``."""
    found = []
    for name in names:
        path = folder / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            content.pop("command")
            found.append(Result.from_json(content))
    return found


def profile_here(options: argparse.Namespace) -> None:
    """Profile one model in this process, as JSON on standard output."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        workload = build(options.inside, Path(folder), options.data)
        print(json.dumps(profiled(workload, options.verb, max(1, options.rounds), options.clock)))


def profile_apart(options: argparse.Namespace, name: str) -> dict:
    """The same in a fresh process with its thread count set before torch starts."""
    words = [options.python, str(HERE / "run.py"), "--inside", name, "--verb", options.verb]
    words += ["--rounds", str(options.rounds), "--threads", str(options.threads), "--clock", options.clock]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    words += ["--data", str(options.data)]
    done = subprocess.run(
        words, env={**os.environ, **threads}, check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def profiles(options: argparse.Namespace) -> None:
    found = []
    for name in PROFILED if options.profile == "all" else [options.profile]:
        found.append(profile_apart(options, name))
        print("\n".join(found[-1]["lines"]), end="\n\n", flush=True)
    if options.write_docs:
        page = DOCS / "speed-profile.md"
        page.write_text(profile_page(found, page.read_text() if page.exists() else ""))


def main() -> None:
    options = parsed()
    if options.inside:
        profile_here(options)
    elif options.profile:
        profiles(options)
    else:
        if options.rounds:
            measured(options)
        if options.write_docs:
            DOCS.mkdir(parents=True, exist_ok=True)
            (DOCS / "speed.md").write_text(markdown(collected(options.out, NAMES)))


if __name__ == "__main__":
    main()
