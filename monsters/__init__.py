"""Pocket monsters: a data set of drawn creatures with captions, which needs no download.

    record       the attributes of a monster, which follow from its index
    captions     the attributes as a sentence
    drawing      smooth shapes, lit and outlined
    bodies       the ten bodies
    attachments  wings, tails, crests, and the signs of the elements
    face         eyes, mouth and the rest
    anatomy      all of it together, fitted into the image
    workers      the processes that draw a data set
    dataset      `draw(index)`, `caption(index)`, `load_monsters(count)`
    checks       what the pixels of an image say

Each imports only from those above it. `python -m monsters` draws a sheet of them.
"""

from monsters.captions import words
from monsters.checks import colour_of, is_monster_on_white
from monsters.dataset import (
    DEFAULT_COUNT,
    caption,
    describe,
    draw,
    indices_of,
    is_spec,
    load_monsters,
    render,
    source_version,
)
from monsters.record import (
    BELLIES,
    BODIES,
    COLOURS,
    CRESTS,
    ELEMENTS,
    MOODS,
    MOTIF_PLACES,
    PALETTE,
    PATTERNS,
    TAILS,
    TURQUOISE,
    WINGS,
    Monster,
    combinations,
    roll,
)

__all__ = [
    "BELLIES", "BODIES", "COLOURS", "CRESTS", "DEFAULT_COUNT", "ELEMENTS", "MOODS", "MOTIF_PLACES", "PALETTE",
    "PATTERNS", "TAILS", "TURQUOISE", "WINGS", "Monster", "caption", "colour_of", "combinations", "describe", "draw",
    "indices_of", "is_monster_on_white", "is_spec", "load_monsters", "render", "roll", "source_version", "words",
]  # fmt: skip
