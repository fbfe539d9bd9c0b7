"""Painting smooth shapes with Pillow: closed curves filled with a colour, lit from the upper left, outlined in ink.

Coordinates are fractions of the picture, the square [0, 1] x [0, 1] with y down; pixels appear only in `paint`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

Point = tuple[float, float]
Outline = list[Point]
RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]


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


def darker(colour: RGB) -> RGB:
    """The same colour for things far from the light: far limbs and feet."""
    return mix(colour, WHITE, 0.22) if is_dark(colour) else mix(colour, outline_of(colour), 0.27)


def marking(colour: RGB) -> RGB:
    """The same colour for spots and stripes, set off clearly from the coat."""
    return mix(colour, WHITE, 0.30) if is_dark(colour) else mix(colour, outline_of(colour), 0.38)


def outline_of(colour: RGB) -> RGB:
    """A dark shade of the colour itself, warmer than black."""
    return mix(tuple(round(c * 0.36) for c in colour), INK, 0.35)


def smoothstep(t: float) -> float:
    t = min(1.0, max(0.0, t))
    return t * t * (3 - 2 * t)


# how much shadow and how much gleam there is at each light, 0 = turned away, 128 = flat, 255 = towards the upper left;
# half of it is cel (a soft edge), half airbrush (a long ramp)
SHADOW = [0.75 * smoothstep((114 - light) / 22) + 0.25 * smoothstep((128 - light) / 100) for light in range(256)]
GLEAM = [0.55 * smoothstep((light - 176) / 30) + 0.45 * smoothstep((light - 140) / 100) for light in range(256)]


@lru_cache(maxsize=256)
def light_tables(colour: RGB) -> tuple[list[int], ...]:
    """A colour in every light: three 256-entry tables, light -> red, green and blue."""
    dim = tuple(round(c * k) for c, k in zip(colour, (0.80, 0.73, 0.83), strict=True))  # leans to purple, as shade does
    sunny = mix(tuple(round(c * 255 / max(colour)) for c in colour), (255, 255, 244), 0.60)
    bright = mix(colour, sunny, 0.72 * max(colour) / 255 if not is_dark(colour) else 0.34)
    return tuple(
        [int(mid + (low - mid) * s + (high - mid) * g + 0.5) for s, g in zip(SHADOW, GLEAM, strict=True)]
        for low, mid, high in zip(dim, colour, bright, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


def spline(points: Sequence[Point], closed: bool = True, steps: int = 7) -> Outline:
    """A Catmull-Rom curve through the points, sampled `steps` times between each two."""
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
    """A closed curve from its right half, which runs from the top of the axis x = 0 to the bottom."""
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
    """A round-ended tube along a curve; `widths` are radii, spread evenly from one end to the other."""
    line = spline(spine, closed=False, steps=steps)
    left, right = [], []
    for i, (x, y) in enumerate(line):
        place = i / (len(line) - 1) * (len(widths) - 1)
        k = min(int(place), len(widths) - 2)
        w = widths[k] + (widths[k + 1] - widths[k]) * (place - k)
        (ax, ay), (bx, by) = line[max(0, i - 1)], line[min(len(line) - 1, i + 1)]
        along = math.atan2(by - ay, bx - ax)
        dx, dy = -math.sin(along) * w, math.cos(along) * w
        left.append((x + dx, y + dy))
        right.append((x - dx, y - dy))
        if i == 0:
            start = [(x + w * math.cos(along + a), y + w * math.sin(along + a)) for a in cap_angles(-math.pi / 2, -1)]
        if i == len(line) - 1:
            end = [(x + w * math.cos(along + a), y + w * math.sin(along + a)) for a in cap_angles(math.pi / 2, -1)]
    return [*left, *end, *right[::-1], *start]


def cap_angles(first: float, sign: int) -> list[float]:
    """Seven angles over the half circle that begins at `first`."""
    return [first + sign * math.pi * k / 8 for k in range(1, 8)]


def place(
    outline: Outline, x: float, y: float, scale: float = 1.0, angle: float = 0.0, mirror: bool = False
) -> Outline:
    """Scale, mirror left to right, turn clockwise by radians and move."""
    c, s = math.cos(angle), math.sin(angle)
    sign = -scale if mirror else scale
    return [(x + sign * (px * c - py * s), y + scale * (px * s + py * c)) for px, py in outline]


# ---------------------------------------------------------------------------------------------------------------------
# Painting
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Some outlines painted as one shape; `decals` are (outlines, colour) on it, clipped to it and in its light."""

    name: str
    outlines: list[Outline]
    colour: RGB
    decals: list[tuple[list[Outline], RGB]] = field(default_factory=list)
    flat: bool = False  # one colour, no light (eyes, mouths)
    line: float = 0.0085  # width of the outline in fractions of the picture, 0 = none


def paint(canvas: Image.Image, part: Part) -> None:
    """Paint one part over what is there: its outline beneath, its lit colour, then its decals in the same light."""
    side = canvas.width
    pen = ImageDraw.Draw(canvas)
    outlines = [[(x * side, y * side) for x, y in outline] for outline in part.outlines]
    if part.line:
        nudge = part.line * side * 0.22  # the line is heavier away from the light
        width = max(1, round(part.line * side * 1.5))
        for outline in outlines:
            shifted = [(x + nudge, y + nudge) for x, y in outline]
            pen.line([*shifted, *shifted[:2]], fill=outline_of(part.colour), width=width, joint="curve")
    if part.flat and not part.decals:
        for outline in outlines:
            pen.polygon(outline, fill=part.colour)
        return
    xs, ys = [x for o in outlines for x, _ in o], [y for o in outlines for _, y in o]
    left, top = max(0, math.floor(min(xs)) - 1), max(0, math.floor(min(ys)) - 1)
    width, height = min(side, math.ceil(max(xs)) + 2) - left, min(side, math.ceil(max(ys)) + 2) - top

    def stencil(shapes: list[Outline], scale: float) -> Image.Image:
        mask = Image.new("L", (width, height), 0)
        stylus = ImageDraw.Draw(mask)
        for shape in shapes:
            stylus.polygon([(x * scale - left, y * scale - top) for x, y in shape], fill=255)
        return mask

    mask = stencil(outlines, 1)
    light = None if part.flat else light_on(mask)

    def coat(colour: RGB, where: Image.Image) -> None:
        paint_of = (
            colour if light is None else Image.merge("RGB", [light.point(table) for table in light_tables(colour)])
        )
        canvas.paste(paint_of, (left, top) if light is None else (left, top, left + width, top + height), where)

    coat(part.colour, mask)
    for shapes, colour in part.decals:
        coat(colour, ImageChops.multiply(stencil(shapes, side), mask))


def light_on(mask: Image.Image) -> Image.Image:
    """How much a shape swells towards the upper left: its blurred mask in relief, 128 = neither towards nor away."""
    width, height = mask.size
    short = min(width, height)
    factor = max(1, short // 36)
    small = mask.reduce(factor)
    radius = 0.125 * short / factor
    shift = max(1, round(0.10 * short / factor))
    pad = shift + 2
    padded = Image.new("L", (small.width + 2 * pad, small.height + 2 * pad), 0)
    padded.paste(small, (pad, pad))
    swollen = padded.filter(ImageFilter.GaussianBlur(radius))

    def seen_from(dx: int) -> Image.Image:
        return swollen.crop((pad + dx, pad + dx, pad + dx + small.width, pad + dx + small.height))

    relief = ImageChops.subtract(seen_from(shift), seen_from(-shift), scale=1.2, offset=128)
    return relief.resize((small.width * factor, small.height * factor), Image.Resampling.BILINEAR).crop(
        (0, 0, width, height)
    )
