"""`python -m tests.hub_server --root DIR --port 0 --mode lfs`: serve until the standard input ends."""

import argparse
import sys
from pathlib import Path

from tests.hub_server.server import HubServer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", type=Path, required=True, help="folder for what is uploaded")
parser.add_argument("--port", type=int, default=0, help="of the API; the others are chosen")
parser.add_argument("--mode", choices=("lfs", "xet"), default="lfs")
options = parser.parse_args()
with HubServer(options.root, options.mode, options.port) as server:
    print(f"ready {server.endpoint}", flush=True)  # noqa: T201
    sys.stdin.read()
