"""Questions to ask a model, from files, from haystacks and from rules."""
