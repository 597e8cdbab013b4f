"""How evaluation holds the base: whole on one device, spread over several, or in 4 bits as it was trained.

It computes in the precision of training without gradients, rows of any number: what must fit are the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from appliance.method import QloraMethod
from appliance.model.shapes import Shape, count_values
from appliance.plan.machine import Machine
from appliance.plan.memory import FITS, add_overhead, measure_width
from appliance.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Answering:
    """On how many devices the base lies, and whether in 4 bits; bytes that it takes in 16, and that a device has."""

    devices: int
    four_bit: bool
    needed: int
    budget: int

    def warn(self) -> tuple[str, ...]:
        """What is to be known before a training that needs less of a device than its evaluation."""
        sizes = f"about {self.needed / 2**30:.1f} of {self.budget / 2**30:.1f} GiB"
        if self.four_bit:
            return (f"evaluation answers with the base in 4 bits, as it is trained: in 16 bits it takes {sizes} here",)
        if 1 < self.devices < self.needed / self.budget:
            held = f"evaluation spreads the base over {self.devices} devices, {sizes} of each: it will not fit"
            return (f"{held}; use `appliance train` here, `appliance evaluate` with the same --runs on larger ones",)
        return ()


def plan_answering(recipe: Recipe, *, weights: Mapping[str, Shape], machine: Machine) -> Answering:
    """The least change that lets the base fit: as it is, else over the recipe's GPUs, else in 4 bits for `qlora`."""
    needed = add_overhead(measure_width(recipe, machine) * count_values(weights))
    budget = machine.budget_bytes
    most = recipe.needs.devices if machine.gpu else 1
    devices = next((n for n in range(1, most + 1) if needed <= FITS * n * budget), most)
    four_bit = isinstance(recipe.method, QloraMethod) and needed > FITS * devices * budget
    return Answering(1 if four_bit else devices, four_bit, needed, budget)
