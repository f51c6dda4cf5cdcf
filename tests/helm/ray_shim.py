"""`ray` as containers of the loopback cluster call it: the real command, with ports of its own for `ray start`.

Ray's nodes would have addresses of their own in a cluster; here they share 127.0.0.1, so a node takes the free ports
that its kubelet chose. The look for other clusters on this machine is taken out: a head would take their nodes for its
own.
"""

import os
import sys

from ray._private import services
from ray.scripts.scripts import main

_OPTIONS = {"port": 6379, "dashboard-port": 8265, "ray-client-server-port": 10001}
_EVERYWHERE = {"metrics-export-port": 8080, "dashboard-agent-listen-port": 52365}


def options(head: bool) -> list[str]:
    """What takes the place of options given before: the last one counts."""
    ports = _EVERYWHERE | (_OPTIONS if head else {})
    chosen = [f"--{name}={os.environ[f'LOOPBACK_PORT_{port}']}" for name, port in ports.items()]
    chosen += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
    chosen += ["--object-store-memory=100000000", "--disable-usage-stats"]
    return [*chosen, f"--temp-dir={os.environ['LOOPBACK_RAY']}"] if head else chosen


if __name__ == "__main__":
    services.find_gcs_addresses = set
    if sys.argv[1:2] == ["start"]:
        sys.argv += options("--head" in sys.argv)
    main()
