"""One batch script for Slurm: starts a Ray head and its workers by srun, waits, submits, ends with the job's code."""

import shlex

from cluster import job
from cluster.description import Description
from cluster.errors import ConfigError

NOTICE = 120
"""Seconds before its time is up that the script is told, so that the run can be saved."""


def script(description: Description) -> str:
    """The sbatch file.

    Raises:
        ConfigError: the command says what the description decides; the shared disk is an address.
    """
    if "\n" in "".join(description.slurm.setup):
        raise ConfigError("slurm.setup: one shell line for each entry")
    return "\n".join([_header(description), _BODY_START, _setup(description), _body(description)])


def _header(d: Description) -> str:
    workers, slurm = d.workers, d.slurm
    minutes = max(1, round(slurm.hours * 60))
    span = f"{workers.least}-{workers.most}" if workers.least != workers.most else f"{workers.most}"
    elastic = workers.least < workers.most
    options = [
        f"--job-name={d.name}",
        f"--nodes={span}",  # as few and as many as the run goes on with
        "--ntasks-per-node=1",
        f"--cpus-per-task={workers.cpus}",
        f"--mem={workers.memory_gib}G",
        f"--gpus-per-node={f'{workers.gpu}:' if workers.gpu else ''}{workers.gpus}" if workers.gpus else "",
        f"--time={minutes // 60:02d}:{minutes % 60:02d}:00",
        f"--partition={slurm.partition}" if slurm.partition else "",
        f"--account={slurm.account}" if slurm.account else "",
        f"--qos={slurm.qos}" if slurm.qos else "",
        f"--output={d.name}-%j.log",
        "--open-mode=append",
    ]
    lines = [f"#SBATCH {option}" for option in options if option]
    lines += [
        f"# {NOTICE} s before the time is up this script is told: the run is saved, the job queued again",
        f"#SBATCH --signal=B:TERM@{NOTICE}",
        "# also after a preemption, or when a node fails",
        "#SBATCH --requeue",
        *(["# a node that fails ends only its own ranks: the others go on", "#SBATCH --no-kill"] if elastic else []),
    ]
    return "\n".join(["#!/bin/bash", *_about(d), *lines])


def _about(d: Description) -> list[str]:
    return [
        "#",
        f"# {d.name}: a Ray cluster for one command, within a Slurm job. Written by `mmsa-dist cluster render slurm`.",
        "#",
        f"#   sbatch {d.name}.sbatch",
        f"#   tail -f {d.name}-JOBID.log",
        "#   scancel --signal=TERM --batch JOBID    ends it in good order: saved, and gone on with by the next sbatch",
        "#",
        "# The exit code is the command's own: 0 done, 2 the command is wrong, 3 the data is wrong, 4 training failed,",
        "# 75 something outside failed, 143 stopped.",
        "#",
    ]


_BODY_START = """
set -e

# What makes `python` the right one, on this node and, as srun hands the environment on, on all others."""


def _setup(d: Description) -> str:
    return "\n".join(d.slurm.setup) or ": # slurm.setup: module load …, or source …/bin/activate"


def _home(path: str) -> str:
    """A path as a word of the shell, in which ``~/`` is still the home of whoever runs it."""
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def _body(d: Description) -> str:
    gpus = f" --num-gpus={d.workers.gpus}" if d.workers.gpus else ""
    interval = f"# {why}\n" if (why := job.why_so_often(d)) else ""
    mlflow = f"export MLFLOW_TRACKING_URI={shlex.join([d.mlflow])}\n" if d.mlflow else ""
    words = job.words(d, nodes="@nodes@")
    command = job.folded(words, 4, end=" \\").replace("@nodes@", f'"{d.workers.least}:$count"', 1)
    return _BODY.format(
        python=_home(d.slurm.python),
        runs=shlex.join([d.runs]),
        cpus=d.workers.cpus,
        gpus=gpus,
        no_kill=" --no-kill" if d.workers.least < d.workers.most else "",
        mlflow=mlflow,
        cache=d.cache_gib,
        interval=interval,
        command=command,
        stop=job.STOP,
        late=NOTICE + 60,
        requeues=d.slurm.requeues,
        name=d.name,
    )


_BODY = r"""
set -uo pipefail # only now: what others wrote may read variables that are not set
python=$(command -v {python}) || {{ echo "error: no" {python} "here: see slurm.python and slurm.setup" >&2; exit 2; }}
ray=$(dirname "$python")/ray
[[ -x $ray ]] || {{ echo "error: $python has no Ray beside it ($ray)" >&2; exit 2; }}
runs={runs}

# --- who and where ----------------------------------------------------------------------------------------------------

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
count=${{#nodes[@]}}
head=${{nodes[0]}} # where this script runs
address=$(getent ahostsv4 "$head" | awk 'NR == 1 {{ print $1 }}')

# Ports of this job's own, below those that the kernel hands out: another job may share the node.
port=$((20000 + SLURM_JOB_ID % 1200 * 10))
dashboard=$((port + 1))
agent=$((port + 3)) # of the head's node
cluster=http://127.0.0.1:$dashboard
job={name}-$SLURM_JOB_ID

# Only who can read this file can use the cluster. On the shared disk, as every node reads it.
mkdir -p "$runs"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$runs/.token-$SLURM_JOB_ID"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")

export RAY_USAGE_STATS_ENABLED=0
export RAY_JOB_STOP_WAIT_TIME_S={stop} # to finish the step and save; Ray's own is 3
export MMSA_CACHE_BYTES={cache}G       # of shards from a bucket, on each node
{mlflow}
temporary=$(mktemp -d "/tmp/ray-$SLURM_JOB_ID-XXXX") # short: sockets are made below it
work=$temporary/work                                # what is sent along: nothing, as the package is installed
mkdir "$work" && echo "{name}" >"$work/README"

# --- whatever happens, nothing stays behind ---------------------------------------------------------------------------

steps=()
cleanup() {{
    trap - EXIT
    trap '' TERM
    for step in ${{steps[@]+"${{steps[@]}}"}}; do
        kill "$step" 2>/dev/null || true # srun hands it on, and `ray start --block` ends its node
    done
    for step in ${{steps[@]+"${{steps[@]}}"}}; do
        wait "$step" 2>/dev/null || true
    done
    rm -rf "$RAY_AUTH_TOKEN_PATH" "$temporary"
    if ((count > 1)); then
        srun --overlap --nodes="$count" --ntasks="$count" --ntasks-per-node=1 rm -rf "$temporary" || true
    fi
}}
trap cleanup EXIT

stopped=
submitted=
# shellcheck disable=SC2329 # the trap calls it
stop() {{
    trap '' TERM
    stopped=yes
    echo "told to end: the run is saved first"
    [[ -n $submitted ]] || exit 143
    # a job that is only being sent cannot be stopped yet
    until "$ray" job stop --address "$cluster" "$job"; do
        kill -0 "$submitted" 2>/dev/null || break
        sleep 1
    done
}}
trap stop TERM

# --- the cluster ------------------------------------------------------------------------------------------------------

start_head() {{
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --cpus-per-task={cpus} \
        "$ray" start --head --block --node-ip-address="$address" --port="$port" --num-cpus={cpus}{gpus} \
        --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --ray-client-server-port=$((port + 2)) \
        --dashboard-agent-listen-port="$agent" --temp-dir="$temporary" &
    steps=($!)
}}

listens() {{
    (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}}

start_head
tries=1
for ((second = 0; ; second++)); do
    if ! kill -0 "${{steps[0]}}" 2>/dev/null; then # Ray gives a node 30 s, which on a busy machine may not do
        ((tries++ < 4)) || {{ echo "error: the head ended while it started, $((tries - 1)) times" >&2; exit 75; }}
        echo "the head ended while it started: starting it again" >&2
        start_head
    fi
    # the agent is there when the node is
    if listens "$dashboard" && listens "$agent"; then break; fi
    ((second < 600)) || {{ echo "error: no head after $second s" >&2; exit 75; }}
    sleep 1
done

if ((count > 1)); then
    # each finds its own address, on the network on which the head is known by name
    # shellcheck disable=SC2016 # it is the node that expands this
    start='exec "$@" --node-ip-address="$(getent ahostsv4 "$SLURMD_NODENAME" | awk "NR == 1 {{ print \$1 }}")"'
    srun --overlap --nodes=$((count - 1)) --ntasks=$((count - 1)) --ntasks-per-node=1 \
        --exclude="$head" --cpus-per-task={cpus} --kill-on-bad-exit=0{no_kill} \
        bash -c "$start" worker \
        "$ray" start --block --address="$address:$port" --num-cpus={cpus}{gpus} \
        --dashboard-agent-listen-port=$((port + 4)) &
    steps+=($!)
fi

# --- the command ------------------------------------------------------------------------------------------------------

# `cluster run` waits for the nodes, and goes on with the run that an earlier attempt has begun.
{interval}"$python" -m mmsa_dist submit --address "$cluster" --name "$job" \
    --working-dir "$work" --python "$python" -- \
    {command} &
submitted=$!

code=0
wait "$submitted" || code=$? # a signal ends this wait, not the command
if [[ -n $stopped ]]; then
    code=0
    wait "$submitted" || code=$?
fi

# A job whose time is up is queued again. One that was preempted Slurm itself queues again; one that somebody ends ends.
left=$((${{SLURM_JOB_END_TIME:-9999999999}} - $(date +%s)))
if [[ -n $stopped && $code == 143 ]] && ((left < {late})); then
    if ((${{SLURM_RESTART_COUNT:-0}} < {requeues})); then
        cleanup
        echo "the time is up: queued again, to go on from the last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "the time is up, after $((SLURM_RESTART_COUNT + 1)) attempts; sbatch goes on from the last checkpoint" >&2
    fi
fi
exit "$code"
"""
