"""`appliance merge`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.answers import find_base, load_pulled, merge
from appliance.cli.common import cache_option, json_option, print_json, root_option, say
from appliance.cli.lines import show_example
from appliance.digest import list_files


@click.command("merge", epilog=show_example("appliance merge ./tickets ./tickets-model"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@root_option
@cache_option
@json_option
def command(*, folder: Path, model: Path, root: Path, cache: Path, as_json: bool) -> None:
    """Write the version pulled into FOLDER, merged into its base, as a MODEL that needs no PEFT.

    For servers that do not load its kind of adapter. The merged model reads a text beside the adapter on its base;
    where rounding loses more than half of what the adapter changes, nothing is written.
    """
    pulled = load_pulled(folder)
    base = find_base(pulled, root=root, cache=cache, note=say)
    figures = merge(pulled, model, base=base, note=say)
    size = sum((model / name).stat().st_size for name in list_files(model))
    if as_json:
        print_json({"folder": str(model), "bytes": size, **figures})
        return
    click.echo(
        f"{pulled.label} on {base.model}: {size / 1e6:.1f} MB in {model}; its logits are off by "
        f"{figures['drift']:.2g}, where the adapter moves them by {figures['effect']:.2g}"
    )
