"""The base model and its tokens: what training, evaluation and the checks must agree on.

This room sits below the six capabilities because all of them render the same conversation with
the same template. It refuses remote code and pickled weights.
"""

from __future__ import annotations

from appliance.model.base import Base, resolve_base
from appliance.model.template import ChatTemplate, TokenRow, load_template, render_row

__all__ = ["Base", "ChatTemplate", "TokenRow", "load_template", "render_row", "resolve_base"]
