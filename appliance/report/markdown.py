"""The card as Markdown: a model card for hubs and a summary for pull requests and job pages."""

from __future__ import annotations

import re
from typing import Any

import yaml

from appliance.report.words import (
    ARM_NAMES,
    VERDICT_WORDS,
    list_alerts,
    list_facts,
    list_use,
    say_interval,
    say_percent,
    say_reasons,
    say_share,
    title_rows,
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")


def render_markdown(card: dict[str, Any]) -> str:
    """The whole card; tables first, so that a job page shows the answer without scrolling."""
    parts = [
        _render_front_matter(card),
        f"# {_escape(card['name'])}",
        _render_verdict(card),
        _render_arms(card),
        _render_slices(card),
        _render_alerts(card),
    ]
    parts += [_render_facts(title, facts) for title, facts in list_facts(card).items()]
    parts.append(_render_use(card))
    return "\n\n".join(p for p in parts if p) + "\n"


def _render_front_matter(card: dict[str, Any]) -> str:
    """Hub metadata with the result as a model-index."""
    verdict = card["verdict"]
    metric = {"type": verdict["metric"], "value": round(verdict["arms"]["candidate"]["score"], 4)}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": card["data"].get("name", "data"), "type": "private", "split": "test"},
        "metrics": [metric],
    }
    front = {
        "base_model": card["base"].get("model"),
        "library_name": "transformers" if card["recipe"]["method"]["type"] == "full" else "peft",
        "tags": ["appliance", card["recipe"]["method"]["type"]],
        "model-index": [{"name": card["name"], "results": [result]}],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _render_verdict(card: dict[str, Any]) -> str:
    verdict = card["verdict"]
    reasons = "\n".join(f"- {_escape(r)}" for r in say_reasons(verdict["reasons"]))
    words = VERDICT_WORDS[verdict["outcome"]].split(": ", 1)[1]
    return f"**Verdict: {verdict['outcome']}.** {words[0].upper()}{words[1:]}\n\n{reasons}"


def _render_arms(card: dict[str, Any]) -> str:
    verdict = card["verdict"]
    head = f"| Arm | {verdict['metric']} | 95% interval | keeps the contract | field F1 | prompt tokens | cut off |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, arm in verdict["arms"].items():
        cells = [
            ARM_NAMES.get(name, name),
            say_percent(arm["score"]),
            say_interval(arm["interval"]),
            say_percent(arm.get("contract_valid")),
            say_share(arm.get("field_f1")),
            f"{arm['mean_prompt_tokens']:.0f}",
            say_percent(arm["length_stops"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return f"## {title_rows(verdict)}\n\n" + "\n".join(lines)


def _render_slices(card: dict[str, Any]) -> str:
    slices = card["verdict"]["slices"]
    if not slices:
        return ""
    arms = list(card["verdict"]["arms"])
    lines = [
        "| Category | rows | " + " | ".join(ARM_NAMES.get(a, a) for a in arms) + " |",
        "|---" * (len(arms) + 2) + "|",
    ]
    for name, row in slices.items():
        rows = max(v["n"] for v in row.values())
        scores = " | ".join(say_percent(row[a]["score"]) if a in row else "–" for a in arms)
        lines.append(f"| {_escape(name)} | {rows} | {scores} |")
    return "## By category\n\n" + "\n".join(lines)


def _render_alerts(card: dict[str, Any]) -> str:
    alerts = "\n".join(f"- {_escape(a)}" for a in list_alerts(card))
    return f"## During training\n\n{alerts}" if alerts else ""


def _render_facts(title: str, facts: dict[str, str]) -> str:
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(f"| {_escape(k)} | {_escape(v)} |" for k, v in facts.items())


def _render_use(card: dict[str, Any]) -> str:
    commands = "\n".join(list_use(card))
    return f"## Use\n\n```\n{commands}\n```"


def _escape(text: str) -> str:
    """Text that cannot become markup or leave its table cell."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
