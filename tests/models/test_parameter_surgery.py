import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import Vectors, assert_close, golden

from jaxlab import models, training
from jaxlab.models.checkpoint_names import HF_LLAMA
from jaxlab.trees import tree_paths


def _qwen2(vectors):
  """Returns the reference's network and its params: Llama, whose output projection's bias is 0."""
  kernels = vectors.tree('param_model_layers_0_')
  depth = len([name for name in vectors if name.endswith('_mlp_up_proj_weight')])
  vocab_size, width = vectors['param_model_embed_tokens_weight'].shape
  num_heads = vectors.param('num_heads')
  model = models.Llama(
    vocab_size=vocab_size,
    width=width,
    depth=depth,
    num_heads=num_heads,
    num_kv_heads=vectors.param('num_kv_heads'),
    hidden=kernels['mlp_up_proj_weight'].shape[0],
    head_width=len(kernels['self_attn_q_proj_weight']) // num_heads,
    tied='param_lm_head_weight' not in vectors,
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


@pytest.mark.parametrize('tied', [False, True])
def test_heads_of_another_width_and_a_tied_head_are_told_by_the_file(tied, tmp_path):
  own = models.Llama(
    vocab_size=7, width=12, depth=1, num_heads=3, num_kv_heads=1, hidden=10, head_width=8, tied=tied,
    attention_bias='qkv',
  )  # fmt: skip
  params = models.abstract_variables(own)['params']
  params = jax.tree.map(lambda leaf: np.full(leaf.shape, leaf.size, np.float32), params)
  arrays = models.to_torch({'params': params}, renames=HF_LLAMA)
  arrays = {f'param_{name.replace(".", "_")}': array for name, array in arrays.items()}
  scalars = {'num_heads': 3, 'num_kv_heads': 1, 'rope_theta': 1e4, 'rms_norm_eps': 1e-6}
  np.savez(tmp_path / 'a.npz', **arrays, **{f'param_{name}': a for name, a in scalars.items()})
  model, read = _qwen2(Vectors(tmp_path / 'a.npz'))
  assert (model.head_width, model.tied) == (8, tied)
  del read['layers_0']['self_attn']['o_proj']['bias']
  jax.tree.map(np.testing.assert_array_equal, read, params)


@golden('sfn', 'qwen2_destruction')
@pytest.mark.parametrize('x64', [True, False])
def test_destruction_agrees_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    model, params = _qwen2(vectors)
    tokens = vectors['in_input_ids']
    layers = np.atleast_1d(vectors['param_destroyed_layers']).tolist()
    mask = models.select_parameters(params, [vectors.param('destroyed_module')], blocks=layers)
    zeroed = models.destroy_parameters(params, mask)
    removed = [models.remove_blocks(f'layers_{index}' for index in layers)]
    logits = jax.jit(lambda params: model.apply({'params': params}, tokens))
    assert_close(logits(params), vectors['out_logits'])
    assert_close(logits(zeroed), vectors['out_logits_zeroed'])
    logits = jax.jit(lambda params: models.apply(model, {'params': params}, tokens, hooks=removed))(
      params
    )
    assert_close(logits, vectors['out_logits_removed_layers'])


def test_names_that_are_suggested_are_different_ones():
  params = {f'layers_{i}': {name: {'kernel': 1} for name in ('o_proj', 'v_proj')} for i in range(9)}
  with pytest.raises(ValueError, match='Closest of the 12 paths: o_proj, v_proj'):
    models.select_parameters(params, ['o_prj'])


MODEL = models.Llama(vocab_size=11, width=8, depth=3, num_heads=2, hidden=12)
TOKENS = np.array([[1, 2, 3, 4, 5, 6]])


@functools.cache
def _params(seed: int):
  params = jax.jit(MODEL.init)(jax.random.key(seed), TOKENS)['params']
  return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(seed), a.shape), params)


@jax.jit
def _logits(params):
  return MODEL.apply({'params': params}, TOKENS)


def _zeroed(types, blocks=(1,)):
  params = _params(0)
  mask = models.select_parameters(params, types, blocks=blocks)
  return _logits(models.destroy_parameters(params, mask))


@pytest.mark.exhaustive
def test_zeroed_types_of_a_block_are_the_same_damage_where_the_block_says_so():
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(_zeroed(['v_proj']), _zeroed(['o_proj']))
  close(_zeroed(['q_proj']), _zeroed(['k_proj']))
  close(_zeroed(['up_proj']), _zeroed(['gate_proj']))
  close(_zeroed(['up_proj']), _zeroed(['down_proj']))
  removed = [models.remove_blocks(['layers_1'])]
  without = jax.jit(lambda params: models.apply(MODEL, {'params': params}, TOKENS, hooks=removed))
  close(_zeroed(['.*_proj']), without(_params(0)))
  assert np.abs(_zeroed(['o_proj']) - _zeroed(['q_proj'])).max() > 1e-2


BIASED = MODEL.clone(attention_bias=True, mlp_bias=True)
WITHOUT_OUTPUT_BIASES = ('o_proj', 'down_proj')


@functools.cache
def _biased_params():
  """Returns parameters with biases as Qwen2 has them, and of the MLP's first two layers."""
  params = jax.jit(BIASED.init)(jax.random.key(0), TOKENS)['params']
  params = jax.tree.map(
    lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), params
  )
  for index in range(MODEL.depth):
    for part, name in zip(('self_attn', 'mlp'), WITHOUT_OUTPUT_BIASES):
      layer = params[f'layers_{index}'][part][name]
      layer['bias'] = jnp.zeros_like(layer['bias'])
  return params


@jax.jit
def _biased_logits(params):
  return BIASED.apply({'params': params}, TOKENS)


@pytest.mark.parametrize(
  ('first', 'second'),
  [('v_proj', 'o_proj'), ('q_proj', 'k_proj'), ('up_proj', 'gate_proj'), ('up_proj', 'down_proj')],
)
def test_identities_hold_with_biases_that_are_zeroed_as_well(first, second):
  params = _biased_params()
  found = []
  for name in (first, second):
    mask = models.select_parameters(params, [name], blocks=[1, 2])
    assert sum(jax.tree.leaves(mask)) == 4
    found.append(_biased_logits(models.destroy_parameters(params, mask)))
  assert_close(*found, 1e-5)
  assert np.abs(found[0] - _biased_logits(params)).max() > 1e-2


def test_a_decoder_without_some_blocks_is_one_whose_types_are_all_zeroed_there():
  params = _biased_params()
  blocks = [0, 2]
  mask = models.select_parameters(params, ['.*_proj'], blocks=blocks)
  hook = models.remove_blocks(f'layers_{index}' for index in blocks)
  removed = jax.jit(lambda p: models.apply(BIASED, {'params': p}, TOKENS, hooks=[hook]))(params)
  shallow = MODEL.clone(depth=1, attention_bias=True, mlp_bias=True)
  kept = {name: own for name, own in params.items() if not name.startswith('layers')}
  kept['layers_0'] = params['layers_1']
  assert_close(removed, jax.jit(shallow.apply)({'params': kept}, TOKENS), 1e-6)
  assert_close(removed, _biased_logits(models.destroy_parameters(params, mask)), 1e-5)


def test_tied_embeddings_are_one_leaf_until_they_are_untied():
  model = MODEL.clone(tied=True)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)['params']
  with pytest.raises(ValueError, match="'lm_head' is not there, as the embedding is the head's"):
    models.select_parameters(params, ['lm_head'])
  chosen = models.tuned_parameters(params, ['o_proj'])
  assert chosen['embed_tokens']['embedding'] and 'lm_head' not in chosen
  own = models.untied(params)
  assert models.untied(own) is own
  logits = jax.jit(model.apply)({'params': params}, TOKENS)
  assert_close(jax.jit(model.clone(tied=False).apply)({'params': own}, TOKENS), logits, 1e-6)
  zeroed = models.destroy_parameters(own, models.select_parameters(own, ['lm_head']))
  assert not zeroed['lm_head']['kernel'].any() and zeroed['embed_tokens']['embedding'].any()
  names = {'model.embed_tokens.weight': np.ones((3, 2)), 'model.norm.weight': np.ones(2)}
  assert models.untied(names)['lm_head.weight'] is names['model.embed_tokens.weight']
  assert models.untied(models.untied(names)).keys() == models.untied(names).keys()
  with pytest.raises(ValueError, match='one embedding embed_tokens, got 0'):
    models.untied({'wte.weight': np.ones((3, 2))})


def test_freeze_trains_chosen_types_with_norms_embedding_and_head():
  params = _params(0)

  def trained(*args, **kwargs):
    mask = models.tuned_parameters(params, *args, **kwargs)
    return {path for path, chosen in tree_paths(mask) if chosen}

  always = {path for path, _ in tree_paths(params) if 'norm' in path}
  always |= {'embed_tokens/embedding', 'lm_head/kernel'}
  assert len(always) == 2 * MODEL.depth + 3 and trained() == always
  outputs = {f'layers_{index}/self_attn/o_proj/kernel' for index in range(MODEL.depth)}
  assert trained(['o_proj']) == always | outputs
  assert trained(['o_proj'], blocks=[1]) == always | {'layers_1/self_attn/o_proj/kernel'}
  assert trained(['.*']) == {path for path, _ in tree_paths(params)}
  assert trained(['o_proj'], always=()) == outputs
  with pytest.raises(ValueError, match="No module matches include 'o_prj'"):
    models.tuned_parameters(params, ['o_prj'])
  with pytest.raises(ValueError, match='nothing would be trained'):
    models.tuned_parameters(params, always=())


def test_the_gradient_of_what_is_frozen_is_not_computed():
  params = _params(0)

  def flops(types):
    mask = models.tuned_parameters(params, types)
    optimizer = training.make_optimizer('adamw', 0.1, frozen=models.unselected(mask))

    def step(params, state):
      value, gradients = jax.value_and_grad(lambda p: jnp.mean(jnp.square(_logits(p))))(params)
      updates, state = optimizer.update(gradients, state, params)
      return value, optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step).lower(params, state).compile().cost_analysis()['flops']

  assert flops(['o_proj']) < 0.9 * flops(['.*'])


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


def test_what_is_destroyed_stays_where_it_was():
  mesh = jax.make_mesh((len(jax.devices()),), ('data',))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  here = {'a': jnp.ones((8 * len(jax.devices()), 4), jnp.bfloat16)}
  there = jax.device_put(here, split)
  for key in (None, jax.random.key(1)):
    expected = models.destroy_parameters(here, {'a': True}, key)['a']
    found = models.destroy_parameters(there, {'a': True}, key)['a']
    assert found.sharding == split and found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)


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
