"""Watch the cloud's metadata server for the end of a spot node, and drain the node in Ray when it is announced.

Ray takes a drained node for lost in due course: it gives it no new work, and its loss costs a training run no failure. Nodes
get this file alone, by a file mount, so it imports nothing of this project: python preemption.py --cloud aws
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

POLL_S = 2.0
_TIMEOUT_S = 2.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches a node's own metadata
_GCP_NOTICE_S = 30  # how long Compute Engine leaves a node after its notice; EC2 says the moment itself


class Notice(NamedTuple):
    what: str
    remaining_s: int


def aws_notice(metadata_url: str) -> Notice | None:
    """EC2's spot notice, by the second version of its metadata service, which wants a token before it answers."""
    token = _request(f"{metadata_url}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if token is None:
        raise ConnectionError(f"{metadata_url} gives no token")
    said = _request(f"{metadata_url}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
    if said is None:
        return None
    notice = json.loads(said)
    end = datetime.strptime(notice["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return Notice(f"EC2 will {notice['action']} the node", max(0, int(end.timestamp() - time.time())))


def gcp_notice(metadata_url: str) -> Notice | None:
    """Compute Engine's notice that the node is being preempted."""
    said = _request(f"{metadata_url}/computeMetadata/v1/instance/preempted", "GET", {"Metadata-Flavor": "Google"})
    return Notice("Compute Engine preempts the node", _GCP_NOTICE_S) if said == "TRUE" else None


CLOUDS: dict[str, tuple[Callable[[str], Notice | None], str]] = {
    "aws": (aws_notice, "http://169.254.169.254"),
    "gcp": (gcp_notice, "http://metadata.google.internal"),
}
"""How each cloud is asked, and where its metadata server is."""


def drain(notice: Notice, node_id: str | None = None) -> None:
    """Tell Ray that this node, or the one of that id, will be gone; CalledProcessError if Ray does not take it."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.what]
    node = ["--node-id", node_id] if node_id else []
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *node, *reason]
    subprocess.run([*command, "--deadline-remaining-seconds", str(notice.remaining_s)], check=True)


def watch(ask: Callable[[], Notice | None], drain: Callable[[Notice], None], poll_s: float = POLL_S) -> Notice:
    """Ask until there is a notice and Ray has taken it. A server or a head that does not answer, or answers what nobody
    expects, is logged and asked again."""
    while True:
        try:
            notice = ask()
            if notice is not None:
                print(f"{notice.what} in {notice.remaining_s} s: draining it.", flush=True)
                drain(notice)
                return notice
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{error}; asking again.", file=sys.stderr, flush=True)
        except Exception:
            logging.exception("asking again")
        time.sleep(poll_s)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cloud", required=True, choices=CLOUDS)
    parser.add_argument("--metadata-url", help="another metadata server than the cloud's own, such as a stand-in")
    options = parser.parse_args(arguments)
    ask, metadata_url = CLOUDS[options.cloud]
    watch(lambda: ask(options.metadata_url or metadata_url), drain)


def _request(url: str, method: str, headers: dict[str, str]) -> str | None:
    """The answer's text, or None where there is nothing (404): a node without a notice."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT_S) as answer:
            return answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


if __name__ == "__main__":
    main()
