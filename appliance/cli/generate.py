"""`appliance generate`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click

from appliance.cli.common import json_option, print_json, say
from appliance.errors import RegistryError
from appliance.evaluation import Arm, GenerationJob, Output, build_prompts, generate
from appliance.example import Example, Message
from appliance.manifest import Manifest, decode_manifest
from appliance.model import Base, load_template, resolve_base
from appliance.recipe import EvaluationSection, Recipe


@click.command("generate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--prompt", "prompts", multiple=True, help="A user turn; repeatable. Lines of standard input when left out."
)
@click.option("--system", help="System prompt; the one the version was trained with when left out.")
@click.option("--compare", is_flag=True, help="Also by the base model, with the recipe's best prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1, 8192), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--root", type=click.Path(path_type=Path), default=".", show_default=True, help="Where a relative base path starts."
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    envvar="APPLIANCE_CACHE",
    default=lambda: Path.home() / ".cache" / "appliance",
    show_default="~/.cache/appliance",
    help="Folder for base models. [env: APPLIANCE_CACHE]",
)
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
    base = resolve_base(recipe.base, root=root.resolve(), cache=cache.expanduser().resolve(), note=say)
    asked = prompts or tuple(line.strip() for line in sys.stdin if line.strip())
    if not asked:
        raise click.UsageError("nothing to answer: give --prompt or lines on standard input")
    lead = system if system is not None else _read_system(folder)
    outputs = _answer(
        asked,
        system=lead,
        best=recipe.evaluation.system_prompt if system is None else None,
        base=base,
        folder=folder,
        is_adapter=manifest.kind == "adapter",
        compare=compare,
        limit=max_new_tokens,
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


def _read_system(folder: Path) -> str | None:
    """The system prompt that all training rows shared, from the card."""
    try:
        card = json.loads((folder / "card" / "card.json").read_bytes())
    except (OSError, ValueError):
        return None
    prompt = card.get("data", {}).get("system_prompt")
    return prompt if isinstance(prompt, str) else None


def _answer(
    asked: tuple[str, ...],
    *,
    system: str | None,
    base: Base,
    folder: Path,
    is_adapter: bool,
    best: str | None,
    compare: bool,
    limit: int,
) -> list[Output]:
    lead = (Message("system", system),) if system else ()
    examples = [
        Example(str(i), (*lead, Message("user", t), Message("assistant", "")), provenance="human")
        for i, t in enumerate(asked)
    ]
    arms = [
        Arm(
            "candidate",
            base.folder if is_adapter else folder.resolve(),
            folder.resolve() if is_adapter else None,
            is_prompted=False,
        )
    ]
    if compare:
        arms.insert(0, Arm("zero_shot", base.folder, None, is_prompted=True))
    template = load_template(base.folder)
    section = EvaluationSection(few_shot=0, system_prompt=best)
    prompts = [p for a in arms for p in build_prompts(a, examples, section=section, train=(), template=template)]
    with tempfile.TemporaryDirectory(prefix="appliance-") as scratch:
        job = GenerationJob(
            folder=Path(scratch),
            arms=tuple(arms),
            stop_ids=tuple(sorted(template.stop_ids)),
            max_new_tokens=limit,
            batch=16,
            precision="auto",
        )
        return sorted(generate(job, prompts, note=say), key=lambda o: (int(o.id), o.arm))  # tuned before base
