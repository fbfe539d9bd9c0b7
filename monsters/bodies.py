"""Bodies: for each value of `Monster.body`, a function that lays out its parts and says where the rest is attached.

A monster is laid out in units of its own: x to the right, y down, about 1 tall, facing right.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from monsters.drawing import (
    CREAM,
    WHITE,
    Decal,
    Outline,
    Part,
    Point,
    ellipse,
    is_dark,
    limb_colour,
    marking_colour,
    mix,
    spline,
    symmetric,
    transform,
    tube,
)
from monsters.record import RGB, Monster

Ellipse = tuple[float, float, float, float]  # centre x and y, radius in x and in y
WingRoot = tuple[float, float, bool, float]  # x and y, mirrored, scale


@dataclass
class Body:
    """A body laid out: its parts behind and in front of the head, and where head, wings and tail are attached."""

    back: list[Part]
    front: list[Part]
    head: Ellipse  # the face is drawn on it
    wings: list[WingRoot]
    tail: Point = (0.0, 0.0)  # its root
    own_head: bool = True  # False: the head is a place on the body, which is drawn already
    beak: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# What several bodies have: patterns, bellies, feet, arms
# ---------------------------------------------------------------------------------------------------------------------


def marking_decals(m: Monster, area: Ellipse, from_the_side: bool = False, avoid: Ellipse | None = None) -> list[Decal]:
    """Spots or stripes on the ellipse `area`; spots leave out the ellipse `avoid`, where the face is.

    Stripes run down from the back of a body seen from the side, and in from the left and the right of another.
    """
    if m.pattern == "plain":
        return []
    rng = random.Random(f"markings {m.index}")
    cx, cy, rx, ry = area
    shapes: list[Outline] = []
    if m.pattern == "spots":
        centres: list[Point] = []
        for _ in range(60):  # tries; the first eleven spots that touch no other are kept
            a, r = rng.random() * 2 * math.pi, math.sqrt(rng.random()) * 0.98
            x, y, size = cx + rx * r * math.cos(a), cy + ry * r * math.sin(a), (0.16 + 0.1 * rng.random()) * min(rx, ry)
            if avoid:
                ax, ay, arx, ary = avoid
                if ((x - ax) / (arx + size)) ** 2 + ((y - ay) / (ary + size)) ** 2 <= 1:
                    continue
            if all(math.dist((x, y), centre) > size * 2.9 for centre in centres):
                centres.append((x, y))
                shapes.append(ellipse(x, y, size * 1.08, size * 0.92, a))
        shapes = shapes[:11]
    else:
        angles = (-145, -118, -90, -62, -35) if from_the_side else (-38, -10, 18, 142, 170, 198)
        for degrees in angles:
            a = math.radians(degrees + 5 * rng.random())
            far, near = 1.12, 0.52 + 0.1 * rng.random()
            if from_the_side:
                top = (cx + rx * 0.95 * math.cos(a), cy + ry * far * math.sin(a))
                end = (top[0] + 0.04, cy + ry * 0.15)
            else:
                top = (cx + rx * far * math.cos(a), cy + ry * far * math.sin(a))
                end = (cx + rx * near * math.cos(a), cy + ry * (near * math.sin(a) + 0.06))
            middle = ((top[0] + end[0]) / 2 + 0.01, (top[1] + end[1]) / 2 + 0.02)
            shapes.append(tube([top, middle, end], (0.13 * min(rx, ry), 0.10 * min(rx, ry), 0.012)))
    return [(shapes, marking_colour(m.base))] if shapes else []


def forehead_decals(m: Monster, head: Ellipse) -> list[Decal]:
    """The pattern on a head that is not part of the body, above the face."""
    cx, cy, rx, ry = head
    middle = cx + 0.16 * rx * m.turn
    if m.pattern == "spots":
        places = ((-0.62, -0.52, 0.13), (-0.25, -0.72, 0.10), (0.66, -0.46, 0.11), (-0.84, 0.14, 0.10))
        spots = [ellipse(middle + x * rx, cy + y * ry, size * rx, size * rx) for x, y, size in places]
        return [(spots, marking_colour(m.base))]
    if m.pattern == "stripes":
        stripes = []
        for x, depth in ((-0.34, 0.26), (0.0, 0.38), (0.34, 0.26)):
            end = (middle + 0.85 * x * rx, cy - ry * (0.98 - depth - 0.1 * abs(x)))
            stripes.append(tube([(middle + x * rx, cy - ry * 1.05), end], (0.075 * rx, 0.02 * rx)))
        return [(stripes, marking_colour(m.base))]
    return []


def belly_colour(skin: RGB) -> RGB:
    return mix(skin, CREAM, 0.80) if not is_dark(skin) else mix(skin, WHITE, 0.55)


def belly_decals(m: Monster, cx: float, cy: float, rx: float, ry: float, tilt: float = 0.0) -> list[Decal]:
    """A pale belly as decals, with bands across it if it is striped."""
    if m.belly == "none":
        return []
    decals = [([ellipse(cx, cy, rx, ry, tilt)], belly_colour(m.base))]
    if m.belly == "striped":
        bands = []
        for k in (-0.55, -0.18, 0.19, 0.56):
            half = rx * math.sqrt(1 - k * k) * 0.98
            y = ry * k
            line = [(-half, y - ry * 0.05), (0, y + ry * 0.07), (half, y - ry * 0.05)]
            bands.append(transform(tube(line, (ry * 0.05, ry * 0.075, ry * 0.05)), cx, cy, angle=tilt))
        decals.append((bands, mix(belly_colour(m.base), m.base, 0.85)))
    return decals


def foot(x: float, y: float, w: float, h: float) -> Outline:
    """A foot with its toes to the right, w and h its half width and height."""
    shape = [(-1, 0), (-0.7, -1), (0.2, -1.1), (1, -0.1), (0.75, 0.55), (-0.7, 0.55)]
    return spline([(x + w * dx, y + h * dy) for dx, dy in shape])


def arms(m: Monster, x: float, y: float, length: float, width: float) -> list[Part]:
    """A pair of arms, the left one first; `m.arm` says how far they are raised."""
    result = []
    for mirror, up in ((True, m.arm), (False, m.arm * 0.6 - 0.25)):
        elbow, hand = (length * 0.5, 0.07 - up * 0.08), (length, 0.12 - up * 0.24)
        arm = tube([(0, 0), elbow, hand], (width, width * 0.86, width * 1.12), 9)
        result.append(Part("arm", [transform(arm, -x if mirror else x, y, mirror=mirror)], m.base))
    return result


def wing_pair(x: float, y: float, scale: float) -> list[WingRoot]:
    """Two wings, one on each side of a body that is seen from the front."""
    return [(-x, y, True, scale), (x, y, False, scale)]


# ---------------------------------------------------------------------------------------------------------------------
# The bodies
# ---------------------------------------------------------------------------------------------------------------------


def round_body(m: Monster) -> Body:
    w, h = 0.47 * m.plump, 0.45
    body = ellipse(0, 0, w, h, count=64)
    decals = marking_decals(m, (0, 0, w, h), avoid=(0.05, -0.03, w * 0.62, h * 0.45))
    decals += belly_decals(m, 0.02, h * 0.62, w * 0.56, h * 0.42)
    feet = [Part("leg", [foot(s * 0.22, h * 0.98, 0.16 * m.limb, 0.085)], limb_colour(m.base)) for s in (-1, 1)]
    return Body(
        back=feet + arms(m, w * 0.86, 0.05, 0.24 * m.limb, 0.078),
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.06, w * 0.92, h * 0.80),
        wings=wing_pair(0.26, -0.10, 0.62),
        tail=(-w * 0.72, 0.26),
        own_head=False,
    )


def pear_body(m: Monster) -> Body:
    w = 0.42 * m.plump
    shoulder = [(0, -0.56), (0.20, -0.52), (0.29, -0.36), (0.29, -0.18)]
    body = symmetric([*shoulder, (w * 0.92, 0.08), (w, 0.28), (w * 0.72, 0.46), (0, 0.51)])
    decals = marking_decals(m, (0, 0.12, w, 0.42), avoid=(0.03, -0.28, 0.24, 0.2))
    decals += belly_decals(m, 0.02, 0.24, w * 0.62, 0.22)
    feet = [Part("leg", [foot(s * 0.2, 0.50, 0.15 * m.limb, 0.08)], limb_colour(m.base)) for s in (-1, 1)]
    return Body(
        back=feet + arms(m, w * 0.74, 0.02, 0.26 * m.limb, 0.065),
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.29, 0.31, 0.27),
        wings=wing_pair(0.2, -0.02, 0.66),
        tail=(-w * 0.7, 0.34),
        own_head=False,
    )


def two_legged(m: Monster) -> Body:
    w, leg = 0.25 * m.plump, 0.16 * m.limb
    torso = symmetric([(0, -0.22), (w * 0.7, -0.14), (w, 0.12), (w * 0.86, 0.30), (0, 0.36)])
    legs = []
    for s in (-1, 1):
        x = s * w * 0.58
        line = [(x, 0.22), (x + s * 0.02, 0.30 + leg * 0.5), (x + s * 0.02, 0.32 + leg)]
        legs += [tube(line, (0.11, 0.095, 0.085)), foot(x + s * 0.05 + 0.02, 0.37 + leg, 0.14, 0.07)]
    decals = marking_decals(m, (0, 0.08, w, 0.26), avoid=(0.0, -0.3, 0.2, 0.2))
    decals += belly_decals(m, 0.01, 0.12, w * 0.62, 0.20)
    body = Part("body", [*legs, torso], m.base, decals)
    near = arms(m, w * 0.76, -0.03, 0.25 * m.limb, 0.062)
    return Body(
        back=near[:1],
        front=[body, near[1]],
        head=(0.0, -0.36, 0.35 * m.head_size, 0.30 * m.head_size),
        wings=wing_pair(0.10, -0.05, 0.66),
        tail=(-w * 0.6, 0.24),
    )


def four_legged(m: Monster) -> Body:
    h, leg = 0.235 * m.plump, 0.20 * m.limb
    back = [(-0.46, 0.06), (-0.36, -0.12), (-0.08, -0.13 - 0.02 * m.plump), (0.2, -0.16), (0.34, 0.0)]
    trunk = spline([*back, (0.28, h), (-0.04, h + 0.06), (-0.36, h + 0.02)])
    ground = h + leg

    def leg_at(x: float, top: float) -> list[Outline]:
        line = [(x, top), (x - 0.01, (top + ground) / 2), (x, ground)]
        return [tube(line, (0.125, 0.095, 0.09)), foot(x + 0.025, ground + 0.05, 0.125, 0.06)]

    far = Part("leg", leg_at(-0.17, h - 0.05) + leg_at(0.33, h - 0.07), limb_colour(m.base))
    near = [*leg_at(-0.34, h - 0.08), *leg_at(0.14, h - 0.06)]
    decals = marking_decals(m, (-0.10, 0.04, 0.36, 0.24), from_the_side=True, avoid=(0.36, -0.2, 0.2, 0.2))
    decals += belly_decals(m, 0.18, h * 0.55, 0.16, 0.20, 0.35)
    return Body(
        back=[far],
        front=[Part("body", [*near, trunk], m.base, decals)],
        head=(0.36, -0.24, 0.30 * m.head_size, 0.27 * m.head_size),
        wings=[(0.02, -0.06, True, 0.58), (-0.08, -0.04, True, 0.68)],
        tail=(-0.40, 0.0),
    )


def serpent(m: Monster) -> Body:
    w = m.plump
    tip = tube([(0.20, 0.42), (0.52, 0.46), (0.66, 0.36), (0.70 + 0.05 * m.arm, 0.20)], (0.13, 0.10, 0.055, 0.012))
    low = ellipse(0, 0.38, 0.43 * w, 0.145)
    high = ellipse(0.02, 0.20, 0.33 * w, 0.135)
    sway = 0.06 * m.arm
    neck_line = [(-0.03 - 0.5 * sway, 0.17), (-0.09 - sway, 0.03), (-0.03, -0.14), (0.10, -0.30)]
    neck = tube(neck_line, (0.17, 0.155, 0.14, 0.13))
    front = tube([(x + 0.07, y + 0.03) for x, y in neck_line], (0.09, 0.085, 0.08, 0.08))
    neck_decals = marking_decals(m, (-0.10, 0.05, 0.20, 0.30), avoid=(0.1, -0.35, 0.16, 0.16))
    if m.belly != "none":
        neck_decals.append(([front], belly_colour(m.base)))
        if m.belly == "striped":
            rungs = [
                tube([(x, y + 0.02), (x + 0.08, y + 0.055), (x + 0.15, y + 0.03)], (0.008, 0.012, 0.008))
                for x, y in spline(neck_line, False, 3)[1:]
            ]
            neck_decals.append((rungs, mix(belly_colour(m.base), m.base, 0.85)))
    low_part = Part("body", [low], m.base, marking_decals(m, (0, 0.38, 0.43 * w, 0.145), from_the_side=True))
    high_part = Part("body", [high], m.base, marking_decals(m, (0.02, 0.2, 0.33 * w, 0.135), from_the_side=True))
    neck_part = Part("body", [neck], m.base, neck_decals)
    return Body(
        back=[Part("body", [tip], m.base)],
        front=[low_part, neck_part, high_part],  # the upper coil hides where the neck begins
        head=(0.14, -0.36, 0.30 * m.head_size, 0.245 * m.head_size),
        wings=[(-0.10, 0.0, False, 0.46), (-0.16, 0.02, True, 0.60)],
    )


def bird(m: Monster) -> Body:
    w, leg = 0.33 * m.plump, 0.13 * m.limb
    beak = (244, 176, 62)
    body = symmetric([(0, -0.30), (w * 0.8, -0.12), (w, 0.12), (w * 0.66, 0.34), (0, 0.41)])
    fans = []
    for a in (0.1, 0.45, 0.8):
        c, s = math.cos(a), math.sin(a)
        line = [(-0.10, 0.22), (-0.10 - 0.26 * c, 0.24 + 0.30 * s), (-0.10 - 0.40 * c, 0.22 + 0.42 * s)]
        fans.append(Part("fan", [tube(line, (0.06, 0.07, 0.045))], limb_colour(m.base)))
    legs = []
    for x in (-0.12, 0.13):
        ground = 0.42 + leg
        toes = [(-0.09, 0.035), (0.01, 0.06), (0.10, 0.03)]
        toes = [tube([(x, ground), (x + dx, ground + dy)], (0.022, 0.018)) for dx, dy in toes]
        legs.append(Part("leg", [tube([(x, 0.34), (x, ground)], (0.024, 0.024)), *toes], beak))
    decals = marking_decals(m, (0, 0.08, w, 0.32), avoid=(0.0, -0.26, 0.24, 0.2))
    decals += belly_decals(m, 0.02, 0.18, w * 0.66, 0.22)
    return Body(
        back=[*fans, *legs],
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.31, 0.31 * m.head_size, 0.275 * m.head_size),
        wings=wing_pair(w * 0.62, -0.02, 0.64),
        beak=True,
    )


def fish(m: Monster) -> Body:
    h = 0.32 * m.plump
    fin = mix(m.base, CREAM, 0.35) if not is_dark(m.base) else limb_colour(m.base)
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
    decals = marking_decals(m, (-0.10, 0, 0.36, h), from_the_side=True, avoid=(0.28, 0, 0.28, 0.22))
    decals += belly_decals(m, 0.10, h * 0.78, 0.34, h * 0.44)
    tail_fin = Part("fin", [tail], fin, [(rays, mix(fin, m.base, 0.7))])
    return Body(
        back=[tail_fin, Part("fin", [dorsal], fin), Part("fin", [below], fin)],
        front=[Part("body", [body], m.base, decals), Part("fin", [side], fin)],
        head=(0.20, -0.03, 0.27, h * 0.86),
        wings=[(-0.02, -h * 0.5, True, 0.42), (-0.10, -h * 0.5, True, 0.52)],
        own_head=False,
    )


def insect(m: Monster) -> Body:
    w = m.plump
    droop = 0.05 * m.arm
    abdomen = ellipse(-0.34, 0.14 + droop, 0.33, 0.22 * w, 0.22 + droop)
    thorax = ellipse(0.02, 0.10, 0.21, 0.19 * w)

    def leg(x: float, reach: float, far: bool) -> Part:
        ground = 0.47 + 0.06 * m.limb - (0.05 if far else 0)
        knee, toe = (x + reach * 0.75, 0.21), (x + reach * 1.1, ground)
        shin = ((knee[0] + toe[0]) / 2 + 0.25 * reach, 0.33)
        shank = tube([(x, 0.17), knee, shin, toe], (0.040, 0.032, 0.028, 0.026))
        return Part("leg", [shank, foot(toe[0] + 0.02, ground + 0.005, 0.05, 0.03)], limb_colour(m.base))

    far = [leg(-0.02, -0.24, True), leg(0.06, 0.03, True), leg(0.10, 0.30, True)]
    near = [leg(-0.10, -0.24, False), leg(0.00, -0.05, False), leg(0.08, 0.19, False)]
    rings = [tube([(x, -0.2), (x + 0.035, 0.14), (x - 0.02, 0.45)], (0.016, 0.016)) for x in (-0.50, -0.36, -0.22)]
    on_back = marking_decals(m, (-0.34, 0.12, 0.32, 0.22 * w), from_the_side=True) or [(rings, limb_colour(m.base))]
    under = belly_decals(m, -0.30, 0.30 + droop, 0.27, 0.12, 0.22)
    return Body(
        back=far,
        front=[Part("body", [abdomen], m.base, on_back + under), *near, Part("body", [thorax], m.base)],
        head=(0.27, -0.13, 0.29 * m.head_size, 0.265 * m.head_size),
        wings=[(0.06, -0.02, True, 0.52), (-0.02, 0.0, True, 0.64)],
    )


def floating(m: Monster) -> Body:
    w, sway = 0.38 * m.plump, 0.06 * m.arm
    right = [(0, -0.50), (w * 0.66, -0.40), (w * 0.95, -0.12), (w, 0.20)]
    left = [(-x, y) for x, y in right[:0:-1]]
    hem = [(1.06, 0.46), (0.72, 0.38), (0.40, 0.52), (0, 0.40), (-0.40, 0.52), (-0.72, 0.38), (-1.0, 0.46)]
    body = spline([*right, *((w * x + sway, y) for x, y in hem), *left])
    decals = marking_decals(m, (0, 0.02, w, 0.46), avoid=(0.04, -0.14, w * 0.6, 0.22))
    decals += belly_decals(m, 0.02, 0.20, w * 0.55, 0.19)
    return Body(
        back=arms(m, w * 0.84, 0.04, 0.22 * m.limb, 0.06),
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.16, w * 0.92, 0.32),
        wings=wing_pair(0.22, -0.08, 0.62),
        tail=(-w * 0.6, 0.30),
        own_head=False,
    )


def blob(m: Monster) -> Body:
    w, h = 0.48 * m.plump, 0.42
    upper = [(0, -h), (w * 0.52, -h * 0.72), (w * 0.86, -0.02)]
    body = symmetric([*upper, (w * 1.03, 0.25), (w * 0.92, 0.385), (w * 0.42, 0.40), (0, 0.385)])
    decals = marking_decals(m, (0, 0.02, w, h), avoid=(0.05, 0.02, w * 0.6, 0.2))
    decals += belly_decals(m, 0.02, 0.27, w * 0.55, 0.15)
    return Body(
        back=[],
        front=[Part("body", [body], m.base, decals)],
        head=(0.0, -0.02, w * 0.80, h * 0.78),
        wings=wing_pair(0.26, -0.04, 0.60),
        tail=(-w * 0.8, 0.26),
        own_head=False,
    )


BODY_PLANS: dict[str, Callable[[Monster], Body]] = {
    "round": round_body, "pear": pear_body, "two legs": two_legged, "four legs": four_legged, "serpent": serpent,
    "bird": bird, "fish": fish, "insect": insect, "floating": floating, "blob": blob,
}  # fmt: skip
