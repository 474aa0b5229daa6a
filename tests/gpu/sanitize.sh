#!/bin/bash
# compute-sanitizer over one case of every kernel family, on a machine with a GPU:
#
#     tests/gpu/sanitize.sh [memcheck|racecheck|initcheck|synccheck] [case ...]
#
# Kernels are compiled before, without the sanitizer: it slows down the compiler too. SECONDS_LEFT bounds the whole run.
# Prints one line per case; the exit code is the number of cases with errors.
set -u
tool=${1:-memcheck}
shift || true
here=$(cd "$(dirname "$0")" && pwd)
cases=${*:-pointwise softmax_long layer_norm group_norm column_sum_long gemm_bf16 gated_unit int4_groups int8_weight split_k sdpa_causal_bf16 causal
  attention_gradients_bf16 cross_entropy_long scatter_add index_put embedding cumsum transpose_add rope conv conv_depthwise max_pool random}
limit=${SECONDS_LEFT:-600}
export AICC_CACHE_DIR=${AICC_CACHE_DIR:-$(mktemp -d)} OUT=$(mktemp -d)
checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -z "$checker" ]; then
  checker=$(python -c 'import glob, sysconfig; print(next(iter(glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/compute-sanitizer", recursive=True)), ""))')
fi
if [ -z "$checker" ]; then
  echo "no compute-sanitizer: it comes with the CUDA toolkit" >&2
  exit 127
fi
bad=0
for name in $cases; do
  left=$((limit - SECONDS))
  if [ "$left" -lt 10 ]; then
    echo "out of time before $name"
    break
  fi
  python "$here/gpu_check.py" kernels --case "$name" > "$OUT/$name.plain" 2>&1
  timeout "$left" "$checker" --tool "$tool" --target-processes all --error-exitcode 99 --print-limit 5 \
    python "$here/gpu_check.py" kernels --case "$name" > "$OUT/$name.log" 2>&1
  code=$?
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$name.log" | tail -1)
  echo "$tool $name: exit $code ${summary#=========}"
  if [ $code -eq 99 ]; then
    bad=$((bad + 1))
    grep -E '^=========' "$OUT/$name.log" | head -20
  fi
done
exit $bad
