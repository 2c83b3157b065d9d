"""Starting and stopping the real commands, and what a test needs of a running application."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from eft_serve.config import ZOO_CHECKPOINTS, AppConfig
from eft_serve.config_check import load_any
from eft_serve.tenancy.store import create_tenant
from eft_serve.testing.lora import write_random_lora

ROOT = Path(__file__).parent.parent.parent
READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
NARROW_TOKENS = 1120
SYSTEM_PROMPT = "Tell me about the currency of Peru."
PREFIX = " It is"
TOLD = {"model": "tuned-small", "name": "told", "system_prompt": SYSTEM_PROMPT}
TOLD_OF_TOOLS = {"chat_template": str(Path(__file__).parent / "tools.jinja")}
RECIPES: dict[str, Any] = {
    "steered": {
        "base": "base-large",
        "reference": "base-large",
        "tuned": {"model": "base-large", "system_prompt": SYSTEM_PROMPT, "response_prefix": PREFIX},
    },
    "told": {"base": "base-large", "reference": "base-small", "tuned": TOLD},
    "interpolated": {"base": "base-large", "reference": "base-small", "tuned": ["tuned-small", TOLD]},
    "tools": {
        "base": {"model": "base-large", **TOLD_OF_TOOLS},
        "reference": {"model": "base-small", **TOLD_OF_TOOLS},
        "tuned": {"model": "tuned-small", **TOLD_OF_TOOLS},
        "tool_parser": "hermes",
    },
    "same": {"base": "base-narrow", "reference": "base-large", "tuned": {"model": "base-narrow", "name": "itself"}},
}


@dataclass(frozen=True)
class Served:
    """The running application, and keys of its tenants."""

    url: str
    dashboard_url: str
    process: subprocess.Popen[bytes]
    config: AppConfig
    keys: dict[str, str]  # by tenant
    environment: dict[str, str]  # with the token that Ray's own ports want

    clients: dict[str, openai.OpenAI] = field(default_factory=dict)  # by tenant, closed with the application

    def client(self, tenant: str = "tests") -> openai.OpenAI:
        if tenant not in self.clients:
            url = f"{self.url}/v1"
            self.clients[tenant] = openai.OpenAI(base_url=url, api_key=self.keys[tenant], max_retries=0, timeout=120.0)
        return self.clients[tenant]

    def async_client(self, tenant: str = "tests") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0, timeout=120.0)

    def headers(self, tenant: str = "tests") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def metrics(self) -> str:
        response = httpx.get(f"{self.url}/metrics", headers=self.headers(), timeout=30.0)
        assert response.status_code == 200, response.text
        return response.text

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of a scrape, by name and labels; the same pair twice would be double counting."""
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in found, f"{key} is in the scrape twice"
                found[key] = sample.value
        return found

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(
            value for (sample, pairs), value in self.samples().items() if sample == name and wanted <= set(pairs)
        )

    def by_process(self, name: str, **labels: str) -> dict[str, float]:
        """The same, by process."""
        wanted = set(labels.items())
        samples = [(dict(pairs), value) for (sample, pairs), value in self.samples().items() if sample == name]
        return {labels["process"]: value for labels, value in samples if wanted <= set(labels.items())}

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of one deployment's replicas, below this application's own process tree."""
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.is_running() and f":{deployment}" in " ".join(child.cmdline()) + child.name()
        ]


def write_config(directory: Path, tenants_file: Path) -> Path:
    """The embedded family with all that may multiply: one model twice, so that one can be killed, one split over two
    ranks, two coordinators that share them all, a recipe whose base has little room, so that requests of it are
    preempted, recipes in which one model has several roles or prompts, or calls tools, an adapter, and files."""
    config: dict[str, Any] = load_any(ROOT / "deployments" / "zoo.yaml").model_dump(mode="json")
    config["models"]["tuned-small"]["num_replicas"] = 2
    config["models"]["base-small"]["tensor_parallel"] = 2
    config["models"]["base-narrow"] = {**config["models"].pop("tuned-large"), "path": "zoo:base-large"}
    config["models"]["base-narrow"]["kv_cache_tokens"] = NARROW_TOKENS
    config["recipes"]["narrow"] = {**config["recipes"]["eft"], "base": "base-narrow"}
    adapter = write_random_lora(
        directory / "adapter", ZOO_CHECKPOINTS / "tuned-small", ("q_proj", "v_proj", "down_proj")
    )
    config["models"]["adapted"] = {"model": "tuned-small", "adapter": str(adapter)}
    config["recipes"] |= RECIPES
    config["recipes"]["adapted-eft"] = {"base": "base-large", "reference": "tuned-small", "tuned": "adapted"}
    config["coordinator"]["num_replicas"] = 2
    config["server"] |= {"tenants_file": str(tenants_file), "files_url": str(directory / "files")}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_tenants(path: Path) -> dict[str, str]:
    return {
        "tests": create_tenant(path, "tests", metrics=True),
        "only-eft": create_tenant(path, "only-eft", ["eft"]),
        "slow": create_tenant(path, "slow", requests_per_minute=2),
        "narrow": create_tenant(path, "narrow", max_concurrent_requests=1),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_said(process: subprocess.Popen[bytes], log: Path, words: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while words not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"exit code {process.poll()}:\n{log.read_text()}")
        time.sleep(0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and nothing harsher unless it does not help."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
            raise
