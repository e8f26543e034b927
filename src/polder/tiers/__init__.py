"""Places for KV blocks outside the cache of the engine: what lies where, what is lent, what has to go."""
