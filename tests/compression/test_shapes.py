import jax
import numpy as np
import pytest

from jaxlab import compression, models


def test_of_a_pyramid_each_stage_has_its_own_width_and_loses_its_least_important_blocks():
  options = {'num_heads': (1, 2), 'mlp_ratios': (2, 2), 'reductions': (2, 1), 'num_classes': 3}
  full = models.PVT(widths=(8, 16), depths=(3, 2), **options)
  small = models.PVT(widths=(4, 8), depths=(2, 1), **options)
  names = compression.shape_names(full, small)
  structure, rng = compression.structure(full), np.random.default_rng(0)
  blocks = [name for name in names if name not in structure.groups]
  assert blocks == [f'stages_{i}/blocks_{j}' for i, depth in ((0, 3), (1, 2)) for j in range(depth)]
  scores = {name: rng.random(structure.sizes.get(name, ())) for name in names}
  scores |= {'stages_0/blocks_1': 0.0, 'stages_1/blocks_0': -1.0}
  plan = compression.shape_plan(full, small, scores)
  assert plan.drop == ('stages_0/blocks_1', 'stages_1/blocks_0')
  shape = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  variables = jax.eval_shape(full.init, jax.random.key(0), shape)
  cut = jax.eval_shape(lambda own: compression.slice_network(full, own, plan)[1], variables)
  assert cut == dict(jax.eval_shape(small.init, jax.random.key(0), shape))


def test_networks_of_another_kind_or_size_are_refused():
  full, rng = models.ViT(width=8, num_heads=4, depth=2, num_classes=3), np.random.default_rng(0)
  for small, message in (
    (full.clone(depth=3), "the network has no 'blocks_2/attention/qkv'"),
    (full.clone(width=16), 'neck, which becomes neck: count=16: expected 1 to 8'),
    (full.clone(width=1, num_heads=1), 'neck: of one channel'),
    (full.clone(hidden_widths=(32, 0)), "the smaller network has no 'blocks_1/mlp/fc1'"),
    (models.PVT(), 'the smaller network has no blocks_0'),
  ):
    scores = {name: rng.random(compression.structure(full).sizes.get(name, ())) for name in
              compression.shape_names(full, small)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
      compression.shape_plan(full, small, scores)
