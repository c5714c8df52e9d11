"""A model's digest: what changes it and what does not."""

import copy

import torch

from steersman import LanguageModel
from steersman.lm.digest import model_digest


def test_digest_changes_with_weights_and_configuration(lm: LanguageModel) -> None:
    model = copy.deepcopy(lm.model)
    before = lm.digest()
    assert lm.digest() == before == model_digest(model, model.config)
    for name, parameter in model.named_parameters():
        value = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1.0
        assert model_digest(model, model.config) != before, name
        with torch.no_grad():
            parameter.copy_(value)
    assert model_digest(model, model.config) == before
    model.config.rms_norm_eps *= 2
    assert model_digest(model, model.config) != before


def test_digest_knows_where_a_number_stands_and_its_type(lm: LanguageModel) -> None:
    model, before = copy.deepcopy(lm.model), lm.digest()
    parameter = next(p for p in model.parameters() if p.ndim == 2)
    with torch.no_grad():
        parameter.copy_(parameter.flip(1).clone())
    assert model_digest(model, model.config) != before
    assert model_digest(copy.deepcopy(lm.model).bfloat16(), lm.config) != before
