"""The plugin as a user has it: loaded by its entry point, in separate runs of pytest.

Runs are few, since each starts JAX several times.
"""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with cmx_jax installed: pytest finds the entry points of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = pytester.mkdir(f"cmx_jax-{project['version']}.dist-info")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: cmx_jax\nVersion: {project['version']}\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"]["pytest11"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "PYTEST_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}{os.pathsep}{ROOT}")
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error")
    return pytester


def outcomes(result: pytest.RunResult) -> dict[str, str]:
    """Returns the outcome of each test from the lines of `-rA`."""
    text = result.stdout.str()
    matches = re.findall(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) \S*::(\S+)", text, flags=re.MULTILINE)
    return {name: outcome for outcome, name in matches}


def test_package_imports_lazily(elsewhere: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others import NumPy
    elsewhere.makepyfile(
        """
        import sys

        def test_it(pytestconfig, supernode_mesh):
            assert pytestconfig.pluginmanager.has_plugin("cmx")
            heavy = {"jax", "jaxlib", "numpy", "cmx_jax.mesh", "cmx_jax.testing.coded"}
            assert not heavy & set(sys.modules)
        """
    )
    elsewhere.runpytest_subprocess("-p", "cmx").assert_outcomes(passed=1)


def test_plugin_gives_devices_and_reports_outcomes(elsewhere: pytest.Pytester) -> None:
    """Eight devices are more than the run has, four fewer; one test never ends, one kills its process."""
    elsewhere.makeconftest(
        """
        import os, jax, pytest
        jax.config.update("jax_num_cpu_devices", 6)  # what the run has

        @pytest.fixture(scope="module")
        def shared():
            print("made in", os.getpid())
            return []
        """
    )
    elsewhere.makepyfile(
        test_all="""
        import os, time, warnings
        import jax, pytest

        PID = os.environ.setdefault("FIRST", str(os.getpid()))

        def sees(count, elsewhere):
            assert [d.platform for d in jax.devices()] == ["cpu"] * count
            assert (str(os.getpid()) != PID) == elsewhere

        def test_unmarked(shared):
            shared.append(0)
            sees(6, False)

        @pytest.mark.devices(6)
        def test_as_many_as_here(shared):
            assert shared == [0]
            sees(6, False)

        @pytest.mark.devices(8)
        class TestEight:
            def test_first(self, shared):
                sees(8, True)
                shared.append(os.getpid())

            @pytest.mark.devices(4)
            def test_nearest(self):
                sees(4, True)

            @pytest.mark.parametrize("x", [1, "a::b[c]"])
            def test_same_process(self, shared, x, tmp_path):
                assert shared == [os.getpid()]

        @pytest.mark.devices(8)
        def test_fails():
            secret = 41
            assert secret == 42

        @pytest.mark.devices(8)
        def test_skips():
            pytest.skip("not today")

        @pytest.mark.devices(8)
        @pytest.mark.xfail(reason="known")
        def test_known():
            raise RuntimeError

        @pytest.mark.devices(8)
        def test_warns():
            warnings.warn("careful")

        @pytest.mark.devices(8)
        @pytest.mark.filterwarnings("default")
        def test_may_warn():
            warnings.warn("old", DeprecationWarning)

        @pytest.fixture
        def torn():
            yield
            raise RuntimeError("torn down badly")

        @pytest.mark.devices(8)
        def test_teardown(torn):
            pass

        @pytest.mark.devices(8)
        def test_crashes():
            os.abort()

        @pytest.mark.devices(8, timeout=1)
        def test_hangs():
            time.sleep(1000)

        def test_unmarked_again(shared):
            assert shared == [0]

        @pytest.mark.devices(4)
        def test_last(shared):
            sees(4, True)
        """,
        test_other="def test_other(): pass",
    )
    result = elsewhere.runpytest_subprocess("-rA", "-v")
    by_name = outcomes(result)
    broken = {name for name, outcome in by_name.items() if outcome == "FAILED"}
    assert broken == {"test_fails", "test_warns", "test_crashes", "test_hangs"}
    assert by_name["test_known"] == "XFAIL"
    result.assert_outcomes(passed=11, failed=4, skipped=1, xfailed=1, errors=1, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*test_all.py::TestEight::test_first PASSED*",
            "*RuntimeError: torn down badly",
            "*secret = 41*",
            ">*assert secret == 42",
            "E*assert 41 == 42",
            "*UserWarning: careful",
            "in a process with 8 devices: the process ended by SIGABRT",
            "Fatal Python error: Aborted",
            "in a process with 8 devices: not done within 1 s*",
            "*test_all.py*in test_hangs",
            "*DeprecationWarning: old",
            "SKIPPED*not today",
        ]
    )


def test_subtests_fail_their_test(elsewhere: pytest.Pytester) -> None:
    """As natively: a failed subtest is reported, and the test that contains it fails."""
    elsewhere.makepyfile(
        """
        import pytest

        @pytest.mark.devices(3)
        def test_it(subtests):
            for i in range(3):
                with subtests.test(i=i):
                    assert i != 1

        def test_here():
            pass
        """
    )
    result = elsewhere.runpytest_subprocess("-rA")
    assert outcomes(result)["test_it"] == "FAILED"
    result.stdout.fnmatch_lines(["*SUBFAILED*test_it*", "*contains 1 failed subtest*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        ("pytest.exit('enough', returncode=7)", 7, "*Exit: enough*"),
        ("raise KeyboardInterrupt", pytest.ExitCode.INTERRUPTED, "*KeyboardInterrupt*"),
    ],
)
def test_exit_of_a_test_ends_the_session(elsewhere: pytest.Pytester, stop: str, code: int, line: str) -> None:
    elsewhere.makepyfile(
        f"""
        import pytest

        @pytest.mark.devices(3)
        def test_stops():
            {stop}

        def test_after():
            pass
        """
    )
    result = elsewhere.runpytest_subprocess("-rA")
    assert result.ret == code
    result.stdout.fnmatch_lines([line])
    assert "test_after" not in outcomes(result)


def test_plugin_with_xdist_and_384_devices(elsewhere: pytest.Pytester) -> None:
    elsewhere.makepyfile(
        """
        import jax, pytest
        from cmx_jax.testing import rank_coded

        def test_unmarked(worker_id):
            assert worker_id.startswith("gw")

        @pytest.mark.devices(384)
        @pytest.mark.parametrize("n", range(3))
        def test_wide(n, supernode_mesh):
            assert len(jax.devices()) == 384
            assert supernode_mesh({"ep": 16}).size == 16
        """
    )
    elsewhere.runpytest_subprocess("-n", "1").assert_outcomes(passed=4)


def test_single_count_stays_in_its_process(
    elsewhere: pytest.Pytester,
) -> None:
    """All tests need 24 devices, so they run here; a wrong marker in another file is a usage error."""
    elsewhere.makepyfile(
        test_a="""
        import os, jax, pytest
        from cmx_jax import CmxError
        from cmx_jax.mesh import carve

        PID = os.environ.setdefault("FIRST", str(os.getpid()))
        pytestmark = pytest.mark.devices(24)

        def test_here(supernode_mesh):
            assert str(os.getpid()) == PID
            pools = carve(decode_npus=8, prefill=2)
            mesh = supernode_mesh({"node": 2, "npu": 8}, on=pools.prefill[0])
            assert [d.id for d in mesh.devices.flat] == list(range(8, 24))
            with pytest.raises(CmxError, match="decode-0 has 8"):
                supernode_mesh({"ep": 16}, on=pools.decode[0])
            with pytest.raises(CmxError, match=r"devices 24 to 39, there are 24: .*devices\\(40\\)"):
                supernode_mesh({"ep": 16}, on=pools.prefill[1])
        """,
        test_b="import pytest\n@pytest.mark.devices('8')\ndef test_it(): pass",
    )
    elsewhere.runpytest_subprocess("test_a.py").assert_outcomes(passed=1)
    result = elsewhere.runpytest_subprocess("test_b.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: test_b.py::test_it: devices('8'), expected devices(count, *"])


def test_interrupted_run_leaves_no_process(elsewhere: pytest.Pytester) -> None:
    elsewhere.makepyfile(
        """
        import os, pathlib, time, pytest

        @pytest.mark.devices(2)
        def test_it():
            pathlib.Path("pid.new").write_text(str(os.getpid()))
            os.rename("pid.new", "pid")
            time.sleep(1000)

        def test_unmarked(): pass
        """
    )
    # a run in the background of a shell is deaf to SIGINT, and so is what it starts
    code = (
        "import signal, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); exit(pytest.main())"
    )
    command = [sys.executable, "-c", code, "-o", "devices_timeout=60"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    pid = elsewhere.path / "pid"
    while not pid.exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate()
    assert run.returncode == pytest.ExitCode.INTERRUPTED, output
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_example_of_the_docs(elsewhere: pytest.Pytester) -> None:
    section = (ROOT / "docs" / "testing.md").read_text()
    elsewhere.makepyfile(section.partition("```python\n")[2].partition("```")[0])
    elsewhere.runpytest_subprocess().assert_outcomes(passed=4)
