"""Alerts: real SMTP and HTTP servers on this machine, real events of Dagster, and the failures of both."""

from __future__ import annotations

import email
import email.policy
import json
import logging
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult
from dagster._core.definitions.freshness import FreshnessState, FreshnessStateChange
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    TickData,
    TickStatus,
)
from dagster._utils.error import serializable_error_info_from_exc_info

from ml_platform.assets.outcomes import check_partitions
from ml_platform.dev.cloud.credentials import issue_certificates
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import CHECK_NAMES
from ml_platform.operations import changes, destinations, messages
from ml_platform.operations.changes import UNDELETED_CLUSTER_TAG, UndeletedClusters, champion_changed
from ml_platform.operations.destinations import AlertError, build_destinations
from ml_platform.operations.messages import Change, FailedRun, Message, one_line
from ml_platform.sensors import FILE_CHECKS, build_report_failed_runs
from ml_platform.settings import AlertSettings, SettingsError, load_alert_settings
from ml_platform_tests.postgres import PostgresServer

PASSWORD = "pass-word-5f2c"
SECRET_PATH = "/services/T00/very-secret-hook"
RUN = FailedRun("1234", "process_new_files", "a to b", "2026-01-01 00:00:00 UTC", "it died", [("clean", "boom")], None)
CHANGE = Change("checks", "bad", "check health of model failed", ["why"], "2026-01-01 00:00:00 UTC")
MESSAGE = Message([RUN])


@pytest.fixture
def instance(tmp_path: Path, fast_sqlite: None, request: pytest.FixtureRequest) -> Iterator[dg.DagsterInstance]:
    """Dagster's storage: SQLite, where each run has its own event log, or PostgreSQL. One in memory knows no ticks."""
    overrides: dict[str, Any] = {"telemetry": {"enabled": False}}
    (tmp_path / "home").mkdir()
    with ExitStack() as stack:
        if getattr(request, "param", "sqlite") == "postgres":
            server = stack.enter_context(PostgresServer())
            url = f"postgresql+psycopg2://postgres:{server.password}@127.0.0.1:{server.port}/postgres"
            overrides["storage"] = {"postgres": {"postgres_url": url}}
        yield stack.enter_context(dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides=overrides))


def settings(**values: Any) -> AlertSettings:
    """Alert settings as the variables would make them."""
    for name, value in values.items():
        os.environ[f"ML_PLATFORM_ALERT_{name.upper()}"] = str(value)
    return load_alert_settings()


class Mailbox:
    """An SMTP server's handler that keeps what it takes."""

    def __init__(self) -> None:
        self.letters: list[tuple[list[str], EmailMessage]] = []
        self.refuse_data = ""
        self.refused_recipients: set[str] = set()

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address in self.refused_recipients:
            return "550 no such\x07 mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if self.refuse_data:
            return self.refuse_data
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        self.letters.append((envelope.rcpt_tos, message))
        return "250 OK"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return issue_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def trusted(certificates: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context whose certificate the clients of this process trust."""
    authority, certificate, key = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


@contextmanager
def smtp_server(mailbox: Mailbox, context: ssl.SSLContext | None = None, *, implicit: bool = False, **options: Any):
    """Yields the port of a server, with STARTTLS if it has a context, unless TLS is implicit."""
    if implicit:
        controller = Controller(mailbox, hostname="127.0.0.1", port=0, ssl_context=context, **options)
    else:
        controller = Controller(mailbox, hostname="127.0.0.1", port=0, tls_context=context, **options)

    def connect_once() -> None:
        with socket.create_connection(controller.server.sockets[0].getsockname(), 5):  # type: ignore[union-attr]
            pass

    # Its own proof that it is up knows neither port 0 nor a server's context.
    controller._trigger_server = connect_once  # type: ignore[method-assign]
    controller.start()
    try:
        yield controller.server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    finally:
        controller.stop()


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


def email_settings(port: int, **values: Any) -> AlertSettings:
    return settings(
        **{
            "email_to": "ops@example.com,boss@example.com",
            "email_from": "ml@example.com",
            "smtp_host": "localhost",
            "smtp_port": port,
            "smtp_security": "none",
            **values,
        }
    )


def checks_password(server: SMTP, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    return AuthResult(success=(data.login, data.password) == (b"me", PASSWORD.encode()), handled=False)


class Hook(ThreadingHTTPServer):
    """A web server that keeps what is posted and answers with `status`."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.posts: list[tuple[str, Any, bytes]] = []
        self.status, self.location = 200, ""
        self.stuck = threading.Event()
        self.stuck.set()
        super().__init__(("127.0.0.1", 0), HookHandler)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"http{'s' if context else ''}://localhost:{self.server_port}{SECRET_PATH}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class HookHandler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.stuck.wait(20)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, self.headers, body))
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.posts.append((self.path, self.headers, b"GET"))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(hook: Hook) -> Iterator[Hook]:
    thread = threading.Thread(target=hook.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hook
    finally:
        hook.stuck.set()
        hook.shutdown()
        hook.server_close()
        thread.join()


@pytest.fixture
def hook() -> Iterator[Hook]:
    with serving(Hook()) as hook:
        yield hook


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destinations, "TIMEOUT_S", 0.3)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class TestEmail:
    def test_a_letter_arrives(self, mailbox: Mailbox):
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(email_settings(port))
            destination.send(MESSAGE)
        ((recipients, letter),) = mailbox.letters
        assert recipients == ["ops@example.com", "boss@example.com"]
        assert (letter["From"], letter["To"]) == ("ml@example.com", "ops@example.com, boss@example.com")
        assert letter["Subject"] == "ml_platform: a run of process_new_files failed (a to b)"
        assert letter["Auto-Submitted"] == "auto-generated"
        assert letter["Message-ID"].endswith("@example.com>")
        assert letter.get_content_type() == "text/plain"
        text = letter.get_content()
        for part in ("1234", "a to b", "2026-01-01", "it died", "step clean: boom"):
            assert part in text

    @pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
    @pytest.mark.parametrize("implicit", [False, True])
    def test_encrypted_and_logged_in(self, mailbox: Mailbox, trusted: ssl.SSLContext, implicit: bool):
        # aiosmtpd takes implicit TLS for none.
        options = {"authenticator": checks_password, "auth_required": True, "auth_require_tls": not implicit}
        with smtp_server(mailbox, trusted, implicit=implicit, **options) as port:
            (destination,) = build_destinations(
                email_settings(
                    port, smtp_security="tls" if implicit else "starttls", smtp_user="me", smtp_password=PASSWORD
                )
            )
            assert destination.check().endswith("logged in); nothing was sent")
            assert mailbox.letters == []
            destination.send(MESSAGE)
        assert len(mailbox.letters) == 1

    @pytest.mark.parametrize("password", [f"{PASSWORD}x", "naïve-5f2c"])
    def test_a_wrong_password_is_named_but_not_shown(self, mailbox: Mailbox, trusted: ssl.SSLContext, password: str):
        with smtp_server(mailbox, trusted, authenticator=checks_password, auth_required=True) as port:
            (destination,) = build_destinations(
                email_settings(port, smtp_security="starttls", smtp_user="me", smtp_password=password)
            )
            for act in (lambda: destination.send(MESSAGE), destination.check):
                with pytest.raises(AlertError, match=r"SMTP user and password|refuses the login") as caught:
                    act()
                assert password not in str(caught.value)
        assert mailbox.letters == []

    @pytest.mark.parametrize("security", ["starttls", "tls"])
    def test_an_untrusted_certificate_is_refused(
        self, mailbox: Mailbox, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, security: str
    ):
        monkeypatch.delenv("SSL_CERT_FILE")
        with smtp_server(mailbox, trusted, implicit=security == "tls") as port:
            (destination,) = build_destinations(email_settings(port, smtp_security=security))
            with pytest.raises(AlertError, match=r"certificate that is not trusted .*SSL_CERT_FILE"):
                destination.send(MESSAGE)
        assert mailbox.letters == []

    def test_a_server_without_starttls_gets_nothing(self, mailbox: Mailbox):
        """An attacker in between may hide the offer."""
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(
                email_settings(port, smtp_security="starttls", smtp_user="me", smtp_password=PASSWORD)
            )
            with pytest.raises(AlertError, match="does not offer STARTTLS"):
                destination.send(MESSAGE)
        assert mailbox.letters == []

    def test_an_unreachable_server_is_named(self):
        (destination,) = build_destinations(email_settings(closed_port()))
        for act in (lambda: destination.send(MESSAGE), destination.check):
            with pytest.raises(AlertError, match=r"cannot be reached \(Connection refused\)"):
                act()

    def test_a_silent_server_is_named(self, silent_port: int, short_timeout: None):
        (destination,) = build_destinations(email_settings(silent_port))
        with pytest.raises(AlertError, match=r"does not answer within 0.3 s"):
            destination.send(MESSAGE)

    def test_refused_letters_and_recipients_are_named(self, mailbox: Mailbox):
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(email_settings(port))
            mailbox.refuse_data = "554 looks like\x1b spam"
            with pytest.raises(AlertError, match="answers 554 looks like  spam"):
                destination.send(MESSAGE)
            mailbox.refuse_data = ""
            mailbox.refused_recipients = {"ops@example.com", "boss@example.com"}
            with pytest.raises(AlertError, match=r"refuses all recipients .*boss@example.com: 550 no such  mailbox"):
                destination.send(MESSAGE)
            # One of two is delivered, and not sent to the other again and again.
            mailbox.refused_recipients = {"ops@example.com"}
            destination.send(MESSAGE)
        assert [recipients for recipients, _ in mailbox.letters] == [["boss@example.com"]]

    def test_texts_of_errors_add_no_header(self, mailbox: Mailbox):
        bad = "x\r\nBcc: thief@example.com\r\n\r\n<script>\x00\x1b[31m"
        run = FailedRun("1", bad, bad, "now", bad, [(bad, bad)], None)
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(email_settings(port))
            destination.send(Message([run]))
        ((recipients, letter),) = mailbox.letters
        assert recipients == ["ops@example.com", "boss@example.com"]
        assert letter["Bcc"] is None
        assert "\n" not in letter["Subject"]
        assert letter.get_content_type() == "text/plain"


class TestWebhook:
    def test_a_post_arrives(self, hook: Hook):
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        destination.send(Message([RUN, RUN], [CHANGE]))
        ((path, headers, body),) = hook.posts
        assert (path, headers["Content-Type"]) == (SECRET_PATH, "application/json")
        content = json.loads(body)
        assert content["text"] == str(Message([RUN, RUN], [CHANGE]))
        assert content["text"].startswith("ml_platform: 2 runs failed, 1 other change\n")
        assert content["changes"][0]["title"] == "check health of model failed"
        assert content["runs"][0]["run_id"] == "1234"
        assert content["runs"][0]["steps"] == {"clean": "boom"}

    def test_https_needs_a_trusted_certificate(self, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
        with serving(Hook(trusted)) as hook:
            (destination,) = build_destinations(settings(webhook_url=hook.url))
            destination.check()
            assert hook.posts == []
            destination.send(MESSAGE)
            assert len(hook.posts) == 1
            monkeypatch.delenv("SSL_CERT_FILE")
            for act in (lambda: destination.send(MESSAGE), destination.check):
                with pytest.raises(AlertError, match="certificate that is not trusted"):
                    act()
        assert len(hook.posts) == 1

    @pytest.mark.parametrize("status", [400, 404, 500])
    def test_an_error_status_is_named(self, hook: Hook, status: int):
        hook.status = status
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        with pytest.raises(AlertError, match=f"the webhook answers {status}: check ML_PLATFORM_ALERT_WEBHOOK_URL"):
            destination.send(MESSAGE)

    def test_a_redirection_is_not_followed(self, hook: Hook):
        hook.status, hook.location = 302, "/elsewhere"
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        with pytest.raises(AlertError, match="answers 302"):
            destination.send(MESSAGE)
        assert [path for path, *_ in hook.posts] == [SECRET_PATH]

    def test_unreachable_and_silent_servers_are_named(self, hook: Hook, short_timeout: None):
        url = f"http://localhost:{closed_port()}{SECRET_PATH}"
        (destination,) = build_destinations(settings(webhook_url=url))
        for act in (lambda: destination.send(MESSAGE), destination.check):
            with pytest.raises(AlertError, match="Connection refused") as caught:
                act()
            assert "very-secret" not in str(caught.value)
        hook.stuck.clear()
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        with pytest.raises(AlertError, match="does not answer within"):
            destination.send(MESSAGE)

    def test_the_address_is_in_no_traceback(self, tmp_path: Path):
        """Dagster stores the messages of the whole chain of errors."""
        from dagster_shared.error import SerializableErrorInfo

        (destination,) = build_destinations(settings(webhook_url=f"http://localhost:{closed_port()}{SECRET_PATH}"))
        with pytest.raises(AlertError) as caught:
            destination.send(MESSAGE)
        assert "very-secret" not in str(SerializableErrorInfo.from_traceback(_traceback(caught.value)))


class TestApprise:
    """Services that apprise knows, of which JSON over HTTP needs no account."""

    @pytest.fixture
    def chat(self, hook: Hook, tmp_path: Path) -> destinations.Destination:
        (chat,) = self.chats(tmp_path, hook.url.replace("http", "json"))
        return chat

    def chats(self, tmp_path: Path, *urls: str) -> list[destinations.Destination]:
        (tmp_path / "urls").write_text("\n".join(["# chats", "", *urls]))
        return build_destinations(settings(apprise_file=tmp_path / "urls"))

    def test_a_post_arrives(self, hook: Hook, chat: destinations.Destination):
        assert chat.check() == "JSON: its server answers; nothing was sent"
        assert hook.posts == []
        chat.send(Message([RUN], [CHANGE]))
        ((path, _, body),) = hook.posts
        assert path == SECRET_PATH
        content = json.loads(body)
        assert content["title"] == "ml_platform: 1 run failed, 1 other change"
        assert "step clean: boom" in content["message"]
        assert "check health of model failed\n  why" in content["message"]
        assert "apprise" not in body.decode().lower()

    @pytest.mark.parametrize("status", [302, 404, 500])
    def test_an_error_status_is_named_and_no_redirection_followed(
        self, hook: Hook, chat: destinations.Destination, status: int
    ):
        hook.status, hook.location = status, "/elsewhere"
        with pytest.raises(AlertError, match=f"JSON answers {status}: check its URL in the file of ML_PLATFORM_ALERT_"):
            chat.send(MESSAGE)
        assert [path for path, *_ in hook.posts] == [SECRET_PATH]

    def test_unreachable_and_silent_servers_are_named(
        self, hook: Hook, chat: destinations.Destination, tmp_path: Path, short_timeout: None
    ):
        hook.stuck.clear()
        with pytest.raises(AlertError, match="JSON did not take the message"):
            chat.send(MESSAGE)
        (closed,) = self.chats(tmp_path, f"json://localhost:{closed_port()}{SECRET_PATH}")
        for act in (lambda: closed.send(MESSAGE), closed.check):
            with pytest.raises(AlertError, match=r"JSON cannot be reached .Connection refused") as caught:
                act()
            assert "very-secret" not in str(caught.value)

    def test_tls_is_verified_by_the_same_authorities(
        self, trusted: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        with serving(Hook(trusted)) as hook:
            (chat,) = self.chats(tmp_path, hook.url.replace("https", "jsons"))
            chat.send(MESSAGE)
            monkeypatch.delenv("SSL_CERT_FILE")
            for act in (lambda: chat.send(MESSAGE), chat.check):
                with pytest.raises(AlertError, match="certificate that is not trusted"):
                    act()
            assert len(hook.posts) == 1

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("json://hooks.example/very-secret", "JSON would be sent unencrypted"),
            ("jsons://hooks.example/very-secret?verify=no", "JSON: verify=no and redirect=yes are not allowed"),
            ("jsons://hooks.example/very-secret?redirect=yes", "JSON: verify=no and redirect=yes are not allowed"),
            ("nonsense://very-secret", "apprise cannot use this URL .*apprise nonsense"),
            ("slack://very-secret", "apprise cannot use this URL"),
        ],
    )
    def test_urls_that_are_refused_are_not_shown(
        self, tmp_path: Path, url: str, says: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ):
        caplog.set_level(logging.DEBUG)
        (chat,) = self.chats(tmp_path, url)
        for act in (lambda: chat.send(MESSAGE), chat.check):
            with pytest.raises(AlertError, match=says) as caught:
                act()
            assert "very-secret" not in str(caught.value) + caplog.text + "".join(capfd.readouterr())

    def test_services_are_checked_by_their_own_servers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The host of such a URL is a token, which no name server must learn."""
        asked = []
        monkeypatch.setattr(destinations, "_connect", lambda host, port, secure: asked.append((host, port, secure)))
        found = self.chats(
            tmp_path,
            "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#alerts",
            "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FZ",
            "tgram://123456789:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA/1234",
            "mmosts://mattermost.example/3ccdd113474722377935511fc85d3dd4",
        )
        assert [chat.name for chat in found] == ["apprise slack", "apprise slack 2", "apprise tgram", "apprise mmosts"]
        assert [chat.check().split(":")[0] for chat in found] == ["Slack", "Slack", "Telegram", "Mattermost"]
        assert [host for host, *_ in asked] == [
            *("hooks.slack.com", "hooks.slack.com", "api.telegram.org", "mattermost.example")
        ]
        assert {(port, secure) for _, port, secure in asked} == {(443, True)}

    @pytest.mark.parametrize("content", [None, b"", b"# none\n", b"\xff\xfe", b"very-secret"])
    def test_unusable_files_are_named_and_stop_no_other_destination(
        self, tmp_path: Path, hook: Hook, content: bytes | None
    ):
        if content is not None:
            (tmp_path / "urls").write_bytes(content)
        webhook, unusable = build_destinations(settings(apprise_file=tmp_path / "urls", webhook_url=hook.url))
        assert webhook.name == "webhook"
        for act in (lambda: unusable.send(MESSAGE), unusable.check):
            with pytest.raises(SettingsError, match=r"^ML_PLATFORM_ALERT_APPRISE_FILE: ") as caught:
                act()
            assert "secret" not in str(caught.value)


def _traceback(error: BaseException) -> Any:
    import traceback

    return traceback.TracebackException.from_exception(error)


class TestSettings:
    def test_secrets_in_files(self, tmp_path: Path):
        url, password = tmp_path / "url", tmp_path / "password"
        url.write_text(f"https://localhost{SECRET_PATH}\n")
        password.write_text(f"{PASSWORD}\n")
        found = email_settings(
            1, smtp_security="tls", smtp_user="me", smtp_password_file=password, webhook_url_file=url
        )
        assert found.read_smtp_password() == PASSWORD
        assert found.read_webhook_url() == f"https://localhost{SECRET_PATH}"
        assert [destination.name for destination in build_destinations(found)] == ["email", "webhook"]

    def test_secrets_are_not_shown(self):
        found = email_settings(
            1,
            smtp_security="tls",
            smtp_user="me",
            smtp_password=PASSWORD,
            webhook_url=f"https://x.example{SECRET_PATH}",
        )
        shown = repr(found) + str(found) + repr(found.model_dump())
        assert PASSWORD not in shown
        assert "very-secret" not in shown

    @pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
    def test_unusable_files_are_named(self, tmp_path: Path, content: bytes | None):
        path = tmp_path / "url"
        if content is not None:
            path.write_bytes(content)
        (destination,) = build_destinations(settings(webhook_url_file=path))
        for act in (lambda: destination.send(MESSAGE), destination.check):
            with pytest.raises(SettingsError, match=r"^ML_PLATFORM_ALERT_WEBHOOK_URL_FILE: "):
                act()

    @pytest.mark.parametrize(
        "url",
        [
            "hooks.example/very-secret",
            "http://hooks.example/very-secret",
            "file:///etc/very-secret",
            "https:///very-secret",
            "https://x.example:port/very-secret",
            "https://x.example/very secret",
            "https://x.example/very-secret\x01",
        ],
    )
    @pytest.mark.parametrize("in_file", [False, True])
    def test_unusable_addresses_are_refused_but_not_shown(self, tmp_path: Path, url: str, in_file: bool):
        (tmp_path / "url").write_text(url)
        with pytest.raises(SettingsError, match=r"^ML_PLATFORM_ALERT_WEBHOOK_URL.*must be https://host/path") as caught:
            settings(webhook_url_file=tmp_path / "url").read_webhook_url() if in_file else settings(webhook_url=url)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"email_to": "ops@example.com"}, "EMAIL_TO, ML_PLATFORM_ALERT_EMAIL_FROM and ML_PLATFORM_ALERT_SMTP_HOST"),
            ({"smtp_host": "x"}, "need ML_PLATFORM_ALERT_EMAIL_TO"),
            ({"smtp_user": "me"}, "go together"),
            ({"smtp_password": PASSWORD}, "go together"),
            ({"smtp_password": PASSWORD, "smtp_password_file": "/x", "smtp_user": "me"}, "not both"),
            ({"webhook_url": "https://x.example/y", "webhook_url_file": "/x"}, "not both"),
            ({"smtp_password": PASSWORD, "smtp_user": "me", "smtp_security": "none"}, "SMTP_SECURITY=none"),
            ({"email_to": "ops@example.com\nBcc: x@example.com"}, "EMAIL_TO: must be addresses like"),
            ({"email_to": "Ops <ops@example.com>"}, "EMAIL_TO: must be addresses like"),
            ({"email_from": "nobody"}, "EMAIL_FROM: must be addresses like"),
            ({"smtp_port": 0}, "SMTP_PORT: "),
            ({"smtp_security": "ssl"}, "SMTP_SECURITY: "),
            ({"on": "runs, everything"}, "ALERT_ON: must be one or more of runs, checks, freshness, champion, ticks, "),
            ({"on": ","}, "ALERT_ON: must be one or more of runs"),
        ],
    )
    def test_missing_and_contradicting_settings_are_named(self, values: dict[str, Any], says: str):
        with pytest.raises(SettingsError) as caught:
            settings(**values)
        assert says in str(caught.value)
        assert PASSWORD not in str(caught.value)


def test_one_line():
    assert one_line("\n \r\n a\tb\x00c\u2028second\nthird") == "a b c"
    assert one_line("") == ""
    assert len(one_line("x" * 9999)) == messages.MAX_LINE_LENGTH


@dg.op
def breaks() -> None:
    raise ValueError("first line\r\nBcc: thief@example.com\npassword in a later line")


@dg.op
def gives_up() -> None:
    raise dg.Failure("1 of 2 partitions failed: a: no file", allow_retries=False)


@dg.job(executor_def=dg.in_process_executor)
def two_failures() -> None:
    breaks()
    gives_up()


@dg.job(executor_def=dg.in_process_executor)
def all_is_well() -> None:
    @dg.op
    def nothing() -> None:
        pass

    nothing()


def fail(instance: dg.DagsterInstance, **tags: str) -> str:
    """A run that failed."""
    run = two_failures.execute_in_process(instance=instance, raise_on_error=False, tags=tags)
    assert not run.success
    return run.run_id


class Ticks:
    """The sensor as the daemon runs it: the cursor of a tick that raised is not kept."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance, self.cursor, self.settings = instance, None, load_alert_settings()

    def __call__(self, found: AlertSettings | None = None) -> str:
        """One tick, with the settings of the tick before unless others are given."""
        self.settings = found or self.settings
        sensor = build_report_failed_runs(self.settings, "https://dagster.example/")
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor)
        result = sensor(context)
        self.cursor = context.cursor
        assert isinstance(result, dg.SkipReason)
        return str(result.skip_message)


class TestSensor:
    @pytest.fixture
    def tick(self, instance: dg.DagsterInstance) -> Ticks:
        return Ticks(instance)

    @pytest.fixture
    def ticked(self, hook: Hook, tick: Ticks) -> Ticks:
        """The sensor of a webhook after its first tick."""
        tick(settings(webhook_url=hook.url))
        return tick

    def test_a_failed_run_is_reported_once(self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance):
        found = settings(webhook_url=hook.url)
        fail(instance)
        assert tick(found) == "nothing to report"  # it failed before the first tick
        run_id = fail(instance, **{"dagster/partition": "2019-08-22"})
        all_is_well.execute_in_process(instance=instance)
        assert tick(found) == "webhook: 1 failed run reported"
        assert tick(found) == "nothing to report"
        ((_, _, body),) = hook.posts
        (run,) = json.loads(body)["runs"]
        assert run["run_id"] == run_id
        assert run["job"] == "two_failures"
        assert run["partitions"] == "2019-08-22"
        assert run["url"] == f"https://dagster.example/runs/{run_id}"
        assert run["steps"] == {
            "breaks": "ValueError: first line",
            "gives_up": "1 of 2 partitions failed: a: no file",
        }
        assert "thief" not in body.decode()
        assert "Traceback" not in body.decode()
        assert "password" not in body.decode()

    def test_ranges_and_runs_without_steps(self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance):
        tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
        run = instance.create_run_for_job(two_failures, tags=tags)
        instance.report_run_failed(run, "its process died\nBcc: thief@example.com")
        ticked()
        (shown,) = json.loads(hook.posts[0][2])["runs"]
        assert "thief" not in hook.posts[0][2].decode()
        assert (shown["partitions"], shown["reason"], shown["steps"]) == ("a to c", "its process died", {})

    def test_a_hostile_partition_tag_is_reported_as_one_line(
        self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance
    ):
        """Users who can start runs can tag them."""
        fail(instance, **{"dagster/partition": "a\x1b[31m\nrun: forged"})
        ticked()
        (shown,) = json.loads(hook.posts[0][2])["runs"]
        assert shown["partitions"] == "a [31m"

    def test_nothing_in_a_chat_is_a_link_or_calls_everybody(
        self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance
    ):
        fail(instance, **{"dagster/partition": "<!channel> @all ![x](https://evil.example/p.png)"})
        ticked()
        body = json.loads(hook.posts[0][2])
        assert not re.search(r"[<>@]|\]\(", body["text"])
        assert body["runs"][0]["partitions"].startswith("<!channel>")

    def test_runs_are_reported_once_the_destination_is_up_again(
        self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance
    ):
        hook.status = 503
        first = fail(instance)
        for _ in range(2):
            with pytest.raises(AlertError, match=r"webhook: the webhook answers 503.*The next tick will try again"):
                ticked()
        second = fail(instance)
        hook.status, hook.posts = 200, []
        assert ticked() == "webhook: 2 failed runs reported"
        assert [run["run_id"] for run in json.loads(hook.posts[0][2])["runs"]] == [first, second]

    def test_a_destination_that_is_down_does_not_stop_the_other(
        self, mailbox: Mailbox, hook: Hook, tick: Ticks, instance: dg.DagsterInstance
    ):
        """Nothing is sent twice; the error is the reason of the first tick, and fails the next ones."""
        with smtp_server(mailbox) as port:
            found = email_settings(port, webhook_url=hook.url)
            tick(found)
            hook.status = 503
            fail(instance)
            assert tick(found).startswith("email: 1 failed run reported; webhook: the webhook answers 503")
            for _ in range(2):
                with pytest.raises(AlertError):
                    tick(found)
            assert len(mailbox.letters) == 1
            hook.status, hook.posts = 200, []
            assert tick(found) == "webhook: 1 failed run reported"
            assert (len(mailbox.letters), len(hook.posts)) == (1, 1)

    def test_an_unexpected_error_of_one_destination_does_not_stop_the_other(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        found = email_settings(closed_port(), webhook_url=hook.url)
        tick(found)
        fail(instance)

        def surprise(*_: object) -> None:
            raise KeyError(PASSWORD)

        monkeypatch.setattr(destinations.Email, "send", surprise)
        assert tick(found) == "webhook: 1 failed run reported; email: KeyError"
        with pytest.raises(AlertError) as caught:
            tick(found)
        assert PASSWORD not in str(caught.value)
        assert len(hook.posts) == 1

    def test_many_runs_are_reported_in_portions(
        self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(messages, "MAX_ENTRIES", 2)
        ids = [fail(instance) for _ in range(3)]
        assert ticked() == "webhook: 2 failed runs reported"
        assert ticked() == "webhook: 1 failed run reported"
        assert [run["run_id"] for *_, body in hook.posts for run in json.loads(body)["runs"]] == ids

    def test_a_deleted_run_is_left_out(self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance):
        instance.delete_run(fail(instance))
        kept = fail(instance)
        ticked()
        assert [run["run_id"] for *_, body in hook.posts for run in json.loads(body)["runs"]] == [kept]

    @pytest.mark.parametrize("cursor", ["", "{", "[1]", '{"webhook": "x"}', '{"webhook": 99999}', "null"])
    def test_an_unreadable_cursor_is_replaced(self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance, cursor: str):
        found = settings(webhook_url=hook.url)
        tick.cursor = cursor
        tick(found)
        fail(instance)
        assert tick(found) == "webhook: 1 failed run reported"

    def test_a_tick_without_destinations_says_what_to_set(self, tick: Ticks, instance: dg.DagsterInstance):
        fail(instance)
        assert "no destination: set ML_PLATFORM_ALERT_EMAIL_TO" in tick(load_alert_settings())

    def test_the_sensor_runs_only_with_a_destination(self, hook: Hook):
        stopped, running = dg.DefaultSensorStatus.STOPPED, dg.DefaultSensorStatus.RUNNING
        assert build_report_failed_runs(load_alert_settings(), None).default_status == stopped
        sensor = build_report_failed_runs(settings(webhook_url=hook.url), None)
        assert (sensor.name, sensor.default_status, sensor.has_jobs) == ("report_failed_runs", running, False)

    def test_secrets_are_in_no_log(
        self,
        mailbox: Mailbox,
        hook: Hook,
        tick: Ticks,
        trusted: ssl.SSLContext,
        instance: dg.DagsterInstance,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ):
        caplog.set_level(logging.DEBUG)
        (tmp_path / "urls").write_text(hook.url.replace("http", "json"))
        with smtp_server(mailbox, trusted, authenticator=checks_password, auth_required=True) as port:
            found = email_settings(
                port,
                smtp_security="starttls",
                smtp_user="me",
                smtp_password=PASSWORD,
                webhook_url=hook.url,
                apprise_file=tmp_path / "urls",
            )
            tick(found)
            fail(instance)
            hook.status = 500
            tick(found)
            with pytest.raises(AlertError) as caught:
                tick(found)
        output = capfd.readouterr()
        own = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("mail"))
        for text in (output.out, output.err, own, str(caught.value), str(tick.cursor)):
            assert PASSWORD not in text
            assert "very-secret" not in text
        assert len(mailbox.letters) == 1


KEYS = ("a", "b", "c")


class Verdicts:
    """What the checks below say: problems of the model, and of files by check."""

    model: str | None = None
    files: ClassVar[dict[str, dict[str, str]]] = {}
    warnings: ClassVar[dict[str, str]] = {}


@dg.asset(partitions_def=raw_files)
def cleaned_transactions() -> None:
    """Has the name of the asset whose checks have a state per file."""


@dg.multi_asset_check(
    name="intake_checks",
    specs=[
        dg.AssetCheckSpec(name, asset=cleaned_transactions, partitions_def=raw_files)
        for name in ("unique_ids", "time_range")
    ],
)
def intake_checks(context) -> Iterator[dg.AssetCheckResult]:
    for check in context.selected_asset_check_keys:
        problems, warnings = Verdicts.files.get(check.name, {}), Verdicts.warnings
        yield check_partitions(context, check, problems.get, warning_of=warnings.get)
    if any(Verdicts.files.values()):
        raise dg.Failure("files are left out", allow_retries=False)


@dg.asset(partitions_def=raw_files, check_specs=[dg.AssetCheckSpec("health", asset="model", partitions_def=raw_files)])
def model(context) -> dg.MaterializeResult:
    check = dg.AssetCheckKey(context.asset_key, "health")
    return dg.MaterializeResult(check_results=[check_partitions(context, check, lambda key: Verdicts.model)])


DEFS = dg.Definitions(
    assets=[cleaned_transactions, model],
    asset_checks=[intake_checks],
    jobs=[
        dg.define_asset_job("files", ["cleaned_transactions"], executor_def=dg.in_process_executor),
        dg.define_asset_job("models", ["model"], executor_def=dg.in_process_executor),
    ],
)


PASS, WARN, FAIL = FreshnessState.PASS, FreshnessState.WARN, FreshnessState.FAIL


def add_tick(instance: dg.DagsterInstance, sensor: str, error: Exception | None = None) -> None:
    """A tick of a sensor as the daemon stores it; an error of the sensor's function is wrapped in one of Dagster."""
    location = RegisteredCodeLocationOrigin("location")
    origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "repository"), sensor)
    state = InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING, None)
    if instance.get_instigator_state(origin.get_id(), state.selector_id) is None:
        instance.add_instigator_state(state)
    info = None
    if error is not None:
        try:
            raise RuntimeError("Error occurred during the execution of evaluation_fn") from error
        except RuntimeError:
            info = serializable_error_info_from_exc_info(sys.exc_info())
    status = TickStatus.FAILURE if error else TickStatus.SKIPPED
    instance.create_tick(
        TickData(
            origin.get_id(),
            sensor,
            InstigatorType.SENSOR,
            status,
            time.time(),
            selector_id=state.selector_id,
            error=info,
        )
    )


class TestChanges:
    """What is told of changes."""

    @pytest.fixture(autouse=True)
    def verdicts(self, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Verdicts, "model", None)
        monkeypatch.setattr(Verdicts, "files", {})
        monkeypatch.setattr(Verdicts, "warnings", {})
        instance.add_dynamic_partitions(str(raw_files.name), KEYS)

    @pytest.fixture
    def tick(self, hook: Hook, instance: dg.DagsterInstance) -> Ticks:
        tick = Ticks(instance)
        tick(settings(webhook_url=hook.url))
        return tick

    def run(self, instance: dg.DagsterInstance, job: str, first: str = "a", last: str = "") -> str:
        """A run over partitions, of which one is a partition and several are a range."""
        tags = {"dagster/partition": first}
        if last:
            tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        return DEFS.resolve_job_def(job).execute_in_process(instance=instance, tags=tags, raise_on_error=False).run_id

    def told(self, hook: Hook, tick: Ticks) -> dict[str, list[str]]:
        """What the next message says, by title; empty if there is none."""
        hook.posts.clear()
        summary = tick()
        assert bool(hook.posts) == (summary != "nothing to report")
        return {change["title"]: change["lines"] for post in hook.posts for change in json.loads(post[2])["changes"]}

    def test_checks_that_stop_files_have_a_state_per_file(self):
        assets = {(key.asset_key.to_user_string(), key.name) for key in FILE_CHECKS}
        assert {name for asset, name in assets if asset == "cleaned_transactions"} == {*CHECK_NAMES}
        assert {name for asset, name in assets if asset != "cleaned_transactions"} == {"usable_features"}

    @pytest.mark.parametrize(("last", "times"), [("", 2), ("c", 4)], ids=["a partition", "a range"])
    def test_bad_evaluations_are_told_once_and_the_recovery_once(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance, last: str, times: int
    ):
        Verdicts.model = "live_quality fell to *0.5*"
        for number in range(times):
            self.run(instance, "models", "a", last)
            told = self.told(hook, tick)
            assert list(told) == (["check health of model failed"] if number == 0 else [])
            assert "live_quality fell to *0.5*" in str(told) or number > 0
        Verdicts.model = None
        for number in range(2):
            self.run(instance, "models", "a", last)
            assert self.told(hook, tick) == ({"check health of model passes again": []} if number == 0 else {})

    @pytest.mark.parametrize("last", ["", "c"], ids=["a partition", "a range"])
    def test_stopped_files_are_told_by_the_run_and_each_file_when_it_is_mended(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance, last: str
    ):
        Verdicts.files = {"unique_ids": {"a": "same ids as x", "b": "same ids as y"}, "time_range": {"a": "too late"}}
        for _ in range(2):  # each failed run is told; its checks are not
            run_id = self.run(instance, "files", "a", last)
            assert self.told(hook, tick) == {}
            body = json.loads(hook.posts[0][2])
            (run,) = body["runs"]
            assert (run["run_id"], run["steps"]) == (run_id, {"intake_checks": "files are left out"})
            stopped = {"a": "unique_ids: same ids as x; time_range: too late"}
            stopped |= {"b": "unique_ids: same ids as y"} if last else {}
            assert {key: sorted(text.split("; ")) for key, text in run["stopped"].items()} == {
                key: sorted(text.split("; ")) for key, text in stopped.items()
            }
            assert body["text"].startswith(
                f"ml_platform: checks stopped {'2 partitions' if last else '1 partition'} of"
            )
        Verdicts.files, Verdicts.warnings = {}, {"c": "ids overlap"}
        self.run(instance, "files", "a", last)
        told = self.told(hook, tick)
        mended = "2 partitions" if last else "a"
        assert (
            told.pop(f"check unique_ids of cleaned_transactions passes again for {mended}")
            == ["a", "b"][: 1 + bool(last)]
        )
        assert told.pop("check time_range of cleaned_transactions passes again for a") == ["a"]
        warned = {f"check {name} of cleaned_transactions has a warning for c" for name in ("unique_ids", "time_range")}
        assert set(told) == (warned if last else set())
        self.run(instance, "files", "a", last)
        assert self.told(hook, tick) == {}

    def test_a_run_that_fails_for_its_checks_is_told_by_these_where_runs_are_not_chosen(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance
    ):
        Verdicts.files = {"unique_ids": {"a": "same ids"}}
        tick(settings(webhook_url=hook.url, on="checks, ticks"))
        self.run(instance, "files")
        assert self.told(hook, tick) == {"check unique_ids of cleaned_transactions failed for a": ["a: same ids"]}
        assert json.loads(hook.posts[0][2])["runs"] == []

    @pytest.mark.parametrize("instance", ["sqlite", "postgres"], indirect=True)
    def test_nothing_is_lost_while_a_destination_is_down_and_processes_die(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance
    ):
        """All that is left of a killed process is the cursor of its last good tick."""
        hook.status = 503
        asset, changed = dg.AssetKey("model"), champion_changed
        for number in range(5):
            if number == 0:
                run_id = fail(instance)
                Verdicts.model = "bad"
                self.run(instance, "models")
            elif number == 1:
                Verdicts.model = None
                self.run(instance, "models")
            elif number == 2:
                for event in (
                    changed(
                        version="3", previous="2", who="eve\nx", why="<b>better</b>", figures={"test_roc_auc": "0.9"}
                    ),
                    FreshnessStateChange(key=asset, previous_state=PASS, new_state=FAIL, state_change_timestamp=9.0),
                ):
                    instance._report_runless_asset_event(event)
            elif number == 3:
                add_tick(instance, "new_raw_files", ValueError("no bucket\nsecond line"))
            else:
                add_tick(instance, "new_raw_files")
            with pytest.raises(AlertError, match="503"):
                tick()
            restarted = Ticks(instance)
            restarted.cursor, restarted.settings = tick.cursor, tick.settings
            tick = restarted
        hook.status = 200
        assert self.told(hook, tick) == {
            "check health of model failed": ["a: bad"],
            "check health of model passes again": [],
            "the champion is version 3 (before: version 2)": [
                *("by: eve\\nx", "why: <b>better</b>", "test_roc_auc: 0.9")
            ],
            "model is late (freshness FAIL)": [],
            "the sensor new_raw_files fails": ["ValueError: no bucket"],
            "the sensor new_raw_files works again": [],
        }
        body = json.loads(hook.posts[0][2])
        assert [run["run_id"] for run in body["runs"]] == [run_id]
        assert body["text"].startswith("ml_platform: 1 run failed, 6 other changes\n")
        assert "<" not in body["text"]
        assert self.told(hook, tick) == {}

    def test_freshness_is_told_when_it_changes(self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance):
        titles = []
        for state in (PASS, WARN, FAIL, PASS, FreshnessState.UNKNOWN, PASS):
            event = FreshnessStateChange(
                key=dg.AssetKey("model"), previous_state=PASS, new_state=state, state_change_timestamp=9.0
            )
            instance._report_runless_asset_event(event)
            titles += self.told(hook, tick)
        assert titles == ["model is late (freshness WARN)", "model is late (freshness FAIL)", "model is fresh again"]

    def test_sensors_are_told_at_the_first_failed_tick_and_when_they_work_again(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance
    ):
        told = []
        for error in (None, ValueError("x"), ValueError("y"), None, None):
            add_tick(instance, "dead_runs", error)
            add_tick(instance, "report_failed_runs", ValueError("a destination is down"))
            told.append(self.told(hook, tick))
        fails, works = {"the sensor dead_runs fails": ["ValueError: x"]}, {"the sensor dead_runs works again": []}
        assert told == [{}, fails, {}, works, {}]

    def test_each_cluster_that_cannot_be_deleted_is_told_once(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance
    ):
        """The run says it first, and then the sensor that tries again."""
        lines = ["not you", "it may cost money; see ml-platform clusters list"]

        def title(name: str) -> str:
            return f"cluster {name} cannot be deleted"

        all_is_well.execute_in_process(instance=instance, tags={UNDELETED_CLUSTER_TAG: "c (1): not you"})
        assert self.told(hook, tick) == {title("c (1)"): lines}
        told = []
        for problems in ({"c (1)": "not you"}, {"c (1)": "not you", "d (2)": "not you"}, {}, {"c (1)": "not you"}):
            add_tick(instance, "orphaned_clusters", UndeletedClusters(problems) if problems else None)
            told.append(self.told(hook, tick))
        again = {"clusters can be deleted again": []}
        assert told == [{}, {title("d (2)"): lines}, again, {title("c (1)"): lines}]
        add_tick(instance, "orphaned_clusters", ValueError("the API is down"))
        assert self.told(hook, tick) == {"the sensor orphaned_clusters fails": ["ValueError: the API is down"]}

    def test_only_the_chosen_kinds_are_told(self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance):
        tick(settings(webhook_url=hook.url, on="champion"))
        Verdicts.model = "bad"
        self.run(instance, "models")
        fail(instance)
        add_tick(instance, "new_raw_files", ValueError("x"))
        instance.report_runless_asset_event(
            champion_changed(version="1", previous=None, who="ann", why="first", figures={})
        )
        assert list(self.told(hook, tick)) == ["the champion is version 1 (the first one)"]
        assert json.loads(hook.posts[0][2])["runs"] == []

    def test_a_cursor_of_the_version_before_goes_on(self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance):
        """It knows failed runs only: what else happened since the last of them is no news."""
        fail(instance)
        last = instance.event_log_storage.get_maximum_record_id()
        Verdicts.model = "bad"
        self.run(instance, "models")
        run_id = fail(instance)
        tick.cursor = json.dumps({"webhook": last})
        assert self.told(hook, tick) == {}
        assert [run["run_id"] for run in json.loads(hook.posts[0][2])["runs"]] == [run_id]
        self.run(instance, "models")
        assert list(self.told(hook, tick)) == ["check health of model failed"]

    def test_the_cursor_stays_small(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
    ):
        """What is bad beyond the limit is told again when it is evaluated again, and its recovery is not."""
        assert len(json.dumps({f"ch{number:08x}": "E" for number in range(changes.MAX_BAD)})) < 4000
        monkeypatch.setattr(changes, "MAX_BAD", 2)
        Verdicts.files = {"unique_ids": dict.fromkeys(KEYS, "same ids")}
        self.run(instance, "files", "a", "c")
        tick()
        assert len(json.loads(str(tick.cursor))["webhook"]["bad"]) == 2
        Verdicts.files = {}
        self.run(instance, "files", "a", "c")
        assert self.told(hook, tick) == {
            "check unique_ids of cleaned_transactions passes again for 2 partitions": ["b", "c"]
        }
        assert "bad" not in json.loads(str(tick.cursor))["webhook"]

    def test_a_message_is_never_too_long(self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance):
        keys = [f"file-{number:03}" for number in range(30)]
        instance.add_dynamic_partitions(str(raw_files.name), keys)
        Verdicts.files = {"unique_ids": dict.fromkeys(keys, "x" * 10_000)}
        self.run(instance, "files", keys[0], keys[-1])
        tick()
        assert "and 5 more" in json.loads(hook.posts[0][2])["text"]
        assert len(hook.posts[0][2]) < 40_000
