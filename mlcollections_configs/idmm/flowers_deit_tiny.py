"""IDMM with DeiT-Tiny on Oxford Flowers: 112 pixels without labels, then 224 and 448 with (official scripts).

The paper joins the official training and validation images: 2040. TFDS has them as two splits, read here as
one: `train+validation`. 800 epochs at batch 256 with 2 + 4 crops, 200 at 224 pixels (the paper: 800,
`--config.stages.at224.recipe.epochs=800`), 100 at 448. `--config.recipe.schedule.name=displaced_cosine` is
the schedule as the official code computes it. Prepare the data once:
`tfds build oxford_flowers102 --file_format=array_record`.
"""

from ml_collections import ConfigDict

MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='oxford_flowers102', train_split='train+validation', train_size=2040, image_size=112,
    mean=MEAN, std=STD, test_decode=dict(size=112, resize=128),
  )  # fmt: skip
  config.augment = dict(
    kind='resized_crop',
    jitter=(0.8, 0.8, 0.8, 0.2),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.5,
    blur_kernel=23,
  )
  config.model = dict(name='deit_tiny_patch16_224', drop_path=0.1)
  config.instances = dict(
    crops=(2, 4), scales=((0.14, 1.0), (0.05, 0.4)), mix='cutmix', alpha=0.5, label_smoothing=0.0
  )
  config.heads = dict(hidden=2048, features=256, predictor=512)
  config.target = dict(momentum=0.99, queue_size=1024, temperature=0.2)
  config.runs = ('scratch', 'scratch_longer', 'simclr', 'moco', 'idmm')

  config.recipe = recipe(base=5e-4, epochs=800, warmup_epochs=2)
  config.stages = dict(
    at224=dict(
      data=sides(224, 256),
      augment=augment(),
      recipe=recipe(base=5e-4, epochs=200, warmup_epochs=2),
    ),
    at448=dict(
      data=sides(448, 512),
      augment=augment(),
      recipe=recipe(base=5e-5, epochs=100, warmup_epochs=2, batch_size=128),
    ),
  )
  config.log_every = 50
  config.checkpoint_every = 1000
  config.eval = dict(k=20)
  return config


def recipe(base: float, epochs: int, warmup_epochs: int, batch_size: int = 256) -> dict:
  """Returns a recipe of AdamW that decays all parameters."""
  return dict(
    epochs=epochs,
    batch_size=batch_size,
    optimizer=dict(name='adamw', weight_decay=1e-3),
    schedule=dict(name='cosine', base=base, warmup_epochs=warmup_epochs),
  )


def sides(size: int, resize: int) -> dict:
  """Returns the fields of a data set that say how large images are."""
  return dict(
    image_size=size,
    stored_image=(resize, resize, 3),
    train_decode=dict(size=resize, draft=True),
    test_decode=dict(size=size, resize=resize),
  )


def augment() -> dict:
  """Returns the augmentation of the fine-tuning; RandAugment stands for the official pairs of operations."""
  return dict(
    kind='resized_crop',
    scale=(0.08, 1.0),
    interpolation='bicubic',
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.4,
    grayscale_probability=0.2,
    rand_augment=dict(magnitude=9.0, num_ops=2),
  )
