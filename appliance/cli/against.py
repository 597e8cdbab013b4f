"""What differs between two versions: recipe, data, base, libraries, and how each one's own evaluation ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from appliance.manifest import Manifest

NONE = "-"
_TRAINED = ("steps", "tokens", "kept_step", "kept_validation_loss", "tokens_per_second", "device", "dtype")
_SHOWN = 12  # characters of a digest


def list_differences(older: Manifest, newer: Manifest) -> dict[str, tuple[str, str]]:
    """Name -> what the older and the newer version say, where they do not say the same; `-` where one says nothing."""
    before, after = _list_facts(older), _list_facts(newer)
    pairs = {name: (before.get(name, NONE), after.get(name, NONE)) for name in {**after, **before}}
    return {name: (was, became) for name, (was, became) in pairs.items() if was != became}


def has_other_rows(older: Manifest, newer: Manifest) -> bool:
    """Whether the two may have answered different test rows: their scores are then no comparison."""
    return older.split_digest != newer.split_digest


def _list_facts(manifest: Manifest) -> dict[str, str]:
    """All that is compared, in the order in which it is told."""
    metrics, trained = manifest.metrics, manifest.training
    return {
        "verdict": manifest.verdict,
        **{f"score.{arm}": f"{score:.3f}" for arm, score in metrics.get("arms", {}).items()},
        **{f"score.{k}": str(metrics[k]) for k in ("metric", "n") if k in metrics},
        "base": f"{manifest.base.get('model', NONE)} {manifest.base.get('revision', '')[:_SHOWN]}".strip(),
        "data": manifest.data_digest[:_SHOWN],
        "commit": (manifest.git_commit or NONE)[:_SHOWN],
        **dict(_flatten(manifest.recipe, "recipe")),
        **{f"training.{k}": _say(trained[k]) for k in _TRAINED if k in trained},
        **{f"versions.{k}": str(v) for k, v in manifest.versions.items()},
    }


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Every key of a recipe by its whole name; what is not set is not there."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}.{key}")
        elif value is not None:
            yield f"{prefix}.{key}", _say(value)


def _say(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
