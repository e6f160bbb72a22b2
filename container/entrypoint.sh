#!/usr/bin/env bash
# Entrypoint of the container: runs scripts/run.sh as the owner of the dataset folder, so that all files it writes belong to
# that user. If the container was started with `user:` or `--user`, the user does not change.
set -euo pipefail

# Run NVIDIA's own entrypoint first, which prints its banner and checks the driver. Other base images have none.
base=/opt/nvidia/nvidia_entrypoint.sh
if [[ ! ${LORACAT_ENTERED:-} && -x $base ]]; then
    LORACAT_ENTERED=yes exec "$base" "$0" "$@"
fi

if ((EUID != 0)) && [[ ! -r /app/scripts/run.sh ]]; then
    echo "loracat: user $EUID cannot read the folder mounted at /app: on the host, run chmod -R a+rX on it, or start with its owner as --user" >&2
    exit 2
fi

dataset=${DATASET_DIR:-/app/dataset}
[[ -d $dataset ]] || dataset=/app/dataset
owner=$(stat --format %u "$dataset")
if ((EUID == 0 && owner != 0)); then
    exec setpriv --reuid "$owner" --regid "$(stat --format %g "$dataset")" --clear-groups "$0" "$@"
fi

# This user has no home folder in the image. The caches of the libraries go to the mounted output folder and are kept there.
cache=${OUTPUT_DIR:-/app/output}/cache
export USER=loracat HOME=$cache/home HF_HOME=$cache/huggingface MPLCONFIGDIR=$cache/matplotlib
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor
if ! mkdir -p "$HOME" "$HF_HOME" "$MPLCONFIGDIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" 2>/dev/null; then
    folder=${cache%/cache}
    echo "loracat: user $EUID cannot write to $folder: on the host, sudo chown -R $EUID:$(id -g) ${folder#/app/}" >&2
    exit 6
fi

# The ptxas that Triton ships is too old for the newest GPUs; the one of the CUDA toolkit is not.
ptxas=/usr/local/cuda/bin/ptxas
if [[ -x $ptxas ]]; then
    export TRITON_PTXAS_PATH=$ptxas TRITON_PTXAS_BLACKWELL_PATH=$ptxas
fi

# `hf download ...` fetches weights, owned by the same user as everything else; `python3 scripts/...` runs a single program.
[[ ${1:-} != hf && ${1:-} != python3 ]] || exec "$@"
exec bash /app/scripts/run.sh "$@"
