"""The tour runs from top to bottom, as Colab or a user would run it, and shows what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "tracin_tour.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_tour_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert len(pictures) == 5
    assert float(re.findall(r"off by ([0-9.e-]+);", text)[0]) < 1e-5
    found = [int(share) for share in re.findall(r"hold (\d+)% of the wrong labels", text)]
    assert len(found) == 2
    assert found[0] > 50
    assert found[1] > 80
    gaps = [float(gap) for gap in re.findall(r"fall of the loss within ([0-9.e+-]+)", text)]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
