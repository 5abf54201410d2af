# The camserve server. docs/container.md says how to build and run it.
FROM python:3.11-slim AS build

# Further options for every `pip install` of the build, such as an index of CPU-only torch wheels, or a mirror. They
# stay in the build's history: no credentials here.
ARG PIP_EXTRA=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/camserve
WORKDIR /src
COPY constraints.txt ./
# By itself, so that a change of the code does not install it again.
RUN /opt/camserve/bin/pip install ${PIP_EXTRA} --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN /opt/camserve/bin/pip install ${PIP_EXTRA} --constraint constraints.txt '.[server]' \
 && /opt/camserve/bin/pip check


FROM python:3.11-slim

LABEL org.opencontainers.image.title="camserve" \
      org.opencontainers.image.description="Explains image classifiers over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --create-home camserve
COPY --from=build /opt/camserve /opt/camserve
# PYTHONDONTWRITEBYTECODE: the bytecode is there already, and the file system may be read-only.
# CAMSERVE_LISTEN: every interface of the container, or its port could not be published.
ENV PATH=/opt/camserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CAMSERVE_LISTEN=0.0.0.0:50051
USER 10001:10001
WORKDIR /home/camserve
EXPOSE 50051
# Healthy once the models are loaded and warm.
HEALTHCHECK --interval=15s --timeout=10s --start-period=3m CMD ["python", "-c", "\
import os, sys, grpc; \
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
channel = grpc.insecure_channel('127.0.0.1:' + os.environ['CAMSERVE_LISTEN'].rpartition(':')[2]); \
asked = pb.HealthCheckRequest(service='camserve.v1.ExplainService'); \
sys.exit(rpc.HealthStub(channel).Check(asked, timeout=5).status != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["camserve", "serve"]
