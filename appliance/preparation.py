"""What is known before anything is spent: the checked data, its split, the base, the key and the plan."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from appliance import __version__, registry
from appliance.command import run_command
from appliance.data import (
    OWN_ANSWER_TOKENS,
    Dataset,
    Finding,
    GeneralRows,
    Report,
    Row,
    Splits,
    check_apart,
    check_dataset,
    check_general,
    check_masks,
    check_tokens,
    count_replayed,
    describe_findings,
    describe_lengths,
    digest_general,
    find_in_fault,
    find_shared,
    load_general,
    order_general,
    select_side,
    split_dataset,
)
from appliance.digest import State, stat_files
from appliance.errors import CommandError, DatasetError, EvaluationError, ModelError, StoreError
from appliance.evaluation import rehearse_prompts
from appliance.example import Example
from appliance.model import Base, ChatTemplate, TokenRow, fit_template, load_template, resolve_base
from appliance.model.shapes import has_position_table, read_sizes, read_weight_shapes
from appliance.plan import Machine, Plan, build_plan, check_positions
from appliance.recipe import ForgettingSection, GateSection, Recipe, SplitSection
from appliance.run import build_run_key
from appliance.store import Store
from appliance.training import build_rows

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where things are: repository, bases, run folders, TensorBoard files (a folder per run), mirrored checkpoints.

    `image` is the container image, by digest, that all of it happens in.
    """

    root: Path
    cache: Path
    runs: Path
    note: Callable[[str], None]
    tensorboard: Path | None = None
    mirror: Store | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Which commit asked for the run, when (UTC, 2026-01-31T12:00:00Z), and who runs it.

    `head` is the commit that is checked out, which may have changed other files since; `None` where it is
    not known, or is not what is on this disk. `unheld` is what of the recipe and its rows no commit of the repository
    holds, in words: such a version is published and gets no alias by its verdict.
    """

    commit: str | None
    time: str
    actor: str
    head: str | None = None
    unheld: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before training: the checked data, the base, and the key of the run."""

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    base: Base
    key: str
    replay: GeneralRows | None = None
    ewc: GeneralRows | None = None


def prepare(recipe: Recipe, *, workspace: Workspace) -> Prepared:
    """Check and split the data, bring the base model. Raises `DatasetError` listing every fault."""
    checked = check_data(recipe, root=workspace.root)
    if checked.errors or checked.dataset is None:
        raise DatasetError("\n".join(describe_findings(checked.errors)))
    for finding in checked.warnings:
        workspace.note(f"warning: {finding}")
    splits = split_dataset(checked.dataset, recipe.dataset.split)
    replay, ewc = _load_general(recipe.forgetting, splits=splits, root=workspace.root)
    base = resolve_base(recipe.base, root=workspace.root, cache=workspace.cache, note=workspace.note)
    key = build_run_key(
        recipe,
        data_digest=checked.dataset.digest,
        base_digest=base.digest,
        general_digest=digest_general(recipe.forgetting, replay, ewc),
    )
    return Prepared(recipe, checked.dataset, splits=splits, base=base, key=key, replay=replay, ewc=ewc)


def find_made(recipe: Recipe, *, pointer: str, workspace: Workspace, store: Store) -> tuple[str, str] | None:
    """Version and run key of this recipe, base and HEAD's data, known without the data; `None` where it has to tell.

    A run key needs the data's digest. A manifest has that of its data, and its commit the pointer of it: where that
    is HEAD's pointer, the data is the same. Only for rows below the pointer's folder, and without general rows.
    """
    versions = registry.list_versions(store, recipe.name)
    if recipe.forgetting is not None or not versions:
        return None
    base = resolve_base(recipe.base, root=workspace.root, cache=workspace.cache, note=workspace.note)
    for manifest in (v.manifest for v in reversed(versions)):
        key = build_run_key(recipe, data_digest=manifest.data_digest, base_digest=base.digest)
        if manifest.run_key == key and _has_pointer_of_head(manifest.git_commit, pointer, root=workspace.root):
            return registry.select_run(versions, key) or "", key
    return None


def _has_pointer_of_head(commit: str | None, pointer: str, *, root: Path) -> bool:
    if commit is None:
        return False
    try:
        run_command(["git", "diff", "--quiet", commit, "HEAD", "--", pointer], cwd=root)
    except CommandError:  # another pointer, or a commit that this clone does not have
        return False
    return True


def _load_general(
    section: ForgettingSection | None, *, splits: Splits, root: Path
) -> tuple[GeneralRows | None, GeneralRows | None]:
    """The rows to replay and those for the Fisher, none of which asks what the dataset asks."""
    sections = (section.replay, section.ewc) if section is not None else (None, None)
    replay, ewc = (load_general(s, root=root) if s is not None else None for s in sections)
    for rows in (r for r in (replay, ewc) if r is not None):
        check_apart(rows, splits)
    return replay, ewc


def list_row_paths(recipe: Recipe) -> list[str]:
    """Every folder of rows that a recipe names."""
    forgetting = recipe.forgetting
    general = (forgetting.replay, forgetting.ewc) if forgetting is not None else ()
    return [recipe.dataset.path, *(s.path for s in general if s is not None and s.path is not None)]


def note_tokens(
    prepared: Prepared, general: Sequence[Example], *, template: ChatTemplate, workspace: Workspace
) -> None:
    """Tell the control tokens in the text of the rows, of the dataset and of the `general` ones that are used."""
    places = [(r.where, r.example) for r in prepared.dataset.rows] + [("forgetting", e) for e in general]
    for line in describe_findings(tuple(check_tokens(places, template))):
        workspace.note(f"warning: {line}")


def rehearse(prepared: Prepared, *, template: ChatTemplate, workspace: Workspace) -> None:
    """Refuse before the training what evaluation would fail at after it, or validation in it; tell what is cut."""
    section, base = prepared.recipe.evaluation, prepared.base
    longest = rehearse_prompts(section, test=prepared.splits.test, train=prepared.splits.train, template=template)
    context = read_sizes(base.folder).context
    if context and longest + section.max_new_tokens > context:
        said = (
            f"evaluation: the longest prompt has {longest} tokens, with max_new_tokens {section.max_new_tokens} more "
            f"than the {context} that {base.model} was made for"
        )
        if has_position_table(read_weight_shapes(base.folder)):
            raise EvaluationError(f"{said}; write a smaller evaluation.few_shot or evaluation.max_new_tokens")
        workspace.note(f"warning: {said}: answers there count for little; a smaller evaluation.few_shot may help")
    _check_validation(prepared, template=template)
    _note_cut(prepared, template=template, workspace=workspace)


def _check_validation(prepared: Prepared, *, template: ChatTemplate) -> None:
    """Refuse a validation row that a base's table has no positions for; of rows to train on the plan knows."""
    weights, section = read_weight_shapes(prepared.base.folder), prepared.recipe.training
    if has_position_table(weights):
        rows = build_rows(
            prepared.splits.validation, template=template, max_length=section.max_length, overlong=section.overlong
        )
        longest, sizes = max((len(r.input_ids) for r in rows), default=0), read_sizes(prepared.base.folder)
        check_positions(prepared.recipe, weights, sizes, longest=longest, kind="validation row")


def _note_cut(prepared: Prepared, *, template: ChatTemplate, workspace: Workspace) -> None:
    """Tell that answers to test rows are cut before they can be the references."""
    most = prepared.recipe.evaluation.max_new_tokens
    lengths = [(len(template.encode(e.messages[-1].content).ids), e.id) for e in prepared.splits.test]
    cut = [pair for pair in lengths if pair[0] > most]
    if cut:
        longest, row = max(cut)
        workspace.note(
            f"warning: evaluation.max_new_tokens {most} cuts every answer to {len(cut)} of {len(lengths)} test rows "
            f"before it can be the reference (row {row} has {longest} tokens); write {longest + 1} or more"
        )


def check_data(recipe: Recipe, *, root: Path) -> Report:
    """The findings for a recipe's dataset that need no base model; places are named from `root`."""
    return _check_data(recipe, root=root).shorten(root)


def _check_data(recipe: Recipe, *, root: Path) -> Report:
    """Recipes that share a dataset have it read once."""
    folder, split, gates = root / recipe.dataset.path, recipe.dataset.split, recipe.evaluation.gates
    state = stat_files(folder)
    return (
        check_dataset(folder, split=split, gates=gates) if state is None else _check_known(folder, state, split, gates)
    )


@lru_cache(maxsize=2)
def _check_known(folder: Path, _state: State, split: SplitSection, gates: GateSection) -> Report:
    return check_dataset(folder, split=split, gates=gates)


def check_recipe(recipe: Recipe, *, workspace: Workspace) -> Report:
    """All that training would refuse of a recipe's rows, before a GPU is asked for.

    `check_data`, the split, the folders of general rows, and by the base's chat template every mask and
    length. A base that is not at hand is one warning, and the rest is checked. Places are named from the root.
    """
    return _check_recipe(recipe, workspace=workspace).shorten(workspace.root)


def _check_recipe(recipe: Recipe, *, workspace: Workspace) -> Report:
    report = _check_data(recipe, root=workspace.root)
    rows = report.dataset.rows if report.dataset is not None else ()
    sides: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        sides[select_side(row.example.group_key, recipe.dataset.split)].append(row)
    findings = [*report.findings]
    if report.dataset is not None and rows:
        findings += _check_split(report.dataset, recipe)
    general, found = _check_general(recipe.forgetting, sides=sides, root=workspace.root)
    if not (rows or any(general.values())):  # nothing to render: no base is brought for it
        return replace(report, findings=(*findings, *found))
    template, unknown = _find_template(recipe, workspace=workspace)
    findings += [*found, *unknown]
    if template is None:
        return replace(report, findings=tuple(findings))
    shapeless = {f.where for f in findings if f.rule in ("roles", "empty", "schema")}
    sound = {
        name: [r for r in chosen if r.where not in shapeless]
        for name, chosen in {**sides, "train": sides["train"] + general["replay"], "Fisher": general["ewc"]}.items()
    }
    fitted = fit_template(template, [r.example for r in sides["train"]])
    masks, lengths = check_masks(sound, template=fitted, training=recipe.training)
    if not any(f.severity == "error" for f in (*findings, *masks)):
        findings += _rehearse_sides(recipe, sides, template=fitted)
    counts = report.counts | (describe_lengths(lengths) if lengths else {})
    return replace(report, findings=tuple(dict.fromkeys((*findings, *masks))), counts=counts)


def _rehearse_sides(recipe: Recipe, sides: dict[str, list[Row]], *, template: ChatTemplate) -> Iterator[Finding]:
    test, train = ([r.example for r in sides[side]] for side in ("test", "train"))
    try:
        rehearse_prompts(recipe.evaluation, test=test, train=train, template=template)
    except EvaluationError as fault:
        yield find_in_fault("error", "prompt", f"recipe {recipe.name}", fault)


def _check_split(dataset: Dataset, recipe: Recipe) -> Iterator[Finding]:
    try:
        split_dataset(dataset, recipe.dataset.split)
    except DatasetError as fault:
        yield find_in_fault("error", "split", str(dataset.folder), fault)


def _check_general(
    section: ForgettingSection | None, *, sides: dict[str, list[Row]], root: Path
) -> tuple[dict[str, list[Row]], list[Finding]]:
    """The general rows that would be used, by what for, and what is wrong with their folders."""
    used: dict[str, list[Row]] = {"replay": [], "ewc": []}
    findings: list[Finding] = []
    splits = Splits(*(tuple(r.example for r in sides[s]) for s in ("train", "validation", "test")))
    counts: dict[str, tuple[str, int]] = {}
    if section is not None and section.replay is not None and section.replay.path is not None:
        count = count_replayed(section.replay.share, train_rows=len(splits.train))
        counts["replay"] = (section.replay.path, count)
    if section is not None and section.ewc is not None and section.ewc.path is not None:
        counts["ewc"] = (section.ewc.path, section.ewc.rows)
    for name, (path, count) in counts.items():
        dataset, found = check_general(root / path)
        findings += found
        if dataset is None:
            continue
        places = {r.example.id: r.where for r in dataset.rows}
        for row, (side, asked) in find_shared(dataset.examples, splits).items():
            message = f"the prompt is that of {side} row {asked}"
            findings.append(Finding("error", "shared-prompt", places[row], message, "remove it", id=row))
        chosen = {e.id for e in order_general(dataset.examples)[:count]}
        used[name] = [r for r in dataset.rows if r.example.id in chosen]
    return used, findings


def _find_template(recipe: Recipe, *, workspace: Workspace) -> tuple[ChatTemplate | None, tuple[Finding, ...]]:
    """The template of the recipe's base; else why there is none: an error, or not at hand, which is a warning."""
    model = f"base model {recipe.base.model}"
    try:
        base = resolve_base(recipe.base, root=workspace.root, cache=workspace.cache, note=workspace.note)
    except (ModelError, StoreError) as fault:
        found = find_in_fault("warning", "base", model, fault)
        message = f"masks and token lengths are not checked: {found.message.removeprefix(f'{model}: ')}"
        return None, (replace(found, message=message),)
    try:
        return load_template(base.folder), ()
    except ModelError as fault:
        return None, (find_in_fault("error", "base", model, fault),)


def plan_run(
    prepared: Prepared, *, rows: Sequence[TokenRow], machine: Machine, general: Sequence[TokenRow] = ()
) -> Plan:
    """The plan of a run over the token `rows` of its train split; trains nothing.

    `general` are those of the Fisher, none where the base model is still to write them.
    """
    limit = min(prepared.recipe.training.max_length, 2 * OWN_ANSWER_TOKENS)
    longest = max((len(r.input_ids) for r in general), default=0)
    return build_plan(
        prepared.recipe,
        lengths=[len(r.input_ids) for r in rows],
        trained_tokens=sum(r.trained for r in rows),
        validation_rows=len(prepared.splits.validation),
        base=prepared.base.folder,
        machine=machine.share(prepared.recipe.needs.devices),
        longest_general=longest or limit,
        longest_beside=longest,
    )


def read_versions(*, image: str | None = None) -> dict[str, str]:
    """Versions of what makes the weights, and the container image that it was made in."""
    found = {"appliance": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"image": image} if image else {})
