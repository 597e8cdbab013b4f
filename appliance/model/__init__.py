"""The base model and its tokens: what training, evaluation and the checks must agree on.

This room sits below the six capabilities because all of them render the same conversation with
the same template. It refuses remote code and pickled weights.
"""

from __future__ import annotations

from appliance.model.base import Base, resolve_base
from appliance.model.calls import read_tools
from appliance.model.mask import TokenRow, render_row, render_rows
from appliance.model.template import ChatTemplate, fit_template, load_template, set_thinking

__all__ = [
    "Base",
    "ChatTemplate",
    "TokenRow",
    "fit_template",
    "load_template",
    "read_tools",
    "render_row",
    "render_rows",
    "resolve_base",
    "set_thinking",
]
