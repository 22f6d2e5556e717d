"""The code in the README and in the guide runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/getting-started.md",
        "docs/influence-functions.md",
        "docs/projections.md",
        "docs/gradient-index.md",
        "docs/audit.md",
    ],
)
def test_code_blocks_run_in_order(document, tmp_path, monkeypatch):
    blocks = FENCE.findall((ROOT / document).read_text(encoding="utf-8"))
    assert blocks, f"{document} has no python block"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "document"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{document}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_resolve(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)}
    targets |= set(re.findall(r'<img[^>]* src="([^"]+)"', text))
    local = {target for target in targets if target and "://" not in target}
    assert {target for target in local if not (ROOT / target).exists()} == set()
