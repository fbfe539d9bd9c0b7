"""What is attached to a body: wings, a tail, a crest (ears, horns or antennae) and the motif, the element's sign.

The functions return parts in the monster's own units (`bodies`), those at the back first.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from monsters.bodies import Ellipse
from monsters.drawing import (
    BONE,
    CREAM,
    OLD_BONE,
    WHITE,
    Outline,
    Part,
    Point,
    ellipse,
    is_dark,
    limb_colour,
    mix,
    outline_colour,
    spline,
    transform,
    tube,
)
from monsters.record import RGB, Monster

Attach = Callable[[Outline], Outline]  # moves an outline from around (0, 0) to where it belongs on the monster

# ---------------------------------------------------------------------------------------------------------------------
# Wings
# ---------------------------------------------------------------------------------------------------------------------


def wing_parts(m: Monster, x: float, y: float, mirror: bool, scale: float) -> list[Part]:
    """One wing; it reaches out and up from its root at (x, y)."""

    def attach(outline: Outline) -> Outline:
        return transform(outline, x, y, scale * m.wing_size, -0.25 - m.wing_lift, mirror)

    wing = {"bat": bat_wing, "feathered": feathered_wing, "insect": insect_wing}[m.wings]
    return wing(m, attach)


def bat_wing(m: Monster, attach: Attach) -> list[Part]:
    skin = mix(m.base, (120, 60, 110), 0.22) if not is_dark(m.base) else mix(m.base, (150, 110, 190), 0.25)
    wrist, tips = (0.36, -0.42), [(1.02, -0.36), (0.98, 0.06), (0.66, 0.30), (0.10, 0.24)]
    edge = spline([(0.0, 0.0), (0.14, -0.28), wrist], False)
    edge += spline([wrist, (0.70, -0.50), tips[0]], False)[1:]
    for (ax, ay), (bx, by) in pairwise(tips):
        middle = ((ax + bx) / 2 * 0.80 + wrist[0] * 0.20, (ay + by) / 2 * 0.80 + wrist[1] * 0.20)
        edge += spline([(ax, ay), middle, (bx, by)], False)[1:]
    bones = []
    for x, y in tips[:3]:
        middle = ((wrist[0] + x) / 2 + 0.03, (wrist[1] + y) / 2 - 0.02)
        bones.append(attach(tube([wrist, middle, (x, y)], (0.026, 0.018, 0.008))))
    arm = tube([(0, 0.04), (0.14, -0.24), wrist], (0.06, 0.05, 0.04))
    membrane = Part("wings", [attach(edge)], skin, [(bones, mix(skin, outline_colour(skin), 0.45))])
    return [membrane, Part("wings", [attach(arm)], m.base)]


def feathered_wing(m: Monster, attach: Attach) -> list[Part]:
    pale = mix(m.base, CREAM, 0.82) if not is_dark(m.base) else mix(m.base, WHITE, 0.50)
    feathers = []
    for k in range(6):
        a, length = math.radians(48 - 19 * k), 0.52 + 0.095 * k
        c, s = math.cos(a), math.sin(a)
        root = (0.12 + 0.03 * k, -0.04 * k)
        middle = (root[0] + length * 0.55 * c, root[1] + length * 0.55 * s + 0.015)
        end = (root[0] + length * c, root[1] + length * s)
        feathers.append(Part("wings", [attach(tube([root, middle, end], (0.06, 0.105, 0.045)))], pale))
    upper = [(-0.02, 0.10), (0.02, -0.16), (0.20, -0.30), (0.40, -0.36), (0.46, -0.22)]
    shoulder = spline([*upper, (0.34, -0.04), (0.22, 0.14), (0.08, 0.18)])
    return [*feathers, Part("wings", [attach(shoulder)], m.base)]


def insect_wing(m: Monster, attach: Attach) -> list[Part]:
    film = mix((206, 228, 240), m.base, 0.10)
    vein_colour = mix(film, outline_colour(m.base), 0.40)
    upper = spline([(0, 0), (0.28, -0.24), (0.72, -0.42), (1.0, -0.30), (0.92, -0.06), (0.50, 0.04)])
    lower = spline([(0, 0.02), (0.34, 0.02), (0.68, 0.14), (0.70, 0.32), (0.48, 0.36), (0.20, 0.20)])
    parts = []
    for shape, lines in (
        (lower, ([(0, 0.02), (0.36, 0.14), (0.62, 0.26)], [(0.1, 0.06), (0.34, 0.22), (0.48, 0.32)])),
        (upper, ([(0, 0), (0.45, -0.22), (0.90, -0.26)], [(0.1, -0.04), (0.5, -0.10), (0.86, -0.12)])),
    ):
        veins = [attach(tube(line, (0.012, 0.007))) for line in lines]
        parts.append(Part("wings", [attach(shape)], film, [(veins, vein_colour)], line_width=0.006))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Tail
# ---------------------------------------------------------------------------------------------------------------------


def tail_parts(m: Monster, root: Point) -> tuple[list[Part], Point]:
    """The tail, which goes off to the left of its root, and where its tip is."""
    x, y = root
    lift = 0.10 * m.arm

    def at(points: Sequence[Point], lifted_from: int) -> list[Point]:
        """Points relative to the root; those from number `lifted_from` on are lifted."""
        return [(x + dx, y + dy - (lift if k >= lifted_from else 0)) for k, (dx, dy) in enumerate(points)]

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
    spade = transform(spade, px - 0.01, py - 0.02, 1.0, -0.35)
    shaft = tube(line, (0.075, 0.055, 0.040, 0.028))
    return [Part("tail", [shaft], m.base), Part("tail", [spade], limb_colour(m.base))], (px - 0.05, py - 0.12)


# ---------------------------------------------------------------------------------------------------------------------
# Crest
# ---------------------------------------------------------------------------------------------------------------------


def crest_parts(m: Monster, head: Ellipse) -> list[Part]:
    """Ears, horns or antennae; their roots are hidden by the head, which is drawn over them."""
    if m.crest == "none":
        return []
    if m.crest == "horn":
        return single_horn(m, head)
    cx, cy, rx, ry = head
    shift = -0.12 * rx * m.turn
    parts = []
    for sign in (-1, 1):
        x, y = cx + shift + sign * rx * 0.60, cy - ry * 0.66
        parts += one_of_a_pair(m, x, y, min(rx, ry) * 2.2, mirror=sign < 0)
    return parts


def one_of_a_pair(m: Monster, x: float, y: float, scale: float, mirror: bool) -> list[Part]:
    """One ear, horn or antenna with its root at (x, y)."""
    ear_colour = mix((244, 160, 168), m.base, 0.25)  # of its inside

    def attach(outline: Outline, angle: float) -> Outline:
        return transform(outline, x, y, scale, angle, mirror)

    if m.crest == "pointed ears":
        tilt = 0.30 + 0.15 * m.arm
        ear = spline([(-0.15, 0.14), (-0.12, -0.14), (0.03, -0.46), (0.13, -0.16), (0.17, 0.14)])
        inside = spline([(-0.07, 0.12), (-0.05, -0.10), (0.03, -0.32), (0.08, -0.10), (0.09, 0.12)])
        return [Part("crest", [attach(ear, tilt)], m.base, [([attach(inside, tilt)], ear_colour)])]
    if m.crest == "round ears":
        ear, inside = ellipse(0.06, -0.10, 0.19, 0.19), ellipse(0.06, -0.09, 0.11, 0.11)
        return [Part("crest", [attach(ear, 0.2)], m.base, [([attach(inside, 0.2)], ear_colour)])]
    if m.crest == "long ears":
        bend = 0.10 + 0.14 * m.arm
        line = [(0, 0.12), (0.0, -0.20), (bend * 0.4, -0.46), (bend + 0.06, -0.68)]
        ear, inside = tube(line, (0.09, 0.12, 0.125, 0.045)), tube(line, (0.03, 0.06, 0.065, 0.01))
        return [Part("crest", [attach(ear, 0.16)], m.base, [([attach(inside, 0.16)], ear_colour)])]
    if m.crest == "horns":
        horn = tube([(0, 0.10), (0.08, -0.12), (0.10, -0.24), (0.04, -0.40)], (0.10, 0.085, 0.055, 0.01))
        rings = []
        for dy in (-0.04, -0.14, -0.24):
            rings.append(attach(tube([(-0.1, dy + 0.02), (0.05, dy + 0.03), (0.22, dy - 0.02)], (0.012, 0.012)), 0.15))
        return [Part("crest", [attach(horn, 0.15)], BONE, [(rings, OLD_BONE)])]
    bend = 0.05 * m.arm
    line = [(-0.10, 0.12), (-0.06, -0.20), (0.04, -0.38), (0.16 + bend, -0.48)]
    stalk, knob = tube(line, (0.028, 0.022, 0.02, 0.02)), ellipse(0.18 + bend, -0.50, 0.075, 0.075)
    return [Part("crest", [attach(stalk, 0.05)], limb_colour(m.base)), Part("crest", [attach(knob, 0.05)], m.base)]


def single_horn(m: Monster, head: Ellipse) -> list[Part]:
    cx, cy, rx, ry = head
    horn = [(-0.11, 0.12), (-0.07, -0.14), (0.0, -0.50), (0.07, -0.14), (0.11, 0.12)]
    horn = transform(horn, cx + rx * 0.1 * m.turn, cy - ry * 0.86, min(rx, ry) * 2.1, 0.06)
    rings = []
    for k in (0.20, 0.42, 0.64):
        rings.append(tube([(cx - 0.2, cy - ry * (0.9 + k)), (cx + 0.2, cy - ry * (1.0 + k))], (0.007, 0.007)))
    return [Part("crest", [horn], BONE, [(rings, OLD_BONE)])]


# ---------------------------------------------------------------------------------------------------------------------
# Motif
# ---------------------------------------------------------------------------------------------------------------------

FLAME = [(0, 0.06), (-0.30, -0.06), (-0.36, -0.36), (-0.20, -0.60), (-0.17, -0.80), (-0.02, -0.66), (0.06, -1.06),
         (0.24, -0.70), (0.36, -0.40), (0.30, -0.06)]  # fmt: skip
CORE = [(0, 0.0), (-0.17, -0.08), (-0.19, -0.28), (-0.04, -0.46), (0.03, -0.62), (0.14, -0.42), (0.20, -0.22),
        (0.15, -0.05)]  # fmt: skip
DROP = [(0, -1.0), (0.14, -0.66), (0.33, -0.34), (0.26, -0.04), (0, 0.06), (-0.26, -0.04), (-0.33, -0.34),
        (-0.14, -0.66)]  # fmt: skip
LEAF = [(0, 0), (0.16, -0.22), (0.50, -0.42), (0.86, -0.44), (0.66, -0.14), (0.34, 0.04)]
BOLT = [(0.16, -1.04), (-0.30, -0.46), (-0.04, -0.44), (-0.16, 0.08), (0.32, -0.60), (0.05, -0.62), (0.34, -1.04)]
CRYSTAL = [(-0.17, 0.06), (-0.20, -0.62), (0, -1.02), (0.20, -0.62), (0.17, 0.06)]
CRYSTAL_SIDE = [(-0.05, 0.1), (-0.05, -0.62), (0, -1.02), (0.20, -0.62), (0.17, 0.1)]
STONE = [(-0.36, 0.10), (-0.44, -0.22), (-0.22, -0.58), (0.12, -0.66), (0.42, -0.34), (0.38, 0.06), (0.0, 0.18)]
STONE_SIDE = [(0.12, -0.66), (0.02, -0.22), (0.38, 0.10), (0.46, -0.34)]


def motif_parts(element: str, x: float, y: float, scale: float, angle: float = 0.0) -> list[Part]:
    """The element's sign, standing on (x, y), about `scale` high."""

    def part(
        outline: Outline, colour: RGB, inside: Outline = (), inner: RGB = WHITE, line_width: float = 0.0085
    ) -> Part:
        decals = [([transform(inside, x, y, scale, angle)], inner)] if inside else []
        return Part("motif", [transform(outline, x, y, scale, angle)], colour, decals, line_width=line_width)

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
        for where in ((0.01, -0.30, 0.95, -0.35, False), (0.01, -0.30, 0.80, -0.15, True)):
            parts.append(part(transform(leaf, *where), (110, 190, 74), transform(rib, *where), (66, 132, 56)))
        return parts
    if element == "ice":
        parts = []
        for where in ((-0.16, 0, 0.66, -0.45), (0.17, 0, 0.70, 0.45), (0.0, 0, 1.0, 0.0)):
            crystal, side = transform(CRYSTAL, *where), transform(CRYSTAL_SIDE, *where)
            parts.append(part(crystal, (206, 240, 250), side, (150, 212, 238), line_width=0.007))
        return parts
    if element == "rock":
        stones = ((-0.26, -0.02, 0.62), (0.28, 0.0, 0.56), (0.02, -0.12, 0.95))
        return [part(transform(STONE, *s), (168, 152, 134), transform(STONE_SIDE, *s), (132, 116, 104)) for s in stones]
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
