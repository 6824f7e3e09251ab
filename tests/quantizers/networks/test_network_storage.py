import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.quantizers import AffineQuantizer, store
from jaxlab.quantizers.networks import storage

RULES = [
  AffineQuantizer(bits, rule, **granularity)
  for bits in (3, 4, 12)
  for rule, granularity in (
    ('symmetric', {'granularity': 'channel'}),
    ('asymmetric', {'granularity': 'group', 'axis': 0, 'group_size': 5}),
    ('asymmetric_clipped', {}),
  )
]
X = jax.random.normal(jax.random.key(0), (15, 4))


def tree():
  return {
    'fc': {'kernel': store(RULES[3], X), 'bias': jnp.arange(4.0)},
    'head': {'kernel': store(RULES[4], X), 'scale': jnp.ones(3, jnp.bfloat16)},
    'vector': store(AffineQuantizer(4), X[0, :3]),
    'step': jnp.int32(7),
  }


def test_files_give_the_same_tree_back(tmp_path):
  params = tree()
  path = tmp_path / 'model.safetensors'
  size = storage.save_quantized(path, params)
  assert size == path.stat().st_size and os.listdir(tmp_path) == ['model.safetensors']
  loaded = storage.load_quantized(path)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert storage.size_in_bytes(loaded) == storage.size_in_bytes(params) < size


def test_other_tools_read_the_tensors(tmp_path):
  import safetensors

  path = tmp_path / 'model.safetensors'
  storage.save_quantized(path, tree())
  with safetensors.safe_open(path, 'numpy') as file:
    assert 'fc/kernel.codes' in file.keys()  # noqa: SIM118
    assert file.get_tensor('fc/kernel.codes').shape == (8, 4)
    assert file.metadata()['format'] == storage.FORMAT


def test_bytes_are_those_of_the_buffers():
  kernel = jnp.ones((64, 8))
  for bits, codes in ((4, 64 * 8 // 2), (2, 64 * 8 // 2), (8, 64 * 8), (12, 64 * 8 * 2)):
    rule = AffineQuantizer(bits, granularity='channel')
    assert storage.size_in_bytes(store(rule, kernel)) == codes + 8 * 4
  assert storage.size_in_bytes({'a': kernel, 'b': jnp.zeros(3, jnp.bfloat16)}) == 64 * 8 * 4 + 6


def test_stored_trees_pass_through_jit_and_restore_in_any_dtype():
  params = tree()
  restored = jax.jit(lambda p: storage.restore(p, jnp.bfloat16))(params)
  assert restored['fc']['kernel'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    restored['fc']['kernel'], params['fc']['kernel'].dequantize().astype(jnp.bfloat16)
  )
  np.testing.assert_array_equal(restored['fc']['bias'], params['fc']['bias'])


def save_plain(path):
  from safetensors import numpy as safetensors_numpy

  safetensors_numpy.save_file({'a': np.ones(3)}, path)
  return storage.load_quantized(path)


def save_damaged(path):
  from safetensors import numpy as safetensors_numpy

  storage.save_quantized(path, tree())
  tensors = safetensors_numpy.load_file(path)
  del tensors['fc/kernel.scale']
  choices = '{"fc/kernel": {"bits": 4, "rule": "symmetric", "shape": [15, 4]}}'
  metadata = {'format': storage.FORMAT, 'quantizers': choices}
  safetensors_numpy.save_file(tensors, path, metadata)
  return storage.load_quantized(path)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (save_plain, 'not written by save_quantized'),
    (save_damaged, "has no scale of 'fc/kernel'"),
    (lambda path: storage.save_quantized(path, {}), 'no array'),
    (lambda path: storage.save_quantized(path, {'a/b': X}), 'without a slash'),
    (lambda path: storage.save_quantized(path, {'a.codes': X}), 'rename it'),
  ],
)
def test_bad_input_is_named(make, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    make(str(tmp_path / 'x.safetensors'))


@pytest.mark.parametrize('name', ['float8_e4m3fn', 'float8_e5m2'])
def test_float8_is_read_back_bit_for_bit(tmp_path, name):
  array = np.arange(256, dtype=np.uint8).view(jnp.dtype(name))
  storage.save_quantized(tmp_path / 'a.safetensors', {'fc': {'kernel': jnp.asarray(array)}})
  read = storage.load_quantized(tmp_path / 'a.safetensors')['fc']['kernel']
  assert read.dtype == array.dtype
  np.testing.assert_array_equal(np.asarray(read).view(np.uint8), np.arange(256))


@pytest.mark.parametrize('name', ['int4', 'uint4', 'float8_e4m3b11fnuz', 'complex64'])
def test_what_cannot_be_read_back_is_refused_when_written(tmp_path, name):
  path = tmp_path / 'a.safetensors'
  with pytest.raises(ValueError, match=f"'fc/kernel' has dtype {name}"):
    storage.save_quantized(path, {'fc': {'kernel': jnp.ones((2, 2), name)}})
  assert not path.exists()


def test_bits_may_be_numpy_integers(tmp_path):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
  stored = store(AffineQuantizer(np.int64(4), 'symmetric', 'channel', np.int32(-1)), x)
  storage.save_quantized(tmp_path / 'a.safetensors', {'kernel': stored})
  read = storage.load_quantized(tmp_path / 'a.safetensors')['kernel']
  np.testing.assert_array_equal(read.dequantize(), stored.dequantize())
