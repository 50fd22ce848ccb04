#!/usr/bin/env bash
# The first half hour on a GPU: does it agree with the CPU, how fast is it, what does `paper` need, all of `small`.
#   benchmarks/first_gpu.sh                     every part, one after the other
#   benchmarks/first_gpu.sh steps small         these parts; each takes 9 minutes at most
#   benchmarks/first_gpu.sh --device cpu        the same on a CPU and embedded digits: shows that it runs
# Parts: tests steps compile workers repeat resnet18 mobilenet vgg13 small. Needs python3 with torch; of silalib's other
# packages those of training alone. Files go to $OUT, by default first_gpu/ beside the results: a log a part, what it
# measured as JSON, and tar files of finished records. SILALIB_DATA and SILALIB_RESULTS as everywhere, by default in /tmp.
set -uo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
device=auto
parts=()
while [ $# -gt 0 ]; do
    case $1 in
    --device)
        device=${2:?--device needs auto, cpu, cuda or cuda:N}
        shift
        ;;
    tests | steps | compile | workers | repeat | resnet18 | mobilenet | vgg13 | small) parts+=("$1") ;;
    *)
        echo "unknown part $1: choose from tests steps compile workers repeat resnet18 mobilenet vgg13 small" >&2
        exit 2
        ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests steps compile workers repeat resnet18 mobilenet vgg13 small)
export SILALIB_DATA=${SILALIB_DATA:-${TMPDIR:-/tmp}/silalib-data}
export SILALIB_RESULTS=${SILALIB_RESULTS:-${TMPDIR:-/tmp}/silalib-results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
OUT=${OUT:-$SILALIB_RESULTS/first_gpu}
python=${PYTHON:-python3}
mkdir -p "$OUT" || exit 1

# run LIMIT COMMAND...: at most so many seconds, then SIGINT, which lets training write its checkpoints
run() { timeout --foreground --signal=INT --kill-after=20 "$@"; }
first() { run "$1" "$python" benchmarks/first_gpu.py "${@:2}" --device "$device" --out "$OUT"; }
bench() { run "$1" "$python" benchmarks/train_step.py --device "$device" "${@:2}"; }

tests() {
    local bad=0
    first 60 versions || bad=1
    # a warning of another version is shown and fails nothing; plugins that happen to be installed stay out
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 run 460 "$python" -m pytest -q -p no:cacheprovider -W default tests/test_gpu.py || bad=1
    return $bad
}
steps() {
    if [ "$device" = cpu ]; then
        bench 120 --nets mobilenet --methods ind --speeds fast eager --rounds 1 --steps 1 --output "$OUT/steps.json"
        return
    fi
    local bad=0
    bench 330 --methods ind sila --speeds fast eager --output "$OUT/steps.json" || bad=1
    bench 180 --nets mobilenet --methods ind --speeds fast float32 nchw --output "$OUT/mobilenet.json" || bad=1
    return $bad
}
compile() {
    if [ "$device" = cpu ]; then
        echo "torch.compile is left out on a CPU"
        return
    fi
    local bad=0
    bench 270 --nets resnet18 --methods sila --speeds fast compiled --output "$OUT/compiled.json" || bad=1
    bench 250 --nets mobilenet --methods sila --speeds fast compiled --output "$OUT/compiled_mobilenet.json" || bad=1
    return $bad
}
# with_mps COMMAND...: with the GPU shared by NVIDIA's multi-process service, if its daemon starts
with_mps() {
    if [ "$device" = cpu ] || ! command -v nvidia-cuda-mps-control >/dev/null; then
        return 1
    fi
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
    CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    local bad=1
    if nvidia-cuda-mps-control -d </dev/null >/dev/null 2>&1; then
        bad=0
        "$@" || bad=2
        echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1
    fi
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    return $bad
}
workers() {
    local bad=0
    first 260 workers || bad=1
    with_mps first 260 workers --mps
    [ $? -ne 2 ] || bad=1
    return $bad
}
repeat() {
    first 260 repeat --half a && first 260 repeat --half b # two processes: each searches its own algorithms
}
resnet18() { first 530 ind --net resnet18; }
mobilenet() { first 530 ind --net mobilenet; }
vgg13() { first 530 ind --net vgg13; }
small() {
    with_mps first 535 small
    case $? in
    0) ;;
    1) first 535 small ;; # no MPS: the processes take turns
    *) return 1 ;;
    esac
}

if [ "$device" != cpu ] && [ ! -e "$SILALIB_DATA/cifar-100-python/train" ]; then
    echo "no CIFAR-100 in $SILALIB_DATA: the parts that train download it, or end where there is no network" >&2
fi
status=0
for part in "${parts[@]}"; do
    began=$SECONDS
    echo "== $part"
    "$part" 2>&1 | tee "$OUT/$part.log" || status=1
    echo "== $part took $((SECONDS - began)) s"
done
first 60 pack || status=1
exit $status
