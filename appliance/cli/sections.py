"""What a report says, as data: sections of tables and lines, rendered for a terminal or as Markdown.

Cells carry text from recipes and datasets. In Markdown they are shown as code, so that nothing in them
is rendered, linked or mentioned; `.github/scripts/comment.py` does the same with the JSON form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from appliance.cli.lines import wrap

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Section:
    """A title, then a table, then lines; each may be empty."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The form that `comment.py` reads."""
        return asdict(self)


def render_sections(sections: Sequence[Section]) -> str:
    """Markdown for a job's summary."""
    return "".join(_render(section) for section in sections)


def print_section(section: Section) -> None:
    """Plain columns for a terminal, those without a cell left out; the last one is wrapped below itself."""
    click.echo(click.style(section.title, bold=True))
    filled = [i for i in range(len(section.columns)) if any(row[i] for row in section.rows)]
    table = [[row[i] for i in filled] for row in (section.columns, *section.rows)] if filled else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(wrap(line, indent=2 + sum(widths[:-1]) + 2 * len(widths[:-1])))
    for line in section.lines:
        click.echo(wrap(f"  {line}", indent=4))


def _render(section: Section) -> str:
    lines = [f"### {section.title}", ""]
    if section.rows:
        lines += [f"| {' | '.join(section.columns)} |", "|---" * len(section.columns) + "|"]
        lines += [f"| {' | '.join(map(show_code, row))} |" for row in section.rows]
        lines.append("")
    lines += [f"- {show_code(line)}" for line in section.lines]
    return "\n".join([*lines, "", ""])


def show_code(text: str) -> str:
    """Text as code spans in a table cell, a line each; empty stays empty."""
    lines = [line.replace("`", "'").replace("|", "\\|").strip() for line in text.splitlines() if line.strip()]
    more = [f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
    return "<br>".join(f"`{line}`" for line in [*lines[:_SHOWN], *more])
