"""`steersman ui`."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steersman.commands.options import ComputeOptions, features_file, hook_point, on_kernels
from steersman.config import setting
from steersman.errors import SteersmanError
from steersman.steer import EffectMap, Recipe
from steersman.ui.playground.security import is_local
from steersman.ui.playground.serving import address, bound, serve, token_for
from steersman.visible import visible

if TYPE_CHECKING:
    from steersman.ui.playground.app import Playground

log = logging.getLogger(__name__)

PORT = 8421


@dataclass(frozen=True, kw_only=True)
class UiCommand(ComputeOptions):
    """Serve a page on which a model is steered and looked at: prompts and chats, features and vectors, steered and
    plain text side by side. From this machine alone, unless --host says otherwise; then only with a token."""

    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder, file or hub id of the SAE."""
    labels: str | None = None
    """File of feature labels, over those beside the SAE: labels.jsonl, or an export of Neuronpedia's explanations."""
    features: str | None = None
    """File that `steersman features` wrote, for contexts and tokens; by default features.json in the SAE's folder."""
    vector: tuple[str, ...] = ()
    """Vector file that interventions may name; several may be given."""
    effects: str | None = None
    """Folder of `steersman effects`, or the file of a map, for vectors that aim at features (SAE-TS)."""
    recipe: str | None = None
    """Recipe file (YAML) to begin with."""
    hook: str | None = None
    """Hook point, for an SAE that records none."""
    layer: int | None = None
    """Layer in place of --hook: the state after it, counted from 0; -1 is the last."""
    host: str = setting("127.0.0.1", identity=False)
    """Address to serve at: 127.0.0.1, this machine alone; 0.0.0.0, all of its addresses, with a token."""
    port: int = setting(PORT, identity=False)
    """Port to serve at; 0 for any that is free."""
    token: bool = setting(False, identity=False)
    """Ask for a token on this machine too, which others may share."""
    host_name: tuple[str, ...] = setting((), identity=False)
    """Further name that the server answers to, such as that of a proxy; several may be given."""


@on_kernels
def run(config: UiCommand) -> None:
    """`steersman ui`."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise SteersmanError(f"steersman ui needs {package}: install the extra ui, pip install 'steersman[ui]'")
    opened = bound(config.host, config.port)
    try:
        token = token_for(config.host, config.token)
        log.info("loading %s and %s", config.model, config.sae)
        playground = loaded(config, token)
        print(visible(f"playground: {address(config.host, opened, token)}"), flush=True)
        if not is_local(config.host):
            print("whoever has this address can use the model; the connection is not encrypted", flush=True)
        print("Ctrl-C ends it", flush=True)
        serve(playground, opened)
    finally:
        opened.close()


def loaded(config: UiCommand, token: str | None = None) -> "Playground":
    """The application with what the settings name."""
    from steersman.ui.playground.app import Playground
    from steersman.ui.playground.catalogue import Catalogue
    from steersman.ui.playground.engine import Engine
    from steersman.ui.playground.sharing import state_of

    recipe = None if config.recipe is None else Recipe.load(config.recipe)
    sae = config.load_sae(config.sae, config.labels)
    options = {name: getattr(config, name) for name in ("device", "dtype", "revision", "bos")}
    usual = ComputeOptions()
    engine = Engine(
        lm=config.load_model(config.model),
        sae=sae,
        model_source=config.model,
        sae_source=config.sae,
        load_options={name: value for name, value in options.items() if value != getattr(usual, name)},
        given_hook=hook_point(config.hook, config.layer, config.model, config.revision),
        effects=None if config.effects is None else EffectMap.load(config.effects),
        effects_source=config.effects or "",
    )
    for path in config.vector:
        engine.add_vector(Path(path))
    start = None if recipe is None else state_of(engine, recipe, may_open=True)
    if start is not None:
        engine.check(start)
    catalogue = Catalogue(engine, features_file(config.sae, config.features))
    return Playground(engine, catalogue, start=start, host=config.host, token=token, names=config.host_name)
