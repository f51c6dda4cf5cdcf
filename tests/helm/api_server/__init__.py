"""A Kubernetes API server on loopback: real helm installs into it. It runs no pods: `controllers.py` does."""

from tests.helm.api_server.server import ApiServer

__all__ = ["ApiServer"]
