"""From images to batches: random bits, masks, sources, shards, and what reads them."""
