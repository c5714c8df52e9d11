"""Part 3, the causes: when does SAE-TS beat the plain feature at equal KL, and what decides it?

On the bundled model, whose grammar labels every concept exactly, each suspected cause has an experiment of its own. The
outcome is the concept's words per 100 of continuations at equal KL: the choices are made on every other concept and
reported on the rest. What is chosen there is measured on the study's model as it is.
"""

from dataclasses import dataclass, replace

from study.common import Results, chosen
from study.targeting_grammar import Bench, GrammarConfig
from study.targeting_model import Model, ModelConfig
from study.targeting_page import page

__all__ = ["Config", "main", "page"]


@dataclass(frozen=True, kw_only=True)
class Config(GrammarConfig, ModelConfig):
    """Settings of this part."""


SMALL = {
    "concepts": 4, "vectors": 1280, "rollouts": 2, "gradient_texts": 1024, "prompts": 4, "new_tokens": 8,
    "budgets": (0.3,), "model_vectors": 8, "model_concepts": 2, "model_texts": 4,
}  # fmt: skip


def main(config: Config) -> None:
    """Measure what is not known yet."""
    config = replace(config, **chosen(config, **SMALL))
    results = Results(config, "targeting")
    grammar, rows = Bench(config), {}
    rows |= {f"grammar/{name}": make for name, make in grammar.rows().items()}
    if config.data is not None:
        rows |= {f"model/{name}": make for name, make in Model(config).rows().items()}
    results.planned(rows)
    for name, make in rows.items():
        results.row(name, make)
