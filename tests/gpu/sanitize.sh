#!/bin/bash
# compute-sanitizer over one case of every kernel family, on a machine with a GPU:
#
#     tests/gpu/sanitize.sh [memcheck|racecheck|initcheck|synccheck] [case ...]
#
# "all" for a case: every case there is. Kernels are compiled before, without the sanitizer: it slows down the compiler too. JOBS processes share the
# cases; each takes several at a time, as most of the time goes into starting. SECONDS_LEFT bounds the whole run. Prints one line per group of cases;
# the exit code is the number with errors. What racecheck says of Triton's dispatch of warps is none, told from
# all else by the instructions that it names (dispatch_word.py).
set -u
tool=${1:-memcheck}
shift || true
here=$(cd "$(dirname "$0")" && pwd)
cases=(${*:-pointwise softmax_long layer_norm group_norm column_sum_long total gemm_bf16 early_weights gated_unit gemm_maps int4_groups int8_weight fp8_weight split_k
  siblings sdpa_causal_bf16 causal window_softcap alibi attention_gradients_bf16 attention_training_bf16 cross_entropy_long linear_loss linear_loss_bf16 optimizer norm_backward mlp_backward
  scatter_add scatter_prod index_put embedding embedding_backward cumsum transpose_add rope conv conv_depthwise conv_backward max_pool extremes random
  small_full small_causal small_alibi small_window small_documents small_documents_training ring ring_gelu ring_residual ring_columns_f16})
if [ "${cases[*]}" = all ]; then
  cases=($(python "$here/gpu_check.py" --names))
fi
limit=${SECONDS_LEFT:-600}
jobs=${JOBS:-6}
cache=${AICC_CACHE_DIR:-$(mktemp -d)}
export OUT=$(mktemp -d)
checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -z "$checker" ]; then
  checker=$(python -c 'import glob, sysconfig; print(next(iter(glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/compute-sanitizer", recursive=True)), ""))')
fi
if [ -z "$checker" ]; then
  echo "no compute-sanitizer: it comes with the CUDA toolkit" >&2
  exit 127
fi
options=(--tool "$tool" --target-processes all --error-exitcode 99 --print-limit 50 --show-backtrace no)
share() { # JOB: its share of the cases, as options
  for ((i = $1; i < ${#cases[@]}; i += jobs)); do echo --case "${cases[$i]}"; done
}
for ((j = 0; j < jobs; j++)); do
  (
    export AICC_CACHE_DIR="$cache/$j" OUT="$OUT/$j"
    mkdir -p "$OUT"
    python "$here/gpu_check.py" kernels $(share $j) > "$OUT/plain" 2>&1
    timeout $((limit - SECONDS)) "$checker" "${options[@]}" python "$here/gpu_check.py" kernels --seconds 100000 $(share $j) > "$OUT/log" 2>&1
    echo $? > "$OUT/code"
  ) &
done
wait
bad=0
for ((j = 0; j < jobs; j++)); do
  log=$OUT/$j/log code=$(cat "$OUT/$j/code")
  right=$(grep -E '^ok +kernels' "$log" | awk '{print $3}' | sort -u | tr '\n' ' ')
  echo "$tool: exit $code $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | tr -d =); right: ${right}of $(share $j | wc -l)"
  grep -E '^FAIL' "$log" | head -5
  if [ "$tool" = racecheck ]; then
    python "$here/dispatch_word.py" "$log" "$cache/$j" || bad=$((bad + 1))
  elif [ "$code" -eq 99 ]; then
    bad=$((bad + 1))
    grep -E '^=========' "$log" | head -30
  fi
done
exit $bad
