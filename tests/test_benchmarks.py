"""The benchmarks: every row is a command that exists, and a change changes only what it says."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import compare_diffusers, quickstart
from diffusion_model import UNetConfig
from train_stable_diffusion import Batch
from training.options import parse_options
from training.presets import PRESETS, UNetOptions
from vae_model import VAEConfig


def test_every_row_differs_from_the_preset_in_what_it_names() -> None:
    preset = parse_options(UNetOptions, quickstart.command_of("preset"), PRESETS, "monsters")
    for row, changes in quickstart.ROWS.items():
        options = parse_options(UNetOptions, quickstart.command_of(row), PRESETS, "monsters")
        differing = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(preset, f.name)]
        named = (
            [name.removeprefix("--") for name in changes if name.startswith("--")] if isinstance(changes, list) else []
        )
        assert sorted(differing) == sorted(named), row


def test_a_change_to_the_batch_changes_one_thing_the_same_way_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given = Batch(
        torch.randn(64, 4, 4, 4), torch.randn(64, 4, 4, 4), torch.randint(1000, (64,)), torch.randn(64, 77, 8)
    )
    monkeypatch.setattr(quickstart, "draw_batch", lambda *_: dataclasses.replace(given))
    draw = quickstart.changing(quickstart.middle_timesteps)
    one, again, other = (draw(None, None, None, UNetOptions(), step, None) for step in (3, 3, 4))
    for f in dataclasses.fields(Batch):
        values = [getattr(batch, f.name) for batch in (given, one, again, other)]
        assert torch.equal(values[1], values[2])
        assert torch.equal(values[0], values[1]) == torch.equal(values[1], values[3]) == (f.name != "t")
    assert one.t.min() >= 0 and one.t.max() < 1000 and 0.5 < ((one.t > 270) & (one.t < 730)).float().mean() < 0.9


def test_the_table_has_means_and_ranges_over_the_seeds() -> None:
    same = {"steps": 700, "on_white_in_the_colour": 1.0, "validation_loss": 0.09}
    results = [{"row": "preset", "seed": seed, "r_precision": r} | same for seed, r in enumerate((0.5, 0.6, 0.7))]
    last = quickstart.table(results).splitlines()[-1]
    assert last == "| preset |  | 700 | 3 | 60% (50%…70%) | 100% | 0.0900 |"


def test_a_row_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the training, which takes minutes, replaced by what it leaves."""

    def train(row: str, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "speed.csv").write_text("step,images_per_second\n10,9\n20,30\n30,40\n40,50\n")
        (folder / "metrics.csv").write_text("step,loss,validation_loss\n350,,0.2\n400,0.1,\n700,,0.1\n")
        shares = {name: 0.5 for name in ("r_precision", "on_white_in_the_colour")}
        shares |= {f"r_precision_of_{kind}_images": 0.0 for kind in ("real", "shuffled")}
        (folder / "unseen.json").write_text(json.dumps(shares))

    monkeypatch.setattr(quickstart, "train", train)
    monkeypatch.setattr(quickstart, "RESULTS", tmp_path / "quickstart.json")
    monkeypatch.setattr("sys.argv", ["quickstart", "--rows", "preset", "batches of 128", "--seeds", "5"])
    quickstart.main()
    kept = json.loads((tmp_path / "quickstart.json").read_text())
    steps = PRESETS["monsters"]["max_steps"]
    assert [(r["row"], r["seed"], r["steps"]) for r in kept] == [
        ("preset", 5, steps),
        ("batches of 128", 5, steps // 2),
    ]
    assert kept[0]["validation_loss"] == 0.1 and quickstart.speed_of("preset", tmp_path / "run") == 40


TINY = compare_diffusers.Model(
    UNetConfig(
        block_out_channels=(8, 16),
        attention_levels=(False, True),
        layers_per_block=1,
        num_attention_heads=2,
        context_dim=192,
        norm_num_groups=4,
    ),
    VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    "shipped",
    side=64,
    train_side=64,
    batch=2,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare_diffusers.MODELS, "tiny", TINY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", compare_diffusers.ROWS)
def test_all_three_sides_do_the_same_work(row: str, dtype: str, tiny: None) -> None:
    case, outputs = compare_diffusers.Case(row, "tiny", dtype), []
    for side in compare_diffusers.SIDES:
        work = compare_diffusers.WORK[row](case, side)
        torch.manual_seed(1)
        outputs.append(work())
    if row in ("unet", "vae_decode"):
        ours, documented, tuned = outputs[0], outputs[1].sample, outputs[2].sample
    elif row == "vae_encode":
        ours, documented, tuned = (posterior.mean for posterior in (outputs[0], *(o.latent_dist for o in outputs[1:])))
    else:
        return  # each side draws its own noise
    tolerance = 2e-5 if dtype == "float32" else 0.03
    for theirs in (documented, tuned):
        assert ((ours - theirs).norm() / ours.norm()).item() < tolerance


def test_a_comparison_is_measured_in_turn_and_shown(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = iter(range(1000)), []
    cost = {"ours": 1.0, "documented": 2.0, "tuned": 1.5}

    def work(case: compare_diffusers.Case, side: str) -> object:
        return lambda: calls.append(side)

    def seconds(work: object, device: str) -> float:
        work()
        return cost[calls[-1]] * (1 + 0.1 * (next(clock) // 3))  # the machine becomes slower; ratios do not change

    monkeypatch.setitem(compare_diffusers.WORK, "unet", work)
    monkeypatch.setattr(compare_diffusers, "seconds", seconds)
    monkeypatch.setattr(compare_diffusers, "peak_memory", lambda case, side: 100 * cost[side])
    result = compare_diffusers.measure(compare_diffusers.Case("unet", "tiny", "float32"), 3)
    assert calls[6:] == "ours documented tuned documented tuned ours tuned ours documented".split()
    assert result["documented"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    last = compare_diffusers.table([result]).splitlines()[-1]
    assert last == "| unet | tiny | float32 | 2.00× (2.00…2.00) | 1.50× (1.50…1.50) | 100, 200, 150 |"
