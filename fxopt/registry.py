"""Names of passes, backends and pipelines, and channel rules of plugins, by entry point.

Four groups: `fxopt.passes` and `fxopt.backends` name classes; `fxopt.pipelines` names sequences of pass specs, such as
"default". These hold the built-in ones too. `fxopt.channel_rules` names the rules of `fxopt/analysis/channel_rules.py`
that plugins add for operators of their own. Listing imports every plugin; a broken one is named in a warning and left
out. Looking a name up imports that one alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from fxopt.backend import Backend
from fxopt.errors import RegistryError
from fxopt.passes_base import Pass
from fxopt.spec import configure, parse_spec

if TYPE_CHECKING:
    from fxopt.analysis.channel_rules import Rule

__all__ = [
    "BrokenPluginWarning",
    "Step",
    "backends",
    "channel_rules",
    "find_backend",
    "make_backend",
    "make_pass",
    "make_steps",
    "passes",
    "pipelines",
]

_PASSES, _BACKENDS, _PIPELINES = "fxopt.passes", "fxopt.backends", "fxopt.pipelines"
_CHANNEL_RULES = "fxopt.channel_rules"
_SINGULAR = {_PASSES: "pass", _BACKENDS: "backend", _PIPELINES: "pipeline"}


class BrokenPluginWarning(UserWarning):
    """A plugin could not be imported, or two plugins claim one name."""


class Step(NamedTuple):
    """A pass to run.

    Attributes:
        pass_: the configured pass.
        explicit: whether the user asked for this pass, rather than for a pipeline that holds it; only then is it worth
            a warning that it found nothing to do.
    """

    pass_: Pass
    explicit: bool


def passes() -> Mapping[str, type[Pass]]:
    """All registered passes that import, by name."""
    return _load_all(_PASSES)


def backends() -> Mapping[str, type[Backend]]:
    """All registered backends that import, by name."""
    return _load_all(_BACKENDS)


def pipelines() -> Mapping[str, tuple[str, ...]]:
    """All registered pipelines: name -> pass specs."""
    return _load_all(_PIPELINES)


def make_pass(spec: str) -> Pass:
    """The pass that a spec string describes.

    Raises:
        RegistryError: if the spec does not parse, or its name is not registered, or registered twice.

    >>> str(make_pass("fold_batch_norm"))
    'fold_batch_norm'
    """
    name, options = parse_spec(spec)
    made: Pass = configure(_load(_find(_PASSES, name)), options)
    return made


def make_steps(wanted: str | Pass | Iterable[str | Pass]) -> list[Step]:
    """The passes to run, with pipelines spelled out.

    Args:
        wanted: a pass, a spec string, the name of a pipeline, or a sequence of these.

    Raises:
        RegistryError: for a name or spec that is not known, and for what is none of these, such as a pass's class.
    """
    steps: list[Step] = []
    for item in wanted if isinstance(wanted, Iterable) and not isinstance(wanted, str) else (wanted,):
        if isinstance(item, Pass):
            steps.append(Step(item, explicit=True))
        elif not isinstance(item, str):
            raise RegistryError(_not_made(item, Pass, "simplify"))
        elif item.strip() in _by_name(_PIPELINES):
            specs = _load(_find(_PIPELINES, item.strip()))
            steps += [Step(make_pass(spec), explicit=False) for spec in specs]
        else:
            steps.append(Step(make_pass(item), explicit=True))
    return steps


def find_backend(name: str) -> type[Backend]:
    """The backend class of that name.

    Raises:
        RegistryError: if it is not registered, or registered twice.
    """
    found: type[Backend] = _load(_find(_BACKENDS, name))
    return found


def make_backend(wanted: str | Backend) -> Backend:
    """The backend that a spec string describes; a backend passes through.

    Raises:
        RegistryError: for a name or spec that is not known, and for what is neither, such as a backend's class.
    """
    if isinstance(wanted, Backend):
        return wanted
    if not isinstance(wanted, str):
        raise RegistryError(_not_made(wanted, Backend, "onnx"))
    name, options = parse_spec(wanted)
    made: Backend = configure(find_backend(name), options)
    return made


def channel_rules(operators: Iterable[str], builtin: Collection[str]) -> Mapping[str, Rule]:
    """The channel rules that plugins give for some operators, by canonical name; only these are imported.

    Args:
        operators: canonical names. That of an operator outside the table, "unknown:mylib.gate.default", is registered
            without its "unknown:".
        builtin: names of the operators that have a built-in rule, which a plugin cannot replace.

    Raises:
        RegistryError: if the rule of one of these operators cannot be imported, is no function, is registered twice,
            or is built in.
    """
    known = _by_name(_CHANNEL_RULES)
    rules: dict[str, Rule] = {}
    for op in operators:
        entries = known.get(op.removeprefix("unknown:"))
        if entries is None:
            continue
        if op in builtin:
            owners = " and ".join(sorted(_distribution(entry) for entry in entries))
            raise RegistryError(
                f"{owners} registers a channel rule for {op!r}, which has a built-in one; "
                "give rules of your own to find_channels(rules=...), or uninstall it"
            )
        if len(entries) > 1:
            raise RegistryError(_duplicate(entries[0].name, entries))
        rule = _load(entries[0])
        if not callable(rule):
            raise RegistryError(f"the channel rule {op!r} of {_distribution(entries[0])} is no function, but {rule!r}")
        rules[op] = rule
    return rules


def _not_made(given: object, kind: type[Any], example: str) -> str:
    """What to say of an object that is neither an instance of `kind` nor a spec."""
    what = kind.__name__.lower()
    if isinstance(given, type):
        return (
            f"{given.__name__} is a class: pass an instance, {given.__name__}(), or a spec string such as {example!r}"
        )
    return f"a {what} must be an instance of {kind.__name__} or a spec string such as {example!r}, not {given!r}"


def _by_name(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return found


def _find(group: str, name: str) -> EntryPoint:
    known = _by_name(group)
    if name not in known:
        kind = group.partition(".")[2]
        choices = sorted(known) + (sorted(_by_name(_PIPELINES)) if group == _PASSES else [])
        hint = f"known {kind}: {', '.join(choices)}" if choices else "none are registered: install fxopt with pip"
        raise RegistryError(f"no {_SINGULAR[group]} named {name!r}; {hint}")
    if len(known[name]) > 1:
        raise RegistryError(_duplicate(name, known[name]))
    return known[name][0]


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # a plugin may fail to import in any way: it is named, with the cause
        raise RegistryError(
            f"{entry.name!r} of the distribution {_distribution(entry)} cannot be imported "
            f"({type(error).__name__}: {error}); reinstall or remove that package"
        ) from error


def _load_all(group: str) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    for name, entries in sorted(_by_name(group).items()):
        if len(entries) > 1:
            warnings.warn(_duplicate(name, entries), BrokenPluginWarning, stacklevel=3)
            continue
        try:
            loaded[name] = _load(entries[0])
        except RegistryError as error:
            warnings.warn(f"skipped {error}", BrokenPluginWarning, stacklevel=3)
    return loaded


def _duplicate(name: str, entries: list[EntryPoint]) -> str:
    owners = " and ".join(sorted(_distribution(entry) for entry in entries))
    return f"the name {name!r} is registered by {owners}: uninstall one of them"


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
