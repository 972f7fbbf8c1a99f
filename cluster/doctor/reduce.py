"""All-reduce between nodes: what a step of training waits for. Runs there, one rank in each process.

Latency is the median time of 4 KiB; bandwidth is what each rank's link carries of 64 MiB: 2 (n - 1) / n of the bytes in
a ring (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
"""

import os
import socket
import statistics
import time
from datetime import timedelta
from typing import Any

from cluster.doctor.finding import ASIDE, Finding

SMALL, LARGE = 4 * 2**10, 64 * 2**20
"""Bytes."""
SLOW_SECONDS, SLOW_BYTES = 0.05, 100e6
"""Latency, and bytes a second, beyond which a line is yellow: less than a gigabit link gives."""
EXAMPLE = 4 * 110e6
"""Bytes of gradients of an encoder of 110 million parameters, in fp32."""


def port(wanted: dict[str, Any]) -> list[Finding]:
    """A free port of this node, in the finding's facts."""
    with socket.create_server(("", 0)) as free:
        return [Finding("network", "port", "ok", "", facts={"port": free.getsockname()[1]})]


def look(wanted: dict[str, Any]) -> list[Finding]:
    """One rank of an all-reduce; rank 0 tells the numbers.

    Args:
        wanted: ``backend`` (gloo, nccl), ``rank``, ``world``, ``gpu`` of this rank, ``rendezvous`` (tcp://… or
            file://…), ``seconds`` to wait for the others, ``nodes`` that take part.
    """
    import torch
    import torch.distributed as dist

    backend, world, seconds = wanted["backend"], wanted["world"], wanted["seconds"]
    check = f"all-reduce, {backend}"
    device = torch.device("cuda", wanted["gpu"]) if backend == "nccl" else torch.device("cpu")
    stage = "meeting the others"
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, init_method=wanted["rendezvous"], rank=wanted["rank"], world_size=world,
            timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        stage = "adding up"
        small = _times(torch.ones(SMALL // 4, device=device), 30, world)
        large = _times(torch.ones(LARGE // 4, device=device), 3, world)
    except Exception as error:  # torch raises RuntimeErrors of many kinds, and its own
        return [_failed(check, stage, error, wanted)]
    latency, bandwidth = statistics.median(small), 2 * (world - 1) / world * LARGE / min(large)
    facts = {"latency_s": latency, "bytes_per_s": bandwidth, "world": world, "backend": backend}
    if wanted["rank"]:
        return []
    step = 2 * (world - 1) / world * EXAMPLE / bandwidth
    text = f"{world} ranks: {1e3 * latency:.2f} ms for 4 KiB, {bandwidth / 1e6:,.0f} MB/s for 64 MiB"
    text += f" (gradients of 110 M parameters: {step:.2g} s)"
    if latency > SLOW_SECONDS or bandwidth < SLOW_BYTES:
        name = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        remedy = (
            f"set {name} to the fastest interface of every node (see `ip addr`), place nodes nearer to one another, "
        )
        remedy += "or let ranks speak less often (--optim.accumulation)"
        return [Finding("network", check, "warn", text, remedy, facts=facts)]
    return [Finding("network", check, "ok", text, facts=facts)]


def _times(tensor: Any, repeats: int, world: int) -> list[float]:
    """Seconds of each all-reduce, after one that opens the connections.

    Raises:
        ArithmeticError: the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(repeats + 1):
        tensor.fill_(1.0)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if not bool((tensor == world).all()):
            raise ArithmeticError(f"the sum of {world} ones came out as {float(tensor.max())}")
    return times[1:]


def _failed(check: str, stage: str, error: Exception, wanted: dict[str, Any]) -> Finding:
    """Why, and what to do about it."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = said.partition("Exception raised from")[0].strip()[:160]
    name = "NCCL_SOCKET_IFNAME" if wanted["backend"] == "nccl" else "GLOO_SOCKET_IFNAME"
    given = os.environ.get(name)
    own = advertised()
    text = f"{stage}: {said}"
    if given and "interface" in said.lower():
        return Finding("network", check, "fail", text, f"{name} is {given!r} there; name an interface of `ip addr`")
    if own.startswith("127.") and wanted["nodes"] > 1 and not given:
        remedy = f"this node's host name stands for {own}, where no other finds it: set {name} to its interface in the "
        remedy += "cluster's network (`ip addr`) before Ray is started, or mend /etc/hosts"
        return Finding("network", check, "fail", f"{text}; host name is {own}", remedy)
    remedy = (
        f"open all TCP ports between the nodes (firewall, security group, network policy), and set {name} on every "
    )
    remedy += "node to the interface of the cluster's network (`ip addr`) before Ray is started"
    if isinstance(error, ImportError):
        remedy = "install torch there"
    return Finding("network", check, "fail", text, remedy, code=ASIDE)


def advertised() -> str:
    """The address that the host name stands for, which gloo tells its peers unless an interface is named."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "no address"
