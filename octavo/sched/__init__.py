"""The decide tower: which tokens run in the next step. No torch."""
