"""The command line: the only place that prints, reads the environment and exits.

This module only registers the verbs; a verb's module is imported when it is called, so that
`appliance --help` costs almost nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import click

from appliance import __version__

VERBS: dict[str, str] = {
    "demo": "Run the main job end to end on this machine, all parts included.",
    "doctor": "Look whether this machine can do the work.",
    "init": "Turn a repository into one that is retrained by its commits.",
    "reconcile": "Train, evaluate and publish what the repository asks for and the registry lacks.",
    "run": "Run the main job for one recipe.",
    "data": "Check datasets.",
    "review": "Report what a change means: recipes, rows, plan, cost.",
    "plan": "Show what a recipe would do and need; trains nothing.",
    "train": "Run a recipe up to the trained adapter.",
    "evaluate": "Run a recipe up to the verdict and its card.",
    "publish": "Publish a finished run to the store.",
    "pull": "Fetch a version by name, verified byte by byte.",
    "promote": "Point an alias at a version.",
    "list": "List models, versions and aliases.",
    "show": "Show one version.",
    "check": "Look for damage in the registry; changes nothing.",
    "gc": "Delete what nothing in the registry needs, a week after it was planned.",
    "reproduce": "Train a version again and compare it byte by byte.",
    "generate": "Generate with a pulled version, and without it.",
    "merge": "Write a pulled version and its base as one model.",
}

_EPILOG = """Exit codes: 0 ok (an inconclusive verdict too, which moves no alias), 1 error, 2 usage, 3 the verdict
refuses (hold, reject), 33 stopped by a signal (run it again to resume), 34 transient device fault, 70 bug."""


class _Verbs(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]  # the module of the verb `list` hides the builtin

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            close = get_close_matches(cmd_name, VERBS, n=1)
            return ctx.fail(f"No such command {cmd_name!r}; did you mean {close[0]}?") if close else None
        command: click.Command = importlib.import_module(f"appliance.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([*VERBS.items()])


@click.group(cls=_Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="appliance")
def appliance() -> None:
    """A dataset commit becomes a checked, evaluated, published adapter."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected error is one clear message."""
    if set(sys.argv[1:] if argv is None else argv) & {"-h", "--help", "--version"}:
        return int(appliance.main(args=argv, prog_name="appliance", standalone_mode=True) or 0)
    from appliance.cli.failures import run_guarded

    return run_guarded(appliance, argv)
