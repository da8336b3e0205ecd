#!/usr/bin/env bash
# All that a GPU has to show, in one command that takes less than ten minutes and needs no network:
#
#   bench/on_gpu.sh [--stage NAME,...] [--out DIR] [--wheels DIR] [--rehearse]
#
# --stage     of compile, tests, headline, small, shallow, frozen, dense: all of these, in this order, if not given.
#             Only on request: sanitize (NVIDIA's checkers of memory and races) and tune
# --out       where results go (bench/results/gpu): JSON, profiles and the output of each stage, written as they come
# --wheels    wheels of peers and of pytest's plugins, installed first, into a folder of their own
# --rehearse  toy sizes, the kernels under Triton's interpreter: shows that the script runs where there is no GPU
#
# Every stage has a time limit of its own; one that fails or is cut off leaves its output and lets the rest run. What is
# not installed is reported and left out. PYTHON is the interpreter (python3); it has to have torch and triton.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all=compile,tests,headline,small,shallow,frozen,dense
stages=$all out=bench/results/gpu wheels="" rehearse=0
while (($#)); do
  case "$1" in
    --stage) stages=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --rehearse) rehearse=1; shift ;;
    *) sed -n '2,13p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheel" || echo "not installed: $wheel"
  done
  export PYTHONPATH="$site:$PYTHONPATH"
fi

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# Ours and the peers that were the fastest somewhere; all of them take part in the headline.
some="ours,ours (exact),eager,TRL,Liger scaled CE,cut-cross-entropy"
bench=(--device cuda --repeats 5 --profile) warm=() tests=(-m gpu -k "not test_any_shape" tests) toy=()
if ((rehearse)); then
  if [[ $stages == "$all" ]]; then stages+=,tune; fi
  bench=(--smoke --profile) warm=(--toy --workers 1 --cases headline --contenders ours) toy=(--toy --repeats 1)
  some="ours,eager"
  # The test that every backend has to pass before anything else is worth looking at.
  tests=(-k "test_sure_tokens_keep_their_digits and triton and float32" tests/test_logprob.py)
  export TRITON_INTERPRET=1 COVGRPO_BACKEND=triton
fi
if ((!rehearse)) && has xdist; then tests=(-n 12 --dist worksteal "${tests[@]}"); fi

failed=()
run() { # name, seconds, then the command: its output is shown and kept; a failure does not keep the rest from running
  local name=$1 limit=$2
  shift 2
  # All of them together end in time, whatever each takes.
  ((limit = limit < 570 - SECONDS ? limit : 570 - SECONDS))
  if ((limit <= 0)); then
    echo "== $name: no time is left" | tee "$out/$name.log"
    failed+=("$name")
    return
  fi
  echo "== $name, at most $limit s, $SECONDS s have passed: $*"
  if ! timeout --kill-after 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"; then failed+=("$name"); fi
}

measure() { # case, seconds, contenders
  run "$1" "$2" "$python" -m bench "${bench[@]}" --dtype bfloat16 --cases "$1" ${3:+--contenders "$3"} --out "$out"
}

sanitize() {
  if ((rehearse)) || ! command -v compute-sanitizer >/dev/null; then
    echo "== sanitize: skipped, there is no compute-sanitizer or no GPU"
    return
  fi
  # Without PyTorch's allocator, so that every tensor has bounds of its own.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    run "sanitize-$tool" 250 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu -k test_a_small_case_of_each_kernel tests/test_gpu.py
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

for stage in ${stages//,/ }; do
  case "$stage" in
    compile) run compile 110 "$python" -m bench warm "${warm[@]}" ;;
    tests)
      if has pytest && has hypothesis; then
        run tests 180 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider "${tests[@]}"
      else
        echo "== tests: skipped, pytest or hypothesis is not installed" | tee "$out/tests.log"
      fi
      ;;
    headline) if ((rehearse)); then measure headline 60 "$some"; else measure headline 150 ""; fi ;;
    small | shallow | frozen | dense) measure "$stage" 80 "$some" ;;
    sanitize) sanitize ;;
    tune) run tune 500 "$python" -m bench tune "${toy[@]}" --out "$out/tune.json" ;;
    *) echo "unknown stage: $stage" >&2; exit 2 ;;
  esac
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "done: $out"
