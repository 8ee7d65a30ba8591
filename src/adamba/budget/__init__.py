"""What a recipe family costs before it runs: tokens, FLOPs, hours, dollars and memory of every phase."""
