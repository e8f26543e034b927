"""The window: KV of the layers being computed in local memory, that of the others in a store."""
