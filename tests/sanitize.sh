#!/usr/bin/env bash
# The C++ kernels under sanitizers; `make test-deep` runs this too. ThreadSanitizer gets a program of its own (race.cpp),
# AddressSanitizer and UndefinedBehaviorSanitizer the tests of the kernels. Needs gcc with its sanitizers. PYTHON is the
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD python=$(realpath -s "${PYTHON:-.venv/bin/python}") work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== threads"
g++ -std=c++20 -O1 -g -fsanitize=thread -Wno-psabi -Icsrc tests/race.cpp -o "$work/race"
# ThreadSanitizer does not start at some randomized addresses, so these are switched off.
setarch --addr-no-randomize "$work/race"

echo "== addresses and undefined behaviour"
flags="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
COVGRPO_BUILD_CPP=1 COVGRPO_CXXFLAGS=$flags COVGRPO_LDFLAGS=$flags "$python" setup.py -q build_ext --build-lib "$work" --build-temp "$work/objects"
cp -r covgrpo_kernels/. "$work/covgrpo_kernels.package"
rm -f "$work"/covgrpo_kernels.package/*.so
mv "$work"/covgrpo_kernels/*.so "$work/covgrpo_kernels.package/"
rmdir "$work/covgrpo_kernels"
mv "$work/covgrpo_kernels.package" "$work/covgrpo_kernels"
cd "$work"
export PYTHONPATH=$work LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 COVGRPO_BUILD_CPP=1 OMP_NUM_THREADS=2 HYPOTHESIS_PROFILE=suite
"$python" -c "
import covgrpo_kernels
from covgrpo_kernels.kernels import cpp
assert covgrpo_kernels.__file__.startswith('$work'), covgrpo_kernels.__file__
print(cpp._cpp.__file__, cpp.isa())"
"$python" -m pytest -q -p no:cacheprovider --rootdir "$root" "$root/tests/test_cpp.py" "$root/tests/test_cpp_tails.py" "$root/tests/test_logprob.py" \
  "$root/tests/test_weights.py" "$root/tests/test_plan.py" -k "(test_cpp or cpp or portable) and not in_vain and not by_instruction_set"
