#!/usr/bin/env bash
# A SLURM of two nodes, both on this machine, from Debian's packages, and what Pylorus does under it: a sweep through
# submitit; a job of it that is preempted, put back and finishes; a plain job that gets USR1 and goes on; a run of
# both nodes that does the same.
#
#   sudo PYTHON=/path/to/venv/bin/python benchmarks/engines/slurm_loopback.sh
#
# Needs Debian or Ubuntu, root, and a Python with `pylorus[slurm]`. Everything lies in one temporary folder, which
# stays; the daemons are stopped at the end. Not for a machine with a SLURM of its own.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
HERE=$(mktemp -d "${TMPDIR:-/tmp}/pylorus-slurm.XXXXXX")
NODE=$(hostname -s)
WORDS=(data=synthetic data.drawn.images=12 data.drawn.size=64 data.image_size=32 data.workers=0
  model=timm model.name=test_resnet.r160_in1k model.weights=none trainer=cpu augment=light report=false
  stages.pretrain.epochs=3 "cache.folder=$HERE/cache")
say() { printf '\n== %s\n' "$*"; }

command -v slurmctld slurmd munged >/dev/null || {
  say "installing Debian's SLURM"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

say "two nodes, loopback only: $HERE"
mkdir -p "$HERE"/{state,spool,munge}
export SLURM_CONF=$HERE/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=pylorus
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$HERE/munge/socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=10
ReturnToService=2
StateSaveLocation=$HERE/state
SlurmdSpoolDir=$HERE/spool/%n
SlurmctldPidFile=$HERE/slurmctld.pid
SlurmdPidFile=$HERE/slurmd-%n.pid
SlurmctldLogFile=$HERE/slurmctld.log
SlurmdLogFile=$HERE/slurmd-%n.log
NodeName=here[1-2] NodeHostname=$NODE NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=here[1-2] Default=YES MaxTime=60 State=UP
CONF
head -c 1024 /dev/urandom >"$HERE/munge/key"
chown -R root "$HERE/munge"
chmod 0700 "$HERE/munge"
chmod 0400 "$HERE/munge/key"
chmod 0755 "$HERE"
PIDS=()
stop() {
  [ -n "${SWEEP_PID:-}" ] && kill "$SWEEP_PID" 2>/dev/null
  scancel --user=root 2>/dev/null
  for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null; done
  true
}
trap stop EXIT
munged --foreground --force --key-file="$HERE/munge/key" --socket="$HERE/munge/socket" \
  --pid-file="$HERE/munge/pid" --log-file="$HERE/munge/log" --seed-file="$HERE/munge/seed" >"$HERE/munge/out" 2>&1 &
PIDS+=($!)
sleep 1
slurmctld -D >"$HERE/slurmctld.out" 2>&1 &
PIDS+=($!)
sleep 2
for node in here1 here2; do
  mkdir -p "$HERE/spool/$node"
  slurmd -D -N "$node" >"$HERE/slurmd-$node.out" 2>&1 &
  PIDS+=($!)
done
for _ in $(seq 30); do
  sinfo -h -o %t 2>/dev/null | grep -q idle && break
  sleep 1
done
sinfo || { tail -n 20 "$HERE"/*.log "$HERE"/*.out "$HERE/munge/"{log,out}; exit 1; }
sinfo -h -o %t | grep -q idle || { tail -n 20 "$HERE"/*.log "$HERE"/*.out; exit 1; }

state() { "$PYTHON" -c 'import json, sys; s = json.load(open(sys.argv[1] + "/status.json")); print(s["state"], "resumed", s.get("resumed", 0))' "$1"; }
until_file() { for _ in $(seq 600); do [ -s "$1" ] && return; sleep 0.2; done; echo "waited in vain for $1"; exit 1; }
start_now() { # a job that was put back; SLURM would wait for two minutes
  for _ in $(seq 150); do
    [ "$(squeue -h -r -j "$1" -o %t)" = PD ] && break
    sleep 0.2
  done
  squeue -r
  scontrol update "jobid=$1" starttime=now
}

say "a sweep of two jobs through hydra/launcher=slurm, one of them preempted by ${SUBMITIT_PREEMPT_SIGNAL:=USR1}"
export SUBMITIT_PREEMPT_SIGNAL OMP_NUM_THREADS=1
cd "$HERE"
"$PYTHON" "$ROOT/train.py" -m hydra/launcher=slurm hydra.launcher.gpus_per_node=null hydra.launcher.mem_gb=null \
  hydra.launcher.cpus_per_task=1 hydra.launcher.timeout_min=30 "${WORDS[@]}" stages.finetune.epochs=150 seed=0,1 \
  "hydra.sweep.dir=$HERE/sweep" >sweep.out 2>&1 &
SWEEP_PID=$!
until_file "$HERE/sweep/1/finetune/metrics.csv"
squeue
JOB=$(squeue -h -r -o '%i %t' | awk '$2 == "R" && $1 ~ /_1$/ {print $1}')
say "scancel --signal=$SUBMITIT_PREEMPT_SIGNAL $JOB"
scancel --signal="$SUBMITIT_PREEMPT_SIGNAL" "$JOB"
sleep 3
echo "job 1: $(state "$HERE/sweep/1")"
start_now "$JOB"
CODE=0
wait "$SWEEP_PID" || CODE=$?
SWEEP_PID=
grep '^[|]\|^report\|^sweep' sweep.out
echo "exit code $CODE"
for job in 0 1; do echo "job $job: $(state "$HERE/sweep/$job")"; done
grep -h "Caught signal\|requeued\|Exiting gracefully\|goes on after" "$HERE"/sweep/.submitit/*/*_log.* || true

say "a plain job that SLURM warns with USR1 and that puts itself back by scontrol requeue"
cat >plain.sh <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=plain --time=30 --requeue --open-mode=append --output=$HERE/plain.out --cpus-per-task=1
run=$HERE/plain
cd $HERE
if [ -e "\$run/status.json" ]; then set -- "resume=\$run"; else set -- ${WORDS[*]} stages.finetune.epochs=150 "hydra.run.dir=\$run"; fi
exec srun "$PYTHON" "$ROOT/train.py" "\$@"
JOB
unset SUBMITIT_PREEMPT_SIGNAL
PLAIN=$(sbatch --parsable plain.sh)
until_file "$HERE/plain/finetune/metrics.csv"
say "scancel --signal=USR1 $PLAIN"
scancel --signal=USR1 "$PLAIN"
start_now "$PLAIN"
for _ in $(seq 300); do
  [ -z "$(squeue -h -j "$PLAIN" 2>/dev/null)" ] && break
  sleep 1
done
scontrol show job "$PLAIN" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*\|Requeue=[0-9]*'
grep "to resume\|resumes after\|results:" plain.out
echo "plain: $(state "$HERE/plain")"

say "one run of both nodes, a process each; USR1 to the script puts it back, and it goes on"
cat >both.sh <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=both --time=30 --requeue --open-mode=append --output=$HERE/both.out
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=1
run=$HERE/both
cd $HERE
if [ -e "\$run/status.json" ]; then set -- "resume=\$run"; else
  set -- ${WORDS[*]} stages.finetune.epochs=150 trainer.nodes=2 "hydra.run.dir=\$run"; fi
exec "$PYTHON" "$ROOT/train.py" "\$@"
JOB
BOTH=$(sbatch --parsable both.sh)
until_file "$HERE/both/finetune/metrics.csv"
squeue --steps
say "scancel --batch --signal=USR1 $BOTH"
scancel --batch --signal=USR1 "$BOTH"
start_now "$BOTH"
for _ in $(seq 600); do
  [ -z "$(squeue -h -j "$BOTH" 2>/dev/null)" ] && break
  sleep 1
done
scontrol show job "$BOTH" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*\|NodeList=here[^ ]*'
grep "to resume\|resumes after\|results:" both.out
echo "both: $(state "$HERE/both")"
"$PYTHON" - plain both <<'PY'
import sys

import pandas as pd

plain, both = (pd.read_parquet(f"{run}/pretrain/predictions-test.parquet") for run in sys.argv[1:])
assert list(plain["sample_id"]) == list(both["sample_id"])
columns = [name for name in plain if name.startswith("logit/")]
print(f"{len(both)} test images, each once; after pre-training the largest difference of a logit from one process is "
      f"{(plain[columns] - both[columns]).abs().max().max():.2g}")
PY
for folder in sweep/0 sweep/1 plain both; do [[ $(state "$HERE/$folder") == finished* ]] || exit 1; done
[ "$CODE" = 0 ] && say "all finished"
