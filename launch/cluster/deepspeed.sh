#!/usr/bin/env bash
# Trains what settings.sh says on the hosts of its hostfile, from any of them; again: resumes.
# Arguments go to the `deepspeed` command. Ctrl-C ends the training with a checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/cluster/settings.sh

# pdsh tells that a host is lost, or failed, but waits for the others; and their ranks wait for that host's.
end_together() {
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
# In a session of its own: Ctrl-C would make pdsh drop its hosts before they have saved anything.
{
    setsid deepspeed --hostfile "$HOSTFILE" "$@" --module ds_gradmix "${TRAINING[@]}" 2>&1 | end_together
} &
while # a trapped signal ends `wait`, not the training
    status=0
    wait $! || status=$?
    kill -0 $! 2>/dev/null
do :; done
exit $status
