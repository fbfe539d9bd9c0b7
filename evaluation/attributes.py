"""Which words of its caption does an image obey? Each phrase is exchanged for others, and a CLIP has to tell.

"a red monster with bat wings" is compared with "… with feathered wings" and "… with insect wings": a hit if the CLIP
finds the caption that was asked for nearer to the image than all the others. Real drawings show what that CLIP allows:
the shipped one tells colours, bodies, wings, bellies and elements, but hardly tails, and patterns not at all.
"""

import re
from collections.abc import Sequence

from PIL import Image

import monsters
from evaluation.obedience import Judge, as_named
from monsters.captions import BELLY, BODY, CREST, MOTIF, PATTERN, TAIL, WINGS
from monsters.record import COLOURS

CHOICES: dict[str, dict[str, Sequence[str]]] = {
    "colour": {colour: (colour,) for colour in COLOURS},
    "body": BODY,
    "wings": WINGS,
    "tail": TAIL,
    "ears or horns": CREST,
    "belly": BELLY,
    "pattern": PATTERN,
    "element": {element: (f"{element} type",) for element in MOTIF},
    "sign of the element": MOTIF,
}


def variants(index: int) -> dict[str, list[str]]:
    """Of a monster, by attribute: its caption, then the captions with another value in the place of its phrase."""
    caption, monster = monsters.caption(index), monsters.roll(index)
    named = {"ears or horns": "crest", "sign of the element": "element"}
    found = {}
    for attribute, choices in CHOICES.items():
        own = getattr(monster, named.get(attribute, attribute))
        said = [phrase for phrase in choices.get(own, ()) if as_named(phrase).search(caption)]
        if said:
            phrase = max(said, key=len)
            place = choices[own].index(phrase)  # singular stays singular
            others = [words[min(place, len(words) - 1)] for value, words in choices.items() if value != own]
            found[attribute] = [caption, *(_with_articles(as_named(phrase).sub(other, caption, 1)) for other in others)]
    return found


def _with_articles(text: str) -> str:
    """a blue, an orange: so that a wrong article gives nothing away."""
    return re.sub(r"\ban? (?=([a-z]))", lambda match: "an " if match[1] in "aeiou" else "a ", text)


def score_attributes(
    sets: dict[str, list[Image.Image]], indices: Sequence[int], judge: Judge
) -> dict[str, dict[str, dict]]:
    """By set of images and by attribute: "asked" (how many captions name it) and "obeyed", the share of hits, 0…1.

    Each set has one image of each of the monsters `indices`.
    """
    features = {name: judge.image_features(images) for name, images in sets.items()}  # (N, P) each
    hits: dict[str, dict[str, list[bool]]] = {name: {} for name in sets}
    for i, index in enumerate(indices):
        for attribute, captions in variants(index).items():
            texts = judge.text_features(captions)  # (choices, P)
            for name, images in features.items():
                hits[name].setdefault(attribute, []).append((texts @ images[i]).argmax().item() == 0)
    return {
        name: {
            attribute: {"asked": len(found[attribute]), "obeyed": sum(found[attribute]) / len(found[attribute])}
            for attribute in CHOICES
            if attribute in found
        }
        for name, found in hits.items()
    }
