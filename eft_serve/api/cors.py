"""Which web pages may call the API from a browser: the preflights, and the headers that let a page read an answer."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

EXPOSED = ("x-request-id", "retry-after", "x-should-retry")


def install(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins call the application, around every middleware that it has so far.

    Outermost, so that pages can read every answer, also the one to an unexpected error, and preflights need no key: a
    browser sends none with them. Never with credentials, which are cookies: keys are sent by the page itself.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=EXPOSED,
        )
