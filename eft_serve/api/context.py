"""What every endpoint can use, and what the middleware knows of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from starlette.requests import Request

from eft_serve.api.auth import Access
from eft_serve.api.metrics import ApiMetrics
from eft_serve.api.prompts import PromptRenderer, Prompts
from eft_serve.api.service import Service
from eft_serve.api.uploads import UploadSlots
from eft_serve.batches.service import BatchService
from eft_serve.ensemble import Ensemble
from eft_serve.errors import FeatureDisabledError, ModelNotFoundError
from eft_serve.tenancy.limits import AdmissionLimits
from eft_serve.tenancy.tenants import Tenant
from eft_serve.tenancy.usage import UsageCounters
from eft_serve.types import Term


@dataclass(frozen=True, slots=True)
class Context:
    """One process's collaborators."""

    service: Service
    renderer: PromptRenderer
    access: Access
    limits: AdmissionLimits
    metrics: ApiMetrics
    usage: UsageCounters
    registry: CollectorRegistry
    started: int  # Unix seconds
    uploads: UploadSlots = field(default_factory=UploadSlots)
    storage: BatchService | None = None  # files and batches, where they are switched on

    @property
    def batches(self) -> BatchService:
        """Files and batches; raises `FeatureDisabledError` where there are none."""
        if self.storage is None:
            raise FeatureDisabledError("this server keeps no files and batches; set server.files_url to switch them on")
        return self.storage

    def ensemble(self, name: str, tenant: Tenant) -> Ensemble:
        """What a `model` names, for this tenant; what the tenant may not use does not exist for it.

        Raises:
            ModelNotFoundError: neither a recipe nor a model, or not this tenant's.
        """
        found = Ensemble.find(self.service.config, name) if tenant.allows(name) else None
        if found is None:
            raise ModelNotFoundError(f"model {name!r} does not exist; GET /v1/models lists yours", param="model")
        return found

    def tightest(self, terms: Sequence[Term], prompts: Prompts) -> tuple[str, int]:
        """The term whose context has the least room left after its prompt, and that context's tokens."""
        contexts = {term.name: self.service.max_model_len(term.model) for term in terms}
        name = min(contexts, key=lambda name: contexts[name] - len(prompts[name]))
        return name, contexts[name]

    def names(self, tenant: Tenant) -> list[str]:
        """The recipes, then the plain models, that this tenant may use."""
        config = self.service.config
        return [name for name in (*config.recipes, *config.models) if tenant.allows(name)]


def context_of(request: Request) -> Context:
    """The application's context."""
    context: Context = request.app.state.context
    return context


def request_id_of(request: Request) -> str:
    """The id under which the request is logged and answered; not unique when clients choose it."""
    request_id: str = request.state.request_id
    return request_id
