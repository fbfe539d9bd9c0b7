"""Evaluation: it must be able to say no."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist, fmean

import prdc
import pytest
import torch
from PIL import Image

import evaluate_stable_diffusion as script
import lora
import monsters
from evaluation import copying, obedience
from evaluation.attributes import CHOICES, score_attributes, variants
from evaluation.statistics import expanded, kid, mean_interval, precision_recall_coverage, share_interval
from evaluation.timestep_loss import by_tenths, intervals, prediction_errors, spread
from noise_schedule import NoiseSchedule
from published.lora_files import write_lora
from stable_diffusion_model import StableDiffusion
from tests.conftest import ROOT
from tests.tiny import tiny_model
from training.reproducible import resolve_precision
from training.script import UserError


@pytest.fixture(scope="module")
def judge() -> obedience.Judge:
    return obedience.Judge.load()


@pytest.fixture(scope="module")
def asked() -> list[obedience.Unseen]:
    return obedience.unseen_monsters(24)


def test_colours_counts_what_was_asked_for() -> None:
    """Drawn monsters obey their own colour and not another one; a blank sheet and a dark one obey nothing."""
    indices = [i for i in range(40) if monsters.roll(i).colour in ("red", "blue", "green")][:6]
    drawn = [monsters.draw(i, 128) for i in indices]
    colours = [monsters.roll(i).colour for i in indices]
    report = obedience.colours(drawn, colours)
    assert report == {"on_white": 1.0, "on_white_in_the_colour": 1.0, "wrong": []}
    others = ["yellow"] * 6
    report = obedience.colours(drawn, others)
    assert report["on_white"] == 1.0 and report["on_white_in_the_colour"] == 0.0 and len(report["wrong"]) == 6
    blank = [Image.new("RGB", (128, 128), colour) for colour in ("white", "black")]
    assert obedience.colours(blank, ["red", "black"])["on_white_in_the_colour"] == 0.0


def test_r_precision_knows_its_captions_from_others(judge: obedience.Judge, asked: list[obedience.Unseen]) -> None:
    """Real drawings are all but always found, whatever their size; in another order, none or next to none is."""
    captions = [monster.caption for monster in asked]
    for size in (128, 256):
        drawn = [monsters.draw(monster.index, size) for monster in asked]
        assert judge.r_precision(drawn, captions) >= 0.95
        assert judge.r_precision(drawn[1:] + drawn[:1], captions) <= 0.1
    blank = [Image.new("RGB", (128, 128), "white")] * len(asked)
    assert judge.r_precision(blank, captions) <= 1 / len(asked) + 1e-9  # one caption is the nearest of all of them
    assert judge.r_precision(drawn[:2], [captions[0]] * 2) == 1.0  # captions that are equal word for word


def test_pixels_reach_the_clip_as_its_preprocessor_would_bring_them(
    judge: obedience.Judge, asked: list[obedience.Unseen], tmp_path: Path
) -> None:
    """A published CLIP has another mean and std; its folder says which."""
    shutil.copytree(obedience.SHIPPED_CLIP, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    published = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    other = obedience.Judge.load(tmp_path / "clip")
    seen: list[torch.Tensor] = []
    for one in (judge, other):
        one.clip.vision_model.embeddings.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        one.r_precision([monsters.draw(asked[0].index, 128)], [asked[0].caption])
    torch.testing.assert_close(seen[1], ((seen[0] + 1) / 2 - other.mean) / other.std)


def test_the_controls_are_the_real_images_and_other_captions(
    judge: obedience.Judge, asked: list[obedience.Unseen]
) -> None:
    drawn = [monsters.draw(monster.index, 128) for monster in asked]
    report = obedience.measure_monsters(drawn, asked, judge)
    assert report["r_precision"] >= 0.95 and report["r_precision_of_real_images"] >= 0.95
    assert report["r_precision_of_shuffled_images"] <= 0.1 and report["on_white_in_the_colour"] == 1.0
    blank = [Image.new("RGB", (128, 128), "white")] * len(asked)
    report = obedience.measure_monsters(blank, asked, judge)
    assert report["r_precision"] < 0.1 and report["r_precision_of_real_images"] >= 0.95


def test_images_are_judged_in_the_order_of_their_captions(tmp_path: Path) -> None:
    """What is asked for in parts is put together in order, each part with seeds of its own."""
    calls = []

    def draw_them(prompts: list[str], seed: int) -> list[Image.Image]:
        calls.append((len(prompts), seed))
        index = {monster.caption: monster.index for monster in obedience.unseen_monsters(10)}
        return [monsters.draw(index[prompt], 128) for prompt in prompts]

    sentence = obedience.judge_monsters(draw_them, 10, tmp_path)
    assert calls == [(4, 0), (4, 4), (2, 8)]
    report = json.loads((tmp_path / "unseen.json").read_text())
    assert report["r_precision"] == 1.0 and report["on_white_in_the_colour"] == 1.0
    assert "first for 100%" in sentence and "100% are a monster on white" in sentence
    with Image.open(tmp_path / "samples" / "unseen.png") as sheet:
        assert sheet.width >= 8 * 128


def test_turquoise_monsters_are_unseen_ones_and_judged_by_their_own_images(tmp_path: Path) -> None:
    unseen = (obedience.FIRST_UNSEEN, monsters.TURQUOISE + obedience.FIRST_UNSEEN)
    index = {monster.caption: monster.index for first in unseen for monster in obedience.unseen_monsters(3, first)}

    def draw_them(prompts: list[str], seed: int) -> list[Image.Image]:
        return [monsters.draw(index[prompt], 128) for prompt in prompts]  # of others it knows nothing

    sentence = obedience.judge_monsters(draw_them, 3, tmp_path, "monsters:60:turquoise")
    assert sentence.endswith("Of 3 turquoise ones, 100% are.")


def test_a_planted_copy_is_nearest_to_its_original_mirrored_or_not() -> None:
    known = copying.thumbnails([monsters.draw(i, 64) for i in range(30)])
    queries = torch.stack([known[7], known[12].flip(-1), copying.thumbnails([monsters.draw(900, 64)])[0]])
    found = copying.nearest(queries, known)
    assert found.index[:2].tolist() == [7, 12] and found.mirrored[:2].tolist() == [False, True]
    assert found.distance[:2].max() < 1e-3 < 0.1 < found.distance[2]
    assert found.calibrated[:2].max() < 0.01 and 0.3 < found.calibrated[2] <= 1
    others = copying.nearest(known, known, but=torch.arange(30))
    assert others.distance.min() > 0.1 and (others.index != torch.arange(30)).all()


def test_a_pale_image_is_near_to_many_and_no_copy() -> None:
    """Its distance is small, and not against those to the fifty nearest."""
    generator = torch.Generator().manual_seed(0)
    known = 1 - 0.05 * torch.rand(60, 3, 8, 8, generator=generator)
    pale, copy = 1 - 0.05 * torch.rand(1, 3, 8, 8, generator=generator), known[:1] - 0.001
    found = copying.nearest(torch.cat([pale, copy]), known)
    assert found.distance.max() < 0.03
    assert found.calibrated[0] > 0.8 and found.calibrated[1] < 0.1


@pytest.mark.parametrize("of_a_folder", [False, True])
def test_planted_copies_are_counted(of_a_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three training images, a little blurred and one of them mirrored, among eight samples: three copies."""
    if of_a_folder:
        (tmp_path / "images").mkdir()
        for i in range(24):
            monsters.draw(i, 64).save(tmp_path / "images" / f"{i:02d}.png")
            (tmp_path / "images" / f"{i:02d}.txt").write_text(monsters.caption(i))
    copies = [monsters.draw(i, 32).resize((64, 64)) for i in (3, 8, 20)]
    copies[1] = copies[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    fresh = [monsters.draw(800_000 + i, 64) for i in range(5)]
    monkeypatch.setattr(script, "sample_all", lambda *_: copies + fresh)
    tiny_model().save_pretrained(tmp_path / "model")
    source = str(tmp_path / "images") if of_a_folder else "monsters:24"
    argv = [str(tmp_path / "model"), "--dataset", source, "--num_samples", "8", "--resolution", "64"]
    script.main([*argv, "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["copying"]["share_of_copies_by_distance"] == 3 / 8
    assert report["copying"]["share_of_copies_by_calibrated"] == 3 / 8
    assert "| distance | " in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_prompts_are_of_unseen_monsters_and_name_their_colour(asked: list[obedience.Unseen]) -> None:
    assert len(asked) == 24 and all(monster.colour in monster.caption for monster in asked)
    assert all(monster.index >= 900_000 and monster.caption == monsters.caption(monster.index) for monster in asked)
    assert all(monster.colour == monsters.roll(monster.index).colour for monster in asked)


def test_a_report_is_written(tmp_path, capsys: pytest.CaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--dataset", "monsters:4", "--num_samples", "2", "--resolution", "64"]
    script.main([*argv, "--steps", "2", "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["obedience"]["r_precision_of_real_images"] == 1.0
    assert report["samples"] == 2 and 0 <= report["obedience"]["on_white_in_the_colour"] <= 1
    assert report["vae_ceiling"]["psnr"] > 0 and report["copying"]["samples"]["distance"]["mean"] > 0
    assert report["precision"] == str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    assert len(report["prediction_error"]["by_tenths"]) == 10 and "against_real_images" not in report  # of two images
    assert (tmp_path / "report" / "samples.png").is_file() and (tmp_path / "report" / "nearest.png").is_file()


def test_raw_weights_are_measured_beside_the_averaged_ones(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    for parameter in model.unet.conv_out.parameters():
        parameter.data.zero_()  # as raw weights might differ: these predict 0
    torch.save({"step": 3, "unet": model.unet.state_dict()}, tmp_path / "step_00000003.pt")
    argv = [str(tmp_path / "model"), "--dataset", "monsters:4", "--num_samples", "2", "--resolution", "64"]
    argv += ["--steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "report"), "--checkpoint"]
    script.main([*argv, str(tmp_path / "step_00000003.pt")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    averaged, raw = report["prediction_error"], report["prediction_error_of_raw_weights"]
    assert raw["mean"] == pytest.approx(1, abs=0.1) and abs(averaged["mean"] - 1) > 0.02
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| all | "))
    assert row.split(" | ")[1] == f"{averaged['mean']:.4f}" and row.split(" | ")[3] == f"{raw['mean']:.4f}"
    (tmp_path / "other.pt").write_bytes(b"no checkpoint")
    for wrong in (tmp_path / "other.pt", tmp_path / "nothing.pt", tmp_path / "model" / "unet" / "config.json"):
        with pytest.raises(UserError, match=r"--checkpoint .*cannot be read as one of this model's"):
            script.main([*argv, str(wrong)])


def test_loras_are_added_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model = tiny_model()
    for change in lora.add(model.unet, lora.targets(model.unet), rank=2, alpha=2):
        torch.nn.init.normal_(change.up.weight)
    write_lora(tmp_path / "fox.safetensors", model.unet)
    seen = []
    monkeypatch.setattr(script, "sample_all", lambda model, prompts, _: seen.append(dict(model.loras)) or 1 / 0)
    argv = [str(tmp_path / "model"), "--dataset", "monsters:4", "--num_samples", "2", "--resolution", "64"]
    with pytest.raises(ZeroDivisionError):
        script.main([*argv, "--lora", str(tmp_path / "fox.safetensors"), "--output_dir", str(tmp_path / "report")])
    argv += ["--lora", str(tmp_path / "fox.safetensors"), "--lora_scale", "0.5"]
    with pytest.raises(ZeroDivisionError):
        script.main([*argv, "--output_dir", str(tmp_path / "report")])
    assert seen == [{"fox": 1.0}, {"fox": 0.5}]
    with pytest.raises(UserError, match="give a --lora for each"):
        script.main([*argv, "1"])


def test_captions_of_a_folder_are_judged_with_its_own_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, monster in enumerate(obedience.unseen_monsters(6)):
        monsters.draw(monster.index, 64).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(monster.caption)
    tiny_model().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--dataset", str(folder), "--num_samples", "6", "--resolution", "64"]
    script.main([*argv, "--steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["obedience"]) == {
        *("r_precision", "r_precision_of_real_images", "r_precision_of_shuffled_images")
    }
    assert report["obedience"]["r_precision_of_real_images"] == 1.0
    assert "attributes" not in report and report["against_real_images"]["precision"] <= 1


def test_a_perfect_model_gets_a_perfect_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the samples are the drawings themselves."""
    asked = obedience.unseen_monsters(12)
    monkeypatch.setattr(script, "sample_all", lambda *_: [monsters.draw(monster.index, 128) for monster in asked])
    tiny_model().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--dataset", "monsters:24", "--num_samples", "12", "--resolution", "128"]
    script.main([*argv, "--device", "cpu", "--precision", "float32", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["against_real_images"]["precision"] == report["against_real_images"]["coverage"] == 1.0
    quality = report["against_real_images"]
    assert quality["low"] < 0 < quality["high"] and abs(quality["kid"]) < 0.005 < quality["controls"]["noise"]["low"]
    assert abs(quality["controls"]["other_real_images"]["kid"]) < 0.005
    samples, real, shuffled = report["attributes"].values()
    assert samples == real and samples["colour"] == {"asked": 12, "obeyed": 1.0}
    assert shuffled["colour"]["obeyed"] < 0.5
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| R-precision among 12 captions | 100% (76%…100%) | 100% (76%…100%) | 0% (0%…24%) |" in text
    assert "| colour, by the CLIP (12 captions) | 100% (76%…100%) | 100% (76%…100%) | " in text


def test_each_figure_is_of_the_images_it_names(judge: obedience.Judge, asked: list[obedience.Unseen]) -> None:
    """Samples of other monsters than were asked for: the real images still obey, and the samples do not."""
    real = [monsters.draw(monster.index, 96) for monster in asked]
    report = script.measure_obedience(real[1:] + real[:1], real, [one.caption for one in asked], asked, judge)
    samples, others = (report["attributes"][name]["colour"]["obeyed"] for name in ("samples", "real_images"))
    assert samples < 0.5 < 0.9 < others
    assert report["obedience"]["r_precision"] < 0.2 < 0.9 < report["obedience"]["r_precision_of_real_images"]


def test_every_attribute_is_told_apart_in_drawings_and_not_by_grammar(judge: obedience.Judge) -> None:
    indices = range(obedience.FIRST_UNSEEN, obedience.FIRST_UNSEEN + 40)
    drawn = [monsters.draw(i, 96) for i in indices]
    sets = {"own": drawn, "dealt out anew": drawn[20:] + drawn[:20]}
    own, other = score_attributes(sets, indices, judge).values()
    assert set(own) == set(CHOICES) and all(4 <= own[name]["asked"] <= 40 for name in own)
    for name in own:  # what this CLIP cannot tell, its figures for real drawings say
        assert own[name]["obeyed"] >= {"tail": 0.5, "pattern": 0.3}.get(name, 0.85), name
        assert other[name]["obeyed"] < 0.3 + 1 / len(CHOICES[name]), name  # chance, and what the pairs share


def test_variants_exchange_one_phrase_for_each_other_value() -> None:
    for index in range(200):
        caption = monsters.caption(index)
        for attribute, captions in variants(index).items():
            assert captions[0] == caption and len(captions) == len(CHOICES[attribute]) == len(set(captions))
            assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in captions)
    assert variants(next(i for i in range(99) if " red " in monsters.caption(i)))["colour"][0].count("red") == 1


def test_variants_keep_number_and_whole_words() -> None:
    """ "two horns" becomes "one horn", and "feathered" keeps its red."""
    index = next(i for i in range(999) if "two horns" in monsters.caption(i))
    caption, *others = variants(index)["ears or horns"]
    assert caption.replace("two horns", "one horn") in others and not any("two a horn" in other for other in others)
    for i in range(3000):
        colour, caption = monsters.roll(i).colour, monsters.caption(i)
        if colour == "red" and "feathered" in caption:
            found = variants(i).get("colour", [])
            assert bool(found) == (" red " in caption) and all("feathered" in other for other in found)
    for asked in obedience.unseen_monsters(300):
        assert asked.colour in re.findall(r"\w+", asked.caption)


def test_intervals_hold_what_they_say() -> None:
    low, high = share_interval(0.97, 100)
    assert (round(low, 3), round(high, 3)) == (0.915, 0.990)  # Wilson's, as published tables have it
    assert share_interval(0.0, 10)[0] == 0.0 and share_interval(1.0, 10)[1] == 1.0
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_the_prediction_errors_interval_is_that_of_other_images() -> None:
    """Images that differ as a whole: the mean of 16 of them varies as 16 numbers do, not as their 70 errors."""
    generator, which = torch.Generator().manual_seed(0), spread(16, 1000, torch.device("cpu"))[0]
    rising, held = torch.linspace(9, 0, len(which)), 0  # by timestep, which the interval leaves out
    for _ in range(100):
        of_images = torch.rand(16, generator=generator)
        interval, of_tenths = intervals((of_images[which] + rising).tolist(), which)
        held += interval[0] < 0.5 + 4.5 < interval[1]
    assert 90 <= held <= 100
    assert interval[1] - interval[0] == pytest.approx(2 * 2.131 * of_images.std().item() / 4, rel=0.1)  # Student's t
    tenth = of_tenths[4][1] - of_tenths[4][0]
    assert tenth > 2 * 2.131 * of_images.std().item() / 4  # of seven of the images only
    assert len(of_tenths) == 10 and all(low < high for low, high in of_tenths)
    assert [low > 8 - i for i, (low, _) in enumerate(of_tenths)] == [True] * 10  # each about its own level
    assert intervals([2.0] * 70, which) == ((2.0, 2.0), [(2.0, 2.0)] * 10)


def test_intervals_of_few_images_are_wider() -> None:
    """Hesterberg 2015, Section 5.4: Φ(-√(n/(n-1)) t), here with t from tables."""
    normal = NormalDist()
    for count, t in ((5, 2.776), (16, 2.131), (1000, 1.962)):
        exact = normal.cdf(-((count / (count - 1)) ** 0.5) * t)
        assert normal.inv_cdf(expanded(count)) == pytest.approx(normal.inv_cdf(exact), rel=0.01)
    generator, held = torch.Generator().manual_seed(0), 0
    which = spread(8, 1000, torch.device("cpu"))[0]
    for _ in range(100):
        low, high = intervals(torch.randn(8, generator=generator)[which].tolist(), which)[0]
        held += low < 0 < high
    assert held >= 88


def test_a_tenths_interval_is_that_of_the_images_it_has() -> None:
    """Seven of sixteen: no narrower than Student's interval of these seven, on average over 30 sets."""
    generator, which, ratios = torch.Generator().manual_seed(0), spread(16, 1000, torch.device("cpu"))[0], []
    for _ in range(30):
        errors = torch.randn(16, generator=generator)[which]
        _, of_tenths = intervals(errors.tolist(), which)
        students = errors.view(10, 7).std(dim=1) * 2 * 2.447 / 7**0.5  # (10,)
        ratios += [(high - low) / width.item() for (low, high), width in zip(of_tenths, students, strict=True)]
    assert 1 <= fmean(ratios) < 1.3


def test_the_interval_of_a_mean_is_students() -> None:
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(values.tolist())
    assert low < values.mean() < high and high - low == pytest.approx(2 * 2.131 * values.std().item() / 4, rel=0.1)
    assert mean_interval([3.0] * 4) == (3.0, 3.0)


def test_kid_is_0_for_one_distribution_and_not_for_two(judge: obedience.Judge) -> None:
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        a, b = torch.nn.functional.normalize(torch.randn(2, 100, 8, generator=generator), dim=-1)
        same = kid(a, b)
        held += same["low"] < 0 < same["high"]
        assert abs(same["kid"]) < 0.03
    assert held >= 16
    shift = torch.tensor([0.5] + [0.0] * 7)
    other = kid(a, b + shift)
    assert 0.05 < other["low"] < other["kid"] < other["high"]
    x, y = a.double(), (b + shift).double()  # its definition: Bińkowski et al. 2018, Equation 4
    k = lambda p, q: (p @ q.T / 8 + 1) ** 3  # noqa: E731
    unbiased = ((k(x, x) + k(y, y) - 2 * k(x, y)) * (1 - torch.eye(100))).sum() / (100 * 99)
    assert other["kid"] == pytest.approx(unbiased.item(), rel=1e-6)
    assert kid(a, a)["low"] < 0 < kid(a, a)["high"] and abs(kid(a, a)["kid"]) < 1e-9  # a set is no enemy of itself
    drawn = [monsters.draw(i, 96) for i in range(120) if monsters.roll(i).colour in ("red", "blue")]
    features, half = judge.image_features(drawn), len(drawn) // 2
    red = torch.tensor(
        [monsters.roll(i).colour == "red" for i in range(120) if monsters.roll(i).colour in ("red", "blue")]
    )
    found, same = kid(features[red], features[~red]), kid(features[:half], features[half : 2 * half])
    assert found["low"] > 0.004 > 3 * abs(same["kid"])


def test_precision_recall_and_coverage_know_what_is_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(100, 4, generator=generator), 20 + torch.randn(100, 4, generator=generator)])
    again = torch.cat([torch.randn(100, 4, generator=generator), 20 + torch.randn(100, 4, generator=generator)])
    assert min(precision_recall_coverage(real, again).values()) > 0.85
    half = precision_recall_coverage(real, again[:100])  # one of two kinds is never made
    assert half["precision"] > 0.85 and half["recall"] < 0.55 and half["coverage"] < 0.55
    odd = precision_recall_coverage(real, torch.cat([again[:100], 60 + again[:100]]))  # half of it like nothing real
    assert 0.4 < odd["precision"] < 0.55
    assert precision_recall_coverage(real[:2], real[:2] + 0.01)["coverage"] == 1.0  # fewer than five neighbours
    for made in (again, again[:100], 0.5 * again + 1):
        theirs = prdc.compute_prdc(real.numpy(), made.numpy(), nearest_k=5)
        ours = precision_recall_coverage(real, made)
        assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-6)


def test_prediction_errors_are_those_of_the_steps_loss_and_repeat_themselves() -> None:
    """Of a U-Net that says 0 they are the noise's variance, for every tenth; of one that knows the noise, 0."""
    model, pixels = tiny_model(), torch.rand(3, 3, 64, 64) * 2 - 1
    errors = prediction_errors(model, pixels, ["a", "b", "c"])
    assert errors == prediction_errors(model, pixels, ["a", "b", "c"]) != prediction_errors(model, pixels, ["a"] * 3)
    assert len(errors) == 70
    for parameter in model.unet.conv_out.parameters():
        parameter.data.zero_()
    assert by_tenths(prediction_errors(model, pixels, ["a"] * 3)) == pytest.approx([1.0] * 10, abs=0.2)
    seen, noised = [], NoiseSchedule.add_noise

    def remember(self: NoiseSchedule, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(noise)
        return noised(self, x0, noise, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseSchedule, "add_noise", remember)
        patch.setattr(model.unet, "forward", lambda *_: seen[-1])
        assert max(prediction_errors(model, pixels, ["a"] * 3)) == 0.0
    noise = torch.cat(seen).flatten(1)
    assert len(noise) == len(noise.unique(dim=0)) == 70  # never the same twice


def test_the_unet_is_shown_noisy_latents_their_timestep_and_their_caption() -> None:
    model, seen = tiny_model(), []
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    prediction_errors(model, pixels, ["a", "b", "c"])
    hook.remove()
    x, t, context = (torch.cat(parts) for parts in zip(*seen, strict=True))
    which, timesteps = spread(3, 1000, torch.device("cpu"))
    assert torch.equal(t, timesteps) and torch.equal(context, model.encode_prompts(["a", "b", "c"])[which])
    clean = model.encode_images(pixels, torch.Generator().manual_seed(0))[which]
    kept = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item() for a, b in zip(x, clean, strict=True)]
    assert kept[0] > 0.8 and max(map(abs, kept[-5:])) < 0.4  # of the image, ever less is left


def test_an_overflow_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object, **__: object) -> None:
        raise FloatingPointError("The latents overflowed.")

    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(StableDiffusion, "sample", overflow)
    argv = [str(tmp_path / "model"), "--dataset", "monsters:4", "--num_samples", "2", "--resolution", "64"]
    with pytest.raises(UserError, match=r"The latents overflowed\."):
        script.main([*argv, "--device", "cpu", "--output_dir", str(tmp_path / "report")])


def test_the_documented_command_takes_the_model_first(tmp_path: Path) -> None:
    command = [sys.executable, "evaluate_stable_diffusion.py", str(tmp_path / "nothing"), "--output_dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: the model")


def test_reused_images_are_those_that_are_asked_for(tmp_path: Path) -> None:
    """--reuse takes an image that says it was made with these settings, and makes anew what was made otherwise."""
    options = script.Options(output_dir=str(tmp_path), reuse=True, steps=2, resolution=64)
    model = tiny_model()
    (tmp_path / "images").mkdir()
    prompts, calls, sample = ["a fox", "a bird"], [], model.sample
    model.sample = lambda *args, **how: calls.append(args[0]) or sample(*args, **how)
    first = [image.tobytes() for image in script.sample_all(model, prompts, options)]
    assert [image.tobytes() for image in script.sample_all(model, prompts, options)] == first and len(calls) == 1
    for change in ({"steps": 3}, {"seed": 5}, {"guidance_scale": 2.0}, {"sampler": "euler"}):
        script.sample_all(model, prompts, dataclasses.replace(options, **change))
        script.sample_all(model, prompts, options)
    script.sample_all(model, prompts[::-1], options)
    assert len(calls) == 10


def test_duplicates_in_the_data_hide_no_copies() -> None:
    torch.manual_seed(0)
    once = torch.rand(20, 3, 8, 8) * 2 - 1
    known = torch.cat([once, once])
    others = copying.nearest(known, known, but=torch.arange(40))
    copies = copying.nearest(once[:8] + 0.001, known)
    assert (others.distance > 0.3).all()
    assert copying.measure_copying(copies, others)["share_of_copies_by_distance"] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resolution", "100"], "--resolution must be divisible by 8, not 100"),
        (["--dataset", "monsters:1"], "holds one image"),
        (["--num_samples", "1"], "--num_samples"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_a_sentence(more: list[str], said: str, tmp_path: Path) -> None:
    how = [
        "--model",
        str(ROOT / "stable_diffusion_results" / "monsters" / "model"),
        "--dataset",
        "monsters:9",
        "--output_dir",
        str(tmp_path / "a"),
    ]
    with pytest.raises((UserError, SystemExit)) as stopped:
        script.main([*how, *more])
    assert said in str(stopped.value)


def test_prediction_errors_of_a_model_that_predicts_velocity_are_of_the_velocity() -> None:
    """Salimans & Ho 2022: v = √ᾱ ε - √(1-ᾱ) x_0."""
    model, seen, noised = tiny_model("v_prediction"), [], NoiseSchedule.add_noise

    def remember(self: NoiseSchedule, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = self.alphas_cumprod[t][:, None, None, None]
        seen.append(a.sqrt() * noise - (1 - a).sqrt() * x0)
        return noised(self, x0, noise, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseSchedule, "add_noise", remember)
        patch.setattr(model.unet, "forward", lambda *_: seen[-1])
        assert max(prediction_errors(model, torch.rand(2, 3, 64, 64) * 2 - 1, ["a", "b"])) < 1e-9
