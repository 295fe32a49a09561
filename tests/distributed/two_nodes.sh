#!/usr/bin/env bash
# Emulate two hosts by network namespaces joined by a veth pair, and run torchrun on both with one
# process each.
#
#     unshare --net --mount --pid --kill-child --mount-proc two_nodes.sh [DISK OTHER PYTHON ARGS...]
#
# At the path DISK, node 1 has the folder OTHER. Without arguments the script only checks that this
# machine permits the namespaces. The hosts end with the script.
set -euo pipefail

mount -t tmpfs none /run
ip netns add node0
ip netns add node1
ip link add eth0 netns node0 type veth peer name eth0 netns node1
for node in 0 1; do
  ip -n "node$node" address add "10.77.0.$((node + 1))/24" dev eth0
  ip -n "node$node" link set lo up
  ip -n "node$node" link set eth0 up
done
ip netns exec node0 true
[ $# -gt 0 ] || exit 0

disk=$1 other=$2 python=$3
shift 3
# Both hosts have the name of the machine. Without GLOO_SOCKET_IFNAME gloo would resolve it, and each
# host would use 127.0.0.1 as its address.
export GLOO_SOCKET_IFNAME=eth0
for node in 0 1; do
  mounted=$([ "$node" = 0 ] && echo "$disk" || echo "$other")
  # Each call of ip netns exec creates a mount namespace.
  ip netns exec "node$node" bash -c 'mount --bind "$0" "$1" && shift && exec "$@"' \
    "$mounted" "$disk" "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 \
    --node-rank="$node" --master-addr=10.77.0.1 --master-port=29500 "$@" &
  jobs[node]=$!
done
wait "${jobs[0]}"
wait "${jobs[1]}"
