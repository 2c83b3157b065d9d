"""The embedded family as a bound application, which is what `serve build deployments.zoo:app` wants."""

from __future__ import annotations

from deployments import eft

app = eft.app(eft.AppArgs())
