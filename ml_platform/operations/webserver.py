"""Dagster's webserver, restricted to its own pages. It takes the options of ``dagster-webserver``.

Dagster's own (1.13) obeys every page that a browser shows: it takes commands by GET, of any origin and under any host
name. A page of somebody else's could so start a run with a configuration of its choice, which is to run code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ml_platform.settings import load_settings

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class OwnPagesOnly:
    """ASGI middleware that refuses, with status 403, what a page of another site may have asked for.

    Programs that are no browsers send no Origin, and are not concerned.

    Args:
        app: what answers the rest.
        addresses: those of the server, beside loopback, such as ``https://dagster.example``.
    """

    def __init__(self, app: Any, addresses: Iterable[str] = ()) -> None:
        self._app = app
        parts = [urlsplit(address) for address in addresses]
        self._names = {*LOOPBACK, *(part.hostname for part in parts)}
        self._hosts = {part.netloc for part in parts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        problem = self._problem(scope) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse(f"{problem}\n", 403)(scope, receive, send)

    def _problem(self, scope: Any) -> str | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, asking = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError:
            return "Host or Origin is no address"
        # A name of somebody else's may lead here, and then its pages count as this server's own.
        if name not in self._names:
            return "this is not the server of that name; if it is, set DAGSTER_UI_URL to its address"
        if origin is not None and asking not in {host, *self._hosts}:
            return "a page of another site asks"
        # Browsers get images and scripts by GET without naming an origin. Dagster's pages and clients use POST.
        of_api = scope["path"].rstrip("/").endswith("/graphql")
        if scope.get("method") == "GET" and of_api and "text/html" not in headers.get("accept", ""):
            return "GraphQL takes POST"
        return None


def main() -> None:
    """Run the webserver until it is stopped."""
    from dagster_webserver import cli
    from dagster_webserver.webserver import DagsterWebserver
    from dotenv import load_dotenv
    from starlette.middleware import Middleware

    load_dotenv(Path.cwd() / ".env", override=True)
    url = load_settings().dagster_ui_url
    guard = Middleware(OwnPagesOnly, addresses=[url] if url else [])
    dagsters_own = DagsterWebserver.build_middleware
    DagsterWebserver.build_middleware = lambda self: [guard, *dagsters_own(self)]  # type: ignore[method-assign]
    cli.main()


def dev() -> None:
    """``dagster dev`` with this webserver. Raises RuntimeError: this Dagster would start another one."""
    from dagster._cli import dev as dagster_dev
    from dagster._cli import main as dagster_command

    start = dagster_dev.open_ipc_subprocess

    def start_guarded(parts: Sequence[str], **kwargs: Any) -> Any:
        if "dagster_webserver" not in parts and "dagster._daemon" not in parts:
            raise RuntimeError(f"this Dagster starts its webserver otherwise: {parts[:4]}")
        return start([__name__ if word == "dagster_webserver" else word for word in parts], **kwargs)

    dagster_dev.open_ipc_subprocess = start_guarded
    sys.argv[1:1] = ["dev"]
    dagster_command()


if __name__ == "__main__":
    main()
