"""Serves the champion over HTTP with MLflow's scoring server: python -m ml_platform.model.serve

The server loads one version. This process asks MLflow for the champion, and starts the server again, with the new
version, when it changes. While MLflow does not answer, the version that was loaded stays in service.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ml_platform.model.mlflow import MODEL_NAME, MlflowResource
from ml_platform.settings import load_dotenv, load_settings

#: Seconds that the server has to end.
STOP_TIMEOUT_S = 20


def champion(mlflow: MlflowResource) -> str | None:
    """Version of the champion; None if there is none, or MLflow does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.champion()
    except MlflowException as error:
        # Without its text, which may contain the address of MLflow with a password.
        say(f"MLflow does not answer ({error.error_code}): see ml-platform doctor")
        return None
    if found is None:
        say("there is no champion yet")
    return None if found is None else str(found.version)


def say(text: str) -> None:
    """Log a line."""
    print(f"serve: {text}", file=sys.stderr, flush=True)


def start(mlflow: MlflowResource, version: str, host: str, port: int) -> subprocess.Popen[bytes]:
    """Start MLflow's scoring server with a version."""
    say(f"version {version} of {MODEL_NAME} on {host}:{port}")
    model = ["--model-uri", f"models:/{MODEL_NAME}/{version}", "--env-manager", "local"]
    environment = dict(os.environ)  # noqa: TID251 - of the child
    # MLflow looks for its web server in the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", *model, "--host", host, "--port", str(port)],
        env={**environment, "MLFLOW_TRACKING_URI": mlflow.tracking_uri, "PATH": path},
        start_new_session=True,
    )


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def serve(host: str, port: int, poll_s: float) -> int:
    """Serve until the server ends by itself; returns its exit status."""
    settings = load_settings()
    mlflow = MlflowResource(tracking_uri=settings.tracking_uri)
    while (version := champion(mlflow)) is None:
        time.sleep(poll_s)
    server = start(mlflow, version, host, port)
    try:
        while True:
            try:
                return server.wait(poll_s)
            except subprocess.TimeoutExpired:
                found = champion(mlflow)
            if found not in (None, version):
                version = str(found)
                stop(server)
                server = start(mlflow, version, host, port)
    finally:
        stop(server)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="port (default: 8080)")
    parser.add_argument("--poll", type=float, default=30.0, metavar="S", help="seconds between looks at the champion")
    arguments = parser.parse_args()
    load_dotenv()
    signal.signal(signal.SIGTERM, _exit)  # so that the server ends, too
    sys.exit(serve(arguments.host, arguments.port, arguments.poll))


if __name__ == "__main__":
    main()
