"""Beam search and greedy search whose steps are CUDA graphs, with the same tokens and scores as in transformers.

A step is everything between two tokens: decoder, logits, the best candidates and the update of beams. It runs on memory
with fixed addresses (`SearchMemory`), with one graph per number of sentences and of tokens, from a few fixed sizes. The
host reads one flag per sentence, a step late, so it never waits for a step. Sentences that are done do not change any
more. Once half of them are done, the others move to a smaller graph.

Shape letters as in search_memory.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

from .beam_hypotheses import Hypotheses, Ranking, together
from .beam_search import ACTIVE_AT, SometimesActive, number_of_candidates, output_of
from .decoding_step import decoding_step, read_prompts
from .graph_store import GraphStore, on_device, power_of_two, recorded, rung
from .search_memory import FixedCache, KeysAndValues, KeySize, MemorySize, SearchMemory

BY_DEFAULT = True  # whether searches on a GPU are captured if `cuda_graphs` is not set
DEVICES: tuple[str, ...] = ("cuda",)
_MAX_MEMORIES = 4  # kept for each model, of different numbers of beams, and that of the encoder
_LEAST_LENGTH, _LEAST_SOURCE = 32, 16  # numbers of keys are multiples of 16, as kernels of masked attention want them
_FORBID_THE_END = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
_FORCE_A_TOKEN = (ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor)


def why_not_captured(
    config: Any, generation_config: Any, logits_processor: Any, stopping_criteria: Any, inputs: Tensor
) -> str | None:
    """Why steps cannot be captured, in addition to the reasons of `why_not` and `store_of`; `None` if they can."""
    num_sentences = len(inputs) // generation_config.num_beams
    reasons = {
        "scores of all words": generation_config.output_scores and generation_config.return_dict_in_generate,
        "processors of logits": not all(_is_known(processor, num_sentences) for processor in logits_processor),
        "a token forced before an end is forbidden": _forbids_behind_forced(logits_processor),
        "stopping criteria": any(type(c) not in (MaxLengthCriteria, EosTokenCriteria) for c in stopping_criteria),
        "more tokens than positions": generation_config.max_length > config.max_position_embeddings,
        "padding in prompts": inputs.shape[1] > 1 and bool((inputs == config.pad_token_id).any()),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _is_known(processor: Any, num_sentences: int) -> bool:
    if isinstance(processor, SometimesActive):
        return processor.forced is not None and len(processor.forced) in (0, num_sentences)
    if isinstance(processor, ForcedEOSTokenLogitsProcessor):
        return processor.eos_token_id.numel() == 1
    return type(processor) in (*_FORBID_THE_END, *_FORCE_A_TOKEN)


def _forbids_behind_forced(processors: Any) -> bool:
    is_forced = False
    for processor in processors:
        if isinstance(processor, _FORBID_THE_END) and is_forced:
            return True
        is_forced |= isinstance(processor, _FORCE_A_TOKEN) or bool(getattr(processor, "forced", None))
    return False


@dataclass(frozen=True)
class _Search:
    """The parts of a search that do not change between steps.

    Attributes:
        num_candidates: candidates per sentence.
        source: hidden states float[B, S, D] of the encoder, and the mask [B, S] of its tokens.
        fill: token after an end.
    """

    model: Any
    store: GraphStore
    processors: Any
    ranking: Ranking
    num_beams: int
    num_candidates: int
    ends: tuple[int, ...]
    source: Tensor
    source_mask: Tensor | None
    fill: int


def captured_search(
    model: Any,
    store: GraphStore,
    input_ids: Tensor,
    logits_processor: Any,
    generation_config: Any,
    watch: Callable[[Tensor], None],
    **model_kwargs: Any,
) -> Any:
    """Like `GenerationMixin._beam_search`, or `_sample` for one beam, if there is no reason against it.

    Args:
        watch: gets a number that is NaN if a logit was NaN.

    Returns:
        What these return; `None` if the memory of the device is too small or steps cannot be recorded, with one
        warning.
    """
    options = generation_config
    num_beams, prompts_BL = options.num_beams, input_ids[:: options.num_beams]
    is_greedy = num_beams == 1  # then a translation stops at its first end
    # on the host as given, because reading them from the device would wait
    ends = _numbers(options.eos_token_id, options._eos_token_tensor)
    [pad] = _numbers(options.pad_token_id, options._pad_token_tensor) or ends[:1] or [-1]
    if ends and pad == 0 and not is_greedy:
        pad = ends[0]  # transformers' beam search treats a pad token of 0 as none
    mask = model_kwargs.get("attention_mask")
    with on_device(input_ids.device):
        search = _Search(
            model=model,
            store=store,
            processors=[p for p in logits_processor if getattr(p, "forced", None) != ()],
            ranking=Ranking(
                0.0 if is_greedy else options.length_penalty,
                True if is_greedy else options.early_stopping,
                input_ids.shape[1],
                options.max_length,
            ),
            num_beams=num_beams,
            num_candidates=number_of_candidates(num_beams, len(ends)),
            ends=tuple(ends),
            source=model_kwargs["encoder_outputs"][0][::num_beams],
            source_mask=None if mask is None else mask[::num_beams].to(input_ids.device),
            fill=pad if ends else -1,
        )
        found = recorded(store, "search", lambda: _found(search, prompts_BL, watch))
    return None if found is None else output_of(options, found, input_ids.shape[1])


def _numbers(given: Any, tensor: Tensor | None) -> list[int]:
    """Token ids of a generation config, which may have one, several or none."""
    if isinstance(given, int):
        return [given]
    if isinstance(given, list | tuple):
        return [int(number) for number in given]
    return [] if tensor is None else tensor.flatten().tolist()


def _found(search: _Search, prompts_BL: Tensor, watch: Callable[[Tensor], None]) -> Hypotheses:
    run = _Run(search, prompts_BL)
    found = run.until_all_are_done()
    watch(torch.where(run.memory.has_nan_1, torch.nan, 0.0))
    return found


class _Run:
    """One search on the memory of a store.

    Attributes:
        memory: see [`SearchMemory`].
        view: the part of it that is in use.
    """

    def __init__(self, search: _Search, prompts_BL: Tensor):
        self.search = search
        self.num_sentences, self.length = prompts_BL.shape  # number of tokens so far
        ranking, source = search.ranking, search.source
        self.source_length = rung(source.shape[1], _LEAST_SOURCE)
        wanted = MemorySize(
            num_sentences=rung(self.num_sentences),
            num_beams=search.num_beams,
            length=power_of_two(ranking.max_length, _LEAST_LENGTH),
            source_length=self.source_length,
            num_candidates=search.num_candidates,
            num_ends=max(1, len(search.ends)),
        )
        self.graphed = _graphed_memory(search, wanted)
        self.memory = self.graphed.memory
        # the number of the sentence in each place; None for a copy that pads the batch
        self.numbers: list[int | None] = [*range(self.num_sentences)]
        self.numbers += [None] * (wanted.num_sentences - self.num_sentences)
        self._set_width(power_of_two(self.length + 1, _LEAST_LENGTH))
        self._start(prompts_BL)

    def _set_width(self, width: int) -> None:
        """Use a view of so many tokens of the current sentences."""
        self.width = width
        own = self.graphed.own(width)
        self.view = self.memory.view(len(self.numbers), width, self.source_length, own)

    def _start(self, prompts_BL: Tensor) -> None:
        search, memory = self.search, self.memory
        memory.settings.write(search.ranking, search.ends or (-1,))
        # with the largest possible width
        whole = memory.view(len(self.numbers), len(memory.settings.divisors_L) - 1, self.source_length, [])
        places = [0 if number is None else number for number in self.numbers]
        index_B = _on_device(places, memory)
        mask_BS = None if search.source_mask is None else search.source_mask.index_select(0, index_B)
        source_length = search.source.shape[1]
        whole.start(prompts_BL.index_select(0, index_B), self.num_sentences, mask_BS, source_length, search.fill)
        source_BSD = search.source.index_select(0, index_B)
        cache = FixedCache(whole, memory.keys_N, torch.arange(source_length, device=source_BSD.device))
        for layer in search.model.model.decoder.layers:
            layer.encoder_attn.keys_and_values_of_source(source_BSD, cache)
        if self.length > 1:
            read_prompts(search.model, self.view, self.length - 1)

    def until_all_are_done(self) -> Hypotheses:
        left: list[Hypotheses] = []
        lookout = _Lookout(self.memory.is_done_B)
        while self.length < self.search.ranking.max_length:
            self._widen()
            self._step()
            self.length += 1
            is_done = lookout.look(len(self.numbers))
            if is_done is None:
                continue
            going_on = [place for place, done in enumerate(is_done) if not done]
            if not going_on:
                break
            if 2 * len(going_on) <= len(self.numbers):
                left.append(self._kept([place for place, done in enumerate(is_done) if done]))
                self._shrink(going_on)
                lookout = _Lookout(self.memory.is_done_B)
        left.append(self._kept(range(len(self.numbers))))
        return together(left)

    def _widen(self) -> None:
        """Make room for one more token."""
        width = power_of_two(self.length + 1, _LEAST_LENGTH)
        if width == self.width:
            return
        num_keys, size = self.width * self.search.num_beams, len(self.numbers)
        for wide, narrow in zip(self.graphed.own(width), self.graphed.own(self.width), strict=True):
            for to, of in zip(wide, narrow, strict=True):
                to[:size, :, :num_keys].copy_(of[:size])
        self._set_width(width)

    def _step(self) -> None:
        search, view = self.search, self.view
        self._apply_processors(view)
        key = (self.graphed.name, len(self.numbers), self.width, self.source_length)
        search.store.run(key, lambda: decoding_step(search.model, view, search.num_candidates))

    def _apply_processors(self, view: SearchMemory) -> None:
        """Apply the processors that are active at this length; the answer is the same until `length` passes a bound."""
        forbids, forced = False, None
        for processor in self.search.processors:
            if not _is_active(processor, self.length):
                continue
            if isinstance(processor, _FORBID_THE_END):
                forbids = True
            elif isinstance(processor, SometimesActive):
                given = [0 if number is None else processor.forced[number] for number in self.numbers]  # type: ignore
                # -1 leaves a sentence to what an earlier processor forces
                forced = given if forced is None else [a if b < 0 else b for a, b in zip(forced, given, strict=True)]
            else:
                token = getattr(processor, "bos_token_id", None)
                forced = [int(processor.eos_token_id if token is None else token)] * len(self.numbers)
        if forbids != self.graphed.forbids:
            view.settings.forbids_ends_1.fill_(forbids)
            self.graphed.forbids = forbids
        if forced is not None:
            view.forced_B.copy_(_on_device(forced, view))
        elif self.graphed.is_forced:
            view.forced_B.fill_(-1)
        self.graphed.is_forced = forced is not None

    def _kept(self, places: Any) -> Hypotheses:
        real = [place for place in places if self.numbers[place] is not None]
        return self.memory.hypotheses.kept(_on_device(real, self.memory))

    def _shrink(self, going_on: list[int]) -> None:
        """Leave out sentences that are done, except some that pad the batch."""
        size = rung(len(going_on))
        done = [place for place in range(len(self.numbers)) if place not in {*going_on}]
        places = going_on + done[: size - len(going_on)]
        self.view.keep(_on_device(places, self.memory))
        self.numbers = [self.numbers[place] for place in going_on] + [None] * (size - len(going_on))
        self._set_width(self.width)


def _on_device(numbers: list[int], memory: SearchMemory) -> Tensor:
    """Copy numbers to the device as int64 without waiting for it."""
    return torch.tensor(numbers, dtype=torch.int64).to(memory.is_done_B.device, non_blocking=True)


@dataclass
class _GraphedMemory:
    """A memory with keys for each width that a search used.

    Attributes:
        name: the beginning of the keys of its graphs.
        forbids, is_forced: the values that were last written to it.
    """

    name: tuple[int, ...]
    size: MemorySize
    keys: KeySize
    memory: SearchMemory
    by_width: dict[int, KeysAndValues]
    forbids: bool = False
    is_forced: bool = False

    @torch.inference_mode(False)
    def own(self, width: int) -> KeysAndValues:
        if width not in self.by_width:
            self.by_width[width] = self.keys.allocate(self.size.num_sentences, width * self.size.num_beams)
        return self.by_width[width]


@torch.inference_mode(False)
def _graphed_memory(search: _Search, wanted: MemorySize) -> _GraphedMemory:
    """The memory in the store, or a larger one; a memory that is too small is dropped with its graphs."""
    name = (wanted.num_beams, wanted.num_candidates, wanted.num_ends)
    memories = search.store.memories
    known = memories.get(name)
    size = wanted if known is None else wanted.with_room_for(known.size)
    if known is None or size != known.size:
        del known
        search.store.forget(name)
        while len(memories) >= _MAX_MEMORIES:
            search.store.forget(next(iter(memories)))
        decoder, config = search.model.model.decoder, search.model.config
        weight = decoder.layers[0].self_attn.k_proj.weight
        num_heads = config.decoder_attention_heads
        keys = KeySize(len(decoder.layers), num_heads, config.d_model // num_heads, weight.dtype, weight.device)
        memories[name] = _GraphedMemory(name, size, keys, SearchMemory.allocate(size, keys), {})
    memories.move_to_end(name)
    graphed = memories[name]
    graphed.forbids = graphed.is_forced = False
    return graphed


class _Lookout:
    """Reads flags of a device one step late, so that the device always has work.

    Args:
        flags_B: bool flags that each step writes.
    """

    def __init__(self, flags_B: Tensor):
        self._flags_B = flags_B
        self._pending: Callable[[], list[bool]] | None = None

    def look(self, num_flags: int) -> list[bool] | None:
        """The flags at the time of the previous call; `None` at first."""
        pending, self._pending = self._pending, self._read(num_flags)
        return None if pending is None else pending()

    def _read(self, num_flags: int) -> Callable[[], list[bool]]:
        flags_B = self._flags_B[:num_flags]
        if not flags_B.is_cuda:
            copy_B = flags_B.clone()
            return copy_B.tolist
        on_host_B = torch.empty(num_flags, dtype=torch.bool, pin_memory=True)
        on_host_B.copy_(flags_B, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[bool]:
            copied.synchronize()
            return on_host_B.tolist()

        return read


def _is_active(processor: Any, length: int) -> bool:
    if isinstance(processor, SometimesActive):
        return processor.is_active(length)
    return ACTIVE_AT[type(processor)](processor, length)


__all__ = ["BY_DEFAULT", "DEVICES", "captured_search", "why_not_captured"]
