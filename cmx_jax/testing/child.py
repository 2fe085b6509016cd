"""The child process of `processes.py`: a pytest session that runs the tests that its parent asks for."""

import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from cmx_jax.errors import CmxError

# options that only the parent obeys: distribution, debugging, selection by the cache, reports, early stops
DISABLED_OPTIONS = {
    **dict.fromkeys(("usepdb", "trace", "lf", "failedfirst", "newfirst", "stepwise", "cacheclear"), False),
    **dict.fromkeys(("setuponly", "setupshow", "setupplan", "looponfail", "distload", "pyargs"), False),
    **dict.fromkeys(("numprocesses", "maxprocesses", "xmlpath"), None),
    **{"dist": "no", "tx": [], "maxfail": 0},
}


Message = dict[str, Any]
"""One pickled message between the processes.

A request has `run`, the id of a test, and `following`, the id of the next one or None. An answer has `ready`;
`refused` with a reason; `report`, a serialised report; `warning`, with the other arguments of pytest's hook;
`exit`, the message and return code of `pytest.exit`; `interrupt`, for a KeyboardInterrupt; or `done`, the id
of a test that has ended."""


@dataclass(frozen=True)
class ChildJob:
    """The session that a child process runs.

    Attributes:
      args: Arguments of the parent's command line.
      basetemp: Base folder for temporary files, or None.
      count: Number of devices.
      files: Files with tests for that number.
      path: Value of `sys.path` in the parent.
    """

    args: list[str]
    basetemp: str | None
    count: int
    files: list[str]
    path: list[str]


def serve(job: ChildJob) -> NoReturn:
    """Runs the session of a job, with requests on stdin and answers on stdout, and exits."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what tests print is not taken for an answer
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR1, file=os.dup(2))  # a copy, since pytest captures 2
    # pytest rewrites the asserts of a package with a plugin, and warns that this module is imported already
    quiet = ("-W", "ignore:Module already imported so cannot be rewritten")
    raise SystemExit(pytest.main([*job.args, *quiet], plugins=[_Session(job, requests, answers)]))


class _Session:
    """The plugin that runs requested tests instead of all tests in order."""

    def __init__(self, job: ChildJob, requests: Any, answers: Any) -> None:
        self.job, self.stream, self.answers = job, requests, answers
        self.requests: queue.Queue[Message | None] = queue.Queue()
        self.busy = False
        self.collection_errors: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        for name, value in {**DISABLED_OPTIONS, "basetemp": self.job.basetemp}.items():
            if hasattr(config.option, name):
                setattr(config.option, name, value)
        config.args = self.job.files

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.unregister(name="terminalreporter")
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from cmx_jax.mesh.host import request_exactly

        try:
            if self.collection_errors:
                raise CmxError("\n".join(self.collection_errors))
            request_exactly(self.job.count)
        except CmxError as error:
            self._send({"refused": str(error)})
            return True
        items = {item.nodeid: item for item in session.items}
        self._send({"ready": True})
        while request := self.requests.get():
            item = items.get(request["run"])
            if item is None:
                reason = "was not collected in the child process: do names of tests change between runs?"
                self._send({"refused": f"{request['run']} {reason}"})
                return True
            self.busy = True
            session._setupstate.teardown_exact(item)  # in case another test was announced as the next
            try:
                item.ihook.pytest_runtest_protocol(item=item, nextitem=items.get(request["following"]))
            except pytest.exit.Exception as stop:
                self._send({"exit": (stop.msg, stop.returncode)})
                return True
            except KeyboardInterrupt:
                self._send({"interrupt": True})
                return True
            finally:
                self.busy = False
            self._send({"done": item.nodeid})
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # only this process knows the failed subtests that make a test fail; terminals ask for that
        self.config.hook.pytest_report_teststatus(report=report, config=self.config)
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self._send({"report": data})

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        if self.busy:  # the parent has those of collection itself
            w = warning_message
            category = next(c.__name__ for c in w.category.__mro__ if c.__module__ == "builtins")
            details = {"when": when, "nodeid": nodeid, "location": location}
            self._send({"warning": (str(w.message), category, w.filename, w.lineno), **details})

    def _send(self, answer: Message) -> None:
        pickle.dump(answer, self.answers)
        self.answers.flush()

    def _listen(self) -> None:
        """Puts requests into the queue; ends the process if the parent is gone in the middle of a test."""
        try:
            while True:
                self.requests.put(pickle.load(self.stream))
        except EOFError:
            self.requests.put(None)
        if self.busy:
            os._exit(1)
