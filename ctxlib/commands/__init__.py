"""The commands of `ctxlib`: what no notebook needs."""
