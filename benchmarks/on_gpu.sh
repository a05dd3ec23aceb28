#!/usr/bin/env bash
# All benchmarks, and the tests that need a GPU, on one GPU in under six minutes; the smallest part first.
#
#     benchmarks/on_gpu.sh              on the GPU; PYTHON=... for another Python than .venv/bin/python
#     DEVICE=cpu benchmarks/on_gpu.sh   the same parts on tiny shapes, to see that they run; its times mean nothing
#     benchmarks/on_gpu.sh --list       name, time limit in seconds and command of every part
#
# Writes outputs/benchmarks/<device>/<part>.txt, its table and last line of key=value, and summary.txt with one line per
# part. A part that fails or exceeds its limit is marked as such; the others still run, and the exit status is 1.
# No GPU has run this version yet: its times are open.
# Needs torch >= 2.11, transformers, peft, bitsandbytes and pytest; neither papermill nor snakemake.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
device=${DEVICE:-cuda}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

if [ "$device" = cuda ]; then
    parts=(
        "tests 75 -m pytest -m gpu -q -p no:cacheprovider tests/test_gpu.py"
        "steering 40 benchmarks/steering.py --device cuda --shape tinyllama --dtype bfloat16 --repeats 5"
        "recording 70 benchmarks/recording.py --device cuda --shape tinyllama --dtype bfloat16 --repeats 5 --no-figure"
        "scoring 60 benchmarks/scoring.py --device cuda --shape tinyllama --dtype bfloat16 --chunks 3"
        "needle 45 benchmarks/needle.py --device cuda --shape tinyllama --dtype bfloat16 --lengths 200 600 --depths 10"
        "qlora 65 benchmarks/qlora.py --device cuda --shape llama-3-8b --tokens 4096 --batches 1 4"
    )
else
    parts=(
        "tests 300 -m pytest -m gpu -q -p no:cacheprovider tests/test_gpu.py"
        "steering 300 benchmarks/steering.py --shape tiny --batches 1x64 2x32 --new-tokens 4 --repeats 1"
        "recording 300 benchmarks/recording.py --shape tiny --lengths 64 128 --repeats 1 --no-figure"
        "scoring 300 benchmarks/scoring.py --shape tiny --corpora wizardlm --conversations 4 --chunks 2"
        "needle 300 benchmarks/needle.py --shape tiny --lengths 200 --depths 2 --new-tokens 2"
        "qlora 300 benchmarks/qlora.py --shape tiny --tokens 64 --batches 1 2 --repeats 1"
    )
fi
if [ "${1:-}" = --list ]; then
    printf '%s\n' "${parts[@]}"
    exit
fi

name=$("$python" -c "import torch; print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'cpu')") || exit 1
folder="outputs/benchmarks/$(echo "$name" | tr -cs 'A-Za-z0-9\n' '-')"
mkdir -p "$folder"
: >"$folder/summary.txt"
status=0
for part in "${parts[@]}"; do
    read -r label limit command <<<"$part"
    began=$(date +%s)
    # shellcheck disable=SC2086  # the command is several words
    timeout --kill-after=5 "$limit" "$python" -W ignore $command >"$folder/$label.txt" 2>"$folder/$label.err"
    code=$?
    figures=$(tail -n 1 "$folder/$label.txt")
    [ "$label" = tests ] && figures=$(echo "$figures" | sed -E 's/ in .*//; s/,//g; s/([0-9]+) ([a-z]+)/\2=\1/g')
    if [ "$code" = 0 ]; then
        rm "$folder/$label.err"
    else
        status=1
        [ "$code" = 124 ] && figures="exceeded=${limit}s" || figures="failed=$code see=$label.err"
    fi
    echo "$label seconds=$(($(date +%s) - began)) $figures" | tee -a "$folder/summary.txt"
done
exit $status
