"""Streams: what a pass holds, exact resume from any batch, shares of ranks, errors in place of endless waiting."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader

from hf_moe_ted import DataCollatorForMultitaskSeq2Seq, Mixture, MultitaskStream, StreamSource

PAIRS = [
    {"source": "s" * (number % 7 + 1), "target": f"target {number}", "src_lang": "en", "tgt_lang": "de"}
    for number in range(30)
]
TEXTS = [{"text": f"neno {number}", "lang": "sw"} for number in range(10)]


@pytest.fixture
def collator(tokenizer: Any) -> DataCollatorForMultitaskSeq2Seq:
    return DataCollatorForMultitaskSeq2Seq(tokenizer)


def stream_of(collator: Any, **options: Any) -> MultitaskStream:
    sources = [
        StreamSource("translation", datasets.Dataset.from_list(PAIRS).to_iterable_dataset(num_shards=2), size=30),
        StreamSource("denoising", TEXTS, size=10),
    ]
    return MultitaskStream(sources, collator, **{"max_tokens_per_batch": 160, "buffer_rows": 16, "seed": 3, **options})


def targets(batches: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example["labels"], skip_special_tokens=True) for batch in batches for example in batch]


def test_batches_keep_the_budget(collator: Any) -> None:
    loader = DataLoader(stream_of(collator), batch_size=None, collate_fn=collator)
    for batch in islice(loader, 20):
        assert batch["input_ids"].numel() + batch["labels"].numel() <= 160


def test_draws_follow_sizes_and_temperature(collator: Any, tokenizer: Any) -> None:
    for mixture, share in (
        (Mixture(), 0.25),
        (Mixture(1e9), 0.5),
        (Mixture(task_weights=dict(translation=0.1, denoising=0.9)), 0.9),
    ):
        texts = targets(islice(stream_of(collator, mixture=mixture), 200), tokenizer)
        assert sum("neno" in text for text in texts) / len(texts) == pytest.approx(share, abs=0.07)


def test_a_source_goes_through_all_rows_before_one_comes_again(collator: Any, tokenizer: Any) -> None:
    times: Counter[str] = Counter()
    stream = stream_of(collator, max_tokens_per_batch=4000, buffer_rows=40)
    for text in targets(islice(stream, 6), tokenizer):  # whole buffers
        times[text] += 1
    assert len(times) == 40
    of_source = [[count for text, count in times.items() if word in text] for word in ("target", "neno")]
    assert all(max(counts) - min(counts) <= 1 for counts in of_source)


def test_shuffled_streams_change_their_order_with_each_pass(collator: Any, tokenizer: Any) -> None:
    shuffled = datasets.Dataset.from_list(PAIRS).to_iterable_dataset().shuffle(seed=0, buffer_size=30)
    source = StreamSource("translation", shuffled, size=30)
    stream = MultitaskStream([source], collator, 4000, buffer_rows=15)
    halves = [targets([batch], tokenizer) for batch in islice(stream, 4)]
    assert {*halves[0]} | {*halves[1]} == {*halves[2]} | {*halves[3]}
    assert {*halves[0]} != {*halves[2]}


@pytest.mark.parametrize("num_batches", [0, 1, 7, 20])
def test_resume_goes_on_with_the_next_batch(num_batches: int, collator: Any) -> None:
    options = {"mixture": Mixture(5.0, temperature_warmup_epochs=2), "both_directions": True}
    expected = list(islice(stream_of(collator, **options), 40))
    first = stream_of(collator, **options)
    for _ in islice(first, num_batches):
        pass
    state = first.state_dict()
    resumed = stream_of(collator, **options)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 40 - num_batches)) == expected[num_batches:]
    assert next(iter(resumed)) == expected[num_batches]  # again from the state


def test_ranks_share_what_is_drawn(collator: Any, tokenizer: Any) -> None:
    options = {"max_tokens_per_batch": 4000, "buffer_rows": 20}
    one = stream_of(collator, **{**options, "buffer_rows": 40})
    shards = [stream_of(collator, **options).shard(2, index) for index in range(2)]
    for whole, *parts in islice(zip(one, *shards, strict=True), 4):
        assert [len(part) for part in parts] == [20, 20]
        assert sorted(targets([whole], tokenizer)) == sorted(targets(parts, tokenizer))


def test_one_worker_gives_the_same_batches_and_more_are_refused(collator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(collator)
    here = [batch["labels"].tolist() for batch in islice(DataLoader(stream, batch_size=None, collate_fn=collator), 5)]
    loader = DataLoader(stream, batch_size=None, collate_fn=collator, num_workers=1)
    assert [batch["labels"].tolist() for batch in islice(loader, 5)] == here
    monkeypatch.setattr("hf_moe_ted.data.multitask_stream.get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match=r"dataloader_num_workers \(2\) must be 0 or 1 for a stream"):
        next(iter(stream))


def test_rows_without_text_are_left_out(collator: Any, tokenizer: Any) -> None:
    rows = [*PAIRS[:3], {**PAIRS[0], "target": ""}]
    stream = MultitaskStream([StreamSource("translation", rows, size=4)], collator, 4000, buffer_rows=8)
    assert sorted(targets(islice(stream, 1), tokenizer)) == sorted(["target 0", "target 1", "target 2"] * 2)


def once() -> Iterator[dict[str, str]]:
    yield from PAIRS[:3]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "a translation stream of size 30 has no row"),
        (once(), {}, "a translation stream of size 30 has no row; can it be iterated again?"),
        ([{**PAIRS[0], "target": ""}], {}, "16 rows in succession have no text"),
        ([*PAIRS[:2], {"source": "Open"}], {}, "row 2 of a translation stream must have the strings"),
        (PAIRS, {"max_tokens_per_batch": 12}, r"max_tokens_per_batch \(12\) is less than the tokens of one example"),
    ],
)
def test_bad_rows_are_errors(dataset: Any, options: dict[str, Any], message: str, collator: Any) -> None:
    options = {"max_tokens_per_batch": 160, "buffer_rows": 16, **options}
    stream = MultitaskStream([StreamSource("translation", dataset, size=30)], collator, **options)
    with pytest.raises(ValueError, match=message):
        next(iter(stream))


def test_bad_options(collator: Any) -> None:
    with pytest.raises(ValueError, match="sources is empty"):
        MultitaskStream([], collator, 160)
    with pytest.raises(ValueError, match=r"task \('translate'\) must be one of"):
        StreamSource("translate", PAIRS, size=1)
    with pytest.raises(ValueError, match=r"size \(0\) must be positive"):
        StreamSource("translation", PAIRS, size=0)
    with pytest.raises(ValueError, match=r"buffer_rows \(0\) must be at least 1"):
        stream_of(collator, buffer_rows=0)
    with pytest.raises(ValueError, match="for exactly the tasks with examples"):
        stream_of(collator, mixture=Mixture(task_weights={"translation": 1.0}))
    with pytest.raises(ValueError, match=r"index \(2\) must be at least 0 and less than num_shards \(2\)"):
        stream_of(collator).shard(2, 2)
    with pytest.raises(ValueError, match="of a stream with 2 shards, but this one has 1"):
        stream_of(collator).load_state_dict(stream_of(collator).shard(2, 0).state_dict())


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_loaded_state_goes_on_in_a_shard(num_shards: int, collator: Any) -> None:
    first = stream_of(collator).shard(num_shards, 0)
    expected = list(islice(first, 12))
    for _ in islice(first, 5):
        pass
    again = stream_of(collator) if num_shards == 1 else stream_of(collator).shard(num_shards, 0)
    again.load_state_dict(first.state_dict())
    assert list(islice(again.shard(num_shards, 0), 7)) == expected[5:]
    with pytest.raises(ValueError, match=f"of a stream with {num_shards} shards, not 3"):
        again.shard(3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("num_draws"), r"the state must have num_draws, .*got"),
        (lambda state: state.update(num_draws=-1), r"num_draws of the state \(-1\) must be at least 0"),
        (lambda state: state.update(num_batches="1"), r"num_batches of the state \('1'\) must be an integer"),
        (lambda state: state.update(passes=[(0, 0), (0, -3)]), r"passes of the state \(-3\) must be at least 0"),
        (lambda state: state.update(passes=[0, 0]), "passes of the state has 0"),
        (lambda state: state.update(passes=[(0, 0)]), "of a stream with 1 sources, but this one has 2"),
    ],
)
def test_damaged_states(change: Any, message: str, collator: Any) -> None:
    state = stream_of(collator).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        stream_of(collator).load_state_dict(state)


def test_bad_numbers(collator: Any) -> None:
    for options, message in [
        ({"buffer_rows": 0}, r"buffer_rows \(0\) must be at least 1"),
        ({"buffer_rows": 1.5}, r"buffer_rows \(1.5\) must be an integer"),
        ({"max_tokens_per_batch": float("nan")}, r"max_tokens_per_batch \(nan\) must be an integer"),
        ({"seed": -1}, r"seed \(-1\) must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_of(collator, **options)
    for size in (0, -1, float("nan"), float("inf"), "9"):
        with pytest.raises(ValueError, match="size"):
            StreamSource("translation", PAIRS, size)


BUCKETS = {"length_buckets": [12, 16, 24, 32], "buffer_rows": 60, "both_directions": True}


def shape_of(batch: Any, collator: Any) -> tuple[int, int, int]:
    tensors = collator(batch)
    (source, target), *others = {tuple(example["padded_lengths"]) for example in batch}
    assert not others
    assert tensors["input_ids"].shape == (len(batch), source) and tensors["labels"].shape == (len(batch), target)
    return (len(batch), source, target)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_have_the_same_few_shapes(num_ranks: int, collator: Any, tokenizer: Any) -> None:
    shards = [stream_of(collator, **BUCKETS).shard(num_ranks, rank) for rank in range(num_ranks)]
    steps, iterators = [], [iter(shard) for shard in shards]
    for _ in range(60):
        batches = [next(iterator) for iterator in iterators]
        shapes = {shape_of(batch, collator) for batch in batches}
        assert len(shapes) == 1
        assert all(rows * (source + target) <= 160 for rows, source, target in shapes)
        steps.append((shapes.pop(), batches))
        assert len({repr(shard.state_dict()) for shard in shards}) == 1
    signatures = {tuple(signature) for signature in shards[0].state_dict()["signatures"]}
    assert sum(shape in signatures for shape, _ in steps) > 40
    # a pass of the sources is in the batches of all ranks together
    texts = Counter(targets([batch for _, batches in steps for batch in batches], tokenizer))
    assert {f"target {number}" for number in range(30)} <= {*texts}


def test_a_buffer_is_in_its_batches_once(collator: Any, tokenizer: Any) -> None:
    one = stream_of(
        collator, **{**BUCKETS, "length_buckets": None, "max_tokens_per_batch": 100_000, "buffer_rows": 120}
    )
    expected = sorted(targets([next(iter(one))], tokenizer))
    found: list[str] = []
    for shard in (stream_of(collator, **BUCKETS).shard(2, rank) for rank in range(2)):
        for batch in shard:
            if shard.state_dict()["num_draws"]:
                break
            found += targets([[example for example in batch if example["labels"]]], tokenizer)
    assert sorted(found) == expected


@pytest.mark.parametrize("num_batches", [0, 1, 7, 50])
def test_few_shapes_resume_with_the_next_batch(num_batches: int, collator: Any) -> None:
    expected = list(islice(stream_of(collator, **BUCKETS), 60))
    first = stream_of(collator, **BUCKETS)
    for _ in islice(first, num_batches):
        pass
    resumed = stream_of(collator, **BUCKETS)
    resumed.load_state_dict(first.state_dict())
    assert list(islice(resumed, 60 - num_batches)) == expected[num_batches:]


def test_states_with_and_without_buckets(collator: Any) -> None:
    plain, bucketed = stream_of(collator), stream_of(collator, **BUCKETS)
    next(iter(plain)), next(iter(bucketed))
    with pytest.raises(ValueError, match=r"the state is of a stream without length_buckets, but this one has \[12, 16"):
        stream_of(collator, **BUCKETS).load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="the state is of a stream with length_buckets, but this one has None"):
        stream_of(collator).load_state_dict(bucketed.state_dict())
    old = {name: value for name, value in plain.state_dict().items() if name != "signatures"}
    stream_of(collator).load_state_dict(old)
    for damaged, message in (([3], "signatures of the state has 3"), ([(0, 1, 1)], r"signatures of the state \(0\)")):
        with pytest.raises(ValueError, match=message):
            bucketed.load_state_dict({**bucketed.state_dict(), "signatures": damaged})


def test_bad_buckets(collator: Any) -> None:
    with pytest.raises(ValueError, match="length_buckets ends at 10, but a text has"):
        next(iter(stream_of(collator, length_buckets=[8, 10])))
    with pytest.raises(ValueError, match=r"length_buckets \(\[16, 8\]\) must be in ascending order"):
        stream_of(collator, length_buckets=[16, 8])
    with pytest.raises(ValueError, match=r"max_signatures \(0\) must be at least 1"):
        stream_of(collator, max_signatures=0)
