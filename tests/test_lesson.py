"""The figures of the notebook that explains: they show what the code does, and its exercises can be graded."""

import ast
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from diffusion_model import UNetConfig
from lesson import figures, unet_figure
from lesson.figures import Panel, as_jpeg, exact_epsilon, on_a_point, paths, plane_of
from lesson.unet_figure import draw_unet, save, stages
from noise_schedule import NoiseSchedule, noised
from samplers import SAMPLERS, STOCHASTIC_SAMPLERS, timestep_grid
from tests.children import fork
from tests.conftest import ROOT
from tests.notebooks import UNDERSTAND
from tests.test_faults import copy_of_the_code, run_test

# ----------------------------------------------------------------------------------------------------------------------
# The U-Net's figure
# ----------------------------------------------------------------------------------------------------------------------


def test_stages_of_stable_diffusion() -> None:
    found = [(stage.name, stage.resnets, stage.attends, stage.shape) for stage in stages(UNetConfig(), 64, 64)]
    assert found == [
        ("down_blocks.0", 2, True, (320, 64, 64)),
        ("down_blocks.1", 2, True, (640, 32, 32)),
        ("down_blocks.2", 2, True, (1280, 16, 16)),
        ("down_blocks.3", 2, False, (1280, 8, 8)),
        ("mid_block", 2, True, (1280, 8, 8)),
        ("up_blocks.0", 3, False, (1280, 8, 8)),
        ("up_blocks.1", 3, True, (1280, 16, 16)),
        ("up_blocks.2", 3, True, (640, 32, 32)),
        ("up_blocks.3", 3, True, (320, 64, 64)),
    ]


def test_sizes_that_are_no_powers_of_two_are_rounded_up_on_the_way_down() -> None:
    config = UNetConfig(block_out_channels=(32, 64, 64), attention_levels=(False, False, True), layers_per_block=1)
    assert [stage.shape for stage in stages(config, 5, 7)] == [
        (32, 5, 7), (64, 3, 4), (64, 2, 2), (64, 2, 2), (64, 2, 2), (64, 3, 4), (32, 5, 7),
    ]  # fmt: skip


def test_the_readmes_figure_is_that_of_the_code(tmp_path: Path) -> None:
    def texts(svg: str) -> list[str]:
        return re.findall(r">([^<>]*\w[^<>]*)</text>", svg)

    for name in ("one.svg", "two.svg"):
        save(draw_unet(UNetConfig(), 64, 64), tmp_path / name)
    one = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert one == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert {"320 × 64 × 64", "1280 × 8 × 8", "3 skips, concatenated", "conv_in"} <= set(texts(one))
    assert texts((ROOT / "lesson" / "unet.svg").read_text(encoding="utf-8")) == texts(one)


def test_levels_that_attend_are_blue_and_arrows_go_down_on_the_left_and_up_on_the_right() -> None:
    config = UNetConfig(block_out_channels=(32, 64), attention_levels=(False, True), layers_per_block=1)
    (axes,) = draw_unet(config, 8, 8).axes
    rows: dict[int, set[str]] = {}
    for box in axes.patches:
        rows.setdefault(round(-box.get_y()), set()).add(to_hex(box.get_facecolor()))
    assert rows == {0: {"#eeeeee"}, 1: {"#cfe3f5"}, 2: {"#cfe3f5"}}
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    between = [arrow for arrow in arrows if arrow.xy[0] == arrow.xyann[0] and -1 < arrow.xy[1] < 0]
    assert {arrow.xy[0]: arrow.xy[1] > arrow.xyann[1] for arrow in between} == {-2.7: False, 2.7: True}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["nowhere/model", "--output", "a.svg"], "the model 'nowhere/model' is not a file or folder here"),
        (["--output", "a.gif0"], "--output: must end with .svg, .png or .pdf, not 'a.gif0'."),
        (["--output", "file/a.svg"], "file"),
        (["--output", "a.svg", "--resolution", "0"], "--resolution: must be positive and divisible by 8, not 0."),
        (["--output", "a.svg", "--resolution", "100"], "--resolution: must be positive and divisible by 8, not 100."),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["unet_figure", *options])
    with pytest.raises(SystemExit):
        unet_figure.main()
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_figure_goes_into_a_folder_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["unet_figure", "--output", str(tmp_path / "new" / "a.svg"), "--resolution", "256"])
    unet_figure.main()
    assert "320 × 32 × 32" in (tmp_path / "new" / "a.svg").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Curves, vectors and paths
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Figures stay open, to be looked at."""
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")


def test_curves_say_what_they_are(shown: None) -> None:
    figures.show_curves(
        Panel("one", "time", "size", {"a": ([1, 2], [3, 4]), "b": ([1, 2], torch.tensor([5, 6]), "C3.")}),
        Panel("other", "t", "loss", {"": ([0, 1], [1, 100])}, log=True),
    )
    first, second = plt.gcf().axes
    assert [axes.get_title() for axes in (first, second)] == ["one", "other"]
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in (first, second)] == [("time", "size"), ("t", "loss")]
    assert [line.get_xydata().tolist() for line in first.lines] == [[[1, 3], [2, 4]], [[1, 5], [2, 6]]]
    assert to_hex(first.lines[1].get_color()) == to_hex("C3")
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["a", "b"] and second.get_legend() is None
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")


def test_a_note_stands_above_an_image() -> None:
    image = Image.new("RGB", (300, 40), "navy")
    plain, noted = (Image.open(io.BytesIO(as_jpeg(image, note).data)) for note in ("", "bright: attention"))
    assert plain.size == image.size and noted.width == 300 and noted.height > 50
    darkest, lightest = noted.crop((0, 0, 300, noted.height - 40)).convert("L").getextrema()
    assert darkest < 60 and lightest > 240
    assert noted.getpixel((150, noted.height - 20))[2] > 90 > noted.getpixel((150, noted.height - 20))[0]


def test_the_plane_keeps_lengths_and_angles_of_what_lies_in_it() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 8, 8)
    coordinates = plane_of(a, b)
    (ax, ay), (bx, by) = coordinates(a), coordinates(b)
    assert (ax, ay) == pytest.approx((a.norm().item(), 0), abs=1e-4)
    assert bx**2 + by**2 == pytest.approx(b.norm().item() ** 2, rel=1e-4) and by > 0
    assert ax * bx + ay * by == pytest.approx((a * b).sum().item(), abs=1e-3)
    assert coordinates(a + 3 * (b - a)) == pytest.approx((ax + 3 * (bx - ax), 3 * by), abs=1e-3)


def test_vectors_are_arrows_from_0_with_their_names(shown: None) -> None:
    figures.show_vectors("at t = 600", {"one": (1.0, 0.0), "other": (0.9, 0.2)}, "RMS")
    (axes,) = plt.gcf().axes
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((0, 0), (1.0, 0.0)), ((0, 0), (0.9, 0.2))]  # tail, head
    assert {text.get_text() for text in axes.texts} == {"", "one", "other"} and axes.get_title() == "at t = 600"
    assert axes.get_xlabel() == "along the unconditional prediction (RMS)" and axes.get_ylabel() == "across it (RMS)"


def test_strips_stand_under_their_names(shown: None) -> None:
    figures.show_strips({name: Image.new("RGB", (40, 5), name) for name in ("red", "blue")})
    first, second = plt.gcf().axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["red", "blue"]
    assert [axes.images[0].get_array()[0, 0].tolist() for axes in (first, second)] == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("alpha_bar", [0.9, 0.5, 0.05])
def test_the_exact_prediction_is_the_best_of_all(alpha_bar: float) -> None:
    """The mean of ε near each x_t, counted in a million samples."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(2, (1_000_000,), generator=generator) * 2.0 - 1
    noise = torch.randn(x0.shape, generator=generator)
    x_t = noised(x0, noise, alpha_bar)
    for place in (-1.0, -0.3, 0.0, 0.7):
        near = (x_t - place).abs() < 0.02
        error = noise[near].std().item() / near.sum().item() ** 0.5  # of the mean
        expected = exact_epsilon(x_t[near], alpha_bar).mean().item()
        assert noise[near].mean().item() == pytest.approx(expected, abs=4 * error + 0.01)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_paths_end_on_the_data_and_those_of_an_equation_never_cross(sampler: str) -> None:
    t, x = paths(sampler, 50, 200)
    assert t.shape == (51,) and x.shape == (51, 200) and t[-1] == 0
    assert (x[-1].abs() - 1).abs().median() < 0.03
    assert 60 < (x[-1] > 0).sum() < 140
    if sampler not in STOCHASTIC_SAMPLERS:
        order = x[0].argsort()
        assert all((row[order].diff() >= -1e-4).all() for row in x)
    assert torch.equal(paths(sampler, 50, 200)[1], x)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_paths_begin_where_the_sampler_begins(sampler: str) -> None:
    t, x = paths(sampler, 7, 30, seed=4)
    grid = timestep_grid(sampler, NoiseSchedule(), 7, timestep_spacing="trailing")
    noise = torch.randn(30, generator=torch.Generator().manual_seed(4))
    assert torch.equal(x[0], grid.start(noise)) and t.tolist() == [*grid.timesteps, 0]
    own = timestep_grid(sampler, NoiseSchedule(), 7)
    assert paths(sampler, 7, 30, spacing=None)[0].tolist() == pytest.approx([*own.timesteps, 0])


def test_few_steps_miss_by_where_the_last_one_begins_whatever_the_sampler() -> None:
    """What the notebook says of 5 steps: fresh noise neither helps nor harms, a last call near t = 0 hides all."""
    assert on_a_point(torch.tensor([-1.05, 0.95, 0.85, 1.2, 0.0])).tolist() == [True, True, False, False, False]
    found = {}
    for spacing in ("trailing", None):
        ends = {sampler: paths(sampler, 5, 2000, spacing=spacing)[1][-1] for sampler in SAMPLERS}
        found[spacing] = {sampler: on_a_point(x).float().mean().item() for sampler, x in ends.items()}
    assert all(0.6 < share < 0.8 for share in found["trailing"].values())
    assert max(found["trailing"], key=found["trailing"].get) == "dpm++2m"
    assert {sampler for sampler, share in found[None].items() if share > 0.99} == {"ddpm", "euler", "euler_a"}


def test_paths_are_drawn_with_the_share_that_arrives(shown: None) -> None:
    """Grey if they miss; marks at the model's calls."""
    figures.show_paths(["euler", "ddpm"], 5, shown=40)
    for axes, sampler in zip(plt.gcf().axes, ("euler", "ddpm"), strict=True):
        t, x = paths(sampler, 5, 2000)
        hit = on_a_point(x[-1])
        assert axes.get_title() == f"{sampler}: {hit.float().mean():.0%} on a point"
        *lines, calls = axes.lines
        assert len(lines) == 40 and calls.get_xdata().tolist() == t[:-1].tolist() == [999, 799, 599, 399, 199]
        for i, line in enumerate(lines):
            assert line.get_ydata().tolist() == x[:, i].tolist()
            assert line.get_color() == (("C0" if x[-1, i] > 0 else "C1") if hit[i] else "0.3")
    assert "5 steps" in plt.gcf().get_suptitle() and "trailing" in plt.gcf().get_suptitle()


# ----------------------------------------------------------------------------------------------------------------------
# Exercises
# ----------------------------------------------------------------------------------------------------------------------

PROSE = "\n".join(cell.source for cell in nbformat.read(UNDERSTAND, as_version=4).cells if cell.cell_type == "markdown")
EXERCISES = re.findall(
    r"\*\*Exercise\.\*\* `(?:\w+\.)?(\w+)`(?: and `[\w.]+`)? in \[`([\w./]+)`\](?:(?!\*\*Exercise)[\s\S])*?"
    r"`python -m pytest (tests/\w+\.py) -k (\w+|\"[\w ]+\")`",
    PROSE,
)
WRONG = [  # answers that a grader must not let pass: function, what stands there, what somebody might write
    ("attention_weights", ".mean(dim=1)", ".sum(dim=1)"),
    ("attention_weights", ".mean(dim=1)", "[:, 0]"),
    ("loss_weight", "if gamma is None or self.zero_terminal_snr:", "if gamma is None:"),
]


def test_every_section_has_an_exercise() -> None:
    assert len(EXERCISES) == 9 and PROSE.count("**Exercise.**") == 10
    assert len({function for function, *_ in EXERCISES}) == 9


@pytest.mark.parametrize(("function", "file", "test", "chosen"), EXERCISES, ids=[e[0] for e in EXERCISES])
def test_an_exercise_is_graded_by_its_own_tests_alone(function: str, file: str, test: str, chosen: str) -> None:
    """`-k` looks into the file's name, too, and would then choose all of its tests."""
    words = chosen.strip('"').split(" or ")
    named = re.findall(r"^def (test_\w+)", (ROOT / test).read_text(encoding="utf-8"), re.M)
    assert not any(word in test for word in words)
    assert all(any(word in name for name in named) for word in words)


@pytest.mark.long
@pytest.mark.parametrize(("function", "file", "test", "chosen"), EXERCISES, ids=[e[0] for e in EXERCISES])
def test_an_exercise_is_graded(function: str, file: str, test: str, chosen: str, tmp_path: Path) -> None:
    """The test that it names fails with an empty function; that it passes otherwise, the rest of the suite shows."""

    def emptied(lines: list[str], found: ast.FunctionDef) -> list[str]:
        first = found.body[0]
        return [*lines[: first.lineno - 1], " " * first.col_offset + "pass\n", *lines[found.end_lineno :]]

    assert_fails_with(emptied, function, file, test, chosen, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("function", "old", "new"), WRONG)
def test_a_wrong_answer_is_graded_as_wrong(function: str, old: str, new: str, tmp_path: Path) -> None:
    def spoiled(lines: list[str], found: ast.FunctionDef) -> list[str]:
        body = "".join(lines[found.lineno - 1 : found.end_lineno])
        assert body.count(old) == 1
        return [*lines[: found.lineno - 1], body.replace(old, new), *lines[found.end_lineno :]]

    ((file, test, chosen),) = [where for name, *where in EXERCISES if name == function]
    assert_fails_with(spoiled, function, file, test, chosen, tmp_path)


def assert_fails_with(change: Callable, function: str, file: str, test: str, chosen: str, tmp_path: Path) -> None:
    """Runs an exercise's test on a copy of the code whose lines `change` gives, from these and the function."""
    copy = copy_of_the_code(tmp_path / "copy")
    code = (copy / file).read_text(encoding="utf-8")
    (found,) = [node for node in ast.walk(ast.parse(code)) if getattr(node, "name", None) == function]
    (copy / file).write_text("".join(change(code.splitlines(keepends=True), found)), encoding="utf-8")
    process = fork(run_test, str(copy), test, str(tmp_path / "printed"), "-k", chosen.strip('"'))
    process.join(300)
    printed = (tmp_path / "printed").read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == pytest.ExitCode.TESTS_FAILED, printed[-3000:]
