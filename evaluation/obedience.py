"""Does a model draw what it is asked for? A CLIP finds each image's caption among others; for monsters, colours too.

R-precision (Xu et al. 2018, arXiv:1711.10485, Section 4.1): of N captions, how often is an image's own the one that the
CLIP finds nearest to it? Real images show what that CLIP allows, images that are dealt out anew what chance gives.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, PreTrainedTokenizerBase

import monsters
from images import captioned_sheet, save_png, to_pixels
from published.weight_files import locate, read_json
from training.clip_model import embed_captions, embed_images, load_clip, retrieval, tokenize
from training.run_folder import atomically

FIRST_UNSEEN = 900_000  # monsters from here on are kept from training
SHIPPED_CLIP = Path(__file__).resolve().parent.parent / "stable_diffusion_results" / "clip"


@dataclass
class Judge:
    """A CLIP with its tokenizer and the mean and std (3, 1, 1) of the pixels in 0…1 that it was trained on."""

    clip: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    mean: Tensor
    std: Tensor

    @classmethod
    def load(cls, path_or_hub_id: str | Path = SHIPPED_CLIP) -> "Judge":
        """ValueError or OSError, in one sentence, if that is no whole CLIP."""
        folder = locate(path_or_hub_id, "--clip")
        clip, tokenizer = load_clip(folder, "--clip")
        config = read_json(folder / "preprocessor_config.json")
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ("image_mean", "image_std"))
        return cls(clip.eval(), tokenizer, mean, std)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """(N, 3, side, side), as the CLIP was trained on them."""
        side = self.clip.config.vision_config.image_size
        pixels = torch.stack([to_pixels(image, side) for image in images])  # in [-1, 1]
        return ((pixels + 1) / 2 - self.mean) / self.std

    def image_features(self, images: list[Image.Image]) -> Tensor:
        """(N, P), unit vectors."""
        with torch.no_grad():
            return torch.cat([embed_images(self.clip, part) for part in self._pixels(images).split(50)])

    def text_features(self, captions: list[str]) -> Tensor:
        """(N, P), unit vectors."""
        with torch.no_grad():
            return torch.cat([embed_captions(self.clip, part) for part in tokenize(self.tokenizer, captions).split(50)])

    def r_precision(self, images: list[Image.Image], captions: list[str]) -> float:
        """The share, 0…1, of images whose own caption is the nearest of all; captions that are equal count as one."""
        return retrieval(self.clip, self.tokenizer, self._pixels(images), captions)[0]

    def with_controls(self, images: list[Image.Image], real: list[Image.Image], captions: list[str]) -> dict:
        """R-precision of images, of the real ones of these captions, and of the images dealt out anew (about 1/N)."""
        return {
            "r_precision": self.r_precision(images, captions),
            "r_precision_of_real_images": self.r_precision(real, captions),
            "r_precision_of_shuffled_images": self.r_precision(dealt_out_anew(images), captions),
        }


def dealt_out_anew(images: list[Image.Image]) -> list[Image.Image]:
    """Each goes to another caption: what chance gives."""
    return images[len(images) // 2 :] + images[: len(images) // 2]


@dataclass
class Unseen:
    """A monster that no training saw: what to ask for, and what should be in the image."""

    index: int
    caption: str
    colour: str


def as_named(phrase: str) -> re.Pattern:
    """Finds a phrase of a caption as whole words: no "red" in "feathered", and no "purple" in a purple wisp, whose
    colour is not the monster's."""
    return re.compile(rf"\b{re.escape(phrase)}\b" + r"(?! wisp)" * (phrase == "purple"))


def unseen_monsters(count: int, first: int = FIRST_UNSEEN) -> list[Unseen]:
    """The first monsters from `first` on whose captions name their colour."""
    found: list[Unseen] = []
    index = first
    while len(found) < count:
        caption, colour = monsters.caption(index), monsters.roll(index).colour
        if as_named(colour).search(caption):
            found.append(Unseen(index, caption, colour))
        index += 1
    return found


def colours(images: list[Image.Image], asked: list[str]) -> dict:
    """How many images are a monster on white, and one in the colour asked for, by the pixels."""
    on_white = [monsters.is_monster_on_white(image) for image in images]
    drawn = [monsters.colour_of(image) for image in images]
    right = [a and b == c for a, b, c in zip(on_white, drawn, asked, strict=True)]
    wrong = [f"{i}: asked {c}, got {b}" for i, (b, c) in enumerate(zip(drawn, asked, strict=True)) if not right[i]]
    return {"on_white": sum(on_white) / len(images), "on_white_in_the_colour": sum(right) / len(images), "wrong": wrong}


def measure_monsters(images: list[Image.Image], asked: list[Unseen], judge: Judge) -> dict:
    """Colours and R-precision, with its controls, of one image for each unseen monster."""
    real = [monsters.draw(monster.index, 256) for monster in asked]
    captions = [monster.caption for monster in asked]
    return colours(images, [monster.colour for monster in asked]) | judge.with_controls(images, real, captions)


def judge_monsters(
    sample: Callable[[list[str], int], list[Image.Image]], count: int, folder: Path, dataset: str = "monsters"
) -> str:
    """What `sample` (prompts, first seed) draws of unseen monsters, in words; unseen.json and a sheet go into `folder`.

    If there are turquoise ones in the data set that it learned from, as many of these as well.
    """
    asked = unseen_monsters(count)
    turquoise = max(monsters.indices_of(dataset)) >= monsters.TURQUOISE
    new = unseen_monsters(count, monsters.TURQUOISE + FIRST_UNSEEN) if turquoise else []
    captions, images = [monster.caption for monster in asked + new], []
    for start in tqdm(range(0, len(captions), 4), desc=f"drawing {len(captions)} unseen captions", disable=None):
        images += sample(captions[start : start + 4], start)
    report = measure_monsters(images[:count], asked, Judge.load())
    if turquoise:  # a word that the shipped CLIP does not know: judged by the colour alone
        report["turquoise"] = colours(images[count:], [monster.colour for monster in new])
    with atomically(folder / "unseen.json") as file:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with atomically(folder / "samples" / "unseen.png") as file:
        save_png(captioned_sheet(images, captions, columns=8, side=128), file)
    return in_words(report, count)


def in_words(report: dict, count: int) -> str:
    """A report of `measure_monsters` on `count` images as one sentence."""
    text = (
        f"Of {count} monsters that it never saw, the shipped CLIP finds the right caption first for "
        f"{report['r_precision']:.0%} of the images (of real drawings: {report['r_precision_of_real_images']:.0%}; of "
        f"images dealt out anew: {report['r_precision_of_shuffled_images']:.0%}), and "
        f"{report['on_white_in_the_colour']:.0%} are a monster on white in the colour asked for."
    )
    if "turquoise" in report:
        text += f" Of {count} turquoise ones, {report['turquoise']['on_white_in_the_colour']:.0%} are."
    return text
