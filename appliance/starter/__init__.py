"""The starter: the files that turn a repository into one that the appliance works for."""

from __future__ import annotations

from appliance.starter.starter import Change, check_files, start_repository

__all__ = ["Change", "check_files", "start_repository"]
