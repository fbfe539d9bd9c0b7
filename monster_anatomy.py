"""How a monster is built: its record (`monsters.Monster`) laid out as parts, from the back of the picture to the front.

The creature is laid out in units of its own (x right, y down, about 1 tall, facing right): a body plan says where its
head, wings and tail go, the rest is fixed to them; then all of it is mirrored, leaned and fitted into the picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from monster_drawing import (
    BONE,
    CREAM,
    INK,
    OLD_BONE,
    RGB,
    WHITE,
    Box,
    Outline,
    Part,
    Point,
    darker,
    ellipse,
    is_dark,
    marking,
    mix,
    outline_of,
    place,
    spline,
    symmetric,
    tube,
)

if TYPE_CHECKING:
    from monsters import Monster


# ---------------------------------------------------------------------------------------------------------------------
# Body plans
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Anatomy:
    """A body plan laid out: parts behind and in front of the head's level, and where the rest is to be fixed."""

    back: list[Part]
    front: list[Part]
    head: Box  # centre and radii; the face is drawn on it
    wings: list[tuple[float, float, bool, float]]  # root, mirrored, scale
    tail: Point = (0.0, 0.0)  # its root
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
            line = [(-half, y - ry * 0.05), (0, y + ry * 0.07), (half, y - ry * 0.05)]
            bands.append(place(tube(line, (ry * 0.05, ry * 0.075, ry * 0.05)), cx, cy, angle=tilt))
        decals.append((bands, mix(pale, m.base, 0.85)))
    return decals


def foot(x: float, y: float, w: float, h: float) -> Outline:
    """A foot with its toes to the right, w and h its half width and height."""
    shape = [(-1, 0), (-0.7, -1), (0.2, -1.1), (1, -0.1), (0.75, 0.55), (-0.7, 0.55)]
    return spline([(x + w * dx, y + h * dy) for dx, dy in shape])


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
    body = ellipse(0, 0, w, h, count=64)
    decals = markings(m, 0, 0, w, h, False, (0.05, -0.03, w * 0.62, h * 0.45))
    decals += belly_on(m, 0.02, h * 0.62, w * 0.56, h * 0.42)
    feet = [Part("leg", [foot(s * 0.22, h * 0.98, 0.16 * m.limb, 0.085)], darker(m.base)) for s in (-1, 1)]
    return Anatomy(
        back=feet + arms(m, w * 0.86, 0.05, 0.24 * m.limb, 0.078),
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.06, w * 0.92, h * 0.80),
        wings=both_wings(0.26, -0.10, 0.62),
        tail=(-w * 0.72, 0.26),
        own_head=False,
    )


def pear_body(m: Monster) -> Anatomy:
    w = 0.42 * m.plump
    shoulder = [(0, -0.56), (0.20, -0.52), (0.29, -0.36), (0.29, -0.18)]
    body = symmetric([*shoulder, (w * 0.92, 0.08), (w, 0.28), (w * 0.72, 0.46), (0, 0.51)])
    decals = markings(m, 0, 0.12, w, 0.42, False, (0.03, -0.28, 0.24, 0.2)) + belly_on(m, 0.02, 0.24, w * 0.62, 0.22)
    feet = [Part("leg", [foot(s * 0.2, 0.50, 0.15 * m.limb, 0.08)], darker(m.base)) for s in (-1, 1)]
    return Anatomy(
        back=feet + arms(m, w * 0.74, 0.02, 0.26 * m.limb, 0.065),
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.29, 0.31, 0.27),
        wings=both_wings(0.2, -0.02, 0.66),
        tail=(-w * 0.7, 0.34),
        own_head=False,
    )


def two_legged(m: Monster) -> Anatomy:
    w, leg = 0.25 * m.plump, 0.16 * m.limb
    torso = symmetric([(0, -0.22), (w * 0.7, -0.14), (w, 0.12), (w * 0.86, 0.30), (0, 0.36)])
    legs = []
    for s in (-1, 1):
        x = s * w * 0.58
        line = [(x, 0.22), (x + s * 0.02, 0.30 + leg * 0.5), (x + s * 0.02, 0.32 + leg)]
        legs += [tube(line, (0.11, 0.095, 0.085)), foot(x + s * 0.05 + 0.02, 0.37 + leg, 0.14, 0.07)]
    decals = markings(m, 0, 0.08, w, 0.26, False, (0.0, -0.3, 0.2, 0.2)) + belly_on(m, 0.01, 0.12, w * 0.62, 0.20)
    body = Part("body", [*legs, torso], m.base, decals)
    near = arms(m, w * 0.76, -0.03, 0.25 * m.limb, 0.062)
    return Anatomy(
        back=near[:1],
        front=[body, near[1]],
        head=(0.0, -0.36, 0.35 * m.head_size, 0.30 * m.head_size),
        wings=both_wings(0.10, -0.05, 0.66),
        tail=(-w * 0.6, 0.24),
    )


def four_legged(m: Monster) -> Anatomy:
    h, leg = 0.235 * m.plump, 0.20 * m.limb
    back = [(-0.46, 0.06), (-0.36, -0.12), (-0.08, -0.13 - 0.02 * m.plump), (0.2, -0.16), (0.34, 0.0)]
    trunk = spline([*back, (0.28, h), (-0.04, h + 0.06), (-0.36, h + 0.02)])
    ground = h + leg

    def leg_at(x: float, top: float) -> list[Outline]:
        line = [(x, top), (x - 0.01, (top + ground) / 2), (x, ground)]
        return [tube(line, (0.125, 0.095, 0.09)), foot(x + 0.025, ground + 0.05, 0.125, 0.06)]

    far = Part("leg", leg_at(-0.17, h - 0.05) + leg_at(0.33, h - 0.07), darker(m.base))
    near = [*leg_at(-0.34, h - 0.08), *leg_at(0.14, h - 0.06)]
    decals = markings(m, -0.10, 0.04, 0.36, 0.24, True, (0.36, -0.2, 0.2, 0.2))
    decals += belly_on(m, 0.18, h * 0.55, 0.16, 0.20, 0.35)
    return Anatomy(
        back=[far],
        front=[Part("body", [*near, trunk], m.base, decals)],
        head=(0.36, -0.24, 0.30 * m.head_size, 0.27 * m.head_size),
        wings=[(0.02, -0.06, True, 0.58), (-0.08, -0.04, True, 0.68)],
        tail=(-0.40, 0.0),
    )


def serpent(m: Monster) -> Anatomy:
    w = m.plump
    tip = tube([(0.20, 0.42), (0.52, 0.46), (0.66, 0.36), (0.70 + 0.05 * m.arm, 0.20)], (0.13, 0.10, 0.055, 0.012))
    low = ellipse(0, 0.38, 0.43 * w, 0.145)
    high = ellipse(0.02, 0.20, 0.33 * w, 0.135)
    sway = 0.06 * m.arm
    neck_line = [(-0.03 - 0.5 * sway, 0.17), (-0.09 - sway, 0.03), (-0.03, -0.14), (0.10, -0.30)]
    neck = tube(neck_line, (0.17, 0.155, 0.14, 0.13))
    front = tube([(x + 0.07, y + 0.03) for x, y in neck_line], (0.09, 0.085, 0.08, 0.08))
    neck_decals = markings(m, -0.10, 0.05, 0.20, 0.30, False, (0.1, -0.35, 0.16, 0.16))
    if m.belly != "none":
        pale = belly_on(m, 0, 0, 1, 1)[0][1]
        neck_decals.append(([front], pale))
        if m.belly == "striped":
            rungs = [
                tube([(x, y + 0.02), (x + 0.08, y + 0.055), (x + 0.15, y + 0.03)], (0.008, 0.012, 0.008))
                for x, y in spline(neck_line, False, 3)[1:]
            ]
            neck_decals.append((rungs, mix(pale, m.base, 0.85)))
    low_part = Part("body", [low], m.base, markings(m, 0, 0.38, 0.43 * w, 0.145, True, (9, 9, 0.1, 0.1)))
    high_part = Part("body", [high], m.base, markings(m, 0.02, 0.2, 0.33 * w, 0.135, True, (9, 9, 0.1, 0.1)))
    neck_part = Part("body", [neck], m.base, neck_decals)
    return Anatomy(
        back=[Part("body", [tip], m.base)],
        front=[low_part, neck_part, high_part],  # the upper coil hides where the neck begins
        head=(0.14, -0.36, 0.30 * m.head_size, 0.245 * m.head_size),
        wings=[(-0.10, 0.0, False, 0.46), (-0.16, 0.02, True, 0.60)],
    )


def bird(m: Monster) -> Anatomy:
    w, leg = 0.33 * m.plump, 0.13 * m.limb
    beak = (244, 176, 62)
    body = symmetric([(0, -0.30), (w * 0.8, -0.12), (w, 0.12), (w * 0.66, 0.34), (0, 0.41)])
    fans = []
    for a in (0.1, 0.45, 0.8):
        c, s = math.cos(a), math.sin(a)
        line = [(-0.10, 0.22), (-0.10 - 0.26 * c, 0.24 + 0.30 * s), (-0.10 - 0.40 * c, 0.22 + 0.42 * s)]
        fans.append(Part("fan", [tube(line, (0.06, 0.07, 0.045))], darker(m.base)))
    legs = []
    for x in (-0.12, 0.13):
        ground = 0.42 + leg
        toes = [(-0.09, 0.035), (0.01, 0.06), (0.10, 0.03)]
        toes = [tube([(x, ground), (x + dx, ground + dy)], (0.022, 0.018)) for dx, dy in toes]
        legs.append(Part("leg", [tube([(x, 0.34), (x, ground)], (0.024, 0.024)), *toes], beak))
    decals = markings(m, 0, 0.08, w, 0.32, False, (0.0, -0.26, 0.24, 0.2)) + belly_on(m, 0.02, 0.18, w * 0.66, 0.22)
    return Anatomy(
        back=[*fans, *legs],
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.31, 0.31 * m.head_size, 0.275 * m.head_size),
        wings=both_wings(w * 0.62, -0.02, 0.64),
        beak=True,
    )


def fish(m: Monster) -> Anatomy:
    h = 0.32 * m.plump
    fin = mix(m.base, CREAM, 0.35) if not is_dark(m.base) else darker(m.base)
    back = [(0.47, 0.02), (0.36, -h * 0.74), (0.06, -h), (-0.26, -h * 0.62), (-0.46, -0.05)]
    body = spline([*back, (-0.44, 0.08), (-0.24, h * 0.68), (0.06, h), (0.36, h * 0.78)])
    flick, long = 0.08 * m.arm, m.limb
    tips = [(-0.58, -0.24), (-0.76, -0.30), (-0.72, -0.08), (-0.66, 0.03), (-0.73, 0.14), (-0.74, 0.32), (-0.56, 0.22)]
    tail = spline([(-0.40, 0.0), *((x, y + flick) for x, y in tips)])
    rays = [tube([(-0.44, 0.01), (-0.68, y + flick)], (0.008, 0.008)) for y in (-0.18, -0.05, 0.09, 0.20)]
    crown = [(0.16, -h * 0.8), (0.02, -h - 0.17 * long), (-0.20, -h - 0.20 * long)]
    dorsal = spline([*crown, (-0.20, -h * 0.95), (-0.26, -h * 0.5)])
    below = spline([(0.04, h * 0.7), (-0.06, h + 0.15 * long), (-0.22, h + 0.16 * long), (-0.20, h * 0.6)])
    side = spline([(-0.02, 0.08), (-0.16, 0.02), (-0.30, 0.10 - flick), (-0.28, 0.22 - flick), (-0.12, 0.22)])
    decals = markings(m, -0.10, 0, 0.36, h, True, (0.28, 0, 0.28, 0.22)) + belly_on(m, 0.10, h * 0.78, 0.34, h * 0.44)
    tail_fin = Part("fin", [tail], fin, [(rays, mix(fin, m.base, 0.7))])
    return Anatomy(
        back=[tail_fin, Part("fin", [dorsal], fin), Part("fin", [below], fin)],
        front=[Part("body", [body], m.base, decals), Part("fin", [side], fin)],
        head=(0.20, -0.03, 0.27, h * 0.86),
        wings=[(-0.02, -h * 0.5, True, 0.42), (-0.10, -h * 0.5, True, 0.52)],
        own_head=False,
    )


def insect(m: Monster) -> Anatomy:
    w = m.plump
    droop = 0.05 * m.arm
    abdomen = ellipse(-0.34, 0.14 + droop, 0.33, 0.22 * w, 0.22 + droop)
    thorax = ellipse(0.02, 0.10, 0.21, 0.19 * w)

    def leg(x: float, reach: float, far: bool) -> Part:
        ground = 0.47 + 0.06 * m.limb - (0.05 if far else 0)
        knee, toe = (x + reach * 0.75, 0.21), (x + reach * 1.1, ground)
        shin = ((knee[0] + toe[0]) / 2 + 0.25 * reach, 0.33)
        shank = tube([(x, 0.17), knee, shin, toe], (0.040, 0.032, 0.028, 0.026))
        return Part("leg", [shank, foot(toe[0] + 0.02, ground + 0.005, 0.05, 0.03)], darker(m.base))

    far = [leg(-0.02, -0.24, True), leg(0.06, 0.03, True), leg(0.10, 0.30, True)]
    near = [leg(-0.10, -0.24, False), leg(0.00, -0.05, False), leg(0.08, 0.19, False)]
    rings = [tube([(x, -0.2), (x + 0.035, 0.14), (x - 0.02, 0.45)], (0.016, 0.016)) for x in (-0.50, -0.36, -0.22)]
    on_back = markings(m, -0.34, 0.12, 0.32, 0.22 * w, True, (9, 9, 0.1, 0.1)) or [(rings, darker(m.base))]
    under = belly_on(m, -0.30, 0.30 + droop, 0.27, 0.12, 0.22)
    return Anatomy(
        back=far,
        front=[Part("body", [abdomen], m.base, on_back + under), *near, Part("body", [thorax], m.base)],
        head=(0.27, -0.13, 0.29 * m.head_size, 0.265 * m.head_size),
        wings=[(0.06, -0.02, True, 0.52), (-0.02, 0.0, True, 0.64)],
    )


def floating(m: Monster) -> Anatomy:
    w, sway = 0.38 * m.plump, 0.06 * m.arm
    right = [(0, -0.50), (w * 0.66, -0.40), (w * 0.95, -0.12), (w, 0.20)]
    left = [(-x, y) for x, y in right[:0:-1]]
    hem = [(1.06, 0.46), (0.72, 0.38), (0.40, 0.52), (0, 0.40), (-0.40, 0.52), (-0.72, 0.38), (-1.0, 0.46)]
    body = spline([*right, *((w * x + sway, y) for x, y in hem), *left])
    decals = markings(m, 0, 0.02, w, 0.46, False, (0.04, -0.14, w * 0.6, 0.22))
    decals += belly_on(m, 0.02, 0.20, w * 0.55, 0.19)
    return Anatomy(
        back=arms(m, w * 0.84, 0.04, 0.22 * m.limb, 0.06),
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.16, w * 0.92, 0.32),
        wings=both_wings(0.22, -0.08, 0.62),
        tail=(-w * 0.6, 0.30),
        own_head=False,
    )


def blob(m: Monster) -> Anatomy:
    w, h = 0.48 * m.plump, 0.42
    upper = [(0, -h), (w * 0.52, -h * 0.72), (w * 0.86, -0.02)]
    body = symmetric([*upper, (w * 1.03, 0.25), (w * 0.92, 0.385), (w * 0.42, 0.40), (0, 0.385)])
    decals = markings(m, 0, 0.02, w, h, False, (0.05, 0.02, w * 0.6, 0.2)) + belly_on(m, 0.02, 0.27, w * 0.55, 0.15)
    return Anatomy(
        back=[],
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.02, w * 0.80, h * 0.78),
        wings=both_wings(0.26, -0.04, 0.60),
        tail=(-w * 0.8, 0.26),
        own_head=False,
    )


PLANS: dict[str, Callable[[Monster], Anatomy]] = {
    "round": round_body, "pear": pear_body, "two legs": two_legged, "four legs": four_legged, "serpent": serpent,
    "bird": bird, "fish": fish, "insect": insect, "floating": floating, "blob": blob,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is fixed to the body: wings, tail, crest, the element's sign
# ---------------------------------------------------------------------------------------------------------------------


def both_wings(x: float, y: float, scale: float) -> list[tuple[float, float, bool, float]]:
    return [(-x, y, True, scale), (x, y, False, scale)]


def wing(m: Monster, x: float, y: float, mirror: bool, scale: float) -> list[Part]:
    """One wing, its root at (x, y), reaching out and up."""

    def put(outline: Outline) -> Outline:
        return place(outline, x, y, scale * m.wing_size, -0.25 - m.wing_lift, mirror)

    if m.wings == "bat":
        skin = mix(m.base, (120, 60, 110), 0.22) if not is_dark(m.base) else mix(m.base, (150, 110, 190), 0.25)
        wrist, tips = (0.36, -0.42), [(1.02, -0.36), (0.98, 0.06), (0.66, 0.30), (0.10, 0.24)]
        edge = spline([(0.0, 0.0), (0.14, -0.28), wrist], False)
        edge += spline([wrist, (0.70, -0.50), tips[0]], False)[1:]
        for (ax, ay), (bx, by) in pairwise(tips):
            mid = ((ax + bx) / 2 * 0.80 + wrist[0] * 0.20, (ay + by) / 2 * 0.80 + wrist[1] * 0.20)
            edge += spline([(ax, ay), mid, (bx, by)], False)[1:]
        bones = []
        for x1, y1 in tips[:3]:
            middle = ((wrist[0] + x1) / 2 + 0.03, (wrist[1] + y1) / 2 - 0.02)
            bones.append(put(tube([wrist, middle, (x1, y1)], (0.026, 0.018, 0.008))))
        arm = tube([(0, 0.04), (0.14, -0.24), wrist], (0.06, 0.05, 0.04))
        membrane = Part("wings", [put(edge)], skin, [(bones, mix(skin, outline_of(skin), 0.45))])
        return [membrane, Part("wings", [put(arm)], m.base)]
    if m.wings == "feathered":
        pale = mix(m.base, CREAM, 0.82) if not is_dark(m.base) else mix(m.base, WHITE, 0.50)
        parts = []
        for k in range(6):
            a, length = math.radians(48 - 19 * k), 0.52 + 0.095 * k
            c, s = math.cos(a), math.sin(a)
            root = (0.12 + 0.03 * k, -0.04 * k)
            middle = (root[0] + length * 0.55 * c, root[1] + length * 0.55 * s + 0.015)
            end = (root[0] + length * c, root[1] + length * s)
            parts.append(Part("wings", [put(tube([root, middle, end], (0.06, 0.105, 0.045)))], pale))
        upper = [(-0.02, 0.10), (0.02, -0.16), (0.20, -0.30), (0.40, -0.36), (0.46, -0.22)]
        shoulder = spline([*upper, (0.34, -0.04), (0.22, 0.14), (0.08, 0.18)])
        return [*parts, Part("wings", [put(shoulder)], m.base)]
    film = mix((206, 228, 240), m.base, 0.10)
    upper = spline([(0, 0), (0.28, -0.24), (0.72, -0.42), (1.0, -0.30), (0.92, -0.06), (0.50, 0.04)])
    lower = spline([(0, 0.02), (0.34, 0.02), (0.68, 0.14), (0.70, 0.32), (0.48, 0.36), (0.20, 0.20)])
    veins = mix(film, outline_of(m.base), 0.40)

    parts = []
    for shape, lines in (
        (lower, ([(0, 0.02), (0.36, 0.14), (0.62, 0.26)], [(0.1, 0.06), (0.34, 0.22), (0.48, 0.32)])),
        (upper, ([(0, 0), (0.45, -0.22), (0.90, -0.26)], [(0.1, -0.04), (0.5, -0.10), (0.86, -0.12)])),
    ):
        drawn = [put(tube(line, (0.012, 0.007))) for line in lines]
        parts.append(Part("wings", [put(shape)], film, [(drawn, veins)], line=0.006))
    return parts


def tail_of(m: Monster, root: Point) -> tuple[list[Part], Point]:
    """The tail, going off to the left of its root, and the place of its tip."""
    x, y = root
    lift = 0.10 * m.arm

    def at(points: Sequence[Point], raised: int) -> list[Point]:
        """Points relative to the root; those from number `raised` on move with the lift."""
        return [(x + dx, y + dy - (lift if k >= raised else 0)) for k, (dx, dy) in enumerate(points)]

    if m.tail == "long":
        line = at([(0.1, 0), (-0.16, 0.10), (-0.40, -0.02), (-0.46, -0.24), (-0.40, -0.36)], 2)
        return [Part("tail", [tube(line, (0.10, 0.085, 0.06, 0.045, 0.03))], m.base)], line[-1]
    if m.tail == "curly":
        turns = []
        for k in range(10):
            radius, a = 0.15 * (1 - k / 12), 0.6 + 7.5 * k / 9
            turns.append((-0.24 + radius * math.cos(a), -0.06 + radius * math.sin(a)))
        coil = tube(at([(0.1, 0.04), *turns], 1), (0.06, 0.05, 0.042, 0.034, 0.028), 4)
        return [Part("tail", [coil], m.base)], (x - 0.24, y - 0.22 - lift)
    if m.tail == "bushy":
        near, far = [(-0.18, -0.10), (-0.04, -0.08), (0.06, 0.04), (-0.14, 0.16)], [(-0.36, 0.10), (-0.48, -0.14)]
        brush = spline(at([*near, *far, (-0.42, -0.42), (-0.28, -0.26)], 4))
        tip = [(-0.52, -0.10), (-0.46, -0.55), (-0.20, -0.3), (-0.29, -0.20), (-0.34, -0.24), (-0.40, -0.12)]
        pale = ([spline(at(tip, 0))], mix(m.base, CREAM, 0.8))
        return [Part("tail", [brush], m.base, [pale])], (x - 0.42, y - 0.42 - lift)
    line = at([(0.1, 0), (-0.18, 0.12), (-0.36, 0.02), (-0.46, -0.16)], 3)
    px, py = line[-1]
    spade = [(0.0, -0.14), (0.115, 0.04), (0.03, 0.015), (0, 0.05), (-0.03, 0.015), (-0.115, 0.04)]
    spade = place(spade, px - 0.01, py - 0.02, 1.0, -0.35)
    shaft = tube(line, (0.075, 0.055, 0.040, 0.028))
    return [Part("tail", [shaft], m.base), Part("tail", [spade], darker(m.base))], (px - 0.05, py - 0.12)


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
            tilt = 0.30 + 0.15 * m.arm
            ear = spline([(-0.15, 0.14), (-0.12, -0.14), (0.03, -0.46), (0.13, -0.16), (0.17, 0.14)])
            inside = spline([(-0.07, 0.12), (-0.05, -0.10), (0.03, -0.32), (0.08, -0.10), (0.09, 0.12)])
            parts.append(Part("crest", [put(ear, tilt)], m.base, [([put(inside, tilt)], inner)]))
        elif m.crest == "round ears":
            ear, inside = ellipse(0.06, -0.10, 0.19, 0.19), ellipse(0.06, -0.09, 0.11, 0.11)
            parts.append(Part("crest", [put(ear, 0.2)], m.base, [([put(inside, 0.2)], inner)]))
        elif m.crest == "long ears":
            bend = 0.10 + 0.14 * m.arm
            line = [(0, 0.12), (0.0, -0.20), (bend * 0.4, -0.46), (bend + 0.06, -0.68)]
            ear, inside = tube(line, (0.09, 0.12, 0.125, 0.045)), tube(line, (0.03, 0.06, 0.065, 0.01))
            parts.append(Part("crest", [put(ear, 0.16)], m.base, [([put(inside, 0.16)], inner)]))
        elif m.crest == "horns":
            horn = tube([(0, 0.10), (0.08, -0.12), (0.10, -0.24), (0.04, -0.40)], (0.10, 0.085, 0.055, 0.01))
            rings = []
            for dy in (-0.04, -0.14, -0.24):
                rings.append(put(tube([(-0.1, dy + 0.02), (0.05, dy + 0.03), (0.22, dy - 0.02)], (0.012, 0.012)), 0.15))
            parts.append(Part("crest", [put(horn, 0.15)], BONE, [(rings, OLD_BONE)]))
        elif m.crest == "antennae":
            bend = 0.05 * m.arm
            line = [(-0.10, 0.12), (-0.06, -0.20), (0.04, -0.38), (0.16 + bend, -0.48)]
            stalk, knob = tube(line, (0.028, 0.022, 0.02, 0.02)), ellipse(0.18 + bend, -0.50, 0.075, 0.075)
            parts += [Part("crest", [put(stalk, 0.05)], darker(m.base)), Part("crest", [put(knob, 0.05)], m.base)]
    if m.crest == "horn":
        horn = [(-0.11, 0.12), (-0.07, -0.14), (0.0, -0.50), (0.07, -0.14), (0.11, 0.12)]
        horn = place(horn, cx + rx * 0.1 * m.turn, cy - ry * 0.86, min(rx, ry) * 2.1, 0.06)
        rings = []
        for k in (0.20, 0.42, 0.64):
            rings.append(tube([(cx - 0.2, cy - ry * (0.9 + k)), (cx + 0.2, cy - ry * (1.0 + k))], (0.007, 0.007)))
        parts = [Part("crest", [horn], BONE, [(rings, OLD_BONE)])]
    return parts


FLAME = [(0, 0.06), (-0.30, -0.06), (-0.36, -0.36), (-0.20, -0.60), (-0.17, -0.80), (-0.02, -0.66), (0.06, -1.06),
         (0.24, -0.70), (0.36, -0.40), (0.30, -0.06)]  # fmt: skip
CORE = [(0, 0.0), (-0.17, -0.08), (-0.19, -0.28), (-0.04, -0.46), (0.03, -0.62), (0.14, -0.42), (0.20, -0.22),
        (0.15, -0.05)]  # fmt: skip
DROP = [(0, -1.0), (0.14, -0.66), (0.33, -0.34), (0.26, -0.04), (0, 0.06), (-0.26, -0.04), (-0.33, -0.34),
        (-0.14, -0.66)]  # fmt: skip
LEAF = [(0, 0), (0.16, -0.22), (0.50, -0.42), (0.86, -0.44), (0.66, -0.14), (0.34, 0.04)]
BOLT = [(0.16, -1.04), (-0.30, -0.46), (-0.04, -0.44), (-0.16, 0.08), (0.32, -0.60), (0.05, -0.62), (0.34, -1.04)]
SHARD = [(-0.17, 0.06), (-0.20, -0.62), (0, -1.02), (0.20, -0.62), (0.17, 0.06)]
FACET = [(-0.05, 0.1), (-0.05, -0.62), (0, -1.02), (0.20, -0.62), (0.17, 0.1)]
STONE = [(-0.36, 0.10), (-0.44, -0.22), (-0.22, -0.58), (0.12, -0.66), (0.42, -0.34), (0.38, 0.06), (0.0, 0.18)]
STONE_SIDE = [(0.12, -0.66), (0.02, -0.22), (0.38, 0.10), (0.46, -0.34)]


def sign_of(element: str, x: float, y: float, scale: float, angle: float = 0.0) -> list[Part]:
    """The element's sign, standing on (x, y), about `scale` high."""

    def part(outline: Outline, colour: RGB, inside: Outline = (), inner: RGB = WHITE, line: float = 0.0085) -> Part:
        decals = [([place(inside, x, y, scale, angle)], inner)] if inside else []
        return Part("motif", [place(outline, x, y, scale, angle)], colour, decals, line=line)

    if element == "fire":
        return [part(spline(FLAME), (240, 98, 38), spline(CORE), (255, 214, 74))]
    if element == "ghost":
        return [part(spline(FLAME), (132, 96, 190), spline(CORE), (226, 208, 250))]
    if element == "water":
        return [part(spline(DROP), (92, 182, 240), ellipse(-0.14, -0.28, 0.06, 0.13, 0.4), (226, 246, 255))]
    if element == "electric":
        return [part(BOLT, (255, 216, 50))]
    if element == "grass":
        leaf, rib = spline(LEAF), tube([(0, 0), (0.36, -0.20), (0.74, -0.38)], (0.03, 0.012))
        parts = [part(tube([(0, 0.06), (0.0, -0.20), (0.02, -0.34)], (0.045, 0.035)), (92, 150, 62))]
        for *where, mirror in ((0.01, -0.30, 0.95, -0.35, False), (0.01, -0.30, 0.80, -0.15, True)):
            parts.append(part(place(leaf, *where, mirror), (110, 190, 74), place(rib, *where, mirror), (66, 132, 56)))
        return parts
    if element == "ice":
        shards = ((-0.16, 0, 0.66, -0.45), (0.17, 0, 0.70, 0.45), (0.0, 0, 1.0, 0.0))
        return [part(place(SHARD, *s), (206, 240, 250), place(FACET, *s), (150, 212, 238), 0.007) for s in shards]
    if element == "rock":
        stones = ((-0.26, -0.02, 0.62), (0.28, 0.0, 0.56), (0.02, -0.12, 0.95))
        return [part(place(STONE, *s), (168, 152, 134), place(STONE_SIDE, *s), (132, 116, 104)) for s in stones]
    if element == "poison":
        parts = []
        for bx, by, r in ((-0.22, -0.20, 0.26), (0.24, -0.32, 0.21), (-0.02, -0.72, 0.17)):
            shine = ellipse(bx - r * 0.35, by - r * 0.4, r * 0.22, r * 0.3, 0.6)
            parts.append(part(ellipse(bx, by, r, r), (170, 82, 186), shine, (244, 214, 250)))
        return parts
    star = []
    for k in range(10):
        r, a = (0.56 if k % 2 == 0 else 0.27), math.pi * (k / 5 - 0.5)
        star.append((r * math.cos(a), -0.46 + r * math.sin(a)))
    return [part(star, (255, 158, 200), ellipse(-0.10, -0.58, 0.07, 0.11, 0.6), (255, 236, 246))]


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
            arch = [(-1, 0.25), (-0.6, -0.28), (0, -0.45), (0.6, -0.28), (1, 0.25)]
            arch = [(ex + ew * dx, eye_y + eh * dy) for dx, dy in arch]
            flat("eyes", tube(arch, (0.008, 0.016, 0.018, 0.016, 0.008)), ink)
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
            arc = ellipse(ex, eye_y, big_w, big_h, math.pi, 32)[:17]
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
            cheek = middle + sign * (spread + unit * 0.26)
            flat("cheeks", ellipse(cheek, cy + ry * 0.36, unit * 0.15, unit * 0.095), blush)
    if m.body in ("two legs", "four legs", "round") and m.crest.endswith("ears"):
        nose = spline([(mx - rx * 0.09, cy + ry * 0.29), (mx + rx * 0.09, cy + ry * 0.29), (mx, cy + ry * 0.38)])
        flat("nose", nose, ink)
    if beak:
        bend = {"smiling": -1, "laughing": -1.4, "winking": -1, "grumpy": 1.2, "sad": 1.3}.get(m.mood, 0) * unit * 0.07
        agape = unit * {"laughing": 0.22, "surprised": 0.26}.get(m.mood, 0.0)
        orange = (246, 178, 60)
        by, bw = cy + ry * 0.30, unit * 0.34
        lower = spline([(mx - bw * 0.7, by), (mx, by + unit * 0.20 + agape), (mx + bw * 0.7, by)])
        half_upper = [(0, -0.2 * unit), (0.5 * bw, -0.14 * unit), (bw, bend), (0.3 * bw, 0.10 * unit), (0, 0.24 * unit)]
        upper = place(symmetric(half_upper), mx, by)
        inside = (200, 92, 70) if agape else mix(orange, (150, 80, 20), 0.3)
        return [*parts, Part("mouth", [lower], inside, line=0.007), Part("mouth", [upper], orange, line=0.007)]
    if m.mood in ("laughing", "smiling") and (m.mood == "laughing" or m.eye_size > 1.04):
        w, h = half * 1.15, ry * (0.34 if m.mood == "laughing" else 0.22)
        top = [(mx - w, mouth_y - h * 0.10), (mx, mouth_y + h * 0.06), (mx + w, mouth_y - h * 0.10)]
        chin = [(mx + w * 0.66, mouth_y + h * 0.72), (mx, mouth_y + h), (mx - w * 0.66, mouth_y + h * 0.72)]
        gape = spline(top, False) + spline([top[2], *chin, top[0]], False)
        tongue = ellipse(mx, mouth_y + h * 0.98, w * 0.62, h * 0.52)
        parts.append(Part("mouth", [gape], (120, 34, 44), [([tongue], (240, 126, 132))], flat=True, line=0.009))
    elif m.mood == "surprised":
        gape = ellipse(mx, mouth_y + ry * 0.08, half * 0.42, ry * 0.15)
        parts.append(Part("mouth", [gape], (120, 34, 44), flat=True, line=0.009))
    else:
        bend = {"smiling": 1.0, "winking": 1.1, "grumpy": -0.9, "sad": -1.0, "sleepy": 0.35}[m.mood] * ry * 0.13
        w = half * (0.6 if m.mood == "sleepy" else 1.0)
        drop = ry * 0.08 if bend < 0 else 0
        lips_y = mouth_y + drop
        lips = [(-1, -0.5), (-0.5, 0.28), (0, 0.55), (0.5, 0.28), (1, -0.5)]
        lips = [(mx + w * dx, lips_y + bend * dy) for dx, dy in lips]
        flat("mouth", tube(lips, (0.007, 0.011, 0.012, 0.011, 0.007)), ink)
        if m.mood == "grumpy":
            gum = [(mx - w * 0.62, lips_y - 0.006), (mx - w * 0.28, lips_y - 0.014)]
            flat("mouth", [*gum, (mx - w * 0.44, lips_y - ry * 0.19)], WHITE)
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
