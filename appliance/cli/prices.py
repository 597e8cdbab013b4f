"""What a GPU costs: the team's own file, with its day and source. No price is known to the code."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.document import load_document
from appliance.errors import RecipeError

PRICES = "prices.yaml"


class Prices(BaseModel):
    """`prices.yaml`: the price of one hour of one GPU, when it was looked up and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    as_of: date
    source: str = Field(min_length=1)
    currency: str = Field(min_length=1)
    gpu_hour: float = Field(gt=0.0)


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


def describe_cost(*, hours: float | None, devices: int, prices: Prices | None) -> str:
    """Hours of so many GPUs and their money, or only what is known of them."""
    if hours is None:
        return "hours unknown until this model has a version"
    on = f" on {devices} GPUs" if devices > 1 else ""
    if prices is None:
        return f"about {hours:.2f} hours{on}"
    return (
        f"about {hours:.2f} hours{on}, {prices.gpu_hour * hours * devices:.2f} {prices.currency} "
        f"({prices.gpu_hour:g} an hour, {prices.source}, {prices.as_of})"
    )
