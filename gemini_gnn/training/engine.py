"""DeepSpeed, and nothing else: the only file that imports it.

Importing this module does what makes a start fast (measured, see the docstrings): a warm parent imports it once and
forks trainers from it.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gemini_gnn.config import Config
from gemini_gnn.training.schedule import lr_factor

T = TypeVar("T")

# DeepSpeed looks for its accelerator while it is imported, which on a GPU means to ask the driver: a parent of forks must not
# (what NVML holds open is closed in the children, what CUDA holds does not survive at all). So it is imported as for
# the CPU, and looks again when it is first asked, in the trainer; build_engine tells it.
if "DS_ACCELERATOR" not in os.environ and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
    os.environ["DS_ACCELERATOR"] = "cpu"  # or it probes for every accelerator it knows, and warns that it found none
_asked_for = os.environ.get("DS_ACCELERATOR")
os.environ["DS_ACCELERATOR"] = "cpu"
try:
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed import DeepSpeedEngine as Engine
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
finally:
    del os.environ["DS_ACCELERATOR"]
    if _asked_for is not None:
        os.environ["DS_ACCELERATOR"] = _asked_for

# init_distributed would compile a shared-memory op with ninja in every process start (30 s, not reliably cached, and it
# leaves buffers in /dev/shm after a SIGKILL). An empty table of ops says it is not there.
deepspeed.ops.__dict__["__compatible_ops__"] = {}

# DeepSpeed calls functions that torch has renamed, and torch says so at every call.
warnings.filterwarnings("ignore", message=r".*is deprecated. Please use `torch\.distributed", category=FutureWarning)

# deepspeed.initialize, the first optimizer and step import these, 1.6 s; imported here, a forked trainer has them already.
# The Muon optimizer, which nobody here uses, would be compiled: that alone loads all of torch._inductor, 0.7 s.
_compile = torch.compile
torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model  # type: ignore[assignment]
try:
    for _name in (
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.bf16_optimizer",
        "torch._dynamo",
        "deepspeed.comm.mori",  # these two since 0.19.8: 50 modules of experts in parallel
        "deepspeed.module_inject.auto_ep_layer",
        "torch.profiler._cupti_monitor",
    ):
        with contextlib.suppress(ModuleNotFoundError):  # of another version: then the trainers import what they need
            importlib.import_module(_name)
finally:
    torch.compile = _compile
    real_accelerator.ds_accelerator = None


def build_optimizer(parameters: Any, config: Config) -> torch.optim.Optimizer:
    """torch's own optimizer: DeepSpeed's fused ones would be compiled at run time."""
    o = config.optimizer
    if o.name == "sgd":
        return torch.optim.SGD(parameters, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    kind = torch.optim.Adam if o.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay)


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of a run; ``deepspeed.config`` is merged over it, one level deep. Pure."""
    settings: dict[str, Any] = {
        # One "sample" is one mini-batch: the loop weights losses itself, by true numbers of seeds.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.training.accumulation,
        "gradient_clipping": config.training.clip_norm,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.deepspeed.zero, "overlap_comm": False},
        "bf16": {"enabled": config.training.precision == "bf16"},
    }
    for key, value in config.deepspeed.config.items():
        base = settings.get(key)
        settings[key] = {**base, **value} if isinstance(base, dict) and isinstance(value, dict) else value
    return settings


def _use_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed where its tensors belong: by itself it would take a GPU wherever there is one, also for gloo ranks."""
    if device.type == "cpu":
        real_accelerator.set_accelerator(CPU_Accelerator())
        return
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator  # asks NVML

    real_accelerator.set_accelerator(CUDA_Accelerator())
    os.environ["LOCAL_RANK"] = str(device.index)  # where DeepSpeed looks up the number of its device


def build_engine(model: torch.nn.Module, config: Config, total_steps: int) -> Engine:
    """A DeepSpeed engine around ``model``. The default process group must exist. Collective.

    Args:
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _use_accelerator(next(model.parameters()).device)
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), dist_init_required=False, verbose=False, auto_mpi_discovery=False
    )
    # DeepSpeed reduces gradients on groups of its own, made without a timeout: torch's default of half an hour, in which
    # nobody would notice a machine that lost its power in the middle of a reduction.
    timeout = datetime.timedelta(seconds=config.distributed.timeout_s)
    deepspeed.comm.comm.cdb.new_group = lambda ranks: torch.distributed.new_group(ranks, timeout=timeout)
    optimizer = build_optimizer(model.parameters(), config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, config.optimizer, total_steps)
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_settings(config),
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # bf16 with ZeRO 0
        # It has taken one step with gradients of zero, to have moments: weight decay has moved the masters, and Adam
        # counts one step too many. The weights it has not written yet are still those it began with.
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.optimizer.state.clear()
    return engine


def backward(engine: Engine, loss: torch.Tensor, before_reduction: Callable[[], T]) -> T:
    """The backward pass that ends a step. Returns what ``before_reduction()`` returned.

    DeepSpeed reduces the gradients at the end of its backward pass. ``before_reduction`` is called between the two, on
    every rank: a collective in it is where a rank waits for slower ones, and what the reduction then takes is transfer.
    Under ZeRO 2 and 3 a part of the gradients is reduced by then, while others are still computed.
    """
    returned: list[T] = []
    reduce = engine.allreduce_gradients

    def call_then_reduce(*args: Any, **kwargs: Any) -> None:
        returned.append(before_reduction())
        reduce(*args, **kwargs)

    engine.allreduce_gradients = call_then_reduce
    try:
        engine.backward(loss)
    finally:
        del engine.allreduce_gradients  # the class's own again
    (value,) = returned
    return value


def leave() -> None:
    """Destroy the process groups, DeepSpeed's memory of them included: another training in this process makes its own."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    deepspeed.utils.groups._release_process_group_references()
    _stop_clock()


def _stop_clock() -> None:
    """Take a clock off DeepSpeed's collectives, whose backend object lives as long as the process."""
    backend = deepspeed.comm.comm.cdb
    for name in CollectiveClock.NAMES:
        call: Any = getattr(backend, name, None)
        if hasattr(call, "untimed"):
            setattr(backend, name, call.untimed)


class CollectiveClock:
    """Seconds that DeepSpeed's collectives took on this rank (their synchronous part, where they are asynchronous).

    On the CPU: those spent inside of them. On a GPU, where a call only puts work on a stream: from when the compute stream
    came to it until it could go on. That is known when it is over, so it may be counted a step later.
    """

    NAMES = (
        "all_reduce",
        "reduce",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_gather_coalesced",
    )

    def __init__(self, device: torch.device) -> None:
        self._seconds = 0.0
        self._under_way: collections.deque[tuple[torch.cuda.Event, torch.cuda.Event]] = collections.deque()
        timed = self._timed_on_cuda if device.type == "cuda" else self._timed
        _stop_clock()  # of an earlier training in this process: nobody reads that one any more
        backend = deepspeed.comm.comm.cdb
        for name in self.NAMES:
            # DeepSpeed binds its backend object once per process: wrap its methods where it keeps them.
            call = getattr(backend, name, None)
            if call is not None:
                wrapper: Any = timed(call)
                wrapper.untimed = call
                setattr(backend, name, wrapper)

    @property
    def seconds(self) -> float:
        while self._under_way and self._under_way[0][1].query():
            begin, end = self._under_way.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        return self._seconds

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - begin

        return timed

    def _timed_on_cuda(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                return call(*args, **kwargs)
            finally:
                end.record()
                self._under_way.append((begin, end))

        return timed


def full_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the model, whole, float32 on the CPU, by name. Collective under ZeRO-3."""
    module = engine.module
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=engine.zero_optimization_stage() == 3):
        named = module.state_dict()
        return {
            name: (t.detach().float() if t.is_floating_point() else t.detach()).cpu().clone()
            for name, t in named.items()
        }
