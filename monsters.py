"""Pocket monsters: a captioned data set of drawn creatures that needs no download and belongs to nobody else.

An index is all there is: `describe(index)` rolls a creature's attributes, `draw(index)` lays out its parts
(monster_anatomy.py) and paints them on white (monster_drawing.py), `caption(index)` says what was drawn
(monster_captions.py). Everything follows from `random.Random` seeded with the index, so the same index gives the same
bytes in every process, and a caption is true by construction.
"""

import argparse
import colorsys
import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import monster_anatomy
import monster_captions
import monster_drawing

if TYPE_CHECKING:
    from datasets import Dataset

RGB = tuple[int, int, int]


# ---------------------------------------------------------------------------------------------------------------------
# What a monster can be
# ---------------------------------------------------------------------------------------------------------------------

# name -> hue in degrees, saturation, value, each a range; chosen far enough apart that pixels can tell them (colour_of)
PALETTE = {
    "red": ((353, 362), (0.74, 0.84), (0.82, 0.92)),
    "orange": ((23, 29), (0.80, 0.90), (0.96, 1.00)),
    "yellow": ((47, 53), (0.66, 0.82), (0.96, 1.00)),
    "green": ((92, 148), (0.48, 0.66), (0.64, 0.78)),
    "blue": ((202, 226), (0.55, 0.72), (0.78, 0.92)),
    "purple": ((262, 280), (0.45, 0.58), (0.66, 0.80)),
    "pink": ((330, 344), (0.36, 0.46), (0.96, 1.00)),
    "brown": ((20, 28), (0.52, 0.62), (0.50, 0.60)),
    "gray": ((200, 230), (0.02, 0.07), (0.62, 0.72)),
    "black": ((220, 250), (0.10, 0.18), (0.24, 0.29)),
}
COLOURS = tuple(PALETTE)
ELEMENTS = ("fire", "water", "grass", "electric", "ice", "rock", "ghost", "poison", "fairy")
PATTERNS = ("plain", "spots", "stripes")
BELLIES = ("none", "plain", "striped")
MOODS = ("smiling", "laughing", "grumpy", "surprised", "sleepy", "sad", "winking")
CRESTS = ("none", "pointed ears", "round ears", "long ears", "horns", "horn", "antennae")
WINGS = ("none", "bat", "feathered", "insect")
TAILS = ("none", "long", "curly", "bushy", "pointed")
MOTIF_PLACES = ("head", "tail", "around")

# body plan -> the wings and tails that suit it (a fish has its fin, a bird its fan, and neither is called a tail)
BODIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "round": (WINGS, TAILS),
    "pear": (WINGS, TAILS),
    "two legs": (WINGS, TAILS),
    "four legs": (WINGS, TAILS[1:]),
    "serpent": (WINGS, ("none",)),
    "bird": (("feathered",), ("none",)),
    "fish": (WINGS, ("none",)),
    "insect": (WINGS, ("none",)),
    "floating": (WINGS, ("none", "pointed")),
    "blob": (WINGS, ("none", "curly")),
}


@dataclass(frozen=True)
class Monster:
    """Everything about one monster: attributes as words, pose as numbers, and `boxes` of the parts in the picture.

    `boxes` maps a part's name to (left, top, right, bottom) in fractions of the picture, 0..1. There are always
    "monster" (all of it), "body", "head", "eyes", "mouth" and "motif", and "wings", "tail", "crest" where it has them.
    """

    index: int
    body: str
    colour: str
    element: str
    motif_place: str  # where the element's sign is: "head", "tail" (its tip) or "around" (floating beside)
    pattern: str
    belly: str
    wings: str
    tail: str
    crest: str
    mood: str
    bead_eyes: bool  # small black eyes, else big ones with a coloured iris
    cheeks: bool
    base: RGB  # the colour of its coat
    iris: RGB
    facing: int  # 1 = to the right, -1 = to the left
    size: float  # longer side of the monster, fraction of the picture
    x: float  # place within the room that is left, -1..1
    y: float
    lean: float  # radians
    turn: float  # 0 = seen from the front, 1 = looking to the side
    plump: float  # the rest are proportions around 1
    head_size: float
    eye_size: float
    limb: float
    arm: float  # -1 = hanging, 1 = raised
    wing_size: float
    wing_lift: float  # radians
    boxes: dict[str, tuple[float, float, float, float]] = field(default_factory=dict, compare=False)


def combinations() -> int:
    """How many monsters differ in words alone, before any pose or proportion."""
    count = 0
    for wings, tails in BODIES.values():
        for tail in tails:
            places = 3 if tail in ("long", "curly", "pointed") else 2
            count += len(wings) * (places * len(CRESTS) - 1)  # no sign on the head of one with a single horn
    return count * len(COLOURS) * len(ELEMENTS) * len(PATTERNS) * len(BELLIES) * len(MOODS)


def hsv(hue: float, saturation: float, value: float) -> RGB:
    """RGB 0..255 of a hue in degrees and a saturation and value in 0..1."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def roll(index: int) -> Monster:
    """The attributes of monster `index` (int >= 0), without boxes."""
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"A monster's index is an integer of 0 or more, not {index!r}.")
    rng = random.Random(f"pocket monster {index}")

    def pick(options: Sequence) -> object:
        return options[int(rng.random() * len(options))]

    def between(low: float, high: float) -> float:
        return round(low + (high - low) * rng.random(), 4)

    body = pick(tuple(BODIES))
    wings, tails = BODIES[body]
    colour, element, pattern, belly = pick(COLOURS), pick(ELEMENTS), pick(PATTERNS), pick(BELLIES)
    wing = pick(wings) if rng.random() < 0.75 else wings[0]
    tail, mood = pick(tails), pick(MOODS)
    crest = "antennae" if body == "insect" and rng.random() < 0.6 else pick(CRESTS)
    places = ["head", "around"]
    if tail in ("long", "curly", "pointed"):
        places += ["tail", "tail"]
    if crest == "horn":
        places.remove("head")  # there is no room beside it
    hue, saturation, value = (between(*span) for span in PALETTE[colour])
    iris_hue = pick((5, 30, 48, 130, 190, 215, 275, 330))
    from_the_side = body in ("four legs", "fish", "insect", "serpent")
    return Monster(
        index=index, body=body, colour=colour, element=element, motif_place=pick(places), pattern=pattern, belly=belly,
        wings=wing, tail=tail, crest=crest, mood=mood,
        bead_eyes=rng.random() < 0.35, cheeks=rng.random() < 0.5,
        base=hsv(hue, saturation, value), iris=hsv(iris_hue, 0.75, 0.80),
        facing=pick((1, -1)), size=between(0.80, 0.95), x=between(-1, 1), y=between(-1, 1), lean=between(-0.10, 0.10),
        turn=between(0.45, 0.85) if from_the_side else between(0.0, 0.5),
        plump=between(0.88, 1.14), head_size=between(0.92, 1.12), eye_size=between(0.88, 1.2), limb=between(0.85, 1.2),
        arm=between(-1, 1), wing_size=between(0.85, 1.15), wing_lift=between(-0.25, 0.3),
    )  # fmt: skip


def describe(index: int) -> Monster:
    """The full record of monster `index`, boxes included; nothing is painted for it."""
    monster = roll(index)
    return replace(monster, boxes=monster_anatomy.boxes_of(monster))


def draw(index: int, size: int = 512) -> Image.Image:
    """Monster `index` on white as an RGB picture of size x size pixels (16..4096)."""
    return render(roll(index), size)


def check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= 4096:
        raise ValueError(f"A monster's picture is 16 to 4096 pixels wide, not {size!r}: choose a size in between.")


def render(monster: Monster, size: int = 512) -> Image.Image:
    """A record as an RGB picture; `replace(monster, wings="none")` gives the same monster without its wings."""
    check_size(size)
    oversampling = 4 if size <= 128 else 3 if size <= 1024 else 2
    canvas = Image.new("RGB", (size * oversampling, size * oversampling), "white")
    for part in monster_anatomy.assemble(monster):
        monster_drawing.paint(canvas, part)
    return canvas.reduce(oversampling)


def caption(index: int) -> str:
    """One true English sentence about monster `index`; a few attributes may be left unsaid."""
    return monster_captions.write(roll(index))


def words() -> set[str]:
    """Every word that a caption can contain."""
    return monster_captions.words(COLOURS, ELEMENTS)


# ---------------------------------------------------------------------------------------------------------------------
# Checks by pixels: for tests, and for pictures that a model made
# ---------------------------------------------------------------------------------------------------------------------


def hue_saturation_value(image: Image.Image, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, chroma, saturation and value in 0..1 of the picture at side x side, each (side, side)."""
    pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float32) / 255
    high, low = pixels.max(-1), pixels.min(-1)
    chroma = high - low
    r, g, b = np.moveaxis(pixels, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    sector = np.where(high == r, ((g - b) / safe) % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return 60 * sector, chroma, chroma / np.maximum(high, 1e-6), high


def colour_of(image: Image.Image) -> str:
    """The one of COLOURS that dominates what is not white in a picture; "" for a blank one.

    Every pixel votes with its chroma, so that pale bellies, dark lines and blurred edges count for little.
    """
    hue, chroma, saturation, value = hue_saturation_value(image, 96)
    pale = (value > 0.80) & (saturation < 0.26)  # white ground, cream bellies, insect wings, catchlights
    gray = ~pale & ((chroma < 0.09) | (saturation < 0.14))
    vivid = ~pale & ~gray
    red_side = (hue < 10) | (hue >= 347)
    dull_red = red_side & (value < 0.62) & (saturation < 0.62)  # brown in the shade
    light_red = red_side & (value > 0.80) & (saturation < 0.52)
    warm = (hue >= 10) & (hue < 46)
    names = {
        "black": (gray & (value < 0.46)) | (vivid & (saturation < 0.35) & (value < 0.40)),
        "gray": gray & (value >= 0.46),
        "brown": vivid & ((warm & (value < 0.68)) | dull_red),
        "orange": vivid & warm & (value >= 0.68) & (hue < 38),
        "yellow": vivid & (((hue >= 46) & (hue < 68)) | (warm & (value >= 0.68) & (hue >= 38))),
        "green": vivid & (hue >= 68) & (hue < 168),
        "blue": vivid & (hue >= 168) & (hue < 246),
        "purple": vivid & (hue >= 246) & ((hue < 308) | ((hue < 347) & (value < 0.62))),
        "pink": vivid & (((hue >= 308) & (hue < 347) & (value >= 0.62)) | light_red),
        "red": vivid & red_side & ~dull_red & ~light_red,
    }
    weight = np.where(value < 0.40, 0.5, 1.0) * chroma
    fixed = {"black": 0.42, "gray": 0.22}  # the colours that have no chroma to vote with
    votes = {name: float(np.where(where, fixed.get(name, weight), 0).sum()) for name, where in names.items()}
    best = max(votes, key=votes.get)
    return best if votes[best] > 0 else ""


def is_monster_on_white(image: Image.Image) -> bool:
    """Whether a picture shows one thing of a creature's size, in its middle, on a white ground."""
    _, chroma, _, value = hue_saturation_value(image, 64)
    ground = (value > 0.90) & (chroma < 0.10)
    rim = np.concatenate([ground[0], ground[-1], ground[:, 0], ground[:, -1]])
    if rim.mean() < 0.90:
        return False
    things = set(map(tuple, np.argwhere(~ground).tolist()))
    area, largest = len(things), []
    while things:
        piece = [things.pop()]
        for y, x in piece:  # grows while it is walked
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbour in things:
                    things.remove(neighbour)
                    piece.append(neighbour)
        largest = max(largest, piece, key=len)
    if not 0.06 < len(largest) / ground.size < 0.80 or len(largest) < 0.6 * area:
        return False
    y, x = np.mean(largest, axis=0) / ground.shape
    return bool(0.25 < x < 0.75 and 0.25 < y < 0.75)


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_COUNT = 64
SHARD = 16  # monsters a worker takes at a time
SOURCES = ("monsters.py", "monster_anatomy.py", "monster_drawing.py", "monster_captions.py")


def source_version() -> str:
    """A hash of the code that draws and captions, so that cached pictures are redrawn when it changes."""
    here = Path(__file__).resolve().parent
    code = b"".join((here / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(code).hexdigest()[:16]


def parse_spec(text: str) -> int:
    """How many monsters `monsters` (the default count) or `monsters:N` asks for."""
    name, colon, count = text.partition(":")
    if name != "monsters":
        raise ValueError(f"The data set {text!r} is not one of drawn monsters: write monsters or monsters:2000.")
    if not colon:
        return DEFAULT_COUNT
    if not (count.isascii() and count.isdigit() and len(count) < 8 and int(count) > 0):
        raise ValueError(f"The data set {text!r} needs a count from 1 to 9999999 after the colon, as in monsters:2000.")
    return int(count)


def generate(shards: list[tuple[int, int]], size: int, version: str) -> Iterator[dict]:
    """Rows for `datasets`: the monsters of each shard (first, one past the last), pictures as PNG bytes."""
    for first, end in shards:
        for index in range(first, end):
            buffer = BytesIO()
            draw(index, size).save(buffer, "PNG", compress_level=4)
            yield {"image": {"bytes": buffer.getvalue(), "path": None}, "text": caption(index)}


def load_monsters(count: int, size: int = 512, start: int = 0, num_proc: int | None = None) -> "Dataset":
    """Monsters start..start+count-1 as a `datasets.Dataset` with `image` and `text`, drawn once and then cached."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"The number of monsters is an integer of 1 or more, not {count!r}.")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"The first monster's index is an integer of 0 or more, not {start!r}.")
    check_size(size)  # here, not in a worker
    shards = [(first, min(first + SHARD, start + count)) for first in range(start, start + count, SHARD)]
    workers = min(num_proc or os.cpu_count() or 1, len(shards))
    return Dataset.from_generator(
        generate,
        features=Features({"image": ImageFeature(), "text": Value("string")}),
        gen_kwargs={"shards": shards, "size": size, "version": source_version()},
        num_proc=workers if workers > 1 else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# A sheet to look at
# ---------------------------------------------------------------------------------------------------------------------


def contact_sheet(count: int, size: int, start: int = 0) -> Image.Image:
    """`count` monsters with their captions, in about as many columns as rows; each picture size x size pixels."""
    columns = math.ceil(math.sqrt(count))
    font = ImageFont.load_default(max(9, size // 18))
    line = font.size * 1.25
    text_height = round(line * 5.6)
    sheet = Image.new("RGB", (columns * size, math.ceil(count / columns) * (size + text_height)), "white")
    pen = ImageDraw.Draw(sheet)
    for k in range(count):
        x, y = k % columns * size, k // columns * (size + text_height)
        sheet.paste(draw(start + k, size), (x, y))
        rows = [""]
        for word in caption(start + k).split():
            longer = f"{rows[-1]} {word}".strip()
            rows = [*rows[:-1], longer] if font.getlength(longer) < size * 0.94 else [*rows, word]
        for n, row in enumerate(rows):
            pen.text((x + size / 2, y + size + n * line), row, fill=(70, 66, 74), font=font, anchor="ma")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of monsters with their captions.")
    parser.add_argument("--count", type=int, default=36, help="how many monsters")
    parser.add_argument("--size", type=int, default=200, help="pixels of each picture")
    parser.add_argument("--start", type=int, default=0, help="index of the first")
    parser.add_argument("--output", default="monsters.png", help="the file to write")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count is 1 or more, not {options.count}.")
    try:
        sheet = contact_sheet(options.count, options.size, options.start)
    except ValueError as error:
        parser.error(str(error))
    sheet.save(options.output, optimize=True)
    print(f"Drew {options.count} monsters: {options.output}")


if __name__ == "__main__":
    main()
