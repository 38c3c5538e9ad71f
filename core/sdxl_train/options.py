"""How a plugin (or the core) declares what a user may set: one field, one line, in the class that uses it."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Base of every options table. Nest a subclass named `Options` in a plugin class; the plugin is made as `Cls(options)`.

    Values come from TOML and are checked strictly: no unknown entry, 1.0 and true do not fit int, nan and inf do not fit float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    def problem_with_keys(self, keys: Mapping[str, Any]) -> str | None:
        """What is wrong with these options beside other keys, or None. Asked once, before anything is loaded; override it to look.

        Args:
            keys: every effective key of the file, as `run.config` has them.
        Returns:
            A sentence that names the keys, what was found and what would do; it becomes a problem in the report.
        """
        return None


def option(default: Any, help: str, *, zh: str = "", flat: bool = False, aliases: tuple[str, ...] = (), **bounds: Any) -> Any:
    """Declare one option as `name: type = option(default, "what it does, its unit; its neutral value")`.

    Args:
        default: the value when the user gives none; `...` makes the option required.
        help: one sentence with the unit and the value that turns the option off.
        zh: the same in Chinese, for the Chinese configuration page.
        flat: the option is a top-level TOML key of its own instead of an entry of the plugin's table.
        aliases: further spellings of the option; giving two of them is an error.
        bounds: `ge`, `gt`, `le`, `lt`, `min_length`, `max_length`, `pattern`, `multiple_of` as in pydantic.
    """
    extra = {"zh": zh, "flat": flat, "aliases": list(aliases)}
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), description=help, json_schema_extra=extra, **bounds)
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def _declared(options: type[BaseModel], what: str) -> dict[str, Any]:
    extras = {name: field.json_schema_extra for name, field in options.model_fields.items()}
    return {name: extra[what] for name, extra in extras.items() if isinstance(extra, dict) and extra.get(what)}


def flat_keys(options: type[BaseModel]) -> set[str]:
    """The names of the options that are top-level TOML keys."""
    return set(_declared(options, "flat"))


def option_aliases(options: type[BaseModel]) -> dict[str, list[str]]:
    """The further spellings of each option that has some."""
    return _declared(options, "aliases")


def resolve_aliases(options: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    """What was given, under the options' own names.

    Raises:
        ValueError: two spellings of one option are given.
    """
    resolved = dict(given)
    for name, aliases in option_aliases(options).items():
        spellings = [spelling for spelling in (name, *aliases) if spelling in given]
        if len(spellings) > 1:
            raise ValueError(f"{' and '.join(spellings)} are names of one option; give one of them")
        if spellings:
            resolved[name] = resolved.pop(spellings[0])
    return resolved


def option_help(options: type[BaseModel], name: str, language: str = "en") -> str:
    """The description of an option, in English ("en") or Chinese ("zh"; English where there is none)."""
    chinese = _declared(options, "zh").get(name) if language == "zh" else None
    return chinese or options.model_fields[name].description or ""
