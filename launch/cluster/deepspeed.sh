#!/usr/bin/env bash
# Runs the training of settings.sh on the hosts of its hostfile, from any of them; the same command resumes it.
# Arguments are passed to the `deepspeed` command. Ctrl-C ends the training with a checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/cluster/settings.sh

# When a host fails, pdsh prints a message but waits for the other hosts, whose ranks wait for the failed one.
stop_all_when_one_fails() {
    local line ending=
    while IFS= read -r line || [[ -n $line ]]; do
        printf '%s\n' "$line"
        if [[ -z $ending && $line == *pdsh@*": ssh exited with exit code "* ]]; then
            launch/cluster/stop.sh &
            ending=yes
        fi
    done
    wait
}

trap launch/cluster/stop.sh INT TERM
# In a new session, since Ctrl-C would make pdsh disconnect from its hosts before they have saved a checkpoint.
{
    setsid deepspeed --hostfile "$HOSTFILE" "$@" --module ds_gradmix "${TRAINING[@]}" 2>&1 | stop_all_when_one_fails
} &
while # a trapped signal ends `wait`, but not the training
    status=0
    wait $! || status=$?
    kill -0 $! 2>/dev/null
do :; done
exit $status
