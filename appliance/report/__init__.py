"""The report: one JSON truth about a run, rendered as Markdown and as one self-contained page."""

from __future__ import annotations

from appliance.report.card import build_card, write_card
from appliance.report.html import render_html
from appliance.report.markdown import render_markdown
from appliance.report.words import ARM_NAMES, say_interval, say_reasons

__all__ = [
    "ARM_NAMES",
    "build_card",
    "render_html",
    "render_markdown",
    "say_interval",
    "say_reasons",
    "write_card",
]
