"""Settings given by the user: by options, a TOML file or a caller. They are validated once, on entry."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_mnist.config.fields import Names, SettingValue, option
from dist_mnist.config.settings import FIELDS, PARTNERS
from dist_mnist.utils.errors import UserError, unknown


class Overrides(Mapping[str, SettingValue]):
    """The settings that were given, keyed by name, each in its declared type. None means not given. Immutable.

    Raises:
        UserError: on construction, if a setting is unknown or a value is invalid.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, object] | None = None):
        self._values: dict[str, SettingValue] = {}
        for name, value in (values or {}).items():
            if name not in FIELDS:
                raise UserError(unknown("setting", name, FIELDS, "--print-config shows all"))
            if value is not None:
                self._values[name] = FIELDS[name].coerce(value)

    def __getitem__(self, name: str) -> SettingValue:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Overrides({self._values!r})"

    @property
    def run_dir(self) -> Path | None:
        """The run directory if given, else None."""
        path = self.get("run_dir")
        return path if isinstance(path, Path) else None

    def replaces(self) -> set[str]:
        """Return the settings that are replaced by a given one, such as epochs by `steps`."""
        return {other for one, other in PARTNERS if one in self and other not in self}

    def over(self, others: Mapping[str, object]) -> "Overrides":
        """Return these settings merged over `others`, without those that a given one replaces."""
        replaced = self.replaces()
        return Overrides({name: value for name, value in others.items() if name not in replaced} | dict(self))


def as_options(given: Mapping[str, SettingValue]) -> list[str]:
    """Return settings as command-line options."""
    return [word for name, value in given.items() for word in _as_options(name, value)]


def _as_options(name: str, value: SettingValue) -> list[str]:
    if isinstance(value, bool):
        return [option(name if value else "no_" + name)]
    if isinstance(value, tuple) and FIELDS[name].kind == Names:
        return [f"{option(name)}={one}" for one in value]
    return [f"{option(name)}={','.join(map(str, value)) if isinstance(value, tuple) else value}"]
