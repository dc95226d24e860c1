"""Dagster's webserver with protection against cross-site requests. Takes the options of ``dagster-webserver``.

The original (1.13) accepts mutations by GET, from any origin and under any host name, so a page of another site could
start a run with a configuration of its choice, that is, execute code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from ml_platform.operations.log_lines import configure_root_logger
from ml_platform.settings import load_dotenv, load_settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def guard(address: str | None) -> list[Middleware]:
    """Middleware that rejects possible cross-site requests with status 400 or 403.

    Args:
        address: the server's public URL, such as ``https://dagster.example``; loopback is always allowed.
    """
    url = urlsplit(address or "")
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    # DNS rebinding: another site may point its host name here, and its pages would share this server's origin.
    hosts = Middleware(
        TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_HOSTS, *([host] if host else [])], www_redirect=False
    )
    return [hosts, Middleware(SameOriginOnly, netloc=url.netloc.lower())]  # as browsers send it


class SameOriginOnly:
    """ASGI middleware that rejects requests from other origins, and GraphQL by GET. API clients send no Origin.

    Args:
        app: the wrapped application.
        netloc: host and port of the server's public origin, if a proxy forwards another Host; or "".
    """

    def __init__(self, app: ASGIApp, netloc: str = "") -> None:
        self._app = app
        self._netloc = netloc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] in ("http", "websocket") else None
        response = PlainTextResponse(f"{problem}\n", 403) if problem else self._app
        await response(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        # Browsers send "null" for an opaque origin.
        if (origin := headers.get("origin")) is not None:
            netloc = origin.partition("://")[2]
            if not netloc or netloc not in (headers.get("host"), self._netloc):
                return "forbidden: cross-site request"
        # Another site can embed a GET as an image or script, which has no Origin. Dagster's pages and clients use POST.
        is_graphql = scope["path"].rstrip("/").endswith("/graphql")
        if scope.get("method") == "GET" and is_graphql and "text/html" not in headers.get("accept", ""):
            return "GraphQL requires POST"
        return None


def main() -> None:
    """Run the webserver."""
    from dagster_webserver import cli
    from dagster_webserver.webserver import DagsterWebserver

    load_dotenv()
    configure_root_logger()
    middleware = guard(load_settings().dagster_ui_url)
    build_middleware = DagsterWebserver.build_middleware
    DagsterWebserver.build_middleware = lambda self: [*middleware, *build_middleware(self)]  # type: ignore[method-assign]
    cli.main()


def dev() -> None:
    """Run ``dagster dev`` with this webserver. Raises RuntimeError if Dagster would start an unprotected one."""
    from dagster._cli import dev as dagster_dev
    from dagster._cli import main as dagster_command

    start = dagster_dev.open_ipc_subprocess

    def start_protected(parts: Sequence[str], **kwargs: Any) -> Any:
        if "dagster_webserver" not in parts and "dagster._daemon" not in parts:
            raise RuntimeError(f"this version of Dagster starts its webserver differently: {parts[:4]}")
        return start([__name__ if part == "dagster_webserver" else part for part in parts], **kwargs)

    dagster_dev.open_ipc_subprocess = start_protected
    sys.argv[1:1] = ["dev"]
    dagster_command()


if __name__ == "__main__":
    main()
