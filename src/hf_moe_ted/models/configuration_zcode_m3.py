"""Configuration of ZCodeM3: every number of the architecture, validated."""

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .nllb_moe import MODEL_TYPE, config_fields
from .remote_code import save_code

Side = Literal["encoder", "decoder"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "position_embedding_type": ("sinusoidal", "learned", "tupe"),
    "router_dtype": ("float32", "float16", "bfloat16"),
    "router_noise_policy": (None, "jitter", "rsample"),
    "token_drop_policy": ("random", "position", "probability"),
    "second_expert_policy": ("all", "sampling", "random"),
    "normalize_router_weights": (None, "before_dropping", "after_dropping"),
}
# far more than any model has: a damaged config must not take all memory
_MAX_LAYERS, _MAX_EXPERTS, _MAX_SIZE = 1_000, 100_000, 2**24
_PROBABILITIES = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "moe_token_dropout",
    "gating_dropout",
    "label_smoothing",
)
# fields that modules read in each call, so a change of `model.config` takes effect; each change is checked
_READ_IN_EACH_CALL = {
    *_PROBABILITIES,
    *_CHOICES,
    "batch_prioritized_routing",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
} - {"position_embedding_type"}
_DEFAULT_JITTER = 0.01
_BY_JITTER = "by router_jitter_noise"  # the policy if none is given


@strict
class ZCodeM3Config(PreTrainedConfig):
    r"""
    Configuration of a multilingual encoder-decoder with a mixture of experts (MoE) in some feed-forward layers. The
    defaults give the 10B model of *Scalable and Efficient MoE Training for Multitask Multilingual Models*
    (https://huggingface.co/papers/2109.10465): 24 encoder and 12 decoder layers, top-1 routing over 64 experts in
    every other layer. A step of 0 makes a side dense, so `encoder_sparse_step=0, decoder_sparse_step=0` is the dense
    model of the same cost per token.

    Args:
        vocab_size (`int`, defaults to 128000): Number of tokens, language tags included.
        max_position_embeddings (`int`, defaults to 1024): Longest source or target, in tokens.
        d_model (`int`, defaults to 1024): Width of the hidden states.
        encoder_layers, decoder_layers (`int`, default to 24 and 12): Number of layers.
        encoder_attention_heads, decoder_attention_heads (`int`, default to 16): Heads; each divides `d_model`.
        encoder_ffn_dim, decoder_ffn_dim (`int`, default to 4096): Inner width of the feed-forward and of each expert.
        activation_function (`str`, defaults to `"relu"`): Any key of `transformers.activations.ACT2FN`.
        dropout, attention_dropout, activation_dropout (`float`, default to 0.1, 0.1, 0.0): Probabilities of dropout
            on block outputs, attention weights and feed-forward activations (inside the experts, too).
        init_std (`float`, defaults to 0.02): Standard deviation of the initial weights.
        scale_embedding (`bool`, defaults to `True`): Multiply token embeddings by `sqrt(d_model)`.
        position_embedding_type (`str`, defaults to `"sinusoidal"`): `"sinusoidal"`, `"learned"` or `"tupe"`
            (https://huggingface.co/papers/2006.15595).
        encoder_sparse_step, decoder_sparse_step (`int`, default to 2): Layer `i` is sparse when
            `(i + 1) % step == 0`; 0 for none.
        encoder_sparse_layers, decoder_sparse_layers (`list[int]`, *optional*): The sparse layers by index; overrides
            the step.
        num_experts (`int` or `list[int]`, defaults to 64): Experts of every sparse layer, or one number per sparse
            layer: those of the encoder from first to last, then those of the decoder (pyramid and pruned models).
        expert_map (`list[list[int]]`, *optional*): For each sparse layer, in the order of `num_experts`, the expert to
            which each row of the router leads (merged models, https://huggingface.co/papers/2310.01334). Every expert
            has at least one row. A row with `num_experts` instead of an expert counts in the router's probabilities but
            is never chosen. By default there is one row per expert, in order.
        num_experts_per_tok (`int`, defaults to 1): Experts that see a token (top-k).
        router_dtype (`str`, defaults to `"float32"`): dtype in which router logits are computed.
        router_bias (`bool`, defaults to `False`): Whether the router's projection has a bias.
        router_noise_policy (`str`, *optional*): Exploration in training. `"jitter"` multiplies the router's input by
            uniform noise in `[1 - router_jitter_noise, 1 + router_jitter_noise]` (Switch Transformers,
            https://huggingface.co/papers/2101.03961); `"rsample"` samples the expert of top-1 routing with Gumbel
            noise (DeepSpeed). By default `"jitter"` if `router_jitter_noise` is given, as in Switch and Mixtral.
        router_jitter_noise (`float`, defaults to 0.01 with `"jitter"`): Half width of the jitter.
        capacity_factor (`float`, *optional*, defaults to 1.0): In training an expert takes at most
            `max(ceil(num_tokens * num_experts_per_tok / num_experts * capacity_factor), min_capacity)` tokens of a
            batch; the others skip it. `None` drops nothing.
        eval_capacity_factor (`float`, *optional*): The same in evaluation. `None`, the default, drops nothing, so
            that a translation does not depend on the batch around it.
        min_capacity (`int`, defaults to 4): Smallest capacity of an expert, in tokens.
        token_drop_policy (`str`, defaults to `"random"`): Which tokens stay when an expert is full: random ones
            (`"random"`, Random Token Selection of paper 2109.10465), the first in the batch (`"position"`), or those
            with the highest router probability (`"probability"`). With several experts per token, first choices come
            before second choices, except with `"probability"`.
        batch_prioritized_routing (`bool`, defaults to `False`): With `token_drop_policy="position"`, fill experts in
            the order of the tokens' highest router probability rather than of the batch
            (https://huggingface.co/papers/2106.05974, NLLB-MoE).
        second_expert_policy (`str`, defaults to `"all"`): For top-2 routing: use the second expert as it is, sample it
            with Gumbel noise (`"sampling"`; DeepSpeed's default), or use it only with twice its probability
            (`"random"`; GShard, https://huggingface.co/papers/2006.16668). The last two are random in evaluation, too.
        normalize_router_weights (`str`, *optional*): Divide a token's `num_experts_per_tok` weights by their sum
            `"before_dropping"` or `"after_dropping"` (a single remaining expert then has weight 1). `None` uses the
            router's probabilities unchanged.
        use_residual (`bool`, defaults to `False`): Add a dense branch to every sparse layer, weighted by two learned
            coefficients (PR-MoE, https://huggingface.co/papers/2201.05596).
        moe_token_dropout (`float`, defaults to 0.0): Expert output masking (https://huggingface.co/papers/2207.04672,
            NLLB-MoE): in training each expert's output for a token is left out with this probability; in evaluation
            outputs are scaled by one minus this probability.
        gating_dropout (`float`, defaults to 0.0): In training, the probability that the whole batch of a rank skips the
            experts of a sparse layer (Gate-Expert-Drop of https://huggingface.co/papers/2205.14336). Only the residual
            connection, and the dense branch of `use_residual`, remain. Other ranks then get no tokens from this rank.
        router_ignore_padding_tokens (`bool`, defaults to `True`): Padding is sent to no expert, takes no capacity and
            counts in no loss.
        router_aux_loss_coef (`float`, defaults to 0.01): Weight of the load-balancing loss.
        router_z_loss_coef (`float`, defaults to 0.001): Weight of the router z-loss
            (https://huggingface.co/papers/2202.08906).
        output_router_logits (`bool`, defaults to `False`): Return the router logits and losses. The losses are part
            of the training loss whether returned or not.
        label_smoothing (`float`, defaults to 0.0): Label smoothing of the training loss; evaluation reports the plain
            cross-entropy.
        use_cache (`bool`, defaults to `True`): Return key and value states in generation.

    Raises:
        ValueError: fields contradict each other; the message gives their names and values.

    Example:

    ```python
    >>> from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration

    >>> config = ZCodeM3Config(vocab_size=8000, d_model=256, encoder_layers=6, decoder_layers=2, num_experts=8,
    ...                        encoder_attention_heads=4, decoder_attention_heads=4)
    >>> config.sparse_layers("encoder")
    [1, 3, 5]
    >>> model = ZCodeM3ForConditionalGeneration(config)
    ```
    """

    model_type = "zcode_m3"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # transformers uses the second name from 5.24 on
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "initializer_range": "init_std",
    }
    base_model_fsdp_plan = {}  # the model makes its own plans; the default is for a decoder

    vocab_size: int = 128000
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 24
    decoder_layers: int = 12
    encoder_attention_heads: int = 16
    decoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    init_std: float | int = 0.02
    scale_embedding: bool = True
    position_embedding_type: str = "sinusoidal"
    encoder_sparse_step: int = 2
    decoder_sparse_step: int = 2
    encoder_sparse_layers: list[int] | None = None
    decoder_sparse_layers: list[int] | None = None
    num_experts: int | list[int] = 64
    expert_map: list[list[int]] | None = None
    num_experts_per_tok: int = 1
    router_dtype: str = "float32"
    router_bias: bool = False
    router_noise_policy: str | None = _BY_JITTER
    router_jitter_noise: float | int | None = None
    capacity_factor: float | int | None = 1.0
    eval_capacity_factor: float | int | None = None
    min_capacity: int = 4
    token_drop_policy: str = "random"
    batch_prioritized_routing: bool = False
    second_expert_policy: str = "all"
    normalize_router_weights: str | None = None
    use_residual: bool = False
    moe_token_dropout: float | int = 0.0
    gating_dropout: float | int = 0.0
    router_ignore_padding_tokens: bool = True
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    label_smoothing: float | int = 0.0
    use_cache: bool = True
    is_encoder_decoder: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._resolve_jitter()
        # `@strict` runs these again, but wraps their errors into an error that is no ValueError
        self.validate_architecture()
        self.validate_router()
        object.__setattr__(self, "_is_complete", True)

    def __setattr__(self, name: str, value: Any) -> None:
        """
        Raises:
            ValueError: a routing option contradicts others; the config is then not changed.
        """
        if name in _READ_IN_EACH_CALL and self.__dict__.get("_is_complete"):
            self.update({name: value})
        else:
            super().__setattr__(name, value)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Like [`PreTrainedConfig.update`]. The fields are checked together, in any order.

        Raises:
            ValueError: a routing option contradicts others; the config is then not changed.
        """
        before = dict(self.__dict__)
        if not before.get("_is_complete"):  # checked at its end
            super().update(config_dict)
            return
        self.__dict__["_is_complete"] = False
        try:
            super().update(config_dict)
            is_width_alone = "router_jitter_noise" in config_dict and "router_noise_policy" not in config_dict
            if is_width_alone and self.router_noise_policy is None:
                self.__dict__["router_noise_policy"] = _BY_JITTER
            self._resolve_jitter()
            self._validate_routing_options()
            if "num_experts_per_tok" in config_dict:
                self._validate_num_experts()
            self.__dict__["_is_complete"] = True
        except Exception:  # checks the field's type, too
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _resolve_jitter(self) -> None:
        """A jitter width without a policy selects the policy "jitter"."""
        if self.router_noise_policy == _BY_JITTER:
            self.__dict__["router_noise_policy"] = "jitter" if self.router_jitter_noise else None
        if self.router_jitter_noise is None:
            self.__dict__["router_jitter_noise"] = _DEFAULT_JITTER
        if self.router_jitter_noise != _DEFAULT_JITTER and self.router_noise_policy == "rsample":
            raise ValueError(
                f"router_jitter_noise ({self.router_jitter_noise}) has no effect with router_noise_policy='rsample'; "
                "leave one of them out"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like [`PreTrainedConfig.from_dict`]; fields among `kwargs` are checked together with the others."""
        given = {name: kwargs.pop(name) for name in [*kwargs] if name in cls.__annotations__}
        return super().from_dict(changed_fields(config_dict, given), **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Like [`PreTrainedConfig.get_config_dict`]; the config of an NLLB-MoE checkpoint is converted to ours."""
        fields, unused_kwargs = super().get_config_dict(*args, **kwargs)
        return config_fields(fields) if fields.get("model_type") == MODEL_TYPE else fields, unused_kwargs

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Like [`PreTrainedConfig.save_pretrained`], with the code that `auto_map` and `custom_pipelines` name."""
        pipelines = getattr(self, "custom_pipelines", None) or {}
        references = [*(getattr(self, "auto_map", None) or {}).values(), *(item["impl"] for item in pipelines.values())]
        if not os.path.isfile(save_directory):
            save_code(references, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Like [`PreTrainedConfig.to_dict`]; `expert_map` is left out if there is none."""
        fields = super().to_dict()
        fields.pop("_is_complete", None)
        if fields.get("expert_map") is None:
            fields.pop("expert_map", None)
        return fields

    @property
    def default_generation_length(self) -> int:
        """Default `max_length` of a generation config: 256 tokens, or the number of positions if that is smaller."""
        return min(256, self.max_position_embeddings)

    def sparse_layers(self, side: Side) -> list[int]:
        """Indices of the sparse layers of `"encoder"` or `"decoder"`, ascending."""
        explicit = getattr(self, f"{side}_sparse_layers")
        if explicit is not None:
            return sorted(explicit)
        step = getattr(self, f"{side}_sparse_step")
        return [i for i in range(getattr(self, f"{side}_layers")) if step > 0 and (i + 1) % step == 0]

    def num_experts_per_layer(self, side: Side) -> dict[int, int]:
        """Sparse layer index -> number of experts, for one side."""
        if isinstance(self.num_experts, int):
            return dict.fromkeys(self.sparse_layers(side), self.num_experts)
        return self._of_side(side, self.num_experts)

    def expert_map_per_layer(self, side: Side) -> dict[int, list[int]]:
        """Sparse layer index -> expert of each row of the router, for one side; empty without `expert_map`."""
        return {} if self.expert_map is None else self._of_side(side, self.expert_map)

    def _of_side(self, side: Side, per_layer: list[Any]) -> dict[int, Any]:
        """Sparse layer index -> item of a list with one item per sparse layer, the encoder's first."""
        layers = self.sparse_layers(side)
        first = 0 if side == "encoder" else len(self.sparse_layers("encoder"))
        return dict(zip(layers, per_layer[first : first + len(layers)], strict=True))

    def validate_architecture(self) -> None:
        """Check that dimensions, token ids and sparse layers fit together."""
        for name in ("vocab_size", "max_position_embeddings", "d_model", "encoder_layers", "decoder_layers"):
            _require_size(name, getattr(self, name), _MAX_LAYERS if name.endswith("layers") else _MAX_SIZE)
        for side in ("encoder", "decoder"):
            _require_size(f"{side}_ffn_dim", getattr(self, f"{side}_ffn_dim"))
            heads = getattr(self, f"{side}_attention_heads")
            _require_size(f"{side}_attention_heads", heads)
            if self.d_model % heads:
                raise ValueError(f"d_model ({self.d_model}) must be divisible by {side}_attention_heads ({heads})")
            self._validate_sparse_layers(side)
        if self.position_embedding_type == "sinusoidal" and (self.d_model < 4 or self.d_model % 2):
            raise ValueError(f"sinusoidal positions need an even d_model of at least 4, got {self.d_model}")
        for name in ("pad_token_id", "decoder_start_token_id"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be set: the model reads it to build decoder inputs and to skip padding")
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a token of vocab_size ({self.vocab_size})")
        if self.pad_token_id == self.decoder_start_token_id:
            raise ValueError(
                f"decoder_start_token_id ({self.decoder_start_token_id}) must not be pad_token_id: "
                "padding goes to no expert"
            )

    def validate_router(self) -> None:
        """Check the routing options: each alone, against each other, and against the numbers of experts."""
        self._validate_routing_options()
        self._validate_num_experts()

    def _validate_routing_options(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {list(choices)}")
        for name in _PROBABILITIES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and less than 1")
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be positive and finite; or None, which drops no token"
                )
        for name in ("min_capacity", "router_aux_loss_coef", "router_z_loss_coef", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and finite")
        if self.router_jitter_noise is None or not 0.0 <= self.router_jitter_noise < 1.0:
            raise ValueError(f"router_jitter_noise ({self.router_jitter_noise}) must be at least 0 and less than 1")
        if self.router_noise_policy == "rsample" and self.num_experts_per_tok != 1:
            raise ValueError(
                "router_noise_policy='rsample' samples one expert per token, but num_experts_per_tok is "
                f"{self.num_experts_per_tok}; use None or 'jitter'"
            )
        if self.second_expert_policy != "all" and self.num_experts_per_tok != 2:
            raise ValueError(
                f"second_expert_policy={self.second_expert_policy!r} needs num_experts_per_tok=2, "
                f"got {self.num_experts_per_tok}"
            )
        if self.batch_prioritized_routing and self.token_drop_policy != "position":
            raise ValueError(
                "batch_prioritized_routing sets the order in which experts fill, so token_drop_policy must be "
                f"'position', got {self.token_drop_policy!r}"
            )

    def _validate_sparse_layers(self, side: Side) -> None:
        step, layers = getattr(self, f"{side}_sparse_step"), getattr(self, f"{side}_sparse_layers")
        num_layers = getattr(self, f"{side}_layers")
        if step < 0:
            raise ValueError(f"{side}_sparse_step ({step}) must be 0 (dense) or positive")
        if layers is not None and (len(set(layers)) < len(layers) or any(not 0 <= i < num_layers for i in layers)):
            raise ValueError(
                f"{side}_sparse_layers ({layers}) must be distinct layer indices from 0 to {num_layers - 1}, because "
                f"{side}_layers is {num_layers}"
            )

    def _validate_num_experts(self) -> None:
        num_sparse = len(self.sparse_layers("encoder")) + len(self.sparse_layers("decoder"))
        counts = [self.num_experts] if isinstance(self.num_experts, int) else self.num_experts
        if isinstance(self.num_experts, list) and len(counts) != num_sparse:
            raise ValueError(
                f"num_experts ({counts}) lists {len(counts)} layers, but the model has {num_sparse} sparse layers: "
                f"encoder {self.sparse_layers('encoder')}, decoder {self.sparse_layers('decoder')}"
            )
        _require_size("num_experts_per_tok", self.num_experts_per_tok, _MAX_EXPERTS)
        for count in counts if num_sparse else []:
            _require_size("num_experts", count, _MAX_EXPERTS)
            if self.expert_map is None and count < self.num_experts_per_tok:
                raise ValueError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) is more than the experts of a layer ({count})"
                )
        if self.expert_map is not None:
            per_layer = counts * num_sparse if isinstance(self.num_experts, int) else counts
            self._validate_expert_map(self.expert_map, per_layer)

    def _validate_expert_map(self, expert_map: list[list[int]], counts: list[int]) -> None:
        if len(expert_map) != len(counts):
            raise ValueError(
                f"expert_map lists {len(expert_map)} layers, but the model has {len(counts)} sparse layers: "
                f"encoder {self.sparse_layers('encoder')}, decoder {self.sparse_layers('decoder')}"
            )
        for index, (experts, count) in enumerate(zip(expert_map, counts, strict=True)):
            if {*experts} - {count} != {*range(count)}:
                raise ValueError(
                    f"expert_map[{index}] ({experts}) must have every expert from 0 to {count - 1}, and no other "
                    f"number except {count}, because num_experts of the layer is {count}"
                )
            num_rows = len(experts) - experts.count(count)
            if num_rows < self.num_experts_per_tok:
                raise ValueError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) is more than the rows with an expert "
                    f"({num_rows}) of expert_map[{index}] ({experts})"
                )


def changed_fields(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with changes; a changed `router_jitter_noise` takes effect even if no policy was stored."""
    merged = {**fields, **changes}
    if "router_jitter_noise" in changes and "router_noise_policy" not in changes:
        merged["router_noise_policy"] = merged.get("router_noise_policy") or _BY_JITTER
    return merged


def _require_size(name: str, value: int, most: int = _MAX_SIZE) -> None:
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1")
    if value > most:
        raise ValueError(f"{name} ({value}) must be at most {most}")


__all__ = ["ZCodeM3Config", "changed_fields"]
