"""Generation: a default length, a first token for each row, and errors for damaged weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import MoEModelOutput
from transformers.utils import logging

from .attention_backends import without_cudnn_attention
from .beam_search import SometimesActive, beam_search, why_not
from .captured_encoder import captured_encoding, why_not_encoded
from .captured_search import BY_DEFAULT, DEVICES, captured_search, why_not_captured
from .graph_store import GraphStore, forget_store, store_of
from .router import refused_if_not_finite, require_finite_routers

logger = logging.get_logger(__name__)


class FirstTokens(SometimesActive):
    """`forced_bos_token_id` with a token for each of B sentences; a sentence has one row per beam.

    Args:
        token_ids: B ids; -1 leaves a sentence free.
    """

    def __init__(self, token_ids: Sequence[int]):
        self.forced: Sequence[int] = list(token_ids)

    def is_active(self, length: int) -> bool:
        """Whether it changes scores after so many tokens."""
        return length == 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.is_active(input_ids.shape[1]):
            return scores
        num_beams = len(scores) // len(self.forced)
        ids_R1 = torch.tensor(self.forced, device=scores.device).repeat_interleave(num_beams).unsqueeze(1)
        forced = torch.full_like(scores, -torch.inf).scatter(1, ids_R1.clamp(min=0), 0.0)
        return torch.where(ids_R1 >= 0, forced, scores)


class _NaNWatch(SometimesActive):
    """Records NaN in scores; it changes nothing and waits for nothing. `has_nan` is a bool scalar on their device.

    Attributes:
        has_own_cache: whether the watched call makes its own cache, which no other code sees.
    """

    has_nan: Tensor | None = None
    forced = ()

    def __init__(self, has_own_cache: bool = True):
        self.has_own_cache = has_own_cache

    def is_active(self, length: int) -> bool:
        """Never active: `look` is called instead."""
        return False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.look(scores)
        return scores

    def look(self, scores: Tensor) -> None:
        """Look at numbers that are NaN if a logit is NaN."""
        has_nan = scores.isnan().any()
        self.has_nan = has_nan if self.has_nan is None else self.has_nan | has_nan


class ZCodeM3GenerationMixin(GenerationMixin):
    """[`GenerationMixin`] for [`ZCodeM3ForConditionalGeneration`]."""

    config: Any

    def _set_default_length(self, generation_config: GenerationConfig) -> None:
        # without a length `generate` would stop after 20 tokens
        if generation_config.max_length is None and generation_config.max_new_tokens is None:
            generation_config.max_length = self.config.default_generation_length

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Like [`GenerationMixin.adjust_generation_fn`], which loads the generation config; then set its length."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]  # the mixin has a protocol for `self`
        self._set_default_length(self.generation_config)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Like [`GenerationMixin.generate`].

        Raises:
            ValueError: a router's weights have NaN or infinity, or logits become NaN. The message names the first
                router with such logits; to find it, everything is computed once more. Also if config fields that made
                the layers were changed.
        """
        model: Any = self  # whose mixin this is
        if kwargs.get("encoder_outputs") is None:  # else within a call: early exit changes `num_hidden_layers`
            model.model._refuse_changed_structure()
        require_finite_routers(model)
        kwargs.pop("labels", None)  # in batches of Seq2SeqTrainer; transformers would give them to the encoder
        watch = _NaNWatch(has_own_cache=all(kwargs.get(name) is None for name in ("past_key_values", "cache")))
        processors = LogitsProcessorList([*(logits_processor or []), watch])
        generate: Callable = super().generate  # type: ignore[misc]  # the mixin has a protocol for `self`
        with without_cudnn_attention():
            output = generate(inputs, generation_config, processors, *args, **kwargs)
        if watch.has_nan is not None and watch.has_nan:
            forget_store(model)
            with refused_if_not_finite(model):
                again = {name: value for name, value in kwargs.items() if name != "streamer"}
                generate(inputs, generation_config, logits_processor, *args, **again)
            raise ValueError(
                "logits became NaN in generation, though all routers are finite: weights may be damaged; load an "
                "undamaged checkpoint"
            )
        return output

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The search of beam_search.py or captured_search.py, or else of transformers."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        watch, reason = self._own_search(logits_processor, generation_config, synced_gpus, model_kwargs)
        if _is_captured(generation_config, input_ids.device):
            output, reason = self._captured(watch, reason, arguments, model_kwargs)
            if output is not None:
                return output
        elif watch is not None and reason is None and input_ids.device.type == "cpu":
            return beam_search(self, *arguments, watch.look, **model_kwargs)
        logger.debug("beam search of transformers, because of %s", reason or "another device than a CPU")
        search: Callable = super()._beam_search  # type: ignore[misc]
        return search(*arguments, synced_gpus=synced_gpus, **model_kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search of captured_search.py if CUDA graphs are on, else the search of transformers."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if _is_captured(generation_config, input_ids.device):
            others = {
                "a streamer": streamer is not None,
                "return_dict_in_generate": generation_config.return_dict_in_generate,
                "assisted generation": generation_config.is_assistant,
            }
            watch, reason = self._own_search(logits_processor, generation_config, synced_gpus, model_kwargs)
            reason = reason or next((name for name, applies in others.items() if applies), None)
            output, reason = self._captured(watch, reason, arguments, model_kwargs)
            if output is not None:
                return output
            logger.debug("search of transformers, because of %s", reason)
        search: Callable = super()._sample  # type: ignore[misc]
        return search(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)

    def _own_search(
        self, logits_processor: Any, generation_config: GenerationConfig, synced_gpus: bool, model_kwargs: Any
    ) -> tuple[_NaNWatch | None, str | None]:
        """The watch for the logits of this package's searches, and why a generation cannot use them."""
        watch = next((processor for processor in logits_processor if isinstance(processor, _NaNWatch)), None)
        if watch is None or not watch.has_own_cache:
            return watch, "a cache of the caller"
        return watch, why_not(self, generation_config, synced_gpus, model_kwargs)

    def _captured(
        self, watch: _NaNWatch | None, reason: str | None, arguments: tuple[Any, ...], model_kwargs: dict[str, Any]
    ) -> tuple[Any, str | None]:
        """The output of captured_search.py, or `None` and the reason."""
        input_ids, processors, criteria, options = arguments
        reason = reason or why_not_captured(self.config, options, processors, criteria, input_ids)
        if watch is None or reason is not None:
            return None, reason
        store = self._graph_store(options)
        if isinstance(store, str):
            return None, store
        output = captured_search(self, store, input_ids, processors, options, watch.look, **model_kwargs)
        return output, "a failed capture" if output is None else None

    def _graph_store(self, generation_config: Any) -> GraphStore | str:
        """The store of this model, found once per call of `generate`, or the reason why there is none."""
        store = getattr(generation_config, "_graph_store", None)
        if store is None:
            store = generation_config._graph_store = store_of(self)
        return store

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Run the encoder, as a CUDA graph if these are on."""
        given = (inputs_tensor, model_kwargs, model_input_name, generation_config)
        if model_kwargs.get("encoder_outputs") is None and _is_captured(generation_config, inputs_tensor.device):
            reason = why_not_encoded(self.config, inputs_tensor, model_input_name, model_kwargs)
            store = self._graph_store(generation_config) if reason is None else reason
            if not isinstance(store, str):
                hidden = captured_encoding(self, store, inputs_tensor, model_kwargs["attention_mask"])
                if hidden is not None:
                    return {**model_kwargs, "encoder_outputs": MoEModelOutput(last_hidden_state=hidden)}
            logger.debug("encoder not captured, because of %s", store if isinstance(store, str) else "a failed capture")
        prepare: Callable = super()._maybe_prepare_encoder_kwargs_for_generation  # type: ignore[misc]
        return prepare(*given)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Like the parent's, but without the tokenizer of stop strings, which transformers passes on to `forward`."""
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        prepare: Callable = super().prepare_inputs_for_generation  # type: ignore[misc]
        return prepare(*args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        cuda_graphs = kwargs.pop("cuda_graphs", None)
        prepare: Callable = super()._prepare_generation_config  # type: ignore[misc]
        prepared, model_kwargs = prepare(generation_config, **kwargs)
        if cuda_graphs is not None:
            prepared.cuda_graphs = cuda_graphs
        given = [kwargs] + [config.to_dict() for config in (generation_config, self.generation_config) if config]
        if all(options.get(name) is None for options in given for name in ("max_length", "max_new_tokens")):
            prepared.max_length = self.config.default_generation_length  # transformers' default: 20
        elif generation_config is None and kwargs.get("max_new_tokens") and kwargs.get("max_length") is None:
            prepared.max_length = None  # the model's default, which would cause a warning in each call
        prompt = kwargs.get("decoder_input_ids")
        is_given = kwargs.get("max_length") or (generation_config and generation_config.max_length)
        default = self.config.default_generation_length
        if prompt is not None and not is_given and prepared.max_length == default <= prompt.shape[-1]:
            prepared.max_length = min(prompt.shape[-1] + default, self.config.max_position_embeddings)
        return prepared, model_kwargs


def _is_captured(generation_config: Any, device: torch.device) -> bool:
    """Whether steps should run as CUDA graphs, if graphs are possible.

    Raises:
        ValueError: `cuda_graphs` is not a bool or `None`.
    """
    asked = getattr(generation_config, "cuda_graphs", None)
    if asked is not None and not isinstance(asked, bool):
        raise ValueError(f"cuda_graphs ({asked!r}) must be True, False or None; None lets the model choose")
    return device.type in DEVICES and (BY_DEFAULT if asked is None else asked)


__all__ = ["FirstTokens", "ZCodeM3GenerationMixin"]
