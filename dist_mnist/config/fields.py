"""The declaration of a setting, and the validation that converts a value to its declared type."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from dist_mnist.utils.clock import parse_duration
from dist_mnist.utils.errors import UserError, short, unknown
from dist_mnist.utils.files import path_of

Ints = tuple[int, ...]
Names = tuple[str, ...]
Duration = Annotated[float, "duration"]  # seconds; may be written as 1h30m
SettingValue = bool | int | float | str | Path | Ints | Names  # a choice is a StrEnum, hence a str

IN_WORDS: dict[Any, str] = {
    int: "an integer", float: "a finite number", bool: "true or false", str: "a name", Path: "a path",
    Ints: "a list of integers", Names: "a name or a list of names",
    Duration: "a duration such as 90, 30m or 1h30m",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of one setting. `kind` is the type of its values; an `optional` setting may also be None."""

    name: str
    kind: Any
    optional: bool
    default: SettingValue | None
    group: str
    help: str
    minimum: float
    maximum: float
    changeable: bool

    @property
    def option(self) -> str:
        """The setting's command-line option."""
        return option(self.name)

    @property
    def choices(self) -> tuple[str, ...]:
        """All valid values if the set is fixed, else ()."""
        return tuple(self.kind) if isinstance(self.kind, type) and issubclass(self.kind, StrEnum) else ()

    def coerce(self, value: object) -> SettingValue:
        """Return `value` in the declared type: strings as choices or paths, lists as tuples, integers as floats.

        Raises:
            UserError: `value` has the wrong type, is not one of the choices, or is out of range.
        """
        converted = self._convert(value)
        if converted is None:
            raise UserError(f"{self.option} expects {IN_WORDS.get(self.kind, 'a name')}, got {short(value)}")
        for each in converted if isinstance(converted, tuple) else (converted,):
            if isinstance(each, int | float) and not self.minimum <= each <= self.maximum:
                upper = "" if self.maximum == math.inf else f" and at most {self.maximum:g}"
                raise UserError(f"{self.option} must be at least {self.minimum:g}{upper}, got {short(each)}")
        return converted

    def _convert(self, value: object) -> SettingValue | None:
        """Return `value` in the declared type, or None if its type is wrong."""
        if self.kind == Ints:
            return tuple(value) if isinstance(value, list | tuple) and all(map(_is_int, value)) else None
        if self.kind == Names:
            names = (value,) if isinstance(value, str) else value
            return tuple(names) if isinstance(names, list | tuple) and all(map(_is_str, names)) else None
        if self.kind == Duration and isinstance(value, str):
            return parse_duration(value)
        if self.kind in (float, Duration):
            return float(value) if isinstance(value, int | float) and _is_finite(value) else None
        if self.kind is int:
            return value if _is_int(value) else None  # type: ignore[return-value]
        if self.kind is Path:
            return path_of(value) if isinstance(value, str | Path) else None
        if self.choices and isinstance(value, str):
            if value not in self.choices:
                raise UserError(unknown(f"value of {self.option}:", value, self.choices))
            return self.kind(value)
        return value if isinstance(value, self.kind) else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_finite(value: float) -> bool:
    """Whether `value` is a number within the range of a float, neither infinite nor NaN."""
    return not isinstance(value, bool) and abs(value) <= sys.float_info.max


def setting(
    default: SettingValue | None,
    group: str,
    help: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    changeable: bool = False,
) -> Any:
    """Declare one setting. `changeable`: a run may be resumed with a different value."""
    facts = {"group": group, "help": help, "minimum": minimum, "maximum": maximum, "changeable": changeable}
    return dataclasses.field(default=default, metadata=facts)


def declared(fields: Iterable[dataclasses.Field]) -> dict[str, Setting]:
    """Return the declarations made by `setting`, keyed by name."""
    return {field.name: _declared(field) for field in fields}


def _declared(field: Any) -> Setting:
    optional = isinstance(field.type, types.UnionType)
    kind = typing.get_args(field.type)[0] if optional else field.type  # of `kind | None`
    return Setting(name=field.name, kind=kind, optional=optional, default=field.default, **field.metadata)


def option(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")
