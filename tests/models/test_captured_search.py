"""Searches by recorded steps beside those of transformers, with a recorder that needs no GPU."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from tape_recorder import TapeRecorder
from test_beam_search import COMMON_OPTIONS, ENDS, TO_THE_LIMIT, make_model, of_transformers, source
from torch import Tensor, nn
from transformers import masking_utils

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.models import captured_search, decoding_step, generation, graph_store
from hf_moe_ted.models.captured_encoder import captured_encoding
from hf_moe_ted.models.graph_store import power_of_two, rung
from hf_moe_ted.testing import tiny_config

__all__ = ["source"]

OPTIONS = COMMON_OPTIONS | {
    "five beams": {"num_beams": 5},
    "one end": {"eos_token_id": 7, "max_new_tokens": 40},
    "no end": {"eos_token_id": None, "max_new_tokens": 10},
    "least length": {"min_length": 18, "max_new_tokens": 17, "forced_eos_token_id": 2},
    "prompt": {"decoder_input_ids": torch.tensor([[2, 11, 12]] * 4 + [[2, 5, 6]])},
    "dict": {"return_dict_in_generate": True, "num_return_sequences": 2},
}
GREEDY = ("plain", "to the limit", "one end", "no end", "forced bos", "forced eos", "first tokens", "prompt")
GREEDY += ("first tokens, another for the rest", "first tokens twice")


def kept_hypotheses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What searches by recorded steps end with, one for each from now on."""
    found = []
    output_of = captured_search.output_of

    def kept(options: Any, hypotheses: Any, prompt_length: int) -> Any:
        found.append(hypotheses)
        return output_of(options, hypotheses, prompt_length)

    monkeypatch.setattr(captured_search, "output_of", kept)
    return found


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    made: list[TapeRecorder] = []

    def new_recorder() -> TapeRecorder:
        made.append(TapeRecorder())
        return made[-1]

    monkeypatch.setattr(graph_store, "new_recorder", new_recorder)
    monkeypatch.setattr(generation, "DEVICES", ("cpu",))
    # what transformers asks a stream that is captured: else it looks whether a mask is full
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    return made


def capturable_model(**overrides: Any) -> Any:
    return make_model(**{"experts_implementation": "batched_mm"} | overrides)


def store_of(model: Any) -> Any:
    with torch.no_grad():
        return graph_store.store_of(model)


def captured(model: Any, **options: Any) -> Any:
    return model.generate(**options, cuda_graphs=True)


def stepwise(model: Any, **options: Any) -> Any:
    """From Python: greedy search of transformers."""
    return model.generate(**options, cuda_graphs=False)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said for those who debug."""
    said: list[str] = []
    monkeypatch.setattr(generation.logger, "debug", lambda message, *values: said.append(message % values))
    return said


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings about what is not captured."""
    warnings: list[str] = []
    monkeypatch.setattr(graph_store.logger, "warning_once", warnings.append)
    return warnings


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in OPTIONS), ("plain", "eager"), ("prompt", "eager")]
)
def test_beams_are_those_of_transformers(
    name: str, attention: str, source: dict[str, Tensor], recorders: list[TapeRecorder], lines: list[str]
) -> None:
    model = capturable_model()
    model.set_attn_implementation(attention)
    options = {**source, **ENDS, **OPTIONS[name]}
    expected = of_transformers(model, **options)
    for _ in range(2):  # from Python and recorded, then replayed
        output = captured(model, **options)
        if not isinstance(output, Tensor):
            assert torch.equal(output.beam_indices, expected.beam_indices)
            assert torch.equal(output.sequences, expected.sequences)
        else:
            assert torch.equal(output, expected)
    assert recorders[0].num_replayed > recorders[0].num_recorded > 0
    assert not lines


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_is_that_of_transformers(name: str, source: dict[str, Tensor], recorders: list[TapeRecorder]) -> None:
    model = capturable_model()
    options = {**source, **ENDS, **OPTIONS[name], "num_beams": 1}
    expected = stepwise(model, **options)
    for _ in range(2):
        assert torch.equal(captured(model, **options), expected)
    assert recorders[0].num_replayed > 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_scores_of_batches_of_any_size(
    batch_size: int, early_stopping: bool, monkeypatch: pytest.MonkeyPatch, recorders: list[TapeRecorder]
) -> None:
    model = capturable_model(max_position_embeddings=128)
    input_ids = torch.randint(3, 96, (batch_size, 20), generator=torch.Generator().manual_seed(batch_size))
    options = {**ENDS, "input_ids": input_ids, "max_new_tokens": 90, "early_stopping": early_stopping}
    options |= {"eos_token_id": [2, 3, 4], "length_penalty": 0.7, "num_return_sequences": 4}
    found = kept_hypotheses(monkeypatch)
    expected = of_transformers(model, **options, output_scores=True, return_dict_in_generate=True)
    for _ in range(2):
        assert torch.equal(captured(model, **options), expected.sequences)
        torch.testing.assert_close(found[-1].ended_scores_BN.flatten(), expected.sequences_scores, atol=1e-5, rtol=1e-5)
    assert len(found) == 2 and recorders[0].num_replayed > 0


def test_sentences_that_are_done_leave_for_smaller_graphs(
    source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the comparisons above are worth: batches shrink, and keys get more."""
    shapes: list[tuple[int, int]] = []
    step = captured_search.decoding_step

    def counted(model: Any, memory: Any, num_candidates: int) -> None:
        shapes.append((len(memory.is_done_B), memory.mask_B1NK.shape[-1] // 4))
        step(model, memory, num_candidates)

    monkeypatch.setattr(captured_search, "decoding_step", counted)
    captured(capturable_model(), **source, **{**ENDS, "max_new_tokens": 40})
    sizes = [size for size, _ in shapes]
    assert sizes[0] == 6 and sizes == sorted(sizes, reverse=True) and len({*sizes}) >= 2
    captured(capturable_model(), **source, **TO_THE_LIMIT)
    assert {length for _, length in shapes} == {32, 64}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_of_batches_of_any_size(
    attention: str, source: dict[str, Tensor], recorders: list[TapeRecorder], lines: list[str]
) -> None:
    model = capturable_model()
    model.set_attn_implementation(attention)
    for _ in range(3):
        for size, length in ((5, 9), (1, 8), (3, 9), (5, 8)):
            inputs = {name: tensor[:size, :length] for name, tensor in source.items()}
            with torch.no_grad():
                expected = model.model.encoder(**inputs).last_hidden_state
                hidden = captured_encoding(model, store_of(model), inputs["input_ids"], inputs["attention_mask"])
            assert hidden is not None
            is_token = inputs["attention_mask"].bool()
            torch.testing.assert_close(hidden[is_token], expected[is_token], atol=1e-4, rtol=1e-4)  # other shapes
    assert recorders[0].num_recorded == 3  # for six sentences, three and one
    captured(model, **source, **{**ENDS, "max_new_tokens": 2})
    assert not lines


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"attention_mask": None}, "no attention mask"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "other inputs"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(5, 9, 32)}, "other inputs"),
    ],
)
def test_encoder_calls_that_are_not_captured(
    changed: dict[str, Any], reason: str, source: dict[str, Tensor], lines: list[str]
) -> None:
    model = capturable_model()
    options = {**source, **ENDS, **changed}
    outputs = [model.generate(**options, cuda_graphs=asked) for asked in (True, False)]
    assert lines[0] == f"encoder not captured, because of {reason}"
    assert torch.equal(*(o if isinstance(o, Tensor) else o.sequences for o in outputs))


def test_flags_are_read_a_step_late_and_more_steps_change_nothing(
    source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = capturable_model()
    expected = captured(model, **source, **ENDS, num_return_sequences=4)
    look = captured_search._Lookout.look

    def look_late(lookout: Any, num_flags: int) -> Any:
        flags = look(lookout, num_flags)
        lookout.num_looks = getattr(lookout, "num_looks", 0) + 1
        return flags if lookout.num_looks % 4 == 0 else None

    monkeypatch.setattr(captured_search._Lookout, "look", look_late)
    assert torch.equal(captured(model, **source, **ENDS, num_return_sequences=4), expected)


def test_calls_of_other_sizes_and_numbers_of_beams_take_turns(source: dict[str, Tensor]) -> None:
    model = capturable_model()
    few = {name: tensor[:2, :5] for name, tensor in source.items()}
    many = {name: tensor.repeat(2, 3) for name, tensor in source.items()}
    for _ in range(2):
        for inputs in (few, source, many, few):
            for num_beams in (1, 2, 4):
                options = {**inputs, **ENDS, "num_beams": num_beams}
                assert torch.equal(captured(model, **options), stepwise(model, **options)), (num_beams, inputs)


def test_changed_weights_count_and_others_make_other_graphs(
    source: dict[str, Tensor], recorders: list[TapeRecorder]
) -> None:
    model = capturable_model()
    captured(model, **source, **ENDS)
    with torch.no_grad():  # as an optimizer does
        model.model.decoder.layers[0].self_attn.q_proj.weight.mul_(-1.0)
    assert torch.equal(captured(model, **source, **ENDS), of_transformers(model, **source, **ENDS))
    assert len(recorders) == 1
    model.double().float()
    captured(model, **source, **ENDS)
    assert len(recorders) == 2 and recorders[0].num_forgotten == 1
    model.set_experts_implementation("batched_mm")
    model.config.num_experts_per_tok = 2
    assert torch.equal(captured(model, **source, **ENDS), of_transformers(model, **source, **ENDS))
    assert len(recorders) == 3


@pytest.mark.parametrize("num_beams", [1, 4])
def test_what_is_set_on_layers_and_strides_count(num_beams: int, source: dict[str, Tensor]) -> None:
    model = capturable_model()
    options = {**source, **ENDS, "num_beams": num_beams}
    for _ in range(2):
        captured(model, **options)
    layer = model.model.decoder.layers[0]
    router = next(module for module in model.model.decoder.modules() if hasattr(module, "top_k"))
    for change in (
        lambda: setattr(router, "top_k", 2),
        lambda: setattr(layer.self_attn, "scaling", 3.0),
        lambda: layer.self_attn.q_proj.weight.data.t_(),
    ):
        change()
        expected = of_transformers(model, **options) if num_beams > 1 else stepwise(model, **options)
        assert torch.equal(captured(model, **options), expected)


@pytest.mark.parametrize("is_captured", [True, False])
def test_options_of_one_layer_that_batches_matter_for(
    is_captured: bool, source: dict[str, Tensor], recorders: list[TapeRecorder]
) -> None:
    """A search that drops or adds sentences would change what the others become."""
    model = capturable_model()
    for module in model.modules():
        if hasattr(module, "eval_capacity_factor"):
            module.eval_capacity_factor = 0.5
    options = {**source, **ENDS, "max_new_tokens": 30}
    torch.manual_seed(0)  # of the tokens that have no room
    expected = of_transformers(model, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**options, cuda_graphs=is_captured), expected)
    assert not recorders


def test_assistant_models(source: dict[str, Tensor]) -> None:
    """The assistant's options are a copy, without the graphs of the model that it assists."""
    model, assistant = capturable_model(), capturable_model(seed=1)
    options = {name: tensor[:1] for name, tensor in source.items()} | {"max_new_tokens": 10, "num_beams": 1}
    expected = stepwise(model, **options)
    for _ in range(2):
        assert torch.equal(captured(model, **options, assistant_model=assistant), expected)


def test_graphs_are_not_part_of_the_model(
    source: dict[str, Tensor], recorders: list[TapeRecorder], tmp_path: Any
) -> None:
    model = capturable_model()
    expected = captured(model, **source, **ENDS)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(captured(again, **source, **ENDS), expected)
    assert len(recorders) == 3


def test_a_model_that_is_gone_takes_its_graphs_along(
    source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(TapeRecorder):
        """As CUDA graphs, which do not know what they were made of."""

        def record(self, call: Any) -> Any:
            return None, lambda: None

    monkeypatch.setattr(graph_store, "new_recorder", Forgetful)
    model = capturable_model()
    captured(model, **source, **ENDS)
    store = weakref.ref(store_of(model))
    del model
    gc.collect()
    assert store() is None


def test_few_graphs_are_kept(
    source: dict[str, Tensor], recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_store, "MAX_GRAPHS", 2)
    model = capturable_model()
    for _ in range(3):
        for size in (5, 3, 1):
            inputs = {name: tensor[:size] for name, tensor in source.items()}
            assert torch.equal(captured(model, **inputs, **ENDS), of_transformers(model, **inputs, **ENDS))
    assert len(store_of(model)._graphs) == 2
    assert recorders[0].num_recorded > 6


def test_ladders() -> None:
    assert [rung(number) for number in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [rung(number, 16) for number in (1, 17, 33, 48, 49, 65, 97)] == [16, 32, 48, 48, 64, 96, 128]
    assert [power_of_two(number, 32) for number in (1, 32, 33, 200)] == [32, 32, 64, 256]


def test_in_inference_mode_and_out_of_it(source: dict[str, Tensor]) -> None:
    model = capturable_model()
    expected = of_transformers(model, **source, **ENDS)
    with torch.inference_mode():
        assert torch.equal(captured(model, **source, **ENDS), expected)
    assert torch.equal(captured(model, **source, **ENDS), expected)
    *_, graphed = store_of(model).memories.values()
    tensors = [tensor for layer in (*graphed.memory.of_source, *graphed.own(32)) for tensor in layer]
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)


def test_threads_take_turns(source: dict[str, Tensor]) -> None:
    model = capturable_model()
    inputs = [{**source, "input_ids": source["input_ids"].roll(shift, 1)} for shift in range(3)]
    expected = [of_transformers(model, **one, **ENDS) for one in inputs]
    outputs: list[list[Tensor]] = [[], [], []]

    def work(number: int) -> None:
        for _ in range(3):
            outputs[number].append(captured(model, **inputs[number], **ENDS))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected[n]) for n in range(3) for output in outputs[n])
    assert [len(output) for output in outputs] == [3, 3, 3]


def test_a_device_that_is_full_may_have_room_again(
    source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    recorder = TapeRecorder([torch.OutOfMemoryError("no room")])
    monkeypatch.setattr(graph_store, "new_recorder", lambda: recorder)
    model = capturable_model()
    expected = of_transformers(model, **source, **ENDS)
    for _ in range(3):
        assert torch.equal(captured(model, **source, **ENDS), expected)
    assert len(said) == 1 and "no room" in said[0] and said[0].startswith("the search is not captured")
    assert recorder.num_forgotten == 1 and recorder.num_recorded > 1
    assert not store_of(model).refusals


@pytest.mark.parametrize("num_failures", [1, graph_store.MAX_FAILURES])
def test_a_recording_that_fails_is_tried_again(
    num_failures: int, source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    recorder = TapeRecorder([RuntimeError("another thread waits")] * num_failures)
    monkeypatch.setattr(graph_store, "new_recorder", lambda: recorder)
    model = capturable_model()
    expected = of_transformers(model, **source, **ENDS)
    for _ in range(num_failures + 4):
        assert torch.equal(captured(model, **source, **ENDS), expected)
    is_over = num_failures == graph_store.MAX_FAILURES
    assert recorder.num_forgotten == num_failures
    assert {*store_of(model).refusals} == ({"search"} if is_over else set())
    assert len(said) == is_over and all("another thread waits" in text for text in said)
    assert recorder.num_replayed > 0  # of the encoder at least


def test_a_search_whose_encoder_cannot_be_recorded(
    source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: False)  # then a mask is looked at
    model = capturable_model()
    expected = of_transformers(model, **source, **ENDS)
    for _ in range(graph_store.MAX_FAILURES + 3):
        assert torch.equal(captured(model, **source, **ENDS), expected)
    assert len(said) == 1 and said[0].startswith("the encoder is not captured as a CUDA graph")
    assert {*store_of(model).refusals} == {"encoder"}
    assert store_of(model).recorder.num_replayed > 0


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        ({}, {"do_sample": True, "num_beams": 1}, "sampling"),
        ({}, {"no_repeat_ngram_size": 2}, "processors of logits"),
        ({}, {"forced_eos_token_id": [2, 3]}, "processors of logits"),
        ({}, {"max_time": 1000.0}, "stopping criteria"),
        ({}, {"output_scores": True, "return_dict_in_generate": True}, "scores of all words"),
        ({}, {"decoder_input_ids": torch.tensor([[2, 1, 12]] * 5)}, "padding in prompts"),
        ({"max_position_embeddings": 16}, {}, "more tokens than positions"),
        ({"position_embedding_type": "tupe"}, {}, "untied positions"),
        ({"experts_implementation": "eager"}, {}, "experts that wait for the device"),
        ({"experts_implementation": "grouped_mm"}, {}, "experts that wait for the device"),  # but in bfloat16
        ({}, {"num_beams": 1, "return_dict_in_generate": True}, "return_dict_in_generate"),
    ],
)
def test_what_it_does_not_have_goes_to_transformers(
    overrides: dict[str, Any], options: dict[str, Any], reason: str, source: dict[str, Tensor], lines: list[str]
) -> None:  # fmt: skip
    model = capturable_model(**overrides)
    options = {**source, **ENDS, **options}
    if "max_position_embeddings" in overrides:
        options |= {"eos_token_id": list(range(2, 90))}  # or it would get there
    torch.manual_seed(1)
    output = captured(model, **options)
    assert lines[-1].endswith(f"because of {reason}")
    store = store_of(model)
    assert store == reason or {*store.memories} <= {("encoder",)}
    torch.manual_seed(1)
    expected = stepwise(model, **options)
    assert torch.equal(*(o if isinstance(o, Tensor) else o.sequences for o in (output, expected)))


def test_layers_of_others_and_parts_in_training(source: dict[str, Tensor], lines: list[str]) -> None:
    class Adapted(nn.Linear):
        """Of a user."""

    model = capturable_model()
    layer = model.model.decoder.layers[0]
    layer.train()
    captured(model, **source, **ENDS)
    layer.eval().final_layer_norm.compile(backend="eager")
    captured(model, **source, **ENDS)
    layer.final_layer_norm = nn.LayerNorm(32).eval()
    layer.self_attn.q_proj = Adapted(32, 32).eval()
    captured(model, **source, **ENDS)
    reasons = [line.rpartition("because of ")[2] for line in lines if not line.startswith("encoder")]
    assert reasons == ["training mode", "compiled parts", "layers of another package"]


def test_numbers_that_are_not_numbers_are_refused(source: dict[str, Tensor]) -> None:
    model = capturable_model()
    weight = model.model.decoder.layers[0].self_attn.v_proj.weight
    value = weight[5, 5].item()
    for _ in range(2):
        nn.init.constant_(weight[5:6, 5:6], torch.nan)
        with pytest.raises(ValueError, match=r"logits became NaN|NaN or infinity in the logits of"):
            captured(model, **source, **ENDS)
    nn.init.constant_(weight[5:6, 5:6], value)  # keys that nobody attends to must be numbers, too
    assert torch.equal(captured(model, **source, **ENDS), of_transformers(model, **source, **ENDS))


def test_the_option(source: dict[str, Tensor], recorders: list[TapeRecorder], tmp_path: Any) -> None:
    model = capturable_model()
    model.generate(**source, **ENDS, cuda_graphs=False)
    assert not recorders
    with pytest.raises(ValueError, match=r"cuda_graphs \('yes'\) must be True, False or None"):
        model.generate(**source, **ENDS, cuda_graphs="yes")
    model.generation_config.cuda_graphs = False
    model.generate(**source, **ENDS)
    assert not recorders
    model.save_pretrained(tmp_path)
    model.generation_config.cuda_graphs = None  # as it is by itself
    again = type(model).from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert torch.equal(again.generate(**source, **ENDS), model.generate(**source, **ENDS))
    assert len(recorders) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 4])
def test_with_the_kernels_of_gpus(num_beams: int, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """In Triton's interpreter, whose work no tape records."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")

    class Again(TapeRecorder):
        def record(self, call: Any) -> Any:
            self.num_recorded += 1
            return None, call

    monkeypatch.setattr(graph_store, "new_recorder", Again)
    monkeypatch.setattr(decoding_step, "KERNEL_DEVICES", ("cpu",))
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=1100,
        d_model=64,
        init_std=0.5,
        tie_word_embeddings=False,
        scale_embedding=False,
        encoder_layers=1,
        experts_implementation="batched_mm",
    )
    model = ZCodeM3ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 1100, (2, 7))
    ids[1, 4:] = 1
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 1).long(), "num_beams": num_beams}
    with torch.no_grad():
        model.lm_head.weight[2:4] *= 3.0  # so that some sentences end
    options |= {"max_new_tokens": 5, "eos_token_id": [2, 3], "forced_bos_token_id": 9, "min_new_tokens": 2}
    expected = stepwise(model, **options)
    assert torch.equal(captured(model, **options), expected)
    assert not lines
    assert store_of(model).num_recorded == 1


def test_training_mode_frees_the_memory(source: dict[str, Tensor], recorders: list[TapeRecorder]) -> None:
    model = capturable_model()
    captured(model, **source, **ENDS)
    store = weakref.ref(store_of(model))
    model.eval()
    assert store_of(model) is store()
    model.train()
    gc.collect()
    assert store() is None
    assert torch.equal(captured(model.eval(), **source, **ENDS), of_transformers(model, **source, **ENDS))
    assert len(recorders) == 2


def test_training_mode_can_be_set_in_compiled_code() -> None:
    model = capturable_model()

    def in_training_mode(number: Tensor) -> Tensor:
        model.train()
        return number + 1

    assert torch.compile(in_training_mode, backend="eager", fullgraph=True)(torch.ones(1)).item() == 2
    assert model.training
