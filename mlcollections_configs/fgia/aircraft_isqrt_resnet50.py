"""iSQRT-COV with ResNet-50 on FGVC-Aircraft; else as `cub_isqrt_resnet50`.

The 6667 images of `trainval` in folders `data/fgvc_aircraft/train/CLASS`, the 3333 of the test in
`data/fgvc_aircraft/test/CLASS`, by variant (www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft).
"""

from ml_collections import ConfigDict

from mlcollections_configs.fgia import cub_isqrt_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_isqrt_resnet50.get_config()
  root = dict(root='data/fgvc_aircraft')
  config.recognition.data = dict(
    cub_isqrt_resnet50.data('image_folder'),
    num_classes=100,
    train_size=6667,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    train_options=root,
    test_options=root,
    num_threads=16,
    num_workers=16,
  )
  config.checkpoint_every = 667
  config.reported = (
    'FGVC-Aircraft, ResNet-50: 90.0 % with iSQRT-COV (90.3 in a re-run), ResNet-101 91.4 %.'
  )
  return config
