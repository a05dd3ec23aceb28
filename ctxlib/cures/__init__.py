"""Cures against the loss of context, each with its source and its exact definition; a new one is one class.

`Cure` is the seam: three optional hooks, for the corpus, the training and the answering.
"""

from ctxlib.cures.cure import Ask, Cure, Material, key, overrides
from ctxlib.cures.decoding import ContextAwareDecoding
from ctxlib.cures.indicator import Indicator
from ctxlib.cures.prompts import QuoteFirst, SystemPrompt, quotation
from ctxlib.cures.steering import Steering, TargetShare
from ctxlib.cures.training import DropContradicting, KeepToBase, Rehearsal, SelfDistilled, WeightByScore
from ctxlib.cures.weights import WiseFT, adapter_scaled

__all__ = [
    "Ask",
    "ContextAwareDecoding",
    "Cure",
    "DropContradicting",
    "Indicator",
    "KeepToBase",
    "Material",
    "QuoteFirst",
    "Rehearsal",
    "SelfDistilled",
    "Steering",
    "SystemPrompt",
    "TargetShare",
    "WeightByScore",
    "WiseFT",
    "adapter_scaled",
    "key",
    "overrides",
    "quotation",
]
