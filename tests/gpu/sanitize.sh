#!/bin/bash
# compute-sanitizer over one case of every kernel family, on a machine with a GPU:
#
#     tests/gpu/sanitize.sh [memcheck|racecheck|initcheck|synccheck] [case ...]
#
# Kernels are compiled before, without the sanitizer: it slows down the compiler too. JOBS processes share the cases; each takes several at a time, as
# most of the time goes into starting. SECONDS_LEFT bounds the whole run. Prints one line per group of cases; the exit code is the number with errors.
set -u
tool=${1:-memcheck}
shift || true
here=$(cd "$(dirname "$0")" && pwd)
cases=(${*:-pointwise softmax_long layer_norm group_norm column_sum_long total gemm_bf16 early_weights gated_unit gemm_maps int4_groups int8_weight fp8_weight split_k
  siblings sdpa_causal_bf16 causal window_softcap alibi attention_gradients_bf16 attention_training_bf16 cross_entropy_long linear_loss linear_loss_bf16 optimizer norm_backward mlp_backward
  scatter_add scatter_prod index_put embedding embedding_backward cumsum transpose_add rope conv conv_depthwise conv_backward max_pool extremes random
  hopper_full hopper_causal hopper_alibi hopper_window hopper_documents hopper_documents_training})
limit=${SECONDS_LEFT:-600}
jobs=${JOBS:-6}
export AICC_CACHE_DIR=${AICC_CACHE_DIR:-$(mktemp -d)} OUT=$(mktemp -d)
checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -z "$checker" ]; then
  checker=$(python -c 'import glob, sysconfig; print(next(iter(glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/compute-sanitizer", recursive=True)), ""))')
fi
if [ -z "$checker" ]; then
  echo "no compute-sanitizer: it comes with the CUDA toolkit" >&2
  exit 127
fi
share() { # JOB: its share of the cases, as options
  for ((i = $1; i < ${#cases[@]}; i += jobs)); do echo --case "${cases[$i]}"; done
}
for ((j = 0; j < jobs; j++)); do
  python "$here/gpu_check.py" kernels $(share $j) > "$OUT/$j.plain" 2>&1 &
done
wait
for ((j = 0; j < jobs; j++)); do
  left=$((limit - SECONDS))
  mkdir -p "$OUT/$j"
  OUT="$OUT/$j" timeout "$left" "$checker" --tool "$tool" --target-processes all --error-exitcode 99 --print-limit 5 \
    python "$here/gpu_check.py" kernels $(share $j) > "$OUT/$j.log" 2>&1 &
  running[$j]=$!
done
bad=0
for ((j = 0; j < jobs; j++)); do
  wait "${running[$j]}"
  code=$?
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$j.log" | tail -1)
  echo "$tool: exit $code ${summary#=========}; right: $(grep -E '^ok +kernels' "$OUT/$j.log" | awk '{print $3}' | sort -u | tr '\n' ' ')of $(share $j | wc -l)"
  grep -E '^FAIL' "$OUT/$j.log" | head -5
  if [ $code -eq 99 ]; then
    bad=$((bad + 1))
    grep -E '^=========' "$OUT/$j.log" | head -30
  fi
done
exit $bad
