"""`cluster.yaml`: one typed description of a cluster and of what it shall run, from which every manifest is written.

Strict: an unknown key is an error that names the nearest valid one, and what contradicts itself is refused in one
sentence before anything is written. Holds names and addresses only: a token or password is told by where it lies.
"""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.errors import ConfigError
from cluster.suggest import nearest

CUDA = re.compile(r"cuda|cu1\d|gpu|nvidia", re.IGNORECASE)
"""What the name of an image with CUDA has in it."""
LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""A name that Kubernetes, Google Cloud and Slurm all take (RFC 1035)."""
BUCKET = ("s3", "gs")
"""Schemes of addresses that every node of a cloud reaches."""
WILDCARD = re.compile(r"0\.0\.0\.0|\[::\]")
LOOPBACK = re.compile(r"^(localhost|127\..*|::1)$")


class Strict(BaseModel):
    """Unknown keys are errors; nothing is converted; nothing changes after construction."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]*$")]
"""One line, for every reader of one."""
Word = Annotated[str, Field(min_length=1, pattern=r"^[\w.,:@+/-]+$")]
"""A name of somebody else's: one word, for every shell."""
Lines = Annotated[tuple[Text, ...], Field(strict=False)]
"""YAML's lists are tuples here."""


class Head(Strict):
    """The node that holds the cluster together. It runs the driver of each job and no rank."""

    cpus: int = Field(default=4, ge=1, le=4096)
    """CPUs."""
    memory_gib: int = Field(default=16, ge=2, le=65_536)
    """Memory in GiB."""
    machine: Word | None = None
    """Machine type of the cloud (ray up), e.g. m7i.xlarge or e2-standard-4."""
    spot: bool = False
    """Always false: when the head is taken away, so is every job."""

    @field_validator("spot")
    @classmethod
    def _kept(cls, spot: bool) -> bool:
        if spot:
            raise ValueError("a head that is taken away ends every job of its cluster; only workers.spot may be true")
        return spot


class Workers(Strict):
    """The nodes that train, all alike."""

    least: int = Field(default=1, ge=1, le=10_000)
    """Fewest nodes to go on with."""
    most: int = Field(default=1, ge=1, le=10_000)
    """Most nodes. More than `least`: nodes come and go, and a run goes on with as many ranks as there is room for."""
    cpus: int = Field(default=8, ge=1, le=4096)
    """CPUs of a node."""
    memory_gib: int = Field(default=32, ge=2, le=65_536)
    """Memory of a node in GiB."""
    gpus: int = Field(default=0, ge=0, le=64)
    """GPUs of a node."""
    gpu: Word | None = None
    """Kind of GPU, as the place calls it: nvidia-l4 (GKE, Google Cloud), NVIDIA-A10G (a node label), a100 (Slurm)."""
    ranks: int | None = Field(default=None, ge=1)
    """Ranks of a training run on a node. Unset: one for each GPU, else one."""
    machine: Word | None = None
    """Machine type of the cloud (ray up), e.g. g6.2xlarge or g2-standard-8."""
    spot: bool = False
    """Take spare capacity, which is cheap and may be taken away: runs go on from their last checkpoint."""
    idle_minutes: float = Field(default=5, gt=0, le=1e6)
    """Minutes without work after which a node above `least` is given back."""

    @property
    def ranks_each(self) -> int:
        """Ranks on a node."""
        return self.ranks or self.gpus or 1

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least: {self.least} nodes are more than most, {self.most}")
        if self.gpu and not self.gpus:
            raise ValueError(f"gpu: {self.gpu} is named, but gpus is 0; say how many a node has")
        if self.cpus < self.ranks_each:
            raise ValueError(f"cpus: {self.cpus} CPUs for {self.ranks_each} ranks; each needs one at least")
        return self


class Checkpoint(Strict):
    """How often a run is saved: after a fixed time, or so often that failures and saving together cost the least."""

    every_seconds: float | None = Field(default=None, ge=1, le=1e7)
    """Seconds between two checkpoints."""
    mtbf_hours: float | None = Field(default=None, gt=0, le=1e6)
    """Mean time between failures of the whole job, in hours: with N spot nodes that each last H hours it is H / N."""
    cost_seconds: float = Field(default=1.0, gt=0)
    """Seconds for which training stands still for a checkpoint; `mmsa-dist plan` measures it."""
    write_seconds: float = Field(default=30.0, ge=0)
    """Seconds in which one is written beside training; `mmsa-dist plan` measures it. None begins before."""

    @property
    def seconds(self) -> float | None:
        """Seconds between two checkpoints; None leaves it to the recipe.

        Source: Young 1974, Daly 2006: sqrt(2 C M), C the cost of a checkpoint, M the mean time between failures.
        """
        if self.mtbf_hours is None:
            return self.every_seconds
        return max((2 * self.cost_seconds * self.mtbf_hours * 3600) ** 0.5, self.write_seconds, 1.0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.every_seconds is not None and self.mtbf_hours is not None:
            raise ValueError("every_seconds and mtbf_hours both say how often; give one of them")
        return self


class Shared(Strict):
    """The disk that all nodes see at one path: run folders lie there, and data may."""

    path: Text = "/mnt/mmsa-dist"
    """Where it is on every node."""
    claim: Text | None = None
    """KubeRay: the PersistentVolumeClaim (ReadWriteMany) that is mounted there."""
    nfs: Text | None = None
    """ray up: the NFS export that is mounted there, HOST:/PATH (EFS, Filestore)."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not re.fullmatch(r"(/[\w.+-]+)+/?", path, re.ASCII):
            raise ValueError(
                f"{path} is no absolute path of letters, digits, dots, dashes and underscores; it must be the same on "
                "every node"
            )
        return path.rstrip("/")

    @field_validator("nfs")
    @classmethod
    def _export(cls, nfs: str | None) -> str | None:
        if nfs is not None and not re.fullmatch(r"[\w.-]+:/[\w./-]*", nfs):
            raise ValueError(f"{nfs} is no NFS export; expected HOST:/PATH")
        return nfs


class Cloud(Strict):
    """ray up: where the machines are rented."""

    region: Word | None = None
    """Region, e.g. us-west-2 or us-central1."""
    zones: Annotated[tuple[Word, ...], Field(strict=False)] = ()
    """Zones in order of preference; Google Cloud takes one."""
    project: Word | None = None
    """Google Cloud: the project's id."""
    machine_image: Word | None = None
    """AMI, or the path of a Google Cloud image. Unset: Ray's deep-learning AMI; Ubuntu 24.04 on Google Cloud."""
    identity: Word | None = None
    """What workers may do: the name of an instance profile (AWS), the e-mail of a service account (Google Cloud)."""
    ssh_user: Word = "ubuntu"
    """User of the machine image."""
    disk_gib: int = Field(default=200, ge=50)
    """Disk of a machine, in GiB: packages, and the cache of shards."""


class Kubernetes(Strict):
    """KubeRay 1.6 or newer."""

    namespace: Word = "default"
    """Namespace of everything."""
    service_account: Word | None = None
    """Service account of the pods, which gives them the bucket (workload identity, IRSA)."""
    head_service_account: Word | None = None
    """One for the head alone, which reads the bucket too; where nodes come and go KubeRay lets it ask for pods.
    Unset: service_account."""
    credentials_secret: Word | None = None
    """Secret with one file `credentials` that opens the bucket, where no service account does; mounted as a volume."""
    token_secret: Word | None = None
    """Secret with the key `auth_token`. Unset: NAME-ray-token."""
    spot_label: Text = "cloud.google.com/gke-spot=true"
    """Label and taint of spot nodes; eks.amazonaws.com/capacityType=SPOT, kubernetes.azure.com/scalesetpriority=spot
    elsewhere."""
    gpu_label: Word = "cloud.google.com/gke-accelerator"
    """Node label that holds the kind of GPU; nvidia.com/gpu.product with NVIDIA's GPU operator."""
    retries: int = Field(default=3, ge=0)
    """How often a failed job starts again, in a new cluster, and goes on from its last checkpoint."""
    keep_minutes: int = Field(default=10, ge=0)
    """Minutes for which a finished job's cluster stays, for its logs."""

    @field_validator("spot_label")
    @classmethod
    def _pair(cls, label: str) -> str:
        if not re.fullmatch(r"[\w./-]+=[\w.-]+", label):
            raise ValueError(f"{label} is no label; expected KEY=VALUE")
        return label


class Slurm(Strict):
    """A Slurm cluster with a disk that all nodes share."""

    partition: Word | None = None
    """Partition. Unset: the cluster's default."""
    account: Word | None = None
    """Account that pays."""
    qos: Word | None = None
    """Quality of service."""
    hours: float = Field(default=24, gt=0, le=8760)
    """Time limit of one attempt, in hours."""
    requeues: int = Field(default=10, ge=0)
    """How often a job whose time is up, or that was preempted, is queued again and goes on."""
    setup: Lines = ()
    """Shell lines that make `python` the right one: module load …, source …/bin/activate."""
    python: Text = "python"
    """Python that has mmsa-dist, on every node."""


class Description(Strict):
    """A cluster, and the command that it shall run."""

    name: Annotated[str, Field(pattern=LABEL, max_length=40)]
    """Name of the cluster, of its job and of the folder of its runs: lower case, digits and dashes, at most 40."""
    command: tuple[Text, ...]
    """What to run, without `mmsa-dist`: train ufen_mtfn --data s3://bucket/mosi."""
    image: Text | None = None
    """Container image with mmsa-dist (cluster/Dockerfile). KubeRay needs one; ray up takes it where there is one."""
    cuda: bool | None = None
    """Whether the image has CUDA. Unset: where its name says so (cuda, cu128, gpu)."""
    source: Text = "."
    """ray up without an image: the checkout that is sent to every machine and installed by its constraints.txt."""
    storage: Text | None = None
    """Bucket folder that checkpoints are sent to as well: s3://bucket/folder or gs://bucket/folder."""
    mlflow: Text | None = None
    """MLflow server, at an address that every node reaches. Unset: a sqlite file beside the runs, for one at a time."""
    token: Text = "~/.ray/auth_token"
    """ray up: file of this machine with the cluster's token (`ray get-auth-token --generate` makes one)."""
    cache_gib: int = Field(default=50, ge=1)
    """Bound of the cache of shards from a bucket on each node, in GiB."""
    head: Head = Head()
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    shared: Shared = Shared()
    cloud: Cloud = Cloud()
    kubernetes: Kubernetes = Kubernetes()
    slurm: Slurm = Slurm()

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, command: Any) -> Any:
        if isinstance(command, str):
            try:
                command = shlex.split(command)
            except ValueError as error:
                raise ValueError(f"{command}: {error}") from error
        if isinstance(command, list | tuple):
            command = tuple(command)[1:] if command and command[0] == "mmsa-dist" else tuple(command)
            if not command:
                raise ValueError("nothing to run; expected a command of mmsa-dist, as in train ufen_mtfn --data …")
        return command

    @field_validator("storage", "mlflow")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        if address is None:
            return None
        if WILDCARD.search(address):
            raise ValueError("0.0.0.0 is what a server listens at, on all its networks; give the address of one")
        if "@" in urlsplit(address).netloc or "?" in address:
            raise ValueError("holds a user, a password or a signature, which would be in every manifest; leave it out")
        return address.rstrip("/")

    @field_validator("mlflow")
    @classmethod
    def _server(cls, address: str | None) -> str | None:
        if address is None:
            return None
        parts = urlsplit(address)
        try:
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of a port beyond 65535
            valid = False
        if not valid or not re.fullmatch(r"[\w.:/\[\]~%+-]+", address, re.ASCII):
            raise ValueError(f"{address} is no server; expected http://HOST:PORT")
        if LOOPBACK.match(parts.hostname or ""):
            raise ValueError(f"{address} is each node itself; give the server's address within the cluster's network")
        return address

    @model_validator(mode="after")
    def _possible(self) -> Self:
        has_cuda = self.cuda if self.cuda is not None else bool(self.image and CUDA.search(self.image))
        if self.image and self.workers.gpus and not has_cuda:
            raise ValueError(
                f"workers.gpus: {self.workers.gpus} GPUs, but image {self.image} has no CUDA; name one that has "
                "(cluster/Dockerfile.cuda), or say cuda: true"
            )
        return self

    @property
    def runs(self) -> str:
        """The folder of this description's runs, the same on every node."""
        return f"{self.shared.path}/runs/{self.name}"

    def sets(self, key: str) -> bool:
        """Whether the file itself says something at a dotted key."""
        part: BaseModel = self
        *above, last = key.split(".")
        for name in above:
            part = getattr(part, name)
        return last in part.model_fields_set


# --- reading ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would drop the first."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: Path) -> Description:
    """The description in a YAML file.

    Raises:
        ConfigError: it cannot be read, an unknown key, a wrong value, a contradiction.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(
            f"--from {path}: {why}; `mmsa-dist cluster init --to {path}` writes one to start from"
        ) from error
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {problem or 'is no YAML'}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, as `mmsa-dist cluster init` writes them")
    try:
        return Description.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_sentence(each) for each in error.errors())}") from error


def _sentence(error: Any) -> str:
    """One of pydantic's errors: the key and what is wrong with it."""
    where = [str(part) for part in error["loc"] if part != "function-after[_words()]"]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(where[-1], _fields(where[:-1]))}"
    if error["type"] == "missing":
        return f"{key} is missing"
    why = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {why}" if key else why
    if error["type"] == "string_pattern_mismatch" and key == "name":
        why = "expected lower case, digits and dashes, a letter first"
    elif error["type"] == "string_pattern_mismatch":
        word = error["ctx"]["pattern"].startswith(r"^[\w")
        why = "expected one word of letters, digits and .,:@+/-" if word else "expected one line"
    return f"{key}: {why[0].lower()}{why[1:]}, found {error['input']!r}"


def _fields(where: list[str]) -> list[str]:
    """Names that may stand at a place of the tree."""
    model: Any = Description
    for part in where:
        annotation = model.model_fields[part].annotation
        model = next((each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")), None)
    return list(model.model_fields)
