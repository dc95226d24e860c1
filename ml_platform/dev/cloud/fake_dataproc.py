"""A stand-in for Yandex Data Proc: its gRPC API over TLS on this machine, faithful to the published protos.

It serves the calls of the platform and the official SDK: endpoints, IAM tokens, operations, clusters, jobs and logs.
Requests are validated against the annotations of the protos, clusters and jobs go through the states of the API, and
PySpark jobs really run (see ``spark_submit.py``) or follow a script. Requests are recorded in order, and tests can make
any call fail. State is kept in memory; see ``dataproc_service.py``.
"""
# ruff: noqa: TID253 - imported only inside functions, by code that needs gRPC anyway

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from yandex.cloud.dataproc.v1 import cluster_service_pb2, job_service_pb2
from yandex.cloud.endpoint import api_endpoint_pb2, api_endpoint_service_pb2
from yandex.cloud.iam.v1 import iam_token_service_pb2
from yandex.cloud.operation import operation_service_pb2

from ml_platform.dev.cloud.cluster_rules import ApiError, Quotas, invalid
from ml_platform.dev.cloud.credentials import OFFICIAL_AUDIENCE, ServiceAccount, issue_certificates
from ml_platform.dev.cloud.dataproc_service import DataprocService, JobScript, Outcome
from ml_platform.dev.cloud.proto_validation import violations
from ml_platform.dev.cloud.spark_submit import SparkSubmit

__all__ = ["FakeDataproc", "JobScript", "Outcome", "Quotas", "SparkSubmit"]

logger = logging.getLogger(__name__)

#: Ids by which the SDK looks up the address of a service.
ENDPOINT_IDS = ("compute", "dataproc", "dataproc-manager", "endpoint", "iam", "operation", "resource-manager", "vpc")
#: Services that need no IAM token.
OPEN_SERVICES = ("IamTokenService", "ApiEndpointService")
#: Request fields that contain credentials.
REDACTED = ("jwt", "yandex_passport_oauth_token", "iam_token")
#: Interval at which the metadata service checks for shutdown.
POLL_SECONDS = 0.02
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"


@dataclass
class _Fault:
    """A scripted fault of the next `remaining` calls of `method` that `when` accepts."""

    #: delay (`value`: real seconds), before or after the effect (`ApiError`), answer (function).
    kind: str
    method: str
    remaining: int
    when: Callable[[Any], bool] | None
    value: Any


class FakeDataproc(DataprocService):
    """The stand-in, a context manager. It uses free ports of the loopback interface and kills its jobs on exit.

    `directory` holds certificates, keys and the files of jobs. `bucket` is only passed on to `environment`. IAM tokens
    are valid for `token_lifetime_seconds`. `settings` are those of `DataprocService`.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        bucket: str | None = None,
        token_lifetime_seconds: float = 3600.0,
        **settings: Any,
    ) -> None:
        super().__init__(directory, **settings)
        self.bucket, self.token_lifetime_seconds = bucket, token_lifetime_seconds
        self.journal: list[dict[str, Any]] = []
        self._undelayed = threading.Event()
        self._tokens: dict[str, float] = {}
        self._faults: list[_Fault] = []
        self._stack = ExitStack()

    def __enter__(self) -> FakeDataproc:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.root_certificates_file, certificate, key = issue_certificates(self.directory)
        self.service_account = ServiceAccount(self.directory, self.service_account_id)
        server = grpc.server(
            futures.ThreadPoolExecutor(16, thread_name_prefix="dataproc"), options=[("grpc.so_reuseport", 0)]
        )
        server.add_generic_rpc_handlers(self._handlers())
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        metadata = ThreadingHTTPServer(("127.0.0.1", 0), _metadata_handler(self))
        #: Address of the API.
        self.endpoint = f"localhost:{port}"
        #: Address of the metadata service of a VM; the SDK takes it from YC_METADATA_ADDR.
        self.metadata_address = f"127.0.0.1:{metadata.server_address[1]}"
        server.start()
        threading.Thread(target=metadata.serve_forever, args=[POLL_SECONDS], name="metadata", daemon=True).start()
        for stop in (self.kill_jobs, metadata.server_close, metadata.shutdown, lambda: server.stop(grace=0).wait()):
            self._stack.callback(stop)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end_delays()
        self._stack.close()

    # --- Client configuration

    @property
    def service_account_key_file(self) -> Path:
        """File of the authorized key, in the format of ``yc iam key create``."""
        return self.service_account.key_file

    def environment(self) -> dict[str, str]:
        """Environment variables that make the platform use this service."""
        variables = {
            "YC_API_ENDPOINT": self.endpoint,
            "YC_ROOT_CERTIFICATES_FILE": str(self.root_certificates_file),
            "YC_SERVICE_ACCOUNT_KEY_FILE": str(self.service_account_key_file),
            "YC_FOLDER_ID": self.folder_id,
            "YC_ZONE": self.zone,
            "YC_SUBNET_ID": self.subnet_id,
            "YC_SERVICE_ACCOUNT_ID": self.service_account_id,
        }
        return variables | ({"DATAPROC_BUCKET": self.bucket} if self.bucket else {})

    def iam_token(self) -> str:
        """Issue a new IAM token, like ``yc iam create-token``."""
        with self._lock:
            token = f"t1.{secrets.token_urlsafe(64)}"
            self._tokens[token] = self.now() + self.token_lifetime_seconds
            return token

    def issued_tokens(self) -> list[str]:
        """All IAM tokens issued so far, for tests that search for leaked tokens."""
        with self._lock:
            return list(self._tokens)

    # --- Record and faults, for tests

    def calls(self, method: str) -> list[dict[str, Any]]:
        """The recorded calls of a method, such as ``ClusterService.Create``."""
        with self._lock:
            return [entry for entry in self.journal if entry["method"] == method]

    def fail(
        self,
        method: str,
        code: str,
        message: str = "",
        *,
        times: int = 1,
        when: Callable[[Any], bool] | None = None,
        after: bool = False,
    ) -> None:
        """Make the next calls of a method fail; with `after`, only after the call has taken effect.

        `when` selects requests; only those count.
        """
        error = ApiError(code, message or f"scripted {code}")
        self._add_fault(_Fault("after" if after else "before", method, times, when, error))

    def delay(self, method: str, seconds: float) -> None:
        """Delay the next call of a method by real seconds, whatever the clock, because gRPC deadlines are real, too."""
        self._add_fault(_Fault("delay", method, 1, None, seconds))

    def end_delays(self) -> None:
        """End all delays, of calls that wait now and of later ones."""
        self._undelayed.set()

    def answer(
        self,
        method: str,
        answer: Callable[[Any, Any], Any],
        times: int = 1,
        when: Callable[[Any], bool] | None = None,
    ) -> None:
        """Replace the responses to the next calls of a method by `answer(request, response)`."""
        self._add_fault(_Fault("answer", method, times, when, answer))

    def _add_fault(self, fault: _Fault) -> None:
        if fault.method not in {_name(method) for method, _ in self._methods()}:
            raise ValueError(f"no method {fault.method!r} is served")
        with self._lock:
            self._faults.append(fault)

    def _take_fault(self, kind: str, method: str, request: Any) -> Any:
        """The value of the next fault of a kind, or None."""
        for fault in self._faults:
            matches = (fault.kind, fault.method) == (kind, method) and fault.remaining
            if matches and (fault.when is None or fault.when(request)):
                fault.remaining -= 1
                return fault.value
        return None

    # --- Calls

    def _methods(self) -> list[tuple[Any, Callable[[Any], Any]]]:
        clusters = cluster_service_pb2.DESCRIPTOR.services_by_name["ClusterService"].methods_by_name
        jobs = job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods_by_name
        operations = operation_service_pb2.DESCRIPTOR.services_by_name["OperationService"].methods_by_name
        tokens = iam_token_service_pb2.DESCRIPTOR.services_by_name["IamTokenService"].methods_by_name
        endpoints = api_endpoint_service_pb2.DESCRIPTOR.services_by_name["ApiEndpointService"].methods_by_name
        return [
            (endpoints["List"], self._list_endpoints),
            (tokens["Create"], self._create_token),
            (operations["Get"], self._get_operation),
            (clusters["Get"], lambda request: self._cluster(request.cluster_id).proto),
            (clusters["List"], self._list_clusters),
            (clusters["Create"], self._create_cluster),
            (clusters["Delete"], self._delete_cluster),
            (jobs["List"], self._list_jobs),
            (jobs["Get"], lambda request: self._job(request).proto),
            (jobs["Create"], self._create_job),
            (jobs["ListLog"], self._list_log),
            (jobs["Cancel"], lambda request: self._cancel_job(self._job(request))),
        ]

    def _handlers(self) -> tuple[Any, ...]:
        services: dict[str, dict[str, Any]] = {}
        for method, function in self._methods():
            services.setdefault(method.containing_service.full_name, {})[method.name] = self._handler(method, function)
        return tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items())

    def _handler(self, method: Any, function: Callable[[Any], Any]) -> Any:
        def handle(request: Any, context: Any) -> bytes:
            with self._lock:
                delay = self._take_fault("delay", _name(method), request)
            if delay:
                self._undelayed.wait(delay)
            with self._lock:
                refusal = response = None
                try:
                    response = self._respond(method, function, request, context)
                except ApiError as error:
                    refusal = error
                except Exception as error:
                    logger.exception("%s failed", method.full_name)
                    refusal = ApiError("INTERNAL", f"{type(error).__name__}: {error}")
                self._record(_name(method), request, refusal)
            if refusal is not None:
                context.abort(grpc.StatusCode[refusal.code], refusal.message)
            assert response is not None
            return response

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=message_factory.GetMessageClass(method.input_type).FromString
        )

    def _respond(self, method: Any, function: Callable[[Any], Any], request: Any, context: Any) -> bytes:
        """Answer a call. The response is serialized under the lock, because it may be part of the state."""
        name = _name(method)
        self._advance()
        if error := self._take_fault("before", name, request):
            raise error
        if method.containing_service.name not in OPEN_SERVICES:
            self._authenticate(dict(context.invocation_metadata()))
        if errors := violations(request):
            raise invalid(f"Request validation error: {'; '.join(errors)}")
        response = function(request)
        if error := self._take_fault("after", name, request):
            raise error
        if answer := self._take_fault("answer", name, request):
            response = answer(request, response)
        return response.SerializeToString()

    def _authenticate(self, headers: Mapping[str, str]) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not token or scheme != "Bearer":
            raise ApiError("UNAUTHENTICATED", "Authentication is required: no token in the call")
        if token not in self._tokens:
            raise ApiError("UNAUTHENTICATED", "The token is invalid")
        if self._tokens[token] <= self.now():
            raise ApiError("UNAUTHENTICATED", "The token has expired")

    def _record(self, method: str, request: Any, refusal: ApiError | None) -> None:
        body = json_format.MessageToDict(request, preserving_proto_field_name=True)
        self.journal.append(
            {
                "time": self.now(),
                "method": method,
                "request": {key: "***" if key in REDACTED else value for key, value in body.items()},
                "code": "OK" if refusal is None else refusal.code,
            }
        )

    # --- Endpoints and tokens

    def _list_endpoints(self, request: Any) -> Any:
        endpoints = [api_endpoint_pb2.ApiEndpoint(id=name, address=self.endpoint) for name in ENDPOINT_IDS]
        return api_endpoint_service_pb2.ListApiEndpointsResponse(endpoints=endpoints)

    def _create_token(self, request: Any) -> Any:
        if request.WhichOneof("identity") != "jwt":
            raise ApiError("UNAUTHENTICATED", "Only a JWT of a service account is accepted here")
        audiences = [OFFICIAL_AUDIENCE, f"https://iam.{self.endpoint}/iam/v1/tokens"]
        if problem := self.service_account.verify(request.jwt, audiences, self.skew_seconds):
            raise ApiError("UNAUTHENTICATED", problem)
        token = self.iam_token()
        response = iam_token_service_pb2.CreateIamTokenResponse(iam_token=token)
        response.expires_at.FromMilliseconds(int(self._tokens[token] * 1000))
        return response


def _name(method: Any) -> str:
    """Name of a method descriptor, such as ``ClusterService.Create``."""
    return f"{method.containing_service.name}.{method.name}"


def _metadata_handler(cloud: FakeDataproc) -> type[BaseHTTPRequestHandler]:
    """Handler of a VM's metadata service (169.254.169.254), which issues tokens of its service account."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != TOKEN_PATH:
                self.send_error(404)
            elif self.headers.get("Metadata-Flavor") != "Google":
                self.send_error(403, "the header Metadata-Flavor: Google is missing")
            else:
                lifetime = int(cloud.token_lifetime_seconds)
                token = {"access_token": cloud.iam_token(), "expires_in": lifetime, "token_type": "Bearer"}
                body = json.dumps(token).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            logger.debug(format, *arguments)

    return Handler
