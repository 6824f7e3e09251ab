import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import parallel, training


def random(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rows_are_read_written_and_stepped_where_they_lie():
  table = {'logits': random((6, 3)), 'count': np.arange(6)}
  index = np.array([4, 1, 3])
  rows = training.read_rows(table, index)
  np.testing.assert_array_equal(rows['logits'], table['logits'][index])
  new = training.write_rows(table, index, {'logits': random((3, 3), 1), 'count': np.full(3, 9)})
  expected = table['logits'].copy()
  expected[index] = random((3, 3), 1)
  np.testing.assert_array_equal(new['logits'], expected)
  assert new['count'].tolist() == [0, 9, 2, 9, 9, 5]
  some = training.step_rows(table['logits'], index, random((3, 3), 2), 2.0, [True, False, True])
  expected = table['logits'].copy()
  expected[[4, 3]] -= 2 * random((3, 3), 2)[[0, 2]]
  np.testing.assert_allclose(some, expected, rtol=1e-6)


def test_tables_are_filled_up_so_that_they_divide():
  rows = training.pad_rows({'a': random((300, 2)), 'b': np.ones(300, bool)})
  assert rows['a'].shape == (512, 2) and rows['b'].shape == (512,)
  assert not rows['a'][300:].any() and not rows['b'][300:].any()
  blank = training.blank_rows({'a': jax.ShapeDtypeStruct((300, 2), jnp.float16)})
  assert blank['a'].shape == (512, 2) and blank['a'].dtype == jnp.float16 and not blank['a'].any()


def step(table, index, gradient):
  return training.step_rows(table, index, gradient, 0.5)


def test_a_table_on_eight_devices_is_that_on_one():
  mesh = parallel.make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
  ((_, spec),) = training.row_rules(mesh, 'table')
  table, index, gradient = (
    random((512, 3)),
    np.arange(0, 512, 32),
    random((16, 3), 1),
  )
  split = jax.sharding.NamedSharding(mesh, spec)
  given = (
    jax.device_put(table, split),
    *jax.device_put((index, gradient), parallel.batch_sharding(mesh)),
  )
  new = jax.jit(step, out_shardings=split)(*given)
  assert new.addressable_shards[0].data.shape == (64, 3)
  np.testing.assert_array_equal(new, jax.jit(step)(table, index, gradient))


def test_a_step_costs_the_rows_of_its_batch_and_not_those_of_the_table():
  index, rows = jax.ShapeDtypeStruct((16,), jnp.int32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
  found = []
  for count in (10**4, 10**6):
    table = jax.ShapeDtypeStruct((count, 8), jnp.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(table, index, rows).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 32 * count  # written in place
    found.append((compiled.cost_analysis()['flops'], memory.temp_size_in_bytes))
  assert found[0] == found[1]


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda table: training.read_rows(table, [6]), 'index must lie in 0 to 5'),
    (lambda table: training.write_rows(table, [1, 1], table[:2]), 'holds a row twice'),
    (lambda table: training.step_rows(table, [-1], table[:1], 1.0), 'got -1 to -1'),
    (lambda table: training.write_rows(table, [0, 1], table[:2, :1]), r'\(2, 2\) are wanted'),
    (lambda table: training.step_rows(table, [0, 1], table[:3], 1.0), r'got \(3, 2\)'),
    (lambda table: training.write_rows({'a': table}, [0], {'b': table[:1]}), "got {'b'"),
    (lambda table: training.read_rows(table, [0.0, 1.0]), 'index must be integers'),
    (lambda table: training.read_rows({'a': table, 'b': table[:4]}, [0]), r'got \[4, 6\]'),
  ],
)
def test_rows_that_are_not_there_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(random((6, 2)))
