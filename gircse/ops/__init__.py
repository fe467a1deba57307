"""Public operations: soft tokens, their inspection, and the stepwise contrastive objective."""

from . import backends  # noqa: F401  first, because it makes a plain checkout's kernels importable
from .info_nce import InfoNCEStats, stepwise_info_nce
from .module import HeadFacts, SoftEmbedding, from_model
from .objective import icr_objective
from .pooling import l2_normalize, pool_steps
from .soft_embed import FullStats, SoftTokenStats, soft_embed
from .soft_embed_logits import soft_embed_logits
from .top_tokens import top_tokens
from .vocab_parallel import VocabShard

__all__ = [
    "FullStats",
    "HeadFacts",
    "InfoNCEStats",
    "SoftEmbedding",
    "SoftTokenStats",
    "VocabShard",
    "from_model",
    "icr_objective",
    "l2_normalize",
    "pool_steps",
    "soft_embed",
    "soft_embed_logits",
    "stepwise_info_nce",
    "top_tokens",
]
