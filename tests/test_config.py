"""Configurations: what is identity, what a command's part of one is, and how two differ."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steersman.sae
import steersman.steer
import steersman.train
from steersman.config import differences, identity, merged, part_of, setting
from steersman.errors import SteersmanError
from steersman.sae import SAEConfig
from steersman.steer import (
    AffineConfig,
    CalibrateConfig,
    ContrastConfig,
    DecomposeConfig,
    DescribeConfig,
    EffectsConfig,
    EvaluationConfig,
    FindConfig,
    ITIConfig,
    LabelEndpointConfig,
    LayerSweepConfig,
    ParticleConfig,
    ProbingConfig,
    ScoreConfig,
    SteerConfig,
    TokenLabelConfig,
    TrainEditConfig,
)
from steersman.train import (
    CacheConfig,
    CaptureConfig,
    CrosscoderConfig,
    EvaluateConfig,
    FeaturesConfig,
    PlanConfig,
    StreamConfig,
    SweepConfig,
    TrainConfig,
)


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


CONFIGS: dict[type[Any], dict[str, Any]] = {
    SAEConfig: {"d_in": 4, "d_sae": 8, "k": 2},
    TrainConfig: {"d_sae": 8, "k": 2},
    SweepConfig: {"store": "acts", "out": "runs"},
    CaptureConfig: {"hook": "h"},
    CacheConfig: {"hook": "h", "out": "acts", "model": "m", "text": "t"},
    StreamConfig: {"hook": "h"},
    PlanConfig: {"d_in": 8, "d_sae": 64, "k": 2},
    EvaluateConfig: {},
    CrosscoderConfig: {},
    FeaturesConfig: {},
    EffectsConfig: {},
    EvaluationConfig: {},
    FindConfig: {},
    SteerConfig: {"feature": ("1=2",), "model": "m", "sae": "s"},
    CalibrateConfig: {},
    DecomposeConfig: {"k": 4},
    TokenLabelConfig: {},
    DescribeConfig: {},
    LabelEndpointConfig: {"url": "https://x/v1", "model": "toy"},
    ContrastConfig: {},
    AffineConfig: {},
    ITIConfig: {},
    LayerSweepConfig: {},
    ParticleConfig: {},
    ProbingConfig: {},
    ScoreConfig: {},
    TrainEditConfig: {},
}


def test_every_configuration_holds_its_fields_to_their_types() -> None:
    """None is of no type that is not optional; an object of a class of its own is of no type at all."""
    configs = {one for package in (steersman.sae, steersman.train, steersman.steer) for one in vars(package).values()
               if isinstance(one, type) and one.__name__.endswith("Config")}  # fmt: skip
    assert configs == CONFIGS.keys()
    for kind, given in CONFIGS.items():
        needed = {name: value for name, value in given.items() if name in {field.name for field in fields(kind)}}
        kind(**needed)
        held = 0
        for field in fields(kind):
            if "Any" in str(field.type):
                continue
            with pytest.raises(SteersmanError, match=f"{field.name}( of an SAE)? is .*, it should be "):
                kind(**{**needed, field.name: Inner()})
            held += 1
        assert held > len(fields(kind)) / 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 2.5}, "k is 2.5, it should be a whole number"),
        ({"k": "2"}, "k is '2', it should be a whole number"),
        ({"k": True}, "k is True, it should be a whole number"),
        ({"d_sae": None}, "d_sae is None, it should be a whole number"),
        ({"tokens": 1e6}, "tokens is 1000000.0, it should be a whole number or null"),
        ({"lr": "1e-3"}, "lr is '1e-3', it should be a number or null"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\), it should be a list"),
        ({"betas": 0.9}, "betas is 0.9, it should be a list"),
        ({"kernels": "cuda"}, "kernels is 'cuda', it should be one of auto"),
        ({"cuda_graph": "false"}, "cuda_graph is 'false', it should be true or false"),
        ({"options": [1]}, r"options is \[1\], it should be "),
        ({"device": 0}, "device is 0, it should be text"),
    ],
)
def test_a_value_of_another_type_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        TrainConfig(**{"d_sae": 8, "k": 2, **given})


def test_numbers_of_numpy_lists_and_layers_are_taken() -> None:
    config = TrainConfig(d_sae=np.int64(8), k=2, betas=[0.5, np.float32(0.25)], lr=1e-3, bias_lr_ratio=2)  # pyright: ignore[reportArgumentType]
    assert (config.d_sae, config.betas, config.bias_lr_ratio) == (8, (0.5, 0.25), 2)
    assert json.loads(json.dumps(identity(config)))["betas"] == [0.5, 0.25]
    assert CaptureConfig(hook=8).hook == "8"  # pyright: ignore[reportArgumentType]
    assert CaptureConfig(hook=[8, "blocks.2.hook_resid_post"]).hook == ("8", "blocks.2.hook_resid_post")  # pyright: ignore[reportArgumentType]
