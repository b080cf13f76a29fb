#!/usr/bin/env bash
# Proves the CUDA half on one GPU and writes benchmarks/results/gpu_NAME.json; some 30 minutes at most, each part within
# its own limit. A part that fails is told, and the others still run.
#
#   tests/gpu/acceptance.sh NAME [PART ...]
#
# NAME goes into the file's name; PART is one of those below (default: all of them, in this order), or several joined by
# "+", which run at once (tests may; figures of what runs beside something else mean nothing). It needs the
# packages of `pip install .[test]`, nvcc, and for the sanitizer compute-sanitizer. Two ranks share the GPU where
# NCCL is 2.30 or newer: name another library than torch's by ACCO_NCCL=/path/to/libnccl.so.2. Other variables:
# ACCO_OUT (a folder instead of benchmarks/results), ACCO_LIMIT_S (of every part), ACCO_SANITIZERS (the tools).
set -uo pipefail
cd "$(dirname "$0")/../.."
name=${1:?usage: tests/gpu/acceptance.sh NAME [PART ...]}
shift
nvidia-smi >/dev/null || { echo "acceptance: nvidia-smi finds no GPU, and everything here needs one" >&2; exit 2; }
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(kernel_tests runtime_tests engine_tests kernels overlap sanitizer)
out=${ACCO_OUT:-benchmarks/results}
logs=$(mktemp -d)
export ACCO_SANITIZERS=${ACCO_SANITIZERS:-memcheck racecheck synccheck}
export DS_ACCELERATOR=cuda PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export several="" # runs so that several ranks may share the GPU
if [ -n "${ACCO_NCCL:-}" ]; then
    several="env LD_PRELOAD=$ACCO_NCCL NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2"
fi

tests() { # file ...: counts in a JUnit file; ranks and workers share the GPU
    local part=$1 workers=$2
    shift 2
    DS_ACCELERATOR=cpu $several python3 -m pytest -q -p no:cacheprovider -m gpu -n "$workers" --dist load \
        --timeout 120 --junitxml "$logs/$part.xml" "$@"
}

kernel_tests() { tests kernel_tests 4 tests/gpu/test_kernels_gpu.py tests/gpu/test_quantization_gpu.py \
    tests/gpu/test_local_prediction_gpu.py tests/gpu/test_shards_gpu.py; }
runtime_tests() { tests runtime_tests 0 tests/gpu/test_runtime_gpu.py; }
engine_tests() { tests engine_tests 6 tests/gpu/test_engine_gpu.py; }
kernels() { python3 -m deepspeed_acco.tools.cli kernels --device cuda --json "$logs/kernels.json"; }
overlap() { python3 benchmarks/overlap.py --out "$out/gpu_${name}_overlap.json"; }
sanitizer() {
    local tool failed=0
    for tool in $ACCO_SANITIZERS; do
        echo "compute-sanitizer $tool"
        compute-sanitizer --tool "$tool" --kernel-name kns=acco4cuda --error-exitcode 9 \
            python3 -m tests.gpu.launches --apart || failed=1
    done
    return "$failed"
}

declare -A limit_s=([kernel_tests]=240 [runtime_tests]=240 [engine_tests]=420 [kernels]=120 [overlap]=180
    [sanitizer]=480)
export -f tests kernel_tests runtime_tests engine_tests kernels overlap sanitizer
run() { # part
    local begin=$SECONDS code limit=${ACCO_LIMIT_S:-${limit_s[$1]}}
    name=$name out=$out logs=$logs timeout "$limit" bash -c "$1" >"$logs/$1.log" 2>&1
    code=$?
    tail -n 40 "$logs/$1.log"
    echo "$1: exit code $code after $((SECONDS - begin)) s"
    echo "$1 $code $((SECONDS - begin))" >>"$logs/parts"
}
for group in "${parts[@]}"; do
    for part in ${group//+/ }; do
        [ -n "${limit_s[$part]:-}" ] || { echo "acceptance: no such part: $part" >&2; exit 2; }
    done
done
for group in "${parts[@]}"; do
    for part in ${group//+/ }; do
        run "$part" &
    done
    wait
done
python3 -m tests.gpu.summary "$name" "$logs" "$out/gpu_$name.json" "${parts[@]}" && ! grep -qv " 0 " "$logs/parts"
