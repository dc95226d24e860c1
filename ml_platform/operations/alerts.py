"""Alerts: what is said of failed runs, and the two ways to say it, e-mail and webhook.

A message goes to people outside, so it holds one line of each error and never a traceback; what is wrong with a
destination is said without its secrets.
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

#: Of one exchange with a server. A tick of a sensor has a minute.
TIMEOUT_S = 10

#: Lines of errors are cut here, and so many failed steps are named.
LONGEST_LINE = 500
STEPS_NAMED = 10

#: Dagster's words around the reason of a step that failed on purpose.
_FAILURE_PREFIX = "dagster._core.definitions.events.Failure: "

_PORTS = {"starttls": 587, "tls": 465, "none": 25}


class AlertError(Exception):
    """An alert cannot be delivered; the message says what to do and holds no secret."""


@dataclass(frozen=True)
class FailedRun:
    """A failed run as an alert shows it; `steps` are (step, first line of its error)."""

    run_id: str
    job: str
    partitions: str
    failed_at: str
    reason: str
    steps: list[tuple[str, str]]
    url: str | None


class Destination(Protocol):
    """Where alerts go."""

    name: str

    def send(self, runs: Sequence[FailedRun]) -> None:
        """Deliver one message about `runs`. Raises AlertError or SettingsError."""

    def check(self) -> str:
        """Go as far as possible without sending anything, and say what was found. Raises as `send` does."""


def one_line(text: str) -> str:
    """The first line of `text` with something on it, without control characters, cut where it gets long."""
    lines = ("".join(char if char.isprintable() else " " for char in line).strip() for line in text.splitlines())
    line = next(filter(None, lines), "")
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"


def describe_failed_run(
    instance: dg.DagsterInstance, event: dg.EventLogEntry, run: dg.DagsterRun, ui_url: str | None
) -> FailedRun:
    """What Dagster knows of a failed run, given the event of its failure."""
    steps = []
    records = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE, limit=STEPS_NAMED)
    for record in records.records:
        if step := record.event_log_entry.dagster_event:
            steps.append((step.step_key or "?", _first_line(step.step_failure_data)))
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
    """First line of what the step's own code raised; Dagster wraps it."""
    error = failure.error
    if error is None:
        return "no error was recorded"
    while error.cause is not None:
        error = error.cause
    return one_line(error.message.removeprefix(_FAILURE_PREFIX)) or one_line(error.cls_name or "")


def headline(runs: Sequence[FailedRun]) -> str:
    """One line about all of `runs`."""
    if len(runs) == 1:
        return f"ml_platform: a run of {runs[0].job} failed ({runs[0].partitions})"
    return f"ml_platform: {len(runs)} runs failed"


def as_text(runs: Sequence[FailedRun]) -> str:
    """`runs` as plain text."""
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
    """The destinations that are configured; none where nothing is."""
    found: list[Destination] = []
    if settings.email_to:
        found.append(Email(settings))
    if settings.webhook_url or settings.webhook_url_file:
        found.append(Webhook(settings))
    return found


class Email:
    """One plain-text message to all recipients, by SMTP."""

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
            # Some recipients refused is no reason to send it to the others again and again.
            server.send_message(message)

    def check(self) -> str:
        with self._connection() as server:
            server.noop()
        login = "logged in" if self._settings.smtp_user else "no login"
        return f"{self._settings.smtp_host} answers ({self._settings.smtp_security}, {login}); nothing was sent"

    @contextmanager
    def _connection(self) -> Generator[smtplib.SMTP]:
        """A connection that is ready to take a message; errors are AlertErrors."""
        settings = self._settings
        security, host = settings.smtp_security, str(settings.smtp_host)
        port = settings.smtp_port or _PORTS[security]
        where = f"the SMTP server {host}:{port}"
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
            # Not what the server says: it may repeat what it was told.
            raise AlertError(
                f"{where} refuses the login ({error.smtp_code}): check ML_PLATFORM_ALERT_SMTP_USER and "
                "ML_PLATFORM_ALERT_SMTP_PASSWORD"
            ) from None
        except smtplib.SMTPNotSupportedError:
            raise AlertError(
                f"{where} does not offer {'STARTTLS' if security == 'starttls' else 'what is needed'}: check "
                "ML_PLATFORM_ALERT_SMTP_SECURITY and ML_PLATFORM_ALERT_SMTP_USER"
            ) from None
        except smtplib.SMTPRecipientsRefused as error:
            refused = "; ".join(f"{to}: {code} {_reply(text)}" for to, (code, text) in error.recipients.items())
            raise AlertError(f"{where} refuses all recipients (ML_PLATFORM_ALERT_EMAIL_TO): {refused}") from None
        except smtplib.SMTPResponseException as error:
            raise AlertError(f"{where} answers {error.smtp_code} {_reply(error.smtp_error)}") from None
        except smtplib.SMTPServerDisconnected:
            raise AlertError(f"{where} ends the connection, or does not answer within {TIMEOUT_S} s") from None
        except (smtplib.SMTPException, OSError) as error:
            raise AlertError(
                f"{where} {_network_problem(error)}: check ML_PLATFORM_ALERT_SMTP_HOST, _PORT and _SECURITY"
            ) from None


def _reply(text: str | bytes) -> str:
    """What an SMTP server says, on one line."""
    return one_line(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, without its content, perhaps unencrypted."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhook:
    """One POST of JSON: ``text`` (which Slack, Mattermost and others show) and ``runs``, the same as data."""

    name = "webhook"

    def __init__(self, settings: AlertSettings) -> None:
        self._settings = settings

    def send(self, runs: Sequence[FailedRun]) -> None:
        url = str(self._settings.read_webhook_url())
        body = {"text": chat(as_text(runs)), "runs": [{**asdict(run), "steps": dict(run.steps)} for run in runs]}
        try:
            request = urllib.request.Request(
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
            # Not the error's text: it may quote the address, which is a secret.
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
    """What is wrong with a connection, without the address that a library may have put into the error."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"does not answer within {TIMEOUT_S} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "has a certificate that is not trusted (for a private authority, set SSL_CERT_FILE to its certificate)"
    if isinstance(cause, ssl.SSLError):
        return "does not speak TLS as expected"
    if isinstance(cause, socket.gaierror):
        return "has a host name that does not resolve"
    if isinstance(cause, OSError) and cause.strerror:
        return f"cannot be reached ({cause.strerror})"
    return f"cannot be used ({type(cause).__name__})"


#: Failed runs in one message; the next tick reports the next.
RUNS_PER_ALERT = 25


@dataclass(frozen=True)
class Delivery:
    """What became of the alerts of one tick: what was sent, what failed, and how far each destination has come."""

    done: list[str]
    failures: list[str]
    cursor: str


def deliver_alerts(
    instance: dg.DagsterInstance, destinations: Sequence[Destination], cursor: str | None, ui_url: str | None
) -> Delivery:
    """Report the runs that failed since the `cursor` to each destination.

    Dagster's own run failure sensors count a run as reported even if the report raised. This keeps, per destination,
    how far the reports were delivered, and goes on from there at the next tick.

    Raises AlertError: something failed, and nothing new is to be kept.
    """
    delivered = _delivered(cursor)
    newest = _newest_failure(instance)
    done, failures = [], []
    for destination in destinations:
        name = destination.name
        # A new destination starts with what fails from now on. Ids start anew where all runs were deleted.
        delivered[name] = min(delivered.get(name, newest), newest)
        try:
            runs, last = _failed_runs(instance, delivered[name], ui_url)
            if runs:
                destination.send(runs)
                done.append(f"{name}: {len(runs)} failed runs reported")
            delivered[name] = last
        except Exception as error:
            # Of any kind: the failure of one destination must not repeat the messages of the other.
            known = isinstance(error, (AlertError, SettingsError))
            failures.append(f"{name}: {error}" if known else f"{name}: {type(error).__name__}")
    new_cursor = json.dumps(delivered, sort_keys=True)
    if failures and new_cursor == cursor:
        raise AlertError(f"{'; '.join(failures)}. The next tick tries again.")
    return Delivery(done, failures, new_cursor)


def _delivered(cursor: str | None) -> dict[str, int]:
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return {name: last for name, last in found.items() if type(last) is int} if isinstance(found, dict) else {}


def _newest_failure(instance: dg.DagsterInstance) -> int:
    records = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    return records[0].storage_id if records else 0


def _failed_runs(instance: dg.DagsterInstance, after: int, ui_url: str | None) -> tuple[list[FailedRun], int]:
    """The next failed runs after an event, and the last event that was looked at. A deleted run is left out."""
    newer = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_storage_id=after)
    records = instance.fetch_run_status_changes(newer, limit=RUNS_PER_ALERT, ascending=True).records
    found = []
    for record in records:
        event = record.event_log_entry
        if run := instance.get_run_by_id(event.run_id):
            found.append(describe_failed_run(instance, event, run, ui_url))
    return found, records[-1].storage_id if records else after
