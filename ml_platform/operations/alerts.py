"""Alerts about failed runs, by e-mail and webhook.

Messages may be read by outsiders, so they contain one line of each error and never a traceback. Errors of a destination
do not contain its secrets.
"""

from __future__ import annotations

import http.client
import json
import smtplib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any, Protocol
from urllib.parse import urlsplit

import dagster as dg

from ml_platform.escaping import chat
from ml_platform.lake.partitions import PARTITION_TAG, RANGE_END_TAG, RANGE_START_TAG
from ml_platform.settings import AlertSettings, SettingsError

#: Timeout of one exchange with a server; a sensor tick must finish within a minute.
TIMEOUT_S = 10

#: Maximum length of an error line, and maximum number of failed steps in an alert.
MAX_LINE_LENGTH = 500
MAX_STEPS = 10

#: Dagster's prefix of the message of a dagster.Failure.
_FAILURE_PREFIX = "dagster._core.definitions.events.Failure: "

_PORTS = {"starttls": 587, "tls": 465, "none": 25}


class AlertError(Exception):
    """An alert cannot be delivered; the message says what to do and contains no secrets."""


@dataclass(frozen=True)
class FailedRun:
    """A failed run as shown in an alert; `steps` are (step, first line of its error)."""

    run_id: str
    job: str
    partitions: str
    failed_at: str
    reason: str
    steps: list[tuple[str, str]]
    url: str | None


class Destination(Protocol):
    """A destination of alerts."""

    name: str

    def send(self, runs: Sequence[FailedRun]) -> None:
        """Deliver one message about `runs`. Raises AlertError or SettingsError."""

    def check(self) -> str:
        """Test the connection without sending anything, and describe the result. Raises as `send` does."""


def one_line(text: str) -> str:
    """First non-blank line of `text`, without control characters, truncated to `MAX_LINE_LENGTH`."""
    lines = ("".join(char if char.isprintable() else " " for char in line).strip() for line in text.splitlines())
    line = next(filter(None, lines), "")
    return line if len(line) <= MAX_LINE_LENGTH else line[: MAX_LINE_LENGTH - 1] + "…"


def failed_steps(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, str]]:
    """The failed steps of a run, at most MAX_STEPS, each with the first line of its error."""
    steps = []
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_FAILURE, limit=MAX_STEPS)
    for record in records.records:
        if step := record.event_log_entry.dagster_event:
            steps.append((step.step_key or "?", _first_line(step.step_failure_data)))
    return steps


def describe_failed_run(
    instance: dg.DagsterInstance, event: dg.EventLogEntry, run: dg.DagsterRun, ui_url: str | None
) -> FailedRun:
    """Collect the details of a failed run from Dagster, given its failure event."""
    steps = failed_steps(instance, run.run_id)
    start, end = run.tags.get(RANGE_START_TAG), run.tags.get(RANGE_END_TAG)
    partitions = run.tags.get(PARTITION_TAG) or (f"{start} to {end}" if start and start != end else start or "none")
    return FailedRun(
        run_id=run.run_id,
        job=run.job_name,
        partitions=one_line(partitions),
        failed_at=datetime.fromtimestamp(event.timestamp, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        reason=one_line((event.dagster_event and event.dagster_event.message) or ""),
        steps=steps,
        url=f"{ui_url.rstrip('/')}/runs/{run.run_id}" if ui_url else None,
    )


def _first_line(failure: Any) -> str:
    """First line of the step's original error, which Dagster wraps."""
    error = failure.error
    if error is None:
        return "no error recorded"
    while error.cause is not None:
        error = error.cause
    return one_line(error.message.removeprefix(_FAILURE_PREFIX)) or one_line(error.cls_name or "")


def headline(runs: Sequence[FailedRun]) -> str:
    """One-line summary of `runs`."""
    if len(runs) == 1:
        return f"ml_platform: a run of {runs[0].job} failed ({runs[0].partitions})"
    return f"ml_platform: {len(runs)} runs failed"


def as_text(runs: Sequence[FailedRun]) -> str:
    """Format `runs` as plain text."""
    blocks = []
    for run in runs:
        lines = [
            f"run:        {run.run_id}",
            f"job:        {run.job}",
            f"partitions: {run.partitions}",
            f"failed at:  {run.failed_at}",
            f"reason:     {run.reason}",
            *(f"step {step}: {error}" for step, error in run.steps),
        ]
        blocks.append("\n".join([*lines, run.url] if run.url else lines))
    return "\n\n".join([headline(runs), *blocks]) + "\n"


def build_destinations(settings: AlertSettings) -> list[Destination]:
    """Create the configured destinations; empty if alerts are off."""
    destinations: list[Destination] = []
    if settings.email_to:
        destinations.append(Email(settings))
    if settings.webhook_url or settings.webhook_url_file:
        destinations.append(Webhook(settings))
    return destinations


class Email:
    """Sends one plain-text message to all recipients by SMTP."""

    name = "email"

    def __init__(self, settings: AlertSettings) -> None:
        self._settings = settings

    def send(self, runs: Sequence[FailedRun]) -> None:
        settings = self._settings
        message = EmailMessage()
        message["From"] = settings.email_from
        message["To"] = ", ".join(settings.email_to)
        message["Subject"] = one_line(headline(runs))
        message["Date"] = formatdate()
        message["Message-ID"] = make_msgid(domain=str(settings.email_from).rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office replies
        message.set_content(as_text(runs))
        with self._connection() as server:
            # Ignore refused recipients if others accept: a retry would send to the others again.
            server.send_message(message)

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
    """Sends one POST of JSON: ``text`` (shown by Slack, Mattermost and others) and ``runs`` (structured data)."""

    name = "webhook"

    def __init__(self, settings: AlertSettings) -> None:
        self._settings = settings

    def send(self, runs: Sequence[FailedRun]) -> None:
        url = str(self._settings.read_webhook_url())
        body = {"text": chat(as_text(runs)), "runs": [{**asdict(run), "steps": dict(run.steps)} for run in runs]}
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
        host, secure = str(parts.hostname), parts.scheme == "https"
        try:
            with socket.create_connection((host, parts.port or (443 if secure else 80)), TIMEOUT_S) as connection:
                if secure:
                    with ssl.create_default_context().wrap_socket(connection, server_hostname=host):
                        pass
        except OSError as error:
            raise AlertError(f"the webhook {_network_problem(error)}: check ML_PLATFORM_ALERT_WEBHOOK_URL") from None
        return "configured, its server answers; nothing was sent"


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


#: Maximum failed runs per message; the next tick reports the rest.
RUNS_PER_ALERT = 25


@dataclass(frozen=True)
class Delivery:
    """Result of the alerts of one tick: sent messages, failures, and the cursor with each destination's position."""

    done: list[str]
    failures: list[str]
    cursor: str


def deliver_alerts(
    instance: dg.DagsterInstance, destinations: Sequence[Destination], cursor: str | None, ui_url: str | None
) -> Delivery:
    """Report the runs that failed since the `cursor` to each destination.

    Dagster's run failure sensors consider a run reported even if the report raised. This function keeps a position per
    destination, and the next tick continues from there.

    Raises AlertError if a delivery failed and the cursor has not changed.
    """
    positions = _parse_cursor(cursor)
    newest = _newest_failure(instance)
    done, failures = [], []
    for destination in destinations:
        name = destination.name
        # A new destination starts with future failures. Event ids restart if all runs were deleted.
        positions[name] = min(positions.get(name, newest), newest)
        try:
            runs, last = _failed_runs(instance, positions[name], ui_url)
            if runs:
                destination.send(runs)
                done.append(f"{name}: {len(runs)} failed runs reported")
            positions[name] = last
        except Exception as error:
            # Catch everything: one destination's failure must not repeat the other's messages.
            is_safe = isinstance(error, (AlertError, SettingsError))  # other messages may contain secrets
            failures.append(f"{name}: {error}" if is_safe else f"{name}: {type(error).__name__}")
    new_cursor = json.dumps(positions, sort_keys=True)
    if failures and new_cursor == cursor:
        raise AlertError(f"{'; '.join(failures)}. The next tick will try again.")
    return Delivery(done, failures, new_cursor)


def _parse_cursor(cursor: str | None) -> dict[str, int]:
    try:
        positions = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return {name: last for name, last in positions.items() if type(last) is int} if isinstance(positions, dict) else {}


def _newest_failure(instance: dg.DagsterInstance) -> int:
    records = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    return records[0].storage_id if records else 0


def _failed_runs(instance: dg.DagsterInstance, after: int, ui_url: str | None) -> tuple[list[FailedRun], int]:
    """Next failed runs after an event, and the id of the last event read. Deleted runs are skipped."""
    newer = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_storage_id=after)
    records = instance.fetch_run_status_changes(newer, limit=RUNS_PER_ALERT, ascending=True).records
    runs = []
    for record in records:
        event = record.event_log_entry
        if run := instance.get_run_by_id(event.run_id):
            runs.append(describe_failed_run(instance, event, run, ui_url))
    return runs, records[-1].storage_id if records else after
