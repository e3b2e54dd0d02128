"""JSON from anybody: what is parsed has its type, and all else is refused in a sentence."""

import pytest
from msgspec import Struct

from dist_mnist.utils.schema import Count, Fraction, Int64, parse


class Sample(Struct, frozen=True, kw_only=True):
    count: Count = 0
    whole: Int64 = 0
    part: Fraction | None = None
    number: float = 0.0
    text: str = ""
    pair: tuple[int, int] = (0, 0)


def test_parse_values_within_limits_have_their_types():
    content = b'{"count": 4611686018427387904, "whole": -9223372036854775808, "part": 1, "number": 3, "pair": [1, 2]}'
    found = parse(content, Sample)
    assert found == Sample(count=2**62, whole=-(2**63), part=1.0, number=3.0, pair=(1, 2))
    assert type(found.number) is float and type(found.part) is float


def test_parse_unknown_key_is_left_out():
    assert parse('{"count": 3, "later": {"deep": [1]}}', Sample) == Sample(count=3)


@pytest.mark.parametrize(("content", "sentence"), [
    ('{"count": 1, "count": 2}', "it has a duplicate key"),
    ('{"later": {"a": 1, "a": 2}}', "it has a duplicate key"),
    ('{"later": NaN}', "not finite"), ('{"number": -Infinity}', "not finite"), ('{"later": [1e999]}', "not finite"),
    (f'{{"number": 1{"0" * 400}}}', "out of range"),
    (f'{{"later": 1{"0" * 10_000}}}', "Exceeds the limit"),
    ('{"count": -1}', r">= 0.*\.count"), ('{"count": 4611686018427387905}', "<= 4611686018427387904"),
    ('{"whole": 9223372036854775808}', "<= 9223372036854775807"),
    ('{"count": true}', "got `bool`"), ('{"count": 1.0}', "got `float`"), ('{"count": "1"}', "got `str`"),
    ('{"count": null}', "got `null`"), ('{"number": true}', "got `bool`"), ('{"number": "1"}', "got `str`"),
    ('{"part": 1.0000001}', "<= 1.0"), ('{"pair": [1, 2, 3]}', "length 2, got 3"), ('{"text": 5}', "got `int`"),
    (r'{"text": "\ud800"}', "half of a character"), (r'{"later": ["\udc00"]}', "half of a character"),
    (r'{"\ud800": 1}', "half of a character"),
    ("[" * 100_000, "nested too deeply"), ('{"later":' * 100_000, "nested too deeply"),
    ("[1]", "Expected `object`, got `array`"), ("null", "got `null`"), ("", "Expecting value"), ("{", "Expecting"),
    (b"\xff{}", "codec"),
])  # fmt: skip
def test_parse_what_does_not_fit_is_refused(content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        parse(content, Sample)
    assert len(str(caught.value)) < 500
