"""The notebook runs from top to bottom, on the smallest model and on the one that ships, and pictures come out."""

import base64
import io
import json
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "sample_stable_diffusion.ipynb"
SHIPPED = ROOT / "stable_diffusion_results" / "monsters" / "model"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown_pictures(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    data = [output.get("data", {}) for output in cell.outputs]
    encoded = [value for mime in data for kind, value in mime.items() if kind in ("image/png", "image/jpeg")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in encoded]


def settings(notebook: nbformat.NotebookNode, **values: object) -> None:
    """Changes variables of the first code cell, each of which must be there once."""
    cell = code_cells(notebook)[0]
    for name, value in values.items():
        cell.source, count = re.subn(
            rf"(?m)^{name} = (\"[^\"]*\"|\d+)", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source
        )
        assert count == 1, name


@pytest.mark.parametrize("which", ["tiny", "shipped"])
def test_it_runs_from_top_to_bottom(notebook, tmp_path, which):
    if which == "shipped" and not SHIPPED.is_dir():
        pytest.skip("the shipped model is not there")
    if which == "tiny":
        torch.manual_seed(0)
        tiny_model().save_pretrained(tmp_path / "model")
        settings(notebook, MODEL=str(tmp_path / "model"))
    settings(notebook, SIZE=64, STEPS=4)
    painting = ["show(" in cell.source and "def show(" not in cell.source for cell in code_cells(notebook)]

    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()

    for cell, paints in zip(code_cells(notebook), painting, strict=True):
        assert not [
            output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
        ]
        pictures = shown_pictures(cell)
        assert len(pictures) >= paints
        assert all(picture.std() > 10 for picture in pictures)
    assert sum(painting) >= 10
    printed = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "unchanged outside the mask: True" in printed
    assert "'Steps': '4'" in printed  # what the prompt box's picture says of itself


def test_as_committed_it_reads_as_a_page(notebook):
    """With outputs, small enough for a web page, and without the paths of the machine it was made on."""
    text = NOTEBOOK.read_text()
    assert len(text) < 4_000_000
    assert not re.search(
        r"/(work|home|tmp|root|Users)/", json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    )
    assert 10 <= len(code_cells(notebook)) <= 16
    assert all(len(cell.source.splitlines()) <= 45 for cell in code_cells(notebook))
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for name in re.findall(r"\]\(([\w./]+)\)", "".join(prose)):
        assert (ROOT / name).exists(), name
    if SHIPPED.is_dir():
        assert sum(len(shown_pictures(cell)) for cell in code_cells(notebook)) >= 10
        assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
