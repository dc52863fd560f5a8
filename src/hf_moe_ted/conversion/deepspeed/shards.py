"""The shards of a DeepSpeed checkpoint, read one at a time: the weights themselves or their fp32 masters."""

import torch
from torch import Tensor

from .contents import Contents, parse_expert_name
from .files import FilePool, list_names
from .zero import HALF_DTYPES, Fragment, Masters, find_masters_by_value, find_zero_masters, rounds_to


class Shards:
    """Tensors by name and model-parallel rank: the weights that the model uses.

    Attributes:
        specs: shapes and dtypes, on the meta device.
    """

    def __init__(self, contents: Contents, pool: FilePool):
        self._contents, self._shards, self._pool = contents, contents.shards, pool
        self.specs = {name: {rank: s.spec for rank, s in ranks.items()} for name, ranks in self._shards.items()}

    def view(self, name: str, mp_rank: int) -> Tensor:
        """One shard. It may be in mapped memory: use it and drop it soon.

        Raises:
            ValueError: the file cannot be read, or does not fit the others.
        """
        return self._shards[name][mp_rank].view(self._pool)


class MasterShards(Shards):
    """The optimizer's fp32 copies of the weights.

    Buffers and frozen parameters have none: their stored values are converted, which is exact.

    Raises:
        ValueError: masters are missing, or cannot be told apart.
    """

    def __init__(self, contents: Contents, pool: FilePool):
        super().__init__(contents, pool)
        self.specs = {name: {rank: _as_master(s) for rank, s in ranks.items()} for name, ranks in self.specs.items()}
        for name, lost in contents.lost.items():
            self.specs.setdefault(name, {}).update(lost)
        self._masters: Masters | None = None
        if contents.files.zero:
            self._masters = find_zero_masters(contents)
            self._add_tied(self._masters)
            self._check_masters(self._masters)
        elif any(main.zero_stage for main in contents.mains.values()):
            raise ValueError(
                f"{contents.files.folder} was written by ZeRO, but its *zero_pp_rank_*_optim_states.pt are missing, "
                "but weights='master' needs them; use weights='model'"
            )
        elif not contents.files.expert_optimizers:
            raise ValueError(
                f"{contents.files.folder} has no expp_rank_*_optim_states.pt, but weights='master' needs them; use "
                "weights='model'"
            )

    def view(self, name: str, mp_rank: int) -> Tensor:
        if self._masters is None:  # this reads all weights, so it waits until a tensor is used
            self._masters = find_masters_by_value(self._contents, self._pool)
        shard = self._shards.get(name, {}).get(mp_rank)
        fragments = self._masters.get(name, {}).get(mp_rank)
        if fragments is None:
            weight = super().view(name, mp_rank)
            return weight.to(_as_master(weight).dtype)
        spec = self.specs[name][mp_rank]
        master = self._join(fragments, spec)
        if shard is not None and not rounds_to(master, shard.view(self._pool)):
            raise ValueError(
                f"the fp32 master of {name} in {list_names([fragment.path.name for fragment in fragments])} does not "
                f"round to the weight in {shard.path}; the files are not from one step, or were swapped"
            )
        return master

    def _join(self, fragments: list[Fragment], spec: Tensor) -> Tensor:
        master = torch.empty(spec.numel(), dtype=spec.dtype)
        for part, fragment in zip(master.split([fragment.numel for fragment in fragments]), fragments, strict=True):
            part.copy_(fragment.view(self._pool))
        return master.view(spec.shape)

    def _add_tied(self, masters: Masters) -> None:
        """Give tied names the master of the trained name; only the first rank's file says which name that is."""
        shared = {k: v for main in self._contents.mains.values() for k, v in main.shared_params.items()}
        for name, owner in shared.items():
            for mp_rank in self.specs.get(name, {}):
                if mp_rank in masters.get(owner, {}):
                    masters.setdefault(name, {}).setdefault(mp_rank, masters[owner][mp_rank])

    def _check_masters(self, masters: Masters) -> None:
        """Check that every trained parameter has a master of its size, and that there are no other masters."""
        folder = self._contents.files.folder
        if unknown := [name for name in masters if name not in self.specs]:
            raise ValueError(
                f"the optimizer files of {folder} have masters of {list_names(unknown)}, which the files of weights "
                "lack; they are not from one run"
            )
        trained = self._trained_names()
        for name, by_rank in self.specs.items():
            for mp_rank, spec in by_rank.items():
                fragments = masters.get(name, {}).get(mp_rank)
                if fragments is None and self._is_trained(name, mp_rank, trained):
                    raise ValueError(
                        f"the optimizer files of {folder} have no master of {name} (mp_rank {mp_rank}), which was "
                        "trained; the files are not from one run, use weights='model'"
                    )
                if fragments is not None and (numel := sum(part.numel for part in fragments)) != spec.numel():
                    raise ValueError(
                        f"the optimizer files of {folder} have {numel} numbers of {name} (mp_rank {mp_rank}), which "
                        f"has {spec.numel()} of the shape {tuple(spec.shape)}; a file is missing or not from this run"
                    )

    def _is_trained(self, name: str, mp_rank: int, trained: set[object] | None) -> bool:
        is_lost = mp_rank in self._contents.lost.get(name, {})
        if trained is not None:
            return is_lost or _without_expert(name) in trained
        may_be = is_lost or self.specs[name][mp_rank].is_floating_point()
        return may_be and name not in self._contents.mains[mp_rank].buffer_names

    def _trained_names(self) -> set[object] | None:
        """Names of the parameters that ZeRO trains, without the ids of experts; `None` if the main files do not say."""
        shapes = [main.param_shapes for main in self._contents.mains.values()]
        if any(shape is None for shape in shapes):
            return None
        return {_without_expert(name) for shape in shapes for name in shape or ()}


def _without_expert(name: str) -> object:
    """A name without the id of the expert."""
    expert = parse_expert_name(name)
    return (expert.module, expert.param) if expert else name


def _as_master(spec: Tensor) -> Tensor:
    """The shape of a weight in the dtype of its master."""
    return torch.empty(spec.shape, dtype=torch.float32 if spec.dtype in HALF_DTYPES else spec.dtype, device="meta")


def open_shards(contents: Contents, pool: FilePool, *, masters: bool) -> Shards:
    """The shards of a checkpoint without problems.

    Raises:
        ValueError: see `MasterShards`.
    """
    is_half = any(s.spec.dtype in HALF_DTYPES for by_rank in contents.shards.values() for s in by_rank.values())
    is_zero = bool(contents.files.zero) or any(main.zero_stage for main in contents.mains.values())
    if masters and (is_half or is_zero):
        return MasterShards(contents, pool)
    return Shards(contents, pool)  # fp32 without ZeRO: the weights are their own masters


__all__ = ["MasterShards", "Shards", "open_shards"]
