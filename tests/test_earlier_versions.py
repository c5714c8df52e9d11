"""What earlier versions wrote opens, says what it said, and is resumed where it was cut short.

`tests/data/v0.1` holds small files of version 0.1.0; its README says how each was made. Numbers that are only read are
the same to the last digit; those that are computed here may differ as one CPU rounds differently from another.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.early_files import DATA, HOOK, training
from support.ranks import run_ranks
from torch import Tensor

from steersman import (
    SAE,
    ActivationStore,
    EffectMap,
    LanguageModel,
    SteeringVector,
    collect_effects,
)
from steersman.cli import run
from steersman.demo import MODEL_PATH

EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
SAES = ("topk", "batch_topk", "jumprelu", "relu", "gated", "matryoshka", "groupmax", "transcoder")


# What is asked of each: numbers that were read off the files when they were written


def sums(x: Tensor) -> dict[str, Any]:
    """A tensor in a few numbers, none of which is small against what it is the sum of."""
    flat = x.detach().double().flatten()
    weights = torch.arange(1, len(flat) + 1, dtype=torch.float64) / len(flat)
    return {
        "shape": list(x.shape),
        "size": float(flat.abs().sum()),
        "weighted": float((flat.abs() * weights).sum()),
        "squares": float(flat.square().sum()),
    }


def of_store(store: ActivationStore) -> dict[str, Any]:
    tokens = store.tokens(0, store.n_rows)
    found: dict[str, Any] = {
        "hooks": store.hook_names,
        "rows": store.n_rows,
        "model": store.model_name,
        "fingerprint": store.fingerprint,
        "heldout": list(store.split_rows("heldout", 0.1)),
        "token_ids": [int(i) for i in tokens.token_ids[:40]],
        "last_document": int(tokens.doc_ids[-1]),
    }
    for hook in store.hook_names:
        stats = store.stats(hook)
        found[hook] = {"width": store.width(hook), "mean_norm": stats.mean_norm, "median_norm": stats.median_norm}
        found[hook]["mean"] = sums(stats.mean)
    return found


def of_sae(sae: SAE) -> dict[str, Any]:
    """Its configuration and what it makes of rows that are the same on every machine."""
    d = sae.cfg.d_in
    rows = torch.sin(torch.arange(12 * d, dtype=torch.float64) * 0.7).reshape(12, d).float() * 3
    if sae.feature_stats is not None:
        rows = rows * sae.feature_stats.median_norm / float(rows.norm(dim=1).mean())
    with torch.no_grad():
        code = sae.encode(rows)
        rebuilt = sae(rows)
    return {
        "class": type(sae).__name__,
        "hook": sae.cfg.hook_name,
        "model": sae.cfg.model_name,
        "k": sae.cfg.k,
        "active": int((code != 0).sum()),
        "code": sums(code),
        "rebuilt": sums(rebuilt),
        "weights": {name: sums(value) for name, value in sorted(sae.state_dict().items())},
    }


def of_run(folder: Path) -> dict[str, Any]:
    """A finished run: its SAE, its log, and the figures that were measured at its end."""
    sae = SAE.load(folder)
    assert sae.feature_stats is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "sae": of_sae(sae),
        "heldout": sae.cfg.metadata["heldout"],
        "steps": [line["step"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "max_act": sums(sae.feature_stats.max_act),
        "n_tokens": sae.feature_stats.n_tokens,
    }


def of_vector(v: SteeringVector) -> dict[str, Any]:
    return {
        "method": v.method,
        "model": v.model_name,
        "metadata": {name: value for name, value in v.metadata.items() if name != "version"},
        "directions": {hook: sums(direction) for hook, direction in v.directions.items()},
    }


def of_effects(effects: Any) -> dict[str, Any]:
    baseline, shards = effects.baseline, list(effects.iterate())
    return {
        "baseline": sums(baseline.mean),
        "median_norm": baseline.median_norm,
        "effect": sums(torch.cat([shard.effect for shard in shards])),
        "scale": sums(torch.cat([shard.scale for shard in shards])),
        "positions": int(torch.cat([shard.positions for shard in shards]).sum()),
    }


def of_map(fitted: EffectMap) -> dict[str, Any]:
    v = fitted.solve({3: 1.0}, min_signal=0.0)
    return {
        "hook": fitted.hook_name,
        "model": fitted.model_name,
        "M": sums(fitted.M),
        "b": sums(fitted.b),
        "scale": fitted.median_scale,
        "solved": of_vector(v)["directions"],
        "predicted": float(fitted.predict(v)[3]),
    }


def assert_alike(found: Any, expected: Any, rel: float, where: str = "") -> None:
    """Equal in all but the last digits of numbers that are not whole, and in what was not yet recorded."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys(), where
        for name, value in expected.items():
            assert_alike(found[name], value, rel, f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_alike(found[i], value, rel, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-7), where
    else:
        assert found == expected, where


# The commands that the files were made with


def caching(out: Path) -> list[str]:
    text = DATA / "stories.txt"
    command = ["cache", "--model", str(MODEL_PATH), "--text", str(text), "--hook", HOOK, "--out", str(out)]
    command += ["--tokens", "300", "--shard-rows", "120", "--context-length", "48", "--batch-size", "2"]
    return [*command, "--device", "cpu"]


def measuring(out: Path) -> Any:
    """The effects of unit vectors along axes, which no CPU rounds in a way of its own."""
    lm, sae = LanguageModel.load(str(MODEL_PATH), device="cpu"), SAE.load(DATA / "run", "cpu")
    settings: dict[str, Any] = {"scale_rule": "norm", "rollouts": 8, "new_tokens": 4, "shard_vectors": 8, "seed": 1}
    return collect_effects(lm, sae, vectors=torch.eye(128)[::4], out=str(out), base_rollouts=32, **settings)


RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("topk", ()),
    "unfinished_run": ("topk", ("--ema", "0.9", "--seed", "1")),
    "unfinished_run_of_2": ("batch_topk", ("--seed", "2")),
}


def copied(name: str, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    shutil.copytree(DATA / name, tmp_path / name)
    return tmp_path / name


# Finished ones


def test_a_store_opens_and_holds_what_it_held() -> None:
    store = ActivationStore.open(DATA / "store")
    assert of_store(store) == EXPECTED["store"]
    for hook in store.hook_names:
        rows = torch.cat([batch.x.float() for batch in store.batches(50, hook=hook, split="all", drop_last=False)])
        assert_alike(sums(rows)["squares"], EXPECTED["rows"][hook], 1e-4)


@pytest.mark.parametrize("name", SAES)
def test_an_sae_computes_what_it_computed(name: str) -> None:
    assert_alike(of_sae(SAE.load(DATA / "saes" / name)), EXPECTED["saes"][name], 1e-4)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("run", tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run(training(folder, *_settings("run")))
    assert f"FVU {EXPECTED['run']['heldout']['fvu']:.4f}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert_alike(of_run(folder), EXPECTED["run"], 1e-4)


@pytest.mark.parametrize("name", ["examples.safetensors", "calibrated.safetensors", "examples.gguf"])
def test_a_vector_is_what_it_was(name: str) -> None:
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    assert_alike(of_vector(SteeringVector.load(DATA / "vectors" / name)), EXPECTED["vectors"][name], 1e-6)


def test_effects_are_not_measured_again(tmp_path: Path) -> None:
    folder = copied("effects", tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert_alike(of_effects(measuring(folder)), EXPECTED["effects"], 1e-6)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_effect_map_solves_for_the_vector_it_solved_for() -> None:
    assert_alike(of_map(EffectMap.load(DATA / "effects")), EXPECTED["map"], 1e-4)


# Unfinished ones


def _settings(name: str) -> tuple[str, ...]:
    architecture, more = RUNS[name]
    return architecture, *more


def test_an_unfinished_store_is_resumed_to_its_end(tmp_path: Path) -> None:
    folder = copied("unfinished_store", tmp_path)
    done = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert done
    run(caching(folder))
    assert all(path.read_bytes() == content for path, content in done.items())
    found = of_store(ActivationStore.open(folder))
    del found["fingerprint"]  # of the bytes, which another CPU may round differently
    assert_alike(found, EXPECTED["resumed_store"], 1e-3)


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", ["unfinished_run", "unfinished_run_of_2"])
def test_an_unfinished_run_is_resumed_to_its_end(name: str, n_ranks: int, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    command = training(folder, *_settings(name))
    if n_ranks == 1:
        run(command)
    else:
        run_ranks(n_ranks, run, command)
    assert_alike(of_run(folder), EXPECTED[name], 1e-3)


@pytest.mark.parametrize("name", ["unfinished_run", "unfinished_run_of_2"])
def test_the_sae_of_a_checkpoint_can_be_taken_out(name: str, tmp_path: Path) -> None:
    run(["convert", str(DATA / name), str(tmp_path / "sae"), "--to", "saelens"])
    assert_alike(of_sae(SAE.load(tmp_path / "sae")), EXPECTED["checkpoints"][name], 1e-4)


def test_unfinished_effects_are_resumed_to_their_end(tmp_path: Path) -> None:
    folder = copied("unfinished_effects", tmp_path)
    assert_alike(of_effects(measuring(folder)), EXPECTED["effects"], 1e-3)
