import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, supervised
from experiments.harness.sections import Recipe, Schedule
from experiments.protocols import fine_tuning

MODEL = (
  "model={'name': 'vit_tiny_patch16_224', 'patch_size': 8, 'image_size': 16, 'width': 8, 'depth': 2, "
  "'num_heads': 2}"
)
RECIPE = (
  "'recipe': {'epochs': 1, 'batch_size': 512, 'schedule': {'name': 'constant', 'base': RATE}}"
)


def tiny_config(rate, *fields):
  section = ', '.join([RECIPE.replace('RATE', str(rate)), *fields])
  changes = [MODEL, 'methods=simclr,', f'fine_tuning={{{section}}}', 'data.test_options.pastes=1']
  return launcher.load('ssl_baselines', 'embedded', changes)


@pytest.mark.exhaustive
def test_a_learning_rate_of_zero_leaves_the_backbone_under_a_drawn_classifier(tmp_path):
  config = tiny_config(0.0)
  backbone = networks.create(config.model, num_classes=None)
  variables = dict(jax.jit(backbone.init)(jax.random.key(5), jnp.zeros((1, 16, 16, 1))))
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  run = fine_tuning.training(config, config.fine_tuning, 'fine-tuned', None)
  found = fine_tuning.accuracy(config, config.fine_tuning, run, variables, sources, tmp_path / 'x')
  head = jax.jit(run.program.init)(jax.random.key(config.seed)).params['head']
  records = [sources['test'][i] for i in range(len(sources['test']))]
  images = np.stack([record['image'] for record in records]) / 255
  features = jax.jit(backbone.apply)(
    variables, jnp.float32((images - config.data.mean) / config.data.std)
  )
  logits = np.asarray(features) @ np.asarray(head['kernel']) + np.asarray(head['bias'])
  expected = np.mean(logits.argmax(1) == [record['label'] for record in records])
  assert found == pytest.approx(100 * expected, abs=0.21)  # a tie of rounding is one image of 500


def test_each_layer_has_the_learning_rate_of_its_depth():
  config = tiny_config(0.5, "'layer_decay': 0.1")
  program = fine_tuning.training(config, config.fine_tuning, '', None).program
  state = jax.jit(program.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  image, label = rng.integers(0, 256, (512, 16, 16, 1), np.uint8), rng.integers(0, 10, 512)
  batch = {'image': image, 'label': np.int32(label), 'index': np.arange(512, dtype=np.int32)}
  new, _ = jax.jit(program.step)(state, {}, batch)
  # The rate is constant, and the first step has no momentum yet.
  plain = tiny_config(0.5)
  step = fine_tuning.training(plain, plain.fine_tuning, '', None).program.step
  whole, _ = jax.jit(step)(state, {}, batch)
  moved, expected = (jax.tree.map(lambda a, b: a - b, s.params, state.params) for s in (new, whole))
  factors = {'blocks_0': 1e-2, 'blocks_1': 1e-1, 'patch_embed': 1e-3, 'cls_token': 1e-3, 'norm': 1}
  for name, factor in factors.items():
    pairs = zip(
      jax.tree.leaves(moved['backbone'][name]), jax.tree.leaves(expected['backbone'][name])
    )
    for a, b in pairs:
      scale = np.abs(b).max()
      np.testing.assert_allclose(a, factor * b, rtol=2e-3, atol=factor * scale * 1e-3 + 1e-7)
  np.testing.assert_allclose(moved['head']['kernel'], expected['head']['kernel'], rtol=1e-5)


@pytest.mark.exhaustive
def test_a_recipe_with_mixup_and_cutmix_takes_one_of_them_each_step():
  recipe = Recipe(epochs=1, batch_size=4, schedule=Schedule(0.1), mixup=0.8, cutmix=1.0)
  own = jnp.arange(4.0)
  images = jnp.broadcast_to(own[:, None, None, None], (4, 8, 8, 1))
  kinds, mix = [], jax.jit(lambda key: supervised.mixed(key, images, recipe))
  for seed in range(12):
    mixed, partner, share = mix(jax.random.key(seed))
    np.testing.assert_allclose(
      mixed.mean((1, 2, 3)), share * own + (1 - share) * own[partner], rtol=1e-4, atol=1e-6
    )
    whole = jnp.all(mixed == mixed[:, :1, :1])
    kinds.append('mixup' if whole and 0 < share < 1 else 'cutmix')
  assert set(kinds) == {'mixup', 'cutmix'}
