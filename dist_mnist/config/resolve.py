"""Settings resolved: what was given, over a recipe or over the run that is continued, over the defaults."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.settings import FIELDS, PARTNERS, Config, unknown, value_type
from dist_mnist.utils.errors import UserError, short


def resolve(given: Mapping[str, Any], started: Config | None = None) -> Config:
    """Settings from those given (by name, None for not given) over their recipe, or over those a run started with.

    Raises:
        UserError: a value is out of its limits, or would change what the run that started computes.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("recipe", "default") not in RECIPES:
        raise UserError(unknown("recipe", given["recipe"], RECIPES))
    if started is None or "recipe" in given:
        base = RECIPES[given.get("recipe", "default")]
    else:
        base = {name: getattr(started, name) for name in FIELDS}
    base = dict(base)
    for one, other in PARTNERS:
        if one in given and other not in given:
            base[other] = None
    config = Config(**(base | given))
    if started is not None and config.precision == "auto":
        config = dataclasses.replace(config, precision=started.precision)
    if started is not None:
        check_same(started, config, config.run_dir)
    return config


def check_same(started: Config, config: Config, run_dir: Path | None) -> None:
    """Raise a UserError that shows the differences if `config` cannot go on with a run that `started` otherwise."""
    if differences := started.differences(config):
        raise UserError(
            f"the run in {run_dir} was started with other settings ({'; '.join(differences)}): "
            "leave these options out to continue it, or give another --run-dir"
        )


def from_json(values: Mapping[str, Any], where: object) -> Config:
    """The settings that `to_json` wrote.

    Raises:
        UserError: a setting is unknown or out of its limits; `where` says in which file.
    """
    if strange := sorted(set(values) - set(FIELDS)):
        raise UserError(f"{where}: unknown setting {short(', '.join(strange))}; it was written by another version")
    try:
        return Config(**{name: _from_json(FIELDS[name], value) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _from_json(declared: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, str) and value_type(declared) is Path:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
