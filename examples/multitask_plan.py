"""Show what a multitask training will do: mixture, tokens per language, steps and memory."""

import math
from collections import Counter

import numpy as np
import torch

from hf_moe_ted import (
    MultitaskTrainingArguments,
    TokenBudgetBatchSampler,
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    propose_length_buckets,
)


def print_plan(sampler: TokenBudgetBatchSampler, config: ZCodeM3Config, args: MultitaskTrainingArguments) -> None:
    """Print it for one process."""
    num_batches = len(sampler)
    steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    draws = sampler.draws(0)[:, 0]
    print_mixture(sampler, draws)
    statistics = sampler.statistics()
    print(f"\nan epoch: {num_batches:,} batches of up to {sampler.max_tokens_per_batch:,} tokens, ", end="")
    print(
        f"{statistics.num_tokens:,} tokens that are no padding, {statistics.num_padded_tokens:,} with padding ", end=""
    )
    print(f"({statistics.padding_share:.1%})")
    if sampler.signatures:
        proposed = propose_length_buckets(sampler.lengths, max_signatures=args.max_signatures)
        print(f"{statistics}\nproposed: --length_buckets {' '.join(map(str, proposed))}\n")
    print(f"training: {steps:,} steps, {steps / steps_per_epoch:.2f} epochs, ", end="")
    print(f"{steps * args.gradient_accumulation_steps * sampler.max_tokens_per_batch:,} tokens at most")
    print_memory(config, args.max_tokens_per_batch)


def print_mixture(sampler: TokenBudgetBatchSampler, draws: np.ndarray) -> None:
    """Print components and languages, and how much the first epoch draws from each."""
    dataset = sampler.dataset
    counts = sampler.component_counts(0)
    tokens_of_component = np.zeros(len(counts), dtype=np.int64)
    np.add.at(tokens_of_component, dataset.component_numbers[draws], sampler.lengths[draws].sum(axis=1))
    print(f"{'component':<24}{'examples':>12}{'drawn':>12}{'share':>9}{'tokens':>14}")
    for component, size, count, tokens in zip(
        dataset.components, dataset.sizes, counts, tokens_of_component, strict=True
    ):
        print(f"{component!s:<24}{size:>12,}{count:>12,}{count / counts.sum():>9.2%}{tokens:>14,}")
    sources, targets = Counter[str](), Counter[str]()
    for draw, (source, target) in zip(draws, sampler.lengths[draws].tolist(), strict=True):
        component = dataset.components[dataset.component_numbers[draw]]
        sources[component.src_lang] += source
        targets[component.tgt_lang] += target
    print(f"\n{'language':<24}{'source tokens':>16}{'target tokens':>16}")
    for language in sorted(sources | targets):
        print(f"{language:<24}{sources[language]:>16,}{targets[language]:>16,}")


def num_active_parameters(model: ZCodeM3ForConditionalGeneration) -> int:
    """Parameters that a token uses, without those of the embedding."""
    top_k = model.config.num_experts_per_tok
    return int(
        sum(
            parameter.numel() * (top_k / parameter.shape[0] if ".experts." in name else 1)
            for name, parameter in model.named_parameters()
            if parameter is not model.get_input_embeddings().weight
        )
    )


def print_memory(config: ZCodeM3Config, max_tokens_per_batch: int) -> None:
    """Print parameters, and memory in GB: exact for weights, gradients and AdamW in float32, about for activations."""
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    total = model.num_parameters()
    active = num_active_parameters(model) + model.get_input_embeddings().weight.numel()
    print(f"parameters: {total:,}, of which a token uses {active:,}")
    tokens = max_tokens_per_batch / 2  # of the source, and of the target
    # per token and layer in bfloat16 with dropout, without attention scores: 34 d_model bytes for attention and
    # feed-forward (https://huggingface.co/papers/2205.05198, section 4.1), 11 of them attention
    activations = tokens * config.d_model * (34 * config.encoder_layers + 45 * config.decoder_layers)
    logits = tokens * config.vocab_size * 2 * 2  # with their gradient, in bfloat16
    parts = {
        "weights": 4 * total,
        "gradients": 4 * total,
        "AdamW": 8 * total,
        "activations": activations,
        "logits": logits,
    }
    print("memory: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items()), end="")
    print(f", together about {sum(parts.values()) / 1e9:.1f} GB")
