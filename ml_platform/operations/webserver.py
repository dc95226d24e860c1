"""Dagster's webserver, restricted to requests of its own pages. It takes the options of ``dagster-webserver``.

Dagster's own (1.13) obeys any page that a browser shows: it takes commands by GET, from any origin, under any host
name. A page of another site could so start a run with a configuration of its choice, that is, run code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from ml_platform.settings import load_settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def guard(address: str | None) -> list[Middleware]:
    """Middleware that refuses, with status 400 or 403, what a page of another site may have asked for.

    Args:
        address: the server's own address beside loopback, such as ``https://dagster.example``.
    """
    url = urlsplit(address or "")
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    # Another site may let a host name of its own lead here: its pages would have the same origin as this server's.
    hosts = Middleware(
        TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_HOSTS, *([host] if host else [])], www_redirect=False
    )
    return [hosts, Middleware(OwnPagesOnly, netloc=url.netloc)]


class OwnPagesOnly:
    """ASGI middleware that refuses pages of other origins, and GraphQL by GET. Programs send no Origin.

    Args:
        app: the application behind it.
        netloc: host and port of the server's own origin, where a proxy passes on another Host; or "".
    """

    def __init__(self, app: ASGIApp, netloc: str = "") -> None:
        self._app = app
        self._netloc = netloc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] in ("http", "websocket") else None
        answer = PlainTextResponse(f"{problem}\n", 403) if problem else self._app
        await answer(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        # An opaque origin is "null".
        if (origin := headers.get("origin")) is not None:
            netloc = origin.partition("://")[2]
            if not netloc or netloc not in (headers.get("host"), self._netloc):
                return "refused: the request comes from a page of another site"
        # Browsers load images and scripts by GET, without an Origin. Dagster's pages and clients use POST.
        is_graphql = scope["path"].rstrip("/").endswith("/graphql")
        if scope.get("method") == "GET" and is_graphql and "text/html" not in headers.get("accept", ""):
            return "GraphQL takes POST"
        return None


def main() -> None:
    """Run the webserver until it is stopped."""
    from dagster_webserver import cli
    from dagster_webserver.webserver import DagsterWebserver
    from dotenv import load_dotenv

    load_dotenv(Path.cwd() / ".env", override=True)
    middleware = guard(load_settings().dagster_ui_url)
    build_middleware = DagsterWebserver.build_middleware
    DagsterWebserver.build_middleware = lambda self: [*middleware, *build_middleware(self)]  # type: ignore[method-assign]
    cli.main()


def dev() -> None:
    """``dagster dev`` with this webserver. Raises RuntimeError if this version of Dagster would start another one."""
    from dagster._cli import dev as dagster_dev
    from dagster._cli import main as dagster_command

    start = dagster_dev.open_ipc_subprocess

    def start_guarded(parts: Sequence[str], **kwargs: Any) -> Any:
        if "dagster_webserver" not in parts and "dagster._daemon" not in parts:
            raise RuntimeError(f"this version of Dagster starts its webserver differently: {parts[:4]}")
        return start([__name__ if part == "dagster_webserver" else part for part in parts], **kwargs)

    dagster_dev.open_ipc_subprocess = start_guarded
    sys.argv[1:1] = ["dev"]
    dagster_command()


if __name__ == "__main__":
    main()
