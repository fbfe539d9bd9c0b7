"""The benchmarks: every row is a command that exists, and a change changes only what it says."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import benchmarks
import layers
import monsters
import stable_diffusion_model
from benchmarks import compare_diffusers, contestants, measuring, quickstart, scaling, tricks, what_breaks
from evaluation.obedience import FIRST_UNSEEN, unseen_monsters
from guidance import Guidance
from noise_schedule import NoiseSchedule
from sampling.packed import Packed, PackedConv2d, PackedLinear, unpack
from stable_diffusion_model import StableDiffusion
from tests.conftest import ROOT
from tests.tiny import tiny_model, tiny_unet, tiny_vae
from train_stable_diffusion import Batch
from training import captioned_latents
from training.options import parse_options
from training.presets import PRESETS, UNetOptions
from vae_model import VAE, VAEConfig

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_every_row_differs_from_the_preset_in_what_it_names() -> None:
    preset = parse_options(UNetOptions, quickstart.command_of("preset"), PRESETS, "monsters")
    for row, changes in quickstart.ROWS.items():
        options = parse_options(UNetOptions, quickstart.command_of(row), PRESETS, "monsters")
        differing = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(preset, f.name)]
        named = (
            [name.removeprefix("--") for name in changes if name.startswith("--")] if isinstance(changes, list) else []
        )
        assert sorted(differing) == sorted(named), row


@pytest.mark.parametrize(
    ("change", "changed"),
    [(quickstart.middle_timesteps, "t"), (quickstart.independent_timesteps, "t"), (quickstart.nearest_noise, "noise")],
)
def test_a_change_to_the_batch_changes_one_thing_the_same_way_every_time(
    change: object, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    given = Batch(
        torch.randn(64, 4, 4, 4), torch.randn(64, 4, 4, 4), torch.randint(1000, (64,)), torch.randn(64, 77, 8)
    )
    monkeypatch.setattr(quickstart, "draw_batch", lambda *_: dataclasses.replace(given))
    one, again, other = (quickstart.changing(change)(None, None, None, UNetOptions(), step, None) for step in (3, 3, 4))
    for f in dataclasses.fields(Batch):
        values = [getattr(batch, f.name) for batch in (given, one, again, other)]
        assert torch.equal(values[1], values[2])
        assert torch.equal(values[0], values[1]) == torch.equal(values[1], values[3]) == (f.name != changed)
    if changed == "noise":
        near, far = ((batch.noise - batch.latents).square().mean() for batch in (one, given))
        assert near < far and 0.85 < one.noise.std() < 1.1
    else:
        share = 0.67 if change is quickstart.middle_timesteps else 0.46  # within this range
        assert one.t.min() >= 0 and one.t.max() < 1000
        assert abs(((one.t > 270) & (one.t < 730)).float().mean() - share) < 0.17


def test_the_table_has_means_and_ranges_over_the_seeds() -> None:
    same = {"steps": 700, "on_white_in_the_colour": 1.0, "validation_loss": 0.09}
    same |= {"recipe": quickstart.recipe("preset")}
    results = [{"row": "preset", "seed": seed, "r_precision": r} | same for seed, r in enumerate((0.5, 0.6, 0.7))]
    results.append(results[0] | {"r_precision": 0.0, "recipe": {}})  # of another preset
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


TINY = contestants.Model(tiny_unet(192).config, tiny_vae().config, "shipped", side=64, train_side=64, batch=2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare_diffusers.MODELS, "tiny", TINY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", compare_diffusers.ROWS)
def test_all_sides_do_the_same_work(row: str, dtype: str, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same outputs; as many calls of the U-Net, of as many images and in one type; a step that moves the weights.

    Ours and the tuned one have the same memory layout and a fused optimizer, the documented ones neither. A step clips
    its gradients and leaves none behind; our U-Net is packed where it is timed alone, as it is in sampling.
    """
    case, outputs, calls, built = compare_diffusers.Case(row, "tiny", dtype), [], [], []
    fused, adamw, training = [], torch.optim.AdamW, row in ("train", "pictures")
    monkeypatch.setattr(
        "torch.optim.AdamW", lambda *a, **how: fused.append(how.get("fused", False)) or adamw(*a, **how)
    )
    monkeypatch.setattr(compare_diffusers, "STEPS", 3)
    clip, pack, clipped, packed = torch.nn.utils.clip_grad_norm_, compare_diffusers.pack, [], []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: clipped.append(norm) or clip(p, norm))
    monkeypatch.setattr(compare_diffusers, "pack", lambda network: packed.append(network) or pack(network))
    build = compare_diffusers.build
    monkeypatch.setattr(compare_diffusers, "build", lambda *args: built.append(build(*args)) or built[-1])
    for side in case.sides():
        work = compare_diffusers.work_of(case, side)
        torch.manual_seed(1)
        weights, count = built[-1].unet and built[-1].unet.conv_in.weight.detach().clone(), []
        hook = built[-1].unet and built[-1].unet.conv_in.register_forward_hook(
            lambda _, inputs, out, count=count: count.append((len(inputs[0]), out.dtype))
        )
        if hook:
            channels_last = weights.is_contiguous(memory_format=torch.channels_last)
            assert channels_last == (side in ("ours", "tuned") and not training)
        outputs.append(work())
        calls.append(len(count))
        if hook:
            hook.remove()
            precision = torch.float32 if side.endswith("float32") else case.torch_dtype
            assert set(count) == {(2, precision)}  # a guidance batch, or the tiny model's batch
            unpack(built[-1].unet)
            assert torch.equal(built[-1].unet.conv_in.weight, weights) == (not training)
            assert all(parameter.grad is None for parameter in built[-1].unet.parameters())
        if built[-1].vae:
            convolution = built[-1].vae.encoder.conv_in.weight
            assert convolution.is_contiguous(memory_format=torch.channels_last) == (side in ("ours", "tuned"))
    assert clipped == [1.0] * len(case.sides()) * training
    assert packed == [built[0].unet] * (row == "unet")
    assert fused == ([True, False, True, False][: len(case.sides())] if training else [])
    assert set(calls) == {{"unet": 1, "train": 1, "pictures": 1, "sampling": 3}.get(row, 0)}
    if row in ("unet", "vae_decode"):
        ours, *theirs = outputs[0], *(output.sample for output in outputs[1:])
    elif row == "vae_encode":
        ours, *theirs = outputs[0].mean, *(output.latent_dist.mean for output in outputs[1:])
    else:
        return  # each side draws its own noise
    tolerance = 2e-5 if dtype == "float32" else 0.06
    for output in theirs:
        assert ((ours - output).norm() / ours.norm()).item() < tolerance


@pytest.mark.parametrize("row", compare_diffusers.ROWS)
def test_ours_and_the_tuned_are_compiled(row: str, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case, given = compare_diffusers.Case(row, "tiny", "bfloat16", compile=True), []
    monkeypatch.setattr(torch, "compile", lambda network: given.append(network) or network)
    for side in case.sides():
        given.clear()
        compare_diffusers.work_of(case, side)
        assert bool(given) == (side in ("ours", "tuned")), side


def test_both_have_one_noise_schedule() -> None:
    theirs = compare_diffusers.DDPMScheduler(**compare_diffusers.BETAS)
    torch.testing.assert_close(theirs.alphas_cumprod, NoiseSchedule().alphas_cumprod)


def test_memory_is_that_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.ones(300_000_000)  # 1.2 GB that the other process must not begin with
    case = compare_diffusers.Case("vae_decode", "quickstart", "float32")
    found = compare_diffusers.in_a_process(case, "ours")
    assert 200 < found["memory_mb"] < 1200 and 0 < found["seconds"] < 20
    assert held[0] == 1
    monkeypatch.setattr("sys.executable", "false")
    assert compare_diffusers.peak_memory(case, "ours") is None


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_memory_is_the_peak_and_not_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare_diffusers.WORK, "unet", lambda case, side: lambda: torch.ones(75_000_000).sum())
    peak = compare_diffusers.alone("ours", compare_diffusers.Case("unet", "tiny", "float32"))["memory_mb"]
    left = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3
    assert peak > left + 150  # of 300 MB


def test_turns_may_be_processes_of_their_own(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows whom is as in one process; memory is the most that a side ever took."""
    calls, cost = [], {"ours": 1.0, "documented": 2.0, "tuned": 1.5}

    def in_a_process(case: compare_diffusers.Case, side: str) -> dict:
        calls.append(side)
        return {"seconds": cost[side], "memory_mb": 100 * cost[side] + len(calls)}

    monkeypatch.setattr(compare_diffusers, "in_a_process", in_a_process)
    result = compare_diffusers.measure(compare_diffusers.Case("train", "tiny", "float32"), 2, apart=True)
    assert calls == "tuned documented ours documented tuned ours".split() and result["apart"]
    assert result["documented"]["median"] == 2 and result["tuned"]["most"] == 1.5
    assert result["memory_mb"] == {"ours": 106, "documented": 204, "tuned": 155}


def test_a_turn_that_ends_badly_leaves_out_its_case_alone(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def in_a_process(case: compare_diffusers.Case, side: str) -> dict:
        if case.row == "unet":
            raise RuntimeError("exit status -9")
        return {"seconds": 1.0, "memory_mb": 100.0}

    monkeypatch.setattr(compare_diffusers, "in_a_process", in_a_process)
    monkeypatch.setattr(compare_diffusers, "RESULTS", tmp_path / "results.json")
    argv = ["compare", "--models", "tiny", "--dtypes", "float32", "--rounds", "1", "--apart", "--rows", "unet", "train"]
    monkeypatch.setattr("sys.argv", argv)
    compare_diffusers.main()
    assert [result["row"] for result in measuring.kept(tmp_path / "results.json")] == ["train"]
    assert "unet, tiny, float32: left out (exit status -9)." in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [argument for argument in argv if argument != "--apart"])
    monkeypatch.setattr(compare_diffusers, "time_in_turn", in_a_process)
    with pytest.raises(RuntimeError, match="exit status -9"):  # in one process it may be anything, a mistake as well
        compare_diffusers.main()


@pytest.mark.parametrize(
    ("status", "stderr", "told"),
    [
        (1, "Traceback …\nMemoryError: too large\n", "MemoryError: too large"),
        (2, "", "exit status 2"),
        (-9, "UserWarning: of something else\n", "killed by signal 9, perhaps for lack of memory"),
    ],
)
def test_a_process_that_ends_badly_says_why(
    status: int, stderr: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], status, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match=f"^{told}$"):
        compare_diffusers.in_a_process(compare_diffusers.Case("unet", "tiny", "float32"), "ours")


@pytest.mark.parametrize(
    ("compiles", "clock", "seconds"),
    [
        (False, [0.9, 0.3, 5.0, 1.0, 2.0, 9.0], 3.5),  # the second warm-up of 0.3 s gives 4 turns, whose median it is
        (False, [9.0, 0.001, *range(21)], 10.0),  # at most 21 turns
        (False, [30.0, 2.0, 7.0], 7.0),
        (False, [31.0, 7.0], 7.0),  # a long one is its own warm-up
        (True, [31.0, 0.4, 1.0, 5.0, 9.0], 5.0),  # but the first one compiles
    ],
)
def test_a_turn_alone_is_warmed_up_and_a_median(
    compiles: bool, clock: list[float], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(clock)
    monkeypatch.setitem(compare_diffusers.WORK, "unet", lambda case, side: None)
    monkeypatch.setattr(compare_diffusers, "seconds", lambda work, device: next(left))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    case = compare_diffusers.Case("unet", "tiny", "float32", "cuda", compiles)
    assert compare_diffusers.alone("ours", case) == {"seconds": seconds, "memory_mb": 5.0}
    assert next(left, None) is None  # all turns were taken


def test_a_ratio_is_a_median_with_the_smallest_and_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ours": [2.0, 1.0, 1.0], "documented": [2.0, 6.0, 2.0], "tuned": [1.0, 1.0, 1.0]}
    monkeypatch.setattr(compare_diffusers, "time_in_turn", lambda case, rounds: times)
    monkeypatch.setattr(compare_diffusers, "peak_memory", lambda case, side: None)
    result = compare_diffusers.measure(compare_diffusers.Case("unet", "tiny", "float32"), 3)
    assert result["documented"] == {"median": 2.0, "least": 1.0, "most": 6.0}
    assert result["tuned"] == {"median": 1.0, "least": 0.5, "most": 1.0}


def test_turns_apart_have_a_table_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Else two rows of the same name would stand below each other."""
    ratio = {"median": 2.0, "least": 1.0, "most": 3.0}
    result = {"row": "unet", "model": "tiny", "dtype": "float32", "compile": False, "documented": ratio, "tuned": ratio}
    result |= {"memory_mb": dict.fromkeys(contestants.SIDES[:3], 100), "device_name": "x"}
    older, apart, other = result, result | {"apart": True}, result | {"apart": True, "device_name": "y"}
    (tmp_path / "results.json").write_text(json.dumps([apart, older, other]))
    monkeypatch.setattr(compare_diffusers, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("sys.argv", ["compare", "--table"])
    compare_diffusers.main()
    one, of_its_own = compare_diffusers.table([result]), "each turn in a process of its own:"
    assert capsys.readouterr().out == "\n".join(["x:", one, of_its_own, one, "y:", of_its_own, one]) + "\n"


def test_a_table_whose_reader_has_enough_ends_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        measuring.print_to_the_end("a table")


def test_processes_of_the_documented_side_have_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which importing this repository would change: see vae_model.py."""
    asked = []

    def run(command: list[str], env: dict, **_: object) -> subprocess.CompletedProcess:
        asked.append(env["THP_MEM_ALLOC_ENABLE"])
        return subprocess.CompletedProcess(command, 0, stdout="{}")

    monkeypatch.setattr(subprocess, "run", run)
    for side in contestants.SIDES:
        compare_diffusers.in_a_process(compare_diffusers.Case("unet", "tiny", "float32"), side)
    assert asked == ["1", "0", "1", "0"]


@pytest.mark.skipif(
    "[never]" in (LARGE_PAGES.read_text() if LARGE_PAGES.is_file() else "[never]"), reason="needs Linux's large pages"
)
def test_all_sides_in_one_process_have_large_pages() -> None:
    """Importing a part of diffusers makes tensors, and PyTorch looks at its switch only once: the package sets it."""
    code = "import benchmarks, torch; held = torch.ones(16_000_000);"
    code += "print(open('/proc/self/smaps_rollup').read().split('AnonHugePages:')[1].split()[0])"
    unset = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unset, capture_output=True, text=True)
    assert int(ended.stdout) > 32_000, ended.stderr  # KB of 64 MB


def test_results_are_kept_one_for_each_case_and_machine(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "results.json"
    monkeypatch.setattr(compare_diffusers, "RESULTS", file)
    monkeypatch.setattr(compare_diffusers, "peak_memory", lambda case, side: None)
    argv = ["compare", "--models", "tiny", "--rows", "vae_decode", "--dtypes", "float32", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", argv)
    compare_diffusers.main()
    (result,) = json.loads(file.read_text())
    file.write_text(json.dumps([result, result | {"device_name": "another"}]))
    compare_diffusers.main()
    assert [kept["device_name"] for kept in json.loads(file.read_text())] == ["another", result["device_name"]]
    assert "| vae_decode | tiny | float32 |" in capsys.readouterr().out


def test_each_way_of_measuring_has_its_result(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was kept before it said whether turns were apart was of one process."""
    file, measure = tmp_path / "results.json", compare_diffusers.measure
    monkeypatch.setattr(compare_diffusers, "RESULTS", file)
    turn = {"seconds": 1.0, "memory_mb": 100.0}
    monkeypatch.setattr(compare_diffusers, "in_a_process", lambda case, side: turn)
    monkeypatch.setattr(
        compare_diffusers, "measure", lambda case, rounds, apart: measure(case, rounds, True) | {"apart": apart}
    )
    names = ("dtype", "compile", "apart")
    ways = [("float32", False, False), ("float32", True, False), ("float32", False, True), ("bfloat16", False, False)]
    for _ in range(2):
        for dtype, compiled, apart in ways:
            argv = ["compare", "--models", "tiny", "--rows", "unet", "--rounds", "1", "--dtypes", dtype]
            monkeypatch.setattr("sys.argv", argv + ["--compile"] * compiled + ["--apart"] * apart)
            compare_diffusers.main()
        results = json.loads(file.read_text())
        assert [tuple(result[name] for name in names) for result in results] == ways
        del results[0]["apart"]
        file.write_text(json.dumps(results))


@pytest.mark.parametrize("script", [compare_diffusers, quickstart, scaling, tricks, what_breaks])
@pytest.mark.parametrize("content", ["[{", "<<<<<<< HEAD\n[]", "{}", "[1]", "[{}]"])
def test_a_damaged_file_of_results_is_told_before_anything_is_measured(
    script: object, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    monkeypatch.setattr(script, "RESULTS", file)
    monkeypatch.setattr("sys.argv", ["benchmark"])
    with pytest.raises(SystemExit):
        script.main()
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file} is ") and told.count("\n") == 1
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        (compare_diffusers, ["--rounds", "0"], "--rounds: must be 1 or more, not 0"),
        (compare_diffusers, ["--device", "tpu"], "--device: tpu is not available here; choose from auto, cpu"),
        (tricks, ["--rounds", "0"], "--rounds: must be 1 or more, not 0"),
        (scaling, ["--device", "tpu"], "--device: tpu is not available here; choose from auto, cpu"),
        (scaling, ["--values", "0"], "--values: must be 1 or more, not 0"),
        (scaling, ["--rows", "batch", "side", "--values", "4"], "must be multiples of 8"),
        (scaling, ["--rows", "steps", "--values", "30", "1", "5"], "must be 9 apart or more"),
    ],
)
def test_bad_options_are_one_sentence(
    script: object, options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *options])
    with pytest.raises(SystemExit):
        script.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert told in last and len(last) < 200


def test_without_diffusers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"tests/requirements\.txt"):
        importlib.reload(benchmarks)


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
    monkeypatch.setattr(torch._dynamo, "reset", lambda: calls.append("forget what was compiled"))
    monkeypatch.setattr(compare_diffusers, "peak_memory", lambda case, side: 100 * cost[side])
    result = compare_diffusers.measure(compare_diffusers.Case("unet", "tiny", "float32"), 3)
    assert calls[0] == "forget what was compiled"
    assert calls[7:] == "tuned documented ours documented tuned ours documented ours tuned".split()
    assert result["documented"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    last = compare_diffusers.table([result]).splitlines()[-1]
    assert last == "| unet | tiny | float32 | 2.00× (2.00…2.00) | 1.50× (1.50…1.50) |  | 100, 200, 150 |"


def test_the_profile_accounts_for_the_time_of_all_sides(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net's time is convolutions, products and attention, whoever wrote it."""
    case = compare_diffusers.Case("unet", "tiny", "float32")
    spent = compare_diffusers.profile(case, "documented")
    assert all(spent[kind] > 0 for kind in ("convolutions", "matrix products", "attention", "norms"))
    assert spent["optimizer"] == 0
    head, _, *rows, last = compare_diffusers.profile_table(case).splitlines()
    assert head == "| unet, tiny, float32 | ours | documented | tuned |"
    assert len(rows) == len(spent) and last.startswith("| together | 100% |")
    weight = torch.ones(100_000, requires_grad=True)
    weight.grad, optimizer = torch.ones(100_000), torch.optim.AdamW([weight])  # whose plain loop is elementwise
    monkeypatch.setitem(compare_diffusers.WORK, "train", lambda case, side: optimizer.step)
    step = compare_diffusers.profile(compare_diffusers.Case("train", "tiny", "float32"), "documented")
    assert step["optimizer"] == sum(step.values()) > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_profile_is_the_fastest_turn_by_what_operators_do_themselves(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a step of the optimizer calls is the optimizer's, whatever it is called."""
    pace = iter((5, 3, 1, 4, 2))

    class Profiler:
        def __init__(self, **_: object) -> None:
            self.pace = next(pace) * 1e6

        def __enter__(self) -> "Profiler":
            return self

        def __exit__(self, *_: object) -> None: ...

        def event(self, name: str, own: float, cpu_parent: SimpleNamespace | None = None) -> SimpleNamespace:
            times = {"self_cpu_time_total": 99, "self_device_time_total": 99, "cpu_time_total": 99}
            times[f"self_{'cpu' if device == 'cpu' else 'device'}_time_total"] = own * self.pace
            return SimpleNamespace(name=name, cpu_parent=cpu_parent, **times)

        def events(self) -> list[SimpleNamespace]:
            step = self.event("Optimizer.step#AdamW.step", 1)
            root = self.event("aten::sqrt", 2, step)
            others = {"aten::mkldnn_convolution": 8, "aten::addmm": 16, "aten::_softmax": 32, "aten::normal_": 64}
            others |= {"aten::native_group_norm": 128, "aten::_foreach_mul_": 256}
            return [step, root, self.event("aten::linear", 4, root), *(self.event(*each) for each in others.items())]

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setitem(compare_diffusers.WORK, "train", lambda case, side: lambda: None)
    spent = compare_diffusers.profile(compare_diffusers.Case("train", "tiny", "float32", device), "ours")
    expected = {"convolutions": 8, "matrix products": 16, "attention": 32, "norms": 128, "optimizer": 7}
    assert spent == expected | {"the rest": 64 + 256}


def test_each_line_of_the_tricks_has_one_more_and_all_give_the_same(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layers.PIXELS_FROM", 16)
    monkeypatch.setattr("layers.CHANNELS_FROM", 1)
    monkeypatch.setattr("layers.WORK_FROM", 1)
    monkeypatch.setattr("sampling.packed.LINEAR_FROM", 1)
    by_winograd, contexts, networks, convolve = [], [], [], layers.convolve
    monkeypatch.setattr("layers.convolve", lambda *args: by_winograd.append(1) or convolve(*args))

    def build(case: contestants.Case, side: str) -> contestants.Side:
        built = contestants.build(case, side)
        networks.append(built.unet)
        built.unet.register_forward_pre_hook(lambda _, args: contexts.append(type(args[2])))
        return built

    monkeypatch.setattr(tricks, "build", build)
    turn, seen = tricks.unet(contestants.Case("unet", "tiny", "float32")), []
    (unet,) = networks
    for count in range(6):
        with turn(tricks.TRICKS["unet"][:count]) as work:
            out, used = work(), by_winograd != []
            kinds = {type(layer) for layer in unet.modules()}
            seen.append((contexts[-1] is dict, PackedConv2d in kinds, PackedLinear in kinds, used, out))
        by_winograd.clear()
        last = unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert last == (count > 0) and not any(isinstance(layer, Packed) for layer in unet.modules())
    assert [flags for *flags, _ in seen] == [[i < count for i in range(1, 5)] for count in range(6)]
    for *_, out in seen:
        torch.testing.assert_close(out, seen[0][-1], rtol=0, atol=1e-5)


def test_halves_of_a_vae_and_checkpointing_are_timed_with_and_without(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layers.PIXELS_FROM", 16)
    monkeypatch.setattr("layers.CHANNELS_FROM", 1)
    monkeypatch.setattr("layers.WORK_FROM", 1)
    by_winograd, again, convolve = [], [], layers.convolve
    monkeypatch.setattr("layers.convolve", lambda *args: by_winograd.append(1) or convolve(*args))
    monkeypatch.setattr("diffusion_model.checkpoint", lambda module, *args, **_: again.append(1) or module(*args))
    for row, called in (("vae_encode", by_winograd), ("vae_decode", by_winograd), ("train", again)):
        turn = tricks.WORK[row](contestants.Case(row, "tiny", "float32"))
        for names in ((), tricks.tricks_of(contestants.Case(row, "tiny", "float32"))):
            called.clear()
            with turn(names) as work:
                work()
            assert bool(called) == bool(names), row


@pytest.mark.parametrize("row", ["unet", "vae_encode", "vae_decode"])
def test_attention_in_blocks_is_the_last_trick_and_only_in_bfloat16(
    row: str, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layers.QUERIES_FROM", 1)
    monkeypatch.setattr("layers.PRODUCTS_FROM", 1)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)
    in_blocks, attend = [], layers.attend_in_blocks
    monkeypatch.setattr("layers.attend_in_blocks", lambda *args: in_blocks.append(1) or attend(*args))
    case = contestants.Case(row, "tiny", "bfloat16")
    names = tricks.tricks_of(case)
    assert tricks.BLOCKS not in tricks.tricks_of(contestants.Case(row, "tiny", "float32"))
    turn = tricks.WORK[row](case)
    for some in (names[:-1], names):
        with turn(some) as work:
            work()
        assert bool(in_blocks) == (some == names)


def test_tricks_are_measured_in_turn_and_shown(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tricks, "RESULTS", tmp_path / "tricks.json")
    took = iter([4.0, 2.0, 6.0, 2.0] * 2)  # without, with; without, with; the same in bfloat16
    done = []
    monkeypatch.setattr(tricks, "seconds", lambda work, device: done.append(work()) or next(took))
    monkeypatch.setattr("sys.argv", ["tricks", "--models", "tiny", "--rows", "vae_encode", "--rounds", "2"])
    tricks.main()
    assert len(done) == 8  # in bfloat16 an encoder has another trick
    line = "| vae_encode | large 3×3 convolutions in half the multiplications | 2.50 (2.00…3.00) |"
    other = "| vae_encode | attention in blocks |  | 2.50 (2.00…3.00) |"
    assert capsys.readouterr().out.count(line) == 2
    monkeypatch.setattr("sys.argv", ["tricks", "--table"])
    tricks.main()
    shown = capsys.readouterr().out
    assert line in shown and other in shown


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_scaling_and_the_rate_it_is_held_against_have_the_precision_of_training(
    low: torch.dtype, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(scaling, "resolve_precision", lambda name, device: low)
    monkeypatch.setattr(scaling, "matrix_rate", lambda device, dtype: asked.append(dtype) or 1e9)
    monkeypatch.setattr(scaling, "row", lambda *_: [])
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("sys.argv", ["scaling", "--rows", "batch"])
    scaling.main()
    assert asked == [low]
    assert scaling.training("tiny", torch.device("cpu"), tmp_path, images=5, batch=2, side=64).precision == low


def test_our_training_is_laid_out_and_scaled_as_the_script_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, batches = tiny_unet().eval().to(memory_format=torch.channels_last), []
    monkeypatch.setattr(contestants, "train_step", lambda *args: batches.append(args[2]))
    moments = torch.cat([torch.ones(4, 1, 4, 8, 8), torch.full((4, 1, 4, 8, 8), -60.0)], dim=2)  # no variance
    contexts = torch.randn(5, 77, unet.config.context_dim)
    trainer = contestants.Training(unet, moments, contexts, 4, torch.float32)
    trainer.step()
    torch.testing.assert_close(batches[0].latents, torch.full((4, 4, 8, 8), VAEConfig().scaling_factor))
    assert trainer.unet.training and trainer.unet.conv_in.weight.is_contiguous()


def test_scaling_measures_every_value_of_a_row(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ROWS", {"images": [5, 9], "batch": [2, 4], "side": [64, 128], "steps": [1, 3]})
    monkeypatch.setattr(scaling, "ROUNDS", 2)
    cpu = torch.device("cpu")
    for name, values in scaling.ROWS.items():
        measured = scaling.row(name, "tiny", cpu, tmp_path)
        assert [result["value"] for result in measured] == values
        assert all(len(result["seconds"]) == 2 and min(result["seconds"]) > 0 for result in measured)
        work = [result["operations"] for result in measured]
        assert {"batch": 1.99, "side": 2.5}.get(name, 0.99) * work[0] < work[1] < 5 * work[0]
    held = iter((100.0, 130.0, 200.0, 250.0))
    monkeypatch.setattr(scaling, "memory", lambda _: next(held))
    assert [result["memory_mb"] for result in scaling.row("batch", "tiny", cpu, tmp_path)] == [30, 50]
    assert scaling.matrix_rate(cpu, torch.float32) > 1e8
    monkeypatch.setattr(scaling, "seconds", lambda work, device: 2.0)
    assert scaling.matrix_rate(cpu, torch.float32) == 2048**3  # products and as many sums, in two seconds


def test_steps_are_timed_at_the_steps_asked_for(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ROUNDS", 2)
    values = scaling.values_of("steps", [9, 1, 5, 5])
    trainer = scaling.training("tiny", torch.device("cpu"), tmp_path, images=5, batch=2, side=64)
    ends = [(found["value"], trainer.steps) for found in scaling.along_a_run(trainer, torch.device("cpu"), values)]
    assert ends == [(1, 3), (5, 7), (9, 11)]


def test_a_value_alone_leaves_the_rest_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a whole row replaces all that was measured of it, in whatever order its values are named."""
    calls = []

    def row(name: str, model: str, device: torch.device, folder: Path, values: list[int]) -> list[dict]:
        calls.append(values)
        return [{"value": value, "seconds": [float(len(calls))], "memory_mb": 1.0} for value in values]

    monkeypatch.setattr(scaling, "row", row)
    monkeypatch.setattr(scaling, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "results.json")
    monkeypatch.setitem(scaling.ROWS, "batch", [2, 4, 8])
    for options in ([], ["--values", "4", "4", "3"], []):
        monkeypatch.setattr("sys.argv", ["scaling", "--rows", "batch", "batch", *options])
        scaling.main()
        kept = sorted((found["value"], found["seconds"][0]) for found in measuring.kept(scaling.RESULTS))
        if len(calls) == 2:
            assert kept == [(2, 1.0), (3, 2.0), (4, 2.0), (8, 1.0)]
            lines = scaling.table(measuring.kept(scaling.RESULTS)).splitlines()[2:]
            assert [line.split(" | ")[1] for line in lines] == ["2", "3", "4", "8"]
    assert calls == [[2, 4, 8], [3, 4], [2, 4, 8]] and kept == [(2, 3.0), (4, 3.0), (8, 3.0)]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_mapped_files_are_no_memory_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(bytes(200_000_000))
    before = scaling.memory(torch.device("cpu"))
    assert np.memmap(file, mode="r").sum() == 0
    assert scaling.memory(torch.device("cpu")) < before + 100


def test_scaling_encodes_into_an_empty_cache(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling.ROWS, "encoding", [3, 5])
    monkeypatch.setattr(scaling, "seconds", lambda work, device: 15.0 + bool(work()))
    measured = scaling.row("encoding", "tiny", torch.device("cpu"), tmp_path)
    assert [(result["value"], len(result["seconds"])) for result in measured] == [(3, 1), (5, 1)]
    assert [result["seconds"] for result in measured] == [[16 / 3], [16 / 5]]
    for result in measured:
        files = (tmp_path / str(result["value"]) / "stable_diffusion" / "images").rglob("*")
        assert sum(file.stat().st_size for file in files) >= result["value"] * 2 * 8 * 8 * 8 * 2


def test_the_table_of_scaling_is_relative_to_the_first_value() -> None:
    same = {"row": "images", "rate": 1e9, "operations": 5e8}
    results = [same | {"value": 500, "seconds": [1.0, 1.0, 9.0], "memory_mb": 4.2}]
    results += [same | {"value": 20_000, "seconds": [1.1], "memory_mb": 6.0}]
    results += [{"row": "encoding", "rate": 1e9, "value": 125, "seconds": [0.1], "memory_mb": 3.0}]
    assert scaling.table(results).splitlines()[2:] == [
        "| images | 500 | 1.00× | +4 | 50% |",
        "| images | 20,000 | 1.10× | +6 | 45% |",
        "| encoding | 125 | 1.00× | +3 |  |",
    ]


def test_results_of_other_machines_are_kept(tmp_path: Path) -> None:
    file, same = tmp_path / "results.json", ("row", "device_name")
    results = [{"row": row, "device_name": name, "value": 1} for row in ("a", "b") for name in ("x", "y")]
    assert measuring.keep(file, results, same) == results == measuring.kept(file)
    new = results[1] | {"value": 2}
    assert measuring.keep(file, [new], same) == [results[0], *results[2:], new] == measuring.kept(file)


# ----------------------------------------------------------------------------------------------------------------------
# What breaks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in what_breaks.ROWS if what_breaks.ROWS[row].fault is not nullcontext])
def test_every_fault_changes_something_and_is_gone_afterwards(row: str) -> None:
    """What a fault is put into differs while it is in, and is the same object before and after."""
    places = [
        (VAE, "scale_latents"), (VAE, "unscale_latents"), (NoiseSchedule, "add_noise"), (Guidance, "combine"),
        (StableDiffusion, "_start"), (captioned_latents, "pixels_of"), (stable_diffusion_model, "timestep_grid"),
    ]  # fmt: skip
    before = [getattr(*place) for place in places]
    with what_breaks.ROWS[row].fault():
        changed = [old is not getattr(*place) for old, place in zip(before, places, strict=True)]
    assert 1 <= sum(changed) <= 2
    assert all(old is getattr(*place) for old, place in zip(before, places, strict=True))


def test_faults_do_what_they_say() -> None:
    rows, schedule, x = what_breaks.ROWS, NoiseSchedule(), torch.randn(2, 4, 8, 8)
    t, noise = torch.tensor([0, 999]), torch.randn(2, 4, 8, 8)
    with rows["α for ᾱ"].fault():
        wrong = schedule.add_noise(x, noise, t)
    right = schedule.add_noise(x, noise, t)
    torch.testing.assert_close(wrong[0], right[0])  # the first step is right
    assert (wrong[1] - x[1]).std() < 0.2 < 0.9 < (right[1] - x[1]).std()
    with rows["DDIM that goes from t to t-1"].fault():
        grid = stable_diffusion_model.timestep_grid("ddim", schedule, 15)
    assert grid.next_levels[3] == pytest.approx(schedule.alphas_cumprod[int(grid.timesteps[3]) - 1].item())
    with rows["the halves of guidance swapped"].fault():
        torch.testing.assert_close(Guidance(scale=1.0).combine(x, noise), x)
    vae = tiny_vae()
    assert not torch.equal(vae.unscale_latents(x), x)
    with rows["latents not unscaled"].fault():
        assert torch.equal(vae.unscale_latents(x), x)
    with rows["no scaling factor"].fault():
        assert torch.equal(vae.scale_latents(x), x) and torch.equal(vae.unscale_latents(x), x)
    image = monsters.draw(3, 96)
    assert monsters.is_monster_on_white(image)
    assert what_breaks.on_black(image.copy()).getpixel((1, 1)) == (0, 0, 0)

    def width(of: Image.Image) -> int:
        left, _, right, _ = ImageOps.invert(of).convert("L").point(lambda value: 255 * (value > 60)).getbbox()
        return right - left

    assert 0.5 < width(what_breaks.squashed(image)) / width(image) < 0.62


@pytest.mark.parametrize("row", ["no fault", "no caption dropout", "unweighted loss"])
def test_the_gallery_is_trained_with_the_options_of_its_row(
    row: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []
    monkeypatch.setattr(what_breaks.train_stable_diffusion, "main", ran.append)
    what_breaks.train(row, tmp_path)
    (argv,) = ran
    options = what_breaks.ROWS[row].options
    assert argv[:2] == ["--preset", "monsters"] and str(tmp_path) in argv
    assert argv[len(argv) - len(options) :] == [*options]
    assert bool(options) == (row != "no fault")


def test_a_model_that_cannot_be_read_ends_the_gallery_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The row's process says why, the one that started it that the row is missing."""
    (tmp_path / "no fault" / "model").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["what_breaks", "--one", "guidance of 16", str(tmp_path / "no fault")])
    with pytest.raises(SystemExit, match=r"error: .*no fault/model.* is missing"):
        what_breaks.main()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # fails at once
    monkeypatch.setattr(what_breaks, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(what_breaks, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr("sys.argv", ["what_breaks", "--rows", "guidance of 16", "--keep", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        what_breaks.main()
    assert ended.value.code == 1
    assert (
        capsys.readouterr().err == "'guidance of 16' was not measured; the rows before it are kept in results.json.\n"
    )


def test_the_gallery_is_sampled_with_the_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_model().save_pretrained(tmp_path / "no fault" / "model")
    monkeypatch.setattr(what_breaks, "UNSEEN", 2)
    monkeypatch.setattr(what_breaks, "HOW", what_breaks.HOW | {"steps": 2, "height": 64, "width": 64})
    monkeypatch.setattr(what_breaks, "FOLDER", tmp_path / "sheets")
    sheets, judged, seeds, measured, sample = [], [], [], what_breaks.measure_monsters, StableDiffusion.sample
    monkeypatch.setattr(what_breaks, "SHOWN", 1)
    monkeypatch.setattr(StableDiffusion, "sample", lambda *a, **k: seeds.append(k["seeds"]) or sample(*a, **k))
    monkeypatch.setattr(what_breaks, "measure_monsters", lambda *a: judged.append(a[1]) or measured(*a))
    for row in ("latents not unscaled", "DDIM as it should be"):
        figures = what_breaks.measure(row, tmp_path / "no fault")
        assert figures["row"] == row and figures["images"] == 2 and figures["validation_loss"] is None
        sheets.append((tmp_path / "sheets" / what_breaks.file_of(row)).read_bytes())
    assert sheets[0] != sheets[1]
    assert seeds == [0, 1] * 2  # no noise twice
    assert judged == [unseen_monsters(2)] * 2 and judged[0][0].index >= FIRST_UNSEEN
    page = what_breaks.page([figures])
    assert f"| [{row}](#ddim-as-it-should-be) | " in page and f"(sheets/{what_breaks.file_of(row)})" in page
