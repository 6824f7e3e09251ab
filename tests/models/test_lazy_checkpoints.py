import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jaxlab import models

KINDS = (np.float32, jnp.bfloat16, np.float16, np.int8, np.bool_, np.float64, np.uint32)


def some_arrays(seed: int = 0):
  rng = np.random.default_rng(seed)
  shapes = [(3, 4), (2,), (), (0, 3), (5, 1, 2), (7,), (4,)]
  return {
    f'model.layers.{i}.weight': rng.normal(20, 3, shape).astype(kind)
    for i, (shape, kind) in enumerate(zip(shapes, KINDS, strict=True))
  }


def network(seed: int, depth: int = 3, width: int = 8, dtype=np.float32):
  """Returns the state dict of a small decoder."""
  rng = np.random.default_rng(seed)
  shapes = {'model.embed_tokens.weight': (11, width), 'lm_head.weight': (11, width)}
  shapes['model.norm.weight'] = (width,)
  for i in range(depth):
    for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
      shapes[f'model.layers.{i}.self_attn.{name}.weight'] = (width, width)
    shapes[f'model.layers.{i}.self_attn.k_proj.bias'] = (width,)
    shapes[f'model.layers.{i}.mlp.up_proj.weight'] = (2 * width, width)
    shapes[f'model.layers.{i}.input_layernorm.weight'] = (width,)
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def assert_same(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8), name)


@pytest.mark.parametrize('limit', [1, 60, 1e9])
def test_what_is_written_is_what_the_library_of_the_format_reads(tmp_path, limit):
  arrays = some_arrays()
  models.save_state_dict(tmp_path / 'new', arrays, max_shard_bytes=limit)
  files = sorted((tmp_path / 'new').glob('*.safetensors'))
  read = [safetensors_numpy.load_file(file) for file in files]
  together = {name: array for own in read for name, array in own.items()}
  assert sum(map(len, read)) == len(arrays)
  for name, array in arrays.items():
    assert together[name].shape == array.shape and together[name].tobytes() == array.tobytes()
  lazy = models.open_state_dict(tmp_path / 'new')
  assert lazy.shapes.keys() == arrays.keys()
  for name, array in arrays.items():
    assert (lazy.shapes[name].shape, lazy.shapes[name].dtype) == (array.shape, array.dtype)
    assert lazy[name].tobytes() == array.tobytes()
  assert not (tmp_path / 'new.partial').exists()
  if limit == 1e9:
    assert [file.name for file in files] == ['model.safetensors']
    return
  index = json.loads((tmp_path / 'new/model.safetensors.index.json').read_text())
  assert index['metadata'] == {'total_size': sum(array.nbytes for array in arrays.values())}
  for file, own in zip(files, read):
    assert {name for name, place in index['weight_map'].items() if place == file.name} == set(own)
    assert len(own) == 1 or sum(array.nbytes for array in own.values()) <= limit


def test_checkpoints_are_merged_tensor_by_tensor_into_a_new_one(tmp_path):
  base, tuned = network(0), network(1, dtype=jnp.bfloat16)
  folders = [tmp_path / name for name in ('base', 'tuned')]
  for folder, arrays in zip(folders, (base, tuned)):
    models.save_state_dict(folder, arrays, max_shard_bytes=500)
  (folders[0] / 'config.json').write_text('{"tie_word_embeddings": true, "hidden_size": 8}')
  (folders[0] / 'tokenizer.model').write_bytes(b'tokens')
  first, second = map(models.open_state_dict, folders)
  mask = models.select_parameters(first.shapes, ['k_proj', 'mlp'], blocks=[0, 2])
  merged = models.merge_parameters(first, second, mask, base_share=0.25)
  target = tmp_path / 'merged'
  models.save_state_dict(target, merged, max_shard_bytes=700, beside=folders[0])
  expected = {name: array.copy() for name, array in base.items()}
  chosen = [
    name
    for name in base
    if ('.0.' in name or '.2.' in name) and ('k_proj' in name or 'mlp' in name)
  ]
  assert len(chosen) == 6
  for name in chosen:
    expected[name] = np.float32(0.25 * np.float64(base[name]) + 0.75 * np.float64(tuned[name]))
  found = models.open_state_dict(target)
  assert set(found) == set(base)
  for name in base:
    assert found[name].dtype == np.float32
    if name in chosen:
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-7)
    else:
      np.testing.assert_array_equal(found[name], base[name])
  config = json.loads((target / 'config.json').read_text())
  assert config == {'tie_word_embeddings': False, 'hidden_size': 8}
  assert (target / 'tokenizer.model').read_bytes() == b'tokens'
  everything = dict.fromkeys(base, True)
  assert_same(
    models.merge_parameters(first, second, everything),
    {name: np.asarray(array, np.float32) for name, array in tuned.items()},
  )
  assert_same(models.merge_parameters(first, second, dict.fromkeys(base, False)), base)


def test_memory_is_that_of_a_few_tensors(tmp_path):
  # 16 tensors of 2 MB, and a few small ones.
  width, depth = 512, 16
  arrays = {
    f'model.layers.{i}.self_attn.o_proj.weight': np.full((width, 2 * width), i, np.float32)
    for i in range(depth)
  }
  one = next(iter(arrays.values())).nbytes
  for name in ('base', 'tuned'):
    models.save_state_dict(tmp_path / name, arrays, max_shard_bytes=5 * one)
    arrays = {name: array + 1 for name, array in arrays.items()}
  del arrays
  tracemalloc.start()
  try:
    base, tuned = (models.open_state_dict(tmp_path / name) for name in ('base', 'tuned'))
    mask = models.select_parameters(base.shapes, ['o_proj'])
    merged = models.merge_parameters(base, tuned, mask, base_share=0.5)
    models.save_state_dict(tmp_path / 'merged', merged, max_shard_bytes=5 * one)
    _, while_merging = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    norms = models.delta_norms(base, tuned)
    changes = list(models.parameter_changes(base, tuned, bins=200))
    _, while_comparing = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  # Mixing: both, in float32, and what they are cast to; comparing: both, and parts of 4 MB in wide types.
  assert one < while_merging < 5 * one < depth * one
  assert one < while_comparing < 12 * one < depth * one
  np.testing.assert_allclose(norms['self_attn/o_proj'], np.sqrt(2) * width)
  assert sum(own.histogram is not None for own in changes) == depth
  assert models.open_state_dict(tmp_path / 'merged')['model.layers.3.self_attn.o_proj.weight'][
    0, 0
  ] == pytest.approx(3.5)


def test_nothing_half_written_stays(tmp_path):
  base = network(0)
  models.save_state_dict(tmp_path / 'base', base, max_shard_bytes=500)
  models.save_state_dict(tmp_path / 'tuned', network(1), max_shard_bytes=500)
  first, second = (models.open_state_dict(tmp_path / name) for name in ('base', 'tuned'))
  last = sorted((tmp_path / 'tuned').glob('*.safetensors'))[-1]
  whole = last.read_bytes()
  last.write_bytes(whole[:-8])
  merged = models.merge_parameters(first, second, dict.fromkeys(base, True))
  with pytest.raises(ValueError, match=rf'{last.name}.* is no whole safetensors file'):
    models.save_state_dict(tmp_path / 'merged', merged)
  with pytest.raises(ValueError, match=rf'{last.name}.* is no whole safetensors file'):
    models.open_state_dict(tmp_path / 'tuned')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['base', 'tuned']
  last.unlink()
  with pytest.raises(ValueError, match=rf'index.json.* names {last.name}, which is not there'):
    models.open_state_dict(tmp_path / 'tuned')
  last.write_bytes(whole)
  # What a killed process left is no obstacle.
  (tmp_path / 'merged.partial').mkdir()
  (tmp_path / 'merged.partial/model.safetensors').write_bytes(b'half')
  models.save_state_dict(tmp_path / 'merged', merged)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['base', 'merged', 'tuned']
  with pytest.raises(ValueError, match='is there already'):
    models.save_state_dict(tmp_path / 'merged', base)
  models.save_state_dict(tmp_path / 'merged', base, overwrite=True)
  assert_same(models.open_state_dict(tmp_path / 'merged'), base)


def test_an_index_says_which_files_and_tensors_belong_together(tmp_path):
  arrays = network(0)
  models.save_state_dict(tmp_path / 'new', arrays, max_shard_bytes=500)
  safetensors_numpy.save_file(arrays, tmp_path / 'new/consolidated.safetensors')
  assert_same(models.open_state_dict(tmp_path / 'new'), arrays)
  path = tmp_path / 'new/model.safetensors.index.json'
  index = json.loads(path.read_text())
  index['weight_map']['model.other'] = next(iter(index['weight_map'].values()))
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r'names model\.other in model-.*, which does not hold it'):
    models.open_state_dict(tmp_path / 'new')


def test_what_is_replaced_is_there_until_the_new_one_is(tmp_path, monkeypatch):
  old, new = network(0), network(1)
  models.save_state_dict(tmp_path / 'own', old)
  replace = pathlib.Path.replace

  def killed(self, target):
    if self.name == 'own.partial':
      raise KeyboardInterrupt
    return replace(self, target)

  monkeypatch.setattr(pathlib.Path, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    models.save_state_dict(tmp_path / 'own', new, overwrite=True)
  monkeypatch.undo()
  assert_same(models.open_state_dict(tmp_path / 'own'), old)
  (tmp_path / 'own').rename(tmp_path / 'own.old')  # as a process leaves it that is killed there
  with pytest.raises(ValueError, match='is there already'):
    models.save_state_dict(tmp_path / 'own', new)
  assert_same(models.open_state_dict(tmp_path / 'own'), old)
  models.save_state_dict(tmp_path / 'own', new, overwrite=True)
  assert_same(models.open_state_dict(tmp_path / 'own'), new)
  assert [path.name for path in tmp_path.iterdir()] == ['own']


@pytest.mark.parametrize(
  'text', ['{"weight_map": {"a"', '{"metadata": {}}', '[]', '{"weight_map": 3}']
)
def test_an_index_that_is_none_is_named(text, tmp_path):
  models.save_state_dict(tmp_path / 'own', network(0))
  (tmp_path / 'own/model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match=r'own/model\.safetensors\.index\.json.* is no whole index'):
    models.open_state_dict(tmp_path / 'own')


def test_tensors_of_files_are_destroyed_as_those_in_memory(tmp_path):
  arrays = network(0, dtype=jnp.bfloat16)
  models.save_state_dict(tmp_path / 'own', arrays, max_shard_bytes=500)
  lazy = models.open_state_dict(tmp_path / 'own')
  mask = models.select_parameters(lazy.shapes, ['k_proj'], blocks=[1])
  for key in (None, jax.random.key(4)):
    found = models.destroy_parameters(lazy, mask, key)
    assert isinstance(found, models.LazyStateDict)
    models.save_state_dict(tmp_path / 'new', found, overwrite=True)
    expected = models.destroy_parameters(arrays, mask, key)
    expected = {name: np.asarray(array) for name, array in expected.items()}
    assert_same(models.open_state_dict(tmp_path / 'new'), expected)
    assert any(not np.array_equal(expected[name], arrays[name]) for name in arrays)


def test_bad_input_is_named(tmp_path):
  with pytest.raises(ValueError, match='state_dict holds no arrays'):
    models.save_state_dict(tmp_path / 'new', {})
  with pytest.raises(ValueError, match='max_shard_bytes must be positive'):
    models.save_state_dict(tmp_path / 'new', network(0), max_shard_bytes=0)
  with pytest.raises(ValueError, match='a has the type complex64'):
    models.save_state_dict(tmp_path / 'new', {'a': np.zeros(2, np.complex64)})
  assert not list(tmp_path.iterdir())
  base = network(0)
  models.save_state_dict(tmp_path / 'base', base)
  lazy = models.open_state_dict(tmp_path / 'base')
  with pytest.raises(ValueError, match='must both be LazyStateDicts'):
    models.merge_parameters(lazy, base, dict.fromkeys(base, True))
  models.save_state_dict(tmp_path / 'wide', network(0, width=10))
  wide = models.open_state_dict(tmp_path / 'wide')
  for call in (
    lambda: models.merge_parameters(lazy, wide, dict.fromkeys(base, True)),
    lambda: models.delta_norms(lazy, wide),
  ):
    with pytest.raises(ValueError, match=r'lm_head\.weight: base has \(11, 8\), tuned \(11, 10\)'):
      call()
