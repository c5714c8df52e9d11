"""A state as what others can run: Python, a command, a recipe; and a recipe as a state."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.steer.recipe import Entry, FeaturesEntry, Options, Place, Recipe, VectorEntry, template_of
from steersman.ui.playground.engine import Engine, groups
from steersman.ui.playground.state import FeatureDial, State, VectorDial, state_from

NOTES = "playground"
"""Key of a recipe's metadata under which the prompt and the settings stand."""
SHARED_OPTIONS = ("scale", "scope", "include_bos")
"""Options of a recipe's edit that an intervention has."""


class Elsewhere(Place):
    """For a recipe that goes to another folder, or comes from one: paths are as they stand, and nothing is opened."""

    def __init__(self) -> None:
        super().__init__(Path())

    def path(self, text: str) -> str:
        return text

    def text(self, path: str) -> str:
        return path


def whole(source: str) -> str:
    """A path in full; what is none, such as a hub id, as it is."""
    try:
        return str(Path(source).resolve()) if Path(source).exists() else source
    except (OSError, ValueError):  # no name that a file could have
        return source


# To recipes and back


def recipe_of(engine: Engine, state: State) -> Recipe:
    """The interventions as a recipe, with the prompt and the settings in its metadata. Raises SteersmanError where
    there is none."""
    if not state.interventions:
        raise SteersmanError("there is nothing to steer by yet: add a feature or a vector")
    entries: list[Entry] = []
    for group in groups(state.interventions):
        first = group[0]
        options = Options(scope=first.scope, include_bos=first.include_bos or None)
        if isinstance(first, VectorDial):
            options = dataclasses.replace(options, scale=first.strength)
            entries.append(VectorEntry({"file": _file(engine, first.name)}, options=options))
            continue
        ids = {dial.id: dial.strength for dial in group if isinstance(dial, FeatureDial)}
        how = {"ids": ids, "mode": first.mode, "units": first.units, "hook": engine.given_hook}
        entries.append(FeaturesEntry({"sae": whole(engine.sae_source), **how}, options=options))
    record = state.record()
    notes = {name: record[name] for name in record if name != "interventions"}
    return Recipe(entries, model=engine.lm.name, template=template_of(engine.lm), metadata={NOTES: notes})


def state_of(engine: Engine, recipe: Recipe, *, may_open: bool = False) -> State:
    """The state that a recipe holds; `may_open` loads the vectors that it names from their files.

    Raises SteersmanError for another model or SAE, and for what the panel has no intervention for.
    """
    recipe.check(engine.lm)
    if recipe.target_kl is not None:
        raise SteersmanError("the recipe says target_kl, which the playground does not search for: give it a scale")
    dials: list[dict[str, Any]] = []
    for i, entry in enumerate(recipe.edits, 1):
        dials += _dials(engine, recipe, entry, f"edit {i} of the recipe", may_open)
    notes = recipe.metadata.get(NOTES, {})
    notes = dict(notes) if isinstance(notes, Mapping) else {}
    if "prompt" not in notes and "messages" not in notes:
        notes["prompt"] = ""
    return state_from({**notes, "interventions": dials}, where="recipe")


def files_of(engine: Engine, state: State) -> list[str]:
    """Vectors of a state that were made here, and so are in no file yet."""
    names = [dial.name for dial in state.interventions if isinstance(dial, VectorDial)]
    return [name for name in dict.fromkeys(names) if engine.vector(name).path is None]


def _dials(engine: Engine, recipe: Recipe, entry: Entry, where: str, may_open: bool) -> list[dict[str, Any]]:
    options, settings = entry.options, entry.settings
    for option in dataclasses.fields(Options):
        if option.name not in SHARED_OPTIONS and getattr(options, option.name) != option.default:
            raise SteersmanError(f"{where} has a {option.name}, which no intervention of the playground has")
    factor = recipe.scale * options.scale
    bos = recipe.include_bos if options.include_bos is None else options.include_bos
    shared = {"scope": options.scope or recipe.scope, "include_bos": bos}
    if getattr(settings, "hook", None) not in (None, engine.given_hook):
        raise SteersmanError(f"{where} is at hook point {settings.hook!r}, and the playground is at {engine.hook}")
    if isinstance(entry, VectorEntry):
        name = _vector_name(engine, settings.file, where, may_open)
        return [{"kind": "vector", "name": name, "strength": factor, **shared}]
    if not isinstance(entry, FeaturesEntry):
        raise SteersmanError(f"{where} is a {entry.name}, and the playground has features and vectors alone")
    if whole(settings.sae) != whole(engine.sae_source):
        raise SteersmanError(f"{where} is of the SAE {settings.sae!r}, and the playground has {engine.sae_source!r}")
    if factor != 1 and settings.mode != "add":
        raise SteersmanError(f"{where} scales mode {settings.mode!r} by {factor:g}: an intervention cannot")
    how = {"mode": settings.mode, "units": settings.units, **shared}
    strengths = {j: s * factor if isinstance(s, int | float) else s for j, s in settings.ids.items()}
    return [{"kind": "feature", "id": j, "strength": s, **how} for j, s in strengths.items()]


def _vector_name(engine: Engine, file: str, where: str, may_open: bool) -> str:
    if may_open:
        return engine.add_vector(Path(file))
    for name, known in engine.vectors.items():
        if file == f"{name}.safetensors" or (known.path is not None and file in (str(known.path), known.path.name)):
            return name
    raise SteersmanError(f"{where} names the vector {file!r}, which is not loaded: start with --vector {file}")


def _file(engine: Engine, name: str) -> str:
    """The file of a vector; of one that was made here, the name it is downloaded under."""
    path = engine.vector(name).path
    return f"{name}.safetensors" if path is None else str(path)


# As Python


def python_of(engine: Engine, state: State) -> str:
    """A program that generates the steered text."""
    names = ["LanguageModel"]
    options = "".join(f", {name}={value!r}" for name, value in engine.load_options.items())
    lines = [f"lm = LanguageModel.load({whole(engine.model_source)!r}{options})"]
    if any(isinstance(dial, FeatureDial) for dial in state.interventions):
        names.append("SAE")
        lines.append(f"sae = SAE.load({whole(engine.sae_source)!r}, lm.device)")
    contexts = []
    if state.interventions:
        names.append("Steerer")
        lines.append("st = Steerer(lm)")
    made = files_of(engine, state)
    if made:
        names.append("EffectMap")
        lines.append(f"effects = EffectMap.load({whole(engine.effects_source)!r})")
    for group in groups(state.interventions):
        first = group[0]
        where = f"scope={first.scope!r}" + (", include_bos=True" if first.include_bos else "")
        if isinstance(first, VectorDial):
            known = engine.vector(first.name)
            if known.path is None:
                vector = f"effects.solve({dict(known.made_of)!r})"
            else:
                vector = f"SteeringVector.load({str(known.path)!r})"
                names += ["SteeringVector"] if "SteeringVector" not in names else []
            contexts.append(f"st.vector({vector}, scale={first.strength!r}, {where})")
            continue
        ids = {dial.id: dial.strength for dial in group if isinstance(dial, FeatureDial)}
        hook = "" if engine.given_hook is None else f", hook={engine.given_hook!r}"
        contexts.append(f"st.features(sae, {ids!r}, mode={first.mode!r}, units={first.units!r}, {where}{hook})")
    settings = ", ".join(f"{name}={value!r}" for name, value in state.generation.settings().items())
    if state.is_chat:
        lines.append(f"messages = {state.prompt!r}")
        written = f"print(lm.chat(messages, {settings}).completions[0])"
    else:
        written = f"print(lm.generate({state.prompt!r}, {settings}).completions[0])"
    if not contexts:
        lines.append(written)
    elif len(contexts) == 1:
        lines += [f"with {contexts[0]}:", f"    {written}"]
    else:
        lines += ["with (", *(f"    {context}," for context in contexts), "):", f"    {written}"]
    head = f"from steersman import {', '.join(sorted(names, key=str.casefold))}"
    return "\n".join([head, "", *lines]) + "\n"


# As a command


def command_of(engine: Engine, state: State) -> str | None:
    """A command for a POSIX shell that generates the steered text and the plain one; None where nothing steers."""
    if not state.interventions:
        return None
    before = [_target_command(engine, name) for name in files_of(engine, state)]
    words = ["steersman", "steer", "--model", whole(engine.model_source)]
    words += _load_flags(engine.load_options)
    flags = _flags(engine, state)
    if flags is None:
        before.append(_here("recipe.yaml", _bare_recipe(engine, state)))
        flags = ["--recipe", "recipe.yaml"]
    words += flags
    prompt, lines = _prompt(state)
    before += lines
    words += prompt
    w = state.generation
    words += ["--max-new-tokens", str(w.max_new_tokens)]
    if w.temperature > 0:
        words += ["--temperature", repr(w.temperature), "--seed", str(w.seed)]
        words += [] if w.top_p is None else ["--top-p", repr(w.top_p)]
    return "\n".join([*before, _wrapped(words)]) + "\n"


def _flags(engine: Engine, state: State) -> list[str] | None:
    """The interventions as flags of `steersman steer`, which opens features first and has one scope for all; None
    where that is not what the state says."""
    edits = list(groups(state.interventions))
    firsts = [group[0] for group in edits]
    places = {(dial.scope, dial.include_bos) for dial in firsts}
    if len(places) > 1 or any(isinstance(dial, FeatureDial) for dial in firsts[1:]):
        return None
    words: list[str] = []
    first = firsts[0]
    if isinstance(first, FeatureDial):
        words += ["--sae", whole(engine.sae_source)]
        words += [] if engine.given_hook is None else ["--hook", engine.given_hook]
        for dial in edits[0]:
            words += ["--feature", f"{dial.id}={dial.strength!r}"] if isinstance(dial, FeatureDial) else []
        words += ["--mode", first.mode, "--units", first.units]
    for dial in firsts:
        words += ["--vector", f"{_file(engine, dial.name)}={dial.strength!r}"] if isinstance(dial, VectorDial) else []
    return [*words, "--scope", first.scope, *(["--include-bos"] if first.include_bos else [])]


def _prompt(state: State) -> tuple[list[str], list[str]]:
    """The flags of the prompt, and the lines that write a file for it where a flag would not do."""
    chat: list[str] = []
    text = state.prompt
    if not isinstance(text, str):
        contents = {message["role"]: message["content"] for message in text}
        if [message["role"] for message in text] not in (["user"], ["system", "user"]):
            return ["--prompts", "prompt.jsonl"], [_here("prompt.jsonl", json.dumps({"messages": text}) + "\n")]
        chat = ["--chat"] + (["--system", contents["system"]] if "system" in contents else [])
        text = contents["user"]
    if all(part.isprintable() and not part.startswith("-") for part in (text, *chat[2:])):
        return [*chat, "--prompt", text], []
    record: dict[str, Any] = {"messages": state.prompt} if state.is_chat else {"text": state.prompt}
    return ["--prompts", "prompt.jsonl"], [_here("prompt.jsonl", json.dumps(record) + "\n")]


def _bare_recipe(engine: Engine, state: State) -> str:
    recipe = recipe_of(engine, state)
    recipe.metadata = {}
    return recipe.to_yaml(Elsewhere())


def _target_command(engine: Engine, name: str) -> str:
    weights = engine.vector(name).made_of
    words = ["steersman", "target", "--effects", whole(engine.effects_source)]
    for feature, weight in weights.items():
        words += ["--feature", f"{feature}={weight!r}"]
    return _wrapped([*words, "--out", f"{name}.safetensors"])


def _load_flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        words += ["--no-bos"] if name == "bos" else [f"--{name}", str(value)]
    return words


def _here(file: str, text: str) -> str:
    """The lines of a shell that write a file."""
    end = "END"
    while end in text:
        end += "_"
    return f"cat > {shlex.quote(file)} <<'{end}'\n{text}{end}"


def _wrapped(words: Sequence[str]) -> str:
    """A command over several lines, a flag and its value on each."""
    lines: list[list[str]] = [[]]
    for i, word in enumerate(words):
        if word.startswith("--") and i > 2:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines)
