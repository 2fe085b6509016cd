"""The other end of `processes.py`: a pytest session that runs tests as they are asked for."""

import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import warnings
from typing import Any, NoReturn

import pytest

from cmx_jax.errors import CmxError

# what only the first process does: send tests elsewhere, debug, choose by the cache, report, stop
OFF = {
    **dict.fromkeys(("usepdb", "trace", "lf", "failedfirst", "newfirst", "stepwise", "cacheclear"), False),
    **dict.fromkeys(("setuponly", "setupshow", "setupplan", "looponfail", "distload", "pyargs"), False),
    **dict.fromkeys(("numprocesses", "maxprocesses", "xmlpath"), None),
    **{"dist": "no", "tx": [], "maxfail": 0},
}


def serve(job: dict[str, Any]) -> NoReturn:
    """Runs the session of a job, and exits."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what tests print is no answer
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGUSR1, file=os.dup(2))  # pytest captures 2
    # of a package that has a plugin pytest rewrites the asserts, and warns that it is too late for this one
    late = ("-W", "ignore:Module already imported so cannot be rewritten")
    raise SystemExit(pytest.main([*job["args"], *late], plugins=[_Served(job, requests, answers)]))


class _Served:
    """The plugin that takes requests instead of a loop over all tests."""

    def __init__(self, job: dict[str, Any], requests: Any, answers: Any) -> None:
        self.job, self.stream, self.answers = job, requests, answers
        self.requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.busy = False
        self.broken: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        for name, value in {**OFF, "basetemp": self.job["basetemp"]}.items():
            if hasattr(config.option, name):
                setattr(config.option, name, value)
        config.args = self.job["files"]

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.unregister(name="terminalreporter")
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from cmx_jax.mesh.host import request_exactly

        try:
            if self.broken:
                raise CmxError("\n".join(self.broken))
            request_exactly(self.job["count"])
        except CmxError as error:
            self._tell({"refused": str(error)})
            return True
        items = {item.nodeid: item for item in session.items}
        self._tell({"ready": True})
        while request := self.requests.get():
            item = items.get(request["run"])
            if item is None:
                self._tell(
                    {"refused": f"{request['run']} was not collected there: do names of tests change?"}
                )
                return True
            self.busy = True
            session._setupstate.teardown_exact(item)  # if not this one was to follow
            item.ihook.pytest_runtest_protocol(item=item, nextitem=items.get(request["following"]))
            self.busy = False
            self._tell({"done": item.nodeid})
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self._tell({"report": data})

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        if self.busy:  # those of collection the first process has, too
            w = warning_message
            category = next(c.__name__ for c in w.category.__mro__ if c.__module__ == "builtins")
            told = {"when": when, "nodeid": nodeid, "location": location}
            self._tell({"warning": (str(w.message), category, w.filename, w.lineno), **told})

    def _tell(self, answer: dict[str, Any]) -> None:
        pickle.dump(answer, self.answers)
        self.answers.flush()

    def _listen(self) -> None:
        """Requests to the queue; nobody is left to hear what a test says when they end in its middle."""
        try:
            while True:
                self.requests.put(pickle.load(self.stream))
        except EOFError:
            self.requests.put(None)
        if self.busy:
            os._exit(1)
