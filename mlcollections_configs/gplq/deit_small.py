"""GPLQ with DeiT-S (the distilled weights) on ImageNet, the paper's setting.

  python -m experiments.gplq --config=deit_small --workdir=gs://...

One epoch of batches of 128 at a constant learning rate of 5e-6 (with fewer images a step: 64 2.5e-6, 32 and
16 1e-6), so at most 128 chips. Weight decay, augmentation, and the number of images for the components are
inferred. Linear probes are fitted on features of the central crop; the paper trains them for 100 epochs with
drop path, and on FGVC-Aircraft, too, which the TFDS catalogue does not have. DeiT-B:
`--config.network.model.name=deit_base_distilled_patch16_224
--config.network.pretrained=deit_base_distilled_patch16_224.fb_in1k`.
Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import imagenet_networks


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = network('deit_small_distilled')
  config.transfer = {
    name: dict(name=name, test_decode=dict(size=224, resize=256, interpolation='bicubic'))
    for name in ('food101', 'oxford_flowers102', 'oxford_iiit_pet', 'cars196')
  }

  config.bits = ('4w4a', '3w3a')
  config.calibration = 512
  config.batch_size = 64
  config.recipe = dict(
    epochs=1,
    batch_size=128,
    optimizer=dict(name='adamw', weight_decay=0.0),
    schedule=dict(name='constant', base=5e-6),
  )
  config.mimicking = dict(weight=1.0, images=5120, share=0.6, multiple=32)
  config.eval_batch_size = 1024
  config.reported = (
    'ImageNet accuracy and mean transfer to five data sets: DeiT-S in float 81.2 and 65.8, at 4w4a '
    'RepQ-ViT 72.7 and 60.0, GPLQ 78.8 and 67.8.'
  )
  return config


def network(name: str) -> dict:
  """Returns a network with public weights under random resized crops and flips."""
  found = dict(imagenet_networks()[name])
  del found['quantization']
  kernel = found['data']['test_decode']['interpolation']
  return found | dict(augment=dict(kind='resized_crop', interpolation=kernel))
