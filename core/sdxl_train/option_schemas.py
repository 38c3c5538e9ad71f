"""What the options models say about each option, as JSON schema: the one source of editor schema, pages and listings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

Schema = dict[str, Any]


@dataclass(frozen=True)
class OptionSchemas:
    """The schemas of several options models.

    Attributes:
        properties: the schema of each option of each model.
        definitions: what their `$ref`s (`#/$defs/<name>`) point at.
    """

    properties: Mapping[type[BaseModel], Mapping[str, Schema]]
    definitions: Mapping[str, Schema]


def option_schemas(models: Iterable[type[BaseModel]]) -> OptionSchemas:
    """Read the models. TOML has no null, so "or None" is left out, and so are titles and defaults of None."""
    mode: JsonSchemaMode = "validation"
    distinct = list(dict.fromkeys(models))
    references, top = models_json_schema([(model, mode) for model in distinct], schema_generator=_TomlSchema)
    definitions: dict[str, Schema] = top.get("$defs", {})
    for definition in definitions.values():
        for schema in definition.get("properties", {}).values():
            for name in ("zh", "flat", "aliases"):
                schema.pop(name, None)
            if schema.get("default", ...) is None or "$ref" in schema:
                schema.pop("default", None)
    names = {model: references[model, mode]["$ref"].rpartition("/")[2] for model in distinct}
    used_inside = {name for name in definitions if f"'#/$defs/{name}'" in str(definitions)}
    return OptionSchemas(
        {model: definitions[name].get("properties", {}) for model, name in names.items()},
        {name: definition for name, definition in definitions.items() if name in used_inside},
    )


class _TomlSchema(GenerateJsonSchema):
    def nullable_schema(self, schema: Any) -> Schema:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        return {}  # an option of a plain function may have any annotation


def type_text(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """The type in Python's words: `int`, `list[str]`, `float or str`, `table`."""
    schema = resolved(schema, definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_text(branch, definitions) for branch in schema["anyOf"]))
    kind = schema.get("type")
    if kind == "array":
        inner = schema.get("prefixItems") or [schema.get("items", {})]
        return f"list[{' or '.join(dict.fromkeys(type_text(item, definitions) for item in inner))}]"
    return {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "object": "table"}.get(str(kind), "any")


def allowed_text(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """What is allowed beyond the type: "0 … 1", "≥ 1", "> 0", names; empty when everything of the type is."""
    schema = resolved(schema, definitions)
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    parts = []
    if "minimum" in schema and "maximum" in schema:
        parts.append(f"{schema['minimum']} … {schema['maximum']}")
    else:
        signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        parts += [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    if "multipleOf" in schema:
        parts.append(f"multiple of {schema['multipleOf']}")
    if "pattern" in schema:
        parts.append(f"like {schema['pattern']}")
    if "prefixItems" in schema:
        parts.append(f"{len(schema['prefixItems'])} values")
    return ", ".join(parts)


def resolved(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema itself, or what its `$ref` points at."""
    reference = schema.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else schema
