"""Loading a transformers model and its tokenizer, with one clear line for each way it can fail."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steersman.errors import SteersmanError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """A torch dtype from its name. None: float32 on the CPU (half precision is slow there), else the file's."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise SteersmanError(f"unknown dtype {dtype!r}: use one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_device(device: str | torch.device) -> torch.device:
    """`auto` takes the accelerator if there is one, else the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise SteersmanError(f"unknown device {device!r}: use auto, cpu, cuda, cuda:0, ...") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def local_folder(source: str) -> Path | None:
    """The folder `source` names, or None for a hub id. Raises SteersmanError for a path that holds no model."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SteersmanError(f"{source} holds no config.json: it is not a transformers model folder")
        return folder
    if folder.exists():
        raise SteersmanError(f"{source} is a file: name the folder that holds config.json and the weights")
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source.strip():
        raise SteersmanError(f"no model folder at {source!r}: check the path, or give a hub id such as org/name")
    return None


def model_class(config: Any) -> Any:
    """The Auto class that fits `config`: causal language model, masked language model, or the bare encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.model_type
    names = " ".join(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise SteersmanError(
            f"{kind} is an encoder-decoder model: only decoders and encoders have one stack of blocks to read"
        )
    decoder = "CausalLM" in names or "LMHead" in names
    if kind in MASKED and not decoder:
        return transformers.AutoModelForMaskedLM if "MaskedLM" in names or not names else transformers.AutoModel
    if kind in CAUSAL or decoder:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def load_pretrained(
    source: str, *, dtype: str | torch.dtype | None, device: torch.device, revision: str | None, trust_remote_code: bool
) -> tuple[nn.Module, Any, str]:
    """Model (in evaluation mode, on `device`), tokenizer and the name to record. Raises SteersmanError, in one line."""
    import transformers
    from safetensors import SafetensorError

    folder = local_folder(source)
    where = str(folder) if folder is not None else source
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    torch_dtype = parse_dtype(dtype, device)
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        model = model_class(config).from_pretrained(where, dtype=torch_dtype, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    except SteersmanError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        if folder is not None:
            raise SteersmanError(f"cannot load a model from {source}: {reason}") from error
        raise SteersmanError(
            f"{source!r} is no local folder and could not be fetched from the Hugging Face hub: {reason}"
        ) from error
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise SteersmanError(f"cannot move the model to {device}: {' '.join(str(error).split())[:200]}") from error
    return model.eval(), tokenizer, folder.resolve().name if folder is not None else source
