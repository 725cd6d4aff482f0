"""The settings of a run, typed. No I/O and no heavy imports: this file is the vocabulary of every other one.

Hydra builds a DictConfig from ``configs/`` and the command line; :func:`from_mapping` turns it (or a plain nested
dict from Python) into a :class:`Config` exactly once. Unknown keys and wrong types fail there, before anything starts.
What was checked travels to the trainers as JSON (:func:`to_mapping`, :func:`from_checked`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from gemini_gnn.errors import ConfigError
from gemini_gnn.faults import schedule

T = TypeVar("T")


def _one_of(*choices: str) -> Any:
    """A string field that must hold one of ``choices``; the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass
class DatasetConfig:
    """Which graph, and how it is read. Fields that a loader does not use must keep their default."""

    name: str = "blocks"
    root: str | None = None  # default: $GEMINI_GNN_DATA, else the cache folder; may be read-only
    cache: str | None = None  # processed .npy go here; default: $GEMINI_GNN_CACHE, else ~/.cache/gemini_gnn
    normalize: str = _one_of("none", "l1", "l2", "zscore")  # of feature rows (l1, l2) or columns (zscore)
    undirected: bool = False
    split: str = "default"  # default | public | 0..9 (a numbered split) | random:0.6,0.2,0.2
    seed: int = 0  # of random splits, synthetic graphs and random features: not the training seed
    # edge lists
    path: str | None = None
    ids: str = _one_of("int", "str")
    first_id: int = 0  # 1 for 1-based integer ids
    skip_lines: int = 0
    features: str | None = None  # .npy [nodes, features], .npz of scipy.sparse, or .csv; None: see featureless
    labels: str | None = None  # .npy [nodes] / [nodes, classes] or .csv `id,label`
    splits: str | None = None  # .csv `id,train|val|test`
    featureless: str = "degree"  # degree | random:<width>: what a graph without features gets
    # synthetic graphs (blocks, sbm, powerlaw, erdos_renyi, barabasi_albert)
    nodes: int = 20_000
    degree: float = 12.0  # mean
    min_degree: float = 5.0  # powerlaw
    classes: int = 12
    groups: int = 4
    feature_dim: int = 64
    signal: float = 2.0


@dataclass
class PartitionConfig:
    method: str = _one_of("metis", "hash")
    parts: int = 0  # 0: one per rank
    balance_edges: bool = False
    seed: int = 0
    folder: str | None = None  # default: <cache>/partitions/<graph>-<method>-<parts>-<settings>
    plot: bool = False
    # A job begins by reading all arrays but the features once and comparing checksums (rank 0; a recovery does not repeat
    # it): a damaged edge would otherwise be trained on, or read foreign memory. The features are tens of GB and hold
    # no address (the columns of sparse ones do, and are read); `launch/partition.py --check` reads them too. False: for
    # graphs that take minutes to read.
    verify: bool = True
    timeout_s: float = 3600.0  # how long other ranks wait while rank 0 partitions


@dataclass
class SamplingConfig:
    fanouts: list[int] = field(default_factory=lambda: [10, 10])  # hop 1 first; -1 = all in-neighbors
    batch_size: int = 512  # seeds per rank; -1 = all
    # local: each rank shuffles its own seeds. global: one shuffled list is cut into global batches and every seed goes
    # to the rank that owns it; the batches then do not depend on the number of ranks.
    order: str = _one_of("local", "global")
    # Draw edges by their weight. Blocks then carry weights divided by the chance to be drawn, so that GCN's sums stay
    # unbiased; SAGE, which has no edge weights, takes the mean over neighbors of which heavy edges brought more.
    weighted: bool = False
    topology: str = _one_of("replicated", "partitioned")
    prefetch: int = 3  # batches prepared ahead; 0: in the training loop itself
    chunk_bytes: int = 32 << 20  # largest message of the halo exchange


@dataclass
class FeaturesConfig:
    in_ram: bool = True  # read own rows into memory once; False: when a batch needs them
    # Ranks of one machine read each other's rows from the file that all of them map; False: through the halo exchange.
    shared: bool = True
    # auto: only the values that are not zero are stored, sent and multiplied, where that takes a quarter of the memory
    layout: str = _one_of("auto", "dense", "sparse")


@dataclass
class ModelConfig:
    name: str = _one_of("sage", "gcn", "gat")
    hidden: int = 256
    layers: int = 2
    dropout: float = 0.5
    aggregator: str = _one_of("mean", "max")  # sage
    heads: int = 4  # gat
    layer_norm: bool = False
    init: str = _one_of("xavier", "kaiming")
    _target_: str | None = None  # the user's own module, `package.module.Class`: called as
    # Class(in_features=..., hidden=..., num_classes=..., layers=..., **kwargs)
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    name: str = _one_of("adam", "adamw", "sgd")
    lr: float = 0.01
    weight_decay: float = 5e-4
    momentum: float = 0.0  # sgd
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    schedule: str = _one_of("constant", "linear", "cosine", "step")
    warmup_steps: int = 0
    step_every: int = 100  # step: lr *= step_gamma every so many steps
    step_gamma: float = 0.5


@dataclass
class DeepSpeedConfig:
    zero: int = 0
    config: dict[str, Any] = field(default_factory=dict)  # merged over what we generate


@dataclass
class TrainingConfig:
    epochs: int = 30
    # bf16: DeepSpeed's, weights and hidden rows are bfloat16. bf16_products: all is float32 but the operands of the
    # layers' dense products: faster where the CPU multiplies bfloat16 (avx512_bf16, amx_bf16).
    precision: str = _one_of("fp32", "bf16", "bf16_products")
    accumulation: int = 1  # micro-batches per optimizer step
    patience: int = 0  # early stop after so many evaluations without a better validation metric; 0: never
    metric: str = _one_of("accuracy", "micro_f1", "macro_f1")  # what "best" means
    clip_norm: float = 0.0
    threads: int = 0  # torch threads per rank; 0: cores of this machine / ranks on it


@dataclass
class EvaluationConfig:
    every: int = 1  # epochs; 0: only at the end
    fanouts: list[int] = field(default_factory=list)  # empty: exact, layer by layer; else sampled
    batch_size: int = 8192  # nodes per block


@dataclass
class DistributedConfig:
    backend: str = _one_of("auto", "gloo", "nccl")
    timeout_s: float = 120.0  # of every collective
    start_timeout_s: float = 300.0  # for all ranks to come together
    interface: str | None = None  # network interface; None: the one that reaches the first machine


@dataclass
class SnapshotConfig:
    mode: str = _one_of("memory", "nfs", "none")
    every: int | str = 1  # steps; auto: from what a snapshot costs and mtbf_s (Young, Daly)
    mtbf_s: float = 86400.0  # mean time between failures of the whole job, for every=auto
    # Copies of each shard in the memory of as many machines, the own one included. auto: 2, or 1 on a single machine.
    replicas: int | str = "auto"
    failure_domains: list[str] = field(default_factory=list)  # racks, one name per machine in the launcher's order
    replicate_every_s: float = 0.05  # from the beginning of one snapshot's copies to that of the next
    replica_bytes_per_s: float = 0.0  # that a machine sends at most; 0: no limit
    interleave: bool = True  # copies wait while trainers exchange
    persist_every: str = "10min"  # to storage: "10min", "90s", "2h", "500 steps" or "never"
    persist_keep: int = 2  # checkpoints that stay
    folder: str | None = None  # of checkpoints: default <run_dir>/checkpoints
    nfs_every: int = 100  # steps between checkpoints of mode nfs
    arena: str = "/dev/shm"


@dataclass
class RecoveryConfig:
    standby_machines: int = 0  # so many of the launcher's machines, the last ones, wait to take a lost one's place
    heartbeat_s: float = 0.2  # how often the agent of each machine says that it lives, and what its trainers do
    silence_s: float = 1.5  # no word for so long: the machine is silent; several lost heartbeats are no silence yet
    return_s: float = 3.0  # so long a machine whose connection broke may take to come back before a standby replaces it
    wait_s: float = 60.0  # so long the job waits for a lost machine if no standby takes its place, then ends
    # A trainer hangs in a phase of the training step, or an evaluation, that takes hang_factor times as long as it has taken
    # at most lately, and never less than hang_floor_s. Its stacks go into the logs, and the job goes on as after a kill.
    hang_factor: float = 10.0  # 0: nothing is ever a hang
    hang_floor_s: float = 30.0  # above what a model may compile for in the middle of a run, below distributed.timeout_s
    # So many failures in a row without a new step end the job with the cause: the step itself is at fault. However many
    # there are over a long job, it goes on.
    same_step_failures: int = 5  # 0: nothing is ever restarted


@dataclass
class FaultsConfig:
    """What fails on purpose, as texts of ``faults/schedule.py`` and at random."""

    allow: bool = False  # also what is no kill
    at: list[str] = field(default_factory=list)
    seed: int = 0  # of the random ones
    mtbf_s: float = 0.0  # mean seconds between random faults of the whole job, exponential; 0: none
    count: int = 8  # at most so many random ones
    kinds: list[str] = field(default_factory=lambda: ["kill-rank"])
    phases: list[str] = field(default_factory=list)  # that random faults of a rank hit; empty: whichever comes next


@dataclass
class LoggerConfig:
    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "gemini_gnn"


@dataclass
class Config:
    run_dir: str = "runs/default"
    resume: str = _one_of("auto", "never", "must")
    seed: int = 0
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass(frozen=True)
class Interval:
    """So many seconds, or so many steps; both 0: never."""

    seconds: float = 0.0
    steps: int = 0


def interval(text: str) -> Interval | None:
    """``text`` ("10min", "90 s", "2h", "500 steps", "never") as an interval; None where it is none."""
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)|(\d+) ?steps?|never", text.strip())
    if found is None:
        return None
    number, unit, steps = found.groups()
    return Interval(float(number) * units[unit] if number else 0.0, int(steps or 0))


def seats_of(settings: RecoveryConfig, machines: int) -> int:
    """How many of the launcher's machines train; the others are standbys.

    Raises:
        ConfigError: none would train.
    """
    if settings.standby_machines >= machines:
        raise ConfigError(
            f"recovery.standby_machines: expected fewer than the {machines} machine{'s' * (machines > 1)} of this launch, so "
            f"that one trains; got {settings.standby_machines}. Add hosts to the hostfile (or nodes to the allocation)"
        )
    return machines - settings.standby_machines


def replicas_of(settings: SnapshotConfig, machines: int) -> int:
    """Copies of each shard, the own one included.

    Args:
        machines: that train.

    Raises:
        ConfigError: more copies than machines, or not one failure domain for each machine.
    """
    if settings.mode != "memory":
        return 1
    domains = settings.failure_domains
    if domains and len(domains) != machines:
        raise ConfigError(
            f"snapshot.failure_domains: expected one name for each of the {machines} machines, in the launcher's order; "
            f"got {len(domains)}"
        )
    if settings.replicas == "auto":
        return min(2, machines)
    if int(settings.replicas) > machines:
        raise ConfigError(
            f"snapshot.replicas: expected at most one copy for each of the {machines} machine{'s' * (machines > 1)} that "
            f"train{'s' * (machines == 1)}; got {settings.replicas}. Set snapshot.replicas=auto, or start on more machines"
        )
    return int(settings.replicas)


def to_mapping(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON types; the inverse of :func:`from_mapping`."""
    return asdict(config)


def from_checked(settings: Mapping[str, Any], kind: type[T]) -> T:
    """The ``kind`` whose :func:`to_mapping` is ``settings``. Nothing is checked again: 30 ms, a tenth of a recovery."""
    types = get_type_hints(kind)
    values = {
        key: from_checked(value, types[key]) if is_dataclass(types[key]) else value for key, value in settings.items()
    }
    return kind(**values)


def from_mapping(settings: Any) -> Config:
    """A checked :class:`Config` from a DictConfig or nested dict.

    Raises:
        ConfigError: unknown key, wrong type, value outside its choices, or settings that contradict each other.
    """
    from omegaconf import OmegaConf  # 0.1 s: only where a config is made
    from omegaconf.errors import OmegaConfBaseException

    try:
        # A plain container first: a key that Hydra was told to add (+key=...) must meet the schema like any other.
        plain = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else settings
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{str(error).splitlines()[0]} (setting: {getattr(error, 'full_key', None) or '?'})"
        ) from None
    assert isinstance(config, Config)
    for name in ("every", "replicas"):  # OmegaConf takes a number for the text that stood there before
        value = getattr(config.snapshot, name)
        if isinstance(value, str) and value.isdecimal():
            setattr(config.snapshot, name, int(value))
    validate(config)
    return config


def validate(config: Config) -> None:
    """Everything that can be said without looking at a graph or a machine.

    Raises:
        ConfigError: names the setting, what was expected and what it holds.
    """

    def choices(node: Any, path: str) -> None:
        for f in fields(node):
            value, name = getattr(node, f.name), f"{path}{f.name}"
            if is_dataclass(value):
                choices(value, name + ".")
            elif "choices" in f.metadata and value not in f.metadata["choices"]:
                raise ConfigError(f"{name}: expected one of {', '.join(f.metadata['choices'])}; got {value!r}")

    def demand(ok: bool, name: str, expected: str, got: Any) -> None:
        if not ok:
            raise ConfigError(f"{name}: expected {expected}; got {got!r}")

    choices(config, "")
    s, m, t, o = config.sampling, config.model, config.training, config.optimizer
    demand(
        all(f == -1 or f > 0 for f in s.fanouts),
        "sampling.fanouts",
        "positive numbers or -1 (all)",
        s.fanouts,
    )
    demand(
        len(s.fanouts) == m.layers,
        "sampling.fanouts",
        f"one fanout per layer (model.layers={m.layers}), hop 1 first",
        s.fanouts,
    )
    e = config.evaluation
    demand(
        not e.fanouts or len(e.fanouts) == m.layers,
        "evaluation.fanouts",
        f"nothing (exact) or one fanout per layer (model.layers={m.layers})",
        e.fanouts,
    )
    demand(
        all(f == -1 or f > 0 for f in e.fanouts),
        "evaluation.fanouts",
        "positive numbers or -1 (all)",
        e.fanouts,
    )
    demand(
        s.batch_size == -1 or s.batch_size > 0,
        "sampling.batch_size",
        "a positive number or -1 (all)",
        s.batch_size,
    )
    demand(s.prefetch >= 0, "sampling.prefetch", "0 or more batches", s.prefetch)
    demand(s.chunk_bytes >= 4096, "sampling.chunk_bytes", "at least 4096", s.chunk_bytes)
    demand(m.layers >= 1, "model.layers", "at least 1", m.layers)
    demand(m.hidden >= 1, "model.hidden", "at least 1", m.hidden)
    demand(0 <= m.dropout < 1, "model.dropout", "a number in [0, 1)", m.dropout)
    demand(t.epochs >= 1, "training.epochs", "at least 1", t.epochs)
    demand(t.accumulation >= 1, "training.accumulation", "at least 1", t.accumulation)
    demand(o.lr > 0, "optimizer.lr", "a positive number", o.lr)
    demand(o.weight_decay >= 0, "optimizer.weight_decay", "0 or more", o.weight_decay)
    demand(config.deepspeed.zero in (0, 1, 2, 3), "deepspeed.zero", "0, 1, 2 or 3", config.deepspeed.zero)
    if t.precision == "bf16_products":
        theirs = sorted(
            {"bf16", "fp16"}
            & {k for k, v in config.deepspeed.config.items() if isinstance(v, dict) and v.get("enabled")}
        )
        demand(
            not theirs,
            "deepspeed.config",
            "no precision of DeepSpeed's beside training.precision=bf16_products, which needs float32 weights (leave "
            "either out)",
            theirs,
        )
        demand(
            m._target_ is None,
            "training.precision",
            f"fp32 or bf16 with model._target_={m._target_}: the products of a model of your own are not ours to change",
            t.precision,
        )
    demand(config.partition.parts >= 0, "partition.parts", "0 (one per rank) or more", config.partition.parts)
    n = config.snapshot
    demand(
        n.every == "auto" or (isinstance(n.every, int) and n.every >= 1),
        "snapshot.every",
        "auto, or at least 1 step",
        n.every,
    )
    demand(n.mtbf_s > 0, "snapshot.mtbf_s", "more than 0", n.mtbf_s)
    demand(
        n.replicas == "auto" or (isinstance(n.replicas, int) and n.replicas >= 1),
        "snapshot.replicas",
        "auto, or at least 1 (the own copy)",
        n.replicas,
    )
    demand(n.replicate_every_s >= 0, "snapshot.replicate_every_s", "0 or more", n.replicate_every_s)
    demand(
        n.replica_bytes_per_s == 0 or n.replica_bytes_per_s >= 100_000,
        "snapshot.replica_bytes_per_s",
        "0 (no limit), or at least 100000: less looks like a peer that has stopped",
        n.replica_bytes_per_s,
    )
    demand(
        interval(n.persist_every) is not None,
        "snapshot.persist_every",
        'a time ("10min", "90s", "2h"), steps ("500 steps") or "never"',
        n.persist_every,
    )
    demand(n.persist_keep >= 1, "snapshot.persist_keep", "at least 1", n.persist_keep)
    demand(e.every >= 0, "evaluation.every", "0 (only at the end) or more epochs", e.every)
    demand(e.batch_size >= 1, "evaluation.batch_size", "at least 1 node", e.batch_size)
    demand(config.snapshot.nfs_every >= 1, "snapshot.nfs_every", "at least 1 step", config.snapshot.nfs_every)
    demand(o.step_every >= 1, "optimizer.step_every", "at least 1 step", o.step_every)
    demand(o.warmup_steps >= 0, "optimizer.warmup_steps", "0 or more", o.warmup_steps)
    demand(len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "optimizer.betas", "two numbers in [0, 1)", o.betas)
    demand(t.threads >= 0, "training.threads", "0 (share the cores) or more", t.threads)
    demand(t.patience >= 0, "training.patience", "0 (never stop early) or more", t.patience)
    demand(config.distributed.timeout_s > 0, "distributed.timeout_s", "more than 0", config.distributed.timeout_s)
    demand(
        config.distributed.start_timeout_s > 0,
        "distributed.start_timeout_s",
        "more than 0",
        config.distributed.start_timeout_s,
    )
    r = config.recovery
    demand(r.hang_factor == 0 or r.hang_factor > 1, "recovery.hang_factor", "more than 1, or 0 (never)", r.hang_factor)
    demand(r.hang_floor_s > 0, "recovery.hang_floor_s", "more than 0", r.hang_floor_s)
    demand(r.heartbeat_s > 0, "recovery.heartbeat_s", "more than 0", r.heartbeat_s)
    demand(
        r.silence_s >= 4 * r.heartbeat_s,
        "recovery.silence_s",
        f"at least 4 heartbeats (recovery.heartbeat_s={r.heartbeat_s:g}): one that comes late is no silence",
        r.silence_s,
    )
    demand(r.standby_machines >= 0, "recovery.standby_machines", "0 or more", r.standby_machines)
    demand(r.return_s >= 0, "recovery.return_s", "0 (replaced at once) or more", r.return_s)
    demand(r.wait_s > 0, "recovery.wait_s", "more than 0", r.wait_s)
    demand(r.same_step_failures >= 0, "recovery.same_step_failures", "0 (never restart) or more", r.same_step_failures)
    schedule.check(config.faults)
    ours = {"gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"}
    demand(
        not ours & config.deepspeed.config.keys(),
        "deepspeed.config",
        "no batch sizes (they are training.accumulation and sampling.batch_size)",
        sorted(ours & config.deepspeed.config.keys()),
    )
    demand(bool(config.run_dir), "run_dir", "a folder", config.run_dir)
