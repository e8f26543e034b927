"""Active-layer KV: of some blocks only w layers are in the device's memory at a time, the others come and go
(SwiftCache)."""
