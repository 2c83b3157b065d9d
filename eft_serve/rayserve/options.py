"""How our configuration becomes Ray Serve deployment options."""

from __future__ import annotations

from typing import Any

from eft_serve.config import ModelConfig, Resources

HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 30.0
GRACEFUL_SHUTDOWN_S = 10.0
REPLICA_ENVIRONMENT = {
    # Idle math threads must sleep: spinning they take the cores that a busy model on the same node needs.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # Logits are megabytes, and glibc would map and fault their pages anew in every step.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(256 * 1024**2),
}
UNBOUNDED = 100_000  # Serve's own back-pressure is only the backstop: admission is the app's


def deployment_options(resources: Resources, *, num_replicas: int = 1) -> dict[str, Any]:
    """Options of any of our deployments."""
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
