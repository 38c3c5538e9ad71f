"""Turns a plain function with the documented signature into a plugin, and tells its options from its keyword-only parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ConfigDict, PydanticUserError, create_model

from sdxl_train.errors import PluginError
from sdxl_train.hookspecs import HookSpecs
from sdxl_train.options import Options, option
from sdxl_train.plugin_discovery import Target
from sdxl_train.randomness import FetchRandom, StepRandom, kept_global_generators, seed_global_generators


def hook_arguments(hook: str) -> tuple[str, ...]:
    """The argument names of a hook, in the order of its spec."""
    return tuple(inspect.signature(getattr(HookSpecs, hook)).parameters)[1:]


def function_options(target: Target) -> type[Options] | None:
    """The options of a plain function: its keyword-only parameters with a default, typed by their annotations.

    Raises:
        PluginError: a parameter is neither an argument of the hook nor such an option, or an option is named like an argument.
    """
    hook = _single_hook(target)
    arguments = set(hook_arguments(hook))
    fields: dict[str, Any] = {}
    try:
        parameters = inspect.signature(target.value, eval_str=True).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise PluginError(f"{target}: its signature cannot be read: {error}") from error
    for parameter in parameters:
        has_default = parameter.default is not parameter.empty
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and has_default:
            if parameter.name in arguments:
                raise PluginError(f"{target}: option {parameter.name} is named like an argument of {hook}; rename it")
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            fields[parameter.name] = (annotation, option(parameter.default, f"option of {target.name}"))
        elif parameter.name not in arguments:
            raise PluginError(
                f"{target}: parameter {parameter.name} is not an argument of {hook} ({', '.join(sorted(arguments))}); "
                "an option is a keyword-only parameter with a default"
            )
    try:
        return create_model("Options", __base__=_FunctionOptions, **fields) if fields else None
    except PydanticUserError as error:
        raise PluginError(f"{target}: its options cannot be read: {error}") from error


class _FunctionOptions(Options):
    model_config = ConfigDict(arbitrary_types_allowed=True)


def _single_hook(target: Target) -> str:
    hooks = target.key.hooks
    if len(hooks) != 1:
        raise PluginError(f"{target} is a function, but {target.key.key} has several hooks ({', '.join(hooks)}): a class is needed")
    return hooks[0]


class FunctionPlugin:
    """A plain function as a plugin: it is called with all arguments of the one hook of its key, and its options by name."""

    def __init__(self, target: Target, options: Options | None, seed: int) -> None:
        self.hook = _single_hook(target)
        self._function: Callable[..., Any] = target.value
        self._options = {name: getattr(options, name) for name in type(options).model_fields} if options is not None else {}
        parameters = inspect.signature(target.value).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._arguments = [name for name in hook_arguments(self.hook) if takes_all or name in parameters]
        self._seed = seed
        self._in_many_calls = False

    def __call__(self, arguments: dict[str, Any]) -> Any:
        if self._in_many_calls:
            return self._answer(arguments)
        with kept_global_generators():
            return self._answer(arguments)

    @contextmanager
    def many_calls(self) -> Iterator[None]:
        """Around many calls: the global generators are seeded for each and put back once, at the end."""
        before = self._in_many_calls
        with kept_global_generators():
            self._in_many_calls = True
            try:
                yield
            finally:
                self._in_many_calls = before

    def _answer(self, arguments: dict[str, Any]) -> Any:
        seed_global_generators(self._place(arguments))
        return self._function(**{name: arguments[name] for name in self._arguments}, **self._options)

    def _place(self, arguments: dict[str, Any]) -> object:
        random = arguments.get("random")
        if isinstance(random, FetchRandom | StepRandom):
            return random.place
        batch = arguments.get("batch")
        return (self.hook, self._seed, arguments.get("img_key", batch.places if batch is not None else ""))
