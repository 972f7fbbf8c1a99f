"""Files for Ray's cluster launcher, `ray up`: on EC2 and on Google Compute Engine.

The head is rented at the usual price and computes nothing; workers may be spot. The dashboard listens on the head's
loopback alone, which `ray dashboard` and `ray attach` reach through ssh, and asks for the cluster's token.
"""

from typing import Protocol

from cluster import job
from cluster.description import Description
from cluster.errors import ConfigError
from cluster.manifests.text import block, comment, needed, plain, quoted

TOKEN = "~/.ray/auth_token"
"""Where every node has the token: Ray looks there by itself too."""
EFS = "nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport"
FILESTORE = "hard,timeo=600,retrans=3"
"""How the clouds' own NFS is to be mounted, as they say."""


def aws(description: Description) -> str:
    """The cluster file for EC2.

    Raises:
        ConfigError: the description lacks something, or holds what EC2 cannot do.
    """
    d = description
    _check(d)
    region = needed(d.cloud.region, "cloud.region", "AWS needs one, e.g. us-west-2")
    zones = ",".join(d.cloud.zones)
    provider = f"""
        type: aws
        region: {plain(region)}
        @zones
        cache_stopped_nodes: false  # what is given back is gone, and costs nothing
        # Workers without public addresses: subnets with a NAT gateway, and
        # use_internal_ips: true
    """
    in_order = f"availability_zone: {quoted(zones)}  # in this order" if zones else ""

    def node(machine: str, *, head: bool) -> str:
        spot = d.workers.spot and not head
        profile = d.cloud.identity if not head else None  # the head's is Ray's own, which may rent the others
        text = f"""
            InstanceType: {plain(machine)}
            @image
            BlockDeviceMappings:
              - DeviceName: /dev/sda1
                Ebs: {{VolumeSize: {d.cloud.disk_gib}, VolumeType: gp3, Encrypted: true}}
            MetadataOptions: {{HttpTokens: required, HttpPutResponseHopLimit: 2}}
            @spot
            @profile
        """
        return block(
            text,
            image=f"ImageId: {plain(d.cloud.machine_image)}" if d.cloud.machine_image else "",
            spot="InstanceMarketOptions: {MarketType: spot}  # taken away two minutes after a notice" if spot else "",
            profile=f"IamInstanceProfile: {{Name: {quoted(profile)}}}  # opens the bucket" if profile else "",
        )

    return _file(d, "aws", block(provider, zones=in_order), node, EFS, "boto3")


def gcp(description: Description) -> str:
    """The cluster file for Google Compute Engine.

    Raises:
        ConfigError: the description lacks something, or holds what it cannot do.
    """
    d = description
    _check(d)
    region = needed(d.cloud.region, "cloud.region", "Google Cloud needs one, e.g. us-central1")
    project = needed(d.cloud.project, "cloud.project", "the id of the Google Cloud project")
    if len(d.cloud.zones) != 1:
        raise ConfigError(
            f"cloud.zones: {len(d.cloud.zones)} given; Google Cloud takes exactly one, e.g. us-central1-a"
        )
    image = d.cloud.machine_image
    if d.workers.gpus and image is None:
        raise ConfigError(
            "cloud.machine_image is missing: name an image with NVIDIA's driver, such as a family of "
            "projects/deeplearning-platform-release"
        )
    image = image or "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
    provider = f"""
        type: gcp
        region: {plain(region)}
        availability_zone: {plain(d.cloud.zones[0])}
        project_id: {plain(project)}
    """

    def node(machine: str, *, head: bool) -> str:
        w = d.workers
        built_in = machine.split("-")[0] in ("a2", "a3", "a4", "g2", "g4")  # such machines have their GPUs
        gpus = w.gpus if not head and not built_in else 0
        kind = (
            needed(w.gpu, "workers.gpu", "the kind that Google Cloud is to add, e.g. nvidia-tesla-t4") if gpus else ""
        )
        stays = "TERMINATE" if w.gpus and not head else "MIGRATE"
        schedule = (
            "{provisioningModel: SPOT, instanceTerminationAction: DELETE, onHostMaintenance: TERMINATE, "
            "automaticRestart: false}  # may be taken away, 30 s after a notice"
            if w.spot and not head
            else f"{{onHostMaintenance: {stays}}}"
        )
        account = d.cloud.identity if not head else None  # the head's is Ray's own, which may rent the others
        text = f"""
            machineType: {plain(machine)}
            disks:
              - boot: true
                autoDelete: true
                type: PERSISTENT
                initializeParams:
                  diskSizeGb: {d.cloud.disk_gib}
                  sourceImage: {plain(image)}
            scheduling: {schedule}
            @gpus
            @account
        """
        opens = f"""
            serviceAccounts:  # opens the bucket
              - email: {plain(account or "")}
                scopes: [https://www.googleapis.com/auth/cloud-platform]
        """
        added = f"guestAccelerators: [{{acceleratorType: {quoted(kind)}, acceleratorCount: {gpus}}}]" if gpus else ""
        return block(text, gpus=added, account=opens if account else "")

    return _file(d, "gcp", provider, node, FILESTORE, "google-api-python-client")


def _check(d: Description) -> None:
    """What both clouds ask.

    Raises:
        ConfigError: something is missing, or lies where the nodes cannot reach it.
    """
    if d.storage and not d.storage.startswith(("s3://", "gs://")):
        raise ConfigError(
            f"storage: {d.storage} is a place on one machine, which is gone with it; give s3://BUCKET/FOLDER or "
            "gs://BUCKET/FOLDER"
        )
    asked = {
        "shared.nfs": (d.shared.nfs, "run folders must be on a disk that all nodes see (EFS or Filestore, HOST:/PATH)"),
        "head.machine": (d.head.machine, "the machine type of the head"),
        "workers.machine": (d.workers.machine, "the machine type of the workers"),
    }
    if missing := [f"{key} is missing: {why}" for key, (value, why) in asked.items() if value is None]:
        raise ConfigError("; ".join(missing))


class _Node(Protocol):
    def __call__(self, machine: str, *, head: bool) -> str: ...


def _file(d: Description, cloud: str, provider: str, node: _Node, mount: str, library: str) -> str:
    w = d.workers
    assert d.head.machine and w.machine
    gpus = f", GPU: {w.gpus}" if w.gpus else ""
    parts = [
        _about(d, cloud),
        f"cluster_name: {plain(d.name)}",
        f"max_workers: {w.most}",
        f"idle_timeout_minutes: {w.idle_minutes:g}  # of a node beyond min_workers that has nothing to do",
        "upscaling_speed: 100  # all nodes that are asked for, at once",
        "",
        "provider:",
        block(provider, 2),
        "",
        "auth:",
        f"  ssh_user: {plain(d.cloud.ssh_user)}  # Ray makes a key pair of its own",
        "",
        *(_docker(d) if d.image else []),
        "head_node_type: head",
        "available_node_types:",
        "  head:  # never spot: it holds the cluster together",
        "    resources: {CPU: 0}  # computes nothing; it runs the driver of each job",
        "    min_workers: 0",
        "    max_workers: 0",
        "    node_config:",
        block(node(d.head.machine, head=True), 6),
        "  worker:",
        f"    resources: {{CPU: {w.cpus}{gpus}}}",
        f"    min_workers: {w.least}",
        f"    max_workers: {w.most}",
        "    node_config:",
        block(node(w.machine, head=False), 6),
        "",
        *_files(d),
        *_commands(d, mount, library),
    ]
    return "\n".join(parts)


def _about(d: Description, cloud: str) -> str:
    file, address = f"{d.name}.{cloud}.yaml", "http://127.0.0.1:8265"
    run = job.folded(job.words(d), 0, width=10**6)
    lines = [
        f"# {d.name}: a Ray cluster on {'EC2' if cloud == 'aws' else 'Google Compute Engine'}. "
        f"Written by `mmsa-dist cluster render ray-up-{cloud}`.",
        "#",
        "#   ray get-auth-token --generate   # once: every node gets the file that it writes",
        f"#   ray up {file}",
        f"#   ray dashboard {file}   # leaves {address} open, through ssh",
        "#   export RAY_AUTH_MODE=token",
        f"#   mmsa-dist submit --address {address} -- {run}",
        f"#   ray down {file}",
        "#",
        comment(
            "Nobody but who has the token and reaches the head by ssh can use the cluster. Run folders are on the "
            f"disk that all nodes see ({d.shared.path}); the submitted command goes on with a run that it has begun."
        ),
    ]
    if why := job.why_so_often(d):
        lines.append(comment(f"It saves {why}."))
    return "\n".join([*lines, ""])


def _docker(d: Description) -> list[str]:
    return [
        "docker:",
        f"  image: {quoted(d.image or '')}",
        "  container_name: mmsa-dist",
        "  pull_before_run: true",
        "  run_options:",
        "    - --ulimit nofile=65536:65536",
        f"    - -v {d.shared.path}:{d.shared.path}",
        "",
    ]


def _files(d: Description) -> list[str]:
    sent = [] if d.image else [f'  "~/mmsa-dist": {quoted(d.source)}']
    lines = ["file_mounts:", f'  "{TOKEN}": {quoted(d.token)}  # the token itself is in no file of this cluster', *sent]
    if not d.image:
        lines += ["rsync_exclude: [.git, .venv, runs, data]", "rsync_filter: [.gitignore]"]
    return [*lines, "cluster_synced_files: []", ""]


_INSTALL = "sudo apt-get update && sudo apt-get install -y"
_DOCKER = f"  - command -v docker || ({_INSTALL} docker.io && sudo usermod -aG docker $USER)"


def _commands(d: Description, mount: str, library: str) -> list[str]:
    path, nfs = d.shared.path, d.shared.nfs
    extras = ",".join(sorted(job.reads_bucket(d)))
    python = "~/mmsa-dist-venv/bin/python"
    lines = [
        "initialization_commands:  # of every machine, before anything else",
        *([_DOCKER] if d.image else []),
        f"  - command -v mount.nfs || ({_INSTALL} nfs-common)",
        f"  - sudo mkdir -p {path}",
        f"  - mountpoint -q {path} || sudo mount -t nfs -o {mount} {nfs} {path}",
        f"  - mkdir -p {path}/runs 2>/dev/null || (sudo mkdir -p {path}/runs && sudo chmod 1777 {path}/runs)",
        "",
    ]
    if d.image:
        lines += ["setup_commands: []  # all is in the image", ""]
    else:
        wanted = f'"$HOME/mmsa-dist[{extras}]"' if extras else "~/mmsa-dist"
        lines += [
            "setup_commands:  # the versions that were tested together, on every machine alike; Python 3.11 or newer",
            f"  - python3 -c 'import ensurepip' || ({_INSTALL} python3-venv)",
            f"  - test -x {python} || python3 -m venv ~/mmsa-dist-venv",
            f"  - {python} -m pip install --quiet -c ~/mmsa-dist/constraints.txt {wanted}",
            "  - grep -q mmsa-dist-venv ~/.bashrc || echo 'PATH=\"$HOME/mmsa-dist-venv/bin:$PATH\"' >> ~/.bashrc",
            "",
        ]
    rents = f"{python} -m pip install --quiet -c ~/mmsa-dist/constraints.txt {library}"
    lines += ["head_setup_commands: []"] if d.image else ["head_setup_commands:  # to rent the others", f"  - {rents}"]
    lines += ["worker_setup_commands: []", ""]
    environment = [
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={TOKEN.replace('~', '$HOME')}",
        "RAY_USAGE_STATS_ENABLED=0",
        f"RAY_JOB_STOP_WAIT_TIME_S={job.STOP}",
        f"MMSA_CACHE_BYTES={d.cache_gib}G",
        *([f"MLFLOW_TRACKING_URI={d.mlflow}"] if d.mlflow else []),
    ]
    export = f"export {' '.join(environment)}"
    return [
        *lines,
        comment(f"A job that is stopped has {job.STOP} s to finish its step and to save."),
        "head_start_ray_commands:",
        "  - ray stop",
        "  - >-",
        "    ulimit -n 65536;",
        f"    {export};",
        "    ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1",
        "worker_start_ray_commands:",
        "  - ray stop",
        "  - >-",
        "    ulimit -n 65536;",
        f"    {export};",
        "    ray start --address=$RAY_HEAD_IP:6379",
        "",
    ]
