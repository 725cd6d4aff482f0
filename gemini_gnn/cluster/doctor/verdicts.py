"""From what was found to verdicts: one line each, with the command to type beside what is not well. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemini_gnn.cluster.doctor.examine import Document, master_address
from gemini_gnn.cluster.doctor.links import Link, slow_links, usual_rate
from gemini_gnn.files import LOCAL

OK, REMARK, BAD = "ok", "remark", "bad"

LOGIN_S = 5.0  # the launcher logs in to each machine, and waits
SKEW_S = 1.0  # recovery compares no clocks of machines; a reader of their logs does
SKEW_BAD_S = 60.0  # munge (SLURM) and Kerberos refuse at 300 s, and a clock that is not set drifts on
SHM_BYTES = 256 << 20  # containers have 64 MB there, and no graph's snapshots fit
MEMORY_BYTES = 1 << 30  # a warm parent and one trainer
OPEN_FILES = 512
SEEN_S = 2.0
MUST_AGREE = ("python", "torch", "deepspeed", "numpy", "numba", "sources", "project")


@dataclass(frozen=True)
class Finding:
    """A verdict on one thing: ``subject`` is a machine, a link, or what they share."""

    verdict: str
    subject: str
    check: str
    text: str
    remedy: str = ""


Machine = Mapping[str, Any]


def findings(document: Document) -> list[Finding]:
    machines, how = document["machines"], document["how"]
    answered = [machine for machine in machines if machine["facts"]]
    found = [*_reached(machines, how)]
    if document["launcher"]:
        found += launcher(document["launcher"])
    found += agreement(answered)
    for machine in answered:
        found += _machine(machine)
    found += _cards(machines)
    lost = {machine["host"] for machine in answered if machine["problem"]}  # said already; it explains the rest
    found += links([link for link in document["links"] if not lost & {link["from"], link["to"]}])
    if document["folder"] is not None:
        found += folder(document["folder"], document["run_dir"])
    if document["collective"] is not None:
        found += collective(document["collective"], lost)
    return [replace(one, remedy=typed(one.remedy, how)) for one in found]


def typed(remedy: str, how: str) -> str:
    """A remedy that begins with ssh, as it is typed where machines are reached by ``how``."""
    if how == "ssh":
        return remedy
    step = "srun --overlap -w {} " if how == "srun" else ""

    def there(match: re.Match[str]) -> str:
        quoted = match[2] or ""
        return step.format(match[1]) + (f"sh -c {quoted}" if step and quoted else quoted[1:-1])

    return re.sub(r"\bssh (\S+) ('[^']*')?", there, remedy)


def refused(found: Sequence[Finding]) -> list[str]:
    """The machines, or links, without which no job can begin."""
    vital = {"reach", "run_dir", *MUST_AGREE}
    return list(dict.fromkeys(one.subject for one in found if one.verdict == BAD and one.check in vital))


def summary(found: Sequence[Finding]) -> str:
    bad, remarks = ([one for one in found if one.verdict == kind] for kind in (BAD, REMARK))
    if bad:
        subjects = ", ".join(dict.fromkeys(one.subject for one in bad))
        return f"bad: {subjects}; type what stands beside it, then this command again"
    return f"ok, {len(remarks)} remark{'s' * (len(remarks) > 1)}" if remarks else "ok"


def worst(found: Sequence[Finding]) -> str:
    return max((one.verdict for one in found), key=(OK, REMARK, BAD).index, default=OK)


def launcher(found: Mapping[str, bool]) -> Iterator[Finding]:
    """The machine that asks, where it will launch."""
    if not found["pdsh"]:
        text = "no pdsh here, with which deepspeed starts the other machines"
        yield Finding(REMARK, "here", "launcher", text, "sudo apt-get install pdsh")
    if not found["keeps_alive"]:
        text = "ssh does not notice a host that loses power: a bare deepspeed would wait for it for ever"
        remedy = "python launch/hosts.py run HOSTFILE launch/train.py ...   (or ServerAliveInterval 5 in ~/.ssh/config)"
        yield Finding(REMARK, "here", "launcher", text, remedy)


# --- machines ---------------------------------------------------------------------------------------------------------


def _reached(machines: Sequence[Machine], how: str) -> Iterator[Finding]:
    names: dict[str, list[str]] = {}
    for machine in machines:
        host, login_s = machine["host"], machine["login_s"] or 0.0
        if machine["problem"]:
            yield Finding(BAD, host, "reach", machine["problem"], machine["remedy"])
        elif login_s > LOGIN_S:
            text = f"{how} takes {login_s:.1f} s; often its sshd looks up names that nobody knows"
            yield Finding(REMARK, host, "reach", text, f"ssh {host} grep UseDNS /etc/ssh/sshd_config   (no is quick)")
        else:
            yield Finding(OK, host, "reach", f"{how} in {login_s:.1f} s" if how != "here" else "this machine")
        if machine["facts"]:
            names.setdefault(machine["facts"]["machine"], []).append(host)
    for name, hosts in names.items():
        if len(hosts) > 1:
            text = f"{' and '.join(hosts)} are one machine, {name}; give it one line, with all its slots"
            yield Finding(BAD, hosts[-1], "reach", text, "edit the hostfile")


def agreement(answered: Sequence[Machine]) -> Iterator[Finding]:
    """The facts that must be the same on all machines: each one that is not, with the command for the fewer."""
    same = True
    for name in MUST_AGREE:
        values: dict[str, list[str]] = {}
        for machine in answered:
            values.setdefault(str(machine["facts"][name]), []).append(machine["host"])
        if len(values) == 1:
            continue
        same = False
        most = max(values, key=lambda value: len(values[value]))
        for value, hosts in values.items():
            if value != most:
                text = f"expected the same {name} everywhere; got {most} on {', '.join(values[most])}; {value} here"
                yield Finding(
                    BAD, ", ".join(hosts), name, text, _make_same(name, most, values[most][0], hosts[0], answered)
                )
    if same and answered:
        facts = answered[0]["facts"]
        text = f"Python {facts['python']}, torch {facts['torch']}, deepspeed {facts['deepspeed']}, sources {facts['sources']}"
        yield Finding(OK, "all", "software", text)


def _make_same(name: str, value: str, like: str, host: str, answered: Sequence[Machine]) -> str:
    facts = next(machine["facts"] for machine in answered if machine["host"] == like)
    project = facts["project"]
    if name == "sources":
        return f"ssh {host} rsync -a --delete {like}:{project}/gemini_gnn/ {project}/gemini_gnn/"
    if name in ("python", "project"):
        return f"make the project and its environment on {host} under the same paths as on {like}: {project}"
    return f"ssh {host} {facts['executable']} -m pip install {name}=={value}"


def _machine(machine: Machine) -> Iterator[Finding]:
    facts, host = machine["facts"], machine["host"]
    yield clock(host, machine.get("skew_s"), machine.get("skew_within_s"))
    yield shm(host, facts["shm_bytes"], facts["shm_free_bytes"])
    yield memory(host, facts["memory_bytes"], facts["limit_bytes"], facts["shm_free_bytes"])
    if facts["forgets_at_logout"]:
        text = "systemd removes your files in /dev/shm, the snapshots, when your last session there ends"
        yield Finding(REMARK, host, "logout", text, f"ssh {host} loginctl enable-linger")
    if facts["open_files"] < OPEN_FILES:
        text = f"{facts['open_files']} open files at most; expected {OPEN_FILES}"
        yield Finding(REMARK, host, "open files", text, "ulimit -n 4096   (or nofile in /etc/security/limits.conf)")
    if facts["gpus"] and len(facts["gpus"]) < machine["slots"]:
        text = f"{len(facts['gpus'])} GPUs for {machine['slots']} ranks: all ranks will train on the CPU with gloo"
        yield Finding(REMARK, host, "GPUs", text, f"write slots={len(facts['gpus'])} for each host of the hostfile")
    else:
        yield Finding(OK, host, "GPUs", ", ".join(facts["gpus"]) or f"none; {facts['cores']} cores")


def clock(host: str, skew_s: float | None, within_s: float | None) -> Finding:
    """Only what exceeds the uncertainty of the measurement is skew."""
    remedy = f"ssh {host} sudo timedatectl set-ntp true"
    if skew_s is None or within_s is None:
        return Finding(BAD, host, "clock", "gave no time", f"ssh {host} date")
    sure_s = abs(skew_s) - within_s
    words = f"{abs(skew_s):.2f} s {'ahead' if skew_s > 0 else 'behind'}, within {within_s:.2f} s"
    if sure_s > SKEW_BAD_S:
        return Finding(BAD, host, "clock", f"{words}; SLURM and Kerberos refuse such a machine", remedy)
    if sure_s > SKEW_S:
        return Finding(REMARK, host, "clock", f"{words}; training does not mind, readers of logs do", remedy)
    return Finding(OK, host, "clock", f"right within {abs(skew_s) + within_s:.2f} s")


def shm(host: str, total: int, free: int) -> Finding:
    words = f"{gib(free)} of {gib(total)} free in /dev/shm, where the snapshots go"
    if total < SHM_BYTES:
        remedy = f"ssh {host} sudo mount -o remount,size=50% /dev/shm   (a container: --shm-size=8g)"
        return Finding(BAD, host, "/dev/shm", f"{words}; expected at least {gib(SHM_BYTES)}", remedy)
    if free < SHM_BYTES:
        remedy = (
            f"ssh {host} ls -l /dev/shm; there: python launch/inspect_snapshots.py --sweep (removes those of dead jobs)"
        )
        return Finding(BAD, host, "/dev/shm", f"{words}; expected at least {gib(SHM_BYTES)}", remedy)
    return Finding(OK, host, "/dev/shm", words)


def memory(host: str, left: int | None, limit: int | None, shm_free: int) -> Finding:
    room = min((one for one in (left, limit) if one is not None), default=None)
    if room is None:
        return Finding(REMARK, host, "memory", "the machine does not say how much is free", f"ssh {host} free -g")
    if room < MEMORY_BYTES:
        text = f"{gib(room)} left; expected at least {gib(MEMORY_BYTES)} for the processes of one rank"
        return Finding(BAD, host, "memory", text, f"ssh {host} 'ps aux --sort=-rss | head'   (SLURM: a larger --mem)")
    if limit is not None and limit < shm_free:
        text = f"a cgroup leaves {gib(limit)}, less than /dev/shm has free: snapshots count there too"
        return Finding(
            REMARK, host, "memory", text, "count the snapshots into the limit (SLURM: --mem; docker: --memory)"
        )
    return Finding(OK, host, "memory", f"{gib(room)} left")


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


# --- between them -----------------------------------------------------------------------------------------------------


def _cards(machines: Sequence[Machine]) -> Iterator[Finding]:
    """The way to the first machine."""
    answered = [machine for machine in machines if machine["facts"]]
    if len(machines) < 2 or not answered:
        return
    first = machines[0]["host"].split("@")[-1]
    if master_address(machines) is None:
        seen = "; ".join(f"{m['facts']['first'] or 'unknown'} on {m['host']}" for m in answered)
        remedy = f"deepspeed --master_addr ADDRESS ...   (of {first}, `hostname -I` there), or one address in DNS"
        yield Finding(BAD, first, "address", f"the machines know it by different addresses: {seen}", remedy)
        return
    for machine in answered:
        if "route_problem" in machine:
            yield Finding(BAD, machine["host"], "card", machine["route_problem"], f"ip route get {first}")
        elif machine.get("interface") == "lo" and machine is not machines[0]:
            text = f"{first} means loopback here"
            yield Finding(BAD, machine["host"], "card", text, f"ssh {machine['host']} getent hosts {first}")
        elif "interface" in machine:
            text = f"{machine['interface']} ({machine['address']})"
            yield Finding(OK, machine["host"], "card", text)


def links(found: Sequence[Link]) -> Iterator[Finding]:
    """A line for each link that does not work or is slow, or for the machine that explains it; one for the rest."""
    usual = usual_rate(found)
    blocked = [link for link in found if "problem" in link]
    slow = slow_links(found)
    for subject, some in by_machine(blocked, found):
        link = some[0]
        text = f"no TCP to a free port of {link['to']} ({link['address']}): {link['problem']}"
        remedy = f"on {link['to']}: sudo ufw allow proto tcp from {link['from']}   (or your firewall's way; all ports)"
        yield Finding(BAD, subject, "ports", text, remedy)
    for subject, some in by_machine(slow, found):
        text = f"{rate(min(link['bytes_per_s'] for link in some))}; usual here is {rate(usual)}"
        host = subject if " " not in subject else some[0]["to"]
        yield Finding(REMARK, subject, "bandwidth", text, f"ssh {host} 'ip -s link; ethtool CARD | grep Speed'")
    good = [link for link in found if link not in blocked and link not in slow]
    if good:
        late_ms = 1e3 * max(link["latency_s"] for link in good)
        text = f"ports open, {rate(min(link['bytes_per_s'] for link in good))} or more, {late_ms:.2f} ms there and back"
        yield Finding(OK, _count(len(good), "link"), "ports", text)


def by_machine(some: Sequence[Link], all_links: Sequence[Link]) -> Iterator[tuple[str, list[Link]]]:
    """``some`` of the links, under the name of the machine that explains them, or each under its own."""
    rest = list(some)
    for host in dict.fromkeys(link["to"] for link in all_links):
        its = [link for link in all_links if host in (link["from"], link["to"])]
        if len(its) > 2 and all(link in rest for link in its):
            rest = [link for link in rest if link not in its]
            yield host, its
    for link in rest:
        yield f"{link['from']} -> {link['to']}", [link]


def rate(bytes_per_s: float) -> str:
    return f"{8e-9 * bytes_per_s:.2f} Gbit/s"


# --- what they share --------------------------------------------------------------------------------------------------


def folder(found: Mapping[str, Any], run_dir: str) -> Iterator[Finding]:
    if "problem" in found:
        verb = f"ls -ld {run_dir}"
        text = f"{run_dir} cannot be written: {found['problem']}"
        yield Finding(BAD, found["host"], "run_dir", text, f"ssh {found['host']} {verb}; or name another run_dir=")
        return
    looks: Mapping[str, Mapping[str, Any]] = found["looks"]
    first, *_ = looks
    if any(look.get("private") for look in looks.values()):
        yield from private(looks, run_dir)
        return
    seen = {host: look for host, look in looks.items() if look.get("seen_s") is not None}
    for host, look in looks.items():
        if "problem" in look:
            words = "hangs" if look.get("hangs") else "fails"
            yield Finding(BAD, host, "run_dir", f"{run_dir} {words}: {look['problem']}", f"ssh {host} df {run_dir}")
        elif look["seen_s"] is None:
            kind = look["type"] + (", of that machine alone" if look["type"] in LOCAL else "")
            text = f"{run_dir} is not the folder of {first}: a file just written there is not seen ({kind})"
            yield Finding(
                BAD,
                host,
                "run_dir",
                text,
                f"name a folder that all machines share: run_dir=...; ssh {host} df. If there is none: "
                f"`python launch/hosts.py private HOSTFILE run_dir={run_dir}`",
            )
        elif look["seen_s"] > SEEN_S:
            text = f"sees a new file after {look['seen_s']:.1f} s: failures are noticed later by that"
            yield Finding(REMARK, host, "run_dir", text, "mount it with a short attribute cache (NFS: actimeo=3)")
    if not seen:
        return
    winners = [host for host, look in seen.items() if look["won"]]
    if len(winners) != 1:
        text = (
            f"of {len(seen)} machines {len(winners)} created one and the same file: two jobs could take it for theirs"
        )
        yield Finding(BAD, "all", "run_dir", text, "name a run_dir= on another file system (not NFSv2, no local cache)")
    kinds = ", ".join(sorted({look["type"] for look in seen.values()}))
    if {look["type"] for look in seen.values()} & {"tmpfs", "ramfs"}:
        text = f"{run_dir} is in memory ({kinds}): checkpoints and results go with the machine"
        yield Finding(REMARK, first, "run_dir", text, "name a run_dir= on a disk")
    if len(seen) == len(looks) and len(winners) == 1:
        yield Finding(OK, "all", "run_dir", f"one folder on {_count(len(looks), 'machine')} ({kinds})")
    yield locks(seen, kinds)


def private(looks: Mapping[str, Mapping[str, Any]], run_dir: str) -> Iterator[Finding]:
    """Each machine is to have a run directory of its own."""
    lacking = [host for host, look in looks.items() if not look.get("private")]
    for host in lacking:
        words = looks[host].get("problem", "was not made for this machine")
        remedy = f"python launch/hosts.py private HOSTFILE run_dir={run_dir}"
        yield Finding(BAD, host, "run_dir", f"{run_dir} {words}, other machines have one of their own", remedy)
    if not lacking:
        most = len(looks) // 2 + 1
        text = f"each of {_count(len(looks), 'machine')} has its own; {most} must live for a job to go on"
        yield Finding(OK, "all", "run_dir", text)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def locks(looks: Mapping[str, Mapping[str, Any]], kinds: str) -> Finding:
    """A run directory needs none; partitioned graphs are made without them more than once, and none is damaged."""
    said = {look["lock"] for look in looks.values()}
    if said == {"refused"}:
        return Finding(OK, "all", "locks", "a lock of one process holds for all")
    remedy = "python launch/partition.py ... before the job, for graphs that are partitioned on demand"
    if "taken" in said:
        free = ", ".join(host for host, look in looks.items() if look["lock"] == "taken")
        return Finding(REMARK, free, "locks", f"{kinds}: locks of one machine do not hold on the others", remedy)
    (why,) = sorted(said - {"refused"})[:1]
    return Finding(REMARK, "all", "locks", f"{kinds} knows no locks: {why}", remedy)


CONSEQUENCE = re.compile(r"closed by peer|likely closed|Broken pipe|Connection reset|timed? ?out", re.IGNORECASE)


def collective(found: Mapping[str, Any], lost: Collection[str] = ()) -> Iterator[Finding]:
    """The error of the rank that began is shown; the others only lost it."""
    if lost or not found:
        why = f"{', '.join(sorted(lost))} went away" if lost else "ports are blocked"
        text = f"an all-reduce was not tried to its end: {why}"
        yield Finding(REMARK, "all", "collectives", text, "mend that, then type this command again")
        return
    failed = {host: answer["problem"] for host, answer in found["answers"].items() if "problem" in answer}
    if not failed:
        seconds = max(answer["seconds"] for answer in found["answers"].values())
        ranks = _count(len(found["answers"]), "rank")
        text = f"all-reduce and all_to_all over {ranks} with {found['backend']} in {seconds:.1f} s"
        yield Finding(OK, "all", "collectives", text)
        return
    causes = {host: text for host, text in failed.items() if not CONSEQUENCE.search(text)} or failed
    for host, text in causes.items():
        remedy = "training: distributed.interface=CARD names another network card (`ip -br addr` lists them)"
        yield Finding(BAD, host, "collectives", f"{found['backend']}: {text}", remedy)
