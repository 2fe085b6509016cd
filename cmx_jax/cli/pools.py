"""`cmx pools`: the instances of a running server, and changes of their number."""

import argparse
import os
from typing import Any

from cmx_jax.cli.common import add_json, show
from cmx_jax.errors import CmxError


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("pools", help="show the instances of a running server, or change their number")
    verb.set_defaults(run=_pools)
    verb.add_argument(
        "--url", default="http://127.0.0.1:8000", help="URL of the server (default http://127.0.0.1:8000)"
    )
    verb.add_argument("--api-key", help="API key of the server (default: CMX_API_KEY)")
    verb.add_argument(
        "--admin-key", help="admin key of the server, needed for changes (default: CMX_ADMIN_KEY)"
    )
    verb.add_argument("--prefill", type=int, metavar="N", help="number of prefill instances from now on")
    verb.add_argument(
        "--decode", type=int, metavar="N", help="number of decode instances from now on (default 1)"
    )
    grace = "seconds that running requests on removed instances have to finish (default 30)"
    verb.add_argument("--grace-s", type=float, default=30.0, help=grace)
    add_json(verb)


def _pools(args: argparse.Namespace) -> None:
    import httpx

    if args.prefill is None and args.decode is not None:
        raise CmxError("--decode alone, expected --prefill too: the NPUs are carved as a whole")
    keys = {"GET": args.api_key or os.environ.get("CMX_API_KEY")}
    keys["POST"] = args.admin_key or os.environ.get("CMX_ADMIN_KEY")

    def ask(method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {keys[method]}"} if keys[method] else {}
        try:
            answer = httpx.request(method, args.url + path, headers=headers, timeout=600, **options)
            document = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise CmxError(f"--url {args.url}: no server answers there ({error})") from None
        if answer.status_code != 200:
            raise CmxError(f"the server says: {document['error']['message']}")
        return document

    if args.prefill is not None:
        body = {"prefill": args.prefill, "decode": args.decode or 1, "grace_s": args.grace_s}
        ask("POST", "/admin/pools", json=body)
    status = ask("GET", "/status")
    names = ("model", "deployment", "state", "instances")
    show({name: status[name] for name in names}, args.json, _rendered)


def _rendered(status: dict[str, Any]) -> str:
    rows = [f"{status['model']}, {status['deployment']}: {status['state']}"]
    for i in status["instances"]:
        last = i["first_npu"] + i["npus"] - 1
        rows.append(
            f"{i['name']:<24}{'+'.join(i['roles']):<16}NPUs {i['first_npu']:>3}-{last:<5}"
            f"{i['requests']:>4} requests {i['pages_used']:>6} of {i['pages']} pages"
        )
    return "\n".join(rows)
