"""launch/compose.yaml and launch/Dockerfile, as far as a machine without an engine can tell: no container is started here.

tests/cluster/test_hosts_compose.py runs the containers' commands on hosts of the lab.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml

from gemini_gnn.cluster.place import discover
from gemini_gnn.compose import compose
from gemini_gnn.config import replicas_of, seats_of

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "launch" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
FIELDS = {"image", "build", "init", "shm_size", "volumes", "stop_signal", "stop_grace_period", "command", "hostname"}


def steps():
    """The instructions of the Dockerfile: (word, the rest)."""
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_four_workers_and_a_standby_find_their_ranks():
    places = [discover(service["environment"], name) for name, service in SERVICES.items()]
    assert list(SERVICES) == ["worker0", "worker1", "worker2", "worker3", "standby"]
    assert [place.rank for place in places] == [0, 1, 2, 3, 4]
    assert {(p.world_size, p.machines, p.master_addr, p.master_port) for p in places} == {(5, 5, "worker0", 29500)}
    script, *settings = SERVICES["worker0"]["command"][1:]
    config = compose(settings)
    assert (ROOT / script).exists() and seats_of(config.recovery, 5) == 4 and replicas_of(config.snapshot, 4) == 2


@pytest.mark.parametrize("name", SERVICES)
def test_the_fields_of_a_container(name):
    service = SERVICES[name]
    assert set(service) == FIELDS | {"environment"} | ({"depends_on"} if name != "worker0" else set())
    assert all(isinstance(value, str) for value in service["environment"].values()), "YAML numbers are refused there"
    assert service["hostname"] == name and service.get("depends_on", ["worker0"]) == ["worker0"]
    assert service["command"] == SERVICES["worker0"]["command"] and service["init"] is True
    build = service["build"]
    assert (ROOT / "launch" / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    (volume,) = [volume.split(":") for volume in service["volumes"]]
    assert volume[0] in COMPOSE["volumes"]
    config = compose(service["command"][2:])
    assert all(Path(path).is_relative_to(volume[1]) for path in (config.run_dir, config.dataset.cache))


def test_the_image_has_what_the_containers_use():
    words = [word for word, _ in steps()]
    assert words[0] == "FROM" and set(words) <= {"FROM", "ENV", "RUN", "USER", "WORKDIR", "COPY"}
    (user,) = [rest for word, rest in steps() if word == "USER"]
    assert user != "root" and words.index("USER") < words.index("COPY"), "nothing that we bring runs as root"
    copied = [source for word, rest in steps() if word == "COPY" for source in rest.split()[1:-1]]
    assert not [source for source in copied if not (ROOT / source).exists()]
    assert {"constraints.txt", "pyproject.toml", "launch", "gemini_gnn", "configs"} <= set(copied)
    mounted = {volume.split(":")[1] for service in SERVICES.values() for volume in service["volumes"]}
    made = next(rest for word, rest in steps() if word == "RUN")
    assert mounted <= set(made.split()), (
        "a new volume belongs to root, unless the image has the folder for another user"
    )


# argv: an empty folder, the script. The machine stands in for the base image: its files are seen, none is changed.
OVERLAY = """
set -e
mkdir "$0/upper" "$0/work" "$0/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" "$0/root"
for name in dev sys; do mount --rbind "/$name" "$0/root/$name"; done
mount -t proc proc "$0/root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$0/root/dev/shm"
exec chroot "$0/root" bash -e "/$1"
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for an overlay of the file system")
def test_the_commands_of_the_dockerfile_run_and_the_image_trains():
    """Each RUN and COPY in turn, in a copy of this machine's files; only FROM is not done. Needs the network for pip."""
    work = Path(tempfile.mkdtemp(prefix="gemini-image-", dir="/var/tmp"))
    context = work / "context"
    for source in ("pyproject.toml", "constraints.txt", "README.md", "configs", "gemini_gnn", "launch"):
        target = context / source
        target.parent.mkdir(exist_ok=True, parents=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    (work / "script").write_text(script(f"{context}"))
    try:
        # The folder of the script is seen in the overlay too: it is part of the machine's files.
        inside = str((work / "script").relative_to("/"))
        done = subprocess.run(
            ["unshare", "-m", "-p", "-f", "--kill-child", "sh", "-c", OVERLAY, str(work), inside],
            capture_output=True, text=True, timeout=1700, env=outer(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "done: test accuracy" in done.stdout and "uid=0" not in done.stdout
    finally:
        shutil.rmtree(work)


def outer():
    """How pip and the network are configured here is no part of the image, but needed to build it."""
    ours = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "HOME")}
    return ours | {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def script(context):
    """The Dockerfile as a script, and a training by the user of the image."""
    user, lines = "root", []
    for word, rest in steps():
        if word == "ENV":
            lines.append(f"export {rest}")
        elif word == "USER":
            user = rest
        elif word == "WORKDIR":
            lines.append(f"mkdir -p {rest}; cd {rest}")
        elif word == "COPY":
            option, *sources, target = rest.split()
            lines += [f"cp -r {' '.join(f'{context}/{source}' for source in sources)} {target}"]
            lines += [f"chown -R {option.partition('=')[2]}: ."]
        elif word == "RUN":
            command = shlex.join(yaml.safe_load(rest)) if rest.startswith("[") else rest
            lines.append(command if user == "root" else as_user(user, command))
    lines.append(as_user(user, "id && python launch/train.py dataset.nodes=600 training.epochs=2 run_dir=/mnt/run"))
    return "\n".join(lines) + "\n"


def as_user(user, command):
    return f"setpriv --reuid={user} --regid={user} --init-groups env HOME=/home/{user} bash -c {shlex.quote(command)}"
