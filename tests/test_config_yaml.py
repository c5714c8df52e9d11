"""Settings from YAML files: values as their fields' types, and one line for what is none."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from steersman.config import read_yaml, typed
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 1
    rate: float | None = None
    name: str = ""
    kind: Literal["a", "b"] = "a"
    mixed: bool = False
    features: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)
    options: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width: 8", {"width": 8}),
        ("width: 8.0", {"width": 8}),
        ("width: 1e6", {"width": 1_000_000}),
        ("width: 10_000", {"width": 10_000}),
        ("width: '12345678901234567'", {"width": 12345678901234567}),
        ("rate: 1e-3", {"rate": 0.001}),
        ("rate: 1", {"rate": 1.0}),
        ("rate: null", {"rate": None}),
        ("name: 12", {"name": "12"}),
        ("kind: b", {"kind": "b"}),
        ("mixed: true", {"mixed": True}),
        ("features: [12=1.5, 3]", {"features": ("12=1.5", "3")}),
        ("features: 12=1.5", {"features": ("12=1.5",)}),
        ("betas: [0.5, 1]", {"betas": (0.5, 1.0)}),
        ("options: {p: 0.5}", {"options": {"p": 0.5}}),
        ("{}", {}),
    ],
)
def test_values_have_their_fields_types(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    found = read_yaml(path, Config)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    assert Config(**found) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width: 8.5", "width is 8.5, it should be a whole number"),
        ("width: eight", "width is 'eight', it should be a whole number"),
        ("width: true", "width is True, it should be a whole number"),
        ("width: null", "width is None, it should be a whole number"),
        ("width: .inf", "width is inf"),
        ("rate: fast", "rate is 'fast', it should be a number or null"),
        ("kind: c", "kind is 'c', it should be one of a, b"),
        ("mixed: 1", "mixed is 1, it should be true or false"),
        ("name: [a]", "name is ['a'], it should be text"),
        ("betas: [0.5]", "betas is [0.5], it should be a list, each a number"),
        ("options: 3", "options is 3"),
        ("witdh: 8", "unknown key 'witdh'; near it: width"),
        ("1: 8", "unknown key 1"),
        ("- 8", "must hold a mapping of settings"),
        ("width: [8", "is not YAML"),
        ("", "must hold a mapping of settings"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SteersmanError) as caught:
        read_yaml(path, Config)
    assert message in str(caught.value)
    assert "settings.yaml" in str(caught.value)


def test_what_was_dumped_is_read_again() -> None:
    config = {"width": 3, "rate": 0.25, "name": "x", "kind": "b", "mixed": True, "features": ["a", "b"]}
    assert Config(**typed(yaml.safe_load(yaml.safe_dump(config)), Config, "here")).features == ("a", "b")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="no such file"):
        read_yaml(tmp_path / "none.yaml", Config)


def test_an_old_key_stands_for_the_new_one_alone(caplog: pytest.LogCaptureFixture) -> None:
    @renamed_fields(breadth="width", colour="")
    @dataclass(frozen=True, kw_only=True)
    class Renamed(Config):
        pass

    assert typed({"breadth": 3, "colour": "red"}, Renamed, "a.yaml") == {"width": 3}
    assert "is called width now" in caplog.text
    with pytest.raises(SteersmanError, match="a.yaml: width is said twice, by its old and its new name: keep one"):
        typed({"breadth": 3, "width": 4}, Renamed, "a.yaml")


BOMB = "features: [&a [x, x, x]" + "".join(f", &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi")) + "]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "an alias .* stands for another value"),
        ("options: &a {b: *a}", "an alias"),
        ("width: " + "9" * 5000, "settings.yaml is not YAML"),
        ("options: " + "[" * 20_000, "nested too deeply"),
        ("options: " + "{a: " * 20_000, "nested too deeply"),
        ("? [a]\n: b", "not YAML"),
        ("a: b: c", "not YAML"),
        ("width: !!python/object/apply:os.system [ls]", "not YAML"),
        ("width: !!binary x", "not YAML"),
        ("\x00", "not YAML"),
        ("#" * (1 << 19), "at most 262,144 are read"),
    ],
)
def test_files_that_are_large_deep_or_odd_get_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SteersmanError, match=message) as raised:
        read_yaml(path, Config)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_what_looks_like_a_date_is_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("name: 2020-99-99\nfeatures: [2020-01-01]\n")
    assert read_yaml(path, Config) == {"name": "2020-99-99", "features": ("2020-01-01",)}
