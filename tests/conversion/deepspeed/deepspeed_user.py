"""A user's DeepSpeed program: M2M100 with deepspeed.moe.layer.MoE as some feed-forwards; loads, trains a step, saves.

Run by test_deepspeed_round_trip.py under torchrun, where deepspeed is installed.
"""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn
from transformers import M2M100Config, M2M100ForConditionalGeneration


class Expert(nn.Module):
    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, d_model)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(hidden_states)))


class FeedForward(MoE):
    """Returns the hidden states only, as the layer of M2M100 that it stands in expects."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        output, self.aux_loss, _ = super().forward(hidden_states)
        return output


def user_model(arguments: argparse.Namespace) -> nn.Module:
    config = M2M100Config(**json.loads(arguments.config))
    model = M2M100ForConditionalGeneration(config)
    for layers in (model.model.encoder.layers, model.model.decoder.layers):
        for layer in layers[1::2]:
            moe = FeedForward(
                config.d_model,
                Expert(config.d_model, config.encoder_ffn_dim),
                num_experts=arguments.num_experts,
                ep_size=arguments.expert_parallel_size,
                k=arguments.top_k,
                drop_tokens=False,
                use_rts=False,
                use_residual=arguments.residual,
                top2_2nd_expert_sampling=False,
            )
            layer.fc1, layer.activation_fn, layer.fc2 = moe, nn.Identity(), nn.Identity()
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--batch", type=Path, required=True)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--expert_parallel_size", type=int, default=1)
    parser.add_argument("--top_k", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--residual", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = user_model(arguments)
    parameters = {"params": list(model.parameters()), "name": "parameters"}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(parameters),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": arguments.zero_stage},
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        },
    )
    path, _ = engine.load_checkpoint(str(arguments.load), load_module_only=True)
    assert path is not None
    batch = torch.load(arguments.batch, weights_only=True)
    labels = batch.pop("labels")
    engine.eval()
    with torch.no_grad():
        loaded_logits = engine(**batch).logits
    engine.train()
    engine.backward(engine(**batch, labels=labels).loss)
    engine.step()
    engine.eval()
    with torch.no_grad():
        trained_logits = engine(**batch).logits
    engine.save_checkpoint(str(arguments.save))
    if torch.distributed.get_rank() == 0:
        torch.save({"loaded": loaded_logits, "trained": trained_logits}, arguments.save / "logits.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
