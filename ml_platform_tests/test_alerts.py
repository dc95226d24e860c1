"""Alerts of failed runs: real SMTP and HTTP servers on this machine, and their failures."""

from __future__ import annotations

import email
import email.policy
import json
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult

from ml_platform.dev.cloud.credentials import issue_certificates
from ml_platform.operations import alerts
from ml_platform.operations.alerts import AlertError, FailedRun, as_text, build_destinations, one_line
from ml_platform.sensors import build_report_failed_runs
from ml_platform.settings import AlertSettings, SettingsError, load_alert_settings

PASSWORD = "pass-word-5f2c"
SECRET_PATH = "/services/T00/very-secret-hook"
RUN = FailedRun("1234", "process_new_files", "a to b", "2026-01-01 00:00:00 UTC", "it died", [("clean", "boom")], None)


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
    monkeypatch.setattr(alerts, "TIMEOUT_S", 0.3)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class TestEmail:
    def test_a_letter_arrives(self, mailbox: Mailbox):
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(email_settings(port))
            destination.send([RUN])
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
            destination.send([RUN])
        assert len(mailbox.letters) == 1

    @pytest.mark.parametrize("password", [f"{PASSWORD}x", "naïve-5f2c"])
    def test_a_wrong_password_is_named_but_not_shown(self, mailbox: Mailbox, trusted: ssl.SSLContext, password: str):
        with smtp_server(mailbox, trusted, authenticator=checks_password, auth_required=True) as port:
            (destination,) = build_destinations(
                email_settings(port, smtp_security="starttls", smtp_user="me", smtp_password=password)
            )
            for act in (lambda: destination.send([RUN]), destination.check):
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
                destination.send([RUN])
        assert mailbox.letters == []

    def test_a_server_without_starttls_gets_nothing(self, mailbox: Mailbox):
        """An attacker in between may hide the offer."""
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(
                email_settings(port, smtp_security="starttls", smtp_user="me", smtp_password=PASSWORD)
            )
            with pytest.raises(AlertError, match="does not offer STARTTLS"):
                destination.send([RUN])
        assert mailbox.letters == []

    def test_an_unreachable_server_is_named(self):
        (destination,) = build_destinations(email_settings(closed_port()))
        for act in (lambda: destination.send([RUN]), destination.check):
            with pytest.raises(AlertError, match=r"cannot be reached \(Connection refused\)"):
                act()

    def test_a_silent_server_is_named(self, silent_port: int, short_timeout: None):
        (destination,) = build_destinations(email_settings(silent_port))
        with pytest.raises(AlertError, match=r"does not answer within 0.3 s"):
            destination.send([RUN])

    def test_refused_letters_and_recipients_are_named(self, mailbox: Mailbox):
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(email_settings(port))
            mailbox.refuse_data = "554 looks like\x1b spam"
            with pytest.raises(AlertError, match="answers 554 looks like  spam"):
                destination.send([RUN])
            mailbox.refuse_data = ""
            mailbox.refused_recipients = {"ops@example.com", "boss@example.com"}
            with pytest.raises(AlertError, match=r"refuses all recipients .*boss@example.com: 550 no such  mailbox"):
                destination.send([RUN])
            # One of two is delivered, and not sent to the other again and again.
            mailbox.refused_recipients = {"ops@example.com"}
            destination.send([RUN])
        assert [recipients for recipients, _ in mailbox.letters] == [["boss@example.com"]]

    def test_texts_of_errors_add_no_header(self, mailbox: Mailbox):
        bad = "x\r\nBcc: thief@example.com\r\n\r\n<script>\x00\x1b[31m"
        run = FailedRun("1", bad, bad, "now", bad, [(bad, bad)], None)
        with smtp_server(mailbox) as port:
            (destination,) = build_destinations(email_settings(port))
            destination.send([run])
        ((recipients, letter),) = mailbox.letters
        assert recipients == ["ops@example.com", "boss@example.com"]
        assert letter["Bcc"] is None
        assert "\n" not in letter["Subject"]
        assert letter.get_content_type() == "text/plain"


class TestWebhook:
    def test_a_post_arrives(self, hook: Hook):
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        destination.send([RUN, RUN])
        ((path, headers, body),) = hook.posts
        assert (path, headers["Content-Type"]) == (SECRET_PATH, "application/json")
        content = json.loads(body)
        assert content["text"] == as_text([RUN, RUN])
        assert content["text"].startswith("ml_platform: 2 runs failed\n")
        assert content["runs"][0]["run_id"] == "1234"
        assert content["runs"][0]["steps"] == {"clean": "boom"}

    def test_https_needs_a_trusted_certificate(self, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch):
        with serving(Hook(trusted)) as hook:
            (destination,) = build_destinations(settings(webhook_url=hook.url))
            destination.check()
            assert hook.posts == []
            destination.send([RUN])
            assert len(hook.posts) == 1
            monkeypatch.delenv("SSL_CERT_FILE")
            for act in (lambda: destination.send([RUN]), destination.check):
                with pytest.raises(AlertError, match="certificate that is not trusted"):
                    act()
        assert len(hook.posts) == 1

    @pytest.mark.parametrize("status", [400, 404, 500])
    def test_an_error_status_is_named(self, hook: Hook, status: int):
        hook.status = status
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        with pytest.raises(AlertError, match=f"the webhook answers {status}: check ML_PLATFORM_ALERT_WEBHOOK_URL"):
            destination.send([RUN])

    def test_a_redirection_is_not_followed(self, hook: Hook):
        hook.status, hook.location = 302, "/elsewhere"
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        with pytest.raises(AlertError, match="answers 302"):
            destination.send([RUN])
        assert [path for path, *_ in hook.posts] == [SECRET_PATH]

    def test_unreachable_and_silent_servers_are_named(self, hook: Hook, short_timeout: None):
        url = f"http://localhost:{closed_port()}{SECRET_PATH}"
        (destination,) = build_destinations(settings(webhook_url=url))
        for act in (lambda: destination.send([RUN]), destination.check):
            with pytest.raises(AlertError, match="Connection refused") as caught:
                act()
            assert "very-secret" not in str(caught.value)
        hook.stuck.clear()
        (destination,) = build_destinations(settings(webhook_url=hook.url))
        with pytest.raises(AlertError, match="does not answer within"):
            destination.send([RUN])

    def test_the_address_is_in_no_traceback(self, tmp_path: Path):
        """Dagster stores the messages of the whole chain of errors."""
        from dagster_shared.error import SerializableErrorInfo

        (destination,) = build_destinations(settings(webhook_url=f"http://localhost:{closed_port()}{SECRET_PATH}"))
        with pytest.raises(AlertError) as caught:
            destination.send([RUN])
        assert "very-secret" not in str(SerializableErrorInfo.from_traceback(_traceback(caught.value)))


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
        for act in (lambda: destination.send([RUN]), destination.check):
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
    assert len(one_line("x" * 9999)) == alerts.MAX_LINE_LENGTH


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
        sensor = build_report_failed_runs(build_destinations(self.settings), "https://dagster.example/")
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
        assert tick(found) == "no run has failed"  # it failed before the first tick
        run_id = fail(instance, **{"dagster/partition": "2019-08-22"})
        all_is_well.execute_in_process(instance=instance)
        assert tick(found) == "webhook: 1 failed runs reported"
        assert tick(found) == "no run has failed"
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
            assert tick(found).startswith("email: 1 failed runs reported; webhook: the webhook answers 503")
            for _ in range(2):
                with pytest.raises(AlertError):
                    tick(found)
            assert len(mailbox.letters) == 1
            hook.status, hook.posts = 200, []
            assert tick(found) == "webhook: 1 failed runs reported"
            assert (len(mailbox.letters), len(hook.posts)) == (1, 1)

    def test_an_unexpected_error_of_one_destination_does_not_stop_the_other(
        self, hook: Hook, tick: Ticks, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        found = email_settings(closed_port(), webhook_url=hook.url)
        tick(found)
        fail(instance)

        def surprise(*_: object) -> None:
            raise KeyError(PASSWORD)

        monkeypatch.setattr(alerts.Email, "send", surprise)
        assert tick(found) == "webhook: 1 failed runs reported; email: KeyError"
        with pytest.raises(AlertError) as caught:
            tick(found)
        assert PASSWORD not in str(caught.value)
        assert len(hook.posts) == 1

    def test_many_runs_are_reported_in_portions(
        self, hook: Hook, ticked: Ticks, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(alerts, "RUNS_PER_ALERT", 2)
        ids = [fail(instance) for _ in range(3)]
        assert ticked() == "webhook: 2 failed runs reported"
        assert ticked() == "webhook: 1 failed runs reported"
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
        assert tick(found) == "webhook: 1 failed runs reported"

    def test_a_tick_without_destinations_says_what_to_set(self, tick: Ticks, instance: dg.DagsterInstance):
        fail(instance)
        assert "set ML_PLATFORM_ALERT_EMAIL_TO or ML_PLATFORM_ALERT_WEBHOOK_URL" in tick(load_alert_settings())

    def test_the_sensor_runs_only_with_a_destination(self, hook: Hook):
        stopped, running = dg.DefaultSensorStatus.STOPPED, dg.DefaultSensorStatus.RUNNING
        assert build_report_failed_runs([], None).default_status == stopped
        destinations = build_destinations(settings(webhook_url=hook.url))
        sensor = build_report_failed_runs(destinations, None)
        assert (sensor.name, sensor.default_status, sensor.has_jobs) == ("report_failed_runs", running, False)

    def test_secrets_are_in_no_log(
        self,
        mailbox: Mailbox,
        hook: Hook,
        tick: Ticks,
        trusted: ssl.SSLContext,
        instance: dg.DagsterInstance,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ):
        caplog.set_level(logging.DEBUG)
        with smtp_server(mailbox, trusted, authenticator=checks_password, auth_required=True) as port:
            found = email_settings(
                port, smtp_security="starttls", smtp_user="me", smtp_password=PASSWORD, webhook_url=hook.url
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
