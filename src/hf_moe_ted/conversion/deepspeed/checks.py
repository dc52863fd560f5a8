"""Find errors in a DeepSpeed checkpoint from names and shapes alone."""

from collections import Counter, defaultdict

from .contents import Contents, MainFile, meta, parse_expert_name
from .files import list_names


def check_contents(contents: Contents) -> None:
    """Add to `contents.problems` everything that is missing or does not fit, and fill `contents.lost`."""
    if contents.files.has_zero3:
        return
    _check_main_files(contents)
    for mp_rank, main in contents.mains.items():
        _check_trained_parameters(contents, mp_rank, main)
        _check_optimizer_shapes(contents, main)
    _check_num_experts(contents)
    _check_expert_shapes(contents)
    _check_expert_ranks(contents)


def _check_main_files(contents: Contents) -> None:
    """Check that all model-parallel ranks have files, and that those of one stage hold the same names."""
    files, tp = contents.files, contents.tensor_parallel_size
    ranks = {*files.mains, *(mp_rank for mp_rank, _ in files.experts), *(mp_rank for mp_rank, _ in files.zero)}
    ranks.update(range(tp * contents.pipeline_parallel_size))
    missing = sorted({*range(max(ranks, default=0) + 1)} - files.mains.keys())
    if missing:
        _add_missing_main_files(contents, missing, max(ranks, default=0) + 1)
    if max(ranks, default=0) >= tp * contents.pipeline_parallel_size:
        contents.add(
            f"{files.folder} has files of mp_rank {max(ranks)}, but its main files say "
            f"{contents.pipeline_parallel_size} pipeline stage(s) of {tp} tensor-parallel rank(s); "
            "remove the files that are not from this run"
        )
    for mp_rank, main in contents.mains.items():
        first = contents.mains.get(contents.first_of_stage(mp_rank))
        if first is not None and first.shards.keys() != main.shards.keys():
            names = sorted(first.shards.keys() ^ main.shards.keys())
            contents.add(
                f"{first.path} and {main.path.name} are of one pipeline stage, but only one of them has "
                f"{list_names(names)}; one of the files is not from this run"
            )


def _add_missing_main_files(contents: Contents, missing: list[int], num_ranks: int) -> None:
    names = list_names([f"mp_rank_{mp_rank:02d}_model_states.pt" for mp_rank in missing])
    text = f"{contents.files.folder} has {num_ranks - len(missing)} of {num_ranks} main files: {names} missing. "
    text += (
        "DeepSpeed itself never writes them if the tensor-parallel group is larger than the expert-parallel group "
        "and the experts are not tensor parallel. "
    )
    if not can_masters_replace(contents, missing):
        contents.add(text + "No other file holds these weights; look for the files, or for another tag")
        return
    for mp_rank in missing:
        first = contents.mains[contents.first_of_stage(mp_rank)]
        for name in [name for name in first.shards if name not in first.buffer_names]:
            contents.lost.setdefault(name, {})[mp_rank] = meta(first.shards[name].spec.shape)
    contents.add(
        text + "The fp32 masters of ZeRO hold these weights: weights='master' reads them (buffers have no master and "
        "are taken from a rank whose file exists)",
        masters_help=True,
    )


def can_masters_replace(contents: Contents, missing: list[int]) -> bool:
    """Whether ZeRO's files hold all parameters of these ranks' main files, so that none is frozen."""
    with_masters = {mp_rank for mp_rank, _ in contents.files.zero}
    for mp_rank in missing:
        first = contents.mains.get(contents.first_of_stage(mp_rank))
        if mp_rank not in with_masters or first is None or first.param_shapes is None:
            return False
        known = first.param_shapes.keys() | first.shared_params.keys() | first.buffer_names
        if any(name not in known for name in first.shards):
            return False
    return True


def _check_trained_parameters(contents: Contents, mp_rank: int, main: MainFile) -> None:
    """Check that parameters that ZeRO trains are among the weights, in the same shape."""
    lost: dict[str, tuple[int, ...]] = {}
    local_experts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, shape in (main.param_shapes or {}).items():
        expert = parse_expert_name(name)
        if expert is not None:
            local_experts[expert.module][expert.param] += 1
            continue
        if name in main.shards:
            found = tuple(main.shards[name].spec.shape)
            if found != shape:
                contents.add(f"{name} has the shape {found} in {main.path}, but was trained with the shape {shape}")
        elif name.rpartition(".")[2] not in ("w1", "w2", "w3"):  # AutoEP trains its experts as three stacked tensors
            lost[name] = shape
    if not lost:
        return
    has_masters = any(rank == mp_rank for rank, _ in contents.files.zero)
    for name, shape in lost.items():
        contents.lost.setdefault(name, {})[mp_rank] = meta(shape)
    contents.add(
        f"{main.path} lacks {list_names(list(lost))}, which were trained. {_lost_residual_hint(list(lost))}"
        + ("ZeRO's fp32 masters hold them: weights='master' reads them" if has_masters else "No other file holds them"),
        has_masters,
    )


def _lost_residual_hint(names: list[str]) -> str:
    if any("expert" in name for name in names):
        return (
            "DeepSpeed loses the residual branch (mlp and coefficient) of an MoE module whose own name contains "
            "'expert'. "
        )
    return ""


def _check_optimizer_shapes(contents: Contents, main: MainFile) -> None:
    """Without ZeRO the optimizer has no names, but its shapes show whether a weight is missing or has another shape."""
    shapes = Counter(tuple(shard.spec.shape) for shard in main.shards.values())
    lost = main.optimizer_shapes - shapes
    if lost:
        modules = [module for module in main.num_experts if "expert" in module]
        contents.add(
            f"{main.path} lacks {sum(lost.values())} tensors that were trained, with the shapes "
            f"{list_names(sorted(lost.elements()))}. {_lost_residual_hint(modules)}"
            + (f"Modules with such a name: {list_names(modules)}. " if modules else "")
            + "Without ZeRO no other file holds them; rename the module and train again, or look for another tag"
        )


def _check_num_experts(contents: Contents) -> None:
    """Check that every module has all of its experts, and every expert all of its tensors."""
    found: dict[str, dict[int, set[str]]] = {module: {} for module in contents.num_experts}
    for name in contents.experts:
        if expert := parse_expert_name(name):
            found.setdefault(expert.module, {}).setdefault(expert.expert, set()).add(expert.param)
    for module, params in found.items():
        if module not in contents.num_experts:
            contents.add(
                f"{contents.files.folder} has experts of {module}, which the main files do not mention; the files are "
                "not from one run"
            )
            continue
        num_experts = contents.num_experts[module]
        missing = sorted({*range(num_experts)} - params.keys())
        if missing:
            contents.add(
                f"{contents.files.folder} lacks expert {list_names(missing)} of {module}, which has {num_experts}; "
                "find the file layer_*_expert_{id}_mp_rank_*_model_states.pt, or another tag"
            )
        if unknown := sorted(params.keys() - {*range(num_experts)}):
            contents.add(
                f"{contents.files.folder} has expert {list_names(unknown)} of {module}, which has only {num_experts}; "
                "remove the files that are not from this run"
            )
        everything = set().union(*params.values())
        for expert_id, present in params.items():
            if everything - present:
                contents.add(f"expert {expert_id} of {module} lacks {list_names(sorted(everything - present))}")


def _check_expert_shapes(contents: Contents) -> None:
    """Check that the experts of a module have the same shapes, and those that were trained."""
    first: dict[tuple[str, str], tuple[str, object]] = {}
    for main in contents.mains.values():
        for name, shape in (main.param_shapes or {}).items():
            if expert := parse_expert_name(name):
                first[expert.module, expert.param] = (f"{name}, as it was trained,", shape)
    for name, by_rank in contents.experts.items():
        expert = parse_expert_name(name)
        for shard in by_rank.values():
            shape = tuple(shard.spec.shape)
            key = (expert.module, expert.param) if expert else ("", name)
            other, other_shape = first.setdefault(key, (name, shape))
            if shape != other_shape:
                contents.add(f"{name} has the shape {shape} in {shard.path}, but {other} has {other_shape}")
    dtypes = {name: {shard.spec.dtype for shard in by_rank.values()} for name, by_rank in contents.shards.items()}
    by_module: dict[tuple[str, str], set[object]] = defaultdict(set)
    for name, found in dtypes.items():
        expert = parse_expert_name(name)
        by_module[(expert.module, expert.param) if expert else ("", name)] |= found
    for (module, param), found_dtypes in by_module.items():
        if len(found_dtypes) > 1:
            contents.add(f"{module} {param} has several dtypes: {list_names(sorted(map(str, found_dtypes)))}".strip())


def _check_expert_ranks(contents: Contents) -> None:
    """Check that an expert is whole in one file, or has one shard for each tensor-parallel rank."""
    tp = contents.tensor_parallel_size
    if tp == 1 or not contents.experts:
        return
    ranks_of_stage: dict[int, set[int]] = defaultdict(set)
    for by_rank in contents.experts.values():
        for mp_rank in by_rank:
            ranks_of_stage[contents.stage(mp_rank)].add(mp_rank)
    is_sharded = any(len(by_rank) > 1 for by_rank in contents.experts.values())
    for name, by_rank in contents.experts.items():
        stages = {contents.stage(mp_rank) for mp_rank in by_rank}
        expected = tp * len(stages) if is_sharded else 1
        if len(by_rank) != expected:
            missing = sorted(set().union(*(ranks_of_stage[stage] for stage in stages)) - by_rank.keys())
            contents.add(
                f"{name} has {len(by_rank)} of {expected} tensor-parallel shards in {contents.files.folder}: "
                f"the file of mp_rank {list_names(missing)} is missing"
            )
    for stage, ranks in ranks_of_stage.items():
        # Without expert tensor parallelism a rank that wrote a main file wrote its own experts too.
        without = [rank for rank in contents.mains if contents.stage(rank) == stage and rank not in ranks]
        if without:
            contents.add(
                f"{contents.files.folder} has no experts of mp_rank {list_names(without)}, only of "
                f"{list_names(sorted(ranks))}; files layer_*_expert_*_mp_rank_* are missing"
            )


__all__ = ["can_masters_replace", "check_contents"]
