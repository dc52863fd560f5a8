"""Dense layers, embedding, head and loss that are split over ranks, against the whole ones."""

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ted_cases import CONFIGS, Parts, parts_of, relative_errors, write_models
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed import tensor_parallel
from hf_moe_ted.distributed.parallelize import tensor_parallel_plan
from hf_moe_ted.distributed.tensor_parallel import vocab_parallel_cross_entropy
from hf_moe_ted.models import losses as model_losses
from hf_moe_ted.models.losses import row_chunks
from hf_moe_ted.testing import run_distributed_test

WORLD = 4
VOCAB = 96
# shape of the labels, label smoothing, dtype of the logits, share of labels that do not count
LOSSES = {
    "plain": ((3, 5), 0.0, torch.float32, 0.2),
    "smoothed": ((3, 5), 0.1, torch.float32, 0.2),
    "bfloat16": ((15,), 0.1, torch.bfloat16, 0.2),
    "no label counts": ((4,), 0.1, torch.float32, 1.0),
    "large logits": ((3, 5), 0.0, torch.float32, 0.0),
    "in chunks": ((3, 5), 0.1, torch.float32, 0.2),
}
BLOCKS = ("dense", "attention", "embedding")


def loss_inputs(name: str) -> tuple[Tensor, Tensor]:
    shape, _, dtype, share = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, VOCAB, generator=generator) * (1000 if name == "large logits" else 2)
    labels = torch.randint(VOCAB, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < share] = -100
    return logits.to(dtype).requires_grad_(), labels


def reference(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    logits = logits.flatten(0, -2).float()
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=smoothing)


def losses() -> dict[str, tuple[Tensor, Tensor]]:
    """The loss, and the gradient of this rank's words."""
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for name, (_, smoothing, _, _) in LOSSES.items():
        whole, labels = loss_inputs(name)
        own = whole.detach().chunk(WORLD, dim=-1)[dist.get_rank()].clone().requires_grad_()
        logits = DTensor.from_local(own, mesh, [Shard(-1)], run_check=False)
        numel = 4 * VOCAB // WORLD if name == "in chunks" else 2**26  # four rows, of 15
        chunks = functools.partial(row_chunks, numel=numel)
        patches = [mock.patch.object(module, "row_chunks", chunks) for module in (tensor_parallel, model_losses)]
        with patches[0], patches[1]:
            loss = vocab_parallel_cross_entropy(logits, labels, smoothing)
            (loss * 3).backward()
        results[name] = loss.detach(), own.grad
    return results


def block_of(model: Any, name: str) -> tuple[nn.Module, Tensor]:
    """A block without collectives but its own, and its input."""
    generator = torch.Generator().manual_seed(0)
    if name == "embedding":
        ids = torch.randint(VOCAB, (3, 7), generator=generator)
        ids[0, :3] = model.config.pad_token_id
        return model.model.shared, ids
    layer = model.model.encoder.layers[0]
    x = torch.randn(3, 7, model.config.d_model, generator=generator).requires_grad_()
    return layer.ffn if name == "dense" else layer.self_attn, x


def run_block(model: Any, name: str) -> tuple[Tensor, Tensor | None, nn.Module]:
    block, x = block_of(model, name)
    output = block(x)[0] if name == "attention" else block(x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return output.detach(), x.grad, block


def run_blocks(folder: str) -> dict[str, Any]:
    plugin = TedPlugin(tensor_parallel_size=WORLD)
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(
        f"{folder}/top1", distributed_config=plugin.distributed_config
    )
    results: dict[str, Any] = {"losses": losses()}
    for name in BLOCKS:
        output, grad, block = run_block(model, name)
        results[name] = output, grad, parts_of({key: p.grad for key, p in block.named_parameters()})
    model.zero_grad()
    ids = torch.arange(5, 25).view(2, 10)
    outputs = model(input_ids=ids, labels=ids)
    results["logits with gradients"] = type(outputs.logits).__name__, outputs.logits.full_tensor().detach()
    with torch.no_grad():
        results["logits"] = model(input_ids=ids, labels=ids).logits
    for return_dict in (True, False):
        model.zero_grad()
        results[f"outside, {return_dict}"] = loss_outside(model, return_dict=return_dict)
    return results


def loss_outside(model: Any, *, return_dict: bool) -> tuple[float, Parts]:
    """A loss of logits that the model gives without labels, and the gradients of head and encoder."""
    ids = torch.arange(5, 25).view(2, 10)
    outputs = model(input_ids=ids, decoder_input_ids=ids, return_dict=return_dict)
    logits = outputs.logits if return_dict else outputs[0]
    assert type(logits) is Tensor
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    weights = (model.lm_head, model.model.encoder.layers[0].self_attn.q_proj)
    return loss.item(), parts_of({str(index): module.weight.grad for index, module in enumerate(weights)})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top1"})
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder / "top1")
    return model, run_distributed_test(run_blocks, WORLD, str(folder))


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy(launched: tuple[Any, list], name: str) -> None:
    whole, labels = loss_inputs(name)
    expected = reference(whole, labels, LOSSES[name][1])
    (expected * 3).backward()
    for rank, results in enumerate(launched[1]):
        loss, gradient = results["losses"][name]
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
        tolerance = 1e-2 if whole.dtype == torch.bfloat16 else 1e-6
        own = whole.grad.chunk(WORLD, dim=-1)[rank]
        torch.testing.assert_close(gradient, own, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", ["smoothed", "in chunks"])
def test_smoothing_has_its_gradient(launched: tuple[Any, list], name: str) -> None:
    """Of a word that is not the label: its probability less the smoothed target, which is 1e-3 here."""
    whole, labels = loss_inputs(name)
    smoothing = LOSSES[name][1]
    target = smoothing / VOCAB
    counted = (labels != -100).unsqueeze(-1)
    others = counted & (torch.arange(VOCAB) != labels.unsqueeze(-1))
    found = torch.cat([results["losses"][name][1].view(*labels.shape, -1) for results in launched[1]], dim=-1) / 3
    smoothed_away = (whole.detach().softmax(dim=-1) - found)[others]
    torch.testing.assert_close(smoothed_away, torch.full_like(smoothed_away, target), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found.sum(dim=-1), torch.zeros(labels.shape), rtol=0.0, atol=1e-6)


def test_cross_entropy_of_whole_logits() -> None:
    logits, labels = loss_inputs("smoothed")
    found, expected = (f(logits, labels, 0.1) for f in (vocab_parallel_cross_entropy, reference))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_block(launched: tuple[Any, list], name: str) -> None:
    model, by_rank = launched
    model.zero_grad()
    output, grad, block = run_block(model, name)
    for results in by_rank:
        torch.testing.assert_close(results[name][0], output, rtol=1e-5, atol=1e-6)
        if grad is not None:
            torch.testing.assert_close(results[name][1], grad, rtol=1e-5, atol=1e-6)
    expected = {key: parameter.grad for key, parameter in block.named_parameters()}
    errors = relative_errors([results[name][2] for results in by_rank], expected)
    assert {key: error for key, error in errors.items() if error > 1e-5} == {}


def test_logits_stay_split_where_gradients_are_computed(launched: tuple[Any, list]) -> None:
    model, by_rank = launched
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
    for results in by_rank:
        kind, logits = results["logits with gradients"]
        assert kind == "DTensor"
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert type(results["logits"]) is Tensor
        torch.testing.assert_close(results["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_loss_outside_the_model(launched: tuple[Any, list], return_dict: bool) -> None:
    model, by_rank = launched
    model.zero_grad()
    expected, parts = loss_outside(model, return_dict=return_dict)
    found = [results[f"outside, {return_dict}"] for results in by_rank]
    assert [loss for loss, _ in found] == pytest.approx([expected] * WORLD, rel=1e-5)
    whole = {name: gradients[0][1] for name, gradients in parts.items()}
    assert max(relative_errors([gradients for _, gradients in found], whole).values()) < 1e-5


def test_plan_has_every_dense_layer() -> None:
    with torch.device("meta"):
        model: Any = ZCodeM3ForConditionalGeneration(CONFIGS["untied"]())
    plan = tensor_parallel_plan(model)
    assert plan["lm_head"] == "ted_vocab_head"
    assert {plan[f"model.{name}"] for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")} == {
        "ted_vocab_embedding"
    }
    assert plan["model.decoder"] == "ted_decoder_input"
    assert plan["model.encoder.embed_positions"] == "ted_untied_positions"
    planned = {name.replace(".*", ".0") for name in plan} | {name.replace(".*", ".1") for name in plan}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - planned == set()
