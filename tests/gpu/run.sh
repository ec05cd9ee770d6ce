#!/bin/sh
# Run the GPU tier on a machine that has a GPU, Python, torch and perhaps no network.
#
#   tests/gpu/run.sh WHEELS OUT [TESTS and pytest's arguments]
#
# WHEELS is the folder that tests/gpu/carry.py filled; OUT gets junit.xml, summary.txt, pytest.log, facts.txt.
# PYTHON chooses the interpreter that has torch (python3). SECONDS_LIMIT ends pytest (480: eight minutes).
set -u
wheels=${1:?the folder of the wheels} out=${2:?where the results go}
shift 2
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
wheels=$(cd "$wheels" && pwd) || exit 2
python=${PYTHON:-python3}
limit=${SECONDS_LIMIT:-480}

"$python" -c 'import torch' 2>/dev/null || { echo "$python has no torch; choose another with PYTHON=..." >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
started=$(date +%s)
"$python" -m venv --system-site-packages "$scratch/venv" || exit 2
# A torch that lies in an environment of its own is not among the interpreter's own packages.
"$scratch/venv/bin/python" -c 'import torch' 2>/dev/null ||
    "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
        > "$("$scratch/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/torch.pth"
# What torch needs is there already; everything else comes from the folder, or this fails.
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" \
    "$wheels"/*.whl > "$out/install.log" 2>&1 || {
    echo "pip could not install the wheels (exit code $?):" >&2
    tail -5 "$out/install.log" >&2
    exit 2
}
export PATH="$scratch/venv/bin:$PATH" PYTHONPATH="$here" PYTHONDONTWRITEBYTECODE=1
# torch.compile builds C++ at run time. Some jitted helpers of Megatron use it; without a compiler they run as written.
command -v cc > /dev/null 2>&1 || command -v gcc > /dev/null 2>&1 || export TORCHDYNAMO_DISABLE=1

python - > "$out/facts.txt" <<'FACTS'
import importlib.metadata, importlib.util, os, platform, shutil, torch
print("python", platform.python_version(), platform.platform())
print("torch", torch.__version__, "CUDA", torch.version.cuda, "dynamo", "off" if os.environ.get("TORCHDYNAMO_DISABLE") else "on")
print("device of the tier", os.environ.get("MINITRON_GPU_TIER_DEVICE", "cuda"))
print("GPUs", torch.cuda.device_count())
for index in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(index)
    print(" ", properties.name, f"{properties.total_memory / 2**30:.1f} GiB", f"sm_{properties.major}{properties.minor}")
if torch.cuda.is_available():
    print("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
for name in ("megatron-core", "transformers", "numpy", "transformer-engine", "apex", "nemo-toolkit", "nemo-aligner", "nvidia-modelopt"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
print("C compiler", shutil.which("cc") or shutil.which("gcc") or "none")
FACTS
command -v nvidia-smi > /dev/null 2>&1 && nvidia-smi >> "$out/facts.txt" 2>&1

cd "$here" || exit 2
[ $# -gt 0 ] || set -- tests/gpu
timeout --signal=INT --kill-after=20 "$limit" python -m pytest -m gpu -p no:cacheprovider \
    --junitxml "$out/junit.xml" --basetemp "$scratch/tests" -o tmp_path_retention_policy=all "$@" > "$out/pytest.log" 2>&1
code=$?
{
    echo "exit code $code$([ $code = 124 ] && echo ' (out of time)')"
    echo "seconds in all $(($(date +%s) - started))"
    grep -E '^(FAILED|ERROR|SKIPPED|[0-9]+ (passed|failed)|=+ .*(passed|failed))' "$out/pytest.log"
    tail -1 "$out/pytest.log"
} > "$out/summary.txt"
cat "$out/facts.txt" "$out/summary.txt"
exit $code
