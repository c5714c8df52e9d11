"""Keys and values in buffers that are kept from one batch to the next, where `generate` copies them for each token."""

from typing import Any

from torch import Tensor


def _buffer_layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class BufferLayer(DynamicLayer):
        """Keys and values of one layer as views into buffers with room for all tokens to come.

        The buffers are [room, B, heads, head width]: a token is written in one piece, and read fastest so.
        """

        def __init__(self, room: int) -> None:
            super().__init__()
            self.room = room
            self._store: tuple[Tensor, Tensor] | None = None

        def take(self, layer: Any, index: Tensor) -> "BufferLayer":
            """Start anew with rows `index` of what `layer` holds."""
            self.lazy_initialization(layer.keys, layer.values)
            rows, (_, heads, length, _) = len(index), layer.keys.shape
            if self._store is None or self._store[0].shape[1] < rows:
                self._store = (
                    layer.keys.new_empty(self.room, rows, heads, layer.keys.shape[-1]),
                    layer.values.new_empty(self.room, rows, heads, layer.values.shape[-1]),
                )
            for kept, given in zip(self._store, (layer.keys, layer.values)):
                kept[:length, :rows] = given.permute(2, 0, 1, 3)[:, index]
            self._show(rows, length)
            return self

        def _show(self, rows: int, length: int) -> None:
            assert self._store is not None
            self.keys, self.values = (kept[:length, :rows].permute(1, 2, 0, 3) for kept in self._store)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            assert self._store is not None
            assert self.keys is not None
            rows, old = self.keys.shape[0], self.keys.shape[2]
            end = old + key_states.shape[2]
            self._store[0][old:end, :rows] = key_states.permute(2, 0, 1, 3)
            self._store[1][old:end, :rows] = value_states.permute(2, 0, 1, 3)
            self._show(rows, end)
            assert self.values is not None
            return self.keys, self.values

    return BufferLayer


class RowBuffers:
    """Room for the keys and values of the rows of a batch, kept from one batch to the next; samplers may share it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._layers: list[Any] = []

    def rows(self, i: int, layer: Any, index: Tensor) -> Any:
        """A cache layer that continues rows `index` of layer number `i` of a model."""
        from transformers.cache_utils import DynamicLayer

        if type(layer) is not DynamicLayer:  # sliding windows and other kinds keep their own rules
            layer.reorder_cache(index)
            return layer
        while len(self._layers) <= i:
            self._layers.append(_buffer_layer_class()(self.room))
        return self._layers[i].take(layer, index)
