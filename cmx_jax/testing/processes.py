"""Tests that need a count of devices which their process does not have run in another one.

JAX has the count of devices with which it started, so another count needs another process: one for each
count. It starts with the first test that needs it, collects the same files by the same arguments, runs tests
as they are asked for (`served.py`) and ends with the session: fixtures live as in a run of those tests alone.
A test runs here if this process has its count already, or if all tests of the run ask for the same count (so
that a debugger works).

A test that takes too long, or takes its process with it, fails; the next one gets a new process.
"""

import builtins
import contextlib
import json
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pytest

START = (
    "import json, sys; job = json.loads(open(0, 'rb', 0, closefd=False).readline()); "
    "sys.path[:] = job['path']; from cmx_jax.testing.child import serve; serve(job)"
)


@dataclass(frozen=True)
class Asked:
    """What a test's marker says."""

    count: int
    timeout: float | None = None


class LostError(Exception):
    """The process will not say more: why."""


def asked(item: pytest.Item) -> Asked | None:
    """What a test asks for, None if nothing.

    Raises:
      UsageError: the marker is not understood.
    """
    mark = item.get_closest_marker("devices")
    if mark is None:
        return None
    try:
        found = Asked(*mark.args, **mark.kwargs)
        if type(found.count) is int and found.count > 0 and (found.timeout is None or found.timeout > 0):
            return found
    except TypeError:
        pass
    given = ", ".join([*map(repr, mark.args), *(f"{name}={value!r}" for name, value in mark.kwargs.items())])
    raise pytest.UsageError(
        f"{item.nodeid}: devices({given}), expected devices(count, timeout=seconds), both above zero"
    )


class DeviceProcesses:
    """The plugin that sends tests where they run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.marked: dict[int, list[pytest.Item]] = {}
        self.alike = False  # all tests of the run ask for one count
        self.processes: dict[int, _Process] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if request := asked(item):
                self.marked.setdefault(request.count, []).append(item)
        self._timeout()  # a mistake is said before tests run
        self.alike = [len(items) for items in self.marked.values()] == [len(session.items)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        request = asked(item)
        if request is None or self._here(request.count):
            return None
        process = self._process(request.count)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        following = self._following(item, request.count)
        for report in process.run(item, following, request.timeout or self._timeout()):
            item.ihook.pytest_runtest_logreport(report=report)
        # what tests before this one left for it in this process
        call = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(nextitem), "teardown", reraise=KeyboardInterrupt
        )
        if call.excinfo:
            report = pytest.TestReport.from_item_and_call(item, call)
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        for process in self.processes.values():
            process.close()

    def _timeout(self) -> float:
        given = self.config.getini("devices_timeout")
        with contextlib.suppress(ValueError):
            if float(given) > 0:
                return float(given)
        raise pytest.UsageError(f"devices_timeout is {given!r}, expected seconds, above zero")

    def _here(self, count: int) -> bool:
        from cmx_jax.errors import CmxError
        from cmx_jax.mesh.host import has_exactly, request_exactly

        if self.alike:
            with contextlib.suppress(CmxError):
                request_exactly(count)
        return has_exactly(count)

    def _process(self, count: int) -> "_Process":
        process = self.processes.get(count)
        # one that did not even start will not do so now
        if process is None or (process.over and process.ready):
            files = sorted({str(item.path) for item in self.marked[count]})
            self.processes[count] = process = _Process(self.config, count, files, self._timeout())
        return process

    def _following(self, item: pytest.Item, count: int) -> str | None:
        """The test after this one in the same process: what both need need not be torn down."""
        marked = self.marked[count]
        after = marked.index(item) + 1
        return marked[after].nodeid if after < len(marked) else None


class _Process:
    """A pytest process with `count` devices that runs tests when it is asked to."""

    def __init__(self, config: pytest.Config, count: int, files: list[str], timeout: float) -> None:
        self.config, self.count, self.timeout = config, count, timeout
        self.ready = self.busy = False
        self.over = ""  # why, once it is
        shown = config.getoption("capture") == "no"
        self.log: IO[bytes] | None = None if shown else tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=config.invocation_params.dir,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends that one
        )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        base = config.getoption("basetemp")
        job = {
            "args": list(map(str, config.invocation_params.args)),
            "basetemp": f"{base}-devices-{count}" if base else None,
            "count": count,
            "files": files,
            "path": sys.path,
        }
        self._write(json.dumps(job).encode() + b"\n")

    def run(self, item: pytest.Item, following: str | None, timeout: float) -> Iterator[pytest.TestReport]:
        """Reports of a test as they come; of a test that cannot be run, or ends its process, one failure."""
        started, phase = time.time(), "setup"
        try:
            if self.over:
                raise LostError(self.over)
            self.busy = True
            if not self.ready:
                self._hear(time.monotonic() + self.timeout, "ready", self.timeout)
                self.ready = True
            deadline = time.monotonic() + timeout
            self._write(pickle.dumps({"run": item.nodeid, "following": following}))
            while (answer := self._hear(deadline, "done", timeout)) != {"done": item.nodeid}:
                if "warning" in answer:
                    self._warn(answer.pop("warning"), answer)
                    continue
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=answer["report"]
                )
                phase = {"setup": "call"}.get(report.when, "teardown")
                yield report
            self.busy = False
        except LostError as why:
            self.over = str(why)
            self.kill()
            yield pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="failed",
                longrepr=f"in a process with {self.count} devices: {why}",
                when=phase,  # type: ignore[arg-type]
                duration=time.time() - started,
                start=started,
                stop=time.time(),
            )

    def close(self) -> None:
        """Lets it finish its session, unless it is in the middle of a test."""
        if not self.over and not self.busy:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.process.stdin.close()  # type: ignore[union-attr]
                self.process.wait(self.timeout)
        self.kill()

    def kill(self) -> None:
        """Ends it, and what it started, whatever they are doing."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.listener.join()
        for stream in filter(None, (self.process.stdin, self.process.stdout, self.log)):
            with contextlib.suppress(OSError):  # what could not be sent before it ended
                stream.close()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, pickle.UnpicklingError, OSError):
            while True:
                self.answers.put(pickle.load(self.process.stdout))  # type: ignore[arg-type]
        self.answers.put(None)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # what it has to say about it is heard
            self.process.stdin.write(data)  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def _warn(self, what: tuple[str, str, str, int], rest: dict[str, Any]) -> None:
        text, category, file, line = what
        said = warnings.WarningMessage(text, getattr(builtins, category), file, line)
        self.config.hook.pytest_warning_recorded.call_historic(kwargs={"warning_message": said, **rest})

    def _hear(self, deadline: float, what: str, timeout: float) -> dict[str, Any]:
        try:
            answer = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.process.send_signal(signal.SIGUSR1)  # it says where it is
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            raise LostError(f"not {what} within {timeout:g} s, ended\n{self._said()}") from None
        if answer is None:
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise LostError(f"the process ended by {how}\n{self._said()}")
        if "refused" in answer:
            raise LostError(answer["refused"])
        return answer

    def _said(self) -> str:
        if self.log is None:
            return ""
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        return re.sub(r"^Extension modules: .*\n?", "", text[-8000:], flags=re.MULTILINE)
