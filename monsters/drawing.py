"""Drawing smooth shapes with Pillow: closed curves filled with a colour, lit from the upper left, with a dark outline.

Coordinates are fractions of the image, the square [0, 1] x [0, 1] with y down; only `draw_part` deals in pixels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from monsters.record import RGB, Box

Point = tuple[float, float]
Outline = list[Point]  # a closed curve as the corners of a polygon
Decal = tuple[list[Outline], RGB]  # drawn on a part, clipped to it and lit like it


# ---------------------------------------------------------------------------------------------------------------------
# Colour
# ---------------------------------------------------------------------------------------------------------------------

CREAM, WHITE, INK = (255, 243, 214), (255, 255, 255), (38, 30, 36)
BONE, OLD_BONE = (250, 236, 205), (190, 160, 130)


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """`a` at amount 0, `b` at amount 1."""
    return tuple(round(p + (q - p) * amount) for p, q in zip(a, b, strict=True))


def is_dark(colour: RGB) -> bool:
    return max(colour) < 100


def outline_colour(colour: RGB) -> RGB:
    """A dark shade of the colour itself, warmer than black."""
    return mix(tuple(round(c * 0.36) for c in colour), INK, 0.35)


def limb_colour(colour: RGB) -> RGB:
    """For feet and for limbs on the far side: a little darker than the skin, or lighter if the skin is black."""
    return mix(colour, WHITE, 0.22) if is_dark(colour) else mix(colour, outline_colour(colour), 0.27)


def marking_colour(colour: RGB) -> RGB:
    """For spots and stripes: clearly darker than the skin, or lighter if the skin is black."""
    return mix(colour, WHITE, 0.30) if is_dark(colour) else mix(colour, outline_colour(colour), 0.38)


def smoothstep(t: float) -> float:
    t = min(1.0, max(0.0, t))
    return t * t * (3 - 2 * t)


# How much shadow and how much highlight there is at each light: 0 = turned away from it, 128 = flat, 255 = facing it.
# Each is the sum of a steep step, as in a comic, and a gentle one.
SHADOW = [0.75 * smoothstep((114 - light) / 22) + 0.25 * smoothstep((128 - light) / 100) for light in range(256)]
HIGHLIGHT = [0.55 * smoothstep((light - 176) / 30) + 0.45 * smoothstep((light - 140) / 100) for light in range(256)]


@lru_cache(maxsize=256)
def light_tables(colour: RGB) -> tuple[list[int], ...]:
    """A colour in every light: three tables of 256 entries, light -> red, green and blue."""
    dim = tuple(round(c * k) for c, k in zip(colour, (0.80, 0.73, 0.83), strict=True))  # shadows are a little purple
    sunny = mix(tuple(round(c * 255 / max(colour)) for c in colour), (255, 255, 244), 0.60)
    bright = mix(colour, sunny, 0.72 * max(colour) / 255 if not is_dark(colour) else 0.34)
    return tuple(
        [int(mid + (low - mid) * s + (high - mid) * h + 0.5) for s, h in zip(SHADOW, HIGHLIGHT, strict=True)]
        for low, mid, high in zip(dim, colour, bright, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


def spline(points: Sequence[Point], closed: bool = True, steps: int = 7) -> Outline:
    """A Catmull-Rom curve through the points, with `steps` samples from each point to the next."""
    n = len(points)
    result = []
    for i in range(n if closed else n - 1):
        if closed:
            p0, p1, p2, p3 = (points[(i + k) % n] for k in (-1, 0, 1, 2))
        else:
            p0, p1, p2, p3 = (points[min(n - 1, max(0, i + k))] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            a, b = -t + 2 * t * t - t**3, 2 - 5 * t * t + 3 * t**3
            c, d = t + 4 * t * t - 3 * t**3, -t * t + t**3
            result.append(tuple((a * p0[k] + b * p1[k] + c * p2[k] + d * p3[k]) / 2 for k in (0, 1)))
    return result if closed else [*result, points[-1]]


def symmetric(right: Sequence[Point]) -> Outline:
    """A closed curve from its right half, whose points run from top to bottom and begin and end on the axis x = 0."""
    return spline([*right, *((-x, y) for x, y in right[-2:0:-1])])


def ellipse(cx: float, cy: float, rx: float, ry: float, tilt: float = 0.0, count: int = 44) -> Outline:
    """An ellipse, tilted clockwise by radians."""
    c, s = math.cos(tilt), math.sin(tilt)
    result = []
    for i in range(count):
        x, y = rx * math.cos(2 * math.pi * i / count), ry * math.sin(2 * math.pi * i / count)
        result.append((cx + x * c - y * s, cy + x * s + y * c))
    return result


def tube(spine: Sequence[Point], widths: Sequence[float], steps: int = 6) -> Outline:
    """A tube with round ends along a curve; `widths` are its radii at equal distances from end to end."""
    line = spline(spine, closed=False, steps=steps)
    left, right = [], []
    for i, (x, y) in enumerate(line):
        position = i / (len(line) - 1) * (len(widths) - 1)
        k = min(int(position), len(widths) - 2)
        w = widths[k] + (widths[k + 1] - widths[k]) * (position - k)
        (ax, ay), (bx, by) = line[max(0, i - 1)], line[min(len(line) - 1, i + 1)]
        along = math.atan2(by - ay, bx - ax)
        dx, dy = -math.sin(along) * w, math.cos(along) * w
        left.append((x + dx, y + dy))
        right.append((x - dx, y - dy))
        if i == 0:
            start = half_circle(x, y, w, along, -math.pi / 2)
        if i == len(line) - 1:
            end = half_circle(x, y, w, along, math.pi / 2)
    return [*left, *end, *right[::-1], *start]


def half_circle(x: float, y: float, radius: float, along: float, first: float) -> Outline:
    """Seven points, counter-clockwise on the screen, from the angle `first` after the direction `along`."""
    angles = [first - math.pi * k / 8 for k in range(1, 8)]
    return [(x + radius * math.cos(along + a), y + radius * math.sin(along + a)) for a in angles]


def transform(
    outline: Outline, x: float, y: float, scale: float = 1.0, angle: float = 0.0, mirror: bool = False
) -> Outline:
    """Turned clockwise by radians, then mirrored left to right, scaled, and moved by (x, y)."""
    c, s = math.cos(angle), math.sin(angle)
    sign = -scale if mirror else scale
    return [(x + sign * (px * c - py * s), y + scale * (px * s + py * c)) for px, py in outline]


def bounding_box(outlines: Iterable[Outline]) -> Box:
    """(left, top, right, bottom) of all of them."""
    xs, ys = zip(*(point for outline in outlines for point in outline), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Some outlines drawn as one shape."""

    name: str
    outlines: list[Outline]
    colour: RGB
    decals: list[Decal] = field(default_factory=list)
    flat: bool = False  # one colour, no light (eyes, mouths)
    line_width: float = 0.0085  # of the outline, in fractions of the image, 0 = none


def draw_part(canvas: Image.Image, part: Part) -> None:
    """Draws a part over what is there: its outline, its lit colour on top, then its decals in the same light."""
    side = canvas.width
    pen = ImageDraw.Draw(canvas)

    def in_pixels(outlines: list[Outline]) -> list[Outline]:
        return [[(x * side, y * side) for x, y in outline] for outline in outlines]

    outlines = in_pixels(part.outlines)
    if part.line_width:
        offset = part.line_width * side * 0.22  # the line is thicker away from the light
        width = max(1, round(part.line_width * side * 1.5))
        for outline in outlines:
            shifted = [(x + offset, y + offset) for x, y in outline]
            pen.line([*shifted, *shifted[:2]], fill=outline_colour(part.colour), width=width, joint="curve")
    if part.flat and not part.decals:
        for outline in outlines:
            pen.polygon(outline, fill=part.colour)
        return

    x0, y0, x1, y1 = bounding_box(outlines)
    left, top = max(0, math.floor(x0) - 1), max(0, math.floor(y0) - 1)
    right, bottom = min(side, math.ceil(x1) + 2), min(side, math.ceil(y1) + 2)

    def mask_of(shapes: list[Outline]) -> Image.Image:
        mask = Image.new("L", (right - left, bottom - top), 0)
        mask_pen = ImageDraw.Draw(mask)
        for shape in shapes:
            mask_pen.polygon([(x - left, y - top) for x, y in shape], fill=255)
        return mask

    part_mask = mask_of(outlines)
    light = None if part.flat else light_on(part_mask)

    def fill(mask: Image.Image, colour: RGB) -> None:
        lit = colour if light is None else Image.merge("RGB", [light.point(table) for table in light_tables(colour)])
        canvas.paste(lit, (left, top, right, bottom), mask)

    fill(part_mask, part.colour)
    for shapes, colour in part.decals:
        fill(ImageChops.multiply(mask_of(in_pixels(shapes)), part_mask), colour)


def light_on(mask: Image.Image) -> Image.Image:
    """The light on a shape as if it bulged: 255 = facing the upper left, 128 = flat, 0 = facing the lower right.

    The blurred mask is taken for a height; its slope along the diagonal is the light.
    """
    width, height = mask.size
    short = min(width, height)
    factor = max(1, short // 36)
    small = mask.reduce(factor)
    radius = 0.125 * short / factor
    shift = max(1, round(0.10 * short / factor))
    pad = shift + 2
    padded = Image.new("L", (small.width + 2 * pad, small.height + 2 * pad), 0)
    padded.paste(small, (pad, pad))
    relief = padded.filter(ImageFilter.GaussianBlur(radius))

    def shifted(by: int) -> Image.Image:
        return relief.crop((pad + by, pad + by, pad + by + small.width, pad + by + small.height))

    slope = ImageChops.subtract(shifted(shift), shifted(-shift), scale=1.2, offset=128)
    light = slope.resize((small.width * factor, small.height * factor), Image.Resampling.BILINEAR)
    return light.crop((0, 0, width, height))
