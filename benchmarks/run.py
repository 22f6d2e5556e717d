"""``make bench``: our methods, vmap and captum beside one plain forward and backward pass over the same rows.

    python benchmarks/run.py                       all models: a table, and one JSON file per model
    python benchmarks/run.py --models mlp cnn      some of them
    python benchmarks/run.py --only influence      ours alone, beside the plain pass
    python benchmarks/run.py --profile cnn         where our time goes
    python benchmarks/run.py --write-docs          also write docs/results/speed.md
    python benchmarks/run.py --threads 1 --clock cpu    where others use the cores: two threads that wait for
                                                   each other make wall times erratic there

Each model is measured in a process of its own, so that none inherits another's memory or caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import Result, measure
from stages import profile
from table import lines, markdown
from workloads import FASHION, build

HERE = Path(__file__).resolve().parent
MODELS = ("mlp", "cnn", "resnet", "gpt")
METHODS = ("influence", "top_k", "self_influence", "vmap", "captum")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed as ratios to one plain pass.")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=", ".join(MODELS)
    )
    parser.add_argument(
        "--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds after the warm-up (7)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="a peer slower than this many seconds runs once (10)"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu, with --threads 1: for a busy machine"
    )
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's idx files (Debian's place)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/speed.md")
    parser.add_argument(
        "--profile",
        choices=MODELS,
        metavar="MODEL",
        help="print our stages for one model, measure nothing else",
    )
    parser.add_argument(
        "--verb", choices=METHODS[:3], default="influence", help="what to profile (influence)"
    )
    parser.add_argument("--inside", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args()


def command(options: argparse.Namespace) -> list[str]:
    """The arguments that made a result, without the machine's folders."""
    return [
        "--threads", str(options.threads), "--rounds", str(options.rounds), "--patience", str(options.patience),
        "--clock", options.clock,
        "--only", *options.only,
    ]  # fmt: skip


def data_option(options: argparse.Namespace) -> list[str]:
    return [] if options.data is None else ["--data", str(options.data)]


def inside(options: argparse.Namespace) -> None:
    """Measure or profile one model in this process."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        workload = build(options.inside, Path(folder), options.data or FASHION)
        if options.profile:
            print("\n".join(profile(workload, options.verb, options.rounds, options.clock)))
            return
        result = measure(
            workload,
            rounds=options.rounds,
            patience=options.patience,
            threads=options.threads,
            wanted=frozenset(options.only),
            clock=options.clock,
        )
    words = ["python", "benchmarks/run.py", "--models", options.inside, *command(options)]
    text = json.dumps({**result.as_json(), "command": " ".join(words)}, indent=2)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.inside}.json").write_text(text + "\n")


def apart(options: argparse.Namespace, name: str) -> None:
    """Run ``inside`` in a fresh process with its thread count set before torch starts."""
    words = [sys.executable, str(HERE / "run.py"), "--inside", name, *command(options), *data_option(options)]
    words += ["--out", str(options.out), "--verb", options.verb]
    words += ["--profile", name] if options.profile else []
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(words, env={**os.environ, **threads}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


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


def main() -> None:
    options = parsed()
    if options.inside:
        inside(options)
        return
    if options.profile:
        apart(options, options.profile)
        return
    for name in options.models:
        apart(options, name)
        for result in collected(options.out, [name]):
            print("\n".join(lines(result)), end="\n\n", flush=True)
    if options.write_docs:
        page = HERE.parent / "docs" / "results" / "speed.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown(collected(options.out, MODELS)))


if __name__ == "__main__":
    main()
