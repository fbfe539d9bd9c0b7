"""What a monster is: the values that each attribute can take, and the record that `roll` makes of an index.

The index seeds a `random.Random`, and every attribute follows from it: the same index is the same monster everywhere.
"""

import colorsys
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]

# ---------------------------------------------------------------------------------------------------------------------
# The values of each attribute
# ---------------------------------------------------------------------------------------------------------------------

# name -> hue in degrees, saturation, value, each a range; far enough apart for `checks.colour_of` to tell them apart
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
TURQUOISE = 10_000_000  # monster TURQUOISE + i is monster i in a colour that no other has: something new to learn
TURQUOISE_HUE, TURQUOISE_SATURATION, TURQUOISE_VALUE = (172, 180), (0.58, 0.72), (0.72, 0.84)
ELEMENTS = ("fire", "water", "grass", "electric", "ice", "rock", "ghost", "poison", "fairy")
PATTERNS = ("plain", "spots", "stripes")
BELLIES = ("none", "plain", "striped")
MOODS = ("smiling", "laughing", "grumpy", "surprised", "sleepy", "sad", "winking")
CRESTS = ("none", "pointed ears", "round ears", "long ears", "horns", "horn", "antennae")
WINGS = ("none", "bat", "feathered", "insect")
TAILS = ("none", "long", "curly", "bushy", "pointed")
MOTIF_PLACES = ("head", "tail", "around")

# body -> the wings and tails it can have; a fish's tail fin and a bird's fan of feathers do not count as tails
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


def combinations() -> int:
    """How many monsters differ in attributes that have names, before any pose or proportion."""
    count = 0
    for wings, tails in BODIES.values():
        for tail in tails:
            places = 3 if tail in ("long", "curly", "pointed") else 2
            count += len(wings) * (places * len(CRESTS) - 1)  # a single horn leaves no room for the motif on the head
    return count * len(COLOURS) * len(ELEMENTS) * len(PATTERNS) * len(BELLIES) * len(MOODS)


# ---------------------------------------------------------------------------------------------------------------------
# One monster
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monster:
    """Everything about one monster: attributes as words, pose and proportions as numbers, and where its parts are.

    `boxes` maps a part's name to (left, top, right, bottom) in fractions of the image, 0..1. There are always
    "monster" (all of it), "body", "head", "eyes", "mouth" and "motif", and "wings", "tail", "crest" where it has them.
    """

    index: int
    body: str
    colour: str
    element: str
    motif_place: str  # where the sign of its element is: "head", "tail" (the tip) or "around" (floating beside it)
    pattern: str
    belly: str
    wings: str
    tail: str
    crest: str  # ears, horns or antennae
    mood: str
    bead_eyes: bool  # small black eyes, else big ones with a coloured iris
    cheeks: bool
    base: RGB  # the colour of its skin
    iris: RGB
    facing: int  # 1 = to the right, -1 = to the left
    size: float  # longer side of the monster, fraction of the image
    x: float  # position within the room that is left, -1..1
    y: float
    lean: float  # radians
    turn: float  # 0 = seen from the front, 1 = looking to the side
    plump: float  # this and the next three are proportions around 1
    head_size: float
    eye_size: float
    limb: float
    arm: float  # -1 = hanging, 1 = raised
    wing_size: float  # a proportion around 1
    wing_lift: float  # radians
    boxes: dict[str, Box] = field(default_factory=dict, compare=False)


def rgb_from_hsv(hue: float, saturation: float, value: float) -> RGB:
    """RGB 0..255 of a hue in degrees and a saturation and value in 0..1."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def roll(index: int) -> Monster:
    """The attributes of monster `index` (int >= 0), without boxes."""
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"A monster's index is an integer of 0 or more, not {index!r}.")
    if index >= TURQUOISE:
        rng, ranges = random.Random(f"turquoise {index}"), (TURQUOISE_HUE, TURQUOISE_SATURATION, TURQUOISE_VALUE)
        hue, saturation, value = (low + (high - low) * rng.random() for low, high in ranges)
        base = rgb_from_hsv(hue, saturation, value)
        return replace(roll(index - TURQUOISE), index=index, colour="turquoise", base=base)
    rng = random.Random(f"pocket monster {index}")

    # Only `random()` is used: it alone is promised to give the same numbers in every version of Python.
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
        base=rgb_from_hsv(hue, saturation, value), iris=rgb_from_hsv(iris_hue, 0.75, 0.80),
        facing=pick((1, -1)), size=between(0.80, 0.95), x=between(-1, 1), y=between(-1, 1), lean=between(-0.10, 0.10),
        turn=between(0.45, 0.85) if from_the_side else between(0.0, 0.5),
        plump=between(0.88, 1.14), head_size=between(0.92, 1.12), eye_size=between(0.88, 1.2), limb=between(0.85, 1.2),
        arm=between(-1, 1), wing_size=between(0.85, 1.15), wing_lift=between(-0.25, 0.3),
    )  # fmt: skip
