"""`mmsa-dist doctor`'s look at a bucket: by training's own calls, on a real S3 endpoint; nothing stays there."""

import json
from typing import Any

import pytest

from shards.remote.probe import main
from tests.shards.remote.servers import BUCKET, Bucket

TOKEN = "mmsa-dist-doctor-test"
PLACE = f"s3://{BUCKET}/runs"


def keys(bucket: Bucket) -> list[str]:
    """Below `PLACE`: other tests have left data sets in the bucket."""
    return [item["Key"] for item in bucket.client.list_objects_v2(Bucket=BUCKET, Prefix="runs/").get("Contents", [])]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_bucket_is_written_read_and_left_as_it_was(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "leave", PLACE, TOKEN)
    assert keys(bucket) == [f"runs/{TOKEN}-mark"]
    told(capsys, "read", PLACE, TOKEN)
    rates = told(capsys, "write", PLACE, TOKEN, "0", "2")
    assert rates["write_bytes_per_s"] > 0 and rates["read_bytes_per_s"] > 0
    bucket.put(f"runs/{TOKEN}-7", b"of a node that was killed")
    bucket.put("runs/run/result.json", b"somebody's")
    told(capsys, "forget", PLACE, TOKEN)
    assert keys(bucket) == ["runs/run/result.json"]


@pytest.mark.parametrize(("place", "code"), [("s3://no-such-bucket/runs", 3), ("https://host/runs", 2)])
def test_a_bucket_that_is_none_is_a_sentence(
    place: str, code: int, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leave", place, TOKEN]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and place in said and len(said.splitlines()) == 1
