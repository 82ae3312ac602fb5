#!/usr/bin/env bash
# Ends the training of settings.sh on all its hosts, after the current step and with a checkpoint.
# Ranks that wait for a lost rank cannot finish their step, and are killed.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/cluster/settings.sh

hosts=$(sed -nE 's/^([^#[:space:]]+)[[:space:]]+slots=.*/\1/p' "$HOSTFILE" | paste -sd,)
ranks="[d]s_gradmix --local_rank=[0-9]+ ${TRAINING[0]} .*[ =]$RUN([ /]|\$)" # [d] keeps the pattern from matching this shell
pdsh -R ssh -t 5 -w "$hosts" "
    pkill -TERM -f '$ranks'
    for _ in \$(seq $GRACE_S); do
        pgrep -f '$ranks' >/dev/null || exit 0
        sleep 1
    done
    pkill -KILL -f '$ranks'" || true
