"""Training gives the losses that it gave: a change of the arithmetic, on purpose or not, shows here.

The rows are those of a store that lies beside the tests, so that only training itself is looked at; the streamed run
takes them from the bundled model. The tolerance is for CPUs that add in another order, not for other arithmetic.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.early_files import EARLY, HOOK, training

from steersman import SAE
from steersman.cli import run
from steersman.demo import MODEL_PATH, texts

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "golden_losses.json").read_text())
CASES: dict[str, list[str]] = {
    "topk": [],
    "batch_topk": [],
    "accumulation": ["--grad-accumulation", "2"],
    "ema": ["--ema", "0.8"],
    "clip": ["--grad-clip", "0.05"],
    "signum": ["--optimizer", "signum"],
    "touched": ["--optimizer", "adam_touched", "--state-dtype", "bfloat16"],
    "int8": ["--state-dtype", "int8"],
    "streamed": [],
}


def losses(name: str, out: Path) -> dict[str, Any]:
    """The losses of ten steps, the fraction of dead features at the tenth, and the unexplained variance at the end."""
    command = training(out, "batch_topk" if name == "batch_topk" else "topk", "--seed", "4", *CASES[name])
    if name == "streamed":
        i = command.index("--store")
        assert command[i + 2 : i + 4] == ["--hook", EARLY]
        text = out.parent / "stories.txt"
        text.write_text("\n".join(texts(120, seed=22)) + "\n")
        command[i : i + 4] = ["--model", str(MODEL_PATH), "--text", str(text), "--hook", HOOK, "--buffer-rows", "1024"]
    run(command)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    heldout = SAE.load(out).cfg.metadata["heldout"]
    return {
        "losses": [line["loss"] for line in lines[:10]],
        "l0": lines[9]["l0"],
        "dead_share": lines[9]["dead_share"],
        "aux": lines[-1]["aux"],
        "fvu": heldout["fvu"],
    }


@pytest.mark.parametrize("name", CASES)
def test_training_loses_what_it_lost(name: str, tmp_path: Path) -> None:
    found = losses(name, tmp_path / "run")
    assert found.keys() == GOLDEN[name].keys()
    for key, value in GOLDEN[name].items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-9), key
