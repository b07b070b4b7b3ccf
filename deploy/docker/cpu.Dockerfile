# Serving on CPUs, and the console: OpenVINO, no torch.   docker build -f deploy/docker/cpu.Dockerfile -t code-worker-cpu:0.1.0 .
# The base is pinned by tag; whoever builds for production pins its digest: --build-arg PYTHON=python:3.11.13-slim-bookworm@sha256:…
ARG PYTHON=python:3.11.13-slim-bookworm
# The same Python with a compiler: the installation compiles the decoder of JPEG regions.
ARG BUILD=python:3.11.13-bookworm

FROM ${BUILD} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY LICENSE MANIFEST.in README.md constraints.txt pyproject.toml setup.py ./
COPY engine engine
COPY models models
COPY train train
COPY worker worker
RUN /opt/venv/bin/python -m pip install --constraint constraints.txt '.[openvino,console,otel]'

FROM ${PYTHON}
RUN groupadd --gid 10001 worker && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin worker
COPY --from=build /opt/venv /opt/venv
# Nothing is written outside /tmp and the volumes: the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 WORKER_HTTP__HOST=0.0.0.0
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["python", "-m"]
CMD ["worker", "run"]
