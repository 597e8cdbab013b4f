"""The demo's dataset as a program: workplace requests in free text, each with its one right ticket.

A strict contract that prompting a small model does not reach: canonical item names whatever the
request calls them, rooms normalised to `B-204`, priority by what is said, and nothing beside the
JSON. Every row is a function of the seed and its number, so a longer dataset starts with the rows
of a shorter one.
"""

from __future__ import annotations

import json
import random
from typing import Any

from appliance.demo.vocabulary import (
    CLOSINGS,
    CORES,
    DISTRACTIONS,
    ITEMS,
    NAMES,
    NUMBERS,
    OPENINGS,
    PLACES,
    URGENCY,
)
from appliance.example import Example, Message, normalise_text

SYSTEM_PROMPT = "Turn the request into a ticket."
CATEGORIES = tuple(ITEMS)
CANONICAL = tuple(item for items in ITEMS.values() for item in items)
PRIORITIES = tuple(URGENCY)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["category", "item", "location", "priority", "quantity"],
    "properties": {
        "category": {"enum": list(CATEGORIES)},
        "item": {"enum": list(CANONICAL)},
        "location": {"anyOf": [{"type": "string", "pattern": "^[A-F]-[0-9]{3}$"}, {"type": "null"}]},
        "priority": {"enum": list(PRIORITIES)},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 20},
    },
}

BASE_PROMPT = (
    "Turn the request into a ticket: answer with one JSON object on one line and nothing else. Keys in this order: "
    "category, item, location, priority, quantity.\n"
    + "\n".join(f"- category {c}: item is one of {', '.join(items)}" for c, items in ITEMS.items())
    + "\nUse these item names even when the request says it in other words. location is the room as LETTER-NUMBER, for "
    'example "B-204", or null when the request names no room for the item. priority is "high" when it is urgent, "low" '
    'when it can wait, else "normal". quantity is a number, 1 when none is said.'
)

_EDGE_SHARE = 0.3


def build_requests(count: int, *, seed: int = 2026) -> tuple[Example, ...]:
    """The first `count` rows; the rows of a smaller count are the beginning of a larger one's."""
    examples: list[Example] = []
    seen: set[str] = set()
    number = 0
    while len(examples) < count:
        number += 1
        example = _build_request(random.Random(f"{seed}/{number}"), len(examples) + 1)  # noqa: S311 - a dataset, no secret
        if example.normalised_prompt not in seen:
            seen.add(example.normalised_prompt)
            examples.append(example)
    return tuple(examples)


def _build_request(rng: random.Random, number: int) -> Example:
    category = rng.choice(CATEGORIES)
    item = rng.choice(tuple(ITEMS[category]))
    quantity = 1 if rng.random() < 0.6 else rng.choice(tuple(NUMBERS))
    priority = rng.choice(PRIORITIES)
    room = _choose_room(rng) if category != "travel" and rng.random() < 0.8 else None
    is_edge = rng.random() < _EDGE_SHARE
    text = _write_request(
        rng, category=category, item=item, quantity=quantity, priority=priority, room=room, is_edge=is_edge
    )
    ticket = {
        "category": category,
        "item": item,
        "location": f"{room[0]}-{room[1]}" if room else None,
        "priority": priority,
        "quantity": quantity,
    }
    messages = (Message("system", SYSTEM_PROMPT), Message("user", text), Message("assistant", json.dumps(ticket)))
    meta = {"edge": True} if is_edge else {}
    return Example(f"request-{number:05d}", messages, provenance="program", category=category, meta=meta)


def _write_request(
    rng: random.Random,
    *,
    category: str,
    item: str,
    quantity: int,
    priority: str,
    room: tuple[str, int] | None,
    is_edge: bool,
) -> str:
    """Opening, core, distraction, urgency and closing; edge rows are also roughened."""
    core = _write_core(rng, category=category, item=item, quantity=quantity, room=room)
    urgency = rng.choice(URGENCY[priority])
    sentences = [_capitalise(core) + rng.choice((".", ".", "", "!")), _capitalise(urgency) + "." if urgency else ""]
    if rng.random() < 0.25:
        sentences.reverse()
    if is_edge and rng.random() < 0.6:
        sentences.insert(rng.randrange(3), _write_distraction(rng, item=item, room=room))
    closing = rng.choice(CLOSINGS).format(who=rng.choice(NAMES), ext=rng.randrange(1000, 9999))
    text = " ".join(part for part in (rng.choice(OPENINGS), *sentences, closing) if part)
    return _roughen(rng, text) if is_edge else text


def _write_core(rng: random.Random, *, category: str, item: str, quantity: int, room: tuple[str, int] | None) -> str:
    one, several = CORES[category]
    singular, plural = rng.choice(ITEMS[category][item])
    place = rng.choice(PLACES).format(b=room[0], n=room[1]) if room else ""
    count = NUMBERS.get(quantity, "") if rng.random() < 0.5 else str(quantity)
    template = rng.choice(one if quantity == 1 else several)
    core = template.format(
        one=f"the {singular}", a=f"{_article(singular)} {singular}", bare=singular, some=f"{count} {plural}", at=place
    )
    return " ".join(core.split()).replace(" ,", ",")


def _write_distraction(rng: random.Random, *, item: str, room: tuple[str, int] | None) -> str:
    """Another thing or number that is not asked for; another room only where the right one is named."""
    other = rng.choice([c for c in CANONICAL if c != item])
    place = "{}-{}".format(*_choose_room(rng))
    usable = [d for d in DISTRACTIONS if room is not None or "{place}" not in d]
    return rng.choice(usable).format(
        other=other, place=place, count=rng.randrange(6, 19), ext=rng.randrange(1000, 9999)
    )


def _roughen(rng: random.Random, text: str) -> str:
    """As people type: lower case, no punctuation, or a slip of the finger in one plain word."""
    kind = rng.choice(("lower", "bare", "slip", "as is"))
    if kind == "lower":
        return text.lower()
    if kind == "bare":
        return " ".join(text.replace(",", "").replace(".", "").replace("!", "").split())
    return _slip(rng, text) if kind == "slip" else text


def _slip(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    plain = [i for i, w in enumerate(words) if w.isalpha() and len(w) > 4]
    if not plain:
        return text
    at = rng.choice(plain)
    cut = rng.randrange(1, len(words[at]) - 1)
    word = words[at]
    words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def _choose_room(rng: random.Random) -> tuple[str, int]:
    return rng.choice("ABCDEF"), rng.randrange(101, 500)


def _article(word: str) -> str:
    return "an" if normalise_text(word)[0] in "aeio" else "a"


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
