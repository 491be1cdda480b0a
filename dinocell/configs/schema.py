"""Schemas: the keys of a frozen dataclass, and whether a plain value fits an annotation.

A schema is a ``frozen=True, kw_only=True`` dataclass whose annotations are numbers, text, paths, ``Literal``, enums,
optionals, tuples, lists, string-keyed dicts, and further schemas (*sections*). Types are not converted: ``true`` and
``3.0`` are not integers, ``7`` is not text. Accepted are an integer for a number, text for a path, a list for a tuple,
and one text for a list of texts or paths (``data.shards=D``).
"""

import contextlib
import dataclasses
import difflib
import enum
import logging
import math
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_log = logging.getLogger(__name__)

MISSING = "???"
"""Value in a recipe for a key that the user must set; the same as not setting it."""


class MisfitError(Exception):
    """A value that does not fit its schema: the dotted key and the problem."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key


def fit(annotation: Any, value: Any, key: str = "") -> Any:
    """Return plain data as an instance of a resolved annotation; a dataclass is built from a mapping.

    A MisfitError with ``key``, expected and got if the value does not fit.
    """
    origin, arguments, members = get_origin(annotation), get_args(annotation), _members(annotation)
    if len(members) > 1:
        real = [member for member in members if member is not type(None)]
        if value is None and len(real) < len(members):
            return None
        if len(real) == 1 and value is not None:
            return fit(real[0], value, key)  # its message may name an inner key
        for member in real:
            with contextlib.suppress(MisfitError):
                return fit(member, value, key)
    elif dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, Mapping):
            return _fit_section(annotation, value, key)
    elif origin in (tuple, list):
        has_any_length = origin is list or arguments[1:] == (...,)
        items = [value] if isinstance(value, str) and has_any_length and accepts_text(arguments[0]) else value
        if isinstance(items, list | tuple) and (has_any_length or len(items) == len(arguments)):
            kinds = arguments[:1] * len(items) if has_any_length else arguments
            pairs = enumerate(zip(kinds, items, strict=True))
            return origin(fit(kind, item, f"{key}[{index}]") for index, (kind, item) in pairs)
    elif origin is dict and isinstance(value, Mapping):
        return {name: fit(arguments[1], item, join(key, str(name))) for name, item in value.items()}
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        for option in annotation:
            if value in (option, option.name, option.value):
                return option
    elif annotation is float and type(value) in (int, float):
        return float(value)
    elif annotation is Path and isinstance(value, str | Path):
        return Path(value)
    elif (
        annotation is Any
        or (annotation in (int, bool, str, type(None)) and type(value) is annotation)
        or (origin is Literal and any(value == option and type(value) is type(option) for option in arguments))
    ):
        return value
    raise MisfitError(key, _expected_got(annotation, value))


def _fit_section(schema: type, value: Mapping[Any, Any], key: str) -> Any:
    value, former = present_keys(schema, value, key)
    for note in notes(former):
        _log.info(note)
    hints = field_types(schema)
    problems = {join(key, name): "unknown key" + did_you_mean(name, hints) for name in value if name not in hints}
    problems |= dict.fromkeys(missing_keys(schema, value, key), "required, but not set")
    if problems:
        raise MisfitError(*next(iter(problems.items())))
    values = {name: fit(hints[name], item, join(key, name)) for name, item in value.items()}
    try:
        return schema(**values)
    except ValueError as error:  # from the schema's __post_init__
        raise MisfitError(key, " ".join(str(error).split())) from error


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _expected_got(annotation: Any, value: Any) -> str:
    hint = ""
    if get_origin(annotation) is Literal and isinstance(value, str):
        hint = did_you_mean(value, [show(option, quote=False) for option in get_args(annotation)])
    elif accepts_text(annotation) and isinstance(value, bool | int | float):
        hint = "; put it in quotes"
    return f"expected {describe(annotation)}, got {show(value)}{hint}"


def describe(annotation: Any, *, plural: bool = False) -> str:
    """Return in words what an annotation accepts: ``a list of 2 numbers``, ``one of relu, gelu or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    nouns = {int: "an integer", float: "a number", str: "text", Path: "a path"}
    if len(_members(annotation)) > 1:
        return " or ".join(describe(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(show(option, quote=False) for option in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return ("lists of " if plural else "a list of ") + describe(arguments[0], plural=True)
    if origin is tuple:
        kinds = list(dict.fromkeys(describe(member, plural=True) for member in arguments))
        return f"{'lists' if plural else 'a list'} of {len(arguments)} {' and '.join(kinds)}"
    if origin is dict:
        return "a mapping from names to " + describe(arguments[1], plural=True)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    if dataclasses.is_dataclass(annotation):
        names = list(field_types(annotation))
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        return f"{'sections' if plural else 'a section'} ({shown})"
    if annotation in nouns:
        return f"{nouns[annotation].split()[-1]}s" if plural else nouns[annotation]
    return {bool: "true or false", type(None): "null", Any: "anything"}[annotation]


def show(value: Any, *, quote: bool = True) -> str:
    """Return a value in YAML spelling, at most 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not quote:
        return value
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_plain(value: Any) -> Any:
    """Return configuration objects as dicts, lists and scalars; enums as their names, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def field_types(schema: Any) -> dict[str, Any]:
    """Return the resolved annotation of every field of ``schema``."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def section(annotation: Any) -> type | None:
    """Return the schema of a section or of an optional section, None for a plain value."""
    sections = (member for member in _members(annotation) if isinstance(member, type))
    return next((member for member in sections if dataclasses.is_dataclass(member)), None)


def accepts_text(annotation: Any) -> bool:
    """Return whether ``annotation`` is text or a path, or an option of these."""
    return any(member in (str, Path) for member in _members(annotation))


def defaults(schema: type) -> dict[str, Any]:
    """Return the plain defaults of ``schema``, without the fields that have none."""
    values = {field.name: _default_of(field) for field in dataclasses.fields(schema) if field.init}
    return {name: to_plain(value) for name, value in values.items() if value is not dataclasses.MISSING}


def annotation_of(schema: type, key: str) -> Any:
    """Return the annotation of a dotted key of ``schema``; raise :class:`MisfitError` if there is no such key."""
    annotation: Any = schema
    outer = ""
    for part in key.split("."):
        inner = section(annotation)
        known = field_types(inner) if inner is not None else {}
        if part not in known and get_origin(annotation) is not dict:
            hint = did_you_mean(key, all_keys(schema)) if known else f"; {outer} takes {describe(annotation)}, no keys"
            raise MisfitError(join(outer, part), f"unknown key{hint}")
        annotation, outer = known[part] if known else get_args(annotation)[1], join(outer, part)
    return annotation


def present_keys(schema: type, values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Return nested values with former keys under their present names, and for each of these the former name.

    The module that defines a schema lists what changed, with dotted keys inside the schema: ``RENAMED_KEYS``, old to
    new, and ``REMOVED_KEYS``, old to the one value that is still accepted because it changes nothing. A MisfitError if
    a key is set under both names, or a removed key to another value.
    """
    module = sys.modules.get(schema.__module__)
    renamed, removed = getattr(module, "RENAMED_KEYS", {}), getattr(module, "REMOVED_KEYS", {})
    present, former = _copied(values), {}
    known = set(all_keys(schema)) if renamed or removed else set()
    for old, new in {**renamed, **dict.fromkeys(removed)}.items():
        if old in known or (new and new not in known) or (value := _take(present, old)) is _ABSENT:
            continue
        problem = ""
        if new and _take(_copied(present), new) is not _ABSENT:
            problem = f"set twice, also under its former name {join(prefix, old)}"
        elif new:
            *parents, name = new.split(".")
            inside = present
            for part in parents:
                inside = inside.setdefault(part, {})
            inside[name] = value
        elif value != removed[old]:
            problem = f"no longer exists; only {show(removed[old])} is still accepted"
        if problem:
            raise MisfitError(join(prefix, new or old), problem)
        former[join(prefix, new or old)] = join(prefix, old)
    hints = field_types(schema)
    for name, value in present.items():
        inner = section(hints.get(name))
        if inner is not None and isinstance(value, Mapping):
            present[name], more = present_keys(inner, value, join(prefix, name))
            former |= more
    return present, former


def notes(former: Mapping[str, str]) -> list[str]:
    """Return a line for each former key that `present_keys` found."""
    return [f"{old} is now {new}" if old != new else f"{old} no longer exists" for new, old in former.items()]


def _copied(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): _copied(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _take(values: dict[str, Any], key: str) -> Any:
    """Remove a dotted key, and the sections that this empties, and return its value."""
    name, _, rest = key.partition(".")
    if not rest:
        return values.pop(name, _ABSENT)
    inside = values.get(name)
    value = _take(inside, rest) if isinstance(inside, dict) else _ABSENT
    if value is not _ABSENT and not inside:
        del values[name]
    return value


def with_defaults(schema: type, values: Mapping[str, Any], plain: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return nested values with the keys that they lack, as far as these have defaults (or are in ``plain``)."""
    plain = plain or defaults(schema)
    result = {**plain, **values}
    for name, annotation in field_types(schema).items():
        inner, value = section(annotation), values.get(name)
        if inner is not None and isinstance(value, Mapping):
            result[name] = with_defaults(inner, value, plain.get(name))
    return result


def missing_keys(schema: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of ``schema`` that have no default and are not set in ``values``."""
    missing: list[str] = []
    for field in dataclasses.fields(schema):
        key, value = join(prefix, field.name), values.get(field.name, MISSING)
        inner = section(field_types(schema)[field.name]) if field.init else None
        if inner is not None and isinstance(value, Mapping):
            missing += missing_keys(inner, value, key)
        elif field.init and value == MISSING and (field.name in values or _default_of(field) is dataclasses.MISSING):
            missing += (missing_keys(inner, {}, key) if inner is not None else []) or [key]
    return missing


def all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of ``schema``, sections before their keys."""
    for name, annotation in field_types(schema).items():
        key = join(prefix, name)
        yield key
        inner = section(annotation)
        if inner is not None:
            yield from all_keys(inner, key)


def did_you_mean(got: str, known: Iterable[str], *, suffix: str = "") -> str:
    """Return ``; did you mean 'x'?`` for the most similar of ``known``, or nothing if none is similar.

    The last part of a dotted key may match alone: ``depth`` finds ``vit.depth``.
    """

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, got.lower(), candidate.lower()).ratio()
        tails = (got.lower().rpartition(".")[2], candidate.lower().rpartition(".")[2])
        return max(whole, 0.9 * difflib.SequenceMatcher(None, *tails).ratio())

    best = max(known, key=likeness, default="")
    return f"; did you mean '{best}{suffix}'?" if best and likeness(best) >= 0.6 else ""


def join(prefix: str, name: str) -> str:
    """Return the dotted key of ``name`` inside the section ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ("compute",)) -> list[str]:
    """Return the differences between two plain configurations, as lines ``key: old -> new``.

    ``ignore`` are dotted keys or sections that may differ; ``compute`` holds the settings that do not change results.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    differing = []
    for key in {**before, **after}:
        is_ignored = any(f"{key}.".startswith(f"{ignored}.") for ignored in ignore)
        if not is_ignored and not _same(before.get(key, _ABSENT), after.get(key, _ABSENT)):
            texts = [show(side[key]) if key in side else "(absent)" for side in (before, after)]
            differing.append(f"{key}: {texts[0]} -> {texts[1]}")
    return differing


_ABSENT = object()


def _same(old: Any, new: Any) -> bool:
    both_nan = isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new)
    return both_nan or (old == new and isinstance(old, bool) == isinstance(new, bool))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, join(prefix, str(name)))
        else:
            yield join(prefix, str(name)), list(value) if isinstance(value, tuple) else value
