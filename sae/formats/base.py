"""What a format is, the registry of all, and how an SAE is put together from what one reads."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.reading import shown
from steersman.registry import Registry
from steersman.sae.base import SAE, FeatureStats
from steersman.sae.config import SAEConfig
from steersman.sae.formats.source import Source
from steersman.sae.formats.tensors import Entry, TensorFile

_LARGEST, _LARGEST_FLOAT = 1 << 62, torch.finfo(torch.float32).max
"""Bounds of the numbers in configurations: what tensors can be sized by, and hold."""


@dataclass(kw_only=True)
class Parts:
    """An SAE as a format reads it: the configuration, and where each weight lies."""

    cfg: SAEConfig
    """The configuration."""
    tensors: dict[str, Entry]
    """The weights by their names in the SAE. `b_enc`, `b_dec` may be missing: they are zero then. A buffer, such as a
    threshold, may be one number where the SAE has one for each latent, and the other way round if all are equal."""
    file: TensorFile
    """The file they are in, for the check that nothing in it was overlooked."""
    ignored: frozenset[str] = frozenset()
    """Tensors of the file that change nothing: statistics, counters."""
    input_scale: float = 1.0
    """What the format's own code multiplies activations by before encoding; folded into the weights."""
    output_scale: float | None = None
    """What the training targets were multiplied by; None where it is `input_scale`."""
    fold_decoder_norm: bool = False
    """Whether the pre-activations are multiplied by the length of the decoder rows, and the code divided again."""
    threshold_by_decoder_norm: bool = False
    """Whether only the comparison with the threshold sees the pre-activations times the length of the decoder rows."""
    norms_in_file_units: bool = False
    """Whether these lengths are those of the rows in the file, not of the rows after `output_scale` is folded in."""
    decoder_factor: Entry | None = None
    """[L]: what the code is multiplied by before decoding."""
    constants: dict[str, float] = field(default_factory=dict)
    """Buffers that are one number for all latents and that the file does not hold."""
    stats: FeatureStats | None = None
    """Statistics of the features."""
    warnings: list[str] = field(default_factory=list)
    """What a user should know: one sentence each."""
    native: bool = False
    """Whether Steersman wrote it: the configuration then already says where it comes from."""


class Format(ABC):
    """One layout of SAE files. A subclass registers itself; the first that recognises the files reads them."""

    registry: ClassVar[Registry["Format"]] = Registry("format")
    name: ClassVar[str]
    """What `format=` calls it."""
    needs: ClassVar[str]
    """The files it needs, for the message about a folder that no format recognises."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Format.registry.register(cls, cls())

    @abstractmethod
    def matches(self, source: Source) -> bool:
        """Whether these files are of this format. Opens no more than small configuration files."""

    @abstractmethod
    def read(self, source: Source) -> Parts:
        """What the files hold. Raises SteersmanError for what is missing, malformed or not supported."""

    def write(self, sae: SAE, path: Path) -> None:
        """Write the SAE in this format. Raises SteersmanError for what the format cannot express."""
        raise SteersmanError(f"Steersman does not write the format {self.name}")


def recognise(source: Source, name: str | None = None) -> Format:
    """The format called `name`, or the one that the files are in."""
    if name is not None:
        return Format.registry[name]
    for known in Format.registry.values():
        if known.matches(source):
            return known
    raise SteersmanError(_unrecognised(source))


def _unrecognised(source: Source) -> str:
    folders = sorted({n.rsplit("/", 1)[0] for n in source.names if n.endswith(("/cfg.json", "/ae.pt", "/params.npz"))})
    hint = f"; SAEs may lie in its folders {', '.join(folders[:6])}: name one" if folders else ""
    needs = "; ".join(f"{known.name} needs {known.needs}" for known in Format.registry.values())
    return f"{source.label} holds no SAE that is recognised. Found: {source.describe()}{hint}. {needs}"


def build(parts: Parts, device: torch.device, dtype: torch.dtype) -> SAE:
    """The SAE, its weights read straight to where they stay: memory is the SAE and one block of a file."""
    sae = check(parts)
    parts.file.check()
    sae.to_empty(device=device)
    for parameter in sae.parameters():
        if parameter.dtype != dtype:
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    s_in = parts.input_scale
    s_out = s_in if parts.output_scale is None else parts.output_scale
    factors = {"W_enc": s_in, "W_dec": 1 / s_out, "b_dec": 1 / s_out, "W_skip": s_in / s_out}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            entry = parts.tensors.get(name)
            if entry is None:
                parameter.zero_()
            else:
                entry.scaled(factors.get(name, 1.0)).copy_into(parameter)
        for name, buffer in sae.named_buffers():
            _fill(buffer, name, parts, sae)
        if parts.decoder_factor is not None:
            sae.W_dec.mul_(parts.decoder_factor.read().to(sae.W_dec).reshape(-1, 1))
        norms = None
        if parts.fold_decoder_norm or parts.threshold_by_decoder_norm:
            norms = sae.W_dec.norm(dim=1, dtype=torch.float32).clamp_min_(1e-8)
            norms *= s_out if parts.norms_in_file_units else 1.0
        if norms is not None and parts.fold_decoder_norm:
            sae.W_dec.div_(norms[:, None])
            sae.W_enc.mul_(norms)
            sae.b_enc.mul_(norms)
        if norms is not None and parts.threshold_by_decoder_norm:
            assert isinstance(sae.threshold, Tensor)
            sae.threshold = sae.threshold / norms
    for name, parameter in sae.named_parameters():
        if not all(bool(bound.isfinite()) for bound in parameter.detach().aminmax()):
            raise SteersmanError(
                f"{parts.file.path}: {name} has values too large for {dtype} once scales are folded in"
            )
    sae.feature_stats = parts.stats
    return sae


def check(parts: Parts) -> SAE:
    """The SAE that the parts make, without its weights. Raises SteersmanError for tensors that do not fit it."""
    _check_names(parts)
    sae = without_weights(parts.cfg, parts.file.path)
    _check_shapes(parts, dict(sae.named_parameters()))
    factor = parts.decoder_factor
    if factor is not None and factor.shape not in ((), (1,), (parts.cfg.d_sae,)):
        raise SteersmanError(
            f"{parts.file.path}: {factor.name} has shape {list(factor.shape)}, it should have {parts.cfg.d_sae} numbers"
        )
    return sae


def _check_names(parts: Parts) -> None:
    used = {entry.name for entry in parts.tensors.values()} | parts.ignored
    if parts.decoder_factor is not None:
        used |= {parts.decoder_factor.name}
    extra = sorted(set(parts.file.headers) - used)
    if extra:
        raise SteersmanError(
            f"{parts.file.path} has tensors that an SAE of this kind does not have: {', '.join(extra[:6])}; it is not "
            "read, because leaving them out might change what it computes"
        )


def _check_shapes(parts: Parts, wanted: Mapping[str, Tensor]) -> None:
    optional = {"b_enc", "b_dec"}
    missing = sorted(name for name in wanted if name not in parts.tensors and name not in optional)
    if missing:
        raise SteersmanError(f"{parts.file.path} lacks the weights {', '.join(missing)}")
    for name, entry in parts.tensors.items():
        if name in wanted and entry.shape != tuple(wanted[name].shape):
            raise SteersmanError(
                f"{entry.file.path}: {entry.name} has shape {list(entry.shape)}, the configuration says "
                f"{list(wanted[name].shape)}"
            )


def _fill(buffer: Tensor, name: str, parts: Parts, sae: SAE) -> None:
    entry, per_latent = parts.tensors.get(name), (sae.cfg.d_sae,)
    if entry is None:
        if name not in parts.constants:
            raise SteersmanError(f"{parts.file.path} lacks the {name}")
        buffer.fill_(parts.constants[name])
    elif entry.shape in ((), (1,)):
        buffer.fill_(entry.number())
    elif entry.shape == (tuple(buffer.shape) or per_latent):
        values = torch.empty(entry.shape)
        entry.copy_into(values, allow_infinite=True)  # an infinite threshold switches a latent off
        if not buffer.ndim and bool((values != values[0]).any()):
            kind = sae.cfg.architecture
            raise SteersmanError(f"{parts.file.path}: a {kind} SAE has one {name}, not one a latent")
        buffer.copy_(values if buffer.ndim else values[0])
    else:
        wanted = list(buffer.shape or per_latent)
        raise SteersmanError(
            f"{entry.file.path}: {entry.name} has shape {list(entry.shape)}, the configuration says {wanted}"
        )


def without_weights(cfg: SAEConfig, path: Path) -> SAE:
    """The SAE of a configuration that the file `path` holds, its tensors without memory."""
    try:
        with torch.device("meta"):
            return SAE(cfg)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise SteersmanError(f"{path}: no SAE has widths {cfg.d_in} and {cfg.d_sae}") from error


def first_of(file: TensorFile, names: Iterable[str]) -> Entry:
    """The first of several names of the same tensor that the file has."""
    names = list(names)
    return file.entry(next((name for name in names if name in file), names[0]))


def matrix(entry: Entry) -> tuple[int, int]:
    """The shape of a matrix. Raises SteersmanError for anything else."""
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise SteersmanError(f"{entry.file.path}: {entry.name} has shape {list(entry.shape)}, it should be a matrix")
    return entry.shape[0], entry.shape[1]


def integer(value: Any, what: str, path: Path) -> int:
    """A whole number from a configuration. Raises SteersmanError for anything else."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or abs(value) > _LARGEST:
        raise SteersmanError(
            f"{path} is not a readable SAE configuration: {what} is {shown(value)}, not a whole number"
        )
    return int(value)


def positive(value: Any, what: str, path: Path) -> float:
    """A number above 0 from a configuration. Raises SteersmanError for anything else."""
    if not _is_number(value) or value <= 0:
        raise SteersmanError(f"{path}: {what} is {shown(value)}, not a positive number")
    return float(value)


def number(value: Any, what: str, path: Path) -> float:
    """A number from a configuration. Raises SteersmanError for anything else, and for one that fp32 cannot hold."""
    if not _is_number(value):
        raise SteersmanError(f"{path}: {what} is {shown(value)}, not a number")
    return float(value)


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= _LARGEST_FLOAT  # a NaN is not


def flag(fields: dict[str, Any], key: str, default: bool, path: Path) -> bool:
    """True or false from a configuration. Raises SteersmanError for anything else, such as the text "false"."""
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise SteersmanError(
            f"{path} is not a readable SAE configuration: {key} is {shown(value)}, it should be true or false"
        )
    return value


def section(fields: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """An object within a configuration, empty where there is none. Raises SteersmanError for anything else."""
    value = fields.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SteersmanError(f"{path} is not a readable SAE configuration: {key} is {shown(value)}, not an object")
    return value


def refuse(fields: dict[str, Any], plain: Mapping[str, tuple[Any, ...]], path: Path) -> None:
    """Raise SteersmanError where a key that changes what an SAE computes has another value than those in `plain`, which
    are the ones that mean nothing is changed. An absent key means nothing either."""
    for key, known in plain.items():
        value = fields.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in known):
            able = ", ".join(map(repr, known))
            raise SteersmanError(f"{path}: cannot read an SAE with {key} {shown(value)}; can read {able}")


def text(fields: dict[str, Any], key: str, default: str, path: Path) -> str:
    """A string of a configuration. Raises SteersmanError for anything else."""
    value = fields.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise SteersmanError(f"{path} is not a readable SAE configuration: {key} is {shown(value)}, not a name")
    return value


def with_metadata(cfg: SAEConfig, **entries: Any) -> SAEConfig:
    """The configuration with further provenance."""
    return replace(
        cfg, metadata={**cfg.metadata, **{key: value for key, value in entries.items() if value is not None}}
    )
