#!/usr/bin/env bash
# Collect the wheels that benchmarks/gpu.sh needs on a machine without a network: bash benchmarks/gpu_wheels.sh [FOLDER]
#
# For Python 3.12 on x86-64, beside the torch, triton and numpy of that machine. FOLDER is .whl, which git ignores.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl} python=${PYTHON:-python3}
mkdir -p "$folder"
pinned() { grep -E "^$1==" requirements.txt; }
# DeepSpeed has no wheel of its own. megafusion's is for its version: the code comes from the checkout.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps -w "$folder" "$(pinned deepspeed)" .
names=()
for package in annotated-doc annotated-types braceexpand diffusers einops execnet hjson hypothesis ImageHash importlib_metadata \
  iniconfig lazy-importer msgpack ninja pluggy py-cpuinfo pydantic pydantic_core pytest pytest-timeout \
  pytest-xdist PyWavelets shellingham sortedcontainers typer typing-inspection webdataset zipp; do
  names+=("$(pinned "$package")")
done
platforms=()
for name in manylinux_2_{39,35,34,31,28,27,26,24,17,5} manylinux2014 manylinux1; do platforms+=(--platform "${name}_x86_64"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d "$folder" "${names[@]}"
du -sh "$folder"
