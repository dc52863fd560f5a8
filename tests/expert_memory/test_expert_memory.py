"""With some of its experts in memory a model computes what it computes with all of them; what goes wrong is said."""

import copy
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import KINDS, MakeModel, load, num_bytes_of_an_expert, outputs_of, require_same, save, tokens
from transformers import AutoModelForSeq2SeqLM

from hf_moe_ted import (
    ExpertMemory,
    TextTranslator,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    collect_expert_statistics,
    load_model_and_tokenizer,
    merge_experts,
    prune_experts,
    quantize_experts,
)

NUM_EXPERTS = 8
REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "examples" / "checkpoints" / "zcode_m3_demo"
NLLB_MOE = REPOSITORY / "tests" / "fixtures" / "nllb_moe" / "tiny_a"


@pytest.fixture(name="model", scope="module")
def _model(make_model: MakeModel) -> Any:
    return make_model(num_experts=NUM_EXPERTS, num_experts_per_tok=2)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def on_cpu(path: Path, size: int | str, **options: Any) -> Any:
    return load(path, ExpertMemory(size, **options), device_map="cpu")


def resident(path: Path) -> Any:
    return load(path, experts_implementation="zcode_cpu")


# --- what is computed


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("kind", "experts_in"), [*((kind, "files") for kind in KINDS), ("bfloat16", "memory")])
def test_equals_the_model_with_all_experts(kind: str, experts_in: str, model: Any, folder: Path) -> None:
    path = save(copy.deepcopy(model), kind, folder)
    size, expected = num_bytes_of_an_expert(path), resident(path)
    packed = 3 if kind.startswith("int8") else 1  # what int8 kernels make of weights counts, too
    for num_kept in (3 * packed, 12 * packed, 1000):
        cached = on_cpu(path, num_kept * size, experts_in=experts_in)
        require_same(cached, expected, tokens(), tokens(1, 4, 3))
        statistics = cached.expert_memory.statistics()
        assert statistics.num_bytes_resident <= num_kept * size
        if num_kept == 1000:
            assert statistics.num_calls == statistics.num_calls_all_resident > 0 == statistics.num_bytes_copied
        else:
            assert statistics.num_misses > 0 < statistics.num_bytes_copied
        if num_kept == 3 * packed:
            assert statistics.num_streamed > 0


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_experts_per_tok", [1, 3])
@pytest.mark.parametrize("implementation", ["zcode_cpu", "grouped_mm", "batched_mm"])
def test_other_computations(
    num_experts_per_tok: int, implementation: str, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model(num_experts=NUM_EXPERTS, num_experts_per_tok=num_experts_per_tok).save_pretrained(tmp_path)
    memory, options = ExpertMemory(5 * num_bytes_of_an_expert(tmp_path)), {"experts_implementation": implementation}
    cached = load(tmp_path, memory, device_map="cpu", **options)
    if implementation == "zcode_cpu":
        require_same(cached, load(tmp_path, **options), tokens(), tokens(2, 5))
    mine, theirs = (outputs_of(m, tokens())[0] for m in (cached, load(tmp_path, **options)))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts": [2, 6, 3]},
        {"encoder_ffn_dim": 40, "decoder_ffn_dim": 24},
        {"use_residual": True, "router_bias": True},
        {"eval_capacity_factor": 0.8, "min_capacity": 0, "token_drop_policy": "position"},
        {"num_experts": 3, "expert_map": [[0, 1, 1, 2, 0]] * 3},
        {"position_embedding_type": "tupe"},
    ],
)
def test_other_models(overrides: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    """Layers of other numbers and sizes of experts; padding and dropped tokens; merged rows."""
    make_model(**{"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2} | overrides).save_pretrained(tmp_path)
    ids = tokens()
    ids[1, 4:] = 1
    cached, whole = on_cpu(tmp_path, 4 * num_bytes_of_an_expert(tmp_path)), resident(tmp_path)
    for batch in (ids, tokens(1, 3)):
        (mine, my_tokens), (theirs, their_tokens) = (outputs_of(m, batch) for m in (cached, whole))
        # on some processors products of such small matrices depend on where weights stand in memory
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(my_tokens, their_tokens)


def test_pruned_and_merged(model: Any, rows: Any, tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    statistics = collect_expert_statistics(model, tokenizer, rows)
    prune_experts(model, statistics, keep=5, output_dir=tmp_path / "pruned")
    merge_experts(model, statistics, keep=5, method="frequency", output_dir=tmp_path / "merged")
    quantize_experts(tmp_path / "merged", 4, output_dir=tmp_path / "int4")
    for name in ("pruned", "merged", "int4"):
        cached = on_cpu(tmp_path / name, 4 * num_bytes_of_an_expert(tmp_path / name))
        require_same(cached, resident(tmp_path / name), tokens(), num_beams=3)


@pytest.mark.parametrize("experts_in", ["memory", "files"])
def test_nllb_moe(experts_in: str, tmp_path: Path) -> None:
    """As it is on the Hub, one tensor for each expert; and quantized."""
    quantize_experts(NLLB_MOE, 4, output_dir=tmp_path / "int4")
    for path in (NLLB_MOE, tmp_path / "int4"):
        cached, expected = on_cpu(path, 3 * num_bytes_of_an_expert(path), experts_in=experts_in), resident(path)
        ids = tokens() % expected.config.vocab_size
        require_same(cached, expected, ids.clamp(min=4))


def test_auto_classes(model: Any, folder: Path) -> None:
    path = save(copy.deepcopy(model), "int4", folder)
    for where in (path, NLLB_MOE):
        memory = ExpertMemory(3 * num_bytes_of_an_expert(where))
        cached = AutoModelForSeq2SeqLM.from_pretrained(where, expert_memory=memory, device_map="cpu", dtype="auto")
        assert type(cached) is ZCodeM3ForConditionalGeneration
        require_same(cached, resident(where), tokens() % cached.config.vocab_size)


def test_shipped_model_translates_the_same(tmp_path: Path) -> None:
    """Real text, through each way."""
    texts = ["Close all tabs", "The disk is full.", "Save the file before you quit."]
    quantize_experts(DEMO, 4, output_dir=tmp_path / "int4")
    for path in (DEMO, tmp_path / "int4"):
        size = num_bytes_of_an_expert(path)
        translations = []
        for memory in (None, ExpertMemory(3 * size), ExpertMemory(20 * size, experts_in="memory")):
            translator = TextTranslator(
                *load_model_and_tokenizer(path, device="cpu", expert_memory=memory), num_beams=2
            )
            translations.append([t.text for t in translator.translate(texts, src_lang="en", tgt_lang="de")])
        assert translations[0] == translations[1] == translations[2] and len(set(translations[0])) == 3


# --- which experts are there


def test_statistics_say_which_experts_come_first(
    model: Any, rows: Any, tokenizer: ZCodeM3Tokenizer, folder: Path, tmp_path: Path
) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    statistics = collect_expert_statistics(model, tokenizer, rows)
    statistics.save(tmp_path / "statistics")
    size = 12 * num_bytes_of_an_expert(path)
    for given in (statistics, tmp_path / "statistics"):
        cached = on_cpu(path, size, statistics=given, languages=["en", "de"])
        of_decoder = cached.expert_memory.residents()["model.decoder.layers.1.ffn"]
        used = statistics.layers["model.decoder.layers.1.ffn"].num_computed
        pairs = [pair in (("en", "de"), ("fr", "de"), ("de", "en"), ("fr", "en")) for pair in statistics.pairs]
        never = {expert for expert in range(NUM_EXPERTS) if not used[pairs][:, expert].sum()}
        assert of_decoder and not never & set(of_decoder)
    with pytest.raises(ValueError, match="the statistics have no sentences in es"):
        on_cpu(path, size, statistics=statistics, languages=["en", "es"])
    other = prune_experts(model, statistics, keep=4, output_dir=tmp_path / "pruned").output_dir
    with pytest.raises(ValueError, match=r"the statistics and .*pruned are of different models"):
        on_cpu(Path(str(other)), size, statistics=statistics)
    with pytest.raises(ValueError, match="hf-moe-ted expert-statistics"):
        ExpertMemory(size, languages=["en"])


def test_statistics_are_collected_with_some_experts(
    model: Any, rows: Any, tokenizer: ZCodeM3Tokenizer, folder: Path
) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    models = resident(path), on_cpu(path, 4 * num_bytes_of_an_expert(path))
    expected, collected = (collect_expert_statistics(m, tokenizer, rows, batch_size=3) for m in models)
    for layer, statistics in expected.layers.items():
        for name, tensor in vars(statistics).items():
            assert torch.equal(tensor, getattr(collected.layers[layer], name)), (layer, name)


def test_those_used_last_stay(model: Any, folder: Path) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    cached = on_cpu(path, 22 * num_bytes_of_an_expert(path))
    outputs_of(cached, tokens(1, 4))
    cached.expert_memory.reset_statistics()
    outputs_of(cached, tokens(1, 4))
    again = cached.expert_memory.statistics()
    assert again.num_hits > 0 == again.num_misses == again.num_bytes_copied and again.hit_rate == 1.0
    assert "hits 100.0%" in str(again)


# --- what goes wrong


def test_too_little_memory(model: Any, folder: Path) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    size = num_bytes_of_an_expert(path)
    with pytest.raises(
        ValueError, match=rf"expert_memory \({size:,} bytes\) is too small: .* at least {2 * size:,} bytes"
    ):
        on_cpu(path, size)
    require_same(on_cpu(path, 2 * size), resident(path), tokens())  # the least: experts pass through one by one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": "8 apples"},
            r"size of expert_memory \('8 apples'\) must be a number of bytes or a string such as '8GB'",
        ),
        ({"size": 0}, r"size of expert_memory \(0\) must be positive"),
        ({"size": "8gb"}, r"size of expert_memory \('8gb'\) must be .* with a capital B"),
        ({"size": "infGB"}, r"size of expert_memory \('infGB'\) must be a number of bytes"),
        ({"size": "1GB", "experts_in": "clouds"}, r"experts_in \('clouds'\) must be one of auto, memory, files"),
        ({"size": "1GB", "max_cpu_slots": 1, "experts_in": "files"}, r"max_cpu_slots \(1\) needs experts_in='memory'"),
        ({"size": "1GB", "max_cpu_slots": -1}, r"max_cpu_slots \(-1\) must be at least 0"),
        ({"size": "1GB", "max_cpu_slots": "8"}, r"max_cpu_slots \('8'\) must be an integer"),
        ({"size": "1GB", "statistics": 5}, r"statistics \(5\) must be what collect_expert_statistics returned"),
        ({"size": "1GB", "statistics": ".", "languages": 5}, r"languages \(5\) must be a list of codes"),
        ({"size": "1GB", "statistics": ".", "languages": "de"}, r"languages \('de'\) must be a list of codes"),
        ({"size": "1GB", "statistics": ".", "languages": [b"de"]}, r"languages \(\[b'de'\]\) must be a list of codes"),
        ({"size": "-1GB"}, r"size of expert_memory \('-1GB'\) must be positive"),
        ({"size": "1TB"}, r"size of expert_memory \('1TB'\) must be .* in KB, MB, GB, KiB, MiB or GiB"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMemory(**options)


def test_sizes() -> None:
    sizes = {"8GB": 8 * 10**9, "1.5 MiB": 3 * 2**19, " 4096 ": 4096, 7: 7}
    assert {size: ExpertMemory(size).num_bytes for size in sizes} == sizes


def test_wrong_models(model: Any, folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    make_model(encoder_sparse_step=0, decoder_sparse_step=0).save_pretrained(tmp_path / "dense")
    path = save(copy.deepcopy(model), "float32", folder)
    for where, options, message in (
        (tmp_path / "dense", {}, "has no MoE layer"),
        (tmp_path / "none", {}, "must be a folder with config.json"),
        (
            path,
            {"dtype": "float16"},
            r"up_proj in .* is torch.float32, which torch.float16 may not be able to hold, .*; use dtype=",
        ),
        (path, {"device_map": "auto"}, r"device_map \('auto'\) must be one device"),
        (path, {"device_map": "cuda:99"}, r"device_map \('cuda:99'\) is no GPU that PyTorch can use here .*'cpu'"),
        (path, {"quantization_config": None}, "has no option quantization_config"),
    ):
        with pytest.raises(ValueError, match=message):
            load(where, ExpertMemory("1MB"), **{"device_map": "cpu"} | options)
    with pytest.raises(ValueError, match=r"expert_memory \('8GB'\) must be an ExpertMemory"):
        load(path, "8GB")  # type: ignore[arg-type]


def test_other_dtypes_than_the_stored_one(model: Any, folder: Path) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    for dtype, experts_in in (("bfloat16", "files"), ("bfloat16", "memory"), ("float16", "memory")):
        memory = ExpertMemory(3 * num_bytes_of_an_expert(path), experts_in=experts_in)
        rounded = load(path, memory, dtype=dtype, device_map="cpu")
        assert rounded.dtype == getattr(torch, dtype)
        require_same(rounded, load(path, dtype=dtype, experts_implementation="zcode_cpu"), tokens())


def test_what_such_a_model_cannot_do(model: Any, folder: Path, tmp_path: Path) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    cached = on_cpu(path, 3 * num_bytes_of_an_expert(path))
    for refused in (
        lambda: cached.save_pretrained(tmp_path / "saved"),
        cached.state_dict,
        lambda: copy.deepcopy(cached),
        lambda: cached.to(torch.float16),
        cached.half,
        lambda: cached.to("meta"),
        lambda: quantize_experts(cached),
    ):
        with pytest.raises(
            ValueError, match=r"is not possible with expert_memory, because the model does not hold its experts"
        ):
            refused()
    assert not (tmp_path / "saved").exists()
    cached.to("cpu").to(torch.float32)
    cached.init_weights()
    require_same(cached, resident(path), tokens())  # nothing was changed before it was refused, or initialized again
    cached.train()
    with pytest.raises(ValueError, match="a model with expert_memory cannot be trained"):
        cached(input_ids=tokens(), labels=tokens())
    cached.eval()
    assert not any(parameter.requires_grad for parameter in cached.parameters())
    assert cached(input_ids=tokens(), labels=tokens()).loss.isfinite()


def test_files_that_change(model: Any, folder: Path, tmp_path: Path) -> None:
    path = save(copy.deepcopy(model), "float32", folder)
    for change in ("removed", "renamed", "cut", "overwritten"):
        here = tmp_path / change
        shutil.copytree(path, here)
        cached, expected = on_cpu(here, 4 * num_bytes_of_an_expert(here)), resident(here)
        file = here / "model.safetensors"
        if change == "removed":
            shutil.rmtree(here)
        elif change == "renamed":
            here.rename(tmp_path / "elsewhere")
        elif change == "cut":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.write_bytes(bytes(file.stat().st_size))
        if change in ("removed", "renamed"):
            require_same(cached, expected, tokens())
        else:
            for _ in range(2):
                with pytest.raises(ValueError, match=r"model.safetensors has changed since the model was loaded"):
                    outputs_of(cached, tokens())
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read; it may be truncated"):
        on_cpu(tmp_path / "cut", "1MB")


def test_threads(model: Any, folder: Path) -> None:
    path = save(copy.deepcopy(model), "int8", folder)
    cached, expected = on_cpu(path, 9 * num_bytes_of_an_expert(path)), resident(path)
    batches = [tokens(2, 6, seed) for seed in range(4)]
    outputs = [outputs_of(expected, ids) for ids in batches]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: outputs_of(cached, batches[number])}))
        for number in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected_outputs in enumerate(outputs):
        assert all(torch.equal(a, b) for a, b in zip(found[number], expected_outputs, strict=True)), number


# --- kernels of GPUs


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("num_tokens", "num_experts_per_tok"), [(70, 1), (24, 3), (3, 2)])
def test_kernels_of_gpus(num_tokens: int, num_experts_per_tok: int, model: Any, folder: Path) -> None:
    """Few and many slots in Triton's interpreter: slots in place of experts change nothing."""
    pytest.importorskip("triton")
    path, options = save(copy.deepcopy(model), "float32", folder), {"experts_implementation": "zcode_fused"}
    cached = load(path, ExpertMemory(10 * num_bytes_of_an_expert(path)), device_map="cpu", **options)
    layer = "model.encoder.layers.1.ffn.experts"
    hidden = torch.randn(num_tokens, model.config.d_model)
    ids = torch.rand(num_tokens, NUM_EXPERTS).argsort(dim=1)[:, :num_experts_per_tok]
    ids[1] = NUM_EXPERTS  # a token that no expert computes
    weights = torch.rand(ids.shape).masked_fill(ids == NUM_EXPERTS, 0.0)
    with torch.no_grad():
        for turn in range(2):
            outputs = [m.get_submodule(layer)(hidden, ids, weights) for m in (cached, load(path, **options))]
            assert torch.equal(*outputs) and outputs[0][2].abs().max() > 0, turn
    assert cached.expert_memory.statistics().num_streamed or num_tokens == 3
