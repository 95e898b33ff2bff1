"""An S3 server on this machine: SeaweedFS."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from processes import Processes, free_ports


def start_s3(state: Processes) -> None:
    """Start it, with the bucket `paella`; `state.variables` then has the AWS variables by which clients find it."""
    flags = [f"-{name}.port{kind}" for name in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(flags, free_ports(len(flags)), strict=True))
    state.variables |= {
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['-s3.port']}",
    }
    keys = [{"accessKey": "local", "secretKey": state.variables["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": "local", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config = state.directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    (state.directory / "s3").mkdir()
    chosen = [f"{flag}={port}" for flag, port in ports.items()]
    command = [
        Path(sys.executable).with_name("weed"), "server", f"-dir={state.directory / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-filer", "-s3", *chosen, f"-s3.config={config}", "-volume.max=50", "-master.volumeSizeLimitMB=64",
        "-s3.port.iceberg=0", "-s3.port.lance=0",  # their default ports may be taken
    ]  # fmt: skip
    state.start("s3", command)
    state.wait("the S3 server", lambda: _make_bucket(state.variables))


def _make_bucket(variables: Mapping[str, str]) -> None:
    """It answers before it can store anything."""
    client = s3_client(variables)
    with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="paella")
    client.put_object(Bucket="paella", Key="ready", Body=b"")


def s3_client(variables: Mapping[str, str]) -> Any:
    """A client of the server that the AWS variables name."""
    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_DEFAULT_REGION"],
        config=Config(retries={"max_attempts": 1}, connect_timeout=5),
    )
