"""Null objects, which ranks other than 0 hold in place of a reporter or a saver."""

from typing import Any, TypeVar, cast

T = TypeVar("T")


class _Null:
    """Accept every method call of the given class, and do nothing."""

    def __init__(self, kind: type):
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        getattr(self.kind, name)  # raises AttributeError for a method that the class does not have
        return lambda *args, **kwargs: None


def null(kind: type[T]) -> T:
    """Return a null object for the given class: its methods do nothing."""
    return cast(T, _Null(kind))
