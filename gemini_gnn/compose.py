"""Command line -> :class:`Config`. The only file that knows Hydra; the DictConfig dies here.

Hydra's compose API is used instead of its decorator: no output folder, no change of directory, no job logging; the
launcher's ``--local_rank`` is dropped, and errors become one line.
"""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from gemini_gnn.config import Config, from_mapping
from gemini_gnn.errors import ConfigError, GeminiError
from gemini_gnn.observe.run_directory import read_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

USAGE = """usage: {program} [GROUP=OPTION ...] [SETTING=VALUE ...]

{purpose}

groups:
{groups}
settings: any key of the resolved configuration; `--cfg` prints it and exits.
"""


def compose(arguments: Sequence[str]) -> Config:
    """The checked config for Hydra overrides such as ``dataset=cora training.epochs=50``.

    Raises:
        ConfigError: unknown group, key, type or value; ``--multirun``.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    overrides = []
    known, offered = settings(), groups()
    for argument in arguments:
        if argument.startswith("--local_rank"):  # DeepSpeed's launcher puts it in front
            continue
        if argument in ("-m", "--multirun"):
            raise ConfigError(
                "--multirun is not supported: a run is a distributed job of its own; "
                "start one command per setting, each with its own run_dir"
            )
        if argument.startswith("-"):
            raise ConfigError(f"unknown option {argument!r}; settings are written KEY=VALUE, see --help")
        if "=" not in argument and not argument.startswith("~"):
            meant = [f"{group}={argument}" for group, options in offered.items() if argument in options]
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            raise ConfigError(f"expected KEY=VALUE; got {argument!r}{hint}")
        overrides.append(spelled(argument, known, offered))

    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            composed = hydra_compose(config_name="config", overrides=overrides)
        return from_mapping(composed)
    except (HydraException, OmegaConfBaseException) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None and len(causes) < 5:
            causes.append(cause)
        lines = [line.strip().replace("Error merging override ", "") for e in causes for line in str(e).splitlines()]
        noise = ("object_type", "full_key", "reference_type", "3. To sweep")
        kept = [line for line in dict.fromkeys(lines) if line and not line.startswith(noise)]
        raise ConfigError(" | ".join(kept[:4])) from None


def spelled(argument: str, known: Mapping[str, Any], offered: Mapping[str, Sequence[str]]) -> str:
    """``KEY=VALUE`` as Hydra's grammar wants it, if the meaning is certain. Pure.

    A value of a text setting is quoted (paths with blanks or ``=``, ``random:0.6,0.2,0.2``), a list gets its brackets, the
    option of a group its usual spelling (``dataset=ogbn-arxiv``), a key of the user's own dictionaries
    (``model.kwargs.k=3``) Hydra's ``++``. An argument with ``+`` or ``~`` in front or ``${`` in it is left as it is.

    Args:
        known: dotted name -> default of every setting. offered: group -> its options.

    Raises:
        ConfigError: no such setting or option; says which ones are like it.
    """
    name, _, value = argument.partition("=")
    if name.startswith(("+", "~")) or "${" in value:
        return argument
    if name in offered:
        option = value if value in offered[name] else value.lower().replace("-", "_")
        if option not in offered[name]:
            raise ConfigError(
                f"{name}: expected one of {', '.join(offered[name])}; got {value!r}"
                + did_you_mean(difflib.get_close_matches(option, offered[name], n=1))
            )
        return f"{name}={option}"
    if name not in known:
        if any(name.startswith(f"{key}.") for key, default in known.items() if isinstance(default, dict)):
            return f"++{argument}"
        last = name.rpartition(".")[2]
        like = [key for key in known if key.rpartition(".")[2] == last]
        like = like or difflib.get_close_matches(name, [*known, *offered], n=2)
        raise ConfigError(f"{name}: there is no such setting{did_you_mean(like)}; --cfg prints them all")
    if isinstance(known[name], dict):
        return f"++{argument}"
    if isinstance(known[name], list) and value and value[0] not in "[\"'":
        return f"{name}=[{value}]"
    is_text = known[name] is None or isinstance(known[name], str)
    if is_text and value.lower() not in ("", "null") and not set("'\"\\") & set(value):
        return f"{name}='{value}'"
    return argument


JOINING = ("run_dir", "snapshot.arena", "dataset.root", "dataset.cache")


def of_living_run(arguments: Sequence[str]) -> Config:
    """The settings of the job in ``run_dir``, for a machine that joins it. Only where its own files lie may be said.

    Raises:
        ConfigError: another setting is given, or no run_dir.
        RunDirError: there is no run.
    """
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    if not given.get("run_dir") or not set(given) <= set(JOINING) or not all(given.values()):
        raise ConfigError(
            f"--join: expected run_dir=RUN_DIR of a living job, and at most {', '.join(JOINING[1:])} of this machine; got "
            f"{' '.join(arguments) or 'nothing'}. All other settings are those of the job"
        )
    config = read_config(Path(given["run_dir"]))
    config.run_dir = os.path.realpath(given["run_dir"])
    config.snapshot.arena = given.get("snapshot.arena", config.snapshot.arena)
    config.dataset.root = given.get("dataset.root", config.dataset.root)
    config.dataset.cache = given.get("dataset.cache", config.dataset.cache)
    return config


def did_you_mean(names: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def settings() -> dict[str, Any]:
    """Every setting by its dotted name, with its default. Dictionaries that are the user's to fill are one setting."""

    def flat(node: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in fields(node):
            value = getattr(node, field.name)
            name = f"{prefix}{field.name}"
            found |= flat(value, f"{name}.") if is_dataclass(value) else {name: value}
        return found

    return flat(Config(), "")


def take(arguments: Sequence[str], *names: str) -> tuple[list[str], dict[str, str]]:
    """Split ``name=value`` arguments that are not settings (say ``export=edges.csv``) from the overrides."""
    taken = {}
    rest = []
    for argument in arguments:
        name, _, value = argument.lstrip("+").partition("=")
        if name in names:
            taken[name] = value
        else:
            rest.append(argument)
    return rest, taken


def groups() -> dict[str, list[str]]:
    """The config groups and their options, as found in ``configs/``."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(CONFIGS.iterdir())
        if folder.is_dir()
    }


def command(main: Callable[[list[str]], int], purpose: str) -> NoReturn:
    """Run a script of ``launch/`` that takes settings, with ``--help`` and ``--cfg``; see :func:`exit_with`."""

    def helped(arguments: list[str]) -> int:
        if any(a in ("-h", "--help") for a in arguments):
            listed = "".join(f"  {name}: {', '.join(options)}\n" for name, options in groups().items())
            print(USAGE.format(program=Path(sys.argv[0]).name, purpose=purpose, groups=listed))
            return 0
        if "--cfg" in arguments:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(OmegaConf.structured(compose([a for a in arguments if a != "--cfg"]))))
            return 0
        return main(arguments)

    exit_with(helped)


def exit_with(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with what ``main`` returns for this command line.

    Errors meant for users are one line and exit code 2, not a traceback. A reader of the output that has read enough
    (``--help | head``) is no error.
    """
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except GeminiError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except PermissionError as error:
        print(
            f"error: {error.filename}: you have no permission for it; let its owner type `chmod -R a+rX FOLDER`, "
            "or name a folder of your own (run_dir=..., out=...)",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        stdout = select.poll()
        stdout.register(1, 0)
        if not stdout.poll(0):  # an error of another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
        code = 128 + signal.SIGPIPE
    sys.exit(code)
