"""What a run costs: FLOPs, memory, latency, and where it took place."""
