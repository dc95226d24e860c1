"""Memory growth of the code server from evaluating a sensor's ticks; storage is SQLite.

A sensor that ticks every 30 s does so 2,880 times a day. Here a separate code server, in an empty directory, gets as
many tick requests one after another, in the same way as from Dagster's daemon.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from benchmarks.common import markdown
from benchmarks.soak import World, stop, wait_until

#: Ticks at the start, during which a code server imports modules and opens connections.
WARM_UP = 300
ROWS = 6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sensor", default="dead_runs", help="name of the sensor (default: dead_runs)")
    parser.add_argument("--ticks", type=int, default=2880, help="ticks after the warm-up (default: 2880)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ml-platform-ticks-") as directory:
        rows = measure(World(Path(directory)), arguments.sensor, arguments.ticks)
    per_tick = (rows[-1][1] - rows[0][1]) / rows[-1][0] * 1000
    print(markdown(["ticks", "code server, MB"], [[f"{ticks:,}", f"{size:.1f}"] for ticks, size in rows]))
    print(f"\na tick of {arguments.sensor} adds {per_tick:.2f} kB")


def measure(world: World, sensor: str, ticks: int) -> list[tuple[int, float]]:
    """(ticks after the warm-up, resident MB of the code server), in order."""
    from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteRepositoryOrigin
    from dagster._grpc.client import DagsterGrpcClient
    from dagster._grpc.types import SensorExecutionArgs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with dg.DagsterInstance.from_config(str(world.home)) as instance:
        address = ["--host", "127.0.0.1", "--port", str(port)]
        server = world.start("dagster", "api", "grpc", *address, "-m", "ml_platform.definitions")
        try:
            client = DagsterGrpcClient(host="127.0.0.1", port=port)
            wait_until(lambda: answers(client), "the code server answers", 120)
            location = GrpcServerCodeLocationOrigin(host="127.0.0.1", port=port)
            request = SensorExecutionArgs(
                repository_origin=RemoteRepositoryOrigin(location, "__repository__"),
                instance_ref=instance.get_ref(),
                sensor_name=sensor,
                log_key=["__repository__", sensor, "tick"],
            )
            rows = []
            for tick in range(-WARM_UP, ticks + 1):
                answer = client.external_sensor_execution(request)
                if "SensorExecutionErrorSnap" in answer:
                    raise SystemExit(f"the tick failed: {answer}")
                if tick >= 0 and tick % max(1, ticks // ROWS) == 0:
                    rows.append((tick, psutil.Process(server.pid).memory_info().rss / 1e6))
            return rows
        finally:
            stop(server)


def answers(client: Any) -> bool:
    """True if the code server is up."""
    try:
        client.ping("")
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
