"""NLLB-MoE checkpoints (https://huggingface.co/papers/2207.04672) as ZCodeM3: names of config fields and of weights.

NLLB-MoE of transformers 5 runs only two of its experts: docs/upstream/transformers_nllb_moe_routing.md.
"""

from typing import Any

from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

MODEL_TYPE = "nllb-moe"

# M2M100's; NLLB-MoE's config extends it
M2M100_FIELDS = (
    "vocab_size",
    "max_position_embeddings",
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "init_std",
    "scale_embedding",
    "use_cache",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "tie_word_embeddings",
)
_SAME_NAME = (
    *M2M100_FIELDS,
    "encoder_sparse_step",
    "decoder_sparse_step",
    "num_experts",
    "router_dtype",
    "router_bias",
    "batch_prioritized_routing",
    "second_expert_policy",
    "moe_token_dropout",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "output_router_logits",
    "dtype",
    "torch_dtype",
)


def config_fields(nllb_moe: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ZCodeM3Config` from those of `NllbMoeConfig`.

    In training NLLB-MoE's capacity is a fixed number of tokens, whatever the batch size; it becomes
    `capacity_factor=1`. The fraction of the batch that an expert takes in evaluation keeps its meaning; the default 1
    drops nothing. In NLLB-MoE `router_ignore_padding_tokens` means the opposite: padding does not go to experts unless
    it is set. Layer drop has no counterpart.
    """
    fraction = nllb_moe.get("moe_eval_capacity_token_fraction", 1.0)
    normalize_before = nllb_moe.get("normalize_router_prob_before_dropping", False)
    return {
        "model_type": "zcode_m3",
        **{name: nllb_moe[name] for name in _SAME_NAME if name in nllb_moe},
        "num_experts_per_tok": 2,
        "normalize_router_weights": "before_dropping" if normalize_before else "after_dropping",
        "token_drop_policy": "position",
        "capacity_factor": 1.0,
        "eval_capacity_factor": fraction * nllb_moe.get("num_experts", 128) / 2 if 0 < fraction < 1 else None,
        "router_ignore_padding_tokens": not nllb_moe.get("router_ignore_padding_tokens", False),
    }


def weight_conversions() -> list[WeightConverter | WeightRenaming]:
    """How `from_pretrained` reads NLLB-MoE's weights; those of ZCodeM3 match none of the patterns."""
    return [
        WeightRenaming(r"\.ff_layer_norm\.", ".final_layer_norm."),
        WeightRenaming(r"\.cross_attention\.", ".encoder_attn."),
        WeightRenaming(r"\.cross_attention_layer_norm\.", ".encoder_attn_layer_norm."),
        WeightRenaming(r"\.ffn\.router\.classifier\.", ".ffn.router."),
        *(
            WeightConverter(f".ffn.experts.expert_*.{source}", f".ffn.experts.{target}", [MergeModulelist(dim=0)])
            for source, target in (
                ("fc1.weight", "up_proj"),
                ("fc1.bias", "up_proj_bias"),
                ("fc2.weight", "down_proj"),
                ("fc2.bias", "down_proj_bias"),
            )
        ),
    ]
