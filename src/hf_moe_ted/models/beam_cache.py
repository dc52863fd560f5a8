"""Keys and values of beam search that are never reordered: a mask says which beam a key belongs to.

All beams of a sentence write into one sequence of keys. A beam attends to the keys of its own past, wherever they are,
so to reorder beams is to reorder a small mask. All beams share the keys of the source.

Shape letters: B sentences, N beams of each, K keys, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

_ROOM = 16  # number of steps for which a new buffer has room
_WORTH_COMPACTING = 0.75  # compact if at most this share of the keys stays


class AppendedLayer(DynamicLayer):
    """Keys and values [B, H, K, D] at the beginning of buffers that have room for more."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, length, D] and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, length = self.get_seq_length(), key_states.shape[-2]
        if not self._buffers or past + length > self._buffers[0].shape[-2]:
            # the first keys are of a prompt or a source, to which one step or nothing is added
            self._grow(key_states, past + _ROOM * length if past else length)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past : past + length] = states
        self.keys, self.values = (buffer[:, :, : past + length] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, states: Tensor, num_keys: int) -> None:
        batch_size, num_heads, _, width = states.shape
        buffers = [states.new_empty(batch_size, num_heads, num_keys, width) for _ in range(2)]
        past = self.get_seq_length()
        for buffer, old in zip(buffers, self._buffers, strict=False):
            buffer[:, :, :past] = old[:, :, :past]
        self._buffers = buffers

    def keep(self, sentences: Tensor) -> None:
        """Keep only these sentences, int64."""
        past = self.get_seq_length()
        self._buffers = [buffer.index_select(0, sentences) for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :past] for buffer in self._buffers)

    def compact(self, keys_BK: Tensor) -> None:
        """Keep only these keys, int64[B, K] of each sentence, in this order."""
        past, (_, num_heads, _, width) = self.get_seq_length(), self._buffers[0].shape
        index = keys_BK[:, None, :, None].expand(-1, num_heads, -1, width)
        self._buffers = [buffer[:, :, :past].gather(2, index) for buffer in self._buffers]
        self.keys, self.values = self._buffers


class BeamCache(EncoderDecoderCache):
    """A cache with [`AppendedLayer`] for self-attention, and its mask.

    Attributes:
        attends_BNK: bool, the keys to which a beam attends.
    """

    def __init__(self, num_sentences: int, num_beams: int, prompt_length: int, device: torch.device):
        own, of_source = (Cache(layer_class_to_replicate=AppendedLayer) for _ in range(2))
        super().__init__(own, of_source)
        self.attends_BNK = torch.ones(num_sentences, num_beams, prompt_length, dtype=torch.bool, device=device)
        self._is_own_NN = torch.eye(num_beams, dtype=torch.bool, device=device)

    def continue_from(self, parents_BN: Tensor) -> None:
        """Let each beam continue from a beam of its sentence, with one more key, its own."""
        self._compact()
        past_BNK = self.attends_BNK.gather(1, parents_BN.unsqueeze(-1).expand(-1, -1, self.attends_BNK.shape[-1]))
        self.attends_BNK = torch.cat([past_BNK, self._is_own_NN.expand(len(past_BNK), -1, -1)], dim=-1)

    def keep(self, sentences: Tensor) -> None:
        """Keep only these sentences, int64."""
        self.attends_BNK = self.attends_BNK.index_select(0, sentences)
        layers: list[Any] = [*self.self_attention_cache.layers, *self.cross_attention_cache.layers]
        for layer in layers:
            layer.keep(sentences)

    def _compact(self) -> None:
        """From time to time, remove keys to which no beam attends any more; most of them are of beams that ended."""
        num_keys, num_beams = self.attends_BNK.shape[-1], self.attends_BNK.shape[1]
        if num_keys % (_ROOM * num_beams) >= num_beams:
            return
        is_used_BK = self.attends_BNK.any(dim=1)
        num_used = int(is_used_BK.sum(dim=1).max())
        if num_used > _WORTH_COMPACTING * num_keys:
            return
        keys_BK = is_used_BK.int().argsort(dim=1, descending=True, stable=True)[:, :num_used]
        self.attends_BNK = self.attends_BNK.gather(2, keys_BK.unsqueeze(1).expand(-1, num_beams, -1))
        layers: list[Any] = self.self_attention_cache.layers
        for layer in layers:
            layer.compact(keys_BK)


__all__ = ["AppendedLayer", "BeamCache"]
