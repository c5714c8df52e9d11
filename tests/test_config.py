"""Configurations: what is identity, what a command's part of one is, and how two differ."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from steersman.config import differences, identity, merged, part_of, setting
from steersman.errors import SteersmanError


@dataclass(frozen=True, kw_only=True)
class Inner:
    k_aux: int = 3
    log: bool = setting(False, identity=False)


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = setting(Path("runs"))
    lr: float = 0.1
    sizes: tuple[int, ...] = setting(default_factory=lambda: (1, 2))
    inner: Inner = Inner()
    device: str = setting("auto", identity=False)


@dataclass(frozen=True, kw_only=True)
class Command(Config):
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class Needy:
    hook: str
    out: str
    tokens: int = 5


def test_identity_leaves_out_how_it_is_computed() -> None:
    found = identity(Config(device="cuda"))
    assert found == {"out": "runs", "lr": 0.1, "sizes": [1, 2], "inner": {"k_aux": 3}}
    assert json.loads(json.dumps(found)) == found


def test_merging() -> None:
    assert merged(Config, None, {}) == Config()
    assert merged(Config, Config(lr=0.5), {"device": "cpu"}) == Config(lr=0.5, device="cpu")
    assert merged(Config, Command(verbose=True), {"lr": 1.0}) == Command(verbose=True, lr=1.0)
    assert merged(Needy, None, {"hook": "a", "out": "b"}) == Needy(hook="a", out="b")
    with pytest.raises(SteersmanError, match="unknown setting 'divice'; near it: device"):
        merged(Config, None, {"divice": "cpu"})
    with pytest.raises(SteersmanError, match="Needy needs hook and out"):
        merged(Needy, None, {"tokens": 3})


def test_a_commands_part() -> None:
    part = part_of(Config, Command(lr=0.5, verbose=True))
    assert type(part) is Config
    assert part == Config(lr=0.5)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ({}, {}, ""),
        ({"a": (1, 2), "b": {"c": 1}}, {"b": {"c": 1}, "a": [1, 2]}, ""),
        ({"tokens": 5, "dtype": "float32"}, {"tokens": 7, "dtype": "float32"}, "tokens was 5, now 7"),
        ({"b": 1}, {"a": "x"}, "a was None, now 'x'; b was 1, now None"),
        ({"s": {"x": 1, "y": {"z": 2}}}, {"s": {"x": 2, "y": {"z": 3}}}, "s.x was 1, now 2; s.y.z was 2, now 3"),
        ({"s": {"x": 1}}, {"s": None}, "s was {'x': 1}, now None"),
    ],
)
def test_differences(old: dict[str, object], new: dict[str, object], text: str) -> None:
    assert differences(old, new) == text
