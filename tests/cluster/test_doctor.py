"""The verdicts of the doctor: from what was found to what to type. And what a probe, a link and a folder answer."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemini_gnn.cluster.doctor import facts, folder, links, table, verdicts
from gemini_gnn.cluster.doctor.examine import master_address, pairs
from gemini_gnn.cluster.doctor.probe import PREFIX
from gemini_gnn.cluster.doctor.reach import ask, command, probes, why_silent
from gemini_gnn.cluster.doctor.verdicts import BAD, OK, REMARK, Finding, findings

ROOT = Path(__file__).parents[2]
GIB = 2**30
FACTS = {
    **{"machine": "h1", "user": "u", "cores": 8, "python": "3.11.2", "torch": "2.13.0", "deepspeed": "0.19.8"},
    **{"numpy": "2.1", "numba": "0.62", "sources": "abc", "project": "/p", "executable": "/p/.venv/bin/python"},
    **{"first": "10.1.2.1", "shm_bytes": 8 * GIB, "shm_free_bytes": 8 * GIB, "memory_bytes": 64 * GIB},
    **{"limit_bytes": None, "forgets_at_logout": False, "gpus": [], "open_files": 1024},
}
LINK = {"address": "10.0.0.1", "latency_s": 1e-4, "bytes_per_s": 1e9}
LOOK = {"seen_s": 0.0, "type": "nfs4", "won": False, "lock": "refused"}


def machine(host="h1", *, slots=2, skew_s=0.0, **changes):
    state = {"host": host, "slots": slots, "problem": "", "remedy": "", "login_s": 0.3, "skew_s": skew_s}
    state |= {"skew_within_s": 0.01, "interface": "eth0", "address": "10.1.2.3"}
    return state | {"facts": FACTS | {"machine": host} | changes}


def silent(host="h1"):
    return {
        "host": host,
        "slots": 2,
        "problem": "no answer",
        "remedy": f"ssh -v {host} true",
        "login_s": None,
        "facts": {},
    }


def document(*machines, **changes):
    found = {"how": "ssh", "run_dir": "/r", "links": [], "folder": None, "collective": None, "launcher": {}}
    return found | {"machines": list(machines)} | changes


def not_ok(*machines, **changes):
    return [one for one in findings(document(*machines, **changes)) if one.verdict != OK]


# --- machines ---------------------------------------------------------------------------------------------------------


def test_well():
    assert not_ok(machine("h0"), machine("h1")) == []
    assert verdicts.summary(findings(document(machine("h0")))) == "ok"


@pytest.mark.parametrize(
    ("code", "said", "problem", "remedy"),
    [
        (None, "", "no answer within 20 s", "ssh -v h1 true"),
        (
            255,
            "ssh: connect to host h1 port 22: Connection refused",
            r"cannot be reached \(ssh: connect",
            "ssh -v h1 true",
        ),
        (255, "u@h1: Permission denied (publickey).", "refuses this user's key", "ssh-copy-id h1"),
        (255, "Host key verification failed.", "not a known host", "ssh h1 true"),
    ],
)
def test_a_machine_that_lets_nobody_in(code, said, problem, remedy):
    found = why_silent("h1", "ssh", False, code, said.splitlines(), "/here", 20)
    assert re.search(problem, found[0]) and found[1] == remedy


def test_a_machine_that_lets_in_but_has_no_environment_or_hangs():
    problem, remedy = why_silent("h1", "ssh", True, 127, ["sh: 1: /venv/bin/python: not found"], "/here", 0)
    assert "same paths" in problem and "not found" in problem and remedy.startswith("ssh h1 'cd /here && ")
    problem, remedy = why_silent("h1", "ssh", True, None, [], "/here", 30)
    assert "file system that hangs" in problem and remedy == "ssh h1 ls /here"


def test_a_silent_machine_does_not_hide_the_others():
    (found,) = not_ok(machine("h0"), silent("h1"))
    assert found == Finding(BAD, "h1", "reach", "no answer", "ssh -v h1 true")
    assert verdicts.refused([found]) == ["h1"]


def test_a_machine_that_goes_away_meanwhile_explains_the_rest():
    gone = machine("h1") | {"problem": "went away meanwhile", "remedy": "ssh -v h1 true"}
    blocked = {"from": "h0", "to": "h1", "address": "10.0.0.1", "problem": "timed out"}
    answers = {"h0": {"problem": "Connection closed by peer"}, "h1": {"problem": "went away"}}
    for trial in ({"backend": "gloo", "answers": answers}, {}):
        found = not_ok(machine("h0"), gone, links=[blocked], collective=trial)
        assert [(one.verdict, one.subject, one.check) for one in found] == [
            (BAD, "h1", "reach"),
            (REMARK, "all", "collectives"),
        ]
        assert "h1 went away" in found[1].text


@pytest.mark.parametrize("name", ["torch", "deepspeed", "numpy", "numba"])
def test_a_version_that_differs_is_that_of_the_fewer(name):
    (found,) = not_ok(machine("h0"), machine("h1", **{name: "1.0"}), machine("h2"))
    assert (found.verdict, found.subject, found.check) == (BAD, "h1", name)
    assert found.text == f"expected the same {name} everywhere; got {FACTS[name]} on h0, h2; 1.0 here"
    assert found.remedy == f"ssh h1 /p/.venv/bin/python -m pip install {name}=={FACTS[name]}"


def test_other_sources_and_other_paths():
    (found,) = not_ok(machine("h0"), machine("h1", sources="xyz"))
    assert found.check == "sources" and found.remedy == "ssh h1 rsync -a --delete h0:/p/gemini_gnn/ /p/gemini_gnn/"
    (found,) = not_ok(machine("h0"), machine("h1", project="/q"))
    assert found.check == "project" and "same paths as on h0: /p" in found.remedy


def test_one_machine_under_two_names():
    (found,) = not_ok(machine("h0"), machine("h0-ib", machine="h0"))
    assert found.verdict == BAD and found.text.startswith("h0 and h0-ib are one machine, h0")


@pytest.mark.parametrize(
    ("skew_s", "within_s", "verdict"),
    [(0.9, 0.0, OK), (-3.0, 0.1, REMARK), (3.0, 2.5, OK), (59.0, 0.0, REMARK), (-61.0, 0.5, BAD), (None, None, BAD)],
)
def test_clocks_count_beyond_what_the_round_trip_leaves_open(skew_s, within_s, verdict):
    assert verdicts.clock("h1", skew_s, within_s).verdict == verdict


def test_shm():
    assert verdicts.shm("h1", 8 * GIB, 8 * GIB).verdict == OK
    small, full = verdicts.shm("h1", 64 << 20, 64 << 20), verdicts.shm("h1", 8 * GIB, 1 << 20)
    assert small.verdict == full.verdict == BAD
    assert "remount,size=50%" in small.remedy and "64 MiB of 64 MiB free" in small.text
    assert "inspect_snapshots.py --sweep" in full.remedy


def test_memory_and_its_limits():
    assert verdicts.memory("h1", 64 * GIB, None, 8 * GIB).verdict == OK
    assert verdicts.memory("h1", 64 * GIB, 16 * GIB, 8 * GIB).verdict == OK
    limited = verdicts.memory("h1", 64 * GIB, 4 * GIB, 8 * GIB)
    assert limited.verdict == REMARK and "--mem" in limited.remedy
    assert verdicts.memory("h1", 64 * GIB, 1 << 20, 8 * GIB).verdict == BAD
    assert verdicts.memory("h1", 1 << 20, None, 8 * GIB).verdict == BAD


def test_remarks_of_a_machine():
    (found,) = not_ok(machine("h1", forgets_at_logout=True))
    assert found.verdict == REMARK and found.remedy == "ssh h1 loginctl enable-linger"
    (found,) = not_ok(machine("h1", open_files=256))
    assert found.check == "open files" and found.remedy.startswith("ulimit -n")
    (found,) = not_ok(machine("h1", gpus=["V100"]))
    assert found.verdict == REMARK and "1 GPUs for 2 ranks" in found.text
    assert not_ok(machine("h1", gpus=["V100", "V100"])) == []


@pytest.mark.parametrize(
    ("uid", "conf", "lingers", "forgets"),
    [
        (1000, "", False, True),
        (1000, "#RemoveIPC=no", False, True),
        (1000, "RemoveIPC=no", False, False),
        (1000, "", True, False),
        (999, "", False, False),
    ],
)
def test_who_loses_the_snapshots_at_logout(tmp_path, monkeypatch, uid, conf, lingers, forgets):
    monkeypatch.setattr(facts, "user", lambda: "ada")
    assert not facts.forgets_at_logout(tmp_path, uid), "no logind"
    for name in ("run/systemd/sessions", "etc/systemd", "var/lib/systemd/linger"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text(f"[Login]\n{conf}\n")
    if lingers:
        (tmp_path / "var/lib/systemd/linger/ada").touch()
    assert facts.forgets_at_logout(tmp_path, uid) == forgets


# --- between them -----------------------------------------------------------------------------------------------------


def test_the_first_machine_is_called_by_the_address_the_others_see():
    assert master_address([machine("h0", first="127.0.1.1"), machine("h1"), machine("h2")]) == "10.1.2.1"
    assert master_address([machine("h0"), silent("h1"), machine("h2")]) == "10.1.2.1"
    assert master_address([machine("h0", first="10.1.2.1")]) == "10.1.2.1"
    assert master_address([silent("h0"), machine("h1")]) == "10.1.2.1"
    assert master_address([machine("h0"), silent("h1")]) == "10.1.2.1"
    assert master_address([silent("h0"), silent("h1")]) is None
    unclear = [machine("h0"), machine("h1"), machine("h2", first="10.9.9.9")]
    assert master_address(unclear) is None
    (found,) = not_ok(*unclear)
    assert found.check == "address" and "10.9.9.9 on h2" in found.text and "--master_addr" in found.remedy


def test_few_machines_are_all_pairs_and_many_a_ring():
    assert pairs(1) == [] and pairs(3) == [(0, 1), (0, 2), (1, 2)] and len(pairs(8)) == 28
    assert pairs(9)[:2] == [(0, 1), (1, 2)] and pairs(9)[-1] == (8, 0) and len(pairs(9)) == 9


def mesh(count, **changes):
    """All links of ``count`` machines; ``h0_h1={...}`` changes one."""
    ways = [(a, b) for a in range(count) for b in range(count) if a != b]
    return [{"from": f"h{a}", "to": f"h{b}", **LINK, **changes.get(f"h{a}_h{b}", {})} for a, b in ways]


def test_links():
    (good,) = verdicts.links(mesh(3))
    assert good == Finding(OK, "6 links", "ports", "ports open, 8.00 Gbit/s or more, 0.10 ms there and back")
    assert list(verdicts.links([])) == []


def test_a_slow_link_is_named_and_a_slow_machine_once():
    slow = {"bytes_per_s": 2e8}
    found = list(verdicts.links(mesh(3, h0_h1=slow)))
    assert [(one.verdict, one.subject) for one in found] == [(REMARK, "h0 -> h1"), (OK, "5 links")]
    assert "1.60 Gbit/s; usual here is 8.00 Gbit/s" in found[0].text
    all_of_h2 = {way: slow for way in ("h0_h2", "h2_h0", "h1_h2", "h2_h1", "h3_h2", "h2_h3")}
    found = list(verdicts.links(mesh(4, **all_of_h2)))
    assert [(one.verdict, one.subject) for one in found] == [(REMARK, "h2"), (OK, "6 links")]
    found = list(verdicts.links(mesh(3, **{way: slow for way in ("h0_h2", "h2_h0", "h1_h2", "h2_h1")})))
    assert [(one.verdict, one.subject) for one in found] == [(REMARK, "h2"), (OK, "2 links")], "most links are slow"
    half = mesh(3, h0_h1={"bytes_per_s": 2.6e8})
    assert [one.verdict for one in verdicts.links(half)] == [OK], "less than four times"


def test_a_blocked_port():
    links_ = mesh(3)
    links_[0] = {"from": "h0", "to": "h1", "address": "10.0.0.1", "problem": "timed out"}
    blocked, rest = verdicts.links(links_)
    assert (blocked.verdict, blocked.subject, rest.subject) == (BAD, "h0 -> h1", "5 links")
    assert "timed out" in blocked.text and "ufw allow proto tcp from h0" in blocked.remedy


def test_a_call_measures_and_knows_whom_it_reached():
    port = links.listen(b"token")
    found = links.call("127.0.0.1", port, b"token", 0.05)
    assert 0 < found["latency_s"] < 1 and found["bytes_per_s"] > 0
    assert "bytes_per_s" not in links.call("127.0.0.1", port, b"token", 0)
    assert "problem" in links.call("127.0.0.1", port, b"other", 0)


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_a_run_directory_of_each_machines_own():
    own, lacks = {"seen_s": None, "type": "ext4", "private": True}, {"seen_s": None, "type": "ext4", "private": False}
    (found,) = shared(h0=own, h1=own, h2=own, h3=own)
    assert (found.verdict, found.subject) == (verdicts.OK, "all") and "3 must live" in found.text
    (found,) = shared(h0=own, h1=lacks)
    assert (found.verdict, found.subject) == (verdicts.BAD, "h1") and "hosts.py private" in found.remedy


def shared(**looks):
    return list(verdicts.folder({"folder": "/r/x", "looks": looks}, "/r"))


def test_a_shared_folder():
    found = shared(h0=LOOK | {"won": True}, h1=LOOK)
    assert [(one.verdict, one.check) for one in found] == [(OK, "run_dir"), (OK, "locks")]
    assert found[0].text == "one folder on 2 machines (nfs4)"


@pytest.mark.parametrize(
    ("look", "text"),
    [
        ({"seen_s": None, "type": "ext4"}, r"is not the folder of h0.*\(ext4, of that machine alone\)"),
        ({"seen_s": None, "type": "nfs4"}, r"is not the folder of h0.*\(nfs4\)"),
        ({"problem": "no answer within 20 s", "hangs": True}, "/r hangs: no answer within 20 s"),
        ({"problem": "Read-only file system"}, "/r fails: Read-only"),
    ],
)
def test_a_folder_that_is_not_shared_or_does_not_work(look, text):
    bad = [one for one in shared(h0=LOOK | {"won": True}, h1=look) if one.verdict == BAD]
    assert [one.subject for one in bad] == ["h1"] and re.search(text, bad[0].text) and "ssh h1 df" in bad[0].remedy


def test_remarks_of_a_folder():
    late = shared(h0=LOOK | {"won": True}, h1=LOOK | {"seen_s": 3.0})
    assert late[0].verdict == REMARK and "after 3.0 s" in late[0].text
    in_memory = shared(h0=LOOK | {"won": True, "type": "tmpfs"})
    assert in_memory[0].verdict == REMARK and "in memory" in in_memory[0].text
    two = [one for one in shared(h0=LOOK | {"won": True}, h1=LOOK | {"won": True}) if one.verdict == BAD]
    assert "of 2 machines 2 created one and the same file" in two[0].text


def test_locks():
    apart = shared(h0=LOOK | {"won": True}, h1=LOOK | {"lock": "taken"})[-1]
    assert (apart.verdict, apart.subject) == (REMARK, "h1") and "do not hold on the others" in apart.text
    unknown = LOOK | {"lock": "[Errno 38] Function not implemented"}
    none = shared(h0=unknown | {"won": True}, h1=unknown)[-1]
    assert none.verdict == REMARK and "nfs4 knows no locks: [Errno 38]" in none.text


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        assert folder.lock(file) == "[Errno 38] Function not implemented"


def test_a_folder_that_cannot_be_written():
    (found,) = verdicts.folder({"problem": "Permission denied", "host": "h0"}, "/r")
    assert found.verdict == BAD and found.remedy == "ssh h0 ls -ld /r; or name another run_dir="


def test_the_rank_that_began_is_named():
    answers = {"h0": {"problem": "Connection closed by peer"}, "h1": {"problem": "No CUDA GPUs are available"}}
    (found,) = verdicts.collective({"backend": "nccl", "answers": answers})
    assert (found.verdict, found.subject) == (BAD, "h1") and "No CUDA GPUs" in found.text
    (lost,) = verdicts.collective({"backend": "gloo", "answers": {"h0": answers["h0"], "h1": {"seconds": 1.0}}})
    assert lost.subject == "h0", "a consequence is shown where nothing else is known"
    (skipped,) = verdicts.collective({})
    assert skipped.verdict == REMARK


# --- shown, and reached -----------------------------------------------------------------------------------------------


def test_remedies_are_typed_as_machines_are_reached():
    assert verdicts.typed("ssh h1 df /r", "ssh") == "ssh h1 df /r"
    assert verdicts.typed("ssh h1 df /r", "srun") == "srun --overlap -w h1 df /r"
    assert verdicts.typed("ssh h1 'a | b'", "srun") == "srun --overlap -w h1 sh -c 'a | b'"
    assert verdicts.typed("ssh h1 'a | b'", "here") == "a | b"
    assert verdicts.typed("ssh h1 df /r", "here") == "df /r"


def test_the_table_takes_nothing_for_markup_or_control():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(table.picture([Finding(BAD, "h[0]", "reach", "[red]\x1b[2Jx", "ssh h0 true")]))
    said = console.export_text()
    assert "h[0]" in said and "[red] [2Jx" in said and "-> ssh h0 true" in said


def test_what_is_the_same_on_several_machines_is_one_line():
    found = [Finding(OK, host, "GPUs", "none; 2 cores") for host in ("h0", "h1")]
    assert table.picture(found).row_count == 1
    assert table.picture([*found, Finding(OK, "h2", "GPUs", "none; 4 cores")]).row_count == 2


def test_how_a_probe_is_started():
    ssh = command("u@h1", "ssh", Path("/my project"), "/v/python")
    assert (
        ssh[0] == "ssh"
        and "BatchMode=yes" in ssh
        and ssh[-2] == "u@h1"
        and "cd '/my project' && exec /v/python" in ssh[-1]
    )
    assert "--nodelist=n1" in command("n1", "srun", Path("/p"), "/v/python")


def quiet(_):
    pass


@pytest.mark.processes
def test_probes_answer_and_end(tmp_path):
    with probes([("a", 1), ("b", 1)], "here", ROOT) as made:
        ports = ask(made, [{"do": "listen", "token": "t"}] * 2, 60, quiet)
        order = {"do": "call", "targets": [["127.0.0.1", ports[1]["port"]]], "token": "t", "seconds": 0}
        (answer,) = ask(made[:1], [order], 20, quiet)
        assert answer["calls"][0]["latency_s"] < 5
        (wrong,) = ask(made[:1], [{"do": "route", "to": "no.such.host.invalid"}], 20, quiet)
        assert "finds no way" in wrong["problem"]
        assert made[0].problem == "", "an order that fails is not the end of a probe"
    for probe in made:
        assert probe._process.returncode == 0


@pytest.mark.processes
def test_a_process_that_hangs_costs_its_deadline(tmp_path):
    """And the folder that another one has made is gone at the end."""
    with probes([("a", 1)], "here", ROOT) as made:
        (begun,) = ask(made, [{"do": "folder_begin", "run_dir": str(tmp_path / "run"), "deadline_s": 60}], 60, quiet)
        assert Path(begun["folder"]).parent == tmp_path
        look = {"do": "folder_look", "folder": begun["folder"], "token": begun["token"], "deadline_s": 60}
        (seen,) = ask(made, [look], 60, quiet)
        file = {"do": "folder_begin", "run_dir": str(ROOT / "README.md"), "deadline_s": 60}
        assert "expected a folder, or a name that is free" in ask(made, [file], 60, quiet)[0]["problem"]
        assert seen["won"] and seen["lock"] == "refused" and seen["seen_s"] < 5
        began = time.monotonic()
        (hung,) = ask(made, [look | {"deadline_s": 0.0}], 60, quiet)  # Python alone takes longer
        assert hung["hangs"] and time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_cannot_start_says_why():
    with probes([("a", 1)], "here", Path("/nowhere")) as made:
        (answer,) = ask(made, [{"do": "clock"}], 60, quiet)
    assert "nowhere" in answer["problem"] and made[0].problem == answer["problem"]


# --- the command ------------------------------------------------------------------------------------------------------


def doctor(*arguments, **environ):
    command_ = [sys.executable, "launch/doctor.py", *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(command_, cwd=ROOT, capture_output=True, text=True, timeout=120, env=clean | environ)


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--hostfile", "/nowhere"], {}, "cannot read the hostfile"),
        (["--json", "/nowhere/found.json"], {}, "expected a file in a folder that exists"),
        (["run_dri=x"], {}, "expected run_dir=RUN_DIR; got run_dri=x"),
        ([], {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "2"}, "contradict each other"),
    ],
)
def test_bad_input(arguments, environ, said):
    done = doctor(*arguments, **environ)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.processes
def test_one_machine_alone(tmp_path):
    """It may be a small one: that is a verdict, and no error."""
    done = doctor("--json", "-", f"run_dir={tmp_path}")
    found = json.loads(done.stdout)
    assert done.returncode == (found["verdict"] == "bad"), done.stderr
    assert found["how"] == "here" and len(found["machines"]) == 1
    assert next(one["text"] for one in found["findings"] if one["check"] == "collectives").startswith("all-reduce and")
    assert PREFIX not in done.stdout and "asking 1 machine" in done.stderr


@pytest.mark.processes
def test_a_doctor_that_is_killed_leaves_nothing(tmp_path):
    """Its probe notices, and ends what it has started: that removes the folder."""
    command_ = [sys.executable, "launch/doctor.py", f"run_dir={tmp_path}"]
    with subprocess.Popen(command_, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
    while list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
