import jax
import numpy as np
import pytest

from jaxlab.parallel import batch_sharding, check_batch_size, make_mesh


@pytest.mark.parametrize(
  'sizes, shape',
  [
    ({}, (8, 1, 1)),
    ({'fsdp': 4}, (2, 4, 1)),
    ({'data': 1, 'fsdp': -1, 'tensor': 2}, (1, 4, 2)),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
  ],
)
def test_minus_one_takes_the_remaining_devices(sizes, shape):
  mesh = make_mesh(**sizes)
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')


def test_mesh_uses_the_devices_that_are_given():
  devices = jax.devices()[2:4]
  assert set(make_mesh(devices=devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
  'sizes, message',
  [
    ({'data': 3}, 'does not fit 8 device'),
    ({'fsdp': 3}, 'fsdp=3.*does not fit 8'),
    ({'data': 2, 'fsdp': 2}, 'multiply to 8'),
    ({'data': -1, 'fsdp': -1}, 'only one axis may be -1, got data and fsdp'),
    ({'tensor': 0}, 'tensor=0'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(**sizes)


def test_batch_is_split_over_data_and_fsdp_only():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  x = jax.device_put(np.arange(8), batch_sharding(mesh))
  assert {shard.data.shape for shard in x.addressable_shards} == {(2,)}
  assert len({str(shard.index) for shard in x.addressable_shards}) == 4


def test_batch_that_does_not_divide_is_refused_by_name():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  check_batch_size(12, mesh)
  with pytest.raises(ValueError, match=r'config\.batch=10 .* = 4 parts.*use 8 or 12'):
    check_batch_size(10, mesh, 'config.batch')
  with pytest.raises(ValueError, match='use 4'):
    check_batch_size(2, mesh)
