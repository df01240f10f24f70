"""What pruning costs and saves: MACs, bytes, perplexity, time; comparisons, allocation and reports on them."""
