"""LoRA of sharded models: trained, saved, loaded, merged and resumed as in one process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from ted_cases import (
    Case,
    CollectiveCounter,
    Trained,
    assert_as_one_process,
    in_new_groups,
    load_alone,
    load_sharded,
    messages_of,
    micro_batches,
    renew_groups,
    train,
    write_models,
)
from torch import Tensor
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from hf_moe_ted import CudaGraphSeq2SeqTrainingArguments, TedPlugin, TedSeq2SeqTrainer, shard_adapters
from hf_moe_ted.distributed.sharding import local_tensor
from hf_moe_ted.testing import run_distributed_test

MODEL, UNTIED = "residual", "untied"  # the second has projections of positions
LORA: dict[str, Any] = {
    "task_type": "SEQ_2_SEQ_LM",
    "r": 3,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "target_parameters": ["ffn.experts.up_proj", "ffn.experts.down_proj"],
}
TP, EP = "tensor_parallel_size", "expert_parallel_size"
LEAST_LOADED = {"least_loaded_experts": True, "least_loaded_bound": 1.0, "least_loaded_min_tokens": 1}
CASES = {
    "dp, accumulated": Case({"zero_stage": 2}, model=MODEL, accumulation=2),
    "tp": Case({TP: 4}, model=UNTIED),
    "ep": Case({EP: 4}, model=MODEL, data="uneven"),
    "ep, least-loaded": Case({EP: 4, **LEAST_LOADED}, model=MODEL),
    "ep in replicas, least-loaded": Case({EP: 2, "dp_replicate_size": 2, "zero_stage": 2, **LEAST_LOADED}, model=MODEL),
    "tp x ep, offloaded": Case({TP: 2, EP: 2, "offload": "cpu"}, model=MODEL, checkpointing="communication-aware"),
    "ep x edp, stage 3": Case({EP: 2, "zero_stage": 3}, model=MODEL, checkpointing="full"),
    "etp x edp, stage 3": Case({TP: 2, "zero_stage": 3}, model=MODEL, data="idle"),
}
# a model whose batches may be divided in any way
ADDITIVE = "additive"
FIRST, SECOND = {TP: 2, EP: 2}, {EP: 4, "zero_stage": 3}
NUM_STEPS, SAVED_STEP, BATCH_SIZE = 4, 2, 8
ONLY = "is adapted, but a sharded model supports only adapters"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "router": ({"target_parameters": ["ffn.router.weight"]}, f"(weight) {ONLY}"),
    "head": ({"target_modules": ["lm_head"]}, f"lm_head (Linear) {ONLY}"),
    "embedding": ({"target_modules": ["embed_tokens"]}, f"{ONLY} of linear"),
    "biases": ({"target_modules": ["q_proj"], "bias": "lora_only"}, "q_proj.base_layer.bias and "),
    "bias of B": ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj has a variant of LoRA or a bias"),
    "initialization": ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, "must be True, False or"),
}  # fmt: skip
METHODS = {
    "add_adapter": ("other", None),
    "load_adapter": ("folder", "other"),
    "delete_adapter": ("default",),
    "merge_adapter": (),
    "push_to_hub": ("name",),
}


# ---- what ranks do ----


def load_adapted_alone(folder: str) -> Any:
    return peft.PeftModel.from_pretrained(load_alone(folder), f"{folder}/adapter", is_trainable=True)


def train_adapter(folder: str, case: Case) -> Trained:
    model, plugin = load_sharded(f"{folder}/{case.model}", case)
    adapted = peft.PeftModel.from_pretrained(model, f"{folder}/{case.model}/adapter", is_trainable=True)
    return train(shard_adapters(adapted.train()), plugin, case)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 96, (2, NUM_STEPS * BATCH_SIZE, 8), generator=generator)
    return [{"input_ids": source, "labels": target} for source, target in zip(*ids, strict=True)]


def batch() -> dict[str, Tensor]:
    (found,) = micro_batches(Case(), 0, 1, causal=False)
    return found


class KeepLosses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def trainer_of(model: Any, plugin: TedPlugin, runs: str, **arguments: Any) -> TedSeq2SeqTrainer:
    kind = CudaGraphSeq2SeqTrainingArguments if "cuda_graphs" in arguments else Seq2SeqTrainingArguments
    defaults: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "save_steps": SAVED_STEP,
        "per_device_train_batch_size": BATCH_SIZE // plugin.dp_shard_size,
        "logging_steps": 1,
        "label_names": ["labels"],
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TedSeq2SeqTrainer(
        model=model,
        args=kind(runs, parallelism_config=plugin, **{**defaults, **arguments}),
        train_dataset=samples(),
        optimizer_cls_and_kwargs=plugin.tiled_adamw(lr=1e-2, eps=1e-3),
    )


def fit(model: Any, plugin: TedPlugin, runs: str, **options: Any) -> dict[int, float]:
    """The loss of each step."""
    kept = KeepLosses()
    trainer = trainer_of(model, plugin, runs)
    trainer.add_callback(kept)
    trainer.train(**options)
    return kept.losses


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch()).logits


def evaluation_loss(model: Any, plugin: TedPlugin, runs: str) -> float:
    trainer = trainer_of(model, plugin, runs, per_device_eval_batch_size=BATCH_SIZE // plugin.dp_shard_size)
    return trainer.evaluate(samples()[:BATCH_SIZE])["eval_loss"]


def words(model: Any) -> list[list[int]]:
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).tolist()


@dataclass(frozen=True)
class Run:
    """A run of the first layout, and one that goes on with its checkpoint in the second.

    Attributes:
        losses: of each step, of both.
        before, after, disabled, merged: logits of the model without an adapter, at the end of the second run, when its
            adapter is disabled then, and when it is merged.
        words: that it generates then.
        eval_loss: then.
        bytes: that a rank gives to collectives of FSDP2 in the first step and in the second.
        messages: of what is refused.
    """

    losses: tuple[dict[int, float], dict[int, float]]
    before: Tensor
    after: Tensor
    disabled: Tensor
    merged: Tensor
    words: list[list[int]]
    eval_loss: float
    messages: dict[str, str]


def load(folder: str, layout: dict[str, Any]) -> tuple[Any, TedPlugin]:
    plugin = TedPlugin(**layout)
    return load_alone(folder, distributed_config=plugin.distributed_config), plugin


def train_and_resume(folder: str, runs: str) -> Run:
    model, plugin = load(folder, FIRST)
    before = logits(model)  # the parameters are gathered when PEFT freezes them
    torch.manual_seed(dist.get_rank())  # which is not what the adapter depends on
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    trainer = trainer_of(adapted, plugin, f"{runs}/first")
    adapted.save_pretrained(f"{runs}/start")
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before, atol=1e-5, rtol=1e-5)
    first = fit(adapted, plugin, f"{runs}/first")
    messages = refusals(folder, trainer)

    model, plugin = load(folder, SECOND)
    config = peft.PeftConfig.from_pretrained(f"{runs}/start")
    config.inference_mode = False
    adapted = peft.get_peft_model(model, config)
    second = fit(adapted, plugin, f"{runs}/second", resume_from_checkpoint=f"{runs}/first/checkpoint-{SAVED_STEP}")
    adapted.save_pretrained(f"{runs}/end")
    after = logits(adapted)
    found = words(adapted)
    eval_loss = evaluation_loss(adapted, plugin, f"{runs}/evaluation")
    with adapted.disable_adapter():
        disabled = logits(adapted)
    factor = next(local_tensor(tensor) for name, tensor in adapted.named_parameters() if "experts.lora_A" in name)
    kept = factor.clone()
    factor.fill_(float("inf"))
    messages |= messages_of({"infinite": lambda: adapted.merge_and_unload(safe_merge=True)})
    factor.copy_(kept)
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(f"{runs}/merged")
    return Run((first, second), before, after, disabled, logits(merged), found, eval_loss, messages)


def refusals(folder: str, trainer: TedSeq2SeqTrainer) -> dict[str, str]:
    adapted, plugin = trainer.model, trainer.args.parallelism_config
    attempts: dict[str, Callable[[], Any]] = {
        name: lambda name=name, args=args: getattr(adapted, name)(*args) for name, args in METHODS.items()
    }
    attempts["save_pretrained of the base"] = lambda: adapted.get_base_model().save_pretrained(folder)
    attempts["CUDA graphs"] = lambda: trainer_of(adapted, plugin, folder, cuda_graphs=True).train()
    attempts["a whole model"] = lambda: trainer_of(load_adapted_alone(folder), plugin, folder)
    found = messages_of(attempts)
    model, _ = load(folder, FIRST)
    for name, (options, _) in REFUSED.items():
        refused = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "init_lora_weights": True, **options}))
        found |= messages_of({name: lambda refused=refused: shard_adapters(refused)})
        model = refused.unload()
    two = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    accelerator, optimizer = Accelerator(cpu=True, parallelism_config=plugin), torch.optim.AdamW(two.parameters())
    found |= messages_of({"not sharded": lambda: two(**batch())})
    found |= messages_of({"optimizer": lambda: accelerator.prepare(two, optimizer)})
    two.add_adapter("other", peft.LoraConfig(**LORA))
    return found | messages_of({"two": lambda: shard_adapters(two)})


def bytes_of_steps(folder: str) -> list[dict[str, int]]:
    """What a rank gives to collectives of FSDP2 in each of two steps, by kind."""
    model, _ = load(folder, {})
    adapted = shard_adapters(peft.get_peft_model(model, peft.LoraConfig(**LORA)))
    found = []
    for _ in range(2):
        with CollectiveCounter() as counter:
            adapted(**batch()).loss.backward()
        kinds = {"gathered": "_allgather_base_", "reduced": "_reduce_scatter_base_"}
        found.append(
            {
                kind: sum(size * times for (name, size), times in counter.log.items() if name.endswith(operation))
                for kind, operation in kinds.items()
            }
        )
    return found


def keeps_parameters(folder: str) -> bool:
    """Whether an optimizer has all factors behind `prepare`, of which the last ranks have no rows."""
    model, plugin = load(folder, FIRST)
    adapted = shard_adapters(peft.get_peft_model(model, peft.LoraConfig(**LORA | {"r": 1})))
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors)
    AcceleratorState._reset_state()  # that of an earlier layout
    Accelerator(cpu=True, parallelism_config=plugin).prepare(adapted, optimizer)
    (group,) = optimizer.param_groups
    return all(kept is factor for kept, factor in zip(group["params"], factors, strict=True))


@dataclass(frozen=True)
class OfRank:
    trained: dict[str, Trained]
    run: Run
    bytes: list[dict[str, int]]
    keeps_parameters: bool


def run_all(folder: str, runs: str) -> OfRank:
    trained = {}
    for name, case in in_new_groups(CASES.items()):
        try:
            trained[name] = train_adapter(folder, case)
        except Exception as error:
            raise RuntimeError(f"case {name!r} failed") from error
    renew_groups()
    additive = f"{folder}/{ADDITIVE}"
    return OfRank(trained, train_and_resume(additive, runs), bytes_of_steps(additive), keeps_parameters(additive))


# ---- tests ----

Launched = tuple[Path, Path, list[OfRank]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Models with adapters of which both factors are random, the folder of runs, and what each rank has."""
    folder, runs = (tmp_path_factory.mktemp(name) for name in ("models", "runs"))
    names = {MODEL, UNTIED, ADDITIVE}
    write_models(folder, names)
    for name in sorted(names):
        torch.manual_seed(1)
        config = peft.LoraConfig(**LORA, init_lora_weights=False)
        peft.get_peft_model(load_alone(str(folder / name)), config).save_pretrained(folder / name / "adapter")
    return folder, runs, run_distributed_test(run_all, 4, str(folder), str(runs))


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(launched: Launched, name: str) -> None:
    folder, _, by_rank = launched
    trained = [of_rank.trained[name] for of_rank in by_rank]
    assert all("lora_" in key for key in trained[0].gradients)
    assert_as_one_process(folder, CASES[name], trained, load_adapted_alone)


def adapted_alone(folder: Path, adapter: Path) -> Any:
    """By the script that runs on several processes, too."""
    model, _ = load(str(folder / ADDITIVE), {})
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def test_trainer_and_resume_on_another_layout(launched: Launched, tmp_path: Path) -> None:
    """And back on one process: all have the losses and the factors of a run that one process does at once."""
    folder, runs, by_rank = launched
    plugin = TedPlugin()
    alone = adapted_alone(folder, runs / "start")
    losses = fit(alone, plugin, str(tmp_path / "alone"))
    assert len({*losses.values()}) == len(losses) == NUM_STEPS
    resumed = adapted_alone(folder, runs / "start")
    checkpoint = runs / "first" / f"checkpoint-{SAVED_STEP}"
    resumed_losses = fit(resumed, plugin, str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint))
    late = {step: loss for step, loss in losses.items() if step > SAVED_STEP}
    assert resumed_losses == pytest.approx(late, rel=1e-5)
    expected = peft.get_peft_model_state_dict(alone)
    for of_rank in by_rank:
        first, second = of_rank.run.losses
        assert first == pytest.approx(losses, rel=1e-5)
        assert second == pytest.approx(late, rel=1e-5)
    trained_here = peft.get_peft_model_state_dict(resumed)
    for found in (load_file(runs / "end" / "adapter_model.safetensors"), trained_here):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_folders_are_those_of_peft(launched: Launched, tmp_path: Path) -> None:
    folder, runs, by_rank = launched
    checkpoint = runs / "first" / f"checkpoint-{NUM_STEPS}"
    assert {*os.listdir(runs / "end")} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {"adapter_config.json", "adapter_model.safetensors", "training_state"} <= {*os.listdir(checkpoint)}
    assert not (checkpoint / "model.safetensors").exists()
    loaded = adapted_alone(folder, runs / "end")
    expected = logits(loaded)
    eval_loss = evaluation_loss(loaded, TedPlugin(), str(tmp_path))
    merged = logits(loaded.merge_and_unload())
    of_folder = logits(load_alone(str(runs / "merged")))
    for of_rank in by_rank:
        run = of_rank.run
        assert (run.after - run.before).abs().max() > 0.1
        assert run.eval_loss == pytest.approx(eval_loss, rel=1e-5)
        torch.testing.assert_close(run.after, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run.disabled, run.before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run.merged, merged, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(of_folder, merged, atol=1e-4, rtol=1e-4)


def test_generation(launched: Launched) -> None:
    folder, runs, by_rank = launched
    expected = words(adapted_alone(folder, runs / "end").eval())
    assert all(of_rank.run.words == expected for of_rank in by_rank)


def test_only_factors_are_reduced_and_weights_are_gathered_once(launched: Launched) -> None:
    folder, _, by_rank = launched
    alone = load_adapted_alone(str(folder / ADDITIVE))
    sizes = {True: 0, False: 0}
    for parameter in alone.parameters():
        sizes[parameter.requires_grad] += parameter.nbytes
    for of_rank in by_rank:
        first, second = of_rank.bytes
        # padding, as not every number of rows is divided by the ranks
        assert sizes[True] <= first["reduced"] == second["reduced"] < 1.5 * sizes[True]
        assert sizes[True] / 4 <= second["gathered"] < 1.5 * sizes[True] / 4
        assert first["gathered"] - second["gathered"] >= sizes[False] / 4


def test_an_optimizer_keeps_its_parameters(launched: Launched) -> None:
    assert all(of_rank.keeps_parameters for of_rank in launched[2])


@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_are_refused(launched: Launched, name: str) -> None:
    for of_rank in launched[2]:
        assert REFUSED[name][1] in of_rank.run.messages[name]


@pytest.mark.parametrize("name", METHODS)
def test_refused_when_it_is_called(launched: Launched, name: str) -> None:
    for of_rank in launched[2]:
        assert f"{name} cannot be called on a sharded model: " in of_rank.run.messages[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("save_pretrained of the base", "has adapters (PEFT): call save_pretrained of the PEFT model"),
        ("CUDA graphs", "cuda_graphs (True) does not work with the adapters (PEFT) of a sharded model"),
        ("a whole model", "PeftModelForSeq2SeqLM is not sharded, but the TedPlugin is for 4 processes"),
        ("not sharded", "is sharded, but its adapter is not: call hf_moe_ted.shard_adapters(model)"),
        ("optimizer", "the optimizer was made before the adapters were sharded"),
        ("infinite", "would not be finite with its adapter"),
        ("two", "a sharded model can have one adapter, but this one has ['default', 'other']"),
    ],
)
def test_says_what_to_do(launched: Launched, name: str, message: str) -> None:
    for of_rank in launched[2]:
        assert message in of_rank.run.messages[name]
