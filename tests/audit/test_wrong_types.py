"""Arguments of another type are refused by name, also without the type checks that the tests run under."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
import tracin
from tracin.audit import Audit, Cutoff, calibrate, find_label_issues

model = torch.nn.Linear(4, 3)
steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
method = tracin.TracInCP(tracin.Task(model, tracin.losses.cross_entropy), steps, progress=False, device="cpu")
rows = torch.randn(12, 4), torch.arange(12) % 3
audit = find_label_issues(method, rows, evidence=0)
calls = {
    "k is 2.5": lambda: audit.suggested(2.5),
    "k is '1'": lambda: audit.suggested("1"),
    "action is 3": lambda: audit.suggested(1, 3),
    "Audit.load: folder is a int": lambda: Audit.load(3),
    "Audit.save: folder is a NoneType": lambda: audit.save(None),
    "null character": lambda: Audit.load("a" + chr(0)),
    "export: path is a int": lambda: audit.export(3),
    "find_label_issues: calibration is a int": lambda: find_label_issues(method, rows, calibration=3),
    "Audit.calibrated: calibration is a int": lambda: audit.calibrated(3),
    "self_influence is a Tensor": lambda: find_label_issues(method, rows, self_influence=torch.zeros(12)),
    "class_names[0] is 0": lambda: find_label_issues(method, rows, class_names=[0, 1, 2]),
    "class_names[1] is None": lambda: find_label_issues(method, rows, class_names=["a", None, "c"]),
    "class_names is a set": lambda: find_label_issues(method, rows, class_names={"a", "b", "c"}),
    "study is a int": lambda: calibrate(3),
    "opposing: k is 'all'": lambda: find_label_issues(method, rows, validation=rows, evidence=0).opposing("all"),
}
for fact, call in calls.items():
    try:
        call()
        print("nothing was refused:", fact)
    except Exception as error:
        if not isinstance(error, tracin.errors.TracinError) or fact not in str(error):
            print(fact, "|", repr(error))
"""


def test_each_is_refused_by_name():
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (told.returncode, told.stdout, told.stderr[-2000:]) == (0, "", "")
