"""Runs one attempt of one job on a Ray cluster. Empty until the service is built; uses `merger` only."""
