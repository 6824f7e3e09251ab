import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from models.random_variables import random_variables, run_capture
from rule_weights import rule_tensor

from jaxlab.models import apply, create, from_torch, module_paths, to_torch
from jaxlab.models.causal_attention import cache_bytes
from jaxlab.models.checkpoint_names import EMBEDDINGS, HF_GPT2, HF_GPT2_BARE, HF_LLAMA
from jaxlab.models.configurations import from_config
from jaxlab.models.gpt2 import GPT2, GPT2Block
from jaxlab.models.intercept import Hook
from jaxlab.models.llama import Llama, LlamaBlock
from jaxlab.models.rotary import RotaryScaling, rotary_embedding
from jaxlab.parallel import batch_sharding, make_mesh

SIZE = {'vocab_size': 19, 'width': 16, 'depth': 2, 'num_heads': 4, 'max_length': 16}
TINY_GPT2 = GPT2(**SIZE)
TINY_LLAMA = Llama(**SIZE, num_kv_heads=2, hidden=24)
both = pytest.mark.parametrize('model', [TINY_GPT2, TINY_LLAMA], ids=['gpt2', 'llama'])


def some_tokens(shape=(2, 7), seed=0, vocab_size=19):
  return np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)


def forward(model, variables, tokens, **kwargs):
  return jax.jit(lambda v, t, k: model.apply(v, t, **k))(variables, tokens, kwargs)


def check_decoder(vectors, embeddings, block, norm):
  names = vectors['checkpoint_names'].tolist()
  shapes = [tuple(json.loads(shape)) for shape in vectors['checkpoint_shapes'].tolist()]
  state_dict = {name: rule_tensor(name, shape) for name, shape in zip(names, shapes, strict=True)}
  model = from_config(vectors['config_json'].item())
  if model.tied:
    embedding = next(name for name in EMBEDDINGS if name in state_dict)
    state_dict[embedding] = state_dict['lm_head.weight']
  variables = from_torch(model, state_dict)
  patterns = [embeddings, *(block.format(index) for index in range(model.depth - 1)), norm]
  logits, captured = run_capture(model, variables, patterns, vectors['in_input_ids'])
  hidden = [(captured[name], vectors[f'out_hidden_{i}']) for i, name in enumerate(patterns)]
  assert f'out_hidden_{len(hidden)}' not in vectors
  for actual, expected in ((logits, vectors['out_logits']), *hidden):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@golden('models', 'hf_gpt2')
def test_gpt2_agrees_with_transformers(vectors):
  check_decoder(vectors, 'embeddings', 'h_{}', 'ln_f')


@golden('models', 'hf_llama')
def test_llama_agrees_with_transformers(vectors):
  check_decoder(vectors, 'embed_tokens', 'layers_{}', 'norm')


def test_tied_decoders_of_every_family_are_read_from_a_file():
  for model, renames, config, paths in (
    (TINY_GPT2, HF_GPT2, {'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 16},
     ('embeddings', 'h_{}', 'ln_f')),
    (TINY_LLAMA, HF_LLAMA, {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4,
                            'num_key_value_heads': 2, 'intermediate_size': 24},
     ('embed_tokens', 'layers_{}', 'norm')),
  ):  # fmt: skip
    model, tokens = model.clone(tied=True), some_tokens()
    state_dict = to_torch(random_variables(model, tokens), renames=renames)
    embedding = next(name for name in state_dict if name in EMBEDDINGS)
    state_dict = {name: rule_tensor(name, array.shape) for name, array in state_dict.items()}
    state_dict['lm_head.weight'] = rule_tensor('lm_head.weight', state_dict[embedding].shape)
    vectors = {
      'checkpoint_names': np.array(list(state_dict)),
      'checkpoint_shapes': np.array([json.dumps(a.shape) for a in state_dict.values()]),
      'config_json': np.array(
        json.dumps({**config, 'vocab_size': 19, 'tie_word_embeddings': True})
      ),
      'in_input_ids': tokens,
    }
    variables = from_torch(model, {**state_dict, embedding: state_dict['lm_head.weight']})
    patterns = [paths[0], paths[1].format(0), paths[2]]
    vectors['out_logits'], hidden = run_capture(model, variables, patterns, tokens)
    vectors |= {f'out_hidden_{i}': hidden[name] for i, name in enumerate(patterns)}
    check_decoder(vectors, *paths)


@both
def test_logits_depend_on_earlier_tokens_alone(model):
  tokens = some_tokens()
  variables = random_variables(model, tokens)
  other = tokens.copy()
  other[:, 4] = (tokens[:, 4] + 1) % 19
  logits, changed = forward(model, variables, tokens), forward(model, variables, other)
  np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
  assert (np.abs(logits - changed)[:, 4:].max(axis=-1) > 1e-3).all()


@both
@pytest.mark.parametrize('parts', [(1,) * 7, (4, 3)], ids=str)
def test_a_cache_changes_nothing(model, parts):
  tokens = some_tokens()
  variables = random_variables(model, tokens)
  expected = forward(model, variables, tokens)

  @jax.jit
  def step(cache, tokens):
    return model.apply({**variables, 'cache': cache}, tokens, mutable=['cache'])

  cache, logits, start = model.init_cache(2, 9), [], 0
  for part in parts:
    out, state = step(cache, tokens[:, start : start + part])
    cache, start = state['cache'], start + part
    logits.append(out)
  assert cache['slot'] == 7 and cache['mask'].sum(axis=1).tolist() == [7, 7]
  assert_close(np.concatenate(logits, axis=1), expected, 1e-5)


@both
@pytest.mark.parametrize(
  'side, cached',
  tables.few([('left', False), ('right', False), ('left', True)], ('right', False), ('left', True)),
)
def test_padding_on_either_side_changes_no_real_token(model, side, cached):
  tokens = some_tokens((2, 5))
  variables = random_variables(model, tokens)
  expected = forward(model, variables, tokens)
  padded, mask = np.full((2, 8), 3, np.int32), np.zeros((2, 8), np.int32)
  real = slice(3, None) if side == 'left' else slice(5)
  padded[:, real], mask[:, real] = tokens, 1
  if cached:
    variables = {**variables, 'cache': model.init_cache(2)}
    logits = jax.jit(lambda v, t, m: model.apply(v, t, mask=m, mutable=['cache'])[0])(
      variables, padded, mask
    )
  else:
    logits = forward(model, variables, padded, mask=mask)
  assert np.isfinite(logits).all()
  assert_close(logits[:, real], expected, 1e-5)


def test_gradients_are_finite_where_a_query_sees_padding_only():
  tokens = some_tokens()
  mask = np.array([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
  variables = random_variables(TINY_LLAMA, tokens)
  gradient = jax.jit(jax.grad(lambda v: jnp.sum(TINY_LLAMA.apply(v, tokens, mask=mask) ** 2)))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(variables)))


def test_grouped_query_attention_is_multi_head_attention_with_repeated_heads():
  tokens = some_tokens()
  variables = random_variables(TINY_LLAMA, tokens)
  full = Llama(**SIZE, hidden=24)

  def repeat(path, kernel):
    if path[-2].key not in ('k_proj', 'v_proj'):
      return kernel
    return kernel.reshape(16, 2, 1, 4).repeat(2, axis=2).reshape(16, 16)

  repeated = jax.tree_util.tree_map_with_path(repeat, variables)
  expected = forward(full, repeated, tokens)
  assert_close(forward(TINY_LLAMA, variables, tokens), expected, 1e-5)
  assert cache_bytes(full.init_cache(2)) == 2 * cache_bytes(TINY_LLAMA.init_cache(2))
  assert cache_bytes(full.init_cache(2, 5)) == 2 * 2 * (2 * 5 * 16) * 4  # depth, k and v, float32


@pytest.mark.parametrize('model', tables.first([TINY_GPT2, TINY_LLAMA]), ids=['gpt2', 'llama'])
def test_bfloat16_and_remat_agree_with_plain_float32(model):
  tokens, model = some_tokens(), model.clone(depth=1)
  variables = random_variables(model, tokens)
  expected = forward(model, variables, tokens)
  half = forward(model.clone(dtype=jnp.bfloat16), variables, tokens)
  assert half.dtype == jnp.bfloat16
  assert_close(half, expected, 0.05)
  cache = model.clone(dtype=jnp.bfloat16).init_cache(2)
  assert jax.tree.leaves(cache)[0].dtype == jnp.bfloat16

  def gradient(model):
    return jax.jit(jax.grad(lambda v: jnp.sum(jnp.tanh(model.apply(v, tokens)))))(variables)

  plain, remat = gradient(model), gradient(model.clone(remat=True))
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-6), remat, plain)


@pytest.mark.exhaustive
def test_eager_application_agrees_with_the_compiled_one():
  tokens, model = some_tokens(), TINY_LLAMA.clone(depth=1)
  variables = random_variables(model, tokens)
  assert_close(model.apply(variables, tokens), forward(model, variables, tokens), 1e-5)


@pytest.mark.exhaustive
@both
def test_eight_devices_compute_what_one_does(model):
  tokens = some_tokens((8, 7))
  variables = random_variables(model, tokens)
  sharding = batch_sharding(make_mesh())
  logits = forward(model, variables, jax.device_put(tokens, sharding))
  assert len(logits.sharding.device_set) == 8
  assert_close(logits, forward(model, variables, tokens), 1e-6)


@pytest.mark.parametrize(
  'model, block, attention, extra',
  [
    (TINY_GPT2, 'h_1', 'attn', ['embeddings', 'h_0/mlp/gelu']),
    (TINY_LLAMA, 'layers_1', 'self_attn', ['layers_0/mlp/silu', 'lm_head']),
  ],
  ids=['gpt2', 'llama'],
)
def test_operands_have_paths_and_hooks_reach_them(model, block, attention, extra):
  tokens = some_tokens()
  points = [f'{block}/{attention}/{name}' for name in ('query', 'key', 'value', 'softmax')]
  assert {*points, *extra} <= set(module_paths(model, tokens))
  variables = random_variables(model, tokens)
  _, captured = run_capture(model, variables, points, tokens)
  query, key, value, softmax = (captured[point] for point in points)
  assert query.shape == (2, 7, 4, 4)
  assert key.shape == value.shape == (2, 7, 4 if block == 'h_1' else 2, 4)
  # Operands are those of the product: unscaled queries, and keys behind the rotation.
  key = np.repeat(key, 4 // key.shape[2], axis=2)
  scores = np.einsum('bqhd,bkhd->bhqk', query, key) / 2
  scores = np.where(np.tril(np.ones((7, 7), bool)), scores, -np.inf)
  assert_close(softmax, jax.nn.softmax(scores), 1e-5)
  # The cache holds what the hooks made of keys and values.
  hooks = [Hook('.*/value', output=lambda site, y: jnp.zeros_like(y))]
  cached = {**variables, 'cache': model.init_cache(2)}
  _, state = jax.jit(lambda v: apply(model, v, tokens, hooks=hooks, mutable=['cache']))(cached)
  assert not state['cache'][block][attention]['cached_value'].any()


@pytest.mark.parametrize(
  'model, block, path',
  [
    (TINY_GPT2, GPT2Block(num_heads=4, hidden=64), 'h_1'),
    (TINY_LLAMA, LlamaBlock(num_heads=4, num_kv_heads=2, head_width=4, hidden=24), 'layers_1'),
  ],
  ids=['gpt2', 'llama'],
)
def test_a_block_alone_is_the_block_in_the_model(model, block, path):
  tokens = some_tokens()
  variables = random_variables(model, tokens)
  before = path.replace('1', '0')
  _, captured = run_capture(model, variables, [before, path], tokens)
  out = jax.jit(block.apply)({'params': variables['params'][path]}, captured[before])
  assert_close(out, captured[path], 1e-5)


def test_dropout_is_random_in_training_alone():
  tokens = some_tokens()
  model = TINY_GPT2.clone(dropout=0.5)
  variables = random_variables(TINY_GPT2, tokens)

  @jax.jit
  def train(seed):
    return model.apply(variables, tokens, True, rngs={'dropout': jax.random.key(seed)})

  np.testing.assert_array_equal(
    forward(model, variables, tokens), forward(TINY_GPT2, variables, tokens)
  )
  np.testing.assert_array_equal(train(1), train(1))
  assert (train(1) != train(2)).any()


def test_initial_weights_have_the_published_deviations():
  model = GPT2(vocab_size=64, max_length=64, width=64, depth=2, num_heads=2)
  params = jax.jit(model.init)(jax.random.key(0), some_tokens())['params']
  assert_close(np.std(params['h_1']['mlp']['c_fc']['kernel']), 0.02, 0.05)
  assert_close(np.std(params['h_1']['mlp']['c_proj']['kernel']), 0.02 / 2, 0.05)
  assert_close(np.std(params['wpe']['embedding']), 0.02, 0.05)


def test_rotary_products_depend_on_distances_alone():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, y = jnp.asarray(rng.standard_normal((2, 1, 5, 1, 8)))
    positions = jnp.array([[0, 1, 5, 6, 100]])

    def products(shift):
      a = rotary_embedding(x, positions + shift, 100.0)
      return jnp.einsum('bqhd,bkhd->qk', a, rotary_embedding(y, positions + shift, 100.0))

    assert_close(products(37), products(0), 1e-12)
    turned = rotary_embedding(x, positions, 100.0)
    assert turned.dtype == jnp.float64
    assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), 1e-12)
    # The first pair of channels, 0 and 4, turns by one radian a position.
    expected = x[0, 2, 0, 0] * np.cos(5) - x[0, 2, 0, 4] * np.sin(5)
    assert_close(turned[0, 2, 0, 0], expected, 1e-12)


@pytest.mark.parametrize(
  'model, renames, name',
  [
    (TINY_GPT2, HF_GPT2, 'transformer.h.0.attn.c_attn.weight'),
    (TINY_GPT2.clone(tied=False), HF_GPT2_BARE, 'h.1.ln_2.bias'),
    (TINY_LLAMA, HF_LLAMA, 'model.layers.1.self_attn.k_proj.weight'),
    (
      TINY_LLAMA.clone(tied=True, attention_bias=True, mlp_bias=True),
      HF_LLAMA,
      'model.layers.0.mlp.down_proj.bias',
    ),
    (TINY_LLAMA.clone(attention_bias='qkv'), HF_LLAMA, 'model.layers.0.self_attn.q_proj.bias'),
  ],
)
def test_checkpoints_make_the_round_trip(model, renames, name):
  variables = random_variables(model, some_tokens())
  state_dict = to_torch(variables, renames=renames)
  assert name in state_dict
  if name.endswith('c_attn.weight'):
    assert state_dict[name].shape == (16, 48)
  if name.endswith('k_proj.weight'):
    assert state_dict[name].shape == (8, 16)
  buffers = {
    HF_GPT2: 'transformer.h.0.attn.bias',
    HF_GPT2_BARE: 'h.1.attn.masked_bias',
    HF_LLAMA: 'model.layers.0.self_attn.rotary_emb.inv_freq',
  }
  back = from_torch(model, {**state_dict, buffers[renames]: np.zeros(3)})
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_tied_head_must_repeat_the_embedding():
  state_dict = to_torch(random_variables(TINY_GPT2, some_tokens()), renames=HF_GPT2)
  embedding = state_dict['transformer.wte.weight']
  variables = from_torch(TINY_GPT2, {**state_dict, 'lm_head.weight': embedding})
  np.testing.assert_array_equal(variables['params']['wte']['embedding'], embedding)
  with pytest.raises(ValueError, match=r'lm_head.weight differs .* tied=False'):
    from_torch(TINY_GPT2, {**state_dict, 'lm_head.weight': embedding + 1})


def test_configurations_of_transformers_are_read(tmp_path):
  config = {
    'model_type': 'llama',
    'hidden_size': 32,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 10,
    'rms_norm_eps': 1e-5,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5},
    'bos_token_id': 1,
  }
  (tmp_path / 'config.json').write_text(json.dumps(config))
  model = from_config(tmp_path / 'config.json', depth=3)
  assert model == from_config(config, depth=3) == from_config(json.dumps(config), depth=3)
  assert (model.width, model.head_width, model.num_kv_heads, model.depth) == (32, 10, 2, 3)
  assert (model.rope_theta, model.epsilon, model.tied) == (5e5, 1e-5, False)
  assert from_config({'hidden_size': 32, 'num_attention_heads': 4, 'rope_theta': 3}).rope_theta == 3
  model = from_config({'n_embd': 32, 'n_head': 4, 'activation_function': 'gelu', 'n_inner': 40})
  assert (model.tied, model.activation, model.hidden, model.vocab_size) == (True, 'gelu', 40, 50257)
  config = {'model_type': 'qwen2', 'rope_theta': 1e6, 'num_key_value_heads': 4, 'attention_bias': 1}
  model = from_config({**config, 'tie_word_embeddings': True})
  assert model == Llama(
    151936, hidden=22016, num_kv_heads=4, max_length=32768, rope_theta=1e6, tied=True,
    attention_bias='qkv',
  )  # fmt: skip


def test_scaled_rotary_positions_are_those_of_llama_3_1():
  rope = {
    'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0, 'low_freq_factor': 1.0,
    'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192,
  }  # fmt: skip
  sizes = {'hidden_size': 4096, 'num_key_value_heads': 8, 'intermediate_size': 14336}
  sizes |= {'vocab_size': 128256, 'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5}
  model = from_config({**sizes, 'rope_parameters': rope})
  assert model == create('llama3_1_8b') == create('llama3_8b', max_length=131072, rope_scaling={})
  old = {'rope_theta': rope['rope_theta'], 'rope_scaling': {**rope, 'factor': 32.0, 'length': 3}}
  assert from_config({**sizes, **old}).rope_scaling == RotaryScaling(factor=32.0)

  # By wavelengths, in float64: short ones are kept, long ones 8 times as long, and between 8192 / 4 and 8192
  # positions frequencies go over from one to the other in the number of their turns.
  frequencies = 5e5 ** (-np.arange(64) / 64)
  expected = []
  for own in frequencies:
    length = 2 * np.pi / own
    smooth = (8192 / length - 1) / 3
    between = (1 - smooth) * own / 8 + smooth * own
    expected.append(own if length < 2048 else own / 8 if length > 8192 else between)
  scaling = model.rope_scaling
  np.testing.assert_allclose(scaling(frequencies.astype(np.float32)), expected, rtol=1e-5)
  kinds = [frequencies == expected, frequencies / 8 == expected]
  assert all(kind.any() for kind in (*kinds, ~(kinds[0] | kinds[1])))

  # The rotation is by these angles, of queries and keys alike, and a network without scaling differs.
  x = jnp.zeros((1, 7, 1, 128)).at[..., :64].set(1)
  turned = rotary_embedding(x, jnp.arange(1000, 1007)[None], 5e5, scaling)[0, :, 0]
  angles = np.arange(1000, 1007)[:, None] * np.asarray(expected)
  np.testing.assert_allclose(turned, np.hstack([np.cos(angles), np.sin(angles)]), atol=2e-4)
  tokens = some_tokens()
  scaled = TINY_LLAMA.clone(rope_scaling={'length': 2, 'low': 0.01, 'high': 0.02})
  variables = random_variables(TINY_LLAMA, tokens)
  networks = TINY_LLAMA, scaled, scaled.clone(remat=True)
  outputs = [jax.jit(own.apply)(variables, tokens) for own in networks]
  assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
  np.testing.assert_allclose(outputs[1], outputs[2], atol=1e-5)
  # Keys that are rotated when they are read end at the same place.
  late = jax.jit(scaled.clone(cache_rotated=False).apply)(variables, tokens)
  np.testing.assert_allclose(outputs[1], late, atol=1e-5)


@pytest.mark.parametrize(
  'scaling, message',
  [
    ({'factor': 0.5}, 'factor=0.5: expected a number of at least 1'),
    ({'low': 4.0}, 'expected 0 < low < high, got 4.0 and 4.0'),
    ({'length': 0}, 'length=0'),
    ({'rope_type': 'llama3'}, 'rope_scaling has rope_type; expected some of factor, low'),
  ],
)
def test_scalings_that_cannot_be_raise(scaling, message):
  with pytest.raises(ValueError, match=message):
    create('llama', rope_scaling=scaling)


@pytest.mark.parametrize(
  'config, message',
  [
    (
      {'model_type': 'mamba'},
      "knows the model types 'gpt2', 'bloom', 'llama', 'qwen2', .*; got 'mamba'",
    ),
    ({'vocab_size': 3}, r'got None \(entries: vocab_size\)'),
    ({'n_embd': 8, 'activation_function': 'relu'}, "activation_function='relu'"),
    ({'n_embd': 8, 'scale_attn_weights': False}, 'scale_attn_weights=False is not supported'),
    ({'hidden_size': 8, 'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
    ({'model_type': 'qwen2', 'use_sliding_window': True}, 'use_sliding_window=True is not'),
    ({'hidden_size': 8, 'rope_scaling': {'rope_type': 'yarn'}}, "scaled by 'yarn'"),
    (
      {'hidden_size': 8, 'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
      "scaled by 'llama3' lack low_freq_factor, high_freq_factor",
    ),
  ],
)
def test_configurations_that_are_not_supported_raise(config, message):
  with pytest.raises(ValueError, match=message):
    from_config(config)


@pytest.mark.parametrize(
  'name, millions',
  tables.some(
    [
      ('gpt2', 124),
      ('gpt2_medium', 354),
      ('llama', 6738),
      ('llama3_8b', 8030),
      ('llama3_1_8b', 8030),
      ('llama3_3_70b', 70553),
      ('qwen2_5_0_5b', 494),
      ('llama2_13b', 13015),
      ('qwen2_5_7b', 7615),
      ('qwen2_5_1_5b', 1543),
      ('qwen2_5_14b', 14770),
      ('qwen2_5_32b', 32763),
    ],
    2,
  ),
)
def test_published_sizes_have_their_number_of_parameters(name, millions):
  model = create(name)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) // 10**6 == millions


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: GPT2(width=10, num_heads=4), 'width=10 is not divisible by num_heads=4'),
    (lambda: GPT2(activation='relu'), "activation='relu'; choose"),
    (lambda: GPT2(dropout=1.0), r'dropout=1.0 is not in \[0, 1\)'),
    (lambda: Llama(width=10, num_heads=4), 'give head_width'),
    (lambda: Llama(num_heads=4, num_kv_heads=3), 'not a multiple of num_kv_heads=3'),
    (lambda: Llama(width=12, num_heads=4), 'a head of 3 channels'),
    (lambda: Llama(attention_bias='kv'), "attention_bias='kv'; choose"),
    (lambda: create('gpt2', widht=3), "GPT2 has no field 'widht'"),
    (lambda: create('lama'), 'closest: llama'),
    (lambda: TINY_GPT2.init_cache(1, 17), 'exceeds max_length=16'),
    (lambda: rotary_embedding(jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 1))), 'width 3 is odd'),
  ],
)
def test_wrong_sizes_raise(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_biases_of_queries_keys_and_values_alone_are_those_of_all_without_the_outputs():
  tokens = some_tokens()
  model = TINY_LLAMA.clone(attention_bias='qkv')
  variables = random_variables(model, tokens)
  attention = variables['params']['layers_0']['self_attn']
  own = {name for name in attention if 'bias' in attention[name]}
  assert own == {'q_proj', 'k_proj', 'v_proj'}
  full = jax.tree.map(lambda x: x, variables)
  for index in range(2):
    full['params'][f'layers_{index}']['self_attn']['o_proj']['bias'] = np.zeros(16, np.float32)
  expected = forward(model.clone(attention_bias=True), full, tokens)
  np.testing.assert_array_equal(forward(model, variables, tokens), expected)
  assert np.abs(expected - forward(TINY_LLAMA, without_biases(variables), tokens)).max() > 1e-3


def without_biases(variables):
  """The variables of a decoder without biases."""
  params = jax.tree.map(lambda x: x, variables['params'])
  for index in range(2):
    for layer in params[f'layers_{index}']['self_attn'].values():
      layer.pop('bias', None)
  return {'params': params}


def test_wrong_tokens_masks_and_caches_raise():
  variables = random_variables(TINY_GPT2, some_tokens())
  for tokens, mask, message in (
    (np.zeros((2, 3), np.float32), None, r'reads integer tokens \[batch, time\]; got float32'),
    (np.zeros(3, np.int32), None, r'got int32 \(3,\)'),
    (np.zeros((1, 17), np.int32), None, '17 tokens, but max_length=16'),
    (np.zeros((2, 3), np.int32), np.ones((2, 4)), r'mask \(2, 4\) must have the shape of tokens'),
  ):
    with pytest.raises(ValueError, match=message):
      TINY_GPT2.apply(variables, tokens, mask=mask)
  cached = {**variables, 'cache': TINY_GPT2.init_cache(2, 4)}
  with pytest.raises(ValueError, match=r"mutable=\['cache'\]"):
    TINY_GPT2.apply(cached, some_tokens((2, 3)))
  for shape in ((3, 3), (2, 5)):
    with pytest.raises(ValueError, match=r'do not fit the cache of \(2, 4\)'):
      TINY_GPT2.apply(cached, some_tokens(shape), mutable=['cache'])
