job=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

on() { # on HOST COMMAND...: a job step there, beside the others
    local host=$1
    shift
    srun --quiet --overlap --nodes=1 --ntasks=1 --nodelist="$host" --cpu-bind=none "$@"
}

address_of() { # a node's name in Slurm need not be one of the network
    scontrol --oneliner show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

later() { # later CODE: back into the queue, under the same job id. Not where the user has cancelled the job.
    local as
    as=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
    if [[ $as != JobState=RUNNING ]]; then
        say "the job is ${as#JobState=}: left as it is"
        exit "$1"
    fi
    say "back into the queue"
    trap 'exit 75' TERM # with which Slurm ends this script
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm did not take it back: run sbatch $state/slurm.sh to go on"
        exit "$1"
    fi
    pause 60 # an exit before Slurm has begun with it would end the job
    exit "$1"
}
