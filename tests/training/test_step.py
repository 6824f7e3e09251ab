import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxlab.parallel import make_mesh, shard_program
from jaxlab.training import (
  Checkpoints,
  Initial,
  Out,
  apply_gradients,
  by_path,
  fit,
  make_optimizer,
  make_program,
  step_keys,
)
from jaxlab.training import checkpoints as checkpoint_files

BATCH = 16
X = jax.random.normal(jax.random.key(1), (BATCH, 5))
Y = jax.random.normal(jax.random.key(2), (BATCH, 3))
SHAPES = {
  'x': jax.ShapeDtypeStruct(X.shape, X.dtype),
  'y': jax.ShapeDtypeStruct(Y.shape, Y.dtype),
}
FROZEN = {'teacher': jax.ShapeDtypeStruct((5, 3), jnp.float32)}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def init(key):
  params = {'w': jax.random.normal(key, (5, 3)), 'b': jnp.zeros(3)}
  return Initial(params, {'seen': jnp.int32(0)}, {'last': jnp.zeros(5)})


def loss(params, state, batch, key):
  told = jnp.tanh(batch['x'] @ state.frozen['teacher'])
  error = jnp.square(jnp.tanh(batch['x'] @ params['w'] + params['b']) - batch['y'] - told)
  drawn = jax.random.uniform(key)
  return error.mean(), Out(
    {'seen': state.model_state['seen'] + 1}, {'last': batch['x'][0]}, {'drawn': drawn}
  )


def program(**options):
  return make_program(init, loss, OPTIMIZER, SHAPES, frozen=FROZEN, **options)


def one_step(own, teacher=0.0, batch=None, steps=1):
  state = own.init(jax.random.key(0))
  frozen = {'teacher': jnp.full((5, 3), teacher)}
  for _ in range(steps):
    state, metrics = jax.jit(own.step)(state, frozen, batch or {'x': X, 'y': Y})
  return state, metrics


@pytest.mark.parametrize('microbatches', [2, 4])
def test_microbatches_give_the_step_of_the_whole_batch(microbatches):
  whole, metrics = one_step(program())
  parts, means = one_step(program(microbatches=microbatches))
  chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(means['loss'], metrics['loss'], rtol=1e-6)
  assert (whole.model_state['seen'], parts.model_state['seen']) == (1, microbatches)
  np.testing.assert_array_equal(parts.extra['last'], X[microbatches - 1])


def test_a_loss_that_leaves_nothing_keeps_the_state():
  own = make_program(init, lambda p, s, b, k: (jnp.sum(p['w'] ** 2), Out()), OPTIMIZER, SHAPES)
  state, metrics = jax.jit(own.step)(own.init(jax.random.key(0)), {}, {'x': X, 'y': Y})
  assert state.model_state['seen'] == 0 and set(metrics) == {'loss'} and state.step == 1


def test_keys_differ_between_steps_and_microbatches_and_not_between_runs():
  drawn = [float(one_step(program(), steps=n)[1]['drawn']) for n in (1, 2)]
  assert drawn[0] != drawn[1]
  base = jax.random.key(0)
  expected = [jax.random.uniform(jax.random.fold_in(base, step)) for step in (0, 1)]
  np.testing.assert_array_equal(drawn, expected)
  folded = jax.random.fold_in(base, 0)
  each = [jax.random.uniform(jax.random.fold_in(folded, i)) for i in range(2)]
  _, metrics = one_step(program(microbatches=2))
  np.testing.assert_allclose(metrics['drawn'], np.mean(each), rtol=1e-6)


def test_several_streams_of_keys_are_folded_alike():
  def start(key):
    return init(key)._replace(key={'augment': jax.random.fold_in(key, 1), 'dropout': key})

  own = make_program(start, loss, OPTIMIZER, SHAPES, frozen=FROZEN)
  keys = step_keys(own.init(jax.random.key(0)).replace(step=jnp.int32(3)))
  expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 3)
  assert set(keys) == {'augment', 'dropout'} and keys['augment'] == expected


def test_dropout_draws_from_the_key():
  model = nn.Dropout(0.5, deterministic=False)

  def loss(params, state, batch, key):
    return model.apply({}, batch['x'] * params['w'], rngs={'dropout': key}).sum(), Out()

  own = make_program(lambda key: Initial({'w': jnp.ones(5)}), loss, OPTIMIZER, SHAPES)
  step, batch = jax.jit(own.step), {'x': X, 'y': Y}
  state, first = step(own.init(jax.random.key(0)), {}, batch)
  again = step(own.init(jax.random.key(0)), {}, batch)[1]
  other = step(state.replace(params={'w': jnp.ones(5)}), {}, batch)[1]
  assert first['loss'] == again['loss'] != other['loss']


def test_after_sees_the_new_parameters():
  def after(state):
    return state.replace(params=jax.tree.map(lambda w: jnp.clip(w, -0.1, 0.1), state.params))

  assert float(jnp.abs(one_step(program(after=after))[0].params['w']).max()) < 0.1001


def test_compute_dtype_reaches_the_loss_and_not_the_parameters():
  seen = {}

  def spy(params, state, batch, key):
    seen.update(w=params['w'].dtype, x=batch['x'].dtype, teacher=state.frozen['teacher'].dtype)
    return loss(params, state, batch, key)

  options = {'frozen': FROZEN, 'compute_dtype': 'bfloat16'}
  state, metrics = one_step(make_program(init, spy, OPTIMIZER, SHAPES, **options))
  assert seen == {'w': jnp.bfloat16, 'x': jnp.bfloat16, 'teacher': jnp.float32}
  assert state.params['w'].dtype == jnp.float32
  np.testing.assert_allclose(metrics['loss'], one_step(program())[1]['loss'], rtol=0.02)


def test_a_hand_written_step_ends_as_the_made_one():
  made, _ = one_step(program())
  state = program().init(jax.random.key(0))
  gradient = jax.grad(lambda p: jnp.square(jnp.tanh(X @ p['w'] + p['b']) - Y).mean())(state.params)
  by_hand = apply_gradients(state, gradient, OPTIMIZER, model_state={'seen': jnp.int32(1)})
  chex.assert_trees_all_close(by_hand.params, made.params, rtol=1e-6)
  assert by_hand.step == 1 and by_hand.model_state == {'seen': 1}


def test_groups_of_parameters_have_optimizers_of_their_own():
  optimizer = by_path([('w', optax.sgd(0.1)), ('.*', make_optimizer('adamw', 0.01))])
  params = {'w': jnp.ones(3), 'b': jnp.ones(3)}
  updates, _ = optimizer.update(
    {'w': jnp.full(3, 2.0), 'b': jnp.full(3, 2.0)}, optimizer.init(params), params
  )
  np.testing.assert_allclose(updates['w'], -0.2, rtol=1e-6)
  np.testing.assert_allclose(updates['b'], -0.01, rtol=1e-4)
  with pytest.raises(ValueError, match="no parameter matches 'v'"):
    by_path([('v', optax.sgd(0.1)), ('.*', optax.sgd(0.1))]).init(params)
  with pytest.raises(ValueError, match=r'no pattern matches 1 parameter\(s\), such as b'):
    by_path([('w', optax.sgd(0.1))]).init(params)


class Feed:
  def __next__(self):
    return {'x': np.asarray(X), 'y': np.asarray(Y)}

  def get_state(self):
    return {}

  def set_state(self, state):
    pass


def train(workdir, teacher, num_steps=3, **options):
  return fit(
    program(),
    Feed(),
    num_steps=num_steps,
    key=jax.random.key(0),
    frozen={'teacher': np.full((5, 3), teacher, np.float32)},
    workdir=workdir and str(workdir),
    log_every=1,
    **options,
  )


def test_frozen_arrays_reach_the_step_and_no_checkpoint(tmp_path):
  state, rows = train(tmp_path, 0.5)
  expected, metrics = one_step(program(), 0.5, steps=3)
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)
  np.testing.assert_allclose(rows[-1]['loss'], metrics['loss'], rtol=1e-5)
  held = (tmp_path / 'checkpoints' / '3' / 'state').rglob('*')
  assert not any('teacher' in path.read_bytes().decode('latin1') for path in held if path.is_file())


def test_other_frozen_arrays_are_refused(tmp_path):
  train(tmp_path, 0.5)
  with pytest.raises(ValueError, match='other frozen arrays'):
    train(tmp_path, 0.25, num_steps=4)
  state, _ = train(tmp_path, 0.5, num_steps=4)
  assert state.step == 4


def test_frozen_arrays_that_do_not_fit_are_listed():
  with pytest.raises(
    ValueError, match=r'(?s)frozen arrays do not fit.*teacher.*\[5, 3\] wanted.*x:'
  ):
    fit(
      program(),
      Feed(),
      num_steps=1,
      key=jax.random.key(0),
      frozen={'teacher': np.zeros((5, 2), np.float32), 'x': np.zeros(2, np.float32)},
    )


def test_frozen_arrays_lie_as_the_parameters_do():
  def start(key):
    return Initial({'net': {'w': jax.random.normal(key, (512, 1024))}})

  shape = {'teacher': {'net': {'w': jax.ShapeDtypeStruct((512, 1024), jnp.float32)}}}
  own = make_program(start, loss, OPTIMIZER, SHAPES, frozen=shape)
  sharded = shard_program(own, make_mesh(fsdp=4))
  spec = sharded.frozen['teacher']['net']['w'].sharding.spec
  assert spec == sharded.state.params['net']['w'].sharding.spec and 'fsdp' in spec


def test_what_is_begun_from_is_what_the_run_starts_with(tmp_path):
  def begin(state):
    return state.replace(params=jax.tree.map(jnp.zeros_like, state.params))

  state, _ = train(None, 0.0, num_steps=0, begin=begin)
  assert not np.asarray(state.params['w']).any()
  with pytest.raises(ValueError, match='initial state do not fit'):
    train(None, 0.0, begin=lambda state: state.replace(params={'w': state.params['w']}))


def test_what_is_begun_from_is_not_donated():
  given = {'w': jnp.ones((5, 3)), 'b': jnp.zeros(3)}
  train(None, 0.0, begin=lambda state: state.replace(params=given))
  np.testing.assert_array_equal(given['w'], np.ones((5, 3)))


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_files, 'FORMAT', 1)
  train(tmp_path, 0.0)
  monkeypatch.undo()
  with pytest.raises(ValueError, match='has format 1 of checkpoints, this version reads 2'):
    train(tmp_path, 0.0)
  assert Checkpoints(tmp_path).steps == [3]
