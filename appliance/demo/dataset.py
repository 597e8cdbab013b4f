"""The demo's dataset as a folder: rows and card, byte for byte the same wherever it is written."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from appliance.demo.requests import CATEGORIES, SCHEMA, build_requests
from appliance.digest import write_atomic
from appliance.example import encode_examples

NAME = "workplace-requests"
DEMO_ROWS = 1000
QUICK_ROWS = 100
GROWTH_ROWS = 60


def write_dataset(folder: Path, *, rows: int = DEMO_ROWS) -> None:
    """Write `requests.jsonl` with the first `rows` requests, and `dataset.yaml`, into `folder`."""
    card = {
        "name": NAME,
        "description": "Free-text workplace requests to one strict JSON ticket.",
        "licence": "Apache-2.0",
        "contract": {"type": "json", "schema": json.loads(json.dumps(SCHEMA))},  # a copy, so that YAML has no anchors
        "categories": list(CATEGORIES),
    }
    write_atomic(folder / "requests.jsonl", encode_examples(build_requests(rows)))
    write_atomic(folder / "dataset.yaml", yaml.safe_dump(card, sort_keys=False, allow_unicode=True).encode())
