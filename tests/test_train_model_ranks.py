"""Some ranks run the model, others train: the run of one process, whatever their numbers and whatever happens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import answers, run_ranks, start_ranks
from sharded_jobs import train_from_stream
from stores import word_documents
from test_train_cluster import assert_same_sae

from steersman.errors import SteersmanError
from steersman.train import ActivationStore, TrainConfig, train_sae

CONFIG = TrainConfig(
    d_sae=64, k=4, batch_size=64, tokens=64 * 60, seed=3, device="cpu", checkpoint_every=20, timeout_seconds=20
)
STREAM: dict[str, Any] = {
    "hook": "model.layers.1", "buffer_rows": 512, "heldout_rows": 300, "context_length": 16, "batch_size": 4,
}  # fmt: skip
NAME = "sae_weights.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(word_documents(250, shortest=1)))
    return str(path)


@pytest.fixture(scope="module")
def alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(1, train_from_stream, text, STREAM, CONFIG, str(out))[0][0] == "done"
    return out


@pytest.mark.parametrize(("n", "model_ranks", "latent"), [(2, 1, None), (3, 2, None), (3, 1, 1), (3, 1, 2)])
def test_the_sae_is_that_of_one_process(
    n: int, model_ranks: int, latent: int | None, text: str, alone: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, model_ranks=model_ranks, latent_shards=latent)
    found = run_ranks(n, train_from_stream, text, STREAM, config, str(tmp_path / "run"))
    assert [ended for ended, *_ in found] == ["done"] * n
    if n - model_ranks == 1:
        assert (tmp_path / "run" / NAME).read_bytes() == (alone / NAME).read_bytes()
    assert_same_sae(alone, tmp_path / "run")
