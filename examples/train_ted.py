"""Train the shipped model on one process or many: tensor x expert x data parallelism with `TedSeq2SeqTrainer`.

    python examples/train_ted.py
    torchrun --nproc_per_node 4 examples/train_ted.py --tensor_parallel_size 2 --expert_parallel_size 2

The second runs on 4 GPUs, or on CPUs if there are none. At the end the model and its tokenizer are in `output_dir` as
an ordinary folder, with `training_curve.json` and `test_scores.json` (BLEU, chrF and length ratio per direction);
checkpoints in it resume on any other layout and number of processes (`--resume_from_checkpoint`).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.distributed as dist
from datasets import Dataset
from train_translation import print_scores
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Seq2SeqTrainingArguments, set_seed
from translation_data import DATA_DIR, Direction, load_directions, mix, tokenize
from translation_evaluation import Score, TranslationEvaluator, as_json

from hf_moe_ted import TedPlugin, TedSeq2SeqTrainer, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer


@dataclass
class LayoutArguments:
    """Options of TedPlugin; sizes that are not given follow from the number of processes."""

    tensor_parallel_size: int = field(default=1, metadata={"help": "Ranks that split each dense layer."})
    expert_parallel_size: int = field(default=1, metadata={"help": "Ranks that hold different experts."})
    expert_tensor_parallel_size: int | None = field(
        default=None, metadata={"help": "Ranks that split each expert; default: tensor_parallel_size."}
    )
    data_parallel_size: int | None = field(default=None, metadata={"help": "Ranks with different batches."})
    dp_replicate_size: int = field(
        default=1, metadata={"help": "Replicas, such as one per machine; ZeRO shards within each."}
    )
    zero_stage: Literal[1, 2, 3] = field(default=1, metadata={"help": "ZeRO stage: 1, 2 or 3."})
    offload: Literal["cpu"] | None = field(default=None, metadata={"help": "cpu: keep shards and optimizer there."})
    duplicate_token_dropping: bool = field(default=True, metadata={"help": "Send each token to the experts once."})
    communication_aware_checkpointing: bool = field(
        default=True, metadata={"help": "With activation_checkpointing, keep the results of collectives."}
    )
    tile_numel: int | None = field(default=None, metadata={"help": "Elements that the optimizer steps at once."})
    overlap_chunks: int = field(
        default=1,
        metadata={"help": "Parts of a batch; the exchange of one overlaps with the experts' work on another."},
    )
    pad_expert_input_to_capacity: bool = field(
        default=False,
        metadata={
            "help": "Always exchange as many rows as the capacity allows; needs batches of one shape, and a model with "
            "a capacity_factor in its config, which the shipped one has not."
        },
    )
    least_loaded_experts: bool = field(
        default=False, metadata={"help": "Ranks with few tokens compute experts of ranks with many."}
    )
    least_loaded_bound: float = field(
        default=1.3, metadata={"help": "Load of a rank, as a multiple of the mean, above which they do so."}
    )
    least_loaded_min_tokens: int = field(default=1024, metadata={"help": "Tokens of an expert that go at least."})
    timeout_s: float = field(default=600.0, metadata={"help": "Seconds after which waiting for a dead rank ends."})


@dataclass
class TrainingRun:
    """What to train, and for how long. The defaults take about two minutes on two CPU cores."""

    model_name_or_path: str = field(
        default=str(Path(__file__).parent / "checkpoints" / "zcode_m3_demo"),
        metadata={"help": "A model with its tokenizer, such as one that `hf-moe-ted init` wrote."},
    )
    output_dir: str = field(default="runs/ted", metadata={"help": "For the model, scores and checkpoints."})
    data_dir: str = field(default=str(DATA_DIR), metadata={"help": "Folder with *.{split}.tsv.xz files."})
    languages: list[str] = field(default_factory=lambda: ["de"], metadata={"help": "Languages besides English."})
    max_steps: int = 20
    batch_size: int = field(default=32, metadata={"help": "Sentences per step, over all data-parallel ranks."})
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    activation_checkpointing: bool = field(default=False, metadata={"help": "Compute activations again in backward."})
    experts_implementation: str | None = field(default=None, metadata={"help": "Such as zcode_grouped."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights; auto: bfloat16 on GPUs, else float32. Masters are float32."}
    )
    max_length: int = field(default=64, metadata={"help": "Longer texts are truncated, in tokens."})
    save_steps: int = 10
    max_test_samples: int = field(default=50, metadata={"help": "Test sentences per direction."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint of any layout."})
    seed: int = 0


def training_arguments(run: TrainingRun, plugin: TedPlugin) -> Seq2SeqTrainingArguments:
    """
    Raises:
        ValueError: the batch cannot be divided.
    """
    num_batches = plugin.data_parallel_size * run.gradient_accumulation_steps
    if run.batch_size % num_batches:
        raise ValueError(
            f"batch_size ({run.batch_size}) must be divisible by data_parallel_size ({plugin.data_parallel_size}) x "
            f"gradient_accumulation_steps ({run.gradient_accumulation_steps})"
        )
    return Seq2SeqTrainingArguments(
        run.output_dir,
        parallelism_config=plugin,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # else several processes on CPUs do not find one another
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size // num_batches,
        per_device_eval_batch_size=max(run.batch_size // plugin.data_parallel_size, 1),
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        learning_rate=run.learning_rate,
        activation_checkpointing=run.activation_checkpointing,
        activation_checkpointing_kwargs=plugin.activation_checkpointing_kwargs,
        predict_with_generate=True,
        logging_steps=1,
        save_steps=run.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=run.seed,
    )


def evaluate(
    trainer: Any, tokenizer: Any, directions: dict[Direction, Dataset], run: TrainingRun
) -> dict[Direction, Score]:
    """Translate with all ranks, each direction on its own, as a batch has one target language."""
    evaluator = TranslationEvaluator()
    scores = {}
    for direction, data in directions.items():
        data = data.select(range(min(len(data), run.max_test_samples)))
        generated = trainer.predict(
            tokenize(data, tokenizer, direction, run.max_length),
            forced_bos_token_id=tokenizer.get_lang_id(direction.tgt_lang),
            max_length=run.max_length,
            num_beams=1,
        ).predictions
        generated[generated < 0] = tokenizer.pad_token_id  # what fills up shorter sentences
        predictions = tokenizer.batch_decode(generated, skip_special_tokens=True)
        scores[direction] = evaluator.score(direction, list(data["source"]), predictions, list(data["target"]))
    return scores


def main() -> None:
    # its backward can give NaN on Hopper since torch 2.11: docs/upstream/torch_cudnn_attention_gradient.md
    torch.backends.cuda.enable_cudnn_sdp(False)
    layout, run = HfArgumentParser([LayoutArguments, TrainingRun]).parse_args_into_dataclasses()
    plugin = TedPlugin(**asdict(layout))
    args = training_arguments(run, plugin)
    set_seed(run.seed)
    if not args.should_save:
        datasets.disable_progress_bars()

    dtype = run.dtype if run.dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"
    model = ZCodeM3ForConditionalGeneration.from_pretrained(
        run.model_name_or_path,
        distributed_config=plugin.distributed_config,
        dtype=dtype,
        experts_implementation=run.experts_implementation,
    )
    tokenizer = ZCodeM3Tokenizer.from_pretrained(run.model_name_or_path)
    train = load_directions("train", run.languages, data_dir=Path(run.data_dir))
    test = load_directions("test", run.languages, data_dir=Path(run.data_dir))
    trainer = TedSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=mix([tokenize(data, tokenizer, d, run.max_length) for d, data in train.items()], seed=run.seed),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=plugin.tiled_adamw(lr=run.learning_rate),
    )
    trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
    trainer.save_model()
    scores = evaluate(trainer, tokenizer, test, run)
    if args.should_save:
        output_dir = Path(run.output_dir)
        (output_dir / "training_curve.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        (output_dir / "test_scores.json").write_text(json.dumps(as_json(scores), indent=1) + "\n")
        print_scores(scores, title="Test set")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
