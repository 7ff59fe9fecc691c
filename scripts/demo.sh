#!/usr/bin/env bash
# The main job from text to an answer, small enough for two cores: `make demo` runs it in the .venv.
#
#   scripts/demo.sh [OUTPUT_DIR]      default demo_output; PYTHON names the interpreter (default python)
#
# Stopped or killed, it goes on where it was when it is started again. Remove OUTPUT_DIR to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-demo_output}
python=${PYTHON:-python}
corpus=$out/corpus
began=$SECONDS

headline() {
    printf '\n== %s  (%d:%02d)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
}

show() {  # a command, shown before it runs
    echo "\$ ${*@Q}" | sed "s/'\([A-Za-z0-9_.\/-]*\)'/\1/g"
    "$@"
}

records() {  # TYPE INPUT OUTPUT: token ids of a text, unless they are there
    if [ -e "$3" ]; then echo "$3 is there"; return; fi
    show "$python" tools/dataset_preprocess/llama_preprocess.py --dataset_type "$1" --input_glob "$2" \
        --model_file "$corpus/tokenizer.model" --seq_length 256 --output_file "$3"
}

train() {  # FOLDER START ARGUMENTS...: from the weights START; an interrupted run from its newest checkpoint
    local folder=$1 start=(${2:+--load_checkpoint "$2"})
    shift 2
    if [ -e "$folder/finished" ]; then echo "$folder is finished"; return; fi
    if [ -e "$folder/checkpoint/rank_0/meta.json" ]; then
        start=(--load_checkpoint "$folder" --resume_training True)
    fi
    show "$python" run_llm.py "$@" "${start[@]}" --output_dir "$folder"
    touch "$folder/finished"
}

headline "1/7 text from the standard library, and a tokenizer made from it"
show "$python" tools/demo_corpus.py --output_dir "$corpus"

headline "2/7 token ids in MindRecord files"
records wiki "$corpus/train.txt" "$out/train.mindrecord"
records wiki "$corpus/valid.txt" "$out/valid.mindrecord"
show "$python" run_llm.py show-data "$out/train.mindrecord" -n 1

headline "3/7 pretraining a Llama"
train "$out/pretrain" "" --config configs/demo/pretrain_llama_demo.yaml --epochs 3 \
    --train_dataset_dir "$out/train.mindrecord" --eval_dataset_dir "$out/valid.mindrecord"
echo "loss plot: $out/pretrain/loss.png"

headline "4/7 perplexity on text it has not seen"
show "$python" run_llm.py --config configs/demo/pretrain_llama_demo.yaml --run_mode eval \
    --load_checkpoint "$out/pretrain" --eval_dataset_dir "$out/valid.mindrecord" --output_dir "$out/eval"

headline "5/7 questions and answers in the Alpaca format"
if [ ! -e "$corpus/conversations.json" ]; then
    show "$python" tools/dataset_preprocess/alpaca_converter.py \
        --data_path "$corpus/alpaca.json" --output_path "$corpus/conversations.json"
fi
records qa "$corpus/conversations.json" "$out/qa.mindrecord"

headline "6/7 fine-tuning on them"
train "$out/finetune" "$out/pretrain" --config configs/demo/finetune_llama_demo.yaml --do_eval False --epochs 1 \
    --train_dataset_dir "$out/qa.mindrecord"

headline "7/7 answers"
show "$python" run_llm.py --config configs/demo/predict_llama_demo.yaml --load_checkpoint "$out/finetune" \
    --processor.tokenizer.vocab_file "$corpus/tokenizer.model" --predict_data "$corpus/prompts.json" \
    --predict_batch_size 3 --output_dir "$out/predict"

headline "done"
cat <<END
The model is five million parameters on two megabytes of text: look for the form of an answer, not its truth.
Talk to it:     $python run_llm.py chat --config configs/demo/predict_llama_demo.yaml \\
                    --load_checkpoint $out/finetune --processor.tokenizer.vocab_file $corpus/tokenizer.model
Train longer:   configs/demo/pretrain_llama_demo.yaml; every key: $python run_llm.py schema -p .
END
