"""Runs tests that need another number of devices than this process has in a child process.

JAX keeps the number of devices with which it started, so each other number needs a process of its own. The
process starts with the first test that needs it, collects the same files by the same arguments, runs tests on
request (`child.py`) and ends with the session: fixtures live as in a run of those tests alone. A test runs in
this process if it has the right number already, or if all tests of the run need the same number (so that a
debugger works).

A test that takes too long, or kills its process, fails; the next one gets a new process.
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
from dataclasses import asdict, dataclass
from typing import IO

import pytest

from cmx_jax.testing.child import ChildJob, Message

START = (
    "import json, sys; job = json.loads(open(0, 'rb', 0, closefd=False).readline()); "
    "sys.path[:] = job['path']; from cmx_jax.testing.child import ChildJob, serve; serve(ChildJob(**job))"
)


@dataclass(frozen=True)
class DevicesMark:
    """The marker of a test.

    Attributes:
      count: Number of devices that the test needs.
      timeout: Seconds that it may take; None for the option `devices_timeout`.
    """

    count: int
    timeout: float | None = None


class ProcessLostError(Exception):
    """The child process cannot run tests any more; the message is the reason."""


def devices_mark(item: pytest.Item) -> DevicesMark | None:
    """Returns the marker of a test; None if it has none.

    Raises:
      UsageError: The arguments of the marker are wrong.
    """
    mark = item.get_closest_marker("devices")
    if mark is None:
        return None
    try:
        read = DevicesMark(*mark.args, **mark.kwargs)
        if type(read.count) is int and read.count > 0 and (read.timeout is None or read.timeout > 0):
            return read
    except TypeError:
        pass
    arguments = ", ".join(
        [*map(repr, mark.args), *(f"{name}={value!r}" for name, value in mark.kwargs.items())]
    )
    raise pytest.UsageError(
        f"{item.nodeid}: devices({arguments}), expected devices(count, timeout=seconds), both above zero"
    )


class DeviceProcesses:
    """The plugin that sends marked tests to the processes that can run them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.marked: dict[int, list[pytest.Item]] = {}
        self.same_count = False  # whether all tests of the run need the same number of devices
        self.processes: dict[int, _Process] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if mark := devices_mark(item):
                self.marked.setdefault(mark.count, []).append(item)
        self._timeout()  # so that a wrong option is reported before tests run
        self.same_count = [len(items) for items in self.marked.values()] == [len(session.items)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        mark = devices_mark(item)
        if mark is None or self._runs_here(mark.count):
            return None
        process = self._process(mark.count)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        following = self._following(item, mark.count)
        for report in process.run(item, following, mark.timeout or self._timeout()):
            item.ihook.pytest_runtest_logreport(report=report)
        # fixtures that earlier tests in this process left for this one
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
        option = self.config.getini("devices_timeout")
        with contextlib.suppress(ValueError):
            if float(option) > 0:
                return float(option)
        raise pytest.UsageError(f"devices_timeout is {option!r}, expected seconds, above zero")

    def _runs_here(self, count: int) -> bool:
        """Returns whether this process has, or can still get, that number of devices."""
        from cmx_jax.errors import CmxError
        from cmx_jax.mesh.host import has_exactly, request_exactly

        if self.same_count:
            with contextlib.suppress(CmxError):
                request_exactly(count)
        return has_exactly(count)

    def _process(self, count: int) -> "_Process":
        process = self.processes.get(count)
        # a process that could not start would not start now
        if process is None or (process.failure and process.ready):
            files = sorted({str(item.path) for item in self.marked[count]})
            self.processes[count] = process = _Process(self.config, count, files, self._timeout())
        return process

    def _following(self, item: pytest.Item, count: int) -> str | None:
        """Returns the next test in the same process, for which fixtures of both are kept."""
        marked = self.marked[count]
        after = marked.index(item) + 1
        return marked[after].nodeid if after < len(marked) else None


class _Process:
    """A pytest process with `count` devices that runs tests on request."""

    def __init__(self, config: pytest.Config, count: int, files: list[str], timeout: float) -> None:
        self.config, self.count, self.timeout = config, count, timeout
        self.ready = self.busy = False
        self.failure = ""  # the reason, once it cannot run tests any more
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
        self.answers: queue.Queue[Message | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        base = config.getoption("basetemp")
        job = ChildJob(
            args=list(map(str, config.invocation_params.args)),
            basetemp=f"{base}-devices-{count}" if base else None,
            count=count,
            files=files,
            path=sys.path,
        )
        self._send(json.dumps(asdict(job)).encode() + b"\n")

    def run(self, item: pytest.Item, following: str | None, timeout: float) -> Iterator[pytest.TestReport]:
        """Runs a test and yields its reports; a single failure if it cannot run, or ends its process."""
        started, phase = time.time(), "setup"
        try:
            if self.failure:
                raise ProcessLostError(self.failure)
            self.busy = True
            if not self.ready:
                self._receive(time.monotonic() + self.timeout, "ready", self.timeout)
                self.ready = True
            deadline = time.monotonic() + timeout
            self._send(pickle.dumps({"run": item.nodeid, "following": following}))
            while (answer := self._receive(deadline, "done", timeout)) != {"done": item.nodeid}:
                if "warning" in answer:
                    self._forward_warning(answer.pop("warning"), answer)
                    continue
                self._stop_with(answer)
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=answer["report"]
                )
                phase = {"setup": "call"}.get(report.when, "teardown")
                yield report
            self.busy = False
        except ProcessLostError as error:
            self.failure = str(error)
            self.kill()
            yield pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="failed",
                longrepr=f"in a process with {self.count} devices: {error}",
                when=phase,  # type: ignore[arg-type]
                duration=time.time() - started,
                start=started,
                stop=time.time(),
            )

    def _stop_with(self, answer: Message) -> None:
        """Ends the run as the test in the child did: by `pytest.exit` or a KeyboardInterrupt."""
        if "exit" in answer:
            self.busy = False
            reason, returncode = answer["exit"]
            pytest.exit(reason, returncode)
        if "interrupt" in answer:
            self.busy = False
            raise KeyboardInterrupt

    def close(self) -> None:
        """Lets the process finish its session, or kills it if it is in the middle of a test."""
        if not self.failure and not self.busy:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.process.stdin.close()  # type: ignore[union-attr]
                self.process.wait(self.timeout)
        self.kill()

    def kill(self) -> None:
        """Kills the process and the processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.listener.join()
        for stream in filter(None, (self.process.stdin, self.process.stdout, self.log)):
            with contextlib.suppress(OSError):  # there may be unsent data
                stream.close()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, pickle.UnpicklingError, OSError):
            while True:
                self.answers.put(pickle.load(self.process.stdout))  # type: ignore[arg-type]
        self.answers.put(None)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # why it ended is told by its exit code
            self.process.stdin.write(data)  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def _forward_warning(self, warning: tuple[str, str, str, int], details: Message) -> None:
        """Reports a warning of the child; `warning` is its text, category, file and line."""
        text, category, file, line = warning
        message = warnings.WarningMessage(text, getattr(builtins, category), file, line)
        self.config.hook.pytest_warning_recorded.call_historic(kwargs={"warning_message": message, **details})

    def _receive(self, deadline: float, event: str, timeout: float) -> Message:
        """Waits for an answer.

        Args:
          deadline: Time of `time.monotonic` until which to wait.
          event: Word for the event that is awaited, for the error.
          timeout: Seconds that were allowed, for the error.

        Raises:
          ProcessLostError: There is no answer in time, the process ended, or it refused.
        """
        try:
            answer = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.process.send_signal(signal.SIGUSR1)  # it dumps its stack
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            raise ProcessLostError(f"not {event} within {timeout:g} s, ended\n{self._log_tail()}") from None
        if answer is None:
            code = self.process.wait()
            ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ProcessLostError(f"the process ended by {ending}\n{self._log_tail()}")
        if "refused" in answer:
            raise ProcessLostError(answer["refused"])
        return answer

    def _log_tail(self) -> str:
        """Returns the end of the child's output, without the list of extension modules."""
        if self.log is None:
            return ""
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        return re.sub(r"^Extension modules: .*\n?", "", text[-8000:], flags=re.MULTILINE)
