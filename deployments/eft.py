"""The Serve application: `serve run deployments.eft:app config=deployments/zoo.yaml`.

Without postponed annotations: Serve reads the builder's to know that it takes `AppArgs`.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from eft_serve.config import AppConfig
from eft_serve.config_check import load_any
from eft_serve.rayserve.app import build


class AppArgs(BaseModel):
    """What Serve passes to the builder."""

    model_config = ConfigDict(extra="forbid")

    config: str | dict[str, Any] = str(Path(__file__).parent / "zoo.yaml")
    """A YAML file, or the configuration itself (`eft_serve.config.AppConfig`); the embedded family by default."""


def app(args: AppArgs) -> Application:
    """Build the application.

    Raises:
        ConfigError: the configuration is not valid; the message names every mistake.
    """
    if isinstance(args.config, str):
        return build(load_any(Path(args.config)))
    return build(AppConfig.parse(args.config))
