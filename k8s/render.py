"""Writes each overlay's `serve-config.yaml` from the deployment file that it serves: `python k8s/render.py`.

The two never differ but by the overrides below; a test holds that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
OVERLAYS = ROOT / "k8s" / "overlays"
TENANTS_FILE = "/etc/eft-serve/tenants.yaml"
SOURCES = {"zoo": "zoo.yaml", "llama2-70b": "llama2-70b.yaml"}
OVERRIDES: dict[str, dict[str, Any]] = {
    "zoo": {
        "proxy_location": "EveryNode",  # on the worker, beside the ingress: the head serves nobody
        "http_options.host": "0.0.0.0",  # noqa: S104, clients are outside the pod, so they need keys
        "applications.0.args.config.server.tenants_file": TENANTS_FILE,
    },
    "llama2-70b": {},
}
HEADER = "# Written by k8s/render.py from deployments/{source}; change that and run it again.\n"


class _Dumper(yaml.SafeDumper):
    """Multi-line strings as blocks, and no anchors: the file is for reading."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def serve_config(overlay: str) -> dict[str, Any]:
    """The overlay's Serve deploy file: its source with its overrides."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / SOURCES[overlay]).read_text())
    for path, value in OVERRIDES[overlay].items():
        *parents, last = path.split(".")
        target: Any = data
        for parent in parents:
            target = target[int(parent) if isinstance(target, list) else parent]
        target[last] = value
    return data


def render(overlay: str) -> str:
    """The patch that puts it into the RayService."""
    config = yaml.dump(serve_config(overlay), Dumper=_Dumper, sort_keys=False)
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "eft-serve"},
        "spec": {"serveConfigV2": config},
    }
    return HEADER.format(source=SOURCES[overlay]) + yaml.dump(patch, Dumper=_Dumper, sort_keys=False, width=1000)


def main() -> None:
    """Write every overlay's file."""
    for overlay in SOURCES:
        (OVERLAYS / overlay / "serve-config.yaml").write_text(render(overlay))


if __name__ == "__main__":
    main()
