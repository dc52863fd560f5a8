"""AdamW whose temporaries do not grow with the model: the step walks every local shard in tiles.

Source: the "tiled optimizer" of https://huggingface.co/papers/2303.06318. A step needs a float32 copy of low-precision
gradients; it is made for one tile at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from .private_torch import count_of_writes, foreach_add_
from .tiles import Tile, split_into_tiles, update_tiles

# The first fits into a CPU's cache. With the second, kernels on a GPU run about as long as Python needs to launch the
# next ones: on an H200 with 2 billion bfloat16 parameters a fused step takes 27 ms; with tiles ten times as large, 25
# ms.
_CPU_TILE_NUMEL = 2**18
_TILE_NUMEL = 2**24
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Cut(NamedTuple):
    """The tiles of a parameter without its gradient, which is a new tensor in every step.

    Attributes:
        sources: master (or `None`) and moments, and
        address: address of the parameter's local shard, and
        of_flat_gradient: whether the gradient was contiguous. The tiles are valid for these three.
        tiles: views of weight, moments, and the parameter if it has a master.
        is_flat: whether all of them are contiguous, so that tiles may cross rows and kernels may be fused.
        stride: stride of the weight.
    """

    sources: tuple[Tensor | None, ...]
    address: int
    of_flat_gradient: bool
    tiles: list[list[Tensor]]
    is_flat: bool
    stride: tuple[int, ...]


class TiledAdamW(Optimizer):
    """AdamW (https://huggingface.co/papers/1711.05101) in tiles, with float32 masters of low-precision parameters.

    Parameters and gradients may be tensors or `DTensor`s (FSDP2, tensor and expert parallelism; each rank steps its own
    shard), float32 or of low precision, contiguous or not. Moments are float32. A parameter of low precision has a
    float32 `master`, which the optimizer steps. If something else changed the parameter, such as `load_state_dict` of
    the model, the next step starts from it: a master that does not round to its parameter is made again. All states
    have the parameter's own layout, so `torch.distributed.checkpoint` saves and reshards them by name. In float32 and
    not fused, results are bitwise equal to the default of [`torch.optim.AdamW`], on CPU (`foreach=False`) and on CUDA
    (`foreach=True`).

    Besides parameters, gradients and states, a step needs 4 bytes per element of one tile, first for the float32 copy
    of the gradient, then for the denominator. [`torch.optim.AdamW`] has no masters and needs 4 bytes per element of all
    parameters (`foreach`, its default on CUDA), of the largest one (`foreach=False`), or none (`fused`). Small
    parameters share a tile, so many of them do not need many kernel launches.

    Args:
        params: tensors, or dicts of groups with their own options, as for every optimizer.
        lr: learning rate, a number or a tensor of one element. A tensor on another device than the CPU is read once per
            group and step, which waits for the device, unless `capturable`.
        betas: decay of the moments, both at least 0 and less than 1.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, in units of the learning rate.
        tile_numel: elements of a tile. Temporaries stay below 0.1 byte per local parameter if a rank holds at least `40
            * tile_numel` of them. `None` is 2^18 (1 MiB of temporaries) on CPU. On other devices it is a fortieth of
            the local parameters, but at least 2^24 (64 MiB), because fewer tiles need fewer kernel launches.
            DeepSpeed's cap for the same purpose is 178,956,971 elements, 0.7 GB (`max_group_size` of its groups of
            expert parameters).
        fused: whether to use PyTorch's fused kernels, which read and write memory once and need no denominator, but
            round differently. `None` means yes on CUDA. They are never used for tensors that are not contiguous.
        capturable: whether a step may be captured in a CUDA graph. Step counts are then on the device of the
            parameters, and nothing is read from it. Replays use the learning rate of the capture, unless it is a tensor
            on that device. The first step, and the first after `load_state_dict`, must not be captured: they create or
            move the states, and earlier graphs do not know the new ones.

    Raises:
        ValueError: an option is out of its range, or a parameter is complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        tile_numel: int | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ):
        if tile_numel is not None and (not isinstance(tile_numel, int) or tile_numel < 1):
            raise ValueError(f"tile_numel ({tile_numel}) must be a positive number of elements, or None")
        self.tile_numel = tile_numel
        self.fused = fused
        self.capturable = capturable
        self._cuts: dict[Tensor, _Cut] = {}
        self._written: dict[Tensor, tuple[int, int, int]] = {}
        self._automatic_tile_numel: int | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Like [`torch.optim.Optimizer.add_param_group`].

        Raises:
            ValueError: an option is out of its range, or a parameter is complex.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in param_group["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"a parameter of shape {tuple(param.shape)} is {param.dtype}; it must be real numbers")

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "tile_numel": self.tile_numel,
            "fused": self.fused,
            "capturable": self.capturable,
            "_cuts": {},
            "_written": {},
            "_automatic_tile_numel": None,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        Args:
            closure: computes the loss and the gradients again.

        Returns:
            What `closure` returned.

        Raises:
            ValueError: a gradient is sparse, or the step is captured in a CUDA graph without `capturable`. Nothing was
                changed.
        """
        if not self.capturable and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "capturable (False) must be True to capture a step, because otherwise replays do not count updates"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters_of_group = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for param in (param for parameters in parameters_of_group for param in parameters):
            if param.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} is sparse; make it dense "
                    "(sparse=False of its embedding)"
                )
        self._follow_parameters(param for parameters in parameters_of_group for param in parameters)
        for group, parameters in zip(self.param_groups, parameters_of_group, strict=True):
            lr = self._learning_rate(group["lr"])
            self._count_updates(parameters)
            for batch in self._batches(tile for param in parameters for tile in self._tiles_of(param)):
                update_tiles(batch, group, lr, fused=self.fused, capturable=self.capturable)
            self._written.update({p: _version(p) for p in parameters if "master" in self.state[p]})
        return loss

    @torch.no_grad()
    def reset_masters(self) -> None:
        """Make all masters again from the parameters. The moments do not change.

        A step does this for parameters whose change it notices. It does not notice writes through `param.data`, and
        replays of a CUDA graph never check; call this then.
        """
        for param, state in self.state.items():
            if "master" in state:
                state["master"].copy_(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like [`torch.optim.Optimizer.load_state_dict`], but states stay float32, whatever the parameter's dtype.

        It does not change parameters; load them from the same checkpoint, because the next step makes masters again
        that do not round to them. If the checkpoint has no masters, such as one of [`torch.optim.AdamW`], they are made
        from the parameters. Masters of parameters that are float32 now are left out.

        Raises:
            ValueError: the groups, or the shapes or layouts of states, differ, or the states belong to another
                algorithm. Nothing was changed.
        """
        restored: list[dict[str, Any]] = []

        # Optimizer.load_state_dict casts states to the parameter's dtype and cannot be told not to
        # (docs/upstream/torch_optimizer_state_dtype.md). So it gets no states; other hooks that change or use the
        # loaded state run before and after.
        def take_states_out(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            _check_loaded_groups(loaded["param_groups"])
            keys = [key for group in loaded["param_groups"] for key in group["params"]]
            restored.extend(
                _restored_state(param, loaded["state"].get(key), key)
                for param, key in zip(self._parameters(), keys, strict=False)  # the code below checks the lengths
            )
            return {**loaded, "state": {}}

        def put_states_in(_: Optimizer) -> None:
            self.state.update({p: state for p, state in zip(self._parameters(), restored, strict=True) if state})
            self._written.clear()

        handles = [
            self.register_load_state_dict_pre_hook(take_states_out),
            self.register_load_state_dict_post_hook(put_states_in, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _tile_numel_on(self, device: torch.device) -> int:
        if self.tile_numel or device.type == "cpu":
            return self.tile_numel or _CPU_TILE_NUMEL
        if self._automatic_tile_numel is None:
            numel = sum(_local(param).numel() for param in self._parameters())
            self._automatic_tile_numel = max(_TILE_NUMEL, numel // 40)
        return self._automatic_tile_numel

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _learning_rate(self, lr: float | Tensor) -> float | Tensor:
        """The learning rate: a number or a scalar, on a device only if it must not be read from there."""
        if not isinstance(lr, Tensor):
            return lr
        lr = lr.detach().reshape(())
        return lr.float() if self.capturable and lr.device.type != "cpu" else lr.cpu()

    def _follow_parameters(self, parameters: Iterable[Tensor]) -> None:
        """If other code wrote to a parameter since the last step, its master is made from the new values.

        Masters that round to their parameter are kept, because they are more exact. So weights and states may be loaded
        from the same checkpoint in any order.
        """
        for param in parameters:
            master = self.state[param].get("master") if param in self.state else None
            if master is None or self._written.get(param) == _version(param):
                continue
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} was changed since the last step, so this step must "
                    "not be captured; take a step without capture first"
                )
            if not torch.equal(_local(master).to(param.dtype), _local(param)):
                master.copy_(param)

    def _count_updates(self, parameters: list[Tensor]) -> None:
        """Add one to the step count of each parameter with a gradient; new parameters get their states."""
        steps = []
        for param in parameters:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU, where it can be read without waiting
                state.update({name: torch.zeros_like(param, dtype=_state_dtype(param)) for name in _MOMENTS})
                if param.dtype != _state_dtype(param):
                    state["master"] = param.to(_state_dtype(param))
            if self.capturable:
                state["step"] = state["step"].to(param.device)
            steps.append(state["step"])
        if steps:
            foreach_add_(steps, 1.0)

    def _tiles_of(self, param: Tensor) -> Iterator[Tile]:
        """Cut the local shard of a parameter with a gradient into tiles."""
        state = self.state[param]
        grad: Any = param.grad
        if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)  # such as the sum of a partial tensor
        grad = _local(grad)
        cut = self._cut(param, state, grad.is_contiguous())
        can_fuse = cut.is_flat and grad.stride() == cut.stride
        step = state["step"] if self.capturable else state["step"].item()
        grads = split_into_tiles([grad], self._tile_numel_on(grad.device), cut.is_flat)
        for views, (grad_tile,) in zip(cut.tiles, grads, strict=True):
            weight, exp_avg, exp_avg_sq, *parameter = views
            yield Tile(weight, grad_tile, exp_avg, exp_avg_sq, parameter[0] if parameter else None, step, can_fuse)

    def _cut(self, param: Tensor, state: Mapping[str, Any], is_flat: bool) -> _Cut:
        """Tiles of a parameter's tensors without the gradient; they are cut again only if a tensor is new.

        Args:
            is_flat: whether the gradient is contiguous.
        """
        local = _local(param)
        sources = (state.get("master"), *(state[name] for name in _MOMENTS))
        cut = self._cuts.get(param)
        if (
            cut is not None
            and (cut.address, cut.of_flat_gradient) == (local.data_ptr(), is_flat)
            and all(old is new for old, new in zip(cut.sources, sources, strict=True))
        ):
            return cut
        tensors = [local if source is None else _local(source) for source in sources]
        if sources[0] is not None:
            tensors.append(local)
        is_all_flat = is_flat and all(t.is_contiguous() and t.stride() == tensors[0].stride() for t in tensors)
        tiles = list(split_into_tiles(tensors, self._tile_numel_on(local.device), is_all_flat))
        cut = _Cut(sources, local.data_ptr(), is_flat, tiles, is_all_flat, tensors[0].stride())
        self._cuts[param] = cut
        return cut

    def _batches(self, tiles: Iterable[Tile]) -> Iterator[list[Tile]]:
        """Groups of successive tiles that together are at most one tile large, and alike for the kernels."""
        batch: list[Tile] = []
        numel = 0
        for tile in tiles:
            is_full = numel + tile.weight.numel() > self._tile_numel_on(tile.weight.device)
            if batch and (is_full or tile.kind != batch[0].kind):
                yield batch
                batch, numel = [], 0
            batch.append(tile)
            numel += tile.weight.numel()
        if batch:
            yield batch


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _version(param: Tensor) -> tuple[int, int, int]:
    """A value that changes with each write to a parameter, and when it gets other memory.

    Writes to a DTensor, as by `load_state_dict`, are counted there and not in its local tensor.
    """
    local = _local(param)
    return local.data_ptr(), count_of_writes(local), count_of_writes(param)


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _check_options(options: Mapping[str, Any]) -> None:
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr (a tensor of shape {tuple(lr.shape)}) must be a number or have one element")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(options[name]) < math.inf:
            raise ValueError(f"{name} ({options[name]}) must be a finite number of at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas ({betas}) must be two numbers of at least 0 and less than 1")


def _check_loaded_groups(groups: list[dict[str, Any]]) -> None:
    """Refuse options of [`torch.optim.Adam`] and [`torch.optim.AdamW`] that make them another algorithm."""
    for group in groups:
        for name, value in (("amsgrad", False), ("maximize", False), ("decoupled_weight_decay", True)):
            if group.get(name, value) != value:
                raise ValueError(f"the loaded optimizer has {name}={group[name]}, which TiledAdamW does not support")


def _restored_state(param: Tensor, saved: Mapping[str, Any] | None, key: object) -> dict[str, Any]:
    """The state of a parameter from a loaded one, on its device and in float32.

    Args:
        saved: a state of [`TiledAdamW`] or [`torch.optim.AdamW`]; `None` or empty if there is none.
        key: key of the parameter in the loaded state dict, for messages.
    """
    if not saved:
        return {}
    dtype = _state_dtype(param)
    missing = [name for name in ("step", *_MOMENTS) if name not in saved]
    if missing:
        raise ValueError(f"the loaded state of parameter {key} has no {', '.join(missing)}; it must be one of AdamW")
    state: dict[str, Any] = {"step": torch.tensor(float(saved["step"]), dtype=torch.float32)}
    # a missing master is {} if torch.distributed.checkpoint unflattened the state dict
    has_master = param.dtype != dtype and isinstance(saved.get("master"), Tensor)
    for name in (*_MOMENTS, "master") if has_master else _MOMENTS:
        value = saved[name]
        if _layout(value) != _layout(param):
            raise ValueError(
                f"{name} of parameter {key} has the layout {_layout(value)}, but the parameter has {_layout(param)}; "
                "load it into the model from which it was saved, or reshard it with torch.distributed.checkpoint"
            )
        state[name] = value.to(device=param.device, dtype=dtype)
    if param.dtype != dtype and not has_master:
        state["master"] = param.detach().to(dtype)
    return state


def _layout(tensor: Tensor) -> tuple[object, ...]:
    shape = tuple(tensor.shape)
    return (shape, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (shape,)


__all__ = ["TiledAdamW"]
