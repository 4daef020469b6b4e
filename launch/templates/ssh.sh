job=$(date +%s)-$$

on() { # on HOST COMMAND...: in the folder there. ssh hands its arguments to a shell, so each is quoted for one.
    local host=$1 line word
    shift
    line="cd $(quoted "$folder") && exec"
    for word; do line+=" $(quoted "$word")"; done
    ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -T \
        "${ssh_options[@]}" "$host" "$line"
}

quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

address_of() { echo "$1"; }

later() { # later CODE: nobody else starts this again, so only a stop that was asked for ends it
    if ((stops)); then
        say "stopped, with a checkpoint; run this script again to go on: $state/ssh.sh"
        exit "$1"
    fi
}
