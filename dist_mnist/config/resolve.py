"""Precedence of settings: given values override the recipe or the resumed run, which override the defaults."""

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

OF_A_START = ("log_to",)  # not restored from a run: it may name user code, which a run must not bring along


def resolve(given: Mapping[str, object], started: Config | None = None) -> Config:
    """Return the given settings (None: not given) merged over their recipe, or over the settings of a `started` run.

    Raises:
        UserError: a setting is unknown, its value is out of range, or it would change what that run computes.
    """
    given = Overrides(given)
    if started is None or "recipe" in given:
        base = named_recipe(str(given.get("recipe", "default"))).settings
    else:
        base = {name: getattr(started, name) for name in FIELDS if name not in OF_A_START}
    config = _config({**base, **dict.fromkeys(given.replaces()), **given})
    if config.model != "cnn" and (without_effect := [name for name in OF_CNN if name in given]):
        raise UserError(
            f"{option(without_effect[0])} applies to --model cnn only: pass arguments of --model {config.model} by "
            "--model-args"
        )
    if started is None:
        return config
    if config.precision is Precision.AUTO:
        config = dataclasses.replace(config, precision=started.precision)
    check_same(started, config, config.run_dir)
    return config


def check_same(started: Config, config: Config, run_dir: Path | None) -> None:
    """Raise a UserError that lists the differences if `config` cannot resume a run `started` with other settings."""
    if differences := started.differences(config):
        raise UserError(
            f"the run in {run_dir} was started with other settings ({'; '.join(differences)}): omit "
            f"these options to resume it, or give another --run-dir (and --init {run_dir} to start from its weights)"
        )


def as_given(settings: Mapping[str, object]) -> dict[str, SettingValue]:
    """Return what to give to repeat a run: its recipe and all differences from it; `settings` is its config.json.

    The run directory and the precision, which depends on the hardware, are omitted. Values are not validated here:
    `Overrides` rejects invalid ones.
    """
    known = {"recipe": settings["recipe"] if settings["recipe"] in RECIPES else "default"}
    base = resolve(known).to_json()
    base["lr"] = resolve({**known, "optimizer": settings["optimizer"]}).lr  # its default depends on the optimizer
    return {"recipe": str(settings["recipe"])} | {
        name: cast(SettingValue, tuple(value) if isinstance(value, list) else value)
        for name, value in settings.items()
        if name in FIELDS and value is not None and value != base[name] and name not in ("run_dir", "precision")
    }


def from_json(values: Mapping[str, object], where: object) -> Config:
    """Return the settings that `to_json` wrote, in this version or an earlier one.

    Raises:
        UserError: a setting is unknown or out of range; `where` names the file.
    """
    try:
        values = without_removed(values)
        if strange := sorted(set(values) - set(FIELDS)):
            raise UserError(f"unknown setting {short(', '.join(strange))}: the file is from another version")
        return _config(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def without_removed(values: Mapping[str, object]) -> dict[str, object]:
    """Return a file's settings without those that only earlier versions have; these must be turned off.

    Raises:
        UserError: a removed setting is in use.
    """
    for name, neutral in REMOVED.items():
        if values.get(name, neutral) != neutral:
            raise UserError(
                f"{name} is {short(values[name])}, but this version no longer has {option(name)}: use an earlier "
                "version, or start a run without it"
            )
    return {name: value for name, value in values.items() if name not in REMOVED}


def _config(values: Mapping[str, object]) -> Config:
    return Config(**values)  # type: ignore[arg-type]  # Config validates its values
