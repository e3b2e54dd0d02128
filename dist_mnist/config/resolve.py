"""Settings resolved: what was given, over a recipe or over the run that is resumed, over the defaults."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dist_mnist.config.choices import Precision
from dist_mnist.config.fields import SettingValue, option
from dist_mnist.config.overrides import Overrides
from dist_mnist.config.recipes import RECIPES, named_recipe
from dist_mnist.config.settings import FIELDS, OF_CNN, REMOVED, Config
from dist_mnist.utils.errors import UserError, short

OF_A_START = ("log_to",)  # which may name code of the user's own, that no run brings along


def resolve(given: Mapping[str, object], started: Config | None = None) -> Config:
    """Settings from those given (by name, None for not given) over their recipe, or over those a run started with.

    Raises:
        UserError: a name is no setting, or a value is out of its limits, or would change what that run computes.
    """
    given = Overrides(given)
    if started is None or "recipe" in given:
        base = named_recipe(str(given.get("recipe", "default"))).settings
    else:
        base = {name: getattr(started, name) for name in FIELDS if name not in OF_A_START}
    config = _config({**base, **dict.fromkeys(given.replaces()), **given})
    if config.model != "cnn" and (without_effect := [name for name in OF_CNN if name in given]):
        raise UserError(
            f"{option(without_effect[0])} is of --model cnn: give what --model {config.model} takes as --model-args"
        )
    if started is None:
        return config
    if config.precision is Precision.AUTO:
        config = dataclasses.replace(config, precision=started.precision)
    check_same(started, config, config.run_dir)
    return config


def check_same(started: Config, config: Config, run_dir: Path | None) -> None:
    """Raise a UserError that shows the differences if `config` cannot resume a run that `started` otherwise."""
    if differences := started.differences(config):
        raise UserError(
            f"the run in {run_dir} was started with other settings ({'; '.join(differences)}): "
            "leave these options out to resume it, or give another --run-dir"
        )


def as_given(settings: Mapping[str, object]) -> dict[str, SettingValue]:
    """What has to be given for the same run again: recipe and what differs; `settings` are as in its config.json.

    Where it ran and which precision suited the machine is left out. Values are as they stand there, whatever they are:
    one that no run has is refused where it is given.
    """
    known = {"recipe": settings["recipe"] if settings["recipe"] in RECIPES else "default"}
    base = resolve(known).to_json()
    base["lr"] = resolve({**known, "optimizer": settings["optimizer"]}).lr  # depends on it, if not given
    return {"recipe": str(settings["recipe"])} | {
        name: cast(SettingValue, tuple(value) if isinstance(value, list) else value)
        for name, value in settings.items()
        if name in FIELDS and value is not None and value != base[name] and name not in ("run_dir", "precision")
    }


def from_json(values: Mapping[str, object], where: object) -> Config:
    """The settings that `to_json` wrote, in this version or an earlier one.

    Raises:
        UserError: a setting is unknown or out of its limits; `where` says in which file.
    """
    try:
        values = without_removed(values)
        if strange := sorted(set(values) - set(FIELDS)):
            raise UserError(f"unknown setting {short(', '.join(strange))}; it was written by another version")
        return _config(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def without_removed(values: Mapping[str, object]) -> dict[str, object]:
    """Settings of a file, without those of earlier versions, which must be turned off.

    Raises:
        UserError: one of these is in use.
    """
    for name, neutral in REMOVED.items():
        if values.get(name, neutral) != neutral:
            raise UserError(
                f"{name} is {short(values[name])}: made with {option(name)}, which this version no longer has; use an "
                "earlier version of this program, or start a run without it"
            )
    return {name: value for name, value in values.items() if name not in REMOVED}


def _config(values: Mapping[str, object]) -> Config:
    return Config(**values)  # type: ignore[arg-type]  # it checks them itself
