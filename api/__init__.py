"""The REST job API. Empty until the service is built; uses `workers` and `merger`."""
