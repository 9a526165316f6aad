#!/usr/bin/env bash
# Everything worth knowing of a GPU in ten minutes, on a bare machine with one and no network: bash benchmarks/gpu.sh [FOLDER]
#
# Needs Python 3.12 with torch, triton and numpy, and the wheels of benchmarks/gpu_wheels.sh in .whl. Every step has a clock of
# its own; one that fails or is late does not stop the next, and results are written as they come, the most telling first.
# FOLDER: benchmarks/results/DATE-DEVICE. LIMIT=590: seconds in all. Without a GPU the CUDA steps are skipped by name.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
began=$SECONDS work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor PIP_ROOT_USER_ACTION=ignore
if compgen -G ".whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" .whl/*.whl || exit 1
fi
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/benchmarks:$work/site
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
[[ $device == cpu ]] && has_gpu= || has_gpu=yes
out=${1:-benchmarks/results/$(date +%F)-$device}
mkdir -p "$out"
log=$out/log.txt

say() { echo "=== $((SECONDS - began)) s: $*" | tee -a "$log"; }

# step SECONDS NAME COMMAND...: run a command within its clock, and within what is left of all.
step() {
  local left=$((${LIMIT:-590} - SECONDS + began)) seconds=$1 name=$2
  shift 2
  if ((left < 15)); then say "$name: skipped, no time left"; return; fi
  say "$name"
  timeout -k 5 "$((seconds < left - 5 ? seconds : left - 5))" "$@" >>"$log" 2>&1
  local status=$?
  case $status in
    0) ;;
    124 | 137) say "$name: stopped by its clock" ;;
    *) say "$name: FAILED with status $status"; tail -n 5 "$log" ;;
  esac
}

# gpu SECONDS NAME COMMAND...: the same, where there is a GPU.
gpu() { if [[ -n $has_gpu ]]; then step "$@"; else say "$2: skipped, no GPU"; fi; }

# train SECONDS NAME ARGUMENTS...: a line of steps.jsonl.
train() {
  gpu "$1" "$2" "$python" benchmarks/train.py "${@:3}" --rows "${ROWS:-mixed}" --steps 5 --warmup 2 --name "$2" --json "$out/steps.jsonl"
}

[[ -n $has_gpu ]] && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv | tee -a "$log"
"$python" -c 'import platform, torch, triton, numpy; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)' | tee -a "$log"

say "compile tiles and FlexAttention, beside the next steps"
peers=(benchmarks/attention.py --seqs 8192 --head-dims 128 --backends interval flex sdpa-flash-causal sdpa-cudnn-causal)
warm=()
if [[ -n $has_gpu ]]; then
  timeout 150 "$python" benchmarks/tiles.py --compile 10 >"$out/compile.txt" 2>&1 &
  warm+=($!)
  timeout 150 "$python" "${peers[@]}" --layouts causal --rounds 1 >>"$out/compile.txt" 2>&1 &
  warm+=($!)
fi
# Under the interpreter they run in CI; Triton 3.6's does not take numpy 2.5.
gpu 100 "correctness of kernels, backends, updates and loss" "$python" -m pytest tests/kernels/test_interval_attention.py tests/model/test_backends.py \
  tests/engine/test_update.py::test_{one_kernel_equals_torchs,the_kernel_changes_nothing_where_the_update_is_skipped} \
  tests/objective/test_chunked_cross_entropy.py::test_a_gpu_gives_the_same_without_waiting -n 12 -q -p no:cacheprovider -p no:benchmark
((${#warm[@]})) && wait "${warm[@]}"

best="train.precision=bf16 model.attention=interval train.compile=true"
rows4="train.global_batch_size=4 data.num_streams=4"
# shellcheck disable=SC2086 # words of overrides
train 50 1.4b-micro-batch-4 configs/1.4b.yaml $best $rows4 train.micro_batch_size=4 --syncs --trace "$out/trace.json"
gpu 110 "attention against its peers" "$python" "${peers[@]}" --layouts pairs interleaved-256 causal --json "$out/attention.json"
gpu 70 tiles "$python" benchmarks/tiles.py --json "$out/tiles.json"
# shellcheck disable=SC2086
{
  train 45 7b-width-8-layers configs/7b.yaml $best train.recompute=none model.num_layers=8 train.global_batch_size=2 \
    train.micro_batch_size=2 data.num_streams=2
  train 45 0.37b configs/0.37b.yaml $best train.recompute=none train.global_batch_size=8 train.micro_batch_size=8 data.num_streams=8
  ROWS=text train 35 1.4b-text configs/1.4b.yaml $best $rows4 train.micro_batch_size=4
}
gpu 30 ceilings "$python" benchmarks/ceilings.py --json "$out/ceilings.json"
# shellcheck disable=SC2086
{
  train 45 1.4b-micro-batch-1 configs/1.4b.yaml $best $rows4
  train 40 1.4b-eager configs/1.4b.yaml train.compile=false model.attention=interval $rows4
  train 40 1.4b-eager-sdpa configs/1.4b.yaml train.compile=false model.attention=sdpa $rows4
}
[[ -n $has_gpu ]] || step 120 "correctness of the engine" "$python" -m pytest tests/engine/test_engine.py -q -p no:cacheprovider
if [[ -f data/quickstart/pairs/manifest.json ]]; then
  run=("$python" -m megafusion.cli train configs/quickstart.yaml "out=$work/run" samples.every=0 checkpoint.every=5)
  if [[ -n $has_gpu ]]; then run+=(train.num_steps=60 train.precision=bf16 model.attention=auto); else run+=(train.num_steps=10); fi
  # shellcheck disable=SC2016 # expanded by the inner shell
  step 60 "a real run, killed after its first checkpoint" bash -c '
    "${@:2}" & pid=$!
    until compgen -G "$1/checkpoints/step-????????" >/dev/null; do kill -0 "$pid" || exit 1; sleep 0.1; done
    kill -KILL "$pid"; wait "$pid"; true' kill-run "$work/run" "${run[@]}"
  step 90 "the same run, resumed" "${run[@]}"
  [[ -f $work/run/metrics.jsonl ]] && cp "$work/run/metrics.jsonl" "$work/run/starts.json" "$out/"
else
  say "a real run: skipped, no data/quickstart (make preprocess)"
fi
[[ -f $out/trace.json ]] && gzip -f "$out/trace.json"
say "end"
"$python" - "$out" <<'P'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1], "steps.jsonl")
for line in path.read_text().splitlines() if path.exists() else []:
    r = json.loads(line)
    mfu = "" if r["mfu"] is None else f"MFU {r['mfu']:.1%}"
    print(f"{r['name']:28} {1e3 * r['step_seconds']:8.1f} ms  {mfu}  {r['tokens_per_second']:,.0f} tokens/s  {r['peak_gib'] or 0:.1f} GiB")
P
