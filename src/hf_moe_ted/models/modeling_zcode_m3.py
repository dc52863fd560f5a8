"""ZCodeM3: pre-LayerNorm encoder-decoder with a mixture of experts in some feed-forward layers.

Layers and names of weights are those of M2M100, but `ffn` is dense or sparse. The model does not know whether it runs
in parallel.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import MoEModelOutput, MoEModelOutputWithPastAndCrossAttentions
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import ZCodeM3Attention
from .configuration_zcode_m3 import Side, ZCodeM3Config
from .forward_arguments import refuse_unknown_arguments, the_cache
from .generation import ZCodeM3GenerationMixin
from .graph_store import forget_store
from .layers import ZCodeM3DecoderLayer, ZCodeM3EncoderLayer, ZCodeM3ScaledWordEmbedding
from .losses import summed_cross_entropy
from .outputs import (
    CACHE_NAME,
    RouterOutputs,
    ZCodeM3ModelOutput,
    ZCodeM3Output,
    encoder_outputs_of,
    model_output,
    output_with_head,
)
from .parallel_plans import expert_parallel_plan, tensor_parallel_plan
from .positions import (
    Tokens,
    positional_embedding,
    tokens_of,
)
from .pretrained_model import ZCodeM3PreTrainedModel
from .router_losses import router_losses
from .structure import fixed_fields, refuse_changed_structure

logger = logging.get_logger(__name__)


class ZCodeM3Stack(ZCodeM3PreTrainedModel):
    """Base class of encoder and decoder: embeddings, layers, and a LayerNorm after them."""

    def init_parallel_plans(self) -> None:
        """Make plans for this stack's layers, which differ from each other; models that contain the stack add them."""
        super().init_parallel_plans()
        self._tp_plan, self._ep_plan = tensor_parallel_plan(self), expert_parallel_plan(self)
        self._fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: ZCodeM3Config, side: Side, layers: list[nn.Module]):
        super().__init__(config)
        self.embed_tokens: nn.Module = ZCodeM3ScaledWordEmbedding(config)
        self.embed_positions = positional_embedding(config, side)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """float[batch, length, d_model] of the given input, ids or embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds (of each side)")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if 0 in embeds.shape[:2]:
            raise ValueError(f"the batch is empty: its shape (batch, length) is {tuple(embeds.shape[:2])}")
        return embeds

    def _add_positions(self, inputs_embeds: Tensor, tokens: Tokens) -> Tensor:
        """Hidden states before the first layer: float[batch, length, d_model]."""
        limit = self.config.max_position_embeddings
        # a compiled graph cannot branch on the length of a static cache, which is a tensor
        is_unknown = isinstance(tokens.total_length, Tensor) and is_torchdynamo_compiling()
        # padding takes no position; the last position is read from the device only if the padded length is too long
        if not is_unknown and tokens.total_length > limit and tokens.positions.max() > limit:
            raise ValueError(
                f"sequence of {int(tokens.positions.max())} tokens is longer than max_position_embeddings ({limit}): "
                "truncate it (truncation=True, max_length=...) or generate fewer tokens (max_new_tokens)"
            )
        if not self._has_untied_positions:
            inputs_embeds = inputs_embeds + self.embed_positions(tokens.positions).to(inputs_embeds)
        elif self.config._attn_implementation not in ("sdpa", "eager"):  # before a mask is made, which may compile code
            raise ValueError(
                "position_embedding_type='tupe' adds to the attention scores, but "
                f"attn_implementation={self.config._attn_implementation!r} does not support that; use 'sdpa' or "
                "'eager'"
            )
        return nn.functional.dropout(inputs_embeds, p=self.config.dropout, training=self.training)

    def _add_untied_positions(self, attention_mask: Any, tokens: Tokens, is_causal: bool) -> Any:
        """The mask of self-attention; with untied positions, their scores are added."""
        if not self._has_untied_positions:
            return attention_mask
        positions: Any = self.embed_positions
        return positions.add_to_mask(attention_mask, tokens, is_causal)

    @property
    def _has_untied_positions(self) -> bool:
        return self.config.position_embedding_type == "tupe"  # in a compiled graph, do not check the module's class

    def _routed_mask(self, tokens: Tokens) -> Tensor | None:
        return tokens.mask if self.config.router_ignore_padding_tokens else None

    def _through_layers(self, hidden_states: Tensor, *args: Any, collected: RouterOutputs, **kwargs: Any) -> Tensor:
        """Hidden states after the last layer and the LayerNorm: float[batch, length, d_model]."""
        for layer in self.layers:
            hidden_states, routing = layer(hidden_states, *args, **kwargs)
            collected.keep(routing)
        return self.layer_norm(hidden_states)


class ZCodeM3Encoder(ZCodeM3Stack):
    """`config.encoder_layers` layers of self-attention and feed-forward, then a LayerNorm."""

    _can_record_outputs = {
        "hidden_states": ZCodeM3EncoderLayer,
        "attentions": ZCodeM3Attention,
    }

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config, "encoder", [ZCodeM3EncoderLayer(config, i) for i in range(config.encoder_layers)])

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_router_logits: bool | None = None,
        output_routings: bool = False,
        **kwargs: Any,
    ) -> MoEModelOutput:
        refuse_unknown_arguments(self, kwargs)
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        tokens = tokens_of(self.config, input_ids, inputs_embeds, attention_mask)
        hidden_states = self._add_positions(inputs_embeds, tokens)
        self_attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        self_attention_mask = self._add_untied_positions(self_attention_mask, tokens, is_causal=False)
        collected = RouterOutputs(self.config, output_router_logits, output_routings)
        output = self._run_layers(
            hidden_states,
            self_attention_mask,
            self._routed_mask(tokens),
            collected=collected,
            return_dict=True,
            **kwargs,
        )
        return collected.add_to(output)

    @capture_outputs
    def _run_layers(self, *args: Any, **kwargs: Any) -> MoEModelOutput:
        """Run the layers; hooks on them collect hidden states and attentions if these are requested."""
        return MoEModelOutput(last_hidden_state=self._through_layers(*args, **kwargs))


class ZCodeM3Decoder(ZCodeM3Stack):
    """`config.decoder_layers` layers of self-attention, cross-attention and feed-forward, then a LayerNorm."""

    _can_record_outputs = {
        "hidden_states": ZCodeM3DecoderLayer,
        "attentions": OutputRecorder(ZCodeM3Attention, layer_name="self_attn", index=1),
        "cross_attentions": OutputRecorder(ZCodeM3Attention, layer_name="encoder_attn", index=1),
    }

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config, "decoder", [ZCodeM3DecoderLayer(config, i) for i in range(config.decoder_layers)])

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_router_logits: bool | None = None,
        output_routings: bool = False,
        **kwargs: Any,
    ) -> MoEModelOutputWithPastAndCrossAttentions:
        refuse_unknown_arguments(self, kwargs)
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        cache = self._cache(the_cache(past_key_values, cache), use_cache)
        num_past = cache.get_seq_length() if cache is not None else 0

        tokens = tokens_of(self.config, input_ids, inputs_embeds, attention_mask, num_past)
        hidden_states = self._add_positions(inputs_embeds, tokens)

        self_attention_mask = create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache,
        )
        self_attention_mask = self._add_untied_positions(self_attention_mask, tokens, is_causal=True)
        cross_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        collected = RouterOutputs(self.config, output_router_logits, output_routings)
        output = self._run_layers(
            hidden_states,
            self_attention_mask,
            self._routed_mask(tokens),
            encoder_hidden_states,
            encoder_attention_mask=cross_attention_mask,
            cache=cache,
            collected=collected,
            return_dict=True,
            **kwargs,
        )
        return collected.add_to(output)

    @capture_outputs
    def _run_layers(self, *args: Any, cache: Cache | None, **kwargs: Any) -> MoEModelOutputWithPastAndCrossAttentions:
        returned: dict[str, Any] = {CACHE_NAME: cache}
        last_hidden_state = self._through_layers(*args, cache=cache, **kwargs)
        return MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=last_hidden_state, **returned)

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache that a call writes; a new one if needed."""
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "a cache would be written twice under activation checkpointing, which runs each layer again in "
                "backward: leave the cache out, or call activation_checkpointing_disable()"
            )
        return cache


class ZCodeM3Model(ZCodeM3PreTrainedModel):
    """Encoder and decoder on one shared embedding, without a head."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    _tp_plan = {"shared": "embedding_rowwise"}

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config)
        self.shared: nn.Module = ZCodeM3ScaledWordEmbedding(config)
        self.encoder = ZCodeM3Encoder(config)
        self.decoder = ZCodeM3Decoder(config)
        self._built_with = fixed_fields(config)
        self.post_init()

    def _refuse_changed_structure(self) -> None:
        """
        Raises:
            ValueError: fields of the config that made the model's layers were changed later.
        """
        layers: dict[Side, nn.ModuleList] = {"encoder": self.encoder.layers, "decoder": self.decoder.layers}
        refuse_changed_structure(self.config, self._built_with, layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value
        self.encoder.embed_tokens = value
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ZCodeM3ModelOutput:
        """
        Args:
            input_ids: int64[batch, source_length], source tokens.
            attention_mask: int64 or bool[batch, source_length], 0 for padding; padding goes to no expert.
            decoder_input_ids: int64[batch, target_length], target tokens shifted right.
            decoder_attention_mask: int64 or bool[batch, past + target_length], 0 for padding.
            encoder_outputs: outputs of the encoder; then it is not run again.
            past_key_values, cache: `EncoderDecoderCache`, *optional*, under one of its names: transformers 5.24 calls
                `cache` what was `past_key_values` before.
            inputs_embeds, decoder_inputs_embeds: float[batch, length, d_model], instead of the ids.
            use_cache: whether to return the cache.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_routings`.

        Raises:
            TypeError: an unknown argument.
            ValueError: an empty batch, more tokens than `max_position_embeddings`, or a cache under both names.
        """
        refuse_unknown_arguments(self, kwargs)
        if encoder_outputs is None:
            if not is_torchdynamo_compiling():
                self._refuse_changed_structure()
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,  # independent of the config
                **kwargs,
            )
        encoder_outputs = encoder_outputs_of(encoder_outputs)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=the_cache(past_key_values, cache),
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return model_output(encoder_outputs, decoder_outputs)


def _warn_of_lost_router_losses() -> None:
    if not is_torchdynamo_compiling():
        logger.warning_once(
            "Training without labels: a loss that is computed outside the model lacks the router losses. For label "
            "smoothing set `config.label_smoothing` instead of the Trainer's `label_smoothing_factor`; otherwise add "
            "the losses that `output_router_logits=True` returns."
        )


class ZCodeM3ForConditionalGeneration(ZCodeM3PreTrainedModel, ZCodeM3GenerationMixin):
    """ZCodeM3 with a language-modeling head that shares the embedding: translation and other text-to-text tasks.

    Example:

    ```python
    >>> from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer

    >>> model = ZCodeM3ForConditionalGeneration.from_pretrained("examples/checkpoints/zcode_m3_demo")
    >>> tokenizer = ZCodeM3Tokenizer.from_pretrained("examples/checkpoints/zcode_m3_demo", src_lang="en")
    >>> inputs = tokenizer("Close all tabs", return_tensors="pt")
    >>> output = model.generate(**inputs, forced_bos_token_id=tokenizer.get_lang_id("de"))
    >>> tokenizer.batch_decode(output, skip_special_tokens=True)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config)
        self.model = ZCodeM3Model(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # tensor parallelism replaces it by one that leaves the logits split over ranks
        self.cross_entropy: Callable[[Tensor, Tensor, float], Tensor] = summed_cross_entropy
        self.post_init()
        self._set_default_length(self.generation_config)

    def train(self, mode: bool = True) -> Self:
        """Like [`~torch.nn.Module.train`]; for training it frees what captured searches keep on a GPU."""
        if mode and not torch.compiler.is_compiling():
            forget_store(self)
        return super().train(mode)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routings: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ZCodeM3Output:
        """Like [`ZCodeM3Model.forward`], and:

        Args:
            labels: int64[batch, target_length], -100 for positions without loss. Decoder inputs are made from them
                unless given; a cache is returned only with `use_cache=True`.
            output_router_logits: return router logits and router losses; defaults to the config.
            output_routings: return the [`Routing`] of each sparse layer.
            num_items_in_batch: number of labels, without ignored ones, in the whole optimizer step, over all its
                batches and processes. The loss is the mean over these labels, and the router losses are scaled by this
                batch's share of them. By default the step is this batch only. M2M100 does not use it
                (docs/upstream/transformers_gradient_accumulation.md).

        Returns:
            [`ZCodeM3Output`]; `loss` is the cross-entropy. In training, or with router logits, the router losses of
            encoder and decoder are added, times `router_aux_loss_coef` and `router_z_loss_coef`.

        Raises:
            TypeError, ValueError: see [`ZCodeM3Model.forward`]; or all labels are ignored.
        """
        # `can_return_tuple` reads it; `accelerator.unwrap_model(model, keep_fp32_wrapper=False)` takes that away, too
        kwargs.pop("return_dict", None)
        refuse_unknown_arguments(self, kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if labels is not None and use_cache is None:
            use_cache = False
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        with_router_losses = output_router_logits or (self.training and labels is not None)
        if self.training and not with_router_losses:
            _warn_of_lost_router_losses()
        outputs: ZCodeM3ModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=the_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routings=output_routings or with_router_losses,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        losses = router_losses(outputs, logits.device) if with_router_losses else {}
        if labels is not None:
            losses["loss"] = self._loss(logits, labels, losses, num_items_in_batch)
        return output_with_head(outputs, logits, losses, with_routings=output_routings)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder inputs: `labels` int64[batch, length] shifted right by one; ignored labels (-100) become padding.

        Data collators call it.
        """
        config: Any = self.config  # it requires both token ids
        shifted = torch.full_like(labels, config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    def _loss(
        self, logits: Tensor, labels: Tensor, router_losses: dict[str, Tensor], num_items: Tensor | int | None
    ) -> Tensor:
        """float32 scalar; each part is a sum over this batch divided by the labels of the whole optimizer step."""
        # reading labels on a GPU would wait for the whole forward pass; there the mean of no labels is NaN
        if (
            num_items is None
            and labels.device.type == "cpu"
            and not is_torchdynamo_compiling()
            and (labels == -100).all()
        ):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are all -100 (ignored): the mean loss of no label is undefined"
            )
        labels = labels.to(logits.device)
        num_labels = (labels != -100).sum()
        divisor = num_labels if num_items is None else torch.as_tensor(num_items, device=logits.device)
        label_smoothing = self.config.label_smoothing if self.training else 0.0
        loss = self.cross_entropy(logits, labels, label_smoothing) / divisor
        if router_losses:
            aux = router_losses["encoder_aux_loss"] + router_losses["decoder_aux_loss"]
            z = router_losses["encoder_z_loss"] + router_losses["decoder_z_loss"]
            penalty = self.config.router_aux_loss_coef * aux + self.config.router_z_loss_coef * z
            loss = loss + penalty * (num_labels / divisor)
        return loss


__all__ = ["ZCodeM3ForConditionalGeneration", "ZCodeM3Model"]
