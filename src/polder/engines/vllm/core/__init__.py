"""The engine core's side of elastic KV memory: demand, grants, recalls, and which blocks may be used."""
