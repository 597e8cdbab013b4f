"""`appliance generate`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click

from appliance.answers import answer, find_base, load_pulled
from appliance.cli.common import cache_option, json_option, print_json, root_option, say
from appliance.cli.lines import show_example


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
    """Answer prompts with the version pulled into FOLDER, or with what a run folder has trained (greedy decoding)."""
    pulled = load_pulled(folder)
    base = find_base(pulled, root=root, cache=cache, note=say) if pulled.is_adapter or compare else None
    if not prompts and sys.stdin.isatty():
        say("prompts, one a line; Ctrl-D answers")
    asked = prompts or _read_prompts()
    if not asked:
        raise click.UsageError("nothing to answer: give --prompt or lines on standard input")
    outputs = answer(pulled, asked, base=base, system=system, compare=compare, limit=max_new_tokens, note=say)
    if as_json:
        print_json([{"prompt": asked[int(o.id)], "arm": o.arm, "output": o.output, "stop": o.stop} for o in outputs])
        return
    for index, text in enumerate(asked):
        click.echo(click.style(text, bold=True))
        for output in (o for o in outputs if int(o.id) == index):
            click.echo(f"  {'tuned' if output.arm == 'candidate' else 'base':6} {output.output}")


def _read_prompts() -> tuple[str, ...]:
    """The lines of standard input, without the byte-order mark that some editors begin a file with."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    try:
        lines = sys.stdin.read().removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as fault:
        place = f"standard input: byte {fault.start + 1} is no {fault.encoding}"
        raise click.UsageError(f"{place}; save the prompts in that encoding") from fault
    return tuple(line.strip() for line in lines if line.strip())
