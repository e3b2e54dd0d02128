"""The form of JSON that may come from anybody: what its parts have to be is said once, and checked where it is read.

A form is a function that tells whether a value is sound, or an object or a list of forms, whose parts are to fit.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from dist_mnist.utils.errors import short

Check = Callable[[Any], bool]
MOST = sys.float_info.max


def whole(least: int, most: int = 2**62) -> Check:
    """A whole number within limits."""
    return lambda value: type(value) is int and least <= value <= most


def number(value: Any) -> bool:
    """A number; those that are not finite are null in JSON."""
    return type(value) in (int, float) and -MOST <= value <= MOST


def string(value: Any) -> bool:
    """A text that a file can hold: JSON can spell halves of characters, which none can."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def share(value: Any) -> bool:
    """A number from 0 to 1."""
    return number(value) and 0 <= value <= 1


def or_null(form: Any) -> Check:
    """What has a form, or is null or absent."""
    return lambda value: value is None or fits(value, form)


def each(form: Any, least: int = 0) -> Check:
    """A list of parts that all have a form."""
    return lambda value: isinstance(value, list) and len(value) >= least and all(fits(part, form) for part in value)


def fits(value: Any, form: Any) -> bool:
    """Whether a value has a form; names that the form of an object does not have may be there."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(name), part) for name, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and len(value) == len(form) and all(map(fits, value, form))
    return form(value)


def parse(content: str | bytes, form: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in `content`; what the form allows to be absent is there as None.

    Raises:
        ValueError: it is none, has a name twice, which would mean one thing here and another elsewhere, or is not of
            the form; the message says what is amiss.
    """
    try:
        value = json.loads(content, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("it goes too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if unfit := [name for name, part in form.items() if not fits(value.get(name), part)]:
        found = short(json.dumps(value[unfit[0]])) if unfit[0] in value else "absent"
        raise ValueError(f"its {unfit[0]} is {found}")
    return dict.fromkeys(form) | value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found
