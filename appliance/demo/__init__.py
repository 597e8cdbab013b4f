"""The demo: the product's own dataset, an embedded S3 server, and a repository as a team would have it."""

from __future__ import annotations

from appliance.demo.dataset import DEMO_ROWS, GROWTH_ROWS, QUICK_ROWS, write_dataset
from appliance.demo.repository import commit_dataset, prepare_repository
from appliance.demo.storage import Storage, start_storage

__all__ = [
    "DEMO_ROWS",
    "GROWTH_ROWS",
    "QUICK_ROWS",
    "Storage",
    "commit_dataset",
    "prepare_repository",
    "start_storage",
    "write_dataset",
]
