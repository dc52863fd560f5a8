"""Multitask training with the Trainer: batches, exact resume, ranks, label smoothing, schedules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_recorder import RecordsWithoutGpu
from tape_recorder import TapeRecorder
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    masking_utils,
)

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    Mixture,
    MultitaskDataset,
    MultitaskSeq2SeqTrainer,
    MultitaskStream,
    MultitaskTrainerMixin,
    MultitaskTrainingArguments,
    StreamSource,
    TedPlugin,
    TedSeq2SeqTrainer,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    initialize_checkpoint,
)
from hf_moe_ted.models import generation, graph_store
from hf_moe_ted.models.beam_search import beam_search
from hf_moe_ted.models.captured_search import captured_search
from hf_moe_ted.testing import run_distributed_test, tiny_config

PAIRS = [
    {"source": f"{n} " + "s" * (n % 13), "target": f"t {n}" * (n % 5 + 1), "src_lang": "en", "tgt_lang": "de"}
    for n in range(40)
]
TEXTS = [{"text": f"neno la {number} hapa", "lang": "sw"} for number in range(12)]
TOKENIZER = ZCodeM3Tokenizer(languages=["en", "de", "sw"], model_max_length=64)


def arguments(folder: Path | str, **options: Any) -> MultitaskTrainingArguments:
    defaults: dict[str, Any] = {"max_tokens_per_batch": 256, "sampling_temperature": 5.0, "logging_steps": 1}
    defaults |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    defaults |= {"learning_rate": 1e-2, "seed": 5}
    return MultitaskTrainingArguments(str(folder), **{**defaults, **options})


def new_model(**config: Any) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(TOKENIZER), dropout=0.1, **config))


def trainer_of(
    folder: Path, dataset: Any = None, config: Any = None, kind: Any = MultitaskSeq2SeqTrainer, **options: Any
) -> MultitaskSeq2SeqTrainer:
    dataset = MultitaskDataset(PAIRS, TEXTS, both_directions=True) if dataset is None else dataset
    model = new_model(**config or {})
    return kind(
        model=model,
        args=arguments(folder, **options),
        train_dataset=dataset,
        eval_dataset=MultitaskDataset(PAIRS[:4], TEXTS[:2]),
        data_collator=DataCollatorForMultitaskSeq2Seq(TOKENIZER, model),
        processing_class=TOKENIZER,
    )


def losses(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def stream() -> MultitaskStream:
    sources = [StreamSource("translation", PAIRS, size=40), StreamSource("denoising", TEXTS, size=12)]
    return MultitaskStream(sources, DataCollatorForMultitaskSeq2Seq(TOKENIZER), 256, buffer_rows=20)


def test_trains_and_evaluates(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, num_train_epochs=3, lr_scheduler_type="constant")
    steps = len(trainer.get_train_dataloader())
    trainer.train()
    assert trainer.state.global_step == 3 * steps
    assert sum(losses(trainer)[-5:]) < sum(losses(trainer)[:5])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


ROWS_OF_ALL_LANGUAGES = MultitaskDataset(
    [PAIRS[3], PAIRS[4] | {"src_lang": "de", "tgt_lang": "sw"}, PAIRS[5] | {"src_lang": "de", "tgt_lang": "en"}],
    TEXTS[:1],
)


def predictor(folder: Path, bf16: bool = False, **generation: Any) -> MultitaskSeq2SeqTrainer:
    options = {"predict_with_generate": True, "generation_max_length": 8, "per_device_eval_batch_size": 3, "bf16": bf16}
    trainer = trainer_of(folder, config={"init_std": 0.5, "experts_implementation": "batched_mm"}, **options)
    trainer.model.generation_config.update(**generation)
    return trainer


def generated(trainer: Any, **options: Any) -> list[list[int]]:
    """The ids of each row without the start and the padding."""
    ids = trainer.predict(ROWS_OF_ALL_LANGUAGES, **options).predictions
    return [[token for token in row[1:].tolist() if token not in (-100, TOKENIZER.pad_token_id)] for row in ids]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True, "max_new_tokens": 4, "max_length": None}]
)
def test_generates_in_the_language_of_each_row(options: dict[str, Any], tmp_path: Path) -> None:
    """A batch may hold several, and those of denoising."""
    trainer = predictor(tmp_path, forced_bos_token_id=TOKENIZER.get_lang_id("en"))
    rows = generated(trainer, **options)
    assert [row[0] for row in rows] == [TOKENIZER.get_lang_id(lang) for lang in ("de", "sw", "en", "sw")]
    if "do_sample" not in options:
        batch = trainer.data_collator([ROWS_OF_ALL_LANGUAGES[row] for row in range(4)])
        for place, row in enumerate(rows):
            inputs = {name: batch[name][place : place + 1] for name in ("input_ids", "attention_mask")}
            expected = trainer.model.eval().generate(**inputs, forced_bos_token_id=row[0], max_length=8, **options)
            assert row == [token for token in expected[0, 1:].tolist() if token != TOKENIZER.pad_token_id]


def test_mixed_precision_generates_by_the_search_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, searches = generated(predictor(tmp_path), num_beams=2), []
    monkeypatch.setattr(generation, "beam_search", lambda *a, **k: searches.append(1) or beam_search(*a, **k))
    trainer = predictor(tmp_path, bf16=True)
    assert generated(trainer, num_beams=2) == expected
    assert len(searches) == 2  # batches
    assert "forward" in vars(trainer.model)  # in autocast, for losses


@pytest.mark.parametrize("num_beams", [1, 2])
def test_captured_searches_of_a_trainer(num_beams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: with mixed precision, and languages that differ in a batch."""
    expected, recorders = generated(predictor(tmp_path), num_beams=num_beams), []
    monkeypatch.setattr(graph_store, "new_recorder", lambda: recorders.append(TapeRecorder()) or recorders[-1])
    monkeypatch.setattr(generation, "DEVICES", ("cpu",))
    # what transformers asks a stream that is captured: else it looks whether a mask is full
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    searches = []
    monkeypatch.setattr(
        generation, "captured_search", lambda *a, **k: searches.append(captured_search(*a, **k)) or searches[-1]
    )
    trainer = predictor(tmp_path, bf16=True)
    trainer.model.enable_input_require_grads()  # as gradient checkpointing does
    assert generated(trainer, num_beams=num_beams) == expected
    assert len(searches) == 2 and all(output is not None for output in searches)  # batches


def test_arguments_of_predict_come_before_the_language_of_the_row(tmp_path: Path) -> None:
    german = TOKENIZER.get_lang_id("de")
    assert [row[0] for row in generated(predictor(tmp_path), forced_bos_token_id=german)] == [german] * 4


def test_one_prediction_per_row(tmp_path: Path) -> None:
    trainer = predictor(tmp_path)
    expected = generated(trainer, num_beams=2)
    trainer.model.generation_config.update(num_return_sequences=2, num_beams=2, return_dict_in_generate=True)
    assert generated(trainer, num_beams=2) == expected
    with pytest.raises(ValueError, match=r"num_return_sequences \(2\) must be 1"):
        generated(trainer, num_beams=2, num_return_sequences=2)


def test_metrics_of_generated_text(tmp_path: Path) -> None:
    seen: list[Any] = []
    trainer = predictor(tmp_path)
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {"rows": len(seen[0])}
    assert trainer.evaluate(ROWS_OF_ALL_LANGUAGES)["eval_rows"] == 4
    assert seen[0][:, 1].tolist() == [TOKENIZER.get_lang_id(lang) for lang in ("de", "sw", "en", "sw")]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_resumes_in_the_middle_of_an_epoch_with_the_same_numbers(is_streamed: bool, tmp_path: Path) -> None:
    steps_per_epoch = len(trainer_of(tmp_path).get_train_dataloader())
    save_at = steps_per_epoch + 3  # in the second epoch
    options: dict[str, Any] = {"temperature_warmup_epochs": 2.0, "max_steps": save_at + 4}
    whole = trainer_of(tmp_path / "whole", stream() if is_streamed else None, **options)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": save_at}
    trainer_of(tmp_path / "run", stream() if is_streamed else None, **options, **saving).train()
    resumed = trainer_of(tmp_path / "run", stream() if is_streamed else None, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{save_at}"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


BUCKETS = [16, 24, 32, 48]


def shapes_of(loader: Any) -> list[tuple[int, int, int]]:
    return [(*batch["input_ids"].shape, batch["labels"].shape[1]) for batch in loader]


def test_length_buckets_are_an_option_of_the_arguments(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, length_buckets=BUCKETS, max_steps=8, save_strategy="steps", save_steps=5)
    shapes = shapes_of(trainer.get_train_dataloader())
    sampler = trainer.get_train_dataloader().batch_sampler
    assert {*sampler.signatures} & {*shapes} and {length for shape in shapes for length in shape[1:]} <= {*BUCKETS}
    trainer.train()
    resumed = trainer_of(tmp_path, length_buckets=BUCKETS, max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses(resumed)[5:] == losses(trainer)[5:]
    one = trainer_of(tmp_path, length_buckets=BUCKETS, max_signatures=1).get_train_dataloader().batch_sampler
    assert len(one.signatures) == 1 < len(sampler.signatures)


class GraphedTrainer(RecordsWithoutGpu, MultitaskSeq2SeqTrainer):
    """Replays on a CPU."""


def test_batches_for_cuda_graphs_have_few_shapes(tmp_path: Path) -> None:
    options = {"cuda_graphs": True, "max_signatures": 3, "max_steps": 14, "max_tokens_per_batch": 128}
    trainer = trainer_of(tmp_path, kind=GraphedTrainer, **options)
    metrics = trainer.train().metrics
    assert metrics["cuda_graphs/captured"] >= 1 and metrics["cuda_graphs/replayed_steps"] >= 1
    loader = trainer.get_train_dataloader()
    from_python = shapes_of(trainer_of(tmp_path, **options | {"cuda_graphs": False}).get_train_dataloader())
    assert {*loader.batch_sampler.signatures} & {*shapes_of(loader)} and len(loader.batch_sampler.signatures) <= 3
    assert len({*shapes_of(loader)}) < len({*from_python})
    given = trainer_of(tmp_path, kind=GraphedTrainer, length_buckets=BUCKETS, **options).get_train_dataloader()
    assert given.batch_sampler.length_buckets == BUCKETS


def test_length_buckets_of_the_command_line(tmp_path: Path) -> None:
    argv = ["--output_dir", str(tmp_path), "--length_buckets", "16", "32", "--max_signatures", "8"]
    (args,) = HfArgumentParser(MultitaskTrainingArguments).parse_args_into_dataclasses(argv)
    assert (args.length_buckets, args.max_signatures) == ([16, 32], 8)
    (args,) = HfArgumentParser(MultitaskTrainingArguments).parse_args_into_dataclasses(argv[:2])
    assert (args.length_buckets, args.max_signatures) == (None, 24)
    assert arguments(tmp_path, length_buckets=range(8, 25, 8)).to_dict()["length_buckets"] == [8, 16, 24]


def test_length_buckets_of_a_stream_are_its_own(tmp_path: Path) -> None:
    sources = [StreamSource("translation", PAIRS, size=40)]
    bucketed = MultitaskStream(sources, DataCollatorForMultitaskSeq2Seq(TOKENIZER), 256, length_buckets=BUCKETS)
    trainer = trainer_of(tmp_path, bucketed, max_steps=3)
    trainer.train()
    same = trainer_of(tmp_path, bucketed, max_steps=3, length_buckets=BUCKETS)
    assert next(iter(same.get_train_dataloader()))["input_ids"].shape[1] in BUCKETS
    with pytest.raises(
        ValueError, match=r"length_buckets \(\[16\]\) of the arguments differ from those of the Multitask"
    ):
        trainer_of(tmp_path, bucketed, max_steps=3, length_buckets=[16]).get_train_dataloader()
    with pytest.raises(ValueError, match=r"differ from those of the MultitaskStream \(None\); give them to the stream"):
        trainer_of(tmp_path, stream(), max_steps=3, length_buckets=BUCKETS).get_train_dataloader()


def shapes_of_rank(folder: str) -> dict[str, Any]:
    """Shapes of the training batches of this rank, and its losses."""

    class Trainer(MultitaskSeq2SeqTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            shapes.append((*inputs["input_ids"].shape, inputs["labels"].shape[1]))
            return super().training_step(model, inputs, *args)

    shapes: list[tuple[int, ...]] = []
    model = new_model(router_aux_loss_coef=0.01)
    trainer = Trainer(
        model=model,
        args=arguments(folder, length_buckets=BUCKETS, num_train_epochs=1, ddp_find_unused_parameters=True),
        train_dataset=MultitaskDataset(PAIRS[:33], TEXTS, both_directions=True),
        data_collator=DataCollatorForMultitaskSeq2Seq(TOKENIZER, model),
    )
    trainer.train()
    return {"shapes": shapes, "losses": losses(trainer), "steps": trainer.state.global_step}


@pytest.mark.slow
def test_ranks_train_on_the_same_shape_in_each_step(tmp_path: Path) -> None:
    ranks = run_distributed_test(shapes_of_rank, 2, str(tmp_path), timeout_s=120.0)
    assert ranks[0]["shapes"] == ranks[1]["shapes"]
    assert len(ranks[0]["shapes"]) == ranks[0]["steps"]
    assert all(loss == loss for loss in ranks[0]["losses"])  # no NaN


def seen_by_rank(folder: str, checkpoint: str, tp_size: int, is_streamed: bool) -> dict[str, Any]:
    """Sources that this rank has trained on, and its losses, with a checkpoint in the middle of the second epoch."""
    plugin = TedPlugin(tensor_parallel_size=tp_size)

    class TedMultitaskTrainer(MultitaskTrainerMixin, TedSeq2SeqTrainer):
        seen: list[list[str]]

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            self.seen.append(TOKENIZER.batch_decode(inputs["input_ids"], skip_special_tokens=True))
            return super().training_step(model, inputs, *args)

    def new_trainer(**options: Any) -> TedMultitaskTrainer:
        model = ZCodeM3ForConditionalGeneration.from_pretrained(
            checkpoint, distributed_config=plugin.distributed_config
        )
        trainer = TedMultitaskTrainer(
            model=model,
            args=arguments(folder, parallelism_config=plugin, max_steps=options.pop("max_steps", 14), **options),
            train_dataset=stream() if is_streamed else MultitaskDataset(PAIRS, TEXTS, both_directions=True),
            data_collator=DataCollatorForMultitaskSeq2Seq(TOKENIZER),
            processing_class=TOKENIZER,
        )
        trainer.seen = []
        return trainer

    first = new_trainer(save_strategy="steps", save_steps=11)
    first.train()
    resumed = new_trainer()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-11")
    return {"seen": first.seen, "resumed": resumed.seen, "losses": losses(first), "resumed_losses": losses(resumed)}


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [False, True])
def test_ranks_of_a_tensor_parallel_group_share_batches_and_others_do_not(is_streamed: bool, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=len(TOKENIZER))
    initialize_checkpoint(config, tmp_path / "model", seed=0)
    ranks = run_distributed_test(
        seen_by_rank, 4, str(tmp_path / "run"), str(tmp_path / "model"), tp_size=2, is_streamed=is_streamed
    )
    assert ranks[0]["seen"] == ranks[1]["seen"]
    assert ranks[2]["seen"] == ranks[3]["seen"]
    assert all(one != other for one, other in zip(ranks[0]["seen"], ranks[2]["seen"], strict=True))
    if not is_streamed:
        # the same batches as one process has, by turns
        dataset = MultitaskDataset(PAIRS, TEXTS, both_directions=True)
        alone = trainer_of(tmp_path, dataset).get_train_dataloader()
        expected = [TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True) for batch in alone]
        num_steps = len(expected) // 2
        assert num_steps < 11
        assert ranks[0]["seen"][:num_steps] == expected[0 : 2 * num_steps : 2]
        assert ranks[2]["seen"][:num_steps] == expected[1 : 2 * num_steps : 2]
    for rank in ranks:
        assert rank["resumed"] == rank["seen"][11:]
        assert rank["resumed_losses"][-3:] == rank["losses"][-3:]


def steps_of_small_dataset(folder: str, num_rows: int) -> int:
    dataset = MultitaskDataset(PAIRS[:num_rows])
    trainer = trainer_of(Path(folder), dataset, num_train_epochs=2)
    trainer.train()
    return trainer.state.global_step


@pytest.mark.slow
def test_fewer_batches_than_ranks_are_repeated(tmp_path: Path) -> None:
    assert run_distributed_test(steps_of_small_dataset, 2, str(tmp_path), 1, timeout_s=120.0) == [2, 2]


def test_label_smoothing_of_the_arguments_is_that_of_the_model(tmp_path: Path) -> None:
    by_options: list[list[float]] = []
    for factor, of_config in ((0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (0.0, 0.0)):
        trainer = trainer_of(
            tmp_path, config={"label_smoothing": of_config}, label_smoothing_factor=factor, max_steps=2
        )
        trainer.train()
        by_options.append(losses(trainer))
    assert by_options[0] == by_options[1] == by_options[2] != by_options[3]
    with pytest.raises(ValueError, match=r"label_smoothing_factor \(0.1\) and config.label_smoothing \(0.2\)"):
        trainer_of(tmp_path, config={"label_smoothing": 0.2}, label_smoothing_factor=0.1)


def test_the_plain_trainer_smooths_without_router_losses(tmp_path: Path) -> None:
    """What `docs/training.md` says of `label_smoothing_factor` with a plain Trainer."""
    model = new_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, label_smoothing=0.1, capacity_factor=None)
    model.config.dropout = 0.0
    features = [DataCollatorForMultitaskSeq2Seq(TOKENIZER, model).encode([pair])[0] for pair in PAIRS[:4]]
    args = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    collator = DataCollatorForSeq2Seq(TOKENIZER, model=model)
    trainer = Seq2SeqTrainer(model, args, train_dataset=features, data_collator=collator)
    model.eval()
    batch = collator(features)
    num_labels = (batch["labels"] != -100).sum()
    smoothed = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_labels)
    model.config.label_smoothing, logits = 0.1, model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-4)


def test_inverse_square_root_schedule(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=9, warmup_steps=4, lr_scheduler_type="inverse_sqrt", learning_rate=0.1)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    # a log has the rate of the step that comes after it
    expected = [0.1 * min((step + 0) / 4, (4 / max(step, 4)) ** 0.5) for step in range(9)]
    assert rates == pytest.approx(expected)


def test_other_datasets_are_as_always(tmp_path: Path) -> None:
    features = DataCollatorForMultitaskSeq2Seq(TOKENIZER).encode(PAIRS[:8])
    trainer = trainer_of(tmp_path, features, per_device_train_batch_size=2)
    assert isinstance(trainer.get_train_dataloader(), DataLoader)
    assert len(trainer.get_train_dataloader()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_temperature": -1.0}, r"temperature \(-1.0\) must be positive"),
        ({"task_weights": '{"translation": 0.5}'}, "sum to 1, but sum to 0.5"),
        ({"task_weights": "translation=1"}, r"task_weights \('translation=1'\) must be a JSON dictionary"),
        ({"length_buckets": [32, 16]}, r"length_buckets \(\[32, 16\]\) must be in ascending order"),
        ({"remove_unused_columns": True}, r"remove_unused_columns \(True\) must be False"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_bad_trainers(tmp_path: Path) -> None:
    dataset, model = MultitaskDataset(PAIRS), new_model()
    with pytest.raises(ValueError, match=r"data_collator \(DataCollatorForSeq2Seq\) must be a DataCollatorForMulti"):
        MultitaskSeq2SeqTrainer(
            model, arguments(tmp_path), train_dataset=dataset, data_collator=DataCollatorForSeq2Seq(TOKENIZER)
        )
    with pytest.raises(ValueError, match="args must be MultitaskTrainingArguments, got Seq2SeqTrainingArguments"):
        MultitaskSeq2SeqTrainer(model, Seq2SeqTrainingArguments(str(tmp_path)), train_dataset=dataset)
    with pytest.raises(ValueError, match=r"max_tokens_per_batch \(8\) is less than the tokens of one example"):
        trainer_of(tmp_path, max_tokens_per_batch=8).train()


def test_arguments_hold_a_mixture(tmp_path: Path) -> None:
    options = {"task_weights": '{"translation": 0.7, "denoising": 0.3}', "temperature_warmup_epochs": 5.0}
    expected = Mixture(5.0, 5.0, {"translation": 0.7, "denoising": 0.3})
    assert arguments(tmp_path, **options).mixture() == expected
