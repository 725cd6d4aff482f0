# Sourced by ibex_cpu.sbatch and ibex_gpu.sbatch, on the first node of an allocation: trains with what SLURM gave, and
# has the job requeued when its time is over. The same run directory in every requeue: training goes on where it was.
#
# Settings, as environment variables of `sbatch`:
#   RUN_DIR   default runs/slurm-<job>; of a job array runs/slurm-<array job>-<task>
#   SPARES    so many nodes train nothing and take the place of lost ones; default 0
#   STAGE     folder of a partitioned graph, copied to $LOCAL (default /tmp) of every node before training
#   SWEEP     file with settings; task n of a job array adds those in line n, from 1. Without it a task adds seed=n
#
# The order of an end. SLURM sends USR1 to this script before the time limit (--signal), and TERM when other jobs need the
# nodes (preemption) or somebody types `scancel --batch --signal=TERM JOB`. Then `launch/stop.py` asks the job to end: its
# newest snapshot goes to storage. Then the job is requeued. `scancel JOB` without a signal ends it for good.
set -u

die() { echo "error: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || die "expected to run under SLURM; type: sbatch launch/ibex_cpu.sbatch dataset=cora"
for name in SLURM_JOB_NUM_NODES SLURM_NTASKS; do
    [ -n "${!name:-}" ] || die "$name is not set: expected sbatch with --nodes and --ntasks-per-node, as in launch/ibex_cpu.sbatch"
done
spares="${SPARES:-0}"
case "$spares" in *[!0-9]* | "") die "SPARES: expected a number of nodes; got '$spares'" ;; esac
[ "$spares" -lt "$SLURM_JOB_NUM_NODES" ] ||
    die "SPARES: expected fewer than the $SLURM_JOB_NUM_NODES nodes of the job; got $spares. Ask for more: sbatch --nodes=N"
if [ -z "${SLURM_MEM_PER_NODE:-}${SLURM_MEM_PER_CPU:-}${SLURM_MEM_PER_GPU:-}" ]; then
    echo "remark: no --mem was asked for. Snapshots in /dev/shm count against what SLURM gives by default: if that is" \
        "too little, type sbatch --mem=64G"
fi

job="$SLURM_JOB_ID"
run_dir="${RUN_DIR:-runs/slurm-$job}"
settings=()
if [ -n "${SWEEP:-}" ]; then
    [ -f "$SWEEP" ] || die "SWEEP: expected a file with settings; there is no $SWEEP"
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] ||
        die "SWEEP: expected a job array, a task per line of $SWEEP; type sbatch --array=1-$(grep -c '' "$SWEEP")"
fi
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # the number of one task may be that of the whole array
    run_dir="${RUN_DIR:-runs/slurm-$SLURM_ARRAY_JOB_ID}-$SLURM_ARRAY_TASK_ID"
    if [ -n "${SWEEP:-}" ]; then
        [ "$SLURM_ARRAY_TASK_ID" != 0 ] && line="$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SWEEP")" && [ -n "$line" ] ||
            die "$SWEEP: expected settings in line $SLURM_ARRAY_TASK_ID, for this task of the array; got none." \
                "Type sbatch --array=1-$(grep -c '' "$SWEEP")"
        read -r -a settings <<< "$line"
    else
        settings=("seed=$SLURM_ARRAY_TASK_ID")
    fi
fi
[ "$spares" = 0 ] || settings+=("recovery.standby_machines=$spares")

# each_node SECONDS COMMAND...: once on each node that is up. For a node that is down srun would wait for ever; and without
# --overlap for the end of the step that trained, which SLURM takes to last until it gives up such a node.
each_node() {
    local up count
    up="$(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format='%N %T' |
        awk '$2 !~ /down|[*]/ { print $1 }' | sort -u | paste -sd,)"
    count="$(tr , '\n' <<< "$up" | wc -l)"
    timeout "$1" srun --no-kill --overlap --nodelist="$up" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 "${@:2}"
}

if [ -n "${STAGE:-}" ]; then
    [ -d "$STAGE" ] || die "STAGE: expected a folder with a partitioned graph; there is no $STAGE"
    # The same in the next job of this run: partition.folder is a setting of it.
    local_graph="${LOCAL:-/tmp}/gemini_gnn-$(realpath -m "$run_dir" | sha256sum | cut -c1-16)"
    echo "copying $STAGE to $local_graph of $SLURM_JOB_NUM_NODES nodes"
    each_node 7200 sh -c 'rm -rf "$1" && cp -r "$0" "$1"' "$STAGE" "$local_graph" ||
        die "could not copy $STAGE to $local_graph of every node within two hours: is there room? LOCAL=FOLDER names another"
    settings+=("partition.folder=$local_graph")
fi

again=0
end_in_order() {
    again=1
    echo "$(date +%T) $1: the newest snapshot goes to storage"
    python launch/stop.py "run_dir=$run_dir"
}
trap 'end_in_order "the time limit is near"' USR1
trap 'end_in_order "SLURM wants the nodes"' TERM

# A node that dies must not end the others: --no-kill; nor a task that exits: --kill-on-bad-exit=0.
srun --no-kill --kill-on-bad-exit=0 --wait=0 python launch/train.py "run_dir=$run_dir" ${settings[@]+"${settings[@]}"} "$@" &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do # a trap ends a wait
    wait "$step"
    code=$?
done
[ -z "${STAGE:-}" ] || each_node 120 rm -rf "$local_graph"
# Why the job ended, and whether its newest snapshot is on storage. SIGTERM: SLURM wants the nodes (preemption).
ended="$(python -c 'import json, sys
found = json.load(open(sys.argv[1]))
print(found.get("reason"), found.get("checkpoint") == found.get("recoverable"))' "$run_dir/status.json" 2>/dev/null)"
case "$ended" in "SIGTERM "*) again=1 ;; esac
# Somebody who typed `scancel` wants no requeue.
if [ "$again" = 1 ] && [ "$code" != 0 ] && [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ]; then
    # Other nodes may get the job: what it holds in memory would stay on these.
    [ "${ended##* }" != True ] || each_node 120 python launch/stop.py "run_dir=$run_dir" keep=false > /dev/null
    trap - USR1 TERM
    echo "the job is requeued, and goes on in $run_dir"
    scontrol requeue "$job" || die "could not requeue; type: sbatch again with RUN_DIR=$run_dir"
fi
exit "$code"
