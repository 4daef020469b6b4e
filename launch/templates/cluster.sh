
# From here on the same for Slurm and ssh. Each node runs Ray in the foreground under a lease: a pipe from this script,
# whose first line is the cluster's token and whose end ends it. However this script ends, the pipes end with it.
declare -A lease=() process=() retry_at=()
pipes=$(mktemp -d) || exit 1
stops=0
attempts=0
trap 'rm -rf "$pipes"' EXIT
trap stop TERM INT HUP

say() { echo "atoll submit: $(date +%H:%M:%S) $*" >&2; }

stop() { # the first time gently: the driver writes a checkpoint; the second time at once
    stops=$((stops + 1))
    if ((stops > 1)); then exit 130; fi
    say "told to stop: the driver writes a checkpoint after this step"
    stop_driver
}

stop_driver() { if [[ -n ${lease[driver]:-} ]]; then echo stop >&"${lease[driver]}"; fi; }

begin() { # begin KEY HOST ARG...: a part of launch.node on HOST, under a lease named KEY
    local key=$1 host=$2 pipe=$pipes/$1 fd other
    shift 2
    end "$key" # of the one before, which is gone: else each new start of a lost node would leave a pipe open
    rm -f "$pipe"
    mkfifo -m 600 "$pipe"
    exec {fd}<>"$pipe" # for both directions: opening it does not wait for the reader
    lease[$key]=$fd
    (
        trap '' TERM INT HUP # what is meant for this script would end the connection
        for other in "${lease[@]}"; do exec {other}>&-; done # a lease has one holder
        on "$host" "$python" -P -m launch.node "$@"
    ) <"$pipe" &
    process[$key]=$!
    printf '%s\n' "$token" >&"$fd"
}

end() { # end KEY: its part stops
    local fd=${lease[$1]:-}
    if [[ -n $fd ]]; then
        exec {fd}>&-
        unset "lease[$1]"
    fi
}

alive() { kill -0 "${process[$1]:-0}" 2>/dev/null; }

pause() { # a trap ends it early, which a plain sleep does not allow
    sleep "$1" &
    wait $! 2>/dev/null
}

begin_node() {
    retry_at[$1]=$((SECONDS + 15))
    begin "node-$1" "${hosts[$1]}" ray --head "$head" --index "$1" --name "$name" --gpus "$gpus" --cpus "$cpus" \
        --wait-s "$wait_s" --interface "$interface"
}

end_all() {
    local key
    for key in "${!lease[@]}"; do end "$key"; done
    for key in "${!process[@]}"; do
        for ((i = 0; i < 150; i++)); do # longer than a node needs to end its processes
            alive "$key" || break
            sleep 0.2
        done
        alive "$key" && kill -9 "${process[$key]}" 2>/dev/null
        unset "process[$key]"
    done
}

attempt() { # one life of the cluster; the driver's exit code, or 3 where the nodes did not come together
    local i code peer=""
    if ((${#hosts[@]} > 1)); then peer=$(address_of "${hosts[1]}"); fi
    attempts=$((attempts + 1))
    name=$job-$attempts
    token=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
    head=$(on "${hosts[0]}" "$python" -P -m launch.node address --name "$name" --peer "$peer" \
        --interface "$interface" </dev/null) || return 3
    say "attempt $attempts: ${#hosts[@]} nodes, Ray at $head"
    if ((stops)); then return 75; fi
    for i in "${!hosts[@]}"; do begin_node "$i"; done
    begin driver "${hosts[0]}" train --head "$head" --nodes "${#hosts[@]}" --name "$name" --wait-s "$wait_s" \
        -- "${overrides[@]}"
    if ((stops)); then stop_driver; fi
    while alive driver; do
        if ((!stops)) && ! alive node-0; then
            say "Ray on the head, ${hosts[0]}, ended"
            for ((i = 0; i < 5; i++)); do alive driver && pause 1; done # time to say what it saw
            return 3
        fi
        for i in "${!hosts[@]}"; do # a node that was lost may return; the head cannot: with it the cluster ends
            if ((i && !stops && SECONDS >= retry_at[$i])) && ! alive "node-$i"; then
                say "Ray on ${hosts[$i]} ended; starting it again"
                begin_node "$i"
            fi
        done
        pause 1
    done
    wait "${process[driver]}"
    code=$?
    unset "process[driver]"
    return "$code"
}

failures=$(cat "$state/failures" 2>/dev/null)
failures=${failures:-0}
while :; do
    began=$SECONDS
    attempt
    code=$?
    end_all
    case $code in
    0)
        rm -f "$state/failures"
        say "finished"
        exit 0
        ;;
    2)
        say "what was configured cannot work (exit code 2): not tried again"
        exit 2
        ;;
    75) later 75 ;; # does not return where the same command will run again by itself
    esac
    if ((stops)); then exit 75; fi
    if ((SECONDS - began >= 3600)); then failures=0; fi # failures in a row are counted, not those of a month
    failures=$((failures + 1))
    if ((failures > max_restarts)); then
        say "failure $failures (exit code $code); gave up after --max-restarts $max_restarts"
        rm -f "$state/failures"
        exit $((code == 3 ? 1 : code))
    fi
    echo "$failures" >"$state/failures"
    say "failure $failures of at most $max_restarts that are tried again (exit code $code)"
    if ((code == 3)); then later 3; fi
    pause 5
    if ((stops)); then later 75; fi
done
