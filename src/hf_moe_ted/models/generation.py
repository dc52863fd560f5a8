"""Generation: a length of its own, a first token of each row, and refusals of what would make every text garbage."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from .attention_backends import without_cudnn_attention
from .beam_search import SometimesActive, beam_search, why_not
from .router import refused_if_not_finite, require_finite_routers

logger = logging.get_logger(__name__)


class FirstTokens(SometimesActive):
    """`forced_bos_token_id` with a token for each of B sentences, each of which has as many rows as beams."""

    def __init__(self, token_ids: Sequence[int]):
        self._token_ids = list(token_ids)

    def is_active(self, length: int) -> bool:
        """Whether it changes scores behind so many tokens."""
        return length == 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.is_active(input_ids.shape[1]):
            return scores
        num_beams = len(scores) // len(self._token_ids)
        first_tokens = torch.tensor(self._token_ids, device=scores.device).repeat_interleave(num_beams).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, first_tokens, 0.0)


class _NaNWatch(SometimesActive):
    """Changes nothing and waits for nothing; `has_nan` is a bool scalar on the device of the scores.

    Attributes:
        has_own_cache: whether the call that it watches makes its cache, which nobody sees.
    """

    has_nan: Tensor | None = None

    def __init__(self, has_own_cache: bool = True):
        self.has_own_cache = has_own_cache

    def is_active(self, length: int) -> bool:
        """Never, where `look` is called."""
        return False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.look(scores)
        return scores

    def look(self, scores: Tensor) -> None:
        """At numbers that are NaN if a logit is."""
        has_nan = scores.isnan().any()
        self.has_nan = has_nan if self.has_nan is None else self.has_nan | has_nan


class ZCodeM3GenerationMixin(GenerationMixin):
    """[`GenerationMixin`] for [`ZCodeM3ForConditionalGeneration`]."""

    config: Any

    def _set_default_length(self, generation_config: GenerationConfig) -> None:
        # without a length `generate` stops after 20 tokens
        if generation_config.max_length is None and generation_config.max_new_tokens is None:
            generation_config.max_length = self.config.default_generation_length

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As [`GenerationMixin.adjust_generation_fn`], which loads the generation config; it has a length behind it."""
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
        """As [`GenerationMixin.generate`].

        Raises:
            ValueError: NaN or infinity in a router's weights, or logits that become NaN. It names the first router with
                such logits, for which everything is computed once more. Or the config was changed in what layers are
                made of.
        """
        model: Any = self  # whose mixin this is
        if kwargs.get("encoder_outputs") is None:  # else within a call: early exit changes `num_hidden_layers`
            model.model._refuse_changed_structure()
        require_finite_routers(model)
        kwargs.pop("labels", None)  # of Seq2SeqTrainer's batches; transformers would give them to the encoder
        watch = _NaNWatch(has_own_cache=all(kwargs.get(name) is None for name in ("past_key_values", "cache")))
        processors = LogitsProcessorList([*(logits_processor or []), watch])
        generate: Callable = super().generate  # type: ignore[misc]  # the mixin has a protocol for `self`
        with without_cudnn_attention():
            output = generate(inputs, generation_config, processors, *args, **kwargs)
        if watch.has_nan is not None and watch.has_nan:
            with refused_if_not_finite(model):
                again = {name: value for name, value in kwargs.items() if name != "streamer"}
                generate(inputs, generation_config, logits_processor, *args, **again)
            raise ValueError("logits became NaN in generation, though all routers are finite: weights may be damaged")
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
        """The search of beam_search.py, or for what that does not have the one of transformers."""
        model: Any = self
        watch = next((processor for processor in logits_processor if isinstance(processor, _NaNWatch)), None)
        reason = "a cache of the caller" if watch is None or not watch.has_own_cache else None
        reason = reason or why_not(model, generation_config, synced_gpus, model_kwargs)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if watch is not None and reason is None:
            return beam_search(model, *arguments, watch.look, **model_kwargs)
        logger.debug("beam search of transformers, because of %s", reason)
        search: Callable = super()._beam_search  # type: ignore[misc]
        return search(*arguments, synced_gpus=synced_gpus, **model_kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the parent, without the tokenizers of stop strings, which transformers hands on to `forward`."""
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        prepare: Callable = super().prepare_inputs_for_generation  # type: ignore[misc]
        return prepare(*args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        prepare: Callable = super()._prepare_generation_config  # type: ignore[misc]
        prepared, model_kwargs = prepare(generation_config, **kwargs)
        given = [kwargs] + [config.to_dict() for config in (generation_config, self.generation_config) if config]
        if all(options.get(name) is None for options in given for name in ("max_length", "max_new_tokens")):
            prepared.max_length = self.config.default_generation_length  # of transformers: 20
        elif generation_config is None and kwargs.get("max_new_tokens") and kwargs.get("max_length") is None:
            prepared.max_length = None  # the model's default, of which there would be a warning in each call
        prompt = kwargs.get("decoder_input_ids")
        is_given = kwargs.get("max_length") or (generation_config and generation_config.max_length)
        default = self.config.default_generation_length
        if prompt is not None and not is_given and prepared.max_length == default <= prompt.shape[-1]:
            prepared.max_length = min(prompt.shape[-1] + default, self.config.max_position_embeddings)
        return prepared, model_kwargs


__all__ = ["FirstTokens", "ZCodeM3GenerationMixin"]
