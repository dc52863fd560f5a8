"""Rules there and back, and what they say about tensors that do not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.conversion.conversion_rules import RULES_DIR, RuleSet
from hf_moe_ted.conversion.patterns import NamePattern, Pattern
from hf_moe_ted.tensors.lazy_tensors import LazyTensors
from hf_moe_ted.testing import tiny_config

SHIPPED = sorted(path.stem for path in RULES_DIR.glob("*.yaml"))
EXPERTS = "{layer}.ffn.experts.deepspeed_experts.{expert}.fc1.weight"


def lazy(tensors: dict[str, Tensor]) -> LazyTensors:
    return LazyTensors(
        {name: tensor.to("meta") for name, tensor in tensors.items()}, lambda name: tensors[name].clone()
    )


def rule_set(tmp_path: Path, text: str) -> RuleSet:
    (tmp_path / "mine.yaml").write_text(text)
    return RuleSet.load(tmp_path / "mine.yaml")


def assert_equal(found: LazyTensors, expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found.specs[name].shape == tensor.shape, name
        assert found.specs[name].dtype == tensor.dtype, name
        assert found[name].is_contiguous()


@pytest.mark.parametrize(
    ("pattern", "name", "values"),
    [
        ("a.{layer}.b", "a.12.b", {"layer": "12"}),
        ("a.{layer}.b", "a.x.b", None),
        ("a.{name}.b", "a.x.b", {"name": "x"}),
        ("a.{name}.b", "a.x.y.b", None),
        ("a.{name:x|**}.b", "a.x.y.b", {"name": "x.y"}),
        ("a.{name:x|*}.b", "a.z.b", {"name": "z"}),
        ("a.{name:x|y}.b", "a.z.b", None),
        ("a.{name}.{name}", "a.z.z", {"name": "z"}),
        ("a.{name}.{name}", "a.y.z", None),
        ("a.b", "aXb", None),
    ],
)
def test_patterns(pattern: str, name: str, values: dict[str, str] | None) -> None:
    assert NamePattern(pattern).match(name) == values


def test_first_choice_is_written() -> None:
    assert NamePattern("a.{name:x|y}.{layer}").fill({"layer": "3"}) == "a.x.3"
    with pytest.raises(ValueError, match=r"\{name\} of 'a\.\{name\}' has no value"):
        NamePattern("a.{name}").fill({})


def test_experts_are_stacked_by_number_and_unstacked(tmp_path: Path) -> None:
    rules = rule_set(tmp_path, f'rules:\n  - {{source: "{EXPERTS}", target: "{{layer}}.up"}}')
    theirs = {
        f"{layer}.ffn.experts.deepspeed_experts.{expert}.fc1.weight": torch.full((2, 3), 100.0 * layer + expert)
        for expert in (10, 1, 11, *range(2, 10), 0)
        for layer in (0, 7)
    }
    ours = rules.apply(lazy(theirs))
    assert ours["7.up"][:, 0, 0].tolist() == [700.0 + expert for expert in range(12)]
    assert_equal(rules.inverse().apply(ours), theirs)


def test_a_single_expert_is_stacked_too(tmp_path: Path) -> None:
    rules = rule_set(tmp_path, f'rules:\n  - {{source: "{EXPERTS}", target: "{{layer}}.up"}}')
    theirs = {"0.ffn.experts.deepspeed_experts.0.fc1.weight": torch.rand(2, 3)}
    assert rules.apply(lazy(theirs))["0.up"].shape == (1, 2, 3)
    assert_equal(rules.inverse().apply(rules.apply(lazy(theirs))), theirs)


@pytest.mark.parametrize(
    ("rule", "theirs", "expected"),
    [
        (
            '{source: "w", target: "v", transpose: true}',
            {"w": torch.arange(6.0).view(2, 3)},
            {"v": torch.arange(6.0).view(2, 3).t().contiguous()},
        ),
        (
            '{source: ["a", "b"], target: "ab", concatenate: 1}',
            {"a": torch.zeros(2, 3), "b": torch.ones(2, 3)},
            {"ab": torch.tensor([[0.0, 0, 0, 1, 1, 1]] * 2)},
        ),
        (
            '{source: "qkv", target: ["q", "k", "v"], split: 0}',
            {"qkv": torch.arange(6.0)},
            {"q": torch.tensor([0.0, 1]), "k": torch.tensor([2.0, 3]), "v": torch.tensor([4.0, 5])},
        ),
        (  # 2 heads of width 1: q of head 0, k of head 0, v of head 0, q of head 1, ...
            '{source: "qkv", target: ["q", "k", "v"], split: 0, interleave_heads: true}',
            {"qkv": torch.arange(6.0)},
            {"q": torch.tensor([0.0, 3]), "k": torch.tensor([1.0, 4]), "v": torch.tensor([2.0, 5])},
        ),
        (
            '{source: "p", target: ["encoder.p", "decoder.p"]}',
            {"p": torch.arange(3.0)},
            {"encoder.p": torch.arange(3.0), "decoder.p": torch.arange(3.0)},
        ),
    ],
)
def test_operations_there_and_back(
    rule: str, theirs: dict[str, Tensor], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    rules = rule_set(tmp_path, f"rules:\n  - {rule}")
    ours = rules.apply(lazy(theirs), num_heads=2)
    assert_equal(ours, expected)
    assert_equal(rules.inverse().apply(ours, num_heads=2), theirs)


def test_copies_that_differ_do_not_become_one(tmp_path: Path) -> None:
    rules = rule_set(tmp_path, 'rules:\n  - {source: "p", target: ["a", "b"]}').inverse()
    with pytest.raises(ValueError, match="a and b must be copies of each other, but differ"):
        rules.apply(lazy({"a": torch.zeros(2), "b": torch.ones(2)}))["p"]


def test_ignored_tensors_are_left_out(tmp_path: Path) -> None:
    rules = rule_set(tmp_path, 'rules:\n  - {ignore: "x.{layer}"}\n  - {source: "a", target: "b"}')
    assert list(rules.apply(lazy({"x.1": torch.ones(1), "a": torch.ones(1)}))) == ["b"]
    assert list(rules.inverse().apply(lazy({"b": torch.ones(1)}))) == ["a"]


@pytest.mark.parametrize(
    ("rules", "names", "message"),
    [
        (
            '- {source: "a.{layer}.fc1", target: "b.{layer}"}',
            ["a.3.fc2"],
            r"a\.3\.fc2 matches no rule; the nearest is a\.\{layer\}\.fc1",
        ),
        (
            '- {source: "a.{x}", target: "b.{x}"}\n  - {source: "a.1", target: "c"}',
            ["a.1"],
            r"a\.1 matches a\.\{x\} and a\.1",
        ),
        ('- {source: "a.{x}", target: "b"}', ["a.1", "a.2"], r"a\.1 and a\.2 both become b"),
        ('- {source: "a", target: "c"}\n  - {source: "b", target: "c"}', ["a", "b"], r"b and a both become c"),
        ('- {source: "e.{expert}", target: "up"}', ["e.1", "e.3"], r"experts \[0, 2\] are missing, though e\.3 exists"),
        ('- {source: ["a", "b"], target: "c", concatenate: 0}', ["a"], r"b is missing, though a exists"),
        (
            '- {source: "a", target: ["b", "c", "d"], split: 0}',
            ["a"],
            r"a: dimension 0 of shape \(2,\) cannot be split into 3",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(rules: str, names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rule_set(tmp_path, f"rules:\n  {rules}").apply(lazy({name: torch.ones(2) for name in names}))


def test_experts_of_different_shapes_are_named(tmp_path: Path) -> None:
    rules = rule_set(tmp_path, 'rules:\n  - {source: "e.{expert}", target: "up"}')
    tensors = {f"e.{expert}": torch.ones(2) for expert in range(4)} | {"e.2": torch.ones(3)}
    with pytest.raises(ValueError, match=r"e\.2 is torch.float32 of shape \(3,\), but the other experts are .* \(2,\)"):
        rules.apply(lazy(tensors))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "is not YAML"),
        ("- 1", "must have the key rules"),
        ("rules:\n  - {source: a}", "must have one source and one target"),
        ("rules:\n  - {source: a, target: b, ignore: c}", "must have source and target, or ignore"),
        ("rules:\n  - {source: a, target: b, colour: red}", "must have source and target, or ignore"),
        ("rules:\n  - {source: [a, b], target: c}", "must have one source and one target"),
        ("rules:\n  - {source: [a, b], target: c, concatenate: first}", "must be the number of a dimension"),
        ("rules: null", "rules must be a list"),
        ("rules: []\ntensor_parallel: 5", "tensor_parallel must be a list"),
        ("rules: []\ntensor_parallel: [5]", "has 5 in tensor_parallel; give pairs"),
        ("rules: []\ntensor_parallel: [[a, b]]", "the dimension must be an integer"),
        ("rules: []\ntensor_parallel: [['(', 0]]", "is no regular expression"),
        ("rules: [null]", "must have source and target, or ignore"),
        ("rules: [{ignore: null}]", "ignore must be a name"),
        ("rules: [{source: 5, target: a}]", "must be names or lists of names"),
        ("rules: [{source: [5], target: a}]", "must be names or lists of names"),
        ("rules: [{source: a, target: {b: c}}]", "must be names or lists of names"),
        ("rules: [{source: a, target: b, transpose: 1.5}]", "transpose must be true or false"),
        ("rules: [{source: '{1a}', target: b}]", "is no regular expression"),
        ('rules:\n  - {source: "a.{layer", target: b}', "has a brace that belongs to no placeholder"),
    ],
)
def test_rules_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"(?s)\.yaml.*{message}"):
        rule_set(tmp_path, text)


def test_patterns_that_take_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_ted.conversion.patterns.MATCH_S", 0.2)
    rules = rule_set(tmp_path, "rules: [{ignore: a}]\ntensor_parallel: [['^(a|aa)+(b|bb)+$', 0]]")
    pattern = Pattern(rules.tensor_parallel[0][0], rules.name)
    assert pattern.search("aab") and not pattern.search("aac")
    with pytest.raises(ValueError, match=r"mine\.yaml.* takes more than 0 s to match 'aaa"):
        pattern.search("a" * 200)


def test_a_million_missing_experts_are_not_listed(tmp_path: Path) -> None:
    rules = rule_set(tmp_path, 'rules:\n  - {source: "e.{expert}", target: "up"}')
    with pytest.raises(ValueError, match=r"experts \[0, 1, .* 19\] and more are missing, though e\.9999999999 exists"):
        rules.apply(lazy({"e.9999999999": torch.ones(2)}))


@pytest.mark.parametrize(
    "rule", ["transpose: true", "concatenate: 7", "concatenate: 0, interleave_heads: true", "split: 7"]
)
def test_operations_that_the_shapes_do_not_fit(rule: str, tmp_path: Path) -> None:
    sides = {"transpose": ("a", "c"), "split": ("a", "[c, d]")}.get(rule.split(":")[0], ("[a, b]", "c"))
    rules = rule_set(tmp_path, f"rules: [{{source: {sides[0]}, target: {sides[1]}, {rule}}}]")
    tensors = {name: torch.ones(3) for name in "ab" if name in sides[0]}
    with pytest.raises(ValueError, match=r"a: the shapes \[\(3,\).* do not fit the rule for a"):
        rules.apply(lazy(tensors), num_heads=2)


def test_unknown_rules_name_those_there_are() -> None:
    with pytest.raises(ValueError, match=rf"rules \(nothing\) must be one of {', '.join(SHIPPED)}"):
        RuleSet.load("nothing")


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("use_residual", [False, True])
def test_shipped_rules_lose_nothing(name: str, use_residual: bool) -> None:
    torch.manual_seed(0)
    positions = {"position_embedding_type": "learned"} if name in ("megatron", "fairseq") else {}
    model = ZCodeM3ForConditionalGeneration(tiny_config(init_std=0.2, use_residual=use_residual, **positions))
    ours = dict(model.state_dict())
    if name == "megatron":  # has one table for both sides, and tied embeddings only
        ours["model.decoder.embed_positions.weight"] = ours["model.encoder.embed_positions.weight"]
        ours = {key: tensor for key, tensor in ours.items() if key not in model.all_tied_weights_keys}
    elif name == "fairseq":
        del ours["model.encoder.embed_tokens.weight"]
    rules = RuleSet.load(name)
    theirs = rules.inverse().apply(lazy(ours), num_heads=4)
    assert any("deepspeed_experts.3." in key for key in theirs)
    assert_equal(rules.apply(theirs, num_heads=4), ours)


def test_attribute_of_the_moe_layer_is_found_whatever_it_is() -> None:
    stem = "model.encoder.layers.1.feed_forward.moe.deepspeed_moe"
    theirs = {f"{stem}.experts.deepspeed_experts.{e}.wi.weight": torch.rand(2, 2) for e in range(2)}
    theirs[f"{stem}.gate.wg.weight"] = torch.rand(2, 2)
    ours = RuleSet.load("m2m100").apply(lazy(theirs))
    assert set(ours) == {f"model.encoder.layers.1.ffn.{name}" for name in ("router.weight", "experts.up_proj")}
    named = RuleSet.load("m2m100").with_names(moe="feed_forward.moe", up="wi").inverse()
    assert_equal(named.apply(ours), theirs)
