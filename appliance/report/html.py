"""The card as one self-contained page: no script, no request, readable on a phone and in the dark."""

from __future__ import annotations

from html import escape
from importlib import resources
from itertools import groupby
from operator import itemgetter
from typing import Any

from appliance.report.plots import draw_bar, draw_figure, list_plots
from appliance.report.words import (
    ARM_NAMES,
    DASH,
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

_CONTEXT_LIMIT = 600
_TRAINED_LIMIT = 2400


def render_html(card: dict[str, Any]) -> str:
    """The page; every text of the card is escaped."""
    style = resources.files("appliance.report").joinpath("card.css").read_text("utf-8")
    body = [
        _render_banner(card),
        _render_arms(card),
        _render_slices(card),
        _render_curves(card),
        _render_masks(card),
        _render_facts(card),
        _render_use(card),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(card['name'])}: {escape(card['verdict']['outcome'])}</title>\n"
        f"<style>{style}</style></head>\n<body><main>\n" + "\n".join(p for p in body if p) + "\n</main></body></html>\n"
    )


def _render_banner(card: dict[str, Any]) -> str:
    verdict = card["verdict"]
    reasons = "".join(f"<li>{escape(r)}</li>" for r in say_reasons(verdict["reasons"]))
    origin = f"commit {(card['git_commit'] or DASH)[:12]} · {card['created_at']} · run {card['run_key'][:12]}"
    return (
        f"<header><h1>{escape(card['name'])}</h1><p class='origin'>{escape(origin)}</p></header>"
        f"<section class='banner {escape(verdict['outcome'])}'>"
        f"<strong>{escape(VERDICT_WORDS[verdict['outcome']])}</strong>"
        f"<ul>{reasons}</ul></section>"
    )


def _render_arms(card: dict[str, Any]) -> str:
    verdict = card["verdict"]
    rows = []
    for name, arm in verdict["arms"].items():
        css = "ours" if name == "candidate" else "theirs"
        rows.append(
            f"<tr><th scope='row'>{escape(ARM_NAMES.get(name, name))}</th>"
            f"<td class='wide'>{draw_bar(arm['score'], arm['interval'], css=css)}</td>"
            f"<td class='n'><b>{say_percent(arm['score'])}</b><small>{say_interval(arm['interval'])}</small></td>"
            f"<td class='n'>{say_percent(arm.get('contract_valid'))}</td>"
            f"<td class='n'>{say_share(arm.get('field_f1'))}</td>"
            f"<td class='n'>{arm['mean_prompt_tokens']:.0f}</td>"
            f"<td class='n'>{say_percent(arm['length_stops'])}</td></tr>"
        )
    names = (verdict["metric"].replace("_", " "), "keeps contract", "field F1", "prompt tokens", "cut off")
    head = "<th>arm</th><th></th>" + "".join(f"<th class='n'>{escape(n)}</th>" for n in names)
    return (
        f"<section><h2>{title_rows(verdict)}</h2><div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _render_slices(card: dict[str, Any]) -> str:
    slices, arms = card["verdict"]["slices"], list(card["verdict"]["arms"])
    if not slices:
        return ""
    head = "".join(f"<th class='n'>{escape(ARM_NAMES.get(a, a))}</th>" for a in arms)
    rows = []
    for name, row in slices.items():
        ours = row.get("candidate", {"score": 0.0})["score"]
        cells = "".join(f"<td class='n'>{say_percent(row[a]['score']) if a in row else DASH}</td>" for a in arms)
        bar = draw_bar(ours, (ours, ours), css="ours")
        count = max(v["n"] for v in row.values())
        rows.append(
            f"<tr><th scope='row'>{escape(name)}</th><td class='n'>{count}</td><td class='wide'>{bar}</td>{cells}</tr>"
        )
    return (
        "<section><h2>By category</h2><div class='scroll'><table><thead><tr><th>category</th><th class='n'>rows</th>"
        f"<th>tuned</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _render_curves(card: dict[str, Any]) -> str:
    alerts = "".join(f"<li>{escape(a)}</li>" for a in list_alerts(card))
    drawn = "".join(draw_figure(p) for p in list_plots(card["curves"], kept=card["training"].get("kept_step")))
    told = f"<ul class='alerts'>{alerts}</ul>" if alerts else ""
    return f"<section><h2>Training</h2>{told}<div class='plots'>{drawn}</div></section>" if drawn or told else ""


def _render_masks(card: dict[str, Any]) -> str:
    """A few training rows as the model met them: trained tokens marked, control tokens boxed, breaks shown."""
    masks = card["training"].get("masks") or []
    if not masks:
        return ""
    blocks = "".join(
        f"<h3>{escape(_name_row(m))} <small>{m['trained']} of {m['tokens']} tokens trained</small></h3>"
        f"<pre class='mask'>{_render_pieces(m['pieces'])}</pre>"
        for m in masks
    )
    return (
        "<section><h2>What was trained on</h2><p>Rows of the training split as tokens. Only <mark>marked</mark> tokens "
        "carry loss; <span class='tok'>boxed</span> ones are control tokens, ⏎ is a line break.</p>"
        f"{blocks}</section>"
    )


def _name_row(mask: dict[str, Any]) -> str:
    return f"row {mask['id']}" + (f", part {mask['part']}" if mask.get("part") else "")


def _render_pieces(pieces: list[Any]) -> str:
    parts = []
    for is_trained, group in groupby(pieces, key=itemgetter(1)):
        limit = _TRAINED_LIMIT if is_trained else _CONTEXT_LIMIT
        shown = "".join(
            f"<span class='tok'>{escape(text)}</span>" if is_token else _show_breaks(escape(_shorten(text, limit)))
            for text, _, is_token in group
        )
        parts.append(f"<mark>{shown}</mark>" if is_trained else shown)
    return "".join(parts)


def _shorten(text: str, limit: int) -> str:
    """A long text by its two ends, with how much is left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _show_breaks(text: str) -> str:
    return text.replace("\r", "␍").replace("\n", "<i class='br'>⏎</i>\n")


def _render_facts(card: dict[str, Any]) -> str:
    blocks = []
    for title, facts in list_facts(card).items():
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        blocks.append(f"<div class='facts'><h3>{escape(title)}</h3><dl>{items}</dl></div>")
    return f"<section><h2>How it was made</h2><div class='grid'>{''.join(blocks)}</div></section>"


def _render_use(card: dict[str, Any]) -> str:
    commands = escape("\n".join(list_use(card)), quote=False)
    return f"<section><h2>Use</h2><pre>{commands}</pre></section>"
