"""Near copies: test rows that ask nearly what a trained row asks, and have that row's answer.

A model that remembers the trained row answers such a test row, so it says nothing of requests that are new. Pairs that
might be are found by MinHash (Broder 1997), and each is then measured exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import nsmallest

from rensa import RMinHash

from appliance.digest import digest_bytes, digest_json
from appliance.example import Example, normalise_text

_GRAM = 4
_SIMILAR = 0.8
_COMMON = 0.1  # of all rows: more have a gram that belongs to the form of requests
_FEW = 5  # rows are no form, however few there are
_SAMPLE = 500  # rows that show what is common
# Of pairs that are just similar enough 1 in 20,000 shares no band; of those similar by 0.2, 1 in 125 shares one.
_BANDS, _WIDTH, _SEED = 25, 5, 1


def find_near_copies(test: Sequence[Example], trained: Sequence[Example]) -> dict[int, int]:
    """The places in `test` of rows with a near copy in `trained`, each with the place of the one most like it.

    Rows are near copies where their prompts are similar by 0.8 or more (Jaccard, sets of 4 characters on end), both
    whole and without the grams that more than a tenth of all rows have, for an instruction that every request begins
    with makes no two alike; and where their answers are the same but for case, white space and forms of characters.
    System prompts are not compared.
    """
    answers = [_read_answer(e) for e in trained]
    shared = {_read_answer(e) for e in test}.intersection(answers)
    if not shared:
        return {}
    common = _find_common([*test, *trained])
    held: dict[tuple[str, int, tuple[int, ...]], list[int]] = {}
    for place, example in enumerate(test):
        if (answer := _read_answer(example)) in shared:
            for band in _hash_bands(_cut(example) - common):
                held.setdefault((answer, *band), []).append(place)
    nearest: dict[int, tuple[float, int]] = {}
    for place, (example, answer) in enumerate(zip(trained, answers, strict=True)):
        if answer not in shared:
            continue
        grams = _cut(example)
        for other in {o for band in _hash_bands(grams - common) for o in held.get((answer, *band), ())}:
            similarity = _compare(_cut(test[other]), grams, common)
            if similarity >= _SIMILAR and similarity > nearest.get(other, (0.0, 0))[0]:
                nearest[other] = similarity, place
    return {other: place for other, (_, place) in sorted(nearest.items())}


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


def _hash_bands(grams: set[str]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each band's number and its part of the MinHash signature; none of a row without grams that tell it."""
    if grams:
        sketch = RMinHash(num_perm=128, seed=_SEED)
        sketch.update(grams)
        signature = sketch.digest()
        for band in range(_BANDS):
            yield band, tuple(signature[band * _WIDTH : (band + 1) * _WIDTH])


def _compare(one: set[str], other: set[str], common: set[str]) -> float:
    """The lesser of the similarities of the whole sets and of what in them is not common."""
    return min(_jaccard(one, other), _jaccard(one - common, other - common))


def _jaccard(one: set[str], other: set[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 0.0
