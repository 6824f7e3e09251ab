"""SfN with a decoder of four blocks: A knows plain sums, B their written working; minutes.

A reads sums `a+b=c;` of numbers below 50, 400 steps; B learns to add numbers of two digits column by column,
`47+38=7+8=15;4+3+1=8;85;`, 200 steps, the prompt masked. Both training splits and the unseen sums are pairs
of numbers of their own. Batches, width and learning rates are the plan's, its 500 and 300 steps were cut to
400 and 200 for time; only the ordering F2 below F1 is asked for.
"""

from ml_collections import ConfigDict

ATTENTION = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
MLP = ('gate_proj', 'up_proj', 'down_proj')


def recipe(epochs: int) -> dict:
  """Returns a training at a learning rate of 1e-3 in batches of 32."""
  return dict(
    epochs=epochs,
    batch_size=32,
    optimizer=dict(name='adamw', betas=(0.9, 0.95), weight_decay=1e-4),
    schedule=dict(name='cosine', base=1e-3, warmup_epochs=0.05 * epochs),
  )


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  plain = dict(kind='plain', low=0, high=50, length=25)
  config.network = dict(
    data=dict(
      name='sums',
      train_options=dict(size=12800, **plain),
      test_options=dict(size=512, **plain),
      train_size=12800,
      length=25,
    ),
    model=dict(
      name='llama', vocab_size=14, width=96, depth=4, num_heads=4, hidden=256, max_length=32
    ),
    recipe=recipe(1),
  )
  written = dict(kind='written', low=10, high=100, length=25)
  config.tuning = dict(
    data=dict(
      name='sums',
      train_options=dict(size=3200, **written),
      test_options=dict(size=512, **written),
      train_size=3200,
      length=25,
    ),
    recipe=recipe(2),
  )
  config.eval_batch_size = 256

  config.runs = ('F1', 'F2', 'F3', 'F4', 'qkv', 'mlp')
  config.blocks = (1, 3)
  config.destroyed = (*((name,) for name in (*ATTENTION, *MLP)), ('self_attn',), ('mlp',))
  config.merges = (
    ('o_proj',), ATTENTION[:3], ('mlp',), ('o_proj', 'norm', 'lm_head', 'embed_tokens'),
  )  # fmt: skip

  config.claims = (
    dict(
      statement='tuning o_proj as well: a lower loss of unseen working and answers',
      metric='loss',
      baseline='F1: embedding, head',
      method='F2: with o_proj',
      margin=0.0,
      higher_is_better=False,
    ),
  )
  config.reported = (
    'Freeze, AIME 2024 / MATH-500 / GPQA of Qwen2.5-32B-Instruct: F1 .200 / .756 / .444, F2 .367 / .890 / '
    '.520, F3 .300 / .886 / .525, F4 .367 / .906 / .591, steps a second .055, .052, .044, .015. Merge, '
    'AIME 2024 of 1.5B: A .067, o_proj .200, q, k, v .000, MLPs .000, B .233; from 7B on o_proj alone no '
    'longer helps. Destruction, 32B: queries, keys and MLPs leave random tokens, values and o_proj fluent '
    'text. Delta: o_proj changes most from 7B on, and alone in two modes.'
  )
  return config
