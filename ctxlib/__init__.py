"""Loss of context-awareness in instruction fine-tuning: measured, explained and cured (Wang et al. 2024, arXiv 2411.02688)."""
