"""Data: rows that can be trusted, the side each is on, and the commit that they come from."""

from __future__ import annotations

from appliance.data.check import Report, check_dataset
from appliance.data.diff import DatasetDiff, RowChange, diff_folders
from appliance.data.findings import Finding
from appliance.data.pointer import Pointer, check_pushed, digest_dvc_folder, is_current, load_pointer, pull_data
from appliance.data.revision import fetch_revision
from appliance.data.rows import Dataset, DatasetCard, Row, load_dataset
from appliance.data.split import Splits, select_side, split_dataset, summarise_dataset

__all__ = [
    "Dataset",
    "DatasetCard",
    "DatasetDiff",
    "Finding",
    "Pointer",
    "Report",
    "Row",
    "RowChange",
    "Splits",
    "check_dataset",
    "check_pushed",
    "diff_folders",
    "digest_dvc_folder",
    "fetch_revision",
    "is_current",
    "load_dataset",
    "load_pointer",
    "pull_data",
    "select_side",
    "split_dataset",
    "summarise_dataset",
]
