"""KV on several disks, placed by co-activation and read in balance (Swarm)."""
