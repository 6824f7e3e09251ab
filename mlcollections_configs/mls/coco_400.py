"""MLS with ResNet-50 on COCO's training images, 400 epochs, next to MoCo v2 (constants of the paper).

Dictionaries of 4096 entries, 20 pseudo positives, both losses from the first step on. Batch size and schedule
are [inferred]: what MoCo v2 and DenseCL take on COCO; batch statistics are of eight groups, as on 8 GPUs. The
paper judges by detection and segmentation; here backbones are judged frozen, by probes of COCO's 80 classes.
Prepare the data once: `tfds build coco/2017 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='coco/2017')
  config.augment = views.photographs()

  config.model = dict(name='resnet50', norm_groups=8)
  config.heads = dict(hidden=2048, features=256)
  config.target = dict(momentum=0.995, queue_size=4096, temperature=0.2)
  config.losses = dict(mls=dict(title='MLS', k=20, weight=0.5, warmup=0.0))

  config.recipe = dict(
    epochs=400,
    batch_size=512,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine', base=0.3),
  )
  config.log_every = 50
  config.checkpoint_every = 2000

  config.eval_batch_size = 512
  config.eval = dict(k=20, bank=4096)
  config.reported = (
    'COCO, ResNet-50, 400 epochs: Mask R-CNN (FPN) box / mask AP 40.1 / 36.2; VOC07 fine-tuned 85.8 mAP '
    'against MoCo v2 80.5. No probe of COCO classes.'
  )
  return config
