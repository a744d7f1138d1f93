"""Ray clusters that outlive the call that starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PORTS = (
    "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port",
)  # fmt: skip


def start_node(*flags: str, **environment: str) -> None:
    """A node of a cluster: processes that outlive this call, with more in their environment."""
    command = [Path(sys.executable).parent / "ray", "start", "--disable-usage-stats", *flags]
    env = os.environ | {"RAY_AUTH_MODE": "disabled"} | environment
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=env)


def start_head(mark: str, *flags: str, **environment: str) -> dict[str, int]:
    """The first node of a cluster; its ports by their names."""
    ports = {}
    for name in PORTS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports[name] = probe.getsockname()[1]
    chosen = [f"--{name}={port}" for name, port in ports.items()]
    start_node("--head", *chosen, f"--temp-dir=/tmp/mf-{mark[:8]}", *flags, **environment)
    return ports
