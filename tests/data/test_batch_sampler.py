"""Epochs of batches: budget, coverage, mixture, seeds, few shapes; against a slow reference that pads."""

import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    Mixture,
    MultitaskDataset,
    TokenBudgetBatchSampler,
    ZCodeM3Tokenizer,
    propose_length_buckets,
)
from hf_moe_ted.data.batch_sampler import batch_ends, token_lengths

BUDGET = 160
BUCKETS = [16, 24, 32, 48]
EXAMPLES = Path(__file__).parents[2] / "examples"


def pairs(num_rows: int, tgt_lang: str, seed: int = 0) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    lengths = zip(random.integers(2, 36, size=num_rows).tolist(), random.integers(0, 8, num_rows).tolist(), strict=True)
    return [
        {"source": f"{n:02d}" + "s" * length, "target": "t" * (length + more), "src_lang": "en", "tgt_lang": tgt_lang}
        for n, (length, more) in enumerate(lengths)
    ]


@pytest.fixture
def dataset() -> MultitaskDataset:
    texts = [{"text": f"neno {number} na lingine", "lang": "sw"} for number in range(20)]
    return MultitaskDataset(pairs(60, "de") + pairs(15, "sw", seed=1), texts, both_directions=True)


@pytest.fixture
def collator(tokenizer: Any) -> DataCollatorForMultitaskSeq2Seq:
    return DataCollatorForMultitaskSeq2Seq(tokenizer, pad_to_multiple_of=4)


def epoch_of(sampler: TokenBudgetBatchSampler, epoch: int) -> list[list[Any]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_padded_batches_keep_the_budget_and_use_it(dataset: Any, collator: Any) -> None:
    sampler = TokenBudgetBatchSampler(dataset, collator, BUDGET)
    sizes = []
    for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=collator):
        assert batch["input_ids"].numel() + batch["labels"].numel() <= BUDGET
        sizes.append(batch["attention_mask"].sum().item() + (batch["labels"] != -100).sum().item())
    larger = TokenBudgetBatchSampler(dataset, collator, 8 * BUDGET)
    in_order = batch_ends(larger.padded_lengths, 8 * BUDGET)
    assert len(larger) < 0.75 * len(in_order)  # as similar lengths need less padding
    lengths = token_lengths(dataset, collator)
    assert sum(sizes) <= lengths.sum()  # masks are shorter than what they cover
    assert len({*map(len, sampler)}) > 2


def test_an_epoch_at_temperature_one_is_every_example_once(dataset: Any, collator: Any) -> None:
    sampler = TokenBudgetBatchSampler(dataset, collator, BUDGET)
    epochs = [epoch_of(sampler, epoch) for epoch in (0, 1, 0)]
    for epoch in epochs:
        assert sorted(draw.example for batch in epoch for draw in batch) == [*range(len(dataset))]
        assert len(epoch) == len(sampler)
    assert epochs[0] == epochs[2]
    together = [{frozenset(draw.example for draw in batch) for batch in epoch} for epoch in epochs[:2]]
    assert len(together[0] & together[1]) < len(together[0]) / 2
    seeds = [{draw.noise_seed for batch in epoch for draw in batch} for epoch in epochs[:2]]
    assert len(seeds[0] | seeds[1]) == 2 * len(dataset)
    assert epoch_of(TokenBudgetBatchSampler(dataset, collator, BUDGET, seed=1), 0) != epochs[0]


def test_a_component_goes_through_all_examples_before_one_comes_again(dataset: Any, collator: Any) -> None:
    mixture = Mixture(5.0, temperature_warmup_epochs=2, task_weights={"translation": 0.6, "denoising": 0.4})
    sampler = TokenBudgetBatchSampler(dataset, collator, BUDGET, mixture=mixture, examples_per_epoch=101)
    times = np.zeros(len(dataset), dtype=int)
    tasks = [component.task for component in dataset.components]
    for epoch in range(5):
        drawn = sampler.draws(epoch)[:, 0]
        counts = np.bincount(dataset.component_numbers[drawn], minlength=len(dataset.components))
        expected = 101 * mixture.probabilities(tasks, dataset.sizes, epoch)
        assert abs(counts - expected).max() < 1
        assert counts.sum() == 101
        times += np.bincount(drawn, minlength=len(dataset))
        for component in range(len(dataset.components)):
            of_component = times[dataset.component_numbers == component]
            assert of_component.max() - of_component.min() <= 1
    assert times.max() > 5


def test_every_epoch_has_as_many_batches(dataset: Any, collator: Any) -> None:
    mixture = Mixture(50.0, temperature_warmup_epochs=2)
    sampler = TokenBudgetBatchSampler(dataset, collator, BUDGET, mixture=mixture)
    assert {len(epoch_of(sampler, epoch)) for epoch in range(4)} == {len(sampler)}
    num_made = {len(sampler._batches_of(epoch)) for epoch in range(4)}
    assert len(num_made) > 1  # so that some were repeated or left out


def test_greedy_batches_are_those_of_a_slow_reference() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, size=(200, 2))
    ends, start = [], 0
    for end in range(1, 201):
        if end == 200 or lengths[start : end + 1].max(axis=0).sum() * (end + 1 - start) > 120:
            ends.append(end)
            start = end
    assert batch_ends(lengths, 120) == ends
    assert batch_ends(np.full((300, 2), 61), 120) == [*range(1, 301)]  # an example that is too long stands alone


def test_lengths_are_those_of_the_tokenizer(dataset: Any, collator: Any, tokenizer: Any) -> None:
    for (source, target), number in zip(token_lengths(dataset, collator).tolist(), range(len(dataset)), strict=True):
        example = dataset[number]
        assert source == len(tokenizer(example["source"], src_lang=example["src_lang"])["input_ids"])
        assert target == len(tokenizer(example["target"], src_lang=example["tgt_lang"])["input_ids"])


def test_workers_make_the_same_batches(dataset: Any, collator: Any) -> None:
    sampler = TokenBudgetBatchSampler(dataset, collator, BUDGET)
    here = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator))
    there = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=2))
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_input(dataset: Any, collator: Any) -> None:
    with pytest.raises(ValueError, match=r"max_tokens_per_batch \(40\) is less than the tokens of one example, \d+"):
        TokenBudgetBatchSampler(dataset, collator, 40)
    with pytest.raises(ValueError, match=r"examples_per_epoch \(0\) must be at least 1"):
        TokenBudgetBatchSampler(dataset, collator, BUDGET, examples_per_epoch=0)
    assert len(TokenBudgetBatchSampler(dataset, collator, BUDGET, examples_per_epoch=1)) == 1
    with pytest.raises(ValueError, match=r"lengths has the shape \(3, 2\), but must have \(170, 2\)"):
        TokenBudgetBatchSampler(dataset, collator, BUDGET, lengths=np.ones((3, 2)))
    num = len(dataset)
    for options, message in [
        ({"examples_per_epoch": 2.5}, r"examples_per_epoch \(2.5\) must be an integer"),
        ({"max_tokens_per_batch": float("nan")}, r"max_tokens_per_batch \(nan\) must be an integer"),
        ({"max_tokens_per_batch": -5}, r"max_tokens_per_batch \(-5\) must be at least 1"),
        ({"seed": -1}, r"seed \(-1\) must be at least 0"),
        ({"lengths": np.full((num, 2), np.nan)}, r"lengths \(float64\) must be integers of at least 1"),
        ({"lengths": np.zeros((num, 2), dtype=int)}, r"lengths \(int64\) must be integers of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenBudgetBatchSampler(dataset, collator, **{"max_tokens_per_batch": BUDGET, **options})
    weights = {"translation": 1.0}
    with pytest.raises(ValueError, match="must have positive weights for exactly the tasks with examples"):
        TokenBudgetBatchSampler(dataset, collator, BUDGET, mixture=Mixture(task_weights=weights))


def test_what_holds_for_all_budgets(dataset: Any, collator: Any) -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        lengths = 8 * random.integers(1, 10 ** random.integers(1, 4), size=(len(dataset), 2))  # as they are padded
        longest = int(lengths.sum(axis=1).max())
        budget = longest + int(random.choice([0, 1, random.integers(10 * longest), 10**12]))
        num_examples = int(random.choice([1, 7, 500]))
        options = {"examples_per_epoch": num_examples, "lengths": lengths, "seed": int(random.integers(2**40))}
        batches = list(TokenBudgetBatchSampler(dataset, collator, budget, **options))
        assert sum(map(len, batches)) == num_examples
        for batch in batches:
            of_batch = lengths[[draw.example for draw in batch]]
            assert len(batch) * of_batch.max(axis=0).sum() <= budget
        with pytest.raises(ValueError, match=rf"max_tokens_per_batch \({longest - 1}\) is less than the tokens of one"):
            TokenBudgetBatchSampler(dataset, collator, longest - 1, **options)


def shapes_of(batches: Any) -> list[tuple[int, int, int]]:
    """The shape of each batch of draws, which the draws say."""
    lengths = [{draw.padded_lengths for draw in batch} for batch in batches]
    assert all(len(of_batch) == 1 for of_batch in lengths)
    return [(len(batch), *next(iter(of_batch))) for batch, of_batch in zip(batches, lengths, strict=True)]


def sampler_of(dataset: Any, collator: Any, **options: Any) -> TokenBudgetBatchSampler:
    return TokenBudgetBatchSampler(dataset, collator, BUDGET, **{"length_buckets": BUCKETS, **options})


def test_few_shapes_are_those_of_the_tensors(dataset: Any, collator: Any) -> None:
    sampler = sampler_of(dataset, collator)
    tensors = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator))
    padded = 0
    for batch, (rows, source, target) in zip(tensors, shapes_of(list(sampler)), strict=True):
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (rows, source)
        assert batch["labels"].shape == (rows, target)
        assert rows * (source + target) <= BUDGET
        padded += rows * (source + target)
    statistics = sampler.statistics()
    counts = Counter(shapes_of(list(sampler)))
    assert {shape.signature: shape.num_batches for shape in statistics.signatures + statistics.leftovers} == counts
    assert statistics.num_padded_tokens == padded
    assert statistics.num_tokens == sampler.lengths.sum()
    assert len(statistics.signatures) <= len(sampler.signatures) <= 24
    assert statistics.leftover_share < 0.2


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_have_the_same_shape_in_each_step(num_ranks: int, dataset: Any, collator: Any) -> None:
    """By the shares that Accelerate makes."""
    sampler = sampler_of(dataset, collator, data_parallel_size=num_ranks)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        shards = [[*BatchSamplerShard(sampler, num_ranks, rank)] for rank in range(num_ranks)]
        shapes = [shapes_of(shard) for shard in shards]
        assert all(of_rank == shapes[0] for of_rank in shapes)
        assert len(sampler) == num_ranks * len(shapes[0]) == len([*sampler])
        drawn = [draw.example for shard in shards for batch in shard for draw in batch if draw.example is not None]
        assert sorted(drawn) == [*range(len(dataset))]
        epochs.append([[draw.example for draw in batch] for batch in shards[-1]])
    assert epochs[0] != epochs[1] != epochs[2]
    sampler.set_epoch(0)
    again = [*BatchSamplerShard(sampler, num_ranks, num_ranks - 1)]
    assert [[draw.example for draw in batch] for batch in again] == epochs[0]


def test_more_ranks_than_examples(collator: Any) -> None:
    dataset = MultitaskDataset(pairs(2, "de"))
    sampler = sampler_of(dataset, collator, data_parallel_size=3)
    batches = list(sampler)
    assert len({*shapes_of(batches)}) == 1 and len(batches) == 3
    assert sorted(str(draw.example) for batch in batches for draw in batch) == ["0", "1", "None"]
    only_padding = next(batch for batch in batches if batch[0].example is None)
    assert (collator(dataset.__getitems__(only_padding))["labels"] == -100).all()


def test_shapes_stay_over_epochs_and_mixtures(dataset: Any, collator: Any) -> None:
    mixture = Mixture(50.0, temperature_warmup_epochs=2)
    sampler = sampler_of(dataset, collator, mixture=mixture, data_parallel_size=2)
    assert {len(epoch_of(sampler, epoch)) for epoch in range(4)} == {len(sampler)}
    assert len({len(sampler._batches_of(epoch)) for epoch in range(4)}) > 1
    assert sampler.signatures == sampler_of(dataset, collator, mixture=mixture, data_parallel_size=2).signatures
    for epoch in range(4):
        used = [shape.signature for shape in sampler.statistics(epoch).signatures]
        assert {*used} <= {*sampler.signatures}
        shapes = shapes_of(epoch_of(sampler, epoch))
        assert shapes[::2] == shapes[1::2]


def test_skipping_batches_goes_on_with_the_next(dataset: Any, collator: Any) -> None:
    loader = DataLoader(dataset, batch_sampler=sampler_of(dataset, collator), collate_fn=collator)
    expected = list(loader)
    for batch, other in zip(skip_first_batches(loader, 5), expected[5:], strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


def test_real_text() -> None:
    """Padding, shapes, and that batches are of several languages."""
    with lzma.open(EXAMPLES / "data" / "chromium_l10n.train.tsv.xz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    tokenizer = ZCodeM3Tokenizer.from_pretrained(EXAMPLES / "checkpoints" / "zcode_m3_demo")
    known = [row for row in rows[::24] if row[0] in tokenizer.languages]
    text = [{"source": row[1], "target": row[2], "src_lang": "en", "tgt_lang": row[0]} for row in known]
    dataset = MultitaskDataset(text, both_directions=True)
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=128)
    lengths = token_lengths(dataset, collator)
    options: dict[str, Any] = {"lengths": lengths, "data_parallel_size": 2}
    by_hand, proposed = (
        TokenBudgetBatchSampler(dataset, collator, 512, length_buckets=buckets, **options)
        for buckets in ([16, 32, 64, 128], propose_length_buckets(lengths))
    )
    assert proposed.statistics().padding_share < 0.2 < by_hand.statistics().padding_share
    assert len(proposed.signatures) <= 24
    assert proposed.statistics().leftover_share < 0.03
    languages = [
        {dataset.components[dataset.component_numbers[draw.example]] for draw in batch if draw.example is not None}
        for batch in proposed
    ]
    assert np.mean([len(of_batch) for of_batch in languages]) > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_buckets": [16, 20]}, r"length_buckets ends at 20, but a text has \d+ tokens"),
        ({"length_buckets": [18, 64]}, r"length_buckets \(\[18\]\) must be multiples of pad_to_multiple_of \(4\)"),
        ({"length_buckets": [16, 160]}, r"max_tokens_per_batch \(160\) is less than the tokens of one example, 320"),
        ({"length_buckets": [64, 32]}, r"length_buckets \(\[64, 32\]\) must be in ascending order"),
        ({"max_signatures": 0}, r"max_signatures \(0\) must be at least 1"),
        ({"data_parallel_size": 0}, r"data_parallel_size \(0\) must be at least 1"),
    ],
)
def test_bad_buckets(options: dict[str, Any], message: str, dataset: Any, collator: Any) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of(dataset, collator, **options)


def test_buckets_beyond_the_positions_of_the_model(dataset: Any, tokenizer: Any) -> None:
    model: Any = torch.nn.Module()
    model.config = type("Config", (), {"max_position_embeddings": 48})
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model)
    with pytest.raises(
        ValueError, match=r"length_buckets pads a text of \d+ tokens to 56, but the model has positions"
    ):
        sampler_of(dataset, collator, length_buckets=[16, 56], lengths=np.full((len(dataset), 2), 40))
    assert sampler_of(dataset, collator, length_buckets=[16, 48, 56], lengths=np.full((len(dataset), 2), 40))


def test_lengths_of_another_collator_are_noticed(dataset: Any, collator: Any) -> None:
    sampler = sampler_of(dataset, collator, lengths=np.full((len(dataset), 2), 5))
    with pytest.raises(
        ValueError, match=r"input_ids of an example has \d+ tokens in a batch of 16; token_lengths must"
    ):
        list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator))
