"""Multitask training with the Trainer: arguments, and the data loader that follows from them."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    LogitsProcessorList,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.utils import logging

from ..cuda_graphs.trainer_mixin import CudaGraphArguments, CudaGraphsTrainerMixin
from ..data.batch_sampler import TokenBudgetBatchSampler, token_lengths
from ..data.collator import DataCollatorForMultitaskSeq2Seq
from ..data.length_buckets import MAX_SIGNATURES, check_length_buckets, propose_length_buckets
from ..data.mixture import Mixture
from ..data.multitask_dataset import MultitaskDataset
from ..data.multitask_stream import MultitaskStream
from ..models.generation import FirstTokens
from ..models.language_codes import language_ids

logger = logging.get_logger(__name__)


@dataclass
class MultitaskTrainingArguments(CudaGraphArguments, Seq2SeqTrainingArguments):
    """[`Seq2SeqTrainingArguments`] with options for drawing from a [`MultitaskDataset`].

    `max_tokens_per_batch` replaces `per_device_train_batch_size`, which has no effect on such a dataset. A
    [`MultitaskStream`] has its own options.

    Args:
        max_tokens_per_batch: most tokens of one batch of one data-parallel rank: source, target and padding.
        sampling_temperature: `T` of [`Mixture`].
        temperature_warmup_epochs: epochs in which `T` rises from 1.
        task_weights: share of the examples by task, a dictionary or its JSON; by default tasks count by size.
        examples_per_epoch: number of examples; by default that of the dataset.
        length_buckets: lengths in tokens, ascending, to which sources and targets are padded. Batches then have few
            shapes, and in a step all data-parallel ranks have the same one. By default texts are padded to the longest
            of a batch; with `cuda_graphs` the default is [`propose_length_buckets`].
        max_signatures: largest number of batch shapes with `length_buckets`, without those of remaining examples.

    Raises:
        ValueError: see [`Mixture`]; `task_weights` is no JSON, `length_buckets` are invalid, or `remove_unused_columns`
            is on.

    `cuda_graphs`, `max_cuda_graphs` and `expert_load_bound` are those of [`CudaGraphArguments`].
    """

    max_tokens_per_batch: int = field(
        default=8192, metadata={"help": "Tokens of a batch of one data-parallel rank: source, target and padding."}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature over languages and tasks; 1 samples by size."}
    )
    temperature_warmup_epochs: float = field(
        default=0.0, metadata={"help": "Epochs in which the sampling temperature rises from 1."}
    )
    task_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": 'Share of the examples by task, such as {"translation": 0.7, "denoising": 0.3}.'},
    )
    examples_per_epoch: int | None = field(
        default=None, metadata={"help": "Number of examples per epoch; default: that of the dataset."}
    )
    length_buckets: list[int] | None = field(
        default=None,
        metadata={
            "help": "Lengths in tokens to which texts are padded; default: the longest of a batch, or with cuda_graphs "
            "lengths chosen for the data."
        },
    )
    max_signatures: int = field(
        default=MAX_SIGNATURES, metadata={"help": "Largest number of batch shapes with length_buckets."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the collator needs text and languages, not the model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.task_weights, str):
            try:
                self.task_weights = json.loads(self.task_weights)
            except json.JSONDecodeError as error:
                raise ValueError(f"task_weights ({self.task_weights!r}) must be a JSON dictionary") from error
        self.mixture()  # raises if it is invalid
        if self.length_buckets is not None:
            self.length_buckets = check_length_buckets(self.length_buckets)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns (True) must be False: the collator needs the columns of the text")

    def mixture(self) -> Mixture:
        """The [`Mixture`] of these arguments."""
        weights: Any = self.task_weights
        return Mixture(self.sampling_temperature, self.temperature_warmup_epochs, weights)


class MultitaskTrainerMixin(Trainer):
    """Adds multitask training to a [`Trainer`]; for sharded models put it before [`TedSeq2SeqTrainer`].

    - For a [`MultitaskDataset`], [`TokenBudgetBatchSampler`] draws batches with the options of
      [`MultitaskTrainingArguments`]. A [`MultitaskStream`] makes its own batches. Other datasets work as usual. The
      data collator must be a [`DataCollatorForMultitaskSeq2Seq`]. A run that resumes in the middle of an epoch gets the
      same examples and noise as an uninterrupted one.
    - `label_smoothing_factor` is passed to models that smooth labels in their own loss (`config.label_smoothing`). The
      Trainer would remove the labels from the model's inputs, so the router losses would be lost, and would compute
      float32 probabilities of the whole vocabulary.
    - With `predict_with_generate` each row is translated into the language of its labels, one translation per row,
      whatever the model's generation config says. `forced_bos_token_id` or `decoder_input_ids` in the arguments of
      `evaluate` and `predict` override this.

    ```python
    class TedMultitaskTrainer(MultitaskTrainerMixin, TedSeq2SeqTrainer):
        pass
    ```

    Args:
        token_lengths: `lengths` of [`TokenBudgetBatchSampler`], if they were counted before.
        args, kwargs: arguments of the [`Trainer`].

    Raises:
        ValueError: arguments or collator are of another kind, there are two different label smoothings, or
            `length_buckets` differ from those of a [`MultitaskStream`].
    """

    args: MultitaskTrainingArguments

    def __init__(self, *args: Any, token_lengths: np.ndarray | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.token_lengths = token_lengths
        if not isinstance(self.args, MultitaskTrainingArguments):
            raise ValueError(f"args must be MultitaskTrainingArguments, got {type(self.args).__name__}")
        if self._is_multitask and not isinstance(self.data_collator, DataCollatorForMultitaskSeq2Seq):
            raise ValueError(
                f"data_collator ({type(self.data_collator).__name__}) must be a DataCollatorForMultitaskSeq2Seq for a "
                f"{type(self.train_dataset).__name__}"
            )
        if self.label_smoother is not None:
            self._smooth_labels_in_model()

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, MultitaskStream):
            return self._loader_of_stream(self.train_dataset)
        if isinstance(self.train_dataset, MultitaskDataset):
            return self._loader_of_dataset(self.train_dataset)
        return super().get_train_dataloader()

    def _loader_of_stream(self, stream: MultitaskStream) -> DataLoader:
        if self.args.length_buckets not in (None, stream.length_buckets):
            raise ValueError(
                f"length_buckets ({self.args.length_buckets}) of the arguments differ from those of the "
                f"MultitaskStream ({stream.length_buckets}); give them to the stream"
            )
        shard = stream.shard(self._data_parallel_size, self.args.process_index // self.get_tp_size())
        # like `Accelerator.prepare`, but without splitting by rank, which the stream has done
        return prepare_data_loader(
            DataLoader(shard, batch_size=None, **self._loader_options()),
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def _loader_of_dataset(self, dataset: MultitaskDataset) -> DataLoader:
        collator: Any = self.data_collator
        lengths = token_lengths(dataset, collator) if self.token_lengths is None else self.token_lengths
        sampler = TokenBudgetBatchSampler(
            dataset,
            collator,
            self.args.max_tokens_per_batch,
            mixture=self.args.mixture(),
            examples_per_epoch=self.args.examples_per_epoch,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            length_buckets=self.args.length_buckets or self._buckets_for_graphs(lengths),
            max_signatures=self.args.max_signatures,
            data_parallel_size=self._data_parallel_size,
            lengths=lengths,
        )
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, **self._loader_options()))

    def _buckets_for_graphs(self, lengths_N2: np.ndarray) -> list[int] | None:
        """Buckets for CUDA graphs; without them almost every batch has its own shape, and no step is replayed."""
        if not self.args.cuda_graphs:
            return None
        collator: Any = self.data_collator
        buckets = propose_length_buckets(
            lengths_N2, max_signatures=self.args.max_signatures, multiple_of=collator.pad_to_multiple_of or 2
        )
        logger.info(f"length_buckets for cuda_graphs: {buckets}")
        return buckets

    @property
    def _data_parallel_size(self) -> int:
        return int(self.args.world_size // self.get_tp_size())

    def _loader_options(self) -> dict[str, Any]:
        names = ("num_workers", "pin_memory", "persistent_workers", "multiprocessing_context", "in_order")
        options = {name: getattr(self.args, f"dataloader_{name}") for name in (*names, "prefetch_factor")}
        return {"collate_fn": self.data_collator, **options}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Like [`Seq2SeqTrainer.prediction_step`], but it generates in the language of the labels.

        Raises:
            ValueError: `num_return_sequences` is above 1, but a row of labels needs one prediction.
        """
        if self.args.predict_with_generate and isinstance(self, Seq2SeqTrainer) and not prediction_loss_only:
            gen_kwargs = self._one_in_language_of(inputs.get("labels"), getattr(self, "_gen_kwargs", {}) | gen_kwargs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs)

    def _one_in_language_of(self, labels_BL: Tensor | None, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` for one sequence per row in the labels' language, unless the caller sets others."""
        if (num_sequences := gen_kwargs.get("num_return_sequences") or 1) != 1:
            raise ValueError(f"num_return_sequences ({num_sequences}) must be 1: a row has one prediction")
        gen_kwargs = {**gen_kwargs, "num_return_sequences": 1, "return_dict_in_generate": False}
        is_start_given = any(gen_kwargs.get(name) is not None for name in ("forced_bos_token_id", "decoder_input_ids"))
        first_tokens_B = None if is_start_given or labels_BL is None else self._tags_of(labels_BL)
        if first_tokens_B is not None:
            processors = [*(gen_kwargs.get("logits_processor") or []), FirstTokens(first_tokens_B.tolist())]
            gen_kwargs["logits_processor"] = LogitsProcessorList(processors)
        return gen_kwargs

    def _tags_of(self, labels_BL: Tensor) -> Tensor | None:
        """int64[B], the first language tag in each row of labels, -1 for a row without; `None` without languages."""
        tokenizer: Any = getattr(self.data_collator, "tokenizer", None) or self.processing_class
        try:
            ids = list(language_ids(tokenizer).values())
        except ValueError:
            return None
        is_tag_BL = torch.isin(labels_BL, torch.tensor(ids, device=labels_BL.device))
        first_B1 = is_tag_BL.int().argmax(dim=1, keepdim=True)
        return torch.where(is_tag_BL.any(dim=1), labels_BL.gather(1, first_B1).squeeze(1), -1)

    @property
    def _is_multitask(self) -> bool:
        return isinstance(self.train_dataset, MultitaskDataset | MultitaskStream)

    def _smooth_labels_in_model(self) -> None:
        config = getattr(self.model, "config", None)
        of_model = getattr(config, "label_smoothing", None)
        if config is None or of_model is None:
            return
        if of_model not in (0.0, self.args.label_smoothing_factor):
            raise ValueError(
                f"label_smoothing_factor ({self.args.label_smoothing_factor}) and config.label_smoothing ({of_model}) "
                "of the model differ; set one of them to 0"
            )
        config.label_smoothing = self.args.label_smoothing_factor
        self.label_smoother = None


class MultitaskSeq2SeqTrainer(MultitaskTrainerMixin, CudaGraphsTrainerMixin, Seq2SeqTrainer):
    """[`Seq2SeqTrainer`] for multitask training."""


__all__ = ["MultitaskSeq2SeqTrainer", "MultitaskTrainerMixin", "MultitaskTrainingArguments"]
