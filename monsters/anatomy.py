"""The whole monster: body, attachments and face in the order in which they are drawn, fitted into the image."""

from collections.abc import Sequence
from dataclasses import replace

from monsters.attachments import crest_parts, motif_parts, tail_parts, wing_parts
from monsters.bodies import BODY_PLANS, forehead_decals
from monsters.drawing import Outline, Part, bounding_box, ellipse, transform
from monsters.face import face_parts
from monsters.record import Box, Monster


def assemble(m: Monster) -> list[Part]:
    """All parts of a monster from back to front, in fractions of the image, 0..1."""
    return fit_into_image(m, lay_out(m))


def lay_out(m: Monster) -> list[Part]:
    """All parts from back to front, in the monster's own units (`bodies`)."""
    body = BODY_PLANS[m.body](m)
    cx, cy, rx, ry = body.head
    parts: list[Part] = []
    tip = (0.0, 0.0)
    if m.tail != "none":
        tail, tip = tail_parts(m, body.tail)
        parts += tail
    if m.wings != "none":
        for root in body.wings:
            parts += wing_parts(m, *root)
    parts += body.back
    if m.motif_place == "tail":
        parts += motif_parts(m.element, tip[0], tip[1] + 0.04, 0.30, -0.15)
    crest = crest_parts(m, body.head)
    if m.motif_place == "head":
        crest += motif_parts(m.element, cx - 0.1 * rx * m.turn, cy - ry * 0.90, 0.30)
    if body.own_head:
        head = Part("head", [ellipse(cx, cy, rx, ry, count=56)], m.base, forehead_decals(m, body.head))
        parts += [*body.front, *crest, head]
    else:
        parts += [*crest, *body.front]
    parts += face_parts(m, body.head, body.beak)
    if m.motif_place == "around":
        left, top, right, bottom = bounds(parts)
        below_the_face = bottom if cx > 0.1 else (cy + bottom) / 2
        parts += motif_parts(m.element, right + 0.03, below_the_face, 0.24, 0.25)
        parts += motif_parts(m.element, left - 0.01, top + 0.24, 0.21, -0.25)
    return parts


def fit_into_image(m: Monster, parts: list[Part]) -> list[Part]:
    """Mirrors and leans the parts, and scales and moves them so that the monster has its size and position."""
    mirrored = m.facing < 0
    leaning = [replace(p, outlines=[transform(o, 0, 0, 1.0, m.lean, mirrored) for o in p.outlines]) for p in parts]
    left, top, right, bottom = bounds(leaning)
    scale = m.size / max(right - left, bottom - top)
    margin = 0.025
    room_x, room_y = 1 - scale * (right - left) - 2 * margin, 1 - scale * (bottom - top) - 2 * margin
    x = margin + room_x * (0.5 + 0.35 * m.x) - scale * left
    y = margin + room_y * (0.5 + 0.35 * m.y) - scale * top

    def fitted(outlines: list[Outline]) -> list[Outline]:
        return [transform(outline, x, y, scale, m.lean, mirrored) for outline in outlines]

    return [replace(p, outlines=fitted(p.outlines), decals=[(fitted(o), c) for o, c in p.decals]) for p in parts]


def boxes_of(m: Monster) -> dict[str, Box]:
    """The box around the parts of each name, and "monster" around all: fractions of the image, 0..1."""
    parts = assemble(m)
    boxes = {"monster": bounds(parts)}
    for name in dict.fromkeys(part.name for part in parts):
        boxes[name] = bounds([part for part in parts if part.name == name])
    boxes.setdefault("head", boxes["body"])
    return {name: tuple(round(v, 4) for v in box) for name, box in boxes.items()}


def bounds(parts: Sequence[Part]) -> Box:
    return bounding_box(outline for part in parts for outline in part.outlines)
