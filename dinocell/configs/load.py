"""Load a recipe: schema defaults <- recipe YAML <- ``key=value`` overrides, as one frozen object.

OmegaConf, used only in this module, reads the YAML (``1e-4`` is a number, a duplicate key is an error) and resolves
``${other.key}`` and ``${oc.env:NAME}``; :mod:`dinocell.configs.schema` checks the values. Every problem is a
:class:`ConfigError` of one line with the file and line, or the override, and the dotted key.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from dinocell.configs import schema as schemas
from dinocell.configs.schema import MisfitError, did_you_mean, join
from dinocell.errors import ConfigError, one_line

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Setting:
    """One value that a recipe or an override sets, and where."""

    key: str
    value: Any
    source: str


def load_config(schema: type[T], recipe: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Return the frozen configuration of a recipe and overrides; any problem is a ConfigError.

    Parameters
    ----------
    schema
        Frozen, keyword-only dataclass; fields may be further ones (sections).
    recipe
        YAML file (UTF-8) with the values that differ from the defaults; may be empty. None: defaults only.
    overrides
        ``key=value`` with a dotted key and a YAML value (``vit.blocks=[2,5]``), applied after the recipe in order, so
        the last one wins. Text and paths are taken literally.
    """
    settings = list(_recipe_settings(schema, recipe)) if recipe is not None else []
    settings += [setting for text in overrides for setting in _override_settings(schema, text, overrides)]
    tree: Any = OmegaConf.create(schemas.defaults(schema))
    for setting in settings:
        tree = OmegaConf.unsafe_merge(tree, _nested(setting.key, setting.value))
    with _errors_at(lambda key: _source_of(key, settings)):
        values = _resolve(schema, tree, settings)
        if missing := schemas.missing_keys(schema, values):
            where = f"{recipe}: " if recipe is not None else ""
            hint = f"set it in the recipe or with {missing[0]}=..."
            raise ConfigError(f"{where}required, but not set: {', '.join(missing)}; {hint}")
        return schemas.fit(schema, values)  # type: ignore[no-any-return]


def text_override(key: str, value: str | Path | Sequence[str | Path]) -> str:
    """Return the override that sets a key to a text or path, or a list of them, with any characters."""
    texts = [str(item) for item in ([value] if isinstance(value, str | Path) else value)]
    dumped = yaml.safe_dump(_escape(texts), default_flow_style=True, default_style='"', width=float("inf")).strip()
    return f"{key}={dumped[1:-1] if isinstance(value, str | Path) else dumped}"


def find_recipe(command: str, name: str) -> Path:
    """Return the recipe file of a path to a YAML file or the name of a shipped recipe.

    A ConfigError that lists the shipped ones if there is no such file or recipe.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~ of an unknown user
        path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = shipped_recipes(command)
    if name in shipped:
        return _shipped_folder(command) / f"{name}.yaml"
    kind = "is a folder" if path.is_dir() else "is another file" if path.exists() else "does not exist"
    listed = f"shipped for {command}: {', '.join(shipped) or 'none'}{did_you_mean(path.stem, shipped)}"
    raise ConfigError(f"no recipe '{name}': expected a .yaml file or a shipped recipe, this {kind}; {listed}")


def shipped_recipes(command: str) -> list[str]:
    """Return the sorted names of the recipes that are installed with DINOCell for ``command``."""
    return sorted(path.stem for path in _shipped_folder(command).glob("*.yaml"))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the plain mapping in a YAML file, without resolving ``${...}``; :class:`ConfigError` if there is none."""
    return _parse(path)[0]


def read_stored(schema: type, path: Path) -> dict[str, Any]:
    """Return the plain configuration that an earlier start stored, as this version would have stored it.

    Renamed keys have their present names, and keys that were added since then have their defaults. A ConfigError as for
    `read_mapping`, or if a key is set under its former and its present name.
    """
    with _errors_at(lambda _: str(path)):
        values, _ = schemas.present_keys(schema, read_mapping(path))
    return schemas.with_defaults(schema, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration object as nested plain types: dict, list, str, int, float, bool, None."""
    return cast("dict[str, Any]", schemas.to_plain(config))


def to_yaml(config: Any) -> str:
    """Return the YAML of a configuration object with every key; ``load_config`` reads it back."""
    return str(OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config)))))


def _shipped_folder(command: str) -> Path:
    return Path(__file__).parent / command


@contextmanager
def _errors_at(source: Callable[[str], str]) -> Iterator[None]:
    """Turn errors of the schema, of YAML and of ``${...}`` into one line that begins with the source of their key."""
    cause: Exception
    try:
        yield
        return
    except MisfitError as error:
        cause, where, problem = error, source(error.key), str(error)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}: column {mark.column + 1}" if mark is not None else ""
        cause, where, problem = error, source("") + place, _reason(error)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        cause, where, problem = error, source(key), f"{key}: {_reason(error)}" if key else _reason(error)
    raise ConfigError(f"{where}: {problem}" if where else problem) from cause


def _reason(error: yaml.YAMLError | OmegaConfBaseException) -> str:
    """Return in one line what a library cannot read in a text."""
    if isinstance(error, yaml.YAMLError):
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or one_line(error)
        return f"not valid YAML: {problem}"
    line = str(error).splitlines()[0]
    if isinstance(error, GrammarParseError):
        return f"the ${{...}} in it cannot be read ({line})"
    return line.partition(" raised while resolving interpolation: ")[2].strip('"') or line


def _nested(key: str, value: Any) -> Any:
    """Return ``{a: {b: value}}`` for the dotted key ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the mapping in a YAML file, and the line of every dotted key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems = {
            FileNotFoundError: "no such file",
            IsADirectoryError: "is a folder, expected a YAML file",
            UnicodeDecodeError: f"not UTF-8 text (byte {getattr(error, 'start', 0)}); save it as UTF-8",
        }
        problem = problems.get(type(error), f"cannot be read: {one_line(error)}")
        raise ConfigError(f"{path}: {problem}") from error
    with _errors_at(lambda _: str(path)):
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        plain: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if root is not None else {}
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else f"'{root.value}'"
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected 'key: value' lines, got {kind}")
    lines = {key: line for key, line, _ in reversed([*_nodes(root)])}
    with _errors_at(lambda key: f"{path}:{lines[key]}"):
        _check_numbers(root)
    return {str(name): value for name, value in plain.items()}, lines


def _nodes(node: yaml.Node | None, key: str = "", line: int = 1) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield the dotted key and the line of every name and value inside a node."""
    if node is not None:
        yield key, line, node
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = join(key, str(name.value))
            yield inner, name.start_mark.line + 1, name
            yield from _nodes(value, inner, name.start_mark.line + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _nodes(value, f"{key}[{index}]", value.start_mark.line + 1)


def _check_numbers(root: yaml.Node | None, key: str = "") -> None:
    """Refuse numbers with a surprising meaning in YAML 1.1: 010 is 8 (octal), 1:30 is 90 (base 60)."""
    for inner, _, node in _nodes(root, key):
        is_number = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith((":int", ":float"))
        if is_number and re.fullmatch(r"[-+]?0[0-7_]+|[^:]+:.*", node.value):
            meaning = yaml.safe_load(node.value)
            problem = f"{node.value} is {meaning} to YAML; write {meaning}, or '{node.value}' in quotes for a text"
            raise MisfitError(inner, problem)


def _recipe_settings(schema: type, recipe: Path) -> Iterator[_Setting]:
    values, lines = _parse(recipe)
    with _errors_at(lambda _: str(recipe)):
        values, former = schemas.present_keys(schema, values)
    for note in schemas.notes(former):
        _log.warning("%s: %s", recipe, note)

    def source(key: str) -> str:
        for new, old in reversed(former.items()):
            if f"{key}.".startswith(f"{new}."):
                key = old + key[len(new) :]
        return f"{recipe}:{lines[key]}" if key in lines else str(recipe)

    yield from _settings(schema, "", values, source)


def _override_settings(schema: type, text: str, overrides: Sequence[str]) -> Iterator[_Setting]:
    # A file name in another encoding has surrogates; config.yaml could not hold it.
    shown = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    source = f"override '{shown}'"
    key, equals, raw = (part.strip() for part in text.partition("="))
    keys = list(schemas.all_keys(schema))
    problem = ""
    if shown != text:
        problem = "expected UTF-8 text; rename the file or folder"
    elif not equals:
        hint = f"; did you mean '{key}=...'?" if key in keys else did_you_mean(key, keys, suffix="=...")
        problem = f"expected key=value{hint}"
    elif not all(key.split(".")):
        problem = f"expected key=value, got the empty key '{key}'"
    elif not raw:  # an unset shell variable
        problem = f"expected a value behind the '='; for none write {key}=null"
    if problem:
        raise ConfigError(f"{source}: {problem}")
    with _errors_at(lambda _: source):
        _, former = schemas.present_keys(schema, _nested(key, ""))
        if former:
            for new, old in former.items():
                key = new + key.removeprefix(old)
            if key in (other.partition("=")[0].strip() for other in overrides):
                raise MisfitError(key, "set twice, also under its former name")
            _log.warning("%s: %s", source, ", ".join(schemas.notes(former)))
        value = _from_text(schemas.annotation_of(schema, key), raw, key)
    yield from _settings(schema, key, value, lambda _: source)


def _settings(schema: type, key: str, value: Any, source: Callable[[str], str]) -> Iterator[_Setting]:
    """Split ``value`` into one setting per key of the schema, and check each."""
    with _errors_at(lambda _: source(key)):
        annotation = schemas.annotation_of(schema, key) if key else schema
        is_section = schemas.section(annotation) is not None and isinstance(value, Mapping)
        if not is_section and value != schemas.MISSING and "${" not in str(value):
            schemas.fit(annotation, value, key)
    if not is_section or (key and not value):
        yield _Setting(key, value, source(key))
    elif is_section:
        for name, item in value.items():
            yield from _settings(schema, join(key, str(name)), item, source)


def _from_text(annotation: Any, raw: str, key: str) -> Any:
    """Parse the right side of ``key=value``; a text or a path is taken literally unless quoted or null."""
    if raw in get_args(annotation) and get_origin(annotation) is Literal:
        return raw
    if schemas.accepts_text(annotation) and raw[:1] not in ("", "'", '"') and raw.lower() not in ("null", "~"):
        return raw
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
        node = yaml.compose(raw, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise MisfitError(key, f"{_reason(error)}; put the value in quotes") from error
    _check_numbers(node, key)
    return parsed["value"]


def _resolve(schema: type, tree: Any, settings: list[_Setting]) -> dict[str, Any]:
    """Return the tree with every ``${...}`` replaced; text from the environment is parsed like an override."""
    values: Any = OmegaConf.to_container(tree, resolve=True)
    for key in [setting.key for setting in settings if "${" in str(setting.value)]:
        *parents, name = key.split(".")
        parent = values
        for part in parents:
            parent = parent.get(part) if isinstance(parent, dict) else None
        if isinstance(parent, dict) and isinstance(parent.get(name), str):
            parent[name] = _from_text(schemas.annotation_of(schema, key), parent[name], key)
    return cast("dict[str, Any]", values)


def _source_of(key: str, settings: list[_Setting]) -> str:
    """Return where ``key``, or the last key inside it, was set; empty for a default."""
    for setting in reversed(settings):
        if key == setting.key or key.startswith((f"{setting.key}.", f"{setting.key}[")):
            return setting.source
    inside = (setting.source for setting in reversed(settings) if not key or setting.key.startswith(f"{key}."))
    return next(inside, "")


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
