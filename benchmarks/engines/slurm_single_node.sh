#!/usr/bin/env bash
# A SLURM of one node on this machine, from Debian's packages, and what Pylorus does under it: a sweep through
# submitit; a job of it that is preempted, put back and finishes; a plain job that gets USR1 and goes on.
#
#   sudo PYTHON=/path/to/venv/bin/python benchmarks/engines/slurm_single_node.sh
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

say "one node, loopback only: $HERE"
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
SlurmdSpoolDir=$HERE/spool
SlurmctldPidFile=$HERE/slurmctld.pid
SlurmdPidFile=$HERE/slurmd.pid
SlurmctldLogFile=$HERE/slurmctld.log
SlurmdLogFile=$HERE/slurmd.log
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$NODE Default=YES MaxTime=60 State=UP
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
slurmd -D >"$HERE/slurmd.out" 2>&1 &
PIDS+=($!)
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
grep "to go on\|goes on after\|results:" plain.out
echo "plain: $(state "$HERE/plain")"
for folder in sweep/0 sweep/1 plain; do [[ $(state "$HERE/$folder") == finished* ]] || exit 1; done
[ "$CODE" = 0 ] && say "all finished"
