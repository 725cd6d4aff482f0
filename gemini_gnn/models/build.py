"""A model from its settings."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from gemini_gnn.config import ModelConfig
from gemini_gnn.errors import ConfigError


def build_model(config: ModelConfig, in_features: int, num_classes: int, seed: int) -> nn.Module:
    """The model ``config`` describes, on the CPU in float32.

    Its weights are a function of the arguments alone: the global random state is neither used nor changed, so every rank
    builds the same model.

    Raises:
        ConfigError: ``model._target_`` cannot be imported, is no ``nn.Module``, refuses the arguments or lacks
            ``forward(x, blocks)``; or the widths do not fit (GAT: ``hidden`` must be a multiple of ``heads``).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if config._target_ is not None:
            return _users_own(config, in_features, num_classes)
        common: dict[str, Any] = {"dropout": config.dropout, "layer_norm": config.layer_norm, "init": config.init}
        sizes = (in_features, config.hidden, num_classes, config.layers)
        if config.name == "sage":
            from gemini_gnn.models.sage import sage

            return sage(*sizes, aggregator=config.aggregator, **common)
        if config.name == "gcn":
            from gemini_gnn.models.gcn import gcn

            return gcn(*sizes, **common)
        if config.name == "gat":
            from gemini_gnn.models.gat import gat

            return gat(*sizes, heads=config.heads, **common)
    raise ConfigError(f"model.name: expected sage, gcn or gat; got {config.name!r}")


def _users_own(config: ModelConfig, in_features: int, num_classes: int) -> nn.Module:
    target = str(config._target_)
    where = f"model._target_={target}"
    module_name, _, class_name = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"{where}: expected package.module.Class; got no module")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot import {module_name} ({error}); is its folder on PYTHONPATH or its package installed?"
        ) from error
    kind = getattr(module, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(
            f"{where}: expected a torch.nn.Module class named {class_name} in {module_name}; got {kind!r}"
        )
    model_class: Any = kind
    _check_call(where, model_class.forward, "forward(x, blocks)", None, None, None)
    arguments = {
        "in_features": in_features,
        "hidden": config.hidden,
        "num_classes": num_classes,
        "layers": config.layers,
        **config.kwargs,
    }
    _check_call(where, model_class.__init__, f"__init__({', '.join(arguments)})", None, **arguments)
    return model_class(**arguments)


def _check_call(where: str, function: Any, expected: str, *args: Any, **kwargs: Any) -> None:
    """Fail before the class is built if ``function`` cannot be called like this; the first argument stands for ``self``."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{where}: expected {expected}; got {inspect.signature(function)} ({error})") from None
