"""Rules of the Data Proc service for new clusters beyond the annotations of its protos.

From the service's documentation (concepts, limits, lightweight clusters) and errors reported by its users.
"""
# ruff: noqa: TID253 - only the stand-in imports this, and it needs the SDK anyway

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from yandex.cloud.dataproc.v1 import cluster_pb2, subcluster_pb2

GIGABYTE = 1 << 30
MIN_DISK_GB, MAX_DISK_GB = 10, 4096
MAX_SUBCLUSTERS, MAX_SUBCLUSTER_HOSTS = 12, 32
#: Disk sizes of these types are multiples of this number of GB.
DISK_STEP_GB = {"network-ssd-nonreplicated": 93, "network-ssd-io-m3": 93}
DISK_TYPES = frozenset({"network-hdd", "network-ssd", *DISK_STEP_GB})
ZONES = frozenset({"ru-central1-a", "ru-central1-b", "ru-central1-c", "ru-central1-d"})
IMAGE_VERSION = re.compile(r"(?:1\.4|2\.0|2\.1|2\.2)(?:\.\d+)?")
#: Platform, vCPUs, GB of memory: standard and high-memory hosts of the usual platforms.
RESOURCE_PRESETS = frozenset(
    [f"{platform}-c{cores}-m{4 * cores}" for platform in ("s1", "s2", "s3") for cores in (2, 4, 8, 12, 16, 24, 32)]
    + [f"m{platform}-c{cores}-m{8 * cores}" for platform in (1, 2, 3) for cores in (2, 4, 8, 12, 16, 24, 32)]
    + [f"b{platform}-c2-m{memory}" for platform in (1, 2, 3) for memory in (2, 4, 8)]
)


class ApiError(Exception):
    """Error of a call: a gRPC status, such as NOT_FOUND, and a message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def invalid(message: str) -> ApiError:
    """Error for a request that can never succeed."""
    return ApiError("INVALID_ARGUMENT", message)


@dataclass
class Quotas:
    """Limits on all clusters of the folder together; `disk_gb` by disk type, other types are unlimited."""

    hosts: int = 64
    disk_gb: Mapping[str, int] = field(default_factory=lambda: {"network-ssd": 2048, "network-hdd": 10240})


def check_cluster(request: Any) -> None:
    """Raise ApiError if the service would reject a ``CreateClusterRequest`` that is valid by its annotations."""
    role, service = subcluster_pb2.Role, cluster_pb2.HadoopConfig.Service
    if request.zone_id not in ZONES:
        raise invalid(f"zone_id: zone {request.zone_id!r} is not available")
    config = request.config_spec
    if config.version_id and not IMAGE_VERSION.fullmatch(config.version_id):
        raise invalid(f"config_spec.version_id: image version {config.version_id!r} is not available")
    services = set(config.hadoop.services)
    for dependent in (service.SPARK, service.MAPREDUCE):
        if dependent in services and service.YARN not in services:
            raise invalid(f"config_spec.hadoop.services: {service.Name(dependent)} needs YARN")
    specs = config.subclusters_spec
    if len(specs) > MAX_SUBCLUSTERS:
        raise invalid(f"config_spec.subclusters_spec: at most {MAX_SUBCLUSTERS} subclusters")
    masters = [spec for spec in specs if spec.role == role.MASTERNODE]
    if len(masters) != 1 or masters[0].hosts_count != 1:
        raise invalid("config_spec.subclusters_spec: there must be exactly one master subcluster of exactly one host")
    if service.HDFS in services and not any(spec.role == role.DATANODE for spec in specs):
        raise invalid("config_spec.subclusters_spec: HDFS needs a data subcluster")
    names = [spec.name for spec in specs if spec.name]
    if len(set(names)) < len(names):
        raise invalid("config_spec.subclusters_spec: names of subclusters must be unique")
    for index, spec in enumerate(specs):
        _check_subcluster(f"config_spec.subclusters_spec[{index}]", spec)


def _check_subcluster(path: str, spec: Any) -> None:
    if spec.hosts_count > MAX_SUBCLUSTER_HOSTS:
        raise invalid(f"{path}.hosts_count: at most {MAX_SUBCLUSTER_HOSTS} hosts")
    resources = spec.resources
    if resources.resource_preset_id not in RESOURCE_PRESETS:
        raise invalid(f"{path}.resources: resource preset {resources.resource_preset_id!r} is not available")
    kind, size = resources.disk_type_id, resources.disk_size
    if kind not in DISK_TYPES:
        raise invalid(f"{path}.resources: disk type {kind!r} is not available")
    if not MIN_DISK_GB * GIGABYTE <= size <= MAX_DISK_GB * GIGABYTE:
        raise invalid(f"{path}.resources: disk size must be {MIN_DISK_GB} to {MAX_DISK_GB} GB, in bytes; is {size}")
    if kind in DISK_STEP_GB and size % (DISK_STEP_GB[kind] * GIGABYTE):
        raise invalid(f"{path}.resources: size of {kind} disks must be a multiple of {DISK_STEP_GB[kind]} GB")
    if spec.HasField("autoscaling_config"):
        if spec.role != subcluster_pb2.Role.COMPUTENODE:
            raise invalid(f"{path}.autoscaling_config: only compute subclusters scale")
        if spec.autoscaling_config.max_hosts_count < spec.hosts_count:
            raise invalid(f"{path}.autoscaling_config: max_hosts_count is below hosts_count")


def check_quotas(quotas: Quotas, existing: Iterable[Any], requested: Iterable[Any]) -> None:
    """Raise ApiError if the `requested` and `existing` subclusters together exceed the quotas."""
    specs = [*existing, *requested]
    if sum(spec.hosts_count for spec in specs) > quotas.hosts:
        raise ApiError("RESOURCE_EXHAUSTED", "The limit on maximum number of hosts has exceeded.")
    for kind, limit in quotas.disk_gb.items():
        used = sum(spec.hosts_count * spec.resources.disk_size for spec in specs if spec.resources.disk_type_id == kind)
        if used > limit * GIGABYTE:
            raise ApiError("RESOURCE_EXHAUSTED", f"The limit on maximum total size of {kind} disks has exceeded.")
