"""SAEBench opens what Steersman trains, and its sparse probing (sae-probes) chooses the features that ours does."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization

from steersman.demo import MODEL_PATH
from steersman.sae import SAE, SAEConfig
from steersman.steer.probing.rows import Codes
from steersman.steer.probing.sparse import class_differences

SCRIPT = Path(__file__).parents[2] / "scripts" / "examples" / "saebench.py"
DATASET = "117_us_state_FL"


def test_the_features_chosen_are_those_of_sae_probes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(200, 60, generator=generator) - 0.5).relu()
    y = torch.rand(200, generator=generator) > 0.7
    x[y, :5] += torch.rand(int(y.sum()), 5, generator=generator)
    theirs = get_sorted_indices(x, y.long(), mean_act_normalization)
    ours = class_differences(Codes.of(x), y[:, None], torch.ones(200, dtype=torch.bool))[0]
    assert ours.abs().argsort(descending=True)[:20].tolist() == theirs[:20].tolist()


def test_saebench_probes_a_folder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the states of the bundled model, which TransformerLens does not know, and nothing from the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cfg = SAEConfig(d_in=128, d_sae=64, k=4, hook_name="blocks.2.hook_resid_post", model_name="steersman-demo")
    SAE(cfg, torch.Generator().manual_seed(0)).save(tmp_path / "mine")
    script = runpy.run_path(str(SCRIPT))
    script["main"](
        script["Config"](
            model=str(MODEL_PATH),
            sae=str(tmp_path / "mine"),
            dataset=(DATASET,),
            out=str(tmp_path / "out"),
            device="cpu",
        )
    )
    (written,) = (tmp_path / "out" / "results").glob("*.json")
    found = json.loads(written.read_text())
    assert 0.3 < found["eval_result_metrics"]["sae"]["sae_top_5_test_auc"] < 1
    assert found["eval_result_metrics"]["llm"]["llm_test_auc"] > 0.3
    assert found["sae_cfg_dict"]["d_sae"] == 64
