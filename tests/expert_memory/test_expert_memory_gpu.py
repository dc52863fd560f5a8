"""On a GPU, a model with some of its experts computes what the model with all of them computes, bit for bit."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import KINDS, MakeModel, load, num_bytes_of_an_expert, outputs_of, require_same, save, tokens

from hf_moe_ted import ExpertMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
NUM_EXPERTS = 8


@pytest.fixture(name="folder", scope="module")
def _folder(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def make(make_model: MakeModel, kind: str, folder: Path, **overrides: Any) -> Path:
    name = "_".join(f"{value}" for value in overrides.values()) or "plain"
    return save(make_model(**{"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2} | overrides), kind, folder / name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts_in", ["memory", "files"])
def test_equals_the_model_with_all_experts(kind: str, experts_in: str, make_model: MakeModel, folder: Path) -> None:
    """With room for one layer at least, for most, and for all; batches of few and of many slots."""
    path = make(make_model, kind, folder)
    size = num_bytes_of_an_expert(path)
    resident = load(path, device_map="cuda")
    for num_kept in (NUM_EXPERTS, 13, 1000):
        model = load(path, ExpertMemory(num_kept * size, experts_in=experts_in))
        assert model.device.type == "cuda"
        require_same(model, resident, tokens(), tokens(1, 5, 3), tokens(40, 20, 4), tokens(40, 20, 5))
        statistics = model.expert_memory.statistics()
        assert statistics.num_bytes_resident <= num_kept * size
        if num_kept == NUM_EXPERTS:
            assert statistics.num_misses and statistics.num_streamed and statistics.num_prefetched
            assert statistics.num_bytes_copied > num_kept * size
        elif num_kept == 1000:
            assert statistics.num_calls == statistics.num_calls_all_resident and not statistics.num_misses


@pytest.mark.parametrize("num_experts_per_tok", [1, 3])
def test_other_numbers_of_experts_per_token(num_experts_per_tok: int, make_model: MakeModel, folder: Path) -> None:
    path = make(make_model, "bfloat16", folder, num_experts_per_tok=num_experts_per_tok)
    model = load(path, ExpertMemory(NUM_EXPERTS * num_bytes_of_an_expert(path)))
    require_same(model, load(path, device_map="cuda"), tokens(), tokens(40, 20, 4))


def test_less_memory_than_a_layer_has(make_model: MakeModel, folder: Path) -> None:
    """Few slots are computed the same way; many may be in other tiles."""
    path = make(make_model, "bfloat16", folder)
    model = load(path, ExpertMemory(3 * num_bytes_of_an_expert(path)))
    resident = load(path, device_map="cuda")
    require_same(model, resident, tokens(2, 7), tokens(1, 5))
    require_close(model, resident, tokens(40, 20, 4))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_missing_experts_on_the_cpu(kind: str, make_model: MakeModel, folder: Path) -> None:
    path = make(make_model, kind, folder)
    memory = ExpertMemory(4 * num_bytes_of_an_expert(path), max_cpu_slots=64)
    model, resident = load(path, memory), load(path, device_map="cuda")
    require_close(model, resident, tokens(2, 7))
    statistics = model.expert_memory.statistics()
    assert statistics.num_on_cpu and not statistics.num_misses and not statistics.num_bytes_copied


def test_threads_on_streams_of_their_own(make_model: MakeModel, folder: Path) -> None:
    path = make(make_model, "bfloat16", folder)
    model, resident = load(path, ExpertMemory(9 * num_bytes_of_an_expert(path))), load(path, device_map="cuda")
    batches = [tokens(3, 8, seed).cuda() for seed in range(6)]
    found: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def logits_of(one: Any, ids: torch.Tensor) -> torch.Tensor:
        return one(input_ids=ids, decoder_input_ids=ids.flip(0)).logits

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                found[number] = logits_of(model, batches[number])
            stream.synchronize()

    expected = [logits_of(resident, ids) for ids in batches]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(expected):
        assert torch.equal(found[number], logits), number


def test_whole_layers_can_be_captured(make_model: MakeModel, folder: Path) -> None:
    """A layer all of whose experts are on the device waits for nothing; another one says why it cannot be captured."""
    path = make(make_model, "bfloat16", folder)
    model = load(path, ExpertMemory(10 * num_bytes_of_an_expert(path)))
    whole, part = (model.get_submodule(f"model.{side}.layers.1.ffn") for side in ("decoder", "encoder"))
    hidden = torch.randn(1, 6, model.config.d_model, device="cuda", dtype=model.dtype)
    with torch.no_grad():
        expected, _ = whole(hidden)
        part(hidden)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = whole(hidden)
        graph.replay()
        assert torch.equal(output, expected)
        message = r"model.encoder.layers.1.ffn cannot be captured in a CUDA graph"
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            part(hidden)


def require_close(model: Any, expected: Any, ids: torch.Tensor) -> None:
    mine, theirs = (outputs_of(m, ids)[0].float() for m in (model, expected))
    assert (mine - theirs).norm() / theirs.norm() < 0.05
