import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.quantizers import AffineQuantizer, pack_int4, store
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


@pytest.mark.parametrize('name', ['float64', 'int64', 'uint64', 'bool', 'bfloat16', 'int8'])
def test_arrays_are_read_back_bit_for_bit(tmp_path, name):
  values = np.array([1.0 + 2.0**-40, -3.0, 0.0]).astype(np.float64)
  array = values.astype(jnp.dtype(name))
  if name in ('int64', 'uint64'):
    array = np.array([2**40 + 1, 7, 0], name)
  storage.save_quantized(tmp_path / 'a.safetensors', {'stats': {'count': array, 'one': array[0]}})
  read = storage.load_quantized(tmp_path / 'a.safetensors')['stats']
  for got, given in ((read['count'], array), (read['one'], array[0])):
    assert got.dtype == given.dtype and got.shape == given.shape
    assert np.asarray(got).tobytes() == given.tobytes()
  with jax.enable_x64(True):
    read = storage.load_quantized(tmp_path / 'a.safetensors')['stats']['count']
    assert isinstance(read, jax.Array) and np.asarray(read).tobytes() == array.tobytes()


@pytest.mark.parametrize('leaf', [1.5, None, 'text', [1.0]])
def test_leaves_that_are_no_arrays_are_refused(tmp_path, leaf):
  path = tmp_path / 'a.safetensors'
  with pytest.raises(ValueError, match=r"'fc/kernel' is a .*, expected an array"):
    storage.save_quantized(path, {'fc': {'kernel': leaf}})
  assert not path.exists()


def test_arrays_of_another_byte_order_are_refused(tmp_path):
  array = np.arange(5, dtype='>f4')
  path = tmp_path / 'a.safetensors'
  with pytest.raises(ValueError, match="'a' has dtype >f4"):
    storage.save_quantized(path, {'a': array})


def test_notes_are_kept(tmp_path):
  path = tmp_path / 'a.safetensors'
  storage.save_quantized(path, {'a': X}, notes={'skipped': {'fc': 'why'}})
  assert storage.read_notes(path) == {'skipped': {'fc': 'why'}}
  storage.save_quantized(path, {'a': X})
  assert storage.read_notes(path) == {}


def test_depthwise_codes_take_half_a_byte_each(tmp_path):
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 6))
  rule = AffineQuantizer(4, 'symmetric', 'channel')
  stored = store(rule, kernel)
  assert stored.codes.nbytes == 3 * 3 * 6 // 2
  path = tmp_path / 'a.safetensors'
  storage.save_quantized(path, {'kernel': stored})
  read = storage.load_quantized(path)['kernel']
  np.testing.assert_array_equal(read.dequantize(), stored.dequantize())
  exact = np.asarray(kernel, np.float64)
  scale = np.abs(exact).max((0, 1, 2)) / 7
  np.testing.assert_allclose(
    read.dequantize(), np.round(exact / scale) * scale, rtol=1e-5, atol=1e-6
  )
  # A file in which each code of a depthwise kernel has a byte for itself.
  wide = stored.replace(codes=pack_int4(stored.integer_codes()))
  assert wide.codes.shape == (3, 3, 1, 6)
  np.testing.assert_array_equal(wide.dequantize(), stored.dequantize())


@pytest.mark.exhaustive
def test_several_channel_axes_are_kept(tmp_path):
  rule = AffineQuantizer(4, 'symmetric', 'channel', axis=(-2, -1))
  stored = store(rule, jax.random.normal(jax.random.key(0), (5, 2, 3)))
  storage.save_quantized(tmp_path / 'a.safetensors', {'kernel': stored})
  read = storage.load_quantized(tmp_path / 'a.safetensors')['kernel']
  assert read.quantizer == rule and read.scale.shape == (1, 2, 3)
  np.testing.assert_array_equal(read.dequantize(), stored.dequantize())
