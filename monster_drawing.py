"""How a monster looks: a record of attributes (`monsters.Monster`) laid out as parts and painted on white with Pillow.

A body plan is a list of smooth closed outlines from the back to the front; each is painted with its own colour, lit
from the upper left, over an outline in a dark shade of that colour.

Coordinates: the creature is laid out in units of its own (x right, y down, about 1 tall, facing right), then mirrored,
leaned and fitted into the picture, which is the square [0, 1] x [0, 1]; pixels appear only in `paint`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from monsters import Monster

Point = tuple[float, float]
Outline = list[Point]
RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]


# ---------------------------------------------------------------------------------------------------------------------
# Colour
# ---------------------------------------------------------------------------------------------------------------------

CREAM, WHITE, INK, BONE = (255, 243, 214), (255, 255, 255), (38, 30, 36), (250, 236, 205)


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


@lru_cache(maxsize=256)
def light_tables(colour: RGB) -> tuple[list[int], ...]:
    """Three 256-entry tables, light (0 = turned away, 128 = flat, 255 = towards the upper left) -> red, green, blue."""
    shadow = tuple(round(c * k) for c, k in zip(colour, (0.80, 0.73, 0.83),
        strict=True))  # leans to purple, as shade does
    sunny = mix(tuple(round(c * 255 / max(colour)) for c in colour), (255, 255, 244), 0.60)
    bright = mix(colour, sunny, 0.72 * max(colour) / 255 if not is_dark(colour) else 0.34)
    tables = []
    for low, mid, high in zip(shadow, colour, bright, strict=True):
        table = []
        for light in range(256):
            # half cel (a soft edge), half airbrush (a long ramp)
            shade = 0.75 * smoothstep((114 - light) / 22) + 0.25 * smoothstep((128 - light) / 100)
            gleam = 0.55 * smoothstep((light - 176) / 30) + 0.45 * smoothstep((light - 140) / 100)
            table.append(round(mid + (low - mid) * shade + (high - mid) * gleam))
        tables.append(table)
    return tuple(tables)


def smoothstep(t: float) -> float:
    t = min(1.0, max(0.0, t))
    return t * t * (3 - 2 * t)


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


def place(outline: Outline, x: float, y: float, scale: float = 1.0, angle: float = 0.0,
    mirror: bool = False) -> Outline:
    """Scale, mirror left to right, turn clockwise by radians and move."""
    c, s = math.cos(angle), math.sin(angle)
    sign = -scale if mirror else scale
    return [(x + sign * (px * c - py * s), y + scale * (px * s + py * c)) for px, py in outline]


# ---------------------------------------------------------------------------------------------------------------------
# Parts: outlines with a colour, listed from the back to the front
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


@dataclass
class Anatomy:
    """A body plan laid out: parts behind and in front of the head's level, and where the rest is to be fixed."""

    back: list[Part]
    front: list[Part]
    head: Box  # centre and radii; the face is drawn on it
    wings: list[tuple[float, float, bool, float]]  # root, mirrored, scale
    tail: Point
    own_head: bool = True  # False: the head is the body, and already painted
    beak: bool = False


def markings(m: Monster, cx: float, cy: float, rx: float, ry: float, side: bool, avoid: tuple[float, ...]) -> list:
    """Spots or stripes over the ellipse given; `side`: stripes run down from the back, else in from both flanks."""
    if m.pattern == "plain":
        return []
    rng = random.Random(f"markings {m.index}")
    shapes: list[Outline] = []
    if m.pattern == "spots":
        for _ in range(60):
            a, r = rng.random() * 2 * math.pi, math.sqrt(rng.random()) * 0.98
            x, y, size = cx + rx * r * math.cos(a), cy + ry * r * math.sin(a), (0.16 + 0.1 * rng.random()) * min(rx, ry)
            ax, ay, arx, ary = avoid
            clear = ((x - ax) / (arx + size)) ** 2 + ((y - ay) / (ary + size)) ** 2 > 1
            if clear and all(math.dist((x, y), s[0]) > size * 2.9 for s in shapes):
                shapes.append([(x, y), *ellipse(x, y, size * 1.08, size * 0.92, a)])
        shapes = [s[1:] for s in shapes[:11]]
    else:
        angles = (-145, -118, -90, -62, -35) if side else (-38, -10, 18, 142, 170, 198)
        for degrees in angles:
            a = math.radians(degrees + 5 * rng.random())
            far, near = 1.12, 0.52 + 0.1 * rng.random()
            if side:
                top = (cx + rx * 0.95 * math.cos(a), cy + ry * far * math.sin(a))
                end = (top[0] + 0.04, cy + ry * 0.15)
            else:
                top = (cx + rx * far * math.cos(a), cy + ry * far * math.sin(a))
                end = (cx + rx * near * math.cos(a), cy + ry * (near * math.sin(a) + 0.06))
            middle = ((top[0] + end[0]) / 2 + 0.01, (top[1] + end[1]) / 2 + 0.02)
            shapes.append(tube([top, middle, end], (0.13 * min(rx, ry), 0.10 * min(rx, ry), 0.012)))
    return [(shapes, marking(m.base))] if shapes else []


def forehead(m: Monster, head: Box) -> list:
    """The coat's pattern on a head of its own, above the face."""
    cx, cy, rx, ry = head
    middle = cx + 0.16 * rx * m.turn
    if m.pattern == "spots":
        places = ((-0.62, -0.52, 0.13), (-0.25, -0.72, 0.10), (0.66, -0.46, 0.11), (-0.84, 0.14, 0.10))
        spots = [ellipse(middle + x * rx, cy + y * ry, size * rx, size * rx) for x, y, size in places]
        return [(spots, marking(m.base))]
    if m.pattern == "stripes":
        stripes = []
        for x, depth in ((-0.34, 0.26), (0.0, 0.38), (0.34, 0.26)):
            end = (middle + 0.85 * x * rx, cy - ry * (0.98 - depth - 0.1 * abs(x)))
            stripes.append(tube([(middle + x * rx, cy - ry * 1.05), end], (0.075 * rx, 0.02 * rx)))
        return [(stripes, marking(m.base))]
    return []


def belly_on(m: Monster, cx: float, cy: float, rx: float, ry: float, tilt: float = 0.0) -> list:
    """A pale belly as decals, with bands across it if it is striped."""
    if m.belly == "none":
        return []
    pale = mix(m.base, CREAM, 0.80) if not is_dark(m.base) else mix(m.base, WHITE, 0.55)
    decals = [([ellipse(cx, cy, rx, ry, tilt)], pale)]
    if m.belly == "striped":
        bands = []
        for k in (-0.55, -0.18, 0.19, 0.56):
            half = rx * math.sqrt(1 - k * k) * 0.98
            y = ry * k
            band = tube([(-half, y - ry * 0.05), (0, y + ry * 0.07), (half, y - ry * 0.05)],
                (ry * 0.05, ry * 0.075, ry * 0.05))
            bands.append(place(band, cx, cy, angle=tilt))
        decals.append((bands, mix(pale, m.base, 0.85)))
    return decals


def foot(x: float, y: float, w: float, h: float) -> Outline:
    return spline([(x - w, y), (x - w * 0.7, y - h), (x + w * 0.2, y - h * 1.1), (x + w, y - h * 0.1),
        (x + w * 0.75, y + h * 0.55), (x - w * 0.7, y + h * 0.55)])


def arms(m: Monster, x: float, y: float, length: float, width: float) -> list[Part]:
    """A pair of arms out of the flanks, both waving by `m.arm`."""
    lift = m.arm
    result = []
    for mirror, up in ((True, lift), (False, lift * 0.6 - 0.25)):
        elbow, hand = (length * 0.5, 0.07 - up * 0.08), (length, 0.12 - up * 0.24)
        arm = tube([(0, 0), elbow, hand], (width, width * 0.86, width * 1.12), 9)
        result.append(Part("arm", [place(arm, -x if mirror else x, y, mirror=mirror)], m.base))
    return result


def round_body(m: Monster) -> Anatomy:
    w, h = 0.47 * m.plump, 0.45
    head = (0.0, -0.06, w * 0.92, h * 0.80)
    body = ellipse(0, 0, w, h, count=64)
    decals = markings(m, 0, 0, w, h, False, (0.05, -0.03, w * 0.62, h * 0.45)) + belly_on(m, 0.02, h * 0.62, w * 0.56,
        h * 0.42)
    feet = [Part("leg", [foot(s * 0.22, h * 0.98, 0.16 * m.limb, 0.085)], darker(m.base)) for s in (-1, 1)]
    back = feet + arms(m, w * 0.86, 0.05, 0.24 * m.limb, 0.078)
    return Anatomy(back, [Part("body", [body], m.base, decals)], head, both_wings(m, 0.26, -0.10, 0.62),
        (-w * 0.72, 0.26), False)


def pear_body(m: Monster) -> Anatomy:
    w = 0.42 * m.plump
    half = [(0, -0.56), (0.20, -0.52), (0.29, -0.36), (0.29, -0.18), (w * 0.92, 0.08), (w, 0.28), (w * 0.72, 0.46),
        (0, 0.51)]
    body = symmetric(half)
    decals = markings(m, 0, 0.12, w, 0.42, False, (0.03, -0.28, 0.24, 0.2)) + belly_on(m, 0.02, 0.24, w * 0.62, 0.22)
    feet = [Part("leg", [foot(s * 0.2, 0.50, 0.15 * m.limb, 0.08)], darker(m.base)) for s in (-1, 1)]
    return Anatomy(feet + arms(m, w * 0.74, 0.02, 0.26 * m.limb, 0.065), [Part("body", [body], m.base, decals)],
                   (0.0, -0.29, 0.31, 0.27), both_wings(m, 0.2, -0.02, 0.66), (-w * 0.7, 0.34), False)  # fmt: skip


def two_legged(m: Monster) -> Anatomy:
    w, leg = 0.25 * m.plump, 0.16 * m.limb
    torso = symmetric([(0, -0.22), (w * 0.7, -0.14), (w, 0.12), (w * 0.86, 0.30), (0, 0.36)])
    legs = []
    for s in (-1, 1):
        x = s * w * 0.58
        legs += [tube([(x, 0.22), (x + s * 0.02, 0.30 + leg * 0.5), (x + s * 0.02, 0.32 + leg)],
            (0.11, 0.095, 0.085)), foot(x + s * 0.05 + 0.02, 0.37 + leg, 0.14, 0.07)]
    decals = markings(m, 0, 0.08, w, 0.26, False, (0.0, -0.3, 0.2, 0.2)) + belly_on(m, 0.01, 0.12, w * 0.62, 0.20)
    body = Part("body", [*legs, torso], m.base, decals)
    near = arms(m, w * 0.76, -0.03, 0.25 * m.limb, 0.062)
    return Anatomy(near[:1], [body, near[1]], (0.0, -0.36, 0.35 * m.head_size, 0.30 * m.head_size),
        both_wings(m, 0.10, -0.05, 0.66), (-w * 0.6, 0.24))


def four_legged(m: Monster) -> Anatomy:
    h, leg = 0.235 * m.plump, 0.20 * m.limb
    trunk = spline([(-0.46, 0.06), (-0.36, -0.12), (-0.08, -0.13 - 0.02 * m.plump), (0.2, -0.16), (0.34, 0.0),
        (0.28, h), (-0.04, h + 0.06), (-0.36, h + 0.02)])
    ground = h + leg

    def leg_at(x: float, top: float) -> list[Outline]:
        return [tube([(x, top), (x - 0.01, (top + ground) / 2), (x, ground)], (0.125, 0.095, 0.09)),
            foot(x + 0.025, ground + 0.05, 0.125, 0.06)]

    far = Part("leg", leg_at(-0.17, h - 0.05) + leg_at(0.33, h - 0.07), darker(m.base))
    near = [*leg_at(-0.34, h - 0.08), *leg_at(0.14, h - 0.06)]
    decals = markings(m, -0.10, 0.04, 0.36, 0.24, True, (0.36, -0.2, 0.2, 0.2)) + belly_on(m, 0.18, h * 0.55, 0.16,
        0.20, 0.35)
    back = -0.06
    wings = [(back + 0.08, -0.06, True, 0.58), (back - 0.02, -0.04, True, 0.68)]
    return Anatomy([far], [Part("body", [*near, trunk], m.base, decals)],
                   (0.36, -0.24, 0.30 * m.head_size, 0.27 * m.head_size), wings, (-0.40, 0.0))  # fmt: skip


def serpent(m: Monster) -> Anatomy:
    w = m.plump
    tip = tube([(0.20, 0.42), (0.52, 0.46), (0.66, 0.36), (0.70 + 0.05 * m.arm, 0.20)], (0.13, 0.10, 0.055, 0.012))
    low = ellipse(0, 0.38, 0.43 * w, 0.145)
    high = ellipse(0.02, 0.20, 0.33 * w, 0.135)
    sway = 0.10 * m.arm
    neck_line = [(-0.03 - 0.5 * sway, 0.17), (-0.09 - sway, 0.03), (-0.03, -0.14), (0.10, -0.30)]
    neck = tube(neck_line, (0.17, 0.155, 0.14, 0.13))
    front = tube([(x + 0.07, y + 0.03) for x, y in neck_line], (0.09, 0.085, 0.08, 0.08))
    neck_decals = markings(m, -0.10, 0.05, 0.20, 0.30, False, (0.1, -0.35, 0.16, 0.16))
    if m.belly != "none":
        pale = belly_on(m, 0, 0, 1, 1)[0][1]
        neck_decals.append(([front], pale))
        if m.belly == "striped":
            rungs = [tube([(x + 0.0, y + 0.02), (x + 0.08, y + 0.055), (x + 0.15, y + 0.03)], (0.008, 0.012, 0.008))
                for x, y in spline(neck_line, False, 3)[1:]]
            neck_decals.append((rungs, mix(pale, m.base, 0.85)))
    low_part = Part("body", [low], m.base, markings(m, 0, 0.38, 0.43 * w, 0.145, True, (9, 9, 0.1, 0.1)))
    high_part = Part("body", [high], m.base, markings(m, 0.02, 0.2, 0.33 * w, 0.135, True, (9, 9, 0.1, 0.1)))
    neck_part = Part("body", [neck], m.base, neck_decals)
    wings = [(-0.10, 0.0, False, 0.46), (-0.16, 0.02, True, 0.60)]
    return Anatomy([Part("body", [tip], m.base)], [low_part, neck_part, high_part],
                   (0.14, -0.36, 0.30 * m.head_size, 0.245 * m.head_size), wings, (0.5, 0.4))  # fmt: skip


def bird(m: Monster) -> Anatomy:
    w, leg = 0.33 * m.plump, 0.13 * m.limb
    beak = (244, 176, 62)
    body = symmetric([(0, -0.30), (w * 0.8, -0.12), (w, 0.12), (w * 0.66, 0.34), (0, 0.41)])
    fan = [tube([(-0.10, 0.22), (-0.10 - 0.26 * math.cos(a), 0.24 + 0.30 * math.sin(a)),
        (-0.10 - 0.40 * math.cos(a), 0.22 + 0.42 * math.sin(a))], (0.06, 0.07, 0.045)) for a in (0.1, 0.45, 0.8)]
    legs = []
    for x in (-0.12, 0.13):
        ground = 0.42 + leg
        toes = [tube([(x, ground), (x + dx, ground + dy)], (0.022, 0.018)) for dx,
            dy in ((-0.09, 0.035), (0.01, 0.06), (0.10, 0.03))]
        legs.append(Part("leg", [tube([(x, 0.34), (x, ground)], (0.024, 0.024)), *toes], beak))
    decals = markings(m, 0, 0.08, w, 0.32, False, (0.0, -0.26, 0.24, 0.2)) + belly_on(m, 0.02, 0.18, w * 0.66, 0.22)
    fans = [Part("fan", [f], darker(m.base)) for f in fan]
    return Anatomy([*fans, *legs], [Part("body", [body], m.base, decals)],
        (0.0, -0.31, 0.31 * m.head_size, 0.275 * m.head_size),
                   both_wings(m, w * 0.62, -0.02, 0.64), (0, 0), beak=True)  # fmt: skip


def fish(m: Monster) -> Anatomy:
    h = 0.32 * m.plump
    fin = mix(m.base, CREAM, 0.35) if not is_dark(m.base) else darker(m.base)
    body = spline([(0.47, 0.02), (0.36, -h * 0.74), (0.06, -h), (-0.26, -h * 0.62), (-0.46, -0.05), (-0.44, 0.08),
        (-0.24, h * 0.68), (0.06, h), (0.36, h * 0.78)])
    flick = 0.08 * m.arm
    tail = spline([(-0.40, 0.0), (-0.58, -0.24 + flick), (-0.76, -0.30 + flick), (-0.72, -0.08 + flick),
        (-0.66, 0.03 + flick), (-0.73, 0.14 + flick), (-0.74, 0.32 + flick), (-0.56, 0.22 + flick)])
    rays = [tube([(-0.44, 0.01), (-0.68, y + flick)], (0.008, 0.008)) for y in (-0.18, -0.05, 0.09, 0.20)]
    dorsal = spline([(0.16, -h * 0.8), (0.02, -h - 0.17 * m.limb), (-0.20, -h - 0.20 * m.limb), (-0.20, -h * 0.95),
        (-0.26, -h * 0.5)])
    below = spline([(0.04, h * 0.7), (-0.06, h + 0.15 * m.limb), (-0.22, h + 0.16 * m.limb), (-0.20, h * 0.6)])
    side = spline([(-0.02, 0.08), (-0.16, 0.02), (-0.30, 0.10 - 0.08 * m.arm), (-0.28, 0.22 - 0.08 * m.arm),
        (-0.12, 0.22)])
    decals = markings(m, -0.10, 0, 0.36, h, True, (0.28, 0, 0.28, 0.22)) + belly_on(m, 0.10, h * 0.78, 0.34, h * 0.44)
    behind = [Part("fin", [tail], fin, [(rays, mix(fin, m.base, 0.7))]), Part("fin", [dorsal], fin),
        Part("fin", [below], fin)]
    return Anatomy(behind, [Part("body", [body], m.base, decals), Part("fin", [side], fin)],
        (0.20, -0.03, 0.27, h * 0.86),
                   [(-0.02, -h * 0.5, True, 0.42), (-0.10, -h * 0.5, True, 0.52)], (0, 0), False)  # fmt: skip


def insect(m: Monster) -> Anatomy:
    w = m.plump
    droop = 0.05 * m.arm
    abdomen = ellipse(-0.34, 0.14 + droop, 0.33, 0.22 * w, 0.22 + droop)
    thorax = ellipse(0.02, 0.10, 0.21, 0.19 * w)

    def leg(x: float, reach: float, far: bool) -> Part:
        ground = 0.47 + 0.06 * m.limb - (0.05 if far else 0)
        knee, toe = (x + reach * 0.75, 0.21), (x + reach * 1.1, ground)
        shank = tube([(x, 0.17), knee, ((knee[0] + toe[0]) / 2 + 0.25 * reach, 0.33), toe],
            (0.040, 0.032, 0.028, 0.026))
        return Part("leg", [shank, foot(toe[0] + 0.02, ground + 0.005, 0.05, 0.03)], darker(m.base))

    far = [leg(-0.02, -0.24, True), leg(0.06, 0.03, True), leg(0.10, 0.30, True)]
    near = [leg(-0.10, -0.24, False), leg(0.00, -0.05, False), leg(0.08, 0.19, False)]
    rings = [([tube([(x, -0.2), (x + 0.035, 0.14), (x - 0.02, 0.45)], (0.016, 0.016))], darker(m.base))
        for x in (-0.50, -0.36, -0.22)]
    on_back = markings(m, -0.34, 0.12, 0.32, 0.22 * w, True, (9, 9, 0.1, 0.1)) or rings
    under = belly_on(m, -0.30, 0.30 + droop, 0.27, 0.12, 0.22)
    return Anatomy([*far], [Part("body", [abdomen], m.base, on_back + under), *near, Part("body", [thorax], m.base)],
                   (0.27, -0.13, 0.29 * m.head_size, 0.265 * m.head_size), [(0.06, -0.02, True, 0.52),
                       (-0.02, 0.0, True, 0.64)], (0, 0))  # fmt: skip


def floating(m: Monster) -> Anatomy:
    w, sway = 0.38 * m.plump, 0.06 * m.arm
    side = [(0, -0.50), (w * 0.66, -0.40), (w * 0.95, -0.12), (w, 0.20), (w * 1.06 + sway, 0.46)]
    hem = [(w * 0.72 + sway, 0.38), (w * 0.40 + sway, 0.52), (sway, 0.40), (-w * 0.40 + sway, 0.52),
        (-w * 0.72 + sway, 0.38)]
    left = [(-w * 1.0 + sway, 0.46), (-w, 0.20), (-w * 0.95, -0.12), (-w * 0.66, -0.40)]
    decals = markings(m, 0, 0.02, w, 0.46, False, (0.04, -0.14, w * 0.6, 0.22)) + belly_on(m, 0.02, 0.20, w * 0.55,
        0.19)
    return Anatomy(arms(m, w * 0.84, 0.04, 0.22 * m.limb, 0.06),
        [Part("body", [spline(side + hem + left)], m.base, decals)],
                   (0.0, -0.16, w * 0.92, 0.32), both_wings(m, 0.22, -0.08, 0.62), (-w * 0.6, 0.30), False)  # fmt: skip


def blob(m: Monster) -> Anatomy:
    w, h = 0.48 * m.plump, 0.42
    body = symmetric([(0, -h), (w * 0.52, -h * 0.72), (w * 0.86, -0.02), (w * 1.03, 0.25), (w * 0.92, 0.385),
        (w * 0.42, 0.40),
                      (0, 0.385)])
    decals = markings(m, 0, 0.02, w, h, False, (0.05, 0.02, w * 0.6, 0.2)) + belly_on(m, 0.02, 0.27, w * 0.55, 0.15)
    return Anatomy([], [Part("body", [body], m.base, decals)], (0.0, -0.02, w * 0.80, h * 0.78),
        both_wings(m, 0.26, -0.04, 0.60), (-w * 0.8, 0.26), False)


PLANS: dict[str, Callable[[Monster], Anatomy]] = {
    "round": round_body, "pear": pear_body, "two legs": two_legged, "four legs": four_legged, "serpent": serpent,
    "bird": bird, "fish": fish, "insect": insect, "floating": floating, "blob": blob,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is fixed to the body: wings, tail, crest, the element's sign
# ---------------------------------------------------------------------------------------------------------------------


def both_wings(m: Monster, x: float, y: float, scale: float) -> list[tuple[float, float, bool, float]]:
    return [(-x, y, True, scale), (x, y, False, scale)]


def wing(m: Monster, x: float, y: float, mirror: bool, scale: float) -> list[Part]:
    """One wing, its root at (x, y), reaching out and up."""

    def put(outline: Outline) -> Outline:
        return place(outline, x, y, scale * m.wing_size, -0.25 - m.wing_lift, mirror)

    if m.wings == "bat":
        skin = mix(m.base, (120, 60, 110), 0.22) if not is_dark(m.base) else mix(m.base, (150, 110, 190), 0.25)
        wrist, tips = (0.36, -0.42), [(1.02, -0.36), (0.98, 0.06), (0.66, 0.30), (0.10, 0.24)]
        edge = [(0.0, 0.0), *spline([(0.0, 0.0), (0.14, -0.28), wrist], False)[1:],
            *spline([wrist, (0.70, -0.50), tips[0]], False)[1:]]
        for (ax, ay), (bx, by) in pairwise(tips):
            mid = ((ax + bx) / 2 * 0.80 + wrist[0] * 0.20, (ay + by) / 2 * 0.80 + wrist[1] * 0.20)
            edge += spline([(ax, ay), mid, (bx, by)], False)[1:]
        bones = [tube([wrist, ((wrist[0] + tx) / 2 + 0.03, (wrist[1] + ty) / 2 - 0.02), (tx, ty)],
            (0.026, 0.018, 0.008)) for tx, ty in tips[:3]]
        arm = tube([(0, 0.04), (0.14, -0.24), wrist], (0.06, 0.05, 0.04))
        return [Part("wings", [put(edge)], skin, [([put(b) for b in bones], mix(skin, outline_of(skin), 0.45))]),
            Part("wings", [put(arm)], m.base)]
    if m.wings == "feathered":
        pale = mix(m.base, CREAM, 0.82) if not is_dark(m.base) else mix(m.base, WHITE, 0.50)
        parts = []
        for k in range(6):
            a, length = math.radians(48 - 19 * k), 0.52 + 0.095 * k
            c, s = math.cos(a), math.sin(a)
            root = (0.12 + 0.03 * k, -0.04 * k)
            quill = tube([root, (root[0] + length * 0.55 * c, root[1] + length * 0.55 * s + 0.015),
                (root[0] + length * c, root[1] + length * s)], (0.06, 0.105, 0.045))
            parts.append(Part("wings", [put(quill)], pale))
        shoulder = spline([(-0.02, 0.10), (0.02, -0.16), (0.20, -0.30), (0.40, -0.36), (0.46, -0.22), (0.34, -0.04),
            (0.22, 0.14), (0.08, 0.18)])
        return [*parts, Part("wings", [put(shoulder)], m.base)]
    film = mix((206, 228, 240), m.base, 0.10)
    upper = spline([(0, 0), (0.28, -0.24), (0.72, -0.42), (1.0, -0.30), (0.92, -0.06), (0.50, 0.04)])
    lower = spline([(0, 0.02), (0.34, 0.02), (0.68, 0.14), (0.70, 0.32), (0.48, 0.36), (0.20, 0.20)])
    veins = mix(film, outline_of(m.base), 0.40)

    def vein(points: list[Point]) -> Outline:
        return put(tube(points, (0.012, 0.007)))

    return [Part("wings", [put(lower)], film, [([vein([(0, 0.02), (0.36, 0.14), (0.62, 0.26)]),
        vein([(0.1, 0.06), (0.34, 0.22), (0.48, 0.32)])], veins)], line=0.006),
            Part("wings", [put(upper)], film, [([vein([(0, 0), (0.45, -0.22), (0.90, -0.26)]),
                vein([(0.1, -0.04), (0.5, -0.10), (0.86, -0.12)])], veins)], line=0.006)]  # fmt: skip


def tail_of(m: Monster, root: Point) -> tuple[list[Part], Point]:
    """The tail, going off to the left of its root, and the place of its tip."""
    x, y = root
    lift = 0.10 * m.arm
    if m.tail == "long":
        line = [(x + 0.1, y), (x - 0.16, y + 0.10), (x - 0.40, y - 0.02 - lift), (x - 0.46, y - 0.24 - lift),
            (x - 0.40, y - 0.36 - lift)]
        return [Part("tail", [tube(line, (0.10, 0.085, 0.06, 0.045, 0.03))], m.base)], line[-1]
    if m.tail == "curly":
        turns = [(x - 0.24 + 0.15 * (1 - t * 0.75) * math.cos(0.6 + 7.5 * t),
            y - 0.06 - lift + 0.15 * (1 - t * 0.75) * math.sin(0.6 + 7.5 * t)) for t in (k / 9 for k in range(10))]
        return [Part("tail", [tube([(x + 0.1, y + 0.04), *turns], (0.06, 0.05, 0.042, 0.034, 0.028), 4)],
            m.base)], (x - 0.24, y - 0.22 - lift)
    if m.tail == "bushy":
        brush = spline([(x + 0.06, y + 0.04), (x - 0.14, y + 0.16), (x - 0.36, y + 0.10 - lift),
            (x - 0.48, y - 0.14 - lift), (x - 0.42, y - 0.42 - lift), (x - 0.28, y - 0.26 - lift),
            (x - 0.18, y - 0.10), (x - 0.04, y - 0.08)])
        tip = spline([(x - 0.52, y - 0.10 - lift), (x - 0.46, y - 0.55 - lift), (x - 0.20, y - 0.3 - lift),
            (x - 0.29, y - 0.20 - lift), (x - 0.34, y - 0.24 - lift), (x - 0.40, y - 0.12 - lift)])
        return [Part("tail", [brush], m.base, [([tip], mix(m.base, CREAM, 0.8))])], (x - 0.42, y - 0.42 - lift)
    line = [(x + 0.1, y), (x - 0.18, y + 0.12), (x - 0.36, y + 0.02), (x - 0.46, y - 0.16 - lift)]
    px, py = line[-1]
    spade = place([(0.0, -0.14), (0.115, 0.04), (0.03, 0.015), (0, 0.05), (-0.03, 0.015), (-0.115, 0.04)], px - 0.01,
        py - 0.02, 1.0, -0.35)
    return [Part("tail", [tube(line, (0.075, 0.055, 0.040, 0.028))], m.base),
        Part("tail", [spade], darker(m.base))], (px - 0.05, py - 0.12)


def crest_of(m: Monster, head: Box) -> list[Part]:
    """Ears, horns or antennae, their roots hidden by the head that is painted over them."""
    cx, cy, rx, ry = head
    inner = mix((244, 160, 168), m.base, 0.25)
    shift = -0.12 * rx * m.turn
    parts = []
    for mirror in (True, False):
        sign = -1 if mirror else 1
        x, y = cx + shift + sign * rx * 0.60, cy - ry * 0.66

        def put(outline: Outline, angle: float, x: float = x, y: float = y, mirror: bool = mirror) -> Outline:
            return place(outline, x, y, min(rx, ry) * 2.2, angle, mirror)

        if m.crest == "pointed ears":
            ear = spline([(-0.15, 0.14), (-0.12, -0.14), (0.03, -0.46), (0.13, -0.16), (0.17, 0.14)])
            inside = spline([(-0.07, 0.12), (-0.05, -0.10), (0.03, -0.32), (0.08, -0.10), (0.09, 0.12)])
            parts.append(Part("crest", [put(ear, 0.30 + 0.15 * m.arm)], m.base,
                [([put(inside, 0.30 + 0.15 * m.arm)], inner)]))
        elif m.crest == "round ears":
            parts.append(Part("crest", [put(ellipse(0.06, -0.10, 0.19, 0.19), 0.2)], m.base,
                [([put(ellipse(0.06, -0.09, 0.11, 0.11), 0.2)], inner)]))
        elif m.crest == "long ears":
            bend = 0.10 + 0.14 * m.arm
            line = [(0, 0.12), (0.0, -0.20), (bend * 0.4, -0.46), (bend + 0.06, -0.68)]
            parts.append(Part("crest", [put(tube(line, (0.09, 0.12, 0.125, 0.045)), 0.16)], m.base,
                              [([put(tube(line, (0.03, 0.06, 0.065, 0.01)), 0.16)], inner)]))  # fmt: skip
        elif m.crest == "horns":
            horn = tube([(0, 0.10), (0.08, -0.12), (0.10, -0.24), (0.04, -0.40)], (0.10, 0.085, 0.055, 0.01))
            rings = [tube([(-0.1, yy + 0.02), (0.05, yy + 0.03), (0.22, yy - 0.02)], (0.012, 0.012))
                for yy in (-0.04, -0.14, -0.24)]
            parts.append(Part("crest", [put(horn, 0.15)], BONE,
                [([put(r, 0.15) for r in rings], mix(BONE, (150, 110, 80), 0.6))]))
        elif m.crest == "antennae":
            stalk = tube([(-0.10, 0.12), (-0.06, -0.20), (0.04, -0.38), (0.16 + 0.05 * m.arm, -0.48)],
                (0.028, 0.022, 0.02, 0.02))
            parts += [Part("crest", [put(stalk, 0.05)], darker(m.base)),
                Part("crest", [put(ellipse(0.18 + 0.05 * m.arm, -0.50, 0.075, 0.075), 0.05)], m.base)]
    if m.crest == "horn":
        horn = place([(-0.11, 0.12), (-0.07, -0.14), (0.0, -0.50), (0.07, -0.14), (0.11, 0.12)], cx
            + rx * 0.1 * m.turn, cy - ry * 0.86, min(rx, ry) * 2.1, 0.06)
        rings = [tube([(cx - 0.2, cy - ry * (0.9 + k)), (cx + 0.2, cy - ry * (1.0 + k))], (0.007, 0.007))
            for k in (0.20, 0.42, 0.64)]
        parts = [Part("crest", [horn], BONE, [(rings, mix(BONE, (150, 110, 80), 0.6))])]
    return parts


def sign_of(element: str, x: float, y: float, scale: float, angle: float = 0.0, name: str = "motif") -> list[Part]:
    """The element's sign, standing on (x, y), about `scale` high."""

    def put(outline: Outline) -> Outline:
        return place(outline, x, y, scale, angle)

    flame = spline([(0, 0.06), (-0.30, -0.06), (-0.36, -0.36), (-0.20, -0.60), (-0.17, -0.80), (-0.02, -0.66),
        (0.06, -1.06), (0.24, -0.70), (0.36, -0.40), (0.30, -0.06)])
    core = spline([(0, 0.0), (-0.17, -0.08), (-0.19, -0.28), (-0.04, -0.46), (0.03, -0.62), (0.14, -0.42),
        (0.20, -0.22), (0.15, -0.05)])
    if element == "fire":
        return [Part(name, [put(flame)], (240, 98, 38), [([put(core)], (255, 214, 74))])]
    if element == "ghost":
        return [Part(name, [put(flame)], (132, 96, 190), [([put(core)], (226, 208, 250))])]
    if element == "water":
        drop = spline([(0, -1.0), (0.14, -0.66), (0.33, -0.34), (0.26, -0.04), (0, 0.06), (-0.26, -0.04),
            (-0.33, -0.34), (-0.14, -0.66)])
        return [Part(name, [put(drop)], (92, 182, 240), [([put(ellipse(-0.14, -0.28, 0.06, 0.13, 0.4))],
            (226, 246, 255))])]
    if element == "grass":
        leaf = spline([(0, 0), (0.16, -0.22), (0.50, -0.42), (0.86, -0.44), (0.66, -0.14), (0.34, 0.04)])
        rib = tube([(0, 0), (0.36, -0.20), (0.74, -0.38)], (0.03, 0.012))
        parts = [Part(name, [put(tube([(0, 0.06), (0.0, -0.20), (0.02, -0.34)], (0.045, 0.035)))], (92, 150, 62))]
        for tilt, mirror, size in ((-0.35, False, 0.95), (-0.15, True, 0.80)):
            parts.append(Part(name, [put(place(leaf, 0.01, -0.30, size, tilt, mirror))], (110, 190, 74),
                [([put(place(rib, 0.01, -0.30, size, tilt, mirror))], (66, 132, 56))]))
        return parts
    if element == "electric":
        bolt = [(0.16, -1.04), (-0.30, -0.46), (-0.04, -0.44), (-0.16, 0.08), (0.32, -0.60), (0.05, -0.62),
            (0.34, -1.04)]
        return [Part(name, [put(bolt)], (255, 216, 50))]
    if element == "ice":
        parts = []
        for dx, tilt, size in ((-0.16, -0.45, 0.66), (0.17, 0.45, 0.70), (0.0, 0.0, 1.0)):
            shard = [(-0.17, 0.06), (-0.20, -0.62), (0, -1.02), (0.20, -0.62), (0.17, 0.06)]
            facet = [(-0.05, 0.1), (-0.05, -0.62), (0, -1.02), (0.20, -0.62), (0.17, 0.1)]
            parts.append(Part(name, [put(place(shard, dx, 0, size, tilt))], (206, 240, 250),
                [([put(place(facet, dx, 0, size, tilt))], (150, 212, 238))], line=0.007))
        return parts
    if element == "rock":
        parts = []
        for dx, dy, size in ((-0.26, -0.02, 0.62), (0.28, 0.0, 0.56), (0.02, -0.12, 0.95)):
            stone = [(-0.36, 0.10), (-0.44, -0.22), (-0.22, -0.58), (0.12, -0.66), (0.42, -0.34), (0.38, 0.06),
                (0.0, 0.18)]
            face = [(0.12, -0.66), (0.02, -0.22), (0.38, 0.10), (0.46, -0.34)]
            parts.append(Part(name, [put(place(stone, dx, dy, size))], (168, 152, 134),
                [([put(place(face, dx, dy, size))], (132, 116, 104))]))
        return parts
    if element == "poison":
        return [Part(name, [put(ellipse(bx, by, r, r))], (170, 82, 186),
            [([put(ellipse(bx - r * 0.35, by - r * 0.4, r * 0.22, r * 0.3, 0.6))], (244, 214, 250))])
                for bx, by, r in ((-0.22, -0.20, 0.26), (0.24, -0.32, 0.21), (-0.02, -0.72, 0.17))]  # fmt: skip
    star = []
    for k in range(10):
        r, a = (0.56 if k % 2 == 0 else 0.27), math.pi * (k / 5 - 0.5)
        star.append((r * math.cos(a), -0.46 + r * math.sin(a)))
    return [Part(name, [put(star)], (255, 158, 200), [([put(ellipse(-0.10, -0.58, 0.07, 0.11, 0.6))],
        (255, 236, 246))])]


# ---------------------------------------------------------------------------------------------------------------------
# The face
# ---------------------------------------------------------------------------------------------------------------------


def face_of(m: Monster, head: Box, beak: bool) -> list[Part]:
    """Eyes, mouth and cheeks on the head's ellipse; the mood is in all of them."""
    cx, cy, rx, ry = head
    unit = min(rx, ry)
    middle = cx + 0.30 * rx * m.turn
    spread, eye_y = rx * (0.47 - 0.07 * m.turn), cy - ry * 0.02
    ink = (236, 230, 236) if is_dark(m.base) else mix(outline_of(m.base), INK, 0.5)
    parts: list[Part] = []

    def flat(name: str, outline: Outline, colour: RGB) -> None:
        parts.append(Part(name, [outline], colour, flat=True, line=0))

    for sign in (-1, 1):
        squeeze = 1 - 0.16 * m.turn * (sign == 1)  # the far eye of a turned head is narrower
        ex = middle + sign * spread
        wide = 1.16 if m.mood == "surprised" else 1.0
        if m.bead_eyes:
            ew, eh = unit * 0.17 * m.eye_size * squeeze * wide, unit * 0.22 * m.eye_size * wide
        else:
            ew, eh = unit * 0.24 * m.eye_size * squeeze * wide, unit * 0.30 * m.eye_size * wide
        if m.mood == "laughing" or (m.mood == "winking" and sign == 1):
            flat("eyes", tube([(ex - ew, eye_y + eh * 0.25), (ex - ew * 0.6, eye_y - eh * 0.28),
                (ex, eye_y - eh * 0.45), (ex + ew * 0.6, eye_y - eh * 0.28), (ex + ew, eye_y + eh * 0.25)],
                (0.008, 0.016, 0.018, 0.016, 0.008)), ink)
            continue
        rim = INK if not is_dark(m.base) else (16, 14, 20)
        if m.bead_eyes:
            if is_dark(m.base):
                flat("eyes", ellipse(ex, eye_y, ew * 1.22, eh * 1.18), (240, 236, 244))
            flat("eyes", ellipse(ex, eye_y, ew, eh), INK)
            gaze_x, gaze_y, pupil = ex, eye_y, ew
        else:
            flat("eyes", ellipse(ex, eye_y, ew + 0.011, eh + 0.011), rim)
            flat("eyes", ellipse(ex, eye_y, ew, eh), WHITE)
            small = 0.66 if m.mood == "surprised" else 1.0
            gaze_x, gaze_y, pupil = ex + ew * (0.24 * m.turn - 0.10 * sign), eye_y + eh * 0.06, ew * 0.60 * small
            iw, ih = ew * 0.82 * small, eh * 0.80 * small
            flat("eyes", ellipse(gaze_x, gaze_y, iw, ih), mix(m.iris, INK, 0.45))
            flat("eyes", ellipse(gaze_x, gaze_y + ih * 0.12, iw * 0.90, ih * 0.84), m.iris)
            flat("eyes", ellipse(gaze_x, gaze_y, pupil * 0.92, ih * 0.70), INK)
        shine = ew if m.bead_eyes else ew * 0.80
        flat("eyes", ellipse(gaze_x - shine * 0.30, gaze_y - eh * 0.34, shine * 0.34, eh * 0.24), WHITE)
        flat("eyes", ellipse(gaze_x + shine * 0.34, gaze_y + eh * 0.34, shine * 0.16, eh * 0.12), WHITE)
        if m.mood in ("sleepy", "grumpy", "sad"):
            # a lid: the upper part of a slightly larger eye, cut along a line; its slope is the mood
            inner, outer = {"sleepy": (0.05, 0.10), "grumpy": (0.0, -0.62), "sad": (-0.72, -0.10)}[m.mood]
            big_w, big_h = ew * 1.20 + 0.008, eh * 1.16 + 0.008
            arc = [(ex + big_w * math.cos(a), eye_y + big_h * math.sin(a))
                for a in (math.pi * (1 + k / 16) for k in range(17))]
            left, right = (outer, inner) if sign == -1 else (inner, outer)
            edge = [(ex + big_w, eye_y + eh * right), (ex - big_w, eye_y + eh * left)]
            lid = [(x, min(y, edge[1][1] + (edge[0][1] - edge[1][1]) * (x - ex + big_w) / (2 * big_w))) for x, y in arc]
            flat("eyes", [*lid, *edge], mix(m.base, outline_of(m.base), 0.10))
            flat("eyes", tube(edge[::-1], (0.011, 0.011)), ink)

    mouth_y, half = cy + ry * 0.46, rx * 0.24
    mx = middle + 0.04 * rx * m.turn
    if m.cheeks:
        blush = mix(m.base, (255, 106, 120), 0.50)
        for sign in (-1, 1):
            flat("cheeks", ellipse(middle + sign * (spread + unit * 0.26), cy + ry * 0.36, unit * 0.15, unit * 0.095),
                blush)
    if m.body in ("two legs", "four legs", "round") and m.crest.endswith("ears"):
        nose = spline([(mx - rx * 0.09, cy + ry * 0.29), (mx + rx * 0.09, cy + ry * 0.29), (mx, cy + ry * 0.38)])
        flat("nose", nose, ink)
    if beak:
        bend = {"smiling": -1, "laughing": -1.4, "winking": -1, "grumpy": 1.2, "sad": 1.3}.get(m.mood, 0) * unit * 0.07
        agape = unit * {"laughing": 0.22, "surprised": 0.26}.get(m.mood, 0.0)
        orange = (246, 178, 60)
        by, bw = cy + ry * 0.30, unit * 0.34
        lower = spline([(mx - bw * 0.7, by), (mx, by + unit * 0.20 + agape), (mx + bw * 0.7, by)])
        upper = spline([(mx - bw, by + bend), (mx - bw * 0.5, by - unit * 0.14), (mx, by - unit * 0.2),
            (mx + bw * 0.5, by - unit * 0.14), (mx + bw, by + bend), (mx + bw * 0.3, by + unit * 0.10),
            (mx, by + unit * 0.24), (mx - bw * 0.3, by + unit * 0.10)])
        return [*parts, Part("mouth", [lower], (200, 92, 70) if agape else mix(orange, (150, 80, 20), 0.3),
            line=0.007), Part("mouth", [upper], orange, line=0.007)]
    if m.mood in ("laughing", "smiling") and (m.mood == "laughing" or m.eye_size > 1.04):
        w, h = half * 1.15, ry * (0.34 if m.mood == "laughing" else 0.22)
        top = [(mx - w, mouth_y - h * 0.10), (mx, mouth_y + h * 0.06), (mx + w, mouth_y - h * 0.10)]
        gape = [*spline(top, False), *spline([(mx + w, mouth_y - h * 0.10), (mx + w * 0.66, mouth_y + h * 0.72),
            (mx, mouth_y + h), (mx - w * 0.66, mouth_y + h * 0.72), (mx - w, mouth_y - h * 0.10)], False)]
        tongue = ellipse(mx, mouth_y + h * 0.98, w * 0.62, h * 0.52)
        parts.append(Part("mouth", [gape], (120, 34, 44), [([tongue], (240, 126, 132))], flat=True, line=0.009))
    elif m.mood == "surprised":
        parts.append(Part("mouth", [ellipse(mx, mouth_y + ry * 0.08, half * 0.42, ry * 0.15)], (120, 34, 44),
            flat=True, line=0.009))
    else:
        bend = {"smiling": 1.0, "winking": 1.1, "grumpy": -0.9, "sad": -1.0, "sleepy": 0.35}[m.mood] * ry * 0.13
        w = half * (0.6 if m.mood == "sleepy" else 1.0)
        drop = ry * 0.08 if bend < 0 else 0
        flat("mouth", tube([(mx - w, mouth_y + drop - bend * 0.5), (mx - w * 0.5, mouth_y + drop + bend * 0.28),
            (mx, mouth_y + drop + bend * 0.55), (mx + w * 0.5, mouth_y + drop + bend * 0.28),
            (mx + w, mouth_y + drop - bend * 0.5)], (0.007, 0.011, 0.012, 0.011, 0.007)), ink)
        if m.mood == "grumpy":
            flat("mouth", [(mx - w * 0.62, mouth_y + drop - 0.006), (mx - w * 0.28, mouth_y + drop - 0.014),
                (mx - w * 0.44, mouth_y + drop - ry * 0.19)], WHITE)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# The whole creature, fitted into the picture
# ---------------------------------------------------------------------------------------------------------------------


def assemble(m: Monster) -> list[Part]:
    """All parts from the back to the front, in picture coordinates 0..1."""
    anatomy = PLANS[m.body](m)
    head = anatomy.head
    cx, cy, rx, ry = head
    parts: list[Part] = []
    tip = (0.0, 0.0)
    if m.tail != "none":
        tail, tip = tail_of(m, anatomy.tail)
        parts += tail
    if m.wings != "none":
        for root in anatomy.wings:
            parts += wing(m, *root)
    parts += anatomy.back
    if m.motif_place == "tail":
        parts += sign_of(m.element, tip[0], tip[1] + 0.04, 0.30, -0.15)
    crest = crest_of(m, head)
    if m.motif_place == "head":
        crest += sign_of(m.element, cx - 0.1 * rx * m.turn, cy - ry * 0.90, 0.30)
    if anatomy.own_head:
        parts += [*anatomy.front, *crest, Part("head", [ellipse(cx, cy, rx, ry, count=56)], m.base, forehead(m, head))]
    else:
        parts += [*crest, *anatomy.front]
    parts += face_of(m, head, anatomy.beak)
    boxes = bounds(parts)
    if m.motif_place == "around":
        left, top, right, bottom = boxes
        clear_of_face = bottom if cx > 0.1 else (cy + bottom) / 2
        parts += sign_of(m.element, right + 0.03, clear_of_face, 0.24, 0.25)
        parts += sign_of(m.element, left - 0.01, top + 0.24, 0.21, -0.25)

    mirrored = m.facing < 0
    leaning = [replace(p, outlines=[place(o, 0, 0, 1.0, m.lean, mirrored) for o in p.outlines]) for p in parts]
    left, top, right, bottom = bounds(leaning)
    scale = m.size / max(right - left, bottom - top)
    margin = 0.025
    room_x, room_y = 1 - scale * (right - left) - 2 * margin, 1 - scale * (bottom - top) - 2 * margin
    x = margin + room_x * (0.5 + 0.35 * m.x) - scale * left
    y = margin + room_y * (0.5 + 0.35 * m.y) - scale * top

    def fitted(outlines: list[Outline]) -> list[Outline]:
        return [place(outline, x, y, scale, m.lean, mirrored) for outline in outlines]

    return [replace(p, outlines=fitted(p.outlines), decals=[(fitted(o), c) for o, c in p.decals]) for p in parts]


def boxes_of(m: Monster) -> dict[str, Box]:
    """The box of each kind of part as (left, top, right, bottom) in fractions of the picture."""
    parts = assemble(m)
    boxes = {"monster": bounds(parts)}
    for name in dict.fromkeys(part.name for part in parts):
        boxes[name] = bounds([part for part in parts if part.name == name])
    boxes.setdefault("head", boxes["body"])
    return {name: tuple(round(v, 4) for v in box) for name, box in boxes.items()}


def bounds(parts: Sequence[Part]) -> Box:
    points = [point for part in parts for outline in part.outlines for point in outline]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return min(xs), min(ys), max(xs), max(ys)


# ---------------------------------------------------------------------------------------------------------------------
# Painting
# ---------------------------------------------------------------------------------------------------------------------


def render(monster: Monster, size: int = 512) -> Image.Image:
    """A record as an RGB picture; `replace(monster, wings="none")` gives the same monster without its wings."""
    if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= 4096:
        raise ValueError(f"A monster's picture is 16 to 4096 pixels wide, not {size!r}: choose a size in between.")
    oversampling = 4 if size <= 128 else 3 if size <= 1024 else 2
    canvas = Image.new("RGB", (size * oversampling, size * oversampling), WHITE)
    for part in assemble(monster):
        paint(canvas, part)
    return canvas.reduce(oversampling)


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
        paint_of = colour if light is None else Image.merge("RGB",
            [light.point(table) for table in light_tables(colour)])
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
    return relief.resize((small.width * factor, small.height * factor),
        Image.Resampling.BILINEAR).crop((0, 0, width, height))
