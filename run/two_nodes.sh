#!/usr/bin/env bash
# The guide docs/multi_node.md on one machine without a GPU. Two nodes, each with an address, processes, /tmp/ray and
# shared memory of its own, train the laptop task on one rank each: a run with a checkpoint, its resume, the loss of the
# second node meanwhile, and the resume after the node has come back. Ends with one line, and exits with 1 unless all
# went so. Further arguments are Hydra overrides:
#   bash run/two_nodes.sh trainer.entropy_audit.freq=2
#   METHOD      a method of verl/trainer/config/method (steer_exp)
#   OUTPUT_DIR  where results go (outputs/two_nodes in the repository): node_1.log and node_2.log, the output of the
#               three jobs in train.log, lost_node.log and after.log, and the run
#   TASK_DIR    a task that scripts/make_laptop_task.py made (made in outputs/laptop_task)
#   PYTHON      interpreter (the repository's .venv, else python3)
# Needs unshare and nsenter (util-linux), ip (iproute2), pgrep (procps), and root or user namespaces. All that it starts
# ends with it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
OUTPUT_DIR=$(realpath -m "${OUTPUT_DIR:-$root/outputs/two_nodes}")
source "$root/run/environment.sh"
if [ -z "${TWO_NODES_INSIDE:-}" ]; then
  for program in unshare nsenter ip pgrep; do
    command -v "$program" >/dev/null || { echo "two_nodes.sh: expected the program $program" >&2; exit 1; }
  done
  source "$root/run/laptop_task.sh"
  export TASK_DIR=$(realpath "$TASK_DIR")
  mkdir -p "$OUTPUT_DIR" /tmp/ray
  # A namespace of processes ends all of them with its first.
  TWO_NODES_INSIDE=1 exec unshare --map-root-user --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$@"
fi

method=${METHOD:-steer_exp}
run=$OUTPUT_DIR/$method
# The nodes do not have these variables: each submission names them.
export -n OUTPUT_DIR TASK_DIR PYTHON
first=10.77.0.1 second=10.77.0.2
[ ! -e "$run" ] || { echo "two_nodes.sh: $run exists: delete it or choose another OUTPUT_DIR" >&2; exit 1; }
ip link add switch type bridge
ip link set switch up

say() { echo "two_nodes.sh: $*"; }
fail() { say "$*" >&2; exit 1; }
node() { cat "$OUTPUT_DIR/node_$1.pid"; }
saved() { cat "$run/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# start_node NUMBER ADDRESS OPTIONS...: puts a node on the network and calls `ray start OPTIONS` on it.
start_node() {
  local number=$1 address=$2
  shift 2
  unshare --net --mount --pid --fork --kill-child --mount-proc bash -c '
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /tmp/ray
    until ip route | grep -q default; do sleep 0.1; done
    exec "$@"
  ' - "$PYTHON" -m ray.scripts.scripts start --block --node-ip-address="$address" --num-gpus=1 --num-cpus=8 "$@" \
    >"$OUTPUT_DIR/node_$number.log" 2>&1 &
  until pgrep -P $! >"$OUTPUT_DIR/node_$number.pid"; do sleep 0.1; done
  ip link add "node$number" type veth peer name eth0 netns "$(node "$number")"
  ip link set "node$number" master switch up
  nsenter --target "$(node "$number")" --net bash -euc "
    ip link set lo up; ip link set eth0 up; ip addr add $address/24 dev eth0; ip route add default dev eth0"
  until grep -q 'Ray runtime started' "$OUTPUT_DIR/node_$number.log"; do
    kill -0 "$(node "$number")" || fail "node $number: see $OUTPUT_DIR/node_$number.log"
    sleep 0.5
  done
  say "node $number, $address, is up"
}

# submit NAME OVERRIDES...: a run on both nodes, with its output in NAME.log.
submit() {
  local log=$OUTPUT_DIR/$1.log
  shift
  nsenter --target "$(node 1)" --net --mount --pid \
    "$PYTHON" -m ray.scripts.scripts job submit --address="http://$first:8265" \
    -- env PYTHON="$PYTHON" TASK_DIR="$TASK_DIR" OUTPUT_DIR="$OUTPUT_DIR" \
    bash "$root/run/launch.sh" "$method" task=arithmetic hardware=cpu trainer.nnodes=2 trainer.n_gpus_per_node=1 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64 \
    +ray_kwargs.ray_init.address=auto transfer_queue.backend.SimpleStorage.num_data_storage_units=4 \
    trainer.val_before_train=false trainer.test_freq=-1 trainer.save_freq=2 "$@" >"$log" 2>&1
}

# A token of the run's own, in place of the user's file.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(</proc/sys/kernel/random/uuid)
# gloo would take the interface of the host's name, which is the loopback on many machines.
export GLOO_SOCKET_IFNAME=eth0
start_node 1 "$first" --head --port=6379 --dashboard-host=0.0.0.0 --system-config='{"worker_niceness": 0}'
start_node 2 "$second" --address="$first:6379"

submit train trainer.total_training_steps=2 "$@" || fail "the run failed: see $OUTPUT_DIR/train.log"
say "trained to step $(saved)"

submit lost_node trainer.total_training_steps=1000 "$@" &
until [ "$(saved)" -ge 4 ] && [ ! -e "$run/global_step_4/.unfinished" ]; do
  kill -0 $! 2>/dev/null || fail "the run failed: see $OUTPUT_DIR/lost_node.log"
  sleep 0.2
done
say "resumed, and trained to step $(saved); node 2 goes off the network and dies"
SECONDS=0
ip link delete node2
kill -KILL "$(node 2)"
if wait $!; then fail "the run went on without node 2"; fi
say "the run ended $SECONDS s later, with: $(grep -a '^steer-verl:' "$OUTPUT_DIR/lost_node.log" | tail -n 1)"

start_node 2 "$second" --address="$first:6379"
submit after trainer.total_training_steps=$(($(saved) + 2)) "$@" || fail "the run failed: see $OUTPUT_DIR/after.log"
say "resumed, and trained to step $(saved): done"
