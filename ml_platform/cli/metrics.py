"""Command ``ml-platform metrics``."""

from __future__ import annotations

from typing import Annotated

import typer

from ml_platform.cli.clusters import dataproc_engine
from ml_platform.cli.context import CommandError, dagster_instance, lake_of, mlflow_of, say
from ml_platform.settings import load_settings


def metrics(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 9464,
) -> None:
    """Serve metrics for Prometheus until interrupted (docs/operations.md)."""
    from prometheus_client import CollectorRegistry, start_http_server

    from ml_platform.metrics import PlatformMetrics
    from ml_platform.model.mlflow import limit_retries

    limit_retries()
    settings = load_settings()
    with dagster_instance(settings) as instance:
        registry = CollectorRegistry()
        engine = dataproc_engine(settings) if settings.deployment == "yandex" else None
        registry.register(PlatformMetrics(instance, lake_of(settings), mlflow_of(settings), engine))
        try:
            _, server = start_http_server(port, host, registry)
        except OSError as error:
            raise CommandError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
        say(f"metrics on http://{host}:{port}/metrics")
        server.join()
