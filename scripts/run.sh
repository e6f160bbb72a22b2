#!/usr/bin/env bash
# Run the stages in order: collect images, caption them, train the LoRA. See `run.sh --help`.
set -euo pipefail

usage="Usage: run.sh [OPTION]...

Collect images from ComfyUI, caption them, and train a LoRA for SDXL.

Options:
  --collect, --caption, --train
              run only these stages (default: all three)
  --review    stop before training, to look at the images and captions; REVIEW=1 does the same
  --report    write the page output/report.html from what the stages have left, as is done after each stage, too
  --check     check the requirements of each stage and exit
  --version   print the version and exit
  -h, --help  print this text and exit

The stages always run in the order above. Settings are read from config/training_config.toml, environment variables, and
the file .env, by the rules of Docker Compose; variables of the environment take precedence.

Exit codes:
  0           all stages are done
  1           some items of a stage failed; later stages run with what there is (STRICT=1: the run stops there)
  2           wrong usage or settings; all settings are checked before the first stage starts
  130, 143    stopped by SIGINT (Ctrl-C) or SIGTERM
  141         the reader of the output closed it
  other       exit code of the stage that failed; later stages do not run

With --check, every stage is checked and the first exit code other than 0 is returned."

say() { printf '%s\n' "$1" 2>/dev/null || exit 141; } # where SIGPIPE is ignored, a closed pipe is an error of printf

refuse() {
    printf 'run.sh: %s\n\n%s\n' "$1" "$usage" >&2
    exit 2
}

scripts=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
check="" requested="" only_report="" asked_for_review=""
for flag in "$@"; do
    case $flag in
        --collect | --caption | --train) requested+=" $flag " ;;
        --check) check=--check ;;
        --review) asked_for_review=yes ;;
        --report) only_report=yes ;;
        -h | --help) say "$usage" && exit 0 ;;
        --version) say "$(sed -n 's/^VERSION = "\(.*\)"$/LoRACat \1/p' "$scripts/common/settings.py")" && exit 0 ;;
        *) refuse "unknown argument: $flag" ;;
    esac
done
[[ ! $requested && ! $check ]] || only_report="" # a stage writes the page in any case
stages=()
for script in collect_images caption_images train_lora; do
    [[ $only_report ]] && continue
    [[ $requested && $requested != *" --${script%_*} "* ]] || stages+=("$script")
done
choose_python() {
    python=${PYTHON:-$scripts/../.venv/bin/python}
    [[ ${PYTHON:-} || -x $python ]] || python=python3
}
choose_python
dotenv=$scripts/../.env # Compose reads it for a container
if [[ -e $dotenv && ! -v LORACAT_IN_CONTAINER ]] && "$python" -c "" 2>/dev/null; then
    mapfile -d '' -t assignments < <(env -0 | "$python" "$scripts/common/dotenv.py" "$dotenv")
    wait "$!" || exit 2
    for assignment in "${assignments[@]}"; do
        [[ -v ${assignment%%=*} ]] || export "${assignment?}" # UID and the like are variables of bash
    done
    choose_python
fi
# is_true NAME VALUE: whether the value of a variable is true. Anything but true and false is refused.
is_true() {
    case ${2,,} in
        1 | true | yes | on) return 0 ;;
        0 | false | no | off) return 1 ;;
        *) refuse "$1: '$2' must be true or false" ;;
    esac
}
strict="" review=$asked_for_review
is_true REVIEW "${REVIEW:-0}" && review=yes
is_true STRICT "${STRICT:-0}" && strict=yes
[[ $asked_for_review && ${stages[*]} == train_lora ]] && refuse "--review stops before training: leave out --review or --train"

declare -A packages=( # the modules that a stage imports
    [collect_images]="PIL numpy pillow_heif requests tokenizers tomli_w tqdm urllib3 websocket"
    [caption_images]="PIL huggingface_hub numpy onnxruntime pillow_heif tokenizers tomli_w tqdm"
    [train_lora]="PIL accelerate diffusers huggingface_hub numpy peft pillow_heif safetensors tensorboard tokenizers tomli_w
        torch tqdm transformers wandb"
    [report]="PIL jinja2 markupsafe numpy pillow_heif tokenizers tomli_w"
)
find_missing='import sys, importlib.util as u; print("OK", *(name for name in sys.argv[1:] if not u.find_spec(name)))'
for stage in "${stages[@]}" ${only_report:+report}; do
    # shellcheck disable=SC2086 # one argument for each name
    missing=$("$python" -c "$find_missing" ${packages[$stage]} 2>/dev/null) || missing=""
    missing=${missing##*$'\n'}
    [[ $missing != OK ]] || continue
    problem="'$python' lacks modules that $stage.py needs:${missing#OK}"
    [[ $missing ]] || problem="'$python' cannot be run as Python"
    echo "run.sh: $problem; install torch and requirements.txt (\`make demo\` does so in .venv), or set PYTHON to another Python" >&2
    exit 2
done
export PYTHONUNBUFFERED=1 # so that the lines of both streams keep their order

# Each stage has its own process group, so Ctrl-C in a terminal reaches only this script, which forwards it once: a second
# signal would end the stage without saving. For the same reason Ctrl-Z has to be forwarded.
running="" undelivered="" stopped_by="" signals=0 instead=""
deliver() {
    [[ $running && $undelivered ]] || return 0
    kill -s "${instead:-$undelivered}" "$running" 2>/dev/null || true
    undelivered=""
}
# shellcheck disable=SC2317,SC2329 # called by the traps
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
trap '' TTIN TTOU # a stage runs in the terminal's background; writing to the terminal must not suspend it

# run_stage SCRIPT FLAGS...: run the script and store its exit code in `code`.
run_stage() {
    set -m # starts a process group
    "$python" "$scripts/$1.py" "${@:2}" </dev/null &
    running=$!
    set +m
    deliver
    local before=-1
    while ((before != signals)); do # a signal interrupts `wait`, but not the stage
        before=$signals code=0
        wait "$running" || code=$?
    done
    running=""
    if [[ $stopped_by ]] && ((code <= 1 || code == 143)); then code=$((128 + $(kill -l "$stopped_by"))); fi
}

# run_all FLAG [LATER]: run every requested stage with FLAG, or with LATER from the second on. Exit with the first code other
# than 0, if there is one.
run_all() {
    local first=0 flag=$1
    for stage in "${stages[@]}"; do
        [[ $flag == --settings ]] || say "Checking $stage:"
        run_stage "$stage" "$flag"
        flag=${2:-$flag}
        ((first)) || first=$code
        [[ ! $stopped_by ]] || exit "$code"
    done
    ((first == 0)) || exit "$first"
}

if [[ $check ]]; then
    run_all --check --check=ahead # what an earlier stage produces may be missing
    exit 0
fi
instead=TERM                  # on SIGINT Python prints a traceback while it imports; there is nothing to save here
run_all --settings >/dev/null # report a wrong setting of a later stage now and not after hours
instead=""

if [[ $only_report ]]; then
    run_stage report
    exit "$code"
fi

# report: write the page. Whatever goes wrong with it is one warning, because the stage itself has done its work.
report() {
    local problem
    problem=$("$python" "$scripts/report.py" 2>&1 >/dev/null </dev/null) ||
        echo "run.sh: warning: the report page was not written: ${problem##*$'\n'}" >&2
}

result=0
[[ ${stages[0]} != train_lora ]] || review="" # what trains alone is the run after the review
for stage in "${stages[@]}"; do
    [[ ! $review || $stage != train_lora ]] || break
    say "$stage: started"
    SECONDS=0
    run_stage "$stage"
    [[ $stopped_by || ($stage == train_lora && $code == 0) ]] || report # training writes it before it ends
    # What a finished run says last is what the user should read.
    [[ $code == 0 && $stage == "${stages[-1]}" ]] || say "$stage: exit code $code after $SECONDS s"
    if ((code > 1)) || [[ $code == 1 && $strict ]]; then exit "$code"; fi
    ((code == 0)) || result=1
    continue_with="--train"
    [[ $stage == caption_images ]] || continue_with="--caption --review"
done
if [[ $review ]]; then
    command=scripts/run.sh
    [[ ! -v LORACAT_IN_CONTAINER ]] || command="docker compose run --rm loracat"
    run_stage report # names the page
    say "review: look at this page; to leave images out, copy the lines that it shows into exclude.txt in the folder of the data set"
    say "review: continue with: $command $continue_with"
fi
exit "$result"
