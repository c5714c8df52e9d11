"""SAE folders: round trips, the SAELens layout, and files that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import make_sae

from steersman.errors import SteersmanError
from steersman.sae import SAE, FeatureStats


@pytest.mark.parametrize(
    "activation",
    ["topk", "batch_topk", "jumprelu", "relu", "gated", "matryoshka", "groupmax", "abs_topk", "matching_pursuit"],
)
def test_save_and_load_give_the_same_sae(activation: str, tmp_path: Path) -> None:
    sae = make_sae(activation)
    sae.feature_stats = FeatureStats(
        max_act=torch.rand(64), density=torch.rand(64), mean_act=torch.rand(64), n_tokens=123, median_norm=7.25
    )
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.cfg == sae.cfg
    assert type(loaded) is type(sae)
    for (name, a), (_, b) in zip(sae.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(a, b), name
    assert loaded.W_enc.T.is_contiguous()
    stats = loaded.feature_stats
    assert stats is not None
    assert torch.equal(stats.max_act, sae.feature_stats.max_act)
    assert (stats.n_tokens, stats.median_norm) == (123, 7.25)
    x = torch.randn(5, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_the_layout_is_that_of_saelens(tmp_path: Path) -> None:
    make_sae("topk").save(tmp_path / "topk")
    cfg = json.loads((tmp_path / "topk" / "cfg.json").read_text())
    assert cfg["architecture"] == "topk"
    assert cfg["k"] == 5
    assert (cfg["d_in"], cfg["d_sae"], cfg["normalize_activations"]) == (8, 64, "none")
    assert cfg["metadata"]["hook_name"] == ""
    tensors = load_file(tmp_path / "topk" / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (8, 64),
        "W_dec": (64, 8),
        "b_enc": (64,),
        "b_dec": (8,),
    }
    make_sae("batch_topk").save(tmp_path / "batch")
    assert json.loads((tmp_path / "batch" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert load_file(tmp_path / "batch" / "sae_weights.safetensors")["threshold"].tolist() == pytest.approx([0.4] * 64)


def test_a_plain_saelens_folder_loads(tmp_path: Path) -> None:
    sae = make_sae("topk")
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    weights = tmp_path / "sae_weights.safetensors"
    save_file(load_file(weights), weights)
    cfg["metadata"] = {"hook_name": "blocks.1.hook_resid_post", "model_name": "m", "prepend_bos": True}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    loaded = SAE.load(tmp_path)
    assert (loaded.cfg.hook_name, loaded.cfg.model_name, loaded.cfg.k) == ("blocks.1.hook_resid_post", "m", 5)


def test_saving_over_an_sae_leaves_no_stale_statistics(tmp_path: Path) -> None:
    sae = make_sae()
    sae.feature_stats = FeatureStats(
        max_act=torch.ones(64), density=torch.ones(64), mean_act=torch.ones(64), n_tokens=1, median_norm=1.0
    )
    sae.save(tmp_path)
    make_sae().save(tmp_path)
    assert SAE.load(tmp_path).feature_stats is None


def truncate(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"not a safetensors file at all")


def with_tensors(**changes: torch.Tensor | None):
    def change(folder: Path) -> None:
        file = folder / "sae_weights.safetensors"
        tensors = load_file(file)
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, file)

    return change


def with_config(text: str):
    return lambda folder: (folder / "cfg.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated or not a safetensors file"),
        (garbage, "truncated or not a safetensors file"),
        (with_tensors(W_dec=None), "has no tensor 'W_dec'"),
        (with_tensors(b_enc=torch.zeros(3)), r"b_enc has shape \[3\], the configuration says \[64\]"),
        (with_tensors(b_dec=torch.full((8,), float("nan"))), "b_dec holds values that are not finite"),
        (with_config("{"), "not a readable SAE configuration"),
        (with_config("[]"), "not a readable SAE configuration"),
        (with_config('{"d_in": 8}'), "not a readable SAE configuration"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "holds no SAE.*Found: cfg.json"),
        (lambda folder: (folder / "cfg.json").unlink(), "holds no SAE.*Found: sae_weights.safetensors"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_wrong_files_are_named(spoil, message: str, tmp_path: Path) -> None:
    make_sae().save(tmp_path / "sae")
    spoil(tmp_path / "sae")
    with pytest.raises(SteersmanError, match=message):
        SAE.load(tmp_path / "sae")


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_sae()
    old.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def no_space(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(SteersmanError, match=r"sae_weights.safetensors could not be written: No space left"):
        make_sae("topk", k=3).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
