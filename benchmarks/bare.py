"""The least that a program does before its first step: ``python -m benchmarks.bare local|ray RANKS FILE``.

Torch, DeepSpeed (ZeRO 1) and, under ``ray``, Ray Train with their defaults, as their own first pages show it; one
linear layer, one step on made-up numbers. No recipe, data set, run folder, MLflow, check, text encoder. When rank 0 has
stepped it writes the time to FILE. `benchmarks.startup` runs it beside `mmsa-dist train`.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    launcher, ranks, told = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if launcher == "ray":
        under_ray(ranks, told)
    elif launcher == "local":
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "benchmarks.bare", "rank", str(ranks), told]
            places = [{**os.environ, "RANK": str(rank), "RENDEZVOUS": f"{folder}/rendezvous"} for rank in range(ranks)]
            processes = [subprocess.Popen(words, env=place) for place in places]
            codes = [process.wait() for process in processes]
            if any(codes):
                raise SystemExit("error: a rank of the bare program failed")
    else:
        import torch.distributed as dist

        rendezvous = f"file://{os.environ['RENDEZVOUS']}"
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
        dist.init_process_group("gloo", init_method=rendezvous, rank=int(os.environ["RANK"]), world_size=ranks)
        first_step(told)


def under_ray(ranks: int, told: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        config = {"told": told}
        scaling, run = ScalingConfig(num_workers=ranks), RunConfig(storage_path=folder, name="bare")
        TorchTrainer(_rank, train_loop_config=config, scaling_config=scaling, run_config=run).fit()
    ray.shutdown()


def _rank(config: dict[str, Any]) -> None:
    first_step(config["told"])


def first_step(told: str) -> None:
    """This rank's, in a process group that exists already."""
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes 20 s and a compiler
    module = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(torch.randn(4, 8)).square().mean())
    engine.step()
    if dist.get_rank() == 0:
        Path(told).write_text(str(time.time()))
    engine.destroy()


if __name__ == "__main__":
    main()
