"""A stand-in for Yandex Data Proc: its gRPC API over TLS on this machine, true to the published protos.

A program that uses the official SDK cannot tell it from the service in what this platform needs: endpoints, IAM
tokens, operations, clusters, jobs and their logs. Requests are held against the annotations of the protos, clusters
and jobs go through the states of the API, PySpark jobs run for real (see ``spark_submit.py``) or by a script, and
any call can be made to fail. Requests are recorded in order.

State lives in memory; see ``dataproc_service.py``.
"""
# ruff: noqa: TID253 - nothing imports this at module level; who starts the stand-in needs gRPC at once

from __future__ import annotations

import json
import logging
import secrets
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from yandex.cloud.dataproc.v1 import cluster_service_pb2, job_service_pb2
from yandex.cloud.endpoint import api_endpoint_pb2, api_endpoint_service_pb2
from yandex.cloud.iam.v1 import iam_token_service_pb2
from yandex.cloud.operation import operation_pb2, operation_service_pb2

from ml_platform.dev.cloud.cluster_rules import ApiError, Quotas, invalid
from ml_platform.dev.cloud.credentials import OFFICIAL_AUDIENCE, ServiceAccount, issue_certificates
from ml_platform.dev.cloud.dataproc_service import DataprocService, JobScript, Outcome, page_of, status_code
from ml_platform.dev.cloud.proto_validation import violations
from ml_platform.dev.cloud.spark_submit import SparkSubmit

__all__ = ["ApiError", "FakeDataproc", "JobScript", "Outcome", "Quotas", "SparkSubmit"]

logger = logging.getLogger(__name__)

#: Ids under which the SDK looks for the address of a service.
ENDPOINT_IDS = ("compute", "dataproc", "dataproc-manager", "endpoint", "iam", "operation", "resource-manager", "vpc")
#: Services that anyone may call.
OPEN_SERVICES = ("IamTokenService", "ApiEndpointService")
#: Fields of requests that are credentials by their purpose.
REDACTED = ("jwt", "yandex_passport_oauth_token", "iam_token")
#: How soon the metadata service notices that it is to stop.
POLL_SECONDS = 0.02
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"


@dataclass
class _Fault:
    kind: str
    method: str
    remaining: int
    when: Callable[[Any], bool] | None
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    message: str = ""
    seconds: float = 0.0
    answer: Callable[[Any, Any], Any] | None = None


class FakeDataproc(DataprocService):
    """The stand-in. A context manager; or call `start` and `stop`.

    `directory` holds certificates, keys, the files of jobs and ``journal.jsonl``. `bucket` is only passed on to
    `environment`. IAM tokens live for `token_lifetime_seconds`. `settings` are those of `DataprocService`.
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
        self._stopping = threading.Event()
        self._idempotent: dict[str, str] = {}
        self._tokens: dict[str, float] = {}
        self._faults: list[_Fault] = []
        self._server: Any = None
        self._metadata: ThreadingHTTPServer | None = None

    # --- Life

    def start(self) -> FakeDataproc:
        """Make certificates and keys and answer calls, on free ports of the loopback interface."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.root_certificates_file, certificate, key = issue_certificates(self.directory)
        self.service_account = ServiceAccount(self.directory, self.service_account_id)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(16, thread_name_prefix="dataproc"), options=[("grpc.so_reuseport", 0)]
        )
        self._server.add_generic_rpc_handlers(self._handlers())
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        self._port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()
        self._metadata = _metadata_server(self)
        return self

    def stop(self) -> None:
        """Stop answering and kill the jobs that still run. May be called twice."""
        self._stopping.set()
        if self._server is not None:
            self._server.stop(grace=0).wait()
            self._server = None
        if self._metadata is not None:
            self._metadata.shutdown()
            self._metadata.server_close()
            self._metadata = None
        self.kill_jobs()

    def __enter__(self) -> FakeDataproc:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # --- What callers need

    @property
    def endpoint(self) -> str:
        """Address of the API, ``localhost:port``."""
        return f"localhost:{self._port}"

    @property
    def metadata_address(self) -> str:
        """Address of the metadata service of a VM, ``host:port``; the SDK takes it from YC_METADATA_ADDR."""
        assert self._metadata is not None
        return f"127.0.0.1:{self._metadata.server_address[1]}"

    @property
    def service_account_key_file(self) -> Path:
        """The authorized key, as ``yc iam key create`` writes it."""
        return self.service_account.key_file

    def environment(self) -> dict[str, str]:
        """The variables that make the platform use this service."""
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
        """A new token, as ``yc iam create-token`` prints one."""
        with self._lock:
            token = f"t1.{secrets.token_urlsafe(64)}"
            self._tokens[token] = self.now() + self.token_lifetime_seconds
            return token

    def issued_tokens(self) -> list[str]:
        """All IAM tokens that it ever gave away, for a test that looks for them where they must not be."""
        with self._lock:
            return list(self._tokens)

    # --- Record and faults, for tests

    def calls(self, method: str) -> list[dict[str, Any]]:
        """The recorded calls of a method: ``ClusterService.Create`` or its full name."""
        with self._lock:
            return [entry for entry in self.journal if _names(method, entry["method"])]

    def fail(
        self,
        method: str,
        code: str | grpc.StatusCode,
        message: str = "",
        *,
        times: int = 1,
        when: Callable[[Any], bool] | None = None,
        after: bool = False,
    ) -> None:
        """Let the next calls of a method fail.

        `method` is ``ClusterService.Create`` or a full name. With `after`, the call takes effect and its answer is
        lost. `when` chooses among the requests; those that it declines do not count.
        """
        message = message or f"scripted {status_code(code).name}"
        fault = _Fault("after" if after else "before", method, times, when, code=status_code(code), message=message)
        self._add_fault(fault)

    def delay(self, method: str, seconds: float, times: int = 1, when: Callable[[Any], bool] | None = None) -> None:
        """Let the next calls of a method take so many real seconds, whatever the clock: deadlines are real, too."""
        self._add_fault(_Fault("delay", method, times, when, seconds=seconds))

    def answer(
        self,
        method: str,
        answer: Callable[[Any, Any], Any],
        times: int = 1,
        when: Callable[[Any], bool] | None = None,
    ) -> None:
        """Give the next calls of a method another answer: what `answer` makes of the request and the true response."""
        self._add_fault(_Fault("answer", method, times, when, answer=answer))

    def _add_fault(self, fault: _Fault) -> None:
        if not any(_names(fault.method, method.full_name) for method, _ in self._methods()):
            raise ValueError(f"no method {fault.method!r} is served")
        with self._lock:
            self._faults.append(fault)

    def _take_fault(self, kind: str, method: str, request: Any) -> _Fault | None:
        for fault in self._faults:
            fits = fault.kind == kind and fault.remaining and _names(fault.method, method)
            if fits and (fault.when is None or fault.when(request)):
                fault.remaining -= 1
                return fault
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
            (endpoints["Get"], self._get_endpoint),
            (tokens["Create"], self._create_token),
            (operations["Get"], self._get_operation),
            (operations["Cancel"], self._cancel_operation),
            (clusters["Get"], lambda request: self._cluster(request.cluster_id).proto),
            (clusters["List"], self._list_clusters),
            (clusters["Create"], self._create_cluster),
            (clusters["Delete"], self._delete_cluster),
            (clusters["Stop"], self._stop_cluster),
            (clusters["Start"], self._start_cluster),
            (clusters["ListOperations"], self._list_operations),
            (clusters["ListHosts"], self._list_hosts),
            (clusters["ListUILinks"], self._list_ui_links),
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
                delay = self._take_fault("delay", method.full_name, request)
            if delay is not None:
                self._stopping.wait(delay.seconds)
            with self._lock:
                refusal = response = None
                try:
                    response = self._respond(method, function, request, context)
                except ApiError as error:
                    refusal = error
                except Exception as error:
                    logger.exception("%s failed", method.full_name)
                    refusal = ApiError(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
                self._record(method.full_name, request, refusal)
            if refusal is not None:
                context.abort(refusal.code, refusal.message)
            assert response is not None
            return response

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=message_factory.GetMessageClass(method.input_type).FromString
        )

    def _respond(self, method: Any, function: Callable[[Any], Any], request: Any, context: Any) -> bytes:
        """Answer a call; serialized here, under the lock, as it may be a part of the state."""
        name = method.full_name
        self._advance()
        if fault := self._take_fault("before", name, request):
            raise ApiError(fault.code, fault.message)
        headers = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        if method.containing_service.name not in OPEN_SERVICES:
            self._authenticate(headers)
        if wrong := violations(request):
            raise invalid(f"Request validation error: {'; '.join(wrong)}")
        response = self._once(headers.get("idempotency-key"), method, function, request)
        if fault := self._take_fault("after", name, request):
            raise ApiError(fault.code, fault.message)
        if (fault := self._take_fault("answer", name, request)) and fault.answer is not None:
            response = fault.answer(request, response)
        return response.SerializeToString()

    def _once(self, key: str | None, method: Any, function: Callable[[Any], Any], request: Any) -> Any:
        """Do it, unless an operation with this idempotency key is known: then return that operation as it is now."""
        if key is None or method.output_type.full_name != operation_pb2.Operation.DESCRIPTOR.full_name:
            return function(request)
        try:
            uuid.UUID(key)
        except ValueError:
            raise invalid("idempotency-key: must be a UUID") from None
        if key not in self._idempotent:
            self._idempotent[key] = function(request).id
        return self._operations[self._idempotent[key]]

    def _authenticate(self, headers: Mapping[str, str]) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not token or scheme != "Bearer":
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, "Authentication is required: no token in the call")
        if token not in self._tokens:
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, "The token is invalid")
        if self._tokens[token] <= self.now():
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, "The token has expired")

    def _record(self, method: str, request: Any, refusal: ApiError | None) -> None:
        body = json_format.MessageToDict(request, preserving_proto_field_name=True)
        entry = {
            "time": self.now(),
            "method": method,
            "request": {key: "***" if key in REDACTED else value for key, value in body.items()},
            "code": "OK" if refusal is None else refusal.code.name,
            "message": "" if refusal is None else refusal.message,
        }
        self.journal.append(entry)
        with (self.directory / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    # --- Endpoints and tokens

    def _list_endpoints(self, request: Any) -> Any:
        endpoints = [api_endpoint_pb2.ApiEndpoint(id=name, address=self.endpoint) for name in ENDPOINT_IDS]
        page, token = page_of("endpoints", list(enumerate(endpoints)), request)
        return api_endpoint_service_pb2.ListApiEndpointsResponse(endpoints=page, next_page_token=token)

    def _get_endpoint(self, request: Any) -> Any:
        if request.api_endpoint_id not in ENDPOINT_IDS:
            raise ApiError(grpc.StatusCode.NOT_FOUND, f"Endpoint {request.api_endpoint_id!r} not found")
        return api_endpoint_pb2.ApiEndpoint(id=request.api_endpoint_id, address=self.endpoint)

    def _create_token(self, request: Any) -> Any:
        if request.WhichOneof("identity") != "jwt":
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, "Only a JWT of a service account is accepted here")
        hosts = (self.endpoint, f"127.0.0.1:{self._port}")
        audiences = [OFFICIAL_AUDIENCE, *(f"https://iam.{host}/iam/v1/tokens" for host in hosts)]
        if wrong := self.service_account.verify(request.jwt, audiences, self.skew_seconds):
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, wrong)
        token = self.iam_token()
        response = iam_token_service_pb2.CreateIamTokenResponse(iam_token=token)
        response.expires_at.FromMilliseconds(int(self._tokens[token] * 1000))
        return response


def _names(method: str, full_name: str) -> bool:
    return full_name == method or full_name.endswith(f".{method}")


def _metadata_server(cloud: FakeDataproc) -> ThreadingHTTPServer:
    """Start what a VM finds at 169.254.169.254: tokens of its service account."""

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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[POLL_SECONDS], name="metadata", daemon=True).start()
    return server
