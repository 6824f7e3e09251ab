import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_program import BATCH, make_program

from jaxlab import parallel
from jaxlab.parallel import aot, deinterleave, interleave, make_mesh, over_batch


def test_views_are_joined_image_by_image_and_parted_again():
  views = [np.random.default_rng(seed).normal(size=(3, 2, 4)) for seed in range(5)]
  rows = interleave(views)
  for image, view in np.ndindex(3, 5):
    np.testing.assert_array_equal(rows[5 * image + view], views[view][image].astype(np.float32))
  np.testing.assert_array_equal(deinterleave(rows, 5), np.stack(views).astype(np.float32))


def test_views_that_do_not_belong_together_are_refused():
  with pytest.raises(ValueError, match=r'views: expected one shape, got \[\(2, 3\), \(4, 3\)\]'):
    interleave([jnp.ones((2, 3)), jnp.ones((4, 3))])
  with pytest.raises(ValueError, match='views: expected one shape'):
    interleave([])
  with pytest.raises(ValueError, match=r'\(6, 2\) are none of count=4'):
    deinterleave(jnp.ones((6, 2)), 4)


def test_arrays_stay_as_they_are_outside_of_a_mesh():
  x = jnp.arange(6.0)
  assert over_batch(x) is x
  mesh = jax.sharding.AbstractMesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.sharding.use_abstract_mesh(mesh):
    assert over_batch(x) is x  # of whose axes nothing is known


def reordering(constrain):
  """Returns the small program, its images taken in another order before the network sees them."""
  program = make_program(width=64)

  def step(state, frozen, batch):
    order = jax.random.permutation(jax.random.key(state.step), BATCH)
    return program.step(state, frozen, {k: constrain(x[order]) for k, x in batch.items()})

  return dataclasses.replace(program, step=step)


def test_reordered_rows_are_computed_once():
  whole, eight = (make_mesh(devices=jax.devices()[:count]) for count in (1, 8))
  work = {
    name: aot.report(aot.compile_step(reordering(constrain), mesh))['flops']
    for name, constrain, mesh in (
      ('one', over_batch, whole),
      ('each', over_batch, eight),
      ('unsaid', lambda x: x, eight),
    )
  }
  assert work['each'] < work['one'] / 4
  assert work['unsaid'] > 2 * work['each']


def test_the_result_is_that_of_one_device():
  found = []
  for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=4)):
    sharded = parallel.shard_program(reordering(over_batch), mesh)
    state = sharded.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
      name: rng.integers(0, 4, own.shape).astype(own.dtype) for name, own in sharded.batch.items()
    }
    state, metrics = sharded.step(state, {}, parallel.place(batch, sharded.batch))
    found.append(jax.device_get((state.params, metrics)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *found)
