"""All roles of `cmx serve` at once: on this machine, or as commands for several.

    python scripts/cluster.py [MODEL] [--prefill 2] [--decode 1] [--cache 1] [--port 8000] [-- FLAGS]
    python scripts/cluster.py --hosts 10.0.0.1,10.0.0.2,10.0.0.3    # prints what to start where

The router listens on the port, workers and cache servers behind it. Flags behind `--` go to the workers. Here
the roles run until Ctrl-C, or until one of them ends. For machines the roles are dealt to the hosts in turn,
the router to the first; all need the same CMX_CLUSTER_SECRET.
"""

import argparse
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

SECRET = "CMX_CLUSTER_SECRET"


@dataclass(frozen=True)
class Role:
    """One process: where it is, and its command."""

    name: str
    host: str
    command: list[str]


def plan(args: argparse.Namespace, hosts: list[str]) -> list[Role]:
    """Caches, workers and the router, in the order in which they start."""
    names = [f"{kind}-{n}" for kind in ("cache", "prefill", "decode") for n in range(getattr(args, kind))]
    at = {name: (hosts[i % len(hosts)], args.port + 1 + i) for i, name in enumerate(names)}

    def where(kind: str) -> list[str]:
        return [f"{host}:{port}" for name, (host, port) in at.items() if name.startswith(kind)]

    caches = [part for address in where("cache") for part in ("--cache-server", address)]
    roles = []
    for name, (host, port) in at.items():
        kind = name.split("-")[0]
        command = ["cmx", "serve", "--role", kind, "--host", host, "--port", str(port)]
        if kind != "cache":
            command[2:2] = [args.model]
            command += args.flags
        roles.append(Role(name, host, command + (caches if kind == "prefill" else [])))
    router = ["cmx", "serve", args.model, "--role", "router", "--host", hosts[0], "--port", str(args.port)]
    for kind in ("prefill", "decode"):
        router += [part for address in where(kind) for part in (f"--{kind}", f"http://{address}")]
    return [*roles, Role("router", hosts[0], router)]


def run(roles: list[Role]) -> int:
    """Starts all and waits; ends all when one ends."""
    environment = {SECRET: secrets.token_hex(32), **os.environ}
    here = [sys.executable, "-m", "cmx_jax.cli"]
    running = {r.name: subprocess.Popen([*here, *r.command[1:]], env=environment) for r in roles}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while all(process.poll() is None for process in running.values()):
            time.sleep(0.2)
        for name, process in running.items():
            if process.poll() is not None:
                print(f"{name} ended with exit code {process.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for process in reversed(running.values()):  # the router first
            process.terminate()
        for process in running.values():
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--cache", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000, help="of the router; the others have the next ones")
    parser.add_argument("--hosts", help="addresses of machines, by comma: print what to start on each")
    known, flags = sys.argv[1:], []
    if "--" in known:
        known, flags = known[: known.index("--")], known[known.index("--") + 1 :]
    args = parser.parse_args(known)
    args.flags = flags
    if args.prefill < 1 or args.decode < 1 or args.cache < 0:
        parser.error("expected at least one prefill and one decode worker")
    if not args.hosts:
        return run(plan(args, ["127.0.0.1"]))
    print(f"export {SECRET}=...  # the same on all")
    for role in plan(args, args.hosts.split(",")):
        print(f"{role.host}: {shlex.join(role.command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
