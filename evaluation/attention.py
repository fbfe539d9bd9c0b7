"""Where does a word look? Cross-attention as pictures, and its score against the boxes of a monster's parts.

Cross-attention gives every pixel of a feature map weights over the words of the prompt, which sum to one (Rombach et
al. 2022, Section 3.3). Read the other way, a word has a weight at every pixel: a map of where it is used (Hertz et al.
2022, arXiv:2208.01626, Section 3; Tang et al. 2022, arXiv:2210.04885).

    with attention_maps(model.unet) as maps:
        model.sample("a red monster with bat wings", seeds=3)
    picture = map_of(maps, positions_of(model.text_encoder, "a red monster with bat wings", "bat wings"), (512, 512))

Where a monster's wings are is known, so whether "bat wings" looks there can be counted: `score_parts`, or, as a table,

    python -m evaluation.attention                              # the shipped model; a minute on two CPU cores
    python -m evaluation.attention MODEL --resolution 128 --sheet attention.png

Letters: N images in the U-Net's batch (guidance: first those without prompt), L text positions, h × w of a feature map.
"""

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import monsters
from diffusion_model import Context, CrossAttention, SpatialTransformer, UNet
from evaluation.obedience import unseen_monsters
from images import captioned_sheet, image_to_pixels, pixels_to_images, save_png, to_pixels
from monsters.captions import BELLY, CREST, MOTIF, TAIL, WINGS
from sampling.request import latent_size
from stable_diffusion_model import StableDiffusion
from text_encoder import TextEncoder

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "stable_diffusion_results" / "monsters" / "model"
TIMESTEPS = (100, 300, 500, 700, 900)  # of 1000; of models with fewer, the same shares

# ----------------------------------------------------------------------------------------------------------------------
# Recording
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionMap:
    """What one cross-attention did in one call of the U-Net."""

    layer: str  # its name in the U-Net
    timestep: float
    weights: Tensor  # (N, L, h, w), the mean over the heads: at every pixel they sum to one over L
    call: int = 0  # how many contexts it had at this timestep before: on a CPU, `sample` calls it for each image


@contextlib.contextmanager
def attention_maps(unet: UNet) -> Iterator[list[AttentionMap]]:
    """Within, every call of `unet` adds a map for each of its cross-attentions to the list; nothing else changes.

    The weights are computed a second time, beside the fused attention that never has them, so the U-Net's output keeps
    its bits; without this, nothing is computed. On the CPU, in float32: 4 · N · L · h · w bytes each. Not to be
    differentiated through: with `gradient_checkpointing` the backward pass calls blocks, and records, a second time.
    """
    maps: list[AttentionMap] = []
    now: dict[str, float | int] = {}
    contexts: dict[float, list[Context]] = {}  # by timestep, the contexts so far

    def note_call(_: nn.Module, inputs: tuple, named: dict) -> None:
        timesteps = inputs[1] if len(inputs) > 1 else named["timesteps"]
        context = inputs[2] if len(inputs) > 2 else named["context"]
        now["timestep"] = t = float(timesteps.flatten()[0])
        # Two steps may share a timestep (Karras' last ones, rounded); an image keeps its context, the very object.
        earlier = contexts.setdefault(t, [])
        if not any(context is one for one in earlier):
            earlier.append(context)
        now["call"] = next(i for i, one in enumerate(earlier) if context is one)

    hooks = [unet.register_forward_pre_hook(note_call, with_kwargs=True)]

    def record(transformer: SpatialTransformer, name: str, cross: CrossAttention) -> None:
        sizes: list[torch.Size] = []

        def note_size(_: nn.Module, inputs: tuple[Tensor, Context]) -> None:
            sizes[:] = [inputs[0].shape[-2:]]

        def note_weights(_: nn.Module, inputs: tuple[Tensor, Context]) -> None:
            weights = attention_weights(cross, *inputs)  # (N, L, hw)
            maps.append(AttentionMap(name, weights=weights.unflatten(-1, sizes[0]).cpu(), **now))

        hooks.append(transformer.register_forward_pre_hook(note_size))
        hooks.append(cross.register_forward_pre_hook(note_weights))

    for name, module in unet.named_modules():
        if isinstance(module, SpatialTransformer):
            for i, block in enumerate(module.transformer_blocks):
                record(module, f"{name}.transformer_blocks.{i}.attn2", block.attn2)
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(cross: CrossAttention, x: Tensor, context: Context) -> Tensor:
    """softmax(q kᵀ / √d), the mean over the heads, by word: x (N, hw, C) → (N, L, hw) in float32."""
    keys, _ = context[cross] if isinstance(context, dict) else cross.keys_and_values(context)
    q, k = cross._split_heads(cross.to_q(x)).float(), keys.float()  # (N, heads, hw, d), (N, heads, L, d)
    with torch.autocast(x.device.type, enabled=False):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1).mean(dim=1).mT  # Vaswani et al. 2017, Equation 1


# ----------------------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------------------


def positions_of(text_encoder: TextEncoder, prompt: str, words: str) -> list[int]:
    """The text positions of `words` in `prompt`, where they first stand; ValueError if they do not."""
    ids, _ = text_encoder.tokens(prompt)
    wanted = text_encoder.tokenizer(words, add_special_tokens=False).input_ids
    ends = [token.endswith("</w>") for token in text_encoder.tokenizer.convert_ids_to_tokens(ids)]
    # Not "wing" at the end of "redwing"; tokenizers that spell everything may not mark where words end.
    begins = [i for i in range(1, len(ids)) if i == 1 or ends[i - 1] or not any(ends)]
    starts = [i for i in begins if ids[i : i + len(wanted)] == wanted]
    if not wanted or not starts:
        raise ValueError(f"{words!r} does not stand in the prompt {prompt!r}, or not in its first {len(ids)} tokens.")
    return list(range(starts[0], starts[0] + len(wanted)))


def map_of(maps: Sequence[AttentionMap], positions: Sequence[int], size: tuple[int, int], image: int = -1) -> Tensor:
    """The mean of maps of any sizes, at these text positions taken together, up-scaled to `size`: (H, W) in 0…1.

    ValueError for no maps, and for maps of several images that went through the U-Net one by one (`AttentionMap.call`).
    """
    if not maps:
        raise ValueError("No attention was recorded: call the U-Net, not compiled, or sample, within `attention_maps`.")
    if len({one.call for one in maps}) > 1:
        raise ValueError("These are maps of several images: pick those of one, such as all whose `call` is 0.")
    words = [one.weights[image, list(positions)].sum(dim=0) for one in maps]  # (h, w) each
    return torch.stack(
        [F.interpolate(word[None, None], size, mode="bilinear", align_corners=False)[0, 0] for word in words]
    ).mean(dim=0)


# ----------------------------------------------------------------------------------------------------------------------
# Does a word look at its part?
# ----------------------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # left, top, right, bottom, in fractions of the image


def pixels_in(box: Box, size: tuple[int, int]) -> Tensor:
    """Of an image (H, W): whether the middle of a pixel lies in the box."""
    height, width = size
    left, top, right, bottom = box
    columns, rows = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None]


def looked_at(word: Tensor, box: Box) -> float:
    """How much more of a word's attention (H, W) lies in `box` than its area would give: 1 = no preference."""
    inside = pixels_in(box, word.shape)
    return (word[inside].sum() / word.sum() / inside.float().mean()).item()


def parts_named(monster: monsters.Monster, caption: str) -> dict[str, tuple[str, Box]]:
    """Of the parts that a caption names: the phrase, and the box of what it means."""
    phrases = {
        "wings": (WINGS.get(monster.wings, ()), "wings"),
        "tail": (TAIL.get(monster.tail, ()), "tail"),
        "ears or horns": (CREST.get(monster.crest, ()), "crest"),
        "belly": (BELLY.get(monster.belly, ()), "body"),
        # What floats around it is in two places far apart, whose common box is most of the image.
        "sign of the element": (() if monster.motif_place == "around" else MOTIF[monster.element], "motif"),
    }
    named = {}
    for part, (possible, box) in phrases.items():
        said = [phrase for phrase in possible if phrase in caption]
        if said and box in monster.boxes:
            named[part] = (max(said, key=len), monster.boxes[box])
    return named


@torch.no_grad()
def score_parts(
    model: StableDiffusion, indices: Sequence[int], resolution: int, timesteps: Sequence[int] | None = None
) -> dict[str, dict]:
    """How much the words for parts of monsters look at these parts, against their boxes' area (`looked_at`).

    Real drawings of the monsters `indices`, `resolution` pixels a side, are noised to each of `timesteps`, and the
    U-Net is called with their captions. Returns by part: "monsters" (how many name it), "overall" (all maps together),
    "by_layer" and "by_timestep" (of all layers): medians over the monsters. "other_words" is how much the words for
    the other parts look into the same box: a layer that looks at heads whatever the word scores high in both. A part
    that is too small to hold the middle of a pixel is left out.
    """
    timesteps = timesteps or timesteps_of(model)
    own: dict[str, dict[str, list[float]]] = {}  # part → all maps, a layer or a timestep → a score for each monster
    others: dict[str, dict[str, list[float]]] = {}
    size = (resolution // 4, resolution // 4)
    for index in indices:
        monster, caption = monsters.describe(index), monsters.caption(index)
        maps = maps_of_monster(model, index, resolution, timesteps)
        groups = {"overall": maps}
        groups |= {name: [one for one in maps if one.layer == name] for name in dict.fromkeys(m.layer for m in maps)}
        groups |= {str(t): [one for one in maps if one.timestep == t] for t in timesteps}
        named = parts_named(monster, caption)
        found = {part: _positions_or_none(model, caption, phrase) for part, (phrase, _) in named.items()}
        words = {part: positions for part, positions in found.items() if positions}
        for part, positions in words.items():
            if not pixels_in(named[part][1], size).any():
                continue
            elsewhere = [position for other in words if other != part for position in words[other]]
            for name, group in groups.items():
                for scores, where in ((own, positions), (others, elsewhere)):
                    values = scores.setdefault(part, {}).setdefault(name, [])
                    values += [looked_at(map_of(group, where, size), named[part][1])] if where else []
    return {
        part: {"monsters": len(own[part]["overall"])}
        | _medians(own[part], timesteps)
        | {"other_words": _medians(others[part], timesteps)}
        for part in sorted(own)
    }


def timesteps_of(model: StableDiffusion) -> list[int]:
    """`TIMESTEPS` in the model's own schedule, which may be shorter."""
    return list(dict.fromkeys(t * model.schedule.num_timesteps // 1000 for t in TIMESTEPS))


def _medians(found: dict[str, list[float]], timesteps: Sequence[int]) -> dict:
    medians = {name: statistics.median(values) if values else None for name, values in found.items()}
    times = {str(t): medians.pop(str(t)) for t in timesteps}
    return {"overall": medians.pop("overall"), "by_layer": medians, "by_timestep": times}


def sharpest_layer(report: dict[str, dict]) -> str:
    """The layer whose words look at their own parts most, beyond what others' words do; by the mean over the parts."""

    def beyond(layer: str) -> float:
        pairs = [(part["by_layer"][layer], part["other_words"]["by_layer"][layer]) for part in report.values()]
        return statistics.fmean(mine - (1 if theirs is None else theirs) for mine, theirs in pairs)

    return max(next(iter(report.values()))["by_layer"], key=beyond)


@torch.no_grad()
def maps_of_monster(
    model: StableDiffusion, index: int, resolution: int, timesteps: Sequence[int]
) -> list[AttentionMap]:
    """What the U-Net looks at in the real drawing of a monster, noised to each of `timesteps`, with its caption."""
    generator = torch.Generator().manual_seed(index)
    latents = model.encode_images(image_to_pixels(monsters.draw(index, resolution))[None], generator)  # (1, 4, h, w)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    context = model.encode_prompts([monsters.caption(index)]).to(model.device, model.dtype)
    with attention_maps(model.unet) as maps:
        for t in timesteps:
            times = torch.full((1,), t, device=latents.device)
            model.unet(model.schedule.add_noise(latents, noise, times).to(model.dtype), times, context)
    return maps


def attention_sheet(
    model: StableDiffusion,
    indices: Sequence[int],
    resolution: int,
    layer: str,
    timesteps: Sequence[int] | None = None,
) -> Image.Image:
    """Of real monsters, those six whose captions name most parts; beside each, bright, where these words look.

    `layer` is the one cross-attention that is shown, by its name in the U-Net.
    """

    def parts(index: int) -> int:
        return len(parts_named(monsters.describe(index), monsters.caption(index)))

    rows = []
    for index in sorted(indices, key=parts, reverse=True)[:6]:
        caption, drawing = monsters.caption(index), monsters.draw(index, 256)
        maps = maps_of_monster(model, index, resolution, timesteps or timesteps_of(model))
        maps = [one for one in maps if one.layer == layer]
        rows.append([(drawing, caption)])
        for phrase, _ in parts_named(monsters.describe(index), caption).values():
            if positions := _positions_or_none(model, caption, phrase):
                word = map_of(maps, positions, (256, 256))
                rows[-1].append((_lit(drawing, word / word.max()), phrase))
    columns = max(len(row) for row in rows)
    empty = (Image.new("RGB", (256, 256), "white"), "")
    images, captions = zip(*(cell for row in rows for cell in row + [empty] * (columns - len(row))), strict=True)
    return captioned_sheet(images, captions, columns=columns, side=160)


def _positions_or_none(model: StableDiffusion, caption: str, phrase: str) -> list[int] | None:
    """None where a tokenizer needs so many tokens that the phrase is cut off."""
    with contextlib.suppress(ValueError):
        return positions_of(model.text_encoder, caption, phrase)
    return None


def _lit(image: Image.Image, brightness: Tensor) -> Image.Image:
    """An image as bright as `brightness` (H, W) in 0…1 says, and a quarter as bright where that is 0."""
    pixels = to_pixels(image, image.width) / 2 + 0.5  # (3, H, W) in 0…1
    return pixels_to_images((pixels * (0.25 + 0.75 * brightness))[None])[0]


# ----------------------------------------------------------------------------------------------------------------------
# As a table
# ----------------------------------------------------------------------------------------------------------------------


def table(report: dict[str, dict]) -> str:
    """Markdown: a line for each part; in brackets, how much the words for other parts look there."""
    layer = sharpest_layer(report)
    times = list(next(iter(report.values()))["by_timestep"])
    lines = [f"| part | monsters | all layers | {layer} | {' | '.join(f't = {t}' for t in times)} |"]
    lines.append("| --- " * (4 + len(times)) + "|")
    for name, part in report.items():
        other = part["other_words"]
        pairs = [(part["overall"], other["overall"]), (part["by_layer"][layer], other["by_layer"][layer])]
        pairs += [(part["by_timestep"][t], other["by_timestep"][t]) for t in times]
        cells = [f"{mine:.2f}" + (f" ({theirs:.2f})" if theirs is not None else "") for mine, theirs in pairs]
        lines.append(f"| {' | '.join([name, str(part['monsters']), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED_MODEL), metavar="MODEL")
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side (512)")
    parser.add_argument("--count", type=int, default=64, help="monsters whose words are looked at (64)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw where words look, into this PNG")
    options = parser.parse_args()
    try:
        latent_size(options.resolution, options.resolution, 8)
        model = StableDiffusion.from_pretrained(options.model)
        indices = [monster.index for monster in unseen_monsters(options.count)]
        report = score_parts(model, indices, options.resolution)
        if not report:
            parser.error(f"--count {options.count}: none of these captions names a part; take more.")
        print(table(report))
        if options.sheet:
            save_png(attention_sheet(model, indices, options.resolution, sharpest_layer(report)), options.sheet)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
