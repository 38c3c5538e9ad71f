"""Makes the plugins that the TOML file names, registers what they answer, and names the culprit when one fails.

Every answer goes through an `_Implementation`, which gives it the arguments it wants and a random stream of its own, and checks what it
answers. Picks and chains have exactly one implementer in pluggy's eyes, so wrappers run once around the whole. Wrappers are pluggy's own.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, cast

import pluggy

from sdxl_train.answers import wrong_answer
from sdxl_train.errors import ConfigError, PluginError, SdxlTrainError
from sdxl_train.hookspecs import HookSpecs
from sdxl_train.options import Options
from sdxl_train.plugin_discovery import Catalogue, Target
from sdxl_train.plugin_functions import FunctionPlugin, function_options, hook_arguments
from sdxl_train.plugin_keys import CHAIN_HOOKS, PICK_HOOKS, PLUGIN_KEYS, key_of_hook

log = logging.getLogger(__name__)
HOOK_NAMES = tuple(name for name in vars(HookSpecs) if not name.startswith("_"))


@dataclass(frozen=True)
class Choice:
    """One plugin that a run uses: the TOML key that names it, its name, and its options as given (defaults left out)."""

    key: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def options_of(target: Target) -> type[Options] | None:
    """The options model of a plugin: the nested class `Options`, or what a function's keyword-only parameters say.

    Raises:
        PluginError: the target is neither a class nor a function, or its Options is not an sdxl_train.Options.
    """
    if inspect.isclass(target.value):
        nested = getattr(target.value, "Options", None)
        if nested is not None and not (inspect.isclass(nested) and issubclass(nested, Options)):
            raise PluginError(f"{target}: its nested class Options must derive from sdxl_train.Options")
        return nested
    if callable(target.value):
        return function_options(target)
    raise PluginError(f"{target} is a {type(target.value).__name__}; a plugin is a class or a function")


@dataclass(frozen=True)
class Loaded:
    """A plugin made ready: where it came from, and the object that answers."""

    target: Target
    instance: Any
    has_failed: set[str] = field(default_factory=set, compare=False)

    @property
    def state_name(self) -> str:
        return f"{self.target.key.key}/{self.target.name}"


@dataclass(frozen=True)
class _Implementation:
    """One plugin's answer to one hook."""

    plugin: Loaded
    hook: str
    call: Callable[[dict[str, Any]], Any]
    options: Mapping[str, Any]

    def __call__(self, arguments: dict[str, Any]) -> Any:
        random = arguments.get("random")
        if random is not None:
            arguments = {**arguments, "random": random.stream(f"plugin/{self.plugin.target.name}")}
        try:
            answer = self.call(arguments)
        except SdxlTrainError:
            raise
        except Exception as error:
            if self.plugin.target.key.key == "trackers":  # a side job: it can neither end the training nor change it
                self._tell_once(error)
                return None
            raise PluginError(f"{self.plugin.target} raised in {self.hook}{_place(arguments)}: {type(error).__name__}: {error}") from error
        wrong = wrong_answer(self.hook, answer, arguments)
        if wrong or (answer is None and self.hook in ("checkpoint_metadata", "weigh_loss")):
            raise PluginError(f"{self.plugin.target} answered {self.hook}{_place(arguments)} wrongly: {wrong}")
        return answer

    def _tell_once(self, error: Exception) -> None:
        if self.plugin.target.name not in self.plugin.has_failed:
            self.plugin.has_failed.add(self.plugin.target.name)
            log.warning("%s raised in %s and goes on without it: %s: %s", self.plugin.target, self.hook, type(error).__name__, error)


class _Forwarder:
    """What pluggy calls for one hook: it carries a function with the hook's name that passes its arguments on as a dict."""

    def __init__(self, hook: str, answer: Callable[[dict[str, Any]], Any], opts: dict[str, Any]) -> None:
        self.hook = hook
        self.opts = opts
        names = hook_arguments(hook)  # pluggy reads them from the code object, so the function is made from text
        code = f"lambda {', '.join(names)}: answer(dict({', '.join(f'{name}={name}' for name in names)}))"
        setattr(self, hook, eval(code, {"answer": answer}))


class _Manager(pluggy.PluginManager):
    """pluggy's manager, which here sees the wrappers of the plugins, and our forwarders instead of everything else they answer."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if isinstance(plugin, _Forwarder):
            return plugin.opts if name == plugin.hook else None
        opts = super().parse_hookimpl_opts(plugin, name)
        return opts if opts and (opts.get("wrapper") or opts.get("hookwrapper")) else None


class Plugins:
    """All plugins of a run. `hooks` calls them: `plugins.hooks.sample_timesteps(batch_size=..., ...)`.

    Args:
        choices: which plugins, in the order of the TOML keys.
        seed: the run's seed, for plain functions that use `random` or `numpy.random`.
        catalogue: what is installed; read anew when left out.
    Raises:
        PluginError: a plugin cannot be loaded, does not answer what its key asks for, or two answer one pick.
    """

    def __init__(self, choices: Sequence[Choice], seed: int, catalogue: Catalogue | None = None) -> None:
        self.choices = tuple(choices)
        self.seed = seed
        catalogue = catalogue or Catalogue()
        self.loaded = [_make(choice, catalogue.find(PLUGIN_KEYS[choice.key], choice.name), seed) for choice in self.choices]
        self._manager = _Manager("sdxl_train")
        self._manager.add_hookspecs(HookSpecs)
        self.hooks = cast(HookSpecs, self._manager.hook)
        implementations = [found for plugin in self.loaded for found in _implementations(plugin)]
        self._register_picks_and_chains(implementations)
        for implementation in reversed(implementations):  # pluggy calls the last registered first
            if implementation.hook not in (*PICK_HOOKS, *CHAIN_HOOKS):
                self._register(implementation.hook, implementation, implementation.options)
        wrapping = [plugin for plugin in reversed(self.loaded) if _wrapped_hooks(plugin.instance)]
        for plugin in wrapping:
            self._manager.register(plugin.instance, plugin.state_name)
        if wrapping:  # a wrapper can break or replace an answer after it was checked
            self._manager.add_hookcall_monitoring(lambda *_: None, _WrapperCheck(wrapping))

    def __reduce__(self) -> Any:
        return (Plugins, (self.choices, self.seed))

    def rebuilt(self) -> Plugins:
        """The same plugins on instances of their own, for a loader process."""
        return Plugins(self.choices, self.seed)

    def of_key(self, key: str) -> list[Loaded]:
        """The plugins that a TOML key named."""
        return [plugin for plugin in self.loaded if plugin.target.key.key == key]

    def has_members(self, hook: str) -> bool:
        """Whether any plugin answers a chain's hook (the chain itself always does)."""
        return hook in self._chain_members

    def only_default_answers(self, key: str, hook: str) -> bool:
        """Whether the key's default plugin answers alone: nothing else is named by it and nothing wraps the hook."""
        named = tuple(plugin.target.name for plugin in self.of_key(key))
        return named == PLUGIN_KEYS[key].default and not any(hook in _wrapped_hooks(plugin.instance).values() for plugin in self.loaded)

    def hook_codes(self) -> dict[CodeType, tuple[str, str]]:
        """(plugin, hook) by the code that answers or wraps it: what a frame of a stack belongs to."""
        codes: dict[CodeType, tuple[str, str]] = {}
        for plugin in self.loaded:
            if isinstance(plugin.instance, FunctionPlugin):
                methods = {plugin.instance.hook: plugin.target.value}
            else:
                methods = {opts.get("specname") or name: getattr(plugin.instance, name) for name, opts in _marked(plugin.instance).items()}
            for hook, method in methods.items():
                code = _code(method)
                if code is not None:
                    codes.setdefault(code, (str(plugin.target), hook))
        return codes

    @contextmanager
    def many_calls(self, key: str) -> Iterator[None]:
        """To stand around a loop that asks a key's plugins for every datum, so that plain functions are called quickly."""
        with ExitStack() as functions:
            for plugin in self.of_key(key):
                if isinstance(plugin.instance, FunctionPlugin):
                    functions.enter_context(plugin.instance.many_calls())
            yield

    def state_dict(self) -> dict[str, Any]:
        """The state of every plugin that has one, by "key/name"."""
        return {plugin.state_name: plugin.instance.state_dict() for plugin in self.loaded if hasattr(plugin.instance, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the same plugins.

        Raises:
            ConfigError: a state without its plugin, or the reverse.
        """
        stateful = {plugin.state_name: plugin for plugin in self.loaded if hasattr(plugin.instance, "state_dict")}
        gone, new = sorted(state.keys() - stateful.keys()), sorted(stateful.keys() - state.keys())
        anew = "begin anew with a saved model as pretrained_model_name_or_path"
        if gone:
            raise ConfigError(f"the train state holds the state of {', '.join(gone)}: name the plugin again, or {anew}")
        if new:
            raise ConfigError(f"the train state holds nothing of {', '.join(new)}: leave the plugin out, or {anew}")
        for name, plugin in stateful.items():
            plugin.instance.load_state_dict(state[name])

    def _register_picks_and_chains(self, implementations: list[_Implementation]) -> None:
        self._chain_members = {found.hook for found in implementations}
        for hook in PICK_HOOKS:
            members = [found for found in implementations if found.hook == hook]
            if len(members) > 1:
                raise PluginError(f"{hook} has two answers: {' and '.join(str(member.plugin.target) for member in members)}")
            if members:
                self._register(hook, members[0], {})
        for hook in CHAIN_HOOKS:
            self._register(hook, _Chain(hook, [found for found in implementations if found.hook == hook]), {})

    def _register(self, hook: str, answer: Callable[[dict[str, Any]], Any], opts: Mapping[str, Any]) -> None:
        self._manager.register(_Forwarder(hook, answer, dict(opts)))


class _Chain:
    """All members of a chain, as the one implementer of its hook: each is given the last one's answer."""

    def __init__(self, hook: str, members: list[_Implementation]) -> None:
        self._members = members
        self._first, self._pass_on = _CHAINED[hook]

    def __call__(self, arguments: dict[str, Any]) -> Any:
        answer = self._first(arguments)
        for member in self._members:
            answer = member(self._pass_on(arguments, answer))
        return answer


def _with_text(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from dataclasses import replace

    def first(arguments: dict[str, Any]) -> Any:
        text = getattr(arguments["img_info"], name)
        return "" if text is None else text

    return first, lambda arguments, answer: {**arguments, "img_info": replace(arguments["img_info"], **{name: answer})}


_NOISE = (lambda arguments: arguments["noise"], lambda arguments, answer: {**arguments, "noise": answer})
_CHAINED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "process_caption": _with_text("caption"),
    "process_description": _with_text("description"),
    "shape_noise": _NOISE,
    "shape_input_noise": _NOISE,
}


def _make(choice: Choice, target: Target, seed: int) -> Loaded:
    """Instantiate a plugin with its validated options."""
    model = options_of(target)
    options = model.model_validate(dict(choice.options)) if model is not None else None
    make: Callable[..., Any] = target.value
    arguments = () if options is None else (options,)
    if not inspect.isclass(make):
        return Loaded(target, FunctionPlugin(target, options, seed))
    try:
        return Loaded(target, make(*arguments))
    except SdxlTrainError:
        raise
    except Exception as error:
        raise PluginError(f"{target} cannot be made: {type(error).__name__}: {error}") from error


def _implementations(plugin: Loaded) -> list[_Implementation]:
    """What a plugin answers itself (its wrappers apart), checked against the specs and against the key that named it."""
    target, instance = plugin.target, plugin.instance
    if isinstance(instance, FunctionPlugin):
        return [_Implementation(plugin, instance.hook, instance, {})]
    found = []
    hooks = _marked(instance)
    for name, opts in hooks.items():
        hook = opts.get("specname") or name
        _check_signature(target, hook, getattr(instance, name))
        if opts.get("wrapper") or opts.get("hookwrapper"):
            continue
        owner = key_of_hook(hook)
        if owner is not None and owner is not target.key:
            raise PluginError(f"{target} answers {hook}, which belongs to {owner.key}: name the plugin there, or make it a wrapper")
        found.append(
            _Implementation(
                plugin,
                hook,
                _with_wanted(getattr(instance, name)),
                {"tryfirst": opts.get("tryfirst", False), "trylast": opts.get("trylast", False)},
            )
        )
    wanted = target.key.hooks if target.key.key != "plugins" else tuple(hooks)
    if not hooks or (not any(implementation.hook in wanted for implementation in found) and target.key.key != "plugins"):
        raise PluginError(
            f"{target} answers none of the hooks of {target.key.key}: {', '.join(target.key.hooks)} (is it marked @hookimpl?)"
        )
    return found


def _marked(instance: Any) -> dict[str, Mapping[str, Any]]:
    """The methods of a plugin that are marked @hookimpl, with the marker's options."""
    marker = pluggy.PluginManager("sdxl_train")
    found = {name: marker.parse_hookimpl_opts(instance, name) for name in dir(instance)}
    return {name: opts for name, opts in found.items() if opts is not None}


def _wrapped_hooks(instance: Any) -> dict[str, str]:
    """The hook that each wrapper of a plugin stands around, by the method's name."""
    wrappers = {name: opts for name, opts in _marked(instance).items() if opts.get("wrapper") or opts.get("hookwrapper")}
    return {name: opts.get("specname") or name for name, opts in wrappers.items()}


def _code(method: Callable[..., Any]) -> CodeType | None:
    """What a method runs; None for a callable without code in Python."""
    return getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)


def _wanted(method: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(method).parameters.items() if parameter.kind in kinds]


def _with_wanted(method: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    wanted = _wanted(method)
    return lambda arguments: method(**{name: arguments[name] for name in wanted})


def _check_signature(target: Target, hook: str, method: Callable[..., Any]) -> None:
    if hook not in HOOK_NAMES:
        near = difflib.get_close_matches(hook, HOOK_NAMES, 1)
        raise PluginError(f"{target}: there is no hook {hook}" + (f"; did you mean {near[0]}?" if near else ""))
    unknown = [name for name in _wanted(method) if name not in hook_arguments(hook)]
    if unknown:
        raise PluginError(f"{target}: {hook} has no argument {', '.join(unknown)}; it has {', '.join(hook_arguments(hook))}")


def _place(arguments: Mapping[str, Any]) -> str:
    """Which datum or step a call is about, as words for a message."""
    if "img_info" in arguments:
        return f" for {arguments['img_info'].key!r}"
    if "img_key" in arguments:
        return f" for {arguments['img_key']!r}"
    if "batch" in arguments:
        return f" for the batch {list(arguments['batch'].keys)}"
    return f" at step {arguments['run'].step}" if "run" in arguments else ""


class _WrapperCheck:
    """After a call around which wrappers stand: is the answer still right, and whose is the exception."""

    def __init__(self, wrapping: list[Loaded]) -> None:
        self._by_code: dict[CodeType, Loaded] = {}
        self._by_hook: dict[str, list[str]] = {}
        for plugin in wrapping:
            for name, hook in _wrapped_hooks(plugin.instance).items():
                code = _code(getattr(plugin.instance, name))
                if code is not None:
                    self._by_code[code] = plugin
                self._by_hook.setdefault(hook, []).append(str(plugin.target))

    def __call__(self, outcome: pluggy.Result[Any], hook: str, _: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        if hook not in self._by_hook:
            return
        error = outcome.exception
        if isinstance(error, Exception) and not isinstance(error, SdxlTrainError):
            raised = PluginError(f"{self._culprit(error, hook)} raised in {hook}{_place(arguments)}: {type(error).__name__}: {error}")
            raised.__cause__ = error
            outcome.force_exception(raised)
        elif error is None:
            answer = outcome.get_result()
            answers = [answer] if hook in (*PICK_HOOKS, *CHAIN_HOOKS) else answer
            wrong = f"expected a list, got {type(answer).__name__}" if not isinstance(answers, list) else None
            wrong = wrong or next((found for one in answers if (found := wrong_answer(hook, one, arguments))), None)
            if wrong:
                outcome.force_exception(
                    PluginError(f"a wrapper of {hook} ({', '.join(self._by_hook[hook])}) spoils its answer{_place(arguments)}: {wrong}")
                )

    def _culprit(self, error: BaseException, hook: str) -> str:
        frame, culprit = error.__traceback__, None
        while frame is not None:
            culprit = self._by_code.get(frame.tb_frame.f_code, culprit)
            frame = frame.tb_next
        return str(culprit.target) if culprit else f"a wrapper of {hook} ({', '.join(self._by_hook[hook])})"
