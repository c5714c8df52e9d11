"""Loading a transformers model and its tokenizer, with one clear line for each way it can fail."""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from steersman.errors import SteersmanError
from steersman.lm.source import check_folder, local_folder, name_in_cache, reachable
from steersman.parallel import rank_and_world_size

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


Quantization = Literal["8bit", "4bit"]
"""Weights in 8-bit integers, or in 4-bit floats, by bitsandbytes."""


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


def placement(
    dtype: torch.dtype | str,
    device_map: str | Mapping[str, Any] | None,
    tensor_parallel: bool,
    quantization: Quantization | None,
) -> dict[str, Any]:
    """What transformers' `from_pretrained` is given so that it places the weights itself; empty for one plain device.

    Raises SteersmanError for what cannot go together and for packages that are missing.
    """
    if quantization not in (None, *get_args(Quantization)):
        raise SteersmanError(f"unknown quantization {quantization!r}: use one of {', '.join(get_args(Quantization))}")
    if tensor_parallel and (device_map is not None or quantization is not None):
        raise SteersmanError("tensor_parallel places the weights itself: leave out device_map and quantization")
    if tensor_parallel:
        if rank_and_world_size()[1] < 2:
            raise SteersmanError("tensor_parallel splits the model over several processes: start them with torchrun")
        from transformers.distributed.configuration_utils import DistributedConfig

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    options: dict[str, Any] = {}
    if device_map is not None:
        _need("accelerate", "device_map")
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    if quantization is not None:
        _need("bitsandbytes", "quantization")
        import transformers

        if quantization == "8bit":
            options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        else:
            compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=compute
            )
    return options


def _need(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SteersmanError(f'{option} needs {package}, which is not installed: pip install "steersman[large]"')


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
    device_map: str | Mapping[str, Any] | None = None,
    tensor_parallel: bool = False,
    quantization: Quantization | None = None,
) -> tuple[nn.Module, Any, str]:
    """Model (in evaluation mode, on `device` or as `placement` says), tokenizer and the name to record.

    Raises SteersmanError, in one line."""
    import transformers

    if not isinstance(source, str | os.PathLike):
        raise SteersmanError(f"a model is named by a folder or a hub id, got {source!r}")
    source = os.fspath(source)
    folder = local_folder(source)
    if folder is not None:
        try:
            check_folder(folder)
        except SteersmanError as error:
            raise SteersmanError(f"cannot load a model from {source}: {error}") from error
    where = str(folder) if folder is not None else source
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    away = folder is None and not reachable()
    if away:
        options["local_files_only"] = True
    torch_dtype = parse_dtype(dtype, device)
    placed = placement(torch_dtype, device_map, tensor_parallel, quantization)
    if quantization is not None and device_map is None:
        placed["device_map"] = {"": device}
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        model, loaded = model_class(config).from_pretrained(
            where, dtype=torch_dtype, output_loading_info=True, **placed, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    except SteersmanError:
        raise
    except Exception as error:  # a configuration, weights or a tokenizer of anybody's, read by libraries of others
        reason = " ".join(str(error).split())[: 90 if away else 200] or type(error).__name__
        if folder is not None:
            raise SteersmanError(f"cannot load a model from {source}: {reason}") from error
        raise SteersmanError(
            f"{source!r} is no local folder and could not be fetched from the Hugging Face hub: {reason}"
            + (" (the hub cannot be reached, or is switched off: only its cache was looked through)" if away else "")
        ) from error
    check_whole(source, model, loaded)
    try:
        model = model if placed else model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise SteersmanError(f"cannot move the model to {device}: {' '.join(str(error).split())[:200]}") from error
    return model.eval(), tokenizer, _name(folder) if folder is not None else source


def _name(folder: Path) -> str:
    """What a model in `folder` is called: the hub's id for a folder of its cache, else the last part of the path."""
    return name_in_cache(str(folder.absolute())) or folder.resolve().name


def check_whole(source: str, model: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Refuse a model some of whose blocks' weights its files did not hold: transformers fills them at random."""
    missing = [name for name in loaded.get("missing_keys", ()) if re.search(r"\.\d+\..*weight$", str(name))]
    if missing:
        raise SteersmanError(
            f"the files of {source} hold no {sorted(missing)[0]}, nor {len(missing) - 1} more weights that its "
            f"configuration asks for: {type(model).__name__} would compute with random ones"
        )
