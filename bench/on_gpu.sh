#!/usr/bin/env bash
# All that a GPU has to show, in one command without a network. Each stage ends within nine minutes and writes its
# results as it goes, so that a cut-off loses nothing.
#
#   bench/on_gpu.sh [--stage bench|tests|sanitize|tune|all] [--out DIR] [--wheels DIR] [--rehearse]
#
# --out       where results go (bench/results/gpu)
# --wheels    wheels to install first, into a folder of their own
# --rehearse  toy sizes, the kernels under Triton's interpreter: shows that the script runs where there is no GPU
#
# PYTHON is the interpreter (python3); it has to have torch, triton, pytest and hypothesis.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage=all out=bench/results/gpu wheels="" rehearse=0
while (($#)); do
  case "$1" in
    --stage) stage=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --rehearse) rehearse=1; shift ;;
    *) sed -n '2,12p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
fi

limit=510 toy=() bench=(--device cuda --profile) only=(-m gpu)
if ((rehearse)); then
  # The few tests that every backend has to pass before anything else is worth looking at.
  toy=(--toy --repeats 1) bench=(--smoke --cases headline,forward --contenders "ours,ours (single kernel),eager")
  only=(-k "test_sure_tokens_keep_their_digits and triton and float32")
  export TRITON_INTERPRET=1 COVGRPO_BACKEND=triton
fi

failed=()
run() { # name, then the command: its output is shown and kept; a failure does not keep the rest from running
  local name=$1
  shift
  echo "== $name: $*"
  if ! timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"; then failed+=("$name"); fi
}

tests() {
  run tests "$python" -m pytest -q --maxfail=20 -p no:cacheprovider "${only[@]}" tests
}

sanitize() {
  if ((rehearse)) || ! command -v compute-sanitizer >/dev/null; then
    echo "== sanitize: skipped, there is no compute-sanitizer or no GPU"
    return
  fi
  local limit=250
  # Without PyTorch's allocator, so that every tensor has bounds of its own.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    run "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu -k test_a_small_case_of_each_kernel tests/test_gpu.py
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
  run bench "$python" -m bench "${bench[@]}" --out "$out"
}

tune() {
  run tune "$python" -m bench tune "${toy[@]}" --out "$out/tune.json"
}

case "$stage" in
  bench | tests | sanitize | tune) "$stage" ;;
  all) bench; tests; sanitize; tune ;;
  *) echo "unknown stage: $stage" >&2; exit 2 ;;
esac
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "done: $out"
