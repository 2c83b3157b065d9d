"""Who is asking: a tenant by its key or, on a server without tenants, a loopback client.

Without tenants four things must hold, because a remote client can arrange each one alone: the peer is loopback,
nothing says that a proxy forwarded the request (then the peer is the proxy, not the client), the `Host` is a loopback
name (a web page can make a browser ask 127.0.0.1 under its own name), and the `Origin`, which a browser sends with what
a page posts, is this server's own or one that the configuration names. Headers can only reduce trust.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import Request

from eft_serve.errors import AuthenticationError, PermissionDeniedError
from eft_serve.tenancy.tenants import ANONYMOUS, Tenant, Tenants

FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")
INSIDE = "eft_serve.tenant"  # in the ASGI scope, of requests that this process makes itself; clients write headers
REMEDY = "set server.tenants_file and send an API key (eft-serve tenant create makes both)"


class Access:
    """Finds the tenant of a request.

    Args:
        tenants: all tenants; None to answer loopback clients only.
        origins: those whose web pages are answered without tenants.
    """

    def __init__(self, tenants: Tenants | None, origins: Collection[str] = ()) -> None:
        self._tenants = tenants
        self._origins = frozenset(origins)

    def tenant(self, request: Request) -> Tenant:
        """The tenant who asks.

        Raises:
            AuthenticationError: there are tenants and the request carries no key of theirs.
            PermissionDeniedError: there are none and the request does not come from this machine.
        """
        inside = request.scope.get(INSIDE)
        if isinstance(inside, Tenant):
            return inside
        if self._tenants is not None:
            return self._tenants.authenticate(request.headers.get("authorization"))
        if request.client is None or not is_loopback(request.client.host):
            raise PermissionDeniedError(f"without tenants only loopback clients are answered; {REMEDY}")
        if any(header in request.headers for header in FORWARDING_HEADERS):
            raise PermissionDeniedError(f"without tenants nothing that a proxy forwarded is answered; {REMEDY}")
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not is_loopback(host_name(host)):
            raise PermissionDeniedError(f"without tenants the Host must be a loopback name; ask localhost, or {REMEDY}")
        if origin is not None and origin not in self._origins and not _is_own(origin, host):
            raise PermissionDeniedError(
                f"without tenants only web pages of server.cors_origins are answered; add its origin, or {REMEDY}"
            )
        return ANONYMOUS

    def named(self, name: str) -> Tenant:
        """The tenant of this name, for work that it left here.

        Raises:
            AuthenticationError: it is gone, or has no keys any more.
        """
        tenant = ANONYMOUS if self._tenants is None else self._tenants.tenants.get(name)
        if tenant is None or tenant.name != name or not (tenant.keys or self._tenants is None):
            raise AuthenticationError(f"tenant {name!r} has no API key any more")
        return tenant

    def metrics_reader(self, request: Request) -> Tenant:
        """As `tenant`, but only a tenant that may read metrics, which name every tenant."""
        tenant = self.tenant(request)
        if not tenant.metrics:
            raise PermissionDeniedError("this key does not open /metrics; give its tenant 'metrics: true'")
        return tenant


def host_name(host: str) -> str:
    """The name in a `Host` header, without port and brackets; empty when there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own(origin: str, host: str) -> bool:
    return origin.partition("://")[2] == host != ""


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback address, IPv4 in IPv6 included."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
