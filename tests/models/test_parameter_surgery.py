import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden

from jaxlab import models, training


def _qwen2(vectors):
  """Returns the reference's network and its params: Llama, whose output projection's bias is 0."""
  kernels = vectors.tree('param_model_layers_0_')
  depth = len([name for name in vectors if name.endswith('_mlp_up_proj_weight')])
  vocab_size, width = vectors['param_lm_head_weight'].shape
  model = models.Llama(
    vocab_size=vocab_size,
    width=width,
    depth=depth,
    num_heads=vectors.param('num_heads'),
    num_kv_heads=vectors.param('num_kv_heads'),
    hidden=kernels['mlp_up_proj_weight'].shape[0],
    rope_theta=vectors.param('rope_theta'),
    epsilon=vectors.param('rms_norm_eps'),
    attention_bias=True,
  )

  def read(path, shape):
    *modules, leaf = [entry.key for entry in path]
    within = '_'.join(modules) if modules == ['lm_head'] else '_'.join(['model', *modules])
    name = f'param_{within}_{"bias" if leaf == "bias" else "weight"}'
    if modules[-1] == 'o_proj' and leaf == 'bias' and name not in vectors:
      return jnp.zeros(shape.shape)
    return jnp.asarray(vectors[name].T if leaf == 'kernel' else vectors[name], float)

  shapes = models.abstract_variables(model)['params']
  return model, jax.tree_util.tree_map_with_path(read, shapes)


@golden('sfn', 'qwen2_destruction')
@pytest.mark.parametrize('x64', [True, False])
def test_destruction_agrees_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    model, params = _qwen2(vectors)
    tokens = vectors['in_input_ids']
    layers = vectors.param('destroyed_layers')
    mask = models.select_parameters(params, [vectors.param('destroyed_module')], blocks=layers)
    zeroed = models.destroy_parameters(params, mask)
    removed = [models.remove_blocks(f'layers_{index}' for index in layers)]
    assert_close(model.apply({'params': params}, tokens), vectors['out_logits'])
    assert_close(model.apply({'params': zeroed}, tokens), vectors['out_logits_zeroed'])
    logits = models.apply(model, {'params': params}, tokens, hooks=removed)
    assert_close(logits, vectors['out_logits_removed_layers'])


MODEL = models.Llama(vocab_size=11, width=8, depth=3, num_heads=2, hidden=12)
TOKENS = np.array([[1, 2, 3, 4, 5, 6]])


@functools.cache
def _params(seed: int):
  params = MODEL.init(jax.random.key(seed), TOKENS)['params']
  return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(seed), a.shape), params)


@jax.jit
def _logits(params):
  return MODEL.apply({'params': params}, TOKENS)


def _zeroed(types, blocks=(1,)):
  params = _params(0)
  mask = models.select_parameters(params, types, blocks=blocks)
  return _logits(models.destroy_parameters(params, mask))


def test_zeroed_types_of_a_block_are_the_same_damage_where_the_block_says_so():
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(_zeroed(['v_proj']), _zeroed(['o_proj']))
  close(_zeroed(['q_proj']), _zeroed(['k_proj']))
  close(_zeroed(['up_proj']), _zeroed(['gate_proj']))
  close(_zeroed(['up_proj']), _zeroed(['down_proj']))
  removed = [models.remove_blocks(['layers_1'])]
  close(_zeroed(['.*_proj']), models.apply(MODEL, {'params': _params(0)}, TOKENS, hooks=removed))
  assert np.abs(_zeroed(['o_proj']) - _zeroed(['q_proj'])).max() > 1e-2


def test_types_are_whole_names():
  params = _params(0)
  paths = lambda *args, **kwargs: {  # noqa: E731
    path.key if not below else f'{path.key}/' + '/'.join(k.key for k in below)
    for (path, *below), chosen in jax.tree_util.tree_leaves_with_path(
      models.select_parameters(params, *args, **kwargs)
    )
    if chosen
  }
  assert paths(['norm']) == {'norm/scale'}
  assert len(paths(['.*norm'])) == 2 * MODEL.depth + 1
  assert paths(['k_proj'], blocks=[2]) == {'layers_2/self_attn/k_proj/kernel'}
  assert len(paths(['mlp'], exclude=['up_proj'], blocks=range(1, 3))) == 4
  names = {'model.layers.0.self_attn.o_proj.weight': 0, 'model.layers.10.mlp.o_proj.bias': 0}
  assert list(models.select_parameters(names, ['o_proj'], blocks=[10]).values()) == [False, True]


def test_merge_takes_the_chosen_types_and_everything_else_stays():
  base, tuned = _params(0), _params(1)
  mask = models.select_parameters(base, ['o_proj'])
  merged = models.merge_parameters(base, tuned, mask)
  jax.tree.map(
    lambda chosen, m, a, b: np.testing.assert_array_equal(m, b if chosen else a),
    *(mask, merged, base, tuned),
  )
  everything = jax.tree.map(lambda _: True, base)
  jax.tree.map(
    np.testing.assert_array_equal, models.merge_parameters(base, tuned, everything), tuned
  )
  half = models.merge_parameters(
    {'w': jnp.ones(2, jnp.bfloat16)}, {'w': jnp.zeros(2)}, {'w': True}, 0.5
  )
  assert half['w'].dtype == jnp.bfloat16 and half['w'].tolist() == [0.5, 0.5]


def test_new_entries_are_drawn_for_the_chosen_alone():
  params = {'a': jnp.ones((40, 50)), 'b': jnp.ones((40, 50)), 'c': jnp.ones(3)}
  mask = {'a': True, 'b': True, 'c': False}
  drawn = jax.jit(lambda key: models.destroy_parameters(params, mask, key, std=0.5))(
    jax.random.key(0)
  )
  assert drawn['c'].tolist() == [1, 1, 1]
  for name in 'ab':
    assert abs(drawn[name].mean()) < 0.05 and abs(drawn[name].std() - 0.5) < 0.03
  assert not np.array_equal(drawn['a'], drawn['b'])


def test_frozen_parameters_stay_and_have_no_state():
  params = _params(0)
  mask = models.select_parameters(params, ['o_proj', '.*norm', 'embed_tokens', 'lm_head'])
  optimizer = training.make_optimizer(
    'adamw', 0.1, weight_decay=0.1, frozen=models.unselected(mask)
  )
  state = optimizer.init(params)
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
  new = optax.apply_updates(params, updates)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, new)
  assert moved == mask
  trained = sum(a.size for a, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask)) if m)
  assert sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.ndim(leaf)) == 2 * trained


def test_bad_input_is_named():
  params = _params(0)
  with pytest.raises(ValueError, match="No module matches include 'o_prj'"):
    models.select_parameters(params, ['o_prj'])
  with pytest.raises(ValueError, match="No module matches exclude 'x'"):
    models.select_parameters(params, ['o_proj'], exclude=['x'])
  with pytest.raises(ValueError, match="got the string 'o_proj'"):
    models.select_parameters(params, 'o_proj')
  with pytest.raises(ValueError, match=r'expected indices in \[0, 3\), got \[3\]'):
    models.select_parameters(params, ['o_proj'], blocks=[2, 3])
  with pytest.raises(ValueError, match=r"'lm_head'\] match nothing within the blocks"):
    models.select_parameters(params, ['lm_head'], blocks=[1])
  with pytest.raises(ValueError, match=r"include: \['lm_head'\] match nothing within the blocks"):
    models.select_parameters(params, ['o_proj', 'lm_head'], blocks=[1])
  mask = {'a': True}
  with pytest.raises(ValueError, match=r'a: base has \(2,\), tuned \(3,\)'):
    models.merge_parameters({'a': jnp.ones(2)}, {'a': jnp.ones(3)}, mask)
  with pytest.raises(ValueError, match='b: in tuned, missing in base'):
    models.merge_parameters({'a': jnp.ones(2)}, {'a': jnp.ones(2), 'b': jnp.ones(2)}, mask)
  with pytest.raises(ValueError, match='base_share must be in'):
    models.merge_parameters({'a': jnp.ones(2)}, {'a': jnp.ones(2)}, mask, 1.5)
  with pytest.raises(ValueError, match='mask must have the structure'):
    models.destroy_parameters(params, mask)
  with pytest.raises(ValueError, match='std must not be negative'):
    models.destroy_parameters({'a': jnp.ones(2)}, mask, std=-1.0)
  with pytest.raises(ValueError, match='must name the blocks'):
    models.remove_blocks([])
