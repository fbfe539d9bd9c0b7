"""What is said about a monster: a small grammar that turns its record into one true English sentence.

Captions are in the manner of the hub's ("a drawing of a blue water type pokemon with bat wings"), in several word
orders. As people do, they leave some attributes unsaid; they never say one that is not there.
"""

import random
import re
from collections.abc import Iterable, Sequence
from itertools import chain

NOUNS = ("pokemon", "pokemon", "pokemon", "monster", "creature")
OPENINGS = ("a drawing of", "a drawing of", "a picture of", "an illustration of", "a cartoon of")

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
SIGN = {
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
SIGN_PLACE = {"head": "on its head", "tail": "on its tail", "around": "around it"}
MOOD = {
    "smiling": (("smiling", "happy"), ("smiling", "with a smile")),
    "laughing": (("laughing",), ("laughing", "laughing with closed eyes")),
    "grumpy": (("grumpy", "angry"), ("looking grumpy", "frowning")),
    "surprised": (("surprised",), ("looking surprised", "with its mouth open in surprise")),
    "sleepy": (("sleepy", "tired"), ("looking sleepy", "half asleep")),
    "sad": (("sad", "unhappy"), ("looking sad",)),
    "winking": (("winking",), ("winking", "winking with one eye")),
}


def write(m) -> str:
    """One caption for a `monsters.Monster`; which words it uses is decided by the monster's index alone."""
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
    sign = ""
    if chance(0.45):
        one, many = SIGN[m.element]
        sign = f"{many if m.motif_place == 'around' else one} {SIGN_PLACE[m.motif_place]}"
    features = [feature for _, feature in sorted((rng.random(), feature) for feature in features)][
        : 4 if not sign else 3
    ]
    if sign:
        features.append(sign)
    having = f"with {listed(features)}" if features else ""

    style = rng.random()
    if style < 0.50:  # a drawing of a blue water type pokemon on four legs with bat wings, smiling
        first = f"{opening} {article(joined(colour, element, noun))}"
        if body.startswith("with") and features:
            features, having = [body.removeprefix("with "), *features], ""
            text = f"{first} with {listed(features)}"
        else:
            text = joined(first, body, having)
        tail = pick(after) if say_mood else ""
    elif style < 0.72:  # a smiling blue water type pokemon with bat wings, on four legs
        mood = pick(before) if say_mood else ""
        text = joined(article(joined(mood, colour, element, noun)), having)
        tail = body
    elif style < 0.88:  # a drawing of a smiling blue pokemon on four legs, water type, with bat wings
        mood = pick(before) if say_mood else ""
        text = joined(opening, article(joined(mood, colour, noun)), body)
        tail = ", ".join(filter(None, (element, having)))
    else:  # a blue pokemon on four legs, smiling, with bat wings and the like
        text = joined(article(joined(colour, element, noun)), body)
        tail = ", ".join(filter(None, (pick(after) if say_mood else "", having)))
    return f"{text}, {tail}" if tail else text


def joined(*pieces: str) -> str:
    return " ".join(filter(None, pieces))


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def words(colours: Iterable[str], elements: Iterable[str]) -> set[str]:
    """Every word that `write` can use, given the names of colours and elements."""
    single = chain(NOUNS, OPENINGS, colours, elements, SIGN_PLACE.values(), ("a", "an", "and", "type", "with"))
    tables = chain.from_iterable(
        chain.from_iterable(t.values()) for t in (BODY, WINGS, TAIL, CREST, PATTERN, BELLY, SIGN)
    )
    moods = chain.from_iterable(chain(*pair) for pair in MOOD.values())
    return set(re.findall(r"[a-z-]+", " ".join(chain(single, tables, moods))))
