"""Which fault is committed when: texts and a seed in, :class:`Fault` out. Pure.

    kill-rank 2 @ step 5                  SIGKILL as rank 2 begins step 5 (1 is the first, as in losses.csv)
    kill-rank 1 @ step 7 in backward      the first time, from step 7 on, that rank 1 is in that phase
    kill-rank 0 @ step 9 in start-up      in the first start after step 9 was done: a fault in a recovery
    stop-rank 1 @ 12.5 s                  SIGSTOP, 12.5 seconds after the job first began
    hang-collective 1 @ step 9            stops calling just before the agreement (or the phase that it names)
    raise-rank 3 @ step 4                 raises InjectedFault
    oom-rank 0 @ step 6                   allocates until the kernel kills it
    kill-agent h1 @ 12 s                  SIGKILL to the agent of machine h1; rank:3 means the machine of rank 3
    kill-warm h1 @ step 3                 to its warm parent
    kill-root @ step 20                   to the agent that is root
    cut-link h3 for 20 s @ step 9         nothing goes to or from h3 for so long
    split h0,h1 from h2,h3 for 20 s @ step 9    the machines of one side hear nothing of the other side's
    split half:7 from others for 20 s @ step 9  half of the machines, drawn by the seed 7, and the others
    power-off h2 @ step 9                 the machine h2 loses its power; hosts of the lab only
    corrupt-replica 3 @ step 9            flips a byte of the newest copy of rank 3's shard that another machine keeps
    fill-shm h1 for 5 s @ step 9          fills /dev/shm of h1 to the last page
    hang-filesystem h1 for 20 s @ step 9  the run directory does not answer h1; without a name: no machine

Without `for S s` a split, and a full /dev/shm, last 10 s.

Each text is one fault and fires once per job, also over recoveries and new starts: the same text twice means two faults. A
fault bound to a step is due from that step on, since a job may be away when the step comes. Trainers commit the faults of
ranks, agents the others.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gemini_gnn.errors import ConfigError

if TYPE_CHECKING:
    from gemini_gnn.config import FaultsConfig

# The words of recovery.board.Phase, which stands higher; a test compares them.
PHASES = (
    *("start-up", "partitioning", "sampling", "exchange", "forward", "backward", "agreement", "reduction", "step"),
    *("capture", "evaluation", "writing"),
)
BEFORE_STEPS = ("start-up", "partitioning")
OF_RANK = ("kill-rank", "stop-rank", "oom-rank", "hang-collective", "raise-rank")
OF_MACHINE = ("kill-agent", "kill-warm", "cut-link", "power-off", "fill-shm", "hang-filesystem")
KINDS = (*OF_RANK, *OF_MACHINE, "kill-root", "split", "corrupt-replica")
LASTING = ("cut-link", "split", "fill-shm", "hang-filesystem")
MAY_LAST = ("split", "fill-shm")  # need not say how long
LASTS_S = 10.0  # of a random fault, and of one that need not say it

_SECONDS = r"\d{1,9}(?:\.\d{1,3})?"
_RANK = r"(?:0|[1-9]\d{0,6})"
_MACHINE = rf"(?:rank:{_RANK}|[A-Za-z0-9][\w.-]{{0,99}})"
_SIDE = rf"{_MACHINE}(?:,{_MACHINE})*"
_TARGETS = {
    **dict.fromkeys((*OF_RANK, "corrupt-replica"), (" RANK", rf" (?P<target>{_RANK})")),
    **dict.fromkeys(OF_MACHINE, (" MACHINE", rf" (?P<target>{_MACHINE})")),
    "hang-filesystem": (" [MACHINE]", rf"(?: (?P<target>{_MACHINE}))?"),
    "split": (" MACHINE,... from MACHINE,...", rf" (?P<target>half:\d{{1,9}}|{_SIDE}) from (?P<others>{_SIDE})"),
    "kill-root": ("", ""),
}
_WHEN = rf"(?: @ (?:step (?P<at_step>\d{{1,12}})|(?P<at_s>{_SECONDS}) ?s))?"
_IN = rf"(?: in (?P<phase>{'|'.join(PHASES)}))?"


@dataclass(frozen=True)
class Fault:
    """One planned failure; ``str`` gives the text that it is parsed from.

    Attributes:
        target: a rank, a machine (``rank:3``: that of rank 3), one side of a split; "" for the root, or every machine.
        others: the other side of a split.
        at_step, at_s: not before this step (1 is the first; 0: at once), or so many seconds of the job. Neither: at once.
        phase: of the target's trainers; None: whichever comes next (with ``at_step``, of a step).
        for_s: how long it lasts, for the kinds of ``LASTING``.
    """

    kind: str
    target: str = ""
    at_step: int | None = None
    at_s: float | None = None
    phase: str | None = None
    for_s: float | None = None
    others: str = ""

    def __str__(self) -> str:
        text = f"{self.kind} {self.target}" if self.target else self.kind
        text += f" from {self.others}" if self.others else ""
        text += f" for {self.for_s:.12g} s" if self.for_s is not None else ""
        text += f" @ step {self.at_step}" if self.at_step is not None else ""
        text += f" @ {self.at_s:.12g} s" if self.at_s is not None else ""
        return f"{text} in {self.phase}" if self.phase else text


def parse(text: str) -> Fault:
    """The fault of a text of ``faults.at``.

    Raises:
        ConfigError: an unknown kind, or a text that is not as its kind is written.
    """
    fault = _parse(text, "faults.at", " @ step N (or S s)")
    if fault.at_step is None and fault.at_s is None:
        raise ConfigError(f"faults.at: expected when it is due; got {text!r}: write '{fault} @ step 5' or '... @ 12 s'")
    return fault


def parse_command(words: Sequence[str]) -> Fault:
    """The fault of a command such as ``kill-rank 2`` or ``cut-link h3 --for 20s``: due at once.

    Raises:
        ConfigError: as :func:`parse`; or it says when.
    """
    fault = _parse(" ".join(words).replace(" --for ", " for "), "inject", "")
    if fault.at_step is not None or fault.at_s is not None:
        now = replace(fault, at_step=None, at_s=None)
        raise ConfigError(
            f"inject: expected a fault that is due at once; got '{fault}': type '{now}', or start the job "
            f"with {shell_word(fault)}"
        )
    return fault


def shell_word(fault: Fault) -> str:
    """How ``fault`` is given to ``launch/train.py``. Where it has a comma, quotes keep it one of the list."""
    return f"\"faults.at=['{fault}']\"" if "," in str(fault) else f"'faults.at=[{fault}]'"


def _parse(text: str, source: str, when: str) -> Fault:
    kind, _, rest = " ".join(text.split()).partition(" ")
    if kind not in KINDS:
        raise ConfigError(f"{source}: expected one of {', '.join(KINDS)} first; got {text!r}")
    shown, target = _TARGETS[kind]
    lasts, lasting = (rf" for (?P<for_s>{_SECONDS}) ?s", " for S s") if kind in LASTING else ("", "")
    if kind in MAY_LAST:
        lasts, lasting = f"(?:{lasts})?", f" [{lasting[1:]}]"
    found = re.fullmatch(target + lasts + _WHEN + _IN, f" {rest}" if rest else "", re.ASCII)
    if found is None:
        raise ConfigError(
            f"{source}: expected '{kind}{shown}{lasting}{when} [in PHASE]'; got {text!r}. "
            f"PHASE is one of {', '.join(PHASES)}"
        )
    part: Mapping[str, str | None] = found.groupdict()
    return Fault(
        kind,
        part.get("target") or "",
        at_step=int(part["at_step"]) if part["at_step"] else None,
        at_s=float(part["at_s"]) if part["at_s"] else None,
        phase=part["phase"] or ("agreement" if kind == "hang-collective" else None),
        for_s=float(part.get("for_s") or LASTS_S) if kind in LASTING else None,
        others=part.get("others") or "",
    )


def check_allowed(kind: str, allow: bool) -> None:
    """
    Raises:
        ConfigError: it is no kill, and the job was not started with ``faults.allow=true``.
    """
    if not allow and not kind.startswith("kill-"):
        raise ConfigError(
            f"{kind}: expected faults.allow=true for what is no kill; start the job with faults.allow=true"
        )


def check(settings: FaultsConfig) -> None:
    """
    Raises:
        ConfigError: a setting of the group ``faults`` is wrong, or asks for what is not allowed.
    """
    for name, expected, ok in (
        ("mtbf_s", "0 (none) or more seconds", 0 <= settings.mtbf_s < float("inf")),
        ("count", "at least 1", settings.count >= 1),
        ("kinds", f"some of {', '.join(KINDS)}", bool(settings.kinds) and set(settings.kinds) <= set(KINDS)),
        ("phases", f"none (whichever comes next) or some of {', '.join(PHASES)}", set(settings.phases) <= set(PHASES)),
    ):
        if not ok:
            raise ConfigError(f"faults.{name}: expected {expected}; got {getattr(settings, name)!r}")
    for kind in [*(parse(text).kind for text in settings.at), *(settings.kinds if settings.mtbf_s else ())]:
        check_allowed(kind, settings.allow)


def planned(settings: FaultsConfig, world_size: int) -> dict[str, Fault]:
    """Every fault of a job of ``world_size`` ranks by a name of its own: the same on all ranks, and in every start.

    Raises:
        ConfigError: as :func:`check`; a rank that the job does not have.
    """
    check(settings)
    faults = [*map(parse, settings.at), *_random(settings, world_size)]
    for fault in faults:
        if any(rank >= world_size for rank in _ranks(fault)):
            raise ConfigError(f"faults.at: expected a rank from 0 to {world_size - 1}; got '{fault}'")
    return named(faults)


def _ranks(fault: Fault) -> list[int]:
    """The ranks that ``fault`` names."""
    if fault.kind in (*OF_RANK, "corrupt-replica"):
        return [int(fault.target)]
    return [int(rank) for rank in re.findall(r"rank:(\d+)", f"{fault.target},{fault.others}")]


def named(faults: Iterable[Fault]) -> dict[str, Fault]:
    """Faults by name: the text as a file name, and a number, for the same text may be there twice.

    A long text, of many machines, is cut short: a file's name has at most 255 bytes.
    """
    found: dict[str, Fault] = {}
    seen: Counter[str] = Counter()
    for fault in faults:
        slug = re.sub(r"[^\w.:-]+", "-", str(fault))[:200]
        seen[slug] += 1
        found[f"{slug}.{seen[slug]}"] = fault
    return found


def _random(settings: FaultsConfig, world_size: int) -> list[Fault]:
    """A Poisson process of the whole job: kinds, targets and phases uniform, each fault ``mtbf_s`` after the last in the mean."""
    draw, faults, at_s = random.Random(settings.seed), list[Fault](), 0.0
    for _ in range(settings.count if settings.mtbf_s else 0):
        at_s += draw.expovariate(1 / settings.mtbf_s)
        kind, rank, phase = (
            draw.choice(settings.kinds),
            draw.randrange(world_size),
            draw.choice(settings.phases or [""]),
        )
        if kind == "hang-collective":
            phase = "agreement"
        if kind in (*OF_RANK, "corrupt-replica"):
            target = str(rank)
        elif kind == "split":
            target = f"half:{draw.randrange(10**9)}"
        else:
            target = f"rank:{rank}" if kind in OF_MACHINE else ""
        faults.append(
            Fault(
                kind,
                target,
                at_s=round(at_s, 3),
                phase=(phase or None) if kind in OF_RANK else None,
                for_s=LASTS_S if kind in LASTING else None,
                others="others" if kind == "split" else "",
            )
        )
    return faults


def due(fault: Fault, step: int, elapsed_s: float, phase: str) -> bool:
    """Whether ``fault`` is due.

    Args:
        step, phase: of a trainer: of the target, where it is a rank; else of any that the caller sees.
        elapsed_s: since the job first began.
    """
    if step < (fault.at_step or 0) or elapsed_s < (fault.at_s or 0.0):
        return False
    if fault.phase is None:  # a step begins with its first phase, not with the start before it
        return fault.at_step is None or phase not in BEFORE_STEPS
    return phase == fault.phase
