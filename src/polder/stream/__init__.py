"""The per-layer pipeline that weights, the KV window and the tiers share."""
