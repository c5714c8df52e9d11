"""What an SAE's files say, without building the SAE: for `steersman inspect`.

Shape letters: L latents, D width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steersman.files import format_bytes
from steersman.reading import one_error
from steersman.sae.config import SAEConfig, side_letter
from steersman.sae.formats.base import Parts, check, recognise
from steersman.sae.formats.source import Source, open_source
from steersman.sae.formats.tensors import Entry
from steersman.visible import visible


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An SAE as its files describe it."""

    source: str
    """What was named, and on the hub the commit."""
    format: str
    """Name of the format."""
    cfg: SAEConfig
    """The configuration it would be loaded with."""
    dtypes: tuple[str, ...]
    """Of the weights in the file."""
    n_bytes: int
    """Size of the weights in the file."""
    n_parameters: int
    """How many weights there are."""
    decoder_norms: tuple[float, float, float]
    """Smallest, median and largest length of the decoder rows, after what the format scales them by."""
    encoder_norms: tuple[float, float, float]
    """The same of the encoder's columns."""
    b_dec_norm: float
    """Length of the decoder bias."""
    warnings: tuple[str, ...]
    """What a user should know, one sentence each."""

    def to_text(self) -> str:
        """One line for each thing, aligned."""
        cfg = self.cfg
        kind = (
            cfg.architecture + (" transcoder" if cfg.transcoder else "") + (" with skip" if cfg.skip_connection else "")
        )
        widths = f"d_in {cfg.d_in:,}, d_sae {cfg.d_sae:,}" + (f", d_out {cfg.out_width:,}" if cfg.transcoder else "")
        hook = (cfg.hook_name or "not recorded") + (f" -> {cfg.hook_name_out or '?'}" if cfg.transcoder else "")
        lines = {
            "source": self.source,
            "format": self.format,
            "architecture": kind,
            "widths": widths,
            "k": str(cfg.k) if cfg.k else "not used",
            "groups": ", ".join(map(str, cfg.group_sizes)),
            "hook points": "; ".join(f"{side_letter(n)}: {side} [{side.width}]" for n, side in enumerate(cfg.sides)),
            "hook point": "" if cfg.sides else hook,
            "model": "" if cfg.sides else cfg.model_name or "not recorded",
            "b_dec": f"{'' if cfg.apply_b_dec_to_input else 'not '}subtracted from the input; "
            f"length {self.b_dec_norm:.4g}",
            "input": {"none": "as it is"}.get(cfg.input_norm, f"normalised: {cfg.input_norm}"),
            "weights": f"{self.n_parameters:,} ({', '.join(self.dtypes)}, {format_bytes(self.n_bytes)})",
            "|W_dec| rows": "min {:.4g}, median {:.4g}, max {:.4g}".format(*self.decoder_norms),
            "|W_enc| columns": "min {:.4g}, median {:.4g}, max {:.4g}".format(*self.encoder_norms),
        }
        width = max(map(len, lines))
        rows = [f"{name:<{width}}  {text}" for name, text in lines.items() if text]
        return "\n".join(map(visible, rows + [f"warning: {warning}" for warning in self.warnings]))


def inspect(path: str | Path, format: str | None = None) -> Inspection:
    """Look at the SAE at `path` (as `SAE.load` takes it). Weights are read once, block by block.

    Raises SteersmanError for what `SAE.load` would refuse because of its layout; values that are not finite are a
    warning here.
    """
    source = open_source(path)
    with one_error(source.label):
        return _inspect(source, format)


def _inspect(source: Source, format: str | None) -> Inspection:
    layout = recognise(source, format)
    parts = layout.read(source)
    check(parts)
    parts.file.check()
    where = source.label
    if "repo_id" in source.origin:
        where += f" at {source.origin['revision']}"
    scale = parts.input_scale if parts.output_scale is None else parts.output_scale
    decoder = row_norms(parts.tensors["W_dec"].scaled(1 / scale))
    encoder = row_norms(parts.tensors["W_enc"].T.scaled(parts.input_scale))
    used = {entry.name: entry.header for entry in parts.tensors.values()}
    bias = parts.tensors.get("b_dec")
    return Inspection(
        source=where,
        format=layout.name,
        cfg=parts.cfg,
        dtypes=tuple(sorted({str(header.dtype).removeprefix("torch.") for header in used.values()})),
        n_bytes=sum(header.n_bytes for header in used.values()),
        n_parameters=sum(header.n_bytes // header.dtype.itemsize for header in used.values()),
        decoder_norms=_spread(decoder),
        encoder_norms=_spread(encoder),
        b_dec_norm=0.0 if bias is None else float(bias.read().float().norm()) / scale,
        warnings=(*parts.warnings, *_warnings(parts, decoder, encoder)),
    )


def row_norms(entry: Entry) -> Tensor:
    """The lengths of the rows of a matrix [L, D] -> [L], read block by block however it is stored."""
    if not entry.transposed:
        return torch.cat([block.norm(dim=1) for block in entry.floats()])
    total = torch.zeros(entry.shape[0], dtype=torch.float64)
    for block in entry.floats():  # some of the columns, every row
        total += block.double().square().sum(dim=0)
    return total.sqrt().float()


def _spread(norms: Tensor) -> tuple[float, float, float]:
    return float(norms.min()), float(norms.median()), float(norms.max())


def _warnings(parts: Parts, decoder: Tensor, encoder: Tensor) -> list[str]:
    cfg, warnings = parts.cfg, []
    broken = int((~decoder.isfinite() | ~encoder.isfinite()).sum())
    if broken:
        warnings.append(f"{broken:,} latents have weights that are not finite: the SAE cannot be loaded")
    empty = int((decoder == 0).sum())
    if empty:
        warnings.append(f"{empty:,} latents have a decoder row of zeros")
    if parts.fold_decoder_norm:
        warnings.append("activations are ranked by decoder norm: loading makes the decoder rows unit vectors")
    elif not cfg.sides and not bool(((decoder - 1).abs() < 1e-2).all()):
        warnings.append("decoder rows are not unit vectors: activations of different features have different units")
    if not cfg.hook_name:
        warnings.append("no hook point is recorded: name it when steering")
    if not cfg.model_name:
        warnings.append("no model is recorded")
    if cfg.sides:
        warnings.append("a crosscoder reads all of its hook points at once; steering needs its decoder at one (at)")
    if cfg.transcoder:
        warnings.append("a transcoder encodes and decodes; steering needs an SAE that writes where it reads")
    return warnings
