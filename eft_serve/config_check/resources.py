"""Whether an application fits a cluster; compares totals, not single nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from eft_serve.config import AppConfig, Resources
from eft_serve.config_check.problem import Problem

NUM_INGRESS_REPLICAS = 1
ROUNDING = 1e-6  # ten times 0.1 is not exactly 1


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """A cluster's resources, as Ray counts them."""

    num_cpus: float
    num_gpus: float = 0.0


def wanted(config: AppConfig) -> Iterator[tuple[str, Resources, int]]:
    """(field, resources of one replica, replicas) of every deployment."""
    for name, model in config.deployments.items():
        yield f"models.{name}", model.resources, model.num_replicas
    yield "coordinator", config.coordinator.resources, config.coordinator.num_replicas
    yield "server", config.server.resources, NUM_INGRESS_REPLICAS


def total(config: AppConfig) -> ClusterResources:
    """Resources of all replicas together."""
    deployments = list(wanted(config))
    return ClusterResources(
        num_cpus=sum(r.num_cpus * replicas for _, r, replicas in deployments),
        num_gpus=sum(r.num_gpus * replicas for _, r, replicas in deployments),
    )


def resource_problems(config: AppConfig, cluster: ClusterResources) -> Iterator[Problem]:
    """One problem for each resource that is short, with every deployment's share."""
    needed = total(config)
    for kind in ("num_cpus", "num_gpus"):
        want, have = getattr(needed, kind), getattr(cluster, kind)
        if want > have + ROUNDING:
            parts = {f: getattr(r, kind) * replicas for f, r, replicas in wanted(config)}
            listed = ", ".join(f"{field} {part:g}" for field, part in parts.items() if part)
            message = f"{want:g} in all ({listed}), and the cluster has {have:g}; lower resources or replicas"
            yield Problem(f"resources.{kind}", f"{message}, or add nodes")
