"""The notebooks run from top to bottom, on the smallest model and on the one that ships, and images come out."""

import io
import json
import re
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
from PIL import Image

import lora
import stable_diffusion_model
from evaluation.timestep_loss import by_tenths, spread
from lesson.figures import Panel, plane_of
from noise_schedule import NoiseSchedule, epsilon_from_prediction, noised
from published.lora_files import write_lora
from tests.conftest import ROOT
from tests.notebooks import (
    SAMPLE,
    SHIPPED,
    UNDERSTAND,
    WIDGET,
    code_cells,
    execute,
    mime_bundles,
    printed,
    set_options,
    shown_images,
)
from tests.tiny import tiny_model

both = pytest.mark.parametrize("file", [SAMPLE, UNDERSTAND], ids=["sample", "understand"])


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(SAMPLE, as_version=4)


@pytest.fixture
def tiny(tmp_path) -> str:
    torch.manual_seed(0)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    for change in lora.add(model.unet, lora.targets(model.unet), rank=2, alpha=2):
        torch.nn.init.normal_(change.up.weight)
    write_lora(tmp_path / "lora.safetensors", model.unet)
    return str(tmp_path / "model")


@pytest.fixture
def tiny_lora(tiny) -> str:
    return str(Path(tiny).with_name("lora.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# Running it
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "shipped"])
@both
def test_it_runs_from_top_to_bottom(file, tiny, tiny_lora, which):
    if which == "shipped" and not SHIPPED.is_dir():
        pytest.skip("the shipped model is not there")
    if which == "tiny" and SHIPPED.is_dir():
        pytest.skip("the shipped model shows as much, and each figure takes its time")
    notebook = nbformat.read(file, as_version=4)
    if which == "tiny":
        set_options(notebook, MODEL=tiny)
    set_options(notebook, SIZE=64)
    if file == SAMPLE:
        set_options(notebook, STEPS=4, **({"LORA": tiny_lora} if which == "tiny" else {}))
    execute(notebook)

    cells = code_cells(notebook)
    drawing = [
        re.search(r"\bshow_\w+\(|\bdisplay\(|\bas_jpeg\(|\bdraw_unet\(", cell.source) is not None for cell in cells
    ]
    for cell, is_drawing in zip(cells, drawing, strict=True):
        said = [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
        assert all("prompt is longer than" in o.get("text", "") for o in said)  # as the tiny tokenizer finds captions
        images = shown_images(cell)
        assert len(images) >= is_drawing
        assert all(image.std() > 10 for image in images)
    assert sum(drawing) >= 10
    if file == SAMPLE:
        assert "unchanged outside the mask: True" in printed(notebook)
        assert "'Steps': '4'" in printed(notebook)  # what the prompt box's image says of itself
        assert WIDGET in mime_bundles(code_cells(notebook)[-1])[-1]


def variables_after(cell: int, **before: object) -> dict:
    """Runs one code cell of the notebook that explains, with figures left out."""
    source = code_cells(nbformat.read(UNDERSTAND, as_version=4))[cell].source
    variables = {"Panel": Panel, "plane_of": plane_of, "show_images": mock.Mock(), "show_vectors": mock.Mock()}
    variables |= {"torch": torch, "T": 1000, "show_curves": mock.Mock()} | before
    exec(source, variables)
    return variables


def test_the_model_that_is_explained_is_where_the_cells_make_their_numbers(tiny, monkeypatch):
    """Also on a machine with a GPU."""
    monkeypatch.setattr(stable_diffusion_model, "choose_device", lambda asked: torch.device(asked or "meta"))
    notebook = nbformat.read(UNDERSTAND, as_version=4)
    set_options(notebook, MODEL=tiny)
    variables: dict = {}
    exec(code_cells(notebook)[0].source.replace('set_matplotlib_formats("jpeg")', ""), variables)
    assert variables["model"].device.type == "cpu"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_is_explained_in_noise_whatever_the_model_predicts(prediction_type, capsys):
    """Of a model that is right, the error is 0."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise, empty = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.zeros(1, 1)

    def predict(x_t, t, context):
        right = schedule.target(latents, noise, torch.tensor([t]))
        return right + 0.01 * (1 - context)[..., None, None] * torch.ones_like(latents).cumsum(-1)

    variables_after(
        6, schedule=schedule, latents=latents, noise=noise, empty=empty, context=empty + 1, predict=predict,
        noised=noised, epsilon_from_prediction=epsilon_from_prediction, drawing=None,
    )  # fmt: skip
    errors = dict(re.findall(r"(\w[^:\n]*): length .*error ([\d.]+)", capsys.readouterr().out))
    assert float(errors["with caption"]) == 0 < float(errors["without caption"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_hard_timesteps_are_shown_in_noise_and_image_whatever_the_model_predicts(prediction_type):
    """Each prediction counts at its own timestep, as the loss has it: of a model that is off by 0.1 in x_0."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    _, times = spread(16, 1000, torch.device("cpu"))
    snr = schedule.snr(times)
    errors = 0.01 * (snr if prediction_type == "epsilon" else snr + 1)
    shown = variables_after(
        5, schedule=schedule, monsters=mock.Mock(), image_to_pixels=lambda _: torch.zeros(3, 8, 8), SIZE=8,
        model=mock.Mock(device=torch.device("cpu")), prediction_errors=lambda *_: errors.tolist(), spread=spread,
        by_tenths=by_tenths,
    )["show_curves"]  # fmt: skip
    in_noise, in_image, share = ([y for _, y, *_ in panel.lines.values()] for panel in shown.call_args.args)
    torch.testing.assert_close(in_noise[0], torch.tensor(by_tenths((0.01 * snr).tolist())))
    torch.testing.assert_close(in_image[0], torch.full((10,), 0.01))
    weighted = torch.tensor(by_tenths((0.01 * snr.clamp(max=5)).tolist()))
    torch.testing.assert_close(share[1], weighted / weighted.sum())


def test_what_is_said_of_hard_timesteps_is_what_was_measured():
    notebook = nbformat.read(UNDERSTAND, as_version=4)
    (prose,) = [cell.source for cell in notebook.cells if cell.source.startswith("**Exercise.** `VAE.scale_latents`")]
    assert f"at {len(spread(16, 1000, torch.device('cpu'))[0])} timesteps in turn" in prose
    simple, weighted = map(int, re.findall(r"the largest tenth is (\d+) times the smallest", printed(notebook)))
    assert 27 < simple < 40 and "thirtyfold" in prose
    assert weighted == 13 and "thirteenfold" in prose and "differ thirteenfold" in (ROOT / "README.md").read_text()


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


@both
def test_as_committed_it_reads_as_a_page(file):
    """With outputs, small enough for a web page, and without the paths of the machine it was made on."""
    notebook = nbformat.read(file, as_version=4)
    assert len(file.read_text()) < 1_500_000
    assert not re.search(
        r"/(work|home|tmp|root|Users)/", json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    )
    assert 10 <= len(code_cells(notebook)) <= 16
    assert all(len(cell.source.splitlines()) <= 45 for cell in code_cells(notebook))
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for name in re.findall(r"\]\(([\w./]+)(?:#[^)]*)?\)", "".join(prose)):
        assert (ROOT / name).exists(), name
    assert not re.findall(r"\*\w(?:_\w)?\*|\*\w = ", "".join(prose))  # symbols are $x_t$, which every viewer renders
    if SHIPPED.is_dir():
        assert sum(len(shown_images(cell)) for cell in code_cells(notebook)) >= 11
        assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


def test_as_committed_an_image_stands_in_for_the_prompt_box(notebook):
    """A widget without a kernel is an error message on some pages and `VBox(children=(…` on others."""
    if SHIPPED.is_dir():
        assert len(shown_images(code_cells(notebook)[-1])) == 1
    assert WIDGET not in SAMPLE.read_text()
    assert "VBox(children" not in SAMPLE.read_text()


@both
def test_running_it_changes_nothing_but_outputs(file):
    """What Jupyter writes is what is committed: its formatting, no times, no widget states, the same ids."""
    notebook = nbformat.read(file, as_version=4)
    assert nbformat.writes(notebook) + "\n" == file.read_text()
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
