#!/bin/bash
# Answer three fixed prompts with a Llama2 model.
#
#   scripts/run_llm_predict.sh single   CONFIG CKPT       one process
#   scripts/run_llm_predict.sh parallel CONFIG CKPT N     N processes, by scripts/msrun_launcher.sh
#
# CONFIG: a predict run (a file, or a name of `run_llm.py list-cfg`). CKPT: whatever --load_checkpoint takes. The answers
# are printed and written to $OUTPUT_DIR (default ./output)/text_generation_result.txt. PYTHON names the interpreter.

usage() {
    echo "usage: $0 single CONFIG CKPT | parallel CONFIG CKPT N" >&2
    exit 2
}

[ $# -ge 3 ] || usage
mode=$1 config=$2 checkpoint=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
arguments=(
    --config "$config" --run_mode predict --load_checkpoint "$checkpoint" --output_dir "${OUTPUT_DIR:-./output}"
    --predict_data "I love Beijing, because" "LLaMA is a" "Huawei is a company that"
)

case $mode in
single)
    [ $# -eq 3 ] || usage
    exec "$python" "$here/../run_llm.py" "${arguments[@]}" --use_parallel False
    ;;
parallel)
    [ $# -eq 4 ] || usage
    [[ $4 =~ ^[1-9][0-9]*$ ]] || { echo "$0: N, the number of processes, is '$4'; give a positive number" >&2; exit 2; }
    launcher=$here/msrun_launcher.sh
    if [ ! -e "$launcher" ]; then
        echo "$0: parallel needs $launcher, which is not there; use single" >&2
        exit 2
    fi
    command=
    for word in "$here/../run_llm.py" "${arguments[@]}" --use_parallel True; do
        command+="'${word//\'/\'\\\'\'}' "
    done
    exec bash "$launcher" "$command" "$4"
    ;;
*)
    usage
    ;;
esac
