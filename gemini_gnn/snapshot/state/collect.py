"""The state of a training: everything a snapshot captures so that training resumes bit for bit, and how it is put back.

Knows DeepSpeed by the names of its attributes only. Where the state lives (deepspeed 0.19): fp32 master weights are the
one truth, low-precision weights are derived from them; moments belong to the *inner* torch optimizer, keyed by master. All
tensors stay as they are from the end of one optimizer step to the start of the next, except buffers, which forward changes
(``at_once``). *Values* are all the rest: settings, counts, the scheduler, ``extra_state``.

Moments are lazy: an optimizer makes them in its first step. A tiny twin of the optimizer tells their names and shapes
beforehand, so that all room is planned (and reserved) before training. The optimizer itself is not touched, and a snapshot
without moments restores to an optimizer without moments.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gemini_gnn.errors import SnapshotError
from gemini_gnn.snapshot.store.format import Placed, TensorSpec

Places = dict[int, tuple[str, int, int, int]]
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Entry:
    """One tensor of the state.

    Attributes:
        spec: name, dtype, shape; both fixed from here on.
        get: the live tensor itself, or None while it does not exist. Called for every tensor at every capture: cheap.
        put: makes the live tensor from the given one, or removes it (None); for tensors that may not exist.
        at_once: forward changes it, so training copies it before it continues.
    """

    spec: TensorSpec
    get: Callable[[], torch.Tensor | None]
    put: Callable[[torch.Tensor | None], None]
    at_once: bool = False


@dataclass
class TrainingState:
    """Everything of one rank.

    Attributes:
        kind: how DeepSpeed keeps the state: "stage0", "zero1" ... with the precision.
        optimizer: class name of the inner optimizer; scheduler: of the scheduler, or "none".
        param_groups: per parameter group the sorted names of its settings.
        extra_state: whether the user gave one.
        sharded: every rank holds another part. Otherwise parameters and moments are common to all ranks of a
            data-parallel job, which the caller checks by checksum.
        entries: parameters and moments first, buffers (``at_once``) last.
        parameters: where the tensors of the module's state dict lie in the entries; under ZeRO this rank's part of them.
        values: everything that is neither an entry nor a random generator, as a tree for ``tree.pack``.
        load_values: the inverse, in the proved order.
        derive: recompute the low-precision weights from the masters. Collective under ZeRO.
        fresh: whether no step was taken yet.
    """

    kind: str
    optimizer: str
    scheduler: str
    param_groups: list[list[str]]
    extra_state: bool
    sharded: bool
    entries: list[Entry]
    parameters: list[Placed]
    values: Callable[[], dict[str, Any]]
    load_values: Callable[[dict[str, Any]], None]
    derive: Callable[[], None]
    fresh: Callable[[], bool]


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def is_deepspeed(engine: Any) -> bool:
    return all(hasattr(engine, name) for name in ("module", "optimizer", *COUNTERS))


def collect(engine: Any, extra_state: Any = None) -> TrainingState:
    """The state of a training.

    Args:
        engine: a DeepSpeed engine, or ``(module, optimizer)`` or ``(module, optimizer, scheduler)`` of plain PyTorch
            (the module may be wrapped in DistributedDataParallel).
        extra_state: an object of the user's with ``state_dict()`` and ``load_state_dict(dict)``.

    Raises:
        SnapshotError: a kind of optimizer that keeps its state where this function cannot find it.
    """
    scheduler: Any
    if is_deepspeed(engine):
        module, wrapper, scheduler = engine.module, engine.optimizer, getattr(engine, "lr_scheduler", None)
    elif isinstance(engine, tuple) and len(engine) in (2, 3) and isinstance(engine[0], torch.nn.Module):
        module, wrapper, scheduler = engine[0], engine[1], engine[2] if len(engine) == 3 else None
    else:
        raise SnapshotError(
            "expected a DeepSpeed engine, (module, optimizer) or (module, optimizer, scheduler); "
            f"got {type(engine).__name__}"
        )
    found = _masters(module, wrapper)
    inner, masters = found.inner, found.masters
    ours = {id(t) for _, t in masters} | {id(p) for p in found.derived}
    frozen = [(f"frozen.{n}", _stored(p)) for n, p in module.named_parameters() if id(p) not in ours]
    entries = [_fixed(name, tensor) for name, tensor in masters]
    entries += _moments(inner, masters)
    entries += [_fixed(name, tensor) for name, tensor in frozen]
    entries += _buffers(module)
    scaler = getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)

    counters = COUNTERS if is_deepspeed(engine) else ()
    scheduled = hasattr(scheduler, "state_dict")

    def values() -> dict[str, Any]:
        extra = {} if extra_state is None else {"extra_state": extra_state.state_dict()}
        return {
            "counters": {name: getattr(engine, name) for name in counters},
            "scheduler": scheduler.state_dict() if scheduled else None,
            "param_groups": [
                {k: v for k, v in group.items() if k != "params" and k != "param_names"} for group in inner.param_groups
            ],
            "optimizer": {
                name: others
                for name, master in masters
                if (others := {k: v for k, v in inner.state.get(master, {}).items() if not isinstance(v, torch.Tensor)})
            },
            "loss_scale": {} if scaler is None else _scalars(scaler),
            **extra,
        }

    def load_values(n: dict[str, Any]) -> None:
        for name, master in masters:
            if name in n["optimizer"]:
                inner.state[master].update(n["optimizer"][name])
        if n["scheduler"] is not None:
            scheduler.load_state_dict(n["scheduler"])
        # After the scheduler: a LambdaLR's load does not set the learning rate.
        for group, saved in zip(inner.param_groups, n["param_groups"], strict=True):
            for key, value in saved.items():
                if isinstance(value, torch.Tensor) and isinstance(group.get(key), torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
        for key, value in n["loss_scale"].items():
            setattr(scaler, key, value)
        for name, value in n["counters"].items():
            setattr(engine, name, value)
        if extra_state is not None:
            extra_state.load_state_dict(n["extra_state"])

    def fresh() -> bool:
        return not is_deepspeed(engine) or (engine.global_steps == 0 and engine.micro_steps == 0)

    first = masters[0][1] if masters else None
    precision = (
        f"{found.precision}" if first is None else f"{found.precision}/{str(first.dtype).removeprefix('torch.')}"
    )
    return TrainingState(
        kind=f"{found.kind} {precision}",
        optimizer=type(inner).__name__,
        scheduler=type(scheduler).__name__ if hasattr(scheduler, "state_dict") else "none",
        # "step": FusedAdam adds it in its first step; a fresh one has to fit all the same
        param_groups=[sorted(set(g) - {"params", "param_names", "step"}) for g in inner.param_groups],
        extra_state=extra_state is not None,
        sharded=found.sharded,
        entries=entries,
        parameters=_placed(module, entries, found.places),
        values=values,
        load_values=load_values,
        derive=found.derive,
        fresh=fresh,
    )


@dataclass
class _Found:
    """Where an optimizer keeps its masters: ``derived`` are the model parameters that follow from them, and ``places``
    says by the id of each where: name of the master, first element in it, first element in the parameter, length.
    """

    kind: str
    precision: str
    sharded: bool
    inner: Any
    masters: list[tuple[str, torch.Tensor]]
    derived: list[torch.Tensor]
    derive: Callable[[], None]
    places: Places


def _masters(module: torch.nn.Module, wrapper: Any) -> _Found:
    trainable = [p for p in module.parameters() if p.requires_grad]
    precision = str(trainable[0].dtype).removeprefix("torch.") if trainable else "none"
    if getattr(wrapper, "swap_optimizer", False):
        raise SnapshotError("expected the optimizer state in memory; ZeRO-Infinity keeps it on NVMe: use snapshot=nfs")

    def flat(
        kind: str,
        tensors: list[torch.Tensor],
        lows: list[list[torch.Tensor]],
        derive: Callable[[], None],
        places: Places,
    ) -> _Found:
        named = [(f"master.{i}", t) for i, t in enumerate(tensors)]
        # Only parameters that the optimizer was given: a trainable one that it was not given has no master.
        derived = [p for group in lows for p in group]
        return _Found(kind, precision, True, wrapper.optimizer, named, derived, derive, places)

    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        stage = 2 if getattr(wrapper, "partition_gradients", False) else 1
        masters, lows = wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups
        places = _places_in_partitions(wrapper, masters, lows, wrapper.bit16_groups_flat)
        return flat(f"zero{stage}", masters, lows, wrapper.update_lp_params, places)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        _zero_padding(wrapper)
        masters, lows = wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups
        return flat("zero3", masters, lows, lambda: _derive_zero3(wrapper), _places_in_zero3(module, wrapper))
    if hasattr(wrapper, "fp32_groups_flat_partition"):
        masters, lows = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
        places = _places_in_partitions(wrapper, masters, lows, wrapper.bf16_groups_flat)
        return flat("bf16_optimizer", masters, lows, wrapper.update_lp_params, places)

    names = {id(p): n for n, p in module.named_parameters()}
    if hasattr(wrapper, "fp32_groups") and hasattr(wrapper, "fp16_groups"):  # stage 0, low precision, unfused
        pairs = [
            (low, high)
            for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        ]
        masters = [(f"master.{names[id(low)]}", high) for low, high in pairs]
        lows = [low for low, _ in pairs]
        places = {id(low): (n, 0, 0, low.numel()) for (n, _), low in zip(masters, lows, strict=True)}
        return _Found("stage0", precision, False, wrapper.optimizer, masters, lows, lambda: _copy_down(pairs), places)
    if hasattr(wrapper, "fp32_groups_flat") and hasattr(wrapper, "fp16_groups"):  # stage 0, low precision, fused

        def derive_fused() -> None:
            with torch.no_grad():
                for lows, high in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
                    offset = 0
                    for low in lows:
                        low.copy_(high[offset : offset + low.numel()].view_as(low))
                        offset += low.numel()

        masters = [(f"master.{i}", t) for i, t in enumerate(wrapper.fp32_groups_flat)]
        lows = [low for group in wrapper.fp16_groups for low in group]
        places = {}
        for i, group in enumerate(wrapper.fp16_groups):
            offsets = itertools.accumulate((p.numel() for p in group), initial=0)
            places |= {id(p): (f"master.{i}", o, 0, p.numel()) for p, o in zip(group, offsets, strict=False)}
        return _Found("stage0 fused", precision, False, wrapper.optimizer, masters, lows, derive_fused, places)
    if isinstance(wrapper, torch.optim.Optimizer):
        masters = [
            (f"master.{names.get(id(p), f'{g}.{i}')}", p)
            for g, group in enumerate(wrapper.param_groups)
            for i, p in enumerate(group["params"])
        ]
        return _Found("stage0", precision, False, wrapper, masters, [], lambda: None, {})
    raise SnapshotError(
        f"expected a torch optimizer or one of DeepSpeed's (ZeRO 0-3, bf16); got {type(wrapper).__name__}, whose state "
        "snapshots cannot find: use snapshot=nfs or snapshot=none"
    )


def _copy_down(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for low, high in pairs:
            low.copy_(high)


def _derive_zero3(wrapper: Any) -> None:
    with torch.no_grad():
        for low, high in zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True):
            if low.data_ptr() != high.data_ptr():
                low.copy_(high)


def _placed(module: torch.nn.Module, entries: list[Entry], places: Places) -> list[Placed]:
    """Where the tensors of the module's state dict lie; without those of which other ranks have all.

    Its names are spelled here: ``state_dict()`` may run code of the user's.
    """
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        module = module.module
    whole = {id(t): (e.spec.name, 0, 0, t.numel()) for e in entries if (t := e.get()) is not None}
    everywhere = places | whole
    found = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        buffers = {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for name, tensor in [*owner._parameters.items(), *buffers.items()]:
            place = everywhere.get(id(tensor))
            if tensor is not None and place is not None:
                shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
                if place[3] or 0 in shape:
                    found.append(Placed(f"{prefix}.{name}" if prefix else name, shape, *place))
    return found


def _places_in_partitions(
    wrapper: Any, masters: list[torch.Tensor], lows: list[list[torch.Tensor]], flats: list[torch.Tensor]
) -> Places:
    """ZeRO-1, ZeRO-2, BF16_Optimizer: parameters are views of one flat tensor per group, in any order and with any padding.
    It is cut into equal partitions, and each rank keeps a master of its own.
    """
    places: Places = {}
    for i, (master, group, flat) in enumerate(zip(masters, lows, flats, strict=True)):
        begin = torch.distributed.get_rank(wrapper.real_dp_process_group[i]) * master.numel()
        for p in group:
            first = (p.data_ptr() - flat.data_ptr()) // p.element_size()
            start = max(begin - first, 0)
            length = max(min(first + p.numel(), begin + master.numel()) - first - start, 0)
            places[id(p)] = (f"master.{i}", first + start - begin, start, length)
    return places


def _part_of_zero3(parameter: Any) -> tuple[int, int]:
    """ZeRO-3 cuts each parameter into equal parts, one per rank: where this rank's begins, and its length without padding."""
    part = parameter.partition_numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * part
    return start, min(max(parameter.ds_numel - start, 0), part)


def _places_in_zero3(module: torch.nn.Module, wrapper: Any) -> Places:
    """In one master per group the parts of its parameters lie one after the other; frozen parameters are not in it."""
    places: Places = {}
    for i, group in enumerate(wrapper.fp16_groups):
        offsets = itertools.accumulate((p.partition_numel() for p in group), initial=0)
        places |= {id(p): (f"master.{i}", o, *_part_of_zero3(p)) for p, o in zip(group, offsets, strict=False)}
    for name, p in module.named_parameters():
        if id(p) not in places and hasattr(p, "ds_tensor"):
            places[id(p)] = (f"frozen.{name}", 0, *_part_of_zero3(p))
    return places


def padding_of(wrapper: Any) -> list[list[slice]]:
    """Per flat tensor of ZeRO-3 the ranges that belong to no parameter; they are excluded from any comparison."""
    ranges = []
    for group in wrapper.fp16_groups:
        ends = itertools.accumulate(p.partition_numel() for p in group)
        ranges.append(
            [slice(e - p.partition_numel() + _part_of_zero3(p)[1], e) for p, e in zip(group, ends, strict=True)]
        )
    return ranges


def _zero_padding(wrapper: Any) -> None:
    """ZeRO-3 pads partitions inside its flat tensors with uninitialised memory: make it defined."""
    flats = zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True)
    with torch.no_grad():
        for ranges, pair in zip(padding_of(wrapper), flats, strict=True):
            for tensor in pair:
                for where in ranges:
                    tensor[where].zero_()


def _stored(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, or under ZeRO-3 this rank's part of it."""
    return getattr(parameter, "ds_tensor", parameter)


def _fixed(name: str, tensor: torch.Tensor) -> Entry:
    return _copied(name, lambda: tensor)


def _copied(name: str, get: Callable[[], torch.Tensor], at_once: bool = False) -> Entry:
    def put(value: torch.Tensor | None) -> None:
        if value is None:
            raise SnapshotError(
                f"expected the tensor {name} in the snapshot; it lacks it: start again with resume=never"
            )
        with torch.no_grad():
            get().copy_(value)

    return Entry(spec_of(name, get()), get, put, at_once)


def _buffers(module: torch.nn.Module) -> list[Entry]:
    entries, seen = [], set()
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is None or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            # Looked up anew each time: a module may assign a new tensor to its buffer instead of changing it.
            full = f"buffer.{prefix}.{name}" if prefix else f"buffer.{name}"
            entries.append(_copied(full, functools.partial(_buffer, owner, name), at_once=True))
    return entries


def _buffer(owner: torch.nn.Module, name: str) -> torch.Tensor:
    buffer = owner._buffers[name]
    assert buffer is not None
    return buffer


def _moments(inner: Any, masters: list[tuple[str, torch.Tensor]]) -> list[Entry]:
    schemas: dict[tuple[int, int], dict[str, tuple[bool, torch.dtype, torch.device]]] = {}
    entries = []
    for name, master in masters:
        live = {k: v for k, v in inner.state.get(master, {}).items() if isinstance(v, torch.Tensor)}
        specs = {k: spec_of(f"{k}.{name}", v) for k, v in live.items()}
        devices = {k: v.device for k, v in live.items()}
        if not live and master.requires_grad:
            key = (_group_of(inner, master), master.dim())
            if key not in schemas:
                schemas[key] = _schema(inner, key[0], master)
            for k, (like_param, dtype, device) in schemas[key].items():
                shape = tuple(master.shape) if like_param else ()
                specs[k] = TensorSpec(f"{k}.{name}", str(dtype).removeprefix("torch."), shape)
                devices[k] = device
        entries += [_moment(inner, master, k, spec, devices[k]) for k, spec in specs.items()]
    return entries


def _moment(inner: Any, master: torch.Tensor, key: str, spec: TensorSpec, device: torch.device) -> Entry:
    def get() -> torch.Tensor | None:
        of_master = inner.state.get(master)
        value = None if of_master is None else of_master.get(key)
        return value if isinstance(value, torch.Tensor) else None

    def put(value: torch.Tensor | None) -> None:
        live = get()
        if value is None:
            inner.state.get(master, {}).pop(key, None)
        elif live is None:
            inner.state[master][key] = value.to(device, copy=True)
        else:
            with torch.no_grad():
                live.copy_(value)

    return Entry(spec, get, put)


def _group_of(inner: Any, master: torch.Tensor) -> int:
    """The parameter group of a master. ZeRO-3 shows its optimizer one sub-group at a time and lists no masters: there the
    first group stands for all.
    """
    for g, group in enumerate(inner.param_groups):
        if any(p is master for p in group["params"]):
            return g
    return 0


def _schema(inner: Any, group: int, master: torch.Tensor) -> dict[str, tuple[bool, torch.dtype, torch.device]]:
    """The tensors that the optimizer will keep per parameter of ``group``: name -> (shaped like the parameter or a
    scalar, dtype, device: step counts mostly stay on the CPU). One step of a twin over a tiny parameter shows them.

    Raises:
        SnapshotError: a twin cannot show them.
    """
    if type(inner).__name__ in ("FusedAdam", "DeepSpeedCPUAdam"):  # compiled: a twin would share C++ state
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), (True, torch.float32, master.device))
    sorry = SnapshotError(
        f"cannot foretell what {type(inner).__name__} will keep per parameter, so no room can be reserved for it; "
        "take the first optimizer step before attach(), or use snapshot=nfs"
    )
    if not type(inner).__module__.startswith("torch.optim"):
        raise sorry
    probe = torch.nn.Parameter(torch.zeros(tuple(range(2, 2 + master.dim())), dtype=master.dtype, device=master.device))
    probe.grad = torch.zeros_like(probe)
    twin = object.__new__(type(inner))
    twin.__dict__.update({k: v for k, v in inner.__dict__.items() if k != "step"})  # a scheduler wraps the instance's
    twin.__dict__["state"] = defaultdict(dict)
    settings = {k: copy.deepcopy(v) for k, v in inner.param_groups[group].items() if k != "params"}
    twin.__dict__["param_groups"] = [{**settings, "params": [probe]}]
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        twin.__dict__[hooks] = OrderedDict()
    try:
        type(inner).step(twin)
    except TypeError:  # it wants a closure: LBFGS, whose history is of no fixed size
        raise sorry from None
    schema = {}
    for key, value in twin.state[probe].items():
        if isinstance(value, torch.Tensor):
            if value.shape not in (probe.shape, torch.Size([])):
                raise sorry
            schema[key] = (value.shape == probe.shape, value.dtype, value.device)
    return schema


def _scalars(config: Any) -> dict[str, Any]:
    """The numbers among an object's attributes: a loss scaler's current scale and counts."""
    return {k: v for k, v in vars(config).items() if isinstance(v, (int, float))}
