"""A Hub-compatible server for tests, on loopback, that the real huggingface_hub and hf_xet work with.

Modules from the bottom: `faults` and `log`; `wire` (HTTP on plain sockets: a test wants to cut them); `errors`;
`git`, `blobs`, `xet_formats`, `xet` (contents); `store` (repositories); `site` (tokens, rights, signed addresses);
`repos`, `files`, `commits`, `discussions`, `lfs` (the API's endpoints), `cas` (Xet's), `cdn`; `server`, `admin`,
`process` (how a test holds it); `fixtures` (where to begin); `conformance` (the same checks for any endpoint).

It is our reading of the API. It has models only (no datasets, spaces or buckets), it refuses no rates of its own
accord, and it forgets everything when it ends.
"""
