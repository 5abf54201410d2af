# The camserve server. docs/container.md describes how to build and run it.

FROM python:3.11-slim AS build

# "cpu", or "cuda" for NVIDIA GPUs, which is several gigabytes larger.
ARG VARIANT=cpu
# Extras of the distribution. For KServe, add onnx and kserve.
ARG EXTRAS=server,otel
# Index with wheels of torch without CUDA, for "cpu". Empty: the default index of pip.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Further options for every `pip install` of the build, such as a mirror. They stay in the image history, so do not pass
# credentials.
ARG PIP_EXTRA=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN case "${VARIANT}" in \
      cpu) echo "${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} ${PIP_EXTRA}" ;; \
      cuda) echo "${PIP_EXTRA}" ;; \
      *) echo "VARIANT is cpu or cuda, not ${VARIANT}" >&2; exit 1 ;; \
    esac > /options
# The final image has no pip, because nothing is installed at run time.
RUN python -m venv --without-pip /opt/camserve
WORKDIR /src
COPY constraints.txt ./
# torch has a layer of its own, so that a change of the code does not install it again.
RUN pip --python /opt/camserve/bin/python install $(cat /options) \
      --constraint constraints.txt torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN pip --python /opt/camserve/bin/python install $(cat /options) \
      --constraint constraints.txt ".[${EXTRAS}]" \
 && pip --python /opt/camserve/bin/python check


FROM python:3.11-slim

LABEL org.opencontainers.image.title="camserve" \
      org.opencontainers.image.description="Explains image classifiers over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
# A volume at .cache gets the owner of the folder.
RUN useradd --uid 10001 --user-group --create-home camserve \
 && install --directory --owner camserve --group camserve --mode 700 /home/camserve/.cache
COPY --from=build /opt/camserve /opt/camserve
# PYTHONDONTWRITEBYTECODE: the image contains the bytecode, and the file system may be read-only.
# CAMSERVE_LISTEN: all interfaces of the container, so that its port can be published. Without TLS the server refuses to
# start unless CAMSERVE_INSECURE=true.
# CAMSERVE_HEALTH_LISTEN: for the health check below, which has no certificate.
ENV PATH=/opt/camserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CAMSERVE_LISTEN=0.0.0.0:50051 \
    CAMSERVE_HEALTH_LISTEN=127.0.0.1:50052
USER 10001:10001
WORKDIR /home/camserve
EXPOSE 50051
# The container is healthy when the models are loaded and warmed up.
HEALTHCHECK --interval=15s --timeout=10s --start-period=3m \
  CMD camserve health --address "127.0.0.1:${CAMSERVE_HEALTH_LISTEN##*:}" --timeout 5
ENTRYPOINT ["camserve", "serve"]
