"""Pretraining: the compiled step (`step`, `gradient`), the loop that feeds it, and the hooks that run beside it."""
