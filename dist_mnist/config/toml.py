"""Settings as TOML: `--config FILE` reads them, `--print-config` writes them."""

import json
import tomllib
from collections.abc import Collection
from pathlib import Path

from dist_mnist.config.overrides import Overrides
from dist_mnist.config.resolve import without_removed
from dist_mnist.config.settings import FIELDS, Config
from dist_mnist.utils.errors import UserError

LONGEST = 1 << 20  # bytes


def read_settings(path: Path) -> Overrides:
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
        if tables := [key for key, value in content.items() if isinstance(value, dict)]:
            raise UserError(f"[{tables[0]}] is a table; settings stand in the file by themselves, such as: lr = 0.05")
        return Overrides(without_removed({key.replace("-", "_"): value for key, value in content.items()}))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


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
