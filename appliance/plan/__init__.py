"""The plan: what a run will do and need, said before any GPU time is spent."""

from __future__ import annotations

from appliance.plan.answering import Answering, plan_answering
from appliance.plan.machine import Machine, check_device, read_machine
from appliance.plan.plan import Plan, build_plan, check_positions
from appliance.plan.preflight import Check, examine_machine
from appliance.plan.room import check_room

__all__ = [
    "Answering",
    "Check",
    "Machine",
    "Plan",
    "build_plan",
    "check_device",
    "check_positions",
    "check_room",
    "examine_machine",
    "plan_answering",
    "read_machine",
]
