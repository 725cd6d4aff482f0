"""Imports point down only: docs/architecture.md, 'Floors'."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gemini_gnn"

FLOORS = [
    {"cgroups", "config", "cluster", "errors", "faults", "files", "hashing", "memory"},
    {"observe"},
    {"graph"},
    {"halo", "features", "sampling", "models"},
    {"snapshot"},
    {"recovery"},
    {"training"},
    {"compose", "api", "run", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports_of(path):
            parts = module.split(".")
            if parts[0] == "gemini_gnn" and len(parts) > 1 and parts[1] in LEVEL:
                yield path, room, parts[1]


def test_every_room_has_a_floor():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert found <= set(LEVEL), f"no floor for {found - set(LEVEL)}: add it to FLOORS and docs/architecture.md"


def test_imports_point_down():
    up = [f"{path}: {room} imports {other}" for path, room, other in rooms() if LEVEL[other] > LEVEL[room]]
    assert not up, "\n".join(up)


def test_snapshots_and_graphs_do_not_know_each_other():
    graph_rooms = {"graph", "sampling", "halo", "features", "models"}
    mixed = [
        f"{path}: {room} imports {other}"
        for path, room, other in rooms()
        if (room in graph_rooms and other in {"snapshot", "recovery"})
        or (room in {"snapshot", "recovery"} and other in graph_rooms)
    ]
    assert not mixed, "\n".join(mixed)


def test_only_the_engine_imports_deepspeed():
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for module in imports_of(path)
        if module.split(".")[0] == "deepspeed"
    }
    assert users == {"training/engine.py"}


def test_only_what_is_local_or_a_data_set_is_locked():
    """A file server keeps the locks of a machine that lost its power: there are none in a run directory. The doctor tries one."""
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if {"fcntl", "filelock", "portalocker"} & set(imports_of(path))
    }
    doctor = "cluster/doctor/folder.py"
    assert users == {"snapshot/store/arena.py", "snapshot/store/locks.py", "graph/array_folder.py", doctor}


def test_the_store_of_snapshots_stands_on_its_own():
    """Agents load it: nothing of a snapshot's other rooms, no torch."""
    allowed = {"gemini_gnn.cgroups", "gemini_gnn.errors", "gemini_gnn.snapshot.store", "gemini_gnn.snapshot"}
    wrong = [
        f"{path}: {module}"
        for path in (PACKAGE / "snapshot" / "store").glob("*.py")
        for module in imports_of(path)
        if module.split(".")[0] in {"torch", "deepspeed"}
        or (module.startswith("gemini_gnn.") and not any(f"{module}.".startswith(f"{room}.") for room in allowed))
        or any(module.startswith(f"gemini_gnn.snapshot.{room}") for room in ("state", "capture", "session", "restore"))
    ]
    assert not wrong, "\n".join(wrong)


def test_agents_and_slot_processes_load_no_torch():
    modules = ["recovery.worker.agent", "recovery.shim", "recovery.stop", "recovery.inject", "snapshot.store.inspect"]
    modules += ["recovery.worker.replicator", "recovery.worker.persister", "snapshot.export", "cluster.hosts"]
    modules += ["cluster.doctor.examine", "cluster.doctor.verdicts", "cluster.doctor.table", "cluster.doctor.probe"]
    code = "import sys, importlib\n"
    code += "".join(f"importlib.import_module('gemini_gnn.{module}')\n" for module in modules)
    code += "print(sorted({'torch', 'numpy', 'deepspeed', 'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
