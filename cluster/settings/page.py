"""The page of all settings, made from their types: `python -m cluster.settings.page > docs/settings.md`.

Config ──JSON schema──▶ [page] ──▶ docs/settings.md
"""

import json
from typing import Any

from cluster.settings.config import Config

HEAD = """\
# Settings

Every setting of a run: `launch/train.py --config FILE KEY=VALUE …`. A file in `configs/` holds only what differs from
the defaults below; what is mistyped, impossible or does not go together is refused before any worker starts. This page
is made by `make docs` from `cluster/settings/config.py`.
"""
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
NO_BOUND = 1_000_000
"""From here on an upper bound only catches slips of the keyboard."""


def page() -> str:
    """All settings as Markdown: a table a section, a row a setting."""
    schema = Config.model_json_schema()
    sections, alone = [], []
    for name, field in schema["properties"].items():
        if reference := field.get("$ref"):
            rows = schema["$defs"][_name(reference)]["properties"]
            table = _table([_row(f"{name}.{key}", value, schema) for key, value in rows.items()])
            sections.append(f"## {name}\n\n{field.get('description', '')}\n\n{table}")
        else:
            alone.append(_row(name, field, schema))
    whole = f"## method and stages\n\nWhat is trained.\n\n{_table(alone)}"
    return "\n".join([HEAD, whole, *sections])


def _table(rows: list[str]) -> str:
    return "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _row(key: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    default = f"`{_as_yaml(field['default'])}`" if "default" in field else "has to be given"
    meaning = " ".join(field["description"].split())
    return f"| `{key}` | {default} | {_values(field, schema)} | {meaning} |".replace("||", "|")


def _values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """In words, what a setting takes: its choices, or its type and bounds."""
    if reference := field.get("$ref"):
        parts = schema["$defs"][_name(reference)]["properties"]
        return "{" + ", ".join(f"{key}: {_values(value, schema)}" for key, value in parts.items()) + "}"
    if kinds := field.get("anyOf"):
        return " or ".join(_values(kind, schema) for kind in kinds)
    if choices := field.get("enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if field["type"] == "null":
        return "`null`"
    if items := field.get("prefixItems"):
        return "[" + ", ".join(_values(item, schema) for item in items) + "]"
    if field["type"] == "array":
        return f"list of {_values(field['items'], schema)}"
    return f"{TYPES[field['type']]}{_bounds(field)}"


def _bounds(field: dict[str, Any]) -> str:
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    words = [f"{low:g} or more" if low is not None else "", f"above {above:g}" if above is not None else ""]
    if high is not None and high < NO_BOUND:
        words = [f"{low:g} to {high:,}"] if low is not None else [*words, f"at most {high:,}"]
    elif below is not None and below < NO_BOUND:
        words.append(f"below {below:g}")
    said = ", ".join(word for word in words if word)
    return f", {said}" if said else ""


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(reference: str) -> str:
    return reference.rsplit("/", 1)[-1]


if __name__ == "__main__":
    print(page(), end="")
