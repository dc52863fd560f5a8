"""Layers that are compiled one by one: each is one graph in training, and computes what it computes uncompiled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import tiny_config

# one sparse layer on each side; nothing random, as compiled code draws other numbers
TWO_LAYERS: dict[str, Any] = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_sparse_layers": [0],
    "decoder_sparse_layers": [0],
    "capacity_factor": 1.0,
    "token_drop_policy": "position",
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model_of(**overrides: Any) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(tiny_config(**TWO_LAYERS, **overrides)).train()


def batch_of(num_rows: int, source: int, target: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    input_ids = torch.randint(3, 96, (num_rows, source), generator=generator)
    input_ids[0, source // 2 :] = 1
    labels = torch.randint(3, 96, (num_rows, target), generator=generator)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": labels}


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("with_checkpointing", [False, True])
def test_each_layer_is_one_graph_in_training(with_checkpointing: bool) -> None:
    model = model_of()
    plain = copy.deepcopy(model)
    if with_checkpointing:
        model.activation_checkpointing_enable()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.compile(backend=counter, fullgraph=True)  # an error at the first graph break
    loss, gradients = loss_and_gradients(model, batch_of(3, 11, 7))
    assert counter.frame_count == 2
    expected_loss, expected_gradients = loss_and_gradients(plain, batch_of(3, 11, 7))
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)


def rows(num_rows: int) -> list[dict[str, list[int]]]:
    batches = [batch_of(2, source, 3 + source % 4) for source in range(5, 5 + num_rows)]
    return [{"input_ids": b["input_ids"][1].tolist(), "labels": b["labels"][1].tolist()} for b in batches]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    input_ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in examples], batch_first=True, padding_value=pad
        )
        for name, pad in (("input_ids", 1), ("labels", -100))
    )
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": labels}


def trained(folder: Path, **options: Any) -> tuple[Seq2SeqTrainer, list[float]]:
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Seq2SeqTrainer(
        # untied positions: the one module whose class the model asked for
        model_of(position_embedding_type="tupe"),
        arguments,
        train_dataset=rows(6),
        data_collator=collate,
    )
    trainer.train()
    return trainer, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_trainer_compiles_layers_by_the_regions_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = trained(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
    trainer, losses = trained(tmp_path, torch_compile=True, torch_compile_backend="eager")
    compiled: Any = trainer.model_wrapped
    assert isinstance(compiled.model.encoder.layers[0], torch._dynamo.OptimizedModule)
    assert counters["frames"]["ok"] > 0 and not counters["graph_break"]
    assert losses == pytest.approx(expected, abs=1e-4)  # logs are rounded
    assert type(trainer.accelerator.unwrap_model(compiled)) is ZCodeM3ForConditionalGeneration
