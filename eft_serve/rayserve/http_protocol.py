"""How the HTTP servers of Ray Serve parse requests. Knows uvicorn, which they run, and not Ray."""

from __future__ import annotations

from uvicorn.config import HTTP_PROTOCOLS


def use_h11() -> list[object]:
    """Parse with h11; Serve calls this in every process that listens (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`).

    Its default, httptools, drops the body of a request that offers another protocol, as `curl --http2` and Java's
    client do with `Upgrade: h2c`. A server may ignore the offer (RFC 9110, 7.8), and h11 does; it costs 8 us an event.

    Returns:
        What Serve wants of such a function: middlewares, of which there are none.
    """
    HTTP_PROTOCOLS["auto"] = HTTP_PROTOCOLS["h11"]
    return []
