"""The notebooks as tests see them. `OMP_NUM_THREADS=2 python -m tests.notebooks [FILE …]` runs them, all or those,
stores their outputs, as committed, and says how long each took.
"""

import base64
import io
import re
import sys
import time

import nbclient
import nbformat
import numpy as np
from PIL import Image

from tests.conftest import ROOT

SAMPLE, UNDERSTAND = ROOT / "sample_stable_diffusion.ipynb", ROOT / "understand_stable_diffusion.ipynb"
SHIPPED = ROOT / "stable_diffusion_results" / "monsters" / "model"
WIDGET = "application/vnd.jupyter.widget-view+json"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def mime_bundles(cell: nbformat.NotebookNode) -> list[dict]:
    return [output.data for output in cell.outputs if "data" in output]


def shown_images(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    found = [data[kind] for data in mime_bundles(cell) for kind in ("image/png", "image/jpeg") if kind in data]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in found]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def set_options(notebook: nbformat.NotebookNode, **values: object) -> None:
    """Changes variables of the first code cell, each of which must be there once."""
    cell = code_cells(notebook)[0]
    for name, value in values.items():
        cell.source, count = re.subn(
            rf"(?m)^{name} = (\"[^\"]*\"|\d+)", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source
        )
        assert count == 1, name


def execute(notebook: nbformat.NotebookNode, timeout: int = 120) -> None:
    """Runs all cells; leaves nothing in the notebook that differs from one machine or run to the next but outputs."""
    options = {"record_timing": False, "store_widget_state": False, "resources": {"metadata": {"path": str(ROOT)}}}
    nbclient.NotebookClient(notebook, timeout=timeout, **options).execute()


if __name__ == "__main__":
    for file in sys.argv[1:] or (SAMPLE, UNDERSTAND):
        start = time.perf_counter()
        committed = nbformat.read(file, as_version=4)
        language = dict(committed.metadata.language_info)
        execute(committed, timeout=3600)
        committed.metadata.language_info = language  # whatever Python ran it
        for cell in code_cells(committed):
            for data in mime_bundles(cell):
                data.pop(WIDGET, None)
        nbformat.write(committed, file)
        print(f"{file}: {time.perf_counter() - start:.0f} seconds")
