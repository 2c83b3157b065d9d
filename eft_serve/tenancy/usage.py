"""What each tenant used, as Prometheus counters; they begin at zero with the process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class UsageCounters:
    """Tokens and requests by tenant, recipe and outcome; all labels are names that an administrator chose.

    Args:
        registry: where the counters are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._prompt_tokens = Counter(
            "eft_tenant_prompt_tokens", "Prompt tokens, as in `usage`", ["tenant"], registry=registry
        )
        self._generation_tokens = Counter(
            "eft_tenant_generation_tokens", "Tokens generated, as in `usage`", ["tenant"], registry=registry
        )
        self._requests = Counter(
            "eft_tenant_requests",
            "Requests ended, by HTTP status; 499 when the client went away",
            ["tenant", "recipe", "status"],
            registry=registry,
        )

    def record(self, tenant: str, recipe: str, status: int, prompt_tokens: int, generation_tokens: int) -> None:
        """Count one ended request; tokens count also when it failed half-way."""
        self._requests.labels(tenant, recipe, str(status)).inc()
        self._prompt_tokens.labels(tenant).inc(prompt_tokens)
        self._generation_tokens.labels(tenant).inc(generation_tokens)
