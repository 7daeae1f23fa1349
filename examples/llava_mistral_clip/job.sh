# shellcheck shell=bash
# What the launchers of this folder share; they source it. What follows an exit code is README's "How a job ends".
#
# Settings of all of them:
#   PYTHON         interpreter that has mmcore; this tree's .venv if it is there, else the python beside `mmcore`
#   DETERMINISTIC  1: kernels and collectives whose sums have one order, where there is a choice; slower
# of those that start ranks on this machine:
#   GPUS           ranks; by default the GPUs of CUDA_VISIBLE_DEVICES, or those that nvidia-smi lists, or 1
# and of those that Slurm starts:
#   CONTAINER         image for pyxis; bare if not set
#   CONTAINER_MOUNTS  what of the machine it sees, HOST:CONTAINER,...; the folder that the job was submitted from
#   REQUEUE           0: a job that is to go on ends with 0 instead, for the next one of a chain
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
launcher=${SLURM_JOB_NAME:-$(basename "$0")}
num_retries=3 # without progress

say() { echo "$launcher: $*" >&2; }

fail() {
    say "$*"
    exit 2
}

dry_run=0 options=()
for word in "$@"; do
    if [ "$word" = --dry-run ]; then
        dry_run=1
    else
        options+=("$word")
    fi
done

no_options() { # for launchers of several commands
    [ ${#options[@]} = 0 ] || fail "${options[*]}: there are no options but --dry-run; settings are variables"
}

whole_numbers() { # NAME...: settings that must be such, above 0, where they are set
    local setting
    for setting in "$@"; do
        [[ ${!setting:-1} =~ ^[1-9][0-9]*$ ]] || fail "$setting=${!setting} is not a whole number above 0"
    done
}

zero_or_one() { # NAME...: likewise
    local setting
    for setting in "$@"; do
        [[ ${!setting:-0} =~ ^[01]$ ]] || fail "$setting=${!setting} is neither 0 nor 1"
    done
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        return
    fi
    PYTHON=$root/.venv/bin/python
    if [ -n "${CONTAINER:-}" ] || { [ ! -e "$PYTHON" ] && command -v mmcore >/dev/null; }; then
        PYTHON=python
    elif [ -n "${SLURM_JOB_ID:-}" ] && [ ! -e "$PYTHON" ]; then
        fail "$PYTHON is missing: run 'bash $root/install.sh' where there is a network, or set PYTHON or CONTAINER"
    elif [ "$dry_run" = 0 ] && [ -z "${SLURM_JOB_ID:-}" ]; then
        bash "$root/install.sh"
    fi
}

show() { # COMMAND...: as it can be pasted
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

run() { # COMMAND...: show it, and do it unless it is only to be shown
    show "$@"
    [ "$dry_run" = 1 ] || "$@"
}

zero_or_one DETERMINISTIC REQUEUE

# As torchrun does: a thread for each rank, whose sums then have the same order on every machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
if [ "${DETERMINISTIC:-0}" = 1 ]; then
    # What Megatron-LM's --deterministic-mode wants set (megatron/training/arguments.py at core_v0.16.1).
    export NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 NCCL_ALGO=${NCCL_ALGO:-Ring} CUBLAS_WORKSPACE_CONFIG=:4096:8
fi

train_command() { # RECIPE: sets `command`, and where the run's faults are counted
    whole_numbers TP PP CP
    find_python
    command=("$PYTHON" -m mmcore train "${RECIPE:-$1}" ${CONFIG:+--config "$CONFIG"})
    command+=(--model.checkpoint "$CHECKPOINT" --data.path "$DATA" --checkpoint.save "$RUN")
    command+=(${TP:+--parallel.tensor-model-parallel-size "$TP"} ${PP:+--parallel.pipeline-model-parallel-size "$PP"})
    command+=(${CP:+--parallel.context-parallel-size "$CP"} "${options[@]}")
    retries=$RUN/retries progress=newest_step
}

generate_command() { # OUTPUT: likewise
    whole_numbers TP PP
    find_python
    command=("$PYTHON" -m mmcore generate --checkpoint "$CHECKPOINT" --task "$TASK" --data "$DATA")
    command+=(${IMAGES:+--images "$IMAGES"} --output "$1" ${TP:+--tensor-model-parallel-size "$TP"})
    command+=(${PP:+--pipeline-model-parallel-size "$PP"} "${options[@]}")
    output=$1 retries=$1.retries progress=num_answers
}

newest_step() { # of the run's checkpoints; -1 without one
    local folder newest=-1
    for folder in "$RUN"/step_*; do
        [[ $folder =~ /step_0*([0-9]+)$ ]] && newest=${BASH_REMATCH[1]}
    done
    echo "$newest"
}

num_answers() { # that are kept so far
    find "$(dirname "$output")" -maxdepth 1 -name "$(basename "$output").part*" -exec cat {} + | wc -l
}

judge() { # STATUS: sets `answer` to finished, again or stop, and `code` to the exit code of a job that stops
    local status=$1 reached before='' faults=0
    reached=$($progress)
    if [ -e "$retries" ]; then
        read -r before faults <"$retries" || true
    fi
    answer=again code=$status
    if [ "$status" = 0 ] && [ "$progress" = newest_step ] && [ ! -e "$RUN/DONE" ]; then
        status="0, but $RUN/DONE is not there"
    fi
    case $status in
        0)
            answer=finished
            rm -f "$retries"
            say "finished"
            return
            ;;
        75)
            say "preempted: saved, to be gone on with"
            return
            ;;
        16)
            say "a step was suspect (see the log): again from the last checkpoint, to know whether it was the machine"
            return
            ;;
        143)
            if [ "$signalled" = 1 ]; then
                code=75
                say "ended by the signal, to be gone on with"
                return
            fi
            ;;
        2) answer="stop" why="wrong usage or nothing to go on with (see the log): no other try would do better" ;;
        17) answer="stop" why="the same step was bad again: it is the data or the model, not the machine" ;;
        93) answer="stop" why="not to be tried again (see the log)" ;;
    esac
    if [ "$answer" = stop ]; then
        say "exit code $status: $why"
        return
    fi
    if [ -z "$before" ] || [ "$reached" -gt "$before" ]; then
        faults=0
    fi
    faults=$((faults + 1))
    if [ "$faults" -gt "$num_retries" ]; then
        answer="stop" code=93
        rm -f "$retries"
        say "exit code $status: $num_retries retries brought it no further than $reached, so there is no other"
    elif echo "$reached $faults" 2>/dev/null >"$retries" && [ -s "$retries" ]; then
        say "exit code $status at $reached: retry $faults of $num_retries without progress"
    else
        answer="stop" code=93
        say "exit code $status, and $retries cannot be written: see to the disk, then start it again"
    fi
}

# --- one machine ---

count_gpus() {
    local found visible
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        found=${#visible[@]}
    else
        found=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    fi
    echo $((found > 0 ? found : 1))
}

on_this_machine() { # what `command` is, on GPUS ranks, until it is finished or not to be tried again
    : "${GPUS:=$(count_gpus)}"
    whole_numbers GPUS
    port=${MASTER_PORT:-$((20000 + $$ % 10000))}
    show_ranks
    if [ "$dry_run" = 1 ]; then
        return
    fi
    mkdir -p "$(dirname "$retries")"
    signalled=0 ranks=()
    trap 'signalled=1; kill -TERM "${ranks[@]}" 2>/dev/null || true' TERM USR1 INT
    while :; do
        ranks_status=0
        start_ranks
        judge "$ranks_status"
        case $answer in
            finished) break ;;
            stop) exit "$code" ;;
        esac
        if [ "$signalled" = 1 ] || [ "$code" = 75 ]; then
            exit "$code"
        fi
    done
    trap - TERM USR1 INT
}

show_ranks() {
    if [ "$GPUS" = 1 ]; then
        show "${command[@]}"
    else
        echo "export WORLD_SIZE=$GPUS LOCAL_WORLD_SIZE=$GPUS MASTER_ADDR=127.0.0.1 MASTER_PORT=$port"
        echo "for RANK in {0..$((GPUS - 1))}; do RANK=\$RANK LOCAL_RANK=\$RANK $(show "${command[@]}") & done; wait"
    fi
}

start_ranks() { # sets `ranks_status` to 0 or to the exit code of the rank that failed first, which ends the others
    # Not torchrun: its own exit code is 1 whatever that of a rank, and it kills a rank that saves for over 30 s.
    local rank left=() still deadline=''
    ranks=()
    for ((rank = 0; rank < GPUS; rank++)); do
        if [ "$GPUS" = 1 ]; then
            "${command[@]}" &
        else
            RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$GPUS LOCAL_WORLD_SIZE=$GPUS MASTER_ADDR=127.0.0.1 \
                MASTER_PORT=$port "${command[@]}" &
        fi
        ranks+=($!)
    done
    left=("${ranks[@]}")
    while [ ${#left[@]} -gt 0 ]; do
        sleep 0.2 || true # a signal is heard after it; a terminal's reaches it, too
        still=()
        for rank in "${left[@]}"; do
            if kill -0 "$rank" 2>/dev/null; then
                still+=("$rank")
            elif [ "$ranks_status" = 0 ]; then
                wait "$rank" || ranks_status=$?
            fi
        done
        left=("${still[@]}")
        if [ "$ranks_status" != 0 ] && [ ${#left[@]} -gt 0 ]; then
            if [ -z "$deadline" ]; then
                kill -TERM "${left[@]}" 2>/dev/null || true
                deadline=$((SECONDS + 30)) # Slurm's KillWait
            elif [ "$SECONDS" -ge "$deadline" ]; then
                kill -KILL "${left[@]}" 2>/dev/null || true
            fi
        fi
    done
}

# --- Slurm ---

on_all_nodes() { # what `command` is, a task for each GPU; then what its exit code asks for
    local logs=$1 first_log written=0
    launch=(srun --export=ALL --kill-on-bad-exit=1 --distribution=block --open-mode=append)
    launch+=("--output=$logs/%j/rank-%4t.log" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
    container
    launch+=("${command[@]}")
    if [ "$dry_run" = 1 ]; then
        show "${launch[@]}"
        return
    fi
    mkdir -p "$logs/$SLURM_JOB_ID"
    first_log=$logs/$SLURM_JOB_ID/rank-0000.log
    if [ -e "$first_log" ]; then
        written=$(wc -c <"$first_log")
    fi
    say "$(date '+%F %T') start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
    show "${launch[@]}"
    signalled=0
    trap on_usr1 USR1
    trap 'interrupted=1 signalled=1' TERM # it has come to all ranks, too: the job is cancelled, or its time is up
    "${launch[@]}" &
    interrupted=1
    while [ "$interrupted" = 1 ]; do # a signal ends `wait`, not the ranks
        interrupted=0 srun_status=0
        wait $! || srun_status=$?
    done
    say "$(date +%T) srun ended with $srun_status"
    if [ "$srun_status" != 0 ] && [ -e "$first_log" ]; then
        tail -c "+$((written + 1))" "$first_log" | tail -n 5 >&2
    fi
    judge "$srun_status"
    case $answer in
        finished) return ;;
        stop) exit "$code" ;;
    esac
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = COMPLETING ]; then
        say "the job was cancelled, or its time is up: submit it again to go on"
        exit "$srun_status"
    fi
    if [ "${REQUEUE:-1}" = 0 ]; then
        say "left to the next job of the chain"
        exit 0
    fi
    scontrol requeue "$SLURM_JOB_ID" ||
        fail "requeueing is refused: submit it again to go on, or a chain of jobs with REQUEUE=0"
    exit "$srun_status"
}

on_usr1() {
    interrupted=1 signalled=1
    say "$(date +%T) USR1: to all ranks as SIGTERM"
    scancel --signal=TERM "$SLURM_JOB_ID" || true # a signal to srun itself would kill them all at once
}

container() { # adds pyxis' options to `launch`
    if [ -n "${CONTAINER:-}" ]; then
        launch+=("--container-image=$CONTAINER" "--container-mounts=${CONTAINER_MOUNTS:-$PWD:$PWD}")
        launch+=("--container-workdir=$PWD")
    fi
}

on_one_node() { # COMMAND...: one task, whose output is the job's
    launch=(srun --export=ALL --nodes=1 --ntasks=1)
    container
    run "${launch[@]}" "$@"
}
