"""Domain errors, each with the HTTP status and the OpenAI error type it becomes; knows nothing of HTTP itself."""

from __future__ import annotations

from typing import ClassVar

from eft_serve.types import Failure


class EftServeError(Exception):
    """Base of all: a message that names the field and the remedy, and how the API reports it.

    Args:
        message: for the caller; must hold no secret.
        param: the offending field, as the caller spelled it.
        retry_after_s: for `RateLimitError` and `UnavailableError`, seconds to wait.
    """

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default pickling, and these errors cross Ray's process boundaries.
        return (_rebuild, (type(self), self.message, self.param, self.retry_after_s))


def _rebuild(kind: type[EftServeError], message: str, param: str | None, retry_after_s: float | None) -> EftServeError:
    return kind(message, param=param, retry_after_s=retry_after_s)


class ConfigError(EftServeError):
    """A configuration that cannot be served."""

    status, error_type, code = 500, "server_error", "invalid_config"


class CheckpointError(EftServeError):
    """A model directory that is missing, incomplete, corrupt or of a kind that cannot be served."""

    status, error_type, code = 500, "server_error", "invalid_checkpoint"


class DeploymentError(EftServeError):
    """A deployment could not be started; the message carries its own traceback."""

    status, error_type, code = 500, "server_error", "deployment_failed"


class MissingExtraError(EftServeError):
    """A command needs a package that only an extra of the distribution installs."""

    status, error_type, code = 500, "server_error", "missing_extra"


class InvalidRequestError(EftServeError):
    """The request is malformed or asks for what cannot be given."""

    status, error_type = 400, "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt and output together do not fit a model's context or its KV budget."""

    code = "context_length_exceeded"


class AuthenticationError(EftServeError):
    """No key, or a wrong one."""

    status, error_type, code = 401, "authentication_error", "invalid_api_key"


class PermissionDeniedError(EftServeError):
    """A valid key that may not do this."""

    status, error_type, code = 403, "permission_error", "permission_denied"


class ModelNotFoundError(EftServeError):
    """No such recipe or model, or none that this tenant may see."""

    status, error_type, code = 404, "invalid_request_error", "model_not_found"


class ResourceNotFoundError(EftServeError):
    """No such file or batch, or none of this tenant's."""

    status, error_type, code = 404, "invalid_request_error", "not_found"


class QuotaError(InvalidRequestError):
    """The tenant keeps as much as it may; waiting does not help."""

    code = "quota_exceeded"


class FeatureDisabledError(InvalidRequestError):
    """The server's configuration does not switch this on; the message names the setting."""

    code = "feature_disabled"


class RateLimitError(EftServeError):
    """The tenant's limit is reached; `retry_after_s` says when to try again."""

    status, error_type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class EngineError(EftServeError):
    """A model could not compute a step."""

    status, error_type, code = 500, "server_error", "engine_error"


class UnavailableError(EftServeError):
    """A model has no reachable replica, or the server is starting or stopping."""

    status, error_type, code = 503, "server_error", "service_unavailable"


class CoordinatorLostError(UnavailableError):
    """The coordinator of a request is gone, or stops; another one can go on."""


class DeadlineError(EftServeError):
    """A step or a request took longer than its deadline."""

    status, error_type, code = 504, "server_error", "deadline_exceeded"


BY_NAME: dict[str, type[EftServeError]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        CheckpointError,
        DeploymentError,
        InvalidRequestError,
        ContextLengthError,
        AuthenticationError,
        PermissionDeniedError,
        ModelNotFoundError,
        ResourceNotFoundError,
        QuotaError,
        FeatureDisabledError,
        RateLimitError,
        EngineError,
        UnavailableError,
        CoordinatorLostError,
        DeadlineError,
    )
}


def to_failure(error: EftServeError) -> Failure:
    """The error as data."""
    return Failure(kind=type(error).__name__, message=error.message, param=error.param)


def from_failure(failure: Failure) -> EftServeError:
    """The error again, of the class that it had."""
    return BY_NAME.get(failure.kind, EngineError)(failure.message, param=failure.param)
