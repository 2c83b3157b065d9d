"""How our configuration becomes Ray Serve deployment options."""

from __future__ import annotations

from typing import Any

from eft_serve.config import ModelConfig, Resources

HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 30.0
GRACEFUL_SHUTDOWN_S = 10.0
REPLICA_ENVIRONMENT = {
    # Idle math threads must sleep: spinning takes cores from a busy model on the same node.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # Logits are megabytes; by default glibc would map and fault in their pages in every step.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),  # glibc's maximum
    "MALLOC_TRIM_THRESHOLD_": str(256 * 1024**2),
}
UNBOUNDED = 100_000  # Serve's back-pressure is only the backstop: the app does admission


def deployment_options(resources: Resources, *, num_replicas: int = 1) -> dict[str, Any]:
    """Options of any deployment."""
    actor: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "resources": resources.custom,
        "runtime_env": {"env_vars": REPLICA_ENVIRONMENT},
    }
    if resources.node_labels:
        actor["label_selector"] = resources.node_labels
    return {
        "num_replicas": num_replicas,
        "max_ongoing_requests": UNBOUNDED,
        "ray_actor_options": actor,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
    }


def model_options(config: ModelConfig) -> dict[str, Any]:
    """Options of a model's deployment; its tensor-parallel ranks are processes of the replica."""
    return deployment_options(config.resources, num_replicas=config.num_replicas)
