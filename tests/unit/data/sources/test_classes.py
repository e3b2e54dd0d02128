"""Class names in classes.json: what is written is read again, and what is malformed is a sentence."""

import json
import os

import pytest

from dist_mnist.data.sources.classes import FILE_NAME, read_class_names, write_class_names
from dist_mnist.utils.errors import UserError

NAMES = ("T-shirt/top", "קטן", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "猫", "10", "[bold]&<b>")
MALFORMED = {
    "nothing": (b"", "not a JSON list of strings"),
    "not JSON": (b"cat, dog", "not a JSON list of strings"),
    "not UTF-8": (b'["caf\xe9"]', "not a JSON list of strings"),
    "half a character": (rb'["a", "\ud800"]', "lone surrogate"),
    "an object": (b'{"0": "cat"}', "not a JSON list of strings"),
    "numbers": (b"[0, 1]", "not a JSON list of strings"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "no name": (b"[]", "expected 1 to 65536 class names, got 0"),
    "too many": (json.dumps(list(map(str, range(2**16 + 1)))).encode(), "expected 1 to 65536 class names, got 65537"),
    "10 MB": (b'["' + b"x" * 10_000_000 + b'"]', "exceeds 4 MiB"),
    "an empty name": (b'["cat", "  "]', "the name of class 1 is empty"),
    "a duplicate": (b'["cat", "dog", "cat"]', "classes 0 and 2 are both named 'cat'"),
    "an escape sequence": (rb'["cat", "\u001b[2J"]', "class 1.*has unprintable characters"),
    "a line break": (rb'["cat\ndog", "b"]', "class 0.*has unprintable characters"),
    "an override of the direction": (rb'["cat", "\u202egod"]', "class 1.*has unprintable characters"),
}


def test_read_class_names_gives_what_was_written_one_name_a_line(tmp_path):
    assert read_class_names(tmp_path) is None
    write_class_names(tmp_path, NAMES)
    assert read_class_names(tmp_path) == NAMES
    assert (tmp_path / FILE_NAME).read_text("utf-8") == json.dumps(list(NAMES), ensure_ascii=False, indent=1)
    assert len((tmp_path / FILE_NAME).read_text("utf-8").splitlines()) == len(NAMES) + 2


@pytest.mark.parametrize(("content", "message"), [pytest.param(*case, id=name) for name, case in MALFORMED.items()])
def test_read_class_names_malformed_file_is_a_sentence(tmp_path, content, message):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_class_names(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / FILE_NAME)) and len(str(caught.value)) < 600


def test_read_class_names_link_is_followed_and_what_is_no_file_is_named(tmp_path):
    path = tmp_path / FILE_NAME
    write_class_names(tmp_path, NAMES)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to("elsewhere.json")
    assert read_class_names(tmp_path) == NAMES
    for target in ("absent.json", FILE_NAME, ".", "/dev/zero"):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(UserError, match=f"{path}.*link to {target}|{path}: cannot be read"):
            read_class_names(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path} is not a file"):
        read_class_names(tmp_path)


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", ""), ("a", "b\x07"), ("x" * (1 << 22),)], ids=range(5))
def test_write_class_names_that_could_not_be_read_again_are_refused(tmp_path, names):
    with pytest.raises(UserError, match=str(tmp_path / FILE_NAME)):
        write_class_names(tmp_path, names)
    assert not list(tmp_path.iterdir())
