"""The content of a DeepSpeed checkpoint's files: names, shapes and ranks, and what does not fit together.

A *shard* is the part of a tensor that one model-parallel rank stores. That rank counts pipeline stages and, inside one,
tensor-parallel ranks: `mp_rank = stage * tensor_parallel_size + tensor_parallel_rank`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.messages import UnreadableFileError, shorten
from .files import MAX_RANKS, CheckpointFiles, FilePool, content_errors, load_file

MAX_EXPERTS = 2**20
MAX_NAME_CHARS = 1_000

_NATIVE_EXPERT = re.compile(
    r"(?P<module>.*?)\.?deepspeed_moe\.experts\.deepspeed_experts\.(?P<expert>\d+)\.(?P<param>.+)"
)
_AUTOEP_EXPERT = re.compile(r"(?P<module>.*)\.experts\.(?P<param>w[123])\.(?P<expert>\d+)")
_GATE = re.compile(r"(?P<module>.*?)\.?deepspeed_moe\.gate\.wg\.weight")


@dataclass(frozen=True)
class ExpertName:
    """The name of a tensor of one expert: `layers.1.mlp`, 3, `fc1.weight`."""

    module: str
    expert: int
    param: str


def parse_expert_name(name: str) -> ExpertName | None:
    """The parts of an expert's name, native or of AutoEP; `None` for other names."""
    match = _NATIVE_EXPERT.fullmatch(name) or _AUTOEP_EXPERT.fullmatch(name)
    return match and ExpertName(match["module"], int(match["expert"]), match["param"])


def replace_expert(name: str, expert: int) -> str:
    """The name of the same tensor of another native expert."""
    start, end = _NATIVE_EXPERT.fullmatch(name).span("expert")  # type: ignore[union-attr]
    return f"{name[:start]}{expert}{name[end:]}"


@dataclass(frozen=True)
class Shard:
    """The place of one rank's part of a tensor.

    Attributes:
        path: the file.
        keys: the keys that lead to the tensor through nested dicts.
        spec: its shape and dtype, on the meta device.
    """

    path: Path
    keys: tuple[str, ...]
    spec: Tensor

    def view(self, pool: FilePool) -> Tensor:
        """The tensor in mapped memory.

        Raises:
            ValueError: the file cannot be read, or has changed.
        """
        tensor = pool.view(self.path, self._select)
        if tensor.shape != self.spec.shape or tensor.dtype != self.spec.dtype:
            raise ValueError(f"{self.path} has changed since the checkpoint was opened; open it again")
        return tensor

    def _select(self, content: Any) -> Tensor:
        for key in self.keys:
            content = content[key]
        return content


@dataclass(frozen=True)
class Problem:
    """Something that does not fit, and whether `weights="master"` can still read the checkpoint."""

    text: str
    masters_help: bool = False


@dataclass(frozen=True)
class MainFile:
    """`mp_rank_*_model_states.pt` without its tensors.

    Attributes:
        shards: the weights outside of experts.
        num_experts: number of experts of each MoE module, in order, as far as the file says so.
        param_shapes: shapes of the parameters that ZeRO trains; experts have the local ids of data-parallel rank 0.
            `None` without ZeRO.
        optimizer_shapes: shapes of the trained parameters outside of experts, if there is no ZeRO and the optimizer has
            them.
        buffer_names, shared_params: as in the file; `shared_params` maps a tied name to the name that is trained.
        tensor_parallel_size, pipeline_parallel_size: 0 where the file does not say.
        model_parallel_size: `mp_world_size`. DeepSpeed's own pipelines count stages in it; others may not.
        data_parallel_size: replicas of this model-parallel rank; 0 where the file does not say.
        zero_stage: 0 without ZeRO.
        is_data_before_expert: whether neighbouring ranks hold the same experts.
        deepspeed_version: empty where the file does not say.
    """

    path: Path
    shards: dict[str, Shard]
    num_experts: dict[str, int]
    param_shapes: dict[str, tuple[int, ...]] | None
    optimizer_shapes: "Counter[tuple[int, ...]]"
    buffer_names: frozenset[str]
    shared_params: dict[str, str]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    model_parallel_size: int
    data_parallel_size: int
    zero_stage: int
    is_data_before_expert: bool
    deepspeed_version: str


def meta(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _flatten(
    path: Path, values: Mapping[Any, Any], keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, Shard]]:
    """The tensors of nested dicts; Megatron nests those of its language model. No dict is visited twice (`seen`)."""
    if id(values) in seen:
        raise UnreadableFileError(f"{path} has one dict of weights in two places ({'.'.join(keys)}); it is damaged")
    seen.add(id(values))
    for key, value in values.items():
        if isinstance(value, Tensor | Mapping):
            name = ".".join([*keys[1:], _checked_name(path, key)])
            if isinstance(value, Tensor):
                yield _checked_name(path, name), Shard(path, (*keys, key), meta(value.shape, value.dtype))
            else:
                yield from _flatten(path, value, (*keys, key), seen)


def _checked_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
        raise UnreadableFileError(
            f"{path} has a weight of the name {shorten(name, 80)}; it must be a string of at most {MAX_NAME_CHARS:,} "
            "characters"
        )
    return name


def _count(name: str, value: Any, most: int = MAX_RANKS) -> int:
    """A number of ranks or experts; 0 if the file does not say it.

    Raises:
        ValueError: it is no number, is negative, or is too large.
    """
    count = 0 if value is None else value
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
        shown = shorten(repr(value) if isinstance(value, str) else value, 80)
        raise ValueError(f"{name} is {shown}, which must be a number from 0 to {most:,}")
    return count


def read_main_file(path: Path) -> MainFile:
    """Read everything in a main file except the tensors.

    Raises:
        ValueError: it is unreadable, or not a file of DeepSpeed's MoE engine.
    """
    content = load_file(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("module"), Mapping):
        raise UnreadableFileError(
            f"{path} has no weights under 'module'; the DeepSpeed engine of a model with MoE writes them"
        )
    with content_errors(path, "a main file"):
        # Megatron's own state_dict still holds experts under ids local to the rank; the expert files are right.
        module = _flatten(path, content["module"], ("module",), set())
        shards = {name: shard for name, shard in module if "deepspeed_experts." not in name}
        config = _mapping(content.get("ds_config"))
        zero = _mapping(config.get("zero_optimization"))
        degrees = _mapping(content.get("checkpoint_parallel_dimensions"))
        shapes = content.get("param_shapes")
        return MainFile(
            path=path,
            shards=shards,
            num_experts=_read_num_experts(path, content, shards),
            param_shapes=None if not shapes else {str(n): _shape(s) for group in shapes for n, s in group.items()},
            optimizer_shapes=_read_optimizer_shapes(content.get("optimizer")),
            buffer_names=frozenset(content.get("buffer_names") or ()),
            shared_params=dict(content.get("shared_params") or {}),
            tensor_parallel_size=_count("tp_degree", degrees.get("tp_degree")),
            pipeline_parallel_size=_count("pp_degree", degrees.get("pp_degree")),
            model_parallel_size=_count("mp_world_size", content.get("mp_world_size")),
            data_parallel_size=_count("dp_world_size", content.get("dp_world_size")),
            zero_stage=_count("the stage of ZeRO", zero.get("stage"), 3),
            is_data_before_expert=bool(config.get("use_data_before_expert_parallelism")),
            deepspeed_version=shorten(str(content.get("ds_version") or ""), 80),
        )


def _shape(sizes: Any) -> tuple[int, ...]:
    shape = tuple(map(int, sizes))
    if any(size < 0 for size in shape):
        raise ValueError(f"a parameter has the shape {shape}")
    meta(shape)  # these numbers can be counted
    return shape


def _read_num_experts(path: Path, content: Mapping[str, Any], shards: Mapping[str, Shard]) -> dict[str, int]:
    gates = {
        match["module"]: _count(name, shard.spec.shape[0], MAX_EXPERTS)
        for name, shard in shards.items()
        if (match := _GATE.fullmatch(name))
    }
    listed = content.get("num_experts")
    counts = [listed] * len(gates) if isinstance(listed, int) else listed
    autoep = {
        _checked_name(path, layer["module_path"]): _count("num_experts", layer["num_experts"], MAX_EXPERTS)
        for layer in content.get("ds_autoep_layers") or ()
    }
    if gates and not autoep and counts is not None and list(gates.values()) != list(counts):
        raise UnreadableFileError(
            f"{path} lists {shorten(listed)} experts (num_experts), but its gates have {list(gates.values())} "
            f"({', '.join(gates)}); the file is damaged"
        )
    return {**gates, **autoep}


def _read_optimizer_shapes(optimizer: Any) -> "Counter[tuple[int, ...]]":
    """Shapes of the parameters in groups without experts, from fp32 copies or from moments."""
    if not isinstance(optimizer, Mapping):
        return Counter()
    base = optimizer.get("optimizer_state_dict", optimizer)
    shapes: Counter[tuple[int, ...]] = Counter()
    masters = optimizer.get("fp32_groups")
    groups = base.get("param_groups", ())
    if not any(group.get("moe") for group in groups):  # the others have experts among them
        return shapes
    for index, group in enumerate(groups):
        if group.get("moe"):
            continue
        if masters:
            shapes.update(tuple(tensor.shape) for tensor in masters[index])
        elif "optimizer_state_dict" not in optimizer:
            states = [base["state"].get(number, {}) for number in group["params"]]
            moments = [state.get("exp_avg", state.get("momentum_buffer")) for state in states]
            shapes.update(tuple(moment.shape) for moment in moments if moment is not None)
    return shapes


@dataclass
class Contents:
    """A checkpoint without its tensors.

    Attributes:
        files: its files.
        mains: the main files by model-parallel rank.
        dense: shards of the weights outside of experts, by name and model-parallel rank.
        experts: the same for experts, under global ids.
        lost: parameters that are trained but in no file of weights, by name and model-parallel rank.
        num_experts: name of each MoE module -> number of experts.
        tensor_parallel_size, pipeline_parallel_size: factors of the number of model-parallel ranks.
        problems: what does not fit.
    """

    files: CheckpointFiles
    mains: dict[int, MainFile] = field(default_factory=dict)
    dense: dict[str, dict[int, Shard]] = field(default_factory=dict)
    experts: dict[str, dict[int, Shard]] = field(default_factory=dict)
    lost: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    num_experts: dict[str, int] = field(default_factory=dict)
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    problems: list[Problem] = field(default_factory=list)

    @property
    def shards(self) -> dict[str, dict[int, Shard]]:
        """All shards by name and model-parallel rank, in the order to read them in."""
        return {**self.dense, **self.experts}

    def stage(self, mp_rank: int) -> int:
        """The pipeline stage of a model-parallel rank."""
        return mp_rank // self.tensor_parallel_size

    def first_of_stage(self, mp_rank: int) -> int:
        """The first model-parallel rank in the pipeline stage of a given rank."""
        return self.stage(mp_rank) * self.tensor_parallel_size

    def add(self, text: str, masters_help: bool = False) -> None:
        """Note a problem."""
        self.problems.append(Problem(text, masters_help))


def read_contents(files: CheckpointFiles) -> Contents:
    """Open every file of weights once, without reading a tensor. Errors become `Contents.problems`."""
    contents = Contents(files)
    if files.has_zero3:
        contents.add(
            f"{files.folder} was written by ZeRO-3, which DeepSpeed's own MoE layers do not support. Partitioned "
            "weights are not read here; gather them with DeepSpeed and save again under ZeRO 0, 1 or 2"
        )
        return contents
    for mp_rank, path in files.mains.items():
        try:
            contents.mains[mp_rank] = read_main_file(path)
        except ValueError as error:
            contents.add(str(error))
    for main in contents.mains.values():
        contents.num_experts.update(main.num_experts)
    _set_parallel_sizes(contents)
    for mp_rank, main in contents.mains.items():
        for name, shard in main.shards.items():
            contents.dense.setdefault(name, {})[mp_rank] = shard
    for mp_rank, path in files.experts:
        try:
            _add_expert_file(contents, mp_rank, path)
        except ValueError as error:
            contents.add(str(error))
    return contents


def _set_parallel_sizes(contents: Contents) -> None:
    """Set tensor and pipeline parallel sizes from the files, or else from tensor names: stages share few names."""
    if not contents.mains:
        return
    first = contents.mains[min(contents.mains)]
    tp = first.tensor_parallel_size or first.model_parallel_size
    same = [mp_rank for mp_rank, main in contents.mains.items() if main.shards.keys() == first.shards.keys()]
    if not first.tensor_parallel_size and (not tp or any(rank < tp and rank not in same for rank in contents.mains)):
        tp = len(same)
    num_ranks = 1 + max([*contents.files.mains, *(mp_rank for mp_rank, _ in contents.files.experts)])
    num_ranks = max(num_ranks, first.model_parallel_size)
    stages = first.pipeline_parallel_size or -(-num_ranks // tp)
    if tp * stages > MAX_RANKS:
        contents.add(
            f"{first.path} says {stages} pipeline stages of {tp} ranks each, more than any cluster has; the file is "
            "damaged"
        )
        tp, stages = 1, num_ranks
    contents.tensor_parallel_size, contents.pipeline_parallel_size = tp, stages


def _add_expert_file(contents: Contents, mp_rank: int, path: Path) -> None:
    content = load_file(path)
    if not isinstance(content, Mapping):
        raise UnreadableFileError(f"{path} is not a dict of tensors by name")
    with content_errors(path, "a file of experts"):
        for name, tensor in content.items():
            if isinstance(tensor, Tensor):  # AutoEP adds a description under tensor parallelism
                _add_expert_tensor(contents, mp_rank, path, _checked_name(path, name), tensor)


def _add_expert_tensor(contents: Contents, mp_rank: int, path: Path, name: str, tensor: Tensor) -> None:
    if parse_expert_name(name) is None:
        raise UnreadableFileError(
            f"{path} holds {name}, which belongs to no expert; the file is not from DeepSpeed, or damaged"
        )
    shards = contents.experts.setdefault(name, {})
    if mp_rank not in shards:
        shards[mp_rank] = Shard(path, (name,), meta(tensor.shape, tensor.dtype))
    elif not torch.equal(load_file(shards[mp_rank].path)[name], tensor):
        raise UnreadableFileError(
            f"{name} is in {shards[mp_rank].path.name} and in {path.name} of {path.parent} with different values; "
            "remove the file that is not from this run"
        )


__all__ = [
    "Contents",
    "ExpertName",
    "MainFile",
    "Problem",
    "Shard",
    "meta",
    "parse_expert_name",
    "read_contents",
    "read_main_file",
    "replace_expert",
]
