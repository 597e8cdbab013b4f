"""Near copies: test rows that ask nearly what a trained row asks, and have that row's answer.

A model that remembers the trained row answers such a test row, so it says nothing of requests that are new. Pairs that
might be are found by MinHash (Broder 1997), and each is then measured exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from heapq import nsmallest

from rensa import RMinHash

from appliance.digest import digest_bytes, digest_json
from appliance.example import Example, normalise_text

_GRAM = 4
_SIMILAR = 0.8
_COMMON = 0.1  # of all rows: more have a gram that belongs to the form of requests
_FEW = 5  # rows are no form, however few there are
_SAMPLE = 500  # rows that show what is common
_TRIES = 200  # comparisons of a test row: where a form has thousands of rows, each with each would take hours
# Of pairs that are just similar enough 1 in 20,000 shares no band; of those similar by 0.2, 1 in 125 shares one.
_BANDS, _WIDTH, _SEED = 25, 5, 1
_Band = tuple[str, int, tuple[int, ...]]  # an answer, the band's number, its part of the signature


def find_near_copies(test: Sequence[Example], trained: Sequence[Example]) -> dict[int, int]:
    """The places in `test` of rows with a near copy in `trained`, each with the place of the first one.

    Rows are near copies where their prompts are similar by 0.8 or more (Jaccard, sets of 4 characters on end), both
    whole and without the grams that more than a tenth of all rows have, for an instruction that every request begins
    with makes no two alike; and where their answers are the same but for case, white space and forms of characters.
    System prompts are not compared.
    """
    shared = {_read_answer(e) for e in test}.intersection(_read_answer(e) for e in trained)
    if not shared:
        return {}
    common = _find_common([*test, *trained])
    held: dict[_Band, list[int]] = {}
    for place, example in enumerate(test):
        for band in _list_bands(example, shared, common):
            held.setdefault(band, []).append(place)
    copies: dict[int, int] = {}
    tries, settled = Counter[int](), set[int]()
    for place, example in enumerate(trained):
        near = _gather(held, _list_bands(example, shared, common), settled)
        grams = _cut(example) if near else set()
        for other in near:
            tries[other] += 1
            is_copy = _compare(_cut(test[other]), grams, common) >= _SIMILAR
            if is_copy:
                copies[other] = place
            if is_copy or tries[other] == _TRIES:
                settled.add(other)
    return dict(sorted(copies.items()))


def _read_answer(example: Example) -> str:
    return digest_json([normalise_text(example.answer), example.messages[-1].tool_calls])


def _cut(example: Example) -> set[str]:
    text = example.normalised_prompt
    return {text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1))}


def _find_common(examples: Sequence[Example]) -> set[str]:
    """The grams of so many rows that they tell no row from another; by some of the rows, whatever their order."""
    seen = nsmallest(
        _SAMPLE, examples, key=lambda e: digest_bytes(e.normalised_prompt.encode("utf-8", "surrogatepass"))
    )
    counts = Counter[str]()
    for example in seen:
        counts.update(_cut(example))
    limit = max(_FEW, _COMMON * len(seen))
    return {gram for gram, rows in counts.items() if rows > limit}


def _list_bands(example: Example, shared: AbstractSet[str], common: AbstractSet[str]) -> list[_Band]:
    """What near copies share one of; none for an answer that is not shared, or a prompt that is all form."""
    answer = _read_answer(example)
    grams = _cut(example) - common if answer in shared else set()
    if not grams:
        return []
    sketch = RMinHash(num_perm=128, seed=_SEED)
    sketch.update(grams)
    signature = sketch.digest()
    return [(answer, band, tuple(signature[band * _WIDTH : (band + 1) * _WIDTH])) for band in range(_BANDS)]


def _gather(held: dict[_Band, list[int]], bands: Iterable[_Band], settled: AbstractSet[int]) -> set[int]:
    """The rows that share one of the bands and are not settled; those that are leave the lists."""
    found: set[int] = set()
    for band in bands:
        if band in held:
            held[band] = [place for place in held[band] if place not in settled]
            found.update(held[band])
    return found


def _compare(one: AbstractSet[str], other: AbstractSet[str], common: AbstractSet[str]) -> float:
    """The lesser of the similarities of the whole sets and of what in them is not common."""
    return min(_jaccard(one, other), _jaccard(one - common, other - common))


def _jaccard(one: AbstractSet[str], other: AbstractSet[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 0.0
