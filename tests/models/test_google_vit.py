import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab import models

FIELDS = {'patch_size': 4, 'image_size': 8, 'width': 12, 'depth': 2, 'num_heads': 3}


def released(params, heads=3):
  """Returns the arrays of the original release, whose names and layouts are Flax's own."""
  arrays = {
    'cls': params['cls_token'],
    'Transformer/posembed_input/pos_embedding': params['pos_embed'],
    'embedding/kernel': params['patch_embed']['proj']['kernel'],
    'embedding/bias': params['patch_embed']['proj']['bias'],
    'pre_logits/kernel': np.ones((12, 12)),
    'head/kernel': params['head']['kernel'],
    'head/bias': params['head']['bias'],
  }

  def put(name, tree):
    arrays.update({f'{name}/{kind}': leaf for kind, leaf in tree.items()})

  put('Transformer/encoder_norm', params['norm'])
  for index in range(2):
    own, name = params[f'blocks_{index}'], f'Transformer/encoderblock_{index}'
    put(f'{name}/LayerNorm_0', own['norm1'])
    put(f'{name}/LayerNorm_2', own['norm2'])
    put(f'{name}/MlpBlock_3/Dense_0', own['mlp']['fc1'])
    put(f'{name}/MlpBlock_3/Dense_1', own['mlp']['fc2'])
    attention = f'{name}/MultiHeadDotProductAttention_1'
    kernel, bias = own['attention']['qkv']['kernel'], own['attention']['qkv']['bias']
    for part, which in enumerate(('query', 'key', 'value')):
      columns = slice(12 * part, 12 * part + 12)
      arrays[f'{attention}/{which}/kernel'] = kernel[:, columns].reshape(12, heads, -1)
      arrays[f'{attention}/{which}/bias'] = bias[columns].reshape(heads, -1)
    arrays[f'{attention}/out/kernel'] = own['attention']['proj']['kernel'].reshape(heads, -1, 12)
    arrays[f'{attention}/out/bias'] = own['attention']['proj']['bias']
  return {name: np.asarray(array) for name, array in arrays.items()}


def test_a_file_of_the_original_release_is_loaded(tmp_path):
  model = models.ViT(**FIELDS, num_classes=5)
  images = jnp.asarray(random_images((2, 8, 8, 3)))
  variables = random_variables(model, images)
  arrays = released(variables['params'])
  np.savez(tmp_path / 'ViT.npz', **arrays)
  found = models.from_torch(model, models.read_state_dict(tmp_path / 'ViT.npz'))
  jax.tree.map(np.testing.assert_array_equal, found['params'], variables['params'])
  # Attention of Flax itself, which the release is of, says the same.
  from flax import linen as nn

  layer = nn.MultiHeadDotProductAttention(3)
  name = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_1/'
  own = {'params': {}}
  for key, array in arrays.items():
    if key.startswith(name):
      part, kind = key.removeprefix(name).split('/')
      own['params'].setdefault(part, {})[kind] = array
  x = jax.random.normal(jax.random.key(0), (2, 5, 12))
  ours = models.vit.Attention(3).apply({'params': variables['params']['blocks_0']['attention']}, x)
  assert_close(ours, layer.apply(own, x), 1e-5)
  del arrays['cls']
  np.savez(tmp_path / 'less.npz', **arrays)
  with pytest.raises(ValueError, match="no 'cls'"):
    models.read_state_dict(tmp_path / 'less.npz')
