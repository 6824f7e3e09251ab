"""The npz files of the original ViT release (Dosovitskiy et al. 2021), such as imagenet21k/ViT-B_16.npz."""

from collections.abc import Mapping

import numpy as np

_ATTENTION = 'MultiHeadDotProductAttention_1'
_LAYERS = {
  'norm1': 'LayerNorm_0',
  'norm2': 'LayerNorm_2',
  'mlp.fc1': 'MlpBlock_3/Dense_0',
  'mlp.fc2': 'MlpBlock_3/Dense_1',
}


def is_google_vit(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether arrays have the names of the original release."""
  return 'Transformer/encoder_norm/scale' in arrays


def google_vit_state_dict(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the arrays of the original release under timm's names, in PyTorch's layouts.

  Queries, keys and values become one projection. What stands in front of the head in pre-training
  (`pre_logits`) is left away, as for fine-tuning.

  Args:
    arrays: by name, as NumPy reads the file.

  Raises:
    ValueError: for an array that is missing.
  """

  def read(name: str) -> np.ndarray:
    if name not in arrays:
      raise ValueError(f'There is no {name!r} among the arrays of a ViT of the original release.')
    return np.asarray(arrays[name])

  def layer(source: str) -> tuple[np.ndarray, np.ndarray]:
    if f'{source}/scale' in arrays:
      return read(f'{source}/scale'), read(f'{source}/bias')
    return read(f'{source}/kernel').T, read(f'{source}/bias')

  found = {
    'cls_token': read('cls'),
    'pos_embed': read('Transformer/posembed_input/pos_embedding'),
    'patch_embed.proj.weight': read('embedding/kernel').transpose(3, 2, 0, 1),
    'patch_embed.proj.bias': read('embedding/bias'),
  }
  named = {'norm': 'Transformer/encoder_norm'}
  if 'head/kernel' in arrays:
    named['head'] = 'head'
  depth = sum(name.endswith('LayerNorm_0/scale') for name in arrays)
  for index in range(depth):
    block = f'Transformer/encoderblock_{index}'
    named |= {f'blocks.{index}.{own}': f'{block}/{layer}' for own, layer in _LAYERS.items()}
    # [width, heads, head width] each; [heads, head width, width] of the output.
    parts = [f'{block}/{_ATTENTION}/{name}' for name in ('query', 'key', 'value')]
    kernels = [read(f'{part}/kernel') for part in parts]
    qkv = [kernel.reshape(len(kernel), -1).T for kernel in kernels]
    out = read(f'{block}/{_ATTENTION}/out/kernel')
    own = f'blocks.{index}.attn'
    found |= {
      f'{own}.qkv.weight': np.concatenate(qkv),
      f'{own}.qkv.bias': np.concatenate([read(f'{part}/bias').ravel() for part in parts]),
      f'{own}.proj.weight': out.reshape(-1, out.shape[-1]).T,
      f'{own}.proj.bias': read(f'{block}/{_ATTENTION}/out/bias'),
    }
  for own, source in named.items():
    found[f'{own}.weight'], found[f'{own}.bias'] = layer(source)
  return found
