"""Base class of all ZCodeM3 models: how their weights are initialized, loaded, sharded, saved and resized."""

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel

from .configuration_zcode_m3 import ZCodeM3Config
from .expert_computation import check_computation, default_computation
from .experts import ZCodeM3Experts
from .nllb_moe import weight_conversions
from .positions import ZCodeM3SinusoidalPositionalEmbedding
from .router import ZCodeM3Router

register_checkpoint_conversion_mapping(ZCodeM3Config.model_type, weight_conversions(), overwrite=True)

_EXPERT_KEY = re.compile(r"\.ffn\.(experts|router)\.")


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
                "ZCodeM3Config.from_pretrained, which also reads configs of NLLB-MoE"
            )
        super().__init__(config, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module (`to`, `half`), but modules that cannot be moved refuse before others have been."""
        for module in self.modules():
            if getattr(module, "cannot_be_moved", False):
                module._apply(fn)
        return super()._apply(fn, recurse)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the decorator in the source of the modeling file, but ours is in experts.py:
        # docs/upstream/transformers_experts_by_source.md
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        sides = [side for side in ("encoder", "decoder") if self.config.sparse_layers(side)]
        names = ["d_model", *(f"{side}_ffn_dim" for side in sides)] if sides else []
        widths = {name: getattr(self.config, name) for name in names}
        dtype = torch.get_default_dtype()  # dtype of the weights that are being made
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
                but a model with some random experts would still translate, only worse. `ignore_mismatched_sizes=True`
                accepts such a checkpoint.
        """
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        wrong = {"missing": loading_info.missing_keys, "unexpected": loading_info.unexpected_keys}
        wrong = {word: sorted(key for key in keys if _EXPERT_KEY.search(key)) for word, keys in wrong.items()}
        if any(wrong.values()) and not load_config.ignore_mismatched_sizes:
            lists = "; ".join(f"{word}: {', '.join(keys)}" for word, keys in wrong.items() if keys)
            raise ValueError(
                f"the experts of {load_config.pretrained_model_name_or_path} do not match its config ({lists}); "
                "correct num_experts and the sparse layers, or pass ignore_mismatched_sizes=True to initialize "
                "missing weights at random and ignore unexpected ones"
            )
        distributed_config: Any = getattr(model.config, "distributed_config", None)
        if hasattr(distributed_config, "finish_loading"):  # such as the one of TedConfig
            distributed_config.finish_loading(model)
        return loading_info

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh_manager: Any) -> nn.Module:
        """Shard the model as transformers does, or with the own method of a `distributed_config` such as TedConfig."""
        if not hasattr(distributed_config, "distribute"):
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        return distributed_config.distribute(model, mesh_manager)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, expert_memory: Any = None, **kwargs: Any
    ) -> Any:
        """Like [`PreTrainedModel.from_pretrained`].

        Args:
            pretrained_model_name_or_path: a folder, or the id of a model on the Hub.
            expert_memory: [`ExpertMemory`], *optional*: the device holds some experts, and others are loaded when
                needed. The model must be in a folder.
        """
        if expert_memory is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if not hasattr(expert_memory, "load"):
            raise ValueError(f"expert_memory ({expert_memory!r}) must be an ExpertMemory, such as ExpertMemory('8GB')")
        return expert_memory.load(cls, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Like [`PreTrainedModel.save_pretrained`], but with our own names; the parent would write NLLB-MoE's.

        Raises:
            ValueError: the model was loaded with `expert_memory`, so it does not hold its experts.
        """
        if (expert_memory := getattr(self, "expert_memory", None)) is not None:
            expert_memory.refuse("save_pretrained")
        options: Any = getattr(self, "generation_config", None)
        if getattr(options, "cuda_graphs", None) is not None:
            options._from_model_config = False  # for a quantized model our own options are not read again
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
        """Like [`PreTrainedModel.activation_checkpointing_enable`].

        Raises:
            ValueError: `use_reentrant=True`: its first forward runs without gradients, and the router losses are
                computed from what the routers return there, so their gradients would be lost.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError("use_reentrant=True loses the gradients of the router losses; use use_reentrant=False")
        super().activation_checkpointing_enable(options, every_n_layers, offload)

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        for module in (self.get_input_embeddings(), self.get_output_embeddings()):  # before one of them is changed
            if module is not None and not hasattr(module, "weight"):
                raise ValueError(
                    f"resize_token_embeddings: {type(module).__name__} has no floating-point rows to add or remove; "
                    "resize the model before you quantize it"
                )
        # `set_input_embeddings` turns three embeddings into one; without tying, encoder and decoder keep their own
        own: list[tuple[Any, Any]] = []
        if not self.config.tie_word_embeddings:
            sides = (child for child in self.base_model.children() if isinstance(child, ZCodeM3PreTrainedModel))
            own = [(side, side.embed_tokens) for side in sides]
        shared = super()._resize_token_embeddings(*args, **kwargs)
        for side, embedding in own:
            side.embed_tokens = self._get_resized_embeddings(embedding, *args, **kwargs)
        return shared


__all__ = ["ZCodeM3PreTrainedModel"]
