"""Systems that are listed and cannot be built here, and why."""

from steersman.steer.presets.base import CODE, Preset


class DialogueActionTokens(Preset):
    name = "dialogue_action_tokens"
    title = "Dialogue action tokens"
    source = "arXiv 2406.11978, likenneth/dialogue_action_token 8f9b3da"
    mechanism = "none: a learned prefix and a planner trained by reinforcement learning"
    certainty = CODE
    values = {"action": "64 numbers, norm .6 and 1.0", "prefix": "2 embeddings behind the BOS", "planner": "TD3 + BC"}
    available = False
    not_covered = "it needs an environment with a judge and a planner trained in it, which are not part of this library"
