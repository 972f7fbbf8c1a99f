"""What may befall a cluster befalls it while a run trains: the losses at its end are those of a run that had peace."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.started import PATIENCE, Run, gone, two_cpus
from tests.processes import wait_until
from tests.several_nodes.conftest import Break, Site, losses, starts

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.ray, two_cpus]

TWO = ["--zero", "1", "--workers", "2", "--tracking.no-enabled"]


def test_a_network_that_is_away_for_5_seconds_is_waited_for(
    site: Site, words: list[str], one_node: Run, tmp_path: Path
) -> None:
    run = site.train(tmp_path, *words, *TWO)
    try:
        run.until_epoch(2)
        pause = Break("a node's network cut for 5 s")
        site.second.cut()
        time.sleep(5)
        site.second.mend()
        pause.until_back(run, [2])
        run.result()
    finally:
        site.second.mend()
        run.kill()
    assert starts(run) == [2], "nothing was to start again"
    assert losses(run) == losses(one_node)
    assert "starting again" not in run.output


def test_a_dead_node_is_waited_for(site: Site, words: list[str], one_node: Run, tmp_path: Path) -> None:
    """A fixed number of ranks goes on from the last checkpoint when there is a node again: the same to the bit."""
    run = site.train(tmp_path, *words, *TWO)
    short = "waiting for a node: launch.workers: 2 workers x 1 CPUs need 2 CPUs, the Ray cluster has 1"
    try:
        run.until_epoch(2)
        site.second.kill()
        wait_until(lambda: short in run.output or run.process.poll() is not None, PATIENCE)
        site.second.start_ray(site.head)
        death = Break("a node killed, from when another is there")
        death.until_back(run, [2, 2])
        run.result()
    finally:
        run.kill()
    assert starts(run) == [2, 2]
    assert losses(run) == losses(one_node) and run.result() == one_node.result()
    assert "starting again from the last checkpoint (1 of 2)" in run.output and "Traceback" not in run.output


def test_ranks_go_with_a_node_that_is_cut_off_and_come_with_it(
    site: Site, words: list[str], one_node: Run, tmp_path: Path
) -> None:
    """Nobody is told that the network is gone: Ray finds out, the other node's rank goes on alone. When the cable is in
    again and Ray started anew on the node, there are two."""
    run = site.train(tmp_path, *words, "--epochs", "9999", *TWO, "--workers", "1:2")
    try:
        run.until_epoch(2)
        loss = Break("a node's network cut for good, --workers 1:2")
        site.second.cut()
        loss.until_back(run, [2, 1])
        site.second.mend()
        gain = Break("a node joins, --workers 1:2")
        site.second.restart_ray(site.head)
        gain.until_back(run, [2, 1, 2])
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130, run.output
    finally:
        site.second.mend()
        run.kill()
    assert "1 of 2 workers, as there is room for no more" in run.output and "Traceback" not in run.output
    assert re.search(r"1 -> 2 workers, as there is room for them; saved after step [\d,]+, starting again", run.output)
    seen = losses(run)
    assert seen.keys() == set(range(1, max(seen) + 1)), "epochs were left out"
    for epoch, numbers in losses(one_node).items():
        assert seen[epoch]["train_loss"] == pytest.approx(numbers["train_loss"], rel=1e-3), epoch


def test_a_bucket_that_is_away_for_30_seconds_is_waited_for(
    site: Site, words: list[str], one_node: Run, tmp_path: Path
) -> None:
    """It goes when the ranks have started and fetched nothing; its checkpoints' mirror is in it, too. Five tries take
    about as long: where they are not enough, the ranks pause and start again."""
    for node in (site.head, site.second):
        shutil.rmtree(node.folder / "cache", ignore_errors=True)
    run = site.train(tmp_path, *words, *TWO, "--checkpoint.mirror", "s3://owners-data/mirror")
    try:
        run.until(lambda event: event["event"] == "start", "no start of the ranks")
        pause = Break("the bucket away for 30 s, before a shard was fetched")
        site.bucket.cut()
        before = site.gets()
        time.sleep(30)
        site.bucket.mend()
        pause.until_back(run)
        run.result()
    finally:
        site.bucket.mend()
        run.kill()
    assert (site.gets() - before).total() > 0, "the shards were there already"
    assert starts(run) == [2] or (starts(run) == [2, 2] and "5 tries in" in run.output), run.output
    assert "Traceback" not in run.output
    assert losses(run) == losses(one_node) and run.result() == one_node.result()
    listed = "from tests.shards.remote.servers import Bucket, BUCKET; c = Bucket('http://bucket:5000').client; "
    listed += "print(*(o['Key'] for o in c.list_objects_v2(Bucket=BUCKET, Prefix='mirror')['Contents']))"
    assert f"mirror/{run.folder.name}/result.json" in site.head.run(sys.executable, "-c", listed).stdout.split()


def test_a_head_that_is_lost_takes_the_run_along_which_goes_on_with_the_next(
    site: Site, words: list[str], one_node: Run, tmp_path: Path
) -> None:
    """Ray's head is its memory: every process of the cluster ends with it. What is on the disk survives."""
    run = site.train(tmp_path, *words, *TWO)
    try:
        run.until_epoch(2)
        death = Break("the head killed and started again, then --resume")
        rank = next(pid for pid in site.second.pids() if "RayTrainWorker" in " ".join(psutil.Process(pid).cmdline()))
        site.head.kill()
        assert gone(rank, PATIENCE), "a rank outlives its cluster"
        site.head.start_ray()
        site.second.restart_ray(site.head)
        again = Run(tmp_path, "--resume", str(run.folder), on=site.head)
        death.until_back(again, [2, 2])
        try:
            again.result()
        finally:
            again.kill()
    finally:
        run.kill()
    assert starts(run) == [2, 2] and losses(run) == losses(one_node) and again.result() == one_node.result()
