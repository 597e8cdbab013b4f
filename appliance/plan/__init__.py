"""The plan: what a run will do and need, said before any GPU time is spent."""

from __future__ import annotations

from appliance.plan.machine import Machine, check_device, read_machine
from appliance.plan.plan import Plan, answers_in_four_bits, build_plan
from appliance.plan.preflight import Check, examine_machine
from appliance.plan.room import check_room

__all__ = [
    "Check",
    "Machine",
    "Plan",
    "answers_in_four_bits",
    "build_plan",
    "check_device",
    "check_room",
    "examine_machine",
    "read_machine",
]
