"""Who is in the job, decided from environments, interfaces and hostfiles as they are met in the field."""

import pytest

from gemini_gnn.cluster.hosts import check_hostfile
from gemini_gnn.cluster.place import (
    Place,
    check_interface,
    check_master,
    choose_interface,
    discover,
    expand_nodes,
    expand_tasks,
    interface_to,
    interfaces_here,
    threads,
)
from gemini_gnn.errors import ClusterError

# What deepspeed.launcher.launch gives rank 3 of two hosts with two slots.
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.1.2.1",
    "MASTER_PORT": "29500",
}

# What srun -N 3 --ntasks-per-node=2 of SLURM 22.05 gives task 5.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_NODELIST": "h[0-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.55.0.1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "h[0-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}


def test_plain_process():
    assert discover({}, "me") == Place(0, 1, 0, 1, "me", "127.0.0.1", 0, "plain")


def test_deepspeed_launcher():
    place = discover(DEEPSPEED, "h1")
    assert place == Place(3, 4, 1, 2, "h1", "10.1.2.1", 29500, "deepspeed")
    assert place.machines == 2


def test_torchrun():
    environ = {k: v for k, v in DEEPSPEED.items() if not k.startswith(("CROSS", "LOCAL_SIZE"))}
    place = discover(environ | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, "h1")
    assert place == Place(3, 4, 1, 2, "h1", "10.1.2.1", 29500, "torchrun")
    served = {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert discover(environ | served, "h1").master_port == 29501, "torchrun's own store has the other"


def test_srun():
    place = discover(SLURM, "h2")
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 6, 1, 2)
    assert (place.master_addr, place.machines, place.launcher) == ("h0", 3, "slurm")
    other_job = discover(SLURM | {"SLURM_JOB_ID": "4712"}, "h2")
    assert 10_000 <= place.master_port < 30_000 and place.master_port != other_job.master_port
    given = discover(SLURM | {"MASTER_ADDR": "ib0", "MASTER_PORT": "7"}, "h2")
    assert (given.master_addr, given.master_port) == ("ib0", 7)


def test_deepspeed_within_a_slurm_allocation_is_deepspeed():
    assert discover(SLURM | DEEPSPEED, "h1").launcher == "deepspeed"


def test_an_sbatch_script_without_srun_is_one_plain_process():
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NODELIST": "h[0-3]"}
    assert discover(batch, "h0").world_size == 1


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"LOCAL_SIZE": None}, "LOCAL_SIZE or LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "four"}, "RANK: expected a number"),
        ({"RANK": "-1"}, "RANK: expected a number"),
        ({"RANK": "4"}, "contradicts itself"),
        ({"LOCAL_RANK": "2"}, "contradicts itself"),
        ({"LOCAL_SIZE": "1", "LOCAL_RANK": "0"}, "same number of ranks on every machine"),
        ({"LOCAL_SIZE": "3", "CROSS_SIZE": None}, "same number of ranks on every machine"),
        ({"MASTER_ADDR": "127.0.0.1"}, "loopback"),
        ({"MASTER_ADDR": "localhost"}, "loopback"),
        ({"MASTER_ADDR": "::1"}, "loopback"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a number"),
    ],
)
def test_an_environment_that_contradicts_itself(change, expected):
    environ = {k: v for k, v in (DEEPSPEED | change).items() if v is not None}
    with pytest.raises(ClusterError, match=expected):
        discover(environ, "h1")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, "same number of ranks"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "expected a list like"),
        ({"SLURM_STEP_NODELIST": "h[0-1]"}, "names 2 machines"),
        ({"SLURM_STEP_NODELIST": "h[0-"}, "expected names like"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        ({"SLURM_PROCID": "2"}, "consecutive ranks.*--distribution=block"),
    ],
)
def test_a_slurm_step_that_contradicts_itself(change, expected):
    environ = {k: v for k, v in (SLURM | change).items() if v is not None}
    with pytest.raises(ClusterError, match=expected):
        discover(environ, "h1")


def test_world_size_without_rank_is_not_taken_for_one_process():
    with pytest.raises(ClusterError, match="RANK is not"):
        discover({"WORLD_SIZE": "4"})


def test_slurm_lists():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert expand_nodes("login,h[0-2,07]-ib,z") == ["login", "h0-ib", "h1-ib", "h2-ib", "h07-ib", "z"]
    assert expand_nodes("r[1-2]n[08-09]") == ["r1n08", "r1n09", "r2n08", "r2n09"]


INTERFACES = [
    ("lo", ["127.0.0.1", "::1"]),
    ("eth0", ["192.168.0.5"]),
    ("down0", []),
    ("ib0", ["10.1.2.5", "fd00::5", "fe80::5%ib0"]),
]


@pytest.mark.parametrize(
    "source, name",
    [("10.1.2.5", "ib0"), ("192.168.0.5", "eth0"), ("127.0.0.1", "lo"), ("fd00:0::0005", "ib0"), ("fe80::5", "ib0")],
)
def test_the_interface_is_the_one_we_would_speak_from(source, name):
    assert choose_interface(source, INTERFACES) == name


def test_interfaces_that_are_not_there():
    with pytest.raises(ClusterError, match=r"no network interface has the address 10.9.9.9.*ib0 \(10.1.2.5"):
        choose_interface("10.9.9.9", INTERFACES)
    with pytest.raises(ClusterError, match=r"distributed\.interface=eth7"):
        check_interface("eth7", INTERFACES)
    with pytest.raises(ClusterError, match=r"distributed\.interface=down0"):
        check_interface("down0", INTERFACES)
    assert check_interface("ib0", INTERFACES) == "ib0"


def test_this_machine_reaches_itself_over_loopback():
    assert "127.0.0.1" in dict(interfaces_here())[interface_to("127.0.0.1")]


def test_a_first_machine_nobody_knows():
    with pytest.raises(ClusterError, match=r"finds no way.*nowhere\.invalid"):
        interface_to("nowhere.invalid")


def place_with(master_addr, machines=2):
    return Place(0, machines, 0, 1, "h0", master_addr, 29500, "deepspeed")


def test_a_name_that_means_loopback_on_its_own_machine():
    with pytest.raises(ClusterError, match=r"MASTER_ADDR=h0, which is loopback \(127\.0\.1\.1\) on h0"):
        check_master(place_with("h0"), resolve=lambda name: ["127.0.1.1"])
    check_master(place_with("h0"), resolve=lambda name: ["10.0.0.1", "127.0.0.1"])
    check_master(place_with("h0", machines=1), resolve=lambda name: ["127.0.1.1"])


def test_a_name_that_does_not_resolve():
    with pytest.raises(ClusterError, match=r"h0 cannot resolve.*nowhere\.invalid"):
        check_master(place_with("nowhere.invalid"))


def test_hostfile():
    text = "# cluster\nh0 slots=2\n\n  user@h1.lan\tslots=2  # rack 7\n10.0.0.3 slots=2\n"
    assert check_hostfile(text) == [("h0", 2), ("user@h1.lan", 2), ("10.0.0.3", 2)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "names no host"),
        ("# only a comment\n", "names no host"),
        ("h0 slots=1\nh1 slot=1", r"line 2: expected `host slots=N`.*'h1 slot=1'"),
        ("h0", "line 1: expected"),
        ("h0 slots=4x", "line 1: expected"),
        ("h0 slots=-1", "line 1: expected"),
        ("h0 slots = 4", "line 1: expected"),
        ("fd00::3 slots=4", "line 1: expected"),
        ("h0,h1 slots=4", "line 1: expected"),
        ("-oProxyCommand=x slots=4", "line 1: expected"),
        ("h0 slots=1\nh1 slots=1\nh0 slots=2", r"line 3: h0 is already in line 1.*slots=3"),
        ("h0 slots=1\nh1 slots=0", "line 2: h1 has no slots"),
        ("h0 slots=4\nh1 slots=2", r"same number of ranks.*h0 slots=4, h1 slots=2"),
    ],
)
def test_hostfile_mistakes(text, expected):
    with pytest.raises(ClusterError, match=expected):
        check_hostfile(text)


def test_the_example_hostfile_is_right():
    from pathlib import Path

    example = Path(__file__).parents[2] / "hostfile"
    assert len(check_hostfile(example.read_text())) >= 2


@pytest.mark.parametrize(
    ("environ", "cores", "sharing", "number"),
    [
        ({}, 16, 4, 4),
        ({}, 2, 4, 1),
        ({}, 6, 0, 6),
        ({"OMP_NUM_THREADS": "3"}, 16, 4, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 16, 1, 4),
        ({"OMP_NUM_THREADS": "many"}, 16, 4, 4),
        ({"OMP_NUM_THREADS": "0"}, 16, 4, 4),
        ({**SLURM, "SLURM_CPUS_PER_TASK": "8"}, 8, 2, 8),  # bound to cores of its own
        ({**SLURM, "SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "2"}, 8, 2, 2),
        ({**SLURM, **DEEPSPEED, "SLURM_CPUS_PER_TASK": "16"}, 16, 4, 4),  # a launcher inside one task
        ({"SLURM_CPUS_PER_TASK": "16"}, 16, 4, 4),  # of the allocation: a shell of salloc
    ],
)
def test_threads_are_those_asked_for_or_a_share_of_the_cores(environ, cores, sharing, number):
    assert threads(environ, cores, sharing) == number
