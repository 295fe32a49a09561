#!/usr/bin/env bash
# Two hosts as network namespaces that are joined by a veth pair: runs torchrun on both, with one
# process each.
#
#     unshare --net --mount --pid --kill-child --mount-proc two_nodes.sh [DISK OTHER PYTHON ARGS...]
#
# Node 1 finds the folder OTHER where node 0 finds DISK. Without arguments it only finds out whether
# all of that is allowed. The hosts are gone with the script.
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
# The name of the machine is that of both: without GLOO_SOCKET_IFNAME gloo would look it up, and
# each would find itself at 127.0.0.1.
export GLOO_SOCKET_IFNAME=eth0
for node in 0 1; do
  mounted=$([ "$node" = 0 ] && echo "$disk" || echo "$other")
  # A namespace of mounts comes with each call of ip netns exec.
  ip netns exec "node$node" bash -c 'mount --bind "$0" "$1" && shift && exec "$@"' \
    "$mounted" "$disk" "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 \
    --node-rank="$node" --master-addr=10.77.0.1 --master-port=29500 "$@" &
  jobs[node]=$!
done
wait "${jobs[0]}"
wait "${jobs[1]}"
