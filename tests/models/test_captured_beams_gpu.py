"""Searches whose steps are CUDA graphs, on a CUDA device, beside those of transformers."""

import gc
import threading
from typing import Any

import pytest
import torch
from test_beam_search import ENDS, TO_THE_LIMIT, make_model, of_transformers
from test_captured_search import GREEDY, OPTIONS, captured, kept_hypotheses, stepwise, store_of
from torch import Tensor

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts
from hf_moe_ted.compression import quantized_experts
from hf_moe_ted.models import decoding_step, generation, graph_store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> None:
    """Memory that was given back is full of NaN, also that of graphs: what is left unwritten must not reach anything.

    Not by deterministic algorithms: those that write to places by their numbers wait for the device.
    """
    sizes = [2**power for power in range(9, 26) for _ in range(4)]
    blocks = [torch.full((size // 4,), torch.nan, device="cuda") for size in sizes]
    del blocks


class PoisonedRecorder(graph_store.CudaRecorder):
    """Before each replay another graph writes NaN into the memory that all graphs share."""

    def __init__(self) -> None:
        super().__init__()
        _, self._poison = super().record(self._fill)

    @staticmethod
    def _fill() -> None:
        for power in range(9, 23):
            for _ in range(8):
                torch.full((2**power // 4,), torch.nan, device="cuda")

    def record(self, call: Any) -> Any:
        returned, replay = super().record(call)

        def replay_in_poisoned_memory() -> None:
            self._poison()
            replay()

        return returned, replay_in_poisoned_memory


@pytest.fixture(autouse=True)
def poisoned_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_store, "new_recorder", PoisonedRecorder)


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Searches that run from Python since a capture failed, and what went to transformers."""
    said: list[str] = []
    monkeypatch.setattr(graph_store.logger, "warning_once", said.append)
    monkeypatch.setattr(generation.logger, "debug", lambda message, *values: said.append(message % values))
    return said


@pytest.fixture
def source() -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (5, 9), generator=torch.Generator().manual_seed(3))
    ids[1, 5:] = ids[3, 7:] = 1
    return {"input_ids": ids.cuda(), "attention_mask": (ids != 1).long().cuda()}


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}


@pytest.mark.parametrize("implementation", ["zcode_fused", "batched_mm"])
@pytest.mark.parametrize("name", OPTIONS)
def test_beams_are_those_of_transformers(
    name: str, implementation: str, source: dict[str, Tensor], warnings: list[str]
) -> None:
    model = make_model(experts_implementation=implementation).cuda()
    options = on_gpu({**source, **ENDS, **OPTIONS[name]})
    expected = of_transformers(model, **options)
    for _ in range(3):
        output = captured(model, **options)
        if not isinstance(output, Tensor):
            assert torch.equal(output.beam_indices, expected.beam_indices)
            assert torch.equal(output.sequences, expected.sequences)
        else:
            assert torch.equal(output, expected)
    assert not warnings
    assert store_of(model).num_recorded > 0


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_is_that_of_transformers(name: str, source: dict[str, Tensor], warnings: list[str]) -> None:
    model = make_model().cuda()
    options = on_gpu({**source, **ENDS, **OPTIONS[name], "num_beams": 1})
    expected = stepwise(model, **options)
    warnings.clear()
    for _ in range(3):
        assert torch.equal(captured(model, **options), expected)
    assert not warnings


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "changed"),
    [
        (1, {}),
        (3, {"early_stopping": True}),
        (8, {"num_beams": 5, "early_stopping": "never", "forced_bos_token_id": 7}),
        (40, {"min_new_tokens": 20}),
    ],
)
def test_scores_of_long_searches(
    batch_size: int, changed: dict[str, Any], with_kernels: bool, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """Of a larger vocabulary, two experts for each token, and layers as those of NLLB-MoE."""
    monkeypatch.setattr(decoding_step, "KERNEL_DEVICES", ("cuda",) if with_kernels else ())
    torch.manual_seed(0)
    config = ZCodeM3Config(
        vocab_size=5000, d_model=128, encoder_layers=2, decoder_layers=4, encoder_ffn_dim=256, decoder_ffn_dim=256,
        encoder_attention_heads=4, decoder_attention_heads=4, num_experts=8, num_experts_per_tok=2, init_std=0.3,
        normalize_router_weights="after_dropping", decoder_sparse_step=2, scale_embedding=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = ZCodeM3ForConditionalGeneration(config).eval().cuda()
    input_ids = torch.randint(3, 5000, (batch_size, 20), device="cuda")
    options: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "num_beams": 4}
    options |= {"max_new_tokens": 90, "num_return_sequences": 4}
    options |= {"eos_token_id": [2, 3], "length_penalty": 0.7, **changed}
    with torch.no_grad():
        model.lm_head.weight[2:4] *= 2.0  # so that sentences end
    found = kept_hypotheses(monkeypatch)
    expected = of_transformers(model, **options, output_scores=True, return_dict_in_generate=True)
    for _ in range(3):
        output = captured(model, **options)
        width = max(output.shape[1], expected.sequences.shape[1])
        padded = [torch.nn.functional.pad(o, (0, width - o.shape[1]), value=1) for o in (output, expected.sequences)]
        is_equal = (padded[0] == padded[1]).all(dim=1)
        # two beams with nearly the same score may change places, their scores do not
        assert is_equal.float().mean() >= 0.98
        scores_BN = found[-1].ended_scores_BN[:, : options["num_return_sequences"]]
        torch.testing.assert_close(scores_BN.flatten(), expected.sequences_scores, atol=1e-4, rtol=1e-4)
    assert not warnings


def test_calls_of_other_inputs(source: dict[str, Tensor], warnings: list[str]) -> None:
    model = make_model().cuda()
    few = {name: tensor[:2, :5] for name, tensor in source.items()}
    many = {name: tensor.repeat(2, 3) for name, tensor in source.items()}
    for _ in range(3):
        for inputs in (few, source, many):
            for num_beams in (1, 4, 5):
                options = {**inputs, **ENDS, "num_beams": num_beams}
                output = captured(model, **options)
                assert not warnings
                assert torch.equal(output, stepwise(model, **options))
                warnings.clear()
    captured(model, **many, **TO_THE_LIMIT)
    with torch.no_grad():
        model.model.decoder.layers[0].self_attn.q_proj.weight.mul_(-1.0)
    assert torch.equal(captured(model, **source, **ENDS), of_transformers(model, **source, **ENDS))


@pytest.mark.parametrize("on_own_streams", [False, True])
def test_two_threads(on_own_streams: bool, source: dict[str, Tensor], warnings: list[str]) -> None:
    model = make_model().cuda()
    inputs = [{**source, "input_ids": source["input_ids"].roll(shift, 1)} for shift in range(2)]
    expected = [of_transformers(model, **one, **ENDS) for one in inputs]
    outputs: list[list[Tensor]] = [[], []]

    def work(number: int) -> None:
        stream = torch.cuda.Stream() if on_own_streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            for _ in range(8):
                outputs[number].append(captured(model, **inputs[number], **ENDS).cpu())

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected[n].cpu()) for n in range(2) for output in outputs[n])
    assert [len(output) for output in outputs] == [8, 8]
    # a thread that waits for the device or loads a kernel may break the capture of the other, which is made again
    warnings.clear()
    for _ in range(3):
        assert torch.equal(captured(model, **inputs[0], **ENDS), expected[0])
    assert not warnings


def test_bfloat16_and_inference_mode(source: dict[str, Tensor], warnings: list[str]) -> None:
    """Rounding may choose other words; what a replay gives is what it gave before."""
    model = make_model().cuda().bfloat16()
    first = captured(model, **source, **ENDS)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(captured(model, **source, **ENDS), first)
    assert not warnings


def allocated() -> int:
    """Bytes without what products keep for each stream."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_memory_is_given_back(source: dict[str, Tensor]) -> None:
    before = allocated()
    model = make_model().cuda()
    captured(model, **source, **ENDS)
    assert allocated() > before + 2**18
    del model
    assert allocated() <= before + 2**16


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts(
    bits: int, source: dict[str, Tensor], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may choose other words than step by step; what a replay gives is what the first call gave."""
    monkeypatch.setattr(quantized_experts, "TRITON_ON_GPUS", True)
    model = quantize_experts(make_model().cuda(), bits, 16)
    expected = stepwise(model, **source, **ENDS)
    warnings.clear()
    first = captured(model, **source, **ENDS)
    width = min(expected.shape[1], first.shape[1])
    assert (first[:, :width] == expected[:, :width]).float().mean() > 0.8
    for _ in range(3):
        assert torch.equal(captured(model, **source, **ENDS), first)
    assert not warnings
    model.set_experts_implementation("eager")  # which waits for the device
    assert torch.equal(captured(model, **source, **ENDS), stepwise(model, **source, **ENDS))
    assert "experts that wait for the device" in warnings[0]
