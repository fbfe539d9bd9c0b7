"""Attention maps: they record without changing anything, and the scores can say no."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

import monsters
from evaluation import attention
from evaluation.attention import attention_maps, looked_at, map_of, parts_named, positions_of
from evaluation.obedience import SHIPPED_CLIP, unseen_monsters
from images import image_to_pixels
from noise_schedule import NoiseSchedule
from published import load_text_encoder
from stable_diffusion_model import StableDiffusion
from tests.tiny import tiny_model
from text_encoder import TextEncoder

PROMPT = "a red fox with bat wings"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """The shipped one, which knows whole words."""
    return load_text_encoder(SHIPPED_CLIP)


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    torch.manual_seed(0)
    return tiny_model()


def latents_of(model: StableDiffusion) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    model.sample(PROMPT, steps=3, height=64, width=72, progress=False, callback=lambda i, t, x, x0: seen.append(x))
    return torch.stack(seen)


def test_recording_changes_no_bit_and_ends_with_the_block(model: StableDiffusion) -> None:
    plain = latents_of(model)
    with pytest.raises(RuntimeError, match="stop"), attention_maps(model.unet) as maps:
        recorded = latents_of(model)
        raise RuntimeError("stop")
    assert torch.equal(recorded, plain) and len(maps) > 0
    count = len(maps)
    assert torch.equal(latents_of(model), plain) and len(maps) == count
    hooked = [module for module in model.unet.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert hooked == []


def test_every_cross_attention_of_every_step_is_there_and_sums_to_one_over_the_words(model: StableDiffusion) -> None:
    timesteps = []
    with attention_maps(model.unet) as maps:
        model.sample(
            PROMPT, steps=3, height=64, width=72, progress=False, callback=lambda i, t, x, x0: timesteps.append(t)
        )
    layers = [name for name, _ in model.unet.named_modules() if name.endswith(".attn2")]
    called = [(one.layer, one.timestep) for one in maps]  # in the order of the calls: down, middle, up
    assert sorted(called) == sorted((layer, t) for t in timesteps for layer in layers) and len(timesteps) == 3
    assert called[0][1] == timesteps[0] and called[-1][1] == timesteps[-1]
    for one in maps:
        assert one.weights.shape[:2] == (2, model.text_encoder.length)  # without prompt, and with it
        torch.testing.assert_close(one.weights.sum(dim=1), torch.ones(2, *one.weights.shape[2:]))
    sizes = {tuple(one.weights.shape[-2:]) for one in maps}
    assert all(8 * w == 9 * h or w > h for h, w in sizes)  # not transposed


def test_the_weights_are_those_that_made_the_output(model: StableDiffusion) -> None:
    """Times the values, they give what the layer gives; with one head, for its mean is what is recorded."""
    cross = attention.CrossAttention(8, 6, heads=1)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    weights = attention.attention_weights(cross, x, context)
    assert weights.shape == (2, 7, 5)
    _, values = cross.keys_and_values(context)
    torch.testing.assert_close(cross.to_out[0](weights.mT @ values[:, 0]), cross(x, context))
    beforehand = {cross: cross.keys_and_values(context)}
    assert torch.equal(attention.attention_weights(cross, x, beforehand), weights)


def test_the_weights_of_several_heads_are_averaged() -> None:
    """Also what grades the exercise: with one head, a sum or the first head would do as well."""
    cross = attention.CrossAttention(8, 6, heads=2)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    keys, queries = cross.to_k(context), cross.to_q(x)
    heads = [torch.softmax(queries[..., h] @ keys[..., h].mT / 2, dim=-1) for h in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(attention.attention_weights(cross, x, context), (heads[0] + heads[1]).mT / 2)


def test_images_of_a_batch_are_not_mixed(model: StableDiffusion) -> None:
    """On a CPU they go through the U-Net one by one; each one's maps are those that it has alone."""
    how = {"steps": 2, "height": 64, "width": 64, "progress": False}
    with attention_maps(model.unet) as together:
        model.sample([PROMPT, "a blue monster"], seeds=[3, 4], **how)
    with attention_maps(model.unet) as alone:
        model.sample("a blue monster", seeds=4, **how)
    second = [one for one in together if one.call == 1]
    assert len(second) == len(alone) and all(
        torch.equal(a.weights, b.weights) for a, b in zip(second, alone, strict=True)
    )
    with pytest.raises(ValueError, match="maps of several images"):
        map_of(together, [1], (16, 16))


def test_timesteps_may_be_passed_by_name(model: StableDiffusion) -> None:
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, model.unet.config.context_dim)
    with torch.no_grad(), attention_maps(model.unet) as maps:
        model.unet(x, timesteps=torch.tensor([7]), context=context)
    assert {one.timestep for one in maps} == {7}


def test_a_word_is_not_the_end_of_another(encoder: TextEncoder) -> None:
    """ "redwing" ends with the token of "wing"."""
    ids, _ = encoder.tokens("a redwing and a wing")
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert pieces.count("wing</w>") == 2
    (found,) = positions_of(encoder, "a redwing and a wing", "wing")
    assert pieces[found - 1] == "a</w>"


def test_words_are_found_by_their_tokens(encoder: TextEncoder) -> None:
    ids, _ = encoder.tokens(PROMPT)
    found = positions_of(encoder, PROMPT, "bat wings")
    assert encoder.tokenizer.decode([ids[i] for i in found]).strip() == "bat wings"
    assert found == list(range(found[0], found[0] + len(found)))
    for missing in ("tail", "", "wings bat"):
        with pytest.raises(ValueError, match="does not stand in the prompt"):
            positions_of(encoder, PROMPT, missing)


def test_maps_of_several_sizes_are_laid_over_each_other() -> None:
    left = torch.zeros(1, 3, 2, 2)
    left[0, 1, :, 0] = 0.5
    left[0, 2, :, 0] = 0.25
    small = attention.AttentionMap("a", 0, left)
    large = attention.AttentionMap("b", 0, left.repeat_interleave(4, -1).repeat_interleave(4, -2))
    word = map_of([small, large], [1, 2], (16, 16))
    assert word.shape == (16, 16)
    assert word[:, 0].tolist() == pytest.approx([0.75] * 16) and word[:, -1].abs().max() == 0
    with pytest.raises(ValueError, match="No attention was recorded"):
        map_of([], [1], (16, 16))


def test_a_map_is_scaled_up_about_its_pixels_middles() -> None:
    """As images are; between the middles it is linear, beyond them even."""
    word = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    row = map_of([attention.AttentionMap("a", 0, word)], [0], (2, 8))[0]
    assert row.tolist() == pytest.approx([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1])


def test_a_pixel_is_in_a_box_if_its_middle_is() -> None:
    assert attention.pixels_in((0.4, 0, 0.6, 1), (1, 4)).tolist() == [[False] * 4]  # middles: 1/8, 3/8, 5/8, 7/8
    assert attention.pixels_in((0.3, 0, 0.7, 1), (1, 4)).tolist() == [[False, True, True, False]]
    assert attention.pixels_in((0, 0.3, 1, 0.7), (4, 1)).tolist() == [[False], [True], [True], [False]]


def test_looking_is_measured_against_the_area_of_the_box() -> None:
    box = (0.5, 0.0, 1.0, 0.25)  # the upper right: an eighth
    assert looked_at(torch.ones(32, 48), box) == pytest.approx(1)
    inside = torch.zeros(32, 48)
    inside[:8, 24:] = 1
    assert looked_at(inside, box) == pytest.approx(8)
    assert looked_at(inside.flip(-1), box) == looked_at(inside.flip(-2), box) == 0
    assert looked_at(torch.ones(32, 48) + inside, box) == pytest.approx(16 / 9)


def test_parts_are_named_as_in_the_caption_and_lie_where_they_are_drawn() -> None:
    several = set()
    for asked in unseen_monsters(60):
        monster = monsters.describe(asked.index)
        for part, (phrase, box) in parts_named(monster, asked.caption).items():
            several.add(part)
            where = {"ears or horns": "crest", "belly": "body", "sign of the element": "motif"}.get(part, part)
            assert phrase in asked.caption and box == monster.boxes[where]
    assert several == {"wings", "tail", "ears or horns", "belly", "sign of the element"}


def test_a_sign_that_floats_around_has_no_box_and_the_longest_phrase_is_the_one_that_is_named() -> None:
    asked = {monster.index: monster.caption for monster in unseen_monsters(60)}
    around = [i for i in asked if monsters.describe(i).motif_place == "around"]
    assert around and all("sign of the element" not in parts_named(monsters.describe(i), asked[i]) for i in around)
    winged = next(i for i in asked if "wings" in parts_named(monsters.describe(i), asked[i]))
    kind, box = monsters.describe(winged).wings, monsters.describe(winged).boxes["wings"]
    with mock.patch.dict(attention.WINGS, {kind: ("wings", "bat wings")}):
        assert parts_named(monsters.describe(winged), "a monster with bat wings") == {"wings": ("bat wings", box)}


def test_words_that_look_at_their_parts_score_high(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted attention: in one layer every named word looks at its part and nowhere else, in the other everywhere."""
    model = SimpleNamespace(text_encoder=encoder)
    asked = [one.index for one in unseen_monsters(6)]

    def planted(model: StableDiffusion, index: int, resolution: int, timesteps: list[int]) -> list:
        caption = monsters.caption(index)
        weights = torch.full((1, model.text_encoder.length, 64, 64), 1e-9)
        for phrase, (left, top, right, bottom) in parts_named(monsters.describe(index), caption).values():
            for i in positions_of(model.text_encoder, caption, phrase):
                weights[0, i, int(64 * top) : int(64 * bottom) + 1, int(64 * left) : int(64 * right) + 1] = 1
        layers = {"sharp": weights, "blind": torch.ones_like(weights)}
        return [attention.AttentionMap(name, t, one) for t in timesteps for name, one in layers.items()]

    monkeypatch.setattr(attention, "maps_of_monster", planted)
    report = attention.score_parts(model, asked, 256, (100, 900))
    assert attention.sharpest_layer(report) == "sharp"
    for part in report.values():
        assert part["by_layer"]["sharp"] > 1.4 * part["other_words"]["by_layer"]["sharp"]
        assert part["by_layer"]["sharp"] > 1.4 and part["by_layer"]["blind"] == pytest.approx(1)
        assert 1 < part["overall"] < part["by_layer"]["sharp"]
        assert part["by_timestep"] == {"100": part["overall"], "900": part["overall"]}
    assert sum(part["monsters"] for part in report.values()) == sum(
        len(parts_named(monsters.describe(i), monsters.caption(i))) for i in asked
    )


def test_the_sheet_shows_where_words_look(model: StableDiffusion) -> None:
    """Of a real model, with real noise; as wide as the monster with the most parts needs."""
    asked = [one.index for one in unseen_monsters(2)]
    layer = next(name for name, _ in model.unet.named_modules() if name.endswith(".attn2"))
    sheet = attention.attention_sheet(model, asked, 64, layer, (500,))
    assert isinstance(sheet, Image.Image) and 2 * 160 <= sheet.width < 5 * 170  # it cuts captions off
    assert len(sheet.getcolors(1 << 24)) > 100
    report = attention.score_parts(model, asked, 64, (500,))
    assert all(0 < part["overall"] < 10 and list(part["by_timestep"]) == ["500"] for part in report.values())


def test_the_drawing_is_looked_at_through_its_noise(model: StableDiffusion) -> None:
    """The U-Net sees what it was trained on: latents noised to the timestep, and that timestep."""
    index, seen = unseen_monsters(1)[0].index, []
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    attention.maps_of_monster(model, index, 64, (0, 500, 999))
    hook.remove()
    assert [int(t) for _, t, _ in seen] == [0, 500, 999]
    (clean, _, context), (middle, _, _), (noise, _, _) = seen
    a = model.schedule.alphas_cumprod
    torch.testing.assert_close(middle, a[500].sqrt() * clean + (1 - a[500]).sqrt() * noise, atol=0.1, rtol=0.05)
    assert torch.equal(context, model.encode_prompts([monsters.caption(index)]))
    generator = torch.Generator().manual_seed(index)
    pixels = image_to_pixels(monsters.draw(index, 64))[None]
    torch.testing.assert_close(clean, model.encode_images(pixels, generator), atol=0.2, rtol=0.1)


def test_scores_are_medians_over_the_monsters(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five monsters, two of them far out."""
    scores = iter([1.0, 9.0, 3.0, 2.0, 0.1] * 100)
    wings = [
        one.index for one in unseen_monsters(60) if "wings" in parts_named(monsters.describe(one.index), one.caption)
    ]
    monkeypatch.setattr(
        attention, "maps_of_monster", lambda *_: [attention.AttentionMap("a", 5, torch.ones(1, 77, 4, 4))]
    )
    monkeypatch.setattr(attention, "parts_named", lambda *_: {"wings": ("wings", (0, 0, 1, 1))})
    monkeypatch.setattr(attention, "positions_of", lambda *_: [1])
    values = {}
    monkeypatch.setattr(attention, "looked_at", lambda *_: values.setdefault(len(values), next(scores)))
    report = attention.score_parts(SimpleNamespace(text_encoder=encoder), wings[:5], 64, (5,))
    by_group = [sorted([*values.values()][i::3])[2] for i in range(3)]
    found = report["wings"]
    assert [found["overall"], found["by_layer"]["a"], found["by_timestep"]["5"]] == by_group


def test_an_image_keeps_its_maps_where_two_steps_share_a_timestep(model: StableDiffusion) -> None:
    """As Karras' last steps do, rounded; another context at the same timestep is another image's."""
    x, contexts = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 77, model.unet.config.context_dim)
    own, other = contexts[0], contexts[1]
    with torch.no_grad(), attention_maps(model.unet) as maps:
        for t, context in ((7, own), (7, own), (3, own), (7, other)):
            model.unet(x, torch.tensor([t]), context)
    layers = len(maps) // 4
    assert [one.call for one in maps] == [0] * 3 * layers + [1] * layers
    assert map_of(maps[: 3 * layers], [1], (8, 8)).shape == (8, 8)


def test_of_a_guided_batch_the_map_with_prompt_is_shown() -> None:
    weights = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    assert map_of([attention.AttentionMap("a", 0, weights)], [1], (4, 4)).min() == 1


def test_a_word_that_stands_twice_is_the_first_one(encoder: TextEncoder) -> None:
    prompt = "a red monster and a red creature"
    ids, _ = encoder.tokens(prompt)
    (found,) = positions_of(encoder, prompt, "red")
    assert encoder.tokenizer.decode([ids[found + 1]]).strip() == "monster"


def test_the_sharpest_layer_is_beyond_what_other_words_do() -> None:
    def part(**layers: tuple[float, float | None]) -> dict:
        mine, theirs = ({name: pair[i] for name, pair in layers.items()} for i in range(2))
        return {"by_layer": mine, "other_words": {"by_layer": theirs}}

    report = {"wings": part(heads=(5.0, 5.0), sharp=(3.0, 1.0)), "tail": part(heads=(4.0, 4.5), sharp=(2.0, None))}
    assert attention.sharpest_layer(report) == "sharp"


def test_scores_by_timestep_and_layer_are_of_their_own_maps(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early and in one layer, words look at the left half; else everywhere. A box between the pixels is left out."""
    asked = unseen_monsters(1)[0]
    left = torch.full((1, 77, 8, 8), 1e-9)
    left[..., :4] = 1
    maps = [attention.AttentionMap("a", 900, left), attention.AttentionMap("b", 900, left * 0 + 1)]
    maps += [attention.AttentionMap(name, 100, left * 0 + 1) for name in "ab"]
    monkeypatch.setattr(attention, "maps_of_monster", lambda *_: maps)
    boxes = {"wings": ("a", (0, 0, 0.5, 1)), "tail": ("a", (0.51, 0.51, 0.52, 0.52))}
    monkeypatch.setattr(attention, "parts_named", lambda *_: boxes)
    monkeypatch.setattr(attention, "positions_of", lambda *_: [1])
    model = SimpleNamespace(text_encoder=encoder)
    report = attention.score_parts(model, [asked.index], 32, (100, 900))
    assert list(report) == ["wings"]
    assert report["wings"]["by_timestep"] == {"100": pytest.approx(1), "900": pytest.approx(4 / 3, abs=0.01)}
    assert report["wings"]["by_layer"] == {"a": pytest.approx(4 / 3, abs=0.01), "b": pytest.approx(1)}
    shown = []
    monkeypatch.setattr(attention, "map_of", lambda maps, *_: shown.append(maps) or torch.ones(256, 256))
    attention.attention_sheet(model, [asked.index], 32, "b", (100, 900))
    assert [one.layer for one in shown[0]] == ["b", "b"]


def test_the_sheet_is_of_the_six_that_name_most_parts_each_word_at_its_brightest(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of monsters 0 to 8 with as many parts; where a word looks most, the drawing keeps its brightness."""
    drawn, lit = [], []
    monkeypatch.setattr(attention, "parts_named", lambda i, _: {k: (f"part {k}", (0, 0, 1, 1)) for k in range(i)})
    monkeypatch.setattr(monsters, "describe", lambda i: i)
    monkeypatch.setattr(monsters, "draw", lambda i, _: drawn.append(i) or Image.new("RGB", (256, 256)))
    monkeypatch.setattr(attention, "positions_of", lambda *_: [1])
    monkeypatch.setattr(
        attention, "maps_of_monster", lambda *_: [attention.AttentionMap("a", 5, torch.full((1, 77, 4, 4), 0.2))]
    )
    monkeypatch.setattr(attention, "_lit", lambda image, brightness: lit.append(brightness) or image)
    attention.attention_sheet(SimpleNamespace(text_encoder=encoder), range(9), 64, "a", (5,))
    assert drawn == [8, 7, 6, 5, 4, 3] and len(lit) == sum(drawn)
    assert all(brightness.max() == 1 for brightness in lit)


def test_where_words_look_is_bright() -> None:
    lit = attention._lit(Image.new("RGB", (2, 2), "white"), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert lit.getpixel((0, 0)) == (255,) * 3 and lit.getpixel((1, 1)) == (64,) * 3


def test_timesteps_are_those_of_the_models_schedule() -> None:
    for count, found in ((1000, [100, 300, 500, 700, 900]), (100, [10, 30, 50, 70, 90]), (4, [0, 1, 2, 3])):
        assert attention.timesteps_of(SimpleNamespace(schedule=NoiseSchedule(num_timesteps=count))) == found


def test_maps_keep_float32_under_autocast(model: StableDiffusion) -> None:
    cross = attention.CrossAttention(8, 6, heads=2)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        weights = attention.attention_weights(cross, x, context)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 5))
    assert not torch.equal(weights, weights.bfloat16().float())
