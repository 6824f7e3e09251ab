import os
import pathlib
import warnings

import chex
import jax
import jax.numpy as jnp
import pytest
from small_program import CONFIG

from jaxlab.parallel import make_mesh
from jaxlab.training import Checkpoints, TrainState
from jaxlab.training.checkpoints import config_difference


def make_state(seed=0, width=300):
  key = jax.random.key(seed)
  params = {'conv': {'kernel': jax.random.normal(key, (width, 40))}, 'scale': jnp.bfloat16([1.5])}
  momentum = ({'trace': params}, ())
  return TrainState(jnp.int32(seed), params, momentum, {}, {'seen': jnp.array([True, False])})


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def saved(tmp_path):
  """A run with checkpoints at steps 1 and 2."""
  checkpoints = Checkpoints(tmp_path, config=CONFIG)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {'next': step})
  checkpoints.close()
  return tmp_path


def newest_files(kind=''):
  """What the newest checkpoint's files are called does not matter: the largest holds the values."""

  def pick(workdir):
    files = [p for p in (workdir / 'checkpoints' / '2' / kind).rglob('*') if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)

  return pick


def test_state_and_position_come_back(saved):
  step, state, position = Checkpoints(saved, config=CONFIG).restore(abstract(make_state()))
  assert (step, position) == (2, {'next': 2})
  chex.assert_trees_all_equal(state, make_state(2))
  chex.assert_trees_all_equal_dtypes(state, make_state(2))


def test_only_the_newest_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(step), None)
  checkpoints.close()
  assert checkpoints.steps == [2, 3]
  assert Checkpoints(tmp_path / 'empty').restore(abstract(make_state())) is None


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))


@pytest.mark.parametrize(
  'kind, damage',
  [
    ('state', truncate),
    ('state', pathlib.Path.unlink),
    ('state', flip_a_bit),
    ('run', truncate),
    ('run', pathlib.Path.unlink),
  ],
)
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(saved, kind, damage):
  damage(newest_files(kind)(saved))
  checkpoints = Checkpoints(saved, config=CONFIG)
  with pytest.warns(UserWarning, match=r'checkpoints/2 is damaged .* from .*checkpoints/1'):
    step, state, position = checkpoints.restore(abstract(make_state()))
  assert (step, position) == (1, {'next': 1})
  chex.assert_trees_all_equal(state, make_state(1))
  assert os.listdir(saved / 'damaged') == ['2']
  checkpoints.save(2, make_state(2), {'next': 2})
  checkpoints.close()
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    assert Checkpoints(saved, config=CONFIG).restore(abstract(make_state()))[0] == 2


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_all_checkpoints_damaged_is_an_error(saved):
  for step in '12':
    for path in (saved / 'checkpoints' / step / 'state').rglob('*'):
      if path.is_file():
        path.unlink()
  with pytest.raises(ValueError, match=r'No checkpoint can be read: .*/2: .*/1: '):
    Checkpoints(saved, config=CONFIG).restore(abstract(make_state()))


def test_other_config_is_refused_with_the_difference(saved):
  other = {'model': {'width': 16}, 'optimizer': {'learning_rate': 0.1}}
  with pytest.raises(ValueError) as error:
    Checkpoints(saved, config=other)
  text = str(error.value)
  assert 'optimizer.learning_rate: 0.05 there, 0.1 given' in text
  assert 'optimizer.momentum: 0.9 there, absent given' in text
  assert 'width' not in text


def test_config_is_compared_as_it_is_written(tmp_path):
  Checkpoints(tmp_path, config={'sizes': (1, 2), 'betas': {1: None}}).close()
  Checkpoints(tmp_path, config={'betas': {'1': None}, 'sizes': [1, 2]}).close()
  assert config_difference({'a': {'b': None}}, {'a': {}}) == [
    'a: absent there, {} given',
    'a.b: None there, absent given',
  ]


def test_checkpoint_of_another_architecture_lists_all_differences(saved):
  state = make_state(width=20)
  state = state.replace(params={'conv': state.params['conv'], 'bias': jnp.ones(3)})
  with pytest.raises(ValueError, match='another architecture') as error:
    Checkpoints(saved, config=CONFIG).restore(abstract(state))
  text = str(error.value)
  assert 'params/conv/kernel: [300, 40] in the checkpoint, [20, 40] in the program' in text
  assert 'params/scale: [1] in the checkpoint, absent in the program' in text
  assert 'params/bias: absent in the checkpoint, [3] in the program' in text


def test_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'workdir=.*cannot be written'):
    Checkpoints(tmp_path / 'file' / 'run')


def test_state_that_is_not_finite_is_not_written(tmp_path):
  state = make_state()
  state = state.replace(params={'conv': {'kernel': jnp.array([1.0, jnp.inf])}})
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(FloatingPointError, match=r'after step 7.*No checkpoint was written'):
    checkpoints.save(7, state, None)
  statistics = {'batch_stats': {'bn': {'var': jnp.array([1.0, jnp.inf])}}}
  with pytest.raises(
    FloatingPointError, match=r'statistic of the model .* not finite after step 8'
  ):
    checkpoints.save(8, make_state().replace(model_state=statistics), None)
  assert checkpoints.steps == []


def test_checkpoint_restores_to_another_sharding(saved):
  sharding = jax.sharding.NamedSharding(make_mesh(fsdp=4), jax.sharding.PartitionSpec('fsdp'))
  whole = jax.sharding.NamedSharding(make_mesh(fsdp=4), jax.sharding.PartitionSpec())
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if x.ndim > 1 else whole),
    make_state(),
  )
  _, restored, _ = Checkpoints(saved, config=CONFIG).restore(state)
  assert restored.params['conv']['kernel'].addressable_shards[0].data.shape == (75, 40)
  chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(make_state(2)))


@pytest.mark.parametrize('options', [{'keep': 0}, {'best_mode': 'most'}])
def test_bad_options_are_refused(tmp_path, options):
  with pytest.raises(ValueError, match=next(iter(options))):
    Checkpoints(tmp_path, **options)
