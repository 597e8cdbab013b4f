"""`appliance generate`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from appliance.cli.common import cache_option, json_option, print_json, root_option, say
from appliance.cli.lines import show_example
from appliance.errors import ModelError, RegistryError
from appliance.evaluation import Arm, GenerationJob, Output, build_prompts, generate
from appliance.example import Example, Message
from appliance.manifest import Manifest, decode_manifest
from appliance.model import Base, load_template, resolve_base, set_thinking
from appliance.recipe import EvaluationSection, Recipe


@click.command("generate", epilog=show_example("appliance generate ./tickets --prompt 'The heater is cold.' --compare"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--prompt", "prompts", multiple=True, help="A user turn; repeatable. Lines of standard input when left out."
)
@click.option("--system", help="System prompt; the one the version was trained with when left out.")
@click.option("--compare", is_flag=True, help="Also by the base model, with the recipe's best prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1, 8192), default=256, show_default=True, help="Longest answer.")
@root_option
@cache_option
@json_option
def command(
    *,
    folder: Path,
    prompts: tuple[str, ...],
    system: str | None,
    compare: bool,
    max_new_tokens: int,
    root: Path,
    cache: Path,
    as_json: bool,
) -> None:
    """Answer prompts with the version pulled into FOLDER (greedy decoding)."""
    manifest = _load_manifest(folder)
    recipe = Recipe.model_validate(manifest.recipe)
    is_adapter = manifest.kind == "adapter"
    base = _find_base(manifest, recipe, root=root, cache=cache) if is_adapter or compare else None
    asked = prompts or tuple(line.strip() for line in sys.stdin if line.strip())
    if not asked:
        raise click.UsageError("nothing to answer: give --prompt or lines on standard input")
    card = _read_card(folder)
    prompt = card.get("data", {}).get("system_prompt")
    lead = system if system is not None else prompt if isinstance(prompt, str) else None
    outputs = _answer(
        asked,
        system=lead,
        best=recipe.evaluation.system_prompt if system is None else None,
        arms=_build_arms(folder.resolve(), base=base, is_adapter=is_adapter, compare=compare),
        limit=max_new_tokens,
        thinking=card.get("training", {}).get("thinking"),
    )
    if as_json:
        print_json([{"prompt": asked[int(o.id)], "arm": o.arm, "output": o.output, "stop": o.stop} for o in outputs])
        return
    for index, text in enumerate(asked):
        click.echo(click.style(text, bold=True))
        for output in (o for o in outputs if int(o.id) == index):
            click.echo(f"  {'tuned' if output.arm == 'candidate' else 'base':6} {output.output}")


def _load_manifest(folder: Path) -> Manifest:
    try:
        return decode_manifest((folder / "manifest.json").read_bytes(), source=str(folder / "manifest.json"))
    except OSError as fault:
        raise RegistryError(
            f"{folder}: no manifest.json here; fetch a version with `appliance pull NAME@ALIAS {folder}`"
        ) from fault


def _read_card(folder: Path) -> dict[str, Any]:
    """The card, for what all training rows shared: the system prompt, and whether answers think."""
    try:
        card = json.loads((folder / "card" / "card.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _find_base(manifest: Manifest, recipe: Recipe, *, root: Path, cache: Path) -> Base:
    """The base model, which must be the one that the version was trained on."""
    base = resolve_base(recipe.base, root=root.resolve(), cache=cache.expanduser().resolve(), note=say)
    if base.revision != manifest.base["revision"]:
        raise ModelError(
            f"base model {base.model}: its revision is {base.revision}, {manifest.version} was trained on "
            f"{manifest.base['revision']}; give --root or restore the base it was trained on"
        )
    return base


def _build_arms(folder: Path, *, base: Base | None, is_adapter: bool, compare: bool) -> tuple[Arm, ...]:
    """The version in `folder`, and the prompted base to compare with; `base` may be missing for a full model."""
    prompted = [Arm("zero_shot", base.folder, None, is_prompted=True)] if base and compare else []
    if base and is_adapter:
        return (*prompted, Arm("candidate", base.folder, folder, is_prompted=False))
    return (*prompted, Arm("candidate", folder, None, is_prompted=False))


def _answer(
    asked: tuple[str, ...],
    *,
    system: str | None,
    best: str | None,
    arms: tuple[Arm, ...],
    limit: int,
    thinking: str | None,
) -> list[Output]:
    lead = (Message("system", system),) if system else ()
    examples = [
        Example(str(i), (*lead, Message("user", t), Message("assistant", "")), provenance="human")
        for i, t in enumerate(asked)
    ]
    template = set_thinking(load_template(arms[0].model), thinking)
    section = EvaluationSection(few_shot=0, system_prompt=best)
    prompts = [p for a in arms for p in build_prompts(a, examples, section=section, train=(), template=template)]
    with tempfile.TemporaryDirectory(prefix="appliance-") as scratch:
        job = GenerationJob(
            folder=Path(scratch),
            arms=arms,
            stop_ids=tuple(sorted(template.stop_ids)),
            max_new_tokens=limit,
            batch=16,
            precision="auto",
        )
        return sorted(generate(job, prompts, note=say), key=lambda o: (int(o.id), o.arm))  # tuned before base
