"""Whose a run folder is: what is run there and from where; a run with other settings does not get in.

::

    config.yaml        the resolved configuration, every key written out
    environment.json   {"starts": [...]}: version, commit, packages, command line, machine of each start
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dinocell.configs.differences import diff_configs
from dinocell.configs.load import read_mapping, to_dict, to_yaml
from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.atomic import write_atomically
from dinocell.runtime.environment import environment


def claim(folder: Path, config: object, ignore: Collection[str]) -> None:
    """Make a run folder, or check that it is of the same configuration; write what is run and where.

    Parameters
    ----------
    ignore
        Dotted keys or sections of the configuration that may differ.

    Raises
    ------
    ConfigError
        If it holds a run with another configuration.
    DinocellError
        If it is a file, or its ``environment.json`` is not one.
    OSError
        If it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise DinocellError(f"run folder {folder}: is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_same(folder, config, ignore)
    write_atomically(folder / "config.yaml", to_yaml(config))
    environment_file = folder / "environment.json"
    starts: list[Any] = []
    if environment_file.exists():
        try:
            starts = json.loads(environment_file.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError) as error:
            raise DinocellError(f'{environment_file}: expected {{"starts": [...]}}; move it away') from error
    write_atomically(environment_file, json.dumps({"starts": [*starts, environment()]}, indent=2) + "\n")


def check_same(folder: Path, config: object, ignore: Collection[str]) -> None:
    """Refuse a folder that holds a run with another configuration.

    Raises
    ------
    ConfigError
        If it does; it names what differs.
    """
    config_file = folder / "config.yaml"
    if config_file.exists():
        differing = diff_configs(read_mapping(config_file), to_dict(config), ignore)
        if differing:
            raise ConfigError(
                f"run folder {folder} holds a run with other settings ({'; '.join(differing)}); "
                "use another output folder, or the same settings"
            )
