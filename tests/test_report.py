"""The script `evaluate_stable_diffusion.py`: what it refuses, what each figure is of, what it keeps, what it says."""

import copy
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate_stable_diffusion as script
import lora
import monsters
from evaluation import copying
from evaluation.report import in_words
from evaluation.statistics import below_by_chance
from images import read_parameters, to_pixels
from noise_schedule import NoiseSchedule
from published.lora_files import write_lora
from stable_diffusion_model import StableDiffusion
from tests.conftest import ROOT
from tests.tiny import tiny_model
from training import run_folder
from training.script import UserError

SHIPPED = json.loads((ROOT / "stable_diffusion_results" / "monsters" / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and twelve captioned images, the i-th of them grey of the level 20 i."""
    folder = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for i in range(12):
        grey(i).save(folder / "images" / f"{i:02d}.png")
        (folder / "images" / f"{i:02d}.txt").write_text(f"number {i}")
    return folder


def grey(i: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (20 * i,) * 3)


def arguments(folder: Path, dataset: str = "monsters:4", *more: str) -> list[str]:
    how = ["--num_samples", "6", "--resolution", "64", "--steps", "1", "--device", "cpu", "--precision", "float32"]
    return [str(folder / "model"), "--dataset", dataset, *how, "--output_dir", str(folder / "report"), *more]


def never(*_: object, **__: object) -> None:
    raise AssertionError("it was to stop before that")


# ----------------------------------------------------------------------------------------------------------------------
# Refused before anything is sampled
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resolution", "8"], "--resolution 8: monsters are drawn at 16"),
        (["--seed", str(2**63 - 1)], "--seed 9223372036854775807: must be at most"),
        (["--caption", "a monster"], "--dataset monsters:4: .*--caption are for folders"),
        (["--output_dir", __file__], "--output_dir .*: cannot be made .*choose another folder"),
    ],
)
def test_options_are_refused_in_a_sentence(
    folder: Path, more: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "sample_all", never)
    with pytest.raises(UserError, match=said):
        script.main(arguments(folder, "monsters:4", *more))


@pytest.mark.parametrize(
    ("config", "sampler"), [({"thresholding": True}, "ddim"), ({"solver_order": 3}, "dpm++2m"), ({"T": 10}, "ddim")]
)
def test_a_scheduler_that_the_sampler_does_not_know_is_refused_before_images_are_read(
    folder: Path, config: dict, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    if "T" in config:
        model.schedule = NoiseSchedule(num_timesteps=config["T"])
    model.scheduler_config |= config
    monkeypatch.setattr(StableDiffusion, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(script, "TrainingImages", never)
    with pytest.raises(UserError, match=r"thresholding|solver_order|steps is 15"):
        script.main(arguments(folder, "monsters:4", "--sampler", sampler, "--steps", "15"))


def test_a_broken_image_is_said_before_sampling_or_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(12):
        grey(i).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "11.png").write_bytes(b"no image")
    monkeypatch.setattr(script, "sample_all", never)
    with pytest.raises(UserError, match=r"1 of 12 images cannot be used: .*11\.png"):
        script.main(arguments(folder, str(tmp_path), "--caption", "a grey"))
    options = script.Options(dataset=str(tmp_path), caption="a grey", on_bad_image="skip")
    with pytest.warns(UserWarning, match="They are left out"):
        found = script.TrainingImages(options)
    assert len(found) == 11 and found.captions() == ["a grey"] * 11
    assert found.pixels([10], 8)[0, 0, 0, 0].item() == pytest.approx(200 / 127.5 - 1)


def test_images_of_others_are_not_overwritten(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set may keep its own in a folder of that name."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        grey(i).save(tmp_path / "images" / f"{i:04d}.png")
    before = [path.read_bytes() for path in sorted(tmp_path.glob("**/*.png"))]
    monkeypatch.setattr(script, "sample_all", never)
    for more in ((), ("--reuse",)):
        with pytest.raises(
            UserError, match=r"--output_dir .*0000\.png was not made by an evaluation, and is not overw"
        ):
            script.main(arguments(folder, "monsters:4", "--output_dir", str(tmp_path), *more))
    assert before == [path.read_bytes() for path in sorted(tmp_path.glob("**/*.png"))]


@pytest.mark.parametrize("name", ["images", "report.json", "nearest.png", "images/0001.png"])
def test_what_stands_in_the_way_is_said_before_sampling(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "sample_all", never)
    if name == "images":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"--output_dir .*{name} is a (file|folder), not a "):
        script.main(arguments(folder, "monsters:4", "--output_dir", str(tmp_path)))
    assert (tmp_path / name).exists()


def test_a_checkpoint_of_a_lora_is_no_whole_model(folder: Path, tmp_path: Path) -> None:
    model = StableDiffusion.from_pretrained(folder / "model", device="cpu")
    lora.add(model.unet, lora.targets(model.unet), rank=2, alpha=2)
    trained = {name: tensor for name, tensor in model.unet.state_dict().items() if ".down." in name or ".up." in name}
    torch.save({"unet": trained}, tmp_path / "step_00000001.pt")
    with pytest.raises(UserError, match=r"--checkpoint .* is of a LoRA run, .*pass the run's lora folder with --lora"):
        script.main(arguments(folder, "monsters:4", "--checkpoint", str(tmp_path / "step_00000001.pt")))


# ----------------------------------------------------------------------------------------------------------------------
# Each figure is of the images that it names
# ----------------------------------------------------------------------------------------------------------------------


def test_each_measure_is_given_what_it_is_named_after(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple] = {}

    def remember(name: str, result: object) -> None:
        monkeypatch.setattr(script, name, lambda *given: seen.setdefault(name, given) and result)

    errors = {name: SHIPPED["prediction_error"][name] for name in SHIPPED["prediction_error"]}
    remember("measure_prediction", errors)
    remember("measure_each", {"psnr": [30.0, 31.0], "ssim": [0.8, 0.9]})
    remember("measure_quality", SHIPPED["against_real_images"])
    remember("measure_obedience", {})
    made = [grey(0)] * 6
    monkeypatch.setattr(script, "NOISED", 3)
    monkeypatch.setattr(script, "ENCODED", 4)
    monkeypatch.setattr(script, "sample_all", lambda *_: made)
    report = tmp_path / "report"
    report.mkdir()
    (report / "attention.png").write_bytes(b"of an earlier evaluation")
    script.main(arguments(folder, str(folder / "images"), "--output_dir", str(report), "--resolution", "32"))
    _, noised, prompts = seen["measure_prediction"]
    levels = [round((level + 1) * 127.5 / 20) for level in noised[:, 0, 0, 0].tolist()]
    assert prompts == [f"number {i}" for i in levels] == ["number 0", "number 4", "number 8"]
    _, of_vae = seen["measure_each"]
    assert of_vae.shape[1:] == (3, 32, 32)  # the size of the samples, not that at which images are compared
    assert [level // 20 for level in of_vae[:, 0, 0, 0].tolist()] == [0, 3, 6, 9]
    assert seen["measure_quality"][0] is made
    for images, numbers in zip(seen["measure_quality"][1:3], (range(0, 12, 2), range(1, 12, 2)), strict=True):
        assert [image.getpixel((0, 0))[0] // 20 for image in images] == [*numbers]
    assert sorted(path.name for path in report.iterdir()) == ["nearest.png", "report.json", "report.md", "samples.png"]
    text = (report / "report.md").read_text(encoding="utf-8")
    assert (
        "Noise was added to 3 training images" in text
        and " 30.5 dB PSNR (30.0…31.0), 0.850 SSIM (0.800…0.900)." in text
    )


def test_controls_are_spread_over_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the real images of the prompts are: the first images of a sorted folder may be all alike."""
    seen = []
    monkeypatch.setattr(script, "sample_all", lambda *_: [grey(0)] * 4)
    monkeypatch.setattr(script, "measure_quality", lambda *given: seen.extend(given) or 1 / 0)
    more = ("--num_samples", "4", "--output_dir", str(tmp_path), "--resolution", "8")
    with pytest.raises(ZeroDivisionError):
        script.main(arguments(folder, str(folder / "images"), *more))
    real, other = ([image.getpixel((0, 0))[0] // 20 for image in images] for images in seen[1:3])
    assert (real, other) == ([0, 3, 6, 9], [1, 4, 7, 10])


def test_quality_is_of_the_samples_and_noise_is_its_control() -> None:
    """Samples that are all like one real image: each is right, and most real images have none like them."""
    judge = SimpleNamespace(image_features=lambda images: torch.stack([to_pixels(i, 8).flatten() for i in images]))
    real = [monsters.draw(i, 64) for i in range(12)]
    found = script.measure_quality([real[3]] * 12, real, [], judge)
    assert found["precision"] == 1 and found["recall"] < 0.2 and list(found["controls"]) == ["noise"]
    assert found["controls"]["noise"]["kid"] > 0.1
    found = script.measure_quality(real, real, [monsters.draw(i, 64) for i in range(50, 62)], judge)
    assert found["low"] < 0 < found["high"] and abs(found["kid"]) < found["controls"]["noise"]["kid"] / 10
    assert list(found["controls"]) == ["other_real_images", "noise"]


def test_copies_stand_first_beside_their_originals_turned_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [monsters.draw(i, 64) for i in range(30)]
    flipped = known[12].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    made = [monsters.draw(900_000 + i, 64) for i in range(20)]
    made[17], made[4] = known[7], flipped
    found = copying.nearest(copying.thumbnails(made), copying.thumbnails(known))
    monkeypatch.setattr(copying, "captioned_sheet", lambda images, captions, **_: (images, captions))
    images, captions = copying.sheet_of_nearest(
        made,
        [f"prompt {i}" for i in range(20)],
        lambda indices, _: torch.stack([to_pixels(known[i], 64) for i in indices]),
        found,
        {"distance": 0.3, "calibrated": 0.8},
    )
    assert len(images) == 32 and sorted(captions[:4:2]) == ["prompt 17", "prompt 4"]
    for sample, twin in zip(images[:4:2], images[1:4:2], strict=True):
        assert sample.tobytes() == twin.tobytes()
    for sample, twin in zip(
        images[4::2], images[5::2], strict=True
    ):  # the others, too, in the direction that is nearer
        i = next(i for i, image in enumerate(made) if image is sample)
        assert (to_pixels(sample, 64) - to_pixels(twin, 64)).square().mean().sqrt() == pytest.approx(
            found.distance[i].item(), abs=1e-3
        )


def test_a_copy_of_an_image_that_stands_many_times_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as near to sixty others, so that only its distance as it is tells."""
    once = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.cat([once[:80], once[:1].expand(60, -1, -1, -1)])
    others, copied = copying.nearest(once[80:90], known), once[:1] + 0.01
    report = copying.measure_copying(copying.nearest(copied, known), others)
    assert report["share_of_copies_by_calibrated"] == 0
    assert report["share_of_copies_by_either"] == report["share_of_copies_by_distance"] == 1
    assert report["share_by_chance"] == below_by_chance(10)
    found = copying.nearest(torch.cat([once[90:], copied]), known)
    monkeypatch.setattr(copying, "captioned_sheet", lambda _, captions, **__: captions)
    prompts = ["other"] * 10 + ["copy"]
    captions = copying.sheet_of_nearest(
        [grey(0)] * 11, prompts, lambda indices, _: known[indices], found, copying.limits_of(others)
    )
    assert captions[0] == "copy" and captions[1].startswith("nearest: distance 0.010, calibrated 1.00")


def test_images_that_are_all_equal_are_no_copies_of_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to tell a copy by, and the report says so."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        grey(3).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.setattr(script, "sample_all", lambda *_: [grey(3), grey(5)])
    more = ("--caption", "a grey", "--output_dir", str(tmp_path / "report"), "--resolution", "32")
    script.main(arguments(folder, str(tmp_path / "images"), *more))
    found = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["copying"]
    assert found["samples"]["distance"]["smallest"] == pytest.approx(0, abs=1e-3) and found["limits"] == {}
    assert found["images_that_are_no_copies"]["distance"] == {"mean": None, "smallest": None}
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| distance | "))
    assert row.endswith(" | n.a. | n.a. |") and (tmp_path / "report" / "nearest.png").is_file()


def test_what_does_not_count_is_no_part_of_the_crowd() -> None:
    """Of four images, three of them equal: the first has one other, whose distance is all that calibrates it."""
    known = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = (known + known.flip(-1)) / 2  # symmetrical: the mirror is as near
    known[1:3] = known[0]
    found = copying.nearest(known, known, but=torch.arange(4))
    assert found.distance.isfinite().all() and found.calibrated.tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("size", [2, 10])
def test_a_small_set_is_calibrated_by_as_many_as_it_has_others(size: int) -> None:
    known, query = torch.randn(size, 3, 4, 4), torch.randn(1, 3, 4, 4)
    distances = [(query[0] - image).square().mean().sqrt() for one in known for image in (one, one.flip(-1))]
    rising = torch.stack(distances).sort().values
    calibrated = copying.nearest(query, known).calibrated[0].item()
    assert calibrated == pytest.approx((rising[0] / rising[: size - 1].mean()).item(), rel=1e-3)


def test_one_in_a_hundred_images_that_are_no_copies_is_below_the_limit() -> None:
    values = torch.arange(101.0)
    limits = copying.limits_of(copying.Nearest(values, values, values, values / 100))
    assert limits == pytest.approx({"distance": 1.0, "calibrated": 0.01})


def test_the_attention_that_is_drawn_is_that_of_the_sharpest_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    other = {"by_layer": {"first": 1.0, "second": 1.0}}
    parts = {"wings": {"by_layer": {"first": 1.0, "second": 3.0}, "other_words": other}}
    for name, result in (("measure_obedience", {}), ("measure_quality", {}), ("measure_prediction", {})):
        monkeypatch.setattr(script, name, lambda *_, result=result: result)
    monkeypatch.setattr(script, "sample_all", lambda *_: [grey(0)] * 6)
    monkeypatch.setattr(script, "score_parts", lambda *_: parts)
    monkeypatch.setattr(script, "attention_sheet", lambda *given: drawn.append(given[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(arguments(folder))
    assert drawn == ["second"]


def test_distances_are_calibrated_by_the_fifty_nearest() -> None:
    known, query = torch.randn(70, 3, 4, 4), torch.randn(1, 3, 4, 4)
    distances = [(query[0] - image).square().mean().sqrt() for one in known for image in (one, one.flip(-1))]
    rising = torch.stack(distances).sort().values
    found = copying.nearest(query, known)
    assert found.calibrated[0].item() == pytest.approx((rising[0] / rising[:50].mean()).item(), rel=1e-3)


def test_how_many_are_called_copies_by_chance() -> None:
    """Of new values of the same distribution, on average over many limits."""
    generator = torch.Generator().manual_seed(0)
    for count in (8, 64):
        limits = torch.rand(20_000, count, generator=generator).quantile(0.01, dim=1)  # of which that share is below
        assert limits.mean().item() == pytest.approx(below_by_chance(count), rel=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# What is kept
# ----------------------------------------------------------------------------------------------------------------------


def test_images_of_other_weights_and_broken_ones_are_made_anew(tmp_path: Path) -> None:
    options = script.Options(output_dir=str(tmp_path), reuse=True, steps=1, resolution=64, batch_size=1)
    model, prompts, calls = tiny_model(), ["a fox", "a bird", "a cat"], []
    sample = model.sample
    model.sample = lambda *args, **how: calls.append(args[0][0]) or sample(*args, **how)
    first = script.sample_all(model, prompts, options)
    assert calls == prompts
    broken = tmp_path / "images" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "images" / "0002.png").write_bytes(b"")
    assert [i.tobytes() for i in script.sample_all(model, prompts, options)] == [i.tobytes() for i in first]
    assert calls[3:] == prompts[1:]
    model.unet.conv_out.weight.data += 1
    again = script.sample_all(model, prompts, options)
    assert calls[5:] == prompts and again[0].tobytes() != first[0].tobytes()
    assert len(script.sample_all(model, prompts[:1], options)) == 1 and len([*broken.parent.iterdir()]) == 3
    options.reuse = False
    script.sample_all(model, prompts[:1], options)
    assert [path.name for path in broken.parent.iterdir()] == ["0000.png"]  # none of an evaluation of more


@pytest.mark.parametrize(
    "change", [{"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}, {"_latents_mean": [0.5] * 4}]
)
def test_images_of_another_schedule_are_made_anew(tmp_path: Path, change: dict) -> None:
    options = script.Options(output_dir=str(tmp_path), reuse=True, steps=1, resolution=64)
    model, calls = tiny_model(), []
    sample = model.sample
    model.sample = lambda *args, **how: calls.append(args[0]) or sample(*args, **how)
    script.sample_all(model, ["a fox"], options)
    script.sample_all(model, ["a fox"], options)
    if "prediction_type" in change:
        model.schedule = NoiseSchedule(**change)
    else:
        model.scheduler_config |= change
    script.sample_all(model, ["a fox"], options)
    assert len(calls) == 2


def test_seeds_count_on_from_batch_to_batch(tmp_path: Path) -> None:
    options = script.Options(output_dir=str(tmp_path), steps=1, resolution=64, seed=7, batch_size=2)
    script.sample_all(tiny_model(), ["a", "b", "c"], options)
    assert [read_parameters(path)["Seed"] for path in script.numbered(tmp_path / "images")] == ["7", "8", "9"]


def test_stopped_while_sampling_it_names_reuse(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model()
    model.sample = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        script.sample_all(model, ["a"], script.Options(output_dir=str(tmp_path)))
    assert "--reuse takes them" in capsys.readouterr().err


def test_a_checkpoint_is_read_before_loras_which_change_both_models(folder: Path, tmp_path: Path) -> None:
    model = StableDiffusion.from_pretrained(folder / "model", device="cpu")
    torch.save({"unet": model.unet.state_dict()}, tmp_path / "step_00000001.pt")
    changed = copy.deepcopy(model.unet)
    for change in lora.add(changed, lora.targets(changed), rank=2, alpha=2):
        torch.nn.init.normal_(change.up.weight)
    write_lora(tmp_path / "fox.safetensors", changed)
    seen = []

    def sample_all(averaged: StableDiffusion, *_: object) -> None:
        seen.append(averaged)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "sample_all", sample_all)
        with_raw_weights = script.with_raw_weights
        patch.setattr(script, "with_raw_weights", lambda *given: seen.append(with_raw_weights(*given)) or seen[0])
        more = ["--lora", str(tmp_path / "fox.safetensors"), "--checkpoint", str(tmp_path / "step_00000001.pt")]
        with pytest.raises(InterruptedError):
            script.main(arguments(folder, "monsters:4", *more))
    raw, averaged = seen
    assert raw.loras == averaged.loras == {"fox": 1.0} and raw.text_encoder is not averaged.text_encoder
    for a, b in zip(raw.unet.parameters(), averaged.unet.parameters(), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# In words
# ----------------------------------------------------------------------------------------------------------------------


def test_every_number_stands_in_its_own_row_beside_its_controls() -> None:
    report = copy.deepcopy(SHIPPED)
    found = report["against_real_images"]
    found |= {"precision": 0.5, "recall": 0.25, "coverage": 0.75}
    del found["controls"]  # as in an older report
    lines = in_words(report).splitlines()
    for name, share in (("precision", "50%"), ("recall", "25%"), ("coverage", "75%")):
        assert any(line.startswith(f"| {name} | {share} (") for line in lines)
    assert not any("noise" in line for line in lines)
    noise = found | {"kid": 0.02, "precision": 1.0, "recall": 0.0}
    found["controls"] = {"other_real_images": dict(found), "noise": noise}
    report["copying"] |= {"share_of_copies_by_either": 0.125, "share_by_chance": below_by_chance(64)}
    text = in_words(report)
    assert (
        "| precision | 50% (38%…62%) | 50% (38%…62%) | 100% (94%…100%) | samples that are like a real image |" in text
    )
    assert "| against real images, by the CLIP's features | samples | other real images | noise |  |" in text
    assert "Pure noise scores 90% and more in precision: here that says nothing" in text
    assert "| samples called copies (2.5% by chance) |" in text
    assert "| either, by chance up to twice as many |  |  | 12% (6%…23%) |" in text


def test_an_older_report_says_what_its_limits_are_worth() -> None:
    older = copy.deepcopy(SHIPPED)
    del older["copying"]["share_by_chance"]
    limits = "Limits that come from only 64 images are passed by 2.5% of others."
    assert limits in in_words(older) and limits not in in_words(SHIPPED)


def test_captions_that_are_all_the_same_are_not_judged() -> None:
    assert script.measure_obedience([], [], ["a fox"] * 4, [], None) == {}
    report = {name: value for name, value in SHIPPED.items() if name not in ("obedience", "attributes")}
    text = in_words(report)
    assert "All captions are the same" in text and "R-precision" not in text


def test_a_full_disk_names_reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "_flush", full)
    with pytest.raises(UserError, match=r"the disk is full.*--reuse, which takes what is done"):
        script.write(tmp_path / "report.md", "words")
    assert not list(tmp_path.iterdir())
