"""TOML files of settings: `--config FILE` reads one, `--print-config` writes one."""

import json
import os
import tomllib
from collections.abc import Collection
from pathlib import Path

from dist_mnist.config.overrides import Overrides
from dist_mnist.config.resolve import without_removed
from dist_mnist.config.settings import FIELDS, Config
from dist_mnist.utils.errors import UserError, short

LONGEST = 1 << 20  # bytes


def read_settings(path: Path) -> Overrides:
    """Read the settings in a TOML file, keyed by name (`batch_size` or `batch-size`).

    In paths, `~` and `~user` are expanded to home folders, as in a shell.

    Raises:
        UserError: the file cannot be read, a setting is unknown or out of range, or a `~user` does not exist.
    """
    try:
        with open(path, "rb") as file:  # it may be a pipe
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    if len(text) > LONGEST:
        raise UserError(f"--config {path}: a settings file has at most {LONGEST} bytes")
    try:
        content = tomllib.loads(text.decode("utf-8-sig"))  # editors on Windows may add a byte order mark
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: the file is not valid TOML ({error})") from None
    try:
        if tables := [key for key, value in content.items() if isinstance(value, dict)]:
            raise UserError(f"[{tables[0]}] is a table; write settings as top-level keys, such as: lr = 0.05")
        values = {key.replace("-", "_"): value for key, value in content.items()}
        return Overrides(without_removed({name: _at_home(name, value) for name, value in values.items()}))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _at_home(name: str, value: object) -> object:
    """Return a setting's value with a leading `~` or `~user` expanded to the home folder."""
    if isinstance(value, list):
        return [_at_home(name, one) for one in value]
    names_path = name in ("model", "log_to") or (name in FIELDS and FIELDS[name].kind is Path)
    if not (names_path and isinstance(value, str) and value.startswith("~")):
        return value
    if (expanded := os.path.expanduser(value)) != value:
        return expanded
    user = value.partition("/")[0][1:]
    why = f"there is no user {user!r}" if user else "HOME is not set and this user id has no name"
    raise UserError(f"{name} = {short(repr(value))}: {why} on this machine; write the path in full")


def to_toml(config: Config, given: Collection[str]) -> str:
    """Return all settings as a file for `--config`, by group; those `given` are marked, unset ones omitted."""
    usual = Config(optimizer=config.optimizer)  # the default learning rate depends on the optimizer
    lines = ["# Resolved settings. Options override --config, --config the recipe, the recipe the defaults."]
    group = ""
    for name, value in config.to_json().items():
        if value is None:
            continue
        if FIELDS[name].group != group:
            group = FIELDS[name].group
            lines += ["", f"# {group}"]
        changed = "" if getattr(config, name) == getattr(usual, name) else "  # not the default"
        lines.append(f"{name} = {json.dumps(value)}{'  # given' if name in given else changed}")
    return "\n".join(lines)
