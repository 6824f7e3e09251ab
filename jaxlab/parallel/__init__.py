"""One program for a laptop, a GPU box and a pod: meshes, partition rules, several hosts.

`make_mesh` names the axes `data`, `fsdp`, `tensor`; `state_shardings` lays a train state out on them by
rules; `shard_program` jits a program with these shardings; `interleave` and `over_batch` keep rows of a batch
where they lie; `initialize` joins the hosts of a pod; `aot` compiles for a pod that is not there.
"""

from jaxlab.parallel.batches import deinterleave, interleave, over_batch
from jaxlab.parallel.hosts import initialize, is_primary
from jaxlab.parallel.mesh import batch_sharding, check_batch_size, make_mesh, replicated
from jaxlab.parallel.partition import (
  fsdp_shardings,
  fsdp_spec,
  program_shardings,
  state_shardings,
  tree_paths,
)
from jaxlab.parallel.program import ShardedProgram, abstract, place, shard_program

__all__ = [
  'ShardedProgram',
  'abstract',
  'batch_sharding',
  'check_batch_size',
  'deinterleave',
  'fsdp_shardings',
  'fsdp_spec',
  'initialize',
  'interleave',
  'is_primary',
  'make_mesh',
  'over_batch',
  'place',
  'program_shardings',
  'replicated',
  'shard_program',
  'state_shardings',
  'tree_paths',
]
