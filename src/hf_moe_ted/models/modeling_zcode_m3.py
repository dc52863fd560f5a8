"""ZCodeM3: pre-LayerNorm encoder-decoder with a mixture of experts in some feed-forward layers.

Its layers are M2M100's, so are the names of its weights; `ffn` is dense or sparse. The model does not know whether it
runs in parallel.
"""

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoEModelOutput,
    MoEModelOutputWithPastAndCrossAttentions,
    Seq2SeqMoEModelOutput,
    Seq2SeqMoEOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_backends import warn_of_cudnn_backward
from .configuration_zcode_m3 import Side, ZCodeM3Config
from .expert_computation import check_computation, default_computation
from .experts import ZCodeM3Experts
from .field_of_config import FieldOfConfig
from .losses import load_balancing_loss, router_z_loss, summed_cross_entropy
from .moe_layer import ZCodeM3DenseFFN, ZCodeM3MoELayer
from .nllb_moe import weight_conversions
from .positions import (
    Tokens,
    ZCodeM3SinusoidalPositionalEmbedding,
    ZCodeM3UntiedPositions,
    positional_embedding,
    tokens_of,
)
from .router import Routing, ZCodeM3Router, refused_if_not_finite, require_finite_routers

logger = logging.get_logger(__name__)

register_checkpoint_conversion_mapping(ZCodeM3Config.model_type, weight_conversions(), overwrite=True)

# transformers 5.24 renamed `past_key_values`, in arguments and in outputs
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(Seq2SeqMoEOutput)} else "past_key_values"

# what `forward` passes on by `**kwargs`, and somebody reads: this file, or a decorator of transformers
_PASSED_ON = {
    "debug_io",
    "debug_io_dir",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_routings",
    "prune_layers",
    "use_cache",
}

# fields of the config that cannot change behind the layers' back; the numbers of experts are compared with the layers
_FIXED_FIELDS = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "activation_function",
    "scale_embedding",
    "position_embedding_type",
    "router_bias",
    "use_residual",
)

_EXPERT_KEY = re.compile(r"\.ffn\.(experts|router)\.")


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations: query, key, value float[batch, heads, length, head_dim], additive mask."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _refuse_unknown_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: an argument of `forward` that nobody reads. Packed sequences (`position_ids`, `cu_seq_lens_q`) are
            among these: a text begins at the first position of its row.
    """
    unknown = [name for name, value in kwargs.items() if name not in _PASSED_ON and value is not None]
    if unknown:
        known = {*inspect.signature(module.forward).parameters, *_PASSED_ON} - {"kwargs"}
        alike = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f" (did you mean {', '.join(alike)}?)" if alike else ""
        raise TypeError(
            f"{type(module).__name__}.forward does not know {', '.join(unknown)}{hint}; leave it out. It takes "
            f"{', '.join(sorted(known))}"
        )


def _the_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, got two caches; pass one of them")
    return past_key_values if cache is None else cache


class ZCodeM3ScaledWordEmbedding(nn.Embedding):
    """Token embedding multiplied by `embed_scale`."""

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config.vocab_size, config.d_model, config.pad_token_id)
        self.embed_scale: float = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale


class ZCodeM3Attention(nn.Module):
    """Multi-head attention, self or cross."""

    dropout = FieldOfConfig("attention_dropout")

    def __init__(
        self,
        config: ZCodeM3Config,
        num_heads: int,
        layer_idx: int,
        is_causal: bool = False,
        is_cross_attention: bool = False,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.d_model // num_heads
        self.scaling = self.head_dim**-0.5
        if config.position_embedding_type == "tupe" and not is_cross_attention:
            self.scaling = (2 * self.head_dim) ** -0.5  # the scores of the positions are the other half
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: float[batch, length, d_model].
            attention_mask: mask in the form of the attention implementation, or `None`.
            key_value_states: float[batch, source_length, d_model], *optional*, for cross-attention.
            cache: past keys and values, read and extended.

        Returns:
            float[batch, length, d_model], and the attention weights if the implementation gives them.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        key, value = self._keys_and_values(hidden_states, key_value_states, cache)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa":
            warn_of_cudnn_backward(query, attention_mask)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _keys_and_values(
        self, hidden_states: Tensor, key_value_states: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        is_cross_attention = key_value_states is not None
        own_cache = cache
        if isinstance(cache, EncoderDecoderCache):
            own_cache = cache.cross_attention_cache if is_cross_attention else cache.self_attention_cache
            if is_cross_attention and cache.is_updated.get(self.layer_idx):
                layer: Any = own_cache.layers[self.layer_idx]
                return layer.keys, layer.values

        states = hidden_states if key_value_states is None else key_value_states
        key, value = self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))
        if own_cache is not None:
            key, value = own_cache.update(key, value, self.layer_idx)
            if is_cross_attention and isinstance(cache, EncoderDecoderCache):
                cache.is_updated[self.layer_idx] = True
        return key, value


def _feed_forward(config: ZCodeM3Config, side: Side, layer_idx: int) -> ZCodeM3DenseFFN | ZCodeM3MoELayer:
    ffn_dim = getattr(config, f"{side}_ffn_dim")
    num_experts = config.num_experts_per_layer(side).get(layer_idx)
    if num_experts is None:
        return ZCodeM3DenseFFN(config, ffn_dim)
    return ZCodeM3MoELayer(config, num_experts, ffn_dim, config.expert_map_per_layer(side).get(layer_idx))


class ZCodeM3EncoderLayer(GradientCheckpointingLayer):
    dropout = FieldOfConfig()

    def __init__(self, config: ZCodeM3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = ZCodeM3Attention(config, config.encoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, "encoder", layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, token_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """hidden_states float[batch, length, d_model]; token_mask bool[batch, length], False for no expert."""
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + nn.functional.dropout(attended, p=self.dropout, training=self.training)
        fed_forward = self.ffn(self.final_layer_norm(hidden_states), token_mask)
        return hidden_states + nn.functional.dropout(fed_forward, p=self.dropout, training=self.training)


class ZCodeM3DecoderLayer(GradientCheckpointingLayer):
    dropout = FieldOfConfig()

    def __init__(self, config: ZCodeM3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = ZCodeM3Attention(config, config.decoder_attention_heads, layer_idx, is_causal=True)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = ZCodeM3Attention(config, config.decoder_attention_heads, layer_idx, is_cross_attention=True)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, "decoder", layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor | None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the encoder's; encoder_hidden_states float[batch, source_length, d_model]."""
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, cache=cache, **kwargs)
        hidden_states = hidden_states + nn.functional.dropout(attended, p=self.dropout, training=self.training)
        if encoder_hidden_states is not None:
            attended, _ = self.encoder_attn(
                self.encoder_attn_layer_norm(hidden_states),
                encoder_attention_mask,
                key_value_states=encoder_hidden_states,
                cache=cache,
                **kwargs,
            )
            hidden_states = hidden_states + nn.functional.dropout(attended, p=self.dropout, training=self.training)
        fed_forward = self.ffn(self.final_layer_norm(hidden_states), token_mask)
        return hidden_states + nn.functional.dropout(fed_forward, p=self.dropout, training=self.training)


class ZCodeM3PreTrainedModel(PreTrainedModel):
    config: ZCodeM3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ZCodeM3EncoderLayer", "ZCodeM3DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    def __init__(self, config: ZCodeM3Config, *args: Any, **kwargs: Any):
        if not hasattr(config, "sparse_layers"):
            raise ValueError(
                f"config ({type(config).__name__}) must be a ZCodeM3Config: leave it out, or load it with "
                "ZCodeM3Config.from_pretrained, which reads configs of NLLB-MoE, too"
            )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in the source of the modeling file; ours stands in experts.py
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        sides = [side for side in ("encoder", "decoder") if self.config.sparse_layers(side)]
        names = ["d_model", *(f"{side}_ffn_dim" for side in sides)] if sides else []
        widths = {name: getattr(self.config, name) for name in names}
        dtype = torch.get_default_dtype()  # that of the weights that are being made
        if requested_experts is None:
            requested_experts = default_computation("cuda" if torch.cuda.is_available() else "cpu", widths, dtype)
        check_computation(requested_experts, widths, dtype)
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZCodeM3Experts):
            for weight, bias in ((module.up_proj, module.up_proj_bias), (module.down_proj, module.down_proj_bias)):
                init.normal_(weight, mean=0.0, std=self.config.init_std)
                init.zeros_(bias)
        elif isinstance(module, ZCodeM3Router):
            init.normal_(module.weight, mean=0.0, std=self.config.init_std)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.expert_of_row is not None:
                init.copy_(module.expert_of_row, torch.tensor(module.expert_map))
        elif isinstance(module, ZCodeM3SinusoidalPositionalEmbedding):
            init.copy_(module.weights, module.table())

    @staticmethod
    def _finalize_model_loading(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        """
        Raises:
            ValueError: the checkpoint lacks experts or routers of the model, or has others. transformers only warns,
                but a model with some random experts still translates, just worse. `ignore_mismatched_sizes=True`
                accepts it.
        """
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        wrong = {"missing": loading_info.missing_keys, "unexpected": loading_info.unexpected_keys}
        wrong = {word: sorted(key for key in keys if _EXPERT_KEY.search(key)) for word, keys in wrong.items()}
        if any(wrong.values()) and not load_config.ignore_mismatched_sizes:
            lists = "; ".join(f"{word}: {', '.join(keys)}" for word, keys in wrong.items() if keys)
            raise ValueError(
                f"the experts of {load_config.pretrained_model_name_or_path} are not those of its config ({lists}); "
                "correct num_experts and the sparse layers, or pass ignore_mismatched_sizes=True to have what is "
                "missing initialized at random and what is unexpected ignored"
            )
        distributed_config: Any = getattr(model.config, "distributed_config", None)
        if hasattr(distributed_config, "finish_loading"):  # such as TedConfig's
            distributed_config.finish_loading(model)
        return loading_info

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh_manager: Any) -> nn.Module:
        """As transformers does it, or as a `distributed_config` does that has a way of its own, such as TedConfig."""
        if not hasattr(distributed_config, "distribute"):
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        return distributed_config.distribute(model, mesh_manager)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As [`PreTrainedModel.save_pretrained`], but under our own names: by default that writes NLLB-MoE's."""
        if self.is_distributed_loading_by_transformers and hasattr(self.config.distributed_config, "save_pretrained"):
            self.config.distributed_config.save_pretrained(self, save_directory, *args, **kwargs)
            return
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """As [`PreTrainedModel.activation_checkpointing_enable`].

        Raises:
            ValueError: `use_reentrant=True`, whose first forward runs without gradients: those of the router losses,
                which are computed from what the routers returned there, would be lost.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError("use_reentrant=True loses the gradients of the router losses; use use_reentrant=False")
        super().activation_checkpointing_enable(options, every_n_layers, offload)

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        # `set_input_embeddings` makes one embedding of three; without tying, encoder and decoder keep their own
        base = self.base_model
        own: list[tuple[Any, Any]] = []
        if isinstance(base, ZCodeM3Model) and not self.config.tie_word_embeddings:
            own = [(side, side.embed_tokens) for side in (base.encoder, base.decoder)]
        shared = super()._resize_token_embeddings(*args, **kwargs)
        for side, embedding in own:
            side.embed_tokens = self._get_resized_embeddings(embedding, *args, **kwargs)
        return shared


class ZCodeM3Stack(ZCodeM3PreTrainedModel):
    """What encoder and decoder share: embeddings, layers, and a LayerNorm behind them."""

    def init_parallel_plans(self) -> None:
        """Plans of this stack's layers, which differ; models that contain it take them up."""
        super().init_parallel_plans()
        tensor, expert = {"embed_tokens": "embedding_rowwise"}, dict[str, str]()
        for name, module in self.named_modules():
            rule = re.sub(r"\.\d+(?=\.)", ".*", name)
            if isinstance(module, ZCodeM3Attention):
                tensor |= {f"{rule}.{part}_proj": "colwise" for part in "qkv"} | {f"{rule}.out_proj": "rowwise"}
            elif isinstance(module, ZCodeM3DenseFFN):
                tensor |= {f"{rule}.fc1": "colwise", f"{rule}.fc2": "rowwise"}
            elif isinstance(module, ZCodeM3Experts):
                expert |= {f"{rule}.{param}": "grouped_gemm" for param, _ in module.named_parameters()}
                expert[rule] = "ep_dispatch_experts"
        self._tp_plan, self._ep_plan, self._fsdp_plan = tensor, expert, {"layers.*": "free_full_weight"}

    def __init__(self, config: ZCodeM3Config, side: Side, layers: list[nn.Module]):
        super().__init__(config)
        self.embed_tokens: nn.Module = ZCodeM3ScaledWordEmbedding(config)
        self.embed_positions = positional_embedding(config, side)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """float[batch, length, d_model] of the one input that is given."""
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
        # padding takes no position; a device is asked for the last one only where the padded length is too much
        if not is_unknown and tokens.total_length > limit and tokens.positions.max() > limit:
            raise ValueError(
                f"sequence of {int(tokens.positions.max())} tokens is longer than max_position_embeddings ({limit}): "
                "truncate it (truncation=True, max_length=...) or generate fewer tokens (max_new_tokens)"
            )
        if not isinstance(self.embed_positions, ZCodeM3UntiedPositions):
            inputs_embeds = inputs_embeds + self.embed_positions(tokens.positions).to(inputs_embeds)
        return nn.functional.dropout(inputs_embeds, p=self.config.dropout, training=self.training)

    def _add_untied_positions(self, attention_mask: Any, tokens: Tokens, is_causal: bool) -> Any:
        """The mask of self-attention; with untied positions, plus their scores."""
        if not isinstance(self.embed_positions, ZCodeM3UntiedPositions):
            return attention_mask
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "position_embedding_type='tupe' adds to the attention scores, which attn_implementation="
                f"{self.config._attn_implementation!r} does not support; use 'sdpa' or 'eager'"
            )
        return self.embed_positions.add_to_mask(attention_mask, tokens, is_causal)

    def _routed_mask(self, tokens: Tokens) -> Tensor | None:
        return tokens.mask if self.config.router_ignore_padding_tokens else None


class ZCodeM3Encoder(ZCodeM3Stack):
    """`config.encoder_layers` layers of self-attention and feed-forward, then a LayerNorm."""

    _can_record_outputs = {
        "hidden_states": ZCodeM3EncoderLayer,
        "attentions": ZCodeM3Attention,
        "router_logits": OutputRecorder(ZCodeM3Router, index=0),
        "routings": OutputRecorder(ZCodeM3Router, index=1),
    }

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config, "encoder", [ZCodeM3EncoderLayer(config, i) for i in range(config.encoder_layers)])

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEModelOutput:
        _refuse_unknown_arguments(self, kwargs)
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        tokens = tokens_of(self.config, input_ids, inputs_embeds, attention_mask)
        hidden_states = self._add_positions(inputs_embeds, tokens)
        self_attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        self_attention_mask = self._add_untied_positions(self_attention_mask, tokens, is_causal=False)
        routed_mask = self._routed_mask(tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, self_attention_mask, routed_mask, **kwargs)
        return MoEModelOutput(last_hidden_state=self.layer_norm(hidden_states))


class ZCodeM3Decoder(ZCodeM3Stack):
    """`config.decoder_layers` layers of self-attention, cross-attention and feed-forward, then a LayerNorm."""

    _can_record_outputs = {
        "hidden_states": ZCodeM3DecoderLayer,
        "attentions": OutputRecorder(ZCodeM3Attention, layer_name="self_attn", index=1),
        "cross_attentions": OutputRecorder(ZCodeM3Attention, layer_name="encoder_attn", index=1),
        "router_logits": OutputRecorder(ZCodeM3Router, index=0),
        "routings": OutputRecorder(ZCodeM3Router, index=1),
    }

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config, "decoder", [ZCodeM3DecoderLayer(config, i) for i in range(config.decoder_layers)])

    @merge_with_config_defaults
    @capture_outputs
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
        **kwargs: Any,
    ) -> MoEModelOutputWithPastAndCrossAttentions:
        _refuse_unknown_arguments(self, kwargs)
        cache = _the_cache(past_key_values, cache)
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "a cache would be written twice under activation checkpointing, which runs each layer again in "
                "backward: leave the cache out, or call activation_checkpointing_disable()"
            )
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
        routed_mask = self._routed_mask(tokens)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                self_attention_mask,
                routed_mask,
                encoder_hidden_states,
                encoder_attention_mask=cross_attention_mask,
                cache=cache,
                **kwargs,
            )
        returned: dict[str, Any] = {CACHE_NAME: cache}
        return MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=self.layer_norm(hidden_states), **returned)


@dataclass
class ZCodeM3ModelOutput(Seq2SeqMoEModelOutput):
    """`Seq2SeqMoEModelOutput` with the [`Routing`] of each sparse layer if `output_routings=True` is given."""

    encoder_routings: tuple[Routing, ...] | None = None
    decoder_routings: tuple[Routing, ...] | None = None


@dataclass
class ZCodeM3Output(Seq2SeqMoEOutput):
    """`Seq2SeqMoEOutput` with the [`Routing`] of each sparse layer if `output_routings=True` is given.

    `encoder_aux_loss`, `decoder_aux_loss`, `encoder_z_loss` and `decoder_z_loss` are means over the sparse layers of
    a side, without coefficients; `None` unless the router losses are computed, 0 for a side without sparse layers.
    """

    encoder_routings: tuple[Routing, ...] | None = None
    decoder_routings: tuple[Routing, ...] | None = None


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
        self._built_with = {name: getattr(config, name) for name in _FIXED_FIELDS}
        self._num_positions = config.max_position_embeddings
        self.post_init()

    def _refuse_changed_structure(self) -> None:
        """
        Raises:
            ValueError: fields of the config that made the model's layers were changed since.
        """
        changed = [name for name, value in self._built_with.items() if getattr(self.config, name) != value]
        if self.config.max_position_embeddings > self._num_positions:  # fewer are a limit that is kept
            changed.append("max_position_embeddings")
        sides: tuple[tuple[Side, ZCodeM3Stack], ...] = (("encoder", self.encoder), ("decoder", self.decoder))
        for side, stack in sides if not changed else ():
            layers: Any = stack.layers
            modules = {i: [*layer.ffn.modules()] for i, layer in enumerate(layers)}  # PEFT wraps routers
            routers = {i: m for i, of_layer in modules.items() for m in of_layer if isinstance(m, ZCodeM3Router)}
            if {i: router.num_experts for i, router in routers.items()} != self.config.num_experts_per_layer(side):
                changed.append(f"num_experts or the sparse layers of the {side}")
            maps = {i: [*router.expert_map] for i, router in routers.items() if router.expert_map is not None}
            if maps != self.config.expert_map_per_layer(side):
                changed.append(f"expert_map of the {side}")
        if changed:
            raise ValueError(
                f"model.config was changed after the model was built, in what layers are made of: {', '.join(changed)};"
                " change it back, or build a new model of the config"
            )

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
            encoder_outputs: what the encoder returned, to not run it again.
            past_key_values, cache: `EncoderDecoderCache`, *optional*, under one of its names: transformers 5.24 calls
                `cache` what was `past_key_values` before.
            inputs_embeds, decoder_inputs_embeds: float[batch, length, d_model], in place of the ids.
            use_cache: whether to return the cache.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_routings`.

        Raises:
            TypeError: an argument that the model does not know.
            ValueError: an empty batch, more tokens than `max_position_embeddings`, or a cache under both names.
        """
        _refuse_unknown_arguments(self, kwargs)
        if encoder_outputs is None:
            if not is_torchdynamo_compiling():
                self._refuse_changed_structure()
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,  # whatever the config says
                **kwargs,
            )
        elif not hasattr(encoder_outputs, "last_hidden_state"):
            encoder_outputs = MoEModelOutput(
                last_hidden_state=encoder_outputs[0],
                hidden_states=encoder_outputs[1] if len(encoder_outputs) > 1 else None,
                attentions=encoder_outputs[2] if len(encoder_outputs) > 2 else None,
            )
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            cache=_the_cache(past_key_values, cache),
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return ZCodeM3ModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_NAME: decoder_outputs.get(CACHE_NAME)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            encoder_router_logits=encoder_outputs.get("router_logits"),
            decoder_router_logits=decoder_outputs.get("router_logits"),
            encoder_routings=encoder_outputs.get("routings"),
            decoder_routings=decoder_outputs.get("routings"),
        )


class _NaNWatch(LogitsProcessor):
    """Changes nothing and waits for nothing; `has_nan` is a bool scalar on the device of the scores."""

    has_nan: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        has_nan = scores.isnan().any()
        self.has_nan = has_nan if self.has_nan is None else self.has_nan | has_nan
        return scores


class ZCodeM3ForConditionalGeneration(ZCodeM3PreTrainedModel, GenerationMixin):
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
        # tensor parallelism puts one in its place that leaves the logits split over ranks
        self.cross_entropy: Callable[[Tensor, Tensor, float], Tensor] = summed_cross_entropy
        self.post_init()
        self._set_default_length(self.generation_config)

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
        if kwargs.get("encoder_outputs") is None:  # else within a call: early exit changes `num_hidden_layers`
            self.model._refuse_changed_structure()
        require_finite_routers(self)
        kwargs.pop("labels", None)  # of Seq2SeqTrainer's batches; transformers would give them to the encoder
        watch = _NaNWatch()
        processors = LogitsProcessorList([*(logits_processor or []), watch])
        generate: Callable = super().generate  # type: ignore[misc]  # the mixin has a protocol for `self`
        output = generate(inputs, generation_config, processors, *args, **kwargs)
        if watch.has_nan is not None and watch.has_nan:
            with refused_if_not_finite(self):
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
        """As [`ZCodeM3Model.forward`], and:

        Args:
            labels: int64[batch, target_length], -100 for positions without loss. Decoder inputs are made from them
                unless given, and no cache is returned unless asked for.
            output_router_logits: return router logits and router losses; defaults to the config.
            output_routings: return the [`Routing`] of each sparse layer.
            num_items_in_batch: labels that count in the whole optimizer step, over all its batches and processes.
                The loss is their mean, and the router losses are scaled by this batch's share of them. By default
                this batch is all.

        Returns:
            [`ZCodeM3Output`]; `loss` is the cross-entropy, in training or with router logits plus
            `router_aux_loss_coef` and `router_z_loss_coef` times the router losses of encoder and decoder.

        Raises:
            TypeError, ValueError: as [`ZCodeM3Model.forward`], or if no label counts.
        """
        _refuse_unknown_arguments(self, kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if labels is not None and use_cache is None:
            use_cache = False
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        with_router_losses = output_router_logits or (self.training and labels is not None)
        if self.training and not with_router_losses and not is_torchdynamo_compiling():
            logger.warning_once(
                "Training without labels: the router losses are not part of a loss that is computed outside the model. "
                "For label smoothing set `config.label_smoothing` in place of the Trainer's `label_smoothing_factor`; "
                "otherwise add the losses that `output_router_logits=True` returns."
            )
        outputs: ZCodeM3ModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=_the_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routings=output_routings or with_router_losses,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        losses: dict[str, Any] = {}
        if with_router_losses:
            for side, routings in (("encoder", outputs.encoder_routings), ("decoder", outputs.decoder_routings)):
                losses[f"{side}_aux_loss"], losses[f"{side}_z_loss"] = self._router_losses(routings or (), logits)
        if labels is not None:
            losses["loss"] = self._loss(logits, labels, losses, num_items_in_batch)
        return ZCodeM3Output(
            **losses,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            decoder_router_logits=outputs.decoder_router_logits,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            encoder_router_logits=outputs.encoder_router_logits,
            encoder_routings=outputs.encoder_routings if output_routings else None,
            decoder_routings=outputs.decoder_routings if output_routings else None,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder inputs: `labels` int64[batch, length] moved one to the right, ignored labels (-100) as padding.

        Data collators call it.
        """
        config: Any = self.config  # which requires both token ids
        shifted = torch.full_like(labels, config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    def _router_losses(self, routings: tuple[Routing, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Load-balancing and z-loss, float32 scalars: means over the sparse layers of one side."""
        if not routings:
            zero = torch.zeros((), device=like.device)
            return zero, zero
        layers_alike: dict[torch.Size, list[Routing]] = {}  # one set of operations for all of them
        for routing in routings:
            layers_alike.setdefault(routing.logits.shape, []).append(routing)
        aux, z = [], []
        for layers in layers_alike.values():
            logits_LTE, token_mask = torch.stack([layer.logits for layer in layers]), layers[0].token_mask
            choices_LTK = torch.stack([layer.choices for layer in layers])
            aux.append(load_balancing_loss(logits_LTE, choices_LTK, token_mask))
            z.append(router_z_loss(logits_LTE, token_mask))
        return torch.cat(aux).mean(), torch.cat(z).mean()

    def _loss(
        self, logits: Tensor, labels: Tensor, router_losses: dict[str, Tensor], num_items: Tensor | int | None
    ) -> Tensor:
        """float32 scalar; each part is a sum over this batch divided by the labels of the whole optimizer step."""
        # a look at labels on a GPU would wait for the whole forward pass; there the mean of nothing is NaN
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


__all__ = ["ZCodeM3ForConditionalGeneration", "ZCodeM3Model", "ZCodeM3PreTrainedModel"]
