"""Weights of timm, torchvision and Hugging Face's transformers, to our trees and back."""

import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy
from jaxlab.models.architectures import create
from jaxlab.models.checkpoint_names import (
  BUFFERS,
  EMBEDDINGS,
  IN_OUT,
  PRETRAINING_HEADS,
  Renames,
  StateDict,
  renames_of,
  timm_names,
  torch_name,
)
from jaxlab.models.configurations import SIZES, TOKEN_MODELS
from jaxlab.models.google_vit import google_vit_state_dict, is_google_vit
from jaxlab.models.position_embedding import resample_position_embedding
from jaxlab.models.variants import DEFAULT_TAGS
from jaxlab.models.vit import ViT, stack_blocks, unstack_blocks

PyTree = Any


def abstract_variables(model: nn.Module, image_shape: Sequence[int] | None = None) -> PyTree:
  """Returns the shapes of `model`'s variables, without computing any.

  Args:
    model: a network over images or tokens.
    image_shape: (height, width, channels); None: the model's `image_size` or 224, and 3 channels.
  """
  if isinstance(model, TOKEN_MODELS):
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

  Entries are told by name and shape, and none may be missing or left over. Networks that differ only in
  layers without weights are not told apart: timm's `resnetaa50` and `resnetblur50` from `resnet50`, `tf_`
  networks and CLIP's with `quickgelu` from those without.

  Kernels are transposed (out, in, ...) -> (..., in, out), except GPT-2's, which are stored (in, out); norms'
  statistics go to `batch_stats`; buffers without weights (`num_batches_tracked`, causal masks) and the heads
  of BERT's pretraining are dropped; values are cast to the model's dtypes. A tied head may be there a second
  time, as `lm_head.weight`.

  Args:
    model: a network over color images or tokens, or its (abstract) variables, e.g. of `abstract_variables`.
    state_dict: arrays by PyTorch name (see `read_state_dict`).
    renames: ordered (regular expression, replacement) on dotted names, ours -> theirs; None: those of the
      code base of `checkpoint_names` that the checkpoint looks like, otherwise timm's.
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
    renames = renames_of(state_dict, variables['params'])
  given = _select(state_dict, ignore)
  if 'lm_head' not in variables['params']:
    given = _without_tied_head(given)
  expected = traverse_util.flatten_dict(variables, sep='/')
  by_name = {torch_name(path.split('/', 1)[1], renames): path for path in expected}

  problems = [f'missing: {name}' for name in by_name if name not in given]
  problems += [
    f'unexpected: {name}'
    for name in given
    if name not in by_name and not re.fullmatch(PRETRAINING_HEADS, name)
  ]
  loaded = {}
  for name, path in by_name.items():
    if name not in given:
      continue
    value, target = np.asarray(given[name]), expected[path]
    if resample and path == 'params/pos_embed' and value.ndim == 3:
      if isinstance(model, ViT):
        prefix, grid = model.num_embedded_prefix_tokens, model.grid
      else:
        prefix, grid = len({'cls_token', 'dist_token'} & set(variables['params'])), None
      value = _resample(value, target.shape, prefix, grid)
    if path.endswith('/kernel') and not IN_OUT.fullmatch(name):
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


def to_torch(variables: PyTree, *, renames: Renames | None = None) -> dict[str, np.ndarray]:
  """Returns `variables` as a PyTorch state dict of NumPy arrays; the inverse of `from_torch`.

  The names are `renames` of ours, or timm's where that is None (see `checkpoint_names`).
  """
  variables = dict(variables)
  if 'blocks' in variables['params']:
    variables['params'] = unstack_blocks(variables['params'])
  renames = timm_names(variables['params']) if renames is None else renames
  state_dict = {}
  for path, value in traverse_util.flatten_dict(variables, sep='/').items():
    value, name = np.asarray(value), torch_name(path.split('/', 1)[1], renames)
    if path.endswith('/kernel') and not IN_OUT.fullmatch(name):
      value = np.ascontiguousarray(_to_torch_layout(value))
    state_dict[name] = value
  return state_dict


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the arrays of a `.safetensors` file, or of an `.npz` file without pickles, by name.

  Those of the original ViT release come under timm's names (`google_vit_state_dict`).

  Raises:
    ValueError: for any other file: PyTorch's own files are pickles, which can execute code; for one that is
      cut off or damaged; for npz arrays of a type that NumPy does not know (bfloat16).
    FileNotFoundError: if there is no such file.
  """
  path = os.fspath(path)
  if path.endswith(('.safetensors', '.npz')) and not os.path.isfile(path):
    raise FileNotFoundError(f'there is no file {path!r}.')
  if path.endswith('.safetensors'):
    import safetensors
    from safetensors import numpy as safetensors_numpy

    try:
      return safetensors_numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f'{path!r} is no whole safetensors file: {error}.') from error
  if path.endswith('.npz'):
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(f'{path!r} is no whole npz file without pickles: {error}.') from error
    for name, array in arrays.items():
      if array.dtype.kind == 'V':
        raise ValueError(
          f'{path!r}: {name} has the type {array.dtype}, in which NumPy writes bfloat16 and cannot read it: '
          'save float32, or safetensors.'
        )
    return google_vit_state_dict(arrays) if is_google_vit(arrays) else arrays
  raise ValueError(
    f'{path!r} is neither .safetensors nor .npz. Convert a PyTorch file once, where it is trusted: '
    f"safetensors.torch.save_file(torch.load(path), 'model.safetensors')."
  )


def pretrained_repository(name: str) -> str:
  """Returns the repository of huggingface.co that `load_pretrained(name)` reads.

  Args:
    name: see there.

  Raises:
    ValueError: if the name has no tag, and no default one.

  >>> pretrained_repository('resnet50.tv_in1k'), pretrained_repository('gpt2')
  ('timm/resnet50.tv_in1k', 'openai-community/gpt2')
  """
  architecture, _, tag = name.partition('.')
  tag = tag or DEFAULT_TAGS.get(architecture)
  if tag is None:
    raise ValueError(
      f'load_pretrained({name!r}): no default weights; give a tag of huggingface.co/timm (of a decoder, a '
      f"repository), as in 'resnet50.tv_in1k', or one of {', '.join(DEFAULT_TAGS)}."
    )
  return tag if architecture in SIZES else f'timm/{architecture}.{tag}'


def load_pretrained(
  name: str, *, file: str | os.PathLike | None = None, **overrides: Any
) -> tuple[nn.Module, PyTree]:
  """Returns the network `name` and its public weights, from huggingface.co (cached) or from `file`.

  Args:
    name: a name of `create`, with timm's tag or without: `resnet50`, `resnet50.tv_in1k`. The tag of a
      network over tokens is a repository of transformers: `gpt2`, `llama3_8b.meta-llama/Meta-Llama-3-8B`.
    file: a local `.safetensors` or `.npz` file with the weights, under the names of timm or any other code
      base that `from_torch` knows; nothing is downloaded, and the name needs no tag. If a `config.json` of
      timm lies beside it, its architecture must be that of the name.
    **overrides: fields of the model. The weights' classifier decides on `num_classes`, unless it is given;
      `num_classes=None` leaves the classifier away. Another `image_size` resamples the position embedding.

  Returns:
    `(model, variables)`.

  Raises:
    ValueError: if the name has no default tag, or the weights do not fit the model or are another's.
    ConnectionError: if the file is neither in the cache nor can be downloaded.
  """
  architecture = name.partition('.')[0]
  model = create(architecture, **overrides)
  repository = pretrained_repository(name) if file is None else ''
  if isinstance(model, TOKEN_MODELS):
    state_dict = _read_repository(repository) if file is None else read_state_dict(file)
    return model, from_torch(model, state_dict)
  if file is None:
    file = _download(repository, 'model.safetensors')
  else:
    _check_architecture(file, architecture)
  state_dict = read_state_dict(file)
  head = _head_names(architecture, overrides, state_dict)
  if 'num_classes' not in overrides:
    sizes = [len(state_dict[name]) for name in head]
    model = model.clone(num_classes=sizes[0] if sizes else None)
  ignore = () if model.num_classes else [re.escape(name) for name in head]
  return model, from_torch(model, state_dict, ignore=ignore, resample=isinstance(model, ViT))


def _check_architecture(file: str | os.PathLike, name: str) -> None:
  """Raises ValueError if the configuration of timm beside `file` tells of another architecture."""
  config = pathlib.Path(file).with_name('config.json')
  own = json.loads(config.read_text('utf-8')).get('architecture') if config.exists() else None
  if own not in (None, name):
    raise ValueError(
      f'load_pretrained({name!r}): {os.fspath(file)} holds the weights of {own!r}, as {config.name} beside '
      f'it says. Give that name; from_torch(model, read_state_dict(file)) asks no such question.'
    )


def _head_names(architecture: str, overrides: dict[str, Any], state_dict: StateDict) -> list[str]:
  """Returns the classifier's names in `state_dict`; self-supervised weights have none."""
  model = create(architecture, **{**overrides, 'num_classes': 1})
  heads = anatomy(model).head
  params = abstract_variables(model)['params']
  renames = renames_of(state_dict, params)
  paths = traverse_util.flatten_dict(params, sep='/')
  names = {torch_name(path, renames) for path in paths if path.rpartition('/')[0] in heads}
  return sorted(names & state_dict.keys())


def _read_repository(repository: str) -> dict[str, np.ndarray]:
  """Returns the weights of a repository of transformers: of one file, or of all that its index names."""
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
  skipped = (*ignore, *BUFFERS)
  return {
    name: value
    for name, value in state_dict.items()
    if not any(re.fullmatch(pattern, name) for pattern in skipped)
  }


def _without_tied_head(state_dict: StateDict) -> StateDict:
  """Drops `lm_head.weight` beside the embedding that it repeats."""
  embedding = next((name for name in EMBEDDINGS if name in state_dict), None)
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
