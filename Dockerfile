# dlfer in a container, for the CPU or for NVIDIA GPUs:
#
#     docker build --target cpu -t dlfer:cpu .
#     docker build --target gpu -t dlfer:gpu .
#
# There is no CUDA base image: tensorflow[and-cuda] brings CUDA as Python packages, and of the host it takes the driver
# and the NVIDIA Container Toolkit alone. `make docker-check` builds and tries the cpu image without a Docker engine.
#
# A package index of your own: --secret id=pip.conf,src=$HOME/.config/pip/pip.conf; it stays out of the image.

# Any image with apt and Python 3.11 to 3.13, e.g. python:3.13-slim.
ARG BASE_IMAGE=python:3.12-slim


FROM ${BASE_IMAGE} AS builder
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Lock files of optional packages, by their names with blanks between. `litert` is in, so that what the README shows works:
# `dlfer export --to litert`. A second runtime for the same files (openvino) and pyarrow
# for one more kind of table (0.2 GB) are not: --build-arg EXTRAS="litert openvino parquet".
ARG EXTRAS="litert"
COPY locks locks
RUN for name in ${EXTRAS}; do cat "locks/${name}.txt" || exit 1; done > extras.txt


# What takes long stands in stages that know nothing of dlfer's code: when that changes, nothing is installed again, and
# of the images only the last small layers are new.
FROM builder AS builder-cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --quiet --require-hashes --requirement locks/cpu.txt --requirement extras.txt


FROM builder AS package-source
COPY README.md LICENSE MANIFEST.in requirements.txt pyproject.toml setup.py ./
COPY dlfer dlfer


# Compiled for where it will stand, and not compared with the time of its source, which a copy may change.
FROM package-source AS package-cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    DLFER_TENSORFLOW=tensorflow-cpu pip install --quiet --no-deps --no-compile --prefix /package . \
    && python3 -m compileall -q -s /package -p /opt/venv --invalidation-mode unchecked-hash /package/lib


FROM ${BASE_IMAGE} AS runtime
# tini, as process 1, passes signals on and collects orphans. Debian has one version of it at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home --home-dir /home/dlfer dlfer \
    # For any --user, whom no file here knows: what must be written to can be written to by everyone.
    && install --directory --mode 1777 /app /app/saved_models /cache /home/dlfer \
    && install --directory /data /experiments
# HOME and USER, because without an entry in /etc/passwd there is nothing to take them from. The models that come with
# dlfer are in DLFER_HOME, where they are found when a folder of the host's hides /app/saved_models. Here the package is built
# without them and without the experiments (setup.py), so that a change of the code does not renew their layers.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/dlfer \
    USER=dlfer \
    DLFER_DATA=/data \
    DLFER_HOME=/opt/dlfer \
    DLFER_CACHE=/cache/dlfer \
    XDG_CACHE_HOME=/cache \
    KERAS_HOME=/cache/keras \
    MPLCONFIGDIR=/cache/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app
# Not /app/saved_models: an unnamed volume there, or below, would hide the host's folder and go with --rm.
VOLUME ["/data", "/cache"]
USER 1000
# A training writes a checkpoint and exits with 143; the server finishes what it has begun. `docker stop` waits for ten
# seconds, which may be too few for either: say `docker stop --time 120`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "dlfer"]
CMD ["--help"]
ARG VERSION=0.2.0
ARG REVISION=""
LABEL org.opencontainers.image.title="dlfer" \
    org.opencontainers.image.description="Cascaded transfer learning for facial expression recognition, judged honestly" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"


FROM runtime AS cpu
COPY --from=builder-cpu /opt/venv /opt/venv
COPY --from=package-cpu /package /opt/venv
COPY saved_models /opt/dlfer/saved_models
COPY experiments /app/experiments


FROM builder AS builder-gpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --quiet --require-hashes --requirement locks/gpu.txt --requirement extras.txt


FROM package-source AS package-gpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    DLFER_TENSORFLOW="tensorflow[and-cuda]" pip install --quiet --no-deps --no-compile --prefix /package . \
    && python3 -m compileall -q -s /package -p /opt/venv --invalidation-mode unchecked-hash /package/lib


FROM runtime AS gpu
# What the NVIDIA Container Toolkit is to bring in of the host's driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=builder-gpu /opt/venv /opt/venv
COPY --from=package-gpu /package /opt/venv
COPY saved_models /opt/dlfer/saved_models
COPY experiments /app/experiments
