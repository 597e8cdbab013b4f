"""Laws of encoding a conversation turn by turn: the tokens of each text encoded whole, in the work of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, make_example, write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tokenizer

from appliance.model import ChatTemplate, load_template, mask, render_rows
from appliance.model.growing import GrowingText

LETTERS = sorted({*"abcAB :\n", "▁"})
# Control tokens by their flags; those in the second line do not part a text by themselves.
FLAGS: dict[str, dict[str, bool]] = {
    "<s>": {}, "<sep>": {}, "<sep>a": {}, "<r>": {"rstrip": True}, "\n\n": {},
    "<l>": {"lstrip": True}, "<n>": {"normalized": True}, "<w>": {"single_word": True}, "bb": {"normalized": True},
}  # fmt: skip
PARTING = ("<s>", "<sep>", "<sep>a", "<r>", "\n\n")
PIECES = (*FLAGS, *"abcAB :\n", "ab", "  ", "a b", "\n", "<se", "p>")


def write_kind(folder: Path, kind: str) -> ChatTemplate:
    """A tokenizer with merges whose texts are cut, changed or led by a mark as those of its kind."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    write_tokenizer(folder)
    letters = sorted({*LETTERS, *"<>slerpnw ", *(pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else ())})
    merges = [("a", "b"), ("ab", "c"), (":", "a"), ("▁", "a")]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate((*letters, "ab", "abc", ":a", "▁a"))}, merges=merges))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind in ("always", "first", "never"):
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    elif kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "lower":
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    made.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    made.add_tokens([AddedToken(t, **{"normalized": False, **flags}) for t, flags in FLAGS.items()])
    made.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").unlink()
    return load_template(folder)


@pytest.fixture(scope="module", params=["plain", "bytes", "always", "first", "never", "legacy", "lower"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """One tokenizer of each kind."""
    return write_kind(tmp_path_factory.mktemp(request.param), request.param)


def count_work(template: ChatTemplate) -> tuple[ChatTemplate, list[int]]:
    """The template, and the characters of each text that its tokenizer is given from now on."""
    work: list[int] = []

    class Counting:
        def encode(self, text: str, **options: Any) -> Any:
            work.append(len(text))
            return template.tokenizer.encode(text, **options)

        def decode(self, *ids: Any, **options: Any) -> Any:
            return template.tokenizer.decode(*ids, **options)

    return replace(template, tokenizer=Counting()), work


Change = tuple[float, list[str]]


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.lists(st.sampled_from(PIECES), max_size=12)), max_size=8))
def test_every_text_has_the_tokens_of_one_that_is_encoded_whole(template: ChatTemplate, changes: list[Change]) -> None:
    """However a text goes on from the one before, and wherever it leaves it, in the middle of a token too."""
    grown, text = GrowingText(template), ""
    for kept, pieces in changes:
        text = text[: round(kept * len(text))] + "".join(pieces)
        assert grown.encode(text) == list(template.encode(text).ids)
        assert grown.is_exact()


def test_tokens_that_take_part_in_the_text_around_them_part_nothing(template: ChatTemplate) -> None:
    """One that eats the space before it, or is looked for in the changed text, has no border of its own."""
    by_name = {name: template.tokenizer.token_to_id(name) for name in FLAGS}
    assert {n for n, i in by_name.items() if i in template.parting} == set(PARTING)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_long_conversation_is_encoded_a_few_times_and_not_for_every_turn(tmp_path: Path, family: Any) -> None:
    """The rows are those of encoding every turn whole, which reads sixty times as much here."""
    think = "<think>\nwell\n</think>\n\n" if "reasons" in family.can else ""
    turns = [t for n in range(60) for t in (("user", f"question {n} " * 5), ("assistant", think + f"answer {n}\n" * 5))]
    example = make_example(*turns)
    template, work = count_work(load_template(write_family(tmp_path, family)))
    rows = render_rows(example, template)
    few = sum(work)
    work.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask, "GrowingText", lambda template: Whole(template.encode))
        assert rows == render_rows(example, template)
    assert few < 0.1 * sum(work)


class Whole:
    """What `GrowingText` spares: every text encoded whole."""

    def __init__(self, encode: Callable[[str], Any], *, exact: bool = True) -> None:
        self.encode_whole, self.exact = encode, exact

    def encode(self, text: str) -> list[int]:
        """The tokens; others than those where it is not exact."""
        return list(self.encode_whole(text).ids)[: None if self.exact else -1]

    def is_exact(self) -> bool:
        """As it was made."""
        return self.exact


def test_tokens_that_are_not_those_of_the_whole_are_never_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a tokenizer not part a text at its control tokens, every turn is encoded whole."""
    example = make_example(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    template = load_template(write_family(tmp_path, FAMILIES[0]))
    rows = render_rows(example, template)
    monkeypatch.setattr(mask, "GrowingText", lambda template: Whole(template.encode, exact=False))
    assert render_rows(example, template) == rows
