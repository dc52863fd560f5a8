"""What the tests of the model check on the CPU, on a CUDA device."""

import contextlib
import copy
import lzma
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.models import graph_store
from hf_moe_ted.testing import tiny_config

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """New tensors are full of NaN: what products leave unwritten must not reach anything."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def model_and_batch(**overrides):
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(tiny_config(**{"capacity_factor": None} | overrides)).cuda()
    input_ids = torch.randint(3, 96, (8, 17), device="cuda")
    input_ids[0, 9:] = input_ids[3, 5:] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 1).long(),
        "labels": torch.randint(3, 96, (8, 11), device="cuda"),
    }
    return model, batch


def loss_and_gradients(model, batch, implementation, **autocast):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cuda", **autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "zcode_grouped", "zcode_fused"])
def test_experts_implementations_agree_with_the_loop(implementation, capacity_factor, num_experts_per_tok):
    model, batch = model_and_batch(num_experts_per_tok=num_experts_per_tok, capacity_factor=capacity_factor)
    model.train()
    loss, gradients = loss_and_gradients(model, batch, implementation, enabled=False)
    expected_loss, expected_gradients = loss_and_gradients(model, batch, "eager", enabled=False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("implementation", ["grouped_mm", "zcode_grouped", "zcode_fused"])
def test_training_step_in_bf16_autocast_is_close_to_float32(implementation, capacity_factor):
    model, batch = model_and_batch(capacity_factor=capacity_factor)
    model.train()
    loss, gradients = loss_and_gradients(model, batch, implementation, dtype=torch.bfloat16)
    expected_loss, _ = loss_and_gradients(model, batch, implementation, enabled=False)
    torch.testing.assert_close(loss.float(), expected_loss, rtol=2e-2, atol=0.0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("implementation", ["zcode_grouped", "zcode_fused"])
def test_compiled_training_step_equals_eager(implementation):
    # random numbers of compiled code are others
    model, batch = model_and_batch(capacity_factor=1.0, token_drop_policy="position")
    expected = loss_and_gradients(model, batch, implementation, enabled=False)
    model.compile()
    loss, gradients = loss_and_gradients(model, batch, implementation, enabled=False)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("with_checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["zcode_grouped", "zcode_fused"])
def test_each_layer_compiles_as_one_graph_in_training(implementation, with_checkpointing):
    model, batch = model_and_batch(capacity_factor=1.0, token_drop_policy="position")
    expected = loss_and_gradients(model, batch, implementation, enabled=False)
    if with_checkpointing:
        model.activation_checkpointing_enable()
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.compile(fullgraph=True)  # an error at the first graph break
    loss, gradients = loss_and_gradients(model, batch, implementation, enabled=False)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_training_steps_of_a_cuda_graph_equal_eager_ones():
    losses = {}
    for as_graph in (False, True):
        model, batch = model_and_batch(capacity_factor=1.0)
        model.to(torch.bfloat16).set_experts_implementation("zcode_fused")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, capturable=True)

        def step(model=model, batch=batch, optimizer=optimizer):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            losses[as_graph] = [step().item() for _ in range(3)]
        torch.cuda.current_stream().wait_stream(side)
        if as_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
        for _ in range(5):
            if as_graph:
                graph.replay()
            else:
                loss = step()
            losses[as_graph].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0] - 0.1


def test_fused_experts_are_the_default_with_a_gpu():
    model, _ = model_and_batch()
    assert model.config._experts_implementation == "zcode_fused"


@pytest.mark.parametrize("cache", ["dynamic", "static"])  # with a static cache transformers compiles into CUDA graphs
@pytest.mark.parametrize("num_beams", [1, 4])
def test_generation_equals_the_cpu(num_beams, cache):
    model, batch = model_and_batch()
    model.eval()
    on_cpu = copy.deepcopy(model).cpu()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, num_beams=num_beams, max_new_tokens=8, cache_implementation=cache)
    expected = on_cpu.generate(**{k: v.cpu() for k, v in inputs.items()}, num_beams=num_beams, max_new_tokens=8)
    assert output.tolist() == expected.tolist()


@pytest.fixture(scope="module")
def shipped_model_and_prompts():
    """The shipped model, 64 English sentences for eight languages in one batch, and its translations on the CPU."""
    folder = EXAMPLES / "checkpoints" / "zcode_m3_demo"
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder, src_lang="en")
    with lzma.open(EXAMPLES / "data" / "chromium_l10n.test.tsv.xz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    rows = [row for language in ("ar", "de", "el", "es", "fr", "ja", "ru", "zh") for row in of_language(rows, language)]
    inputs = tokenizer([english for _, english, _ in rows], padding=True, return_tensors="pt")
    tags = [[model.config.decoder_start_token_id, tokenizer.get_lang_id(language)] for language, _, _ in rows]
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    inputs["decoder_input_ids"] = torch.tensor(tags)
    return model, tokenizer, inputs, greedy(model, tokenizer, inputs)


def of_language(rows, language, number=8):
    return [row for row in rows if row[0] == language][:number]


def greedy(model, tokenizer, inputs, **options):
    output = model.generate(**inputs, num_beams=1, do_sample=False, max_length=100, **options)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("way, least", [("float32", 0.95), ("trainer", 0.8), ("autocast", 0.8), ("bfloat16", 0.8)])
def test_translations_of_mixed_languages_equal_those_of_the_cpu(shipped_model_and_prompts, way, least, cuda_graphs):
    model, tokenizer, inputs, expected = shipped_model_and_prompts
    model = copy.deepcopy(model).to("cuda", torch.bfloat16 if way == "bfloat16" else torch.float32)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    context = torch.autocast("cuda", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    if way == "trainer":
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator(mixed_precision="bf16").prepare_model(model)  # what a Trainer with `bf16` does
        AcceleratorState._reset_state(reset_partial_state=True)
    with context:
        found = greedy(model, tokenizer, inputs, cuda_graphs=cuda_graphs)
    assert (model in graph_store._stores) == (cuda_graphs and way != "autocast")
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= least * len(expected)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "flash_attention_2"])
def test_attention_implementations_agree_with_eager(attention):
    # flex_attention needs at least 16 dimensions per head
    model, batch = model_and_batch(encoder_attention_heads=2, decoder_attention_heads=2)
    model = model.eval().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    expected = model(**batch).logits
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{attention} is not available: {error}")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=5e-2, atol=5e-2)
