#!/usr/bin/env bash
# What the container starts: scripts/run.sh as the owner of the data set, so that what it writes belongs to that person.
# Started with `user:` or `--user` it stays who it is.
set -euo pipefail

# NVIDIA's own entrypoint comes first: it prints its banner and looks for the driver. Other bases have none.
base=/opt/nvidia/nvidia_entrypoint.sh
if [[ ! ${LORACAT_ENTERED:-} && -x $base ]]; then
    LORACAT_ENTERED=yes exec "$base" "$0" "$@"
fi

if ((EUID != 0)) && [[ ! -r /app/scripts/run.sh ]]; then
    echo "loracat: user $EUID may not read the folder that is /app here: on the host, chmod -R a+rX it, or take its owner" >&2
    exit 2
fi

dataset=${DATASET_DIR:-/app/dataset}
[[ -d $dataset ]] || dataset=/app/dataset
owner=$(stat --format %u "$dataset")
if ((EUID == 0 && owner != 0)); then
    exec setpriv --reuid "$owner" --regid "$(stat --format %g "$dataset")" --clear-groups "$0" "$@"
fi

# An owner without a home in the image: whatever the libraries keep goes to the mounted folder and is there next time.
cache=${OUTPUT_DIR:-/app/output}/cache
export USER=loracat HOME=$cache/home HF_HOME=$cache/huggingface MPLCONFIGDIR=$cache/matplotlib
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor
if ! mkdir -p "$HOME" "$HF_HOME" "$MPLCONFIGDIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" 2>/dev/null; then
    folder=${cache%/cache}
    echo "loracat: user $EUID cannot write to $folder: on the host, sudo chown -R $EUID:$(id -g) ${folder#/app/}" >&2
    exit 6
fi

# Triton's own ptxas is older than the newest GPUs.
ptxas=/usr/local/cuda/bin/ptxas
if [[ -x $ptxas ]]; then
    export TRITON_PTXAS_PATH=$ptxas TRITON_PTXAS_BLACKWELL_PATH=$ptxas
fi

# `hf download ...`: weights arrive as everything else does, owned by the same user. `python3 scripts/...`: a stage alone.
[[ ${1:-} != hf && ${1:-} != python3 ]] || exec "$@"
exec bash /app/scripts/run.sh "$@"
