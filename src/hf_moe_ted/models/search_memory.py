"""The memory of beam search on a GPU: tensors with fixed addresses, as CUDA graphs need them.

As in beam_cache.py, the beams of a sentence write into one sequence of keys, and a mask says which beam a key belongs
to. Here the key of the token at place p of beam n is at N * p + n, and everything that changes between steps is in
tensors.

Shape letters: B sentences, N beams of each, C candidates of each, L tokens, K = N * L keys, S source tokens, H heads,
D head width, E tokens that end a translation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from .beam_hypotheses import Hypotheses, Ranking

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer


@dataclass(frozen=True)
class MemorySize:
    """The sizes for which a memory has room.

    Attributes:
        num_sentences, num_beams: sizes of a batch.
        length: tokens of a translation, with its prompt.
        source_length: tokens of a source.
        num_candidates: continuations of each sentence that a step considers.
        num_ends: tokens that end a translation.
    """

    num_sentences: int
    num_beams: int
    length: int
    source_length: int
    num_candidates: int
    num_ends: int

    def with_room_for(self, other: "MemorySize") -> "MemorySize":
        """The larger of the two in each size."""
        return MemorySize(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class KeySize:
    """Size of keys and values of one layer: heads H, head width D, and their device and dtype."""

    num_layers: int
    num_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def allocate(self, num_sentences: int, num_keys: int) -> KeysAndValues:
        """Zeros, because keys to which no beam attends must be numbers, too."""
        shape = (num_sentences, self.num_heads, num_keys, self.width)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return [(zeros(), zeros()) for _ in range(self.num_layers)]


@dataclass
class Settings:
    """Values that a step reads and only the host writes.

    Attributes:
        divisors_L, possible_divisors_L: float32, divisors of sums of log-probabilities by length, and for the best
            scores that running beams can reach.
        stops_when_full_1: bool, `early_stopping=True`.
        last_place_1: int64, the place of the last token.
        ends_E: int64, tokens that end a translation.
        forbids_ends_1: bool, whether no end may come next.
        first_C: float32, 0 and -inf, the log-probabilities of the candidates of a row whose token is forced.
    """

    divisors_L: Tensor
    possible_divisors_L: Tensor
    stops_when_full_1: Tensor
    last_place_1: Tensor
    ends_E: Tensor
    forbids_ends_1: Tensor
    first_C: Tensor

    @classmethod
    def allocate(cls, size: MemorySize, device: torch.device) -> "Settings":
        first_C = torch.full((size.num_candidates,), -torch.inf, device=device)
        first_C[0] = 0.0
        return cls(
            divisors_L=torch.ones(size.length + 1, device=device),
            possible_divisors_L=torch.ones(size.length + 1, device=device),
            stops_when_full_1=torch.zeros(1, dtype=torch.bool, device=device),
            last_place_1=torch.zeros(1, dtype=torch.int64, device=device),
            ends_E=torch.zeros(size.num_ends, dtype=torch.int64, device=device),
            forbids_ends_1=torch.zeros(1, dtype=torch.bool, device=device),
            first_C=first_C,
        )

    def write(self, ranking: Ranking, ends: Sequence[int]) -> None:
        lengths = [max(length, ranking.prompt_length + 1) for length in range(len(self.divisors_L))]
        self.divisors_L.copy_(torch.tensor([ranking.divisor(length) for length in lengths]), non_blocking=True)
        self.possible_divisors_L.copy_(
            torch.tensor([ranking.best_divisor(length) for length in lengths]), non_blocking=True
        )
        self.stops_when_full_1.fill_(ranking.early_stopping is True)
        self.last_place_1.fill_(ranking.max_length - 1)
        self.ends_E.copy_(torch.tensor(ends), non_blocking=True)
        self.forbids_ends_1.fill_(False)

    def ranked(self, scores: Tensor, length: Tensor) -> Tensor:
        return scores / self.divisors_L.index_select(0, length)

    def best_possible(self, scores: Tensor, length: Tensor) -> Tensor:
        return scores / self.possible_divisors_L.index_select(0, length)

    def is_enough(self, has_ended_BN: Tensor) -> Tensor:
        return has_ended_BN.all(dim=1, keepdim=True) & self.stops_when_full_1


@dataclass
class SearchMemory:
    """The memory of one search, or a view of it for fewer sentences and keys.

    Attributes:
        settings: see [`Settings`].
        own, of_source: keys and values of self-attention [B, H, K, D] and cross-attention [B, H, S, D].
        mask_B1NK, source_mask_B1NS: in the dtype of keys, 0 for keys to which a beam attends, else the lowest number.
        hypotheses: see [`Hypotheses`]; its rows have as many columns as its tokens.
        is_done_B: bool, sentences whose translations cannot change any more.
        forced_B: int64, the token that must come next, -1 for none.
        last_BN: int64, the last tokens of the running beams.
        counters: int64: places of the next token, of its row, and of the keys of the last tokens of N beams; each step
            adds `steps` to them.
        goes_on_L: int32, for the place of each written token, whether any sentence continues.
        has_nan_1: bool, whether a logit was NaN.
    """

    settings: Settings
    own: KeysAndValues
    of_source: KeysAndValues
    mask_B1NK: Tensor
    source_mask_B1NS: Tensor
    hypotheses: Hypotheses
    is_done_B: Tensor
    forced_B: Tensor
    last_BN: Tensor
    counters: Tensor
    steps: Tensor
    goes_on_L: Tensor
    has_nan_1: Tensor

    @classmethod
    def allocate(cls, size: MemorySize, keys: KeySize) -> "SearchMemory":
        """Allocate everything except keys of self-attention, which depend on the length of translations."""
        num_sentences, num_beams, device = size.num_sentences, size.num_beams, keys.device
        least = torch.finfo(keys.dtype).min
        no_prompts = torch.zeros(num_sentences, 0, dtype=torch.int64, device=device)

        def masked(num_keys: int) -> Tensor:
            return torch.full((num_sentences, 1, num_beams, num_keys), least, dtype=keys.dtype, device=device)

        return cls(
            settings=Settings.allocate(size, device),
            own=[],
            of_source=keys.allocate(num_sentences, size.source_length),
            mask_B1NK=masked(num_beams * size.length),
            source_mask_B1NS=masked(size.source_length),
            hypotheses=Hypotheses.start(no_prompts, num_beams, size.length, fill=0),
            is_done_B=torch.zeros(num_sentences, dtype=torch.bool, device=device),
            forced_B=torch.full((num_sentences,), -1, dtype=torch.int64, device=device),
            last_BN=torch.zeros(num_sentences, num_beams, dtype=torch.int64, device=device),
            counters=torch.zeros(2 + num_beams, dtype=torch.int64, device=device),
            steps=torch.tensor([1, 1, *[num_beams] * num_beams], device=device),
            goes_on_L=torch.zeros(size.length, dtype=torch.int32, device=device),
            has_nan_1=torch.zeros(1, dtype=torch.bool, device=device),
        )

    @property
    def place_1(self) -> Tensor:
        return self.counters[:1]

    @property
    def row_place_1(self) -> Tensor:
        return self.counters[1:2]

    @property
    def keys_N(self) -> Tensor:
        return self.counters[2:]

    @property
    def num_beams(self) -> int:
        return self.last_BN.shape[1]

    def view(self, num_sentences: int, length: int, source_length: int, own: KeysAndValues) -> "SearchMemory":
        """A view of the first sentences, tokens and source tokens, with keys of self-attention for as many tokens."""
        num_beams, b = self.num_beams, num_sentences
        cut = {f.name: getattr(self.hypotheses, f.name)[:b] for f in fields(Hypotheses)}
        long = {name: tensor[:, :, :length] for name, tensor in cut.items() if name.endswith("_BNL")}
        return replace(
            self,
            own=[(keys[:b], values[:b]) for keys, values in own],
            of_source=[(keys[:b, :, :source_length], values[:b, :, :source_length]) for keys, values in self.of_source],
            mask_B1NK=self.mask_B1NK[:b, :, :, : num_beams * length],
            source_mask_B1NS=self.source_mask_B1NS[:b, :, :, :source_length],
            hypotheses=Hypotheses(**{**cut, **long}),
            is_done_B=self.is_done_B[:b],
            forced_B=self.forced_B[:b],
            last_BN=self.last_BN[:b],
        )

    def start(self, prompts_BL: Tensor, num_real: int, source_mask_BS: Tensor | None, source: int, fill: int) -> None:
        """Begin with prompts; those after the first `num_real` only pad the batch.

        Args:
            source_mask_BS: nonzero for source tokens without padding; `None` for all.
            source: number of source tokens.
            fill: the token after the end of a translation.
        """
        num_beams, length = self.hypotheses.running_BNL.shape[1:]
        start = Hypotheses.start(prompts_BL, num_beams, length, fill)
        is_filler_B = torch.arange(len(prompts_BL), device=prompts_BL.device) >= num_real
        start.may_improve_B1 = ~is_filler_B.unsqueeze(-1)
        prompt_length = prompts_BL.shape[1]
        for field in fields(Hypotheses):
            given = getattr(start, field.name)
            written = getattr(self.hypotheses, field.name)
            (written[:, :, : given.shape[2]] if given.ndim == 3 else written).copy_(given)
        least = torch.finfo(self.mask_B1NK.dtype).min
        self.mask_B1NK.fill_(least)
        self.source_mask_B1NS.fill_(least)
        counts = self.source_mask_B1NS[..., :source]
        if source_mask_BS is None:
            counts.fill_(0.0)
        else:
            counts.masked_fill_(source_mask_BS.bool()[:, None, None], 0.0)
        self.is_done_B.copy_(is_filler_B)
        self.forced_B.fill_(-1)
        self.last_BN.copy_(prompts_BL[:, -1:].expand_as(self.last_BN))
        keys = range(num_beams * (prompt_length - 1), num_beams * prompt_length)
        self.counters.copy_(torch.tensor([prompt_length, 0, *keys]), non_blocking=True)
        for beam, key in enumerate(keys):
            self.mask_B1NK[:, :, beam, key].fill_(0.0)
        self.goes_on_L.zero_()[prompt_length - 1].fill_(1)
        self.has_nan_1.zero_()

    def keep(self, index: Tensor) -> None:
        """Move sentences, int64[B'], to the first B' places."""
        tensors = [tensor for layers in (self.own, self.of_source) for layer in layers for tensor in layer]
        tensors += [getattr(self.hypotheses, field.name) for field in fields(Hypotheses)]
        tensors += [self.mask_B1NK, self.source_mask_B1NS, self.is_done_B, self.forced_B, self.last_BN]
        for tensor in tensors:
            tensor[: len(index)].copy_(tensor.index_select(0, index))


class FixedLayer(DynamicLayer):
    """Keys and values [B, H, K, D] in fixed memory; new ones are written at `places_1`, int64, one place each."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor):
        super().__init__()
        self.keys, self.values, self._places = keys, values, places
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, length, D] and return all."""
        self.keys.index_copy_(2, self._places, key_states)
        self.values.index_copy_(2, self._places, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0  # all keys are always returned; the mask says which count


class FixedCache(EncoderDecoderCache):
    """The keys of a memory as a cache.

    Args:
        places: int64, places at which a call writes the keys of its tokens.
        source_places: the same for keys of the source; `None` if they were written already.

    Attributes:
        attend: function that computes attention instead of the config's implementation, see `ZCodeM3Attention`; or
            `None`.
    """

    def __init__(self, memory: SearchMemory, places: Tensor, source_places: Tensor | None):
        of_source = places if source_places is None else source_places
        own, source = (
            Cache(layers=[FixedLayer(*layer, where) for layer in layers])
            for layers, where in ((memory.own, places), (memory.of_source, of_source))
        )
        super().__init__(own, source)
        self.is_updated = dict.fromkeys(range(len(memory.of_source)), source_places is None)
        self.attend: Callable[..., Tensor] | None = None


__all__ = ["FixedCache", "KeySize", "KeysAndValues", "MemorySize", "SearchMemory", "Settings"]
