"""From a table of notes and labels to batches of tokens, and the synthetic radiology set."""
