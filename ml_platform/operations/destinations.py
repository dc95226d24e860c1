"""Destinations of alerts: e-mail, a webhook, and the services that apprise knows.

Errors of a destination do not contain its secrets. E-mail and the webhook do not go through apprise: it says that a
delivery failed, but not why, and has a webhook's body of its own.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import smtplib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from io import StringIO
from typing import Any, Protocol
from urllib.parse import urlsplit

from ml_platform.escaping import chat
from ml_platform.operations.messages import Message, one_line
from ml_platform.settings import LOCALHOST, AlertSettings, SettingsError

#: Timeout of one exchange with a server; a sensor tick must finish within a minute.
TIMEOUT_S = 10

APPRISE_FILE = "the file of ML_PLATFORM_ALERT_APPRISE_FILE"

_PORTS = {"starttls": 587, "tls": 465, "none": 25}


class AlertError(Exception):
    """An alert cannot be delivered; the message says what to do and contains no secrets."""


class Destination(Protocol):
    """A destination of alerts. Its name is part of the sensor's cursor."""

    name: str

    def send(self, message: Message) -> None:
        """Deliver one message. Raises AlertError or SettingsError."""

    def check(self) -> str:
        """Test the connection without sending anything, and describe the result. Raises as `send` does."""


def build_destinations(settings: AlertSettings) -> list[Destination]:
    """Create the configured destinations; empty if alerts are off. Reads the file of apprise's URLs."""
    destinations: list[Destination] = []
    if settings.email_to:
        destinations.append(Email(settings))
    if settings.webhook_url or settings.webhook_url_file:
        destinations.append(Webhook(settings))
    try:
        urls = settings.read_apprise_urls()
    except SettingsError as error:
        return [*destinations, Unusable("apprise", error)]
    names: list[str] = []
    for url in urls:
        scheme = re.sub(r"[^a-z0-9]", "", url.partition("://")[0].lower())[:20]
        names.append(scheme)
        number = names.count(scheme)
        destinations.append(Chat(f"apprise {scheme}{f' {number}' if number > 1 else ''}", url))
    return destinations


class Email:
    """Sends one plain-text message to all recipients by SMTP."""

    name = "email"

    def __init__(self, settings: AlertSettings) -> None:
        self._settings = settings

    def send(self, message: Message) -> None:
        settings = self._settings
        letter = EmailMessage()
        letter["From"] = settings.email_from
        letter["To"] = ", ".join(settings.email_to)
        letter["Subject"] = one_line(message.headline)
        letter["Date"] = formatdate()
        letter["Message-ID"] = make_msgid(domain=str(settings.email_from).rpartition("@")[2])
        letter["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office replies
        letter.set_content(str(message))
        with self._connection() as server:
            # Ignore refused recipients if others accept: a retry would send to the others again.
            server.send_message(letter)

    def check(self) -> str:
        with self._connection() as server:
            server.noop()
        login = "logged in" if self._settings.smtp_user else "no login"
        return f"{self._settings.smtp_host} answers ({self._settings.smtp_security}, {login}); nothing was sent"

    @contextmanager
    def _connection(self) -> Generator[smtplib.SMTP]:
        """Open an SMTP connection that is ready to send; errors are raised as AlertError."""
        settings = self._settings
        security, host = settings.smtp_security, str(settings.smtp_host)
        port = settings.smtp_port or _PORTS[security]
        target = f"the SMTP server {host}:{port}"
        password = settings.read_smtp_password()
        try:
            context = ssl.create_default_context()
            with (
                smtplib.SMTP_SSL(host, port, timeout=TIMEOUT_S, context=context)
                if security == "tls"
                else smtplib.SMTP(host, port, timeout=TIMEOUT_S)
            ) as server:
                if security == "starttls":
                    server.starttls(context=context)
                if settings.smtp_user and password:
                    try:
                        server.login(settings.smtp_user, password)
                    except UnicodeError:
                        raise AlertError("the SMTP user and password take ASCII characters only") from None
                yield server
        except smtplib.SMTPAuthenticationError as error:
            # Leave out the server's reply: it may contain the credentials.
            raise AlertError(
                f"{target} refuses the login ({error.smtp_code}): check ML_PLATFORM_ALERT_SMTP_USER and "
                "ML_PLATFORM_ALERT_SMTP_PASSWORD"
            ) from None
        except smtplib.SMTPNotSupportedError:
            raise AlertError(
                f"{target} does not offer {'STARTTLS' if security == 'starttls' else 'a required feature'}: check "
                "ML_PLATFORM_ALERT_SMTP_SECURITY and ML_PLATFORM_ALERT_SMTP_USER"
            ) from None
        except smtplib.SMTPRecipientsRefused as error:
            refused = "; ".join(f"{to}: {code} {_reply(text)}" for to, (code, text) in error.recipients.items())
            raise AlertError(f"{target} refuses all recipients (ML_PLATFORM_ALERT_EMAIL_TO): {refused}") from None
        except smtplib.SMTPResponseException as error:
            raise AlertError(f"{target} answers {error.smtp_code} {_reply(error.smtp_error)}") from None
        except smtplib.SMTPServerDisconnected:
            raise AlertError(f"{target} closed the connection or does not answer within {TIMEOUT_S} s") from None
        except (smtplib.SMTPException, OSError) as error:
            raise AlertError(
                f"{target} {_network_problem(error)}: check ML_PLATFORM_ALERT_SMTP_HOST, _PORT and _SECURITY"
            ) from None


def _reply(text: str | bytes) -> str:
    """Reply of an SMTP server on one line."""
    return one_line(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Disables redirects: a redirected POST becomes a GET without content, possibly unencrypted."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhook:
    """Sends one POST of JSON: ``text`` (which Slack, Mattermost and others show), ``runs``, ``changes`` (data)."""

    name = "webhook"

    def __init__(self, settings: AlertSettings) -> None:
        self._settings = settings

    def send(self, message: Message) -> None:
        url = str(self._settings.read_webhook_url())
        body = {
            "text": chat(str(message)),
            "runs": [{**asdict(run), "steps": dict(run.steps)} for run in message.runs],
            "changes": [asdict(change) for change in message.changes],
        }
        try:
            request = urllib.request.Request(  # noqa: S310 - the settings check the scheme
                url,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json", "User-Agent": "ml_platform"},
                method="POST",
            )
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            problem = f"answers {error.code}"
            error.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Leave out the error's text: it may contain the URL, which is a secret.
            problem = _network_problem(error)
        raise AlertError(f"the webhook {problem}: check ML_PLATFORM_ALERT_WEBHOOK_URL")

    def check(self) -> str:
        parts = urlsplit(str(self._settings.read_webhook_url()))
        secure = parts.scheme == "https"
        try:
            _connect(str(parts.hostname), parts.port or (443 if secure else 80), secure=secure)
        except OSError as error:
            raise AlertError(f"the webhook {_network_problem(error)}: check ML_PLATFORM_ALERT_WEBHOOK_URL") from None
        return "configured, its server answers; nothing was sent"


class Chat:
    """Sends one message through apprise, to a service that one of its URLs names. The URL is a secret."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self._url = name, url

    def send(self, message: Message) -> None:
        with _private_logs() as log:
            service = self._service()
            if service.notify(title=one_line(message.headline), body=chat(str(message)), body_format="text"):
                return
        # Only the status: the rest of the log may contain the URL.
        if status := re.search(r"error=([1-5]\d\d)\b", log.getvalue()):
            raise AlertError(f"{service.service_name} answers {status[1]}: check its URL in {APPRISE_FILE}")
        self.check()
        raise AlertError(f"{service.service_name} did not take the message: check its URL in {APPRISE_FILE}")

    def check(self) -> str:
        with _private_logs():
            service = self._service()
        name, server = service.service_name, _server_of(service)
        if server is None:
            return f"{name}: its URL is complete; its server is not known before a message; nothing was sent"
        try:
            _connect(*server, secure=_is_encrypted(service))
        except OSError as error:
            raise AlertError(f"{name} {_network_problem(error)}: check its URL in {APPRISE_FILE}") from None
        return f"{name}: its server answers; nothing was sent"

    def _service(self) -> Any:
        """The service as apprise knows it, with our rules for connections. Raises AlertError."""
        import apprise

        asset = apprise.AppriseAsset(
            app_id="ml_platform",
            app_desc="ml_platform",
            app_url="",
            http_redirects=False,
            image_url_mask="",  # no pictures from elsewhere
            image_url_logo="",
            storage_mode="memory",
        )
        service: Any = apprise.Apprise.instantiate(self._url, asset=asset)
        if service is None:
            raise AlertError(f"apprise cannot use this URL in {APPRISE_FILE}: see its documentation of {self.name}")
        if not _is_encrypted(service) and service.host not in LOCALHOST:
            raise AlertError(
                f"{service.service_name} would be sent unencrypted: use its variant with TLS in {APPRISE_FILE}"
            )
        if not service.verify_certificate or service.redirects:
            raise AlertError(
                f"{service.service_name}: verify=no and redirect=yes are not allowed in {APPRISE_FILE} "
                "(for a private CA, set SSL_CERT_FILE to its certificate)"
            )
        # The same authorities as for the other destinations; requests, which apprise uses, has its own.
        paths = ssl.get_default_verify_paths()
        service.verify_certificate = paths.cafile or paths.capath or True
        service.socket_connect_timeout = service.socket_read_timeout = TIMEOUT_S
        service.overflow_mode = apprise.OverflowMode.SPLIT  # chats refuse messages that are too long
        return service


class Unusable:
    """Stands for destinations that cannot be found out; says why."""

    def __init__(self, name: str, error: SettingsError) -> None:
        self.name, self._error = name, error

    def send(self, message: Message) -> None:
        raise self._error

    def check(self) -> str:
        raise self._error


@contextmanager
def _private_logs() -> Generator[StringIO]:
    """Collect apprise's warnings, and keep them and those of its HTTP client from all other logs: they name URLs."""
    import apprise

    http_log, own = logging.getLogger("urllib3"), logging.getLogger(apprise.logger.name)
    before = own.propagate, http_log.level
    own.propagate = False
    http_log.setLevel(logging.CRITICAL)
    try:
        with apprise.LogCapture(level=logging.WARNING) as log:
            yield log
    finally:
        own.propagate = before[0]
        http_log.setLevel(before[1])


def _is_encrypted(service: Any) -> bool:
    """True unless the service has an unencrypted variant, and its URL asks for that."""
    return service.protocol is None or service.secure


def _server_of(service: Any) -> tuple[str, int] | None:
    """Host and port of a service; None if they depend on the message or on the URL in another way.

    The host of a URL may be a token instead, which must not be looked up.
    """
    if "host" in service.template_tokens:
        return service.host, service.port or (443 if _is_encrypted(service) else 80)
    urls = (getattr(type(service), name, None) for name in ("notify_url", "webhook_url", "api_url"))
    host = next((urlsplit(url).hostname for url in urls if isinstance(url, str)), None)
    return (host, 443) if host and "{" not in host else None


def _connect(host: str, port: int, *, secure: bool) -> None:
    """Connect to a server and leave. Raises OSError."""
    with socket.create_connection((host, port), TIMEOUT_S) as connection:
        if secure:
            with ssl.create_default_context().wrap_socket(connection, server_hostname=host):
                pass


def _network_problem(error: Exception) -> str:
    """Describe a connection error without the URL that the error's text may contain."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"does not answer within {TIMEOUT_S} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "has a certificate that is not trusted (for a private CA, set SSL_CERT_FILE to its certificate)"
    if isinstance(cause, ssl.SSLError):
        return "failed the TLS handshake"
    if isinstance(cause, socket.gaierror):
        return "has a host name that does not resolve"
    if isinstance(cause, OSError) and cause.strerror:
        return f"cannot be reached ({cause.strerror})"
    return f"cannot be used ({type(cause).__name__})"
