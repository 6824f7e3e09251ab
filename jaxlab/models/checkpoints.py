"""Weights of timm, torchvision and Hugging Face's transformers, to our trees and back.

A PyTorch name is a function of ours: `layer1_0/conv1/kernel` is `layer1.0.conv1.weight`. What a family calls
differently is a short list of renames.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy
from jaxlab.models.architectures import create
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.intercept import any_of
from jaxlab.models.llama import Llama
from jaxlab.models.position_embedding import resample_position_embedding
from jaxlab.models.vit import ViT, stack_blocks, unstack_blocks

PyTree = Any
StateDict = Mapping[str, np.ndarray]
Renames = Sequence[tuple[str, str]]

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}

# Applied in order to the dotted name, ours -> theirs. ResNets need none: timm's names are torchvision's.
TIMM: Renames = ((r'\.attention\.', '.attn.'),)
TORCHVISION_VIT: Renames = (
  (r'^cls_token$', 'class_token'),
  (r'^pos_embed$', 'encoder.pos_embedding'),
  (r'^patch_embed\.proj\.', 'conv_proj.'),
  (r'^blocks\.(\d+)\.', r'encoder.layers.encoder_layer_\1.'),
  (r'\.attention\.qkv\.', '.self_attention.in_proj_'),
  (r'\.attention\.proj\.', '.self_attention.out_proj.'),
  (r'\.norm([12])\.', r'.ln_\1.'),
  (r'\.mlp\.fc1\.', '.mlp.0.'),
  (r'\.mlp\.fc2\.', '.mlp.3.'),
  (r'^norm\.', 'encoder.ln.'),
  (r'^head\.', 'heads.head.'),
)
HF_GPT2: Renames = ((r'\.ln\.([12])\.', r'.ln_\1.'), (r'^(?!lm_head\.)', 'transformer.'))
HF_GPT2_BARE: Renames = HF_GPT2[:1]  # the published gpt2 files name the decoder without its head
HF_LLAMA: Renames = ((r'^(?!lm_head\.)', 'model.'),)

# Linear layers whose checkpoint weights are (in, out): transformers' Conv1D.
_IN_OUT = re.compile(r'(transformer\.)?h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight')

# Constants that carry no weights: counters, masks, relative positions, rotary frequencies.
_BUFFERS = (
  r'(.*\.)?num_batches_tracked',
  r'layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)',
  r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',
  r'(.*\.)?rotary_emb\.inv_freq',
)
_EMBEDDINGS = ('transformer.wte.weight', 'wte.weight', 'model.embed_tokens.weight')

# timm's default weights of each name (the tag behind the point on huggingface.co/timm).
_DEFAULT_TAGS = {
  'gpt2': 'openai-community/gpt2',
  'llama2_7b': 'meta-llama/Llama-2-7b-hf',
  'llama3_8b': 'meta-llama/Meta-Llama-3-8B',
  'resnet18': 'a1_in1k',
  'resnet34': 'a1_in1k',
  'resnet50': 'a1_in1k',
  'resnet101': 'a1h_in1k',
  'vit_tiny_patch16_224': 'augreg_in21k_ft_in1k',
  'vit_small_patch16_224': 'augreg_in21k_ft_in1k',
  'vit_base_patch16_224': 'augreg2_in21k_ft_in1k',
  'deit_tiny_patch16_224': 'fb_in1k',
  'deit_small_patch16_224': 'fb_in1k',
  'deit_base_patch16_224': 'fb_in1k',
  'deit_tiny_distilled_patch16_224': 'fb_in1k',
  'deit_small_distilled_patch16_224': 'fb_in1k',
  'deit_base_distilled_patch16_224': 'fb_in1k',
  'swin_tiny_patch4_window7_224': 'ms_in1k',
  'swin_small_patch4_window7_224': 'ms_in22k_ft_in1k',
  'swin_base_patch4_window7_224': 'ms_in22k_ft_in1k',
  'swin_base_patch4_window12_384': 'ms_in22k_ft_in1k',
  'mobilenetv2_050': 'lamb_in1k',
  'mobilenetv2_100': 'ra_in1k',
  'mobilenetv2_110d': 'ra_in1k',
  'mobilenetv2_120d': 'ra_in1k',
  'mobilenetv2_140': 'ra_in1k',
}


def torch_name(path: str, renames: Renames = TIMM) -> str:
  """Returns the PyTorch name of the leaf at `path`.

  >>> torch_name('blocks_3/attention/qkv/kernel')
  'blocks.3.attn.qkv.weight'
  >>> torch_name('layer1_0/downsample_1/var')
  'layer1.0.downsample.1.running_var'
  >>> torch_name('blocks_2_0/conv_dw/kernel')
  'blocks.2.0.conv_dw.weight'
  """
  *modules, leaf = path.split('/')
  modules = [re.sub(r'_(?=\d+(_\d+)*$)', '.', module) for module in modules]
  name = '.'.join([*modules, _LEAVES.get(leaf, leaf)])
  for pattern, replacement in renames:
    name = re.sub(pattern, replacement, name)
  return name


def abstract_variables(model: nn.Module, image_shape: Sequence[int] | None = None) -> PyTree:
  """Returns the shapes of `model`'s variables, without computing any.

  Args:
    model: a network over images, or a decoder over tokens.
    image_shape: (height, width, channels); None: the model's `image_size` or 224, and 3 channels.
  """
  if isinstance(model, GPT2 | Llama):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
  if image_shape is None:
    size = getattr(model, 'image_size', 224)
    image_shape = (*((size, size) if isinstance(size, int) else size), 3)
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def from_torch(
  model: nn.Module | PyTree,
  state_dict: StateDict,
  *,
  renames: Renames | None = None,
  ignore: Sequence[str] = (),
  resample: bool = False,
) -> PyTree:
  """Returns the variables of `model` with the weights of a PyTorch checkpoint.

  Kernels are transposed (out, in, ...) -> (..., in, out), except GPT-2's, which are stored (in, out); norms'
  statistics go to `batch_stats`; buffers without weights (`num_batches_tracked`, causal masks) are dropped;
  values are cast to the model's dtypes. A tied head may be there a second time, as `lm_head.weight`.

  Args:
    model: a network over color images, a decoder, or its (abstract) variables, e.g. of `abstract_variables`.
    state_dict: arrays by PyTorch name (see `read_state_dict`).
    renames: ordered (regular expression, replacement) on dotted names, ours -> theirs; None: `TIMM`, or
      `TORCHVISION_VIT`, `HF_GPT2` (`_BARE`) or `HF_LLAMA` where the checkpoint looks like that.
    ignore: regular expressions of checkpoint names that the model does without, e.g. `r'fc\\..*'`.
    resample: bring `pos_embed` to the model's grid (`resample_position_embedding`); its own must be
      square, and the model's too unless a `ViT` is given.

  Returns:
    Variables as NumPy arrays, in the layout of the model (`ViT(scan=True)`: stacked).

  Raises:
    ValueError: listing every name that is missing or unexpected and every shape that differs; for a
      pattern of `ignore` that matches nothing; for a tied head that differs from the embedding.
  """
  variables = abstract_variables(model) if isinstance(model, nn.Module) else model
  variables = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dict(variables))
  scanned = 'blocks' in variables['params']
  if scanned:
    variables['params'] = jax.eval_shape(unstack_blocks, variables['params'])
  if renames is None:
    renames = _renames_of(state_dict)
  given = _select(state_dict, ignore)
  if 'lm_head' not in variables['params']:
    given = _without_tied_head(given)
  expected = traverse_util.flatten_dict(variables, sep='/')
  by_name = {torch_name(path.split('/', 1)[1], renames): path for path in expected}

  problems = [f'missing: {name}' for name in by_name if name not in given]
  problems += [f'unexpected: {name}' for name in given if name not in by_name]
  loaded = {}
  for name, path in by_name.items():
    if name not in given:
      continue
    value, target = np.asarray(given[name]), expected[path]
    if resample and path == 'params/pos_embed' and value.ndim == 3:
      prefix = len({'cls_token', 'dist_token'} & set(variables['params']))
      value = _resample(value, target.shape, prefix, model.grid if isinstance(model, ViT) else None)
    if path.endswith('/kernel') and not _IN_OUT.fullmatch(name):
      value = _from_torch_layout(value)
    if value.shape != target.shape:
      hint = ' (resample=True brings it to the grid)' if path == 'params/pos_embed' else ''
      problems.append(f'shape: {name} is {value.shape}, {path} needs {target.shape}{hint}')
      continue
    loaded[path] = value.astype(target.dtype)
  if problems:
    raise ValueError(
      f'The checkpoint does not fit the model in {len(problems)} places:\n  '
      + '\n  '.join(problems)
    )
  tree = traverse_util.unflatten_dict(loaded, sep='/')
  if scanned:
    tree['params'] = stack_blocks(tree['params'])
  return tree


def to_torch(variables: PyTree, *, renames: Renames = TIMM) -> dict[str, np.ndarray]:
  """Returns `variables` as a PyTorch state dict of NumPy arrays; the inverse of `from_torch`."""
  variables = dict(variables)
  if 'blocks' in variables['params']:
    variables['params'] = unstack_blocks(variables['params'])
  state_dict = {}
  for path, value in traverse_util.flatten_dict(variables, sep='/').items():
    value, name = np.asarray(value), torch_name(path.split('/', 1)[1], renames)
    if path.endswith('/kernel') and not _IN_OUT.fullmatch(name):
      value = np.ascontiguousarray(_to_torch_layout(value))
    state_dict[name] = value
  return state_dict


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the arrays of a `.safetensors` file, or of an `.npz` file without pickles, by name.

  Raises:
    ValueError: for any other file: PyTorch's own files are pickles, which can execute code.
  """
  path = os.fspath(path)
  if path.endswith('.safetensors'):
    from safetensors import numpy as safetensors_numpy

    return safetensors_numpy.load_file(path)
  if path.endswith('.npz'):
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  raise ValueError(
    f'{path!r} is neither .safetensors nor .npz. Convert a PyTorch file once, where it is trusted: '
    f"safetensors.torch.save_file(torch.load(path), 'model.safetensors')."
  )


def load_pretrained(name: str, **overrides: Any) -> tuple[nn.Module, PyTree]:
  """Returns the network `name` and its public weights, from huggingface.co (cached).

  Args:
    name: a name of `create`, with timm's tag or without: `resnet50`, `resnet50.tv_in1k`. A decoder's tag is
      a repository of transformers: `gpt2`, `llama3_8b.meta-llama/Meta-Llama-3-8B`.
    **overrides: fields of the model. `num_classes=None` leaves the classifier away; another `image_size`
      resamples the position embedding.

  Returns:
    `(model, variables)`.

  Raises:
    ValueError: if the name has no default tag, or the weights do not fit the model.
    ConnectionError: if the file is neither in the cache nor can be downloaded.
  """
  architecture, _, tag = name.partition('.')
  model = create(architecture, **overrides)
  tag = tag or _DEFAULT_TAGS.get(architecture)
  if tag is None:
    raise ValueError(
      f'load_pretrained({name!r}): no default weights; give a tag of huggingface.co/timm (of a decoder, a '
      f"repository), as in 'resnet50.tv_in1k', or one of {', '.join(_DEFAULT_TAGS)}."
    )
  if isinstance(model, GPT2 | Llama):
    return model, from_torch(model, _read_repository(tag))
  state_dict = read_state_dict(_download(f'timm/{architecture}.{tag}', 'model.safetensors'))
  heads = anatomy(create(architecture, num_classes=1)).head
  head = rf'({any_of(path.replace("/", ".") for path in heads)})\..*'
  has_head = any(
    re.fullmatch(head, name) for name in state_dict
  )  # self-supervised weights have none
  ignore = (head,) if has_head and not model.num_classes else ()
  return model, from_torch(model, state_dict, ignore=ignore, resample=isinstance(model, ViT))


def _read_repository(repository: str) -> dict[str, np.ndarray]:
  """Returns the weights of a repository of transformers: of one file, or of all that its index names."""
  import json

  import huggingface_hub

  try:
    index = huggingface_hub.hf_hub_download(repository, 'model.safetensors.index.json')
    files = sorted(set(json.loads(pathlib.Path(index).read_text())['weight_map'].values()))
  except (OSError, huggingface_hub.errors.EntryNotFoundError):
    files = ['model.safetensors']  # a small model, or no network: then this raises
  state_dict: dict[str, np.ndarray] = {}
  for name in files:
    state_dict |= read_state_dict(_download(repository, name))
  return state_dict


def _download(repository: str, filename: str) -> str:
  import huggingface_hub

  try:
    return huggingface_hub.hf_hub_download(repository, filename)
  except (OSError, huggingface_hub.errors.EntryNotFoundError) as error:
    raise ConnectionError(
      f'Could not get {filename} of huggingface.co/{repository}: neither cached nor reachable '
      f'({type(error).__name__}: {error}). Download it where there is a network and use '
      f'from_torch(model, read_state_dict(file)).'
    ) from error


def _select(state_dict: StateDict, ignore: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns the entries that carry weights; `ignore` patterns must each match something."""
  useless = [p for p in ignore if not any(re.fullmatch(p, name) for name in state_dict)]
  if useless:
    raise ValueError(f'ignore patterns that match no name of the checkpoint: {useless}.')
  skipped = (*ignore, *_BUFFERS)
  return {
    name: value
    for name, value in state_dict.items()
    if not any(re.fullmatch(pattern, name) for pattern in skipped)
  }


def _renames_of(state_dict: StateDict) -> Renames:
  """Returns the names of the code base that the checkpoint looks like."""
  marks = {
    'class_token': TORCHVISION_VIT,
    'transformer.wte.weight': HF_GPT2,
    'wte.weight': HF_GPT2_BARE,
    'model.embed_tokens.weight': HF_LLAMA,
  }
  return next((renames for name, renames in marks.items() if name in state_dict), TIMM)


def _without_tied_head(state_dict: StateDict) -> StateDict:
  """Drops `lm_head.weight` beside the embedding that it repeats."""
  embedding = next((name for name in _EMBEDDINGS if name in state_dict), None)
  if embedding is None or 'lm_head.weight' not in state_dict:
    return state_dict
  if not np.array_equal(state_dict['lm_head.weight'], state_dict[embedding]):
    raise ValueError(
      f'The model ties its head to the embedding, but lm_head.weight differs from {embedding}: build '
      f'the model with tied=False.'
    )
  return {name: value for name, value in state_dict.items() if name != 'lm_head.weight'}


def _from_torch_layout(kernel: np.ndarray) -> np.ndarray:
  """(out, in, *window) -> (*window, in, out)."""
  return kernel.transpose(*range(2, kernel.ndim), 1, 0) if kernel.ndim > 1 else kernel


def _to_torch_layout(kernel: np.ndarray) -> np.ndarray:
  """(*window, in, out) -> (out, in, *window)."""
  return kernel.transpose(-1, -2, *range(kernel.ndim - 2)) if kernel.ndim > 1 else kernel


def _resample(value, shape, num_prefix_tokens, grid):
  """Resamples `value` to a `pos_embed` of `shape`, if the number of tokens differs."""
  if value.shape[1] == shape[1]:
    return value
  if grid is None:
    side = int((shape[1] - num_prefix_tokens) ** 0.5)
    grid = (side, side)
  resampled = resample_position_embedding(value, grid, num_prefix_tokens=num_prefix_tokens)
  return np.asarray(resampled)
