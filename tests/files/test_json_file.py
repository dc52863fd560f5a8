"""JSON and YAML files that are none, or made to take all memory and time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ted.files.json_file import MAX_JSON_BYTES, parse_json_object, read_json_object
from hf_moe_ted.files.yaml_file import MAX_YAML_BYTES, read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ("null", "must be a JSON object"),
        ("[1, 2]", "must be a JSON object"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the field 'c' occurs twice"),
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "is not JSON"),
    ],
)
def test_text_that_is_no_json_object(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^config_overrides .*{message}") as error:
        parse_json_object(text, "config_overrides")
    assert len(str(error.value)) < 500
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^config .*config\.json.*{message}"):
        read_json_object(tmp_path / "config.json", "config")


def test_yaml_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))
    for text, message in (
        (laughs, r"has the alias \*a"),
        ("a: 1\nb: 2\na: 3", "a key occurs twice"),
        ("[" * 10_000, ""),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2026-99-99", ""),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"rules \(.*rules\.yaml\) is not YAML: .*{message}") as error:
            read_yaml(path, "rules")
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(("read", "most"), [(read_json_object, MAX_JSON_BYTES), (read_yaml, MAX_YAML_BYTES)])
def test_what_is_no_text_file(read: Callable[[Path, str], Any], most: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with (tmp_path / "large").open("wb") as file:
        file.truncate(most + 1)
    for name, message in {
        "nowhere": "does not exist",
        "pipe": "a pipe, socket or device",
        "device": "a pipe, socket or device",
        "folder": "it is a folder",
        "latin": "is not a text in UTF-8",
        "large": r"has [\d,]+ bytes, more than",
    }.items():
        with pytest.raises(ValueError, match=rf"argument.*{name}.*{message}"):
            read(tmp_path / name, "argument")
