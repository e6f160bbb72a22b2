# LoRACat on NVIDIA's PyTorch image. Any base image with torch, pip and bash works.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.01-py3
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The base image's own builds of torch and its companions must not be replaced: they are pinned in a constraint file, used
# instead of the base image's (which may pin much more), and compared after the installation. peft refuses to work with the
# old torchao in NVIDIA's image, so that is removed.
COPY requirements.txt /opt/loracat/
RUN cd /opt/loracat; \
    export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore; \
    of_the_base() { python3 -m pip list --format=freeze | grep -iE '^((pytorch[-_])?triton|torch(vision|audio)?|numpy|flash[-_]attn)=='; }; \
    of_the_base >constraints.txt || true; \
    grep '^torch==' constraints.txt || { echo "BASE_IMAGE has no torch: use nvcr.io/nvidia/pytorch or an image built on it"; exit 1; }; \
    python3 -m pip uninstall --yes torchao; \
    python3 -m pip install --no-cache-dir --requirement requirements.txt; \
    of_the_base | diff constraints.txt - || { echo "requirements.txt replaced the packages of BASE_IMAGE above"; exit 1; }

# A copy of the program for `docker run`; docker-compose.yml mounts the repository over it.
COPY container/entrypoint.sh /usr/local/bin/loracat
COPY workflow_api.json prompts_example.json /app/
COPY config /app/config
COPY scripts /app/scripts
RUN mkdir -p /app/dataset/images /app/output/lora /app/models; \
    chmod -R a+rX /app; \
    chmod 755 /usr/local/bin/loracat; \
    chown -R 1000:1000 /app/dataset /app/output /app/models

WORKDIR /app
# Use the base image's Python, even if the mounted repository contains a .venv.
# The second one tells run.sh not to read .env, which Compose has read, and messages to name commands for the host.
ENV PYTHON=python3 LORACAT_IN_CONTAINER=yes
ENTRYPOINT ["/usr/local/bin/loracat"]
