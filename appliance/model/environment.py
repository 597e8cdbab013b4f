"""The sandbox that chat templates run in: what transformers gives them, and nothing that changes by the day.

Templates come from strangers; they are text with no way out. `strftime_now` gives one date for
ever, so that the same rows give the same tokens tomorrow (Llama's own default date, as its
templates use it when they have no clock).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from appliance.errors import ModelError

_TODAY = datetime(2024, 7, 26, tzinfo=UTC)


@lru_cache(maxsize=8)
def compile_template(text: str) -> Any:
    """The template, ready to render. Raises `ModelError` when it is not one."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _build_generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _TODAY.strftime
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as fault:
        raise ModelError(f"chat template: {fault}; copy the model again") from fault


def _build_generation_tag() -> Any:
    """`{% generation %}...{% endgeneration %}` is its body: the mask does not rest on markers."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does it: no HTML escapes, no ASCII escapes, the same order of arguments."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
