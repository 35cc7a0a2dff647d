#!/usr/bin/env bash
# Runs a part of the smoke workflow on a Slurm cluster of one node, this machine: munged, slurmctld and slurmd started by
# hand in a temporary directory, no systemd, no cgroups.  Needs root and the Debian packages slurm-wlm and munge.
#   PYTHON=.venv/bin/python tests/slurm/run_smoke.sh [TARGET...]
# PYTHON: has Snakemake and the plugin.  CPUS (2): of the node.  Other arguments are Snakemake targets or options.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
CPUS=${CPUS:-2}
CONF=/etc/slurm/slurm.conf  # where jobs look: the plugin hands no SLURM_CONF on to them
[ ! -e $CONF ] || { echo "$CONF exists: this machine has a Slurm of its own, use that" >&2; exit 1; }
DIR=$(mktemp -d /tmp/slurm-smoke.XXXXXX)
HOST=$(hostname -s)
export PYTHONPATH=$ROOT:$ROOT/kernels
mkdir -p "$DIR"/{munge,state,spool,log,run}
chmod 755 "$DIR"
pids=()

stop() {
  status=$?
  scancel --user=root 2>/dev/null || true
  for signal in TERM KILL; do  # Snakemake waits for its jobs, which nobody runs any more
    for pid in "${pids[@]}"; do kill -$signal "$pid" 2>/dev/null || true; done
    sleep 2
  done
  if [ $status -ne 0 ]; then tail -n 20 "$DIR"/log/*.log "$DIR"/run/.snakemake/slurm_logs/*/*/*.log >&2 || true; fi
  rm -f "$CONF" "$(dirname $CONF)/cgroup.conf"
  [ -n "${KEEP:-}" ] || rm -rf "$DIR"
  exit $status
}
trap stop EXIT

dd if=/dev/urandom of="$DIR/munge/key" bs=1 count=1024 status=none
chmod 700 "$DIR/munge" && chmod 400 "$DIR/munge/key"
mkdir -p "$(dirname $CONF)"
cat > "$DIR/slurm.conf" <<END
ClusterName=smoke
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobs.txt
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MinJobAge=3600
ReturnToService=2
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=6000 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
ln -s "$DIR/slurm.conf" "$CONF"
# Slurm 23.11 and later can do without cgroups if told so; earlier ones know no such plugin.
version=$(slurmd -V | awk '{print $2}')
if [ "$(printf '%s\n' 23.11 "$version" | sort -V | head -n 1)" = 23.11 ]; then
  echo "CgroupPlugin=disabled" > "$DIR/cgroup.conf"
  ln -s "$DIR/cgroup.conf" "$(dirname $CONF)/cgroup.conf"
fi

munged --foreground --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" \
  --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" --num-threads=2 &
pids+=($!)
for _ in $(seq 50); do [ -S "$DIR/munge/socket" ] && break; sleep 0.2; done
slurmctld -D > /dev/null 2>&1 &
pids+=($!)
slurmd -D > /dev/null 2>&1 &
pids+=($!)
for _ in $(seq 60); do [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break; sleep 1; done
sinfo

cat > "$DIR/config.yaml" <<END
profile: smoke
runs: runs
resources:
  default: {mem: 2GB, runtime: 20m, partition: cpu}
END
cd "$ROOT"
began=$SECONDS
status=0
targets=("$@")
[ $# -gt 0 ] || targets=(runs/smoke/stages/summary.json runs/smoke/notebooks/01_bottleneck.ipynb)
"$PYTHON" -m snakemake -s workflow/Snakefile --profile workflow/profiles/slurm --configfile "$DIR/config.yaml" \
  --directory "$DIR/run" --jobs 4 --latency-wait 5 --slurm-init-seconds-before-status-checks 5 \
  --slurm-status-command squeue --slurm-no-account "${targets[@]}" &
pids+=($!)
wait $! || status=$?
echo "snakemake: status $status after $((SECONDS - began)) s"
squeue --states=all -o "%.6i %.9P %.9T %.4C %.8m %.10M %k"
exit $status
