#!/bin/bash
# Runs the tests of the KV budgets under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tests/patches/sanitize.sh FOLDER [pytest arguments]
#
# Builds the patched library in FOLDER with gcc, cmake and ninja: ten minutes on one core at first, then what has changed.
# The project and the same patches have to be installed in the Python that is found: only the library is another one.
# Ends with an error if a test fails or a sanitizer stops one, whose report is then the last thing printed.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mkdir -p "${1:?a folder to build in}" && cd "$1" && pwd)
shift
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    tests=("$root"/tests/runtime/test_kv_{states,schedules,steps,prompts,endless,sequences,refusals,kept_sets,file}.py "$root"/tests/runtime/test_bindings_kv.py)
fi

PYTHONPATH=$root/patches/backend python - "$root/patches" "$folder/tree" <<'PYTHON'
import os
import sys
from pathlib import Path

from llama_patches.assemble import assemble
from llama_patches.kept import cache_folder

patches, tree = map(Path, sys.argv[1:])
tree.mkdir(exist_ok=True)
assemble(patches, os.environ.get("ZIGGURAT_SOURCE"), cache_folder(os.environ), tree)
PYTHON

# NDEBUG as in a release: with it, ggml does not stop at the NaNs that tests of damaged states bring in
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1 -DNDEBUG"
launcher=$(command -v ccache || true)
export CCACHE_BASEDIR=$folder CCACHE_NOHASHDIR=true
cmake -S "$folder/tree" -B "$folder/build" -G Ninja -Wno-dev --log-level=WARNING -DCMAKE_BUILD_TYPE=None \
    -DGGML_NATIVE=ON -DGGML_OPENMP=OFF "-DCMAKE_C_FLAGS=$flags" "-DCMAKE_CXX_FLAGS=$flags" \
    "-DCMAKE_C_COMPILER_LAUNCHER=$launcher" "-DCMAKE_CXX_COMPILER_LAUNCHER=$launcher"
ninja -C "$folder/build" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" llama

cd "$root"
# libstdc++ as well: exceptions are intercepted, and Python itself does not load it. Python's own leaks are not ours.
# -s: a sanitizer ends the process, and pytest would keep its report to itself.
LLAMA_CPP_LIB_PATH=$folder/build/bin \
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    python -m pytest -x -s -p no:cacheprovider "${tests[@]}" 2> >(grep -vE '^(llama|sched|graph|resolve|set_|load|state|~llama|ziggurat|print_info)' >&2)
