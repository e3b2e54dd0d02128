"""Parser for `NAME=VALUE` arguments: values of a grid, or intervals and choices of a search."""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from dist_mnist.config.overrides import as_options
from dist_mnist.config.settings import FIELDS, PARTNERS
from dist_mnist.utils.errors import UserError, unknown

NOT_SWEPT = ("run_dir", "dry_run", "config", "print_config", "help")  # options that are not settings of a run
DISTRIBUTION = re.compile(r"(uniform|loguniform|int):(.*)", re.DOTALL)
BRACES = re.compile(r".*\{.*,.*\}.*", re.DOTALL)  # as a shell expands them


@dataclass(frozen=True)
class Interval:
    """An interval from `low` to `high`, both included, to be sampled uniformly, or uniformly in the logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False  # integers only


Choices = tuple[str, ...]
Space = Mapping[str, Interval | Choices]  # search space, by setting


def named_values(words: Iterable[str]) -> dict[str, list[str]]:
    """Return the values of each name, in the order of the names' first occurrence.

    Raises:
        UserError: a word is not of the form `NAME=VALUE`, has braces that no shell has expanded, or there is none.
    """
    values: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not name.isidentifier():
            raise UserError(f"expected NAME=VALUE, such as lr=0.05, got {word}")
        if name in NOT_SWEPT:
            raise UserError(f"{word}: {name} cannot be searched or swept: each run has its own folder")
        if BRACES.fullmatch(value):
            raise UserError(f"{word}: bash expands these braces unless they are quoted; or give {name}= for each value")
        values.setdefault(name, []).append(value)
    if not values:
        raise UserError("no settings to combine, such as seed={0,1,2}")
    return values


def is_distribution(value: str) -> bool:
    """Whether a value is an interval to search, such as `loguniform:0.01:0.5`."""
    return DISTRIBUTION.fullmatch(value) is not None


def search_space(words: Iterable[str]) -> Space:
    """Return the search space: `uniform:LOW:HIGH`, `loguniform:LOW:HIGH`, `int:LOW:HIGH`, or the values of a name.

    A name with a single value has one choice.

    Raises:
        UserError: an interval is malformed, does not fit its setting, or is combined with other values.
    """
    space = {name: _possible(name, values) for name, values in named_values(words).items()}
    if all(_size(possible) == 1 for possible in space.values()):
        raise UserError(
            "there is nothing to search: give an interval, such as lr=loguniform:0.01:0.5, or several values"
        )
    return space


def size(space: Space) -> float:
    """Return the number of points in the space; infinite if it has an interval of real numbers."""
    return math.prod(_size(possible) for possible in space.values())


def options(values: Mapping[str, str]) -> list[str]:
    """Return values of settings, as given in arguments, as training options."""
    return as_options({name: {"true": True, "false": False}.get(value, value) for name, value in values.items()})


def with_partners(names: Iterable[str]) -> set[str]:
    """Return the names plus those of the settings that they replace, such as epochs by steps."""
    names = set(names)
    return names | {other for name, other in PARTNERS if name in names}


def _size(possible: Interval | Choices) -> float:
    if isinstance(possible, Interval):
        return possible.high - possible.low + 1 if possible.whole else math.inf
    return len(possible)


def _possible(name: str, values: list[str]) -> Interval | Choices:
    distributions = list(filter(is_distribution, values))
    if not distributions:
        if len(set(map(partial(_value, name), values))) < len(values):
            raise UserError(f"{name} has a value twice ({', '.join(values)}): give each once")
        return tuple(values)
    if len(values) > 1:
        raise UserError(f"{name} has the interval {distributions[0]} and other values: give one or the other")
    if name not in FIELDS:
        raise UserError(unknown("setting", name, FIELDS, "train --help shows all"))
    return _interval(name, distributions[0])


def _value(name: str, text: str) -> str | float:
    """What a setting's value is known by: 0.1 and 1e-1 are the same number."""
    if name in FIELDS and FIELDS[name].kind in (int, float):
        with suppress(ValueError):
            return float(text)
    return text


def _interval(name: str, text: str) -> Interval:
    kind, _, numbers = text.partition(":")
    whole, word = kind == "int", f"{name}={text}"
    try:
        low, high = map(int if whole else float, numbers.split(":"))
    except ValueError:
        what = "whole numbers" if whole else "numbers"
        raise UserError(f"{word}: expected two {what}, the lowest and the highest, as {kind}:LOW:HIGH") from None
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{word}: expected two finite numbers, the first of which is the lower one")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{word}: logarithms need numbers above 0; give uniform:{numbers}, or a higher first number")
    setting = FIELDS[name]
    if not whole and setting.kind is int:
        raise UserError(f"{word}: {setting.option} expects integers; give int:LOW:HIGH")
    for number in (low, high):
        setting.coerce(number)  # raises if it is outside the setting's limits
    return Interval(low, high, log=kind == "loguniform", whole=whole)
