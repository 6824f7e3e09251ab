import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close
from models.random_variables import random_variables, run_capture

from jaxlab.models import alibi_bias, alibi_slopes, create, from_torch, generate, to_torch
from jaxlab.models.bloom import Bloom, BloomBlock
from jaxlab.models.causal_attention import cache_bytes
from jaxlab.models.checkpoint_names import HF_BLOOM, HF_BLOOM_BARE
from jaxlab.models.configurations import from_config

SIZE = {'vocab_size': 19, 'width': 24, 'depth': 2, 'num_heads': 6, 'max_length': 16}
TINY = Bloom(**SIZE)
GROUPED = Bloom(**SIZE, num_kv_heads=2, hidden=20)


def some_tokens(shape=(2, 7)):
  return np.random.default_rng(0).integers(0, 19, shape, np.int32)


def forward(model, variables, tokens, **kwargs):
  return jax.jit(lambda v, t, k: model.apply(v, t, **k))(variables, tokens, kwargs)


def slopes_one_by_one(number):
  """The rule of the paper's code, written out."""
  if number & (number - 1) == 0:
    return [2 ** (-8 * (i + 1) / number) for i in range(number)]
  below = 1
  while 2 * below < number:
    below *= 2
  return slopes_one_by_one(below) + slopes_one_by_one(2 * below)[::2][: number - below]


@pytest.mark.parametrize('number', [1, 2, 3, 6, 8, 12, 32, 40, 112])
def test_slopes_are_the_published_ones_for_every_number_of_heads(number):
  np.testing.assert_allclose(alibi_slopes(number), slopes_one_by_one(number), rtol=1e-12)


def test_linear_biases_fall_with_distance():
  bias = alibi_bias(alibi_slopes(6), jnp.arange(5)[None])
  assert bias.shape == (1, 6, 1, 5)
  distance = np.abs(np.arange(5)[:, None] - np.arange(5))
  causal = np.tril(np.ones((5, 5), bool))
  expected = np.where(causal, -alibi_slopes(6)[:, None, None] * distance, -np.inf)
  scores = np.where(causal, bias[0], -np.inf)
  assert_close(jax.nn.softmax(scores), jax.nn.softmax(expected), 1e-6)


@pytest.mark.parametrize(
  'model, parts',
  tables.few(
    itertools.product((TINY, GROUPED), ((1,) * 7, (4, 3))), (TINY, (4, 3)), (GROUPED, (1,) * 7)
  ),
  ids=str,
)
def test_a_cache_changes_nothing(model, parts):
  tokens = some_tokens()
  variables = random_variables(model, tokens)
  expected = forward(model, variables, tokens)
  step = jax.jit(lambda c, t: model.apply({**variables, 'cache': c}, t, mutable=['cache']))
  cache, logits, start = model.init_cache(2, 9), [], 0
  for part in parts:
    out, state = step(cache, tokens[:, start : start + part])
    cache, start = state['cache'], start + part
    logits.append(out)
  assert_close(np.concatenate(logits, axis=1), expected, 1e-5)


@pytest.mark.parametrize(
  'side, cached',
  tables.few(itertools.product(('left', 'right'), (False, True)), ('left', True), ('right', False)),
)
def test_padding_on_either_side_changes_no_real_token(side, cached):
  tokens = some_tokens((2, 5))
  variables = random_variables(GROUPED, tokens)
  expected = forward(GROUPED, variables, tokens)
  padded, mask = np.full((2, 8), 3, np.int32), np.zeros((2, 8), np.int32)
  real = slice(3, None) if side == 'left' else slice(5)
  padded[:, real], mask[:, real] = tokens, 1
  if cached:
    variables = {**variables, 'cache': GROUPED.init_cache(2)}
    logits = jax.jit(lambda v, t, m: GROUPED.apply(v, t, mask=m, mutable=['cache'])[0])(
      variables, padded, mask
    )
  else:
    logits = forward(GROUPED, variables, padded, mask=mask)
  assert_close(logits[:, real], expected, 1e-5)


def test_later_tokens_and_absolute_positions_have_no_say():
  tokens = some_tokens()
  variables = random_variables(TINY, tokens)
  other = tokens.copy()
  other[:, 4] = (tokens[:, 4] + 1) % 19
  logits, changed = forward(TINY, variables, tokens), forward(TINY, variables, other)
  np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
  assert (np.abs(logits - changed)[:, 4:].max(axis=-1) > 1e-3).all()


def test_grouped_heads_are_repeated_ones():
  tokens = some_tokens()
  variables = random_variables(GROUPED, tokens)
  full = Bloom(**SIZE, hidden=20)

  def repeat(path, leaf):
    if path[-2].key != 'query_key_value':
      return leaf
    parts = leaf.reshape(*leaf.shape[:-1], 2, 5, 4)
    queries, others = parts[..., :3, :], parts[..., 3:, :]
    others = np.repeat(others[..., None, :, :], 3, axis=-3)
    return np.concatenate([queries[..., None, :], others], axis=-2).reshape(*leaf.shape[:-1], 72)

  repeated = jax.tree_util.tree_map_with_path(repeat, variables)
  assert_close(forward(GROUPED, variables, tokens), forward(full, repeated, tokens), 1e-5)
  assert cache_bytes(full.init_cache(2)) == 3 * cache_bytes(GROUPED.init_cache(2))


@pytest.mark.parametrize('model', tables.first([GROUPED, TINY]), ids=['grouped', 'multi-head'])
def test_generation_is_the_argmax_of_the_full_forward(model):
  tokens = some_tokens((2, 4))
  variables = jax.tree.map(lambda a: 3 * a, random_variables(model, tokens))
  found = generate(model, variables, tokens, max_new_tokens=8)
  run, full = jax.jit(model.apply), np.zeros((2, 12), np.int32)
  full[:, :4] = tokens
  for end in range(4, 12):
    full[:, end] = np.argmax(run(variables, full)[:, end - 1], axis=-1)
  np.testing.assert_array_equal(found, full[:, 4:])
  assert len(np.unique(found)) > 2


def test_hook_points_and_a_block_alone():
  tokens = some_tokens()
  variables = random_variables(GROUPED, tokens)
  points = [f'h_1/self_attention/{name}' for name in ('query', 'key', 'value', 'softmax')]
  _, captured = run_capture(GROUPED, variables, ['h_0', 'h_1', 'h_1/mlp/gelu', *points], tokens)
  assert captured[points[0]].shape == (2, 7, 6, 4)
  assert captured[points[1]].shape == captured[points[2]].shape == (2, 7, 2, 4)
  block = BloomBlock(num_heads=6, num_kv_heads=2, hidden=20)
  out = jax.jit(block.apply)({'params': variables['params']['h_1']}, captured['h_0'])
  assert_close(out, captured['h_1'], 1e-5)


@pytest.mark.exhaustive
def test_bfloat16_and_remat_agree_with_plain_float32():
  tokens, model = some_tokens(), TINY.clone(depth=1)
  variables = random_variables(model, tokens)
  half = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  assert (
    jax.eval_shape(half.init, jax.random.key(0), tokens)['params']['h_0']['mlp']['dense_h_to_4h'][
      'kernel'
    ].dtype
    == jnp.bfloat16
  )
  assert_close(forward(half, variables, tokens), forward(model, variables, tokens), 0.05)

  def gradient(model):
    return jax.jit(jax.grad(lambda v: jnp.sum(jnp.tanh(model.apply(v, tokens)))))(variables)

  jax.tree.map(
    lambda a, b: assert_close(a, b, 1e-5, 1e-6), gradient(model.clone(remat=True)), gradient(model)
  )


@pytest.mark.parametrize(
  'model, renames, name, shape',
  [
    (TINY, HF_BLOOM, 'transformer.h.0.self_attention.query_key_value.weight', (72, 24)),
    (TINY, HF_BLOOM_BARE, 'word_embeddings_layernorm.bias', (24,)),
    (GROUPED.clone(tied=False), HF_BLOOM, 'lm_head.weight', (19, 24)),
  ],
)
def test_checkpoints_make_the_round_trip(model, renames, name, shape):
  variables = random_variables(model, some_tokens())
  state_dict = to_torch(variables, renames=renames)
  assert state_dict[name].shape == shape
  if model.tied:
    embedding = next(a for n, a in state_dict.items() if n.endswith('word_embeddings.weight'))
    state_dict['lm_head.weight'] = embedding
  back = from_torch(model, state_dict)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_configurations_of_transformers_are_read():
  config = {
    'model_type': 'bloom', 'n_embed': 32, 'num_attention_heads': 4, 'n_layer': 3, 'seq_length': 64,
    'vocab_size': 50, 'layer_norm_epsilon': 1e-6, 'hidden_dropout': 0.1,
  }  # fmt: skip
  expected = Bloom(50, 32, 3, 4, max_length=64, epsilon=1e-6)
  assert from_config(json.dumps(config)) == expected
  renamed = {'hidden_size': 32, 'n_head': 4, 'num_hidden_layers': 3}
  assert from_config({**renamed, **{k: v for k, v in config.items() if k != 'n_embed'}}) == expected
  with pytest.raises(ValueError, match='apply_residual_connection_post_layernorm=True'):
    from_config({'n_embed': 8, 'apply_residual_connection_post_layernorm': True})


def test_published_sizes_have_their_number_of_parameters():
  for name, millions in (('bloom_560m', 559), ('bloom_7b1', 7069)):
    shapes = jax.eval_shape(
      create(name).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) // 10**6 == millions


def test_what_does_not_fit_raises():
  with pytest.raises(ValueError, match='width=10 is not divisible by num_heads=4'):
    Bloom(width=10, num_heads=4)
  with pytest.raises(ValueError, match='not a multiple of num_kv_heads=4'):
    Bloom(**SIZE, num_kv_heads=4)
  with pytest.raises(ValueError, match='num_heads=0'):
    alibi_slopes(0)
  variables = random_variables(TINY, some_tokens())
  with pytest.raises(ValueError, match='Bloom reads integer tokens'):
    TINY.apply(variables, np.zeros((2, 3), np.float32))
  wrong = {**variables, 'cache': GROUPED.init_cache(2, 8)}
  with pytest.raises(ValueError, match='the cache holds 2 heads of 4 channels, and 6 of 4'):
    TINY.apply(wrong, some_tokens(), mutable=['cache'])
