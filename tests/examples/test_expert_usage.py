"""Counting and dropping experts in the demo."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from expert_usage import count_expert_usage, draw_expert_usage, keep_experts, most_used_experts
from translation_data import Direction

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

TEXT = {"source": ["one", "three four", "five"], "target": ["eins", "drei vier", "fünf"]}


@pytest.fixture
def tokenizer() -> ZCodeM3Tokenizer:
    return ZCodeM3Tokenizer(languages=["en", "de"])


@pytest.fixture
def model(tokenizer: ZCodeM3Tokenizer) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer), init_std=0.3)).eval()


def test_usage_counts_every_token_once(model: ZCodeM3ForConditionalGeneration, tokenizer: ZCodeM3Tokenizer) -> None:
    directions = {Direction("en", "de"): Dataset.from_dict(TEXT)}
    usage = count_expert_usage(model, tokenizer, directions, max_samples=2, batch_size=1)
    num_source = sum(len(tokenizer(text, src_lang="en").input_ids) for text in TEXT["source"][:2])
    num_target = sum(len(tokenizer(text_target=text, tgt_lang="de").input_ids) for text in TEXT["target"][:2])
    assert {key: [int(counts.sum()) for counts in layers] for key, layers in usage.items()} == {
        ("encoder", "en"): [num_source, num_source],
        ("decoder", "de"): [num_target],
    }


def test_most_used_experts_sum_over_languages() -> None:
    usage = {
        ("encoder", "en"): [torch.tensor([5, 0, 3, 0])],
        ("encoder", "de"): [torch.tensor([0, 9, 3, 1])],
        ("decoder", "de"): [torch.tensor([0, 1, 2, 3])],
    }
    assert most_used_experts(usage, keep=2) == {"encoder": [[1, 2]], "decoder": [[2, 3]]}


def test_pruned_model_equals_masked_routers(model: ZCodeM3ForConditionalGeneration) -> None:
    kept = {"encoder": [[0, 2], [1, 3]], "decoder": [[1, 2]]}
    inputs = {"input_ids": torch.randint(5, 200, (2, 7)), "labels": torch.randint(5, 200, (2, 5))}
    pruned = keep_experts(model, kept)
    routers = [model.model.encoder.layers[i].ffn.router for i in (1, 3)] + [model.model.decoder.layers[1].ffn.router]
    for router, experts in zip(routers, kept["encoder"] + kept["decoder"], strict=True):
        router.bias = torch.nn.Parameter(torch.full((4,), -torch.inf))
        router.bias.data[experts] = 0.0
    torch.testing.assert_close(pruned(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_picture(model: ZCodeM3ForConditionalGeneration, tmp_path: Path) -> None:
    usage = {
        ("encoder", "en"): [torch.tensor([1, 0, 3, 0]), torch.tensor([1, 0, 3, 0])],
        ("decoder", "en"): [torch.tensor([0, 1, 2, 3])],
    }
    draw_expert_usage(model, usage, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 5000
