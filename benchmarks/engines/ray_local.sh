#!/usr/bin/env bash
# A Ray of one's own on this machine, and what Pylorus does under it: a sweep of two jobs at once that is interrupted and
# goes on with the same command; what the jobs give is what a run without Ray gives. Then the same sweep on a cluster
# of one node that runs already.
#
#   PYTHON=/path/to/venv/bin/python benchmarks/engines/ray_local.sh
#
# Needs a Python with `pylorus[ray]`. Everything lies in one temporary folder, which stays.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
HERE=$(mktemp -d "${TMPDIR:-/tmp}/pylorus-ray.XXXXXX")
WORDS=(data=synthetic data.drawn.images=12 data.drawn.size=64 data.image_size=32 data.workers=0
  model=timm model.name=test_resnet.r160_in1k model.weights=none trainer=cpu trainer.threads=1 augment=light report=false
  stages.pretrain.epochs=3 stages.finetune.epochs=150)
SWEEP=(-m hydra/launcher=ray_local "${WORDS[@]}" seed=0,1 "cache.folder=$HERE/cache" "hydra.sweep.dir=$HERE/sweep")
say() { printf '\n== %s\n' "$*"; }
state() { "$PYTHON" -c 'import json, sys; s = json.load(open(sys.argv[1] + "/status.json")); print(s["state"], "resumed", s.get("resumed", 0))' "$1"; }
until_file() { for _ in $(seq 900); do [ -s "$1" ] && return; sleep 0.2; done; echo "waited in vain for $1"; exit 1; }

cd "$HERE"
"$PYTHON" -c 'import ray; print("Ray", ray.__version__)'
say "a sweep of two jobs through hydra/launcher=ray_local, interrupted: $HERE"
"$PYTHON" "$ROOT/train.py" "${SWEEP[@]}" >sweep.out 2>&1 &
SWEEP_PID=$!
trap 'kill "$SWEEP_PID" 2>/dev/null || true' EXIT
until_file "$HERE/sweep/0/finetune/metrics.csv"
until_file "$HERE/sweep/1/finetune/metrics.csv"
say "kill -TERM, to the sweep alone"
kill -TERM "$SWEEP_PID"
CODE=0
wait "$SWEEP_PID" || CODE=$?
grep '^interrupted\|^to resume\|^sweep' sweep.out
echo "exit code $CODE"
for job in 0 1; do echo "job $job: $(state "$HERE/sweep/$job")"; done

say "the same command again"
"$PYTHON" "$ROOT/train.py" "${SWEEP[@]}" >again.out 2>&1 && CODE=0 || CODE=$?
grep -h 'goes on after\|^[|]\|^sweep' again.out || true
echo "exit code $CODE"
for job in 0 1; do echo "job $job: $(state "$HERE/sweep/$job")"; done

say "seed 0 without Ray"
"$PYTHON" "$ROOT/train.py" "${WORDS[@]}" seed=0 "cache.folder=$HERE/other" "hydra.run.dir=$HERE/plain" >plain.out 2>&1
"$PYTHON" - <<'PY'
from safetensors.numpy import load_file

plain, job = (load_file(f"{run}/model/model.safetensors") for run in ("plain", "sweep/0"))
same = all((plain[name] == job[name]).all() for name in plain)
print("the weights of job 0 are those of the run without Ray, bit for bit" if same else "THE WEIGHTS DIFFER")
raise SystemExit(not same)
PY

say "a cluster that runs already"
export RAY_USAGE_STATS_ENABLED=0
RAY=$(dirname "$PYTHON")/ray
trap '"$RAY" stop >/dev/null 2>&1' EXIT
"$RAY" start --head --port=6399 --num-cpus=2 --include-dashboard=false --disable-usage-stats >cluster.out 2>&1
"$PYTHON" "$ROOT/train.py" "${SWEEP[@]}" "hydra.sweep.dir=$HERE/cluster" hydra.launcher.ray.init.address=auto \
  >joined.out 2>&1 && CODE=0 || CODE=$?
grep -h '^[|]\|^sweep\|error' joined.out || true
echo "exit code $CODE"
for folder in sweep/0 sweep/1 cluster/0 cluster/1; do [[ $(state "$HERE/$folder") == finished* ]] || exit 1; done
[ "$CODE" = 0 ] && say "all finished"
