"""The application of Ray Serve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from camserve.addresses import socket_path, split_host_port
from camserve_ray.configuration import plain_config
from camserve_ray.serving.autoscaling import RowsOwed
from camserve_ray.serving.replica import Replica
from camserve_ray.serving.routing import EndpointRouter
from camserve_ray.serving.services import NAME
from camserve_server.config import Config, read_config
from camserve_server.errors import ConfigError

__all__ = ["LOGGING", "PROXY_SERVICES", "Scale", "application", "build", "check_scale", "checked", "grpc_options"]

# The function that adds the services to a proxy, by its import path.
PROXY_SERVICES = "camserve_ray.serving.proxy:add_services"
# The server in the replica logs each call, and the lines of Serve take as much time as a small request in the proxy.
LOGGING = LoggingConfig(enable_access_log=False)
# The calls that a replica accepts. This limit is not the one that callers meet: the engine refuses requests by rows.
_MOST_CALLS = 10_000
# Rows that a replica may owe. A GPU works through some 25,000 in the time in which a CPU works through 5,000.
_ROWS_OF_CPU, _ROWS_OF_GPU = 5_000, 25_000
# Rows owed are known work, so a shorter delay than Serve's 30 s suffices before replicas are added.
_UPSCALE_S = 5
# Serve averages the rows of this time, which must be longer than the ten seconds between two reports of a replica.
_AVERAGED_S = 11
# Settings of the server that have no effect in a replica.
_IGNORED = ("health_listen", "metrics_listen", "admin_listen")


@dataclass(frozen=True)
class Scale:
    """Number of replicas, and the share of the cluster that each of them takes.

    Attributes:
        replicas: The number of replicas, or the smallest and the largest number.
        gpus: The GPUs of each replica.
        rows_per_replica: With several numbers of replicas: the rows that a replica may owe on average. None: 5,000
            without a GPU, 25,000 with one.
    """

    replicas: int | tuple[int, int] = 1
    gpus: float = 0
    rows_per_replica: int | None = None


def check_scale(scale: Scale) -> None:
    """Check the values of a scale, which can have any type if they come from a file. Raises ConfigError."""
    replicas: Any = scale.replicas
    least, most = replicas if isinstance(replicas, tuple) and len(replicas) == 2 else (replicas, replicas)
    if not (_is_count(least) and _is_count(most) and least <= most):
        raise ConfigError(
            f"replicas: {scale.replicas!r}; expected a number from 1, or the smallest and the largest number"
        )
    gpus: Any = scale.gpus
    if type(gpus) not in (int, float) or not 0 <= gpus < math.inf or (gpus > 1 and gpus % 1):
        raise ConfigError(f"gpus: {gpus!r}; expected a whole number, or a part of a GPU from 0 to 1")
    if scale.rows_per_replica is not None and not _is_count(scale.rows_per_replica):
        raise ConfigError(f"rows_per_replica: {scale.rows_per_replica!r}; expected a number from 1")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def checked(config: Config) -> list[str]:
    """Check that Ray Serve can serve a configuration.

    Returns:
        Warnings about settings that have no effect.

    Raises:
        ConfigError: Ray Serve cannot do what a setting requires. The message has one line for each such setting.
    """
    errors = []
    if config.tls is not None:
        errors.append(
            "tls: the proxies of Ray Serve do not use the certificates of the configuration; remove [tls], and let a "
            "load balancer before the proxies terminate TLS"
        )
    if socket_path(config.listen) is not None or split_host_port(config.listen)[1] == "0":
        errors.append(f"listen: {config.listen}; expected HOST:PORT with a fixed port, which all proxies use")
    if errors:
        raise ConfigError("\n".join(errors))
    return [f"{key}: has no effect with Ray Serve" for key in _IGNORED if getattr(config, key) is not None] + (
        ["frontends: has no effect with Ray Serve"] if config.frontends > 1 else []
    )


def application(config: Config, scale: Scale) -> serve.Application:
    """Return the application.

    Args:
        config: The configuration of each replica. A replica takes `threads` CPUs from the cluster, or one.
        scale: The replicas.
    """
    options: dict[str, Any] = {"num_replicas": scale.replicas}
    if isinstance(scale.replicas, tuple):
        rows = scale.rows_per_replica or (_ROWS_OF_GPU if scale.gpus else _ROWS_OF_CPU)
        make_policy: Any = AutoscalingPolicy
        policy = make_policy(policy_function=RowsOwed, policy_kwargs={"rows_per_replica": rows})
        least, most = scale.replicas
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                policy=policy,
                upscale_delay_s=_UPSCALE_S,
                look_back_period_s=_AVERAGED_S,
            )
        }
    make_router: Any = RequestRouterConfig
    deployment = serve.deployment(
        Replica,
        name=NAME,
        max_ongoing_requests=_MOST_CALLS,
        graceful_shutdown_timeout_s=config.grace_s,
        logging_config=LOGGING,
        request_router_config=make_router(request_router_class=EndpointRouter),
        ray_actor_options={"num_cpus": config.threads or 1, "num_gpus": scale.gpus},
        **options,
    )
    return deployment.bind(plain_config(config))  # type: ignore[attr-defined, no-any-return]


def grpc_options(config: Config) -> dict[str, Any]:
    """Return the options for the gRPC proxies of Serve."""
    return {
        "port": int(split_host_port(config.listen)[1]),
        "grpc_servicer_functions": [PROXY_SERVICES],
        "enable_reflection": config.reflection,
    }


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application for a configuration file of Serve, such as that in a RayService manifest.

    Args:
        arguments: "config": the path of the configuration file; and optionally "replicas", a number or a list of the
            smallest and the largest one, "gpus" and "rows_per_replica", as in `Scale`.

    Raises:
        ConfigError: The configuration or an argument is invalid.
    """
    names = {"config", *Scale.__dataclass_fields__}
    if unknown := set(arguments) - names:
        raise ConfigError(f"args: {unknown.pop()!r} is unknown; expected some of {', '.join(sorted(names))}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items() if value is not None
    }
    path = values.pop("config", "")
    if not isinstance(path, str):
        raise ConfigError(f"args.config: {path!r}; expected the path of a file")
    scale = Scale(**values)
    try:
        check_scale(scale)
    except ConfigError as error:
        raise ConfigError(f"args.{error}") from error
    config = read_config(Path(path) if path else None)
    checked(config)
    return application(config, scale)
