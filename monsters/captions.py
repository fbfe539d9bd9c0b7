"""Captions: a small grammar that turns a monster's record into one true English sentence.

Captions sound like those of the Pokémon data sets ("a drawing of a blue water type pokemon with bat wings"), in several
word orders. Like people, they leave some attributes out; they never name one that the monster does not have.
"""

import random
import re
from collections.abc import Sequence
from itertools import chain

from monsters.record import COLOURS, ELEMENTS, Monster

NOUNS = ("pokemon", "pokemon", "pokemon", "monster", "creature")  # listed twice = twice as likely
OPENINGS = ("a drawing of", "a drawing of", "a picture of", "an illustration of", "a cartoon of")

# value of the attribute -> phrases that say so
BODY = {
    "round": ("with a round body", "shaped like a ball"),
    "pear": ("with a pear-shaped body", "shaped like a pear"),
    "two legs": ("standing on two legs", "on two legs"),
    "four legs": ("on four legs", "standing on four legs"),
    "serpent": ("with a serpent body", "shaped like a snake"),
    "bird": ("shaped like a bird", "with a beak"),
    "fish": ("shaped like a fish", "with fins"),
    "insect": ("with an insect body", "on six legs"),
    "floating": ("floating in the air", "with a floating body"),
    "blob": ("with a blob body", "shaped like a blob"),
}
WINGS = {"bat": ("bat wings",), "feathered": ("feathered wings", "bird wings"), "insect": ("insect wings",)}
TAIL = {
    "long": ("a long tail",),
    "curly": ("a curly tail", "a curled tail"),
    "bushy": ("a bushy tail", "a fluffy tail"),
    "pointed": ("a pointed tail",),
}
CREST = {
    "pointed ears": ("pointed ears",),
    "round ears": ("round ears",),
    "long ears": ("long ears",),
    "horns": ("horns", "two horns"),
    "horn": ("a horn", "one horn"),
    "antennae": ("antennae", "two antennae"),
}
PATTERN = {"spots": ("spots",), "stripes": ("stripes",)}
BELLY = {"plain": ("a pale belly", "a light belly"), "striped": ("a striped belly",)}
MOTIF = {  # element -> its sign: one on the head or the tail, several around
    "fire": ("a flame", "flames"),
    "water": ("a water drop", "water drops"),
    "grass": ("a leaf sprout", "leaf sprouts"),
    "electric": ("a lightning bolt", "lightning bolts"),
    "ice": ("ice crystals", "ice crystals"),
    "rock": ("stones", "stones"),
    "ghost": ("a purple wisp", "purple wisps"),
    "poison": ("poison bubbles", "poison bubbles"),
    "fairy": ("a star", "stars"),
}
MOTIF_PLACE = {"head": "on its head", "tail": "on its tail", "around": "around it"}
MOOD = {  # phrases that stand before the noun, and phrases that stand at the end
    "smiling": (("smiling", "happy"), ("smiling", "with a smile")),
    "laughing": (("laughing",), ("laughing", "laughing with closed eyes")),
    "grumpy": (("grumpy", "angry"), ("looking grumpy", "frowning")),
    "surprised": (("surprised",), ("looking surprised", "with its mouth open in surprise")),
    "sleepy": (("sleepy", "tired"), ("looking sleepy", "half asleep")),
    "sad": (("sad", "unhappy"), ("looking sad",)),
    "winking": (("winking",), ("winking", "winking with one eye")),
}


def write_caption(m: Monster) -> str:
    """One caption for a monster; which words it uses follows from the monster's index alone."""
    rng = random.Random(f"caption {m.index}")

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options))]

    def chance(probability: float) -> bool:
        return rng.random() < probability

    noun, opening = pick(NOUNS), pick(OPENINGS)
    colour = m.colour if chance(0.92) else ""
    element = f"{m.element} type" if chance(0.88) else ""
    body = pick(BODY[m.body]) if chance(0.80) else ""
    before, after = MOOD[m.mood]
    say_mood = chance(0.62)

    features = []
    if m.wings != "none" and chance(0.88):
        features.append(pick(WINGS[m.wings]))
    if m.crest != "none" and chance(0.75):
        features.append(pick(CREST[m.crest]))
    if m.tail != "none" and m.motif_place != "tail" and chance(0.70):
        features.append(pick(TAIL[m.tail]))
    if m.belly != "none" and chance(0.60):
        features.append(pick(BELLY[m.belly]))
    if m.pattern != "plain" and chance(0.75):
        features.append(pick(PATTERN[m.pattern]))
    motif = ""
    if chance(0.45):
        one, several = MOTIF[m.element]
        motif = f"{several if m.motif_place == 'around' else one} {MOTIF_PLACE[m.motif_place]}"
    features = [feature for _, feature in sorted((rng.random(), feature) for feature in features)]  # in random order
    features = [*features[:3], motif] if motif else features[:4]
    with_features = f"with {listed(features)}" if features else ""

    style = rng.random()
    if style < 0.50:  # a drawing of a blue water type pokemon on four legs with bat wings, smiling
        first = f"{opening} {article(joined(colour, element, noun))}"
        if body.startswith("with") and features:
            text = f"{first} with {listed([body.removeprefix('with '), *features])}"
        else:
            text = joined(first, body, with_features)
        ending = pick(after) if say_mood else ""
    elif style < 0.72:  # a smiling blue water type pokemon with bat wings, on four legs
        mood = pick(before) if say_mood else ""
        text = joined(article(joined(mood, colour, element, noun)), with_features)
        ending = body
    elif style < 0.88:  # a drawing of a smiling blue pokemon on four legs, water type, with bat wings
        mood = pick(before) if say_mood else ""
        text = joined(opening, article(joined(mood, colour, noun)), body)
        ending = ", ".join(filter(None, (element, with_features)))
    else:  # a blue water type pokemon on four legs, smiling, with bat wings
        text = joined(article(joined(colour, element, noun)), body)
        ending = ", ".join(filter(None, (pick(after) if say_mood else "", with_features)))
    return f"{text}, {ending}" if ending else text


def joined(*phrases: str) -> str:
    return " ".join(filter(None, phrases))


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def words() -> set[str]:
    """Every word that a caption can contain."""
    tables = (BODY, WINGS, TAIL, CREST, PATTERN, BELLY, MOTIF)
    phrases = chain.from_iterable(chain.from_iterable(table.values()) for table in tables)
    moods = chain.from_iterable(chain(*pair) for pair in MOOD.values())
    others = (*NOUNS, *OPENINGS, *COLOURS, *ELEMENTS, *MOTIF_PLACE.values(), "a", "an", "and", "type", "with")
    return set(re.findall(r"[a-z-]+", " ".join(chain(phrases, moods, others))))
