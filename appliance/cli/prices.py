"""What a GPU costs: the team's own file, with its day and source. No price is known to the code.

Hours come from the speed of a model's newest version. Where there is none, or nobody may ask the registry (a
pull request has no credentials), they are a range: the model's own arithmetic on the GPU that the file names.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.document import load_document
from appliance.errors import RecipeError
from appliance.recipe import Recipe
from appliance.training.utilisation import find_yardstick

PRICES = "prices.yaml"
_BUSY = (0.5, 0.1)  # of the GPU's peak, from large models with full batches to small ones with short rows


class Prices(BaseModel):
    """`prices.yaml`: the price of an hour of a GPU, when it was looked up and where; `gpu` as its driver calls it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    as_of: date
    source: str = Field(min_length=1)
    currency: str = Field(min_length=1)
    gpu_hour: float = Field(gt=0.0)
    gpu: str = ""


def load_prices(root: Path) -> Prices | None:
    """The team's prices, `None` without the file or with an empty one. Raises `RecipeError`."""
    file = root / PRICES
    try:
        values = load_document(file, error=RecipeError).values if file.is_file() else None
        return Prices.model_validate(values) if values is not None else None
    except (OSError, ValidationError) as fault:
        raise RecipeError(
            f"{file}: expected as_of (a date), source, currency and gpu_hour; {str(fault).splitlines()[0]}"
        ) from fault


def guess_hours(recipe: Recipe, *, base: Path, tokens: int, gpu: str) -> tuple[float, float] | None:
    """The least and the most hours of training, evaluation aside; `None` for a GPU or a model that is not known."""
    precision = "fp32" if recipe.training.precision == "fp32" else "bf16"  # what auto is on every GPU that is known
    yardstick = find_yardstick(
        base,
        method=recipe.method,
        device_name=gpu,
        precision=precision,
        devices=recipe.needs.devices,
    )
    if yardstick is None:
        return None
    least, most = (tokens * yardstick.flops_per_token / (yardstick.peak_flops * share) / 3600 for share in _BUSY)
    return least, most


def describe_guess(hours: tuple[float, float], *, devices: int, gpu: str, prices: Prices | None) -> str:
    """The range of hours on so many of this GPU; and of money, where the prices are of such a one."""
    time = f"{_say_time(hours, devices)} (at {_BUSY[0]:.0%} to {_BUSY[1]:.0%} of the peak of {gpu})"
    return time + (_say_money(hours, devices, prices) if prices is not None and prices.gpu == gpu else "")


def describe_cost(hours: float, *, devices: int, prices: Prices | None) -> str:
    """Hours of so many GPUs as measured, and their money where there are prices."""
    return _say_time((hours,), devices) + (_say_money((hours,), devices, prices) if prices else "")


def describe_unknown(prices: Prices | None) -> str:
    """What it takes to know the hours, where nothing was measured and nothing can be guessed."""
    other = f"has a gpu whose peak is known, not {prices.gpu or 'none'}" if prices else "names the GPU that trains it"
    return f"hours unknown until this model has a version, or {PRICES} {other}"


def _say_money(hours: tuple[float, ...], devices: int, prices: Prices) -> str:
    money = " to ".join(f"{prices.gpu_hour * h * devices:.2f}" for h in hours)
    return f", {money} {prices.currency} ({prices.gpu_hour:g} an hour, {prices.source}, {prices.as_of})"


def _say_time(hours: tuple[float, ...], devices: int) -> str:
    """In minutes below an hour."""
    on = f" on {devices} GPUs" if devices > 1 else ""
    if max(hours) >= 1:
        return f"about {' to '.join(f'{h:.2f}' for h in hours)} hours{on}"
    minutes = sorted({max(1, round(60 * h)) for h in hours})
    return f"about {' to '.join(map(str, minutes))} minute{'s' if minutes[-1] > 1 else ''}{on}"
