"""Encoding of texts that begin alike: a conversation up to each of its turns, each in the time of what is new.

Encoding every one whole takes the square of the turns: 24 s for 400 exchanges. A control token parts a text for the
tokenizer, which encodes what stands before it and what begins with it independently (tokenizers, `AddedVocabulary`:
such tokens are cut out of the raw text first). So what stands before one is taken over from the text before.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from appliance.model.template import ChatTemplate


class GrowingText:
    """The text encoded last, its tokens, and the control tokens in it that part it."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._text = ""
        self._ids: list[int] = []
        self._starts: list[int] = []  # characters before each parting token
        self._places: list[int] = []  # tokens before it

    def encode(self, text: str) -> list[int]:
        """The tokens that `template.encode` makes of `text`."""
        known = self._count_known(text)
        start, place = (self._starts[known - 1], self._places[known - 1]) if known else (0, 0)
        fresh = self._template.encode(text[start:])
        self._text, self._ids = text, self._ids[:place] + list(fresh.ids)
        self._starts, self._places = self._starts[: max(known - 1, 0)], self._places[: max(known - 1, 0)]
        self._note_borders(fresh, start=start, place=place)
        return self._ids

    def is_exact(self) -> bool:
        """Whether the text encoded last, encoded whole, has these very tokens."""
        return list(self._template.encode(self._text).ids) == self._ids

    def _note_borders(self, fresh: Any, *, start: int, place: int) -> None:
        offsets = fresh.offsets
        for number, token in enumerate(fresh.ids):
            if token in self._template.parting:
                self._starts.append(start + offsets[number][0])
                self._places.append(place + number)

    def _count_known(self, text: str) -> int:
        """How many parting tokens are surely in both texts: a longer one that begins there would be in both, too."""
        shared = _count_shared(self._text, text)
        return bisect_right(self._starts, shared - self._template.longest_token)


def _count_shared(one: str, other: str) -> int:
    """How many characters two texts begin alike with, by halving: comparing slices is fast, looping is not."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
