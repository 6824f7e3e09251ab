import jax
import jax.numpy as jnp

from experiments.harness import costs
from jaxlab import parallel
from jaxlab.training import Initial, Out, make_optimizer, make_program


def program(width):
  batch = {'x': jax.ShapeDtypeStruct((8, width), jnp.float32)}

  def loss(params, state, batch, key):
    del key
    return jnp.mean((batch['x'] @ params['w'] - state.frozen['y']) ** 2), Out()

  init = lambda key: Initial({'w': jax.random.normal(key, (width, 4))})  # noqa: E731
  frozen = {'y': jax.ShapeDtypeStruct((4,), jnp.float32)}
  return make_program(init, loss, make_optimizer('sgd', 0.1), batch, frozen=frozen)


def test_a_step_is_measured_in_time_memory_and_operations():
  began = []

  def begin(state):
    began.append(state)
    return state

  sides = {str(width): costs.Side(program(width), begin, {'y': jnp.ones(4)}) for width in (8, 4096)}
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  found = costs.measure(sides, mesh, repeats=2, steps=2)
  assert len(began) == 2 and list(found) == ['8', '4096']
  assert all(own['milliseconds'] > 0 for own in found.values())
  # Parameters and momentum, in and out, and the batch: the donated state counts once.
  state = 2 * 4096 * 4 * 4
  assert state < 1e6 * found['4096']['megabytes'] < 4 * state + 2 * 8 * 4096 * 4
  assert found['8']['megabytes'] < 0.1 * found['4096']['megabytes']
  # Two products of 8 x 4096 x 4, forward and for the gradient, and little besides.
  products = 2 * 2 * 8 * 4096 * 4
  assert products < 1e9 * found['4096']['gigaflops'] < 1.3 * products


def test_costs_are_over_those_of_one_side(monkeypatch):
  kinds = ('milliseconds', 'megabytes', 'gigaflops')
  found = {'a': dict(zip(kinds, (3.0, 8.0, 1.0))), 'b': dict(zip(kinds, (2.0, 4.0, 0.5)))}
  monkeypatch.setattr(costs, 'measure', lambda sides, mesh, repeats: found)
  expected = {
    'a': {'time': 1.5, 'memory': 2.0, 'flops': 2.0},
    'b': dict.fromkeys(('time', 'memory', 'flops'), 1.0),
  }
  assert costs.relative({}, 'b', None) == expected


def test_sides_are_timed_in_turns():
  order = []
  times = costs.alternate({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 3)
  assert order == ['a', 'b'] * 3 and set(times) == {'a', 'b'}
