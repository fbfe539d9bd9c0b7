"""The figures of the notebook that explains: they show what the code does, and its exercises can be graded."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch

from diffusion_model import UNetConfig
from lesson.figures import exact_epsilon, paths, plane_of
from lesson.unet_figure import draw_unet, save, stages
from noise_schedule import noised
from samplers import SAMPLERS, STOCHASTIC_SAMPLERS
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


# ----------------------------------------------------------------------------------------------------------------------
# Vectors and paths
# ----------------------------------------------------------------------------------------------------------------------


def test_the_plane_keeps_lengths_and_angles_of_what_lies_in_it() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 8, 8)
    coordinates = plane_of(a, b)
    (ax, ay), (bx, by) = coordinates(a), coordinates(b)
    assert (ax, ay) == pytest.approx((a.norm().item(), 0), abs=1e-4)
    assert bx**2 + by**2 == pytest.approx(b.norm().item() ** 2, rel=1e-4) and by > 0
    assert ax * bx + ay * by == pytest.approx((a * b).sum().item(), abs=1e-3)
    assert coordinates(a + 3 * (b - a)) == pytest.approx((ax + 3 * (bx - ax), 3 * by), abs=1e-3)


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


# ----------------------------------------------------------------------------------------------------------------------
# Exercises
# ----------------------------------------------------------------------------------------------------------------------

PROSE = "\n".join(cell.source for cell in nbformat.read(UNDERSTAND, as_version=4).cells if cell.cell_type == "markdown")
EXERCISES = re.findall(
    r"\*\*Exercise\.\*\* `(?:\w+\.)?(\w+)`(?: and `[\w.]+`)? in \[`([\w./]+)`\][^`]*?(?:`rescale`[^`]*)?"
    r"`python -m pytest (tests/\w+\.py) -k (\w+)`",
    PROSE,
)


def test_every_section_has_an_exercise() -> None:
    assert len(EXERCISES) == 9 and PROSE.count("**Exercise.**") == 10


@pytest.mark.long
@pytest.mark.parametrize(("function", "file", "test", "chosen"), EXERCISES, ids=[e[0] for e in EXERCISES])
def test_an_exercise_is_graded(function: str, file: str, test: str, chosen: str, tmp_path: Path) -> None:
    """The test that it names fails with an empty function; that it passes otherwise, the rest of the suite shows."""
    copy = copy_of_the_code(tmp_path / "copy")
    code = (copy / file).read_text(encoding="utf-8")
    (found,) = [node for node in ast.walk(ast.parse(code)) if getattr(node, "name", None) == function]
    lines = code.splitlines(keepends=True)
    indent = " " * found.body[0].col_offset
    empty = "".join(lines[: found.body[0].lineno - 1]) + f"{indent}pass\n" + "".join(lines[found.end_lineno :])
    (copy / file).write_text(empty, encoding="utf-8")
    process = fork(run_test, str(copy), test, str(tmp_path / "printed"), "-k", chosen)
    process.join(300)
    printed = (tmp_path / "printed").read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == pytest.ExitCode.TESTS_FAILED, printed[-3000:]
