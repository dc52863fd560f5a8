"""Loading, initialization, embeddings, outputs, attention, training and compilation, on every architecture."""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.modeling_outputs import Seq2SeqMoEModelOutput, Seq2SeqMoEOutput
from transformers.utils import is_flash_attn_2_available

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Model
from hf_moe_ted.models.positions import ZCodeM3SinusoidalPositionalEmbedding
from hf_moe_ted.testing import tiny_config

PAD, INIT_STD = 1, 0.2
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
EVERYTHING = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
POSITIONS = ("sinusoidal", "learned", "tupe")
Inputs = dict[str, Tensor]
Head = ZCodeM3ForConditionalGeneration
TrainStep = Callable[..., dict[str, Tensor]]


@pytest.fixture
def checkpoint(model: Head, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def short_model(config: ZCodeM3Config) -> Head:
    """The same in 1 + 1 layers, sparse if any layer is: time to compile grows with their number."""
    step = min(config.encoder_sparse_step, 1)
    overrides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_sparse_step": step, "decoder_sparse_step": step}
    if isinstance(config.num_experts, list):
        overrides["num_experts"] = config.num_experts[:2]
    torch.manual_seed(0)
    return Head(ZCodeM3Config(**{**config.to_dict(), **overrides})).eval()


@pytest.fixture
def train_step(batch: Inputs, gradients: Callable[[nn.Module], dict[str, Tensor]]) -> TrainStep:
    """Loss and gradients of one step of `model`, run by `call`; tokens dropped at random are the same every time."""

    def step(model: nn.Module, call: Callable | None = None) -> dict[str, Tensor]:
        torch.manual_seed(7)
        model.train().zero_grad()
        loss = (model if call is None else call)(**batch).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    return step


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _tied(model: Head) -> list[Tensor]:
    base = model.model
    return [
        model.lm_head.weight,
        base.shared.weight,
        base.encoder.embed_tokens.weight,
        base.decoder.embed_tokens.weight,
    ]


def _assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, positions included, which are in no `state_dict`."""
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for tensors, others in (
        (actual.state_dict(), expected.state_dict()),
        (dict(actual.named_buffers()), dict(expected.named_buffers())),
    ):
        torch.testing.assert_close(tensors, others, atol=0.0, rtol=0.0)


def _assert_initialized(model: Head) -> None:
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert parameter.count_nonzero() == 0, name
        elif "layer_norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(INIT_STD, rel=0.25), name
            assert parameter.mean().abs() < 4 * INIT_STD / parameter.numel() ** 0.5, name
    assert model.model.shared.weight[PAD].count_nonzero() == 0
    assert len({id(weight) for weight in _tied(model)}) == 1
    for module in model.modules():
        if isinstance(module, ZCodeM3SinusoidalPositionalEmbedding):
            assert torch.equal(module.weights, module.table())


# --- saving and loading


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_checkpoint_gives_the_model_back(
    model: Head, forward_inputs: Inputs, tmp_path: Path, max_shard_size: str
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_size == "1GB")
    saved = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            saved += file.keys()

    loaded, info = Head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert sorted(saved) == sorted(dict(loaded.named_parameters())), "tied weights are stored once"
    assert len({weight.data_ptr() for weight in _tied(loaded)}) == 1
    _assert_same_weights(loaded, model)
    assert not loaded.training
    torch.testing.assert_close(loaded(**forward_inputs).logits, model(**forward_inputs).logits, **CLOSE)


def test_head_and_base_load_each_other(model: Head, checkpoint: Path, tmp_path: Path) -> None:
    base, info = ZCodeM3Model.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    _assert_same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    head, info = Head.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    _assert_same_weights(head, model)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_is_saved_and_loaded_alone(model: Head, tmp_path: Path, side: str) -> None:
    part = getattr(model.model, side)
    part.save_pretrained(tmp_path)
    loaded, info = type(part).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    _assert_same_weights(loaded, part)


def test_saving_again_gives_the_same_bytes(model: Head, tmp_path: Path) -> None:
    def bytes_of(model: Head, name: str) -> dict[str, bytes]:
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = bytes_of(model, "first")
    assert len(first) > 4
    assert bytes_of(model, "second") == first
    assert bytes_of(Head.from_pretrained(tmp_path / "first"), "third") == first


@pytest.mark.parametrize(
    ("share_in_memory", "device_map"),
    [(1.0, "cpu"), (1.0, {"": "cpu"}), (1.0, "auto"), (0.5, "auto"), (0.0, {"": "disk"})],
    ids=["cpu", "all on cpu", "auto", "half on disk", "all on disk"],
)
def test_device_map(
    model: Head, forward_inputs: Inputs, checkpoint: Path, tmp_path: Path, share_in_memory: float, device_map: Any
) -> None:
    kwargs: dict[str, Any] = {"device_map": device_map}
    if device_map == "auto":
        limit = model.get_memory_footprint() * (0.5 if share_in_memory == 0.5 else 10)
        kwargs["max_memory"] = {"cpu": int(limit)}
    loaded = Head.from_pretrained(checkpoint, offload_folder=tmp_path / "offload", **kwargs)
    in_memory = [parameter.device.type == "cpu" for parameter in loaded.parameters()]
    if share_in_memory == 0.5:
        assert any(in_memory) and not all(in_memory)
    else:
        assert set(in_memory) == {share_in_memory == 1.0}
    for _ in range(2):
        torch.testing.assert_close(loaded(**forward_inputs).logits, model(**forward_inputs).logits, **CLOSE)


@pytest.mark.parametrize(
    ("saved", "requested", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.bfloat16),
        ("float32", torch.float16, torch.float16),
    ],
)
def test_dtype(
    model: Head, forward_inputs: Inputs, tmp_path: Path, saved: str, requested: Any, expected: torch.dtype
) -> None:
    model.to(getattr(torch, saved)).save_pretrained(tmp_path)
    loaded = Head.from_pretrained(tmp_path, dtype=requested)
    assert {tensor.dtype for tensor in [*loaded.parameters(), *loaded.buffers()]} == {expected} == {loaded.dtype}
    new = Head._from_config(model.config, dtype=expected).eval()
    new.load_state_dict(model.state_dict())
    _assert_same_weights(loaded, new)
    torch.testing.assert_close(loaded(**forward_inputs).logits, new(**forward_inputs).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model: Head, forward_inputs: Inputs, copied: Callable[[Head], Head]) -> None:
    other = copied(model)
    _assert_same_weights(other, model)
    assert len({id(weight) for weight in _tied(other)}) == 1
    expected = model(**forward_inputs).logits
    nn.init.zeros_(model.lm_head.weight)
    torch.testing.assert_close(other(**forward_inputs).logits, expected, **CLOSE)


# --- initialization


def _on_meta_then_here(config: ZCodeM3Config) -> Head:
    with torch.device("meta"):
        model = Head(config)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    model.to_empty(device="cpu")
    model.init_weights()
    return model


CONSTRUCTORS: dict[str, Callable[[ZCodeM3Config], Head]] = {
    "constructor": Head,
    "from_config": Head._from_config,
    "meta": _on_meta_then_here,
    # a checkpoint that has none of the weights
    "from_pretrained": lambda config: Head.from_pretrained(
        None, config=config, state_dict={}, ignore_mismatched_sizes=True
    ),
}


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_weight_of_a_new_model_is_initialized(config: ZCodeM3Config, positions: str, constructor: str) -> None:
    config.position_embedding_type = positions
    config.router_bias = True
    torch.manual_seed(0)
    model = CONSTRUCTORS[constructor](config)
    _assert_initialized(model)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_weight_is_loaded_or_computed(config: ZCodeM3Config, tmp_path: Path, positions: str) -> None:
    config.position_embedding_type = positions
    model = Head(config)
    model.save_pretrained(tmp_path)
    _assert_same_weights(Head.from_pretrained(tmp_path), model)


def test_the_seed_decides_the_initial_weights(config: ZCodeM3Config, model: Head) -> None:
    def new(seed: int) -> Head:
        torch.manual_seed(seed)
        return Head(config)

    _assert_same_weights(new(0), model)
    other = new(1).state_dict()
    same = [name for name, weight in model.state_dict().items() if torch.equal(weight, other[name])]
    assert all("bias" in name or "layer_norm" in name for name in same)


def test_only_weights_of_another_size_are_initialized_again(model: Head, checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Head.from_pretrained(checkpoint, vocab_size=100)
    loaded, info = Head.from_pretrained(
        checkpoint, vocab_size=100, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, _, _ in info["mismatched_keys"]] == ["model.shared.weight"]
    assert {weight.shape for weight in _tied(loaded)} == {(100, 32)}
    assert loaded.lm_head.weight.std().item() == pytest.approx(INIT_STD, rel=0.1)
    _assert_same_weights(loaded.model.encoder.layers, model.model.encoder.layers)
    _assert_same_weights(loaded.model.decoder.layers, model.model.decoder.layers)


# --- embeddings


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("num_tokens", "multiple_of", "expected"), [(104, None, 104), (90, None, 90), (97, 8, 104), (None, 64, 128)]
)
def test_resized_embeddings_leave_old_tokens_as_they_were(
    config: ZCodeM3Config,
    forward_inputs: Inputs,
    tied: bool,
    num_tokens: int | None,
    multiple_of: int | None,
    expected: int,
) -> None:
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = Head(config).eval()
    inputs = {name: tensor.clamp(max=89) for name, tensor in forward_inputs.items()}
    before = model(**inputs).logits
    embedding = model.resize_token_embeddings(num_tokens, pad_to_multiple_of=multiple_of)
    assert embedding is model.get_input_embeddings()
    assert model.config.vocab_size == model.lm_head.out_features == embedding.num_embeddings == expected
    assert {weight.shape for weight in _tied(model)} == {(expected, 32)}
    assert len({id(weight) for weight in _tied(model)}) == (1 if tied else 4)
    after = model(**inputs).logits
    assert after.shape[-1] == expected and after.isfinite().all()
    torch.testing.assert_close(after[..., :90], before[..., :90], **CLOSE)


def test_get_and_set_embeddings(model: Head) -> None:
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.shared
    assert model.get_output_embeddings() is model.lm_head
    assert model.model.get_output_embeddings() is None

    embedding, head = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)
    model.set_input_embeddings(embedding)
    assert model.model.encoder.embed_tokens is model.model.decoder.embed_tokens is model.model.shared is embedding
    model.set_output_embeddings(head)
    assert model.lm_head is head
    model.tie_weights()
    assert head.weight is embedding.weight


# --- outputs


def test_number_and_shapes_of_outputs(model: Head, config: ZCodeM3Config, batch: Inputs) -> None:
    model.set_attn_implementation("eager")
    output = model(**batch, **EVERYTHING)

    def shapes(name: str) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in output[name]]

    for side, num_layers, length in (("encoder", 4, 9), ("decoder", 2, 6)):
        assert shapes(f"{side}_hidden_states") == [(4, length, 32)] * (num_layers + 1)
        assert shapes(f"{side}_attentions") == [(4, 4, length, length)] * num_layers
        experts = config.num_experts_per_layer(side).values()
        assert shapes(f"{side}_router_logits") == [(4 * length, num_experts) for num_experts in experts]
    assert shapes("cross_attentions") == [(4, 4, 6, 9)] * 2
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    torch.testing.assert_close(model.lm_head(output.decoder_hidden_states[-1]), output.logits, **CLOSE)


def test_order_of_outputs(model: Head, batch: Inputs, forward_inputs: Inputs) -> None:
    model.set_attn_implementation("eager")
    for output, order in (
        (model(**batch, **EVERYTHING, use_cache=True), Seq2SeqMoEOutput),
        (model.model(**forward_inputs, **EVERYTHING), Seq2SeqMoEModelOutput),
    ):
        assert list(output) == [field.name for field in fields(order)]
    assert output.to_tuple()[0] is output.last_hidden_state


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, EVERYTHING], ids=["default", "no cache", "everything"])
def test_tuples_are_the_outputs_in_order(model: Head, batch: Inputs, forward_inputs: Inputs, kwargs: Any) -> None:
    def tensors(value: Any) -> list[Tensor]:
        """All tensors of nested tuples and caches, in order."""
        if isinstance(value, Tensor):
            return [value]
        return [tensor for item in value if item is not None for tensor in tensors(item)]

    model.set_attn_implementation("eager")
    for module, inputs in ((model, batch), (model, forward_inputs), (model.model, forward_inputs)):
        expected = module(**inputs, **kwargs)
        actual = module(**inputs, **kwargs, return_dict=False)
        assert type(actual) is tuple
        assert len(actual) == len(expected)
        assert len(tensors(actual)) >= len(expected)
        torch.testing.assert_close(tensors(actual), tensors(expected.to_tuple()), **CLOSE)


def test_hidden_states_and_attentions_keep_their_gradients(model: Head, forward_inputs: Inputs) -> None:
    model.set_attn_implementation("eager")
    output = model(**forward_inputs, **EVERYTHING)
    kept = {}
    for name, value in output.items():
        if name.endswith(("_hidden_states", "attentions", "router_logits")):
            kept |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
    for tensor in kept.values():
        tensor.retain_grad()
    output.logits.square().mean().backward()
    assert len(kept) >= 16
    assert [name for name, tensor in kept.items() if tensor.grad is None or not tensor.grad.any()] == []


def test_embeddings_in_place_of_ids(model: Head, forward_inputs: Inputs) -> None:
    embed, source, target = (
        model.get_input_embeddings(),
        forward_inputs["input_ids"],
        forward_inputs["decoder_input_ids"],
    )
    masks = {"attention_mask": forward_inputs["attention_mask"], "decoder_attention_mask": target != PAD}
    for module in (model, model.model):
        expected = module(input_ids=source, decoder_input_ids=target, **masks)[0]
        actual = module(inputs_embeds=embed(source), decoder_inputs_embeds=embed(target), **masks)[0]
        torch.testing.assert_close(actual, expected, **CLOSE)


# --- attention and experts


def test_attention_implementations_agree(
    model: Head, checkpoint: Path, forward_inputs: Inputs, train_step: TrainStep
) -> None:
    assert model.config._attn_implementation == "sdpa"
    expected_logits, expected_step = model(**forward_inputs).logits, train_step(model)
    loaded = Head.from_pretrained(checkpoint, attn_implementation="eager")
    model.eval().set_attn_implementation("eager")
    for eager in (loaded, model):
        assert eager.config._attn_implementation == eager.model.encoder.config._attn_implementation == "eager"
        output = eager(**forward_inputs, output_attentions=True)
        assert len(output.encoder_attentions) == 4
        torch.testing.assert_close(output.logits, expected_logits, **CLOSE)
        torch.testing.assert_close(train_step(eager), expected_step, **CLOSE)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def test_flex_attention_equals_sdpa(model: Head, forward_inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling the kernel and the mask, which takes half a minute; on CPUs it has no backward."""
    calls = []

    def plain(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: plain)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    expected = model(**forward_inputs).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**forward_inputs).logits, expected, **CLOSE)
    assert len(calls) == 4 + 2 * 2


def test_experts_implementations_agree(
    model: Head, checkpoint: Path, forward_inputs: Inputs, train_step: TrainStep
) -> None:
    assert model.config._experts_implementation == "grouped_mm"
    expected_logits, expected_step = model(**forward_inputs).logits, train_step(model)
    for implementation in ("eager", "batched_mm"):
        model.eval().set_experts_implementation(implementation)
        for other in (model, Head.from_pretrained(checkpoint, experts_implementation=implementation)):
            used = {module.config._experts_implementation for module in other.modules() if hasattr(module, "up_proj")}
            assert used <= {implementation} == {other.config._experts_implementation}
            torch.testing.assert_close(other(**forward_inputs).logits, expected_logits, **CLOSE)
            torch.testing.assert_close(train_step(other), expected_step, **CLOSE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_what_does_not_exist_raises(tmp_path: Path) -> None:
    model = Head(tiny_config())
    model.save_pretrained(tmp_path)
    for attempt, error, message in (
        (lambda: model.set_attn_implementation("nope"), ValueError, 'attn_implementation="nope"` is not supported'),
        (lambda: Head.from_pretrained(tmp_path, attn_implementation="nope"), ValueError, '"nope"` is not supported'),
        (lambda: model.set_experts_implementation("nope"), ValueError, 'experts_implementation="nope"` is not supp'),
        (lambda: Head.from_pretrained(tmp_path, experts_implementation="nope"), ValueError, '"nope"` is not supported'),
        (lambda: model.resize_position_embeddings(128), NotImplementedError, "`resize_position_embeddings`"),
        (lambda: model.gradient_checkpointing_enable({"use_reentrant": True}), ValueError, "use_reentrant=False"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            attempt()
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match="FlashAttention2"):
            model.set_attn_implementation("flash_attention_2")
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        Head.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa" and model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_change_logits(model: Head, forward_inputs: Inputs, side: str) -> None:
    source, target = forward_inputs["input_ids"], forward_inputs["decoder_input_ids"]

    def padded(ids: Tensor) -> Tensor:
        """To 12 columns, which is more than any sequence needs."""
        rows = [row[row != PAD] for row in ids]
        pads = [(0, 12 - len(row)) if side == "right" else (12 - len(row), 0) for row in rows]
        return torch.stack([nn.functional.pad(row, pad, value=PAD) for row, pad in zip(rows, pads, strict=True)])

    sources, targets = padded(source), padded(target)
    logits = model(
        input_ids=sources,
        attention_mask=(sources != PAD).long(),
        decoder_input_ids=targets,
        decoder_attention_mask=(targets != PAD).long(),
    ).logits
    for row in range(4):
        alone = model(
            input_ids=source[row : row + 1, source[row] != PAD],
            decoder_input_ids=target[row : row + 1, target[row] != PAD],
        ).logits
        torch.testing.assert_close(logits[row, targets[row] != PAD], alone[0], **CLOSE)


# --- training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("frozen_embeddings", [False, True])
def test_activation_checkpointing_gives_the_same_step(
    model: Head, train_step: TrainStep, frozen_embeddings: bool
) -> None:
    """By the name that is deprecated but that adapters still use; with input gradients as they ask for them."""
    embedding = model.get_input_embeddings().requires_grad_(not frozen_embeddings)
    expected = train_step(model)
    if frozen_embeddings:
        assert not embedding(torch.tensor([5])).requires_grad
        model.enable_input_require_grads()
        assert embedding(torch.tensor([5])).requires_grad
    model.gradient_checkpointing_enable()
    calls: list[nn.Module] = []
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda module, _: calls.append(module))
    torch.testing.assert_close(train_step(model), expected, **CLOSE)
    assert len(calls) == 2 * len(layers), "forward and recomputation"

    model.gradient_checkpointing_disable()
    calls.clear()
    train_step(model)
    assert len(calls) == len(layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: Head, batch: Inputs, train_step: TrainStep, dtype: torch.dtype) -> None:
    expected = model(**batch).loss
    model.half() if dtype == torch.float16 else model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(**batch)
    assert output.logits.dtype == dtype and output.logits.isfinite().all()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.03, atol=0.0)
    assert all(value.isfinite().all() for value in train_step(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_of_half_precision_computes_in_the_dtype_of_the_config(
    model: Head, batch: Inputs, dtype: torch.dtype
) -> None:
    assert model.config.router_dtype == "float32"
    calls: list[tuple[nn.Module, Tensor]] = []
    for name, module in model.to(dtype).named_modules():
        if name.endswith("router"):
            module.register_forward_hook(lambda module, args, _: calls.append((module, args[0])))
    output = model(**batch, output_router_logits=True)
    for logits, (router, hidden_states) in zip(
        output.encoder_router_logits + output.decoder_router_logits, calls, strict=True
    ):
        assert hidden_states.dtype == router.weight.dtype == dtype
        assert torch.equal(logits, nn.functional.linear(hidden_states.float(), router.weight.float()))


FROZEN = {
    "encoder": r"^model\.encoder\.",
    "experts": r"\.experts\.",
    "router": r"\.router\.",
    "embeddings": r"^model\.shared\.",
    "all but embeddings": r"^(?!model\.shared\.)",
}


@pytest.mark.parametrize("part", FROZEN)
def test_frozen_parts_change_no_other_gradient(model: Head, train_step: TrainStep, part: str) -> None:
    expected = train_step(model)
    frozen = [name for name, _ in model.named_parameters() if re.search(FROZEN[part], name)]
    if not frozen:
        pytest.skip("a dense model has neither experts nor routers")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    actual = train_step(model)
    assert all(model.get_parameter(name).grad is None for name in frozen)
    assert actual.keys() == expected.keys() - set(frozen)
    assert all(gradient is not None for gradient in actual.values())
    torch.testing.assert_close(actual, {name: expected[name] for name in actual}, **CLOSE)


def test_evaluation_is_deterministic_and_training_is_not(config: ZCodeM3Config, batch: Inputs) -> None:
    config.dropout = config.attention_dropout = config.activation_dropout = 0.1
    model = Head(config)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**batch).logits

    assert torch.equal(run(0), run(0))
    assert (run(0) - run(1)).abs().max() > 0.01
    model.eval()
    assert torch.equal(run(0), run(1))


# --- what other libraries ask of a model


def test_parts_and_sizes(model: Head, config: ZCodeM3Config) -> None:
    for module in (model, model.model):
        assert module.get_encoder() is model.model.encoder
        assert module.get_decoder() is model.model.decoder
        assert module.base_model is model.model
    assert config.get_text_config() is model.config
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.get_text_config(encoder=True).num_hidden_layers == 4

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, embedding = sum(sizes.values()), 96 * 32
    assert model.num_parameters() == total
    assert model.num_parameters(exclude_embeddings=True) == total - embedding
    assert model.get_memory_footprint(return_buffers=False) == 4 * total
    model.get_input_embeddings().requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == total - embedding
    assert model.to(torch.float64).dtype == torch.float64 and model.device.type == "cpu"


def test_exported_model_runs_other_shapes(short_model: Head, forward_inputs: Inputs) -> None:
    short_model.config.use_cache = False
    any_shape = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in forward_inputs}
    exported = torch.export.export(short_model, (), kwargs=forward_inputs, dynamic_shapes=any_shape).module()
    generator = torch.Generator().manual_seed(2)
    other = {
        "input_ids": torch.randint(4, 96, (3, 11), generator=generator),
        "attention_mask": (torch.arange(11) >= torch.tensor([[0], [5], [2]])).long(),
        "decoder_input_ids": torch.randint(4, 96, (3, 8), generator=generator),
    }
    for inputs in (forward_inputs, other):
        torch.testing.assert_close(exported(**inputs).logits, short_model(**inputs).logits, **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
def test_evaluation_compiles_without_a_graph_break(short_model: Head, forward_inputs: Inputs) -> None:
    short_model.config.use_cache = False
    compiled = torch.compile(short_model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**forward_inputs).logits, short_model(**forward_inputs).logits, **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_training_step_compiles_without_a_graph_break(short_model: Head, train_step: TrainStep) -> None:
    expected = train_step(short_model)
    compiled = torch.compile(short_model, backend="eager", fullgraph=True)
    torch.testing.assert_close(train_step(short_model, call=compiled), expected, **CLOSE)
