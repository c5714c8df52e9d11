"""The small files of version 0.1.0 beside the tests, and the command that trains on their store."""

import dataclasses
from pathlib import Path

from steersman import TrainConfig

DATA = Path(__file__).parents[1] / "data" / "v0.1"
HOOK, EARLY = "blocks.2.hook_resid_post", "blocks.1.hook_resid_post"


def training(out: Path, architecture: str, *more: str) -> list[str]:
    """The command line of a short run on the store in `DATA`."""
    # The setting was called activation.
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    flag = "--architecture" if "architecture" in names else "--activation"
    command = ["train", "--store", str(DATA / "store"), "--hook", EARLY, "--out", str(out), flag, architecture]
    command += ["--d-sae", "32", "--k", "4", "--batch-size", "32", "--tokens", "640", "--dead-after", "320"]
    command += ["--log-every", "1", "--checkpoint-every", "10", "--keep-checkpoints", "1", "--device", "cpu"]
    return [*command, "--heldout-fraction", "0.1", *more]
