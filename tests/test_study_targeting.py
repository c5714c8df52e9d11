"""Part 3 of the study, why SAE-TS beats the feature or does not: experiments on the grammar, at little size."""

from pathlib import Path

import pytest
import torch

from steersman import Steerer
from steersman.steer import token_nll
from study.common import Results, Study, StudyConfig
from study.targeting import Config
from study.targeting_grammar import Bench
from study.ways import OwnTexts, likelihood_gradients, windows_of


def test_experiments_are_rows_that_are_measured_once(tmp_path: Path, no_progress: None) -> None:
    config = Config(
        small=True, work=tmp_path, tokens=6000, concepts=3, gradient_texts=256, prompts=2, new_tokens=6, vectors=0,
        budgets=(0.3,),
    )  # fmt: skip
    bench = Bench(config)
    made, results = bench.rows(), Results(config, "targeting")
    assert [name for name in made if name == "plain" or name.startswith("gradients")] == ["plain", "gradients 256"]
    found = results.row("grammar/gradients 256", made["gradients 256"])["outcome"]
    assert set(found) == {"derivative", "natural"}
    assert all(len(words) == len(bench.place.topics.names) == 3 for words in found.values())
    again = Results(config, "targeting")
    assert again.row("grammar/gradients 256", lambda: None) == results.rows["grammar/gradients 256"]


def test_a_features_own_texts_are_those_in_which_it_fires(tmp_path: Path, no_progress: None) -> None:
    study = Study(StudyConfig(small=True, work=tmp_path, tokens=6000, layers=(2,), layer=2))
    sae, store = study.sae(), study.store()
    assert sae.feature_stats is not None
    feature = int(sae.feature_stats.density.argmin())
    ids, means = windows_of(store, sae, [feature], 3000, 12)
    assert ids.shape[1] == 12
    assert means.shape == (len(ids), 1)
    first = store.tokens(0, 12)
    assert ids[0].tolist() == first.token_ids.tolist()
    x = store.activations(torch.arange(12), store.hook_of(sae)).float()
    torch.testing.assert_close(means[0, 0], sae.encode(x)[:, feature].mean())
    own = OwnTexts(study, [feature])
    made = own.vector(feature)
    assert float(made.norm()) == pytest.approx(1.0)
    gradient = likelihood_gradients(study.lm, study.hook(), ids[:1])[0]
    v = gradient / gradient.norm()

    def logp(size: float) -> float:
        with Steerer(study.lm).vector(size * v, hook=study.hook()):
            bos = [[study.lm.bos_token_id]]
            whole = torch.cat([torch.tensor(bos), ids[:1]], 1)
            return -float(token_nll(study.lm.logits(whole), whole).double().sum())

    assert (logp(0.05) - logp(-0.05)) / 0.1 == pytest.approx(float(gradient.norm()), rel=0.02)
