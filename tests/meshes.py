"""The same steps on one device and on a mesh of eight."""

import jax
import numpy as np

from jaxlab import parallel


def on_one_and_on_eight(program, batches, *, plain=None, prepare=lambda state: state, **options):
  """Returns state and metrics behind the batches, on one device and on a mesh of 2 by 4.

  Args:
    program: what is stepped.
    batches: one a step.
    plain: its compiled functions (init, step), where a test has them.
    prepare: changes the drawn state.
    **options: of `parallel.shard_program`.
  """
  mesh = parallel.make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
  sharded, split = parallel.shard_program(program, mesh, **options), parallel.batch_sharding(mesh)
  found = []
  for (init, step), place in (
    (plain or (jax.jit(program.init), jax.jit(program.step)), lambda batch: batch),
    ((sharded.init, sharded.step), lambda batch: jax.device_put(batch, split)),
  ):
    state = prepare(init(jax.random.key(0)))
    for batch in batches:
      state, metrics = step(state, {}, place(batch))
    found.append((state, metrics))
  return found


def assert_same(one, other, rtol, atol):
  """Asserts that two pytrees agree; `atol` is relative to the largest magnitude of each array."""
  pair = jax.device_get((one, other))
  for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * np.max(np.abs(b)) + 1e-6)
