"""A store that speaks as S3 does, for tests: moto's server on a real socket, which checks signatures and conditions.

Between it and the socket stands `watch`, which keeps a log of the requests and makes faults.
"""
