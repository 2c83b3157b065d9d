"""Finds every mistake of a configuration before anything starts: `check`, and `load_any` for the files.

Reads the JSON files and safetensors headers of the checkpoints; loads no weights and no tokenizer, and knows neither
torch nor Ray. Whether a kind of model can be served is for the engine to decide.
"""

from __future__ import annotations

from eft_serve.config import AppConfig
from eft_serve.config_check.adapters import adapter_problems
from eft_serve.config_check.files import http_address, load_any
from eft_serve.config_check.models import model_problems
from eft_serve.config_check.problem import Problem
from eft_serve.config_check.recipes import recipe_problems
from eft_serve.config_check.resources import ClusterResources, resource_problems
from eft_serve.config_check.server import server_problems
from eft_serve.config_check.templates import template_problems

__all__ = ["ClusterResources", "Problem", "check", "http_address", "load_any"]


def check(config: AppConfig, cluster: ClusterResources | None = None) -> list[Problem]:
    """Every problem of this configuration on this machine; empty if there is none.

    Args:
        config: already valid in itself.
        cluster: resources for the application; None when they are not known.
    """
    return [
        *(problem for name, model in config.deployments.items() for problem in model_problems(name, model)),
        *adapter_problems(config),
        *recipe_problems(config),
        *template_problems(config),
        *server_problems(config.server),
        *(resource_problems(config, cluster) if cluster else []),
    ]
