"""Edits in files: safetensors whose header says which edits, at which hook points, in which scope, and where they come
from.

The rules: the header's metadata holds `format` = `steersman.edits`, `version` = `1` and `contents`, a JSON object
with `edits` (hook point -> {"name", "settings"}), `scope`, `include_bos`, `model_name`, `method` and `metadata`. The
tensors of the edit at a hook point stand under `<hook point>/`. A file with another format or a later version is
refused, and so is an edit that no class is known for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_fits
from steersman.reading import parse_json
from steersman.steer.edits.base import EDITS, Edit, Saved, packed, unpacked
from steersman.tensor_files import check_format, load_tensors, save_tensors

FORMAT, VERSION = "steersman.edits", 1


@dataclass(frozen=True, kw_only=True, eq=False)
class EditSet(Mapping[str, Edit]):
    """Edits by hook point with what should be known about them: a mapping, so that whatever takes {hook point: edit}
    (`calibrate`, `evaluate_steering`, `steered`) takes it.
    """

    edits: Mapping[str, Edit]
    """Hook point -> edit."""
    scope: str = "all"
    """The tokens they are meant for, as `Scope.of` reads it."""
    include_bos: bool = False
    """Whether they are meant for the beginning-of-sequence token too."""
    model_name: str = ""
    """The model they were made for; empty for any."""
    method: str = ""
    """What made them."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Source, settings, figures: whatever JSON can hold."""

    def __getitem__(self, hook: str) -> Edit:
        return self.edits[hook]

    def __iter__(self) -> Iterator[str]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def __repr__(self) -> str:
        edits = ", ".join(f"{edit.name or type(edit).__name__} at {hook}" for hook, edit in self.edits.items())
        return f"EditSet({self.method or 'edits'}: {edits}; {self.model_name or 'any model'})"

    def check_fits(self, lm: LanguageModel) -> None:
        """Raise SteersmanError for another model or one without these hook points."""
        for hook in self.edits:
            check_fits(lm, what="this edit", model_name=self.model_name, hook_name=hook, width=None)

    def with_edits(self, edits: Mapping[str, Edit]) -> "EditSet":
        """The same about other edits."""
        return replace(self, edits=dict(edits))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the safetensors file `path`, whole or not at all. Raises SteersmanError for an edit that cannot be."""
        if not self.edits:
            raise SteersmanError("there is no edit to save")
        saved = packed(self.edits)
        contents = {
            "edits": saved.settings,
            "scope": self.scope,
            "include_bos": self.include_bos,
            "model_name": self.model_name,
            "method": self.method,
            "metadata": dict(self.metadata),
        }
        header = {"format": FORMAT, "version": str(VERSION), "contents": json.dumps(contents)}
        save_tensors(path, {name: tensor.detach() for name, tensor in saved.tensors.items()}, header)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "EditSet":
        """Read the file `path`. Raises SteersmanError that names it where it holds no edits."""
        path = Path(path)
        tensors, header = load_tensors(path)
        check_format(path, header, FORMAT, VERSION, "edits")
        try:
            known = parse_json(header["contents"], f"{path}: the contents in its header")
            saved = Saved(known["edits"], tensors)
            if not known["edits"]:
                raise ValueError("no edit")
            edits = {hook: unpacked(saved, hook, EDITS) for hook in known["edits"]}
            about = {name: known[name] for name in ("scope", "include_bos", "model_name", "method", "metadata")}
        except SteersmanError as error:
            raise SteersmanError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise SteersmanError(f"{path}: the edits in it cannot be read ({error!r})") from error
        if [type(value) for value in about.values()] != [str, bool, str, str, dict]:
            raise SteersmanError(f"{path}: the contents in its header have values of the wrong type")
        return cls(edits=edits, **about)
