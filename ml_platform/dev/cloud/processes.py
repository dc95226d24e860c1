"""Child processes that end with their parent, however it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Kills the process group when the pipe from the parent closes, which it also does if the parent is killed.
#: The tether ignores the signals that terminate the group.
_TETHER = 'exec 3<&0 </dev/null; { trap "" INT TERM; cat <&3 >/dev/null; kill -KILL 0; } & exec 3<&-; exec "$@"'

#: Bytes from the end of a log in an error message.
LOG_TAIL_BYTES = 2000

#: Ports of `free_port`. Linux gives those from 32768 on to connections, other systems those from 49152 on.
SERVER_PORTS = range(15_000, 32_000)


class TetheredProcess:
    """A process in its own process group, with its output in a file."""

    def __init__(self, command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        """Start `command` with the environment `env` (default: this process's)."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _TETHER, "sh", *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Id of the process and of its process group."""
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, is_ready: Callable[[], bool], *, what: str, timeout_s: float = 60) -> None:
        """Wait for `is_ready`. Raises RuntimeError, with the end of the log, if the process ends or it times out."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if not self.is_running():
                raise RuntimeError(f"{what} ended while starting: {self.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not answer within {timeout_s:.0f} s: {self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()

    def wait(self) -> int:
        """Wait for the process to end, kill the rest of its group, and return the exit code."""
        code = self._process.wait()
        self.kill()
        return code

    def terminate(self) -> None:
        """Send SIGTERM to the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)

    def stop(self, *, grace_s: float = 5, to_group: bool = False) -> None:
        """End the process (with `to_group`, its whole group) by SIGTERM, and the group by SIGKILL after `grace_s`."""
        with contextlib.suppress(ProcessLookupError):
            if to_group:
                os.killpg(self.pid, signal.SIGTERM)
            else:
                self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """Kill the process and its group by SIGKILL."""
        # The tether keeps the group alive until the pipe closes, so its id cannot be reused.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def free_port() -> int:
    """A free TCP port of this machine, below those that systems give to outgoing connections: nothing takes it soon."""
    while True:
        port = secrets.choice(SERVER_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def listens(port: int) -> bool:
    """True if a server accepts connections on a port of this machine."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
