"""The callback's numbers against those of the routings of the same forwards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import LAYERS, SETTLED, Reporter, settled_trainer
from transformers import Trainer, TrainingArguments

from hf_moe_ted import RouterStatisticsCallback, ZCodeM3ForConditionalGeneration
from hf_moe_ted.models.losses import load_balancing_loss, router_z_loss
from hf_moe_ted.routing.router_callback import sparse_routers
from hf_moe_ted.testing import tiny_config


def rows(num_rows: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (num_rows, 2, 8), generator=generator)
    ids[::2, 0, 5:] = 1
    return [{"input_ids": source, "attention_mask": (source != 1).long(), "labels": target} for source, target in ids]


def trainer(tmp_path: Path, config: dict[str, Any], reporter: Reporter | None = None, **arguments: Any) -> Trainer:
    return settled_trainer(tmp_path, rows(4), config, reporter, **arguments)


def training_logs(trained: Trainer) -> list[dict[str, Any]]:
    return [log for log in trained.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"max_steps": 3}]
)
def test_numbers_are_those_of_the_routings(options: dict[str, Any], tmp_path: Path) -> None:
    capacity = {"capacity_factor": None} if "gradient_accumulation_steps" in options else {}
    tested = trainer(tmp_path, SETTLED | capacity, logging_strategy="steps", **options)
    RouterStatisticsCallback().add_to(tested)
    tested.train()
    log = training_logs(tested)[-1]

    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in rows(1)[0]}
    output = tested.model.train()(**batch, output_routings=True)
    for layer, routing in zip(LAYERS, (*output.encoder_routings, *output.decoder_routings), strict=True):
        mask = torch.ones(32, dtype=torch.bool) if routing.token_mask is None else routing.token_mask
        chosen = routing.choices[mask].flatten().tolist()
        computed = [expert for expert in routing.expert_ids[mask].flatten().tolist() if expert < 4]
        load = [4 * computed.count(expert) / len(computed) for expert in range(4)]
        probabilities = routing.logits[mask].softmax(-1).tolist()
        entropy = sum(-p * math.log(p) for token in probabilities for p in token) / len(probabilities)
        assert log[f"router/{layer}/load"] == pytest.approx(load)
        assert log[f"router/{layer}/load_max"] == pytest.approx(max(load))
        assert log[f"router/{layer}/load_min"] == pytest.approx(min(load))
        assert log[f"router/{layer}/dropped"] == pytest.approx(1 - len(computed) / len(chosen))
        assert (log[f"router/{layer}/dropped"] > 0.1) == (not capacity)
        assert log[f"router/{layer}/entropy"] == pytest.approx(entropy, rel=1e-5)
        z_loss = router_z_loss(routing.logits, routing.token_mask).item()
        assert log[f"router/{layer}/z_loss"] == pytest.approx(z_loss, rel=1e-5)
        if not capacity:
            aux_loss = load_balancing_loss(routing.logits, routing.choices, routing.token_mask).item()
            assert log[f"router/{layer}/aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
    mean = sum(log[f"router/{layer}/entropy"] for layer in LAYERS) / len(LAYERS)
    assert log["router/entropy"] == pytest.approx(mean)


def test_each_log_covers_the_steps_since_the_last(tmp_path: Path) -> None:
    tested = trainer(tmp_path, SETTLED | {"capacity_factor": None}, max_steps=4, logging_steps=2, learning_rate=0.1)
    RouterStatisticsCallback().add_to(tested)
    tested.train()
    first, second = training_logs(tested)
    assert first["router/z_loss"] != pytest.approx(second["router/z_loss"], rel=1e-3)
    assert sum(second["router/encoder.1/load"]) == pytest.approx(4.0)


def test_reporters_get_the_numbers(tmp_path: Path) -> None:
    for per_expert in (False, True):
        reporter = Reporter()
        tested = trainer(tmp_path, SETTLED, reporter)
        RouterStatisticsCallback(per_expert=per_expert).add_to(tested)
        tested.train()
        log = next(log for log in reporter.logs if "loss" in log)
        assert {"router/dropped", "router/encoder.3/load_max"} <= log.keys()
        assert ("router/encoder.3/load/3" in log) == per_expert
        assert all(isinstance(value, float) for name, value in log.items() if name.startswith("router"))


def test_as_an_argument_of_the_trainer_it_reaches_the_history(tmp_path: Path) -> None:
    tested = trainer(tmp_path, SETTLED)
    tested.add_callback(RouterStatisticsCallback())
    tested.train()
    assert "router/dropped" in training_logs(tested)[0]


def test_evaluation_is_not_counted_and_its_logs_are_left_alone(tmp_path: Path) -> None:
    logs = []
    for strategy in ("no", "steps"):
        tested = trainer(tmp_path, SETTLED, max_steps=4, logging_steps=4, eval_strategy=strategy, eval_steps=1)
        RouterStatisticsCallback().add_to(tested)
        tested.train()
        logs.append({name: value for name, value in training_logs(tested)[0].items() if name.startswith("router")})
        assert not any("router" in name for log in tested.state.log_history if "loss" not in log for name in log)
    assert logs[0] == logs[1]


def test_activation_checkpointing_changes_no_number(tmp_path: Path) -> None:
    logs = []
    for checkpointing in (False, True):
        tested = trainer(tmp_path, SETTLED, gradient_checkpointing=checkpointing)
        RouterStatisticsCallback().add_to(tested)
        tested.train()
        logs.append({name: value for name, value in training_logs(tested)[0].items() if name.startswith("router")})
    assert logs[0].keys() == logs[1].keys()
    assert all(logs[0][name] == pytest.approx(logs[1][name]) for name in logs[0])


def test_training_is_not_changed_and_no_hook_is_left(tmp_path: Path) -> None:
    weights = []
    for watch in (False, True):
        tested = trainer(tmp_path, {"capacity_factor": 0.6, "min_capacity": 0}, max_steps=3, learning_rate=0.1)
        if watch:
            RouterStatisticsCallback().add_to(tested)
        tested.train()
        weights.append(tested.model.state_dict())
        routers = [module for name, module in tested.model.named_modules() if name.endswith("router")]
        assert len(routers) == 3
        hooks = [hook for router in routers for hook in router._forward_hooks.values()]
        assert not any(hook.__module__.startswith("hf_moe_ted") for hook in hooks)  # transformers has one, too
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_model_without_sparse_layers(tmp_path: Path) -> None:
    tested = trainer(tmp_path, {"encoder_sparse_step": 0, "decoder_sparse_step": 0})
    RouterStatisticsCallback().add_to(tested)
    with pytest.raises(ValueError, match=r"ZCodeM3ForConditionalGeneration has no sparse layer"):
        tested.train()


def peft_model(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


TRAINED_ROUTERS: dict[str, Any] = {
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
    "target_parameters": {"target_modules": [], "target_parameters": ["ffn.router.weight"]},
    "layers to save": {"target_modules": ["q_proj"], "modules_to_save": ["ffn"]},
    "one layer to save": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]},
    "routers and experts": {"target_modules": [], "target_parameters": ["ffn.router.weight", "ffn.experts.up_proj"]},
}


@pytest.mark.parametrize("options", TRAINED_ROUTERS.values(), ids=TRAINED_ROUTERS)
def test_routers_that_peft_trains_have_the_same_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    logs = []
    for is_adapted in (False, True):
        tested = trainer(tmp_path, SETTLED)
        if is_adapted:
            tested.model = tested.model_wrapped = tested.callback_handler.model = peft_model(tested.model, **options)
        RouterStatisticsCallback().add_to(tested)
        tested.train()
        logs.append({name: value for name, value in training_logs(tested)[0].items() if name.startswith("router/")})
    assert logs[0].keys() == logs[1].keys() and f"router/{LAYERS[0]}/entropy" in logs[0]
    for name, value in logs[0].items():
        assert logs[1][name] == pytest.approx(value), name


def with_wrapped_layers(model: Any) -> Any:
    for side in (model.model.encoder, model.model.decoder):
        for place, layer in enumerate(side.layers):
            side.layers[place] = torch.compile(layer, backend="eager")
    return model


WRAPPED: dict[str, Any] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled layers": with_wrapped_layers,
    "as in DDP": lambda model: torch.nn.ModuleDict({"module": model}),
    "base model": lambda model: peft_model(model, **TRAINED_ROUTERS["modules_to_save"]).get_base_model(),
    "PEFT, compiled": lambda model: torch.compile(
        peft_model(model, **TRAINED_ROUTERS["target_parameters"]), backend="eager"
    ),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_routers_of_wrapped_models(wrapped: Any) -> None:
    routers = sparse_routers(wrapped(ZCodeM3ForConditionalGeneration(tiny_config())))
    assert sorted(routers) == sorted(LAYERS) and {router.num_experts for router in routers.values()} == {4}


def test_numbers_of_compiled_layers() -> None:
    torch.manual_seed(0)
    model: Any = ZCodeM3ForConditionalGeneration(tiny_config(router_noise_policy=None, token_drop_policy="position"))
    batch = {"input_ids": torch.randint(3, 96, (3, 9)), "labels": torch.randint(3, 96, (3, 9))}
    callback, numbers = RouterStatisticsCallback(), []
    for _ in range(2):
        handles = callback.watch(model, TrainingArguments("unused", use_cpu=True))
        model.train()(**batch)
        numbers.append(callback.numbers())
        for handle in handles:
            handle.remove()
        torch.compiler.reset()
        for layer in (model.model.encoder.layers[1], model.model.decoder.layers[1]):  # sparse ones
            layer.compile(backend="eager")
    torch.compiler.reset()
    assert numbers[0].keys() == numbers[1].keys() and f"router/{LAYERS[0]}/entropy" in numbers[0]
    for name, value in numbers[0].items():
        assert numbers[1][name] == pytest.approx(value), name
