import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import kv_heads
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import decoding
from jaxlab import adapters, compression, models
from jaxlab.parallel import aot, make_mesh
from mlcollections_configs.kv_heads import llama2_7b

TINY = {
  'network.model.width': 16, 'network.model.depth': 1, 'network.model.hidden': 16,
  'network.model.num_heads': 4, 'network.data.train_size': 32, 'network.data.train_options.limit': 32,
  'network.data.test_options.limit': 16, 'network.recipe.schedule.warmup_epochs': 0.0,
  'eval_batch_size': 16, 'group_sizes': '2', 'runs': 'svd_a,mean', 'tuned': 'svd_a', 'tuning.steps': 2,
  'calibration.count': 16, 'calibration.batch_size': 8, 'decoding.length': 8, 'decoding.repeats': 0,
  'claims': '()',
}  # fmt: skip


def tiny(setting='embedded', **changes):
  given = {**TINY, **{key.replace('__', '.'): value for key, value in changes.items()}}
  if setting == 'embedded_alibi':
    given['network.model.hidden'] = 20
  return launcher.load('kv_heads', setting, [f'{key}={value}' for key, value in given.items()])


def test_a_run_converts_tunes_and_compares(tmp_path):
  config = tiny()
  found = kv_heads.run(config, tmp_path)
  metrics = {item['name']: item['metrics'] for item in found['rows']}
  assert list(metrics) == ['original', 'equal singular values', 'SVD-a', 'mean pooling']
  assert metrics['SVD-a']['t2_cache'] == metrics['mean pooling']['t2_cache'] == 0.5
  assert 'tuned_loss' not in str(metrics['mean pooling'])
  own, whole = metrics['SVD-a'], metrics['original']
  assert own['t2_loss'] - whole['t2_loss'] == pytest.approx(own['t2_loss_increase'], abs=1e-6)
  assert (tmp_path / 'heads.png').exists()

  # The same by hand, without the experiment's functions.
  model, test = config.model, harness_data.load(config.network.data, 'test')
  tokens = np.stack([test[index]['tokens'] for index in range(len(test))])
  net = kv_heads.networks.load(config, config.network, tmp_path / 'original')
  logits = np.asarray(jax.jit(model.apply)(net.variables, tokens[:, :-1]), np.float64)
  chances = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
  expected = -np.mean(np.take_along_axis(chances, tokens[:, 1:, None], -1))
  assert whole['t2_loss'] == pytest.approx(expected, rel=1e-4)
  calibration = np.concatenate(net.calibration(16, 8))
  caches = jax.jit(lambda v: compression.collect_caches(model, v, calibration))(net.variables)
  shares = []
  for cache in (caches['layers_0/self_attn'].key, caches['layers_0/self_attn'].value):
    for group in np.split(np.asarray(cache, np.float64).reshape(-1, 16), 2, axis=1):
      values = np.linalg.svd(group, compute_uv=False) ** 2
      shares.append(values[:4].sum() / values.sum())
  assert whole['t2_energy'] == pytest.approx(100 * np.mean(shares), rel=1e-4)
  json.dumps(found)


def test_lora_alone_is_trained_and_starts_with_the_converted_decoder():
  config = tiny()
  run = kv_heads.tuning(config, 'svd_a', 2)
  state = run.program.init(jax.random.key(0))
  attention = state.params['layers_0']['self_attn']
  assert set(attention) == {'q_proj', 'k_proj', 'v_proj', 'o_proj'}
  assert attention['v_proj']['up'].shape == (8, 8) and attention['k_proj']['up'].shape == (8, 16)
  small = kv_heads.shapes(config, 'svd_a', 2)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), small.variables
  )
  tokens = rng.integers(0, 256, (16, 65), np.int32)
  batch = {'tokens': tokens, 'index': np.arange(16, dtype=np.int32)}
  step = jax.jit(run.program.step)
  new, metrics = step(state, {'variables': variables}, batch)
  score = kv_heads.scored(
    variables, batch, model=small.model, hooks=small.hooks, task=config.network.task
  )
  assert_close(metrics['loss'], np.mean(score), 1e-5)
  # Merged, the trained matrices compute what they do beside the layers.
  new, metrics = step(
    step(new, {'variables': variables}, batch)[0], {'variables': variables}, batch
  )
  before = step(new, {'variables': variables}, batch)[1]['loss']
  merged = adapters.merge_lora(
    variables['params'], new.params, config.tuning.alpha / config.tuning.rank
  )
  score = kv_heads.scored(
    {**variables, 'params': merged},
    batch,
    model=small.model,
    hooks=small.hooks,
    task=config.network.task,
  )
  assert_close(before, np.mean(score), 1e-4)


def test_every_row_has_the_shapes_that_are_compiled_ahead():
  config = tiny(runs='svd_a,svd_w,mean,before,commuting,ignored')
  variables = jax.jit(config.model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  tokens = np.random.default_rng(0).integers(0, 256, (4, 16), np.int32)
  grams = compression.cache_grams(config.model, variables, [tokens], 2)
  for name in config.runs:
    small = kv_heads.converted(name, config.model, variables, grams, 2)
    ahead = kv_heads.shapes(config, name, 2)
    if name == 'mean':
      assert small.model == ahead.model.clone(num_key_heads=None)
    else:
      assert (small.model, small.hooks) == (ahead.model, ahead.hooks)
    shape = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shape(small.variables) == shape(ahead.variables)


def test_a_step_of_decoding_is_timed_and_its_cache_is_counted():
  model = models.create('llama', width=8, depth=1, num_heads=2, hidden=8, vocab_size=11)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  small = compression.pool_heads(model, variables, 2)
  whole = compression.GroupedHeads(model, dict(variables))
  sizes = decoding.Decoding(batch_size=2, length=4, repeats=1)
  first, same, last = decoding.relative_costs(sizes, [whole, whole, small])
  assert first == same == {'cache': 1.0, 'decode_time': 1.0}
  assert last['cache'] == 0.5 and last['decode_time'] > 0
  untimed = dataclasses.replace(sizes, repeats=0)
  shapes = [own._replace(variables={}) for own in (whole, small)]
  assert decoding.relative_costs(untimed, shapes) == [{'cache': 1.0}, {'cache': 0.5}]


def test_a_timed_step_is_the_last_of_its_cache_and_writes_it_in_place():
  model = models.create('gpt2', width=8, depth=1, num_heads=2, vocab_size=11, max_length=4)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  tokens = np.array([[3, 5, 7, 2], [1, 4, 8, 6]], np.int32)
  _, state = model.apply(
    {**variables, 'cache': model.init_cache(2, 4)}, tokens[:, :3], mutable=['cache']
  )
  cache = decoding.last_slot(model.init_cache(2, 4))
  for name in ('slot', 'mask'):  # as behind three tokens
    np.testing.assert_array_equal(cache[name], state['cache'][name])
  expected = np.argmax(model.apply(variables, tokens)[:, -1:], -1)
  own, held = state['cache'], jax.tree.leaves(state['cache'])
  for _ in range(2):
    found, own = decoding.again(variables, own, tokens[:, 3:], model=model, hooks=())
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(own['mask'], cache['mask'])
  assert all(leaf.is_deleted() for leaf in held if leaf.ndim == 4)


def test_tuned_decoders_are_judged_as_they_were_trained(monkeypatch, tmp_path):
  config = tiny()
  small = kv_heads.shapes(config, 'svd_a', 2)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
  variables = jax.tree.map(draw, small.variables)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.astype(jnp.bfloat16) if 'self_attn' in str(path) else leaf,
    variables['params'],
  )
  small = small._replace(variables={**variables, 'params': params})
  program = kv_heads.tuning(config, 'svd_a', 2).program
  trained = jax.tree.map(draw, program.init(jax.random.key(0)).params)
  run = types.SimpleNamespace(variables={'params': trained})
  monkeypatch.setattr(kv_heads.runs, 'train', lambda *args, **kwargs: run)
  net = types.SimpleNamespace(train=None)
  found = kv_heads.tune(config, net, 'svd_a', 2, small, tmp_path)
  tokens = rng.integers(0, 256, (2, 65), np.int32)
  batch = {'tokens': tokens, 'index': np.arange(2, dtype=np.int32)}
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small.variables)
  scale = config.tuning.alpha / config.tuning.rank
  merged = {**wide, 'params': adapters.merge_lora(wide['params'], trained, scale)}
  score = functools.partial(
    kv_heads.scored, batch=batch, model=small.model, task=config.network.task
  )
  expected = score(merged, hooks=small.hooks)
  assert_close(score(found.variables, hooks=found.hooks), expected, 5e-7)
  rounded = {**small.variables, 'params': adapters.merge_lora(params, trained, scale)}
  for other in (rounded, small.variables):
    assert np.abs(score(other, hooks=small.hooks) - expected).max() > 1e-5


def test_a_compiled_step_writes_the_cache_that_it_reads():
  lowered = kv_heads.programs(tiny())['decode_svd_a_2'].lower(make_mesh())
  aliased = lowered.compile().memory_analysis().alias_size_in_bytes
  cache = jax.eval_shape(lambda: kv_heads.shapes(tiny(), 'svd_a', 2).model.init_cache(8, 8))
  assert aliased * jax.device_count() >= models.cache_bytes(cache) > 0


def test_decoding_with_split_heads_moves_no_weights_and_chooses_the_same_tokens():
  rules = llama2_7b.BY_HEADS
  config = tiny(decoding__partition=repr(rules))
  small = kv_heads.shapes(config, 'svd_a', 2)
  variables = random_leaves(small.variables)
  cache = random_leaves(jax.eval_shape(lambda: small.model.init_cache(8, 8)))
  cache |= {'slot': jnp.int32(5), 'mask': jnp.arange(8)[None] < jnp.full((8, 1), 5)}
  found = []
  for mesh, program in (
    (make_mesh(devices=jax.devices()[:1]), kv_heads.programs(tiny())['decode_svd_a_2']),
    (make_mesh(data=4, tensor=2), kv_heads.programs(config)['decode_svd_a_2']),
  ):
    compiled = program.lower(mesh).compile()
    arguments = (variables, cache, jnp.arange(8, dtype=jnp.int32)[:, None])
    shardings = compiled.input_shardings[0]
    found.append(compiled(*jax.device_put(jax.tree.map(jnp.copy, arguments), shardings)))
  tokens, new = (jax.device_get(own) for own in zip(*found))
  assert np.array_equal(*tokens)
  jax.tree.map(lambda one, two: assert_close(two, one, 1e-5), *new)
  moved = aot.report(compiled)['collectives']
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables['params']))
  assert sum(own['bytes'] for own in moved.values()) < weights / 2


def test_split_heads_leave_no_chip_more_of_the_weights_than_the_automatic_rule():
  weights = kv_heads.whole_shapes(launcher.load('kv_heads', 'llama2_7b')).variables
  for axes in ({'fsdp': 8}, {'fsdp': 2, 'tensor': 4}):
    mesh, sizes = make_mesh(**axes), []
    for own in (decoding.Decoding(partition=llama2_7b.BY_HEADS), decoding.Decoding()):
      shardings = jax.tree.leaves(decoding.weight_shardings(own, weights, mesh))
      parts = zip(jax.tree.leaves(weights), shardings, strict=True)
      sizes.append(sum(np.prod(own.shard_shape(leaf.shape)) for leaf, own in parts))
    assert sizes[0] <= sizes[1]


def random_leaves(tree):
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(tree))))
  return jax.tree.map(
    lambda leaf: 0.3 * jax.random.normal(next(keys), leaf.shape).astype(leaf.dtype), tree
  )


@pytest.mark.parametrize(
  'setting, changes, message',
  [
    ('embedded', {'group_sizes': '3'}, '3 does not divide the 4 heads'),
    ('embedded', {'group_sizes': '(2, 3)'}, 'expected divisors of the largest'),
    ('embedded', {'tuned': 'svd_w'}, 'tuned=.*expected some of runs'),
    ('embedded', {'calibration__count': 12}, 'expected at most 32 windows in whole batches'),
    ('embedded', {'runs': 'svd_a,mean,mean'}, 'runs=svd_a,mean,mean: each may be there once'),
    ('embedded', {'tuned': 'svd_a,svd_a'}, 'tuned=svd_a,svd_a: each may be there once'),
    (
      'embedded',
      {'tuning__recipe__batch_size': 64},
      'tuning.recipe.batch_size=64: more than 32 rec',
    ),
    ('embedded', {'network__recipe__batch_size': 64}, 'network.recipe.batch_size=64: more than 32'),
    ('embedded', {'tuning__rank': 0}, 'rank=0: expected at least 1'),
    (
      'embedded',
      {'decoding__partition': "(('.*/q_prj/kernel', (None, 'tensor')),)"},
      'decoding.partition: .*q_prj.* match none of the',
    ),
    ('embedded', {'decoding__length': 0}, 'length=0'),
    ('embedded_alibi', {'runs': 'svd_a,before'}, 'before are of rotary embedding'),
    ('embedded', {'network__model': "{'name': 'minilm_l6'}"}, 'heads of Bert are not known'),
  ],
)
def test_settings_that_cannot_be_are_refused(setting, changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny(setting, **changes))


def test_a_vocabulary_smaller_than_the_data_is_named_before_any_training(tmp_path):
  config = tiny(network__model__vocab_size=100)
  with pytest.raises(ValueError, match=r'model\.vocab_size=100, but text has 256 tokens'):
    kv_heads.run(config, tmp_path)
  assert not list(tmp_path.iterdir())
