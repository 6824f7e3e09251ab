"""A tiny ViT on 512 pasted digits: instance discrimination, then labels; minutes of CPU time.

Each digit lies at a random place and scale on a plain 16x16 canvas (a texture would tell the image, and would
be learned in place of the digit); the 2000 test images show 500 others four times. Two crops an image, in the
fine-tuning whole images. Next to it training on the labels alone, for as many epochs as the fine-tuning, and
as both stages.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='pasted_digits',
    train_size=512,
    train_options=dict(limit=512),
    test_options=dict(pastes=4),
  )
  config.augment = views.pasted_digits()

  config.model = dict(
    name='vit_tiny_patch16_224', patch_size=4, image_size=16, width=48, depth=3, num_heads=3
  )
  config.instances = dict(crops=(2,), scales=((0.3, 1.0),), mix='cutmix', alpha=0.5)
  config.runs = ('scratch', 'scratch_longer', 'plain', 'idmm')

  # Kernels of deviation 0.02 are too small for so narrow a network.
  config.fan_in_scaled = ('blocks_.*/kernel', 'patch_embed/.*kernel')

  config.recipe = recipe(base=3e-3, epochs=200)
  config.stages = dict(
    labels=dict(recipe=recipe(base=5e-4, epochs=60), augment=dict(kind='none'), mix='cutmix')
  )
  config.log_every = 40
  config.checkpoint_every = 300
  config.eval = dict(k=10)
  config.claims = claims()
  config.reported = (
    'Flowers, 2040 images and no others: up to 96.7 %; better than SimCLR, SupCon, MoCo v3 and DINO '
    'on the same images, and than random weights.'
  )
  return config


def recipe(base: float, epochs: int) -> dict:
  """Returns a training by AdamW."""
  return dict(
    epochs=epochs,
    batch_size=128,
    optimizer=dict(name='adamw', weight_decay=1e-3),
    schedule=dict(name='cosine', base=base, warmup_epochs=2),
  )


def claims() -> tuple:
  """Returns the claims of a small training."""
  return (
    claim('neighbors of its features at least 5 points better than untrained', 'knn_fp', 'untrained', 5.0),
    claim('fine-tuned better than from scratch', 'accuracy', 'from scratch'),
    claim('CutMix makes better neighbors', 'knn_fp', 'without mixtures'),
    claim('CutMix makes images harder to tell', 'instance_accuracy', 'without mixtures', 5.0, False),
  )  # fmt: skip


def claim(
  statement: str, metric: str, baseline: str, margin: float = 0.0, higher_is_better: bool = True
) -> dict:
  """Returns the claim that IDMM is better by `margin`."""
  return dict(
    statement=statement, metric=metric, baseline=baseline, method='IDMM', margin=margin,
    higher_is_better=higher_is_better,
  )  # fmt: skip
