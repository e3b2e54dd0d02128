"""Untrusted JSON, validated against a schema (a `msgspec` type) once, where it is read."""

import json
import math
from typing import Annotated, TypeVar

import msgspec

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


def parse(content: str | bytes, kind: type[T]) -> T:
    """Return the JSON in `content` as a value of type `kind`; keys that a struct does not declare are ignored.

    Raises:
        ValueError: it is not JSON, has a duplicate key (which parsers read differently), a number that is not finite
            or a lone surrogate, or does not match `kind`; the message names the fault.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it has a string with a lone surrogate (half of a character)") from None
    return msgspec.convert(value, kind)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a duplicate key")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number that is not finite")
    return value
