"""The notebooks from 06 on: many fine-tunings of the miniature, at several seeds."""
