"""Null objects: what other ranks than rank 0 hold in place of a reporter or a saver."""

from typing import Any, TypeVar, cast

T = TypeVar("T")


class _Null:
    """Takes every call that an object of the given class takes, and does nothing."""

    def __init__(self, kind: type):
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        getattr(self.kind, name)  # raises AttributeError for a method that the class does not have
        return lambda *args, **kwargs: None


def null(kind: type[T]) -> T:
    """Something that stands for an object of the given class and does nothing."""
    return cast(T, _Null(kind))
