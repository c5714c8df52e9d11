"""Part 3 of the study, why SAE-TS beats the feature or does not: experiments on the grammar, at little size."""

from pathlib import Path

from study.common import Results
from study.targeting import Bench, Config


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
