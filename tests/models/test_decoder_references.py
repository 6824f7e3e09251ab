"""Llama and BLOOM against transformers' outputs and gradients, in float32 and float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import Vectors, assert_close, golden

from jaxlab.models import alibi_bias, alibi_slopes, capture, from_torch
from jaxlab.models.bloom import Bloom
from jaxlab.models.llama import Llama
from jaxlab.models.rotary import rotary_embedding

both_precisions = pytest.mark.parametrize('dtype', ['float32', 'float64'])


def torch_names(vectors, pattern):
  """The parameters of a file by their names in a checkpoint."""
  own = {n: a for n, a in vectors.tree('param_').items() if n.endswith(('_weight', '_bias'))}
  return {
    re.sub(
      pattern,
      lambda match: '.'.join(group for group in match.groups() if group),
      name,
    ): array
    for name, array in own.items()
  }


LLAMA_NAME = (
  r'(model|lm_head)_(?:(layers|embed_tokens|norm)_)?(?:(\d+)_)?(?:(self_attn|mlp)_)?'
  r'(?:(\w+_proj|\w+_layernorm)_)?(weight|bias)'
)
BLOOM_NAME = (
  r'(transformer)_(word_embeddings_layernorm|word_embeddings|ln_f|h)_(?:(\d+)_)?'
  r'(?:(self_attention|mlp)_)?(?:(\w+)_)?(weight|bias)'
)


def depth_of(names):
  return 1 + max(int(found[1]) for n in names if (found := re.search(r'\.(\d+)\.', n)))


def check_forward(vectors, model, variables, paths, attention):
  """Compares logits, hidden states and attention, all at 1e-5 of the largest entry."""
  tokens = vectors['in_input_ids'].astype(np.int32)
  mask = vectors.get('in_attention_mask')
  patterns = [*paths, f'{attention}/softmax']
  run = jax.jit(lambda v: capture(model, v, patterns, tokens, mask=mask))
  logits, captured = run(variables)
  assert_close(logits, vectors['out_logits'], 1e-5)
  assert_close(captured[patterns[-1]], vectors['out_attention_probs_layer0'], 1e-5)
  assert f'out_hidden_{len(paths)}' not in vectors
  for index, path in enumerate(paths):
    assert_close(captured[path], vectors[f'out_hidden_{index}'], 1e-5)


def cast(tree, dtype):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def llama_of(vectors, names, dtype):
  vocab_size, width = names['model.embed_tokens.weight'].shape
  num_heads = vectors.param('num_heads')
  return Llama(
    vocab_size,
    width,
    depth_of(names),
    num_heads,
    vectors.param('num_kv_heads') if 'param_num_kv_heads' in vectors else None,
    hidden=len(names['model.layers.0.mlp.up_proj.weight']),
    head_width=len(names['model.layers.0.self_attn.q_proj.weight']) // num_heads,
    tied='lm_head.weight' not in names,
    rope_theta=vectors.param('rope_theta'),
    epsilon=vectors.param('rms_norm_eps'),
    dtype=jnp.dtype(dtype),
  )


def test_heads_of_another_width_and_a_tied_head_are_told_by_the_file(tmp_path):
  shapes = {'model_embed_tokens': (7, 24), 'model_layers_0_mlp_up_proj': (40, 24)}
  shapes |= {'model_layers_0_self_attn_q_proj': (32, 24)}
  arrays = {f'param_{name}_weight': np.zeros(shape) for name, shape in shapes.items()}
  scalars = {'num_heads': 4, 'num_kv_heads': 2, 'rope_theta': 1e4, 'rms_norm_eps': 1e-5}
  np.savez(tmp_path / 'a.npz', **arrays, **{f'param_{name}': own for name, own in scalars.items()})
  vectors = Vectors(tmp_path / 'a.npz')
  model = llama_of(vectors, torch_names(vectors, LLAMA_NAME), 'float32')
  assert (model.head_width, model.tied, model.depth) == (8, True, 1)


@golden('kv_heads', 'llama')
@both_precisions
def test_llama_agrees_with_transformers_forward_and_backward(vectors, dtype):
  with jax.enable_x64(dtype == 'float64'):
    names = torch_names(vectors, LLAMA_NAME)
    model = llama_of(vectors, names, dtype)
    variables = cast(from_torch(model, names), dtype)
    blocks = [f'layers_{index}' for index in range(model.depth)]
    attention = 'layers_0/self_attn'
    check_forward(vectors, model, variables, ['embed_tokens', *blocks[:-1], 'norm'], attention)

    tokens = vectors['in_input_ids'].astype(np.int32)

    def loss(params):
      logits = model.apply({'params': params}, tokens)[:, :-1]
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables['params'])
    assert_close(value, vectors['out_loss_next_token'], 1e-5)
    for name in ('o_proj', 'k_proj'):
      own = gradient['layers_0']['self_attn'][name]['kernel']
      assert_close(own.T, vectors[f'grad_layer0_{name}'], 1e-5)

    # Channels of ones, the first or the second half, show the tables.
    cos, sin = vectors['out_rope_cos'], vectors['out_rope_sin']
    x = jnp.zeros((1, len(cos), 1, cos.shape[1]), dtype).at[..., : cos.shape[1] // 2].set(1)
    turned = rotary_embedding(x, jnp.arange(len(cos))[None], model.rope_theta)[0, :, 0]
    half = cos.shape[1] // 2
    assert_close(turned, np.hstack([cos[:, :half], sin[:, half:]]), 1e-5)


@golden('kv_heads', 'bloom_alibi')
@both_precisions
def test_bloom_agrees_with_transformers(vectors, dtype):
  with jax.enable_x64(dtype == 'float64'):
    names = torch_names(vectors, BLOOM_NAME)
    vocab_size, width = names['transformer.word_embeddings.weight'].shape
    model = Bloom(
      vocab_size,
      width,
      depth_of(names),
      vectors.param('num_heads'),
      hidden=len(names['transformer.h.0.mlp.dense_h_to_4h.weight']),
      epsilon=vectors.param('layer_norm_eps'),
      dtype=jnp.dtype(dtype),
    )
    variables = cast(from_torch(model, names), dtype)
    blocks = [f'h_{index}' for index in range(model.depth)]
    paths = ['word_embeddings_layernorm', *blocks[:-1], 'ln_f']
    check_forward(vectors, model, variables, paths, 'h_0/self_attention')
    positions = jnp.arange(vectors['in_input_ids'].shape[1])[None]
    bias = alibi_bias(alibi_slopes(model.num_heads), positions, jnp.dtype(dtype))
    assert_close(bias[0, :, 0], vectors['out_alibi'], 1e-6)
