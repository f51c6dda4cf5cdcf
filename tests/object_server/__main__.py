"""`python -m tests.object_server`: serve until the standard input ends; tells address and keys as a line of JSON."""

import json
import sys
import threading
import urllib.request
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.object_server.watch import Watch

READ = ["s3:Get*", "s3:List*"]
ROOT = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Says nothing: the log of requests is kept elsewhere."""


def _user(endpoint: str, name: str, actions: list[str]) -> list[str]:
    iam = boto3.client("iam", endpoint_url=endpoint, **ROOT)
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=policy)
    return [key["AccessKeyId"], key["SecretAccessKey"]]


def main() -> None:
    """Serves S3 with two users: one may do all, one may only read."""
    told: dict[str, Any] = {}

    def client() -> Any:
        identity, secret = told["owner"]
        keys = {"aws_access_key_id": identity, "aws_secret_access_key": secret, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=told["endpoint"], **keys)

    def make_bucket(name: str) -> None:
        client().create_bucket(Bucket=name)

    def remove(path: str) -> None:
        bucket, _, key = path.partition("/")
        client().delete_object(Bucket=bucket, Key=key)

    application = Watch(DomainDispatcherApplication(create_backend_app), make_bucket, remove)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told["endpoint"] = f"http://127.0.0.1:{server.server_port}"
    told["owner"] = _user(told["endpoint"], "owner", ["s3:*"])
    told["reader"] = _user(told["endpoint"], "reader", READ)
    # From now on every request needs a signature that is right.
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{told['endpoint']}/moto-api/reset-auth", b"0", plain, method="POST")
    urllib.request.urlopen(request).close()
    print(json.dumps(told), flush=True)  # noqa: T201
    sys.stdin.read()


main()
