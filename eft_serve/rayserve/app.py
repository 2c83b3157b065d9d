"""The application graph: one deployment per model with weights, then the coordinator, then the ingress."""

from __future__ import annotations

from ray import serve
from ray.serve import Application

from eft_serve.config import AppConfig
from eft_serve.rayserve.coordinator import CoordinatorReplica
from eft_serve.rayserve.ingress import IngressReplica
from eft_serve.rayserve.model import ModelReplica
from eft_serve.rayserve.options import deployment_options, model_options


def build(config: AppConfig) -> Application:
    """Bind the deployments of one application; starts nothing."""
    models = {
        name: serve.deployment(name=f"model-{name}", **model_options(model))(ModelReplica).bind(
            name, model, config.adapters_of(name)
        )
        for name, model in config.deployments.items()
    }
    coordinator = serve.deployment(
        name="coordinator",
        **deployment_options(config.coordinator.resources, num_replicas=config.coordinator.num_replicas),
    )(CoordinatorReplica)
    ingress = serve.deployment(name="ingress", **deployment_options(config.server.resources))(
        serve.ingress()(IngressReplica)
    )
    return ingress.bind(config, coordinator.bind(config, models), models)
