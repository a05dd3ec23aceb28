r"""Record and steer the attention of an unchanged causal language model, and record or patch the output of its heads.

The context managers register one attention function with transformers for as long as they are open:

    with steer_attention(model, keep, steering_alpha=0.95), record_allocation(model, roles) as recording:
        model(input_ids, attention_mask=attention_mask)
    recording.allocation  # layer batch head row role

They may be nested in any order; what is recorded is always the steered attention.
"""

from ctxlib.attention.hook import Head
from ctxlib.attention.patch import HeadOutputs, patch_outputs, record_outputs
from ctxlib.attention.record import Recording, record_allocation, route, verify_recording
from ctxlib.attention.steer import steer_attention
from ctxlib.attention.target import steer_to_share

__all__ = [
    "Head",
    "HeadOutputs",
    "Recording",
    "patch_outputs",
    "record_allocation",
    "record_outputs",
    "route",
    "steer_attention",
    "steer_to_share",
    "verify_recording",
]
