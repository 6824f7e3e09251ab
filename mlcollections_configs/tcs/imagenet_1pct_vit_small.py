"""TCS from few labels: a hundredth of ImageNet, DINOv2's ViT-S in the coordinates of its ViT-L.

  python -m experiments.tcs --config=imagenet_1pct_vit_small --workdir=gs://...

The student is pretrained itself, as in the paper's few-shot learning; how it is fine-tuned is not known:
AdamW at 2.5e-4, the rate of OFA-KD's transformers, for 50 epochs [inferred]. Prepare the data once: `tfds
build imagenet2012_subset --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.tcs import imagenet_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  data = dict(name='imagenet2012_subset/1pct')
  config = imagenet_resnet18.get_config()
  config.teacher = imagenet_resnet18.teacher('large', data)
  small = imagenet_resnet18.teacher('small', data)
  config.student = small | dict(
    augment=dict(kind='resized_crop'),
    recipe=dict(
      epochs=50,
      batch_size=256,
      optimizer=dict(name='adamw', weight_decay=2e-3),
      schedule=dict(name='cosine', base=2.5e-4, warmup_epochs=5),
    ),
  )
  config.checkpoint_every = 500
  return config
