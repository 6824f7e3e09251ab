"""CSRA with ViT-B/16 on WIDER-Attribute, 224 pixels, next to global average pooling (constants of the code).

The head sees the patch tokens behind the last norm, without the class token. Persons are cut out by their
boxes and resized to 224x224 pixels; flips are the only augmentation. An attribute that is not specified is
negative in training, left out of average precisions, and negative in the other metrics. Weights are timm's of
2020 [inferred: which of them]. The photographs and annotations of
mmlab.ie.cuhk.edu.hk/projects/WIDERAttribute.html are expected below `data/WIDER_Attribute`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='wider_attribute')
  config.protocol = 'wider'
  config.augment = dict(kind='pad_crop', padding=0, flip=True)

  config.model = dict(name='vit_base_patch16_224')
  config.pretrained = 'vit_base_patch16_224.orig_in21k_ft_in1k'
  config.heads = dict(csra=dict(title='CSRA', num_heads=1, lam=0.3))
  config.test_time = (0.1, 0.3, 0.5, 1.0)

  config.recipe = dict(
    epochs=30,
    batch_size=16,
    optimizer=dict(
      name='sgd', momentum=0.9, weight_decay=1e-4, lr_multipliers=(('head/.*', 10.0),)
    ),
    schedule=dict(name='multistep', base=0.01, milestones=(5, 10, 15, 20, 25), warmup_epochs=2),
    eval_every=1771,
    best_metric='mAP',
  )
  config.log_every = 100
  config.checkpoint_every = 1771
  config.eval_batch_size = 256
  config.reported = 'WIDER-Attribute: mAP 89.0 with ViT-B/16, 90.2 with ViT-L/16.'
  return config
