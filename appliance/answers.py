"""A pulled version at work: its answers, with prompts as it was trained to see them, and a model of its own."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.command import run_command
from appliance.digest import canonical_json, digest_folder, write_atomic
from appliance.errors import CommandError, EvaluationError, ModelError, RegistryError
from appliance.evaluation import Arm, GenerationJob, Output, build_prompts, generate
from appliance.example import Example, Message
from appliance.manifest import Manifest, decode_manifest
from appliance.method import VIRTUAL_TOKENS, FullMethod
from appliance.model import Base, load_template, resolve_base, set_thinking
from appliance.recipe import EvaluationSection, Recipe
from appliance.registry import verify_folder
from appliance.run import Run, load_run

_BATCH = 16
_MERGE_TIMEOUT_S = 7200.0


@dataclass(frozen=True, slots=True)
class Pulled:
    """An artifact in a folder, with what all its training rows shared: the system prompt, and whether answers think.

    `label` is its version, or its run; `revision` its base's. `four_bit` where it was judged on a base in 4 bits.
    """

    folder: Path
    label: str
    revision: str
    recipe: Recipe
    system_prompt: str | None
    thinking: str | None
    four_bit: bool

    @property
    def is_adapter(self) -> bool:
        """Whether it needs its base."""
        return not isinstance(self.recipe.method, FullMethod)


def load_pulled(folder: Path) -> Pulled:
    """The version that `appliance pull` put into `folder`, or what the run kept there has trained.

    Raises `RegistryError` where there is neither, and where the files are not those that were recorded.
    """
    home = folder.resolve()
    run = load_run(home)
    if run is not None:
        return _load_trained(run)
    file = home / "manifest.json"
    try:
        manifest = decode_manifest(file.read_bytes(), source=str(file))
    except OSError as fault:
        raise RegistryError(_describe_missing(folder)) from fault
    verify_folder(folder, _select_checked(manifest), allow_others=True)
    card = _read_card(home)
    prompt = card.get("data", {}).get("system_prompt")
    return Pulled(
        folder=home,
        label=manifest.version,
        revision=manifest.base["revision"],
        recipe=Recipe.model_validate(manifest.recipe),
        system_prompt=prompt if isinstance(prompt, str) else None,
        thinking=card.get("training", {}).get("thinking"),
        four_bit=card.get("evaluation", {}).get("four_bit", False),
    )


def _select_checked(manifest: Manifest) -> Manifest:
    """The files that are looked at: no README, which is for people, nor a model's own weights: that takes long."""
    is_large = manifest.kind == "model"
    skipped = [f for f in manifest.files if f.path == "README.md" or (is_large and f.path.endswith(".safetensors"))]
    return manifest.model_copy(update={"files": tuple(f for f in manifest.files if f not in skipped)})


def _load_trained(run: Run) -> Pulled:
    """What a run has trained, judged or not."""
    if not run.is_done("train"):
        raise RegistryError(f"{run.folder}: this run is not trained yet; `appliance train RECIPE` goes on with it")
    record = run.read("prepare")
    if not record.get("recipe"):
        message = f"{run.folder}: an earlier release made this run and kept no recipe in it"
        raise RegistryError(f"{message}; publish it and pull the version, or train it again with other --runs")
    pulled = Pulled(
        folder=run.adapter,
        label=run.folder.name,
        revision=record["base"]["revision"],
        recipe=Recipe.model_validate(record["recipe"]),
        system_prompt=record["system_prompt"],
        thinking=record["thinking"],
        four_bit=run.is_done("evaluate") and run.read("evaluate").get("four_bit", False),
    )
    if pulled.is_adapter and digest_folder(run.adapter) != run.read("train")["summary"]["adapter_sha256"]:
        message = f"{run.adapter}: not what this run has trained; `appliance train RECIPE` makes it again"
        raise RegistryError(message)
    return pulled


def _describe_missing(folder: Path) -> str:
    name, at, _ = str(folder).partition("@")
    if at and not folder.exists():
        pull = f"`appliance pull {folder} ./{name}`"
        return f"{folder}: expected a folder, not a version's name; run {pull}, then `appliance generate ./{name}`"
    pull = f"`appliance pull NAME@ALIAS {folder}`"
    return (
        f"{folder}: no manifest.json and no finished training here; fetch a version with {pull}, or give a run folder"
    )


def find_base(pulled: Pulled, *, root: Path, cache: Path, note: Callable[[str], None]) -> Base:
    """The base model, which must be the one that the artifact was trained on. Raises `ModelError`."""
    base = resolve_base(pulled.recipe.base, root=root.resolve(), cache=cache.expanduser().resolve(), note=note)
    if base.revision != pulled.revision:
        raise ModelError(
            f"base model {base.model}: its revision is {base.revision}, {pulled.label} was trained on "
            f"{pulled.revision}; give --root or restore the base it was trained on"
        )
    return base


def answer(
    pulled: Pulled,
    asked: Sequence[str],
    *,
    base: Base | None,
    system: str | None,
    compare: bool,
    limit: int,
    note: Callable[[str], None],
) -> list[Output]:
    """Greedy answers of at most `limit` tokens to user turns, named by their number, the version's before the base's.

    `system` replaces the prompt that the version was trained with; to `compare`, the base has the recipe's best one
    unless there is a `system`. A full model without comparison needs no `base`.
    """
    arms = _build_arms(pulled, base=base, compare=compare)
    lead = system if system is not None else pulled.system_prompt
    begin = (Message("system", lead),) if lead else ()
    examples = [
        Example(str(i), (*begin, Message("user", t), Message("assistant", "")), provenance="human")
        for i, t in enumerate(asked)
    ]
    template = set_thinking(load_template(arms[0].model), pulled.thinking)
    best = pulled.recipe.evaluation.system_prompt if system is None else None
    section = EvaluationSection(few_shot=0, system_prompt=best)
    prompts = [p for a in arms for p in build_prompts(a, examples, section=section, train=(), template=template)]
    with tempfile.TemporaryDirectory(prefix="appliance-") as scratch:
        job = GenerationJob(
            folder=Path(scratch),
            arms=arms,
            stop_ids=tuple(sorted(template.stop_ids)),
            max_new_tokens=limit,
            batch=_BATCH,
            precision="auto",
            four_bit=pulled.four_bit,
        )
        try:
            outputs = generate(job, prompts, note=note)
        except EvaluationError as fault:
            words = str(fault).removeprefix("evaluation: ").partition("; its log is ")[0]  # which goes with the folder
            raise EvaluationError(f"{pulled.folder}: no answers: {words}") from fault
    return sorted(outputs, key=lambda o: (int(o.id), o.arm))


def merge(pulled: Pulled, folder: Path, *, base: Base, note: Callable[[str], None]) -> dict[str, float]:
    """Write base and adapter as one model into `folder`, which appears when it is whole; `merged.json` says of what.

    Returns how far the adapter moves the base's logits (`effect`) and how far merging leaves them off (`drift`).
    Raises `ModelError` where the adapter is none that can be merged, or more than half of its effect would be lost.
    """
    kind = pulled.recipe.method.type
    if isinstance(pulled.recipe.method, FullMethod):
        raise ModelError(f"{pulled.label}: trained with full, it is a model of its own; serve {pulled.folder} as it is")
    if isinstance(pulled.recipe.method, VIRTUAL_TOKENS):
        raise ModelError(f"{pulled.label}: {kind} has no change of weights; serve it with transformers and PEFT")
    if folder.exists() or folder.is_symlink():
        raise ModelError(f"{folder}: is there already; name another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    note(f"merging {pulled.label} into {base.model}")
    if pulled.four_bit:
        note("it was judged on its base in 4 bits: in 16 it is another model than the card tells of")
    try:
        program = [sys.executable, "-m", "appliance.model.merge", str(base.folder), str(pulled.folder), str(staged)]
        figures: dict[str, float] = json.loads(run_command(program, timeout_s=_MERGE_TIMEOUT_S).splitlines()[-1])
        facts = {"version": pulled.label, "base": base.to_json(), "method": kind, **figures}
        write_atomic(staged / "merged.json", canonical_json(facts))
        for file in staged.rglob("*"):  # safetensors writes 0600
            file.chmod(0o755 if file.is_dir() else 0o644)
        staged.chmod(0o755)
        staged.rename(folder)
    except CommandError as fault:
        raise ModelError(f"{pulled.label}: cannot be merged into {base.model}: {fault.last_line}") from fault
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return figures


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / "card" / "card.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _build_arms(pulled: Pulled, *, base: Base | None, compare: bool) -> tuple[Arm, ...]:
    """The version, and the prompted base to compare with; `base` may be missing for a full model."""
    prompted = [Arm("zero_shot", base.folder, None, is_prompted=True)] if base and compare else []
    if base and pulled.is_adapter:
        return (*prompted, Arm("candidate", base.folder, pulled.folder, is_prompted=False))
    return (*prompted, Arm("candidate", pulled.folder, None, is_prompted=False))
