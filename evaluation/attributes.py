"""Which words of its caption does an image obey? Each phrase is exchanged for others, and a CLIP has to tell.

"a red monster with bat wings" is compared with "… with feathered wings" and "… with insect wings": a hit if the CLIP
finds the caption that was asked for nearer to the image than all the others. Real drawings show what that CLIP allows:
the shipped one tells colours, bodies, wings, bellies and elements, but hardly tails, and patterns not at all.
"""

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

import monsters
from evaluation.obedience import Judge
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
        text = caption.replace("purple wisp", "") if attribute == "colour" else caption  # whose purple is not its own
        said = [phrase for phrase in choices.get(own, ()) if phrase in text]
        if said:
            phrase = max(said, key=len)
            place = choices[own].index(phrase)  # singular stays singular
            others = [words[min(place, len(words) - 1)] for value, words in choices.items() if value != own]
            found[attribute] = [caption, *(_with_articles(caption.replace(phrase, other, 1)) for other in others)]
    return found


def _with_articles(text: str) -> str:
    """a blue, an orange: so that a wrong article gives nothing away."""
    return re.sub(r"\ban? (?=([a-z]))", lambda match: "an " if match[1] in "aeiou" else "a ", text)


def score_attributes(images: list[Image.Image], indices: Sequence[int], judge: Judge) -> dict[str, dict]:
    """By attribute: "asked" (how many captions name it) and "obeyed", the share of these, 0…1, with a hit.

    Images are of the monsters `indices`, one each.
    """
    hits: dict[str, list[bool]] = {}
    features = judge.image_features(images)  # (N, P)
    for feature, index in zip(features, indices, strict=True):
        for attribute, captions in variants(index).items():
            similarity: Tensor = judge.text_features(captions) @ feature  # (choices,)
            hits.setdefault(attribute, []).append(similarity.argmax().item() == 0)
    return {
        name: {"asked": len(hits[name]), "obeyed": torch.tensor(hits[name]).float().mean().item()}
        for name in CHOICES
        if name in hits
    }
