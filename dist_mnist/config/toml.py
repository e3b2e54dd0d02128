"""Settings as TOML: `--config FILE` reads them, `--print-config` writes them."""

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
    """The settings in a TOML file, by name (`batch_size` or `batch-size`), each within its own limits.

    In paths, `~` and `~user` stand for home folders, as in a shell.

    Raises:
        UserError: the file cannot be read, or something in it is no setting or out of its limits, or nobody's home.
    """
    try:
        with open(path, "rb") as file:  # which may be a pipe
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    if len(text) > LONGEST:
        raise UserError(f"--config {path}: settings are no more than {LONGEST} bytes")
    try:
        content = tomllib.loads(text.decode("utf-8-sig"))  # editors on Windows begin a file with a byte order mark
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: this is not TOML ({error})") from None
    try:
        if tables := [key for key, value in content.items() if isinstance(value, dict)]:
            raise UserError(f"[{tables[0]}] is a table; settings stand in the file by themselves, such as: lr = 0.05")
        values = {key.replace("-", "_"): value for key, value in content.items()}
        return Overrides(without_removed({name: _at_home(name, value) for name, value in values.items()}))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _at_home(name: str, value: object) -> object:
    """The value of a setting of that name, with the path of the home folder for `~` or `~user` at its beginning."""
    if isinstance(value, list):
        return [_at_home(name, one) for one in value]
    names_path = name in ("model", "log_to") or (name in FIELDS and FIELDS[name].kind is Path)
    if not (names_path and isinstance(value, str) and value.startswith("~")):
        return value
    if (expanded := os.path.expanduser(value)) != value:
        return expanded
    user = value.partition("/")[0][1:]
    why = f"there is no user {user!r}" if user else "HOME is not set, and this user id has no name"
    raise UserError(f"{name} = {short(repr(value))}: {why} on this machine, so write the folder out")


def to_toml(config: Config, given: Collection[str]) -> str:
    """All settings as a file for `--config`, by group, with a mark at those `given`; what is not set is left out."""
    usual = Config(optimizer=config.optimizer)  # whose learning rate is resolved as well
    lines = ["# Settings as resolved: options over --config over the recipe over the defaults."]
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
