# Serving on NVIDIA GPUs: TensorRT, no torch.   docker build -f deploy/docker/tensorrt.Dockerfile -t code-worker-tensorrt:0.1.0 .
# FLAVOUR tensorrt: its libraries come from NVIDIA's package index while this is built (pip is sent there by the package itself).
# FLAVOUR tensorrt-rtx: everything from PyPI, for GeForce and RTX GPUs (compute capability 7.5 to 12.0, but 9.0).
# FLAVOUR tensorrt,gpu-decode (or tensorrt-rtx,gpu-decode): with nvImageCodec for WORKER_DECODE__GPU.
# The driver is the node's: NVIDIA's container toolkit mounts it.
# The base is pinned by tag; whoever builds for production pins its digest: --build-arg PYTHON=python:3.11.13-slim-bookworm@sha256:…
ARG PYTHON=python:3.11.13-slim-bookworm
# The same Python with a compiler: the installation compiles the decoder of JPEG regions.
ARG BUILD=python:3.11.13-bookworm

FROM ${BUILD} AS build
ARG FLAVOUR=tensorrt
ARG TENSORRT=11.4.0.106
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY LICENSE MANIFEST.in README.md constraints.txt pyproject.toml setup.py ./
COPY engine engine
COPY models models
COPY train train
COPY worker worker
RUN echo "tensorrt==${TENSORRT}" >> constraints.txt \
    && /opt/venv/bin/python -m pip install --constraint constraints.txt ".[${FLAVOUR},otel]"

FROM ${PYTHON}
RUN groupadd --gid 10001 worker && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin worker
COPY --from=build /opt/venv /opt/venv
# Nothing is written outside /tmp and the volumes: the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 WORKER_HTTP__HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["python", "-m"]
CMD ["worker", "run"]
