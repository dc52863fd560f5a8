"""The whole model: against M2M100 where it is dense, against itself where two ways must give the same numbers."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import M2M100Config, M2M100ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.utils.logging import warning_once

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Model
from hf_moe_ted.models.configuration_zcode_m3 import ZCodeM3Config
from hf_moe_ted.models.positions import ZCodeM3SinusoidalPositionalEmbedding, tokens_of
from hf_moe_ted.models.router import Routing
from hf_moe_ted.testing import tiny_config

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PAD, START, NUM_EXPERTS, VOCAB, MAX_POSITIONS = 1, 2, 4, 96, 64
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
Batch = dict[str, Tensor]


def _model(seed: int = 0, **overrides: Any) -> ZCodeM3ForConditionalGeneration:
    """In evaluation mode, with weights large enough for a wrong one to show in the logits."""
    torch.manual_seed(seed)
    return ZCodeM3ForConditionalGeneration(tiny_config(**{"init_std": 0.2, **overrides})).eval()


def _generator_model(**overrides: Any) -> ZCodeM3ForConditionalGeneration:
    """With an untied head and large weights in the layers: its outputs are not one token repeated."""
    return _model(init_std=1.0, tie_word_embeddings=False, scale_embedding=False, **overrides)


def _ids(lengths: list[int], side: str = "right", seed: int = 0, padding: int = PAD) -> Tensor:
    """Random tokens int64[len(lengths), max(lengths)]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        if side == "right":
            row[length:] = padding
        else:
            row[: row.shape[0] - length] = padding
    return ids


def _mask(ids: Tensor) -> Tensor:
    return (ids != PAD).long()


def _batch(source: list[int] | None = None, target: list[int] | None = None, side: str = "right") -> Batch:
    input_ids = _ids(source or [9, 4, 7], side)
    labels = _ids(target or [5, 8, 3], seed=1, padding=-100)
    return {"input_ids": input_ids, "attention_mask": _mask(input_ids), "labels": labels}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _train_step(model: ZCodeM3ForConditionalGeneration, *batches: Batch, **kwargs: Any) -> tuple[Tensor, dict]:
    """Sum of the losses of all batches, and the gradients of every parameter."""
    model.train().zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**batch, **kwargs).loss
        loss.backward()
        total += loss.detach()
    return total, _gradients(model)


def _assert_same_step(actual: tuple[Tensor, dict], expected: tuple[Tensor, dict]) -> None:
    torch.testing.assert_close(actual[0], expected[0], **CLOSE)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)


# --- every expert on every token


def _dense_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    output = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        weight_T1 = (top_k_weights * (top_k_index == expert)).sum(dim=1, keepdim=True)
        inner = (hidden_states @ self.up_proj[expert].T + self.up_proj_bias[expert]).clamp(min=0)
        output = output + weight_T1 * (inner @ self.down_proj[expert].T + self.down_proj_bias[expert])
    return output


@pytest.fixture
def dense_experts() -> Iterator[None]:
    ALL_EXPERTS_FUNCTIONS["dense_reference"] = _dense_experts
    yield
    del ALL_EXPERTS_FUNCTIONS["dense_reference"]


@pytest.mark.usefixtures("dense_experts")
@pytest.mark.parametrize(
    "overrides",
    [
        {"capacity_factor": None},
        {"capacity_factor": None, "num_experts_per_tok": 2, "normalize_router_weights": "before_dropping"},
        {"capacity_factor": 0.6, "min_capacity": 0},
        {
            "capacity_factor": 0.6,
            "min_capacity": 0,
            "num_experts_per_tok": 2,
            "normalize_router_weights": "after_dropping",
            "token_drop_policy": "position",
        },
        {
            "capacity_factor": 0.6,
            "min_capacity": 0,
            "num_experts_per_tok": 3,
            "normalize_router_weights": "after_dropping",
            "token_drop_policy": "probability",
        },
        {"capacity_factor": None, "use_residual": True, "num_experts": [2, 4, 8], "position_embedding_type": "learned"},
    ],
    ids=["top1", "top2", "top1-random-drops", "top2-position-drops", "top3-probability-drops", "pr-moe"],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_experts_implementations_agree_on_logits_loss_and_every_gradient(overrides: dict, side: str) -> None:
    model = _model(router_aux_loss_coef=0.5, router_z_loss_coef=0.1, **overrides)
    batch = _batch(side=side)

    def run(implementation: str) -> tuple[Tensor, tuple[Tensor, dict]]:
        model.set_experts_implementation(implementation)
        torch.manual_seed(7)
        logits = model.train()(**batch).logits.detach()
        torch.manual_seed(7)
        return logits, _train_step(model, batch)

    expected_logits, expected_step = run("dense_reference")
    for implementation in IMPLEMENTATIONS:
        logits, step = run(implementation)
        torch.testing.assert_close(logits, expected_logits, **CLOSE)
        _assert_same_step(step, expected_step)

    torch.manual_seed(7)
    routings = model(**batch, output_routings=True)
    dropped = max(float(r.dropped_share()) for r in routings.encoder_routings + routings.decoder_routings)
    assert (dropped > 0.1) == (overrides["capacity_factor"] is not None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_parameter_has_a_gradient_and_every_used_expert_a_nonzero_one(implementation: str) -> None:
    model = _model(capacity_factor=None)
    model.set_experts_implementation(implementation)
    batch = _batch(source=[3, 2], target=[2, 2])  # fewer tokens than needed to reach all experts
    _, gradients = _train_step(model, batch)
    output = model(**batch, output_routings=True)
    num_unused = 0
    for side, layers, routings in (
        ("encoder", (1, 3), output.encoder_routings),
        ("decoder", (1,), output.decoder_routings),
    ):
        for layer, routing in zip(layers, routings, strict=True):
            used = (routing.num_tokens_per_expert() > 0).tolist()
            num_unused += used.count(False)
            for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias"):
                gradient = gradients[f"model.{side}.layers.{layer}.ffn.experts.{name}"]
                assert (gradient.flatten(1).abs().amax(dim=1) > 0).tolist() == used
    assert num_unused > 0


# --- M2M100


def _m2m100_of(model: ZCodeM3ForConditionalGeneration) -> M2M100ForConditionalGeneration:
    """M2M100 with the weights of a dense model."""
    same = ["vocab_size", "max_position_embeddings", "d_model", "activation_function", "scale_embedding"]
    same += ["bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"]
    for side in ("encoder", "decoder"):
        same += [f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim"]
    config = M2M100Config(
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        **{name: getattr(model.config, name) for name in same},
    )
    reference = M2M100ForConditionalGeneration(config)
    reference.load_state_dict({name.replace(".ffn.", "."): value for name, value in model.state_dict().items()})
    return reference.eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("overrides", [{}, {"scale_embedding": False, "activation_function": "gelu"}])
def test_dense_model_equals_m2m100(overrides: dict, side: str) -> None:
    model = _model(encoder_sparse_step=0, decoder_sparse_step=0, **overrides)
    reference = _m2m100_of(model)
    batch = _batch(side=side)
    real = batch["labels"] != -100

    torch.testing.assert_close(model(**batch).logits[real], reference(**batch).logits[real], **CLOSE)
    step = _train_step(model, batch)
    reference.train()(**batch).loss.backward()
    expected_gradients = _gradients(reference)
    assert len(expected_gradients) == len(step[1])
    for name, gradient in step[1].items():
        torch.testing.assert_close(gradient, expected_gradients[name.replace(".ffn.", ".")], **CLOSE)


@pytest.mark.parametrize("pad_token_id", [0, 1, 5])
def test_sinusoidal_positions_equal_m2m100(pad_token_id: int) -> None:
    config = tiny_config(pad_token_id=pad_token_id)
    model = ZCodeM3Model(config)
    positions = model.encoder.embed_positions
    expected = M2M100SinusoidalPositionalEmbedding(MAX_POSITIONS + pad_token_id, config.d_model, pad_token_id)
    num_rows = positions.weights.shape[0]
    assert num_rows == MAX_POSITIONS + pad_token_id + 1, "one row per position after the row of the padding"
    torch.testing.assert_close(positions.weights, expected.weights[:num_rows], atol=1e-6, rtol=0.0)
    assert torch.equal(positions.weights, model.decoder.embed_positions.weights)

    for side in ("right", "left"):
        ids = _ids([5, 9, 2], side)
        ids[ids == PAD] = pad_token_id
        for num_past in (0, 7):
            tokens = tokens_of(config, ids, torch.empty(*ids.shape, config.d_model), None, num_past)
            torch.testing.assert_close(
                positions(tokens.positions),
                expected(ids, None, num_past),
                atol=1e-6,
                rtol=0.0,
            )


def _without_initialization(config: ZCodeM3Config) -> ZCodeM3ForConditionalGeneration:
    with no_init_weights():
        return ZCodeM3ForConditionalGeneration(config)


def _moved_from_meta(config: ZCodeM3Config) -> ZCodeM3ForConditionalGeneration:
    with torch.device("meta"):
        return ZCodeM3ForConditionalGeneration(config).to_empty(device="cpu")


def _on_meta(config: ZCodeM3Config) -> ZCodeM3ForConditionalGeneration:
    with torch.device("meta"):
        return ZCodeM3ForConditionalGeneration(config)


def _empty(config: ZCodeM3Config) -> ZCodeM3ForConditionalGeneration:
    with init_empty_weights():
        return ZCodeM3ForConditionalGeneration(config)


def _there_and_back(config: ZCodeM3Config) -> ZCodeM3ForConditionalGeneration:
    return ZCodeM3ForConditionalGeneration(config).half().float()


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("make", [_without_initialization, _moved_from_meta, _on_meta, _empty, _there_and_back])
def test_tables_that_no_checkpoint_holds_are_there(make: Any, moved: bool) -> None:
    """Sinusoids and expert maps; memory that nobody wrote to is made visible."""
    config = tiny_config(init_std=0.2, num_experts=[2, 4, 4], expert_map=[[0, 1, 1, 0], [0, 1, 2, 3], [3, 4, 1, 0, 2]])
    expected = ZCodeM3ForConditionalGeneration(config).eval()
    garbage = [torch.full(shape, float("nan")) for shape in ((66, 32), (66, 32), (4,), (5,))]
    del garbage
    model = make(config).eval()
    model.load_state_dict(expected.state_dict(), assign=model.device.type == "meta")
    model.tie_weights()
    if moved:  # all weights are there, so that the model can go to a device
        model.to("cpu")
    inputs = {"input_ids": _ids([9, 4]), "decoder_input_ids": _ids([5, 5])}
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


def test_sinusoidal_positions_by_hand() -> None:
    overrides = {"d_model": 4, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    table = ZCodeM3SinusoidalPositionalEmbedding(tiny_config(max_position_embeddings=2, **overrides)).table()
    sines = [[math.sin(row), math.sin(row / 10000), math.cos(row), math.cos(row / 10000)] for row in range(4)]
    sines[PAD] = [0.0] * 4
    torch.testing.assert_close(table, torch.tensor(sines))


# --- padding and batches


EVALUATED_ALIKE = [
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 2},
    {"num_experts_per_tok": 3, "token_drop_policy": "probability", "normalize_router_weights": "after_dropping"},
    {"use_residual": True, "num_experts": [2, 4, 8], "moe_token_dropout": 0.2},
    {"position_embedding_type": "learned"},
    {"position_embedding_type": "tupe"},
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("overrides", EVALUATED_ALIKE, ids=lambda overrides: "-".join(overrides))
def test_a_sentence_alone_equals_the_sentence_in_a_batch(side: str, overrides: dict) -> None:
    """Evaluation drops no token and looks at no padding, so logits do not depend on the batch."""
    model = _model(**overrides)
    source_lengths, target_lengths = [9, 4, 7], [3, 8, 5]
    source, target = _ids(source_lengths, side), _ids(target_lengths, side, seed=1)
    logits = model(
        input_ids=source, attention_mask=_mask(source), decoder_input_ids=target, decoder_attention_mask=_mask(target)
    ).logits
    for row in range(3):
        alone = model(
            input_ids=source[row : row + 1, source[row] != PAD],
            decoder_input_ids=target[row : row + 1, target[row] != PAD],
        ).logits
        torch.testing.assert_close(logits[row, target[row] != PAD], alone[0], **CLOSE)


def test_learned_positions() -> None:
    model = _model(position_embedding_type="learned")
    table = model.model.encoder.embed_positions.weight
    assert table.shape == (MAX_POSITIONS + PAD + 1, 32)
    assert not table[PAD].any() and table[PAD + 1 :].std() > 0.1
    _, gradients = _train_step(model, _batch([9], [5]))
    gradient = gradients["model.encoder.embed_positions.weight"]
    assert gradient.any(dim=1).nonzero().flatten().tolist() == list(range(PAD + 1, PAD + 10))


def test_untied_positions_by_hand() -> None:
    """TUPE, equation 10: content and position scores, each over sqrt(2 d), in a decoder with one past token."""
    model = _model(position_embedding_type="tupe", decoder_attention_heads=1)
    decoder = model.model.decoder
    untied, attention = decoder.embed_positions, decoder.layers[0].self_attn
    content = torch.randn(1, 3, 32)
    positions = untied.layer_norm(untied.embedding(torch.tensor([1, 2, 3])))

    content_scores = attention.q_proj(content[0]) @ attention.k_proj(content[0]).T
    position_scores = untied.q_proj(positions) @ untied.k_proj(positions).T
    scores = (content_scores + position_scores) / math.sqrt(2 * 32)
    scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    expected = attention.out_proj(scores.softmax(dim=-1) @ attention.v_proj(content[0]))

    tokens = tokens_of(model.config, None, content, None)
    mask = untied.add_to_mask(None, tokens, is_causal=True)
    torch.testing.assert_close(attention(content, mask)[0][0], expected, **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_untied_positions_with_eager_attention_equal_sdpa(side: str) -> None:
    model, batch = _model(position_embedding_type="tupe", capacity_factor=None), _batch(side=side)
    loss, gradients = _train_step(model, batch)
    model.set_attn_implementation("eager")
    eager_loss, eager_gradients = _train_step(model, batch)
    torch.testing.assert_close(eager_loss, loss, **CLOSE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(eager_gradients[name], gradient, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert gradients["model.encoder.embed_positions.q_proj.weight"].any()


def test_untied_positions_matter() -> None:
    """Without them the encoder would not see the order of its tokens."""
    model = _model(position_embedding_type="tupe")
    ids = _ids([6])
    encode = model.model.encoder
    assert not torch.allclose(encode(ids.flip(1)).last_hidden_state.flip(1), encode(ids).last_hidden_state, atol=1e-2)


def test_untied_positions_refuse_attention_that_takes_no_bias() -> None:
    model = _model(position_embedding_type="tupe")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"'tupe'.*'flex_attention'.*'sdpa'"):
        model(**_batch())


@pytest.mark.parametrize("side", ["right", "left"])
def test_more_padding_changes_no_loss_and_no_gradient(side: str) -> None:
    model = _model(router_aux_loss_coef=0.5, router_z_loss_coef=0.1, capacity_factor=0.8, token_drop_policy="position")
    batch = _batch(side=side)
    # one column, so that the last label of the longest sentence, too, is an input of the decoder
    batch["labels"] = nn.functional.pad(batch["labels"], (0, 1), value=-100)
    pad = (0, 5) if side == "right" else (5, 0)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], pad, value=PAD),
        "attention_mask": nn.functional.pad(batch["attention_mask"], pad),
        "labels": nn.functional.pad(batch["labels"], (0, 6), value=-100),
    }
    expected = _train_step(model, batch)
    actual = _train_step(model, longer)
    assert all(gradient.isfinite().all() for gradient in actual[1].values())
    _assert_same_step(actual, expected)


def test_padding_is_sent_to_no_expert_unless_asked() -> None:
    batch = _batch()
    real_source, real_target = batch["attention_mask"].bool(), batch["labels"] != -100
    # the decoder's inputs are the labels moved right: one more token is real, but for the longest sentence
    real_target = torch.cat([torch.ones(3, 1, dtype=torch.bool), real_target[:, :-1]], dim=1)
    output = _model()(**batch, output_routings=True)
    for routings, real in ((output.encoder_routings, real_source), (output.decoder_routings, real_target)):
        for routing in routings:
            assert torch.equal(routing.token_mask, real.flatten())
            assert torch.equal(routing.expert_ids[:, 0] < NUM_EXPERTS, real.flatten())
            assert torch.equal(routing.weights[:, 0] > 0, real.flatten())

    output = _model(router_ignore_padding_tokens=False)(**batch, output_routings=True)
    for routing in output.encoder_routings + output.decoder_routings:
        assert routing.token_mask is None
        assert (routing.expert_ids < NUM_EXPERTS).all()


def test_padding_counts_in_router_losses_only_if_it_is_routed() -> None:
    batch = _batch(source=[12, 2, 2])
    ignored, counted = (
        _model(router_ignore_padding_tokens=ignore)(**batch, output_router_logits=True) for ignore in (True, False)
    )
    for output, mask in ((ignored, batch["attention_mask"].bool().flatten()), (counted, torch.ones(36).bool())):
        aux, z = _router_losses(output.encoder_router_logits, mask)
        torch.testing.assert_close(output.encoder_aux_loss, aux)
        torch.testing.assert_close(output.encoder_z_loss, z)
    assert (ignored.encoder_z_loss - counted.encoder_z_loss).abs() > 1e-3


def test_padding_ids_are_padding_without_a_mask() -> None:
    batch = _batch()
    del batch["attention_mask"]
    for routing in _model()(**batch, output_routings=True).encoder_routings:
        assert torch.equal(routing.token_mask, (batch["input_ids"] != PAD).flatten())


def test_evaluation_is_not_changed_by_training() -> None:
    model = _model(capacity_factor=0.5, router_noise_policy="jitter", router_jitter_noise=0.3)
    batch = _batch()
    expected = model(**batch).logits
    assert (model.train()(**batch).logits - expected).abs().max() > 1e-2, "capacity and noise are at work in training"
    torch.testing.assert_close(model.eval()(**batch).logits, expected, **CLOSE)


# --- layers


def test_number_of_experts_per_layer() -> None:
    model = _model(num_experts=[2, 3, 8, 5], decoder_sparse_layers=[0, 1], encoder_sparse_layers=[0, 3])
    experts = {
        name: (module.num_experts, tuple(module.up_proj.shape))
        for name, module in model.named_modules()
        if name.endswith("experts")
    }
    assert experts == {
        "model.encoder.layers.0.ffn.experts": (2, (2, 64, 32)),
        "model.encoder.layers.3.ffn.experts": (3, (3, 64, 32)),
        "model.decoder.layers.0.ffn.experts": (8, (8, 64, 32)),
        "model.decoder.layers.1.ffn.experts": (5, (5, 64, 32)),
    }
    output = model.train()(**_batch(), output_router_logits=True)
    assert [logits.shape[1] for logits in output.encoder_router_logits] == [2, 3]
    assert [logits.shape[1] for logits in output.decoder_router_logits] == [8, 5]
    output.loss.backward()
    _gradients(model)


@pytest.mark.parametrize(
    ("overrides", "sparse"),
    [
        ({}, ["encoder.1", "encoder.3", "decoder.1"]),
        ({"encoder_sparse_step": 0}, ["decoder.1"]),
        ({"encoder_sparse_step": 3, "decoder_sparse_step": 1}, ["encoder.2", "decoder.0", "decoder.1"]),
        ({"encoder_sparse_layers": [0], "decoder_sparse_layers": []}, ["encoder.0"]),
    ],
)
def test_which_layers_are_sparse(overrides: dict, sparse: list[str]) -> None:
    model = _model(**overrides)
    found = [name for name, _ in model.named_modules() if name.endswith("ffn.router")]
    assert found == [f"model.{layer.replace('.', '.layers.')}.ffn.router" for layer in sparse]


@pytest.mark.parametrize(
    "overrides", [{"encoder_sparse_step": 0, "decoder_sparse_step": 0, "num_experts": 0}, {}], ids=["dense", "sparse"]
)
def test_model_learns_a_batch(overrides: dict) -> None:
    model = _model(init_std=0.02, **overrides).train()
    batch = _batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model.eval()(**batch).loss.item()
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert first > 4.0
    assert model.eval()(**batch).loss.item() < 0.5


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_acts_in_training_only(field: str) -> None:
    batch = _batch()
    for implementation in ("eager", "sdpa"):
        model = _model(capacity_factor=None, attn_implementation=implementation)
        dropping = _model(capacity_factor=None, attn_implementation=implementation, **{field: 0.5})
        expected = model(**batch).logits
        torch.testing.assert_close(dropping(**batch).logits, expected, **CLOSE)
        torch.testing.assert_close(model.train()(**batch).logits, expected, **CLOSE)
        assert (dropping.train()(**batch).logits - expected).abs().max() > 1e-2


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(tiny_config(init_std=0.05, router_bias=True))
    assert model.model.shared.weight[PAD].count_nonzero() == 0
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert parameter.count_nonzero() == 0, name
        elif "layer_norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < parameter.std() < 0.06, name
            assert parameter.mean().abs() < 0.02, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_model_gives_the_same_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _model(router_bias=True, num_experts=[2, 3, 4]).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.model.decoder.embed_positions.weights, model.model.decoder.embed_positions.weights)
    batch = _batch()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


# --- loss


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the labels that count, one by one."""
    losses = []
    for row, label in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        if label != -100:
            log_probs = row - row.exp().sum().log()
            losses.append(-(1 - smoothing) * log_probs[label] - smoothing * log_probs.mean())
    return torch.stack(losses).mean()


def _router_losses(router_logits: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Switch Transformers' balance loss and the z-loss, means over layers, of the tokens in the mask."""
    aux, z = [], []
    for logits in router_logits:
        probs = logits[mask].softmax(dim=-1)
        share = torch.stack([(probs.argmax(dim=-1) == expert).float().mean() for expert in range(NUM_EXPERTS)])
        aux.append(NUM_EXPERTS * (probs.mean(dim=0) * share).sum())
        z.append((logits[mask].exp().sum(dim=-1).log() ** 2).mean())
    return torch.stack(aux).mean(), torch.stack(z).mean()


def test_evaluation_loss_is_the_plain_cross_entropy() -> None:
    batch = _batch()
    output = _model(label_smoothing=0.3, router_aux_loss_coef=7.0, router_z_loss_coef=5.0)(**batch)
    torch.testing.assert_close(output.loss, _cross_entropy(output.logits, batch["labels"]))
    assert output.encoder_aux_loss is output.decoder_z_loss is output.encoder_router_logits is None


def test_label_smoothing_in_training_only() -> None:
    batch = _batch()
    overrides = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "capacity_factor": None}
    model = _model(label_smoothing=0.3, **overrides)
    logits = model(**batch).logits
    smooth, plain = _cross_entropy(logits, batch["labels"], smoothing=0.3), _cross_entropy(logits, batch["labels"])
    assert (smooth - plain).abs() > 0.1
    torch.testing.assert_close(model.train()(**batch).loss, smooth)
    torch.testing.assert_close(model.eval()(**batch).loss, plain)


def test_warns_of_a_loss_without_router_losses(caplog: pytest.LogCaptureFixture) -> None:
    """The Trainer's `label_smoothing_factor` computes the loss from the logits, without labels in the model."""
    batch = _batch()
    model = _model()
    inputs = {
        **batch,
        "labels": None,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"]),
    }
    warning_once.cache_clear()
    model.eval()(**inputs)
    model.train()(**inputs, output_router_logits=True)
    assert "config.label_smoothing" not in caplog.text
    model(**inputs)
    assert "config.label_smoothing" in caplog.text


@pytest.mark.parametrize("num_items", [None, 37, torch.tensor(37)])
def test_training_loss_is_cross_entropy_and_weighted_router_losses(num_items: Any) -> None:
    """16 labels here: of 37 in the whole step, their share of every part is 16 / 37."""
    batch = _batch()
    model = _model(router_aux_loss_coef=0.5, router_z_loss_coef=0.25, capacity_factor=None).train()
    output = model(**batch, output_router_logits=True, num_items_in_batch=num_items)
    source_mask = batch["attention_mask"].bool().flatten()
    target_mask = torch.cat([torch.ones(3, 1).bool(), (batch["labels"] != -100)[:, :-1]], dim=1).flatten()
    parts = {}
    parts["encoder_aux_loss"], parts["encoder_z_loss"] = _router_losses(output.encoder_router_logits, source_mask)
    parts["decoder_aux_loss"], parts["decoder_z_loss"] = _router_losses(output.decoder_router_logits, target_mask)
    for name, expected in parts.items():
        torch.testing.assert_close(output[name], expected)

    expected = _cross_entropy(output.logits, batch["labels"])
    expected = expected + 0.5 * (parts["encoder_aux_loss"] + parts["decoder_aux_loss"])
    expected = expected + 0.25 * (parts["encoder_z_loss"] + parts["decoder_z_loss"])
    if num_items is not None:
        expected = expected * 16 / 37
    torch.testing.assert_close(output.loss, expected)

    silent = model(**batch, num_items_in_batch=num_items)
    torch.testing.assert_close(silent.loss, expected)
    assert silent.encoder_router_logits is None, "returned only if asked for"
    assert silent.encoder_routings is None


def test_output_router_logits_adds_the_router_losses_in_evaluation() -> None:
    batch = _batch()
    overrides = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
    plain = _model(**overrides)(**batch)
    for model, kwargs in (
        (_model(**overrides), {"output_router_logits": True}),
        (_model(**overrides, output_router_logits=True), {}),
    ):
        output = model(**batch, **kwargs)
        aux, z = output.encoder_aux_loss + output.decoder_aux_loss, output.encoder_z_loss + output.decoder_z_loss
        assert aux > 1.5
        assert z > 0.1
        torch.testing.assert_close(output.loss, plain.loss + 0.5 * aux + 0.25 * z)
        assert len(output.encoder_router_logits) == 2
    off = _model(**overrides, output_router_logits=True)(**batch, output_router_logits=False)
    torch.testing.assert_close(off.loss, plain.loss)
    assert off.encoder_router_logits is None


def test_router_losses_of_a_side_without_sparse_layers_are_zero() -> None:
    output = _model(encoder_sparse_step=0)(**_batch(), output_router_logits=True)
    assert output.encoder_aux_loss.item() == output.encoder_z_loss.item() == 0.0
    assert output.decoder_aux_loss > 0.5


def test_gradient_accumulation_equals_one_step() -> None:
    """32 sentences of different lengths in one step, or in four of 8 with `num_items_in_batch`."""
    source = torch.randint(2, 15, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    target = torch.randint(1, 13, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    batch = _batch(source, target)
    parts = [{name: value[i : i + 8] for name, value in batch.items()} for i in range(0, 32, 8)]
    model = _model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, capacity_factor=None)

    expected = _train_step(model, batch)
    _assert_same_step(_train_step(model, batch, num_items_in_batch=sum(target)), expected)
    _assert_same_step(_train_step(model, *parts, num_items_in_batch=sum(target)), expected)
    mean_of_means = _train_step(model, *parts)[0] / 4
    assert (mean_of_means - expected[0]).abs() > 1e-3, "equal lengths would hide a wrong denominator"


def test_gradient_accumulation_equals_one_step_with_router_losses() -> None:
    """With router losses the same holds for four copies of the same 8 sentences.

    Not for different ones: the balance loss is a product of two means over the batch (probabilities and shares), hence
    not linear in the batch, so the balance of 32 sentences is not the mean of the balances of 4 x 8.
    """
    source, target = [9, 4, 7, 2, 11, 6, 5, 8], [5, 8, 3, 9, 2, 7, 4, 6]
    part = _batch(source, target)
    batch = {name: value.repeat(4, 1) for name, value in part.items()}
    model = _model(router_aux_loss_coef=0.5, router_z_loss_coef=0.1, capacity_factor=None)
    expected = _train_step(model, batch)
    _assert_same_step(_train_step(model, part, part, part, part, num_items_in_batch=4 * sum(target)), expected)


def test_labels_make_the_decoder_inputs() -> None:
    model = _model()
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    shifted = torch.tensor([[START, 5, 6], [START, 8, PAD]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), shifted)
    source = _ids([4, 4])
    expected = model(input_ids=source, labels=labels)
    actual = model(input_ids=source, labels=labels, decoder_input_ids=shifted)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert torch.equal(actual.logits, expected.logits)


# --- errors


def test_labels_that_are_all_ignored() -> None:
    for model in (_model(), _model().train()):
        with pytest.raises(ValueError, match=r"labels of shape \(2, 3\) are all -100"):
            model(input_ids=_ids([4, 4]), labels=torch.full((2, 3), -100))


def test_batch_without_labels_among_others_has_no_loss() -> None:
    """In a step of several batches one may have no label that counts: its share is 0."""
    model = _model().train()
    loss = model(input_ids=_ids([4, 4]), labels=torch.full((2, 3), -100), num_items_in_batch=8).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in _gradients(model).values())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batch(shape: tuple[int, int]) -> None:
    model, empty, ids = _model(), torch.zeros(shape, dtype=torch.int64), _ids([4, 4, 4])
    for inputs in (
        {"input_ids": empty, "decoder_input_ids": ids},
        {"input_ids": ids, "decoder_input_ids": empty},
        {"inputs_embeds": torch.zeros(*shape, 32), "decoder_input_ids": ids},
    ):
        with pytest.raises(ValueError, match=rf"batch is empty.*\({shape[0]}, {shape[1]}\)"):
            model(**inputs)


def test_both_or_neither_of_ids_and_embeddings() -> None:
    model, ids = _model(), _ids([4])
    embeddings = model.get_input_embeddings()(ids)
    for inputs in (
        {"decoder_input_ids": ids},
        {"input_ids": ids},
        {"input_ids": ids, "inputs_embeds": embeddings, "decoder_input_ids": ids},
        {"input_ids": ids, "decoder_input_ids": ids, "decoder_inputs_embeds": embeddings},
    ):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_sequence_longer_than_the_positions() -> None:
    model = _model()
    longest, too_long, short = _ids([MAX_POSITIONS]), _ids([MAX_POSITIONS + 1]), _ids([4])
    assert model(input_ids=longest, decoder_input_ids=longest).logits.isfinite().all()
    message = r"sequence of 65 tokens is longer than max_position_embeddings \(64\)"
    for inputs in (
        {"input_ids": too_long, "decoder_input_ids": short},
        {"input_ids": short, "decoder_input_ids": too_long},
        {"inputs_embeds": torch.zeros(1, 65, 32), "decoder_input_ids": short},
        {"input_ids": short, "labels": too_long},
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "learned", "tupe"])
def test_padding_takes_no_position(position_embedding_type: str, side: str) -> None:
    """`pad_to_multiple_of` may pad beyond the positions, on both sides of the model."""
    model = _model(
        tie_word_embeddings=False, max_position_embeddings=20, position_embedding_type=position_embedding_type
    )
    source, target = _ids([18, 19], side), _ids([19, 17], seed=1, padding=-100)
    padding = ((0, 6) if side == "right" else (6, 0), (0, 5))
    padded = {
        "input_ids": nn.functional.pad(source, padding[0], value=PAD),
        "labels": nn.functional.pad(target, padding[1], value=-100),
    }
    padded["attention_mask"] = _mask(padded["input_ids"])
    short = {"input_ids": source, "labels": target, "attention_mask": _mask(source)}
    expected, actual = model(**short), model(**padded)
    torch.testing.assert_close(actual.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(actual.logits[:, :19], expected.logits, **CLOSE)
    for inputs in (short, padded):
        del inputs["labels"]
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 2}
    assert torch.equal(model.generate(**padded, **options), model.generate(**short, **options))

    prompt = _ids([6, 3], "left", seed=2)
    longer = nn.functional.pad(prompt, (12, 0), value=PAD)
    prompts = [{"decoder_input_ids": ids, "decoder_attention_mask": _mask(ids)} for ids in (prompt, longer)]
    ends = [model.generate(**short, **inputs, **options)[:, -8:] for inputs in prompts]
    assert torch.equal(*ends), "18 of prompt and padding, and 8 new ones: 26 of 20 positions, but 14 tokens"


def test_sequence_that_outgrows_the_positions_in_the_cache() -> None:
    model = _model()
    short = _ids([4])
    cache = model(input_ids=short, decoder_input_ids=_ids([MAX_POSITIONS - 1]), use_cache=True).past_key_values
    token = torch.tensor([[5]])
    assert model(input_ids=short, decoder_input_ids=token, past_key_values=cache).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"sequence of 65 tokens is longer than max_position_embeddings \(64\)"):
        model(input_ids=short, decoder_input_ids=token, past_key_values=cache)
    with pytest.raises(ValueError, match=r"sequence of 65 tokens .*max_new_tokens"):
        model.generate(short, max_new_tokens=70, min_new_tokens=70)


# --- attention and outputs


@pytest.mark.parametrize("side", ["right", "left"])
def test_eager_attention_equals_sdpa(side: str) -> None:
    batch = _batch(side=side)
    target = _ids([5, 8, 3], side, seed=1)
    inputs = {**batch, "decoder_input_ids": target, "decoder_attention_mask": _mask(target)}
    real = target != PAD
    eager, sdpa = (_model(attn_implementation=name, capacity_factor=None) for name in ("eager", "sdpa"))
    assert [eager.config._attn_implementation, sdpa.config._attn_implementation] == ["eager", "sdpa"]
    torch.testing.assert_close(eager(**inputs).logits[real], sdpa(**inputs).logits[real], **CLOSE)
    _assert_same_step(_train_step(eager, batch), _train_step(sdpa, batch))


def test_registered_attention_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append("causal" if module.is_causal else "bidirectional")
        return sdpa_attention_forward(module, *args, **kwargs)

    batch = _batch()
    expected = _model()(**batch).logits
    # what `register` does, and undone afterwards
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "counting", counting)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "counting", sdpa_mask)
    actual = _model(attn_implementation="counting")(**batch).logits
    assert calls == ["bidirectional"] * 4 + ["causal", "bidirectional"] * 2
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_the_decoder_does_not_look_ahead() -> None:
    model = _model()
    source, target = _ids([6]), _ids([8], seed=1)
    changed = target.clone()
    changed[0, 5:] = 50
    expected, actual = (model(input_ids=source, decoder_input_ids=ids).logits for ids in (target, changed))
    torch.testing.assert_close(actual[:, :5], expected[:, :5], **CLOSE)
    assert (actual[:, 5:] - expected[:, 5:]).abs().amax(dim=-1).min() > 1e-3


def test_outputs_on_request() -> None:
    model = _model(attn_implementation="eager", num_experts_per_tok=2)
    batch = _batch()
    output = model(
        **batch,
        output_attentions=True,
        output_hidden_states=True,
        output_router_logits=True,
        output_routings=True,
    )

    def shapes(tensors: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in tensors]

    assert output.logits.shape == (3, 8, VOCAB)
    assert shapes(output.encoder_attentions) == [(3, 4, 9, 9)] * 4
    assert shapes(output.decoder_attentions) == [(3, 4, 8, 8)] * 2
    assert shapes(output.cross_attentions) == [(3, 4, 8, 9)] * 2
    assert shapes(output.encoder_hidden_states) == [(3, 9, 32)] * 5
    assert shapes(output.decoder_hidden_states) == [(3, 8, 32)] * 3
    assert shapes(output.encoder_router_logits) == [(27, NUM_EXPERTS)] * 2
    assert shapes(output.decoder_router_logits) == [(24, NUM_EXPERTS)]
    assert [len(output.encoder_routings), len(output.decoder_routings)] == [2, 1]
    for routing, logits in zip(
        output.encoder_routings + output.decoder_routings,
        output.encoder_router_logits + output.decoder_router_logits,
        strict=True,
    ):
        assert isinstance(routing, Routing)
        assert torch.equal(routing.logits, logits)
        assert routing.expert_ids.shape == routing.weights.shape == routing.choices.shape == (len(logits), 2)

    for weights in output.encoder_attentions + output.decoder_attentions + output.cross_attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    padded = batch["attention_mask"] == 0
    assert output.cross_attentions[0].transpose(1, 3)[padded].abs().max() < 1e-6
    assert output.decoder_attentions[0].triu(1).count_nonzero() == 0
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    embedded = model.model.encoder.embed_tokens(batch["input_ids"])
    positions = model.model.encoder.embed_positions((~padded).cumsum(dim=1) * ~padded)
    torch.testing.assert_close(output.encoder_hidden_states[0], embedded + positions)

    silent = model(**batch)
    present = {name for name, value in silent.items() if value is not None}
    assert present == {"loss", "logits", "encoder_last_hidden_state"}


def test_return_dict_false() -> None:
    model, batch = _model(), _batch()
    for kwargs in ({}, {"output_hidden_states": True, "output_router_logits": True, "use_cache": False}):
        expected = model(**batch, **kwargs)
        actual = model(**batch, **kwargs, return_dict=False)
        assert type(actual) is tuple
        assert len(actual) == len(expected.to_tuple())
        torch.testing.assert_close(actual[0], expected.loss)
    inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": _ids([3, 3, 3])}
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    base = model.model(**inputs, return_dict=False)
    assert type(base) is tuple
    torch.testing.assert_close(base[0], model.model(**inputs).last_hidden_state)


def test_input_embeddings_equal_input_ids() -> None:
    model = _model()
    source, target = _ids([9, 4, 7]), _ids([8, 8, 8], seed=1)
    common = {"attention_mask": _mask(source)}
    expected = model(input_ids=source, decoder_input_ids=target, **common).logits
    embed = model.get_input_embeddings()
    actual = model(inputs_embeds=embed(source), decoder_inputs_embeds=embed(target), **common).logits
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_encoder_outputs_are_used_again() -> None:
    model, batch = _model(), _batch()
    full = model(**batch, output_hidden_states=True)
    encoded = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
    for encoder_outputs in (encoded, (encoded[0],), BaseModelOutput(encoded[0])):
        output = model(encoder_outputs=encoder_outputs, attention_mask=batch["attention_mask"], labels=batch["labels"])
        torch.testing.assert_close(output.logits, full.logits, **CLOSE)
        torch.testing.assert_close(output.loss, full.loss, **CLOSE)
        assert torch.equal(output.encoder_last_hidden_state, encoded[0])


# --- cache and generation


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("overrides", EVALUATED_ALIKE, ids=lambda overrides: "-".join(overrides))
def test_cache_equals_no_cache(side: str, overrides: dict) -> None:
    model = _model(**overrides)
    source, target = _ids([9, 4, 7], side), _ids([10, 10, 10], seed=1)
    inputs = {"input_ids": source, "attention_mask": _mask(source)}
    expected = model(**inputs, decoder_input_ids=target).logits
    first = model(**inputs, decoder_input_ids=target[:, :3], use_cache=True)
    cache, logits = first.past_key_values, [first.logits]
    assert type(cache) is EncoderDecoderCache
    assert type(cache.self_attention_cache) is type(cache.cross_attention_cache) is DynamicCache
    encoded = BaseModelOutput(first.encoder_last_hidden_state)
    for step in range(3, 10):
        output = model(
            encoder_outputs=encoded,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=target[:, step : step + 1],
            past_key_values=cache,
        )
        logits.append(output.logits)
    assert cache.get_seq_length() == 10
    assert cache.cross_attention_cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


def test_cache_equals_no_cache_with_left_padded_decoder_inputs() -> None:
    model = _model()
    source, target = _ids([9, 4, 7]), _ids([10, 7, 8], "left", seed=1)
    inputs = {"input_ids": source, "attention_mask": _mask(source)}
    mask = _mask(target)
    expected = model(**inputs, decoder_input_ids=target, decoder_attention_mask=mask).logits
    cache, logits = None, []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 8), (8, 10)):
        output = model(
            **inputs,
            decoder_input_ids=target[:, start:end],
            decoder_attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    real = target != PAD
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(name: str) -> None:
    """transformers 5.24 calls `cache` what was `past_key_values` before; what a call does depends on neither."""
    model = _model()
    source, target = _ids([9, 4, 7]), _ids([6, 6, 6], seed=1)
    mask = _mask(source)
    expected = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    encoded = model.get_encoder()(source, mask)
    decoder_expected = model.get_decoder()(target, encoder_hidden_states=encoded.last_hidden_state).last_hidden_state
    caches = [EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2))) for _ in range(3)]
    for step in range(6):
        token = target[:, step : step + 1]
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": token, "attention_mask": mask}
        first = model(**inputs, **{name: caches[0]})
        torch.testing.assert_close(first.logits[:, 0], expected[:, step], **CLOSE)
        assert first.past_key_values is caches[0]
        hidden = model.model(**inputs, **{name: caches[1]}).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden)[:, 0], expected[:, step], **CLOSE)
        states = encoded.last_hidden_state
        hidden = model.get_decoder()(token, encoder_hidden_states=states, **{name: caches[2]}).last_hidden_state
        torch.testing.assert_close(hidden[:, 0], decoder_expected[:, step], **CLOSE)
    assert [cache.get_seq_length() for cache in caches] == [6, 6, 6]


@torch.no_grad()
def test_two_caches_are_refused() -> None:
    model = _model()
    inputs = {"input_ids": _ids([9]), "decoder_input_ids": _ids([4])}
    cache = model(**inputs, use_cache=True).past_key_values
    for module in (model, model.model):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            module(**inputs, past_key_values=cache, cache=copy.deepcopy(cache))


def test_a_cache_under_activation_checkpointing_is_refused() -> None:
    model = _model()
    inputs = {"input_ids": _ids([9]), "decoder_input_ids": _ids([4])}
    cache = model(**inputs, use_cache=True).past_key_values
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="a cache would be written twice under activation checkpointing"):
        model(**inputs, past_key_values=cache)


UNKNOWN = {
    "labls": torch.ones(1, 4, dtype=torch.int64),
    "attention_msk": torch.ones(1, 9),
    "past_key_value": DynamicCache(),
    "position_ids": torch.arange(9)[None],
    "cu_seq_lens_q": torch.tensor([0, 9]),
    "is_causal": True,
    "head_mask": torch.ones(4, 4),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_arguments_are_refused(name: str) -> None:
    model = _model()
    ids = {"input_ids": _ids([9])}
    encoded = model.get_encoder()(**ids)
    calls = [
        (model, {**ids, "decoder_input_ids": _ids([4])}),
        (model, {"encoder_outputs": encoded, "decoder_input_ids": _ids([4])}),
        (model.model, {**ids, "decoder_input_ids": _ids([4])}),
        (model.get_encoder(), ids),
        (model.get_decoder(), {**ids, "encoder_hidden_states": encoded.last_hidden_state}),
    ]
    for module, inputs in calls:
        with pytest.raises(TypeError, match=f"{type(module).__name__}.forward does not know {name}"):
            module(**inputs, **{name: UNKNOWN[name]})
        module(**inputs, **{name: None}, output_attentions=None, output_hidden_states=True, return_dict=True)


def test_no_cache_unless_used() -> None:
    inputs = {"input_ids": _ids([9]), "decoder_input_ids": _ids([4])}
    batch = _batch()
    for model in (_model(), _model(use_cache=False)):
        by_default = model(**inputs).past_key_values
        assert type(by_default) is (EncoderDecoderCache if model.config.use_cache else type(None))
        assert type(model(**inputs, use_cache=True).past_key_values) is EncoderDecoderCache
        assert model(**inputs, use_cache=False).past_key_values is None
        assert model(**batch).past_key_values is None, "training needs no cache"
        assert type(model(**batch, use_cache=True).past_key_values) is EncoderDecoderCache


@pytest.mark.parametrize(
    ("name", "meant"),
    [("labls", "labels"), ("attention_msk", "attention_mask"), ("output_attention", "output_attentions")],
)
def test_what_a_mistyped_argument_may_have_meant(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"does not know {name} \(did you mean {meant}\?\)"):
        _model()(**_batch(), **{name: True})


TEN_TOKENS = {"max_new_tokens": 10, "min_new_tokens": 10}


def _assert_varied(output: Tensor) -> None:
    """A model that repeats itself, or gives all sentences the same translation, would make its test pass always."""
    assert all(len(row.unique()) >= 3 for row in output)
    assert len({tuple(row.tolist()) for row in output}) == len(output)


@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "tupe"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_generation_with_cache_equals_without(num_beams: int, position_embedding_type: str) -> None:
    model = _generator_model(position_embedding_type=position_embedding_type)
    source = _ids([9, 4, 7])
    for length in (TEN_TOKENS, {"max_new_tokens": 10}):
        kwargs = {"attention_mask": _mask(source), "num_beams": num_beams, **length}
        cached = model.generate(source, use_cache=True, **kwargs)
        assert torch.equal(model.generate(source, use_cache=False, **kwargs), cached)
        static = model.generate(source, cache_implementation="static", disable_compile=True, **kwargs)
        assert torch.equal(static, cached)
        _assert_varied(cached)
    assert (cached[:, 0] == START).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_batch_generates_the_same_as_single_sentences(num_beams: int, side: str) -> None:
    model = _generator_model(num_experts_per_tok=2)
    source = _ids([9, 4, 7], side)
    together = model.generate(source, attention_mask=_mask(source), num_beams=num_beams, **TEN_TOKENS)
    _assert_varied(together)
    for row in range(3):
        alone = model.generate(source[row : row + 1, source[row] != PAD], num_beams=num_beams, **TEN_TOKENS)
        assert torch.equal(alone[0], together[row])


STATIC_CACHE = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "tupe"])
@pytest.mark.parametrize(
    "cache", [{"use_cache": True}, {"use_cache": False}, STATIC_CACHE], ids=["yes", "no", "static"]
)
def test_generation_from_left_padded_decoder_prompts(cache: dict, position_embedding_type: str, attention: str) -> None:
    model = _generator_model(position_embedding_type=position_embedding_type)
    model.set_attn_implementation(attention)
    source, prompts = _ids([9, 4, 7]), _ids([2, 5, 3], "left", seed=1)
    prompts[torch.arange(3), (prompts == PAD).sum(dim=1)] = START
    together = model.generate(
        source,
        attention_mask=_mask(source),
        decoder_input_ids=prompts,
        decoder_attention_mask=_mask(prompts),
        **cache,
        **TEN_TOKENS,
    )
    assert torch.equal(together[:, :5], prompts)
    _assert_varied(together[:, 5:])
    for row in range(3):
        prompt = prompts[row : row + 1, prompts[row] != PAD]
        alone = model.generate(source[row : row + 1, source[row] != PAD], decoder_input_ids=prompt, **TEN_TOKENS)
        assert torch.equal(alone[0, prompt.shape[1] :], together[row, 5:])


def test_sampling_is_reproducible() -> None:
    model = _generator_model()
    source = _ids([9, 4, 7])

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(source, attention_mask=_mask(source), do_sample=True, top_k=0, **TEN_TOKENS)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_generation_does_not_depend_on_output_router_logits() -> None:
    source = _ids([9, 4, 7])
    kwargs = {"attention_mask": _mask(source), "num_beams": 2, **TEN_TOKENS}
    expected = _generator_model().generate(source, **kwargs)
    assert torch.equal(_generator_model(output_router_logits=True).generate(source, **kwargs), expected)


# --- training at scale: checkpointing and half precision


def test_activation_checkpointing_gives_the_same_step() -> None:
    """With everything random that the recomputation must repeat: dropout, jitter and Random Token Selection."""
    overrides = {
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "router_noise_policy": "jitter",
        "router_jitter_noise": 0.1,
        "capacity_factor": 0.6,
        "min_capacity": 0,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
        "router_z_loss_coef": 0.1,
    }
    model, checkpointed = _model(**overrides), _model(**overrides)
    checkpointed.activation_checkpointing_enable()
    num_forwards = 0

    def count(*args: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1

    checkpointed.model.encoder.layers[1].ffn.register_forward_hook(count)
    batch = _batch()
    torch.manual_seed(7)
    expected = _train_step(model, batch)
    torch.manual_seed(7)
    actual = _train_step(checkpointed, batch)
    assert num_forwards == 2, "forward and recomputation"
    _assert_same_step(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_and_autocast(implementation: str) -> None:
    batch = _batch(side="left")
    model = _model(num_experts_per_tok=2)
    model.set_experts_implementation(implementation)
    expected = model(**batch).loss
    half = copy.deepcopy(model).bfloat16()
    output = half(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(**batch)
    for loss in (output.loss, autocast.loss):
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.0)
    for tested in (half, model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=tested is model):
            loss = tested.train()(**batch, output_router_logits=True)
        assert all(logits.dtype == torch.float32 for logits in loss.encoder_router_logits)
        loss.loss.backward()
        assert all(gradient.isfinite().all() for gradient in _gradients(tested).values())


@pytest.mark.parametrize("overrides", EVALUATED_ALIKE[:2] + EVALUATED_ALIKE[4:], ids=lambda value: "-".join(value))
def test_evaluation_compiles_without_a_graph_break(overrides: dict) -> None:
    model = _model(**overrides)
    source, target = _ids([9, 4, 7]), _ids([5, 5, 5], seed=1)
    inputs = {"input_ids": source, "attention_mask": _mask(source), "decoder_input_ids": target, "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **CLOSE)


STRUCTURE: dict[str, Any] = {
    "num_experts": 8,
    "encoder_sparse_step": 1,
    "decoder_sparse_layers": [0],
    "expert_map": [[0, 1, 2, 3, 0]] * 3,
    "d_model": 64,
    "max_position_embeddings": 1000,
    "encoder_layers": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "activation_function": "gelu",
    "scale_embedding": False,
    "position_embedding_type": "learned",
    "router_bias": True,
    "use_residual": True,
}


@pytest.mark.parametrize("field", STRUCTURE)
def test_a_change_of_the_config_that_layers_cannot_follow_is_refused(field: str) -> None:
    model = _model()
    before = getattr(model.config, field)
    setattr(model.config, field, STRUCTURE[field])
    message = r"model\.config was changed after the model was built"
    with pytest.raises(ValueError, match=message):
        model(**_batch())
    with pytest.raises(ValueError, match=message):
        model.generate(_ids([4]))
    setattr(model.config, field, before)
    assert model(**_batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("field", "value"),
    [("dropout", 0.5), ("attention_dropout", 0.5), ("activation_dropout", 0.5), ("router_jitter_noise", 0.9)],
)
def test_a_change_of_the_config_acts_in_training(field: str, value: float) -> None:
    """tests/models/test_moe_layer.py has the other options of routing."""
    losses = []
    for model in (_model(), _model(), _model(**{field: value})):
        if len(losses) == 1:
            setattr(model.config, field, value)
        torch.manual_seed(0)
        losses.append(model.train()(**_batch()).loss)
    assert losses[0] != losses[1] == losses[2]
