"""A tokenizing job on two Ray nodes of this machine, one of which is lost once there are some shards.

    python tests/two_nodes.py --input images --vqgan bundle --output tokens

A program of its own: a process has one connection to Ray.
"""

import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from paella import command_line
from pipelines import tokenize_images
from pipelines.tokenize_config import TokenizeConfig

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    other = cluster.add_node(**NODE)
    os.environ["RAY_ADDRESS"] = cluster.address
    output = Path(sys.argv[sys.argv.index("--output") + 1])

    def lose_one() -> None:
        while len(shards := list(output.glob("part-*.parquet"))) < 8:
            time.sleep(0.01)
        cluster.remove_node(other, allow_graceful=False)
        print(f"node removed with {len(shards)} shards written", flush=True)

    threading.Thread(target=lose_one, daemon=True).start()
    try:
        command_line.main(tokenize_images.run, TokenizeConfig, "")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
