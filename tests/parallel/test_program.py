import os
import pathlib
import socket
import subprocess
import sys

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


PLACED = """
import jax.numpy as jnp
from jaxlab.parallel import abstract, initialize, make_mesh, place, replicated

initialize()
values = [jnp.float32(2), jnp.arange(3.0)]
placed = place(values, abstract(values, replicated(make_mesh())))
again = place(placed, abstract(values, replicated(make_mesh())))
print([shard.data.tolist() for leaf in again for shard in leaf.addressable_shards])
"""


def test_values_of_each_process_are_placed_on_the_mesh_of_two_with_one_device_each():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = {
    **os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
    'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1'),
    'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2',
  }  # fmt: skip
  hosts = [
    subprocess.Popen(
      [sys.executable, '-c', PLACED], env={**environment, 'JAX_PROCESS_ID': str(index)},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for index in range(2)
  ]  # fmt: skip
  texts = [host.communicate(timeout=120)[0] for host in hosts]
  assert [host.returncode for host in hosts] == [0, 0], '\n'.join(texts)
  assert all(text.splitlines()[-1] == '[2.0, [0.0, 1.0, 2.0]]' for text in texts), texts
