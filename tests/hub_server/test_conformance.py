"""Our server passes the checks that are meant for the real one."""

import subprocess
import sys

import pytest

from tests.hub_server.fixtures import environment, hub


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_conformance(tmp_path, mode):
    with hub(tmp_path, mode) as server:
        command = [sys.executable, "-m", "tests.hub_server.conformance", "--namespace", server.user]
        variables = environment(server, tmp_path, mode)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout
        assert server.violations() == []
        assert server.repos() == []
