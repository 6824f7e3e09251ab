import chex
import compilations
import jax
import jax.numpy as jnp
import pytest
from small_program import FSDP_RULES, Data, make_program

from jaxlab.parallel import abstract, batch_sharding, make_mesh, replicated, shard_program


def run(initial, mesh, rules=(), steps=3):
  sharded = shard_program(make_program(rules), mesh)
  state = jax.device_put(initial, jax.tree.map(lambda x: x.sharding, sharded.state))
  losses, data = [], Data()
  with compilations.counted() as count:
    for _ in range(steps):
      batch = {name: x for name, x in next(data).items() if name in sharded.batch}
      batch = jax.device_put(batch, jax.tree.map(lambda x: x.sharding, sharded.batch))
      state, metrics = sharded.step(state, {}, batch)
      losses.append(float(metrics['loss']))
  assert count['step'] == 1
  return jax.device_get(state), losses


@pytest.fixture(scope='module')
def initial():
  mesh = make_mesh(devices=jax.devices()[:1])
  return jax.device_get(shard_program(make_program(), mesh).init(jax.random.key(0)))


@pytest.fixture(scope='module')
def on_one_device(initial):
  return run(initial, make_mesh(devices=jax.devices()[:1]))


def test_initial_state_does_not_depend_on_the_mesh(initial):
  state = shard_program(make_program(FSDP_RULES), make_mesh(fsdp=4)).init(jax.random.key(0))
  assert state.params['conv']['kernel'].addressable_shards[0].data.shape == (3, 3, 3, 4)
  assert state.extra['teacher']['conv']['kernel'].addressable_shards[0].data.shape == (3, 3, 3, 4)
  chex.assert_trees_all_equal(jax.device_get(state), initial)


@pytest.mark.parametrize(
  'axes, rules',
  [
    ({'data': 8}, ()),
    ({'data': 2, 'fsdp': 4}, ()),
    ({'data': 2, 'fsdp': 4}, FSDP_RULES),
  ],
  ids=['8', '2x4', '2x4-fsdp'],
)
def test_result_does_not_depend_on_the_mesh(initial, on_one_device, axes, rules):
  state, losses = run(initial, make_mesh(**axes), rules)
  chex.assert_trees_all_close(losses, on_one_device[1], rtol=2e-6)
  chex.assert_trees_all_close(state, on_one_device[0], rtol=2e-5, atol=2e-6)


def test_shapes_are_given_one_sharding_or_one_for_each_part():
  mesh, tree = make_mesh(), {'a': {'x': jnp.ones(8), 'y': jnp.ones((8, 2))}, 'b': jnp.ones(8)}
  whole, split = replicated(mesh), batch_sharding(mesh)
  found = abstract(tree, {'a': split, 'b': whole})
  assert found['a']['y'] == jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split)
  assert [leaf.sharding for leaf in jax.tree.leaves(found)] == [split, split, whole]
  assert all(leaf.sharding == whole for leaf in jax.tree.leaves(abstract(tree, whole)))
