"""Objects for KubeRay (API ray.io/v1): a cluster to submit commands to, or a job with a cluster of its own.

Secrets are named, never held: credentials of a bucket come as a volume. KubeRay gives its containers the cluster's
token itself, by reference to a Secret. Nothing listens outside the Kubernetes cluster: the head's service has an
address within it alone, and no ingress is made.
"""

import shlex
from importlib.metadata import version

from cluster import job
from cluster.description import Description
from cluster.errors import ConfigError
from cluster.manifests.text import block, comment, needed, plain, quoted

USER = 1000
"""The user of the images of cluster/Dockerfile."""
CREDENTIALS = "/etc/mmsa-dist"
"""Where the Secret with a bucket's credentials is mounted."""
OPENS = {"s3": "AWS_SHARED_CREDENTIALS_FILE", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
"""What tells the readers of a kind of bucket which file has its credentials."""


def ray_cluster(description: Description) -> str:
    """A RayCluster.

    Raises:
        ConfigError: the description lacks something, or holds what Kubernetes cannot do.
    """
    d = description
    _check(d)
    namespace = d.kubernetes.namespace
    token = (
        f"kubectl get secret --namespace {namespace} {_token(d)} --template '{{{{.data.auth_token | base64decode}}}}'"
    )
    about = [
        f"# {d.name}: a Ray cluster on Kubernetes. Written by `mmsa-dist cluster render kuberay-cluster`.",
        "#",
        *_made_before(d),
        f"#   kubectl apply -f {d.name}.raycluster.yaml",
        f"#   kubectl port-forward --namespace {namespace} service/{d.name}-head-svc 8265",
        f"#   (umask 077; {token} >token)",
        "#   export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/token",
        f"#   mmsa-dist submit --address http://127.0.0.1:8265 -- {shlex.join(job.words(d))}",
        "#",
        *_notes(d),
    ]
    return "\n".join([*about, *_head_of(d, "RayCluster"), "spec:", *_spec(d, 2), ""])


def ray_job(description: Description) -> str:
    """A RayJob.

    Raises:
        ConfigError: the description lacks something, or holds what Kubernetes cannot do.
    """
    d = description
    _check(d)
    namespace = d.kubernetes.namespace
    about = [
        f"# {d.name}: one command in a Ray cluster of its own. Written by `mmsa-dist cluster render kuberay-job`.",
        "#",
        *_made_before(d),
        f"#   kubectl apply -f {d.name}.rayjob.yaml",
        f"#   kubectl get rayjob --namespace {namespace} {d.name} --watch",
        f"#   kubectl logs --namespace {namespace} --follow job/{d.name}",
        "#",
        *_notes(d),
    ]
    spec = f"""
        submissionMode: K8sJobMode  # a small pod submits it and follows its log
        submitterConfig:
          backoffLimit: 2
        backoffLimit: {d.kubernetes.retries}  # times that a failed job starts again, in a new cluster
        shutdownAfterJobFinishes: true  # its cluster is deleted
        ttlSecondsAfterFinished: {d.kubernetes.keep_minutes * 60}  # so long after the end, for its logs
    """
    lines = [
        *_head_of(d, "RayJob"),
        "spec:",
        "  # `cluster run` waits for nodes, and goes on with the run that an earlier try has begun",
        "  entrypoint: >-",
        "    " + job.folded(["mmsa-dist", *job.words(d)], 4),
        block(spec, 2),
        "  rayClusterSpec:",
        *_spec(d, 4),
        "",
    ]
    return "\n".join([*about, *lines])


def _check(d: Description) -> None:
    """What both objects ask.

    Raises:
        ConfigError: something is missing, or lies where the nodes cannot reach it.
    """
    needed(d.image, "image", "pods run nothing else; cluster/Dockerfile makes one")
    needed(
        d.shared.claim, "shared.claim", "run folders must be on a disk that all pods see: a ReadWriteMany volume claim"
    )
    if d.storage and not d.storage.startswith(("s3://", "gs://")):
        raise ConfigError(
            f"storage: {d.storage} is a place within one pod, which is gone with it; give s3://BUCKET/FOLDER or "
            "gs://BUCKET/FOLDER"
        )
    if d.kubernetes.credentials_secret and len(job.reads_bucket(d)) != 1:
        raise ConfigError(
            "kubernetes.credentials_secret: one file opens one kind of bucket, but command and storage name "
            f"{' and '.join(sorted(job.reads_bucket(d))) or 'none'}; use kubernetes.service_account"
        )


def _token(d: Description) -> str:
    return d.kubernetes.token_secret or f"{d.name}-ray-token"


def _made_before(d: Description) -> list[str]:
    """Comment lines: the Secrets that must be there."""
    namespace, secret = d.kubernetes.namespace, d.kubernetes.credentials_secret
    create = f"kubectl create secret generic --namespace {namespace}"
    lines = [
        "#   openssl rand -hex 32 | tr -d '\\n' |   # once",
        f"#       {create} {_token(d)} --from-file=auth_token=/dev/stdin",
    ]
    return [*lines, f"#   {create} {secret} --from-file=credentials=FILE   # once"] if secret else lines


def _notes(d: Description) -> list[str]:
    lines = [
        comment(
            "Needs KubeRay 1.6 or newer. The dashboard is reached through the head's service, which has an address "
            "within the Kubernetes cluster only, and asks for the token."
        )
    ]
    return [*lines, comment(f"Runs save {why}.")] if (why := job.why_so_often(d)) else lines


def _head_of(d: Description, kind: str) -> list[str]:
    text = f"""
        apiVersion: ray.io/v1
        kind: {kind}
        metadata:
          name: {quoted(d.name)}
          namespace: {quoted(d.kubernetes.namespace)}
          labels:
            app.kubernetes.io/name: mmsa-dist
            app.kubernetes.io/instance: {quoted(d.name)}
    """
    return [block(text)]


def _spec(d: Description, indent: int) -> list[str]:
    """Lines of a RayClusterSpec."""
    w = d.workers
    grows = w.least < w.most
    autoscaler = f"""
        enableInTreeAutoscaling: true
        autoscalerOptions:
          version: v2
          upscalingMode: Default
          idleTimeoutSeconds: {round(w.idle_minutes * 60)}
          resources:
            requests: {{cpu: 500m, memory: 1Gi}}
            limits: {{cpu: 500m, memory: 1Gi}}
    """
    text = f"""
        rayVersion: {quoted(version("ray"))}  # of the image; head and workers must agree
        authOptions:
          mode: token
          secretName: {quoted(_token(d))}  # its key auth_token
        @autoscaler
        headGroupSpec:
          serviceType: ClusterIP  # within the Kubernetes cluster only
          rayStartParams:
            num-cpus: "0"  # it runs the drivers of jobs, and no rank
          @head
        workerGroupSpecs:
          - groupName: workers
            replicas: {w.most}{f"  # a job begins with {w.least} of them" if grows else ""}
            minReplicas: {w.least}
            maxReplicas: {w.most}
            rayStartParams: {{}}  # CPUs, GPUs and memory are the container's
            @workers
    """
    pieces = {"head": _pod(d, head=True), "workers": _pod(d, head=False)}
    return [block(text, indent, autoscaler=autoscaler if grows else "enableInTreeAutoscaling: false", **pieces)]


def _pod(d: Description, *, head: bool) -> str:
    """The pod template of the head or of a worker."""
    k, w = d.kubernetes, d.workers
    cpus, memory = (d.head.cpus, d.head.memory_gib) if head else (w.cpus, w.memory_gib)
    gpus = f", nvidia.com/gpu: {quoted(str(w.gpus))}" if w.gpus and not head else ""
    sizes = f"{{cpu: {quoted(str(cpus))}, memory: {memory}Gi{gpus}}}"
    named = k.head_service_account or k.service_account if head else k.service_account
    asks = "; KubeRay lets it ask for pods" if head and w.least < w.most else ""
    account = f"serviceAccountName: {quoted(named)}  # opens the bucket{asks}" if named else ""
    secret = k.credentials_secret
    opens = OPENS[next(iter(job.reads_bucket(d)))] if secret else ""
    ports = """
        ports:
          - {name: gcs-server, containerPort: 6379}
          - {name: dashboard, containerPort: 8265}
          - {name: client, containerPort: 10001}
    """
    text = f"""
        template:
          spec:
            @account
            terminationGracePeriodSeconds: {job.STOP + 20}
            securityContext:
              runAsNonRoot: true
              runAsUser: {USER}
              runAsGroup: {USER}
              fsGroup: {USER}  # may write to the volumes
              seccompProfile: {{type: RuntimeDefault}}
            @placed
            containers:
              - name: {"ray-head" if head else "ray-worker"}
                image: {quoted(d.image or "")}
                @ports
                securityContext:
                  allowPrivilegeEscalation: false
                  capabilities: {{drop: [ALL]}}
                resources:  # what it asks for is what it gets
                  requests: {sizes}
                  limits: {sizes}
                readinessProbe:
                  httpGet: {{path: /api/healthz, port: 52365}}  # of the node itself; asks for no token
                  periodSeconds: 5
                  failureThreshold: 60
                env:
                  - {{name: RAY_USAGE_STATS_ENABLED, value: "0"}}
                  - {{name: RAY_JOB_STOP_WAIT_TIME_S, value: "{job.STOP}"}}  # to finish the step and save
                  - {{name: MMSA_CACHE, value: /cache}}
                  - {{name: MMSA_CACHE_BYTES, value: {d.cache_gib}G}}
                  @mlflow
                  @opens
                volumeMounts:
                  - {{name: shared, mountPath: {quoted(d.shared.path)}}}
                  - {{name: shm, mountPath: /dev/shm}}
                  - {{name: cache, mountPath: /cache}}
                  @mounted
            volumes:
              - name: shared  # run folders, the same for all
                persistentVolumeClaim: {{claimName: {quoted(d.shared.claim or "")}}}
              - name: shm  # Ray's object store and batches on their way; counts as memory of the container
                emptyDir: {{medium: Memory, sizeLimit: {max(1, memory * 3 // 10)}Gi}}
              - name: cache  # shards from a bucket
                emptyDir: {{sizeLimit: {d.cache_gib + d.cache_gib // 5 + 1}Gi}}
              @credentials
    """
    return block(
        text,
        account=account,
        placed=_placed(d, head=head),
        ports=ports if head else "",
        mlflow=f"- {{name: MLFLOW_TRACKING_URI, value: {quoted(d.mlflow)}}}" if d.mlflow else "",
        opens=f"- {{name: {opens}, value: {CREDENTIALS}/credentials}}" if secret else "",
        mounted=f"- {{name: credentials, mountPath: {CREDENTIALS}, readOnly: true}}" if secret else "",
        credentials=f"- {{name: credentials, secret: {{secretName: {quoted(secret)}, defaultMode: 0440}}}}"
        if secret
        else "",
    )


def _placed(d: Description, *, head: bool) -> str:
    """On which nodes a pod may be: the head never on spot ones, workers there when asked, and where their GPUs are."""
    k, w = d.kubernetes, d.workers
    key, _, value = k.spot_label.partition("=")
    if head and not w.spot:
        return ""
    if head:
        return f"""
            affinity:
              nodeAffinity:
                requiredDuringSchedulingIgnoredDuringExecution:
                  nodeSelectorTerms:  # on no node that may be taken away
                    - matchExpressions: [{{key: {quoted(key)}, operator: NotIn, values: [{quoted(value)}]}}]
        """
    labels = [f"{plain(key)}: {quoted(value)}"] if w.spot else []
    labels += [f"{plain(k.gpu_label)}: {quoted(w.gpu)}"] if w.gpu else []
    borne = [f"- {{key: {quoted(key)}, operator: Equal, value: {quoted(value)}, effect: NoSchedule}}"] if w.spot else []
    borne += ["- {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"] if w.gpus else []
    lines = ["nodeSelector:", *(f"  {label}" for label in labels)] if labels else []
    lines += ["tolerations:", *(f"  {each}" for each in borne)] if borne else []
    return "\n".join(lines)
