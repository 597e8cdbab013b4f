"""Data: rows that can be trusted, the side each is on, and the commit that they come from."""

from __future__ import annotations

from appliance.data.check import Report, check_dataset, describe_lengths
from appliance.data.committed import describe_unheld, find_astray, find_place, find_uncommitted, find_unheld_rows
from appliance.data.diff import DatasetDiff, RowChange, diff_folders
from appliance.data.findings import Finding, describe_findings, find_in_fault
from appliance.data.general import (
    OWN_ANSWER_TOKENS,
    GeneralRows,
    check_apart,
    check_general,
    count_replayed,
    digest_general,
    find_shared,
    load_general,
    load_prompts,
    order_general,
)
from appliance.data.masks import check_masks, check_tokens
from appliance.data.near import find_near_copies
from appliance.data.pointer import (
    Pointer,
    check_pushed,
    digest_dvc_folder,
    is_current,
    load_pointer,
    pull_data,
    read_listing,
    run_dvc,
)
from appliance.data.revision import fetch_revision
from appliance.data.rows import Dataset, DatasetCard, Row
from appliance.data.split import Splits, select_side, split_dataset, summarise_dataset

__all__ = [
    "OWN_ANSWER_TOKENS",
    "Dataset",
    "DatasetCard",
    "DatasetDiff",
    "Finding",
    "GeneralRows",
    "Pointer",
    "Report",
    "Row",
    "RowChange",
    "Splits",
    "check_apart",
    "check_dataset",
    "check_general",
    "check_masks",
    "check_pushed",
    "check_tokens",
    "count_replayed",
    "describe_findings",
    "describe_lengths",
    "describe_unheld",
    "diff_folders",
    "digest_dvc_folder",
    "digest_general",
    "fetch_revision",
    "find_astray",
    "find_in_fault",
    "find_near_copies",
    "find_place",
    "find_shared",
    "find_uncommitted",
    "find_unheld_rows",
    "is_current",
    "load_general",
    "load_pointer",
    "load_prompts",
    "order_general",
    "pull_data",
    "read_listing",
    "run_dvc",
    "select_side",
    "split_dataset",
    "summarise_dataset",
]
