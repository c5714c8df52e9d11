"""SAEBench's sparse probing of an SAE that Steersman trained, on any model that Steersman reads.

    pip install sae-bench
    python scripts/examples/saebench.py --model steersman-demo --sae quickstart/sae --dataset 117_us_state_FL

SAEBench takes the SAE as SAELens opens it: the folder as it is. It would read the model through TransformerLens, which
knows some models, by their names on the hub; here Steersman reads the texts, and puts the states where SAEBench looks
for them first. The texts come with SAEBench (sae-probes), so that nothing is asked of the hub. For a model that
TransformerLens knows, SAEBench's own `run_eval(config, [("mine", SAE.load_from_disk(folder))], device, out)` is enough.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from steersman import LanguageModel
from steersman.config import setting


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder of the SAE."""
    dataset: tuple[str, ...] = ()
    """Datasets of sae-probes; all 113 without any."""
    out: str = "saebench"
    """Folder for the states and SAEBench's results."""
    batch_size: int = 32
    """Texts per pass."""
    max_length: int = 1024
    """Tokens of a text that are read: its last."""
    device: str = setting("auto", identity=False)
    """Where the model and the SAE run."""


def cache_states(lm: LanguageModel, hook: str, datasets: list[str], folder: Path, config: Config) -> None:
    """Write the states after the last token of each dataset's texts, as sae-probes names them."""
    import pandas as pd
    from sae_probes.constants import DATA_PATH  # pyright: ignore[reportMissingImports]

    limit = min(config.max_length, lm.context_length or config.max_length)
    folder.mkdir(parents=True, exist_ok=True)
    for name in datasets:
        path = folder / f"{name}_{hook}.pt"
        if path.exists():
            continue
        texts = pd.read_csv(DATA_PATH / "cleaned_data" / f"{name}.csv.zst", compression="zstd")["prompt"].tolist()
        found = []
        for start in range(0, len(texts), config.batch_size):
            batch = lm.encode(
                [lm.token_ids(text, bos=True)[-limit:] for text in texts[start : start + config.batch_size]]
            )
            states = lm.capture(batch.input_ids, batch.attention_mask, hooks=[hook])[hook]
            found.append(states[torch.arange(len(states)), batch.lengths.to(states.device) - 1].float().cpu())
        torch.save(torch.cat(found), path)


def main(config: Config) -> None:
    """Cache, evaluate, print."""
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_probes import DATASETS  # pyright: ignore[reportMissingImports]

    out = Path(config.out)
    lm = LanguageModel.load(config.model, device=config.device)
    sae = SAE.load_from_disk(config.sae, device=str(lm.device))
    name = str(sae.cfg.metadata.model_name).replace("/", "_")
    datasets = list(config.dataset or DATASETS)
    cache_states(lm, sae.cfg.metadata.hook_name, datasets, out / "states" / f"model_activations_{name}", config)
    asked = SparseProbingSaeProbesEvalConfig(
        model_name=name, dataset_names=datasets, results_path=str(out / "probes"), model_cache_path=str(out / "states")
    )
    found = run_eval(asked, [(Path(config.sae).name, sae)], str(lm.device), str(out / "results"), force_rerun=True)
    for result in found.values():
        print(json.dumps(result["eval_result_metrics"], indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
