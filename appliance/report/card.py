"""The card: what a version is, what it was made from, and what it proved, as one JSON value.

Markdown and HTML are functions of it, so the three can never tell different stories. Test rows
are not in it: their authors must not learn them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appliance.digest import write_atomic
from appliance.recipe import Recipe
from appliance.report.html import render_html
from appliance.report.markdown import render_markdown
from appliance.report.plots import list_plots, render_png

_CURVES = (
    "step",
    "epoch",
    "loss",
    "validation_loss",
    "validation_exact_match",
    "learning_rate",
    "grad_norm",
    "penalty",
    "tokens_per_second",
)


def build_card(
    *,
    recipe: Recipe,
    run_key: str,
    git_commit: str | None,
    created_at: str,
    base: dict[str, str],
    data: dict[str, Any],
    training: dict[str, Any],
    metrics: list[dict[str, Any]],
    evaluation: dict[str, Any],
    verdict: dict[str, Any],
    versions: dict[str, str],
) -> dict[str, Any]:
    """The card of one run; every value is plain JSON."""
    card = {
        "schema": 1,
        "name": recipe.name,
        "alias": recipe.publish.alias,
        "run_key": run_key,
        "git_commit": git_commit,
        "created_at": created_at,
        "base": base,
        "recipe": recipe.model_dump(mode="json"),
        "data": data,
        "training": training,
        "curves": [{k: m[k] for k in _CURVES if m.get(k) is not None} for m in metrics],
        "evaluation": evaluation,
        "verdict": verdict,
        "versions": versions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(card))
    return plain


def write_card(card: dict[str, Any], folder: Path) -> None:
    """Write `card.json`, `card.md`, `card.html` and a PNG of each plot into `folder`."""
    write_atomic(folder / "card.json", (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())
    write_atomic(folder / "card.md", render_markdown(card).encode())
    write_atomic(folder / "card.html", render_html(card).encode())
    for plot in list_plots(card["curves"], kept=card["training"].get("kept_step")):
        write_atomic(folder / f"{plot.name}.png", render_png(plot))
