"""The configuration: every field, every contradiction by name and value, JSON, and what the model refuses to build."""

import copy
import importlib
import inspect
import json
import math
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, models
from hf_moe_ted.models.field_of_config import FieldOfConfig
from hf_moe_ted.testing import tiny_config

DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "encoder_layers": 24,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "activation_function": "relu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "scale_embedding": True,
    "position_embedding_type": "sinusoidal",
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_sparse_layers": None,
    "decoder_sparse_layers": None,
    "num_experts": 64,
    "expert_map": None,
    "num_experts_per_tok": 1,
    "router_dtype": "float32",
    "router_bias": False,
    "router_noise_policy": None,
    "router_jitter_noise": 0.01,
    "capacity_factor": 1.0,
    "eval_capacity_factor": None,
    "min_capacity": 4,
    "token_drop_policy": "random",
    "batch_prioritized_routing": False,
    "second_expert_policy": "all",
    "normalize_router_weights": None,
    "use_residual": False,
    "moe_token_dropout": 0.0,
    "gating_dropout": 0.0,
    "router_ignore_padding_tokens": True,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
    "output_router_logits": False,
    "label_smoothing": 0.0,
    "use_cache": True,
    "is_encoder_decoder": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": True,
}

# overrides of `tiny_config` -> what the message must say
CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *[
        ({name: 0}, (f"{name} (0)", "at least 1"))
        for name in (
            "vocab_size",
            "max_position_embeddings",
            "d_model",
            "encoder_layers",
            "decoder_layers",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "num_experts",
            "num_experts_per_tok",
        )
    ],
    ({"d_model": 30}, ("d_model (30)", "encoder_attention_heads (4)")),
    ({"decoder_attention_heads": 5}, ("d_model (32)", "decoder_attention_heads (5)")),
    ({"d_model": 33, "encoder_attention_heads": 3, "decoder_attention_heads": 3}, ("even d_model", "33")),
    ({"d_model": 2, "encoder_attention_heads": 1, "decoder_attention_heads": 1}, ("d_model", "at least 4", "2")),
    ({"encoder_sparse_step": -1}, ("encoder_sparse_step (-1)",)),
    ({"decoder_sparse_step": -2}, ("decoder_sparse_step (-2)",)),
    ({"encoder_sparse_layers": [0, 4]}, ("encoder_sparse_layers ([0, 4])", "0 to 3", "encoder_layers is 4")),
    ({"decoder_sparse_layers": [-1]}, ("decoder_sparse_layers ([-1])", "0 to 1", "decoder_layers is 2")),
    ({"encoder_sparse_layers": [1, 1]}, ("encoder_sparse_layers ([1, 1])", "distinct")),
    ({"num_experts": [4, 4]}, ("num_experts ([4, 4])", "2 layers", "3 sparse layers", "encoder [1, 3]", "decoder [1]")),
    ({"num_experts": []}, ("num_experts ([])", "0 layers", "3 sparse layers")),
    ({"num_experts": [4, 4, 4, 4]}, ("num_experts ([4, 4, 4, 4])", "4 layers", "3 sparse layers")),
    ({"num_experts": [4, 0, 4]}, ("num_experts (0)",)),
    ({"num_experts_per_tok": 5}, ("num_experts_per_tok (5)", "(4)")),
    ({"num_experts": [4, 1, 4], "num_experts_per_tok": 2}, ("num_experts_per_tok (2)", "(1)")),
    ({"position_embedding_type": "rotary"}, ("position_embedding_type ('rotary')", "'sinusoidal'", "'tupe'")),
    ({"router_dtype": "float64"}, ("router_dtype ('float64')", "'bfloat16'")),
    ({"router_noise_policy": "Jitter"}, ("router_noise_policy ('Jitter')", "None", "'rsample'")),
    ({"token_drop_policy": "probs"}, ("token_drop_policy ('probs')", "'probability'")),
    ({"second_expert_policy": "none"}, ("second_expert_policy ('none')", "'sampling'")),
    ({"normalize_router_weights": "after"}, ("normalize_router_weights ('after')", "'after_dropping'")),
    *[
        ({name: value}, (f"{name} ({value})", "less than 1"))
        for name in (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "moe_token_dropout",
            "gating_dropout",
            "label_smoothing",
            "router_jitter_noise",
        )
        for value in (-0.1, 1.0, math.nan)
    ],
    *[
        ({name: value}, (f"{name} ({value})", "positive"))
        for name in ("capacity_factor", "eval_capacity_factor")
        for value in (0, -1.0, math.nan)
    ],
    ({"min_capacity": -1}, ("min_capacity (-1)", "be at least 0")),
    *[
        ({name: value}, (f"{name} ({value})", "be at least 0 and finite"))
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "init_std")
        for value in (-0.1, math.nan)
    ],
    ({"router_noise_policy": "rsample", "num_experts_per_tok": 2}, ("'rsample'", "num_experts_per_tok is 2")),
    ({"second_expert_policy": "random"}, ("second_expert_policy='random'", "num_experts_per_tok=2, got 1")),
    (
        {"second_expert_policy": "sampling", "num_experts_per_tok": 3},
        ("second_expert_policy='sampling'", "num_experts_per_tok=2, got 3"),
    ),
    ({"batch_prioritized_routing": True}, ("batch_prioritized_routing", "'position', got 'random'")),
    ({"pad_token_id": None}, ("pad_token_id must be set",)),
    ({"decoder_start_token_id": None}, ("decoder_start_token_id must be set",)),
    ({"pad_token_id": -1}, ("pad_token_id (-1)", "vocab_size (96)")),
    ({"pad_token_id": 96}, ("pad_token_id (96)", "vocab_size (96)")),
    ({"decoder_start_token_id": 96}, ("decoder_start_token_id (96)", "vocab_size (96)")),
    ({"pad_token_id": 2}, ("decoder_start_token_id (2)", "pad_token_id")),
]

OPTIONS: list[tuple[str, Any]] = [
    ("position_embedding_type", "learned"),
    ("position_embedding_type", "tupe"),
    ("num_experts_per_tok", 2),
    ("num_experts_per_tok", 3),
    ("router_noise_policy", "jitter"),
    ("router_noise_policy", "rsample"),
    ("token_drop_policy", "position"),
    ("token_drop_policy", "probability"),
    ("use_residual", True),
    ("moe_token_dropout", 0.2),
    ("normalize_router_weights", "before_dropping"),
    ("normalize_router_weights", "after_dropping"),
    ("router_dtype", "bfloat16"),
    ("router_bias", True),
    ("activation_function", "gelu"),
]


def test_every_field_has_its_default_and_its_documentation() -> None:
    config = ZCodeM3Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    own_fields = set(vars(ZCodeM3Config)["__annotations__"])
    assert own_fields == set(DEFAULTS)
    of_every_model = {"is_encoder_decoder", "tie_word_embeddings"} | {n for n in own_fields if n.endswith("token_id")}
    undocumented = {name for name in own_fields - of_every_model if name not in (ZCodeM3Config.__doc__ or "")}
    assert not undocumented


def test_names_that_transformers_expects() -> None:
    config = tiny_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 4, 4)
    assert config.initializer_range == config.init_std == 0.02


@pytest.mark.parametrize(("overrides", "expected"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_contradiction_is_a_value_error_with_field_and_value(overrides: dict, expected: tuple[str, ...]) -> None:
    tiny_config()  # the error comes from the overrides
    with pytest.raises(ValueError) as error:
        tiny_config(**overrides)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", "32"), ("num_experts", 4.0), ("num_experts", [4, "4", 4]), ("router_bias", 1), ("dropout", None)],
)
def test_value_of_the_wrong_type_is_an_error_with_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(StrictDataclassError, match=field) as error:
        tiny_config(**{field: value})
    assert str(value) in str(error.value)


def test_an_edited_config_is_checked_again_before_it_is_saved(tmp_path: Path) -> None:
    config = tiny_config()
    config.encoder_sparse_step = -1
    with pytest.raises(StrictDataclassError, match=r"encoder_sparse_step \(-1\)"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "encoder", "decoder"),
    [
        ({}, [1, 3], [1]),
        ({"encoder_sparse_step": 1, "decoder_sparse_step": 3}, [0, 1, 2, 3], []),
        ({"encoder_sparse_step": 3, "decoder_sparse_step": 0}, [2], []),
        ({"encoder_sparse_layers": [3, 0]}, [0, 3], [1]),
        ({"encoder_sparse_layers": [], "decoder_sparse_layers": [0]}, [], [0]),
        ({"encoder_sparse_step": 0, "encoder_sparse_layers": [2]}, [2], [1]),
    ],
)
def test_sparse_layers(overrides: dict, encoder: list[int], decoder: list[int]) -> None:
    config = tiny_config(**overrides)
    assert config.sparse_layers("encoder") == encoder
    assert config.sparse_layers("decoder") == decoder
    assert config.num_experts_per_layer("encoder") == dict.fromkeys(encoder, 4)
    assert config.num_experts_per_layer("decoder") == dict.fromkeys(decoder, 4)


def test_num_experts_per_layer_goes_from_the_first_encoder_layer_to_the_last_decoder_layer() -> None:
    config = tiny_config(num_experts=[2, 4, 8, 16], encoder_sparse_layers=[3, 0], decoder_sparse_step=1)
    assert config.num_experts_per_layer("encoder") == {0: 2, 3: 4}
    assert config.num_experts_per_layer("decoder") == {0: 8, 1: 16}


def test_dense_model_needs_no_experts() -> None:
    for num_experts in (0, [], 64):
        config = tiny_config(num_experts=num_experts, encoder_sparse_step=0, decoder_sparse_step=0)
        assert config.num_experts_per_layer("encoder") == config.num_experts_per_layer("decoder") == {}


def _every_field_changed() -> ZCodeM3Config:
    return ZCodeM3Config(
        vocab_size=101,
        max_position_embeddings=65,
        d_model=24,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        activation_function="gelu",
        dropout=0.2,
        attention_dropout=0.3,
        activation_dropout=0.15,
        init_std=0.05,
        scale_embedding=False,
        position_embedding_type="tupe",
        encoder_sparse_step=1,
        decoder_sparse_step=3,
        encoder_sparse_layers=[0, 2],
        decoder_sparse_layers=[1],
        num_experts=[3, 5, 7],
        expert_map=[[*range(3), 0], [*range(5)], [*range(7)]],
        num_experts_per_tok=2,
        router_dtype="bfloat16",
        router_bias=True,
        router_noise_policy="jitter",
        router_jitter_noise=0.02,
        capacity_factor=None,
        eval_capacity_factor=1.25,
        min_capacity=2,
        token_drop_policy="position",
        batch_prioritized_routing=True,
        second_expert_policy="sampling",
        normalize_router_weights="after_dropping",
        use_residual=True,
        moe_token_dropout=0.1,
        gating_dropout=0.1,
        router_ignore_padding_tokens=False,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.25,
        output_router_logits=True,
        label_smoothing=0.1,
        use_cache=False,
        is_encoder_decoder=False,
        bos_token_id=10,
        pad_token_id=11,
        eos_token_id=[12, 13],
        decoder_start_token_id=14,
        tie_word_embeddings=False,
    )


def test_json_round_trip_keeps_every_field(tmp_path: Path) -> None:
    config = _every_field_changed()
    expected = {name: getattr(config, name) for name in DEFAULTS}
    unchanged = [name for name in DEFAULTS if expected[name] == DEFAULTS[name]]
    assert not unchanged, "a field at its default would pass without being saved"

    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_experts"] == [3, 5, 7]
    assert saved["model_type"] == "zcode_m3"
    for loaded in (
        ZCodeM3Config.from_pretrained(tmp_path),
        ZCodeM3Config.from_dict(json.loads(config.to_json_string())),
        ZCodeM3Config.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert {name: getattr(loaded, name) for name in DEFAULTS} == expected
        assert loaded.num_experts_per_layer("encoder") == {0: 3, 2: 5}
        assert loaded.num_experts_per_layer("decoder") == {1: 7}


def test_contradictory_file_is_refused(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": [4, 4]}))
    with pytest.raises(ValueError, match=r"num_experts \(\[4, 4\]\)"):
        ZCodeM3Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), OPTIONS)
def test_model_accepts_every_option(field: str, value: Any) -> None:
    ZCodeM3ForConditionalGeneration(tiny_config(**{field: value}))


def test_model_refuses_an_unknown_activation_by_name() -> None:
    with pytest.raises(ValueError, match=r"activation_function \('rellu'\).*'relu'"):
        ZCodeM3ForConditionalGeneration(tiny_config(activation_function="rellu"))


def test_jitter_that_is_given_acts_or_is_refused() -> None:
    """`router_jitter_noise` alone is the switch of Switch Transformers and Mixtral."""
    for noise in (0.01, 0.3):
        config = tiny_config(router_jitter_noise=noise)
        assert (config.router_noise_policy, config.router_jitter_noise) == ("jitter", noise)
    for config in (tiny_config(), tiny_config(router_jitter_noise=0.0)):
        assert config.router_noise_policy is None
    assert tiny_config(router_noise_policy="jitter").router_jitter_noise == 0.01
    with pytest.raises(
        ValueError, match=r"router_jitter_noise \(0\.3\) has no effect with router_noise_policy='rsample'"
    ):
        tiny_config(router_jitter_noise=0.3, router_noise_policy="rsample")


@pytest.mark.parametrize("policy", [None, "jitter", "rsample"])
def test_jitter_survives_saving(policy: str | None, tmp_path: Path) -> None:
    config = tiny_config(router_noise_policy=policy)
    config.save_pretrained(tmp_path)
    again = [
        ZCodeM3Config.from_pretrained(tmp_path),
        ZCodeM3Config.from_json_file(tmp_path / "config.json"),
        ZCodeM3Config(**config.to_dict()),
        copy.deepcopy(config),
    ]
    for other in again:
        assert (other.router_noise_policy, other.router_jitter_noise) == (policy, 0.01)
        assert other.to_dict() | {"transformers_version": None} == config.to_dict() | {"transformers_version": None}
    if policy is None:
        given = ZCodeM3Config.from_pretrained(tmp_path, router_jitter_noise=0.01)
        assert given.router_noise_policy == "jitter"


def test_options_of_from_pretrained_are_checked_together(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    config = ZCodeM3Config.from_pretrained(tmp_path, second_expert_policy="sampling", num_experts_per_tok=2)
    assert (config.second_expert_policy, config.num_experts_per_tok) == ("sampling", 2)
    with pytest.raises(ValueError, match="second_expert_policy='sampling' needs num_experts_per_tok=2, got 1"):
        ZCodeM3Config.from_pretrained(tmp_path, second_expert_policy="sampling")


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_prioritized_routing": True, "token_drop_policy": "position"},
        {"second_expert_policy": "sampling", "num_experts_per_tok": 2},
        {"num_experts_per_tok": 2, "second_expert_policy": "random"},
        {"router_jitter_noise": 0.3},
        {"router_jitter_noise": 0.3, "router_noise_policy": None},
    ],
)
def test_update_checks_fields_together(fields: dict[str, Any]) -> None:
    config, expected = tiny_config(), tiny_config(**fields)
    config.update(fields)
    assert config.to_dict() == expected.to_dict()
    before = config.to_dict()
    with pytest.raises(ValueError, match="gating_dropout"):
        config.update({"dropout": 0.5, "gating_dropout": 1.5})
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="router_z_loss_coef"):  # it still checks
        config.router_z_loss_coef = -1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router_jitter_noise", 1.5),
        ("token_drop_policy", "no_such"),
        ("second_expert_policy", "sampling"),
        ("capacity_factor", -1.0),
        ("capacity_factor", math.inf),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 50),
        ("router_dtype", "float8"),
        ("dropout", 2.0),
        ("router_aux_loss_coef", -1.0),
        ("router_aux_loss_coef", math.inf),
    ],
)
def test_a_wrong_change_is_refused_and_leaves_no_trace(field: str, value: Any) -> None:
    config = tiny_config()
    before = config.to_dict()
    with pytest.raises(ValueError, match=field):
        setattr(config, field, value)
    assert config.to_dict() == before


def fields_that_modules_read() -> set[str]:
    modules = [
        importlib.import_module(module.name) for module in pkgutil.iter_modules(models.__path__, "hf_moe_ted.models.")
    ]
    classes = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    return {value.field for one in classes for value in vars(one).values() if isinstance(value, FieldOfConfig)}


@pytest.mark.parametrize("field", sorted(fields_that_modules_read()))
def test_a_change_of_what_modules_read_is_checked(field: str) -> None:
    config = tiny_config()
    config.__dict__["capacity_factor"] = -1.0  # no check sees this one; those of any other change do
    with pytest.raises(ValueError, match=r"capacity_factor \(-1.0\) must be positive"):
        setattr(config, field, getattr(config, field))
