"""SfN's Freeze of Qwen2.5-14B-Instruct on s1K, F1 to F4: the recipe of s1.

  python -m experiments.sfn --config=qwen2_5_14b --workdir=gs://...

`train.npz` holds the 1000 traces of s1K, `test.npz` others that were not tuned on
(`jaxlab.data.read_completions` says how such a file is made): prompts in the template of the model's chat,
which do not count, and thoughts with the answer. Weights and a batch of 16 are split over at most 16 chips.
Longer traces are cut at 4096 tokens. The paper's windows have 32768, `--config.tuning.data.length=32768` with
`train_options.length` and `test_options.length` there: attention keeps the scores of a whole window, in
float32 172 GB a sequence and layer where 4096 tokens take 2.7, and logits are 20 GB for 2.5. AIME 2024 is
answered with `answers` (see `qwen2_5_math_1_5b`), MATH-500 likewise; the paper's GPQA and its forcing of
longer thoughts are not here. Delta and Merge take checkpoints (`checkpoints`), not networks that lie on many
chips.
"""

from ml_collections import ConfigDict


def data(length: int = 4096) -> dict:
  """Returns traces of at most `length` tokens."""
  options = dict(vocab_size=152064, length=length)
  return dict(
    name='completions',
    train_split='train.npz',
    test_split='test.npz',
    train_options=options,
    test_options=options,
    train_size=1000,
    length=length,
  )


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = dict(
    data=data(),
    # The base's epsilon is 1e-5.
    model=dict(name='qwen2_5_14b', epsilon=1e-6, remat=True),
    pretrained='qwen2_5_14b.Qwen/Qwen2.5-14B-Instruct',
  )
  config.tuning = dict(
    data=data(),
    recipe=dict(
      epochs=5,
      batch_size=16,
      precision='bfloat16',
      optimizer=dict(name='adamw', betas=(0.9, 0.95), weight_decay=1e-4),
      schedule=dict(name='cosine', base=1e-5, warmup_epochs=0.25),
    ),
  )
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  config.eval_batch_size = 16
  config.log_every = 10
  config.checkpoint_every = 62

  config.runs = ('F1', 'F2', 'F3', 'F4')
  config.blocks = (5, 30)
  config.compared = False

  config.reported = (
    'AIME 2024 / MATH-500 / GPQA and steps a second: before .133 / .810 / .449; F1 .133 / .722 / .414, .106; '
    'F2 .266 / .848 / .485, .099; F3 .233 / .854 / .490, .081; F4 .266 / .872 / .530, .053.'
  )
  return config
