"""The general rows of one run: those to replay, those for the Fisher, and the base model's own answers.

Where a recipe names no folder, the base model answers the package's general prompts itself, once,
greedily, before training: replaying them teaches nothing new, it holds the model to what it says
already. Answers that were cut off, are empty or do not fit are left out, and the number is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from appliance import evaluation
from appliance.data import (
    OWN_ANSWER_TOKENS,
    GeneralRows,
    count_replayed,
    find_shared,
    load_prompts,
    order_general,
)
from appliance.digest import digest_json, write_atomic
from appliance.errors import DatasetError, TrainingError
from appliance.example import Example, Message, decode_examples, encode_examples
from appliance.model import Base, ChatTemplate, TokenRow, load_template, render_row
from appliance.model.shapes import read_weight_shapes
from appliance.plan import Answering, plan_answering, read_machine
from appliance.preparation import Prepared, Workspace, read_versions
from appliance.run import Run
from appliance.training import TokenCache, build_rows

_BATCH = 32


@dataclass(frozen=True, slots=True)
class Chosen:
    """The general rows that a run uses; both empty without a `forgetting` section."""

    replay: tuple[Example, ...] = ()
    ewc: tuple[Example, ...] = ()


def choose_general(prepared: Prepared, *, run: Run, workspace: Workspace, threads: int | None) -> Chosen:
    """The rows to replay and the rows for the Fisher, by content alone. Raises `DatasetError`.

    May start the generation child, when the base model is to answer and has not yet.
    """
    section = prepared.recipe.forgetting
    if section is None:
        return Chosen()
    pools = {
        name: _load_pool(rows, prepared, run=run, workspace=workspace, threads=threads)
        for name, rows in (("replay", prepared.replay), ("ewc", prepared.ewc))
        if rows is not None
    }
    replay: tuple[Example, ...] = ()
    ewc: tuple[Example, ...] = ()
    if section.replay is not None:
        count = count_replayed(section.replay.share, train_rows=len(prepared.splits.train))
        replay = select_replay(pools["replay"], count=count)
        workspace.note(f"replay: {count} of {count + len(prepared.splits.train)} training rows are general")
        if count > len(pools["replay"]):
            times = -(-count // len(pools["replay"]))
            workspace.note(f"warning: only {len(pools['replay'])} general rows; each stands in an epoch {times} times")
    if section.ewc is not None:
        ewc = select_ewc(pools["ewc"], count=section.ewc.rows)
    return Chosen(replay=replay, ewc=ewc)


def preview_rows(
    prepared: Prepared, *, template: ChatTemplate, cache: TokenCache
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """The token rows to train on and those of the Fisher, as far as they are known; starts nothing.

    Raises `TrainingError` for what training would refuse.
    """
    section = prepared.recipe.training
    trained, protected = (
        build_rows(examples, template=template, max_length=section.max_length, overlong=section.overlong, cache=cache)
        for examples in ((*prepared.splits.train, *preview_replay(prepared)), preview_ewc(prepared))
    )
    return trained, protected


def preview_replay(prepared: Prepared) -> tuple[Example, ...]:
    """The rows to replay as far as they are known without the base model's answers; starts nothing."""
    section = prepared.recipe.forgetting
    if section is None or section.replay is None or prepared.replay is None or prepared.replay.examples is None:
        return ()
    count = count_replayed(section.replay.share, train_rows=len(prepared.splits.train))
    return select_replay(prepared.replay.examples, count=count)


def preview_ewc(prepared: Prepared) -> tuple[Example, ...]:
    """The rows of the Fisher as far as they are known without the base model's answers; starts nothing."""
    section = prepared.recipe.forgetting
    if section is None or section.ewc is None or prepared.ewc is None or prepared.ewc.examples is None:
        return ()
    return select_ewc(prepared.ewc.examples, count=section.ewc.rows)


def select_ewc(pool: tuple[Example, ...], *, count: int) -> tuple[Example, ...]:
    """The first `count` general rows in content order."""
    return tuple(_mark(e, "") for e in order_general(pool)[:count])


def select_replay(pool: tuple[Example, ...], *, count: int) -> tuple[Example, ...]:
    """`count` general rows in content order, from the beginning again when the pool is smaller."""
    ordered = order_general(pool)
    rounds = [(ordered[i % len(ordered)], i // len(ordered)) for i in range(count)]
    return tuple(_mark(e, f"#{turn + 1}" if turn else "") for e, turn in rounds)


def _mark(example: Example, suffix: str) -> Example:
    """The row as a general one, under an id that no row of the dataset can be taken for."""
    return msgspec.structs.replace(example, id=f"general:{example.id}{suffix}", provenance="general")


def _load_pool(
    rows: GeneralRows, prepared: Prepared, *, run: Run, workspace: Workspace, threads: int | None
) -> tuple[Example, ...]:
    if rows.examples is not None:
        return rows.examples
    answered = answer_prompts(
        prepared.base,
        load_prompts(),
        limit=OWN_ANSWER_TOKENS,
        run=run,
        workspace=workspace,
        precision=prepared.recipe.training.precision,
        how=plan_answering(prepared.recipe, weights=read_weight_shapes(prepared.base.folder), machine=read_machine()),
        threads=threads,
    )
    shared = find_shared(answered, prepared.splits)
    template, limit = load_template(prepared.base.folder), prepared.recipe.training.max_length
    kept = tuple(e for e in answered if e.id not in shared and _fits(e, template, limit=limit))
    workspace.note(f"{len(kept)} of {len(load_prompts())} general prompts have an answer of the base model to keep")
    if not kept:
        raise DatasetError(
            f"{rows.key}: the base model finished no answer of {OWN_ANSWER_TOKENS} tokens that fits "
            f"training.max_length {limit}; give the path of a folder of general rows"
        )
    return kept


def _fits(example: Example, template: ChatTemplate, *, limit: int) -> bool:
    """Whether the row can be masked and is short enough; an answer with control tokens in it is not."""
    try:
        return len(render_row(example, template).input_ids) <= limit
    except TrainingError:
        return False


def answer_prompts(
    base: Base,
    prompts: tuple[str, ...],
    *,
    limit: int,
    run: Run,
    workspace: Workspace,
    precision: str,
    threads: int | None,
    how: Answering | None = None,
) -> tuple[Example, ...]:
    """The base model's own finished answers of at most `limit` tokens; kept in the cache for other runs.

    Raises `EvaluationError`, or `InterruptedRunError` on a signal; the same call goes on.
    """
    identity = {"base": base.digest, "prompts": prompts, "tokens": limit, "precision": precision}
    identity |= {"four_bit": True} if how and how.four_bit else {}
    file = workspace.cache / "general" / f"{digest_json({**identity, **read_versions()})[:16]}.jsonl"
    if (kept := _read_answers(file)) is not None:
        return kept
    template = load_template(base.folder)
    arm = evaluation.Arm("zero_shot", base.folder, None, is_prompted=False)
    asked = [
        Example(f"own-{i:03}", (Message("user", t), Message("assistant", "")), "general") for i, t in enumerate(prompts)
    ]
    job = evaluation.GenerationJob(
        folder=run.folder / "general",
        arms=(arm,),
        stop_ids=tuple(sorted(template.stop_ids)),
        max_new_tokens=limit,
        batch=_BATCH,
        precision=precision,
        four_bit=how.four_bit if how else False,
        devices=how.devices if how else 1,
        threads=threads,
    )
    tokens = [evaluation.Prompt(e.id, arm.name, template.encode_prompt(e.prompt, is_direct=True)) for e in asked]
    workspace.note(f"the base model answers {len(prompts)} general prompts (once; kept in {file.parent})")
    answered = keep_finished(asked, evaluation.generate(job, tokens, note=workspace.note))
    write_atomic(file, encode_examples(answered))
    return answered


def keep_finished(asked: Sequence[Example], outputs: Sequence[evaluation.Output]) -> tuple[Example, ...]:
    """The prompts with their answers, less those that are empty or were cut: a cut one teaches to stop half-way."""
    said = {o.id: o.output.strip() for o in outputs if o.stop == "eos"}
    return tuple(
        msgspec.structs.replace(e, messages=(*e.prompt, Message("assistant", said[e.id])))
        for e in asked
        if said.get(e.id)
    )


def _read_answers(file: Path) -> tuple[Example, ...] | None:
    """What the cache has; a missing or damaged file is made again."""
    try:
        return decode_examples(file.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
