"""What a run will need, told from configs alone, before a weight is read."""
