"""How people ask for what an emoji shows, whose own name is seldom what they say."""

from __future__ import annotations

from typing import Any

from cascade import random

COUNT = 10  # phrases a picture
TONE = " skin tone"
# tags that say too little
VAGUE = set("animal face fairy fairytale fantasy feels flag person shade symbol tale".split())
# what people add that changes nothing
FILLERS = ("cute", "little", "big", "nice", "simple", "pretty", "funny", "small")
FRAMES = ("a picture of ", "an emoji of ", "a drawing of ", "an icon of ")


def phrases(record: dict[str, Any]) -> list[str]:
    """`COUNT` phrases for a record of metadata.jsonl, always the same: the name with an article, a tag before
    it or its last word, tags alone; skin tones in words; some with an adjective that changes nothing, some as
    a picture of it; every third with the style.

    "automobile" gives "a car"; "man health worker: dark skin tone" gives "doctor with dark skin".
    """
    subject, tones = split_label(record["label"])
    tags = _telling(record["tags"], subject)
    start = random.key(0, "phrase", record["style"], record["label"])  # other tags in each style
    gender = {"man": "man ", "woman": "woman "}.get(record["gender"] or "", "")
    found = []
    for number in range(COUNT):
        draw = random.key(start, number)
        words = subject
        if tags:
            tag, other = (tags[(start + number + i) % len(tags)] for i in range(2))
            last = subject.split()[-1]
            forms = (subject, f"{tag} {last}", tag, f"{tag} {subject}", f"{gender}{tag}", f"{tag} {other}")
            words = forms[(start + number) % len(forms)]
        words = _toned(words, tones, draw // 3)
        if number in (4, 8):
            words = f"{FILLERS[draw % len(FILLERS)]} {words}"
        article = ("", "a ", "the ")[draw % 3]
        if article == "a " and words[0].lower() in "aeiou":
            article = "an "
        words = article + words
        if number in (5, 8):
            words = FRAMES[draw // 9 % len(FRAMES)] + words
        found.append(in_style(words, record["style"]) if number % 3 == 0 else words)
    return found


def in_style(caption: str, style: str) -> str:
    """The caption, naming the style once."""
    ending = f", {style} style"
    return caption if caption.endswith(ending) else caption + ending


def _telling(tags: list[str], subject: str) -> list[str]:
    """The tags that add something to the subject."""
    known = VAGUE | set(subject.lower().split())
    return [tag for tag in map(str.lower, tags) if tag not in known and len(tag) > 2]


def _toned(words: str, tones: list[str], draw: int) -> str:
    if len(tones) != 1:
        return words + (" with " + " and ".join(tones) + " skin" if tones else "")
    tone = tones[0]
    return (f"{words} with {tone} skin", f"{tone}-skinned {words}", f"{words}, {tone} skin")[draw % 3]


def split_label(label: str) -> tuple[str, list[str]]:
    """("woman with red hair", ["dark"]) of "woman: dark skin tone, red hair"; ("flag of Italy", []) of
    "flag: Italy"."""
    subject, _, rest = label.partition(": ")
    parts = rest.split(", ") if rest else []
    tones = [part.removesuffix(TONE) for part in parts if part.endswith(TONE)]
    others = " and ".join(part for part in parts if not part.endswith(TONE))
    if others:
        joint = {"flag": " of ", "keycap": " "}.get(subject, " with ")
        subject += (" " if others.startswith("facing") else joint) + others
    return subject, tones
