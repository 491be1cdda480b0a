"""Load a recipe: schema defaults <- recipe YAML <- ``key=value`` overrides, as one frozen object.

The only module that knows OmegaConf, which reads the YAML (``1e-4`` is a number, a key given twice
is an error) and resolves ``${other.key}`` and ``${oc.env:NAME}``. What fits where is decided by
:mod:`dinocell.configs.schema`. Everything wrong is a :class:`ConfigError` of one line that names
the file and line, or the override, and the dotted key.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from dinocell.configs import schema as schemas
from dinocell.configs.schema import MisfitError, did_you_mean, join
from dinocell.errors import ConfigError

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One value that a recipe or an override sets, and where it was said."""

    key: str
    value: Any
    source: str


def load_config(schema: type[T], recipe: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Return the frozen configuration that a recipe and overrides describe.

    Parameters
    ----------
    schema
        Frozen, keyword-only dataclass; may hold further ones (sections).
    recipe
        YAML file (UTF-8) with what differs from the defaults; may be empty. None: defaults only.
    overrides
        ``key=value`` with a dotted key and a YAML value (``vit.blocks=[2,5]``), merged after the
        recipe, one by one: the last one wins. For a text or path the value is taken as it stands.

    Raises
    ------
    ConfigError
        Unknown key, wrong type, missing value, impossible combination, unreadable recipe, ...
    """
    settings = list(_recipe_settings(schema, recipe)) if recipe is not None else []
    settings += [setting for text in overrides for setting in _override_settings(schema, text, overrides)]
    tree: Any = OmegaConf.create(schemas.defaults(schema))
    for setting in settings:
        nested = setting.value
        for part in reversed(setting.key.split(".")):
            nested = {part: nested}
        tree = OmegaConf.unsafe_merge(tree, nested)
    values = _resolve(schema, tree, settings)
    absent = schemas.missing_keys(schema, values)
    if absent:
        where = f"{recipe}: " if recipe is not None else ""
        raise ConfigError(
            f"{where}required, but not set: {', '.join(absent)}; set it in the recipe or with {absent[0]}=..."
        )
    try:
        return schemas.fit(schema, values)  # type: ignore[no-any-return]
    except MisfitError as error:
        source = _source_of(error.key, settings)
        raise ConfigError(f"{source}: {error}" if source else str(error)) from error


def text_override(key: str, value: str | Path | Sequence[str | Path]) -> str:
    """Return the override that sets a key to a text or path, or a list of them, whatever characters they hold."""
    texts = [str(item) for item in ([value] if isinstance(value, str | Path) else value)]
    dumped = yaml.safe_dump(_escape(texts), default_flow_style=True, default_style='"', width=float("inf")).strip()
    return f"{key}={dumped[1:-1] if isinstance(value, str | Path) else dumped}"


def find_recipe(command: str, name: str) -> Path:
    """Return the recipe file that ``name`` means: a path to a YAML file, or the name of a shipped recipe.

    Raises
    ------
    ConfigError
        If there is no such file or shipped recipe; the message lists the shipped ones.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~ of a user that there is not
        path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = shipped_recipes(command)
    if name in shipped:
        return _shipped_folder(command) / f"{name}.yaml"
    listed = f"shipped for {command}: {', '.join(shipped) or 'none'}{did_you_mean(path.stem, shipped)}"
    if path.is_dir():
        raise ConfigError(f"recipe '{name}' is a folder, expected a .yaml file; {listed}")
    if path.is_file():
        raise ConfigError(f"recipe '{name}' is not a .yaml file; {listed}")
    raise ConfigError(f"no recipe '{name}': neither a .yaml file nor a shipped recipe; {listed}")


def shipped_recipes(command: str) -> list[str]:
    """Return the sorted names of the recipes that come with DINOCell for ``command``."""
    return sorted(path.stem for path in _shipped_folder(command).glob("*.yaml"))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the plain mapping that a YAML file holds, ``${...}`` left as it stands.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not UTF-8, is not YAML, or holds no mapping.
    """
    return _parse(path, _read(path))


def read_stored(schema: type, path: Path) -> dict[str, Any]:
    """Return the plain configuration that an earlier start stored, as this version would have stored it.

    Renamed keys have their present names, keys that were added since have their defaults.

    Raises
    ------
    ConfigError
        As for `read_mapping`, or if a key is set under its former and its present name.
    """
    try:
        values, _ = schemas.present_keys(schema, read_mapping(path))
    except MisfitError as error:
        raise ConfigError(f"{path}: {error}") from error
    return schemas.with_defaults(schema, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration object as nested plain types: dict, list, str, int, float, bool, None."""
    plain = schemas.to_plain(config)
    assert isinstance(plain, dict), f"expected a configuration object, got {type(config).__name__}"
    return plain


def to_yaml(config: Any) -> str:
    """Return the YAML of a configuration object, every key written out; ``load_config`` reads it back."""
    text: str = OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config))))
    return text


def _shipped_folder(command: str) -> Path:
    return Path(__file__).parent / command


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else f"'{root.value}'"
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected 'key: value' lines, got {kind}")
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if (odd := _odd_number(root)) is not None:
            raise ConfigError(f"{path}:{odd.start_mark.line + 1}: {_odd_problem(odd)}")
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _odd_number(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """Return the first number that YAML 1.1 reads as few people mean it: 010 is 8 (octal), 1:30 is 90 (base 60)."""
    if isinstance(node, yaml.ScalarNode):
        is_number = node.style is None and node.tag.endswith((":int", ":float"))
        return node if is_number and re.fullmatch(r"[-+]?0[0-7_]+|[^:]+:.*", node.value) else None
    items: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        items = [item for pair in node.value for item in pair]
    elif isinstance(node, yaml.SequenceNode):
        items = node.value
    return next((odd for item in items if (odd := _odd_number(item)) is not None), None)


def _odd_problem(node: yaml.ScalarNode) -> str:
    meant = yaml.safe_load(node.value)
    return f"{node.value} is {meant} to YAML; write {meant}, or '{node.value}' in quotes for a text"


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f":{mark.line + 1}: column {mark.column + 1}: not valid YAML: {error.problem or error.context}"
    return f": not valid YAML: {' '.join(str(error).split())}"


def _first_line(error: OmegaConfBaseException) -> str:
    return f"{error.full_key}: {_problem(error)}" if error.full_key else _problem(error)


def _problem(error: OmegaConfBaseException) -> str:
    """Return OmegaConf's complaint about a ``${...}`` in one line."""
    line = str(error).splitlines()[0]
    if isinstance(error, GrammarParseError):
        return f"the ${{...}} in it cannot be read ({line})"
    _, raised, reason = line.partition(" raised while resolving interpolation: ")
    return reason.strip('"') if raised else line


def _recipe_settings(schema: type, recipe: Path) -> Iterator[Setting]:
    text = _read(recipe)
    values = _parse(recipe, text)
    lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader), ""))
    try:
        values, former = schemas.present_keys(schema, values)
    except MisfitError as error:
        raise ConfigError(f"{recipe}: {error}") from error
    for note in schemas.notes(former):
        _log.warning("%s: %s", recipe, note)

    def source(key: str) -> str:
        for new, old in reversed(former.items()):
            if f"{key}.".startswith(f"{new}."):
                key = old + key[len(new) :]
        return f"{recipe}:{lines[key]}" if key in lines else str(recipe)

    yield from _settings(schema, "", values, source)


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = join(prefix, str(name.value))
            yield key, name.start_mark.line + 1
            yield from _lines(value, key)


def _override_settings(schema: type, text: str, overrides: Sequence[str]) -> list[Setting]:
    source = f"override '{text}'"
    try:
        text.encode()
    except UnicodeEncodeError:  # a name on the disk in another encoding; config.yaml could not hold it
        shown = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise ConfigError(f"override '{shown}': expected UTF-8 text; rename the file or folder") from None
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals:
        known = list(schemas.all_keys(schema))
        hint = f"; did you mean '{key}=...'?" if key in known else did_you_mean(key, known, suffix="=...")
        raise ConfigError(f"{source}: expected key=value{hint}")
    if not all(key.split(".")):
        raise ConfigError(f"{source}: expected key=value, got the empty key '{key}'")
    key = _present_key(schema, key, source, overrides)
    annotation = _annotation_of(schema, key, source)
    if not raw.strip():  # a shell variable that is not set: no weights, where there were to be some
        raise ConfigError(f"{source}: expected a value behind the '='; for none write {key}=null")
    value = _from_text(annotation, raw.strip(), source)
    return list(_settings(schema, key, value, lambda _: source))


def _present_key(schema: type, key: str, source: str, overrides: Sequence[str]) -> str:
    """Return the present name of a dotted key that may be a former one."""
    nested: Any = _UNREAD
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        nested, former = schemas.present_keys(schema, nested)
    except MisfitError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not former:
        return key
    parts = []
    while isinstance(nested, dict):
        ((part, nested),) = nested.items()
        parts.append(part)
    present = ".".join(parts)
    if present in (text.partition("=")[0].strip() for text in overrides):
        raise ConfigError(f"{source}: {present} is set twice, also under its former name")
    _log.warning("%s: %s", source, ", ".join(schemas.notes(former)))
    return present


_UNREAD = object()


def _settings(schema: type, key: str, value: Any, source: Callable[[str], str]) -> Iterator[Setting]:
    """Split ``value`` into one setting a key of the schema, each checked on its own."""
    annotation = _annotation_of(schema, key, source(key)) if key else schema
    if schemas.section(annotation) is not None and isinstance(value, Mapping):
        if key and not value:
            yield Setting(key, value, source(key))
        for name, item in value.items():
            yield from _settings(schema, join(key, str(name)), item, source)
        return
    if value != schemas.MISSING and "${" not in str(value):
        try:
            schemas.fit(annotation, value, key)
        except MisfitError as error:
            raise ConfigError(f"{source(key)}: {error}") from error
    yield Setting(key, value, source(key))


def _annotation_of(schema: type, key: str, source: str) -> Any:
    try:
        return schemas.annotation_of(schema, key)
    except MisfitError as error:
        raise ConfigError(f"{source}: {error}") from error


def _from_text(annotation: Any, raw: str, source: str) -> Any:
    """Read the right side of ``key=value``; a text or a path is taken literally unless quoted or null."""
    if raw in get_args(annotation) and get_origin(annotation) is Literal:
        return raw
    if schemas.accepts_text(annotation) and raw[:1] not in ("", "'", '"') and raw.lower() not in ("null", "~"):
        return raw
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
        if (odd := _odd_number(yaml.compose(raw, Loader=yaml.SafeLoader))) is not None:
            raise ConfigError(f"{source}: {_odd_problem(odd)}")
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{source}: the value is not valid YAML ({problem}); put it in quotes") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_problem(error)}") from error
    return parsed["value"]


def _resolve(schema: type, tree: Any, settings: list[Setting]) -> dict[str, Any]:
    """Return the tree with every ``${...}`` replaced; text from the environment is read like an override."""
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_source_of(error.full_key or '', settings)}: {_first_line(error)}") from error
    except RecursionError:
        raise ConfigError("a value refers to itself through ${...}; break the circle") from None
    assert isinstance(values, dict)
    for setting in settings:
        if isinstance(setting.value, str) and "${" in setting.value:
            *parents, name = setting.key.split(".")
            parent: Any = values
            for part in parents:
                parent = parent[part] if isinstance(parent, dict) else None
            annotation = _annotation_of(schema, setting.key, setting.source)
            if isinstance(parent, dict) and isinstance(parent.get(name), str):
                parent[name] = _from_text(annotation, parent[name], setting.source)
    return {str(name): value for name, value in values.items()}


def _source_of(key: str, settings: list[Setting]) -> str:
    """Return where ``key``, or last something inside it, was set; empty if it is a default."""
    for setting in reversed(settings):
        if key == setting.key or key.startswith((f"{setting.key}.", f"{setting.key}[")):
            return setting.source
    inside = [setting.source for setting in settings if not key or setting.key.startswith(f"{key}.")]
    return inside[-1] if inside else ""


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
