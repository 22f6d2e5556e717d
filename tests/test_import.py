"""What ``import tracin`` loads, and what it offers."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import tracin

# The names that code outside this repository relies on.
PROMISED = {
    "Checkpoint",
    "CheckpointRecorder",
    "Index",
    "InfluenceFunctions",
    "OnlineTracIn",
    "RepresenterPoints",
    "Scores",
    "SelfInfluence",
    "Study",
    "Task",
    "TopK",
    "TracInCP",
    "Trajectory",
    "audit",
    "errors",
    "losses",
}
# torch with what it brings, the tensor files, and shape annotations where they are installed.
LIGHT = "import torch, numpy, safetensors.torch\ntry: import jaxtyping\nexcept ImportError: pass"
MODULES = "import sys, json; print(json.dumps(sorted(sys.modules)))"


def loaded(code: str) -> set[str]:
    """The modules in memory after a fresh interpreter ran the code."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{MODULES}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def brought_by(code: str) -> set[str]:
    """The packages, ``tracin`` and the standard library aside, that only this code brings."""
    packages = {name.partition(".")[0] for name in loaded(code) - loaded(LIGHT)}
    return {name for name in packages if name not in sys.stdlib_module_names and name != "tracin"}


def test_import_loads_torch_and_nothing_heavier():
    assert brought_by("import tracin") - {"torch", "numpy"} == set()


def test_import_does_not_load_the_compiler():
    compiler = {"torch._dynamo", "torch._inductor"}
    assert compiler & (loaded("import tracin") - loaded(LIGHT)) == set()


def test_the_check_sees_a_heavy_import():
    assert {"pandas", "rich"} <= brought_by("import tracin, pandas, rich")


def test_all_lists_the_public_names():
    assert sorted(tracin.__all__) == list(tracin.__all__)
    assert set(tracin.__all__) >= PROMISED

    def is_submodule(value: object) -> bool:
        return isinstance(value, ModuleType) and value.__name__.startswith("tracin.")

    listed = set(tracin.__all__) - {"__version__"}
    public = {name for name in vars(tracin) if not name.startswith("_")}
    unlisted = {name for name in public - listed if not is_submodule(vars(tracin)[name])}
    # jaxtyping: the hook that checks annotations in these tests
    assert unlisted - {"annotations", "jaxtyping"} == set(), "public, but not in __all__"
    assert {name for name in listed if not hasattr(tracin, name)} == set(), "in __all__, but missing"


def test_every_error_is_a_tracin_error():
    for name in tracin.errors.__all__:
        error = getattr(tracin.errors, name)
        base = Warning if name.endswith("Warning") else tracin.errors.TracinError
        assert issubclass(error, base), name
