"""OpenAI's GPT-2 autoencoders: files by the rules of their source, computed a second time here; hostile pickles."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sae_files import assert_computes

from steersman.errors import SteersmanError
from steersman.sae import SAE

pytestmark = pytest.mark.usefixtures("seeded")
D, L, K = 6, 40, 5


def state(**further: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    made = {"pre_bias": (D,), "encoder.weight": (L, D), "latent_bias": (L,), "decoder.weight": (D, L)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in made.items()}
    statistics = {
        "stats_last_nonzero": torch.zeros(L, dtype=torch.long),
        "latents_activation_frequency": torch.ones(L),
        "latents_mean_square": torch.zeros(L),
    }
    return tensors | statistics | further


TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def write(path: Path, content: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def expected(s: dict[str, Any], x: torch.Tensor, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double()
    mean = x.mean(dim=1, keepdim=True)
    deviation = ((x - mean).square().sum(dim=1, keepdim=True) / (D - 1)).sqrt()
    inner = (x - mean) / (deviation + 1e-5) if normalised else x
    z = (inner - s["pre_bias"]) @ s["encoder.weight"].double().T + s["latent_bias"]
    f = torch.zeros_like(z).scatter(1, z.topk(K).indices, z.topk(K).values) if normalised else z
    f = f.relu()
    x_hat = f @ s["decoder.weight"].double().T + s["pre_bias"]
    return f.float(), (x_hat * deviation + mean if normalised else x_hat).float()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("location", "further", "hook", "page"),
    [
        ("resid_delta_mlp", {}, "blocks.8.hook_mlp_out", None),
        ("mlp_post_act_v4", {"activation": "ReLU", "activation_state_dict": {}}, "blocks.8.mlp.hook_post", None),
        ("resid_post_mlp_v5_32k", TOPK, "blocks.8.hook_resid_post", "8-res_post_32k-oai"),
        ("resid_delta_attn_v5_128k", TOPK, "blocks.8.hook_attn_out", "8-att_128k-oai"),
        ("resid_post_attn_v5_32k", TOPK, "blocks.8.hook_resid_mid", "8-res_mid_32k-oai"),
    ],
)
def test_every_version(location: str, further: dict, hook: str, page: str | None, legacy: bool, tmp_path: Path) -> None:
    s = state(**further)
    path = write(tmp_path / location / "autoencoders" / "8.pt", s, _use_new_zipfile_serialization=not legacy)
    write(path.with_name("9.pt"), s)
    sae = SAE.load(path)
    normalised = further is TOPK
    assert (sae.cfg.hook_name, sae.cfg.model_name) == (hook, "gpt2")
    assert sae.cfg.input_norm == ("layer_norm" if normalised else "none")
    if page is not None:
        assert sae.neuronpedia_url(2) == f"https://www.neuronpedia.org/gpt2-small/{page}/2"
    x = torch.randn(60, D) * 3 + 2
    f, x_hat = expected(s, x, normalised)
    assert_computes(sae, x, f, x_hat, atol=2e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat, rtol=1e-5, atol=2e-5)


def test_a_folder_of_many_needs_a_name(tmp_path: Path) -> None:
    write(tmp_path / "0.pt", state())
    write(tmp_path / "1.pt", state())
    with pytest.raises(SteersmanError, match=r"Found: 0.pt, 1.pt.*openai needs one .pt file .*name the file"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"activation": "Identity"}, "cannot read activation 'Identity'"),
        ({"activation": "TopK"}, "cannot read activation 'TopK'"),
        (TOPK | {"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "negative activations"),
        (TOPK | {"activation_state_dict": {"k": None, "postact_fn": "ReLU"}}, "k is None, not a whole number"),
        (TOPK | {"activation_state_dict": {"k": L + 1, "postact_fn": "ReLU"}}, "k = 41 must lie between"),
        ({"extra.weight": torch.zeros(1)}, "does not have: extra.weight"),
        ({"pre_bias": torch.zeros(D + 1)}, "pre_bias has shape"),
        ({"latent_bias": torch.full((L,), float("nan"))}, "latent_bias holds values that are not finite"),
        ({"latent_bias": torch.zeros(L).to_sparse()}, "not a plain dense tensor"),
    ],
)
def test_files_that_are_wrong(further: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match=message):
        SAE.load(write(tmp_path / "0.pt", state(**further)))


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["0.pt", "ae.pt"])
def test_a_pickle_that_runs_code_is_refused_unrun(name: str, legacy: bool, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    path = write(tmp_path / "sae" / name, state(evil=Evil(trap)), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SteersmanError, match="reading it would run code from the file: it is refused"):
        SAE.load(path)
    assert not trap.exists()


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "0.pt", state())
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(SteersmanError, match="truncated or not a file of tensors|holds more than tensors"):
            SAE.load(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "1.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(SteersmanError, match="holds compressed entries"):
        SAE.load(tmp_path / "1.pt")
    torch.save([1, 2], path)
    with pytest.raises(SteersmanError, match="holds a list, not a dictionary"):
        SAE.load(path)
