"""The notebook runs from top to bottom, on the smallest model and on the one that ships, and images come out.

`python tests/test_notebook.py` runs it and stores its outputs, as they are committed.
"""

import base64
import io
import json
import re
import warnings
from functools import partial
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "sample_stable_diffusion.ipynb"
SHIPPED = ROOT / "stable_diffusion_results" / "monsters" / "model"
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def tiny(tmp_path) -> str:
    from tests.tiny import tiny_model

    torch.manual_seed(0)
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def mime_bundles(cell: nbformat.NotebookNode) -> list[dict]:
    return [output.data for output in cell.outputs if "data" in output]


def shown_images(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    found = [data[kind] for data in mime_bundles(cell) for kind in ("image/png", "image/jpeg") if kind in data]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in found]


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


# ----------------------------------------------------------------------------------------------------------------------
# Running it
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "shipped"])
def test_it_runs_from_top_to_bottom(notebook, tiny, which):
    if which == "shipped" and not SHIPPED.is_dir():
        pytest.skip("the shipped model is not there")
    if which == "tiny":
        set_options(notebook, MODEL=tiny)
    set_options(notebook, SIZE=64, STEPS=4)
    execute(notebook)

    drawing = ["show_images(" in cell.source or "display(" in cell.source for cell in code_cells(notebook)]
    for cell, draws in zip(code_cells(notebook), drawing, strict=True):
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
        images = shown_images(cell)
        assert len(images) >= draws
        assert all(image.std() > 10 for image in images)
    assert sum(drawing) >= 11
    printed = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "unchanged outside the mask: True" in printed
    assert "'Steps': '4'" in printed  # what the prompt box's image says of itself
    assert WIDGET in mime_bundles(code_cells(notebook)[-1])[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The prompt box
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def box(notebook, tiny, tmp_path, monkeypatch, capsys) -> dict:
    """The variables of the notebook once the prompt box has drawn its first image, on the smallest model."""
    monkeypatch.chdir(tmp_path)
    set_options(notebook, MODEL=tiny, SIZE=16, STEPS=3)
    first, *_, last = code_cells(notebook)
    variables: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for cell in (first, last):
            exec(cell.source.replace('set_matplotlib_formats("jpeg")', ""), variables)
    capsys.readouterr()
    return variables


def press_enter(text: object) -> None:
    text._handle_custom_msg({"event": "submit"}, [])  # what the page sends


def test_button_and_enter_draw(box):
    first = box["canvas"].value
    assert Image.open(io.BytesIO(first)).size == (16, 16)
    assert "Saved as" in box["status"].value and Path(box["FILE"]).is_file()
    for act in (box["button"].click, partial(press_enter, box["prompt"]), partial(press_enter, box["negative"])):
        box["seed"].value += 1
        act()
        assert box["canvas"].value != first
        assert box["read_parameters"](box["FILE"])["Seed"] == str(box["seed"].value)
        first = box["canvas"].value


def test_progress_is_seen_and_the_button_is_off_while_it_draws(box):
    seen, model_draw = [], box["draw"]

    def draw(prompts, callback, **options):
        def watched(step, *state):
            callback(step, *state)
            seen.append((box["progress"].value, box["button"].disabled, box["prompt"].disabled, box["status"].value))

        return model_draw(prompts, callback=watched, **options)

    box["draw"] = draw
    box["button"].click()
    assert seen == [(step, True, True, "drawing …") for step in (1, 2, 3)]
    assert box["progress"].max == 3
    assert not box["button"].disabled and not box["prompt"].disabled


def test_errors_and_warnings_stand_beside_the_button_and_text_is_escaped(box):
    box["prompt"].value = "a" * 75 + " <b>"
    box["button"].click()
    assert "longer than 75 tokens" in box["status"].value and "&lt;" in box["status"].value
    assert "<b>" not in box["status"].value
    image = box["canvas"].value

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no <such> thing")

    box["draw"] = fail
    box["button"].click()
    assert box["status"].value == "<b>no &lt;such&gt; thing</b>"
    assert box["canvas"].value == image
    assert not box["button"].disabled


# ----------------------------------------------------------------------------------------------------------------------
# As it is committed
# ----------------------------------------------------------------------------------------------------------------------


def test_as_committed_it_reads_as_a_page(notebook):
    """With outputs, small enough for a web page, and without the paths of the machine it was made on."""
    text = NOTEBOOK.read_text()
    assert len(text) < 1_000_000
    assert not re.search(
        r"/(work|home|tmp|root|Users)/", json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    )
    assert 10 <= len(code_cells(notebook)) <= 16
    assert all(len(cell.source.splitlines()) <= 45 for cell in code_cells(notebook))
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for name in re.findall(r"\]\(([\w./]+)\)", "".join(prose)):
        assert (ROOT / name).exists(), name
    assert not re.findall(r"\*\w(?:_\w)?\*|\*\w = ", "".join(prose))  # symbols are $x_t$, which every viewer renders
    if SHIPPED.is_dir():
        assert sum(len(shown_images(cell)) for cell in code_cells(notebook)) >= 11
        assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


def test_as_committed_an_image_stands_in_for_the_prompt_box(notebook):
    """A widget without a kernel is an error message on some pages and `VBox(children=(…` on others."""
    if SHIPPED.is_dir():
        assert len(shown_images(code_cells(notebook)[-1])) == 1
    assert WIDGET not in NOTEBOOK.read_text()
    assert "VBox(children" not in NOTEBOOK.read_text()


def test_running_it_changes_nothing_but_outputs(notebook):
    """What Jupyter writes is what is committed: its formatting, no times, no widget states, the same ids."""
    assert nbformat.writes(notebook) + "\n" == NOTEBOOK.read_text()
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02d}" for i in range(len(notebook.cells))]

    again = nbformat.from_dict(json.loads(json.dumps(notebook)))
    again.cells = again.cells[:2]
    again.cells[1].source = notebook.cells[1].source = "1 + 1"
    execute(again)
    again.metadata.language_info.version = notebook.metadata.language_info.version  # of Python
    assert again.metadata == notebook.metadata
    for before, after in zip(notebook.cells, again.cells, strict=False):
        assert (before.id, before.metadata, before.source) == (after.id, after.metadata, after.source)


if __name__ == "__main__":
    committed = nbformat.read(NOTEBOOK, as_version=4)
    execute(committed, timeout=3600)
    for cell in code_cells(committed):
        for data in mime_bundles(cell):
            data.pop(WIDGET, None)
    nbformat.write(committed, NOTEBOOK)
