"""What the pixels of an image say: its dominant colour, and whether it is a monster on white.

For tests of the drawings, and to judge images that a model made.
"""

import numpy as np
from PIL import Image


def hue_chroma_saturation_value(image: Image.Image, side: int) -> np.ndarray:
    """The image at side x side pixels: hue in degrees, chroma, saturation and value in 0..1, (4, side, side)."""
    from matplotlib.colors import rgb_to_hsv  # here, because it is slow to import

    pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float32) / 255
    hue, saturation, value = np.moveaxis(rgb_to_hsv(pixels), -1, 0)
    return np.stack([360 * hue, saturation * value, saturation, value])


def colour_of(image: Image.Image) -> str:
    """The one of COLOURS, or turquoise, that dominates what is not white in an image; "" for a blank one.

    Every pixel votes with its chroma, so that pale bellies, dark lines and blurred edges count for little.
    """
    hue, chroma, saturation, value = hue_chroma_saturation_value(image, 96)
    pale = (value > 0.80) & (saturation < 0.26)  # white ground, cream bellies, insect wings, highlights in the eyes
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
        "green": vivid & (hue >= 68) & (hue < 160),
        "turquoise": vivid & (hue >= 160) & (hue < 194),
        "blue": vivid & (hue >= 194) & (hue < 246),
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
    """Whether an image shows one thing of a monster's size, about in the middle, on a white ground."""
    from skimage.measure import label, regionprops  # here, because it is slow to import

    _, chroma, _, value = hue_chroma_saturation_value(image, 64)
    ground = (value > 0.90) & (chroma < 0.10)
    rim = np.concatenate([ground[0], ground[-1], ground[:, 0], ground[:, -1]])
    if rim.mean() < 0.90 or ground.all():
        return False
    things = regionprops(label(~ground, connectivity=1))  # pixels that touch along an edge are one thing
    largest = max(things, key=lambda thing: thing.area)
    if not 0.06 < largest.area / ground.size < 0.80 or largest.area < 0.6 * np.count_nonzero(~ground):
        return False
    y, x = np.divide(largest.centroid, ground.shape)
    return bool(0.25 < x < 0.75 and 0.25 < y < 0.75)
