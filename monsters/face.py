"""The face: eyes, cheeks, nose, and mouth or beak, on the ellipse of the head. Eyes and mouth show the mood."""

import math

from monsters.bodies import Ellipse
from monsters.drawing import (
    INK,
    WHITE,
    Outline,
    Part,
    ellipse,
    is_dark,
    mix,
    outline_colour,
    spline,
    symmetric,
    transform,
    tube,
)
from monsters.record import RGB, Monster


def face_parts(m: Monster, head: Ellipse, beak: bool) -> list[Part]:
    cx, cy, rx, ry = head
    unit = min(rx, ry)
    middle = cx + 0.30 * rx * m.turn
    mouth_x = middle + 0.04 * rx * m.turn
    spread, eye_y = rx * (0.47 - 0.07 * m.turn), cy - ry * 0.02
    parts = []
    for sign in (-1, 1):
        parts += eye_parts(m, middle + sign * spread, eye_y, unit, sign)
    if m.cheeks:
        blush = mix(m.base, (255, 106, 120), 0.50)
        for sign in (-1, 1):
            x = middle + sign * (spread + unit * 0.26)
            parts.append(flat("cheeks", ellipse(x, cy + ry * 0.36, unit * 0.15, unit * 0.095), blush))
    if m.body in ("two legs", "four legs", "round") and m.crest.endswith("ears"):
        left, right, y = mouth_x - rx * 0.09, mouth_x + rx * 0.09, cy + ry * 0.29
        parts.append(flat("nose", spline([(left, y), (right, y), (mouth_x, cy + ry * 0.38)]), face_ink(m)))
    if beak:
        return parts + beak_parts(m, mouth_x, cy + ry * 0.30, unit)
    return parts + mouth_parts(m, mouth_x, cy + ry * 0.46, rx * 0.24, ry)


def flat(name: str, outline: Outline, colour: RGB) -> Part:
    """A shape without light and outline."""
    return Part(name, [outline], colour, flat=True, line_width=0)


def face_ink(m: Monster) -> RGB:
    """The colour of lines in the face."""
    return (236, 230, 236) if is_dark(m.base) else mix(outline_colour(m.base), INK, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Eyes
# ---------------------------------------------------------------------------------------------------------------------


def eye_parts(m: Monster, x: float, y: float, unit: float, sign: int) -> list[Part]:
    """The eye at (x, y); `sign` is -1 for the left one and 1 for the right one."""
    squeeze = 1 - 0.16 * m.turn * (sign == 1)  # the far eye of a turned head is narrower
    wide = 1.16 if m.mood == "surprised" else 1.0
    if m.bead_eyes:
        w, h = unit * 0.17 * m.eye_size * squeeze * wide, unit * 0.22 * m.eye_size * wide
    else:
        w, h = unit * 0.24 * m.eye_size * squeeze * wide, unit * 0.30 * m.eye_size * wide
    if m.mood == "laughing" or (m.mood == "winking" and sign == 1):
        arch = [(x + w * dx, y + h * dy) for dx, dy in ((-1, 0.25), (-0.6, -0.28), (0, -0.45), (0.6, -0.28), (1, 0.25))]
        return [flat("eyes", tube(arch, (0.008, 0.016, 0.018, 0.016, 0.008)), face_ink(m))]

    parts = []
    if m.bead_eyes:
        if is_dark(m.base):
            parts.append(flat("eyes", ellipse(x, y, w * 1.22, h * 1.18), (240, 236, 244)))
        parts.append(flat("eyes", ellipse(x, y, w, h), INK))
        gaze_x, gaze_y, shine = x, y, w
    else:
        rim = INK if not is_dark(m.base) else (16, 14, 20)
        small = 0.66 if m.mood == "surprised" else 1.0
        gaze_x, gaze_y = x + w * (0.24 * m.turn - 0.10 * sign), y + h * 0.06
        iris_w, iris_h, pupil = w * 0.82 * small, h * 0.80 * small, w * 0.60 * small
        shine = w * 0.80
        parts += [
            flat("eyes", ellipse(x, y, w + 0.011, h + 0.011), rim),
            flat("eyes", ellipse(x, y, w, h), WHITE),
            flat("eyes", ellipse(gaze_x, gaze_y, iris_w, iris_h), mix(m.iris, INK, 0.45)),
            flat("eyes", ellipse(gaze_x, gaze_y + iris_h * 0.12, iris_w * 0.90, iris_h * 0.84), m.iris),
            flat("eyes", ellipse(gaze_x, gaze_y, pupil * 0.92, iris_h * 0.70), INK),
        ]
    parts += [
        flat("eyes", ellipse(gaze_x - shine * 0.30, gaze_y - h * 0.34, shine * 0.34, h * 0.24), WHITE),
        flat("eyes", ellipse(gaze_x + shine * 0.34, gaze_y + h * 0.34, shine * 0.16, h * 0.12), WHITE),
    ]
    return parts + lid_parts(m, x, y, w, h, sign)


def lid_parts(m: Monster, x: float, y: float, w: float, h: float, sign: int) -> list[Part]:
    """An eyelid for some moods: the upper half of a slightly larger eye, cut along a line whose slope is the mood."""
    heights = {"sleepy": (0.05, 0.10), "grumpy": (0.0, -0.62), "sad": (-0.72, -0.10)}  # beside the nose, at the temple
    if m.mood not in heights:
        return []
    inner, outer = heights[m.mood]
    left, right = (outer, inner) if sign == -1 else (inner, outer)
    big_w, big_h = w * 1.20 + 0.008, h * 1.16 + 0.008
    edge = [(x + big_w, y + h * right), (x - big_w, y + h * left)]
    slope = edge[0][1] - edge[1][1]
    arc = ellipse(x, y, big_w, big_h, math.pi, 32)[:17]
    lid = [(px, min(py, edge[1][1] + slope * (px - x + big_w) / (2 * big_w))) for px, py in arc]
    return [
        flat("eyes", [*lid, *edge], mix(m.base, outline_colour(m.base), 0.10)),
        flat("eyes", tube(edge[::-1], (0.011, 0.011)), face_ink(m)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Mouth
# ---------------------------------------------------------------------------------------------------------------------

GAPE, TONGUE = (120, 34, 44), (240, 126, 132)


def mouth_parts(m: Monster, x: float, y: float, half: float, ry: float) -> list[Part]:
    """A mouth with its middle at (x, y), about `half` wide to each side, on a head whose radius in y is `ry`."""
    if m.mood == "laughing" or (m.mood == "smiling" and m.eye_size > 1.04):
        w, h = half * 1.15, ry * (0.34 if m.mood == "laughing" else 0.22)
        top = [(x - w, y - h * 0.10), (x, y + h * 0.06), (x + w, y - h * 0.10)]
        chin = [(x + w * 0.66, y + h * 0.72), (x, y + h), (x - w * 0.66, y + h * 0.72)]
        gape = spline(top, False) + spline([top[2], *chin, top[0]], False)
        tongue = ellipse(x, y + h * 0.98, w * 0.62, h * 0.52)
        return [Part("mouth", [gape], GAPE, [([tongue], TONGUE)], flat=True, line_width=0.009)]
    if m.mood == "surprised":
        gape = ellipse(x, y + ry * 0.08, half * 0.42, ry * 0.15)
        return [Part("mouth", [gape], GAPE, flat=True, line_width=0.009)]

    bend = {"smiling": 1.0, "winking": 1.1, "grumpy": -0.9, "sad": -1.0, "sleepy": 0.35}[m.mood] * ry * 0.13
    w = half * (0.6 if m.mood == "sleepy" else 1.0)
    y += ry * 0.08 if bend < 0 else 0
    lips = [(x + w * dx, y + bend * dy) for dx, dy in ((-1, -0.5), (-0.5, 0.28), (0, 0.55), (0.5, 0.28), (1, -0.5))]
    parts = [flat("mouth", tube(lips, (0.007, 0.011, 0.012, 0.011, 0.007)), face_ink(m))]
    if m.mood == "grumpy":
        tooth = [(x - w * 0.62, y - 0.006), (x - w * 0.28, y - 0.014), (x - w * 0.44, y - ry * 0.19)]
        parts.append(flat("mouth", tooth, WHITE))
    return parts


def beak_parts(m: Monster, x: float, y: float, unit: float) -> list[Part]:
    """A beak; the mood bends its corners or opens it."""
    bend = {"smiling": -1, "laughing": -1.4, "winking": -1, "grumpy": 1.2, "sad": 1.3}.get(m.mood, 0) * unit * 0.07
    agape = unit * {"laughing": 0.22, "surprised": 0.26}.get(m.mood, 0.0)
    orange, w = (246, 178, 60), unit * 0.34
    lower = spline([(x - w * 0.7, y), (x, y + unit * 0.20 + agape), (x + w * 0.7, y)])
    half_upper = [(0, -0.2 * unit), (0.5 * w, -0.14 * unit), (w, bend), (0.3 * w, 0.10 * unit), (0, 0.24 * unit)]
    upper = transform(symmetric(half_upper), x, y)
    inside = (200, 92, 70) if agape else mix(orange, (150, 80, 20), 0.3)
    return [Part("mouth", [lower], inside, line_width=0.007), Part("mouth", [upper], orange, line_width=0.007)]
