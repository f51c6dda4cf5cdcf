"""How a test gets a Hub and a client that has never seen another one.

    with hub(tmp_path) as server:            # or mode="xet", or process=True
        server.add_model("org/a", folder)
        client(environment(server, tmp_path), "print(snapshot_download('org/a'))")

Within the test's process `HfApi(endpoint=server.endpoint, token=server.token)` is enough for the API. Uploads and
downloads belong into a process of their own (`client`): the library reads HF_HUB_DISABLE_XET and its caches' places at
import, and its uploads by LFS raise a DeprecationWarning of httpx2, which is an error in our tests.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hub_server.process import HubProcess
from tests.hub_server.server import HubServer, Mode

Hub = HubServer | HubProcess


@contextmanager
def hub(folder: Path, mode: Mode = "lfs", process: bool = False) -> Iterator[Any]:
    """A server while the block runs; its folder is `folder / "hub"`. In this process, or in one of its own."""
    with HubProcess(folder / "hub", mode) if process else HubServer(folder / "hub", mode) as server:
        yield server


def environment(server: Hub, folder: Path, mode: Mode = "lfs", **more: str) -> dict[str, str]:
    """The variables for a process whose client talks to this server, with caches of its own below `folder`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    told = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": server.token, "HF_HOME": str(folder / "hf_home")}
    return {**own, **quiet, **told, "HF_HUB_DISABLE_XET": "1" if mode == "lfs" else "0", **more}


def client(variables: Mapping[str, str], program: str, *arguments: str) -> str:
    """What a Python program prints that runs with these variables, after `from huggingface_hub import *`."""
    head = "import sys, json, pickle\nfrom pathlib import Path\nfrom huggingface_hub import *\napi = HfApi()\n"
    command = [sys.executable, "-c", head + program, *arguments]
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
