"""Supervised fine-tuning with or without the indicator."""

from ctxlib.finetune.adapters import LORA_TARGETS, add_lora, export_merged
from ctxlib.finetune.labels import (
    BATCHES_GROUPED,
    TrainingExample,
    TurnLoss,
    audit,
    collate,
    end_of_turn_ids,
    label_audit,
    label_counts,
    pack,
    packs_exactly,
    show_labels,
    supervised_mask,
    training_examples,
    training_order,
)
from ctxlib.finetune.objective import weighted_loss
from ctxlib.finetune.trainer import make_trainer, train
from ctxlib.finetune.training import finetune, is_main_process

__all__ = [
    "BATCHES_GROUPED",
    "LORA_TARGETS",
    "TrainingExample",
    "TurnLoss",
    "add_lora",
    "audit",
    "collate",
    "end_of_turn_ids",
    "export_merged",
    "finetune",
    "is_main_process",
    "label_audit",
    "label_counts",
    "make_trainer",
    "pack",
    "packs_exactly",
    "show_labels",
    "supervised_mask",
    "train",
    "training_examples",
    "training_order",
    "weighted_loss",
]
