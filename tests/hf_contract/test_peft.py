"""PEFT: LoRA on the attention, on every linear and on the stacked experts; training, saving and merging it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from trainer_cases import Trainers, logged, trained
from transformers import Seq2SeqTrainer
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import tiny_config

peft = pytest.importorskip("peft")

# transformers asks for a version of its own for `add_adapter`; 5.24 for one that is newer than the newest:
# docs/upstream/transformers_peft_minimum.md
by_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"add_adapter asks for peft {MIN_PEFT_VERSION}"
)

Model = ZCodeM3ForConditionalGeneration
Batch = dict[str, torch.Tensor]

RANK = 4
EXPERTS = ["ffn.experts.up_proj", "ffn.experts.down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "experts": {"target_parameters": EXPERTS},
}

sparse = pytest.mark.parametrize("config", ["top1", "top2", "residual", "pyramid"], indirect=True)
targets = pytest.mark.parametrize("target", TARGETS)
few_targets = pytest.mark.parametrize("target", ["attention", "experts"])
top1 = pytest.mark.parametrize("config", ["top1"], indirect=True)


def lora(target: str, **options: Any) -> Any:
    return peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=RANK, **{**TARGETS[target], **options})


def adapted(model: Model, target: str, **options: Any) -> Any:
    """A copy of the model with an adapter that does something: both of its factors are random."""
    torch.manual_seed(2)
    return peft.get_peft_model(copy.deepcopy(model), lora(target, init_lora_weights=False, **options)).eval()


def logits(model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def fit(model: torch.nn.Module, batch: Batch, num_steps: int = 20) -> list[float]:
    """The losses of some steps on one batch."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(num_steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def unequal(a: Batch, b: Batch) -> list[str]:
    return [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]


@sparse
@targets
def test_a_fresh_adapter_changes_nothing(model: Model, forward_inputs: Batch, target: str) -> None:
    before = logits(model, forward_inputs)
    assert torch.equal(logits(peft.get_peft_model(model, lora(target)), forward_inputs), before)


@sparse
def test_targets_are_what_is_adapted(model: Model, config: ZCodeM3Config) -> None:
    def names(target: str) -> set[str]:
        adapter = adapted(model, target)
        lora_names = [name for name, _ in adapter.named_parameters() if "lora_A" in name]
        return {name.removeprefix("base_model.model.").split(".lora_A")[0] for name in lora_names}

    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names("attention") == {name for name in linears if name.endswith(("q_proj", "v_proj"))}
    assert names("all_linear") == linears - {"lm_head"}
    experts = {name for name, _ in model.named_modules() if name.endswith(".ffn.experts")}
    # one wrapper around the other: that of `up_proj` is the base layer of that of `down_proj`
    assert names("experts") == experts | {f"{name}.base_layer" for name in experts}

    num_experts = [*config.num_experts_per_layer("encoder").values(), *config.num_experts_per_layer("decoder").values()]
    num_parameters = sum(p.numel() for p in adapted(model, "experts").parameters() if p.requires_grad)
    assert num_parameters == sum(num_experts) * RANK * 2 * (config.d_model + config.encoder_ffn_dim)


@sparse
@targets
def test_only_the_adapter_is_trained(model: Model, batch: Batch, target: str) -> None:
    initial = copy.deepcopy(model.state_dict())
    adapter = peft.get_peft_model(model, lora(target))
    state = copy.deepcopy(adapter.state_dict())
    losses = fit(adapter, batch)
    assert losses[-1] < 0.85 * losses[0]
    for name, parameter in adapter.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
    assert set(unequal(state, adapter.state_dict())) == {name for name in state if "lora_" in name}
    assert unequal(initial, adapter.unload().state_dict()) == []


@sparse
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [], "target_parameters": ["ffn.router.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
    ],
)
def test_routers_are_trained(model: Model, forward_inputs: Batch, batch: Batch, options: dict[str, Any]) -> None:
    """Their wrappers have not all of their attributes; the model must not ask for them."""
    before = logits(model, forward_inputs)
    adapter = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=RANK, **options))
    assert torch.equal(logits(adapter, forward_inputs), before)
    generated = [m.generate(input_ids=forward_inputs["input_ids"], max_new_tokens=3) for m in (model, adapter)]
    assert torch.equal(*generated)
    losses = fit(adapter, batch)
    assert losses[-1] < losses[0]
    adapter.get_base_model().config.num_experts = 50
    with pytest.raises(ValueError, match="changed after the model was built"):
        logits(adapter, forward_inputs)


@sparse
@targets
def test_save_and_load(model: Model, forward_inputs: Batch, target: str, tmp_path: Path) -> None:
    adapter = adapted(model, target)
    expected = logits(adapter, forward_inputs)
    assert (expected - logits(model, forward_inputs)).abs().max() > 0.1
    adapter.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(logits(loaded, forward_inputs), expected)


@top1
def test_auto_peft_model(model: Model, forward_inputs: Batch, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    adapter = adapted(Model.from_pretrained(tmp_path / "base"), "experts")
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model.model, Model)
    assert torch.equal(logits(loaded, forward_inputs), logits(adapter, forward_inputs))


@sparse
@targets
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_merge(model: Model, forward_inputs: Batch, target: str, implementation: str) -> None:
    model.set_experts_implementation(implementation)
    adapter = adapted(model, target)
    expected = logits(adapter, forward_inputs)
    merged = adapter.merge_and_unload()
    assert type(merged) is Model
    assert merged.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(merged, forward_inputs), expected, atol=1e-4, rtol=1e-4)


@sparse
def test_experts_implementations_agree(model: Model, forward_inputs: Batch) -> None:
    adapter = adapted(model, "experts")
    outputs = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        adapter.base_model.model.set_experts_implementation(implementation)
        outputs[implementation] = logits(adapter, forward_inputs)
    torch.testing.assert_close(outputs["grouped_mm"], outputs["eager"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["batched_mm"], outputs["eager"], atol=1e-4, rtol=1e-4)


def test_each_expert_has_its_own_adapter(forward_inputs: Batch) -> None:
    """Against adding the product of an expert's two factors to its weights by hand."""
    torch.manual_seed(0)
    model = Model(tiny_config(init_std=0.2, num_experts=[2, 4, 1])).eval()
    adapter = adapted(model, "experts", lora_alpha=RANK)
    with torch.no_grad():
        for name, wrapper in adapter.named_modules():
            if not name.endswith((".ffn.experts", ".ffn.experts.base_layer")) or not hasattr(wrapper, "lora_A"):
                continue
            path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            weight = getattr(model.get_submodule(path), wrapper.parameter_name)
            num_experts, out_features, in_features = weight.shape
            a_ERI = wrapper.lora_A["default"].weight.view(num_experts, RANK, in_features)
            b_ORE = wrapper.lora_B["default"].weight.view(out_features, RANK, num_experts)
            for expert in range(num_experts):
                weight[expert] += b_ORE[:, :, expert] @ a_ERI[expert]
    torch.testing.assert_close(logits(adapter, forward_inputs), logits(model, forward_inputs), atol=1e-4, rtol=1e-4)


@sparse
@targets
def test_generate(model: Model, batch: Batch, target: str) -> None:
    options = {"max_new_tokens": 8, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **options}
    adapter = adapted(model, target)
    output = adapter.generate(**inputs)
    assert not torch.allclose(output.sequences_scores, model.generate(**inputs).sequences_scores, atol=1e-3)
    merged = adapter.merge_and_unload().generate(**inputs)
    assert output.sequences.tolist() == merged.sequences.tolist()
    torch.testing.assert_close(output.sequences_scores, merged.sequences_scores, atol=1e-4, rtol=1e-4)


@sparse
@targets
def test_disable_adapter(model: Model, forward_inputs: Batch, target: str) -> None:
    adapter = adapted(model, target)
    enabled = logits(adapter, forward_inputs)
    with adapter.disable_adapter():
        assert torch.equal(logits(adapter, forward_inputs), logits(model, forward_inputs))
    assert torch.equal(logits(adapter, forward_inputs), enabled)
    assert not torch.equal(enabled, logits(model, forward_inputs))


@top1
@targets
def test_two_adapters(model: Model, forward_inputs: Batch, target: str) -> None:
    both = adapted(model, target)
    first = logits(both, forward_inputs)
    both.add_adapter("other", lora(target, init_lora_weights=False))
    assert torch.equal(logits(both, forward_inputs), first)
    both.set_adapter("other")
    assert not torch.allclose(logits(both, forward_inputs), first, atol=0.1)
    both.set_adapter("default")
    assert torch.equal(logits(both, forward_inputs), first)


@by_transformers
@sparse
@few_targets
def test_add_adapter(model: Model, batch: Batch, forward_inputs: Batch, target: str, tmp_path: Path) -> None:
    """The integration of transformers: the model stays what it is, and loads adapters by itself."""
    model.save_pretrained(tmp_path / "base")
    before = logits(model, forward_inputs)
    model = Model.from_pretrained(tmp_path / "base")
    model.add_adapter(lora(target))
    assert torch.equal(logits(model, forward_inputs), before)
    losses = fit(model, batch, num_steps=5)
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
    after = logits(model, forward_inputs)
    model.disable_adapters()
    assert torch.equal(logits(model, forward_inputs), before)
    model.enable_adapters()
    assert torch.equal(logits(model, forward_inputs), after)

    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = Model.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded, forward_inputs), after)
    assert torch.equal(logits(Model.from_pretrained(tmp_path / "adapter"), forward_inputs), after)


@sparse
@targets
def test_router_losses_reach_the_adapter(
    config: ZCodeM3Config, model: Model, batch: Batch, target: str, gradients: Callable
) -> None:
    results = {}
    for coefficient in (0.0, 1.0):
        adapter = adapted(model, target).train()
        adapter.base_model.model.config.router_aux_loss_coef = coefficient
        adapter.base_model.model.config.router_z_loss_coef = 0.0
        output = adapter(**batch)
        output.loss.backward()
        results[coefficient] = (output, gradients(adapter))
    (plain, plain_gradients), (output, router_gradients) = results[0.0], results[1.0]
    expected = plain.loss + output.encoder_aux_loss + output.decoder_aux_loss
    torch.testing.assert_close(output.loss, expected)
    assert output.encoder_aux_loss > 0.5
    # all but the adapters behind the last router of a side, whose output no router sees
    reached = [name for name in plain_gradients if not torch.equal(plain_gradients[name], router_gradients[name])]
    assert len(reached) >= len(plain_gradients) // 3
    assert any("encoder.layers.1" in name or "encoder.layers.2" in name for name in reached)


@sparse
@targets
def test_gradient_checkpointing(model: Model, batch: Batch, target: str, gradients: Callable) -> None:
    """Recomputing a layer puts the factors of its experts' adapters in place again."""
    results, num_calls = {}, {False: 0, True: 0}
    for checkpointing in (False, True):
        adapter = adapted(model, target).train()
        if checkpointing:
            adapter.gradient_checkpointing_enable()

        def count(*_: Any, checkpointing: bool = checkpointing) -> None:
            num_calls[checkpointing] += 1

        for layer in adapter.base_model.model.model.encoder.layers:
            layer.self_attn.register_forward_pre_hook(count)
        torch.manual_seed(3)  # of Random Token Selection
        adapter(**batch).loss.backward()
        results[checkpointing] = gradients(adapter)
    assert num_calls[True] == 2 * num_calls[False] > 0
    for name, gradient in results[False].items():
        torch.testing.assert_close(results[True][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert all(gradient.abs().sum() > 0 for gradient in results[False].values())


ROUTERS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["router"]},
    "target_parameters": {"target_parameters": ["ffn.router.weight"]},
}


@pytest.mark.parametrize("how", ROUTERS)
@pytest.mark.parametrize("config", ["top2"], indirect=True)
def test_router_is_trained_too(model: Model, batch: Batch, forward_inputs: Batch, how: str, tmp_path: Path) -> None:
    adapter = peft.get_peft_model(copy.deepcopy(model), lora("attention", **ROUTERS[how]))
    fit(adapter, batch, num_steps=5)
    trained = [name for name, p in adapter.named_parameters() if p.grad is not None and ".router." in name]
    assert len(trained) == (3 if how == "modules_to_save" else 2 * 3)
    output = adapter(**forward_inputs, output_router_logits=True)
    assert (len(output.encoder_router_logits), len(output.decoder_router_logits)) == (2, 1)
    adapter.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(logits(loaded, forward_inputs), output.logits)
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(logits(merged, forward_inputs), output.logits, atol=1e-4, rtol=1e-4)
    initial, final = (m.model.encoder.layers[1].ffn.router.weight for m in (model, merged))
    assert not torch.equal(initial, final)


@top1
def test_new_tokens_are_trained(model: Model, batch: Batch, forward_inputs: Batch) -> None:
    """As for a new language: some rows of the one embedding that encoder, decoder and head share."""
    before = model.model.shared.weight.detach().clone()
    adapter = peft.get_peft_model(model, lora("attention", trainable_token_indices=[5, 6]))
    fit(adapter, batch)
    expected = logits(adapter, forward_inputs)
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(logits(merged, forward_inputs), expected, atol=1e-4, rtol=1e-4)
    changed = (merged.model.shared.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [5, 6]
    assert merged.lm_head.weight is merged.model.shared.weight is merged.model.encoder.embed_tokens.weight


class TestTrainer:
    """An adapter under the Seq2SeqTrainer."""

    @pytest.fixture
    def train(self, trainers: Trainers) -> Callable[..., Seq2SeqTrainer]:
        def train(target: str, config: dict[str, Any], resume: str | None = None, **arguments: Any) -> Seq2SeqTrainer:
            adapter = peft.get_peft_model(trainers.model(**config), lora(target))
            rows = trainers.rows[:16]
            parts = {"model": adapter, "train_dataset": rows, "eval_dataset": rows}
            options = {"per_device_train_batch_size": 8, "max_steps": 4, **arguments}
            return trained(trainers(config, parts=parts, **options), resume_from_checkpoint=resume)

        return train

    @few_targets
    def test_loss_falls(self, train: Callable[..., Seq2SeqTrainer], target: str) -> None:
        options = {"max_steps": 15, "learning_rate": 5e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
        trainer = train(target, {}, **options, predict_with_generate=True, generation_max_length=8)
        losses = logged(trainer, "loss")
        assert losses[-1] < losses[0] - 0.5
        predictions = trainer.predict(trainer.eval_dataset).predictions
        assert predictions.shape[0] == 16
        assert (predictions[:, 0] == trainer.model.config.decoder_start_token_id).all()
        assert (predictions[:, 8:] == trainer.processing_class.pad_token_id).all()

    @few_targets
    def test_gradient_accumulation(self, train: Callable[..., Seq2SeqTrainer], target: str) -> None:
        """The number of labels of a step reaches the model through the adapter's forward."""
        config = {"capacity_factor": None, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
        whole = train(target, config)
        parts = train(target, config, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        assert len(logged(whole, "loss")) == 4
        assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
        assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-3)

    @few_targets
    def test_resume(self, train: Callable[..., Seq2SeqTrainer], target: str, tmp_path: Path) -> None:
        config = {"dropout": 0.1, "router_noise_policy": "jitter", "router_jitter_noise": 0.1, "min_capacity": 0}
        whole = train(target, config, save_strategy="steps", save_steps=3)
        checkpoint = tmp_path / "checkpoint-3"
        assert (checkpoint / "adapter_model.safetensors").exists()
        assert not (checkpoint / "model.safetensors").exists()
        resumed = train(target, config, resume=str(checkpoint))
        assert logged(resumed, "loss") == logged(whole, "loss")
        assert unequal(whole.model.state_dict(), resumed.model.state_dict()) == []

    @few_targets
    def test_activation_checkpointing(self, train: Callable[..., Seq2SeqTrainer], target: str) -> None:
        config = {"dropout": 0.1, "router_aux_loss_coef": 1.0, "min_capacity": 0}
        plain = train(target, config, max_steps=2)
        checkpointed = train(target, config, max_steps=2, activation_checkpointing=True)
        for name in ("loss", "grad_norm"):
            assert logged(checkpointed, name) == pytest.approx(logged(plain, name), rel=1e-5)
