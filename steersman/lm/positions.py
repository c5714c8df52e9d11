"""How many tokens a model has positions for, and where it starts to count them."""

import sys
from typing import Any

from torch import nn

_RULE = "create_position_ids_from_input_ids"
_LENGTHS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")


def own_offset(model: nn.Module) -> int:
    """The position of a text's first token as the model's table of positions has it: 0, but for RoBERTa and its kin,
    whose rows up to the padding's are no token's (`create_position_ids_from_input_ids`)."""
    table = _padded_table(model)
    return 0 if table is None else int(table.padding_idx) + 1


def context_length(model: nn.Module, config: Any) -> int | None:
    """Tokens that a text may have, or None where the configuration sets no limit."""
    length = next((int(n) for name in _LENGTHS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    table = _padded_table(model)
    if table is None:
        return length
    rows = int(getattr(table, "num_embeddings", None) or table.weight.shape[0]) - own_offset(model)
    return rows if length is None else min(length, rows)


def _padded_table(model: nn.Module) -> Any:
    """The table of positions of a model that counts them from the padding's row on, by that rule's one name."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Module) and isinstance(getattr(table, "padding_idx", None), int):
            home = sys.modules.get(type(module).__module__)
            if hasattr(module, _RULE) or hasattr(home, _RULE):
                return table
    return None
