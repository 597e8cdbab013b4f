"""The registry: immutable versions and movable aliases in a store, without a server.

A version is visible only when it is complete, what is visible never changes, every byte is verified
on the way in and on the way out, and concurrent writers cannot lose each other's work.
"""

from __future__ import annotations

from appliance.registry.check import Report, check_registry
from appliance.registry.collect import Collection, collect_garbage, look_for_garbage
from appliance.registry.findings import Finding
from appliance.registry.folder import verify_folder
from appliance.registry.layout import create_format
from appliance.registry.leases import LEASE_S, Lease, hold_model, read_lease
from appliance.registry.listing import (
    VersionInfo,
    check_known,
    find_run,
    list_names,
    list_versions,
    load_manifest,
    select_run,
    survey_versions,
)
from appliance.registry.marks import Garbage
from appliance.registry.moves import AliasMove, follow_alias, list_aliases, read_alias
from appliance.registry.publish import publish
from appliance.registry.pull import pull, read_file
from appliance.registry.refs import DEFAULT_ALIAS, promote, resolve
from appliance.registry.walk import GRACE_S

__all__ = [
    "DEFAULT_ALIAS",
    "GRACE_S",
    "LEASE_S",
    "AliasMove",
    "Collection",
    "Finding",
    "Garbage",
    "Lease",
    "Report",
    "VersionInfo",
    "check_known",
    "check_registry",
    "collect_garbage",
    "create_format",
    "find_run",
    "follow_alias",
    "hold_model",
    "list_aliases",
    "list_names",
    "list_versions",
    "load_manifest",
    "look_for_garbage",
    "promote",
    "publish",
    "pull",
    "read_alias",
    "read_file",
    "read_lease",
    "resolve",
    "select_run",
    "survey_versions",
    "verify_folder",
]
