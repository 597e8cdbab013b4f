"""Numbers and names as people read them, shared by both renderings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from appliance.manifest import begin_version

_METHOD_KEYS = ("rank", "alpha", "dropout", "tokens", "init", "projection", "encoder", "hidden")
DASH = "–"
_LISTED = 20
_PROMPT = 400  # characters of a system prompt; `card.json` has the whole
ARM_NAMES = {
    "zero_shot": "base, best prompt",
    "few_shot": "base, few-shot",
    "champion": "version in use",
    "candidate": "tuned (this version)",
}
VERDICT_WORDS = {
    "ship": "Ship: better than the prompted base model on held-out data.",
    "hold": "Hold: not worth shipping on this evidence.",
    "inconclusive": "Inconclusive: the test rows cannot tell.",
    "reject": "Reject: worse than the prompted base model.",
}

_ARM = re.compile(rf"\bagainst ({'|'.join(ARM_NAMES)})\b")
_STOPS = {"max_steps": "its last step", "patience": "no better evaluation (training.patience)"}
_KEPT = {"last": "the last", "best_loss": "best validation loss", "best_exact_match": "best validation exact match"}


def say_percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return DASH if value is None else f"{value * 100:.1f}%"


def say_share(value: float | None) -> str:
    """A score between 0 and 1 with three decimals."""
    return DASH if value is None else f"{value:.3f}"


def title_rows(verdict: Mapping[str, Any]) -> str:
    """How many rows count; those of one group are one observation. Earlier releases knew neither groups nor copies."""
    groups, copies = verdict["comparison"].get("groups", verdict["n"]), verdict.get("copies", 0)
    title = f"{verdict['n']} held-out test rows" + (f" in {groups} groups" if groups != verdict["n"] else "")
    return title + (f", without {copies} near copies of training rows" if copies else "")


def say_interval(interval: list[float] | None) -> str:
    """A 95% interval of a share."""
    return DASH if not interval else f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f}%"


def say_number(value: Any) -> str:
    """Integers with separators, floats with four significant digits, nothing as a dash."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say_bytes(value: int | None) -> str:
    """Bytes in GiB."""
    return DASH if value is None else f"{value / 2**30:.2f} GiB"


def say_reasons(reasons: Iterable[str]) -> tuple[str, ...]:
    """A verdict's reasons, with the arms named as the table names them."""
    return tuple(_ARM.sub(lambda found: f"against {ARM_NAMES[found[1]]}", reason) for reason in reasons)


def list_alerts(card: dict[str, Any]) -> list[str]:
    """What the monitors said during training, in order."""
    return [f"step {a['step']}: {a['words']}" for a in card["training"].get("alerts") or ()]


def _say_kept(training: dict[str, Any]) -> str:
    """Which step's weights the artifact has, and why."""
    step, kept = training.get("kept_step"), training.get("kept")
    if step is None:
        return DASH
    loss, exact = training.get("kept_validation_loss"), training.get("kept_validation_exact_match")
    found = {"loss": say_number(loss), "exact match": say_percent(exact)}
    values = ", ".join(f"{k} {v}" for k, v in found.items() if v != DASH)
    return f"step {step:,} ({_KEPT.get(str(kept), str(kept))}" + (f": validation {values})" if values else ")")


def _say_device(training: dict[str, Any]) -> str:
    """What computed, and how many of them where it was not one."""
    device, count = training.get("device", DASH), training.get("devices", 1)
    return f"{count} x {device}" if count > 1 else str(device)


def _say_mfu(training: dict[str, Any]) -> str:
    """The share of the device's peak; nothing where it is not known."""
    return f", MFU {say_percent(training['mfu'])}" if "mfu" in training else ""


def _say_shared(training: dict[str, Any]) -> str:
    """How many tokens passed through the model, where rows shared what they begin with."""
    computed = training.get("tokens_computed")
    return f"; shared prefixes once: {computed:,} computed" if computed and computed < training["tokens"] else ""


def _list_levers(training: dict[str, Any]) -> dict[str, str]:
    """How it was computed, see docs/speed.md; nothing in cards from before rows could be either."""
    levers = training.get("levers", {})
    if "rows" not in levers:
        return {}
    said = [f"{name} {levers[name]}" for name in ("rows", "attention", "head", "lora", "prefix")]
    said += [f"norm {levers['norm']}"] if "norm" in levers else []  # not in cards from before it was a lever
    return {"levers": ", ".join([*said, *(["compiled"] if levers["compile"] else [])])}


def _say_predicted(training: dict[str, Any]) -> str:
    """What the plan had said, and of which micro-batch if it was another; nothing in cards from before it was told."""
    predicted = training.get("predicted")
    if not predicted:
        return ""
    planned, used = predicted["micro_batch"], training.get("micro_batch")
    other = f" with micro-batch {planned}, it was {used}" if planned != used else ""
    return f"; the plan said {say_bytes(predicted['peak_memory_bytes'])}{other}"


def list_facts(card: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The tables below the scores: title -> name -> value."""
    data, training, recipe = card["data"], card["training"], card["recipe"]
    method, section = _fill_alpha(recipe["method"]), recipe["training"]
    provenance = ", ".join(f"{k} {v:,}" for k, v in data.get("provenance", {}).items())
    prompt = data.get("system_prompt")
    facts = {
        "Data": {
            "dataset": str(data.get("name", DASH)),
            "licence": str(data.get("licence") or DASH),
            "rows": f"{say_number(data.get('rows'))}: {say_number(data.get('train'))} train, "
            f"{say_number(data.get('validation'))} validation, {say_number(data.get('test'))} test",
            "provenance": provenance or DASH,
            **({"system prompt": textwrap.shorten(prompt, _PROMPT)} if prompt else {}),
            "data digest": str(data.get("digest", DASH))[:16],
            "split digest": str(data.get("split_digest", DASH))[:16],
        },
        **_list_mask(training),
        "Method": {
            "method": " ".join(str(method[k]) for k in ("type", "variant") if k in method),
            **{k: say_number(method[k]) for k in _METHOD_KEYS if method.get(k) is not None},
            "learning rate": say_number(training.get("learning_rate")),
            "epochs": say_number(section["epochs"]),
            "rows a step": say_number(training.get("effective_batch")),
            "trained parameters": f"{say_number(training.get('trainable_parameters'))} "
            f"of {say_number(training.get('total_parameters'))}",
            "seed": str(section["seed"]),
        },
        "Training": {
            "steps": say_number(training.get("steps")),
            "tokens": f"{say_number(training.get('tokens'))}, "
            f"{say_number(training.get('trained_tokens'))} of them trained on{_say_shared(training)}",
            "time": f"{say_number(training.get('seconds'))} s, "
            f"{say_number(training.get('tokens_per_second'))} tokens/s{_say_mfu(training)}",
            "loss": f"{say_number(training.get('first_loss'))} to {say_number(training.get('last_loss'))}",
            "stopped by": _STOPS.get(training.get("stopped_by", ""), DASH),
            "weights kept": _say_kept(training),
            "validation loss": f"best {say_number(training.get('best_validation_loss'))}, "
            f"last {say_number(training.get('last_validation_loss'))}",
            "device": f"{_say_device(training)}, {training.get('dtype', DASH)}",
            **_list_levers(training),
            "peak memory": say_bytes(training.get("peak_memory_bytes")) + _say_predicted(training),
            "adapter digest": str(training.get("adapter_sha256", DASH))[:16],
        },
        "Origin": {
            "base model": card["base"].get("model", DASH),
            "base revision": card["base"].get("revision", DASH)[:24],
            **_list_rounding(card),
            "commit": str(card["git_commit"] or DASH)[:12],
            "commit time": card["created_at"],
            "run key": card["run_key"][:16],
        },
    }
    return facts | {"Versions": {k: str(v) for k, v in card["versions"].items()}}


def _fill_alpha(method: dict[str, Any]) -> dict[str, Any]:
    """The method with the scale that training takes where the recipe leaves it out."""
    is_left_out = "rank" in method and method.get("alpha") is None
    return method | {"alpha": 2 * method["rank"]} if is_left_out else method


def _list_rounding(card: dict[str, Any]) -> dict[str, str]:
    """That every arm answered on the rounded base, where one did."""
    if not card.get("evaluation", {}).get("four_bit"):
        return {}
    return {"base in evaluation": "4 bits (NF4), as trained; in 16 bits it did not fit on the device"}


def _list_mask(training: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What the chat template made of the rows, and what was left out; nothing for cards made before it was told."""
    sides = {s: v for s, v in (training.get("rows") or {}).items() if s != "test"}
    if not sides:
        return {}
    split, dropped = ([i for v in sides.values() for i in v[k]] for k in ("split", "dropped"))
    facts = {"token rows": ", ".join(f"{say_number(v['token_rows'])} {s}" for s, v in sides.items())}
    if split:
        facts["split rows"] = (
            f"{say_number(len(split))}: the chat template rewrites earlier turns, each turn is trained once"
        )
    facts["left out, too long"] = f"{say_number(len(dropped))}: {', '.join(dropped[:_LISTED])}" if dropped else "none"
    if len(dropped) > _LISTED:
        facts["left out, too long"] += ", ..."
    thinking = training.get("thinking", "fixed")
    switch = training.get("switch", "enable_thinking")
    if thinking != "fixed":
        served = f"; serve with {switch}: {'true' if thinking == 'on' else 'false'}" if switch else ""
        facts["thinking"] = thinking + served
    return {"Mask": facts}


def list_use(card: dict[str, Any]) -> tuple[str, ...]:
    """The commands that fetch and try this very version, wherever its alias is by now."""
    name, beginning = card["name"], begin_version(card["created_at"], card["git_commit"])
    return (
        f"# this version; the one in use is {name}@{card['alias']}",
        f"appliance pull {name}@{beginning} ./{name}",
        f"appliance generate ./{name} --prompt '...' --compare",
    )
