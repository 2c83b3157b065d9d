"""An engine in a process of its own behind the step contract, as a model's replica is, but started without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from eft_serve.transport.server import StepHandler, StepServer
from eft_serve.types import Endpoint, ModelInfo

START_TIMEOUT_S = 60.0

Build = Callable[..., tuple[StepHandler, ModelInfo]]  # a module's own function, so that it can be sent to a process


def start(build: Build, arguments: tuple[Any, ...], client_public_key: bytes) -> tuple[BaseProcess, Endpoint]:
    """Start one with what `build(*arguments)` makes there; it ends with its parent."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, build, arguments), daemon=True)
    process.start()
    theirs.close()  # so that its death is an end of file here
    if not ours.poll(START_TIMEOUT_S):
        raise TimeoutError(f"an engine has not started within {START_TIMEOUT_S:g} s")
    endpoint: Endpoint = ours.recv()
    ours.send(client_public_key)
    ours.recv()
    process._eft_connection = ours  # type: ignore[attr-defined]  # closing it would stop the engine
    return process, endpoint


def _run(connection: Connection, build: Build, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    handler, info = build(*arguments)
    server = StepServer(handler, host="127.0.0.1")
    server.start()
    connection.send(Endpoint(replica_id=info.model, address=server.address, public_key=server.public_key, info=info))
    server.allow(connection.recv())
    connection.send(None)
    connection.recv()  # until the other side says stop, or is gone
    server.close()
