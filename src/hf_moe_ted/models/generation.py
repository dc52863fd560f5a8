"""Generation: a length of its own, a first token of each row, and refusals of what would make every text garbage."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .attention_backends import without_cudnn_attention
from .router import refused_if_not_finite, require_finite_routers


class FirstTokens(LogitsProcessor):
    """`forced_bos_token_id` with a token for each of B sentences, each of which has as many rows as beams."""

    def __init__(self, token_ids: Sequence[int]):
        self._token_ids = list(token_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 1:
            return scores
        num_beams = len(scores) // len(self._token_ids)
        first_tokens = torch.tensor(self._token_ids, device=scores.device).repeat_interleave(num_beams).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, first_tokens, 0.0)


class _NaNWatch(LogitsProcessor):
    """Changes nothing and waits for nothing; `has_nan` is a bool scalar on the device of the scores."""

    has_nan: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        has_nan = scores.isnan().any()
        self.has_nan = has_nan if self.has_nan is None else self.has_nan | has_nan
        return scores


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
        watch = _NaNWatch()
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
