# The appliance as one image: `docker run IMAGE VERB ...`, see docs/image.md.
#
#   docker build .                                       CUDA
#   docker build --build-arg TORCH=cpu \
#     --build-arg BASE_IMAGE=debian:bookworm-slim .      without CUDA
#
# BASE_IMAGE is any Debian or Ubuntu with Python >= 3.11. torch's wheels bring CUDA's libraries, of the
# same release as this base; the base brings the variables that the NVIDIA runtime looks for.
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1

# hadolint ignore=DL3006 # the argument has the digest
FROM ${BASE_IMAGE} AS system
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8
# gcc and Python's headers: Triton compiles its launchers, of the LM head's kernel in every run on a GPU.
# hadolint ignore=DL3008 # the base's digest and the day's security updates decide; a pin here breaks in weeks
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc git libc6-dev python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
ARG TORCH=cuda
ARG EXTRAS="train data"
# The system's certificates, so that a company's own are known too.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 PATH=/opt/tools/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /src
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY .ci/tools.txt .ci/
RUN python3 -m venv /opt/tools && /opt/tools/bin/pip install --quiet --require-hashes --requirement .ci/tools.txt
# The dependencies, by hash, are a layer of their own: a change of the code leaves it as it is. A folder
# `wheels` beside this file may hold wheels that are not in a registry.
COPY pyproject.toml uv.lock .ci/setup wheel[s]/ ./
RUN mkdir -p .ci wheels && mv setup .ci/ && find . -maxdepth 1 -name '*.whl' -exec mv {} wheels/ \; \
    && PIP_FIND_LINKS=/src/wheels VENV=/opt/appliance PROJECT=none .ci/setup
COPY README.md LICENSE ./
COPY appliance appliance
RUN hatchling build --target wheel --directory dist \
    && uv pip install --quiet --python /opt/appliance --no-deps dist/*.whl

FROM system AS appliance
ARG VERSION=0 REVISION=unknown CREATED=1970-01-01T00:00:00Z SOURCE=""
LABEL org.opencontainers.image.title="appliance" \
      org.opencontainers.image.description="A dataset commit becomes a checked, evaluated, published adapter" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
# Any --user may run it: what is written is in /cache, /out and /workspace, and Python's user is a variable.
# A repository that belongs to another user is still the one that was mounted.
RUN useradd --uid 1000 --non-unique --no-create-home --home-dir /cache appliance \
    && mkdir -p /cache /out /workspace && chmod 1777 /cache /out /workspace \
    && git config --system --add safe.directory '*'
COPY --from=build /opt/appliance /opt/appliance
ENV PATH=/opt/appliance/bin:$PATH HOME=/cache LOGNAME=appliance PYTHONDONTWRITEBYTECODE=1 \
    APPLIANCE_CACHE=/cache APPLIANCE_OUT=/out \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_DISABLE_TELEMETRY=1 DVC_NO_ANALYTICS=1 DVC_SITE_CACHE_DIR=/cache/dvc
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "appliance"]
CMD ["--help"]
