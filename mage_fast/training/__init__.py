"""Data, optimiser, checkpoints, logs and the loop that every training recipe shares."""
