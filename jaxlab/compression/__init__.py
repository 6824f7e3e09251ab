"""Making a trained network small.

`structure(model)` tells which channels shrink together and which parts can be left out; `plan` says what
stays, as data; `masked_apply` computes what would be left, at the shapes of the whole network, and
`slice_network` makes the smaller one; `removal_scores` and `kernel_norms` say what matters.
`group_heads` makes what a decoder caches small, `compress_prompt` what a network reads: the most important
words of a prompt stay.
"""

from jaxlab.compression import convolutional as _convolutional
from jaxlab.compression import transformers as _transformers
from jaxlab.compression.adaptors import (
  AdaptorPositions,
  adaptor_hooks,
  adaptor_positions,
  candidate_blocks,
  fold_adaptors,
  init_adaptors,
  stage_of,
)
from jaxlab.compression.attention_layers import (
  AttentionLayers,
  AttentionLayout,
  attention_layout,
)
from jaxlab.compression.block_scores import (
  pruning_scores,
  require_savings,
  saved_share,
  select_blocks,
)
from jaxlab.compression.cache_grams import (
  Caches,
  Grams,
  batch_grams,
  cache_grams,
  collect_caches,
  subgroup_grams,
  weight_grams,
)
from jaxlab.compression.compressed_block import (
  DenseCut,
  compress_block,
  dense_cut,
  frozen_behind,
)
from jaxlab.compression.costs import (
  multiply_accumulates,
  num_parameters,
  paired_latency,
)
from jaxlab.compression.dense import (
  MODES,
  BlockMacs,
  DenseStructure,
  block_macs,
  dense_structure,
  kept_hidden,
  kept_neurons,
  vit_macs,
)
from jaxlab.compression.filters import filter_plan, keep_count
from jaxlab.compression.grouped_heads import (
  Bases,
  GroupedHeads,
  group_heads,
  grouped_shapes,
  head_bases,
  pool_heads,
)
from jaxlab.compression.key_value_heads import (
  FoldedLayers,
  energy_shares,
  fold_keys,
  fold_values,
  group_basis,
  group_gram,
  mean_pool_heads,
)
from jaxlab.compression.plan import Plan, compose, plan, renamed
from jaxlab.compression.prompt_compressor import (
  CompressedPrompt,
  PromptCompressor,
  compress_prompt,
  load_compressor,
  preserve_probabilities,
  save_compressor,
)
from jaxlab.compression.prompt_inputs import (
  ClassifierInput,
  PromptChunk,
  TokenLayout,
  chunk_tokens,
  classifier_input,
  prompt_chunks,
  token_layout,
)
from jaxlab.compression.prompts import (
  PromptWords,
  budget_rate,
  keep_threshold,
  kept_text,
  merge_words,
  select_contexts,
  select_words,
)
from jaxlab.compression.ranking import global_ranking, search_num_remove
from jaxlab.compression.rotary_keys import (
  commuting_basis,
  expansion_hooks,
  projection_hooks,
)
from jaxlab.compression.scores import kernel_norms, prediction_divergence, removal_scores
from jaxlab.compression.selection import half_block, highest_channels, highest_channels_by_head
from jaxlab.compression.shapes import shape_names, shape_plan
from jaxlab.compression.slicing import (
  mask_variables,
  masked,
  masked_apply,
  masks,
  slice_network,
  sliced_model,
)
from jaxlab.compression.structure import Cut, Group, Structure, describe, shrunk, structure
from jaxlab.compression.synthetic_images import (
  distinct_labels,
  require_recognized,
  synthesize,
  variation,
)

del _convolutional, _transformers

__all__ = [
  'MODES',
  'AdaptorPositions',
  'AttentionLayers',
  'AttentionLayout',
  'Bases',
  'BlockMacs',
  'Caches',
  'ClassifierInput',
  'CompressedPrompt',
  'Cut',
  'DenseCut',
  'DenseStructure',
  'FoldedLayers',
  'Grams',
  'Group',
  'GroupedHeads',
  'Plan',
  'PromptChunk',
  'PromptCompressor',
  'PromptWords',
  'Structure',
  'TokenLayout',
  'adaptor_hooks',
  'adaptor_positions',
  'attention_layout',
  'batch_grams',
  'block_macs',
  'budget_rate',
  'cache_grams',
  'candidate_blocks',
  'chunk_tokens',
  'classifier_input',
  'collect_caches',
  'commuting_basis',
  'compose',
  'compress_block',
  'compress_prompt',
  'dense_cut',
  'dense_structure',
  'describe',
  'distinct_labels',
  'energy_shares',
  'expansion_hooks',
  'filter_plan',
  'fold_adaptors',
  'fold_keys',
  'fold_values',
  'frozen_behind',
  'global_ranking',
  'group_basis',
  'group_gram',
  'group_heads',
  'grouped_shapes',
  'half_block',
  'head_bases',
  'highest_channels',
  'highest_channels_by_head',
  'init_adaptors',
  'keep_count',
  'keep_threshold',
  'kept_hidden',
  'kept_neurons',
  'kept_text',
  'kernel_norms',
  'load_compressor',
  'mask_variables',
  'masked',
  'masked_apply',
  'masks',
  'mean_pool_heads',
  'merge_words',
  'multiply_accumulates',
  'num_parameters',
  'paired_latency',
  'plan',
  'pool_heads',
  'prediction_divergence',
  'preserve_probabilities',
  'projection_hooks',
  'prompt_chunks',
  'pruning_scores',
  'removal_scores',
  'renamed',
  'require_recognized',
  'require_savings',
  'save_compressor',
  'saved_share',
  'search_num_remove',
  'select_blocks',
  'select_contexts',
  'select_words',
  'shape_names',
  'shape_plan',
  'shrunk',
  'slice_network',
  'sliced_model',
  'stage_of',
  'structure',
  'subgroup_grams',
  'synthesize',
  'token_layout',
  'variation',
  'vit_macs',
  'weight_grams',
]
