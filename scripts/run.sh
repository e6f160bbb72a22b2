#!/usr/bin/env bash
# The stages in their order: collect images, caption them, train the LoRA. `run.sh --help` says how to call it.
set -euo pipefail

usage="Usage: run.sh [--check] [--collect] [--caption] [--train]

  no flag     collect images from ComfyUI, caption them, train the LoRA
  --collect, --caption, --train
              only the stages that are named, always in this order
  --check     only verify what the stages need; each reports, whatever the others find
  --help      this text

Settings are environment variables and config/training_config.toml. If some items of a stage fail (exit code 1), the
next stage goes on with what there is and 1 is returned at the end; STRICT=1 stops there. Any other failure ends the
run with the exit code of its stage. Wrong usage or settings end it with 2 before anything long begins, SIGINT ends it
with 130 and SIGTERM with 143. With --check the first code that is not 0 is returned."

refuse() {
    printf 'run.sh: %s\n\n%s\n' "$1" "$usage" >&2
    exit 2
}

check="" wanted=""
for flag in "$@"; do
    case $flag in
        --collect | --caption | --train) wanted+=" $flag " ;;
        --check) check=--check ;;
        --help) printf '%s\n' "$usage" && exit 0 ;;
        *) refuse "unknown argument: $flag" ;;
    esac
done
stages=()
for script in collect_images caption_images train_lora; do
    [[ $wanted && $wanted != *" --${script%_*} "* ]] || stages+=("$script")
done
strict=${STRICT:-0}
case ${strict,,} in
    1 | true | yes | on) strict=yes ;;
    0 | false | no | off) strict="" ;;
    *) refuse "STRICT: '$strict' must be true or false" ;;
esac

scripts=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=${PYTHON:-$scripts/../.venv/bin/python}
[[ ${PYTHON:-} || -x $python ]] || python=python3
packages=(PIL accelerate diffusers huggingface_hub numpy onnxruntime peft requests safetensors tensorboard tokenizers
    tomli_w torch tqdm transformers wandb websocket)
"$python" -c 'import sys, importlib.util as u; sys.exit(any(not u.find_spec(p) for p in sys.argv[1:]))' "${packages[@]}" >/dev/null 2>&1 || {
    echo "run.sh: '$python' is no Python that has torch and what requirements.txt names; \`make demo\` makes one in .venv, or set PYTHON" >&2
    exit 2
}
export PYTHONUNBUFFERED=1 # one log, in the order in which things happen

# A stage has a process group of its own. Ctrl-C in a terminal then reaches this script alone, which passes it on once:
# a second signal would end the stage at once, without saving. Ctrl-Z has to be passed on for the same reason.
running="" undelivered="" stopped_by="" signals=0 instead=""
deliver() {
    [[ $running && $undelivered ]] || return 0
    kill -s "${instead:-$undelivered}" "$running" 2>/dev/null || true
    undelivered=""
}
# shellcheck disable=SC2317,SC2329 # the traps call it
stop() {
    stopped_by=$1 undelivered=$1 signals=$((signals + 1))
    deliver
}
# shellcheck disable=SC2317,SC2329
pause() {
    signals=$((signals + 1))
    kill -s STOP ${running:+"$running"} $$
    kill -s CONT ${running:+"$running"} $$
}
trap 'stop INT' INT
trap 'stop TERM' TERM HUP
trap pause TSTP
trap '' TTIN TTOU # a stage is in the terminal's background: writing to it must not suspend the stage

# run_stage SCRIPT FLAGS...: run it to its end and leave its exit code in `code`.
run_stage() {
    set -m # the process group
    "$python" "$scripts/$1.py" "${@:2}" </dev/null &
    running=$!
    set +m
    deliver
    local before=-1
    while ((before != signals)); do # a signal ends `wait`, not the stage
        before=$signals code=0
        wait "$running" || code=$?
    done
    running=""
    if [[ $stopped_by ]] && ((code <= 1 || code == 143)); then code=$((128 + $(kill -l "$stopped_by"))); fi
}

# run_all FLAG [LATER]: run every wanted stage with FLAG (all but the first with LATER) and exit with the first code that is
# not 0, if there is one.
run_all() {
    local first=0 flag=$1
    for stage in "${stages[@]}"; do
        run_stage "$stage" "$flag"
        flag=${2:-$flag}
        ((first)) || first=$code
        [[ ! $stopped_by ]] || exit "$code"
    done
    ((first == 0)) || exit "$first"
}

if [[ $check ]]; then
    run_all --check --check=ahead # what a stage brings need not be there before it
    exit 0
fi
instead=TERM                  # to SIGINT Python answers with a traceback while it imports, and here is nothing to save
run_all --settings >/dev/null # a wrong setting of a later stage must not come up hours later
instead=""

result=0
for stage in "${stages[@]}"; do
    echo "$stage begins."
    SECONDS=0
    run_stage "$stage"
    echo "$stage ended with exit code $code after $SECONDS s."
    if ((code > 1)) || [[ $code == 1 && $strict ]]; then exit "$code"; fi
    ((code == 0)) || result=1
done
exit "$result"
