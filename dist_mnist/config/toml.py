"""Settings as TOML: `--config FILE` reads them, `--print-config` writes them."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mnist.config.settings import FIELDS, PARTNERS, Config, check_value, unknown, value_type
from dist_mnist.utils.errors import UserError

LONGEST = 1 << 20  # bytes


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, by name (`batch_size` or `batch-size`), each within its own limits.

    Raises:
        UserError: the file cannot be read, or something in it is no setting or out of its limits.
    """
    try:
        with open(path, "rb") as file:  # which may be a pipe
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    if len(text) > LONGEST:
        raise UserError(f"--config {path}: settings are no more than {LONGEST} bytes")
    try:
        content = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: this is not TOML ({error})") from None
    try:
        return dict(_setting(name, value) for name, value in content.items())
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _setting(key: str, value: Any) -> tuple[str, Any]:
    name = key.replace("-", "_")
    if isinstance(value, dict):
        raise UserError(f"[{key}] is a table; settings stand in the file by themselves, such as: lr = 0.05")
    if name not in FIELDS:
        raise UserError(unknown("setting", key, FIELDS, "--print-config shows all"))
    declared = FIELDS[name]
    if isinstance(value, list):
        value = tuple(value)
    elif value_type(declared) is Path and isinstance(value, str):
        value = Path(value)
    check_value(declared, value)
    return name, float(value) if value_type(declared) is float else value


def merge(from_file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file, over which options win, also over one that excludes them (`--steps` over epochs)."""
    excluded = {other for one, other in PARTNERS if one in options and other not in options}
    return {name: value for name, value in from_file.items() if name not in excluded} | dict(options)


def to_toml(config: Config, given: Mapping[str, Any]) -> str:
    """All settings as a file for `--config`: those that were given, then by group; what is not set is left out."""
    usual = Config(optimizer=config.optimizer)  # whose learning rate is resolved as well
    lines = ["# Settings as resolved: options over --config over the recipe over the defaults."]
    group = ""
    for name, declared in FIELDS.items():
        if (value := config.to_json()[name]) is None:
            continue
        if declared.metadata["group"] != group:
            group = declared.metadata["group"]
            lines += ["", f"# {group}"]
        mark = (
            "  # given"
            if name in given
            else ""
            if getattr(config, name) == getattr(usual, name)
            else "  # not the default"
        )
        lines.append(f"{name} = {json.dumps(value)}{mark}")
    return "\n".join(lines)
