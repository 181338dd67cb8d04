#!/usr/bin/env bash
# The one command for a machine with a GPU: build, self-test, tests, sanitizers, benchmarks.
#
#   [OUT=folder] [PYTHON=python3] [BENCHMARK_COMMIT=...] benchmarks/gpu_check.sh
#
# Needs what is installed and nothing from a network: torch, nvcc, ninja, setuptools, pytest. Ends within nine minutes:
# a step that takes longer than its share is stopped, the others go on, the less important ones with what time is left.
# Leaves at most a dozen files in $OUT and a line a step in summary.txt; the exit status is 1 when a step failed. BENCHMARK_COMMIT names the commit of a copied tree.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
SUMMARY=$OUT/summary.txt
TOTAL=${TOTAL:-530} # seconds
SECONDS=0
FAILED=()
export PYTHON OUT PYTHONUNBUFFERED=1
rm -f "$OUT"/{build,tests,sanitizer,benchmarks}.log "$OUT"/{doctor,cuda,cuda_compiled,compression}.json \
  "$OUT/model_cuda.svg" "$SUMMARY"
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer, where only nvcc is on the PATH

say() { echo "$*" | tee -a "$SUMMARY"; }

# step NAME LIMIT LOG COMMAND...: run it for at most LIMIT seconds and no longer than the whole may take.
step() {
  local name=$1 limit=$2 log=$OUT/$3 begin=$SECONDS status=0
  shift 3
  ((limit > TOTAL - SECONDS)) && limit=$((TOTAL - SECONDS))
  echo "== $name" >>"$log"
  if ((limit <= 0)); then
    status=124
  else
    timeout --kill-after=5 "$limit" bash -c '"$@"' step "$@" >>"$log" 2>&1 || status=$?
  fi
  case $status in
    0) say "ok      $name ($((SECONDS - begin)) s)" ;;
    124 | 137) say "STOPPED $name (after $((SECONDS - begin)) s), see ${log##*/}" ;;
    *) say "FAILED  $name (status $status, $((SECONDS - begin)) s), see ${log##*/}" ;;
  esac
  ((status == 0)) || FAILED+=("$name")
  return "$status"
}

build() {
  # Only what this GPU runs: Hopper's own code where it is a Hopper.
  local capability
  capability=$("$PYTHON" -c 'import torch; c = torch.cuda.get_device_capability(); print(f"{c[0]}.{c[1]}")') || return
  [[ $capability == 9.0 ]] && capability=9.0a
  SPARSE_RCNN_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    "$PYTHON" setup.py build_ext --inplace
}

doctor() { "$PYTHON" -m sparse_rcnn.doctor --json >"$OUT/doctor.json"; }

# sanitize TOOL OPTIONS...: the small problems of every operator, forward and backward.
sanitize() {
  local tool=$1
  shift
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 86 "$@" \
    "$PYTHON" -m pytest tests/gpu -q -x \
    -k "(values and (seed0 or seed1) or deterministic_gradients_are_right) and (float32 or bfloat16)"
}

# initcheck must see torch's kernels write what ours read, so it runs over all kernels; only ours count.
initcheck() {
  local log status=0
  log=$(sanitize initcheck 2>&1) || status=$?
  echo "$log" | tail -n 2000
  if ((status == 86)); then
    ! grep -A2 'Uninitialized' <<<"$log" | grep -q 'sparse_rcnn'
  else
    return "$status"
  fi
}

export -f build doctor sanitize initcheck # for the shells that step starts

sanitizers() {
  if ! command -v compute-sanitizer >/dev/null; then
    say "skipped sanitizers: no compute-sanitizer on the PATH"
    return
  fi
  # Racecheck and synccheck look into shared memory and barriers: of our kernels alone.
  step memcheck 40 sanitizer.log sanitize memcheck --kernel-name kns=sparse_rcnn
  if grep -q 'Device not supported' "$OUT/sanitizer.log"; then
    say "skipped the other sanitizers: they do not support this device"
    return
  fi
  step racecheck 40 sanitizer.log sanitize racecheck --kernel-name kns=sparse_rcnn
  step synccheck 30 sanitizer.log sanitize synccheck --kernel-name kns=sparse_rcnn
  step initcheck 40 sanitizer.log initcheck
}

main() {
  command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader |
    tee -a "$SUMMARY"
  if step build 150 build.log build; then
    step doctor 40 tests.log doctor
    step "GPU tests" 100 tests.log "$PYTHON" -m pytest tests/gpu -q -rs
    step "whole image" 130 benchmarks.log "$PYTHON" -m benchmarks.model --device cuda --runs 3 \
      --json "$OUT/cuda.json" --picture "$OUT/model_cuda.svg"
    step operators 120 benchmarks.log "$PYTHON" -m benchmarks --device cuda --quick --json "$OUT/cuda.json"
    step compression 30 benchmarks.log "$PYTHON" -m benchmarks.compression --device cuda --json "$OUT/compression.json"
    step pipeline 45 benchmarks.log "$PYTHON" -m benchmarks.pipeline --device cuda --batch-size 16 --workers 8 --rounds 3 \
      --json "$OUT/pipeline_cuda.json"
    step "training step" 120 benchmarks.log "$PYTHON" -m benchmarks.train_step --device cuda --batch-size 2 \
      --json "$OUT/train_step_cuda.json"
    sanitizers
    step "whole image, torch.compile" 200 benchmarks.log "$PYTHON" -m benchmarks.model --device cuda --runs 3 \
      --batches 1 --compile --json "$OUT/cuda_compiled.json"
    step "operators, torch.compile" 100 benchmarks.log "$PYTHON" -m benchmarks --device cuda --dtype bfloat16 \
      --compile --quick --json "$OUT/cuda_compiled.json"
    step "operator tests" 50 tests.log "$PYTHON" -m pytest tests/ops -q -k native
  fi
  if ((${#FAILED[@]})); then
    say "${#FAILED[@]} of the steps failed: ${FAILED[*]}"
    return 1
  fi
  say "all steps passed in $SECONDS s"
}

main
